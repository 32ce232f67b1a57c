package fuse_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// drained drains the session.
func (l *lab) drained() {
	l.t.Helper()
	if err := testenv.Within(l.t, "Drain", func() error { return l.s.Drain(context.Background()) }); err != nil {
		l.t.Fatalf("Drain: %v", err)
	}
}

// TestParityU11Drain: a session is brought to rest: readers of all devices end,
// requests in hand are waited for, those that come stay in the kernel. Then it
// goes on, and nobody has lost anything.
func TestParityU11Drain(t *testing.T) {
	for _, reader := range readers {
		t.Run(reader.name, func(t *testing.T) {
			l := newLab(t, nil)
			devices := []*fuse.Device{l.s.Device(), l.clone()}
			held := make(chan *fuse.Request, 1)
			start := func() (wait func() error) {
				results := make(chan error, len(devices))
				for _, d := range devices {
					go func() {
						results <- reader.read(context.Background(), d, func(r *fuse.Request) {
							if lookup("held")(r) {
								held <- r
							} else {
								basic(r)
							}
						})
					}()
				}
				return func() error { return errors.Join(<-results, <-results) }
			}
			wait := start()
			waitHeld := newClient(t).start("stat", l.path("held"))
			r := <-held

			drained := make(chan error, 1)
			go func() { drained <- l.s.Drain(context.Background()) }()
			err := testenv.Within(t, "the readers", wait)
			if reader.name == "Next" && !errors.Is(err, fuse.ErrDrained) || reader.name != "Next" && err != nil {
				t.Errorf("readers ended by %v", err)
			}
			waitNew := newClient(t).start("stat", l.path("new"))
			select {
			case err := <-drained:
				t.Errorf("Drain returned %v while a request was in hand", err)
			case <-time.After(50 * time.Millisecond):
			}
			if err := r.ReplyErrno(unix.ENOENT); err != nil {
				t.Error(err)
			}
			if err := testenv.Within(t, "Drain", func() error { return <-drained }); err != nil {
				t.Errorf("Drain: %v", err)
			}
			if err := waitHeld(); err != unix.ENOENT {
				t.Error(err)
			}
			time.Sleep(20 * time.Millisecond)
			if n := l.s.Outstanding(); n != 0 {
				t.Errorf("%d requests were read after the drain", n)
			}
			if fuseMounts(t, l.dir) != 1 {
				t.Error("not mounted any more")
			}
			if _, err := l.s.Device().Next(t.Context()); err != fuse.ErrDrained {
				t.Errorf("Next: %v", err)
			}
			l.drained() // again

			l.s.Resume()
			l.s.Resume()
			wait = start()
			if err := waitNew(); err != unix.ENOENT {
				t.Error(err)
			}
			l.s.Close()
			testenv.Within(t, "the readers", wait)
		})
	}
}

// When the context is done first, the error says what is left. The session
// stays as it is, and can be drained again.
func TestDrainTakesTooLong(t *testing.T) {
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	cause := errors.New("out of patience")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, cause)
	defer cancel()
	err := l.s.Drain(ctx)
	if operation := (*kernstream.OpError)(nil); !errors.Is(err, cause) || !errors.As(err, &operation) || operation.Object != l.dir ||
		!strings.Contains(err.Error(), "1 request is not answered or closed (lookup)") {
		t.Errorf("Drain: %v", err)
	}
	if _, err := l.s.Device().Next(t.Context()); err != fuse.ErrDrained {
		t.Errorf("Next: %v", err)
	}
	time.AfterFunc(10*time.Millisecond, func() { r.ReplyErrno(unix.ENOENT) })
	l.drained()
	if err := wait(); err != unix.ENOENT {
		t.Error(err)
	}

	// One that has nothing left is drained even by a context that is done.
	if err := l.s.Drain(ctx); err != nil {
		t.Errorf("Drain: %v", err)
	}
}

// Resume ends a Drain that waits.
func TestResumeEndsDrain(t *testing.T) {
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	result := make(chan error, 1)
	go func() { result <- l.s.Drain(context.Background()) }()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := l.s.Device().Next(ctx)
		cancel()
		if err == fuse.ErrDrained {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("Next: %v", err)
		}
	}
	l.s.Resume()
	if err := testenv.Within(t, "Drain", func() error { return <-result }); err == nil || !strings.Contains(err.Error(), "resumed") {
		t.Errorf("Drain: %v", err)
	}
	r.ReplyErrno(unix.ENOENT)
	wait()
}

// What the kernel only tells is in hand until it is closed: a server says by
// that that it has done it.
func TestDrainWaitsForForget(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	forgets := make(chan *fuse.Request, 16)
	l.serve(func(r *fuse.Request) {
		if o := r.Header.Opcode; o == fuse.OpForget || o == fuse.OpBatchForget {
			forgets <- r
			return
		}
		basic(r)
	})
	if err := c.do("stat", l.path(fileName)); err != nil {
		t.Fatal(err)
	}
	if err := l.s.NotifyInvalEntry(rootNode, fileName); err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatal(err)
	}
	var r *fuse.Request
	testenv.Within(t, "FORGET", func() error { r = <-forgets; return nil })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := l.s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain: %v", err)
	}
	r.Close()
	for len(forgets) > 0 {
		(<-forgets).Close()
	}
	l.drained()
}

// What a stream has read and nobody has received does not keep Drain waiting, and
// is the first thing that is delivered afterwards.
func TestDrainKeepsTheUndelivered(t *testing.T) {
	l := newLab(t, nil)
	s := l.s.Device().Requests(t.Context())
	wait := newClient(t).start("stat", l.path("x"))
	for deadline := time.Now().Add(patience); l.s.Outstanding() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is read")
		}
	}
	l.drained()
	for r := range s.C {
		t.Errorf("received %v", r)
	}
	if s.Err() != nil {
		t.Errorf("Err: %v", s.Err())
	}
	if n := len(l.s.State().Undelivered); n != 1 {
		t.Errorf("%d undelivered requests in the State", n)
	}
	l.s.Resume()
	if n := len(l.s.State().Undelivered); n != 0 {
		t.Errorf("%d undelivered requests in the State of a session that reads", n)
	}
	l.next(lookup("x")).ReplyErrno(unix.ENOENT)
	if err := wait(); err != unix.ENOENT {
		t.Error(err)
	}
}

// Drain tells of the end of the session, and Close ends a Drain that waits.
func TestDrainAtTheEnd(t *testing.T) {
	for _, end := range ends {
		l := newLab(t, nil)
		if err := end.end(l); err != nil {
			t.Fatal(err)
		}
		if err := testenv.Within(t, "Drain", func() error { return l.s.Drain(context.Background()) }); !errors.Is(err, end.want) {
			t.Errorf("Drain after %s: %v", end.name, err)
		}
		if _, err := l.s.Device().Next(t.Context()); err != end.want && err != fuse.ErrDrained {
			t.Errorf("Next after %s: %v", end.name, err)
		}
	}
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	result := make(chan error, 1)
	go func() { result <- l.s.Drain(context.Background()) }()
	time.Sleep(10 * time.Millisecond)
	l.s.Close()
	if err := testenv.Within(t, "Drain", func() error { return <-result }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Drain during Close: %v", err)
	}
	r.Close()
	wait()
}

// Drained and resumed at any moment under load, with several devices and all ways
// to read, no request is lost, and none is read while the session is at rest.
func TestSoakDrains(t *testing.T) {
	l := newLab(t, nil)
	devices := []*fuse.Device{l.s.Device(), l.clone()}
	results := l.load(testenv.SoakN(6000))
	turns := 0
	for left := cap(results); left > 0; turns++ {
		var work sync.WaitGroup
		for i, d := range devices {
			work.Go(func() { readers[(turns+i)%len(readers)].read(context.Background(), d, basic) })
		}
		time.Sleep(time.Duration(turns%5) * 200 * time.Microsecond)
		l.drained()
		testenv.Within(t, "the readers", func() error { work.Wait(); return nil })
		if n := l.s.Outstanding() - len(l.s.State().Undelivered); n != 0 {
			t.Fatalf("%d requests are in hand after a drain", n)
		}
		l.s.Resume()
		left -= ended(t, results)
	}
	t.Logf("%d drains", turns)
}
