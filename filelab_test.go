package kernstream_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What tests of file events stand on: a watcher, and file systems of all kinds
// to watch.

// A fileLab is a watcher, and what its events have told.
type fileLab struct {
	t   testing.TB
	dir string // a tmpfs of its own
	w   *kernstream.FileWatcher
}

// newFileLab starts a watcher with marks, whose paths are relative to the
// lab's directory. Files and directories are made before, as ensure says.
func newFileLab(t testing.TB, options *kernstream.FileOptions, ensure string, marks ...kernstream.Mark) *fileLab {
	t.Helper()
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure(ensure)
	l.watch(options, marks...)
	return l
}

// watch starts a watcher.
func (l *fileLab) watch(options *kernstream.FileOptions, marks ...kernstream.Mark) {
	l.t.Helper()
	for i := range marks {
		if marks[i].Dir == nil {
			marks[i].Path = filepath.Join(l.dir, marks[i].Path)
		}
	}
	w, err := kernstream.WatchFiles(l.t.Context(), options, marks...)
	if err != nil {
		l.t.Fatal(err)
	}
	l.w = w
	l.t.Cleanup(func() { w.Close() })
}

// ensure makes files, and directories: names with a slash at the end.
func (l *fileLab) ensure(names string) {
	l.t.Helper()
	for name := range strings.FieldsSeq(names) {
		path := l.path(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			l.t.Fatal(err)
		}
		var err error
		if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(path, 0o755)
		} else {
			err = os.WriteFile(path, []byte("data"), 0o644)
		}
		if err != nil {
			l.t.Fatal(err)
		}
	}
}

func (l *fileLab) path(name string) string { return filepath.Join(l.dir, name) }

// read opens a file for reading, reads all of it, and closes it.
func (l *fileLab) read(name string) {
	l.t.Helper()
	if _, err := os.ReadFile(l.path(name)); err != nil {
		l.t.Fatal(err)
	}
}

// list lists a directory.
func (l *fileLab) list(name string) {
	l.t.Helper()
	if _, err := os.ReadDir(l.path(name)); err != nil {
		l.t.Fatal(err)
	}
}

// do fails the test if err is one.
func (l *fileLab) do(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// receive returns the next event.
func (l *fileLab) receive() *kernstream.FileEvent {
	l.t.Helper()
	return receiveFile(l.t, l.w)
}

func receiveFile(t testing.TB, w *kernstream.FileWatcher) *kernstream.FileEvent {
	t.Helper()
	select {
	case e, ok := <-w.C:
		if !ok {
			t.Fatalf("the stream ended: %v", w.Err())
		}
		return e
	case <-time.After(patience):
		t.Fatalf("no event after %v", patience)
	}
	return nil
}

// limitDescriptors lets this process have n descriptors until restore is called.
func (l *fileLab) limitDescriptors(n uint64) (restore func()) {
	l.t.Helper()
	var limit unix.Rlimit
	l.do(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: limit.Max}))
	return func() { l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }
}

// quiet fails the test if there is an event.
func (l *fileLab) quiet(why string) {
	l.t.Helper()
	l.drained()
	select {
	case e, ok := <-l.w.C:
		if !ok {
			l.t.Fatalf("the stream ended: %v", l.w.Err())
		}
		l.t.Fatalf("event %v; want none: %s", e, why)
	case <-time.After(20 * time.Millisecond):
	}
}

// drained waits until the watcher has read all that the kernel has, or an event
// is there to be received.
func (l *fileLab) drained() {
	l.t.Helper()
	for begin := time.Now(); len(l.w.C) == 0 && time.Since(begin) < patience; time.Sleep(time.Millisecond) {
		queued := 0
		l.do(l.w.Control(func(fd int) {
			n, err := unix.IoctlGetInt(fd, unix.TIOCINQ) // FIONREAD
			l.do(err)
			queued += n
		}))
		if queued == 0 {
			return
		}
	}
}

// told is what events told: operations by path, relative to the lab's
// directory. A rename stands as "old > new".
type told map[string]kernstream.FileOp

func (o told) String() string {
	var lines []string
	for _, path := range slices.Sorted(maps.Keys(o)) {
		lines = append(lines, fmt.Sprintf("%s: %v", path, o[path]))
	}
	return strings.Join(lines, "\n")
}

// want receives events until they told what want says, and checks that they told
// nothing else. Bits may come in any number of events. It returns the events.
func (l *fileLab) want(want told) []*kernstream.FileEvent {
	l.t.Helper()
	got := told{}
	var events []*kernstream.FileEvent
	complete := func() bool {
		for path, ops := range want {
			if !got[path].Has(ops) {
				return false
			}
		}
		return true
	}
	for deadline := time.After(patience); ; {
		wait := deadline
		if complete() {
			l.drained()
			wait = time.After(20 * time.Millisecond)
		}
		select {
		case e, ok := <-l.w.C:
			if !ok {
				l.t.Fatalf("the stream ended: %v", l.w.Err())
			}
			events = append(events, e)
			got[l.label(e)] |= e.Ops
			continue
		case <-wait:
		}
		if !maps.Equal(got, want) {
			l.t.Fatalf("the events told\n%v\nwant\n%v", got, want)
		}
		return events
	}
}

func (l *fileLab) label(e *kernstream.FileEvent) string {
	relative := func(path string) string {
		if path == l.dir {
			return "."
		}
		return strings.TrimPrefix(path, l.dir+"/")
	}
	label := relative(e.Path)
	if e.Ops.Has(kernstream.OpRename) {
		label = relative(e.OldPath) + " > " + label
	}
	if e.PathState != kernstream.PathExact && !e.Ops.Has(kernstream.OpOverflow) {
		label += " (" + e.PathState.String() + ")"
	}
	return label
}

// rawGroup makes a fanotify group as another program would.
func rawGroup(t testing.TB, flags uint) *os.File {
	t.Helper()
	fd, err := unix.FanotifyInit(flags|unix.FAN_CLOEXEC, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "raw group")
}

// diskDir returns a directory with a new file system of a type on a loop
// device.
func diskDir(t testing.TB, fstype string) string {
	t.Helper()
	testenv.NeedRoot(t, "loop devices")
	mkfs := testenv.NeedTool(t, "mkfs."+fstype)
	testenv.NeedTool(t, "losetup")
	size := map[string]int64{"ext4": 16 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}[fstype]
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	args := map[string][]string{"ext4": {"-q", "-F"}, "xfs": {"-q"}, "btrfs": {"-q"}}[fstype]
	if out, err := exec.Command(mkfs, append(args, image)...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", mkfs, err, out)
	}
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	device := strings.TrimSpace(string(out))
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("losetup", "-d", device).Run() })
	dir := t.TempDir()
	mount(t, device, dir, fstype, 0, "")
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

// overlayDir returns a directory with an overlay over two others.
func overlayDir(t testing.TB) string {
	t.Helper()
	base := labDir(t)
	for _, name := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(base, "merged")
	mount(t, "overlay", dir, "overlay", 0, fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", base, base, base))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

func init() { testenv.RegisterChild("fuse", fuseMain) }

// fuseDir returns a directory with a FUSE file system that has one file, "f".
// A child serves it, without statfs(2) if "no statfs" is asked for, and without
// ever answering what "hangs" is said of: "open hangs", "flush hangs" (a close),
// "lookup hangs" (of any other name), or "getattr hangs" or "second getattr hangs"
// (of the file).
func fuseDir(t testing.TB, without ...string) string {
	t.Helper()
	dir, _ := fuseServer(t, without...)
	return dir
}

// fuseServer is fuseDir, and returns the process that serves, too.
func fuseServer(t testing.TB, without ...string) (dir string, server *os.Process) {
	t.Helper()
	testenv.NeedRoot(t, "mounting FUSE")
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		testenv.Missing(t, "needs /dev/fuse", err)
	}
	defer device.Close()
	dir = t.TempDir()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device.Fd())
	if slices.ContainsFunc(without, func(what string) bool { return strings.HasSuffix(what, "getattr hangs") }) {
		options += ",default_permissions" // so that the kernel asks for modes
	}
	mount(t, "fuse", dir, "fuse", 0, options)
	cmd := testenv.Child(t, "fuse", without...)
	cmd.ExtraFiles = []*os.File{device}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
		cmd.Process.Kill()
		cmd.Wait()
	})
	return dir, cmd.Process
}

// fuseMain serves descriptor 3: a read-only file system with one file.
func fuseMain(without []string) int {
	const fileData = "data"
	order := binary.NativeEndian
	attributes := func(node uint64) []byte {
		b := make([]byte, 88)
		order.PutUint64(b, node)
		mode, size := uint32(unix.S_IFDIR|0o755), uint64(0)
		if node == 2 {
			mode, size = unix.S_IFREG|0o644, uint64(len(fileData))
		}
		order.PutUint64(b[8:], size)
		order.PutUint32(b[60:], mode)
		order.PutUint32(b[64:], 1)
		return b
	}
	asked := 0 // for the attributes of the file
	answer := func(opcode uint32, node uint64, body []byte) ([]byte, unix.Errno, bool) {
		switch opcode {
		case 1: // LOOKUP
			if node != 1 || string(body) != "f\x00" {
				return nil, unix.ENOENT, !slices.Contains(without, "lookup hangs")
			}
			entry := make([]byte, 40)
			order.PutUint64(entry, 2)
			return append(entry, attributes(2)...), 0, true
		case 2, 36, 42: // FORGET, INTERRUPT, BATCH_FORGET
			return nil, 0, false
		case 3: // GETATTR
			if node == 2 {
				asked++
			}
			hangs := asked > 0 && slices.Contains(without, "getattr hangs") || asked > 1 && slices.Contains(without, "second getattr hangs")
			return append(make([]byte, 16), attributes(node)...), 0, !hangs
		case 14, 27: // OPEN, OPENDIR
			return make([]byte, 16), 0, opcode != 14 || !slices.Contains(without, "open hangs")
		case 15: // READ
			if order.Uint64(body[8:]) > 0 {
				return nil, 0, true
			}
			return []byte(fileData), 0, true
		case 28: // READDIR
			return nil, 0, true
		case 17: // STATFS
			if !slices.Contains(without, "no statfs") {
				return make([]byte, 80), 0, true
			}
		case 18, 25, 29, 38: // RELEASE, FLUSH, RELEASEDIR, DESTROY
			return nil, 0, opcode != 25 || !slices.Contains(without, "flush hangs")
		case 26: // INIT
			b := make([]byte, 64)
			order.PutUint32(b, 7)
			order.PutUint32(b[4:], 31)
			order.PutUint32(b[8:], order.Uint32(body[8:]))
			order.PutUint32(b[20:], 4096)
			return b, 0, true
		}
		return nil, unix.ENOSYS, true
	}
	buf := make([]byte, 1<<17)
	for {
		n, err := syscall.Read(3, buf)
		switch {
		case err == unix.EINTR || err == unix.ENOENT || err == unix.EAGAIN:
			continue
		case err != nil:
			return 0
		}
		data, errno, reply := answer(order.Uint32(buf[4:]), order.Uint64(buf[16:]), buf[40:n])
		if !reply {
			continue
		}
		header := make([]byte, 16)
		order.PutUint32(header, uint32(len(header)+len(data)))
		order.PutUint32(header[4:], uint32(-int32(errno)))
		copy(header[8:], buf[8:16])
		syscall.Write(3, append(header, data...))
	}
}

func init() { testenv.RegisterChild("touch", touchMain) }

// touchMain opens the file that each line of its standard input names for
// reading, and answers with a line.
func touchMain([]string) int {
	input, _ := io.ReadAll(os.Stdin)
	for path := range strings.FieldsSeq(string(input)) {
		f, err := os.Open(path)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		f.Close()
	}
	return 0
}

// touch lets another process open and close files. It returns its number.
func touch(t testing.TB, paths ...string) int {
	t.Helper()
	cmd := testenv.Child(t, "touch")
	cmd.Stdin = strings.NewReader(strings.Join(paths, "\n"))
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// wantError checks an error of a watcher: what it Is, and words of its text.
func wantError(t testing.TB, err, is error, words ...string) {
	t.Helper()
	var op *kernstream.OpError
	if err == nil || !errors.Is(err, is) || !errors.As(err, &op) || op.Source != "file" {
		t.Errorf("error %v; want an OpError of the source file that Is %v", err, is)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q; want %q in it", err, word)
		}
	}
}

func init() {
	testenv.RegisterChild("nobody's files", func(args []string) int {
		t := &childTest{}
		failed := t.run(func() { testUnprivileged(t, args[0]) })
		if failed {
			return 1
		}
		return 0
	})
}

// asNobody runs testUnprivileged in a process of an ordinary user.
func asNobody(t testing.TB) {
	t.Helper()
	// Not in t.TempDir: others may not get through the directories above that.
	dir, err := os.MkdirTemp("/tmp", "kernstream-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	cmd := testenv.Child(t, "nobody's files", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// A childTest is a testing.TB for a child: it prints what fails.
type childTest struct {
	testing.TB
	failed   bool
	cleanups []func()
}

// run runs a test, and tells whether it failed.
func (c *childTest) run(test func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, f := range slices.Backward(c.cleanups) {
				f()
			}
		}()
		test()
	}()
	<-done
	return c.failed
}

func (c *childTest) Helper()          {}
func (c *childTest) Cleanup(f func()) { c.cleanups = append(c.cleanups, f) }
func (c *childTest) Context() context.Context {
	return context.Background()
}
func (c *childTest) Error(args ...any) { c.failed = true; fmt.Println(args...) }
func (c *childTest) Errorf(format string, args ...any) {
	c.Error(fmt.Sprintf(format, args...))
}

func (c *childTest) Fatal(args ...any) {
	c.Error(args...)
	runtime.Goexit()
}

func (c *childTest) Fatalf(format string, args ...any) {
	c.Errorf(format, args...)
	runtime.Goexit()
}
