package kernstream

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kernstream/kernstream/internal/testenv"
)

// bufferEvent is an event that owns something.
type bufferEvent struct {
	number int
	closed atomic.Int32
}

func (e *bufferEvent) Time() time.Time { return time.Time{} }
func (e *bufferEvent) String() string  { return "" }
func (e *bufferEvent) Close() error    { e.closed.Add(1); return nil }

// fill returns a stream with a buffer that holds n events, and those events.
func fill(ctx context.Context, n int, end error) (*Stream[*bufferEvent], []*bufferEvent) {
	events := make([]*bufferEvent, n)
	full := make(chan struct{})
	s := newStream(ctx, n, func(ctx context.Context, r *run[*bufferEvent]) error {
		for i := range events {
			events[i] = &bufferEvent{number: i}
			r.emit(events[i])
		}
		close(full)
		if end == nil {
			<-ctx.Done()
		}
		return end
	})
	<-full
	return s, events
}

// TestBufferIsTakenBack: what is still in the buffer when Close or a cancel
// comes is not delivered any more, but closed.
func TestBufferIsTakenBack(t *testing.T) {
	testenv.NoLeaks(t)
	for _, how := range []string{"Close", "cancel"} {
		ctx, cancel := context.WithCancel(t.Context())
		s, events := fill(ctx, 8, nil)
		first := <-s.C
		if how == "Close" {
			s.Close()
		} else {
			cancel()
			<-s.end.(*run[*bufferEvent]).done
		}
		if e, ok := <-s.C; ok {
			t.Errorf("%s: event %d came after the end", how, e.number)
		}
		for _, e := range events {
			if n := e.closed.Load(); n == 0 != (e == first) {
				t.Errorf("%s: event %d, received: %v, was closed %d times", how, e.number, e == first, n)
			}
		}
		cancel()
	}
}

// TestBufferEndCancelled: a cancel that comes as the source is at its end, and takes
// events back, is why the stream ended: with Err nil they would be missed.
func TestBufferEndCancelled(t *testing.T) {
	testenv.NoLeaks(t)
	cause := errors.New("enough")
	for _, left := range []int{1, 0} {
		ctx, cancel := context.WithCancelCause(t.Context())
		full := make(chan struct{})
		s := newStream(ctx, 1, func(ctx context.Context, r *run[*bufferEvent]) error {
			for range left {
				r.emit(new(bufferEvent))
			}
			close(full)
			<-ctx.Done()
			return io.EOF
		})
		<-full
		cancel(cause)
		<-s.end.(*run[*bufferEvent]).done
		want := []error{nil, cause}[left]
		if e, ok := <-s.C; ok || s.Err() != want {
			t.Errorf("event %v, then %v; want none, then %v", e, s.Err(), want)
		}
	}
}

// TestBufferIsDelivered: at every other end, what is in the buffer is still
// delivered; a Close that comes before it was received takes it back.
func TestBufferIsDelivered(t *testing.T) {
	testenv.NoLeaks(t)
	for _, end := range []error{io.EOF, errors.New("failure")} {
		s, events := fill(t.Context(), 8, end)
		n := 0
		for e := range s.C {
			if e != events[n] || e.closed.Load() != 0 {
				t.Errorf("event %d is not the one that was sent, or closed", n)
			}
			if n++; n == 5 {
				s.Close()
			}
		}
		if n != 5 {
			t.Errorf("%d events before Close; want 5", n)
		}
		for _, e := range events[5:] {
			if e.closed.Load() != 1 {
				t.Errorf("event %d was closed %d times", e.number, e.closed.Load())
			}
		}
	}
}
