package pidfd

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An Info is what PIDFD_GET_INFO tells of a process, as far as this module uses
// it (include/uapi/linux/pidfd.h, struct pidfd_info).
type Info struct {
	PID    int    // of the task that the pidfd is of, in the caller's namespace
	TGID   int    // of its process
	Status uint32 // as wait(2) gives it; valid if HasStatus

	HasPID    bool // not of a process that was reaped
	HasStatus bool // only of a process that was reaped, since Linux 6.15
}

// infoSize is that of the first version of struct pidfd_info, which every
// kernel that has it knows:
//
//	0  u64 mask       16 u32 pid     20 u32 tgid
//	8  u64 cgroupid   24 u32 ppid and eight IDs of users and groups
//	60 s32 exit_code
const infoSize = 64

// The direction bits of an ioctl differ between architectures; the size is
// where the same everywhere.
const (
	ioctlSizeShift = 16
	ioctlSizeMask  = 1<<13 - 1
	getInfo        = unix.PIDFD_GET_INFO&^(ioctlSizeMask<<ioctlSizeShift) | infoSize<<ioctlSizeShift
)

// DecodeInfo decodes a struct pidfd_info.
func DecodeInfo(b []byte) (info Info, ok bool) {
	if len(b) < infoSize {
		return Info{}, false
	}
	mask := binary.NativeEndian.Uint64(b)
	if mask&unix.PIDFD_INFO_PID != 0 {
		info.HasPID = true
		info.PID = int(binary.NativeEndian.Uint32(b[16:]))
		info.TGID = int(binary.NativeEndian.Uint32(b[20:]))
	}
	if mask&unix.PIDFD_INFO_EXIT != 0 {
		info.HasStatus = true
		info.Status = binary.NativeEndian.Uint32(b[60:])
	}
	return info, true
}

// GetInfo asks for the numbers of the process, and for its status once it was
// reaped. The error is ENOTTY or EINVAL where the kernel is older than 6.13,
// EREMOTE if the process is not in the caller's process ID namespace, and ESRCH
// if it was reaped and has no status to tell.
func GetInfo(fd int) (Info, error) {
	var b [infoSize]byte
	binary.NativeEndian.PutUint64(b[:], unix.PIDFD_INFO_PID|unix.PIDFD_INFO_EXIT)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(getInfo), uintptr(unsafe.Pointer(&b)))
	if errno != 0 {
		return Info{}, os.NewSyscallError("ioctl", errno)
	}
	info, _ := DecodeInfo(b[:])
	return info, nil
}
