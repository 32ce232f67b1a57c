package kernstream

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// processHandles are the Processes of a watcher.
type processHandles map[*Process]struct{}

func (s *processHandles) add(h *Process) {
	if *s == nil {
		*s = processHandles{}
	}
	(*s)[h] = struct{}{}
}

// A processFeed is what stands between the table and the channel of a
// ProcessWatcher: the watches that have something to tell, first come, first
// served, with each phase by itself. Its goroutine offers the event of the first one to the consumer, if
// that was not waiting already.
// The fields are guarded by the lock of the table.
type processFeed struct {
	table *processTable
	wake  chan struct{}        // has a token when the offer is to be looked at again
	c     chan<- *ProcessEvent // nil before run; nobody sends once closed is set

	watches watchList             // that have not ended
	ready   [Reaped + 1]watchList // that have a phase to tell, by the phase; each is in the order of turns
	turn    uint64                // the last one that was given away
	offered *Watch                // whose event the goroutine offers
	handles processHandles
	closed  bool
	err     error // of the table
}

// run offers events to the consumer until ctx is done.
func (f *processFeed) run(ctx context.Context, c chan<- *ProcessEvent) error {
	sent := false
	defer func() { f.close(sent) }()
	f.table.mu.Lock()
	f.c = c
	f.table.mu.Unlock()
	for ctx.Err() == nil {
		event, err := f.next(sent)
		if err != nil {
			return err
		}
		out := c
		if event == nil {
			out = nil
		}
		sent = false
		select {
		case out <- event:
			sent = true
		case <-f.wake:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// next returns the event to offer, or nil; sent tells that the one before was
// received.
func (f *processFeed) next(sent bool) (*ProcessEvent, error) {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	f.conclude(sent)
	w := f.first()
	if w == nil {
		return nil, nil
	}
	f.offered = w
	return w.event(), nil
}

// first returns the watch whose turn it is, or nil.
func (f *processFeed) first() *Watch {
	exited, reaped := f.ready[Exited].first, f.ready[Reaped].first
	if exited == nil || reaped != nil && reaped.turns[Reaped] < exited.turns[Exited] {
		return reaped
	}
	return exited
}

// conclude notes what became of the offer.
func (f *processFeed) conclude(sent bool) {
	w := f.offered
	if w == nil {
		return
	}
	f.offered = nil
	if sent {
		f.received(w)
	}
	f.table.changed.Broadcast()
}

// received notes that an event of w was.
func (f *processFeed) received(w *Watch) {
	if w.told < w.queued {
		f.leave(w, w.told)
	}
	w.told++
	w.queued = max(w.queued, w.told)
	if w.told == w.until && !w.ended {
		w.ended = true
		f.watches.remove(w, ofOwner)
	}
}

// queue hands what w has to tell to the consumer, if that is waiting and
// nobody is before w: no other goroutine has to wake up for it. Otherwise it lets
// w wait.
func (f *processFeed) queue(w *Watch) {
	waiting := f.first() != nil
	for ahead := waiting || f.offered != nil; !ahead && w.pending() > 0; {
		select {
		case f.c <- w.event():
			f.received(w)
		default:
			ahead = true
		}
	}
	for seen := min(w.process.known, w.until); w.queued < seen; w.queued++ {
		f.turn++
		w.turns[w.queued] = f.turn
		f.ready[w.queued].push(w, ofQueue+int(w.queued))
		if !waiting {
			f.kick()
		}
	}
}

// unqueue takes all its turns from w.
func (f *processFeed) unqueue(w *Watch) {
	for ; w.queued > w.told; w.queued-- {
		f.leave(w, w.queued-1)
	}
}

// leave takes the turn for a phase from w.
func (f *processFeed) leave(w *Watch, phase uint8) {
	f.ready[phase].remove(w, ofQueue+int(phase))
}

// kick lets the goroutine look at its offer again.
func (f *processFeed) kick() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// fail ends the stream with an error of the table.
func (f *processFeed) fail(err error) {
	f.err = err
	f.kick()
}

// running returns an error after the end of the stream.
func (f *processFeed) running(name string) error {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	if f.closed {
		return processError("watch", name, os.ErrClosed)
	}
	return nil
}

// enter calls use with the entry of a process that was opened as target.
func (f *processFeed) enter(target Target, o openProcess, use func(*process, *departures)) error {
	t := f.table
	var d departures
	var err error
	t.mu.Lock()
	if f.closed {
		unix.Close(o.fd)
		err = os.ErrClosed
	} else {
		var p *process
		if p, err = t.enter(o); err == nil {
			use(p, &d)
		} else {
			t.settleSet(&d)
		}
	}
	t.mu.Unlock()
	t.depart(&d)
	if err != nil {
		return processError(operation(err, "watch"), target.String(), err)
	}
	return nil
}

// add lets w watch p.
func (f *processFeed) add(w *Watch, p *process, d *departures) {
	f.watches.push(w, ofOwner)
	f.table.hook(w, p, d)
}

// end takes w out of everything.
func (f *processFeed) end(w *Watch, d *departures) {
	if w.ended {
		return
	}
	w.ended = true
	f.watches.remove(w, ofOwner)
	f.unqueue(w)
	f.table.unhook(w)
	f.table.settle(w.process, d)
}

func (f *processFeed) stop(w *Watch) (received bool) {
	t := f.table
	var d departures
	t.mu.Lock()
	f.end(w, &d)
	// Its event may be on offer: it is received or withdrawn, soon.
	for f.offered == w {
		f.kick()
		t.changed.Wait()
	}
	received = w.told == w.until
	t.mu.Unlock()
	t.depart(&d)
	return received
}

// release lets go of a Process.
func (f *processFeed) release(h *Process, d *departures) {
	if h.closed {
		return
	}
	h.closed = true
	delete(f.handles, h)
	h.process.handles--
	f.table.settle(h.process, d)
}

// close ends all watches and lets go of all Processes; sent tells that the event
// on offer was received.
func (f *processFeed) close(sent bool) {
	f.table.mu.Lock()
	f.closed = true
	f.conclude(sent)
	f.table.mu.Unlock()
	inBatches(f.closeBatch)
	f.table.awaitRound() // the last events may have been received just before
}

// closeBatch does some of that.
func (f *processFeed) closeBatch() (more bool) {
	t := f.table
	var d departures
	defer t.depart(&d)
	t.mu.Lock()
	defer t.mu.Unlock()
	for range batch {
		switch {
		case len(f.handles) > 0:
			for h := range f.handles {
				f.release(h, &d)
				break
			}
		case f.watches.first != nil:
			f.end(f.watches.first, &d)
		default:
			return false
		}
	}
	return true
}
