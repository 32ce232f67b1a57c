package kernstream

import (
	"context"
	"time"

	"github.com/kernstream/kernstream/internal/pidfd"
)

// A processStream is a watch with a stream of its own.
type processStream struct {
	Watch
	Stream[*ProcessEvent]
	c chan *ProcessEvent // Stream.C, to send on

	// Guarded by processes.mu, and the last two are final once C is closed.
	first   *ProcessEvent   // to be sent next, if it was made already
	watches *contextWatches // those with the same context; nil: it has no end
	closed  bool            // C is
	err     *error          // nil: it came to its natural end, or was closed
	own     bool            // its context was the reason
}

func newProcessStream(options *ProcessOptions) *processStream {
	s := &processStream{}
	s.Watch.init(options)
	s.c = make(chan *ProcessEvent, s.until)
	s.Watch.stream = s
	s.Stream = Stream[*ProcessEvent]{C: s.c, end: (*processEnding)(s)}
	return s
}

// processEnding is how a processStream ends.
type processEnding processStream

func (e *processEnding) Err() error { return processes.streamErr((*processStream)(e)) }

func (e *processEnding) Close() error {
	processes.closeStream((*processStream)(e))
	for range e.c { // it is closed
	}
	return nil
}

func (e *processEnding) left() bool { return e.own }

// A contextWatches are the streams with one context, which have one hold on it.
type contextWatches struct {
	ctx      context.Context
	streams  watchList
	release  func() bool // nil: not there yet
	dissolve bool        // it has no streams any more
}

// addStream lets s watch the process that was opened, until ctx is done.
func (t *processTable) addStream(ctx context.Context, s *processStream, target Target, o openProcess) error {
	done := ctx.Done()
	var d departures
	t.mu.Lock()
	p, err := t.enter(o)
	if err != nil {
		t.settleSet(&d)
		t.mu.Unlock()
		t.depart(&d)
		return processError(operation(err, "watch"), target.String(), err)
	}
	var arm *contextWatches
	if done != nil {
		if s.watches = t.contexts[done]; s.watches == nil {
			arm = &contextWatches{ctx: ctx}
			s.watches = arm
			if t.contexts == nil {
				t.contexts = map[<-chan struct{}]*contextWatches{}
			}
			t.contexts[done] = arm
		}
		s.watches.streams.push(&s.Watch, ofOwner)
	}
	t.hook(&s.Watch, p, &d)
	t.mu.Unlock()
	t.depart(&d)
	if arm != nil {
		t.arm(arm)
	}
	return nil
}

// arm takes hold of a context. It is not done under the lock, since a context
// may be of any type.
func (t *processTable) arm(c *contextWatches) {
	release := context.AfterFunc(c.ctx, func() { t.cancel(c) })
	t.mu.Lock()
	c.release = release
	dissolved := c.dissolve
	t.mu.Unlock()
	if dissolved {
		release()
	}
}

// batch is how much is done under the lock at once.
const batch = 256

// cancel ends the streams of a context that is done. A process that has ended
// goes before that.
func (t *processTable) cancel(c *contextWatches) {
	cause := context.Cause(c.ctx)
	for more := true; more; {
		now := time.Now()
		var d departures
		t.mu.Lock()
		for range batch {
			w := c.streams.first
			if w == nil {
				break
			}
			if state, err := pidfd.Poll(int(w.process.fd)); err == nil {
				t.look(w.process, state, now, &d)
				t.settle(w.process, &d)
			}
			if c.streams.first == w {
				w.stream.err, w.stream.own = &cause, true
				t.abandon(w, &d)
			}
		}
		more = c.streams.first != nil
		t.mu.Unlock()
		t.depart(&d)
	}
}

// abandon ends a stream before its time. What it was told and has not been
// received is lost.
func (t *processTable) abandon(w *Watch, d *departures) {
	t.unhook(w)
	for {
		select {
		case <-w.stream.c:
			continue
		default:
		}
		break
	}
	t.endStream(w.stream, d)
	t.settle(w.process, d)
}

// endStream leaves s to be closed.
func (t *processTable) endStream(s *processStream, d *departures) {
	s.ended = true
	if c := s.watches; c != nil {
		c.streams.remove(&s.Watch, ofOwner)
		s.watches = nil
		if c.streams.first == nil {
			c.dissolve = true
			delete(t.contexts, c.ctx.Done())
			if c.release != nil {
				d.release = append(d.release, c.release)
			}
		}
	}
	d.streams.push(&s.Watch, ofOwner)
}

// closeStream ends s and waits until it is closed.
func (t *processTable) closeStream(s *processStream) {
	var d departures
	t.mu.Lock()
	if !s.ended {
		t.abandon(&s.Watch, &d)
	}
	t.mu.Unlock()
	t.depart(&d)
	t.mu.Lock()
	for !s.closed {
		t.changed.Wait()
	}
	t.mu.Unlock()
}

func (t *processTable) streamErr(s *processStream) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.err == nil || !s.ended {
		return nil
	}
	return *s.err
}
