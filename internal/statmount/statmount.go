// Package statmount speaks the wire format of statmount(2) and listmount(2),
// and calls them. Decoding is apart from calling: what decodes takes bytes and
// does no I/O.
//
// statmount(2) and listmount(2) are there since Linux 6.8, for other namespaces
// than the caller's since 6.11, with all fields of a row of mountinfo since 6.13,
// and with the mask of what is supported since 6.15.
package statmount

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// A Mask says which fields are asked for, and which a reply has.
type Mask uint64

// The fields, as STATMOUNT_* in linux/mount.h.
const (
	SuperBasic    Mask = 1 << iota // device and flags of the file system
	MountBasic                     // IDs, attributes and propagation of the mount
	PropagateFrom                  // costs a walk through the master's peer group
	MountRoot
	MountPoint
	FSType
	NamespaceID // Linux 6.11
	MountOptions
	FSSubtype // Linux 6.13
	SuperSource
	OptionArray
	SecurityArray
	SupportedMask // Linux 6.15
)

// Row is everything that a row of mountinfo shows.
const Row = SuperBasic | MountBasic | PropagateFrom | MountRoot | MountPoint | FSType | MountOptions | FSSubtype | SuperSource

// The sizes of the structures.
const (
	requestSize          = 24 // mnt_id_req, the form of Linux 6.8
	requestNamespaceSize = 32 // with the ID of a namespace, Linux 6.11
	headerSize           = 512
)

// A request is a struct mnt_id_req.
type request [requestNamespaceSize]byte

// makeRequest fills in a request. param is the mask for statmount, and the ID
// after which listmount begins. A namespace of 0 is the caller's, and asks for
// nothing that the first kernels did not have.
func makeRequest(namespace, id, param uint64) (r request) {
	size := requestSize
	if namespace != 0 {
		size = requestNamespaceSize
	}
	binary.NativeEndian.PutUint32(r[0:], uint32(size))
	binary.NativeEndian.PutUint64(r[8:], id)
	binary.NativeEndian.PutUint64(r[16:], param)
	binary.NativeEndian.PutUint64(r[24:], namespace)
	return r
}

// A Mount is a reply of statmount(2). Fields whose bit is missing in Mask are
// zero. A text that is empty has no bit either.
type Mount struct {
	Mask Mask

	Major, Minor uint32 // SuperBasic
	SuperFlags   uint32

	ID, ParentID          uint64 // MountBasic; unique since boot
	MountInfoID           uint32 // the IDs that mountinfo shows
	MountInfoParentID     uint32
	Attributes            uint64 // MOUNT_ATTR_*
	Propagation           uint64 // MS_SHARED and so on
	PeerGroup, Master     uint64
	DominatingID          uint64 // PropagateFrom
	Supported             Mask   // SupportedMask
	Root, Point           []byte // raw, without escapes
	Type, Subtype, Source []byte // raw
	Options               []byte // of the file system, with mountinfo's escapes
}

// Decode decodes a reply. The texts share its memory.
func (m *Mount) Decode(reply []byte) error {
	if len(reply) < headerSize {
		return fmt.Errorf("a reply of statmount of %d bytes, want %d at least", len(reply), headerSize)
	}
	u32 := func(offset int) uint32 { return binary.NativeEndian.Uint32(reply[offset:]) }
	u64 := func(offset int) uint64 { return binary.NativeEndian.Uint64(reply[offset:]) }
	size := u32(0)
	if size < headerSize || uint64(size) > uint64(len(reply)) {
		return fmt.Errorf("a reply of statmount that says it has %d bytes, of %d", size, len(reply))
	}
	texts := reply[headerSize:size]
	*m = Mount{Mask: Mask(u64(8))}
	if m.Mask&SuperBasic != 0 {
		m.Major, m.Minor, m.SuperFlags = u32(16), u32(20), u32(32)
	}
	if m.Mask&MountBasic != 0 {
		m.ID, m.ParentID = u64(40), u64(48)
		m.MountInfoID, m.MountInfoParentID = u32(56), u32(60)
		m.Attributes, m.Propagation = u64(64), u64(72)
		m.PeerGroup, m.Master = u64(80), u64(88)
	}
	if m.Mask&PropagateFrom != 0 {
		m.DominatingID = u64(96)
	}
	if m.Mask&SupportedMask != 0 {
		m.Supported = Mask(u64(144))
	}
	for _, field := range [...]struct {
		bit    Mask
		offset int
		text   *[]byte
	}{
		{MountOptions, 4, &m.Options},
		{FSType, 36, &m.Type},
		{MountRoot, 104, &m.Root},
		{MountPoint, 108, &m.Point},
		{FSSubtype, 120, &m.Subtype},
		{SuperSource, 124, &m.Source},
	} {
		if m.Mask&field.bit == 0 {
			continue
		}
		var err error
		if *field.text, err = textAt(texts, u32(field.offset)); err != nil {
			return err
		}
	}
	return nil
}

// textAt returns the text at an offset, up to its NUL.
func textAt(texts []byte, offset uint32) ([]byte, error) {
	if uint64(offset) >= uint64(len(texts)) {
		return nil, fmt.Errorf("a reply of statmount with a text at %d, of %d", offset, len(texts))
	}
	text, _, terminated := bytes.Cut(texts[offset:], []byte{0})
	if !terminated {
		return nil, errors.New("a reply of statmount with a text that does not end")
	}
	return text[:len(text):len(text)], nil
}
