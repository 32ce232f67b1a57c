package fusewire

import "fmt"

// InitIn is what the kernel says at the start of a connection (struct
// fuse_init_in).
type InitIn struct {
	Major, Minor uint32
	MaxReadahead uint32
	Flags        uint64 // with flags2 as the high half, if the kernel has that
}

// flagInitExt says that there is a second half of the flags.
const flagInitExt = 1 << 30

// DecodeInit reads the body of an INIT request, which is longer in newer
// kernels. A kernel that announces the second half of the flags without sending
// it is taken not to have it.
func DecodeInit(body []byte) (in InitIn, err error) {
	if len(body) < 8 {
		return in, fmt.Errorf("%w: INIT with %d bytes", ErrMessage, len(body))
	}
	in.Major, in.Minor = order.Uint32(body), order.Uint32(body[4:])
	if len(body) < 16 {
		return in, nil
	}
	in.MaxReadahead = order.Uint32(body[8:])
	in.Flags = uint64(order.Uint32(body[12:]))
	if in.Flags&flagInitExt != 0 {
		if len(body) < 20 {
			in.Flags &^= flagInitExt
		} else {
			in.Flags |= uint64(order.Uint32(body[16:])) << 32
		}
	}
	return in, nil
}

// InitOut is the answer to INIT (struct fuse_init_out).
type InitOut struct {
	Major, Minor        uint32
	MaxReadahead        uint32
	Flags               uint64
	MaxBackground       uint16
	CongestionThreshold uint16
	MaxWrite            uint32
	TimeGran            uint32 // nanoseconds
	MaxPages            uint16
	RequestTimeout      uint16 // seconds
}

// Append appends the answer in the form that a kernel of the protocol's
// version 7.minor takes.
func (o *InitOut) Append(b []byte, minor uint32) []byte {
	start := len(b)
	b = order.AppendUint32(b, o.Major)
	b = order.AppendUint32(b, o.Minor)
	b = order.AppendUint32(b, o.MaxReadahead)
	b = order.AppendUint32(b, uint32(o.Flags))
	b = order.AppendUint16(b, o.MaxBackground)
	b = order.AppendUint16(b, o.CongestionThreshold)
	b = order.AppendUint32(b, o.MaxWrite)
	b = order.AppendUint32(b, o.TimeGran)
	b = order.AppendUint16(b, o.MaxPages)
	b = order.AppendUint16(b, 0) // map_alignment: of virtiofs
	b = order.AppendUint32(b, uint32(o.Flags>>32))
	b = order.AppendUint32(b, 0) // max_stack_depth: of passthrough
	b = order.AppendUint16(b, o.RequestTimeout)
	b = append(b, make([]byte, 64-(len(b)-start))...)
	switch {
	case minor < 5:
		return b[:start+8]
	case minor < 23:
		return b[:start+24]
	}
	return b
}
