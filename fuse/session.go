package fuse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/poller"
)

// A Session is a FUSE file system that this process mounted and serves. Its
// methods may be called from several goroutines.
//
// It ends when the file system is unmounted, by whomever, when the connection is
// aborted, or by [Session.Close], which must be called in any case. Until then
// it lives, even if the program forgets it.
type Session struct {
	config      Config // as it was mounted
	place       *place
	id          MountID // of the mount
	device      *Device // the first one
	helper      *helper // which unmounts when this process dies; may be nil
	initRequest []byte
	state       State // without what changes
	bufferSize  int
	probe       probe

	life    context.Context // done when the session has ended
	end     context.CancelCauseFunc
	closing context.Context // done when Close was called
	close   context.CancelFunc
	closed  func() error

	// Set while there is something in returned, or a drain: readers look there
	// before they read.
	diverted atomic.Bool

	turning sync.Mutex // held from the start of a drain until the readers have stopped, and by Resume

	mu          sync.Mutex
	devices     []*Device           // that are open, in the order in which they were opened
	outstanding map[uint64]*Request // to be answered, by Header.Unique
	notifying   int                 // notifications under way
	inHand      int                 // requests that were read and are neither answered nor closed
	returned    []*Request          // of those, the ones that nobody was given
	reading     context.Context     // done while drained
	stopReading context.CancelFunc  //
	drain       *drain              // nil: requests are read
	shared      bool                // somebody else may have the Files
	small       [][]byte            // free buffers of smallBuffer bytes
	large       [][]byte            // free buffers of bufferSize bytes
}

// Requests up to the size of a smallBuffer, which are nearly all but WRITE, are
// copied out of the buffer that they were read into. So a thousand requests
// that wait do not hold a thousand buffers of MaxWrite.
const smallBuffer = 4096

// How many free buffers are kept.
const (
	maxFreeSmall = 64
	maxFreeLarge = 4
)

func newSession(config Config, place *place) *Session {
	s := &Session{config: config, place: place, bufferSize: minBuffer, outstanding: map[uint64]*Request{}}
	s.config.Options = slices.Clone(config.Options)
	s.life, s.end = context.WithCancelCause(context.Background())
	s.closing, s.close = context.WithCancel(context.Background())
	s.reading, s.stopReading = context.WithCancel(context.Background())
	s.closed = sync.OnceValue(s.release)
	return s
}

// serve starts a device on fd, which it owns, and whose connection must be
// there already: one that is in the poller before that is never woken.
func (s *Session) serve(fd int) (*Device, error) {
	file, err := poller.New(fd, devicePath)
	if err != nil {
		return nil, failed("open", devicePath, err)
	}
	d := newDevice(s, file)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		file.Close()
		return nil, fuseError("open", devicePath, os.ErrClosed)
	}
	if s.device == nil {
		s.device = d
	}
	s.devices = append(s.devices, d)
	return d, nil
}

// object names the session in errors.
func (s *Session) object() string {
	if s.config.MountPoint == "" {
		return devicePath // of a session whose mount is not known
	}
	return s.config.MountPoint
}

// Device returns the device through which the requests come. [Session.Clone]
// makes more.
func (s *Session) Device() *Device { return s.device }

// Devices returns the devices that can be read: what [Session.Clone] made, too, and
// what a predecessor had (see [Adopt]). Each needs a reader of its own.
func (s *Session) Devices() []*Device {
	return slices.DeleteFunc(s.openDevices(), func(d *Device) bool { return d.leaving.Load() })
}

// openDevices returns the devices whose descriptors are open.
func (s *Session) openDevices() []*Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.devices)
}

// pin returns the file of a device that is open, pinned, and its descriptor. A
// device leaves the list before it is closed, so without one all are, for good.
func (s *Session) pin() (file *poller.File, fd int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pinAny()
}

// pinAny is pin where s.mu is held.
func (s *Session) pinAny() (file *poller.File, fd int, ok bool) {
	for _, d := range s.devices {
		if fd, ok := d.file.Pin(); ok {
			return d.file, fd, true
		}
	}
	return nil, -1, false
}

// connectionGone tells whether the connection has ended, without reading.
func (s *Session) connectionGone() bool {
	file, fd, ok := s.pin()
	if !ok {
		return true
	}
	defer file.Unpin()
	return goneIn(fd, 0)
}

// ended ends the session, whose connection is gone or whose devices are closed,
// and returns what it ended by.
func (s *Session) ended() error {
	if s.life.Err() == nil {
		s.end(s.cause())
	}
	return context.Cause(s.life)
}

// cause finds out how a connection ended. Only this read tells for sure: one
// that was copying a request when the end came fails for that reason.
func (s *Session) cause() error {
	file, fd, ok := s.pin()
	if !ok {
		return os.ErrClosed
	}
	_, err := unix.Read(fd, make([]byte, s.bufferSize))
	file.Unpin()
	// An abort that was not made through /sys/fs/fuse looks like an unmount
	// here, but leaves the mount behind.
	if err == unix.ECONNABORTED || s.mounted() {
		return ErrAborted
	}
	return ErrUnmounted
}

// Config returns what was mounted: MountPoint is without symbolic links, and
// Via is the way that was taken.
func (s *Session) Config() Config {
	c := s.config
	c.Options = slices.Clone(c.Options)
	return c
}

// InitRequest returns the kernel's INIT, header and body, for servers that want
// to know what the kernel offered. It was answered by Mount.
func (s *Session) InitRequest() []byte { return bytes.Clone(s.initRequest) }

// ConnectionID returns the number by which the connection is known in
// /sys/fs/fuse/connections. It is the minor number of the device of the files
// (st_dev in stat(2)), whose major number is 0.
func (s *Session) ConnectionID() uint32 { return s.id.Minor }

// Outstanding returns how many requests were read and not answered.
func (s *Session) Outstanding() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.outstanding)
}

// Done returns a channel that is closed when the session has ended. Who reads
// the [Device] notices the end; while nobody does, only what the Session itself
// did counts.
func (s *Session) Done() <-chan struct{} { return s.life.Done() }

// Err returns why the session ended: nil while it runs, after an unmount and
// after Close; otherwise an error that Is [ErrAborted].
func (s *Session) Err() error {
	switch cause := context.Cause(s.life); cause {
	case nil, ErrUnmounted, os.ErrClosed:
		return nil
	default:
		return fuseError("read", s.object(), cause)
	}
}

// Close ends the session, and returns when nothing of it is left: it unmounts
// the file system, closes the devices, and takes the helper back. Clients that
// wait for an answer get ECONNABORTED. If the file system is in use, it is
// detached, and what the users still do with it fails with ENOTCONN.
//
// If the session has been handed over, Close leaves the file system alone, and
// clients keep waiting for the successor. It has when [Session.Drain] was called
// and somebody else may have its [Session.Files]: they were taken, or the session
// itself was adopted.
//
// It returns an error if the file system could not be unmounted; it stays in
// the mount table then, without a server. Close may be called again, and then
// returns the same. It may be called from a loop over requests.
func (s *Session) Close() error { return s.closed() }

// release is what the first Close does.
func (s *Session) release() error {
	s.end(os.ErrClosed)
	s.close()
	handedOver := s.handedOver()
	var err error
	if s.id != (MountID{}) && !handedOver {
		err = s.unmountForGood()
	}
	if !handedOver {
		s.endNotifications()
	}
	for _, d := range s.openDevices() {
		d.shut()
	}
	s.dropReturned()
	if s.helper != nil {
		s.helper.leave(handedOver)
	}
	s.place.close()
	s.mu.Lock()
	s.stopReading()
	s.mu.Unlock()
	return err
}

// dropReturned lets go of the requests that nobody was given. The devices are
// closed, so they are not answered: they may be a successor's.
func (s *Session) dropReturned() {
	s.mu.Lock()
	list := s.returned
	s.returned = nil
	s.mu.Unlock()
	for _, r := range list {
		r.Close()
	}
}

// newRequest makes a request of message, which is in d.buf.
func (s *Session) newRequest(d *Device, h *fusewire.InHeader, message []byte) *Request {
	r := &Request{
		When: time.Now(),
		Header: Header{
			Len: h.Len, Opcode: Opcode(h.Opcode), Unique: h.Unique, NodeID: h.NodeID,
			UID: h.UID, GID: h.GID, PID: h.PID, ExtLen: h.ExtLen,
		},
		device: d,
	}
	s.mu.Lock()
	if len(message) <= smallBuffer {
		r.message = append(takeBuffer(&s.small, smallBuffer, smallAlignment)[:0], message...)
	} else {
		r.message = message
		d.buf = takeBuffer(&s.large, s.bufferSize, os.Getpagesize())
	}
	s.inHand++
	if r.Header.Opcode.answered() {
		s.outstanding[h.Unique] = r
		d.inHand++
	}
	s.mu.Unlock()
	r.Body = r.message[fusewire.InHeaderSize:]
	return r
}

// smallAlignment is that of data in small messages: a block of most disks.
const smallAlignment = 512

// leastPage is the least that a page has.
const leastPage = 4096

func takeBuffer(free *[][]byte, size, alignment int) []byte {
	if n := len(*free); n > 0 {
		b := (*free)[n-1]
		*free = (*free)[:n-1]
		return b[:size]
	}
	return newBuffer(size, alignment)
}

// newBuffer returns memory for a message of up to size bytes, in which the data
// of a WRITE is aligned, as files that are opened with O_DIRECT want it.
//
// All of it is there: a process that is killed while read(2) has to wait for a
// page gets no further, and the kernel fails the request with EIO instead of
// keeping it for a successor.
func newBuffer(size, alignment int) []byte {
	b := make([]byte, size+alignment)
	for i := 0; i < len(b); i += leastPage {
		b[i] = 0
	}
	data := uintptr(unsafe.Pointer(&b[0])) + messageOverhead
	skip := int(-data % uintptr(alignment))
	return b[skip : skip+size : skip+size]
}

// forget takes a request that is finished out of the books. It returns what
// ends its context, if it has one, and whether its device is to be closed.
func (s *Session) forget(r *Request) (cancel context.CancelCauseFunc, retire bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inHand--
	if r.Header.Opcode.answered() {
		r.device.inHand--
		retire = r.device.retires()
	}
	if s.outstanding[r.Header.Unique] == r {
		delete(s.outstanding, r.Header.Unique)
	}
	s.settle()
	switch c := cap(r.message); {
	case c == smallBuffer && len(s.small) < maxFreeSmall:
		s.small = append(s.small, r.message)
	case c == s.bufferSize && len(s.large) < maxFreeLarge:
		s.large = append(s.large, r.message)
	}
	r.message, r.Body = nil, nil
	return r.cancel, retire
}

// giveBack takes back a request that nobody was given, for the next reader of
// any device.
func (s *Session) giveBack(r *Request) {
	s.mu.Lock()
	s.returned = append(s.returned, r)
	s.divert()
	s.settle()
	s.mu.Unlock()
	s.wake()
}

// divert sets diverted as it is to be. s.mu is held.
func (s *Session) divert() { s.diverted.Store(s.drain != nil || len(s.returned) > 0) }

// wake makes every reader look at diverted, and then read on.
func (s *Session) wake() {
	for _, d := range s.openDevices() {
		d.file.SetReadDeadline(longAgo)
	}
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// takeReturned returns a request that was given back, or an error if nobody is to
// read, or neither.
func (s *Session) takeReturned() (*Request, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drain != nil {
		return nil, ErrDrained
	}
	if len(s.returned) == 0 {
		return nil, nil
	}
	r := s.returned[0]
	s.returned = append(s.returned[:0], s.returned[1:]...)
	s.divert()
	return r, nil
}

// interrupt tells a request that its client does not want to wait any more.
func (s *Session) interrupt(unique uint64) {
	s.mu.Lock()
	r, several := s.outstanding[unique], len(s.devices) > 1
	var cancel context.CancelCauseFunc
	if r != nil {
		r.interrupted, cancel = true, r.cancel
	}
	s.mu.Unlock()
	switch {
	case cancel != nil:
		cancel(unix.EINTR)
	case r == nil && several:
		s.interruptLater(unique)
	}
	// Otherwise it was answered meanwhile, or nobody has asked for its context.
}

// contextOf is Request.Context.
func (s *Session) contextOf(r *Request) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.ctx == nil {
		r.ctx, r.cancel = context.WithCancelCause(s.life)
		switch {
		case r.state.Load() == requestDone:
			r.cancel(context.Canceled)
		case r.interrupted:
			r.cancel(unix.EINTR)
		}
	}
	return r.ctx
}

// isErrno tells whether err stands for one of errnos.
func isErrno(err error, errnos ...unix.Errno) bool {
	return slices.ContainsFunc(errnos, func(e unix.Errno) bool { return errors.Is(err, e) })
}
