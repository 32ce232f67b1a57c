package main

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/examples/internal/wire"
	"github.com/kernstream/kernstream/fuse"
)

// A loopback shows another directory, which nobody else changes: files and
// directories, no links.
//
// All that it knows can be found out again from the directory: nodes have the
// inode numbers of their files, there are no handles, and what is removed while the
// kernel knows it is moved to a directory that is not shown, and goes when the
// kernel forgets it. Until then, nothing else can get its number.
//
// A request that is sent again may have been carried out by a server that died
// before it could say so. The kernel lets nobody else change a directory
// meanwhile, so what is found to be done already was done by that.
type loopback struct {
	backing string

	mu    sync.Mutex
	nodes map[uint64]*node
}

// A node is where a file is.
type node struct {
	id     uint64
	parent *node // nil: the root, or a file without a name
	name   string
}

// removedDir is the directory of the files without a name, in the root.
const removedDir = ".upgrade-removed"

// valid is for how long the kernel may believe what it is told.
const valid = time.Second

func newLoopback(backing string) (*loopback, error) {
	l := &loopback{backing: backing, nodes: map[uint64]*node{}}
	if err := os.Mkdir(filepath.Join(backing, removedDir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	root := &node{id: wire.RootID}
	l.nodes[root.id] = root
	return l, l.find(root)
}

// find enters all that is in dir. A request may be about any of it.
func (l *loopback) find(dir *node) error {
	entries, err := os.ReadDir(l.path(dir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if dir.id == wire.RootID && e.Name() == removedDir {
			if err := l.findRemoved(); err != nil {
				return err
			}
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		n := l.enter(info.Sys().(*syscall.Stat_t).Ino, dir, e.Name())
		if e.IsDir() {
			if err := l.find(n); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *loopback) findRemoved() error {
	entries, err := os.ReadDir(filepath.Join(l.backing, removedDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if id, err := strconv.ParseUint(e.Name(), 10, 64); err == nil {
			l.nodes[id] = &node{id: id}
		}
	}
	return nil
}

// clean removes what the kernel cannot ask for any more.
func (l *loopback) clean() error { return os.RemoveAll(filepath.Join(l.backing, removedDir)) }

// enter notes where a file is.
func (l *loopback) enter(id uint64, parent *node, name string) *node {
	n := l.nodes[id]
	if n == nil {
		n = &node{id: id}
		l.nodes[id] = n
	}
	n.parent, n.name = parent, name
	return n
}

func (l *loopback) path(n *node) string {
	switch {
	case n.id == wire.RootID:
		return l.backing
	case n.parent == nil:
		return filepath.Join(l.backing, removedDir, strconv.FormatUint(n.id, 10))
	}
	return filepath.Join(l.path(n.parent), n.name)
}

// handle does what a request asks for, and returns the body of the answer or an
// errno.
func (l *loopback) handle(r *fuse.Request) ([]byte, syscall.Errno) {
	body, err := l.do(r, r.Body[:len(r.Body)-r.Header.ExtLen])
	if err == nil {
		return body, 0
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return nil, errno
	}
	return nil, syscall.EIO
}

func (l *loopback) do(r *fuse.Request, body []byte) ([]byte, error) {
	h := &r.Header
	switch h.Opcode {
	case fuse.OpRead, fuse.OpWrite, fuse.OpFsync:
		return l.data(h, body)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch h.Opcode {
	case fuse.OpForget:
		return nil, l.forget(h.NodeID)
	case fuse.OpBatchForget:
		for id := range wire.BatchForgetOf(body) {
			l.forget(id)
		}
		return nil, nil
	}
	n := l.nodes[h.NodeID]
	if n == nil {
		return nil, syscall.ESTALE
	}
	switch h.Opcode {
	case fuse.OpGetattr:
		return l.attrOut(n)
	case fuse.OpSetattr:
		return l.setattr(n, wire.SetattrOf(body))
	case fuse.OpOpen, fuse.OpOpendir:
		return wire.OpenOut(0), nil
	case fuse.OpReaddir:
		return l.readdir(n, body)
	case fuse.OpStatfs:
		return wire.StatfsOut(len(l.nodes)), nil
	case fuse.OpRelease, fuse.OpReleasedir, fuse.OpFlush, fuse.OpFsyncdir:
		return nil, nil
	}
	return l.doNames(h, n, body)
}

// doNames does what is about names in the directory dir.
func (l *loopback) doNames(h *fuse.Header, dir *node, body []byte) ([]byte, error) {
	resent := h.Unique>>63 == 1
	switch h.Opcode {
	case fuse.OpLookup:
		return l.entryOut(dir, wire.NameOf(body))
	case fuse.OpMkdir:
		mode, name := wire.MkdirOf(body)
		return l.make(h, dir, name, func(path string) error { return unix.Mkdir(path, mode&0o7777) }, resent)
	case fuse.OpMknod:
		mode, name := wire.MknodOf(body)
		if mode&unix.S_IFMT != unix.S_IFREG {
			return nil, syscall.EPERM
		}
		return l.make(h, dir, name, func(path string) error { return createFile(path, mode) }, resent)
	case fuse.OpCreate:
		flags, mode, name := wire.CreateOf(body)
		entry, err := l.make(h, dir, name, func(path string) error { return createFile(path, mode) }, resent || flags&unix.O_EXCL == 0)
		return append(entry, wire.OpenOut(0)...), err
	case fuse.OpUnlink, fuse.OpRmdir:
		err := l.remove(dir, wire.NameOf(body), h.Opcode == fuse.OpRmdir)
		if resent && err == unix.ENOENT {
			err = nil
		}
		return nil, err
	case fuse.OpRename, fuse.OpRename2:
		to, flags, oldName, newName := wire.RenameOf(body, h.Opcode == fuse.OpRename2)
		return nil, l.rename(dir, oldName, l.nodes[to], newName, flags, resent)
	}
	return nil, syscall.ENOSYS
}

// data does what is about the data of a file, which may be at the same time as
// other requests.
func (l *loopback) data(h *fuse.Header, body []byte) ([]byte, error) {
	flags := unix.O_RDONLY
	if h.Opcode == fuse.OpWrite {
		flags = unix.O_WRONLY
	}
	fd, err := l.open(h.NodeID, flags)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	switch h.Opcode {
	case fuse.OpRead:
		offset, size := wire.ReadOf(body)
		b := make([]byte, size)
		n, err := unix.Pread(fd, b, int64(offset))
		return b[:max(n, 0)], err
	case fuse.OpWrite:
		offset, data := wire.WriteOf(body)
		n, err := unix.Pwrite(fd, data, int64(offset))
		return wire.WriteOut(max(n, 0)), err
	}
	return nil, unix.Fsync(fd)
}

// open opens the file of a node. Its path holds only as long as the lock is held.
func (l *loopback) open(id uint64, flags int) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.nodes[id]
	if n == nil {
		return -1, syscall.ESTALE
	}
	return unix.Open(l.path(n), flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
}

func createFile(path string, mode uint32) error {
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, mode&0o7777)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// make makes something, which belongs to who asks for it. If mayExist, it may be
// there already.
func (l *loopback) make(h *fuse.Header, dir *node, name string, do func(path string) error, mayExist bool) ([]byte, error) {
	path := filepath.Join(l.path(dir), name)
	err := do(path)
	if err == nil {
		err = unix.Lchown(path, int(h.UID), int(h.GID))
	} else if err == unix.EEXIST && mayExist {
		err = nil
	}
	if err != nil {
		return nil, err
	}
	return l.entryOut(dir, name)
}

// entryOut looks a name up.
func (l *loopback) entryOut(dir *node, name string) ([]byte, error) {
	if dir.id == wire.RootID && name == removedDir {
		return nil, syscall.ENOENT
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(l.path(dir), name), &st); err != nil {
		return nil, err
	}
	return wire.EntryOut(attr(l.enter(st.Ino, dir, name), &st)), nil
}

func (l *loopback) attrOut(n *node) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Lstat(l.path(n), &st); err != nil {
		return nil, err
	}
	return wire.AttrOut(attr(n, &st)), nil
}

func attr(n *node, st *unix.Stat_t) *wire.Attr {
	at := func(t unix.Timespec) time.Time { return time.Unix(t.Unix()) }
	return &wire.Attr{
		Ino: n.id, Size: uint64(st.Size), Mode: st.Mode, Nlink: uint32(st.Nlink), UID: st.Uid, GID: st.Gid,
		Times: [3]time.Time{at(st.Atim), at(st.Mtim), at(st.Ctim)}, ValidFor: valid,
	}
}

func (l *loopback) setattr(n *node, change wire.AttrChange) ([]byte, error) {
	path := l.path(n)
	owner := func(id *uint32) int {
		if id == nil {
			return -1
		}
		return int(*id)
	}
	var errs []error
	if change.Size != nil {
		errs = append(errs, unix.Truncate(path, int64(*change.Size)))
	}
	if change.UID != nil || change.GID != nil {
		errs = append(errs, unix.Lchown(path, owner(change.UID), owner(change.GID)))
	}
	if change.Mode != nil {
		errs = append(errs, unix.Chmod(path, *change.Mode&0o7777))
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	for i := range times {
		if t := change.Times[i]; !t.IsZero() {
			times[i] = unix.NsecToTimespec(t.UnixNano())
		}
	}
	errs = append(errs, unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return l.attrOut(n)
}

func (l *loopback) readdir(n *node, body []byte) ([]byte, error) {
	entries, err := os.ReadDir(l.path(n))
	if err != nil {
		return nil, err
	}
	list := []wire.Dirent{{Ino: n.id, Mode: unix.S_IFDIR, Name: "."}, {Ino: n.id, Mode: unix.S_IFDIR, Name: ".."}}
	for _, e := range entries {
		if n.id == wire.RootID && e.Name() == removedDir {
			continue
		}
		if info, err := e.Info(); err == nil {
			st := info.Sys().(*syscall.Stat_t)
			list = append(list, wire.Dirent{Ino: st.Ino, Mode: st.Mode, Name: e.Name()})
		}
	}
	offset, size := wire.ReadOf(body)
	return wire.DirentsOut(list, int(offset), int(size)), nil
}

// remove takes the name of a file or of an empty directory away.
func (l *loopback) remove(dir *node, name string, wantDir bool) error {
	path := filepath.Join(l.path(dir), name)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	switch isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR; {
	case isDir && !wantDir:
		return syscall.EISDIR
	case !isDir && wantDir:
		return syscall.ENOTDIR
	case isDir:
		if entries, err := os.ReadDir(path); err != nil || len(entries) > 0 {
			return cmp.Or[error](err, syscall.ENOTEMPTY)
		}
	}
	n := &node{id: st.Ino}
	if err := unix.Rename(path, l.path(n)); err != nil {
		return err
	}
	l.enter(n.id, nil, "")
	return nil
}

// forget removes what has no name.
func (l *loopback) forget(id uint64) error {
	n := l.nodes[id]
	if n == nil || n.parent != nil || n.id == wire.RootID {
		return nil
	}
	delete(l.nodes, id)
	return os.Remove(l.path(n))
}

func (l *loopback) rename(from *node, oldName string, to *node, newName string, flags uint32, resent bool) error {
	if to == nil {
		return syscall.ESTALE
	}
	if flags&^unix.RENAME_NOREPLACE != 0 {
		return syscall.EINVAL
	}
	oldPath, newPath := filepath.Join(l.path(from), oldName), filepath.Join(l.path(to), newName)
	var st, replaced unix.Stat_t
	if err := unix.Lstat(oldPath, &st); err == unix.ENOENT && resent {
		return nil
	} else if err != nil {
		return err
	}
	exists := unix.Lstat(newPath, &replaced) == nil
	if exists && flags&unix.RENAME_NOREPLACE == 0 && replaced.Ino != st.Ino {
		// Somebody may have it open.
		if err := l.remove(to, newName, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
			return err
		}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, oldPath, unix.AT_FDCWD, newPath, uint(flags)); err != nil {
		return err
	}
	l.enter(st.Ino, to, newName)
	return nil
}
