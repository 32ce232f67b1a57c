package gofuse

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/kernstream/kernstream/fuse"
)

// devices is how many devices serve a session: see fuse.Session.Clone.
const devices = 2

// Serve handles requests until ctx is done, or the session is drained or ends. It
// returns when no handler runs any more: nil after a drain, an unmount and Close
// of the session, an error that Is fuse.ErrAborted after an abort, and the cause of
// ctx. It may be called again while the session lives.
//
// A handler runs on the goroutine that has read its request; when it takes longer
// than a millisecond or two, another goroutine goes on reading. Its cancel channel
// is closed when the client is interrupted, and when the session ends; a cancel of
// ctx and a drain wait for it.
//
// When the session has ended, RawFileSystem.OnUnmount is called.
func (s *Server) Serve(ctx context.Context) error {
	session := s.session.Load()
	if session == nil {
		return errors.New("gofuse: the server has no session: call Mount or Attach first")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	run := &run{server: s, session: session, ctx: ctx, cancel: cancel, size: s.bufferSize(session.State())}
	var lanes []*lane
	for _, d := range session.Devices() {
		lanes = append(lanes, &lane{run: run, device: d})
	}
	for len(lanes) < devices {
		clone, err := session.Clone()
		if err != nil && len(lanes) > 0 {
			break // one will do, and tells of the end
		}
		if err != nil {
			return err
		}
		defer clone.Close()
		lanes = append(lanes, &lane{run: run, device: clone})
	}
	for _, l := range lanes {
		l.lead()
	}
	stop := run.monitor.start(lanes)
	run.handlers.Wait()
	stop()
	if ended(session) {
		s.files.OnUnmount()
	}
	if run.err == fuse.ErrAborted {
		return session.Err()
	}
	return run.err
}

func ended(session *fuse.Session) bool {
	select {
	case <-session.Done():
		return true
	default:
		return false
	}
}

// A run is a call of Serve.
type run struct {
	server   *Server
	session  *fuse.Session
	ctx      context.Context
	cancel   context.CancelCauseFunc
	size     int // of a buffer
	handlers sync.WaitGroup
	monitor  monitor

	once sync.Once
	err  error // valid when there are no handlers
}

// end ends the run by err, which is of Next.
func (r *run) end(err error) {
	r.once.Do(func() {
		switch err {
		case fuse.ErrUnmounted, fuse.ErrDrained, os.ErrClosed:
			err = nil
		}
		r.err = err
	})
	r.cancel(err)
}

// A lane is a device, and the worker that reads it.
type lane struct {
	run    *run
	device *fuse.Device
	leader atomic.Pointer[worker]
}

// lead makes a new worker read the device.
func (l *lane) lead() {
	w := &worker{lane: l, buffer: newBuffer(l.run.size), replaced: make(chan struct{})}
	l.leader.Store(w)
	l.run.handlers.Go(w.loop)
}

// A worker reads requests and handles each before it reads the next, until it is
// relieved because one takes long.
type worker struct {
	lane    *lane
	buffer  []byte    // for answers
	in, out [1][]byte // as go-fuse wants them
	request *fuse.Request
	state   atomic.Uint64 // twice the number of the request; the lowest bit is set while it is handled

	replaced chan struct{} // closed when there is another worker
	done     atomic.Bool   // it was relieved, and its handler has returned
}

// newBuffer returns memory for an answer, in which data is aligned to a page: a
// file that was opened with O_DIRECT is read into it.
func newBuffer(size int) []byte {
	page := os.Getpagesize()
	b := make([]byte, size+page)
	data := uintptr(unsafe.Pointer(&b[0])) + outSize
	skip := int(-data % uintptr(page))
	return b[skip:][:size]
}

// relieved is the state of a worker that does not read any more.
const relieved = 1<<64 - 1

func (w *worker) loop() {
	run := w.lane.run
	for number := uint64(1); ; number++ {
		r, err := w.lane.device.Next(run.ctx)
		if err == os.ErrClosed && !ended(run.session) {
			return // the device was closed, and nothing else
		}
		if err != nil {
			run.end(err)
			return
		}
		w.request = r
		w.state.Store(number<<1 | 1)
		run.monitor.awake()
		run.server.handle(r, w)
		if !w.state.CompareAndSwap(number<<1|1, number<<1) {
			// There is always somebody to be waited for.
			<-w.replaced
			w.done.Store(true)
			return
		}
	}
}

// handle lets go-fuse handle a request.
func (s *Server) handle(r *fuse.Request, w *worker) {
	if r.Header.Opcode == fuse.OpNotifyReply {
		s.deliver(r)
		return
	}
	if s.options.SingleThreaded {
		s.single.Lock()
		defer s.single.Unlock()
	}
	w.in[0], w.out[0] = r.Raw(), w.buffer
	n, status := s.protocol.HandleRequest(w.in[:], w.out[:])
	switch {
	case n < outSize && status == gofuse.OK:
		r.Close() // there is no answer
	case n < outSize:
		r.ReplyErrno(syscall.Errno(status))
		r.Close() // if it has no answer
	case order.Uint32(w.buffer[4:]) != 0:
		r.ReplyErrno(syscall.Errno(-int32(order.Uint32(w.buffer[4:]))))
	default:
		r.Reply(w.buffer[outSize:n])
	}
}

// interrupt closes the cancel channel of w's handler, which may not have got as
// far as being known to go-fuse.
func (s *Server) interrupt(r *fuse.Request, w *worker) {
	message := make([]byte, headerSize+8)
	order.PutUint32(message, uint32(len(message)))
	order.PutUint32(message[4:], uint32(fuse.OpInterrupt))
	order.PutUint64(message[8:], r.Header.Unique|1)
	order.PutUint64(message[headerSize:], r.Header.Unique)
	out := make([]byte, 4096)
	for {
		n, _ := s.protocol.HandleRequest([][]byte{message}, [][]byte{out})
		if n == 0 || w.done.Load() {
			return
		}
		time.Sleep(tick)
	}
}
