package kernstream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fangroup"
	"github.com/kernstream/kernstream/internal/statmount"
	"github.com/kernstream/kernstream/poller"
)

// How the fanotify path begins: whether it can be taken at all, and the first
// table.

// newFanotifySource watches the namespace of target, and reads its table. The
// error says why it cannot.
func newFanotifySource(ctx context.Context, target *mountTarget, filter func(*Mount) bool) (*fanotifySource, error) {
	s := &fanotifySource{
		target:  target,
		filter:  filter,
		buf:     make([]byte, 32<<10),
		tree:    newMountTree(),
		touched: make(map[uint64]mountTouch),
		masters: make(map[uint64]uint64),
		tokens:  make(chan struct{}, 1),
		end:     make(chan struct{}),
	}
	s.verify = time.AfterFunc(time.Hour, func() { s.token(wokenVerify) })
	s.verify.Stop()
	s.finish = sync.OnceFunc(func() { close(s.end) })
	s.rescan.init(s)
	made := false
	defer func() {
		if !made { // by an error, or a panic of the filter
			s.release()
			s.waiters.Wait()
		}
	}()
	if err := s.mark(); err != nil {
		return nil, err
	}
	if s.reader.Namespace == 0 {
		fd, err := target.open()
		if err != nil {
			return nil, err
		}
		s.waiting = poller.Own(fd)
		if err := s.waker.add(fd, unix.EPOLLPRI); err != nil {
			return nil, target.failed(err)
		}
	}
	s.waker.start(func() { s.token(wokenTable) }, s.fail)
	if err := s.readTable(ctx); err != nil {
		return nil, err
	}
	if s.reader.Namespace != 0 {
		s.rescan.plan.periodic = true
		s.rescan.plan.hidden(time.Now())
	}
	s.watchEnd()
	made = true
	return s, nil
}

// mark makes the group, and lets it watch the namespace.
func (s *fanotifySource) mark() error {
	namespace, err := s.target.openNamespace()
	if err != nil {
		return err
	}
	defer unix.Close(namespace) // the mark does not keep the namespace alive
	switch s.reader.Namespace, err = foreignNamespace(namespace); {
	case errors.Is(err, unix.ENOTTY):
		return s.unsupported("ioctl", unix.ENOSYS)
	case err != nil:
		return s.target.failed(err)
	}
	const flags = unix.FAN_CLASS_NOTIF | unix.FAN_REPORT_MNT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK
	group, err := fangroup.Init(flags, 0)
	if err != nil {
		return s.unsupported("fanotify_init", err)
	}
	s.group = poller.Own(group)
	err = unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_MNTNS, unix.FAN_MNT_ATTACH|unix.FAN_MNT_DETACH, namespace, "")
	if err != nil {
		return s.unsupported("fanotify_mark", err)
	}
	if s.waker, err = newMountWaker(); err == nil {
		err = s.waker.add(group, unix.EPOLLIN)
	}
	if err != nil {
		return s.target.failed(err)
	}
	return nil
}

// unsupported returns the error of a call that this path needs.
func (s *fanotifySource) unsupported(call string, errno error) error {
	err := errno
	if _, wrapped := errors.AsType[*os.SyscallError](err); !wrapped {
		err = os.NewSyscallError(call, errno)
	}
	switch {
	case errors.Is(errno, unix.EPERM) && call == "fanotify_mark":
		err = fmt.Errorf("%w: it needs CAP_SYS_ADMIN in the user namespace that owns the mount namespace, and before Linux 6.16 in the initial one", err)
	case errors.Is(errno, unix.EINVAL), errors.Is(errno, unix.ENOSYS), errors.Is(errno, unix.EPERM) && call == "fanotify_init":
		// A kernel that does not know the flag may look at the privilege first.
		err = fmt.Errorf("%w: it needs Linux 6.15: %w", err, errors.ErrUnsupported)
	case !errors.Is(errno, unix.EMFILE) && !errors.Is(errno, unix.EPERM):
		return s.target.failed(err)
	case call == "fanotify_init":
		err = fmt.Errorf("%w: the user has as many fanotify groups as /proc/sys/fs/fanotify/max_user_groups allows, or the process as many descriptors as it may", err)
	}
	return mountError(call, s.target.name, err)
}

// readTable fills the tree, and makes sure that it is the table that was asked
// for: the kernel names paths relative to its own choice of a root directory.
func (s *fanotifySource) readTable(ctx context.Context) error {
	if err := s.probe(); err != nil {
		return err
	}
	var ignored mountDelta
	for range reopenTries { // the process may be changing its root
		s.all = true
		var err error
		if s.root, err = rootAt(unix.AT_FDCWD, "/"); err != nil {
			return s.target.failed(err)
		}
		if err := s.drain(); err != nil {
			return err
		}
		if err := s.settle(ctx, &ignored); err != nil {
			return err
		}
		if err = s.checkRoot(); err == nil || !s.pending() {
			return err
		}
	}
	return errOtherRoot(s.target)
}

// probe makes the system calls that will be needed.
func (s *fanotifySource) probe() error {
	ids, err := s.reader.List(nil)
	if err != nil {
		return s.unsupported("listmount", err)
	}
	var m statmount.Mount
	for _, id := range ids {
		err := s.reader.Stat(id, statmount.SupportedMask, &m)
		switch {
		case errors.Is(err, unix.ENOENT):
			continue
		case err != nil:
			return s.unsupported("statmount", err)
		case m.Supported&statmount.Row != statmount.Row:
			return s.unsupported("statmount", unix.ENOSYS)
		}
		break
	}
	return nil
}

// pending tells whether there are events.
func (s *fanotifySource) pending() bool {
	fds := []unix.PollFd{{Fd: int32(s.group.FD()), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n > 0
}

// checkRoot tells whether the paths of the tree are those that mountinfo would
// show.
func (s *fanotifySource) checkRoot() error {
	if s.target.own {
		return nil
	}
	if s.target.proc != nil {
		root, err := rootAt(s.target.proc.FD(), "root")
		switch {
		case err != nil:
			return s.target.failed(err)
		case s.reader.Namespace == 0 && root != s.root, s.reader.Namespace != 0 && !s.isTop(root):
			return errOtherRoot(s.target)
		}
		return nil
	}
	// Who enters a namespace gets what is uppermost on its root.
	if s.reader.Namespace == 0 && !s.isTop(s.root) {
		return errOtherRoot(s.target)
	}
	roots := 0
	for _, n := range s.tree.nodes {
		if n.mount != nil && n.mount.MountPoint == "/" {
			roots++
		}
	}
	if roots != 1 {
		return errOtherRoot(s.target)
	}
	return nil
}

// isTop tells whether a root directory is that of the namespace: the root of the
// mount that is mounted on the one from which all began.
func (s *fanotifySource) isTop(root mountRoot) bool {
	n := s.tree.known(root.mount)
	if n == nil || !root.ofMount || n.mount.MountPoint != "/" {
		return false
	}
	var base statmount.Mount
	if err := s.reader.Stat(n.mount.ParentID, statmount.MountBasic, &base); err != nil {
		return false
	}
	return base.ID == base.ParentID
}

func errOtherRoot(t *mountTarget) error {
	return mountError("statmount", t.name, fmt.Errorf("the root directory is another one than the kernel would name paths from: %w", errors.ErrUnsupported))
}

// watchEnd lets the end of the process, if the table is that of one, be the end.
func (s *fanotifySource) watchEnd() {
	if s.reader.Namespace != 0 {
		s.target.leaveNamespace() // to hold it would keep it alive
	}
	if s.target.process == nil {
		return
	}
	s.waiters.Go(func() {
		err := s.target.process.Wait(pidfdExited)
		if err == nil {
			s.finish()
			return
		}
		s.fail(err)
	})
}
