package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func init() { testenv.RegisterMain("supervisor", main) }

// patience is how long a test waits for what must happen.
const patience = testenv.Patience

// A herd is processes that are children of a shell.
type herd struct {
	pids []int
	end  func() // lets all end that are left
}

// startHerd starts n processes that read from the shell's standard input, and
// end with it.
func startHerd(t *testing.T, n int) *herd {
	t.Helper()
	shell := exec.CommandContext(t.Context(), testenv.NeedTool(t, "sh"), "-c", `
		exec 3<&0
		i=0
		while [ $i -lt `+strconv.Itoa(n)+` ]; do
			cat <&3 >/dev/null &
			echo $!
			i=$((i+1))
		done
		wait`)
	stdin, err := shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		shell.Wait()
	})
	h := &herd{end: func() { stdin.Close() }}
	for scanner := bufio.NewScanner(stdout); len(h.pids) < n && scanner.Scan(); {
		pid, err := strconv.Atoi(scanner.Text())
		if err != nil {
			t.Fatal(err)
		}
		h.pids = append(h.pids, pid)
	}
	if len(h.pids) < n {
		t.Fatalf("%d of %d processes", len(h.pids), n)
	}
	return h
}

// end waits until the supervisor has ended by itself, well.
func end(t *testing.T, r *testenv.Program) {
	t.Helper()
	if status := r.End(); status != 0 {
		t.Errorf("it ends with status %d", status)
	}
}

// A thousand processes that are not its children end, and each is told once,
// with its status as far as the kernel tells it.
func TestThousand(t *testing.T) {
	h := startHerd(t, 1000)
	r := testenv.StartProgram(t, "supervisor")
	for _, pid := range h.pids {
		fmt.Fprintln(r.Stdin, pid)
	}
	fmt.Fprintln(r.Stdin, h.pids[0]) // once more
	fmt.Fprintln(r.Stdin, "nonsense")
	if line := r.Line(); line != `"nonsense" is no process` {
		t.Errorf("it says %q", line)
	}
	syscall.Kill(h.pids[0], syscall.SIGKILL)
	// Until it is reaped this user may know how; afterwards Linux 6.15 tells.
	if line := r.Line(); !strings.HasPrefix(line, fmt.Sprintf("process %d ended: ", h.pids[0])) {
		t.Errorf("it says %q of the process that was killed", line)
	}
	r.Stdin.Close()
	h.end()
	told := map[string]bool{}
	for range h.pids[1:] {
		line := r.Line()
		if told[line] {
			t.Errorf("%q is said twice", line)
		}
		told[line] = true
	}
	for _, pid := range h.pids[1:] {
		name := fmt.Sprintf("process %d ended: ", pid)
		if !told[name+"status 0"] && !told[name+"nobody may know how"] {
			t.Errorf("nothing is said of process %d", pid)
		}
	}
	end(t, r)
}

// What ends while no supervisor runs is told by the next one; what is alive is
// waited for. A number that is another process's is not taken for the one that
// was saved.
func TestState(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	h := startHerd(t, 3)
	r := testenv.StartProgram(t, "supervisor", "-state", state)
	for _, pid := range h.pids {
		fmt.Fprintln(r.Stdin, pid)
	}
	fmt.Fprintln(r.Stdin, "all given")
	r.Line()
	r.Interrupt()
	text, err := os.ReadFile(state)
	if err != nil || strings.Count(string(text), "\n") != 3 {
		t.Fatalf("the state is %q, %v", text, err)
	}
	syscall.Kill(h.pids[1], syscall.SIGKILL)
	waitGone(t, h.pids[1])
	// Somebody else has the number of the third.
	swapped := strings.NewReplacer(fmt.Sprint(h.pids[2], ":"), fmt.Sprint(os.Getpid(), ":")).Replace(string(text))
	if err := os.WriteFile(state, []byte(swapped), 0o600); err != nil {
		t.Fatal(err)
	}

	r = testenv.StartProgram(t, "supervisor", "-state", state)
	gone := map[string]bool{r.Line(): true, r.Line(): true}
	for _, pid := range []int{h.pids[1], os.Getpid()} {
		if want := fmt.Sprintf("process %d has ended already", pid); !gone[want] {
			t.Errorf("it says %v; want %q", gone, want)
		}
	}
	fmt.Fprintln(r.Stdin, "all loaded")
	r.Line()
	r.Stdin.Close()
	h.end()
	if line := r.Line(); !strings.HasPrefix(line, fmt.Sprintf("process %d ended: ", h.pids[0])) {
		t.Errorf("it says %q", line)
	}
	end(t, r)
	if text, err := os.ReadFile(state); len(text) > 0 || err != nil {
		t.Errorf("the state at the end is %q, %v", text, err)
	}

	// All that was saved has ended meanwhile.
	if err := os.WriteFile(state, []byte(swapped), 0o600); err != nil {
		t.Fatal(err)
	}
	r = testenv.StartProgram(t, "supervisor", "-state", state)
	for range h.pids {
		if line := r.Line(); !strings.HasSuffix(line, " has ended already") {
			t.Errorf("it says %q", line)
		}
	}
	r.Stdin.Close()
	end(t, r)
	if text, err := os.ReadFile(state); len(text) > 0 || err != nil {
		t.Errorf("the state of nothing is %q, %v", text, err)
	}
}

// waitGone waits until a process has been reaped. The shell does that at once.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	for begin := time.Now(); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Since(begin) > patience {
			t.Fatal("the process stays")
		}
	}
}

// An interrupt is a way to be done, also while there still are processes to be
// watched.
func TestInterruptWhileItBegins(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	in, out := io.Pipe()
	go func() {
		for {
			if _, err := fmt.Fprintln(out, os.Getpid()); err != nil {
				return
			}
		}
	}()
	defer in.Close()
	w, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	// So many that ending them takes a while.
	for range 20_000 {
		if _, err := w.Watch(kernstream.PID(os.Getpid()), nil); err != nil {
			t.Fatal(err)
		}
	}
	s := &supervisor{out: io.Discard, watcher: w, alive: map[kernstream.ProcessID]bool{}}
	time.AfterFunc(time.Millisecond, cancel)
	if err := unlessDone(ctx, s.supervise(readLines(ctx, in))); err != nil {
		t.Errorf("it fails: %v", err)
	}
}

// What cannot be read is no end of the input.
func TestBadInput(t *testing.T) {
	in := io.MultiReader(strings.NewReader("nonsense\n"), iotest.ErrReader(syscall.EIO))
	var said strings.Builder
	err := run(t.Context(), in, &said, "")
	if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "standard input") || said.String() != "\"nonsense\" is no process\n" {
		t.Errorf("it says %q, and the error is %v; want EIO of the standard input", said.String(), err)
	}
}

// A state file that is damaged, and one that cannot be written, is an error that
// names it.
func TestBadState(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(state, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{state, filepath.Join(state, "below a file")} {
		if out := testenv.Fails(t, "supervisor", "-state", path); !strings.Contains(out, path) {
			t.Errorf("%s: it says %q", path, out)
		}
	}
}
