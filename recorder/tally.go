package recorder

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/kernstream/kernstream"
)

// A tally is a list while it grows: one goroutine enters what happens, and one
// passes it on.
type tally struct {
	limit int

	mu        sync.Mutex
	moved     sync.Cond // something that send or add may wait for has changed
	began     time.Time
	index     map[string]int // of files, by path
	files     []file
	accesses  uint64
	overflows int
	nameless  map[string]int // why files could not be named, and how many
	left      int            // files that were too many
	faults    []string
	sent      int  // how many files have been passed on
	hurried   bool // nobody takes files any more
	finished  bool
	judged    bool     // a server has said whether it is complete,
	verdict   []string // and why it is not

	// For a connection.
	keepUpdates   bool
	updated       []int // files that were accessed again since they were sent
	overflowsSent int
	overflowAt    int // how many files there were at the last overflow
}

// A file is an entry of the list, and what comes with its first access.
type file struct {
	Entry
	pid     int
	open    *os.File // until it is passed on
	updated bool     // it is in tally.updated
}

func newTally(limit int) *tally {
	t := &tally{limit: limit, index: map[string]int{}, nameless: map[string]int{}}
	t.moved.L = &t.mu
	return t
}

func (t *tally) begin() { t.began = time.Now() }

// add enters an access to the file path.
func (t *tally) add(path string, e *kernstream.FileEvent, keep bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.accesses++
	if i, known := t.index[path]; known {
		f := &t.files[i]
		f.Ops |= e.Ops
		f.Count++
		if t.keepUpdates && i < t.sent && !f.updated {
			f.updated = true
			t.updated = append(t.updated, i)
		}
		return
	}
	if len(t.files) == t.limit {
		t.left++
		return
	}
	f := file{Entry: Entry{Path: strings.Clone(path), Ops: e.Ops, First: max(0, e.When.Sub(t.began)), Count: 1}, pid: e.PID}
	if keep {
		for len(t.files)-t.sent >= maxPending && !t.hurried {
			t.moved.Wait()
		}
		if !t.hurried {
			f.open, _ = e.Detach()
		}
	}
	t.enter(f)
}

// enter appends a file that is not in the list.
func (t *tally) enter(f file) {
	t.index[f.Path] = len(t.files)
	t.files = append(t.files, f)
	t.moved.Broadcast()
}

// overflow notes that the kernel has lost accesses.
func (t *tally) overflow() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.overflows++
	t.overflowAt = len(t.files)
	t.moved.Broadcast()
}

// unnamed notes an access to a file that has no path.
func (t *tally) unnamed(e *kernstream.FileEvent) {
	why := "their paths are not known"
	switch {
	case e.PathState == kernstream.PathDeleted:
		why = "they were removed, with their directories, before they could be named"
	case e.PathState == kernstream.PathOutside:
		why = "no mount shows them"
	case e.Err != nil:
		why = e.Err.Error()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.accesses++
	t.nameless[why]++
}

// fault notes another reason for which the list is incomplete.
func (t *tally) fault(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.addFault(fmt.Sprintf(format, args...))
}

// hurry lets nobody wait for the consumer any more.
func (t *tally) hurry() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hurried = true
	for i := t.sent; i < len(t.files); i++ {
		t.files[i].close()
	}
	t.moved.Broadcast()
}

// finish ends the list.
func (t *tally) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.finished = true
	t.moved.Broadcast()
}

// send passes the files on until the list is finished, or emit returns false.
func (t *tally) send(emit func(*Access) bool) {
	for {
		a := t.next()
		if a == nil {
			return
		}
		if !emit(a) {
			t.hurry()
			return
		}
	}
}

// next waits for a file that was not passed on yet. It returns nil when there
// are no more.
func (t *tally) next() *Access {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.sent == len(t.files) {
		if t.finished {
			return nil
		}
		t.moved.Wait()
	}
	f := &t.files[t.sent]
	a := &Access{When: t.began.Add(f.First), First: f.First, Path: f.Path, Ops: f.Ops, PID: f.pid, File: f.open}
	f.open = nil
	t.sent++
	t.moved.Broadcast()
	return a
}

func (t *tally) progress() Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Progress{Files: len(t.files), Accesses: t.accesses, Overflows: t.overflows}
}

func (f *file) close() {
	if f.open != nil {
		f.open.Close()
		f.open = nil
	}
}
