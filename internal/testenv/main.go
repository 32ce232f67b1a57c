package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// namespaceVar is set in a test process that has a mount namespace of its
	// own: to "root", or to "user" when it needed a user namespace for that.
	namespaceVar = "KERNSTREAM_TEST_NAMESPACE"
	// noNamespaceVar says why there is none.
	noNamespaceVar = "KERNSTREAM_TEST_NO_NAMESPACE"
)

// Main runs the tests of a package that mounts nothing, and fails them when a
// goroutine or a descriptor is left at the end. It does not return.
func Main(m *testing.M) {
	beChild()
	os.Exit(run(m, nil))
}

// MainInNamespace is [Main] for a package whose tests mount. They run in a
// mount namespace of their own, which passes nothing on to the one it was made
// from; an ordinary user gets a user namespace around it, in which the tests
// are root. A mount that is left at the end fails the tests, too.
func MainInNamespace(m *testing.M) {
	beChild()
	if os.Getenv(namespaceVar) == "" && os.Getenv(noNamespaceVar) == "" {
		os.Exit(reexec())
	}
	if os.Getenv(namespaceVar) == "" {
		os.Exit(run(m, nil))
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "testenv: make / private:", err)
		os.Exit(1)
	}
	os.Exit(run(m, mountPoints))
}

func startedByRoot() bool {
	return os.Geteuid() == 0 && os.Getenv(namespaceVar) != "user" && hasSysAdmin()
}

// hasSysAdmin tells whether the process has CAP_SYS_ADMIN.
func hasSysAdmin() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		panic(err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// reexec runs this test binary again in a private namespace, or without one
// where the kernel refuses, and returns its exit status.
func reexec() int {
	status, err := spawn(true)
	if err != nil {
		os.Setenv(noNamespaceVar, err.Error())
		if status, err = spawn(false); err != nil {
			fmt.Fprintln(os.Stderr, "testenv: run the tests:", err)
			return 1
		}
	}
	return status
}

func spawn(private bool) (status int, err error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if private {
		kind := "root"
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
		if os.Geteuid() != 0 {
			kind = "user"
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
		}
		cmd.Env = append(os.Environ(), namespaceVar+"="+kind)
	}

	// Pdeathsig goes out when the thread that forked ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	// The go command asks a test that takes too long for its stacks.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGQUIT, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		return 0, err
	}
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		fmt.Fprintln(os.Stderr, "testenv: the tests were ended by", ws.Signal())
		return 128 + int(ws.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

// mountPoints lists the mounts that the tests' namespace has.
func mountPoints() []string {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	var points []string
	for line := range strings.Lines(string(table)) {
		points = append(points, strings.Fields(line)[4])
	}
	return points
}
