package pidfd

import (
	"encoding/binary"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfoSize is that of siginfo_t (SI_MAX_SIZE).
const siginfoSize = 128

// A layout says where the fields of siginfo_t for SIGCHLD stand: signo, errno
// and code, and from the alignment of a pointer on pid, uid and status.
type layout struct{ code, pid, status int }

// siginfoLayout is the one of this architecture. MIPS has code before errno.
func siginfoLayout() layout {
	l := layout{code: 8, pid: 12, status: 20}
	if unsafe.Sizeof(uintptr(0)) == 8 {
		l.pid, l.status = 16, 24
	}
	if strings.HasPrefix(runtime.GOARCH, "mips") {
		l.code = 4
	}
	return l
}

// The codes of SIGCHLD (see sigaction(2)).
const (
	codeExited = 1
	codeKilled = 2
	codeDumped = 3
)

// decodeSiginfo returns the status in the form of wait(2). ok is false if
// waitid(2) found no child whose status it can tell.
func decodeSiginfo(b []byte, l layout) (status uint32, ok bool) {
	field := func(offset int) uint32 { return binary.NativeEndian.Uint32(b[offset:]) }
	if field(l.pid) == 0 {
		return 0, false
	}
	value := field(l.status)
	switch field(l.code) {
	case codeExited:
		return value & 0xff << 8, true
	case codeKilled:
		return value & 0x7f, true
	case codeDumped:
		return value&0x7f | 0x80, true
	}
	return 0, false
}

// ChildStatus returns the status of a process that has ended, in the form of
// wait(2), without reaping it. ok is false if it is no child of the caller or
// its status cannot be had yet, because somebody else traces it.
func ChildStatus(fd int) (status uint32, ok bool, err error) {
	// One long keeps the alignment of the kernel's type.
	var info [siginfoSize / 8]uint64
	for {
		// WALL: a child need not have been made with SIGCHLD (see clone(2)).
		err := unix.Waitid(unix.P_PIDFD, fd, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil)
		switch err {
		case nil:
			b := unsafe.Slice((*byte)(unsafe.Pointer(&info)), siginfoSize)
			status, ok = decodeSiginfo(b, siginfoLayout())
			return status, ok, nil
		case unix.EINTR:
		case unix.ECHILD:
			return 0, false, nil
		default:
			return 0, false, os.NewSyscallError("waitid", err)
		}
	}
}
