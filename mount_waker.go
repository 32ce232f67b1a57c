package kernstream

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/poller"
)

// A mountWaker lets a goroutine be woken for a fanotify group and a mountinfo
// file: by one epoll instance, which is in the runtime's poller.
//
// In a storm the two are taken out of it for some milliseconds at a time. What
// happens meanwhile is seen together afterwards, which costs less than each by
// itself, and slows those less who mount: each wake of a thread is part of
// mount(2). An epoll instance looks at a file when that is added, so what
// happened meanwhile is not missed.
//
// It does not tell which of the two woke: for a mountinfo file it cannot. The
// runtime's look at the instance acknowledges the change.
type mountWaker struct {
	file *poller.File
	epfd int

	mu      sync.Mutex
	watched map[int]uint32 // descriptors and their events
	resting bool           // they are not in the instance

	closing chan struct{}
	waiter  sync.WaitGroup
}

const (
	stormGap  = 500 * time.Microsecond // between wakes, at most: it is a storm
	stormRest = 5 * time.Millisecond
)

func newMountWaker() (*mountWaker, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	file, err := poller.New(epfd, "epoll")
	if err != nil {
		return nil, err
	}
	return &mountWaker{file: file, epfd: epfd, watched: make(map[int]uint32), closing: make(chan struct{})}, nil
}

// add lets fd wake, too.
func (w *mountWaker) add(fd int, events uint32) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watched[fd] = events
	if w.resting {
		return nil
	}
	return w.register(fd)
}

// remove takes a descriptor out again, before it is closed.
func (w *mountWaker) remove(fd int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.watched, fd)
	if !w.resting {
		unix.EpollCtl(w.epfd, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

func (w *mountWaker) register(fd int) error {
	event := unix.EpollEvent{Events: w.watched[fd] | unix.EPOLLET, Fd: int32(fd)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(w.epfd, unix.EPOLL_CTL_ADD, fd, &event))
}

// start calls woken after each wake, and failed with the error that ends the
// waiting. What happens after start has returned is not missed.
func (w *mountWaker) start(woken func(), failed func(error)) {
	var last time.Time
	var found [2]unix.EpollEvent
	arm(&w.waiter, w.file, func() error {
		unix.EpollWait(w.epfd, found[:], 0) // what is not taken does not wake again
		woken()
		storm := time.Since(last) < stormGap
		var err error
		if storm {
			err = w.rest()
		}
		last = time.Now()
		return err
	}, failed)
}

// rest lets nothing wake for a while.
func (w *mountWaker) rest() error {
	w.mu.Lock()
	w.resting = true
	for fd := range w.watched {
		unix.EpollCtl(w.epfd, unix.EPOLL_CTL_DEL, fd, nil)
	}
	w.mu.Unlock()
	timer := time.NewTimer(stormRest)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.closing:
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.resting = false
	for fd := range w.watched {
		if err := w.register(fd); err != nil {
			return err
		}
	}
	return nil
}

// close ends the waiting. The descriptors are the caller's to close.
func (w *mountWaker) close() {
	close(w.closing)
	w.file.Close()
	w.waiter.Wait()
}
