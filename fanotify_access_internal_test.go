package kernstream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
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
	if len(fds) == 0 {
		return
	}
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

// TestAccessAfterEnd: what is read while the stream ends has its answer at once:
// other readers may be held up, and nobody waits for these.
func TestAccessAfterEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: NoDeadline, MaxPending: 10})
		before := l.ask(noDescriptors)
		l.end()
		l.list.offer(before) // its path was looked up meanwhile
		l.list.offer(l.ask(noDescriptors + 1))
		for i := range 2 {
			if got := l.group.got(noDescriptors + i); got != "[deny]" {
				t.Errorf("event %d got %s", i, got)
			}
		}
		if n := l.list.defaulted.Load(); n != 2 || l.list.held != 0 || l.list.queue.Len() != 0 {
			t.Errorf("%d default answers, %d held", n, l.list.held)
		}
	})
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

// begin lets n events wait, of which the consumer has all.
func (l *accessLab) begin(n int) []*FileEvent {
	l.t.Helper()
	events := make([]*FileEvent, n)
	for i := range events {
		events[i] = l.ask(noDescriptors + i)
		go l.list.offer(events[i])
		if got := <-l.c; got != events[i] {
			l.t.Fatalf("event %v", got)
		}
	}
	return events
}

// TestAccessCollected: what is allowed while others wait is written by a goroutine,
// with all that is allowed meanwhile; what is denied is written at once, and so is
// the answer to the only one who waits.
func TestAccessCollected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: time.Minute, MaxPending: 10})
		events := l.begin(5)
		if err := events[0].Deny(0); err != nil || l.group.got(noDescriptors) != "[deny]" {
			t.Errorf("a denial is not written at once: %v, %s", err, l.group.got(noDescriptors))
		}
		before := l.group.calls
		l.group.mu.Lock() // the goroutine does not get on
		for _, e := range events[1:3] {
			if err := e.Allow(); err != nil {
				t.Fatal(err)
			}
			if err := e.Deny(0); !errors.Is(err, unix.EALREADY) {
				t.Errorf("a second answer: %v", err)
			}
		}
		if l.list.held != 2 {
			t.Errorf("%d are held", l.list.held)
		}
		l.group.mu.Unlock()
		synctest.Wait()
		for i := range 2 {
			if got := l.group.got(noDescriptors + 1 + i); got != "[allow]" {
				t.Errorf("event %d got %s", 1+i, got)
			}
		}
		if n := l.group.calls - before; n < 1 || n > 2 {
			t.Errorf("%d calls", n)
		}
		l.list.mu.Lock()
		left := l.list.writing
		l.list.mu.Unlock()
		if left {
			t.Error("somebody writes who has nothing to write")
		}
		if err := events[3].Allow(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		before = l.group.calls
		if err := events[4].Allow(); err != nil || l.group.calls != before+1 {
			t.Errorf("the answer to the last is not written at once: %v", err)
		}
		for _, e := range events {
			e.Close()
		}
		l.end()
		if n := l.list.defaulted.Load(); n != 0 || l.list.held != 0 {
			t.Errorf("%d default answers, %d held", n, l.list.held)
		}
	})
}

// TestAccessCloseBeforeWritten: the descriptor of an event that is closed is open
// until its answer is written: the kernel knows the event by it. The end of the
// stream waits for that.
func TestAccessCloseBeforeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAccessLab(t, &FileOptions{Deadline: time.Minute, MaxPending: 10})
		events := l.begin(2)
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		events[0].own.fd, events[0].own.asks.fd = fd, fd
		open := func() bool {
			_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			return err == nil
		}
		l.group.mu.Lock()
		if err := errors.Join(events[0].Allow(), events[0].Close(), events[0].Close()); err != nil {
			t.Fatal(err)
		}
		if got := events[0].FD(); got != -1 || !open() {
			t.Errorf("after Close, before the answer: FD is %d, open is %v", got, open())
		}
		l.group.mu.Unlock()
		l.end()
		l.list.closer.running.Wait()
		if got := l.group.got(fd); got != "[allow]" || open() {
			t.Errorf("at the end: %s, open is %v", got, open())
		}
		if err := events[1].Allow(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
		events[1].Close()
	})
}

// TestAccessSettled: the answers that the consumer is not asked for are written by
// one call when that is asked for, and when there are as many as may be.
func TestAccessSettled(t *testing.T) {
	group := &fakeGroup{}
	list, err := newAccessList(group, 0, &FileOptions{Class: ClassContent})
	if err != nil {
		t.Fatal(err)
	}
	settle := func(i int) {
		metadata := make([]byte, 24)
		binary.NativeEndian.PutUint32(metadata, 24)
		metadata[4], metadata[6] = 3, 24
		binary.NativeEndian.PutUint64(metadata[8:], unix.FAN_OPEN_PERM)
		binary.NativeEndian.PutUint32(metadata[16:], uint32(noDescriptors+i))
		raw, _, err := fanotify.Next(metadata)
		if err != nil {
			t.Fatal(err)
		}
		list.settle(raw, i%2 == 0)
	}
	for i := range list.together {
		if group.calls != 0 {
			t.Fatalf("%d calls after %d", group.calls, i)
		}
		settle(i)
	}
	settle(list.together)
	if group.calls != 2 { // for each of the answers
		t.Errorf("%d calls", group.calls)
	}
	list.writeCollected()
	for i := range list.together + 1 {
		if got, want := group.got(noDescriptors+i), []string{"[allow]", "[deny]"}[i%2]; got != want {
			t.Fatalf("event %d got %s", i, got)
		}
	}
	if n := list.defaulted.Load(); n != uint64(list.together+1)/2 {
		t.Errorf("%d default answers", n)
	}
}
