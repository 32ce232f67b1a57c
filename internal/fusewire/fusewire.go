// Package fusewire decodes and encodes those few messages of the FUSE protocol
// that a session understands itself: headers, INIT, INTERRUPT, what is
// forgotten, the answers to the probe of a new mount, and notifications. It does
// no I/O.
//
// The layouts are those of include/uapi/linux/fuse.h, in the byte order of the
// machine.
package fusewire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Opcodes of requests that a session understands. The others are only passed
// on.
const (
	Lookup      = 1
	Forget      = 2
	GetAttr     = 3
	Open        = 14
	Release     = 18
	Flush       = 25
	Init        = 26
	Interrupt   = 36
	Poll        = 40
	NotifyReply = 41
	BatchForget = 42
)

// RootID is the node ID of the root of every file system.
const RootID = 1

// Sizes of what every message begins with.
const (
	InHeaderSize  = 40
	OutHeaderSize = 16
)

// order is the byte order of the protocol: the machine's.
var order = binary.NativeEndian

// ErrMessage says that a message is not one of the protocol.
var ErrMessage = errors.New("malformed FUSE message")

// InHeader is what every request begins with (struct fuse_in_header).
type InHeader struct {
	Len            uint32 // of the whole message, in bytes
	Opcode         uint32
	Unique, NodeID uint64
	UID, GID, PID  uint32
	ExtLen         int // of the extensions at the end of the message, in bytes
}

// DecodeInHeader reads the header of a request. message is all that one read(2)
// returned.
func DecodeInHeader(message []byte) (h InHeader, err error) {
	if len(message) < InHeaderSize {
		return h, fmt.Errorf("%w: %d bytes are less than a header", ErrMessage, len(message))
	}
	h = InHeader{
		Len:    order.Uint32(message),
		Opcode: order.Uint32(message[4:]),
		Unique: order.Uint64(message[8:]),
		NodeID: order.Uint64(message[16:]),
		UID:    order.Uint32(message[24:]),
		GID:    order.Uint32(message[28:]),
		PID:    order.Uint32(message[32:]),
		ExtLen: 8 * int(order.Uint16(message[36:])), // the kernel counts in 8 bytes
	}
	if int64(h.Len) != int64(len(message)) {
		return h, fmt.Errorf("%w: it says that it has %d bytes, and has %d", ErrMessage, h.Len, len(message))
	}
	if h.ExtLen > len(message)-InHeaderSize {
		return h, fmt.Errorf("%w: extensions of %d bytes in a message of %d", ErrMessage, h.ExtLen, len(message))
	}
	return h, nil
}

// PutOutHeader writes the header of an answer (struct fuse_out_header) to
// header. length is that of the whole message; errno is 0 or positive.
func PutOutHeader(header *[OutHeaderSize]byte, length int, errno int, unique uint64) {
	order.PutUint32(header[:], uint32(length))
	order.PutUint32(header[4:], uint32(-int32(errno)))
	order.PutUint64(header[8:], unique)
}

// DecodeInterrupt returns which request the body of an INTERRUPT is about
// (struct fuse_interrupt_in).
func DecodeInterrupt(body []byte) (unique uint64, err error) {
	if len(body) < 8 {
		return 0, fmt.Errorf("%w: INTERRUPT with %d bytes", ErrMessage, len(body))
	}
	return order.Uint64(body), nil
}

// Sizes of struct fuse_forget_in, and of what a BATCH_FORGET has of those.
const (
	forgetSize      = 8
	batchHeaderSize = 8
	forgetOneSize   = 16
)

// DropForget takes out of message, a FORGET or BATCH_FORGET, what it says about
// node. It returns what is left, in the same memory and nil if that is nothing,
// and how many lookups were forgotten.
func DropForget(message []byte, node uint64) (rest []byte, lookups uint64, err error) {
	h, err := DecodeInHeader(message)
	if err != nil {
		return message, 0, err
	}
	body := message[InHeaderSize : len(message)-h.ExtLen]
	switch {
	case h.Opcode == Forget && len(body) >= forgetSize:
		if h.NodeID != node {
			return message, 0, nil
		}
		return nil, order.Uint64(body), nil
	case h.Opcode == BatchForget && len(body) >= batchHeaderSize &&
		int64(order.Uint32(body))*forgetOneSize <= int64(len(body)-batchHeaderSize):
		return dropFromBatch(message, h.ExtLen, node)
	}
	return message, 0, fmt.Errorf("%w: opcode %d with %d bytes", ErrMessage, h.Opcode, len(body))
}

// dropFromBatch is DropForget for a BATCH_FORGET, which has extensions of extLen
// bytes at its end.
func dropFromBatch(message []byte, extLen int, node uint64) (rest []byte, lookups uint64, err error) {
	body := message[InHeaderSize : len(message)-extLen]
	count := int(order.Uint32(body))
	list := body[batchHeaderSize:]
	kept := 0
	for i := range count {
		one := list[i*forgetOneSize:][:forgetOneSize]
		if order.Uint64(one) == node {
			lookups += order.Uint64(one[8:])
			continue
		}
		copy(list[kept*forgetOneSize:], one)
		kept++
	}
	if kept == count {
		return message, 0, nil
	}
	if kept == 0 {
		return nil, lookups, nil
	}
	rest = append(message[:InHeaderSize+batchHeaderSize+kept*forgetOneSize], message[len(message)-extLen:]...)
	order.PutUint32(rest, uint32(len(rest)))
	order.PutUint32(rest[InHeaderSize:], uint32(kept))
	return rest, lookups, nil
}
