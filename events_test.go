package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
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

func (e *fakeEvent) String() string { return fmt.Sprint(e.Source, e.Number) }

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
