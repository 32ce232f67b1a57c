package kernstream

import (
	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fangroup"
	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/poller"
)

// A quietGroup tells when the path of a directory may have changed, and wakes
// nobody. Each file system in it has a mark for the renames of directories
// (FAN_MOVE_SELF with FAN_ONDIR), and one that ignores those of everything
// else. Renames of the same directory merge, so its queue is short.
//
// It is drained after each read of the events it is for: a rename that came
// before one of these is in its queue by then. Only the event of the rename itself
// may come first: one call of the kernel makes both (see fileReader.event).
type quietGroup struct {
	file *poller.Descriptor
	buf  []byte
}

const quietFlags = unix.FAN_CLOEXEC | unix.FAN_NONBLOCK | unix.FAN_CLASS_NOTIF | unix.FAN_REPORT_FID

// markQuiet adds the file system of fd to the quiet group, and tells whether
// that worked.
func (s *fileSystems) markQuiet(fd int) bool {
	if s.quiet == nil && !s.noQuiet {
		group, err := fangroup.Init(quietFlags, unix.O_RDONLY|unix.O_CLOEXEC)
		if err != nil {
			s.noQuiet = true
			return false
		}
		s.quiet = &quietGroup{file: poller.Own(group), buf: make([]byte, 4096)}
	}
	if s.quiet == nil {
		return false
	}
	path := fdLink(fd)
	err := unix.FanotifyMark(s.quiet.file.FD(), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_MOVE_SELF|unix.FAN_ONDIR, unix.AT_FDCWD, path)
	if err != nil {
		return false
	}
	// Before Linux 6.0 the renames of files come, too, and are left out by
	// drain.
	unix.FanotifyMark(s.quiet.file.FD(), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM|unix.FAN_MARK_IGNORE_SURV, unix.FAN_MOVE_SELF, unix.AT_FDCWD, path)
	return true
}

// drain empties the group, and tells whether a directory was renamed.
func (q *quietGroup) drain() (renamed bool) {
	for {
		n, err := unix.Read(q.file.FD(), q.buf)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return renamed
		case err != nil || n <= 0:
			return true
		}
		for b := q.buf[:n]; len(b) > 0; {
			var e fanotify.Event
			if e, b, err = fanotify.Next(b); err != nil {
				return true
			}
			if e.Overflow() || e.Mask()&unix.FAN_ONDIR != 0 {
				renamed = true
			}
		}
	}
}
