package recorder_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// socketPair returns the two ends of a Unix socket.
func socketPair(t testing.TB) (server, client *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	do(t, err)
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		conn, err := net.FileConn(f)
		f.Close()
		do(t, err)
		conns[i] = conn.(*net.UnixConn)
		t.Cleanup(func() { conn.Close() })
	}
	return conns[0], conns[1]
}

// serve serves one end of a connection, and returns what came of it.
func serve(t testing.TB, ctx context.Context, conn net.Conn, options *recorder.ServeOptions) (result func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- recorder.Serve(ctx, conn, options) }()
	return func() error {
		t.Helper()
		select {
		case err := <-done:
			done <- err
			return err
		case <-time.After(patience):
			t.Fatal("Serve does not return")
			return nil
		}
	}
}

// connect serves a connection, and connects to it.
func connect(t testing.TB, server *recorder.ServeOptions, client *recorder.ConnectOptions) (r *recorder.Recording, served func() error) {
	t.Helper()
	var err error
	waitFor(t, "a fanotify group", func() bool { // all of the user's may be taken by other tests
		s, c := socketPair(t)
		served = serve(t, t.Context(), s, server)
		r, err = recorder.Connect(t.Context(), c, client)
		return err == nil || !errors.Is(served(), unix.EMFILE)
	})
	do(t, err)
	t.Cleanup(func() { r.Close() })
	return r, served
}

// refused connects, and returns the errors of both sides.
func refused(t testing.TB, server *recorder.ServeOptions, client *recorder.ConnectOptions) (clientErr, serverErr error) {
	t.Helper()
	s, c := socketPair(t)
	served := serve(t, t.Context(), s, server)
	r, err := recorder.Connect(t.Context(), c, client)
	if err == nil {
		r.Close()
		t.Error("the client was not refused")
	}
	return err, served()
}

// TestParityR1Serve: a server marks when the client says start, and says when it has: what
// happens before is not in the record, all that happens after is.
func TestParityR1Serve(t *testing.T) {
	needRecorder(t)
	dir := overlay(t, "before", "a", "b", "c")
	container := newContainer(t, dir)
	container.open("/before")
	r, served := connect(t, &recorder.ServeOptions{Target: recorder.Container(container.cmd.Process.Pid)}, nil)
	container.open("/c", "/a", "/b")
	waitFor(t, "three files", func() bool { return r.Progress().Files == 3 })
	container.open("/a")
	container.end()
	accesses, list := finish(t, r)
	do(t, served())
	do(t, r.Err())
	wantComplete(t, list)
	wantPaths(t, list, "", "c", "a", "b")
	if e := list.Entries[1]; e.Count != 2 || !e.Ops.Has(kernstream.OpOpen) {
		t.Errorf("the second file is %+v", e)
	}
	if len(accesses) != 3 || accesses[0].Path != "/c" || accesses[0].PID == 0 || time.Since(accesses[0].When) > patience {
		t.Errorf("the accesses are %v", accesses)
	}
}

// TestConnectLimits: a client may ask for less than the server would give: one
// mount, or a few files.
func TestConnectLimits(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/mnt/x")
	for _, name := range []string{"a", "b", "c"} {
		writeFile(t, dir+"/"+name)
	}
	do(t, unix.Mount("below", dir+"/mnt", "tmpfs", 0, ""))
	defer detach(t, dir+"/mnt")
	writeFile(t, dir+"/mnt/below")
	open := func(options *recorder.ConnectOptions) *recorder.List {
		r, served := connect(t, &recorder.ServeOptions{Target: recorder.Directory(dir)}, options)
		newHelper(t, opener, dir+"/c", dir+"/mnt/below", dir+"/a", dir+"/b").start().end()
		waitFor(t, "the files", func() bool {
			return r.Progress().Files >= 3 || options.MaxFiles > 0 && r.Progress().Files == options.MaxFiles
		})
		r.Close()
		accesses, list := finish(t, r)
		do(t, served())
		for _, a := range accesses {
			if a.Time() != a.When || a.When.IsZero() {
				t.Errorf("%v is of %v; want %v", a, a.Time(), a.When)
			}
		}
		return list
	}
	one := open(&recorder.ConnectOptions{OneMount: true})
	wantComplete(t, one)
	wantPaths(t, one, "", "c", "a", "b")
	few := open(&recorder.ConnectOptions{MaxFiles: 2})
	wantIncomplete(t, few, "further files than the 2")
	wantPaths(t, few, "", "c", "mnt/below")
}

// TestParityR2Descriptors: with descriptors, each file comes open, through the socket; many
// at once, and none is left.
func TestParityR2Descriptors(t *testing.T) {
	needRecorder(t)
	const files = 1000
	dir := tmpfs(t)
	makeFiles(t, dir, files)
	writeFile(t, filepath.Join(dir, "content"))
	for name, begin := range map[string]func() *recorder.Recording{
		"served": func() *recorder.Recording {
			r, _ := connect(t, &recorder.ServeOptions{Target: recorder.Directory(dir), Options: recorder.Options{Descriptors: true}},
				&recorder.ConnectOptions{Descriptors: true})
			return r
		},
		"local": func() *recorder.Recording {
			return record(t, recorder.Directory(dir), &recorder.Options{Descriptors: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := begin()
			newHelper(t, opener, dir+"/content", fmt.Sprint(dir, " ", files)).start().end()
			for n := range files + 1 {
				a := <-r.C
				if a == nil || a.File == nil {
					t.Fatalf("access %d is %v, %v", n, a, r.Err())
				}
				if n == 0 {
					if text, err := io.ReadAll(a.File); err != nil || string(text) != "data" {
						t.Errorf("the file has %q, %v", text, err)
					}
				}
				a.Close()
				a.Close()
			}
			r.Close()
			_, list := finish(t, r)
			wantComplete(t, list)
		})
	}
}

// TestParityR2NoLockStep: a client that does not receive holds back neither the server nor
// those who are recorded, and loses nothing.
func TestParityR2NoLockStep(t *testing.T) {
	needRecorder(t)
	const files = 20_000
	dir := tmpfs(t)
	makeFiles(t, dir, files)
	r, served := connect(t, &recorder.ServeOptions{Target: recorder.Directory(dir)}, nil)
	newHelper(t, opener, fmt.Sprint(dir, " ", files)).start().end()
	waitFor(t, "the files at the client", func() bool { return r.Progress().Files == files })
	r.Close()
	list, err := r.List()
	do(t, err)
	wantComplete(t, list)
	if len(list.Entries) != files {
		t.Errorf("%d files of %d", len(list.Entries), files)
	}
	do(t, served())
}

// TestParityR3Versions: another version of the protocol is refused by both sides, by name.
func TestParityR3Versions(t *testing.T) {
	needRecorder(t)
	t.Run("server", func(t *testing.T) {
		s, c := socketPair(t)
		served := serve(t, t.Context(), s, &recorder.ServeOptions{Target: recorder.Directory("/")})
		readMessage(t, c, 1)
		c.Write(message(2, binary.LittleEndian.AppendUint32(nil, 7)))
		refusal := readMessage(t, c, 4)
		if !bytes.Contains(refusal, []byte("the client has 7, the server 1")) {
			t.Errorf("the refusal is %q", refusal)
		}
		c.Close()
		wantOpError(t, served(), errors.ErrUnsupported, "the client has 7")
	})
	t.Run("client", func(t *testing.T) {
		s, c := socketPair(t)
		s.Write(message(1, binary.LittleEndian.AppendUint32([]byte("KSRECORD"), 2)))
		_, err := recorder.Connect(t.Context(), c, nil)
		wantOpError(t, err, errors.ErrUnsupported, "the server has 2, the client 1")
	})
}

// message is a message of the protocol.
func message(typ byte, payload []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(payload)))
	return append(append(b, typ, 0, 0, 0), payload...)
}

// readMessage reads a message of one type.
func readMessage(t testing.TB, conn net.Conn, typ byte) []byte {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	head := make([]byte, 8)
	_, err := io.ReadFull(conn, head)
	do(t, err)
	payload := make([]byte, binary.LittleEndian.Uint32(head))
	_, err = io.ReadFull(conn, payload)
	do(t, err)
	if head[4] != typ {
		t.Fatalf("a message of type %d: %q; want type %d", head[4], payload, typ)
	}
	return payload
}

// TestParityR3Broken: when the connection ends in the middle, each side ends with an error
// that says so, and the client has what came until then, as an incomplete list.
func TestParityR3Broken(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, filepath.Join(dir, "f"))
	t.Run("server gone", func(t *testing.T) {
		s, c := socketPair(t)
		go func() {
			s.Write(message(1, binary.LittleEndian.AppendUint32([]byte("KSRECORD"), 1)))
			readMessage(t, s, 2)
			s.Write(message(3, make([]byte, 8)))
			s.Write(message(5, []byte{0, 0x20, 1, 0, 5, 9, 2, '/', 'a'}))
			s.Write(message(5, []byte{1, 0x20, 1, 0, 5, 9, 2, '/', 'b'})[:12])
			s.Close()
		}()
		r, err := recorder.Connect(t.Context(), c, nil)
		do(t, err)
		_, list := finish(t, r)
		wantOpError(t, r.Err(), io.ErrUnexpectedEOF, "record", "the other side is gone")
		wantIncomplete(t, list, "the other side is gone")
		wantPaths(t, list, "", "a")
	})
	t.Run("client gone", func(t *testing.T) {
		s, c := socketPair(t)
		served := serve(t, t.Context(), s, &recorder.ServeOptions{Target: recorder.Directory(dir)})
		r, err := recorder.Connect(t.Context(), c, nil)
		do(t, err)
		c.Close()
		wantOpError(t, served(), io.ErrUnexpectedEOF)
		_, list := finish(t, r)
		wantIncomplete(t, list, "record")
		if r.Err() == nil {
			t.Error("the client's stream has no error")
		}
	})
}

// TestParityR6End: the end of the target is a clean end for both; so is that of a client that
// has had enough, and gets the verdict; that of the server is a reason.
func TestParityR6End(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, filepath.Join(dir, "f"))
	t.Run("client", func(t *testing.T) {
		r, served := connect(t, &recorder.ServeOptions{Target: recorder.Directory(dir)}, nil)
		newHelper(t, opener, dir+"/f").start().end()
		r.Close()
		do(t, r.Err())
		do(t, served())
		list, err := r.List()
		do(t, err)
		wantComplete(t, list)
		wantPaths(t, list, "", "f")
	})
	t.Run("server", func(t *testing.T) {
		s, c := socketPair(t)
		cause := errors.New("the building is closed")
		ctx, cancel := context.WithCancelCause(t.Context())
		served := serve(t, ctx, s, &recorder.ServeOptions{Target: recorder.Directory(dir)})
		r, err := recorder.Connect(t.Context(), c, nil)
		do(t, err)
		newHelper(t, opener, dir+"/f").start().end()
		cancel(cause)
		_, list := finish(t, r)
		do(t, r.Err())
		if err := served(); err != cause {
			t.Errorf("Serve: %v", err)
		}
		wantIncomplete(t, list, "the server was stopped: the building is closed")
		wantPaths(t, list, "", "f")
	})
}

// TestParityR4Overflow: what the kernel's queue had no room for is told in its place, and is in the
// verdict. The server is stopped while more files are opened than the queue holds.
func TestParityR4Overflow(t *testing.T) {
	needRecorder(t)
	limit := 16384
	if text, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events"); err == nil {
		if _, err := fmt.Sscan(string(text), &limit); err != nil || limit > 1<<16 {
			testenv.Missing(t, "needs a lower max_queued_events", fs.ErrInvalid)
		}
	}
	dir := tmpfs(t)
	makeFiles(t, dir, limit+1000)
	cmd, conn := childWith(t, server, dir)
	r, err := recorder.Connect(t.Context(), conn, nil)
	do(t, err)
	defer r.Close()
	do(t, cmd.Process.Signal(unix.SIGSTOP))
	waitFor(t, "the server to stop", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		return err == nil && strings.Contains(string(text), ") T ")
	})
	do(t, openNamed(fmt.Sprint(dir, " ", limit+1000)))
	do(t, cmd.Process.Signal(unix.SIGCONT))
	waitFor(t, "the overflow", func() bool { return r.Progress().Overflows > 0 })
	r.Close()
	do(t, r.Err())
	list, err := r.List()
	do(t, err)
	wantIncomplete(t, list, "the kernel's queue was full, once")
	if n := len(list.Entries); n < limit/2 || n > limit {
		t.Errorf("%d files; the queue holds %d", n, limit)
	}
	do(t, cmd.Wait())
}

// TestServeRefuses: a client gets what the server was told to give, and no more; both learn
// why not.
func TestServeRefuses(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	self := recorder.Container(os.Getpid())
	anybody := func(*syscall.Ucred, recorder.Target) error { return nil }
	nobody := func(*syscall.Ucred, recorder.Target) error { return errors.New("not you") }
	for name, c := range map[string]struct {
		server recorder.ServeOptions
		client recorder.ConnectOptions
		is     error
		word   string
	}{
		"another target":      {recorder.ServeOptions{Target: recorder.Directory(dir)}, recorder.ConnectOptions{Target: self}, fs.ErrPermission, "its own target"},
		"descriptors":         {recorder.ServeOptions{Target: recorder.Directory(dir)}, recorder.ConnectOptions{Descriptors: true}, fs.ErrPermission, "no descriptors"},
		"operations":          {recorder.ServeOptions{Target: recorder.Directory(dir)}, recorder.ConnectOptions{Ops: kernstream.OpModify}, fs.ErrPermission, "modify"},
		"no operations":       {recorder.ServeOptions{Target: recorder.Directory(dir), Options: recorder.Options{Ops: kernstream.OpOnDir | kernstream.OpOpen}}, recorder.ConnectOptions{Ops: kernstream.OpOnDir}, fs.ErrInvalid, "asks for nothing"},
		"not authorized":      {recorder.ServeOptions{Authorize: nobody}, recorder.ConnectOptions{Target: self}, fs.ErrPermission, "not you"},
		"nor for its own":     {recorder.ServeOptions{Target: recorder.Directory(dir), Authorize: nobody}, recorder.ConnectOptions{}, fs.ErrPermission, "not you"},
		"a secret directory":  {recorder.ServeOptions{Authorize: nobody}, recorder.ConnectOptions{Target: recorder.Directory("/none")}, fs.ErrPermission, "not you"},
		"a secret process":    {recorder.ServeOptions{Authorize: nobody}, recorder.ConnectOptions{Target: recorder.Container(1 << 30)}, fs.ErrPermission, "not you"},
		"no target":           {recorder.ServeOptions{Authorize: anybody}, recorder.ConnectOptions{}, fs.ErrInvalid, "no target"},
		"no such directory":   {recorder.ServeOptions{Authorize: anybody}, recorder.ConnectOptions{Target: recorder.Directory("/none")}, fs.ErrNotExist, "/none"},
		"no such process":     {recorder.ServeOptions{Authorize: anybody}, recorder.ConnectOptions{Target: recorder.Container(1 << 30)}, os.ErrProcessDone, "1073741824"},
		"a fixed one is gone": {recorder.ServeOptions{Target: recorder.Directory("/none")}, recorder.ConnectOptions{}, fs.ErrNotExist, "/none"},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := refused(t, &c.server, &c.client)
			wantOpError(t, client, c.is, "the server refuses", c.word)
			wantOpError(t, server, c.is, c.word)
		})
	}
}

// TestServeAuthorizes: who decides is told who asks, and for what, as it really is.
func TestServeAuthorizes(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	do(t, os.Mkdir(filepath.Join(dir, "real"), 0o755))
	do(t, os.Symlink("real", filepath.Join(dir, "link")))
	c := newContainer(t, overlay(t, "f"))
	for _, pair := range [][2]recorder.Target{
		{recorder.Directory(dir + "/link"), recorder.Directory(dir + "/real")},
		{recorder.Container(c.cmd.Process.Pid), recorder.Container(c.cmd.Process.Pid)},
	} {
		var asked []any
		r, served := connect(t, &recorder.ServeOptions{Authorize: func(client *syscall.Ucred, target recorder.Target) error {
			asked = append(asked, client.Uid, int(client.Pid), target)
			return nil
		}}, &recorder.ConnectOptions{Target: pair[0]})
		r.Close()
		do(t, served())
		if want := []any{uint32(os.Geteuid()), os.Getpid(), pair[1]}; !reflect.DeepEqual(asked, want) {
			t.Errorf("asked for %v; want %v", asked, want)
		}
	}
}

// TestServeGarbage: what is none of the protocol ends the connection, with an error
// that says so, at any time.
func TestServeGarbage(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	start := message(2, append(binary.LittleEndian.AppendUint32(nil, 1), make([]byte, 13)...))
	for name, c := range map[string]struct {
		sent string
		word string
	}{
		"http":            {"GET / HTTP/1.1\r\n\r\n", "none of this protocol"},
		"zeros":           {strings.Repeat("\x00", 64), "none of this protocol"},
		"too long":        {string(message(2, make([]byte, 1<<18))), "262144 bytes"},
		"not start":       {string(message(7, nil)), "type 7"},
		"empty":           {string(message(2, nil)), "cut short"},
		"flags":           {string(message(2, []byte{1, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})), "flags"},
		"kind":            {string(message(2, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9})), "target 9"},
		"process 0":       {string(message(2, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0})), "no process"},
		"relative":        {string(message(2, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 'a'})), "absolute"},
		"nul":             {string(message(2, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, '/', 0})), "absolute"},
		"left over":       {string(message(2, make([]byte, 18))[:8]) + "\x01" + strings.Repeat("\x00", 17), "left over"},
		"nothing":         {"", "gone"},
		"half":            {string(start[:11]), "gone"},
		"start twice":     {string(start) + string(start), "19 bytes"[3:]},
		"garbage at work": {string(start) + "garbage.", "none of this protocol"},
	} {
		t.Run(name, func(t *testing.T) {
			s, c2 := socketPair(t)
			served := serve(t, t.Context(), s, &recorder.ServeOptions{Target: recorder.Directory(dir)})
			c2.Write([]byte(c.sent)) // as far as the server reads it
			c2.CloseWrite()
			answer, _ := io.ReadAll(c2)
			if name != "nothing" && !bytes.Contains(answer, []byte(c.word)) {
				t.Errorf("the answer is %q; want %q in it", answer, c.word)
			}
			c2.Close()
			err := served()
			if err == nil || !strings.Contains(err.Error(), c.word) {
				t.Errorf("error %v; want one with %q", err, c.word)
			}
		})
	}
}
