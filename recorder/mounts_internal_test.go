package recorder

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/poller"
)

func newLog(t *testing.T) *mountLog {
	t.Helper()
	testenv.NeedMounts(t)
	testenv.NeedRoot(t, "to be told of mounts")
	proc, err := unix.Open("/proc/thread-self", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(proc)
	// All groups of the user may be taken, by other tests.
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		l, err := newMountLog(proc)
		if err != nil {
			t.Fatal(err)
		}
		if l.group != nil || !testenv.KernelAtLeast(6, 15) || time.Since(begin) > testenv.Patience {
			t.Cleanup(l.close)
			return l
		}
		l.close()
	}
}

// TestMountLogPath notes how mounts that come and go are noticed here.
func TestMountLogPath(t *testing.T) {
	l := newLog(t)
	if testenv.KernelAtLeast(6, 15) != (l.group != nil) {
		t.Errorf("there is a group: %v", l.group != nil)
	}
	path := "by a change without a difference"
	if l.group != nil {
		path = "each"
	}
	testenv.Feature(t, "records: mounts that come and go", path)
}

// TestMountLog: mounts that nobody knows of have come and gone; those that are known have
// not, and neither has what explains itself.
func TestMountLog(t *testing.T) {
	point := t.TempDir()
	comeAndGo := func() {
		testenv.Mount(t, "passes", point, "tmpfs", 0, "")
		testenv.Unmount(t, point)
	}
	t.Run("group", func(t *testing.T) {
		testenv.NeedKernel(t, 6, 15, "FAN_REPORT_MNT")
		l := newLog(t)
		comeAndGo()
		comeAndGo()
		l.look()
		known := map[uint64]bool{}
		for id := range l.names {
			if got, want := fmt.Sprint(l.passed(known, true)), fmt.Sprint(2-len(known), " mounts came and went"); !strings.Contains(got, want) {
				t.Errorf("%d are known: %s; want %s", len(known), got, want)
			}
			known[id] = true
		}
		if got := l.passed(known, false); got != nil || len(known) != 2 {
			t.Errorf("%d are known: %q", len(known), got)
		}
	})
	t.Run("table", func(t *testing.T) {
		l := newLog(t)
		fd, err := unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.close() // of which there may be a group
		l.group, l.table = nil, poller.Own(fd)
		for _, c := range []struct{ changes, differs, want bool }{{false, false, false}, {true, true, false}, {true, false, true}, {false, false, false}} {
			if c.changes {
				comeAndGo()
			}
			l.look()
			if got := l.passed(nil, c.differs); (got != nil) != c.want {
				t.Errorf("%+v: %q", c, got)
			}
		}
	})
}

// TestMountLogLost: if the kernel's queue has no room, or what it tells cannot be read, that is a
// reason.
func TestMountLogLost(t *testing.T) {
	testenv.NeedKernel(t, 6, 15, "FAN_REPORT_MNT")
	l := newLog(t)
	var limit int
	if text, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events"); err != nil {
		t.Fatal(err)
	} else if _, err := fmt.Sscan(string(text), &limit); err != nil {
		t.Fatal(err)
	}
	if limit > 1<<16 {
		testenv.Missing(t, "needs a lower max_queued_events", errors.ErrUnsupported)
	}
	from, point := t.TempDir(), t.TempDir()
	for range limit + 10 {
		testenv.Mount(t, from, point, "", unix.MS_BIND, "")
		testenv.Unmount(t, point)
	}
	l.look()
	if got := fmt.Sprint(l.passed(l.names, false)); !strings.Contains(got, "queue was full") {
		t.Errorf("reasons %s", got)
	}
	l.lost = nil
	if l.lost = l.note([]byte("garbage")); l.lost == nil {
		t.Error("garbage was read")
	}
	if got := l.passed(nil, false); len(got) != 2 {
		t.Errorf("reasons %q", got)
	}
}

// TestMountWatchOdd: what a kernel may tell, and none was seen to: a row that cannot be read, and
// an ID that is another mount's.
func TestMountWatchOdd(t *testing.T) {
	m := &mountWatch{base: "/base", log: &mountLog{}, ids: map[uint64]bool{}}
	never := func(*os.File) error { t.Error("marked"); return nil }
	first := kernstream.Mount{ID: 70, MountInfoID: 7, MountPoint: "/base/a", FSType: "proc"}
	m.table = map[uint32]*placeMount{}
	m.learn(&first)
	odd := kernstream.Mount{ID: 80, MountInfoID: 8, Raw: []byte("8 odd")}
	if got := m.apply(&kernstream.MountEvent{Mounted: []kernstream.Mount{odd}}, never); len(got) != 1 || !strings.Contains(got[0], `a mount came after the start of the recording, and is not recorded: its row of the mount table cannot be read: "8 odd"`) {
		t.Errorf("an odd row: %q", got)
	}
	if files, missing, err := m.first(); err != nil || len(files) != 0 || len(missing) != 1 || !strings.HasPrefix(missing[0], "a mount is not recorded: ") {
		t.Errorf("an odd row at the start: %q", missing)
	}
	other := first
	other.ID = 71
	if m.apply(&kernstream.MountEvent{Unmounted: []kernstream.Mount{other}}, never); m.table[7] == nil {
		t.Error("another mount's end is taken for that of one with the same MountInfoID")
	}
	if m.apply(&kernstream.MountEvent{Unmounted: []kernstream.Mount{first}, Mounted: []kernstream.Mount{other}}, never); m.table[7].ID != 71 || !m.ids[71] {
		t.Errorf("the table has %+v", m.table[7])
	}
}

// TestMountWatchCompare: a table that differs from what is known is told as what came, went and changed.
func TestMountWatchCompare(t *testing.T) {
	m := &mountWatch{ids: map[uint64]bool{}, table: map[uint32]*placeMount{}}
	mounts := []kernstream.Mount{{MountInfoID: 1, ID: 10}, {MountInfoID: 2, ID: 20}, {MountInfoID: 3, ID: 30}, {MountInfoID: 4}}
	for i := range mounts {
		m.learn(&mounts[i])
	}
	if e, differs := m.compare(mounts); differs {
		t.Errorf("the same table: %v", e)
	}
	now := []kernstream.Mount{mounts[0], {MountInfoID: 2, ID: 20, MountPoint: "/moved"}, {MountInfoID: 3, ID: 31}, {MountInfoID: 5}}
	e, differs := m.compare(now)
	ids := func(mounts []kernstream.Mount) (ids []uint32) {
		for i := range mounts {
			ids = append(ids, mounts[i].MountInfoID)
		}
		slices.Sort(ids)
		return ids
	}
	if !differs || fmt.Sprint(ids(e.Mounted), ids(e.Unmounted)) != "[3 5] [3 4]" || len(e.Moved) != 1 || e.Moved[0].New.MountPoint != "/moved" {
		t.Errorf("%v; want 3 and 5 mounted, 3 and 4 unmounted, 2 moved", e)
	}
	m.change(e)
	if e, differs := m.compare(now); differs {
		t.Errorf("after that: %v", e)
	}
}
