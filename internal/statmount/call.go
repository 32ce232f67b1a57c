package statmount

import (
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Reader reads mounts of one namespace. Paths are relative to the root
// directory of the calling thread for its own namespace, and to the root mount
// of another. The zero Reader is of the own one.
//
// Without privilege, mounts of the own namespace that can be reached from the
// root directory may be read; everything else needs CAP_SYS_ADMIN over the
// namespace.
type Reader struct {
	Namespace uint64 // 0: the caller's
	buf       []byte
}

const (
	firstBuffer = 8 << 10
	maxBuffer   = 64 << 20 // more than any options have
)

// Stat reads the mount id. What m refers to is valid until the next call. The
// error is an *os.SyscallError (ENOENT: there is no such mount, or not any
// more), or one of [Mount.Decode].
func (r *Reader) Stat(id uint64, mask Mask, m *Mount) error {
	if r.buf == nil {
		r.buf = make([]byte, firstBuffer)
	}
	req := makeRequest(r.Namespace, id, uint64(mask))
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT,
			uintptr(unsafe.Pointer(&req)), uintptr(unsafe.Pointer(&r.buf[0])), uintptr(len(r.buf)), 0, 0, 0)
		switch {
		case errno == 0:
			return m.Decode(r.buf)
		case errno == unix.EINTR:
		case errno == unix.EOVERFLOW && len(r.buf) < maxBuffer:
			r.buf = make([]byte, 2*len(r.buf))
		default:
			return os.NewSyscallError("statmount", errno)
		}
	}
}

// maxList is how many IDs listmount(2) gives at once.
const maxList = 1_000_000

// List returns the unique IDs of all mounts of the namespace that can be reached
// from the root directory, in the order of their creation, which is that of
// mountinfo. They are of one moment, as long as there are no more than a
// million. It overwrites ids, for its memory.
func (r *Reader) List(ids []uint64) ([]uint64, error) {
	ids = slices.Grow(ids[:0], 64)
	for after := uint64(0); ; {
		room := ids[len(ids):cap(ids)]
		room = room[:min(len(room), maxList)]
		n, err := r.list(after, room)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return ids[:0], os.NewSyscallError("listmount", err)
		case n < len(room):
			return ids[:len(ids)+n], nil
		case n == maxList:
			ids = slices.Grow(ids[:len(ids)+n], maxList)
			after = ids[len(ids)-1]
		default:
			// The room was too small, and what is in it is of this moment
			// alone.
			ids = make([]uint64, 0, 2*cap(ids))
		}
	}
}

// list asks for mounts after the given one, and tells how many it got.
func (r *Reader) list(after uint64, ids []uint64) (int, error) {
	const root = ^uint64(0) // LSMT_ROOT
	req := makeRequest(r.Namespace, root, after)
	n, _, errno := unix.Syscall6(unix.SYS_LISTMOUNT,
		uintptr(unsafe.Pointer(&req)), uintptr(unsafe.Pointer(&ids[0])), uintptr(len(ids)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Any waits until nobody is changing the mount table, and tells whether it can
// be listed at all.
func (r *Reader) Any() error {
	var ids [1]uint64
	if _, err := r.list(0, ids[:]); err != nil {
		return os.NewSyscallError("listmount", err)
	}
	return nil
}
