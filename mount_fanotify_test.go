package kernstream_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What only the fanotify path has: when it can be taken and what is taken
// otherwise, how it finds what fanotify does not tell, what it does when events
// are lost, and how it follows other namespaces without keeping them alive.
// What a consumer sees of each operation is tested on both paths in
// mount_operations_test.go.

// ladderResult is how a process fares with the ways to follow its mounts.
type ladderResult struct {
	Via                                  string // what ViaAuto led to
	Error                                string // what ViaFanotify led to
	Permission, Unsupported, Descriptors bool   // what that error Is
	IDs                                  bool   // all mounts have unique IDs
}

func init() {
	testenv.RegisterChild("ladder", func(args []string) int {
		if err := climb(args); err != nil {
			fmt.Fprintln(os.Stderr, "ladder:", err)
			return 1
		}
		return 0
	})
}

// climb takes away what args say, and prints a ladderResult.
func climb(args []string) error {
	switch args[0] {
	case "no groups":
		if err := os.WriteFile("/proc/sys/user/max_fanotify_groups", []byte("0"), 0); err != nil {
			return err
		}
	case "seccomp": // system call, errno
		var nr, errno int
		fmt.Sscan(args[1]+" "+args[2], &nr, &errno)
		if err := testenv.Refuse(syscall.Errno(errno), testenv.Refusal{Call: nr}); err != nil {
			return err
		}
	}
	var r ladderResult
	w, err := kernstream.WatchMounts(context.Background(), nil)
	if err != nil {
		return err
	}
	e := <-w.C
	r.Via = e.Via.String()
	r.IDs = !slices.ContainsFunc(e.Mounted, func(m kernstream.Mount) bool { return m.ID == 0 })
	w.Close()
	if w, err = kernstream.WatchMounts(context.Background(), &kernstream.MountOptions{Via: kernstream.ViaFanotify}); err == nil {
		w.Close()
	} else {
		r.Error = err.Error()
	}
	r.Permission, r.Unsupported, r.Descriptors = errors.Is(err, fs.ErrPermission), errors.Is(err, errors.ErrUnsupported), errors.Is(err, unix.EMFILE)
	return json.NewEncoder(os.Stdout).Encode(r)
}

// TestMountLadder: where the fanotify path cannot be taken, the mountinfo path is,
// without being asked; who insists is told what is missing.
func TestMountLadder(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NeedKernel(t, 6, 16, "fanotify marks of mount namespaces, for the root of a user namespace, too")
	const userNamespace = unix.CLONE_NEWUSER
	type want struct {
		via   string
		is    string // of the ladderResult's
		text  string
		noIDs bool
	}
	refused := func(nr int, errno syscall.Errno) []string {
		return []string{"seccomp", fmt.Sprint(nr), fmt.Sprint(int(errno))}
	}
	for _, test := range []struct {
		name   string
		flags  uintptr
		nobody bool
		args   []string
		want   want
	}{
		{name: "privileged", want: want{via: "fanotify"}},
		{name: "private namespaces", flags: userNamespace | unix.CLONE_NEWNS, want: want{via: "fanotify"}},
		{name: "user namespace alone", flags: userNamespace, want: want{via: "mountinfo", is: "permission", text: "CAP_SYS_ADMIN"}},
		{name: "ordinary user", nobody: true, want: want{via: "mountinfo", is: "permission", text: "CAP_SYS_ADMIN"}},
		{name: "no groups left", flags: userNamespace | unix.CLONE_NEWNS, args: []string{"no groups"}, want: want{via: "mountinfo", is: "descriptors", text: "max_user_groups"}},
		{name: "no fanotify", args: refused(unix.SYS_FANOTIFY_INIT, unix.ENOSYS), want: want{via: "mountinfo", is: "unsupported", text: "Linux 6.15"}},
		{name: "no marks", args: refused(unix.SYS_FANOTIFY_MARK, unix.EINVAL), want: want{via: "mountinfo", is: "unsupported", text: "Linux 6.15"}},
		{name: "no statmount", args: refused(unix.SYS_STATMOUNT, unix.ENOSYS), want: want{via: "mountinfo", is: "unsupported", text: "statmount", noIDs: true}},
		{name: "forbidden statmount", args: refused(unix.SYS_STATMOUNT, unix.EPERM), want: want{via: "mountinfo", is: "permission", text: "statmount", noIDs: true}},
		{name: "forbidden listmount", args: refused(unix.SYS_LISTMOUNT, unix.EPERM), want: want{via: "mountinfo", is: "permission", text: "listmount", noIDs: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.nobody {
				testenv.NeedRoot(t, "another user")
			}
			if test.args == nil {
				test.args = []string{"nothing"}
			}
			cmd := testenv.Child(t, "ladder", test.args...)
			cmd.Stderr = os.Stderr
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: test.flags}
			if test.flags&userNamespace != 0 {
				cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
				cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
			}
			if test.nobody {
				cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
			}
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			var r ladderResult
			if err := json.Unmarshal(out, &r); err != nil {
				t.Fatal(err)
			}
			testenv.Feature(t, "mount table, "+test.name, r.Via)
			is := map[string]bool{"": true, "permission": r.Permission, "unsupported": r.Unsupported, "descriptors": r.Descriptors}
			if r.Via != test.want.via || !is[test.want.is] || (r.Error == "") != (test.want.via == "fanotify") || !strings.Contains(r.Error, test.want.text) || r.IDs == test.want.noIDs {
				t.Errorf("%+v; want %+v", r, test.want)
			}
		})
	}
}

// newFast starts a watcher by fanotify.
func newFast(t testing.TB, options *kernstream.MountOptions) *lab {
	t.Helper()
	needWay(t, kernstream.ViaFanotify)
	options.Via = kernstream.ViaFanotify
	return newLab(t, options)
}

// receiveChanged returns the first event with a change.
func (l *lab) receiveChanged() *kernstream.MountEvent {
	l.t.Helper()
	for deadline := time.After(patience); ; {
		select {
		case e, ok := <-l.w.C:
			if !ok {
				l.t.Fatalf("the stream ended: %v", l.w.Err())
			}
			l.apply(e)
			if len(e.Changed) > 0 {
				return e
			}
		case <-deadline:
			l.t.Fatalf("no change within %v", patience)
		}
	}
}

// TestMountAloneAtOnce: a change of options that comes alone is found at once,
// although fanotify does not tell of it, and is no resync.
func TestMountAloneAtOnce(t *testing.T) {
	l := newFast(t, &kernstream.MountOptions{})
	dir := l.tmpfs("a")
	l.untilMark()
	time.Sleep(1500 * time.Millisecond) // whatever hid behind the mounts was looked for
	for i := range 5 {
		flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND)
		if i%2 == 0 {
			flags |= unix.MS_NOEXEC
		}
		mount(t, "", dir, "", flags, "")
		e := l.receiveChanged()
		l.want(e, "", "", "a", "")
		if e.Resync {
			t.Errorf("%v has Resync", e)
		}
		time.Sleep(50 * time.Millisecond) // more than 30 times what a look takes
	}
}

// TestMountHiddenInTime: a change of options that hides behind a mount is found
// within a second or so, without being asked for, and is a resync.
func TestMountHiddenInTime(t *testing.T) {
	l := newFast(t, &kernstream.MountOptions{})
	dir := l.tmpfs("a")
	l.untilMark()
	time.Sleep(1500 * time.Millisecond)
	calm := storm(l.mkdir("storm"))
	defer calm()
	time.Sleep(100 * time.Millisecond)
	mount(t, "", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOEXEC, "")
	e := l.receiveChanged()
	if len(e.Changed) != 1 || e.Changed[0].New.MountPoint != dir || !e.Resync {
		t.Errorf("event %v; want a changed, with Resync", e)
	}
}

// TestMountOverflow: when the kernel's queue has overflown, the table is read
// again, and what is different is told with Resync.
func TestMountOverflow(t *testing.T) {
	needWay(t, kernstream.ViaFanotify)
	limit, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events")
	if err != nil {
		t.Fatal(err)
	}
	var n int
	fmt.Sscan(string(limit), &n)
	// While the filter does not return, nobody reads.
	stall := make(chan struct{})
	asked := make(chan struct{}, 1)
	filter := func(m *kernstream.Mount) bool {
		if m.FSSource == "stall" {
			asked <- struct{}{}
			<-stall
		}
		return true
	}
	l := newFast(t, &kernstream.MountOptions{Filter: filter})
	hang := l.mkdir("hang")
	stays, goes := l.mkdir("stays"), l.tmpfs("goes")
	point := l.mkdir("point")
	l.untilMark()
	mount(t, "stall", hang, "tmpfs", 0, "")
	<-asked
	for range n/2 + 100 {
		mount(t, "p", point, "tmpfs", 0, "")
		umount(t, point, 0)
	}
	mount(t, "stays", stays, "tmpfs", 0, "")
	umount(t, goes, 0)
	close(stall)
	e := l.untilMark()
	l.want(e, "goes", "", "", "hang stays")
	if !e.Resync {
		t.Errorf("%v does not have Resync", e)
	}
	l.checkTable(nil)
}

// TestMountForeignAttributes: changes of options in another namespace are found
// by themselves, though nobody is woken and nothing of it is kept open.
func TestMountForeignAttributes(t *testing.T) {
	needWay(t, kernstream.ViaFanotify)
	testenv.NoLeaks(t)
	dir := labDir(t)
	a := newAgent(t, unix.CLONE_NEWNS)
	options := &kernstream.MountOptions{PID: a.PID, Via: kernstream.ViaFanotify}
	l := &lab{t: t, dir: dir}
	l.watch(t.Context(), options)
	for i := range 3 {
		a.do("mount", "", dir, "", fmt.Sprint(unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOEXEC<<(i%2)))
		e := l.receiveChanged()
		if len(e.Changed) != 1 || e.Changed[0].New.MountPoint != dir || !e.Resync {
			t.Errorf("event %v; want the lab changed, with Resync", e)
		}
	}
	// What is open of the process does not keep its namespace alive.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		target, _ := os.Readlink(filepath.Join("/proc/self/fd", entry.Name()))
		if strings.HasSuffix(target, "mountinfo") || strings.HasPrefix(target, "mnt:") {
			t.Errorf("descriptor %s is open on %s", entry.Name(), target)
		}
	}
}

// TestMountOwnChroot: when the process itself changes its root directory, the
// table follows at the next change: mounts outside are gone from view, those
// inside have moved.
func TestMountOwnChroot(t *testing.T) {
	eachWay(t, func(t *testing.T, via kernstream.MountVia) {
		dir := labDir(t)
		for _, d := range []string{"root/in", "root/later", "out"} {
			if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		mount(t, "in", filepath.Join(dir, "root/in"), "tmpfs", 0, "")
		mount(t, "out", filepath.Join(dir, "out"), "tmpfs", 0, "")
		a := newAgent(t, 0)
		a.do("watch", via.String())
		table := map[uint32]kernstream.Mount{}
		collect := func() {
			for e := unmarshalEvent(t, a.do("event")); e != nil; e = unmarshalEvent(t, a.do("event")) {
				if err := applyMounts(table, e); err != nil {
					t.Fatal(err)
				}
			}
		}
		collect()
		a.do("chroot", filepath.Join(dir, "root"))
		mount(t, "later", filepath.Join(dir, "root/later"), "tmpfs", 0, "")
		collect()
		points := []string{}
		for _, m := range table {
			points = append(points, m.MountPoint)
		}
		slices.Sort(points)
		if !slices.Equal(points, []string{"/in", "/later"}) {
			t.Errorf("the table has %q; want /in and /later", points)
		}
	})
}

// TestMountIntoView: a tree of mounts that is moved to where the process can
// see it is a Mounted of each, though the kernel tells of its top alone.
func TestMountIntoView(t *testing.T) {
	eachWay(t, func(t *testing.T, via kernstream.MountVia) {
		l := &lab{t: t, dir: labDir(t)}
		view := l.tmpfs("view")
		l.mkdir("view", "place")
		mount(t, "/proc", l.mkdir("view", "proc"), "", unix.MS_BIND|unix.MS_REC, "")
		tree := l.tmpfs("tree")
		l.tmpfs("tree", "x")
		l.tmpfs("tree", "x", "y")
		a := newAgent(t, 0)
		a.do("chroot", view)
		a.do("watch", via.String())
		if e := unmarshalEvent(t, a.do("event")); !e.Initial || slices.Contains(points(e.Mounted, ""), "place") {
			t.Fatalf("the first event is %v", e)
		}
		mount(t, tree, filepath.Join(view, "place"), "", unix.MS_MOVE, "")
		var seen []string
		for e := unmarshalEvent(t, a.do("event")); e != nil; e = unmarshalEvent(t, a.do("event")) {
			seen = append(seen, points(e.Mounted, "")...)
		}
		if want := []string{"place", "place/x", "place/x/y"}; !slices.Equal(seen, want) {
			t.Errorf("mounted are %q; want %q", seen, want)
		}
		// And out of it again.
		mount(t, filepath.Join(view, "place"), tree, "", unix.MS_MOVE, "")
		seen = nil
		for e := unmarshalEvent(t, a.do("event")); e != nil; e = unmarshalEvent(t, a.do("event")) {
			seen = append(seen, points(e.Unmounted, "")...)
		}
		if want := []string{"place/x/y", "place/x", "place"}; !slices.Equal(seen, want) {
			t.Errorf("unmounted are %q; want %q", seen, want)
		}
	})
}

// TestMountMany: a table of very many mounts is listed and followed, and a change
// that hides is found. The default is small; the kernel's limit is 100,000 for a namespace.
func TestMountMany(t *testing.T) {
	n := min(testenv.SoakN(3000), 99_000)
	eachWay(t, func(t *testing.T, via kernstream.MountVia) {
		l := &lab{t: t, dir: labDir(t)}
		for i := range n {
			dir := l.mkdir(fmt.Sprint(i))
			if err := unix.Mount("many", dir, "ramfs", 0, ""); err != nil {
				t.Fatalf("mount %d of %d: %v", i+1, n, err)
			}
		}
		l.watch(t.Context(), &kernstream.MountOptions{Via: via})
		if len(l.table) < n {
			t.Errorf("%d mounts of more than %d in the first event", len(l.table), n)
		}
		many := filepath.Join(l.dir, "0")
		e := l.do(func() {
			mount(t, "", many, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOEXEC, "")
			l.tmpfs("more")
		})
		l.want(e, "", "", "0", "more")

		// Without being asked. When that is, the tests of rescanPlan say.
		point := l.mkdir("point")
		mount(t, "hide", point, "tmpfs", 0, "")
		mount(t, "", many, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NODEV, "")
		umount(t, point, 0)
		l.receiveChanged()
		l.untilMark()
		l.checkTable(nil)
	})
}
