package kernstream

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/poller"
)

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

// told tells whether the quiet group has a file system: then any mark of it can be
// with handles.
func (s *fileSystems) told(id fsID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	system := s.byID[id]
	return system != nil && system.told
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
