package fuse_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// patience is how long a test waits for what must happen.
const patience = testenv.Patience

// A lab is a session on a directory of its own.
type lab struct {
	t   testing.TB
	s   *fuse.Session
	dir string
}

// newLab mounts what config says, on a new directory unless that is set.
func newLab(t testing.TB, config *fuse.Config) *lab {
	t.Helper()
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	if config == nil {
		config = &fuse.Config{}
	}
	c := *config
	if c.MountPoint == "" {
		c.MountPoint = t.TempDir()
	}
	s, err := fuse.Mount(t.Context(), &c)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, s: s, dir: c.MountPoint}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if n := fuseMounts(t, l.dir); n > 0 {
			t.Errorf("%d mounts are left on %s", n, l.dir)
		}
	})
	return l
}

func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

// fuseMounts returns how many FUSE file systems are mounted on dir.
func fuseMounts(t testing.TB, dir string) (n int) {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); f[4] == dir && strings.Contains(line, " - fuse") {
			n++
		}
	}
	return n
}

// mountLine returns the row of /proc/self/mountinfo of what is mounted on dir.
func mountLine(t testing.TB, dir string) (row string) {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); f[4] == dir {
			row = strings.TrimSpace(line)
		}
	}
	return row
}

// serve answers requests by handle until the session ends, and returns how that
// was once it is called.
func (l *lab) serve(handle func(*fuse.Request)) (wait func() error) {
	l.t.Helper()
	result := make(chan error, 1)
	go func() {
		for r, err := range l.s.Device().All(context.Background()) {
			if err != nil {
				result <- err
				return
			}
			handle(r)
		}
		result <- nil
	}()
	wait = sync.OnceValue(func() error {
		l.t.Helper()
		return testenv.Within(l.t, "the end of the loop", func() error { return <-result })
	})
	l.t.Cleanup(func() {
		l.s.Close()
		wait()
	})
	return wait
}

// ends are how a session may end, and what is said of it then.
var ends = []struct {
	name string
	end  func(l *lab) error
	want error
}{
	{"unmount", func(l *lab) error { return unix.Unmount(l.dir, 0) }, fuse.ErrUnmounted},
	{"abort", func(l *lab) error { return l.s.Abort() }, fuse.ErrAborted},
	{"close", func(l *lab) error { return l.s.Close() }, os.ErrClosed},
}

// next returns the next request for which want says yes; others are answered by
// basic.
func (l *lab) next(want func(*fuse.Request) bool) *fuse.Request {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	for {
		r, err := l.s.Device().Next(ctx)
		if err != nil {
			l.t.Fatalf("Next: %v", err)
		}
		if want(r) {
			return r
		}
		basic(r)
	}
}

// opcode returns a function for next.
func opcode(o fuse.Opcode) func(*fuse.Request) bool {
	return func(r *fuse.Request) bool { return r.Header.Opcode == o }
}

// lookup returns a function for next: the LOOKUP of a name.
func lookup(name string) func(*fuse.Request) bool {
	return func(r *fuse.Request) bool {
		return r.Header.Opcode == fuse.OpLookup && nameOf(r) == name
	}
}

func nameOf(r *fuse.Request) string { return strings.TrimRight(string(r.Body), "\x00") }

const (
	rootNode = 1
	fileNode = 2
	fileName = "file"
	content  = "what is in the file"
)

// dirAttr and fileAttr are the two files of basic.
func dirAttr() *fusewire.Attr {
	return &fusewire.Attr{Ino: rootNode, Mode: unix.S_IFDIR | 0o755, Nlink: 2, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}

func fileAttr() []byte {
	attr := fusewire.AppendAttr(nil, &fusewire.Attr{
		Ino: fileNode, Mode: unix.S_IFREG | 0o644, Nlink: 1, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()),
	})
	binary.NativeEndian.PutUint64(attr[16+8:], uint64(len(content)))
	return attr
}

func fileEntry() []byte {
	entry := fusewire.AppendEntry(nil, fileNode, &fusewire.Attr{})
	copy(entry[40:], fileAttr()[16:])
	return entry
}

// basic serves a root directory with one file, in which is content, and
// forgets what is written.
func basic(r *fuse.Request) {
	switch r.Header.Opcode {
	case fuse.OpGetattr:
		switch r.Header.NodeID {
		case rootNode:
			r.Reply(fusewire.AppendAttr(nil, dirAttr()))
		default:
			r.Reply(fileAttr())
		}
	case fuse.OpLookup:
		if r.Header.NodeID == rootNode && nameOf(r) == fileName {
			r.Reply(fileEntry())
		} else {
			r.ReplyErrno(unix.ENOENT)
		}
	case fuse.OpOpen, fuse.OpOpendir:
		r.Reply(fusewire.AppendOpen(nil, 1, 0))
	case fuse.OpRead:
		offset := binary.NativeEndian.Uint64(r.Body[8:])
		size := binary.NativeEndian.Uint32(r.Body[16:])
		text := content[min(offset, uint64(len(content))):]
		r.Reply([]byte(text[:min(len(text), int(size))]))
	case fuse.OpWrite:
		var out [8]byte
		copy(out[:4], r.Body[16:20]) // size
		r.Reply(out[:])
	case fuse.OpReaddir, fuse.OpRelease, fuse.OpReleasedir, fuse.OpFlush, fuse.OpSetattr:
		if r.Header.Opcode == fuse.OpSetattr {
			r.Reply(fileAttr())
			return
		}
		r.Reply()
	case fuse.OpStatfs:
		r.Reply(make([]byte, 80))
	default:
		r.Close()
	}
}

// A client is a process that uses the file system: another one than the server,
// as everywhere but in tests.
type client struct {
	t     testing.TB
	PID   int
	in    io.WriteCloser
	out   *bufio.Reader
	kill  func()
	wait  func() error
	ended bool
}

func init() { testenv.RegisterChild("client", clientMain) }

func newClient(t testing.TB) *client { return startClient(t, nil) }

func startClient(t testing.TB, attr *syscall.SysProcAttr) *client {
	t.Helper()
	cmd := testenv.Child(t, "client")
	cmd.SysProcAttr = attr
	in, out := testenv.StartPiped(t, cmd)
	c := &client{t: t, PID: cmd.Process.Pid, in: in, out: out, wait: cmd.Wait}
	c.kill = func() { cmd.Process.Kill() }
	t.Cleanup(c.end)
	if err := c.do("ready"); err != nil {
		t.Fatal(err)
	}
	return c
}

// end ends the client, and reaps it.
func (c *client) end() {
	if c.ended {
		return
	}
	c.ended = true
	c.in.Close()
	// It may wait for an answer, in which case it dies when that is there or
	// the session is gone.
	c.kill()
	testenv.Within(c.t, "the end of a client", c.wait)
}

// do lets the client do something (see obey) and returns its error.
func (c *client) do(words ...string) error {
	_, err := c.ask(words...)
	return err
}

// start is do without waiting.
func (c *client) start(words ...string) (wait func() error) {
	c.t.Helper()
	result := make(chan error, 1)
	go func() { result <- c.do(words...) }()
	return func() error {
		c.t.Helper()
		return testenv.Within(c.t, fmt.Sprint("client: ", words), func() error { return <-result })
	}
}

func (c *client) ask(words ...string) (string, error) { return testenv.Ask(c.in, c.out, words...) }

func clientMain([]string) int {
	held := map[string]int{}
	return testenv.Obey(func(words []string) (string, error) { return obey(words, held) })
}

// obey does what words say: an operation and a path.
func obey(words []string, held map[string]int) (string, error) {
	number := func(i int) (n int) {
		fmt.Sscan(words[i], &n)
		return n
	}
	switch words[0] {
	case "ready":
		return "", nil
	case "stat":
		var st unix.Stat_t
		err := unix.Stat(words[1], &st)
		return fmt.Sprint(st.Size), err
	case "stats": // of how many missing names
		var st unix.Stat_t
		for i := range number(2) {
			if err := unix.Stat(fmt.Sprintf("%s/%d", words[1], i), &st); err != unix.ENOENT {
				return "", fmt.Errorf("stat %d: %w", i, err)
			}
		}
		return "", nil
	case "hold":
		fd, err := unix.Open(words[1], number(2), 0)
		held[words[1]] = fd
		return "", err
	case "drop":
		return "", unix.Close(held[words[1]])
	case "readheld":
		buf := make([]byte, 1<<20)
		n, err := unix.Pread(held[words[1]], buf, 0)
		return string(buf[:max(n, 0)]), err
	case "poll":
		fds := []unix.PollFd{{Fd: int32(held[words[1]]), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(fds, -1)
			if err != unix.EINTR {
				return fmt.Sprint(n), err
			}
		}
	case "write": // how many bytes
		fd, err := unix.Open(words[1], unix.O_WRONLY, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		n, err := unix.Write(fd, make([]byte, number(2)))
		return fmt.Sprint(n), err
	case "read":
		fd, err := unix.Open(words[1], unix.O_RDONLY, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		buf := make([]byte, 1<<20)
		n, err := unix.Read(fd, buf)
		return string(buf[:max(n, 0)]), err
	case "mkdir":
		return "", unix.Mkdir(words[1], 0o755)
	case "setxattr": // how long
		return "", unix.Setxattr(words[1], "user.x", make([]byte, number(2)), 0)
	case "umount": // flags
		return "", unix.Unmount(words[1], number(2))
	case "mount": // source, target, type
		return "", unix.Mount(words[1], words[2], words[3], 0, "")
	case "mounts":
		text, err := os.ReadFile("/proc/self/mountinfo")
		return string(text), err
	}
	return "", fmt.Errorf("unknown word %q", words)
}

// load lets clients look up n names in all. Each sends its result.
func (l *lab) load(n int) (results chan error) {
	results = make(chan error, 2)
	for range cap(results) {
		c := newClient(l.t)
		go func() { results <- c.do("stats", l.dir, fmt.Sprint(n/cap(results))) }()
	}
	return results
}

// ended counts the clients that have ended by now.
func ended(t testing.TB, results <-chan error) (n int) {
	t.Helper()
	for {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
			n++
		default:
			return n
		}
	}
}
