package kernstream_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Changes of mounts that stay: options, propagation, and what the kernel tells
// nobody about, on both ways.

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
