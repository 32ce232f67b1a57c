package kernstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fangroup"
	"github.com/kernstream/kernstream/internal/fanotify"
	"github.com/kernstream/kernstream/poller"
)

// A fileGroup is one fanotify group and what is read from it.
type fileGroup struct {
	file  *poller.File
	flags uint // of fanotify_init(2)
	via   FileVia
	keep  bool // events keep their descriptors
	buf   []byte
}

// What a group reports beside the mask, and needs a handle for.
const (
	reportNames = unix.FAN_REPORT_DFID_NAME
	reportFiles = unix.FAN_REPORT_FID
)

// batchBytes is how much is read at once: more is no faster.
const batchBytes = 64 << 10

// newHandleGroup makes the group for events with handles. Without files the
// events that no directory names (see opSelf) are not reported, and the others
// are cheaper.
func newHandleGroup(options *FileOptions, files bool) (*fileGroup, error) {
	flags := options.initFlags() | reportNames
	if files {
		flags |= reportFiles
	}
	fd, err := fangroup.Init(flags, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, options.explain(err, ViaHandle)
	}
	return newFileGroup(fd, flags, options)
}

// newDescriptorGroup makes the group for events with descriptors. Since Linux
// 6.13 the kernel says for each event why it has none.
func newDescriptorGroup(options *FileOptions) (*fileGroup, error) {
	flags := options.initFlags() | unix.FAN_REPORT_FD_ERROR
	eventFlags := uint(options.EventFlags | unix.O_CLOEXEC | unix.O_LARGEFILE)
	fd, err := fangroup.Init(flags, eventFlags)
	if err == unix.EINVAL {
		flags &^= unix.FAN_REPORT_FD_ERROR
		fd, err = fangroup.Init(flags, eventFlags)
	}
	if err != nil {
		return nil, options.explain(err, ViaDescriptor)
	}
	return newFileGroup(fd, flags, options)
}

// newFileGroup takes over the descriptor of a group with flags.
func newFileGroup(fd int, flags uint, options *FileOptions) (*fileGroup, error) {
	g := &fileGroup{flags: flags, via: ViaDescriptor, keep: options.Descriptors}
	if flags&(reportNames|reportFiles) != 0 {
		g.via = ViaHandle
	}
	g.buf = make([]byte, g.batch())
	file, err := poller.New(fd, "fanotify")
	if err != nil {
		return nil, fileError(operation(err, "open"), "fanotify", withLimit(err))
	}
	g.file = file
	return g, nil
}

// fd returns the number of the group's descriptor.
func (g *fileGroup) fd() int {
	number := -1
	g.file.Control(func(fd int) { number = fd })
	return number
}

// queued tells whether there is something to read.
func (g *fileGroup) queued() bool {
	n := 0
	g.file.Control(func(fd int) { n, _ = unix.IoctlGetInt(fd, unix.TIOCINQ) })
	return n > 0
}

// batch returns how many bytes to read at once. A read makes the descriptors and
// pidfds of all its events, so there is a limit to what may be read at once; and
// where the kernel does not tell of a descriptor that it could not make, it does at
// least for the first event of a read.
func (g *fileGroup) batch() int {
	switch {
	case g.via == ViaHandle && g.flags&unix.FAN_REPORT_PIDFD != 0:
		const least = 60 // of an event with a handle and a pidfd
		return max(atMost(128)*least, fanotify.MaxEventSize)
	case g.via == ViaHandle:
		return batchBytes
	case g.flags&unix.FAN_REPORT_FD_ERROR == 0:
		return g.eventSize()
	}
	return atMost(128) * g.eventSize()
}

// leastSize is what an event with a descriptor takes at least.
func (g *fileGroup) leastSize() int {
	size := 24
	if g.flags&unix.FAN_REPORT_PIDFD != 0 {
		size += 8
	}
	return size
}

// eventSize is what an event with a descriptor takes at most.
func (g *fileGroup) eventSize() int {
	size := g.leastSize()
	if g.flags&unix.FAN_CLASS_PRE_CONTENT != 0 {
		size += 24 // the range
	}
	return size
}

// atMost is how many descriptors may be made at once: n, or less where there
// cannot be many.
func atMost(n int) int {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		n = int(min(uint64(n), max(limit.Cur/8, 1)))
	}
	return n
}

func (o *FileOptions) initFlags() uint {
	flags := unix.FAN_CLOEXEC | unix.FAN_NONBLOCK | o.Class.flags()
	for _, f := range []struct {
		set  bool
		flag uint
	}{
		{o.ReportTID, unix.FAN_REPORT_TID},
		{o.ReportPidFD, unix.FAN_REPORT_PIDFD},
		{o.UnlimitedQueue || o.Class.asks(), unix.FAN_UNLIMITED_QUEUE},
		{o.UnlimitedMarks, unix.FAN_UNLIMITED_MARKS},
		{o.Audit, unix.FAN_ENABLE_AUDIT},
	} {
		if f.set {
			flags |= f.flag
		}
	}
	return flags
}

// explain adds to an error of fanotify_init(2) what the kernel does not say.
func (o *FileOptions) explain(err error, via FileVia) error {
	call := os.NewSyscallError("fanotify_init", err)
	switch {
	case err == unix.EPERM:
		var needs []string
		for _, need := range []struct {
			used bool
			what string
		}{
			{o.Class.asks(), "events that wait for an answer"},
			{via == ViaDescriptor && !o.Class.asks(), "events with descriptors"},
			{o.Audit, "Audit (and CAP_AUDIT_WRITE)"},
			{o.ReportTID, "ReportTID"},
			{o.ReportPidFD, "ReportPidFD"},
			{o.UnlimitedQueue, "UnlimitedQueue"},
			{o.UnlimitedMarks, "UnlimitedMarks"},
		} {
			if need.used {
				needs = append(needs, need.what)
			}
		}
		switch {
		case needs == nil && kernelOlder(5, 13):
			needs = []string{"fanotify before Linux 5.13"}
		case needs == nil: // the kernel asks for nothing
			return fileError("fanotify_init", "", fmt.Errorf("%w: a sandbox (seccomp) forbids it", call))
		}
		call = fmt.Errorf("%w: CAP_SYS_ADMIN is missing, for %s", call, strings.Join(needs, ", "))
	case err == unix.EMFILE:
		call = fmt.Errorf("%w: descriptors have run out, or all groups of the user are taken (%s)", call, sysctlText("fs/fanotify/max_user_groups"))
	case err == unix.ENOSYS:
		call = fmt.Errorf("%w: the kernel was built without fanotify, or a sandbox (seccomp) forbids it", call)
	case err == unix.EINVAL && o.ReportTID && o.ReportPidFD:
		call = fmt.Errorf("%w: this kernel reports either the thread or a pidfd: %w", call, errors.ErrUnsupported)
	case err == unix.EINVAL && o.ReportPidFD && kernelOlder(5, 15):
		call = fmt.Errorf("%w: ReportPidFD needs Linux 5.15: %w", call, errors.ErrUnsupported)
	case err == unix.EINVAL && via == ViaHandle && kernelOlder(5, 9):
		call = fmt.Errorf("%w: names need Linux 5.9: %w", call, errors.ErrUnsupported)
	}
	return fileError("fanotify_init", "", call)
}

// A fileReader turns what is read from one group into events.
type fileReader struct {
	group *fileGroup
	paths *pathCache
	drain context.Context // done: read what there is, and end
	send  func(*FileEvent) bool
	when  time.Time // of the batch
}

// run reads until ctx is done, or the group cannot be read any more. When the queue
// is to be drained and is empty, it returns io.EOF.
func (r *fileReader) run(ctx context.Context) error {
	for _, end := range []context.Context{ctx, r.drain} {
		defer r.group.file.CancelOn(end)()
	}
	defer r.paths.close()
	for {
		n, err := r.read()
		r.when = time.Now()
		switch {
		case ctx.Err() != nil:
			r.discard(r.group.buf[:n])
			err = ctx.Err()
		case err == nil:
			err = r.deliver(r.group.buf[:n])
		case err == os.ErrDeadlineExceeded && r.drain.Err() != nil:
			err = io.EOF
		default:
			err = r.lost(err)
		}
		if n > 0 {
			r.paths.systems.delivered()
		}
		if err != nil {
			return err
		}
	}
}

// read waits for events and reads them. What is needed for their paths stays
// until fileSystems.delivered is called, if there are any.
func (r *fileReader) read() (n int, err error) {
	err = r.group.file.Wait(func(fd int) (bool, error) {
		n, err = r.paths.systems.read(fd, r.group.buf)
		if err == unix.EAGAIN {
			return false, nil
		}
		return true, os.NewSyscallError("read", err)
	})
	return n, err
}

var errStopped = errors.New("the stream is to end")

// deliver sends the events in b.
func (r *fileReader) deliver(b []byte) error {
	r.paths.begin()
	for len(b) > 0 {
		e, rest, err := fanotify.Next(b)
		if err != nil {
			return fileError("read", "fanotify", err)
		}
		if !r.send(r.event(e)) {
			r.discard(rest)
			return errStopped
		}
		b = rest
	}
	return nil
}

// lost reports an event whose descriptor could not be made. The kernel has
// dropped it.
func (r *fileReader) lost(err error) error {
	call, ok := errors.AsType[*os.SyscallError](err)
	if !ok {
		return fileError("read", "fanotify", err)
	}
	if !consumed(err) {
		return fileError("read", "fanotify", call) // nothing will change that
	}
	e := &FileEvent{When: r.when, Via: r.group.via, Err: noDescriptor(call.Err)}
	if !r.send(e) {
		return errStopped
	}
	return nil
}

// consumed tells whether an error of reading is that of one event, which is gone
// with it.
func consumed(err error) bool {
	return !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.EINVAL)
}

// noDescriptor is the error of an event without the descriptor that it should
// have.
func noDescriptor(err error) error {
	return fileError("read", "fanotify", fmt.Errorf("the kernel could not open the file of an event: %w", os.NewSyscallError("open", err)))
}

// discard closes the descriptors of events that nobody gets.
func (r *fileReader) discard(b []byte) {
	for len(b) > 0 {
		e, rest, err := fanotify.Next(b)
		if err != nil {
			return
		}
		b = rest
		discardEvent(e)
	}
}

func discardEvent(e fanotify.Event) {
	discardProcess(e)
	if e.FD() >= 0 {
		unix.Close(e.FD())
	}
}

func discardProcess(e fanotify.Event) {
	var info fanotify.Info
	e.Decode(&info)
	if info.PidFD >= 0 {
		unix.Close(int(info.PidFD))
	}
}

// event makes an event of what the kernel wrote.
func (r *fileReader) event(raw fanotify.Event) *FileEvent {
	var info fanotify.Info
	err := raw.Decode(&info)
	var e *FileEvent
	switch {
	case raw.Overflow():
		// What is in the cache may be of before a rename that was lost.
		r.paths.drop()
		e = &FileEvent{}
	case r.group.via == ViaHandle && FileOp(raw.Mask()).Has(OpMoveSelf|OpOnDir):
		// The kernel may have told this group before the quiet one.
		r.paths.drop()
		e = r.handleEvent(&info)
	case r.group.via == ViaDescriptor:
		e = r.descriptorEvent(raw)
	default:
		e = r.handleEvent(&info)
	}
	r.fill(e, raw, &info, err)
	return e
}

// fill says in e what the kernel wrote, but for the object. err is what was odd.
func (r *fileReader) fill(e *FileEvent, raw fanotify.Event, info *fanotify.Info, err error) {
	e.When, e.Via, e.Ops = r.when, r.group.via, FileOp(raw.Mask())
	if e.Ops.Has(OpDeleteSelf) && (e.PathState == PathExact || e.PathState == PathUnknown) {
		e.PathState = PathDeleted
	}
	e.Errno, e.Count = info.Errno, info.ErrorCount
	e.Offset, e.Length = info.Offset, info.Count
	if r.group.flags&unix.FAN_REPORT_TID != 0 {
		e.TID = raw.PID()
	} else {
		e.PID = raw.PID()
	}
	if r.group.flags&unix.FAN_REPORT_PIDFD != 0 && !raw.Overflow() {
		e.setPidfd(int(info.PidFD))
	} else if info.PidFD >= 0 {
		unix.Close(int(info.PidFD))
	}
	if err != nil {
		e.Err = fileError("read", "fanotify", err)
	}
}

// handleEvent makes an event of what the records name.
func (r *fileReader) handleEvent(info *fanotify.Info) *FileEvent {
	switch {
	case info.NewDir.Present():
		e := r.entryEvent(&info.NewDir)
		e.OldPath = r.oldPath(info)
		return e
	case info.OldDir.Present():
		return &FileEvent{OldPath: r.oldPath(info)}
	case info.Dir.Present():
		return r.entryEvent(&info.Dir)
	case info.Object.Present() && len(info.Object.Handle()) > 0:
		found := r.paths.file(info.Object.Key)
		e := &FileEvent{Path: found.path, PathState: found.state}
		e.setPathErr(found.err)
		return e
	}
	return &FileEvent{} // an error of the file system as a whole
}

// entryEvent makes an event about an entry of a directory.
func (r *fileReader) entryEvent(dir *fanotify.FID) *FileEvent {
	found := r.paths.directory(dir.Key)
	e := newFileEvent(found.path, dir.Name)
	e.PathState = found.state
	e.setPathErr(found.err)
	return e
}

func (r *fileReader) oldPath(info *fanotify.Info) string {
	if !info.OldDir.Present() {
		return ""
	}
	found := r.paths.directory(info.OldDir.Key)
	if found.path == "" {
		return string(info.OldDir.Name)
	}
	return newFileEvent(found.path, info.OldDir.Name).Path
}

// descriptorEvent makes an event of a descriptor.
func (r *fileReader) descriptorEvent(raw fanotify.Event) *FileEvent {
	if errno := raw.FDError(); errno != 0 {
		return &FileEvent{Err: noDescriptor(errno)}
	}
	fd := raw.FD()
	if fd < 0 {
		return &FileEvent{}
	}
	found := r.paths.open(fd)
	e := &FileEvent{Path: found.path, PathState: found.state}
	e.setPathErr(found.err)
	if r.group.keep {
		e.own = &fileDescriptors{fd: fd, pidfd: -1}
	} else {
		unix.Close(fd)
	}
	return e
}

func (e *FileEvent) setPathErr(err error) {
	if err != nil {
		e.Err = pathError(err)
	}
}
