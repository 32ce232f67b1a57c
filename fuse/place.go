package fuse

import (
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/poller"
)

// A place is the mount namespace of a session.
type place struct {
	name string
	fd   *poller.Descriptor // a pidfd, which does not keep the namespace alive, or the namespace; nil: the own one

	mu     sync.RWMutex // held for reading while fd is in use
	closed bool
}

// ownPlace is the namespace that the process is in.
var ownPlace place

func newPlace(c *Config) (*place, error) {
	switch {
	case c.PID != 0:
		p := &place{name: "process " + strconv.Itoa(c.PID)}
		fd, err := -1, error(unix.ESRCH)
		if c.PID == int(int32(c.PID)) { // the kernel would take the lower half of it
			fd, err = unix.PidfdOpen(c.PID, 0)
		}
		if err == unix.ESRCH {
			return nil, fuseError("pidfd_open", p.name, fmt.Errorf("%w (%w)", os.ErrProcessDone, os.NewSyscallError("pidfd_open", err)))
		}
		if err != nil {
			return nil, failed("", p.name, os.NewSyscallError("pidfd_open", err))
		}
		p.fd = poller.Own(fd)
		return p, nil
	case c.Namespace != nil:
		p := &place{name: c.Namespace.Name()}
		conn, err := c.Namespace.SyscallConn()
		if err != nil {
			return nil, failed("open", p.name, err)
		}
		fd := -1
		cerr := conn.Control(func(theirs uintptr) { fd, err = unix.FcntlInt(theirs, unix.F_DUPFD_CLOEXEC, 0) })
		switch {
		case cerr != nil:
			return nil, fuseError("open", p.name, os.ErrClosed)
		case err != nil:
			return nil, failed("", p.name, os.NewSyscallError("fcntl", err))
		}
		p.fd = poller.Own(fd)
		return p, nil
	}
	return &ownPlace, nil
}

// own tells whether it is the namespace that the process is in.
func (p *place) own() bool { return p.fd == nil }

// do calls use on a thread in the namespace. proc is a descriptor of that
// thread's directory in /proc, or negative for the own namespace.
func (p *place) do(use func(proc int) error) error {
	if p.own() {
		return use(-1)
	}
	return p.enter(mntns.Do, use)
}

// apart calls use on a thread in the namespace that ends with it.
func (p *place) apart(use func() error) error {
	if p.own() {
		return mntns.Apart(-1, use)
	}
	return p.enter(func(ns int, use func(proc int) error) error {
		return mntns.Apart(ns, func() error { return use(-1) })
	}, func(int) error { return use() })
}

// enter lets by, which is Do or like it, call use in the namespace.
func (p *place) enter(by func(ns int, use func(proc int) error) error, use func(proc int) error) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed {
		return fuseError("enter", p.name, os.ErrClosed)
	}
	entered := false
	err := by(p.fd.FD(), func(proc int) error {
		entered = true
		return use(proc)
	})
	switch {
	case entered:
		return err
	case isErrno(err, unix.ESRCH):
		err = fmt.Errorf("%w (%w)", os.ErrProcessDone, err)
	case isErrno(err, unix.EPERM):
		err = fmt.Errorf("%w: entering the namespace needs CAP_SYS_ADMIN over it, and CAP_SYS_CHROOT", err)
	}
	return failed("enter", p.name, err)
}

func (p *place) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.fd != nil {
		p.fd.Close()
	}
}

// mounts calls use for each mount that the thread of proc sees (see place.do).
func mounts(proc int, use func(m *procfs.MountInfo)) error {
	name := "mountinfo"
	if proc < 0 {
		name = "/proc/thread-self/mountinfo"
	}
	fd, err := unix.Openat(proc, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	defer unix.Close(fd)
	var parser procfs.MountInfoParser
	return procfs.ReadRows(fd, nil, func(row []byte) error {
		// A row that is odd is not a mount of ours.
		if m, err := parser.Parse(string(row)); err == nil {
			use(&m)
		}
		return nil
	})
}
