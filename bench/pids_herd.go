package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The herd is another process of this program that forks as many processes as
// a case needs. They are very small, so that little is measured of what the
// kernel does for any process that ends (see sleeper).
//
// It reads commands from its standard input, a line each, and answers each with
// a line. It ends with its input, and kills what is left of the herd.
//
//	many N      forks N processes that sleep for ever; the answer is their numbers
//	fork        forks one that can be let end; the answer is its number
//	child       the same, but it is a child of whoever started the herd
//	exit PID    lets one end, some time after the answer, which says nothing
//	vanish PID  the same, and the kernel reaps it at once
//	stamp PID   the answer is when that one was about to end (CLOCK_MONOTONIC, ns)
//	reap PID    waits for one

// herdVar is set in the herd.
const herdVar = "KERNSTREAM_BENCH_HERD"

// herdPause is how long after the answer a process is let end: the machine
// comes to rest.
const herdPause = 2 * time.Millisecond

type herd struct {
	sleeper string         // the path of the program
	never   *os.File       // what nobody writes to
	members map[int]*beast // by process ID
}

// A beast is a process of the herd.
type beast struct {
	in, out *os.File // it ends when there is something to read; then it says when
	ours    bool     // it is a child of the herd that was not reaped
}

func herdMain() int {
	runtime.LockOSThread() // what it forks dies with this thread
	if err := serveHerd(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench: herd:", err)
		return 1
	}
	return 0
}

func serveHerd(in io.Reader, out io.Writer) error {
	h := &herd{members: map[int]*beast{}}
	program, err := newSleeper()
	if err != nil {
		return err
	}
	defer program.Close()
	h.sleeper = fmt.Sprint("/proc/self/fd/", program.Fd())
	never, end, err := os.Pipe()
	if err != nil {
		return err
	}
	defer end.Close()
	h.never = never
	defer h.kill()
	for commands := bufio.NewScanner(in); commands.Scan(); {
		name, arg, _ := strings.Cut(commands.Text(), " ")
		n, _ := strconv.Atoi(arg)
		answer, after, err := h.do(name, n)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(out, answer); err != nil {
			return err
		}
		if after != nil {
			time.Sleep(herdPause)
			after()
		}
	}
	return nil
}

// do executes a command; after is to be called some time after the answer.
func (h *herd) do(name string, n int) (answer string, after func(), err error) {
	switch name {
	case "many":
		answer, err = h.many(n)
	case "fork":
		answer, err = h.fork(0)
	case "child":
		answer, err = h.fork(unix.CLONE_PARENT)
	case "exit":
		leaveZombies()
		after = h.members[n].end
	case "vanish":
		signal.Ignore(unix.SIGCHLD)
		after = h.members[n].end
	case "stamp":
		answer, err = h.members[n].stamp()
	case "reap":
		h.reap(n)
	default:
		err = fmt.Errorf("unknown command %q", name)
	}
	return answer, after, err
}

// leaveZombies lets children that end stay zombies, after signal.Ignore.
func leaveZombies() {
	// signal.Reset leaves SIG_IGN in place; to begin to notify does not.
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	signal.Stop(c)
}

// many forks processes that share what they sleep on, which saves descriptors.
func (h *herd) many(n int) (string, error) {
	var pids strings.Builder
	for range n {
		pid, err := h.exec(h.never, h.never, 0)
		if err != nil {
			return "", err
		}
		h.members[pid] = &beast{ours: true}
		fmt.Fprint(&pids, pid, " ")
	}
	return pids.String(), nil
}

func (h *herd) fork(flags uintptr) (string, error) {
	theirs, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer theirs.Close()
	out, says, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer says.Close()
	pid, err := h.exec(theirs, says, flags)
	h.members[pid] = &beast{in: in, out: out, ours: flags == 0}
	return strconv.Itoa(pid), err
}

func (h *herd) exec(in, out *os.File, flags uintptr) (pid int, err error) {
	attributes := &syscall.SysProcAttr{Cloneflags: flags}
	if flags == 0 { // somebody else's child would take us for a parent that is dead
		attributes.Pdeathsig = syscall.SIGKILL
	}
	return syscall.ForkExec(h.sleeper, []string{"sleeper"}, &syscall.ProcAttr{Files: []uintptr{in.Fd(), out.Fd()}, Sys: attributes})
}

func (b *beast) end() { b.in.Write([]byte{1}) }

func (b *beast) stamp() (string, error) {
	var t unix.Timespec
	defer b.in.Close()
	defer b.out.Close()
	_, err := io.ReadFull(b.out, unsafe.Slice((*byte)(unsafe.Pointer(&t)), unsafe.Sizeof(t)))
	return strconv.FormatInt(t.Nano(), 10), err
}

func (h *herd) reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			h.members[pid].ours = false // its number may be another's from here on
			return
		}
	}
}

// kill ends what is left.
func (h *herd) kill() {
	for pid, b := range h.members {
		if b.ours {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
	for pid, b := range h.members {
		if b.ours {
			h.reap(pid)
		}
	}
}

// A herder is the herd as the bench sees it.
type herder struct{ *actor }

func startHerd(ctx context.Context) (*herder, error) {
	a, err := startHelper(ctx, herdVar+"=1")
	if err != nil {
		return nil, err
	}
	return &herder{a}, nil
}

// close ends the herd, when that has killed what is left.
func (h *herder) close() {
	h.in.Close()
	h.wait()
	h.stop()
}

// many returns n processes that are somebody else's children and stay.
func (h *herder) many(n int) ([]int, error) {
	text, err := h.ask(fmt.Sprint("many ", n))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, word := range strings.Fields(text) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// fork returns a process that is somebody else's child, and child one that is
// this program's.
func (h *herder) fork() (pid int, err error)  { return h.number("fork") }
func (h *herder) child() (pid int, err error) { return h.number("child") }

func (h *herder) number(command string) (int, error) {
	n, err := h.do(command)
	return int(n), err
}

// tell lets the herd do something to a process.
func (h *herder) tell(command string, pid int) error {
	_, err := h.ask(fmt.Sprint(command, " ", pid))
	return err
}

// stamp returns when a process was about to end.
func (h *herder) stamp(pid int) (int64, error) { return h.do(fmt.Sprint("stamp ", pid)) }

// now is CLOCK_MONOTONIC in ns.
func now() int64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano()
}
