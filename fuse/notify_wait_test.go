package fuse_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// notifyWaits sends a notification that waits: a client makes a directory, and until
// that is answered, the kernel has the lock of the directory above.
func notifyWaits(s *fuse.Session) (wait func()) {
	notified := make(chan struct{})
	go func() {
		s.NotifyInvalEntry(rootNode, "nobody")
		close(notified)
	}()
	time.Sleep(20 * time.Millisecond)
	return func() { <-notified }
}

// A device that a notification went through can be closed before that is done, and
// what it waits for be answered after.
func TestCloseOfADeviceWithANotification(t *testing.T) {
	l := newLab(t, nil)
	first, second := l.s.Device(), l.clone()
	made := newClient(t).start("mkdir", l.path("x"))
	r := l.nextOf(second, opcode(fuse.OpMkdir))
	notified := notifyWaits(l.s)
	if err := testenv.Within(t, "Close", first.Close); err != nil {
		t.Error(err)
	}
	if err := testenv.Within(t, "the answer", func() error { return r.ReplyErrno(unix.EPERM) }); err != nil {
		t.Error(err)
	}
	if err := made(); err != unix.EPERM {
		t.Errorf("mkdir: %v", err)
	}
	testenv.Within(t, "the notification", func() error { notified(); return nil })
}

// Close of a session that was handed over does not wait for a notification, which
// may wait for the successor.
func TestHandOverWithANotification(t *testing.T) {
	l := newLab(t, nil)
	made := newClient(t).start("mkdir", l.path("x"))
	l.next(lookup("x")).ReplyErrno(unix.ENOENT)
	time.Sleep(20 * time.Millisecond)
	l.drained()
	notified := notifyWaits(l.s)
	files, err := l.s.Files()
	if err != nil {
		t.Fatal(err)
	}
	state := l.s.State()
	if err := testenv.Within(t, "Close", l.s.Close); err != nil {
		t.Error(err)
	}
	successor, err := fuse.Adopt(files, state)
	if err != nil {
		t.Fatal(err)
	}
	defer successor.Close()
	go func() {
		for r := range successor.Device().All(context.Background()) {
			if r.Header.Opcode == fuse.OpMkdir {
				r.ReplyErrno(unix.EPERM)
			} else {
				basic(r)
			}
		}
	}()
	if err := made(); err != unix.EPERM {
		t.Errorf("mkdir: %v", err)
	}
	testenv.Within(t, "the notification", func() error { notified(); return nil })
}

// An ordinary user cannot abort a connection but by closing the device, which a
// notification has open, too: Close and Abort free what it waits for themselves.
func TestOrdinaryUserEndsANotification(t *testing.T) {
	everybodysDevice(t)
	for _, end := range []string{"close", "abort"} {
		for _, who := range []string{"in hand", "unread"} {
			t.Run(end+" "+who, func(t *testing.T) {
				dir, err := os.MkdirTemp("/tmp", "kernstream-user-")
				if err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(dir)
				if err := os.Chown(dir, nobody, nobody); err != nil {
					t.Fatal(err)
				}
				cmd := testenv.Child(t, "notifier", dir, end, who)
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
				var said bytes.Buffer
				cmd.Stdout, cmd.Stderr = &said, &said
				if err := testenv.Within(t, end, cmd.Run); err != nil {
					t.Errorf("%v: %s", err, &said)
				}
				if fuseMounts(t, dir) > 0 {
					t.Error("still mounted")
				}
			})
		}
	}
}

func init() {
	testenv.RegisterChild("notifier", func(args []string) int {
		if err := endNotification(args[0], args[1], args[2] == "in hand"); err != nil {
			fmt.Println(err)
			return 1
		}
		return 0
	})
}

// endNotification mounts on dir, and ends that while a notification waits for a request.
func endNotification(dir, end string, inHand bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir})
	if err != nil {
		return err
	}
	defer s.Close()
	mkdir := exec.Command("mkdir", filepath.Join(dir, "x"))
	if err := mkdir.Start(); err != nil {
		return err
	}
	var r *fuse.Request
	for found := false; !found; {
		if r, err = s.Device().Next(ctx); err != nil {
			return err
		}
		if found = r.Header.Opcode == fuse.OpMkdir || !inHand && lookup("x")(r); !found || !inHand {
			basic(r)
		}
	}
	time.Sleep(20 * time.Millisecond)
	notified := notifyWaits(s)
	if end == "abort" {
		err = s.Abort()
	} else {
		err = s.Close()
	}
	if err != nil {
		return err
	}
	notified()
	if inHand {
		if err := r.ReplyErrno(unix.EPERM); err == nil {
			return fmt.Errorf("a request was answered after the end")
		}
	}
	if mkdir.Wait() == nil {
		return fmt.Errorf("mkdir succeeded")
	}
	return s.Close()
}
