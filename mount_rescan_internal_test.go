package kernstream

import (
	"testing"
	"time"
)

// A planTest is a rescanPlan on a made-up clock.
type planTest struct {
	*testing.T
	rescanPlan
	now time.Time
}

func newPlanTest(t *testing.T) *planTest {
	return &planTest{T: t, now: time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC)}
}

// after lets time pass.
func (p *planTest) after(d time.Duration) *planTest {
	p.now = p.now.Add(d)
	return p
}

// begins fails the test unless the next rescan begins now, with that flag.
func (p *planTest) begins(resync bool) {
	p.Helper()
	if !p.begin(p.now) {
		p.Fatalf("no rescan begins; the next is due in %v", p.due.Sub(p.now))
	}
	if p.resync != resync {
		p.Errorf("resync is %t", p.resync)
	}
	if !p.running {
		p.Error("it does not run")
	}
}

// waits fails the test if a rescan begins now.
func (p *planTest) waits() {
	p.Helper()
	if p.begin(p.now) {
		p.Fatal("a rescan begins")
	}
}

// idle fails the test if a rescan begins some time.
func (p *planTest) idle() {
	p.Helper()
	if !p.due.IsZero() {
		p.Errorf("a rescan is due in %v", p.due.Sub(p.now))
	}
	p.after(24 * time.Hour).waits()
}

// rescanned lets a rescan run that costs that much.
func (p *planTest) rescanned(cost time.Duration) {
	p.Helper()
	p.request(p.now)
	p.begins(true)
	p.after(cost).end(p.now, cost)
}

// TestRescanPlanNothing: without a need there is no rescan.
func TestRescanPlanNothing(t *testing.T) {
	p := newPlanTest(t)
	p.idle()
	p.rescanned(time.Second)
	p.idle()
}

// TestRescanPlanAlone: a change that came alone is looked for at once, and is
// no resync, for somebody was told of it.
func TestRescanPlanAlone(t *testing.T) {
	p := newPlanTest(t)
	p.change(p.now)
	p.begins(false)
	p.after(time.Millisecond).end(p.now, time.Millisecond)
	p.idle()
	p.change(p.now)
	p.begins(false)
}

// TestRescanPlanBudget: a rescan takes a thirtieth of the time: after one, the
// next for a change begins when 30 times its cost have passed.
func TestRescanPlanBudget(t *testing.T) {
	const cost = 100 * time.Millisecond
	p := newPlanTest(t)
	p.rescanned(cost)
	p.after(time.Second).change(p.now)
	p.after(2*time.Second - 1).waits()
	p.after(1).begins(false)
	p.after(cost).end(p.now, time.Millisecond) // it is the last one that counts

	p.change(p.now)
	p.after(30*time.Millisecond - 1).waits()
	p.after(1).begins(false)
	p.end(p.now, 0)
	p.change(p.now)
	p.begins(false)
}

// TestRescanPlanHidden: a change behind an event is found within a second, or
// within 30 times what the last rescan cost, but not at once. It is a resync.
func TestRescanPlanHidden(t *testing.T) {
	for cost, within := range map[time.Duration]time.Duration{
		0:                      time.Second,
		time.Millisecond:       time.Second,
		33 * time.Millisecond:  time.Second,
		34 * time.Millisecond:  1020 * time.Millisecond,
		100 * time.Millisecond: 3 * time.Second,
		time.Hour:              30 * time.Hour,
	} {
		p := newPlanTest(t)
		p.rescanned(cost)
		p.hidden(p.now)
		p.after(within * 9 / 10).waits()
		p.after(within / 10).begins(true)
		p.end(p.now, 0)
		p.idle()
	}
}

// TestRescanPlanHiddenAgain: more events do not put the rescan off.
func TestRescanPlanHiddenAgain(t *testing.T) {
	p := newPlanTest(t)
	p.hidden(p.now)
	for range 10 {
		p.after(90 * time.Millisecond).hidden(p.now)
		p.waits()
	}
	p.after(100 * time.Millisecond).begins(true)
	p.end(p.now, 0)
	p.idle()
}

// TestRescanPlanRequest: who asks gets a rescan at once, whatever the last one
// cost. It is a resync.
func TestRescanPlanRequest(t *testing.T) {
	p := newPlanTest(t)
	p.rescanned(time.Hour)
	p.request(p.now)
	p.begins(true)
	p.end(p.now, time.Hour)
	p.hidden(p.now)
	p.change(p.now)
	p.request(p.now)
	p.begins(true)
	p.end(p.now, 0)
	p.idle()
}

// TestRescanPlanMerged: one rescan serves all needs, at the earliest of their
// times. It is a resync unless all of them are changes that came alone.
func TestRescanPlanMerged(t *testing.T) {
	const cost = 10 * time.Millisecond
	alone, hidden, request := (*rescanPlan).change, (*rescanPlan).hidden, (*rescanPlan).request
	for _, c := range []struct {
		name   string
		needs  []func(*rescanPlan, time.Time)
		within time.Duration
		resync bool
	}{
		{"two alone", []func(*rescanPlan, time.Time){alone, alone}, 300 * time.Millisecond, false},
		{"alone and hidden", []func(*rescanPlan, time.Time){alone, hidden}, 300 * time.Millisecond, true},
		{"hidden and alone", []func(*rescanPlan, time.Time){hidden, alone}, 300 * time.Millisecond, true},
		{"alone, hidden and alone", []func(*rescanPlan, time.Time){alone, hidden, alone}, 300 * time.Millisecond, true},
		{"request and alone", []func(*rescanPlan, time.Time){request, alone}, 0, true},
		{"hidden and request", []func(*rescanPlan, time.Time){hidden, request}, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlanTest(t)
			p.rescanned(cost)
			for _, need := range c.needs {
				need(&p.rescanPlan, p.now)
			}
			if c.within > 0 {
				p.after(c.within - 1).waits()
				p.after(1)
			}
			p.begins(c.resync)
			p.end(p.now, cost)
			p.idle()
			// What was needed before does not count any more.
			p.change(p.now)
			p.begins(false)
		})
	}
}

// TestRescanPlanMeanwhile: what is needed while a rescan runs may have been too
// late for it, so another follows, with a flag of its own. No two run at once.
func TestRescanPlanMeanwhile(t *testing.T) {
	for _, c := range []struct {
		name   string
		need   func(*rescanPlan, time.Time)
		resync bool
	}{
		{"alone", (*rescanPlan).change, false},
		{"hidden", (*rescanPlan).hidden, true},
		{"request", (*rescanPlan).request, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, first := range []bool{false, true} {
				p := newPlanTest(t)
				if first {
					p.request(p.now)
				} else {
					p.change(p.now)
				}
				p.begins(first)
				c.need(&p.rescanPlan, p.now)
				p.after(time.Minute).waits()
				if p.resync != first {
					t.Errorf("resync of the one that runs is %t, was %t", p.resync, first)
				}
				p.end(p.now, time.Millisecond)
				p.after(time.Second).begins(c.resync)
				p.end(p.now, time.Millisecond)
				p.idle()
			}
		})
	}
}

// TestRescanPlanPeriodic: where nobody is woken, one rescan follows on the
// other, at the distance that the last one allows.
func TestRescanPlanPeriodic(t *testing.T) {
	p := newPlanTest(t)
	p.periodic = true
	p.hidden(p.now)
	for _, c := range []struct{ cost, within time.Duration }{
		{time.Millisecond, time.Second},
		{100 * time.Millisecond, 3 * time.Second},
		{0, time.Second},
	} {
		p.after(time.Minute).begins(true)
		p.after(c.cost).end(p.now, c.cost)
		p.after(c.within * 9 / 10).waits()
		p.after(c.within / 10)
	}
	p.begins(true)
	p.end(p.now, time.Hour)
	p.request(p.now) // in between
	p.begins(true)
	p.end(p.now, 0)
	p.after(time.Second).begins(true)
}

// TestRescanPlanBudgetMeanwhile: a change that comes while a rescan runs waits
// until the next one is affordable after that; a request does not.
func TestRescanPlanBudgetMeanwhile(t *testing.T) {
	p := newPlanTest(t)
	p.rescanned(100 * time.Millisecond)
	p.after(time.Minute).change(p.now)
	p.begins(false)
	p.after(50 * time.Millisecond).change(p.now)
	p.after(50*time.Millisecond).end(p.now, 100*time.Millisecond)
	p.after(2800 * time.Millisecond).waits()
	p.after(200 * time.Millisecond).begins(false)
	p.after(50 * time.Millisecond).request(p.now)
	p.after(50*time.Millisecond).end(p.now, 100*time.Millisecond)
	p.begins(true)
}
