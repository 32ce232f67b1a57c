package fuse_test

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

// cached serves basic's tree with names and attributes that stay valid, and
// files whose data stays cached, and reports what it is asked for.
func cached(asked chan<- *fuse.Header) func(*fuse.Request) {
	const keepCache = 2
	forever := func(b []byte, offset int) []byte {
		binary.NativeEndian.PutUint64(b[offset:], 1<<30)
		return b
	}
	return func(r *fuse.Request) {
		header := r.Header
		switch {
		case lookup(fileName)(r):
			r.Reply(forever(forever(fileEntry(), 16), 24))
		case r.Header.Opcode == fuse.OpGetattr && r.Header.NodeID == fileNode:
			r.Reply(forever(fileAttr(), 0))
		case r.Header.Opcode == fuse.OpGetattr:
			r.Reply(forever(fusewire.AppendAttr(nil, dirAttr()), 0))
		case r.Header.Opcode == fuse.OpOpen:
			r.Reply(fusewire.AppendOpen(nil, 1, keepCache))
		case r.Header.Opcode == fuse.OpNotifyReply:
			if got := string(r.Body[40:]); !strings.HasPrefix(got, content) {
				header.Unique = 0
			}
			r.Close()
		default:
			basic(r)
		}
		asked <- &header
	}
}

// expect waits until something was asked for.
func expect(t testing.TB, asked <-chan *fuse.Header, opcodes ...fuse.Opcode) *fuse.Header {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case h := <-asked:
			for _, o := range opcodes {
				if h.Opcode == o {
					return h
				}
			}
		case <-timeout:
			t.Fatalf("nobody asks for %v", opcodes)
		}
	}
}

// quiet fails the test if one of opcodes was asked for, and forgets what was.
func quiet(t testing.TB, asked <-chan *fuse.Header, opcodes ...fuse.Opcode) {
	t.Helper()
	for {
		select {
		case h := <-asked:
			for _, o := range opcodes {
				if h.Opcode == o {
					t.Errorf("asked for %v", o)
				}
			}
		case <-time.After(5 * time.Millisecond):
			return
		}
	}
}

func newCachedLab(t *testing.T) (*lab, *client, <-chan *fuse.Header) {
	l := newLab(t, nil)
	asked := make(chan *fuse.Header, 1000)
	l.serve(cached(asked))
	c := newClient(t)
	if text, err := c.ask("read", l.path(fileName)); text != content || err != nil {
		t.Fatalf("read %q, %v", text, err)
	}
	quiet(t, asked)
	if text, err := c.ask("read", l.path(fileName)); text != content || err != nil {
		t.Fatalf("read %q, %v", text, err)
	}
	quiet(t, asked, fuse.OpLookup, fuse.OpGetattr, fuse.OpRead)
	return l, c, asked
}

// Each notification makes the kernel forget what it says.
func TestNotifyInvalidates(t *testing.T) {
	for _, n := range []struct {
		name   string
		notify func(s *fuse.Session) error
		asked  fuse.Opcode
		major  int
		minor  int
	}{
		{"inode", func(s *fuse.Session) error { return s.NotifyInvalInode(fileNode, 0, 0) }, fuse.OpRead, 0, 0},
		{"attributes", func(s *fuse.Session) error { return s.NotifyInvalInode(fileNode, -1, 0) }, fuse.OpGetattr, 0, 0},
		{"entry", func(s *fuse.Session) error { return s.NotifyInvalEntry(rootNode, fileName) }, fuse.OpLookup, 0, 0},
		{"expire", func(s *fuse.Session) error { return s.NotifyExpireEntry(rootNode, fileName) }, fuse.OpLookup, 0, 0},
		{"delete", func(s *fuse.Session) error { return s.NotifyDelete(rootNode, fileNode, fileName) }, fuse.OpLookup, 0, 0},
		{"epoch", func(s *fuse.Session) error { return s.NotifyIncEpoch() }, fuse.OpLookup, 6, 16},
		{"prune", func(s *fuse.Session) error { return s.NotifyPrune(fileNode) }, fuse.OpLookup, 6, 18},
	} {
		t.Run(n.name, func(t *testing.T) {
			if n.major > 0 {
				testenv.NeedKernel(t, n.major, n.minor, "the notification "+n.name)
			}
			l, c, asked := newCachedLab(t)
			if err := n.notify(l.s); err != nil {
				t.Fatal(err)
			}
			c.do("read", l.path(fileName))
			expect(t, asked, n.asked)
		})
	}
}

// The kernel says what it does not know, and so does the session what is no
// name, or when it has ended.
func TestNotifyErrors(t *testing.T) {
	l, _, _ := newCachedLab(t)
	if err := l.s.NotifyInvalInode(77, 0, 0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("an unknown node: %v", err)
	}
	if err := l.s.NotifyInvalEntry(rootNode, "nobody"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("an unknown name: %v", err)
	}
	for _, name := range []string{"", "a/b", "a\x00", strings.Repeat("x", 256)} {
		if err := l.s.NotifyInvalEntry(rootNode, name); !errors.Is(err, unix.EINVAL) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if err := l.s.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := l.s.NotifyInvalInode(fileNode, 0, 0); !errors.Is(err, fuse.ErrAborted) {
		t.Errorf("after an abort: %v", err)
	}
	l.s.Close()
	if err := l.s.NotifyInvalInode(fileNode, 0, 0); !errors.Is(err, fuse.ErrAborted) {
		t.Errorf("after Close: %v", err)
	}
}

// Data goes into the kernel's cache, and comes back from there.
func TestNotifyStoreAndRetrieve(t *testing.T) {
	l, c, asked := newCachedLab(t)
	want := strings.ToUpper(content)
	if err := l.s.NotifyStore(fileNode, 0, []byte(want)); err != nil {
		t.Fatal(err)
	}
	if text, err := c.ask("read", l.path(fileName)); text != want || err != nil {
		t.Errorf("read %q, %v; want %q", text, err, want)
	}
	quiet(t, asked, fuse.OpRead)
	if err := l.s.NotifyStore(fileNode, 0, []byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := l.s.NotifyRetrieve(4711, fileNode, 0, uint32(len(content))); err != nil {
		t.Fatal(err)
	}
	if h := expect(t, asked, fuse.OpNotifyReply); h.Unique != 4711 || h.NodeID != fileNode {
		t.Errorf("%+v", h)
	}
}

// A server that serves POLL is asked, and wakes who waits.
func TestServePoll(t *testing.T) {
	l := newLab(t, &fuse.Config{ServePoll: true})
	handle := make(chan uint64, 1)
	ready := make(chan uint32, 4)
	ready <- 0
	ready <- unix.POLLIN
	l.serve(func(r *fuse.Request) {
		if r.Header.Opcode != fuse.OpPoll {
			basic(r)
			return
		}
		const scheduleNotify = 1
		if binary.NativeEndian.Uint32(r.Body[16:])&scheduleNotify != 0 {
			handle <- binary.NativeEndian.Uint64(r.Body[8:])
		}
		var out [8]byte
		binary.NativeEndian.PutUint32(out[:], <-ready)
		r.Reply(out[:])
	})
	c := newClient(t)
	if err := c.do("hold", l.path(fileName), "0"); err != nil {
		t.Fatal(err)
	}
	wait := c.start("poll", l.path(fileName))
	if err := l.s.NotifyPoll(<-handle); err != nil {
		t.Error(err)
	}
	if err := wait(); err != nil {
		t.Errorf("poll: %v", err)
	}
	c.do("drop", l.path(fileName))
}
