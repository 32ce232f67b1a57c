package kernstream_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// uniqueID returns the unique ID of what is uppermost on a path, as statx(2)
// says it.
func uniqueID(path string) (uint64, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID_UNIQUE, &st)
	if err == nil && st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		err = errors.ErrUnsupported
	}
	return st.Mnt_id, err
}

// checkUnique fails the test unless the mounts have the IDs that their mount
// points below root have, and the parents' IDs are those of mounts with their
// short IDs. It returns the mounts by mount point.
func checkUnique(t *testing.T, mounts []kernstream.Mount, root string) map[string]kernstream.Mount {
	t.Helper()
	short, unique := map[uint32]uint64{}, map[uint64]string{}
	points := map[string]kernstream.Mount{}
	for _, m := range mounts {
		if other, ok := unique[m.ID]; m.ID == 0 || ok {
			t.Errorf("the mount on %q has the ID %#x; so has that on %q", m.MountPoint, m.ID, other)
		}
		short[m.MountInfoID], unique[m.ID], points[m.MountPoint] = m.ID, m.MountPoint, m
	}
	checked := 0
	for _, m := range mounts {
		if parent, ok := short[m.MountInfoParentID]; m.ParentID == 0 || ok && m.ParentID != parent {
			t.Errorf("the mount on %q has the parent %#x, want %#x", m.MountPoint, m.ParentID, parent)
		}
		id, err := uniqueID(filepath.Join(root, m.MountPoint))
		covered := strings.HasPrefix(m.MountPoint+"/", unique[id]+"/") || unique[id] == "/"
		switch {
		case err == nil && unique[id] == m.MountPoint:
			checked++
		case errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist), err == nil && unique[id] != "" && covered:
			// It cannot be looked at.
		default:
			t.Errorf("the mount on %q has the ID %#x, statx says %#x, %v", m.MountPoint, m.ID, id, err)
		}
	}
	if checked < 3 {
		t.Errorf("%d mounts of %d were looked at", checked, len(mounts))
	}
	return points
}

// wantUnique fails the test unless the mount on point has the ID that path has,
// and its parent's is that of another path.
func wantUnique(t *testing.T, points map[string]kernstream.Mount, point, path, parent string) {
	t.Helper()
	id, err := uniqueID(path)
	if err != nil {
		t.Fatal(err)
	}
	parentID, err := uniqueID(parent)
	if err != nil {
		t.Fatal(err)
	}
	if m := points[point]; m.ID != id || m.ParentID != parentID {
		t.Errorf("the mount on %q has the IDs %#x, %#x, statx says %#x, %#x", point, m.ID, m.ParentID, id, parentID)
	}
}

// uniqueMounts mounts a tree below dir, made so that neither order nor short
// IDs tell the unique ones.
func uniqueMounts(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"a", "b", "c", "a", "d"} {
		point := filepath.Join(dir, name)
		if err := os.Mkdir(point, 0o755); errors.Is(err, fs.ErrExist) {
			umount(t, point, 0) // its short ID is free
		}
		mount(t, name, point, "tmpfs", 0, "")
	}
	for _, name := range []string{"d/on d", "d/moved"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(t, "on d", dir+"/d/on d", "tmpfs", 0, "")
	mount(t, dir+"/b", dir+"/d/moved", "", unix.MS_MOVE, "")
}

// TestMountsUnique: each mount has the unique ID that statx gives for its mount
// point, and that of its parent; that of /, too. Before Linux 6.8 no ID is known.
func TestMountsUnique(t *testing.T) {
	dir := labDir(t)
	uniqueMounts(t, dir)
	mounts, err := kernstream.Mounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	if !testenv.KernelAtLeast(6, 8) {
		for _, m := range mounts {
			if m.ID != 0 || m.ParentID != 0 {
				t.Errorf("an ID of %+v", m)
			}
		}
		return
	}
	points := checkUnique(t, mounts, "/")
	for point, parent := range map[string]string{"/a": "", "/c": "", "/d": "", "/d/on d": "/d", "/d/moved": "/d"} {
		wantUnique(t, points, dir+point, dir+point, dir+parent)
	}
}

// TestMountsUniqueFilter: mounts have their IDs when they are shown to the
// filter, and keep them when others are left out, their parents, too.
func TestMountsUniqueFilter(t *testing.T) {
	testenv.NeedKernel(t, 6, 8, "listmount")
	dir := labDir(t)
	uniqueMounts(t, dir)
	mounts, err := kernstream.Mounts(&kernstream.MountOptions{Filter: func(m *kernstream.Mount) bool {
		if m.ID == 0 || m.ParentID == 0 {
			t.Errorf("the filter is shown %+v", m)
		}
		return m.MountPoint == dir+"/d/on d"
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != 1 {
		t.Fatalf("%d mounts", len(mounts))
	}
	wantUnique(t, map[string]kernstream.Mount{"": mounts[0]}, "", dir+"/d/on d", dir+"/d")
}

// TestMountUniqueReplaced: a mount that was unmounted and mounted again with the
// same arguments is another one, although nothing in its row of mountinfo is
// different. What is mounted on it has another parent.
func TestMountUniqueReplaced(t *testing.T) {
	testenv.NeedKernel(t, 6, 8, "listmount")
	l := newLab(t, &kernstream.MountOptions{Via: kernstream.ViaMountinfo})
	point := l.tmpfs("same")
	on := filepath.Join(point, "on")
	l.do(func() {})
	// Whether the watcher reads in between, and whether the kernel gives the
	// same numbers again, is a matter of luck.
	hits := 0
	for i, begin := 0, time.Now(); hits < 3; i++ {
		if time.Since(begin) > patience {
			t.Fatalf("of %d mounts, %d were replaced unseen by one with the same row", i, hits)
		}
		old, err := uniqueID(point)
		if err != nil {
			t.Fatal(err)
		}
		umount(t, point, 0)
		mount(t, "same", point, "tmpfs", 0, "")
		now, err := uniqueID(point)
		if err != nil {
			t.Fatal(err)
		}
		e := l.receive()
		l.apply(e)
		if len(e.Mounted) == 0 { // it did
			e = l.receive()
			l.apply(e)
			l.want(e, "", "", "", "same")
			continue
		}
		l.want(e, "same", "", "", "same")
		if t.Failed() {
			return
		}
		was, is := e.Unmounted[0], e.Mounted[0]
		if was.ID != old || is.ID != now || old == now || was.ParentID != is.ParentID {
			t.Fatalf("IDs %#x, then %#x, statx said %#x, %#x", was.ID, is.ID, old, now)
		}
		if was.ID = is.ID; sameMount(&was, &is) {
			hits++
		}
	}
	if err := os.Mkdir(on, 0o755); err != nil {
		t.Fatal(err)
	}
	e := l.do(func() { mount(t, "on", on, "tmpfs", 0, "") })
	l.want(e, "", "", "", "same/on")
	wantUnique(t, map[string]kernstream.Mount{"": e.Mounted[0]}, "", on, point)
	l.checkTable(nil)
}

// TestMountUniqueChroot: in the table of a process with another root, whose rows
// are not those that listmount lists here, the mounts have their IDs.
func TestMountUniqueChroot(t *testing.T) {
	testenv.NeedKernel(t, 6, 8, "listmount")
	dir := labDir(t)
	jail := filepath.Join(dir, "jail")
	if err := os.Mkdir(jail, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(t, "jail", jail, "tmpfs", 0, "")
	uniqueMounts(t, jail)
	a := newAgent(t, 0)
	a.do("chroot", jail)
	options := &kernstream.MountOptions{PID: a.PID}
	mounts, err := kernstream.Mounts(options)
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != 6 {
		t.Errorf("%d mounts", len(mounts))
	}
	points := checkUnique(t, mounts, jail)
	for point, parent := range map[string]string{"/": "/..", "/a": "", "/d/on d": "/d", "/d/moved": "/d"} {
		wantUnique(t, points, point, jail+point, jail+parent)
	}

	options.Via = kernstream.ViaMountinfo
	l := &lab{t: t, dir: dir}
	l.watch(t.Context(), options)
	l.checkTable(options)
	umount(t, jail+"/c", 0)
	e := l.receive()
	l.want(e, "c", "", "", "")
	if e.Unmounted[0].ID != points["/c"].ID {
		t.Errorf("%+v was unmounted, want %+v", e.Unmounted[0], points["/c"])
	}
	l.apply(e)
	mount(t, "c", jail+"/c", "tmpfs", 0, "")
	e = l.receive()
	l.want(e, "", "", "", "c")
	wantUnique(t, map[string]kernstream.Mount{"": e.Mounted[0]}, "", jail+"/c", jail)
	l.apply(e)

	// The parent of its root is not in its table.
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(t, "other", other, "tmpfs", 0, "")
	if err := os.Mkdir(other+"/jail", 0o755); err != nil {
		t.Fatal(err)
	}
	mount(t, jail, other+"/jail", "", unix.MS_MOVE, "")
	e = l.receive()
	if len(e.Moved) != 1 {
		t.Fatalf("%v; want one mount that moved", e)
	}
	wantUnique(t, map[string]kernstream.Mount{"/": e.Moved[0].New}, "/", other+"/jail", other)
}

// TestMountUniqueNamespace: in the table of another namespace, the mounts have
// the IDs that they have there, which are those that a process there is told.
func TestMountUniqueNamespace(t *testing.T) {
	testenv.NeedKernel(t, 6, 11, "IDs of mount namespaces")
	dir := labDir(t)
	uniqueMounts(t, dir)
	a := newAgent(t, unix.CLONE_NEWNS)
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	text := a.do("mounts")
	for name, options := range map[string]*kernstream.MountOptions{"process": {PID: a.PID}, "namespace": {Namespace: ns}} {
		t.Run(name, func(t *testing.T) {
			mounts, err := kernstream.Mounts(options)
			if err != nil {
				t.Fatal(err)
			}
			if got := marshalMounts(mounts); got != text {
				t.Errorf("got  %s\nwant %s", got, text)
			}
			root := fmt.Sprintf("/proc/%d/root", a.PID)
			points := checkUnique(t, mounts, root)
			for point, parent := range map[string]string{"/a": "", "/d/on d": "/d", "/d/moved": "/d"} {
				wantUnique(t, points, dir+point, root+dir+point, root+dir+parent)
			}
			if id, err := uniqueID(dir + "/a"); err != nil || id == points[dir+"/a"].ID {
				t.Errorf("the ID %#x is the one of this namespace; %v", id, err)
			}
		})
	}
}

// TestMountUniqueStorm: while others are mounted and unmounted without a pause,
// those that stay have their IDs, and nobody has another's.
func TestMountUniqueStorm(t *testing.T) {
	testenv.NeedKernel(t, 6, 8, "listmount")
	dir := labDir(t)
	uniqueMounts(t, dir)
	point := filepath.Join(dir, "storm")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	calm := storm(point)
	defer calm()
	var want []uint64
	for range testenv.SoakN(200) {
		mounts, err := kernstream.Mounts(nil)
		if err != nil {
			t.Fatal(err)
		}
		mounts = slices.DeleteFunc(mounts, func(m kernstream.Mount) bool { return m.MountPoint == point })
		var got []uint64
		for _, m := range mounts {
			got = append(got, m.ID, m.ParentID)
		}
		if want == nil {
			checkUnique(t, mounts, "/")
			want = got
		}
		if !slices.Equal(got, want) {
			t.Fatalf("IDs %#x, were %#x", got, want)
		}
	}
}
