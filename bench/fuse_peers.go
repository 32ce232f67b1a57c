package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// attrValid is for how many seconds the root's attributes stay valid.
const attrValid = 1 << 30

// rootAttr is the answer to GETATTR of the root, struct fuse_attr_out.
var rootAttr = func() []byte {
	b := make([]byte, 104)
	binary.NativeEndian.PutUint64(b, attrValid)
	binary.NativeEndian.PutUint64(b[16:], 1)
	binary.NativeEndian.PutUint32(b[16+60:], unix.S_IFDIR|0o755)
	binary.NativeEndian.PutUint32(b[16+64:], 2)
	return b
}()

// rawStat asks for a file that is not there. It does not tell the scheduler,
// which would take longer than the question; clients have a processor for each
// thread.
func rawStat(dir, thread int) syscall.Errno {
	var st unix.Stat_t
	name := [3]byte{'x', byte('0' + thread%10)}
	_, _, errno := syscall.RawSyscall6(unix.SYS_NEWFSTATAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(&st)), 0, 0, 0)
	return errno
}

// rawRead reads from the start of a file, in the same way.
func rawRead(fd int, p []byte) int {
	n, _, _ := syscall.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), 0, 0, 0)
	return int(n)
}

// emptyFS is the peer's file system with nothing in it.
type emptyFS struct{ gofuse.RawFileSystem }

func (emptyFS) Lookup(<-chan struct{}, *gofuse.InHeader, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.ENOENT
}

func (emptyFS) GetAttr(_ <-chan struct{}, _ *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	out.AttrValid = attrValid
	out.Ino, out.Mode, out.Nlink = 1, unix.S_IFDIR|0o755, 2
	return gofuse.OK
}

func serveGoFuse(fill bool) func(dir string, done <-chan struct{}) error {
	return func(dir string, done <-chan struct{}) error {
		server, err := gofuse.NewServer(newDataFS(fill), dir, &gofuse.MountOptions{
			DirectMountStrict: true, MaxWrite: dataSize, Options: []string{"default_permissions"},
		})
		if err != nil {
			return err
		}
		fuseDone(dir, done)
		server.Serve()
		return nil
	}
}

// serveBlocking is the floor: read, write, and nothing else.
func serveBlocking(dir string, done <-chan struct{}) error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,default_permissions", fd, os.Geteuid(), os.Getegid())
	if err := unix.Mount("floor", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return os.NewSyscallError("mount", err)
	}
	fuseDone(dir, done)
	const (
		opGetattr = 3
		opForget  = 2
		opInit    = 26
		opBatch   = 42
		maxWrite  = 128 << 10
	)
	init := make([]byte, 64)
	binary.NativeEndian.PutUint32(init, 7)
	binary.NativeEndian.PutUint32(init[4:], 31)
	binary.NativeEndian.PutUint32(init[8:], maxWrite)
	binary.NativeEndian.PutUint32(init[12:], 1<<0|1<<5|1<<18) // as the others
	binary.NativeEndian.PutUint32(init[20:], maxWrite)
	in, out := make([]byte, maxWrite+4096), make([]byte, 0, 256)
	for {
		n, err := unix.Read(fd, in)
		switch {
		case err == unix.ENODEV:
			return nil
		case err == unix.EINTR || err == unix.ENOENT:
			continue
		case err != nil:
			return os.NewSyscallError("read", err)
		}
		_ = n
		errno, body := int32(unix.ENOENT), []byte(nil)
		switch binary.NativeEndian.Uint32(in[4:]) {
		case opForget, opBatch:
			continue
		case opInit:
			errno, body = 0, init
		case opGetattr:
			errno, body = 0, rootAttr
		}
		out = binary.NativeEndian.AppendUint32(out[:0], uint32(16+len(body)))
		out = binary.NativeEndian.AppendUint32(out, uint32(-errno))
		out = append(append(out, in[8:16]...), body...)
		if _, err := unix.Write(fd, out); err != nil && err != unix.ENOENT {
			return os.NewSyscallError("write", err)
		}
	}
}
