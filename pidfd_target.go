package kernstream

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/pidfd"
	"github.com/kernstream/kernstream/internal/procfs"
)

// A Target is the process that is meant: a [PID], an [OfProcess], a [PidFD] or
// one that was [Saved].
type Target interface {
	// open returns a pidfd of the process. The error says what is wrong with
	// the target.
	open() (openProcess, error)

	// String names the target in errors.
	String() string
}

// An openProcess is a pidfd and what came to be known of its process when it
// was opened.
type openProcess struct {
	fd  int    // the caller's to close
	pid int    // in the process ID namespace of this program; 0: it has none there, or it was reaped
	id  uint64 // of ProcessID; 0: not to be known
}

// PID is the process that has the number pid at the time of the call, in the
// process ID namespace of this program. A number is given to another process
// once its process was reaped: where that may have happened, one of the others
// is a better Target.
func PID(pid int) Target { return pidTarget(pid) }

type pidTarget int

func (t pidTarget) String() string { return processName(int(t)) }

func (t pidTarget) open() (openProcess, error) {
	fd, err := openPidfd(int(t))
	if err != nil {
		return openProcess{}, processError("pidfd_open", t.String(), err)
	}
	return newOpenProcess(fd, int(t)), nil
}

// OfProcess is the process that p stands for, which need not be a child. It is
// never a later one with the same number: if the program has waited for p, the
// error Is os.ErrProcessDone. p is only used during the call, and its Wait goes
// on working.
func OfProcess(p *os.Process) Target { return osTarget{p} }

type osTarget struct{ process *os.Process }

func (t osTarget) String() string {
	if t.process == nil {
		return "process"
	}
	return processName(t.process.Pid)
}

func (t osTarget) open() (openProcess, error) {
	if t.process == nil {
		return openProcess{}, processError("open", "process", errors.New("the os.Process is nil"))
	}
	if pid := t.process.Pid; pid != int(int32(pid)) {
		// Its handle is of the process that has the lower half of the number.
		return openProcess{}, processError("pidfd_open", t.String(), noSuchNumber())
	}
	fd := -1
	var err error
	herr := t.process.WithHandle(func(handle uintptr) { fd, err = duplicate(handle) })
	switch {
	case errors.Is(herr, os.ErrNoHandle):
		return t.openChild()
	case errors.Is(herr, os.ErrProcessDone):
		return openProcess{}, processError("open", t.String(), noSuchNumber())
	case cmp.Or(herr, err) != nil:
		return openProcess{}, processError("fcntl", t.String(), withLimit(cmp.Or(err, herr)))
	}
	return newOpenProcess(fd, t.process.Pid), nil
}

// openChild opens a process for which package os has no pidfd, because there
// was no descriptor left, say. A child keeps its number until this program has
// waited for it; of another process, the number alone says nothing.
func (t osTarget) openChild() (openProcess, error) {
	fd, err := openPidfd(t.process.Pid)
	if err != nil {
		return openProcess{}, processError("pidfd_open", t.String(), err)
	}
	// Nothing is waited for here: the error tells whether it is a child.
	err = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if errors.Is(t.process.Signal(unix.Signal(0)), os.ErrProcessDone) {
		err = noSuchNumber()
	} else if err != nil {
		err = fmt.Errorf("the os.Process has no handle, so its number may be another process's: %w", os.ErrNoHandle)
	}
	if err != nil {
		unix.Close(fd)
		return openProcess{}, processError("open", t.String(), err)
	}
	return newOpenProcess(fd, t.process.Pid), nil
}

// PidFD is the process that file is a pidfd of (see pidfd_open(2)), also one
// that was reaped already. The file stays the caller's, and may be closed when
// the call returns. A pidfd of a thread (PIDFD_THREAD) is refused.
func PidFD(file *os.File) Target { return fileTarget{file} }

type fileTarget struct{ file *os.File }

func (t fileTarget) String() string {
	if t.file == nil {
		return "pidfd"
	}
	return t.file.Name()
}

func (t fileTarget) open() (_ openProcess, err error) {
	fd := -1
	defer func() {
		if err != nil && fd >= 0 {
			unix.Close(fd)
		}
	}()
	conn, err := t.file.SyscallConn()
	if err != nil {
		return openProcess{}, processError("open", t.String(), os.ErrClosed)
	}
	flags := 0
	cerr := conn.Control(func(own uintptr) {
		// O_NONBLOCK and the like belong to the description, which is
		// shared: only the number is new.
		if fd, err = duplicate(own); err == nil {
			flags, err = unix.FcntlInt(own, unix.F_GETFL, 0)
		}
	})
	switch {
	case cerr != nil:
		return openProcess{}, processError("open", t.String(), os.ErrClosed)
	case err != nil:
		return openProcess{}, processError("fcntl", t.String(), withLimit(err))
	}
	if _, _, err := pidfd.ChildStatus(fd); err != nil {
		return openProcess{}, processError("waitid", t.String(), fmt.Errorf("not a pidfd: %w", err))
	}
	info, err := pidfdInfo(fd)
	switch {
	case err != nil:
		return openProcess{}, processError("open", t.String(), err)
	case info.PID != info.TGID:
		return openProcess{}, processError("open", t.String(), threadError(info.PID, info.TGID, unix.EINVAL))
	case flags&unix.PIDFD_THREAD != 0:
		return openProcess{}, processError("open", t.String(), fmt.Errorf("the pidfd is of one thread (PIDFD_THREAD): %w", unix.EINVAL))
	}
	return newOpenProcess(fd, info.PID), nil
}

// pidfdInfo returns the numbers of a process, 0 if it was reaped or has none
// in the namespace of this program.
func pidfdInfo(fd int) (pidfd.Info, error) {
	info, err := pidfd.GetInfo(fd)
	if err == nil || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EREMOTE) {
		return info, nil
	}
	// The kernel is older. /proc may be of another namespace than this program,
	// but a number that it does not know is better than none.
	pid, err := procNumber(fd)
	switch {
	case err != nil:
		return pidfd.Info{}, err
	case pid <= 0:
		return pidfd.Info{}, nil
	}
	info = pidfd.Info{PID: pid, TGID: pid}
	if tgid, ok := taskProcess(pid); ok && pidfd.Unreaped(fd) {
		info.TGID = tgid
	}
	return info, nil
}

// Saved is the process that had id, if it still is there. Otherwise, or when
// the machine was booted since, the error Is os.ErrProcessDone; another process
// with the same number is not taken for it.
func Saved(id ProcessID) Target { return savedTarget(id) }

type savedTarget ProcessID

func (t savedTarget) String() string { return processName(t.PID) }

func (t savedTarget) open() (openProcess, error) {
	switch boot, err := bootID(); {
	case err != nil:
		return openProcess{}, processError("open", t.String(), err)
	case t.ID == 0 || t.Boot == "":
		return openProcess{}, processError("open", t.String(), fmt.Errorf("the ProcessID is not complete: %w", unix.EINVAL))
	case t.Boot != boot:
		return openProcess{}, processError("open", t.String(), fmt.Errorf("%w: it was of another boot", os.ErrProcessDone))
	}
	p, err := pidTarget(t.PID).open()
	if err != nil {
		return openProcess{}, err
	}
	if p.id == 0 {
		if p.id, err = readIdentity(p.fd, p.pid); err != nil {
			// It is not said to be another one for want of a descriptor, say.
			unix.Close(p.fd)
			return openProcess{}, processError(operation(err, "open"), t.String(), withLimit(err))
		}
	}
	if p.id != t.ID {
		unix.Close(p.fd)
		return openProcess{}, processError("open", t.String(), fmt.Errorf("%w: another process has its number", os.ErrProcessDone))
	}
	return p, nil
}

// newOpenProcess completes what is known of a process. Its ID is taken at once:
// where it is not the pidfd's inode number, it cannot be had any more once the
// process was reaped, and where it is, the inode is in the processor's cache only
// now, and not when the process exits.
func newOpenProcess(fd, pid int) openProcess {
	return openProcess{fd: fd, pid: pid, id: processIdentity(fd, pid)}
}

// duplicate returns another descriptor for the description of fd.
func duplicate(fd uintptr) (int, error) {
	own, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	return own, os.NewSyscallError("fcntl", err)
}

// openPidfd opens the process that has the number pid. The error, which wraps
// that of pidfd_open(2), says what pid is instead.
func openPidfd(pid int) (int, error) {
	switch {
	case pid <= 0:
		return -1, os.NewSyscallError("pidfd_open", unix.EINVAL)
	case pid > math.MaxInt32:
		return -1, noSuchNumber() // the kernel would take the lower half of it
	}
	for tries := 0; ; tries++ {
		fd, err := unix.PidfdOpen(pid, 0)
		call := os.NewSyscallError("pidfd_open", err)
		switch err {
		case nil:
			return fd, nil
		case unix.ESRCH:
			return -1, goneError(call)
		case unix.EPERM, unix.ENOSYS:
			// The kernel itself never refuses.
			return -1, fmt.Errorf("a sandbox (seccomp) forbids it: %w (%w)", errors.ErrUnsupported, call)
		case unix.EINVAL, unix.ENOENT:
			if tgid, ok := taskProcess(pid); ok && tgid != pid {
				return -1, threadError(pid, tgid, err)
			}
			// Before Linux 6.15 a process that is being reaped is EINVAL, too.
			switch kerr := unix.Kill(pid, 0); {
			case kerr == unix.ESRCH:
				return -1, goneError(call)
			case tries == openTries:
				return -1, fmt.Errorf("not a process, perhaps a thread of one: %w", call)
			}
		default:
			return -1, withLimit(call)
		}
	}
}

// openTries is how often openPidfd tries again while it cannot be told whether
// a number is that of a thread or of a process that is being reaped.
const openTries = 3

func threadError(tid, pid int, err error) error {
	return fmt.Errorf("%d is a thread of %s, not a process: %w", tid, processName(pid), os.NewSyscallError("pidfd_open", err))
}

// taskProcess returns the process that a task belongs to, if /proc shows it.
func taskProcess(tid int) (pid int, ok bool) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(tid) + "/status")
	if err != nil {
		return 0, false
	}
	return procfs.StatusTGID(text)
}

// procNumber returns the number that the process of a pidfd has in /proc, which
// may be of another namespace than the caller: 0 if it has none there, and -1
// once it was reaped.
func procNumber(fd int) (int, error) {
	text, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	pid, ok := procfs.PidfdPID(text)
	if !ok {
		return 0, fmt.Errorf("no process ID in the fdinfo %q of a pidfd", text)
	}
	return pid, nil
}

// processIdentity returns what tells the process of a pidfd from every other
// of this boot, as far as this kernel has it; 0 if it cannot be had. Before pidfs
// it is the time of the start, which two processes of the same number cannot
// share unless all numbers were used within a hundredth of a second.
func processIdentity(fd, pid int) uint64 {
	id, _ := readIdentity(fd, pid)
	return id
}

// readIdentity is processIdentity with the reason why it cannot be known while
// the process is there. Of one that was reaped before Linux 6.9 it is 0.
func readIdentity(fd, pid int) (uint64, error) {
	if pidfd.HasID() {
		return pidfd.ID(fd)
	}
	if number, err := procNumber(fd); err == nil {
		pid = number
	}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	// If the process still has its number, the file was its.
	if !pidfd.Unreaped(fd) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	stat, ok := procfs.ParseStat(text)
	if !ok {
		return 0, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	return stat.StartTime, nil
}

// bootID returns what tells this boot of the machine from others.
func bootID() (string, error) {
	if id := knownBootID.Load(); id != nil {
		return *id, nil
	}
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err // it may be otherwise the next time
	}
	id := string(bytes.TrimSpace(text))
	knownBootID.Store(&id)
	return id, nil
}

var knownBootID atomic.Pointer[string]

// withLimit adds to an error that descriptors have run out how many there may
// be.
func withLimit(err error) error {
	var limit string
	switch {
	case errors.Is(err, unix.EMFILE):
		var r unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
			limit = fmt.Sprintf("RLIMIT_NOFILE is %d", r.Cur)
		}
	case errors.Is(err, unix.ENFILE):
		limit = sysctl("fs/file-max")
	case errors.Is(err, unix.ENOSPC):
		limit = sysctl("fs/epoll/max_user_watches")
	}
	if limit == "" {
		return err
	}
	return fmt.Errorf("%w (%s)", err, limit)
}

// sysctl says what a setting below /proc/sys is, or nothing.
func sysctl(name string) string {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return "/proc/sys/" + name + " is " + string(bytes.TrimSpace(text))
}

// A ProcessID says which process it is, for as long as the machine runs: a
// number is given away again, PID and ID together are not. It can be saved as
// text or JSON, and found again by [Saved].
type ProcessID struct {
	PID  int    // its number, in the namespace of the program that watches; 0: not known
	ID   uint64 // the inode number of its pidfds; before Linux 6.9 its start in clock ticks since the boot; 0: not known
	Boot string // /proc/sys/kernel/random/boot_id
}

// String returns the number.
func (id ProcessID) String() string { return strconv.Itoa(id.PID) }

// MarshalText returns the ID in the form PID:ID:BOOT.
func (id ProcessID) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%d:%d:%s", id.PID, id.ID, id.Boot), nil
}

// UnmarshalText reads what MarshalText wrote. Anything else is an error, and
// leaves the ID as it was.
func (id *ProcessID) UnmarshalText(text []byte) error {
	number, rest, _ := strings.Cut(string(text), ":")
	inode, boot, ok := strings.Cut(rest, ":")
	pid, err := strconv.ParseUint(number, 10, 31)
	unique, err2 := strconv.ParseUint(inode, 10, 64)
	if err := cmp.Or(err, err2); err != nil || !ok || strings.ContainsAny(boot, ": ") {
		return fmt.Errorf("kernstream: %q is not a process ID of the form PID:ID:BOOT", text)
	}
	*id = ProcessID{PID: int(pid), ID: unique, Boot: boot}
	return nil
}

func processName(pid int) string { return "process " + strconv.Itoa(pid) }

func processError(op, object string, err error) error {
	return &OpError{Op: op, Source: "process", Object: object, Err: err}
}

// goneError says that a process is gone.
func goneError(err error) error { return fmt.Errorf("%w (%w)", os.ErrProcessDone, err) }

// noSuchNumber is what pidfd_open(2) says of a process that is gone.
func noSuchNumber() error { return goneError(os.NewSyscallError("pidfd_open", unix.ESRCH)) }
