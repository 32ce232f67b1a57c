package statmount_test

import (
	"bytes"
	"encoding/binary"
	"math"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/statmount"
)

// all is every field that [statmount.Mount] has.
const all = statmount.Row | statmount.SupportedMask

// A reply is a struct statmount: where the fields are is written down here once
// more, from linux/mount.h.
type reply []byte

func newReply(mask statmount.Mask) reply {
	r := make(reply, 512)
	return r.u32(0, 512).u64(8, uint64(mask))
}

func (r reply) u32(offset int, n uint32) reply {
	binary.NativeEndian.PutUint32(r[offset:], n)
	return r
}

func (r reply) u64(offset int, n uint64) reply {
	binary.NativeEndian.PutUint64(r[offset:], n)
	return r
}

// text adds a text, the place of which stands at offset.
func (r reply) text(offset int, text string) reply {
	r.u32(offset, uint32(len(r)-512))
	r = append(append(r, text...), 0)
	return r.u32(0, uint32(len(r)))
}

// Where the places of the texts stand.
const (
	optionsAt = 4
	typeAt    = 36
	rootAt    = 104
	pointAt   = 108
	subtypeAt = 120
	sourceAt  = 124
)

// full returns a reply with all fields, no two of which have a byte in common,
// and the mount it stands for.
func full() (reply, statmount.Mount) {
	m := statmount.Mount{
		Mask:  all,
		Major: 0x01020304, Minor: 0x05060708, SuperFlags: 0x090a0b0c,
		ID: 0x1112131415161718, ParentID: 0x191a1b1c1d1e1f20,
		MountInfoID: 0x21222324, MountInfoParentID: 0x25262728,
		Attributes: 0x2122232425262728, Propagation: 0x3132333435363738,
		PeerGroup: 0x4142434445464748, Master: 0x5152535455565758,
		DominatingID: 0x6162636465666768,
		Supported:    0x7172737475767778,
		Root:         []byte("/root \xff\n\\"),
		Point:        []byte("/mount\\040point"),
		Type:         []byte("type"),
		Subtype:      []byte("sub.type"),
		Source:       []byte("a source, #1"),
		Options:      []byte(`size=64k,name=a\054b`),
	}
	r := newReply(m.Mask)
	for i := 16; i < 512; i++ {
		r[i] = 0xee // what is not asked for
	}
	r.u32(16, m.Major).u32(20, m.Minor).u32(32, m.SuperFlags)
	r.u64(40, m.ID).u64(48, m.ParentID).u32(56, m.MountInfoID).u32(60, m.MountInfoParentID)
	r.u64(64, m.Attributes).u64(72, m.Propagation).u64(80, m.PeerGroup).u64(88, m.Master)
	r.u64(96, m.DominatingID).u64(144, uint64(m.Supported))
	r = append(r, "not a field's\x00"...)
	r = r.text(sourceAt, string(m.Source)).text(pointAt, string(m.Point)).text(optionsAt, string(m.Options))
	r = r.text(subtypeAt, string(m.Subtype)).text(typeAt, string(m.Type)).text(rootAt, string(m.Root))
	return r, m
}

// decode decodes a reply into a Mount that has been used before.
func decode(r reply) (statmount.Mount, error) {
	_, m := full()
	err := m.Decode(r)
	return m, err
}

// TestDecode: each field is where the kernel puts it, whatever stands in those
// that are not known, and behind the reply.
func TestDecode(t *testing.T) {
	r, want := full()
	for _, beyond := range []string{"", "beyond\x00"} {
		got, err := decode(append(bytes.Clone(r), beyond...))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
}

// TestDecodeWithout: fields whose bit is missing are zero, whatever stands in
// their place, and the others are not.
func TestDecodeWithout(t *testing.T) {
	for bit := statmount.Mask(1); bit <= statmount.SupportedMask; bit <<= 1 {
		r, want := full()
		want.Mask &^= bit
		r.u64(8, uint64(want.Mask))
		switch bit {
		case statmount.SuperBasic:
			want.Major, want.Minor, want.SuperFlags = 0, 0, 0
		case statmount.MountBasic:
			want.ID, want.ParentID, want.MountInfoID, want.MountInfoParentID = 0, 0, 0, 0
			want.Attributes, want.Propagation, want.PeerGroup, want.Master = 0, 0, 0, 0
		case statmount.PropagateFrom:
			want.DominatingID = 0
		case statmount.MountRoot:
			want.Root = nil
			r.u32(rootAt, math.MaxUint32)
		case statmount.MountPoint:
			want.Point = nil
			r.u32(pointAt, math.MaxUint32)
		case statmount.FSType:
			want.Type = nil
			r.u32(typeAt, math.MaxUint32)
		case statmount.MountOptions:
			want.Options = nil
			r.u32(optionsAt, math.MaxUint32)
		case statmount.FSSubtype:
			want.Subtype = nil
			r.u32(subtypeAt, math.MaxUint32)
		case statmount.SuperSource:
			want.Source = nil
			r.u32(sourceAt, math.MaxUint32)
		case statmount.SupportedMask:
			want.Supported = 0
		}
		got, err := decode(r)
		if err != nil {
			t.Fatalf("without %#x: %v", bit, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("without %#x:\ngot  %+v\nwant %+v", bit, got, want)
		}
	}
	got, err := decode(newReply(0))
	if want := (statmount.Mount{}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("of an empty reply: %+v, %v", got, err)
	}
}

// TestDecodeOdd: a reply that contradicts itself is an error that says how, and
// one that only looks as if it did is none.
func TestDecodeOdd(t *testing.T) {
	texts := func() reply { return newReply(statmount.MountPoint|statmount.SuperSource).text(pointAt, "/p") }
	for _, c := range []struct {
		name  string
		reply reply
		want  string // in the error; "": there is none
	}{
		{"no bytes", nil, "of 0 bytes"},
		{"a byte too few", newReply(0)[:511], "of 511 bytes"},
		{"of no bytes, it says", newReply(0).u32(0, 0), "0 bytes, of 512"},
		{"less than the structure, it says", newReply(0).u32(0, 511), "511 bytes, of 512"},
		{"more than the buffer, it says", newReply(0).u32(0, 513), "513 bytes, of 512"},
		{"the highest size", newReply(0).u32(0, math.MaxUint32), "4294967295 bytes, of 512"},
		{"no texts", newReply(statmount.SuperBasic | statmount.MountBasic), ""},
		{"a text where none are", newReply(statmount.MountPoint), "a text at 0, of 0"},
		{"the last byte", texts().u32(sourceAt, 2), ""},
		{"behind the last byte", texts().u32(sourceAt, 3), "a text at 3, of 3"},
		{"far behind", texts().u32(sourceAt, math.MaxUint32), "a text at 4294967295, of 3"},
		{"without an end", append(texts(), 'x').u32(0, 512+4).u32(sourceAt, 3), "does not end"},
		{"with the end behind the reply", append(texts(), 'x', 0).u32(0, 512+4).u32(sourceAt, 3), "does not end"},
		{"all texts are one", texts().u32(sourceAt, 0), ""},
		{"one text within another", texts().u32(sourceAt, 1), ""},
	} {
		_, err := decode(c.reply)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

// TestDecodeEmptyTexts: a text may be empty, though the kernel leaves its bit
// out then.
func TestDecodeEmptyTexts(t *testing.T) {
	r := newReply(all)
	for _, at := range []int{optionsAt, typeAt, rootAt, pointAt, subtypeAt, sourceAt} {
		r = r.text(at, "")
	}
	m, err := decode(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range [][]byte{m.Options, m.Type, m.Root, m.Point, m.Subtype, m.Source} {
		if len(text) != 0 {
			t.Errorf("text %q, want none", text)
		}
	}
	if got := string(m.AppendType(nil)) + " " + string(m.AppendSuperOptions(nil)); got != " rw" {
		t.Errorf("type and options %q", got)
	}
}

// TestDecodeTextsApart: a text can be appended to without writing into the
// reply.
func TestDecodeTextsApart(t *testing.T) {
	r, _ := full()
	before := bytes.Clone(r)
	m, err := decode(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range [][]byte{m.Options, m.Type, m.Root, m.Point, m.Subtype, m.Source} {
		_ = append(text, "more"...)
	}
	if !bytes.Equal(r, before) {
		t.Error("it wrote into the reply")
	}
}

// TestRequest: a request has the form of Linux 6.8 as long as it names no
// namespace.
func TestRequest(t *testing.T) {
	const id, param, namespace = 0x0102030405060708, 0x1112131415161718, 0x2122232425262728
	for _, c := range []struct {
		namespace uint64
		size      uint32
	}{{0, 24}, {namespace, 32}} {
		want := binary.NativeEndian.AppendUint32(nil, c.size)
		want = binary.NativeEndian.AppendUint32(want, 0)
		for _, n := range []uint64{id, param, c.namespace} {
			want = binary.NativeEndian.AppendUint64(want, n)
		}
		if got := statmount.MakeRequest(c.namespace, id, param); !bytes.Equal(got[:], want) {
			t.Errorf("namespace %#x: %x, want %x", c.namespace, got, want)
		}
	}
}

// appended calls an Append function with something before.
func appended(t *testing.T, f func([]byte) []byte) string {
	t.Helper()
	got, ok := strings.CutPrefix(string(f([]byte("before "))), "before ")
	if !ok {
		t.Errorf("what was there before was not kept: %q", got)
	}
	return got
}

// TestOptions: the attributes have the names that mountinfo shows, in its
// order. relatime is what is neither noatime nor strictatime, which has no name.
func TestOptions(t *testing.T) {
	const strict = unix.MOUNT_ATTR_STRICTATIME // so that there is nothing about it
	for _, c := range []struct {
		attributes uint64
		want       string
	}{
		{0, "rw,relatime"},
		{strict, "rw"},
		{unix.MOUNT_ATTR_NOATIME, "rw,noatime"},
		{strict | unix.MOUNT_ATTR_RDONLY, "ro"},
		{strict | unix.MOUNT_ATTR_NOSUID, "rw,nosuid"},
		{strict | unix.MOUNT_ATTR_NODEV, "rw,nodev"},
		{strict | unix.MOUNT_ATTR_NOEXEC, "rw,noexec"},
		{strict | unix.MOUNT_ATTR_NODIRATIME, "rw,nodiratime"},
		{unix.MOUNT_ATTR_NODIRATIME, "rw,nodiratime,relatime"},
		{unix.MOUNT_ATTR_NOATIME | unix.MOUNT_ATTR_NODIRATIME, "rw,noatime,nodiratime"},
		{strict | unix.MOUNT_ATTR_NOSYMFOLLOW, "rw,nosymfollow"},
		{strict | unix.MOUNT_ATTR_IDMAP, "rw,idmapped"},
		{
			unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC |
				unix.MOUNT_ATTR_NODIRATIME | unix.MOUNT_ATTR_NOSYMFOLLOW | unix.MOUNT_ATTR_IDMAP,
			"ro,nosuid,nodev,noexec,nodiratime,relatime,nosymfollow,idmapped",
		},
		{1<<40 | 1<<63>>1, "rw,relatime"}, // attributes to come
	} {
		m := statmount.Mount{Attributes: c.attributes}
		if got := appended(t, m.AppendOptions); got != c.want {
			t.Errorf("attributes %#x: %q, want %q", c.attributes, got, c.want)
		}
	}
}

// TestSuperOptions: the flags of the file system come first, and its own options
// as they are.
func TestSuperOptions(t *testing.T) {
	for _, c := range []struct {
		flags   uint32
		options string
		want    string
	}{
		{0, "", "rw"},
		{0, `size=64k,a=b\054c`, `rw,size=64k,a=b\054c`},
		{unix.MS_RDONLY, "", "ro"},
		{unix.MS_SYNCHRONOUS, "x", "rw,sync,x"},
		{unix.MS_DIRSYNC, "", "rw,dirsync"},
		{unix.MS_MANDLOCK, "", "rw,mand"},
		{unix.MS_LAZYTIME, "", "rw,lazytime"},
		{unix.MS_RDONLY | unix.MS_SYNCHRONOUS | unix.MS_DIRSYNC | unix.MS_MANDLOCK | unix.MS_LAZYTIME, "x", "ro,sync,dirsync,mand,lazytime,x"},
		{unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_POSIXACL | unix.MS_ACTIVE, "", "rw"},
	} {
		m := statmount.Mount{SuperFlags: c.flags, Options: []byte(c.options)}
		if got := appended(t, m.AppendSuperOptions); got != c.want {
			t.Errorf("flags %#x, options %q: %q, want %q", c.flags, c.options, got, c.want)
		}
	}
}

// TestOptional: the fields of propagation, in mountinfo's order. Where the
// propagation comes from is said only of a slave whose master does not say it.
func TestOptional(t *testing.T) {
	for _, c := range []struct {
		m    statmount.Mount
		want []string
	}{
		{statmount.Mount{}, nil},
		{statmount.Mount{Propagation: unix.MS_PRIVATE, PeerGroup: 1, Master: 2, DominatingID: 3}, nil},
		{statmount.Mount{Propagation: unix.MS_SHARED, PeerGroup: 1}, []string{"shared:1"}},
		{statmount.Mount{Propagation: unix.MS_SHARED, PeerGroup: 1, DominatingID: 3}, []string{"shared:1"}},
		{statmount.Mount{Propagation: unix.MS_SLAVE, Master: 2}, []string{"master:2"}},
		{statmount.Mount{Propagation: unix.MS_SLAVE, Master: 2, DominatingID: 2}, []string{"master:2"}},
		{statmount.Mount{Propagation: unix.MS_SLAVE, Master: 2, DominatingID: 3}, []string{"master:2", "propagate_from:3"}},
		{
			statmount.Mount{Propagation: unix.MS_SHARED | unix.MS_SLAVE, PeerGroup: 1, Master: 2, DominatingID: 3},
			[]string{"shared:1", "master:2", "propagate_from:3"},
		},
		{statmount.Mount{Propagation: unix.MS_UNBINDABLE}, []string{"unbindable"}},
		{
			statmount.Mount{Propagation: unix.MS_SHARED | unix.MS_UNBINDABLE, PeerGroup: math.MaxInt32},
			[]string{"shared:2147483647", "unbindable"},
		},
	} {
		if got := c.m.Optional(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v: %q, want %q", c.m, got, c.want)
		}
	}
}

// TestType: a subtype follows the type behind a point.
func TestType(t *testing.T) {
	for _, c := range []struct{ fsType, subtype, want string }{
		{"ext4", "", "ext4"},
		{"fuse", "sshfs", "fuse.sshfs"},
		{"fuse", "a.b c#", "fuse.a.b c#"},
		{"", "", ""},
	} {
		m := statmount.Mount{Type: []byte(c.fsType), Subtype: []byte(c.subtype)}
		if got := appended(t, m.AppendType); got != c.want {
			t.Errorf("%q and %q: %q, want %q", c.fsType, c.subtype, got, c.want)
		}
	}
}
