package kernstream

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
)

// Reading a group whose events wait for an answer.
//
// Whoever opens a file with such a mark stands still until somebody has read the
// event and answered. So the reader waits for nobody: neither for the consumer
// (see accessList), nor for a file system, whose server may be one of those that
// stand still.

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

	buf  []byte
	step int // how much to read at once

	// What becomes of the events that were read.
	batch   []*FileEvent // they are the consumer's
	allowed []fanotify.Event
	refused []fanotify.Event // they get the default answer
}

func newPermissionReader(group *fileGroup, paths *pathCache, access *accessList) *permissionReader {
	r := &permissionReader{access: access, pid: os.Getpid(), buf: make([]byte, atMost(answersAtOnce)*group.eventSize())}
	r.fileReader = fileReader{group: group, paths: paths, send: func(e *FileEvent) bool { access.offer(e); return true }}
	r.step = len(r.buf)
	if group.flags&unix.FAN_REPORT_FD_ERROR == 0 {
		// Where the kernel does not tell of a descriptor that it could not make,
		// it does at least for the first event of a read.
		r.step = group.eventSize()
	}
	return r
}

// run reads until ctx is done, or the group cannot be read any more.
func (r *permissionReader) run(ctx context.Context) error {
	release := r.group.file.CancelOn(ctx)
	defer release()
	defer r.paths.close()
	n := 0
	wait := r.group.file.Waiter(func(fd int) (done bool, err error) {
		n, err = r.readNow(fd)
		return n > 0 || err != nil, err
	})
	for {
		n = 0
		err := wait()
		r.when = time.Now()
		if ctx.Err() != nil {
			r.turnAway(r.buf[:n])
			return ctx.Err()
		}
		if derr := r.deliver(r.buf[:n]); derr != nil {
			return derr
		}
		if err != nil {
			if err = r.lost(err); err != nil {
				return err
			}
		}
	}
}

// readNow reads what is there, as far as there is room for it. An error comes
// after the n bytes that were read before.
func (r *permissionReader) readNow(fd int) (n int, err error) {
	for n+r.step <= len(r.buf) {
		k, err := unix.Read(fd, r.buf[n:n+r.step])
		n += max(k, 0)
		switch {
		case err == unix.EAGAIN:
			return n, nil
		case err != nil && err != unix.EINTR:
			return n, os.NewSyscallError("read", err)
		case r.step == len(r.buf) && err == nil:
			return n, nil
		}
	}
	return n, nil
}

// deliver answers what is not the consumer's business, and hands on the other
// events in b.
func (r *permissionReader) deliver(b []byte) error {
	r.batch, r.allowed, r.refused = r.batch[:0], r.allowed[:0], r.refused[:0]
	var err error
	for len(b) > 0 && err == nil {
		var raw fanotify.Event
		if raw, b, err = fanotify.Next(b); err == nil {
			r.sort(raw)
		}
	}
	r.answer(r.allowed, Response{Allow: true})
	r.access.defaulted.Add(uint64(len(r.refused)))
	r.answer(r.refused, r.access.byDefault)
	if len(r.batch) > 0 {
		r.paths.begin()
	}
	for _, e := range r.batch {
		r.complete(e)
		r.access.offer(e)
	}
	clear(r.batch)
	if err != nil {
		return fileError("read", "fanotify", err)
	}
	return nil
}

// sort decides what becomes of an event.
func (r *permissionReader) sort(raw fanotify.Event) {
	asks := FileOp(raw.Mask())&opPermission != 0 && raw.FD() >= 0
	switch {
	case asks && r.own(raw.PID()):
		r.allowed = append(r.allowed, raw)
	case asks && !r.access.hold():
		r.refused = append(r.refused, raw)
	default:
		e := r.newEvent(raw)
		if asks {
			r.access.enter(e)
		}
		r.batch = append(r.batch, e)
	}
}

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
	fd := e.own.fd
	if fd < 0 {
		e.disown()
		return
	}
	found := r.paths.openNow(fd)
	e.Path, e.PathState = found.path, found.state
	e.setPathErr(found.err)
	if e.own.asks == nil {
		r.keep(e)
	}
}

// keep closes the descriptor of an event that does not ask, unless it was asked
// for and there is room for one more in the queue.
func (r *permissionReader) keep(e *FileEvent) {
	switch {
	case !r.group.keep:
	case r.access.keep():
		e.own.counted = true
		return
	default:
		e.Err = fileError("read", "fanotify", fmt.Errorf("more than MaxPending events wait to be received: %w", unix.EMFILE))
	}
	unix.Close(e.own.fd)
	e.own.fd = -1
	e.disown()
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

// answer answers events that nobody gets, and closes their descriptors.
func (r *permissionReader) answer(events []fanotify.Event, response Response) {
	if len(events) == 0 {
		return
	}
	fds := make([]int, len(events))
	for i, raw := range events {
		fds[i] = raw.FD()
	}
	r.group.respondAll(fds, response)
	for _, raw := range events {
		discardEvent(raw)
	}
}

// turnAway gives all permission events in b the default answer.
func (r *permissionReader) turnAway(b []byte) {
	r.allowed, r.refused = r.allowed[:0], r.refused[:0]
	for len(b) > 0 {
		raw, rest, err := fanotify.Next(b)
		if err != nil {
			break
		}
		b = rest
		switch asks := FileOp(raw.Mask())&opPermission != 0 && raw.FD() >= 0; {
		case !asks:
			discardEvent(raw)
		case r.own(raw.PID()):
			r.allowed = append(r.allowed, raw)
		default:
			r.refused = append(r.refused, raw)
		}
	}
	r.answer(r.allowed, Response{Allow: true})
	r.access.defaulted.Add(uint64(len(r.refused)))
	r.answer(r.refused, r.access.byDefault)
}

// drain gives the default answer to all that is in the queue of the group.
func (r *permissionReader) drain() {
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

// startAsking begins to read the group, and to deliver what is read.
func (w *fileWatch) startAsking(g *fileGroup) {
	ctx := w.ctx
	w.access.start(ctx, w.c)
	r := newPermissionReader(g, newPathCache(w.systems), w.access)
	w.readers.Go(func() {
		if err := r.run(ctx); isOpError(err) {
			w.failed <- err
		}
	})
}

// endAsking answers all who wait, in the order in which nobody gets around the
// default answer: what is asked about after the marks are gone was let pass by
// the kernel anyway, and what is in the queue when the group is closed would be
// let pass. It does not wait for the reader, which may wait for a file system.
func (w *fileWatch) endAsking() {
	group := w.groups[ViaDescriptor]
	if w.access == nil || group == nil {
		return
	}
	w.access.stopped()
	for _, t := range []MarkType{MarkInode, MarkMount, MarkFilesystem} {
		group.flush(t)
	}
	w.access.end() // first, since a file system may hold up the next step
	newPermissionReader(group, nil, w.access).drain()
	w.access.end()
}
