package kernstream

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Closing a group. The kernel takes its marks off at once, and then waits until
// no processor may be looking at one of them (an SRCU grace period): that is up
// to some hundredths of a second within close(2), during which the descriptor is
// gone already. Nobody has to wait for that, so it happens on the side.

// groupsClosing are the calls of close(2) that have not returned. Their groups
// count towards the limit until then.
var groupsClosing struct {
	mu   sync.Mutex
	done []chan struct{}
}

// closeGroups calls end, which closes the descriptors fds of groups. These are gone
// when it returns; a socket is left for some microseconds.
//
// The groups go into a message on a socket first, so that end does not wait for
// the kernel. Then it is closing the socket that does, once for all of them: each
// such wait holds up one of the processors that the runtime has.
func closeGroups(fds []int, end func()) {
	if len(fds) == 0 {
		return
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		pair = [2]int{-1, -1}
	} else if err = unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fds...), nil, 0); err != nil {
		unix.Close(pair[1])
	}
	if pair[0] >= 0 {
		unix.Close(pair[0])
	}
	end()
	if err == nil {
		closeAside(pair[1])
	}
}

// closeAside closes a descriptor, on a thread that has nothing else to do. To
// wait until it has begun would cost milliseconds on a busy machine.
func closeAside(fd int) {
	done := make(chan struct{})
	g := &groupsClosing
	g.mu.Lock()
	g.done = append(g.done, done)
	g.mu.Unlock()
	go func() {
		unix.Close(fd)
		g.mu.Lock()
		g.done = slices.DeleteFunc(g.done, func(c chan struct{}) bool { return c == done })
		g.mu.Unlock()
		close(done)
	}()
}

// initGroup is fanotify_init(2). If there is no group left, it waits for those
// that are being closed.
func initGroup(flags, eventFlags uint) (int, error) {
	fd, err := unix.FanotifyInit(flags, eventFlags)
	if err != unix.EMFILE {
		return fd, err
	}
	groupsClosing.mu.Lock()
	closing := slices.Clone(groupsClosing.done)
	groupsClosing.mu.Unlock()
	for _, done := range closing {
		<-done
	}
	return unix.FanotifyInit(flags, eventFlags)
}
