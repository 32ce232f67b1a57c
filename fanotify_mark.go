package kernstream

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Mark asks for events about one object: an inode, a mount or a file system
// (see fanotify_mark(2)). Marks of the same object in one watcher add up.
type Mark struct {
	// Type says what is marked: the file at Path, the mount that it is on, or
	// its whole file system.
	Type MarkType

	// Path is looked up below Dir; nil is the working directory. An empty
	// Path is Dir itself. Neither is used after the call, and Dir stays the
	// caller's.
	//
	// A path through /proc/PID/root marks what a container sees.
	Dir  *os.File
	Path string

	// Ops are the operations to report. Those on directories are only reported
	// with OpOnDir, and those on the entries of a marked directory with
	// OpEventOnChild (entries that are made, removed or renamed always are).
	Ops FileOp

	// Ignore makes it a mark that takes events away instead.
	Ignore IgnoreMode

	Flags MarkFlags // how the mark is made; mostly none
}

// A MarkType is the kind of object that a [Mark] is about.
type MarkType int

const (
	// MarkInode is one file or directory, however it is reached. Any user may
	// set one on what he can read (since Linux 5.13). It stays with the inode
	// when another file is renamed over it. The kernel allows
	// /proc/sys/fs/fanotify/max_user_marks.
	MarkInode MarkType = iota
	// MarkMount is everything that is reached through one mount; the copies
	// that other mount namespaces have of it, and bind mounts, are others. It
	// needs CAP_SYS_ADMIN, and carries no operation on directory entries.
	MarkMount
	// MarkFilesystem is everything in a file system, through whatever mount.
	// It needs CAP_SYS_ADMIN; since Linux 6.16 that of the user namespace that
	// owns the file system will do.
	MarkFilesystem
)

// String returns "inode", "mount" or "filesystem".
func (t MarkType) String() string {
	switch t {
	case MarkInode:
		return "inode"
	case MarkMount:
		return "mount"
	case MarkFilesystem:
		return "filesystem"
	}
	return fmt.Sprintf("MarkType(%d)", int(t))
}

// flags returns the kernel's bits.
func (t MarkType) flags() uint {
	switch t {
	case MarkMount:
		return unix.FAN_MARK_MOUNT
	case MarkFilesystem:
		return unix.FAN_MARK_FILESYSTEM
	}
	return unix.FAN_MARK_INODE
}

// An IgnoreMode is one of the kernel's forms of a mark that takes events away
// that other marks of the watcher ask for.
//
// A form that does not survive a modification ends when the file is written,
// and is not even made, without an error, while somebody has the file open for
// writing: that is the kernel's rule.
type IgnoreMode int

const (
	// NoIgnore asks for events.
	NoIgnore IgnoreMode = iota
	// Ignore is FAN_MARK_IGNORE (Linux 6.0): OpOnDir and OpEventOnChild count
	// as in other marks. It is for inodes that are no directories.
	Ignore
	// IgnoreSurv is FAN_MARK_IGNORE_SURV (Linux 6.0): the same, and it survives
	// modifications.
	IgnoreSurv
	// IgnoredMask is FAN_MARK_IGNORED_MASK: on directories, too, whatever
	// OpOnDir says. It cannot be used on what has an Ignore mark.
	IgnoredMask
	// IgnoredMaskSurvModify is FAN_MARK_IGNORED_MASK with
	// FAN_MARK_IGNORED_SURV_MODIFY: the same, and it survives modifications.
	IgnoredMaskSurvModify
)

// String returns "none", "ignore", "ignore_surv", "ignored_mask" or
// "ignored_mask_surv_modify".
func (m IgnoreMode) String() string {
	switch m {
	case NoIgnore:
		return "none"
	case Ignore:
		return "ignore"
	case IgnoreSurv:
		return "ignore_surv"
	case IgnoredMask:
		return "ignored_mask"
	case IgnoredMaskSurvModify:
		return "ignored_mask_surv_modify"
	}
	return fmt.Sprintf("IgnoreMode(%d)", int(m))
}

func (m IgnoreMode) flags() uint {
	switch m {
	case Ignore:
		return unix.FAN_MARK_IGNORE
	case IgnoreSurv:
		return unix.FAN_MARK_IGNORE_SURV
	case IgnoredMask:
		return unix.FAN_MARK_IGNORED_MASK
	case IgnoredMaskSurvModify:
		return unix.FAN_MARK_IGNORED_MASK | unix.FAN_MARK_IGNORED_SURV_MODIFY
	}
	return 0
}

// MarkFlags say how a [Mark] is made.
type MarkFlags uint

const (
	// MarkEvictable does not keep the inode in memory: the mark may go
	// with it, silently (Linux 5.19). Only for inodes, and not for one that has
	// a mark that is not evictable.
	MarkEvictable MarkFlags = 1 << iota
	// MarkDontFollow marks a symbolic link itself.
	MarkDontFollow
	// MarkOnlyDir refuses what is not a directory.
	MarkOnlyDir
)

// Has tells whether all bits of flags are in f.
func (f MarkFlags) Has(flags MarkFlags) bool { return f&flags == flags }

// String returns the names of the flags with a | between them.
func (f MarkFlags) String() string {
	var names []string
	for _, flag := range []struct {
		flag MarkFlags
		name string
	}{{MarkEvictable, "evictable"}, {MarkDontFollow, "dont_follow"}, {MarkOnlyDir, "onlydir"}} {
		if f.Has(flag.flag) {
			names = append(names, flag.name)
			f &^= flag.flag
		}
	}
	if f != 0 || names == nil {
		names = append(names, fmt.Sprintf("%#x", uint(f)))
	}
	return strings.Join(names, "|")
}

func (f MarkFlags) flags() (flags uint) {
	if f.Has(MarkEvictable) {
		flags |= unix.FAN_MARK_EVICTABLE
	}
	if f.Has(MarkDontFollow) {
		flags |= unix.FAN_MARK_DONT_FOLLOW
	}
	if f.Has(MarkOnlyDir) {
		flags |= unix.FAN_MARK_ONLYDIR
	}
	return flags
}

// name names the mark's object in errors.
func (m *Mark) name() string {
	switch {
	case m.Dir == nil && m.Path == "":
		return "."
	case m.Dir == nil || strings.HasPrefix(m.Path, "/"):
		return m.Path
	case m.Path == "":
		return m.Dir.Name()
	}
	return m.Dir.Name() + "/" + m.Path
}

// errCannot is the reason for a mark that no kernel accepts.
func errCannot(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, unix.EINVAL)...)
}

// check says what is wrong with a type that does not exist: the kernel would take it
// for MarkInode.
func (t MarkType) check() error {
	if t != MarkInode && t.flags() == unix.FAN_MARK_INODE {
		return errCannot("unknown %v", t)
	}
	return nil
}

// checkForm says what is wrong with a mark that is neither to be set nor to be taken
// away.
func (m *Mark) checkForm() error {
	switch {
	case m.Ignore != NoIgnore && m.Ignore.flags() == 0:
		return errCannot("unknown %v", m.Ignore)
	case m.Flags&^(MarkEvictable|MarkDontFollow|MarkOnlyDir) != 0:
		return errCannot("unknown mark flags %v", m.Flags)
	}
	return m.Type.check()
}

// check says what is wrong with a mark that no kernel can set in a watcher with
// options, whatever its object is.
func (m *Mark) check(options *FileOptions) error {
	if err := m.checkForm(); err != nil {
		return err
	}
	only := m.Ops &^ opModifiers
	handles := m.Ops &^ options.Class.ops()
	switch {
	case m.Ops == 0:
		return errCannot("no operation is asked for")
	case only == 0 && m.Ignore == NoIgnore:
		return errCannot("%v alone asks for nothing", m.Ops)
	case m.Ops&OpOverflow != 0:
		return errCannot("%v is reported without being asked for", OpOverflow)
	case m.Ops&opPermission != 0 && !options.Class.asks():
		return errCannot("%v wait for an answer, which a watcher of notifications does not give: see FileOptions.Class", m.Ops&opPermission)
	case m.Ops&opPermission&^options.Class.ops() != 0 && options.Class.asks():
		return errCannot("%v is asked in ClassPreContent alone", m.Ops&opPermission&^options.Class.ops())
	case m.Ops.Has(OpPreAccess | OpOnDir):
		return errCannot("%v is of files with content: it does not go together with %v", OpPreAccess, OpOnDir)
	case m.Ops&(opMntAttach|opMntDetach) != 0:
		return errCannot("%v are of mount namespaces: see WatchMounts", m.Ops&(opMntAttach|opMntDetach))
	case m.Type == MarkMount && m.Ops&opNotMount != 0:
		return errCannot("a mount mark does not carry %v: the kernel reports it for inodes and file systems only", m.Ops&opNotMount)
	case m.Type != MarkFilesystem && m.Ops.Has(OpFSError):
		return errCannot("%v is of the whole file system: it needs a mark of the type filesystem", OpFSError)
	case m.Type != MarkInode && m.Flags.Has(MarkEvictable):
		return errCannot("only an inode mark can be evictable")
	case m.Type != MarkInode && m.Ignore == Ignore:
		return errCannot("a mark of the type %v has nothing that is modified: use IgnoreSurv", m.Type)
	case options.Class.asks() && handles != 0:
		return errCannot("%v come without a descriptor, by which events of class %v are answered: use a watcher of its own", handles, options.Class)
	case options.Descriptors && handles != 0:
		return errCannot("%v come without a descriptor, and Descriptors asks for one with each event", handles)
	}
	return nil
}

// explain adds to an error of fanotify_mark(2) what the kernel does not say.
// Another error it returns as it is.
func (m *Mark) explain(err error, target *markTarget) error {
	errno, ok := err.(unix.Errno)
	if !ok {
		return err
	}
	call := os.NewSyscallError("fanotify_mark", errno)
	switch {
	case err == unix.EPERM && m.Type != MarkInode:
		return fmt.Errorf("%w: a mark of the type %v needs CAP_SYS_ADMIN", call, m.Type)
	case err == unix.EACCES:
		return fmt.Errorf("%w: a mark needs the permission to read the object", call)
	case err == unix.ENOSPC:
		return fmt.Errorf("%w: all marks of the user are taken (%s)", call, sysctlText("fs/fanotify/max_user_marks"))
	case err == unix.EISDIR && m.Ignore == Ignore:
		return fmt.Errorf("%w: on a directory it has to be IgnoreSurv", call)
	case err == unix.EEXIST && m.Flags.Has(MarkEvictable):
		return fmt.Errorf("%w: the inode has a mark that is not evictable", call)
	case err == unix.EEXIST && m.Ignore != NoIgnore:
		return fmt.Errorf("%w: the object has an ignore mark of another form", call)
	case err == unix.ENOTDIR && !target.directory:
		return fmt.Errorf("%w: %v are of directories", call, m.Ops)
	case err == unix.EOPNOTSUPP && m.Ops.Has(OpPreAccess):
		return fmt.Errorf("%w: the file system does not ask before an access: %w", call, errors.ErrUnsupported)
	case err == unix.EINVAL:
		return m.explainInvalid(call)
	}
	return call
}

// explainInvalid names what a kernel may be too old for.
func (m *Mark) explainInvalid(call error) error {
	for _, need := range []struct {
		used         bool
		what         string
		major, minor int
	}{
		{m.Ignore == Ignore || m.Ignore == IgnoreSurv, "FAN_MARK_IGNORE", 6, 0},
		{m.Flags.Has(MarkEvictable), "an evictable mark", 5, 19},
		{m.Ops.Has(OpRename), "rename", 5, 17},
		{m.Ops.Has(OpPreAccess), "pre_access", 6, 14},
		{m.Ops.Has(OpFSError), "fs_error", 5, 16},
	} {
		if need.used && kernelOlder(need.major, need.minor) {
			return fmt.Errorf("%w: %s needs Linux %d.%d: %w", call, need.what, need.major, need.minor, errors.ErrUnsupported)
		}
	}
	known := FileOp(0)
	for op := range opNames {
		known |= op
	}
	if odd := m.Ops &^ known; odd != 0 {
		return fmt.Errorf("%w: this kernel does not know the operations %v: %w", call, odd, errors.ErrUnsupported)
	}
	if asks := m.Ops & opPermission; asks != 0 {
		return fmt.Errorf("%w: the file system does not let anybody wait for %v (as proc), or the kernel was built without CONFIG_FANOTIFY_ACCESS_PERMISSIONS: %w",
			call, asks, errors.ErrUnsupported)
	}
	return call
}

// kernelOlder tells whether the kernel is older than major.minor. It is only
// for the words of an error.
func kernelOlder(major, minor int) bool {
	var u unix.Utsname
	var x, y int
	if unix.Uname(&u) != nil {
		return false
	}
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &x, &y); n != 2 {
		return false
	}
	return x < major || x == major && y < minor
}

// sysctlText says what a setting below /proc/sys is.
func sysctlText(name string) string {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return "/proc/sys/" + name
	}
	return "/proc/sys/" + name + " is " + strings.TrimSpace(string(text))
}

// A markTarget is what there is to know about the object of a mark.
type markTarget struct {
	fd           int // O_PATH
	directory    bool
	path         string // as /proc shows it
	mountID      uint64 // the one that is given to another mount when this one is gone
	fsid         fsID
	unidentified error  // why there is no fsid
	key          string // of the object itself, as in events; "": it has no handle
	handleFlag   int    // for name_to_handle_at
	device       string
	inode        uint64
}

// fsID is the ID of a file system, as in events.
type fsID [8]byte

func newFSID(id [2]int32) (f fsID) {
	binary.NativeEndian.PutUint32(f[:], uint32(id[0]))
	binary.NativeEndian.PutUint32(f[4:], uint32(id[1]))
	return f
}

// newKey returns the key of a file, as fanotify.FID has it.
func newKey(id [2]int32, handleType int32, handle []byte) string {
	fsid := newFSID(id)
	key := append(make([]byte, 0, 16+len(handle)), fsid[:]...)
	key = binary.NativeEndian.AppendUint32(key, uint32(len(handle)))
	key = binary.NativeEndian.AppendUint32(key, uint32(handleType))
	return string(append(key, handle...))
}

// target opens the object of the mark, without a trace: no event, no side
// effect. It may wait for a file system.
func (m *Mark) target() (*markTarget, error) {
	fd, err := m.open()
	if err != nil {
		return nil, err
	}
	t := &markTarget{fd: fd}
	if err := t.look(); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *markTarget) close() { unix.Close(t.fd) }

func (t *markTarget) look() (err error) {
	var st unix.Statx_t
	if err := statx(t.fd, &st); err != nil {
		return err
	}
	// The kernel looks at the mode when it sets the mark, and may ask the file system
	// for that. One that does not answer holds up less if it is asked before. An
	// error is the kernel's to tell.
	var fresh unix.Statx_t
	unix.Statx(t.fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_MODE, &fresh)
	t.directory = st.Mode&unix.S_IFMT == unix.S_IFDIR
	t.mountID, t.inode = st.Mnt_id, st.Ino
	t.device = fmt.Sprintf("%d:%d", st.Dev_major, st.Dev_minor)
	// Not by fileSystems.links, which may be closed meanwhile.
	if t.path, err = readlink(unix.AT_FDCWD, fdLink(t.fd)); err != nil {
		return fmt.Errorf("%w: is /proc mounted?", err)
	}
	var statfs unix.Statfs_t
	if t.unidentified = unix.Fstatfs(t.fd, &statfs); t.unidentified != nil {
		return nil // no handle of it can be told from another's
	}
	t.fsid = newFSID(statfs.Fsid.Val)
	// Some file systems have handles that tell files apart, but cannot be
	// opened (since Linux 6.5).
	for _, flag := range []int{0, handleFID} {
		if key, err := keyOf(t.fd, "", flag); err == nil {
			t.key, t.handleFlag = key, flag
			break
		}
	}
	return nil
}

// object returns what tells the object of a mark from others of its type.
func (t *markTarget) object(typ MarkType) string {
	switch typ {
	case MarkMount:
		return strconv.FormatUint(t.mountID, 10)
	case MarkFilesystem:
		return t.device
	}
	return t.device + " " + strconv.FormatUint(t.inode, 10)
}

// mark calls fanotify_mark(2) for a group and the object of a mark.
func (g *fileGroup) mark(flags uint, ops FileOp, target *markTarget) (err error) {
	cerr := g.file.Control(func(fd int) {
		err = unix.FanotifyMark(fd, flags, uint64(ops), unix.AT_FDCWD, fdLink(target.fd))
	})
	return cmp.Or(cerr, err)
}

// dirFD calls use with the descriptor that Path is relative to.
func (m *Mark) dirFD(use func(fd int) error) error {
	if m.Dir == nil {
		return use(unix.AT_FDCWD)
	}
	conn, err := m.Dir.SyscallConn()
	if err != nil {
		return os.ErrClosed
	}
	if cerr := conn.Control(func(fd uintptr) { err = use(int(fd)) }); cerr != nil {
		return os.ErrClosed
	}
	return err
}

// open opens the object without a trace: no event, no side effect.
func (m *Mark) open() (fd int, err error) {
	flags := unix.O_PATH | unix.O_CLOEXEC
	if m.Flags.Has(MarkDontFollow) {
		flags |= unix.O_NOFOLLOW
	}
	if m.Flags.Has(MarkOnlyDir) {
		flags |= unix.O_DIRECTORY
	}
	err = m.dirFD(func(dir int) error {
		switch {
		case m.Path != "":
			fd, err = unix.Openat(dir, m.Path, flags, 0)
		case m.Dir == nil:
			fd, err = unix.Openat(dir, ".", flags, 0)
		default:
			fd, err = unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 0)
		}
		return os.NewSyscallError("open", err)
	})
	if errors.Is(err, fs.ErrClosed) {
		err = os.ErrClosed
	}
	return fd, err
}

// handleFID is AT_HANDLE_FID of name_to_handle_at(2), since Linux 6.5.
const handleFID = 0x200
