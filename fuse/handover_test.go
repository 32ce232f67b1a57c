package fuse_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

// marshaled returns the state as it arrives in another process.
func marshaled(t testing.TB, state fuse.State) (arrived fuse.State) {
	t.Helper()
	text, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &arrived); err != nil {
		t.Fatal(err)
	}
	return arrived
}

// files returns the session's Files.
func (l *lab) files() []*os.File {
	l.t.Helper()
	files, err := l.s.Files()
	if err != nil {
		l.t.Fatal(err)
	}
	return files
}

// succeed makes a successor of the lab's session that of the lab.
func (l *lab) succeed() (predecessor *fuse.Session) {
	l.t.Helper()
	s, err := fuse.Adopt(l.files(), marshaled(l.t, l.s.State()))
	if err != nil {
		l.t.Fatal(err)
	}
	predecessor, l.s = l.s, s
	l.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			l.t.Errorf("Close of the successor: %v", err)
		}
	})
	return predecessor
}

// TestParityU6HandOver: the devices of a session can be taken, and a session be
// made of them, which goes on where the first was brought to rest. What was
// mounted stays, and the successor knows all about it; its Close unmounts. A
// clone goes along, and can be made again.
func TestParityU6HandOver(t *testing.T) {
	l := newLab(t, &fuse.Config{FSName: "handed over", MaxWrite: 64 << 10})
	l.clone()
	c := newClient(t)
	wait := l.serve(basic)
	if err := c.do("hold", l.path(fileName), fmt.Sprint(unix.O_RDONLY)); err != nil {
		t.Fatal(err)
	}
	l.drained()
	if err := wait(); err != nil {
		t.Errorf("the loop ended by %v", err)
	}
	waitRead := newClient(t).start("stat", l.path("while nobody serves"))
	first := l.succeed()
	if err := first.Close(); err != nil {
		t.Errorf("Close of the predecessor: %v", err)
	}
	if fuseMounts(t, l.dir) != 1 {
		t.Fatal("the predecessor has unmounted")
	}
	before, after := first.State(), l.s.State()
	if !reflect.DeepEqual(before, after) {
		t.Errorf("State was %+v, is %+v", before, after)
	}
	if c := l.s.Config(); c.FSName != "handed over" || c.MountPoint != l.dir {
		t.Errorf("Config is %+v", c)
	}
	if string(first.InitRequest()) != string(l.s.InitRequest()) || l.s.ConnectionID() != first.ConnectionID() {
		t.Error("another INIT or connection")
	}
	if n := descriptors(t); n != 2 {
		t.Errorf("%d descriptors; want 2", n)
	}
	wait = l.serve(basic)
	if err := waitRead(); err != unix.ENOENT {
		t.Errorf("stat: %v", err)
	}
	if text, err := c.ask("readheld", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	l.clone()
	if err := l.s.Unmount(t.Context(), 0); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Unmount of what is in use: %v", err)
	}
	if err := l.s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := wait(); err != nil {
		t.Errorf("the loop ended by %v", err)
	}
	if fuseMounts(t, l.dir) != 0 {
		t.Error("the successor has not unmounted")
	}
	testenv.Feature(t, "hand-over of a FUSE session", "drain")
}

// What nobody was given goes along, each with the device that takes its answer.
func TestHandOverOfTheUndelivered(t *testing.T) {
	l := newLab(t, nil)
	devices := []*fuse.Device{l.s.Device(), l.clone()}
	var streams []*kernstream.Stream[*fuse.Request]
	var waits []func() error
	for i, d := range devices {
		streams = append(streams, d.Requests(t.Context()))
		waits = append(waits, newClient(t).start("stat", l.path(fmt.Sprint("x", i))))
		for deadline := time.Now().Add(patience); l.s.Outstanding() <= i; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("nothing is read")
			}
		}
	}
	l.drained()
	state := l.s.State()
	if len(state.Undelivered) != 2 {
		t.Fatalf("%d undelivered requests", len(state.Undelivered))
	}
	seen := map[int]bool{}
	for _, u := range state.Undelivered {
		h, err := fusewire.DecodeInHeader(u.Message)
		if op := fuse.Opcode(h.Opcode); err != nil || op != fuse.OpLookup && op != fuse.OpGetattr || int(h.Len) != len(u.Message) {
			t.Errorf("undelivered is %+v, %v; want what stat(2) asks", h, err)
		}
		seen[u.Device] = true
	}
	if !seen[0] || !seen[1] {
		t.Errorf("undelivered are requests of the devices %v; want one of each", seen)
	}
	first := l.succeed()
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	for _, s := range streams {
		for r := range s.C {
			t.Errorf("the predecessor has delivered %v", r)
		}
	}
	if n := l.s.Outstanding(); n != 2 {
		t.Errorf("%d requests are outstanding", n)
	}
	for range waits {
		r := l.next(opcode(fuse.OpLookup))
		if err := r.ReplyErrno(unix.ENOENT); err != nil {
			t.Errorf("%v: %v", r, err)
		}
	}
	for _, wait := range waits {
		if err := wait(); err != unix.ENOENT {
			t.Errorf("stat: %v", err)
		}
	}
}

// If the successor fails, the predecessor goes on, and unmounts at its end.
func TestHandOverThatFails(t *testing.T) {
	l := newLab(t, nil)
	wait := l.serve(basic)
	l.drained()
	if err := wait(); err != nil {
		t.Errorf("the loop ended by %v", err)
	}
	files, state := l.files(), l.s.State()
	state.Undelivered = []fuse.Undelivered{{Device: 7}}
	if _, err := fuse.Adopt(files, state); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Adopt: %v", err)
	}
	for _, f := range files {
		if err := f.Close(); err != nil {
			t.Errorf("Adopt has taken what it did not adopt: %v", err)
		}
	}
	l.s.Resume()
	l.serve(basic)
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	if err := l.s.Close(); err != nil || fuseMounts(t, l.dir) != 0 {
		t.Errorf("Close: %v, %d mounts", err, fuseMounts(t, l.dir))
	}
}

// A session that was drained, and whose files nobody has, unmounts.
func TestCloseOfADrainedSession(t *testing.T) {
	l := newLab(t, nil)
	l.drained()
	if err := l.s.Close(); err != nil || fuseMounts(t, l.dir) != 0 {
		t.Errorf("Close: %v, %d mounts", err, fuseMounts(t, l.dir))
	}
}

// What is no session is refused, by name, and stays the caller's.
func TestAdoptErrors(t *testing.T) {
	l := newLab(t, nil)
	state := l.s.State()
	open := func(name string) *os.File {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), name)
		t.Cleanup(func() { f.Close() })
		return f
	}
	closed := open("/dev/null")
	closed.Close()
	with := func(change func(*fuse.State)) fuse.State {
		s := state
		change(&s)
		return s
	}
	for _, c := range []struct {
		name  string
		files []*os.File
		state fuse.State
		want  error
		text  string
	}{
		{"no files", nil, state, unix.EINVAL, "no files"},
		{"no State", []*os.File{open("/dev/fuse")}, fuse.State{}, unix.EINVAL, "MaxWrite"},
		{"another device", []*os.File{open("/dev/null")}, state, unix.EINVAL, "/dev/null: not a FUSE device"},
		{"a device without a mount", []*os.File{open("/dev/fuse")}, state, unix.EINVAL, "nothing is mounted"},
		{"a closed file", []*os.File{closed}, state, os.ErrClosed, "/dev/null"},
		{"a namespace that was a file", []*os.File{open("/dev/fuse")}, with(func(s *fuse.State) { s.InNamespace = true }), unix.EINVAL, "Config.Namespace"},
		{"a process that is gone", []*os.File{open("/dev/fuse")}, with(func(s *fuse.State) { s.Config.PID = 1 << 22 }), nil, "4194304"},
	} {
		before := descriptors(t)
		s, err := fuse.Adopt(c.files, c.state)
		if operation := (*kernstream.OpError)(nil); err == nil || s != nil || c.want != nil && !errors.Is(err, c.want) || !errors.As(err, &operation) {
			t.Errorf("%s: %v; want %v", c.name, err, c.want)
		} else if got := err.Error(); !strings.Contains(got, c.text) {
			t.Errorf("%s: %q lacks %q", c.name, got, c.text)
		}
		if n := descriptors(t); n != before {
			t.Errorf("%s: %d descriptors, then %d", c.name, before, n)
		}
	}

	files := l.files()
	defer files[0].Close()
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := fuse.Adopt(files, state); !errors.Is(err, fuse.ErrUnmounted) {
		t.Errorf("Adopt of what was unmounted: %v", err)
	}
	l.s.Close()
	if _, err := l.s.Files(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Files after Close: %v", err)
	}
}

// A session that was aborted is over, whoever has its files.
func TestAdoptOfWhatWasAborted(t *testing.T) {
	testenv.NeedRoot(t, "the control file system of FUSE")
	l := newLab(t, nil)
	files := l.files()
	defer files[0].Close()
	if err := l.s.Abort(); err != nil {
		t.Fatal(err)
	}
	if _, err := fuse.Adopt(files, l.s.State()); !errors.Is(err, fuse.ErrAborted) {
		t.Errorf("Adopt: %v", err)
	}
}

// A server that was mounted elsewhere can be gone on with by its descriptor and a
// few numbers. What is mounted is not known then, and not unmounted.
func TestAdoptWithoutAMount(t *testing.T) {
	l := newLab(t, nil)
	l.drained()
	mounted := l.s.State()
	s, err := fuse.Adopt(l.files(), fuse.State{Major: 7, Minor: mounted.Minor, MaxWrite: mounted.MaxWrite})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r := range s.Device().All(context.Background()) {
			basic(r)
		}
	}()
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	if err := s.Unmount(t.Context(), 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Unmount: %v", err)
	}
	if err := s.Close(); err != nil || fuseMounts(t, l.dir) != 1 {
		t.Errorf("Close: %v, %d mounts", err, fuseMounts(t, l.dir))
	}
	<-done
	l.s.Resume()
}

// The helper of AutoUnmount does not end a session that was handed over.
func TestHandOverWithHelper(t *testing.T) {
	testenv.NeedTool(t, "fusermount3")
	l := newLab(t, &fuse.Config{AutoUnmount: true})
	l.drained()
	first := l.succeed()
	if err := testenv.Within(t, "Close", first.Close); err != nil {
		t.Error(err)
	}
	if n := len(children(t, "fusermount3")); n != 0 {
		t.Errorf("%d helpers", n)
	}
	if fuseMounts(t, l.dir) != 1 {
		t.Fatal("not mounted any more")
	}
	if l.s.Config().AutoUnmount {
		t.Error("the successor's Config has AutoUnmount")
	}
	l.serve(basic)
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
}

// A session in another namespace is handed over with what stands for that.
func TestHandOverInANamespace(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	c := startClient(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS})
	dir := t.TempDir()
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", c.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer namespace.Close()
	for _, config := range []*fuse.Config{{PID: c.PID}, {Namespace: namespace}} {
		config.MountPoint = dir
		s, err := fuse.Mount(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		l := &lab{t: t, s: s, dir: dir}
		l.drained()
		files, state := l.files(), marshaled(t, s.State())
		if state.InNamespace {
			if _, err := fuse.Adopt(files, state); !errors.Is(err, unix.EINVAL) {
				t.Errorf("Adopt without the namespace: %v", err)
			}
			state.Config.Namespace = namespace
		}
		successor, err := fuse.Adopt(files, state)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		l.s = successor
		l.serve(basic)
		if text, err := c.ask("read", l.path(fileName)); text != content || err != nil {
			t.Errorf("read there: %q, %v", text, err)
		}
		if err := successor.Close(); err != nil {
			t.Error(err)
		}
		if table, err := c.ask("mounts"); err != nil || strings.Contains(table, dir) {
			t.Errorf("still mounted there: %v", err)
		}
	}
	c.end()
}

// TestParityU12MountAgain: what was unmounted is mounted again by its
// configuration.
func TestParityU12MountAgain(t *testing.T) {
	l := newLab(t, &fuse.Config{FSName: "again", Subtype: "parity"})
	for range 3 {
		if err := l.s.Unmount(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if err := l.s.Close(); err != nil {
			t.Fatal(err)
		}
		config := l.s.Config()
		s, err := fuse.Mount(t.Context(), &config)
		if err != nil {
			t.Fatal(err)
		}
		l.s = s
		l.clone()
		l.serve(basic)
		if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
			t.Errorf("read %q, %v", text, err)
		}
		if row := mountLine(t, l.dir); !strings.Contains(row, " - fuse.parity again ") {
			t.Errorf("the mount table has %q", row)
		}
	}
	l.s.Close()
}
