package kernstream

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
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

func (f *fakeTable) via() MountVia          { return ViaMountinfo }
func (f *fakeTable) wake() <-chan struct{}  { return f.tokens }
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

// TestParityM5Coalesce: a consumer can ask for a change to be held back, per
// event; what follows within the delay is one event with it, flagged; a helper
// gives a constant delay.
func TestParityM5Coalesce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		asked := 0
		hold := 100 * time.Millisecond
		w := f.watch(t.Context(), MountOptions{Coalesce: func(e *MountEvent) time.Duration {
			asked++
			if e.Initial || len(e.Mounted)+len(e.Unmounted) != 1 {
				t.Errorf("Coalesce was asked about %q", summary(e))
			}
			e.Mounted = nil // what it does to the event changes nothing
			return hold
		}})
		expect(t, w, " +/ initial")
		f.mount("/a")
		synctest.Wait()
		time.Sleep(50 * time.Millisecond)
		f.mount("/b")
		expect(t, w, "none")
		time.Sleep(99 * time.Millisecond)
		expect(t, w, "none")
		time.Sleep(time.Millisecond)
		expect(t, w, " +/a +/b coalesced")
		if asked != 1 {
			t.Errorf("Coalesce was asked %d times for one window; want once", asked)
		}
		c := f.mount("/c")
		synctest.Wait()
		time.Sleep(hold)
		expect(t, w, " +/c")
		hold = 0
		f.unmount(c)
		expect(t, w, " -/c")
		if asked != 3 {
			t.Errorf("Coalesce was asked %d times; want 3", asked)
		}
		finish(t, w, f)
	})
	if got := CoalesceFor(time.Second)(nil); got != time.Second {
		t.Errorf("CoalesceFor(1s) answers %v", got)
	}
}

// TestMountLoopCoalesceSlowConsumer: a change that is merged into an event which
// waits for its consumer does not hold that back again.
func TestMountLoopCoalesceSlowConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		asked := 0
		w := f.watch(t.Context(), MountOptions{Coalesce: func(*MountEvent) time.Duration { asked++; return time.Second }})
		expect(t, w, " +/ initial")
		f.mount("/a")
		synctest.Wait()
		time.Sleep(time.Second)
		synctest.Wait()
		f.mount("/b")
		expect(t, w, " +/a +/b coalesced")
		if asked != 1 {
			t.Errorf("Coalesce was asked %d times; want once", asked)
		}
		finish(t, w, f)
	})
}

// TestMountLoopMaxDelay: changes without end do not hold a window open for
// longer than MaxDelay, and the last state always arrives.
func TestMountLoopMaxDelay(t *testing.T) {
	for _, test := range []struct{ coalesce, maxDelay, want time.Duration }{
		{3 * time.Millisecond, 0, time.Second},
		{3 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond},
		{200 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond},
		{2 * time.Second, 0, 2 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeTable("/")
			a := f.put("/a")
			w := f.watch(t.Context(), MountOptions{Coalesce: CoalesceFor(test.coalesce), MaxDelay: test.maxDelay})
			expect(t, w, " +/ +/a initial")
			events := 0
			state := ""
			last := time.Now()
			for i := range 3000 {
				f.remount(a, fmt.Sprint(i))
				time.Sleep(time.Millisecond)
				if e := received(w); e != nil {
					events++
					state = e.Changed[0].New.Options
					if held := time.Since(last); held > test.want+2*time.Millisecond {
						t.Fatalf("event %d came after %v; want at most %v", events, held, test.want)
					}
					last = time.Now()
				}
			}
			time.Sleep(test.coalesce)
			if e := received(w); e != nil {
				state = e.Changed[0].New.Options
			}
			if about := int(3 * time.Second / test.want); state != "2999" || events < about-1 || events > about+1 {
				t.Errorf("%d events up to state %s; want about %d, up to 2999", events, state, about)
			}
			finish(t, w, f)
		})
	}
}

// TestMountLoopWindowUndone: a window whose changes are undone closes without
// an event, and the next change opens one of its own.
func TestMountLoopWindowUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTable("/")
		asked := 0
		w := f.watch(t.Context(), MountOptions{Coalesce: func(*MountEvent) time.Duration { asked++; return 100 * time.Millisecond }})
		expect(t, w, " +/ initial")
		a := f.mount("/a")
		synctest.Wait()
		time.Sleep(60 * time.Millisecond)
		f.unmount(a)
		synctest.Wait()
		f.mount("/b")
		synctest.Wait()
		time.Sleep(99 * time.Millisecond)
		expect(t, w, "none")
		time.Sleep(time.Millisecond)
		expect(t, w, " +/b")
		if asked != 2 {
			t.Errorf("Coalesce was asked %d times; want once for each window", asked)
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

// TestMountDeltaUntouched: what the filter lets through neither before nor
// after is no change, and leaves no flag.
func TestMountDeltaUntouched(t *testing.T) {
	var d mountDelta
	d.change(1, nil, nil)
	if d.looked(true) || d.resync || d.merged != 0 {
		t.Errorf("the delta is %+v; want it untouched", d)
	}
	m := Mount{MountPoint: "/"}
	d.change(2, nil, &m)
	d.looked(false)
	d.change(1, nil, nil)
	if d.looked(true) || d.resync || d.merged != 1 {
		t.Errorf("the delta is %+v; want one look in it", d)
	}
}

// TestSettle: a torn text is read again, but not for ever, and not when that
// takes long.
func TestSettle(t *testing.T) {
	for _, test := range []struct {
		torn  []bool
		takes time.Duration
		fails bool
		want  int
	}{
		{torn: []bool{false}, want: 1},
		{torn: []bool{true, false}, want: 2},
		{torn: []bool{true, true, true, true}, want: 3},
		{torn: []bool{true, true}, takes: time.Millisecond, want: 1},
		{torn: []bool{true, true}, fails: true, want: 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := 0
			torn, err := settle(func() (bool, error) {
				time.Sleep(test.takes)
				n++
				if test.fails {
					return true, syscall.EIO
				}
				return test.torn[n-1], nil
			})
			if n != test.want || torn != test.torn[n-1] || (err != nil) != test.fails {
				t.Errorf("%+v: %d reads, torn %v, %v", test, n, torn, err)
			}
		})
	}
}

// TestDropRepeated: of mounts with one ID the last stays; rows that show no ID
// all stay.
func TestDropRepeated(t *testing.T) {
	m := func(id uint32, point string) Mount { return Mount{MountInfoID: id, MountPoint: point} }
	got := dropRepeated([]Mount{m(1, "/"), m(2, "/old"), m(0, "x"), m(3, "/c"), m(2, "/new"), m(0, "y")})
	points := ""
	for _, m := range got {
		points += " " + m.MountPoint
	}
	if points != " / x /c /new y" {
		t.Errorf("left are%s", points)
	}
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

// TestMountDeltaAlgebra: whatever happens to a table and whenever the consumer
// receives, applying the events in the documented order gives the table; each
// mount is in one list, and the lists have the documented order.
func TestMountDeltaAlgebra(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		var d mountDelta
		kernel, consumer := map[uint64]Mount{}, map[uint64]Mount{}
		var next uint64
		for range 200 {
			switch lineage := uint64(random.IntN(int(next) + 1)); random.IntN(6) {
			case 0, 1:
				next++
				m := Mount{MountInfoID: uint32(next), MountPoint: fmt.Sprint("/", next), MountInfoParentID: 1}
				kernel[next] = m
				d.change(next, nil, &m)
			case 2:
				if old, ok := kernel[lineage]; ok {
					delete(kernel, lineage)
					d.change(lineage, &old, nil)
				}
			case 3:
				if old, ok := kernel[lineage]; ok {
					m := old
					m.Options = []string{"rw", "ro"}[random.IntN(2)]
					kernel[lineage] = m
					d.change(lineage, &old, &m)
				}
			case 4:
				if old, ok := kernel[lineage]; ok {
					m := old
					m.MountPoint = fmt.Sprint("/", lineage, "/", random.IntN(2))
					m.MountInfoParentID = uint32(random.IntN(3))
					kernel[lineage] = m
					d.change(lineage, &old, &m)
				}
			case 5:
				d.looked(false)
				if !d.empty() {
					check(t, d.event(), consumer)
					d.reset()
				}
				if !maps.EqualFunc(kernel, consumer, func(a, b Mount) bool { return a.equal(&b) }) {
					t.Fatalf("round %d: the consumer's table differs from the kernel's", round)
				}
			}
		}
	}
}

// check applies e to table, by way of its keys, and checks its form.
func check(t *testing.T, e *MountEvent, table map[uint64]Mount) {
	t.Helper()
	if len(e.Mounted)+len(e.Unmounted)+len(e.Moved)+len(e.Changed) == 0 {
		t.Fatal("an event without a change")
	}
	seen := map[uint32]bool{}
	once := func(id uint32) {
		if seen[id] {
			t.Fatalf("mount %d is in the event twice", id)
		}
		seen[id] = true
	}
	known := func(old *Mount) {
		if have, ok := table[uint64(old.MountInfoID)]; !ok || !have.equal(old) {
			t.Fatalf("the event says that the consumer knew %+v; it knows %+v", old, have)
		}
	}
	for i := range e.Unmounted {
		known(&e.Unmounted[i])
		once(e.Unmounted[i].MountInfoID)
		delete(table, uint64(e.Unmounted[i].MountInfoID))
	}
	for _, c := range e.Moved {
		known(&c.Old)
		once(c.New.MountInfoID)
		if c.Old.MountPoint == c.New.MountPoint && c.Old.MountInfoParentID == c.New.MountInfoParentID {
			t.Fatalf("%+v did not move", c)
		}
		table[uint64(c.New.MountInfoID)] = c.New
	}
	for _, c := range e.Changed {
		known(&c.Old)
		once(c.New.MountInfoID)
		if c.Old.MountPoint != c.New.MountPoint || c.Old.equal(&c.New) {
			t.Fatalf("%+v moved, or did not change", c)
		}
		table[uint64(c.New.MountInfoID)] = c.New
	}
	for _, m := range e.Mounted {
		once(m.MountInfoID)
		if _, ok := table[uint64(m.MountInfoID)]; ok {
			t.Fatalf("mount %d was there", m.MountInfoID)
		}
		table[uint64(m.MountInfoID)] = m
	}
	byID := func(a, b Mount) int { return int(a.MountInfoID) - int(b.MountInfoID) }
	if !slices.IsSortedFunc(e.Mounted, byID) || !slices.IsSortedFunc(e.Unmounted, func(a, b Mount) int { return byID(b, a) }) {
		t.Fatal("a list is not in the order of age")
	}
}
