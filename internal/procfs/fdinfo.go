package procfs

import (
	"bytes"
	"strconv"
)

// PidfdPID returns the process ID that /proc/self/fdinfo/FD shows for a pidfd
// (see pidfd_open(2)): the one in the process ID namespace of that /proc, which
// need not be the caller's. It is 0 for a process that is not in that namespace,
// and -1 for one that has been reaped. ok is false if the text is not a
// pidfd's.
func PidfdPID(fdinfo []byte) (pid int, ok bool) {
	for line := range lines(fdinfo) {
		value, found := bytes.CutPrefix(line, []byte("Pid:"))
		if !found {
			continue
		}
		n, err := strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 32)
		return int(n), err == nil && n >= -1
	}
	return 0, false
}
