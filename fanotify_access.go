package kernstream

import (
	"container/list"
	"context"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Permission events that were read and not answered: the kernel calls them the
// access list of a group. Each gets one answer, from whoever comes first: the
// consumer, its deadline, its Close, or the end of the stream.
//
// The kernel knows an event by the number of its descriptor alone. An answer
// that is written after that was closed may be one to another event, which got
// the number. So an event is answered, and its descriptor closed, under the lock
// of its descriptors, in this order.

// An accessList is the events of one group that wait: permission events for
// their answer, and all events for the consumer. So who reads the group waits
// for nobody.
type accessList struct {
	group     responder
	class     FileClass
	audit     bool
	byDefault Response
	deadline  time.Duration // 0: none
	limit     int           // of held, and of kept
	together  int           // how many answers are collected: their descriptors are open

	defaulted atomic.Uint64 // how many got the default answer

	c     chan<- *FileEvent
	wake  chan struct{} // the queue is not empty any more
	timer *time.Timer
	ended chan struct{} // closed when run has ended; nil: it has not begun

	closer fileCloser

	// The lock of an event's descriptors is taken before this one.
	mu      sync.Mutex
	waiting list.List // *permission, without an answer, the oldest first
	queue   list.List // *FileEvent, not delivered, the oldest first
	held    int       // permission events that nobody is through with
	kept    int       // others in the queue that have descriptors
	armed   bool      // the timer runs; it may be for an event that has its answer

	// Answers that are to be written together. See collect.
	collected []collected
	writing   bool // a goroutine does, and then looks here again
	over      bool // nobody waits any more, and the consumer's answers are written one by one
	writers   sync.WaitGroup
}

// A responder writes answers to a group.
type responder interface {
	respond(fd int, r Response) error
	respondAll(fds []int, r Response)
}

// A permission is the question that an event asks.
type permission struct {
	list    *accessList
	own     *fileDescriptors
	fd      int // what the kernel knows it by
	expires time.Time

	answered error // why there can be no answer any more; nil: it is awaited. Under the lock of own

	// These are under the lock of the list.
	waits  *list.Element // in waiting; nil: it has its answer
	queued *list.Element // in queue; nil: not yet, or delivered
	held   bool          // counted

	unwritten bool // its answer is among those collected
	closing   bool // the descriptor is to be closed once it does
}

var (
	errAnswered = fmt.Errorf("answered already: %w", unix.EALREADY)
	errTooLate  = fmt.Errorf("answered by default, at the deadline: %w", os.ErrDeadlineExceeded)
	errEnded    = fmt.Errorf("answered by default: %w", os.ErrClosed)
)

func newAccessList(group responder, flags uint, options *FileOptions) (*accessList, error) {
	l := &accessList{
		group:     group,
		class:     options.Class,
		audit:     flags&unix.FAN_ENABLE_AUDIT != 0,
		byDefault: options.Default,
		deadline:  options.deadline(),
		limit:     options.maxPending(flags),
		together:  atMost(answersAtOnce),
		wake:      make(chan struct{}, 1),
		timer:     time.NewTimer(time.Hour),
		closer:    fileCloser{closeOne: unix.Close, takesLong: readTakesLong, atOnce: readsAtOnce},
	}
	l.timer.Stop()
	// No event has this number: the kernel looks at the answer first.
	if err := group.respond(math.MaxInt32, l.byDefault); err != unix.ENOENT {
		return nil, fileError("write", "fanotify", fmt.Errorf("the response Default: %w", l.byDefault.explain(err)))
	}
	return l, nil
}

// respond gives the consumer's answer.
func (p *permission) respond(r Response) error {
	p.own.mu.Lock()
	defer p.own.mu.Unlock()
	if p.answered != nil {
		return p.answered
	}
	if err := r.check(p.list.class, p.list.audit); err != nil {
		return err
	}
	if r == (Response{Allow: true}) && p.list.collect(p) {
		p.answered = errAnswered
		return nil
	}
	if err := p.list.group.respond(p.fd, r); err != nil {
		return r.explain(err)
	}
	p.answered = errAnswered
	p.list.release(p)
	return nil
}

// close gives the default answer if there is none yet, and lets go of the event.
// The lock of the descriptors is held, which are to be closed. It tells whether
// that of the file has to wait, and is closed by somebody else.
func (p *permission) close() (later bool) {
	if p.answered == nil {
		p.list.defaulted.Add(1)
		p.list.group.respond(p.fd, p.list.byDefault)
		p.answered = errEnded
	}
	return p.list.release(p)
}

// release takes out an event that the consumer is through with. It tells whether
// its answer is still to be written; the descriptor is then closed after that.
func (l *accessList) release(p *permission) (unwritten bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.through(p)
	p.closing = p.unwritten
	return p.unwritten
}

// through does what release does, for the event alone.
func (l *accessList) through(p *permission) {
	l.remove(p)
	if p.held {
		p.held = false
		l.held--
	}
}

// remove takes an event from those that wait for an answer.
func (l *accessList) remove(p *permission) {
	if p.waits != nil {
		l.waiting.Remove(p.waits)
		p.waits = nil
	}
}

// hold counts one more permission event, if there is room for it.
func (l *accessList) hold() bool { return l.count(&l.held) }

// keep counts one more event of another kind that has descriptors, if there is room
// for it.
func (l *accessList) keep() bool { return l.count(&l.kept) }

func (l *accessList) count(n *int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if *n >= l.limit {
		return false
	}
	*n++
	return true
}

// enter puts an event that was counted on the list. Its descriptor stays open
// until offer has been called, which answers it if the end has come.
func (l *accessList) enter(e *FileEvent) {
	p := &permission{list: l, own: e.own, fd: e.own.fd, held: true}
	e.own.asks = p
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return
	}
	p.waits = l.waiting.PushBack(p)
	if l.deadline > 0 {
		p.expires = e.When.Add(l.deadline)
		l.arm(time.Until(p.expires))
	}
}

// arm lets the timer run if it does not. It is not set back when an event has
// its answer: it then comes for the oldest of those that follow, too early, and
// is set again.
func (l *accessList) arm(d time.Duration) {
	if !l.armed {
		l.armed = true
		l.timer.Reset(d)
	}
}

// offer gives an event to a consumer that waits for one, or puts it into the
// queue.
func (l *accessList) offer(e *FileEvent) {
	if !l.place(e) {
		e.Close()
	}
}

// place does what offer does. It tells whether the event is still of use.
func (l *accessList) place(e *FileEvent) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := e.question()
	if p != nil && p.waits == nil {
		return false // it expired, or the end came, before it was complete
	}
	if l.queue.Len() == 0 {
		select {
		case l.c <- e:
			l.gone(e)
			return true
		default:
		}
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	element := l.queue.PushBack(e)
	if p != nil {
		p.queued = element
	}
	return true
}

// gone notes that an event is the consumer's.
func (l *accessList) gone(e *FileEvent) {
	if p := e.question(); p != nil {
		p.queued = nil
	} else if e.own != nil && e.own.counted {
		l.kept-- // the descriptors are the consumer's to close
	}
}

// start begins to run, and to deliver on c.
func (l *accessList) start(ctx context.Context, c chan<- *FileEvent) {
	l.c, l.ended = c, make(chan struct{})
	go l.run(ctx)
}

// stopped waits until run has ended.
func (l *accessList) stopped() {
	if l.ended != nil {
		<-l.ended
	}
}

// run delivers what is in the queue, and answers what nobody has answered in
// time, until ctx is done.
func (l *accessList) run(ctx context.Context) {
	defer close(l.ended)
	defer l.timer.Stop()
	for ctx.Err() == nil {
		e := l.first()
		c := l.c
		if e == nil {
			c = nil
		}
		select {
		case c <- e:
			l.delivered(e)
		case <-l.wake:
		case <-l.timer.C:
			l.expire(time.Now())
		case <-ctx.Done():
		}
	}
}

func (l *accessList) first() *FileEvent {
	l.mu.Lock()
	defer l.mu.Unlock()
	if front := l.queue.Front(); front != nil {
		return front.Value.(*FileEvent)
	}
	return nil
}

// delivered takes the first event out of the queue. Nobody else does.
func (l *accessList) delivered(e *FileEvent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue.Remove(l.queue.Front())
	l.gone(e)
}

// answersAtOnce is how many answers are written by one system call, at most:
// the kernel takes no more buffers (UIO_MAXIOV).
const answersAtOnce = 1024

// expire answers what waits since too long, and sets the timer for the next. An
// event that was not delivered is not going to be.
func (l *accessList) expire(now time.Time) {
	late := func(p *permission) bool { return !p.expires.After(now) }
	for {
		asked, undelivered := l.take(late)
		if len(asked) == 0 {
			break
		}
		l.answer(asked, errTooLate)
		l.discard(undelivered...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.armed = false
	if front := l.waiting.Front(); front != nil {
		l.arm(time.Until(front.Value.(*permission).expires))
	}
}

// take takes the first events that wait and are meant, and those of them that
// were not delivered out of the queue.
func (l *accessList) take(meant func(*permission) bool) (asked []*permission, undelivered []*FileEvent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(asked) < answersAtOnce {
		front := l.waiting.Front()
		if front == nil || !meant(front.Value.(*permission)) {
			break
		}
		p := front.Value.(*permission)
		l.remove(p)
		asked = append(asked, p)
		if p.queued != nil {
			undelivered = append(undelivered, l.queue.Remove(p.queued).(*FileEvent))
			p.queued = nil
		}
	}
	return asked, undelivered
}

// answer gives events the default answer, all at once. (Each system call that
// answers wakes all who wait for the group. One for each of some thousands would
// take minutes.) What the consumer has answered meanwhile is left as it is.
func (l *accessList) answer(asked []*permission, why error) {
	fds := make([]int, 0, len(asked))
	for _, p := range asked {
		p.own.mu.Lock()
		if p.answered == nil {
			p.answered = why
			fds = append(fds, p.fd)
		}
	}
	l.defaulted.Add(uint64(len(fds))) // whoever was answered is counted
	l.group.respondAll(fds, l.byDefault)
	for _, p := range asked {
		p.own.mu.Unlock()
	}
}

// discard closes events that nobody gets, and does not wait for their file systems.
func (l *accessList) discard(events ...*FileEvent) {
	for _, e := range events {
		for _, fd := range e.letGo().fds {
			if fd >= 0 {
				l.closer.close(fd)
			}
		}
	}
}

// end answers all events, and closes those that were not delivered, after run has
// ended. Events that do not ask, and are offered meanwhile, are for a second call.
func (l *accessList) end() {
	l.writeAlone()
	for {
		asked, undelivered := l.take(func(*permission) bool { return true })
		if len(asked) == 0 {
			break
		}
		l.answer(asked, errEnded)
		l.discard(undelivered...)
	}
	for e := l.first(); e != nil; e = l.first() {
		l.delivered(e)
		l.discard(e)
	}
}
