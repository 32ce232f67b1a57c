package kernstream_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What is known of fanotify and not tested here, and why.
//
// Answers to permission events, and what becomes of them at a limit, at a close or
// at an exec, are for the classes that have such events. A buffer that is too
// small for an event cannot be: the one here is larger than any. A limit of groups
// that counts root's, too, cannot be reached without taking all that the machine
// has; that of marks is. A running program that is to be opened for writing is
// ETXTBSY on some kernels only, so the file that cannot be opened is on a read-only
// mount. Handles of removed entries (FAN_REPORT_TARGET_FID) are not asked for.
// What decoders make of odd records is in internal/fanotify, and deadlines are in
// poller.

// TestFilePathFollowsRenames: after a directory above it was renamed, and when
// its mount was moved, a file has its path of then; the path of before is not
// used again.
func TestFilePathFollowsRenames(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "a/b/c/f g/ mnt/ above/moved/")
	mount(t, "m", l.path("mnt"), "tmpfs", 0, "")
	l.ensure("mnt/d/f")
	l.do(l.w.Mark(
		kernstream.Mark{Type: filesystem, Path: l.dir, Ops: opOpen},
		kernstream.Mark{Type: filesystem, Path: l.path("mnt"), Ops: opOpen},
	))
	see := func(path string) {
		t.Helper()
		l.read(path)
		l.want(told{path: opOpen})
	}
	see("a/b/c/f")
	for _, rename := range [][3]string{
		{"a/b/c", "a/b/x", "a/b/x/f"},
		{"a/b", "g/b", "g/b/x/f"},
		{"g", "h", "h/b/x/f"},
		{"h/b/x/f", "h/b/x/f2", "h/b/x/f2"},
		{"h", "a/h", "a/h/b/x/f2"},
	} {
		l.do(os.Rename(l.path(rename[0]), l.path(rename[1])))
		see(rename[2])
	}
	see("mnt/d/f")
	mount(t, l.path("mnt"), l.path("above/moved"), "", unix.MS_MOVE, "")
	defer umount(t, l.path("beyond/moved"), unix.MNT_DETACH)
	see("above/moved/d/f")
	l.do(os.Rename(l.path("above"), l.path("beyond")))
	see("beyond/moved/d/f") // a rename on the other file system
}

// TestFilePathAboveMount: a directory above the mount point is renamed on a file
// system without a mark, which no event tells.
func TestFilePathAboveMount(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "above/mnt/")
	mount(t, "m", l.path("above/mnt"), "tmpfs", 0, "")
	l.ensure("above/mnt/d/f")
	l.do(l.w.Mark(kernstream.Mark{Type: filesystem, Path: l.path("above/mnt"), Ops: opOpen}))
	l.read("above/mnt/d/f")
	l.want(told{"above/mnt/d/f": opOpen})
	l.do(os.Rename(l.path("above"), l.path("beyond")))
	defer umount(t, l.path("beyond/mnt"), unix.MNT_DETACH)
	l.read("beyond/mnt/d/f")
	l.want(told{"beyond/mnt/d/f": opOpen})
}

// TestFilePathRenamePair: a rename has both paths, across directories, over
// another file, by exchange, and of directories; an inode mark sees the side of
// its directory.
func TestFilePathRenamePair(t *testing.T) {
	testenv.NeedKernel(t, 5, 17, "FAN_RENAME")
	needMarks(t)
	l := newFileLab(t, nil, "a/f b/g c/h/i", kernstream.Mark{Type: filesystem, Ops: kernstream.OpRename | onDir})
	rename := func(from, to string, flags uint, want told) {
		t.Helper()
		l.do(unix.Renameat2(unix.AT_FDCWD, l.path(from), unix.AT_FDCWD, l.path(to), flags))
		l.want(want)
	}
	rename("a/f", "a/f2", 0, told{"a/f > a/f2": kernstream.OpRename})
	rename("a/f2", "b/g", 0, told{"a/f2 > b/g": kernstream.OpRename})
	rename("c/h", "a/h", 0, told{"c/h > a/h": kernstream.OpRename | onDir})
	rename("a/h/i", "b/g", unix.RENAME_EXCHANGE, told{"a/h/i > b/g": kernstream.OpRename, "b/g > a/h/i": kernstream.OpRename})
	l.w.Close()
	l.watch(nil, kernstream.Mark{Path: "a", Ops: kernstream.OpRename | onDir})
	l.do(os.Rename(l.path("a/h"), l.path("c/h")))
	if e := l.receive(); e.OldPath != l.path("a/h") || e.Path != "" {
		t.Errorf("%v; want the old path alone", e)
	}
	l.do(os.Rename(l.path("c/h"), l.path("a/back")))
	if e := l.receive(); e.Path != l.path("a/back") || e.OldPath != "" {
		t.Errorf("%v; want the new path alone", e)
	}
}

// TestFilePathNames: names of any bytes and of any length that the kernel takes,
// those that look like what the kernel adds included.
func TestFilePathNames(t *testing.T) {
	needMarks(t)
	for _, options := range []*kernstream.FileOptions{nil, {Descriptors: true}} {
		l := newFileLab(t, options, "", kernstream.Mark{Type: filesystem, Ops: opOpen})
		deep := strings.Repeat(strings.Repeat("d", 200)+"/", 15)
		for _, name := range []string{
			"x", "with space", "new\nline", "\xff\xfe", "w (deleted)", strings.Repeat("n", 255),
			deep + "f", deep + strings.Repeat("m", 255),
			strings.Repeat("a", 31-len(l.dir)%31), strings.Repeat("b", 250-len(l.dir)),
		} {
			path := l.path(name)
			l.do(os.MkdirAll(filepath.Dir(path), 0o755))
			l.do(os.WriteFile(path, nil, 0o644))
			for {
				e := l.receive()
				if e.Ops.Has(opOpen) && e.Path == path && e.PathState == kernstream.PathExact {
					e.Close()
					break
				}
				t.Fatalf("event %v; want %q", e, path)
			}
		}
	}
}

// TestFilePathDeleted: a file or directory that is gone is said to be; its path
// is the last one that was known, without what /proc adds to it.
func TestFilePathDeleted(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "d/f d/g", kernstream.Mark{Type: filesystem, Ops: opOpen | kernstream.OpDelete | onDir | kernstream.OpDeleteSelf})
	l.read("d/f")
	l.want(told{"d/f": opOpen})
	dir, err := os.Open(l.path("d"))
	l.do(err)
	l.want(told{"d": opOpen | onDir})
	l.do(os.RemoveAll(l.path("d")))
	l.want(told{
		"d": opOpen | onDir | kernstream.OpDelete, "d/f": kernstream.OpDelete, "d/g": kernstream.OpDelete,
		" (deleted)": kernstream.OpDeleteSelf, ".": opOpen | onDir,
	})
	dir.Close()
	l.want(told{"d (deleted)": kernstream.OpDeleteSelf | onDir})
	l.w.Close()

	// By descriptor: an open file that was unlinked, one of several links, and a
	// name that only looks like it.
	l.ensure("x y z")
	l.do(os.WriteFile(l.path("w (deleted)"), nil, 0o644))
	l.do(os.Link(l.path("y"), l.path("y2")))
	l.watch(&kernstream.FileOptions{Descriptors: true}, kernstream.Mark{Type: filesystem, Ops: kernstream.OpModify})
	for name, state := range map[string]kernstream.PathState{
		"x": kernstream.PathDeleted, "y": kernstream.PathDeleted, "z": kernstream.PathExact, "w (deleted)": kernstream.PathExact,
	} {
		f, err := os.OpenFile(l.path(name), os.O_WRONLY, 0)
		l.do(err)
		if state == kernstream.PathDeleted {
			l.do(os.Remove(l.path(name)))
		}
		f.WriteString("x")
		f.Close()
		e := l.receive()
		if e.Path != l.path(name) || e.PathState != state {
			t.Errorf("event %v (%v); want %s (%v)", e, e.PathState, name, state)
		}
		e.Close()
	}
}

// TestFilePathOutside: through a bind mount of a part of the file system, the
// other part is found on a mount that shows it, and said to be outside if there
// is none: never taken for "/".
func TestFilePathOutside(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "bind/ whole/")
	mount(t, "m", l.path("whole"), "tmpfs", 0, "")
	l.ensure("whole/part/f whole/other/g")
	mount(t, l.path("whole/part"), l.path("bind"), "", unix.MS_BIND, "")
	defer umount(t, l.path("bind"), unix.MNT_DETACH)
	mark := kernstream.Mark{Type: filesystem, Path: l.path("bind"), Ops: opOpen}
	l.do(l.w.Mark(mark))
	l.read("bind/f")
	l.read("whole/other/g")
	l.want(told{"bind/f": opOpen, "whole/other/g": opOpen})
	other, err := os.Open(l.path("whole/other"))
	l.do(err)
	defer other.Close()
	l.do(l.w.Unmark(mark))
	umount(t, l.path("whole"), unix.MNT_DETACH)
	l.do(l.w.Mark(mark))
	fd, err := unix.Openat(int(other.Fd()), "g", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	l.do(err)
	unix.Close(fd)
	l.want(told{"g (outside)": opOpen})
	l.read("bind/f")
	l.want(told{"bind/f": opOpen})
}

// TestFilePathOtherNamespace: what a process does in another mount namespace has
// the path that it has there, and is said to be of another namespace; a
// container is marked through /proc/PID/root.
func TestFilePathOtherNamespace(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	for _, options := range []*kernstream.FileOptions{nil, {Descriptors: true}} {
		l := &fileLab{t: t, dir: labDir(t)}
		l.ensure("root/")
		a := newAgent(t, unix.CLONE_NEWNS)
		a.do("mount", "container", l.path("root"), "tmpfs", "0", "")
		a.do("mkdir", l.path("root/old"))
		a.do("mkdir", l.path("root/etc"))
		a.do("write", l.path("root/etc/conf"), "x")
		a.do("change root", l.path("root"), l.path("root/old"))
		root := fmt.Sprintf("/proc/%d/root", a.PID)
		for _, typ := range []kernstream.MarkType{kernstream.MarkMount, filesystem} {
			w, err := kernstream.WatchFiles(t.Context(), options, kernstream.Mark{Type: typ, Path: root, Ops: opOpen})
			l.do(err)
			a.do("read", "/etc/conf")
			e := receiveFile(t, w)
			if e.Path != "/etc/conf" || e.PathState != kernstream.PathOtherNamespace || e.PID != a.PID {
				t.Errorf("%v mark, options %v: %v", typ, options, e)
			}
			e.Close()
			w.Close()
		}
		a.end()
	}
}

// TestFilePathOverlayContainer: the same for a container on an overlay, whose
// events come by descriptor.
func TestFilePathOverlayContainer(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "lower/etc/conf upper/ work/ root/")
	a := newAgent(t, unix.CLONE_NEWNS)
	a.do("mount", "overlay", l.path("root"), "overlay", "0", fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", l.dir))
	a.do("mkdir", l.path("root/old"))
	a.do("change root", l.path("root"), l.path("root/old"))
	l.do(l.w.Mark(kernstream.Mark{Type: kernstream.MarkMount, Path: fmt.Sprintf("/proc/%d/root", a.PID), Ops: opOpen}))
	a.do("read", "/etc/conf")
	if e := l.receive(); e.Path != "/etc/conf" || e.PathState != kernstream.PathOtherNamespace || e.Via != kernstream.ViaDescriptor {
		t.Errorf("%v via %v", e, e.Via)
	}
	a.end()
}

// TestFileUserNamespace: in a user namespace of its own, a program can mark what
// it mounted there, as far as the kernel goes.
func TestFileUserNamespace(t *testing.T) {
	testenv.NeedKernel(t, 6, 16, "filesystem marks in a user namespace")
	a := newAgent(t, unix.CLONE_NEWNS|unix.CLONE_NEWUSER)
	dir := t.TempDir()
	if _, err := a.try("mount", "m", dir, "tmpfs", "0", ""); err != nil {
		testenv.Missing(t, "needs user namespaces", err)
	}
	a.do("mkdir", filepath.Join(dir, "d"))
	a.do("write", filepath.Join(dir, "d/f"), "x")
	if text := a.do("mark filesystem", dir); text != "" {
		t.Fatal(text)
	}
	a.do("read", filepath.Join(dir, "d/f"))
	if text := a.do("file event"); !strings.HasPrefix(text, "open "+filepath.Join(dir, "d/f")+" exact ") {
		t.Errorf("event %s", text)
	}
}

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
	var limit unix.Rlimit
	l.do(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := limit
	next, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	l.do(err)
	unix.Close(next)
	low.Cur = uint64(next + 5)
	l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
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
			l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
		}
	}
	if good == 0 || bad == 0 {
		t.Errorf("%d with a descriptor, %d without", good, bad)
	}
	l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	writers[0].Write([]byte("y"))
	if e := l.receive(); e.Err != nil || e.Path != l.path("f0") || e.Close() != nil {
		t.Errorf("event %v; want f0", e)
	}
}

func (l *fileLab) create(name string) string {
	l.t.Helper()
	l.do(os.WriteFile(l.path(name), nil, 0o644))
	return l.path(name)
}

// TestFileHandleDescriptorsRunOut: the same for what resolving paths needs: the
// event comes with its name, and says why it has no path.
func TestFileHandleDescriptorsRunOut(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "d/f", kernstream.Mark{Type: filesystem, Ops: kernstream.OpModify})
	f, err := os.OpenFile(l.path("d/f"), os.O_WRONLY, 0)
	l.do(err)
	defer f.Close()
	var limit unix.Rlimit
	l.do(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := limit
	low.Cur = 3
	l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	f.Write([]byte("x"))
	e := l.receive()
	l.do(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
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

// TestFileRenameStorm: while directories are renamed at random and files are
// opened below them, every path is one that the file had between its event and
// its delivery, or the event says otherwise. When all is quiet, the paths are
// those that a walk finds.
func TestFileRenameStorm(t *testing.T) {
	needMarks(t)
	for _, options := range []*kernstream.FileOptions{nil, {Descriptors: true}} {
		name := "handle"
		if options != nil {
			name = "descriptor"
		}
		t.Run(name, func(t *testing.T) {
			l := newFileLab(t, options, "")
			storm := newRenameStorm(l, 12, testenv.SoakN(8_000))
			l.do(l.w.Mark(kernstream.Mark{Type: filesystem, Path: l.dir, Ops: opOpen}))
			storm.run(l)
			l.do(filepath.WalkDir(l.dir, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.Type().IsRegular() && strings.HasSuffix(path, "-0") {
					_, err = os.ReadFile(path)
					e := l.receive()
					if e.Path != path || e.PathState != kernstream.PathExact {
						t.Errorf("event %v; want %s", e, path)
					}
					e.Close()
				}
				return err
			}))
			l.quiet("that was all")
		})
	}
}

// A renameStorm is directories that are renamed, with files in them that are
// each opened once.
type renameStorm struct {
	l    *fileLab
	dirs []*stormDir

	mu     sync.Mutex // of the model
	opened []time.Time
	files  []int // which directory a file is in
}

// A stormDir is a directory, and where it has been.
type stormDir struct {
	name   string
	parent *stormDir
	was    []stormPath
}

// A stormPath is a path that a directory may have had from one time to another.
type stormPath struct {
	path     string
	from, to time.Time // to is zero while it is so
}

func newRenameStorm(l *fileLab, dirs, files int) *renameStorm {
	s := &renameStorm{l: l, opened: make([]time.Time, files), files: make([]int, files)}
	now := time.Now()
	root := &stormDir{was: []stormPath{{path: l.dir, from: now}}}
	s.dirs = []*stormDir{root}
	for i := range dirs {
		d := &stormDir{name: fmt.Sprint("d", i), parent: s.dirs[rand.IntN(len(s.dirs))]}
		d.was = []stormPath{{path: d.path(), from: now}}
		l.do(os.Mkdir(d.path(), 0o755))
		s.dirs = append(s.dirs, d)
	}
	for i := range files {
		s.files[i] = 1 + i%dirs
		l.create(filepath.Join(strings.TrimPrefix(s.dirs[s.files[i]].path(), l.dir), fmt.Sprint("f-", i)))
	}
	return s
}

func (d *stormDir) path() string {
	if d.parent == nil {
		return d.was[0].path
	}
	return filepath.Join(d.parent.path(), d.name)
}

func (d *stormDir) below(other *stormDir) bool {
	for ; d != nil; d = d.parent {
		if d == other {
			return true
		}
	}
	return false
}

// rename renames one directory.
func (s *renameStorm) rename(n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.dirs[1+rand.IntN(len(s.dirs)-1)]
	parent := s.dirs[rand.IntN(len(s.dirs))]
	if parent.below(d) {
		parent = d.parent
	}
	before := time.Now()
	old := d.path()
	d.parent, d.name = parent, fmt.Sprint("d", n)
	if err := os.Rename(old, d.path()); err != nil {
		return err
	}
	after := time.Now()
	for _, dir := range s.dirs {
		if dir.below(d) {
			dir.was[len(dir.was)-1].to = after
			dir.was = append(dir.was, stormPath{path: dir.path(), from: before})
		}
	}
	return nil
}

// open opens a file, wherever it is.
func (s *renameStorm) open(i int) {
	for {
		s.mu.Lock()
		path := filepath.Join(s.dirs[s.files[i]].path(), fmt.Sprint("f-", i))
		s.opened[i] = time.Now()
		s.mu.Unlock()
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			return
		}
		runtime.Gosched()
	}
}

// check tells what is wrong with an event that was received at a time.
func (s *renameStorm) check(e *kernstream.FileEvent, received time.Time) error {
	dir, name := filepath.Split(e.Path)
	var i int
	if _, err := fmt.Sscanf(name, "f-%d", &i); err != nil {
		return err
	}
	if e.PathState != kernstream.PathExact {
		return fmt.Errorf("%v is %v", e, e.PathState)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, was := range s.dirs[s.files[i]].was {
		if was.path == filepath.Clean(dir) && was.from.Before(received) && (was.to.IsZero() || was.to.After(s.opened[i])) {
			return nil
		}
	}
	return fmt.Errorf("%s was at no time between the event and its delivery where %v says", name, e)
}

// stormRenames is how many directories are renamed in a storm at least.
const stormRenames = 20

// run renames and opens until each file was opened once. The renames are spread
// over all that time, however slow the machine is.
func (s *renameStorm) run(l *fileLab) {
	l.t.Helper()
	stop := make(chan struct{})
	var all sync.WaitGroup
	var renames atomic.Int64
	all.Go(func() {
		for n := len(s.dirs); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.rename(n); err != nil {
				l.t.Error(err)
				return
			}
			renames.Add(1)
			time.Sleep(100 * time.Microsecond)
		}
	})
	all.Go(func() {
		for i := range s.opened {
			for int(renames.Load()) < (i+1)*stormRenames/len(s.opened) && !l.t.Failed() {
				time.Sleep(100 * time.Microsecond)
			}
			s.open(i)
			if i%16 == 0 {
				runtime.Gosched()
			}
		}
	})
	for range s.opened {
		e := l.receive()
		if err := s.check(e, time.Now()); err != nil {
			l.t.Error(err)
		}
		e.Close()
	}
	close(stop)
	all.Wait()
	l.t.Logf("%d renames, %d files", renames.Load(), len(s.opened))
	if renames.Load() < stormRenames {
		l.t.Errorf("only %d renames", renames.Load())
	}
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// TestFileOwnRename: the path of a directory that tells of its own rename is the
// one after that, whichever of the groups that see it is told first.
func TestFileOwnRename(t *testing.T) {
	needMarks(t)
	testenv.Feature(t, "file events", "handle")
	l := newFileLab(t, nil, "0/", kernstream.Mark{Type: filesystem, Ops: kernstream.OpMoveSelf | onDir})
	watchers := []*kernstream.FileWatcher{l.w}
	for range 7 {
		l.watch(nil, kernstream.Mark{Type: filesystem, Ops: kernstream.OpMoveSelf | onDir})
		watchers = append(watchers, l.w)
	}
	for i := range testenv.SoakN(200) {
		to := l.path(fmt.Sprint(i + 1))
		l.do(os.Rename(l.path(fmt.Sprint(i)), to))
		for _, w := range watchers {
			if e := receiveFile(t, w); e.Path != to { // which it remembers
				t.Fatalf("event %v; want %s", e, to)
			}
		}
	}
}

// TestFilePathRemembered: a directory that is gone when its event is read has the
// path that it was known by, also after renames of others.
func TestFilePathRemembered(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "d/f other/f", kernstream.Mark{Type: filesystem, Ops: opOpen})
	see := func(name string) {
		t.Helper()
		l.read(name)
		if e := l.receive(); e.Path != l.path(name) || e.PathState != kernstream.PathExact {
			t.Errorf("event %v; want %s", e, name)
		}
	}
	see("d/f")
	for i := range 5 {
		name := fmt.Sprint("other", i)
		l.do(os.Rename(l.path("other"), l.path(name)))
		see(name + "/f")
		l.do(os.Rename(l.path(name), l.path("other")))
	}
	see("other/f")
	l.read("other/f")
	l.read("d/f") // they are read at once, and wait for the first
	l.do(os.RemoveAll(l.path("d")))
	l.receive()
	e := l.receive()
	if e.Path != l.path("d/f") || e.PathState != kernstream.PathDeleted && e.PathState != kernstream.PathExact {
		t.Errorf("event %v", e)
	}
}
