package main

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() {
	testenv.RegisterChild("runner", func(args []string) int {
		os.Args = append([]string{"runner"}, args...)
		main()
		return 0
	})
}

// A running runner, and the directories that it looks at.
type running struct {
	t            *testing.T
	config, data string
	cmd          *exec.Cmd
	lines        *bufio.Scanner // of standard output and error
}

// start runs a shell script that says when it starts.
func start(t *testing.T, script string) *running {
	t.Helper()
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	dir := testenv.MountDir(t)
	r := &running{t: t, config: testenv.Mkdir(t, dir, "config"), data: testenv.Mkdir(t, dir, "data")}
	r.cmd = testenv.Child(t, "runner", "-config", r.config, "-data", r.data, "--", testenv.NeedTool(t, "sh"), "-c", script)
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = r.cmd.Stdout
	stdin, err := r.cmd.StdinPipe() // whose end ends a program that is left
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.lines = bufio.NewScanner(out)
	timer := time.AfterFunc(2*testenv.Patience, func() { r.cmd.Process.Kill() })
	t.Cleanup(func() {
		timer.Stop()
		r.cmd.Process.Kill()
		stdin.Close()
		r.cmd.Wait()
	})
	return r
}

func (r *running) says(lines ...string) {
	r.t.Helper()
	for _, want := range lines {
		if !r.lines.Scan() || !strings.HasPrefix(r.lines.Text(), want) {
			r.t.Fatalf("it says %q; want %q", r.lines.Text(), want)
		}
	}
}

// end waits until it has ended, and returns its status.
func (r *running) end() int {
	r.t.Helper()
	for r.lines.Scan() {
		r.t.Errorf("it also says %q", r.lines.Text())
	}
	r.cmd.Wait()
	return r.cmd.ProcessState.ExitCode()
}

// The program runs while DATA is mounted, and anew when its configuration was
// written. Ctrl-C ends both.
func TestRunsWhileMounted(t *testing.T) {
	// read is a builtin, and ended by the signal.
	r := start(t, "echo program; read line")
	testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
	r.says("runner: start", "program")
	for range 3 {
		draft := testenv.Touch(t, r.data, "..", "draft")
		if err := os.Rename(draft, filepath.Join(r.config, "app.conf")); err != nil {
			t.Fatal(err)
		}
		r.says("runner: stop: file moved_to "+filepath.Join(r.config, "app.conf"), "runner: start", "program")
	}
	testenv.Unmount(t, r.data)
	r.says("runner: stop: " + r.data + " is not mounted")
	testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
	r.says("runner: start", "program")
	r.cmd.Process.Signal(syscall.SIGINT)
	r.says("runner: stop: runner ends")
	if status := r.end(); status != 0 {
		t.Errorf("status %d after an interrupt", status)
	}
}

// A program that ends by itself ends the runner, with its status.
func TestProgramEnds(t *testing.T) {
	r := start(t, "echo program; exit 7")
	testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
	r.says("runner: start", "program")
	if status := r.end(); status != 7 {
		t.Errorf("status %d; want that of the program, 7", status)
	}
}

// A program that cannot be started is an error that names it.
func TestNoProgram(t *testing.T) {
	dir := testenv.MountDir(t)
	cmd := testenv.Child(t, "runner", "-config", dir, "-data", dir, "--", filepath.Join(dir, "nothing"))
	cmd.Stderr = nil
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), filepath.Join(dir, "nothing")) {
		t.Errorf("%v: %q", err, out)
	}
}
