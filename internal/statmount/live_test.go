package statmount_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/statmount"
	"github.com/kernstream/kernstream/internal/testenv"
)

// mountDir is testenv.MountDir for a kernel with the system calls.
func mountDir(tb testing.TB) string {
	tb.Helper()
	testenv.NeedKernel(tb, 6, 8, "listmount, statmount")
	testenv.NeedMounts(tb)
	return testenv.MountDir(tb)
}

// table decodes the mountinfo file of a directory in /proc.
func table(proc int) (rows []procfs.MountInfo, err error) {
	fd, err := unix.Openat(proc, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var parser procfs.MountInfoParser
	err = procfs.ReadRows(fd, nil, func(line []byte) error {
		row, err := parser.Parse(string(line))
		rows = append(rows, row)
		return err
	})
	return rows, err
}

// rendered is the row of mountinfo that m stands for.
func rendered(m *statmount.Mount) procfs.MountInfo {
	return procfs.MountInfo{
		ID: m.MountInfoID, ParentID: m.MountInfoParentID,
		Major: m.Major, Minor: m.Minor,
		Root: string(m.Root), MountPoint: string(m.Point),
		Options: string(m.AppendOptions(nil)), Optional: m.Optional(),
		FSType: string(m.AppendType(nil)), Source: string(m.Source),
		SuperOptions: string(m.AppendSuperOptions(nil)),
	}
}

// compare returns how what statmount says of all mounts differs from the rows of
// mountinfo, and what it should find besides: the mounts are listed in the same
// order, and each parent's unique ID is the parent's.
func compare(r *statmount.Reader, rows []procfs.MountInfo) error {
	ids, err := r.List(nil)
	if err != nil {
		return err
	}
	if len(ids) != len(rows) {
		return fmt.Errorf("%d mounts are listed, mountinfo has %d", len(ids), len(rows))
	}
	unique := make(map[uint32]uint64)
	for i, row := range rows {
		unique[row.ID] = ids[i]
	}
	for i, want := range rows {
		var m statmount.Mount
		if err := r.Stat(ids[i], statmount.Row, &m); err != nil {
			return fmt.Errorf("mount %#x: %w", ids[i], err)
		}
		got := rendered(&m)
		if !testenv.KernelAtLeast(6, 13) { // no subtype, no source
			got.Source = want.Source
			if strings.HasPrefix(want.FSType, got.FSType+".") {
				got.FSType = want.FSType
			}
		}
		if !testenv.KernelAtLeast(6, 11) { // no options of the file system
			got.SuperOptions = want.SuperOptions
		}
		if !reflect.DeepEqual(got, want) {
			return fmt.Errorf("got  %.3000q\nwant %.3000q", fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want))
		}
		if parent := unique[want.ParentID]; m.ID != ids[i] || parent != 0 && m.ParentID != parent {
			return fmt.Errorf("of %.300q: ID %#x, parent %#x, want %#x, %#x", want.MountPoint, m.ID, m.ParentID, ids[i], parent)
		}
		if want := m.Mask & (statmount.SuperBasic | statmount.MountBasic | statmount.FSType); want != statmount.SuperBasic|statmount.MountBasic|statmount.FSType {
			return fmt.Errorf("mask %#x", m.Mask)
		}
	}
	return nil
}

// parity compares what statmount says of all mounts with mountinfo, and returns
// the rows by mount point.
func parity(tb testing.TB) map[string]procfs.MountInfo {
	tb.Helper()
	proc, err := unix.Open("/proc/self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(proc)
	rows, err := table(proc)
	if err != nil {
		tb.Fatal(err)
	}
	if err := compare(&statmount.Reader{}, rows); err != nil {
		tb.Error(err)
	}
	points := make(map[string]procfs.MountInfo)
	for _, row := range rows {
		points[row.MountPoint] = row
	}
	return points
}

// statPoint returns what statmount says of what is mounted on point.
func statPoint(tb testing.TB, r *statmount.Reader, point string) (m statmount.Mount) {
	tb.Helper()
	ids, err := r.List(nil)
	if err != nil {
		tb.Fatal(err)
	}
	for _, id := range slices.Backward(ids) { // what is on top is last
		if err := r.Stat(id, statmount.Row|statmount.SupportedMask, &m); err != nil {
			tb.Fatal(err)
		}
		if string(m.Point) == point {
			return m
		}
	}
	tb.Fatalf("nothing is mounted on %q", point)
	return m
}

// TestLiveNames: mount points, and roots of bind mounts, with odd names.
func TestLiveNames(t *testing.T) {
	dir := mountDir(t)
	for i, name := range testenv.OddNames {
		testenv.Mount(t, "t", testenv.Mkdir(t, dir, "on", name), "tmpfs", 0, "")
		testenv.Mount(t, testenv.Mkdir(t, dir, "from", name), testenv.Mkdir(t, dir, fmt.Sprint(i)), "", unix.MS_BIND, "")
	}
	rows := parity(t)
	for i, name := range testenv.OddNames {
		if _, ok := rows[filepath.Join(dir, "on", name)]; !ok {
			t.Errorf("%q is not mounted", name)
		}
		if got := rows[filepath.Join(dir, fmt.Sprint(i))].Root; got != filepath.Join("/from", name) {
			t.Errorf("%q is mounted from %q", name, got)
		}
	}
}

// TestLiveSources: sources with odd names, none at all, and one of the greatest
// length.
func TestLiveSources(t *testing.T) {
	dir := mountDir(t)
	for i, source := range append([]string{"", "none", strings.Repeat("long ", 800)}, testenv.OddNames...) {
		testenv.Mount(t, source, testenv.Mkdir(t, dir, fmt.Sprint(i)), "tmpfs", 0, "")
	}
	testenv.MountNew(t, "tmpfs", unix.AT_FDCWD, testenv.Mkdir(t, dir, "unsaid"), func(int) error { return nil })
	if got := parity(t)[dir+"/unsaid"].Source; got != "none" {
		t.Errorf("the source that was not said is %q", got)
	}
}

// TestLiveOptions: every option that a mount can have.
func TestLiveOptions(t *testing.T) {
	dir := mountDir(t)
	for options, flags := range map[string]uintptr{
		"rw,relatime":             0,
		"ro,relatime":             unix.MS_RDONLY,
		"rw,nosuid,relatime":      unix.MS_NOSUID,
		"rw,nodev,relatime":       unix.MS_NODEV,
		"rw,noexec,relatime":      unix.MS_NOEXEC,
		"rw,noatime":              unix.MS_NOATIME,
		"rw,nodiratime,relatime":  unix.MS_NODIRATIME,
		"rw,noatime,nodiratime":   unix.MS_NOATIME | unix.MS_NODIRATIME,
		"rw":                      unix.MS_STRICTATIME,
		"rw,nodiratime":           unix.MS_STRICTATIME | unix.MS_NODIRATIME,
		"rw,relatime,nosymfollow": unix.MS_NOSYMFOLLOW,
		"ro,nosuid,nodev,noexec,noatime,nodiratime,nosymfollow": unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC |
			unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_NOSYMFOLLOW,
	} {
		testenv.Mount(t, "t", testenv.Mkdir(t, dir, options), "tmpfs", flags, "")
		bind := testenv.Mkdir(t, dir, "bind "+options)
		testenv.Mount(t, dir, bind, "", unix.MS_BIND, "")
		testenv.Mount(t, "", bind, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
	}
	rows := parity(t)
	bound := 0
	for point, row := range rows {
		options, ok := strings.CutPrefix(point, dir+"/")
		if !ok {
			continue
		}
		options, bind := strings.CutPrefix(options, "bind ")
		if bind {
			bound++
		}
		if row.Options != options {
			t.Errorf("%q: options %q", point, row.Options)
		}
	}
	if bound != 12 {
		t.Errorf("%d bind mounts", bound)
	}
}

// TestLiveSuperOptions: the flags of a file system, and options of its own with
// escapes in them.
func TestLiveSuperOptions(t *testing.T) {
	dir := mountDir(t)
	for name, flags := range map[string]uintptr{
		"rw": 0, "ro": unix.MS_RDONLY, "rw,sync": unix.MS_SYNCHRONOUS, "rw,dirsync": unix.MS_DIRSYNC, "rw,lazytime": unix.MS_LAZYTIME,
		"ro,sync,dirsync,lazytime": unix.MS_RDONLY | unix.MS_SYNCHRONOUS | unix.MS_DIRSYNC | unix.MS_LAZYTIME,
	} {
		testenv.Mount(t, "t", testenv.Mkdir(t, dir, "tmpfs "+name), "tmpfs", flags, "size=64k,mode=700")
		// It has no options of its own.
		testenv.Mount(t, "r", testenv.Mkdir(t, dir, "ramfs "+name), "ramfs", flags, "")
	}
	lower := testenv.Mkdir(t, dir, `lower \ "=	#`)
	testenv.MountNew(t, "overlay", unix.AT_FDCWD, testenv.Mkdir(t, dir, "escapes"), func(fd int) error {
		if !testenv.KernelAtLeast(6, 8) {
			return unix.FsconfigSetString(fd, "lowerdir", dir)
		}
		if err := unix.FsconfigSetString(fd, "lowerdir+", lower); err != nil {
			return err
		}
		return unix.FsconfigSetString(fd, "lowerdir+", testenv.Mkdir(t, dir, "second, lower"))
	})
	rows := parity(t)
	for point, row := range rows {
		name, ok := strings.CutPrefix(point, dir+"/")
		if fsType, flags, isMount := strings.Cut(name, " "); ok && isMount {
			if want, _, _ := strings.Cut(row.SuperOptions, ",size="); fsType == "tmpfs" && want != flags || fsType == "ramfs" && row.SuperOptions != flags {
				t.Errorf("%s: options %q", name, row.SuperOptions)
			}
		}
	}
	if got := rows[dir+"/escapes"].SuperOptions; !strings.Contains(got, `lower\040\134\040"`) || !strings.Contains(got, `second\054\040lower`) {
		t.Errorf("options without escapes: %q", got)
	}
}

// TestLiveIDMapped: an idmapped mount says so in its options.
func TestLiveIDMapped(t *testing.T) {
	point := testenv.MountIDMapped(t, mountDir(t), unix.MOUNT_ATTR_NOSYMFOLLOW)
	if got := parity(t)[point].Options; got != "rw,relatime,nosymfollow,idmapped" {
		t.Errorf("options %q", got)
	}
}

// TestLivePropagation: the optional fields of every kind of propagation.
func TestLivePropagation(t *testing.T) {
	dir := mountDir(t)
	testenv.MountPropagations(t, dir)
	rows := parity(t)
	tags := func(name string) (tags string) {
		for _, field := range rows[dir+"/"+name].Optional {
			tag, _, _ := strings.Cut(field, ":")
			tags += tag + " "
		}
		return tags
	}
	for name, want := range map[string]string{
		"shared": "shared ", "peer": "shared ", "slave": "master ", "both": "shared master ", "private": "", "unbindable": "unbindable ",
	} {
		if got := tags(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestLiveChroot: a process with another root sees the mounts below it, with
// paths from there; of a slave whose master it does not see, it is told where
// the propagation comes from. A mount that it does not see has no mount point,
// or is refused to an ordinary user.
func TestLiveChroot(t *testing.T) {
	dir := mountDir(t)
	jail := testenv.Mkdir(t, dir, "jail")
	testenv.Mount(t, "jail", jail, "tmpfs", 0, "")
	testenv.MountPropagations(t, jail)
	outside := testenv.Mkdir(t, dir, "outside")
	testenv.Mount(t, jail+"/both", outside, "", unix.MS_BIND, "")
	testenv.Mount(t, "", outside, "", unix.MS_SLAVE, "")
	testenv.Mount(t, "", outside, "", unix.MS_SHARED, "")
	testenv.Mount(t, outside, testenv.Mkdir(t, jail, "twice"), "", unix.MS_BIND, "")
	testenv.Mount(t, "", jail+"/twice", "", unix.MS_SLAVE, "")
	unseen := statPoint(t, &statmount.Reader{}, outside).ID

	root, err := os.Open(jail)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	ns, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = mntns.Do(int(ns.Fd()), func(proc int) error {
		if err := unix.Fchdir(int(root.Fd())); err != nil {
			return err
		}
		if err := unix.Chroot("."); err != nil {
			return err
		}
		rows, err := table(proc)
		if err != nil {
			return err
		}
		if err := compare(&statmount.Reader{}, rows); err != nil {
			return err
		}
		last := rows[len(rows)-1]
		if last.MountPoint != "/twice" || len(last.Optional) != 2 || !strings.HasPrefix(last.Optional[1], "propagate_from:") || len(rows) != 8 {
			return fmt.Errorf("%d rows, the last is %+v", len(rows), last)
		}
		var m statmount.Mount
		var r statmount.Reader
		// Linux 6.12 sets the bit of the mount point, and gives an empty one.
		if err := r.Stat(unseen, statmount.Row, &m); err == nil && len(m.Point) > 0 || err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("the mount outside: %+v, %v", m, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestLiveRoots: mounts of a file, of a subdirectory, of what was deleted since,
// of a namespace, and of one mount on top of another like it.
func TestLiveRoots(t *testing.T) {
	dir := mountDir(t)
	testenv.Mount(t, testenv.Touch(t, dir, "a file"), testenv.Touch(t, dir, "file"), "", unix.MS_BIND, "")
	testenv.Mount(t, testenv.Mkdir(t, dir, "some/where"), testenv.Mkdir(t, dir, "directory"), "", unix.MS_BIND, "")
	testenv.Mount(t, testenv.Mkdir(t, dir, "gone"), testenv.Mkdir(t, dir, "deleted"), "", unix.MS_BIND, "")
	if err := os.Remove(dir + "/gone"); err != nil {
		t.Fatal(err)
	}
	testenv.Mount(t, "/proc/self/ns/net", testenv.Touch(t, dir, "net"), "", unix.MS_BIND, "")
	for range 2 {
		testenv.Mount(t, "same", testenv.Mkdir(t, dir, "twice"), "tmpfs", 0, "")
	}
	rows := parity(t)
	name, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for point, want := range map[string]string{"file": "/a file", "directory": "/some/where", "deleted": "/gone//deleted", "net": name, "twice": "/"} {
		if got := rows[filepath.Join(dir, point)].Root; got != want {
			t.Errorf("%s: root %q, want %q", point, got, want)
		}
	}
}

// TestLiveOverlay: a reply that is longer than the first buffer comes whole, and
// so does a short one with the buffer that has grown.
func TestLiveOverlay(t *testing.T) {
	testenv.NeedKernel(t, 6, 11, "statmount: options")
	dir := mountDir(t)
	testenv.MountLayers(t, dir)
	testenv.Mount(t, "after", testenv.Mkdir(t, dir, "after"), "tmpfs", 0, "")
	if n := len(parity(t)[dir+"/overlay"].SuperOptions); n < 100_000 {
		t.Errorf("%d bytes of options, which is not the long reply this is about", n)
	}
}

// TestLiveDeepMountPoint: a mount point may be deeper than a path that the
// kernel would take.
func TestLiveDeepMountPoint(t *testing.T) {
	point := testenv.MountDeep(t, mountDir(t), "deep", 12_000)
	if _, ok := parity(t)[point]; !ok {
		t.Error("it is not mounted")
	}
}

// TestLiveSubtype: a subtype belongs to the type. Nobody answers the mount's
// requests, so nothing may look into it.
func TestLiveSubtype(t *testing.T) {
	point := testenv.MountSubtype(t, mountDir(t), "user@host:/dir #1", "with space#")
	if got := parity(t)[point].FSType; got != "fuse.with space#" {
		t.Errorf("type %q", got)
	}
	testenv.NeedKernel(t, 6, 13, "statmount: subtype, source")
	if m := statPoint(t, &statmount.Reader{}, point); string(m.Type) != "fuse" || string(m.Subtype) != "with space#" {
		t.Errorf("type %q, subtype %q", m.Type, m.Subtype)
	}
}

// TestLiveSupported: the kernel says which fields it has.
func TestLiveSupported(t *testing.T) {
	testenv.NeedKernel(t, 6, 15, "statmount: mask of what is supported")
	if m := statPoint(t, &statmount.Reader{}, mountDir(t)); m.Supported&statmount.Row != statmount.Row {
		t.Errorf("supported are %#x", m.Supported)
	}
}

// TestLiveMask: only what is asked for comes.
func TestLiveMask(t *testing.T) {
	point := mountDir(t)
	var r statmount.Reader
	id := statPoint(t, &r, point).ID
	for _, mask := range []statmount.Mask{statmount.MountBasic, statmount.MountPoint, statmount.SuperBasic | statmount.FSType} {
		var m statmount.Mount
		if err := r.Stat(id, mask, &m); err != nil || m.Mask != mask {
			t.Errorf("asked for %#x: %#x, %v", mask, m.Mask, err)
		}
		if (m.ID == id) != (mask == statmount.MountBasic) || (string(m.Point) == point) != (mask == statmount.MountPoint) {
			t.Errorf("asked for %#x: %+v", mask, m)
		}
	}
}

// TestLiveList: the list is complete whatever memory it is given, and takes that
// if it is enough.
func TestLiveList(t *testing.T) {
	dir := mountDir(t)
	point := testenv.Mkdir(t, dir, "point")
	for range 200 {
		testenv.Mount(t, "t", point, "tmpfs", 0, "")
	}
	if rows := parity(t); rows[point].Source != "t" {
		t.Errorf("%+v", rows[point])
	}
	var r statmount.Reader
	want, err := r.List(nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(want) <= 200 || !slices.IsSorted(want) || len(slices.Compact(slices.Clone(want))) != len(want) {
		t.Errorf("%d mounts: %d", len(want), want)
	}
	for _, room := range []int{0, 1, 64, len(want) - 1, len(want), len(want) + 1, 1000} {
		ids := make([]uint64, room)
		got, err := r.List(ids)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("room for %d: %d mounts, %v; want %d", room, len(got), err, len(want))
		}
		if room > len(want) && unsafe.SliceData(got) != unsafe.SliceData(ids) {
			t.Errorf("room for %d: the list has other memory", room)
		}
	}
}

// TestLiveGone: a mount that is not there any more is ENOENT, and so is one that
// never was; the next one has another ID, also with the same short one.
func TestLiveGone(t *testing.T) {
	dir := mountDir(t)
	point := testenv.Mkdir(t, dir, "point")
	var r statmount.Reader
	testenv.Mount(t, "t", point, "tmpfs", 0, "")
	id := statPoint(t, &r, point).ID
	if err := unix.Unmount(point, 0); err != nil {
		t.Fatal(err)
	}
	testenv.Mount(t, "t", point, "tmpfs", 0, "")
	if next := statPoint(t, &r, point).ID; next <= id {
		t.Errorf("ID %#x after %#x", next, id)
	}
	for _, id := range []uint64{id, 1 << 62} {
		var m statmount.Mount
		err := r.Stat(id, statmount.Row, &m)
		var call *os.SyscallError
		if !errors.Is(err, unix.ENOENT) || !errors.As(err, &call) || call.Syscall != "statmount" {
			t.Errorf("mount %#x: %v", id, err)
		}
	}
}

// namespaceOf returns the ID of the mount namespace of a process.
func namespaceOf(tb testing.TB, pid int) (id uint64) {
	tb.Helper()
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(fd)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.NS_GET_MNTNS_ID, uintptr(unsafe.Pointer(&id))); errno != 0 {
		tb.Fatal(errno)
	}
	return id
}

// TestLiveNamespace: another namespace is read by its ID, while it is there. Its
// mounts are not found in the own one.
func TestLiveNamespace(t *testing.T) {
	testenv.NeedKernel(t, 6, 11, "statmount: namespaces")
	dir := mountDir(t)
	testenv.Mount(t, "in both", testenv.Mkdir(t, dir, "point"), "tmpfs", 0, "")
	pid, end := testenv.StartIdle(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS})
	testenv.Mount(t, "own", testenv.Mkdir(t, dir, "own"), "tmpfs", 0, "")

	own, other := statmount.Reader{}, statmount.Reader{Namespace: namespaceOf(t, pid)}
	proc, err := unix.Open(fmt.Sprintf("/proc/%d", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(proc)
	rows, err := table(proc)
	if err != nil {
		t.Fatal(err)
	}
	if err := compare(&other, rows); err != nil {
		t.Error(err)
	}
	parity(t)
	ours, theirs := statPoint(t, &own, dir+"/point").ID, statPoint(t, &other, dir+"/point").ID
	var m statmount.Mount
	for _, err := range []error{own.Stat(theirs, statmount.Row, &m), other.Stat(ours, statmount.Row, &m)} {
		if !errors.Is(err, unix.ENOENT) {
			t.Errorf("of the other namespace: %v", err)
		}
	}
	if err := errors.Join(own.Any(), other.Any()); err != nil {
		t.Error(err)
	}

	end()
	for deadline := time.Now().Add(10 * time.Second); other.Any() == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	var call *os.SyscallError
	if err := other.Any(); !errors.Is(err, unix.ENOENT) || !errors.As(err, &call) || call.Syscall != "listmount" {
		t.Errorf("the namespace is gone: %v", err)
	}
	call = nil
	if ids, err := other.List(nil); !errors.Is(err, unix.ENOENT) || !errors.As(err, &call) || call.Syscall != "listmount" || len(ids) != 0 {
		t.Errorf("the namespace is gone: %d, %v", ids, err)
	}
}

// TestLiveAllocations: asking again allocates nothing.
func TestLiveAllocations(t *testing.T) {
	var r statmount.Reader
	m := statPoint(t, &r, mountDir(t))
	id := m.ID
	ids, err := r.List(nil)
	if err != nil {
		t.Fatal(err)
	}
	if allocs := testing.AllocsPerRun(100, func() {
		if err := r.Stat(id, statmount.Row, &m); err != nil {
			t.Fatal(err)
		}
		if ids, err = r.List(ids); err != nil {
			t.Fatal(err)
		}
		if err := r.Any(); err != nil {
			t.Fatal(err)
		}
	}); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
}
