// Package mntns runs a function in another mount namespace, within this
// process: one that is there, or a new one.
//
// Go moves goroutines between threads, and a mount namespace belongs to a
// thread. The function therefore runs on a thread that is locked for it, gets
// a file-system context of its own, enters the namespace, and is thrown away
// afterwards, since there is no sure way back.
package mntns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Do calls use on a thread in the mount namespace that the descriptor ns stands
// for, such as one of /proc/PID/ns/mnt, with the root of that namespace as its
// root and working directory. It returns use's error.
//
// proc is a descriptor of the thread's own directory in /proc, made before it
// entered the namespace, whose /proc may be another or missing. use must not
// keep it, and what it does in other goroutines is not done in the namespace.
//
// Do needs CAP_SYS_ADMIN in the user namespace that owns the mount namespace,
// CAP_SYS_ADMIN and CAP_SYS_CHROOT in its own (setns(2)), and costs a thread
// each time.
func Do(ns int, use func(proc int) error) error {
	return run(func() error { return within(use, func() error { return join(ns) }) })
}

// Private calls use on a thread in a new mount namespace, a copy of the caller's
// to which no mount propagates, and from which none does. Root and working
// directory stay what they were. proc is as for [Do]. What use starts is in the
// namespace, which ends with the last process in it.
//
// It needs CAP_SYS_ADMIN, and costs a thread each time.
func Private(use func(proc int) error) error {
	return run(func() error {
		return within(use, func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			return os.NewSyscallError("mount", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		})
	})
}

// Apart calls use on a thread that ends with it, in the mount namespace ns as [Do]
// does, or in the caller's if ns is negative. So use may do to its thread what it
// likes. It has no proc: that would be left if use had descriptors of its own.
func Apart(ns int, use func() error) error {
	return run(func() error {
		if ns >= 0 {
			if err := join(ns); err != nil {
				return err
			}
		}
		return use()
	})
}

// join enters a namespace for good.
func join(ns int) error {
	// setns refuses a thread that shares its root and working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("setns", unix.Setns(ns, unix.CLONE_NEWNS))
}

// run calls f on a thread of its own.
func run(f func() error) error {
	result := make(chan error, 1)
	go onOwnThread(func() {
		// Sent even if use ends the goroutine, as FailNow of package testing
		// does.
		err := errors.New("mntns: the function did not return")
		defer func() { result <- err }()
		err = f()
	})
	return <-result
}

// onOwnThread calls f on a thread that ends with it.
func onOwnThread(f func()) {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	// The main thread cannot end, and what it does shows in /proc/self, so it
	// stays as it is. While it is locked here, the next goroutine gets another.
	defer runtime.UnlockOSThread()
	done := make(chan struct{})
	go func() {
		defer close(done)
		onOwnThread(f)
	}()
	<-done
}

func within(use func(proc int) error, enter func() error) error {
	proc, err := unix.Open("/proc/thread-self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return fmt.Errorf("%w: is /proc mounted?", os.NewSyscallError("open", err))
	}
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	defer unix.Close(proc)
	if err := enter(); err != nil {
		return err
	}
	return use(proc)
}
