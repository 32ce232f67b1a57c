package testenv

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Refusal is what [Refuse] refuses: a system call, or only those calls of it
// in which an argument has a certain value in its lower 32 bits.
type Refusal struct {
	Call     int // SYS_IOCTL
	Argument int // which one, from 1 on; 0: whatever they are
	Value    uint32
}

// Refuse lets system calls of this process fail with errno from now on, without
// being made, as a sandbox does by seccomp(2). It cannot be undone, so it is for
// a [Child]; what that starts has the same fate.
func Refuse(errno syscall.Errno, refusals ...Refusal) error {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equals = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		result = unix.BPF_RET | unix.BPF_K
	)
	// struct seccomp_data: the number of the call, the architecture, the
	// instruction pointer, and six arguments of 8 bytes each.
	const arguments = 16
	refuse := unix.SockFilter{Code: result, K: unix.SECCOMP_RET_ERRNO | uint32(errno)}
	var filter []unix.SockFilter
	for _, r := range refusals {
		filter = append(filter, unix.SockFilter{Code: load, K: 0})
		if r.Argument == 0 {
			filter = append(filter, unix.SockFilter{Code: equals, K: uint32(r.Call), Jf: 1}, refuse)
			continue
		}
		filter = append(filter,
			unix.SockFilter{Code: equals, K: uint32(r.Call), Jf: 3},
			unix.SockFilter{Code: load, K: arguments + 8*uint32(r.Argument-1)},
			unix.SockFilter{Code: equals, K: r.Value, Jf: 1},
			refuse)
	}
	filter = append(filter, unix.SockFilter{Code: result, K: unix.SECCOMP_RET_ALLOW})

	// Whoever lacks CAP_SYS_ADMIN must give up that others lend him theirs.
	// The filter is for all threads, and takes that with it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, failed := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if failed != 0 {
		return os.NewSyscallError("seccomp", failed)
	}
	return nil
}
