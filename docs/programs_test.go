// Package docs_test compiles and runs what the documentation shows.
package docs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// patience is how long a test waits for what must happen.
const patience = 2 * testenv.Patience

// TestSnippets: the programs of the text are functions of coming_from_test.go
// (those on go-fuse are compared in contrib/gofuse), and each has one before it.
func TestSnippets(t *testing.T) {
	text, err := os.ReadFile("coming-from.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("coming_from_test.go")
	if err != nil {
		t.Fatal(err)
	}
	before := regexp.MustCompile("Before[^\n]*:\n\n```(go|rust)\n")
	after := regexp.MustCompile("(?s)After[^\n]*:\n\n```go\n(.*?)```")
	sections := strings.Split(string(text), "\n## ")[1:]
	for _, section := range sections {
		name, _, _ := strings.Cut(section, "\n")
		snippets := after.FindAllStringSubmatch(section, -1)
		if n := len(before.FindAllString(section, -1)); n == 0 || n != len(snippets) {
			t.Errorf("%s: %d programs before, %d after", name, n, len(snippets))
		}
		for _, snippet := range snippets {
			if !strings.Contains(snippet[1], "gofuse.") && !strings.Contains(string(code), "\n"+snippet[1]) {
				t.Errorf("%s: this is not in coming_from_test.go:\n%s", name, snippet[1])
			}
		}
	}
	if len(sections) < 10 {
		t.Errorf("%d sections", len(sections))
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

// Keys are refused to others as soon as the program runs, other files are not,
// and afterwards nothing is.
func TestDenyKeys(t *testing.T) {
	testenv.NeedRoot(t, "permission events")
	testenv.NeedMounts(t)
	sh := testenv.NeedTool(t, "sh")
	dir := testenv.MountDir(t)
	key, other := testenv.Touch(t, dir, "a.key"), testenv.Touch(t, dir, "other")
	opens := func(name string) bool {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return exec.CommandContext(ctx, sh, "-c", `exec <"$0"`, name).Run() == nil
	}
	stop := background(t, func(ctx context.Context) error { return denyKeys(ctx, dir) })
	begin := time.Now()
	for opens(key) || !opens(other) { // it has not begun, or an answer came too late
		if time.Since(begin) > patience {
			t.Fatal("the key can be opened, or the other file cannot")
		}
	}
	stop()
	if !opens(key) {
		t.Error("the key cannot be opened after the end")
	}
}

func TestPrintLengths(t *testing.T) {
	testenv.NeedRoot(t, "a mount mark")
	dir := testenv.MountDir(t)
	mount, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Close()
	name := filepath.Join(testenv.Mkdir(t, dir, "sub"), "file")
	var out lines
	background(t, func(ctx context.Context) error { return printLengths(ctx, mount, &out) })
	out.await(t, name+" has 5 bytes\n", func(int) { os.WriteFile(name, []byte("12345"), 0o644) })
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

// Both watches tell of the end, unless one was stopped before.
func TestWatchTwice(t *testing.T) {
	for want, stop := range map[string]bool{"log": true, "log restart": false} {
		cmd := exec.Command(testenv.NeedTool(t, "sh"), "-c", "read line; exit 3")
		stdin, _ := testenv.StartPiped(t, cmd)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		var out bytes.Buffer
		keep, ended := make(chan struct{}), make(chan error, 1)
		go func() { ended <- watchTwice(ctx, cmd.Process.Pid, keep, &out) }()
		if stop {
			select {
			case keep <- struct{}{}:
			case err := <-ended:
				t.Fatal(err)
			}
		}
		stdin.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 3 {
			t.Errorf("the process was reaped: %v", err)
		}
		end := fmt.Sprintf(" process %d: exited, status 3\n", cmd.Process.Pid)
		if got := strings.TrimSpace(strings.ReplaceAll(out.String(), end, " ")); got != want {
			t.Errorf("%q; want %q, each with %q", out.String(), want, end)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := watchTwice(ctx, os.Getpid(), nil, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancel: %v", err)
	}
}

// wantEmpty checks that an empty directory is served.
func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() {
		t.Errorf("the root: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an entry: %v", err)
	}
}

func TestServeEmpty(t *testing.T) {
	testenv.NeedFUSE(t)
	dir := t.TempDir()
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { ended <- serveEmpty(ctx, dir) }()
	if err := waitForMount(ctx, dir); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, dir)
	testenv.Unmount(t, dir)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Two goroutines serve until the file system is unmounted, or until a cancel,
// which unmounts it.
func TestServeByTwo(t *testing.T) {
	testenv.NeedFUSE(t)
	answer := func(r *fuse.Request) {
		switch r.Header.Opcode {
		case fuse.OpGetattr:
			r.Reply(rootAttributes())
		case fuse.OpForget:
			r.Close()
		default:
			r.ReplyErrno(unix.ENOENT)
		}
	}
	for _, unmount := range []bool{true, false} {
		dir := t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- serveByTwo(ctx, dir, answer) }()
		if err := waitForMount(ctx, dir); err != nil {
			t.Fatal(err)
		}
		wantEmpty(t, dir)
		if unmount {
			testenv.Unmount(t, dir)
			if err := <-ended; err != nil {
				t.Errorf("after an unmount: %v", err)
			}
			continue
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("after a cancel: %v", err)
		}
		mounts, err := kernstream.Mounts(&kernstream.MountOptions{Filter: func(m *kernstream.Mount) bool { return m.MountPoint == dir }})
		if err != nil || len(mounts) > 0 {
			t.Errorf("left mounted: %v, %v", mounts, err)
		}
	}
}

// The list has what the command opened, the program first.
func TestRecordOpens(t *testing.T) {
	testenv.NeedRoot(t, "mount marks")
	testenv.NeedMounts(t)
	dir := t.TempDir()
	opened, file := testenv.Touch(t, dir, "opened"), filepath.Join(dir, "record")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	sh := testenv.NeedTool(t, "sh")
	program, err := filepath.EvalSymlinks(sh)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(sh, "-c", `exec <"$0"`, opened)
	if err := recordOpens(ctx, cmd, file); err != nil {
		t.Fatal(err)
	}
	text, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	list, err := recorder.ReadList(text)
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, entry := range list.Entries {
		paths = append(paths, entry.Path)
	}
	if n := len(paths); n < 2 || paths[0] != program || paths[n-1] != opened {
		t.Errorf("the list is %q; want %s first, and %s last", paths, program, opened)
	}
}
