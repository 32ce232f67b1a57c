package kernstream

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/statmount"
)

// How the fanotify path finds out what is different about the mounts that it was
// told of, and which others that concerns.

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
