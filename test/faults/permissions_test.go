package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// askAbout begins to answer whether the file may be opened that startOpener has made. Nobody
// waits for a default answer, unless deadline says so.
func askAbout(l *lab, deadline time.Duration) (*kernstream.FileWatcher, error) {
	return watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), &kernstream.FileOptions{Class: kernstream.ClassContent, Deadline: deadline},
			kernstream.Mark{Path: l.path("there"), Ops: kernstream.OpOpenPerm})
	})
}

// answerOpens denies one open, and allows the next.
func answerOpens(l *lab) string {
	w, err := askAbout(l, kernstream.NoDeadline)
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	for _, allow := range []bool{false, true} {
		if outcome := l.answer(w, allow); outcome != "" {
			return outcome
		}
	}
	if n := w.Defaulted(); n != 0 {
		return fmt.Sprintf("%d default answers", n)
	}
	return "works: what is denied is refused, what is allowed is opened"
}

// answer lets the opener ask, and answers. It returns what is wrong with what comes of it.
func (l *lab) answer(w *kernstream.FileWatcher, allow bool) string {
	l.opens(l.file.Name())
	e, ok := <-w.C
	if !ok {
		return "the stream ended: " + failure(w.Err())
	}
	defer e.Close()
	if e.Path != l.path("there") || e.Err != nil {
		return fmt.Sprintf("the event is %v", e)
	}
	if err := e.Respond(kernstream.Response{Allow: allow}); err != nil {
		return "Respond " + failure(err)
	}
	if err := l.opened(); (err == nil) != allow {
		return fmt.Sprintf("allowed: %v; the opener: %v", allow, err)
	}
	return ""
}

// withOpener ends the opener after run.
func withOpener(run func(*lab) string) func(*lab) string {
	return func(l *lab) string {
		defer l.reap()
		defer l.kill()
		return run(l)
	}
}

// askedStarved is asked when there is room for no descriptor.
func askedStarved(l *lab) string {
	w, err := askAbout(l, kernstream.NoDeadline)
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	l.starve(0)
	l.opens(l.file.Name())
	e, refused := <-w.C, l.opened()
	l.feed()
	if e == nil || e.Err == nil || refused != errRefused {
		return fmt.Sprintf("the event is %v; the opener: %v", e, refused)
	}
	told := failure(e.Err)
	if outcome := l.answer(w, true); outcome != "" {
		return outcome
	}
	return "refused, and an event with " + told + "; the next one is answered"
}

// answerAfterStop is stopped while somebody asks.
func answerAfterStop(l *lab) string {
	w, err := askAbout(l, kernstream.NoDeadline)
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	result, early := l.path("result"), l.path("early")
	whileStopped(fmt.Sprintf(`(true <%s; echo $? >%s.new; mv %[2]s.new %[2]s) & sleep 0.1; if [ -e %[2]s ]; then echo >%[3]s; fi`, l.file.Name(), result, early))
	e := <-w.C
	if e == nil {
		return "the stream ended: " + failure(w.Err())
	}
	defer e.Close()
	if err := e.Allow(); err != nil {
		return "Allow " + failure(err)
	}
	for {
		text, err := os.ReadFile(result)
		if errors.Is(err, os.ErrNotExist) {
			time.Sleep(time.Millisecond)
			continue
		}
		if _, err := os.Stat(early); err == nil || string(text) != "0\n" {
			return fmt.Sprintf("the opener ended by %q, while nobody answered: %v", text, err == nil)
		}
		return "the opener waits, and gets the answer"
	}
}

// expiredAtStop is stopped for longer than the deadline of an event that it has.
func expiredAtStop(l *lab) string {
	w, err := askAbout(l, 100*time.Millisecond)
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	var e *kernstream.FileEvent
	for e == nil {
		l.opens(l.file.Name())
		select {
		case e = <-w.C:
		case <-time.After(time.Second):
			if err := l.opened(); err != errRefused { // it expired before it was received
				return fmt.Sprintf("the opener: %v", err)
			}
		}
	}
	defer e.Close()
	whileStopped("sleep 0.3")
	if err := l.opened(); err != errRefused {
		return fmt.Sprintf("the opener: %v", err)
	}
	if err := e.Allow(); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Sprintf("Allow: %v", err)
	}
	return "the opener gets the default answer when it goes on, and Allow Is os.ErrDeadlineExceeded"
}

// askerKilled answers somebody who is gone.
func askerKilled(l *lab) string {
	w, err := askAbout(l, kernstream.NoDeadline)
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	l.opens(l.file.Name())
	e := <-w.C
	if e == nil {
		return "the stream ended: " + failure(w.Err())
	}
	must(l.victim.Process.Kill())
	l.reap()
	if err := errors.Join(e.Allow(), e.Close()); err != nil {
		return failure(err)
	}
	return "works: the answer is nobody's, and no error"
}

// askNobody begins and ends to ask.
func askNobody(l *lab) string {
	w, err := askAbout(l, kernstream.NoDeadline)
	if err != nil {
		return failure(err)
	}
	w.Close()
	return "works"
}

func permissionFaults() []fault {
	const (
		asks  = "WatchFiles that asks"
		works = "works: what is denied is refused, what is allowed is opened"
	)
	var list []fault
	add := func(f fault) {
		f.source, f.root = "permission", true
		if f.prepare == nil {
			f.prepare = startOpener
		}
		f.run = withOpener(f.run)
		list = append(list, f)
	}
	meanings := map[syscall.Errno]string{unix.EPERM: ", Is fs.ErrPermission", unix.ENOSYS: ", Is errors.ErrUnsupported"}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.EMFILE, unix.ENOMEM} {
		add(fault{
			doing: asks, fault: "fanotify_init is refused with " + unix.ErrnoName(errno),
			outcome: "fails: fanotify_init " + unix.ErrnoName(errno) + meanings[errno], says: map[syscall.Errno]string{unix.EPERM: "CAP_SYS_ADMIN", unix.ENOSYS: "seccomp"}[errno],
			inject: func(l *lab) { l.limited = true; refused(errno, unix.SYS_FANOTIFY_INIT)(l) }, run: answerOpens,
		})
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.ENOMEM} {
		add(fault{
			doing: asks, fault: "fanotify_mark is refused with " + unix.ErrnoName(errno),
			outcome: "fails: fanotify_mark " + unix.ErrnoName(errno) + meanings[errno], says: "/lab/there",
			inject: refused(errno, unix.SYS_FANOTIFY_MARK), run: answerOpens,
		})
	}
	add(fault{
		doing: asks, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC", says: "max_user_watches",
		inject: refused(unix.ENOSPC, unix.SYS_EPOLL_CTL), run: answerOpens,
	})
	add(fault{
		doing: asks, fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: noProc, run: answerOpens,
	})
	add(fault{
		doing: asks, fault: "/proc is read-only", outcome: works,
		inject: readOnlyProc, run: answerOpens,
	})
	add(fault{
		doing: asks, fault: "chroot into a directory without /proc", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: jailed, run: answerOpens,
	})
	add(fault{
		doing: asks, fault: "chroot into a directory with /proc", outcome: works,
		inject: jailedWithProc, run: answerOpens,
	})
	add(fault{
		doing: asks, fault: "no_new_privs", outcome: works,
		inject: noNewPrivileges, run: answerOpens,
	})
	add(fault{
		doing: asks, fault: "a storm of signals", outcome: works,
		inject: storm, run: repeat(answerOpens),
	})
	add(fault{
		doing: asks, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(askNobody),
	})
	add(fault{
		doing: asks, fault: "descriptors run out before an event is read", outcome: "refused, and an event with fails: read EMFILE; the next one is answered", kernel: [2]int{6, 13},
		run: askedStarved,
	})
	add(fault{
		doing: asks, fault: "the process is stopped (SIGSTOP) while a file is opened", outcome: "the opener waits, and gets the answer",
		run: answerAfterStop,
	})
	add(fault{
		doing: asks, fault: "the process is stopped (SIGSTOP) beyond the deadline of an event", outcome: "the opener gets the default answer when it goes on, and Allow Is os.ErrDeadlineExceeded",
		run: expiredAtStop,
	})
	add(fault{
		doing: asks, fault: "who asks is killed", outcome: "works: the answer is nobody's, and no error",
		run: askerKilled,
	})
	return list
}
