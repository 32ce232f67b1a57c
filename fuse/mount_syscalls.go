package fuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mounting by system calls of one's own: fsopen(2) and what belongs to it from
// Linux 5.2 on, mount(2) otherwise.

// mountByContext makes a mount that is not visible yet.
func mountByContext(_ context.Context, s *Session, mode uint32) (*attachment, error) {
	device, err := s.making(openDevice)
	if err != nil {
		return nil, err
	}
	a := &attachment{device: device}
	err = s.place.do(func(int) (err error) {
		a.mount, err = s.making(func() (int, error) { return s.config.options().newMount(identity(device, mode)) })
		return failed("mount", s.object(), err)
	})
	if err != nil {
		unix.Close(device)
		return nil, err
	}
	return a, nil
}

// newMount returns a descriptor of a new mount.
func (o *mountOptions) newMount(identity []string) (int, error) {
	context, err := fsopen("fuse")
	if err != nil {
		return -1, err
	}
	defer unix.Close(context)
	for _, name := range superFlags {
		if o.flags&mountFlags[name].ms == 0 {
			continue
		}
		if err := fsconfig(context, unix.FSCONFIG_SET_FLAG, name, ""); err != nil {
			return -1, err
		}
	}
	for _, option := range slices.Concat(identity, []string{"source=" + o.fsName}, o.fuse) {
		command := unix.FSCONFIG_SET_FLAG
		name, value, hasValue := strings.Cut(option, "=")
		if hasValue {
			command = unix.FSCONFIG_SET_STRING
		}
		if err := fsconfig(context, command, name, value); err != nil {
			return -1, err
		}
	}
	if err := fsconfig(context, unix.FSCONFIG_CMD_CREATE, "", ""); err != nil {
		return -1, err
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, int(o.attrs))
	return mount, os.NewSyscallError("fsmount", err)
}

// newControl returns a descriptor of a mount of the file system that controls
// connections.
func newControl() (int, error) {
	context, err := fsopen("fusectl")
	if err != nil {
		return -1, err
	}
	defer unix.Close(context)
	if err := fsconfig(context, unix.FSCONFIG_CMD_CREATE, "", ""); err != nil {
		return -1, err
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
	return mount, os.NewSyscallError("fsmount", err)
}

func fsopen(name string) (int, error) {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	return fd, os.NewSyscallError("fsopen", err)
}

// fsconfig is fsconfig(2), whose errors say what the kernel wrote to the log
// of the context.
func fsconfig(context, command int, name, value string) error {
	var namePointer, valuePointer *byte
	var err error
	if command != unix.FSCONFIG_CMD_CREATE {
		if namePointer, err = unix.BytePtrFromString(name); err != nil {
			return err
		}
	}
	if command == unix.FSCONFIG_SET_STRING {
		if valuePointer, err = unix.BytePtrFromString(value); err != nil {
			return err
		}
	}
	_, _, errno := unix.Syscall6(unix.SYS_FSCONFIG, uintptr(context), uintptr(command),
		uintptr(unsafe.Pointer(namePointer)), uintptr(unsafe.Pointer(valuePointer)), 0, 0)
	if errno == 0 {
		return nil
	}
	err = os.NewSyscallError("fsconfig", errno)
	if value != "" {
		name += "=" + value
	}
	if name != "" {
		err = fmt.Errorf("option %q: %w", name, err)
	}
	if log := contextLog(context); log != "" {
		err = fmt.Errorf("%w: %s", err, log)
	}
	return err
}

// contextLog returns what the kernel says about what failed.
func contextLog(context int) string {
	var lines []string
	buf := make([]byte, 1024)
	for {
		n, err := unix.Read(context, buf)
		if err != nil || n <= 0 {
			return strings.Join(lines, "; ")
		}
		// "e fuse: Unknown parameter 'x'"
		_, text, _ := bytes.Cut(bytes.TrimSpace(buf[:n]), []byte(" "))
		lines = append(lines, string(text))
	}
}

// mountByMount mounts by mount(2).
func mountByMount(_ context.Context, s *Session, mode uint32) (*attachment, error) {
	o := s.config.options()
	for _, option := range o.fuse {
		if strings.Contains(option, ",") {
			return nil, fuseError("mount", s.object(), fmt.Errorf("option %q has a comma, which mount(2) takes for the end: %w", option, errors.ErrUnsupported))
		}
	}
	device, err := s.making(openDevice)
	if err != nil {
		return nil, err
	}
	options := strings.Join(append(identity(device, mode), o.fuse...), ",")
	err = s.place.do(func(int) error {
		err := os.NewSyscallError("mount", unix.Mount(o.fsName, s.config.MountPoint, "fuse", o.flags, options))
		if isErrno(err, unix.EINVAL) {
			err = fmt.Errorf("%w: the kernel does not take the options %q", err, options)
		}
		return failed("mount", s.object(), err)
	})
	if err != nil {
		unix.Close(device)
		return nil, err
	}
	return &attachment{device: device, mount: -1}, nil
}
