package recorder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// A mountWatch follows the mounts of a place. It does so by mountinfo: fanotify would take another group
// of the few that a user may have.
type mountWatch struct {
	watcher *kernstream.MountWatcher
	options *kernstream.MountOptions // whose mounts
	log     *mountLog
	root    *os.File // the directory that is recorded, of the place
	base    string   // its path

	table map[uint32]*placeMount // all mounts, by MountInfoID
	ids   map[uint64]bool        // the unique IDs of all that ever were in table
}

// A placeMount is a mount that is known.
type placeMount struct {
	kernstream.Mount
	marked bool
}

// newMountWatch begins to follow the mount table of the thread or process that the directory
// proc is of, whose namespace is p's unless it is the caller's own.
func newMountWatch(ctx context.Context, p *place, proc int) (_ *mountWatch, err error) {
	m := &mountWatch{root: p.root, base: p.base, ids: map[uint64]bool{}}
	m.options = &kernstream.MountOptions{NoInitial: true, Via: kernstream.ViaMountinfo}
	if elsewhere(proc) {
		m.options.Namespace = p.namespace
	}
	// Who is asked first knows of everything that the others tell.
	if m.log, err = newMountLog(proc); err != nil {
		return nil, err
	}
	if m.watcher, err = kernstream.WatchMounts(ctx, m.options); err != nil {
		m.log.close()
		return nil, err
	}
	var st unix.Statx_t
	mounts, err := kernstream.Mounts(m.options)
	if err == nil {
		err = os.NewSyscallError("statx", statMount(int(m.root.Fd()), &st))
	}
	if err != nil {
		m.close()
		return nil, asRecordError("statx", p.base, err)
	}
	m.table = make(map[uint32]*placeMount, len(mounts))
	for i := range mounts {
		m.learn(&mounts[i]).marked = uint64(mounts[i].MountInfoID) == st.Mnt_id
	}
	return m, nil
}

// close ends the watch. It may be called again.
func (m *mountWatch) close() {
	m.watcher.Close()
	m.log.close()
}

// elsewhere tells whether the thread or process that the directory proc is of has another
// mount namespace than the threads that run goroutines.
func elsewhere(proc int) bool {
	theirs, err := namespaceOf(proc, "ns/mnt")
	ours := make(chan string)
	go func() { // never on a thread that is locked
		name, _ := namespaceOf(unix.AT_FDCWD, "/proc/thread-self/ns/mnt")
		ours <- name
	}()
	return <-ours != theirs && err == nil
}

// learn enters a mount into the table.
func (m *mountWatch) learn(mount *kernstream.Mount) *placeMount {
	known := &placeMount{Mount: *mount}
	m.table[mount.MountInfoID] = known
	if mount.ID != 0 {
		m.ids[mount.ID] = true
	}
	return known
}

// point returns where in the place a mount is, and whether its files are to be
// recorded at all. A row that could not be read is one of those, whatever it is of.
func (m *mountWatch) point(mount *kernstream.Mount) (string, bool) {
	if mount.Raw != nil {
		return "", true
	}
	point, below := within(m.base, mount.MountPoint)
	return point, below && !pseudo[mount.FSType]
}

// errCovered is why a mount cannot be opened that is there, and that nobody reaches.
var errCovered = errors.New("another mount covers it, or its server is gone")

// open opens the root of a mount of the place.
func (m *mountWatch) open(mount *kernstream.Mount, point string) (_ *os.File, err error) {
	if mount.Raw != nil {
		return nil, fmt.Errorf("its row of the mount table cannot be read: %q", mount.Raw)
	}
	if point == "/" && m.options.Namespace != nil {
		return nil, errors.New("it covers the root directory")
	}
	fd := -1
	for err = unix.EINTR; err == unix.EINTR; {
		fd, err = m.openPoint(mount, point)
	}
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ESTALE, unix.ENOTCONN, unix.ECONNABORTED:
		return nil, errCovered
	default:
		return nil, os.NewSyscallError("openat2", err)
	}
	file := os.NewFile(uintptr(fd), point)
	var st unix.Statx_t
	err = statMount(fd, &st)
	if err == nil && st.Mnt_id == uint64(mount.MountInfoID) {
		return file, nil
	}
	file.Close()
	if err != nil && err != unix.ENOTCONN && err != unix.ECONNABORTED {
		return nil, os.NewSyscallError("statx", err)
	}
	return nil, errCovered
}

// openPoint opens what is on the mount point of a mount.
func (m *mountWatch) openPoint(mount *kernstream.Mount, point string) (int, error) {
	if point == "/" {
		// From the directory that it covers there is no way to it.
		return unix.Open(mount.MountPoint, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	}
	// Not through a symbolic link that was put there since, and not out of
	// the root.
	return unix.Openat2(int(m.root.Fd()), point, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	})
}

// statMount finds out which mount a descriptor is on. It does not wait for a file system that hangs.
func statMount(fd int, st *unix.Statx_t) error {
	return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, st)
}

// first returns the roots of the mounts below the root of the place that are there, and why others are
// not recorded: FUSE file systems that are for their user alone. One that is covered is not one of these:
// nobody reaches it. What cannot be opened for another reason is an error.
func (m *mountWatch) first() (files []*os.File, missing []string, err error) {
	for _, known := range m.unmarked() {
		point, _ := m.point(&known.Mount)
		if point == "/" {
			continue // below what is recorded
		}
		file, err := m.open(&known.Mount, point)
		switch {
		case err == errCovered:
		case known.Raw != nil, errors.Is(err, unix.EACCES):
			missing = append(missing, fmt.Sprintf("%s is not recorded: %v", named(&known.Mount, point), err))
		case err != nil:
			return files, nil, recordError("open", point, err)
		default:
			known.marked = true
			files = append(files, file)
		}
	}
	return files, missing, nil
}

// unmarked returns the mounts without a mark that should have one, the oldest first.
func (m *mountWatch) unmarked() []*placeMount {
	var found []*placeMount
	for _, known := range m.table {
		if _, recorded := m.point(&known.Mount); recorded && !known.marked {
			found = append(found, known)
		}
	}
	slices.SortFunc(found, func(a, b *placeMount) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.MountInfoID, b.MountInfoID))
	})
	return found
}

// named is how a reason speaks of a mount.
func named(mount *kernstream.Mount, point string) string {
	if mount.Raw != nil {
		return "a mount"
	}
	return fmt.Sprintf("%s on %s", mount.FSType, oneWord(point))
}

// oneWord returns s, quoted if it is not plain text.
func oneWord(s string) string {
	if quoted := fmt.Sprintf("%q", s); quoted[1:len(quoted)-1] != s || strings.Contains(s, " ") {
		return quoted
	}
	return s
}

// tell takes an event of the watcher, as apply does.
func (m *mountWatch) tell(e *kernstream.MountEvent, mark func(*os.File) error) (reasons []string) {
	m.log.look()
	return m.apply(e, mark)
}

// apply enters a change of the table, marks what has to be marked, and returns why the list is
// not complete therefore.
func (m *mountWatch) apply(e *kernstream.MountEvent, mark func(*os.File) error) (reasons []string) {
	came := m.change(e)
	if len(e.Mounted)+len(e.Unmounted)+len(e.Moved) == 0 {
		return nil
	}
	for _, known := range m.unmarked() {
		point, _ := m.point(&known.Mount)
		file, err := m.open(&known.Mount, point)
		if err != nil && !came[known] {
			continue // as before
		}
		if err == nil {
			err = mark(file)
			known.marked = err == nil
			file.Close()
		}
		what := named(&known.Mount, point) + " came after the start of the recording"
		if err == nil {
			reasons = append(reasons, what+": what was accessed there before it was marked is missing")
		} else {
			reasons = append(reasons, fmt.Sprintf("%s, and is not recorded: %v", what, err))
		}
	}
	return reasons
}

// change enters a change of the table, and returns the mounts that came into the place by
// it.
func (m *mountWatch) change(e *kernstream.MountEvent) (came map[*placeMount]bool) {
	came = map[*placeMount]bool{}
	for i := range e.Unmounted {
		if known := m.known(&e.Unmounted[i]); known != nil {
			delete(m.table, known.MountInfoID)
		}
	}
	for _, changes := range [][]kernstream.MountChange{e.Moved, e.Changed} {
		for i := range changes {
			known := m.known(&changes[i].New)
			if known == nil {
				continue
			}
			_, before := m.point(&known.Mount)
			known.Mount = changes[i].New
			came[known] = !before
		}
	}
	for i := range e.Mounted {
		// The first table may have it already.
		if m.known(&e.Mounted[i]) == nil {
			came[m.learn(&e.Mounted[i])] = true
		}
	}
	return came
}

// known returns what is known of a mount, or nil. The table may have another one with
// its MountInfoID.
func (m *mountWatch) known(mount *kernstream.Mount) *placeMount {
	known := m.table[mount.MountInfoID]
	if known == nil || known.ID != mount.ID && known.ID != 0 && mount.ID != 0 {
		return nil
	}
	return known
}

// finish ends the watch by a last look at the table, and returns why the list is not complete.
// The watcher has ended.
func (m *mountWatch) finish() (reasons []string) {
	if err := m.watcher.Err(); err != nil {
		return []string{fmt.Sprintf("mounts that came after the start are not known: %v", err)}
	}
	m.log.look()
	mounts, err := kernstream.Mounts(m.options)
	if err != nil {
		return []string{fmt.Sprintf("mounts that came at the end are not known: %v", err)}
	}
	e, differs := m.compare(mounts)
	reasons = m.apply(e, func(*os.File) error { return errEnded })
	return append(reasons, m.log.passed(m.ids, differs)...)
}

// errEnded is why a mount is not marked that comes at the end.
var errEnded = errors.New("the recording ends")

// compare returns what is different in a table, as far as it counts here, and whether anything is.
func (m *mountWatch) compare(mounts []kernstream.Mount) (_ *kernstream.MountEvent, differs bool) {
	e := &kernstream.MountEvent{}
	there := map[uint32]bool{}
	for i := range mounts {
		mount := &mounts[i]
		known := m.known(mount)
		if known == nil {
			e.Mounted = append(e.Mounted, *mount)
			continue
		}
		there[mount.MountInfoID] = true
		if !reflect.DeepEqual(known.Mount, *mount) {
			e.Moved = append(e.Moved, kernstream.MountChange{Old: known.Mount, New: *mount})
		}
	}
	for id, known := range m.table {
		if !there[id] {
			e.Unmounted = append(e.Unmounted, known.Mount)
		}
	}
	return e, len(e.Mounted)+len(e.Moved)+len(e.Unmounted) > 0
}
