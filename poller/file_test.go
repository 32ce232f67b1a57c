package poller_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/poller"
)

// patience is how long a test waits for what must happen.
const patience = testenv.Patience

// past is a deadline that has expired.
var past = time.Unix(1, 0)

// pipe returns the read end of a pipe in the poller, and its write end.
func pipe(t testing.TB) (*poller.File, int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	f, err := poller.New(p[0], "pipe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	t.Cleanup(func() { unix.Close(p[1]) })
	return f, p[1]
}

func write(t testing.TB, fd int, text string) {
	t.Helper()
	if _, err := unix.Write(fd, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

// readByte is a check for File.Wait that takes one byte.
func readByte(fd int) (bool, error) {
	n, err := unix.Read(fd, make([]byte, 1))
	if err == unix.EAGAIN || err == unix.EINTR {
		return false, nil
	}
	return n == 1, err
}

// TestReadWaits: Read waits for data, returns what is there, and io.EOF at the
// end.
func TestReadWaits(t *testing.T) {
	testenv.NoLeaks(t)
	f, w := pipe(t)
	go func() {
		time.Sleep(20 * time.Millisecond)
		unix.Write(w, []byte("hello"))
	}()
	buf := make([]byte, 64)
	err := testenv.Within(t, "Read", func() error {
		n, err := f.Read(buf)
		if string(buf[:n]) != "hello" {
			t.Errorf("Read returned %q", buf[:n])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	other, w2 := socketPair(t)
	unix.Close(w2)
	if n, err := other.Read(buf); n != 0 || err != io.EOF {
		t.Errorf("Read at the end returned %d, %v; want io.EOF", n, err)
	}
	if err := other.SetReadDeadline(past); err != nil {
		t.Fatal(err)
	}
	if n, err := other.Read(buf); n != 0 || err != io.EOF {
		t.Errorf("Read at the end, after the deadline, returned %d, %v; want io.EOF", n, err)
	}
}

func socketPair(t testing.TB) (*poller.File, int) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := poller.New(p[0], "socket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, p[1]
}

// TestWaitChecksFirst: what became ready before Wait is entered is not waited
// for, although the runtime forgets the readiness at the entry.
func TestWaitChecksFirst(t *testing.T) {
	testenv.NoLeaks(t)
	f, w := pipe(t)
	for range 100 {
		write(t, w, "x")
		// The runtime has seen the edge before the wait begins.
		time.Sleep(100 * time.Microsecond)
		if err := testenv.Within(t, "Wait", func() error { return f.Wait(readByte) }); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWaitKeepsEdges: what becomes ready while check runs leads to another
// call of it within the same Wait.
func TestWaitKeepsEdges(t *testing.T) {
	testenv.NoLeaks(t)
	f, w := pipe(t)
	calls := 0
	err := testenv.Within(t, "Wait", func() error {
		return f.Wait(func(fd int) (bool, error) {
			calls++
			if done, err := readByte(fd); done || err != nil {
				return done, err
			}
			// The byte comes after this call has looked.
			unix.Write(w, []byte("x"))
			time.Sleep(time.Millisecond)
			return false, nil
		})
	})
	if err != nil || calls != 2 {
		t.Errorf("Wait returned %v after %d calls of check; want nil after 2", err, calls)
	}
}

// TestWaitReturnsTheErrorOfCheck: an error of check ends the Wait and is
// returned as it is.
func TestWaitReturnsTheErrorOfCheck(t *testing.T) {
	f, _ := pipe(t)
	want := errors.New("odd")
	if err := f.Wait(func(int) (bool, error) { return false, want }); err != want {
		t.Errorf("Wait returned %v", err)
	}
	if err := f.Wait(func(int) (bool, error) { return true, want }); err != want {
		t.Errorf("Wait returned %v", err)
	}
}

// TestNewRefusesLoudly: a descriptor that epoll does not take is an error that
// says so, not a File that blocks a thread; New has closed it.
func TestNewRefusesLoudly(t *testing.T) {
	testenv.NoLeaks(t)
	path := filepath.Join(t.TempDir(), "regular")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f, err := poller.New(fd, "regular")
	if f != nil || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "epoll_ctl") || !strings.Contains(err.Error(), "regular") {
		t.Errorf("New of a regular file returned %v, %v; want an error of epoll_ctl that Is EPERM", f, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is still open: %v", err)
	}
	for _, fd := range []int{-1, 1 << 20} {
		if f, err := poller.New(fd, "nothing"); f != nil || !errors.Is(err, unix.EBADF) {
			t.Errorf("New(%d) returned %v, %v; want EBADF", fd, f, err)
		}
	}
}

// TestClosedIsErrClosed: every method says os.ErrClosed after Close, and the
// waiting ones when Close comes while they wait.
func TestClosedIsErrClosed(t *testing.T) {
	testenv.NoLeaks(t)
	waits := map[string]func(f *poller.File) error{
		"Read": func(f *poller.File) error { _, err := f.Read(make([]byte, 8)); return err },
		"Wait": func(f *poller.File) error { return f.Wait(readByte) },
	}
	others := map[string]func(f *poller.File) error{
		"Control": func(f *poller.File) error {
			return f.Control(func(int) { t.Error("Control called its function after Close") })
		},
		"SetReadDeadline": func(f *poller.File) error { return f.SetReadDeadline(time.Time{}) },
	}
	for name, wait := range waits {
		f, _ := pipe(t)
		result := make(chan error)
		go func() { result <- wait(f) }()
		time.Sleep(5 * time.Millisecond)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := testenv.Within(t, name, func() error { return <-result }); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s during Close returned %v; want os.ErrClosed", name, err)
		}
		others[name] = wait
	}
	f, _ := pipe(t)
	for range 2 {
		if err := f.Close(); err != nil {
			t.Errorf("Close returned %v", err)
		}
	}
	for name, call := range others {
		if err := testenv.Within(t, name, func() error { return call(f) }); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close returned %v; want os.ErrClosed", name, err)
		}
	}
}

// TestDeadlineHidesNothing: with a deadline that has expired, Read still
// returns data that is there and Wait still finds what its check looks for;
// only then comes os.ErrDeadlineExceeded.
func TestDeadlineHidesNothing(t *testing.T) {
	testenv.NoLeaks(t)
	f, w := pipe(t)
	if err := f.SetReadDeadline(past); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8)
	write(t, w, "data")
	if n, err := f.Read(buf); n != 4 || err != nil {
		t.Errorf("Read returned %d, %v; want the 4 bytes", n, err)
	}
	if n, err := f.Read(buf); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read returned %d, %v; want os.ErrDeadlineExceeded", n, err)
	}
	write(t, w, "x")
	if err := f.Wait(readByte); err != nil {
		t.Errorf("Wait returned %v; want nil", err)
	}
	calls := 0
	err := f.Wait(func(int) (bool, error) { calls++; return false, nil })
	if !errors.Is(err, os.ErrDeadlineExceeded) || calls != 1 {
		t.Errorf("Wait returned %v after %d calls; want os.ErrDeadlineExceeded after one last look", err, calls)
	}
	want := errors.New("odd")
	if err := f.Wait(func(int) (bool, error) { return false, want }); err != want {
		t.Errorf("Wait returned %v; want the error of the last look", err)
	}
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	write(t, w, "x")
	if err := testenv.Within(t, "Wait", func() error { return f.Wait(readByte) }); err != nil {
		t.Errorf("Wait after the deadline was lifted returned %v", err)
	}
}

// TestDeadlineWakes: a deadline that is set while Read and Wait wait ends them.
func TestDeadlineWakes(t *testing.T) {
	testenv.NoLeaks(t)
	for name, wait := range map[string]func(f *poller.File) error{
		"Read": func(f *poller.File) error { _, err := f.Read(make([]byte, 8)); return err },
		"Wait": func(f *poller.File) error { return f.Wait(readByte) },
	} {
		f, _ := pipe(t)
		result := make(chan error)
		go func() { result <- wait(f) }()
		time.Sleep(5 * time.Millisecond)
		f.SetReadDeadline(past)
		if err := testenv.Within(t, name, func() error { return <-result }); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s returned %v; want os.ErrDeadlineExceeded", name, err)
		}
	}
}

// TestErrorConditionGetsItsErrno: a descriptor that raises an error condition
// and nothing else makes the runtime refuse to wait ("not pollable"). Read
// returns the errno behind it, Wait lets its check find it.
func TestErrorConditionGetsItsErrno(t *testing.T) {
	testenv.NoLeaks(t)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	// A full pipe whose reader is gone raises EPOLLERR alone.
	for {
		if _, err := unix.Write(p[1], make([]byte, 4096)); err != nil {
			break
		}
	}
	f, err := poller.New(p[1], "pipe without a reader")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	waiting := make(chan struct{})
	result := make(chan error)
	go func() {
		result <- f.Wait(func(fd int) (bool, error) {
			_, err := unix.Write(fd, []byte("x"))
			if err == unix.EAGAIN {
				waiting <- struct{}{}
				return false, nil
			}
			return true, err
		})
	}()
	<-waiting
	unix.Close(p[0])
	if err := testenv.Within(t, "Wait", func() error { return <-result }); err != unix.EPIPE {
		t.Errorf("Wait returned %v; want EPIPE", err)
	}
	// From then on the runtime refuses to begin a wait.
	err = testenv.Within(t, "Wait", func() error {
		return f.Wait(func(fd int) (bool, error) {
			_, err := unix.Write(fd, []byte("x"))
			return err != unix.EAGAIN, err
		})
	})
	if err != unix.EPIPE {
		t.Errorf("Wait returned %v; want EPIPE, which the last look finds", err)
	}
	if n, err := f.Read(make([]byte, 8)); n != 0 || !errors.Is(err, unix.EBADF) {
		t.Errorf("Read returned %d, %v; want EBADF", n, err)
	}
	err = testenv.Within(t, "Wait", func() error { return f.Wait(func(int) (bool, error) { return false, nil }) })
	if err == nil || !strings.Contains(err.Error(), "error condition") || !strings.Contains(err.Error(), f.Name()) {
		t.Errorf("Wait returned %v; want an error that names the file and its state", err)
	}
}

// TestCancelOn: the deadline expires with the context, for whoever waits and
// for good.
func TestCancelOn(t *testing.T) {
	testenv.NoLeaks(t)
	f, _ := pipe(t)
	ctx, cancel := context.WithCancel(t.Context())
	release := f.CancelOn(ctx)
	defer release()
	result := make(chan error)
	go func() { result <- f.Wait(readByte) }()
	time.Sleep(5 * time.Millisecond)
	cancel()
	if err := testenv.Within(t, "Wait", func() error { return <-result }); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Wait returned %v; want os.ErrDeadlineExceeded", err)
	}
	if err := f.Wait(readByte); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the next Wait returned %v; want os.ErrDeadlineExceeded", err)
	}
	release()
	release()
}

// TestReleaseIsTheEndOfACancel: when release has returned, a cancel that came
// before or at the same time does not touch the deadline any more.
func TestReleaseIsTheEndOfACancel(t *testing.T) {
	testenv.NoLeaks(t)
	f, w := pipe(t)
	round := func(cancelling func(cancel func()) (join func())) {
		ctx, cancel := context.WithCancel(context.Background())
		release := f.CancelOn(ctx)
		join := cancelling(cancel)
		release()
		if err := f.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		join()
		// A stale cancel would make this Wait give up before there is a byte.
		var writer sync.WaitGroup
		writer.Go(func() {
			time.Sleep(200 * time.Microsecond)
			unix.Write(w, []byte("x"))
		})
		err := f.Wait(readByte)
		writer.Wait()
		if err != nil {
			t.Fatalf("Wait returned %v: a cancel came after its release", err)
		}
	}
	for range testenv.SoakN(1_000) {
		round(func(cancel func()) func() {
			var other sync.WaitGroup
			other.Go(cancel)
			return other.Wait
		})
	}
	// On one processor, what a cancel sets off runs when this goroutine waits
	// for something: for that, if all is well, and else in Wait.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for range 100 {
		round(func(cancel func()) func() {
			cancel()
			return func() {}
		})
	}
}

// TestCancelAgainstEvent: however a cancel and an event meet, the event is
// found or still there, and never lost.
func TestCancelAgainstEvent(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(3_000) {
		f, w := pipe(t)
		ctx, cancel := context.WithCancel(context.Background())
		release := f.CancelOn(ctx)
		var both sync.WaitGroup
		both.Go(cancel)
		both.Go(func() { unix.Write(w, []byte("x")) })
		err := f.Wait(readByte)
		both.Wait()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = f.Wait(readByte)
		}
		if err != nil {
			t.Fatalf("Wait returned %v although the byte was written", err)
		}
		release()
		f.Close()
	}
}

// TestWaitersHoldNoThread: a thousand goroutines that wait share a handful of
// threads.
func TestWaitersHoldNoThread(t *testing.T) {
	testenv.NoLeaks(t)
	var waiting sync.WaitGroup
	var files []*poller.File
	for range 500 {
		f, _ := pipe(t)
		files = append(files, f)
		waiting.Go(func() { f.Wait(readByte) })
	}
	time.Sleep(50 * time.Millisecond)
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	if limit := 4*runtime.GOMAXPROCS(0) + 40; len(tasks) > limit {
		t.Errorf("%d threads for 500 waits; want at most %d", len(tasks), limit)
	}
	for _, f := range files {
		f.Close()
	}
	waiting.Wait()
}

// TestProfileKnowsOpenDescriptors: what is open stands in the profile with the
// stack that opened it, until it is closed.
func TestProfileKnowsOpenDescriptors(t *testing.T) {
	profile := pprof.Lookup("kernstream.descriptors")
	before := profile.Count()
	f, _ := pipe(t)
	d := poller.Own(mustOpen(t, "/dev/null"))
	if got := profile.Count() - before; got != 2 {
		t.Errorf("the profile has %d more entries; want 2", got)
	}
	var text strings.Builder
	profile.WriteTo(&text, 1)
	if !strings.Contains(text.String(), "TestProfileKnowsOpenDescriptors") {
		t.Errorf("the profile does not name this test:\n%s", text.String())
	}
	f.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if got := profile.Count(); got != before {
		t.Errorf("the profile has %d entries after Close; want %d", got, before)
	}
}

// TestWaiter: a Waiter waits as Wait does, any number of times, and allocates
// nothing.
func TestWaiter(t *testing.T) {
	f, w := pipe(t)
	got := byte(0)
	buf := make([]byte, 1)
	wait := f.Waiter(func(fd int) (bool, error) {
		n, err := unix.Read(fd, buf)
		if err == unix.EAGAIN || err == unix.EINTR {
			return false, nil
		}
		got = buf[0]
		return n == 1, err
	})
	for i := range 3 {
		time.AfterFunc(time.Millisecond, func() { write(t, w, string(rune('a'+i))) })
		if err := testenv.Within(t, "Waiter", wait); err != nil || got != byte('a'+i) {
			t.Fatalf("%q, %v; want %q", got, err, byte('a'+i))
		}
	}
	text := []byte("x")
	if n := testing.AllocsPerRun(200, func() {
		unix.Write(w, text)
		if err := wait(); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations for each wait", n)
	}
	f.SetReadDeadline(past)
	if err := wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	write(t, w, "y")
	if err := wait(); err != nil || got != 'y' {
		t.Errorf("after the deadline, with something to read: %q, %v", got, err)
	}
	f.Close()
	if err := wait(); err != os.ErrClosed {
		t.Errorf("after Close: %v", err)
	}
}

// TestPin: a pinned descriptor stays open, and Close waits until it is not
// pinned any more; after Close there is none.
func TestPin(t *testing.T) {
	f, w := pipe(t)
	fd, ok := f.Pin()
	if !ok {
		t.Fatal("not pinned")
	}
	closed := make(chan error, 1)
	go func() { closed <- f.Close() }()
	select {
	case <-closed:
		t.Fatal("Close does not wait")
	case <-time.After(20 * time.Millisecond):
	}
	write(t, w, "a")
	if n, err := unix.Read(fd, make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("read of the pinned descriptor: %d, %v", n, err)
	}
	f.Unpin()
	if err := testenv.Within(t, "Close", func() error { return <-closed }); err != nil {
		t.Error(err)
	}
	if fd, ok := f.Pin(); ok {
		t.Errorf("pinned %d after Close", fd)
	}
}

func mustOpen(t testing.TB, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func ExampleFile_Wait() {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		fmt.Println(err)
		return
	}
	f, err := poller.New(fd, "eventfd")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	go f.Control(func(fd int) { unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) })

	counter := make([]byte, 8)
	err = f.Wait(func(fd int) (bool, error) {
		_, err := unix.Read(fd, counter)
		if err == unix.EAGAIN {
			return false, nil // wait until the descriptor is ready
		}
		return true, err
	})
	fmt.Println(counter[0] > 0 || counter[7] > 0, err)
	// Output: true <nil>
}
