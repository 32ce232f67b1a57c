package kernstream_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What tests of permission events stand on: a watcher, and openers: another
// process, whose threads wait for the answers. It is killed after a while,
// whatever becomes of the test, so nothing waits for ever.

const (
	openPerm   = kernstream.OpOpenPerm
	accessPerm = kernstream.OpAccessPerm
	execPerm   = kernstream.OpOpenExecPerm
	preAccess  = kernstream.OpPreAccess
)

var (
	allow = kernstream.Response{Allow: true}
	deny  = kernstream.Response{}
)

// contentOptions are for watchers that ask, whose default answer comes late.
func contentOptions(byDefault kernstream.Response) *kernstream.FileOptions {
	return &kernstream.FileOptions{Class: kernstream.ClassContent, Default: byDefault, Deadline: time.Minute}
}

// preContentOptions are the same for ClassPreContent.
func preContentOptions(byDefault kernstream.Response) *kernstream.FileOptions {
	options := contentOptions(byDefault)
	options.Class = kernstream.ClassPreContent
	return options
}

// newPermissionLab starts a watcher with marks that ask, and openers.
func newPermissionLab(t testing.TB, options *kernstream.FileOptions, ensure string, marks ...kernstream.Mark) (*fileLab, *openers) {
	t.Helper()
	needMarks(t)
	o := newOpeners(t)
	l := newFileLab(t, options, ensure, marks...)
	return l, o
}

// openers is a process that opens files, each by a thread of its own.
type openers struct {
	t       testing.TB
	cmd     *exec.Cmd
	in      io.WriteCloser
	number  int
	mu      sync.Mutex
	results map[int]chan opened
}

// opened is what came of an open.
type opened struct {
	errno unix.Errno
	took  time.Duration
}

func newOpeners(t testing.TB) *openers {
	t.Helper()
	testenv.NeedMounts(t)
	o := &openers{t: t, cmd: testenv.Child(t, "openers"), results: map[int]chan opened{}}
	var err error
	if o.in, err = o.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := o.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := o.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(5*time.Minute, func() { o.cmd.Process.Kill() })
	read := make(chan struct{})
	go func() {
		defer close(read)
		o.read(out)
	}()
	t.Cleanup(func() {
		o.cmd.Process.Kill()
		<-read
		o.cmd.Wait()
		kill.Stop()
	})
	return o
}

func (o *openers) pid() int { return o.cmd.Process.Pid }

// read notes what the openers tell.
func (o *openers) read(out io.Reader) {
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var id, errno int
		var took time.Duration
		if _, err := fmt.Sscan(lines.Text(), &id, &errno, (*int64)(&took)); err != nil {
			continue
		}
		o.mu.Lock()
		result := o.results[id]
		delete(o.results, id)
		o.mu.Unlock()
		result <- opened{unix.Errno(errno), took}
	}
}

// begin lets a thread do something with a file: "open" it, "read" its first
// bytes, "write" some, "create" it, "list" it or "exec" it.
func (o *openers) begin(what, path string) <-chan opened {
	o.t.Helper()
	result := make(chan opened, 1)
	o.mu.Lock()
	o.number++
	id := o.number
	o.results[id] = result
	o.mu.Unlock()
	if _, err := fmt.Fprintln(o.in, id, what, path); err != nil {
		o.t.Fatal(err)
	}
	return result
}

// end waits for what came of it.
func (o *openers) end(result <-chan opened) unix.Errno {
	o.t.Helper()
	select {
	case r := <-result:
		return r.errno
	case <-time.After(patience):
		o.t.Fatalf("an opener waits for more than %v", patience)
		return 0
	}
}

// want fails the test unless an opener gets the errno; 0: none.
func (o *openers) want(result <-chan opened, errno unix.Errno) {
	o.t.Helper()
	if got := o.end(result); got != errno {
		o.t.Errorf("the opener got %v; want %v", errnoText(got), errnoText(errno))
	}
}

func errnoText(errno unix.Errno) string {
	if errno == 0 {
		return "the file"
	}
	return unix.ErrnoName(errno)
}

// stands fails the test if the opener does not wait.
func (o *openers) stands(result <-chan opened) {
	o.t.Helper()
	select {
	case r := <-result:
		o.t.Errorf("the opener does not wait, it got %v", errnoText(r.errno))
	case <-time.After(20 * time.Millisecond):
	}
}

// waiting waits until n threads of the openers wait in the kernel, where only an
// answer wakes them: that of a group, or of a FUSE server. Those that sleep for
// anything else, a lock of their memory say, have not asked yet.
func (o *openers) waiting(n int) {
	o.t.Helper()
	answer := regexp.MustCompile("fanotify|request_wait")
	tasks := fmt.Sprintf("/proc/%d/task", o.pid())
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		threads, err := os.ReadDir(tasks)
		if err != nil {
			o.t.Fatal(err)
		}
		var asleep []string
		for _, thread := range threads {
			// Its name may have spaces and parentheses.
			text, _ := os.ReadFile(filepath.Join(tasks, thread.Name(), "stat"))
			if _, rest, ok := strings.Cut(string(text), ") "); !ok || rest[0] != 'D' {
				continue
			}
			where, err := os.ReadFile(filepath.Join(tasks, thread.Name(), "wchan"))
			if err != nil || string(where) == "0" || answer.Match(where) {
				asleep = append(asleep, string(where))
			}
		}
		if len(asleep) == n {
			return
		}
		if time.Now().After(deadline) {
			o.t.Fatalf("openers wait in the kernel: %q; want %d", asleep, n)
		}
	}
}

func init() { testenv.RegisterChild("openers", openersMain) }

// openersMain obeys the lines that begin writes.
func openersMain([]string) int {
	time.AfterFunc(6*time.Minute, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
	var mu sync.Mutex
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		id, rest, _ := strings.Cut(lines.Text(), " ")
		what, path, _ := strings.Cut(rest, " ")
		go func() {
			begin := time.Now()
			errno := openerDo(what, path)
			took := time.Since(begin)
			mu.Lock()
			defer mu.Unlock()
			fmt.Println(id, int(errno), took.Nanoseconds())
		}()
	}
	return 0
}

// openerDo does what begin says.
func openerDo(what, path string) unix.Errno {
	flags := map[string]int{"write": unix.O_RDWR, "create": unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, "list": unix.O_DIRECTORY}[what]
	if what == "exec" {
		err := exec.Command(path, "-test.run=^$").Start()
		return errnoOf(err)
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return errnoOf(err)
	}
	defer unix.Close(fd)
	switch what {
	case "read":
		_, err = unix.Pread(fd, make([]byte, 5000), 12345)
	case "write":
		_, err = unix.Pwrite(fd, make([]byte, 5000), 12345)
	case "list":
		_, err = unix.Getdents(fd, make([]byte, 4096))
	}
	return errnoOf(err)
}

func errnoOf(err error) unix.Errno {
	for e := err; e != nil; {
		if errno, ok := e.(unix.Errno); ok {
			return errno
		}
		wrapped, ok := e.(interface{ Unwrap() error })
		if !ok {
			return unix.EINVAL
		}
		e = wrapped.Unwrap()
	}
	return 0
}
