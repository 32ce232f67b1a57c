package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() {
	testenv.RegisterChild("upgrade", func(args []string) int {
		// A keeper starts this program again, as what it is.
		os.Setenv("KERNSTREAM_TEST_CHILD", "upgrade")
		os.Args = append([]string{"upgrade"}, args...)
		main()
		return 0
	})
	testenv.RegisterChild("load", func(args []string) int {
		if err := load(args[0]); err != nil {
			fmt.Fprintln(os.Stderr, "load:", err)
			return 1
		}
		return 0
	})
}

// A lab is where servers serve one after the other.
type lab struct {
	t                      *testing.T
	socket, backing, point string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	testenv.NeedFUSE(t)
	l := &lab{t, filepath.Join(t.TempDir(), "socket"), t.TempDir(), t.TempDir()}
	t.Cleanup(func() { unix.Unmount(l.point, unix.MNT_DETACH) })
	return l
}

// A server is one that was started, or a keeper.
type server struct {
	t   *testing.T
	cmd *exec.Cmd
	out *bufio.Reader
	pid int // of who serves
}

// start starts a server, or a keeper, and waits until it serves.
func (l *lab) start(flags ...string) *server {
	l.t.Helper()
	cmd := testenv.Child(l.t, "upgrade", append(flags, l.socket, l.backing, l.point)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	s := &server{t: l.t, cmd: cmd, out: bufio.NewReader(out)}
	l.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Signal(unix.SIGTERM)
			s.wait()
		}
	})
	s.serving()
	return s
}

// serving waits until the server, or the next one of the keeper, serves.
func (s *server) serving() {
	s.t.Helper()
	line := make(chan string, 1)
	go func() {
		text, err := s.out.ReadString('\n')
		if err != nil {
			text += err.Error()
		}
		line <- text
	}()
	select {
	case text := <-line:
		if n, err := fmt.Sscanf(text, "serving %d\n", &s.pid); n != 1 {
			s.t.Fatalf("the server says %q: %v", text, err)
		}
	case <-time.After(testenv.Patience):
		s.t.Fatal("the server does not serve")
	}
}

// wait waits until the server has ended, well.
func (s *server) wait() {
	s.t.Helper()
	kill := time.AfterFunc(testenv.Patience, func() { s.cmd.Process.Kill() })
	defer kill.Stop()
	if err := s.cmd.Wait(); err != nil {
		s.t.Errorf("the server ends: %v", err)
	}
}

// A client uses the files without a pause, in another process.
type client struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Reader
}

func (l *lab) client() *client {
	l.t.Helper()
	cmd := testenv.Child(l.t, "load", l.point)
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	return &client{l.t, cmd, in, bufio.NewReader(out)}
}

// finish ends the client, and tells what it has seen.
func (c *client) finish() {
	c.t.Helper()
	c.in.Close()
	kill := time.AfterFunc(testenv.Patience, func() { c.cmd.Process.Kill() })
	defer kill.Stop()
	text, _ := io.ReadAll(c.out)
	if err := c.cmd.Wait(); err != nil {
		c.t.Errorf("the client: %v\n%s", err, text)
		return
	}
	var r loadReport
	if err := json.Unmarshal(text, &r); err != nil || r.Operations == 0 {
		c.t.Errorf("the client says %q: %v", text, err)
	}
	c.t.Logf("%d operations, the longest took %v", r.Operations, r.Longest)
}

type loadReport struct {
	Operations int64
	Longest    time.Duration
}

// load uses the files of dir by several threads until its input ends. Any error
// ends it, and so does a byte that is not as it was written.
func load(dir string) error {
	var stop atomic.Bool
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop.Store(true)
	}()
	var users sync.WaitGroup
	list := []*user{{dir: filepath.Join(dir, "a")}, {dir: filepath.Join(dir, "b")}}
	for _, u := range list {
		users.Go(func() {
			if u.err = u.do("mkdir", func() error { return unix.Mkdir(u.dir, 0o755) }); u.err != nil {
				return
			}
			for !stop.Load() && u.err == nil {
				u.err = u.turn()
			}
		})
	}
	users.Wait()
	var report loadReport
	for _, u := range list {
		if u.err != nil {
			return u.err
		}
		report.Operations += u.operations
		report.Longest = max(report.Longest, u.longest)
	}
	return json.NewEncoder(os.Stdout).Encode(report)
}

// A user has files of its own, one of which is open all the time.
type user struct {
	dir        string
	held       int    // descriptor of the file that is open
	written    []byte // what is in it
	operations int64
	longest    time.Duration
	err        error
}

// do does one thing, and measures it.
func (u *user) do(what string, f func() error) error {
	begin := time.Now()
	err := f()
	u.longest = max(u.longest, time.Since(begin))
	u.operations++
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// turn makes, writes, reads, renames and removes.
func (u *user) turn() error {
	data := make([]byte, 1+rand.IntN(200_000))
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	name, other := u.dir+"/x", u.dir+"/y"
	return errors.Join(
		u.do("write", func() error { return writeNew(name, data) }),
		u.do("read", func() error { return compare(name, data) }),
		u.do("rename", func() error { return unix.Rename(name, other) }),
		u.do("read again", func() error { return compare(other, data) }),
		u.useHeld(),
		u.do("mkdir", func() error { return unix.Mkdir(name, 0o700) }),
		u.do("rmdir", func() error { return unix.Rmdir(name) }),
		u.do("list", func() error { return listOnly(u.dir, "held", "y") }),
		u.do("replace", func() error { return replace(name, other, data[:len(data)/2]) }),
		u.do("unlink", func() error { return unix.Unlink(other) }),
		u.do("stat", func() error { return missing(other) }),
	)
}

// useHeld appends to a file that is open for some turns, and compares all of it.
// Then it is removed, still open, and used once more.
func (u *user) useHeld() error {
	name := u.dir + "/held"
	if u.held == 0 {
		if err := u.do("create", func() (err error) {
			u.held, err = unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600)
			return err
		}); err != nil {
			return err
		}
		u.written = nil
	}
	part := bytes.Repeat([]byte{byte(rand.Uint32())}, 1+rand.IntN(10_000))
	use := func() error {
		if n, err := unix.Pwrite(u.held, part, int64(len(u.written))); n != len(part) || err != nil {
			return fmt.Errorf("%d of %d bytes: %w", n, len(part), err)
		}
		u.written = append(u.written, part...)
		got := make([]byte, len(u.written)+1)
		n, err := unix.Pread(u.held, got, 0)
		return same(got[:max(n, 0)], u.written, err)
	}
	if err := u.do("use of an open file", use); err != nil || len(u.written) < 100_000 {
		return err
	}
	return errors.Join(
		u.do("unlink of an open file", func() error { return unix.Unlink(name) }),
		u.do("use of a removed file", use),
		u.do("close", func() error { return unix.Close(u.held) }),
		u.do("create", func() (err error) {
			u.held, err = unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600)
			u.written = nil
			return err
		}),
	)
}

// writeNew makes a file. By O_DIRECT, or else by way of the page cache.
func writeNew(name string, data []byte) error {
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	n, err := unix.Write(fd, data)
	if n != len(data) && err == nil {
		err = io.ErrShortWrite
	}
	return errors.Join(err, unix.Close(fd))
}

func compare(name string, want []byte) error {
	fd, err := unix.Open(name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	got := make([]byte, len(want)+1)
	n, err := unix.Read(fd, got)
	return same(got[:max(n, 0)], want, err)
}

func same(got, want []byte, err error) error {
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%d bytes are not the %d that were written", len(got), len(want))
	}
	return err
}

// replace renames a file with new data over another one.
func replace(name, other string, data []byte) error {
	return errors.Join(writeNew(name, data), unix.Rename(name, other), compare(other, data))
}

func listOnly(dir string, names ...string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(names, " ") {
		return fmt.Errorf("%q; want %q", got, names)
	}
	return nil
}

func missing(name string) error {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != unix.ENOENT {
		return fmt.Errorf("stat of what was removed: %w", err)
	}
	return nil
}

// Replaced twenty times while a client writes and reads without a pause, the file
// system is the same: no error, and every byte as it was written.
func TestUpgradesUnderLoad(t *testing.T) {
	l := newLab(t)
	server := l.start()
	client := l.client()
	for range testenv.SoakN(20) {
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		successor := l.start()
		server.wait()
		server = successor
	}
	client.finish()
	server.cmd.Process.Signal(unix.SIGINT)
	server.wait()
	l.over()
}

// Killed twenty times at any moment, and started again by a keeper, the same.
func TestKillsUnderLoad(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "FUSE_NOTIFY_RESEND")
	l := newLab(t)
	keeper := l.start("-keep")
	client := l.client()
	for range testenv.SoakN(20) {
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
		if err := unix.Kill(keeper.pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		keeper.serving()
	}
	client.finish()
	if err := unix.Unmount(l.point, 0); err != nil {
		t.Error(err)
	}
	keeper.wait()
	l.over()
}

// over checks that nothing is left but the files.
func (l *lab) over() {
	l.t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(table), l.point) {
		l.t.Errorf("still mounted: %v", err)
	}
	if _, err := os.Stat(filepath.Join(l.backing, removedDir)); !errors.Is(err, fs.ErrNotExist) {
		l.t.Errorf("files without a name are left: %v", err)
	}
}

// A keeper's server can be taken over by hand, and a keeper passes signals on.
func TestUpgradeOfAKeptServer(t *testing.T) {
	l := newLab(t)
	keeper := l.start("-keep")
	second := l.start("-keep")
	keeper.wait()
	if err := os.WriteFile(filepath.Join(l.point, "file"), []byte("x"), 0o644); err != nil {
		t.Error(err)
	}
	second.cmd.Process.Signal(unix.SIGTERM)
	second.wait()
	l.over()
	if data, err := os.ReadFile(filepath.Join(l.backing, "file")); string(data) != "x" || err != nil {
		t.Errorf("%q, %v", data, err)
	}
}

// A successor that fails costs nothing: the server goes on.
func TestSuccessorThatFails(t *testing.T) {
	l := newLab(t)
	server := l.start()
	for _, how := range []string{"silent", "rude"} {
		conn, err := dial(l.socket)
		if err != nil {
			t.Fatal(err)
		}
		if how == "silent" {
			p, err := receive(conn)
			if err != nil {
				t.Fatal(err)
			}
			p.close()
		}
		conn.Close()
		if err := os.WriteFile(filepath.Join(l.point, how), []byte(how), 0o644); err != nil {
			t.Errorf("%s: %v", how, err)
		}
	}
	successor := l.start()
	server.wait()
	for _, how := range []string{"silent", "rude"} {
		if data, err := os.ReadFile(filepath.Join(l.point, how)); string(data) != how || err != nil {
			t.Errorf("%q, %v", data, err)
		}
	}
	successor.cmd.Process.Signal(unix.SIGTERM)
	successor.wait()
	l.over()
}
