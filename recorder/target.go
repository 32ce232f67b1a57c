package recorder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/procfs"
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
	base  string // its root directory, as events name it
	marks []kernstream.Mark
	files []*os.File // of the marks

	// namespace keeps the mounts of a target connected until the last event has been
	// read, which may be after the end of the target: the kernel shows a path below
	// a mount that is nowhere as if that were the root. -1: it is the caller's own.
	namespace int

	start   func() error    // starts the command; nil: nothing is to be started
	abandon func()          // ends what waits for the target; may be nil
	ended   <-chan struct{} // closed at the end of the target; nil: it has none
	unseen  []string        // why a list is incomplete in any case
	early   string          // why a list is incomplete that ends before the target; empty: it is not
	waiting sync.WaitGroup  // for who closes ended
}

// release closes what was open for the marks, which do not need it any more.
func (p *place) release() {
	for _, f := range p.files {
		f.Close()
	}
	p.files = nil
}

// close lets go of everything. The context of the recording is done.
func (p *place) close() {
	p.release()
	if p.abandon != nil {
		p.abandon()
	}
	p.waiting.Wait()
	if p.namespace >= 0 {
		unix.Close(p.namespace)
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
	p := &place{namespace: -1}
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
	if p.namespace, err = unix.Openat(proc, "ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, t.gone("open", dir+"/ns/mnt", err)
	}
	root, err := unix.Openat(proc, "root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, t.gone("open", dir+"/root", err)
	}
	if err := p.fill(root, proc, o.OneMount, func(point string) (string, bool) { return point, true }); err != nil {
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

func (t Directory) open(_ context.Context, o *Options) (_ *place, err error) {
	root, err := unix.Open(string(t), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, recordError("open", string(t), os.NewSyscallError("open", err))
	}
	return openDirectory(root, o)
}

// openDirectory is the place of a directory that is open.
func openDirectory(root int, o *Options) (_ *place, err error) {
	p := &place{namespace: -1}
	proc, err := unix.Open("/proc/thread-self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(root)
		return nil, recordError("open", "/proc/thread-self", fmt.Errorf("%w: is /proc mounted?", os.NewSyscallError("open", err)))
	}
	defer unix.Close(proc)
	base, err := pathOf(root)
	if err != nil {
		unix.Close(root)
		return nil, err
	}
	if err := p.fill(root, proc, o.OneMount, func(point string) (string, bool) { return within(base, point) }); err != nil {
		p.release()
		return nil, err
	}
	return p, nil
}

// fill marks the mounts that are to be seen from the open directory root, which it takes
// over: that root is on, and, unless there is to be one only, those that
// the mount table of the thread or process proc has. below turns a mount point of that table
// into a path below root.
func (p *place) fill(root, proc int, one bool, below func(point string) (string, bool)) error {
	base, err := pathOf(root)
	dir := os.NewFile(uintptr(root), base)
	p.files = append(p.files, dir)
	p.marks = append(p.marks, kernstream.Mark{Type: kernstream.MarkMount, Dir: dir})
	if err != nil || one {
		p.base = base
		return err
	}
	p.base = base
	rows, err := mountsOf(proc)
	if err != nil {
		return err
	}
	for _, row := range rows {
		point, seen := below(row.MountPoint)
		if !seen || point == "/" || pseudo[row.FSType] {
			continue
		}
		file, err := openMount(root, point, uint64(row.ID))
		switch {
		case errors.Is(err, unix.EACCES): // a FUSE file system that is for its user alone
			p.unseen = append(p.unseen, fmt.Sprintf("what is on %s is not recorded: %v", point, err))
			continue
		case err != nil:
			return recordError("open", point, err)
		case file == nil:
			continue
		}
		p.files = append(p.files, file)
		p.marks = append(p.marks, kernstream.Mark{Type: kernstream.MarkMount, Dir: file})
	}
	return nil
}

// openMount opens the mount with this ID that is on point, as seen from the directory root. It
// returns nil if nobody can reach that: it is covered, gone, or below a dead file
// system. (What cannot be opened for another reason would be missing in the list.)
func openMount(root int, point string, id uint64) (*os.File, error) {
	for {
		// Not through a symbolic link that was put there since, and not out of
		// the root.
		fd, err := unix.Openat2(root, point, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
		})
		switch err {
		case nil:
		case unix.EINTR:
			continue
		case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ESTALE, unix.ENOTCONN, unix.ECONNABORTED:
			return nil, nil
		default:
			return nil, os.NewSyscallError("openat2", err)
		}
		var st unix.Statx_t
		err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st)
		if err == nil && st.Mnt_id == id {
			return os.NewFile(uintptr(fd), point), nil
		}
		unix.Close(fd) // covered by another one, which has a row, too
		if err == unix.ENOTCONN || err == unix.ECONNABORTED {
			err = nil
		}
		return nil, os.NewSyscallError("statx", err)
	}
}

// mountsOf returns the mount table of the thread or process that the directory
// proc is of.
func mountsOf(proc int) (rows []procfs.MountInfo, err error) {
	fd, err := unix.Openat(proc, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, recordError("open", "mountinfo", os.NewSyscallError("open", err))
	}
	defer unix.Close(fd)
	var parser procfs.MountInfoParser
	err = procfs.ReadRows(fd, nil, func(row []byte) error {
		if m, err := parser.Parse(string(row)); err == nil {
			rows = append(rows, m)
		}
		return nil
	})
	if err != nil {
		return nil, recordError("read", "mountinfo", err)
	}
	return rows, nil
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
