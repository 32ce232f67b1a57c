package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
)

// cloneRequest is FUSE_DEV_IOC_CLONE, of include/uapi/linux/fuse.h.
const cloneRequest = 2<<30 | 4<<16 | 229<<8

// A server serves all devices of a session.
type server struct {
	*fuse.Session
	ended   chan error
	devices int
}

// mountServer mounts a file system, and serves it.
func mountServer(l *lab) (*server, error) {
	place := l.path("mnt")
	os.Mkdir(place, 0o755)
	s, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: place, Via: fuse.ViaMount})
	if err != nil {
		return nil, err
	}
	return serveAll(s), nil
}

func serveAll(s *fuse.Session) *server {
	v := &server{Session: s, ended: make(chan error, 10)}
	for _, d := range s.Devices() {
		v.serve(d)
	}
	return v
}

func (v *server) serve(d *fuse.Device) {
	v.devices++
	go func() {
		for r, err := range d.All(context.Background()) {
			if err != nil {
				v.ended <- err
				return
			}
			serve(r)
		}
		v.ended <- nil
	}()
}

// rest waits until nobody reads any more.
func (v *server) rest() error {
	var err error
	for range v.devices {
		err = errors.Join(err, <-v.ended)
	}
	return err
}

// lookUp is what a client does.
func (v *server) lookUp() error {
	var st unix.Stat_t
	if err := unix.Stat(v.Config().MountPoint+"/x", &st); err != unix.ENOENT {
		return fmt.Errorf("the client's error is %w", err)
	}
	return nil
}

// cloneDevice clones the device of a session, of which inject has something to say.
func cloneDevice(inject func(*lab)) func(*lab) string {
	return func(l *lab) string {
		s, err := mountServer(l)
		if err != nil {
			return failure(err)
		}
		inject(l)
		d, err := s.Clone()
		l.feed()
		outcome := "works, with two devices"
		if err != nil {
			outcome = failure(err)
		} else {
			s.serve(d)
		}
		for range 10 {
			if err := s.lookUp(); err != nil {
				return err.Error()
			}
		}
		if err := errors.Join(s.Close(), s.rest()); err != nil {
			return err.Error()
		}
		if err != nil {
			outcome += "; the session goes on"
		}
		return outcome
	}
}

// handOver hands a session with two devices over to a successor, of which inject has something
// to say, in what it takes from the predecessor, or in how it adopts that.
func handOver(take, adopt func(*lab)) func(*lab) string {
	return func(l *lab) string {
		s, err := mountServer(l)
		if err != nil {
			return failure(err)
		}
		d, err := s.Clone()
		must(err)
		s.serve(d)
		must(errors.Join(s.lookUp(), s.Drain(context.Background()), s.rest()))
		successor, err := succeed(l, s.Session, take, adopt)
		outcome := "works"
		if err != nil {
			outcome = failure(err)
			s.Resume()
			successor = s.Session
		} else if err := s.Close(); err != nil {
			return "Close of the predecessor " + failure(err)
		}
		v := serveAll(successor)
		if len(successor.Devices()) != 2 {
			return fmt.Sprintf("%d devices are left", len(successor.Devices()))
		}
		if err := errors.Join(v.lookUp(), v.Close(), v.rest()); err != nil {
			return err.Error()
		}
		if err != nil {
			return outcome + "; the predecessor goes on"
		}
		return outcome + ", and the successor goes on"
	}
}

// succeed adopts what a session has to hand over.
func succeed(l *lab, s *fuse.Session, take, adopt func(*lab)) (*fuse.Session, error) {
	defer l.feed()
	take(l)
	files, err := s.Files()
	if err != nil {
		return nil, err
	}
	adopt(l)
	successor, err := fuse.Adopt(files, s.State())
	if err != nil {
		for _, f := range files {
			f.Close() // they are still ours
		}
	}
	return successor, err
}

// adoptDead adopts a session whose connection has ended.
func adoptDead(end func(*server) error) func(*lab) string {
	return func(l *lab) string {
		s, err := mountServer(l)
		if err != nil {
			return failure(err)
		}
		files, err := s.Files()
		must(err)
		state := s.State()
		must(end(s))
		outcome := "works"
		if successor, err := fuse.Adopt(files, state); err == nil {
			successor.Close()
		} else {
			outcome = failure(err)
		}
		for _, f := range files {
			f.Close()
		}
		s.Close()
		s.rest()
		return outcome
	}
}

// cloneAndHandOver does both, for want of descriptors at any point.
func cloneAndHandOver(l *lab) string {
	s, err := mountServer(l)
	if err != nil {
		return failure(err)
	}
	defer s.rest()
	defer func() { s.Close() }()
	d, err := s.Clone()
	if err != nil {
		return failure(err)
	}
	s.serve(d)
	must(s.Drain(context.Background()))
	successor, err := succeed(l, s.Session, nothing, nothing)
	if err != nil {
		s.Resume() // so that Close unmounts
		return failure(err)
	}
	must(s.Close())
	must(successor.Close())
	return "works"
}

// nothing goes wrong.
func nothing(*lab) {}

func handoverFaults() []fault {
	const (
		clone     = "Session.Clone"
		goesOn    = "; the session goes on"
		handing   = "Session.Files"
		adopting  = "fuse.Adopt"
		unchanged = "; the predecessor goes on"
		handed    = "works, and the successor goes on"
	)
	meanings := map[syscall.Errno]string{unix.EPERM: ", Is fs.ErrPermission", unix.ENOSYS: ", Is errors.ErrUnsupported"}
	starved := func(l *lab) { l.starve(0) }
	var list []fault
	add := func(f fault) {
		f.source, f.fuse = "fuse", true
		list = append(list, f)
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.ENOTTY, unix.ENOMEM} {
		add(fault{
			doing: clone, fault: "the ioctl FUSE_DEV_IOC_CLONE is refused with " + unix.ErrnoName(errno), outcome: "fails: clone " + unix.ErrnoName(errno) + meanings[errno] + goesOn, says: "/lab/mnt",
			run: cloneDevice(refusedIoctl(errno, cloneRequest)),
		})
	}
	add(fault{
		doing: clone, fault: "there is no descriptor left", outcome: "fails: open EMFILE" + goesOn, says: "/dev/fuse",
		run: cloneDevice(starved),
	})
	add(fault{
		doing: clone, fault: "there is no /dev/fuse any more", outcome: "fails: open ENOENT, Is fs.ErrNotExist" + goesOn, says: "is the kernel module fuse loaded?",
		run: cloneDevice(noDevice),
	})
	add(fault{
		doing: clone, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC" + goesOn,
		run: cloneDevice(refused(unix.ENOSPC, unix.SYS_EPOLL_CTL)),
	})
	add(fault{
		doing: clone, fault: "/proc is not mounted", outcome: "works, with two devices",
		run: cloneDevice(noProc),
	})
	add(fault{
		doing: handing, fault: "there is no descriptor left", outcome: "fails: files EMFILE" + unchanged,
		run: handOver(starved, nothing),
	})
	add(fault{
		doing: adopting, fault: "there is no descriptor left", outcome: "fails: fcntl EMFILE" + unchanged,
		run: handOver(nothing, starved),
	})
	add(fault{
		doing: adopting, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC" + unchanged,
		run: handOver(nothing, refused(unix.ENOSPC, unix.SYS_EPOLL_CTL)),
	})
	add(fault{
		doing: adopting, fault: "every ioctl is refused with EPERM", outcome: handed,
		run: handOver(nothing, refused(unix.EPERM, unix.SYS_IOCTL)),
	})
	add(fault{
		doing: adopting, fault: "/proc is not mounted", outcome: handed,
		run: handOver(nothing, noProc),
	})
	add(fault{
		doing: adopting, fault: "there is no /dev/fuse any more", outcome: handed,
		run: handOver(nothing, noDevice),
	})
	add(fault{
		doing: adopting, fault: "a storm of signals", outcome: handed,
		run: repeat(handOver(nothing, nothing)), inject: storm,
	})
	add(fault{
		doing: adopting, fault: "the connection was aborted", outcome: "fails: adopt, Is fuse.ErrAborted", root: true,
		run: adoptDead(func(s *server) error { return s.Abort() }),
	})
	add(fault{
		doing: adopting, fault: "the file system was unmounted", outcome: "fails: adopt, Is fuse.ErrUnmounted",
		run: adoptDead(func(s *server) error { return s.Unmount(context.Background(), 0) }),
	})
	add(fault{
		doing: "fuse.Mount, Clone, Drain, Files and Adopt", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(cloneAndHandOver),
	})
	return list
}
