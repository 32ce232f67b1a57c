package kernstream_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What the kernel does with pidfds, in all its odd cases, and what a program
// sees of it. Of what is known of the kernel, this is not here:
//
//   - Flags that pidfd_open(2) does not know, PIDFD_SELF and
//     CLONE_PIDFD_AUTOKILL: nothing here passes them on.
//   - name_to_handle_at(2) and extended attributes of a pidfd: not used.
//   - Reading, writing and seeking a pidfd: nothing here does.
//   - The proc connector: another source.
//   - That the status of a process whose threads end one by one is the last
//     one's: no Go program can end so.
//   - A process that is killed while it sleeps uninterruptibly: the test would
//     need a device that hangs. The kernel reports the end, not the signal.
//   - A table of open files of the whole system that is full (ENFILE), and
//     fs.epoll.max_user_watches (ENOSPC): they cannot be reached without
//     disturbing others. The texts of their errors are tested apart.

// TestProcessStranger: the life of somebody else's child. Nothing is told while
// it runs, its end when it is a zombie, and its reaping when its parent waits,
// with a status that everybody may know.
func TestProcessStranger(t *testing.T) {
	testenv.NoLeaks(t)
	keeper := newKeeper(t, nil)
	for _, test := range []struct {
		script string
		status int
	}{
		{"exit 42", exit(42)},
		{"exit 0", exit(0)},
		{"kill -KILL $$", int(unix.SIGKILL)},
	} {
		pid := keeper.fork(test.script)
		options := &kernstream.ProcessOptions{}
		if reapingTold() {
			options = untilReaped
		}
		s := watchProcess(t, t.Context(), kernstream.PID(pid), options)
		none(t, s.C)
		keeper.zombie(pid)
		want(t, next(t, s.C), pid, kernstream.Exited, test.status)
		if reapingTold() {
			none(t, s.C)
			keeper.reap(pid)
			want(t, next(t, s.C), pid, kernstream.Reaped, test.status)
		}
		if err := over(t, s); err != nil {
			t.Error(err)
		}
	}
	testenv.Feature(t, "status of the zombie of another process", "/proc/PID/stat")
}

// TestProcessZombieAsRoot: to root, the status of a zombie that belongs to
// another user is
// known, 0 too.
func TestProcessZombieAsRoot(t *testing.T) {
	testenv.NeedRoot(t, "another user")
	testenv.NoLeaks(t)
	keeper := newKeeper(t, as(65534))
	for _, code := range []int{0, 7} {
		pid := keeper.fork(fmt.Sprint("exit ", code))
		keeper.zombie(pid)
		s := watchProcess(t, t.Context(), kernstream.PID(pid), nil)
		want(t, next(t, s.C), pid, kernstream.Exited, exit(code))
	}
}

// TestProcessZombieAsSameUser: so is that of a zombie of the same user.
func TestProcessZombieAsSameUser(t *testing.T) {
	testenv.NeedRoot(t, "another user")
	testenv.NoLeaks(t)
	keeper, observer := newKeeper(t, as(65534)), newKeeper(t, as(65534))
	for _, code := range []int{0, 7} {
		pid := keeper.fork(fmt.Sprint("exit ", code))
		keeper.zombie(pid)
		observer.do("watch", fmt.Sprint(pid))
		if e := observer.event(); !e.StatusKnown || e.ExitCode == nil || *e.ExitCode != code {
			t.Errorf("exit %d: event %+v", code, e)
		}
	}
}

// TestProcessZombieAsAnotherUser: to another user the status of a zombie is
// unknown, and never taken for 0. When the zombie is reaped, everybody may know.
func TestProcessZombieAsAnotherUser(t *testing.T) {
	testenv.NeedRoot(t, "another user")
	testenv.NoLeaks(t)
	keeper, observer := newKeeper(t, as(65534)), newKeeper(t, as(65533))
	for _, code := range []int{0, 7} {
		pid := keeper.fork(fmt.Sprint("exit ", code))
		keeper.zombie(pid)
		if !reapingTold() {
			observer.do("watch", fmt.Sprint(pid))
			if e := observer.event(); e.StatusKnown || e.ExitCode != nil {
				t.Errorf("exit %d: event %+v", code, e)
			}
			continue
		}
		observer.do("watch", fmt.Sprint(pid), "reaped")
		if e := observer.event(); e.StatusKnown || e.ExitCode != nil || e.Phase != "exited" {
			t.Errorf("exit %d: event %+v", code, e)
		}
		keeper.reap(pid)
		e := observer.event()
		if e.Phase != "reaped" || e.StatusKnown != reapedStatus() || e.StatusKnown && *e.ExitCode != code {
			t.Errorf("exit %d: event %+v", code, e)
		}
	}
	path := "unknown"
	if reapedStatus() {
		path = "PIDFD_GET_INFO"
	}
	testenv.Feature(t, "status of a process that was reaped", path)
}

// observed is an event as a keeper tells it.
type observed struct {
	PID         int    `json:"pid"`
	ID          uint64 `json:"id"`
	Phase       string `json:"phase"`
	StatusKnown bool   `json:"status_known"`
	ExitCode    *int   `json:"exit_code"`
	Signal      string `json:"signal"`
}

// event returns the next event of the keeper's watch.
func (k *keeper) event() (e observed) {
	k.t.Helper()
	text := k.do("event")
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		k.t.Fatalf("%q: %v", text, err)
	}
	return e
}

// TestProcessReapedAtOnce: a parent that ignores SIGCHLD lets the kernel reap.
// Both phases come, with the status from Linux 6.15 on.
func TestProcessReapedAtOnce(t *testing.T) {
	testenv.NoLeaks(t)
	keeper := newKeeper(t, nil)
	keeper.do("ignore")
	w := newProcessWatcher(t)
	status := unknown
	if reapedStatus() {
		status = exit(3)
	}
	for range 20 {
		pid := keeper.fork("exit 3")
		watch(t, w, kernstream.PID(pid), nil)
		if reapingTold() {
			watch(t, w, kernstream.PID(pid), untilReaped)
		}
		keeper.end(pid)
		n := 1
		if reapingTold() {
			n = 3
		}
		for range n {
			e := next(t, w.C)
			if !reapedStatus() && e.StatusKnown {
				status = exit(3) // the library was quicker than the kernel
			}
			want(t, e, pid, e.Phase, status)
		}
	}
}

// TestProcessWaitInAnyOrder: the caller's Wait works before the event, after it
// and at the same time, whichever way the process was named; the status is
// known.
func TestProcessWaitInAnyOrder(t *testing.T) {
	testenv.NoLeaks(t)
	w := newProcessWatcher(t)
	for _, kind := range []string{"PID", "OfProcess", "PidFD", "Saved"} {
		for _, order := range []string{"before", "after", "during", "long before"} {
			v := newVictim(t, "exit 5")
			target := targetOf(t, kind, v)
			if order != "long before" {
				watch(t, w, target, nil)
			}
			p, err := w.Open(target)
			if err != nil {
				t.Fatal(err)
			}
			waited := make(chan syscall.WaitStatus, 1)
			wait := func() { waited <- v.reap() }
			switch order {
			case "before":
				go wait()
				time.Sleep(time.Millisecond)
				v.end()
			case "during":
				v.end()
				go wait()
			case "after":
				v.end()
			case "long before":
				v.end()
				wait()
				if _, err := p.Watch(nil); err != nil {
					t.Fatal(err)
				}
			}
			e := next(t, w.C)
			// Who reaps a child before anybody has looked takes the status
			// along, until the kernel keeps it for pidfds.
			if order == "after" || reapedStatus() {
				want(t, e, v.pid(), kernstream.Exited, exit(5))
			}
			if order == "after" {
				go wait()
			}
			if status := <-waited; int(status) != exit(5) {
				t.Errorf("%s, %s: Wait returned status %#x", kind, order, status)
			}
			p.Close()
		}
	}
}

// TestProcessStops: stopping, going on, and executing another program are not
// the end of a process.
func TestProcessStops(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exec /bin/sh -c 'kill -STOP $$; exit 2'")
	s := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	id := idOf(t, v.pid())
	v.end()
	waitForState(t, v.pid(), "T")
	none(t, s.C)
	if now := idOf(t, v.pid()); now != id {
		t.Errorf("the ID is %+v after execve; want %+v", now, id)
	}
	v.Process.Signal(unix.SIGCONT)
	want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(2))
}

// waitForState waits until /proc/PID/stat shows one of states.
func waitForState(t testing.TB, pid int, states string) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		if after := string(text[strings.LastIndexByte(string(text), ')')+1:]); strings.Contains(states, after[1:2]) {
			return
		}
	}
	t.Fatalf("process %d does not come to state %s", pid, states)
}

// TestProcessMainThread: a process ends with its last thread, not with its main
// thread, and has the status of the whole. A thread that executes a program
// takes the place of the main thread, also of one that is gone.
func TestProcessMainThread(t *testing.T) {
	testenv.NoLeaks(t)
	for _, test := range []struct {
		name   string
		status int
	}{
		{"leader ends, group exits", exit(7)},
		{"thread executes", exit(9)},
		{"leader ends, thread executes", exit(9)},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := testenv.Child(t, "threads", test.name)
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			pid := cmd.Process.Pid
			defer cmd.Wait()
			s := watchProcess(t, t.Context(), kernstream.PID(pid), nil)
			in.Write([]byte("1"))
			if strings.HasPrefix(test.name, "leader ends") {
				waitForState(t, pid, "Z") // as /proc shows it
				// Another one can still begin to watch.
				late := watchProcess(t, t.Context(), kernstream.OfProcess(cmd.Process), nil)
				none(t, late.C)
				late.Close()
			}
			none(t, s.C)
			in.Write([]byte("2"))
			if test.name == "thread executes" {
				none(t, s.C)
			}
			in.Close()
			want(t, next(t, s.C), pid, kernstream.Exited, test.status)
		})
	}
}

func init() {
	testenv.RegisterChild("threads", func(args []string) int {
		runtime.GOMAXPROCS(4) // a thread that ends without the runtime takes one along
		order := func() { unix.Read(0, make([]byte, 1)) }
		leaderEnds := strings.HasPrefix(args[0], "leader ends")
		started := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(started)
			if leaderEnds {
				// The main thread takes the first order.
				for leaderRuns() {
					time.Sleep(time.Millisecond)
				}
			} else {
				order()
			}
			order()
			switch {
			case strings.HasSuffix(args[0], "group exits"):
				syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 7, 0, 0)
			case strings.HasSuffix(args[0], "executes"):
				unix.Exec("/bin/sh", []string{"sh", "-c", "read x; exit 9"}, nil)
			}
		}()
		<-started
		if !leaderEnds {
			select {}
		}
		order()
		syscall.RawSyscall(syscall.SYS_EXIT, 3, 0, 0) // this thread alone
		return 0
	})
}

func leaderRuns() bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", os.Getpid()))
	return err == nil && !strings.Contains(string(text), ") Z ")
}

// TestProcessTraced: a process that somebody else traces has ended, although its
// parent cannot wait for it yet. The status is known all the same, from the
// zombie.
func TestProcessTraced(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 6")
	tracer := testenv.Child(t, "tracer", fmt.Sprint(v.pid()))
	in, err := tracer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := tracer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	defer tracer.Wait()
	defer in.Close()
	answer := make([]byte, 100)
	n, _ := out.Read(answer)
	if text := string(answer[:n]); text != "traced\n" {
		testenv.Missing(t, "needs to trace another process", fmt.Errorf("%s: %w", text, os.ErrPermission))
	}
	s := watchProcess(t, t.Context(), kernstream.PID(v.pid()), nil)
	v.end()
	want(t, next(t, s.C), v.pid(), kernstream.Exited, exit(6))
	if pid, err := unix.Wait4(v.pid(), nil, unix.WNOHANG, nil); pid != 0 || err != nil {
		t.Errorf("wait4 returned %d, %v; want nothing yet", pid, err)
	}
}

func init() {
	testenv.RegisterChild("tracer", func(args []string) int {
		var pid int
		fmt.Sscan(args[0], &pid)
		// PTRACE_SEIZE; nobody waits for what it stops for.
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0); errno != 0 {
			fmt.Println(errno)
			return 1
		}
		fmt.Println("traced")
		os.Stdin.Read(make([]byte, 1))
		return 0
	})
}

// TestProcessCoreDump: bit 0x80 of the status tells of a core dump.
func TestProcessCoreDump(t *testing.T) {
	testenv.NoLeaks(t)
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(string(pattern), "|") || strings.HasPrefix(string(pattern), "@") || strings.Contains(string(pattern), "/") {
		testenv.Missing(t, "needs core dumps in the working directory", fmt.Errorf("core_pattern is %q", pattern))
	}
	dir := t.TempDir()
	keeper := newKeeper(t, nil)
	for _, limit := range []string{"0", "unlimited"} {
		pid := keeper.fork(fmt.Sprintf("ulimit -c %s; cd %s; kill -SEGV $$", limit, dir))
		s := watchProcess(t, t.Context(), kernstream.PID(pid), nil)
		keeper.end(pid)
		e := next(t, s.C)
		if !e.StatusKnown || e.Status.Signal() != unix.SIGSEGV || e.Status.CoreDump() != (limit != "0") {
			t.Errorf("with core limit %s: event %v, status %#x", limit, e, int(e.Status))
		}
		keeper.reap(pid)
	}
}

// TestProcessNamespaces: a process is seen from the namespace around its own,
// by its number there; a pidfd that is passed on tells of the end of a process
// that has no number, and of no status.
func TestProcessNamespaces(t *testing.T) {
	testenv.NoLeaks(t)
	inner := newKeeper(t, pidNamespace(t))
	inner.mountProc()
	if pid := inner.do("pid"); pid != "1" {
		t.Fatalf("the process in the namespace has number %s there", pid)
	}
	s := watchProcess(t, t.Context(), kernstream.PID(inner.cmd.Process.Pid), nil)
	// Its own children, as it sees them itself.
	pid := inner.fork("exit 12")
	inner.do("watch", fmt.Sprint(pid))
	inner.end(pid)
	if e := inner.event(); e.PID != pid || !e.StatusKnown || *e.ExitCode != 12 {
		t.Errorf("event %+v; want the exit of %d", e, pid)
	}
	inner.reap(pid)
	inner.in.Close()
	want(t, next(t, s.C), inner.cmd.Process.Pid, kernstream.Exited, exit(0))

	if !reapingTold() {
		return
	}
	v := newVictim(t, "exit 13")
	file := pidfdFile(t, v.pid(), 0)
	stranger := newKeeperWith(t, pidNamespace(t), file)
	stranger.mountProc()
	stranger.do("watch pidfd")
	v.zombie(t)
	if e := stranger.event(); e.PID != 0 || e.ID == 0 || e.Phase != "exited" || e.StatusKnown {
		t.Errorf("event %+v; want one without a number and a status", e)
	}
	v.reap()
	if e := stranger.event(); e.PID != 0 || e.Phase != "reaped" || e.StatusKnown {
		t.Errorf("event %+v; want one without a number and a status", e)
	}
}

// TestProcessOfOtherNumbers: where /proc numbers processes in another way than
// the program does, the status of a zombie is still that of the right one.
func TestProcessOfOtherNumbers(t *testing.T) {
	testenv.NoLeaks(t)
	inner := newKeeper(t, pidNamespace(t))
	if n := inner.do("pid"); n != "1" {
		t.Fatalf("the process in the namespace has number %s there", n)
	}
	file := filepath.Join(t.TempDir(), "number")
	// A shell that has a zombie, and becomes a program that knows of no child.
	parent := inner.fork(fmt.Sprintf("(sleep 0.1; exit 14) & echo $! >%s; exec sleep 1000", file))
	defer inner.do("kill", fmt.Sprint(parent))
	inner.end(parent)
	zombie := awaitText(t, file)
	inner.do("watch", zombie)
	if e := inner.event(); fmt.Sprint(e.PID) != zombie || !e.StatusKnown || *e.ExitCode != 14 {
		t.Errorf("event %+v; want status 14 of %s", e, zombie)
	}
}

// TestProcessOtherProcMeanwhile: another /proc may be mounted during a watch. What
// is read in it is not that of a process which has the same number there.
func TestProcessOtherProcMeanwhile(t *testing.T) {
	testenv.NoLeaks(t)
	v := newVictim(t, "exit 42")
	v.zombie(t)
	inner := newKeeper(t, pidNamespace(t))
	chooseNumbers(inner)
	dir := t.TempDir()
	number, order := fmt.Sprint(v.pid()), ""
	for tries := 0; ; tries++ {
		order = filepath.Join(dir, fmt.Sprint("order", tries))
		if err := unix.Mkfifo(order, 0o600); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, fmt.Sprint("number", tries))
		// A shell that becomes a program which knows of no child.
		parent := fmt.Sprint(inner.fork(fmt.Sprintf("(read x <%s; exit 14) & echo $! >%s; exec sleep 1000", order, file)))
		defer inner.do("kill", parent)
		inner.do("choose", number)
		inner.do("end", parent)
		if awaitText(t, file) == number {
			break
		}
		if tries == 200 {
			t.Fatalf("no process gets the number %s", number)
		}
	}
	inner.mountProc()
	inner.do("watch", number)
	inner.do("unmount proc")
	writer, err := os.OpenFile(order, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	writer.Close()
	if e := inner.event(); fmt.Sprint(e.PID) != number || !e.StatusKnown || *e.ExitCode != 14 {
		t.Errorf("event %+v; want status 14 of %s", e, number)
	}
}

// awaitText returns what a file holds, once there is something.
func awaitText(t testing.TB, file string) (text string) {
	t.Helper()
	for deadline := time.Now().Add(patience); text == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nothing is in %s", file)
		}
		content, _ := os.ReadFile(file)
		text = strings.TrimSpace(string(content))
	}
	return text
}

// TestProcessWithoutProc: without /proc, the ends of processes are told all the
// same, and the status of children.
func TestProcessWithoutProc(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	keeper := newKeeper(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS})
	pid := keeper.fork("exit 15")
	v := newVictim(t, "exit 16")
	keeper.do("hide proc")
	keeper.do("watch", fmt.Sprint(pid))
	keeper.end(pid)
	if e := keeper.event(); e.PID != pid || !e.StatusKnown || *e.ExitCode != 15 {
		t.Errorf("event %+v; want status 15", e)
	}
	keeper.do("watch", fmt.Sprint(v.pid()))
	v.end()
	if e := keeper.event(); e.PID != v.pid() || e.StatusKnown {
		t.Errorf("event %+v; want the exit, without a status", e)
	}
	text := keeper.do("errors", fmt.Sprint(1<<30))
	if !strings.HasPrefix(text, "done true, permission false, unsupported false") {
		t.Error(text)
	}
}
