package fusewire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// message returns a request with its length set.
func message(opcode uint32, node uint64, body ...byte) []byte {
	m := make([]byte, InHeaderSize, InHeaderSize+len(body))
	m = append(m, body...)
	order.PutUint32(m, uint32(len(m)))
	order.PutUint32(m[4:], opcode)
	order.PutUint64(m[8:], 4711)
	order.PutUint64(m[16:], node)
	order.PutUint32(m[24:], 1000)
	order.PutUint32(m[28:], 1001)
	order.PutUint32(m[32:], 1002)
	return m
}

func TestDecodeInHeader(t *testing.T) {
	m := message(Lookup, 1, []byte("name\x00\x00\x00\x00extension")...)
	order.PutUint16(m[36:], 1)
	h, err := DecodeInHeader(m)
	want := InHeader{Len: uint32(len(m)), Opcode: Lookup, Unique: 4711, NodeID: 1, UID: 1000, GID: 1001, PID: 1002, ExtLen: 8}
	if h != want || err != nil {
		t.Errorf("%+v, %v; want %+v", h, err, want)
	}
	for name, bad := range map[string][]byte{
		"nothing":             nil,
		"less than a header":  m[:39],
		"cut short":           m[:len(m)-1],
		"longer than it says": append(bytes.Clone(m), 0),
		"extensions too long": func() []byte { b := bytes.Clone(m); order.PutUint16(b[36:], 9); return b }(),
	} {
		if _, err := DecodeInHeader(bad); !errors.Is(err, ErrMessage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPutOutHeader(t *testing.T) {
	var h [OutHeaderSize]byte
	PutOutHeader(&h, 16, 2, 1<<63|5)
	if order.Uint32(h[:]) != 16 || int32(order.Uint32(h[4:])) != -2 || order.Uint64(h[8:]) != 1<<63|5 {
		t.Errorf("% x", h)
	}
	PutNotifyHeader(&h, 40, CodeInvalInode)
	if order.Uint32(h[:]) != 40 || order.Uint32(h[4:]) != 2 || order.Uint64(h[8:]) != 0 {
		t.Errorf("% x", h)
	}
}

// Each kernel has its own length of INIT.
func TestDecodeInit(t *testing.T) {
	word := func(list ...uint32) (b []byte) {
		for _, w := range list {
			b = order.AppendUint32(b, w)
		}
		return b
	}
	for _, c := range []struct {
		name string
		body []byte
		want InitIn
	}{
		{"of the first kernels", word(7, 1), InitIn{7, 1, 0, 0}},
		{"without a second half", word(7, 31, 131072, 0x3fffffff), InitIn{7, 31, 131072, 0x3fffffff}},
		{"with a second half", append(word(7, 36, 131072, flagInitExt|1, 5), make([]byte, 44)...), InitIn{7, 36, 131072, 5<<32 | flagInitExt | 1}},
		{"with one that does not count", append(word(7, 36, 131072, 1, 5), make([]byte, 44)...), InitIn{7, 36, 131072, 1}},
		{"announced and missing", word(7, 36, 131072, flagInitExt|1), InitIn{7, 36, 131072, 1}},
	} {
		if in, err := DecodeInit(c.body); in != c.want || err != nil {
			t.Errorf("%s: %+v, %v; want %+v", c.name, in, err, c.want)
		}
	}
	if _, err := DecodeInit(word(7)); !errors.Is(err, ErrMessage) {
		t.Errorf("too short: %v", err)
	}
}

// The answer to INIT has the length that the kernel of that version takes.
func TestInitOut(t *testing.T) {
	out := InitOut{
		Major: 7, Minor: 31, MaxReadahead: 1, Flags: 3<<32 | 2, MaxBackground: 4, CongestionThreshold: 5,
		MaxWrite: 6, TimeGran: 7, MaxPages: 8, RequestTimeout: 9,
	}
	for minor, size := range map[uint32]int{0: 8, 4: 8, 5: 24, 22: 24, 23: 64, 31: 64, 99: 64} {
		if b := out.Append([]byte("x"), minor); len(b) != 1+size || b[0] != 'x' {
			t.Errorf("7.%d: %d bytes; want %d", minor, len(b)-1, size)
		}
	}
	b := out.Append(nil, 45)
	got := []uint32{}
	for i := 0; i < 48; i += 4 {
		got = append(got, order.Uint32(b[i:]))
	}
	two := func(low, high uint16) uint32 {
		return binary.NativeEndian.Uint32(order.AppendUint16(order.AppendUint16(nil, low), high))
	}
	want := []uint32{7, 31, 1, 2, two(4, 5), 6, 7, two(8, 0), 3, 0, two(9, 0), 0}
	if !slices.Equal(got, want) {
		t.Errorf("%v; want %v", got, want)
	}
}

func TestDecodeInterrupt(t *testing.T) {
	if unique, err := DecodeInterrupt(order.AppendUint64(nil, 77)); unique != 77 || err != nil {
		t.Errorf("%d, %v", unique, err)
	}
	if _, err := DecodeInterrupt(make([]byte, 7)); !errors.Is(err, ErrMessage) {
		t.Errorf("too short: %v", err)
	}
}

// batch returns a BATCH_FORGET of pairs of a node and how often it was looked
// up.
func batch(pairs ...uint64) []byte {
	body := order.AppendUint32(nil, uint32(len(pairs)/2))
	body = order.AppendUint32(body, 0)
	for _, n := range pairs {
		body = order.AppendUint64(body, n)
	}
	return message(BatchForget, 0, body...)
}

func TestDropForget(t *testing.T) {
	one := message(Forget, 9, order.AppendUint64(nil, 3)...)
	if rest, n, err := DropForget(bytes.Clone(one), 9); rest != nil || n != 3 || err != nil {
		t.Errorf("the node: % x, %d, %v", rest, n, err)
	}
	if rest, n, err := DropForget(bytes.Clone(one), 8); !bytes.Equal(rest, one) || n != 0 || err != nil {
		t.Errorf("another node: % x, %d, %v", rest, n, err)
	}
	for _, c := range []struct {
		in, want []byte
		lookups  uint64
	}{
		{batch(1, 2, 3, 4), batch(1, 2, 3, 4), 0},
		{batch(9, 2, 3, 4), batch(3, 4), 2},
		{batch(3, 4, 9, 1, 5, 6, 9, 1), batch(3, 4, 5, 6), 2},
		{batch(9, 7), nil, 7},
		{batch(), batch(), 0},
	} {
		rest, n, err := DropForget(bytes.Clone(c.in), 9)
		if !bytes.Equal(rest, c.want) || n != c.lookups || err != nil {
			t.Errorf("% x\nbecomes % x, %d, %v\nwant % x, %d", c.in, rest, n, err, c.want, c.lookups)
		}
	}
	short := batch(9, 1)
	order.PutUint32(short[InHeaderSize:], 2)
	for name, bad := range map[string][]byte{
		"a count that is too high": short,
		"no count":                 message(BatchForget, 0),
		"no lookups":               message(Forget, 9),
		"another request":          message(Lookup, 9),
		"no message":               nil,
	} {
		if rest, n, err := DropForget(bytes.Clone(bad), 9); !errors.Is(err, ErrMessage) || n != 0 || !bytes.Equal(rest, bad) {
			t.Errorf("%s: % x, %d, %v", name, rest, n, err)
		}
	}
}

// The sizes are those of the structures in include/uapi/linux/fuse.h, which the
// kernel compares.
func TestSizes(t *testing.T) {
	for name, c := range map[string]struct{ got, want int }{
		"entry":       {len(AppendEntry(nil, 1, &Attr{})), 128},
		"attr":        {len(AppendAttr(nil, &Attr{})), 104},
		"open":        {len(AppendOpen(nil, 1, 0)), 16},
		"poll":        {len(AppendPoll(nil, 1)), 8},
		"inval_inode": {len(AppendInvalInode(nil, 1, 2, 3)), 24},
		"inval_entry": {len(AppendInvalEntry(nil, 1, "name", 0)), 16 + 5},
		"delete":      {len(AppendDelete(nil, 1, 2, "name")), 24 + 5},
		"store":       {len(AppendStore(nil, 1, 2, 3)), 24},
		"retrieve":    {len(AppendRetrieve(nil, 1, 2, 3, 4)), 32},
		"prune":       {len(AppendPrune(nil, []uint64{1, 2})), 16 + 16},
	} {
		if c.got != c.want {
			t.Errorf("%s has %d bytes; want %d", name, c.got, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	f.Add(message(Lookup, 1, []byte("name\x00")...))
	f.Add(message(Init, 0, bytes.Repeat([]byte{7, 0, 0, 0}, 16)...))
	f.Add(message(Interrupt, 0, order.AppendUint64(nil, 5)...))
	f.Fuzz(func(t *testing.T, m []byte) {
		before := bytes.Clone(m)
		h, err := DecodeInHeader(m)
		if err == nil && (int(h.Len) != len(m) || h.ExtLen > len(m)-InHeaderSize) {
			t.Errorf("%+v of %d bytes", h, len(m))
		}
		if len(m) >= InHeaderSize {
			DecodeInit(m[InHeaderSize:])
			DecodeInterrupt(m[InHeaderSize:])
		}
		if !bytes.Equal(m, before) {
			t.Error("the message was changed")
		}
	})
}

func FuzzDropForget(f *testing.F) {
	f.Add(message(Forget, 9, order.AppendUint64(nil, 3)...), uint64(9))
	f.Add(batch(1, 2, 9, 4, 5, 6), uint64(9))
	f.Add(batch(9, 1), uint64(9))
	f.Add(batch(), uint64(0))
	extended := append(batch(1, 2, 9, 4, 5, 6), 1, 2, 3, 4, 5, 6, 7, 8)
	order.PutUint32(extended, uint32(len(extended)))
	order.PutUint16(extended[36:], 1) // total_extlen, in 8 bytes
	f.Add(extended, uint64(9))
	f.Fuzz(func(t *testing.T, input []byte, node uint64) {
		before, m := input, bytes.Clone(input) // which DropForget changes
		rest, lookups, err := DropForget(m, node)
		if err != nil || lookups == 0 && bytes.Equal(rest, before) {
			if !bytes.Equal(rest, before) {
				t.Error("an error has changed the message")
			}
			return
		}
		if rest == nil {
			return
		}
		// What is left is a message of its own, without the node.
		h, err := DecodeInHeader(rest)
		if err != nil || h.Opcode != BatchForget {
			t.Fatalf("%+v, %v", h, err)
		}
		count := int(order.Uint32(rest[InHeaderSize:]))
		if InHeaderSize+8+16*count+h.ExtLen != len(rest) {
			t.Errorf("%d entries in %d bytes", count, len(rest))
		}
		for i := range count {
			if order.Uint64(rest[InHeaderSize+8+16*i:]) == node {
				t.Error("the node is there")
			}
		}
	})
}
