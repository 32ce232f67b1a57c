package kernstream_test

import (
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityF5Answers: an operation waits for the consumer's answer, and gets
// that one: the file, or EPERM. (F8: deny, then allow.)
func TestParityF5Answers(t *testing.T) {
	testenv.Feature(t, "file events", "permission")
	l, o := newPermissionLab(t, contentOptions(deny), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	for _, want := range []unix.Errno{unix.EPERM, 0, unix.EPERM, 0} {
		result := o.begin("open", l.path("f"))
		e := l.receive()
		if e.Ops != openPerm || e.Path != l.path("f") || e.PathState != kernstream.PathExact || e.PID != o.pid() ||
			e.Via != kernstream.ViaDescriptor || e.Err != nil || e.FD() < 0 {
			t.Errorf("event %v", e)
		}
		o.stands(result)
		if want == 0 {
			l.do(e.Allow())
		} else {
			l.do(e.Deny(0))
		}
		o.want(result, want)
		for _, again := range []error{e.Allow(), e.Deny(0), e.Respond(deny)} {
			wantError(t, again, unix.EALREADY, "respond", l.path("f"))
		}
		l.do(e.Close())
		wantError(t, e.Allow(), unix.EALREADY)
	}
	if n := l.w.Defaulted(); n != 0 {
		t.Errorf("%d default answers", n)
	}
}

// TestPermissionOwnProcess: what this process does itself is allowed at once,
// without an event, whatever the default answer is; by ReportTID, too.
func TestPermissionOwnProcess(t *testing.T) {
	for _, tid := range []bool{false, true} {
		options := contentOptions(deny)
		options.ReportTID = tid
		l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm | accessPerm})
		for range 10 {
			done := make(chan struct{})
			go func() {
				runtime.LockOSThread() // a thread that the watcher has not seen
				l.read("f")
				close(done)
			}()
			select {
			case <-done:
			case <-time.After(patience):
				t.Fatal("this process waits for itself")
			}
		}
		l.quiet("it was this process")
		result := o.begin("open", l.path("f"))
		e := l.receive()
		if tid == (e.TID == 0) || tid != (e.PID == 0) {
			t.Errorf("event %v", e)
		}
		l.do(e.Allow())
		o.want(result, 0)
		l.do(e.Close())
		l.w.Close()
	}
}

// TestPermissionDeadline: who gets no answer gets the default one at the
// deadline, whether the consumer has the event or never receives.
func TestPermissionDeadline(t *testing.T) {
	for _, byDefault := range []kernstream.Response{deny, allow} {
		options := contentOptions(byDefault)
		options.Deadline = 50 * time.Millisecond
		l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
		want := unix.EPERM
		if byDefault.Allow {
			want = 0
		}
		o.want(o.begin("open", l.path("f")), want) // nobody receives
		result := o.begin("open", l.path("f"))
		e := l.receive()
		o.want(result, want)
		if e.When.IsZero() || e.FD() < 0 {
			t.Errorf("event %v", e)
		}
		text := make([]byte, 4)
		if n, err := unix.Pread(e.FD(), text, 0); n != 4 || err != nil {
			t.Errorf("the descriptor is closed: %v", err)
		}
		wantError(t, e.Allow(), os.ErrDeadlineExceeded, l.path("f"))
		wantError(t, e.Deny(0), os.ErrDeadlineExceeded)
		l.do(e.Close())
		if n := l.w.Defaulted(); n != 2 {
			t.Errorf("%d default answers; want 2", n)
		}
		l.w.Close()
	}
}

// TestPermissionEnds: at the end of the stream, whatever it is, all who wait get
// the default answer: those whose event the consumer has, those whose event
// nobody received, and those whose event was not read.
func TestPermissionEnds(t *testing.T) {
	for _, byDefault := range []kernstream.Response{deny, allow} {
		want := unix.EPERM
		if byDefault.Allow {
			want = 0
		}
		l, o := newPermissionLab(t, contentOptions(byDefault), "f", kernstream.Mark{Path: "f", Ops: openPerm})
		var results []<-chan opened
		for range 30 {
			results = append(results, o.begin("open", l.path("f")))
		}
		o.waiting(30)
		e := l.receive()
		l.w.Close()
		for _, result := range results {
			o.want(result, want)
		}
		wantError(t, e.Allow(), os.ErrClosed)
		if n := l.w.Defaulted(); n != 30 {
			t.Errorf("%d default answers; want 30", n)
		}
		l.do(e.Close())
		o.want(o.begin("open", l.path("f")), 0) // no mark is left
	}
}
