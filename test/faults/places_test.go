package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
)

// FUSE file systems in the namespace of another, and how they end.

// mountIn mounts in a namespace, and unmounts. The client is in the namespace, too, which is
// the own one.
func mountIn(where func(*lab, *fuse.Config)) func(*lab) string {
	return func(l *lab) string {
		config := fuse.Config{Via: fuse.ViaMount}
		where(l, &config)
		return mountFUSE(config)(l)
	}
}

func inVictim(l *lab, c *fuse.Config) { c.PID = l.victim.Process.Pid }

func inFile(l *lab, c *fuse.Config) { c.Namespace = l.file }

// endServer mounts, lets end end the session when inject has done something, and says what
// came of it. What is left, it clears away.
func endServer(end func(*server) error, inject func(*lab)) func(*lab) string {
	return func(l *lab) string {
		s, err := mountServer(l)
		if err != nil {
			return failure(err)
		}
		must(s.lookUp())
		inject(l)
		err = end(s)
		l.feed()
		outcome := "works"
		if err != nil {
			outcome = failure(err)
			if err := s.lookUp(); err != nil {
				return outcome + "; then " + err.Error()
			}
			outcome += "; the session goes on"
		}
		if err := s.Close(); err != nil {
			return outcome + "; Close " + failure(err)
		}
		if err := s.rest(); err != nil && !errors.Is(err, fuse.ErrAborted) {
			return outcome + "; the loop ended by " + err.Error()
		}
		if table, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(table, []byte(" "+s.Config().MountPoint+" ")) {
			return fmt.Sprintf("%s; it is still mounted, %v", outcome, err)
		}
		return outcome
	}
}

func placeFaults() []fault {
	const (
		works   = "works, by mount"
		inPID   = "fuse.Mount in the namespace of a PID"
		inNS    = "fuse.Mount in the namespace of a file"
		helped  = "fuse.Mount by the helper"
		starved = "there is no descriptor left"
	)
	meanings := map[syscall.Errno]string{unix.EPERM: ", Is fs.ErrPermission", unix.ENOSYS: ", Is errors.ErrUnsupported"}
	var list []fault
	add := func(f fault) {
		f.source, f.fuse = "fuse", true
		list = append(list, f)
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
		add(fault{
			doing: "fuse.Mount by system calls only", fault: "close_range is refused with " + unix.ErrnoName(errno), outcome: works,
			inject: refused(errno, unix.SYS_CLOSE_RANGE), run: mountFUSE(fuse.Config{Via: fuse.ViaMount}),
		})
		add(fault{
			doing: inPID, fault: "pidfd_open is refused with " + unix.ErrnoName(errno), outcome: "fails: pidfd_open " + unix.ErrnoName(errno) + meanings[errno],
			prepare: startVictim, inject: refused(errno, unix.SYS_PIDFD_OPEN), run: thenReap(mountIn(inVictim)),
		})
		add(fault{
			doing: helped, fault: "memfd_create is refused with " + unix.ErrnoName(errno), outcome: "fails: memfd_create " + unix.ErrnoName(errno) + meanings[errno],
			inject: refused(errno, unix.SYS_MEMFD_CREATE), run: mountFUSE(fuse.Config{Via: fuse.ViaHelper}),
		})
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOMEM} {
		add(fault{
			doing: inPID, fault: "setns is refused with " + unix.ErrnoName(errno), outcome: "fails: setns " + unix.ErrnoName(errno) + meanings[errno], root: true,
			prepare: startVictim, inject: refused(errno, unix.SYS_SETNS), run: thenReap(mountIn(inVictim)),
		})
		add(fault{
			doing: inNS, fault: "unshare is refused with " + unix.ErrnoName(errno), outcome: "fails: unshare " + unix.ErrnoName(errno) + meanings[errno], root: true,
			prepare: openNamespace, inject: refused(errno, unix.SYS_UNSHARE), run: mountIn(inFile),
		})
	}
	add(fault{
		doing: inPID, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		prepare: startVictim, run: thenReap(starving(mountIn(inVictim))),
	})
	add(fault{
		doing: inNS, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		prepare: openNamespace, run: starving(mountIn(inFile)),
	})
	add(fault{
		doing: inNS, fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?", root: true,
		prepare: openNamespace, inject: noProc, run: mountIn(inFile),
	})
	add(fault{
		doing: "fuse.Mount with AutoUnmount", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		run: starving(mountFUSE(fuse.Config{AutoUnmount: true})),
	})
	noRoom := func(l *lab) { l.starve(0) }
	add(fault{
		doing: "Session.Unmount", fault: starved, outcome: "works",
		run: endServer(func(s *server) error { return s.Unmount(context.Background(), 0) }, noRoom),
	})
	add(fault{
		doing: "Session.Abort", fault: starved, outcome: "works",
		run: endServer(func(s *server) error { return s.Abort() }, noRoom),
	})
	add(fault{
		doing: "Session.Close", fault: starved, outcome: "works",
		run: endServer(func(s *server) error { return s.Close() }, noRoom),
	})
	return list
}
