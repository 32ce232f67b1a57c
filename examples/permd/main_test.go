package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() {
	testenv.RegisterChild("permd", func(args []string) int {
		os.Args = append([]string{"permd"}, args...)
		main()
		return 0
	})
	testenv.RegisterChild("open", func(args []string) int {
		_, err := os.Open(args[0])
		if err != nil {
			return int(err.(*os.PathError).Err.(syscall.Errno))
		}
		return 0
	})
}

// A lab is a directory on a file system of its own, which permd guards.
type lab struct {
	t     *testing.T
	dir   string // guarded
	files string // where the policy and the log are
	cmd   *exec.Cmd
	said  *bufio.Reader
}

func newLab(t *testing.T, policy string, flags ...string) *lab {
	t.Helper()
	testenv.NeedRoot(t, "permission events")
	l := &lab{t: t, dir: t.TempDir(), files: t.TempDir()}
	if err := unix.Mount("lab", l.dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(l.dir, unix.MNT_DETACH) })
	for _, name := range []string{"public", "secret", "a.key"} {
		if err := os.WriteFile(filepath.Join(l.dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l.policy(policy)
	args := append([]string{"-policy", l.file("policy"), "-log", l.file("log")}, flags...)
	l.cmd = testenv.Child(t, "permd", append(args, l.dir)...)
	l.cmd.Stderr = nil
	// Nobody reads what would be on its standard output.
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	reader.Close()
	defer writer.Close()
	l.cmd.Stdout = writer
	said, err := l.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.said = bufio.NewReader(said)
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.cmd.Process.Kill()
		l.cmd.Wait()
	})
	return l
}

func (l *lab) file(name string) string { return filepath.Join(l.files, name) }

func (l *lab) policy(text string) {
	l.t.Helper()
	if err := os.WriteFile(l.file("policy"), []byte(strings.ReplaceAll(text, "DIR", l.dir)), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// says waits for a line on standard error.
func (l *lab) says(words string) {
	l.t.Helper()
	line, err := l.said.ReadString('\n')
	if err != nil || !strings.Contains(line, words) {
		l.t.Fatalf("permd says %q, %v; want %q", line, err, words)
	}
}

// open lets another process open a file, which must have that outcome.
func (l *lab) open(name string, want syscall.Errno) {
	l.t.Helper()
	cmd := testenv.Child(l.t, "open", filepath.Join(l.dir, name))
	timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	cmd.Run()
	if got := syscall.Errno(cmd.ProcessState.ExitCode()); got != want {
		l.t.Errorf("opening %s: %v; want %v", name, got, want)
	}
}

// logged checks the decisions in the log.
func (l *lab) logged(want ...string) {
	l.t.Helper()
	text, err := os.ReadFile(l.file("log"))
	if err != nil {
		l.t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(text)) {
		var d decision
		if err := json.Unmarshal([]byte(line), &d); err != nil || d.PID == 0 || d.Time.IsZero() {
			l.t.Errorf("%s: %v", line, err)
		}
		got = append(got, fmt.Sprintf("%s %s %d", d.Decision, strings.TrimPrefix(d.Path, l.dir+"/"), d.Rule))
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		l.t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Rules decide in their order, what no rule is about gets the default, a policy
// is read again when it is whole, every decision is in the log, and after the end
// nobody is asked.
func TestPolicy(t *testing.T) {
	l := newLab(t, "# rules\nallow DIR/public  for all\ndeny DIR/*.key\n")
	l.says("2 rules, guarding")
	l.open("public", 0)
	l.open("a.key", unix.EPERM)
	l.open("secret", unix.EPERM)
	l.policy("allow DIR/secret\nperhaps DIR\n")
	l.cmd.Process.Signal(syscall.SIGHUP)
	l.says("policy:2: \"perhaps\" is neither")
	l.open("public", 0)
	l.open("secret", unix.EPERM)
	l.policy("allow DIR\n")
	l.cmd.Process.Signal(syscall.SIGHUP)
	l.says("1 rules")
	l.open("secret", 0)
	l.logged("allow public 2", "deny a.key 3", "deny secret 0", "allow public 2", "deny secret 0", "allow secret 1")
	l.cmd.Process.Signal(syscall.SIGINT)
	l.says("ended, 0 default answers")
	if _, err := io.Copy(io.Discard, l.said); err != nil {
		t.Error(err)
	}
	if err := l.cmd.Wait(); err != nil {
		t.Errorf("permd: %v", err)
	}
	l.open("a.key", 0)
}

// What it does itself it is not asked about, and a log that cannot be written
// ends it: whoever waits gets the default answer.
func TestLog(t *testing.T) {
	l := newLab(t, "deny /nowhere\n", "-mount", "-default", "allow", "-log", "/dev/full")
	l.says("guarding")
	l.open("public", 0)
	l.says("permd: write /dev/full")
	l.cmd.Wait()
	if code := l.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit status %d", code)
	}
}

// A log that a full disk has cut off in a line goes on with the next one.
func TestLogOfAFullDisk(t *testing.T) {
	testenv.NeedMounts(t)
	dir := t.TempDir()
	if err := unix.Mount("full", dir, "tmpfs", 0, "size=8k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	name := filepath.Join(dir, "log")
	d := &daemon{}
	write := func() error {
		file, err := openLog(name)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		d.log = json.NewEncoder(file)
		for range 1000 {
			if err := d.log.Encode(decision{Path: "/a path that is as long as this"}); err != nil {
				return err
			}
		}
		return nil
	}
	if err := write(); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("on a full disk: %v", err)
	}
	cut, err := os.ReadFile(name)
	if err != nil || strings.HasSuffix(string(cut), "\n") {
		t.Fatalf("the log is not cut off: %v", err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := write(); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	decisions, want := 0, strings.Count(string(cut), "\n")+2*1000
	for line := range strings.Lines(string(text)) {
		if json.Unmarshal([]byte(line), &decision{}) == nil {
			decisions++
		}
	}
	if decisions != want {
		t.Errorf("%d decisions; want %d", decisions, want)
	}
}

// Nobody reads its standard output any more: that is a log that cannot be written,
// and does not kill it, so the default answer goes to whoever waits.
func TestBrokenPipe(t *testing.T) {
	l := newLab(t, "deny /nowhere\n", "-log", "", "-mount")
	l.says("guarding")
	l.open("public", unix.EPERM)
	l.says("permd: write /dev/stdout: broken pipe")
	l.cmd.Wait()
	if code := l.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit status %d: %v", code, l.cmd.ProcessState)
	}
}

// What is answered by default at the end is in the log as that.
func TestJudgeEnded(t *testing.T) {
	testenv.NeedRoot(t, "permission events")
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, byDefault := range []kernstream.Response{{Allow: true}, {}} {
		w, err := kernstream.WatchFiles(t.Context(), &kernstream.FileOptions{Class: kernstream.ClassContent, Default: byDefault},
			kernstream.Mark{Path: name, Ops: kernstream.OpOpenPerm})
		if err != nil {
			t.Fatal(err)
		}
		cmd := testenv.Child(t, "open", name)
		started := make(chan error, 1)
		go func() { started <- cmd.Start() }()
		e := <-w.C
		w.Close()
		if err := <-started; err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		var log strings.Builder
		d := &daemon{byDefault: byDefault, policy: policy{{1, !byDefault.Allow, "/"}}, log: json.NewEncoder(&log)}
		if err := d.judge(e); err != nil {
			t.Error(err)
		}
		var got decision
		if err := json.Unmarshal([]byte(log.String()), &got); err != nil || got.Decision != byDefault.String() || got.Rule != 0 || got.Error == "" {
			t.Errorf("%s, %v; want %v", log.String(), err, byDefault)
		}
		if opened := cmd.ProcessState.ExitCode() == 0; opened != byDefault.Allow {
			t.Errorf("the opener: %v", cmd.ProcessState)
		}
	}
}

// A policy that cannot be read is an error that names the line.
func TestParse(t *testing.T) {
	for text, words := range map[string]string{
		"deny /" + strings.Repeat("long", 1<<16): "token too long",
		"allow srv":                              "no absolute path", "deny": "no absolute path", "allowed /srv": "neither allow nor deny", "deny /srv/[": "syntax error",
	} {
		name := filepath.Join(t.TempDir(), "policy")
		if err := os.WriteFile(name, []byte("\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if rules, err := readPolicy(name); rules != nil || err == nil || !strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), name+":2") {
			t.Errorf("%q: %v, %v; want %q", text, rules, err, words)
		}
	}
	p := policy{{1, true, "/a/b"}, {2, false, "/a/*.x"}, {3, true, "/"}}
	for path, line := range map[string]int{"/a/b": 1, "/a/b/c": 1, "/a/bc": 3, "/a/y.x": 2, "/a/d/y.x": 3, "/": 3} {
		if r := p.match(path); r == nil || r.line != line {
			t.Errorf("%s: %v; want rule %d", path, r, line)
		}
	}
	if r := p[:2].match("/b"); r != nil {
		t.Errorf("rule %v", r)
	}
}
