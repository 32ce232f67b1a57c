package kernstream

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
)

// A group that was made elsewhere, by systemd say, or by a parent with more
// privileges.

// adoptGroup returns a group for the same description as file's, which stays
// the caller's. blocking tells whether it was one on which read(2) blocks.
func adoptGroup(file *os.File, options *FileOptions) (g *fileGroup, blocking bool, err error) {
	conn, err := file.SyscallConn()
	if err != nil {
		return nil, false, fileError("adopt", file.Name(), os.ErrClosed)
	}
	fd, mode := -1, 0
	var flags uint
	cerr := conn.Control(func(own uintptr) {
		if flags, err = groupFlags(int(own), options); err != nil {
			return
		}
		if mode, err = unix.FcntlInt(own, unix.F_GETFL, 0); err == nil {
			fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0)
		}
		err = os.NewSyscallError("fcntl", err)
	})
	if cerr != nil {
		err = os.ErrClosed
	}
	if err != nil {
		return nil, false, fileError("adopt", file.Name(), err)
	}
	blocking = mode&unix.O_NONBLOCK == 0
	g, err = newFileGroup(fd, flags, options)
	if err != nil {
		if blocking {
			conn.Control(func(own uintptr) { unix.SetNonblock(int(own), false) })
		}
		return nil, false, err
	}
	return g, blocking, nil
}

// groupFlags returns the flags that a group was made with, from its fdinfo
// (proc_pid_fdinfo(5)), if they go together with the options.
func groupFlags(fd int, options *FileOptions) (uint, error) {
	lines, err := groupLines(fd)
	if err != nil {
		return 0, err
	}
	for _, line := range lines {
		var flags, eventFlags uint
		if n, _ := fmt.Sscanf(line, "fanotify flags:%x event-flags:%x", &flags, &eventFlags); n != 2 {
			continue
		}
		switch {
		case classOf(flags) != options.Class && classOf(flags).asks():
			return 0, errCannot("the events of the group wait for an answer: Class must be %v", classOf(flags))
		case classOf(flags) != options.Class:
			return 0, errCannot("the group is of class %v", classOf(flags))
		case options.Class.asks() && flags&unix.FAN_UNLIMITED_QUEUE == 0 && !options.Default.Allow:
			return 0, errCannot("the kernel allows what the queue of the group has no room for, and Default denies: it needs FAN_UNLIMITED_QUEUE")
		case options.Audit && flags&unix.FAN_ENABLE_AUDIT == 0:
			return 0, errCannot("the group was made without FAN_ENABLE_AUDIT, and Audit asks for it")
		case flags&unix.FAN_REPORT_MNT != 0:
			return 0, errCannot("a group of mount namespaces: see WatchMounts")
		}
		return flags, nil
	}
	return 0, errCannot("not a fanotify group")
}

func groupLines(fd int) ([]string, error) {
	text, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: is /proc mounted?", err)
	}
	return strings.Split(string(text), "\n"), err
}

// adoptMarks makes sure that events of the marks that an adopted group has can
// be resolved, as far as this mount namespace shows their file systems.
func (w *fileWatch) adoptMarks(g *fileGroup) error {
	if g.via != ViaHandle {
		return nil
	}
	devices, mounts := map[[2]uint32]bool{}, map[uint32]bool{}
	var lines []string
	var err error
	if cerr := g.file.Control(func(fd int) { lines, err = groupLines(fd) }); cerr != nil {
		return cerr
	}
	if err != nil {
		return fileError("adopt", "", err)
	}
	for _, line := range lines {
		for field := range strings.FieldsSeq(line) {
			var n uint32
			if _, err := fmt.Sscanf(field, "sdev:%x", &n); err == nil {
				devices[[2]uint32{n >> 20, n & (1<<20 - 1)}] = true
			}
			if _, err := fmt.Sscanf(field, "mnt_id:%x", &n); err == nil {
				mounts[n] = true
			}
		}
	}
	if len(devices)+len(mounts) == 0 {
		return nil
	}
	var points []string
	err = eachMount(func(row *procfs.MountInfo) bool {
		device := [2]uint32{row.Major, row.Minor}
		if mounts[row.ID] || devices[device] && row.Root == "/" {
			points = append(points, row.MountPoint)
			delete(devices, device)
		}
		return true
	})
	if err != nil {
		return fileError("adopt", "", err)
	}
	for _, point := range points {
		m := Mark{Type: MarkFilesystem, Path: point}
		target, err := m.target()
		if err != nil {
			continue // its events come without a path
		}
		w.systems.enter(target) // for good: these marks are not known one by one
		target.close()
	}
	return nil
}
