package recorder

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// A Target is what is recorded: a [Container], a [Directory] or a [Command].
type Target interface {
	// String names the target in errors.
	String() string

	// open finds out what to mark. ctx is that of the recording.
	open(ctx context.Context, o *Options) (*place, error)
}

// A place is where a target's files are.
type place struct {
	base    string   // its root directory, as events name it
	root    *os.File // open
	marks   []kernstream.Mark
	files   []*os.File  // of the marks, beside root
	mounts  *mountWatch // nil: there is to be one mount only
	missing []string    // why a list is incomplete from the beginning

	// namespace keeps the mounts of a target connected until the last event has been
	// read, which may be after the end of the target: the kernel shows a path below
	// a mount that is nowhere as if that were the root. nil: it is the caller's own.
	namespace *os.File

	start   func() error    // starts the command; nil: nothing is to be started
	abandon func()          // ends what waits for the target; may be nil
	ended   <-chan struct{} // closed at the end of the target; nil: it has none
	early   string          // why a list is incomplete that ends before the target; empty: it is not
	waiting sync.WaitGroup  // for who closes ended
}

// release closes what was open for the marks, which do not need it any more.
func (p *place) release() {
	for _, f := range p.files {
		f.Close()
	}
	p.files = nil
	if p.root != nil && p.mounts == nil {
		p.root.Close()
	}
}

// close lets go of everything. The context of the recording is done.
func (p *place) close() {
	p.release()
	if p.mounts != nil {
		p.mounts.close()
	}
	if p.root != nil {
		p.root.Close()
	}
	if p.abandon != nil {
		p.abandon()
	}
	p.waiting.Wait()
	if p.namespace != nil {
		p.namespace.Close()
	}
}

// ownPID is whose accesses are not recorded.
var ownPID = os.Getpid()

// A Container is the container that the process with this number is in: what is below its root
// directory, through the mounts of its mount namespace. It ends with the process. Whoever
// shares these mounts is recorded, too.
type Container int

// String names the process.
func (t Container) String() string { return "process " + strconv.Itoa(int(t)) }

func (t Container) open(ctx context.Context, o *Options) (_ *place, err error) {
	p := &place{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	// Pinned first: what is opened by its number afterwards is of this process, if
	// it is still there when all is open.
	end, err := kernstream.WatchProcess(ctx, kernstream.PID(int(t)), nil)
	if err != nil {
		return nil, err
	}
	p.abandon = func() { end.Close() }
	dir := fmt.Sprintf("/proc/%d", int(t))
	proc, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, t.gone("open", dir, err)
	}
	defer unix.Close(proc)
	if p.namespace, err = openNamespace(proc); err != nil {
		return nil, t.gone("open", dir+"/ns/mnt", err)
	}
	root, err := unix.Openat(proc, "root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, t.gone("open", dir+"/root", err)
	}
	if err := p.fill(ctx, root, proc, o.OneMount); err != nil {
		return nil, err
	}
	select {
	case <-end.C:
		return nil, t.gone("open", dir, unix.ESRCH)
	default:
	}
	p.ended = p.after(end)
	return p, nil
}

// gone is the error of a process that cannot be looked at: it may have ended.
func (t Container) gone(op, object string, err error) error {
	call := os.NewSyscallError(op, err)
	switch {
	case err == unix.ENOENT && !hasProc():
		call = fmt.Errorf("%w: is /proc mounted?", call)
	case err == unix.ENOENT || err == unix.ESRCH:
		call = fmt.Errorf("%w: %w", call, os.ErrProcessDone)
	case err == unix.EACCES || err == unix.EPERM:
		call = fmt.Errorf("%w: it needs CAP_SYS_PTRACE, or to be the same user", call)
	}
	return recordError(op, object, call)
}

// hasProc tells whether there is a /proc.
func hasProc() bool {
	_, err := os.Lstat("/proc/self")
	return err == nil
}

// after returns a channel that is closed when a stream of one process has told its end.
func (p *place) after(end *kernstream.Stream[*kernstream.ProcessEvent]) <-chan struct{} {
	ended := make(chan struct{})
	p.waiting.Go(func() {
		defer end.Close()
		if _, exited := <-end.C; exited {
			close(ended)
		}
	})
	return ended
}

// A Directory is the path of a directory of the caller, with all that is below: what is reached
// through the mount that it is on, and those below it. It has no end of its own.
type Directory string

// String returns the path.
func (t Directory) String() string { return string(t) }

func (t Directory) open(ctx context.Context, o *Options) (_ *place, err error) {
	root, err := unix.Open(string(t), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, recordError("open", string(t), os.NewSyscallError("open", err))
	}
	return openDirectory(ctx, root, o)
}

// openDirectory is the place of a directory that is open.
func openDirectory(ctx context.Context, root int, o *Options) (_ *place, err error) {
	// The thread whose mounts are looked at must not end meanwhile.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p := &place{}
	proc, err := unix.Open("/proc/thread-self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(root)
		call := os.NewSyscallError("open", err)
		if err == unix.ENOENT {
			call = fmt.Errorf("%w: is /proc mounted?", call)
		}
		return nil, recordError("open", "/proc/thread-self", call)
	}
	defer unix.Close(proc)
	if err := p.fill(ctx, root, proc, o.OneMount); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// fill marks the mounts that are to be seen from the open directory root, which it takes
// over: that root is on, and, unless there is to be one only, those below it that
// the mount table of the thread or process proc has.
func (p *place) fill(ctx context.Context, root, proc int, one bool) (err error) {
	p.base, err = pathOf(root)
	p.root = os.NewFile(uintptr(root), p.base)
	p.mark(p.root)
	if err != nil || one {
		return err
	}
	if p.namespace == nil && elsewhere(proc) {
		if p.namespace, err = openNamespace(proc); err != nil {
			return recordError("open", "ns/mnt", os.NewSyscallError("open", err))
		}
	}
	if p.mounts, err = newMountWatch(ctx, p, proc); err != nil {
		return err
	}
	if p.files, p.missing, err = p.mounts.first(); err != nil {
		return err
	}
	for _, file := range p.files {
		p.mark(file)
	}
	return nil
}

func (p *place) mark(root *os.File) {
	p.marks = append(p.marks, kernstream.Mark{Type: kernstream.MarkMount, Dir: root})
}

// openNamespace opens the mount namespace of the thread or process that the directory proc is
// of.
func openNamespace(proc int) (*os.File, error) {
	fd, err := unix.Openat(proc, "ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "ns/mnt"), nil
}

// pseudo are the file systems whose files the kernel makes up.
var pseudo = map[string]bool{
	"autofs": true, "binfmt_misc": true, "bpf": true, "cgroup": true, "cgroup2": true, "configfs": true, "debugfs": true,
	"devpts": true, "efivarfs": true, "fusectl": true, "mqueue": true, "nsfs": true, "proc": true, "pstore": true,
	"rpc_pipefs": true, "securityfs": true, "selinuxfs": true, "smackfs": true, "sysfs": true, "tracefs": true,
}

// pathOf returns the path that the kernel shows for an open file, as for those of
// events.
func pathOf(fd int) (string, error) {
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", recordError("readlink", "/proc/self/fd", fmt.Errorf("%w: is /proc mounted?", err))
	}
	return path, nil
}

// within returns path as it is below the directory base, and whether it is below at
// all.
func within(base, path string) (string, bool) {
	if base == "/" {
		return path, true
	}
	rest, ok := strings.CutPrefix(path, base)
	switch {
	case !ok || rest != "" && rest[0] != '/':
		return "", false
	case rest == "":
		return "/", true
	}
	return rest, true
}
