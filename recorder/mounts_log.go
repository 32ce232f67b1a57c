package recorder

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fangroup"
	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/poller"
)

// A mountLog tells whether mounts came and went before anybody could look at them: a mount
// table is not told of those.
//
// From Linux 6.15 on the kernel names each mount that is attached in a namespace, in the queue of a
// fanotify group (see [kernstream.ViaFanotify]). Where that is not to be had, all that it tells is that something
// about the table has changed since it was asked last; if there is nothing else to explain that, it
// was such a mount.
type mountLog struct {
	group *poller.Descriptor // a fanotify group; nil: not to be had
	buf   []byte
	names map[uint64]bool // the unique IDs of mounts that were attached
	lost  error           // why not all of them are there

	table *poller.Descriptor // a mountinfo file; nil: there is a group
	moved bool               // the table has changed since the look before
}

// newMountLog makes the log of the mount namespace of the thread or process that the directory proc
// is of.
func newMountLog(proc int) (*mountLog, error) {
	l := &mountLog{names: map[uint64]bool{}}
	if group := newMountGroup(proc); group >= 0 {
		l.group, l.buf = poller.Own(group), make([]byte, 4<<10)
		return l, nil
	}
	fd, err := unix.Openat(proc, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, recordError("open", "mountinfo", os.NewSyscallError("open", err))
	}
	l.table = poller.Own(fd)
	return l, nil
}

// newMountGroup returns a group that is told of attached mounts, or -1.
func newMountGroup(proc int) int {
	namespace, err := unix.Openat(proc, "ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	defer unix.Close(namespace) // the mark does not keep the namespace alive
	group, err := fangroup.Init(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_MNT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, 0)
	if err != nil {
		return -1
	}
	if err := unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_MNTNS, unix.FAN_MNT_ATTACH, namespace, ""); err != nil {
		unix.Close(group)
		return -1
	}
	return group
}

func (l *mountLog) close() {
	if l.group != nil {
		fangroup.Close([]int{l.group.FD()}, func() { l.group.Close() })
	}
	if l.table != nil {
		l.table.Close()
	}
}

var errMountsLost = errors.New("mounts were lost: the kernel's queue was full")

// look takes what there is. It does not wait.
func (l *mountLog) look() {
	if l.table != nil {
		// To ask is to acknowledge.
		fds := []unix.PollFd{{Fd: int32(l.table.FD()), Events: unix.POLLPRI}}
		n, _ := unix.Poll(fds, 0)
		l.moved = n > 0
		return
	}
	for l.lost == nil {
		n, err := unix.Read(l.group.FD(), l.buf)
		switch err {
		case nil:
			l.lost = l.note(l.buf[:n])
		case unix.EINTR:
		case unix.EAGAIN:
			return
		default:
			l.lost = os.NewSyscallError("read", err)
		}
	}
}

// note takes the events in b.
func (l *mountLog) note(b []byte) error {
	for len(b) > 0 {
		var e fanotify.Event
		var info fanotify.Info
		var err error
		if e, b, err = fanotify.Next(b); err == nil {
			err = e.Decode(&info)
		}
		switch {
		case err != nil:
			return err
		case e.Overflow():
			return errMountsLost
		}
		l.names[info.MountID] = true
	}
	return nil
}

// passed returns why a list is not complete because of mounts that came and went. known are the
// unique IDs of all others, and differs tells whether the table is another one than the last event
// has told.
func (l *mountLog) passed(known map[uint64]bool, differs bool) (reasons []string) {
	if l.lost != nil {
		reasons = append(reasons, l.lost.Error())
	}
	n := 0
	for id := range l.names {
		if !known[id] {
			n++
		}
	}
	switch {
	case n > 0:
		reasons = append(reasons, fmt.Sprintf("%d mounts came and went before they could be looked at", n))
	case l.moved && !differs:
		reasons = append(reasons, "mounts came and went before they could be looked at")
	}
	return reasons
}
