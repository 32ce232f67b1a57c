package recorder

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A link is a connection with messages in both directions. One goroutine sends, and
// one receives.
type link struct {
	conn net.Conn
	unix *net.UnixConn // the same, if descriptors can be passed; nil otherwise

	buf   []byte // what was read and not used yet
	files []*os.File
	cut   bool // the kernel has dropped descriptors, for want of room
	oob   []byte
}

// Variables for the sake of tests alone.
var (
	// handshake limits the time from the first byte to the start of the recording.
	handshake = 5 * time.Second
	// stalled is how long a client may take for one batch.
	stalled = 10 * time.Second
	// parting limits the time from the last word of one side to the other's.
	parting = 800 * time.Millisecond
)

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

func newLink(conn net.Conn) *link {
	l := &link{conn: conn}
	if u, ok := conn.(*net.UnixConn); ok {
		l.unix, l.oob = u, make([]byte, unix.CmsgSpace(4*253))
	}
	return l
}

// close ends the connection, and what came with it.
func (l *link) close() {
	l.conn.Close()
	for _, f := range l.files {
		f.Close()
	}
	l.files = nil
}

// send sends one message, with descriptors that stay the caller's.
func (l *link) send(typ messageType, payload []byte, files []*os.File) error {
	b := appendHeader(make([]byte, 0, headerBytes+len(payload)), header{len(payload), typ, len(files)})
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		// They go with the header, which is so short that it goes as a whole.
		if _, _, err := l.unix.WriteMsgUnix(b, unix.UnixRights(fds...), nil); err != nil {
			return err
		}
		b = b[:0]
	}
	_, err := l.conn.Write(append(b, payload...))
	return err
}

// receive waits for the next message, whose payload may have limit bytes and is valid
// until the next call. At the end of the connection between two messages the error
// is io.EOF.
func (l *link) receive(limit int) (header, []byte, error) {
	if err := l.fill(headerBytes); err != nil {
		return header{}, nil, err
	}
	h, err := decodeHeader(l.buf)
	if err == nil && h.size > limit {
		err = fmt.Errorf("a message of type %d with %d bytes", h.typ, h.size)
	}
	if err != nil {
		return h, nil, err
	}
	if err := l.fill(headerBytes + h.size); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return h, nil, err
	}
	payload := l.buf[headerBytes : headerBytes+h.size]
	l.buf = l.buf[headerBytes+h.size:]
	return h, payload, nil
}

// fill reads until there are n bytes.
func (l *link) fill(n int) error {
	if len(l.buf) >= n {
		return nil
	}
	b := make([]byte, max(n, 2*batchBytes))
	have := copy(b, l.buf)
	for have < n {
		got, err := l.read(b[have:])
		have += got
		if got == 0 && err == nil {
			err = io.EOF
		}
		if err != nil && have < n {
			if err == io.EOF && have > 0 {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	l.buf = b[:have]
	return nil
}

// read reads what there is, and keeps the descriptors that come with it.
func (l *link) read(p []byte) (int, error) {
	if l.unix == nil {
		return l.conn.Read(p)
	}
	n, oobn, flags, _, err := l.unix.ReadMsgUnix(p, l.oob)
	if errors.Is(err, io.EOF) {
		err = io.EOF
	}
	l.cut = l.cut || flags&unix.MSG_CTRUNC != 0
	if oobn > 0 {
		messages, _ := unix.ParseSocketControlMessage(l.oob[:oobn])
		for i := range messages {
			fds, _ := unix.ParseUnixRights(&messages[i])
			for _, fd := range fds {
				l.files = append(l.files, os.NewFile(uintptr(fd), "file of an access"))
			}
		}
	}
	return n, err
}

// take returns n of the files that came; they are the caller's. They are fewer if
// the kernel dropped some.
func (l *link) take(n int) []*os.File {
	n = min(n, len(l.files))
	files := l.files[:n:n]
	l.files = l.files[n:]
	return files
}

// broken is what an error of a connection means.
func broken(op string, err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("the other side does not answer: %w", os.ErrDeadlineExceeded)
	case err == io.EOF, err == io.ErrUnexpectedEOF, errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET), errors.Is(err, io.ErrClosedPipe):
		err = fmt.Errorf("the other side is gone: %w", io.ErrUnexpectedEOF)
	}
	return recordError(op, "connection", err)
}
