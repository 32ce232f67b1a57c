package kernstream

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/poller"
)

// The mountinfo path: the kernel says that the table changed, the table is read
// again, and rows that differ are decoded.
//
// Two open files are needed, because poll(2) on a mountinfo file acknowledges
// the change that it reports, and the runtime's poller polls. One waits there.
// The other is polled by hand, before and after it is read: a change in
// between means that the text is not of one moment.

// mountinfoTries is how often a text that changed while it was read is read
// again. Under changes without end every read is such a text; the last one is
// then taken, since every change brings another read anyway.
const mountinfoTries = 3

// readMountinfo reads the mountinfo file fd into buf.
func readMountinfo(ctx context.Context, fd int, buf []byte) ([]byte, error) {
	for try := 1; ; try++ {
		if _, err := procfs.MountsChanged(fd); err != nil {
			return buf, err
		}
		text, err := procfs.ReadAll(fd, buf, ctx.Err)
		buf = text
		if err != nil {
			return buf, err
		}
		changed, err := procfs.MountsChanged(fd)
		if err != nil || !changed {
			return buf, err
		}
		if try == mountinfoTries {
			return procfs.DropRepeated(buf), nil
		}
	}
}

// parseMounts decodes a whole table.
func parseMounts(text []byte, filter func(*Mount) bool) []Mount {
	var parser procfs.MountInfoParser
	mounts := make([]Mount, 0, bytes.Count(text, []byte{'\n'}))
	for len(text) > 0 {
		line, rest, _ := bytes.Cut(text, []byte{'\n'})
		text = rest
		row := string(line)
		info, err := parser.Parse(row)
		mounts = append(mounts, mountOf(&info, row, err))
		if filter != nil && !filter(&mounts[len(mounts)-1]) {
			mounts = mounts[:len(mounts)-1]
		}
	}
	return mounts
}

// mountOf returns the Mount of a row.
func mountOf(info *procfs.MountInfo, raw string, err error) Mount {
	if err != nil {
		return Mount{MountInfoID: info.ID, Raw: []byte(raw)}
	}
	return Mount{
		MountInfoID:       info.ID,
		MountInfoParentID: info.ParentID,
		Major:             info.Major,
		Minor:             info.Minor,
		Root:              info.Root,
		MountPoint:        info.MountPoint,
		Options:           info.Options,
		Optional:          info.Optional,
		FSType:            info.FSType,
		FSSource:          info.Source,
		SuperOptions:      info.SuperOptions,
	}
}

// mountinfoSource is the mountSource of [ViaMountinfo].
type mountinfoSource struct {
	target *mountTarget
	filter func(*Mount) bool

	waiting *poller.File       // wakes for changes
	reading *poller.Descriptor // is read
	table   procfs.MountTable
	text    []byte // the last one read, for its memory

	tokens  chan struct{}
	end     chan struct{} // closed when the process has ended
	waiters sync.WaitGroup
	failure atomic.Pointer[error] // of a waiter
}

func newMountinfoSource(target *mountTarget, filter func(*Mount) bool) (*mountinfoSource, error) {
	s := &mountinfoSource{
		target: target,
		filter: filter,
		tokens: make(chan struct{}, 1),
		end:    make(chan struct{}),
	}
	var err error
	s.waiting, s.reading, err = s.open()
	return s, err
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

func (s *mountinfoSource) start() {
	s.wait(s.waiting)
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

// wait passes on what wakes the file. It stays inside one Wait for the life of
// the file: each entry would erase a change that came before it. Whether there
// is one cannot be asked, for asking would acknowledge it, so each look counts
// as a change; reading the table finds out.
func (s *mountinfoSource) wait(file *poller.File) {
	s.waiters.Go(func() {
		s.fail(file.Wait(func(int) (bool, error) {
			s.token()
			return false, nil
		}))
	})
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
	s.waiting.Close()
	s.reading.Close()
	s.target.close()
	s.waiters.Wait()
}

func (s *mountinfoSource) look(ctx context.Context, _ bool, d *mountDelta) error {
	if err := s.failure.Load(); err != nil {
		return s.target.failed(*err)
	}
	diff, err := s.compare(ctx, s.reading)
	if err != nil {
		return err
	}
	if s.table.Rows() != nil && movesRoot(diff) {
		if diff, err = s.reopen(ctx, diff); err != nil {
			return err
		}
	}
	s.table.Commit(diff)
	s.report(diff, d)
	return nil
}

func (s *mountinfoSource) compare(ctx context.Context, file *poller.Descriptor) (*procfs.MountDiff, error) {
	text, err := readMountinfo(ctx, file.FD(), s.text)
	s.text = text
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, s.target.failed(err)
	}
	return s.table.Compare(text), nil
}

// movesRoot tells whether the root directory of the process may be another one
// since the open files were opened. They keep the one of that time: after
// pivot_root(2) they show the table as seen from the old root, and no row at
// all when that is unmounted. A change of what is mounted on / always shows in
// a row of /, since the old root has got another parent.
func movesRoot(diff *procfs.MountDiff) bool {
	if diff.Empty() {
		return false
	}
	if len(diff.Rows) == 0 {
		return true
	}
	isRoot := func(row *procfs.MountRow) bool { return row.MountPoint == "/" }
	return slices.ContainsFunc(diff.Gone, isRoot) || slices.ContainsFunc(diff.New, isRoot) ||
		slices.ContainsFunc(diff.Changed, func(c procfs.RowChange) bool { return isRoot(c.Old) || isRoot(c.New) })
}

// reopen opens the files again and compares once more. The text that gave rise
// to it was read after pivot_root had let go of the table, so the process has
// its root by now.
//
// It returns old, and leaves the files as they are, when they cannot be opened
// (the thread or process is gone, no descriptor is free) or show another
// namespace, which the process has entered since.
func (s *mountinfoSource) reopen(ctx context.Context, old *procfs.MountDiff) (*procfs.MountDiff, error) {
	waiting, reading, err := s.open()
	if err != nil {
		return old, nil
	}
	diff, err := s.compare(ctx, reading)
	if err != nil || diff.Kept == 0 && len(diff.Rows) > 0 {
		waiting.Close()
		reading.Close()
		return old, err
	}
	s.waiting.Close()
	s.reading.Close()
	s.waiting, s.reading = waiting, reading
	s.wait(waiting)
	return diff, nil
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
	return &m
}
