package kernstream

import (
	"context"
	"os"
	"os/exec"
	"syscall"
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

// ProcessWatcherOptions says how a ProcessWatcher works. It has no fields: what a
// watch does is in [ProcessOptions].
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
	err = w.feed.enter(target, opened, func(p *process, _ *departures) {
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
	return w.watchOpened(target, opened, options)
}

func (w *ProcessWatcher) watchOpened(target Target, opened openProcess, options *ProcessOptions) (*Watch, error) {
	watch := newWatch(w.feed, options)
	err := w.feed.enter(target, opened, func(p *process, d *departures) { w.feed.add(watch, p, d) })
	if err != nil {
		return nil, err
	}
	return watch, nil
}

// Start starts cmd and watches it. The kernel makes the pidfd together with the
// process, so there is no moment in which another process could have its
// number. The caller still has to call cmd.Wait, before or after the events.
//
// While this program has a watcher of files whose class is not
// ClassNotification, Start is refused with an error that Is unix.EDEADLK: see
// [WatchFiles].
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
	if askers.RLock(); askers.n > 0 {
		askers.RUnlock()
		return nil, processError("start", cmd.Path, errAsker)
	}
	opened, err := target.open()
	askers.RUnlock()
	if err != nil {
		return nil, err
	}
	return w.watchOpened(target, opened, options)
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
