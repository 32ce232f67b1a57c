package kernstream

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// A mount namespace and a root directory belong to a thread. Those that run
// goroutines share theirs, but a goroutine may have locked a thread and given it
// others: the main thread, even, which is the one that /proc/self shows.

const procSelf = "/proc/self"

// ownProc returns the directory in /proc of the caller. Threads of a Go program
// come and go, so it is the one of the whole process, unless the calling
// thread has left the main thread's root directory or namespace.
func ownProc() string {
	if sameContext(unix.Getpid(), unix.Gettid()) {
		return procSelf
	}
	return "/proc/thread-self"
}

// onOrdinaryThread tells whether the calling thread has the namespace and root
// directory of those that run goroutines.
func onOrdinaryThread() bool {
	tid := unix.Gettid()
	ordinary := make(chan bool)
	go func() { ordinary <- sameContext(tid, unix.Gettid()) }() // never on a locked thread
	return <-ordinary
}

// ordinarily calls f on a thread that has the namespace and root directory of
// those that run goroutines. statmount(2) answers for the calling thread, and
// so it answers as it will answer later.
func ordinarily(f func()) {
	if onOrdinaryThread() {
		f()
		return
	}
	panicked := make(chan any, 1)
	go func() {
		done := false
		defer func() {
			if done {
				close(panicked)
			} else {
				panicked <- recover()
			}
		}()
		f()
		done = true
	}()
	if p, ok := <-panicked; ok {
		panic(p) // of a function that the caller passed in
	}
}

// sameContext tells whether two threads of this process have one mount namespace
// and one root directory.
func sameContext(a, b int) bool {
	if a == b {
		return true
	}
	// A thread has to part with the others' file-system context before it can
	// enter another mount namespace.
	const kcmpFS = 3
	differ, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), kcmpFS, 0, 0, 0)
	if errno == 0 {
		return differ == 0
	}
	// kcmp(2) is left out of some kernels, and of some sandboxes. A thread
	// that has a root of its own in the same namespace is then taken for one of
	// the others.
	namespace := func(tid int) string {
		link, err := os.Readlink("/proc/self/task/" + strconv.Itoa(tid) + "/ns/mnt")
		if err != nil {
			return strconv.Itoa(tid)
		}
		return link
	}
	return namespace(a) == namespace(b)
}
