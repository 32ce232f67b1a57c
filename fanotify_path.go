package kernstream

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"strconv"
	"strings"

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

// A foundPath is the path of a directory or file.
type foundPath struct {
	path  string
	state PathState
	err   error

	told  bool   // a change of it is told
	batch uint64 // in which it was looked up or checked
}

const deletedSuffix = " (deleted)"

// readlink returns the path that /proc shows for a descriptor.
func (s *fileSystems) readlink(fd int) (string, error) {
	var number [12]byte
	return readlink(s.links.FD(), string(strconv.AppendInt(number[:0], int64(fd), 10)))
}

func readlink(dir int, name string) (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(dir, name, buf[:])
	if err != nil {
		return "", os.NewSyscallError("readlinkat", err)
	}
	return string(buf[:n]), nil
}

// shown returns the path that the kernel shows of an open file, and what
// statx(2) says of it.
func (s *fileSystems) shown(fd int) (path string, st unix.Statx_t, err error) {
	if path, err = s.readlink(fd); err == nil {
		err = statx(fd, &st)
	}
	return path, st, err
}

// describe returns the path of an open file, and what it is worth. ours tells
// whether a mount is of this namespace.
func (s *fileSystems) describe(fd int, ours func(fd int, mountID uint64, path string) bool) foundPath {
	path, st, err := s.shown(fd)
	if err != nil {
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
	old     map[string]*foundPath // what was dropped: of directories that are deleted by now
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
	if len(c.found)+len(c.old) > cacheLimit {
		c.found, c.old = c.old, c.found
	} else {
		maps.Copy(c.old, c.found)
	}
	clear(c.found)
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

// openNow is [pathCache.open] for an open file whose file system must not be
// asked anything.
func (c *pathCache) openNow(fd int) foundPath {
	path, st, err := c.systems.shown(fd)
	if err != nil {
		return foundPath{err: err}
	}
	found := foundPath{path: path, state: PathExact}
	switch {
	case !strings.HasPrefix(path, "/"):
		found.state = PathUnknown // no file system shows it
		return found
	case strings.HasSuffix(path, deletedSuffix) && deletedNow(path, &st):
		found.path, found.state = strings.TrimSuffix(path, deletedSuffix), PathDeleted
	}
	if !c.oursNow(st.Mnt_id) {
		found.state = PathOtherNamespace
	}
	return found
}

// resolveCached is RESOLVE_CACHED of openat2(2), since Linux 5.12.
const resolveCached = 0x20

// deletedNow tells whether the suffix of path means that the file is gone, as
// far as the kernel knows that without asking a file system.
func deletedNow(path string, st *unix.Statx_t) bool {
	if st.Nlink == 0 {
		return true
	}
	// A file of that name was found by it just before.
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: resolveCached,
	})
	if err != nil {
		return err != unix.EINVAL
	}
	defer unix.Close(fd)
	var other unix.Statx_t
	return statx(fd, &other) != nil || other.Ino != st.Ino || other.Mnt_id != st.Mnt_id
}

// oursNow tells whether a mount is in the mount namespace of this process.
func (c *pathCache) oursNow(mountID uint64) bool {
	ours, known := c.ours[mountID]
	if !known {
		eachMount(func(m *procfs.MountInfo) bool {
			ours = uint64(m.ID) == mountID
			return !ours
		})
		c.ours[mountID] = ours
	}
	return ours
}
