package fuse

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
)

// Notifications: what the server tells the kernel without being asked. What each
// does is in fs/fuse/dev.c of the kernel.
//
// A notification may wait for what the kernel holds while a request is under
// way: it must not be sent by the only goroutine that answers requests, nor
// before such a request about the same file is answered.
//
// All of them return an error that Is unix.ENOENT when the kernel does not know
// the node or the name, which is usually all right; unix.EINVAL when the kernel
// is too old for it; unix.EMFILE if this process has no descriptor left, which each
// needs one of; and [ErrUnmounted], [ErrAborted] or os.ErrClosed after the end of the
// session. One that waits when the session is handed over goes on waiting after Close.

// notify sends a notification.
func (s *Session) notify(name string, code int32, parts ...[]byte) error {
	fd, err := s.beginNotify()
	if err != nil {
		return failed(name, s.object(), err)
	}
	defer s.endNotify(fd)
	var header [fusewire.OutHeaderSize]byte
	length := len(header)
	for _, p := range parts {
		length += len(p)
	}
	fusewire.PutNotifyHeader(&header, length, code)
	_, err = unix.Writev(fd, append([][]byte{header[:]}, parts...))
	if err == nil {
		return nil
	}
	if s.connectionGone() {
		return fuseError(name, s.object(), s.ended())
	}
	return fuseError(name, s.object(), os.NewSyscallError("writev", err))
}

// beginNotify returns a descriptor for one notification. Unlike an answer, that may
// wait, and for an answer: it must not hold up the device that this goes through.
func (s *Session) beginNotify() (fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return -1, context.Cause(s.life)
	}
	file, theirs, ok := s.pinAny()
	if !ok {
		return -1, os.ErrClosed
	}
	defer file.Unpin()
	fd, err = unix.FcntlInt(uintptr(theirs), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("fcntl", err)
	}
	s.notifying++
	return fd, nil
}

func (s *Session) endNotify(fd int) {
	unix.Close(fd)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notifying--
}

// endNotifications waits for the notifications of a session that has ended. Where
// its connection could not be aborted, they wait for answers: what keeps them waiting
// fails as by an abort.
func (s *Session) endNotifications() {
	var buf []byte
	for {
		s.mu.Lock()
		under := s.notifying
		inHand := slices.Collect(maps.Values(s.outstanding))
		s.mu.Unlock()
		if under == 0 {
			return
		}
		for _, r := range inHand {
			r.device.refuse(r.Header.Unique)
		}
		if buf == nil {
			buf = newBuffer(s.bufferSize, os.Getpagesize())
		}
		if !s.refuseUnread(buf) {
			time.Sleep(time.Millisecond)
		}
	}
}

// refuseUnread refuses a request that nobody has read, and tells whether there was one.
func (s *Session) refuseUnread(buf []byte) bool {
	for _, d := range s.openDevices() {
		fd, ok := d.file.Pin()
		if !ok {
			continue
		}
		n, err := unix.Read(fd, buf)
		d.file.Unpin()
		if err != nil {
			continue
		}
		if h, err := fusewire.DecodeInHeader(buf[:n]); err == nil && Opcode(h.Opcode).answered() {
			d.refuse(h.Unique)
		}
		return true
	}
	return false
}

// refuse answers a request as an abort does.
func (d *Device) refuse(unique uint64) {
	var header [fusewire.OutHeaderSize]byte
	fusewire.PutOutHeader(&header, len(header), int(unix.ECONNABORTED), unique)
	d.write(&header, nil)
}

// notifyName sends a notification about a name in a directory.
func (s *Session) notifyName(op string, code int32, name string, body func(b []byte) []byte) error {
	if name == "" || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return fuseError(op, s.object(), fmt.Errorf("%q is not a name in a directory: %w", name, unix.EINVAL))
	}
	return s.notify(op, code, body(nil))
}

// NotifyInvalInode drops what the kernel has cached of a file: its attributes,
// and its data from offset on, length bytes or, with 0, to the end. With a
// negative offset it drops the attributes only.
func (s *Session) NotifyInvalInode(node uint64, offset, length int64) error {
	return s.notify("notify inval_inode", fusewire.CodeInvalInode, fusewire.AppendInvalInode(nil, node, offset, length))
}

// NotifyInvalEntry drops a name from the directory cache, so that it is looked
// up again. It waits while a request that changes the directory is under way.
func (s *Session) NotifyInvalEntry(parent uint64, name string) error {
	return s.notifyName("notify inval_entry", fusewire.CodeInvalEntry, name, func(b []byte) []byte {
		return fusewire.AppendInvalEntry(b, parent, name, 0)
	})
}

// NotifyExpireEntry lets a name in the directory cache be looked up again at its
// next use, without detaching what is mounted or open below it. Kernels without
// InitHasExpireOnly (before Linux 6.2) do what NotifyInvalEntry does.
func (s *Session) NotifyExpireEntry(parent uint64, name string) error {
	return s.notifyName("notify expire_entry", fusewire.CodeInvalEntry, name, func(b []byte) []byte {
		return fusewire.AppendInvalEntry(b, parent, name, fusewire.ExpireOnly)
	})
}

// NotifyDelete says that a name was deleted, other than by the kernel's request.
// Nothing happens if the name is not that of child any more. Who watches the
// directory by inotify is told.
func (s *Session) NotifyDelete(parent, child uint64, name string) error {
	return s.notifyName("notify delete", fusewire.CodeDelete, name, func(b []byte) []byte {
		return fusewire.AppendDelete(b, parent, child, name)
	})
}

// NotifyStore puts data into the kernel's cache of a file, from offset on. The
// file becomes longer if need be.
func (s *Session) NotifyStore(node, offset uint64, data []byte) error {
	return s.notify("notify store", fusewire.CodeStore, fusewire.AppendStore(nil, node, offset, uint32(len(data))), data)
}

// NotifyRetrieve asks for what the kernel has cached of a file. A request
// NOTIFY_REPLY with Header.Unique unique follows, which has struct
// fuse_notify_retrieve_in and as much of the data as is cached without a gap.
func (s *Session) NotifyRetrieve(unique, node, offset uint64, size uint32) error {
	return s.notify("notify retrieve", fusewire.CodeRetrieve, fusewire.AppendRetrieve(nil, unique, node, offset, size))
}

// NotifyResend lets the kernel send all requests again that were read and not
// answered, with bit 63 of Header.Unique set. Answers to the first copy of them
// are errors that are unix.ENOENT from then on. It needs Linux 6.9.
func (s *Session) NotifyResend() error {
	return s.notify("notify resend", fusewire.CodeResend)
}

// NotifyIncEpoch lets all names in the directory cache be looked up again at
// their next use. It needs Linux 6.16.
func (s *Session) NotifyIncEpoch() error {
	return s.notify("notify inc_epoch", fusewire.CodeIncEpoch)
}

// NotifyPrune lets the kernel forget files that nobody uses. It needs Linux
// 6.18.
func (s *Session) NotifyPrune(nodes ...uint64) error {
	return s.notify("notify prune", fusewire.CodePrune, fusewire.AppendPrune(nil, nodes))
}

// NotifyPoll wakes who polls the file with the poll handle of a POLL request
// (see [Config.ServePoll]).
func (s *Session) NotifyPoll(handle uint64) error {
	return s.notify("notify poll", fusewire.CodePoll, fusewire.AppendPoll(nil, handle))
}
