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
	number := int(p.pid)
	stat, readable := readStat(number)
	// Asked after the read: another /proc may be mounted at any time.
	if !procIsOurs() {
		number, _ = procNumber(fd)
		stat, readable = readStat(number)
	}
	// To those who may not know the status, the kernel shows a 0.
	known := stat.ExitCode != 0 || stat.Permitted || readable && stat.State == 'Z' && mayKnow(number, stat)
	// A number that the process still has after the read was its during it.
	if after, err := pidfd.Poll(fd); err == nil && after == pidfd.Reaped {
		return after
	}
	if !readable || stat.State != 'Z' || !pidfd.HasID() && !pidfd.Unreaped(fd) {
		return state
	}
	if known {
		p.end.status, p.end.statusKnown = stat.ExitCode, true
	}
	return state
}

// mayKnow tells whether the kernel shows this process the status of a zombie, where
// stat does not tell: in its last steps it does not wait yet. A link in /proc is
// for the same readers, and that one a zombie does not have any more.
func mayKnow(pid int, stat procfs.Stat) bool {
	var name [1]byte
	_, err := unix.Readlink("/proc/"+strconv.Itoa(pid)+"/exe", name[:])
	if err != unix.ENOENT {
		return false
	}
	// Without the process there would be no link, either.
	again, ok := readStat(pid)
	return ok && again.State == 'Z' && again.StartTime == stat.StartTime
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
