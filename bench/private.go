package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// The program runs itself again in a mount namespace of its own, which goes
// away, with all that was mounted, when the last process in it ends.

// privateVar is set in the process in the private namespace: to the directory
// that it mounts on.
const privateVar = "KERNSTREAM_BENCH_DIR"

// runPrivately runs this program again in a private mount namespace, which
// takes a user namespace unless the caller is root, and returns its exit
// status.
func runPrivately(ctx context.Context) int {
	dir, err := os.MkdirTemp("", "kernstream-bench-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	// Nothing is mounted here as this process sees it.
	defer os.Remove(dir)

	cmd := command(ctx, privateVar+"="+dir, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	wait, err := start(cmd)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: a private mount namespace needs root or unprivileged user namespaces:", err)
		return 1
	}
	err = wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// command returns a command that runs this program with a variable more in its
// environment. It gets SIGTERM when ctx is done, and SIGKILL when it does not
// end then, or when this process dies.
func command(ctx context.Context, variable string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), variable)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// start starts cmd on a thread that lasts as long as cmd does: the kernel sends
// Pdeathsig when the thread ends that forked.
func start(cmd *exec.Cmd) (wait func() error, err error) {
	started, ended := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	return func() error { return <-ended }, <-started
}
