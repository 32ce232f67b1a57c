package fuse

import (
	"errors"
	"os"

	"github.com/kernstream/kernstream"
)

var (
	// ErrUnmounted is how a session ends whose file system was unmounted, by
	// whomever.
	ErrUnmounted = errors.New("file system unmounted")

	// ErrAborted is how a session ends whose connection was aborted while the
	// file system was mounted: by [Session.Abort], through
	// /sys/fs/fuse/connections, by umount2(2) with MNT_FORCE, or because a
	// request took longer than allowed.
	ErrAborted = errors.New("connection aborted")

	// ErrDrained is what [Device.Next] returns between [Session.Drain] and
	// [Session.Resume].
	ErrDrained = errors.New("session drained")
)

func fuseError(op, object string, err error) error {
	return &kernstream.OpError{Op: op, Source: "fuse", Object: object, Err: err}
}

// failed returns err as an error about object. Its operation is the system call
// that failed, or else what was being done.
func failed(doing, object string, err error) error {
	if _, ok := errors.AsType[*kernstream.OpError](err); ok || err == nil {
		return err
	}
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		doing = call.Syscall
	}
	return fuseError(doing, object, err)
}
