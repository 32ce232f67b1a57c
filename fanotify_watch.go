package kernstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fangroup"
	"github.com/kernstream/kernstream/internal/procfs"
)

// A fileWatch is what is behind a FileWatcher: its groups, its marks, and what
// runs.
type fileWatch struct {
	options FileOptions
	systems *fileSystems
	failed  chan error // what ended a reader
	first   FileVia    // the kind of group that marks go to, if that can be
	readers sync.WaitGroup
	cut     atomic.Bool        // a reader ended with events that it has not sent
	drain   context.Context    // done when the readers are to end with the queue
	empty   context.CancelFunc // ends drain

	blocking bool        // an adopted group was, when it came
	access   *accessList // nil: no event waits for an answer
	asked    *permissionReaders

	// marking is the lock of who sets marks or takes them away, which may wait for
	// a file system. It is taken before mu.
	marking sync.Mutex
	marks   map[markID]*markState

	// mu is never held over what may wait: the stream takes it as it starts, and
	// whoever is asked waits for that. groups changes under both locks.
	mu     sync.Mutex
	closed bool
	groups [2]*fileGroup   // by FileVia; nil: not needed yet
	ctx    context.Context // nil: not running yet
	c      chan<- *FileEvent
}

// markID is an object with a mark in one of the groups.
type markID struct {
	via    FileVia
	typ    MarkType
	ignore bool
	object string
}

type markState struct {
	ops  FileOp
	fsid fsID
}

func newFileWatch(options *FileOptions, marks []Mark) (_ *fileWatch, err error) {
	w := &fileWatch{marks: map[markID]*markState{}, failed: make(chan error, len(fileWatch{}.groups))}
	if options != nil {
		w.options = *options
	}
	w.drain, w.empty = context.WithCancel(context.Background())
	if err := w.options.check(); err != nil {
		return nil, fileError("fanotify_init", "", err)
	}
	for i := range marks {
		if err := marks[i].check(&w.options); err != nil {
			return nil, fileError("fanotify_mark", marks[i].name(), err)
		}
	}
	if w.systems, err = newFileSystems(); err != nil {
		return nil, err
	}
	if w.options.Class.asks() {
		enterAskers()
	}
	if err = w.begin(marks); err == nil {
		err = w.add(marks)
	}
	if err != nil {
		if w.options.Group == nil {
			w.endAsking() // of marks that were set
		}
		w.giveBack()
		w.close()
		return nil, err
	}
	if w.options.Group != nil {
		w.options.Group.Close()
	}
	return w, nil
}

// begin makes the first group.
func (w *fileWatch) begin(marks []Mark) (err error) {
	var g *fileGroup
	switch {
	case w.options.Group != nil:
		g, w.blocking, err = adoptGroup(w.options.Group, &w.options)
	case w.options.Descriptors || w.options.Class.asks():
		g, err = newDescriptorGroup(&w.options)
	default:
		files := len(marks) == 0
		for i := range marks {
			files = files || marks[i].Ops&opSelf != 0
		}
		g, err = newHandleGroup(&w.options, files)
	}
	if err != nil {
		return err
	}
	w.first = g.via
	w.use(g)
	if w.options.Class.asks() {
		if w.access, err = newAccessList(g, g.flags, &w.options); err != nil {
			return err
		}
		w.asked = &permissionReaders{
			group: g, systems: w.systems, access: w.access, running: &w.readers, failed: w.failed,
			takesLong: readTakesLong, atOnce: readsAtOnce,
		}
	}
	if w.options.Group != nil {
		return w.adoptMarks(g)
	}
	return nil
}

// use makes g the group of its kind.
func (w *fileWatch) use(g *fileGroup) {
	w.groups[g.via] = g
	if g.via == ViaHandle {
		w.systems.queued = g.queued
	}
}

// giveBack leaves an adopted group as it was.
func (w *fileWatch) giveBack() {
	if w.blocking {
		w.groups[w.first].file.Control(func(fd int) { unix.SetNonblock(fd, false) })
	}
}

// run is the life of the stream.
func (w *fileWatch) run(ctx context.Context, c chan<- *FileEvent) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	w.mu.Lock()
	w.ctx, w.c = ctx, c
	for _, g := range w.groups {
		w.start(g)
	}
	w.mu.Unlock()
	err := error(nil)
	select {
	case <-ctx.Done():
		err = ctx.Err()
	case err = <-w.failed:
	case <-w.drain.Done():
	}
	if w.drain.Err() == nil {
		stop()
	}
	w.mu.Lock()
	w.closed = true // who sets marks goes on with the one in hand, if any
	w.mu.Unlock()
	w.endAsking() // before the lock, since that one may wait for a file system
	w.marking.Lock()
	w.endAsking() // of marks that were set meanwhile
	w.marking.Unlock()
	w.readers.Wait()
	w.endAsking() // of what a reader had in hand
	if w.access != nil {
		w.access.closer.running.Wait()
	}
	select {
	case err = <-w.failed: // before, or because of nothing but itself
	default:
		if w.drain.Err() != nil && !w.cut.Load() {
			err = io.EOF
		}
	}
	w.close()
	return err
}

// start reads from a group once the stream runs.
func (w *fileWatch) start(g *fileGroup) {
	if g == nil || w.ctx == nil {
		return
	}
	ctx, c := w.ctx, w.c
	if w.access != nil {
		w.access.start(ctx, c)
		w.asked.start(ctx)
		return
	}
	r := &fileReader{group: g, drain: w.drain, paths: newPathCache(w.systems), send: func(e *FileEvent) bool { return offer(ctx, c, e) }}
	w.readers.Go(func() {
		switch err := r.run(ctx); {
		case isOpError(err):
			w.failed <- err
		case err != io.EOF:
			w.cut.Store(true)
		}
	})
}

// endAsking answers all who wait, in the order in which nobody gets around the
// default answer: what is asked about after the marks are gone was let pass by
// the kernel anyway, and what is in the queue when the group is closed would be
// let pass. It does not wait for a reader, which may wait for a file system.
func (w *fileWatch) endAsking() {
	if w.access == nil {
		return
	}
	w.access.stopped()
	for _, t := range []MarkType{MarkInode, MarkMount, MarkFilesystem} {
		w.asked.group.flush(t)
	}
	w.access.end() // first, since a file system may hold up the next step
	w.asked.end()
	w.access.end()
}

// close lets go of everything.
func (w *fileWatch) close() {
	if w.options.Class.asks() {
		defer leaveAskers()
	}
	var fds []int
	for _, g := range w.groups {
		if g != nil {
			fds = append(fds, g.fd())
		}
	}
	quiet := w.systems.close()
	if quiet != nil {
		fds = append(fds, quiet.FD())
	}
	if fds == nil {
		return
	}
	fangroup.Close(fds, func() {
		for _, g := range w.groups {
			if g != nil {
				g.file.Close()
			}
		}
		if quiet != nil {
			quiet.Close()
		}
	})
}

// group returns a group of a kind, which it makes if need be.
func (w *fileWatch) group(via FileVia) (g *fileGroup, err error) {
	if g = w.groups[via]; g != nil {
		return g, nil
	}
	if via == ViaHandle {
		g, err = newHandleGroup(&w.options, true)
	} else {
		g, err = newDescriptorGroup(&w.options)
	}
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.use(g)
	w.start(g)
	return g, nil
}

// add sets marks, or none of them.
func (w *fileWatch) add(marks []Mark) error {
	// All are looked up before the first is set: that may take a file system long,
	// and whoever is asked about the first of a watcher that is not running yet
	// would wait. So would those who set others.
	targets := make([]*markTarget, len(marks))
	for i := range marks {
		target, err := w.lookUp(&marks[i])
		if err != nil {
			return markError(&marks[i], err)
		}
		defer target.close()
		targets[i] = target
	}
	w.marking.Lock()
	defer w.marking.Unlock()
	var undo []func()
	for i := range marks {
		err := w.alive()
		if err == nil {
			err = w.addOne(&marks[i], targets[i], &undo)
		}
		if err != nil {
			for _, u := range slices.Backward(undo) {
				u()
			}
			return markError(&marks[i], err)
		}
	}
	return nil
}

func markError(m *Mark, err error) error {
	op := "fanotify_mark"
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		op = call.Syscall
	}
	if isOpError(err) {
		return err
	}
	return fileError(op, m.name(), err)
}

// lookUp returns the object of a mark that can be set. It may wait for a file
// system, and is called without the lock.
func (w *fileWatch) lookUp(m *Mark) (*markTarget, error) {
	if err := w.alive(); err != nil {
		return nil, err
	}
	if err := m.check(&w.options); err != nil {
		return nil, err
	}
	return m.target()
}

// alive returns os.ErrClosed after the end of the stream.
func (w *fileWatch) alive() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return os.ErrClosed
	}
	return nil
}

// addOne sets one mark. undo gets what takes it away again, for which target
// must be open.
func (w *fileWatch) addOne(m *Mark, target *markTarget, undo *[]func()) error {
	descriptor := m.Ops & w.options.Class.ops()
	if w.first == ViaHandle {
		err := w.set(ViaHandle, m, m.Ops, target, undo)
		switch {
		case err == nil && m.Ignore != NoIgnore && descriptor != 0:
			return m.explain(w.ignoreThere(m, descriptor, target, undo), target)
		case err == nil:
			return nil
		case !target.withoutHandles(err):
			return m.explain(err, target)
		case m.Ops != descriptor:
			return target.refuse(m, err)
		}
	} else if m.Ops != descriptor {
		return errCannot("%v come without a descriptor, and the group of this watcher is of descriptors", m.Ops&^descriptor)
	}
	return m.explain(w.set(ViaDescriptor, m, m.Ops, target, undo), target)
}

// ignoreThere sets an ignore mark in the descriptor group, too, if what it takes away
// comes from there, or may once another mark of that file system is set.
func (w *fileWatch) ignoreThere(m *Mark, ops FileOp, target *markTarget, undo *[]func()) error {
	if w.groups[ViaDescriptor] == nil && w.systems.told(target.fsid) {
		return nil // all marks of it go to the handle group
	}
	err := w.set(ViaDescriptor, m, ops, target, undo)
	if w.groups[ViaDescriptor] == nil && errors.Is(err, fs.ErrPermission) {
		return nil // so there will be none
	}
	return err
}

// withoutHandles tells whether a mark failed because the file system has no
// handles, or none that serve for a mark of this type.
func (t *markTarget) withoutHandles(err error) bool {
	return t.unidentified != nil || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EXDEV)
}

// refuse is the error of a mark that neither group can carry.
func (t *markTarget) refuse(m *Mark, err error) error {
	name := "the file system"
	eachMount(func(row *procfs.MountInfo) bool {
		found := uint64(row.ID) == t.mountID
		if found {
			name = row.FSType
		}
		return !found
	})
	return fmt.Errorf("%w: %s does not support file handles for a mark of the type %v, and %v need them: %w",
		os.NewSyscallError("fanotify_mark", err), name, m.Type, m.Ops&^opDescriptor, errors.ErrUnsupported)
}

// set sets a mark in one of the groups. undo gets what takes it away again.
func (w *fileWatch) set(via FileVia, m *Mark, ops FileOp, target *markTarget, undo *[]func()) error {
	g, err := w.group(via)
	if err != nil {
		return err
	}
	if via == ViaHandle {
		if self := ops & opSelf; self != 0 && g.flags&reportFiles == 0 {
			return errCannot("%v may come without a directory to name the file by: this watcher was started without a mark for that", self)
		}
		w.systems.enter(target)
		defer w.systems.hold(target.fsid, -1)
	}
	flags := m.Type.flags() | m.Ignore.flags() | m.Flags.flags()&unix.FAN_MARK_EVICTABLE
	if err := g.mark(unix.FAN_MARK_ADD|flags, ops, target); err != nil {
		return err
	}
	id := markID{via, m.Type, m.Ignore != NoIgnore, target.object(m.Type)}
	state := w.marks[id]
	if state == nil {
		state = &markState{fsid: target.fsid}
		w.marks[id] = state
		if via == ViaHandle {
			w.systems.hold(target.fsid, 1)
		}
	}
	added := ops &^ state.ops
	state.ops |= ops
	*undo = append(*undo, func() {
		if added != 0 && g.mark(unix.FAN_MARK_REMOVE|flags&^unix.FAN_MARK_EVICTABLE, added, target) == nil {
			w.forget(id, added)
		}
	})
	return nil
}

// forget takes operations from what is known of a mark.
func (w *fileWatch) forget(id markID, ops FileOp) {
	state := w.marks[id]
	if state == nil {
		return
	}
	if state.ops &^= ops; state.ops&^opModifiers != 0 {
		return
	}
	delete(w.marks, id)
	if id.via == ViaHandle {
		w.systems.hold(state.fsid, -1)
	}
}

func (w *fileWatch) remove(marks []Mark) error {
	for i := range marks {
		if err := w.removeOne(&marks[i]); err != nil {
			return markError(&marks[i], err)
		}
	}
	return nil
}

func (w *fileWatch) removeOne(m *Mark) error {
	if err := w.alive(); err != nil {
		return err
	}
	if err := m.checkForm(); err != nil {
		return err
	}
	target, err := m.target() // without the lock, as in add
	if err != nil {
		return err
	}
	defer target.close()
	w.marking.Lock()
	defer w.marking.Unlock()
	if err := w.alive(); err != nil {
		return err
	}
	err = os.NewSyscallError("fanotify_mark", unix.ENOENT)
	for _, g := range w.groups {
		ops := m.Ops
		if g != nil && g.via == ViaDescriptor && w.first == ViaHandle {
			ops &= opDescriptor
		}
		if g == nil || ops == 0 {
			continue
		}
		switch rerr := g.mark(unix.FAN_MARK_REMOVE|m.Type.flags()|m.Ignore.flags(), ops, target); {
		case rerr == nil:
			w.forget(markID{g.via, m.Type, m.Ignore != NoIgnore, target.object(m.Type)}, ops)
			err = nil
		case !errors.Is(rerr, unix.ENOENT) && !target.withoutHandles(rerr):
			return m.explain(rerr, target)
		}
	}
	return err
}

func (w *fileWatch) flush(t MarkType) error {
	if err := t.check(); err != nil {
		return fileError("fanotify_mark", "", err)
	}
	w.marking.Lock()
	defer w.marking.Unlock()
	if err := w.alive(); err != nil {
		return fileError("fanotify_mark", "", err)
	}
	for _, g := range w.groups {
		if g == nil {
			continue
		}
		if err := g.flush(t); err != nil {
			return fileError("fanotify_mark", "", err)
		}
	}
	for id := range w.marks {
		if id.typ == t {
			w.forget(id, ^FileOp(0))
		}
	}
	return nil
}

func (w *fileWatch) startDrain() error {
	if w.access != nil {
		return fileError("drain", "", fmt.Errorf("who waits for an answer gets it by Close: %w", errors.ErrUnsupported))
	}
	if w.drain.Err() != nil {
		return nil
	}
	for _, t := range []MarkType{MarkInode, MarkMount, MarkFilesystem} {
		if err := w.flush(t); err != nil {
			if w.drain.Err() != nil {
				return nil // somebody else was faster
			}
			return err
		}
	}
	w.empty()
	return nil
}

func (w *fileWatch) control(use func(fd int)) error {
	w.mu.Lock()
	closed, groups := w.closed, w.groups
	w.mu.Unlock()
	if closed {
		return fileError("control", "", os.ErrClosed)
	}
	for _, g := range groups {
		if g == nil {
			continue
		}
		if err := g.file.Control(use); err != nil {
			return fileError("control", "", err)
		}
	}
	return nil
}
