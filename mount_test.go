package kernstream_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityM1InitialEvent: the first event has the whole table and says so. A
// mount that is made while the watcher starts is in it or in the next event:
// never in both, never in none.
func TestParityM1InitialEvent(t *testing.T) {
	testenv.NoLeaks(t)
	dir := labDir(t)
	for i := range testenv.SoakN(200) {
		point := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(point, 0o755); err != nil {
			t.Fatal(err)
		}
		var mounter sync.WaitGroup
		mounter.Go(func() {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
			unix.Mount("m", point, "tmpfs", 0, "")
		})
		w, err := kernstream.WatchMounts(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		table := map[uint32]kernstream.Mount{}
		first := true
		for n := 0; n == 0; {
			e := <-w.C
			if e.Initial != first {
				t.Fatalf("Initial is %v for event %v", e.Initial, e)
			}
			first = false
			if err := applyMounts(table, e); err != nil {
				t.Fatal(err)
			}
			for _, m := range table {
				if m.MountPoint == point {
					n++
				}
			}
			if n > 1 {
				t.Fatal("the mount was counted twice")
			}
		}
		mounter.Wait()
		w.Close()
		umount(t, point, 0)
	}
}

// TestParityM2Lists: each change comes as lists of what was mounted and what
// was unmounted.
func TestParityM2Lists(t *testing.T) {
	l := newLab(t, nil)
	e := l.do(func() {
		l.tmpfs("a")
		l.tmpfs("b")
	})
	l.want(e, "", "", "", "a b")
	e = l.do(func() {
		mount(t, "c", l.mkdir("c"), "ramfs", 0, "")
		umount(t, filepath.Join(l.dir, "a"), 0)
	})
	l.want(e, "a", "", "", "c")
}

// TestParityM4Stop: the consumer ends the stream from within its loop, by Close
// or by its context.
func TestParityM4Stop(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	for _, how := range []string{"Close", "cancel", "break"} {
		ctx, cancel := context.WithCancel(t.Context())
		w, err := kernstream.WatchMounts(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
	loop:
		for range w.C {
			n++
			switch how {
			case "Close":
				w.Close()
			case "cancel":
				cancel()
			case "break":
				break loop
			}
		}
		cancel()
		w.Close()
		if err := w.Err(); n != 1 || how == "Close" && err != nil || how == "cancel" && err != context.Canceled {
			t.Errorf("%s: %d events, Err %v", how, n, err)
		}
	}
}

// TestParityM6StopAndJoin: a cancel is noticed at once, not at the next poll;
// when C is closed, goroutines and descriptors are gone, whatever was going on.
func TestParityM6StopAndJoin(t *testing.T) {
	testenv.NeedMounts(t)
	dir := labDir(t)
	defer storm(dir)()
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	var cancels []time.Duration
	for i := range testenv.SoakN(300) {
		before := descriptors()
		ctx, cancel := context.WithCancel(t.Context())
		w, err := kernstream.WatchMounts(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range i % 4 {
			<-w.C
		}
		begin := time.Now()
		cancel()
		for range w.C {
		}
		cancels = append(cancels, time.Since(begin))
		if after := descriptors(); after != before {
			t.Fatalf("%d descriptors when C was closed; want %d as before", after, before)
		}
		if err := w.Err(); err != context.Canceled {
			t.Fatalf("Err is %v", err)
		}
	}
	// No figure is asserted here (see bench), but a poll would show, however busy
	// the machine is now and then.
	slices.Sort(cancels)
	if median := cancels[len(cancels)/2]; median > 250*time.Millisecond {
		t.Errorf("half of the cancels took %v or more", median)
	}
}

// TestParityM7SetupErrors: what goes wrong at the start is an error of the
// constructor that says what was being done to what, and why.
func TestParityM7SetupErrors(t *testing.T) {
	testenv.NoLeaks(t)
	zombie := exec.Command("/bin/true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	waitForZombie(t, zombie.Process.Pid)
	defer zombie.Wait()
	reaped := exec.Command("/bin/true")
	if err := reaped.Run(); err != nil {
		t.Fatal(err)
	}
	regular, err := os.Create(filepath.Join(t.TempDir(), "regular"))
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	closed, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	device, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	uts, err := os.Open("/proc/self/ns/uts")
	if err != nil {
		t.Fatal(err)
	}
	defer uts.Close()
	chrooted, otherRoot := newAgent(t, 0), "root directory"
	chrooted.do("chroot", t.TempDir())
	if !testenv.KernelAtLeast(6, 16) {
		otherRoot = "Linux 6.15"
	}
	for _, test := range []struct {
		name    string
		options kernstream.MountOptions
		want    error
		text    string
		watch   bool // an error of WatchMounts alone
	}{
		{name: "zombie", options: kernstream.MountOptions{PID: zombie.Process.Pid}, want: os.ErrProcessDone, text: fmt.Sprint(zombie.Process.Pid)},
		{name: "reaped", options: kernstream.MountOptions{PID: reaped.Process.Pid}, want: os.ErrProcessDone, text: fmt.Sprint(reaped.Process.Pid)},
		{name: "negative", options: kernstream.MountOptions{PID: -1}, want: syscall.EINVAL, text: "process -1"},
		{name: "not a namespace", options: kernstream.MountOptions{Namespace: regular}, text: "not a namespace"},
		{name: "another namespace", options: kernstream.MountOptions{Namespace: uts}, want: syscall.EINVAL, text: "not a mount namespace"},
		{name: "device", options: kernstream.MountOptions{Namespace: device}, text: "not a namespace"},
		{name: "closed", options: kernstream.MountOptions{Namespace: closed}, want: os.ErrClosed, text: "/proc/self/ns/mnt"},
		{name: "both", options: kernstream.MountOptions{Namespace: uts, PID: 1}, text: "PID and Namespace"},
		{name: "another root", options: kernstream.MountOptions{Via: kernstream.ViaFanotify, PID: chrooted.PID}, want: errors.ErrUnsupported, text: otherRoot, watch: true},
		{name: "unknown", options: kernstream.MountOptions{Via: 77}, text: "77", watch: true},
		{name: "thread", options: kernstream.MountOptions{PID: otherThread(t)}, text: "thread"},
	} {
		t.Run(test.name, func(t *testing.T) {
			check := func(who string, err error) {
				var op *kernstream.OpError
				if !errors.As(err, &op) || op.Source != "mount" || op.Op == "" || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
					t.Errorf("%s returned %v; want an OpError that Is %v and says %q", who, err, test.want, test.text)
				}
			}
			w, err := kernstream.WatchMounts(t.Context(), &test.options)
			if w != nil {
				t.Error("WatchMounts returned a watcher")
			}
			check("WatchMounts", err)
			if !test.watch {
				_, err := kernstream.Mounts(&test.options)
				check("Mounts", err)
			}
		})
	}
}

// otherThread returns the ID of a thread that is not the main one.
func otherThread(t *testing.T) int {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		var tid int
		if fmt.Sscan(task.Name(), &tid); tid != os.Getpid() {
			return tid
		}
	}
	t.Fatal("this process has one thread")
	return 0
}

func waitForZombie(t *testing.T, pid int) {
	t.Helper()
	for range 1000 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		if fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:])); fields[0] == "Z" {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("process %d does not end", pid)
}

// TestMountOutOfDescriptors: with no descriptor left, the error says so, and
// none is lost by it.
func TestMountOutOfDescriptors(t *testing.T) {
	testenv.NoLeaks(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	for room := range 5 {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		highest := 0
		for _, entry := range entries {
			var fd int
			fmt.Sscan(entry.Name(), &fd)
			highest = max(highest, fd)
		}
		// Holes below the highest descriptor are filled up.
		var fill []int
		for {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			fill = append(fill, fd)
			if fd > highest {
				highest = fd
				break
			}
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(highest + 1 + room), Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{PID: os.Getpid()})
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		for _, fd := range fill {
			unix.Close(fd)
		}
		if room < 3 && (w != nil || !errors.Is(err, unix.EMFILE)) {
			t.Errorf("with %d descriptors left: %v, %v; want EMFILE", room, w, err)
		}
		if w != nil {
			w.Close()
		}
	}
}

// TestParityM8Mounts: a snapshot has every mount with source, mount point, type
// and options, as the kernel's file has them.
func TestParityM8Mounts(t *testing.T) {
	l := newLab(t, nil)
	dir := l.tmpfs("with space")
	mounts, err := kernstream.Mounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(mounts) != len(lines) {
		t.Fatalf("%d mounts; the file has %d rows", len(mounts), len(lines))
	}
	for i, m := range mounts {
		if m.Raw != nil {
			t.Errorf("row %q was not read", m.Raw)
		}
		if got := mountinfoRow(&m); got != lines[i] {
			t.Errorf("mount %d is\n%s, the row is\n%s", i, got, lines[i])
		}
	}
	if !slices.ContainsFunc(mounts, func(m kernstream.Mount) bool {
		return m.MountPoint == dir && m.FSSource == "with space" && m.FSType == "tmpfs" && m.Options != "" && m.SuperOptions != ""
	}) {
		t.Errorf("the mount on %q is not there", dir)
	}
}

// mountinfoRow writes a mount as the kernel does.
func mountinfoRow(m *kernstream.Mount) string {
	path := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)
	name := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`, "#", `\043`)
	optional := ""
	for _, field := range m.Optional {
		optional += field + " "
	}
	return fmt.Sprintf("%d %d %d:%d %s %s %s %s- %s %s %s", m.MountInfoID, m.MountInfoParentID, m.Major, m.Minor,
		path.Replace(m.Root), path.Replace(m.MountPoint), m.Options, optional, name.Replace(m.FSType), name.Replace(m.FSSource), m.SuperOptions)
}

// TestParityM9WakeWithoutDifference: a wake that brings no difference is no
// event, and harms nothing; waits go on when signals interrupt the program.
func TestParityM9WakeWithoutDifference(t *testing.T) {
	l := newLab(t, nil)
	dir := l.tmpfs("a")
	l.untilMark()
	for range 20 {
		// It sets what is set, and still wakes everybody.
		mount(t, "", dir, "", unix.MS_REMOUNT|unix.MS_BIND, "")
		if err := syscall.Kill(os.Getpid(), syscall.SIGURG); err != nil { // the runtime takes it, and goes on
			t.Fatal(err)
		}
	}
	l.quiet("nothing changed")
	l.want(l.do(func() { l.tmpfs("b") }), "", "", "", "b")
}

// TestMountFilter: the consumer is told of the mounts that pass; one that
// ceases to pass is Unmounted, one that begins to is Mounted, one that passes
// neither before nor after is nothing.
func TestMountFilter(t *testing.T) {
	eachWay(t, testFilter)
}

func testFilter(t *testing.T, via kernstream.MountVia) {
	var dir string
	writable := func(m *kernstream.Mount) bool {
		return strings.HasPrefix(m.FSSource, "mark") || strings.HasPrefix(m.MountPoint, dir) && strings.HasPrefix(m.Options, "rw") && m.FSSource != "hidden"
	}
	testenv.NeedMounts(t)
	l := &lab{t: t, dir: labDir(t)}
	dir = l.dir
	options := &kernstream.MountOptions{Via: via, Filter: writable}
	l.watch(t.Context(), options)
	if len(l.table) != 1 {
		t.Errorf("the initial event has %d mounts; want the one that passes", len(l.table))
	}
	remount := func(flags uintptr) func() {
		return func() { mount(t, "", filepath.Join(dir, "a"), "", unix.MS_REMOUNT|unix.MS_BIND|flags, "") }
	}
	l.want(l.do(func() { l.tmpfs("a") }), "", "", "", "a")
	l.want(l.do(remount(unix.MS_NOEXEC)), "", "", "a", "")
	e := l.do(remount(unix.MS_RDONLY))
	l.want(e, "a", "", "", "")
	if !strings.Contains(e.Unmounted[0].Options, "noexec") {
		t.Errorf("unmounted is %+v; want the last state that passed", e.Unmounted[0])
	}
	l.want(l.do(remount(unix.MS_RDONLY|unix.MS_NOSUID)), "", "", "", "")
	l.want(l.do(remount(0)), "", "", "", "a")
	mount(t, "hidden", l.mkdir("h"), "tmpfs", 0, "")
	l.want(l.untilMark(), "", "", "", "")
	umount(t, filepath.Join(dir, "h"), 0)
	l.want(l.untilMark(), "", "", "", "")
	l.checkTable(options)
}

// TestMountOfProcess: the table of another process is the one that it sees, any
// user may follow it, and the stream ends with nil when the process does.
func TestMountOfProcess(t *testing.T) {
	eachWay(t, testOfProcess)
}

func testOfProcess(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	testenv.Feature(t, "mount table of a process", "mountinfo, pidfd")
	a := newAgent(t, unix.CLONE_NEWNS)
	options := &kernstream.MountOptions{Via: via, PID: a.PID}
	l := &lab{t: t, dir: dir}
	l.watch(t.Context(), options)
	mount(t, "here", dir, "tmpfs", 0, "")
	l.quiet("the mount was made in another namespace")
	a.do("mount", "there", dir, "tmpfs")
	e := l.receive()
	l.apply(e)
	if len(e.Mounted) != 1 || e.Mounted[0].FSSource != "there" {
		t.Errorf("event %v; want the mount there", e)
	}
	l.checkTable(options)
	a.end()
	wantEnd(t, l, via)
	umount(t, dir, 0)
	if _, err := kernstream.Mounts(options); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Mounts of a process that is gone returned %v", err)
	}
}

// TestMountOfNamespace: a namespace can be given as an open file, which the
// caller may close at once; the watcher does not need a process in it.
func TestMountOfNamespace(t *testing.T) {
	eachWay(t, testOfNamespace)
}

func testOfNamespace(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	testenv.Feature(t, "mount table of a namespace file", "setns, mountinfo")
	a := newAgent(t, unix.CLONE_NEWNS)
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	options := &kernstream.MountOptions{Via: via, Namespace: file}
	mounts, err := kernstream.Mounts(options)
	if err != nil {
		t.Fatal(err)
	}
	if text := marshalMounts(mounts); text != a.do("mounts") {
		t.Errorf("the table of the namespace is\n%s", text)
	}
	l := &lab{t: t, dir: dir}
	l.watch(t.Context(), options)
	file.Close()
	a.do("mount", "there", dir, "tmpfs")
	e := l.receive()
	l.apply(e)
	if len(e.Mounted) != 1 || e.Mounted[0].FSSource != "there" {
		t.Errorf("event %v; want the mount there", e)
	}
	a.end()
	if via == kernstream.ViaFanotify {
		wantEnd(t, l, via)
		return
	}
	l.w.Rescan()
	l.quiet("the watcher holds the namespace, and nothing happened in it")
}

// wantEnd checks that the stream ends with nil. The namespace has ended with its
// last process, and what was mounted in it is gone; mountinfo keeps it.
func wantEnd(t *testing.T, l *lab, via kernstream.MountVia) {
	t.Helper()
	before := len(l.table)
	deadline := time.After(patience)
	for open := true; open; {
		var e *kernstream.MountEvent
		select {
		case e, open = <-l.w.C:
			if open {
				l.apply(e)
			}
		case <-deadline:
			t.Fatal("the stream does not end")
		}
	}
	want := 0
	if via == kernstream.ViaMountinfo {
		want = before
	}
	if len(l.table) != want || l.w.Err() != nil {
		t.Errorf("%d of %d mounts left, Err %v; want %d, nil", len(l.table), before, l.w.Err(), want)
	}
}

// TestMountOfNamespaceUnprivileged: without the privilege to enter a namespace
// the error says which it is.
func TestMountOfNamespaceUnprivileged(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	// In a user namespace of its own, a process may not enter this one's
	// mount namespace.
	cmd := testenv.Child(t, "enter")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if text := string(out); !strings.Contains(text, "permission: true") || !strings.Contains(text, "CAP_SYS_ADMIN") {
		t.Errorf("the error is %s", text)
	}
}

func init() {
	testenv.RegisterChild("enter", func([]string) int {
		file, err := os.Open("/proc/self/ns/mnt")
		if err != nil {
			fmt.Println(err)
			return 1
		}
		_, err = kernstream.Mounts(&kernstream.MountOptions{Namespace: file})
		fmt.Println("permission:", errors.Is(err, fs.ErrPermission), err)
		return 0
	})
}

// TestMountOfThread: a thread that has left the namespace of the others gets
// its own table, and keeps it when the thread ends.
func TestMountOfThread(t *testing.T) {
	eachWay(t, testOfThread)
}

func testOfThread(t *testing.T, via kernstream.MountVia) {
	dir := labDir(t)
	type result struct {
		w      *kernstream.MountWatcher
		mounts []kernstream.Mount
		err    error
	}
	results, leave := make(chan result), make(chan struct{})
	onNewThread(func() {
		var r result
		defer func() {
			results <- r
			<-leave
		}()
		if r.err = unix.Unshare(unix.CLONE_NEWNS); r.err != nil {
			return
		}
		if r.err = unix.Mount("thread", dir, "tmpfs", 0, ""); r.err != nil {
			return
		}
		if r.mounts, r.err = kernstream.Mounts(nil); r.err != nil {
			return
		}
		r.w, r.err = kernstream.WatchMounts(context.Background(), &kernstream.MountOptions{Via: via})
	})
	r := <-results
	if r.err != nil {
		close(leave)
		t.Fatal(r.err)
	}
	defer r.w.Close()
	isThreads := func(m kernstream.Mount) bool { return m.FSSource == "thread" }
	if !slices.ContainsFunc(r.mounts, isThreads) {
		t.Error("Mounts returned the table of another thread")
	}
	l := &lab{t: t, w: r.w, table: map[uint32]kernstream.Mount{}}
	e := l.receive()
	l.apply(e)
	if !slices.ContainsFunc(e.Mounted, isThreads) {
		t.Error("WatchMounts follows the table of another thread")
	}
	close(leave)
	if via == kernstream.ViaFanotify {
		wantEnd(t, l, via)
		return
	}
	r.w.Rescan()
	select {
	case e, ok := <-r.w.C:
		t.Errorf("event %v (C open: %v, Err %v); want none when the thread has ended", e, ok, r.w.Err())
	case <-time.After(30 * time.Millisecond):
	}
}

// onNewThread runs f in the background, on a thread that is not the main one
// and ends with it.
func onNewThread(f func()) {
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread would stay, and be what /proc/self shows.
			defer runtime.UnlockOSThread()
			onNewThread(f)
			time.Sleep(10 * time.Millisecond)
			return
		}
		f()
	}()
}

// TestMountUnprivileged: a user without any privilege can follow the table, and
// that of a process of somebody else.
func TestMountUnprivileged(t *testing.T) {
	testenv.NeedRoot(t, "another user")
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	cmd := testenv.Child(t, "nobody", fmt.Sprint(os.Getpid()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.Output(); err != nil || string(out) != "ok\n" {
		t.Errorf("%v: %s", err, out)
	}
}

func init() {
	testenv.RegisterChild("nobody", func(args []string) int {
		var pid int
		fmt.Sscan(args[0], &pid)
		for _, options := range []*kernstream.MountOptions{nil, {PID: pid}} {
			w, err := kernstream.WatchMounts(context.Background(), options)
			if err != nil {
				fmt.Println(err)
				return 1
			}
			if e := <-w.C; !e.Initial || len(e.Mounted) == 0 {
				fmt.Println("event", e)
				return 1
			}
			w.Close()
		}
		fmt.Println("ok")
		return 0
	})
}

// TestMountHiddenProcess: a process that runs but is not shown by /proc is not
// said to be gone.
func TestMountHiddenProcess(t *testing.T) {
	testenv.NeedRoot(t, "another user")
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	cmd := testenv.Child(t, "hidden", fmt.Sprint(os.Getpid()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	if out, err := cmd.Output(); err != nil || string(out) != "true false hidepid\n" {
		t.Errorf("%v: %s; want a permission error that says why", err, out)
	}
}

func init() {
	testenv.RegisterChild("hidden", func(args []string) int {
		var pid int
		fmt.Sscan(args[0], &pid)
		if err := unix.Mount("proc", "/proc", "proc", 0, "hidepid=2"); err != nil {
			fmt.Println(err)
			return 1
		}
		// Group 0 would see all processes.
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(65534, 65534, 65534), syscall.Setresuid(65534, 65534, 65534)); err != nil {
			fmt.Println(err)
			return 1
		}
		_, err := kernstream.Mounts(&kernstream.MountOptions{PID: pid})
		if err == nil || !strings.Contains(err.Error(), "hidepid") {
			fmt.Println(err)
			return 1
		}
		fmt.Println(errors.Is(err, fs.ErrPermission), errors.Is(err, os.ErrProcessDone), "hidepid")
		return 0
	})
}

// TestMountLeaderless: a process whose main thread has ended is not said to be
// gone, although it has no mount table any more.
func TestMountLeaderless(t *testing.T) {
	testenv.NoLeaks(t)
	cmd := testenv.Child(t, "leaderless")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	waitForZombie(t, cmd.Process.Pid)
	_, err = kernstream.Mounts(&kernstream.MountOptions{PID: cmd.Process.Pid})
	if err == nil || errors.Is(err, os.ErrProcessDone) || !strings.Contains(err.Error(), "main thread") {
		t.Errorf("Mounts returned %v; want an error about the main thread", err)
	}
}

func init() {
	testenv.RegisterChild("leaderless", func([]string) int {
		go func() {
			runtime.LockOSThread()
			fmt.Println("ready")
			unix.Nanosleep(&unix.Timespec{Sec: 60}, nil)
		}()
		time.Sleep(50 * time.Millisecond)
		syscall.RawSyscall(syscall.SYS_EXIT, 0, 0, 0) // the main thread alone
		return 0
	})
}

// TestMountFilterPanics: when the filter panics, the caller of WatchMounts may
// recover, and nothing is left of the watcher.
func TestMountFilterPanics(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	options := &kernstream.MountOptions{Filter: func(*kernstream.Mount) bool { panic("odd") }}
	for _, call := range []func(){
		func() { kernstream.WatchMounts(t.Context(), options) },
		func() { kernstream.Mounts(options) },
	} {
		func() {
			defer func() {
				if recover() != "odd" {
					t.Error("the panic did not reach the caller")
				}
			}()
			call()
		}()
	}
}

// TestMountTwoWatchers: watchers in one process do not take each other's
// events.
func TestMountTwoWatchers(t *testing.T) {
	l := newLab(t, nil)
	other := &lab{t: t, dir: l.dir}
	other.watch(t.Context(), nil)
	for i := range 50 {
		name := fmt.Sprint("m", i)
		l.tmpfs(name)
		for _, each := range []*lab{l, other} {
			e := each.receive()
			each.apply(e)
			each.want(e, "", "", "", name)
		}
	}
}

// TestMountContext: with a context that is done, WatchMounts returns its cause.
func TestMountContext(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errCause)
	if w, err := kernstream.WatchMounts(ctx, nil); w != nil || err != errCause {
		t.Errorf("WatchMounts returned %v, %v; want nil and the cause", w, err)
	}
}

// TestMountMerged: a merged watcher can still be told to rescan.
func TestMountMerged(t *testing.T) {
	l := newLab(t, nil)
	dir := l.tmpfs("a")
	l.untilMark()
	l.quiet("a look that is pending would find it first")
	all := kernstream.Merge(t.Context(), l.w)
	defer all.Close()
	mount(t, "", dir, "", unix.MS_SHARED, "")
	l.w.Rescan()
	select {
	case e := <-all.C:
		if m := e.(*kernstream.MountEvent); len(m.Changed) != 1 || !m.Resync {
			t.Errorf("event %v", e)
		}
	case <-time.After(patience):
		t.Fatal("no event")
	}
}

// TestMountRescanPeriod: with a period, what wakes nobody is found without
// being asked for.
func TestMountRescanPeriod(t *testing.T) {
	l := newLab(t, &kernstream.MountOptions{Rescan: 20 * time.Millisecond})
	dir := l.tmpfs("a")
	l.untilMark()
	l.quiet("a look that is pending would find it first")
	mount(t, "", dir, "", unix.MS_SHARED, "")
	e := l.receive()
	l.apply(e)
	l.want(e, "", "", "a", "")
	if !e.Resync {
		t.Errorf("%v does not have Resync", e)
	}
}

// TestSplitOptions: options are split at commas, and then decoded.
func TestSplitOptions(t *testing.T) {
	for text, want := range map[string][]string{
		"":                              nil,
		"rw":                            {"rw"},
		`rw,lowerdir=/a\054b:/c\040d`:   {"rw", "lowerdir=/a,b:/c d"},
		`k=v=w,k=v,x\134y,\9,lowerdir+`: {"k=v=w", "k=v", `x\y`, `\9`, "lowerdir+"},
		`rw,context="u:r:t:s0:c1,c2",x`: {"rw", "context=u:r:t:s0:c1,c2", "x"},
		`rw,context="u:r:t:s0:c1,c2"`:   {"rw", "context=u:r:t:s0:c1,c2"},
		`lowerdir=/a"b,x="y,z`:          {`lowerdir=/a"b`, `x="y`, "z"},
	} {
		if got := kernstream.SplitOptions(text); !slices.Equal(got, want) {
			t.Errorf("SplitOptions(%q) is %q; want %q", text, got, want)
		}
	}
}

// TestMountEventJSON: an event as JSON has the documented keys; bytes that are
// not text are kept beside a readable form; an odd row is kept as it is.
func TestMountEventJSON(t *testing.T) {
	when := time.Date(2026, 3, 4, 5, 6, 7, 89, time.FixedZone("east", 3600))
	e := &kernstream.MountEvent{
		When: when, Via: kernstream.ViaMountinfo, Coalesced: true,
		Mounted: []kernstream.Mount{{
			ID: 1 << 33, ParentID: 2, MountInfoID: 3, MountInfoParentID: 4, Major: 8, Minor: 1, Root: "/", MountPoint: "/\xff<&>",
			Options: "rw", Optional: []string{"shared:1"}, FSType: "ext4", FSSource: "", SuperOptions: "rw",
		}},
		Unmounted: []kernstream.Mount{{MountInfoID: 9, Raw: []byte("9 odd\xff")}},
		Moved:     []kernstream.MountChange{{Old: kernstream.Mount{MountPoint: "/a"}, New: kernstream.Mount{MountPoint: "/b"}}},
	}
	want := `{"time":"2026-03-04T04:06:07.000000089Z","source":"mount","initial":false,"coalesced":true,"resync":false,"via":"mountinfo",` +
		`"mounted":[{"id":8589934592,"parent_id":2,"mountinfo_id":3,"mountinfo_parent_id":4,"dev":"8:1","root":"/","mount_point":"/` + "\ufffd" + `<&>","mount_point_raw":"L/88Jj4=",` +
		`"options":"rw","optional":["shared:1"],"fs_type":"ext4","fs_source":"","super_options":"rw"}],` +
		`"unmounted":[{"mountinfo_id":9,"row":"9 odd` + "\ufffd" + `","row_raw":"OSBvZGT/"}],` +
		`"moved":[{"old":{"dev":"0:0","root":"","mount_point":"/a","options":"","optional":[],"fs_type":"","fs_source":"","super_options":""},` +
		`"new":{"dev":"0:0","root":"","mount_point":"/b","options":"","optional":[],"fs_type":"","fs_source":"","super_options":""}}],"changed":[]}`
	got, err := e.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	// The replacement character may be written as itself or as an escape.
	if text := strings.ReplaceAll(string(got), `\ufffd`, "\ufffd"); text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	value, err := json.Marshal(e.Mounted[0])
	if err != nil || !strings.Contains(string(value), `"mount_point_raw":"L/88Jj4="`) {
		t.Errorf("a Mount is %s, %v", value, err)
	}
	var any map[string]any
	whole, err := json.Marshal(e)
	if err != nil || json.Unmarshal(whole, &any) != nil {
		t.Errorf("json.Marshal: %v", err)
	}
	if !e.Time().Equal(when) {
		t.Errorf("Time is %v", e.Time())
	}
}

// TestMountEventString: an event in one line, whatever is in it.
func TestMountEventString(t *testing.T) {
	m := func(point string) kernstream.Mount { return kernstream.Mount{MountPoint: point, FSType: "tmpfs"} }
	for want, e := range map[string]*kernstream.MountEvent{
		"mounts: -/a(tmpfs) >/b(tmpfs) to /c(tmpfs) +\"/d e\"(tmpfs)": {
			Unmounted: []kernstream.Mount{m("/a")}, Moved: []kernstream.MountChange{{Old: m("/b"), New: m("/c")}}, Mounted: []kernstream.Mount{m("/d e")},
		},
		"mounts coalesced resync: ~/a(tmpfs)":                        {Coalesced: true, Resync: true, Changed: []kernstream.MountChange{{New: m("/a")}}},
		"mounts initial: 5 mounted, 0 unmounted, 0 moved, 0 changed": {Initial: true, Mounted: make([]kernstream.Mount, 5)},
		`mounts: +"/a\r\x1b"("fu\nse")`:                              {Mounted: []kernstream.Mount{{MountPoint: "/a\r\x1b", FSType: "fu\nse"}}},
		`mounts: +unreadable row "odd\n"`:                            {Mounted: []kernstream.Mount{{Raw: []byte("odd\n")}}},
	} {
		if got := e.String(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
