package kernstream

import (
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Closing a fanotify group. The kernel takes its marks off at once, and then
// waits until no processor may be looking at one of them (an SRCU grace period):
// that is up to some hundredths of a second within close(2), during which the
// descriptor is gone already. Nobody has to wait for that, so it happens on the
// side.

// groupsClosing are the groups whose close(2) has not returned. They count
// towards the limit of groups until then.
var groupsClosing struct {
	mu   sync.Mutex
	done []chan struct{}
}

// closeGroup closes a group by calling end, and returns when the descriptor is
// gone.
func closeGroup(fd int, end func()) {
	done := make(chan struct{})
	g := &groupsClosing
	g.mu.Lock()
	g.done = append(g.done, done)
	g.mu.Unlock()
	go func() {
		end()
		g.mu.Lock()
		g.done = slices.DeleteFunc(g.done, func(c chan struct{}) bool { return c == done })
		g.mu.Unlock()
		close(done)
	}()
	for pause := time.Duration(0); ; pause = min(pause+time.Microsecond, 50*time.Microsecond) {
		// If another file gets the number at once, this is only slower.
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == unix.EBADF {
			return
		}
		select {
		case <-done:
			return
		case <-time.After(pause):
		}
	}
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
