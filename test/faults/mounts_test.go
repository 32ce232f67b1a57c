package faults

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// watchMounts follows the mount table, and sees a mount come and go.
func watchMounts(options func(*lab) *kernstream.MountOptions) func(*lab) string {
	return func(l *lab) string {
		place := l.path("place")
		os.Mkdir(place, 0o755)
		w, err := watch(l, func() (*kernstream.MountWatcher, error) {
			return kernstream.WatchMounts(context.Background(), options(l))
		})
		if err != nil {
			return failure(err)
		}
		defer w.Close()
		var via kernstream.MountVia
		ids := ""
		isPlace := func(m kernstream.Mount) bool {
			if m.MountPoint == place && m.ID == 0 && testenv.KernelAtLeast(6, 8) {
				ids = ", without unique IDs"
			}
			return m.MountPoint == place
		}
		until := func(list func(*kernstream.MountEvent) []kernstream.Mount) error {
			for e := range w.C {
				if via = e.Via; slices.ContainsFunc(list(e), isPlace) {
					return nil
				}
			}
			return fmt.Errorf("the stream ended: %w", w.Err())
		}
		must(unix.Mount("fault", place, "ramfs", 0, ""))
		if err := until(func(e *kernstream.MountEvent) []kernstream.Mount { return e.Mounted }); err != nil {
			return failure(err)
		}
		must(unix.Unmount(place, 0))
		if err := until(func(e *kernstream.MountEvent) []kernstream.Mount { return e.Unmounted }); err != nil {
			return failure(err)
		}
		return "works, by " + via.String() + ids
	}
}

func mountDefaults(*lab) *kernstream.MountOptions { return nil }

func mountsBy(via kernstream.MountVia) func(*lab) *kernstream.MountOptions {
	return func(*lab) *kernstream.MountOptions { return &kernstream.MountOptions{Via: via} }
}

// mountsOfVictim are those of a process, which has the same namespace.
func mountsOfVictim(l *lab) *kernstream.MountOptions {
	return &kernstream.MountOptions{PID: l.victim.Process.Pid, Via: kernstream.ViaMountinfo}
}

// mountsOfNamespace are those of the namespace file that openNamespace opened.
func mountsOfNamespace(l *lab) *kernstream.MountOptions {
	return &kernstream.MountOptions{Namespace: l.file}
}

func openNamespace(l *lab) {
	var err error
	l.file, err = os.Open("/proc/self/ns/mnt")
	must(err)
}

// listMounts reads the mount table once.
func listMounts(l *lab) string { return listMountsOf(mountDefaults)(l) }

func listMountsOf(options func(*lab) *kernstream.MountOptions) func(*lab) string {
	return func(l *lab) string {
		mounts, err := kernstream.Mounts(options(l))
		if err != nil {
			return failure(err)
		}
		i := slices.IndexFunc(mounts, func(m kernstream.Mount) bool { return m.FSSource == "lab" })
		switch {
		case i < 0:
			return fmt.Sprintf("works, but the mount is missing among %d", len(mounts))
		case mounts[i].ID == 0 && testenv.KernelAtLeast(6, 8):
			return "works, without unique IDs"
		}
		return "works"
	}
}

// mountsStarved sees a mount change when there is room for no descriptor.
func mountsStarved(via kernstream.MountVia) func(*lab) string {
	return func(l *lab) string {
		place := l.path("place")
		must(os.Mkdir(place, 0o755))
		w, err := watch(l, func() (*kernstream.MountWatcher, error) {
			return kernstream.WatchMounts(context.Background(), &kernstream.MountOptions{Via: via})
		})
		if err != nil {
			return failure(err)
		}
		defer w.Close()
		<-w.C
		l.starve(0)
		must(unix.Mount("fault", place, "ramfs", 0, ""))
		must(unix.Mount("", place, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOEXEC, ""))
		w.Rescan()
		for e := range w.C {
			for _, m := range append(e.Mounted, changedTo(e)...) {
				if m.MountPoint == place && strings.Contains(m.Options, "noexec") {
					must(unix.Unmount(place, 0))
					return "works, by " + e.Via.String()
				}
			}
		}
		return "the stream ended: " + failure(w.Err())
	}
}

// changedTo returns what mounts have become that have changed.
func changedTo(e *kernstream.MountEvent) (mounts []kernstream.Mount) {
	for i := range e.Changed {
		mounts = append(mounts, e.Changed[i].New)
	}
	return mounts
}

// endsWithVictim follows the table of a process until that is killed.
func endsWithVictim(l *lab) string {
	w, err := kernstream.WatchMounts(context.Background(), mountsOfVictim(l))
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	<-w.C
	must(l.victim.Process.Kill())
	for range w.C {
	}
	l.reap()
	if err := w.Err(); err != nil {
		return failure(err)
	}
	return "ends, with a nil Err"
}

// mountsWhileStopped is stopped while mounts come and go.
func mountsWhileStopped(l *lab) string {
	w, err := kernstream.WatchMounts(context.Background(), nil)
	if err != nil {
		return failure(err)
	}
	defer w.Close()
	<-w.C
	script := ""
	const n = 5
	for i := range n {
		must(os.Mkdir(l.path(fmt.Sprint(i)), 0o755))
		script += fmt.Sprintf("mount -t tmpfs stopped %s; ", l.path(fmt.Sprint(i)))
	}
	whileStopped(strings.TrimSuffix(script, "; "))
	for seen := 0; seen < n; {
		e, ok := <-w.C
		if !ok {
			return failure(w.Err())
		}
		for i := range e.Mounted {
			if e.Mounted[i].FSSource == "stopped" {
				seen++
			}
		}
	}
	return "works, nothing is lost"
}

func mountFaults() []fault {
	const (
		watch  = "WatchMounts"
		ofFile = "WatchMounts of a namespace file"
		ofPID  = "WatchMounts of a PID by mountinfo"
	)
	byMountinfo := "works, by mountinfo"
	var list []fault
	add := func(f fault) {
		f.source = "mount"
		list = append(list, f)
	}
	for _, call := range []struct {
		name   string
		number int
	}{{"fanotify_init", unix.SYS_FANOTIFY_INIT}, {"fanotify_mark", unix.SYS_FANOTIFY_MARK}} {
		for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
			add(fault{
				doing: watch, fault: call.name + " is refused with " + unix.ErrnoName(errno), outcome: byMountinfo,
				inject: refused(errno, call.number), run: watchMounts(mountDefaults),
			})
		}
	}
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
		add(fault{
			doing: watch, fault: "statmount is refused with " + unix.ErrnoName(errno), outcome: byMountinfo + ", without unique IDs", kernel: [2]int{6, 8},
			inject: refused(errno, unix.SYS_STATMOUNT), run: watchMounts(mountDefaults),
		})
		add(fault{
			doing: watch, fault: "listmount is refused with " + unix.ErrnoName(errno), outcome: byMountinfo + ", without unique IDs", kernel: [2]int{6, 8},
			inject: refused(errno, unix.SYS_LISTMOUNT), run: watchMounts(mountDefaults),
		})
	}
	add(fault{
		doing: watch, fault: "fanotify_init has no memory (ENOMEM)", outcome: byMountinfo,
		inject: refused(unix.ENOMEM, unix.SYS_FANOTIFY_INIT), run: watchMounts(mountDefaults),
	})
	add(fault{
		doing: watch, fault: "the user has no fanotify group left (max_fanotify_groups)", outcome: byMountinfo, user: true,
		inject: limited("max_fanotify_groups", 0), run: watchMounts(mountDefaults),
	})
	add(fault{
		doing: watch + " by fanotify only", fault: "the user has no fanotify group left (max_fanotify_groups)", outcome: "fails: fanotify_init EMFILE", says: "max_user_groups", kernel: [2]int{6, 16}, user: true,
		inject: limited("max_fanotify_groups", 0), run: watchMounts(mountsBy(kernstream.ViaFanotify)),
	})
	add(fault{
		doing: watch, fault: "no place in epoll (ENOSPC)", outcome: "fails: epoll_ctl ENOSPC", says: "max_user_watches",
		inject: refused(unix.ENOSPC, unix.SYS_EPOLL_CTL), run: watchMounts(mountDefaults),
	})
	add(fault{
		doing: watch + " by fanotify only", fault: "statmount is refused with ENOSYS", outcome: "fails: statmount ENOSYS, Is errors.ErrUnsupported", kernel: [2]int{6, 15}, root: true,
		inject: refused(unix.ENOSYS, unix.SYS_STATMOUNT), run: watchMounts(mountsBy(kernstream.ViaFanotify)),
	})
	add(fault{
		doing: watch, fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: noProc, run: watchMounts(mountDefaults),
	})
	add(fault{
		doing: "Mounts", fault: "/proc is not mounted", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: noProc, run: listMounts,
	})
	add(fault{
		doing: watch + " by mountinfo", fault: "/proc is read-only", outcome: byMountinfo,
		inject: readOnlyProc, run: watchMounts(mountsBy(kernstream.ViaMountinfo)),
	})
	add(fault{
		doing: watch, fault: "chroot into a directory without /proc", outcome: "fails: open ENOENT, Is fs.ErrNotExist", says: "is /proc mounted?",
		inject: jailed, run: watchMounts(mountDefaults),
	})
	add(fault{
		doing: watch + " by mountinfo", fault: "chroot into a directory with /proc", outcome: byMountinfo,
		inject: jailedWithProc, run: watchMounts(mountsBy(kernstream.ViaMountinfo)),
	})
	add(fault{
		doing: watch + " by mountinfo", fault: "no_new_privs", outcome: byMountinfo,
		inject: noNewPrivileges, run: watchMounts(mountsBy(kernstream.ViaMountinfo)),
	})
	add(fault{
		doing: "Mounts", fault: "listmount is refused with ENOSYS", outcome: "works, without unique IDs", kernel: [2]int{6, 8},
		inject: refused(unix.ENOSYS, unix.SYS_LISTMOUNT), run: listMounts,
	})
	for _, errno := range []syscall.Errno{unix.EPERM, unix.ENOSYS} {
		add(fault{
			doing: ofPID, fault: "pidfd_open is refused with " + unix.ErrnoName(errno), outcome: byMountinfo,
			prepare: startVictim, inject: refused(errno, unix.SYS_PIDFD_OPEN), run: thenReap(watchMounts(mountsOfVictim)),
		})
	}
	add(fault{
		doing: ofPID, fault: "pidfd_open finds no descriptor (ENFILE)", outcome: "fails: pidfd_open ENFILE",
		prepare: startVictim, inject: refused(unix.ENFILE, unix.SYS_PIDFD_OPEN), run: thenReap(watchMounts(mountsOfVictim)),
	})
	add(fault{
		doing: ofPID, fault: "the process is killed", outcome: "ends, with a nil Err",
		prepare: startVictim, run: endsWithVictim,
	})
	add(fault{
		doing: ofFile, fault: "setns is refused with EPERM", outcome: "fails: setns EPERM, Is fs.ErrPermission", says: "CAP_SYS_ADMIN",
		prepare: openNamespace, inject: refused(unix.EPERM, unix.SYS_SETNS), run: watchMounts(mountsOfNamespace),
	})
	add(fault{
		doing: ofFile, fault: "the ioctl NS_GET_NSTYPE is refused with EPERM", outcome: "fails: ioctl EPERM, Is fs.ErrPermission",
		prepare: openNamespace, inject: refusedIoctl(unix.EPERM, unix.NS_GET_NSTYPE), run: watchMounts(mountsOfNamespace),
	})
	add(fault{
		doing: watch, fault: "the process is stopped (SIGSTOP) while mounts come, and goes on", outcome: "works, nothing is lost",
		run: mountsWhileStopped,
	})
	add(fault{
		doing: watch + " by mountinfo", fault: "a storm of signals", outcome: byMountinfo,
		inject: storm, run: repeat(watchMounts(mountsBy(kernstream.ViaMountinfo))),
	})
	add(fault{
		doing: watch, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(watchMounts(mountDefaults)),
	})
	add(fault{
		doing: watch + " by mountinfo", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(watchMounts(mountsBy(kernstream.ViaMountinfo))),
	})
	add(fault{
		doing: ofPID, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		prepare: startVictim, run: thenReap(starving(watchMounts(mountsOfVictim))),
	})
	add(fault{
		doing: ofFile, fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		prepare: openNamespace, run: starving(watchMounts(mountsOfNamespace)),
	})
	add(fault{
		doing: "Mounts", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		run: starving(listMounts),
	})
	add(fault{
		doing: "Mounts of a PID", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room",
		prepare: startVictim, run: thenReap(starving(listMountsOf(mountsOfVictim))),
	})
	add(fault{
		doing: "Mounts of a namespace file", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		prepare: openNamespace, run: starving(listMountsOf(mountsOfNamespace)),
	})
	add(fault{
		doing: watch + " of a PID", fault: "descriptors run out at each call that opens one", outcome: "fails: EMFILE, until there is room", root: true,
		prepare: startVictim, run: thenReap(starving(watchMounts(func(l *lab) *kernstream.MountOptions {
			return &kernstream.MountOptions{PID: l.victim.Process.Pid}
		}))),
	})
	for _, errno := range []syscall.Errno{unix.ENFILE, unix.ENOMEM} {
		add(fault{
			doing: watch, fault: "epoll_create1 is refused with " + unix.ErrnoName(errno), outcome: byMountinfo,
			inject: refused(errno, unix.SYS_EPOLL_CREATE1), run: watchMounts(mountDefaults),
		})
	}
	add(fault{
		doing: watch + " by mountinfo", fault: "descriptors run out before a mount changes", outcome: byMountinfo,
		run: mountsStarved(kernstream.ViaMountinfo),
	})
	add(fault{
		doing: watch + " by fanotify only", fault: "descriptors run out before a mount changes", outcome: "works, by fanotify", kernel: [2]int{6, 15}, root: true,
		run: mountsStarved(kernstream.ViaFanotify),
	})
	return list
}

// thenReap ends the victim after the scenario.
func thenReap(run func(*lab) string) func(*lab) string {
	return func(l *lab) string {
		defer l.reap()
		defer l.kill()
		return run(l)
	}
}

// repeat runs a scenario some times, as long as it works.
func repeat(run func(*lab) string) func(*lab) string {
	return func(l *lab) (outcome string) {
		for range 20 {
			if outcome = run(l); len(outcome) < 5 || outcome[:5] != "works" {
				break
			}
		}
		return outcome
	}
}
