package procfs_test

import (
	"bytes"
	"embed"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
)

//go:embed testdata/*.mountinfo
var corpusFiles embed.FS

// corpus maps files of testdata to what their rows mean. The files named linux
// are a kernel's own bytes; linux-6.18-chroot is the same table at the same
// time, as a process with the root /mnt/jail saw it. The rest is written by
// hand, after manuals, source and reports.
var corpus = map[string][]procfs.MountInfo{
	"linux-6.18.mountinfo": {
		// cgroup v1: one row per controller, and a named hierarchy.
		info(48, 47, 0, 29, "/", "/sys/fs/cgroup/cpu", "rw,relatime", nil, "cgroup", "cgroup", "rw,cpu"),
		info(49, 47, 0, 30, "/", "/sys/fs/cgroup/cpuacct", "rw,relatime", nil, "cgroup", "cgroup", "rw,cpuacct"),
		info(50, 47, 0, 31, "/", "/sys/fs/cgroup/cpuset", "rw,relatime", nil, "cgroup", "cgroup", "rw,cpuset"),
		info(51, 47, 0, 32, "/", "/sys/fs/cgroup/memory", "rw,relatime", nil, "cgroup", "cgroup", "rw,memory"),
		info(52, 47, 0, 33, "/", "/sys/fs/cgroup/devices", "rw,relatime", nil, "cgroup", "cgroup", "rw,devices"),
		info(53, 47, 0, 34, "/", "/sys/fs/cgroup/freezer", "rw,relatime", nil, "cgroup", "cgroup", "rw,freezer"),
		info(54, 47, 0, 35, "/", "/sys/fs/cgroup/blkio", "rw,relatime", nil, "cgroup", "cgroup", "rw,blkio"),
		info(55, 47, 0, 36, "/", "/sys/fs/cgroup/pids", "rw,relatime", nil, "cgroup", "cgroup", "rw,pids"),
		info(56, 47, 0, 37, "/", "/sys/fs/cgroup/systemd", "rw,relatime", nil, "cgroup", "cgroup", "rw,name=systemd"),
		// cgroup2 beside them.
		info(57, 47, 0, 38, "/", "/sys/fs/cgroup/unified", "rw,relatime", nil, "cgroup2", "cgroup2", "rw"),
		info(63, 43, 0, 39, "/", "/mnt", "rw,relatime", nil, "tmpfs", "none", "rw,size=65536k"),
		// What the kernel escapes in a path, and what it does not.
		info(64, 63, 0, 40, "/", "/mnt/with space", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(65, 63, 0, 41, "/", "/mnt/with\ttab", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(66, 63, 0, 42, "/", "/mnt/with\nline feed", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(67, 63, 0, 43, "/", "/mnt/with\\backslash", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(68, 63, 0, 44, "/", "/mnt/with#hash", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(69, 63, 0, 45, "/", "/mnt/literal\\040", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		// White space of other kinds ends no field and no row.
		info(70, 63, 0, 46, "/", "/mnt/cr\r", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(71, 63, 0, 47, "/", "/mnt/vt\v", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(72, 63, 0, 48, "/", "/mnt/ff\f", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(73, 63, 0, 49, "/", "/mnt/nbsp\u00a0x", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(74, 63, 0, 50, "/", "/mnt/nel\u0085x", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(75, 63, 0, 51, "/", "/mnt/em\u2003x", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(76, 63, 0, 52, "/", "/mnt/del\x7f", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		// Bytes that are not UTF-8.
		info(77, 63, 0, 53, "/", "/mnt/bytes\xff\xfe\xc3", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(78, 63, 0, 54, "/", "/mnt/comma,equals=quote\"x'", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		// Mount points that look like the separator.
		info(79, 63, 0, 55, "/", "/mnt/-", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		info(80, 63, 0, 56, "/", "/mnt/x - y z", "rw,nosuid,nodev,relatime", nil, "tmpfs", "none", "rw"),
		// Sources: empty, the separator, the type, escaped, and raw.
		info(81, 63, 0, 57, "/", "/mnt/source0", "ro,relatime", nil, "tmpfs", "", "ro"),
		info(82, 63, 0, 58, "/", "/mnt/source1", "ro,relatime", nil, "tmpfs", "-", "ro"),
		info(83, 63, 0, 59, "/", "/mnt/source2", "ro,relatime", nil, "tmpfs", "tmpfs", "ro"),
		info(84, 63, 0, 60, "/", "/mnt/source3", "ro,relatime", nil, "tmpfs", "a b\tc\nd\\e#f", "ro"),
		info(85, 63, 0, 61, "/", "/mnt/source4", "ro,relatime", nil, "tmpfs", "a,b=c\"d'", "ro"),
		info(86, 63, 0, 62, "/", "/mnt/source5", "ro,relatime", nil, "tmpfs", "\xff\xfe", "ro"),
		info(87, 63, 0, 63, "/", "/mnt/source6", "ro,relatime", nil, "tmpfs", "cr\rvt\vff\f", "ro"),
		info(88, 63, 0, 64, "/", "/mnt/source7", "ro,relatime", nil, "tmpfs", "\\040", "ro"),
		// A file mounted on a file; sources that were removed; a directory of an odd name, mounted with other options.
		info(89, 63, 0, 39, "/file a", "/mnt/file b", "rw,relatime", nil, "tmpfs", "none", "rw,size=65536k"),
		info(90, 63, 0, 39, "/gone//deleted", "/mnt/deleted dir", "rw,relatime", nil, "tmpfs", "none", "rw,size=65536k"),
		info(91, 63, 0, 39, "/gonefile//deleted", "/mnt/deleted file", "rw,relatime", nil, "tmpfs", "none", "rw,size=65536k"),
		info(92, 63, 0, 39, "/root with space/#\\/sub", "/mnt/bindsub", "ro,noexec,noatime", nil, "tmpfs", "none", "rw,size=65536k"),
		// Namespaces.
		info(93, 63, 0, 4, "net:[4026531833]", "/mnt/nsnet", "rw", nil, "nsfs", "nsfs", "rw"),
		info(94, 63, 0, 4, "uts:[4026531838]", "/mnt/nsuts", "rw", nil, "nsfs", "nsfs", "rw"),
		info(95, 63, 0, 4, "pid:[4026531836]", "/mnt/nspid", "rw", nil, "nsfs", "nsfs", "rw"),
		// Propagation.
		info(96, 63, 0, 65, "/", "/mnt/prop-shared", "rw,relatime", tags("shared:1"), "tmpfs", "none", "rw"),
		info(97, 63, 0, 66, "/", "/mnt/prop-unbindable", "rw,relatime", tags("unbindable"), "tmpfs", "none", "rw"),
		info(98, 63, 0, 67, "/", "/mnt/prop-slave", "rw,relatime", tags("shared:2"), "tmpfs", "none", "rw"),
		info(99, 63, 0, 68, "/", "/mnt/prop-sharedslave", "rw,relatime", tags("shared:3"), "tmpfs", "none", "rw"),
		info(100, 63, 0, 67, "/", "/mnt/prop-slave2", "rw,relatime", tags("master:2"), "tmpfs", "none", "rw"),
		info(101, 63, 0, 68, "/", "/mnt/prop-ss2", "rw,relatime", tags("shared:4", "master:3"), "tmpfs", "none", "rw"),
		info(102, 63, 0, 69, "/", "/mnt/jail", "rw,relatime", nil, "tmpfs", "none", "rw"),
		info(103, 102, 0, 70, "/", "/mnt/jail/a", "rw,relatime", tags("shared:5"), "tmpfs", "none", "rw"),
		info(104, 63, 0, 70, "/", "/mnt/outside", "rw,relatime", tags("shared:6", "master:5"), "tmpfs", "none", "rw"),
		info(105, 102, 0, 70, "/", "/mnt/jail/c", "rw,relatime", tags("master:6"), "tmpfs", "none", "rw"),
		info(106, 102, 0, 71, "/", "/mnt/jail/-", "rw,relatime", nil, "tmpfs", "-", "rw"),
		info(107, 102, 0, 72, "/", "/mnt/jail/- x", "rw,relatime", tags("shared:7"), "tmpfs", "", "rw"),
		// Types with a subtype. In types and sources a # is escaped, too.
		info(108, 63, 0, 73, "/", "/mnt/fuse", "rw,nosuid,nodev,relatime", nil, "fuse.sshfs", "user@host:/dir #1", "rw,user_id=0,group_id=0,allow_other"),
		info(109, 63, 0, 74, "/", "/mnt/fuseodd", "rw,relatime", nil, "fuse.a b#c\\d", "x", "rw,user_id=0,group_id=0"),
		// Two subvolumes of a btrfs. Options keep their escapes, so that commas in them can be told.
		info(111, 63, 0, 75, "/", "/mnt/btrfs", "rw,relatime", nil, "btrfs", "/dev/loop0", "rw,discard=async,space_cache=v2,subvolid=5,subvol=/"),
		info(112, 63, 0, 75, "/@home, sweet", "/mnt/btrfs sub", "rw,noatime", nil, "btrfs", "/dev/loop0", "rw,discard=async,space_cache=v2,subvolid=256,subvol=/@home\\054\\040sweet"),
		info(110, 63, 7, 1, "/", "/mnt/fuseblk", "rw,relatime", nil, "fuseblk.ntfs", "/dev/loop1", "rw,user_id=0,group_id=0,blksize=4096"),
		// Overlays: a comma within an option, and an option that is repeated.
		info(116, 63, 0, 78, "/", "/mnt/overlay", "rw,relatime", nil, "overlay", "overlay", "rw,lowerdir=/mnt/layers/l00:/mnt/layers/l01,upperdir=/mnt/layers/up\\134\\054\\040a=b\\040c,workdir=/mnt/layers/work,uuid=on"),
		info(158, 63, 0, 80, "/", "/mnt/overlay many", "rw,relatime", nil, "overlay", "many layers", "ro,"+strings.Join(layers(40), ",")+`,lowerdir+=/mnt/layers/co:lon\054\040x,redirect_dir=on`),
		// The same file system mounted plainly and idmapped.
		info(159, 63, 0, 83, "/", "/mnt/plain", "rw,relatime", nil, "tmpfs", "idmap", "rw"),
		info(160, 63, 0, 83, "/", "/mnt/idmapped", "rw,relatime,idmapped", nil, "tmpfs", "idmap", "rw"),
		// A cgroup2, and a group in it.
		info(161, 63, 0, 38, "/", "/mnt/cg2", "rw,nosuid,nodev,noexec,relatime", nil, "cgroup2", "cgroup2", "rw"),
		info(162, 63, 0, 38, "/test.slice/a b", "/mnt/cgbind", "rw,nosuid,nodev,noexec,relatime", nil, "cgroup2", "cgroup2", "rw"),
		// Others.
		info(163, 63, 0, 84, "/", "/mnt/proc", "rw,nosuid,relatime", nil, "proc", "proc", "rw,hidepid=invisible"),
		info(164, 63, 0, 85, "/", "/mnt/devpts", "rw,relatime", nil, "devpts", "devpts", "rw,mode=600,ptmxmode=666"),
		info(165, 63, 0, 86, "/", "/mnt/sync", "rw,relatime", nil, "tmpfs", "sync", "rw,sync,mand,lazytime,nr_inodes=100,mode=700,uid=1000"),
	},
	"linux-6.18-chroot.mountinfo": {
		info(102, 63, 0, 69, "/", "/", "rw,relatime", nil, "tmpfs", "none", "rw"),
		info(103, 102, 0, 70, "/", "/a", "rw,relatime", tags("shared:5"), "tmpfs", "none", "rw"),
		info(105, 102, 0, 70, "/", "/c", "rw,relatime", tags("master:6", "propagate_from:5"), "tmpfs", "none", "rw"),
		info(106, 102, 0, 71, "/", "/-", "rw,relatime", nil, "tmpfs", "-", "rw"),
		info(107, 102, 0, 72, "/", "/- x", "rw,relatime", tags("shared:7"), "tmpfs", "", "rw"),
	},
	"documented.mountinfo": {
		// The example of proc_pid_mountinfo(5).
		info(36, 35, 98, 0, "/mnt1", "/mnt2", "rw,noatime", tags("master:1"), "ext3", "/dev/root", "rw,errors=continue"),
		// The first mount is its own parent.
		info(1, 1, 0, 2, "/", "/", "rw", nil, "rootfs", "rootfs", "rw"),
		// Network file systems and others that need what a test machine lacks.
		info(1001, 25, 0, 46, "/", "/srv/nfs", "rw,nosuid,relatime", tags("shared:410"), "nfs4", "server.example:/export/home dir", "rw,vers=4.2,rsize=1048576,hard,proto=tcp6,addr=fe80::1%eth0"),
		info(1002, 25, 0, 47, "/", "/srv/cifs", "rw,relatime", tags("shared:411"), "cifs", "//server/share name", "rw,vers=3.1.1,username=a\\054b,domain=,uid=0"),
		info(1003, 25, 0, 48, "/", "/srv/ceph", "rw,relatime", tags("shared:412"), "ceph", "10.0.0.1:6789,10.0.0.2:6789:/", "rw,name=admin,secret=<hidden>,acl"),
		info(1004, 25, 0, 49, "/", "/srv/zfs", "rw,noatime", tags("shared:413"), "zfs", "tank/data", "rw,xattr,noacl"),
		info(1005, 25, 0, 50, "/", "/proc/sys/fs/binfmt_misc", "rw,relatime", tags("shared:414"), "autofs", "systemd-1", "rw,fd=29,pgrp=1,timeout=0,minproto=5,maxproto=5,direct,pipe_ino=1234"),
		// A comma in quotes is the kernel's own way of writing a security label.
		info(1006, 25, 0, 51, "/", "/var/lib/containers/merged", "rw,relatime", nil, "overlay", "overlay", "rw,context=\"system_u:object_r:container_file_t:s0:c1,c2\",lowerdir=/l/A:/l/B"),
		// cgroup v1: a comma in the path, two controllers.
		info(1007, 25, 0, 52, "/", "/sys/fs/cgroup/cpu,cpuacct", "rw,nosuid,nodev,noexec,relatime", tags("shared:9"), "cgroup", "cgroup", "rw,cpu,cpuacct"),
		// Odd options.
		info(1008, 25, 0, 53, "/", "/equals", "rw", nil, "tmpfs", "tmpfs", "rw,k=v=w,k=v=w,k,=,,last"),
		// One to four optional fields.
		info(1009, 25, 0, 54, "/", "/one", "rw", tags("shared:1"), "tmpfs", "t", "rw"),
		info(1010, 25, 0, 55, "/", "/two", "rw", tags("shared:1", "master:2"), "tmpfs", "t", "rw"),
		info(1011, 25, 0, 56, "/", "/three", "rw", tags("shared:1", "master:2", "propagate_from:3"), "tmpfs", "t", "rw"),
		info(1012, 25, 0, 57, "/", "/four", "rw", tags("shared:1", "master:2", "propagate_from:3", "unbindable"), "tmpfs", "t", "rw"),
		// Tags of a kernel to come, and some that start like the separator.
		info(1013, 25, 0, 58, "/", "/future", "rw", tags("shared:1", "idmap_of:7:8", "frozen"), "tmpfs", "t", "rw"),
		info(1014, 25, 0, 59, "/", "/minus", "rw", tags("--:1", "-x"), "tmpfs", "t", "rw"),
		// Only the first separator counts; what follows the source is one field.
		info(1015, 25, 0, 60, "/", "/double", "rw", nil, "tmpfs", "-", "rw,a - b - c"),
		info(1016, 25, 0, 61, "/", "/spaces", "rw", nil, "fs", "src", "rw,a b  c "),
		info(1017, 25, 0, 62, "/", "/nosuper", "rw", nil, "fs", "src", ""),
		// The range of the numbers.
		info(4294967295, 4294967295, 4294967295, 4294967295, "/", "/max", "rw", nil, "tmpfs", "t", "rw"),
		info(0, 0, 0, 0, "/", "/zero", "rw", nil, "tmpfs", "t", "rw"),
		// Escapes that no kernel writes are decoded as far as they go.
		info(1018, 25, 0, 63, "/", "/escapes/\x00\x01\xff\\400\\08\\0\\x41\\\\\\0", "rw", nil, "tmpfs", "t", "rw"),
		info(1019, 25, 0, 64, "/", "/end\\", "rw", nil, "tmpfs", "t\\13", "rw"),
		// A snapshot as the root, and an option that appears after an error of the disk.
		info(1020, 25, 259, 1048575, "/@/.snapshots/1/snapshot", "/", "ro,noatime", tags("shared:1"), "btrfs", "/dev/nvme0n1p2", "rw,ssd,subvolid=266,subvol=/@/.snapshots/1/snapshot"),
		info(1021, 25, 8, 1, "/", "/emergency", "rw,relatime", tags("shared:2"), "ext4", "/dev/sda1", "rw,emergency_ro,errors=remount-ro"),
	},
}

func info(id, parent, major, minor uint32, root, point, options string, optional []string, fsType, source, super string) procfs.MountInfo {
	return procfs.MountInfo{
		ID: id, ParentID: parent, Major: major, Minor: minor, Root: root, MountPoint: point,
		Options: options, Optional: optional, FSType: fsType, Source: source, SuperOptions: super,
	}
}

func tags(list ...string) []string { return list }

func layers(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("lowerdir+=/mnt/layers/l%02d", i)
	}
	return list
}

// corpusRows returns the rows of a file of testdata.
func corpusRows(tb testing.TB, name string) []string {
	tb.Helper()
	text, err := corpusFiles.ReadFile("testdata/" + name)
	if err != nil {
		tb.Fatal(err)
	}
	return splitRows(text)
}

// splitRows returns the rows of a text, each of which a line feed ends.
func splitRows(text []byte) []string {
	text = bytes.TrimSuffix(text, []byte{'\n'})
	if len(text) == 0 {
		return nil
	}
	return strings.Split(string(text), "\n")
}

// TestMountInfoCorpus: every field of every row in testdata is what it should
// be, and a kernel's row can be made again from them, so nothing of it is lost.
func TestMountInfoCorpus(t *testing.T) {
	for name, want := range corpus {
		t.Run(name, func(t *testing.T) {
			rows := corpusRows(t, name)
			if len(rows) != len(want) {
				t.Fatalf("%d rows in the file, %d expected", len(rows), len(want))
			}
			var parser procfs.MountInfoParser
			for i, row := range rows {
				got, err := parser.Parse(row)
				if err != nil {
					t.Errorf("row %q: %v", row, err)
				}
				if !reflect.DeepEqual(got, want[i]) {
					t.Errorf("row  %q\ngot  %#v\nwant %#v", row, got, want[i])
				}
				if again := encode(got); strings.HasPrefix(name, "linux") && again != row {
					t.Errorf("row   %q\nagain %q", row, again)
				}
			}
		})
	}
	files, err := corpusFiles.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if name := file.Name(); corpus[name] == nil {
			t.Errorf("nothing is said about the rows of %s", name)
		}
	}
}
