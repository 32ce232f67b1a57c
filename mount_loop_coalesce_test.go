package kernstream

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// How the loop holds changes back and merges them: for who asked for it, and for
// slow consumers.

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
