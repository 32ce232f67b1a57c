// This file runs the test binaries on the kernel of the host: the newest at
// hand.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// hostJob is the file of the host's job in the stage.
const hostJob = "host.json"

// hostName selects the host by -kernel, and names its column.
const hostName = "host"

// hostVersion is the version of the running kernel.
func hostVersion() (version, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return version{}, os.NewSyscallError("uname", err)
	}
	return parseVersion(unix.ByteSliceToString(u.Release[:]))
}

// hostPasses returns those of the passes that this process may run: an ordinary
// user is an ordinary user.
func hostPasses(passes []string) []string {
	if os.Geteuid() == 0 {
		return passes
	}
	return []string{job.User}
}

// runHost runs the job of a stage here, by the same program that does so in the
// virtual machines.
func runHost(ctx context.Context, stageDir string, limit time.Duration, c *collector) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("took longer than %v", limit))
	defer cancel()
	c.Close(runStage(ctx, stageDir, c))
}

func runStage(ctx context.Context, stageDir string, c *collector) error {
	// The child dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, filepath.Join(stageDir, "init"), "run", filepath.Join(stageDir, hostJob))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "TMPDIR="+stageDir)
	records, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	done, readErr := readRecords(records, c.Handle)
	io.Copy(io.Discard, records)
	waitErr := cmd.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := errors.Join(readErr, waitErr); err != nil {
		return err
	}
	if !done {
		return errors.New("the run ended early")
	}
	return nil
}
