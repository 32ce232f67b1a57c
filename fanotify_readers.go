package kernstream

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/poller"
)

// Who reads a group with permission events.
//
// The kernel opens the file of an event when that is read, and asks its file
// system for that. If that is served by a process which does not answer, or which
// stands still itself since it waits for an answer, the read does not return, and
// those who ask next would wait for a file that is not theirs. So a read that
// takes too long is left to itself, and another goroutine reads on. What it has
// read in the end is judged as all the rest. It also tells the file system of each
// close, which may take as long.
//
// Who reads on does so by a duplicate of the group's descriptor. When the one with
// the group's own is through, it reads again, and all is as before.

const (
	// readTakesLong is when another goroutine reads on.
	readTakesLong = 500 * time.Millisecond
	// readsAtOnce is how many there are at most: each holds an OS thread.
	readsAtOnce = 64
)

// permissionReaders are who reads one group: one at a time, but for those that are
// held up.
type permissionReaders struct {
	group     *fileGroup
	systems   *fileSystems
	access    *accessList
	running   *sync.WaitGroup
	failed    chan<- error
	takesLong time.Duration // readTakesLong
	atOnce    int           // readsAtOnce

	birth   time.Time
	current atomic.Pointer[permissionReader] // who reads; others leave when they can
	armed   atomic.Bool                      // the timer runs
	timer   *time.Timer

	mu    sync.Mutex
	ended bool // nobody starts any more
	n     int  // who has not left
}

// start begins to read, until ctx is done.
func (rs *permissionReaders) start(ctx context.Context) {
	rs.birth = time.Now()
	rs.timer = time.AfterFunc(time.Hour, func() { rs.relieve(ctx) })
	rs.timer.Stop()
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.add(ctx, rs.group.file)
}

// add lets another one read, by a file for the group, which it closes if it is
// not that of the group itself.
func (rs *permissionReaders) add(ctx context.Context, file *poller.File) {
	r := newPermissionReader(rs.group, newPathCache(rs.systems), rs.access)
	r.file = file
	rs.current.Store(r)
	rs.n++
	rs.running.Go(func() {
		if err := rs.run(ctx, r); err != nil {
			select {
			case rs.failed <- err:
			default: // another one has failed, too
			}
		}
		r.paths.close()
		if file != rs.group.file {
			file.Close()
		}
		rs.mu.Lock()
		rs.n--
		rs.mu.Unlock()
	})
}

// errRelieved ends a reader in whose place another one reads.
var errRelieved = errors.New("somebody else reads")

// run reads until ctx is done or somebody else reads, or until it returns why the
// group cannot be read any more.
func (rs *permissionReaders) run(ctx context.Context, r *permissionReader) error {
	defer r.file.CancelOn(ctx)()
	defer func() { closeAll(r.access.writeCollected()) }()
	err := r.file.Wait(func(fd int) (bool, error) {
		// What comes after the last event of a read wakes this wait again.
		for more := true; more; {
			rs.watch(r)
			var err error
			more, err = r.next(ctx, fd)
			switch {
			case err != nil:
				return true, err
			case rs.current.Load() != r && !rs.takeBack(r):
				return true, errRelieved
			}
		}
		return false, nil
	})
	switch {
	case isOpError(err):
		return err
	case err == errRelieved, ctx.Err() != nil, rs.current.Load() != r:
		return nil
	}
	return fileError("read", "fanotify", err)
}

// takeBack lets the reader with the group's own descriptor read again, and who reads
// in its place leave. It tells whether r is that.
func (rs *permissionReaders) takeBack(r *permissionReader) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if r.file != rs.group.file || rs.ended {
		return false
	}
	rs.current.Swap(r).file.SetReadDeadline(time.Now())
	return true
}

// watch notes that a read begins, with all that follows it, and that somebody has to
// look how long it takes.
func (rs *permissionReaders) watch(r *permissionReader) {
	r.since.Store(max(1, int64(time.Since(rs.birth))))
	if !rs.armed.Load() && rs.armed.CompareAndSwap(false, true) {
		rs.timer.Reset(rs.takesLong)
	}
}

// relieve lets another goroutine read if the one that does is held up.
func (rs *permissionReaders) relieve(ctx context.Context) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.ended {
		return
	}
	since := rs.current.Load().since.Load()
	if since == 0 {
		rs.armed.Store(false)
		// One may have begun in between.
		if since = rs.current.Load().since.Load(); since == 0 || !rs.armed.CompareAndSwap(false, true) {
			return
		}
	}
	rs.writeCollected()
	left := rs.takesLong - (time.Since(rs.birth) - time.Duration(since))
	if left <= 0 {
		left = rs.takesLong
		if rs.n < rs.atOnce {
			if file, err := rs.group.again(); err == nil {
				rs.add(ctx, file)
			}
		}
	}
	rs.timer.Reset(left)
}

// end gives the default answer to all that is in the queue of the group. It does
// not wait for who is held up, and may be called again.
func (rs *permissionReaders) end() {
	rs.mu.Lock()
	rs.ended = true
	rs.mu.Unlock()
	if rs.timer != nil {
		rs.timer.Stop()
	}
	empty := make(chan struct{}, rs.atOnce)
	for range rs.atOnce {
		rs.running.Go(func() {
			newPermissionReader(rs.group, nil, rs.access).drain()
			empty <- struct{}{}
		})
		select {
		case <-empty:
			return
		case <-time.After(rs.takesLong):
			rs.writeCollected()
		}
	}
	<-empty
}

// writeCollected writes what somebody has collected who is held up.
func (rs *permissionReaders) writeCollected() {
	rs.access.closer.close(rs.access.writeCollected()...)
}

// again returns another file for the same group.
func (g *fileGroup) again() (*poller.File, error) {
	fd, err := -1, error(nil)
	if cerr := g.file.Control(func(own int) { fd, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return poller.New(fd, "fanotify")
}
