package kernstream_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityF3Mark: marks are added and removed while the stream runs, by path,
// below a directory, and of an open file itself; operations of one object add
// up, and each can be taken away alone.
func TestParityF3Mark(t *testing.T) {
	l := newFileLab(t, nil, "a b d/c", kernstream.Mark{Path: "a", Ops: opOpen})
	l.read("a")
	l.read("b")
	l.want(told{"a": opOpen})

	dir, err := os.Open(l.path("d"))
	l.do(err)
	file, err := os.Open(l.path("b"))
	l.do(err)
	l.do(l.w.Mark(kernstream.Mark{Dir: dir, Path: "c", Ops: opOpen}, kernstream.Mark{Dir: file, Ops: opOpen}))
	dir.Close()
	file.Close()
	l.read("b")
	l.read("d/c")
	l.want(told{"b": opOpen, "d/c": opOpen})

	a := l.path("a")
	l.do(l.w.Mark(kernstream.Mark{Path: a, Ops: opClose}))
	l.read("a")
	l.want(told{"a": opOpen | kernstream.OpCloseNoWrite})
	l.do(l.w.Unmark(kernstream.Mark{Path: a, Ops: opOpen}))
	l.read("a")
	l.want(told{"a": kernstream.OpCloseNoWrite})
	l.do(l.w.Unmark(kernstream.Mark{Path: a, Ops: opClose}))
	l.read("a")
	l.quiet("its mark is gone")
	wantError(t, l.w.Unmark(kernstream.Mark{Path: a, Ops: opClose}), fs.ErrNotExist, a)

	l.do(l.w.Flush(inode))
	l.read("b")
	l.read("d/c")
	l.quiet("all marks were flushed")
	l.do(l.w.Flush(inode))
	l.do(l.w.Mark(kernstream.Mark{Path: a, Ops: opOpen}))
	l.read("a")
	l.want(told{"a": opOpen})
}

// TestFileMarkWorkingDirectory: neither Dir nor Path is the working directory,
// and a Path alone is relative to it.
func TestFileMarkWorkingDirectory(t *testing.T) {
	l := newFileLab(t, nil, "d/f")
	t.Chdir(l.path("d"))
	l.do(l.w.Mark(kernstream.Mark{Ops: opOpen | onChild}))
	l.read("d/f")
	l.want(told{"d/f": opOpen})
	l.do(l.w.Unmark(kernstream.Mark{Path: ".", Ops: opOpen | onChild}))
	l.do(l.w.Mark(kernstream.Mark{Path: "f", Ops: opClose}))
	l.read("d/f")
	l.want(told{"d/f": kernstream.OpCloseNoWrite})
}

// TestFileMarkTypes: an inode mark sees one object, a directory's with its
// entries; a mount mark what is reached through the mount, but not through a
// bind of it or a copy in another namespace; a filesystem mark everything.
func TestFileMarkTypes(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "f d/g d/e/h bind/")
	mount(t, l.dir, l.path("bind"), "", unix.MS_BIND, "")
	defer umount(t, l.path("bind"), 0)
	a := newAgent(t, unix.CLONE_NEWNS)
	everywhere := func() {
		l.read("f")
		l.read("d/g")
		l.read("d/e/h")
		l.read("bind/f")
		a.do("read", l.path("d/e/h"))
	}
	for _, test := range []struct {
		mark kernstream.Mark
		want told
	}{
		{kernstream.Mark{Path: l.path("f")}, told{"f": opOpen}},
		{kernstream.Mark{Path: l.path("d"), Ops: onChild}, told{"d/g": opOpen}},
		{kernstream.Mark{Path: l.path("d")}, told{}},
		{kernstream.Mark{Path: l.dir, Type: kernstream.MarkMount}, told{"f": opOpen, "d/g": opOpen, "d/e/h": opOpen}},
		{kernstream.Mark{Path: l.path("bind"), Type: kernstream.MarkMount}, told{"bind/f": opOpen}},
		{kernstream.Mark{Path: l.path("d"), Type: filesystem}, told{"f": opOpen, "d/g": opOpen, "d/e/h": opOpen}},
	} {
		test.mark.Ops |= opOpen
		l.do(l.w.Mark(test.mark))
		everywhere()
		l.want(test.want)
		l.do(l.w.Unmark(test.mark))
		everywhere()
		l.quiet("the mark is gone")
	}
}

// TestFileMarkFlags: a symbolic link is followed or marked itself, what is not
// a directory refused, and an evictable mark gives way to one that is not.
func TestFileMarkFlags(t *testing.T) {
	l := newFileLab(t, nil, "f")
	l.do(os.Symlink("f", l.path("link")))
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("link"), Ops: opOpen}))
	l.read("f")
	l.want(told{"f": opOpen})
	l.do(l.w.Flush(inode))
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("link"), Ops: opOpen | kernstream.OpAttrib, Flags: kernstream.MarkDontFollow}))
	l.read("f")
	l.quiet("the link is marked, not the file")
	l.do(os.Lchown(l.path("link"), os.Getuid(), os.Getgid()))
	l.want(told{"link": kernstream.OpAttrib})
	err := l.w.Mark(kernstream.Mark{Path: l.path("f"), Ops: opOpen, Flags: kernstream.MarkOnlyDir})
	wantError(t, err, unix.ENOTDIR, l.path("f"))
	if got := (kernstream.MarkEvictable | kernstream.MarkOnlyDir | 1<<10).String(); got != "evictable|onlydir|0x400" {
		t.Errorf("flags are %q", got)
	}

	if flags := kernstream.MarkEvictable | kernstream.MarkOnlyDir; !flags.Has(kernstream.MarkOnlyDir) || flags.Has(kernstream.MarkOnlyDir|kernstream.MarkDontFollow) {
		t.Errorf("%v does not have what it has", flags)
	}
	evictable := kernstream.Mark{Path: l.path("f"), Ops: opOpen, Flags: kernstream.MarkEvictable}
	if err := l.w.Mark(evictable); !testenv.KernelAtLeast(5, 19) {
		wantError(t, err, errors.ErrUnsupported, "5.19")
		return
	} else if err != nil {
		t.Fatal(err)
	}
	l.read("f")
	l.want(told{"f": opOpen})
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("f"), Ops: opOpen}))
	wantError(t, l.w.Mark(evictable), unix.EEXIST, "evictable")
	l.do(l.w.Unmark(evictable))
}

// TestFileIgnore: each form of ignore mark takes away what it says, for as long
// as the kernel's rules let it.
func TestFileIgnore(t *testing.T) {
	const all = opOpen | onDir | onChild
	l := newFileLab(t, nil, "f g sub/", kernstream.Mark{Ops: all})
	everything := func() {
		l.read("f")
		l.read("g")
		l.list("sub")
	}
	sub := "sub"
	everything()
	for range 3 {
		if e := l.receive(); e.PathState == kernstream.PathUnknown {
			sub = " (unknown)" // this user does not learn the paths of other directories
		}
	}
	without := func(name string) told {
		all := told{"f": opOpen, "g": opOpen, sub: opOpen | onDir}
		if name == "sub" {
			name = sub
		}
		delete(all, name)
		return all
	}
	write := func() {
		f, err := os.OpenFile(l.path("f"), os.O_WRONLY, 0)
		l.do(err)
		l.want(told{})
		f.Write([]byte("x"))
		f.Close()
	}
	for _, mode := range []kernstream.IgnoreMode{
		kernstream.IgnoredMask, kernstream.IgnoredMaskSurvModify, kernstream.Ignore, kernstream.IgnoreSurv,
	} {
		modern := mode == kernstream.Ignore || mode == kernstream.IgnoreSurv
		survives := mode == kernstream.IgnoreSurv || mode == kernstream.IgnoredMaskSurvModify
		mark := kernstream.Mark{Path: l.path("f"), Ops: opOpen, Ignore: mode}
		err := l.w.Mark(mark)
		if modern && !testenv.KernelAtLeast(6, 0) {
			wantError(t, err, errors.ErrUnsupported, "6.0")
			continue
		}
		l.do(err)
		everything()
		l.want(without("f"))
		write()
		everything()
		if survives {
			l.want(without("f"))
			l.do(l.w.Unmark(mark))
		} else {
			l.want(without(""))
			l.w.Unmark(mark)
		}
		everything()
		l.want(without(""))

		// Of a directory: IgnoredMask counts for itself and its entries,
		// the others as their modifiers say.
		mark = kernstream.Mark{Path: l.path("sub"), Ops: opOpen, Ignore: mode}
		if mode == kernstream.Ignore {
			wantError(t, l.w.Mark(mark), unix.EISDIR, "IgnoreSurv")
			continue
		}
		l.do(l.w.Mark(mark))
		sub = "sub" // it is known from now on
		everything()
		if modern {
			l.want(without(""))
		} else {
			l.want(without("sub"))
		}
		l.do(l.w.Unmark(mark))
		if modern {
			mark.Ops |= onDir
			l.do(l.w.Mark(mark))
			everything()
			l.want(without("sub"))
			l.do(l.w.Unmark(mark))
		}
	}
	if !testenv.KernelAtLeast(6, 0) {
		return
	}
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("g"), Ops: opOpen, Ignore: kernstream.IgnoreSurv}))
	err := l.w.Mark(kernstream.Mark{Path: l.path("g"), Ops: opOpen, Ignore: kernstream.IgnoredMask})
	wantError(t, err, unix.EEXIST, "another form")
	l.do(l.w.Flush(inode))

	// While somebody has a file open for writing, the kernel says yes and does
	// nothing.
	l.do(l.w.Mark(kernstream.Mark{Path: l.dir, Ops: all}))
	f, err := os.OpenFile(l.path("f"), os.O_WRONLY, 0)
	l.do(err)
	defer f.Close()
	l.want(told{"f": opOpen})
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("f"), Ops: opOpen, Ignore: kernstream.Ignore}))
	l.read("f")
	l.want(told{"f": opOpen})
}

// TestFileIgnoreOtherGroup: an ignore mark takes away what comes from the
// descriptor group, too, whether that was made before it or is made later.
func TestFileIgnoreOtherGroup(t *testing.T) {
	needMarks(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: overlayDir(t)}
	l.ensure("f g")
	all := kernstream.Mark{Type: filesystem, Path: l.dir, Ops: opOpen}
	none := kernstream.Mark{Path: l.path("f"), Ops: opOpen, Ignore: kernstream.IgnoredMaskSurvModify}
	for _, marks := range [][]kernstream.Mark{{all, none}, {none, all}} {
		w, err := kernstream.WatchFiles(t.Context(), nil, marks[0])
		l.do(err)
		l.w = w
		l.do(w.Mark(marks[1]))
		l.read("f")
		l.read("g")
		for _, e := range l.want(told{"g": opOpen}) {
			if e.Via != kernstream.ViaDescriptor {
				t.Errorf("%v via %v", e, e.Via)
			}
		}
		l.do(w.Unmark(none))
		l.read("f")
		l.want(told{"f": opOpen})
		l.do(w.Close())
	}
}

// TestFileControlMark: who has the descriptors of the groups may use the watcher.
func TestFileControlMark(t *testing.T) {
	l := newFileLab(t, nil, "f")
	l.do(l.w.Mark(kernstream.Mark{Path: l.path("f"), Ops: opOpen}))
	l.do(l.w.Control(func(int) {
		l.do(l.w.Unmark(kernstream.Mark{Path: l.path("f"), Ops: opOpen}))
		l.do(l.w.Mark(kernstream.Mark{Path: l.path("f"), Ops: kernstream.OpAccess}))
	}))
	l.read("f")
	l.want(told{"f": kernstream.OpAccess})
}

// TestFileMarkRefused: what cannot be is refused with a sentence that says why,
// before the kernel says EINVAL.
func TestFileMarkRefused(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		mark  kernstream.Mark
		words string
	}{
		{kernstream.Mark{}, "no operation"},
		{kernstream.Mark{Ops: onDir | onChild}, "event_on_child|ondir alone"},
		{kernstream.Mark{Ops: opOpen | kernstream.OpOverflow}, "q_overflow is reported without being asked for"},
		{kernstream.Mark{Ops: opOpen | kernstream.OpOpenPerm | kernstream.OpPreAccess}, "open_perm|pre_access wait for an answer"},
		{kernstream.Mark{Ops: unix.FAN_MNT_ATTACH}, "mnt_attach are of mount namespaces: see WatchMounts"},
		{kernstream.Mark{Ops: opOpen | kernstream.OpCreate, Type: kernstream.MarkMount}, "a mount mark does not carry create"},
		{kernstream.Mark{Ops: kernstream.OpRename, Type: kernstream.MarkMount}, "a mount mark does not carry rename"},
		{kernstream.Mark{Ops: kernstream.OpFSError}, "fs_error is of the whole file system"},
		{kernstream.Mark{Ops: kernstream.OpFSError, Type: kernstream.MarkMount}, "fs_error is of the whole file system"},
		{kernstream.Mark{Ops: opOpen, Type: filesystem, Flags: kernstream.MarkEvictable}, "only an inode mark can be evictable"},
		{kernstream.Mark{Ops: opOpen, Type: filesystem, Ignore: kernstream.Ignore}, "IgnoreSurv"},
		{kernstream.Mark{Ops: opOpen, Type: 9}, "unknown MarkType(9)"},
		{kernstream.Mark{Ops: opOpen, Ignore: 9}, "unknown IgnoreMode(9)"},
		{kernstream.Mark{Ops: opOpen, Flags: 1 << 9}, "unknown mark flags 0x200"},
	} {
		test.mark.Path = dir
		_, err := kernstream.WatchFiles(t.Context(), nil, test.mark)
		wantError(t, err, unix.EINVAL, dir, test.words)
	}
	_, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Descriptors: true}, kernstream.Mark{Path: dir, Ops: opOpen | kernstream.OpDelete})
	wantError(t, err, unix.EINVAL, dir, "delete come without a descriptor")

	w, err := kernstream.WatchFiles(t.Context(), nil, kernstream.Mark{Path: dir, Ops: opOpen})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		mark  kernstream.Mark
		is    error
		words string
	}{
		{kernstream.Mark{Path: dir, Ops: kernstream.OpDeleteSelf}, unix.EINVAL, "delete_self may come without a directory"},
		{kernstream.Mark{Path: filepath.Join(dir, "nothing"), Ops: opOpen}, fs.ErrNotExist, "nothing"},
		{kernstream.Mark{Path: file, Ops: kernstream.OpRename}, unix.ENOTDIR, "rename are of directories"},
		{kernstream.Mark{Path: dir, Ops: 1 << 29}, errors.ErrUnsupported, "0x20000000"},
	} {
		wantError(t, w.Mark(test.mark), test.is, test.mark.Path, test.words)
	}
	for _, test := range []struct {
		mark  kernstream.Mark
		words string
	}{
		{kernstream.Mark{Path: dir, Ops: opOpen, Type: 9}, "unknown MarkType(9)"},
		{kernstream.Mark{Path: dir, Ops: opOpen, Ignore: 9}, "unknown IgnoreMode(9)"},
		{kernstream.Mark{Path: dir, Ops: opOpen, Flags: 1 << 9}, "unknown mark flags 0x200"},
	} {
		wantError(t, w.Unmark(test.mark), unix.EINVAL, dir, test.words)
	}
	wantError(t, w.Flush(9), unix.EINVAL, "unknown MarkType(9)")
	if err := w.Unmark(kernstream.Mark{Path: dir, Ops: opOpen}); err != nil {
		t.Errorf("what is refused took the mark away: %v", err)
	}
	closed, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	wantError(t, w.Mark(kernstream.Mark{Dir: closed, Ops: opOpen}), os.ErrClosed)
}

// TestFileMarkAllOrNone: when one mark of several fails, those before it are
// taken back, but not what was there already.
func TestFileMarkAllOrNone(t *testing.T) {
	l := newFileLab(t, nil, "a b", kernstream.Mark{Path: "a", Ops: opOpen})
	err := l.w.Mark(
		kernstream.Mark{Path: l.path("a"), Ops: opOpen | opClose},
		kernstream.Mark{Path: l.path("b"), Ops: opOpen},
		kernstream.Mark{Path: l.path("nothing"), Ops: opOpen},
	)
	wantError(t, err, fs.ErrNotExist, l.path("nothing"))
	l.read("a")
	l.read("b")
	l.want(told{"a": opOpen})
}

// TestFileMarkConcurrently: Mark, Unmark, Flush and Control may be called by
// many, and meet Close at any point.
func TestFileMarkConcurrently(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("a b c d")
	for range testenv.SoakN(30) {
		w, err := kernstream.WatchFiles(t.Context(), nil)
		l.do(err)
		var all sync.WaitGroup
		for _, name := range strings.Fields("a b c d") {
			all.Go(func() {
				m := kernstream.Mark{Path: l.path(name), Ops: opOpen}
				for i := 0; ; i++ {
					err := w.Mark(m)
					if err == nil {
						l.read(name)
						err = w.Control(func(fd int) {
							if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
								t.Error(err)
							}
						})
					}
					if err == nil && i%3 == 0 {
						err = w.Flush(inode)
					} else if err == nil {
						err = w.Unmark(m)
					}
					if errors.Is(err, os.ErrClosed) {
						return
					}
					if err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Error(err)
						return
					}
				}
			})
		}
		for range 20 {
			if e := receiveFile(t, w); e.PathState != kernstream.PathExact {
				t.Errorf("event %v", e)
			}
		}
		w.Close()
		all.Wait()
	}
}

// TestFileEventAfterLastMark: an event that comes into the queue after the last
// mark of its file system was taken away has its path, and its file system is
// not kept busy by that.
func TestFileEventAfterLastMark(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "mnt/ other", kernstream.Mark{Path: "other", Ops: opOpen})
	point := l.path("mnt")
	mount(t, "m", point, "tmpfs", 0, "")
	l.ensure("mnt/d/f")
	for _, mark := range []kernstream.Mark{
		{Type: filesystem, Path: point, Ops: opOpen}, // first: the others know paths
		{Path: point + "/d/f", Ops: opOpen},
		{Path: point + "/d", Ops: opOpen | kernstream.OpEventOnChild},
	} {
		l.do(l.w.Mark(mark))
		l.read("mnt/d/f")
		l.want(told{"mnt/d/f": opOpen})
		l.do(l.w.Unmark(mark))
		l.read("other") // what is delivered after that lets go of the file system
		l.want(told{"other": opOpen})
		// The kernel makes such an event for an open(2) that was under way. A mark
		// of which the watcher does not know makes one at will.
		hand := func(how uint) {
			if mark.Type == filesystem {
				how |= unix.FAN_MARK_FILESYSTEM
			}
			l.do(l.w.Control(func(fd int) {
				l.do(unix.FanotifyMark(fd, how, uint64(mark.Ops), unix.AT_FDCWD, mark.Path))
			}))
		}
		hand(unix.FAN_MARK_ADD)
		l.read("mnt/d/f")
		hand(unix.FAN_MARK_REMOVE)
		l.want(told{"mnt/d/f": opOpen})
		l.read("other")
		l.want(told{"other": opOpen})
	}
	l.do(unix.Unmount(point, 0))
	// Another file system has the place; nothing of the old one is taken for it.
	mount(t, "m", point, "tmpfs", 0, "")
	l.ensure("mnt/d/f")
	mark := kernstream.Mark{Path: point + "/d/f", Ops: opOpen}
	l.do(l.w.Mark(mark))
	l.read("mnt/d/f")
	l.want(told{"mnt/d/f": opOpen})
	l.do(l.w.Unmark(mark))
	l.read("other")
	l.want(told{"other": opOpen})
	l.do(unix.Unmount(point, 0))
}

// TestFileMarkReplaced: a mark stays with its inode, so a file that is renamed
// over the marked one is not watched.
func TestFileMarkReplaced(t *testing.T) {
	l := newFileLab(t, nil, "f g", kernstream.Mark{Path: "f", Ops: opOpen | kernstream.OpAttrib | kernstream.OpDeleteSelf})
	l.do(os.Rename(l.path("g"), l.path("f")))
	var ops kernstream.FileOp
	for !ops.Has(kernstream.OpDeleteSelf) {
		e := l.receive()
		ops |= e.Ops
		if e.Path != l.path("f") || e.PathState == kernstream.PathExact || e.Err != nil {
			t.Errorf("event %v; want the old file, and no more than that", e)
		}
		if ops.Has(kernstream.OpDeleteSelf) && e.PathState != kernstream.PathDeleted {
			t.Errorf("event %v; want the file deleted", e)
		}
	}
	if ops != kernstream.OpAttrib|kernstream.OpDeleteSelf {
		t.Errorf("operations %v", ops)
	}
	l.read("f")
	l.quiet("it is another file")
}

// TestFileUnmountable: once the last mark of a file system is taken away, the
// watcher does not keep it busy.
func TestFileUnmountable(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "mnt/ other")
	for _, how := range []string{"unmark", "flush"} {
		mount(t, "m", l.path("mnt"), "tmpfs", 0, "")
		mark := kernstream.Mark{Type: filesystem, Path: l.path("mnt"), Ops: opOpen}
		l.do(l.w.Mark(mark, kernstream.Mark{Path: l.path("other"), Ops: opOpen}))
		l.ensure("mnt/f")
		l.want(told{"mnt/f": opOpen})
		if err := unix.Unmount(l.path("mnt"), 0); err != unix.EBUSY {
			t.Errorf("unmounting with a mark: %v; want EBUSY", err)
		}
		if how == "unmark" {
			l.do(l.w.Unmark(mark))
		} else {
			l.do(l.w.Flush(filesystem))
		}
		umount(t, l.path("mnt"), 0)
		l.read("other")
		l.want(told{"other": opOpen})
	}
	// One that is unmounted all the same just becomes silent.
	mount(t, "m", l.path("mnt"), "tmpfs", 0, "")
	l.do(l.w.Mark(kernstream.Mark{Type: filesystem, Path: l.path("mnt"), Ops: opOpen}))
	umount(t, l.path("mnt"), unix.MNT_DETACH)
	l.read("other")
	l.want(told{"other": opOpen})
}

// TestFileMarkLimit: when the user's marks are used up, the error says so, and
// where the limit is.
func TestFileMarkLimit(t *testing.T) {
	needMarks(t)
	a := newAgent(t, unix.CLONE_NEWNS|unix.CLONE_NEWUSER)
	if answer, err := a.try("limit", "max_fanotify_marks", "2"); err != nil {
		testenv.Missing(t, "needs user namespaces with limits of their own", fmt.Errorf("%s: %w", answer, err))
	}
	l := &fileLab{t: t, dir: t.TempDir()}
	l.ensure("a b c")
	text := a.do("mark", l.path("a"), l.path("b"), l.path("c"))
	if !strings.Contains(text, "no space left") || !strings.Contains(text, "max_user_marks") || !strings.Contains(text, l.path("c")) {
		t.Errorf("the error is %q", text)
	}
}
