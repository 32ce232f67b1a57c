package recorder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// Options say what is recorded. The zero value is what prefetch lists are made
// of: which files are opened, read and executed.
type Options struct {
	// Ops are the operations that count as an access: any of OpOpen, OpAccess,
	// OpOpenExec, OpModify and OpClose, and OpOnDir for those on directories, too. 0 is
	// OpOpen, OpAccess and OpOpenExec.
	Ops kernstream.FileOp

	// OneMount records only what is on the same mount as the root of the target:
	// the image of a container, without its volumes. Otherwise all mounts of the
	// target are recorded, also those that come later (see [Record]), except those of file systems
	// that are the kernel's own (proc, sysfs, cgroup2 and the like).
	OneMount bool

	// Tree records only what the process with this number and its descendants do,
	// those included that are born later, and whose parents end. Only a descendant
	// whose own parent ends while Record looks for those that are there is missed. It needs
	// CAP_NET_ADMIN in the first user namespace, and that the caller is in the first process ID
	// namespace and the first network namespace. It is not for commands, which are
	// alone anyway.
	Tree int

	// Descendants lets the recording of a command go on until no process is left in the
	// mount namespace that it was started in.
	Descendants bool

	// Descriptors gives each Access an open file, and each has to be closed then.
	// The files that the consumer has not taken yet are limited to 128, so that
	// a slow one holds the recorder back; accesses then wait in the kernel's queue.
	Descriptors bool

	// LimitedQueue leaves the limit of the kernel's queue at
	// /proc/sys/fs/fanotify/max_queued_events. Otherwise it is lifted where that is
	// permitted (CAP_SYS_ADMIN in the first user namespace), and a burst of accesses
	// costs kernel memory.
	LimitedQueue bool

	// MaxFiles is how many files a list can have. Further ones are left out, and
	// make it incomplete. 0 is 1,048,576.
	MaxFiles int
}

const (
	defaultOps      = kernstream.OpOpen | kernstream.OpAccess | kernstream.OpOpenExec
	allOps          = defaultOps | kernstream.OpModify | kernstream.OpClose | kernstream.OpOnDir
	defaultMaxFiles = 1 << 20

	// maxPending is how many files are open for a consumer that does not come.
	maxPending = 128
)

// complete returns a copy with the defaults in it.
func (o *Options) complete(target Target) (Options, error) {
	c := Options{}
	if o != nil {
		c = *o
	}
	if c.Ops == 0 {
		c.Ops = defaultOps
	}
	if c.MaxFiles == 0 {
		c.MaxFiles = defaultMaxFiles
	}
	_, command := target.(commandTarget)
	switch {
	case target == nil:
		return c, invalid("", "there is no target")
	case c.Ops&^allOps != 0:
		return c, invalid(target.String(), "Ops: %v is not recorded; there are %v", c.Ops&^allOps, allOps)
	case c.Ops&^kernstream.OpOnDir == 0:
		return c, invalid(target.String(), "Ops: %v alone asks for nothing", c.Ops)
	case c.MaxFiles < 0:
		return c, invalid(target.String(), "MaxFiles is negative")
	case c.Tree < 0:
		return c, invalid(target.String(), "Tree: %d is no process", c.Tree)
	case c.Tree != 0 && command:
		return c, invalid(target.String(), "Tree: a command is alone in its namespace")
	case c.Descendants && !command:
		return c, invalid(target.String(), "Descendants are those of a command")
	}
	return c, nil
}

// A Recording is a stream of accesses: each file once, at its first access, in that
// order. What is known of all accesses is in the List.
//
// A slow consumer loses nothing and holds nothing back, unless it takes files along
// ([Options.Descriptors]): what it has not received is kept, for the List anyway.
type Recording struct {
	*kernstream.Stream[*Access]
	name  string // in errors
	tally *tally
}

// Record records which files a target accesses, from the time of the call until it
// ends or ctx is done. A [Command] is started, on a thread of its own.
//
// The stream ends by itself when the process that stands for the container, or the
// command, has ended and all that it did has been delivered; the recording of a
// directory ends by Close or by ctx. In any case the List holds all that was
// accessed before the end: that takes some microseconds for each access that waits
// in the kernel. A command that still runs at the end goes on unrecorded, and the
// list is incomplete: it is the caller's, who has to wait for it in any case.
//
// Paths are those that the target sees. A file that is reached through several
// mounts of one file system is named by the first of these that shows it. Where the file
// system supports it, files are found by their handles, which costs about a
// microsecond for an access; where not (overlay, FUSE), the kernel opens each for a
// moment, which costs four times as much.
//
// What is mounted, moved or uncovered below the root after the start (a bind mount of what is recorded
// anyway, too, since marks are of mounts) is recorded from some hundred microseconds later on. What was accessed before
// that is missing, so each such mount makes the list incomplete, and is named by a
// reason; those of the kernel's own file systems do not. So does a mount that is gone again before it could be
// looked at, wherever in the mount namespace it was. Before Linux 6.15 one is not noticed if other mounts come
// or go after it. The order between a mount that came later and the others is that in which the recorder learned of
// the accesses. To follow the mounts costs some 2 µs per mount for each change of the mount table, and nothing for an access.
//
// It is not recorded what a process does in another mount namespace than the
// target's, mounts that it makes there included, and what this process
// does itself. Mapping a file is an open, the pages that are touched are not seen.
// The mounts that are there at the start are busy meanwhile; a later one is while it is being marked and while an access waits in the
// kernel's queue, and can be unmounted after that. A FUSE file system whose server is gone is left out,
// since nobody opens a file there; one of another user, who allows nobody else, is left out, too, and
// the list is incomplete. Another mount of the start that cannot be opened is an error.
//
// Record needs CAP_SYS_ADMIN, for mount marks; CAP_DAC_READ_SEARCH, for paths; unless there is to be
// one mount only, CAP_SYS_CHROOT, to read the mount table of a command or a container; of a
// container the permission to look at /proc/PID/root (ptrace(2)). In a user namespace
// it works for directories of file systems that were mounted there (Linux 6.16), and what is
// mounted later is not recorded. It takes up to three of the 128 fanotify groups that a user may
// have, and one more once something is mounted. Options may be nil. The
// error is an OpError of the source "record", "file" or "mount", which Is fs.ErrPermission for want of a
// privilege, and os.ErrProcessDone if the container's process is gone.
func Record(ctx context.Context, target Target, options *Options) (*Recording, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	o, err := options.complete(target)
	if err != nil {
		return nil, err
	}
	s, err := newSession(o, target)
	if err != nil {
		return nil, err
	}
	r := &Recording{name: s.name, tally: s.tally}
	r.Stream = kernstream.NewStream(ctx, s.produce)
	return r, nil
}

// List returns what was recorded, once C is closed. Before that there is an error.
// Each call returns a copy.
func (r *Recording) List() (*List, error) {
	if list := r.tally.list(); list != nil {
		return list, nil
	}
	return nil, recordError("list", r.name, errors.New("the recording has not ended"))
}

// Progress returns how far the recording is. It may be called at any time.
func (r *Recording) Progress() Progress { return r.tally.progress() }

// Progress is how far a recording is.
type Progress struct {
	Files     int    // in the list
	Accesses  uint64 // told by the kernel, which merges what happens at once
	Overflows int    // how often the kernel's queue was full
}

// A session is one recording.
type session struct {
	name    string
	options Options
	tally   *tally
	place   *place
	watcher *kernstream.FileWatcher
	tree    *tree // nil: everybody
	mounts  laterMounts
	stop    context.CancelFunc
	cut     func(cause error) string // why a list is incomplete that ends before its target; empty: it is not
}

// newSession begins to record.
func newSession(o Options, target Target) (_ *session, err error) {
	ctx, stop := context.WithCancel(context.Background())
	s := &session{name: target.String(), options: o, tally: newTally(o.MaxFiles), stop: stop}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if o.Tree != 0 {
		if s.tree, err = newTree(o.Tree); err != nil {
			return nil, err
		}
	}
	if s.place, err = target.open(ctx, &s.options); err != nil {
		return nil, err
	}
	defer s.place.release()
	s.cut = func(error) string { return s.place.early }
	if s.watcher, s.mounts.descriptors, err = o.watch(ctx, s.place.marks); err != nil {
		return nil, err
	}
	s.tally.begin()
	s.followMounts()
	if s.place.start != nil {
		err = s.place.start()
	}
	return s, err
}

// close lets go of what a session has beside its stream.
func (s *session) close() {
	s.leaveMounts()
	if s.watcher != nil {
		s.watcher.Close()
	}
	s.stop()
	if s.place != nil {
		s.place.close()
	}
	if s.tree != nil {
		s.tree.close()
	}
}

// watch makes the watcher with the marks. One group is what keeps the order, so
// where some marks cannot have handles, none gets them: the group is of descriptors then.
func (o *Options) watch(ctx context.Context, marks []kernstream.Mark) (_ *kernstream.FileWatcher, descriptors bool, err error) {
	for i := range marks {
		marks[i].Ops = o.Ops
	}
	options := &kernstream.FileOptions{Descriptors: o.Descriptors, UnlimitedQueue: !o.LimitedQueue}
	for {
		w, err := kernstream.WatchFiles(ctx, options, marks...)
		if errors.Is(err, fs.ErrPermission) && options.UnlimitedQueue {
			options.UnlimitedQueue = false
			continue
		}
		if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) {
			if alive := withoutDead(marks); len(alive) < len(marks) {
				marks = alive
				continue
			}
		}
		if err != nil || options.Descriptors {
			return w, options.Descriptors, err
		}
		groups := 0
		if err := w.Control(func(int) { groups++ }); err == nil && groups == 1 {
			return w, false, nil
		}
		w.Close()
		options.Descriptors = true
	}
}

// withoutDead leaves out the marks, but for the first one, of FUSE file systems
// whose server is gone: the kernel refuses them, and nobody opens a file there.
func withoutDead(marks []kernstream.Mark) (alive []kernstream.Mark) {
	for i, m := range marks {
		var st unix.Statfs_t
		if i == 0 || unix.Fstatfs(int(m.Dir.Fd()), &st) != unix.ENOTCONN {
			alive = append(alive, m)
		}
	}
	return alive
}

// produce is the life of a recording's stream.
func (s *session) produce(ctx context.Context, emit func(*Access) bool) error {
	defer s.close()
	var sender sync.WaitGroup
	sender.Go(func() { s.tally.send(emit) })
	err := s.run(ctx)
	sender.Wait()
	return err
}

// run records until the target or ctx ends, and gives the verdict. It returns io.EOF for
// the end of the target.
func (s *session) run(ctx context.Context) error {
	collected := make(chan struct{})
	go func() {
		defer close(collected)
		s.collect(s.watcher)
	}()
	err := error(io.EOF)
	select {
	case <-s.place.ended:
	case <-collected:
		err = s.watcher.Err()
	case <-ctx.Done():
		select {
		case <-s.place.ended:
		default:
			err = ctx.Err()
			s.tally.hurry()
			if why := s.cut(context.Cause(ctx)); why != "" {
				s.tally.fault("%s", why)
			}
		}
	}
	s.watcher.Drain()
	<-collected
	if broken := s.watcher.Err(); broken != nil {
		err = broken
		s.tally.fault("%v", broken)
	}
	s.endMounts()
	s.tally.finish()
	return err
}

// collect takes the events of a watcher until there are no more. It tells who waits for files only
// when no other event is there: to change between goroutines for each would cost more than
// all else.
func (s *session) collect(w *kernstream.FileWatcher) {
	for e := range w.C {
		s.take(e)
		if len(w.C) == 0 {
			s.tally.tell()
		}
	}
}

// take enters an event into the list.
func (s *session) take(e *kernstream.FileEvent) {
	defer e.Close()
	if e.Ops.Has(kernstream.OpOverflow) {
		s.tally.overflow()
		return
	}
	if e.PID == ownPID {
		return
	}
	if s.tree != nil && e.PID != 0 {
		member, err := s.tree.has(e.PID)
		if err != nil {
			s.tally.fault("%v", err)
		}
		if !member {
			return
		}
	}
	path, below := within(s.place.base, e.Path)
	switch {
	case e.Path == "" || e.Path[0] != '/':
		s.tally.unnamed(e)
	case below:
		s.tally.add(path, e, s.options.Descriptors)
	}
}

func recordError(op, object string, err error) error {
	return &kernstream.OpError{Op: op, Source: "record", Object: object, Err: err}
}

// asRecordError is [recordError] for what may be an OpError already.
func asRecordError(op, object string, err error) error {
	if _, ok := errors.AsType[*kernstream.OpError](err); ok {
		return err
	}
	return recordError(op, object, err)
}

func invalid(object, format string, args ...any) error {
	return recordError("record", object, fmt.Errorf(format+": %w", append(args, fs.ErrInvalid)...))
}

// opNames returns the names of operations, the kernel's without FAN_.
func opNames(ops kernstream.FileOp) []string {
	names := make([]string, 0, bits.OnesCount64(uint64(ops)))
	for ; ops != 0; ops &= ops - 1 {
		names = append(names, (ops & -ops).String())
	}
	return names
}
