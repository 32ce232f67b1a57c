package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// The tables of others: of another process, of a namespace file, of a thread,
// and of those that are hidden, have no leader, or are gone.

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
	wantForbidden(t, cmd, "CAP_SYS_ADMIN")

	cmd = testenv.Child(t, "enter")
	tried := make(chan struct{})
	onNewThread(func() {
		defer close(tried)
		// What this thread starts cannot have it.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_CHROOT, 0, 0, 0); err != nil {
			t.Error(err)
			return
		}
		wantForbidden(t, cmd, "CAP_SYS_CHROOT")
	})
	<-tried
}

func wantForbidden(t *testing.T, enter *exec.Cmd, missing string) {
	t.Helper()
	out, err := enter.Output()
	if text := string(out); err != nil || !strings.Contains(text, "permission: true") || !strings.Contains(text, missing) {
		t.Errorf("%v: the error is %s; want that %s is missing", err, text, missing)
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
	cmd := testenv.Child(t, "nobody's mounts", fmt.Sprint(os.Getpid()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.Output(); err != nil || string(out) != "ok\n" {
		t.Errorf("%v: %s", err, out)
	}
}

func init() {
	testenv.RegisterChild("nobody's mounts", func(args []string) int {
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
