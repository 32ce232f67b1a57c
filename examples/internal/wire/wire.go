// Package wire has the layouts of include/uapi/linux/fuse.h that the examples
// need, in the byte order of the machine. The kernel sends bodies that are long
// enough.
package wire

import (
	"bytes"
	"encoding/binary"
	"iter"
	"syscall"
	"time"
)

var order = binary.NativeEndian

// RootID is the node ID of the root.
const RootID = 1

// NameOf returns the name with a zero byte at its end that b begins with.
func NameOf(b []byte) string {
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name)
}

// MkdirOf decodes struct fuse_mkdir_in: mode, umask.
func MkdirOf(b []byte) (mode uint32, name string) { return order.Uint32(b), NameOf(b[8:]) }

// MknodOf decodes struct fuse_mknod_in: mode, rdev, umask, padding.
func MknodOf(b []byte) (mode uint32, name string) { return order.Uint32(b), NameOf(b[16:]) }

// CreateOf decodes struct fuse_create_in: flags, mode, umask, open_flags.
func CreateOf(b []byte) (flags, mode uint32, name string) {
	return order.Uint32(b), order.Uint32(b[4:]), NameOf(b[16:])
}

// RenameOf decodes struct fuse_rename_in: newdir, or the second form, struct
// fuse_rename2_in: newdir, flags, padding.
func RenameOf(b []byte, second bool) (dir uint64, flags uint32, from, to string) {
	dir = order.Uint64(b)
	names := b[8:]
	if second {
		flags, names = order.Uint32(b[8:]), b[16:]
	}
	from = NameOf(names)
	return dir, flags, from, NameOf(names[len(from)+1:])
}

// ReadOf decodes struct fuse_read_in: fh, offset, size and more.
func ReadOf(b []byte) (offset uint64, size uint32) { return order.Uint64(b[8:]), order.Uint32(b[16:]) }

// WriteOf decodes struct fuse_write_in: fh, offset, size and more, 40 bytes; then
// the data.
func WriteOf(b []byte) (offset uint64, data []byte) {
	return order.Uint64(b[8:]), b[40:][:order.Uint32(b[16:])]
}

// ForgetOf decodes struct fuse_forget_in: nlookup.
func ForgetOf(b []byte) (lookups uint64) { return order.Uint64(b) }

// BatchForgetOf decodes struct fuse_batch_forget_in: count, dummy; then pairs of
// node and nlookup.
func BatchForgetOf(b []byte) iter.Seq2[uint64, uint64] {
	return func(yield func(node, lookups uint64) bool) {
		for i := range int(order.Uint32(b)) {
			if one := b[8+16*i:]; !yield(order.Uint64(one), order.Uint64(one[8:])) {
				return
			}
		}
	}
}

// AttrChange is what a SETATTR changes; nil and zero leave it as it is.
type AttrChange struct {
	Mode, UID, GID *uint32
	Size           *uint64
	Times          [3]time.Time // atime, mtime, ctime
}

// SetattrOf decodes struct fuse_setattr_in.
func SetattrOf(b []byte) (c AttrChange) {
	valid := order.Uint32(b)
	has := func(bit int) bool { return valid&(1<<bit) != 0 }
	number := func(bit, offset int) *uint32 {
		if !has(bit) {
			return nil
		}
		n := order.Uint32(b[offset:])
		return &n
	}
	c.Mode, c.UID, c.GID = number(0, 68), number(1, 76), number(2, 80)
	if has(3) {
		size := order.Uint64(b[16:])
		c.Size = &size
	}
	for i, f := range []struct{ set, now, seconds, nanoseconds int }{{4, 7, 32, 56}, {5, 8, 40, 60}, {10, -1, 48, 64}} {
		switch {
		case f.now > 0 && has(f.now):
			c.Times[i] = time.Now()
		case has(f.set):
			c.Times[i] = time.Unix(int64(order.Uint64(b[f.seconds:])), int64(order.Uint32(b[f.nanoseconds:])))
		}
	}
	return c
}

// Attr is what a file is.
type Attr struct {
	Ino, Size       uint64
	Mode            uint32 // as in stat(2)
	Nlink, UID, GID uint32
	Times           [3]time.Time  // atime, mtime, ctime
	ValidFor        time.Duration // how long the kernel may believe it
}

// append appends struct fuse_attr.
func (a *Attr) append(b []byte) []byte {
	const blockSize = 512
	for _, v := range []uint64{
		a.Ino, a.Size, (a.Size + blockSize - 1) / blockSize,
		uint64(a.Times[0].Unix()), uint64(a.Times[1].Unix()), uint64(a.Times[2].Unix()),
	} {
		b = order.AppendUint64(b, v)
	}
	for _, v := range []uint32{
		uint32(a.Times[0].Nanosecond()), uint32(a.Times[1].Nanosecond()), uint32(a.Times[2].Nanosecond()),
		a.Mode, a.Nlink, a.UID, a.GID, 0, 4096, 0,
	} {
		b = order.AppendUint32(b, v)
	}
	return b
}

// AttrOut encodes struct fuse_attr_out: attr_valid, attr_valid_nsec, dummy, attr.
func AttrOut(a *Attr) []byte {
	b := order.AppendUint64(make([]byte, 0, 104), uint64(a.ValidFor/time.Second))
	return a.append(order.AppendUint64(b, 0))
}

// EntryOut encodes struct fuse_entry_out: nodeid, generation, entry_valid,
// attr_valid and their nanoseconds, attr. The node ID is that of the file.
func EntryOut(a *Attr) []byte {
	b := make([]byte, 0, 128+16)
	valid := uint64(a.ValidFor / time.Second)
	for _, v := range []uint64{a.Ino, 0, valid, valid, 0} {
		b = order.AppendUint64(b, v)
	}
	return a.append(b)
}

// Flags of OpenOut.
const KeepCache = 2

// OpenOut encodes struct fuse_open_out: fh, open_flags, padding.
func OpenOut(flags uint32) []byte {
	return order.AppendUint64(order.AppendUint64(nil, 0), uint64(flags))
}

// WriteOut encodes struct fuse_write_out: size, padding.
func WriteOut(size int) []byte {
	return order.AppendUint32(order.AppendUint32(nil, uint32(size)), 0)
}

// StatfsOut encodes struct fuse_kstatfs: blocks, bfree, bavail, files, ffree,
// bsize, namelen, frsize, padding and spare.
func StatfsOut(files int) []byte {
	b := make([]byte, 80)
	order.PutUint64(b[24:], uint64(files))
	order.PutUint32(b[40:], 4096)
	order.PutUint32(b[44:], 255)
	order.PutUint32(b[48:], 4096)
	return b
}

// A Dirent is an entry of a directory.
type Dirent struct {
	Ino  uint64
	Mode uint32 // as in stat(2), of which the type counts
	Name string
}

// DirentsOut encodes struct fuse_dirent of the entries from the offset'th on, in
// up to size bytes.
func DirentsOut(entries []Dirent, offset, size int) (b []byte) {
	for i := offset; i < len(entries); i++ {
		e := &entries[i]
		length := (24 + len(e.Name) + 7) &^ 7
		if len(b)+length > size {
			break
		}
		start := len(b)
		b = append(b, make([]byte, length)...)
		order.PutUint64(b[start:], e.Ino)
		order.PutUint64(b[start+8:], uint64(i+1))
		order.PutUint32(b[start+16:], uint32(len(e.Name)))
		order.PutUint32(b[start+20:], e.Mode&syscall.S_IFMT>>12)
		copy(b[start+24:], e.Name)
	}
	return b
}
