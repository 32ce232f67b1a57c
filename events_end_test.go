package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// How a stream ends: why, in which order, and that nothing is left of it.

// TestStreamErr: which end makes Err what.
func TestStreamErr(t *testing.T) {
	testenv.NoLeaks(t)
	failure := &kernstream.OpError{Op: "read", Source: "fake", Object: "thing", Err: syscall.EIO}
	plain := errors.New("plain")
	for _, test := range []struct {
		name    string
		produce error // what produce returns, once ctx is done if cancel is set
		cancel  bool
		close   bool
		want    error
	}{
		{name: "natural end", produce: nil, want: nil},
		{name: "natural end by io.EOF", produce: io.EOF, want: nil},
		{name: "failure", produce: failure, want: failure},
		{name: "plain error", produce: plain, want: plain},
		{name: "cancel", cancel: true, produce: nil, want: errCause},
		{name: "cancel, context error", cancel: true, produce: context.Canceled, want: errCause},
		{name: "cancel, effect of it", cancel: true, produce: os.ErrDeadlineExceeded, want: errCause},
		{name: "cancel, but the real end was there", cancel: true, produce: io.EOF, want: nil},
		{name: "cancel, but the source had failed", cancel: true, produce: failure, want: failure},
		{name: "cancel, but the source had failed, wrapped", cancel: true, produce: fmt.Errorf("x: %w", failure), want: failure},
		{name: "Close", close: true, produce: nil, want: nil},
		{name: "Close, context error", close: true, produce: context.Canceled, want: nil},
		{name: "Close, effect of it", close: true, produce: plain, want: nil},
		{name: "Close, but the source had failed", close: true, produce: failure, want: failure},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			started := make(chan struct{})
			s := kernstream.NewStream(ctx, func(ctx context.Context, _ func(*fakeEvent) bool) error {
				close(started)
				if test.cancel || test.close {
					<-ctx.Done()
				}
				return test.produce
			})
			<-started
			if test.cancel {
				if err := s.Err(); err != nil {
					t.Errorf("Err is %v while the stream runs; want nil", err)
				}
				cancel(errCause)
			}
			if test.close {
				if err := s.Close(); err != nil {
					t.Errorf("Close returned %v", err)
				}
			}
			drain(t, s)
			if err := s.Err(); err != test.want && !(test.want != nil && errors.Is(err, test.want)) {
				t.Errorf("Err is %v; want %v", err, test.want)
			}
		})
	}
}

// TestStreamFirstCauseWins: of a cancel and a Close, the one that came first
// decides, and nothing later changes Err.
func TestStreamFirstCauseWins(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	s := silent(ctx)
	cancel(errCause)
	s.Close()
	if err := s.Err(); err != errCause {
		t.Errorf("Err is %v after cancel and Close; want the cause", err)
	}
	ctx, cancel = context.WithCancelCause(t.Context())
	s = silent(ctx)
	s.Close()
	cancel(errCause)
	if err := s.Err(); err != nil {
		t.Errorf("Err is %v after Close and cancel; want nil", err)
	}
}

// TestStreamContextIsDone: with a context that is done, produce runs all the
// same, so that it can release what it holds; it can deliver nothing.
func TestStreamContextIsDone(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errCause)
	ran := false
	s := kernstream.NewStream(ctx, func(_ context.Context, emit func(*fakeEvent) bool) error {
		ran = true
		if emit(&fakeEvent{}) {
			t.Error("emit delivered an event")
		}
		return nil
	})
	if n := drain(t, s); n != 0 || !ran || s.Err() != errCause {
		t.Errorf("%d events, produce ran: %v, Err %v; want 0, true, the cause", n, ran, s.Err())
	}
}

// TestStreamOrderOfTheEnd: whoever sees C closed sees Err, and produce has let
// go of everything by then. Cancel, Close and the natural end come at any
// moment, against sends and receives.
func TestStreamOrderOfTheEnd(t *testing.T) {
	testenv.NoLeaks(t)
	for i := range testenv.SoakN(30_000) {
		ctx, cancel := context.WithCancelCause(context.Background())
		held := true
		s := kernstream.NewStream(ctx, func(_ context.Context, emit func(*fakeEvent) bool) error {
			defer func() { held = false }()
			for n := range 3 {
				if !emit(&fakeEvent{Number: n}) {
					return nil
				}
			}
			return &kernstream.OpError{Op: "end", Source: "fake", Err: io.ErrUnexpectedEOF}
		})
		var others sync.WaitGroup
		switch i % 3 {
		case 0:
			others.Go(func() { cancel(errCause) })
		case 1:
			others.Go(func() { s.Close() })
		}
		for range s.C {
		}
		// The race detector watches held: it is written before C is closed.
		if held {
			t.Fatal("C was closed before produce had returned")
		}
		err := s.Err()
		if !errors.Is(err, io.ErrUnexpectedEOF) && !(i%3 == 0 && err == errCause) && !(i%3 == 1 && err == nil) {
			t.Fatalf("round %d: Err is %v", i, err)
		}
		others.Wait()
		if again := s.Err(); again != err {
			t.Fatalf("Err changed from %v to %v after the end", err, again)
		}
		cancel(nil)
	}
}

// TestStreamCloseInTheLoop: Close is legal in the loop that receives, ends the
// loop, and has waited for everything.
func TestStreamCloseInTheLoop(t *testing.T) {
	testenv.NoLeaks(t)
	var running atomic.Bool
	s := kernstream.NewStream(t.Context(), func(_ context.Context, emit func(*fakeEvent) bool) error {
		running.Store(true)
		defer running.Store(false)
		for emit(&fakeEvent{}) {
		}
		return nil
	})
	n := 0
	for range s.C {
		if n++; n == 10 {
			if err := s.Close(); err != nil {
				t.Errorf("Close returned %v", err)
			}
			if running.Load() {
				t.Error("Close returned while produce was running")
			}
		}
	}
	if n != 10 || s.Err() != nil {
		t.Errorf("%d events, Err %v; want 10 and nil", n, s.Err())
	}
}

// TestStreamCloseIsIdempotent: Close may come from many goroutines, and again
// after the end.
func TestStreamCloseIsIdempotent(t *testing.T) {
	testenv.NoLeaks(t)
	s := numbers(t.Context(), "s", 1_000_000, nil)
	var closers sync.WaitGroup
	for range 20 {
		closers.Go(func() {
			if err := s.Close(); err != nil {
				t.Errorf("Close returned %v", err)
			}
		})
	}
	drain(t, s)
	closers.Wait()
	if err := s.Close(); err != nil || s.Err() != nil {
		t.Errorf("Close returned %v, Err %v; want nil", err, s.Err())
	}
}

// TestStreamCloseIsTheJoin: when Close has returned, C is closed.
func TestStreamCloseIsTheJoin(t *testing.T) {
	testenv.NoLeaks(t)
	for range testenv.SoakN(20_000) {
		s := silent(context.Background())
		s.Close()
		select {
		case <-s.C:
		default:
			t.Fatal("C is open after Close")
		}
	}
}

// TestStreamLearnsLate: a producer that knows of the end of the context before
// the stream does, since a context tells its children one after the other, does
// not make it a natural end.
func TestStreamLearnsLate(t *testing.T) {
	testenv.NoLeaks(t)
	for range 20 {
		ctx, cancel := context.WithCancelCause(context.Background())
		for range 5_000 {
			_, stop := context.WithCancel(ctx)
			defer stop()
		}
		s := kernstream.NewStream(ctx, func(context.Context, func(*fakeEvent) bool) error {
			<-ctx.Done()
			return nil
		})
		cancel(errCause)
		if drain(t, s); s.Err() != errCause {
			t.Fatalf("Err is %v; want the cause", s.Err())
		}
	}
}

// TestStreamAbandoned: a consumer that goes away without a word costs nothing
// once the context is done.
func TestStreamAbandoned(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	for range 100 {
		s := numbers(ctx, "s", 1_000_000, nil)
		<-s.C
	}
	cancel()
}

// TestStreamLetsGoOfItsContext: a stream that has ended leaves nothing behind
// in a context that lives on.
func TestStreamLetsGoOfItsContext(t *testing.T) {
	ctx := &countingContext{Context: t.Context(), done: make(chan struct{})}
	for range 10 {
		s := numbers(ctx, "s", 1, nil)
		drain(t, s)
	}
	if n := ctx.children.Load(); n != 0 {
		t.Errorf("%d registrations are left in the context", n)
	}
}

// countingContext counts who waits for it.
type countingContext struct {
	context.Context
	done     chan struct{}
	children atomic.Int32
}

func (c *countingContext) Done() <-chan struct{} { return c.done }

func (c *countingContext) AfterFunc(func()) (stop func() bool) {
	c.children.Add(1)
	return sync.OnceValue(func() bool { c.children.Add(-1); return true })
}

// TestStreamGoexit: a produce that ends its goroutine (as FailNow of package
// testing does) does not leave a consumer waiting.
func TestStreamGoexit(t *testing.T) {
	testenv.NoLeaks(t)
	s := kernstream.NewStream(t.Context(), func(context.Context, func(*fakeEvent) bool) error {
		runtime.Goexit()
		return nil
	})
	drain(t, s)
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "Goexit") {
		t.Errorf("Err is %v; want an error that says what happened", err)
	}
}

// TestStreamPanic: a panic of produce ends the process with its value and its
// stack, also if the consumer would end the process when the stream ends.
func TestStreamPanic(t *testing.T) {
	const child = "KERNSTREAM_TEST_PANIC"
	if os.Getenv(child) != "" {
		s := kernstream.NewStream(t.Context(), func(context.Context, func(*fakeEvent) bool) error {
			panic("produce went wrong")
		})
		for range s.C {
		}
		os.Exit(0)
	}
	for range 20 {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestStreamPanic$")
		cmd.Env = append(os.Environ(), child+"=1", "GORACE=atexit_sleep_ms=0")
		out, err := cmd.CombinedOutput()
		if text := string(out); err == nil || !strings.Contains(text, "panic: produce went wrong") || !strings.Contains(text, "TestStreamPanic.func1") {
			t.Fatalf("the process ended with %v and said:\n%s", err, out)
		}
	}
}
