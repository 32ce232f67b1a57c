package kernstream

import (
	"errors"
	"os"
)

// OpError is an error of a source: what was being done, to what, and what came
// of it.
//
// Err is usually an *os.SyscallError, so errors.Is finds the errno
// ([syscall.EPERM] and so on) and the sentinels that it stands for
// (fs.ErrPermission, fs.ErrNotExist). Where a source needs a kernel that is
// newer, Err Is errors.ErrUnsupported; where a process is gone, it Is
// os.ErrProcessDone.
type OpError struct {
	Op     string // the system call or step, "fanotify_mark"
	Source string // "mount", "process", "file", "fuse" or "record"
	Object string // what it was done to, "/srv"; may be empty
	Err    error  // why it failed
}

// Error returns the operation, the object and the reason in one line.
func (e *OpError) Error() string {
	text := e.Source + ": " + e.Op
	if e.Object != "" {
		text += " " + e.Object
	}
	// A system call is not named twice.
	reason := e.Err
	if call, ok := reason.(*os.SyscallError); ok && call.Syscall == e.Op {
		reason = call.Err
	}
	if reason == nil {
		return text
	}
	return text + ": " + reason.Error()
}

// Unwrap returns e.Err.
func (e *OpError) Unwrap() error { return e.Err }

// isOpError tells whether a source itself failed, as opposed to being ended.
func isOpError(err error) bool {
	_, ok := errors.AsType[*OpError](err)
	return ok
}
