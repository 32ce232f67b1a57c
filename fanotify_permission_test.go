package kernstream_test

import (
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityF5Answers: an operation waits for the consumer's answer, and gets
// that one: the file, or EPERM. (F8: deny, then allow.)
func TestParityF5Answers(t *testing.T) {
	testenv.Feature(t, "file events", "permission")
	l, o := newPermissionLab(t, contentOptions(deny), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	for _, want := range []unix.Errno{unix.EPERM, 0, unix.EPERM, 0} {
		result := o.begin("open", l.path("f"))
		e := l.receive()
		if e.Ops != openPerm || e.Path != l.path("f") || e.PathState != kernstream.PathExact || e.PID != o.pid() ||
			e.Via != kernstream.ViaDescriptor || e.Err != nil || e.FD() < 0 {
			t.Errorf("event %v", e)
		}
		o.stands(result)
		if want == 0 {
			l.do(e.Allow())
		} else {
			l.do(e.Deny(0))
		}
		o.want(result, want)
		for _, again := range []error{e.Allow(), e.Deny(0), e.Respond(deny)} {
			wantError(t, again, unix.EALREADY, "respond", l.path("f"))
		}
		l.do(e.Close())
		wantError(t, e.Allow(), unix.EALREADY)
	}
	if n := l.w.Defaulted(); n != 0 {
		t.Errorf("%d default answers", n)
	}
}

// TestPermissionOwnProcess: what this process does itself is allowed at once,
// without an event, whatever the default answer is; by ReportTID, too.
func TestPermissionOwnProcess(t *testing.T) {
	for _, tid := range []bool{false, true} {
		options := contentOptions(deny)
		options.ReportTID = tid
		l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm | accessPerm})
		for range 10 {
			done := make(chan struct{})
			go func() {
				runtime.LockOSThread() // a thread that the watcher has not seen
				l.read("f")
				close(done)
			}()
			select {
			case <-done:
			case <-time.After(patience):
				t.Fatal("this process waits for itself")
			}
		}
		l.quiet("it was this process")
		result := o.begin("open", l.path("f"))
		e := l.receive()
		if tid == (e.TID == 0) || tid != (e.PID == 0) {
			t.Errorf("event %v", e)
		}
		l.do(e.Allow())
		o.want(result, 0)
		l.do(e.Close())
		l.w.Close()
	}
}

// TestPermissionDeadline: who gets no answer gets the default one at the
// deadline, whether the consumer has the event or never receives.
func TestPermissionDeadline(t *testing.T) {
	for _, byDefault := range []kernstream.Response{deny, allow} {
		options := contentOptions(byDefault)
		options.Deadline = 50 * time.Millisecond
		l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
		want := unix.EPERM
		if byDefault.Allow {
			want = 0
		}
		o.want(o.begin("open", l.path("f")), want) // nobody receives
		e, result, tries := l.hold(o)
		o.want(result, want)
		if e.When.IsZero() || e.FD() < 0 {
			t.Errorf("event %v", e)
		}
		text := make([]byte, 4)
		if n, err := unix.Pread(e.FD(), text, 0); n != 4 || err != nil {
			t.Errorf("the descriptor is closed: %v", err)
		}
		wantError(t, e.Allow(), os.ErrDeadlineExceeded, l.path("f"))
		wantError(t, e.Deny(0), os.ErrDeadlineExceeded)
		l.do(e.Close())
		if n := l.w.Defaulted(); n != tries+1 {
			t.Errorf("%d default answers; want %d", n, tries+1)
		}
		l.w.Close()
	}
}

// hold receives an event about the file f that nobody answers. It tries again if
// the machine is so busy that the event expires before that.
func (l *fileLab) hold(o *openers) (e *kernstream.FileEvent, result <-chan opened, tries uint64) {
	l.t.Helper()
	for {
		tries++
		result := o.begin("open", l.path("f"))
		again := make(chan opened, 1)
		select {
		case e := <-l.w.C:
			return e, result, tries
		case r := <-result:
			select {
			case e := <-l.w.C:
				again <- r
				return e, again, tries
			case <-time.After(20 * time.Millisecond):
			}
		case <-time.After(patience):
			l.t.Fatal("neither an event nor an answer")
		}
	}
}

// TestPermissionEnds: at the end of the stream, whatever it is, all who wait get
// the default answer: those whose event the consumer has, those whose event
// nobody received, and those whose event was not read.
func TestPermissionEnds(t *testing.T) {
	for _, byDefault := range []kernstream.Response{deny, allow} {
		want := unix.EPERM
		if byDefault.Allow {
			want = 0
		}
		l, o := newPermissionLab(t, contentOptions(byDefault), "f", kernstream.Mark{Path: "f", Ops: openPerm})
		var results []<-chan opened
		for range 30 {
			results = append(results, o.begin("open", l.path("f")))
		}
		o.waiting(30)
		e := l.receive()
		l.w.Close()
		for _, result := range results {
			o.want(result, want)
		}
		wantError(t, e.Allow(), os.ErrClosed)
		if n := l.w.Defaulted(); n != 30 {
			t.Errorf("%d default answers; want 30", n)
		}
		l.do(e.Close())
		o.want(o.begin("open", l.path("f")), 0) // no mark is left
	}
}

// TestPermissionNobodyReceives: however many operations wait, and although
// nobody receives an event, the last has its answer within two deadlines.
func TestPermissionNobodyReceives(t *testing.T) {
	needMarks(t)
	openers := 5_000
	if testenv.SoakN(openers) < openers {
		openers = 300 // an emulated machine
	}
	options := contentOptions(deny)
	options.Deadline = 4 * time.Second
	options.MaxPending = openers
	raiseFileLimit(t, uint64(openers)+1_000)
	l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
	results := make([]<-chan opened, openers)
	for i := range results {
		results[i] = o.begin("open", l.path("f"))
	}
	longest := time.Duration(0)
	for _, result := range results {
		select {
		case r := <-result:
			longest = max(longest, r.took)
			if r.errno != unix.EPERM {
				t.Fatalf("an opener got %v", errnoText(r.errno))
			}
		case <-time.After(2*options.Deadline + patience):
			t.Fatal("an opener has no answer")
		}
	}
	if n := l.w.Defaulted(); n != uint64(openers) {
		t.Errorf("%d default answers; want %d", n, openers)
	}
	t.Logf("of %d openers none waited for more than %v; the deadline is %v", openers, longest, options.Deadline)
	if longest > 2*options.Deadline {
		t.Errorf("an opener waited for %v", longest)
	}
}

// raiseFileLimit makes sure that the process may have n descriptors.
func raiseFileLimit(t testing.TB, n uint64) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur >= n {
		return
	}
	high := unix.Rlimit{Cur: n, Max: max(n, limit.Max)}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &high); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) })
}

// TestPermissionMaxPending: beyond as many as may be held, the default answer
// goes out at once; an event that was answered, or closed, makes room for
// another, and one that got the default answer does when it is closed.
func TestPermissionMaxPending(t *testing.T) {
	options := contentOptions(deny)
	options.MaxPending = 3
	options.Deadline = kernstream.NoDeadline
	l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
	var results []<-chan opened
	var events []*kernstream.FileEvent
	hold := func() {
		t.Helper()
		results = append(results, o.begin("open", l.path("f")))
		events = append(events, l.receive())
	}
	for range 3 {
		hold()
	}
	for n := range uint64(5) {
		o.want(o.begin("open", l.path("f")), unix.EPERM)
		if got := l.w.Defaulted(); got != n+1 {
			t.Errorf("%d default answers; want %d", got, n+1)
		}
	}
	o.stands(results[0])
	l.do(events[0].Allow())
	o.want(results[0], 0)
	hold()
	l.do(events[1].Close())
	o.want(results[1], unix.EPERM)
	if got := l.w.Defaulted(); got != 6 {
		t.Errorf("%d default answers; want 6: who closes without an answer gets it, too", got)
	}
	wantError(t, events[1].Allow(), os.ErrClosed)
	hold()
	o.want(o.begin("open", l.path("f")), unix.EPERM)
	l.do(events[0].Close()) // it made room before
	o.want(o.begin("open", l.path("f")), unix.EPERM)
	for i := 2; i < len(events); i++ {
		l.do(events[i].Allow())
		o.want(results[i], 0)
		l.do(events[i].Close())
	}
	hold()
	l.do(events[len(events)-1].Allow())
	l.do(events[len(events)-1].Close())
}

// TestPermissionHungConsumer: a consumer that takes events and does nothing with
// them holds as many as may be held, and no more: everybody else gets the
// default answer at once, and descriptors do not run out.
func TestPermissionHungConsumer(t *testing.T) {
	options := contentOptions(allow)
	options.MaxPending = 4
	options.Deadline = 20 * time.Millisecond
	l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
	var events []*kernstream.FileEvent
	for range 4 {
		e, result, _ := l.hold(o)
		events = append(events, e)
		o.want(result, 0)
	}
	before := countDescriptors(t)
	for range 50 {
		result := o.begin("open", l.path("f"))
		select {
		case e := <-l.w.C:
			t.Fatalf("event %v; no more than four are held", e)
		case r := <-result:
			if r.errno != 0 {
				t.Errorf("the opener got %v", errnoText(r.errno))
			}
		case <-time.After(patience):
			t.Fatal("the opener waits")
		}
	}
	if after := countDescriptors(t); after != before {
		t.Errorf("%d descriptors, and then %d", before, after)
	}
	for _, e := range events {
		wantError(t, e.Deny(0), os.ErrDeadlineExceeded)
		l.do(e.Close())
	}
	e, result, _ := l.hold(o)
	o.want(result, 0)
	l.do(e.Close())
}

// TestPermissionDescriptorIsKept: the descriptor that the kernel knows an event
// by stays open until it is answered, whatever is done with its file: an answer
// never reaches another event that has got the number.
func TestPermissionDescriptorIsKept(t *testing.T) {
	l, o := newPermissionLab(t, contentOptions(deny), "a b", kernstream.Mark{Ops: openPerm | onChild})
	first := o.begin("open", l.path("a"))
	a := l.receive()
	text := make([]byte, 8)
	if n, err := a.File().Read(text); string(text[:n]) != "data" || err != nil {
		t.Errorf("the file reads %q, %v", text[:n], err)
	}
	if f := a.File(); f != a.File() || f.Name() != l.path("a") || int(f.Fd()) == a.FD() {
		t.Errorf("File is %v, with descriptor %d, and FD %d", f.Name(), f.Fd(), a.FD())
	}
	l.do(a.File().Close())
	second := o.begin("open", l.path("b"))
	b := l.receive()
	if a.FD() == b.FD() {
		t.Fatalf("both events have the descriptor %d", a.FD())
	}
	l.do(b.Deny(0))
	o.want(second, unix.EPERM)
	o.stands(first)
	l.do(a.Allow())
	o.want(first, 0)
	l.do(a.Close())
	l.do(b.Close())

	third := o.begin("open", l.path("a"))
	e := l.receive()
	number := e.FD()
	f, err := e.Detach()
	l.do(err)
	if n, err := f.Read(text); string(text[:n]) != "data" || err != nil || e.FD() != -1 || e.File() != nil {
		t.Errorf("the detached file reads %q, %v; FD %d", text[:n], err, e.FD())
	}
	_, err = e.Detach()
	wantError(t, err, os.ErrClosed)
	l.do(f.Close())
	if _, err := unix.FcntlInt(uintptr(number), unix.F_GETFD, 0); err != nil {
		t.Errorf("the event's own descriptor: %v", err)
	}
	o.stands(third)
	l.do(e.Allow())
	o.want(third, 0)
	l.do(e.Close())
	if _, err := unix.FcntlInt(uintptr(number), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("after Close: %v", err)
	}

	// A file that was detached outlives its event and the stream.
	fourth := o.begin("open", l.path("a"))
	e = l.receive()
	f, err = e.Detach()
	l.do(err)
	l.do(e.Close())
	o.want(fourth, unix.EPERM)
	l.w.Close()
	if n, err := f.Read(text); string(text[:n]) != "data" || err != nil {
		t.Errorf("the detached file reads %q, %v", text[:n], err)
	}
	l.do(f.Close())
}

// TestPermissionNoDescriptors: when no descriptor is left for an event, the
// kernel denies, whatever the default is; the event says so where the kernel
// tells, nothing stops, and the answer of others is not lost.
func TestPermissionNoDescriptors(t *testing.T) {
	l, o := newPermissionLab(t, contentOptions(allow), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	held := o.begin("open", l.path("f"))
	e := l.receive()
	results := make([]<-chan opened, 5)
	restore := l.limitDescriptors(3)
	defer restore()
	for i := range results {
		results[i] = o.begin("open", l.path("f"))
	}
	for range results {
		lost := l.receive()
		if !errors.Is(lost.Err, unix.EMFILE) || lost.FD() != -1 {
			t.Errorf("event %v; want EMFILE", lost)
		}
		if err := lost.Allow(); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("it was answered: %v", err)
		}
		l.do(lost.Close())
	}
	for _, result := range results {
		o.want(result, unix.EPERM)
	}
	if e.File() != nil {
		t.Error("there is a file without a descriptor")
	}
	_, err := e.Detach()
	wantError(t, err, unix.EMFILE, "detach")
	l.do(e.Allow())
	o.want(held, 0)
	restore()
	l.do(e.Close())
	result := o.begin("open", l.path("f"))
	e = l.receive()
	l.do(e.Allow())
	l.do(e.Close())
	o.want(result, 0)
}

// TestPermissionFewDescriptors: those for whom there is no room get the default
// answer, and not EPERM from the kernel since their answers are still to be written
// and descriptors have run out.
func TestPermissionFewDescriptors(t *testing.T) {
	needMarks(t)
	o := newOpeners(t)
	testenv.NoLeaks(t)
	l := &fileLab{t: t, dir: labDir(t)}
	l.ensure("f")
	group := rawGroup(t, unix.FAN_CLASS_CONTENT|unix.FAN_UNLIMITED_QUEUE)
	l.do(unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, unix.AT_FDCWD, l.path("f")))
	results := make([]<-chan opened, 300)
	for i := range results {
		results[i] = o.begin("open", l.path("f"))
	}
	o.waiting(len(results))
	defer l.limitDescriptors(200)()
	options := contentOptions(allow)
	options.Group = group
	options.MaxPending = 10
	l.watch(options)
	l.drained()
	l.do(l.w.Close())
	for _, result := range results {
		o.want(result, 0)
	}
	if n := l.w.Defaulted(); n != uint64(len(results)) {
		t.Errorf("%d default answers; want %d", n, len(results))
	}
}

// TestPermissionErrnos: what is denied fails with the errno that the class has;
// any other response is refused, and the event goes on waiting.
func TestPermissionErrnos(t *testing.T) {
	l, o := newPermissionLab(t, preContentOptions(deny), "f", kernstream.Mark{Path: "f", Ops: openPerm})
	result := o.begin("open", l.path("f"))
	e := l.receive()
	for _, errno := range []unix.Errno{unix.EACCES, unix.ENOENT, unix.EINTR, unix.EINVAL, unix.Errno(300)} {
		wantError(t, e.Deny(errno), unix.EINVAL, "EPERM, EIO")
	}
	wantError(t, e.Respond(kernstream.Response{Allow: true, Errno: unix.EIO}), unix.EINVAL, "allowed")
	wantError(t, e.Respond(kernstream.Response{Audit: true}), unix.EINVAL, "FileOptions.Audit")
	wantError(t, e.Respond(kernstream.Response{Rule: &kernstream.AuditRule{}}), unix.EINVAL, "Audit")
	o.stands(result)
	l.do(e.Deny(unix.EPERM))
	o.want(result, unix.EPERM)
	l.do(e.Close())
	for _, errno := range []unix.Errno{unix.EIO, unix.EBUSY, unix.ETXTBSY, unix.EAGAIN, unix.ENOSPC, unix.EDQUOT} {
		result := o.begin("open", l.path("f"))
		e := l.receive()
		err := e.Deny(errno)
		if !testenv.KernelAtLeast(6, 14) && err != nil {
			wantError(t, err, errors.ErrUnsupported, "6.14")
			o.stands(result)
			l.do(e.Deny(0))
			errno = unix.EPERM
		} else {
			l.do(err)
		}
		o.want(result, errno)
		l.do(e.Close())
	}
	l.w.Close()

	l.watch(contentOptions(deny), kernstream.Mark{Path: "f", Ops: openPerm})
	result = o.begin("open", l.path("f"))
	e = l.receive()
	wantError(t, e.Deny(unix.EIO), unix.EINVAL, "EIO", "ClassPreContent")
	o.stands(result)
	l.do(e.Deny(unix.EPERM))
	o.want(result, unix.EPERM)
	l.do(e.Close())
}

// TestPermissionDefaultErrno: the default answer can be any that there is, and
// one that the kernel does not have is an error at the start.
func TestPermissionDefaultErrno(t *testing.T) {
	needMarks(t)
	options := preContentOptions(kernstream.Response{Errno: unix.EBUSY})
	options.Deadline = time.Millisecond
	w, err := kernstream.WatchFiles(t.Context(), options)
	if !testenv.KernelAtLeast(6, 14) && err != nil {
		wantError(t, err, errors.ErrUnsupported, "Default", "6.14")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
	o.want(o.begin("open", l.path("f")), unix.EBUSY)
}

// TestPermissionAudit: in a watcher that was made for it, an answer may go to
// the audit log, with the rule that decided.
func TestPermissionAudit(t *testing.T) {
	options := contentOptions(kernstream.Response{Audit: true})
	options.Audit = true
	l, o := newPermissionLab(t, options, "f", kernstream.Mark{Path: "f", Ops: openPerm})
	rule := &kernstream.AuditRule{Number: 42, Subject: kernstream.TrustUnknown, Object: kernstream.TrustYes}
	for _, response := range []kernstream.Response{{Allow: true, Audit: true}, {Audit: true}, {Allow: true, Audit: true, Rule: rule}, {Audit: true, Rule: rule}, {}, {Allow: true}} {
		want := unix.EPERM
		if response.Allow {
			want = 0
		}
		result := o.begin("open", l.path("f"))
		e := l.receive()
		if err := e.Respond(response); response.Rule != nil && !testenv.KernelAtLeast(6, 3) && err != nil {
			wantError(t, err, errors.ErrUnsupported, "6.3")
			response.Rule = nil
			l.do(e.Respond(response))
		} else {
			l.do(err)
		}
		o.want(result, want)
		l.do(e.Close())
	}
	result := o.begin("open", l.path("f"))
	e := l.receive()
	l.do(e.Close())
	o.want(result, unix.EPERM)
}
