package main

import (
	"cmp"
	"maps"
	"slices"
	"syscall"
	"time"

	"github.com/kernstream/kernstream/examples/internal/wire"
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

// valid is for how long the kernel may believe what it is told: nobody else
// changes anything.
const valid = time.Hour

// attr returns what the kernel is told of the node.
func (n *node) attr() *wire.Attr {
	a := &wire.Attr{
		Ino: n.id, Size: uint64(len(n.data)), Mode: n.mode, Nlink: n.links,
		UID: n.uid, GID: n.gid, Times: n.times, ValidFor: valid,
	}
	if n.isDir() {
		a.Nlink = 2
	}
	return a
}

// list returns the entries of a directory, in order.
func (n *node) list() []wire.Dirent {
	list := []wire.Dirent{{Ino: n.id, Mode: n.mode, Name: "."}, {Ino: n.parent.id, Mode: n.parent.mode, Name: ".."}}
	for _, name := range slices.Sorted(maps.Keys(n.entries)) {
		entry := n.entries[name]
		list = append(list, wire.Dirent{Ino: entry.id, Mode: entry.mode, Name: name})
	}
	return list
}

// memFS is the file system: all nodes that have a name or that the kernel knows.
type memFS struct {
	nodes map[uint64]*node
	last  uint64
}

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
	if n.links == 0 && n.lookups == 0 && n.id != wire.RootID {
		delete(fs.nodes, n.id)
	}
}

// handle does what a request asks for, and returns the body of the answer or
// an errno.
func (fs *memFS) handle(r *fuse.Request) ([]byte, syscall.Errno) {
	switch r.Header.Opcode {
	case fuse.OpForget:
		fs.forget(r.Header.NodeID, wire.ForgetOf(r.Body))
		return nil, 0
	case fuse.OpBatchForget:
		for id, lookups := range wire.BatchForgetOf(r.Body) {
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
		return wire.AttrOut(n.attr()), 0
	case fuse.OpSetattr:
		return fs.setattr(n, r.Body)
	case fuse.OpOpen, fuse.OpOpendir:
		return wire.OpenOut(wire.KeepCache), 0
	case fuse.OpRead:
		offset, size := wire.ReadOf(r.Body)
		return n.data[min(offset, uint64(len(n.data))):min(offset+uint64(size), uint64(len(n.data)))], 0
	case fuse.OpWrite:
		return fs.write(n, r.Body)
	case fuse.OpStatfs:
		return wire.StatfsOut(len(fs.nodes)), 0
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
		return fs.lookup(dir, wire.NameOf(body))
	case fuse.OpMkdir:
		mode, name := wire.MkdirOf(body)
		return fs.create(dir, name, syscall.S_IFDIR|mode&0o7777, h)
	case fuse.OpMknod:
		mode, name := wire.MknodOf(body)
		if mode&syscall.S_IFMT != syscall.S_IFREG {
			return nil, syscall.EPERM
		}
		return fs.create(dir, name, mode, h)
	case fuse.OpCreate:
		_, mode, name := wire.CreateOf(body)
		entry, errno := fs.create(dir, name, mode, h)
		if errno != 0 {
			return nil, errno
		}
		return append(entry, wire.OpenOut(wire.KeepCache)...), 0
	case fuse.OpUnlink, fuse.OpRmdir:
		return nil, fs.remove(dir, wire.NameOf(body), h.Opcode == fuse.OpRmdir)
	case fuse.OpRename, fuse.OpRename2:
		id, flags, from, to := wire.RenameOf(body, h.Opcode == fuse.OpRename2)
		return nil, fs.rename(dir, from, fs.nodes[id], to, flags)
	}
	offset, size := wire.ReadOf(body)
	return wire.DirentsOut(dir.list(), int(offset), int(size)), 0
}

func (fs *memFS) lookup(dir *node, name string) ([]byte, syscall.Errno) {
	n := dir.entries[name]
	if n == nil {
		return nil, syscall.ENOENT
	}
	n.lookups++
	return wire.EntryOut(n.attr()), 0
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
	if dir.links == 0 && dir.id != wire.RootID {
		return nil, syscall.ENOENT // somebody is in a directory that was removed
	}
	n := fs.newNode(mode, h.UID, h.GID)
	n.links, n.parent, n.lookups = 1, dir, 1
	dir.entries[name] = n
	dir.touch()
	return wire.EntryOut(n.attr()), 0
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
	change := wire.SetattrOf(body)
	if change.Size != nil {
		if n.isDir() {
			return nil, syscall.EISDIR
		}
		if errno := n.resize(*change.Size); errno != 0 {
			return nil, errno
		}
	}
	if change.Mode != nil {
		n.mode = n.mode&syscall.S_IFMT | *change.Mode&0o7777
	}
	n.uid, n.gid = *cmp.Or(change.UID, &n.uid), *cmp.Or(change.GID, &n.gid)
	for i, t := range change.Times {
		if !t.IsZero() {
			n.times[i] = t
		}
	}
	n.times[2] = time.Now()
	return wire.AttrOut(n.attr()), 0
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
	offset, data := wire.WriteOf(body)
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
	return wire.WriteOut(len(data)), 0
}
