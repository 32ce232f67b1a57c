package kernstream

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fangroup"
	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/internal/statmount"
	"github.com/kernstream/kernstream/poller"
)

// The fanotify path (Linux 6.15): the kernel names each mount that is attached,
// detached or moved in a namespace, and statmount(2) says what there is to say of
// that one mount. An event costs the same however many mounts there are.
//
// The events are hints, not the truth. Whatever they name is asked for anew, so
// a mount that is gone again, events that were lost, and states that the kernel
// was in between two of them need no care: what was asked last is right.
//
// What fanotify does not tell, rescans find: see mount_rescan.go.

// fanotifySource is the mountSource of [ViaFanotify].
type fanotifySource struct {
	target *mountTarget
	filter func(*Mount) bool

	group       *poller.Descriptor
	waker       *mountWaker
	buf         []byte           // for events
	reader      statmount.Reader // of the namespace
	propagation statmount.Reader // for dominating
	tree        *mountTree
	root        mountRoot // of this process, which paths are relative to in its own namespace

	// Mounts that events name and that are to be looked at, in order.
	order   []uint64
	touched map[uint64]mountTouch
	all     bool              // so are all mounts
	lost    bool              // because events were
	masters map[uint64]uint64 // the answers of one settle, see dominating

	// waiting wakes for changes of the own namespace that fanotify does not
	// tell. Of another one, a mountinfo file is not kept open: it would keep the
	// namespace alive.
	waiting *poller.Descriptor
	reopen  bool      // it is of an old root directory
	events  uint64    // how many were read
	heard   time.Time // when the last ones were
	judged  uint64    // of these, when the last wake was judged
	verify  *time.Timer

	rescan mountRescan

	begun  bool // the first look was taken
	woken  atomic.Uint32
	tokens chan struct{}
	end    chan struct{}
	finish func() // closes end

	waiters sync.WaitGroup
	failure atomic.Pointer[error] // of a waiter
}

// A mountTouch is what events said of a mount, a set.
type mountTouch uint8

const (
	touchAttached mountTouch = 1 << iota
	touchMoved
	touchGone
)

// What a token is for.
const (
	wokenTable  = 1 << iota // the waker woke: events, the mountinfo file or both are ready
	wokenVerify             // the time to verify that is over
)

func (s *fanotifySource) via() MountVia { return ViaFanotify }

func (s *fanotifySource) wake() <-chan struct{} { return s.tokens }

func (s *fanotifySource) ended() <-chan struct{} { return s.end }

func (s *fanotifySource) over() bool {
	return s.target.exited() || s.target.process == nil && s.dissolved()
}

// dissolved tells whether the namespace is not there any more.
func (s *fanotifySource) dissolved() bool {
	return s.reader.Namespace != 0 && errors.Is(s.reader.Any(), unix.ENOENT)
}

func (s *fanotifySource) token(reason uint32) {
	s.woken.Or(reason)
	select {
	case s.tokens <- struct{}{}:
	default: // the look that is pending will see it
	}
}

// fail makes the next look return the error of a waiter that is not there any
// more, unless it was closed.
func (s *fanotifySource) fail(err error) {
	if !errors.Is(err, os.ErrClosed) {
		s.failure.Store(&err)
		s.token(0)
	}
}

func (s *fanotifySource) close() {
	s.release()
	s.target.close()
	s.waiters.Wait()
}

// release lets go of everything but the target, and who waits for that.
func (s *fanotifySource) release() {
	s.verify.Stop()
	s.rescan.stop()
	if s.waker != nil {
		s.waker.close()
	}
	if s.group != nil {
		fangroup.Close([]int{s.group.FD()}, func() { s.group.Close() })
	}
	if s.waiting != nil {
		s.waiting.Close()
	}
}

// rest is not needed: the wakes are paced.
func (s *fanotifySource) rest(time.Time) time.Duration { return 0 }

func (s *fanotifySource) look(ctx context.Context, rescan bool, d *mountDelta) (resync bool, err error) {
	if err := s.failure.Load(); err != nil {
		return false, s.target.failed(*err)
	}
	if !s.begun {
		s.begun = true
		s.reportAll(d)
	}
	reason := s.woken.Swap(0)
	if err := s.drain(); err != nil {
		return false, err
	}
	if err := s.followRoot(); err != nil {
		return false, err
	}
	now := time.Now()
	if s.waiting != nil {
		if err := s.judge(reason, now); err != nil {
			return false, err
		}
	}
	if rescan {
		s.rescan.plan.request(now)
	}
	resync = s.lost
	if err := s.settle(ctx, d); err != nil {
		return false, err
	}
	found, err := s.rescan.step(ctx, now, d)
	if s.tree.seen == 0 && s.target.process == nil && s.dissolved() {
		s.finish()
	}
	return resync || found, err
}

// judge finds out what a wake of the mountinfo file means. The kernel wakes for
// what fanotify tells, too; the event follows within microseconds.
func (s *fanotifySource) judge(reason uint32, now time.Time) error {
	if reason&wokenTable != 0 && s.events == s.judged {
		// Whoever woke us may not have let go of the table yet.
		if err := s.reader.Any(); err != nil {
			return s.target.failed(err)
		}
		if err := s.drain(); err != nil {
			return err
		}
		if s.events == s.judged {
			s.verify.Reset(verifyDelay)
			return nil
		}
	}
	switch {
	case reason&(wokenTable|wokenVerify) == 0:
		return nil
	case s.events == s.judged && now.Sub(s.heard) > 2*stormRest:
		s.rescan.plan.change(now)
	default:
		s.rescan.plan.hidden(now)
	}
	s.judged = s.events
	return nil
}

// verifyDelay is how long a wake without an event waits for one.
const verifyDelay = time.Millisecond

// drain reads the events that there are, and notes which mounts they name.
func (s *fanotifySource) drain() error {
	for range 16 {
		n, err := s.readEvents()
		switch {
		case err != nil:
			return s.target.failed(os.NewSyscallError("read", err))
		case n == 0:
			return nil
		}
		s.heard = time.Now()
		for b := s.buf[:n]; len(b) > 0; {
			var e fanotify.Event
			if e, b, err = fanotify.Next(b); err == nil {
				err = s.note(e)
			}
			if err != nil {
				return mountError("read", s.target.name, err)
			}
		}
	}
	s.token(0) // there is more
	return nil
}

// readEvents reads events into s.buf. n is 0 when there are none.
func (s *fanotifySource) readEvents() (n int, err error) {
	for {
		n, err = unix.Read(s.group.FD(), s.buf)
		switch err {
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, nil
		default:
			return max(n, 0), err
		}
	}
}

func (s *fanotifySource) note(e fanotify.Event) error {
	s.events++
	if e.Overflow() {
		s.all, s.lost = true, true
		return nil
	}
	var info fanotify.Info
	if err := e.Decode(&info); err != nil {
		return err
	}
	switch e.Mask() & (unix.FAN_MNT_ATTACH | unix.FAN_MNT_DETACH) {
	case unix.FAN_MNT_ATTACH:
		s.touch(info.MountID, touchAttached)
	case unix.FAN_MNT_DETACH:
		s.touch(info.MountID, touchGone)
	case unix.FAN_MNT_ATTACH | unix.FAN_MNT_DETACH:
		s.touch(info.MountID, touchMoved)
	}
	return nil
}

// touch notes that a mount is to be looked at.
func (s *fanotifySource) touch(id uint64, how mountTouch) {
	said, ok := s.touched[id]
	if !ok {
		s.order = append(s.order, id)
	}
	s.touched[id] = said | how
}

// followRoot notices that this process has another root directory, by pivot_root
// or chroot, which changes all paths.
func (s *fanotifySource) followRoot() error {
	if s.reader.Namespace != 0 {
		return nil
	}
	root, err := rootAt(unix.AT_FDCWD, "/")
	switch {
	case err != nil:
		return s.target.failed(err)
	case root == s.root && s.reopen:
		return s.waitAnew()
	case root == s.root:
		return nil
	case !s.target.own:
		return errOtherRoot(s.target)
	}
	s.root = root
	s.all = true
	s.reopen = true
	return s.waitAnew()
}

// waitAnew opens the file that wakes again: the one that is open keeps the old
// root directory busy.
func (s *fanotifySource) waitAnew() error {
	fd, err := s.target.open()
	if err != nil {
		return nil // later
	}
	if s.waker.add(fd, unix.EPOLLPRI) != nil {
		unix.Close(fd)
		return nil
	}
	s.waker.remove(s.waiting.FD())
	s.waiting.Close()
	s.waiting, s.reopen = poller.Own(fd), false
	s.token(wokenTable) // there may have been a wake that it missed
	return nil
}
