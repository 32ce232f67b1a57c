package kernstream_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Descriptors of processes: those that callers pass in, of threads and of peers,
// and what is said where there are none.

// TestProcessPidfdOfReaped: a pidfd of a process that was reaped still has its
// end to tell, with the status where the kernel keeps it.
func TestProcessPidfdOfReaped(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 10")
	file := pidfdFile(t, v.pid(), 0)
	v.end()
	v.reap()
	status := unknown
	if reapedStatus() {
		status = exit(10)
	}
	s := watchProcess(t, t.Context(), kernstream.PidFD(file), nil)
	want(t, next(t, s.C), 0, kernstream.Exited, status)
	if reapingTold() {
		s := watchProcess(t, t.Context(), kernstream.PidFD(file), untilReaped)
		want(t, next(t, s.C), 0, kernstream.Exited, status)
		want(t, next(t, s.C), 0, kernstream.Reaped, status)
	}
}

// TestProcessPeer: the pidfd of the peer of a socket (SO_PEERPIDFD) is a target.
func TestProcessPeer(t *testing.T) {
	testenv.NeedKernel(t, 6, 5, "SO_PEERPIDFD")
	testenv.NoLeaks(t)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "socket"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	cmd := testenv.Child(t, "peer", listener.Addr().String())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := listener.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	file := peerPidfd(t, conn)
	defer file.Close()
	s := watchProcess(t, t.Context(), kernstream.PidFD(file), nil)
	file.Close() // it stays the caller's
	conn.Write([]byte("x"))
	want(t, next(t, s.C), cmd.Process.Pid, kernstream.Exited, exit(11))
	cmd.Wait()
}

func peerPidfd(t testing.TB, conn *net.UnixConn) *os.File {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fd int
	cerr := raw.Control(func(c uintptr) {
		fd, err = unix.GetsockoptInt(int(c), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if err := errors.Join(cerr, err); err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "peer")
}

func init() {
	testenv.RegisterChild("peer", func(args []string) int {
		conn, err := net.Dial("unix", args[0])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		conn.Read(make([]byte, 1))
		return 11
	})
}

// TestProcessThreadPidfd: a pidfd of one thread is refused, that of the main
// thread, too.
func TestProcessThreadPidfd(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "PIDFD_THREAD")
	testenv.NoLeaks(t)
	own, other := pidfdFile(t, os.Getpid(), unix.PIDFD_THREAD), pidfdFile(t, otherThread(t), unix.PIDFD_THREAD)
	files := []*os.File{own, other}
	// A descriptor that was opened again does not say what it is of.
	again, err := unix.Open(fmt.Sprint("/proc/self/fd/", other.Fd()), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		file := os.NewFile(uintptr(again), "again")
		defer file.Close()
		files = append(files, file)
	}
	for _, file := range files {
		if s, err := kernstream.WatchProcess(t.Context(), kernstream.PidFD(file), nil); !errors.Is(err, unix.EINVAL) || !strings.Contains(fmt.Sprint(err), "thread") || s != nil {
			t.Errorf("WatchProcess of a thread by %s returned %v", file.Name(), err)
		}
	}
}

// TestProcessSharedDescription: the library leaves the caller's descriptors
// alone: their flags, and that a wait on them blocks.
func TestProcessSharedDescription(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 1")
	for _, flags := range []int{0, unix.PIDFD_NONBLOCK} {
		file := pidfdFile(t, v.pid(), flags)
		raw, err := file.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		flagsNow := func() (n int) {
			raw.Control(func(fd uintptr) { n, _ = unix.FcntlInt(fd, unix.F_GETFL, 0) })
			return n
		}
		before := flagsNow()
		s := watchProcess(t, t.Context(), kernstream.PidFD(file), nil)
		if after := flagsNow(); after != before {
			t.Errorf("the flags are %#x; want %#x as before", after, before)
		}
		s.Close()
		if after := flagsNow(); after != before {
			t.Errorf("the flags are %#x after Close; want %#x as before", after, before)
		}
	}
	// The runtime's handle still blocks.
	s := watchProcess(t, t.Context(), kernstream.OfProcess(v.Process), nil)
	go func() {
		time.Sleep(10 * time.Millisecond)
		v.end()
	}()
	if status := v.reap(); int(status) != exit(1) {
		t.Errorf("Wait returned status %#x", status)
	}
	next(t, s.C)
}

// TestProcessPrivileges: any user can watch a process of root, see its end, and
// its ID.
func TestProcessPrivileges(t *testing.T) {
	testenv.NeedRoot(t, "another user")
	testenv.NoLeaks(t)
	observer := newKeeper(t, as(65534))
	v := newVictim(t, "exit 0")
	observer.do("watch", fmt.Sprint(v.pid()))
	v.end()
	if e := observer.event(); e.PID != v.pid() || e.ID == 0 || e.Phase != "exited" || e.StatusKnown {
		t.Errorf("event %+v; want the exit without a status", e)
	}
}

// TestProcessSandbox: a sandbox that forbids pidfd_open(2) makes an error that Is
// errors.ErrUnsupported, whatever number the sandbox gives.
func TestProcessSandbox(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 0")
	for _, errno := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
		keeper := newKeeper(t, nil)
		keeper.do("watch", fmt.Sprint(v.pid())) // the kernel has it
		keeper.do("refuse", fmt.Sprint(int(errno)))
		text := keeper.do("errors", fmt.Sprint(v.pid()))
		if !strings.HasPrefix(text, "done false, permission "+fmt.Sprint(errno == unix.EPERM)+", unsupported true: process: pidfd_open process "+fmt.Sprint(v.pid())) || !strings.Contains(text, "seccomp") {
			t.Errorf("%v: %s", errno, text)
		}
	}
}

// TestProcessOutOfDescriptors: with no descriptor left, the error Is EMFILE and
// says what the limit is; nothing is lost by it. An os.Process that has no
// handle for that reason is still the right one.
func TestProcessOutOfDescriptors(t *testing.T) {
	testenv.NoLeaks(t)
	victims := []*victim{newVictim(t, "exit 1"), newVictim(t, "exit 1")}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	w := newProcessWatcher(t)
	before := countDescriptors(t)
	for room := range 4 {
		var fill []int
		highest := 0
		for fd := 0; fd < before+8; {
			var err error
			if fd, err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
				t.Fatal(err)
			}
			fill = append(fill, fd)
			highest = max(highest, fd)
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(highest + 1 + room), Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		found, _ := os.FindProcess(victims[1].pid())
		_, err := w.Watch(kernstream.PID(victims[0].pid()), nil)
		s, err2 := kernstream.WatchProcess(t.Context(), kernstream.OfProcess(found), nil)
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		for _, fd := range fill {
			unix.Close(fd)
		}
		for _, err := range []error{err, err2} {
			if err != nil && (!errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), fmt.Sprint("RLIMIT_NOFILE is ", highest+1+room))) {
				t.Errorf("with %d descriptors left: %v; want EMFILE and the limit", room, err)
			}
		}
		if err == nil && room == 0 {
			t.Errorf("with no descriptor left: no error")
		}
		if s != nil {
			s.Close()
		}
		found.Release()
	}
	handleless(t, &limit)
	for _, v := range victims {
		v.end()
	}
}

// handleless makes an os.Process without a handle, of a child and of a stranger.
func handleless(t *testing.T, limit *unix.Rlimit) {
	t.Helper()
	keeper := newKeeper(t, nil)
	v := newVictim(t, "exit 1")
	find := func(pid int) *os.Process {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		defer unix.Setrlimit(unix.RLIMIT_NOFILE, limit)
		p, err := os.FindProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	child, stranger := find(v.pid()), find(keeper.cmd.Process.Pid)
	if err := child.WithHandle(func(uintptr) {}); !errors.Is(err, os.ErrNoHandle) {
		t.Fatalf("the os.Process has a handle: %v", err)
	}
	s := watchProcess(t, t.Context(), kernstream.OfProcess(child), nil)
	s.Close()
	if s, err := kernstream.WatchProcess(t.Context(), kernstream.OfProcess(find(1)), nil); !errors.Is(err, os.ErrNoHandle) || s != nil {
		t.Errorf("WatchProcess of a stranger without a handle returned %v; want os.ErrNoHandle", err)
	}
	_ = stranger
}

// TestProcessUntouchable: programs may watch themselves and process 1; nothing
// comes.
func TestProcessUntouchable(t *testing.T) {
	testenv.NoLeaks(t)
	for _, pid := range []int{1, os.Getpid(), 2} {
		if err := unix.Kill(pid, 0); err == unix.ESRCH {
			continue // a namespace without kernel threads
		}
		s := watchProcess(t, t.Context(), kernstream.PID(pid), nil)
		none(t, s.C)
		s.Close()
	}
}

// TestProcessCallersFile: the caller may close its pidfd and release its
// os.Process at any time, and a descriptor that gets their numbers is another.
func TestProcessCallersFile(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 1")
	file := pidfdFile(t, v.pid(), 0)
	s := watchProcess(t, t.Context(), kernstream.PidFD(file), nil)
	file.Close()
	found, err := os.FindProcess(v.pid())
	if err != nil {
		t.Fatal(err)
	}
	s2 := watchProcess(t, t.Context(), kernstream.OfProcess(found), nil)
	found.Release()
	v.end()
	want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(1))
	want(t, next(t, s2.C), v.pid(), kernstream.Exited, exit(1))
}

// TestProcessDescriptorsAreNotInherited: descriptors are not passed on to programs that are
// executed meanwhile.
func TestProcessDescriptorsAreNotInherited(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 1")
	s := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	defer s.Close()
	out, err := exec.Command("/bin/sh", "-c", "ls -l /proc/self/fd").Output()
	if err != nil {
		t.Fatal(err)
	}
	if text := string(out); strings.Contains(text, "pidfd") || strings.Contains(text, "eventpoll") {
		t.Errorf("a program inherits\n%s", text)
	}
}

// TestProcessNumberTooHigh: a number that no process can have is not taken for
// the one that is left of it in 32 bits.
func TestProcessNumberTooHigh(t *testing.T) {
	if strconv.IntSize == 32 {
		t.Log("there are no such numbers here")
		return
	}
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	for _, high := range []int64{1 << 32, -1 << 32} {
		pid := int(high + int64(os.Getpid()))
		process, err := os.FindProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		saved := idOf(t, os.Getpid())
		saved.PID = pid
		for _, target := range []kernstream.Target{kernstream.PID(pid), kernstream.Saved(saved), kernstream.OfProcess(process)} {
			_, err := w.Watch(target, nil)
			if gone := errors.Is(err, os.ErrProcessDone); !gone && !errors.Is(err, unix.EINVAL) || gone && !errors.Is(err, unix.ESRCH) {
				t.Errorf("%v: the error is %v; want one that says that there is no such process", target, err)
			}
		}
		process.Release()
	}
}
