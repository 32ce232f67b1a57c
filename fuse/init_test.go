package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
)

// What kernel and server agree on is what both have, and never more than the
// kernel allows.
func TestNegotiate(t *testing.T) {
	page := uint32(os.Getpagesize())
	all := uint64(1<<43 - 1)
	for _, c := range []struct {
		name   string
		in     fusewire.InitIn
		config Config
		limit  int
		want   State
	}{
		{
			"the defaults on a kernel that has everything",
			fusewire.InitIn{Major: 7, Minor: 45, MaxReadahead: 131072, Flags: all},
			Config{},
			256,
			State{Major: 7, Minor: 45, Flags: DefaultInitFlags | always, MaxWrite: min(1<<20, 256*page), MaxReadahead: 131072, MaxPages: uint16(min(1<<20/page, 256))},
		},
		{
			"a kernel of a later version",
			fusewire.InitIn{Major: 7, Minor: 99, MaxReadahead: 1, Flags: all},
			Config{MaxWrite: 8 * page, MaxReadahead: 5},
			256,
			State{Major: 7, Minor: 45, Flags: DefaultInitFlags | always, MaxWrite: 8 * page, MaxReadahead: 1, MaxPages: 8},
		},
		{
			"an old kernel",
			fusewire.InitIn{Major: 7, Minor: 22, MaxReadahead: 65536, Flags: uint64(InitAsyncRead | InitBigWrites)},
			Config{MaxReadahead: 4096},
			256,
			State{Major: 7, Minor: 22, Flags: InitAsyncRead | InitBigWrites, MaxWrite: 32 * page, MaxReadahead: 4096, MaxPages: 0},
		},
		{
			"a limit below what is asked for",
			fusewire.InitIn{Major: 7, Minor: 45, Flags: all},
			Config{MaxWrite: 1 << 24},
			300,
			State{Major: 7, Minor: 45, Flags: DefaultInitFlags | always, MaxWrite: 300 * page, MaxReadahead: 0, MaxPages: 300},
		},
		{
			"a limit that makes no sense",
			fusewire.InitIn{Major: 7, Minor: 45, Flags: all},
			Config{},
			0,
			State{Major: 7, Minor: 45, Flags: DefaultInitFlags | always, MaxWrite: page, MaxReadahead: 0, MaxPages: 1},
		},
		{
			"not a whole number of pages",
			fusewire.InitIn{Major: 7, Minor: 45, Flags: all},
			Config{MaxWrite: page + 1},
			256,
			State{Major: 7, Minor: 45, Flags: DefaultInitFlags | always, MaxWrite: page + 1, MaxReadahead: 0, MaxPages: 2},
		},
		{
			"flags of the upper half, some of which the kernel does not have",
			fusewire.InitIn{Major: 7, Minor: 38, Flags: uint64(InitInitExt | InitMaxPages | InitHasExpireOnly)},
			Config{InitFlags: InitHasExpireOnly | InitHasResend, MaxWrite: page},
			256,
			State{Major: 7, Minor: 38, Flags: InitInitExt | InitMaxPages | InitHasExpireOnly, MaxWrite: page, MaxReadahead: 0, MaxPages: 1},
		},
		{
			"a request timeout",
			fusewire.InitIn{Major: 7, Minor: 45, Flags: all},
			Config{RequestTimeout: 60, MaxWrite: page},
			256,
			State{Major: 7, Minor: 45, Flags: DefaultInitFlags | always | InitRequestTimeout, MaxWrite: page, MaxReadahead: 0, MaxPages: 1},
		},
	} {
		out, state := negotiate(&c.in, &c.config, c.limit)
		if !reflect.DeepEqual(state, c.want) {
			t.Errorf("%s:\n%+v; want\n%+v", c.name, state, c.want)
		}
		if out.Flags != uint64(state.Flags) || out.MaxWrite != state.MaxWrite || out.MaxPages != state.MaxPages ||
			out.Minor != state.Minor || out.MaxReadahead != state.MaxReadahead || out.TimeGran != 1 {
			t.Errorf("%s: the answer is %+v", c.name, out)
		}
		if timeout := c.config.RequestTimeout; out.RequestTimeout != timeout {
			t.Errorf("%s: timeout %d; want %d", c.name, out.RequestTimeout, timeout)
		}
	}
	in := fusewire.InitIn{Major: 7, Minor: 45, Flags: all}
	for _, c := range []struct{ background, threshold, want uint16 }{{0, 0, 0}, {100, 0, 75}, {65535, 0, 49151}, {100, 20, 20}} {
		out, _ := negotiate(&in, &Config{MaxBackground: c.background, CongestionThreshold: c.threshold, TimeGran: 1000}, 256)
		if out.MaxBackground != c.background || out.CongestionThreshold != c.want || out.TimeGran != 1000 {
			t.Errorf("%+v: %+v", c, out)
		}
	}
}

var order = binary.NativeEndian

// kernel stands for a kernel: the other end of a connection that keeps messages
// apart.
func kernel(t *testing.T) (*Session, int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := newSession(Config{MountPoint: "/fake"}, &place{})
	if _, err := s.serve(pair[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		unix.Close(pair[1])
	})
	return s, pair[1]
}

// message returns a request.
func message(opcode Opcode, unique uint64, words ...uint32) []byte {
	b := make([]byte, fusewire.InHeaderSize, 256)
	for _, w := range words {
		b = order.AppendUint32(b, w)
	}
	order.PutUint32(b, uint32(len(b)))
	order.PutUint32(b[4:], uint32(opcode))
	order.PutUint64(b[8:], unique)
	return b
}

// A kernel with a higher version is asked for another INIT; one with a lower
// version, and what is no INIT, is refused.
func TestAnswerInit(t *testing.T) {
	send := func(t *testing.T, fd int, b []byte) {
		t.Helper()
		if _, err := unix.Write(fd, b); err != nil {
			t.Fatal(err)
		}
	}
	answer := func(t *testing.T, fd int) (errno int32, body []byte) {
		t.Helper()
		b := make([]byte, 512)
		n, err := unix.Read(fd, b)
		if err != nil || n < 16 {
			t.Fatalf("%d bytes, %v", n, err)
		}
		return int32(order.Uint32(b[4:])), b[16:n]
	}
	read := func(s *Session) func() (*Request, error) {
		return func() (*Request, error) { return s.device.next(t.Context()) }
	}
	t.Run("higher", func(t *testing.T) {
		s, fd := kernel(t)
		send(t, fd, message(OpInit, 2, 8, 3, 4096, 1))
		send(t, fd, message(OpInit, 4, 7, 50, 4096, 1))
		if err := s.answerInit(read(s)); err != nil {
			t.Fatal(err)
		}
		if errno, body := answer(t, fd); errno != 0 || len(body) != 8 || order.Uint32(body) != 7 {
			t.Errorf("to version 8: %d, % x", errno, body)
		}
		if errno, body := answer(t, fd); errno != 0 || len(body) != 64 || order.Uint32(body[4:]) != protocolMinor {
			t.Errorf("to version 7: %d, % x", errno, body)
		}
		if s.State().Minor != protocolMinor || len(s.InitRequest()) != 56 {
			t.Errorf("%+v, %d bytes", s.State(), len(s.InitRequest()))
		}
	})
	t.Run("lower", func(t *testing.T) {
		s, fd := kernel(t)
		send(t, fd, message(OpInit, 2, 6, 3, 4096, 1))
		if err := s.answerInit(read(s)); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "6.3") {
			t.Errorf("%v", err)
		}
		if errno, _ := answer(t, fd); errno != -int32(unix.EPROTO) {
			t.Errorf("answer %d", errno)
		}
	})
	t.Run("short", func(t *testing.T) {
		s, fd := kernel(t)
		send(t, fd, message(OpInit, 2, 7))
		if err := s.answerInit(read(s)); !errors.Is(err, fusewire.ErrMessage) {
			t.Errorf("%v", err)
		}
	})
	t.Run("another request", func(t *testing.T) {
		s, fd := kernel(t)
		send(t, fd, message(OpLookup, 2, 7))
		if err := s.answerInit(read(s)); err == nil || !strings.Contains(err.Error(), "the first request is lookup") {
			t.Errorf("%v", err)
		}
	})
	t.Run("no message", func(t *testing.T) {
		s, fd := kernel(t)
		send(t, fd, []byte("short"))
		if err := s.answerInit(read(s)); !errors.Is(err, fusewire.ErrMessage) || !strings.Contains(err.Error(), "/fake") {
			t.Errorf("%v", err)
		}
	})
}

// Every flag and opcode that is known has a name of its own, and what is not is
// a number.
func TestNames(t *testing.T) {
	if n := len(initFlagNames); n != 43 {
		t.Errorf("%d names of flags", n)
	}
	seen := map[string]bool{}
	for i := range 43 {
		if name := InitFlags(1 << i).String(); seen[name] {
			t.Errorf("%s twice", name)
		} else {
			seen[name] = true
		}
	}
	if s := InitFlags(1<<31 | 1<<63 | 1).String(); s != "async_read|0x80000000|0x8000000000000000" {
		t.Error(s)
	}
	if s := InitFlags(0).String(); s != "none" {
		t.Error(s)
	}
	for _, o := range []Opcode{0, 7, 19, 54, 1 << 31} {
		if want := fmt.Sprint("opcode_", uint32(o)); o.String() != want {
			t.Errorf("%v; want %s", o, want)
		}
	}
	for via, want := range map[Via]string{ViaAuto: "auto", ViaMount: "mount", ViaHelper: "helper", 9: "unknown"} {
		if via.String() != want {
			t.Errorf("%v; want %s", via, want)
		}
	}
	if refused := InitFlags(passedOn) & (InitPassthrough | InitOverIOUring | InitMapAlignment | InitHasInodeDAX); refused != 0 {
		t.Errorf("%v may be asked for", refused)
	}
	if n := bits.OnesCount64(uint64(passedOn)); n != 43-5 {
		t.Errorf("%d flags may be asked for", n)
	}
}

// The helper gets every option as a word that it knows.
func TestHelperWords(t *testing.T) {
	for _, c := range []struct {
		config Config
		want   string
	}{
		{Config{}, `fsname=kernstream,nosuid,nodev,noatime,default_permissions`},
		{
			Config{FSName: `a,b\c`, Subtype: "s", ReadOnly: true, AllowOther: true, NoDefaultPermissions: true, AutoUnmount: true},
			`fsname=a\,b\\c,ro,nosuid,nodev,noatime,subtype=s,allow_other,auto_unmount`,
		},
		{
			Config{Options: []string{"suid", "dev", "noexec", "atime", "sync", "max_read=4096"}},
			`fsname=kernstream,noexec,sync,suid,dev,max_read=4096,default_permissions`,
		},
	} {
		if got := escaped(c.config.options().words); got != c.want {
			t.Errorf("%+v:\n%s; want\n%s", c.config, got, c.want)
		}
	}
}

// A probe's node in what the kernel forgets is not for the server, the others
// are.
func TestProbeIsForgotten(t *testing.T) {
	s, fd := kernel(t)
	s.probe.node = probeNode
	s.probe.lookups.Store(3)
	forget := func(node uint64, lookups uint32) []byte {
		m := message(OpForget, 0, 0, 0)
		order.PutUint64(m[16:], node)
		order.PutUint64(m[40:], uint64(lookups))
		return m
	}
	batch := message(OpBatchForget, 0, 2, 0)
	for _, n := range []uint64{probeNode, 1, 5, 1} {
		batch = order.AppendUint64(batch, n)
	}
	order.PutUint32(batch, uint32(len(batch)))
	for _, m := range [][]byte{forget(probeNode, 1), forget(4, 1), batch, forget(probeNode, 1), forget(probeNode, 1)} {
		if _, err := unix.Write(fd, m); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for range 3 {
		r, err := s.device.next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(r.Header.Opcode, r.Header.NodeID, r.Header.Len, len(r.Body)))
		r.Close()
	}
	// The last one is the server's: the kernel had forgotten the probe by then.
	want := []string{"forget 4 48 8", "batch_forget 0 64 24", fmt.Sprint("forget ", uint64(probeNode), " 48 8")}
	if strings.Join(got, ";") != strings.Join(want, ";") {
		t.Errorf("%q; want %q", got, want)
	}
}
