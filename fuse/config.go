package fuse

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Via is a way to mount.
type Via int

const (
	ViaAuto   Via = iota // mount it oneself, or by fusermount3 if that is not permitted
	ViaMount             // mount it oneself: fsopen(2) and so on, or mount(2)
	ViaHelper            // let fusermount3 do it, which every user may run
)

// String returns "auto", "mount" or "helper".
func (v Via) String() string {
	switch v {
	case ViaAuto:
		return "auto"
	case ViaMount:
		return "mount"
	case ViaHelper:
		return "helper"
	}
	return "unknown"
}

// Config says what to mount, where and how. Only MountPoint must be set.
type Config struct {
	// MountPoint is the directory or regular file to mount on. The root of the
	// file system is of the same type.
	MountPoint string

	// PID is a process in whose mount namespace to mount; 0 is the own one.
	// MountPoint is then an absolute path from the root of that namespace. It
	// needs CAP_SYS_ADMIN over the namespace and CAP_SYS_CHROOT (see
	// setns(2)). The session does not keep the namespace alive.
	PID int

	// Namespace is an open /proc/PID/ns/mnt to mount in, or a file that one was
	// bound to. It stays the caller's, and may be closed when Mount returns; the
	// session keeps the namespace alive until [Session.Close]. PID must be 0.
	Namespace *os.File `json:"-"`

	FSName  string // the source in the mount table; "" is "kernstream"
	Subtype string // makes the type in the mount table "fuse.SUBTYPE"

	ReadOnly bool // nobody may write

	// AllowOther lets other users use the file system than the one who mounts
	// it: not even root may otherwise. An ordinary user may ask for it if
	// /etc/fuse.conf has user_allow_other, or in a user namespace.
	AllowOther bool

	// NoDefaultPermissions leaves all decisions about who may do what to the
	// server. Otherwise the kernel compares the caller with owner, group and mode
	// of the file.
	NoDefaultPermissions bool

	// Options are further mount options, as after -o of mount(8): of every file
	// system (noexec, sync, dirsync, atime, ...) and of FUSE (max_read=N, ...;
	// see mount.fuse3(8)). nosuid, nodev and noatime hold unless suid, dev or
	// atime (or relatime, strictatime) is among them.
	Options []string

	// Via asks for one way to mount. AutoUnmount needs ViaHelper, and means it.
	Via Via

	// Helper is the program that mounts for ordinary users; "" is fusermount3
	// of the PATH, or fusermount.
	Helper string

	// AutoUnmount leaves a helper behind that unmounts when this process dies.
	// It looks after this process only, and before version 3.15 the file system
	// of an ordinary user stays mounted, dead, unless AllowOther is set.
	AutoUnmount bool

	// What the kernel is asked for at the start (see [State]).

	InitFlags           InitFlags // 0 is DefaultInitFlags; what the kernel does not have is left out
	MaxWrite            uint32    // the most bytes in one WRITE; 0 is 1 MiB
	MaxReadahead        uint32    // the most bytes to read ahead; 0 is what the kernel offers
	MaxBackground       uint16    // how many requests the kernel has under way that nobody waits for; 0 is the kernel's default
	CongestionThreshold uint16    // at how many the kernel takes the file system for congested; 0 is three quarters of that
	TimeGran            uint32    // granularity of times in nanoseconds, a power of ten; 0 is 1
	RequestTimeout      uint16    // after how many seconds without an answer the kernel aborts the connection (Linux 6.18); 0 is never

	// ServePoll passes POLL requests on to the server. Mount does then not
	// protect the process from itself: if it opens a file of this file system
	// with os.Open, the Go runtime's poller asks the server whether the file is
	// ready while no goroutine can be woken, and the process hangs for ever.
	// Files must be opened by others only, or with unix.Open.
	ServePoll bool
}

const (
	defaultFSName   = "kernstream"
	defaultMaxWrite = 1 << 20
	minMaxWrite     = 4096
)

// own are the options that are set through a field of Config, or by Mount.
var own = map[string]string{
	"fd": "", "rootmode": "", "user_id": "", "group_id": "",
	"fsname": "FSName", "source": "FSName", "subtype": "Subtype",
	"ro": "ReadOnly", "rw": "ReadOnly", "allow_other": "AllowOther", "allow_root": "AllowOther",
	"default_permissions": "NoDefaultPermissions", "auto_unmount": "AutoUnmount",
	"blkdev": "",
}

// Check tells what is wrong with the configuration, without mounting anything.
// It looks at the mount point, too. The error names the field; that about the
// mount point Is fs.ErrNotExist, unix.ENOTDIR and so on.
func (c *Config) Check() error {
	if err := c.checkFields(); err != nil {
		return fuseError("check", c.MountPoint, err)
	}
	place, err := newPlace(c)
	if err != nil {
		return err
	}
	defer place.close()
	return place.do(func(int) error {
		_, _, err := c.findMountPoint()
		return err
	})
}

func (c *Config) checkFields() error {
	switch {
	case c.MountPoint == "":
		return fmt.Errorf("MountPoint is not set: %w", unix.EINVAL)
	case c.PID != 0 && c.Namespace != nil:
		return fmt.Errorf("PID and Namespace are both set: %w", unix.EINVAL)
	case c.PID < 0:
		return fmt.Errorf("PID %d: %w", c.PID, unix.EINVAL)
	case (c.PID != 0 || c.Namespace != nil) && !filepath.IsAbs(c.MountPoint):
		return fmt.Errorf("MountPoint must be an absolute path in another namespace: %w", unix.EINVAL)
	case c.Via < ViaAuto || c.Via > ViaHelper:
		return fmt.Errorf("unknown Via %d: %w", c.Via, unix.EINVAL)
	case c.AutoUnmount && c.Via == ViaMount:
		return fmt.Errorf("AutoUnmount needs the helper, but Via is ViaMount: %w", unix.EINVAL)
	case c.MaxWrite != 0 && c.MaxWrite < minMaxWrite:
		return fmt.Errorf("MaxWrite %d is less than %d: %w", c.MaxWrite, minMaxWrite, unix.EINVAL)
	case c.InitFlags&^passedOn != 0:
		return fmt.Errorf("InitFlags %v: this needs more of a server than requests and answers: %w", c.InitFlags&^passedOn, errors.ErrUnsupported)
	case c.TimeGran != 0 && !powerOfTen(c.TimeGran):
		return fmt.Errorf("TimeGran %d is not a power of ten up to one second: %w", c.TimeGran, unix.EINVAL)
	}
	for _, text := range append([]string{c.MountPoint, c.FSName, c.Subtype}, c.Options...) {
		if strings.Contains(text, "\x00") {
			return fmt.Errorf("%q has a zero byte: %w", text, unix.EINVAL)
		}
	}
	for _, option := range c.Options {
		name, _, _ := strings.Cut(option, "=")
		field, taken := own[name]
		switch {
		case name == "":
			return fmt.Errorf("option %q has no name: %w", option, unix.EINVAL)
		case taken && field == "":
			return fmt.Errorf("option %q is set by Mount itself: %w", option, unix.EINVAL)
		case taken:
			return fmt.Errorf("option %q is set by the field %s: %w", option, field, unix.EINVAL)
		}
	}
	return nil
}

func powerOfTen(n uint32) bool {
	for p := uint32(1); p <= 1_000_000_000; p *= 10 {
		if n == p {
			return true
		}
		if p == 1_000_000_000 {
			break
		}
	}
	return false
}

// findMountPoint returns the path of the mount point without symbolic links,
// and its type as in stat(2). It is called in the namespace to mount in.
func (c *Config) findMountPoint() (path string, mode uint32, err error) {
	path, err = filepath.Abs(c.MountPoint)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	var st unix.Stat_t
	if err == nil {
		err = os.NewSyscallError("stat", unix.Stat(path, &st))
	}
	if err != nil {
		if cause, ok := errors.AsType[*fs.PathError](err); ok {
			err = os.NewSyscallError(cause.Op, cause.Err)
		}
		if errors.Is(err, unix.ENOTCONN) {
			err = fmt.Errorf("%w: a FUSE file system without a server is mounted there, unmount it first", err)
		}
		return "", 0, failed("check", c.MountPoint, err)
	}
	switch mode = st.Mode & unix.S_IFMT; mode {
	case unix.S_IFDIR, unix.S_IFREG:
		return path, mode, nil
	}
	return "", 0, fuseError("check", path, fmt.Errorf("neither a directory nor a regular file: %w", unix.ENOTDIR))
}

// findHelper returns the program that mounts for ordinary users. It is called
// in the namespace to mount in.
func (c *Config) findHelper() (string, error) {
	if c.Helper != "" {
		path, err := exec.LookPath(c.Helper)
		if err != nil {
			return "", fuseError("find helper", c.Helper, err)
		}
		return path, nil
	}
	var err error
	for _, name := range []string{"fusermount3", "fusermount"} {
		path, lookErr := exec.LookPath(name)
		if lookErr == nil {
			return path, nil
		}
		if err == nil {
			err = lookErr
		}
	}
	return "", fuseError("find helper", "fusermount3", fmt.Errorf("%w: is fuse3 installed?", err))
}

// mountFlag is an option of every file system.
type mountFlag struct {
	ms    uintptr // of mount(2)
	attr  uintptr // of fsmount(2); an option without one is the superblock's
	clear bool    // turns the flag off
}

// Attributes of fsmount(2).
const (
	attrRdonly      = 0x00000001
	attrNosuid      = 0x00000002
	attrNodev       = 0x00000004
	attrNoexec      = 0x00000008
	attrNoatime     = 0x00000010
	attrStrictatime = 0x00000020
	attrNodiratime  = 0x00000080
	attrNosymfollow = 0x00200000
)

const anyAtime = unix.MS_NOATIME | unix.MS_RELATIME | unix.MS_STRICTATIME

var mountFlags = map[string]mountFlag{
	"ro":          {ms: unix.MS_RDONLY, attr: attrRdonly},
	"suid":        {ms: unix.MS_NOSUID, attr: attrNosuid, clear: true},
	"nosuid":      {ms: unix.MS_NOSUID, attr: attrNosuid},
	"dev":         {ms: unix.MS_NODEV, attr: attrNodev, clear: true},
	"nodev":       {ms: unix.MS_NODEV, attr: attrNodev},
	"exec":        {ms: unix.MS_NOEXEC, attr: attrNoexec, clear: true},
	"noexec":      {ms: unix.MS_NOEXEC, attr: attrNoexec},
	"atime":       {ms: unix.MS_NOATIME, attr: attrNoatime, clear: true},
	"noatime":     {ms: unix.MS_NOATIME, attr: attrNoatime},
	"relatime":    {ms: unix.MS_RELATIME},
	"strictatime": {ms: unix.MS_STRICTATIME, attr: attrStrictatime},
	"diratime":    {ms: unix.MS_NODIRATIME, attr: attrNodiratime, clear: true},
	"nodiratime":  {ms: unix.MS_NODIRATIME, attr: attrNodiratime},
	"symfollow":   {ms: unix.MS_NOSYMFOLLOW, attr: attrNosymfollow, clear: true},
	"nosymfollow": {ms: unix.MS_NOSYMFOLLOW, attr: attrNosymfollow},
	"sync":        {ms: unix.MS_SYNCHRONOUS},
	"async":       {ms: unix.MS_SYNCHRONOUS, clear: true},
	"dirsync":     {ms: unix.MS_DIRSYNC},
	"lazytime":    {ms: unix.MS_LAZYTIME},
	"nolazytime":  {ms: unix.MS_LAZYTIME, clear: true},
}

// superFlags are those of mountFlags that fsconfig(2) takes.
var superFlags = []string{"ro", "sync", "dirsync", "lazytime"}

// mountOptions are what a Config comes to, apart from where.
type mountOptions struct {
	flags  uintptr  // of mount(2)
	attrs  uintptr  // of fsmount(2)
	fsName string   //
	fuse   []string // options of FUSE itself
	words  []string // all of them as the helper takes them
}

// options returns what is to be mounted. mode is the type of the mount point,
// as in stat(2).
func (c *Config) options() *mountOptions {
	o := &mountOptions{fsName: c.FSName}
	if o.fsName == "" {
		o.fsName = defaultFSName
	}
	words := []string{"nosuid", "nodev", "noatime"}
	if c.ReadOnly {
		words = append(words, "ro")
	}
	for _, option := range append(words, c.Options...) {
		if flag, ok := mountFlags[option]; ok {
			o.set(flag)
		} else {
			o.fuse = append(o.fuse, option)
		}
	}
	if c.Subtype != "" {
		o.fuse = append(o.fuse, "subtype="+c.Subtype)
	}
	if c.AllowOther {
		o.fuse = append(o.fuse, "allow_other")
	}
	if !c.NoDefaultPermissions {
		o.fuse = append(o.fuse, "default_permissions")
	}
	o.words = o.helperWords(c)
	return o
}

func (o *mountOptions) set(f mountFlag) {
	if f.ms&anyAtime != 0 {
		// There is one of them at a time.
		o.flags &^= anyAtime
		o.attrs &^= attrNoatime | attrStrictatime
	}
	if f.clear {
		o.flags &^= f.ms
		o.attrs &^= f.attr
		return
	}
	o.flags |= f.ms
	o.attrs |= f.attr
}

// helperWords returns the options for fusermount3, which has nosuid and nodev
// set for ordinary users, and does not know all the others by their names.
func (o *mountOptions) helperWords(c *Config) []string {
	words := []string{"fsname=" + o.fsName}
	for _, name := range []string{"ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow", "strictatime", "sync", "dirsync", "lazytime"} {
		if f := mountFlags[name]; o.flags&f.ms != 0 {
			words = append(words, name)
		}
	}
	// What is off by default needs a word only where it is on otherwise.
	for _, name := range []string{"suid", "dev"} {
		if slices.Contains(c.Options, name) {
			words = append(words, name)
		}
	}
	words = append(words, o.fuse...)
	if c.AutoUnmount {
		words = append(words, "auto_unmount")
	}
	return words
}

// escaped joins words with commas, for fusermount3, which takes a backslash for
// an escape.
func escaped(words []string) string {
	escape := strings.NewReplacer(`\`, `\\`, `,`, `\,`)
	list := make([]string, len(words))
	for i, word := range words {
		list[i] = escape.Replace(word)
	}
	return strings.Join(list, ",")
}

// identity returns the options that say who mounts what type of root by which
// descriptor.
func identity(fd int, mode uint32) []string {
	return []string{
		"fd=" + strconv.Itoa(fd),
		"rootmode=" + strconv.FormatUint(uint64(mode), 8),
		"user_id=" + strconv.Itoa(os.Geteuid()),
		"group_id=" + strconv.Itoa(os.Getegid()),
	}
}
