package recorder_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// The program of a server that can be killed: it serves descriptor 3.
const server = "server"

func init() {
	testenv.RegisterChild(server, func(args []string) int {
		conn, err := net.FileConn(os.NewFile(3, "socket"))
		if err == nil {
			err = recorder.Serve(context.Background(), conn, &recorder.ServeOptions{
				Target: recorder.Directory(args[0]), Options: recorder.Options{LimitedQueue: true},
			})
		}
		if err != nil {
			return 1
		}
		return 0
	})
	testenv.RegisterChild("client", func(args []string) int {
		conn, err := net.FileConn(os.NewFile(3, "socket"))
		if err != nil {
			return 1
		}
		r, err := recorder.Connect(context.Background(), conn, nil)
		if err != nil {
			return 1
		}
		for range r.C {
		}
		return 0
	})
}

// storm opens files of a directory again and again.
func storm(t testing.TB, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `while :; do cat "$0"/*/* >/dev/null 2>&1; done`, dir)
	do(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
}

// endsSoon calls end, which must return within a second, on a machine that has the time.
func endsSoon(t testing.TB, what string, end func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		end()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s does not end", what)
	}
}

// TestParityR3Killed: a server or a client is killed, or the socket cut in the middle of a
// batch, at a random moment. The other side ends with an error, or with a whole record if that
// had come; a list that is not whole says so; no descriptor, goroutine or process is left.
func TestParityR3Killed(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	makeFiles(t, dir, 500)
	storm(t, dir)
	for i := range testenv.SoakN(10) {
		for name, run := range map[string]func(testing.TB, string){"server killed": serverKilled, "client killed": clientKilled, "cut": socketCut} {
			run(t, dir)
			if t.Failed() {
				t.Fatalf("round %d: %s", i, name)
			}
		}
	}
}

// moment is a random time, most of them short.
func moment() { time.Sleep(time.Duration(rand.ExpFloat64() * float64(10*time.Millisecond))) }

// childWith starts a program with one end of a socket.
func childWith(t testing.TB, name string, args ...string) (*exec.Cmd, *net.UnixConn) {
	t.Helper()
	theirs, ours := socketPair(t)
	f, err := theirs.File()
	do(t, err)
	theirs.Close()
	cmd := testenv.Child(t, name, args...)
	cmd.ExtraFiles = []*os.File{f}
	do(t, cmd.Start())
	f.Close()
	return cmd, ours
}

// killSoon kills a program at a random time. The channel is closed after that.
func killSoon(cmd *exec.Cmd) <-chan struct{} {
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		moment()
		cmd.Process.Kill()
		cmd.Wait()
	}()
	return killed
}

func serverKilled(t testing.TB, dir string) {
	cmd, conn := childWith(t, server, dir)
	killed := killSoon(cmd)
	endsSoon(t, "the client", func() {
		r, err := recorder.Connect(t.Context(), conn, nil)
		if err == nil {
			_, list := finish(t, r)
			wantIncomplete(t, list, "the other side is gone")
			err = r.Err()
		}
		wantOpError(t, err, io.ErrUnexpectedEOF)
	})
	<-killed
}

func clientKilled(t testing.TB, dir string) {
	cmd, conn := childWith(t, "client")
	killed := killSoon(cmd)
	endsSoon(t, "the server", func() {
		if err := recorder.Serve(t.Context(), conn, &recorder.ServeOptions{Target: recorder.Directory(dir)}); err == nil {
			t.Error("Serve returns nil")
		}
	})
	<-killed
}

// socketCut ends a connection after a random number of bytes, by a proxy between the two.
func socketCut(t testing.TB, dir string) {
	serverEnd, a := socketPair(t)
	b, clientEnd := socketPair(t)
	served := serve(t, t.Context(), serverEnd, &recorder.ServeOptions{Target: recorder.Directory(dir)})
	limit := int64(rand.IntN(5_000))
	proxied := make(chan struct{}, 2)
	go func() { io.Copy(a, b); proxied <- struct{}{} }()
	go func() {
		io.CopyN(b, a, limit)
		a.Close()
		b.Close()
		proxied <- struct{}{}
	}()
	endsSoon(t, "both", func() {
		r, err := recorder.Connect(t.Context(), clientEnd, nil)
		if err == nil {
			_, list := finish(t, r)
			wantIncomplete(t, list, "the other side is gone")
			err = r.Err()
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after %d bytes: %v", limit, err)
		}
		if err := served(); err == nil {
			t.Error("Serve returns nil")
		}
	})
	<-proxied
	<-proxied
}

// TestServeStalled: a client that takes nothing, but stays, is given up; meanwhile the
// server costs no more than its list.
func TestServeStalled(t *testing.T) {
	needRecorder(t)
	recorder.SetStalled(t, 100*time.Millisecond)
	dir := tmpfs(t)
	// More than the socket holds.
	long := filepath.Join(dir, fmt.Sprintf("%0200d", 0), fmt.Sprintf("%0200d", 0))
	makeFiles(t, long, 5000)
	s, c := socketPair(t)
	do(t, s.SetWriteBuffer(4096))
	served := serve(t, t.Context(), s, &recorder.ServeOptions{Target: recorder.Directory(dir)})
	readMessage(t, c, 1)
	c.Write(message(2, append([]byte{1, 0, 0, 0}, make([]byte, 13)...)))
	readMessage(t, c, 3)
	newHelper(t, opener, fmt.Sprint(long, " ", 5000)).start().end()
	wantOpError(t, served(), os.ErrDeadlineExceeded, "does not answer")
}

// TestServeHandshake: a client that says nothing is given up.
func TestServeHandshake(t *testing.T) {
	needRecorder(t)
	recorder.SetHandshake(t, 100*time.Millisecond)
	s, c := socketPair(t)
	served := serve(t, t.Context(), s, &recorder.ServeOptions{Target: recorder.Directory("/")})
	readMessage(t, c, 1)
	if refusal := readMessage(t, c, 4); len(refusal) == 0 {
		t.Error("the client is not told why")
	}
	wantOpError(t, served(), os.ErrDeadlineExceeded)
	c.Close()
}
