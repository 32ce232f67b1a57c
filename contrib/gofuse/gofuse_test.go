package gofuse_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	raw "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/contrib/gofuse"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

const patience = testenv.Patience

// A lab is a file system of go-fuse on a session, which is served.
type lab struct {
	t      testing.TB
	server *gofuse.Server
	files  raw.RawFileSystem
	s      *fuse.Session
	dir    string
}

// newLab mounts files, which are made for the server.
func newLab(t testing.TB, options *raw.MountOptions, files func(*gofuse.Server) raw.RawFileSystem) *lab {
	t.Helper()
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	l := &lab{t: t, server: gofuse.New(options), dir: t.TempDir()}
	l.files = files(l.server)
	var err error
	if l.s, err = l.server.Mount(t.Context(), l.files, &fuse.Config{MountPoint: l.dir}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return l
}

// serve serves until the session ends or ctx is done, and returns how that was
// once it is called.
func (l *lab) serve(ctx context.Context) (wait func() error) {
	result := make(chan error, 1)
	go func() { result <- l.server.Serve(ctx) }()
	wait = sync.OnceValue(func() error {
		l.t.Helper()
		return testenv.Within(l.t, "the end of Serve", func() error { return <-result })
	})
	l.t.Cleanup(func() {
		l.s.Close()
		wait()
	})
	return wait
}

func (l *lab) path(names ...string) string {
	return filepath.Join(append([]string{l.dir}, names...)...)
}

// loopback is go-fuse's own file system that shows another directory.
func loopback(t testing.TB, dir string, options *fs.Options) func(*gofuse.Server) raw.RawFileSystem {
	t.Helper()
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	return func(s *gofuse.Server) raw.RawFileSystem {
		o := fs.Options{}
		if options != nil {
			o = *options
		}
		o.ServerCallbacks = s
		return fs.NewNodeFS(root, &o)
	}
}

// run runs a program, which must succeed.
func run(t testing.TB, dir string, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	// Not by cmd.Dir: between the clone and the exec, the runtime waits for the child
	// within a system call, and the child would wait for this process to serve it.
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `cd "$0" && exec "$@"`, dir}, words...)...)
	cmd.Env = append(os.Environ(), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=x", "GIT_AUTHOR_EMAIL=x@example.com", "GIT_COMMITTER_NAME=x", "GIT_COMMITTER_EMAIL=x@example.com")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", words, err, out)
	}
}

// go-fuse's loopback file system works as a disk does: programs clone, archive,
// compare, write at the same time, and remove.
func TestLoopback(t *testing.T) {
	for _, tool := range []string{"git", "tar", "diff", "rm"} {
		testenv.NeedTool(t, tool)
	}
	l := newLab(t, nil, loopback(t, t.TempDir(), nil))
	wait := l.serve(context.Background())

	source := t.TempDir()
	for i := range 200 {
		name := filepath.Join(source, fmt.Sprint("d", i%7), fmt.Sprint("f", i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, bytes.Repeat([]byte(name), i*20), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run(t, source, "git", "init", "-q")
	run(t, source, "git", "add", ".")
	run(t, source, "git", "commit", "-q", "-m", "all")
	run(t, l.dir, "git", "clone", "-q", "--no-hardlinks", source, "clone")
	run(t, l.path("clone"), "git", "fsck", "--strict")
	run(t, l.path("clone"), "git", "diff", "--exit-code")
	run(t, l.dir, "tar", "cf", "all.tar", "-C", source, ".")
	if err := os.Mkdir(l.path("copy"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, l.dir, "tar", "xf", "all.tar", "-C", "copy")
	run(t, l.dir, "diff", "-r", source, "copy")

	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			if err := writeAndCompare(l.path(fmt.Sprint("writer", i)), 100); err != nil {
				t.Error(err)
			}
		})
	}
	testenv.Within(t, "the writers", func() error { writers.Wait(); return nil })

	run(t, l.dir, "rm", "-r", "clone", "copy", "all.tar", "writer0", "writer1", "writer2", "writer3")
	if entries, err := os.ReadDir(l.dir); err != nil || len(entries) != 0 {
		t.Errorf("%d entries are left, %v", len(entries), err)
	}
	if err := l.s.Unmount(t.Context(), 0); err != nil {
		t.Errorf("Unmount: %v", err)
	}
	if err := wait(); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// writeAndCompare makes files in dir, and reads what is in them.
func writeAndCompare(dir string, files int) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for i := range files {
		name := filepath.Join(dir, fmt.Sprint(i))
		data := bytes.Repeat([]byte(name), 1+i*37)
		if err := os.WriteFile(name, data, 0o644); err != nil {
			return err
		}
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, data) {
			return fmt.Errorf("%s: %d bytes, %w; want %d", name, len(got), err, len(data))
		}
	}
	return nil
}

// hookFS is a file system whose LOOKUPs are a function's.
type hookFS struct {
	raw.RawFileSystem
	lookup    func(cancel <-chan struct{}, name string) raw.Status
	unmounted chan struct{}
}

func newHookFS(lookup func(cancel <-chan struct{}, name string) raw.Status) *hookFS {
	return &hookFS{raw.NewDefaultRawFileSystem(), lookup, make(chan struct{}, 8)}
}

func (h *hookFS) Lookup(cancel <-chan struct{}, _ *raw.InHeader, name string, _ *raw.EntryOut) raw.Status {
	return h.lookup(cancel, name)
}

func (h *hookFS) GetAttr(_ <-chan struct{}, _ *raw.GetAttrIn, out *raw.AttrOut) raw.Status {
	out.Ino, out.Mode, out.Nlink = 1, unix.S_IFDIR|0o755, 2
	out.Owner = raw.Owner{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
	return raw.OK
}

func (h *hookFS) OnUnmount() { h.unmounted <- struct{}{} }

// stat looks a name up on a thread of its own, which can be interrupted.
func (l *lab) stat(name string) (tid int, wait func() error) {
	l.t.Helper()
	threads, result := make(chan int), make(chan error, 1)
	go func() {
		// The thread ends with the goroutine.
		runtime.LockOSThread()
		threads <- unix.Gettid()
		var st unix.Stat_t
		result <- unix.Stat(l.path(name), &st)
	}()
	return <-threads, func() error {
		l.t.Helper()
		return testenv.Within(l.t, "stat of "+name, func() error { return <-result })
	}
}

// Handlers that wait keep nobody from being served, however many they are, and are
// told when their clients are interrupted.
func TestSlowHandlers(t *testing.T) {
	const slow = 20
	entered := make(chan string, slow)
	release := make(chan struct{})
	l := newLab(t, nil, func(*gofuse.Server) raw.RawFileSystem {
		return newHookFS(func(cancel <-chan struct{}, name string) raw.Status {
			if !strings.HasPrefix(name, "slow") {
				return raw.ENOENT
			}
			entered <- name
			select {
			case <-cancel:
				return raw.EINTR
			case <-release:
				return raw.Status(syscall.EXDEV)
			}
		})
	})
	l.serve(context.Background())
	var tids []int
	var waits []func() error
	for i := range slow {
		tid, wait := l.stat(fmt.Sprint("slow", i))
		tids, waits = append(tids, tid), append(waits, wait)
	}
	for range slow {
		testenv.Within(t, "the handlers", func() error { <-entered; return nil })
	}
	if _, wait := l.stat("quick"); wait() != unix.ENOENT {
		t.Error("stat of a name that is not there")
	}
	for _, tid := range tids[:slow/2] {
		if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
	}
	for i, wait := range waits[:slow/2] {
		if err := wait(); err != unix.EINTR {
			t.Errorf("interrupted stat %d: %v", i, err)
		}
	}
	close(release)
	for i, wait := range waits[slow/2:] {
		if err := wait(); err != unix.EXDEV {
			t.Errorf("stat %d: %v", i, err)
		}
	}
}

// At the end of the session, handlers that are at work are told, and Serve waits
// for them. The file system is told last.
func TestEndCancelsHandlers(t *testing.T) {
	for _, end := range []struct {
		name string
		end  func(l *lab) error
		want error
	}{
		{"close", func(l *lab) error { return l.s.Close() }, nil},
		{"abort", func(l *lab) error { return l.s.Abort() }, fuse.ErrAborted},
		{"force", func(l *lab) error { return l.s.Unmount(context.Background(), fuse.UnmountForce) }, nil},
	} {
		t.Run(end.name, func(t *testing.T) {
			const slow = 3
			entered, left := make(chan struct{}, slow), make(chan struct{}, slow)
			var h *hookFS
			l := newLab(t, nil, func(*gofuse.Server) raw.RawFileSystem {
				h = newHookFS(func(cancel <-chan struct{}, _ string) raw.Status {
					entered <- struct{}{}
					<-cancel
					left <- struct{}{}
					return raw.EINTR
				})
				return h
			})
			wait := l.serve(context.Background())
			for i := range slow {
				l.stat(fmt.Sprint(i))
			}
			for range slow {
				testenv.Within(t, "the handlers", func() error { <-entered; return nil })
			}
			if err := end.end(l); err != nil {
				t.Fatal(err)
			}
			err := wait()
			if !errors.Is(err, end.want) && !(end.name == "force" && errors.Is(err, fuse.ErrAborted)) {
				t.Errorf("Serve: %v; want %v", err, end.want)
			}
			if n := len(left); n != slow {
				t.Errorf("%d handlers have returned when Serve did", n)
			}
			if n := len(h.unmounted); n != 1 {
				t.Errorf("OnUnmount was called %d times", n)
			}
		})
	}
}

// Serve ends with its context and when the session is drained, and waits for
// handlers without disturbing them. It can be called again.
func TestServeAgain(t *testing.T) {
	entered, release := make(chan struct{}, 1), make(chan struct{})
	var h *hookFS
	l := newLab(t, nil, func(*gofuse.Server) raw.RawFileSystem {
		h = newHookFS(func(cancel <-chan struct{}, name string) raw.Status {
			if name != "slow" {
				return raw.ENOENT
			}
			entered <- struct{}{}
			select {
			case <-cancel:
				return raw.EIO
			case <-release:
				return raw.ENOENT
			}
		})
		return h
	})
	cause := errors.New("why")
	for _, how := range []string{"cancel", "drain"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		wait := l.serve(ctx)
		_, waitSlow := l.stat("slow")
		testenv.Within(t, "the handler", func() error { <-entered; return nil })
		var drained chan error
		want := cause
		if how == "cancel" {
			cancel(cause)
		} else {
			drained, want = make(chan error, 1), nil
			go func() { drained <- l.s.Drain(context.Background()) }()
		}
		time.Sleep(20 * time.Millisecond)
		release <- struct{}{}
		if err := wait(); err != want {
			t.Errorf("%s: Serve: %v; want %v", how, err, want)
		}
		if err := waitSlow(); err != unix.ENOENT {
			t.Errorf("%s: the slow stat: %v", how, err)
		}
		if drained != nil {
			if err := testenv.Within(t, "Drain", func() error { return <-drained }); err != nil {
				t.Errorf("Drain: %v", err)
			}
			l.s.Resume()
		}
		if len(h.unmounted) != 0 {
			t.Errorf("%s: OnUnmount was called", how)
		}
		cancel(nil)
	}
	wait := l.serve(context.Background())
	if _, waitQuick := l.stat("quick"); waitQuick() != unix.ENOENT {
		t.Error("stat after all that")
	}
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// A file system that keeps its nodes goes on where its predecessor was brought to
// rest.
func TestHandOver(t *testing.T) {
	backing := t.TempDir()
	l := newLab(t, nil, loopback(t, backing, nil))
	wait := l.serve(context.Background())
	file, err := os.Create(l.path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for i := range 5 {
		if err := l.s.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := wait(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		files, err := l.s.Files()
		if err != nil {
			t.Fatal(err)
		}
		s, err := fuse.Adopt(files, l.s.State())
		if err != nil {
			t.Fatal(err)
		}
		if err := l.s.Close(); err != nil {
			t.Error(err)
		}
		l.s = s
		l.server = gofuse.New(nil)
		if err := l.server.Attach(l.files, s); err != nil {
			t.Fatal(err)
		}
		wait = l.serve(context.Background())
		if _, err := fmt.Fprintln(file, i); err != nil {
			t.Error(err)
		}
	}
	if data, err := os.ReadFile(filepath.Join(backing, "file")); string(data) != "0\n1\n2\n3\n4\n" || err != nil {
		t.Errorf("%q, %v", data, err)
	}
	file.Close()
}

// What the options ask the kernel for is what the session agrees on; a session
// that agreed on something else is refused.
func TestAttach(t *testing.T) {
	options := &raw.MountOptions{EnableLocks: true, SyncRead: true, MaxWrite: 64 << 10, FsName: "the source", Name: "sub"}
	l := newLab(t, options, loopback(t, t.TempDir(), nil))
	state, config := l.s.State(), l.s.Config()
	if !state.Flags.Has(fuse.InitPosixLocks|fuse.InitFlockLocks|fuse.InitDoReaddirplus) || state.Flags.Has(fuse.InitAsyncRead) || state.MaxWrite != 64<<10 {
		t.Errorf("%v, MaxWrite %d", state.Flags, state.MaxWrite)
	}
	if config.FSName != "the source" || config.Subtype != "sub" {
		t.Errorf("%+v", config)
	}
	err := gofuse.New(&raw.MountOptions{SyncRead: true}).Attach(l.files, l.s)
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "posix_locks|flock_locks") {
		t.Errorf("Attach: %v", err)
	}
	if err := gofuse.New(nil).Serve(t.Context()); err == nil || !strings.Contains(err.Error(), "no session") {
		t.Errorf("Serve without a session: %v", err)
	}
}

// With SingleThreaded there is one handler at a time.
func TestSingleThreaded(t *testing.T) {
	var running, most int
	l := newLab(t, &raw.MountOptions{SingleThreaded: true}, func(*gofuse.Server) raw.RawFileSystem {
		return newHookFS(func(<-chan struct{}, string) raw.Status {
			running++ // the race detector looks, too
			most = max(most, running)
			time.Sleep(3 * time.Millisecond)
			running--
			return raw.ENOENT
		})
	})
	wait := l.serve(context.Background())
	var waits []func() error
	for i := range 10 {
		_, wait := l.stat(fmt.Sprint(i))
		waits = append(waits, wait)
	}
	for _, wait := range waits {
		if err := wait(); err != unix.ENOENT {
			t.Error(err)
		}
	}
	l.s.Close()
	wait()
	if most != 1 {
		t.Errorf("%d handlers at a time", most)
	}
}
