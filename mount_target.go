package kernstream

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
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
	process   *poller.File       // a pidfd that becomes readable when the process ends; may be nil
}

// newMountTarget finds the table that options ask for. With watch it also
// prepares to learn the end of the process.
func newMountTarget(options *MountOptions, watch bool) (*mountTarget, error) {
	switch {
	case options.Namespace != nil && options.PID != 0:
		return nil, mountError("open", "", errors.New("PID and Namespace are both set"))
	case options.Namespace != nil:
		return newNamespaceTarget(options.Namespace)
	case options.PID < 0:
		return nil, mountError("open", "process "+strconv.Itoa(options.PID), unix.EINVAL)
	case options.PID > 0:
		return newProcessTarget(options.PID, watch)
	}
	return newProcTarget(ownProc())
}

// ownProc returns the directory in /proc of the caller. Threads of a Go program
// come and go, so it is the one of the whole process, unless the calling
// thread left the others' namespace or root directory.
func ownProc() string {
	const process, thread = "/proc/self", "/proc/thread-self"
	pid, tid := unix.Getpid(), unix.Gettid()
	if pid == tid {
		return process
	}
	theirs, err := os.Readlink(process + "/ns/mnt")
	ours, err2 := os.Readlink(thread + "/ns/mnt")
	if err != nil || err2 != nil || ours != theirs {
		return thread
	}
	// kcmp(2) is left out of some kernels; a thread with a root of its own
	// is then taken for one of the others.
	const kcmpFS = 3
	differ, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(tid), kcmpFS, 0, 0, 0)
	if errno == 0 && differ != 0 {
		return thread
	}
	return process
}

func newProcTarget(dir string) (*mountTarget, error) {
	t := &mountTarget{name: dir + "/mountinfo"}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, t.failed(os.NewSyscallError("open", err))
	}
	t.proc = poller.Own(fd)
	return t, nil
}

func newProcessTarget(pid int, watch bool) (*mountTarget, error) {
	if !watch {
		return newProcTarget("/proc/" + strconv.Itoa(pid))
	}
	// The pidfd first: if its process still runs once the directory is open,
	// the directory is that process's.
	object := "process " + strconv.Itoa(pid)
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == unix.ESRCH:
		return nil, mountError("pidfd_open", object, goneError(err))
	case err == unix.EINVAL || err == unix.ENOENT:
		return nil, mountError("pidfd_open", object, fmt.Errorf("not a process, perhaps a thread of one: %w", err))
	case err != nil:
		return nil, mountError("pidfd_open", object, os.NewSyscallError("pidfd_open", err))
	}
	process, err := poller.New(fd, object)
	if err != nil {
		return nil, mountError("epoll_ctl", object, err)
	}
	t, err := newProcTarget("/proc/" + strconv.Itoa(pid))
	if err != nil {
		process.Close()
		return nil, err
	}
	t.process = process
	exited := false
	if err := process.Control(func(fd int) { exited, err = pidfdExited(fd) }); err != nil {
		t.close()
		return nil, mountError("poll", object, err)
	}
	if err != nil || exited {
		t.close()
		return nil, mountError("open", t.name, goneError(unix.ESRCH))
	}
	return t, nil
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
	cerr := conn.Control(func(fd uintptr) {
		if kind, err = unix.IoctlRetInt(int(fd), unix.NS_GET_NSTYPE); err == nil {
			own, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		}
	})
	switch {
	case cerr != nil:
		return nil, t.failed(os.ErrClosed)
	case own < 0 && (err == unix.ENOTTY || err == unix.EINVAL):
		return nil, t.failed(fmt.Errorf("not a namespace: %w", err))
	case err != nil:
		return nil, t.failed(os.NewSyscallError("fcntl", err))
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
	switch {
	case t.namespace != nil && errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: entering the namespace needs CAP_SYS_ADMIN over it, and CAP_SYS_CHROOT", err)
	case t.namespace == nil && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)):
		if _, statErr := os.Stat("/proc/self"); statErr != nil {
			err = fmt.Errorf("%w: is /proc mounted?", err)
			break
		}
		err = goneError(err)
	case t.namespace == nil && errors.Is(err, unix.EINVAL):
		// A zombie has no mount table.
		err = goneError(err)
	}
	return mountError(op, t.name, err)
}

func goneError(err error) error { return fmt.Errorf("%w (%w)", os.ErrProcessDone, err) }

func mountError(op, object string, err error) error {
	return &OpError{Op: op, Source: "mount", Object: object, Err: err}
}

// newMountSource returns the best source that works for options.
func newMountSource(options *MountOptions) (mountSource, error) {
	switch options.Via {
	case ViaAuto, ViaMountinfo:
	case ViaFanotify:
		return nil, mountError("watch", "", fmt.Errorf("via fanotify: %w", errors.ErrUnsupported))
	default:
		return nil, mountError("watch", "", fmt.Errorf("unknown MountVia %d", options.Via))
	}
	target, err := newMountTarget(options, true)
	if err != nil {
		return nil, err
	}
	source, err := newMountinfoSource(target, options.Filter)
	if err != nil {
		target.close()
		return nil, err
	}
	return source, nil
}
