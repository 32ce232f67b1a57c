package kernstream

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/pidfd"
)

// The ends of processes, of children and of strangers alike.
//
// What needs which kernel: everything works from Linux 5.10 on, for any user and
// any process whose number is in the namespace of this program. Since 6.9 the
// kernel also tells when a process is reaped ([Reaped]) and gives processes a
// unique ID; before, the ID is the time of their start. Since 6.15 it tells the
// status of a process that was reaped, whoever did that.
//
// All processes of the program are in one poller.Set, with one goroutine, which
// ends when nothing is watched any more (pidfd_table.go). Nothing here ever
// reaps a process.

// A Phase is a step in the end of a process.
type Phase int

const (
	// Exited: all threads of the process have ended. It is a zombie, unless its
	// parent does not care (SIGCHLD ignored): then it is Reaped at once.
	Exited Phase = iota

	// Reaped: the parent, or who took its place, has waited for it. Its number
	// may be another process's from then on. It is told since Linux 6.9.
	Reaped
)

// String returns "exited" or "reaped".
func (p Phase) String() string {
	switch p {
	case Exited:
		return "exited"
	case Reaped:
		return "reaped"
	}
	return "unknown"
}

// A ProcessEvent is the end of a process, or its reaping.
//
// The status comes as early as the kernel gives it to this program. That of a
// child is always known, if the program itself does not reap it before the
// library has looked. That of another process is known at Exited if this
// program may trace it, as root and the same user may (see ptrace(2)), or if it
// is not 0 and /proc shows it; since Linux 6.15 it is known at Reaped, to
// everybody in whose process ID namespace the process is. What is read is never
// that of another process with the same number.
type ProcessEvent struct {
	When time.Time // of reading it

	Process     ProcessID          // which one it was
	Phase       Phase              // what it came to
	StatusKnown bool               // whether this program may know how it ended
	Status      syscall.WaitStatus // valid if StatusKnown; it has Exited, ExitStatus, Signaled, Signal and CoreDump

	Watch *Watch // which watch of a ProcessWatcher it is of; nil for WatchProcess
	Tag   any    // of ProcessOptions
}

// ProcessOptions says what to tell of one process. The zero value is Exited
// alone.
type ProcessOptions struct {
	// Until is the last phase to tell; the watch ends with it. The phases come
	// in their order, and each is an event: with Reaped there are two. A parent
	// that never waits never sends the second.
	Until Phase

	// Tag is handed back in each event.
	Tag any
}

// WatchProcess tells the end of one process, on a channel of its own. The stream
// ends after the phase that was asked for, with a nil Err.
//
// C has room for all events that there will be, so a slow consumer holds
// nothing up and loses nothing, but what it has not received when it calls Close
// or cancels is lost. A watch costs no goroutine and no thread: less than half a
// KiB, and one descriptor per process, which all watches of the program share.
// Watches with the same context share their hold on it. For many processes, a
// [ProcessWatcher] has one channel.
//
// No privilege is needed. The error is an *[OpError]. It Is os.ErrProcessDone if
// the process is gone or, for a target that says more than a number, if another
// one has its number; errors.ErrUnsupported if a sandbox forbids pidfd_open(2),
// or if Reaped is asked for before Linux 6.9; EMFILE, ENFILE or ENOSPC, with the
// limit that was reached, if there are no descriptors left. A number that is a
// thread's is refused. A zombie is a process that has exited: its event comes at
// once. A process that ends later is never missed.
//
// Programs may watch themselves, and process 1; no event comes before their end.
// That a process executes another program, stops or goes on is not its end.
func WatchProcess(ctx context.Context, target Target, options *ProcessOptions) (*Stream[*ProcessEvent], error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	opened, err := openTarget(target, options)
	if err != nil {
		return nil, err
	}
	s := newProcessStream(options)
	if err := processes.addStream(ctx, s, target, opened); err != nil {
		return nil, err
	}
	return &s.Stream, nil
}

// openTarget opens target, and checks that what options ask for can be had.
func openTarget(target Target, options *ProcessOptions) (openProcess, error) {
	if target == nil {
		return openProcess{}, processError("open", "", errors.New("the Target is nil"))
	}
	if err := options.check(target); err != nil {
		return openProcess{}, err
	}
	return target.open()
}

// check returns why what o asks for cannot be had, or nil.
func (o *ProcessOptions) check(target Target) error {
	switch {
	case o == nil || o.Until == Exited:
		return nil
	case o.Until != Reaped:
		return processError("watch", target.String(), fmt.Errorf("unknown Phase %d: %w", o.Until, unix.EINVAL))
	case !pidfd.HasID():
		return processError("watch", target.String(), fmt.Errorf("the kernel tells of the reaping of processes since Linux 6.9: %w", errors.ErrUnsupported))
	}
	return nil
}
