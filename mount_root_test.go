package kernstream_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What becomes of a table when the process that it is of changes its root
// directory, its namespace, or ends, on both ways.

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
		t.Fatalf("event %v (Err %v, %+v) without a descriptor to look; want none", e, l.w.Err(), e.Unmounted)
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

// TestMountHungRoot: the table of a process whose root directory is of a file system
// that does not answer can be followed: nobody asks that which root it is.
func TestMountHungRoot(t *testing.T) {
	dir, server := fuseServer(t)
	a := newAgent(t, unix.CLONE_NEWNS)
	a.do("chroot", dir)
	if err := server.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, via := range []kernstream.MountVia{kernstream.ViaAuto, kernstream.ViaFanotify} {
		begun := make(chan struct{})
		go func() {
			defer close(begun)
			w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{PID: a.PID, Via: via})
			if err != nil {
				if via == kernstream.ViaAuto {
					t.Error(err)
				}
				return
			}
			defer w.Close()
			if e := <-w.C; len(e.Mounted) != 1 || e.Mounted[0].MountPoint != "/" || e.Mounted[0].FSType != "fuse" {
				t.Errorf("by %v the table is %v; want the root alone", via, e)
			}
		}()
		select {
		case <-begun:
		case <-time.After(patience):
			server.Kill() // lets go of who waits
			<-begun
			t.Fatalf("by %v the watcher waits for the file system", via)
		}
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
