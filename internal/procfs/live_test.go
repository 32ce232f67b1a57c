package procfs_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/testenv"
)

// openMountinfo returns a descriptor of the process's mountinfo.
func openMountinfo(tb testing.TB) int {
	tb.Helper()
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	return fd
}

// readTable decodes the mountinfo file fd, each row of which must be right.
func readTable(tb testing.TB, fd int) []procfs.MountInfo {
	tb.Helper()
	text, err := procfs.ReadAll(fd, nil, func() error { return nil })
	if err != nil {
		tb.Fatal(err)
	}
	var parser procfs.MountInfoParser
	var table []procfs.MountInfo
	for _, row := range splitRows(text) {
		m, err := parser.Parse(row)
		if err != nil {
			tb.Errorf("row %q: %v", row, err)
		}
		if again := encode(m); again != row {
			tb.Errorf("row %.2000q, made again %.2000q", row, again)
		}
		table = append(table, m)
	}
	return table
}

// mountedOn returns the row of what is mounted on point.
func mountedOn(tb testing.TB, point string) procfs.MountInfo {
	tb.Helper()
	return only(tb, readTable(tb, openMountinfo(tb)), point)
}

// only returns the one row of table with that mount point.
func only(tb testing.TB, table []procfs.MountInfo, point string) procfs.MountInfo {
	tb.Helper()
	var found []procfs.MountInfo
	for _, m := range table {
		if m.MountPoint == point {
			found = append(found, m)
		}
	}
	if len(found) != 1 {
		tb.Fatalf("%d rows of mount point %.2000q, want 1", len(found), point)
	}
	return found[0]
}

// check compares a row with what was mounted, and with what statx(2) says.
func check(tb testing.TB, got, want procfs.MountInfo) {
	tb.Helper()
	checkFields(tb, got, want)
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, got.MountPoint, 0, unix.STATX_MNT_ID, &st); err == nil {
		if st.Mnt_id != uint64(got.ID) || st.Dev_major != got.Major || st.Dev_minor != got.Minor {
			tb.Errorf("mount ID %d, device %d:%d, statx says %d, %d:%d", got.ID, got.Major, got.Minor, st.Mnt_id, st.Dev_major, st.Dev_minor)
		}
	} else if err != unix.ENAMETOOLONG {
		tb.Error(err)
	}
}

// checkFields compares a row with what was mounted. Empty fields of want are
// not looked at, except the source; of the super block options, the first must
// be the one given.
func checkFields(tb testing.TB, got, want procfs.MountInfo) {
	tb.Helper()
	for _, field := range []struct{ name, got, want string }{
		{"root", got.Root, want.Root},
		{"mount point", got.MountPoint, want.MountPoint},
		{"options", got.Options, want.Options},
		{"type", got.FSType, want.FSType},
	} {
		if field.want != "" && field.got != field.want {
			tb.Errorf("%s %.2000q, want %.2000q", field.name, field.got, field.want)
		}
	}
	if got.Source != want.Source {
		tb.Errorf("source %q, want %q", got.Source, want.Source)
	}
	if !reflect.DeepEqual(got.Optional, want.Optional) {
		tb.Errorf("optional fields %q, want %q", got.Optional, want.Optional)
	}
	if first, _, _ := strings.Cut(got.SuperOptions, ","); want.SuperOptions != "" && first != want.SuperOptions {
		tb.Errorf("super block options %q, want %q first", got.SuperOptions, want.SuperOptions)
	}
}

// TestLiveMountPoints: the mount point of a tmpfs with an odd name is that
// name.
func TestLiveMountPoints(t *testing.T) {
	dir := testenv.MountDir(t)
	for _, name := range testenv.OddNames {
		point := testenv.Mkdir(t, dir, name)
		testenv.Mount(t, "source", point, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "")
	}
	table := readTable(t, openMountinfo(t))
	for _, name := range testenv.OddNames {
		point := filepath.Join(dir, name)
		check(t, only(t, table, point), procfs.MountInfo{Root: "/", MountPoint: point, Options: "rw,nosuid,nodev,relatime", FSType: "tmpfs", Source: "source", SuperOptions: "rw"})
	}
}

// TestLiveSources: the source of a tmpfs is what it was mounted with.
func TestLiveSources(t *testing.T) {
	dir := testenv.MountDir(t)
	sources := append([]string{"", "none", "tmpfs", strings.Repeat("long ", 800)}, testenv.OddNames...)
	for i, source := range sources {
		testenv.Mount(t, source, testenv.Mkdir(t, dir, fmt.Sprint(i)), "tmpfs", unix.MS_RDONLY, "")
	}
	table := readTable(t, openMountinfo(t))
	for i, source := range sources {
		point := filepath.Join(dir, fmt.Sprint(i))
		check(t, only(t, table, point), procfs.MountInfo{Root: "/", Options: "ro,relatime", FSType: "tmpfs", Source: source, SuperOptions: "ro"})
	}
}

// TestLiveRoots: the root of a bind mount is the directory or file that was
// mounted, also after it was removed, and its options are its own.
func TestLiveRoots(t *testing.T) {
	dir := testenv.MountDir(t)
	device := mountedOn(t, dir)
	for i, name := range testenv.OddNames {
		from, on := testenv.Mkdir(t, dir, "from", name), testenv.Mkdir(t, dir, "on", fmt.Sprint(i))
		testenv.Mount(t, from, on, "", unix.MS_BIND, "")
		testenv.Mount(t, "", on, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOEXEC|unix.MS_NOATIME, "")
	}
	file, onFile := testenv.Touch(t, dir, "a file"), testenv.Touch(t, dir, "another file")
	testenv.Mount(t, file, onFile, "", unix.MS_BIND, "")
	gone, onGone := testenv.Mkdir(t, dir, "gone"), testenv.Mkdir(t, dir, "on gone")
	testenv.Mount(t, gone, onGone, "", unix.MS_BIND, "")
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}

	table := readTable(t, openMountinfo(t))
	want := procfs.MountInfo{FSType: "tmpfs", Source: "tmpfs", SuperOptions: "rw"}
	for i, name := range testenv.OddNames {
		want.Root, want.Options = filepath.Join("/from", name), "ro,noexec,noatime"
		check(t, only(t, table, filepath.Join(dir, "on", fmt.Sprint(i))), want)
	}
	want.Root, want.Options = "/a file", "rw,relatime"
	check(t, only(t, table, onFile), want)
	want.Root = "/gone//deleted"
	got := only(t, table, onGone)
	check(t, got, want)
	if got.Major != device.Major || got.Minor != device.Minor || got.ParentID != device.ID {
		t.Errorf("device %d:%d, parent %d, want those of %+v", got.Major, got.Minor, got.ParentID, device)
	}
}

// TestLiveNamespace: the root of a mounted namespace is its name and number.
func TestLiveNamespace(t *testing.T) {
	dir := testenv.MountDir(t)
	for _, kind := range []string{"net", "uts", "user"} {
		link := "/proc/self/ns/" + kind
		name, err := os.Readlink(link)
		if err != nil {
			t.Fatal(err)
		}
		point := testenv.Touch(t, dir, kind)
		testenv.Mount(t, link, point, "", unix.MS_BIND, "")
		check(t, mountedOn(t, point), procfs.MountInfo{Root: name, FSType: "nsfs", Source: "nsfs", SuperOptions: "rw"})
	}
}

// TestLiveOverlay: a row as long as an overlay of hundreds of layers makes it
// comes whole, and so do the rows around it.
func TestLiveOverlay(t *testing.T) {
	dir := testenv.MountDir(t)
	layers, point := testenv.MountLayers(t, dir), dir+"/overlay"
	testenv.Mount(t, "after", testenv.Mkdir(t, dir, "after"), "tmpfs", 0, "")

	table := readTable(t, openMountinfo(t))
	got := only(t, table, point)
	check(t, got, procfs.MountInfo{Root: "/", Options: "rw,relatime", FSType: "overlay", Source: "many layers"})
	check(t, only(t, table, filepath.Join(dir, "after")), procfs.MountInfo{FSType: "tmpfs", Source: "after"})

	var shown []string
	for _, option := range strings.Split(got.SuperOptions, ",") {
		if dir, ok := strings.CutPrefix(option, "lowerdir+="); ok {
			shown = append(shown, procfs.Unescape(dir))
		} else if dirs, ok := strings.CutPrefix(option, "lowerdir="); ok {
			shown = strings.Split(procfs.Unescape(dirs), ":")
		}
	}
	if !reflect.DeepEqual(shown, layers) {
		t.Errorf("%d layers in %d bytes of options, want %d: %.500q", len(shown), len(got.SuperOptions), len(layers), got.SuperOptions)
	}
	if testenv.KernelAtLeast(6, 8) && len(got.SuperOptions) < 100_000 {
		t.Errorf("%d bytes of options, which is not the long row this is about", len(got.SuperOptions))
	}
}

// TestLiveDeepMountPoint: a mount point may be deeper than a path that the
// kernel would take.
func TestLiveDeepMountPoint(t *testing.T) {
	point := testenv.MountDeep(t, testenv.MountDir(t), "deep", 8_000)
	check(t, mountedOn(t, point), procfs.MountInfo{Root: "/", Options: "rw,relatime", FSType: "tmpfs", Source: "deep", SuperOptions: "rw"})
}

// TestLivePropagation: the optional fields of shared, slave, slave and shared,
// and unbindable mounts are the ones of the manual page.
func TestLivePropagation(t *testing.T) {
	dir := testenv.MountDir(t)
	on := func(name string) string { return filepath.Join(dir, name) }
	testenv.MountPropagations(t, dir)

	table := readTable(t, openMountinfo(t))
	var shared, both int
	if _, err := fmt.Sscanf(strings.Join(only(t, table, on("shared")).Optional, " "), "shared:%d", &shared); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(strings.Join(only(t, table, on("both")).Optional, " "), "shared:%d", &both); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"private":    nil,
		"unbindable": {"unbindable"},
		"shared":     {fmt.Sprintf("shared:%d", shared)},
		"slave":      {fmt.Sprintf("master:%d", shared)},
		"both":       {fmt.Sprintf("shared:%d", both), fmt.Sprintf("master:%d", shared)},
	} {
		if got := only(t, table, on(name)).Optional; !reflect.DeepEqual(got, want) {
			t.Errorf("%s: optional fields %q, want %q", name, got, want)
		}
	}
}

// TestLiveChroot: a process with another root sees the mounts below it only,
// with paths from there; of a slave whose master it does not see it is told
// where the propagation comes from.
func TestLiveChroot(t *testing.T) {
	dir := testenv.MountDir(t)
	jail, outside := testenv.Mkdir(t, dir, "jail"), testenv.Mkdir(t, dir, "outside")
	testenv.Mount(t, "jail", jail, "tmpfs", 0, "")
	for _, name := range []string{"a", "c", "-"} {
		testenv.Mkdir(t, jail, name)
	}
	testenv.Mount(t, "a", jail+"/a", "tmpfs", 0, "")
	testenv.Mount(t, "", jail+"/a", "", unix.MS_SHARED, "")
	testenv.Mount(t, jail+"/a", outside, "", unix.MS_BIND, "")
	testenv.Mount(t, "", outside, "", unix.MS_SLAVE, "")
	testenv.Mount(t, "", outside, "", unix.MS_SHARED, "")
	testenv.Mount(t, outside, jail+"/c", "", unix.MS_BIND, "")
	testenv.Mount(t, "", jail+"/c", "", unix.MS_SLAVE, "")
	testenv.Mount(t, "", jail+"/-", "tmpfs", 0, "")

	fd := openInChroot(t, jail)
	defer unix.Close(fd)
	table := readTable(t, fd)
	var points []string
	for _, m := range table {
		points = append(points, m.MountPoint)
	}
	if want := []string{"/", "/a", "/c", "/-"}; !reflect.DeepEqual(points, want) {
		t.Fatalf("mount points %q, want %q", points, want)
	}
	var a, master, from int
	if _, err := fmt.Sscanf(strings.Join(table[1].Optional, " "), "shared:%d", &a); err != nil {
		t.Error(err)
	}
	if _, err := fmt.Sscanf(strings.Join(table[2].Optional, " "), "master:%d propagate_from:%d", &master, &from); err != nil {
		t.Error(err)
	}
	if master == a || from != a || len(table[2].Optional) != 2 {
		t.Errorf("optional fields %q of a, %q of c", table[1].Optional, table[2].Optional)
	}
	if table[3].Source != "" || table[3].FSType != "tmpfs" {
		t.Errorf("%+v, want the tmpfs with an empty source", table[3])
	}
}

// openInChroot opens mountinfo as a thread with the root directory root.
func openInChroot(tb testing.TB, root string) int {
	tb.Helper()
	dir, err := os.Open(root)
	if err != nil {
		tb.Fatal(err)
	}
	defer dir.Close()
	ns, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		tb.Fatal(err)
	}
	defer ns.Close()
	var fd int
	err = mntns.Do(int(ns.Fd()), func(proc int) (err error) {
		if err = unix.Fchdir(int(dir.Fd())); err != nil {
			return err
		}
		if err = unix.Chroot("."); err != nil {
			return err
		}
		fd, err = unix.Openat(proc, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return fd
}

// TestLiveSubtype: the type of a FUSE mount has the subtype in it. Nobody
// answers the mount's requests, so nothing may look into it.
func TestLiveSubtype(t *testing.T) {
	point := testenv.MountSubtype(t, testenv.MountDir(t), "user@host:/dir #1", "with space#")
	checkFields(t, mountedOn(t, point), procfs.MountInfo{Root: "/", Options: "rw,nosuid,nodev,relatime", FSType: "fuse.with space#", Source: "user@host:/dir #1", SuperOptions: "rw"})
}

// TestLiveIDMapped: an idmapped mount says so in its options.
func TestLiveIDMapped(t *testing.T) {
	point := testenv.MountIDMapped(t, testenv.MountDir(t), 0)
	check(t, mountedOn(t, point), procfs.MountInfo{Root: "/", Options: "rw,relatime,idmapped", FSType: "tmpfs", Source: "tmpfs", SuperOptions: "rw"})
}

// TestLiveTable: each row of the table that the tests run in is decoded, and is
// made again from its fields.
func TestLiveTable(t *testing.T) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	table := readTable(t, openMountinfo(t))
	if rows := bytes.Count(text, []byte{'\n'}); len(table) != rows || rows == 0 {
		t.Errorf("%d rows of %d", len(table), rows)
	}
}
