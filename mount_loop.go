package kernstream

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/kernstream/kernstream/poller"
)

// A mountSource finds out how a mount table changes. Each way to follow one
// (see [MountVia]) is a mountSource; the loop below does the rest for all of
// them. Its methods are called by the loop's goroutine.
type mountSource interface {
	via() MountVia

	// wake gets a token when look may find something that changed since the
	// source was made.
	wake() <-chan struct{}

	// rest is how long a source that was just woken, and began to look then,
	// is better left alone.
	rest(began time.Time) time.Duration

	// ended is closed when the namespace has come to its end; over looks
	// whether that has happened, without waiting.
	ended() <-chan struct{}
	over() bool

	// look adds to d what changed since the last look: everything, the first
	// time. With rescan it looks at what wakes nobody, too, or sees to it that a
	// later look does. resync tells that some of it was found that way. The
	// error is ctx's, or an *OpError that ends the stream.
	look(ctx context.Context, rescan bool, d *mountDelta) (resync bool, err error)

	// close lets go of everything. It is called once.
	close()
}

// A mountLoop turns what a source finds into events at the right time.
//
// It always waits for everything at once: the source, the consumer, the
// timers and the end. So the table is followed while the consumer is slow, and
// the event that waits for it is always the latest.
type mountLoop struct {
	source   mountSource
	rescan   <-chan struct{}
	every    time.Duration // between rescans
	coalesce func(*MountEvent) time.Duration
	maxDelay time.Duration // 0: the default
	initial  bool          // the event to deliver next is the initial one

	delta mountDelta
	when  time.Time   // of the look that changed it last
	event *MountEvent // made of delta; nil: not made yet

	// While the source rests, it is not looked at when it is woken.
	rest    *time.Timer
	resting bool

	// While a window is open, the delta is held until quiet has passed
	// without a change, at the latest until limit.
	window *time.Timer
	quiet  time.Duration // 0: no window is open
	limit  time.Time
}

func newMountLoop(options *MountOptions, source mountSource, rescan <-chan struct{}) *mountLoop {
	l := &mountLoop{
		source:   source,
		rescan:   rescan,
		every:    options.Rescan,
		coalesce: options.Coalesce,
		maxDelay: options.MaxDelay,
		initial:  !options.NoInitial,
	}
	return l
}

// begin takes the table from which the changes count. When it returns an error,
// the source is closed.
func (l *mountLoop) begin(ctx context.Context) error {
	begun := false
	defer func() {
		if !begun { // by an error, or a panic of the filter
			l.source.close()
		}
	}()
	if err := l.look(ctx, false); err != nil {
		return err
	}
	if !l.initial {
		l.delta.reset()
	}
	begun = true
	return nil
}

// run is the life of a stream after begin, until ctx is done or the source has
// ended.
func (l *mountLoop) run(ctx context.Context, c chan<- *MountEvent) error {
	closed := false
	release := func() {
		if !closed {
			closed = true
			l.source.close()
		}
	}
	defer release()

	l.window, l.rest = stoppedTimer(), stoppedTimer()
	var ticks <-chan time.Time
	if l.every > 0 {
		ticker := time.NewTicker(l.every)
		defer ticker.Stop()
		ticks = ticker.C
	}
	for {
		var out chan<- *MountEvent // nil: nothing to deliver
		if l.initial || !l.delta.empty() && l.quiet == 0 {
			out = c
			l.makeEvent()
		}
		wake := l.source.wake()
		if l.resting {
			wake = nil
		}
		var err error
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case out <- l.event:
			l.delivered()
		case <-wake:
			begin := time.Now()
			err = l.update(ctx, false)
			if rest := l.source.rest(begin); rest > 0 {
				l.resting = true
				l.rest.Reset(rest)
			}
		case <-l.rest.C:
			l.resting = false
		case <-l.rescan:
			err = l.update(ctx, true)
		case <-ticks:
			err = l.update(ctx, true)
		case <-l.window.C:
			l.quiet = 0
		case <-l.source.ended():
			// What the process did last is still delivered, but holds up
			// nothing else.
			if err := l.look(ctx, false); isOpError(err) {
				return err
			}
			release()
			return l.flush(ctx, c)
		}
		if err != nil {
			return l.ending(err)
		}
	}
}

// stoppedTimer returns a timer to be set by Reset.
func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// ending is what the stream ends with when err came up. The natural end, if it
// has been there already, goes before a cancel that hid it.
func (l *mountLoop) ending(err error) error {
	if !isOpError(err) && l.source.over() {
		return io.EOF
	}
	return err
}

// flush delivers what is left at the natural end.
func (l *mountLoop) flush(ctx context.Context, c chan<- *MountEvent) error {
	if l.initial || !l.delta.empty() {
		l.makeEvent()
		select {
		case c <- l.event:
		case <-ctx.Done():
		}
	}
	return io.EOF
}

func (l *mountLoop) delivered() {
	l.initial = false
	l.delta.reset()
	l.event = nil
}

// look lets the source look at the table.
func (l *mountLoop) look(ctx context.Context, rescan bool) error {
	resync, err := l.source.look(ctx, rescan, &l.delta)
	if err != nil {
		return err
	}
	if l.delta.looked(resync) || l.when.IsZero() {
		l.when = time.Now()
		l.event = nil
	}
	return nil
}

// update looks at the table, and opens, prolongs or closes the window.
func (l *mountLoop) update(ctx context.Context, rescan bool) error {
	before := l.delta.merged
	if err := l.look(ctx, rescan); err != nil {
		return err
	}
	switch {
	case l.delta.empty():
		// Everything was undone.
		l.quiet = 0
		l.window.Stop()
	case l.delta.merged == before:
		// Nothing was found.
	case l.quiet > 0:
		l.hold()
	case before == 0 && l.coalesce != nil && !l.initial:
		l.makeEvent()
		if l.quiet = max(0, l.coalesce(l.event)); l.quiet > 0 {
			limit := l.maxDelay
			if limit <= 0 {
				limit = max(l.quiet, defaultMaxDelay)
			}
			l.limit = time.Now().Add(limit)
			l.hold()
		}
		l.event = nil // the user's function may have changed it
	}
	return nil
}

// hold keeps the delta back for the time of quiet, as far as the limit allows.
func (l *mountLoop) hold() {
	l.window.Reset(min(l.quiet, time.Until(l.limit)))
}

// makeEvent makes l.event show the delta.
func (l *mountLoop) makeEvent() {
	if l.event != nil {
		return
	}
	l.event = l.delta.event()
	l.event.When = l.when
	l.event.Initial = l.initial
	l.event.Via = l.source.via()
}

// arm starts a goroutine that calls woken each time file wakes, until that
// fails or file is closed, and then failed with the error. What happens after arm
// has returned is not missed.
//
// The goroutine stays inside one Wait for the life of the file: each entry
// would erase a change that came before it. Whether there is one cannot be
// asked of a mountinfo file, for asking would acknowledge it, so each call of
// check counts as one. The first does not: it says that the waiting has begun.
func arm(waiters *sync.WaitGroup, file *poller.File, woken func() error, failed func(error)) {
	armed := make(chan struct{})
	begun := sync.OnceFunc(func() { close(armed) })
	waiters.Go(func() {
		defer begun()
		first := true
		failed(file.Wait(func(int) (bool, error) {
			if first {
				first = false
				begun()
				return false, nil
			}
			return false, woken()
		}))
	})
	<-armed
}
