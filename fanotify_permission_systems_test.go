package kernstream_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// Permission events of file systems that do not answer.

// hangingLab starts a watcher of a file on a tmpfs, and of a FUSE mount that does
// not do what hangs says, until its connection is aborted.
func hangingLab(t *testing.T, options *kernstream.FileOptions, hangs string) (l *fileLab, o *openers, dir, control string) {
	t.Helper()
	needMarks(t)
	dir = fuseDir(t, hangs)
	o = newOpeners(t)
	l = &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	w, err := kernstream.WatchFiles(t.Context(), options,
		kernstream.Mark{Path: l.path("f"), Ops: openPerm}, kernstream.Mark{Type: kernstream.MarkMount, Path: dir, Ops: openPerm})
	l.do(err)
	l.w = w
	t.Cleanup(func() { w.Close() })
	control = fuseConnection(t, dir)
	t.Cleanup(func() { abortConnection(t, control) })
	return l, o, dir, control
}

// TestPermissionCloseHangs: a file system is told of each close, and may not
// answer that either. Nobody else waits for it: neither those whose deadline comes,
// nor those for whom there is no room, nor at the end of the stream.
func TestPermissionCloseHangs(t *testing.T) {
	for _, test := range []struct {
		name  string
		begin func(l *fileLab, o *openers, dir string)
	}{
		{"expired", func(l *fileLab, o *openers, dir string) {
			o.want(o.begin("open", dir+"/f"), unix.EPERM)
			o.want(o.begin("open", dir+"/f"), unix.EPERM)
		}},
		{"no room", func(l *fileLab, o *openers, dir string) {
			e, result, _ := l.hold(o)
			l.t.Cleanup(func() { e.Close() })
			o.want(result, unix.EPERM)
			o.want(o.begin("open", dir+"/f"), unix.EPERM)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			options := contentOptions(deny)
			options.Deadline = 50 * time.Millisecond
			options.MaxPending = 1
			l, o, dir, control := hangingLab(t, options, "flush hangs")
			test.begin(l, o, dir)
			for range 3 {
				o.want(o.begin("open", l.path("f")), unix.EPERM)
			}
			abortConnection(t, control)
			l.do(l.w.Close())
		})
	}
}

// TestPermissionMarkHangs: while a mark waits for a file system, the stream begins,
// other marks come and go, and all who wait for an answer get the default one at its
// end.
func TestPermissionMarkHangs(t *testing.T) {
	for hangs, name := range map[string]string{"lookup hangs": "/nothing", "getattr hangs": "/f"} {
		t.Run(hangs, func(t *testing.T) { testMarkHangs(t, hangs, name) })
	}
}

func testMarkHangs(t *testing.T, hangs, name string) {
	// With one processor, Mark begins before the stream does.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l, o, dir, control := hangingLab(t, contentOptions(deny), hangs)
	marked := make(chan error, 1)
	go func() { marked <- l.w.Mark(kernstream.Mark{Path: dir + name, Ops: openPerm}) }()
	waitsForFUSE(t, control)
	result := o.begin("open", l.path("f"))
	e := l.receive()
	unread := o.begin("open", l.path("f"))
	o.waiting(2)
	l.ensure("other")
	other := kernstream.Mark{Path: l.path("other"), Ops: openPerm}
	l.do(l.w.Mark(other))
	l.do(l.w.Unmark(other))
	closed := make(chan struct{})
	go func() {
		l.w.Close()
		close(closed)
	}()
	o.want(result, unix.EPERM)
	o.want(unread, unix.EPERM)
	l.do(e.Close())
	<-closed
	if err := l.w.Mark(other); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a mark after the end: %v", err)
	}
	abortConnection(t, control)
	<-marked

	// One of a watcher that starts is looked up before another is set.
	_, o, dir, control = hangingLab(t, contentOptions(deny), hangs)
	l.ensure("g")
	go func() {
		_, err := kernstream.WatchFiles(t.Context(), contentOptions(deny),
			kernstream.Mark{Path: l.path("g"), Ops: openPerm}, kernstream.Mark{Path: dir + name, Ops: openPerm})
		marked <- err
	}()
	waitsForFUSE(t, control)
	o.want(o.begin("open", l.path("g")), 0)
	abortConnection(t, control)
	if err := <-marked; err == nil {
		t.Error("a watcher of nothing")
	}
}

// TestPermissionMarkSetHangs: the kernel may ask the file system once more when a
// mark is set. The stream begins all the same, and who asks at its end gets the
// default answer; C is closed, and other marks are set, when the file system has
// answered.
func TestPermissionMarkSetHangs(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	l, o, dir, control := hangingLab(t, contentOptions(deny), "second getattr hangs")
	l.ensure("other")
	marked := make(chan error, 2)
	go func() {
		marked <- l.w.Mark(kernstream.Mark{Path: l.path("other"), Ops: openPerm}, kernstream.Mark{Path: dir + "/f", Ops: openPerm})
	}()
	for begin := time.Now(); markCount(t, l.w) < 3; time.Sleep(time.Millisecond) {
		if time.Since(begin) > patience {
			t.Fatal("the first mark of the call is not set")
		}
	}
	waitsForFUSE(t, control)
	results := []<-chan opened{o.begin("open", l.path("f")), o.begin("open", l.path("other"))}
	e := l.receive()
	o.waiting(len(results))
	groups := 0
	l.do(l.w.Control(func(int) { groups++ }))
	if groups != 1 {
		t.Errorf("Control was called for %d groups", groups)
	}
	go func() { marked <- l.w.Mark(kernstream.Mark{Path: l.path("f"), Ops: openPerm}) }()
	closed := make(chan struct{})
	go func() {
		l.w.Close()
		close(closed)
	}()
	for _, result := range results {
		o.want(result, unix.EPERM)
	}
	o.want(o.begin("open", l.path("other")), 0)
	l.do(e.Close())
	select {
	case <-closed:
		t.Error("the stream has ended before the file system has answered")
	default:
	}
	abortConnection(t, control)
	<-closed
	for range 2 {
		if err := <-marked; err == nil {
			t.Error("a mark that failed, or came after the end, is none")
		}
	}
}

// markCount returns how many marks the groups of a watcher have.
func markCount(t testing.TB, w *kernstream.FileWatcher) (n int) {
	t.Helper()
	err := w.Control(func(fd int) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
		if err != nil {
			t.Error(err)
		}
		n += strings.Count(string(text), " ignored_mask:")
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// waitsForFUSE waits until somebody waits for the file system of a connection.
func waitsForFUSE(t testing.TB, control string) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(filepath.Join(control, "waiting"))
		if err != nil || time.Since(begin) > patience {
			t.Fatalf("nobody waits: %q, %v", text, err)
		}
		if string(text) != "0\n" {
			return
		}
	}
}
