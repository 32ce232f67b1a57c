package kernstream

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/pidfd"
	"github.com/kernstream/kernstream/poller"
)

// processes are all processes that this program watches.
var processes = newProcessTable()

// A processTable has one entry, with one pidfd, for each process that is
// watched, however many watches there are; the pidfds are in one poller.Set,
// for which one goroutine waits. The Set and the goroutine are there while the
// table has an entry.
//
// The goroutine never waits for a consumer: what it finds out goes into the
// entries, into channels that have room, and into the lists of ProcessWatchers.
// Everything happens under one lock, except what may take long or calls what is
// not ours: waiting for the goroutine, closing channels and letting go of
// contexts are put off until the lock is released (departures).
type processTable struct {
	mu      sync.Mutex
	changed sync.Cond // on mu: a stream was closed, an event offered was taken or withdrawn, or a round is over

	// A round is from when a goroutine has looked until nothing is left of what
	// has ended. One whose Set was given back may be in its last one while the
	// next goroutine is in its first.
	round  uint64   // the last one that was begun
	rounds []uint64 // those that are not over, in their order

	set      *poller.Set[*process] // nil: there is no entry
	loopDone chan struct{}         // closed when the goroutine of set has ended
	entries  map[uint64]*process   // by process.key, those with the same key in a chain
	n        int                   // how many entries
	contexts map[<-chan struct{}]*contextWatches
}

func newProcessTable() *processTable {
	t := &processTable{}
	t.changed.L = &t.mu
	return t
}

// A process is one entry of the table.
type process struct {
	place poller.ID // in the Set
	id    uint64    // of ProcessID; 0: not to be known
	fd    int32     // its pidfd, which the Set owns; -1: given back, there is nothing more to learn
	pid   int32
	known uint8 // how many phases have been seen

	handles int32     // how many Processes are open
	watches watchList // those that wait for a phase that has not been seen
	next    *process  // with the same key, or to be taken out of the Set
	end     *processEnd
}

// processEnd is what is known of a process that has exited.
type processEnd struct {
	id          ProcessID
	when        [Reaped + 1]time.Time
	statusKnown bool
	status      uint32
}

// key is what entries are found by: the number, which is at hand. Only if two
// have the same one they are compared.
func (o *openProcess) key() uint64 {
	const numberless = 1 << 63
	switch {
	case o.pid > 0:
		return uint64(o.pid)
	case pidfd.HasID():
		return o.id | numberless
	}
	return 0 // nothing can be compared
}

func (p *process) key() uint64 {
	o := openProcess{fd: int(p.fd), pid: int(p.pid), id: p.id}
	return o.key()
}

// is tells whether p is the process that was opened.
func (p *process) is(o *openProcess) bool {
	if p.fd < 0 {
		return false
	}
	if pidfd.HasID() {
		return p.id == o.id && p.id != 0
	}
	// If p still has its number, nobody else had it when o was opened.
	return o.pid > 0 && pidfd.Unreaped(int(p.fd))
}

func (p *process) processID() ProcessID {
	if p.end != nil {
		return p.end.id
	}
	boot, _ := bootID()
	return ProcessID{PID: int(p.pid), ID: p.id, Boot: boot}
}

// phases is how many the kernel tells.
func phases() uint8 {
	if pidfd.HasID() {
		return uint8(Reaped) + 1
	}
	return uint8(Exited) + 1
}

// departures is what is left to do when the lock has been released.
type departures struct {
	set       *poller.Set[*process]
	processes *process        // to be taken out of set, which closes their pidfds
	last      bool            // set has no entries any more
	done      <-chan struct{} // its goroutine has ended
	streams   watchList       // to be closed, by the link of their owner
	release   []func() bool   // of contexts
}

// enter returns the entry of a process, and makes it if there is none. It owns
// the pidfd from the call on.
func (t *processTable) enter(o openProcess) (*process, error) {
	key := o.key()
	first := t.entries[key]
	for p := first; p != nil; p = p.next {
		if key != 0 && p.is(&o) {
			unix.Close(o.fd)
			return p, nil
		}
	}
	if t.set == nil {
		if err := t.begin(); err != nil {
			unix.Close(o.fd)
			return nil, err
		}
	}
	p := &process{fd: int32(o.fd), pid: int32(o.pid), id: o.id}
	place, err := t.set.Add(o.fd, unix.EPOLLIN, p)
	if err != nil {
		unix.Close(o.fd)
		return nil, withLimit(err)
	}
	p.place = place
	p.next = first
	t.entries[key] = p
	t.n++
	return p, nil
}

// begin makes the Set and starts its goroutine.
func (t *processTable) begin() error {
	set, err := poller.NewSet[*process]()
	if err != nil {
		return withLimit(err)
	}
	t.set, t.loopDone = set, make(chan struct{})
	t.entries = map[uint64]*process{}
	go t.loop(set, t.loopDone)
	return nil
}

// settle gives the pidfd of p back if nobody waits for a phase to come, and the
// Set if that was the last.
func (t *processTable) settle(p *process, d *departures) {
	if p.fd < 0 || p.watches.first != nil || p.handles > 0 && p.known < phases() {
		return
	}
	t.forget(p)
	p.fd = -1
	d.set = t.set
	p.next, d.processes = d.processes, p
	t.n--
	t.settleSet(d)
}

// settleSet gives the Set back if it has no entry.
func (t *processTable) settleSet(d *departures) {
	if t.set != nil && t.n == 0 {
		d.set, d.last, d.done = t.set, true, t.loopDone
		t.set, t.loopDone, t.entries = nil, nil, nil
	}
}

// forget takes p out of the entries.
func (t *processTable) forget(p *process) {
	key := p.key()
	if first := t.entries[key]; first == p {
		if p.next == nil {
			delete(t.entries, key)
		} else {
			t.entries[key] = p.next
		}
	} else {
		for first.next != p {
			first = first.next
		}
		first.next = p.next
	}
	p.next = nil
}

// loop waits for the processes of set.
func (t *processTable) loop(set *poller.Set[*process], done chan<- struct{}) {
	defer close(done)
	ready := make([]poller.Ready[*process], 64)
	for running := true; running; {
		n, err := set.Wait(ready)
		now := time.Now()
		var d departures
		t.mu.Lock()
		round := t.beginRound()
		for _, r := range ready[:n] {
			t.look(r.Value, stateOf(r.Events), now, &d)
		}
		t.mu.Unlock()
		// Consumers first, on this thread, which is awake: giving descriptors
		// back takes as long as waking another one.
		runtime.Gosched()
		t.mu.Lock()
		for _, r := range ready[:n] {
			t.settle(r.Value, &d)
		}
		if err != nil && t.set == set {
			t.fail(processError("epoll_wait", "", err), &d)
		}
		// Who gives the Set back from elsewhere waits for this goroutine.
		running = t.set == set
		t.mu.Unlock()
		d.done = nil
		t.giveBack(&d)
		t.endRound(round)
		t.endStreams(&d)
	}
}

// beginRound returns the number of a new round.
func (t *processTable) beginRound() uint64 {
	t.round++
	t.rounds = append(t.rounds, t.round)
	return t.round
}

func (t *processTable) endRound(round uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i, _ := slices.BinarySearch(t.rounds, round)
	t.rounds = slices.Delete(t.rounds, i, i+1)
	t.changed.Broadcast()
}

// awaitRound waits until nothing is left of what was seen to end.
func (t *processTable) awaitRound() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for last := t.round; len(t.rounds) > 0 && t.rounds[0] <= last; {
		t.changed.Wait()
	}
}

func stateOf(events uint32) pidfd.State {
	if events&unix.EPOLLHUP != 0 {
		return pidfd.Reaped
	}
	return pidfd.Exited
}

// look notes that p has come to state, and tells its watches. The caller settles
// p.
func (t *processTable) look(p *process, state pidfd.State, now time.Time, d *departures) {
	if p.fd < 0 || uint8(state) <= p.known {
		return // it is known
	}
	if p.end == nil {
		p.end = &processEnd{id: p.processID()}
		state = p.findStatus(state)
		p.see(Exited, now)
	}
	if state == pidfd.Reaped && p.known <= uint8(Reaped) {
		if !p.end.statusKnown {
			p.findReapedStatus()
		}
		p.see(Reaped, now)
	}
	// Three rounds, so that a consumer of many streams finds an event in each,
	// and does not fall asleep between them.
	for w := p.watches.first; w != nil; w = w.links[ofProcess].next {
		w.prepare()
	}
	for w := p.watches.first; w != nil; w = w.links[ofProcess].next {
		w.send()
	}
	for w := p.watches.first; w != nil; {
		next := w.links[ofProcess].next
		t.conclude(w, d)
		w = next
	}
}

func (p *process) see(phase Phase, now time.Time) {
	p.end.when[phase] = now
	p.known = uint8(phase) + 1
}

// prepare makes the first event that a stream is to be told.
func (w *Watch) prepare() {
	if w.stream != nil && w.pending() > 0 {
		w.stream.first = w.event()
	}
}

// send sends a stream what it has not been told; its channel has room for all.
func (w *Watch) send() {
	if w.stream == nil {
		return
	}
	for ; w.pending() > 0; w.told++ {
		e := w.stream.first
		w.stream.first = nil
		if e == nil {
			e = w.event()
		}
		w.stream.c <- e
	}
}

// conclude leaves w where it belongs, now that more is known of its process.
func (t *processTable) conclude(w *Watch, d *departures) {
	if w.process.known >= w.until {
		t.unhook(w)
	}
	switch {
	case w.feed != nil:
		if w.pending() > 0 {
			w.feed.queue(w)
		}
	case w.told == w.until:
		t.endStream(w.stream, nil, d)
	}
}

// unhook takes w from those that wait for a phase of its process.
func (t *processTable) unhook(w *Watch) {
	if w.hooked {
		w.hooked = false
		w.process.watches.remove(w, ofProcess)
	}
}

// hook lets w wait for the phases of p, and tells it those that were seen.
func (t *processTable) hook(w *Watch, p *process, d *departures) {
	w.process = p
	w.hooked = true
	p.watches.push(w, ofProcess)
	w.prepare()
	w.send()
	t.conclude(w, d)
	t.settle(p, d)
}

// fail ends all watches with an error of the Set.
func (t *processTable) fail(err error, d *departures) {
	for _, p := range t.entries {
		for next := p; p != nil; p = next {
			next = p.next
			for w := p.watches.first; w != nil; w = p.watches.first {
				t.unhook(w)
				if w.feed != nil {
					w.feed.fail(err)
					continue
				}
				t.endStream(w.stream, &err, d)
			}
			p.handles = 0
			t.settle(p, d)
		}
	}
}

// depart does what was put off, without the lock. What a stream held is gone
// before it is closed.
func (t *processTable) depart(d *departures) {
	t.giveBack(d)
	t.endStreams(d)
}

// giveBack closes descriptors.
func (t *processTable) giveBack(d *departures) {
	for p := d.processes; p != nil; {
		var places [64]poller.ID
		n := 0
		for ; p != nil && n < len(places); p = p.next {
			places[n] = p.place
			n++
		}
		d.set.Remove(places[:n]...)
	}
	if d.last {
		d.set.Close()
		if d.done != nil {
			<-d.done
		}
	}
}

// endStreams lets go of contexts, and closes the channels of streams.
func (t *processTable) endStreams(d *departures) {
	for _, release := range d.release {
		release()
	}
	if d.streams.first == nil {
		return
	}
	for w := d.streams.first; w != nil; w = w.links[ofOwner].next {
		close(w.stream.c)
	}
	t.mu.Lock()
	for w := d.streams.first; w != nil; w = w.links[ofOwner].next {
		w.stream.closed = true
	}
	t.changed.Broadcast()
	t.mu.Unlock()
}

// batch is how much is done under the lock at once.
const batch = 256

// inBatches calls step until it returns false: that is when nothing is left, or
// others have the rest in hand. What takes long in it is the kernel's part of
// the last close of a pidfd, so where there is more than one batch, all
// processors share it. Their locks in the kernel leave nothing to gain beyond a
// few of them.
func inBatches(step func() (more bool)) {
	if !step() {
		return
	}
	var others sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 4) - 1 {
		others.Go(func() {
			for step() {
			}
		})
	}
	for step() {
	}
	others.Wait()
}

// operation returns the system call that failed, or step.
func operation(err error, step string) string {
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		return call.Syscall
	}
	return step
}
