package recorder

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/kernstream/kernstream"
)

// ConnectOptions say what a client asks a server for.
type ConnectOptions struct {
	// Target is what to record, a Container or a Directory, as the server sees it; nil is
	// what the server was told to record.
	Target Target

	// Ops are the operations that count as an access. 0 is those of the server, which
	// refuses others.
	Ops kernstream.FileOp

	// OneMount and Descriptors are as in [Options]. Descriptors need a Unix socket, and a server
	// that gives them.
	OneMount    bool
	Descriptors bool

	// MaxFiles is how many files the list can have, as in [Options]. It is a limit of
	// the client's memory, too, whatever the server sends.
	MaxFiles int
}

// Connect begins a recording by a server at the other end of conn, which serves it by
// [Serve]. It takes conn over, and closes it. It needs no privilege.
//
// The recording is as one of [Record]; a cancel or Close lets the server end it, and
// what it has found until then is in the List. If the connection ends before the server has
// said that it is through, Err is an OpError that Is io.ErrUnexpectedEOF, or what else
// went wrong, and the list is incomplete. How often a file was accessed is told when the next one
// is, or at the end.
//
// A handshake takes five seconds at most. An error Is what the server's refusal Is: fs.ErrPermission,
// errors.ErrUnsupported for another version of the protocol, os.ErrProcessDone,
// fs.ErrNotExist or fs.ErrInvalid.
func Connect(ctx context.Context, conn net.Conn, options *ConnectOptions) (*Recording, error) {
	l := newLink(conn)
	c := &client{link: l}
	if options != nil {
		c.options = *options
	}
	began, err := c.shake(ctx)
	if err != nil {
		l.close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	limit := c.options.MaxFiles
	if limit == 0 {
		limit = defaultMaxFiles
	}
	c.tally = newTally(limit)
	c.tally.began = began
	r := &Recording{name: c.name(), tally: c.tally}
	r.Stream = kernstream.NewStream(ctx, c.produce)
	return r, nil
}

// A client is the receiving end of a recording.
type client struct {
	options ConnectOptions
	link    *link
	tally   *tally
	known   int // how many files the server has told of
}

func (c *client) name() string {
	if c.options.Target == nil {
		return "server"
	}
	return c.options.Target.String()
}

func (c *client) check() error {
	switch t := c.options.Target.(type) {
	case nil:
	case Container:
		if t <= 0 {
			return invalid(t.String(), "this is no process")
		}
	case Directory:
		if !validPath(string(t)) {
			return invalid(t.String(), "a server needs an absolute path")
		}
	default:
		return invalid(t.String(), "a server starts no commands of its clients")
	}
	switch {
	case c.options.MaxFiles < 0:
		return invalid(c.name(), "MaxFiles is negative")
	case c.options.Descriptors && c.link.unix == nil:
		return recordError("start", c.name(), fmt.Errorf("for descriptors it has to be a Unix socket: %w", errors.ErrUnsupported))
	}
	return nil
}

// shake does the handshake. It returns when the server began.
func (c *client) shake(ctx context.Context) (began time.Time, err error) {
	if ctx.Err() != nil {
		return began, context.Cause(ctx)
	}
	if err := c.check(); err != nil {
		return began, err
	}
	c.link.conn.SetDeadline(time.Now().Add(handshake))
	stop := context.AfterFunc(ctx, func() { c.link.conn.SetDeadline(longAgo) })
	defer stop()
	payload, err := c.expect(msgHello)
	if err == nil {
		err = decodeHello(payload)
	}
	if err != nil {
		return began, broken("read", err)
	}
	m := startMessage{
		version: wireVersion, descriptors: c.options.Descriptors, oneMount: c.options.OneMount,
		ops: c.options.Ops, target: c.options.Target,
	}
	if err := c.link.send(msgStart, appendStart(m), nil); err != nil {
		return began, broken("write", err)
	}
	if payload, err = c.expect(msgStarted); err == nil {
		began, err = decodeStarted(payload)
	}
	if err == nil && !stop() {
		err = context.Cause(ctx)
	}
	c.link.conn.SetDeadline(time.Time{})
	if err != nil {
		return began, broken("read", err)
	}
	return began, nil
}

// expect receives a message of one type, or a refusal.
func (c *client) expect(typ messageType) ([]byte, error) {
	h, payload, err := c.link.receive(2 * maxPath)
	switch {
	case err != nil:
		return nil, err
	case h.typ == msgRefused:
		return nil, decodeRefusal(payload)
	case h.typ != typ:
		return nil, fmt.Errorf("a message of type %d, where one of type %d is expected", h.typ, typ)
	}
	return payload, nil
}

// produce is the life of a client's stream.
func (c *client) produce(ctx context.Context, emit func(*Access) bool) error {
	defer c.link.close()
	// An end that is asked for: the server sends what it has, and its verdict.
	asked := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(asked)
		c.tally.hurry()
		c.link.conn.SetWriteDeadline(time.Now().Add(parting))
		c.link.conn.SetReadDeadline(time.Now().Add(parting))
		c.link.send(msgStop, nil, nil)
	})
	var sender sync.WaitGroup
	sender.Go(func() { c.tally.send(emit) })
	err := c.receive()
	if !stop() {
		<-asked
	}
	if err != nil {
		c.tally.fault("%v", err)
	}
	c.tally.finish()
	sender.Wait()
	switch {
	case err != nil && ctx.Err() == nil:
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return io.EOF
}

// receive takes messages until the verdict.
func (c *client) receive() error {
	for {
		h, payload, err := c.link.receive(maxMessage)
		if err == nil {
			switch h.typ {
			case msgBatch:
				err = c.batch(payload, c.link.take(h.descriptors), h.descriptors)
			case msgOverflow:
				err = c.overflow(payload)
			case msgEnd:
				if err = c.end(payload); err == nil {
					return nil
				}
			default:
				err = fmt.Errorf("a message of type %d, while it is recorded", h.typ)
			}
		}
		if err == nil && len(c.link.files) > 2*batchFiles {
			err = errors.New("descriptors that belong to nothing")
		}
		if err != nil {
			return broken("read", err)
		}
	}
}

// batch enters the files of a batch into the list. files are the descriptors that came with it,
// of sent.
func (c *client) batch(payload []byte, files []*os.File, sent int) error {
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	switch {
	case sent > 0 && !c.options.Descriptors:
		return errors.New("descriptors that nobody asked for")
	case c.link.cut:
		return fmt.Errorf("the descriptors of files did not fit: %w", fs.ErrInvalid)
	case len(files) < sent:
		return fmt.Errorf("%d descriptors instead of %d", len(files), sent)
	}
	defer c.tally.tell()
	return decodeBatch(payload, c.known, func(r *record) error {
		if r.attached {
			if len(files) == 0 {
				return errors.New("a descriptor is missing")
			}
			r.file.first.File, files = files[0], files[1:]
		}
		if r.fresh {
			c.known++
		}
		return c.tally.merge(r)
	})
}

// merge enters what a server tells of a file.
func (t *tally) merge(r *record) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !r.fresh {
		if r.number >= t.files.n {
			return nil // one of those that were too many
		}
		f := t.files.at(r.number)
		t.accesses += r.file.count - min(r.file.count, f.count)
		f.ops |= r.file.ops
		f.count = max(f.count, r.file.count)
		return nil
	}
	t.accesses += r.file.count
	first := &r.file.first
	if _, known := t.index[first.Path]; known {
		first.Close()
		return fmt.Errorf("the file %q comes twice", first.Path)
	}
	if t.files.n == t.limit {
		first.Close()
		t.left++
		return nil
	}
	if first.File != nil {
		t.waitForRoom()
		if t.hurried {
			first.Close()
			first.File = nil
		}
	}
	first.When = t.began.Add(first.First)
	t.enter(r.file)
	return nil
}

func (c *client) overflow(payload []byte) error {
	if len(payload) != 4 {
		return fmt.Errorf("an overflow with %d bytes", len(payload))
	}
	c.tally.mu.Lock()
	defer c.tally.mu.Unlock()
	c.tally.overflows += int(binary.LittleEndian.Uint32(payload) & 0xffffff)
	return nil
}

// end takes the verdict over.
func (c *client) end(payload []byte) error {
	m, err := decodeEnd(payload)
	if err != nil {
		return fmt.Errorf("the verdict: %w", err)
	}
	if m.files != c.known {
		return fmt.Errorf("the server has told of %d files of %d", c.known, m.files)
	}
	c.tally.mu.Lock()
	defer c.tally.mu.Unlock()
	c.tally.accesses = m.accesses
	c.tally.judged, c.tally.verdict = true, m.reasons
	return nil
}
