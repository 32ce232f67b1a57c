package recorder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/kernstream/kernstream"
)

// The wire format of [Serve] and [Connect], which the package documentation describes. This
// file takes and makes bytes, and does no I/O.

const (
	wireMagic   = "KSRECORD"
	wireVersion = 1

	headerBytes = 8
	maxMessage  = 1 << 20 // of a payload
	batchBytes  = 64 << 10
	batchFiles  = 128     // descriptors in one batch; the kernel passes on 253 at most
	maxPath     = 1 << 16 // more than any path of the kernel's
	maxReasons  = 64
)

// A messageType says what a payload is.
type messageType uint8

const (
	msgHello    messageType = 1 // server: who it is
	msgStart    messageType = 2 // client: what to record
	msgStarted  messageType = 3 // server: it is being recorded
	msgRefused  messageType = 4 // server: it is not, and why
	msgBatch    messageType = 5 // server: files
	msgOverflow messageType = 6 // server: accesses were lost here
	msgStop     messageType = 7 // client: that is enough
	msgEnd      messageType = 8 // server: the verdict
)

// A header stands before each payload.
type header struct {
	size        int
	typ         messageType
	descriptors int // how many come with it
}

func appendHeader(b []byte, h header) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(h.size))
	b = append(b, byte(h.typ), 0)
	return binary.LittleEndian.AppendUint16(b, uint16(h.descriptors))
}

// decodeHeader reads headerBytes.
func decodeHeader(b []byte) (header, error) {
	h := header{typ: messageType(b[4]), descriptors: int(binary.LittleEndian.Uint16(b[6:]))}
	size := binary.LittleEndian.Uint32(b)
	switch {
	case size > maxMessage:
		return h, fmt.Errorf("a message of type %d with %d bytes is none of this protocol", h.typ, size)
	case h.typ < msgHello || h.typ > msgEnd || b[5] != 0:
		return h, fmt.Errorf("a message of type %d is none of this protocol", h.typ)
	case h.descriptors > 0 && (h.typ != msgBatch || h.descriptors > batchFiles):
		return h, fmt.Errorf("a message of type %d with %d descriptors", h.typ, h.descriptors)
	}
	h.size = int(size)
	return h, nil
}

// reader takes fields from the start of b. After the first that is not there, or odd, all
// are zero, and err is set.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
	r.b = nil
}

func (r *reader) bytes(n int) []byte {
	if n > len(r.b) {
		r.fail("it is cut short")
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) fixed(n int) uint64 {
	var word [8]byte
	copy(word[:], r.bytes(n))
	return binary.LittleEndian.Uint64(word[:])
}

func (r *reader) varint(limit uint64) uint64 {
	v, n := binary.Uvarint(r.b)
	switch {
	case n <= 0:
		r.fail("a number is cut short or too long")
		return 0
	case v > limit:
		r.fail("%d is too much", v)
		return 0
	}
	r.b = r.b[n:]
	return v
}

// end checks that nothing is left.
func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes are left over", len(r.b))
	}
	return r.err
}

func appendHello() []byte {
	return binary.LittleEndian.AppendUint32([]byte(wireMagic), wireVersion)
}

var errVersion = fmt.Errorf("another version of the protocol (%w)", errors.ErrUnsupported)

func decodeHello(b []byte) error {
	r := reader{b: b}
	if magic := string(r.bytes(len(wireMagic))); r.err == nil && magic != wireMagic {
		return fmt.Errorf("no recorder: it begins with %q", magic)
	}
	if version := r.fixed(4); r.err == nil && version != wireVersion {
		return fmt.Errorf("%w: the server has %d, the client %d", errVersion, version, wireVersion)
	}
	return r.end()
}

// A startMessage is what a client asks for.
type startMessage struct {
	version     uint32
	descriptors bool
	oneMount    bool
	ops         kernstream.FileOp // 0: those of the server
	target      Target            // nil: that of the server
}

const (
	startDescriptors = 1 << iota
	startOneMount
)

const (
	targetServer    = 0
	targetContainer = 1
	targetDirectory = 2
)

func appendStart(m startMessage) []byte {
	b := binary.LittleEndian.AppendUint32(nil, m.version)
	flags := uint32(0)
	if m.descriptors {
		flags |= startDescriptors
	}
	if m.oneMount {
		flags |= startOneMount
	}
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.ops))
	switch t := m.target.(type) {
	case Container:
		b = append(b, targetContainer)
		return binary.LittleEndian.AppendUint32(b, uint32(t))
	case Directory:
		b = append(b, targetDirectory)
		return append(b, t...)
	}
	return append(b, targetServer)
}

func decodeStart(b []byte) (m startMessage, err error) {
	r := reader{b: b}
	m.version = uint32(r.fixed(4))
	if r.err == nil && m.version != wireVersion {
		return m, fmt.Errorf("%w: the client has %d, the server %d", errVersion, m.version, wireVersion)
	}
	flags := r.fixed(4)
	m.descriptors, m.oneMount = flags&startDescriptors != 0, flags&startOneMount != 0
	if flags&^(startDescriptors|startOneMount) != 0 {
		r.fail("unknown flags %#x", flags)
	}
	m.ops = kernstream.FileOp(r.fixed(8))
	switch kind := r.fixed(1); {
	case kind == targetContainer:
		pid := r.fixed(4)
		if pid == 0 || pid > math.MaxInt32 {
			r.fail("%d is no process", pid)
		}
		m.target = Container(pid)
	case kind == targetDirectory:
		path := string(r.bytes(len(r.b)))
		if !validPath(path) {
			r.fail("%q is no absolute path", path[:min(len(path), 100)])
		}
		m.target = Directory(path)
	case kind != targetServer:
		r.fail("unknown target %d", kind)
	}
	return m, r.end()
}

func validPath(path string) bool {
	return strings.HasPrefix(path, "/") && len(path) <= maxPath && !strings.Contains(path, "\x00")
}

// The payload of msgStarted is the time at which it began.
func appendStarted(began time.Time) []byte {
	return binary.LittleEndian.AppendUint64(nil, uint64(began.UnixNano()))
}

func decodeStarted(b []byte) (time.Time, error) {
	r := reader{b: b}
	ns := r.fixed(8)
	return time.Unix(0, int64(ns)), r.end()
}

// appendRecord appends one file to a batch: all of it, if it is the one that follows
// those which are known, and what changes otherwise.
func appendRecord(b []byte, number int, f *file, fresh bool) []byte {
	b = binary.AppendUvarint(b, uint64(number))
	b = binary.AppendUvarint(b, uint64(f.ops))
	b = binary.AppendUvarint(b, f.count)
	if !fresh {
		return b
	}
	attached := uint64(0)
	if f.first.File != nil {
		attached = 1
	}
	b = binary.AppendUvarint(b, attached)
	b = binary.AppendUvarint(b, uint64(f.first.First))
	b = binary.AppendUvarint(b, uint64(f.first.PID))
	b = binary.AppendUvarint(b, uint64(len(f.first.Path)))
	return append(b, f.first.Path...)
}

// A record is one file of a batch. If it was known before, only ops and count are
// set.
type record struct {
	number   int
	fresh    bool
	attached bool // a descriptor comes with it
	file     file
}

// decodeBatch calls use with each record of a batch; known is how many files there are before
// it.
func decodeBatch(b []byte, known int, use func(*record) error) error {
	for r := (reader{b: b}); len(r.b) > 0; {
		rec := record{number: int(r.varint(uint64(known)))}
		rec.file.ops = kernstream.FileOp(r.varint(math.MaxUint64))
		rec.file.count = r.varint(math.MaxUint64)
		if rec.fresh = rec.number == known && r.err == nil; rec.fresh {
			known++
			rec.attached = r.varint(1) == 1
			rec.file.first.First = time.Duration(r.varint(math.MaxInt64))
			rec.file.first.Ops = rec.file.ops
			rec.file.first.PID = int(r.varint(math.MaxInt32))
			rec.file.first.Path = string(r.bytes(int(r.varint(maxPath))))
			if !validPath(rec.file.first.Path) {
				r.fail("%q is no absolute path", rec.file.first.Path[:min(len(rec.file.first.Path), 100)])
			}
		}
		if rec.file.ops&^allOps != 0 || rec.file.count == 0 {
			r.fail("file %d has operations %v and count %d", rec.number, rec.file.ops, rec.file.count)
		}
		if r.err != nil {
			return r.err
		}
		if err := use(&rec); err != nil {
			return err
		}
	}
	return nil
}

// An endMessage is the verdict.
type endMessage struct {
	files    int
	accesses uint64
	reasons  []string // none: it is complete
}

func appendEnd(m endMessage) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(m.files))
	b = binary.LittleEndian.AppendUint64(b, m.accesses)
	for _, why := range m.reasons[:min(len(m.reasons), maxReasons)] {
		why = why[:min(len(why), math.MaxUint16/2)]
		b = binary.LittleEndian.AppendUint16(b, uint16(len(why)))
		b = append(b, why...)
	}
	return b
}

func decodeEnd(b []byte) (m endMessage, err error) {
	r := reader{b: b}
	m.files, m.accesses = int(min(r.fixed(4), math.MaxInt32)), r.fixed(8)
	for len(r.b) > 0 {
		m.reasons = append(m.reasons, string(r.bytes(int(r.fixed(2)))))
		if len(m.reasons) > maxReasons {
			r.fail("more than %d reasons", maxReasons)
		}
	}
	return m, r.end()
}
