package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// sleeper starts a shell that runs script when its input is closed.
func sleeper(t *testing.T, script string) (pid int, end func(), cmd *exec.Cmd) {
	t.Helper()
	cmd = exec.Command("/bin/sh", "-c", "read x; "+script)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	return cmd.Process.Pid, func() { stdin.Close() }, cmd
}

// TestWait: each process is a line when it ends, and the command is done with
// the last.
func TestWait(t *testing.T) {
	pid1, end1, _ := sleeper(t, "exit 3")
	pid2, end2, _ := sleeper(t, "kill -KILL $$")
	l := start(t, "wait", "-json", fmt.Sprint(pid1), fmt.Sprint(pid2), fmt.Sprint(pid1))
	end1()
	event := l.event()
	keys := slices.Sorted(maps.Keys(event))
	if want := []string{"exit_code", "id", "phase", "pid", "source", "status_known", "time"}; !slices.Equal(keys, want) {
		t.Errorf("the keys are %q; want %q", keys, want)
	}
	if event["source"] != "process" || event["pid"] != float64(pid1) || event["phase"] != "exited" || event["status_known"] != true || event["exit_code"] != 3.0 {
		t.Errorf("the event is %v", event)
	}
	if when, err := time.Parse(time.RFC3339Nano, event["time"].(string)); err != nil || !strings.HasSuffix(event["time"].(string), "Z") || time.Since(when) > time.Minute {
		t.Errorf("time is %v: %v; want RFC 3339 in UTC", event["time"], err)
	}
	end2()
	event = l.event()
	if event["pid"] != float64(pid2) || event["signal"] != "SIGKILL" || event["core"] != false || event["exit_code"] != nil {
		t.Errorf("the event is %v", event)
	}
	if status := l.end(); status != 0 || l.stderr.Len() != 0 {
		t.Errorf("status %d, errors %q; want 0 and none", status, l.stderr.String())
	}
}

// TestWaitReaped: with -reaped there is a second line, and the command ends on
// that.
func TestWaitReaped(t *testing.T) {
	pid, end, cmd := sleeper(t, "exit 0")
	l := start(t, "wait", "-reaped", fmt.Sprint(pid))
	if !testenv.KernelAtLeast(6, 9) {
		if status := l.end(); status != 4 || !strings.Contains(l.stderr.String(), "6.9") {
			t.Errorf("status %d, errors %q; want 4 and the version", status, l.stderr.String())
		}
		return
	}
	end()
	if line := l.line(); strings.Join(strings.Fields(line), " ") != fmt.Sprint(pid, " exited status 0") {
		t.Errorf("line %q", line)
	}
	cmd.Wait()
	if line := l.line(); !strings.HasPrefix(strings.Join(strings.Fields(line), " "), fmt.Sprint(pid, " reaped status ")) {
		t.Errorf("line %q", line)
	}
	if status := l.end(); status != 0 {
		t.Errorf("status %d; want 0 (%s)", status, l.stderr.String())
	}
}

// TestWaitAny: with -any, the first to end is enough; -n counts lines.
func TestWaitAny(t *testing.T) {
	pid1, end, _ := sleeper(t, "exit 0")
	pid2, _, _ := sleeper(t, "exit 0")
	for _, flag := range []string{"-any", "-n=1"} {
		l := start(t, "wait", flag, "-json", fmt.Sprint(pid2), fmt.Sprint(pid1))
		end()
		if event := l.event(); event["pid"] != float64(pid1) {
			t.Errorf("the event is %v", event)
		}
		if status := l.end(); status != 0 {
			t.Errorf("%s: status %d; want 0 (%s)", flag, status, l.stderr.String())
		}
	}
}

// TestWaitGone: a process that is gone, and a thread, are explained, the others
// are still waited for, and the status is 1.
func TestWaitGone(t *testing.T) {
	gone := exec.Command("/bin/true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	pid, end, _ := sleeper(t, "exit 0")
	args := []string{"wait", "-json", fmt.Sprint(gone.Process.Pid), fmt.Sprint(pid)}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	thread := tasks[len(tasks)-1].Name()
	l := start(t, append(args, thread)...)
	end()
	if event := l.event(); event["pid"] != float64(pid) {
		t.Errorf("the event is %v", event)
	}
	status := l.end()
	for _, text := range []string{fmt.Sprint("process ", gone.Process.Pid), thread + " is a thread of process", "2 of 3"} {
		if !strings.Contains(l.stderr.String(), text) {
			t.Errorf("the errors are %q; want %q", l.stderr.String(), text)
		}
	}
	if status != 1 {
		t.Errorf("status %d; want 1", status)
	}
}

// TestWaitThousands: thousands of processes on one command line.
func TestWaitThousands(t *testing.T) {
	var shells []*exec.Cmd
	args := []string{"wait", "-json", "-timeout", "1m"}
	const n, each = 2, 1000
	stdins := make([]func() error, n)
	for i := range n {
		// A shell that forks is quicker than so many programs.
		cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do (read x <&3) & echo $!; i=$((i+1)); done; wait", each))
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = []*os.File{r}
		var out bytes.Buffer
		pr, pw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout = pw
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		pw.Close()
		for bytes.Count(out.Bytes(), []byte("\n")) < each {
			buf := make([]byte, 1<<16)
			n, err := pr.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			out.Write(buf[:n])
		}
		pr.Close()
		args = append(args, strings.Fields(out.String())...)
		shells = append(shells, cmd)
		stdins[i] = w.Close
	}
	l := start(t, args...)
	// Those that have ended and were reaped before it watches them are gone.
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", l.cmd.Process.Pid)); err != nil || len(open) > n*each {
			break
		}
	}
	for _, end := range stdins {
		end()
	}
	seen := map[any]bool{}
	for line := range l.lines {
		seen[decode(t, line)["pid"]] = true
	}
	status := wait(t, l.cmd)
	for _, cmd := range shells {
		cmd.Wait()
	}
	if len(seen) != n*each || status != 0 {
		t.Errorf("%d processes, status %d, errors %q; want %d and 0", len(seen), status, l.stderr.String(), n*each)
	}
}

// TestWaitStatus: what is wrong is explained, with the right status.
func TestWaitStatus(t *testing.T) {
	pid, _, _ := sleeper(t, "exit 0")
	for _, test := range []struct {
		args   string
		status int
		stderr string
	}{
		{"wait", 2, "which processes"},
		{"wait x", 2, `"x" is not a process ID`},
		{"wait 0", 2, `"0" is not a process ID`},
		{"wait -- -5", 2, `"-5" is not a process ID`},
		{"wait 99999999999", 2, "not a process ID"},
		{"wait -timeout 30ms " + fmt.Sprint(pid), 3, "the time is up"},
	} {
		t.Run(test.args, func(t *testing.T) {
			r := kernstreamRun(t, strings.Fields(test.args)...)
			if r.status != test.status || !strings.Contains(r.stderr, test.stderr) || r.stdout != "" {
				t.Errorf("status %d; want %d\noutput %q\nerrors %q; want %q", r.status, test.status, r.stdout, r.stderr, test.stderr)
			}
		})
	}
	first, end, _ := sleeper(t, "exit 0")
	l := start(t, "wait", fmt.Sprint(first), fmt.Sprint(pid))
	end()
	l.line() // it is at work
	l.cmd.Process.Signal(syscall.SIGINT)
	if status := l.end(); status != 0 {
		t.Errorf("status %d after an interrupt; want 0", status)
	}
}

// TestWaitEndsWhileItBegins: a timeout or a signal that comes while there still are
// processes to be watched is what ends the command, and not that they cannot be.
func TestWaitEndsWhileItBegins(t *testing.T) {
	self := []int{os.Getpid()}
	for range 5 {
		ctx, cancel := context.WithCancelCause(t.Context())
		watcher, err := kernstream.NewProcessWatcher(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		// So many that ending them takes a while.
		for range 5000 {
			if _, err := watcher.Watch(kernstream.PID(self[0]), nil); err != nil {
				t.Fatal(err)
			}
		}
		go cancel(errTimeout)
		for err == nil {
			_, err = watchAll(&environment{}, watcher, self, nil)
		}
		if err != errTimeout {
			t.Fatalf("the error is %v; want %v", err, errTimeout)
		}
	}
}

// TestWaitOutput: the two forms of each kind of event.
func TestWaitOutput(t *testing.T) {
	when := time.Date(2024, 2, 29, 12, 0, 0, 123456789, time.FixedZone("", 3600))
	id := kernstream.ProcessID{PID: 4711, ID: 171697, Boot: "b"}
	events := []*kernstream.ProcessEvent{
		// The first two are in README.
		{StatusKnown: true},
		{Process: kernstream.ProcessID{PID: 4712, ID: 171698, Boot: "b"}, StatusKnown: true, Status: syscall.WaitStatus(unix.SIGSEGV) | 0x80},
		{StatusKnown: true, Status: 42 << 8},
		{StatusKnown: true, Status: syscall.WaitStatus(unix.SIGKILL)},
		{StatusKnown: true, Status: 40},
		{},
		{Phase: kernstream.Reaped, StatusKnown: true, Status: 1 << 8},
		{Process: kernstream.ProcessID{PID: 1234567}},
		{Process: kernstream.ProcessID{ID: 7}}, // of another namespace
	}
	for _, form := range []struct {
		name        string
		color, json bool
	}{{"wait.golden", false, false}, {"wait-color.golden", true, false}, {"wait-json.golden", false, true}} {
		var out bytes.Buffer
		print := newProcessPrinter(&environment{stdout: &out, color: form.color}, form.json)
		for _, e := range events {
			e.When = when
			if e.Process == (kernstream.ProcessID{}) {
				e.Process = id
			}
			if err := print(e); err != nil {
				t.Fatal(err)
			}
		}
		golden(t, form.name, out.Bytes())
	}
}
