package poller_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/poller"
)

func newSet(t testing.TB) *poller.Set[string] {
	t.Helper()
	s, err := poller.NewSet[string]()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// rawPipe returns both ends of a pipe; the write end is closed at the end of
// the test.
func rawPipe(t testing.TB) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[1]) })
	return p[0], p[1]
}

func add(t testing.TB, s *poller.Set[string], fd int, value string) poller.ID {
	t.Helper()
	id, err := s.Add(fd, unix.EPOLLIN, value)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// next returns what one Wait reports.
func next(t testing.TB, s *poller.Set[string], room int) []poller.Ready[string] {
	t.Helper()
	ready := make([]poller.Ready[string], room)
	n := 0
	err := testenv.Within(t, "Set.Wait", func() (err error) {
		n, err = s.Wait(ready)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return ready[:n]
}

// quiet fails the test if something is ready in the set.
func quiet(t testing.TB, s *poller.Set[string]) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	release := s.CancelOn(ctx)
	defer release()
	time.Sleep(time.Millisecond)
	ready := make([]poller.Ready[string], 8)
	if n, err := s.Wait(ready); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Wait returned %v, %v; want nothing to be ready", ready[:n], err)
	}
}

// TestSetReportsOnce: a descriptor that stays ready is reported once, one that
// was ready when it was added is, too, also while Wait waits already.
func TestSetReportsOnce(t *testing.T) {
	testenv.NoLeaks(t)
	s := newSet(t)
	r1, w1 := rawPipe(t)
	write(t, w1, "x")
	id := add(t, s, r1, "first")
	got := next(t, s, 8)
	if len(got) != 1 || got[0].ID != id || got[0].Value != "first" || got[0].Events&unix.EPOLLIN == 0 {
		t.Fatalf("Wait reported %+v", got)
	}
	// A second reader of the same Set begins to wait before the descriptor
	// comes.
	r2, w2 := rawPipe(t)
	write(t, w2, "x")
	go func() {
		time.Sleep(10 * time.Millisecond)
		s.Add(r2, unix.EPOLLIN, "second")
	}()
	if got := next(t, s, 8); len(got) != 1 || got[0].Value != "second" {
		t.Fatalf("Wait reported %+v; want the second alone", got)
	}
	if n := s.Len(); n != 2 {
		t.Errorf("Len is %d; want 2", n)
	}
	quiet(t, s)
}

// TestSetPartialDrain: what did not fit into one Wait is reported by the next,
// nothing twice.
func TestSetPartialDrain(t *testing.T) {
	testenv.NoLeaks(t)
	s := newSet(t)
	want := map[string]bool{}
	for i := range 200 {
		r, w := rawPipe(t)
		value := string(rune('A' + i))
		add(t, s, r, value)
		write(t, w, "x")
		want[value] = true
	}
	for len(want) > 0 {
		for _, ready := range next(t, s, 7) {
			if !want[ready.Value] {
				t.Fatalf("%q was reported twice", ready.Value)
			}
			delete(want, ready.Value)
		}
	}
	quiet(t, s)
}

// TestSetExitOfProcess: a pidfd in a Set reports the end of a process, once.
func TestSetExitOfProcess(t *testing.T) {
	testenv.NoLeaks(t)
	testenv.Feature(t, "exit of a process in a Set", "pidfd")
	s := newSet(t)
	cmd := exec.Command("/bin/sh", "-c", "read x; exit 3")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	add(t, s, fd, "process")
	stdin.Close()
	if got := next(t, s, 8); len(got) != 1 || got[0].Events&unix.EPOLLIN == 0 {
		t.Fatalf("Wait reported %+v; want the exit", got)
	}
	quiet(t, s)
	cmd.Wait()
}

// TestSetReapingOfProcess: being reaped is another edge of the pidfd.
func TestSetReapingOfProcess(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "EPOLLHUP of a pidfd")
	testenv.NoLeaks(t)
	testenv.Feature(t, "reaping of a process in a Set", "pidfd, EPOLLHUP")
	s := newSet(t)
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	add(t, s, fd, "process")
	if got := next(t, s, 8); len(got) != 1 || got[0].Events&unix.EPOLLHUP != 0 {
		t.Fatalf("Wait reported %+v; want the exit alone", got)
	}
	cmd.Wait()
	if got := next(t, s, 8); len(got) != 1 || got[0].Events&unix.EPOLLHUP == 0 {
		t.Fatalf("Wait reported %+v; want EPOLLHUP for the reaping", got)
	}
	quiet(t, s)
}

// TestSetRemove: a descriptor that was removed is closed, is not reported, and
// its ID names nothing any more, not even a descriptor that took its place.
func TestSetRemove(t *testing.T) {
	testenv.NoLeaks(t)
	s := newSet(t)
	r, w := rawPipe(t)
	dup, err := unix.FcntlInt(uintptr(r), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	old := add(t, s, r, "old")
	if err := s.Remove(old); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(r), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor is open after Remove: %v", err)
	}
	// The duplicate keeps the open file description alive, and with it a
	// registration that was not taken out.
	write(t, w, "x")
	quiet(t, s)

	r2, w2 := rawPipe(t)
	id := add(t, s, r2, "new")
	if id == old {
		t.Fatal("an ID was used twice")
	}
	if err := s.Remove(old); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Remove of a dead ID returned %v; want os.ErrClosed", err)
	}
	if err := s.Control(old, func(int) { t.Error("Control called its function for a dead ID") }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Control of a dead ID returned %v; want os.ErrClosed", err)
	}
	if err := s.Control(id, func(fd int) {
		if fd != r2 {
			t.Errorf("Control passed descriptor %d; want %d", fd, r2)
		}
	}); err != nil {
		t.Error(err)
	}
	write(t, w2, "x")
	if got := next(t, s, 8); len(got) != 1 || got[0].ID != id || got[0].Value != "new" {
		t.Errorf("Wait reported %+v; want the new one", got)
	}
	for _, id := range []poller.ID{0, 1, 1 << 32, 1<<32 | 7, ^poller.ID(0)} {
		if err := s.Remove(id); id != 1<<32 && !errors.Is(err, os.ErrClosed) {
			t.Errorf("Remove(%#x) returned %v; want os.ErrClosed", id, err)
		}
	}
}

// TestSetRemoveMany: Remove takes any number, does what it can when some are gone,
// and may run in several goroutines and beside Close: everything is closed once.
func TestSetRemoveMany(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(20) {
		s := newSet(t)
		var ids []poller.ID
		var fds []int
		for range 300 {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
			ids = append(ids, add(t, s, fd, "event"))
		}
		if err := s.Remove(ids[:100]...); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove(ids[50:150]...); !errors.Is(err, os.ErrClosed) || s.Len() != 150 {
			t.Fatalf("Remove of some that are gone returned %v, and left %d; want os.ErrClosed, 150", err, s.Len())
		}
		if err := s.Remove(); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for _, part := range [][]poller.ID{ids[150:200], ids[200:250]} {
			all.Go(func() { s.Remove(part...) })
		}
		all.Go(func() { s.Close() })
		all.Wait()
		for _, fd := range fds {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
				t.Fatalf("descriptor %d is open", fd)
			}
		}
	}
}

// TestSetAddFails: a descriptor that Add did not take stays the caller's, and
// the Set as it was.
func TestSetAddFails(t *testing.T) {
	testenv.NoLeaks(t)
	s := newSet(t)
	regular, err := os.Create(filepath.Join(t.TempDir(), "regular"))
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	if _, err := s.Add(int(regular.Fd()), unix.EPOLLIN, "regular"); !errors.Is(err, unix.EPERM) {
		t.Errorf("Add of a regular file returned %v; want EPERM", err)
	}
	if _, err := s.Add(-1, unix.EPOLLIN, "none"); !errors.Is(err, unix.EBADF) {
		t.Errorf("Add(-1) returned %v; want EBADF", err)
	}
	r, _ := rawPipe(t)
	add(t, s, r, "pipe")
	if _, err := s.Add(r, unix.EPOLLIN, "again"); !errors.Is(err, unix.EEXIST) {
		t.Errorf("Add of the same descriptor returned %v; want EEXIST", err)
	}
	if n := s.Len(); n != 1 {
		t.Errorf("Len is %d; want 1", n)
	}
	if _, err := regular.Stat(); err != nil {
		t.Errorf("Add closed a descriptor that it did not take: %v", err)
	}
	s.Close()
	r2, _ := rawPipe(t)
	if _, err := s.Add(r2, unix.EPOLLIN, "late"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Add after Close returned %v; want os.ErrClosed", err)
	}
	if err := unix.Close(r2); err != nil {
		t.Errorf("Add closed a descriptor that it did not take: %v", err)
	}
}

// TestSetClose: Close wakes Wait, closes all descriptors, and may come again.
func TestSetClose(t *testing.T) {
	testenv.NoLeaks(t)
	s := newSet(t)
	for range 10 {
		r, _ := rawPipe(t)
		add(t, s, r, "pipe")
	}
	result := make(chan error)
	go func() {
		_, err := s.Wait(make([]poller.Ready[string], 4))
		result <- err
	}()
	time.Sleep(5 * time.Millisecond)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := testenv.Within(t, "Wait", func() error { return <-result }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait returned %v; want os.ErrClosed", err)
	}
	if _, err := s.Wait(make([]poller.Ready[string], 4)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait after Close returned %v; want os.ErrClosed", err)
	}
	if n := s.Len(); n != 0 {
		t.Errorf("Len is %d after Close", n)
	}
}

// TestSetHammer: descriptors come and go from several goroutines while one
// waits; each report is of a descriptor that was ready, with its own value.
func TestSetHammer(t *testing.T) {
	testenv.NoLeaks(t)
	type owner struct {
		mu      sync.Mutex
		id      poller.ID
		written bool
		seen    int
	}
	s, err := poller.NewSet[*owner]()
	if err != nil {
		t.Fatal(err)
	}
	reader := make(chan struct{})
	go func() {
		defer close(reader)
		ready := make([]poller.Ready[*owner], 16)
		for {
			n, err := s.Wait(ready)
			if err != nil {
				if !errors.Is(err, os.ErrClosed) {
					t.Error(err)
				}
				return
			}
			for _, r := range ready[:n] {
				r.Value.mu.Lock()
				if r.Value.id != r.ID || !r.Value.written {
					t.Errorf("report of %#x went to the owner of %#x (written: %v)", r.ID, r.Value.id, r.Value.written)
				}
				r.Value.seen++
				r.Value.mu.Unlock()
			}
		}
	}()
	var workers sync.WaitGroup
	for worker := range 4 {
		workers.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 1))
			for range testenv.SoakN(3_000) {
				var p [2]int
				if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
					t.Error(err)
					return
				}
				o := &owner{}
				o.mu.Lock()
				id, err := s.Add(p[0], unix.EPOLLIN, o)
				if err != nil {
					t.Error(err)
					return
				}
				o.id = id
				wait := random.IntN(2) == 0
				if random.IntN(4) > 0 {
					o.written = true
					unix.Write(p[1], []byte("x"))
				} else {
					wait = false
				}
				o.mu.Unlock()
				for deadline := time.Now().Add(patience); wait; time.Sleep(10 * time.Microsecond) {
					o.mu.Lock()
					wait = o.seen == 0
					o.mu.Unlock()
					if wait && time.Now().After(deadline) {
						t.Error("a descriptor that is ready was not reported")
						return
					}
				}
				if err := s.Remove(id); err != nil {
					t.Error(err)
				}
				unix.Close(p[1])
			}
		})
	}
	workers.Wait()
	if n := s.Len(); n != 0 {
		t.Errorf("Len is %d at the end", n)
	}
	s.Close()
	<-reader
}
