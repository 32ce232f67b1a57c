package kernstream

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// TestFanotifyShortIDReused: a rescan may find a mount ahead of its event, and
// its short ID may have been that of another one, of whose end no event has been
// read either. The delta in which the one appears is the one in which the other
// goes, whether the filter lets the consumer see it or not.
func TestFanotifyShortIDReused(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NeedKernel(t, 6, 16, "fanotify marks of mount namespaces, for the root of a user namespace, too")
	dir := t.TempDir()
	if err := unix.Mount("lab", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	mount := func(name string) Mount {
		point := filepath.Join(dir, name)
		if err := os.Mkdir(point, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(name, point, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		mounts, err := Mounts(&MountOptions{Filter: func(m *Mount) bool { return m.MountPoint == point }})
		if err != nil || len(mounts) != 1 {
			t.Fatalf("mounts %+v, error %v", mounts, err)
		}
		return mounts[0]
	}
	old := mount("old")
	for _, hidden := range []bool{false, true} {
		target, err := newMountTarget(&MountOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s, err := newFanotifySource(t.Context(), target, func(m *Mount) bool { return !hidden || m.ID != old.ID })
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(old.MountPoint, 0); err != nil {
			t.Fatal(err)
		}
		heir := Mount{}
		for i := 0; heir.MountInfoID != old.MountInfoID; i++ { // the ID is free a little later
			heir = mount(filepath.Base(old.MountPoint) + strconv.Itoa(i))
		}
		var d mountDelta
		s.touch(heir.ID, 0)
		if err := s.settle(t.Context(), &d); err != nil {
			t.Fatal(err)
		}
		e := d.event()
		if len(e.Mounted) != 1 || e.Mounted[0].ID != heir.ID {
			t.Errorf("mounted %+v; want the heir of the ID", e.Mounted)
		}
		switch {
		case hidden && len(e.Unmounted) != 0:
			t.Errorf("unmounted %+v; the consumer never saw it", e.Unmounted)
		case !hidden && (len(e.Unmounted) != 1 || e.Unmounted[0].ID != old.ID):
			t.Errorf("unmounted %+v; want the one that had the ID", e.Unmounted)
		}
		// The events that are read later change nothing of that.
		var later mountDelta
		if err := s.drain(); err != nil {
			t.Fatal(err)
		}
		if err := s.settle(t.Context(), &later); err != nil {
			t.Fatal(err)
		}
		if later.changes[old.ID] != (mountPair{}) || later.changes[heir.ID] != (mountPair{}) {
			t.Errorf("the events that follow tell %+v", later.event())
		}
		if n := s.tree.short[heir.MountInfoID]; n == nil || n.id != heir.ID {
			t.Errorf("the short ID leads to %+v", n)
		}
		s.close()
		old = heir
	}
}
