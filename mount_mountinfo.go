package kernstream

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/poller"
)

// The mountinfo path: the kernel says that the table changed, the table is read
// again, and rows that differ are decoded.
//
// Two open files are needed, because poll(2) on a mountinfo file acknowledges
// the change that it reports, and the runtime's poller polls. One waits there.
// The other is polled by hand, before and after it is read: a change in
// between means that the text is not of one moment: it is torn.

// mountinfoSource is the mountSource of [ViaMountinfo].
type mountinfoSource struct {
	target *mountTarget
	filter func(*Mount) bool

	waiting *poller.File       // wakes for changes
	reading *poller.Descriptor // is read
	table   procfs.MountTable
	text    []byte // the last one read, for its memory
	unique  uniqueIDs

	// stale is set while the files may be of an old root directory, and could
	// not be opened again.
	stale bool
	root  mountRoot // of this process, if the table is its own
	retry *time.Timer
	begun bool // a first look was taken

	tokens  chan struct{}
	end     chan struct{} // closed when the process has ended
	waiters sync.WaitGroup
	failure atomic.Pointer[error] // of a waiter
}

func newMountinfoSource(target *mountTarget, filter func(*Mount) bool) (*mountinfoSource, error) {
	s := &mountinfoSource{
		target: target,
		filter: filter,
		unique: target.uniqueIDs(),
		tokens: make(chan struct{}, 1),
		end:    make(chan struct{}),
	}
	s.rootChanged() // the one it has counts
	var err error
	if s.waiting, s.reading, err = s.open(); err != nil {
		return nil, err
	}
	s.arm(s.waiting)
	s.watchEnd()
	return s, nil
}

// open opens the two files. The one that waits comes first: what changes after
// open returned is seen by it, and what changed before is in the text.
func (s *mountinfoSource) open() (waiting *poller.File, reading *poller.Descriptor, err error) {
	fd, err := s.target.open()
	if err != nil {
		return nil, nil, err
	}
	if waiting, err = poller.New(fd, s.target.name); err != nil {
		return nil, nil, s.target.failed(err)
	}
	if fd, err = s.target.open(); err != nil {
		waiting.Close()
		return nil, nil, err
	}
	return waiting, poller.Own(fd), nil
}

func (s *mountinfoSource) via() MountVia { return ViaMountinfo }

func (s *mountinfoSource) wake() <-chan struct{} { return s.tokens }

func (s *mountinfoSource) ended() <-chan struct{} { return s.end }

func (s *mountinfoSource) over() bool { return s.target.exited() }

// watchEnd lets the end of the process, if the table is that of one, be the end.
func (s *mountinfoSource) watchEnd() {
	if s.target.process == nil {
		return
	}
	s.waiters.Go(func() {
		err := s.target.process.Wait(pidfdExited)
		if err == nil {
			close(s.end)
			return
		}
		s.fail(err)
	})
}

// rest gives a storm half of the time: the kernel changes no table that is being
// read.
func (s *mountinfoSource) rest(began time.Time) time.Duration {
	if len(s.tokens) == 0 {
		return 0 // nothing changed during the look
	}
	return time.Since(began)
}

// arm lets what wakes the file be followed by a token.
func (s *mountinfoSource) arm(file *poller.File) {
	arm(&s.waiters, file, func() error {
		s.token()
		return nil
	}, s.fail)
}

func (s *mountinfoSource) token() {
	select {
	case s.tokens <- struct{}{}:
	default: // the look that is pending will see it
	}
}

// fail makes the next look return the error of a waiter that is not there any
// more, unless it was closed.
func (s *mountinfoSource) fail(err error) {
	if !errors.Is(err, os.ErrClosed) {
		s.failure.Store(&err)
		s.token()
	}
}

func (s *mountinfoSource) close() {
	if s.retry != nil {
		s.retry.Stop()
	}
	s.waiting.Close()
	s.reading.Close()
	s.target.close()
	s.waiters.Wait()
}

func (s *mountinfoSource) look(ctx context.Context, rescan bool, d *mountDelta) (resync bool, err error) {
	if err := s.failure.Load(); err != nil {
		return false, s.target.failed(*err)
	}
	diff, err := s.compare(ctx, s.reading)
	if err != nil {
		return false, err
	}
	if !s.begun || s.stale || movesRoot(diff) || s.rootChanged() {
		if diff, err = s.reopen(ctx, diff); diff == nil {
			return false, err
		}
	}
	s.begun = true
	s.table.Commit(diff)
	s.report(diff, d)
	return rescan, nil
}

func (s *mountinfoSource) compare(ctx context.Context, file *poller.Descriptor) (*procfs.MountDiff, error) {
	torn, err := settle(func() (bool, error) { return s.read(ctx, file.FD()) })
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, s.target.failed(err)
	}
	text, unique := s.unique.ofText(s.text, torn, s.table.Rows())
	diff := s.table.Compare(text, unique)
	for _, row := range diff.New {
		s.findParent(row)
	}
	for _, change := range diff.Changed {
		s.findParent(change.New)
	}
	return diff, nil
}

// findParent finds the unique ID of a parent that is not in the table, as that
// of /.
func (s *mountinfoSource) findParent(row *procfs.MountRow) {
	if row.ParentUnique == 0 {
		row.ParentUnique = s.unique.parent(row.Unique)
	}
}

// settle reads until the text is not torn: three times at most, and not again
// after a read of a millisecond. That would be torn again by the same storm, and
// slow it down, for the kernel changes no table while somebody reads it. What
// tore the text has left a token, so there is another look anyway.
func settle(read func() (torn bool, err error)) (torn bool, err error) {
	for range 3 {
		begin := time.Now()
		torn, err = read()
		if !torn || err != nil || time.Since(begin) >= time.Millisecond {
			break
		}
	}
	return torn, err
}

// read reads the file fd into s.text, and tells whether it changed meanwhile.
func (s *mountinfoSource) read(ctx context.Context, fd int) (torn bool, err error) {
	if _, err := procfs.MountsChanged(fd); err != nil {
		return false, err
	}
	if s.unique.list == nil {
		s.unique.look(0)
	}
	if s.text, err = procfs.ReadAll(fd, s.text, ctx.Err); err != nil {
		return false, err
	}
	s.unique.look(len(s.table.Rows()))
	return procfs.MountsChanged(fd)
}

// The open files keep the root directory that the process had when they were
// opened: after pivot_root(2) they show the table as seen from the old root, and
// no row at all once that is unmounted. So they are opened again when the table
// shows that this may have happened.

// rootChanged tells whether this process, if the table is its own, has got another
// root directory since the last call, by chroot even.
func (s *mountinfoSource) rootChanged() bool {
	if !s.target.own {
		return false
	}
	root, err := rootAt(unix.AT_FDCWD, "/")
	if err != nil || root == s.root {
		return false
	}
	s.root = root
	return true
}

// movesRoot tells whether the process may have got another root directory by
// pivot_root. The mount that was its root has then got another parent.
func movesRoot(diff *procfs.MountDiff) bool {
	if diff.Empty() {
		return false
	}
	if len(diff.Rows) == 0 {
		return true
	}
	return slices.ContainsFunc(diff.Gone, isRoot) || slices.ContainsFunc(diff.Changed, func(c procfs.RowChange) bool {
		return isRoot(c.Old) && c.Old.ParentID != c.New.ParentID
	})
}

func isRoot(row *procfs.MountRow) bool { return row.MountPoint == "/" }

// sameRoot tells whether two texts show the same mounts on /.
func sameRoot(a, b *procfs.MountDiff) bool {
	roots := func(diff *procfs.MountDiff) (rows []string) {
		for _, row := range diff.Rows {
			if isRoot(row) {
				rows = append(rows, row.Raw)
			}
		}
		return rows
	}
	return slices.Equal(roots(a), roots(b))
}

const (
	reopenTries = 5                      // pivot_root follows on pivot_root
	reopenRetry = 100 * time.Millisecond // no descriptor was free
)

// reopen opens the files again and compares once more, until what is on / is
// what the text before showed. pivot_root changes the root directory of the
// process while it holds the table, so a text that was read after that belongs
// to files that may have been opened in the middle of it, but the next one does
// not. Right at the start that is the only sign that there is.
//
// It returns nil if nothing can be said: the files are of an old root, and no
// others can be had yet.
func (s *mountinfoSource) reopen(ctx context.Context, old *procfs.MountDiff) (*procfs.MountDiff, error) {
	for range reopenTries {
		waiting, reading, err := s.open()
		if err != nil {
			return s.reopenLater(old, err), nil
		}
		s.arm(waiting)
		diff, err := s.compare(ctx, reading)
		// With no mount in common, the process has gone to another namespace.
		elsewhere := err == nil && !s.target.own && diff.Kept == 0 && len(diff.Rows) > 0 && len(s.table.Rows()) > 0
		if err != nil || elsewhere {
			waiting.Close()
			reading.Close()
			s.stale = false
			if err != nil || len(old.Rows) == 0 {
				return nil, err
			}
			return old, nil
		}
		s.waiting.Close()
		s.reading.Close()
		s.waiting, s.reading = waiting, reading
		settled := sameRoot(old, diff)
		if old = diff; settled {
			break
		}
	}
	s.stale = false
	return old, nil
}

// reopenLater returns what to make of old when the files could not be opened
// again because of err.
func (s *mountinfoSource) reopenLater(old *procfs.MountDiff, err error) *procfs.MountDiff {
	isAny := func(errnos ...error) bool {
		return slices.ContainsFunc(errnos, func(errno error) bool { return errors.Is(err, errno) })
	}
	s.stale = isAny(unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOSPC)
	if s.stale {
		s.retry = time.AfterFunc(reopenRetry, s.token)
	}
	// For good (the thread or process is gone), the old view is all there is.
	// But that nothing is left is never said by files of an old root.
	if len(old.Rows) == 0 && s.begun || s.stale && movesRoot(old) && s.begun {
		return nil
	}
	return old
}

// report adds diff to d, as far as the filter lets it.
func (s *mountinfoSource) report(diff *procfs.MountDiff, d *mountDelta) {
	for _, row := range diff.Gone {
		d.change(row.Seq, shown(row), nil)
	}
	for _, change := range diff.Changed {
		d.change(change.New.Seq, shown(change.Old), s.filtered(change.New))
	}
	for _, row := range diff.New {
		d.change(row.Seq, nil, s.filtered(row))
	}
}

// filtered returns the mount of a row that is new in the table, or nil if the
// consumer does not want it, which the row remembers.
func (s *mountinfoSource) filtered(row *procfs.MountRow) *Mount {
	m := shown(row)
	row.Hidden = s.filter != nil && !s.filter(m)
	if row.Hidden {
		return nil
	}
	return m
}

// shown returns the mount of a row, or nil for one that the consumer was not
// shown.
func shown(row *procfs.MountRow) *Mount {
	if row.Hidden {
		return nil
	}
	m := mountOf(&row.MountInfo, row.Raw, row.Err)
	m.ID, m.ParentID = row.Unique, row.ParentUnique
	return &m
}
