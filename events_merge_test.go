package kernstream_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Several sources as one stream.

// TestMerge: all events of all sources arrive, those of each in their order,
// and the merged stream ends with the last source.
func TestMerge(t *testing.T) {
	testenv.NoLeaks(t)
	const n = 500
	all := kernstream.Merge(t.Context(), numbers(t.Context(), "a", n, nil), numbers(t.Context(), "b", n, io.EOF), numbers(t.Context(), "c", n, nil))
	last := map[string]int{}
	for event := range all.C {
		e := event.(*fakeEvent)
		if e.Number != last[e.Source]+1 {
			t.Fatalf("%v came after %d", e, last[e.Source])
		}
		last[e.Source] = e.Number
	}
	if last["a"] != n || last["b"] != n || last["c"] != n || all.Err() != nil {
		t.Errorf("the last events are %v, Err %v; want %d each, nil", last, all.Err(), n)
	}
}

// TestMergeNothing: without sources C closes at once.
func TestMergeNothing(t *testing.T) {
	testenv.NoLeaks(t)
	s := kernstream.Merge(t.Context())
	if n := drain(t, s); n != 0 || s.Err() != nil {
		t.Errorf("%d events, Err %v", n, s.Err())
	}
}

// TestMergeNil: a nil source panics where it is passed.
func TestMergeNil(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Merge took a nil source")
		}
	}()
	var watcher *kernstream.MountWatcher
	kernstream.Merge(t.Context(), watcher)
}

// TestMergeSourceLeaves: a source that ends because its own context is done, or
// that is closed, just leaves.
func TestMergeSourceLeaves(t *testing.T) {
	testenv.NoLeaks(t)
	own, cancel := context.WithCancelCause(t.Context())
	leaving, closing, staying := silent(own), silent(t.Context()), silent(t.Context())
	all := kernstream.Merge(t.Context(), leaving, closing, staying)
	cancel(errCause)
	closing.Close()
	select {
	case <-all.C:
		t.Fatalf("the merged stream ended with %v when two of its sources left", all.Err())
	case <-time.After(20 * time.Millisecond):
	}
	staying.Close()
	if drain(t, all); all.Err() != nil {
		t.Errorf("Err is %v; want nil", all.Err())
	}
	if leaving.Err() != errCause {
		t.Errorf("Err of the source that left is %v; want its cause", leaving.Err())
	}
}

// TestMergeSourceFails: a source that fails ends the merged stream with its
// error, and the others with it.
func TestMergeSourceFails(t *testing.T) {
	testenv.NoLeaks(t)
	failure := &kernstream.OpError{Op: "read", Source: "fake", Err: syscall.EIO}
	plain := errors.New("plain")
	for _, want := range []error{failure, plain} {
		other := silent(t.Context())
		chatty := numbers(t.Context(), "chatty", 1_000_000_000, nil)
		all := kernstream.Merge(t.Context(), other, chatty, numbers(t.Context(), "bad", 3, want))
		drain(t, all)
		if all.Err() != want {
			t.Errorf("Err is %v; want %v", all.Err(), want)
		}
		for _, s := range []*kernstream.Stream[*fakeEvent]{other, chatty} {
			if _, ok := <-s.C; ok {
				t.Error("a source is still open after the merged stream ended")
			}
			if s.Err() != nil {
				t.Errorf("Err of a source that was closed is %v; want nil", s.Err())
			}
		}
	}
}

// TestMergeFirstCauseWins: a source that fails ends the merged stream although
// the consumer is busy, and no later cancel or Close hides its error.
func TestMergeFirstCauseWins(t *testing.T) {
	testenv.NoLeaks(t)
	plain := errors.New("plain")
	for _, later := range []string{"cancel", "Close"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		chatty := numbers(t.Context(), "chatty", 1_000_000_000, nil)
		all := kernstream.Merge(ctx, chatty, numbers(t.Context(), "bad", 0, plain))
		// Nobody receives from all; that chatty is closed shows the end.
		for deadline := time.Now().Add(patience); chatty.Err() == nil && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			select {
			case _, ok := <-chatty.C:
				if !ok {
					deadline = time.Time{}
				}
			default:
			}
		}
		if later == "cancel" {
			cancel(errCause)
		} else {
			all.Close()
		}
		if drain(t, all); all.Err() != plain {
			t.Errorf("%s: Err is %v; want %v", later, all.Err(), plain)
		}
		cancel(nil)
	}
}

// TestMergeTwice: a source that is given twice keeps its order.
func TestMergeTwice(t *testing.T) {
	testenv.NoLeaks(t)
	s := numbers(t.Context(), "a", 20_000, nil)
	last := 0
	all := kernstream.Merge(t.Context(), s, s)
	for e := range all.C {
		if n := e.(*fakeEvent).Number; n != last+1 {
			t.Fatalf("%d came after %d", n, last)
		}
		last++
	}
	if last != 20_000 {
		t.Errorf("%d events", last)
	}
}

// TestMergeEnds: cancel and Close end the merged stream with the right Err and
// close every source, whether the consumer receives or not.
func TestMergeEnds(t *testing.T) {
	testenv.NoLeaks(t)
	for _, how := range []string{"cancel", "Close"} {
		for _, receiving := range []bool{false, true} {
			ctx, cancel := context.WithCancelCause(t.Context())
			sources := []*kernstream.Stream[*fakeEvent]{numbers(t.Context(), "a", 1_000_000_000, nil), silent(t.Context())}
			all := kernstream.Merge(ctx, sources[0], sources[1])
			<-all.C
			var consumer sync.WaitGroup
			if receiving {
				consumer.Go(func() {
					for range all.C {
					}
				})
				time.Sleep(time.Millisecond)
			}
			var want error
			if how == "cancel" {
				want = errCause
				cancel(errCause)
			} else if err := all.Close(); err != nil {
				t.Error(err)
			}
			drain(t, all)
			if all.Err() != want {
				t.Errorf("%s: Err is %v; want %v", how, all.Err(), want)
			}
			for _, s := range sources {
				if _, ok := <-s.C; ok {
					t.Errorf("%s: a source is still open", how)
				}
			}
			consumer.Wait()
			cancel(nil)
		}
	}
}

// TestMergeSharedContext: when the sources have the context of the merged
// stream, its cause is Err, in whatever order they learn of it.
func TestMergeSharedContext(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(3_000) {
		ctx, cancel := context.WithCancelCause(context.Background())
		all := kernstream.Merge(ctx, silent(ctx), silent(ctx), numbers(ctx, "a", 10, nil))
		var canceller sync.WaitGroup
		canceller.Go(func() { cancel(errCause) })
		drain(t, all)
		canceller.Wait()
		if err := all.Err(); err != errCause {
			t.Fatalf("Err is %v; want the cause", err)
		}
	}
}

// TestMergeClosesWhatItCannotDeliver: an event that owns something and was on
// its way through Merge is closed when nobody takes it.
func TestMergeClosesWhatItCannotDeliver(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(500) {
		var mu sync.Mutex
		var made []*ownedEvent
		source := kernstream.NewStream(context.Background(), func(_ context.Context, emit func(*ownedEvent) bool) error {
			for {
				e := &ownedEvent{}
				mu.Lock()
				made = append(made, e)
				mu.Unlock()
				if !emit(e) {
					return nil
				}
			}
		})
		all := kernstream.Merge(context.Background(), source)
		received := map[*ownedEvent]bool{}
		for range 3 {
			received[(<-all.C).(*ownedEvent)] = true
		}
		all.Close()
		for _, e := range made {
			if n := e.closed.Load(); n == 1 == received[e] {
				t.Fatalf("received: %v, closed %d times", received[e], n)
			}
		}
	}
}

// TestMergeOfMerged: a merged stream is a source like any other, and so is what
// embeds a stream.
func TestMergeOfMerged(t *testing.T) {
	testenv.NoLeaks(t)
	type embedding struct{ *kernstream.Stream[*fakeEvent] }
	inner := kernstream.Merge(t.Context(), numbers(t.Context(), "a", 10, nil), embedding{numbers(t.Context(), "b", 10, nil)})
	all := kernstream.Merge(t.Context(), inner, numbers(t.Context(), "c", 10, nil))
	if n := drain(t, all); n != 30 || all.Err() != nil {
		t.Errorf("%d events, Err %v; want 30, nil", n, all.Err())
	}
}
