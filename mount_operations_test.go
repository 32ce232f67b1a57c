package kernstream_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What a consumer sees of each thing that can happen to a mount table, on each
// way to follow one: mounts that come, go and move. Changes of those that stay are
// in mount_attributes_test.go, changes of the root directory in mount_root_test.go.
//
// Elsewhere: what fanotify marks, listmount(2) and statmount(2) allow to whom is
// TestMountLadder, the end of the last reference to a namespace
// TestMountOfNamespace, that of a process TestMountOfProcess. What poll(2) and
// epoll(7) report of a mountinfo file is tested in internal/procfs, what
// statmount(2) says in internal/statmount. Not here: STATMOUNT_BY_FD and
// mnt_ns_fd, which nothing uses.

// ways lists the ways to follow a mount table that must tell the same story.
var ways = []kernstream.MountVia{kernstream.ViaMountinfo, kernstream.ViaFanotify}

// needWay skips a test where the kernel does not have a way.
func needWay(t testing.TB, way kernstream.MountVia) {
	t.Helper()
	if way == kernstream.ViaFanotify {
		testenv.NeedMounts(t)
		testenv.NeedKernel(t, 6, 16, "fanotify marks of mount namespaces, for the root of a user namespace, too")
	}
}

// eachWay runs a test for each way.
func eachWay(t *testing.T, test func(t *testing.T, via kernstream.MountVia)) {
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) {
			needWay(t, way)
			testenv.NoLeaks(t)
			test(t, way)
		})
	}
}

// overWays runs a test with a lab for each way.
func overWays(t *testing.T, test func(t *testing.T, l *lab)) {
	eachWay(t, func(t *testing.T, via kernstream.MountVia) {
		l := newLab(t, &kernstream.MountOptions{Via: via})
		if l.via != via {
			t.Fatalf("the first event came via %v", l.via)
		}
		test(t, l)
		l.untilMark()
		l.checkTable(nil)
	})
}

// TestMountTmpfs: a mount is one Mounted with all its fields, an unmount one
// Unmounted with the last known row.
func TestMountTmpfs(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		testenv.Feature(t, "mount table", l.via.String())
		dir := l.mkdir("a")
		e := l.do(func() { mount(t, "the source", dir, "tmpfs", unix.MS_NOSUID, "size=64k") })
		l.want(e, "", "", "", "a")
		m := e.Mounted[0]
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			t.Fatal(err)
		}
		if m.Major != unix.Major(st.Dev) || m.Minor != unix.Minor(st.Dev) {
			t.Errorf("device %d:%d; want that of the files, %d:%d", m.Major, m.Minor, unix.Major(st.Dev), unix.Minor(st.Dev))
		}
		if m.MountInfoID == 0 || m.MountInfoParentID == 0 || m.Root != "/" || m.FSType != "tmpfs" || m.FSSource != "the source" ||
			!slices.Contains(kernstream.SplitOptions(m.Options), "nosuid") || !slices.Contains(kernstream.SplitOptions(m.SuperOptions), "size=64k") {
			t.Errorf("mounted is %+v", m)
		}
		e = l.do(func() { umount(t, dir, 0) })
		l.want(e, "a", "", "", "")
		if !sameMount(&e.Unmounted[0], &m) {
			t.Errorf("unmounted is %+v; want what was mounted, %+v", e.Unmounted[0], m)
		}
	})
}

// TestMountWithoutPrivilege: any process can read and follow its mount table.
func TestMountWithoutPrivilege(t *testing.T) {
	testenv.NoLeaks(t)
	mounts, err := kernstream.Mounts(nil)
	if err != nil || len(mounts) == 0 {
		t.Fatalf("Mounts returned %d mounts, %v", len(mounts), err)
	}
	for _, via := range []kernstream.MountVia{kernstream.ViaAuto, kernstream.ViaMountinfo} {
		w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{Via: via})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		e := <-w.C
		if !e.Initial || len(e.Mounted) == 0 || via != kernstream.ViaAuto && e.Via != via {
			t.Errorf("the first event is %v, via %v", e, e.Via)
		}
		testenv.Feature(t, "mount table, "+via.String(), e.Via.String())
	}
}

// TestMountStacked: the same thing mounted on itself is another mount, whose
// parent is the lower one; unmounting it leaves the lower one alone.
func TestMountStacked(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.mkdir("a")
		mount(t, "same", dir, "tmpfs", 0, "")
		lower := l.untilMark().Mounted[0]
		e := l.do(func() { mount(t, "same", dir, "tmpfs", 0, "") })
		l.want(e, "", "", "", "a")
		if m := e.Mounted[0]; m.MountInfoParentID != lower.MountInfoID || m.MountInfoID == lower.MountInfoID {
			t.Errorf("the upper mount is %+v; want one whose parent is the lower", m)
		}
		top := e.Mounted[0].MountInfoID
		e = l.do(func() { umount(t, dir, 0) })
		l.want(e, "a", "", "", "")
		if e.Unmounted[0].MountInfoID != top {
			t.Error("unmounted is the lower mount")
		}
	})
}

// TestMountBind: bind mounts of a directory, a subdirectory, a file and a
// namespace say what of the file system they show.
func TestMountBind(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		base := l.tmpfs("base")
		l.mkdir("base", "sub", "deep")
		file := filepath.Join(base, "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		target := filepath.Join(l.dir, "target")
		if err := os.WriteFile(target, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		l.untilMark()
		bind := func(source, target string) *kernstream.MountEvent {
			return l.do(func() { mount(t, source, target, "", unix.MS_BIND, "") })
		}
		e := bind(base, l.mkdir("whole"))
		l.want(e, "", "", "", "whole")
		if e.Mounted[0].Root != "/" {
			t.Errorf("Root is %q", e.Mounted[0].Root)
		}
		e = bind(filepath.Join(base, "sub", "deep"), l.mkdir("part"))
		l.want(e, "", "", "", "part")
		if e.Mounted[0].Root != "/sub/deep" {
			t.Errorf("Root is %q", e.Mounted[0].Root)
		}
		e = bind(file, target)
		l.want(e, "", "", "", "target")
		if e.Mounted[0].Root != "/file" {
			t.Errorf("Root is %q", e.Mounted[0].Root)
		}
		e = bind("/proc/self/ns/uts", target)
		l.want(e, "", "", "", "target")
		if m := e.Mounted[0]; m.FSType != "nsfs" || !strings.HasPrefix(m.Root, "uts:[") {
			t.Errorf("the mount of a namespace is %+v", m)
		}
	})
}

// TestMountRecursiveBind: a recursive bind is a Mounted for each mount, parents
// first; a recursive lazy unmount an Unmounted for each, parents last.
func TestMountRecursiveBind(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		l.tmpfs("tree")
		l.tmpfs("tree", "x")
		l.tmpfs("tree", "x", "y")
		copied := l.mkdir("copy")
		l.untilMark()
		e := l.do(func() { mount(t, filepath.Join(l.dir, "tree"), copied, "", unix.MS_BIND|unix.MS_REC, "") })
		l.want(e, "", "", "", "copy copy/x copy/x/y")
		e = l.do(func() { umount(t, copied, unix.MNT_DETACH) })
		l.want(e, "copy/x/y copy/x copy", "", "", "")
	})
}

// TestMountMove: a move is a Moved of the mount and of each below it, with the
// same IDs, old and new; nothing is mounted or unmounted.
func TestMountMove(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		from := l.tmpfs("from")
		l.tmpfs("from", "x")
		l.tmpfs("from", "x", "y")
		parent := l.tmpfs("parent")
		to := l.mkdir("parent", "to")
		before := l.untilMark().Mounted
		e := l.do(func() { mount(t, from, to, "", unix.MS_MOVE, "") })
		l.want(e, "", "parent/to parent/to/x parent/to/x/y", "", "")
		c := e.Moved[0]
		if c.Old.MountPoint != from || c.New.MountPoint != to || c.Old.MountInfoID != c.New.MountInfoID || c.New.MountInfoID != before[0].MountInfoID {
			t.Errorf("moved is %+v", c)
		}
		if c.New.MountInfoParentID != before[slices.IndexFunc(before, func(m kernstream.Mount) bool { return m.MountPoint == parent })].MountInfoID {
			t.Errorf("the parent is %d after the move", c.New.MountInfoParentID)
		}
		// The new API does the same.
		if err := unix.MoveMount(unix.AT_FDCWD, to, unix.AT_FDCWD, from, 0); err != nil {
			t.Fatal(err)
		}
		l.want(l.untilMark(), "", "from from/x from/x/y", "", "")
	})
}

// TestMountDetached: a mount without a place in the tree (fsmount(2),
// open_tree(2)) is nothing until it is attached.
func TestMountDetached(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		l.quiet("a detached copy is in no namespace")
		if testenv.KernelAtLeast(5, 12) {
			if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
				t.Fatal(err)
			}
			l.quiet("it changed where nobody sees it")
		}
		fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fs)
		if err := unix.FsconfigCreate(fs); err != nil {
			t.Fatal(err)
		}
		fsMount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fsMount)
		l.quiet("a new mount is in no namespace before it is attached")
		unix.Close(tree)
		l.quiet("what was in no namespace has not left it")
		e := l.do(func() {
			if err := unix.MoveMount(fsMount, "", unix.AT_FDCWD, l.mkdir("b"), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "", "", "b")
	})
}

// TestMountBeneath: mounting beneath a mount is a Mounted of the lower one, and
// a Moved of the upper one, whose parent it is; its mount point is the same.
func TestMountBeneath(t *testing.T) {
	testenv.NeedKernel(t, 6, 5, "MOVE_MOUNT_BENEATH")
	overWays(t, func(t *testing.T, l *lab) {
		l.tmpfs("a")
		l.tmpfs("b")
		upper := l.untilMark().Mounted[0]
		tree, err := unix.OpenTree(unix.AT_FDCWD, filepath.Join(l.dir, "b"), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(tree)
		const moveMountBeneath = 0x200
		e := l.do(func() {
			if err := unix.MoveMount(tree, "", unix.AT_FDCWD, filepath.Join(l.dir, "a"), unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "a", "", "a")
		if c := e.Moved[0]; c.New.MountInfoID != upper.MountInfoID || c.New.MountInfoParentID != e.Mounted[0].MountInfoID {
			t.Errorf("moved is %+v; want the upper mount on the new one", c)
		}
	})
}

// TestMountBusy: what does not happen is nothing.
func TestMountBusy(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		file, err := os.Create(filepath.Join(dir, "busy"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(dir, 0); err != unix.EBUSY {
			t.Fatalf("umount of a busy mount: %v", err)
		}
		l.quiet("the mount is busy")
		if err := unix.Mount("none", l.dir, "no-such-type", 0, ""); err == nil {
			t.Fatal("mounted a type that does not exist")
		}
		l.quiet("the mount failed")

		// Lazily it goes at once; its last file is nothing.
		e := l.do(func() { umount(t, dir, unix.MNT_DETACH) })
		l.want(e, "a", "", "", "")
		file.Close()
		l.quiet("the mount was gone before its last file")
	})
}

// TestMountExpire: MNT_EXPIRE marks at the first call and unmounts at the
// second.
func TestMountExpire(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		if err := unix.Unmount(dir, unix.MNT_EXPIRE); err != unix.EAGAIN {
			t.Fatalf("the first MNT_EXPIRE: %v", err)
		}
		l.quiet("the mount was only marked")
		l.want(l.do(func() { umount(t, dir, unix.MNT_EXPIRE) }), "a", "", "", "")
	})
}

// TestMountTucked: propagation that finds its place taken tucks the mount
// beneath. When the lower one goes again, the upper one moves back.
func TestMountTucked(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		mount(t, "", dir, "", unix.MS_SHARED, "")
		l.mkdir("a", "x")
		mount(t, dir, l.mkdir("b"), "", unix.MS_BIND, "")
		mount(t, "", filepath.Join(l.dir, "b"), "", unix.MS_SLAVE, "")
		mount(t, "upper", filepath.Join(l.dir, "b", "x"), "tmpfs", 0, "")
		l.untilMark()
		e := l.do(func() { mount(t, "lower", filepath.Join(dir, "x"), "tmpfs", 0, "") })
		l.want(e, "", "b/x", "", "a/x b/x")
		if c := e.Moved[0]; c.New.FSSource != "upper" || c.New.MountInfoParentID != e.Mounted[1].MountInfoID || c.Old.MountPoint != c.New.MountPoint {
			t.Errorf("moved is %+v; want the upper mount, on the one that came", c)
		}
		e = l.do(func() { umount(t, filepath.Join(dir, "x"), 0) })
		l.want(e, "b/x a/x", "b/x", "", "")
	})
}

// TestMountFUSEDaemonDies: when the daemon of a FUSE file system goes, the mount
// stays, and nothing is told; the watcher never looks into a mount, so one
// whose daemon does not answer does not stop it either.
func TestMountFUSEDaemonDies(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			testenv.Missing(t, "needs /dev/fuse", err)
		}
		point := l.mkdir("fuse")
		options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", device, os.Getuid(), os.Getgid())
		mount(t, "daemon", point, "fuse.test", 0, options)
		defer umount(t, point, unix.MNT_DETACH)
		// Nobody answers: whoever looked at the mount point would hang here.
		e := l.untilMark()
		l.want(e, "", "", "", "fuse")
		if e.Mounted[0].FSType != "fuse.test" {
			t.Errorf("type is %q", e.Mounted[0].FSType)
		}
		unix.Close(device)
		l.quiet("the mount is still there")
		l.w.Rescan()
		l.quiet("the mount is still there")
	})
}

// TestMountComesAndGoes: what is mounted and unmounted faster than the table
// can be read leaves no trace, or a balanced one; the end is right.
func TestMountComesAndGoes(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.mkdir("a")
		e := l.do(func() {
			for range 1000 {
				mount(t, "a", dir, "tmpfs", 0, "")
				umount(t, dir, 0)
			}
		})
		if len(e.Mounted) != len(e.Unmounted) {
			t.Errorf("%d mounted, %d unmounted", len(e.Mounted), len(e.Unmounted))
		}
	})
}

// TestMountStorm: in the middle of a storm that tears every read, what is
// mounted is told, and at its end the table is right.
func TestMountStorm(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		var calm []func()
		for i := range 4 {
			calm = append(calm, storm(l.mkdir(fmt.Sprint("storm", i))))
		}
		for i := range 20 {
			point := l.mkdir(fmt.Sprint("m", i))
			mount(t, "calm", point, "ramfs", 0, "")
			l.until(&kernstream.MountEvent{}, func(e *kernstream.MountEvent) bool {
				return slices.ContainsFunc(e.Mounted, func(m kernstream.Mount) bool { return m.MountPoint == point })
			})
		}
		for _, f := range calm {
			f()
		}
	})
}

// TestMountOddNames: names with white space, escapes, control characters and
// bytes that are no text arrive as they are.
func TestMountOddNames(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		for i, name := range []string{
			"space tab\tline\nback\\slash", `literal \040`, "#", "-", "\r\v\f\x7f", "\u00a0\u0085\u2003", "\xff\xfe", strings.Repeat("x", 255),
		} {
			dir := l.mkdir(fmt.Sprint(i))
			odd := filepath.Join(dir, name)
			if err := os.Mkdir(odd, 0o755); err != nil {
				t.Fatal(err)
			}
			e := l.do(func() { mount(t, name, odd, "tmpfs", 0, "") })
			if len(e.Mounted) != 1 || e.Mounted[0].MountPoint != odd || e.Mounted[0].FSSource != name {
				t.Errorf("%q: mounted is %+v", name, e.Mounted)
			}
		}
		for _, source := range []string{"", "none", "-", `a,b="c"`} {
			dir := l.mkdir("source")
			e := l.do(func() { mount(t, source, dir, "tmpfs", 0, "") })
			// An empty source goes through mount(2) as no source at all.
			if got := e.Mounted[0].FSSource; got != source && !(source == "" && got == "none") {
				t.Errorf("source is %q; want %q", got, source)
			}
			l.do(func() { umount(t, dir, 0) })
		}
	})
}

// TestMountLongRow: a row far longer than a page arrives whole.
func TestMountLongRow(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		l.tmpfs("o")
		var lower []string
		for i := range 60 {
			lower = append(lower, l.mkdir("o", fmt.Sprintf("layer-%03d-%s", i, strings.Repeat("x", 20))))
		}
		l.mkdir("o", "merged")
		l.untilMark()
		// A mount takes a page of options, so long paths are named from
		// within.
		wd, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		t.Chdir(filepath.Join(l.dir, "o"))
		for i := range lower {
			lower[i] = filepath.Base(lower[i])
		}
		data := "lowerdir=" + strings.Join(lower, ":")
		err = unix.Mount("overlay", "merged", "overlay", 0, data)
		t.Chdir(wd)
		if err == unix.ENODEV || err == unix.EPERM {
			testenv.Missing(t, "needs overlay", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		e := l.untilMark()
		l.want(e, "", "", "", "o/merged")
		if m := e.Mounted[0]; !strings.Contains(m.SuperOptions, lower[0]) || !strings.Contains(m.SuperOptions, lower[59]) {
			t.Errorf("super options of %d bytes lack layers", len(m.SuperOptions))
		}
		umount(t, filepath.Join(l.dir, "o", "merged"), 0)
		l.want(l.untilMark(), "o/merged", "", "", "")
	})
}
