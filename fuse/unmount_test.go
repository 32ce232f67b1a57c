package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityU7Unmount: a file system that is in use is busy, and goes on; one
// that is not, is unmounted; once more is no error. Close unmounts, too.
func TestParityU7Unmount(t *testing.T) {
	l := newLab(t, nil)
	wait := l.serve(basic)
	c := newClient(t)
	if err := c.do("hold", l.path(fileName), fmt.Sprint(unix.O_RDONLY)); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Unmount(t.Context(), 0); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), l.dir) {
		t.Errorf("Unmount of what is in use: %v", err)
	}
	select {
	case <-l.s.Done():
		t.Error("the session has ended")
	default:
	}
	if text, err := c.ask("readheld", l.path(fileName)); text != content || err != nil {
		t.Errorf("read afterwards: %q, %v", text, err)
	}
	if err := c.do("drop", l.path(fileName)); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := l.s.Unmount(t.Context(), 0); err != nil {
			t.Errorf("Unmount: %v", err)
		}
	}
	if err := wait(); err != nil {
		t.Errorf("the loop ended by %v", err)
	}
	<-l.s.Done()
	for range 2 {
		if err := l.s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if err := l.s.Unmount(t.Context(), 0); err != nil {
		t.Errorf("Unmount after Close: %v", err)
	}
}

// Close unmounts what is in use, too: its users are left with errors.
func TestCloseWhileInUse(t *testing.T) {
	l := newLab(t, nil)
	l.serve(basic)
	c := newClient(t)
	if err := c.do("hold", l.path(fileName), fmt.Sprint(unix.O_RDONLY)); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if fuseMounts(t, l.dir) != 0 {
		t.Error("still mounted")
	}
	if err := c.do("readheld", l.path(fileName)); err != unix.ENOTCONN && err != unix.ECONNABORTED {
		t.Errorf("read afterwards: %v", err)
	}
}

// A lazy unmount takes it out of the table at once, and the session goes on until
// the last user leaves.
func TestUnmountLazy(t *testing.T) {
	l := newLab(t, nil)
	wait := l.serve(basic)
	c := newClient(t)
	if err := c.do("hold", l.path(fileName), fmt.Sprint(unix.O_RDONLY)); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Unmount(t.Context(), fuse.UnmountLazy); err != nil {
		t.Fatal(err)
	}
	if fuseMounts(t, l.dir) != 0 {
		t.Error("still in the table")
	}
	if text, err := c.ask("readheld", l.path(fileName)); text != content || err != nil {
		t.Errorf("read afterwards: %q, %v", text, err)
	}
	if err := c.do("drop", l.path(fileName)); err != nil {
		t.Error(err)
	}
	if err := wait(); err != nil {
		t.Errorf("the loop ended by %v", err)
	}
}

// A forced unmount aborts the connection, and unmounts unless files are open.
func TestUnmountForce(t *testing.T) {
	t.Run("a client waits", func(t *testing.T) {
		l := newLab(t, nil)
		wait := newClient(t).start("stat", l.path("x"))
		l.next(lookup("x"))
		if err := l.s.Unmount(t.Context(), fuse.UnmountForce); err != nil {
			t.Errorf("Unmount: %v", err)
		}
		if err := wait(); err != unix.ECONNABORTED {
			t.Errorf("stat: %v", err)
		}
		if fuseMounts(t, l.dir) != 0 {
			t.Error("still mounted")
		}
	})
	t.Run("a file is open", func(t *testing.T) {
		l := newLab(t, nil)
		wait := l.serve(basic)
		c := newClient(t)
		if err := c.do("hold", l.path(fileName), fmt.Sprint(unix.O_RDONLY)); err != nil {
			t.Fatal(err)
		}
		if err := l.s.Unmount(t.Context(), fuse.UnmountForce); !errors.Is(err, unix.EBUSY) {
			t.Errorf("Unmount: %v", err)
		}
		if err := wait(); !errors.Is(err, fuse.ErrAborted) {
			t.Errorf("the loop ended by %v", err)
		}
		if fuseMounts(t, l.dir) != 1 {
			t.Error("unmounted")
		}
	})
	l := newLab(t, nil)
	if err := l.s.Unmount(t.Context(), 1<<20); !errors.Is(err, unix.EINVAL) {
		t.Errorf("odd flags: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.s.Unmount(ctx, 0); err != context.Canceled || fuseMounts(t, l.dir) != 1 {
		t.Errorf("a context that is done: %v", err)
	}
}

// What somebody else has mounted on top of it, or has put in its place, is left
// alone.
func TestUnmountLeavesStrangersAlone(t *testing.T) {
	l := newLab(t, nil)
	l.serve(basic)
	if err := unix.Mount("stranger", l.dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	for _, flags := range []fuse.UnmountFlags{0, fuse.UnmountLazy, fuse.UnmountForce} {
		if err := l.s.Unmount(t.Context(), flags); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "on top of it") {
			t.Errorf("Unmount below a stranger: %v", err)
		}
	}
	if row := mountLine(t, l.dir); !strings.Contains(row, "stranger") {
		t.Errorf("the topmost mount is %q", row)
	}
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Fatal(err)
	}

	// The session's mount goes, and another comes, which gets its numbers.
	testenv.NeedKernel(t, 6, 8, "STATX_MNT_ID_UNIQUE: mounts have IDs of their own")
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Fatal(err)
	}
	other, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: l.dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.s.Unmount(t.Context(), 0); err != nil {
		t.Errorf("Unmount of what is gone: %v", err)
	}
	if err := l.s.Close(); err != nil {
		t.Errorf("Close of what is gone: %v", err)
	}
	if fuseMounts(t, l.dir) != 1 {
		t.Error("the stranger was unmounted")
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}

// A mount that was moved is not unmounted behind the back of who did that.
func TestUnmountOfWhatWasMoved(t *testing.T) {
	testenv.NeedFUSE(t)
	outer := t.TempDir()
	if err := unix.Mount("outer", outer, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(outer, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	from, to := filepath.Join(outer, "from"), filepath.Join(outer, "to")
	for _, dir := range []string{from, to} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l := newLab(t, &fuse.Config{MountPoint: from})
	l.serve(basic)
	if err := unix.Mount(from, to, "", unix.MS_MOVE, ""); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Unmount(t.Context(), 0); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "moved to "+to) {
		t.Errorf("Unmount: %v", err)
	}
	if err := unix.Mount(to, from, "", unix.MS_MOVE, ""); err != nil {
		t.Fatal(err)
	}
}

// Abort ends every wait of the clients, and leaves a dead mount, which Close
// takes away.
func TestAbort(t *testing.T) {
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	if err := l.s.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != unix.ECONNABORTED {
		t.Errorf("stat: %v", err)
	}
	if cause := context.Cause(r.Context()); cause != fuse.ErrAborted {
		t.Errorf("the request's cause is %v", cause)
	}
	if err := newClient(t).do("stat", l.path("x")); err != unix.ENOTCONN {
		t.Errorf("stat afterwards: %v", err)
	}
	if fuseMounts(t, l.dir) != 1 {
		t.Error("not mounted")
	}
	if err := l.s.Abort(); err != nil {
		t.Errorf("again: %v", err)
	}
}

// The connection is known by the number of its device.
func TestConnectionID(t *testing.T) {
	l := newLab(t, nil)
	row := strings.Fields(mountLine(t, l.dir))
	if want := fmt.Sprintf("0:%d", l.s.ConnectionID()); row[2] != want {
		t.Errorf("ConnectionID is %d, the mount table has %s", l.s.ConnectionID(), row[2])
	}
}

// The mount is looked at without the help of the server, which may be the one
// who asks.
func TestUnmountAsksNoServer(t *testing.T) {
	l := newLab(t, nil)
	if err := testenv.Within(t, "Unmount", func() error { return l.s.Unmount(context.Background(), 0) }); err != nil {
		t.Error(err)
	}
	testenv.Feature(t, "identity of a FUSE mount", identityPath())
}

func identityPath() string {
	if testenv.KernelAtLeast(6, 8) {
		return "unique ID"
	}
	return "reused ID and device"
}
