package fuse

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// The kernel tells a reader that a connection has ended a moment before it tells
// others, and by either of two errors. How it ended is found out all the same.
func TestEndBeforeItIsSeen(t *testing.T) {
	testenv.NeedRoot(t, "the control file system of FUSE")
	for _, read := range []unix.Errno{unix.ECONNABORTED, unix.ENODEV} {
		for want, end := range map[error]func(s *Session) error{
			ErrAborted:   func(s *Session) error { return s.abortByControl() },
			ErrUnmounted: func(s *Session) error { return unix.Unmount(s.config.MountPoint, unix.MNT_DETACH) },
		} {
			s := mounted(t)
			ended := make(chan error, 1)
			time.AfterFunc(20*time.Millisecond, func() { ended <- end(s) })
			if err := s.Device().failed(t.Context(), os.NewSyscallError("read", read)); err != want {
				t.Errorf("%v: the end is %v; want %v", read, err, want)
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
		}
	}
}
