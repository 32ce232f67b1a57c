package statmount_test

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/kernstream/kernstream/internal/statmount"
)

// FuzzDecode: no bytes make the decoder panic, nor what makes the text of
// mountinfo from its result. What it returns lies within the reply, each text up
// to its NUL, and what stands behind the reply does not matter.
//
// The files named linux are a kernel's own bytes.
func FuzzDecode(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		var m statmount.Mount
		if err := m.Decode(b); err != nil {
			return
		}
		size := binary.NativeEndian.Uint32(b)
		start, texts := uintptr(unsafe.Pointer(unsafe.SliceData(b))), 0
		for _, text := range [][]byte{m.Options, m.Type, m.Root, m.Point, m.Subtype, m.Source} {
			if text == nil {
				continue
			}
			texts++
			offset := uintptr(unsafe.Pointer(unsafe.SliceData(text))) - start
			end := offset + uintptr(len(text))
			if offset < 512 || end >= uintptr(size) || b[end] != 0 || bytes.IndexByte(text, 0) >= 0 || cap(text) != len(text) {
				t.Errorf("text %q, capacity %d, at %d of a reply of %d", text, cap(text), offset, size)
			}
		}
		bits := 0
		for _, bit := range []statmount.Mask{
			statmount.MountOptions, statmount.FSType, statmount.MountRoot, statmount.MountPoint, statmount.FSSubtype, statmount.SuperSource,
		} {
			if m.Mask&bit != 0 {
				bits++
			}
		}
		if texts != bits {
			t.Errorf("%d texts, mask %#x", texts, m.Mask)
		}

		cut := slices.Clip(b[:size])
		var again statmount.Mount
		if err := again.Decode(cut); err != nil || !reflect.DeepEqual(again, m) {
			t.Errorf("without what is behind it: %v\n%+v, want\n%+v", err, again, m)
		}

		options, super := appended(t, m.AppendOptions), appended(t, m.AppendSuperOptions)
		for _, list := range []string{options, super} {
			if access, _, _ := strings.Cut(list, ","); access != "rw" && access != "ro" {
				t.Errorf("options %q", list)
			}
		}
		if !strings.HasSuffix(super, string(m.Options)) {
			t.Errorf("options %q without %q", super, m.Options)
		}
		if fsType := appended(t, m.AppendType); !strings.HasPrefix(fsType, string(m.Type)) || !strings.HasSuffix(fsType, string(m.Subtype)) {
			t.Errorf("type %q of %q and %q", fsType, m.Type, m.Subtype)
		}
		for _, field := range m.Optional() {
			tag, number, ok := strings.Cut(field, ":")
			if ok == (tag == "unbindable") || ok && number == "" {
				t.Errorf("optional field %q", field)
			}
		}
	})
}
