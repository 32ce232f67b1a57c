package fuse_test

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// A process may open the files of its own file system as any others, however
// few processors it has, and whichever way it was mounted.
func TestSelfAccess(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, via := range []fuse.Via{fuse.ViaMount, fuse.ViaHelper} {
		if via == fuse.ViaHelper {
			testenv.NeedTool(t, "fusermount3")
		}
		for _, reader := range readers {
			for _, processors := range []int{1, 2, 4} {
				t.Run(fmt.Sprintf("%v/%s/%d", via, reader.name, processors), func(t *testing.T) {
					defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(processors))
					l := newLab(t, &fuse.Config{Via: via})
					result := make(chan error, 1)
					go func() { result <- reader.read(context.Background(), l.s.Device(), basic) }()
					err := testenv.Within(t, "the process's own access", func() error { return useFiles(l.dir) })
					if err != nil {
						t.Error(err)
					}
					l.s.Close()
					testenv.Within(t, "the loop", func() error { return <-result })
				})
			}
		}
	}
}

// useFiles does with the files below dir what programs do.
func useFiles(dir string) error {
	path := dir + "/" + fileName
	for range 10 {
		if text, err := os.ReadFile(path); string(text) != content || err != nil {
			return fmt.Errorf("read %q: %w", text, err)
		}
		if err := os.WriteFile(path, []byte("something"), 0o644); err != nil {
			return err
		}
		if _, err := os.ReadDir(dir); err != nil {
			return err
		}
		if _, err := os.Stat(dir + "/missing"); !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// Without what Mount does about it, a process hangs when it opens a file of its
// own: this is why it does.
func TestSelfAccessHangsWithoutPriming(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, serve := range []string{"primed", "not primed"} {
		dir := t.TempDir()
		cmd := testenv.Child(t, "self", dir, serve)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		limit := patience
		if serve == "not primed" {
			limit = time.Second
		}
		hung := false
		var err error
		select {
		case err = <-done:
		case <-time.After(limit):
			// Killing alone does not help: the thread in the kernel waits on.
			hung = true
			cmd.Process.Kill()
			if err := unix.Unmount(dir, unix.MNT_FORCE); err != nil && err != unix.EBUSY {
				t.Error(err)
			}
			testenv.Within(t, "a killed process", func() error { return <-done })
		}
		if hung != (serve == "not primed") || err != nil {
			t.Errorf("%s: hung is %v, %v", serve, hung, err)
		}
		unix.Unmount(dir, unix.MNT_DETACH)
	}
}

func init() {
	testenv.RegisterChild("self", func(args []string) int {
		s, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: args[0], ServePoll: args[1] == "not primed"})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		go func() {
			for r := range s.Device().All(context.Background()) {
				basic(r)
			}
		}()
		if err := useFiles(args[0]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		s.Close()
		return 0
	})
}

// A server sees nothing of the probe, neither at the start nor when the kernel
// forgets it.
func TestProbeIsNotSeen(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, via := range []fuse.Via{fuse.ViaMount, fuse.ViaHelper} {
		if via == fuse.ViaHelper {
			testenv.NeedTool(t, "fusermount3")
		}
		l := newLab(t, &fuse.Config{Via: via})
		// Everything that the kernel has to say comes before this.
		wait := newClient(t).start("stats", l.dir, "20")
		for range 20 {
			r := l.next(func(r *fuse.Request) bool {
				switch {
				case r.Header.Opcode == fuse.OpLookup:
					return true
				case r.Header.Opcode == fuse.OpGetattr && r.Header.NodeID == rootNode:
				default:
					t.Errorf("%v: the server sees %v", via, r)
				}
				return false
			})
			r.ReplyErrno(unix.ENOENT)
		}
		if err := wait(); err != nil {
			t.Error(err)
		}
	}
}

// Others may use the file system while it is being mounted: their requests are
// there when Mount returns.
func TestRequestsDuringMount(t *testing.T) {
	testenv.NeedTool(t, "fusermount3")
	testenv.NeedFUSE(t)
	dir := t.TempDir()
	early := 0
	for i := range testenv.SoakN(60) {
		c := newClient(t)
		stop := make(chan struct{})
		done := make(chan error, 1)
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				// Before the mount there is no such file, either.
				if err := c.do("stat", dir+"/x"); err != unix.ENOENT {
					done <- err
					return
				}
			}
		}()
		time.Sleep(time.Duration(i%3) * time.Millisecond)
		l := newLab(t, &fuse.Config{MountPoint: dir, Via: fuse.ViaHelper})
		early += l.s.Outstanding()
		wait := l.serve(basic)
		time.Sleep(time.Millisecond)
		close(stop)
		if err := testenv.Within(t, "the client", func() error { return <-done }); err != nil {
			t.Fatal(err)
		}
		c.end()
		if err := l.s.Close(); err != nil {
			t.Fatal(err)
		}
		wait()
	}
	if early == 0 {
		t.Error("no request came while Mount was at work")
	}
}

// A context that is done while Mount waits ends it, and nothing is mounted.
func TestMountIsCancelled(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	dir := t.TempDir()
	cancelled := 0
	for i := range testenv.SoakN(200) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*10*time.Microsecond)
		via := fuse.ViaMount
		if i%4 == 3 {
			via = fuse.ViaHelper
		}
		s, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir, Via: via})
		cancel()
		switch {
		case err == context.DeadlineExceeded:
			cancelled++
		case err != nil:
			t.Fatal(err)
		default:
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if n := fuseMounts(t, dir); n != 0 {
			t.Fatalf("after %v: %d mounts are left", err, n)
		}
	}
	if cancelled == 0 {
		t.Error("no Mount was cancelled")
	}
}
