package kernstream_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What works on each file system, in which kind of group, and what a group does
// when descriptors run out or a file cannot be opened.

// TestFileSystems: what works on each file system: whether marks of a type go
// by handle or by descriptor, what is refused, and whether paths are right.
func TestFileSystems(t *testing.T) {
	needMarks(t)
	type expectation struct{ inode, mount, filesystem string }
	all := expectation{"handle", "handle", "handle"}
	fallback := expectation{"handle", "descriptor", "descriptor"}
	if !testenv.KernelAtLeast(6, 6) {
		// Only file systems whose handles can be opened have any.
		fallback.inode = "descriptor"
	}
	fuse := fallback
	if !testenv.KernelAtLeast(6, 8) {
		fuse.inode = "descriptor" // it has no ID
	}
	subvolume := expectation{"handle", "descriptor", "descriptor"}
	if !testenv.KernelAtLeast(6, 8) {
		subvolume.inode = "descriptor"
	}
	for _, test := range []struct {
		name string
		dir  func(t testing.TB) (dir, file string)
		want expectation
	}{
		{"ext4", func(t testing.TB) (string, string) { return withFile(t, diskDir(t, "ext4")) }, all},
		{"xfs", func(t testing.TB) (string, string) { return withFile(t, diskDir(t, "xfs")) }, all},
		{"btrfs", func(t testing.TB) (string, string) { return withFile(t, diskDir(t, "btrfs")) }, all},
		{"btrfs subvolume", subvolumeDir, subvolume},
		{"tmpfs", func(t testing.TB) (string, string) { return withFile(t, labDir(t)) }, all},
		{"overlay", func(t testing.TB) (string, string) { return withFile(t, overlayDir(t)) }, fallback},
		{"fuse", func(t testing.TB) (string, string) { return fuseDir(t), "f" }, fuse},
		{"proc", procDir, fallback},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, file := test.dir(t)
			testenv.NoLeaks(t)
			for typ, want := range map[kernstream.MarkType]string{
				inode: test.want.inode, kernstream.MarkMount: test.want.mount, filesystem: test.want.filesystem,
			} {
				via := checkMark(t, typ, dir, file, want)
				testenv.Feature(t, fmt.Sprintf("file events: %s, %v mark", test.name, typ), via)
			}
			for typ, want := range map[kernstream.MarkType]string{inode: test.want.inode, filesystem: test.want.filesystem} {
				_, err := tryWatch(t, kernstream.Mark{Type: typ, Path: dir, Ops: kernstream.OpCreate | onDir})
				if want == "handle" && err != nil {
					t.Errorf("%v mark for create: %v", typ, err)
				}
				if want == "descriptor" {
					wantError(t, err, errors.ErrUnsupported, dir, "create", typ.String(), strings.Fields(test.name)[0])
				}
			}
		})
	}
}

// TestFileWithoutStatfs: a file system that has no statfs(2), and so no ID for
// handles, is watched by descriptor.
func TestFileWithoutStatfs(t *testing.T) {
	needMarks(t)
	dir := fuseDir(t, "no statfs")
	testenv.NoLeaks(t)
	for _, typ := range []kernstream.MarkType{inode, kernstream.MarkMount, filesystem} {
		checkMark(t, typ, dir, "f", "descriptor")
	}
	_, err := tryWatch(t, kernstream.Mark{Path: dir, Ops: kernstream.OpCreate})
	wantError(t, err, errors.ErrUnsupported, dir, "create", "fuse")
}

func withFile(t testing.TB, dir string) (string, string) {
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "sub", "f"), []byte("data"), 0o644); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "sub"), "f"
}

func subvolumeDir(t testing.TB) (string, string) {
	dir := diskDir(t, "btrfs")
	volume := filepath.Join(dir, "volume")
	testenv.NeedTool(t, "btrfs")
	run(t, "btrfs", "subvolume", "create", volume)
	return withFile(t, volume)
}

func procDir(t testing.TB) (string, string) {
	dir := t.TempDir()
	mount(t, "proc", dir, "proc", 0, "")
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return filepath.Join(dir, "sys/kernel"), "ostype"
}

// tryWatch returns a watcher that ends with the test.
func tryWatch(t testing.TB, marks ...kernstream.Mark) (*kernstream.FileWatcher, error) {
	w, err := kernstream.WatchFiles(t.Context(), nil, marks...)
	if err == nil {
		t.Cleanup(func() { w.Close() })
	}
	return w, err
}

// checkMark marks dir and opens the file in it. It returns by which way the
// event came.
func checkMark(t testing.TB, typ kernstream.MarkType, dir, file, want string) string {
	t.Helper()
	mark := kernstream.Mark{Type: typ, Path: dir, Ops: opOpen}
	if typ == inode {
		mark.Ops |= onChild
	}
	w, err := tryWatch(t, mark)
	if err != nil {
		t.Errorf("%v mark: %v; want %s", typ, err, want)
		return "none"
	}
	defer w.Close()
	path := filepath.Join(dir, file)
	for range 3 {
		if _, err := os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		e := receiveFile(t, w)
		if e.Path != path || e.PathState != kernstream.PathExact || e.Via.String() != want || e.FD() != -1 {
			t.Errorf("%v mark: %v (%v) via %v; want %s via %s", typ, e, e.PathState, e.Via, path, want)
		}
	}
	return want
}

// TestFileBothGroups: marks that need a handle group and marks that need a
// descriptor group are in one watcher, and each event says which it is from.
func TestFileBothGroups(t *testing.T) {
	needMarks(t)
	merged := overlayDir(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	other := &fileLab{t: t, dir: merged}
	other.ensure("g")
	l.watch(nil, kernstream.Mark{Type: filesystem, Ops: opOpen | kernstream.OpDelete})
	l.do(l.w.Mark(kernstream.Mark{Type: filesystem, Path: merged, Ops: opOpen})) // while it runs
	vias := map[string]kernstream.FileVia{}
	l.read("f")
	other.read("g")
	for range 2 {
		e := l.receive()
		vias[e.Path] = e.Via
	}
	if vias[l.path("f")] != kernstream.ViaHandle || vias[other.path("g")] != kernstream.ViaDescriptor || len(vias) != 2 {
		t.Errorf("events %v", vias)
	}
	groups := 0
	l.do(l.w.Control(func(int) { groups++ }))
	if groups != 2 {
		t.Errorf("%d groups", groups)
	}
}

// TestFileSystemError: an error of the file system has its errno, and how often
// it came.
func TestFileSystemError(t *testing.T) {
	testenv.NeedKernel(t, 5, 16, "FAN_FS_ERROR")
	dir := diskDir(t, "ext4")
	testenv.NoLeaks(t)
	w, err := tryWatch(t, kernstream.Mark{Type: filesystem, Path: dir, Ops: kernstream.OpFSError})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "abort"); err != nil && err != unix.EROFS {
		t.Fatal(err)
	}
	e := receiveFile(t, w)
	if e.Ops != kernstream.OpFSError || e.Errno != unix.ESHUTDOWN || e.Count != 1 || e.Path != "" || e.Err != nil {
		t.Errorf("event %v; want ESHUTDOWN, once", e)
	}
}

// TestFileKinds: nodes that are no files and no directories make events by
// handle.
func TestFileKinds(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "", kernstream.Mark{Type: filesystem, Ops: opOpen | kernstream.OpCreate})
	l.do(unix.Mkfifo(l.path("fifo"), 0o600))
	fd, err := unix.Open(l.path("fifo"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	l.do(err)
	unix.Close(fd)
	l.want(told{"fifo": opOpen | kernstream.OpCreate})
	var st unix.Stat_t
	l.do(unix.Stat(l.path("fifo"), &st))
	fd, err = unix.Open(l.path("fifo"), unix.O_PATH|unix.O_CLOEXEC, 0)
	l.do(err)
	unix.Close(fd)
	l.quiet("neither stat nor O_PATH opens a file")
}

// TestFileDescriptorsRunOut: an event whose file cannot be opened for want of
// descriptors is told, none is a silent hole, and the reader goes on.
func TestFileDescriptorsRunOut(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, &kernstream.FileOptions{Descriptors: true}, "", kernstream.Mark{Type: filesystem, Ops: kernstream.OpModify})
	const files = 60
	for i := range files {
		l.do(os.Truncate(l.create(fmt.Sprint("f", i)), 0))
	}
	writers := make([]*os.File, files)
	for i := range writers {
		f, err := os.OpenFile(l.path(fmt.Sprint("f", i)), os.O_WRONLY, 0)
		l.do(err)
		defer f.Close()
		writers[i] = f
	}
	next, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	l.do(err)
	unix.Close(next)
	restore := l.limitDescriptors(uint64(next + 5))
	defer restore()
	for _, f := range writers {
		f.Write([]byte("x"))
	}
	good, bad := 0, 0
	for good+bad < files {
		e := l.receive()
		switch {
		case e.Err == nil && e.FD() >= 0:
			good++
			defer e.Close()
		case errors.Is(e.Err, unix.EMFILE) && e.FD() == -1:
			bad++
		default:
			t.Fatalf("event %v", e)
		}
		if bad == files/2 {
			restore()
		}
	}
	if good == 0 || bad == 0 {
		t.Errorf("%d with a descriptor, %d without", good, bad)
	}
	restore()
	writers[0].Write([]byte("y"))
	if e := l.receive(); e.Err != nil || e.Path != l.path("f0") || e.Close() != nil {
		t.Errorf("event %v; want f0", e)
	}
}

// TestFileHandleDescriptorsRunOut: the same for what resolving paths needs: the
// event comes with its name, and says why it has no path.
func TestFileHandleDescriptorsRunOut(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "d/f", kernstream.Mark{Type: filesystem, Ops: kernstream.OpModify})
	f, err := os.OpenFile(l.path("d/f"), os.O_WRONLY, 0)
	l.do(err)
	defer f.Close()
	restore := l.limitDescriptors(3)
	defer restore()
	f.Write([]byte("x"))
	e := l.receive()
	restore()
	if !errors.Is(e.Err, unix.EMFILE) || e.Path != "f" || e.PathState != kernstream.PathUnknown || e.Ops != kernstream.OpModify {
		t.Errorf("event %v; want the name, and EMFILE", e)
	}
	f.Write([]byte("y"))
	l.want(told{"d/f": kernstream.OpModify})
}

// TestFileCannotOpen: a file that cannot be opened as asked is an event with
// Err: one on a read-only mount, for writing.
func TestFileCannotOpen(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, &kernstream.FileOptions{Descriptors: true, EventFlags: unix.O_RDWR}, "d/f")
	mount(t, l.path("d"), l.path("d"), "", unix.MS_BIND, "")
	defer umount(t, l.path("d"), unix.MNT_DETACH)
	mount(t, "", l.path("d"), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	l.do(l.w.Mark(kernstream.Mark{Type: kernstream.MarkMount, Path: l.path("d"), Ops: opOpen}))
	for range 3 {
		l.read("d/f")
		if e := l.receive(); !errors.Is(e.Err, unix.EROFS) || e.FD() != -1 || e.Close() != nil {
			t.Errorf("event %v; want EROFS", e)
		}
	}
}
