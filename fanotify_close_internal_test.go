package kernstream

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A fakeFiles notes which descriptors are closed. Those of a file system that
// hangs are not before it is through.
type fakeFiles struct {
	mu      sync.Mutex
	closed  map[int]bool
	through chan struct{}
	hangs   func(fd int) bool
}

func newFakeFiles(hangs func(fd int) bool) *fakeFiles {
	return &fakeFiles{closed: map[int]bool{}, through: make(chan struct{}), hangs: hangs}
}

func (f *fakeFiles) close(fd int) error {
	if f.hangs(fd) {
		<-f.through
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed[fd] = true
	return nil
}

func (f *fakeFiles) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.closed)
}

// TestCloserHeldUp: a descriptor whose close takes long holds up the others for as
// long as another goroutine needs to see that, and no more of them than the limit.
func TestCloserHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := newFakeFiles(func(fd int) bool { return fd%10 == 0 })
		c := &fileCloser{closeOne: files.close, takesLong: time.Second, atOnce: 4}
		var all []int
		for fd := range 30 { // three hang
			all = append(all, fd)
		}
		c.close(all...)
		synctest.Wait()
		if n := files.count(); n != 9 {
			t.Errorf("%d closed before one is held up; want 9", n)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if n := files.count(); n != 27 {
			t.Errorf("%d closed beside three that hang; want 27", n)
		}
		time.Sleep(time.Minute)
		c.close(31) // nobody closes at this moment but who is held up
		synctest.Wait()
		if n := files.count(); n != 28 {
			t.Errorf("%d closed; want 28", n)
		}
		c.close(32, 40) // the last one hangs, and is taken first
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := files.count(); n != 28 || c.n != 4 {
			t.Errorf("%d closed by %d goroutines, all held up; want 28 by 4", n, c.n)
		}
		close(files.through)
		c.running.Wait()
		if n := files.count(); n != 33 || c.n != 0 || c.busy || len(c.fds) != 0 {
			t.Errorf("%d closed at the end, %d goroutines, %d left; want 33", n, c.n, len(c.fds))
		}
	})
}

// TestAccessCloseHeldUp: who writes answers does not wait for a close: neither the
// goroutine that writes what was allowed, nor the one that knows the deadlines, nor
// the end.
func TestAccessCloseHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: time.Minute, MaxPending: 10})
		files := newFakeFiles(func(int) bool { return true })
		l.list.closer.closeOne = files.close
		events := l.begin(4)
		l.group.mu.Lock()
		if err := errors.Join(events[0].Allow(), events[0].Close()); err != nil {
			t.Fatal(err)
		}
		l.group.mu.Unlock()
		synctest.Wait()
		if err := events[1].Allow(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i := range 2 {
			if got := l.group.got(noDescriptors + i); got != "[allow]" {
				t.Errorf("event %d got %s", i, got)
			}
		}
		l.list.offer(l.ask(noDescriptors + 4))
		time.Sleep(time.Minute)
		l.list.offer(l.ask(noDescriptors + 5))
		time.Sleep(time.Minute)
		synctest.Wait()
		for i := range 4 {
			if got := l.group.got(noDescriptors + 2 + i); got != "[deny]" {
				t.Errorf("event %d got %s", 2+i, got)
			}
		}
		l.list.offer(l.ask(noDescriptors + 6))
		l.end()
		if got := l.group.got(noDescriptors + 6); got != "[deny]" {
			t.Errorf("at the end: %s", got)
		}
		if n := files.count(); n != 0 {
			t.Errorf("%d closed", n)
		}
		close(files.through)
		l.list.closer.running.Wait()
		if n := files.count(); n != 4 {
			t.Errorf("%d closed; want 4", n)
		}
		for _, e := range events[1:] {
			e.Close()
		}
	})
}
