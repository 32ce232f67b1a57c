package kernstream_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What the kernel does with permission events, and what a program sees of it.
//
// Not tested, and why: an exec by the process that answers, which hangs it for
// good (ProcessWatcher.Start refuses it, which is tested); a queue that is full,
// which cannot be, since it has no limit; what is in the audit log, which a
// kernel may have turned off; the kernel's watchdog_timeout, which only writes to
// the log; and opening a descriptor again through /proc/self/fd, which is an open
// of this process like any other.

// TestPermissionOperations: each operation that asks does so with its bit: to
// open a file, to execute it, to read it, and with OpOnDir, of a directory.
func TestPermissionOperations(t *testing.T) {
	l, o := newPermissionLab(t, contentOptions(deny), "d/f", kernstream.Mark{Path: "d/f", Ops: openPerm | accessPerm | execPerm})
	expect := func(what, path string, ops ...kernstream.FileOp) {
		t.Helper()
		result := o.begin(what, l.path(path))
		for _, op := range ops {
			e := l.receive()
			if e.Ops != op || e.Path != l.path(path) {
				t.Errorf("%s: event %v; want %v of %s", what, e, op, path)
			}
			l.do(e.Allow())
			l.do(e.Close())
		}
		o.want(result, 0)
	}
	expect("open", "d/f", openPerm)
	expect("read", "d/f", openPerm, accessPerm)
	expect("write", "d/f", openPerm)
	expect("list", "d") // not without OpOnDir
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("d"), Ops: openPerm | onDir}))
	expect("list", "d", openPerm)

	exe, err := os.ReadFile("/proc/self/exe")
	l.do(err)
	l.do(os.WriteFile(l.path("exe"), exe, 0o755))
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("exe"), Ops: execPerm}))
	result := o.begin("exec", l.path("exe"))
	e := l.receive()
	if e.Ops != execPerm || e.Path != l.path("exe") {
		t.Errorf("event %v", e)
	}
	l.do(e.Deny(0))
	l.do(e.Close())
	o.want(result, unix.EPERM)
}

// TestPermissionCreated: what is created and denied exists all the same.
func TestPermissionCreated(t *testing.T) {
	l, o := newPermissionLab(t, contentOptions(deny), "", kernstream.Mark{Path: "", Ops: openPerm | onChild})
	result := o.begin("create", l.path("new"))
	e := l.receive()
	l.do(e.Deny(0))
	l.do(e.Close())
	o.want(result, unix.EPERM)
	if _, err := os.Stat(l.path("new")); err != nil {
		t.Error(err)
	}
}

// TestPermissionPreAccess: before a range of a file is read or written, the
// watcher is asked, with whole pages; the error that it denies with is that of
// the operation.
func TestPermissionPreAccess(t *testing.T) {
	testenv.NeedKernel(t, 6, 14, "FAN_PRE_ACCESS")
	needMarks(t)
	testenv.Feature(t, "file events", "permission before an access")
	dir := diskDir(t, "ext4")
	o := newOpeners(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: dir}
	l.do(os.WriteFile(l.path("f"), make([]byte, 100_000), 0o644))
	l.watch(preContentOptions(deny), kernstream.Mark{Path: "f", Ops: preAccess})
	for _, what := range []string{"read", "write"} { // 5,000 bytes from byte 12,345 on
		for _, want := range []unix.Errno{0, unix.ENOSPC} {
			result := o.begin(what, l.path("f"))
			e := l.receive()
			if e.Ops != preAccess || e.Offset != 12_288 || e.Length != 8_192 {
				t.Errorf("%s: event %v, bytes %d+%d", what, e, e.Offset, e.Length)
			}
			var shape struct {
				Events         []string
				Offset, Length uint64
			}
			text, err := json.Marshal(e)
			l.do(err)
			l.do(json.Unmarshal(text, &shape))
			if shape.Offset != e.Offset || shape.Length != e.Length || fmt.Sprint(shape.Events) != "[pre_access]" ||
				!strings.Contains(e.String(), "bytes 12288+8192") {
				t.Errorf("%s and %s", text, e)
			}
			// The range can be filled in first.
			if n, err := unix.Pread(e.FD(), make([]byte, 10), 12_345); n != 10 || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
			if want == 0 {
				l.do(e.Allow())
			} else {
				l.do(e.Deny(want))
			}
			l.do(e.Close())
			o.want(result, want)
		}
	}
	l.w.Close()

	// A group that was made elsewhere may not tell of descriptors that it could not
	// make, and yet of ranges.
	group := rawGroup(t, unix.FAN_CLASS_PRE_CONTENT|unix.FAN_UNLIMITED_QUEUE)
	l.watch(&kernstream.FileOptions{Group: group, Class: kernstream.ClassPreContent}, kernstream.Mark{Path: "f", Ops: preAccess})
	result := o.begin("read", l.path("f"))
	e := l.receive()
	if e.Ops != preAccess || e.Offset != 12_288 || e.Length != 8_192 {
		t.Errorf("event %v, bytes %d+%d", e, e.Offset, e.Length)
	}
	l.do(e.Deny(unix.EIO))
	l.do(e.Close())
	o.want(result, unix.EIO)
}

// TestPermissionClasses: a watcher of ClassPreContent is asked before one of
// ClassContent, and what it denies that one and notifications do not see.
func TestPermissionClasses(t *testing.T) {
	l, o := newPermissionLab(t, contentOptions(deny), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	pre := &fileLab{t: t, dir: l.dir}
	pre.watch(preContentOptions(deny), kernstream.Mark{Path: "f", Ops: openPerm})
	told := &fileLab{t: t, dir: l.dir}
	told.watch(nil, kernstream.Mark{Path: "f", Ops: opOpen})
	for _, want := range []unix.Errno{unix.EPERM, 0} {
		result := o.begin("open", l.path("f"))
		e := pre.receive()
		if want != 0 {
			l.do(e.Deny(0))
			l.do(e.Close())
			o.want(result, want)
			l.quiet("it was denied before")
			told.quiet("it was denied")
			continue
		}
		l.do(e.Allow())
		l.do(e.Close())
		e = l.receive()
		l.do(e.Allow())
		l.do(e.Close())
		o.want(result, want)
		if e := told.receive(); e.Ops != opOpen {
			t.Errorf("event %v", e)
		}
	}
}

// TestPermissionUnmark: taking marks away lets nobody go who waits already.
func TestPermissionUnmark(t *testing.T) {
	mark := kernstream.Mark{Path: "f", Ops: openPerm}
	l, o := newPermissionLab(t, contentOptions(deny), "f", mark)
	mark.Path = l.path("f")
	for _, unmark := range []func() error{
		func() error { return l.w.Unmark(mark) },
		func() error { return l.w.Flush(inode) },
	} {
		result := o.begin("open", l.path("f"))
		e := l.receive()
		l.do(unmark())
		o.want(o.begin("open", l.path("f")), 0)
		o.stands(result)
		l.do(e.Deny(0))
		l.do(e.Close())
		o.want(result, unix.EPERM)
		l.do(l.w.Mark(mark))
	}
}

// TestPermissionWaiterKilled: an answer to somebody who was killed meanwhile is
// none to anybody else, and is no error.
func TestPermissionWaiterKilled(t *testing.T) {
	l, o := newPermissionLab(t, contentOptions(deny), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	victim := newOpeners(t)
	victim.begin("open", l.path("f"))
	e := l.receive()
	l.do(victim.cmd.Process.Kill())
	awaitExit(t, victim.pid())
	result := o.begin("open", l.path("f"))
	other := l.receive()
	l.do(e.Allow())
	l.do(e.Close())
	o.stands(result)
	l.do(other.Deny(0))
	l.do(other.Close())
	o.want(result, unix.EPERM)
}

// TestPermissionNotifications: a watcher that asks also tells, in one order, and
// whoever waits is not held up by events that nobody receives. What it tells has
// a descriptor if that was asked for and there is room.
func TestPermissionNotifications(t *testing.T) {
	for _, descriptors := range []bool{false, true} {
		options := contentOptions(deny)
		options.Descriptors = descriptors
		options.MaxPending = 8
		l, o := newPermissionLab(t, options, "f g", kernstream.Mark{Path: "f", Ops: openPerm | opOpen}, kernstream.Mark{Path: "g", Ops: opOpen})
		result := o.begin("open", l.path("f"))
		e := l.receive()
		l.do(e.Allow())
		l.do(e.Close())
		o.want(result, 0)
		e = l.receive()
		if e.Ops != opOpen || e.Path != l.path("f") || descriptors != (e.FD() >= 0) {
			t.Errorf("event %v, descriptor %d", e, e.FD())
		}
		if err := e.Allow(); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Allow of what does not ask: %v", err)
		}
		l.do(e.Close())
		for range 20 { // nobody receives
			o.want(o.begin("open", l.path("g")), 0)
			l.read("f") // this process is not asked, but told of
		}
		l.drained()
		waits := o.begin("open", l.path("f"))
		owned, seen := 0, 0
		for {
			e := l.receive()
			if e.Ops.Has(openPerm) {
				l.do(e.Allow())
				l.do(e.Close())
				break
			}
			if e.FD() >= 0 {
				owned++
			} else if descriptors && !errors.Is(e.Err, unix.EMFILE) {
				t.Errorf("event %v has no descriptor, and does not say why", e)
			}
			seen++
			l.do(e.Close())
		}
		if descriptors && owned == 0 || !descriptors && owned > 0 {
			t.Errorf("%d of %d events have a descriptor", owned, seen)
		}
		o.want(waits, 0)
		l.w.Close()
	}
}

// TestPermissionAdopt: a group that was made elsewhere goes on, with the question
// that is in its queue, if the options say what it is.
func TestPermissionAdopt(t *testing.T) {
	needMarks(t)
	o := newOpeners(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	for _, class := range []kernstream.FileClass{kernstream.ClassContent, kernstream.ClassPreContent} {
		flags := map[kernstream.FileClass]uint{kernstream.ClassContent: unix.FAN_CLASS_CONTENT, kernstream.ClassPreContent: unix.FAN_CLASS_PRE_CONTENT}[class]
		group := rawGroup(t, flags|unix.FAN_UNLIMITED_QUEUE)
		limited := rawGroup(t, flags)
		for _, test := range []struct {
			options kernstream.FileOptions
			words   string
		}{
			{kernstream.FileOptions{Group: group}, "Class must be " + class.String()},
			{kernstream.FileOptions{Group: group, Class: kernstream.ClassContent + kernstream.ClassPreContent - class}, "Class must be " + class.String()},
			{kernstream.FileOptions{Group: group, Class: class, Audit: true}, "FAN_ENABLE_AUDIT"},
			{kernstream.FileOptions{Group: limited, Class: class}, "FAN_UNLIMITED_QUEUE"},
		} {
			_, err := kernstream.WatchFiles(t.Context(), &test.options)
			wantError(t, err, unix.EINVAL, test.words)
		}
		l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, unix.AT_FDCWD, l.path("f")))
		result := o.begin("open", l.path("f"))
		o.waiting(1)
		w, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: group, Class: class})
		l.do(err)
		e := receiveFile(t, w)
		l.do(e.Deny(0))
		l.do(e.Close())
		o.want(result, unix.EPERM)
		w.Close()
		w, err = kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: limited, Class: class, Default: allow})
		l.do(err)
		w.Close()
	}
	group := rawGroup(t, 0)
	defer group.Close()
	_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: group, Class: kernstream.ClassContent})
	wantError(t, err, unix.EINVAL, "of class notification")
}

// TestPermissionRefused: what does not go together is refused with a sentence
// that says why.
func TestPermissionRefused(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		options kernstream.FileOptions
		words   string
	}{
		{kernstream.FileOptions{Class: 7}, "unknown FileClass(7)"},
		{kernstream.FileOptions{Deadline: time.Second}, "set Class"},
		{kernstream.FileOptions{Default: allow}, "set Class"},
		{kernstream.FileOptions{MaxPending: 1}, "set Class"},
		{kernstream.FileOptions{Audit: true}, "set Class"},
		{kernstream.FileOptions{Class: kernstream.ClassContent, Deadline: -2}, "NoDeadline"},
		{kernstream.FileOptions{Class: kernstream.ClassContent, MaxPending: -1}, "MaxPending"},
		{kernstream.FileOptions{Class: kernstream.ClassContent, Default: kernstream.Response{Errno: unix.EIO}}, "ClassPreContent"},
		{kernstream.FileOptions{Class: kernstream.ClassPreContent, Default: kernstream.Response{Errno: unix.ENOENT}}, "ENOENT"},
		{kernstream.FileOptions{Class: kernstream.ClassPreContent, Default: kernstream.Response{Audit: true}}, "FileOptions.Audit"},
	} {
		_, err := kernstream.WatchFiles(t.Context(), &test.options)
		wantError(t, err, unix.EINVAL, test.words)
	}
	for _, test := range []struct {
		class kernstream.FileClass
		ops   kernstream.FileOp
		words string
	}{
		{kernstream.ClassNotification, openPerm, "FileOptions.Class"},
		{kernstream.ClassContent, preAccess, "ClassPreContent alone"},
		{kernstream.ClassPreContent, preAccess | onDir, "does not go together with ondir"},
		{kernstream.ClassContent, openPerm | kernstream.OpCreate, "create come without a descriptor"},
	} {
		_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Class: test.class}, kernstream.Mark{Path: dir, Ops: test.ops})
		wantError(t, err, unix.EINVAL, dir, test.words)
	}
	if os.Geteuid() != 0 {
		for _, class := range []kernstream.FileClass{kernstream.ClassContent, kernstream.ClassPreContent} {
			_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Class: class})
			wantError(t, err, fs.ErrPermission, "CAP_SYS_ADMIN", "wait for an answer")
		}
	}
	needMarks(t)
	_, err := kernstream.WatchFiles(t.Context(), contentOptions(deny), kernstream.Mark{Path: "/proc/self/status", Ops: openPerm})
	wantError(t, err, errors.ErrUnsupported, "proc", "open_perm")
	pre := kernstream.Mark{Path: labDir(t), Ops: preAccess | onChild}
	_, err = kernstream.WatchFiles(t.Context(), preContentOptions(deny), pre)
	wantError(t, err, errors.ErrUnsupported, pre.Path)
}

// TestPermissionPaths: an event has the path of its file when that was removed,
// when its name only looks like that, and when it is of another mount namespace.
func TestPermissionPaths(t *testing.T) {
	odd := "odd (deleted)"
	l, o := newPermissionLab(t, contentOptions(deny), "f g d/", kernstream.Mark{Type: filesystem, Path: "", Ops: openPerm})
	l.do(os.WriteFile(l.path(odd), nil, 0o644))
	judge := func(result <-chan opened, path string, state kernstream.PathState) {
		t.Helper()
		e := l.receive()
		if e.Path != path || e.PathState != state {
			t.Errorf("event %v; want %s, %v", e, path, state)
		}
		l.do(e.Allow())
		l.do(e.Close())
		o.want(result, 0)
	}
	judge(o.begin("open", l.path("f")), l.path("f"), kernstream.PathExact)
	judge(o.begin("open", l.path(odd)), l.path(odd), kernstream.PathExact)

	for _, linked := range []bool{false, true} {
		name := fmt.Sprint("gone", linked)
		l.ensure(name)
		if linked { // the file has another name
			l.do(os.Link(l.path(name), l.path("d/"+name)))
		}
		f, err := os.Open(l.path(name))
		l.do(err)
		l.do(os.Remove(l.path(name)))
		judge(o.begin("open", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())), l.path(name), kernstream.PathDeleted)
		f.Close()
	}

	a := newAgent(t, unix.CLONE_NEWNS)
	result := make(chan string, 1)
	go func() {
		text, err := a.try("read", l.path("g"))
		result <- fmt.Sprint(text, err)
	}()
	e := l.receive()
	if e.PathState != kernstream.PathOtherNamespace || !strings.HasSuffix(e.Path, "/g") || e.PID != a.PID {
		t.Errorf("event %v", e)
	}
	l.do(e.Allow())
	l.do(e.Close())
	<-result
}

// TestPermissionOverlay: a file system without handles can ask, too.
func TestPermissionOverlay(t *testing.T) {
	needMarks(t)
	dir := overlayDir(t)
	o := newOpeners(t)
	l := &fileLab{t: t, dir: dir}
	l.ensure("f")
	l.watch(contentOptions(deny), kernstream.Mark{Type: kernstream.MarkMount, Path: "", Ops: openPerm})
	result := o.begin("open", l.path("f"))
	e := l.receive()
	if e.Path != l.path("f") || e.PathState != kernstream.PathExact {
		t.Errorf("event %v", e)
	}
	l.do(e.Deny(0))
	l.do(e.Close())
	o.want(result, unix.EPERM)
}

// TestPermissionPidFD: with ReportPidFD the process that waits can be named,
// watched and killed.
func TestPermissionPidFD(t *testing.T) {
	options := contentOptions(deny)
	options.ReportPidFD = true
	l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
	victim := newOpeners(t)
	victim.begin("open", l.path("f"))
	e := l.receive()
	target, err := e.Process()
	l.do(err)
	s, err := kernstream.WatchProcess(t.Context(), target, nil)
	l.do(err)
	defer s.Close()
	l.do(victim.cmd.Process.Kill())
	if exit := next(t, s.C); exit.Process.PID != victim.pid() || exit.Status.Signal() != syscall.SIGKILL {
		t.Errorf("event %v", exit)
	}
	l.do(e.Close())
	result := o.begin("open", l.path("f"))
	e = l.receive()
	l.do(e.Allow())
	l.do(e.Close())
	o.want(result, 0)
}

// TestPermissionPidFDRoom: pidfds are descriptors, too: events that nobody receives
// have no more of them than MaxPending, whether they ask or not, and by default so
// few that descriptors do not run out.
func TestPermissionPidFDRoom(t *testing.T) {
	for _, descriptors := range []bool{false, true} {
		options := contentOptions(deny)
		options.ReportPidFD = true
		options.Descriptors = descriptors
		options.MaxPending = 8
		l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm},
			kernstream.Mark{Type: kernstream.MarkMount, Path: ".", Ops: kernstream.OpCloseNoWrite})
		const files = 20
		for i := range files {
			l.ensure(fmt.Sprint(i))
			o.want(o.begin("open", l.path(fmt.Sprint(i))), 0)
		}
		l.drained()
		owned := 0
		for range files {
			e := l.receive()
			_, err := e.Process()
			switch {
			case err == nil && descriptors == (e.FD() >= 0) && e.Err == nil:
				owned++
			case !errors.Is(err, unix.EMFILE), e.FD() >= 0, descriptors != errors.Is(e.Err, unix.EMFILE):
				t.Errorf("event %v, descriptor %d, process: %v", e, e.FD(), err)
			}
			l.do(e.Close())
		}
		if owned < 8 || owned >= files {
			t.Errorf("%d of %d events have a pidfd; want 8, and what was received meanwhile", owned, files)
		}
		l.w.Close()
	}

	needMarks(t)
	o := newOpeners(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	defer l.limitDescriptors(240)()
	options := contentOptions(allow)
	options.ReportPidFD = true
	l.watch(options, kernstream.Mark{Path: "f", Ops: openPerm})
	results := make([]<-chan opened, 200)
	for i := range results {
		results[i] = o.begin("open", l.path("f"))
	}
	for begin := time.Now(); l.w.Defaulted() < 160; time.Sleep(time.Millisecond) {
		if time.Since(begin) > patience {
			t.Fatalf("%d default answers; want 160", l.w.Defaulted())
		}
	}
	f, err := os.Open("/dev/null")
	l.do(err)
	f.Close()
	l.do(l.w.Close())
	for _, result := range results {
		o.want(result, 0)
	}
}

// TestPermissionNoStart: a process that answers does not start others: it could
// wait for itself for ever. After the end of the watcher it does again.
func TestPermissionNoStart(t *testing.T) {
	needMarks(t)
	w := newProcessWatcher(t)
	l := newFileLab(t, contentOptions(deny), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	for range 2 {
		cmd := exec.Command("/bin/true")
		watch, err := w.Start(cmd, nil)
		var op *kernstream.OpError
		if watch != nil || !errors.Is(err, unix.EDEADLK) || !errors.As(err, &op) || op.Source != "process" || op.Object != "/bin/true" || cmd.Process != nil {
			t.Errorf("%v, %v", watch, err)
		}
	}
	l.w.Close()
	cmd := exec.Command("/bin/true")
	_, err := w.Start(cmd, nil)
	l.do(err)
	if e := next(t, w.C); e.Process.PID != cmd.Process.Pid {
		t.Errorf("event %v", e)
	}
	l.do(cmd.Wait())
	_, err = kernstream.WatchFiles(t.Context(), contentOptions(deny), kernstream.Mark{Path: l.path("nothing"), Ops: openPerm})
	wantError(t, err, fs.ErrNotExist)
	cmd = exec.Command("/bin/true")
	_, err = w.Start(cmd, nil) // no watcher is left of one that failed
	l.do(err)
	l.do(cmd.Wait())
}

// TestPermissionText: responses, classes and trust as text.
func TestPermissionText(t *testing.T) {
	for text, value := range map[string]fmt.Stringer{
		"allow": allow, "deny": deny, "deny EBUSY": kernstream.Response{Errno: unix.EBUSY},
		"allow, audit": kernstream.Response{Allow: true, Audit: true},
		"deny, audit, rule 7, subject trusted: no, object trusted: unknown": kernstream.Response{
			Audit: true, Rule: &kernstream.AuditRule{Number: 7, Object: kernstream.TrustUnknown},
		},
		"notification": kernstream.ClassNotification, "content": kernstream.ClassContent, "pre_content": kernstream.ClassPreContent,
		"FileClass(9)": kernstream.FileClass(9), "yes": kernstream.TrustYes, "Trust(9)": kernstream.Trust(9),
	} {
		if got := value.String(); got != text {
			t.Errorf("%q; want %q", got, text)
		}
	}
}
