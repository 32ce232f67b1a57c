package mntns_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestApart: descriptors that the function has made its own, and closed or opened, are
// those of its thread alone, in the own namespace and in another one.
func TestApart(t *testing.T) {
	testenv.NoLeaks(t)
	ns := newNamespace(t)
	before := mustLook(t)
	for _, where := range []struct {
		ns int
		in bool
	}{{-1, false}, {ns.fd(), true}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		fd, opened := int(w.Fd()), -1
		mine := errors.New("mine")
		err = mntns.Apart(where.ns, func() (err error) {
			if err := unix.CloseRange(uint(fd), uint(fd), unix.CLOSE_RANGE_UNSHARE); err != nil {
				return err
			}
			if _, err := os.Stat(ns.dir + "/" + file); errors.Is(err, fs.ErrNotExist) == where.in {
				return fmt.Errorf("the file of the other namespace: %w", err)
			}
			if opened, err = unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
				return err
			}
			return mine // without closing what it has opened
		})
		if err != mine {
			t.Errorf("error %v, want %v", err, mine)
		}
		if _, err := w.Write([]byte("x")); err != nil {
			t.Errorf("a descriptor that the function closed: %v", err)
		}
		if after := mustLook(t); after != before {
			t.Errorf("afterwards: %+v, before: %+v", after, before)
		}
		if opened != fd {
			t.Errorf("the function opened %d; %d was free", opened, fd)
		}
		r.Close()
		w.Close()
	}
	eventually(t, "threads in another namespace", func() []string { return elsewhere(t) })
}
