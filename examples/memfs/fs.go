package main

import (
	"cmp"
	"maps"
	"slices"
	"syscall"
	"time"

	"github.com/kernstream/kernstream/fuse"
)

// A node is a file or a directory.
type node struct {
	id       uint64
	mode     uint32 // as in stat(2)
	uid, gid uint32
	times    [3]time.Time     // atime, mtime, ctime
	data     []byte           // of a file
	entries  map[string]*node // of a directory
	parent   *node            // of a directory
	links    uint32           // names that a file has
	lookups  uint64           // references that the kernel holds
}

func (n *node) isDir() bool { return n.mode&syscall.S_IFMT == syscall.S_IFDIR }

// touch sets the times of a change.
func (n *node) touch() { n.times[1], n.times[2] = time.Now(), time.Now() }

// names returns the names in a directory, in order.
func (n *node) names() []string { return slices.Sorted(maps.Keys(n.entries)) }

// memFS is the file system: all nodes that have a name or that the kernel knows.
type memFS struct {
	nodes map[uint64]*node
	last  uint64
}

const rootID = 1

func newFS(uid, gid uint32) *memFS {
	fs := &memFS{nodes: map[uint64]*node{}}
	root := fs.newNode(syscall.S_IFDIR|0o755, uid, gid)
	root.parent = root
	return fs
}

func (fs *memFS) newNode(mode, uid, gid uint32) *node {
	fs.last++
	n := &node{id: fs.last, mode: mode, uid: uid, gid: gid}
	if n.isDir() {
		n.entries = map[string]*node{}
	}
	now := time.Now()
	n.times = [3]time.Time{now, now, now}
	fs.nodes[n.id] = n
	return n
}

// drop forgets a node that has no name and that the kernel does not know.
func (fs *memFS) drop(n *node) {
	if n.links == 0 && n.lookups == 0 && n.id != rootID {
		delete(fs.nodes, n.id)
	}
}

// handle does what a request asks for, and returns the body of the answer or
// an errno.
func (fs *memFS) handle(r *fuse.Request) ([]byte, syscall.Errno) {
	switch r.Header.Opcode {
	case fuse.OpForget:
		fs.forget(r.Header.NodeID, forgetOf(r.Body))
		return nil, 0
	case fuse.OpBatchForget:
		for id, lookups := range batchForgetOf(r.Body) {
			fs.forget(id, lookups)
		}
		return nil, 0
	}
	n := fs.nodes[r.Header.NodeID]
	if n == nil {
		return nil, syscall.ESTALE
	}
	switch r.Header.Opcode {
	case fuse.OpLookup, fuse.OpMkdir, fuse.OpMknod, fuse.OpCreate, fuse.OpUnlink, fuse.OpRmdir,
		fuse.OpRename, fuse.OpRename2, fuse.OpReaddir:
		if !n.isDir() {
			return nil, syscall.ENOTDIR
		}
		return fs.handleInDir(r, n)
	case fuse.OpGetattr:
		return attrOut(n), 0
	case fuse.OpSetattr:
		return fs.setattr(n, r.Body)
	case fuse.OpOpen, fuse.OpOpendir:
		return openOut(), 0
	case fuse.OpRead:
		offset, size := readOf(r.Body)
		return n.data[min(offset, uint64(len(n.data))):min(offset+uint64(size), uint64(len(n.data)))], 0
	case fuse.OpWrite:
		return fs.write(n, r.Body)
	case fuse.OpStatfs:
		return statfsOut(len(fs.nodes)), 0
	case fuse.OpRelease, fuse.OpReleasedir, fuse.OpFlush, fuse.OpFsync, fuse.OpFsyncdir:
		return nil, 0
	}
	return nil, syscall.ENOSYS
}

// handleInDir does what is about names in the directory dir.
func (fs *memFS) handleInDir(r *fuse.Request, dir *node) ([]byte, syscall.Errno) {
	h := &r.Header
	body := r.Body[:len(r.Body)-h.ExtLen]
	switch h.Opcode {
	case fuse.OpLookup:
		return fs.lookup(dir, nameOf(body))
	case fuse.OpMkdir:
		mode, name := mkdirOf(body)
		return fs.create(dir, name, syscall.S_IFDIR|mode&0o7777, h)
	case fuse.OpMknod:
		mode, name := mknodOf(body)
		if mode&syscall.S_IFMT != syscall.S_IFREG {
			return nil, syscall.EPERM
		}
		return fs.create(dir, name, mode, h)
	case fuse.OpCreate:
		mode, name := createOf(body)
		entry, errno := fs.create(dir, name, mode, h)
		if errno != 0 {
			return nil, errno
		}
		return append(entry, openOut()...), 0
	case fuse.OpUnlink, fuse.OpRmdir:
		return nil, fs.remove(dir, nameOf(body), h.Opcode == fuse.OpRmdir)
	case fuse.OpRename, fuse.OpRename2:
		id, flags, from, to := renameOf(body, h.Opcode == fuse.OpRename2)
		return nil, fs.rename(dir, from, fs.nodes[id], to, flags)
	}
	offset, size := readOf(body)
	return direntsOut(dir, int(offset), int(size)), 0
}

func (fs *memFS) lookup(dir *node, name string) ([]byte, syscall.Errno) {
	n := dir.entries[name]
	if n == nil {
		return nil, syscall.ENOENT
	}
	n.lookups++
	return entryOut(n), 0
}

func (fs *memFS) forget(id, lookups uint64) {
	if n := fs.nodes[id]; n != nil {
		n.lookups -= min(n.lookups, lookups)
		fs.drop(n)
	}
}

func (fs *memFS) create(dir *node, name string, mode uint32, h *fuse.Header) ([]byte, syscall.Errno) {
	if dir.entries[name] != nil {
		return nil, syscall.EEXIST
	}
	if dir.links == 0 && dir.id != rootID {
		return nil, syscall.ENOENT // somebody is in a directory that was removed
	}
	n := fs.newNode(mode, h.UID, h.GID)
	n.links, n.parent, n.lookups = 1, dir, 1
	dir.entries[name] = n
	dir.touch()
	return entryOut(n), 0
}

func (fs *memFS) remove(dir *node, name string, wantDir bool) syscall.Errno {
	n := dir.entries[name]
	switch {
	case n == nil:
		return syscall.ENOENT
	case wantDir && !n.isDir():
		return syscall.ENOTDIR
	case !wantDir && n.isDir():
		return syscall.EISDIR
	case len(n.entries) > 0:
		return syscall.ENOTEMPTY
	}
	delete(dir.entries, name)
	dir.touch()
	n.links = 0
	fs.drop(n)
	return 0
}

// Flags of renameat2(2).
const (
	renameNoReplace = 1
)

func (fs *memFS) rename(from *node, oldName string, to *node, newName string, flags uint32) syscall.Errno {
	if to == nil || !to.isDir() {
		return syscall.ENOTDIR
	}
	n, replaced := from.entries[oldName], to.entries[newName]
	switch {
	case n == nil:
		return syscall.ENOENT
	case flags&^renameNoReplace != 0:
		return syscall.EINVAL
	case replaced == n:
		return 0
	case replaced != nil && flags&renameNoReplace != 0:
		return syscall.EEXIST
	case replaced != nil:
		if errno := fs.remove(to, newName, n.isDir()); errno != 0 {
			return errno
		}
	}
	delete(from.entries, oldName)
	to.entries[newName] = n
	n.parent = to
	from.touch()
	to.touch()
	return 0
}

func (fs *memFS) setattr(n *node, body []byte) ([]byte, syscall.Errno) {
	change := setattrOf(body)
	if change.size != nil {
		if n.isDir() {
			return nil, syscall.EISDIR
		}
		if errno := n.resize(*change.size); errno != 0 {
			return nil, errno
		}
	}
	if change.mode != nil {
		n.mode = n.mode&syscall.S_IFMT | *change.mode&0o7777
	}
	n.uid, n.gid = *cmp.Or(change.uid, &n.uid), *cmp.Or(change.gid, &n.gid)
	for i, t := range change.times {
		if !t.IsZero() {
			n.times[i] = t
		}
	}
	n.times[2] = time.Now()
	return attrOut(n), 0
}

// maxSize is how large a file may become.
const maxSize = 1 << 30

func (n *node) resize(size uint64) syscall.Errno {
	if size > maxSize {
		return syscall.EFBIG
	}
	if grow := int(size) - len(n.data); grow > 0 {
		n.data = append(n.data, make([]byte, grow)...)
	} else {
		clear(n.data[size:])
		n.data = n.data[:size]
	}
	n.touch()
	return 0
}

func (fs *memFS) write(n *node, body []byte) ([]byte, syscall.Errno) {
	offset, data := writeOf(body)
	end := offset + uint64(len(data))
	if end < offset || end > maxSize {
		return nil, syscall.EFBIG
	}
	if end > uint64(len(n.data)) {
		if errno := n.resize(end); errno != 0 {
			return nil, errno
		}
	}
	copy(n.data[offset:], data)
	n.touch()
	return writeOut(len(data)), 0
}
