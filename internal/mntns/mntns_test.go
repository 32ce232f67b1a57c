package mntns_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// lockMainVar makes the main goroutine stay on the main thread, where init
// functions run.
const lockMainVar = "KERNSTREAM_TEST_LOCK_MAIN"

func init() {
	testenv.RegisterChild(resident, beResident)
	testenv.RegisterChild(caller, beCaller)
	testenv.RegisterChild(procless, func(args []string) int {
		if err := hideProc(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return beCaller(args)
	})
	testenv.RegisterChild(mainThread, beMainThread)
	if os.Getenv(lockMainVar) != "" {
		runtime.LockOSThread()
	}
}

// TestDo: the function runs in the other namespace, sees its mounts through
// proc and through paths, and its error is the one of Do. Meanwhile and
// afterwards the process is where it was.
func TestDo(t *testing.T) {
	testenv.NoLeaks(t)
	ns := newNamespace(t)
	before := mustLook(t)
	if before.namespace == ns.name || strings.Contains(before.mountinfo, source) {
		t.Fatal("the namespace is not another one")
	}
	mine := errors.New("mine")
	for _, want := range []error{nil, mine} {
		entered, leave := make(chan error), make(chan struct{})
		result := make(chan error)
		go func() {
			result <- mntns.Do(ns.fd(), func(proc int) error {
				entered <- inside(proc, ns.dir, ns.name)
				<-leave
				return want
			})
		}()
		select {
		case err := <-entered:
			if err != nil {
				t.Error(err)
			}
		case err := <-result:
			t.Fatalf("ended without calling the function: %v", err)
		}
		if during := mustLook(t); during != before {
			t.Errorf("while it runs: %+v, before: %+v", during, before)
		}
		if _, err := os.Stat(filepath.Join(ns.dir, file)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the file is in this namespace, too: %v", err)
		}
		close(leave)
		if err := <-result; err != want {
			t.Errorf("error %v, want %v", err, want)
		}
		if after := mustLook(t); after != before {
			t.Errorf("afterwards: %+v, before: %+v", after, before)
		}
	}
	eventually(t, "threads in another namespace", func() []string { return elsewhere(t) })
}

// TestDoOwnNamespace: the namespace that the process is in is no exception.
func TestDoOwnNamespace(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	own, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	before := mustLook(t)
	err = mntns.Do(int(own.Fd()), func(proc int) error {
		if table, err := readAt(proc, "mountinfo"); table != before.mountinfo {
			return fmt.Errorf("another table, %w:\n%s", err, table)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDoWithoutProc: proc works in a namespace that has no /proc.
func TestDoWithoutProc(t *testing.T) {
	testenv.NoLeaks(t)
	ns := newNamespace(t, "without /proc")
	err := mntns.Do(ns.fd(), func(proc int) error {
		if _, err := os.Stat("/proc/self"); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the namespace has a /proc: %w", err)
		}
		return inside(proc, ns.dir, ns.name)
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDoOtherGoroutines: goroutines that the function starts are not in the
// namespace, however many threads they need, and it may call Do itself.
func TestDoOtherGoroutines(t *testing.T) {
	testenv.NoLeaks(t)
	ns := newNamespace(t)
	own := mustLook(t).namespace
	err := mntns.Do(ns.fd(), func(proc int) error {
		const n = 20
		var meet, done sync.WaitGroup
		meet.Add(n)
		problems := make([]error, n)
		for i := range n {
			done.Go(func() {
				runtime.LockOSThread() // so that each has a thread of its own
				defer runtime.UnlockOSThread()
				meet.Done()
				meet.Wait()
				if link, err := os.Readlink("/proc/thread-self/ns/mnt"); link != own {
					problems[i] = fmt.Errorf("goroutine in %q, want %q, %w", link, own, err)
				}
			})
		}
		done.Wait()
		if err := errors.Join(problems...); err != nil {
			return err
		}
		if err := mntns.Do(ns.fd(), func(proc int) error { return inside(proc, ns.dir, ns.name) }); err != nil {
			return err
		}
		return inside(proc, ns.dir, ns.name)
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDoThreadEnds: each call has a thread of its own, which is gone soon
// after it, also when many are at work at once.
func TestDoThreadEnds(t *testing.T) {
	testenv.NoLeaks(t)
	ns := newNamespace(t)
	var mu sync.Mutex
	threads := make(map[int]bool)
	call := func() error {
		return mntns.Do(ns.fd(), func(proc int) error {
			mu.Lock()
			tid := unix.Gettid()
			again := threads[tid]
			threads[tid] = true
			mu.Unlock()
			if again {
				return fmt.Errorf("thread %d is used a second time", tid)
			}
			return inside(proc, ns.dir, ns.name)
		})
	}
	gone := func() []string {
		var left []string
		for tid := range threads {
			if _, err := os.Stat("/proc/self/task/" + strconv.Itoa(tid)); err == nil {
				left = append(left, strconv.Itoa(tid))
			}
		}
		return left
	}

	for range 200 {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "threads left after 200 calls in a row", gone)

	var wg sync.WaitGroup
	problems := make([]error, 50)
	for i := range problems {
		wg.Go(func() {
			for range 4 {
				problems[i] = errors.Join(problems[i], call())
			}
		})
	}
	wg.Wait()
	if err := errors.Join(problems...); err != nil {
		t.Fatal(err)
	}
	eventually(t, "threads left after 50 goroutines", gone)
	if len(threads) != 400 {
		t.Errorf("%d threads for 400 calls", len(threads))
	}
	eventually(t, "threads in another namespace", func() []string { return elsewhere(t) })
}

// TestDoFails: the error names the system call and has the kernel's reason, the
// function is not called, and nothing is left behind.
func TestDoFails(t *testing.T) {
	testenv.NoLeaks(t)
	testenv.NeedMounts(t)
	open := func(name string) int {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return int(f.Fd())
	}
	for _, c := range []struct {
		name string
		ns   int
		want syscall.Errno
	}{
		{"UTS namespace", open("/proc/self/ns/uts"), unix.EINVAL},
		{"network namespace", open("/proc/self/ns/net"), unix.EINVAL},
		{"file", open("/proc/self/mountinfo"), unix.EINVAL},
		{"no descriptor", -1, unix.EBADF},
	} {
		for range 10 {
			called := false
			err := mntns.Do(c.ns, func(int) error { called = true; return nil })
			var call *os.SyscallError
			if !errors.As(err, &call) || call.Syscall != "setns" || call.Err != c.want || called {
				t.Errorf("%s: error %v, function called: %t; want setns: %v", c.name, err, called, c.want)
			}
		}
	}
}

// beCaller calls Do and prints what came of it.
func beCaller([]string) int {
	called := false
	err := mntns.Do(3, func(int) error { called = true; return nil })
	var call *os.SyscallError
	errors.As(err, &call)
	if call == nil {
		call = new(os.SyscallError)
	}
	fmt.Printf("called %t, call %s, permission %t, missing %t", called, call.Syscall, errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist))
	return 0
}

// call runs a child that calls Do with ns, and returns what it printed.
func call(t *testing.T, ns *namespace, child string, attr *syscall.SysProcAttr) string {
	t.Helper()
	cmd := testenv.Child(t, child)
	cmd.ExtraFiles = []*os.File{ns.File}
	cmd.SysProcAttr = attr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestDoPrivileged: a child that has the privilege is one that enters, so the
// tests below fail for the reason that they name.
func TestDoPrivileged(t *testing.T) {
	const want = "called true, call , permission false, missing false"
	if got := call(t, newNamespace(t), caller, nil); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestDoOtherUserNamespace: a process that has every privilege in another user
// namespace, and none in the one that owns the mount namespace, gets an error
// that is fs.ErrPermission.
func TestDoOtherUserNamespace(t *testing.T) {
	const want = "called false, call setns, permission true, missing false"
	attr := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	if got := call(t, newNamespace(t), caller, attr); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestDoOrdinaryUser: an ordinary user gets an error that is fs.ErrPermission.
func TestDoOrdinaryUser(t *testing.T) {
	testenv.NeedRoot(t, "another user's identity is taken")
	const want = "called false, call setns, permission true, missing false"
	attr := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if got := call(t, newNamespace(t), caller, attr); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestDoFromProcless: a process that has no /proc itself gets an error that
// says so.
func TestDoFromProcless(t *testing.T) {
	const want = "called false, call open, permission false, missing true"
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if got := call(t, newNamespace(t), procless, attr); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// beMainThread calls Do from the main goroutine while that has the main thread,
// and prints what is wrong. The arguments are the directory and the name of the
// namespace.
func beMainThread(args []string) int {
	if unix.Gettid() != unix.Getpid() {
		fmt.Print("not on the main thread; ")
	}
	before, err := look()
	if err != nil {
		fmt.Print(err)
	}
	try := func() {
		err := mntns.Do(3, func(proc int) error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("the function runs on the main thread")
			}
			if during, err := readAt(proc, "../../mountinfo"); during != before.mountinfo {
				return fmt.Errorf("the process has another table, %w", err)
			}
			if during, err := readlinkAt(proc, "../../ns/mnt"); during != before.namespace {
				return fmt.Errorf("the process is in %s, %w", during, err)
			}
			return inside(proc, args[0], args[1])
		})
		if err != nil {
			fmt.Print(err, "; ")
		}
		if after, err := look(); after != before {
			fmt.Printf("%+v, %v, before: %+v; ", after, err, before)
		}
	}
	try() // while the main thread is locked

	// With one processor, and this goroutine waiting, the one that Do starts
	// gets the thread that this one had.
	runtime.GOMAXPROCS(1)
	runtime.UnlockOSThread()
	try()
	try()
	if !mainThreadRuns() {
		fmt.Print("the main thread runs no goroutine any more")
	}
	return 0
}

// mainThreadRuns tells whether the main thread is one of those that run
// goroutines. It starts more of them at once than there are threads.
func mainThreadRuns() bool {
	const n = 50
	var meet, done sync.WaitGroup
	meet.Add(n)
	var runs atomic.Bool
	for range n {
		done.Go(func() {
			runtime.LockOSThread() // so that each has a thread of its own
			defer runtime.UnlockOSThread()
			if unix.Gettid() == unix.Getpid() {
				runs.Store(true)
			}
			meet.Done()
			meet.Wait()
		})
	}
	if unix.Gettid() == unix.Getpid() {
		runs.Store(true)
	}
	done.Wait()
	return runs.Load()
}

// TestDoFromMainThread: the main thread, whose namespace /proc/self shows, never
// enters another one, although the goroutine of Do may start on it. It is not
// lost to the program either.
func TestDoFromMainThread(t *testing.T) {
	testenv.NoLeaks(t)
	ns := newNamespace(t)
	for range 3 {
		cmd := testenv.Child(t, mainThread, ns.dir, ns.name)
		cmd.Env = append(cmd.Env, lockMainVar+"=1")
		cmd.ExtraFiles = []*os.File{ns.File}
		out, err := cmd.Output()
		if err != nil || len(out) > 0 {
			t.Fatalf("%s, %v", out, err)
		}
	}
}

// TestDoGoexit: a function that ends its goroutine does not leave the caller
// waiting.
func TestDoGoexit(t *testing.T) {
	testenv.NeedMounts(t)
	file, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	err = mntns.Do(int(file.Fd()), func(int) error {
		runtime.Goexit()
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "did not return") {
		t.Errorf("Do returned %v; want an error that says what happened", err)
	}
}
