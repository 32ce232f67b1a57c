package fuse

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

// mounted is a session on a new directory, for tests that look inside.
func mounted(t *testing.T) *Session {
	t.Helper()
	testenv.NeedMounts(t)
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		testenv.Missing(t, "needs to open /dev/fuse", err)
	}
	unix.Close(fd)
	testenv.NoLeaks(t)
	s, err := Mount(t.Context(), &Config{MountPoint: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

const patience = testenv.Patience

// An INTERRUPT may be read before the reader of another device has entered its
// request: it is sent again then, until there is somebody to be told.
func TestInterruptBeforeItsRequestIsEntered(t *testing.T) {
	s := mounted(t)
	first := s.Device()
	second, err := s.Clone()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	thread, stated := make(chan int), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		var st unix.Stat_t
		stated <- unix.Stat(s.config.MountPoint+"/x", &st)
	}()
	tid := <-thread
	// The first device reads the LOOKUP, and is not done with it.
	for {
		if ctx.Err() != nil {
			t.Fatal("there is no LOOKUP")
		}
		if done, err := first.readNow(); err != nil {
			t.Fatal(err)
		} else if !done {
			time.Sleep(time.Millisecond)
			continue
		}
		if Opcode(order.Uint32(first.buf[4:])) == OpLookup {
			break
		}
		r, err := first.accept()
		if err != nil {
			t.Fatal(err)
		}
		// Who may look it up is decided by the directory.
		r.Reply(fusewire.AppendAttr(nil, &fusewire.Attr{Ino: fusewire.RootID, Mode: unix.S_IFDIR | 0o755, Nlink: 2}))
	}
	// The second one reads the INTERRUPT, more than once.
	if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
		t.Fatal(err)
	}
	for seen := 0; seen < 3; {
		if ctx.Err() != nil {
			t.Fatal("the INTERRUPT is lost")
		}
		done, err := second.readNow()
		if err != nil {
			t.Fatal(err)
		}
		if !done {
			time.Sleep(time.Millisecond)
			continue
		}
		if o := Opcode(order.Uint32(second.buf[4:])); o != OpInterrupt {
			t.Fatalf("%v", o)
		}
		seen++
		if r, err := second.accept(); r != nil || err != nil {
			t.Fatalf("%v, %v", r, err)
		}
	}
	r, err := first.accept()
	if err != nil || r == nil {
		t.Fatal(err)
	}
	told := r.Context()
	read, stop := context.WithCancel(ctx)
	context.AfterFunc(told, stop)
	if other, err := second.Next(read); err == nil {
		t.Errorf("Next: %v", other)
	}
	if context.Cause(told) != unix.EINTR {
		t.Errorf("the context's cause is %v", context.Cause(told))
	}
	r.ReplyErrno(unix.EINTR)
	if err := <-stated; err != unix.EINTR {
		t.Errorf("stat: %v", err)
	}
}

// The kernel's references on the probe are known to a successor, which keeps
// their FORGET from its server.
func TestSuccessorKnowsTheProbe(t *testing.T) {
	s := mounted(t)
	if n := s.State().ProbeLookups; n != 1 {
		t.Fatalf("%d lookups of the probe", n)
	}
	if err := s.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	successor, err := Adopt(files, s.State())
	if err != nil {
		t.Fatal(err)
	}
	defer successor.Close()
	if err := successor.NotifyInvalEntry(1, s.probe.name); err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for successor.State().ProbeLookups != 0 {
		look, stop := context.WithTimeout(ctx, 10*time.Millisecond)
		if r, err := successor.Device().Next(look); err == nil {
			t.Errorf("the server gets %v", r)
			r.Close()
		}
		stop()
		if ctx.Err() != nil {
			t.Fatal("the probe is not forgotten")
		}
	}
}

// A buffer is in memory before it is used.
func TestBuffersAreThere(t *testing.T) {
	page := os.Getpagesize()
	for range 3 {
		b := newBuffer(4<<20, page)
		start := uintptr(unsafe.Pointer(&b[0])) &^ uintptr(page-1)
		pages := make([]byte, (len(b)-1)/page)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, start, uintptr(len(pages)*page), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
			t.Fatal(errno)
		}
		for i, p := range pages {
			if p&1 == 0 {
				t.Fatalf("page %d of %d is not there", i, len(pages))
			}
		}
		if data := uintptr(unsafe.Pointer(&b[messageOverhead])); data%uintptr(page) != 0 || len(b) != 4<<20 || cap(b) != len(b) {
			t.Errorf("data at %#x, %d bytes of %d", data, len(b), cap(b))
		}
	}
}

// stated lets a thread look a name up, and returns when a request waits to be
// read.
func stated(t *testing.T, s *Session) (wait func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var st unix.Stat_t
		unix.Stat(s.config.MountPoint+"/x", &st)
	}()
	fd, ok := s.device.file.Pin()
	if !ok {
		t.Fatal("closed")
	}
	defer s.device.file.Unpin()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for n := 0; n == 0; {
		var err error
		if n, err = unix.Poll(fds, int(patience.Milliseconds())); err != nil && err != unix.EINTR || n == 0 && err == nil {
			t.Fatalf("nothing to read: %v", err)
		}
	}
	return func() { <-done }
}

// Drain waits for a reader that has a message and has not entered it.
func TestDrainWaitsForTheReader(t *testing.T) {
	s := mounted(t)
	wait := stated(t, s)
	s.device.reader.Lock()
	if done, err := s.device.readNow(); !done || err != nil {
		t.Fatalf("%v, %v", done, err)
	}
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(context.Background()) }()
	select {
	case err := <-drained:
		t.Errorf("Drain returns %v before it knows of a request", err)
	case <-time.After(50 * time.Millisecond):
	}
	r, err := s.device.accept()
	if err != nil {
		t.Fatal(err)
	}
	s.device.reader.Unlock()
	select {
	case err := <-drained:
		t.Errorf("Drain returns %v while a request is in hand", err)
	case <-time.After(50 * time.Millisecond):
	}
	r.ReplyErrno(unix.ENOENT)
	if err := <-drained; err != nil {
		t.Errorf("Drain: %v", err)
	}
	wait()
}

// hookedContext calls hook when a reader asks what would wake it.
type hookedContext struct {
	context.Context
	hook func()
}

func (c hookedContext) Done() <-chan struct{} {
	c.hook()
	return c.Context.Done()
}

// A drain that comes while a reader lifts the deadline of another context is
// seen.
func TestDrainWhileADeadlineIsLifted(t *testing.T) {
	s := mounted(t)
	d := s.device
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := d.Next(ctx); err != context.Canceled {
		t.Fatalf("Next: %v", err)
	}
	// The deadline of ctx holds until another context comes.
	next, stop := context.WithCancel(t.Context())
	defer stop()
	drain := sync.OnceFunc(func() {
		s.startDrain()
		s.wake()
	})
	result := make(chan error, 1)
	go func() {
		_, err := d.Next(hookedContext{next, drain})
		result <- err
	}()
	select {
	case err := <-result:
		if err != ErrDrained {
			t.Errorf("Next: %v", err)
		}
	case <-time.After(patience):
		t.Error("the reader does not see the drain")
		stop()
		<-result
	}
	s.Resume()
}

// A Resume while Drain waits for the readers leaves nobody waiting: not Drain for a
// reader that goes on, nor that for Drain.
func TestResumeWhileReadersStop(t *testing.T) {
	s := mounted(t)
	first := s.Device()
	second, err := s.Clone()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// The reader of the first device has just read something.
	first.reader.Lock()
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(ctx) }()
	for !s.drained() {
		runtime.Gosched()
	}
	resumed := make(chan struct{})
	go func() {
		s.Resume()
		close(resumed)
	}()
	time.Sleep(10 * time.Millisecond)
	// That of the second one goes on as soon as it may.
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := second.Next(ctx); err != ErrDrained {
				ended <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	time.Sleep(10 * time.Millisecond)
	first.reader.Unlock()
	if err := testenv.Within(t, "Drain", func() error { return <-drained }); err != nil && !strings.Contains(err.Error(), "resumed") {
		t.Errorf("Drain: %v", err)
	}
	<-resumed
	look, stop := context.WithTimeout(ctx, time.Millisecond)
	defer stop()
	if _, err := first.Next(look); err != context.DeadlineExceeded {
		t.Errorf("Next: %v", err)
	}
	cancel()
	if err := <-ended; err != context.Canceled {
		t.Errorf("Next: %v", err)
	}
}

// A drain that stops the readers is one itself for a moment. Who reads is not told so,
// if the session has gone on by then.
func TestDrainIsNoReader(t *testing.T) {
	s := mounted(t)
	d := s.Device()
	s.turning.Lock()
	d.reader.Lock()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := d.Next(ctx)
		result <- err
	}()
	time.Sleep(10 * time.Millisecond)
	d.reader.Unlock()
	s.turning.Unlock()
	cancel()
	if err := <-result; err != context.Canceled {
		t.Errorf("Next: %v", err)
	}
}
