// Package poller waits for Linux descriptors in the Go runtime's own network
// poller: a goroutine that waits here holds no OS thread, and a deadline or
// Close wakes it at once.
//
// A [File] is one descriptor. A [Set] is many, behind one nested epoll
// instance that takes a single place in the runtime's poller. Every File,
// [Descriptor] and Set stands with the stack that made it in the pprof profile
// "kernstream.descriptors"; the members of a Set do not, for which the profile
// would cost more than all the rest.
//
// Three rules of the runtime's poller shape the interface (internal/poll and
// runtime/netpoll.go in the Go source):
//
//   - Entering a wait erases a readiness that was stored before. What is asked
//     for must therefore be looked for at the start of each wait, not only when
//     the poller wakes it. [File.Wait] calls its check first for that reason.
//   - A wait that starts after its deadline fails without looking at the
//     descriptor. [File.Read] and [File.Wait] look once more themselves, so that
//     an expired deadline never hides data or an end that is there already.
//   - A descriptor that epoll refuses is accepted silently and then blocks an OS
//     thread. [New] finds that out and says why.
package poller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// descriptors holds the stack that made each open File and Descriptor.
var descriptors = func() *pprof.Profile {
	const name = "kernstream.descriptors"
	if p := pprof.Lookup(name); p != nil {
		return p // of another version of this package in the same program
	}
	return pprof.NewProfile(name)
}()

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// A File is one descriptor in the runtime's poller. Its methods may be called
// from several goroutines, but only one of them may be in [File.Read] or
// [File.Wait]: a second reader would queue for the first one's lock, where no
// deadline reaches it. Deadlines belong to the File, not to a call.
type File struct {
	name   string
	file   *os.File
	conn   syscall.RawConn
	pins   sync.RWMutex // held for reading while the descriptor is pinned
	fd     int          // for Pin; -1 after Close
	closed atomic.Bool
	close  func() error
}

// New puts fd into the runtime's poller and returns it as a File. It owns fd
// from the call on, and closes it when it returns an error. It sets O_NONBLOCK,
// which is a property of the open file description: a caller that shares the
// description with somebody else must reopen it first. The name is used in
// errors.
//
// New fails when the runtime's poller does not take fd; the error holds the
// reason of epoll_ctl(2), such as EPERM for a regular file and ENOSPC when
// /proc/sys/fs/epoll/max_user_watches is reached.
func New(fd int, name string) (*File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", name, os.NewSyscallError("fcntl", err))
	}
	file := os.NewFile(uintptr(fd), name)
	// os.NewFile says nothing when the poller refused; only the lack of
	// deadlines shows it.
	if err := file.SetReadDeadline(time.Time{}); err != nil {
		err = refusal(fd)
		file.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	conn, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f := &File{name: name, file: file, conn: conn, fd: fd}
	f.close = sync.OnceValue(func() error {
		f.closed.Store(true)
		descriptors.Remove(f)
		f.pins.Lock()
		f.fd = -1
		f.pins.Unlock()
		return f.file.Close()
	})
	descriptors.Add(f, 1)
	return f, nil
}

// refusal finds out why the runtime's poller did not take fd.
func refusal(fd int) error {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	defer unix.Close(epfd)
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	return errors.New("not taken by the runtime's poller: is another os.File using the descriptor?")
}

// Name returns the name that was given to [New].
func (f *File) Name() string { return f.name }

// Read reads once into p, and waits until there is something to read. At the
// end of the file it returns 0 and io.EOF.
//
// It returns os.ErrClosed after [File.Close]. When the read deadline has
// passed it reads once more without waiting, and returns
// os.ErrDeadlineExceeded if there was nothing: a loop that is to end at a
// deadline looks at its own reason to end, too. Other errors are an
// *os.SyscallError.
func (f *File) Read(p []byte) (int, error) {
	n, err := f.file.Read(p)
	if err == nil || err == io.EOF {
		return n, err
	}
	if timedOut(err) || unpollable(err) {
		return f.readNow(p, f.translate("read", err))
	}
	return 0, f.translate("read", err)
}

// readNow reads without waiting; otherwise is the error to return when that
// finds nothing.
func (f *File) readNow(p []byte, otherwise error) (n int, err error) {
	cerr := f.conn.Control(func(fd uintptr) {
		for {
			if n, err = unix.Read(int(fd), p); err != unix.EINTR {
				return
			}
		}
	})
	switch {
	case cerr != nil:
		return 0, f.translate("read", cerr)
	case err == unix.EAGAIN:
		return 0, otherwise
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	return n, nil
}

// Wait calls check until it returns true or an error, and waits before every
// call but the first until the descriptor may have become ready. It returns
// check's error.
//
// The first call comes at once, and every call must look at the real state
// (read, poll(2) with no timeout): a readiness from before the call to Wait is
// forgotten. Within one Wait none is: what becomes ready while check runs
// leads to another call. check runs on the caller's goroutine; Close waits for
// it to return.
//
// Wait returns os.ErrClosed after [File.Close]. When the read deadline has
// passed it calls check once more, and returns os.ErrDeadlineExceeded if that
// returns false.
func (f *File) Wait(check func(fd int) (done bool, err error)) error { return f.Waiter(check)() }

// Waiter returns [File.Wait] of check as a function. It is for waits that come
// so often that they should not allocate: Wait does at each call, the function
// that Waiter returns does not.
func (f *File) Waiter(check func(fd int) (done bool, err error)) func() error {
	var result error
	look := func(fd uintptr) bool {
		var done bool
		done, result = check(int(fd))
		return done || result != nil
	}
	found := false
	lookOnce := func(fd uintptr) { found = look(fd) }
	return func() error {
		err := f.conn.Read(look)
		if err == nil {
			return result
		}
		if timedOut(err) || unpollable(err) {
			found = false
			if cerr := f.conn.Control(lookOnce); cerr != nil {
				return f.translate("wait", cerr)
			}
			if found {
				return result
			}
		}
		return f.translate("wait", err)
	}
}

// Control calls use with the descriptor, which stays open meanwhile, without
// waiting for anything. It returns os.ErrClosed, without the call, after
// [File.Close].
func (f *File) Control(use func(fd int)) error {
	if err := f.conn.Control(func(fd uintptr) { use(int(fd)) }); err != nil {
		return f.translate("control", err)
	}
	return nil
}

// Pin returns the descriptor, which stays open until [File.Unpin]. It is
// [File.Control] for calls that come so often that they should not allocate.
// Between the two there must be no call of a method of f, and nothing that
// waits: Close does until then. After Close it returns false, and there is
// nothing to unpin.
func (f *File) Pin() (fd int, ok bool) {
	f.pins.RLock()
	if f.fd < 0 {
		f.pins.RUnlock()
		return -1, false
	}
	return f.fd, true
}

// Unpin ends what [File.Pin] began.
func (f *File) Unpin() { f.pins.RUnlock() }

// SetReadDeadline sets the time at which [File.Read] and [File.Wait] give up,
// those that wait already included. The zero time lifts it.
func (f *File) SetReadDeadline(t time.Time) error {
	if err := f.file.SetReadDeadline(t); err != nil {
		return f.translate("set deadline", err)
	}
	return nil
}

// CancelOn lets the read deadline expire when ctx is done, for good: nothing
// lifts it. release ends that; when it returns, ctx has no hold on the File
// any more. It must be called, and may be called again.
func (f *File) CancelOn(ctx context.Context) (release func()) {
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		f.SetReadDeadline(longAgo)
	})
	return sync.OnceFunc(func() {
		if !stop() {
			<-fired
		}
	})
}

// Close closes the descriptor and wakes whoever waits for it. It waits until a
// check of [File.Wait] that runs has returned, so check must not call it. It
// may be called again, and then returns the same.
func (f *File) Close() error { return f.close() }

// translate gives an error of package os the form that this package promises.
// RawConn passes on errors of internal/poll that errors.Is cannot match.
func (f *File) translate(op string, err error) error {
	switch {
	case timedOut(err):
		return os.ErrDeadlineExceeded
	case f.closed.Load(), errors.Is(err, os.ErrClosed), innermost(err).Error() == "use of closed file":
		return os.ErrClosed
	case unpollable(err):
		return fmt.Errorf("%s: %s: the descriptor reports an error condition, but no error", f.name, op)
	}
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return os.NewSyscallError(path.Op, path.Err)
	}
	return fmt.Errorf("%s: %s: %w", f.name, op, err)
}

func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// unpollable tells whether err stands for a descriptor that raised EPOLLERR
// and nothing else: the runtime then refuses to wait for it.
func unpollable(err error) bool { return innermost(err).Error() == "not pollable" }

func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
