package fuse_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityU10Reply: an answer of any number of parts, empty ones too, arrives
// as one.
func TestParityU10Reply(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	answers := make(chan [][]byte, 1)
	l.serve(func(r *fuse.Request) {
		switch r.Header.Opcode {
		case fuse.OpOpen:
			const directIO = 1
			r.Reply(fusewire.AppendOpen(nil, 1, directIO))
		case fuse.OpRead:
			parts := <-answers
			if err := r.Reply(parts...); err != nil {
				t.Errorf("Reply with %d parts: %v", len(parts), err)
			}
		default:
			basic(r)
		}
	})
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<13)
	for _, parts := range [][][]byte{
		nil,
		{nil, []byte("one"), {}},
		{[]byte("a"), []byte("b"), []byte("c"), []byte("d"), []byte("e"), []byte("f")},
		{[]byte("a"), []byte("b"), []byte("c"), []byte("d"), []byte("e"), []byte("f"), []byte("g")},
		{[]byte("a"), []byte("b"), []byte("c"), []byte("d"), []byte("e"), []byte("f"), []byte("g"), []byte("h")},
		{[]byte("a"), nil, []byte("b"), []byte("c"), []byte("d"), []byte("e"), []byte("f"), []byte("g"), []byte("h"), nil, []byte("i")},
		bytes.Split(bytes.Repeat([]byte("x,"), 3000), []byte(",")),
		{big[:100_000]},
		{big[:60_000], big[60_000:120_000]},
	} {
		answers <- parts
		text, err := c.ask("read", l.path(fileName))
		if want := string(bytes.Join(parts, nil)); text != want || err != nil {
			t.Errorf("%d parts: read %d bytes, %v; want %d", len(parts), len(text), err, len(want))
		}
	}
}

// Each request is answered once. What cannot be an answer is refused before the
// kernel sees it.
func TestImpossibleReplies(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	wait := c.start("stat", l.path("x"))
	r := l.next(lookup("x"))
	if n := l.s.Outstanding(); n != 1 {
		t.Errorf("%d requests are outstanding", n)
	}
	for _, errno := range []unix.Errno{512, 1 << 20} {
		if err := r.ReplyErrno(errno); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "lookup of "+l.dir) {
			t.Errorf("errno %d: %v", errno, err)
		}
	}
	if err := r.ReplyErrno(511); err != nil {
		t.Errorf("errno 511: %v", err)
	}
	if err := wait(); err != unix.Errno(511) {
		t.Errorf("stat: %v", err)
	}
	if n := l.s.Outstanding(); n != 0 {
		t.Errorf("%d requests are outstanding", n)
	}
	for name, again := range map[string]func() error{
		"Reply":      func() error { return r.Reply([]byte("x")) },
		"ReplyErrno": func() error { return r.ReplyErrno(unix.ENOENT) },
	} {
		if err := again(); !errors.Is(err, unix.EALREADY) {
			t.Errorf("a second answer by %s: %v", name, err)
		}
	}
	if err := r.Close(); err != nil {
		t.Errorf("Close of what was answered: %v", err)
	}
	if r.Body != nil || r.Raw() != nil {
		t.Error("the body is there after the answer")
	}

	// The kernel does not take a body of another size than it knows, and tells
	// both sides.
	wait = c.start("stat", l.path("x"))
	r = l.next(lookup("x"))
	if err := r.Reply([]byte("too short")); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a malformed answer: %v", err)
	}
	if err := wait(); err != unix.EIO {
		t.Errorf("stat: %v; want EIO", err)
	}
	if err := r.ReplyErrno(unix.ENOENT); !errors.Is(err, unix.EALREADY) {
		t.Errorf("an answer after a malformed one: %v", err)
	}
}

// Close answers EIO to what nobody answered, and may be called again.
func TestRequestClose(t *testing.T) {
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	for range 2 {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := wait(); err != unix.EIO {
		t.Errorf("stat: %v; want EIO", err)
	}
}

// What the kernel only tells has no answer.
func TestNoReply(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	wait := c.start("stat", l.path(fileName))
	l.next(lookup(fileName)).Reply(fileEntry())
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		wait()
	}()
	for waiting := true; waiting; {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if r, err := l.s.Device().Next(ctx); err == nil {
			basic(r)
		}
		cancel()
		select {
		case <-stop:
			waiting = false
		default:
		}
	}
	// The name is dropped from the cache, and the file with it.
	if err := l.s.NotifyInvalEntry(rootNode, fileName); err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatal(err)
	}
	r := l.next(func(r *fuse.Request) bool {
		return r.Header.Opcode == fuse.OpForget || r.Header.Opcode == fuse.OpBatchForget
	})
	for name, answer := range map[string]func() error{
		"Reply":      func() error { return r.Reply() },
		"ReplyErrno": func() error { return r.ReplyErrno(unix.ENOSYS) },
	} {
		if err := answer(); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "no answer") {
			t.Errorf("%s of %v: %v", name, r.Header.Opcode, err)
		}
	}
	if len(r.Body) == 0 {
		t.Error("a refused answer takes the body away")
	}
	if err := r.Close(); err != nil || r.Body != nil {
		t.Errorf("Close: %v", err)
	}
}

// After the end of the session, an answer tells which end that was, and who
// holds a request that nobody waits for may still close it.
func TestReplyAfterTheEnd(t *testing.T) {
	for _, end := range []struct {
		name string
		end  func(l *lab) error
		want error
	}{
		{"abort", func(l *lab) error { return l.s.Abort() }, fuse.ErrAborted},
		{"close", func(l *lab) error { return l.s.Close() }, os.ErrClosed},
		{"force", func(l *lab) error { return l.s.Unmount(l.t.Context(), fuse.UnmountForce) }, nil},
	} {
		t.Run(end.name, func(t *testing.T) {
			l := newLab(t, nil)
			wait := newClient(t).start("stat", l.path("x"))
			r := l.next(lookup("x"))
			ctx := r.Context()
			if ctx.Err() != nil {
				t.Error("the context of an open request is done")
			}
			if err := end.end(l); err != nil {
				t.Logf("%s: %v", end.name, err)
			}
			wait()
			err := r.ReplyErrno(unix.ENOENT)
			if end.want != nil && !errors.Is(err, end.want) || err == nil {
				t.Errorf("Reply: %v; want %v", err, end.want)
			}
			if end.want == nil && !errors.Is(err, fuse.ErrAborted) && !errors.Is(err, fuse.ErrUnmounted) {
				t.Errorf("Reply: %v", err)
			}
			r.Close()
			if cause := context.Cause(ctx); cause == nil || end.want != nil && cause != end.want {
				t.Errorf("the context's cause is %v", cause)
			}
		})
	}
}

// An interrupted client is told to the request by its context.
func TestInterrupt(t *testing.T) {
	l := newLab(t, nil)
	for _, when := range []string{"before", "after"} {
		c := newClient(t)
		c.start("stat", l.path("slow"))
		r := l.next(lookup("slow"))
		var ctx context.Context
		if when == "before" {
			ctx = r.Context()
		}
		if err := unix.Kill(c.PID, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		// The INTERRUPT is read by who waits for the next request.
		read, stop := context.WithTimeout(t.Context(), patience)
		if when == "before" {
			context.AfterFunc(ctx, stop)
		} else {
			time.AfterFunc(100*time.Millisecond, stop)
		}
		if other, err := l.s.Device().Next(read); err == nil {
			t.Fatalf("Next: %v", other)
		}
		stop()
		if when == "after" {
			ctx = r.Context()
		}
		if cause := context.Cause(ctx); cause != unix.EINTR {
			t.Errorf("asked for %s the signal: the context's cause is %v; want EINTR", when, cause)
		}
		if err := r.ReplyErrno(unix.EINTR); err != nil {
			t.Error(err)
		}
		c.end()
	}
}

// The context of a request is done when that is answered, and so is one that is
// asked for afterwards.
func TestContextEndsWithTheAnswer(t *testing.T) {
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	r := l.next(lookup("x"))
	ctx := r.Context()
	if ctx != r.Context() {
		t.Error("another context each time")
	}
	r.ReplyErrno(unix.ENOENT)
	if context.Cause(ctx) != context.Canceled || context.Cause(r.Context()) != context.Canceled {
		t.Errorf("causes %v, %v", context.Cause(ctx), context.Cause(r.Context()))
	}
	wait()
}

// An INTERRUPT of a request that was answered in the meantime is nobody's.
// Clients that are interrupted all the time are answered all the same.
func TestInterruptStorm(t *testing.T) {
	l := newLab(t, nil)
	l.serve(func(r *fuse.Request) {
		if r.Header.Opcode == fuse.OpLookup {
			time.Sleep(50 * time.Microsecond)
		}
		basic(r)
	})
	c := newClient(t)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-stop:
				return
			default:
				// The Go runtime takes this one for a wish to reschedule.
				unix.Kill(c.PID, unix.SIGURG)
				time.Sleep(20 * time.Microsecond)
			}
		}
	}()
	if err := testenv.Within(t, "the client", func() error { return c.do("stats", l.dir, "500") }); err != nil {
		t.Error(err)
	}
}

// The header says who asks for what.
func TestHeader(t *testing.T) {
	l := newLab(t, nil)
	c := newClient(t)
	wait := c.start("stat", l.path("some name"))
	begin := time.Now()
	r := l.next(lookup("some name"))
	h := r.Header
	if h.NodeID != rootNode || h.UID != uint32(os.Getuid()) || h.GID != uint32(os.Getgid()) || h.PID == 0 || h.ExtLen != 0 {
		t.Errorf("%+v", h)
	}
	if string(r.Body) != "some name\x00" || int(h.Len) != len(r.Raw()) || !bytes.Equal(r.Raw()[40:], r.Body) {
		t.Errorf("message %q, body %q, length %d", r.Raw(), r.Body, h.Len)
	}
	if unique := binary.NativeEndian.Uint64(r.Raw()[8:]); unique != h.Unique {
		t.Errorf("Unique is %d; want %d", h.Unique, unique)
	}
	if age := r.Time().Sub(begin); age < 0 || age > patience || r.Time() != r.When {
		t.Errorf("read at %v", r.When)
	}
	want := fmt.Sprintf("fuse: lookup %d of node 1 by %d, 50 bytes", h.Unique, h.PID)
	if r.String() != want {
		t.Errorf("%q; want %q", r, want)
	}
	text, err := json.Marshal(r)
	want = fmt.Sprintf(`{"time":%q,"source":"fuse","opcode":"lookup","unique":%d,"node_id":1,"uid":%d,"gid":%d,"pid":%d,"len":50}`,
		r.When.UTC().Format(time.RFC3339Nano), h.Unique, h.UID, h.GID, h.PID)
	if string(text) != want || err != nil {
		t.Errorf("%s, %v; want %s", text, err, want)
	}
	r.ReplyErrno(unix.ENOENT)
	wait()
}

// A request keeps its body while others come and go.
func TestBodiesAreKept(t *testing.T) {
	l := newLab(t, nil)
	var waits []func() error
	var held []*fuse.Request
	for i := range 8 {
		waits = append(waits, newClient(t).start("stat", l.path(fmt.Sprint("name", i))))
	}
	for range waits {
		held = append(held, l.next(opcode(fuse.OpLookup)))
	}
	seen := map[string]bool{}
	for _, r := range held {
		seen[nameOf(r)] = true
		r.ReplyErrno(unix.ENOENT)
	}
	if len(seen) != len(waits) {
		t.Errorf("bodies %v", seen)
	}
	for _, wait := range waits {
		wait()
	}
}

// Large requests keep their bodies, too.
func TestLargeBodiesAreKept(t *testing.T) {
	l := newLab(t, &fuse.Config{MaxWrite: 64 << 10})
	const clients = 3
	held := make(chan *fuse.Request, clients)
	l.serve(func(r *fuse.Request) {
		switch {
		case r.Header.Opcode == fuse.OpWrite:
			held <- r
		case r.Header.Opcode == fuse.OpLookup && strings.HasPrefix(nameOf(r), "write"):
			// A file for each: the kernel lets one at a time write to one.
			entry := fileEntry()
			binary.NativeEndian.PutUint64(entry, fileNode+uint64(nameOf(r)[5]))
			r.Reply(entry)
		default:
			basic(r)
		}
	})
	var waits []func() error
	for i := range clients {
		waits = append(waits, newClient(t).start("write", l.path(fmt.Sprint("write", i)), "65536"))
	}
	var list []*fuse.Request
	for range clients {
		list = append(list, <-held)
	}
	for i, r := range list {
		for _, other := range list[:i] {
			if &r.Body[0] == &other.Body[0] || r.Header.NodeID == other.Header.NodeID {
				t.Error("two requests share a buffer")
			}
		}
		if n := len(r.Body); n != 40+65536 {
			t.Errorf("a WRITE has a body of %d bytes", n)
		}
		if address := uintptr(unsafe.Pointer(&r.Body[40])); address%uintptr(os.Getpagesize()) != 0 {
			t.Errorf("the data of a WRITE is at %#x", address)
		}
	}
	for _, r := range list {
		basic(r)
	}
	for _, wait := range waits {
		if err := wait(); err != nil {
			t.Error(err)
		}
	}
}

// In a loop, a request costs the allocation of itself.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	const requests = 5000
	attr := fusewire.AppendAttr(nil, dirAttr())
	for _, reader := range readers {
		l := newLab(t, nil)
		c := newClient(t)
		ctx, cancel := context.WithCancel(t.Context())
		var before, after runtime.MemStats
		result := make(chan error, 1)
		n := 0
		go func() {
			result <- reader.read(ctx, l.s.Device(), func(r *fuse.Request) {
				switch n++; n {
				case 100:
					runtime.ReadMemStats(&before)
				case 100 + requests:
					runtime.ReadMemStats(&after)
				}
				switch r.Header.Opcode {
				case fuse.OpGetattr:
					r.Reply(attr)
				default:
					r.ReplyErrno(unix.ENOENT)
				}
			})
		}()
		if err := testenv.Within(t, "the client", func() error { return c.do("stats", l.dir, fmt.Sprint(requests+1000)) }); err != nil {
			t.Fatal(err)
		}
		cancel()
		<-result
		if each := float64(after.Mallocs-before.Mallocs) / requests; each > 1.1 {
			t.Errorf("%s: %.2f allocations for each request", reader.name, each)
		}
		l.s.Close()
	}
}

// A request that was read can be sent again: then the first copy cannot be
// answered any more.
func TestResend(t *testing.T) {
	testenv.NeedKernel(t, 6, 9, "FUSE_NOTIFY_RESEND")
	l := newLab(t, nil)
	wait := newClient(t).start("stat", l.path("x"))
	first := l.next(lookup("x"))
	if err := l.s.NotifyResend(); err != nil {
		t.Fatal(err)
	}
	second := l.next(lookup("x"))
	if second.Header.Unique != first.Header.Unique|1<<63 {
		t.Errorf("unique %#x, then %#x", first.Header.Unique, second.Header.Unique)
	}
	if err := first.ReplyErrno(unix.ENOENT); !errors.Is(err, unix.ENOENT) || errors.Is(err, fuse.ErrUnmounted) {
		t.Errorf("the first copy: %v", err)
	}
	if err := second.ReplyErrno(unix.ENOENT); err != nil {
		t.Errorf("the second copy: %v", err)
	}
	if err := wait(); err != unix.ENOENT {
		t.Error(err)
	}
	testenv.Feature(t, "FUSE requests sent again", "FUSE_NOTIFY_RESEND")
}
