package fuse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// Mount mounts a file system that this process serves, and returns when
// requests may come: the kernel's INIT has been answered as config says, and the
// process is safe from itself (see [Config.ServePoll]). ctx bounds Mount alone.
//
// It needs a /dev/fuse that the caller may open, and CAP_SYS_ADMIN in the user
// namespace of the mount namespace, as every user has in a user namespace of
// its own; or else the program fusermount3, which is started if the kernel says
// EPERM, and mounts what belongs to the user. Other errors are returned as they
// are. From Linux 5.2 on the kernel says what is wrong with an option, and the
// file system is not visible before it works.
//
// The error is an *[kernstream.OpError]. It Is fs.ErrPermission when a privilege
// is missing, exec.ErrNotFound when the helper is needed and not there, and
// os.ErrProcessDone when the process of [Config.PID] is gone. The message of
// the helper is part of it. When Mount returns an error, nothing is mounted.
//
// A path that leads through a file system that hangs makes Mount hang.
func Mount(ctx context.Context, config *Config) (*Session, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if config == nil {
		config = &Config{}
	}
	if err := config.checkFields(); err != nil {
		return nil, fuseError("check", config.MountPoint, err)
	}
	var failures []error
	for _, way := range ways(config) {
		s, err := mountBy(ctx, config, way)
		switch {
		case err == nil:
			return s, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		}
		failures = append(failures, err)
		if !way.giveWay(err) {
			break
		}
	}
	return nil, joinFailures(failures)
}

// joinFailures returns the last error, and with it the one before, which made
// it necessary to come to that.
func joinFailures(failures []error) error {
	last := failures[len(failures)-1]
	if len(failures) == 1 {
		return last
	}
	reason := failures[len(failures)-2]
	if e, ok := errors.AsType[*kernstream.OpError](last); ok {
		return fuseError(e.Op, e.Object, fmt.Errorf("%w (because of %w)", e.Err, reason))
	}
	return last
}

// A way is one of the ways to mount.
type way struct {
	via    Via
	hidden bool // nobody sees the mount before it is attached
	// mount mounts and returns the device, which is then connected, and how to
	// go on.
	mount func(ctx context.Context, s *Session, mode uint32) (*attachment, error)
	// giveWay tells whether the next way may work where this one failed by err.
	giveWay func(err error) bool
}

// ways returns the ways that config allows, the best first.
func ways(config *Config) []way {
	denied := func(err error) bool { return isErrno(err, unix.EPERM) }
	byContext := way{ViaMount, true, mountByContext, func(err error) bool { return isErrno(err, unix.ENOSYS, unix.EPERM) }}
	byMount := way{ViaMount, false, mountByMount, denied}
	byHelper := way{ViaHelper, false, mountByHelper, func(error) bool { return false }}
	switch {
	case config.Via == ViaHelper, config.AutoUnmount:
		return []way{byHelper}
	case config.Via == ViaMount:
		return []way{byContext, byMount}
	}
	return []way{byContext, byMount, byHelper}
}

// An attachment is a file system that the kernel has connected to a device.
type attachment struct {
	device int // the descriptor
	mount  int // of the mount, when that is not visible yet; -1: it is
	helper *helper
}

// mountBy mounts in one way.
func mountBy(ctx context.Context, config *Config, w way) (_ *Session, err error) {
	place, err := newPlace(config)
	if err != nil {
		return nil, err
	}
	s := newSession(*config, place)
	s.config.Via = w.via
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	defer s.made()
	var mode uint32
	if err := place.do(func(int) (err error) {
		s.config.MountPoint, mode, err = s.config.findMountPoint()
		return err
	}); err != nil {
		return nil, err
	}
	mayStart := func() {}
	if w.hidden {
		mayStart = startNothing()
		defer mayStart()
	}
	a, err := w.mount(ctx, s, mode)
	if err != nil {
		return nil, err
	}
	s.helper = a.helper
	if a.mount >= 0 {
		defer unix.Close(a.mount)
	} else if err := s.findMount(); err != nil {
		unix.Close(a.device)
		return nil, err
	}
	if _, err := s.serve(a.device); err != nil {
		return nil, err
	}
	if err := s.start(ctx, a.mount, mode); err != nil {
		return nil, err
	}
	if a.mount >= 0 {
		mayStart() // another server may need that to find the mount point
		return s, s.attach(a.mount)
	}
	return s, nil
}

// startNothing lets no process be started until mayStart is called. A new process
// has copies of all descriptors until it executes its program, and one of a mount, or
// of a file in it, keeps the mount busy. What happens meanwhile is between the
// kernel and this package alone.
func startNothing() (mayStart func()) {
	syscall.ForkLock.RLock()
	return sync.OnceFunc(syscall.ForkLock.RUnlock)
}

// start brings the connection to life.
func (s *Session) start(ctx context.Context, mount int, mode uint32) error {
	if err := s.answerInit(func() (*Request, error) { return s.device.next(ctx) }); err != nil {
		return err
	}
	if s.config.ServePoll {
		return nil
	}
	return s.prime(ctx, mount, mode)
}

// findMount finds out which mount is the session's, right after it was made.
func (s *Session) findMount() error {
	return s.place.do(func(int) (err error) {
		s.id, err = mountAt(s.config.MountPoint)
		return failed("identify", s.object(), err)
	})
}

// attach makes a mount visible.
func (s *Session) attach(mount int) error {
	return s.place.do(func(int) error {
		id, err := identify(mount, "", unix.AT_EMPTY_PATH)
		if err == nil {
			err = os.NewSyscallError("move_mount", unix.MoveMount(mount, "", unix.AT_FDCWD, s.config.MountPoint, unix.MOVE_MOUNT_F_EMPTY_PATH))
		}
		if err != nil {
			return failed("attach", s.object(), err)
		}
		s.id = id
		return nil
	})
}

const devicePath = "/dev/fuse"

// openDevice opens a device that belongs to no connection. It stays out of the
// poller until it does.
func openDevice() (int, error) {
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return fd, nil
	case err == unix.ENOENT || err == unix.ENODEV || err == unix.ENXIO:
		err = fmt.Errorf("%w: is the kernel module fuse loaded?", os.NewSyscallError("open", err))
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w: users may open it on most systems (mode 0666), also in a container that is given it", os.NewSyscallError("open", err))
	default:
		err = os.NewSyscallError("open", err)
	}
	return -1, failed("open", devicePath, err)
}
