package kernstream

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Closing the descriptors of events that nobody has.
//
// A file system may be told of each close(2), and hold that up until it has
// answered (FUSE_FLUSH). Who answers openers must not wait for it, so others close:
// one goroutine at a time, but for those that are held up.

// A fileCloser closes descriptors.
type fileCloser struct {
	closeOne  func(fd int) error
	takesLong time.Duration // then another goroutine closes what is left
	atOnce    int           // how many there are at most: each that is held up takes an OS thread
	running   sync.WaitGroup

	mu   sync.Mutex
	fds  []int
	busy bool // one closes that is not held up
	n    int  // who has not left
}

// close lets others close descriptors. It does not wait for them.
func (c *fileCloser) close(fds ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fds = append(c.fds, fds...)
	c.begin()
}

// begin lets one more goroutine close, if there is need of it. The lock is held.
func (c *fileCloser) begin() {
	if len(c.fds) == 0 || c.busy || c.n == c.atOnce {
		return
	}
	c.busy = true
	c.n++
	c.running.Go(c.run)
}

// run closes what there is, until there is no more, or it was held up.
func (c *fileCloser) run() {
	relieved := false
	relieve := func() {
		if !relieved {
			relieved, c.busy = true, false
		}
		c.begin()
	}
	timer := time.AfterFunc(c.takesLong, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		relieve()
	})
	defer timer.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.fds) > 0 && !relieved {
		last := len(c.fds) - 1
		fd := c.fds[last]
		c.fds = c.fds[:last]
		c.mu.Unlock()
		timer.Reset(c.takesLong)
		c.closeOne(fd)
		c.mu.Lock()
	}
	c.n--
	relieve()
}

// closeAll closes descriptors, and is held up as long as their file systems are.
func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
