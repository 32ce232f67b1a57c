package kernstream_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// How watches and watchers of processes end: by their context, by Close, and what
// of a slow consumer is left.

// TestProcessCancelTakesBack: what a stream was told and has not been received
// is not delivered after a cancel, nor after Close.
func TestProcessCancelTakesBack(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "EPOLLHUP of a pidfd")
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 0")
	v.zombie(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancelled := watchProcess(t, ctx, kernstream.PID(v.pid()), untilReaped)
	closed := watchProcess(t, t.Context(), kernstream.PID(v.pid()), untilReaped)
	time.Sleep(20 * time.Millisecond) // the first event is in C
	cancel()
	closed.Close()
	for deadline := time.Now().Add(patience); cancelled.Err() == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond) // a cancel takes effect in the background
	}
	if err := over(t, cancelled); err != context.Canceled {
		t.Errorf("Err is %v", err)
	}
	if err := over(t, closed); err != nil {
		t.Errorf("Err is %v", err)
	}
}

// TestParityP9CloseWaits: when Close has returned, nothing is left of the
// watcher and its watches, and no event comes any more.
func TestParityP9CloseWaits(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 0")
	gone := newVictim(t, "exit 0")
	gone.zombie(t)
	before := countDescriptors(t)
	for range testenv.SoakN(50) {
		w := newProcessWatcher(t)
		p, err := w.Open(kernstream.PID(v.pid()))
		if err != nil {
			t.Fatal(err)
		}
		last := watch(t, w, kernstream.PID(v.pid()), nil)
		watch(t, w, kernstream.PID(gone.pid()), nil) // an event that nobody receives
		for range 2 {
			if err := w.Close(); err != nil || w.Err() != nil {
				t.Errorf("Close returned %v, Err %v", err, w.Err())
			}
		}
		if after := countDescriptors(t); after != before {
			t.Fatalf("%d descriptors after Close; want %d as before", after, before)
		}
		if e, ok := <-w.C; ok {
			t.Errorf("event %v after Close", e)
		}
		for _, err := range []error{
			second(w.Watch(kernstream.PID(v.pid()), nil)), second(w.Open(kernstream.PID(v.pid()))), second(p.Watch(nil)),
		} {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("after Close the error is %v; want os.ErrClosed", err)
			}
		}
		if err := p.Close(); err != nil || last.Stop() {
			t.Errorf("Close of the Process: %v", err)
		}
	}
}

// TestParityP9CloseAtOnce: Close waits for what goes on after the last event, too:
// who was the first to learn of it may close at once, and nothing is left.
func TestParityP9CloseAtOnce(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(50) {
		v := newVictim(t, "exit 0")
		before := countDescriptors(t)
		w := newProcessWatcher(t)
		watch(t, w, kernstream.PID(v.pid()), nil)
		v.end() // closes a descriptor
		next(t, w.C)
		w.Close()
		if after := countDescriptors(t); after != before-1 {
			t.Fatalf("%d descriptors after Close; want %d as before", after, before-1)
		}
		v.reap()
	}
}

// TestStopAfterTheEnd: a watch still knows that its event was received when the
// watcher was closed, or its context cancelled, right after that.
func TestStopAfterTheEnd(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 0")
	v.zombie(t)
	for i := range testenv.SoakN(50) {
		ctx, cancel := context.WithCancel(t.Context())
		w, err := kernstream.NewProcessWatcher(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		first := watch(t, w, kernstream.PID(v.pid()), nil)
		second := watch(t, w, kernstream.PID(v.pid()), nil)
		time.Sleep(time.Millisecond) // the first event is on offer
		next(t, w.C)
		if i%2 == 0 {
			cancel()
		}
		w.Close()
		if !first.Stop() || second.Stop() {
			t.Fatalf("Stop of what was received returned %v, of what was not %v", first.Stop(), second.Stop())
		}
		cancel()
	}
}

func second[T any](_ T, err error) error { return err }

// TestProcessCancel: a cancel ends all streams of a context, with its cause, and
// those of another context go on.
func TestProcessCancel(t *testing.T) {
	testenv.NoLeaks(t)
	reason := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	derived, cancelDerived := context.WithTimeout(context.WithValue(ctx, new(int), 1), time.Hour)
	defer cancelDerived()
	v := newVictim(t, "exit 0")
	var streams []*kernstream.Stream[*kernstream.ProcessEvent]
	for i := range 600 { // more than are ended at once
		ctx := ctx
		if i%3 == 0 {
			ctx = derived
		}
		streams = append(streams, watchProcess(t, ctx, kernstream.PID(v.pid()), nil))
	}
	other := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	forever := watchProcess(t, context.Background(), kernstream.PID(v.pid()), nil)
	w, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	watch(t, w, kernstream.PID(v.pid()), nil)
	for _, s := range streams {
		if err := s.Err(); err != nil {
			t.Fatalf("Err is %v before the end", err)
		}
	}
	cancel(reason)
	for _, s := range append(streams, w.Stream) {
		if err := over(t, s); err != reason {
			t.Fatalf("Err is %v; want the cause", err)
		}
		if err := s.Close(); err != nil || s.Err() != reason {
			t.Errorf("Close returned %v, and made Err %v", err, s.Err())
		}
	}
	if _, err := kernstream.WatchProcess(ctx, kernstream.PID(v.pid()), nil); err != reason {
		t.Errorf("WatchProcess returned %v; want the cause", err)
	}
	if _, err := kernstream.NewProcessWatcher(ctx, nil); err != reason {
		t.Errorf("NewProcessWatcher returned %v; want the cause", err)
	}
	none(t, other.C)
	v.end()
	for _, s := range []*kernstream.Stream[*kernstream.ProcessEvent]{other, forever} {
		want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(0))
		if err := over(t, s); err != nil {
			t.Error(err)
		}
	}
}

// TestProcessEndBeatsCancel: a process that has ended when the context is done
// is told, also if nobody had come to see it yet.
func TestProcessEndBeatsCancel(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(200) {
		ctx, cancel := context.WithCancel(t.Context())
		v := newVictim(t, "exit 4")
		s := watchProcess(t, ctx, kernstream.PID(v.pid()), nil)
		v.zombie(t)
		cancel()
		want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(4))
		if err := over(t, s); err != nil {
			t.Fatalf("Err is %v; want nil, since the process had ended", err)
		}
		v.reap()
	}
}

// TestProcessClose: Close ends one stream and no other; what it had not received
// is lost. It may be called from within the loop, and again.
func TestProcessClose(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 4")
	closed := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	other := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	for range 2 {
		if err := closed.Close(); err != nil {
			t.Error(err)
		}
		if err := over(t, closed); err != nil {
			t.Errorf("Err is %v after Close", err)
		}
	}
	v.zombie(t)
	for e := range other.C {
		want(t, e, v.pid(), kernstream.Exited, exit(4))
		other.Close()
		other.Close()
	}
	if err := other.Err(); err != nil {
		t.Error(err)
	}
	unread := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	time.Sleep(5 * time.Millisecond)
	unread.Close()
	if err := over(t, unread); err != nil {
		t.Error(err)
	}
}

// TestProcessSlowConsumer: both phases wait for a consumer that comes late,
// in order and with all that became known meanwhile.
func TestProcessSlowConsumer(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "EPOLLHUP of a pidfd")
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	keeper := newKeeper(t, nil)
	var pids []int
	for range 20 {
		pids = append(pids, keeper.fork("exit 11"))
		watch(t, w, kernstream.PID(pids[len(pids)-1]), untilReaped)
	}
	for _, pid := range pids {
		keeper.zombie(pid)
		keeper.reap(pid)
	}
	time.Sleep(20 * time.Millisecond)
	phases := map[int]kernstream.Phase{}
	for range pids {
		status := exit(11)
		for _, phase := range []kernstream.Phase{kernstream.Exited, kernstream.Reaped} {
			e := next(t, w.C)
			if !e.StatusKnown && !reapedStatus() {
				status = unknown // it was reaped before the library looked
			}
			want(t, e, e.Process.PID, phase, status)
			if phase == kernstream.Reaped && phases[e.Process.PID] != kernstream.Exited {
				t.Errorf("event %v is out of order", e)
			}
			phases[e.Process.PID] = phase
		}
	}
	if len(phases) != len(pids) {
		t.Errorf("%d processes were told; want %d", len(phases), len(pids))
	}
}

// TestProcessOrder: however late the consumer comes, the phases of several
// processes are told in the order in which they were seen, also to one that
// stops some watches before.
func TestProcessOrder(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "EPOLLHUP of a pidfd")
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	const n = 5
	var victims []*victim
	var seen []*kernstream.Stream[*kernstream.ProcessEvent]
	var stopped []*kernstream.Watch
	for range n {
		v := newVictim(t, "exit 1")
		victims = append(victims, v)
		stopped = append(stopped, watch(t, w, kernstream.PID(v.pid()), untilReaped))
		watch(t, w, kernstream.PID(v.pid()), untilReaped)
		seen = append(seen, watchProcess(t, t.Context(), kernstream.PID(v.pid()), untilReaped))
	}
	type step struct {
		of    int
		phase kernstream.Phase
	}
	// A process is reaped after the next but one has exited.
	var steps []step
	for i := range n + 2 {
		if i < n {
			steps = append(steps, step{i, kernstream.Exited})
		}
		if i >= 2 {
			steps = append(steps, step{i - 2, kernstream.Reaped})
		}
	}
	for _, step := range steps {
		if v := victims[step.of]; step.phase == kernstream.Exited {
			v.end()
		} else {
			v.reap()
		}
		next(t, seen[step.of].C) // the watches have seen it, too
	}
	for i, watch := range stopped {
		if i%2 == 0 {
			watch.Stop()
		}
	}
	for _, step := range steps {
		for twice := range 2 {
			if step.of%2 == 0 && twice > 0 {
				continue
			}
			want(t, next(t, w.C), victims[step.of].pid(), step.phase, exit(1))
		}
	}
	none(t, w.C)
}

// TestProcessesCostNoThread: watches hold no goroutine and no thread each.
func TestProcessesCostNoThread(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 0")
	keeper := newKeeper(t, nil)
	w := newProcessWatcher(t)
	first := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	goroutines, threads, descriptors := runtime.NumGoroutine(), countThreads(t), countDescriptors(t)
	var streams []*kernstream.Stream[*kernstream.ProcessEvent]
	const processes, each = 40, 50
	for range processes {
		pid := keeper.fork("exit 0")
		for range each {
			watch(t, w, kernstream.PID(pid), nil)
			streams = append(streams, watchProcess(t, t.Context(), kernstream.PID(pid), nil))
		}
	}
	if n := runtime.NumGoroutine() - goroutines; n > 0 {
		t.Errorf("%d goroutines more for %d watches", n, 2*processes*each)
	}
	if n := countThreads(t) - threads; n > 4 {
		t.Errorf("%d threads more for %d watches", n, 2*processes*each)
	}
	if n := countDescriptors(t) - descriptors; n != processes {
		t.Errorf("%d descriptors more for %d processes", n, processes)
	}
	for _, s := range append(streams, first) {
		s.Close()
	}
}
