package recorder

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
	l, err := newMountLog(proc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	return l
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
