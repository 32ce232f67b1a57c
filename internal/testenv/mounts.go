package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Mounts that the decoders of mount tables are held against.

// OddNames are names of files and sources of mounts that a parser may trip over.
var OddNames = []string{
	"with space", " leading and trailing ", "with\ttab", "with\nline feed", "\n", `with\backslash`, `literal\040`, `\`, `\\134`, "with#hash",
	"-", " - ", "- x", "a - b - c", "cr\r", "vt\v", "ff\f", "nul-like\\000", "del\x7f", "esc\x1b[0m", "nbsp\u00a0", "nel\u0085", "em\u2003space", "line\u2028",
	"high\xff\xfe", "cut\xc3", "overlong\xc0\x80", "comma,", "equals=", `quote"'`, "colon:", "//deleted", strings.Repeat("n", 255),
}

// MountDir returns a new directory on which a tmpfs is mounted. Whatever is
// mounted below it goes with it when the test ends.
func MountDir(tb testing.TB) string {
	tb.Helper()
	NeedMounts(tb)
	dir := tb.TempDir()
	Mount(tb, "tmpfs", dir, "tmpfs", 0, "mode=755")
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			tb.Error(err)
		}
	})
	return dir
}

// Mount is mount(2).
func Mount(tb testing.TB, source, target, fsType string, flags uintptr, data string) {
	tb.Helper()
	if err := unix.Mount(source, target, fsType, flags, data); err != nil {
		tb.Fatalf("mount %q on %q, type %q, flags %#x: %v", source, target, fsType, flags, err)
	}
}

// Unmount is umount2(2) without flags.
func Unmount(tb testing.TB, target string) {
	tb.Helper()
	if err := unix.Unmount(target, 0); err != nil {
		tb.Fatalf("unmount %q: %v", target, err)
	}
}

// Mkdir makes the directory that the joined elements name, and returns its path.
func Mkdir(tb testing.TB, elem ...string) string {
	tb.Helper()
	dir := filepath.Join(elem...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// Touch makes the empty file that the joined elements name, and returns its
// path.
func Touch(tb testing.TB, elem ...string) string {
	tb.Helper()
	name := filepath.Join(elem...)
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		tb.Fatal(err)
	}
	return name
}

// MountNew mounts a file system that configure has described to fsconfig(2) on
// name in the directory dir, a descriptor.
func MountNew(tb testing.TB, fsType string, dir int, name string, configure func(fd int) error) {
	tb.Helper()
	config, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		tb.Fatalf("fsopen %s: %v", fsType, err)
	}
	defer unix.Close(config)
	if err := configure(config); err != nil {
		tb.Fatalf("fsconfig %s: %v", fsType, err)
	}
	if err := unix.FsconfigCreate(config); err != nil {
		tb.Fatalf("fsconfig create %s: %v", fsType, err)
	}
	tree, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		tb.Fatalf("fsmount %s: %v", fsType, err)
	}
	defer unix.Close(tree)
	moveMount(tb, tree, dir, name)
}

func moveMount(tb testing.TB, tree, dir int, name string) {
	tb.Helper()
	if err := unix.MoveMount(tree, "", dir, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		tb.Fatalf("move_mount on %s: %v", name, err)
	}
}

// MountDeep mounts a tmpfs with that source below dir, at a path of length bytes
// or a little more, which may be more than a system call takes. It returns the
// path.
func MountDeep(tb testing.TB, dir, source string, length int) string {
	tb.Helper()
	open := func(at int, path string) int {
		fd, err := unix.Openat(at, path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			tb.Fatal(err)
		}
		return fd
	}
	fd, point := open(unix.AT_FDCWD, dir), dir
	defer func() { unix.Close(fd) }()
	const name = "a directory's name of 32 letters"
	for len(point) < length {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			tb.Fatal(err)
		}
		next := open(fd, name)
		unix.Close(fd)
		fd, point = next, point+"/"+name
	}
	if err := unix.Mkdirat(fd, "end", 0o755); err != nil {
		tb.Fatal(err)
	}
	MountNew(tb, "tmpfs", fd, "end", func(config int) error { return unix.FsconfigSetString(config, "source", source) })
	return point + "/end"
}

// MountLayers mounts an overlay of as many layers as the kernel stacks on
// dir/overlay. From Linux 6.8 on its row in mountinfo has more than 100,000
// bytes; before, the layers had to fit in a page. It returns the layers.
func MountLayers(tb testing.TB, dir string) (layers []string) {
	tb.Helper()
	const (
		most      = 500
		maxString = 240 // of fsconfig(2), with some room
	)
	point := Mkdir(tb, dir, "overlay")
	if !KernelAtLeast(6, 8) { // lowerdir+
		for i := range (os.Getpagesize() - len("lowerdir=") - 1) / (len(dir) + len("/000:")) {
			layers = append(layers, Mkdir(tb, dir, fmt.Sprintf("%03d", i)))
		}
		Mount(tb, "many layers", point, "overlay", 0, "lowerdir="+strings.Join(layers, ":"))
		return layers
	}
	for i := range most {
		name := fmt.Sprintf("%03d, ", i)
		layers = append(layers, Mkdir(tb, dir, name+strings.Repeat("x", max(0, maxString-len(dir)-len("/")-len(name)))))
	}
	MountNew(tb, "overlay", unix.AT_FDCWD, point, func(config int) error {
		err := unix.FsconfigSetString(config, "source", "many layers")
		for _, layer := range layers {
			if err == nil {
				err = unix.FsconfigSetString(config, "lowerdir+", layer)
			}
		}
		return err
	})
	return layers
}

// MountIDMapped mounts a copy of the mount of dir on dir/idmapped, with other
// user IDs and these attributes, and returns its path.
func MountIDMapped(tb testing.TB, dir string, attributes uint64) string {
	tb.Helper()
	NeedRoot(tb, "the user namespace must not be the one that owns the file system")
	NeedKernel(tb, 6, 3, "idmapped mounts of tmpfs")
	user := otherUserNamespace(tb)
	defer user.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | attributes, Userns_fd: uint64(user.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		tb.Fatal(err)
	}
	point := Mkdir(tb, dir, "idmapped")
	moveMount(tb, tree, unix.AT_FDCWD, point)
	return point
}

// otherUserNamespace returns a user namespace that maps 0 to 100000.
func otherUserNamespace(tb testing.TB) *os.File {
	tb.Helper()
	maps := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100_000, Size: 1_000}}
	pid, end := StartIdle(tb, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: maps, GidMappings: maps})
	defer end()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		tb.Fatal(err)
	}
	return f
}

// MountSubtype mounts a FUSE file system with a subtype on dir/fuse, and returns
// its path. Nobody answers its requests, so nothing may look into it.
func MountSubtype(tb testing.TB, dir, source, subtype string) string {
	tb.Helper()
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if errors.Is(err, fs.ErrPermission) {
		NeedRoot(tb, err.Error())
	}
	if err != nil {
		Missing(tb, "needs /dev/fuse", err)
	}
	tb.Cleanup(func() { fuse.Close() })
	point := Mkdir(tb, dir, "fuse")
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", fuse.Fd(), os.Geteuid(), os.Getegid())
	Mount(tb, source, point, "fuse."+subtype, unix.MS_NOSUID|unix.MS_NODEV, data)
	return point
}

// MountPropagations mounts, below dir, a private mount, and a shared one with a
// peer, a slave, a shared slave (both), a private copy and an unbindable one.
func MountPropagations(tb testing.TB, dir string) {
	tb.Helper()
	bind := func(on string, flags ...uintptr) {
		Mount(tb, dir+"/shared", Mkdir(tb, dir, on), "", unix.MS_BIND, "")
		for _, flag := range flags {
			Mount(tb, "", dir+"/"+on, "", flag, "")
		}
	}
	Mount(tb, "s", Mkdir(tb, dir, "shared"), "tmpfs", 0, "")
	Mount(tb, "", dir+"/shared", "", unix.MS_SHARED, "")
	bind("peer")
	bind("slave", unix.MS_SLAVE)
	bind("both", unix.MS_SLAVE, unix.MS_SHARED)
	bind("private", unix.MS_PRIVATE)
	bind("unbindable", unix.MS_UNBINDABLE)
}
