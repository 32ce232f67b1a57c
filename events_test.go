package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// patience is how long a test waits for what must happen.
const patience = testenv.Patience

// fakeEvent is an event of a fake source.
type fakeEvent struct {
	When   time.Time
	Source string
	Number int
}

func (e *fakeEvent) Time() time.Time { return e.When }
func (e *fakeEvent) String() string  { return fmt.Sprint(e.Source, e.Number) }

// ownedEvent owns something that must be closed.
type ownedEvent struct {
	fakeEvent
	closed atomic.Int32
}

func (e *ownedEvent) Close() error { e.closed.Add(1); return nil }

// numbers emits the numbers from 1 on until it is refused or has done n.
func numbers(ctx context.Context, source string, n int, end error) *kernstream.Stream[*fakeEvent] {
	return kernstream.NewStream(ctx, func(_ context.Context, emit func(*fakeEvent) bool) error {
		for i := range n {
			if !emit(&fakeEvent{Source: source, Number: i + 1}) {
				return nil
			}
		}
		return end
	})
}

// silent emits nothing until it is to end.
func silent(ctx context.Context) *kernstream.Stream[*fakeEvent] {
	return kernstream.NewStream(ctx, func(ctx context.Context, _ func(*fakeEvent) bool) error {
		<-ctx.Done()
		return ctx.Err()
	})
}

// drain receives until C is closed and returns how many events there were.
func drain[T kernstream.Event](t testing.TB, s *kernstream.Stream[T]) int {
	t.Helper()
	n := 0
	for timeout := time.After(patience); ; n++ {
		select {
		case _, ok := <-s.C:
			if !ok {
				return n
			}
		case <-timeout:
			t.Fatalf("C is not closed after %v", patience)
		}
	}
}

var errCause = errors.New("the cause of the cancel")

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

// TestStreamDeliversWhatItSays: emit returns true for exactly the events that
// the consumer receives, in order, however a cancel meets them; each other
// event is closed once, and none of the received ones is.
func TestStreamDeliversWhatItSays(t *testing.T) {
	testenv.NoLeaks(t)
	for i := range testenv.SoakN(2_000) {
		ctx, cancel := context.WithCancel(context.Background())
		var emitted, refused []*ownedEvent
		s := kernstream.NewStream(ctx, func(_ context.Context, emit func(*ownedEvent) bool) error {
			for {
				e := &ownedEvent{}
				if !emit(e) {
					refused = append(refused, e)
					if len(refused) == 3 {
						return nil
					}
					continue
				}
				emitted = append(emitted, e)
			}
		})
		stop := rand.IntN(20)
		var received []*ownedEvent
		for e := range s.C {
			received = append(received, e)
			if len(received) == stop {
				go cancel()
				// On one processor, producer and consumer would else go on
				// until their time is up.
				if i%10 != 0 {
					runtime.Gosched()
				}
			}
			if stop == 0 {
				cancel()
			}
		}
		cancel()
		if len(received) != len(emitted) {
			t.Fatalf("%d events received, %d said to be delivered", len(received), len(emitted))
		}
		for i, e := range received {
			if e != emitted[i] || e.closed.Load() != 0 {
				t.Fatalf("event %d: not the one that was sent, or closed", i)
			}
		}
		for _, e := range refused {
			if n := e.closed.Load(); n != 1 {
				t.Fatalf("an event that was not delivered was closed %d times", n)
			}
		}
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

// TestStreamAlwaysReadyConsumer: a consumer that is always ready does not keep
// a stream alive whose producer looks at nothing but emit.
func TestStreamAlwaysReadyConsumer(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := kernstream.NewStream(ctx, func(_ context.Context, emit func(*fakeEvent) bool) error {
		for e := new(fakeEvent); emit(e); {
		}
		return nil
	})
	for range 1000 {
		<-s.C
	}
	cancel()
	if n := drain(t, s); n > 1 {
		t.Errorf("%d events after cancel; want at most the one that was under way", n)
	}
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

// TestStreamAllocatesNothing: an event through C costs no allocation but its
// own.
func TestStreamAllocatesNothing(t *testing.T) {
	testenv.NoLeaks(t)
	e := new(fakeEvent)
	s := kernstream.NewStream(t.Context(), func(_ context.Context, emit func(*fakeEvent) bool) error {
		for emit(e) {
		}
		return nil
	})
	defer s.Close()
	if n := testing.AllocsPerRun(1000, func() { <-s.C }); n != 0 {
		t.Errorf("%v allocations per event; want 0", n)
	}
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

// TestStreamFakeSource: a stream over a fake clock, as programs test their
// consumers.
func TestStreamFakeSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		s := kernstream.NewStream(t.Context(), func(ctx context.Context, emit func(*fakeEvent) bool) error {
			ticker := time.NewTicker(time.Hour)
			defer ticker.Stop()
			for i := range 24 {
				select {
				case now := <-ticker.C:
					if !emit(&fakeEvent{When: now, Number: i + 1}) {
						return nil
					}
				case <-ctx.Done():
					return nil
				}
			}
			return io.EOF
		})
		n := 0
		for e := range s.C {
			n++
			if want := begin.Add(time.Duration(n) * time.Hour); !e.Time().Equal(want) {
				t.Fatalf("event %d at %v; want %v", n, e.Time(), want)
			}
		}
		if n != 24 || s.Err() != nil {
			t.Errorf("%d events, Err %v; want 24, nil", n, s.Err())
		}
	})
}

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

// TestOpError: an OpError says what failed, on what and why, names no system
// call twice, and is transparent to errors.Is.
func TestOpError(t *testing.T) {
	for _, test := range []struct {
		err  *kernstream.OpError
		want string
	}{
		{
			&kernstream.OpError{Op: "fanotify_mark", Source: "file", Object: "/srv", Err: os.NewSyscallError("fanotify_mark", syscall.EXDEV)},
			"file: fanotify_mark /srv: invalid cross-device link",
		},
		{
			&kernstream.OpError{Op: "open", Source: "mount", Object: "/proc/7/mountinfo", Err: os.NewSyscallError("openat", syscall.EACCES)},
			"mount: open /proc/7/mountinfo: openat: permission denied",
		},
		{&kernstream.OpError{Op: "init", Source: "file", Err: errors.New("odd")}, "file: init: odd"},
		{&kernstream.OpError{Op: "init", Source: "file"}, "file: init"},
	} {
		if got := test.err.Error(); got != test.want {
			t.Errorf("got  %q\nwant %q", got, test.want)
		}
		if test.err.Err != nil && !errors.Is(test.err, test.err.Err) {
			t.Errorf("%q does not wrap its reason", test.want)
		}
	}
}
