package fuse

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
)

// Several devices of one session. The kernel has one queue of requests for all
// of them, so any device may deliver the next one, and INTERRUPT may come
// through another device than the request that it is about. The answer must go to
// the device that delivered the request.

// cloneRequest is FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t), of
// include/uapi/linux/fuse.h.
var cloneRequest = func() uintptr {
	const number = 4<<16 | 229<<8
	switch runtime.GOARCH {
	case "mips", "mipsle", "mips64", "mips64le", "ppc64", "ppc64le":
		return 1<<30 | number
	}
	return 2<<30 | number
}()

// Clone returns another device of the session, for another reader at the same
// time. The kernel has no turns: a request goes to whoever reads first. Two
// devices make large reads and writes faster, and streams of small requests, too
// (see README); each further one costs a needless wake-up for each request.
//
// A device is closed by [Device.Close], or together with the session. The error
// Is unix.EMFILE if this process has no descriptor left, and [ErrUnmounted],
// [ErrAborted] or os.ErrClosed after the end of the session.
func (s *Session) Clone() (*Device, error) {
	fd, err := openDevice()
	if err != nil {
		return nil, err
	}
	source, number, ok := s.pin()
	if !ok {
		unix.Close(fd)
		return nil, fuseError("clone", s.object(), s.ended())
	}
	argument := uint32(number)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), cloneRequest, uintptr(unsafe.Pointer(&argument)))
	source.Unpin()
	if errno != 0 {
		unix.Close(fd)
		return nil, fuseError("clone", s.object(), os.NewSyscallError("ioctl", errno))
	}
	d, err := s.serve(fd)
	if err == nil && s.connectionGone() {
		err = fuseError("clone", s.object(), s.ended())
		s.retire(d)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Close ends reading through the device: a call of Next returns os.ErrClosed,
// streams and loops end, and what a stream could not deliver goes to another
// device. Requests that were delivered can still be answered; the descriptor is
// closed with the last of them, or with the session. Close may be called again,
// and from a loop over requests.
//
// The last device cannot be closed, since that would abort the connection; the
// error Is unix.EBUSY. [Session.Close] ends them all.
func (d *Device) Close() error {
	s := d.session
	s.mu.Lock()
	others := 0
	for _, other := range s.devices {
		if other != d && !other.leaving.Load() {
			others++
		}
	}
	if others == 0 && s.closing.Err() == nil && !d.leaving.Load() {
		s.mu.Unlock()
		return fuseError("close", s.object(), fmt.Errorf("the last device of the session: %w", unix.EBUSY))
	}
	d.leaving.Store(true)
	s.mu.Unlock()

	d.stop()
	d.file.SetReadDeadline(longAgo)
	d.reader.Lock()
	d.disarm()
	d.buf = nil
	d.reader.Unlock()

	s.mu.Lock()
	d.idle = true
	retire := d.retires()
	s.mu.Unlock()
	if retire {
		d.file.Close()
	}
	return nil
}

// retires takes a device that nobody reads, and of which nothing is to be
// answered, out of the session, and tells whether its descriptor is to be closed.
// The session's mutex is held.
func (d *Device) retires() bool {
	if !d.idle || d.inHand > 0 {
		return false
	}
	d.session.remove(d)
	return true
}

// remove takes d out of the list. s.mu is held.
func (s *Session) remove(d *Device) {
	for i, other := range s.devices {
		if other == d {
			s.devices = append(s.devices[:i:i], s.devices[i+1:]...)
			return
		}
	}
}

// retire closes a device that nobody has seen.
func (s *Session) retire(d *Device) {
	s.mu.Lock()
	s.remove(d)
	s.mu.Unlock()
	d.stop()
	d.file.Close()
}

// interruptLater deals with an INTERRUPT of a request that is not in the books.
// Mostly that was answered meanwhile. But a reader of another device may be about
// to enter it: then the kernel knows the request as one of that device, takes
// this answer through it, and sends the INTERRUPT again.
func (s *Session) interruptLater(unique uint64) {
	const interruptBit = 1 // what the kernel adds to the number of the request
	var header [fusewire.OutHeaderSize]byte
	fusewire.PutOutHeader(&header, len(header), int(unix.EAGAIN), unique|interruptBit)
	for _, d := range s.openDevices() {
		// One that was closed meanwhile has nothing to answer.
		if err := d.write(&header, nil); err != os.ErrClosed && !errors.Is(err, syscall.ENOENT) {
			runtime.Gosched() // to the one who enters it
			return
		}
	}
}
