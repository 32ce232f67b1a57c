package fuse

import (
	"context"
	"errors"
	"os"
	"runtime"
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

const patience = 20 * time.Second

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
