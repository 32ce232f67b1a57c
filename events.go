package kernstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// An Event is something that the kernel reported. Only pointers implement it
// in this package: *[MountEvent] and so on. Each has an exported field When,
// which Time returns, and implements [encoding/json.Marshaler].
type Event interface {
	Time() time.Time // when the library read it
	String() string  // one line for people
}

// A Stream is events on their way from one source to one consumer.
//
// C is unbuffered, so an event that was sent was received, unless the source says
// otherwise. It is closed at the end, and by then everything that the stream held
// is gone: its goroutines, its descriptors, its hold on the context. An event that
// owns a descriptor and was delivered belongs to the consumer, and may outlive the
// stream.
//
// A stream ends when its context is done, when Close is called, when its source
// comes to its natural end, or when the source fails. What happens first decides
// what [Stream.Err] returns.
type Stream[T Event] struct {
	C <-chan T // closed at the end

	end ending
}

// ending is how a stream ends: what is behind Err and Close.
type ending interface {
	Err() error
	Close() error
	// left tells, once the stream has ended, whether its own context was the
	// reason.
	left() bool
}

// Err returns why the stream ended: nil while it runs, after Close and after a
// natural end; the cause of the context (see [context.Cause]) after that was
// done; the error of the source otherwise, which is an *[OpError] for every
// source of this package. It is final once C is closed.
func (s *Stream[T]) Err() error { return s.end.Err() }

// Close ends the stream and returns nil when nothing is left of it. It may be
// called again, and from the loop that receives from C. An event that was not
// received yet is lost; one that owns a descriptor is closed.
func (s *Stream[T]) Close() error { return s.end.Close() }

// NewStream returns a stream whose events come from produce, which runs on a
// goroutine of its own: for tests that need a source that does what they say,
// and for sources that this package does not have.
//
// emit hands one event to the consumer, and waits until it is received. It
// returns false when the stream is to end; the event was then not delivered,
// and emit has closed it if it is an [io.Closer]. emit may be called from
// several goroutines, which must have ended before produce returns.
//
// The ctx that produce gets is done when ctx is done and when Close is called.
// produce must return soon after; it is called exactly once, even if ctx is done
// already, so that it can release what it holds. When it returns, the stream
// ends:
//
//   - io.EOF is the natural end of the source, whether or not ctx is done.
//   - An *[OpError] is a failure of the source, whether or not ctx is done.
//   - Anything else, nil included, is taken for an effect of the end of ctx if
//     that is done: Err is then its cause, or nil after Close.
//   - If ctx is not done, Err is what produce returned.
//
// A panic of produce is not recovered.
func NewStream[T Event](ctx context.Context, produce func(ctx context.Context, emit func(T) bool) error) *Stream[T] {
	return newStream(ctx, 0, func(ctx context.Context, r *run[T]) error {
		return produce(ctx, r.emit)
	})
}

// newStream is [NewStream] for the sources of this package. They may send on
// r.c themselves, as long as they select on ctx.Done, too. A buffer is only for
// sources that say so.
func newStream[T Event](ctx context.Context, buffer int, produce func(ctx context.Context, r *run[T]) error) *Stream[T] {
	r := &run[T]{c: make(chan T, buffer), parent: ctx, done: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	go r.run(produce)
	return &Stream[T]{C: r.c, end: r}
}

// errStreamClosed is the cause of a stream's context after Close.
var errStreamClosed = fmt.Errorf("kernstream: stream closed: %w", os.ErrClosed)

// run is a stream with a goroutine of its own.
type run[T Event] struct {
	c      chan T
	parent context.Context
	ctx    context.Context // done when the stream is to end
	cancel context.CancelCauseFunc

	err  atomic.Pointer[error] // nil until the end
	own  bool                  // the context was the reason; valid after done
	done chan struct{}         // closed after c
}

func (r *run[T]) run(produce func(ctx context.Context, r *run[T]) error) {
	err := error(&OpError{Op: "produce", Source: "stream", Err: errors.New("ended by runtime.Goexit")})
	// Deferred for the sake of a produce that calls runtime.Goexit, as
	// testing's FailNow does: a consumer must not wait for ever.
	defer func() {
		// A panic goes on as it came. A consumer must not see an end, and
		// leave before the runtime has told what happened.
		if p := recover(); p != nil {
			panic(p)
		}
		if cancelled := r.ctx.Err() != nil; cancelled && r.takeBack() && err == io.EOF {
			err = r.ctx.Err() // the consumer did not get as far as to the end
		}
		err, r.own = r.reason(err)
		r.err.Store(&err)
		r.cancel(nil) // lets go of the parent
		close(r.c)
		close(r.done)
	}()
	err = produce(r.ctx, r)
}

// reason turns what produce returned into what Err returns.
func (r *run[T]) reason(err error) (_ error, own bool) {
	if end, ok := err.(sourceEnd); ok {
		return end.err, false
	}
	switch {
	case err == io.EOF:
		return nil, false
	case isOpError(err):
		return err, false
	case r.ctx.Err() != nil:
		cause := context.Cause(r.ctx)
		if cause == errStreamClosed {
			return nil, false
		}
		return cause, true
	case r.parent.Err() != nil:
		// The parent tells its children one after the other. One that was
		// told before this one, and made produce return, is no other reason.
		return context.Cause(r.parent), true
	}
	return err, false
}

// sourceEnd is what a producer of this package returns for an end that came
// before any cancel.
type sourceEnd struct{ err error }

func (e sourceEnd) Error() string { return e.err.Error() }

// emit sends e to the consumer, or closes it and returns false.
func (r *run[T]) emit(e T) bool { return offer(r.ctx, r.c, e) }

// offer sends e on c, or closes it and returns false when ctx is done.
func offer[T Event](ctx context.Context, c chan<- T, e T) bool {
	// A consumer that is always ready must not keep a stream alive that is to
	// end.
	if ctx.Err() == nil {
		// Most of the time a buffered channel has room, and a select with one
		// case is much cheaper than one with two.
		select {
		case c <- e:
			return true
		default:
		}
		select {
		case c <- e:
			return true
		case <-ctx.Done():
		}
	}
	discard(e)
	return false
}

// takeBack empties the buffer and closes the events that it held. It tells whether
// there were any.
func (r *run[T]) takeBack() (taken bool) {
	for {
		select {
		case e, ok := <-r.c:
			if !ok {
				return taken
			}
			discard(e)
			taken = true
		default:
			return taken
		}
	}
}

// discard closes an event that was not delivered, if it owns something.
func discard[T Event](e T) {
	if c, ok := any(e).(io.Closer); ok {
		c.Close()
	}
}

func (r *run[T]) Err() error {
	if err := r.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (r *run[T]) Close() error {
	r.cancel(errStreamClosed)
	<-r.done
	// After a natural end the buffer may hold what nobody will receive.
	r.takeBack()
	return nil
}

func (r *run[T]) left() bool { return r.own }

// A Source is a [Stream], or something that embeds one. It is what [Merge]
// takes.
type Source interface {
	Err() error   // see [Stream.Err]
	Close() error // see [Stream.Close]

	// forward passes the events on to c until the stream or ctx ends, and
	// closes the stream. It returns the error of a source that failed before
	// ctx was done.
	forward(ctx context.Context, c chan<- Event) error

	// identity is the same for two Sources that are one stream.
	identity() any
}

func (s *Stream[T]) identity() any { return s }

func (s *Stream[T]) forward(ctx context.Context, c chan<- Event) error {
	defer s.Close()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case e, ok := <-s.C:
			if !ok {
				if err := s.Err(); err != nil && !s.end.left() && ctx.Err() == nil {
					return sourceEnd{err}
				}
				return nil
			}
			select {
			case c <- e:
			case <-ctx.Done():
				discard(e)
			}
		}
	}
	return nil
}

// Merge returns one stream with the events of all sources. Those of one source
// keep their order; between sources there is none. With no sources the stream
// ends at once.
//
// Merge owns the sources: their C is not for anybody else any more, and they
// are closed when the merged stream ends. Their other methods (such as
// [MountWatcher.Rescan]) go on working. A source that comes to its natural end,
// is closed, or ends because its own context is done, leaves the others
// running; the merged stream ends with the last. A source that fails ends the
// merged stream at once, whose Err is then that source's.
//
// Each source costs one goroutine, and each event one more hand-over. A slow
// consumer holds all sources back, and each does then what it says about slow
// consumers. A source that is given twice counts once. Merge panics when a
// source is nil.
func Merge(ctx context.Context, sources ...Source) *Stream[Event] {
	distinct := make(map[any]Source, len(sources))
	for _, s := range sources {
		s.Err() // a nil source is found here, on the stack of who passed it
		distinct[s.identity()] = s
	}
	return newStream(ctx, 0, func(ctx context.Context, r *run[Event]) error {
		group, ctx := errgroup.WithContext(ctx)
		for _, s := range distinct {
			group.Go(func() error { return s.forward(ctx, r.c) })
		}
		return group.Wait()
	})
}
