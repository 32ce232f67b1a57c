package faults

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// watchProcess waits for the end of the victim, on a channel of its own.
func watchProcess(target func(*lab) kernstream.Target) func(*lab) string {
	return func(l *lab) string {
		defer l.reap()
		defer l.kill()
		s, err := kernstream.WatchProcess(context.Background(), target(l), nil)
		if err != nil {
			return failure(err)
		}
		defer s.Close()
		l.kill()
		return toldOf(<-s.C)
	}
}

// toldOf is an event of the victim as an outcome.
func toldOf(e *kernstream.ProcessEvent) string {
	switch {
	case e == nil:
		return "no event comes"
	case !e.StatusKnown:
		return "works, without the status"
	case e.Status.ExitStatus() != 3:
		return fmt.Sprintf("the status is wrong: %#x", e.Status)
	}
	return "works, with the status"
}

func byNumber(l *lab) kernstream.Target  { return kernstream.PID(l.victim.Process.Pid) }
func byProcess(l *lab) kernstream.Target { return kernstream.OfProcess(l.victim.Process) }
func byPidFD(l *lab) kernstream.Target   { return kernstream.PidFD(l.file) }

// bySaved is the process by an ID that startSaved saved.
func startSaved(l *lab) {
	startVictim(l)
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	must(err)
	p, err := w.Open(byNumber(l))
	must(err)
	l.id = p.ID()
	w.Close()
}

func bySaved(l *lab) kernstream.Target { return kernstream.Saved(l.id) }

func startWithPidFD(l *lab) {
	startVictim(l)
	fd, err := unix.PidfdOpen(l.victim.Process.Pid, 0)
	must(err)
	l.file = os.NewFile(uintptr(fd), "pidfd")
}

// attempt makes a scenario of one step that can be tried again: it watches a
// victim that stays alive.
func attempt(try func(*lab, *kernstream.ProcessWatcher) error) func(*lab) string {
	return func(l *lab) string {
		w, err := kernstream.NewProcessWatcher(context.Background(), nil)
		if err != nil {
			return failure(err)
		}
		defer w.Close()
		if err := try(l, w); err != nil {
			return failure(err)
		}
		return "works"
	}
}

// start starts a child by way of a watcher, and waits for its end.
func start(l *lab, w *kernstream.ProcessWatcher) error {
	cmd := exec.Command("/bin/sh", "-c", "exit 3")
	// Without these, os/exec opens /dev/null itself.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = l.open, l.open, l.open
	watch, err := w.Start(cmd, nil)
	if cmd.Process != nil {
		defer cmd.Wait()
	}
	if err != nil {
		return err
	}
	if e := <-w.C; e.Watch != watch {
		return fmt.Errorf("an event of another watch: %v", e)
	}
	return nil
}

// watchStarved watches with room enough, and is told with none.
func watchStarved(l *lab) string {
	defer l.reap()
	s, err := kernstream.WatchProcess(context.Background(), byNumber(l), nil)
	if err != nil {
		return failure(err)
	}
	defer s.Close()
	l.starve(0)
	l.tellToEnd()
	e := <-s.C
	l.feed()
	return toldOf(e)
}

// startStranger starts a victim whose child ends with status 3 when it is told to,
// and who never waits for it.
func startStranger(l *lab) {
	l.victim = exec.Command("sh", "-c", `exec 4<&0; sh -c 'read line; exit 3' <&4 & echo $!; exec sleep 1000`)
	var err error
	l.tell, err = l.victim.StdinPipe()
	must(err)
	out, err := l.victim.StdoutPipe()
	must(err)
	must(l.victim.Start())
	_, err = fmt.Fscan(out, &l.stranger)
	must(err)
}

// strangerStarved watches the child of the victim with room enough, and is told with none.
func strangerStarved(l *lab) string {
	defer l.reap()
	defer l.victim.Process.Kill()
	s, err := kernstream.WatchProcess(context.Background(), kernstream.PID(l.stranger), nil)
	if err != nil {
		return failure(err)
	}
	defer s.Close()
	l.starve(0)
	l.tellToEnd()
	e := <-s.C
	l.feed()
	return toldOf(e)
}

// processWhileStopped is stopped while the victim ends.
func processWhileStopped(l *lab) string {
	s, err := kernstream.WatchProcess(context.Background(), byNumber(l), nil)
	if err != nil {
		return failure(err)
	}
	defer s.Close()
	whileStopped(fmt.Sprintf("kill -KILL %d", l.victim.Process.Pid))
	e := <-s.C
	l.reap()
	if e == nil || e.StatusKnown && e.Status.Signal() != syscall.SIGKILL {
		return fmt.Sprintf("the event is %v", e)
	}
	return "works, nothing is lost"
}

func processFaults() []fault {
	const (
		number  = "WatchProcess of a PID"
		process = "WatchProcess of an os.Process"
		file    = "WatchProcess of a pidfd"
		saved   = "WatchProcess of a saved ID"
		known   = "works, with the status"
	)
	var list []fault
	add := func(f fault) {
		f.source = "process"
		list = append(list, f)
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		outcome, says := "fails: pidfd_open "+unix.ErrnoName(errno), ""
		switch errno {
		case unix.EPERM:
			outcome, says = outcome+", Is errors.ErrUnsupported, Is fs.ErrPermission", "seccomp"
		case unix.ENOSYS:
			outcome += ", Is errors.ErrUnsupported"
		case unix.EMFILE:
			says = "RLIMIT_NOFILE"
		case unix.ENFILE:
			says = "file-max"
		}
		add(fault{
			doing: number, fault: "pidfd_open is refused with " + unix.ErrnoName(errno), outcome: outcome, says: says,
			prepare: startVictim, inject: refused(errno, unix.SYS_PIDFD_OPEN), run: watchProcess(byNumber),
		})
	}
	add(fault{
		doing: process, fault: "pidfd_open is refused with EPERM", outcome: known,
		prepare: startVictim, inject: refused(unix.EPERM, unix.SYS_PIDFD_OPEN), run: watchProcess(byProcess),
	})
	add(fault{
		doing: saved, fault: "pidfd_open is refused with EPERM", outcome: "fails: pidfd_open EPERM, Is errors.ErrUnsupported, Is fs.ErrPermission", says: "seccomp",
		prepare: startSaved, inject: refused(unix.EPERM, unix.SYS_PIDFD_OPEN), run: watchProcess(bySaved),
	})
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
		add(fault{
			doing: number, fault: "waitid is refused with " + unix.ErrnoName(errno), outcome: known,
			prepare: startVictim, inject: refused(errno, unix.SYS_WAITID), run: watchProcess(byNumber),
		})
	}
	add(fault{
		doing: number, fault: "every ioctl is refused with ENOTTY", outcome: known,
		prepare: startVictim, inject: refused(unix.ENOTTY, unix.SYS_IOCTL), run: watchProcess(byNumber),
	})
	add(fault{
		doing: number, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC", says: "max_user_watches",
		prepare: startVictim, inject: refused(unix.ENOSPC, unix.SYS_EPOLL_CTL), run: watchProcess(byNumber),
	})
	add(fault{
		doing: number, fault: "epoll_create1 finds no descriptor (ENFILE)", outcome: "fails: epoll_create1 ENFILE",
		prepare: startVictim, inject: refused(unix.ENFILE, unix.SYS_EPOLL_CREATE1), run: watchProcess(byNumber),
	})
	for _, way := range []struct {
		doing   string
		prepare func(*lab)
		target  func(*lab) kernstream.Target
		kernel  [2]int // before, the kernel tells only by way of /proc
	}{
		{number, startVictim, byNumber, [2]int{}},
		{process, startVictim, byProcess, [2]int{}},
		{file, startWithPidFD, byPidFD, [2]int{6, 13}},
		{saved, startSaved, bySaved, [2]int{6, 9}},
	} {
		add(fault{
			doing: way.doing, fault: "/proc is not mounted", outcome: known, kernel: way.kernel,
			prepare: way.prepare, inject: noProc, run: watchProcess(way.target),
		})
	}
	add(fault{
		doing: number, fault: "/proc is read-only", outcome: known,
		prepare: startVictim, inject: readOnlyProc, run: watchProcess(byNumber),
	})
	add(fault{
		doing: number, fault: "chroot into a directory without /proc", outcome: known,
		prepare: startVictim, inject: jailed, run: watchProcess(byNumber),
	})
	add(fault{
		doing: number, fault: "no_new_privs", outcome: known,
		prepare: startVictim, inject: noNewPrivileges, run: watchProcess(byNumber),
	})
	add(fault{
		doing: number, fault: "descriptors run out before the process ends", outcome: known,
		prepare: startVictim, run: watchStarved,
	})
	add(fault{
		doing: number, fault: "a storm of signals", outcome: known,
		prepare: startVictim, inject: storm, run: watchProcess(byNumber),
	})
	add(fault{
		doing: number, fault: "the watching process is stopped (SIGSTOP), the other one killed", outcome: "works, nothing is lost",
		prepare: startVictim, run: processWhileStopped,
	})
	for _, way := range []struct {
		doing   string
		prepare func(*lab)
		try     func(*lab, *kernstream.ProcessWatcher) error
	}{
		{"ProcessWatcher.Watch of a PID", startVictim, func(l *lab, w *kernstream.ProcessWatcher) error {
			_, err := w.Watch(byNumber(l), nil)
			return err
		}},
		{"ProcessWatcher.Open of an os.Process", startVictim, func(l *lab, w *kernstream.ProcessWatcher) error {
			_, err := w.Open(byProcess(l))
			return err
		}},
		{"ProcessWatcher.Watch of a pidfd", startWithPidFD, func(l *lab, w *kernstream.ProcessWatcher) error {
			_, err := w.Watch(byPidFD(l), nil)
			return err
		}},
		{"ProcessWatcher.Watch of a saved ID", startSaved, func(l *lab, w *kernstream.ProcessWatcher) error {
			_, err := w.Watch(bySaved(l), nil)
			return err
		}},
	} {
		add(fault{
			doing: way.doing, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
			prepare: way.prepare, run: thenReap(starving(attempt(way.try))),
		})
	}
	add(fault{
		doing: number, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		prepare: startVictim, run: thenReap(starving(func(l *lab) string {
			s, err := kernstream.WatchProcess(context.Background(), byNumber(l), nil)
			if err != nil {
				return failure(err)
			}
			s.Close()
			return "works"
		})),
	})
	add(fault{
		doing: "WatchProcess of the child of another", fault: "descriptors run out before the process ends", outcome: "works, without the status",
		prepare: startStranger, run: strangerStarved,
	})
	add(fault{
		doing: "ProcessWatcher.Start", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(attempt(start)),
	})
	return list
}
