package fuse_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Hand-over between processes: a successor that is another program, and a server
// that is killed.

// A server is another process that goes on with a session.
type server struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Reader
}

// startServer starts a server for the session. files stay the caller's.
func startServer(t testing.TB, files []*os.File, state fuse.State, how string) *server {
	t.Helper()
	text, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	cmd := testenv.Child(t, "successor", string(text), how)
	cmd.ExtraFiles = files
	in, out := testenv.StartPiped(t, cmd)
	s := &server{t, cmd, in, out}
	t.Cleanup(s.kill)
	if line := s.line(); line != "ready\n" {
		t.Fatalf("the server says %q", line)
	}
	return s
}

func (s *server) line() (line string) {
	s.t.Helper()
	testenv.Within(s.t, "the server", func() (err error) {
		line, err = s.out.ReadString('\n')
		return err
	})
	return line
}

// kill ends it at once, whatever it does.
func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// finish lets it come to rest and end, and returns its State.
func (s *server) finish() (state fuse.State) {
	s.t.Helper()
	s.in.Close()
	if err := json.Unmarshal([]byte(s.line()), &state); err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		s.t.Fatal(err)
	}
	return state
}

func init() {
	testenv.RegisterChild("successor", func(args []string) int {
		if err := successor(args[0], args[1]); err != nil {
			fmt.Fprintln(os.Stderr, "successor:", err)
			return 1
		}
		return 0
	})
}

// successor serves a session, from descriptor 3 on, until its standard input
// ends. It is brought to rest then.
func successor(text, how string) error {
	var state fuse.State
	if err := json.Unmarshal([]byte(text), &state); err != nil {
		return err
	}
	var files []*os.File
	for fd := 3; ; fd++ {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil || st.Rdev != unix.Mkdev(10, 229) {
			break
		}
		unix.CloseOnExec(fd)
		files = append(files, os.NewFile(uintptr(fd), "/dev/fuse"))
	}
	s, err := fuse.Adopt(files, state)
	if err != nil {
		return err
	}
	if how == "resend" {
		if err := s.NotifyResend(); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	handle := basic
	if how == "mute" {
		handle = func(r *fuse.Request) {
			if r.Header.Opcode == fuse.OpLookup {
				fmt.Println(nameOf(r))
				return
			}
			basic(r)
		}
	}
	var readers sync.WaitGroup
	readers.Go(func() {
		for r := range s.Device().All(context.Background()) {
			handle(r)
		}
	})
	io.Copy(io.Discard, os.Stdin)
	if err := s.Drain(context.Background()); err != nil {
		return err
	}
	readers.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(s.State()); err != nil {
		return err
	}
	return s.Close()
}

// Handed over from process to process, a session is the same to its clients: none
// of them sees an error.
func TestHandOverBetweenProcesses(t *testing.T) {
	l := newLab(t, nil)
	l.drained()
	files, state := l.files(), l.s.State()
	defer files[0].Close()
	l.s.Close()
	const clients = 2
	results := make(chan error, clients)
	stop := make(chan struct{})
	for range clients {
		c := newClient(t)
		go func() {
			for {
				select {
				case <-stop:
					results <- nil
					return
				default:
				}
				if text, err := c.ask("read", l.path(fileName)); text != content || err != nil {
					results <- fmt.Errorf("read %q: %w", text, err)
					return
				}
			}
		}()
	}
	for range testenv.SoakN(5) {
		s := startServer(t, files, state, "")
		time.Sleep(20 * time.Millisecond)
		state = s.finish()
	}
	close(stop)
	s := startServer(t, files, state, "")
	for range clients {
		if err := testenv.Within(t, "the clients", func() error { return <-results }); err != nil {
			t.Error(err)
		}
	}
	state = s.finish()
	var err error
	if l.s, err = fuse.Adopt(files, state); err != nil {
		t.Fatal(err)
	}
	if err := l.s.Close(); err != nil {
		t.Error(err)
	}
}

// A server is killed with requests in its hands. Whoever has kept descriptors of
// it goes on, and has the kernel send them again: their clients see nothing but
// a pause.
func TestKilledServer(t *testing.T) {
	l := newLab(t, nil)
	l.clone()
	l.drained()
	files, state := l.files(), l.s.State()
	l.s.Close()
	s := startServer(t, files, state, "mute")
	var waits []func() error
	for _, name := range []string{"a", "b", "c"} {
		waits = append(waits, newClient(t).start("stat", l.path(name)))
		if line := s.line(); line != name+"\n" {
			t.Fatalf("the server has read %q", line)
		}
	}
	s.kill()
	var err error
	if l.s, err = fuse.Adopt(files, state); err != nil {
		t.Fatal(err)
	}
	err = l.s.NotifyResend()
	if !testenv.KernelAtLeast(6, 9) {
		// The clients wait, until the connection is gone.
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("NotifyResend: %v; want EINVAL", err)
		}
		l.s.Close()
		for _, wait := range waits {
			if err := wait(); err != unix.ECONNABORTED {
				t.Errorf("stat: %v", err)
			}
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	for range waits {
		r := l.next(opcode(fuse.OpLookup))
		if r.Header.Unique>>63 != 1 {
			t.Errorf("%v was not sent before", r)
		}
		if err := r.ReplyErrno(unix.ENOENT); err != nil {
			t.Error(err)
		}
	}
	for _, wait := range waits {
		if err := wait(); err != unix.ENOENT {
			t.Errorf("stat: %v", err)
		}
	}
	if err := l.s.Close(); err != nil {
		t.Error(err)
	}
	testenv.Feature(t, "recovery of a killed FUSE server", "FUSE_NOTIFY_RESEND")
}

// A session that could not be brought to rest can be handed over as it is: what
// the predecessor holds is sent to the successor, and the predecessor cannot
// answer it any more.
func TestHandOverWithRequestsInHand(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "FUSE_NOTIFY_RESEND")
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := l.s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Drain: %v", err)
	}
	first := l.succeed()
	if err := l.s.NotifyResend(); err != nil {
		t.Fatal(err)
	}
	if err := r.ReplyErrno(unix.EIO); !errors.Is(err, unix.ENOENT) {
		t.Errorf("an answer of the predecessor: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	l.next(lookup("x")).ReplyErrno(unix.ENOENT)
	if err := wait(); err != unix.ENOENT {
		t.Errorf("stat: %v", err)
	}
}
