package recorder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procconn"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/poller"
)

// A tree is a process and its descendants.
//
// The kernel's process events connector tells of each fork before the child
// runs, into a socket that is read whenever the tree is asked for a process: what
// that process does, and is asked about, came later. So no descendant is missed,
// however short it lives, and none is looked up in /proc, where it may be gone.
type tree struct {
	mu      sync.Mutex // of has
	socket  *poller.Descriptor
	buf     []byte
	members map[int]bool
}

// treeBuffer is how many bytes of forks may wait, with the kernel's own needs.
const treeBuffer = 8 << 20

// newTree finds the descendants of a process, and those to come.
func newTree(root int) (_ *tree, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, treeError("socket", err)
	}
	t := &tree{socket: poller.Own(fd), buf: make([]byte, 4096), members: map[int]bool{}}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: procconn.Group}); err != nil {
		return nil, treeError("bind", err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, treeBuffer)
	id := uint32(os.Getpid())
	if err := unix.Sendto(fd, procconn.Listen(id), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, treeError("sendto", err)
	}
	// The answer is there already. In another namespace there is none.
	if err := t.answered(id); err != nil {
		return nil, err
	}
	if err := t.find(root); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *tree) close() { t.socket.Close() }

func (t *tree) answered(id uint32) error {
	for {
		e, err := t.read()
		switch {
		case err == unix.EAGAIN:
			return treeError("listen", unix.EPERM)
		case err != nil && err != unix.ENOBUFS:
			return treeError("read", err)
		case e.What == procconn.Ack && e.ID == id:
			if e.Errno != 0 {
				return treeError("listen", e.Errno)
			}
			return nil
		}
	}
}

// find makes members of a process and those below it.
func (t *tree) find(root int) error {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return recordError("read", "/proc", err)
	}
	children := map[int][]int{}
	found := false
	for _, dir := range dirs {
		pid, err := strconv.Atoi(dir.Name())
		if err != nil {
			continue
		}
		name := "/proc/" + dir.Name() + "/stat"
		text, err := os.ReadFile(name)
		switch {
		case err == nil:
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH), errors.Is(err, fs.ErrPermission):
			continue // it is gone, or /proc hides it
		default:
			return recordError("read", name, err)
		}
		if stat, ok := procfs.ParseStat(text); ok {
			children[stat.PPID] = append(children[stat.PPID], pid)
			found = found || pid == root
		}
	}
	if !found {
		return recordError("find", fmt.Sprint("process ", root), fmt.Errorf("%w: %w", unix.ESRCH, os.ErrProcessDone))
	}
	for next := []int{root}; len(next) > 0; {
		pid := next[0]
		t.members[pid] = true
		next = append(next[1:], children[pid]...)
	}
	return nil
}

// read reads one event.
func (t *tree) read() (procconn.Event, error) {
	for {
		n, err := unix.Read(t.socket.FD(), t.buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return procconn.Event{}, err
		}
		return procconn.Decode(t.buf[:n])
	}
}

var errForksLost = errors.New("forks were lost: which processes are descendants is not known for sure")

// has tells whether a process is in the tree.
func (t *tree) has(pid int) (member bool, lost error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		e, err := t.read()
		switch {
		case err == unix.EAGAIN:
			return t.members[pid], lost
		case err != nil:
			lost = errForksLost
		case e.What == procconn.Fork && e.PID == e.TGID:
			// The number may have been another process's.
			if t.members[e.ParentTGID] {
				t.members[e.PID] = true
			} else {
				delete(t.members, e.PID)
			}
		}
	}
}

// treeError explains why there are no events of forks.
func treeError(op string, err error) error {
	call := os.NewSyscallError(op, err)
	switch {
	case errors.Is(err, fs.ErrPermission):
		call = fmt.Errorf("%w: to follow a process tree needs CAP_NET_ADMIN in the first user namespace, and the first process ID and network namespaces", call)
	case err == unix.EPROTONOSUPPORT || err == unix.ENOENT || err == unix.ECONNREFUSED:
		call = fmt.Errorf("%w: to follow a process tree needs a kernel with CONFIG_PROC_EVENTS: %w", call, errors.ErrUnsupported)
	}
	return recordError(op, "process events", call)
}
