package kernstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/pidfd"
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
	own       bool               // the table is the one of the threads that run goroutines
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
	t := &mountTarget{own: onOrdinaryThread()}
	return t, t.openProc(ownProc())
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
	fd, err := openPidfd(pid)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		// A sandbox forbids it. The end of the process is not noticed then.
		return t, t.openProc("/proc/" + strconv.Itoa(pid))
	case err != nil:
		return nil, mountError("pidfd_open", t.name, err)
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
		switch pid, err = procNumber(fd); {
		case err != nil:
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
	state, err := pidfd.Poll(fd)
	return state != pidfd.Running, err
}

// exitsSoon tells whether a process of which something is gone already is about
// to end.
func (t *mountTarget) exitsSoon() bool {
	for range 50 {
		if t.exited() {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
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
// the calling thread.
func foreignNamespace(fd int) (id uint64, err error) {
	var theirs, ours unix.Stat_t
	if err := unix.Fstat(fd, &theirs); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	if err := unix.Stat("/proc/thread-self/ns/mnt", &ours); err != nil {
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
	err = withLimit(err)
	switch {
	case t.namespace != nil && errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: entering the namespace needs CAP_SYS_ADMIN over it, and CAP_SYS_CHROOT", err)
	case !t.other && missing:
		err = fmt.Errorf("%w: is /proc mounted?", err)
	case !t.other || !missing && !tableless:
	case t.process == nil || t.exited() || missing && t.exitsSoon():
		err = goneError(err)
	case missing:
		err = fmt.Errorf("%w: the process runs, but /proc does not show it (mount option hidepid): %w", fs.ErrPermission, err)
	default:
		err = fmt.Errorf("%w: the main thread of the process has ended, and its mount table with it", err)
	}
	return mountError(op, t.name, err)
}

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

// newMountSource returns the best source for target that works. It has begun to
// watch, and owns target.
func newMountSource(ctx context.Context, target *mountTarget, options *MountOptions) (mountSource, error) {
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
