package kernstream_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What tests of mounts stand on: a watcher with a directory to mount in, and a
// table that is kept by its events.

// A lab is a directory with a watcher of the mount namespace around it.
type lab struct {
	t     testing.TB
	dir   string // a tmpfs of its own, mounted private
	w     *kernstream.MountWatcher
	table map[uint32]kernstream.Mount // what the events have told so far
	via   kernstream.MountVia         // of the first event
	marks int
}

// newLab starts a watcher. What is below the directory at the end of the test
// is unmounted.
func newLab(t testing.TB, options *kernstream.MountOptions) *lab {
	t.Helper()
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	l := &lab{t: t, dir: labDir(t)}
	l.watch(t.Context(), options)
	return l
}

// labDir returns the path of a new tmpfs.
func labDir(t testing.TB) string {
	t.Helper()
	testenv.NeedMounts(t)
	dir := t.TempDir()
	mount(t, "lab", dir, "tmpfs", 0, "")
	mount(t, "", dir, "", unix.MS_PRIVATE, "")
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

// watch starts a watcher and receives its first event.
func (l *lab) watch(ctx context.Context, options *kernstream.MountOptions) {
	l.t.Helper()
	w, err := kernstream.WatchMounts(ctx, options)
	if err != nil {
		l.t.Fatal(err)
	}
	l.w = w
	l.t.Cleanup(func() { w.Close() })
	l.table = map[uint32]kernstream.Mount{}
	e := l.receive()
	if !e.Initial {
		l.t.Fatalf("the first event is %v; want the initial one", e)
	}
	l.via = e.Via
	l.apply(e)
}

// receive returns the next event.
func (l *lab) receive() *kernstream.MountEvent {
	l.t.Helper()
	select {
	case e, ok := <-l.w.C:
		if !ok {
			l.t.Fatalf("the stream ended: %v", l.w.Err())
		}
		return e
	case <-time.After(patience):
		l.t.Fatalf("no event after %v", patience)
	}
	return nil
}

// apply brings the table up to date as the documentation of MountEvent says,
// and fails the test when the event does not fit the table.
func (l *lab) apply(e *kernstream.MountEvent) {
	l.t.Helper()
	if err := applyMounts(l.table, e); err != nil {
		l.t.Fatalf("%v: %v", e, err)
	}
}

// applyMounts applies e to a table by MountInfoID.
func applyMounts(table map[uint32]kernstream.Mount, e *kernstream.MountEvent) error {
	known := func(m *kernstream.Mount) error {
		if have, ok := table[m.MountInfoID]; !ok || !sameMount(&have, m) {
			return fmt.Errorf("the consumer is said to know\n%+v, but knows\n%+v", *m, have)
		}
		return nil
	}
	for i := range e.Unmounted {
		if err := known(&e.Unmounted[i]); err != nil {
			return err
		}
		delete(table, e.Unmounted[i].MountInfoID)
	}
	for _, c := range slices.Concat(e.Moved, e.Changed) {
		if err := known(&c.Old); err != nil {
			return err
		}
		delete(table, c.Old.MountInfoID)
		table[c.New.MountInfoID] = c.New
	}
	for _, m := range e.Mounted {
		if have, ok := table[m.MountInfoID]; ok {
			return fmt.Errorf("mounted is %+v, but there is %+v", m, have)
		}
		table[m.MountInfoID] = m
	}
	return nil
}

func sameMount(a, b *kernstream.Mount) bool {
	left, _ := json.Marshal(a)
	right, _ := json.Marshal(b)
	return string(left) == string(right)
}

// do runs f and returns all that the watcher tells about it. A mount that is
// made afterwards marks the end.
func (l *lab) do(f func()) *kernstream.MountEvent {
	l.t.Helper()
	f()
	return l.untilMark()
}

// untilMark returns what the watcher tells of all that has happened. The mark is
// a mount that changes in silence, so that only a rescan finds it, which finds
// the other changes, too.
func (l *lab) untilMark() *kernstream.MountEvent {
	l.t.Helper()
	l.marks++
	mark := l.mkdir(fmt.Sprint(".mark", l.marks))
	isMark := func(m *kernstream.Mount) bool { return m.MountPoint == mark }
	all := &kernstream.MountEvent{}
	silent := false // the mark has been seen to have changed
	until := func(seen func(e *kernstream.MountEvent) bool) {
		l.t.Helper()
		l.until(all, func(e *kernstream.MountEvent) bool {
			found := seen(e)
			e.Mounted = slices.DeleteFunc(e.Mounted, func(m kernstream.Mount) bool {
				silent = silent || isMark(&m) && len(m.Optional) > 0
				return isMark(&m)
			})
			e.Unmounted = slices.DeleteFunc(e.Unmounted, func(m kernstream.Mount) bool { return isMark(&m) })
			e.Changed = slices.DeleteFunc(e.Changed, func(c kernstream.MountChange) bool {
				silent = silent || isMark(&c.New) && len(c.New.Optional) > 0
				return isMark(&c.New)
			})
			return found
		})
	}
	// Of another type than what tests mount: without unique IDs, a mount that
	// got the ID of one that went is known by its device and type.
	mount(l.t, "mark", mark, "ramfs", 0, "")
	until(func(e *kernstream.MountEvent) bool {
		return slices.ContainsFunc(e.Mounted, func(m kernstream.Mount) bool { return isMark(&m) })
	})
	mount(l.t, "", mark, "", unix.MS_SHARED, "")
	l.w.Rescan()
	for !silent {
		until(func(e *kernstream.MountEvent) bool {
			return slices.ContainsFunc(e.Changed, func(c kernstream.MountChange) bool { return isMark(&c.New) })
		})
	}
	if err := unix.Unmount(mark, 0); err != nil {
		l.t.Fatal(err)
	}
	until(func(e *kernstream.MountEvent) bool {
		return slices.ContainsFunc(e.Unmounted, func(m kernstream.Mount) bool { return isMark(&m) })
	})
	return all
}

// until receives events and adds them to all, up to one that done says yes to.
func (l *lab) until(all *kernstream.MountEvent, done func(e *kernstream.MountEvent) bool) {
	l.t.Helper()
	for {
		e := l.receive()
		l.apply(e)
		found := done(e)
		all.Unmounted = append(all.Unmounted, e.Unmounted...)
		all.Moved = append(all.Moved, e.Moved...)
		all.Changed = append(all.Changed, e.Changed...)
		all.Mounted = append(all.Mounted, e.Mounted...)
		all.Resync = all.Resync || e.Resync
		if found {
			return
		}
	}
}

// quiet fails the test if there is an event.
func (l *lab) quiet(why string) {
	l.t.Helper()
	select {
	case e, ok := <-l.w.C:
		if !ok {
			l.t.Fatalf("the stream ended: %v", l.w.Err())
		}
		l.t.Fatalf("event %v; want none: %s", e, why)
	case <-time.After(30 * time.Millisecond):
	}
}

// silently runs f, which changes the table without a wake, and returns what a
// rescan finds of it. why is why nobody is told.
func (l *lab) silently(why string, f func()) *kernstream.MountEvent {
	l.t.Helper()
	// A look that is still pending would find the change, too.
	l.quiet("nothing has happened yet")
	f()
	l.quiet(why)
	l.w.Rescan()
	e := l.receive()
	if !e.Resync {
		l.t.Errorf("%v does not have Resync", e)
	}
	l.apply(e)
	return e
}

// has tells whether the events told of a mount on point.
func (l *lab) has(point string) bool {
	for _, m := range l.table {
		if m.MountPoint == point {
			return true
		}
	}
	return false
}

// checkTable compares the table that the events told with the kernel's.
func (l *lab) checkTable(options *kernstream.MountOptions) {
	l.t.Helper()
	if err := compareTable(l.table, options); err != nil {
		l.t.Error(err)
	}
}

func compareTable(table map[uint32]kernstream.Mount, options *kernstream.MountOptions) error {
	mounts, err := kernstream.Mounts(options)
	if err != nil {
		return err
	}
	if len(mounts) != len(table) {
		return fmt.Errorf("the events tell of %d mounts, the kernel has %d", len(table), len(mounts))
	}
	for i := range mounts {
		have, ok := table[mounts[i].MountInfoID]
		if !ok || !sameMount(&have, &mounts[i]) {
			return fmt.Errorf("the events tell of\n%+v, the kernel has\n%+v", have, mounts[i])
		}
	}
	return nil
}

// mkdir makes a directory below the lab's and returns its path.
func (l *lab) mkdir(elements ...string) string {
	l.t.Helper()
	dir := filepath.Join(append([]string{l.dir}, elements...)...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	return dir
}

// tmpfs mounts a tmpfs on a new directory and returns its path.
func (l *lab) tmpfs(elements ...string) string {
	l.t.Helper()
	dir := l.mkdir(elements...)
	mount(l.t, strings.Join(elements, "-"), dir, "tmpfs", 0, "")
	return dir
}

func mount(t testing.TB, source, target, fstype string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		t.Fatalf("mount %s on %s: %v", source, target, err)
	}
}

func umount(t testing.TB, target string, flags int) {
	t.Helper()
	if err := unix.Unmount(target, flags); err != nil {
		t.Fatalf("umount %s: %v", target, err)
	}
}

// storm mounts and unmounts on dir without a pause, until calm is called.
func storm(dir string) (calm func()) {
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Mount("storm", dir, "tmpfs", 0, "")
				unix.Unmount(dir, 0)
			}
		}
	})
	return func() {
		close(stop)
		storm.Wait()
	}
}

// points lists the mount points of mounts, below dir.
func points(mounts []kernstream.Mount, dir string) []string {
	list := []string{}
	for _, m := range mounts {
		list = append(list, strings.TrimPrefix(strings.TrimPrefix(m.MountPoint, dir), "/"))
	}
	return list
}

func newPoints(changes []kernstream.MountChange, dir string) []string {
	list := []string{}
	for _, c := range changes {
		list = append(list, points([]kernstream.Mount{c.New}, dir)...)
	}
	return list
}

// want checks the lists of an event: the mount points below the lab's
// directory, in order. An empty text is an empty list.
func (l *lab) want(e *kernstream.MountEvent, unmounted, moved, changed, mounted string) {
	l.t.Helper()
	for _, list := range []struct {
		name string
		got  []string
		want string
	}{
		{"Unmounted", points(e.Unmounted, l.dir), unmounted},
		{"Moved", newPoints(e.Moved, l.dir), moved},
		{"Changed", newPoints(e.Changed, l.dir), changed},
		{"Mounted", points(e.Mounted, l.dir), mounted},
	} {
		if want := strings.Fields(list.want); !slices.Equal(list.got, want) {
			l.t.Errorf("%s is %q; want %q", list.name, list.got, want)
		}
	}
}
