package kernstream

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/poller"
)

// From what the kernel tells of a file to its path.
//
// A group with handles names a directory by its file handle, which is opened
// through a descriptor of any file on a mount of the same file system
// (open_by_handle_at(2)); the path is then what /proc/self/fd shows. That takes
// microseconds, so paths of directories are kept. They go stale when a directory
// above is renamed, which a second group tells: see quietGroup.
//
// Where handles cannot be opened (no privilege, or a file system without), the
// directories that are marked are known by their paths, and such a path is
// used after name_to_handle_at(2) has shown that it still leads there.

// fileSystems is what a watcher knows about the file systems with its marks. The
// groups' readers share it with Mark and Unmark.
type fileSystems struct {
	links *poller.Descriptor // /proc/self/fd

	mu      sync.Mutex
	byID    map[fsID]*fileSystem
	left    map[fsID]*fileSystem // let go of, but not forgotten
	changes uint64               // grows when what was resolved may be wrong
	quiet   *quietGroup          // nil: not needed yet, or not to be had
	noQuiet bool                 // it cannot be had

	// A file system without marks is let go of when its last event was
	// delivered: nobody has one in hand, and the queue is empty.
	reading int         // how many readers have events in hand
	queued  func() bool // whether there are events with handles
}

// A fileSystem is one of them.
type fileSystem struct {
	roots  []*fileRoot       // where handles can be opened, the marked mounts first
	closed []*fileRoot       // the roots of one that was let go of
	since  time.Time         // it was let go of
	told   bool              // the quiet group tells of its directories' renames
	tried  map[uint64]bool   // mounts that were opened for that, whatever came of it: opening makes events
	known  map[string]string // the paths of what is marked, by key
	marks  int               // how many marks of the watcher are on it
	handle int               // the flag for name_to_handle_at
}

// A fileRoot is an open file on a mount. It keeps the mount busy.
type fileRoot struct {
	file    *poller.Descriptor
	mountID uint64
	path    string
	foreign bool // no mount of this mount namespace
}

// A foundPath is the path of a directory or file.
type foundPath struct {
	path  string
	state PathState
	err   error

	told  bool   // a change of it is told
	batch uint64 // in which it was looked up or checked
}

const deletedSuffix = " (deleted)"

func newFileSystems() (*fileSystems, error) {
	fd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		err := os.NewSyscallError("open", err)
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: is /proc mounted?", err)
		}
		return nil, fileError("open", "/proc/self/fd", err)
	}
	return &fileSystems{links: poller.Own(fd), byID: map[fsID]*fileSystem{}, left: map[fsID]*fileSystem{}}, nil
}

// close lets go of everything but the quiet group, which it returns.
func (s *fileSystems) close() *poller.Descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, system := range s.byID {
		system.closeRoots()
	}
	s.links.Close()
	if s.quiet == nil {
		return nil
	}
	return s.quiet.file
}

func (f *fileSystem) closeRoots() {
	for _, root := range f.roots {
		root.file.Close()
	}
	f.roots = nil
}

// readlink returns the path that /proc shows for a descriptor.
func (s *fileSystems) readlink(fd int) (string, error) {
	var number [12]byte
	var buf [unix.PathMax]byte
	name := strconv.AppendInt(number[:0], int64(fd), 10)
	n, err := unix.Readlinkat(s.links.FD(), string(name), buf[:])
	if err != nil {
		return "", os.NewSyscallError("readlinkat", err)
	}
	return string(buf[:n]), nil
}

// describe returns the path of an open file, and what it is worth. ours tells
// whether a mount is of this namespace.
func (s *fileSystems) describe(fd int, ours func(fd int, mountID uint64, path string) bool) foundPath {
	path, err := s.readlink(fd)
	if err != nil {
		return foundPath{err: err}
	}
	var st unix.Statx_t
	if err := statx(fd, &st); err != nil {
		return foundPath{err: err}
	}
	found := foundPath{path: path, state: PathExact}
	switch {
	case !strings.HasPrefix(path, "/"):
		found.state = PathUnknown // no file system shows it
	case strings.HasSuffix(path, deletedSuffix) && deleted(&st, path):
		found.path, found.state = strings.TrimSuffix(path, deletedSuffix), PathDeleted
	case path == "/" && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 && !sameFile(&st, "/"):
		// Above the root of the mount the kernel shows nothing.
		found.path, found.state = "", PathOutside
	}
	if (found.state == PathExact || found.state == PathDeleted) && !ours(fd, st.Mnt_id, path) {
		found.state = PathOtherNamespace
	}
	return found
}

// deleted tells whether the suffix of path means that the file is gone: it may
// be a part of its name.
func deleted(st *unix.Statx_t, path string) bool {
	return st.Nlink == 0 || !sameFile(st, path)
}

// sameFile tells whether path leads to the file of st.
func sameFile(st *unix.Statx_t, path string) bool {
	var other unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_INO|unix.STATX_MNT_ID, &other)
	return err == nil && other.Ino == st.Ino && other.Mnt_id == st.Mnt_id &&
		other.Dev_major == st.Dev_major && other.Dev_minor == st.Dev_minor
}

func statx(fd int, st *unix.Statx_t) error {
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC,
		unix.STATX_INO|unix.STATX_NLINK|unix.STATX_MODE|unix.STATX_MNT_ID, st)
	return os.NewSyscallError("statx", err)
}

// ourMount tells whether the mount that the open file fd keeps alive is in the
// mount namespace of this process, where path may lead to it.
func ourMount(fd int, mountID uint64, path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st)
	if err == nil && st.Mnt_id == mountID {
		return true
	}
	found := false
	eachMount(func(m *procfs.MountInfo) bool {
		found = uint64(m.ID) == mountID
		return !found
	})
	return found
}

// eachMount calls use with each row of the caller's mount table until it
// returns false.
func eachMount(use func(*procfs.MountInfo) bool) error {
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	var parser procfs.MountInfoParser
	err = procfs.ReadRows(fd, nil, func(row []byte) error {
		if m, err := parser.Parse(string(row)); err == nil && !use(&m) {
			return errEnough
		}
		return nil
	})
	if err == errEnough {
		return nil
	}
	return err
}

var errEnough = errors.New("enough rows")

// A pathCache is the paths that one reader has found, by key.
type pathCache struct {
	systems *fileSystems
	mounts  *poller.Descriptor // mountinfo, for its poll(2); nil: not to be had
	found   map[string]*foundPath
	old     map[string]*foundPath // what was dropped last: of directories that are deleted by now
	ours    map[uint64]bool       // which mounts are of this namespace
	changes uint64                // of the file systems, when the cache was valid
	batch   uint64

	lastKey []byte // a shortcut: many events of one directory follow each other
	last    *foundPath
}

// cacheLimit bounds the memory of a cache, at some 200 bytes for each.
const cacheLimit = 1 << 16

func newPathCache(systems *fileSystems) *pathCache {
	c := &pathCache{systems: systems, found: map[string]*foundPath{}, old: map[string]*foundPath{}, ours: map[uint64]bool{}}
	if fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		c.mounts = poller.Own(fd)
	}
	return c
}

func (c *pathCache) close() {
	if c.mounts != nil {
		c.mounts.Close()
	}
}

func (c *pathCache) drop() {
	if len(c.found) > 0 {
		c.found, c.old = c.old, c.found
		clear(c.found)
	}
	c.last = nil
}

// begin prepares for a batch of events that has been read. What is in the
// queue was preceded by all that is behind the events: a directory that was
// renamed before one of them is in the quiet group by now.
func (c *pathCache) begin() {
	c.batch++
	moved := c.mounts == nil
	if !moved {
		changed, err := procfs.MountsChanged(c.mounts.FD())
		moved = changed || err != nil
	}
	if moved {
		clear(c.ours)
	}
	s := c.systems
	s.mu.Lock()
	if s.quiet != nil && s.quiet.drain() {
		s.changes++
	}
	s.followRoots(moved)
	changes := s.changes
	s.mu.Unlock()
	if moved || changes != c.changes || len(c.found) > cacheLimit {
		c.drop()
	}
	c.changes = changes
}

// followRoots looks where the marked mounts are. A directory above a mount
// point may be renamed on a file system without a mark.
func (s *fileSystems) followRoots(moved bool) {
	for _, system := range s.byID {
		for _, root := range system.roots {
			path, err := s.readlink(root.file.FD())
			if err != nil || path != root.path || moved {
				foreign := !ourMount(root.file.FD(), root.mountID, path)
				if path != root.path || foreign != root.foreign {
					s.changes++
				}
				root.path, root.foreign = path, foreign
			}
		}
	}
}

// directory returns the path of the directory with the key.
func (c *pathCache) directory(key []byte) *foundPath {
	if c.last == nil || !bytes.Equal(c.lastKey, key) {
		c.last = c.found[string(key)]
		c.lastKey = append(c.lastKey[:0], key...)
	}
	if c.last == nil || !c.last.told && c.last.batch != c.batch {
		c.last = c.look(key)
	}
	return c.last
}

// look finds the path of a directory that is not known, or may have changed.
func (c *pathCache) look(key []byte) *foundPath {
	s := c.systems
	s.mu.Lock()
	defer s.mu.Unlock()
	system := s.system(fsID(key[:len(fsID{})]))
	if known := c.found[string(key)]; known != nil && known.state == PathExact && system != nil && system.leads(known.path, key) {
		known.batch = c.batch
		return known
	}
	found := s.find(system, key, unix.O_DIRECTORY)
	found.batch = c.batch
	if old := c.old[string(key)]; found.state == PathDeleted && found.path == "" && old != nil {
		found.path = old.path
	}
	if found.err == nil {
		c.found[string(key)] = &found
	}
	return &found
}

// file returns the path of the file with the key, which no directory names.
func (c *pathCache) file(key []byte) foundPath {
	s := c.systems
	s.mu.Lock()
	defer s.mu.Unlock()
	system := s.system(fsID(key[:len(fsID{})]))
	found := s.find(system, key, 0)
	if found.path == "" && system != nil {
		found.path = system.known[string(key)] // of old
	}
	return found
}

// open returns the path of an open file.
func (c *pathCache) open(fd int) foundPath {
	return c.systems.describe(fd, func(fd int, mountID uint64, path string) bool {
		ours, known := c.ours[mountID]
		if !known {
			ours = ourMount(fd, mountID, path)
			c.ours[mountID] = ours
		}
		return ours
	})
}

// find opens the handle in a key and looks where it is; flags are for open.
func (s *fileSystems) find(system *fileSystem, key []byte, flags int) foundPath {
	if system == nil {
		return foundPath{}
	}
	id := fanotify.FID{Key: key}
	found := foundPath{}
	for _, root := range system.roots {
		fd, err := unix.OpenByHandleAt(root.file.FD(), unix.NewFileHandle(id.HandleType(), id.Handle()), unix.O_PATH|unix.O_CLOEXEC|flags)
		switch {
		case err == unix.ESTALE:
			return foundPath{path: system.known[string(key)], state: PathDeleted, told: system.told}
		case err == unix.EPERM:
			continue // in a user namespace, handles of directories alone
		case err != nil:
			return foundPath{err: os.NewSyscallError("open_by_handle_at", err)}
		}
		found = s.describe(fd, func(int, uint64, string) bool { return !root.foreign })
		unix.Close(fd)
		found.told = system.told
		if found.state != PathOutside {
			return found
		}
	}
	if system.roots == nil {
		if path, ok := system.known[string(key)]; ok && system.leads(path, key) {
			return foundPath{path: path, state: PathExact}
		}
	}
	return found
}

// leads tells whether path leads to what has the key.
func (f *fileSystem) leads(path string, key []byte) bool {
	got, err := keyOf(unix.AT_FDCWD, path, f.handle)
	return err == nil && got == string(key)
}

// keyOf returns the key that a file has in events: the ID of its file system,
// and its handle. An empty path is dir itself.
func keyOf(dir int, path string, flags int) (string, error) {
	var fsid unix.Statfs_t
	var err error
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
		err = unix.Fstatfs(dir, &fsid)
	} else {
		err = unix.Statfs(path, &fsid)
	}
	if err != nil {
		return "", os.NewSyscallError("statfs", err)
	}
	handle, _, err := unix.NameToHandleAt(dir, path, flags)
	if err != nil {
		return "", os.NewSyscallError("name_to_handle_at", err)
	}
	return newKey(fsid.Fsid.Val, handle.Type(), handle.Bytes()), nil
}

// enter makes sure that what happens to the object of a mark can be resolved,
// before it is marked: descriptors that are opened for that make no events yet.
// It counts as a mark, so that nothing is let go of meanwhile.
func (s *fileSystems) enter(target *markTarget) {
	s.mu.Lock()
	defer s.mu.Unlock()
	system := s.byID[target.fsid]
	if system == nil {
		system = s.resume(target.fsid)
	}
	if system == nil {
		system = &fileSystem{tried: map[uint64]bool{}, known: map[string]string{}}
		s.byID[target.fsid] = system
	}
	system.marks++
	if target.key != "" {
		system.handle = target.handleFlag
		system.known[target.key] = target.path
		if !target.directory {
			system.knowParent(target)
		}
	}
	if !system.tried[target.mountID] {
		s.addRoots(system, target)
	}
	if system.roots != nil && !system.told {
		system.told = s.markQuiet(target.fd)
	}
}

// knowParent keeps the path of the directory in which a marked file is.
func (f *fileSystem) knowParent(target *markTarget) {
	dir := target.path[:max(1, strings.LastIndexByte(target.path, '/'))]
	if key, err := keyOf(unix.AT_FDCWD, dir, f.handle); err == nil {
		f.known[key] = dir
	}
}

// addRoots opens the mount of a target and, if that shows a part of the file
// system only, one that shows the whole.
func (s *fileSystems) addRoots(system *fileSystem, target *markTarget) {
	var row procfs.MountInfo
	eachMount(func(m *procfs.MountInfo) bool {
		if uint64(m.ID) == target.mountID {
			row = *m
		}
		return row.ID == 0
	})
	fd, err := target.openOn(row.MountPoint)
	system.tried[target.mountID] = err != unix.EMFILE && err != unix.ENFILE
	s.addRoot(system, fd, target)
	if row.Root == "/" {
		return
	}
	best := procfs.MountInfo{Root: row.Root}
	eachMount(func(m *procfs.MountInfo) bool {
		if m.Major == row.Major && m.Minor == row.Minor && len(m.Root) < len(best.Root) {
			best = *m
		}
		return true
	})
	if best.ID == 0 || system.tried[uint64(best.ID)] {
		return
	}
	system.tried[uint64(best.ID)] = true
	if root, err := unix.Open(best.MountPoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		s.addRoot(system, root, target)
	}
}

// openOn opens a directory on the mount of the target, for reading: the kernel
// takes no other descriptor for a handle. point is where the mount is. It
// returns -1 if there is none.
func (t *markTarget) openOn(point string) (int, error) {
	dir, path := t.fd, "."
	if !t.directory {
		dir, path = unix.AT_FDCWD, point
	}
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var st unix.Statx_t
	if statx(fd, &st) != nil || st.Mnt_id != t.mountID {
		unix.Close(fd)
		return -1, unix.EXDEV // something is mounted on it
	}
	return fd, nil
}

// addRoot takes fd as a root of the file system if the handle of target can be
// opened through it, and closes it otherwise.
func (s *fileSystems) addRoot(system *fileSystem, fd int, target *markTarget) {
	if fd < 0 {
		return
	}
	var st unix.Statx_t
	var statfs unix.Statfs_t
	err := statx(fd, &st)
	if err == nil {
		err = unix.Fstatfs(fd, &statfs)
	}
	key, kerr := keyOf(fd, "", 0)
	if err != nil || kerr != nil || newFSID(statfs.Fsid.Val) != target.fsid {
		unix.Close(fd)
		return
	}
	id := fanotify.FID{Key: []byte(key)}
	probe, err := unix.OpenByHandleAt(fd, unix.NewFileHandle(id.HandleType(), id.Handle()), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		unix.Close(fd)
		return
	}
	unix.Close(probe)
	root := &fileRoot{file: poller.Own(fd), mountID: st.Mnt_id}
	root.path, _ = s.readlink(fd)
	root.foreign = !ourMount(fd, root.mountID, root.path)
	system.roots = append(system.roots, root)
	s.changes++
}

// hold counts the marks on a file system.
func (s *fileSystems) hold(id fsID, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if system := s.byID[id]; system != nil {
		system.marks += n
		s.release()
	}
}

// read is read(2) of a group without waiting.
func (s *fileSystems) read(fd int, buf []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		n, err := unix.Read(fd, buf)
		if n > 0 {
			s.reading++
		}
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// delivered ends what read began when it returned events.
func (s *fileSystems) delivered() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reading--
	s.release()
}

// release closes what was opened for file systems that are not needed any more,
// so that they can be unmounted.
func (s *fileSystems) release() {
	for id, system := range s.byID {
		if system.marks > 0 {
			continue
		}
		if s.reading > 0 || s.queued != nil && s.queued() {
			return
		}
		s.leave(id, system)
	}
}

// leave lets go of a file system without marks. A system call that was inside
// the kernel when the last mark went may put its event into the queue even now,
// so that what it takes to find a path again is kept for a while.
func (s *fileSystems) leave(id fsID, system *fileSystem) {
	now := time.Now()
	for id, system := range s.left {
		if now.Sub(system.since) > leftFor {
			delete(s.left, id)
		}
	}
	system.since = now
	system.closed = system.roots
	system.closeRoots()
	system.told = false
	clear(system.tried)
	delete(s.byID, id)
	s.left[id] = system
	s.changes++
}

// leftFor is longer than any system call is on its way to the queue.
const leftFor = time.Minute

// system returns the file system with an ID, or nil. One that was let go of is
// taken up again; who has an event in hand lets go of it by delivered.
func (s *fileSystems) system(id fsID) *fileSystem {
	if system := s.byID[id]; system != nil {
		return system
	}
	system := s.resume(id)
	if system == nil {
		return nil
	}
	for _, root := range system.closed {
		if root.reopen(id) {
			root.foreign = !ourMount(root.file.FD(), root.mountID, root.path)
			system.roots = append(system.roots, root)
			system.tried[root.mountID] = true
		}
	}
	return system
}

// resume returns a file system that was let go of, without roots, or nil.
func (s *fileSystems) resume(id fsID) *fileSystem {
	system := s.left[id]
	if system != nil {
		delete(s.left, id)
		s.byID[id] = system
	}
	return system
}

// reopen opens a root again where it was, if it is still there.
func (r *fileRoot) reopen(id fsID) bool {
	fd, err := unix.Open(r.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	var st unix.Statx_t
	var statfs unix.Statfs_t
	if statx(fd, &st) != nil || st.Mnt_id != r.mountID || unix.Fstatfs(fd, &statfs) != nil || newFSID(statfs.Fsid.Val) != id {
		unix.Close(fd)
		return false
	}
	r.file = poller.Own(fd)
	return true
}

// A quietGroup tells when the path of a directory may have changed, and wakes
// nobody. Each file system in it has a mark for the renames of directories
// (FAN_MOVE_SELF with FAN_ONDIR), and one that ignores those of everything
// else. Renames of the same directory merge, so its queue is short.
//
// It is drained after each read of the events it is for: a rename that came
// before one of these is in its queue by then.
type quietGroup struct {
	file *poller.Descriptor
	buf  []byte
}

const quietFlags = unix.FAN_CLOEXEC | unix.FAN_NONBLOCK | unix.FAN_CLASS_NOTIF | unix.FAN_REPORT_FID

// markQuiet adds the file system of fd to the quiet group, and tells whether
// that worked.
func (s *fileSystems) markQuiet(fd int) bool {
	if s.quiet == nil && !s.noQuiet {
		group, err := initGroup(quietFlags, unix.O_RDONLY|unix.O_CLOEXEC)
		if err != nil {
			s.noQuiet = true
			return false
		}
		s.quiet = &quietGroup{file: poller.Own(group), buf: make([]byte, 4096)}
	}
	if s.quiet == nil {
		return false
	}
	path := fdLink(fd)
	err := unix.FanotifyMark(s.quiet.file.FD(), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_MOVE_SELF|unix.FAN_ONDIR, unix.AT_FDCWD, path)
	if err != nil {
		return false
	}
	// Before Linux 6.0 the renames of files come, too, and are left out by
	// drain.
	unix.FanotifyMark(s.quiet.file.FD(), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM|unix.FAN_MARK_IGNORE_SURV, unix.FAN_MOVE_SELF, unix.AT_FDCWD, path)
	return true
}

// drain empties the group, and tells whether a directory was renamed.
func (q *quietGroup) drain() (renamed bool) {
	for {
		n, err := unix.Read(q.file.FD(), q.buf)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return renamed
		case err != nil || n <= 0:
			return true
		}
		for b := q.buf[:n]; len(b) > 0; {
			var e fanotify.Event
			if e, b, err = fanotify.Next(b); err != nil {
				return true
			}
			if e.Overflow() || e.Mask()&unix.FAN_ONDIR != 0 {
				renamed = true
			}
		}
	}
}

// fdLink is a path that leads to an open file.
func fdLink(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// pathError is an error of finding a path.
func pathError(err error) error {
	op := "resolve"
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		op = call.Syscall
	}
	return fileError(op, "", err)
}
