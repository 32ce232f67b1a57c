package kernstream

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
)

// A Response is an answer to a permission event. The zero value denies.
type Response struct {
	Allow bool // let the operation go on

	// Errno is what a denied operation fails with; 0 is EPERM. In ClassPreContent
	// (Linux 6.14) it may be EIO, EBUSY, ETXTBSY, EAGAIN, ENOSPC or EDQUOT.
	Errno syscall.Errno

	// Audit makes a record in the kernel's audit log (FAN_AUDIT). It needs
	// FileOptions.Audit.
	Audit bool

	// Rule is the reason that this record names (Linux 6.3). It needs Audit. It
	// is compared by its address.
	Rule *AuditRule
}

// An AuditRule is the reason of a [Response], for the audit log.
type AuditRule struct {
	Number  uint32 // of the rule of a policy
	Subject Trust  // of the program that asks
	Object  Trust  // of the file
}

// Trust is whether something is trusted, as [AuditRule] says it.
type Trust uint32

// As a rule has found it.
const (
	TrustNo      Trust = iota // it is not
	TrustYes                  // it is
	TrustUnknown              // nobody has decided
)

// String returns "no", "yes" or "unknown".
func (t Trust) String() string {
	switch t {
	case TrustNo:
		return "no"
	case TrustYes:
		return "yes"
	case TrustUnknown:
		return "unknown"
	}
	return fmt.Sprintf("Trust(%d)", uint32(t))
}

// String returns "allow", "deny", or "deny" with the name of the error, and
// what goes to the audit log.
func (r Response) String() string {
	var b strings.Builder
	b.WriteString("deny")
	if r.Allow {
		b.Reset()
		b.WriteString("allow")
	}
	if r.Errno != 0 {
		b.WriteString(" " + errnoName(r.Errno))
	}
	if r.Audit {
		b.WriteString(", audit")
	}
	if r.Rule != nil {
		fmt.Fprintf(&b, ", rule %d, subject trusted: %v, object trusted: %v", r.Rule.Number, r.Rule.Subject, r.Rule.Object)
	}
	return b.String()
}

// check says what is wrong with a response in a group of a class, which was
// made for the audit log or not.
func (r Response) check(class FileClass, audit bool) error {
	switch {
	case r.Allow && r.Errno != 0:
		return errCannot("what is allowed does not fail with %v", errnoName(r.Errno))
	case r.Errno != 0 && r.Errno != unix.EPERM && class != ClassPreContent:
		return errCannot("a watcher of class %v denies with EPERM, not with %v; ClassPreContent has others", class, errnoName(r.Errno))
	case !deniable(r.Errno):
		return errCannot("the kernel does not deny with %v, but with EPERM, EIO, EBUSY, ETXTBSY, EAGAIN, ENOSPC or EDQUOT", errnoName(r.Errno))
	case r.Audit && !audit:
		return errCannot("a record in the audit log needs FileOptions.Audit")
	case r.Rule != nil && !r.Audit:
		return errCannot("a rule is for the audit log: set Audit, too")
	}
	return nil
}

// deniable tells whether the kernel takes an errno in an answer.
func deniable(errno syscall.Errno) bool {
	switch errno {
	case 0, unix.EPERM, unix.EIO, unix.EBUSY, unix.ETXTBSY, unix.EAGAIN, unix.ENOSPC, unix.EDQUOT:
		return true
	}
	return false
}

// encode appends what is written for the event with the descriptor fd.
func (r Response) encode(b []byte, fd int) []byte {
	raw := fanotify.Response{FD: int32(fd), Answer: unix.FAN_ALLOW}
	if !r.Allow {
		raw.Answer = unix.FAN_DENY
		if r.Errno != unix.EPERM { // that is what it is without
			raw.Answer = fanotify.DenyErrno(r.Errno)
		}
	}
	if r.Audit {
		raw.Answer |= unix.FAN_AUDIT
	}
	if r.Rule != nil {
		raw.Answer |= unix.FAN_INFO
		raw.Rule = fanotify.AuditRule{Number: r.Rule.Number, SubjectTrust: uint32(r.Rule.Subject), ObjectTrust: uint32(r.Rule.Object)}
	}
	return raw.Append(b)
}

// explain adds to an error of writing the response what the kernel does not
// say.
func (r Response) explain(err error) error {
	call := os.NewSyscallError("write", err)
	switch {
	case err == unix.EINVAL && r.Rule != nil && kernelOlder(6, 3):
		return fmt.Errorf("%w: a rule needs Linux 6.3: %w", call, errors.ErrUnsupported)
	case err == unix.EINVAL && r.Errno != 0 && kernelOlder(6, 14):
		return fmt.Errorf("%w: an error other than EPERM needs Linux 6.14: %w", call, errors.ErrUnsupported)
	}
	return call
}

// Allow lets the operation that the event asks about go on. See
// [FileEvent.Respond].
func (e *FileEvent) Allow() error { return e.Respond(Response{Allow: true}) }

// Deny lets the operation fail: with EPERM if errno is 0, or with errno if the
// class of the watcher has that. See [FileEvent.Respond].
func (e *FileEvent) Deny(errno syscall.Errno) error { return e.Respond(Response{Errno: errno}) }

// Respond answers a permission event. It does not wait for anything, and the
// descriptor stays open: Close has to follow. What was denied by OpOpenPerm and
// was to be created exists all the same.
//
// The first answer counts. A further one, from whichever goroutine, is an error
// that Is unix.EALREADY. If the answer came too late, it Is
// os.ErrDeadlineExceeded, and if it came after Close or the end of the stream,
// os.ErrClosed: the operation got the default answer then. A response that the
// class or the kernel does not have is an error that Is unix.EINVAL, and the
// event goes on waiting. Of an event that does not ask, the error Is
// errors.ErrUnsupported.
//
// Each answer wakes all who wait for one of this watcher (the kernel has one
// queue for them): with a thousand waiting operations it costs milliseconds. So a
// Response that allows, and does nothing else, is written by another goroutine if
// others wait, together with those that follow; Close may come before that. All
// others are written when Respond returns.
func (e *FileEvent) Respond(r Response) error {
	if e.question() == nil {
		return e.failed("respond", fmt.Errorf("the event does not ask: %w", errors.ErrUnsupported))
	}
	if err := e.own.asks.respond(r); err != nil {
		return e.failed("respond", err)
	}
	return nil
}
