package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Ends of streams with permission events, and everything at once.

// TestPermissionEveryEnd: whichever way a stream ends, all who wait get the
// default answer: those whose event the consumer has, those whose event nobody
// received, and those whose event was not read.
func TestPermissionEveryEnd(t *testing.T) {
	cause := errors.New("enough")
	ends := map[string]func(w *kernstream.FileWatcher, cancel context.CancelCauseFunc) error{
		"Close":  func(w *kernstream.FileWatcher, _ context.CancelCauseFunc) error { w.Close(); return nil },
		"cancel": func(_ *kernstream.FileWatcher, cancel context.CancelCauseFunc) error { cancel(cause); return cause },
	}
	for name, end := range ends {
		for _, byDefault := range []kernstream.Response{deny, allow} {
			for _, held := range []int{0, 1, 20} {
				want := unix.EPERM
				if byDefault.Allow {
					want = 0
				}
				needMarks(t)
				o := newOpeners(t)
				testenv.NoLeaks(t)
				l := &fileLab{t: t, dir: labDir(t)}
				l.ensure("f")
				ctx, cancel := context.WithCancelCause(t.Context())
				w, err := kernstream.WatchFiles(ctx, contentOptions(byDefault), kernstream.Mark{Path: l.path("f"), Ops: openPerm})
				l.do(err)
				var results []<-chan opened
				for range 20 {
					results = append(results, o.begin("open", l.path("f")))
				}
				var events []*kernstream.FileEvent
				for range held {
					events = append(events, receiveFile(t, w))
				}
				o.waiting(20)
				wantErr := end(w, cancel)
				for e := range w.C {
					t.Errorf("%s: event %v after the end", name, e)
				}
				if err := w.Err(); err != wantErr {
					t.Errorf("%s: Err is %v; want %v", name, err, wantErr)
				}
				if n := w.Defaulted(); n != 20 {
					t.Errorf("%s: %d default answers; want 20", name, n)
				}
				for _, result := range results {
					o.want(result, want)
				}
				for _, e := range events {
					wantError(t, e.Allow(), os.ErrClosed)
					if e.FD() < 0 {
						t.Errorf("%s: the descriptor of an event that was delivered is closed", name)
					}
					l.do(e.Close())
				}
				o.want(o.begin("open", l.path("f")), 0) // no mark is left
				cancel(nil)
				w.Close()
			}
		}
	}
}

// TestPermissionFailedStart: a watcher that cannot be set up leaves nobody
// waiting, even if one of its marks was set.
func TestPermissionFailedStart(t *testing.T) {
	needMarks(t)
	o := newOpeners(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if errno := o.end(o.begin("open", l.path("f"))); errno != 0 && errno != unix.EPERM {
					t.Errorf("an opener got %v", errnoText(errno))
				}
			}
		}
	})
	for range 50 {
		_, err := kernstream.WatchFiles(t.Context(), contentOptions(deny),
			kernstream.Mark{Path: l.path("f"), Ops: openPerm}, kernstream.Mark{Path: l.path("nothing"), Ops: openPerm})
		wantError(t, err, unix.ENOENT, "nothing")
	}
	close(stop)
	storm.Wait()
}

// hangingOpens are three opens of files whose file system does not answer the
// kernel's own opens, as the events are read.
type hangingOpens struct {
	t       *testing.T
	o       *openers
	dir     string
	results []<-chan opened
	abort   func() // the file system answers all, by an error
}

func newHangingOpens(t *testing.T) *hangingOpens {
	t.Helper()
	dir := fuseDir(t, "open hangs")
	return &hangingOpens{t: t, o: newOpeners(t), dir: dir, abort: sync.OnceFunc(func() { abortFUSE(t, dir) })}
}

// interleave begins an open of path, then one that hangs, and so on, and ends with
// one of path.
func (h *hangingOpens) interleave(path string, before int) (good []<-chan opened) {
	h.t.Helper()
	for i := range 7 {
		if i%2 == 0 {
			good = append(good, h.o.begin("open", path))
		} else {
			h.results = append(h.results, h.o.begin("open", h.dir+"/f"))
		}
		h.o.waiting(before + i + 1) // so they are in the queue in this order
	}
	return good
}

// TestPermissionFileSystemHangs: the kernel opens the file of an event as that is
// read. If the file systems of some do not answer, the end of the stream answers
// all others, and only its C is closed when the file system is through.
func TestPermissionFileSystemHangs(t *testing.T) {
	needMarks(t)
	h := newHangingOpens(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	w, err := kernstream.WatchFiles(t.Context(), contentOptions(deny),
		kernstream.Mark{Path: l.path("f"), Ops: openPerm}, kernstream.Mark{Type: kernstream.MarkMount, Path: h.dir, Ops: openPerm})
	l.do(err)
	defer h.abort()
	held := h.o.begin("open", l.path("f"))
	e := receiveFile(t, w)
	good := h.interleave(l.path("f"), 1)
	closed := make(chan struct{})
	go func() {
		w.Close()
		close(closed)
	}()
	h.o.want(held, unix.EPERM)
	for _, result := range good {
		h.o.want(result, unix.EPERM)
	}
	l.do(e.Close())
	h.abort()
	for _, result := range h.results {
		h.o.end(result)
	}
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("Close does not return")
	}
}

// TestPermissionReadsOn: while file systems do not answer the kernel's opens, all
// that is asked about other files is judged: what is in the queue before, between
// and after, and what comes later. When they are through, so are those who asked
// about them, and one reads as before.
func TestPermissionReadsOn(t *testing.T) {
	needMarks(t)
	for _, options := range []*kernstream.FileOptions{contentOptions(deny), preContentOptions(deny)} {
		h := newHangingOpens(t)
		testenv.NoLeaks(t)
		l := &fileLab{t: t, dir: labDir(t)}
		l.ensure("f")
		before := countGroups(t)
		w, err := kernstream.WatchFiles(t.Context(), options,
			kernstream.Mark{Path: l.path("f"), Ops: openPerm}, kernstream.Mark{Type: kernstream.MarkMount, Path: h.dir, Ops: openPerm})
		l.do(err)
		defer w.Close()
		defer h.abort()
		allowNext := func() {
			e := receiveFile(t, w)
			if e.Path != l.path("f") {
				t.Errorf("event %v", e)
			}
			l.do(errors.Join(e.Allow(), e.Close()))
		}
		good := h.interleave(l.path("f"), 0)
		for range good {
			allowNext()
		}
		for _, result := range good {
			h.o.want(result, 0)
		}
		later := h.o.begin("open", l.path("f"))
		allowNext()
		h.o.want(later, 0)
		h.abort()
		for range h.results {
			receiveFile(t, w).Close()
		}
		for _, result := range h.results {
			h.o.end(result)
		}
		later = h.o.begin("open", l.path("f"))
		allowNext()
		h.o.want(later, 0)
		for begin := time.Now(); countGroups(t) > before+1; time.Sleep(time.Millisecond) {
			if time.Since(begin) > patience {
				t.Fatal("the group has more than its own descriptor")
			}
		}
		later = h.o.begin("open", l.path("f"))
		allowNext()
		h.o.want(later, 0)
		l.do(w.Close())
	}
}

// countGroups counts the descriptors of fanotify groups that this process has.
func countGroups(t *testing.T) (n int) {
	t.Helper()
	links, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if target, err := os.Readlink("/proc/self/fd/" + link.Name()); err == nil && target == "anon_inode:[fanotify]" {
			n++
		}
	}
	return n
}

// fuseConnection is the directory of a FUSE mount in fusectl, which is mounted
// for that.
func fuseConnection(t testing.TB, dir string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	control := t.TempDir()
	mount(t, "none", control, "fusectl", 0, "")
	t.Cleanup(func() { unix.Unmount(control, unix.MNT_DETACH) })
	return filepath.Join(control, fmt.Sprint(unix.Minor(uint64(st.Dev))))
}

// abortFUSE ends all requests to a FUSE server.
func abortFUSE(t testing.TB, dir string) {
	t.Helper()
	abortConnection(t, fuseConnection(t, dir))
}

// abortConnection does that by the directory of the connection.
func abortConnection(t testing.TB, connection string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(connection, "abort"), []byte("1"), 0o200); err != nil {
		t.Fatal(err)
	}
}

func init() { testenv.RegisterChild("judge", judgeMain) }

// judgeMain guards a file, and ends as it is told: it receives an event and
// "panics", or it "hangs" with or "ignores" the events.
func judgeMain(args []string) int {
	w, err := kernstream.WatchFiles(context.Background(), contentOptions(deny), kernstream.Mark{Path: args[1], Ops: openPerm})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("ready")
	switch args[0] {
	case "ignore":
		time.Sleep(time.Hour)
	case "hang":
		<-w.C
		time.Sleep(time.Hour)
	case "panic":
		for range w.C {
			panic("the consumer panics")
		}
	}
	return 0
}

// TestPermissionProcessDies: when the process that should answer dies, by a
// panic of its consumer or by SIGKILL, nobody waits any longer: the kernel
// allows.
func TestPermissionProcessDies(t *testing.T) {
	needMarks(t)
	for _, how := range []string{"ignore", "hang", "panic"} {
		o := newOpeners(t)
		l := &fileLab{t: t, dir: labDir(t)}
		l.ensure("f")
		cmd := testenv.Child(t, "judge", how, l.path("f"))
		var words strings.Builder
		cmd.Stderr = &words
		out, err := cmd.StdoutPipe()
		l.do(err)
		l.do(cmd.Start())
		defer cmd.Process.Kill()
		line := make([]byte, len("ready\n"))
		if _, err := out.Read(line); err != nil || string(line) != "ready\n" {
			t.Fatalf("%q, %v", line, err)
		}
		results := []<-chan opened{o.begin("open", l.path("f"))}
		if how != "panic" {
			for range 9 {
				results = append(results, o.begin("open", l.path("f")))
			}
			o.waiting(10)
			l.do(cmd.Process.Kill())
		}
		for _, result := range results {
			o.want(result, 0)
		}
		err = cmd.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || how == "panic" && !strings.Contains(words.String(), "the consumer panics") {
			t.Errorf("%s: %v: %s", how, exit, words.String())
		}
	}
}

// An orderly is one open of TestPermissionOrders: what its event got, and what
// its opener was told.
type orderly struct {
	path   string
	result <-chan opened

	mu    sync.Mutex
	event *kernstream.FileEvent
	given []unix.Errno // by answers that were taken
}

// answer gives one answer, which may be too late.
func (o *orderly) answer(errno unix.Errno) error {
	var err error
	if errno == 0 {
		err = o.event.Allow()
	} else {
		err = o.event.Deny(errno)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case err == nil:
		o.given = append(o.given, errno)
	case !errors.Is(err, os.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, unix.EALREADY):
		return err
	}
	return nil
}

// TestPermissionOrders: in any order of answers, deadlines, Close, Detach, and
// the end of the stream, from several goroutines, each event has at most one
// answer; its opener gets that one, or the default one; and nobody is left
// waiting.
func TestPermissionOrders(t *testing.T) {
	needMarks(t)
	o := newOpeners(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	const files = 25
	for i := range files {
		l.ensure(fmt.Sprint("f", i))
	}
	seed := uint64(time.Now().UnixNano())
	answers := []unix.Errno{0, unix.EPERM}
	byDefault := kernstream.Response{}
	if testenv.KernelAtLeast(6, 14) {
		answers = []unix.Errno{0, unix.EPERM, unix.EIO, unix.EBUSY, unix.EAGAIN, unix.ENOSPC, unix.EDQUOT}
		byDefault.Errno = unix.ETXTBSY
	}
	rounds := testenv.SoakN(10_000) / files
	t.Logf("%d orders, seeds %d to %d", rounds*files, seed, seed+uint64(rounds)-1)
	for round := range rounds {
		randomOrders(l, o, rand.New(rand.NewPCG(seed+uint64(round), 0)), files, answers, byDefault)
		if t.Failed() {
			t.Fatalf("seed %d", seed+uint64(round))
		}
	}
}

// randomOrders is one round: an event for each file, and one watcher.
func randomOrders(l *fileLab, o *openers, random *rand.Rand, files int, answers []unix.Errno, byDefault kernstream.Response) {
	l.t.Helper()
	defaultErrno := unix.EPERM
	if byDefault.Errno != 0 {
		defaultErrno = byDefault.Errno
	}
	options := preContentOptions(byDefault)
	if random.IntN(2) == 0 {
		options.Deadline = time.Duration(random.IntN(3000)+1) * time.Microsecond
	}
	if random.IntN(2) == 0 {
		options.MaxPending = 1 + random.IntN(files)
	}
	ctx, cancel := context.WithCancel(l.t.Context())
	defer cancel()
	w, err := kernstream.WatchFiles(ctx, options, kernstream.Mark{Type: filesystem, Path: l.dir, Ops: openPerm})
	l.do(err)
	opens := map[string]*orderly{}
	for i := range files {
		path := l.path(fmt.Sprint("f", i))
		opens[path] = &orderly{path: path, result: o.begin("open", path)}
	}
	var busy sync.WaitGroup
	consumed := make(chan struct{})
	acting := rand.New(rand.NewPCG(random.Uint64(), 0))
	go func() {
		defer close(consumed)
		for e := range w.C {
			x := opens[e.Path]
			if x == nil || x.event != nil {
				l.t.Errorf("event %v", e)
				continue
			}
			x.event = e
			orders := acting.Perm(5)[:acting.IntN(6)]
			first, second := answers[acting.IntN(len(answers))], answers[acting.IntN(len(answers))]
			if acting.IntN(3) == 0 {
				busy.Go(func() { x.act(l.t, orders, first, second) })
			} else {
				x.act(l.t, orders, first, second)
			}
		}
	}()
	time.Sleep(time.Duration(random.IntN(6000)) * time.Microsecond)
	if random.IntN(2) == 0 {
		cancel()
	} else {
		w.Close()
	}
	<-consumed
	busy.Wait()
	for _, x := range opens {
		x.check(o, defaultErrno)
	}
}

// check fails the test unless the opener was told what the event got.
func (o *orderly) check(openers *openers, byDefault unix.Errno) {
	openers.t.Helper()
	got := openers.end(o.result)
	switch {
	case o.event == nil && (got == 0 || got == byDefault):
		return // it asked after the end, or there was no room
	case len(o.given) == 1 && got == o.given[0], o.event != nil && len(o.given) == 0 && got == byDefault:
	default:
		openers.t.Errorf("%s: the opener got %v; the answers were %v", o.path, errnoText(got), o.given)
	}
	if o.event != nil {
		o.event.Close()
	}
}

// act does several things with an event.
func (o *orderly) act(t testing.TB, orders []int, first, second unix.Errno) {
	for _, order := range orders {
		var err error
		switch order {
		case 0:
			err = o.answer(first)
		case 1:
			err = o.answer(second)
		case 2:
			err = o.event.Close()
		case 3:
			var f *os.File
			if f, err = o.event.Detach(); err == nil {
				f.Close()
			} else if errors.Is(err, os.ErrClosed) {
				err = nil
			}
		case 4:
			time.Sleep(500 * time.Microsecond)
		}
		if err != nil {
			t.Errorf("%s: %v", o.path, err)
		}
	}
}
