package kernstream

import "github.com/kernstream/kernstream/internal/fanotify"

// Answers that are written together.
//
// The kernel has one queue for all who wait for an answer of a group, and wakes
// them all for each write(2): all but one find that it was not theirs, and wait
// again. With n openers that is n times n switches. So answers are collected, and
// written by one writev(2):
//
//   - What the consumer allows while others wait, by a goroutine that takes all it
//     finds. While it writes, the consumer goes on, and collects the next ones;
//     when the consumer has nothing more to judge, the goroutine's turn has come
//     at the latest. Only the plain Allow is collected: the kernel takes it in
//     any case, so there is no error to be told, and if the process ends before
//     it is written, the kernel allows by itself. A denial must not get lost so.
//   - What the consumer is not asked about, by who reads, when there is nothing
//     more to read.

// A collected answer is on its way to the kernel.
type collected struct {
	fd    int
	allow bool        // otherwise it is the default answer
	asked *permission // nil: nobody has the event, and fd is to be closed
}

// collect takes the answer Allow to an event, to write it with others. If nobody
// else waits, it does not.
func (l *accessList) collect(p *permission) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || l.waiting.Len() <= 1 && !l.writing {
		return false
	}
	p.unwritten = true
	l.through(p)
	l.collected = append(l.collected, collected{p.fd, true, p})
	if !l.writing {
		l.writing = true
		l.writers.Go(l.write)
	}
	return true
}

// write writes what is collected, until there is no more.
func (l *accessList) write() {
	for {
		l.mu.Lock()
		batch := l.collected
		l.collected, l.writing = nil, len(batch) > 0
		l.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		l.closer.close(l.send(batch)...)
	}
}

// settle takes the answer to a question that nobody gets, to write it with others:
// Allow, or the default one. Who calls it, and may be held up by a file system,
// calls writeCollected before it waits.
func (l *accessList) settle(raw fanotify.Event, allow bool) {
	fd := raw.FD()
	discardProcess(raw)
	if !allow {
		l.defaulted.Add(1)
	}
	l.mu.Lock()
	l.collected = append(l.collected, collected{fd, allow, nil})
	full := len(l.collected) >= l.together
	l.mu.Unlock()
	if full {
		closeAll(l.writeCollected())
	}
}

// writeCollected writes what is collected. It returns the descriptors that are to be
// closed.
func (l *accessList) writeCollected() (unused []int) {
	l.mu.Lock()
	batch := l.collected
	l.collected = nil
	l.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	return l.send(batch)
}

// send writes answers, all that are the same by one call. It returns the
// descriptors of events that nobody has, or that were closed meanwhile.
func (l *accessList) send(batch []collected) (unused []int) {
	fds := make([]int, 0, len(batch))
	for _, allow := range []bool{true, false} {
		fds = fds[:0]
		for _, answer := range batch {
			if answer.allow == allow {
				fds = append(fds, answer.fd)
			}
		}
		response := l.byDefault
		if allow {
			response = Response{Allow: true}
		}
		l.group.respondAll(fds, response)
	}
	fds = fds[:0]
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, answer := range batch {
		p := answer.asked
		if p != nil {
			p.unwritten = false
		}
		if p == nil || p.closing {
			fds = append(fds, answer.fd)
		}
	}
	return fds
}

// writeAlone waits until all that the consumer has allowed is written. From then
// on, that is never collected, and no event is entered.
func (l *accessList) writeAlone() {
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
	l.writers.Wait()
}
