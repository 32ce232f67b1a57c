package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/statmount"
)

// UnmountFlags say how to unmount.
type UnmountFlags int

const (
	// UnmountLazy takes the file system out of the mount table at once, even if
	// it is in use. The session goes on until its last user has left.
	UnmountLazy UnmountFlags = 1 << iota

	// UnmountForce aborts the connection: what clients wait for fails. The
	// file system is unmounted if nobody has a file open there, and otherwise
	// stays, dead. fusermount3 cannot do that.
	UnmountForce
)

// Unmount unmounts the file system; the session ends when its last user has
// left, which is at once without UnmountLazy. If the file system is not mounted
// any more, that is no error.
//
// If it is in use, and still is after 20 ms, the error Is unix.EBUSY, and the
// session goes on. The same if
// something else is mounted on top of it: immediately before it unmounts, Unmount
// looks whether the mount is the session's, by its unique ID from Linux 6.8 on,
// and by the numbers of mount and device before. A mount that somebody makes
// there between that and umount2(2) would be unmounted instead; and before
// Linux 6.8 another FUSE file system may be, which was mounted there when
// this one had been unmounted.
//
// fusermount3 is used when the kernel says EPERM; ctx bounds that. Unmount may
// be called from a loop over requests.
func (s *Session) Unmount(ctx context.Context, flags UnmountFlags) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if flags&^(UnmountLazy|UnmountForce) != 0 {
		return fuseError("unmount", s.object(), fmt.Errorf("flags %#x: %w", int(flags), unix.EINVAL))
	}
	if s.closing.Err() != nil {
		return s.Close()
	}
	if s.id == (MountID{}) {
		return fuseError("unmount", s.object(), fmt.Errorf("which mount it is was not in the State: %w", unix.EINVAL))
	}
	err := s.unmount(ctx, flags)
	if s.connectionGone() {
		s.ended()
	}
	return err
}

func (s *Session) unmount(ctx context.Context, flags UnmountFlags) error {
	return s.place.do(func(proc int) error {
		gone, err := s.identityCheck(proc)
		if gone || err != nil {
			return err
		}
		err = s.umount(flags)
		for i := 0; i < busyTries && flags&UnmountLazy == 0 && isErrno(err, unix.EBUSY); i++ {
			time.Sleep(time.Millisecond)
			err = s.umount(0)
		}
		switch {
		case isErrno(err, unix.EPERM) && flags&UnmountForce == 0:
			if helperErr := s.unmountByHelper(ctx, flags&UnmountLazy != 0); helperErr != nil {
				return joinFailures([]error{failed("umount2", s.object(), err), helperErr})
			}
			return nil
		case isErrno(err, unix.EINVAL):
			// Somebody else was faster.
			if gone, _ := s.identityCheck(proc); gone {
				return nil
			}
		}
		return failed("umount2", s.object(), err)
	})
}

// busyTries is how often an unmount is tried again, a millisecond apart, since
// whoever uses the mount may be about to leave. An abort has sent those away who
// were waiting for an answer. And Mount has the mount open for a moment:
// a process that the program starts then has a copy of that until it executes its
// program (see startNothing).
const busyTries = 20

func (s *Session) umount(flags UnmountFlags) error {
	call := unix.UMOUNT_NOFOLLOW
	if flags&UnmountLazy != 0 {
		call |= unix.MNT_DETACH
	}
	if flags&UnmountForce != 0 {
		call |= unix.MNT_FORCE
	}
	return os.NewSyscallError("umount2", unix.Unmount(s.config.MountPoint, call))
}

// unmountForGood unmounts, whoever uses the file system.
func (s *Session) unmountForGood() error {
	err := s.unmount(context.Background(), 0)
	if isErrno(err, unix.EBUSY) {
		// The abort frees those who wait for an answer, a notification too.
		s.unmount(context.Background(), UnmountForce)
		err = s.unmount(context.Background(), UnmountLazy)
	}
	if errors.Is(err, os.ErrProcessDone) && s.device != nil && s.connectionGone() {
		return nil // the namespace went with its last process
	}
	return err
}

// identityCheck looks whether the topmost mount of the mount point is the
// session's. gone says that this is nowhere in the namespace.
func (s *Session) identityCheck(proc int) (gone bool, err error) {
	if top, err := mountAt(s.config.MountPoint); err == nil && top == s.id {
		return false, nil
	}
	found, err := s.inTable(proc)
	switch {
	case err != nil:
		return false, failed("unmount", s.object(), err)
	case found == "":
		return true, nil
	case found != s.config.MountPoint:
		err = fmt.Errorf("it was moved to %s: %w", found, unix.EBUSY)
	default:
		err = fmt.Errorf("something else is mounted on top of it: %w", unix.EBUSY)
	}
	return false, fuseError("unmount", s.object(), err)
}

// inTable returns the mount point that the mount table has for the session's
// mount, or nothing. It is called in the namespace of the mount. Before Linux
// 6.8 a mount that took the number of both the mount and the connection, once
// they were gone, is taken for it.
func (s *Session) inTable(proc int) (point string, err error) {
	if s.id.Unique != 0 {
		var reader statmount.Reader
		var m statmount.Mount
		if errors.Is(reader.Stat(s.id.Unique, statmount.MountBasic, &m), unix.ENOENT) {
			return "", nil
		}
	}
	err = mounts(proc, func(m *procfs.MountInfo) {
		if m.Major == 0 && m.Minor == s.id.Minor && (m.ID == s.id.ID || s.id.ID == 0) {
			point = m.MountPoint
		}
	})
	return point, err
}

// mounted tells whether the session's mount still is in the mount table, as far
// as that can be known.
func (s *Session) mounted() bool {
	if s.id == (MountID{}) {
		return false
	}
	point := ""
	s.place.do(func(proc int) (err error) {
		point, err = s.inTable(proc)
		return err
	})
	return point != ""
}

// A MountID names a mount.
type MountID struct {
	Unique uint64 // never used again; 0 before Linux 6.8
	ID     uint32 // as in /proc/PID/mountinfo
	Minor  uint32 // of the device of its files, which is that of the connection
}

// mountAt returns the topmost mount at path, without asking the server, nor
// opening it: a descriptor would keep it busy (see busyTries).
func mountAt(path string) (MountID, error) {
	return identify(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
}

// identify returns the mount of what statx(2) finds, without asking the server.
func identify(dir int, path string, flags int) (id MountID, err error) {
	flags |= unix.AT_STATX_DONT_SYNC | unix.AT_NO_AUTOMOUNT
	var st unix.Statx_t
	if err := unix.Statx(dir, path, flags, unix.STATX_MNT_ID, &st); err != nil {
		return id, os.NewSyscallError("statx", err)
	}
	id.Minor = st.Dev_minor
	if st.Mask&unix.STATX_MNT_ID != 0 {
		id.ID = uint32(st.Mnt_id)
	}
	if err := unix.Statx(dir, path, flags, unix.STATX_MNT_ID_UNIQUE, &st); err == nil && st.Mask&unix.STATX_MNT_ID_UNIQUE != 0 {
		id.Unique = st.Mnt_id
	}
	return id, nil
}

// Abort aborts the connection: every client that waits for an answer gets
// ECONNABORTED, every later one ENOTCONN, and the session ends by [ErrAborted].
// The file system stays mounted, dead, until it is unmounted.
//
// Who is not root cannot abort a session whose [Session.Files] somebody else
// has: the devices are closed then, and the others go on.
func (s *Session) Abort() error {
	if s.life.Err() != nil {
		return nil
	}
	if err := s.abortByControl(); err != nil {
		// It takes root, or a mounted fusectl. The kernel aborts, too, when
		// nobody has the device open any more.
		s.end(ErrAborted)
		s.endNotifications() // they have the device open, too
		for _, d := range s.openDevices() {
			d.file.Close()
		}
		return nil
	}
	s.ended()
	return nil
}

// abortByControl aborts through the control file system of FUSE: the one that
// is mounted, or one that is nowhere.
func (s *Session) abortByControl() error {
	name := strconv.FormatUint(uint64(s.id.Minor), 10) + "/abort"
	fd, err := unix.Open("/sys/fs/fuse/connections/"+name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		var control int
		if control, err = newControl(); err != nil {
			return err
		}
		fd, err = unix.Openat(control, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
		unix.Close(control)
	}
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("1"))
	return os.NewSyscallError("write", err)
}
