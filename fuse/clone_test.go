package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// clone adds a device to the session.
func (l *lab) clone() *fuse.Device {
	l.t.Helper()
	d, err := l.s.Clone()
	if err != nil {
		l.t.Fatal(err)
	}
	return d
}

// nextOf is next for one of several devices.
func (l *lab) nextOf(d *fuse.Device, want func(*fuse.Request) bool) *fuse.Request {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	for {
		r, err := d.Next(ctx)
		if err != nil {
			l.t.Fatalf("Next: %v", err)
		}
		if want(r) {
			return r
		}
		basic(r)
	}
}

// descriptors returns how many descriptors of /dev/fuse this process has.
func descriptors(t testing.TB) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); target == "/dev/fuse" {
			n++
		}
	}
	return n
}

// TestParityU8Clones: several devices deliver the requests of one session, each
// to a reader of its own, by whatever way, and each takes the answers to what it
// delivered. All of them end when the session does.
func TestParityU8Clones(t *testing.T) {
	l := newLab(t, nil)
	const devices, clients, files = 4, 4, 200
	var delivered [devices]atomic.Int64
	results := make(chan error, devices)
	for i := range devices {
		d := l.s.Device()
		if i > 0 {
			d = l.clone()
		}
		go func() {
			results <- readers[i%len(readers)].read(context.Background(), d, func(r *fuse.Request) {
				delivered[i].Add(1)
				if r.Header.Opcode == fuse.OpLookup {
					if err := r.ReplyErrno(unix.ENOENT); err != nil {
						t.Errorf("device %d: %v", i, err)
					}
					return
				}
				basic(r)
			})
		}()
	}
	var load sync.WaitGroup
	for range clients {
		c := newClient(t)
		load.Go(func() {
			if err := c.do("stats", l.dir, fmt.Sprint(files)); err != nil {
				t.Error(err)
			}
		})
	}
	testenv.Within(t, "the clients", func() error { load.Wait(); return nil })
	var total int64
	for i := range devices {
		total += delivered[i].Load()
	}
	if total < clients*files {
		t.Errorf("%d requests were delivered", total)
	}
	if err := l.s.Unmount(t.Context(), 0); err != nil {
		t.Error(err)
	}
	for range devices {
		if err := testenv.Within(t, "the end of a device", func() error { return <-results }); err != nil && err != fuse.ErrUnmounted {
			t.Errorf("ended by %v", err)
		}
	}
	testenv.Feature(t, "several devices of a FUSE session", "FUSE_DEV_IOC_CLONE")
}

// INTERRUPT reaches its request through whatever device it comes.
func TestInterruptThroughAnotherDevice(t *testing.T) {
	l := newLab(t, nil)
	other := l.clone()
	for _, pair := range [][2]*fuse.Device{{l.s.Device(), other}, {other, l.s.Device()}} {
		c := newClient(t)
		c.start("stat", l.path("slow"))
		r := l.nextOf(pair[0], lookup("slow"))
		ctx := r.Context()
		if err := unix.Kill(c.PID, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		read, stop := context.WithTimeout(t.Context(), patience)
		context.AfterFunc(ctx, stop)
		if got, err := pair[1].Next(read); err == nil {
			t.Fatalf("Next: %v", got)
		}
		stop()
		if cause := context.Cause(ctx); cause != unix.EINTR {
			t.Errorf("the context's cause is %v; want EINTR", cause)
		}
		if err := r.ReplyErrno(unix.EINTR); err != nil {
			t.Error(err)
		}
		c.end()
	}
}

// A device may be closed with requests in hand: those can be answered, and the
// descriptor goes with the last of them. Nobody else notices.
func TestCloseOfADeviceWithRequestsInHand(t *testing.T) {
	l := newLab(t, nil)
	d := l.clone()
	before := descriptors(t)
	a := newClient(t).start("stat", l.path("a"))
	first := l.nextOf(d, lookup("a"))
	b := newClient(t).start("stat", l.path("b"))
	second := l.nextOf(d, lookup("b"))
	for range 2 {
		if err := testenv.Within(t, "Close", d.Close); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Next(t.Context()); err != os.ErrClosed {
		t.Errorf("Next of a closed device: %v", err)
	}
	if list := l.s.Devices(); len(list) != 1 || list[0] != l.s.Device() {
		t.Errorf("%d devices can be read", len(list))
	}
	for range d.All(t.Context()) {
		t.Error("a loop over a closed device has a turn")
	}
	s := d.Requests(t.Context())
	if r, ok := <-s.C; ok || s.Err() != nil {
		t.Errorf("a stream of a closed device: %v, %v", r, s.Err())
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors while requests are in hand; want %d", n, before)
	}
	for _, r := range []*fuse.Request{first, second} {
		if err := r.ReplyErrno(unix.ENOENT); err != nil {
			t.Errorf("an answer by a closed device: %v", err)
		}
	}
	for _, wait := range []func() error{a, b} {
		if err := wait(); err != unix.ENOENT {
			t.Errorf("stat: %v", err)
		}
	}
	if n := descriptors(t); n != before-1 {
		t.Errorf("%d descriptors at the end; want %d", n, before-1)
	}
	l.serve(basic)
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
}

// What a stream had read ahead when its device was closed, or when it ended, goes
// to who reads another device, at once.
func TestUndeliveredGoesToAnotherDevice(t *testing.T) {
	for _, how := range []string{"device", "stream"} {
		l := newLab(t, nil)
		d := l.clone()
		s := d.Requests(t.Context())
		wait := newClient(t).start("stat", l.path("x"))
		for deadline := time.Now().Add(patience); l.s.Outstanding() == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("nothing is read")
			}
		}
		// The reader of the other device waits before there is something for it.
		l.serve(basic)
		if how == "device" {
			if err := testenv.Within(t, "Close", d.Close); err != nil {
				t.Fatal(err)
			}
		} else {
			s.Close()
		}
		if err := wait(); err != unix.ENOENT {
			t.Errorf("stat: %v", err)
		}
		for r := range s.C {
			t.Errorf("the stream has %v", r)
		}
		l.s.Close()
	}
}

// Close of a device ends who waits there, and may be called from a loop over its
// requests.
func TestCloseOfADeviceEndsItsReader(t *testing.T) {
	for _, reader := range readers {
		t.Run(reader.name+" waits", func(t *testing.T) {
			l := newLab(t, nil)
			d := l.clone()
			result := make(chan error, 1)
			go func() { result <- reader.read(context.Background(), d, basic) }()
			time.Sleep(5 * time.Millisecond)
			if err := testenv.Within(t, "Close", d.Close); err != nil {
				t.Error(err)
			}
			if err := testenv.Within(t, "the end", func() error { return <-result }); err != nil && err != os.ErrClosed {
				t.Errorf("ended by %v", err)
			}
			select {
			case <-l.s.Done():
				t.Error("the session has ended")
			default:
			}
		})
		t.Run(reader.name+" in the loop", func(t *testing.T) {
			l := newLab(t, nil)
			d := l.clone()
			wait := newClient(t).start("stat", l.path("x"))
			err := testenv.Within(t, "the loop", func() error {
				return reader.read(context.Background(), d, func(r *fuse.Request) {
					if err := d.Close(); err != nil {
						t.Error(err)
					}
					basic(r)
				})
			})
			if err != nil && err != os.ErrClosed {
				t.Error(err)
			}
			l.serve(basic)
			if err := wait(); err != unix.ENOENT {
				t.Errorf("stat: %v", err)
			}
		})
	}
}

// A device that is closed is only that, whoever asks it for what: the session goes
// on.
func TestClosedDevice(t *testing.T) {
	l := newLab(t, nil)
	d := l.clone()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	for _, ctx := range []context.Context{t.Context(), done} {
		for _, reader := range readers {
			err := testenv.Within(t, reader.name, func() error { return reader.read(ctx, d, basic) })
			if err != nil && err != os.ErrClosed {
				t.Errorf("%s: %v", reader.name, err)
			}
		}
	}
	select {
	case <-l.s.Done():
		t.Fatalf("the session has ended: %v", context.Cause(t.Context()))
	default:
	}
	l.serve(basic)
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
}

// What the session does through any of its devices does not mind that one is being
// closed: the others are as good.
func TestCallsWhileDevicesAreClosed(t *testing.T) {
	l := newLab(t, &fuse.Config{MaxWrite: 4096})
	const rounds, clones = 100, 40
	for range rounds {
		for range clones {
			l.clone()
		}
		var calls sync.WaitGroup
		var closed atomic.Bool
		for range 4 {
			calls.Go(func() {
				for !closed.Load() {
					if err := l.s.NotifyInvalInode(fileNode, 0, 0); !errors.Is(err, unix.ENOENT) {
						t.Errorf("a notification: %v", err)
						return
					}
					d, err := l.s.Clone()
					if err != nil {
						t.Errorf("Clone: %v", err)
						return
					}
					d.Close()
				}
			})
		}
		for _, d := range l.s.Devices()[:clones] {
			d.Close()
		}
		closed.Store(true)
		calls.Wait()
		if t.Failed() {
			break
		}
	}
	select {
	case <-l.s.Done():
		t.Errorf("the session has ended: %v", l.s.Err())
	default:
	}
}

// The first device is one among others: it can be closed while there are others.
// The last one cannot.
func TestFirstAndLastDevice(t *testing.T) {
	l := newLab(t, nil)
	first, second := l.s.Device(), l.clone()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	operation := (*kernstream.OpError)(nil)
	if err := second.Close(); !errors.Is(err, unix.EBUSY) || !errors.As(err, &operation) {
		t.Errorf("Close of the last device: %v", err)
	}
	third := l.clone() // of the second
	go func() {
		for r := range third.All(context.Background()) {
			basic(r)
		}
	}()
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	if err := l.s.NotifyInvalInode(rootNode, -1, 0); err != nil {
		t.Errorf("a notification: %v", err)
	}
	if err := l.s.Unmount(t.Context(), 0); err != nil {
		t.Error(err)
	}
	<-l.s.Done()
	if err := second.Close(); err != nil {
		t.Errorf("Close after the end: %v", err)
	}
}

// After the end of the session there are no clones, and the error says which end
// that was.
func TestCloneAfterTheEnd(t *testing.T) {
	for _, end := range ends {
		l := newLab(t, nil)
		if err := end.end(l); err != nil {
			t.Fatal(err)
		}
		before := descriptors(t)
		_, err := l.s.Clone()
		if operation := (*kernstream.OpError)(nil); !errors.Is(err, end.want) || !errors.As(err, &operation) || operation.Object != l.dir {
			t.Errorf("Clone after %s: %v; want %v", end.name, err, end.want)
		}
		if n := descriptors(t); n != before {
			t.Errorf("%d descriptors, then %d", before, n)
		}
	}
}

// A process without descriptors is told so, and the session goes on.
func TestCloneWithoutDescriptors(t *testing.T) {
	testenv.NeedFUSE(t)
	out, err := testenv.Child(t, "few descriptors", t.TempDir()).Output()
	if err != nil || string(out) != "too many open files: Clone, Files\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func init() {
	testenv.RegisterChild("few descriptors", func(args []string) int {
		s, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: args[0]})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer s.Close()
		var limit unix.Rlimit
		unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
		few := limit
		few.Cur = 3
		unix.Setrlimit(unix.RLIMIT_NOFILE, &few)
		_, cloneErr := s.Clone()
		_, filesErr := s.Files()
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		if errors.Is(cloneErr, unix.EMFILE) && errors.Is(filesErr, unix.EMFILE) {
			fmt.Println("too many open files: Clone, Files")
		}
		if d, err := s.Clone(); err != nil || d.Close() != nil {
			fmt.Fprintln(os.Stderr, "Clone with descriptors:", err)
			return 1
		}
		return 0
	})
}

// Closed at any moment under load, devices lose no request.
func TestSoakClonesComeAndGo(t *testing.T) {
	l := newLab(t, nil)
	l.serve(basic)
	results := l.load(testenv.SoakN(4000))
	turns := 0
	for left := cap(results); left > 0; turns++ {
		d := l.clone()
		var reader sync.WaitGroup
		reader.Go(func() { readers[turns%len(readers)].read(context.Background(), d, basic) })
		time.Sleep(time.Duration(turns%7) * 100 * time.Microsecond)
		if err := testenv.Within(t, "Close", d.Close); err != nil {
			t.Fatal(err)
		}
		reader.Wait()
		left -= ended(t, results)
	}
	t.Logf("%d devices", turns)
}
