package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

func needRecord(t *testing.T) {
	t.Helper()
	testenv.NeedMounts(t)
	testenv.NeedRoot(t, "mount marks")
}

// readRecord reads a record file.
func readRecord(t *testing.T, name string) *recorder.List {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	list, err := recorder.ReadList(f)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// recordedDir makes files in a new directory.
func recordedDir(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// below returns the names of the recorded files that are in dir.
func below(list *recorder.List, dir string) (names []string) {
	for i := range list.Entries {
		if name, ok := strings.CutPrefix(list.Entries[i].Path, dir+"/"); ok {
			names = append(names, name)
		}
	}
	return names
}

// TestRecordCommand: the command has the standard streams and gives its status; the record
// is in the file, its program first.
func TestRecordCommand(t *testing.T) {
	needRecord(t)
	dir := recordedDir(t, "b", "a")
	file := filepath.Join(t.TempDir(), "record")
	for _, status := range []int{0, 7} {
		r := kernstreamRun(t, "record", "-o", file, "--", "/bin/sh", "-c", fmt.Sprintf("cat %s/b %s/a; echo err >&2; exit %d", dir, dir, status))
		if r.status != status || r.stdout != "ba" || r.stderr != "err\n" {
			t.Errorf("status %d, output %q, errors %q", r.status, r.stdout, r.stderr)
		}
		list := readRecord(t, file)
		if got := below(list, dir); !list.Complete || fmt.Sprint(got) != "[b a]" {
			t.Errorf("complete: %v, %q, files %q", list.Complete, list.Reasons, got)
		}
		if sh, err := filepath.EvalSymlinks("/bin/sh"); err != nil || list.Entries[0].Path != sh {
			t.Errorf("the first file is %s; want %s, %v", list.Entries[0].Path, sh, err)
		}
	}
}

// TestRecordLive: without a file each access is a line, text or JSON; the output of the command is
// among the errors.
func TestRecordLive(t *testing.T) {
	needRecord(t)
	dir := recordedDir(t, "a")
	r := kernstreamRun(t, "record", "-json", "--", "/bin/cat", dir+"/a")
	if r.status != 0 || r.stderr != "a" {
		t.Errorf("status %d, errors %q", r.status, r.stderr)
	}
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	last := decode(t, lines[len(lines)-1])
	if last["path"] != dir+"/a" || len(last) != 3 || last["events"] == nil || last["first"].(float64) < 0 {
		t.Errorf("the last line is %v", last)
	}
	r = kernstreamRun(t, "record", "--", "/bin/cat", dir+"/a")
	if r.status != 0 || !strings.Contains(r.stdout, " "+dir+"/a\n") || strings.Contains(r.stdout, "{") {
		t.Errorf("status %d, output %q", r.status, r.stdout)
	}
	r = kernstreamRun(t, "record", "-n", "2", "--", "/bin/sh", "-c", "exec sleep 1000")
	if r.status != 0 || strings.Count(r.stdout, "\n") != 2 {
		t.Errorf("status %d, output %q, errors %q; want two lines", r.status, r.stdout, r.stderr)
	}
}

// TestRecordSignals: a signal goes to the command, which may take its time, and ends as it
// likes; a signal that kills it shows in the status. The record is whole either way.
func TestRecordSignals(t *testing.T) {
	needRecord(t)
	dir := recordedDir(t, "late")
	file := filepath.Join(t.TempDir(), "record")
	for name, c := range map[string]struct {
		script string
		signal syscall.Signal
		status int
	}{
		// Longer than the second that a command otherwise has to end in.
		"handled": {"trap 'sleep 1.5; cat " + dir + "/late; echo; exit 9' TERM; echo ready; while :; do sleep 0.05; done", unix.SIGTERM, 9},
		"killed":  {"echo ready; cat " + dir + "/late; echo; exec sleep 1000", unix.SIGINT, 130},
	} {
		t.Run(name, func(t *testing.T) {
			l := start(t, "record", "-o", file, "--", "/bin/sh", "-c", c.script)
			if line := l.line(); line != "ready" {
				t.Fatalf("the command says %q", line)
			}
			if line := c.script; strings.Contains(line, "exec") && l.line() != "late" {
				t.Fatal("the command says something else")
			}
			l.cmd.Process.Signal(c.signal)
			if name == "handled" {
				if line := l.line(); line != "late" {
					t.Errorf("the command says %q", line)
				}
			}
			if status := l.end(); status != c.status {
				t.Errorf("status %d, errors %q; want %d", status, l.stderr.String(), c.status)
			}
			if list := readRecord(t, file); !list.Complete || fmt.Sprint(below(list, dir)) != "[late]" {
				t.Errorf("complete: %v, %q, files %q", list.Complete, list.Reasons, below(list, dir))
			}
		})
	}
}

// TestRecordIncomplete: a record that misses something says so in the file, on the standard
// error and by the status, unless the command's own is not 0.
func TestRecordIncomplete(t *testing.T) {
	needRecord(t)
	dir := recordedDir(t, "a")
	file := filepath.Join(t.TempDir(), "record")
	for script, want := range map[string]int{"cat ": exitIncomplete, "exec cat /none ": 1} {
		r := kernstreamRun(t, "record", "-max-files", "1", "-o", file, "--", "/bin/sh", "-c", script+dir+"/a")
		if r.status != want {
			t.Errorf("status %d, errors %q; want %d", r.status, r.stderr, want)
		}
		if want == exitIncomplete && !strings.Contains(r.stderr, "the record is incomplete: ") {
			t.Errorf("errors %q", r.stderr)
		}
		if list := readRecord(t, file); list.Complete || len(list.Reasons) != 1 || len(list.Entries) != 1 {
			t.Errorf("the list is %+v", list)
		}
	}
}

// TestRecordMount: a record of a command that mounts something is incomplete, and says what it was.
func TestRecordMount(t *testing.T) {
	needRecord(t)
	testenv.NeedTool(t, "mount")
	dir := recordedDir(t, "a")
	file := filepath.Join(t.TempDir(), "record")
	r := kernstreamRun(t, "record", "-o", file, "--", "/bin/sh", "-c", "cat "+dir+"/a; mount -t tmpfs later "+dir)
	want := "tmpfs on " + dir + " came after the start of the recording"
	if r.status != exitIncomplete || !strings.Contains(r.stderr, "the record is incomplete: "+want) {
		t.Errorf("status %d, errors %q", r.status, r.stderr)
	}
	if list := readRecord(t, file); list.Complete || len(list.Reasons) != 1 || !strings.HasPrefix(list.Reasons[0], want) || fmt.Sprint(below(list, dir)) != "[a]" {
		t.Errorf("complete: %v, %q, %q", list.Complete, list.Reasons, below(list, dir))
	}
	r = kernstreamRun(t, "record", "-one-mount", "-o", file, "--", "/bin/sh", "-c", "mount -t tmpfs later "+dir)
	if list := readRecord(t, file); r.status != 0 || !list.Complete {
		t.Errorf("one mount: status %d, %q", r.status, list.Reasons)
	}
}

// TestRecordOverflow: what the kernel's queue has no room for makes the record incomplete. The
// recorder is stopped while more files are opened than the queue holds.
func TestRecordOverflow(t *testing.T) {
	needRecord(t)
	var limit int
	if text, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events"); err != nil {
		limit = 16384
	} else if _, err := fmt.Sscan(string(text), &limit); err != nil {
		t.Fatal(err)
	}
	if limit > 1<<16 {
		testenv.Missing(t, "needs a lower max_queued_events", errors.ErrUnsupported)
	}
	dir := t.TempDir()
	mountTmpfs(t, "overflow", dir)
	files := limit + 1000
	for i := range files {
		openFile(t, fmt.Sprint(dir, "/", i), unix.O_CREAT|unix.O_WRONLY)
	}
	file := filepath.Join(t.TempDir(), "record")
	l := start(t, "record", "-limited-queue", "-o", file, "-dir", dir)
	l.startedRecording(func() { readFiles(t, dir, 1) })
	l.cmd.Process.Signal(syscall.SIGSTOP)
	waitStopped(t, l.cmd.Process.Pid)
	readFiles(t, dir, files)
	l.cmd.Process.Signal(syscall.SIGCONT)
	l.cmd.Process.Signal(syscall.SIGINT)
	if status := l.end(); status != exitIncomplete || !strings.Contains(l.stderr.String(), "queue was full") {
		t.Errorf("status %d, errors %q", status, l.stderr.String())
	}
	if list := readRecord(t, file); list.Complete || !strings.Contains(fmt.Sprint(list.Reasons), "queue was full") || len(list.Entries) < limit/2 {
		t.Errorf("complete: %v, %q, %d files", list.Complete, list.Reasons, len(list.Entries))
	}
}

func readFiles(t *testing.T, dir string, n int) {
	t.Helper()
	for i := range n {
		openFile(t, fmt.Sprint(dir, "/", i), unix.O_RDONLY)
	}
}

func openFile(t *testing.T, name string, flags int) {
	t.Helper()
	fd, err := unix.Open(name, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
}

// startedRecording waits until the command has a mark, which its descriptors show.
func (l *live) startedRecording(touch func()) {
	l.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fdinfo", l.cmd.Process.Pid)
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if text, _ := os.ReadFile(filepath.Join(dir, e.Name())); bytes.Contains(text, []byte("fanotify mnt_id:")) {
				touch()
				return
			}
		}
		if time.Since(begin) > patience {
			l.t.Fatalf("it does not begin: %s", l.stderr.String())
		}
	}
}

func waitStopped(t *testing.T, pid int) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || time.Since(begin) > patience {
			t.Fatalf("it does not stop: %v", err)
		}
		if strings.Contains(string(text), ") T ") {
			return
		}
	}
}

// TestRecordInterrupted: a run that is killed leaves the old file as it was, and nothing
// else.
func TestRecordInterrupted(t *testing.T) {
	needRecord(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "record")
	if err := os.WriteFile(file, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	l := start(t, "record", "-o", file, "--", "/bin/sh", "-c", "echo ready; exec cat")
	l.line()
	l.cmd.Process.Kill()
	for range l.lines {
	}
	wait(t, l.cmd)
	entries, err := os.ReadDir(dir)
	text, rerr := os.ReadFile(file)
	if err != nil || rerr != nil || len(entries) != 1 || string(text) != "old" {
		t.Errorf("%v, %v; the directory has %v, the file %q", err, rerr, entries, text)
	}
}

// TestRecordTimeout: the time is up, the command is killed, and what was recorded is
// in the file, as incomplete.
func TestRecordTimeout(t *testing.T) {
	needRecord(t)
	file := filepath.Join(t.TempDir(), "record")
	r := kernstreamRun(t, "record", "-timeout", "700ms", "-o", file, "--", "/bin/sh", "-c", "exec sleep 1000")
	if r.status != exitTimeout {
		t.Errorf("status %d, errors %q", r.status, r.stderr)
	}
	if list := readRecord(t, file); list.Complete || len(list.Entries) == 0 {
		t.Errorf("the list is %+v", list)
	}
}

// TestRecordUsage: what cannot be meant is explained, and what cannot be done named, before anything is
// run.
func TestRecordUsage(t *testing.T) {
	for _, c := range []struct {
		args   string
		status int
		word   string
	}{
		{"record", exitUsage, "what is to be recorded"},
		{"record -pid 1 true", exitUsage, "what is to be recorded"},
		{"record -pid 1 -dir /", exitUsage, "what is to be recorded"},
		{"record -pid -1", exitUsage, "negative"},
		{"record -events opened true", exitUsage, `"opened"`},
		{"record -events open,create true", exitUsage, "-events: create is"},
		{"record -tree 1 -descendants -dir /", exitUsage, "-descendants"},
		{"record -tree 1 true", exitUsage, "-tree"},
		{"record -tree -1 -dir /", exitUsage, "negative"},
		{"record -max-files -1 true", exitUsage, "-max-files"},
		{"record -o /none/x true", exitFailure, "/none"},
		{"record -help", exitDone, ""},
	} {
		if r := kernstreamRun(t, strings.Fields(c.args)...); r.status != c.status || !strings.Contains(r.stderr, c.word) {
			t.Errorf("%s: status %d, errors %q; want %d, %q", c.args, r.status, r.stderr, c.status, c.word)
		}
	}
}

// TestRecordMissing: a program that is not there, and a process that is gone, are
// failures that name them; nobody who may not record does.
func TestRecordMissing(t *testing.T) {
	needRecord(t)
	for _, args := range [][]string{{"record", "--", "/none/program"}, {"record", "-pid", "1073741824"}, {"record", "-dir", "/none"}} {
		if r := kernstreamRun(t, args...); r.status != exitFailure || !strings.Contains(r.stderr, args[len(args)-1]) && !strings.Contains(r.stderr, "process") {
			t.Errorf("%q: status %d, errors %q", args, r.status, r.stderr)
		}
	}
	cmd := testenv.Child(t, "kernstream", "record", "--", "/bin/true")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if status := wait(t, cmd); status != exitUnsupported || !strings.Contains(stderr.String(), "CAP_SYS_ADMIN") {
		t.Errorf("status %d, errors %q", status, stderr.String())
	}
}

// TestRecordProgress: a terminal shows how far a record is, and nothing of that at the end.
func TestRecordProgress(t *testing.T) {
	needRecord(t)
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testenv.Missing(t, "needs a pseudo terminal", err)
	}
	defer terminal.Close()
	number, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	side, err := os.OpenFile(fmt.Sprint("/dev/pts/", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testenv.Missing(t, "needs /dev/pts", err)
	}
	cmd := testenv.Child(t, "kernstream", "record", "-o", filepath.Join(t.TempDir(), "record"), "--", "/bin/sh", "-c", "read line")
	cmd.Env = append(cmd.Env, "TERM=xterm", "NO_COLOR=")
	cmd.Stderr = side
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	side.Close()
	var shown []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(shown, []byte("accesses/s, none lost")) {
		n, err := terminal.Read(buf)
		if err != nil {
			t.Fatalf("%v; the terminal shows %q", err, shown)
		}
		shown = append(shown, buf[:n]...)
	}
	in.Close()
	for {
		n, err := terminal.Read(buf)
		if shown = append(shown, buf[:n]...); err != nil {
			break // the other side is closed
		}
	}
	wait(t, cmd)
	if !bytes.HasSuffix(shown, []byte("\r\x1b[K")) {
		t.Errorf("the terminal shows %q", shown)
	}
}
