package kernstream

import (
	"context"
	"errors"
	"maps"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeTable is a mountSource over a table that the test changes, on a fake
// clock.
type fakeTable struct {
	mu     sync.Mutex
	now    map[uint64]Mount // by lineage
	seen   map[uint64]Mount // at the last look
	tokens chan struct{}
	end    chan struct{}

	looks, rescans, closed int
	failure                error
	lookTime               time.Duration // how long a look takes
}

func newFakeTable(points ...string) *fakeTable {
	f := &fakeTable{now: map[uint64]Mount{}, tokens: make(chan struct{}, 1), end: make(chan struct{})}
	for _, point := range points {
		f.put(point)
	}
	return f
}

// put adds a mount without waking anybody and returns its lineage.
func (f *fakeTable) put(point string) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	lineage := uint64(len(f.now)+1) * 10
	for f.now[lineage].MountPoint != "" {
		lineage++
	}
	f.now[lineage] = Mount{MountInfoID: uint32(lineage), MountPoint: point, Options: "rw"}
	return lineage
}

func (f *fakeTable) mount(point string) uint64 {
	defer f.token()
	return f.put(point)
}

func (f *fakeTable) unmount(lineage uint64) {
	defer f.token()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.now, lineage)
}

func (f *fakeTable) remount(lineage uint64, options string) {
	defer f.token()
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.now[lineage]
	m.Options = options
	f.now[lineage] = m
}

func (f *fakeTable) fail(err error) {
	defer f.token()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failure = err
}

func (f *fakeTable) token() {
	select {
	case f.tokens <- struct{}{}:
	default:
	}
}

func (f *fakeTable) via() MountVia { return ViaMountinfo }

func (f *fakeTable) wake() <-chan struct{} { return f.tokens }

func (f *fakeTable) ended() <-chan struct{} { return f.end }

// rest is what that of mountinfo is.
func (f *fakeTable) rest(began time.Time) time.Duration {
	if len(f.tokens) == 0 {
		return 0
	}
	return time.Since(began)
}

func (f *fakeTable) over() bool {
	select {
	case <-f.end:
		return true
	default:
		return false
	}
}

func (f *fakeTable) close() { f.closed++ }

func (f *fakeTable) look(ctx context.Context, rescan bool, d *mountDelta) (resync bool, err error) {
	f.mu.Lock()
	lookTime := f.lookTime
	f.mu.Unlock()
	time.Sleep(lookTime) // without the lock: a bubble does not know it
	f.mu.Lock()
	defer f.mu.Unlock()
	f.looks++
	if rescan {
		f.rescans++
	}
	if f.failure != nil {
		return false, f.failure
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	for lineage, m := range f.now {
		old, ok := f.seen[lineage]
		switch {
		case !ok:
			d.change(lineage, nil, &m)
		case !old.equal(&m):
			d.change(lineage, &old, &m)
		}
	}
	for lineage, m := range f.seen {
		if _, ok := f.now[lineage]; !ok {
			d.change(lineage, &m, nil)
		}
	}
	f.seen = maps.Clone(f.now)
	return rescan, nil
}

// watch starts a loop over f.
func (f *fakeTable) watch(ctx context.Context, options MountOptions) *MountWatcher {
	w := &MountWatcher{rescan: make(chan struct{}, 1)}
	loop := newMountLoop(&options, f, w.rescan)
	if err := loop.begin(ctx); err != nil {
		panic(err)
	}
	w.Stream = newStream(ctx, 0, func(ctx context.Context, r *run[*MountEvent]) error { return loop.run(ctx, r.c) })
	return w
}

// received returns the event that is ready now, or nil.
func received(w *MountWatcher) *MountEvent {
	synctest.Wait()
	select {
	case e := <-w.C:
		return e
	default:
		return nil
	}
}

// summary is the event without what a test of the loop does not look at.
func summary(e *MountEvent) string {
	if e == nil {
		return "none"
	}
	text := ""
	for _, m := range e.Unmounted {
		text += " -" + m.MountPoint
	}
	for _, c := range e.Moved {
		text += " >" + c.New.MountPoint
	}
	for _, c := range e.Changed {
		text += " ~" + c.New.MountPoint + "=" + c.New.Options
	}
	for _, m := range e.Mounted {
		text += " +" + m.MountPoint
	}
	for _, flag := range []struct {
		set  bool
		name string
	}{{e.Initial, " initial"}, {e.Coalesced, " coalesced"}, {e.Resync, " resync"}} {
		if flag.set {
			text += flag.name
		}
	}
	return text
}

func expect(t *testing.T, w *MountWatcher, want string) *MountEvent {
	t.Helper()
	e := received(w)
	if got := summary(e); got != want {
		t.Errorf("event %q; want %q", got, want)
	}
	return e
}

// finish closes w and checks that the source was closed once.
func finish(t *testing.T, w *MountWatcher, f *fakeTable) {
	t.Helper()
	w.Close()
	if f.closed != 1 {
		t.Errorf("the source was closed %d times; want once", f.closed)
	}
}

// TestMountLoopInitial: the first event has the whole table and says so; then
// each change is an event of its own, stamped with the time of its look.
func TestMountLoopInitial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/", "/a")
		w := f.watch(t.Context(), MountOptions{})
		expect(t, w, " +/ +/a initial")
		expect(t, w, "none")
		b := f.mount("/b")
		time.Sleep(time.Minute)
		begin := time.Now()
		expect(t, w, " +/b")
		f.remount(b, "ro")
		if e := expect(t, w, " ~/b=ro"); !e.When.Equal(begin) || e.Via != ViaMountinfo {
			t.Errorf("When is %v, Via %v; want %v, mountinfo", e.When, e.Via, begin)
		}
		f.unmount(b)
		expect(t, w, " -/b")
		f.token()
		expect(t, w, "none")
		finish(t, w, f)
	})
}

// TestMountLoopInitialEmpty: an empty table is an initial event, too.
func TestMountLoopInitialEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable()
		w := f.watch(t.Context(), MountOptions{})
		if e := expect(t, w, " initial"); e.When.IsZero() {
			t.Error("When is not set")
		}
		finish(t, w, f)
		// It is not held back when it is empty no more.
		f = newFakeTable()
		w = f.watch(t.Context(), MountOptions{Coalesce: func(e *MountEvent) time.Duration {
			t.Errorf("Coalesce was asked about %q", summary(e))
			return time.Hour
		}})
		f.mount("/a")
		expect(t, w, " +/a initial")
		finish(t, w, f)
	})
}

// TestMountLoopNoInitial: without the initial event, the first is of what
// changes after the start.
func TestMountLoopNoInitial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/", "/a")
		w := f.watch(t.Context(), MountOptions{NoInitial: true})
		expect(t, w, "none")
		f.mount("/b")
		expect(t, w, " +/b")
		finish(t, w, f)
	})
}

// TestMountLoopSlowConsumer: what happens while nobody receives becomes one
// event, which is about the latest state; what was undone is not in it.
func TestMountLoopSlowConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		w := f.watch(t.Context(), MountOptions{})
		expect(t, w, " +/ initial")
		a := f.mount("/a")
		synctest.Wait()
		b := f.mount("/b")
		synctest.Wait()
		f.remount(a, "ro")
		synctest.Wait()
		f.unmount(b)
		expect(t, w, " +/a coalesced")
		if f.looks < 5 {
			t.Errorf("%d looks at the table; want one for each change", f.looks)
		}
		f.remount(a, "rw")
		synctest.Wait()
		f.remount(a, "ro")
		expect(t, w, "none")
		// The merging starts anew after an event that came to nothing.
		f.unmount(a)
		expect(t, w, " -/a")
		finish(t, w, f)
	})
}

// TestMountLoopInitialMerges: changes before the initial event is received are
// part of it.
func TestMountLoopInitialMerges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/", "/a")
		w := f.watch(t.Context(), MountOptions{Coalesce: CoalesceFor(time.Hour)})
		synctest.Wait()
		b := f.mount("/b")
		synctest.Wait()
		f.remount(b, "ro")
		e := expect(t, w, " +/ +/a +/b initial coalesced")
		if e.Mounted[2].Options != "ro" {
			t.Errorf("the initial event has %q; want the latest state", e.Mounted[2].Options)
		}
		finish(t, w, f)
	})
}

// TestMountLoopWakeWithoutDifference: a wake that brings nothing does not
// prolong a window.
func TestMountLoopWakeWithoutDifference(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		w := f.watch(t.Context(), MountOptions{Coalesce: CoalesceFor(100 * time.Millisecond)})
		expect(t, w, " +/ initial")
		f.mount("/a")
		for range 9 {
			synctest.Wait()
			time.Sleep(10 * time.Millisecond)
			f.token()
		}
		synctest.Wait()
		time.Sleep(10 * time.Millisecond)
		expect(t, w, " +/a")
		finish(t, w, f)
	})
}

// TestMountLoopRescan: rescans find what woke nobody, at their period or when
// asked for, and flag it.
func TestMountLoopRescan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		w := f.watch(t.Context(), MountOptions{Rescan: time.Minute})
		expect(t, w, " +/ initial")
		f.put("/a")
		time.Sleep(59 * time.Second)
		expect(t, w, "none")
		time.Sleep(time.Second)
		expect(t, w, " +/a resync")
		f.put("/b")
		w.Rescan()
		w.Rescan()
		expect(t, w, " +/b resync")
		// Nothing found is no event, and leaves no flag behind.
		w.Rescan()
		expect(t, w, "none")
		f.mount("/c")
		expect(t, w, " +/c")
		if f.rescans < 3 || f.rescans > 4 {
			t.Errorf("%d rescans; want one for the period and two or three that were asked for", f.rescans)
		}
		finish(t, w, f)
		w.Rescan() // legal after the end
	})
}

// TestMountLoopRests: after a look during which there were more changes, the
// loop rests for as long as that took, so that a storm leaves half of the time
// to those who make it. Other changes, the consumer and a rescan do not wait for
// that, and the last state arrives.
func TestMountLoopRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		a := f.put("/a")
		w := f.watch(t.Context(), MountOptions{})
		expect(t, w, " +/ +/a initial")
		f.mu.Lock()
		f.lookTime = 20 * time.Millisecond
		f.mu.Unlock()
		// Changes after a look are looked at at once.
		f.remount(a, "first")
		time.Sleep(20 * time.Millisecond)
		expect(t, w, " ~/a=first")
		f.remount(a, "second")
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		// One during a look is not.
		f.token()
		time.Sleep(10 * time.Millisecond)
		expect(t, w, " ~/a=second")
		f.remount(a, "third")
		time.Sleep(39 * time.Millisecond)
		expect(t, w, "none")
		time.Sleep(time.Millisecond)
		expect(t, w, " ~/a=third")
		looks := f.looks
		for i := range 1000 {
			f.token()
			time.Sleep(time.Millisecond)
			if i == 500 {
				f.put("/b")
				w.Rescan()
			}
			received(w)
		}
		if n := f.looks - looks; n < 20 || n > 30 {
			t.Errorf("%d looks of 20 ms in a second of wakes; want about 25", n)
		}
		f.remount(a, "last")
		time.Sleep(time.Second)
		expect(t, w, " ~/a=last")
		finish(t, w, f)
	})
}

// TestMountLoopNaturalEnd: at the end of the namespace what is known is still
// delivered, held back or not; Err is nil, and the source is closed before
// anybody waits for the consumer.
func TestMountLoopNaturalEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		w := f.watch(t.Context(), MountOptions{Coalesce: CoalesceFor(time.Hour)})
		expect(t, w, " +/ initial")
		f.mount("/a")
		synctest.Wait()
		close(f.end)
		synctest.Wait()
		if f.closed != 1 {
			t.Error("the source is not closed while an event waits")
		}
		expect(t, w, " +/a")
		if _, ok := <-w.C; ok || w.Err() != nil {
			t.Errorf("C is open: %v, Err %v; want closed, nil", ok, w.Err())
		}
		finish(t, w, f)
	})
}

// TestMountLoopEndBeatsCancel: a natural end that had come when the context was
// cancelled makes Err nil.
func TestMountLoopEndBeatsCancel(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeTable("/")
			ctx, cancel := context.WithCancel(t.Context())
			w := f.watch(ctx, MountOptions{})
			expect(t, w, " +/ initial")
			close(f.end)
			cancel()
			if _, ok := <-w.C; ok || w.Err() != nil {
				t.Errorf("C is open: %v, Err %v; want closed, nil", ok, w.Err())
			}
			finish(t, w, f)
		})
	}
}

// TestMountLoopFails: an error of the source ends the stream and is Err.
func TestMountLoopFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		w := f.watch(t.Context(), MountOptions{})
		expect(t, w, " +/ initial")
		f.fail(mountError("pread", "/proc/self/mountinfo", syscall.EIO))
		if e, ok := <-w.C; ok || !errors.Is(w.Err(), syscall.EIO) {
			t.Errorf("event %v, Err %v; want C closed, EIO", e, w.Err())
		}
		finish(t, w, f)
	})
}

// TestMountLoopFailsAtOnce: an error of the first look is one of the
// constructor, and the source is closed.
func TestMountLoopFailsAtOnce(t *testing.T) {
	f := newFakeTable("/")
	f.fail(mountError("pread", "/proc/self/mountinfo", syscall.EIO))
	loop := newMountLoop(&MountOptions{}, f, nil)
	if err := loop.begin(t.Context()); !errors.Is(err, syscall.EIO) || f.closed != 1 {
		t.Errorf("begin returned %v, the source was closed %d times; want EIO, once", err, f.closed)
	}
}

// TestMountLoopCancel: a cancel ends the stream wherever it is: with nothing to
// do, with an event that nobody receives, within a window, within a look.
func TestMountLoopCancel(t *testing.T) {
	cause := errors.New("cause")
	for name, begin := range map[string]func(f *fakeTable, w *MountWatcher){
		"idle":        func(_ *fakeTable, w *MountWatcher) { <-w.C },
		"undelivered": func(*fakeTable, *MountWatcher) {},
		"in a window": func(f *fakeTable, w *MountWatcher) { <-w.C; f.mount("/a") },
		"during looks": func(f *fakeTable, w *MountWatcher) {
			<-w.C
			f.mu.Lock()
			f.lookTime = time.Second
			f.mu.Unlock()
			f.token()
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeTable("/")
			ctx, cancel := context.WithCancelCause(t.Context())
			w := f.watch(ctx, MountOptions{Coalesce: CoalesceFor(time.Hour)})
			begin(f, w)
			synctest.Wait()
			cancel(cause)
			if e, ok := <-w.C; ok || w.Err() != cause {
				t.Errorf("%s: event %v, Err %v; want C closed and the cause", name, e, w.Err())
			}
			finish(t, w, f)
		})
	}
}
