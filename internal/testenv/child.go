package testenv

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
)

const childVar = "KERNSTREAM_TEST_CHILD"

// children are the programs that this test binary can be, by name.
var children = map[string]func(args []string) int{}

func init() {
	// A child's main goroutine stays on the main thread, whose namespaces and
	// root directory are those that /proc shows for the process.
	if os.Getenv(childVar) != "" {
		runtime.LockOSThread()
	}
}

// RegisterChild makes the test binary behave as the program main when it is
// run by [Child] with name. It is called by init functions. It panics if there is
// such a program: one of the two would never run.
func RegisterChild(name string, main func(args []string) int) {
	if children[name] != nil {
		panic(fmt.Sprintf("testenv: there are two children %q", name))
	}
	children[name] = main
}

// Child returns a command that runs this test binary as the program name. It
// dies with the test.
func Child(tb testing.TB, name string, args ...string) *exec.Cmd {
	tb.Helper()
	if children[name] == nil {
		tb.Fatalf("no child is called %q", name)
	}
	cmd := exec.CommandContext(tb.Context(), "/proc/self/exe", args...)
	// The race detector would let each child wait a second before it exits.
	cmd.Env = append(os.Environ(), childVar+"="+name, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	cmd.Stderr = os.Stderr
	return cmd
}

// beChild ends the process as a child, if it is to be one.
func beChild() {
	name := os.Getenv(childVar)
	if name == "" {
		return
	}
	main, ok := children[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "testenv: no child is called %q\n", name)
		os.Exit(1)
	}
	os.Unsetenv(childVar)
	os.Exit(main(os.Args[1:]))
}

// StartPiped starts cmd, and returns what it reads from and what it writes.
func StartPiped(tb testing.TB, cmd *exec.Cmd) (stdin io.WriteCloser, stdout *bufio.Reader) {
	tb.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	return stdin, bufio.NewReader(out)
}

// idle is a child that says when it runs, and ends when its standard input
// does.
const idle = "idle"

func init() {
	RegisterChild(idle, func([]string) int {
		os.Stdout.Write([]byte{'\n'})
		io.Copy(io.Discard, os.Stdin)
		return 0
	})
}

// StartIdle starts a child that does nothing. It is there until end is called,
// or the test is over.
func StartIdle(tb testing.TB, attr *syscall.SysProcAttr) (pid int, end func()) {
	tb.Helper()
	cmd := Child(tb, idle)
	cmd.SysProcAttr = attr
	stdin, stdout := StartPiped(tb, cmd)
	end = sync.OnceFunc(func() {
		stdin.Close()
		cmd.Wait()
	})
	tb.Cleanup(end)
	if _, err := stdout.ReadByte(); err != nil {
		tb.Fatal(err)
	}
	return cmd.Process.Pid, end
}
