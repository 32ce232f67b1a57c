package recorder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/mntns"
)

// Command is a command that the recorder starts, in a private copy of the mount
// namespace of the caller: no mount propagates into it or out of it, and who is in it is
// the command, or was started by it. It is recorded from its first instruction on, its
// program included. The caller has to call cmd.Wait once the constructor has
// returned without an error, as after cmd.Start, and cmd.Process is set. The
// recording ends with the command, or with the last process in the namespace
// ([Options.Descendants]). A command with SysProcAttr.Pdeathsig gets that signal when
// the recording ends before it.
//
// The copy is made by a thread from which the command is started, so neither a helper
// program nor the help of the caller's own is needed. SysProcAttr must not ask for
// another mount namespace or root. It needs CAP_SYS_ADMIN.
func Command(cmd *exec.Cmd) Target { return commandTarget{cmd} }

type commandTarget struct{ cmd *exec.Cmd }

func (t commandTarget) String() string {
	if t.cmd == nil {
		return "command"
	}
	return t.cmd.Path
}

func (t commandTarget) check() error {
	if t.cmd == nil {
		return invalid("command", "there is no command")
	}
	attr := t.cmd.SysProcAttr
	switch {
	case t.cmd.Process != nil:
		return invalid(t.String(), "the command was started before")
	case attr == nil:
	case (attr.Cloneflags|attr.Unshareflags)&unix.CLONE_NEWNS != 0:
		return invalid(t.String(), "SysProcAttr asks for another mount namespace than the one that is recorded")
	case attr.Chroot != "":
		return invalid(t.String(), "SysProcAttr asks for another root than the one that is recorded")
	}
	return nil
}

func (t commandTarget) open(ctx context.Context, o *Options) (*place, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	watcher, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	p := &place{ended: ended, early: "the recording was ended before the command"}
	r := &commandRun{target: t, place: p, ready: make(chan error, 1), begin: make(chan bool, 1), started: make(chan error, 1)}
	p.waiting.Go(func() {
		if err := mntns.Private(func(proc int) error { return r.inside(ctx, proc, o.OneMount, watcher) }); err != nil {
			r.ready <- explain(err)
		}
	})
	if err := <-r.ready; err != nil {
		watcher.Close()
		p.close()
		op := "unshare"
		if call, ok := errors.AsType[*os.SyscallError](err); ok {
			op = call.Syscall
		}
		return nil, asRecordError(op, t.String(), err)
	}
	p.abandon = sync.OnceFunc(func() {
		r.begin <- false
		watcher.Close()
	})
	p.start = func() error {
		r.begin <- true
		if err := <-r.started; err != nil {
			return err
		}
		p.waiting.Go(func() {
			if r.wait(watcher, o.Descendants) {
				close(ended)
			}
			close(r.over)
		})
		return nil
	}
	return p, nil
}

func explain(err error) error {
	if os.IsPermission(err) {
		return fmt.Errorf("%w: a private mount namespace needs CAP_SYS_ADMIN", err)
	}
	return err
}

// A commandRun is a command and the thread that it is started from.
type commandRun struct {
	target    commandTarget
	place     *place
	namespace string        // the mount namespace, as /proc shows it
	ready     chan error    // the place is filled
	begin     chan bool     // whether to start the command
	started   chan error    // what came of that
	over      chan struct{} // closed at the end
}

// inside is what happens in the private namespace.
func (r *commandRun) inside(ctx context.Context, proc int, one bool, watcher *kernstream.ProcessWatcher) (err error) {
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	if r.place.namespace, err = openNamespace(proc); err != nil {
		unix.Close(root)
		return os.NewSyscallError("open", err)
	}
	if err := r.place.fill(ctx, root, proc, one); err != nil {
		return err
	}
	if r.namespace, err = namespaceOf(proc, "ns/mnt"); err != nil {
		return err
	}
	r.over = make(chan struct{})
	r.ready <- nil
	if !<-r.begin {
		return nil
	}
	_, err = watcher.Start(r.target.cmd, nil)
	r.started <- err
	// The signal would go out when the thread ends, and not the program.
	if attr := r.target.cmd.SysProcAttr; err == nil && attr != nil && attr.Pdeathsig != 0 {
		<-r.over
	}
	return nil
}

func namespaceOf(dir int, path string) (string, error) {
	buf := make([]byte, 64)
	n, err := unix.Readlinkat(dir, path, buf)
	if err != nil {
		return "", os.NewSyscallError("readlinkat", err)
	}
	return string(buf[:n]), nil
}

// wait waits until the command has ended, and if need be all that are in its namespace.
// It returns false if the recording ended before.
func (r *commandRun) wait(watcher *kernstream.ProcessWatcher, all bool) bool {
	defer watcher.Close()
	if _, ok := <-watcher.C; !ok {
		return false
	}
	// Whoever is in the namespace was forked by one that was. To find nobody twice
	// means that nobody forked while /proc was read.
	for empty := 0; all && empty < 2; empty++ {
		n := 0
		for _, pid := range inNamespace(r.namespace) {
			if _, err := watcher.Watch(kernstream.PID(pid), nil); err == nil {
				n++
			}
		}
		for range n {
			if _, ok := <-watcher.C; !ok {
				return false
			}
			empty = -1
		}
	}
	return true
}

// inNamespace returns the processes in a mount namespace.
func inNamespace(name string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if found, err := namespaceOf(unix.AT_FDCWD, dir+"/ns/mnt"); err != nil || found != name {
			continue
		}
		if pid, err := strconv.Atoi(strings.TrimPrefix(dir, "/proc/")); err == nil && pid != ownPID {
			pids = append(pids, pid)
		}
	}
	return pids
}
