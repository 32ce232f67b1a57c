package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
)

// mountFUSE mounts, lets a client look up a name, and unmounts.
func mountFUSE(config fuse.Config) func(*lab) string {
	return func(l *lab) string {
		c := config
		c.MountPoint = l.path("mnt")
		os.Mkdir(c.MountPoint, 0o755)
		s, err := fuse.Mount(context.Background(), &c)
		if err != nil {
			return failure(err)
		}
		serving := make(chan error, 1)
		go func() {
			for r, err := range s.Device().All(context.Background()) {
				if err != nil {
					serving <- err
					return
				}
				serve(r)
			}
			serving <- nil
		}()
		var st unix.Stat_t
		err = unix.Stat(c.MountPoint+"/x", &st)
		closed := s.Close()
		served := <-serving
		switch {
		case err != unix.ENOENT:
			return fmt.Sprintf("the client's error is %v", err)
		case closed != nil:
			unix.Unmount(c.MountPoint, unix.MNT_DETACH)
			return "Close " + failure(closed)
		case served != nil:
			return fmt.Sprintf("the loop ended by %v", served)
		}
		return "works, by " + s.Config().Via.String()
	}
}

// serve answers what a client of an empty file system asks.
func serve(r *fuse.Request) {
	switch r.Header.Opcode {
	case fuse.OpGetattr:
		r.Reply(fusewire.AppendAttr(nil, &fusewire.Attr{Ino: 1, Mode: unix.S_IFDIR | 0o755, Nlink: 2, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}))
	case fuse.OpForget, fuse.OpBatchForget:
		r.Close()
	default:
		r.ReplyErrno(unix.ENOENT)
	}
}

// withHelper mounts by a helper that is a shell script.
func withHelper(script string) func(*lab) string {
	return func(l *lab) string {
		path := l.path("helper")
		must(os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755))
		return mountFUSE(fuse.Config{Via: fuse.ViaHelper, Helper: path})(l)
	}
}

// withClient mounts, lets another process look up a name, hands its request to
// use, and returns what that and the client made of it.
func withClient(use func(l *lab, s *fuse.Session, r *fuse.Request, client *exec.Cmd) error, outcome string) func(*lab) string {
	return func(l *lab) string {
		place := l.path("mnt")
		must(os.Mkdir(place, 0o755))
		s, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: place})
		if err != nil {
			return failure(err)
		}
		defer s.Close()
		client := exec.Command("sh", "-c", "exec cat "+place+"/x 2>/dev/null")
		must(client.Start())
		defer client.Wait()
		for r, err := range s.Device().All(context.Background()) {
			if err != nil {
				return fmt.Sprintf("the loop ended by %v", err)
			}
			if r.Header.Opcode == fuse.OpLookup && strings.TrimRight(string(r.Body), "\x00") == "x" {
				if err := use(l, s, r, client); err != nil {
					return err.Error()
				}
				break
			}
			serve(r)
		}
		return outcome
	}
}

// interrupted waits until the kernel tells that the client of r is gone, which
// takes somebody who reads.
func interrupted(_ *lab, s *fuse.Session, r *fuse.Request, client *exec.Cmd) error {
	ctx, cancel := context.WithCancel(context.Background())
	read := make(chan error, 1)
	go func() {
		for {
			r, err := s.Device().Next(ctx)
			if err != nil {
				read <- err
				return
			}
			serve(r)
		}
	}()
	must(client.Process.Kill())
	<-r.Context().Done()
	cause := context.Cause(r.Context())
	r.ReplyErrno(unix.EINTR)
	cancel()
	if err := <-read; !errors.Is(err, context.Canceled) {
		return fmt.Errorf("the reader ended by %w", err)
	}
	if cause != unix.EINTR {
		return fmt.Errorf("the request's context ended by %w", cause)
	}
	return nil
}

// aborted lets the kernel abort the connection while the client waits.
func aborted(_ *lab, s *fuse.Session, r *fuse.Request, client *exec.Cmd) error {
	must(s.Abort())
	if err := client.Wait(); err == nil {
		return errors.New("the client got an answer")
	}
	if err := r.ReplyErrno(unix.ENOENT); !errors.Is(err, fuse.ErrAborted) {
		return fmt.Errorf("the answer's error is %w", err)
	}
	return nil
}

// stopped lets the server be stopped while the client waits.
func stopped(_ *lab, _ *fuse.Session, r *fuse.Request, client *exec.Cmd) error {
	whileStopped("sleep 0.1")
	if err := r.ReplyErrno(unix.ENOENT); err != nil {
		return err
	}
	if client.Wait(); client.ProcessState.ExitCode() != 1 {
		return fmt.Errorf("the client ended by %v", client.ProcessState)
	}
	return nil
}

// noDevice hides /dev/fuse.
func noDevice(*lab) { must(unix.Mount("nothing", "/dev", "tmpfs", 0, "")) }

// deafDevice lets /dev/fuse be something else.
func deafDevice(*lab) { must(unix.Mount("/dev/null", "/dev/fuse", "", unix.MS_BIND, "")) }

func fuseFaults() []fault {
	const (
		mount  = "fuse.Mount"
		byCall = mount + " by system calls only"
		helped = mount + " by the helper"
		works  = "works, by mount"
	)
	auto, direct := fuse.Config{}, fuse.Config{Via: fuse.ViaMount}
	var list []fault
	add := func(f fault) {
		f.source, f.fuse = "fuse", true
		list = append(list, f)
	}
	for _, errno := range []syscall.Errno{unix.ENOSYS, unix.EPERM} {
		add(fault{
			doing: byCall, fault: "fsopen is refused with " + unix.ErrnoName(errno), outcome: works,
			inject: refused(errno, unix.SYS_FSOPEN), run: mountFUSE(direct),
		})
	}
	add(fault{
		doing: byCall, fault: "fsopen and mount are refused with EPERM", outcome: "fails: mount EPERM, Is fs.ErrPermission",
		inject: refused(unix.EPERM, unix.SYS_FSOPEN, unix.SYS_MOUNT), run: mountFUSE(direct),
	})
	for _, call := range []struct {
		name   string
		number int
	}{{"fsconfig", unix.SYS_FSCONFIG}, {"fsmount", unix.SYS_FSMOUNT}, {"move_mount", unix.SYS_MOVE_MOUNT}} {
		add(fault{
			doing: byCall, fault: call.name + " is refused with EPERM", outcome: works,
			inject: refused(unix.EPERM, call.number), run: mountFUSE(direct),
		})
	}
	add(fault{
		doing: byCall, fault: "statmount and listmount are refused with ENOSYS", outcome: works,
		inject: refused(unix.ENOSYS, unix.SYS_STATMOUNT, unix.SYS_LISTMOUNT), run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "statx is refused with ENOSYS", outcome: "fails: statx ENOSYS, Is errors.ErrUnsupported",
		inject: refused(unix.ENOSYS, unix.SYS_STATX), run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "umount2 is refused with EPERM, and there is no helper", outcome: "Close fails: find helper EPERM, Is fs.ErrPermission, Is exec.ErrNotFound", says: "umount2",
		inject: func(l *lab) {
			must(os.Setenv("PATH", ""))
			refused(unix.EPERM, unix.SYS_UMOUNT2)(l)
		}, run: mountFUSE(direct),
	})
	add(fault{
		doing: mount, fault: "fsopen and mount are refused with EPERM, and there is no helper", outcome: "fails: find helper EPERM, Is fs.ErrPermission, Is exec.ErrNotFound", says: "is fuse3 installed?",
		inject: func(l *lab) {
			must(os.Setenv("PATH", ""))
			refused(unix.EPERM, unix.SYS_FSOPEN, unix.SYS_MOUNT)(l)
		}, run: mountFUSE(auto),
	})
	add(fault{
		doing: mount, fault: "there is no /dev/fuse", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is the kernel module fuse loaded?",
		inject: noDevice, run: mountFUSE(auto),
	})
	add(fault{
		doing: byCall, fault: "/dev/fuse is another device", outcome: "fails: fsconfig EINVAL",
		inject: deafDevice, run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC",
		inject: refused(unix.ENOSPC, unix.SYS_EPOLL_CTL), run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "/proc is not mounted", outcome: works,
		inject: noProc, run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "/proc is read-only", outcome: works,
		inject: readOnlyProc, run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "no_new_privs", outcome: works,
		inject: noNewPrivileges, run: mountFUSE(direct),
	})
	add(fault{
		doing: byCall, fault: "a storm of signals", outcome: works,
		inject: storm, run: repeat(mountFUSE(direct)),
	})
	add(fault{
		doing: helped, fault: "the helper is killed before it mounts", outcome: "fails: helper", says: "signal: killed",
		run: withHelper("kill -KILL $$"),
	})
	add(fault{
		doing: helped, fault: "the helper fails", outcome: "fails: helper", says: "it does not like it",
		run: withHelper("echo 'helper: it does not like it' >&2; exit 1"),
	})
	add(fault{
		doing: helped, fault: "the helper ends without an error, and has not mounted", outcome: "fails: helper", says: "it sent no descriptor",
		run: withHelper("exit 0"),
	})
	add(fault{
		doing: "a request", fault: "the client is killed", outcome: "its context ends by EINTR, and the session goes on",
		run: withClient(interrupted, "its context ends by EINTR, and the session goes on"),
	})
	add(fault{
		doing: "a request", fault: "the connection is aborted", outcome: "the client fails, and Reply Is ErrAborted",
		run: withClient(aborted, "the client fails, and Reply Is ErrAborted"),
	})
	add(fault{
		doing: "a request", fault: "the server is stopped (SIGSTOP), and goes on", outcome: "the client gets its answer",
		run: withClient(stopped, "the client gets its answer"),
	})
	add(fault{
		doing: byCall, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(mountFUSE(direct)),
	})
	add(fault{
		doing: helped, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		run: starving(mountFUSE(fuse.Config{Via: fuse.ViaHelper})),
	})
	return list
}
