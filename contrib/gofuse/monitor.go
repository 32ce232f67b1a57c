package gofuse

import (
	"context"
	"sync/atomic"
	"time"
)

// A handler runs where its request was read, because handing each request to
// another goroutine takes as long as many handlers. But one that waits must not keep
// the others from being read, INTERRUPT least of all. So a monitor looks every
// tick whether a worker is still at the request of the last look. That worker is
// relieved: another one reads on, and from then on the handler's cancel channel
// follows the context of its request. A handler that is faster costs nothing.

// tick is how often the monitor looks.
const tick = time.Millisecond

// restAfter is after how many looks at workers that did nothing it waits for a
// request.
const restAfter = 20

type monitor struct {
	resting atomic.Bool
	wake    chan struct{}
}

// start looks at lanes until stop is called.
func (m *monitor) start(lanes []*lane) (stop func()) {
	m.wake = make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.watch(ctx, lanes)
	}()
	return func() {
		cancel()
		<-done
	}
}

// awake tells the monitor that there is something to look at.
func (m *monitor) awake() {
	if m.resting.Load() && m.resting.CompareAndSwap(true, false) {
		m.wake <- struct{}{}
	}
}

func (m *monitor) watch(ctx context.Context, lanes []*lane) {
	timer := time.NewTimer(tick)
	defer timer.Stop()
	seen := make([]uint64, len(lanes))
	for quiet := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		quiet++
		if !look(lanes, seen) {
			quiet = 0
		}
		if quiet >= restAfter && !m.rest(ctx, lanes, seen) {
			return
		}
		timer.Reset(tick)
	}
}

// rest waits until a worker says that it has something to do, or has begun before
// it could know that it should say so.
func (m *monitor) rest(ctx context.Context, lanes []*lane, seen []uint64) bool {
	m.resting.Store(true)
	if !look(lanes, seen) && m.resting.CompareAndSwap(true, false) {
		return true
	}
	select {
	case <-ctx.Done():
		return false
	case <-m.wake:
		return true
	}
}

// look relieves workers that are at the request of the last look. It tells whether
// all of them wait for a request, and did at the last look.
func look(lanes []*lane, seen []uint64) (quiet bool) {
	quiet = true
	for i, l := range lanes {
		w := l.leader.Load()
		state := w.state.Load()
		if state != seen[i] || state&1 != 0 {
			quiet = false
		}
		if state == seen[i] && state&1 != 0 && w.state.CompareAndSwap(state, relieved) {
			w.relieve()
			state = 0
		}
		seen[i] = state
	}
	return quiet
}

// relieve lets another worker read, and lets go-fuse know when nobody waits for
// this one's answer any more.
func (w *worker) relieve() {
	r, s := w.request, w.lane.run.server
	w.lane.lead()
	close(w.replaced)
	ctx := r.Context()
	context.AfterFunc(ctx, func() {
		if context.Cause(ctx) != context.Canceled {
			s.interrupt(r, w)
		}
	})
}
