package faults

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

var (
	update   = flag.Bool("update", false, "write docs/faults.md anew")
	patience = flag.Duration("patience", 2*time.Minute, "how long a fault may take; what takes longer hangs")
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// A fault is something that goes wrong while a program does something.
type fault struct {
	source  string
	doing   string // what the program does
	fault   string // what goes wrong
	outcome string // what comes of it, in the words that run returns
	says    string // what an error has in its text, so that a reader knows what to do

	prepare func(*lab)        // before it goes wrong
	inject  func(*lab)        // lets it go wrong
	run     func(*lab) string // the scenario

	kernel [2]int // where the outcome is another one before
	root   bool   // it needs more than a user namespace gives
	user   bool   // it needs a user namespace of its own, with limits of its own
	fuse   bool   // it needs /dev/fuse
}

func (f *fault) name() string { return f.source + "/" + f.doing + "/" + f.fault }

// all are all faults.
func all() []fault {
	return slices.Concat(mountFaults(), processFaults(), fileFaults(), permissionFaults(), fuseFaults(), placeFaults(), handoverFaults(), recordFaults())
}

// TestFaults: whatever goes wrong, the outcome is the one in the table, nothing
// hangs, and nothing is left.
func TestFaults(t *testing.T) {
	testenv.NeedMounts(t)
	faults := all()
	names := map[string]bool{}
	for i := range faults {
		f := &faults[i]
		if names[f.name()] {
			t.Errorf("two faults are called %s", f.name()) // a child would not know which
		}
		names[f.name()] = true
		t.Run(f.name(), func(t *testing.T) {
			if f.kernel != [2]int{} {
				testenv.NeedKernel(t, f.kernel[0], f.kernel[1], "the outcome "+f.outcome)
			}
			if f.root {
				testenv.NeedRoot(t, f.doing)
			}
			if f.fuse {
				needFUSE(t)
			}
			v := meet(t, f)
			if v.Outcome != f.outcome {
				t.Errorf("the outcome is\n\t%s\nwant\n\t%s\nthe error\n\t%s", v.Outcome, f.outcome, v.Text)
			}
			if !strings.Contains(v.Text, f.says) {
				t.Errorf("the error is\n\t%s\nwant in it\n\t%s", v.Text, f.says)
			}
		})
	}
	if len(faults) < 40 {
		t.Errorf("%d faults are too few", len(faults))
	}
}

func needFUSE(t testing.TB) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		testenv.Missing(t, "needs to open /dev/fuse", err)
	}
	unix.Close(fd)
}

// A verdict is what a child says of a fault.
type verdict struct {
	Outcome string
	Text    string   // of the last error
	Left    []string // behind: descriptors, goroutines
}

// meet lets a child meet f.
func meet(t *testing.T, f *fault) verdict {
	t.Helper()
	// The name of the test is nothing for a shell.
	dir, err := os.MkdirTemp("", "fault")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	cmd := testenv.Child(t, "fault", f.name(), dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if f.user {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	var out, stacks bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stacks
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// What hangs is asked for its stacks. A process that waits in the kernel does
	// not answer; it is killed.
	hung := time.AfterFunc(*patience, func() {
		cmd.Process.Signal(syscall.SIGCONT)
		cmd.Process.Signal(syscall.SIGQUIT)
		time.Sleep(5 * time.Second)
		cmd.Process.Kill()
	})
	err = cmd.Wait()
	if !hung.Stop() {
		t.Fatalf("it hangs: %v\n%s", err, stacks.String())
	}
	var v verdict
	if err := errors.Join(err, json.Unmarshal(out.Bytes(), &v)); err != nil {
		t.Fatalf("the child: %v\n%s%s", err, out.String(), stacks.String())
	}
	if v.Left != nil {
		t.Errorf("left behind: %q", v.Left)
	}
	return v
}

func init() {
	testenv.RegisterChild("fault", func(args []string) int {
		faults := all()
		i := slices.IndexFunc(faults, func(f fault) bool { return f.name() == args[0] })
		l := newLab(args[1])
		v := verdict{Outcome: l.live(&faults[i])}
		v.Text, v.Left = lastError, l.left()
		out, err := json.Marshal(&v)
		if err != nil {
			panic(err)
		}
		os.Stdout.Write(out)
		l.clear()
		return 0
	})
}

// lastError is the text of the last error that was an outcome.
var lastError string

// failure is an error as an outcome: the operation, the errno, and what it Is.
func failure(err error) string {
	lastError = err.Error()
	op, ok := errors.AsType[*kernstream.OpError](err)
	if !ok {
		return fmt.Sprintf("fails, with no OpError: %v", err)
	}
	words := []string{"fails: " + op.Op}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		words[0] += " " + unix.ErrnoName(errno)
	}
	for _, sentinel := range []struct {
		err  error
		name string
	}{
		{errors.ErrUnsupported, "errors.ErrUnsupported"},
		{fs.ErrPermission, "fs.ErrPermission"},
		{fs.ErrNotExist, "fs.ErrNotExist"},
		{os.ErrProcessDone, "os.ErrProcessDone"},
		{os.ErrClosed, "os.ErrClosed"},
		{io.ErrUnexpectedEOF, "io.ErrUnexpectedEOF"},
		{fuse.ErrAborted, "fuse.ErrAborted"},
		{fuse.ErrUnmounted, "fuse.ErrUnmounted"},
		{exec.ErrNotFound, "exec.ErrNotFound"},
	} {
		if errors.Is(err, sentinel.err) {
			words = append(words, "Is "+sentinel.name)
		}
	}
	return strings.Join(words, ", ")
}
