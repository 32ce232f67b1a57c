package main

import (
	"bytes"
	"encoding/binary"
	"iter"
	"syscall"
	"time"
)

// The layouts of include/uapi/linux/fuse.h that this file system needs, in the
// byte order of the machine. The kernel sends bodies that are long enough.

var order = binary.NativeEndian

// nameOf returns the name with a zero byte at its end that b begins with.
func nameOf(b []byte) string {
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name)
}

// struct fuse_mkdir_in: mode, umask.
func mkdirOf(b []byte) (mode uint32, name string) { return order.Uint32(b), nameOf(b[8:]) }

// struct fuse_mknod_in: mode, rdev, umask, padding.
func mknodOf(b []byte) (mode uint32, name string) { return order.Uint32(b), nameOf(b[16:]) }

// struct fuse_create_in: flags, mode, umask, open_flags.
func createOf(b []byte) (mode uint32, name string) { return order.Uint32(b[4:]), nameOf(b[16:]) }

// struct fuse_rename_in: newdir; struct fuse_rename2_in: newdir, flags, padding.
func renameOf(b []byte, second bool) (dir uint64, flags uint32, from, to string) {
	dir = order.Uint64(b)
	names := b[8:]
	if second {
		flags, names = order.Uint32(b[8:]), b[16:]
	}
	from = nameOf(names)
	return dir, flags, from, nameOf(names[len(from)+1:])
}

// struct fuse_read_in: fh, offset, size and more.
func readOf(b []byte) (offset uint64, size uint32) { return order.Uint64(b[8:]), order.Uint32(b[16:]) }

// struct fuse_write_in: fh, offset, size and more, 40 bytes; then the data.
func writeOf(b []byte) (offset uint64, data []byte) {
	return order.Uint64(b[8:]), b[40:][:order.Uint32(b[16:])]
}

// struct fuse_forget_in: nlookup.
func forgetOf(b []byte) (lookups uint64) { return order.Uint64(b) }

// struct fuse_batch_forget_in: count, dummy; then pairs of node and nlookup.
func batchForgetOf(b []byte) iter.Seq2[uint64, uint64] {
	return func(yield func(node, lookups uint64) bool) {
		for i := range int(order.Uint32(b)) {
			if one := b[8+16*i:]; !yield(order.Uint64(one), order.Uint64(one[8:])) {
				return
			}
		}
	}
}

// attrChange is what a SETATTR changes; nil and zero leave it as it is.
type attrChange struct {
	mode, uid, gid *uint32
	size           *uint64
	times          [3]time.Time
}

// struct fuse_setattr_in.
func setattrOf(b []byte) (c attrChange) {
	valid := order.Uint32(b)
	has := func(bit int) bool { return valid&(1<<bit) != 0 }
	number := func(bit, offset int) *uint32 {
		if !has(bit) {
			return nil
		}
		n := order.Uint32(b[offset:])
		return &n
	}
	c.mode, c.uid, c.gid = number(0, 68), number(1, 76), number(2, 80)
	if has(3) {
		size := order.Uint64(b[16:])
		c.size = &size
	}
	for i, f := range []struct{ set, now, seconds, nanoseconds int }{{4, 7, 32, 56}, {5, 8, 40, 60}, {10, -1, 48, 64}} {
		switch {
		case f.now > 0 && has(f.now):
			c.times[i] = time.Now()
		case has(f.set):
			c.times[i] = time.Unix(int64(order.Uint64(b[f.seconds:])), int64(order.Uint32(b[f.nanoseconds:])))
		}
	}
	return c
}

// valid is for how many seconds the kernel may believe what it is told: nobody
// else changes anything.
const valid = 3600

// appendAttr appends struct fuse_attr.
func appendAttr(b []byte, n *node) []byte {
	const blockSize = 512
	size, links := uint64(len(n.data)), n.links
	if n.isDir() {
		links = 2
	}
	for _, v := range []uint64{
		n.id, size, (size + blockSize - 1) / blockSize,
		uint64(n.times[0].Unix()), uint64(n.times[1].Unix()), uint64(n.times[2].Unix()),
	} {
		b = order.AppendUint64(b, v)
	}
	for _, v := range []uint32{
		uint32(n.times[0].Nanosecond()), uint32(n.times[1].Nanosecond()), uint32(n.times[2].Nanosecond()),
		n.mode, links, n.uid, n.gid, 0, 4096, 0,
	} {
		b = order.AppendUint32(b, v)
	}
	return b
}

// struct fuse_attr_out: attr_valid, attr_valid_nsec, dummy, attr.
func attrOut(n *node) []byte {
	b := order.AppendUint64(make([]byte, 0, 104), valid)
	return appendAttr(order.AppendUint64(b, 0), n)
}

// struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid and their
// nanoseconds, attr.
func entryOut(n *node) []byte {
	b := make([]byte, 0, 128+16)
	for _, v := range []uint64{n.id, 0, valid, valid, 0} {
		b = order.AppendUint64(b, v)
	}
	return appendAttr(b, n)
}

// struct fuse_open_out: fh, open_flags, padding.
func openOut() []byte {
	const keepCache = 2
	return order.AppendUint64(order.AppendUint64(nil, 0), keepCache)
}

// struct fuse_write_out: size, padding.
func writeOut(size int) []byte { return order.AppendUint64(nil, uint64(size)) }

// struct fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen,
// frsize, padding and spare.
func statfsOut(files int) []byte {
	b := make([]byte, 80)
	order.PutUint64(b[24:], uint64(files))
	order.PutUint32(b[40:], 4096)
	order.PutUint32(b[44:], 255)
	order.PutUint32(b[48:], 4096)
	return b
}

// direntsOut returns struct fuse_dirent of names from the offset'th on, in up to
// size bytes. "." and ".." come first.
func direntsOut(dir *node, offset, size int) (b []byte) {
	names := append([]string{".", ".."}, dir.names()...)
	for i := offset; i < len(names); i++ {
		n := dir.entries[names[i]]
		switch i {
		case 0:
			n = dir
		case 1:
			n = dir.parent
		}
		length := (24 + len(names[i]) + 7) &^ 7
		if len(b)+length > size {
			break
		}
		start := len(b)
		b = append(b, make([]byte, length)...)
		order.PutUint64(b[start:], n.id)
		order.PutUint64(b[start+8:], uint64(i+1))
		order.PutUint32(b[start+16:], uint32(len(names[i])))
		order.PutUint32(b[start+20:], n.mode&syscall.S_IFMT>>12)
		copy(b[start+24:], names[i])
	}
	return b
}
