package kernstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/statmount"
	"github.com/kernstream/kernstream/poller"
)

// A mountTarget is whose mount table is read. It can be opened again and again,
// and is always the same process or namespace: a process is held by its
// directory in /proc, which never comes to stand for a later process with the
// same ID.
type mountTarget struct {
	name      string             // in errors
	proc      *poller.Descriptor // the directory of the process in /proc, or
	namespace *poller.Descriptor // the mount namespace
	own       bool               // the table is the one of this process
	other     bool               // the process is one that was asked for by its ID
	process   *poller.File       // its pidfd, which becomes readable when it ends; may be nil
}

// newMountTarget finds the table that options ask for.
func newMountTarget(options *MountOptions) (*mountTarget, error) {
	switch {
	case options.Namespace != nil && options.PID != 0:
		return nil, mountError("open", "", errors.New("PID and Namespace are both set"))
	case options.Namespace != nil:
		return newNamespaceTarget(options.Namespace)
	case options.PID < 0:
		return nil, mountError("open", processName(options.PID), unix.EINVAL)
	case options.PID > 0:
		return newProcessTarget(options.PID)
	}
	dir := ownProc()
	t := &mountTarget{own: dir == procSelf}
	return t, t.openProc(dir)
}

func processName(pid int) string { return "process " + strconv.Itoa(pid) }

const procSelf = "/proc/self"

// ownProc returns the directory in /proc of the caller. Threads of a Go program
// come and go, so it is the one of the whole process, unless the calling
// thread has left the others' root directory or namespace.
func ownProc() string {
	const process, thread = procSelf, "/proc/thread-self"
	pid, tid := unix.Getpid(), unix.Gettid()
	if pid == tid {
		return process
	}
	// A thread has to part with the others' file-system context before it can
	// enter another mount namespace.
	const kcmpFS = 3
	differ, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(tid), kcmpFS, 0, 0, 0)
	switch {
	case errno == 0 && differ == 0:
		return process
	case errno == 0:
		return thread
	}
	// kcmp(2) is left out of some kernels, and of some sandboxes. A thread
	// that has a root of its own in the same namespace is then taken for one of
	// the others.
	theirs, err := os.Readlink(process + "/ns/mnt")
	ours, err2 := os.Readlink(thread + "/ns/mnt")
	if err != nil || err2 != nil || ours != theirs {
		return thread
	}
	return process
}

// openProc opens the directory dir of the process in /proc.
func (t *mountTarget) openProc(dir string) error {
	t.name = dir + "/mountinfo"
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return t.failed(os.NewSyscallError("open", err))
	}
	t.proc = poller.Own(fd)
	return nil
}

func newProcessTarget(pid int) (_ *mountTarget, err error) {
	t := &mountTarget{name: processName(pid), other: true}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	fd, err := unix.PidfdOpen(pid, 0)
	switch call := os.NewSyscallError("pidfd_open", err); {
	case err == unix.EPERM || err == unix.ENOSYS:
		// A sandbox forbids it. The end of the process is not noticed then.
		return t, t.openProc("/proc/" + strconv.Itoa(pid))
	case err == unix.ESRCH:
		return nil, mountError("pidfd_open", t.name, goneError(call))
	case err == unix.EINVAL || err == unix.ENOENT:
		return nil, mountError("pidfd_open", t.name, fmt.Errorf("not a process, perhaps a thread of one: %w", call))
	case err != nil:
		return nil, mountError("pidfd_open", t.name, call)
	}
	if t.process, err = poller.New(fd, t.name); err != nil {
		return nil, t.failed(err)
	}
	// /proc may number processes otherwise than this process does.
	number, err := t.number()
	if err != nil {
		return nil, t.failed(err)
	}
	if err := t.openProc("/proc/" + strconv.Itoa(number)); err != nil {
		return nil, err
	}
	// If the process still runs, the directory is its, and not a later one's.
	if t.exited() {
		return nil, mountError("open", t.name, goneError(os.NewSyscallError("open", unix.ESRCH)))
	}
	return t, nil
}

// number returns the ID that the process has in /proc.
func (t *mountTarget) number() (pid int, err error) {
	cerr := t.process.Control(func(fd int) {
		var text []byte
		if text, err = os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd)); err != nil {
			return
		}
		var ok bool
		switch pid, ok = procfs.PidfdPID(text); {
		case !ok:
			err = fmt.Errorf("no process ID in the fdinfo %q of a pidfd", text)
		case pid < 0:
			err = os.NewSyscallError("open", unix.ESRCH)
		case pid == 0:
			err = errors.New("/proc is of a process ID namespace that does not have the process")
		}
	})
	return pid, cmp.Or(cerr, err)
}

// exited tells whether the process has ended, as far as that can be known.
func (t *mountTarget) exited() bool {
	exited := false
	if t.process != nil {
		t.process.Control(func(fd int) { exited, _ = pidfdExited(fd) })
	}
	return exited
}

// pidfdExited tells whether the process of a pidfd has ended.
func pidfdExited(fd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return n > 0, os.NewSyscallError("poll", err)
		}
	}
}

func newNamespaceTarget(namespace *os.File) (*mountTarget, error) {
	t := &mountTarget{name: namespace.Name()}
	conn, err := namespace.SyscallConn()
	if err != nil {
		return nil, t.failed(err)
	}
	own, kind := -1, 0
	call := "ioctl"
	cerr := conn.Control(func(fd uintptr) {
		if kind, err = unix.IoctlRetInt(int(fd), unix.NS_GET_NSTYPE); err == nil {
			call = "fcntl"
			own, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		}
	})
	switch err = os.NewSyscallError(call, err); {
	case cerr != nil:
		return nil, t.failed(os.ErrClosed)
	case err != nil && call == "ioctl":
		return nil, t.failed(fmt.Errorf("not a namespace: %w", err))
	case err != nil:
		return nil, t.failed(err)
	}
	t.namespace = poller.Own(own)
	if kind != unix.CLONE_NEWNS {
		t.close()
		return nil, t.failed(fmt.Errorf("not a mount namespace: %w", unix.EINVAL))
	}
	return t, nil
}

// open opens the mountinfo file, with the root directory of this moment.
func (t *mountTarget) open() (fd int, err error) {
	if t.namespace != nil {
		err = mntns.Do(t.namespace.FD(), func(proc int) error {
			fd, err = openMountinfo(proc)
			return err
		})
	} else {
		fd, err = openMountinfo(t.proc.FD())
	}
	if err != nil {
		return -1, t.failed(err)
	}
	return fd, nil
}

// openNamespace opens the mount namespace of the table. For another process it
// needs the right to trace it, see ptrace(2).
func (t *mountTarget) openNamespace() (fd int, err error) {
	if t.namespace != nil {
		fd, err = unix.FcntlInt(uintptr(t.namespace.FD()), unix.F_DUPFD_CLOEXEC, 0)
		err = os.NewSyscallError("fcntl", err)
	} else {
		fd, err = unix.Openat(t.proc.FD(), "ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		err = os.NewSyscallError("openat", err)
	}
	if err != nil {
		return -1, t.failed(err)
	}
	return fd, nil
}

// uniqueIDs returns what finds the unique IDs of the mounts of the table.
func (t *mountTarget) uniqueIDs() uniqueIDs {
	if t.own {
		return uniqueIDs{sure: true}
	}
	fd, err := t.openNamespace()
	if err != nil {
		return uniqueIDs{}
	}
	defer unix.Close(fd)
	id, err := foreignNamespace(fd)
	if err != nil {
		return uniqueIDs{}
	}
	return uniqueIDs{reader: statmount.Reader{Namespace: id}, sure: true}
}

// foreignNamespace returns the ID of a mount namespace, or 0 if it is the one of
// this process.
func foreignNamespace(fd int) (id uint64, err error) {
	var theirs, ours unix.Stat_t
	if err := unix.Fstat(fd, &theirs); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	if err := unix.Stat("/proc/self/ns/mnt", &ours); err != nil {
		return 0, os.NewSyscallError("stat", err)
	}
	if theirs.Dev == ours.Dev && theirs.Ino == ours.Ino {
		return 0, nil
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.NS_GET_MNTNS_ID, uintptr(unsafe.Pointer(&id))) // Linux 6.11
	if errno != 0 {
		return 0, os.NewSyscallError("ioctl", errno)
	}
	return id, nil
}

func openMountinfo(proc int) (int, error) {
	fd, err := unix.Openat(proc, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	return fd, os.NewSyscallError("openat", err)
}

func (t *mountTarget) close() {
	if t.proc != nil {
		t.proc.Close()
	}
	if t.namespace != nil {
		t.namespace.Close()
	}
	if t.process != nil {
		t.process.Close()
	}
}

// failed returns err as an error about this target.
func (t *mountTarget) failed(err error) error {
	op := "open"
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		op = call.Syscall
	}
	missing := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)
	tableless := op == "openat" && errors.Is(err, unix.EINVAL) // a zombie, say
	switch {
	case t.namespace != nil && errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: entering the namespace needs CAP_SYS_ADMIN over it, and CAP_SYS_CHROOT", err)
	case !t.other && missing:
		err = fmt.Errorf("%w: is /proc mounted?", err)
	case !t.other || !missing && !tableless:
	case t.process == nil || t.exited():
		err = goneError(err)
	case missing:
		err = fmt.Errorf("%w: the process runs, but /proc does not show it (mount option hidepid): %w", fs.ErrPermission, err)
	default:
		err = fmt.Errorf("%w: the main thread of the process has ended, and its mount table with it", err)
	}
	return mountError(op, t.name, err)
}

func goneError(err error) error { return fmt.Errorf("%w (%w)", os.ErrProcessDone, err) }

func mountError(op, object string, err error) error {
	return &OpError{Op: op, Source: "mount", Object: object, Err: err}
}

// leaveNamespace lets go of a namespace file, which keeps the namespace alive.
// Nothing can be opened of it afterwards.
func (t *mountTarget) leaveNamespace() {
	if t.namespace != nil {
		t.namespace.Close()
	}
}

// A mountRoot is a root directory.
type mountRoot struct {
	mount   uint64 // on which mount it is: the unique ID since Linux 6.8
	dev     uint64
	ino     uint64
	ofMount bool // it is the root of the mount
}

// rootAt returns which directory path is. It does not wait for a file system
// that hangs.
func rootAt(dir int, path string) (mountRoot, error) {
	const mask = unix.STATX_INO | unix.STATX_MNT_ID | unix.STATX_MNT_ID_UNIQUE
	var stat unix.Statx_t
	if err := unix.Statx(dir, path, unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, mask, &stat); err != nil {
		return mountRoot{}, os.NewSyscallError("statx", err)
	}
	return mountRoot{
		mount:   stat.Mnt_id,
		dev:     unix.Mkdev(stat.Dev_major, stat.Dev_minor),
		ino:     stat.Ino,
		ofMount: stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0,
	}, nil
}

// newMountSource returns the best source that works for options. It has begun to
// watch.
func newMountSource(ctx context.Context, options *MountOptions) (mountSource, error) {
	if options.Via < ViaAuto || options.Via > ViaFanotify {
		return nil, mountError("watch", "", fmt.Errorf("unknown MountVia %d", options.Via))
	}
	target, err := newMountTarget(options)
	if err != nil {
		return nil, err
	}
	made := false
	defer func() {
		if !made { // by an error, or a panic of the filter
			target.close()
		}
	}()
	if options.Via != ViaMountinfo {
		source, err := newFanotifySource(ctx, target, options.Filter)
		if made = err == nil; made {
			return source, nil
		}
		if options.Via == ViaFanotify || ctx.Err() != nil {
			return nil, err
		}
	}
	source, err := newMountinfoSource(target, options.Filter)
	if made = err == nil; made {
		return source, nil
	}
	return nil, err
}
