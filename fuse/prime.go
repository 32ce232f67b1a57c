package fuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
)

// A process that opens a file of its own mount with os.Open hangs for ever,
// unless the kernel knows that the server does not serve POLL: the runtime's
// poller adds the file to its epoll instance, the kernel asks the server whether
// the file is ready while it holds the lock of that instance, and the request
// cannot be reported because that takes the lock.
//
// Mount therefore lets the kernel ask once, in a way that does no harm, and
// answers ENOSYS, which it remembers for the life of the connection. A thread
// opens a file that does not exist otherwise, and polls it, while Mount answers
// what that leads to.
//
// Who waits for an answer to what was read cannot be killed. The device is closed
// when the last thread that has it ends, so if that thread had it, a process that is
// killed then would stay for ever. The thread has a descriptor table of its own,
// without the device.

// A probe is the file for that.
type probe struct {
	name   string // in the root directory; "": the root itself, which is a file
	node   uint64
	handle uint64        // of the open file
	tid    atomic.Uint32 // of the thread that opens it

	polled  bool
	lookups atomic.Int64 // that the kernel has not forgotten
}

// probeNode is the node ID of the probe. No server gives out the last ones, and
// it is only in use until the kernel has forgotten it.
const probeNode = 1<<64 - 2

func newProbe(mode uint32) (name string, node, handle uint64) {
	handle = rand.Uint64()
	if mode == unix.S_IFREG {
		return "", fusewire.RootID, handle
	}
	return ".kernstream-" + strconv.FormatUint(rand.Uint64(), 36), probeNode, handle
}

// unfinished are the descriptors of file systems that are being mounted, of the devices
// and of the mounts. A thread that is apart has no copies of them: those of a device
// would let two such threads wait for each other, and those of a mount keep it busy.
var unfinished = struct {
	sync.Mutex
	of map[*Session][]int
}{of: map[*Session][]int{}}

// making opens a descriptor that is unfinished until made is called.
func (s *Session) making(open func() (fd int, err error)) (fd int, err error) {
	unfinished.Lock()
	defer unfinished.Unlock()
	if fd, err = open(); err == nil {
		unfinished.of[s] = append(unfinished.of[s], fd)
	}
	return fd, err
}

func (s *Session) made() {
	unfinished.Lock()
	defer unfinished.Unlock()
	delete(unfinished.of, s)
}

// apart gives the thread a descriptor table of its own, which has nothing that is
// unfinished but mount. Where the kernel refuses that, it does nothing.
func (s *Session) apart(mount int) (done bool) {
	unfinished.Lock()
	defer unfinished.Unlock()
	device := uint(unfinished.of[s][0])
	if unix.CloseRange(device, device, unix.CLOSE_RANGE_UNSHARE) != nil {
		return false
	}
	for _, descriptors := range unfinished.of {
		for _, fd := range descriptors {
			if fd != mount { // also if its number was that of another one, which was closed just now
				unix.Close(fd)
			}
		}
	}
	return true
}

// prime makes the kernel learn that nobody serves POLL. mount is a descriptor of the
// mount, if that is not visible yet.
func (s *Session) prime(ctx context.Context, mount int, mode uint32) error {
	p := &s.probe
	p.name, p.node, p.handle = newProbe(mode)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	place := s.place
	if mount >= 0 {
		place = &ownPlace
	}
	result := make(chan error, 1)
	go func() {
		result <- place.apart(func() error {
			done := s.apart(mount)
			fd, err := s.openProbe(mount)
			if done && mount >= 0 {
				unix.Close(mount)
			}
			if err != nil {
				return err
			}
			return p.poll(fd)
		})
		cancel()
	}()

	var others []*Request
	err := s.answerProbe(ctx, &others)
	s.mu.Lock()
	s.returned = append(others, s.returned...)
	s.divert()
	s.mu.Unlock()
	select {
	case opened := <-result:
		if isErrno(opened, unix.EACCES, unix.EPERM) {
			return nil // who cannot open a file is in no danger
		}
		if opened == nil && !p.polled {
			opened = errors.New("the kernel did not ask: is something else mounted there?")
		}
		if opened != nil {
			return failed("prime", s.object(), fmt.Errorf("probe of the new mount: %w", opened))
		}
		return nil
	default:
		// The thread waits for an answer that it will not get.
		s.device.file.Close()
		<-result
		return err
	}
}

// openProbe opens the probe on the thread that it is called on.
func (s *Session) openProbe(mount int) (int, error) {
	p := &s.probe
	p.tid.Store(uint32(unix.Gettid()))
	dir, path := mount, p.name
	switch {
	case mount >= 0 && path == "":
		path = fmt.Sprintf("/proc/self/fd/%d", mount)
	case mount < 0 && path == "":
		dir, path = unix.AT_FDCWD, s.config.MountPoint
	case mount < 0:
		dir, path = unix.AT_FDCWD, strings.TrimSuffix(s.config.MountPoint, "/")+"/"+path
	}
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	return fd, os.NewSyscallError("openat", err)
}

// poll polls the probe, and closes it. The file must not come near an epoll
// instance, so it is not an os.File.
func (p *probe) poll(fd int) error {
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, 0); err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
}

// answerProbe answers the requests of the probe until ctx is done and there are
// no more. Requests of others are appended to others.
func (s *Session) answerProbe(ctx context.Context, others *[]*Request) error {
	for {
		r, err := s.device.next(ctx)
		if err != nil && ctx.Err() != nil {
			return s.drainProbe(context.Cause(ctx), others)
		}
		if err != nil {
			return err
		}
		if !s.probe.answer(r) {
			*others = append(*others, r)
		}
	}
}

// drainProbe answers what there is already, and returns err.
func (s *Session) drainProbe(err error, others *[]*Request) error {
	for {
		if done, readErr := s.device.readNow(); !done || readErr != nil {
			return err
		}
		r, acceptErr := s.device.accept()
		if acceptErr != nil {
			return acceptErr
		}
		if r != nil && !s.probe.answer(r) {
			*others = append(*others, r)
		}
	}
}

// answer answers r if it is about the probe.
func (p *probe) answer(r *Request) bool {
	h := &r.Header
	// The kernel numbers threads as the process does that mounted. From a
	// helper in another namespace they all have the number 0.
	ours := h.PID == p.tid.Load() || h.PID == 0
	switch {
	case h.Opcode == OpLookup && p.name != "" && bytes.Equal(bytes.TrimRight(r.Body, "\x00"), []byte(p.name)):
		p.lookups.Add(1)
		r.Reply(fusewire.AppendEntry(nil, p.node, p.attr()))
	case h.Opcode == OpGetattr && h.NodeID == p.node && (ours || p.node == probeNode):
		r.Reply(fusewire.AppendAttr(nil, p.attr()))
	case h.Opcode == OpGetattr && h.NodeID == fusewire.RootID && ours:
		r.Reply(fusewire.AppendAttr(nil, &fusewire.Attr{
			Ino: fusewire.RootID, Mode: unix.S_IFDIR | 0o755, Nlink: 2,
			UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()),
		}))
	case h.Opcode == OpOpen && h.NodeID == p.node && (ours || p.node == probeNode):
		r.Reply(fusewire.AppendOpen(nil, p.handle, 0))
	case h.Opcode == OpPoll && p.holds(r):
		p.polled = true
		r.ReplyErrno(unix.ENOSYS)
	case (h.Opcode == OpFlush || h.Opcode == OpRelease) && p.holds(r):
		r.Reply()
	case h.NodeID == probeNode:
		r.ReplyErrno(unix.EIO) // not ENOSYS: the kernel would remember that
	default:
		return false
	}
	return true
}

// holds tells whether r is about the open probe.
func (p *probe) holds(r *Request) bool {
	return len(r.Body) >= 8 && binary.NativeEndian.Uint64(r.Body) == p.handle
}

func (p *probe) attr() *fusewire.Attr {
	return &fusewire.Attr{
		Ino: p.node, Mode: unix.S_IFREG | 0o444, Nlink: 1,
		UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()),
	}
}

// dropForget takes out of a FORGET or BATCH_FORGET what it says about the
// probe. It returns nil if nothing is left.
func (p *probe) dropForget(message []byte) []byte {
	if p.lookups.Load() <= 0 {
		return message
	}
	rest, lookups, err := fusewire.DropForget(message, p.node)
	if err != nil {
		return message
	}
	p.lookups.Add(-int64(lookups))
	return rest
}
