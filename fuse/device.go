package fuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/poller"
)

// A Device is one open file description of /dev/fuse, through which the requests
// of a session come. It has one reader at a time: a goroutine in [Device.Next],
// a loop over [Device.All], or a stream of [Device.Requests]. Another one gets
// an error that Is unix.EBUSY. [Session.Clone] makes another device, for another
// reader.
//
// Whoever reads may stop at any time, by its context or otherwise, and another
// go on: no request is lost by that.
type Device struct {
	session *Session
	file    *poller.File
	closing context.Context // done when Close was called, or that of the session
	stop    context.CancelFunc
	leaving atomic.Bool // Close was called

	// Held by who reads, from before it looks whether it may until what it read is
	// entered in the session's books; by a stream for its life. Guards what
	// follows.
	reader sync.Mutex

	wait func() error // waits for a message and reads it into buf
	buf  []byte
	n    int // bytes of the message in buf

	armed   context.Context // the one that wakes the reader; nil: none
	release func()          // takes the hold off armed

	// Guarded by the session's mutex.
	inHand int  // requests that were read and are not answered
	idle   bool // nobody will read any more
}

func newDevice(s *Session, file *poller.File) *Device {
	d := &Device{session: s, file: file, buf: newBuffer(s.bufferSize, os.Getpagesize())}
	d.closing, d.stop = context.WithCancel(s.closing)
	d.wait = file.Waiter(d.readOnce)
	return d
}

// The room that a message needs, apart from the data of a WRITE, and at least.
const (
	messageOverhead = 80 // of a WRITE: header and struct fuse_write_in
	minBuffer       = 8192
)

// resize sets the size of a message to what the kernel asks for. There is one
// device, at most.
func (s *Session) resize(maxWrite uint32) {
	s.bufferSize = max(minBuffer, messageOverhead+int(maxWrite))
	if s.device != nil {
		s.device.buf = newBuffer(s.bufferSize, os.Getpagesize())
	}
}

// Next returns the next request, and waits for it. It is the way with the least
// cost, for loops that must be fast; it allocates the Request only.
//
// It returns [ErrUnmounted] or [ErrAborted] at the end of the session,
// os.ErrClosed after [Session.Close] and [Device.Close], [ErrDrained] while the
// session is drained, and the cause of ctx when that is done.
// With a context that is done already, nothing is read, unless the session has
// ended. A request that is there when ctx becomes done is returned. Passing
// the same context again costs less than passing another one each time.
//
// A request that the caller does not answer keeps its client waiting; see
// [Request.Close].
func (d *Device) Next(ctx context.Context) (*Request, error) {
	if err := d.enter(); err != nil {
		return nil, err
	}
	r, err := d.next(ctx)
	d.reader.Unlock()
	return r, err
}

// All returns a sequence of requests for a loop, which reads them on the
// goroutine of the loop, as Next does. When the file system is unmounted, after
// [Session.Close] and [Device.Close], and when the session is drained, the loop
// ends. If anything else ends it, an abort or the end of ctx, that is its last
// turn, with an error and no request.
func (d *Device) All(ctx context.Context) iter.Seq2[*Request, error] {
	return func(yield func(*Request, error) bool) {
		for {
			r, err := d.Next(ctx)
			if err == ErrUnmounted || err == os.ErrClosed || err == ErrDrained {
				return
			}
			if !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// Requests returns a stream of the requests, for programs that wait for other
// things, too. Between two requests, another one is read ahead, so that
// INTERRUPT reaches the requests being worked on. Its Err is nil after an unmount,
// after [Session.Close], and when the session is drained, and Is [ErrAborted]
// after an abort.
//
// When the stream ends before a request that was read could be delivered, the
// next reader of any device gets it, or the successor. A stream costs a
// goroutine, and a change of goroutines for each request, which shows with many
// small requests (see README).
func (d *Device) Requests(ctx context.Context) *kernstream.Stream[*Request] {
	if err := d.enter(); err != nil {
		return kernstream.NewStream(ctx, func(context.Context, func(*Request) bool) error { return d.streamEnd(err) })
	}
	// A device that is closed, and a session that is drained, do not wait for a
	// consumer that does not receive.
	ctx, cancel := context.WithCancelCause(ctx)
	stopClose := context.AfterFunc(d.closing, func() { cancel(os.ErrClosed) })
	stopDrain := context.AfterFunc(d.session.readingContext(), func() { cancel(ErrDrained) })
	return kernstream.NewStream(ctx, func(ctx context.Context, emit func(*Request) bool) error {
		defer func() {
			stopClose()
			stopDrain()
			cancel(nil)
			d.reader.Unlock()
		}()
		for {
			r, err := d.next(ctx)
			if err == nil && !r.offer(emit) {
				d.session.giveBack(r)
				err = context.Cause(ctx)
			}
			if err != nil {
				return d.streamEnd(err)
			}
		}
	})
}

// streamEnd returns what the producer of a stream returns when it ended by err.
func (d *Device) streamEnd(err error) error {
	switch {
	case d.closing.Err() != nil, err == ErrUnmounted, err == os.ErrClosed, err == ErrDrained:
		return io.EOF
	case err == ErrAborted:
		return fuseError("read", d.session.object(), err)
	}
	return err
}

// enter makes the caller the reader, or returns why it cannot be.
func (d *Device) enter() error {
	if d.reader.TryLock() {
		return nil
	}
	if err := d.busy(); !isErrno(err, unix.EBUSY) {
		return err
	}
	// A drain that has been resumed already was the reader for a moment.
	d.session.turning.Lock()
	defer d.session.turning.Unlock()
	if d.reader.TryLock() {
		return nil
	}
	return d.busy()
}

// busy returns why a caller is not the reader. Whoever ends or drains the
// session, or closes the device, is one for a moment.
func (d *Device) busy() error {
	s := d.session
	switch {
	case s.life.Err() != nil:
		return context.Cause(s.life)
	case d.leaving.Load():
		return os.ErrClosed
	case s.drained():
		return ErrDrained
	}
	return fuseError("read", d.session.object(), fmt.Errorf("another goroutine reads the device: %w", unix.EBUSY))
}

// next is Next for who holds d.reader.
func (d *Device) next(ctx context.Context) (*Request, error) {
	for {
		switch {
		case d.leaving.Load():
			return nil, os.ErrClosed
		case ctx.Err() != nil:
			if d.connectionGone() {
				return nil, d.session.ended()
			}
			return nil, context.Cause(ctx)
		case d.session.diverted.Load():
			r, err := d.session.takeReturned()
			if err == ErrDrained && d.connectionGone() {
				err = d.session.ended()
			}
			if r != nil || err != nil {
				return r, err
			}
		}
		r, err := d.nextMessage(ctx)
		if r != nil || err != nil {
			return r, err
		}
	}
}

// nextMessage reads one message. It returns nothing if that was for the session
// itself, or if there is something to look at before anything is read.
func (d *Device) nextMessage(ctx context.Context) (*Request, error) {
	switch err := d.read(ctx); {
	case err == nil:
		return d.accept()
	case err == errLook:
		return nil, nil
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil:
		// Somebody wants to be seen. Whoever sets a deadline has first said
		// why, and that is looked at before the next wait.
		if err := d.file.SetReadDeadline(time.Time{}); err != nil {
			return nil, d.failed(ctx, err)
		}
		return nil, nil
	default:
		return nil, d.failed(ctx, err)
	}
}

// errLook says that there is something to look at instead of reading.
var errLook = errors.New("look before you read")

// read reads a message into d.buf.
func (d *Device) read(ctx context.Context) error {
	if d.armed == nil && ctx.Done() != nil || d.armed != nil && d.armed.Done() != ctx.Done() {
		// What is there already needs nobody to wake the reader.
		if done, err := d.readNow(); done || err != nil {
			return err
		}
		d.arm(ctx)
		// That may have lifted a deadline which was to wake this reader.
		if d.session.diverted.Load() || d.leaving.Load() {
			return errLook
		}
	}
	return d.wait()
}

// arm lets ctx wake the reader, and nothing else.
func (d *Device) arm(ctx context.Context) {
	d.disarm()
	if ctx.Done() != nil {
		d.armed, d.release = ctx, d.file.CancelOn(ctx)
	}
}

// disarm lets nothing wake the reader.
func (d *Device) disarm() {
	if d.armed == nil {
		return
	}
	d.release()
	if d.armed.Err() != nil {
		d.file.SetReadDeadline(time.Time{})
	}
	d.armed, d.release = nil, nil
}

// readNow reads a message into d.buf if there is one.
func (d *Device) readNow() (done bool, err error) {
	fd, ok := d.file.Pin()
	if !ok {
		return false, os.ErrClosed
	}
	defer d.file.Unpin()
	return d.readOnce(fd)
}

// readOnce reads a message into d.buf, without waiting.
func (d *Device) readOnce(fd int) (done bool, err error) {
	for {
		// The descriptor does not block, and one message is copied at most, so
		// the scheduler need not know. That makes the reader faster by a tenth.
		n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&d.buf[0])), uintptr(len(d.buf)))
		switch errno {
		case 0:
			d.n = int(n)
			return true, nil
		case unix.EAGAIN:
			return false, nil
		case unix.EINTR, unix.ENOENT: // ENOENT: the request was taken back while it was copied
		default:
			return false, os.NewSyscallError("read", errno)
		}
	}
}

// failed returns what Next returns when reading failed with err.
func (d *Device) failed(ctx context.Context, err error) error {
	switch {
	case err == os.ErrClosed, d.connectionGone(), isEnd(err) && d.connectionGoes():
		return d.session.ended()
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return failed("read", d.session.object(), err)
}

// isEnd tells whether an error of reading is that of a connection that is gone,
// or about to be: the kernel takes the devices of one away first.
func isEnd(err error) bool { return errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ENODEV) }

// connectionGone tells whether the connection has ended, without reading.
func (d *Device) connectionGone() bool { return d.connectionGoneIn(0) }

// connectionGoes tells the same of one that is about to end.
func (d *Device) connectionGoes() bool { return d.connectionGoneIn(time.Second) }

// connectionGoneIn waits for the end of the connection, for a while. That is the
// time that the kernel takes between two lines.
func (d *Device) connectionGoneIn(wait time.Duration) bool {
	fd, ok := d.file.Pin()
	if !ok {
		return true
	}
	defer d.file.Unpin()
	return goneIn(fd, wait)
}

// goneIn waits for the end of the connection of a descriptor.
func goneIn(fd int, wait time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	for {
		n, err := unix.Poll(fds, int(wait.Milliseconds()))
		if err != unix.EINTR {
			return n > 0 && fds[0].Revents&unix.POLLERR != 0
		}
	}
}

// accept makes a request of the message in d.buf, or returns nil if it was for
// the session itself.
func (d *Device) accept() (*Request, error) {
	message := d.buf[:d.n]
	h, err := fusewire.DecodeInHeader(message)
	if err != nil {
		return nil, fuseError("read", d.session.object(), err)
	}
	switch h.Opcode {
	case fusewire.Interrupt:
		unique, err := fusewire.DecodeInterrupt(message[fusewire.InHeaderSize:])
		if err != nil {
			return nil, fuseError("read", d.session.object(), err)
		}
		d.session.interrupt(unique)
		return nil, nil
	case fusewire.Forget, fusewire.BatchForget:
		if message = d.session.probe.dropForget(message); message == nil {
			return nil, nil
		}
		h.Len = uint32(len(message))
	}
	return d.session.newRequest(d, &h, message), nil
}

// shut closes the descriptor, and waits until nobody reads any more.
func (d *Device) shut() {
	d.file.Close()
	d.reader.Lock()
	defer d.reader.Unlock()
	d.disarm()
	d.buf = nil
}
