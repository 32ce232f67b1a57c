package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() { testenv.RegisterMain("runner", main) }

// A running runner, and the directories that it looks at.
type running struct {
	*testenv.Program
	config, data string
}

// start runs a shell script that says when it starts.
func start(t *testing.T, script string) *running {
	t.Helper()
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	dir := testenv.MountDir(t)
	config, data := testenv.Mkdir(t, dir, "config"), testenv.Mkdir(t, dir, "data")
	program := testenv.StartProgram(t, "runner", "-config", config, "-data", data, "--", testenv.NeedTool(t, "sh"), "-c", script)
	return &running{program, config, data}
}

// The program runs while DATA is mounted, and anew when its configuration was
// written. Ctrl-C ends both.
func TestRunsWhileMounted(t *testing.T) {
	// read is a builtin, and ended by the signal.
	r := start(t, "echo program; read line")
	testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
	r.Says("runner: start", "program")
	for range 3 {
		draft := testenv.Touch(t, r.data, "..", "draft")
		if err := os.Rename(draft, filepath.Join(r.config, "app.conf")); err != nil {
			t.Fatal(err)
		}
		if line, want := r.Line(), "runner: stop: file moved_to "+filepath.Join(r.config, "app.conf"); !strings.HasPrefix(line, want) {
			t.Errorf("it says %q; want %q", line, want)
		}
		r.Says("runner: start", "program")
	}
	testenv.Unmount(t, r.data)
	r.Says("runner: stop: " + r.data + " is not mounted")
	testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
	r.Says("runner: start", "program")
	r.Cmd.Process.Signal(syscall.SIGINT)
	r.Says("runner: stop: runner ends")
	if status := r.End(); status != 0 {
		t.Errorf("status %d after an interrupt", status)
	}
}

// Ctrl-C in the moment in which the program is started ends both, if it has been
// started at all.
func TestInterruptedAtStart(t *testing.T) {
	for range testenv.SoakN(20) {
		r := start(t, "read line")
		testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
		r.Says("runner: start")
		r.Cmd.Process.Signal(syscall.SIGINT)
		if lines := r.Rest(); len(lines) > 1 || len(lines) == 1 && lines[0] != "runner: stop: runner ends" {
			t.Errorf("it says %q", lines)
		}
		if status := r.End(); status != 0 {
			t.Errorf("status %d after an interrupt", status)
		}
	}
}

// A program that ends by itself ends the runner, with its status.
func TestProgramEnds(t *testing.T) {
	r := start(t, "echo program; exit 7")
	testenv.Mount(t, "data", r.data, "tmpfs", 0, "")
	r.Says("runner: start", "program")
	if status := r.End(); status != 7 {
		t.Errorf("status %d; want that of the program, 7", status)
	}
}

// A program that cannot be started is an error that names it.
func TestNoProgram(t *testing.T) {
	dir := testenv.MountDir(t)
	nothing := filepath.Join(dir, "nothing")
	if out := testenv.Fails(t, "runner", "-config", dir, "-data", dir, "--", nothing); !strings.Contains(out, nothing) {
		t.Errorf("it says %q", out)
	}
}
