package kernstream_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What tests of processes stand on: children that end when they are told to,
// and other processes that have children of their own.

// A victim is a child of this process that waits to be ended.
type victim struct {
	*exec.Cmd
	stdin  io.WriteCloser
	waited bool
}

// newVictim starts a shell that runs script once it is ended. It is reaped by
// the end of the test.
func newVictim(t testing.TB, script string) *victim {
	t.Helper()
	v, err := startVictim(script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.end()
		v.reap()
	})
	return v
}

func startVictim(script string) (*victim, error) {
	v := &victim{Cmd: victimCommand(script)}
	var err error
	if v.stdin, err = v.StdinPipe(); err != nil {
		return nil, err
	}
	return v, v.Start()
}

func victimCommand(script string) *exec.Cmd { return exec.Command("/bin/sh", "-c", "read x; "+script) }

func (v *victim) pid() int { return v.Process.Pid }

// end lets the victim run its script.
func (v *victim) end() { v.stdin.Close() }

// reap waits for the victim, and returns how it ended.
func (v *victim) reap() syscall.WaitStatus {
	if !v.waited {
		v.waited = true
		v.Wait()
	}
	if v.ProcessState == nil {
		return 0
	}
	return v.ProcessState.Sys().(syscall.WaitStatus)
}

// zombie ends the victim and waits until it is a zombie.
func (v *victim) zombie(t testing.TB) {
	t.Helper()
	v.end()
	awaitExit(t, v.pid())
}

// awaitExit waits until a process has ended.
func awaitExit(t testing.TB, pid int) {
	t.Helper()
	if err := exited(pid); err != nil {
		t.Fatal(err)
	}
}

func exited(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return pollFor(fd, unix.POLLIN)
}

// pollFor waits until a descriptor reports one of events.
func pollFor(fd int, events int16) error {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		if _, err := unix.Poll(fds, 100); err != nil && err != unix.EINTR {
			return err
		}
		if fds[0].Revents&events != 0 {
			return nil
		}
	}
	return fmt.Errorf("no %#x after %v", events, patience)
}

// next returns the next event.
func next(t testing.TB, c <-chan *kernstream.ProcessEvent) *kernstream.ProcessEvent {
	t.Helper()
	select {
	case e, ok := <-c:
		if !ok {
			t.Fatal("the channel is closed; want an event")
		}
		return e
	case <-time.After(patience):
		t.Fatalf("no event after %v", patience)
	}
	return nil
}

// none fails the test if there is an event soon.
func none(t testing.TB, c <-chan *kernstream.ProcessEvent) {
	t.Helper()
	select {
	case e, ok := <-c:
		t.Errorf("event %v (C open: %v); want none", e, ok)
	case <-time.After(20 * time.Millisecond):
	}
}

// over waits for the end of a stream and returns its error. There must be no
// event any more.
func over(t testing.TB, s *kernstream.Stream[*kernstream.ProcessEvent]) error {
	t.Helper()
	select {
	case e, ok := <-s.C:
		if ok {
			t.Errorf("event %v; want the end of the stream", e)
		}
	case <-time.After(patience):
		t.Fatalf("the stream does not end")
	}
	return s.Err()
}

// want fails the test unless e is the phase of a process with that status; a
// negative status is one that is not known.
func want(t testing.TB, e *kernstream.ProcessEvent, pid int, phase kernstream.Phase, status int) {
	t.Helper()
	if e.Process.PID != pid || e.Phase != phase {
		t.Errorf("event %v; want %d %v", e, pid, phase)
	}
	if e.StatusKnown != (status >= 0) || e.StatusKnown && int(e.Status) != status {
		t.Errorf("event %v has status %#x, known: %v; want %#x", e, int(e.Status), e.StatusKnown, status)
	}
	if age := time.Since(e.When); age < 0 || age > time.Minute {
		t.Errorf("event %v is of %v", e, e.When)
	}
}

// exit is the status of a process that returned code.
func exit(code int) int { return code << 8 }

const unknown = -1

func watchProcess(t testing.TB, ctx context.Context, target kernstream.Target, options *kernstream.ProcessOptions) *kernstream.Stream[*kernstream.ProcessEvent] {
	t.Helper()
	s, err := kernstream.WatchProcess(ctx, target, options)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newProcessWatcher(t testing.TB) *kernstream.ProcessWatcher {
	t.Helper()
	w, err := kernstream.NewProcessWatcher(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func watch(t testing.TB, w *kernstream.ProcessWatcher, target kernstream.Target, options *kernstream.ProcessOptions) *kernstream.Watch {
	t.Helper()
	watch, err := w.Watch(target, options)
	if err != nil {
		t.Fatal(err)
	}
	return watch
}

// untilReaped asks for both phases.
var untilReaped = &kernstream.ProcessOptions{Until: kernstream.Reaped}

// reapingTold tells whether this kernel tells of the reaping of processes, and
// reapedStatus whether it then tells the status.
func reapingTold() bool  { return testenv.KernelAtLeast(6, 9) }
func reapedStatus() bool { return testenv.KernelAtLeast(6, 15) }

// countDescriptors returns how many descriptors this process has.
func countDescriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func countThreads(t testing.TB) int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(tasks)
}

// A keeper is a process that has children, and watches processes, as it is
// told (see keeperMain).
type keeper struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func newKeeper(t testing.TB, attributes *syscall.SysProcAttr) *keeper {
	t.Helper()
	return newKeeperWith(t, attributes)
}

// newKeeperWith passes files on, as descriptors from 3 on.
func newKeeperWith(t testing.TB, attributes *syscall.SysProcAttr, files ...*os.File) *keeper {
	t.Helper()
	k := &keeper{t: t, cmd: testenv.Child(t, "keeper")}
	k.cmd.SysProcAttr = attributes
	k.cmd.ExtraFiles = files
	in, err := k.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	k.in, k.out = in, bufio.NewReader(out)
	t.Cleanup(func() {
		in.Close()
		k.cmd.Wait()
	})
	k.do("ready")
	return k
}

// as returns attributes for a keeper that belongs to another user.
func as(uid uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
}

// do lets the keeper do one thing and returns its answer.
func (k *keeper) do(words ...string) string {
	k.t.Helper()
	if _, err := fmt.Fprintln(k.in, strings.Join(words, "\t")); err != nil {
		k.t.Fatal(err)
	}
	answer, err := k.out.ReadString('\n')
	if err != nil {
		k.t.Fatalf("keeper: %q: %v", words, err)
	}
	text, ok := strings.CutPrefix(answer, "ok ")
	if !ok {
		k.t.Fatalf("keeper: %q: %s", words, answer)
	}
	return strings.TrimSuffix(text, "\n")
}

func (k *keeper) number(words ...string) int {
	k.t.Helper()
	n, err := strconv.Atoi(k.do(words...))
	if err != nil {
		k.t.Fatal(err)
	}
	return n
}

// fork starts a child of the keeper that runs script once it is ended.
func (k *keeper) fork(script string) (pid int) { return k.number("fork", script) }

// zombie ends a child and waits until it is a zombie.
func (k *keeper) zombie(pid int) {
	k.t.Helper()
	k.do("end", fmt.Sprint(pid))
	awaitExit(k.t, pid)
}

func (k *keeper) end(pid int)  { k.do("end", fmt.Sprint(pid)) }
func (k *keeper) reap(pid int) { k.do("reap", fmt.Sprint(pid)) }

func init() { testenv.RegisterChild("keeper", keeperMain) }

// keeperMain obeys lines of words on its standard input.
func keeperMain([]string) int {
	k := &keeping{victims: map[string]*victim{}}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		text, err := k.obey(strings.Split(lines.Text(), "\t"))
		if err != nil {
			fmt.Printf("%v\n", err)
			continue
		}
		fmt.Printf("ok %s\n", text)
	}
	for _, v := range k.victims {
		v.Process.Kill()
		v.reap()
	}
	return 0
}

type keeping struct {
	victims map[string]*victim
	stream  *kernstream.Stream[*kernstream.ProcessEvent]
}

func (k *keeping) obey(words []string) (string, error) {
	word := func(i int) string {
		if i < len(words) {
			return words[i]
		}
		return ""
	}
	number := func(i int) int {
		n, _ := strconv.Atoi(word(i))
		return n
	}
	switch word(0) {
	case "ready":
		return "", nil
	case "pid":
		return fmt.Sprint(os.Getpid()), nil
	case "fork": // SCRIPT
		v, err := startVictim(word(1))
		if err != nil {
			return "", err
		}
		pid := fmt.Sprint(v.pid())
		k.victims[pid] = v
		return pid, nil
	case "end": // PID
		k.victims[word(1)].end()
		return "", nil
	case "reap": // PID
		k.victims[word(1)].reap()
		delete(k.victims, word(1))
		return "", nil
	case "ignore": // children are reaped at once
		signal.Ignore(unix.SIGCHLD)
		return "", nil
	case "watch": // PID, "reaped" or nothing; the answer is the error, if any
		var options *kernstream.ProcessOptions
		if word(2) == "reaped" {
			options = untilReaped
		}
		return "", k.watch(kernstream.PID(number(1)), options)
	case "watch pidfd": // a pidfd that was passed on, as descriptor 3
		return "", k.watch(kernstream.PidFD(os.NewFile(3, "pidfd")), untilReaped)
	case "event": // of that
		select {
		case e, ok := <-k.stream.C:
			if !ok {
				return fmt.Sprintf("end %v", k.stream.Err()), nil
			}
			text, err := e.MarshalJSON()
			return string(text), err
		case <-time.After(patience):
			return "", errors.New("no event")
		}
	case "refuse": // ERRNO, for pidfd_open(2), from now on
		return "", testenv.Refuse(syscall.Errno(number(1)), testenv.Refusal{Call: unix.SYS_PIDFD_OPEN})
	case "errors": // PID; what the error of a watch is
		err := k.watch(kernstream.PID(number(1)), nil)
		return fmt.Sprintf("done %t, permission %t, unsupported %t: %v", errors.Is(err, os.ErrProcessDone),
			errors.Is(err, fs.ErrPermission), errors.Is(err, errors.ErrUnsupported), err), nil
	case "mount proc": // of the own process ID namespace
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return "", err
		}
		return "", unix.Mount("proc", "/proc", "proc", 0, "")
	case "unmount proc": // which shows the one below
		return "", unix.Unmount("/proc", unix.MNT_DETACH)
	case "hide proc":
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return "", err
		}
		return "", unix.Mount("none", "/proc", "tmpfs", 0, "")
	case "kill": // PID
		return "", k.victims[word(1)].Process.Kill()
	case "choose", "recycle", "hammer":
		return obeyHammer(words)
	}
	return "", fmt.Errorf("unknown word %q", words)
}

func (k *keeping) watch(target kernstream.Target, options *kernstream.ProcessOptions) (err error) {
	k.stream, err = kernstream.WatchProcess(context.Background(), target, options)
	return err
}

// pidNamespace returns attributes for a keeper in a process ID namespace of its
// own. It needs a mount namespace, too, for a /proc of its own.
func pidNamespace(t testing.TB) *syscall.SysProcAttr {
	t.Helper()
	testenv.NeedMounts(t)
	return &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
}

// mountProc gives a keeper in a process ID namespace a /proc of it.
func (k *keeper) mountProc() {
	k.t.Helper()
	if _, err := fmt.Fprintln(k.in, "mount proc"); err != nil {
		k.t.Fatal(err)
	}
	answer, err := k.out.ReadString('\n')
	if err != nil {
		k.t.Fatal(err)
	}
	if !strings.HasPrefix(answer, "ok") {
		testenv.Missing(k.t, "needs to mount a proc file system", fmt.Errorf("%s: %w", strings.TrimSpace(answer), fs.ErrPermission))
	}
}

// pidfdFile opens a pidfd as a file of the test.
func pidfdFile(t testing.TB, pid, flags int) *os.File {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, flags)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join("pidfd", fmt.Sprint(pid)))
	t.Cleanup(func() { f.Close() })
	return f
}
