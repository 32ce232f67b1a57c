// This file makes the machine look like a small Linux system, and is its first
// process from then on.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/test/kernels/job"
)

const (
	path        = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	consolePort = "/dev/ttyS0" // kernel messages, and the shell
	resultPort  = "/dev/ttyS1" // records and nothing else
)

// system is the second half of the first process: it sets the machine up, runs
// the job and stops the machine.
func system() error {
	if err := setUp(); err != nil {
		return err
	}
	name := filepath.Join(job.Dir, job.File)
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var j job.Job
	if err := json.Unmarshal(text, &j); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if j.Shell {
		err = shell()
	} else {
		err = tests(name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	stop()
	return nil
}

// stop ends the machine: qemu, started with -no-reboot, exits on a restart.
func stop() {
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// tests runs the job in a process of its own. The records of that process go
// through a raw terminal, which changes no byte of them.
func tests(name string) error {
	port, err := os.OpenFile(resultPort, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer port.Close()
	fd := int(port.Fd())
	if err := makeRaw(fd); err != nil {
		return err
	}
	cmd := exec.Command("/init", "run", name)
	cmd.Stdout, cmd.Stderr = port, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	reap(cmd.Process.Pid)
	// Wait until the port has sent everything.
	return os.NewSyscallError("tcdrain", unix.IoctlSetInt(fd, unix.TCSBRK, 1))
}

func makeRaw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return os.NewSyscallError("tcgetattr", err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return os.NewSyscallError("tcsetattr", unix.IoctlSetTermios(fd, unix.TCSETS, t))
}

// reap waits for every process that ends until pid does: the children of
// processes that ended are the first process's.
func reap(pid int) {
	for {
		got, err := unix.Wait4(-1, nil, 0, nil)
		if got == pid || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// shell runs an interactive shell on the console.
func shell() error {
	const applets = "/usr/local/bin"
	if err := os.MkdirAll(applets, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command(job.Busybox, "--install", "-s", applets).CombinedOutput(); err != nil {
		return fmt.Errorf("install busybox: %w: %s", err, out)
	}
	console, err := os.OpenFile(consolePort, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer console.Close()
	cmd := exec.Command(job.Busybox, "sh")
	cmd.Dir = filepath.Join(job.Dir, "src")
	cmd.Env = append(os.Environ(), "HOME=/root", "TERM=linux", "PS1=\\h:\\w# ")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = console, console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	reap(cmd.Process.Pid)
	return nil
}

// setUp makes the machine look like a small Linux system.
func setUp() error {
	unix.Umask(0o022)
	if err := mountAll(); err != nil {
		return err
	}
	if err := loadModules(job.ModulesDir); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"/etc/passwd":    "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n",
		"/etc/group":     "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
		"/etc/hostname":  "kernels\n",
		"/etc/hosts":     "127.0.0.1 localhost kernels\n::1 localhost\n",
		"/etc/fuse.conf": "# Without user_allow_other, as on a new system.\n",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"/etc/mtab":   "/proc/self/mounts",
		"/dev/fd":     "/proc/self/fd",
		"/dev/stdin":  "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	// udev does this elsewhere.
	if err := os.Chmod("/dev/fuse", 0o666); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("kernels")); err != nil {
		return os.NewSyscallError("sethostname", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	// Debian's kernels have a switch for user namespaces of ordinary users.
	const userns = "/proc/sys/kernel/unprivileged_userns_clone"
	if err := os.WriteFile(userns, []byte("1\n"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// What systemd gives to a service.
	limit := syscall.Rlimit{Cur: 1024, Max: 524288}
	return os.NewSyscallError("setrlimit", syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
}

func mountAll() error {
	// systemd makes the root shared; a program that expects private mounts
	// shows itself only on such a system.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return os.NewSyscallError("make / shared", err)
	}
	const secure = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		target, fs string
		flags      uintptr
		data       string
		mode       os.FileMode
	}{
		{"/proc", "proc", secure, "", 0o755},
		{"/sys", "sysfs", secure, "", 0o755},
		{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=755", 0o755},
		{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666", 0o755},
		{"/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", 0o755},
		{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755", 0o755},
		{"/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", 0o755},
		{"/sys/fs/cgroup", "cgroup2", secure, "", 0},
	} {
		if m.mode != 0 {
			if err := os.MkdirAll(m.target, m.mode); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.fs, m.target, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fs, m.target, err)
		}
	}
	for _, dir := range []string{"/root", "/home", "/mnt", "/var/tmp"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return os.Chmod("/var/tmp", 0o777|os.ModeSticky)
}

// loadModules loads every file of dir in the order of the names, which the host
// made the order of the dependencies.
func loadModules(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	sort.Slice(entries, func(a, b int) bool { return entries[a].Name() < entries[b].Name() })
	for _, entry := range entries {
		file, err := os.Open(filepath.Join(dir, entry.Name()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(file.Fd()), "", 0)
		file.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load module %s: %w", entry.Name(), err)
		}
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ifreq, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifreq.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("ioctl SIOCSIFFLAGS", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifreq))
}
