package statmount

import (
	"strconv"

	"golang.org/x/sys/unix"
)

// The fields of a row of mountinfo that statmount(2) has in other forms, as
// fs/proc_namespace.c writes them.

type flagName struct {
	flag uint64
	name string
}

var attributeNames = [...]flagName{
	{unix.MOUNT_ATTR_NOSUID, ",nosuid"},
	{unix.MOUNT_ATTR_NODEV, ",nodev"},
	{unix.MOUNT_ATTR_NOEXEC, ",noexec"},
	{unix.MOUNT_ATTR_NOATIME, ",noatime"},
	{unix.MOUNT_ATTR_NODIRATIME, ",nodiratime"},
	{attrRelatime, ",relatime"},
	{unix.MOUNT_ATTR_NOSYMFOLLOW, ",nosymfollow"},
	{unix.MOUNT_ATTR_IDMAP, ",idmapped"},
}

// attrRelatime stands for relatime, which is the absence of two attributes.
const attrRelatime = 1 << 63

// AppendOptions appends the options of the mount: "rw,nosuid,relatime".
func (m *Mount) AppendOptions(b []byte) []byte {
	attributes := m.Attributes
	if attributes&unix.MOUNT_ATTR__ATIME == unix.MOUNT_ATTR_RELATIME {
		attributes |= attrRelatime
	}
	b = appendAccess(b, attributes&unix.MOUNT_ATTR_RDONLY != 0)
	return appendFlags(b, attributes, attributeNames[:])
}

var superFlagNames = [...]flagName{
	{unix.MS_SYNCHRONOUS, ",sync"},
	{unix.MS_DIRSYNC, ",dirsync"},
	{unix.MS_MANDLOCK, ",mand"},
	{unix.MS_LAZYTIME, ",lazytime"},
}

// AppendSuperOptions appends the options of the file system, with their
// escapes: "rw,size=64k".
func (m *Mount) AppendSuperOptions(b []byte) []byte {
	b = appendAccess(b, m.SuperFlags&unix.MS_RDONLY != 0)
	b = appendFlags(b, uint64(m.SuperFlags), superFlagNames[:])
	if len(m.Options) > 0 {
		b = append(append(b, ','), m.Options...)
	}
	return b
}

func appendAccess(b []byte, readOnly bool) []byte {
	if readOnly {
		return append(b, "ro"...)
	}
	return append(b, "rw"...)
}

func appendFlags(b []byte, flags uint64, names []flagName) []byte {
	for _, f := range names {
		if flags&f.flag != 0 {
			b = append(b, f.name...)
		}
	}
	return b
}

// Optional returns the optional fields: "shared:1", "master:2",
// "propagate_from:3", "unbindable".
func (m *Mount) Optional() (fields []string) {
	if m.Propagation&unix.MS_SHARED != 0 {
		fields = append(fields, numbered("shared:", m.PeerGroup))
	}
	if m.Propagation&unix.MS_SLAVE != 0 {
		fields = append(fields, numbered("master:", m.Master))
		if m.DominatingID != 0 && m.DominatingID != m.Master {
			fields = append(fields, numbered("propagate_from:", m.DominatingID))
		}
	}
	if m.Propagation&unix.MS_UNBINDABLE != 0 {
		fields = append(fields, "unbindable")
	}
	return fields
}

func numbered(name string, n uint64) string {
	return string(strconv.AppendUint([]byte(name), n, 10))
}

// AppendType appends the type of the file system: "ext4", "fuse.sshfs".
func (m *Mount) AppendType(b []byte) []byte {
	b = append(b, m.Type...)
	if len(m.Subtype) > 0 {
		b = append(append(b, '.'), m.Subtype...)
	}
	return b
}
