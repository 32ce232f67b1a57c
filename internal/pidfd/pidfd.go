// Package pidfd asks the kernel about the process of a pidfd: what poll(2),
// fstat(2) and PIDFD_GET_INFO say, and the status of a child without reaping
// it.
//
// What needs which kernel: pidfds and poll(2) are of Linux 5.3, waitid(2) with
// P_PIDFD of 5.4. Pidfds have a file system of their own (pidfs) since 6.9; with
// it come an inode number that no other process gets until the next boot, and
// POLLHUP once the process has been reaped. PIDFD_GET_INFO is of 6.13, the exit
// status in it of 6.15.
package pidfd

import (
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A State is what poll(2) says about the process.
type State uint8

const (
	Running State = iota
	Exited        // all its threads have ended
	Reaped        // somebody has waited for it (never seen before Linux 6.9)
)

// Poll returns the state of the process.
func Poll(fd int) (State, error) {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if err := pollNow(fds[:]); err != nil {
		return Running, os.NewSyscallError("poll", err)
	}
	if fds[0].Revents&unix.POLLNVAL != 0 {
		return Running, os.NewSyscallError("poll", unix.EBADF)
	}
	return stateOf(fds[0].Revents), nil
}

// PollMany returns the states of many processes, with few system calls. One that
// cannot be told is Running.
func PollMany(fds []int32) []State {
	states := make([]State, len(fds))
	var polled [256]unix.PollFd
	for from := 0; from < len(fds); from += len(polled) {
		some := polled[:min(len(fds)-from, len(polled))]
		for i := range some {
			some[i] = unix.PollFd{Fd: fds[from+i], Events: unix.POLLIN}
		}
		err := pollNow(some)
		for i, p := range some {
			if err == nil {
				states[from+i] = stateOf(p.Revents)
				continue
			}
			// More at once than RLIMIT_NOFILE is.
			states[from+i], _ = Poll(int(p.Fd))
		}
	}
	return states
}

func pollNow(fds []unix.PollFd) error {
	for {
		if _, err := unix.Poll(fds, 0); err != unix.EINTR {
			return err
		}
	}
}

func stateOf(events int16) State {
	switch {
	case events&unix.POLLHUP != 0:
		return Reaped
	case events&unix.POLLIN != 0:
		return Exited
	}
	return Running
}

// HasID tells whether this kernel has pidfs: then [ID] names processes, and
// [Poll] sees that one was reaped.
func HasID() bool {
	switch hasID.Load() {
	case yes:
		return true
	case no:
		return false
	}
	fd, err := unix.PidfdOpen(unix.Getpid(), 0)
	if err != nil {
		// For want of a descriptor, or in a sandbox, nothing can be seen. That
		// may be otherwise the next time.
		return pidfsRelease()
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && int64(fs.Type) == unix.PID_FS_MAGIC {
		hasID.Store(yes)
		return true
	}
	hasID.Store(no)
	return false
}

// hasID is what HasID has seen.
var hasID atomic.Int32

const (
	yes = 1 + iota
	no
)

// pidfsRelease tells whether the kernel is one that has pidfs, by its number.
func pidfsRelease() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return n == 2 && (major > 6 || major == 6 && minor >= 9)
}

// ID returns the inode number of the pidfd, which no other process has had or
// will have since the boot. It means that only if [HasID].
func ID(fd int) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	return stat.Ino, nil
}

// Unreaped tells whether the process still has its number: it runs, or is a
// zombie. It works on every kernel.
func Unreaped(fd int) bool {
	// A signal that may not be sent has found its process.
	err := unix.PidfdSendSignal(fd, 0, nil, 0)
	return err == nil || err == unix.EPERM
}
