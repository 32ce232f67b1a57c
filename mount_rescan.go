package kernstream

import "time"

// When the fanotify path looks at the attributes of all mounts.
//
// fanotify tells of mounts that come, go and move, never of a change of options
// or propagation. For most of these the kernel wakes whoever polls mountinfo,
// but it does so for the others, too. So a wake that came with an event may
// hide a change; one without an event is a change for sure.

// rescanShare bounds the work: a rescan is not begun before this many times the
// duration of the last one has passed.
const rescanShare = 30

// rescanDelay is how late a change may be found that hides behind an event, as
// long as rescanShare allows it.
const rescanDelay = time.Second

// A rescanPlan decides when the next rescan begins.
type rescanPlan struct {
	periodic bool // nobody is woken, so there is one after the other

	due     time.Time // when the next one is to begin; zero: none is needed
	alone   bool      // the next one is for a change that came alone
	asked   bool      // somebody asked for it
	running bool
	resync  bool          // what the running one finds is a resync
	ended   time.Time     // the last one
	cost    time.Duration // of the last one
}

// pause is how long it takes for the next rescan to be affordable.
func (p *rescanPlan) pause() time.Duration { return rescanShare * p.cost }

// hidden notes that there may be a change behind an event.
func (p *rescanPlan) hidden(now time.Time) {
	// A little early, so that it is found in time.
	p.need(now.Add(max(rescanDelay, p.pause())*95/100), false)
}

// change notes that there is a change.
func (p *rescanPlan) change(now time.Time) {
	due := p.ended.Add(p.pause())
	if due.Before(now) {
		due = now
	}
	p.need(due, true)
}

// request notes that somebody asks for a rescan now, whatever it costs.
func (p *rescanPlan) request(now time.Time) {
	p.need(now, false)
	p.asked = true
}

func (p *rescanPlan) need(due time.Time, alone bool) {
	if p.due.IsZero() {
		p.due, p.alone = due, alone
		return
	}
	p.alone = p.alone && alone
	if due.Before(p.due) {
		p.due = due
	}
}

// begin begins the next rescan if it is time.
func (p *rescanPlan) begin(now time.Time) bool {
	if p.running || p.due.IsZero() || now.Before(p.due) {
		return false
	}
	p.running = true
	p.resync = !p.alone
	p.due, p.asked = time.Time{}, false
	return true
}

// end notes that the running rescan has ended, and took cost of a processor.
func (p *rescanPlan) end(now time.Time, cost time.Duration) {
	p.running = false
	p.ended, p.cost = now, cost
	if p.periodic {
		p.hidden(now)
	}
	// What came up meanwhile did not know that.
	if affordable := now.Add(p.pause() * 95 / 100); !p.due.IsZero() && !p.asked && p.due.Before(affordable) {
		p.due = affordable
	}
}
