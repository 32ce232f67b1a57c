package procfs

import (
	"bytes"
	"os"

	"golang.org/x/sys/unix"
)

// ReadAll reads the file fd from its start into buf, which it extends as
// needed, and returns the whole. The kernel hands out at most a page per call
// for most files, however large the buffer is; step is called before each,
// and its error ends the reading.
func ReadAll(fd int, buf []byte, step func() error) ([]byte, error) {
	buf = buf[:0]
	for {
		if err := step(); err != nil {
			return buf, err
		}
		if cap(buf)-len(buf) < minRead {
			buf = append(make([]byte, 0, 2*cap(buf)+4*minRead), buf...)
		}
		n, err := unix.Pread(fd, buf[len(buf):cap(buf)], int64(len(buf)))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return buf, os.NewSyscallError("pread", err)
		case n == 0:
			return buf, nil
		default:
			buf = buf[:len(buf)+n]
		}
	}
}

// ReadRows reads the file fd from its start and calls use with each row, without
// its line feed. An error of use ends the reading. buf is working memory; use must
// not keep what it gets.
func ReadRows(fd int, buf []byte, use func(row []byte) error) error {
	held := 0 // bytes of a row whose end has not been read
	for offset := int64(0); ; {
		if len(buf)-held < minRead/4 {
			buf = append(buf[:held], make([]byte, len(buf)+minRead)...)
		}
		n, err := unix.Pread(fd, buf[held:], offset)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("pread", err)
		case n == 0:
			if held > 0 {
				return use(buf[:held])
			}
			return nil
		}
		offset += int64(n)
		text := buf[:held+n]
		for {
			end := bytes.IndexByte(text, '\n')
			if end < 0 {
				break
			}
			if err := use(text[:end]); err != nil {
				return err
			}
			text = text[end+1:]
		}
		held = copy(buf, text)
	}
}

// minRead is the room that a read has at least: a page of the largest kind
// that matters.
const minRead = 16 << 10

// MountsChanged tells whether the mount table changed since the last call for
// the same open mountinfo file, or since it was opened. The kernel remembers
// that for each open file description, and this call updates it, so the file
// must not be in an epoll instance.
func MountsChanged(fd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
	for {
		switch _, err := unix.Poll(fds, 0); err {
		case nil:
			if fds[0].Revents&unix.POLLNVAL != 0 {
				return false, os.NewSyscallError("poll", unix.EBADF)
			}
			return fds[0].Revents&(unix.POLLPRI|unix.POLLERR) != 0, nil
		case unix.EINTR:
		default:
			return false, os.NewSyscallError("poll", err)
		}
	}
}
