package kernstream

import "syscall"

// A Watch is one watch of a ProcessWatcher. It ends with the event of the last
// phase that was asked for, by Stop, and with the watcher.
type Watch struct {
	process *process
	feed    *processFeed   // whose channel the events go to, or
	stream  *processStream // that this is part of
	tag     any

	until  uint8 // how many phases are to be told
	told   uint8 // how many were: received, or sent to a channel that has room
	hooked bool  // it waits for its process
	queued uint8 // how many were told, or wait for the consumer
	ended  bool

	turns [Reaped + 1]uint64 // of its events that wait, among all of its feed
	links [ofQueue + Reaped + 1]watchLinks
}

func newWatch(feed *processFeed, options *ProcessOptions) *Watch {
	w := &Watch{feed: feed}
	w.init(options)
	return w
}

func (w *Watch) init(options *ProcessOptions) {
	w.until = uint8(Exited) + 1
	if options != nil {
		w.until = uint8(options.Until) + 1
		w.tag = options.Tag
	}
}

// ID returns what tells the process from all others.
func (w *Watch) ID() ProcessID {
	w.feed.table.mu.Lock()
	defer w.feed.table.mu.Unlock()
	return w.process.processID()
}

// Stop ends the watch. When it returns, nothing more of it is delivered. received
// tells that all its events had been received before, so that there was nothing
// to stop. It may be called again, at any time and from anywhere.
func (w *Watch) Stop() (received bool) { return w.feed.stop(w) }

// pending is how many phases were seen and have not been told.
func (w *Watch) pending() int { return int(min(w.process.known, w.until)) - int(w.told) }

// event returns the next event to tell.
func (w *Watch) event() *ProcessEvent {
	end := w.process.end
	e := &ProcessEvent{
		When:        end.when[w.told],
		Process:     end.id,
		Phase:       Phase(w.told),
		StatusKnown: end.statusKnown,
		Status:      syscall.WaitStatus(end.status),
		Tag:         w.tag,
	}
	if w.feed != nil {
		e.Watch = w
	}
	return e
}

// The lists that a watch may be in.
const (
	ofProcess = iota // waits for a phase of the process
	ofOwner          // of the ProcessWatcher, of a context, or to be closed
	ofQueue          // waits for the consumer with Exited, and one further on with Reaped
)

// A watchList is a list of watches through one of their links.
type watchList struct{ first, last *Watch }

type watchLinks struct{ previous, next *Watch }

func (l *watchList) push(w *Watch, as int) {
	w.links[as] = watchLinks{previous: l.last}
	if l.last == nil {
		l.first = w
	} else {
		l.last.links[as].next = w
	}
	l.last = w
}

func (l *watchList) remove(w *Watch, as int) {
	links := w.links[as]
	if links.previous == nil {
		l.first = links.next
	} else {
		links.previous.links[as].next = links.next
	}
	if links.next == nil {
		l.last = links.previous
	} else {
		links.next.links[as].previous = links.previous
	}
	w.links[as] = watchLinks{}
}
