package kernstream_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// The rows of table P: what a program sees that comes from ChildPidWatcher.

// TestParityP1Pin: a process is pinned while it runs or as a zombie. It can be
// watched at any time after that, also when it was reaped, and then its end is
// told at once. It can be named by its os.Process, a pidfd, or a saved ID.
func TestParityP1Pin(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	for _, zombie := range []bool{false, true} {
		for _, kind := range []string{"PID", "OfProcess", "PidFD", "Saved"} {
			v := newVictim(t, "exit 7")
			target := targetOf(t, kind, v)
			if zombie {
				v.zombie(t)
			}
			p, err := w.Open(target)
			if err != nil {
				t.Fatalf("%s, zombie: %v: %v", kind, zombie, err)
			}
			if id := p.ID(); id.PID != v.pid() || id.ID == 0 || id.Boot == "" {
				t.Errorf("%s: the ID is %+v", kind, id)
			}
			v.end()
			first, err := p.Watch(nil)
			if err != nil {
				t.Fatal(err)
			}
			e := next(t, w.C)
			want(t, e, v.pid(), kernstream.Exited, exit(7))
			if e.Watch != first || e.Process != p.ID() || first.ID() != p.ID() {
				t.Errorf("event %+v is of %+v", e, p.ID())
			}
			v.reap()
			for range 2 {
				late, err := p.Watch(&kernstream.ProcessOptions{Tag: "late"})
				if err != nil {
					t.Fatal(err)
				}
				e := next(t, w.C)
				want(t, e, v.pid(), kernstream.Exited, exit(7))
				if e.Watch != late || e.Tag != "late" {
					t.Errorf("event %+v is not of the late watch", e)
				}
			}
			if reapingTold() {
				if _, err := p.Watch(untilReaped); err != nil {
					t.Fatal(err)
				}
				want(t, next(t, w.C), v.pid(), kernstream.Exited, exit(7))
				want(t, next(t, w.C), v.pid(), kernstream.Reaped, exit(7))
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	none(t, w.C)
}

// targetOf names a victim in one of the ways that there are.
func targetOf(t testing.TB, kind string, v *victim) kernstream.Target {
	t.Helper()
	switch kind {
	case "PID":
		return kernstream.PID(v.pid())
	case "OfProcess":
		return kernstream.OfProcess(v.Process)
	case "PidFD":
		return kernstream.PidFD(pidfdFile(t, v.pid(), 0))
	case "Saved":
		return kernstream.Saved(idOf(t, v.pid()))
	}
	t.Fatalf("no target is called %q", kind)
	return nil
}

// idOf returns the ID of a process that is there.
func idOf(t testing.TB, pid int) kernstream.ProcessID {
	t.Helper()
	w := newProcessWatcher(t)
	defer w.Close()
	return watch(t, w, kernstream.PID(pid), nil).ID()
}

// TestParityP2FourTests: what the tests of ChildPidWatcher say. A watch that
// begins before the exit tells it; so does one that begins after; so do several;
// one that was stopped does not, and the others do. After the event, the child
// can be waited for, and has its status.
func TestParityP2FourTests(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	reapable := func(v *victim) {
		t.Helper()
		var status unix.WaitStatus
		pid, err := unix.Wait4(v.pid(), &status, unix.WNOHANG, nil)
		if pid != v.pid() || err != nil || status.ExitStatus() != 42 {
			t.Errorf("wait4 returned %d, %v, status %#x; want the child and 42", pid, err, status)
		}
		v.waited = true
		v.Process.Release()
	}
	t.Run("before", func(t *testing.T) {
		v := newVictim(t, "exit 42")
		watch(t, w, kernstream.PID(v.pid()), nil)
		none(t, w.C)
		v.end()
		want(t, next(t, w.C), v.pid(), kernstream.Exited, exit(42))
		reapable(v)
	})
	t.Run("after", func(t *testing.T) {
		v := newVictim(t, "exit 42")
		v.zombie(t)
		watch(t, w, kernstream.PID(v.pid()), nil)
		want(t, next(t, w.C), v.pid(), kernstream.Exited, exit(42))
		reapable(v)
	})
	t.Run("several", func(t *testing.T) {
		v := newVictim(t, "exit 42")
		seen := map[*kernstream.Watch]bool{}
		for range 3 {
			seen[watch(t, w, kernstream.PID(v.pid()), nil)] = false
		}
		v.end()
		for range 3 {
			e := next(t, w.C)
			want(t, e, v.pid(), kernstream.Exited, exit(42))
			if told, known := seen[e.Watch]; told || !known {
				t.Errorf("event %v is of %p (told already: %v)", e, e.Watch, told)
			}
			seen[e.Watch] = true
		}
		reapable(v)
	})
	t.Run("one stopped", func(t *testing.T) {
		v := newVictim(t, "exit 42")
		stopped := watch(t, w, kernstream.PID(v.pid()), nil)
		other := watch(t, w, kernstream.PID(v.pid()), nil)
		if stopped.Stop() {
			t.Error("Stop says that the event had been received")
		}
		v.end()
		if e := next(t, w.C); e.Watch != other {
			t.Errorf("event %v is of %p; want %p", e, e.Watch, other)
		}
		reapable(v)
	})
	none(t, w.C)
}

// TestParityP3ManyWatches: many watches of one process, by a watcher and by
// streams of their own, are each told exactly once. They share one descriptor,
// and one that does not receive holds up no other.
func TestParityP3ManyWatches(t *testing.T) {
	testenv.NoLeaks(t)
	const n = 1000
	v := newVictim(t, "exit 3")
	asleep := newProcessWatcher(t) // nobody receives from it
	watch(t, asleep, kernstream.PID(v.pid()), nil)
	w := newProcessWatcher(t)
	before := countDescriptors(t)
	waiting := map[*kernstream.Watch]bool{}
	var streams []*kernstream.Stream[*kernstream.ProcessEvent]
	for range n {
		waiting[watch(t, w, kernstream.PID(v.pid()), nil)] = true
		streams = append(streams, watchProcess(t, t.Context(), kernstream.OfProcess(v.Process), nil))
	}
	if after := countDescriptors(t); after != before {
		t.Errorf("%d descriptors with %d more watches; want %d as before", after, 2*n, before)
	}
	v.end()
	for range n {
		e := next(t, w.C)
		want(t, e, v.pid(), kernstream.Exited, exit(3))
		if !waiting[e.Watch] {
			t.Fatalf("watch %p was told twice, or was not of this watcher", e.Watch)
		}
		delete(waiting, e.Watch)
	}
	none(t, w.C)
	for _, s := range streams {
		want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(3))
		if err := over(t, s); err != nil {
			t.Errorf("Err is %v after the end of the process", err)
		}
	}
}

// TestParityP4CloseLeavesWatches: letting go of a process may be done again, and
// its watches go on.
func TestParityP4CloseLeavesWatches(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	v := newVictim(t, "exit 5")
	p, err := w.Open(kernstream.PID(v.pid()))
	if err != nil {
		t.Fatal(err)
	}
	watched, err := p.Watch(nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Watch(nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Watch of a Process that was closed returned %v; want os.ErrClosed", err)
	}
	v.end()
	if e := next(t, w.C); e.Watch != watched {
		t.Errorf("event %v is of %p; want %p", e, e.Watch, watched)
	}
	if id := p.ID(); id.PID != v.pid() {
		t.Errorf("ID is %+v after Close", id)
	}

	// Closing one twice does not let go of another.
	v = newVictim(t, "exit 5")
	var both []*kernstream.Process
	for range 2 {
		p, err := w.Open(kernstream.PID(v.pid()))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, p)
	}
	both[0].Close()
	both[0].Close()
	v.zombie(t)
	time.Sleep(20 * time.Millisecond)
	v.reap()
	if _, err := both[1].Watch(nil); err != nil {
		t.Fatal(err)
	}
	want(t, next(t, w.C), v.pid(), kernstream.Exited, exit(5))
}

// TestProcessIDAfterwards: the ID is there when the watch is over, although
// nobody asked before.
func TestProcessIDAfterwards(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	v := newVictim(t, "exit 0")
	id := idOf(t, v.pid())
	stopped := watch(t, w, kernstream.PID(v.pid()), nil)
	stopped.Stop()
	closed, err := w.Open(kernstream.PID(v.pid()))
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	ended := watch(t, w, kernstream.PID(v.pid()), nil)
	w.Close()
	for _, got := range []kernstream.ProcessID{stopped.ID(), closed.ID(), ended.ID()} {
		if got != id || id.ID == 0 {
			t.Errorf("ID is %+v; want %+v", got, id)
		}
	}
}

// TestParityP5Stop: when Stop has returned, nothing of the watch is delivered,
// and Stop says whether it had been. Whatever comes together (the exit, Stop from
// two sides, the consumer), each watch is either told or stopped.
func TestParityP5Stop(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	var mu sync.Mutex
	stopped := map[*kernstream.Watch]bool{} // Stop has returned false
	received := map[*kernstream.Watch]bool{}
	var consumer sync.WaitGroup
	consumer.Go(func() {
		for e := range w.C {
			mu.Lock()
			if stopped[e.Watch] || received[e.Watch] {
				t.Errorf("event %v after Stop had returned (%v), or twice (%v)", e, stopped[e.Watch], received[e.Watch])
			}
			received[e.Watch] = true
			mu.Unlock()
		}
	})
	var everyone []*kernstream.Watch
	for range testenv.SoakN(100) {
		v := newVictim(t, "exit 1")
		var stoppers sync.WaitGroup
		var all []*kernstream.Watch
		for range 8 {
			one := watch(t, w, kernstream.PID(v.pid()), nil)
			all = append(all, one)
			for range 2 {
				stoppers.Go(func() {
					if !one.Stop() {
						mu.Lock()
						stopped[one] = true
						mu.Unlock()
					}
				})
			}
		}
		v.end()
		stoppers.Wait()
		for _, one := range all {
			was := one.Stop()
			mu.Lock()
			// The consumer may not have noted yet what it has received.
			if !was && received[one] {
				t.Error("Stop says that the event was not received, which it was")
			}
			mu.Unlock()
		}
		v.reap()
		everyone = append(everyone, all...)
	}
	w.Close()
	consumer.Wait()
	for _, one := range everyone {
		if told := one.Stop(); told != received[one] || told == stopped[one] {
			t.Errorf("Stop returned %v; received: %v, stopped: %v", told, received[one], stopped[one])
		}
	}
}

// TestStopWithdrawsTheOffer: an event that is on offer when Stop is called is
// withdrawn, and the next one takes its place, by the consumer itself too.
func TestStopWithdrawsTheOffer(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	v := newVictim(t, "exit 1")
	first := watch(t, w, kernstream.PID(v.pid()), nil)
	second := watch(t, w, kernstream.PID(v.pid()), nil)
	third := watch(t, w, kernstream.PID(v.pid()), nil)
	v.zombie(t)
	time.Sleep(10 * time.Millisecond) // the first event is on offer
	for range 2 {
		if first.Stop() {
			t.Error("Stop says that the event was received")
		}
	}
	if e := next(t, w.C); e.Watch != second {
		t.Errorf("event of %p; want the second watch", e.Watch)
	}
	if !second.Stop() {
		t.Error("Stop says that the event was not received")
	}
	if third.Stop() {
		t.Error("Stop says that the event was received")
	}
	none(t, w.C)
}

// TestParityP6NeverReaps: a child stays a zombie, for its parent to wait for.
// What is told of its status is what the parent gets.
func TestParityP6NeverReaps(t *testing.T) {
	testenv.NoLeaks(t)
	for _, script := range []string{"exit 0", "exit 1", "exit 255", "kill -KILL $$", "kill -TERM $$"} {
		v := newVictim(t, script)
		s := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
		v.end()
		e := next(t, s.C)
		if err := over(t, s); err != nil {
			t.Error(err)
		}
		waitForZombie(t, v.pid()) // it still is one
		if status := v.reap(); !e.StatusKnown || e.Status != status {
			t.Errorf("%s: event %v has status %#x, known: %v; want %#x", script, e, e.Status, e.StatusKnown, status)
		}
	}
}

// TestParityP7Start: a command is started and watched in one step. Its
// attributes, and a place that the caller has for a pidfd, are as they were.
func TestParityP7Start(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	cmd := exec.Command("/bin/sh", "-c", "exit 9")
	started, err := w.Start(cmd, &kernstream.ProcessOptions{Tag: cmd})
	if err != nil {
		t.Fatal(err)
	}
	e := next(t, w.C)
	want(t, e, cmd.Process.Pid, kernstream.Exited, exit(9))
	if e.Watch != started || e.Tag != cmd || cmd.SysProcAttr != nil {
		t.Errorf("event %+v of %p; the attributes are %+v", e, started, cmd.SysProcAttr)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 9 {
		t.Errorf("Wait returned %v; want status 9", err)
	}

	fd := -1
	attributes := &syscall.SysProcAttr{PidFD: &fd, Setpgid: true}
	cmd = exec.Command("/bin/sh", "-c", "exit 8")
	cmd.SysProcAttr = attributes
	if _, err := w.Start(cmd, nil); err != nil {
		t.Fatal(err)
	}
	want(t, next(t, w.C), cmd.Process.Pid, kernstream.Exited, exit(8))
	if cmd.SysProcAttr != attributes || attributes.PidFD != &fd || fd < 0 {
		t.Errorf("the attributes are %+v, with pidfd %d", cmd.SysProcAttr, fd)
	}
	if err := unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED, nil); err != nil {
		t.Errorf("waitid on the caller's pidfd: %v", err)
	}
	unix.Close(fd)
	cmd.Process.Release()

	cmd = exec.Command("/nowhere/at/all")
	if _, err := w.Start(cmd, nil); !errors.Is(err, os.ErrNotExist) || cmd.Process != nil || !strings.Contains(err.Error(), "/nowhere/at/all") {
		t.Errorf("Start returned %v; want an error that says what is missing", err)
	}
	w.Close()
	cmd = exec.Command("/bin/true")
	if _, err := w.Start(cmd, nil); !errors.Is(err, os.ErrClosed) || cmd.Process != nil {
		t.Errorf("Start after Close returned %v, and started %v", err, cmd.Process)
	}
}

// TestParityP8Errors: what cannot be watched is an error that errors.Is can
// tell. Watching twice is none.
func TestParityP8Errors(t *testing.T) {
	testenv.NoLeaks(t)
	reaped := newVictim(t, "exit 0")
	savedReaped := idOf(t, reaped.pid())
	reaped.end()
	reaped.reap()
	v := newVictim(t, "exit 0")
	saved := idOf(t, v.pid())
	other, otherBoot, partial := saved, saved, saved
	other.ID++
	otherBoot.Boot = "0f0f0f0f-0000-4000-8000-000000000000"
	partial.ID = 0
	r, _, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	closed := pidfdFile(t, v.pid(), 0)
	closed.Close()
	directory, err := os.Open(fmt.Sprint("/proc/", v.pid()))
	if err != nil {
		t.Fatal(err)
	}
	defer directory.Close()
	tid := otherThread(t)
	name := fmt.Sprint("process ", reaped.pid())
	for _, test := range []struct {
		name    string
		target  kernstream.Target
		options *kernstream.ProcessOptions
		want    error
		text    string
	}{
		{"reaped", kernstream.PID(reaped.pid()), nil, os.ErrProcessDone, name},
		{"reaped, os.Process", kernstream.OfProcess(reaped.Process), nil, os.ErrProcessDone, name},
		{"reaped, saved", kernstream.Saved(savedReaped), nil, os.ErrProcessDone, name},
		{"another with its number", kernstream.Saved(other), nil, os.ErrProcessDone, "another process"},
		{"another boot", kernstream.Saved(otherBoot), nil, os.ErrProcessDone, "another boot"},
		{"incomplete", kernstream.Saved(partial), nil, unix.EINVAL, "not complete"},
		{"number 0", kernstream.PID(0), nil, unix.EINVAL, "process 0"},
		{"negative", kernstream.PID(-1), nil, unix.EINVAL, "process -1"},
		{"thread", kernstream.PID(tid), nil, nil, fmt.Sprintf("%d is a thread of process %d", tid, os.Getpid())},
		{"nil", nil, nil, nil, "nil"},
		{"nil os.Process", kernstream.OfProcess(nil), nil, nil, "nil"},
		{"nil file", kernstream.PidFD(nil), nil, os.ErrClosed, "pidfd"},
		{"closed file", kernstream.PidFD(closed), nil, os.ErrClosed, closed.Name()},
		{"pipe", kernstream.PidFD(r), nil, unix.EBADF, "not a pidfd"},
		{"directory in /proc", kernstream.PidFD(directory), nil, unix.EBADF, "not a pidfd"},
		{"phase", kernstream.PID(v.pid()), &kernstream.ProcessOptions{Until: 7}, unix.EINVAL, "Phase 7"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newProcessWatcher(t)
			s, err := kernstream.WatchProcess(t.Context(), test.target, test.options)
			watch, err2 := w.Watch(test.target, test.options)
			for _, err := range []error{err, err2} {
				var op *kernstream.OpError
				if !errors.As(err, &op) || op.Source != "process" || op.Op == "" || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
					t.Errorf("the error is %v; want an OpError that Is %v and says %q", err, test.want, test.text)
				}
				if test.want != os.ErrProcessDone && errors.Is(err, os.ErrProcessDone) || errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("the error %v is another one, too", err)
				}
			}
			if s != nil || watch != nil {
				t.Error("there is a watch, and an error")
			}
			if test.options == nil {
				if p, err := w.Open(test.target); p != nil || err == nil {
					t.Errorf("Open returned %v, %v; want an error", p, err)
				}
			}
		})
	}
	twice := newProcessWatcher(t)
	for range 2 {
		watch(t, twice, kernstream.PID(v.pid()), nil)
	}
}

// TestProcessPhases: a watch until Reaped tells both phases, in their order;
// known together, both have the same status. One that nobody reaps has no
// second.
func TestProcessPhases(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "EPOLLHUP of a pidfd")
	testenv.Feature(t, "reaping of a process", "pidfd, EPOLLHUP")
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	v := newVictim(t, "exit 6")
	one := watch(t, w, kernstream.PID(v.pid()), untilReaped)
	s := watchProcess(t, t.Context(), kernstream.PID(v.pid()), untilReaped)
	v.zombie(t)
	want(t, next(t, w.C), v.pid(), kernstream.Exited, exit(6))
	want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(6))
	none(t, w.C)
	none(t, s.C)
	if one.Stop() {
		t.Error("Stop says that the second event was received")
	}
	two := watch(t, w, kernstream.PID(v.pid()), untilReaped)
	want(t, next(t, w.C), v.pid(), kernstream.Exited, exit(6))
	v.reap()
	want(t, next(t, w.C), v.pid(), kernstream.Reaped, exit(6))
	want(t, next(t, s.C), v.pid(), kernstream.Reaped, exit(6))
	if err := over(t, s); err != nil {
		t.Error(err)
	}
	if !two.Stop() {
		t.Error("Stop says that the second event was not received")
	}
}

// TestProcessNoReapingBefore69: an old kernel does not tell of the reaping, and
// the error says so.
func TestProcessNoReapingBefore69(t *testing.T) {
	if reapingTold() {
		t.Log("this kernel tells") // nothing is left out: TestProcessPhases is for it
		return
	}
	testenv.Feature(t, "reaping of a process", "not told")
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	p, err := w.Open(kernstream.PID(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		second(kernstream.WatchProcess(t.Context(), kernstream.PID(os.Getpid()), untilReaped)),
		second(w.Watch(kernstream.PID(os.Getpid()), untilReaped)),
		second(p.Watch(untilReaped)),
		second(w.Start(exec.Command("/bin/true"), untilReaped)),
	} {
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "6.9") {
			t.Errorf("the error is %v; want errors.ErrUnsupported and the version", err)
		}
	}
}
