package kernstream

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// File-system events, by way of fanotify(7).
//
// What needs which kernel: marks of inodes by any user, and names in events, work
// from Linux 5.13 on, and from 5.10 on with CAP_SYS_ADMIN; the rest is said
// where it is.
//
// The kernel queues at most /proc/sys/fs/fanotify/max_queued_events for a
// watcher, and merges what a process does to one object while it waits there.
// When the queue is full, events are lost, and an event with OpOverflow stands
// in their place.

// FileOptions say what a watcher reports about each event. The zero value is
// what works for every user.
type FileOptions struct {
	// Class says whether events wait for an answer. The other classes than
	// ClassNotification need CAP_SYS_ADMIN; see [WatchFiles] about permission
	// events.
	Class FileClass

	// Deadline is how long an operation may wait for an answer, from when its
	// event was read; 0 is 5 seconds, NoDeadline none. Default is the answer
	// that it then gets, and whenever else nobody answers: the zero Response
	// denies. At most MaxPending events are held at a time, that is, wait for
	// their answer, or have got Default while the consumer has them and were not
	// closed; beyond that, Default is the answer at once. As many events that do not
	// ask may wait with descriptors, and further ones come without. 0 is what takes
	// half of the descriptors that the process may have (RLIMIT_NOFILE): half of
	// their number, a quarter with Descriptors, a sixth with ReportPidFD, an eighth
	// with both.
	//
	// These and Audit, which asks for responses that the kernel's audit log
	// tells of (CAP_AUDIT_WRITE), do not go together with ClassNotification.
	Deadline   time.Duration
	Default    Response
	MaxPending int
	Audit      bool

	// Group is a fanotify group that was made elsewhere, with its marks. It
	// must be of the class Class, and unless Default allows, have
	// FAN_UNLIMITED_QUEUE if events wait for an answer: the kernel allows what
	// its queue has no room for. If the constructor succeeds, it takes
	// the group over and closes the file; otherwise that stays the caller's.
	// Nobody else may read from it. What the group reports was decided when
	// it was made.
	Group *os.File

	// Descriptors asks for an open descriptor of the file with each event: of
	// what it was, however it is called by now. Each event must be closed then.
	// It needs CAP_SYS_ADMIN, and works on every file system, for OpAccess,
	// OpModify, OpClose, OpOpen and OpOpenExec on regular files and directories.
	Descriptors bool

	// EventFlags are the open(2) flags of those descriptors: O_RDONLY, O_WRONLY
	// or O_RDWR, with any of O_APPEND, O_NONBLOCK, O_SYNC, O_DSYNC, O_LARGEFILE
	// and O_NOATIME. O_CLOEXEC is always set. A file that cannot be opened that
	// way (a running program, for writing) is an event with Err.
	EventFlags int

	// ReportTID reports the thread instead of the process: FileEvent.TID. It
	// needs CAP_SYS_ADMIN.
	ReportTID bool

	// ReportPidFD adds a pidfd of the process to each event (Linux 5.15), so
	// that its number cannot be mistaken for a later process's. Each event must
	// be closed then. It needs CAP_SYS_ADMIN, makes events some microseconds
	// dearer, and does not go together with ReportTID.
	ReportPidFD bool

	// UnlimitedQueue lifts the limit of the queue, at the cost of kernel memory;
	// UnlimitedMarks that of marks. Each needs CAP_SYS_ADMIN.
	UnlimitedQueue bool
	UnlimitedMarks bool
}

// check says what is wrong with the options.
func (o *FileOptions) check() error {
	allowed := unix.O_ACCMODE | unix.O_APPEND | unix.O_NONBLOCK | unix.O_SYNC | unix.O_DSYNC | unix.O_CLOEXEC | unix.O_LARGEFILE | unix.O_NOATIME
	odd := o.EventFlags &^ allowed
	switch {
	case o.EventFlags != 0 && !o.Descriptors && !o.Class.asks():
		return errCannot("EventFlags are for descriptors: set Descriptors, too")
	case o.EventFlags&unix.O_ACCMODE == unix.O_ACCMODE:
		return errCannot("EventFlags: O_WRONLY and O_RDWR are both set")
	case odd != 0:
		return errCannot("EventFlags: the kernel does not open files of events with %s", openFlagNames(odd))
	}
	return o.checkClass()
}

// openFlagNames names flags of open(2) that are not for events.
func openFlagNames(flags int) string {
	var names []string
	for _, f := range []struct {
		flag int
		name string
	}{
		{unix.O_PATH, "O_PATH"},
		{unix.O_TMPFILE, "O_TMPFILE"},
		{unix.O_DIRECTORY, "O_DIRECTORY"},
		{unix.O_CREAT, "O_CREAT"},
		{unix.O_EXCL, "O_EXCL"},
		{unix.O_NOCTTY, "O_NOCTTY"},
		{unix.O_TRUNC, "O_TRUNC"},
		{unix.O_ASYNC, "O_ASYNC"},
		{unix.O_DIRECT, "O_DIRECT"},
		{unix.O_NOFOLLOW, "O_NOFOLLOW"},
	} {
		if flags&f.flag == f.flag {
			names = append(names, f.name)
			flags &^= f.flag
		}
	}
	if flags != 0 {
		names = append(names, "0x"+strconv.FormatInt(int64(flags), 16))
	}
	return strings.Join(names, ", ")
}

// A FileWatcher is a stream of what happens to the files that its marks ask
// for.
//
// C has a buffer of 64 events, and none if FileOptions.Class lets events wait for
// an answer: what is delivered then was received. All methods may be called at
// any time, from any goroutine.
type FileWatcher struct {
	*Stream[*FileEvent]
	watch *fileWatch
}

// fileBuffer is the capacity of C: with it the reader and the consumer change
// places once for dozens of events.
const fileBuffer = 64

// WatchFiles reports what happens to files, directories and file systems, from
// the time of the call until ctx is done (see fanotify(7)). More marks may be set
// later.
//
// Each mark goes to a fanotify group that names a directory and an entry for
// each event. Where the file system does not support that (overlay, fuse, proc,
// a btrfs subvolume, for some types of marks), it goes to a second group, which
// opens the file for each event, and closes it once its path is known;
// [FileEvent.Via] says which one an event is from. A mark whose operations that
// group cannot report is refused.
//
// Any user may mark inodes that he can read, and then learns the paths of marked
// objects and of the files in marked directories, for as long as these are not
// renamed, but not which process it was. Of a directory in a marked one he
// learns the path only when it is made, removed or renamed. Everything else needs
// CAP_SYS_ADMIN, and the paths of a whole mount or file system, and of those
// directories, CAP_DAC_READ_SEARCH, too.
//
// The watcher keeps a directory open on each mount with a mark as long as there
// is a mark of that file system, or an event in the queue, so that the mount is
// busy (umount -l works). It takes up to two of the 128 groups that a user may
// have (max_user_groups), and one more to be told of renamed directories. The
// queue of a watcher in use costs nobody a thread.
//
// The watcher opens and closes files of a marked file system to find their paths.
// If that does not answer (FUSE, NFS), events of the other marks wait, and so
// does the end of the stream; it should have a watcher of its own. For permission
// events see below.
//
// A slow consumer loses nothing until the kernel's queue is full. That is an
// event with OpOverflow: a scan of the files that begins after it finds what
// was lost, if the consumer goes on receiving meanwhile.
//
// # Permission events
//
// With another Class than ClassNotification, marks may have OpOpenPerm,
// OpAccessPerm, OpOpenExecPerm and OpPreAccess, of every file system but those of
// the kernel's own state (proc). Whoever does that then stands still until the
// event is answered: by [FileEvent.Allow], Deny or Respond, and if nobody does, by
// the default answer, at the event's deadline, when it is closed, or when the
// stream ends, whatever ends it. The watcher goes on reading meanwhile, however
// slow the consumer is, so the deadline of one event does not wait for
// another's. (Events that do not ask wait in the memory of this process then.)
// What the watcher decides itself is in [FileWatcher.Defaulted].
//
// What this process does itself, with any of its threads, it is not asked about:
// it is allowed. A judge may read the file before it answers, through
// [FileEvent.FD] or File, which asks nobody.
//
// These decisions are the kernel's (Linux 2.6.37 and later, unless they say
// otherwise): It denies, with EPERM, if it cannot open the file for the event, for
// want of descriptors say; since Linux 6.13 the event comes all the same, with
// Err. It allows what happens while the marks are being taken away, and if the
// process dies, by SIGKILL or a panic, all that waits. It would allow what does
// not fit into its queue, which therefore has no limit. It opens the file as the
// event is read: if its file system does not answer for half a second (FUSE, NFS),
// another goroutine reads on, and those who ask about other files wait for that
// long. Each file that is held up so takes a thread; with 64 of them nothing more
// is read, and nobody is answered whose event was not read, so such a file system
// should have a watcher of its own. A close that takes long holds up nobody else.
// At the end of the stream all have their answers at once, but C is closed when
// the file system has answered.
//
// A process with such a watcher must not start others by executing what may be
// marked: a program, its interpreter, a shared library. Between the clone and the
// exec the Go runtime waits within one system call that keeps its processor; if
// the child has to wait for an answer then, and this is the only processor, or a
// garbage collection begins, nobody is left to answer, and only SIGKILL ends it.
// [ProcessWatcher.Start] refuses; package os/exec does not know. A helper that was
// started before can start others.
//
// # Errors
//
// Options may be nil. The error is an *[OpError] that names the mark and what
// is missing: it Is fs.ErrPermission for want of a privilege, and
// errors.ErrUnsupported if the kernel or the file system is not capable.
func WatchFiles(ctx context.Context, options *FileOptions, marks ...Mark) (*FileWatcher, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	watch, err := newFileWatch(options, marks)
	if err != nil {
		return nil, err
	}
	w := &FileWatcher{watch: watch}
	buffer := fileBuffer
	if watch.access != nil {
		buffer = 0 // what is delivered is received, and can be answered
	}
	w.Stream = newStream(ctx, buffer, func(ctx context.Context, r *run[*FileEvent]) error {
		return watch.run(ctx, r.c)
	})
	return w, nil
}

// Mark adds marks: all, or if one fails, none. After the end of the stream the
// error Is os.ErrClosed. Looking up a Path takes as long as its file system does;
// with permission events, nobody else waits for that. If the kernel asks it for
// the mode once more as it sets the mark (FUSE with default_permissions), and it
// does not answer then, other calls of Mark, Unmark and Flush wait, and so does the
// close of C.
//
// Operations that may come without a directory to name the file by (OpAttrib,
// OpDeleteSelf, OpMoveSelf and OpFSError) make all events of a watcher dearer,
// which is decided at its start: one of them must have been in the marks of
// WatchFiles, or there must have been none.
func (w *FileWatcher) Mark(marks ...Mark) error { return w.watch.add(marks) }

// Unmark takes the operations of marks away again. A mark without any is gone.
// What is in the queue already still comes. The error Is fs.ErrNotExist if there
// is no such mark; marks before that in the list are gone. After the end of the
// stream it Is os.ErrClosed.
func (w *FileWatcher) Unmark(marks ...Mark) error { return w.watch.remove(marks) }

// Flush takes all marks of one type away, ignore marks included. What is in the
// queue already still comes. After the end of the stream the error Is os.ErrClosed.
func (w *FileWatcher) Flush(t MarkType) error { return w.watch.flush(t) }

// Drain takes all marks away, and lets the stream come to its end once all that
// the kernel had queued by then has been delivered: Err is then nil. Nothing of
// what happened before the call is lost, as it may be by Close. It does not wait
// for that, and may be called again, which returns nil. If the stream has ended
// otherwise, the error Is os.ErrClosed. A watcher of a class with permission events
// has nothing to lose but questions: to take its marks away and answer what is open
// is Close, and the error of Drain Is errors.ErrUnsupported.
func (w *FileWatcher) Drain() error { return w.watch.startDrain() }

// Control calls use with the descriptor of each fanotify group of the watcher,
// for what this package does not do. Marks that use sets are not resolved unless
// the watcher has one on the same file system. use must not read, nor close the
// descriptor. After the end of the stream the error Is os.ErrClosed.
func (w *FileWatcher) Control(use func(fd int)) error { return w.watch.control(use) }

// Defaulted returns how many operations have got the default answer, because
// nobody answered in time, or more than MaxPending waited, or the event was
// closed without an answer, or the stream has ended. It is final once C is
// closed: what the consumer still has is answered by then.
func (w *FileWatcher) Defaulted() uint64 {
	if w.watch.access == nil {
		return 0
	}
	return w.watch.access.defaulted.Load()
}
