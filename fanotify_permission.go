package kernstream

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/poller"
)

// Reading a group whose events wait for an answer.
//
// Whoever opens a file with such a mark stands still until somebody has read the
// event and answered. So who reads waits for nobody: neither for the consumer (see
// accessList), nor for a file system (see permissionReaders).

// askers counts the watchers of this process with such events. It is locked for
// reading while the process forks.
var askers struct {
	sync.RWMutex
	n int
}

// errAsker is why a process that answers must not start others. Between the clone
// and the exec, the runtime waits for the child in one system call, without
// giving its processor away: with one processor, or with a garbage collection at
// that moment, nobody is left to answer if the child asks.
var errAsker = fmt.Errorf("this process answers permission events, and would not if its child had to wait for an answer: %w", unix.EDEADLK)

// enterAskers counts one more. It waits until no process is being started.
func enterAskers() {
	askers.Lock()
	defer askers.Unlock()
	askers.n++
}

func leaveAskers() {
	askers.Lock()
	defer askers.Unlock()
	askers.n--
}

// respond writes one answer.
func (g *fileGroup) respond(fd int, r Response) error {
	var buf [32]byte
	b := r.encode(buf[:0], fd)
	group, ok := g.file.Pin()
	if !ok {
		return os.ErrClosed
	}
	defer g.file.Unpin()
	for {
		if _, err := unix.Write(group, b); err != unix.EINTR {
			return err
		}
	}
}

// respondAll writes the same answer for several events, in as few system calls
// as there can be. The kernel takes each buffer of a writev(2) for itself.
func (g *fileGroup) respondAll(fds []int, r Response) {
	if len(fds) == 0 {
		return
	}
	group, ok := g.file.Pin()
	if !ok {
		return
	}
	defer g.file.Unpin()
	size := len(r.encode(nil, 0))
	all := make([]byte, 0, len(fds)*size)
	buffers := make([][]byte, len(fds))
	for i, fd := range fds {
		all = r.encode(all, fd)
		buffers[i] = all[i*size : (i+1)*size]
	}
	for len(buffers) > 0 {
		n, err := unix.Writev(group, buffers[:min(len(buffers), answersAtOnce)])
		done := max(n, 0) / size
		if err != nil && err != unix.EINTR {
			done++ // the kernel does not know that one (any more)
		}
		buffers = buffers[min(done, len(buffers)):]
	}
}

// flush takes all marks of one type away.
func (g *fileGroup) flush(t MarkType) error {
	var err error
	cerr := g.file.Control(func(fd int) {
		err = unix.FanotifyMark(fd, unix.FAN_MARK_FLUSH|t.flags(), 0, unix.AT_FDCWD, "/")
	})
	if cerr != nil {
		return cerr
	}
	return os.NewSyscallError("fanotify_mark", err)
}

// A permissionReader reads a group with permission events.
type permissionReader struct {
	fileReader
	access *accessList
	pid    int // of this process
	file   *poller.File

	buf   []byte       // has room for one event
	most  int          // with less, there is no room for two
	since atomic.Int64 // when it began what may take long: to read, or to close; from the start of all. 0: nothing
}

func newPermissionReader(group *fileGroup, paths *pathCache, access *accessList) *permissionReader {
	r := &permissionReader{access: access, pid: os.Getpid(), buf: make([]byte, group.eventSize())}
	r.most = min(len(r.buf), 2*group.leastSize()-1)
	r.fileReader = fileReader{group: group, paths: paths, send: func(e *FileEvent) bool { access.offer(e); return true }}
	return r
}

// next reads an event and delivers it. It tells whether there may be more.
//
// It reads no more than one: if the file system of a further one held up the read,
// this one would wait, too.
func (r *permissionReader) next(ctx context.Context, fd int) (more bool, err error) {
	n, err := r.readNow(fd)
	if n == 0 && err == nil {
		closeAll(r.access.writeCollected())
		r.since.Store(0)
		return false, nil
	}
	r.when = time.Now()
	switch {
	case ctx.Err() != nil:
		r.turnAway(r.buf[:n])
		return false, ctx.Err()
	case err != nil:
		return true, r.lost(err)
	}
	return true, r.deliver(r.buf[:n])
}

// readNow reads an event, if there is one.
func (r *permissionReader) readNow(fd int) (n int, err error) {
	for size := r.most; ; {
		switch n, err = unix.Read(fd, r.buf[:size]); {
		case err == nil:
			return n, nil
		case err == unix.EAGAIN:
			return 0, nil
		case err == unix.EINVAL && size < len(r.buf):
			size = len(r.buf) // this one needs it
		case err != unix.EINTR:
			return 0, os.NewSyscallError("read", err)
		}
	}
}

// deliver lets the events in b be answered that are not the consumer's business,
// and hands on the others.
func (r *permissionReader) deliver(b []byte) error {
	for len(b) > 0 {
		raw, rest, err := fanotify.Next(b)
		if err != nil {
			return fileError("read", "fanotify", err)
		}
		b = rest
		switch asks := asks(raw); {
		case asks && r.own(raw.PID()):
			r.access.settle(raw, true)
		case asks && !r.access.hold():
			r.access.settle(raw, false)
		default:
			e := r.newEvent(raw)
			if asks {
				r.access.enter(e)
			}
			r.paths.begin()
			r.complete(e)
			r.access.offer(e)
		}
	}
	return nil
}

// asks tells whether an event is a question that can be answered.
func asks(raw fanotify.Event) bool { return FileOp(raw.Mask())&opPermission != 0 && raw.FD() >= 0 }

// newEvent makes an event of what the kernel wrote, without its path.
func (r *permissionReader) newEvent(raw fanotify.Event) *FileEvent {
	var info fanotify.Info
	err := raw.Decode(&info)
	e := &FileEvent{own: &fileDescriptors{fd: max(raw.FD(), -1), pidfd: -1}}
	if errno := raw.FDError(); errno != 0 {
		e.Err = noDescriptor(errno)
	}
	r.fill(e, raw, &info, err)
	return e
}

// complete finds the path of an event.
func (r *permissionReader) complete(e *FileEvent) {
	if fd := e.own.fd; fd >= 0 {
		found := r.paths.openNow(fd)
		e.Path, e.PathState = found.path, found.state
		e.setPathErr(found.err)
	}
	if e.own.asks == nil {
		r.keep(e)
	}
}

// keep closes the descriptors of an event that does not ask, unless they were asked
// for and there is room for one more in the queue.
func (r *permissionReader) keep(e *FileEvent) {
	own := e.own
	if own.fd >= 0 && !r.group.keep {
		unix.Close(own.fd)
		own.fd = -1
	}
	switch {
	case own.fd < 0 && own.pidfd < 0:
	case r.access.keep():
		own.counted = true
	default:
		full := fmt.Errorf("more than MaxPending events wait to be received: %w", unix.EMFILE)
		if own.fd >= 0 {
			unix.Close(own.fd)
			own.fd, e.Err = -1, fileError("read", "fanotify", full)
		}
		if own.pidfd >= 0 {
			unix.Close(own.pidfd)
			own.pidfd, own.pidfdErr = -1, full
		}
	}
	if own.fd < 0 {
		e.disown()
	}
}

// own tells whether a process, or a thread if the group names those, is of this
// process: who answers would wait for himself. (The thread waits in the kernel
// for us, so its number is not another's meanwhile.)
func (r *permissionReader) own(id int) bool {
	if r.group.flags&unix.FAN_REPORT_TID == 0 {
		return id == r.pid
	}
	return id > 0 && unix.Tgkill(r.pid, id, 0) == nil
}

// turnAway lets all questions in b have the default answer.
func (r *permissionReader) turnAway(b []byte) {
	for len(b) > 0 {
		raw, rest, err := fanotify.Next(b)
		if err != nil {
			return
		}
		b = rest
		if asks(raw) {
			r.access.settle(raw, r.own(raw.PID()))
		} else {
			discardEvent(raw)
		}
	}
}

// drain gives the default answer to all that is in the queue of the group.
func (r *permissionReader) drain() {
	defer func() { closeAll(r.access.writeCollected()) }()
	for {
		n, err := 0, error(nil)
		if cerr := r.group.file.Control(func(fd int) { n, err = r.readNow(fd) }); cerr != nil {
			return
		}
		r.turnAway(r.buf[:n])
		if n == 0 && (err == nil || !consumed(err)) {
			return
		}
	}
}
