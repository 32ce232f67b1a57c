package kernstream_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestFileEventProcess: with ReportPidFD an event leads to its process, which
// can be watched to its end; without, to its number.
func TestFileEventProcess(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, &kernstream.FileOptions{ReportPidFD: true}, "f", kernstream.Mark{Path: "f", Ops: opOpen})
	a := newAgent(t, 0)
	for _, exact := range []bool{true, false} {
		if !exact {
			l.w.Close()
			l.watch(nil, kernstream.Mark{Path: "f", Ops: opOpen})
		}
		a.do("read", l.path("f"))
		e := l.receive()
		target, err := e.Process()
		l.do(err)
		if e.PID != a.PID || target.String() == "" {
			t.Errorf("event %v, target %v; want process %d", e, target, a.PID)
		}
		s, err := kernstream.WatchProcess(t.Context(), target, nil)
		l.do(err)
		l.do(e.Close())
		_, err = e.Process()
		if exact {
			wantError(t, err, os.ErrClosed)
			if _, err := kernstream.WatchProcess(t.Context(), target, nil); !errors.Is(err, os.ErrClosed) {
				t.Errorf("watching the process of a closed event: %v", err)
			}
			s.Close()
			continue
		}
		l.do(err)
		a.end()
		if exit := <-s.C; exit.Process.PID != a.PID || exit.Phase != kernstream.Exited {
			t.Errorf("event %v; want the end of process %d", exit, a.PID)
		}
	}
}

// TestFileEventProcessGone: an event of a process that was reaped before it was
// read says so, and so does one that names a thread only.
func TestFileEventProcessGone(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	group := rawGroup(t, unix.FAN_REPORT_DFID_NAME|unix.FAN_REPORT_PIDFD)
	l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD, unix.FAN_OPEN, unix.AT_FDCWD, l.path("f")))
	touch(t, l.path("f"))
	l.watch(&kernstream.FileOptions{Group: group})
	_, err := l.receive().Process()
	wantError(t, err, os.ErrProcessDone)
	l.w.Close()

	l.watch(&kernstream.FileOptions{ReportTID: true}, kernstream.Mark{Path: "f", Ops: opOpen})
	l.read("f")
	_, err = l.receive().Process()
	wantError(t, err, errors.ErrUnsupported, "thread")
	_, err = (&kernstream.FileEvent{Path: "/f"}).Process()
	wantError(t, err, errors.ErrUnsupported, "/f")
}

// TestFilePidfdForEach: the pidfds of many events are closed with them, and none
// is left.
func TestFilePidfdForEach(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, &kernstream.FileOptions{ReportPidFD: true}, "a b c", kernstream.Mark{Type: filesystem, Ops: opOpen})
	for range 50 {
		l.read("a")
		l.read("b")
		e := l.receive()
		if _, err := e.Process(); err != nil {
			t.Fatal(err)
		}
		var closer io.Closer = e
		l.do(closer.Close())
	}
	l.w.Close()
	for e := range l.w.C {
		e.Close()
	}
}

// TestFilePidFDBatch: no more pidfds are made at once than there is room for, however
// many events wait.
func TestFilePidFDBatch(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	const files = 600
	for i := range files {
		l.ensure(fmt.Sprint(i))
	}
	group := rawGroup(t, unix.FAN_REPORT_DFID_NAME|unix.FAN_REPORT_PIDFD)
	l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, unix.AT_FDCWD, l.dir))
	for i := range files {
		l.read(fmt.Sprint(i))
	}
	defer l.limitDescriptors(256)()
	l.watch(&kernstream.FileOptions{Group: group})
	for range files {
		e := l.receive()
		if _, err := e.Process(); err != nil {
			t.Fatalf("event %v: %v", e, err)
		}
		l.do(e.Close())
	}
}
