package kernstream

import (
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/pidfd"
	"github.com/kernstream/kernstream/internal/procfs"
)

// How a process ended, as early as the kernel tells, and without reaping it.

// findStatus finds out the status of a process that has just ended, and returns
// its state after that.
func (p *process) findStatus(state pidfd.State) pidfd.State {
	if state == pidfd.Reaped {
		return state // findReapedStatus
	}
	fd := int(p.fd)
	// Somebody else may reap a child at any moment; it is a stranger then.
	if status, ok, err := pidfd.ChildStatus(fd); ok && err == nil {
		p.end.status, p.end.statusKnown = status, true
		return state
	}
	stat, readable := readStat(int(p.pid))
	// Asked after the read: another /proc may be mounted at any time.
	if !procIsOurs() {
		number, _ := procNumber(fd)
		stat, readable = readStat(number)
	}
	// A number that the process still has after the read was its during it.
	if after, err := pidfd.Poll(fd); err == nil && after == pidfd.Reaped {
		return after
	}
	if !readable || stat.State != 'Z' || !pidfd.HasID() && !pidfd.Unreaped(fd) {
		return state
	}
	// To those who may not know the status, the kernel shows a 0.
	if stat.ExitCode != 0 || stat.Permitted {
		p.end.status, p.end.statusKnown = stat.ExitCode, true
	}
	return state
}

// findReapedStatus asks for what the kernel keeps for the pidfds of a process
// that was reaped.
func (p *process) findReapedStatus() {
	if info, err := pidfd.GetInfo(int(p.fd)); err == nil && info.HasStatus {
		p.end.status, p.end.statusKnown = info.Status, true
	}
}

// procIsOurs tells whether /proc numbers processes as this program does.
func procIsOurs() bool {
	var name [16]byte
	n, err := unix.Readlink("/proc/self", name[:])
	if err != nil {
		return false
	}
	pid, err := strconv.Atoi(string(name[:n]))
	return err == nil && pid == unix.Getpid()
}

// readStat reads /proc/PID/stat, if pid is the number of a process.
func readStat(pid int) (procfs.Stat, bool) {
	if pid <= 0 {
		return procfs.Stat{}, false
	}
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return procfs.Stat{}, false
	}
	defer unix.Close(fd)
	// The kernel writes at most some 50 numbers of up to 20 digits.
	var text [2048]byte
	for {
		n, err := unix.Read(fd, text[:])
		switch err {
		case nil:
			return procfs.ParseStat(text[:n])
		case unix.EINTR:
		default:
			return procfs.Stat{}, false
		}
	}
}
