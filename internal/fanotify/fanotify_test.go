package fanotify_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
)

// Bytes as the kernel writes them, for tests.

// event returns an event with its records.
func event(mask uint64, fd, pid int32, records ...[]byte) []byte {
	body := bytes.Join(records, nil)
	b := binary.NativeEndian.AppendUint32(nil, uint32(24+len(body)))
	b = append(b, unix.FANOTIFY_METADATA_VERSION, 0)
	b = binary.NativeEndian.AppendUint16(b, 24)
	b = binary.NativeEndian.AppendUint64(b, mask)
	b = binary.NativeEndian.AppendUint32(b, uint32(fd))
	b = binary.NativeEndian.AppendUint32(b, uint32(pid))
	return append(b, body...)
}

func record(kind byte, body []byte) []byte {
	b := binary.NativeEndian.AppendUint16([]byte{kind, 0}, uint16(4+len(body)))
	return append(b, body...)
}

// fid returns a record with a handle and, for the types that have one, a name.
func fid(kind byte, handle []byte, name string) []byte {
	b := []byte("fsidFSID")
	b = binary.NativeEndian.AppendUint32(b, uint32(len(handle)))
	b = binary.NativeEndian.AppendUint32(b, 0x81)
	b = append(b, handle...)
	switch kind {
	case unix.FAN_EVENT_INFO_TYPE_DFID_NAME, unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
		b = append(b, name...)
		b = append(b, 0)
	}
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return record(kind, b)
}

func words(ns ...uint32) (b []byte) {
	for _, n := range ns {
		b = binary.NativeEndian.AppendUint32(b, n)
	}
	return b
}

func longs(ns ...uint64) (b []byte) {
	for _, n := range ns {
		b = binary.NativeEndian.AppendUint64(b, n)
	}
	return b
}

// only returns the one event in b, decoded.
func only(t *testing.T, b []byte) (fanotify.Event, fanotify.Info) {
	t.Helper()
	e, rest, err := fanotify.Next(b)
	if err != nil || len(rest) != 0 {
		t.Fatalf("Next left %d bytes, %v", len(rest), err)
	}
	var info fanotify.Info
	if err := e.Decode(&info); err != nil {
		t.Fatal(err)
	}
	return e, info
}

// wantFID checks a FID; an empty handle and name is one that is not there.
func wantFID(t *testing.T, what string, f *fanotify.FID, handle []byte, name string) {
	t.Helper()
	if !f.Present() {
		if handle != nil {
			t.Errorf("there is no %s", what)
		}
		return
	}
	if handle == nil || !bytes.Equal(f.Handle(), handle) || string(f.Name) != name || f.HandleType() != 0x81 ||
		f.FSID() != [2]int32{int32(binary.NativeEndian.Uint32([]byte("fsid"))), int32(binary.NativeEndian.Uint32([]byte("FSID")))} {
		t.Errorf("%s is %+v; want handle %x and name %q", what, f, handle, name)
	}
}

// TestMetadata: mask, descriptor and process are where the kernel puts them,
// bits that nobody knows included.
func TestMetadata(t *testing.T) {
	mask := uint64(unix.FAN_OPEN | unix.FAN_ONDIR | 1<<50)
	e, info := only(t, event(mask, 17, 4711))
	if e.Mask() != mask || e.FD() != 17 || e.PID() != 4711 || e.Overflow() || e.FDError() != 0 {
		t.Errorf("mask %#x, descriptor %d, process %d", e.Mask(), e.FD(), e.PID())
	}
	if info.PidFD != unix.FAN_NOPIDFD || info.Object.Present() || info.Dir.Present() {
		t.Errorf("records of an event without: %+v", info)
	}
	// Longer metadata is for a kernel to come; what it adds is skipped.
	b := event(mask, 17, 4711, make([]byte, 8), record(unix.FAN_EVENT_INFO_TYPE_PIDFD, words(9)))
	binary.NativeEndian.PutUint16(b[6:], 32)
	if _, info := only(t, b); info.PidFD != 9 {
		t.Errorf("the record behind longer metadata says %+v", info)
	}
}

// TestOverflow: it is the mask that says so, whatever the descriptor is.
func TestOverflow(t *testing.T) {
	for _, fd := range []int32{unix.FAN_NOFD, -int32(unix.EBADF)} {
		e, info := only(t, event(unix.FAN_Q_OVERFLOW, fd, 0, record(unix.FAN_EVENT_INFO_TYPE_PIDFD, words(0xfffffffd))))
		if !e.Overflow() || e.FDError() != 0 || info.PidFD != -3 {
			t.Errorf("descriptor %d: overflow %v, error %v, pidfd %d", fd, e.Overflow(), e.FDError(), info.PidFD)
		}
	}
}

// TestFDError: a negative descriptor is an errno, but -1 is none.
func TestFDError(t *testing.T) {
	for fd, want := range map[int32]unix.Errno{unix.FAN_NOFD: 0, 0: 0, 5: 0, -int32(unix.EMFILE): unix.EMFILE, -int32(unix.ENXIO): unix.ENXIO} {
		if e, _ := only(t, event(unix.FAN_OPEN, fd, 1)); e.FDError() != want {
			t.Errorf("descriptor %d: %v; want %v", fd, e.FDError(), want)
		}
	}
}

// TestRecords: every record that the kernel has, alone and all in one event,
// in any order, with handles of 0 to 128 bytes and names of 1 to 255 bytes.
func TestRecords(t *testing.T) {
	handles := [][]byte{{}, {1}, []byte("8 bytes."), bytes.Repeat([]byte{0}, 20), bytes.Repeat([]byte{0xff}, 127), bytes.Repeat([]byte("h"), 128)}
	names := []string{".", "x", "name", "not \xff UTF-8", strings.Repeat("n", 255)}
	for _, handle := range handles {
		for _, name := range names {
			records := [][]byte{
				fid(unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, handle, name),
				fid(unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, handle, name+"!"),
				fid(unix.FAN_EVENT_INFO_TYPE_DFID_NAME, handle, name+"?"),
				fid(unix.FAN_EVENT_INFO_TYPE_FID, handle, ""),
				record(99, []byte("unknown")),
				record(unix.FAN_EVENT_INFO_TYPE_PIDFD, words(12)),
				record(unix.FAN_EVENT_INFO_TYPE_ERROR, words(uint32(unix.EUCLEAN), 3)),
				record(unix.FAN_EVENT_INFO_TYPE_RANGE, append(words(0), longs(1<<40, 8192)...)),
				record(unix.FAN_EVENT_INFO_TYPE_MNT, append(words(0), longs(1<<33)...)),
			}
			for turn := range records {
				b := event(unix.FAN_RENAME, unix.FAN_NOFD, 1, append(records[turn:len(records):len(records)], records[:turn]...)...)
				if len(b) > fanotify.MaxEventSize {
					t.Fatalf("an event of %d bytes", len(b))
				}
				_, info := only(t, b)
				wantFID(t, "old directory", &info.OldDir, handle, name)
				wantFID(t, "new directory", &info.NewDir, handle, name+"!")
				wantFID(t, "directory", &info.Dir, handle, name+"?")
				wantFID(t, "object", &info.Object, handle, "")
				if info.PidFD != 12 || info.Errno != unix.EUCLEAN || info.ErrorCount != 3 ||
					!info.HasRange || info.Offset != 1<<40 || info.Count != 8192 || info.MountID != 1<<33 {
					t.Fatalf("the other records say %+v", info)
				}
			}
		}
	}
}

// TestDirectoryWithoutName: FAN_REPORT_DIR_FID without names.
func TestDirectoryWithoutName(t *testing.T) {
	_, info := only(t, event(unix.FAN_OPEN, unix.FAN_NOFD, 1, fid(unix.FAN_EVENT_INFO_TYPE_DFID, []byte("handle12"), "")))
	wantFID(t, "directory", &info.Dir, []byte("handle12"), "")
}

// TestMountRecordOfI386: a 32-bit kernel does not pad the header.
func TestMountRecordOfI386(t *testing.T) {
	_, info := only(t, event(unix.FAN_MNT_ATTACH, unix.FAN_NOFD, 1, record(unix.FAN_EVENT_INFO_TYPE_MNT, longs(77))))
	if info.MountID != 77 {
		t.Errorf("mount %d; want 77", info.MountID)
	}
}

// TestUnalignedEvents: several events of odd sizes are told apart, and each
// keeps to its own bytes.
func TestUnalignedEvents(t *testing.T) {
	var b []byte
	const n = 40
	for i := range n {
		b = append(b, event(unix.FAN_OPEN, int32(i), 1, record(200, bytes.Repeat([]byte{0xee}, i)))...)
	}
	for shift := range 8 {
		at := append(make([]byte, shift), b...)[shift:]
		seen := 0
		for len(at) > 0 {
			var e fanotify.Event
			var err error
			if e, at, err = fanotify.Next(at); err != nil {
				t.Fatal(err)
			}
			var info fanotify.Info
			if err := e.Decode(&info); err != nil || e.FD() != seen {
				t.Fatalf("event %d: descriptor %d, %v", seen, e.FD(), err)
			}
			seen++
		}
		if seen != n {
			t.Errorf("%d events; want %d", seen, n)
		}
	}
}

// TestOddEvents: an impossible length or another version ends the walk with an
// error that says what is there.
func TestOddEvents(t *testing.T) {
	odd := func(change func(b []byte) []byte) []byte { return change(event(unix.FAN_OPEN, 1, 2)) }
	for name, b := range map[string][]byte{
		"23 bytes":           odd(func(b []byte) []byte { return b[:23] }),
		"one byte":           {0},
		"length 0":           odd(func(b []byte) []byte { binary.NativeEndian.PutUint32(b, 0); return b }),
		"length 23":          odd(func(b []byte) []byte { binary.NativeEndian.PutUint32(b, 23); return b }),
		"beyond the buffer":  odd(func(b []byte) []byte { binary.NativeEndian.PutUint32(b, 25); return b }),
		"length 2^32-1":      odd(func(b []byte) []byte { binary.NativeEndian.PutUint32(b, 1<<32-1); return b }),
		"version 2":          odd(func(b []byte) []byte { b[4] = 2; return b }),
		"version of zeroes":  make([]byte, 24),
		"version and length": odd(func(b []byte) []byte { b[4] = 4; binary.NativeEndian.PutUint32(b, 0); return b }),
	} {
		_, rest, err := fanotify.Next(b)
		if err == nil || rest != nil {
			t.Errorf("%s: no error, %d bytes left", name, len(rest))
		}
		if is := errors.Is(err, errors.ErrUnsupported); is != strings.HasPrefix(name, "version") {
			t.Errorf("%s: %v: Is errors.ErrUnsupported: %v", name, err, is)
		}
	}
}

// TestOddRecords: an impossible record is an error of its event, which keeps
// what was read before; the next event can be read.
func TestOddRecords(t *testing.T) {
	length := func(n uint16, r []byte) []byte { binary.NativeEndian.PutUint16(r[2:], n); return r }
	handle := func(n uint32, r []byte) []byte { binary.NativeEndian.PutUint32(r[12:], n); return r }
	pidfd := record(unix.FAN_EVENT_INFO_TYPE_PIDFD, words(12))
	object := fid(unix.FAN_EVENT_INFO_TYPE_FID, []byte("handle12"), "")
	unended := record(unix.FAN_EVENT_INFO_TYPE_DFID_NAME, append(append([]byte("fsidFSID"), words(0, 1)...), "name"...))
	for name, odd := range map[string][]byte{
		"three bytes":            {1, 0, 4},
		"length 0":               length(0, bytes.Clone(pidfd)),
		"length 3":               length(3, bytes.Clone(pidfd)),
		"beyond the event":       length(9, bytes.Clone(pidfd)),
		"length 2^16-1":          length(1<<16-1, bytes.Clone(pidfd)),
		"handle beyond":          handle(9, bytes.Clone(object)),
		"handle of 2^32-1 bytes": handle(1<<32-1, bytes.Clone(object)),
		"short FID":              record(unix.FAN_EVENT_INFO_TYPE_FID, make([]byte, 15)),
		"short pidfd":            record(unix.FAN_EVENT_INFO_TYPE_PIDFD, make([]byte, 3)),
		"short error":            record(unix.FAN_EVENT_INFO_TYPE_ERROR, make([]byte, 7)),
		"short range":            record(unix.FAN_EVENT_INFO_TYPE_RANGE, make([]byte, 19)),
		"short mount":            record(unix.FAN_EVENT_INFO_TYPE_MNT, make([]byte, 7)),
		"a name without an end":  unended,
		"a second pidfd":         pidfd,
		"an object given twice":  append(bytes.Clone(object), object...),
	} {
		b := append(event(unix.FAN_OPEN, 5, 6, pidfd, odd), event(unix.FAN_CLOSE_WRITE, 7, 8)...)
		e, rest, err := fanotify.Next(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var info fanotify.Info
		if err := e.Decode(&info); err == nil || info.PidFD != 12 {
			t.Errorf("%s: error %v, pidfd %d; want an error, and 12", name, err, info.PidFD)
		}
		if next, _ := only(t, rest); next.FD() != 7 {
			t.Errorf("%s: the next event has the descriptor %d", name, next.FD())
		}
	}
	for _, size := range []uint16{0, 23, 25} {
		b := event(unix.FAN_OPEN, 5, 6)
		binary.NativeEndian.PutUint16(b[6:], size)
		e, _, err := fanotify.Next(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Decode(new(fanotify.Info)); err == nil {
			t.Errorf("metadata of %d bytes: no error", size)
		}
	}
}

// TestDecodeForgets: nothing of another event stays in an Info.
func TestDecodeForgets(t *testing.T) {
	_, info := only(t, event(unix.FAN_RENAME, unix.FAN_NOFD, 1,
		fid(unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, []byte("old"), "a"), record(unix.FAN_EVENT_INFO_TYPE_PIDFD, words(12)),
		record(unix.FAN_EVENT_INFO_TYPE_MNT, append(words(0), longs(7)...))))
	e, _ := only(t, event(unix.FAN_OPEN, 3, 1))
	if err := e.Decode(&info); err != nil || fmt.Sprint(info) != fmt.Sprint(fanotify.Info{PidFD: unix.FAN_NOPIDFD}) {
		t.Errorf("%v, %+v", err, info)
	}
}

// TestNothingIsAllocated: the reader of a busy group pays for its events alone.
func TestNothingIsAllocated(t *testing.T) {
	b := event(unix.FAN_OPEN, unix.FAN_NOFD, 1, fid(unix.FAN_EVENT_INFO_TYPE_DFID_NAME, []byte("handle12"), "name"))
	b = append(b, b...)
	var info fanotify.Info
	n := testing.AllocsPerRun(100, func() {
		for at := b; len(at) > 0; {
			var e fanotify.Event
			var err error
			if e, at, err = fanotify.Next(at); err != nil {
				t.Fatal(err)
			}
			if err := e.Decode(&info); err != nil {
				t.Fatal(err)
			}
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
