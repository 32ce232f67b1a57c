package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// patience is how long a test waits for what must happen.
const patience = testenv.Patience

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() {
	// The command as a process of its own.
	testenv.RegisterChild("kernstream", func(args []string) int {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		return run(ctx, &environment{stdout: os.Stdout, stderr: os.Stderr, color: showsColors(os.Stdout), live: showsColors(os.Stderr), exit: os.Exit}, args)
	})
}

// result is what a run of the command left.
type result struct {
	status         int
	stdout, stderr string
}

// kernstreamRun runs the command to its end.
func kernstreamRun(t *testing.T, args ...string) result {
	t.Helper()
	cmd := testenv.Child(t, "kernstream", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return result{wait(t, cmd), stdout.String(), stderr.String()}
}

func wait(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
		return cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		cmd.Process.Kill()
		t.Fatalf("%q does not end", cmd.Args)
		return -1
	}
}

// atWork waits until a command has begun to wait for events, long after it began
// to care for signals.
func atWork(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", cmd.Process.Pid)
	for begin := time.Now(); time.Since(begin) < patience; time.Sleep(time.Millisecond) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if link, _ := os.Readlink(filepath.Join(dir, entry.Name())); link == "anon_inode:[eventpoll]" {
				return
			}
		}
	}
	t.Fatalf("%q does not wait for events", cmd.Args)
}

// A live run of the command.
type live struct {
	t      *testing.T
	cmd    *exec.Cmd
	lines  chan string
	stderr bytes.Buffer
}

func start(t *testing.T, args ...string) *live {
	t.Helper()
	l := &live{t: t, cmd: testenv.Child(t, "kernstream", args...), lines: make(chan string)}
	l.cmd.Stderr = &l.stderr
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(l.lines)
		scanner := bufio.NewScanner(stdout)
		scanner.Buffer(nil, 1<<20)
		for scanner.Scan() {
			l.lines <- scanner.Text()
		}
		io.Copy(io.Discard, stdout)
	}()
	return l
}

// line returns the next line of the output.
func (l *live) line() string {
	l.t.Helper()
	select {
	case line, ok := <-l.lines:
		if !ok {
			l.t.Fatalf("the output ended; the errors are %s", l.stderr.String())
		}
		return line
	case <-time.After(patience):
		l.t.Fatal("no line")
		return ""
	}
}

// event returns the next line as JSON.
func (l *live) event() map[string]any {
	l.t.Helper()
	return decode(l.t, l.line())
}

func decode(t *testing.T, line string) map[string]any {
	t.Helper()
	var event map[string]any
	if err := json.Unmarshal([]byte(line), &event); err != nil {
		t.Fatalf("%v: %q", err, line)
	}
	return event
}

// end waits for the command and returns its status. The output must be at its
// end.
func (l *live) end() int {
	l.t.Helper()
	for line := range l.lines {
		l.t.Errorf("another line: %s", line)
	}
	return wait(l.t, l.cmd)
}

func mountTmpfs(t *testing.T, source, dir string) {
	t.Helper()
	if err := unix.Mount(source, dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// chrooted returns the ID of a process with another root directory, whose mounts
// fanotify cannot tell of as it sees them.
func chrooted(t *testing.T) string {
	testenv.NeedMounts(t)
	cmd := testenv.Child(t, "chrooted", t.TempDir())
	stdin, stdout := testenv.StartPiped(t, cmd)
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(cmd.Process.Pid)
}

func init() {
	testenv.RegisterChild("chrooted", func(args []string) int {
		if err := unix.Chroot(args[0]); err != nil {
			return 1
		}
		fmt.Print("!")
		io.Copy(io.Discard, os.Stdin)
		return 0
	})
}

// TestMountsOnce: -once prints the initial event and ends.
func TestMountsOnce(t *testing.T) {
	testenv.NeedMounts(t)
	r := kernstreamRun(t, "mounts", "-once", "-json")
	if r.status != 0 || r.stderr != "" || strings.Count(r.stdout, "\n") != 1 {
		t.Fatalf("status %d, errors %q, output %q; want one line", r.status, r.stderr, r.stdout)
	}
	event := decode(t, r.stdout)
	keys := slices.Sorted(maps.Keys(event))
	want := []string{"changed", "coalesced", "initial", "mounted", "moved", "resync", "source", "time", "unmounted", "via"}
	if !slices.Equal(keys, want) {
		t.Errorf("the keys are %q; want %q", keys, want)
	}
	if event["initial"] != true || event["source"] != "mount" || event["via"] != "mountinfo" && event["via"] != "fanotify" {
		t.Errorf("the event is %v", event)
	}
	if when, err := time.Parse(time.RFC3339Nano, event["time"].(string)); err != nil || !strings.HasSuffix(event["time"].(string), "Z") || time.Since(when) > time.Minute {
		t.Errorf("time is %v: %v; want RFC 3339 in UTC", event["time"], err)
	}
	mounted := event["mounted"].([]any)
	mounts, err := kernstream.Mounts(nil)
	if err != nil || len(mounted) != len(mounts) {
		t.Errorf("%d mounts; want %d (%v)", len(mounted), len(mounts), err)
	}
	first := mounted[0].(map[string]any)
	for _, key := range []string{"mountinfo_id", "mountinfo_parent_id", "dev", "root", "mount_point", "options", "optional", "fs_type", "fs_source", "super_options"} {
		if _, ok := first[key]; !ok {
			t.Errorf("a mount has no %s: %v", key, first)
		}
	}

	r = kernstreamRun(t, "mounts", "-once")
	if r.status != 0 || r.stderr != "" || strings.Count(r.stdout, "\n") != len(mounts) || !strings.HasPrefix(r.stdout, "+ ") || strings.Contains(r.stdout, "\x1b") {
		t.Errorf("status %d, errors %q, output\n%s", r.status, r.stderr, r.stdout)
	}
}

// TestMountsLive: every change is a line, printed at once; an interrupt is a
// way to be done.
func TestMountsLive(t *testing.T) {
	testenv.NeedMounts(t)
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		dir := t.TempDir()
		l := start(t, "mounts", "-json")
		if event := l.event(); event["initial"] != true {
			t.Errorf("the first event is %v", event)
		}
		mountTmpfs(t, "live", dir)
		mounted := l.event()["mounted"].([]any)
		if len(mounted) != 1 || mounted[0].(map[string]any)["mount_point"] != dir {
			t.Errorf("mounted is %v", mounted)
		}
		unix.Unmount(dir, 0)
		if unmounted := l.event()["unmounted"].([]any); len(unmounted) != 1 {
			t.Errorf("unmounted is %v", unmounted)
		}
		l.cmd.Process.Signal(signal)
		if status := l.end(); status != 0 || l.stderr.Len() != 0 {
			t.Errorf("status %d after %v, errors %q; want 0 and none", status, signal, l.stderr.String())
		}
	}
}

// TestMountsText: the form for people has a line for each mount.
func TestMountsText(t *testing.T) {
	testenv.NeedMounts(t)
	dir := t.TempDir()
	mounts, err := kernstream.Mounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	l := start(t, "mounts", "-n", "2", "-timeout", "1m")
	for range mounts {
		if line := l.line(); !strings.HasPrefix(line, "+ ") {
			t.Errorf("line %q", line)
		}
	}
	mountTmpfs(t, "text", dir)
	if line := l.line(); !slices.Equal(strings.Fields(line)[:4], []string{"+", dir, "tmpfs", "text"}) {
		t.Errorf("line %q", line)
	}
	unix.Unmount(dir, 0)
	if line := l.line(); !strings.HasPrefix(line, "- "+dir) {
		t.Errorf("line %q", line)
	}
	if status := l.end(); status != 0 {
		t.Errorf("status %d after -n 2; want 0 (%s)", status, l.stderr.String())
	}
}

// TestMountsCount: -n counts the events after the initial one.
func TestMountsCount(t *testing.T) {
	testenv.NeedMounts(t)
	dir := t.TempDir()
	l := start(t, "mounts", "-json", "-n", "1")
	l.event()
	mountTmpfs(t, "count", dir)
	l.event()
	if status := l.end(); status != 0 {
		t.Errorf("status %d; want 0", status)
	}
}

// TestMountsCoalesce: the flag reaches the watcher, which makes one event of what
// it saw one after the other. On a busy machine it may see both at once, or the
// second too late.
func TestMountsCoalesce(t *testing.T) {
	testenv.NeedMounts(t)
	a, b := t.TempDir(), t.TempDir()
	for begin := time.Now(); ; {
		l := start(t, "mounts", "-json", "-n", "1", "-coalesce", "300ms")
		l.event()
		mountTmpfs(t, "a", a)
		time.Sleep(20 * time.Millisecond)
		mountTmpfs(t, "b", b)
		event := l.event()
		l.end()
		mounted := len(event["mounted"].([]any))
		if mounted == 2 && event["coalesced"] == true {
			return
		}
		if coalesced := event["coalesced"] == true; coalesced || mounted > 2 || time.Since(begin) > patience {
			t.Fatalf("the event is %v; want both mounts, coalesced", event)
		}
		for _, dir := range []string{a, b} {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestMountsRescan: the flag reaches the watcher, which finds a change that wakes
// nobody. A look for another reason may find it first.
func TestMountsRescan(t *testing.T) {
	testenv.NeedMounts(t)
	dir := t.TempDir()
	mountTmpfs(t, "a", dir)
	l := start(t, "mounts", "-json", "-rescan", "20ms")
	l.event()
	for begin, i := time.Now(), 0; ; i++ {
		if err := unix.Mount("", dir, "", []uintptr{unix.MS_SHARED, unix.MS_PRIVATE}[i%2], ""); err != nil {
			t.Fatal(err)
		}
		event := l.event()
		if len(event["changed"].([]any)) != 1 || time.Since(begin) > patience {
			t.Fatalf("the event is %v; want the change, with resync", event)
		}
		if event["resync"] == true {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err := l.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	l.end()
}

// TestStatus: what goes wrong decides on the exit status, and is explained on
// the standard error; the standard output has events alone.
func TestStatus(t *testing.T) {
	testenv.NeedMounts(t)
	gone := exec.Command("/bin/true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	pid := fmt.Sprint(gone.Process.Pid)
	for _, test := range []struct {
		args   string
		status int
		stderr string
	}{
		{"", 2, "usage: kernstream COMMAND"},
		{"nothing", 2, `unknown command "nothing"`},
		{"mounts extra", 2, `unexpected argument "extra"`},
		{"mounts -bad", 2, "kernstream mounts: flag provided but not defined: -bad\nkernstream mounts -help shows the flags\n"},
		{"mounts -bad -h", 2, "not defined: -bad"},
		{"mounts -n -1", 2, "-n must not be negative"},
		{"mounts -timeout -1s", 2, "-timeout must not be negative"},
		{"mounts -rescan -1s", 2, "must not be negative"},
		{"mounts -pid -1", 2, "-pid must not be negative"},
		{"mounts -via magic", 2, `-via is "magic"`},
		{"mounts -once -initial=false", 2, "-initial=false"},
		{"mounts -initial=false -n 1 -timeout 30ms", 3, "the time is up"},
		{"mounts -via fanotify -pid " + chrooted(t), 4, "unsupported"},
		{"mounts -pid " + pid, 1, "process " + pid},
		{"files -events open,open_perm /", 2, "-events: open_perm"},
		{"files /etc -json", 2, "flags come before the first PATH: -json"},
		{"wait 1 -timeout=1s", 2, "flags come before the first PID: -timeout=1s"},
	} {
		t.Run(test.args, func(t *testing.T) {
			r := kernstreamRun(t, strings.Fields(test.args)...)
			if r.status != test.status || !strings.Contains(r.stderr, test.stderr) || r.stdout != "" {
				t.Errorf("status %d; want %d\noutput %q\nerrors %q; want %q", r.status, test.status, r.stdout, r.stderr, test.stderr)
			}
		})
	}
	for _, args := range []string{"help", "-help", "help help", "help -h", "mounts -help", "mounts -h"} {
		r := kernstreamRun(t, strings.Fields(args)...)
		if r.status != 0 || r.stderr != "" || !strings.HasPrefix(r.stdout, "kernstream") && !strings.HasPrefix(r.stdout, "usage: ") {
			t.Errorf("%s: status %d, errors %q, output %q; want help", args, r.status, r.stderr, r.stdout)
		}
	}
}

// TestMountsPID: another process's table, until that process ends.
func TestMountsPID(t *testing.T) {
	testenv.NeedMounts(t)
	other := exec.Command("/bin/sh", "-c", "read x")
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	l := start(t, "mounts", "-json", "-pid", fmt.Sprint(other.Process.Pid))
	l.event()
	stdin.Close()
	other.Wait()
	if status := l.end(); status != 0 || l.stderr.Len() != 0 {
		t.Errorf("status %d when the process ended, errors %q; want 0 and none", status, l.stderr.String())
	}
}

// TestReaderGoesAway: when nobody reads the output any more, the command ends.
func TestReaderGoesAway(t *testing.T) {
	testenv.NeedMounts(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := testenv.Child(t, "kernstream", "mounts", "-json")
	cmd.Stdout = w
	cmd.Stderr = io.Discard
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	bufio.NewReader(r).ReadString('\n')
	r.Close()
	mountTmpfs(t, "x", t.TempDir())
	wait(t, cmd)
}

// startUnread starts a command whose output nobody reads.
func startUnread(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	// Nothing fits into a pipe that is full.
	w.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	for err == nil {
		_, err = w.Write(make([]byte, 4096))
	}
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestNobodyReads: a command whose output nobody takes can be ended all the same.
func TestNobodyReads(t *testing.T) {
	testenv.NeedMounts(t)
	for _, test := range []struct {
		signal syscall.Signal
		args   []string
		status int
	}{
		{syscall.SIGINT, nil, 0},
		{syscall.SIGTERM, nil, 0},
		{0, []string{"-timeout", "50ms"}, 3},
	} {
		cmd := testenv.Child(t, "kernstream", append([]string{"mounts"}, test.args...)...)
		startUnread(t, cmd)
		if test.signal != 0 {
			atWork(t, cmd)
			time.Sleep(100 * time.Millisecond) // it comes to the pipe
			cmd.Process.Signal(test.signal)
		}
		if status := wait(t, cmd); status != test.status {
			t.Errorf("status %d after signal %d, %q; want %d", status, test.signal, test.args, test.status)
		}
	}
}

// TestMountsGolden: the form for people, with and without colours.
func TestMountsGolden(t *testing.T) {
	row := func(point, fstype, source, options, super string, optional ...string) kernstream.Mount {
		return kernstream.Mount{
			MountInfoID: 7, MountInfoParentID: 1, Root: "/", MountPoint: point, FSType: fstype, FSSource: source,
			Options: options, SuperOptions: super, Optional: optional,
		}
	}
	tmp := row("/tmp", "tmpfs", "tmpfs", "rw,nosuid", "rw,size=64k")
	readOnly := row("/tmp", "tmpfs", "tmpfs", "ro,nosuid", "rw,size=128k", "shared:5")
	tucked := tmp
	tucked.MountInfoParentID = 9
	elsewhere := row("/mnt/with space", "tmpfs", "tmpfs", "rw,nosuid", "rw,size=64k")
	events := []*kernstream.MountEvent{
		{Initial: true, Mounted: []kernstream.Mount{
			row("/", "ext4", "/dev/sda1", "rw,relatime", "rw", "shared:1"), row("/proc", "proc", "proc", "rw", "rw"), tmp,
			row("/var/lib/containers/storage/overlay/0123456789abcdef/merged", "overlay", "overlay", "rw", `rw,lowerdir=/a\054b`),
		}},
		{Mounted: []kernstream.Mount{row("/odd\n\x1b[31m\xff", "fuse.sshfs", "", "rw", "ro")}},
		{Changed: []kernstream.MountChange{{Old: tmp, New: readOnly}}},
		{Moved: []kernstream.MountChange{{Old: tmp, New: elsewhere}, {Old: tmp, New: tucked}}, Coalesced: true},
		{Unmounted: []kernstream.Mount{elsewhere}, Resync: true},
		{Mounted: []kernstream.Mount{{Raw: []byte("12 odd row")}}, Resync: true, Coalesced: true},
	}
	for _, color := range []bool{false, true} {
		var out bytes.Buffer
		print := newMountPrinter(&environment{stdout: &out, color: color}, false)
		for _, e := range events {
			if err := print(e); err != nil {
				t.Fatal(err)
			}
		}
		name := "mounts.golden"
		if color {
			name = "mounts-color.golden"
		}
		golden(t, name, out.Bytes())
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update writes it anew):\n%s", name, got)
	}
}

// TestColors: colours are for terminals, unless they are not wanted.
func TestColors(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if showsColors(w) {
		t.Error("a pipe shows colours")
	}
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		testenv.Missing(t, "needs a terminal", err)
	}
	defer terminal.Close()
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	if !showsColors(terminal) {
		t.Error("a terminal shows no colours")
	}
	t.Setenv("NO_COLOR", "1")
	if showsColors(terminal) {
		t.Error("NO_COLOR is ignored")
	}
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "dumb")
	if showsColors(terminal) {
		t.Error("a dumb terminal shows colours")
	}
}
