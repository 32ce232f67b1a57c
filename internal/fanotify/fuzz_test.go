package fanotify_test

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
)

// FuzzEvents: no bytes make the decoder panic or loop. The events that it tells
// apart are the buffer, byte for byte; what an event's records say can be
// written again as records that say the same.
//
// The files named linux are a kernel's own bytes.
func FuzzEvents(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		for size := 0; len(b) > 0; b = b[size:] {
			e, rest, err := fanotify.Next(b)
			if err != nil {
				return
			}
			size = int(binary.NativeEndian.Uint32(b))
			if len(rest) != len(b)-size || size < 24 {
				t.Fatalf("an event of %d bytes leaves %d of %d", size, len(rest), len(b))
			}
			var info fanotify.Info
			if err := e.Decode(&info); err != nil {
				continue
			}
			if e.FDError() != 0 && e.FD() >= 0 {
				t.Errorf("descriptor %d with the error %v", e.FD(), e.FDError())
			}
			again, infoAgain := only(t, event(e.Mask(), int32(e.FD()), int32(e.PID()), encode(&info)...))
			if again.Mask() != e.Mask() || again.FD() != e.FD() || again.PID() != e.PID() || !reflect.DeepEqual(infoAgain, info) {
				t.Errorf("got   %+v\nagain %+v", info, infoAgain)
			}
		}
	})
}

// encode returns records that say what info says.
func encode(info *fanotify.Info) (records [][]byte) {
	for _, f := range []struct {
		fid            *fanotify.FID
		named, unnamed byte
	}{
		{&info.OldDir, unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, 0},
		{&info.NewDir, unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, 0},
		{&info.Dir, unix.FAN_EVENT_INFO_TYPE_DFID_NAME, unix.FAN_EVENT_INFO_TYPE_DFID},
		{&info.Object, 0, unix.FAN_EVENT_INFO_TYPE_FID},
	} {
		if !f.fid.Present() {
			continue
		}
		if f.fid.Name == nil {
			records = append(records, record(f.unnamed, f.fid.Key))
		} else {
			records = append(records, record(f.named, append(append(bytes.Clone(f.fid.Key), f.fid.Name...), 0)))
		}
	}
	if info.PidFD != unix.FAN_NOPIDFD {
		records = append(records, record(unix.FAN_EVENT_INFO_TYPE_PIDFD, words(uint32(info.PidFD))))
	}
	if info.Errno != 0 || info.ErrorCount != 0 {
		records = append(records, record(unix.FAN_EVENT_INFO_TYPE_ERROR, words(uint32(info.Errno), info.ErrorCount)))
	}
	if info.HasRange {
		records = append(records, record(unix.FAN_EVENT_INFO_TYPE_RANGE, append(words(0), longs(info.Offset, info.Count)...)))
	}
	if info.MountID != 0 {
		records = append(records, record(unix.FAN_EVENT_INFO_TYPE_MNT, append(words(0), longs(info.MountID)...)))
	}
	return records
}
