package faults

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// The things that go wrong. Each is done to the child itself.

// refused lets system calls fail with errno.
func refused(errno syscall.Errno, calls ...int) func(*lab) {
	return func(*lab) {
		var refusals []testenv.Refusal
		for _, call := range calls {
			refusals = append(refusals, testenv.Refusal{Call: call})
		}
		must(testenv.Refuse(errno, refusals...))
	}
}

// refusedIoctl lets an ioctl(2) fail with errno.
func refusedIoctl(errno syscall.Errno, request uint32) func(*lab) {
	return func(*lab) {
		must(testenv.Refuse(errno, testenv.Refusal{Call: unix.SYS_IOCTL, Argument: 2, Value: request}))
	}
}

// A socketCall is a system call on sockets: its number, and that in socketcall(2), through
// which they all go on 386.
type socketCall struct {
	number int
	sub    uint32
}

var (
	socketSocket = socketCall{unix.SYS_SOCKET, 1}
	socketBind   = socketCall{unix.SYS_BIND, 2}
	socketSendto = socketCall{unix.SYS_SENDTO, 11}
)

// refusedSocket lets a call fail with errno.
func refusedSocket(errno syscall.Errno, call socketCall) func(*lab) {
	return func(*lab) {
		refusal := testenv.Refusal{Call: call.number}
		if runtime.GOARCH == "386" {
			const socketcall = 102
			refusal = testenv.Refusal{Call: socketcall, Argument: 1, Value: call.sub}
		}
		must(testenv.Refuse(errno, refusal))
	}
}

// noProc hides /proc.
func noProc(*lab) { must(unix.Mount("nothing", "/proc", "tmpfs", 0, "")) }

// readOnlyProc lets nobody write to /proc.
func readOnlyProc(*lab) {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	must(unix.Mount("", "/proc", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, ""))
}

// jailed makes the lab's directory the root directory. There is no /proc in it.
func jailed(l *lab) {
	must(unix.Chroot(l.dir))
	must(unix.Chdir("/"))
	l.dir = "/"
}

// jailedWithProc is jailed, with a /proc.
func jailedWithProc(l *lab) {
	must(os.Mkdir(l.path("proc"), 0o755))
	must(unix.Mount("/proc", l.path("proc"), "", unix.MS_BIND|unix.MS_REC, ""))
	jailed(l)
}

// noNewPrivileges is what container runtimes set.
func noNewPrivileges(*lab) { must(testenv.Refuse(unix.EPERM)) }

// limited sets a limit of the user namespace.
func limited(name string, value int) func(*lab) {
	return func(l *lab) {
		l.limited = true
		must(os.WriteFile("/proc/sys/user/"+name, []byte(fmt.Sprint(value)), 0))
	}
}

// starving lets a scenario run with room for 0, 1, 2 and more descriptors, so
// that each call that opens one has failed once. How much works with how many
// depends on the kernel; that it works, or fails for that reason, does not.
func starving(run func(*lab) string) func(*lab) string {
	const most = 14
	return func(l *lab) string {
		works := ""
		for free := range most {
			var outcome string
			for tries := 0; outcome == "" || free == most-1 && tries < 100 && strings.Contains(outcome, "EMFILE"); tries++ {
				l.starve(free)
				outcome = run(l)
				l.feed()
			}
			if left := l.left(); left != nil {
				return fmt.Sprintf("with room for %d: left behind: %q", free, left)
			}
			switch {
			case strings.HasPrefix(outcome, "works"):
				works = outcome
			case !strings.HasPrefix(outcome, "fails: ") || !strings.Contains(outcome, " EMFILE"):
				return fmt.Sprintf("with room for %d: %s", free, outcome)
			}
		}
		if works == "" {
			return fmt.Sprintf("never works with room for %d", most-1)
		}
		return "fails: EMFILE, until there is room"
	}
}
