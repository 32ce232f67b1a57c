package kernstream

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/statmount"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestUniqueIDsTorn: a text that is not of the moment of the list is not put
// beside it, although it has as many rows, and the same ones first and last. Nor
// is a text of which that is not so, whatever is said of it.
func TestUniqueIDsTorn(t *testing.T) {
	testenv.NeedKernel(t, 6, 8, "listmount")
	testenv.NeedMounts(t)
	dir := t.TempDir()
	mount := func(name string) {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(name, filepath.Join(dir, name), "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	umount := func(name string) {
		if err := unix.Unmount(filepath.Join(dir, name), 0); err != nil {
			t.Fatal(err)
		}
	}
	mount("")
	defer unix.Unmount(dir, unix.MNT_DETACH)
	for _, name := range []string{"a", "b", "c", "d"} {
		mount(name)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	u := uniqueIDs{sure: true}
	check := func(what string, text []byte, torn bool) {
		t.Helper()
		text, ids := u.ofText(bytes.Clone(text), torn, nil)
		var reader statmount.Reader
		i, unknown := 0, 0
		for short := range procfs.MountIDs(text) {
			if i == len(ids) {
				t.Fatalf("%s: %d IDs", what, len(ids))
			}
			var m statmount.Mount
			if ids[i] == 0 {
				unknown++
			} else if err := reader.Stat(ids[i], statmount.MountBasic, &m); err != nil || m.MountInfoID != short {
				t.Errorf("%s: row %d, short ID %d, has the ID %#x, of short ID %d; %v", what, i, short, ids[i], m.MountInfoID, err)
			}
			i++
		}
		if unknown > 2 { // those that are gone
			t.Errorf("%s: %d mounts are unknown", what, unknown)
		}
	}
	u.look(8)
	check("whole", text, false)
	rows := bytes.SplitAfter(text, []byte{'\n'})
	rows = rows[:len(rows)-1]
	rest := bytes.Join(slices.Delete(slices.Clone(rows), 1, 2), nil)
	check("fewer rows, the ends the same", rest, false)
	rows[0], rows[1] = rows[1], rows[0]
	rest = bytes.Join(rows, nil)
	check("another first", rest, false)
	slices.Reverse(rows)
	rows[0], rows[len(rows)-1] = rows[len(rows)-1], rows[0]
	rest = bytes.Join(rows, nil)
	check("another last", rest, false)

	umount("b")
	umount("d")
	mount("x") // has b's short ID
	mount("d")
	u.look(8)
	check("torn", text, true)
	umount("x")
	umount("a")
	mount("y")
	u.look(8)
	check("torn again", text, true)
}

// TestUniqueIDsTornThenGone: of a text that is torn no row is left out whose mount
// was there at both looks, although it is gone by the time when the IDs are asked
// for. What is left would be a table that never was.
func TestUniqueIDsTornThenGone(t *testing.T) {
	testenv.NeedKernel(t, 6, 8, "listmount")
	testenv.NeedMounts(t)
	dir := t.TempDir()
	if err := unix.Mount("lab", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	u := uniqueIDs{sure: true}
	var table procfs.MountTable
	u.look(8)
	_, ids := u.ofText(bytes.Clone(text), false, nil)
	table.Commit(table.Compare(text, ids))

	u.look(8)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	rest, ids := u.ofText(bytes.Clone(text), true, table.Rows())
	if diff := table.Compare(rest, ids); !diff.Empty() {
		t.Errorf("the text lost %d rows; want none", len(diff.Gone))
	}
	u.look(8)
	rest, ids = u.ofText(bytes.Clone(text), true, table.Rows())
	if diff := table.Compare(rest, ids); len(diff.Gone) != 1 || len(diff.New)+len(diff.Changed) != 0 {
		t.Errorf("at the next look %d rows are gone, %d new and %d changed; want one to be gone", len(diff.Gone), len(diff.New), len(diff.Changed))
	}
}
