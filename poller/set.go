package poller

import (
	"cmp"
	"context"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A Set waits for many descriptors with one goroutine, the one in [Set.Wait].
// They stand behind an epoll instance of their own, which is itself one
// descriptor in the runtime's poller, so a descriptor in a Set costs no
// goroutine and no thread.
//
// Each descriptor is known by an [ID] that is never used again, so an event
// that was on its way when its descriptor was removed is not taken for one of
// a descriptor that came later. With each goes a value of the caller's.
//
// Readiness is edge-triggered: one that lasts (a pidfd of a zombie) is
// reported once, one that is there when the descriptor is added is reported
// too. A Set is not for descriptors that poll acknowledges, such as
// /proc/PID/mountinfo: the Set's own look would consume their change.
//
// The methods may be called from several goroutines, [Set.Wait] from one.
type Set[V any] struct {
	epoll *File
	epfd  int                 // that of epoll; open while the Set is not closed, which mu keeps it from
	found [64]unix.EpollEvent // of the goroutine in Wait

	mu     sync.Mutex
	closed bool
	slots  []slot[V]
	free   []uint32 // indexes of slots without a descriptor
}

// slot is the place of one descriptor. Its generation is odd while there is
// one, and grows at each coming and going.
type slot[V any] struct {
	value      V
	fd         int32
	generation uint32
}

// An ID names one descriptor of a [Set]. The zero ID names none.
type ID uint64

func newID(index, generation uint32) ID { return ID(generation)<<32 | ID(index) }

func (id ID) index() uint32      { return uint32(id) }
func (id ID) generation() uint32 { return uint32(id >> 32) }

// Ready is a descriptor that became ready.
type Ready[V any] struct {
	ID     ID     // which one it is
	Events uint32 // EPOLLIN, EPOLLHUP and so on, see epoll_ctl(2)
	Value  V      // what it was added with
}

// NewSet returns a Set without descriptors. It takes one descriptor itself; the
// errors are those of epoll_create1(2), such as EMFILE, and of [New].
func NewSet[V any]() (*Set[V], error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	epoll, err := New(fd, "epoll")
	if err != nil {
		return nil, err
	}
	return &Set[V]{epoll: epoll, epfd: fd}, nil
}

// Add takes fd into the Set, which owns it when Add returns without an error.
// events are those of epoll_ctl(2); EPOLLERR and EPOLLHUP are always reported.
// It fails with ENOSPC when /proc/sys/fs/epoll/max_user_watches is reached,
// with EPERM for a descriptor that has no readiness, with EEXIST for one that
// the Set has, and with os.ErrClosed after [Set.Close].
func (s *Set[V]) Add(fd int, events uint32, value V) (ID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, os.ErrClosed
	}
	index := uint32(len(s.slots))
	if n := len(s.free); n > 0 {
		index = s.free[n-1]
	} else {
		s.slots = append(s.slots, slot[V]{})
		s.free = append(s.free, index)
	}
	slot := &s.slots[index]
	event := unix.EpollEvent{
		Events: events | unix.EPOLLET,
		Fd:     int32(index),
		Pad:    int32(slot.generation + 1),
	}
	if err := unix.EpollCtl(s.epfd, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return 0, os.NewSyscallError("epoll_ctl", err)
	}
	s.free = s.free[:len(s.free)-1]
	slot.generation++
	slot.fd = int32(fd)
	slot.value = value
	return newID(index, slot.generation), nil
}

// lookup returns the slot of id, or nil. The caller holds s.mu.
func (s *Set[V]) lookup(id ID) *slot[V] {
	if id.generation()&1 == 0 || int64(id.index()) >= int64(len(s.slots)) {
		return nil
	}
	if slot := &s.slots[id.index()]; slot.generation == id.generation() {
		return slot
	}
	return nil
}

// Remove takes the descriptors ids out and closes them. A call of [Set.Wait]
// that starts after Remove does not report them. It returns os.ErrClosed when one
// of them is not in the Set, and does the others. The last close of a descriptor
// may take longer than all the rest, and the kernel works on several at once: who
// removes many does it from several goroutines, some tens in a call.
func (s *Set[V]) Remove(ids ...ID) error {
	var result error
	for len(ids) > 0 {
		var room [64]int
		n := min(len(ids), len(room))
		fds := s.take(ids[:n], room[:0])
		if len(fds) < n {
			result = os.ErrClosed
		}
		s.deregister(fds)
		for _, fd := range fds {
			if err := unix.Close(fd); err != nil {
				result = cmp.Or(result, os.NewSyscallError("close", err))
			}
		}
		ids = ids[n:]
	}
	return result
}

// take makes the caller the owner of the descriptors ids, and appends them to
// fds.
func (s *Set[V]) take(ids []ID, fds []int) []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		slot := s.lookup(id)
		if slot == nil {
			continue
		}
		fds = append(fds, int(slot.fd))
		var none V
		slot.value = none
		slot.generation++
		s.free = append(s.free, id.index())
	}
	return fds
}

// deregister takes fds out of the epoll instance. Closing alone would leave the
// registrations in place, and firing, for as long as somebody holds a duplicate.
func (s *Set[V]) deregister(fds []int) {
	epfd, ok := s.epoll.Pin()
	if !ok {
		return // with the instance, the registrations are gone
	}
	defer s.epoll.Unpin()
	for _, fd := range fds {
		unix.EpollCtl(epfd, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

// Control calls use with the descriptor id, which stays open meanwhile. use
// must be quick, and must not call methods of the Set. It returns os.ErrClosed
// when id is not in the Set.
func (s *Set[V]) Control(id ID, use func(fd int)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	slot := s.lookup(id)
	if slot == nil {
		return os.ErrClosed
	}
	use(int(slot.fd))
	return nil
}

// Len returns how many descriptors the Set has.
func (s *Set[V]) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.slots) - len(s.free)
}

// Wait waits until at least one descriptor became ready, and puts those that
// did into ready, which must not be empty. It returns how many; others are
// reported by the next call. It returns os.ErrClosed after [Set.Close], and
// os.ErrDeadlineExceeded once a context given to [Set.CancelOn] is done and
// nothing more is ready.
func (s *Set[V]) Wait(ready []Ready[V]) (int, error) {
	for {
		found := s.found[:min(len(ready), len(s.found))]
		n := 0
		err := s.epoll.Wait(func(epfd int) (bool, error) {
			var err error
			for {
				if n, err = unix.EpollWait(epfd, found, 0); err != unix.EINTR {
					break
				}
			}
			return n > 0, os.NewSyscallError("epoll_wait", err)
		})
		if err != nil {
			return 0, err
		}
		if n = s.resolve(found[:n], ready); n > 0 {
			return n, nil
		}
	}
}

// resolve writes those of found that are still in the Set to ready.
func (s *Set[V]) resolve(found []unix.EpollEvent, ready []Ready[V]) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, event := range found {
		id := newID(uint32(event.Fd), uint32(event.Pad))
		if slot := s.lookup(id); slot != nil {
			ready[n] = Ready[V]{ID: id, Events: event.Events, Value: slot.value}
			n++
		}
	}
	return n
}

// CancelOn ends the waiting when ctx is done, see [File.CancelOn].
func (s *Set[V]) CancelOn(ctx context.Context) (release func()) { return s.epoll.CancelOn(ctx) }

// Close closes every descriptor of the Set and wakes [Set.Wait]. It may be
// called again.
func (s *Set[V]) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	// Without the epoll instance there are no registrations, so the others
	// need not be taken out one by one. Its Close waits for a check that
	// runs, and that one takes no lock.
	err := s.epoll.Close()
	for i := range s.slots {
		slot := &s.slots[i]
		if slot.generation&1 == 1 {
			unix.Close(int(slot.fd))
			slot.generation++
		}
	}
	s.slots, s.free = nil, nil
	return err
}
