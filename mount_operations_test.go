package kernstream_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What a consumer sees of each thing that can happen to a mount table, on each
// way to follow one.
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

// TestParityM3Remount: a remount of one mount is a Changed with old and new
// options. A remount that changes nothing is nothing.
func TestParityM3Remount(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		remount := func() { mount(t, "", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "") }
		e := l.do(remount)
		l.want(e, "", "", "a", "")
		c := e.Changed[0]
		if !slices.Contains(kernstream.SplitOptions(c.Old.Options), "rw") || !slices.Contains(kernstream.SplitOptions(c.New.Options), "ro") {
			t.Errorf("options went from %q to %q; want from rw to ro", c.Old.Options, c.New.Options)
		}
		if c.Old.MountInfoID != c.New.MountInfoID || c.Old.SuperOptions != c.New.SuperOptions {
			t.Errorf("more than the options changed: %+v", c)
		}
		l.want(l.do(remount), "", "", "", "")
	})
}

// TestMountSuperblockRemount: a remount of a file system is a Changed for every
// mount of it, once each.
func TestMountSuperblockRemount(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		for _, name := range []string{"b", "c"} {
			mount(t, dir, l.mkdir(name), "", unix.MS_BIND, "")
		}
		l.untilMark()
		e := l.do(func() { mount(t, "", dir, "", unix.MS_REMOUNT, "size=128k") })
		l.want(e, "", "", "a b c", "")
		for _, c := range e.Changed {
			if !slices.Contains(kernstream.SplitOptions(c.New.SuperOptions), "size=128k") {
				t.Errorf("super options are %q", c.New.SuperOptions)
			}
		}
	})
}

// TestMountForeignRemount: a remount of a file system in another mount
// namespace wakes nobody here; a rescan finds it.
func TestMountForeignRemount(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		a := newAgent(t, unix.CLONE_NEWNS)
		e := l.silently("the remount was in another namespace", func() {
			a.do("mount", "", dir, "", fmt.Sprint(unix.MS_REMOUNT), "size=192k")
		})
		l.want(e, "", "", "a", "")
	})
}

// TestMountReconfigure: a reconfiguration by fsconfig(2) wakes nobody; a rescan
// finds it.
func TestMountReconfigure(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		fs, err := unix.Fspick(unix.AT_FDCWD, dir, unix.FSPICK_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fs)
		if err := unix.FsconfigSetString(fs, "size", "256k"); err != nil {
			t.Fatal(err)
		}
		e := l.silently("fsconfig wakes nobody", func() {
			if err := unix.FsconfigReconfigure(fs); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "", "a", "")
		if c := e.Changed[0]; !slices.Contains(kernstream.SplitOptions(c.New.SuperOptions), "size=256k") {
			t.Errorf("super options went from %q to %q", c.Old.SuperOptions, c.New.SuperOptions)
		}
	})
}

// TestMountSetattr: mount_setattr(2) is a Changed for each mount that it
// changes, recursively too, for flags and for propagation; what it leaves as it
// was is nothing.
func TestMountSetattr(t *testing.T) {
	testenv.NeedKernel(t, 5, 12, "mount_setattr")
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.tmpfs("a", "b")
		l.untilMark()
		set := func(flags uint, attr unix.MountAttr) func() {
			return func() {
				if err := unix.MountSetattr(unix.AT_FDCWD, dir, flags, &attr); err != nil {
					t.Fatal(err)
				}
			}
		}
		noexec := set(unix.AT_RECURSIVE, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOEXEC})
		e := l.do(noexec)
		l.want(e, "", "", "a a/b", "")
		if !slices.Contains(kernstream.SplitOptions(e.Changed[1].New.Options), "noexec") {
			t.Errorf("options are %q", e.Changed[1].New.Options)
		}
		l.want(l.do(noexec), "", "", "", "")
		e = l.do(set(0, unix.MountAttr{Propagation: unix.MS_SHARED}))
		l.want(e, "", "", "a", "")
		if c := e.Changed[0]; len(c.Old.Optional) != 0 || len(c.New.Optional) != 1 || !strings.HasPrefix(c.New.Optional[0], "shared:") {
			t.Errorf("optional fields went from %q to %q", c.Old.Optional, c.New.Optional)
		}
	})
}

// TestMountPropagation: a change of propagation by mount(2) wakes nobody; a
// rescan finds it, and does not take it for a mount.
func TestMountPropagation(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		l.untilMark()
		for _, kind := range []struct {
			flag uintptr
			want string
		}{{unix.MS_SHARED, "shared:"}, {unix.MS_PRIVATE, ""}, {unix.MS_UNBINDABLE, "unbindable"}, {unix.MS_SHARED, "shared:"}} {
			e := l.silently("mount(2) tells nobody of propagation", func() { mount(t, "", dir, "", kind.flag, "") })
			l.want(e, "", "", "a", "")
			if got := strings.Join(e.Changed[0].New.Optional, " "); !strings.HasPrefix(got, kind.want) || kind.want == "" && got != "" {
				t.Errorf("optional fields are %q; want %q", got, kind.want)
			}
		}
		// A slave needs a peer to be the slave of.
		mount(t, dir, l.mkdir("peer"), "", unix.MS_BIND, "")
		l.want(l.untilMark(), "", "", "", "peer")
		e := l.silently("mount(2) tells nobody of propagation", func() { mount(t, "", dir, "", unix.MS_SLAVE, "") })
		l.want(e, "", "", "a", "")
		if got := strings.Join(e.Changed[0].New.Optional, " "); !strings.HasPrefix(got, "master:") {
			t.Errorf("optional fields are %q; want a master", got)
		}
	})
}

// TestMountSetGroup: joining a peer group by move_mount(2) wakes nobody; a
// rescan finds it.
func TestMountSetGroup(t *testing.T) {
	testenv.NeedKernel(t, 5, 15, "MOVE_MOUNT_SET_GROUP")
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		mount(t, dir, l.mkdir("b"), "", unix.MS_BIND, "")
		mount(t, "", dir, "", unix.MS_SHARED, "")
		l.untilMark()
		e := l.silently("joining a peer group wakes nobody", func() {
			if err := unix.MoveMount(unix.AT_FDCWD, dir, unix.AT_FDCWD, filepath.Join(l.dir, "b"), unix.MOVE_MOUNT_SET_GROUP); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "", "b", "")
		if got := e.Changed[0].New.Optional; len(got) != 1 || !strings.HasPrefix(got[0], "shared:") {
			t.Errorf("optional fields are %q", got)
		}
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

// TestMountPropagates: a mount below a shared mount is a Mounted for each of
// its peers in the namespace; so is its end.
func TestMountPropagates(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		dir := l.tmpfs("a")
		mount(t, "", dir, "", unix.MS_SHARED, "")
		mount(t, dir, l.mkdir("b"), "", unix.MS_BIND, "")
		l.mkdir("a", "x")
		l.untilMark()
		e := l.do(func() { l.tmpfs("a", "x") })
		l.want(e, "", "", "", "a/x b/x")
		e = l.do(func() { umount(t, filepath.Join(dir, "x"), 0) })
		l.want(e, "b/x a/x", "", "", "")
	})
}

// TestMountFromOtherNamespace: what is mounted in another namespace arrives
// here if propagation says so, and only then; an unmount of the copy here is
// of this namespace alone.
func TestMountFromOtherNamespace(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		shared, private := l.tmpfs("shared"), l.tmpfs("private")
		mount(t, "", shared, "", unix.MS_SHARED, "")
		l.mkdir("shared", "x")
		l.mkdir("private", "x")
		l.untilMark()
		a := newAgent(t, unix.CLONE_NEWNS)
		a.do("mount", "far", filepath.Join(private, "x"), "tmpfs")
		l.quiet("the mount is private to the other namespace")
		a.do("mount", "far", filepath.Join(shared, "x"), "tmpfs")
		e := l.untilMark()
		l.want(e, "", "", "", "shared/x")
		if e.Mounted[0].FSSource != "far" {
			t.Errorf("mounted is %+v", e.Mounted[0])
		}
		a.do("umount", filepath.Join(shared, "x"))
		l.want(l.untilMark(), "shared/x", "", "", "")

		// On the slave's side only.
		mount(t, "", shared, "", unix.MS_SLAVE, "")
		a.do("mount", "far", filepath.Join(shared, "x"), "tmpfs")
		e = l.untilMark()
		l.want(e, "", "", strings.Join(newPoints(e.Changed, l.dir), " "), "shared/x") // the rescan by the mark may find the slave, too
		e = l.do(func() { umount(t, filepath.Join(shared, "x"), 0) })
		l.want(e, "shared/x", "", "", "")
		if !strings.Contains(a.do("mounts"), `"fs_source":"far"`) {
			t.Error("the unmount went to the other namespace")
		}
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

// TestMountPointRemovedElsewhere: removing a mount point where it is not one,
// in another namespace, unmounts what is on it here.
func TestMountPointRemovedElsewhere(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		point := l.mkdir("a")
		l.untilMark()
		a := newAgent(t, unix.CLONE_NEWNS)
		mount(t, "a", point, "tmpfs", 0, "")
		l.tmpfs("a", "x")
		l.want(l.untilMark(), "", "", "", "a a/x")
		a.do("rmdir", point)
		l.want(l.untilMark(), "a/x a", "", "", "")
	})
}

// TestMountAncestorRenamed: renaming a directory above a mount point wakes
// nobody; a rescan finds that the mount moved.
func TestMountAncestorRenamed(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		l.tmpfs("dir", "a")
		l.untilMark()
		e := l.silently("a rename is none of the table's business", func() {
			if err := os.Rename(filepath.Join(l.dir, "dir"), filepath.Join(l.dir, "renamed")); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "renamed/a", "", "")
	})
}

// TestMountBindSourceRemoved: removing the directory that a bind mount shows
// wakes nobody; a rescan finds it in the mount's root.
func TestMountBindSourceRemoved(t *testing.T) {
	overWays(t, func(t *testing.T, l *lab) {
		source := l.mkdir("source")
		mount(t, source, l.mkdir("a"), "", unix.MS_BIND, "")
		l.untilMark()
		e := l.silently("a removal is none of the table's business", func() {
			if err := os.Remove(source); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "", "a", "")
		if root := e.Changed[0].New.Root; root != "/source//deleted" {
			t.Errorf("root is %q", root)
		}
	})
}

// TestMountFileSystemError: a file system that turns read-only after an error
// wakes nobody; a rescan finds it.
func TestMountFileSystemError(t *testing.T) {
	// Such a file system is flagged ro up to 6.11 (and releases that were
	// mended alike), and nothing shows it from then to 6.14.
	testenv.NeedKernel(t, 6, 15, "emergency_ro among the options of ext4")
	testenv.NeedRoot(t, "an ext4 on a loop device")
	mkfs := testenv.NeedTool(t, "mkfs.ext4")
	mountTool := testenv.NeedTool(t, "mount")
	overWays(t, func(t *testing.T, l *lab) {
		image := filepath.Join(l.dir, "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 8<<20); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(mkfs, "-q", image).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.ext4: %v: %s", err, out)
		}
		point := l.mkdir("a")
		if out, err := exec.Command(mountTool, "-o", "loop,errors=remount-ro", image, point).CombinedOutput(); err != nil {
			testenv.Missing(t, "needs loop devices", fmt.Errorf("%w: %s", err, out))
		}
		defer umount(t, point, 0)
		m := l.untilMark().Mounted[0]
		trigger := filepath.Join("/sys/fs/ext4", filepath.Base(m.FSSource), "trigger_fs_error")
		e := l.silently("an error of a file system wakes nobody", func() {
			if err := os.WriteFile(trigger, []byte("a test of kernstream"), 0o200); err != nil {
				t.Fatal(err)
			}
		})
		l.want(e, "", "", "a", "")
		c := e.Changed[0]
		if c.Old.SuperOptions == c.New.SuperOptions {
			t.Errorf("changed is %+v; want the options of the file system", c)
		}
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

// newRoot returns a directory that has what a root directory needs: a place for
// the old one, and one to mount on.
func newRoot(t testing.TB) string {
	t.Helper()
	root := filepath.Join(labDir(t), "root")
	for _, d := range []string{root, filepath.Join(root, "old"), filepath.Join(root, "sub")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// newContainer returns an agent in a namespace of its own that can make root
// its root directory, and the options to follow it.
func newContainer(t testing.TB, root string) (*agent, *kernstream.MountOptions) {
	t.Helper()
	a := newAgent(t, unix.CLONE_NEWNS)
	a.do("mount", root, root, "", fmt.Sprint(unix.MS_BIND))
	return a, &kernstream.MountOptions{PID: a.PID}
}

// TestMountPivotRoot: pivot_root(2) is a Moved of the old root and of the new
// one, and what happens afterwards is told relative to the new root. The old
// one can be unmounted; what was under it is then Unmounted.
func TestMountPivotRoot(t *testing.T) {
	eachWay(t, func(t *testing.T, via kernstream.MountVia) {
		for _, from := range []string{"inside", "outside"} {
			t.Run(from, func(t *testing.T) { testPivotRoot(t, via, from) })
		}
	})
}

func testPivotRoot(t *testing.T, via kernstream.MountVia, from string) {
	testenv.NoLeaks(t)
	root := newRoot(t)
	a, target := newContainer(t, root)
	target.Via = via
	var events func() *kernstream.MountEvent
	if from == "inside" {
		a.do("watch", via.String())
		events = func() *kernstream.MountEvent { return unmarshalEvent(t, a.do("event")) }
	} else {
		w, err := kernstream.WatchMounts(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		events = func() *kernstream.MountEvent {
			select {
			case e := <-w.C:
				return e
			case <-time.After(200 * time.Millisecond):
				return nil
			}
		}
	}
	table := map[uint32]kernstream.Mount{}
	collect := func() (all kernstream.MountEvent) {
		for e := events(); e != nil; e = events() {
			if err := applyMounts(table, e); err != nil {
				t.Fatal(err)
			}
			all.Moved = append(all.Moved, e.Moved...)
			all.Mounted = append(all.Mounted, e.Mounted...)
			all.Unmounted = append(all.Unmounted, e.Unmounted...)
		}
		return all
	}
	collect()
	before := len(table)
	a.do("pivot_root", root, filepath.Join(root, "old"))
	e := collect()
	if len(e.Mounted) != 0 || len(e.Unmounted) != 0 || len(table) != before {
		t.Errorf("pivot_root is %d mounted, %d unmounted; want moves alone", len(e.Mounted), len(e.Unmounted))
	}
	moved := map[string]string{}
	for _, c := range e.Moved {
		moved[c.Old.MountPoint] = c.New.MountPoint
	}
	if moved[root] != "/" || moved["/"] != "/old" {
		t.Errorf("moved is %v; want %s to / and / to /old", moved, root)
	}
	a.do("mount", "later", "/sub", "tmpfs")
	if e := collect(); len(e.Mounted) != 1 || e.Mounted[0].MountPoint != "/sub" {
		t.Errorf("mounted is %v; want /sub", points(e.Mounted, ""))
	}
	a.do("umount", "/old", fmt.Sprint(unix.MNT_DETACH))
	if e := collect(); len(e.Unmounted) != before-1 || len(table) != 2 {
		t.Errorf("%d unmounted, %d left; want %d and 2", len(e.Unmounted), len(table), before-1)
	}
	if err := compareTable(table, target); err != nil {
		t.Error(err)
	}
}

// TestMountChangeRoot: a process that changes its root and drops the old one at
// once, as container runtimes do, is followed, also when the files of the watcher
// read empty because they belong to the old root.
func TestMountChangeRoot(t *testing.T) {
	eachWay(t, testChangeRoot)
}

func testChangeRoot(t *testing.T, via kernstream.MountVia) {
	root := newRoot(t)
	for range testenv.SoakN(20) {
		a, target := newContainer(t, root)
		target.Via = via
		l := &lab{t: t, dir: root}
		l.watch(t.Context(), target)
		a.do("change root", root, filepath.Join(root, "old"))
		l.wantNewRoot(a, target)
		l.w.Close()
		a.end()
	}
}

// wantNewRoot lets a container whose root was changed mount something, and waits
// until its table has that and the root alone.
func (l *lab) wantNewRoot(a *agent, target *kernstream.MountOptions) {
	l.t.Helper()
	a.do("mount", "later", "/sub", "tmpfs")
	// A table of two may be one of which not everything has been told to be
	// gone.
	for len(l.table) != 2 || !l.has("/sub") {
		l.apply(l.receive())
	}
	l.checkTable(target)
}

// TestMountChangeRootWhileStarting: a process that changes its root while the
// watcher starts, as a container does that is starting, is followed all the
// same.
func TestMountChangeRootWhileStarting(t *testing.T) {
	testenv.NoLeaks(t)
	root := newRoot(t)
	for range testenv.SoakN(40) {
		a, target := newContainer(t, root)
		l := &lab{t: t, dir: root}
		done := make(chan struct{})
		go func() {
			defer close(done)
			time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
			a.do("change root", root, filepath.Join(root, "old"))
		}()
		l.watch(t.Context(), target)
		<-done
		l.wantNewRoot(a, target)
		l.w.Close()
		a.end()
	}
}

// TestMountChangeRootOutOfDescriptors: without a descriptor to open the files
// again, a watcher says nothing rather than that all is unmounted, and catches
// up by itself when there are descriptors.
func TestMountChangeRootOutOfDescriptors(t *testing.T) {
	testenv.NoLeaks(t)
	root := newRoot(t)
	a, target := newContainer(t, root)
	target.Via = kernstream.ViaMountinfo // the other way opens nothing
	l := &lab{t: t, dir: root}
	l.watch(t.Context(), target)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	a.do("change root", root, filepath.Join(root, "old"))
	select {
	case e := <-l.w.C:
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		t.Fatalf("event %v (Err %v) without a descriptor to look; want none", e, l.w.Err())
	case <-time.After(50 * time.Millisecond):
	}
	unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	for len(l.table) != 1 {
		l.apply(l.receive())
	}
	l.checkTable(target)
}

// TestMountRootRemountedAfterChroot: a change of the options of / is no sign of
// another root, so a chroot before it goes on not to count.
func TestMountRootRemountedAfterChroot(t *testing.T) {
	eachWay(t, testRootRemountedAfterChroot)
}

func testRootRemountedAfterChroot(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	a := newAgent(t, unix.CLONE_NEWNS)
	a.do("mount", "", "/", "", fmt.Sprint(unix.MS_PRIVATE|unix.MS_REC))
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer namespace.Close()
	l := &lab{t: t, dir: dir}
	l.watch(t.Context(), &kernstream.MountOptions{Via: via, PID: a.PID})
	a.do("chroot", dir)
	err = mntns.Do(int(namespace.Fd()), func(int) error {
		return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOATIME, "")
	})
	if err == unix.EPERM {
		testenv.Missing(t, "needs a / that may be remounted", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	e := l.receive()
	l.apply(e)
	if len(e.Changed) != 1 || e.Changed[0].New.MountPoint != "/" || len(e.Unmounted)+len(e.Mounted)+len(e.Moved) != 0 {
		t.Errorf("event %v; want / changed, and nothing else", e)
	}
}

// TestMountLastBeforeExit: what a process does last is told before its end.
func TestMountLastBeforeExit(t *testing.T) {
	eachWay(t, testLastBeforeExit)
}

func testLastBeforeExit(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	for range testenv.SoakN(40) {
		a := newAgent(t, unix.CLONE_NEWNS)
		w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{Via: via, PID: a.PID, NoInitial: true})
		if err != nil {
			t.Fatal(err)
		}
		a.try("mount and exit", "last", dir, "tmpfs")
		// One way keeps the namespace, the other is told of its end.
		mounted, unmounted := 0, 0
		for e := range w.C {
			mounted += len(e.Mounted)
			unmounted += len(e.Unmounted)
		}
		if mounted+min(unmounted, 1) == 0 || mounted > 1 || unmounted > 0 && via == kernstream.ViaMountinfo || w.Err() != nil {
			t.Fatalf("%d mounted, %d unmounted, Err %v; want 1 mounted or the end of the namespace", mounted, unmounted, w.Err())
		}
		a.end()
	}
}

// TestMountProcessLeavesNamespace: the watcher stays with the namespace that the
// process had, whatever the process does later.
func TestMountProcessLeavesNamespace(t *testing.T) {
	eachWay(t, testProcessLeavesNamespace)
}

func testProcessLeavesNamespace(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	a := newAgent(t, unix.CLONE_NEWNS)
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer namespace.Close()
	l := &lab{t: t, dir: dir}
	l.watch(t.Context(), &kernstream.MountOptions{Via: via, PID: a.PID})
	a.do("unshare")
	a.do("mount", "elsewhere", dir, "tmpfs")
	l.quiet("the process has gone elsewhere")
	// A change of what is on / makes the watcher open its files again.
	err = mntns.Do(int(namespace.Fd()), func(int) error { return unix.Mount("there", "/", "tmpfs", 0, "") })
	if err != nil {
		t.Fatal(err)
	}
	e := l.receive()
	l.apply(e)
	if len(e.Mounted) != 1 || len(e.Unmounted) != 0 || e.Mounted[0].MountPoint != "/" {
		t.Errorf("event %v; want the mount on /", e)
	}
}

func unmarshalEvent(t *testing.T, text string) *kernstream.MountEvent {
	t.Helper()
	if text == "none" {
		return nil
	}
	e, err := decodeMountEvent([]byte(text))
	if err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return e
}

// TestMountOverRoot: a mount over / is a Mounted like any other, and the
// watcher goes on.
func TestMountOverRoot(t *testing.T) {
	eachWay(t, testOverRoot)
}

func testOverRoot(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	a := newAgent(t, unix.CLONE_NEWNS)
	w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{Via: via, PID: a.PID, NoInitial: true})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	receive := func() *kernstream.MountEvent {
		select {
		case e := <-w.C:
			return e
		case <-time.After(patience):
			t.Fatal("no event")
			return nil
		}
	}
	a.do("mount", "over", "/", "tmpfs")
	if e := receive(); len(e.Mounted) != 1 || e.Mounted[0].MountPoint != "/" || e.Mounted[0].FSSource != "over" {
		t.Errorf("event %v; want the mount over /", e)
	}
	a.do("mount", "more", dir, "tmpfs")
	if e := receive(); len(e.Mounted) != 1 || e.Mounted[0].MountPoint != dir {
		t.Errorf("event %v; want the mount on %s", e, dir)
	}
}

// TestMountChroot: a chroot of the process wakes nobody, and the watcher keeps
// to the root directory that the process had: it goes on telling of mounts
// outside.
func TestMountChroot(t *testing.T) {
	eachWay(t, testChroot)
}

func testChroot(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	for _, name := range []string{"root", "out"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	a := newAgent(t, 0)
	w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{Via: via, PID: a.PID, NoInitial: true})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	a.do("chroot", filepath.Join(dir, "root"))
	w.Rescan()
	select {
	case e := <-w.C:
		t.Fatalf("event %v; want none for a chroot", e)
	case <-time.After(30 * time.Millisecond):
	}
	mount(t, "out", filepath.Join(dir, "out"), "tmpfs", 0, "")
	select {
	case e := <-w.C:
		if len(e.Mounted) != 1 || len(e.Unmounted) != 0 || e.Mounted[0].MountPoint != filepath.Join(dir, "out") {
			t.Errorf("event %v; want the mount outside", e)
		}
	case <-time.After(patience):
		t.Fatal("no event")
	}
}

// TestMountInChroot: a process in a chroot sees the mounts below its root,
// relative to it. Others are nothing, the last one's going is told, and a table
// without a row is a table.
func TestMountInChroot(t *testing.T) {
	testenv.NoLeaks(t)
	dir := labDir(t)
	inside, outside := filepath.Join(dir, "root", "in"), filepath.Join(dir, "out")
	for _, d := range []string{inside, outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	a := newAgent(t, 0)
	a.do("chroot", filepath.Join(dir, "root"))
	options := &kernstream.MountOptions{PID: a.PID}
	if mounts, err := kernstream.Mounts(options); len(mounts) != 0 || err != nil {
		t.Fatalf("Mounts returned %v, %v; want an empty table", mounts, err)
	}
	w, err := kernstream.WatchMounts(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if e := <-w.C; !e.Initial || len(e.Mounted) != 0 {
		t.Fatalf("the first event is %v", e)
	}
	mount(t, "out", outside, "tmpfs", 0, "")
	select {
	case e := <-w.C:
		t.Fatalf("event %v; want none for a mount outside", e)
	case <-time.After(30 * time.Millisecond):
	}
	mount(t, "in", inside, "tmpfs", 0, "")
	if e := <-w.C; len(e.Mounted) != 1 || e.Mounted[0].MountPoint != "/in" {
		t.Errorf("event %v; want /in mounted", e)
	}
	umount(t, inside, 0)
	if e := <-w.C; len(e.Unmounted) != 1 || e.Unmounted[0].MountPoint != "/in" {
		t.Errorf("event %v; want /in unmounted", e)
	}
}
