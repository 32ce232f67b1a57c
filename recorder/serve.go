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
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// ServeOptions say what a client of [Serve] gets.
type ServeOptions struct {
	// Target is what is recorded. If it is nil, the client says what: a Container, by the
	// number of a process as the server sees it, or a Directory of the server's.
	Target Target

	// Authorize is asked about each client, and what is to be recorded: an error refuses it, and
	// its text goes to the client. A Directory has no symbolic links in it then. It may be nil if
	// Target is set, and everybody who can connect may have that.
	//
	// It needs a Unix socket. It runs on the goroutine of Serve and counts towards the
	// five seconds of the handshake.
	Authorize func(client *syscall.Ucred, target Target) error

	// Options are what a client can have at most: it may ask for fewer operations, for
	// OneMount, and for descriptors if Descriptors is set, which are of files that the
	// client itself may have no right to open.
	Options Options
}

// Serve records for one client, which connects by [Connect], until one of them or the
// target ends: so a program without privileges gets a record from one that has them. It
// takes conn over, and closes it. The protocol is described in the documentation of the
// package; conn may be any connection, but credentials and descriptors need a Unix socket
// (SOCK_STREAM).
//
// It returns nil when the record was delivered as a whole, its verdict included, whatever that is;
// an error otherwise: the cause of ctx, the refusal that the client got, or what went wrong
// with the connection. A client that does not finish the handshake in five seconds, or
// takes no batch for ten, is given up.
func Serve(ctx context.Context, conn net.Conn, options *ServeOptions) error {
	l := newLink(conn)
	defer l.close()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	o := ServeOptions{}
	if options != nil {
		o = *options
	}
	if o.Target == nil && o.Authorize == nil {
		return invalid("", "ServeOptions: either there is a Target, or Authorize decides")
	}
	s, err := o.shake(ctx, l)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	}
	return s.serve(ctx, l)
}

// shake does the handshake. When it returns, it is being recorded.
func (o *ServeOptions) shake(ctx context.Context, l *link) (*session, error) {
	l.conn.SetDeadline(time.Now().Add(handshake))
	stop := context.AfterFunc(ctx, func() { l.conn.SetDeadline(longAgo) })
	defer stop()
	// First the group: who has no privilege to record says so at once.
	group, err := newGroup(&o.Options)
	if err != nil {
		return nil, l.refuse(err)
	}
	defer group.Close()
	if err := l.send(msgHello, appendHello(), nil); err != nil {
		return nil, broken("write", err)
	}
	h, payload, err := l.receive(2 * maxPath)
	if err != nil {
		return nil, l.refuse(broken("read", err))
	}
	if h.typ != msgStart {
		return nil, l.refuse(recordError("start", "client", fmt.Errorf("a message of type %d: %w", h.typ, fs.ErrInvalid)))
	}
	m, err := decodeStart(payload)
	if err != nil {
		return nil, l.refuse(recordError("start", "client", fmt.Errorf("the request: %w", err)))
	}
	s, err := o.begin(l, m)
	if err != nil {
		return nil, l.refuse(err)
	}
	if err = l.send(msgStarted, appendStarted(s.tally.began), nil); err == nil && !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		s.close()
		return nil, broken("write", err)
	}
	l.conn.SetDeadline(time.Time{})
	return s, nil
}

// newGroup shows whether there is a group to be had.
func newGroup(o *Options) (*kernstream.FileWatcher, error) {
	w, _, err := o.watch(context.Background(), nil)
	return w, err
}

// refuse tells the client why, and returns that.
func (l *link) refuse(err error) error {
	l.conn.SetWriteDeadline(time.Now().Add(parting))
	l.send(msgRefused, appendRefusal(err), nil)
	l.hangUp()
	io.Copy(io.Discard, l.conn)
	return err
}

// hangUp sends the end of the connection. The other side has a moment to read
// what came before, and to end it, too.
func (l *link) hangUp() {
	deadline := longAgo
	if half, ok := l.conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		deadline = time.Now().Add(parting)
	}
	l.conn.SetReadDeadline(deadline)
}

// begin begins to record what the client asks for, as far as it may.
func (o *ServeOptions) begin(l *link, m startMessage) (*session, error) {
	options, err := o.allow(m)
	if err != nil {
		return nil, err
	}
	target := o.Target
	if target == nil {
		target = m.target
	}
	if o.Authorize == nil {
		return newSession(options, target)
	}
	client, err := credentials(l.unix)
	if err != nil {
		return nil, err
	}
	return newSession(options, &authorizedTarget{target, func(found Target) error {
		if err := o.Authorize(client, found); err != nil {
			return recordError("authorize", target.String(), fmt.Errorf("%w: %w", err, fs.ErrPermission))
		}
		return nil
	}})
}

// allow returns the options for a client.
func (o *ServeOptions) allow(m startMessage) (Options, error) {
	options, err := o.Options.complete(cmpTarget(o.Target, m.target))
	switch {
	case err != nil:
		return options, err
	case o.Target != nil && m.target != nil:
		return options, recordError("start", m.target.String(), fmt.Errorf("the server has its own target: %w", fs.ErrPermission))
	case m.ops&^options.Ops != 0:
		return options, recordError("start", "client", fmt.Errorf("the server does not record %v: %w", m.ops&^options.Ops, fs.ErrPermission))
	case m.ops != 0 && m.ops&^kernstream.OpOnDir == 0:
		return options, invalid("client", "Ops: %v alone asks for nothing", m.ops)
	case m.descriptors && !options.Descriptors:
		return options, recordError("start", "client", fmt.Errorf("the server gives no descriptors: %w", fs.ErrPermission))
	}
	if m.ops != 0 {
		options.Ops = m.ops
	}
	options.Descriptors = m.descriptors
	options.OneMount = options.OneMount || m.oneMount
	return options, nil
}

func cmpTarget(own, asked Target) Target {
	if own != nil {
		return own
	}
	return asked
}

// credentials returns who is at the other end.
func credentials(conn *net.UnixConn) (*syscall.Ucred, error) {
	if conn == nil {
		return nil, recordError("authorize", "client", fmt.Errorf("only a Unix socket tells who the client is: %w", fs.ErrPermission))
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, broken("authorize", err)
	}
	var client *syscall.Ucred
	cerr := raw.Control(func(fd uintptr) {
		client, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, recordError("authorize", "client", os.NewSyscallError("getsockopt", err))
	}
	return client, nil
}

// An authorizedTarget asks, once the target is open, and so cannot become another one.
type authorizedTarget struct {
	Target
	authorize func(found Target) error
}

func (t *authorizedTarget) open(ctx context.Context, o *Options) (*place, error) {
	switch asked := t.Target.(type) {
	case Directory:
		return t.openDirectory(ctx, asked, o)
	case Container:
		return t.openContainer(ctx, asked, o)
	}
	if err := t.authorize(t.Target); err != nil {
		return nil, err
	}
	return t.Target.open(ctx, o)
}

func (t *authorizedTarget) openDirectory(ctx context.Context, asked Directory, o *Options) (*place, error) {
	root, err := unix.Open(string(asked), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		// Who is not authorized does not learn what there is.
		if refusal := t.authorize(asked); refusal != nil {
			return nil, refusal
		}
		return nil, recordError("open", string(asked), os.NewSyscallError("open", err))
	}
	path, err := pathOf(root)
	if err == nil {
		err = t.authorize(Directory(path))
	}
	if err != nil {
		unix.Close(root)
		return nil, err
	}
	return openDirectory(ctx, root, o)
}

func (t *authorizedTarget) openContainer(ctx context.Context, asked Container, o *Options) (*place, error) {
	p, err := asked.open(ctx, o)
	if err != nil {
		if refusal := t.authorize(asked); refusal != nil {
			return nil, refusal
		}
		return nil, err
	}
	if err = t.authorize(asked); err == nil {
		// Until it ends, its number is nobody else's.
		select {
		case <-p.ended:
			err = recordError("authorize", asked.String(), os.ErrProcessDone)
		default:
		}
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// errStop is what ends a recording that the client has had enough of.
var errStop = errors.New("the client has had enough")

// serve records, and sends what it finds.
func (s *session) serve(ctx context.Context, l *link) error {
	defer s.close()
	server := ctx
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	s.cut = func(cause error) string {
		switch {
		case server.Err() != nil:
			return fmt.Sprintf("the server was stopped: %v", cause)
		case cause != errStop:
			return cause.Error()
		}
		return s.place.early
	}
	s.tally.keepUpdates = true
	var helpers sync.WaitGroup
	helpers.Go(func() { end(l.listen()) })
	sent := make(chan error, 1)
	helpers.Go(func() {
		err := s.send(ctx, l)
		sent <- err
		if err != nil {
			end(err)
		}
	})
	defer context.AfterFunc(ctx, func() { l.conn.SetWriteDeadline(time.Now().Add(parting)) })()
	failure := s.run(ctx)
	err := <-sent
	if err == nil {
		err = s.sendEnd(ctx, l)
	}
	l.hangUp()
	helpers.Wait()
	io.Copy(io.Discard, l.conn)
	if _, broken := errors.AsType[*kernstream.OpError](failure); broken && err == nil {
		err = failure
	}
	return err
}

// listen waits for the client to say that it is enough, or to be gone.
func (l *link) listen() error {
	h, _, err := l.receive(0)
	switch {
	case err != nil:
		return broken("read", err)
	case h.typ != msgStop:
		return broken("read", fmt.Errorf("a message of type %d, while it is recorded", h.typ))
	}
	return errStop
}

// send sends batches until the list is finished and all is sent.
func (s *session) send(ctx context.Context, l *link) error {
	for b := (batch{}); s.tally.take(&b); {
		l.conn.SetWriteDeadline(time.Now().Add(stalled))
		if ctx.Err() != nil {
			l.conn.SetWriteDeadline(time.Now().Add(parting))
		}
		err := error(nil)
		if len(b.payload) > 0 {
			err = l.send(msgBatch, b.payload, b.files)
		}
		if err == nil && b.overflows > 0 {
			err = l.send(msgOverflow, binary.LittleEndian.AppendUint32(nil, uint32(b.overflows)), nil)
		}
		b.close()
		if err != nil {
			s.tally.hurry()
			return broken("write", err)
		}
		if len(b.payload) < batchBytes/4 {
			// A batch costs both sides more than what is in a small one.
			select {
			case <-time.After(linger):
			case <-ctx.Done():
			}
		}
	}
	return nil
}

// linger is how long a file waits for others.
const linger = time.Millisecond

// sendEnd sends the verdict.
func (s *session) sendEnd(ctx context.Context, l *link) error {
	cause := context.Cause(ctx) // a client that has the verdict hangs up
	list, progress := s.tally.list(), s.tally.progress()
	l.conn.SetWriteDeadline(time.Now().Add(stalled))
	m := endMessage{files: progress.Files, accesses: progress.Accesses, reasons: list.Reasons}
	if err := l.send(msgEnd, appendEnd(m), nil); err != nil {
		return broken("write", err)
	}
	if cause != errStop {
		return cause
	}
	return nil
}

// A batch is what is sent at once.
type batch struct {
	payload   []byte
	files     []*os.File
	overflows int // that follow
}

func (b *batch) close() {
	for _, f := range b.files {
		f.Close()
	}
	b.files = b.files[:0]
}

// take waits for something to send, and fills b. It returns false when the list is finished
// and all was sent. Accesses to files that were sent before go along with others.
func (t *tally) take(b *batch) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	*b = batch{payload: b.payload[:0], files: b.files[:0]}
	for t.sent == t.files.n && t.overflows == t.overflowsSent && !t.finished {
		t.moved.Wait()
	}
	limit := t.files.n
	if t.overflows > t.overflowsSent {
		limit = max(t.sent, t.overflowAt)
	}
	for ; t.sent < limit && len(b.payload) < batchBytes && len(b.files) < batchFiles; t.sent++ {
		f := t.files.at(t.sent)
		b.payload = appendRecord(b.payload, t.sent, f, true)
		if f.first.File != nil {
			b.files = append(b.files, f.first.File)
			f.first.File = nil
		}
	}
	if t.sent == limit && t.overflows > t.overflowsSent {
		b.overflows = t.overflows - t.overflowsSent
		t.overflowsSent = t.overflows
	}
	for len(t.updated) > 0 && len(b.payload) < batchBytes {
		i := t.updated[len(t.updated)-1]
		if i >= t.sent {
			break
		}
		t.updated = t.updated[:len(t.updated)-1]
		f := t.files.at(i)
		f.updated = false
		b.payload = appendRecord(b.payload, i, f, false)
	}
	t.moved.Broadcast()
	return len(b.payload) > 0 || b.overflows > 0
}
