package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// benchSlaves reads the table of a namespace in which every mount is the slave of
// one large peer group. For each of them mountinfo walks through the group, so
// reading it costs the square of its size.
func benchSlaves(b *bench, table *mountTable) error {
	dir, err := table.spare("slaves")
	if err != nil {
		return err
	}
	if err := mountTmpfs(dir); err != nil {
		return err
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	group := filepath.Join(dir, "group")
	if err := errors.Join(os.Mkdir(group, 0o755), mountTmpfs(group), unix.Mount("", group, "", unix.MS_SHARED, "")); err != nil {
		return err
	}
	grown := 0
	for _, n := range []int{b.scale(1000, 50), b.scale(4000, 200)} {
		for ; grown < n; grown++ {
			point := filepath.Join(dir, fmt.Sprint(grown))
			if err := errors.Join(os.Mkdir(point, 0o755), unix.Mount(group, point, "", unix.MS_BIND, "")); err != nil {
				return err
			}
		}
		if err := benchSlavesOf(b, grown); err != nil {
			return err
		}
	}
	return nil
}

func benchSlavesOf(b *bench, n int) error {
	pid, end, err := startSlave()
	if err != nil {
		return err
	}
	defer end()
	o, err := b.interleave(1,
		contender{"kernstream", func(s *sampler) error {
			begin := time.Now()
			w, err := kernstream.WatchMounts(b.ctx, &kernstream.MountOptions{PID: pid})
			if err != nil {
				return err
			}
			e, err := receive(w.C)
			s.addTime(time.Since(begin))
			if err == nil && len(e.Mounted) < n {
				err = fmt.Errorf("%d mounts of more than %d", len(e.Mounted), n)
			}
			return errors.Join(err, w.Close())
		}},
		contender{"raw read", func(s *sampler) error {
			begin := time.Now()
			_, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
			s.addTime(time.Since(begin))
			return err
		}})
	if err != nil {
		return err
	}
	b.tell(o, n, figure{"", "time", "ms", millisecond, median}, nil)
	return nil
}

// startSlave starts a process in a mount namespace that is a slave of this one.
func startSlave() (pid int, end func(), err error) {
	cmd := exec.Command("sh", "-c", "mount --make-rslave / && echo ready && exec sleep 1000")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, nil, err
	}
	wait, err := start(cmd)
	if err != nil {
		return 0, nil, err
	}
	end = func() {
		cmd.Process.Kill()
		wait()
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		end()
		return 0, nil, fmt.Errorf("the process in the slave namespace said %q: %w", line, err)
	}
	return cmd.Process.Pid, end, nil
}
