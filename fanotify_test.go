package kernstream_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Short names for what tests are full of.
const (
	inode      = kernstream.MarkInode
	filesystem = kernstream.MarkFilesystem
	onDir      = kernstream.OpOnDir
	onChild    = kernstream.OpEventOnChild
	opOpen     = kernstream.OpOpen
	opClose    = kernstream.OpClose
)

// needMarks skips a test where the tests cannot mark a tmpfs.
func needMarks(t testing.TB) {
	t.Helper()
	testenv.NeedRoot(t, "a filesystem mark")
}

// TestParityF1EveryOperation: every operation that notifications have is
// reported with its bit, and with the path of what it was done to.
func TestParityF1EveryOperation(t *testing.T) {
	needMarks(t)
	testenv.Feature(t, "file events", "handle")
	const all = kernstream.OpAccess | kernstream.OpModify | kernstream.OpAttrib | opClose | opOpen | kernstream.OpMove |
		kernstream.OpCreate | kernstream.OpDelete | kernstream.OpDeleteSelf | kernstream.OpMoveSelf | kernstream.OpRename | onDir
	l := newFileLab(t, nil, "d/ e/ d/f", kernstream.Mark{Type: filesystem, Ops: all | kernstream.OpOpenExec})
	l.read("d/f")
	l.want(told{"d/f": opOpen | kernstream.OpAccess | kernstream.OpCloseNoWrite})
	l.do(os.WriteFile(l.path("d/f"), []byte("more"), 0o600))
	l.want(told{"d/f": opOpen | kernstream.OpModify | kernstream.OpCloseWrite})
	l.do(os.Chmod(l.path("d/f"), 0o600))
	l.want(told{"d/f": kernstream.OpAttrib})
	l.do(os.Truncate(l.path("d/f"), 1))
	l.want(told{"d/f": kernstream.OpModify})
	l.do(os.Mkdir(l.path("d/sub"), 0o755))
	l.want(told{"d/sub": kernstream.OpCreate | onDir})
	l.list("d/sub")
	l.want(told{"d/sub": opOpen | kernstream.OpAccess | kernstream.OpCloseNoWrite | onDir})
	l.do(os.Rename(l.path("d/f"), l.path("e/g")))
	l.want(told{
		"d/f": kernstream.OpMovedFrom, "e/g": kernstream.OpMovedTo | kernstream.OpMoveSelf,
		"d/f > e/g": kernstream.OpRename,
	})
	l.do(os.Rename(l.path("d/sub"), l.path("d/sub2")))
	l.want(told{
		"d/sub": kernstream.OpMovedFrom | onDir, "d/sub2": kernstream.OpMovedTo | kernstream.OpMoveSelf | onDir,
		"d/sub > d/sub2": kernstream.OpRename | onDir,
	})
	l.do(os.Remove(l.path("e/g")))
	l.want(told{"e/g": kernstream.OpDelete, " (deleted)": kernstream.OpAttrib | kernstream.OpDeleteSelf})
	l.do(os.Remove(l.path("d/sub2")))
	l.want(told{"d/sub2": kernstream.OpDelete | onDir, "d/sub2 (deleted)": kernstream.OpDeleteSelf | onDir})
	exe, err := os.ReadFile("/proc/self/exe")
	l.do(err)
	l.do(os.WriteFile(l.path("e/exe"), exe, 0o755))
	l.want(told{"e/exe": kernstream.OpCreate | opOpen | kernstream.OpModify | kernstream.OpCloseWrite})
	cmd := exec.Command(l.path("e/exe"), "-test.run=^$")
	cmd.Env = append(os.Environ(), "KERNSTREAM_TEST_NO_NAMESPACE=x")
	cmd.Run()
	for ops := kernstream.FileOp(0); !ops.Has(kernstream.OpOpenExec); ops = l.receive().Ops {
	}
}

// TestFileLinkCount: a link that is made or removed changes the attributes of
// the file, which is named by one of its links.
func TestFileLinkCount(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "f", kernstream.Mark{Type: filesystem, Ops: kernstream.OpAttrib})
	l.do(os.Link(l.path("f"), l.path("g")))
	if e := l.receive(); e.Ops != kernstream.OpAttrib || e.Path != l.path("f") && e.Path != l.path("g") || e.PathState != kernstream.PathExact {
		t.Errorf("event %v", e)
	}
	l.do(os.Remove(l.path("f")))
	if e := l.receive(); e.Ops != kernstream.OpAttrib {
		t.Errorf("event %v", e)
	}
}

// TestParityF1UnknownBits: a bit without a name is kept, and printed as a
// number.
func TestParityF1UnknownBits(t *testing.T) {
	ops := opOpen | 1<<40
	if !ops.Has(1<<40) || ops.String() != "open|0x10000000000" {
		t.Errorf("%v", ops)
	}
	if got := kernstream.FileOp(0).String(); got != "0" {
		t.Errorf("no bits are %q", got)
	}
}

// TestFileOpNames: each operation has the kernel's name, and is found by it.
func TestFileOpNames(t *testing.T) {
	names := map[string]kernstream.FileOp{
		"access": unix.FAN_ACCESS, "modify": unix.FAN_MODIFY, "attrib": unix.FAN_ATTRIB, "close_write": unix.FAN_CLOSE_WRITE,
		"close_nowrite": unix.FAN_CLOSE_NOWRITE, "open": unix.FAN_OPEN, "moved_from": unix.FAN_MOVED_FROM, "moved_to": unix.FAN_MOVED_TO,
		"create": unix.FAN_CREATE, "delete": unix.FAN_DELETE, "delete_self": unix.FAN_DELETE_SELF, "move_self": unix.FAN_MOVE_SELF,
		"open_exec": unix.FAN_OPEN_EXEC, "q_overflow": unix.FAN_Q_OVERFLOW, "fs_error": unix.FAN_FS_ERROR, "rename": unix.FAN_RENAME,
		"open_perm": unix.FAN_OPEN_PERM, "access_perm": unix.FAN_ACCESS_PERM, "open_exec_perm": unix.FAN_OPEN_EXEC_PERM,
		"pre_access": unix.FAN_PRE_ACCESS, "ondir": unix.FAN_ONDIR, "event_on_child": unix.FAN_EVENT_ON_CHILD,
	}
	for name, op := range names {
		if op.String() != name {
			t.Errorf("%#x is %q; want %q", uint64(op), op, name)
		}
		if got, err := kernstream.ParseFileOp(name); got != op || err != nil {
			t.Errorf("%q is %v, %v", name, got, err)
		}
	}
	for list, want := range map[string]kernstream.FileOp{
		"open,close_write": opOpen | kernstream.OpCloseWrite, "open|create": opOpen | kernstream.OpCreate,
		"close": opClose, "move , ondir": kernstream.OpMove | onDir,
	} {
		if got, err := kernstream.ParseFileOp(list); got != want || err != nil {
			t.Errorf("%q is %v, %v; want %v", list, got, err, want)
		}
	}
	for _, list := range []string{"", ",", "open,nothing", "OPEN", "mnt_attach", "0x20"} {
		if got, err := kernstream.ParseFileOp(list); err == nil || !strings.Contains(err.Error(), "there are access, ") {
			t.Errorf("%q is %v, %v; want an error", list, got, err)
		}
	}
}

// TestParityF2EventFlags: the flags of the descriptors are those of open(2)
// that the kernel takes; others are refused by name.
func TestParityF2EventFlags(t *testing.T) {
	for flags, name := range map[int]string{
		unix.O_PATH: "O_PATH", unix.O_DIRECT: "O_DIRECT", unix.O_NOFOLLOW: "O_NOFOLLOW", unix.O_TRUNC: "O_TRUNC",
		unix.O_CREAT: "O_CREAT", unix.O_EXCL | unix.O_RDWR: "O_EXCL", unix.O_ACCMODE: "O_WRONLY and O_RDWR",
		unix.O_DIRECTORY | unix.O_NOCTTY: "O_DIRECTORY, O_NOCTTY", unix.O_TMPFILE: "O_TMPFILE", 1 << 30: "0x40000000",
	} {
		_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Descriptors: true, EventFlags: flags})
		wantError(t, err, unix.EINVAL, name)
	}
	_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{EventFlags: unix.O_RDWR})
	wantError(t, err, unix.EINVAL, "Descriptors")
	needMarks(t)
	for _, flags := range []int{
		0, unix.O_WRONLY, unix.O_RDWR | unix.O_APPEND, unix.O_NONBLOCK, unix.O_SYNC, unix.O_DSYNC, unix.O_CLOEXEC,
		unix.O_NOATIME, unix.O_LARGEFILE,
	} {
		l := newFileLab(t, &kernstream.FileOptions{Descriptors: true, EventFlags: flags}, "f", kernstream.Mark{Path: "f", Ops: opOpen})
		l.read("f")
		e := l.receive()
		got, err := unix.FcntlInt(uintptr(e.FD()), unix.F_GETFL, 0)
		if want := flags &^ unix.O_CLOEXEC; err != nil || got&(want|unix.O_ACCMODE) != want {
			t.Errorf("flags %#x; want %#x (%v)", got, want, err)
		}
		if got, err := unix.FcntlInt(uintptr(e.FD()), unix.F_GETFD, 0); err != nil || got&unix.FD_CLOEXEC == 0 {
			t.Errorf("the descriptor is not closed by exec (%v)", err)
		}
		e.Close()
		l.w.Close()
	}
}

// TestParityF4Descriptors: with Descriptors each event has one, of what the
// event was about, whatever it is called by then; it is closed once, by Close,
// or goes to the caller by Detach.
func TestParityF4Descriptors(t *testing.T) {
	needMarks(t)
	testenv.Feature(t, "file events", "descriptor")
	l := newFileLab(t, &kernstream.FileOptions{Descriptors: true}, "f", kernstream.Mark{Type: filesystem, Ops: opOpen | onDir})
	l.read("f")
	e := l.receive()
	text := make([]byte, 8)
	if n, err := unix.Pread(e.FD(), text, 0); string(text[:n]) != "data" || err != nil || e.Via != kernstream.ViaDescriptor {
		t.Errorf("the descriptor reads %q, %v, via %v", text[:n], err, e.Via)
	}
	if e.Path != l.path("f") || e.PathState != kernstream.PathExact || e.PID != os.Getpid() || e.Err != nil {
		t.Errorf("event %v", e)
	}
	if f := e.File(); f != e.File() || int(f.Fd()) != e.FD() || f.Name() != e.Path {
		t.Errorf("File is %v", f)
	}
	fd := e.FD()
	for range 2 {
		l.do(e.Close())
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF || e.FD() != -1 || e.File() != nil {
		t.Errorf("after Close: %v, FD %d", err, e.FD())
	}
	if _, err := e.Detach(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Detach after Close: %v", err)
	}
	l.quiet("reading the descriptor and closing it makes no events")

	l.read("f")
	e = l.receive()
	f, err := e.Detach()
	l.do(err)
	l.do(e.Close())
	if n, err := f.Read(text); string(text[:n]) != "data" || err != nil {
		t.Errorf("the detached file reads %q, %v", text[:n], err)
	}
	if _, err := e.Detach(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a second Detach: %v", err)
	}
	f.Close()
	l.list(".")
	if e := l.receive(); e.Path != l.dir || e.Close() != nil {
		t.Errorf("event %v; want the directory", e)
	}
}

// TestParityF4WithoutDescriptor: an event that owns nothing says so, and Close
// is legal.
func TestParityF4WithoutDescriptor(t *testing.T) {
	l := newFileLab(t, nil, "f", kernstream.Mark{Ops: opOpen | onChild})
	l.read("f")
	e := l.receive()
	if e.FD() != -1 || e.File() != nil || e.Close() != nil || e.Close() != nil {
		t.Errorf("event %v has a descriptor", e)
	}
	if _, err := e.Detach(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Detach: %v", err)
	}
}

// TestParityF6Overflow: a full queue is an event at its place, without file or
// process: 16,384 events, and then it, in both kinds of groups. What comes
// later follows.
func TestParityF6Overflow(t *testing.T) {
	needMarks(t)
	limit := 0
	text, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events")
	if _, serr := fmt.Sscan(string(text), &limit); err != nil || serr != nil || limit > 1<<17 {
		t.Fatalf("max_queued_events is %q: %v", text, err)
	}
	kinds := map[string]uint{
		"handle": unix.FAN_REPORT_DFID_NAME, "descriptor": 0,
		"descriptor or error": unix.FAN_REPORT_FD_ERROR,
	}
	for name, flags := range kinds {
		t.Run(name, func(t *testing.T) {
			if flags == unix.FAN_REPORT_FD_ERROR && !hasFDError() {
				testenv.NeedKernel(t, 6, 13, "FAN_REPORT_FD_ERROR")
			}
			testenv.NoLeaks(t)
			l := &fileLab{t: t, dir: labDir(t)}
			group := rawGroup(t, flags)
			l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, unix.AT_FDCWD, l.dir))
			for i := range limit + 10 {
				l.ensure(fmt.Sprint("f", i))
			}
			w, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: group})
			l.do(err)
			defer w.Close()
			l.w = w
			for i := range limit {
				if e := l.receive(); e.Ops.Has(kernstream.OpOverflow) || e.Path != l.path(fmt.Sprint("f", i)) {
					t.Fatalf("event %d of %d is %v", i, limit, e)
				}
			}
			e := l.receive()
			if e.Ops != kernstream.OpOverflow || e.Path != "" || e.PID != 0 || e.FD() != -1 || e.Err != nil {
				t.Errorf("event %v; want an overflow without file and process", e)
			}
			l.ensure("after")
			if e := l.receive(); e.Path != l.path("after") {
				t.Errorf("event %v; want the one after the overflow", e)
			}
		})
	}
}

// hasFDError tells whether the kernel has FAN_REPORT_FD_ERROR: 6.13 and some
// stable versions of older ones.
func hasFDError() bool {
	fd, err := unix.FanotifyInit(unix.FAN_CLOEXEC|unix.FAN_REPORT_FD_ERROR, unix.O_RDONLY)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

// TestFileOverflowPlace: while the consumer is slow, the kernel's queue is the
// buffer; what is lost is told where it is missing, and all that is not lost
// comes, in its order.
func TestFileOverflowPlace(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "", kernstream.Mark{Type: filesystem, Ops: opOpen})
	const files = 20_000
	for i := range files {
		l.ensure(fmt.Sprint("f", i))
	}
	last, overflows := -1, 0
	for last < files {
		e := l.receive()
		if e.Ops.Has(kernstream.OpOverflow) {
			overflows++
			l.ensure(fmt.Sprint("f", files)) // the queue has room by now
			continue
		}
		var i int
		fmt.Sscanf(filepath.Base(e.Path), "f%d", &i)
		if i <= last || overflows == 0 && i != last+1 {
			t.Fatalf("%d overflows, and after event %d comes %d", overflows, last, i)
		}
		last = i
	}
	if overflows != 1 {
		t.Errorf("%d overflows; want one", overflows)
	}
}

// TestParityF7Adopt: a group that was made elsewhere goes on in a watcher, with
// its marks and what is in its queue; Control gives its descriptor back for
// what this package does not do.
func TestParityF7Adopt(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f d/g")
	for _, kind := range []struct {
		flags uint
		via   kernstream.FileVia
	}{{unix.FAN_REPORT_DFID_NAME, kernstream.ViaHandle}, {unix.FAN_REPORT_FID, kernstream.ViaHandle}, {0, kernstream.ViaDescriptor}} {
		for _, mark := range []uint{unix.FAN_MARK_FILESYSTEM, unix.FAN_MARK_MOUNT, unix.FAN_MARK_INODE} {
			group := rawGroup(t, kind.flags) // one that blocks
			l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD|mark, unix.FAN_OPEN|unix.FAN_EVENT_ON_CHILD, unix.AT_FDCWD, l.dir))
			l.read("f")
			w, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: group}, kernstream.Mark{Path: l.path("d/g"), Ops: opOpen})
			l.do(err)
			l.w = w
			if e := l.receive(); e.Path != l.path("f") || e.PathState != kernstream.PathExact || e.Via != kind.via {
				t.Errorf("flags %#x, mark %#x: %v via %v; want f", kind.flags, mark, e, e.Via)
			}
			if group.Close() == nil {
				t.Error("the file was not closed")
			}
			l.read("d/g")
			l.want(told{"d/g": opOpen})
			groups := 0
			l.do(w.Control(func(fd int) {
				groups++
				l.do(unix.FanotifyMark(fd, unix.FAN_MARK_FLUSH|mark, 0, unix.AT_FDCWD, "/"))
			}))
			l.read("f")
			l.quiet("the marks were flushed")
			if groups != 1 {
				t.Errorf("Control was called for %d groups", groups)
			}
			w.Close()
			wantError(t, w.Control(func(int) { t.Error("called after Close") }), os.ErrClosed)
		}
	}
}

// TestFileAdoptRefused: what is no group, or one of another kind, is refused,
// and stays the caller's as it was.
func TestFileAdoptRefused(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	content := rawGroup(t, unix.FAN_CLASS_CONTENT)
	blocking := rawGroup(t, unix.FAN_REPORT_DFID_NAME)
	for _, test := range []struct {
		group *os.File
		marks []kernstream.Mark
		words string
	}{
		{null, nil, "not a fanotify group"},
		{content, nil, "wait for an answer"},
		{blocking, []kernstream.Mark{{Path: "/nowhere", Ops: opOpen}}, "/nowhere"},
	} {
		_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: test.group}, test.marks...)
		if err == nil || !strings.Contains(err.Error(), test.words) {
			t.Errorf("%s: %v; want %q", test.group.Name(), err, test.words)
		}
		if flags, err := unix.FcntlInt(test.group.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
			t.Errorf("%s: flags %#x, %v; want a file that blocks still", test.group.Name(), flags, err)
		}
		if err := test.group.Close(); err != nil {
			t.Error(err)
		}
	}
	null.Close()
	_, err = kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: null})
	wantError(t, err, os.ErrClosed)
}

func init() {
	testenv.RegisterChild("no place in epoll", func([]string) int {
		t := &childTest{}
		group := rawGroup(t, unix.FAN_REPORT_DFID_NAME)
		file, err := os.Open("/proc/self/mountinfo") // the runtime has its poller before that is refused
		if err != nil {
			t.Error(err)
		}
		file.Close()
		if err := testenv.Refuse(unix.ENOSPC, testenv.Refusal{Call: unix.SYS_EPOLL_CTL}); err != nil {
			t.Error(err)
		}
		_, err = kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Group: group})
		wantError(t, err, unix.ENOSPC, "epoll_ctl", "max_user_watches")
		if flags, err := unix.FcntlInt(group.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
			t.Errorf("flags %#x, %v; want a file that blocks still", flags, err)
		}
		if t.failed {
			return 1
		}
		return 0
	})
}

// TestFileAdoptNoPlace: a group that the runtime's poller does not take stays the
// caller's as it was, too.
func TestFileAdoptNoPlace(t *testing.T) {
	needMarks(t)
	if out, err := testenv.Child(t, "no place in epoll").Output(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestParityF8Merged: what one process does to one file while the event waits
// is one event: open, modify and close_write. (F8: the other two tests are
// TestParityF6Overflow, and one of permission events.)
func TestParityF8Merged(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	group := rawGroup(t, unix.FAN_REPORT_DFID_NAME)
	l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD, unix.FAN_OPEN|unix.FAN_MODIFY|unix.FAN_CLOSE, unix.AT_FDCWD, l.path("f")))
	l.do(os.WriteFile(l.path("f"), []byte("x"), 0o644))
	l.do(os.WriteFile(l.path("f"), []byte("y"), 0o644))
	l.watch(&kernstream.FileOptions{Group: group})
	if e := l.receive(); e.Ops != opOpen|kernstream.OpModify|kernstream.OpCloseWrite || e.Path != "" && e.Path != l.path("f") {
		t.Errorf("event %v", e)
	}
	l.quiet("it was one event")
}

// TestFileProcess: an event says which process it was; with ReportTID, which
// thread; with ReportPidFD, it has a pidfd of the process.
func TestFileProcess(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "f", kernstream.Mark{Path: "f", Ops: opOpen})
	pid := touch(t, l.path("f"))
	if e := l.receive(); e.PID != pid || e.TID != 0 {
		t.Errorf("process %d, thread %d; want process %d", e.PID, e.TID, pid)
	}
	l.w.Close()

	l.watch(&kernstream.FileOptions{ReportTID: true}, kernstream.Mark{Path: "f", Ops: opOpen})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l.read("f")
	if e := l.receive(); e.TID != unix.Gettid() || e.PID != 0 {
		t.Errorf("process %d, thread %d; want thread %d", e.PID, e.TID, unix.Gettid())
	}
	l.w.Close()
}

// TestFileEventText: an event in one line, and as JSON, with what is not known
// left out and bytes that are not text kept.
func TestFileEventText(t *testing.T) {
	when := time.Date(2026, 2, 3, 4, 5, 6, 7, time.FixedZone("", 3600))
	for _, test := range []struct {
		event      kernstream.FileEvent
		text, json string
	}{
		{
			kernstream.FileEvent{Ops: opOpen | kernstream.OpCloseWrite, Path: "/a b", PathState: kernstream.PathExact, PID: 7},
			`file close_write|open "/a b" pid 7`,
			`{"events":["close_write","open"],"path":"/a b","path_state":"exact","via":"handle","pid":7}`,
		},
		{
			kernstream.FileEvent{Ops: kernstream.OpRename | onDir, OldPath: "/old", Path: "/<new>", PathState: kernstream.PathExact, Via: kernstream.ViaHandle, TID: 8},
			`file rename|ondir /old to /<new> tid 8`,
			`{"events":["rename","ondir"],"path":"/<new>","old_path":"/old","new_path":"/<new>","path_state":"exact","via":"handle","tid":8}`,
		},
		{
			kernstream.FileEvent{Ops: kernstream.OpOverflow, Via: kernstream.ViaDescriptor},
			`file q_overflow`,
			`{"events":["q_overflow"],"via":"descriptor","overflow":true}`,
		},
		{
			kernstream.FileEvent{Ops: kernstream.OpDelete, Path: "\xff", PathState: kernstream.PathDeleted},
			`file delete "\xff" (deleted)`,
			`{"events":["delete"],"path":"\ufffd","path_raw":"/w==","path_state":"deleted","via":"handle"}`,
		},
		{
			kernstream.FileEvent{Ops: kernstream.OpFSError, Errno: unix.EUCLEAN, Count: 3, Err: errors.New("odd")},
			`file fs_error (unknown) structure needs cleaning (3 times): odd`,
			`{"events":["fs_error"],"path_state":"unknown","via":"handle","errno":"EUCLEAN","count":3,"error":"odd"}`,
		},
	} {
		test.event.When = when
		if got := test.event.String(); got != test.text {
			t.Errorf("got  %s\nwant %s", got, test.text)
		}
		got, err := json.Marshal(&test.event)
		want := strings.Replace(test.json, "{", `{"time":"2026-02-03T03:05:06.000000007Z","source":"file",`, 1)
		want = strings.ReplaceAll(want, `\ufffd`, "\ufffd")
		var x, y any
		if err != nil || json.Unmarshal(got, &x) != nil || json.Unmarshal([]byte(want), &y) != nil || fmt.Sprint(x) != fmt.Sprint(y) {
			t.Errorf("got  %s\nwant %s (%v)", got, want, err)
		}
		if test.event.Time() != when {
			t.Errorf("Time is %v", test.event.Time())
		}
	}
}
