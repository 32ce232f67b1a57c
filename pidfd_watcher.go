package kernstream

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// A ProcessWatcher tells the ends of many processes on one channel.
//
// A slow consumer loses nothing: what is known of a process is kept in its
// watch, of which two events at most wait to be received, however long that
// takes, and no watch holds up another. The events of one process come in the
// order of the phases, those of several in the order in which the kernel
// reported them.
//
// The stream ends when its context is done or by Close, never by itself: there
// may be more to watch. Then all its watches and Processes have ended.
type ProcessWatcher struct {
	*Stream[*ProcessEvent]
	feed *processFeed
}

// ProcessWatcherOptions says how a ProcessWatcher works. There is nothing to
// say yet.
type ProcessWatcherOptions struct{}

// NewProcessWatcher returns a watcher without watches, which runs until ctx is
// done. It costs one goroutine; each watch costs less than a third of a KiB and
// no goroutine, and each process one descriptor, which all watches of the
// program share. Options may be nil. The only error is the cause of a context
// that is done already.
func NewProcessWatcher(ctx context.Context, options *ProcessWatcherOptions) (*ProcessWatcher, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	feed := &processFeed{table: processes, wake: make(chan struct{}, 1)}
	return &ProcessWatcher{
		Stream: newStream(ctx, 0, func(ctx context.Context, r *run[*ProcessEvent]) error {
			return feed.run(ctx, r.c)
		}),
		feed: feed,
	}, nil
}

// Open pins a process, which may be a zombie: from then on it can be watched at
// any time, also when it is long gone, and is never mistaken for another. The
// errors are those of [WatchProcess]; after the end of the watcher, the error Is
// os.ErrClosed.
func (w *ProcessWatcher) Open(target Target) (*Process, error) {
	opened, err := openTarget(target, nil)
	if err != nil {
		return nil, err
	}
	h := &Process{name: target.String(), feed: w.feed}
	err = w.feed.enter(h.name, opened, func(p *process, _ *departures) {
		h.process = p
		p.handles++
		w.feed.handles.add(h)
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

// Watch begins to watch a process, once more if it is watched already. Its
// events come on C. Options may be nil. The errors are those of [WatchProcess];
// after the end of the watcher, the error Is os.ErrClosed.
func (w *ProcessWatcher) Watch(target Target, options *ProcessOptions) (*Watch, error) {
	opened, err := openTarget(target, options)
	if err != nil {
		return nil, err
	}
	return w.watchOpened(target.String(), opened, options)
}

func (w *ProcessWatcher) watchOpened(name string, opened openProcess, options *ProcessOptions) (*Watch, error) {
	watch := newWatch(w.feed, options)
	err := w.feed.enter(name, opened, func(p *process, d *departures) { w.feed.add(watch, p, d) })
	if err != nil {
		return nil, err
	}
	return watch, nil
}

// Start starts cmd and watches it. The kernel makes the pidfd together with the
// process, so there is no moment in which another process could have its
// number. The caller still has to call cmd.Wait, before or after the events.
//
// If cmd was started but cannot be watched (for want of descriptors, or because
// the watcher has ended meanwhile), there is an error, and cmd.Process is set.
func (w *ProcessWatcher) Start(cmd *exec.Cmd, options *ProcessOptions) (*Watch, error) {
	target := commandTarget{cmd}
	if err := options.check(target); err != nil {
		return nil, err
	}
	if err := w.feed.running(target.String()); err != nil {
		return nil, err
	}
	opened, err := target.open()
	if err != nil {
		return nil, err
	}
	return w.watchOpened(target.String(), opened, options)
}

// A commandTarget is a process that is started by being opened.
type commandTarget struct{ cmd *exec.Cmd }

func (t commandTarget) String() string {
	if t.cmd.Process != nil {
		return processName(t.cmd.Process.Pid)
	}
	return t.cmd.Path
}

func (t commandTarget) open() (openProcess, error) {
	// The attributes are the caller's, who may use them for other commands.
	theirs := t.cmd.SysProcAttr
	attributes := syscall.SysProcAttr{}
	if theirs != nil {
		attributes = *theirs
	}
	fd := -1
	attributes.PidFD = &fd
	t.cmd.SysProcAttr = &attributes
	err := t.cmd.Start()
	t.cmd.SysProcAttr = theirs
	if err != nil {
		return openProcess{}, processError("start", t.cmd.Path, err)
	}
	if fd < 0 {
		// A sandbox without CLONE_PIDFD. Nobody has waited for the child yet.
		return OfProcess(t.cmd.Process).open()
	}
	if theirs != nil && theirs.PidFD != nil {
		if *theirs.PidFD, err = duplicate(uintptr(fd)); err != nil {
			*theirs.PidFD = -1
		}
	}
	return newOpenProcess(fd, t.cmd.Process.Pid), nil
}

// A Process is one that a ProcessWatcher has pinned. Close lets go of it; so
// does the end of the watcher.
type Process struct {
	name    string
	feed    *processFeed
	process *process
	closed  bool
}

// ID returns what tells the process from all others.
func (h *Process) ID() ProcessID {
	h.feed.table.mu.Lock()
	defer h.feed.table.mu.Unlock()
	return h.process.processID()
}

// Watch begins to watch the process, for the first time or once more. What has
// come to pass already is told at once. Options may be nil. The error Is
// os.ErrClosed after Close and after the end of the watcher.
func (h *Process) Watch(options *ProcessOptions) (*Watch, error) {
	if err := options.check(pidTarget(h.process.pid)); err != nil {
		return nil, err
	}
	t := h.feed.table
	watch := newWatch(h.feed, options)
	var d departures
	t.mu.Lock()
	closed := h.closed
	if !closed {
		h.feed.add(watch, h.process, &d)
	}
	t.mu.Unlock()
	t.depart(&d)
	if closed {
		return nil, processError("watch", h.name, os.ErrClosed)
	}
	return watch, nil
}

// Close lets go of the process. Its watches go on. It may be called again, and
// returns nil.
func (h *Process) Close() error {
	t := h.feed.table
	var d departures
	t.mu.Lock()
	h.feed.release(h, &d)
	t.mu.Unlock()
	t.depart(&d)
	return nil
}

// A Watch is one watch of a ProcessWatcher. It ends with the event of the last
// phase that was asked for, by Stop, and with the watcher.
type Watch struct {
	process *process
	feed    *processFeed   // whose channel the events go to, or
	stream  *processStream // that this is part of
	tag     any

	until  uint8 // how many phases are to be told
	told   uint8 // how many were: received, or sent to a channel that has room
	hooked bool  // it waits for its process
	queued bool  // it waits for the consumer
	ended  bool

	links [3]watchLinks
}

func newWatch(feed *processFeed, options *ProcessOptions) *Watch {
	w := &Watch{feed: feed}
	w.init(options)
	return w
}

func (w *Watch) init(options *ProcessOptions) {
	w.until = uint8(Exited) + 1
	if options != nil {
		w.until = uint8(options.Until) + 1
		w.tag = options.Tag
	}
}

// ID returns what tells the process from all others.
func (w *Watch) ID() ProcessID {
	w.feed.table.mu.Lock()
	defer w.feed.table.mu.Unlock()
	return w.process.processID()
}

// Stop ends the watch. When it returns, nothing more of it is delivered. received
// tells that all its events had been received before, so that there was nothing
// to stop. It may be called again, at any time and from anywhere.
func (w *Watch) Stop() (received bool) { return w.feed.stop(w) }

// pending is how many phases were seen and have not been told.
func (w *Watch) pending() int { return int(min(w.process.known, w.until)) - int(w.told) }

// event returns the next event to tell.
func (w *Watch) event() *ProcessEvent {
	end := w.process.end
	e := &ProcessEvent{
		When:        end.when[w.told],
		Process:     end.id,
		Phase:       Phase(w.told),
		StatusKnown: end.statusKnown,
		Status:      syscall.WaitStatus(end.status),
		Tag:         w.tag,
	}
	if w.feed != nil {
		e.Watch = w
	}
	return e
}

// The lists that a watch may be in.
const (
	ofProcess = iota // waits for a phase of the process
	ofOwner          // of the ProcessWatcher, of a context, or to be closed
	ofQueue          // waits for the consumer
)

// A watchList is a list of watches through one of their links.
type watchList struct{ first, last *Watch }

type watchLinks struct{ previous, next *Watch }

func (l *watchList) push(w *Watch, as int) {
	w.links[as] = watchLinks{previous: l.last}
	if l.last == nil {
		l.first = w
	} else {
		l.last.links[as].next = w
	}
	l.last = w
}

func (l *watchList) remove(w *Watch, as int) {
	links := w.links[as]
	if links.previous == nil {
		l.first = links.next
	} else {
		links.previous.links[as].next = links.next
	}
	if links.next == nil {
		l.last = links.previous
	} else {
		links.next.links[as].previous = links.previous
	}
	w.links[as] = watchLinks{}
}

// processHandles are the Processes of a watcher.
type processHandles map[*Process]struct{}

func (s *processHandles) add(h *Process) {
	if *s == nil {
		*s = processHandles{}
	}
	(*s)[h] = struct{}{}
}

// A processFeed is what stands between the table and the channel of a
// ProcessWatcher: the watches that have something to tell, first come, first
// served. Its goroutine offers the event of the first one to the consumer, if
// that was not waiting already.
// The fields are guarded by the lock of the table.
type processFeed struct {
	table *processTable
	wake  chan struct{}        // has a token when the offer is to be looked at again
	c     chan<- *ProcessEvent // nil before run; nobody sends once closed is set

	watches watchList // that have not ended
	ready   watchList // that have something to tell
	offered *Watch    // whose event the goroutine offers
	handles processHandles
	closed  bool
	err     error // of the table
}

// run offers events to the consumer until ctx is done.
func (f *processFeed) run(ctx context.Context, c chan<- *ProcessEvent) error {
	defer f.close()
	f.table.mu.Lock()
	f.c = c
	f.table.mu.Unlock()
	for sent := false; ctx.Err() == nil; {
		event, err := f.next(sent)
		if err != nil {
			return err
		}
		out := c
		if event == nil {
			out = nil
		}
		sent = false
		select {
		case out <- event:
			sent = true
		case <-f.wake:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// next returns the event to offer, or nil; sent tells that the one before was
// received.
func (f *processFeed) next(sent bool) (*ProcessEvent, error) {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	f.conclude(sent)
	w := f.ready.first
	if w == nil {
		return nil, nil
	}
	f.offered = w
	return w.event(), nil
}

// conclude notes what became of the offer.
func (f *processFeed) conclude(sent bool) {
	w := f.offered
	if w == nil {
		return
	}
	f.offered = nil
	if sent {
		f.received(w)
	}
	f.table.changed.Broadcast()
}

// received notes that an event of w was.
func (f *processFeed) received(w *Watch) {
	w.told++
	if w.queued && w.pending() == 0 {
		f.unqueue(w)
	}
	if w.told == w.until && !w.ended {
		w.ended = true
		f.watches.remove(w, ofOwner)
	}
}

// queue hands what w has to tell to the consumer, if that is waiting and
// nobody is before w: no other goroutine has to wake up for it. Otherwise it lets
// w wait.
func (f *processFeed) queue(w *Watch) {
	if w.queued {
		return
	}
	for ahead := f.offered != nil || f.ready.first != nil; !ahead; {
		select {
		case f.c <- w.event():
			f.received(w)
			if w.pending() == 0 {
				return
			}
		default:
			ahead = true
		}
	}
	w.queued = true
	f.ready.push(w, ofQueue)
	if f.ready.first == w {
		f.kick()
	}
}

func (f *processFeed) unqueue(w *Watch) {
	w.queued = false
	f.ready.remove(w, ofQueue)
}

// kick lets the goroutine look at its offer again.
func (f *processFeed) kick() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// fail ends the stream with an error of the table.
func (f *processFeed) fail(err error) {
	f.err = err
	f.kick()
}

// running returns an error after the end of the stream.
func (f *processFeed) running(name string) error {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	if f.closed {
		return processError("watch", name, os.ErrClosed)
	}
	return nil
}

// enter calls use with the entry of a process that was opened.
func (f *processFeed) enter(name string, o openProcess, use func(*process, *departures)) error {
	t := f.table
	var d departures
	var err error
	t.mu.Lock()
	if f.closed {
		unix.Close(o.fd)
		err = os.ErrClosed
	} else {
		var p *process
		if p, err = t.enter(o); err == nil {
			use(p, &d)
		} else {
			t.settleSet(&d)
		}
	}
	t.mu.Unlock()
	t.depart(&d)
	if err != nil {
		return processError(operation(err, "watch"), name, err)
	}
	return nil
}

// add lets w watch p.
func (f *processFeed) add(w *Watch, p *process, d *departures) {
	f.watches.push(w, ofOwner)
	f.table.hook(w, p, d)
}

// end takes w out of everything.
func (f *processFeed) end(w *Watch, d *departures) {
	if w.ended {
		return
	}
	w.ended = true
	f.watches.remove(w, ofOwner)
	if w.queued {
		f.unqueue(w)
	}
	f.table.unhook(w)
	f.table.settle(w.process, d)
}

func (f *processFeed) stop(w *Watch) (received bool) {
	t := f.table
	var d departures
	t.mu.Lock()
	f.end(w, &d)
	// Its event may be on offer: it is received or withdrawn, soon.
	for f.offered == w {
		f.kick()
		t.changed.Wait()
	}
	received = w.told == w.until
	t.mu.Unlock()
	t.depart(&d)
	return received
}

// release lets go of a Process.
func (f *processFeed) release(h *Process, d *departures) {
	if h.closed {
		return
	}
	h.closed = true
	delete(f.handles, h)
	h.process.handles--
	f.table.settle(h.process, d)
}

// close ends all watches and lets go of all Processes.
func (f *processFeed) close() {
	t := f.table
	for more := true; more; {
		var d departures
		t.mu.Lock()
		f.closed = true
		f.conclude(false)
		for h := range f.handles {
			f.release(h, &d)
		}
		for range batch {
			if f.watches.first == nil {
				break
			}
			f.end(f.watches.first, &d)
		}
		more = f.watches.first != nil
		t.mu.Unlock()
		t.depart(&d)
	}
}

func processName(pid int) string { return fmt.Sprint("process ", pid) }
