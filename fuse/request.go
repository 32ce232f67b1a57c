package fuse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
)

// Header is what every request begins with (struct fuse_in_header of
// include/uapi/linux/fuse.h).
type Header struct {
	Len    uint32 // of the whole message, in bytes
	Opcode Opcode // what is asked for
	Unique uint64 // names the request; bit 63 is set when it is sent again
	NodeID uint64 // of the file that it is about; 1 is the root
	UID    uint32 // of the client; meaningless if nobody's, as in RELEASE
	GID    uint32 //
	PID    uint32 // the thread of the client; 0 if it is of another process ID namespace
	ExtLen int    // how many bytes at the end of Body are extensions (struct fuse_ext_header)
}

// A Request is what a client waits for, or what the kernel tells the server.
//
// Each request is answered once, by [Request.Reply], [Request.ReplyErrno] or
// [Request.Close], from any goroutine; its client waits until then, and cannot
// even be killed. FORGET, BATCH_FORGET and NOTIFY_REPLY have no answer, and are
// closed.
type Request struct {
	When   time.Time // when it was read
	Header Header    // what it is and of whom

	// Body is what follows the header. It is valid until the request is
	// answered or closed; the memory is used again then. The data of a WRITE is
	// aligned to a page in it, or to 512 bytes if it is less than a page.
	Body []byte

	device  *Device
	message []byte // header and Body
	state   atomic.Uint32

	// Guarded by the session's mutex.
	interrupted bool
	ctx         context.Context // nil until somebody asks for it
	cancel      context.CancelCauseFunc
}

// States of a request.
const (
	requestOpen          = iota // to be answered
	requestOffered              // on its way to a consumer
	requestOfferedClosed        // the same, and closed by the consumer or because there is none
	requestDone                 // answered or closed
)

// offer hands the request to a consumer. If it could not be delivered it is
// open again.
func (r *Request) offer(emit func(*Request) bool) (delivered bool) {
	// emit closes what it does not deliver, and a consumer may close what it
	// got before emit returns. What such a Close means is known here only.
	r.state.Store(requestOffered)
	if !emit(r) {
		r.state.Store(requestOpen)
		return false
	}
	if !r.state.CompareAndSwap(requestOffered, requestOpen) && r.state.CompareAndSwap(requestOfferedClosed, requestOpen) {
		r.Close()
	}
	return true
}

// take makes the caller the one who answers. The order matters: a request that
// was delivered goes from offered to open at any moment, and not back.
func (r *Request) take() bool {
	return r.state.CompareAndSwap(requestOffered, requestDone) || r.state.CompareAndSwap(requestOpen, requestDone)
}

// Raw returns the whole message, header and Body, as the kernel wrote it. It is
// valid as long as Body is.
func (r *Request) Raw() []byte { return r.message }

// Reply answers with what parts hold, one after the other, in a single
// writev(2) that does not wait. Without parts it says that the request was done.
// When it returns, the request is finished, whether or not there was an error,
// and parts may be used again; until then they may refer to Body.
//
// What parts must hold is in include/uapi/linux/fuse.h. If the kernel takes the
// answer for malformed, the error Is unix.EINVAL and the client gets EIO. After
// the end of the session, it Is [ErrUnmounted], [ErrAborted] or os.ErrClosed.
// A second answer Is unix.EALREADY, and one to a request that has no answer
// Is unix.EINVAL; those are refused without asking the kernel.
func (r *Request) Reply(parts ...[]byte) error {
	if err := r.begin("reply"); err != nil {
		return err
	}
	var header [fusewire.OutHeaderSize]byte
	length := len(header)
	for _, p := range parts {
		length += len(p)
	}
	fusewire.PutOutHeader(&header, length, 0, r.Header.Unique)
	err := r.device.write(&header, parts)
	r.finish()
	return r.replyError(err)
}

// ReplyErrno answers that the request failed with errno, which is at most 511;
// with 0, that it was done. Errors are those of [Request.Reply]; an errno that
// is out of range leaves the request open.
func (r *Request) ReplyErrno(errno syscall.Errno) error {
	const maxErrno = 511
	if errno > maxErrno {
		return r.refused("reply", fmt.Errorf("errno %d is above %d: %w", uint(errno), maxErrno, unix.EINVAL))
	}
	if err := r.begin("reply"); err != nil {
		return err
	}
	return r.replyError(r.sendErrno(errno))
}

func (r *Request) sendErrno(errno syscall.Errno) error {
	var header [fusewire.OutHeaderSize]byte
	fusewire.PutOutHeader(&header, len(header), int(errno), r.Header.Unique)
	err := r.device.write(&header, nil)
	r.finish()
	return err
}

// Close answers EIO if the request was not answered, and otherwise does
// nothing. It always returns nil: where there is nobody left to be answered,
// nothing is owed.
func (r *Request) Close() error {
	switch {
	case r.state.CompareAndSwap(requestOffered, requestOfferedClosed):
	case !r.state.CompareAndSwap(requestOpen, requestDone):
	case r.Header.Opcode.answered():
		r.sendErrno(unix.EIO)
	default:
		r.finish()
	}
	return nil
}

// begin tells whether there may be an answer, and makes the caller the one who
// gives it.
func (r *Request) begin(op string) error {
	if !r.Header.Opcode.answered() {
		return r.refused(op, fmt.Errorf("the request has no answer: %w", unix.EINVAL))
	}
	if !r.take() {
		return r.refused(op, fmt.Errorf("answered already: %w", unix.EALREADY))
	}
	return nil
}

func (r *Request) refused(op string, err error) error {
	return fuseError(op, fmt.Sprintf("%v of %s", r.Header.Opcode, r.device.session.object()), err)
}

// finish gives back what the request holds.
func (r *Request) finish() {
	cancel, retire := r.device.session.forget(r)
	if cancel != nil {
		cancel(context.Canceled)
	}
	if retire {
		r.device.file.Close()
	}
}

func (r *Request) replyError(err error) error {
	if err == nil {
		return nil
	}
	// The kernel does not know the requests of a connection that is gone, nor what
	// the end of the session has answered.
	if s := r.device.session; err == os.ErrClosed || errors.Is(err, unix.ENOENT) && (s.life.Err() != nil || s.connectionGone()) {
		err = s.ended()
	}
	return r.refused("reply", err)
}

// Context returns a context that is done when nobody waits for the answer any
// more: when the client is interrupted by a signal (its cause is then
// unix.EINTR, and a server usually answers that), and when the session ends
// (the cause is that of the end). It is done when the request is answered, too.
//
// An INTERRUPT comes through the device, so somebody must be reading that
// meanwhile: a loop over [Device.All] that works on the request itself is told
// nothing.
func (r *Request) Context() context.Context { return r.device.session.contextOf(r) }

// Time returns r.When.
func (r *Request) Time() time.Time { return r.When }

// String returns the request in one line.
func (r *Request) String() string {
	return fmt.Sprintf("fuse: %v %d of node %d by %d, %d bytes", r.Header.Opcode, r.Header.Unique, r.Header.NodeID, r.Header.PID, r.Header.Len)
}

// MarshalJSON returns the header of the request as one JSON object.
func (r *Request) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Time   time.Time `json:"time"`
		Source string    `json:"source"`
		Opcode string    `json:"opcode"`
		Unique uint64    `json:"unique"`
		NodeID uint64    `json:"node_id"`
		UID    uint32    `json:"uid"`
		GID    uint32    `json:"gid"`
		PID    uint32    `json:"pid"`
		Len    uint32    `json:"len"`
	}{
		r.When.UTC(), "fuse", r.Header.Opcode.String(), r.Header.Unique, r.Header.NodeID,
		r.Header.UID, r.Header.GID, r.Header.PID, r.Header.Len,
	})
}

// maxVectors is how many parts an answer has at most before they are copied
// together. writev(2) takes 1024.
const maxVectors = 8

// write writes an answer. The write neither waits nor takes longer than to copy
// the answer, so the scheduler need not know of it.
func (d *Device) write(header *[fusewire.OutHeaderSize]byte, parts [][]byte) error {
	var vectors [maxVectors]unix.Iovec
	vectors[0].Base = &header[0]
	vectors[0].SetLen(len(header))
	used := 1
	for i, p := range parts {
		if len(p) == 0 {
			continue
		}
		if used == maxVectors-1 {
			p = joined(parts[i:])
		}
		vectors[used].Base = &p[0]
		vectors[used].SetLen(len(p))
		used++
		if used == maxVectors {
			break
		}
	}
	fd, ok := d.file.Pin()
	if !ok {
		return os.ErrClosed
	}
	defer d.file.Unpin()
	_, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&vectors[0])), uintptr(used))
	if errno != 0 {
		return os.NewSyscallError("writev", errno)
	}
	return nil
}

// joined returns one copy of all parts.
func joined(parts [][]byte) (whole []byte) {
	for _, p := range parts {
		whole = append(whole, p...)
	}
	return whole
}
