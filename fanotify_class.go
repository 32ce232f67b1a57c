package kernstream

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// A FileClass is the class of a fanotify group: whether the kernel waits for
// answers, and who is asked first (fanotify_init(2)). An operation is asked
// about first in groups of ClassPreContent, then in those of ClassContent. What
// one denies, the later ones, and notifications, do not see.
type FileClass int

const (
	// ClassNotification tells what happened. Nobody waits for an answer.
	ClassNotification FileClass = iota
	// ClassContent also asks about operations on files that have their content:
	// OpOpenPerm, OpOpenExecPerm and OpAccessPerm. It needs CAP_SYS_ADMIN, and
	// a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS.
	ClassContent
	// ClassPreContent also asks about files that may not have it yet:
	// OpPreAccess (Linux 6.14), too. A denied operation may fail with another
	// error than EPERM (Linux 6.14). It needs the same.
	ClassPreContent
)

// String returns "notification", "content" or "pre_content".
func (c FileClass) String() string {
	switch c {
	case ClassNotification:
		return "notification"
	case ClassContent:
		return "content"
	case ClassPreContent:
		return "pre_content"
	}
	return fmt.Sprintf("FileClass(%d)", int(c))
}

// flags returns the kernel's bits.
func (c FileClass) flags() uint {
	switch c {
	case ClassContent:
		return unix.FAN_CLASS_CONTENT
	case ClassPreContent:
		return unix.FAN_CLASS_PRE_CONTENT
	}
	return unix.FAN_CLASS_NOTIF
}

// asks tells whether the events of the class may wait for an answer.
func (c FileClass) asks() bool { return c == ClassContent || c == ClassPreContent }

// classOf returns the class of a group with flags.
func classOf(flags uint) FileClass {
	switch {
	case flags&unix.FAN_CLASS_CONTENT != 0:
		return ClassContent
	case flags&unix.FAN_CLASS_PRE_CONTENT != 0:
		return ClassPreContent
	}
	return ClassNotification
}

// ops returns what a mark of the class may ask for by way of descriptors.
func (c FileClass) ops() FileOp {
	switch c {
	case ClassContent:
		return opDescriptor | opPermission&^OpPreAccess
	case ClassPreContent:
		return opDescriptor | opPermission
	}
	return opDescriptor
}

const (
	// NoDeadline is a FileOptions.Deadline that never comes: who waits for an
	// answer waits until there is one, or until the stream ends.
	NoDeadline time.Duration = -1

	defaultDeadline = 5 * time.Second
)

// checkClass says what is wrong with the options about permission events.
func (o *FileOptions) checkClass() error {
	switch {
	case o.Class.String() != ClassNotification.String() && o.Class.flags() == unix.FAN_CLASS_NOTIF:
		return errCannot("unknown %v", o.Class)
	case o.Class.asks():
		return o.checkAnswers()
	case o.Deadline != 0, o.MaxPending != 0, o.Default != Response{}, o.Audit:
		return errCannot("Deadline, Default, MaxPending and Audit are for events that wait for an answer: set Class, too")
	}
	return nil
}

func (o *FileOptions) checkAnswers() error {
	switch {
	case o.Deadline < 0 && o.Deadline != NoDeadline:
		return errCannot("Deadline: %v; NoDeadline is none", o.Deadline)
	case o.MaxPending < 0:
		return errCannot("MaxPending: %d", o.MaxPending)
	}
	if err := o.Default.check(o.Class, o.Audit); err != nil {
		return fmt.Errorf("the response Default: %w", err)
	}
	return nil
}

// deadline is how long an event may wait for its answer; 0: for ever.
func (o *FileOptions) deadline() time.Duration {
	switch o.Deadline {
	case 0:
		return defaultDeadline
	case NoDeadline:
		return 0
	}
	return o.Deadline
}

// maxPending is how many events of a group with flags may wait for an answer.
func (o *FileOptions) maxPending(flags uint) int {
	if o.MaxPending > 0 {
		return o.MaxPending
	}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 1
	}
	each := uint64(1) // descriptors that an event has, and one of as many that do not ask
	if o.Descriptors {
		each++
	}
	if flags&unix.FAN_REPORT_PIDFD != 0 {
		each += 2
	}
	share := limit.Cur / 2 / each
	const most = 1 << 20 // fs.nr_open
	return int(max(1, min(share, most)))
}
