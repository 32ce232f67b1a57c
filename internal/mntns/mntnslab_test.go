package mntns_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// What the tests stand on: processes in mount namespaces of their own, and what
// tells one namespace from another.

// The programs that the test binary can be. The ones that call Do have the
// namespace as descriptor 3.
const (
	resident   = "resident"    // lives in a mount namespace of its own
	caller     = "caller"      // calls Do and says what came of it
	procless   = "procless"    // a caller that has no /proc
	mainThread = "main-thread" // a caller whose main thread it is
)

const (
	source = "only-in-the-other-namespace" // of the mount there
	file   = "file"                        // in that mount
)

func hideProc() error { return unix.Mount("", "/proc", "tmpfs", 0, "") }

// beResident mounts a tmpfs on the directory given, says so, and stays until
// its standard input ends. With another argument it has no /proc.
func beResident(args []string) int {
	dir := args[0]
	err := unix.Mount(source, dir, "tmpfs", 0, "")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, file), []byte(source), 0o600)
	}
	if err == nil && len(args) > 1 {
		err = hideProc()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "resident:", err)
		return 1
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// A namespace is a mount namespace in which a tmpfs is mounted on dir, which is
// an empty directory in the one of the tests.
type namespace struct {
	*os.File
	dir  string
	name string // what /proc/PID/ns/mnt of a process in it says
}

func newNamespace(t *testing.T, args ...string) *namespace {
	t.Helper()
	testenv.NeedMounts(t)
	ns := &namespace{dir: t.TempDir()}
	cmd := testenv.Child(t, resident, append([]string{ns.dir}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	stdin, stdout := testenv.StartPiped(t, cmd)
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	line, err := stdout.ReadString('\n')
	if line != "ready\n" {
		t.Fatalf("the other namespace: %q, %v", line, err)
	}
	link := fmt.Sprintf("/proc/%d/ns/mnt", cmd.Process.Pid)
	if ns.name, err = os.Readlink(link); err != nil {
		t.Fatal(err)
	}
	if ns.File, err = os.Open(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.File.Close() })
	return ns
}

func (ns *namespace) fd() int { return int(ns.File.Fd()) }

// readAt reads a file whose path is relative to the directory dir.
func readAt(dir int, name string) (string, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	text, err := io.ReadAll(f)
	return string(text), err
}

func readlinkAt(dir int, name string) (string, error) {
	buf := make([]byte, 200)
	n, err := unix.Readlinkat(dir, name, buf)
	return string(buf[:max(n, 0)]), err
}

// surroundings is what a process sees of its mounts through /proc/self, and
// through paths.
type surroundings struct{ namespace, root, cwd, mountinfo string }

func look() (s surroundings, err error) {
	for link, target := range map[string]*string{"ns/mnt": &s.namespace, "root": &s.root, "cwd": &s.cwd} {
		if *target, err = os.Readlink("/proc/self/" + link); err != nil {
			return s, err
		}
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	s.mountinfo = string(text)
	return s, err
}

func mustLook(t *testing.T) surroundings {
	t.Helper()
	s, err := look()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// inside returns what is wrong with being in the namespace named name, which
// has a tmpfs on dir, or nil.
func inside(proc int, dir, name string) error {
	table, err := readAt(proc, "mountinfo")
	if err != nil {
		return err
	}
	if !strings.Contains(table, source) {
		return fmt.Errorf("the mount is not in the table of the thread:\n%s", table)
	}
	content, err := os.ReadFile(filepath.Join(dir, file))
	if string(content) != source {
		return fmt.Errorf("the file in the mount: %q, %w", content, err)
	}
	link, err := readlinkAt(proc, "ns/mnt")
	if link != name {
		return fmt.Errorf("the thread is in %q, want %q, %w", link, name, err)
	}
	if stat, err := readAt(proc, "stat"); !strings.HasPrefix(stat, fmt.Sprint(unix.Gettid(), " ")) {
		return fmt.Errorf("proc is not of thread %d: %q, %w", unix.Gettid(), stat, err)
	}
	if cwd, err := unix.Getwd(); cwd != "/" {
		return fmt.Errorf("working directory %q, %w", cwd, err)
	}
	return nil
}

// elsewhere returns the threads of this process that are in another mount
// namespace than the process.
func elsewhere(t *testing.T) (threads []string) {
	t.Helper()
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		link, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/mnt")
		if err == nil && link != own {
			threads = append(threads, task.Name()+" in "+link)
		}
	}
	return threads
}

// eventually fails the test unless f returns nothing soon.
func eventually(t *testing.T, what string, f func() []string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := f()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, left)
		}
		time.Sleep(time.Millisecond)
	}
}
