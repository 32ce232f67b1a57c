package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// How a watcher of files ends, and who may have one.

// TestFileOutlivesNothing: an event that nobody received takes its descriptors
// with it, at every end.
func TestFileOutlivesNothing(t *testing.T) {
	needMarks(t)
	for _, options := range []*kernstream.FileOptions{{Descriptors: true}, {ReportPidFD: true}, {Descriptors: true, ReportPidFD: true}} {
		for _, cancelled := range []bool{true, false} {
			testenv.NoLeaks(t)
			l := &fileLab{t: t, dir: labDir(t)}
			for i := range 300 {
				l.ensure(fmt.Sprint("f", i))
			}
			ctx, cancel := context.WithCancel(t.Context())
			w, err := kernstream.WatchFiles(ctx, options, kernstream.Mark{Type: filesystem, Path: l.dir, Ops: opOpen})
			l.do(err)
			for i := range 300 {
				l.read(fmt.Sprint("f", i))
			}
			e := receiveFile(t, w)
			if cancelled {
				cancel()
				for e := range w.C {
					e.Close()
				}
				if w.Err() != context.Canceled {
					t.Errorf("Err is %v", w.Err())
				}
			} else {
				w.Close()
				if w.Err() != nil {
					t.Errorf("Err is %v", w.Err())
				}
			}
			e.Close() // one that was delivered outlives the stream
			cancel()
		}
	}
}

// TestFileEnds: a cancel ends a stream that waits, one whose consumer is slow,
// and one in a storm; so does Close, from the loop, too.
func TestFileEnds(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	for i := range 200 {
		l.ensure(fmt.Sprint("f", i))
	}
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				l.read(fmt.Sprint("f", i%200))
				runtime.Gosched()
			}
		}
	})
	cause := errors.New("enough")
	for i := range testenv.SoakN(60) {
		ctx, cancel := context.WithCancelCause(t.Context())
		w, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{Path: l.dir, Ops: opOpen | onChild})
		l.do(err)
		for range i % 3 {
			receiveFile(t, w)
		}
		if i%2 == 0 {
			cancel(cause)
			for range w.C {
			}
			if w.Err() != cause {
				t.Errorf("Err is %v", w.Err())
			}
		} else {
			for range w.C {
				w.Close()
			}
			if w.Err() != nil {
				t.Errorf("Err is %v", w.Err())
			}
		}
		cancel(nil)
		w.Close()
		wantError(t, w.Mark(kernstream.Mark{Path: l.dir, Ops: opOpen}), os.ErrClosed, l.dir)
		wantError(t, w.Unmark(kernstream.Mark{Path: l.dir, Ops: opOpen}), os.ErrClosed)
		wantError(t, w.Flush(inode), os.ErrClosed)
	}
	close(stop)
	storm.Wait()
}

// TestFileContextDone: a context that is done is an error of the constructor.
func TestFileContextDone(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("done before")
	cancel(cause)
	if w, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{Path: "/", Ops: opOpen}); w != nil || err != cause {
		t.Errorf("%v, %v", w, err)
	}
}

// TestFileUnprivileged: any user can mark what he can read, and gets the paths of
// marked files and of entries of marked directories. What needs more is an
// error that says what is missing.
func TestFileUnprivileged(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Run("as another user", func(t *testing.T) {
			testenv.NeedRoot(t, "to become an ordinary user")
			asNobody(t)
		})
		return
	}
	testUnprivileged(t, t.TempDir())
}

func testUnprivileged(t testing.TB, dir string) {
	l := &fileLab{t: t, dir: dir}
	l.ensure("d/f g")
	l.watch(nil, kernstream.Mark{Path: "d", Ops: opOpen | kernstream.OpCreate | kernstream.OpDelete | onChild | onDir}, kernstream.Mark{Path: "g", Ops: opOpen})
	l.read("d/f")
	l.want(told{"d/f": opOpen})
	l.list("d")
	l.want(told{"d": opOpen | onDir})
	l.read("g")
	l.want(told{"g": opOpen})
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("g"), Ops: opOpen, Ignore: kernstream.IgnoredMaskSurvModify}))
	l.read("g")
	l.quiet("it is ignored")
	l.do(os.WriteFile(l.path("d/new"), nil, 0o644))
	l.want(told{"d/new": opOpen | kernstream.OpCreate})
	l.do(os.Remove(l.path("d/new")))
	l.want(told{"d/new": kernstream.OpDelete})
	l.do(os.Mkdir(l.path("d/sub"), 0o755))
	l.want(told{"d/sub": kernstream.OpCreate | onDir})
	l.list("d/sub")
	l.want(told{" (unknown)": opOpen | onDir})
	l.do(os.Remove(l.path("d/sub")))
	l.want(told{"d/sub": kernstream.OpDelete | onDir})
	l.do(os.Rename(l.path("d"), l.path("e")))
	l.read("e/f")
	if e := l.receive(); e.Path != "f" || e.PathState != kernstream.PathUnknown {
		t.Errorf("event %v; want the name alone, since the directory was renamed", e)
	}
	l.do(os.Rename(l.path("e"), l.path("d")))
	l.read("d/f")
	l.want(told{"d/f": opOpen})

	if err := os.WriteFile(l.path("unreadable"), nil, 0o200); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		options kernstream.FileOptions
		mark    kernstream.Mark
		words   []string
	}{
		{mark: kernstream.Mark{Type: filesystem, Path: l.dir, Ops: opOpen}, words: []string{l.dir, "filesystem", "CAP_SYS_ADMIN"}},
		{mark: kernstream.Mark{Type: kernstream.MarkMount, Path: l.dir, Ops: opOpen}, words: []string{l.dir, "mount", "CAP_SYS_ADMIN"}},
		{mark: kernstream.Mark{Path: l.path("unreadable"), Ops: opOpen}, words: []string{"unreadable", "permission to read"}},
		{options: kernstream.FileOptions{Descriptors: true}, words: []string{"CAP_SYS_ADMIN", "descriptors"}},
		{options: kernstream.FileOptions{ReportTID: true}, words: []string{"CAP_SYS_ADMIN", "ReportTID"}},
		{options: kernstream.FileOptions{ReportPidFD: true}, words: []string{"CAP_SYS_ADMIN", "ReportPidFD"}},
		{options: kernstream.FileOptions{UnlimitedQueue: true}, words: []string{"CAP_SYS_ADMIN", "UnlimitedQueue"}},
		{options: kernstream.FileOptions{UnlimitedMarks: true}, words: []string{"CAP_SYS_ADMIN", "UnlimitedMarks"}},
	} {
		marks := []kernstream.Mark{test.mark}
		if test.mark.Ops == 0 {
			marks = nil
		}
		_, err := kernstream.WatchFiles(t.Context(), &test.options, marks...)
		wantError(t, err, fs.ErrPermission, test.words...)
	}
}

// TestFileProcessElsewhere: a process that is not in the process ID namespace of
// the watcher has no number there.
func TestFileProcessElsewhere(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	a := newAgent(t, unix.CLONE_NEWPID|unix.CLONE_NEWNS)
	defer a.end()
	if text := a.do("mark", l.path("f")); text != "" {
		t.Fatal(text)
	}
	l.read("f")
	if text := a.do("file event"); !strings.HasSuffix(text, " pid 0") || !strings.HasPrefix(text, "open "+l.path("f")) {
		t.Errorf("event %q; want one without a process", text)
	}
}
