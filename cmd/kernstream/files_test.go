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

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// nextFile returns the next event that is about path.
func (l *live) nextFile(path string) map[string]any {
	l.t.Helper()
	for {
		if event := l.event(); event["path"] == path {
			return event
		}
	}
}

// touchUntil does something again and again until the command prints a line: it
// says nowhere that it has begun.
func (l *live) touchUntil(do func()) string {
	l.t.Helper()
	for begin := time.Now(); time.Since(begin) < patience; {
		do()
		select {
		case line, ok := <-l.lines:
			if !ok {
				l.t.Fatalf("the output ended; the errors are %s", l.stderr.String())
			}
			return line
		case <-time.After(10 * time.Millisecond):
		}
	}
	l.t.Fatal("no line")
	return ""
}

// TestFilesLive: what happens to the entries of a directory is a line each, for
// any user; an interrupt is a way to be done.
func TestFilesLive(t *testing.T) {
	dir := t.TempDir()
	file, renamed := filepath.Join(dir, "file"), filepath.Join(dir, "renamed")
	l := start(t, "files", "-json", "-events", "open,close_write,create,move,ondir", dir)
	event := decode(t, l.touchUntil(func() { os.WriteFile(file, nil, 0o644) }))
	if event["path"] != file || event["source"] != "file" || event["via"] != "handle" || event["path_state"] != "exact" || event["overflow"] != nil {
		t.Errorf("the event is %v", event)
	}
	if when, err := time.Parse(time.RFC3339Nano, event["time"].(string)); err != nil || time.Since(when) > time.Minute {
		t.Errorf("time is %v: %v", event["time"], err)
	}
	if err := os.Rename(file, renamed); err != nil {
		t.Fatal(err)
	}
	if event := l.nextFile(renamed); fmt.Sprint(event["events"]) != "[moved_to]" {
		t.Errorf("the event is %v", event)
	}
	l.cmd.Process.Signal(syscall.SIGINT)
	if status := l.end(); status != 0 || l.stderr.Len() != 0 {
		t.Errorf("status %d, errors %q", status, l.stderr.String())
	}
}

// TestFilesRename: a rename has both paths.
func TestFilesRename(t *testing.T) {
	testenv.NeedKernel(t, 5, 17, "FAN_RENAME")
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := os.WriteFile(a, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	l := start(t, "files", "-json", "-n", "1", "-events", "rename", dir)
	line := l.touchUntil(func() { os.Rename(a, b); os.Rename(b, a) })
	event := decode(t, line)
	if event["old_path"] != a || event["new_path"] != b || event["path"] != b {
		t.Errorf("the event is %v", event)
	}
	l.end()
}

// TestFilesFilesystem: the whole file system of a path, with the process; by
// descriptor with -fd.
func TestFilesFilesystem(t *testing.T) {
	testenv.NeedRoot(t, "a filesystem mark")
	for _, args := range []string{"-type filesystem", "-type mount", "-type filesystem -fd"} {
		dir := t.TempDir()
		mountTmpfs(t, "files", dir)
		file := filepath.Join(dir, "sub", "file")
		if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		l := start(t, append(append([]string{"files", "-n", "1"}, strings.Fields(args)...), dir)...)
		line := l.touchUntil(func() { os.WriteFile(file, []byte("x"), 0o644) })
		if !strings.Contains(line, fmt.Sprint(os.Getpid())) || !strings.Contains(line, dir) {
			t.Errorf("%s: line %q", args, line)
		}
		if status := l.end(); status != 0 {
			t.Errorf("%s: status %d (%s)", args, status, l.stderr.String())
		}
	}
}

// TestFilesOfProcess: with -pid, paths are those that the process sees.
func TestFilesOfProcess(t *testing.T) {
	testenv.NeedRoot(t, "a mark through /proc/PID/root")
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	l := start(t, "files", "-json", "-n", "1", "-pid", fmt.Sprint(os.Getpid()), "-events", "create", dir)
	line := l.touchUntil(func() { os.Remove(file); os.WriteFile(file, nil, 0o644) })
	if event := decode(t, line); event["path"] != file {
		t.Errorf("the event is %v", event)
	}
	l.end()
}

// TestFilesStatus: what goes wrong decides on the exit status; for want of a
// privilege it is 4, and the error says which.
func TestFilesStatus(t *testing.T) {
	dir := t.TempDir()
	tests := []struct {
		args   string
		status int
		stderr string
	}{
		{"files", 2, "no PATH"},
		{"files -type magic " + dir, 2, `-type is "magic"`},
		{"files -events nothing " + dir, 2, `"nothing" is no file operation`},
		{"files -pid -1 " + dir, 2, "-pid must not be negative"},
		{"files -events open -timeout 30ms " + dir, 3, "the time is up"},
		{"files " + filepath.Join(dir, "none"), 1, "none"},
		{"files -events fs_error " + dir, 1, "filesystem"},
	}
	// Without the privilege, that is what is said; with it, that a file system
	// cannot.
	r := kernstreamRun(t, "files", "-fd", "-events", "open", "-timeout", "10ms", dir)
	switch {
	case r.status == 3:
		r = kernstreamRun(t, "files", "-events", "create", "-type", "filesystem", "/proc")
		if r.status != 4 || !strings.Contains(r.stderr, "proc does not support file handles") {
			t.Errorf("status %d, errors %q; want 4: proc has no handles for that", r.status, r.stderr)
		}
	case r.status != 4 || !strings.Contains(r.stderr, "CAP_SYS_ADMIN"):
		t.Errorf("status %d, errors %q; want 4, and the privilege", r.status, r.stderr)
	}
	for _, test := range tests {
		r := kernstreamRun(t, strings.Fields(test.args)...)
		if r.status != test.status || !strings.Contains(r.stderr, test.stderr) || r.stdout != "" {
			t.Errorf("%s: status %d; want %d\noutput %q\nerrors %q; want %q", test.args, r.status, test.status, r.stdout, r.stderr, test.stderr)
		}
	}
	if r := kernstreamRun(t, "files", "-help"); r.status != 0 || !strings.Contains(r.stdout, "usage: kernstream files [flags] PATH...") || r.stderr != "" {
		t.Errorf("status %d, output %q, errors %q", r.status, r.stdout, r.stderr)
	}
}

// TestFilesGolden: the form for people.
func TestFilesGolden(t *testing.T) {
	exact := kernstream.PathExact
	events := []*kernstream.FileEvent{
		{Ops: kernstream.OpOpen, Path: "/srv/a", PathState: exact, PID: 71},
		{Ops: kernstream.OpCreate | kernstream.OpCloseWrite | kernstream.OpOpen | kernstream.OpModify, Path: "/srv/with space", PathState: exact, PID: 123456},
		{Ops: kernstream.OpRename | kernstream.OpOnDir, OldPath: "/srv/old", Path: "/srv/new", PathState: exact},
		{Ops: kernstream.OpRename, OldPath: "/srv/gone"},
		{Ops: kernstream.OpAttrib, Path: "/srv/a", PathState: exact, PID: 71},
		{Ops: kernstream.OpDelete, Path: "odd\n\x1b[31m\xff", PathState: kernstream.PathDeleted, PID: 71},
		{Ops: kernstream.OpOpen, Path: "/etc/conf", PathState: kernstream.PathOtherNamespace, PID: 8},
		{Ops: kernstream.OpOverflow},
		{Ops: kernstream.OpFSError, Errno: unix.EUCLEAN, Count: 3, PathState: kernstream.PathUnknown},
		{Err: errors.New("the kernel could not open it")},
	}
	for _, color := range []bool{false, true} {
		var out bytes.Buffer
		print := newFilePrinter(&environment{stdout: &out, color: color}, false)
		for i, e := range events {
			if err := print(e, i == len(events)-1); err != nil {
				t.Fatal(err)
			}
		}
		name := "files.golden"
		if color {
			name = "files-color.golden"
		}
		golden(t, name, out.Bytes())
	}
}
