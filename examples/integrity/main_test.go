package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() { testenv.RegisterMain("integrity", main) }

// running is a monitor of the directory dir.
type running struct {
	*testenv.Program
	t   *testing.T
	dir string
}

// start runs it on dir until it knows the tree.
func start(t *testing.T, dir string) *running {
	t.Helper()
	r := &running{testenv.StartProgram(t, "integrity", dir), t, dir}
	r.Says("watching " + dir)
	return r
}

// tells reads until it has said all of these lines, in any order, and nothing
// else.
func (r *running) tells(lines ...string) {
	r.t.Helper()
	want := map[string]bool{}
	for _, line := range lines {
		what, path, _ := strings.Cut(line, " ")
		if !filepath.IsAbs(path) && strings.Contains("added changed removed", what) {
			path = filepath.Join(r.dir, path)
		}
		want[what+" "+path] = true
	}
	for len(want) > 0 {
		line := r.Line()
		if !want[line] {
			r.t.Errorf("it says %q; want %v", line, want)
		}
		delete(want, line)
	}
}

// write puts a file into place, in one step: a file that is written where it is
// differs more than once.
func write(t *testing.T, text string, elem ...string) {
	t.Helper()
	path := filepath.Join(elem...)
	draft := filepath.Join(filepath.Dir(elem[0]), "draft") // beside the tree
	check(t, os.WriteFile(draft, []byte(text), 0o644))
	check(t, os.Rename(draft, path))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A line for each file that differs, whatever was done to it; none for one that
// does not.
func TestChanges(t *testing.T) {
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	dir := testenv.Mkdir(t, t.TempDir(), "tree")
	for _, name := range []string{"changed", "mode", "removed", "same", "moved"} {
		write(t, "before", dir, name)
	}
	testenv.Mkdir(t, dir, "a", "b")
	write(t, "before", dir, "a", "b", "deep")
	r := start(t, dir)

	write(t, "after", dir, "changed")
	r.tells("changed changed")
	check(t, os.Chmod(filepath.Join(dir, "mode"), 0o755))
	r.tells("changed mode")
	check(t, os.Remove(filepath.Join(dir, "removed")))
	r.tells("removed removed")
	write(t, "after", dir, "a", "b", "deep")
	r.tells("changed a/b/deep")
	check(t, os.Rename(filepath.Join(dir, "moved"), filepath.Join(dir, "a", "moved")))
	r.tells("removed moved", "added a/moved")

	// What was only touched has no line, nor has what came and went.
	now := time.Now()
	check(t, os.Chtimes(filepath.Join(dir, "same"), now, now))

	// A directory that comes later is watched, too, with all that is in it.
	testenv.Mkdir(t, dir, "new", "below")
	write(t, "after", dir, "new", "below", "file")
	r.tells("added new", "added new/below", "added new/below/file")
	write(t, "changed", dir, "new", "below", "file")
	r.tells("changed new/below/file")
	check(t, os.RemoveAll(filepath.Join(dir, "new")))
	r.tells("removed new", "removed new/below", "removed new/below/file")
	r.Interrupt()
}

// While it cannot keep up, the kernel's queue runs full. What happened
// meanwhile is found all the same.
func TestOverflow(t *testing.T) {
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	testenv.NeedMounts(t)
	dir := testenv.Mkdir(t, testenv.MountDir(t), "tree") // in memory, for the sake of speed
	write(t, "before", dir, "changed")
	write(t, "before", dir, "removed")
	testenv.Mkdir(t, dir, "scratch")
	r := start(t, dir)

	stopProcess(t, r.Cmd.Process.Pid)
	for i := range queueLength(t) + 1000 {
		name := filepath.Join(dir, "scratch", fmt.Sprint(i))
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err == nil {
			unix.Close(fd)
			err = unix.Unlink(name)
		}
		check(t, err)
	}
	// The queue is full: of these there is no event.
	write(t, "after", dir, "changed")
	write(t, "after", dir, "added")
	check(t, os.Remove(filepath.Join(dir, "removed")))
	check(t, r.Cmd.Process.Signal(syscall.SIGCONT))
	r.tells("events were lost, everything is compared", "changed changed", "added added", "removed removed")

	// And it goes on.
	write(t, "after it", dir, "changed")
	r.tells("changed changed")
	r.Interrupt()
}

// stopProcess stops a process, and waits until all of its threads have.
func stopProcess(t *testing.T, pid int) {
	t.Helper()
	check(t, syscall.Kill(pid, syscall.SIGSTOP))
	var info unix.Siginfo
	check(t, unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED, nil))
}

// queueLength is how many events a queue holds.
func queueLength(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events")
	check(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	check(t, err)
	if n > 100_000 {
		testenv.Missing(t, "needs a queue that can be filled: its length is "+strconv.Itoa(n), nil)
	}
	return n
}

// A directory that is not there is an error that names it.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "nothing")
	if out := testenv.Fails(t, "integrity", missing); !strings.Contains(out, missing) {
		t.Errorf("a directory that is not there: %q", out)
	}
}
