package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The herd is another process of this program that forks as many processes as
// a case needs. They are copies of it that sleep in the kernel, with a word of
// memory each that they share with it, by which they are woken to end.
//
// It reads commands from its standard input, a line each, and answers each with
// a line. It ends with its input, and kills what is left of the herd.
//
//	fork N      forks N processes; the answer is their numbers
//	child N     the same, but they are children of whoever started the herd
//	exit PID    lets one end, some time after the answer, which says nothing
//	stamp PID   the answer is when that one called exit(2) (CLOCK_MONOTONIC, ns)
//	reap PID    waits for one
//	mind PID    lets one end as exit does, and waits for it at once
//	kill        kills all that are left, and waits for them

// herdVar is set in the herd.
const herdVar = "KERNSTREAM_BENCH_HERD"

// herdPause is how long after the answer a process is let end: the machine
// comes to rest.
const herdPause = 2 * time.Millisecond

// A stall is the place of one process in the shared memory.
type stall struct {
	wake  uint32 // a futex; not 0: end
	_     uint32
	stamp unix.Timespec // of the end
}

const stalls = 1 << 15

type herd struct {
	places *[stalls]stall
	pid    map[int]int // its place
	ours   map[int]bool
	used   int
}

func herdMain() int {
	if err := serveHerd(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench: herd:", err)
		return 1
	}
	return 0
}

func serveHerd(in io.Reader, out io.Writer) error {
	memory, err := unix.Mmap(-1, 0, int(unsafe.Sizeof([stalls]stall{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	h := &herd{places: (*[stalls]stall)(unsafe.Pointer(&memory[0])), pid: map[int]int{}, ours: map[int]bool{}}
	defer h.kill()
	// A fork copies what the forking process has mapped.
	runtime.GC()
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
	case "fork":
		answer, err = h.fork(n, 0)
	case "child":
		answer, err = h.fork(n, unix.CLONE_PARENT)
	case "exit":
		after = func() { h.end(n) }
	case "mind":
		after = func() {
			h.end(n)
			h.reap(n)
		}
	case "stamp":
		answer = fmt.Sprint(h.places[h.pid[n]].stamp.Nano())
	case "reap":
		h.reap(n)
	case "kill":
		h.kill()
	default:
		err = fmt.Errorf("unknown command %q", name)
	}
	return answer, after, err
}

func (h *herd) fork(n int, flags uintptr) (string, error) {
	var pids strings.Builder
	for range n {
		if h.used == stalls {
			return "", errors.New("the herd is too large")
		}
		place := h.used
		h.used++
		h.places[place] = stall{}
		pid, errno := forkSleeper(&h.places[place], flags|uintptr(unix.SIGCHLD))
		if errno != 0 {
			return "", os.NewSyscallError("clone", errno)
		}
		h.pid[pid], h.ours[pid] = place, flags == 0
		fmt.Fprint(&pids, pid, " ")
	}
	return pids.String(), nil
}

// forkSleeper forks a process that sleeps until it is woken, notes the time and
// ends. Between the fork and the end there are system calls only: the copy has
// no other threads, and no runtime that works.
//
//go:norace
//go:nosplit
func forkSleeper(place *stall, flags uintptr) (pid int, errno syscall.Errno) {
	r, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, flags, 0, 0, 0, 0, 0)
	if r != 0 || errno != 0 {
		return int(r), errno
	}
	for atomic.LoadUint32(&place.wake) == 0 {
		const futexWait = 0
		syscall.RawSyscall6(syscall.SYS_FUTEX, uintptr(unsafe.Pointer(&place.wake)), futexWait, 0, 0, 0, 0)
	}
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&place.stamp)), 0)
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

func (h *herd) end(pid int) {
	const futexWake = 1
	place := &h.places[h.pid[pid]]
	atomic.StoreUint32(&place.wake, 1)
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&place.wake)), futexWake, 1, 0, 0, 0)
}

func (h *herd) reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// kill ends what is left.
func (h *herd) kill() {
	for pid := range h.pid {
		unix.Kill(pid, unix.SIGKILL)
	}
	for pid := range h.pid {
		if h.ours[pid] {
			h.reap(pid)
		}
	}
	clear(h.pid)
	h.used = 0
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

// fork returns n processes that are somebody else's children, and child n that
// are this program's.
func (h *herder) fork(n int) ([]int, error)  { return h.numbers("fork", n) }
func (h *herder) child(n int) ([]int, error) { return h.numbers("child", n) }

func (h *herder) numbers(command string, n int) ([]int, error) {
	text, err := h.ask(fmt.Sprint(command, " ", n))
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

// tell lets the herd do something to a process.
func (h *herder) tell(command string, pid int) error {
	_, err := h.ask(fmt.Sprint(command, " ", pid))
	return err
}

// stamp returns when a process called exit(2).
func (h *herder) stamp(pid int) (int64, error) { return h.do(fmt.Sprint("stamp ", pid)) }

// now is CLOCK_MONOTONIC in ns.
func now() int64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return t.Nano()
}
