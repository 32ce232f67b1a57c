package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The actor is another process of this program, in the same mount namespace,
// which mounts and unmounts one file system on command: what a watcher watches
// must not share its runtime.
//
// It reads commands from its standard input, a line each, and answers each with
// a line that holds a number. It ends with its input.
//
//	pairs N   mounts and unmounts N times; the answer is how many ns that took
//	storm     goes on doing that, from before the answer (0) on
//	calm      ends the storm; the answer is how many pairs that were

// actorVar is set in the actor: to the directory that it mounts on.
const actorVar = "KERNSTREAM_BENCH_ACTOR"

// actorMain is the actor, and returns its exit status.
func actorMain(dir string) int {
	if err := serveActor(dir, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench: actor:", err)
		return 1
	}
	return 0
}

func serveActor(dir string, in io.Reader, out io.Writer) error {
	storm := &storm{dir: dir}
	for commands := bufio.NewScanner(in); commands.Scan(); {
		name, arg, _ := strings.Cut(commands.Text(), " ")
		var answer int64
		var err error
		switch name {
		case "pairs":
			var n int
			if n, err = strconv.Atoi(arg); err == nil {
				answer, err = timePairs(dir, n)
			}
		case "storm":
			err = storm.begin()
		case "calm":
			answer, err = storm.finish()
		default:
			err = fmt.Errorf("unknown command %q", name)
		}
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(out, answer); err != nil {
			return err
		}
	}
	return nil
}

func timePairs(dir string, n int) (int64, error) {
	begin := time.Now()
	for range n {
		if err := mountPair(dir); err != nil {
			return 0, err
		}
	}
	return time.Since(begin).Nanoseconds(), nil
}

func mountPair(dir string) error {
	if err := mountTmpfs(dir); err != nil {
		return err
	}
	return unmount(dir)
}

// storm mounts and unmounts without a pause.
type storm struct {
	dir     string
	stop    atomic.Bool
	running sync.WaitGroup
	pairs   int64 // valid when it does not run
	err     error // the same
}

func (s *storm) begin() error {
	s.pairs, s.err = 0, mountPair(s.dir)
	s.stop.Store(false)
	s.running.Go(func() {
		for s.err == nil && !s.stop.Load() {
			s.pairs++
			s.err = mountPair(s.dir)
		}
	})
	return nil
}

func (s *storm) finish() (pairs int64, err error) {
	s.stop.Store(true)
	s.running.Wait()
	return s.pairs, s.err
}

// mountTmpfs mounts a tmpfs, which costs the same however many mounts there
// are; a bind does not.
func mountTmpfs(dir string) error {
	err := unix.Mount("bench", dir, "tmpfs", unix.MS_NOSUID, "size=64k")
	return os.NewSyscallError("mount", err)
}

func unmount(dir string) error { return os.NewSyscallError("umount2", unix.Unmount(dir, 0)) }

// An actor is the other process as this one sees it.
type actor struct {
	in   io.WriteCloser
	out  *bufio.Reader
	wait func() error
	stop context.CancelFunc
}

func startActor(ctx context.Context, dir string) (*actor, error) {
	return startActorAs(ctx, actorVar+"="+dir)
}

// startActorAs starts this program with a variable more in its environment,
// which makes it a process that obeys.
func startActorAs(ctx context.Context, variable string) (*actor, error) {
	ctx, stop := context.WithCancel(ctx)
	cmd := command(ctx, variable)
	in, err := cmd.StdinPipe()
	if err != nil {
		stop()
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		stop()
		return nil, err
	}
	wait, err := start(cmd)
	if err != nil {
		stop()
		return nil, fmt.Errorf("start the actor: %w", err)
	}
	return &actor{in: in, out: bufio.NewReader(out), wait: wait, stop: stop}, nil
}

// do lets the actor do something, and returns its answer.
func (a *actor) do(command string) (int64, error) {
	if _, err := fmt.Fprintln(a.in, command); err != nil {
		return 0, fmt.Errorf("tell the actor: %w", err)
	}
	line, err := a.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("the actor's answer to %q: %w", command, err)
	}
	return strconv.ParseInt(strings.TrimSpace(line), 10, 64)
}

// close ends the actor, whatever it does.
func (a *actor) close() {
	a.in.Close()
	a.stop()
	a.wait()
}
