package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// What permission events are compared with: a loop of system calls, and one of
// the shape that a library in use has.

// guard makes a group with a permission mark of a file.
func guard(path string) (int, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		return -1, os.NewSyscallError("fanotify_init", err)
	}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, unix.AT_FDCWD, path); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("fanotify_mark", err)
	}
	return fd, nil
}

// inBackground runs serve; when that fails, so do the openers, in whose place
// this says why.
func inBackground(serve func() error) {
	go func() {
		fmt.Fprintln(os.Stderr, "bench:", serve())
		os.Exit(1)
	}()
}

// judgeRaw is the floor: one thread that reads an event, answers it and closes
// its descriptor.
func judgeRaw(path string) error {
	fd, err := guard(path)
	if err != nil {
		return err
	}
	inBackground(func() error {
		runtime.LockOSThread()
		buf, answer := make([]byte, 4096), make([]byte, 8)
		binary.NativeEndian.PutUint32(answer[4:], unix.FAN_ALLOW)
		for {
			n, err := unix.Read(fd, buf)
			if err != nil {
				return os.NewSyscallError("read", err)
			}
			for b := buf[:n]; len(b) > 0; b = b[binary.NativeEndian.Uint32(b):] {
				copy(answer, b[16:20])
				if _, err := unix.Write(fd, answer); err != nil {
					return os.NewSyscallError("write", err)
				}
				unix.Close(int(binary.NativeEndian.Uint32(b[16:])))
			}
		}
	})
	return nil
}

// judgePolled waits in poll(2), finds out the path of each event by readlink(2),
// and sends it through a channel that has room for 4,096, to a consumer that
// answers. So does opcoder0/fanotify.
func judgePolled(path string) error {
	fd, err := guard(path)
	if err != nil {
		return err
	}
	c := make(chan fileEvent, 4096)
	inBackground(func() error { return readPolled(fd, c) })
	inBackground(func() error {
		for e := range c {
			var answer bytes.Buffer
			binary.Write(&answer, binary.NativeEndian, unix.FanotifyResponse{Fd: int32(e.fd), Response: unix.FAN_ALLOW})
			if _, err := unix.Write(fd, answer.Bytes()); err != nil {
				return os.NewSyscallError("write", err)
			}
			unix.Close(e.fd)
		}
		return nil
	})
	return nil
}

func readPolled(fd int, c chan<- fileEvent) error {
	buf := make([]byte, 4096*24)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		}
		n, err := unix.Read(fd, buf)
		if err != nil {
			return os.NewSyscallError("read", err)
		}
		for b := buf[:n]; len(b) > 0; b = b[binary.NativeEndian.Uint32(b):] {
			number := int(binary.NativeEndian.Uint32(b[16:]))
			path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", number))
			if err != nil {
				return err
			}
			c <- fileEvent{number, path, binary.NativeEndian.Uint64(b[8:]), int(binary.NativeEndian.Uint32(b[20:]))}
		}
	}
}
