package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/recorder"
)

// record begins to record a target.
func record(l *lab, target recorder.Target, options *recorder.Options) (*recorder.Recording, error) {
	return watch(l, func() (*recorder.Recording, error) { return recorder.Record(context.Background(), target, options) })
}

// startOpenerBelow starts an opener that opens a file on a mount below the directory.
func startOpenerBelow(l *lab) {
	subdirectory(l)
	must(unix.Mount("below", l.path(""), "tmpfs", 0, ""))
	startOpener(l)
}

// recordOpen records that the opener opens the file that it has made.
func recordOpen(options *recorder.Options) func(*lab) string {
	return func(l *lab) string {
		o := *options
		if o.Tree != 0 {
			o.Tree = l.victim.Process.Pid
		}
		r, err := record(l, recorder.Directory(l.dir), &o)
		if err != nil {
			return failure(err)
		}
		defer r.Close()
		l.opens(l.file.Name())
		must(l.opened())
		r.Close()
		return listed(r, l.path("there"))
	}
}

// listed tells whether a list is complete, and has a file.
func listed(r *recorder.Recording, path string) string {
	for a := range r.C {
		a.Close()
	}
	list, err := r.List()
	if err != nil {
		return failure(err)
	}
	n := 0
	for i := range list.Entries {
		if strings.HasSuffix(path, list.Entries[i].Path) {
			n++
		}
	}
	switch {
	case list.Complete && n == 1:
		return "works, complete"
	case list.Complete:
		return fmt.Sprintf("complete, with %d entries of the file", n)
	}
	lastError = strings.Join(list.Reasons, "; ")
	return fmt.Sprintf("incomplete, with %d entries of the file", n)
}

// orIncomplete takes a list that is not complete for want of descriptors for a failure
// for that reason: paths take some, for a moment.
func orIncomplete(run func(*lab) string) func(*lab) string {
	return func(l *lab) string {
		outcome := run(l)
		if strings.HasPrefix(outcome, "incomplete") && strings.Contains(lastError, unix.EMFILE.Error()) {
			return "fails: record EMFILE"
		}
		return outcome
	}
}

// recordCommand records a command that reads a file.
func recordCommand(l *lab) string {
	target, end := catTarget(l)
	defer end()
	r, err := record(l, target, nil)
	if err != nil {
		return failure(err)
	}
	defer r.Close()
	return listed(r, l.path("there"))
}

// catTarget is a command that reads a file.
func catTarget(l *lab) (target recorder.Target, end func()) {
	cmd := exec.Command("cat", l.path("there"))
	// Without these, os/exec opens /dev/null itself.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = l.open, l.open, l.open
	return recorder.Command(cmd), func() {
		if cmd.Process != nil {
			cmd.Wait()
		}
	}
}

func victimTarget(l *lab) (target recorder.Target, end func()) {
	return recorder.Container(l.victim.Process.Pid), func() {}
}

// attemptRecord begins a recording of one mount, for which a machine needs the same number of
// descriptors as any other.
func attemptRecord(of func(*lab) (recorder.Target, func())) func(*lab) string {
	return func(l *lab) string {
		target, end := of(l)
		defer end()
		r, err := record(l, target, &recorder.Options{OneMount: true})
		if err != nil {
			return failure(err)
		}
		r.Close()
		return "works"
	}
}

// recordKilled records a command that is killed, with a child of it that opens the file.
func recordKilled(l *lab) string {
	cmd := exec.Command("sh", "-c", `cat "$0"; kill -KILL $$`, l.path("there"))
	r, err := record(l, recorder.Command(cmd), &recorder.Options{Descendants: true})
	if err != nil {
		return failure(err)
	}
	defer r.Close()
	outcome := listed(r, l.path("there"))
	if cmd.Wait(); cmd.ProcessState.String() != "signal: killed" {
		return fmt.Sprintf("the command ended by %v", cmd.ProcessState)
	}
	return outcome
}

// recordContainer records the opener, which ends.
func recordContainer(end func(*lab)) func(*lab) string {
	return func(l *lab) string {
		r, err := record(l, recorder.Container(l.victim.Process.Pid), nil)
		if err != nil {
			return failure(err)
		}
		defer r.Close()
		l.opens(l.file.Name())
		must(l.opened())
		end(l)
		return listed(r, l.path("there"))
	}
}

// recordStopped is stopped while the opener opens files.
func recordStopped(l *lab) string {
	r, err := record(l, recorder.Directory(l.dir), nil)
	if err != nil {
		return failure(err)
	}
	defer r.Close()
	whileStopped("true <" + l.path("there"))
	r.Close()
	return listed(r, l.path("there"))
}

// connected records by way of a server. between gets its end of the connection when a file was told.
func connected(between func(*net.UnixConn)) func(*lab) string {
	return func(l *lab) string {
		server, client, err := socketPair()
		if err != nil {
			return "fails: " + err.Error()
		}
		served := make(chan error, 1)
		go func() {
			served <- recorder.Serve(context.Background(), server, &recorder.ServeOptions{Target: recorder.Directory(l.dir)})
		}()
		r, err := recorder.Connect(context.Background(), client, nil)
		if err != nil {
			return "Connect " + failure(err) + "; Serve " + failure(<-served)
		}
		l.opens(l.file.Name())
		must(l.opened())
		<-r.C
		between(server)
		outcome := listed(r, l.path("there"))
		if err := <-served; !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(r.Err(), io.ErrUnexpectedEOF) {
			return fmt.Sprintf("%s; Serve fails: %v; Connect fails: %v", outcome, err, r.Err())
		}
		return outcome + "; both errors are io.ErrUnexpectedEOF"
	}
}

// connectStarved records by way of a server, in the same process.
func connectStarved(l *lab) string {
	server, client, err := socketPair()
	if err != nil {
		return "fails: " + err.Error()
	}
	served := make(chan error, 1)
	go func() {
		served <- recorder.Serve(context.Background(), server, &recorder.ServeOptions{Target: recorder.Directory(l.dir)})
	}()
	r, err := recorder.Connect(context.Background(), client, nil)
	if err != nil {
		lastError = err.Error()
		return failure(<-served) // which the other side is told
	}
	r.Close()
	if err := <-served; err != nil {
		return failure(err)
	}
	return "works"
}

// mountWhileRecording records while a mount comes for which there is no descriptor.
func mountWhileRecording(l *lab) string {
	r, err := record(l, recorder.Directory(l.dir), nil)
	if err != nil {
		return failure(err)
	}
	defer r.Close()
	subdirectory(l)
	l.starve(0)
	must(unix.Mount("late", l.path(""), "tmpfs", 0, ""))
	// What it needs descriptors for is done in the background.
	l.opens(l.file.Name())
	must(l.opened())
	r.Close()
	l.feed()
	must(unix.Unmount(l.path(""), 0))
	return listed(r, "/there")
}

// writeStarved writes a list.
func writeStarved(l *lab) string {
	if err := newList.WriteFile(l.path("lists/list")); err != nil {
		return failure(err)
	}
	return "works"
}

// cut ends a connection for both sides.
func cut(conn *net.UnixConn) {
	raw, err := conn.SyscallConn()
	must(err)
	must(raw.Control(func(fd uintptr) { must(unix.Shutdown(int(fd), unix.SHUT_RDWR)) }))
}

func socketPair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.New("socketpair " + unix.ErrnoName(err.(syscall.Errno)))
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		conn, connErr := net.FileConn(f)
		f.Close()
		if errno, ok := errors.AsType[syscall.Errno](connErr); ok {
			err = errors.New("socketpair " + unix.ErrnoName(errno))
			continue
		}
		must(connErr)
		conns[i] = conn.(*net.UnixConn)
	}
	if err != nil {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
		return nil, nil, err
	}
	return conns[0], conns[1], nil
}

// The list that is written, and the one that is there before.
var (
	oldList = &recorder.List{Complete: true}
	newList = &recorder.List{Entries: manyEntries(), Complete: true}
)

// manyEntries are more than a page.
func manyEntries() (entries []recorder.Entry) {
	for i := range 1000 {
		entries = append(entries, recorder.Entry{Path: fmt.Sprint("/", i), Ops: kernstream.OpOpen, Count: 1})
	}
	return entries
}

// writeOldList lets there be a list, in a file system of its own with room for so many
// bytes.
func writeOldList(room int) func(*lab) {
	return func(l *lab) {
		must(unix.Mkdir(l.path("lists"), 0o755))
		must(unix.Mount("lists", l.path("lists"), "tmpfs", 0, fmt.Sprint("size=", room)))
		must(oldList.WriteFile(l.path("lists/list")))
	}
}

// readOnlyLists lets nobody write a list.
func readOnlyLists(l *lab) {
	must(unix.Mount("", l.path("lists"), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
}

// writeList writes another list, and says what is there then.
func writeList(l *lab) string {
	name := l.path("lists/list")
	outcome := "works"
	if err := newList.WriteFile(name); err != nil {
		outcome = failure(err)
	}
	files, err := filepath.Glob(filepath.Dir(name) + "/*")
	must(err)
	hidden, err := filepath.Glob(filepath.Dir(name) + "/.*")
	must(err)
	f, err := os.Open(name)
	if err != nil {
		return outcome + "; " + err.Error()
	}
	defer f.Close()
	have, err := recorder.ReadList(f)
	switch {
	case err != nil:
		return outcome + "; what is there " + failure(err)
	case len(files)+len(hidden) > 1:
		return fmt.Sprintf("%s; there are %q %q", outcome, files, hidden)
	case len(have.Entries) == len(newList.Entries):
		return outcome + ", the whole list is there"
	}
	return outcome + "; the list before is there, and nothing else"
}

func recordFaults() []fault {
	const (
		directory  = "Record of a directory"
		withMounts = "Record of a directory with a mount below it"
		command    = "Record of a command"
		container  = "Record of a process"
		tree       = "Record of a process tree"
		write      = "List.WriteFile"
		works      = "works, complete"
		unchanged  = "; the list before is there, and nothing else"
		room       = 1 << 20
	)
	byDirectory := recordOpen(&recorder.Options{})
	meanings := map[syscall.Errno]string{unix.EPERM: ", Is fs.ErrPermission", unix.ENOSYS: ", Is errors.ErrUnsupported"}
	var list []fault
	add := func(f fault) {
		f.source, f.root = "record", true
		if f.prepare == nil {
			f.prepare = startOpener
			f.run = withOpener(f.run)
		}
		list = append(list, f)
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS, unix.EMFILE} {
		add(fault{
			doing: directory, fault: "fanotify_init is refused with " + unix.ErrnoName(errno), outcome: "fails: fanotify_init " + unix.ErrnoName(errno) + meanings[errno],
			inject: func(l *lab) { l.limited = true; refused(errno, unix.SYS_FANOTIFY_INIT)(l) }, run: byDirectory,
		})
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOMEM} {
		add(fault{
			doing: directory, fault: "fanotify_mark is refused with " + unix.ErrnoName(errno), outcome: "fails: fanotify_mark " + unix.ErrnoName(errno) + meanings[errno], says: "/lab",
			inject: refused(errno, unix.SYS_FANOTIFY_MARK), run: byDirectory,
		})
		add(fault{
			doing: command, fault: "unshare is refused with " + unix.ErrnoName(errno), outcome: "fails: unshare " + unix.ErrnoName(errno) + meanings[errno], says: "cat",
			inject: refused(errno, unix.SYS_UNSHARE), run: recordCommand,
		})
		add(fault{
			doing: tree, fault: "socket is refused with " + unix.ErrnoName(errno), outcome: "fails: socket " + unix.ErrnoName(errno) + meanings[errno], says: "process events",
			inject: refusedSocket(errno, socketSocket), run: recordOpen(&recorder.Options{Tree: 1}),
		})
	}
	add(fault{
		doing: directory, fault: "open_by_handle_at is refused with EPERM", outcome: works,
		inject: refused(unix.EPERM, unix.SYS_OPEN_BY_HANDLE_AT), run: byDirectory,
	})
	add(fault{
		doing: directory, fault: "name_to_handle_at is refused with EPERM", outcome: "incomplete, with 0 entries of the file", says: "files without a name",
		inject: refused(unix.EPERM, unix.SYS_NAME_TO_HANDLE_AT), run: byDirectory,
	})
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
		for _, call := range []struct {
			name, fails string
			number      int
		}{{"openat2", "open", unix.SYS_OPENAT2}, {"statx", "statx", unix.SYS_STATX}} {
			add(fault{
				doing: withMounts, fault: call.name + " is refused with " + unix.ErrnoName(errno), outcome: "fails: " + call.fails + " " + unix.ErrnoName(errno) + meanings[errno], says: call.name,
				prepare: startOpenerBelow, inject: refused(errno, call.number), run: withOpener(byDirectory),
			})
		}
	}
	add(fault{
		doing: withMounts, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		prepare: startOpenerBelow, run: withOpener(starving(orIncomplete(byDirectory))),
	})
	add(fault{
		doing: container, fault: "pidfd_open is refused with EPERM", outcome: "fails: pidfd_open EPERM, Is errors.ErrUnsupported, Is fs.ErrPermission", says: "seccomp",
		inject: refused(unix.EPERM, unix.SYS_PIDFD_OPEN), run: recordContainer((*lab).kill),
	})
	add(fault{
		doing: container, fault: "the process is killed", outcome: works,
		run: recordContainer(func(l *lab) { l.victim.Process.Kill() }),
	})
	add(fault{
		doing: command, fault: "the command is killed", outcome: works,
		run: recordKilled,
	})
	for _, doing := range []struct {
		name    string
		run     func(*lab) string
		starved func(*lab) string
	}{
		{directory, byDirectory, byDirectory},
		{command, recordCommand, attemptRecord(catTarget)},
		{container, recordContainer((*lab).kill), attemptRecord(victimTarget)},
	} {
		add(fault{
			doing: doing.name, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC",
			inject: refused(unix.ENOSPC, unix.SYS_EPOLL_CTL), run: doing.run,
		})
		add(fault{
			doing: doing.name, fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
			inject: noProc, run: doing.run,
		})
		add(fault{
			doing: doing.name, fault: "/proc is read-only", outcome: works,
			inject: readOnlyProc, run: doing.run,
		})
		add(fault{
			doing: doing.name, fault: "no_new_privs", outcome: works,
			inject: noNewPrivileges, run: doing.run,
		})
		add(fault{
			doing: doing.name, fault: "a storm of signals", outcome: works,
			inject: storm, run: doing.run,
		})
		add(fault{
			doing: doing.name, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
			run: starving(orIncomplete(doing.starved)),
		})
	}
	add(fault{
		doing: directory, fault: "chroot into a directory without /proc", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: jailed, run: byDirectory,
	})
	add(fault{
		doing: directory, fault: "chroot into a directory with /proc", outcome: works,
		inject: jailedWithProc, run: byDirectory,
	})
	add(fault{
		doing: directory, fault: "the process is stopped (SIGSTOP) while files are opened", outcome: works,
		run: recordStopped,
	})
	for _, call := range []struct {
		name string
		socketCall
	}{{"bind", socketBind}, {"sendto", socketSendto}} {
		add(fault{
			doing: tree, fault: call.name + " is refused with EPERM", outcome: "fails: " + call.name + " EPERM, Is fs.ErrPermission", says: "process events",
			inject: refusedSocket(unix.EPERM, call.socketCall), run: recordOpen(&recorder.Options{Tree: 1}),
		})
	}
	add(fault{
		doing: directory, fault: "there is no descriptor left when a mount comes below it", outcome: "incomplete, with 0 entries of the file", says: "/sub came after the start of the recording, and is not recorded",
		run: mountWhileRecording,
	})
	add(fault{
		doing: write, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		prepare: writeOldList(room), run: starving(writeStarved),
	})
	const byServer = "Serve and Connect"
	add(fault{
		doing: byServer, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(connectStarved),
	})
	add(fault{
		doing: byServer, fault: "fanotify_init is refused with EPERM", outcome: "Connect fails: read, Is fs.ErrPermission; Serve fails: fanotify_init EPERM, Is fs.ErrPermission", says: "seccomp",
		inject: refused(unix.EPERM, unix.SYS_FANOTIFY_INIT), run: connected(nil),
	})
	add(fault{
		doing: byServer, fault: "the connection is cut", outcome: "incomplete, with 1 entries of the file; both errors are io.ErrUnexpectedEOF",
		run: connected(cut),
	})
	for _, call := range []struct {
		name   string
		number int
		errno  syscall.Errno
	}{{"fsync", unix.SYS_FSYNC, unix.EIO}, {"linkat", unix.SYS_LINKAT, unix.EPERM}, {"renameat", unix.SYS_RENAMEAT, unix.EPERM}} {
		add(fault{
			doing: write, fault: call.name + " is refused with " + unix.ErrnoName(call.errno), outcome: "fails: write " + unix.ErrnoName(call.errno) + meanings[call.errno] + unchanged, says: "/lab/lists/list",
			prepare: writeOldList(room), inject: refused(call.errno, call.number), run: writeList,
		})
	}
	add(fault{
		doing: write, fault: "the file system is full", outcome: "fails: write ENOSPC" + unchanged, says: "/lab/lists/list",
		prepare: writeOldList(16 << 10), run: writeList,
	})
	add(fault{
		doing: write, fault: "the file system is read-only", outcome: "fails: write EROFS" + unchanged, says: "/lab/lists/list",
		prepare: writeOldList(room), inject: readOnlyLists, run: writeList,
	})
	add(fault{
		doing: write, fault: "/proc is not mounted", outcome: "works, the whole list is there",
		prepare: writeOldList(room), inject: noProc, run: writeList,
	})
	return list
}
