package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// What programs wait with for the end of a process. Each runs its wait on
// goroutines or threads as it does for real, and hands the news on.

// sentryEpoll is the floor: a thread in epoll_wait(2) that notes the time
// itself.
func sentryEpoll(context.Context) (*sentry, error) { return newEpollSentry(func(int) {}) }

// sentryEpollStatus is the floor for who wants to know how the process ended,
// and is not its parent.
func sentryEpollStatus(context.Context) (*sentry, error) {
	return newEpollSentry(func(pid int) { os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) })
}

// newEpollSentry calls look for what has ended, before it notes the time.
func newEpollSentry(look func(pid int)) (*sentry, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, stop, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(stop)}); err != nil {
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	seen, done := make(chan int64, 1), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		events := make([]unix.EpollEvent, 64)
		for {
			n, err := unix.EpollWait(epfd, events, -1)
			if err != nil && err != unix.EINTR {
				return
			}
			for _, e := range events[:max(n, 0)] {
				if int(e.Fd) == stop {
					return
				}
				look(int(e.Pad))
				at := now()
				unix.Close(int(e.Fd))
				seen <- at
			}
		}
	}()
	return &sentry{
		watch: func(pid int) error {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				return os.NewSyscallError("pidfd_open", err)
			}
			return unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd), Pad: int32(pid)})
		},
		seen: func() (int64, error) { return receive(seen) },
		close: func() error {
			unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
			<-done
			unix.Close(stop)
			return unix.Close(epfd)
		},
	}, nil
}

// eachWait is a sentry that starts a goroutine for each process, which runs
// wait and then sends; the receiver notes the time, as one of a watcher does.
func eachWait(prepare func(pid int) (wait func(), err error)) *sentry {
	c := make(chan struct{}, 1)
	return &sentry{
		watch: func(pid int) error {
			wait, err := prepare(pid)
			if err != nil {
				return err
			}
			go func() {
				wait()
				c <- struct{}{}
			}()
			return nil
		},
		seen: func() (int64, error) {
			_, err := receive(c)
			return now(), err
		},
		close: func() error { return nil },
	}
}

// sentryPoll is a goroutine that blocks its thread in poll(2).
func sentryPoll(context.Context) (*sentry, error) {
	return eachWait(func(pid int) (func(), error) {
		fd, err := unix.PidfdOpen(pid, 0)
		return func() {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			for {
				if n, _ := unix.Poll(fds, -1); n > 0 {
					break
				}
			}
			unix.Close(fd)
		}, os.NewSyscallError("pidfd_open", err)
	}), nil
}

// sentryFile is a goroutine that waits for an os.File in the runtime's poller:
// what that and a channel cost.
func sentryFile(context.Context) (*sentry, error) {
	return eachWait(func(pid int) (func(), error) {
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			return nil, os.NewSyscallError("pidfd_open", err)
		}
		file := os.NewFile(uintptr(fd), "pidfd")
		conn, err := file.SyscallConn()
		return func() {
			conn.Read(func(fd uintptr) bool { return pidfdReady(int(fd)) })
			file.Close()
		}, err
	}), nil
}

// sentryKill asks every 100 ms whether the process is there. It sees a zombie as
// one that is.
func sentryKill(context.Context) (*sentry, error) {
	return eachWait(func(pid int) (func(), error) {
		return func() {
			for unix.Kill(pid, 0) == nil {
				time.Sleep(100 * time.Millisecond)
			}
		}, nil
	}), nil
}

// sentryWait is os.Process.Wait, which blocks its thread in waitid(2).
func sentryWait(context.Context) (*sentry, error) {
	return eachWait(func(pid int) (func(), error) {
		p, err := os.FindProcess(pid)
		return func() { p.Wait() }, err
	}), nil
}

// sentrySocket is waitid(2) on a pidfd that does not block, in the runtime's
// poller, with a context: as mdlayher/pidfd waits, on the package that it stands
// on.
func sentrySocket(ctx context.Context) (*sentry, error) {
	return eachWait(func(pid int) (func(), error) {
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			return nil, os.NewSyscallError("pidfd_open", err)
		}
		conn, err := socket.New(fd, "pidfd")
		return func() {
			conn.ReadFunc(ctx, "waitid", func(fd int) error {
				return unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOWAIT, nil)
			})
			conn.Close()
		}, err
	}), nil
}
