package fuse

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// A drain is the time from Session.Drain to Session.Resume.
type drain struct {
	stopped bool          // nobody is reading any more
	quiet   chan struct{} // closed when nothing is in hand
	resumed chan struct{} // closed by Resume
}

// Drain stops reading, and waits until every request that was delivered is
// answered or closed (FORGET and the like, too: a server says by that that it has
// done what they ask for). From the call on, [Device.Next] returns [ErrDrained],
// and streams and loops end. Requests stay in the kernel, with the clients that
// sent them, until [Session.Resume] lets this session go on or another process
// does: see [Adopt]. A request that was read and that nobody was given is kept,
// for the next reader here or for the successor.
//
// If ctx is done before, the error tells how many requests are left and Is the
// cause of ctx. The session does not read then, either, until Resume. INTERRUPT
// is not read as well, so a server that has requests waiting for something
// should end those itself. Where a successor resends ([Session.NotifyResend]),
// the session can be handed over as it is.
//
// Drain may be called again. At the end of the session it returns [ErrUnmounted],
// [ErrAborted] or os.ErrClosed.
func (s *Session) Drain(ctx context.Context) error {
	d := s.stopReaders()
	select {
	case <-d.quiet:
	case <-d.resumed:
		return fuseError("drain", s.object(), errors.New("the session was resumed"))
	case <-s.closing.Done():
		return fuseError("drain", s.object(), s.ended())
	case <-ctx.Done():
		if !d.settled() {
			return fuseError("drain", s.object(), fmt.Errorf("%s: %w", s.leftInHand(), context.Cause(ctx)))
		}
	}
	if s.life.Err() != nil || s.connectionGone() {
		return fuseError("drain", s.object(), s.ended())
	}
	return nil
}

// drained tells whether nothing is to be read.
func (s *Session) drained() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drain != nil
}

func (s *Session) startDrain() *drain {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drain == nil {
		s.drain = &drain{quiet: make(chan struct{}), resumed: make(chan struct{})}
		s.divert()
		s.stopReading()
	}
	return s.drain
}

// stopReaders starts a drain, and waits until nobody reads: whoever was about to
// has either read, or seen the drain. A Resume meanwhile has to wait: a reader that
// saw neither would go on, and not be woken again.
func (s *Session) stopReaders() *drain {
	s.turning.Lock()
	defer s.turning.Unlock()
	d := s.startDrain()
	s.wake()
	for _, device := range s.openDevices() {
		device.reader.Lock()
		device.reader.Unlock() //lint:ignore SA2001 who reads from now on sees the drain
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.stopped = true
	s.settle()
	return d
}

// settle ends the waiting of Drain if nothing is in hand that somebody was given.
// s.mu is held.
func (s *Session) settle() {
	if s.drain == nil || !s.drain.stopped || s.drain.settled() || s.inHand > len(s.returned) {
		return
	}
	close(s.drain.quiet)
}

func (d *drain) settled() bool {
	select {
	case <-d.quiet:
		return true
	default:
		return false
	}
}

// leftInHand says which requests somebody was given and has not finished.
func (s *Session) leftInHand() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	kinds := map[string]bool{}
	for _, r := range s.outstanding {
		if !slices.Contains(s.returned, r) {
			kinds[r.Header.Opcode.String()] = true
		}
	}
	n := s.inHand - len(s.returned)
	text := fmt.Sprintf("%d requests are not answered or closed", n)
	if n == 1 {
		text = "1 request is not answered or closed"
	}
	if len(kinds) > 0 {
		text += " (" + strings.Join(slices.Sorted(maps.Keys(kinds)), ", ") + ")"
	}
	return text
}

// Resume ends what Drain began: requests are read again, by whoever calls
// [Device.Next], [Device.All] or [Device.Requests] from then on. It must not be
// called when another process serves the file system.
func (s *Session) Resume() {
	s.turning.Lock()
	defer s.turning.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drain == nil {
		return
	}
	close(s.drain.resumed)
	s.drain = nil
	s.reading, s.stopReading = context.WithCancel(context.Background())
	s.divert()
}

// readingContext returns a context that is done while the session is drained.
func (s *Session) readingContext() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reading
}
