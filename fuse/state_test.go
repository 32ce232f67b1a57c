package fuse_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What was agreed on holds: a WRITE is as large as was asked for, and no larger,
// and the buffer is large enough for it.
func TestMaxWrite(t *testing.T) {
	for _, size := range []uint32{4096, 64 << 10, 128 << 10, 1 << 20} {
		l := newLab(t, &fuse.Config{MaxWrite: size})
		state := l.s.State()
		if state.Major != 7 || state.MaxWrite != size || !state.Flags.Has(fuse.InitBigWrites|fuse.InitAbortError) {
			t.Errorf("%+v", state)
		}
		var largest atomic.Int64
		l.serve(func(r *fuse.Request) {
			switch r.Header.Opcode {
			case fuse.OpWrite:
				largest.Store(max(largest.Load(), int64(len(r.Body)-40)))
			case fuse.OpOpen:
				const directIO = 1
				r.Reply(fusewire.AppendOpen(nil, 1, directIO))
				return
			}
			basic(r)
		})
		c := newClient(t)
		if text, err := c.ask("write", l.path(fileName), "2097152"); text != "2097152" || err != nil {
			t.Errorf("%s, %v", text, err)
		}
		if most := largest.Load(); most != int64(size) {
			t.Errorf("the largest WRITE has %d bytes; want %d", most, size)
		}
		l.s.Close()
	}
}

// What is asked for at the start is what the kernel does.
func TestStartNumbers(t *testing.T) {
	l := newLab(t, &fuse.Config{MaxReadahead: 64 << 10, MaxBackground: 7, CongestionThreshold: 5, RequestTimeout: 3600})
	state := l.s.State()
	if state.Minor < 31 || state.Minor > 45 || state.MaxReadahead != 64<<10 || int(state.MaxPages)*os.Getpagesize() < int(state.MaxWrite) {
		t.Errorf("%+v", state)
	}
	if got, want := state.Flags.Has(fuse.InitRequestTimeout), testenv.KernelAtLeast(6, 18); got != want {
		t.Errorf("a timeout of requests: %t; want %t", got, want)
	}

	testenv.NeedRoot(t, "fusectl")
	mounts, err := kernstream.Mounts(&kernstream.MountOptions{Filter: func(m *kernstream.Mount) bool { return m.MountPoint == l.dir }})
	if err != nil || len(mounts) != 1 {
		t.Fatalf("%d mounts, %v", len(mounts), err)
	}
	control := t.TempDir()
	testenv.Mount(t, "fusectl", control, "fusectl", 0, "")
	defer testenv.Unmount(t, control)
	for name, want := range map[string]string{"max_background": "7\n", "congestion_threshold": "5\n"} {
		path := filepath.Join(control, fmt.Sprint(mounts[0].Minor), name)
		if got, err := os.ReadFile(path); string(got) != want || err != nil {
			t.Errorf("%s is %q, %v; want %q", name, got, err, want)
		}
	}
}

// A request that does not fit is refused by the kernel, and the next one comes.
func TestRequestLargerThanTheBuffer(t *testing.T) {
	l := newLab(t, &fuse.Config{MaxWrite: 4096})
	l.serve(func(r *fuse.Request) {
		if r.Header.Opcode == fuse.OpSetxattr {
			r.Reply()
			return
		}
		basic(r)
	})
	c := newClient(t)
	if err := c.do("setxattr", l.path(fileName), "60000"); err != unix.E2BIG {
		t.Errorf("setxattr of 60,000 bytes: %v; want E2BIG", err)
	}
	if err := c.do("setxattr", l.path(fileName), "100"); err != nil {
		t.Errorf("setxattr of 100 bytes: %v", err)
	}
}

// The kernel's INIT is there for who wants to know what it offered.
func TestInitRequest(t *testing.T) {
	l := newLab(t, nil)
	message := l.s.InitRequest()
	h, err := fusewire.DecodeInHeader(message)
	if err != nil || h.Opcode != uint32(fuse.OpInit) {
		t.Fatalf("%+v, %v", h, err)
	}
	in, err := fusewire.DecodeInit(message[fusewire.InHeaderSize:])
	if err != nil || in.Major != 7 || !fuse.InitFlags(in.Flags).Has(l.s.State().Flags) {
		t.Errorf("%+v, %v", in, err)
	}
	clear(message)
	if bytes.Equal(message, l.s.InitRequest()) {
		t.Error("the same memory each time")
	}
}

// What a successor must know of a session is in its State, in the kernel's words.
func TestStateForSuccessor(t *testing.T) {
	l := newLab(t, nil)
	state := l.s.State()
	if !bytes.Equal(state.InitRequest, l.s.InitRequest()) {
		t.Errorf("the INIT is %x; want %x", state.InitRequest, l.s.InitRequest())
	}
	// The probe of Mount had a file looked up, and may have been told to forget it.
	if state.ProbeLookups < 0 || state.ProbeLookups > 1 {
		t.Errorf("%d references on what Mount looked up", state.ProbeLookups)
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, l.dir, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		t.Fatal(err)
	}
	want := fuse.MountID{ID: uint32(st.Mnt_id), Minor: st.Dev_minor}
	if err := unix.Statx(unix.AT_FDCWD, l.dir, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID_UNIQUE, &st); err != nil {
		t.Fatal(err)
	}
	if testenv.KernelAtLeast(6, 8) {
		want.Unique = st.Mnt_id
	}
	if state.Mount != want || state.Mount.Unique != want.Unique || state.Mount.ID == 0 || state.Mount.Minor == 0 {
		t.Errorf("the mount is %+v; want %+v", state.Mount, want)
	}
}

// What a session was is known after its end.
func TestStateAfterClose(t *testing.T) {
	l := newLab(t, &fuse.Config{FSName: "x"})
	before := l.s.State()
	l.s.Close()
	if !reflect.DeepEqual(l.s.State(), before) || l.s.Config().FSName != "x" || len(l.s.InitRequest()) == 0 {
		t.Error("State, Config or InitRequest are gone after Close")
	}
	if err := l.s.NotifyResend(); err == nil || errors.Is(err, unix.EBADF) {
		t.Errorf("a notification after Close: %v", err)
	}
}
