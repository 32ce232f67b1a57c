package kernstream

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

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

// newFanotifySource watches the namespace of target, and reads its table. The
// error says why it cannot.
func newFanotifySource(ctx context.Context, target *mountTarget, filter func(*Mount) bool) (*fanotifySource, error) {
	s := &fanotifySource{
		target:  target,
		filter:  filter,
		buf:     make([]byte, 32<<10),
		tree:    newMountTree(),
		touched: make(map[uint64]mountTouch),
		masters: make(map[uint64]uint64),
		tokens:  make(chan struct{}, 1),
		end:     make(chan struct{}),
	}
	s.verify = time.AfterFunc(time.Hour, func() { s.token(wokenVerify) })
	s.verify.Stop()
	s.finish = sync.OnceFunc(func() { close(s.end) })
	s.rescan.init(s)
	made := false
	defer func() {
		if !made { // by an error, or a panic of the filter
			s.release()
			s.waiters.Wait()
		}
	}()
	if err := s.mark(); err != nil {
		return nil, err
	}
	if s.reader.Namespace == 0 {
		fd, err := target.open()
		if err != nil {
			return nil, err
		}
		s.waiting = poller.Own(fd)
		if err := s.waker.add(fd, unix.EPOLLPRI); err != nil {
			return nil, target.failed(err)
		}
	}
	s.waker.start(func() { s.token(wokenTable) }, s.fail)
	if err := s.readTable(ctx); err != nil {
		return nil, err
	}
	if s.reader.Namespace != 0 {
		s.rescan.plan.periodic = true
		s.rescan.plan.hidden(time.Now())
	}
	s.watchEnd()
	made = true
	return s, nil
}

// mark makes the group, and lets it watch the namespace.
func (s *fanotifySource) mark() error {
	namespace, err := s.target.openNamespace()
	if err != nil {
		return err
	}
	defer unix.Close(namespace) // the mark does not keep the namespace alive
	switch s.reader.Namespace, err = foreignNamespace(namespace); {
	case errors.Is(err, unix.ENOTTY):
		return s.unsupported("ioctl", unix.ENOSYS)
	case err != nil:
		return s.target.failed(err)
	}
	const flags = unix.FAN_CLASS_NOTIF | unix.FAN_REPORT_MNT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK
	group, err := initGroup(flags, 0)
	if err != nil {
		return s.unsupported("fanotify_init", err)
	}
	s.group = poller.Own(group)
	err = unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_MNTNS, unix.FAN_MNT_ATTACH|unix.FAN_MNT_DETACH, namespace, "")
	if err != nil {
		return s.unsupported("fanotify_mark", err)
	}
	if s.waker, err = newMountWaker(); err == nil {
		err = s.waker.add(group, unix.EPOLLIN)
	}
	if err != nil {
		return s.target.failed(err)
	}
	return nil
}

// unsupported returns the error of a call that this path needs.
func (s *fanotifySource) unsupported(call string, errno error) error {
	err := errno
	if _, wrapped := errors.AsType[*os.SyscallError](err); !wrapped {
		err = os.NewSyscallError(call, errno)
	}
	switch {
	case errors.Is(errno, unix.EPERM) && call == "fanotify_mark":
		err = fmt.Errorf("%w: it needs CAP_SYS_ADMIN in the user namespace that owns the mount namespace, and before Linux 6.16 in the initial one", err)
	case errors.Is(errno, unix.EINVAL), errors.Is(errno, unix.ENOSYS), errors.Is(errno, unix.EPERM) && call == "fanotify_init":
		// A kernel that does not know the flag may look at the privilege first.
		err = fmt.Errorf("%w: it needs Linux 6.15: %w", err, errors.ErrUnsupported)
	case !errors.Is(errno, unix.EMFILE) && !errors.Is(errno, unix.EPERM):
		return s.target.failed(err)
	case call == "fanotify_init":
		err = fmt.Errorf("%w: the user has as many fanotify groups as /proc/sys/fs/fanotify/max_user_groups allows, or the process as many descriptors as it may", err)
	}
	return mountError(call, s.target.name, err)
}

// readTable fills the tree, and makes sure that it is the table that was asked
// for: the kernel names paths relative to its own choice of a root directory.
func (s *fanotifySource) readTable(ctx context.Context) error {
	if err := s.probe(); err != nil {
		return err
	}
	var ignored mountDelta
	for range reopenTries { // the process may be changing its root
		s.all = true
		var err error
		if s.root, err = rootAt(unix.AT_FDCWD, "/"); err != nil {
			return s.target.failed(err)
		}
		if err := s.drain(); err != nil {
			return err
		}
		if err := s.settle(ctx, &ignored); err != nil {
			return err
		}
		if err = s.checkRoot(); err == nil || !s.pending() {
			return err
		}
	}
	return errOtherRoot(s.target)
}

// probe makes the system calls that will be needed.
func (s *fanotifySource) probe() error {
	ids, err := s.reader.List(nil)
	if err != nil {
		return s.unsupported("listmount", err)
	}
	var m statmount.Mount
	for _, id := range ids {
		err := s.reader.Stat(id, statmount.SupportedMask, &m)
		switch {
		case errors.Is(err, unix.ENOENT):
			continue
		case err != nil:
			return s.unsupported("statmount", err)
		case m.Supported&statmount.Row != statmount.Row:
			return s.unsupported("statmount", unix.ENOSYS)
		}
		break
	}
	return nil
}

// pending tells whether there are events.
func (s *fanotifySource) pending() bool {
	fds := []unix.PollFd{{Fd: int32(s.group.FD()), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n > 0
}

// checkRoot tells whether the paths of the tree are those that mountinfo would
// show.
func (s *fanotifySource) checkRoot() error {
	if s.target.own {
		return nil
	}
	if s.target.proc != nil {
		root, err := rootAt(s.target.proc.FD(), "root")
		switch {
		case err != nil:
			return s.target.failed(err)
		case s.reader.Namespace == 0 && root != s.root, s.reader.Namespace != 0 && !s.isTop(root):
			return errOtherRoot(s.target)
		}
		return nil
	}
	// Who enters a namespace gets what is uppermost on its root.
	if s.reader.Namespace == 0 && !s.isTop(s.root) {
		return errOtherRoot(s.target)
	}
	roots := 0
	for _, n := range s.tree.nodes {
		if n.mount != nil && n.mount.MountPoint == "/" {
			roots++
		}
	}
	if roots != 1 {
		return errOtherRoot(s.target)
	}
	return nil
}

// isTop tells whether a root directory is that of the namespace: the root of the
// mount that is mounted on the one from which all began.
func (s *fanotifySource) isTop(root mountRoot) bool {
	n := s.tree.known(root.mount)
	if n == nil || !root.ofMount || n.mount.MountPoint != "/" {
		return false
	}
	var base statmount.Mount
	if err := s.reader.Stat(n.mount.ParentID, statmount.MountBasic, &base); err != nil {
		return false
	}
	return base.ID == base.ParentID
}

func errOtherRoot(t *mountTarget) error {
	return mountError("statmount", t.name, fmt.Errorf("the root directory is another one than the kernel would name paths from: %w", errors.ErrUnsupported))
}

// watchEnd lets the end of the process, if the table is that of one, be the end.
func (s *fanotifySource) watchEnd() {
	if s.reader.Namespace != 0 {
		s.target.leaveNamespace() // to hold it would keep it alive
	}
	if s.target.process == nil {
		return
	}
	s.waiters.Go(func() {
		err := s.target.process.Wait(pidfdExited)
		if err == nil {
			s.finish()
			return
		}
		s.fail(err)
	})
}

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
		closeGroups([]int{s.group.FD()}, func() { s.group.Close() })
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

// settle looks at the mounts that were named, and at those that they lead to.
func (s *fanotifySource) settle(ctx context.Context, d *mountDelta) error {
	if s.all {
		if err := s.touchAll(); err != nil {
			return err
		}
		s.all, s.lost = false, false
	}
	for i := 0; i < len(s.order); i++ { // it grows
		if i%cancelSteps == cancelSteps-1 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := s.lookAt(s.order[i], d); err != nil {
			return err
		}
	}
	s.order = s.order[:0]
	clear(s.touched)
	clear(s.masters)
	return nil
}

// cancelSteps is after how many system calls it is looked whether they are still
// wanted.
const cancelSteps = 64

// touchAll lets all mounts be looked at: those that there are, and those that
// there were.
func (s *fanotifySource) touchAll() error {
	ids, err := s.reader.List(nil)
	if err != nil && !s.dissolved() {
		return s.target.failed(err)
	}
	for _, id := range ids {
		s.touch(id, 0)
	}
	for id, n := range s.tree.nodes {
		if n.mount != nil {
			s.touch(id, 0)
		}
	}
	return nil
}

// lookAt asks for the state of a mount, and reports what is different.
func (s *fanotifySource) lookAt(id uint64, d *mountDelta) error {
	n, how := s.tree.known(id), s.touched[id]
	delete(s.touched, id)   // who touches it from now on wants another look
	if how&touchGone != 0 { // for good: no other mount gets its ID
		s.forget(n, d)
		return nil
	}
	m, err := s.ask(id)
	switch {
	case err != nil:
		return s.target.failed(err)
	case m == nil:
		s.touchBelow(n)
		s.forget(n, d)
		return nil
	case n != nil && n.mount.equal(m):
		if how&touchMoved != 0 { // those below may have been looked at meanwhile
			s.touchBelow(n)
		}
		return nil
	case n == nil && how&touchMoved != 0:
		s.arrived(id)
	}
	if gone := s.tree.short[m.MountInfoID]; gone != nil && gone != n {
		// The short ID was given away, so that mount is gone. The event that says
		// so is on its way, or this one was found ahead of its own.
		s.forget(gone, d)
	}
	old := shownNode(n)
	moved := n != nil && (how&touchMoved != 0 || n.mount.MountPoint != m.MountPoint)
	n, displaced := s.tree.put(m)
	n.sum, n.text = s.rescan.sum(m), s.rescan.pass
	if displaced != nil {
		s.touch(displaced.id, 0) // it is on the one that came beneath it
	}
	if moved {
		s.touchBelow(n)
	}
	n.hidden = s.filter != nil && !s.filter(m)
	d.change(id, old, shownNode(n))
	return nil
}

// arrived lets the mounts below one that came into view be looked at, of which
// nobody tells.
func (s *fanotifySource) arrived(id uint64) {
	ids, err := s.reader.Below(id, nil)
	if err != nil {
		return // it is gone again
	}
	for _, id := range ids {
		s.touch(id, 0)
	}
}

// shownNode returns the mount of a node, or nil for one that the consumer was not
// shown.
func shownNode(n *mountNode) *Mount {
	if n == nil || n.hidden {
		return nil
	}
	return n.mount
}

func (s *fanotifySource) forget(n *mountNode, d *mountDelta) {
	if n != nil {
		d.change(n.id, shownNode(n), nil)
		s.tree.remove(n)
	}
}

// touchBelow lets the mounts on n be looked at.
func (s *fanotifySource) touchBelow(n *mountNode) {
	if n == nil {
		return
	}
	for child := n.first; child != nil; child = child.right {
		s.touch(child.id, touchMoved)
	}
}

// ask returns the state of a mount, or nil if there is none that can be seen
// from the root directory.
func (s *fanotifySource) ask(id uint64) (*Mount, error) {
	var st statmount.Mount
	err := s.reader.Stat(id, statmount.Row&^statmount.PropagateFrom, &st)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EPERM) && s.reader.Namespace == 0:
		return nil, nil
	case err != nil:
		return nil, err
	case len(st.Point) == 0:
		return nil, nil
	}
	if st.Master != 0 && s.reader.Namespace == 0 { // of another, the kernel gives a wrong answer
		st.DominatingID = s.dominating(&st)
	}
	return mountOfStat(&st), nil
}

// dominating returns the peer group that a slave gets its mounts from in this
// namespace. That is the same for all slaves of one master, and to find it out
// means a walk through all peers of that: asked for each slave, a namespace of
// slaves would cost the square of its size.
func (s *fanotifySource) dominating(slave *statmount.Mount) uint64 {
	id, known := s.masters[slave.Master]
	if !known {
		var st statmount.Mount
		if s.propagation.Stat(slave.ID, statmount.PropagateFrom, &st) != nil {
			return 0 // it is gone
		}
		id = st.DominatingID
		s.masters[slave.Master] = id
	}
	return id
}

// reportAll adds the whole table to d.
func (s *fanotifySource) reportAll(d *mountDelta) {
	for id, n := range s.tree.nodes {
		d.change(id, nil, shownNode(n))
	}
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
