package kernstream

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// heldUp is a file with a lease, which holds up whoever opens it, the kernel
// included, until that is given back. (An opener is asked about before that.)
func heldUp(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	lease(t, f, unix.F_SETLEASE, unix.F_WRLCK)
	lease(t, f, unix.F_SETOWN, 0) // nobody gets SIGIO, which would interrupt an open
	return f
}

func lease(t *testing.T, f *os.File, command, kind int) int {
	t.Helper()
	got, err := unix.FcntlInt(f.Fd(), command, kind)
	if err != nil {
		t.Fatalf("lease of %s: %v", f.Name(), err)
	}
	return got
}

// until waits until something is so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for begin := time.Now(); !so(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("after 30 seconds: not %s", what)
		}
	}
}

// TestReadersLimit: with as many reads held up as there may be, nothing more is
// read. Once one is through, somebody reads again, and the end answers those of the
// others that are held up still, and those whom nobody has read.
func TestReadersLimit(t *testing.T) {
	testenv.NeedRoot(t, "permission events")
	dir := t.TempDir()
	const limit = 3
	var files []*os.File
	for i := range limit {
		files = append(files, heldUp(t, filepath.Join(dir, fmt.Sprint(i))))
	}
	free := filepath.Join(dir, "free")
	if err := os.WriteFile(free, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	child := testenv.Child(t, "openers")
	in, _ := child.StdinPipe()
	out, _ := child.StdoutPipe()
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()

	watch, err := newFileWatch(&FileOptions{Class: ClassContent, Deadline: NoDeadline}, []Mark{{Path: dir, Ops: OpOpenPerm | OpEventOnChild}})
	if err != nil {
		t.Fatal(err)
	}
	watch.asked.takesLong, watch.asked.atOnce = 20*time.Millisecond, limit
	s := newStream(t.Context(), 0, func(ctx context.Context, r *run[*FileEvent]) error { return watch.run(ctx, r.c) })
	defer s.Close()
	queued := func() (n int) {
		watch.control(func(fd int) { n, _ = unix.IoctlGetInt(fd, unix.TIOCINQ) })
		return n
	}

	for i, f := range files {
		fmt.Fprintln(in, i, "open", f.Name())
		until(t, "held up", func() bool { return lease(t, f, unix.F_GETLEASE, 0) != unix.F_WRLCK })
	}
	fmt.Fprintln(in, limit, "open", free)
	until(t, "in the queue", func() bool { return queued() > 0 })
	select {
	case e := <-s.C:
		t.Fatalf("event %v; want none", e)
	case <-time.After(10 * watch.asked.takesLong):
	}
	watch.asked.mu.Lock()
	if n := watch.asked.n; n != limit || queued() == 0 {
		t.Errorf("%d read; %d bytes are in the queue", n, queued())
	}
	watch.asked.mu.Unlock()

	lease(t, files[0], unix.F_SETLEASE, unix.F_UNLCK)
	for _, path := range []string{files[0].Name(), free} {
		e := <-s.C
		if e.Path != path || e.Allow() != nil || e.Close() != nil {
			t.Errorf("event %v; want %s", e, path)
		}
	}
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	for _, f := range files[1:] {
		lease(t, f, unix.F_SETLEASE, unix.F_UNLCK)
	}
	<-closed
	var errnos [limit + 1]unix.Errno
	lines := bufio.NewReader(out)
	for range errnos {
		var id, errno, took int
		if _, err := fmt.Fscan(lines, &id, &errno, &took); err != nil {
			t.Fatal(err)
		}
		errnos[id] = unix.Errno(errno)
	}
	if want := [...]unix.Errno{0, unix.EPERM, unix.EPERM, 0}; errnos != want {
		t.Errorf("the openers got %v; want %v", errnos, want)
	}
}
