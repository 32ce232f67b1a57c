package fuse

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Handing a mounted file system over to another process: its devices, as
// descriptors, and what that process cannot find out, as a State.

// State is what kernel and server agreed on at the start of a connection, for
// its whole life, and what else a process must know to go on with a session. It
// can be marshaled as JSON.
type State struct {
	Major, Minor uint32    // version of the protocol: the lower of the kernel's and 7.45
	Flags        InitFlags // what both can and want
	MaxWrite     uint32    // the most bytes in one WRITE
	MaxReadahead uint32    // the most bytes that the kernel reads ahead
	MaxPages     uint16    // the most pages in one READ or WRITE; 0: 32

	// What follows is for [Adopt].

	Config      Config  // as Session.Config, without the Namespace
	InNamespace bool    `json:",omitempty"` // Config.Namespace was set, and must be again
	Mount       MountID // which mount to unmount; zero: none
	InitRequest []byte  // as Session.InitRequest

	// ProbeLookups is how many references the kernel holds on a file that Mount
	// made (see [Config.ServePoll]). The session keeps the FORGET of it from the
	// server.
	ProbeLookups int64 `json:",omitempty"`

	// Undelivered are requests that were read from the device of that index in
	// Files, and that nobody was given. There are none unless the session is
	// drained.
	Undelivered []Undelivered `json:",omitempty"`
}

// Undelivered is a request that a successor gets from its predecessor.
type Undelivered struct {
	Device  int    // the index in Files of the device that it was read from
	Message []byte // as Request.Raw
}

// State returns what kernel and server agreed on, and what a successor needs. One
// that is taken while requests are read is good for taking over from a process
// that died; for one that is alive, it must be taken when that has been drained.
func (s *Session) State() State {
	state := s.state
	state.Config = s.Config()
	state.InNamespace = state.Config.Namespace != nil
	state.Config.Namespace = nil
	state.Mount = s.id
	state.InitRequest = s.InitRequest()
	state.ProbeLookups = max(0, s.probe.lookups.Load())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drain != nil {
		for _, r := range s.returned {
			state.Undelivered = append(state.Undelivered, Undelivered{s.index(r.device), bytes.Clone(r.message)})
		}
	}
	return state
}

// index returns the place of d in the list of devices. s.mu is held.
func (s *Session) index(d *Device) int {
	for i, other := range s.devices {
		if other == d {
			return i
		}
	}
	return 0
}

// Files returns further descriptors of all devices, for another process: over a
// unix socket (SCM_RIGHTS, see unix(7)), or as ExtraFiles of an exec.Cmd. They
// belong to the caller. Whoever holds one keeps the connection alive, even if
// this process dies: clients wait then, instead of getting errors.
//
// A process that only keeps them should keep the bare descriptors: an os.File is in the
// runtime's poller, which wakes for each request that somebody else reads.
//
// The error Is unix.EMFILE if this process has no descriptor left, and
// os.ErrClosed after [Session.Close].
func (s *Session) Files() ([]*os.File, error) {
	var files []*os.File
	err := func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range s.devices {
			number, ok := d.file.Pin()
			if !ok {
				return os.ErrClosed
			}
			fd, err := unix.FcntlInt(uintptr(number), unix.F_DUPFD_CLOEXEC, 0)
			d.file.Unpin()
			if err != nil {
				return os.NewSyscallError("fcntl", err)
			}
			files = append(files, os.NewFile(uintptr(fd), devicePath))
		}
		s.shared = true
		return nil
	}()
	if err != nil || len(files) == 0 {
		closeAll(files)
		return nil, fuseError("files", s.object(), orClosed(err))
	}
	return files, nil
}

func orClosed(err error) error {
	if err == nil {
		return os.ErrClosed
	}
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// handedOver tells whether somebody else serves the file system.
func (s *Session) handedOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drain != nil && s.shared
}

// Adopt goes on with a session of another process, by what that returned from
// [Session.Files] and [Session.State]. The new session has as many devices as there
// are files, the first one of which is its Device. It owns the mount: Close unmounts, unless
// the session is handed over in turn. On success the files are
// closed; when Adopt returns an error, they are the caller's, and nothing has
// changed.
//
// A predecessor that lives hands over in this order: [Session.Drain], Files and
// State, and, when the successor has adopted them, [Session.Close]. Clients
// notice a pause, and nothing else. If the successor fails, [Session.Resume] goes
// on.
//
// When a predecessor has died, the files must have been kept by somebody (see
// Files), and so must the State. What it had read is not lost: after
// [Session.NotifyResend], the kernel sends those requests again, with bit 63 of
// Header.Unique set. The dead server may have carried them out already, without
// having said so; a server that is not prepared for that answers "file exists" to
// who made it. That needs Linux 6.9. Before that, clients whose requests had been read
// wait until the connection is aborted. FORGET is not sent again: the kernel holds fewer
// references than a server may think, and never more.
//
// What the file system itself must know (nodes, open files) is the server's to
// pass on. The successor needs no privileges to serve. To unmount, it must be in
// the same mount namespace, or that of Config.PID, or state.Config.Namespace must be set. A
// helper of [Config.AutoUnmount] does not come along. The files share their
// description with the predecessor, whose read(2) does not block from then on, either.
//
// The error Is unix.EINVAL if a file is no FUSE device or the State is not one of
// a session, and [ErrUnmounted] or [ErrAborted] if that has ended.
func Adopt(files []*os.File, state State) (*Session, error) {
	config := state.Config
	config.AutoUnmount = false
	object := config.MountPoint
	if object == "" {
		object = devicePath
	}
	switch {
	case len(files) == 0:
		return nil, fuseError("adopt", object, fmt.Errorf("no files: %w", unix.EINVAL))
	case state.Major != protocolMajor || state.MaxWrite == 0:
		return nil, fuseError("adopt", object, fmt.Errorf("the State has no version of the protocol, or no MaxWrite: %w", unix.EINVAL))
	case config.PID != 0 && config.Namespace != nil:
		return nil, fuseError("adopt", object, fmt.Errorf("Config.PID and Config.Namespace are both set: %w", unix.EINVAL))
	case state.InNamespace && config.Namespace == nil:
		return nil, fuseError("adopt", object, fmt.Errorf("the session was mounted in a namespace that a file stood for: Config.Namespace must be set to that: %w", unix.EINVAL))
	}
	place, err := newPlace(&config)
	if err != nil {
		return nil, err
	}
	s := newSession(config, place)
	s.shared = true
	s.id, s.initRequest = state.Mount, bytes.Clone(state.InitRequest)
	s.state = state
	s.state.InitRequest, s.state.Undelivered = nil, nil
	s.resize(state.MaxWrite)
	s.probe.node = probeNode
	s.probe.lookups.Store(state.ProbeLookups)
	if err := s.adopt(files, state.Undelivered); err != nil {
		s.disown()
		return nil, err
	}
	closeAll(files)
	return s, nil
}

// adopt makes devices of files, and requests of what was not delivered.
func (s *Session) adopt(files []*os.File, undelivered []Undelivered) error {
	for _, f := range files {
		fd, err := share(f, s.bufferSize)
		if err != nil {
			return failed("adopt", f.Name(), err)
		}
		if _, err := s.serve(fd); err != nil {
			return err
		}
	}
	for _, u := range undelivered {
		if u.Device < 0 || u.Device >= len(s.devices) || len(u.Message) > s.bufferSize {
			return fuseError("adopt", s.object(), fmt.Errorf("an undelivered request of device %d of %d, %d bytes: %w", u.Device, len(files), len(u.Message), unix.EINVAL))
		}
		d := s.devices[u.Device]
		d.n = copy(d.buf, u.Message)
		r, err := d.accept()
		if err != nil {
			return err
		}
		if r != nil {
			s.giveBack(r)
		}
	}
	return nil
}

// disown lets go of a session that was not adopted.
func (s *Session) disown() {
	s.mu.Lock()
	s.drain = &drain{quiet: make(chan struct{})}
	s.mu.Unlock()
	s.Close()
}

// share returns another descriptor for a device that is connected. A message of
// it has up to size bytes.
func share(f *os.File, size int) (fd int, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return -1, os.ErrClosed
	}
	fd = -1
	cerr := conn.Control(func(theirs uintptr) {
		if err = checkDevice(int(theirs), size); err == nil {
			fd, err = unix.FcntlInt(theirs, unix.F_DUPFD_CLOEXEC, 0)
			err = os.NewSyscallError("fcntl", err)
		}
	})
	if cerr != nil {
		return -1, os.ErrClosed
	}
	return fd, err
}

// checkDevice tells whether fd is a device with a connection that is alive.
func checkDevice(fd, size int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(10, 229) {
		return fmt.Errorf("not a FUSE device: %w", unix.EINVAL)
	}
	fds := []unix.PollFd{{Fd: int32(fd)}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 || fds[0].Revents&unix.POLLERR == 0 {
			return os.NewSyscallError("poll", err)
		}
		break
	}
	// There is nothing to read any more, or nothing yet. Too small a buffer would
	// be all that the kernel complains of.
	switch _, err := unix.Read(fd, make([]byte, size)); err {
	case unix.ENODEV:
		return ErrUnmounted
	case unix.ECONNABORTED:
		return ErrAborted
	case unix.EPERM:
		return fmt.Errorf("nothing is mounted by it: %w", unix.EINVAL)
	default:
		return os.NewSyscallError("read", err)
	}
}
