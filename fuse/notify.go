package fuse

import (
	"context"
	"fmt"
	"os"
	"strings"

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
// is too old for it; and [ErrUnmounted], [ErrAborted] or os.ErrClosed after the
// end of the session.

// notify sends a notification.
func (s *Session) notify(name string, code int32, parts ...[]byte) error {
	if s.life.Err() != nil {
		return fuseError(name, s.object(), context.Cause(s.life))
	}
	var header [fusewire.OutHeaderSize]byte
	length := len(header)
	for _, p := range parts {
		length += len(p)
	}
	fusewire.PutNotifyHeader(&header, length, code)
	file, fd, ok := s.pin()
	if !ok {
		return fuseError(name, s.object(), s.ended())
	}
	// Unlike an answer, this may wait.
	_, err := unix.Writev(fd, append([][]byte{header[:]}, parts...))
	file.Unpin()
	if err == nil {
		return nil
	}
	if s.connectionGone() {
		return fuseError(name, s.object(), s.ended())
	}
	return fuseError(name, s.object(), os.NewSyscallError("writev", err))
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
