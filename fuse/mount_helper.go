package fuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/poller"
)

// Mounting by fusermount3, which is set-user-ID root: it mounts, and sends the
// descriptor of the device over a socket that it finds by the environment.

// A helper is a fusermount3 that stays, and unmounts when its socket is closed.
type helper struct {
	cmd    *exec.Cmd
	socket *poller.File
}

// messages is where a helper writes what it has to say: a file in memory, so
// nobody needs to read while it runs.
type messages struct{ file *os.File }

func newMessages() (*messages, error) {
	fd, err := unix.MemfdCreate("kernstream", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return &messages{os.NewFile(uintptr(fd), "messages")}, nil
}

func (m *messages) String() string {
	text := make([]byte, 4096)
	n, _ := m.file.ReadAt(text, 0)
	return strings.Join(strings.Fields(string(bytes.ToValidUTF8(text[:n], []byte("?")))), " ")
}

// command returns a command of the helper, whose output goes to m, and which
// needs no file of the namespace but the program.
func (m *messages) command(path string, args ...string) *exec.Cmd {
	return &exec.Cmd{
		Path: path, Args: append([]string{path}, args...),
		Stdin: m.file, Stdout: m.file, Stderr: m.file,
	}
}

// helperError returns an error for a helper that failed.
func (m *messages) helperError(path, object string, err error) error {
	name := filepath.Base(path)
	text := strings.TrimPrefix(m.String(), name+": ")
	for _, known := range []struct {
		text string
		err  error
	}{
		{"user_allow_other", fs.ErrPermission},
		{"Operation not permitted", unix.EPERM},
		{"Permission denied", unix.EACCES},
		{"Device or resource busy", unix.EBUSY},
		{"Invalid argument", unix.EINVAL},
		{"No such file or directory", unix.ENOENT},
		{"Transport endpoint is not connected", unix.ENOTCONN},
	} {
		if strings.Contains(text, known.text) {
			err = fmt.Errorf("%w (%w)", err, known.err)
			break
		}
	}
	if text != "" {
		err = fmt.Errorf("%s: %w", text, err)
	}
	return fuseError(name, object, err)
}

// mountByHelper lets the helper mount.
func mountByHelper(ctx context.Context, s *Session, _ uint32) (*attachment, error) {
	var socket [2]int
	// The helper must not inherit our end: it would never see that we are gone.
	socket, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, failed("", s.object(), os.NewSyscallError("socketpair", err))
	}
	theirs := os.NewFile(uintptr(socket[1]), "socket")
	defer theirs.Close()
	ours, err := poller.New(socket[0], "socket of the helper")
	if err != nil {
		return nil, failed("open", s.object(), err)
	}
	m, err := newMessages()
	if err != nil {
		ours.Close()
		return nil, failed("open", s.object(), err)
	}
	defer m.file.Close()

	before := s.topMount()
	cmd, err := s.startHelper(m, theirs)
	if err != nil {
		ours.Close()
		return nil, err
	}
	theirs.Close()
	device, err := s.receiveDevice(ctx, ours)
	if err != nil {
		ours.Close()
		return nil, s.endHelper(ctx, cmd, m, before, err)
	}
	a := &attachment{device: device, mount: -1}
	if s.config.AutoUnmount {
		a.helper = &helper{cmd: cmd, socket: ours}
		return a, nil
	}
	ours.Close()
	cmd.Wait() // it has done what it was asked for, whatever it says
	return a, nil
}

// topMount returns which mount is at the mount point.
func (s *Session) topMount() (id MountID) {
	s.place.do(func(int) (err error) {
		id, err = mountAt(s.config.MountPoint)
		return err
	})
	return id
}

func (s *Session) startHelper(m *messages, socket *os.File) (cmd *exec.Cmd, err error) {
	err = s.place.do(func(int) error {
		path, err := s.config.findHelper()
		if err != nil {
			return err
		}
		options := escaped(s.config.options().words)
		cmd = m.command(path, "-o", options, "--", s.config.MountPoint)
		cmd.ExtraFiles = []*os.File{socket}
		cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
		if err := cmd.Start(); err != nil {
			return failed("start", path, err)
		}
		return nil
	})
	return cmd, err
}

// receiveDevice receives the descriptor of the device. The error is io.EOF if
// the helper ends without sending one.
func (s *Session) receiveDevice(ctx context.Context, socket *poller.File) (device int, err error) {
	defer socket.CancelOn(ctx)()
	device = -1
	err = socket.Wait(func(fd int) (bool, error) {
		device, err = s.making(func() (int, error) { return receiveDescriptor(fd) })
		if err == unix.EAGAIN {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return -1, err
	}
	return device, nil
}

func receiveDescriptor(socket int) (fd int, err error) {
	data, control := make([]byte, 16), make([]byte, unix.CmsgSpace(4*4))
	var n, oob int
	for {
		n, oob, _, _, err = unix.Recvmsg(socket, data, control, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return -1, err
	}
	fds := descriptorsIn(control[:oob])
	switch {
	case len(fds) == 1:
		return fds[0], nil
	case n == 0 && len(fds) == 0:
		return -1, io.EOF
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return -1, fmt.Errorf("a message with %d descriptors instead of 1", len(fds))
}

// descriptorsIn returns the descriptors of a control message.
func descriptorsIn(control []byte) (fds []int) {
	list, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range list {
		if rights, err := unix.ParseUnixRights(&list[i]); err == nil {
			fds = append(fds, rights...)
		}
	}
	return fds
}

// endHelper ends a helper that did not send a device because of err. before is
// what was mounted at the mount point before it ran.
func (s *Session) endHelper(ctx context.Context, cmd *exec.Cmd, m *messages, before MountID, err error) error {
	if err != io.EOF {
		cmd.Process.Kill()
	}
	exit := cmd.Wait()
	if now := s.topMount(); err != io.EOF && now != before && now != (MountID{}) {
		// It was killed after it had mounted. Without its device that is dead.
		s.id = now
		s.unmountForGood()
		s.id = MountID{}
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != io.EOF:
		return failed("receive", s.object(), err)
	case exit == nil:
		exit = errors.New("it sent no descriptor")
	}
	return m.helperError(cmd.Path, s.object(), exit)
}

// helperPatience is how long a helper may take to end when its socket is closed.
const helperPatience = 2 * time.Second

// leave ends a helper that stayed. It unmounts only if the mount point says
// ENOTCONN then, so every descriptor of the device must be closed before. If the
// file system is to stay, it is not even asked.
func (h *helper) leave(stay bool) {
	if stay {
		h.cmd.Process.Kill()
	}
	h.socket.Close()
	// It has all signals blocked but this one.
	kill := time.AfterFunc(helperPatience, func() { h.cmd.Process.Kill() })
	h.cmd.Wait()
	kill.Stop()
}

// unmountByHelper lets the helper unmount. It is called in the namespace of the
// mount.
func (s *Session) unmountByHelper(ctx context.Context, lazy bool) error {
	path, err := s.config.findHelper()
	if err != nil {
		return err
	}
	m, err := newMessages()
	if err != nil {
		return failed("open", s.object(), err)
	}
	defer m.file.Close()
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	cmd := m.command(path, append(args, "--", s.config.MountPoint)...)
	if err := cmd.Start(); err != nil {
		return failed("start", path, err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err = cmd.Wait()
	if !stop() && ctx.Err() != nil && err != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return m.helperError(path, s.object(), err)
	}
	return nil
}
