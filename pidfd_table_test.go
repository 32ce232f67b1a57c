package kernstream

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/pidfd"
	"github.com/kernstream/kernstream/internal/testenv"
)

// The table of processes from inside: what cannot be brought about, or not
// seen, from outside.

// sleepingChild starts a child that ends with its input.
func sleepingChild(t *testing.T) (cmd *exec.Cmd, in io.Closer) {
	t.Helper()
	cmd = exec.Command("/bin/sh", "-c", "read x; exit 1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return cmd, in
}

func open(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestTableSameNumber: two processes that had the same number one after the
// other are two entries, and each is found by a pidfd of its own, whichever
// came first.
func TestTableSameNumber(t *testing.T) {
	testenv.NoLeaks(t)
	first, in := sleepingChild(t)
	second, _ := sleepingChild(t)
	table := newProcessTable()
	const number = 4711 // said of both
	enter := func(fd int) *process {
		t.Helper()
		p, err := table.enter(newOpenProcess(fd, number))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	table.mu.Lock() // keeps the goroutine from looking
	old, again, late := open(t, first.Process.Pid), open(t, first.Process.Pid), open(t, first.Process.Pid)
	a := enter(old)
	if b := enter(again); b != a {
		t.Error("one process has two entries")
	}
	if _, err := unix.FcntlInt(uintptr(again), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("a pidfd that is not needed was not closed: %v", err)
	}
	in.Close()
	first.Wait()
	b := enter(open(t, second.Process.Pid))
	if b == a {
		t.Error("two processes have one entry")
	}
	if c := enter(open(t, second.Process.Pid)); c != b {
		t.Error("the second process has two entries")
	}
	if pidfd.HasID() {
		if c := enter(late); c != a {
			t.Error("the first process is not found any more")
		}
	} else {
		unix.Close(late)
	}
	if table.n != 2 || table.set.Len() != 2 {
		t.Errorf("%d entries, %d descriptors; want 2", table.n, table.set.Len())
	}
	var d departures
	for _, p := range []*process{a, b} {
		table.settle(p, &d)
	}
	if d.set == nil || table.set != nil || table.entries != nil || table.n != 0 {
		t.Errorf("the Set is left: %+v", table.n)
	}
	table.mu.Unlock()
	table.depart(&d)
}

// enterMany calls use for n pidfds of a process, each of another one to the table,
// and returns them.
func enterMany(t *testing.T, pid, n int, use func(openProcess)) []int {
	t.Helper()
	fds := make([]int, n)
	for i := range fds {
		fds[i] = open(t, pid)
		use(openProcess{fd: fds[i], pid: i + 1, id: 1<<40 + uint64(i)})
	}
	return fds
}

// isOpen tells whether a descriptor is.
func isOpen(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	return err == nil
}

// TestInBatches: everything is done once, and done when inBatches returns.
func TestInBatches(t *testing.T) {
	for _, steps := range []int32{0, 1, 2, 30} {
		var begun, running, ended atomic.Int32
		inBatches(func() bool {
			n := begun.Add(1)
			if n > steps {
				return false
			}
			running.Add(1)
			time.Sleep(time.Duration(n%3) * time.Millisecond)
			ended.Add(1)
			running.Add(-1)
			return true
		})
		if running.Load() != 0 || ended.Load() != steps {
			t.Errorf("%d of %d steps were done, %d go on", ended.Load(), steps, running.Load())
		}
	}
}

// TestTableClosesMany: of the watches of many processes, which several
// goroutines end together, neither descriptors nor a Set are left when close
// returns.
func TestTableClosesMany(t *testing.T) {
	testenv.NoLeaks(t)
	child, _ := sleepingChild(t)
	for range testenv.SoakN(10) {
		table := newProcessTable()
		feed := &processFeed{table: table, wake: make(chan struct{}, 1)}
		fds := enterMany(t, child.Process.Pid, 5*batch/2, func(o openProcess) {
			w, h := newWatch(feed, nil), &Process{feed: feed}
			err := feed.enter(PID(o.pid), o, func(p *process, d *departures) {
				if o.pid%4 > 0 {
					feed.add(w, p, d)
					return
				}
				h.process = p
				p.handles++
				feed.handles.add(h)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
		if table.n != len(fds) {
			t.Fatalf("%d entries; want %d", table.n, len(fds))
		}
		done := table.loopDone
		feed.close(false)
		if i := slices.IndexFunc(fds, isOpen); i >= 0 {
			t.Fatalf("descriptor %d is open", fds[i])
		}
		select {
		case <-done:
		default:
			t.Fatal("the goroutine is there")
		}
		if table.set != nil || table.n != 0 || feed.watches.first != nil || len(feed.handles) != 0 {
			t.Fatalf("%d entries and %d handles are left", table.n, len(feed.handles))
		}
	}
}

// TestTableCancelsMany: the same for streams with one context. What a stream held
// is gone when its channel is closed, whichever goroutine does that.
func TestTableCancelsMany(t *testing.T) {
	testenv.NoLeaks(t)
	child, _ := sleepingChild(t)
	for i := range testenv.SoakN(10) {
		n := batch - 1 // one goroutine ends them, and this one can look on
		if i%2 == 0 {
			n = 5 * batch / 2
		}
		table := newProcessTable()
		ctx, cancel := context.WithCancel(t.Context())
		var streams []*processStream
		fds := enterMany(t, child.Process.Pid, n, func(o openProcess) {
			s := newProcessStream(nil)
			if err := table.addStream(ctx, s, PID(o.pid), o); err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		})
		cancel()
		for i, s := range streams {
			if e, ok := <-s.C; ok {
				t.Fatalf("an event: %v", e)
			}
			if isOpen(fds[i]) {
				t.Fatalf("descriptor %d of a stream that is closed is open", fds[i])
			}
			if s.Err() != context.Canceled || !s.end.left() {
				t.Fatalf("Err is %v", s.Err())
			}
		}
	}
}

// TestTableFails: an error of the Set ends every stream with it, and leaves
// nothing. The next watch has a Set again.
func TestTableFails(t *testing.T) {
	testenv.NoLeaks(t)
	child, in := sleepingChild(t)
	w, err := NewProcessWatcher(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	target := PID(child.Process.Pid)
	for range 3 {
		if _, err := w.Watch(target, nil); err != nil {
			t.Fatal(err)
		}
	}
	held, err := w.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	self, err := WatchProcess(t.Context(), PID(os.Getpid()), nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := WatchProcess(context.Background(), target, nil)
	if err != nil {
		t.Fatal(err)
	}
	fault := processError("epoll_wait", "", os.NewSyscallError("epoll_wait", unix.EIO))
	var d departures
	processes.mu.Lock()
	processes.fail(fault, &d)
	processes.mu.Unlock()
	processes.depart(&d)
	for _, s := range []*Stream[*ProcessEvent]{w.Stream, s, self} {
		if e, ok := <-s.C; ok || s.Err() != fault || !errors.Is(s.Err(), unix.EIO) {
			t.Errorf("event %v, Err %v; want the end, and the fault", e, s.Err())
		}
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
	if processes.set != nil || processes.n != 0 || len(processes.contexts) != 0 {
		t.Errorf("there are %d entries and %d contexts", processes.n, len(processes.contexts))
	}
	s, err = WatchProcess(t.Context(), target, nil)
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if e, ok := <-s.C; !ok || e.Status.ExitStatus() != 1 {
		t.Errorf("event %v, Err %v", e, s.Err())
	}
	<-s.C
}

// TestTableContextOfItsOwnType: a context may be of any type, and may end while
// the table takes hold of it.
func TestTableContextOfItsOwnType(t *testing.T) {
	testenv.NoLeaks(t)
	child, _ := sleepingChild(t)
	for range testenv.SoakN(200) {
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		s, err := WatchProcess(oddContext{ctx, []int{1}}, PID(child.Process.Pid), nil)
		if err != nil {
			if err != context.Canceled {
				t.Fatal(err)
			}
			continue
		}
		if e, ok := <-s.C; ok || s.Err() != context.Canceled {
			t.Fatalf("event %v, Err %v", e, s.Err())
		}
	}
	processes.mu.Lock()
	defer processes.mu.Unlock()
	if len(processes.contexts) != 0 {
		t.Errorf("%d contexts are held", len(processes.contexts))
	}
}

// oddContext cannot be compared.
type oddContext struct {
	context.Context
	list []int
}

// TestTableHoldsAContextOnce: streams with the same context have one hold on it,
// which ends with the last of them.
func TestTableHoldsAContextOnce(t *testing.T) {
	testenv.NoLeaks(t)
	child, _ := sleepingChild(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var streams []*Stream[*ProcessEvent]
	holds := func() int {
		processes.mu.Lock()
		defer processes.mu.Unlock()
		return len(processes.contexts)
	}
	for range 10 {
		s, err := WatchProcess(context.WithValue(ctx, new(oddContext), 1), PID(child.Process.Pid), nil)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	if n := holds(); n != 1 {
		t.Errorf("%d contexts are held; want 1", n)
	}
	for _, s := range streams {
		s.Close()
	}
	if n := holds(); n != 0 {
		t.Errorf("%d contexts are held; want none", n)
	}
}

// releasedContext counts who holds it.
type releasedContext struct {
	context.Context
	mu    sync.Mutex
	holds int
}

// Value keeps package context from finding the one inside.
func (c *releasedContext) Value(any) any { return nil }

// AfterFunc is what context.AfterFunc calls.
func (c *releasedContext) AfterFunc(f func()) (stop func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.holds++
	inner := context.AfterFunc(c.Context, f)
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.holds--
		return inner()
	}
}

// TestTableLetsGoOfContexts: a stream that has ended has no hold on its context,
// and its goroutine has ended when C is closed.
func TestTableLetsGoOfContexts(t *testing.T) {
	testenv.NoLeaks(t)
	child, in := sleepingChild(t)
	parent, cancel := context.WithCancel(t.Context())
	defer cancel()
	ctx := &releasedContext{Context: parent}
	closed, err := WatchProcess(ctx, PID(child.Process.Pid), nil)
	if err != nil {
		t.Fatal(err)
	}
	processes.mu.Lock()
	loopDone := processes.loopDone
	processes.mu.Unlock()
	if ctx.holds != 1 {
		t.Errorf("%d holds", ctx.holds)
	}
	closed.Close()
	select {
	case <-loopDone:
	default:
		t.Error("the goroutine runs after Close")
	}
	if ctx.holds != 0 {
		t.Errorf("%d holds after Close", ctx.holds)
	}
	ended, err := WatchProcess(ctx, PID(child.Process.Pid), nil)
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	<-ended.C
	if _, ok := <-ended.C; ok || ctx.holds != 0 {
		t.Errorf("%d holds after the end", ctx.holds)
	}

	// What is known already ends a stream before it has a hold on its context.
	w, err := NewProcessWatcher(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for range 2 { // the second comes when the end is known
		p, err := w.Open(PID(child.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		p.Watch(nil)
		<-w.C
	}
	late, err := WatchProcess(ctx, PID(child.Process.Pid), nil)
	if err != nil {
		t.Fatal(err)
	}
	<-late.C
	if _, ok := <-late.C; ok || ctx.holds != 0 {
		t.Errorf("%d holds after an end that was known", ctx.holds)
	}
}

// waits tells whether w has an event that waits for the consumer.
func waits(w *Watch) bool { return w.queued > w.told }

// TestFeedKeepsTheOrder: a watch does not go before those that wait already,
// however ready the consumer is.
func TestFeedKeepsTheOrder(t *testing.T) {
	c := make(chan *ProcessEvent, 8)
	feed := &processFeed{table: newProcessTable(), wake: make(chan struct{}, 1), c: c}
	p := &process{fd: -1, known: 1, end: &processEnd{}}
	ready := func() *Watch {
		w := newWatch(feed, nil)
		w.process = p
		feed.watches.push(w, ofOwner)
		feed.queue(w)
		return w
	}
	if w := ready(); len(c) != 1 || !w.ended || waits(w) {
		t.Errorf("%d events were sent to a consumer that waits", len(c))
	}
	feed.c = nil // the consumer is busy
	first := ready()
	feed.c = c
	second := ready()
	if len(c) != 1 || !waits(first) || !waits(second) {
		t.Errorf("%d events; the second watch went before the first", len(c))
	}
	if _, err := feed.next(false); err != nil || feed.offered != first {
		t.Error("the first does not come first")
	}
	feed.stop(second)
	feed.unqueue(first) // it is on offer alone
	if third := ready(); len(c) != 1 || !waits(third) {
		t.Errorf("%d events; the third watch went before the one on offer", len(c))
	}
}

// TestLimits: an error that something has run out says what the limit is.
func TestLimits(t *testing.T) {
	for errno, text := range map[unix.Errno]string{
		unix.EMFILE: "RLIMIT_NOFILE is ", unix.ENFILE: "/proc/sys/fs/file-max is ", unix.ENOSPC: "/proc/sys/fs/epoll/max_user_watches is ",
	} {
		err := withLimit(os.NewSyscallError("pidfd_open", errno))
		if !errors.Is(err, errno) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v: want %q", err, text)
		}
	}
	if err := withLimit(unix.EIO); err != unix.EIO {
		t.Error(err)
	}
	if text := sysctl("not/there"); text != "" {
		t.Error(text)
	}
}

// TestProcessIDText: an ID survives being saved, and what is not one is an
// error that says so.
func TestProcessIDText(t *testing.T) {
	for _, id := range []ProcessID{{}, {PID: 1, ID: 1<<64 - 1, Boot: "9b2c-x"}, {PID: 1<<31 - 1, ID: 7}} {
		text, err := id.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back ProcessID
		if err := back.UnmarshalText(text); err != nil || back != id {
			t.Errorf("%s: %+v, %v; want %+v", text, back, err, id)
		}
		object, err := json.Marshal(map[ProcessID]ProcessID{id: id})
		var mapped map[ProcessID]ProcessID
		if err2 := json.Unmarshal(object, &mapped); err != nil || err2 != nil || mapped[id] != id {
			t.Errorf("%s: %v, %v", object, err, err2)
		}
	}
	for _, text := range []string{"", "1", "1:2", "x:2:b", "1:x:b", "-1:2:b", "1:-2:b", "2147483648:1:b", "1:18446744073709551616:b", "1:2:b:c", "1:2:b c"} {
		id := ProcessID{PID: 5}
		if err := id.UnmarshalText([]byte(text)); err == nil || id != (ProcessID{PID: 5}) || !strings.Contains(err.Error(), "PID:ID:BOOT") {
			t.Errorf("%q: %+v, %v; want an error", text, id, err)
		}
	}
}

// FuzzProcessID: what is read is written as it was, but for leading zeros.
func FuzzProcessID(f *testing.F) {
	f.Add([]byte("4711:171697:9b2c4d1e-0000-4000-8000-000000000000"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var id, back ProcessID
		if id.UnmarshalText(text) != nil {
			return
		}
		again, _ := id.MarshalText()
		if err := back.UnmarshalText(again); err != nil || back != id {
			t.Errorf("%q became %q: %v", text, again, err)
		}
	})
}

// TestProcessEventText: an event in one line.
func TestProcessEventText(t *testing.T) {
	id := ProcessID{PID: 4711}
	for want, e := range map[string]*ProcessEvent{
		"process 4711: exited, status 0":                        {StatusKnown: true},
		"process 4711: exited, status 3":                        {StatusKnown: true, Status: 3 << 8},
		"process 4711: exited, killed by SIGKILL":               {StatusKnown: true, Status: syscall.WaitStatus(unix.SIGKILL)},
		"process 4711: exited, killed by SIGSEGV (core dumped)": {StatusKnown: true, Status: syscall.WaitStatus(unix.SIGSEGV) | 0x80},
		"process 4711: exited, killed by signal 40":             {StatusKnown: true, Status: 40},
		"process 4711: reaped, status unknown":                  {Phase: Reaped, Status: 9},
		"process 4711: unknown, status unknown":                 {Phase: 7},
	} {
		e.Process = id
		e.When = time.Now()
		if got := e.String(); got != want || e.Time() != e.When {
			t.Errorf("%q; want %q", got, want)
		}
	}
}

// TestMayKnow: who may know the status of a zombie is told in its last steps, too.
// (Of another user's it is unknown: TestProcessZombieAsAnotherUser.)
func TestMayKnow(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "exit 0")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	zombie, ok := readStat(cmd.Process.Pid)
	for begin := time.Now(); zombie.State != 'Z'; time.Sleep(time.Millisecond) {
		if !ok || time.Since(begin) > testenv.Patience {
			t.Fatalf("it does not end: %+v", zombie)
		}
		zombie, ok = readStat(cmd.Process.Pid)
	}
	if !mayKnow(cmd.Process.Pid, zombie) {
		t.Error("a child's status is unknown")
	}
	for what, pid := range map[string]int{"a process that runs": os.Getpid(), "none": 1 << 30} {
		if mayKnow(pid, zombie) {
			t.Errorf("%s is taken for a zombie", what)
		}
	}
}
