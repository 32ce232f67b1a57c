package faults

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// made are the operations that watchFiles asks for.
const made = kernstream.OpCreate | kernstream.OpDelete

// watchFiles sees a file come and go in the lab's directory.
func watchFiles(mark kernstream.MarkType) func(*lab) string {
	return func(l *lab) string {
		w, err := watch(l, func() (*kernstream.FileWatcher, error) {
			return kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{Type: mark, Path: l.dir, Ops: made})
		})
		if err != nil {
			return failure(err)
		}
		defer w.Close()
		return l.seeFile(w, "made")
	}
}

// watchMount is told that a file of the lab's mount is opened.
func watchMount(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{Type: kernstream.MarkMount, Path: l.dir, Ops: kernstream.OpModify})
	})
	if err != nil {
		return failure(err)
	}
	w.Close()
	return "works"
}

// seeFile makes and removes a file, which takes no descriptor, and returns what
// is told of that.
func (l *lab) seeFile(w *kernstream.FileWatcher, name string) string {
	path := l.path(name)
	must(unix.Mknod(path, unix.S_IFREG|0o644, 0))
	must(unix.Unlink(path))
	var ops kernstream.FileOp
	for ops != made {
		e, ok := <-w.C
		if !ok {
			return "the stream ended: " + failure(w.Err())
		}
		if filepath.Base(e.Path) != name {
			continue // of one before
		}
		ops |= e.Ops
		switch {
		case e.Err != nil:
			return "works, with the name alone, and why: " + failure(e.Err)
		case e.Path == name && e.PathState == kernstream.PathUnknown:
			return "works, with the name alone"
		case e.Path != path:
			return fmt.Sprintf("works, but the path is %q (%v)", e.Path, e.PathState)
		}
	}
	return "works, with paths"
}

// seeOpened is told of a file by its descriptor, when there is room for none.
func seeOpened(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), &kernstream.FileOptions{Descriptors: true},
			kernstream.Mark{Path: l.path("there"), Ops: kernstream.OpModify})
	})
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	l.starve(0)
	must(unix.Truncate(l.path("there"), 0)) // is not told
	_, err = l.file.WriteAt([]byte("x"), 0)
	must(err)
	e := <-w.C
	l.feed()
	told := "nothing"
	if e != nil && e.Err != nil {
		told = failure(e.Err)
	}
	_, err = l.file.WriteAt([]byte("x"), 0)
	must(err)
	if e = <-w.C; e == nil || e.Err != nil || e.FD() < 0 {
		return fmt.Sprintf("the next event is %v", e)
	}
	e.Close()
	return "an event with " + told + "; the next one is whole"
}

func openFile(l *lab) {
	var err error
	l.file, err = os.Create(l.path("there"))
	must(err)
}

// resolveStarved is told of a file in a directory that cannot be opened for want
// of a descriptor.
func resolveStarved(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{Type: kernstream.MarkFilesystem, Path: l.dir, Ops: made})
	})
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	l.starve(0)
	starved := l.seeFile(w, "starved")
	l.feed()
	return starved + "; then " + l.seeFile(w, "fed")
}

// adoptGroup watches by a group that was made elsewhere.
func adoptGroup(l *lab) string {
	fd, err := unix.FcntlInt(l.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return "fails: fcntl " + unix.ErrnoName(err.(syscall.Errno))
	}
	group := os.NewFile(uintptr(fd), "group") // a watcher closes it
	w, err := kernstream.WatchFiles(context.Background(), &kernstream.FileOptions{Group: group})
	if err != nil {
		group.Close()
		return failure(err)
	}
	defer w.Close()
	if outcome := l.seeFile(w, "made"); outcome != "works, with paths" {
		return "adopted: " + outcome
	}
	return "works"
}

// makeGroup makes a group as systemd does, with a mark.
func makeGroup(l *lab) {
	fd, err := watch(l, func() (int, error) {
		return unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_DFID_NAME|unix.FAN_CLOEXEC, 0)
	})
	must(err)
	must(unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_CREATE|unix.FAN_DELETE, unix.AT_FDCWD, l.dir))
	l.file = os.NewFile(uintptr(fd), "group")
}

// markStarved marks another directory when there is room for no descriptor, and when there is.
func markStarved(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{Path: l.dir, Ops: made})
	})
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	subdirectory(l)
	l.starve(0)
	err = w.Mark(kernstream.Mark{Path: l.path(""), Ops: made})
	l.feed()
	if err == nil {
		return "works, starved"
	}
	outcome := failure(err)
	must(w.Mark(kernstream.Mark{Path: l.path(""), Ops: made}))
	return outcome + "; then " + l.seeFile(w, "made")
}

// closeStarved closes a watcher when there is room for no descriptor.
func closeStarved(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{Path: l.dir, Ops: made})
	})
	if err != nil {
		return failure(err)
	}
	l.starve(0)
	defer l.feed()
	if err := w.Close(); err != nil {
		return failure(err)
	}
	return "works"
}

// seeProcessStarved is told who made a file, when there is room for no pidfd.
func seeProcessStarved(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), &kernstream.FileOptions{ReportPidFD: true}, kernstream.Mark{Path: l.dir, Ops: made})
	})
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	l.starve(0)
	starved := l.seeMaker(w, "starved")
	l.feed()
	return starved + "; then " + l.seeMaker(w, "fed")
}

// seeMaker makes a file, and returns what is told of who did.
func (l *lab) seeMaker(w *kernstream.FileWatcher, name string) string {
	must(unix.Mknod(l.path(name), unix.S_IFREG|0o644, 0))
	e := <-w.C
	if e == nil || filepath.Base(e.Path) != name {
		return fmt.Sprintf("the event is %v", e)
	}
	defer e.Close()
	if _, err := e.Process(); err != nil {
		return "Process " + failure(err)
	}
	return "Process works"
}

// filesWhileStopped is stopped while files are made.
func filesWhileStopped(l *lab) string {
	w, err := watch(l, func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{Path: l.dir, Ops: kernstream.OpCreate})
	})
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	script, names := "", ""
	const n = 20
	for i := range n {
		script += fmt.Sprintf(": >%s; ", l.path(fmt.Sprint(i)))
		names += l.path(fmt.Sprint(i)) + " "
	}
	whileStopped(strings.TrimSuffix(script, "; "))
	seen := ""
	for range n {
		e, ok := <-w.C
		if !ok {
			return "the stream ended: " + failure(w.Err())
		}
		seen += e.Path + " "
	}
	if seen != names {
		return "lost: " + seen
	}
	return "works, nothing is lost"
}

func fileFaults() []fault {
	const (
		inode = "WatchFiles of a directory"
		whole = "WatchFiles of a file system"
		works = "works, with paths"

		nameAlone = "works, with the name alone"
	)
	var list []fault
	add := func(f fault) {
		f.source = "file"
		list = append(list, f)
	}
	meanings := map[syscall.Errno]string{unix.EPERM: ", Is fs.ErrPermission", unix.ENOSYS: ", Is errors.ErrUnsupported"}
	sandbox := map[syscall.Errno]string{unix.EPERM: "seccomp", unix.ENOSYS: "seccomp"}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.ENFILE, unix.ENOMEM} {
		add(fault{
			doing: inode, fault: "fanotify_init is refused with " + unix.ErrnoName(errno),
			outcome: "fails: fanotify_init " + unix.ErrnoName(errno) + meanings[errno], says: sandbox[errno],
			inject: refused(errno, unix.SYS_FANOTIFY_INIT), run: watchFiles(kernstream.MarkInode),
		})
	}
	add(fault{
		doing: inode, fault: "the user has no fanotify group left (max_fanotify_groups)", outcome: "fails: fanotify_init EMFILE", says: "max_user_groups", user: true,
		inject: limited("max_fanotify_groups", 0), run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "the user has no mark left (max_fanotify_marks)", outcome: "fails: fanotify_mark ENOSPC", says: "max_user_marks", user: true,
		inject: limited("max_fanotify_marks", 0), run: watchFiles(kernstream.MarkInode),
	})
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.ENOMEM} {
		add(fault{
			doing: inode, fault: "fanotify_mark is refused with " + unix.ErrnoName(errno),
			outcome: "fails: fanotify_mark " + unix.ErrnoName(errno) + meanings[errno], says: "/lab",
			inject: refused(errno, unix.SYS_FANOTIFY_MARK), run: watchFiles(kernstream.MarkInode),
		})
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
		add(fault{
			doing: inode, fault: "open_by_handle_at is refused with " + unix.ErrnoName(errno), outcome: works,
			inject: refused(errno, unix.SYS_OPEN_BY_HANDLE_AT), run: watchFiles(kernstream.MarkInode),
		})
		add(fault{
			doing: whole, fault: "open_by_handle_at is refused with " + unix.ErrnoName(errno), outcome: nameAlone, root: true,
			prepare: subdirectory, inject: refused(errno, unix.SYS_OPEN_BY_HANDLE_AT), run: watchFiles(kernstream.MarkFilesystem),
		})
		add(fault{
			doing: inode, fault: "name_to_handle_at is refused with " + unix.ErrnoName(errno), outcome: nameAlone,
			inject: refused(errno, unix.SYS_NAME_TO_HANDLE_AT), run: watchFiles(kernstream.MarkInode),
		})
	}
	add(fault{
		doing: inode, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC", says: "max_user_watches",
		inject: refused(unix.ENOSPC, unix.SYS_EPOLL_CTL), run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: noProc, run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "/proc is read-only", outcome: works,
		inject: readOnlyProc, run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "chroot into a directory without /proc", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: jailed, run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "chroot into a directory with /proc", outcome: works,
		inject: jailedWithProc, run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "no_new_privs", outcome: works,
		inject: noNewPrivileges, run: watchFiles(kernstream.MarkInode),
	})
	add(fault{
		doing: inode, fault: "a storm of signals", outcome: works,
		inject: storm, run: repeat(watchFiles(kernstream.MarkInode)),
	})
	add(fault{
		doing: inode, fault: "the process is stopped (SIGSTOP) while files are made", outcome: "works, nothing is lost",
		run: filesWhileStopped,
	})
	add(fault{
		doing: "WatchFiles with Descriptors", fault: "descriptors run out before an event is read", outcome: "an event with fails: read EMFILE; the next one is whole", root: true,
		prepare: openFile, run: seeOpened,
	})
	add(fault{
		doing: whole, fault: "descriptors run out before a path is resolved", outcome: nameAlone + ", and why: fails: open_by_handle_at EMFILE; then " + works, root: true,
		prepare: subdirectory, run: resolveStarved,
	})
	const adopting = "WatchFiles of a Group"
	add(fault{
		doing: adopting, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		prepare: makeGroup, run: starving(adoptGroup),
	})
	add(fault{
		doing: adopting, fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		prepare: makeGroup, inject: noProc, run: adoptGroup,
	})
	add(fault{
		doing: "FileWatcher.Mark", fault: "there is no descriptor left", outcome: "fails: open EMFILE; then " + works,
		run: markStarved,
	})
	add(fault{
		doing: "FileWatcher.Close", fault: "there is no descriptor left", outcome: "works",
		run: closeStarved,
	})
	add(fault{
		doing: "WatchFiles with ReportPidFD", fault: "descriptors run out before an event is read", outcome: "Process fails: open; then Process works", says: "could not make a pidfd", root: true,
		run: seeProcessStarved,
	})
	add(fault{
		doing: "WatchFiles of a mount", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		run: starving(watchMount),
	})
	add(fault{
		doing: inode, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(watchFiles(kernstream.MarkInode)),
	})
	add(fault{
		doing: whole, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		run: starving(watchFiles(kernstream.MarkFilesystem)),
	})
	return list
}

// subdirectory lets the files be made in a directory that is not marked itself.
func subdirectory(l *lab) {
	l.sub = "sub/"
	must(os.Mkdir(l.path(""), 0o755))
}
