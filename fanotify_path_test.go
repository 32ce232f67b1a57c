package kernstream_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

func (l *fileLab) create(name string) string {
	l.t.Helper()
	l.do(os.WriteFile(l.path(name), nil, 0o644))
	return l.path(name)
}
