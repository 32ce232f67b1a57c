// Package fanotify decodes what read(2) returns for a fanotify group: events,
// and the information records that follow each of them (fanotify(7),
// include/uapi/linux/fanotify.h). It does no I/O and allocates nothing: what
// it returns refers to the bytes that were read.
//
//	for b := buf[:n]; len(b) > 0; {
//		var e fanotify.Event
//		var err error
//		if e, b, err = fanotify.Next(b); err != nil {
//			return err // nothing that follows can be told apart
//		}
//		var info fanotify.Info
//		if err := e.Decode(&info); err != nil {
//			... // this event alone is odd
//		}
//	}
//
// The kernel aligns events to four bytes only, and may add record types and
// longer metadata; both are skipped by their length.
package fanotify

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Sizes of the wire format, in bytes.
const (
	metadataSize     = 24 // struct fanotify_event_metadata
	recordHeaderSize = 4  // struct fanotify_event_info_header
	fidSize          = 20 // struct fanotify_event_info_fid, up to f_handle
	fsidOffset       = 4
	handleOffset     = 12 // struct file_handle
)

// MaxEventSize is more than any event of a kernel needs: two names of 255
// bytes, three handles of 128 bytes, and one of each of the other records. A
// read with a smaller buffer may fail with EINVAL and leave the event there.
const MaxEventSize = 2048

// An Event is the bytes of one event.
type Event struct{ b []byte }

// Next splits the first event from b, which holds whole events. After an error
// the rest of b cannot be read: the event's length is impossible, or the format
// is of another version, which is an error that Is errors.ErrUnsupported.
func Next(b []byte) (e Event, rest []byte, err error) {
	if len(b) < metadataSize {
		return Event{}, nil, fmt.Errorf("%d bytes where an event begins", len(b))
	}
	size := binary.NativeEndian.Uint32(b)
	if b[4] != unix.FANOTIFY_METADATA_VERSION {
		return Event{}, nil, fmt.Errorf("event of version %d: %w", b[4], errors.ErrUnsupported)
	}
	if size < metadataSize || uint64(size) > uint64(len(b)) {
		return Event{}, nil, fmt.Errorf("event of %d bytes in a buffer with %d", size, len(b))
	}
	return Event{b[:size:size]}, b[size:], nil
}

// Mask returns what happened: FAN_OPEN and so on, a set.
func (e Event) Mask() uint64 { return binary.NativeEndian.Uint64(e.b[8:]) }

// FD returns the descriptor of the event: FAN_NOFD if there is none, another
// negative number if it could not be opened, see [Event.FDError].
func (e Event) FD() int { return int(int32(binary.NativeEndian.Uint32(e.b[16:]))) }

// PID returns the process, or the thread in a group with FAN_REPORT_TID: 0 if
// it is not of the reader's process ID namespace.
func (e Event) PID() int { return int(int32(binary.NativeEndian.Uint32(e.b[20:]))) }

// Overflow tells whether the event stands for those that the queue had no room
// for. It has neither an object nor a process, and its descriptor is FAN_NOFD
// or, with FAN_REPORT_FD_ERROR, -EBADF.
func (e Event) Overflow() bool { return e.Mask()&unix.FAN_Q_OVERFLOW != 0 }

// FDError returns why a group with FAN_REPORT_FD_ERROR has no descriptor for
// the event, and 0 if there is another reason or a descriptor.
func (e Event) FDError() unix.Errno {
	if fd := e.FD(); fd < unix.FAN_NOFD && !e.Overflow() {
		return unix.Errno(-fd)
	}
	return 0
}

// Info is what the information records of an event say.
type Info struct {
	Object FID // the file itself
	Dir    FID // the directory that the event happened in; Name is the entry
	OldDir FID // of a rename: where the entry was
	NewDir FID // of a rename: where it is

	// PidFD is the descriptor of the process, FAN_NOPIDFD if there is none,
	// and another negative number if it could not be made. It is FAN_NOPIDFD,
	// too, where there is no such record.
	PidFD int32

	Errno      unix.Errno // of the file system: what failed first
	ErrorCount uint32     // how many failures since the last event; 0: no such record

	HasRange      bool
	Offset, Count uint64 // what is about to be accessed, in bytes

	MountID uint64 // the unique ID of the mount that came or went; 0: no such record
}

// Decode reads the records of the event into info, whatever that held. After
// an error it holds what was read so far, and a PidFD is the caller's to
// close all the same. Records of types that are not known are skipped.
func (e Event) Decode(info *Info) error {
	*info = Info{PidFD: unix.FAN_NOPIDFD}
	size := int(binary.NativeEndian.Uint16(e.b[6:]))
	if size < metadataSize || size > len(e.b) {
		return fmt.Errorf("metadata of %d bytes in an event of %d", size, len(e.b))
	}
	for b := e.b[size:]; len(b) > 0; {
		if len(b) < recordHeaderSize {
			return fmt.Errorf("%d bytes where a record begins", len(b))
		}
		n := int(binary.NativeEndian.Uint16(b[2:]))
		if n < recordHeaderSize || n > len(b) {
			return fmt.Errorf("record of type %d with %d bytes, of which %d are there", b[0], n, len(b))
		}
		if err := info.record(b[:n:n]); err != nil {
			return fmt.Errorf("record of type %d with %d bytes: %w", b[0], n, err)
		}
		b = b[n:]
	}
	return nil
}

var (
	errShort    = errors.New("too short")
	errRepeated = errors.New("there are two of it")
)

// record adds what one record says.
func (i *Info) record(r []byte) error {
	switch r[0] {
	case unix.FAN_EVENT_INFO_TYPE_FID:
		return i.Object.decode(r, false)
	case unix.FAN_EVENT_INFO_TYPE_DFID:
		return i.Dir.decode(r, false)
	case unix.FAN_EVENT_INFO_TYPE_DFID_NAME:
		return i.Dir.decode(r, true)
	case unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME:
		return i.OldDir.decode(r, true)
	case unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
		return i.NewDir.decode(r, true)
	case unix.FAN_EVENT_INFO_TYPE_PIDFD:
		return i.pidfd(r)
	case unix.FAN_EVENT_INFO_TYPE_ERROR:
		return i.error(r)
	case unix.FAN_EVENT_INFO_TYPE_RANGE:
		return i.dataRange(r)
	case unix.FAN_EVENT_INFO_TYPE_MNT:
		return i.mount(r)
	}
	return nil
}

func (i *Info) pidfd(r []byte) error {
	if len(r) < 8 {
		return errShort
	}
	if i.PidFD >= 0 {
		return errRepeated
	}
	i.PidFD = int32(binary.NativeEndian.Uint32(r[4:]))
	return nil
}

func (i *Info) error(r []byte) error {
	if len(r) < 12 {
		return errShort
	}
	i.Errno = unix.Errno(binary.NativeEndian.Uint32(r[4:]))
	i.ErrorCount = binary.NativeEndian.Uint32(r[8:])
	return nil
}

func (i *Info) dataRange(r []byte) error {
	if len(r) < 24 {
		return errShort
	}
	i.HasRange = true
	i.Offset = binary.NativeEndian.Uint64(r[8:])
	i.Count = binary.NativeEndian.Uint64(r[16:])
	return nil
}

func (i *Info) mount(r []byte) error {
	// A 64-bit kernel pads the header; one for i386 does not.
	switch {
	case len(r) >= 16:
		i.MountID = binary.NativeEndian.Uint64(r[8:])
	case len(r) == 12:
		i.MountID = binary.NativeEndian.Uint64(r[4:])
	default:
		return errShort
	}
	return nil
}

// A FID names an object of a file system without a descriptor, and may name
// an entry of a directory. The zero FID names nothing: there was no such
// record.
type FID struct {
	// Key is the ID of the file system (8 bytes) and the file handle (struct
	// file_handle: size, type, bytes). Two objects have the same Key only if
	// they are the same.
	Key []byte

	// Name is the entry, without a NUL; it is "." when the event is about the
	// directory itself. Empty: the record has none.
	Name []byte
}

// decode reads a record that consists of a FID, and of a name if named.
func (f *FID) decode(r []byte, named bool) error {
	if len(r) < fidSize {
		return errShort
	}
	if f.Key != nil {
		return errRepeated
	}
	size := binary.NativeEndian.Uint32(r[handleOffset:])
	if uint64(size) > uint64(len(r)-fidSize) {
		return fmt.Errorf("handle of %d bytes", size)
	}
	end := fidSize + int(size)
	if named {
		n := bytes.IndexByte(r[end:], 0)
		if n < 0 {
			return errors.New("the name does not end")
		}
		f.Name = r[end : end+n : end+n]
	}
	f.Key = r[fsidOffset:end:end]
	return nil
}

// Present tells whether there was such a record.
func (f *FID) Present() bool { return f.Key != nil }

// FSID returns the ID of the file system, f_fsid of statfs(2), as two words.
func (f *FID) FSID() [2]int32 {
	return [2]int32{
		int32(binary.NativeEndian.Uint32(f.Key)),
		int32(binary.NativeEndian.Uint32(f.Key[4:])),
	}
}

// HandleType returns the handle_type for open_by_handle_at(2).
func (f *FID) HandleType() int32 {
	return int32(binary.NativeEndian.Uint32(f.Key[handleOffset-fsidOffset+4:]))
}

// Handle returns the f_handle for open_by_handle_at(2). It is empty for an
// error of the whole file system.
func (f *FID) Handle() []byte { return f.Key[fidSize-fsidOffset:] }
