// This file runs the test binaries, in each pass as another kind of user.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/test/kernels/job"
)

const (
	// grace is how long a test binary may take, past its own limit, to write
	// the stacks of its goroutines.
	grace = 20 * time.Second
	// maxLine and maxOutput bound what a test binary that runs wild sends
	// through the serial port.
	maxLine   = 4 << 10
	maxOutput = 4 << 20
	// marker introduces the lines by which a test binary reports results.
	marker = 0x16
)

// runner writes records about the test binaries that it runs.
type runner struct {
	job     job.Job
	dir     string // where the job's file is
	records *json.Encoder
}

// runJob runs the job of the file name and writes records to w.
func runJob(name string, w io.Writer) error {
	// The test binaries die with the thread that started them, see start.
	runtime.LockOSThread()
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	r := &runner{dir: filepath.Dir(name), records: json.NewEncoder(w)}
	r.records.SetEscapeHTML(false)
	if err := json.Unmarshal(text, &r.job); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return os.NewSyscallError("uname", err)
	}
	r.record(job.Record{Kind: job.Hello, Text: unix.ByteSliceToString(u.Release[:])})
	for _, pass := range r.job.Passes {
		if err := r.pass(pass); err != nil {
			r.record(job.Record{Kind: job.Note, Pass: pass, Text: err.Error()})
		}
	}
	return r.record(job.Record{Kind: job.Done})
}

func (r *runner) record(rec job.Record) error {
	return r.records.Encode(rec)
}

// pass runs all test binaries as one kind of user, with a home and a directory
// for temporary files of its own.
func (r *runner) pass(name string) error {
	home, err := os.MkdirTemp("", "kernels-"+name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(home)
	tmp := filepath.Join(home, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	changeUser := name == job.User && os.Geteuid() == 0
	if changeUser {
		for _, dir := range []string{home, tmp} {
			if err := os.Chown(dir, job.UserID, job.UserID); err != nil {
				return err
			}
		}
	}
	strict := "unprivileged"
	if name == job.Root {
		strict = "1"
	}
	search := path
	if outer := os.Getenv("PATH"); outer != "" && outer != path {
		search = outer + ":" + path
	}
	env := append([]string{
		"PATH=" + search,
		"HOME=" + home,
		"TMPDIR=" + tmp,
		"LANG=C.UTF-8",
		"KERNSTREAM_STRICT=" + strict,
	}, r.job.Env...)
	for _, pkg := range r.job.Packages {
		run := testRun{pass: name, pkg: pkg, env: env, changeUser: changeUser}
		r.report(&run)
		if len(run.failed) > 0 && !run.broken && r.job.Again > 0 {
			r.report(run.again(r.job.Again))
		}
	}
	return nil
}

// A testRun is one run of a test binary.
type testRun struct {
	pass       string
	pkg        job.Package
	args       []string // beside those of the job
	env        []string
	changeUser bool
	repeated   bool

	failed []string // the tests that did
	broken bool     // it did not come to its end
}

// again returns a run of the tests that failed alone, n times each.
func (t *testRun) again(n int) *testRun {
	return &testRun{
		pass: t.pass, pkg: t.pkg, env: t.env, changeUser: t.changeUser, repeated: true,
		args: []string{"-test.run=^(?:" + strings.Join(t.failed, "|") + ")$", "-test.count=" + strconv.Itoa(n)},
	}
}

// note takes a line of the output.
func (t *testRun) note(line string) {
	_, frame, _ := strings.Cut(line, string(rune(marker)))
	if rest, ok := strings.CutPrefix(frame, "--- FAIL: "); ok {
		if name, _, _ := strings.Cut(rest, " "); !strings.Contains(name, "/") {
			t.failed = append(t.failed, name)
		}
	}
}

// report runs a test binary, and writes records about that.
func (r *runner) report(t *testRun) {
	r.record(job.Record{Kind: job.Begin, Pass: t.pass, Package: t.pkg.Name, Again: t.repeated})
	status, err := r.test(t)
	if err != nil {
		r.record(job.Record{Kind: job.Line, Pass: t.pass, Package: t.pkg.Name, Text: "init: " + err.Error()})
		status = max(status, 1)
	}
	// The testing package exits with 1 when tests fail, and Go with 2 from a panic.
	t.broken = status > 1 || err != nil
	r.record(job.Record{Kind: job.End, Pass: t.pass, Package: t.pkg.Name, Status: status})
}

// test runs a test binary to its end and returns its exit status.
func (r *runner) test(t *testRun) (status int, err error) {
	args := slices.Concat([]string{filepath.Join(r.dir, "src", t.pkg.Binary)}, r.job.Args, t.args)
	if t.pass == job.NoAdmin {
		self, err := os.Executable()
		if err != nil {
			return 0, err
		}
		args = append([]string{self, "drop"}, args...)
	}
	limit := time.Duration(r.job.Limit)*time.Second + grace
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = filepath.Join(r.dir, "src", t.pkg.Dir)
	cmd.Env = slices.Clone(t.env)
	out := &lineWriter{emit: func(text string) {
		t.note(text)
		r.record(job.Record{Kind: job.Line, Pass: t.pass, Package: t.pkg.Name, Text: text})
	}}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if t.changeUser {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: job.UserID, Gid: job.UserID}
	}
	group := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel = group
	// What a test left running may hold the pipe open.
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err = cmd.Wait()
	group()
	out.flush()
	if ctx.Err() != nil {
		return 1, fmt.Errorf("killed after %v", limit)
	}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), fmt.Errorf("ended by %v", ws.Signal())
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return cmd.ProcessState.ExitCode(), err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// dropAdmin executes command without CAP_SYS_ADMIN. Taken from the bounding set
// too, it does not come back when root executes a program.
func dropAdmin(command []string) error {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_CAP_AMBIENT", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	const bit = uint32(1) << unix.CAP_SYS_ADMIN
	sets[0].Effective &^= bit
	sets[0].Permitted &^= bit
	sets[0].Inheritable &^= bit
	if err := unix.Capset(&header, &sets[0]); err != nil {
		return os.NewSyscallError("capset", err)
	}
	return os.NewSyscallError("execve "+command[0], syscall.Exec(command[0], command, os.Environ()))
}

// lineWriter cuts what is written to it into lines.
type lineWriter struct {
	emit func(string)
	buf  []byte
	sent int
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.buf = append(w.buf, p...)
	for {
		end := bytes.IndexByte(w.buf, '\n')
		if end < 0 && len(w.buf) < maxLine {
			return len(p), nil
		}
		if end < 0 {
			end = maxLine
			w.send(w.buf[:end])
			w.buf = w.buf[end:]
			continue
		}
		w.send(w.buf[:end])
		w.buf = w.buf[end+1:]
	}
}

// send passes on a line. Results always arrive, however much was written.
func (w *lineWriter) send(line []byte) {
	before := w.sent
	w.sent += len(line)
	switch result := bytes.IndexByte(line, marker) >= 0; {
	case result || w.sent <= maxOutput:
		w.emit(strings.ToValidUTF8(string(line[:min(len(line), maxLine)]), "\uFFFD"))
	case before <= maxOutput:
		w.emit("init: more output was cut off")
	}
}

func (w *lineWriter) flush() {
	if len(w.buf) > 0 {
		w.send(w.buf)
		w.buf = nil
	}
}
