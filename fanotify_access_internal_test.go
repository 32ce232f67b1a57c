package kernstream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// A fakeGroup notes the answers that are written, and counts the calls that
// write them.
type fakeGroup struct {
	mu      sync.Mutex
	calls   int
	answers map[int][]string // by descriptor
	refuse  error
}

func (g *fakeGroup) respond(fd int, r Response) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case fd > 1<<20:
		return unix.ENOENT
	case g.refuse != nil:
		return g.refuse
	}
	g.calls++
	g.note(fd, r)
	return nil
}

func (g *fakeGroup) respondAll(fds []int, r Response) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls++
	for _, fd := range fds {
		g.note(fd, r)
	}
}

func (g *fakeGroup) note(fd int, r Response) {
	if g.answers == nil {
		g.answers = map[int][]string{}
	}
	g.answers[fd] = append(g.answers[fd], r.String())
}

func (g *fakeGroup) got(fd int) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return fmt.Sprint(g.answers[fd])
}

// An accessLab is an access list without a kernel.
type accessLab struct {
	t     *testing.T
	group *fakeGroup
	list  *accessList
	c     chan *FileEvent
	end   func()
}

func newAccessLab(t *testing.T, options *FileOptions) *accessLab {
	t.Helper()
	options.Class = ClassPreContent
	l := &accessLab{t: t, group: &fakeGroup{}, c: make(chan *FileEvent)}
	list, err := newAccessList(l.group, 0, options)
	if err != nil {
		t.Fatal(err)
	}
	l.list = list
	ctx, cancel := context.WithCancel(t.Context())
	list.start(ctx, l.c)
	l.end = func() {
		cancel()
		list.stopped()
		list.end()
	}
	return l
}

// ask is what the reader does with an event that has the number fd, which is no
// descriptor here.
func (l *accessLab) ask(fd int) *FileEvent {
	l.t.Helper()
	e := &FileEvent{When: time.Now(), Path: fmt.Sprint("/", fd), own: &fileDescriptors{fd: fd, pidfd: -1}}
	if !l.list.hold() {
		l.t.Fatal("no room")
	}
	l.list.enter(e)
	return e
}

// answered returns why an event can have no answer any more.
func answered(e *FileEvent) error {
	e.own.mu.Lock()
	defer e.own.mu.Unlock()
	return e.own.asks.answered
}

// noDescriptors are numbers that nobody closes anything by.
const noDescriptors = 1 << 19

// TestAccessDeadlines: each event expires at its own deadline, to the
// nanosecond, whatever became of those before it.
func TestAccessDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: time.Second, MaxPending: 100, Default: Response{Errno: unix.EBUSY}})
		var events []*FileEvent
		for i := range 10 {
			e := l.ask(noDescriptors + i)
			events = append(events, e)
			go l.list.offer(e)
			if got := <-l.c; got != e {
				t.Fatalf("event %v", got)
			}
			if i%2 == 0 {
				if err := e.Allow(); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		// Now the first is one second old.
		for i, e := range events {
			want := "[allow]"
			if i%2 == 1 {
				want = "[]"
			}
			synctest.Wait()
			if got := l.group.got(e.own.fd); got != want {
				t.Errorf("event %d got %s at %v; want %s", i, got, time.Since(e.When), want)
			}
			time.Sleep(time.Until(e.When.Add(time.Second)))
			synctest.Wait()
			if i%2 == 1 {
				want = "[deny EBUSY]"
			}
			if got := l.group.got(e.own.fd); got != want {
				t.Errorf("event %d got %s at %v; want %s", i, got, time.Since(e.When), want)
			}
			if err := e.Allow(); i%2 == 1 && !errors.Is(err, os.ErrDeadlineExceeded) || i%2 == 0 && !errors.Is(err, unix.EALREADY) {
				t.Errorf("event %d: %v", i, err)
			}
			e.Close()
		}
		if n := l.list.defaulted.Load(); n != 5 || l.list.held != 0 {
			t.Errorf("%d default answers, %d held", n, l.list.held)
		}
		// The timer still runs for nobody, or does not; another event has its time.
		time.Sleep(10 * time.Second)
		e := l.ask(noDescriptors)
		time.Sleep(time.Second - time.Nanosecond)
		synctest.Wait()
		if got := answered(e); got != nil {
			t.Errorf("too early: %v", got)
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if got := answered(e); !errors.Is(got, os.ErrDeadlineExceeded) {
			t.Errorf("too late: %v", got)
		}
		l.list.offer(e) // its path was looked up meanwhile
		if l.list.queue.Len() != 0 || l.list.held != 0 {
			t.Error("an event that expired is in the queue")
		}
		l.end()
	})
}

// TestAccessAtOnce: what expires at the same time is answered by one call for
// each 1,024, and so is what is left at the end.
func TestAccessAtOnce(t *testing.T) {
	for _, end := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const n = 3 * answersAtOnce
			l := newAccessLab(t, &FileOptions{Deadline: time.Second, MaxPending: n})
			for i := range n {
				l.list.offer(l.ask(noDescriptors + i))
			}
			if l.list.hold() {
				t.Error("there is room for more than MaxPending")
			}
			if !end {
				time.Sleep(time.Second)
				synctest.Wait()
			}
			l.end()
			if l.group.calls != 3 || l.list.defaulted.Load() != n || l.list.held != 0 || l.list.queue.Len() != 0 || l.list.waiting.Len() != 0 {
				t.Errorf("%d calls, %d default answers, %d held", l.group.calls, l.list.defaulted.Load(), l.list.held)
			}
			for i := range n {
				if got := l.group.got(noDescriptors + i); got != "[deny]" {
					t.Fatalf("event %d got %s", i, got)
				}
			}
		})
	}
}

// TestAccessOrder: events come in the order in which they were read, whether a
// consumer waits or not, without those that expired.
func TestAccessOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: time.Second, MaxPending: 100})
		for i := range 10 { // these expire
			l.list.offer(l.ask(noDescriptors + i))
		}
		l.list.offer(&FileEvent{Path: "told"})
		time.Sleep(time.Second / 2)
		for i := range 10 {
			l.list.offer(l.ask(noDescriptors + 10 + i))
		}
		time.Sleep(time.Second / 2)
		synctest.Wait()
		var got []string
		for range 11 {
			e := <-l.c
			got = append(got, e.Path)
			e.Close()
		}
		var want []string
		for i := range 11 {
			want = append(want, fmt.Sprint("/", noDescriptors+9+i))
		}
		want[0] = "told"
		if !slices.Equal(got, want) {
			t.Errorf("got %q; want %q", got, want)
		}
		l.end()
	})
}

// TestAccessRefused: an answer that the kernel does not take is none: the event
// goes on waiting, and expires.
func TestAccessRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: time.Second, MaxPending: 1})
		e := l.ask(noDescriptors)
		go l.list.offer(e)
		<-l.c
		l.group.refuse = unix.EINVAL
		if err := e.Deny(unix.EIO); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%v", err)
		}
		l.group.refuse = nil
		if l.list.hold() {
			t.Error("there is room")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := l.group.got(noDescriptors); got != "[deny]" {
			t.Errorf("the answers were %s", got)
		}
		e.Close()
		l.end()
	})
}

// TestAccessDefaultRefused: a default answer that the kernel does not take is an
// error before anybody waits for it.
func TestAccessDefaultRefused(t *testing.T) {
	list, err := newAccessList(&pickyGroup{}, 0, &FileOptions{Class: ClassPreContent, Default: Response{Errno: unix.EIO}})
	if list != nil || !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v, %v", list, err)
	}
}

// A pickyGroup takes no answer.
type pickyGroup struct{ fakeGroup }

func (g *pickyGroup) respond(int, Response) error { return unix.EINVAL }
