package soak

import (
	"bufio"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kernstream/kernstream/internal/testenv"
)

// TestKilled: a soak that is killed at any moment is gone, and so is all that it has
// started. Nobody waits in the kernel for an answer of a process that waits itself.
func TestKilled(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	t.Setenv("TMPDIR", t.TempDir()) // what is killed leaves its directories
	for range testenv.SoakN(1) {
		var ended sync.WaitGroup
		for _, by := range []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM} {
			soak, lines := startSoak(t)
			ended.Go(func() { killSoak(t, soak, lines, by) })
		}
		ended.Wait()
	}
}

// startSoak starts a soak, in a mount namespace that goes with it.
func startSoak(t *testing.T) (soak *exec.Cmd, lines *bufio.Reader) {
	t.Helper()
	soak = exec.Command("/proc/self/exe", "-test.run=^TestSoak$", "-test.v", "-for=1h")
	soak.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	// Its children have this, too, so it ends with the last of them.
	soak.Stderr = struct{ io.Writer }{os.Stderr}
	out, err := soak.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := soak.Start(); err != nil {
		t.Fatal(err)
	}
	return soak, bufio.NewReader(out)
}

// killSoak kills a soak when it has begun.
func killSoak(t *testing.T, soak *exec.Cmd, lines *bufio.Reader, by syscall.Signal) {
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Errorf("the soak ended by itself: %v", err)
			break
		}
		if strings.Contains(line, "seed") {
			break
		}
	}
	time.Sleep(time.Duration(rand.IntN(700)) * time.Millisecond)
	soak.Process.Signal(by)
	gone := make(chan error, 1)
	go func() { gone <- soak.Wait() }()
	select {
	case <-gone:
	case <-time.After(testenv.Patience):
		t.Errorf("the soak, process %d, was ended by %v and is not gone", soak.Process.Pid, by)
	}
}
