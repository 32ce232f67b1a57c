// Package docs_test compiles and runs what the documentation shows.
package docs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// What coming-from.md shows after "After", as it is there.

func printMounts(ctx context.Context, out io.Writer) error {
	w, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{NoInitial: true})
	if err != nil {
		return err
	}
	for e := range w.C {
		for _, m := range e.Mounted {
			fmt.Fprintln(out, "mounted", m.MountPoint)
		}
		for _, m := range e.Unmounted {
			fmt.Fprintln(out, "unmounted", m.MountPoint)
		}
		for _, c := range slices.Concat(e.Moved, e.Changed) {
			fmt.Fprintln(out, "changed", c.New.MountPoint)
		}
	}
	return w.Err()
}

func waitForMount(ctx context.Context, path string) error {
	w, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{
		Filter: func(m *kernstream.Mount) bool { return m.MountPoint == path },
	})
	if err != nil {
		return err
	}
	defer w.Close()
	for e := range w.C {
		if len(e.Mounted) > 0 {
			return nil
		}
	}
	return w.Err()
}

func watchConfig(ctx context.Context, dir string, load func(name string)) error {
	w, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{
		Path: dir,
		Ops:  kernstream.OpCloseWrite | kernstream.OpMovedTo | kernstream.OpEventOnChild,
	})
	if err != nil {
		return err
	}
	for e := range w.C {
		if e.Ops.Has(kernstream.OpOverflow) {
			load(dir) // something may have been missed: everything
			continue
		}
		load(e.Path)
	}
	return w.Err()
}

func printWrites(ctx context.Context, mount string, out io.Writer) error {
	w, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{
		Type: kernstream.MarkMount,
		Path: mount,
		Ops:  kernstream.OpModify | kernstream.OpCloseWrite,
	})
	if err != nil {
		return err
	}
	for e := range w.C {
		fmt.Fprintln(out, e.Path, e.Ops, e.PID)
	}
	return w.Err()
}

func waitAll(ctx context.Context, pids []int, out io.Writer) error {
	w, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	for _, pid := range pids {
		if _, err := w.Watch(kernstream.PID(pid), nil); err != nil {
			return err
		}
	}
	for range pids {
		e, ok := <-w.C
		if !ok {
			return w.Err() // the time of ctx is up, for example
		}
		fmt.Fprintln(out, e)
	}
	return nil
}

func serveEmpty(ctx context.Context, dir string) error {
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir})
	if err != nil {
		return err
	}
	defer session.Close()
	for r, err := range session.Device().All(ctx) {
		switch {
		case err == fuse.ErrUnmounted:
			return nil
		case err != nil:
			return err
		case r.Header.Opcode == fuse.OpGetattr:
			r.Reply(rootAttributes())
		case r.Header.Opcode == fuse.OpForget:
			r.Close()
		default:
			r.ReplyErrno(syscall.ENOENT)
		}
	}
	return nil
}

// rootAttributes is struct fuse_attr_out of an empty root directory.
func rootAttributes() []byte {
	b := make([]byte, 104)
	binary.NativeEndian.PutUint64(b[16:], 1)
	binary.NativeEndian.PutUint32(b[16+60:], syscall.S_IFDIR|0o755)
	binary.NativeEndian.PutUint32(b[16+64:], 2)
	return b
}

// patience is how long a test waits for what must happen.
const patience = 2 * testenv.Patience

// TestSnippets: the functions of this file are those of the text, and each
// source has one before and one after.
func TestSnippets(t *testing.T) {
	text, err := os.ReadFile("coming-from.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("coming_from_test.go")
	if err != nil {
		t.Fatal(err)
	}
	before := regexp.MustCompile("(?s)Before[^\n]*:\n\n```(go|rust)\n").FindAll(text, -1)
	after := regexp.MustCompile("(?s)After[^\n]*:\n\n```go\n(.*?)```").FindAllSubmatch(text, -1)
	if len(before) != 6 || len(after) != 6 {
		t.Errorf("%d programs before, %d after; want 6", len(before), len(after))
	}
	for _, snippet := range after {
		if !bytes.Contains(code, append([]byte("\n"), snippet[1]...)) {
			t.Errorf("this is not in coming_from_test.go:\n%s", snippet[1])
		}
	}
}

// background runs a function until the test is over. Its error is the end of
// ctx, or none.
func background(t *testing.T, run func(ctx context.Context) error) (cancel func()) {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), patience)
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	cancel = sync.OnceFunc(func() {
		stop()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(cancel)
	return cancel
}

// lines is a writer that can be waited on.
type lines struct {
	mu   sync.Mutex
	text string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(p)
	return len(p), nil
}

// await does something again and again until want has been written: none of the
// functions says that it has begun.
func (l *lines) await(t *testing.T, want string, do func(i int)) {
	t.Helper()
	for begin, i := time.Now(), 0; time.Since(begin) < patience; i++ {
		do(i)
		time.Sleep(20 * time.Millisecond)
		l.mu.Lock()
		text := l.text
		l.mu.Unlock()
		if strings.Contains(text, want) {
			return
		}
	}
	t.Fatalf("never %q", want)
}

func TestPrintMounts(t *testing.T) {
	dir := testenv.MountDir(t)
	point := testenv.Mkdir(t, dir, "point")
	var out lines
	background(t, func(ctx context.Context) error { return printMounts(ctx, &out) })
	toggle := func(i int) {
		if i%2 == 0 {
			testenv.Mount(t, "x", point, "tmpfs", 0, "")
		} else {
			testenv.Unmount(t, point)
		}
	}
	out.await(t, "unmounted "+point, toggle)
	out.await(t, "\nmounted "+point, toggle)
	remount := uintptr(unix.MS_REMOUNT | unix.MS_BIND)
	out.await(t, "changed "+dir, func(i int) {
		testenv.Mount(t, "", dir, "", remount|uintptr(i%2)*unix.MS_NODEV, "")
	})
}

func TestWaitForMount(t *testing.T) {
	point := testenv.Mkdir(t, testenv.MountDir(t), "point")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- waitForMount(ctx, point) }()
	testenv.Mount(t, "x", point, "tmpfs", 0, "")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := waitForMount(ctx, point); err != nil {
		t.Errorf("when it is mounted already: %v", err)
	}
	cancel()
	if err := waitForMount(ctx, "/nowhere"); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancel: %v", err)
	}
}

func TestWatchConfig(t *testing.T) {
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	dir := t.TempDir()
	name := filepath.Join(dir, "config")
	var out lines
	background(t, func(ctx context.Context) error {
		return watchConfig(ctx, dir, func(name string) { fmt.Fprintln(&out, "load", name) })
	})
	out.await(t, "load "+name+"\n", func(int) { os.WriteFile(name, []byte("x"), 0o644) })
}

func TestPrintWrites(t *testing.T) {
	testenv.NeedRoot(t, "a mount mark")
	dir := testenv.MountDir(t)
	name := filepath.Join(testenv.Mkdir(t, dir, "sub"), "file")
	var out lines
	background(t, func(ctx context.Context) error { return printWrites(ctx, dir, &out) })
	out.await(t, name+" ", func(int) { os.WriteFile(name, []byte("x"), 0o644) })
}

func TestWaitAll(t *testing.T) {
	sh := testenv.NeedTool(t, "sh")
	var pids []int
	for code := range 3 {
		cmd := exec.Command(sh, "-c", fmt.Sprint("exit ", code))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		pids = append(pids, cmd.Process.Pid)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out bytes.Buffer
	if err := waitAll(ctx, pids, &out); err != nil {
		t.Fatal(err)
	}
	for code, pid := range pids {
		if want := fmt.Sprintf("process %d: exited, status %d\n", pid, code); !strings.Contains(out.String(), want) {
			t.Errorf("%q; want %q", out.String(), want)
		}
	}
	cancel()
	if err := waitAll(ctx, []int{os.Getpid()}, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancel: %v", err)
	}
}

func TestServeEmpty(t *testing.T) {
	testenv.NeedMounts(t)
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		testenv.Missing(t, "needs to open /dev/fuse", err)
	}
	device.Close()
	dir := t.TempDir()
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { ended <- serveEmpty(ctx, dir) }()
	if err := waitForMount(ctx, dir); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() {
		t.Errorf("the root: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an entry: %v", err)
	}
	testenv.Unmount(t, dir)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
