package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// The edge cases that these tests do not have:
//
//   - what fusermount3 before 3.15 leaves behind of an ordinary user's dead
//     server: it is what it does, and Close unmounts before it comes to that;
//   - one descriptor mounted twice, or closed by number while it is used: a
//     Session makes its own descriptor and shows nobody its number;
//   - an answer through another clone than the request came from: a Request
//     answers through its own device;
//   - INIT read by a clone: Mount has answered it before there can be one;
//   - an os.File of Files that the collector closes: it is a descriptor among
//     others, and the session has its own;
//   - SYNC_INIT, splice, passthrough and io_uring are not used;
//   - ENOMEM, EFAULT and ENOENT of read(2): they need a kernel that runs out of
//     memory, a bad buffer, or an interrupt within a microsecond (the soak tests
//     may have the last one);
//   - a request timeout needs 15 seconds and is a setting of the kernel's.

// readers are the three ways to read a device. Each returns how it ended.
var readers = []struct {
	name string
	read func(ctx context.Context, d *fuse.Device, handle func(*fuse.Request)) error
}{
	{"Next", func(ctx context.Context, d *fuse.Device, handle func(*fuse.Request)) error {
		for {
			r, err := d.Next(ctx)
			if err != nil {
				return err
			}
			handle(r)
		}
	}},
	{"All", func(ctx context.Context, d *fuse.Device, handle func(*fuse.Request)) error {
		for r, err := range d.All(ctx) {
			if err != nil {
				return err
			}
			handle(r)
		}
		return nil
	}},
	{"Requests", func(ctx context.Context, d *fuse.Device, handle func(*fuse.Request)) error {
		s := d.Requests(ctx)
		for r := range s.C {
			handle(r)
		}
		return s.Err()
	}},
}

// TestParityU9Ends: the ends of a session have names, which the three ways to
// read tell apart, whether the end comes while they wait or before.
func TestParityU9Ends(t *testing.T) {
	testenv.NeedFUSE(t)
	ends := []struct {
		name string
		end  func(l *lab)
		next error // of Next
		rest error // of All and Requests
	}{
		{"unmounted from outside", func(l *lab) {
			if err := unix.Unmount(l.dir, 0); err != nil {
				l.t.Error(err)
			}
		}, fuse.ErrUnmounted, nil},
		{"Unmount", func(l *lab) {
			if err := l.s.Unmount(context.Background(), 0); err != nil {
				l.t.Error(err)
			}
		}, fuse.ErrUnmounted, nil},
		{"Abort", func(l *lab) { l.s.Abort() }, fuse.ErrAborted, fuse.ErrAborted},
		{"forced while in use", func(l *lab) {
			// An open file, even one that was only named, keeps it in use.
			fd, err := unix.Open(l.dir, unix.O_PATH, 0)
			if err != nil {
				l.t.Error(err)
			}
			defer unix.Close(fd)
			if err := unix.Unmount(l.dir, unix.MNT_FORCE); err != unix.EBUSY {
				l.t.Errorf("umount2 MNT_FORCE: %v", err)
			}
			time.Sleep(time.Millisecond) // the reader looks whether it is mounted
		}, fuse.ErrAborted, fuse.ErrAborted},
		{"Close", func(l *lab) { l.s.Close() }, os.ErrClosed, nil},
	}
	for _, end := range ends {
		for _, reader := range readers {
			want := end.rest
			if reader.name == "Next" {
				want = end.next
			}
			check := func(t *testing.T, l *lab, err error) {
				if !errors.Is(err, want) || want == nil && err != nil {
					t.Errorf("%s ended by %v; want %v", reader.name, err, want)
				}
				if operation := (*kernstream.OpError)(nil); want != nil && reader.name == "Requests" && !errors.As(err, &operation) {
					t.Errorf("%v is not an OpError", err)
				}
				select {
				case <-l.s.Done():
				default:
					t.Error("Done is not closed")
				}
				if err := l.s.Err(); !errors.Is(err, end.rest) || end.rest == nil && err != nil {
					t.Errorf("Err of the session: %v; want %v", err, end.rest)
				}
				// It stays that way.
				if _, err := l.s.Device().Next(t.Context()); !errors.Is(err, end.next) {
					t.Errorf("Next after the end: %v", err)
				}
			}
			t.Run(end.name+" while "+reader.name+" waits", func(t *testing.T) {
				l := newLab(t, nil)
				result := make(chan error, 1)
				go func() { result <- reader.read(context.Background(), l.s.Device(), basic) }()
				time.Sleep(5 * time.Millisecond)
				end.end(l)
				check(t, l, testenv.Within(t, "the end", func() error { return <-result }))
			})
			t.Run(end.name+" before "+reader.name, func(t *testing.T) {
				l := newLab(t, nil)
				c := newClient(t)
				wait := c.start("stat", l.path("x"))
				l.next(lookup("x")).ReplyErrno(unix.ENOENT)
				wait()
				end.end(l)
				check(t, l, testenv.Within(t, "the end", func() error { return reader.read(context.Background(), l.s.Device(), basic) }))
			})
		}
	}
}

// An end that has come goes before a context that is done.
func TestEndBeforeCancel(t *testing.T) {
	l := newLab(t, nil)
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.s.Device().Next(ctx); err != fuse.ErrUnmounted {
		t.Errorf("Next: %v", err)
	}
}

// A context wakes who waits, with its cause, and the next call goes on with the
// same device or with another context; nothing is lost.
func TestCancelAndGoOn(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	cause := errors.New("why")
	for i := range 20 {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Duration(i%4)*time.Millisecond, func() { cancel(cause) })
		err := testenv.Within(t, "Next", func() error {
			for {
				r, err := l.s.Device().Next(ctx)
				if err != nil {
					return err
				}
				basic(r)
			}
		})
		if err != cause {
			t.Fatalf("Next: %v; want %v", err, cause)
		}
		wait := c.start("stat", l.path(fmt.Sprint(i)))
		l.next(lookup(fmt.Sprint(i))).ReplyErrno(unix.ENOENT)
		if err := wait(); err != unix.ENOENT {
			t.Fatalf("stat: %v", err)
		}
	}
}

// With a context that is done already nothing is read, whatever there is.
func TestCancelledReadsNothing(t *testing.T) {
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	time.Sleep(20 * time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 3 {
		if r, err := l.s.Device().Next(ctx); err != context.Canceled {
			t.Fatalf("Next: %v, %v", r, err)
		}
	}
	if n := l.s.Outstanding(); n != 0 {
		t.Errorf("%d requests were read", n)
	}
	l.next(lookup("x")).ReplyErrno(unix.ENOENT)
	if err := wait(); err != unix.ENOENT {
		t.Error(err)
	}
}

// What is there is returned without a deadline: a context costs nothing then.
// One that is done while a request is there leaves that for the next call.
func TestContextsOfEachCall(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	wait := c.start("stats", l.dir, "500")
	for turn, answered := 0, 0; answered < 500; turn++ {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(turn%7)*50*time.Microsecond)
		r, err := l.s.Device().Next(ctx)
		cancel()
		if err != nil {
			if err != context.DeadlineExceeded {
				t.Fatal(err)
			}
			continue
		}
		if r.Header.Opcode == fuse.OpLookup {
			answered++
		}
		basic(r)
	}
	if err := wait(); err != nil {
		t.Error(err)
	}
}

// A device has one reader at a time. Another one is told so, and disturbs
// nobody.
func TestOneReader(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := l.s.Device().Requests(ctx)
	if _, err := l.s.Device().Next(t.Context()); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), l.dir) {
		t.Errorf("Next: %v", err)
	}
	for r, err := range l.s.Device().All(t.Context()) {
		if !errors.Is(err, unix.EBUSY) || r != nil {
			t.Errorf("All: %v, %v", r, err)
		}
	}
	second := l.s.Device().Requests(t.Context())
	for r := range second.C {
		t.Errorf("a second stream has %v", r)
	}
	if err := second.Err(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second stream: %v", err)
	}
	wait := c.start("stat", l.path("x"))
	for r := range s.C {
		last := lookup("x")(r)
		basic(r)
		if last {
			break
		}
	}
	if err := wait(); err != unix.ENOENT {
		t.Error(err)
	}
	cancel()
	for range s.C {
	}
	// C is closed, so the device is free.
	wait = c.start("stat", l.path("y"))
	l.next(lookup("y")).ReplyErrno(unix.ENOENT)
	wait()
}

// A request that a stream has read, and nobody has received, goes to the next
// reader when the stream ends.
func TestStreamGivesBack(t *testing.T) {
	for _, how := range []string{"cancel", "Close"} {
		t.Run(how, func(t *testing.T) {
			l := newLab(t, nil)
			c := newClient(t)
			for i := range 20 {
				ctx, cancel := context.WithCancel(t.Context())
				s := l.s.Device().Requests(ctx)
				name := fmt.Sprint("x", i)
				wait := c.start("stat", l.path(name))
				time.Sleep(time.Duration(i%5) * time.Millisecond)
				if how == "cancel" {
					cancel()
					for r := range s.C {
						t.Errorf("received %v", r)
						r.Close()
					}
				} else {
					s.Close()
				}
				cancel()
				l.next(lookup(name)).ReplyErrno(unix.ENOENT)
				if err := wait(); err != unix.ENOENT {
					t.Fatalf("stat: %v; want ENOENT", err)
				}
			}
		})
	}
}

// A consumer may close what it receives at once: it is answered EIO then, and
// not given to anybody else.
func TestStreamCloseOfRequests(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	s := l.s.Device().Requests(t.Context())
	defer s.Close()
	wait := make(chan error, 1)
	go func() {
		for i := range 200 {
			if err := c.do("stat", l.path(fmt.Sprint(i))); err != unix.EIO {
				wait <- fmt.Errorf("stat %d: %w", i, err)
				return
			}
		}
		wait <- nil
	}()
	for {
		select {
		case r := <-s.C:
			if r.Header.Opcode == fuse.OpLookup {
				r.Close()
			} else {
				basic(r)
			}
		case err := <-wait:
			if err != nil {
				t.Error(err)
			}
			// The client wakes up a moment before the answer is noted.
			for deadline := time.Now().Add(patience); l.s.Outstanding() != 0; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d requests are not answered", l.s.Outstanding())
				}
			}
			return
		}
	}
}

// A stream whose consumer has gone ends with the session.
func TestCloseEndsStreams(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	s := l.s.Device().Requests(context.Background())
	wait := c.start("stat", l.path("x"))
	time.Sleep(20 * time.Millisecond)
	if err := testenv.Within(t, "Close", l.s.Close); err != nil {
		t.Error(err)
	}
	for r := range s.C {
		t.Errorf("received %v", r)
	}
	if err := s.Err(); err != nil {
		t.Errorf("Err: %v", err)
	}
	if err := wait(); err != unix.ECONNABORTED && err != unix.ENOTCONN {
		t.Errorf("stat: %v", err)
	}
}

// Close is legal in the loop that receives, twice, and at the same time.
func TestCloseInTheLoop(t *testing.T) {
	for _, reader := range readers {
		t.Run(reader.name, func(t *testing.T) {
			l := newLab(t, nil)
			c := newClient(t)
			wait := c.start("stat", l.path("x"))
			err := testenv.Within(t, "the loop", func() error {
				return reader.read(context.Background(), l.s.Device(), func(r *fuse.Request) {
					go l.s.Close()
					if err := l.s.Close(); err != nil {
						t.Error(err)
					}
					if err := r.Reply(); !errors.Is(err, os.ErrClosed) {
						t.Errorf("Reply after Close: %v", err)
					}
				})
			})
			if err != nil && err != os.ErrClosed {
				t.Error(err)
			}
			wait()
		})
	}
}

// A request stream is a Source like any other.
func TestMergeWithOtherStreams(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	w, err := kernstream.WatchMounts(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	all := kernstream.Merge(t.Context(), w, l.s.Device().Requests(t.Context()))
	defer all.Close()
	wait := c.start("stat", l.path("x"))
	for e := range all.C {
		if r, ok := e.(*fuse.Request); ok {
			found := lookup("x")(r)
			basic(r)
			if found {
				break
			}
		}
	}
	if err := wait(); err != unix.ENOENT {
		t.Error(err)
	}
}

// No descriptor of a session is inherited by a program that is started.
func TestDescriptorsAreCloseOnExec(t *testing.T) {
	testenv.NeedTool(t, "fusermount3")
	newLab(t, &fuse.Config{Via: fuse.ViaMount})
	newLab(t, &fuse.Config{AutoUnmount: true})
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || !strings.HasSuffix(target, "fuse") && !strings.HasPrefix(target, "socket:") {
			continue
		}
		seen++
		var fd int
		fmt.Sscan(e.Name(), &fd)
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s is inherited: %#x, %v", target, flags, err)
		}
	}
	if seen < 3 {
		t.Errorf("%d descriptors of the sessions were found", seen)
	}
}

// An abort through the kernel's control files stays one when the file system is
// unmounted before anybody has looked.
func TestAbortThenUnmount(t *testing.T) {
	testenv.NeedRoot(t, "the control file system of FUSE")
	l := newLab(t, nil)
	control, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(control)
	if _, _, errno := unix.Syscall6(unix.SYS_FSCONFIG, uintptr(control), unix.FSCONFIG_CMD_CREATE, 0, 0, 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	mount, err := unix.Fsmount(control, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mount)
	abort, err := unix.Openat(mount, fmt.Sprint(l.s.ConnectionID(), "/abort"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(abort)
	if _, err := unix.Write(abort, []byte("1")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.s.Device().Next(t.Context()); err != fuse.ErrAborted {
		t.Errorf("Next: %v", err)
	}
}

// A session that the program has forgotten stays mounted.
func TestForgottenSession(t *testing.T) {
	testenv.NeedFUSE(t)
	out, err := testenv.Child(t, "forgetful", t.TempDir()).Output()
	if err != nil || string(out) != "mounted\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func init() {
	testenv.RegisterChild("forgetful", func(args []string) int {
		if _, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: args[0]}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		for range 5 {
			runtime.GC()
			time.Sleep(time.Millisecond)
		}
		entries, _ := os.ReadDir("/proc/self/fd")
		for _, e := range entries {
			if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); target == "/dev/fuse" {
				fmt.Println("mounted")
			}
		}
		unix.Unmount(args[0], unix.MNT_DETACH)
		return 0
	})
}
