package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// drainFiles is more than fits into C, so that events are in the kernel's queue
// and in the reader's hand, too.
const drainFiles = 300

// newDrainLab opens files that nobody has received anything about yet.
func newDrainLab(t *testing.T, ctx context.Context, options *kernstream.FileOptions) *fileLab {
	l := newFileLab(t, nil, "after")
	l.w.Close()
	for i := range drainFiles {
		l.ensure(fmt.Sprint("file", i))
	}
	w, err := kernstream.WatchFiles(ctx, options, kernstream.Mark{Type: kernstream.MarkFilesystem, Path: l.dir, Ops: kernstream.OpOpen})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	l.w = w
	for i := range drainFiles {
		l.read(fmt.Sprint("file", i))
	}
	return l
}

// countToEnd receives until C is closed.
func (l *fileLab) countToEnd() (n int) {
	l.t.Helper()
	for deadline := time.After(patience); ; {
		select {
		case e, ok := <-l.w.C:
			if !ok {
				return n
			}
			e.Close()
			n++
		case <-deadline:
			l.t.Fatalf("the stream does not end after %d events", n)
		}
	}
}

// TestDrain: all that was queued before is delivered, what comes after is not, and
// the end is a natural one.
func TestDrain(t *testing.T) {
	testenv.NeedRoot(t, "a filesystem mark")
	for name, options := range map[string]*kernstream.FileOptions{"handles": nil, "descriptors": {Descriptors: true}} {
		t.Run(name, func(t *testing.T) {
			l := newDrainLab(t, t.Context(), options)
			var drains sync.WaitGroup
			for range 8 {
				drains.Go(func() {
					if err := l.w.Drain(); err != nil {
						t.Error(err)
					}
				})
			}
			drains.Wait()
			l.read("after")
			if n := l.countToEnd(); n != drainFiles || l.w.Err() != nil {
				t.Errorf("%d events, then %v; want %d, nil", n, l.w.Err(), drainFiles)
			}
			l.do(l.w.Drain())
		})
	}
}

// TestDrainCancel: a cancel ends a drain whose consumer does not come.
func TestDrainCancel(t *testing.T) {
	testenv.NeedRoot(t, "a filesystem mark")
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	l := newDrainLab(t, ctx, nil)
	l.do(l.w.Drain())
	cancel(cause)
	if n := l.countToEnd(); n >= drainFiles || l.w.Err() != cause {
		t.Errorf("%d events, then %v; want fewer than %d, and the cause", n, l.w.Err(), drainFiles)
	}
}

// TestDrainAfterEnd: there is nothing to drain any more.
func TestDrainAfterEnd(t *testing.T) {
	l := newFileLab(t, nil, "f", kernstream.Mark{Path: "f", Ops: kernstream.OpOpen})
	l.w.Close()
	wantError(t, l.w.Drain(), os.ErrClosed)
}

// TestDrainOfQuestions: a watcher that is asked is not drained: Close answers.
func TestDrainOfQuestions(t *testing.T) {
	l, _ := newPermissionLab(t, contentOptions(allow), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	wantError(t, l.w.Drain(), errors.ErrUnsupported, "Close")
}
