// Package fangroup makes and closes fanotify groups.
//
// To close one takes the kernel long: it takes the marks off at once, and then waits until
// no processor may be looking at one of them (an SRCU grace period), which is up
// to some hundredths of a second within the last close(2). Nobody has to wait for
// that, so the kernel's collector of sockets is left to do it.
package fangroup

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// closed is when groups were closed last, in Unix nanoseconds. They count
// towards the limit until the kernel is through with them.
var closed atomic.Int64

// linger is how long that may take, while others close groups, too: the kernel gets rid of about a
// hundred in a second.
const linger = time.Second

// Close calls end, which closes the descriptors fds of groups. These are gone
// when it returns.
//
// The groups go into a message to a socket first, so that end does not wait for the
// kernel. The message holds the socket that it is sent to, too, so that nothing
// but the kernel's garbage collector (unix(7)) can get at it once all are closed;
// newer kernels run that on a thread of their own.
func Close(fds []int, end func()) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		// If this fails, the last close is in end, which takes longer.
		unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(append(fds, pair[1])...), nil, 0)
	}
	end()
	if err == nil {
		unix.Close(pair[1])
		unix.Close(pair[0]) // sets the collector off
	}
	closed.Store(time.Now().UnixNano())
}

// Init is fanotify_init(2). If there is no group left, it waits for those
// that were closed just before.
func Init(flags, eventFlags uint) (int, error) {
	for {
		fd, err := unix.FanotifyInit(flags, eventFlags)
		if err != unix.EMFILE || time.Since(time.Unix(0, closed.Load())) > linger {
			return fd, err
		}
		time.Sleep(time.Millisecond)
	}
}
