package kernstream

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/kernstream/kernstream/internal/pidfd"
)

// A processStream is a watch with a stream of its own.
type processStream struct {
	Watch
	Stream[*ProcessEvent]
	c chan *ProcessEvent // Stream.C, to send on

	err atomic.Pointer[error] // nil: it runs, came to its natural end, or was closed

	// Guarded by processes.mu, and the last one is final once C is closed.
	first   *ProcessEvent   // to be sent next, if it was made already
	watches *contextWatches // those with the same context; nil: it has no end
	closed  bool            // C is
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

// Err takes no lock: many streams that end together are asked one by one.
func (e *processEnding) Err() error {
	if err := e.err.Load(); err != nil {
		return *err
	}
	return nil
}

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
	done     <-chan struct{} // of ctx, which is not called under the lock
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
			arm = &contextWatches{ctx: ctx, done: done}
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

// cancel ends the streams of a context that is done, except those whose process
// has ended before.
func (t *processTable) cancel(c *contextWatches) {
	t.lookAtAll(c)
	cause := context.Cause(c.ctx)
	inBatches(func() (more bool) { return t.cancelBatch(c, &cause) })
}

// lookAtAll looks at the processes of the streams of c, without waiting.
func (t *processTable) lookAtAll(c *contextWatches) {
	now := time.Now()
	var d departures
	t.mu.Lock()
	round := t.beginRound()
	var all []*process
	var fds []int32
	for w := c.streams.first; w != nil; w = w.links[ofOwner].next {
		all = append(all, w.process)
		fds = append(fds, w.process.fd)
	}
	for i, state := range pidfd.PollMany(fds) {
		t.look(all[i], state, now, &d)
		t.settle(all[i], &d)
	}
	t.mu.Unlock()
	t.giveBack(&d)
	t.endRound(round)
	t.endStreams(&d)
}

// cancelBatch ends some of them.
func (t *processTable) cancelBatch(c *contextWatches, cause *error) (more bool) {
	var d departures
	defer t.depart(&d)
	t.mu.Lock()
	defer t.mu.Unlock()
	for range batch {
		w := c.streams.first
		if w == nil {
			break
		}
		w.stream.own = true
		t.abandon(w, cause, &d)
	}
	return c.streams.first != nil
}

// abandon ends a stream before its time, with an error or nil. What it was told
// and has not been received is lost.
func (t *processTable) abandon(w *Watch, err *error, d *departures) {
	t.unhook(w)
	for {
		select {
		case <-w.stream.c:
			continue
		default:
		}
		break
	}
	t.endStream(w.stream, err, d)
	t.settle(w.process, d)
}

// endStream leaves s to be closed.
func (t *processTable) endStream(s *processStream, err *error, d *departures) {
	s.ended = true
	s.err.Store(err)
	if c := s.watches; c != nil {
		c.streams.remove(&s.Watch, ofOwner)
		s.watches = nil
		if c.streams.first == nil {
			c.dissolve = true
			delete(t.contexts, c.done)
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
		t.abandon(&s.Watch, nil, &d)
	}
	t.mu.Unlock()
	t.depart(&d)
	t.mu.Lock()
	for !s.closed {
		t.changed.Wait()
	}
	t.mu.Unlock()
}
