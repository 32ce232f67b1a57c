// Package procconn decodes what the process events connector sends: messages of
// a netlink socket about processes that were forked (connector.h and cn_proc.h
// of include/uapi/linux). It does no I/O and allocates nothing.
package procconn

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Sizes of the wire format, in bytes.
const (
	headerSize    = 16 // struct nlmsghdr
	connectorSize = 20 // struct cn_msg
	eventSize     = 16 // struct proc_event, up to event_data
)

const (
	connectorProc = 1 // CN_IDX_PROC and CN_VAL_PROC
	opListen      = 1 // PROC_CN_MCAST_LISTEN
)

// What an event tells. Other kinds are skipped by who does not know them.
const (
	Ack  = 0 // PROC_EVENT_NONE: the answer to a request
	Fork = 1 // PROC_EVENT_FORK
)

// Group is the netlink group of the connector.
const Group = connectorProc

// Listen returns the request to be told of events. id comes back with the
// answer.
func Listen(id uint32) []byte {
	b := make([]byte, headerSize+connectorSize+4)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.NLMSG_DONE)
	c := b[headerSize:]
	binary.NativeEndian.PutUint32(c, connectorProc)
	binary.NativeEndian.PutUint32(c[4:], connectorProc)
	binary.NativeEndian.PutUint32(c[12:], id)
	binary.NativeEndian.PutUint16(c[16:], 4)
	binary.NativeEndian.PutUint32(c[connectorSize:], opListen)
	return b
}

// An Event is one event.
type Event struct {
	What uint32
	ID   uint32 // of the request that an Ack answers

	Errno unix.Errno // of an Ack: why the request failed; 0: it did not

	// Of a Fork: the numbers of the new thread and its process, and those of its
	// parent, in the first process ID namespace.
	PID, TGID             int
	ParentPID, ParentTGID int
}

// Decode reads one message. A message that is not of the connector, or has another kind of
// event, has a What of ^0.
func Decode(b []byte) (Event, error) {
	e := Event{What: ^uint32(0)}
	if len(b) < headerSize {
		return e, errors.New("shorter than a header")
	}
	if size := binary.NativeEndian.Uint32(b); size < headerSize || uint64(size) > uint64(len(b)) {
		return e, fmt.Errorf("message of %d bytes in %d", size, len(b))
	}
	if binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_DONE {
		return e, nil
	}
	b = b[headerSize:binary.NativeEndian.Uint32(b)]
	if len(b) < connectorSize {
		return e, errors.New("shorter than a message of the connector")
	}
	if binary.NativeEndian.Uint32(b) != connectorProc || binary.NativeEndian.Uint32(b[4:]) != connectorProc {
		return e, nil
	}
	answer := binary.NativeEndian.Uint32(b[12:]) // one more than what was asked with
	b = b[connectorSize:]
	if len(b) < eventSize {
		return e, errors.New("shorter than an event")
	}
	what, data := binary.NativeEndian.Uint32(b), b[eventSize:]
	switch {
	case what == Ack && len(data) >= 4:
		e.ID = answer - 1
		e.Errno = unix.Errno(binary.NativeEndian.Uint32(data))
	case what == Fork && len(data) >= 16:
		word := func(i int) int { return int(int32(binary.NativeEndian.Uint32(data[4*i:]))) }
		e.ParentPID, e.ParentTGID, e.PID, e.TGID = word(0), word(1), word(2), word(3)
	case what == Ack || what == Fork:
		return e, fmt.Errorf("event of kind %d with %d bytes", what, len(data))
	default:
		return e, nil
	}
	e.What = what
	return e, nil
}
