package recorder

import (
	"fmt"
	"sync"
	"time"
	"unsafe"

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
	files     fileTable
	accesses  uint64
	overflows int
	nameless  map[string]int // why files could not be named, and how many
	left      int            // files that were too many
	faults    []string
	unsaid    int  // faults that were too many
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

// A file is an entry of the list. Its first access is passed on, and is not changed after
// that.
type file struct {
	first   Access
	ops     kernstream.FileOp
	count   uint64
	updated bool // it is in tally.updated
}

// entry returns the file as the list has it.
func (f *file) entry() Entry {
	return Entry{Path: f.first.Path, Ops: f.ops, First: f.first.First, Count: f.count}
}

// A fileTable holds files in their order. It grows without moving them, and has their paths
// in a few large pieces instead of an allocation for each.
type fileTable struct {
	n      int
	chunks [][]file
	paths  []byte // the piece that is being filled
}

const (
	tableChunk = 1 << 10 // files
	pathsChunk = 1 << 16 // bytes
)

func (t *fileTable) at(i int) *file { return &t.chunks[i/tableChunk][i%tableChunk] }

// add appends a file, whose path is copied.
func (t *fileTable) add(f file) *file {
	if t.n%tableChunk == 0 {
		t.chunks = append(t.chunks, make([]file, 0, tableChunk))
	}
	chunk := &t.chunks[t.n/tableChunk]
	f.first.Path = t.keep(f.first.Path)
	*chunk = append(*chunk, f)
	t.n++
	return &(*chunk)[len(*chunk)-1]
}

// keep returns a copy of a path.
func (t *fileTable) keep(path string) string {
	if cap(t.paths)-len(t.paths) < len(path) {
		t.paths = make([]byte, 0, max(pathsChunk, len(path)))
	}
	from := len(t.paths)
	t.paths = append(t.paths, path...)
	// These bytes are never written again, so they may be a string.
	return unsafe.String(unsafe.SliceData(t.paths[from:]), len(path))
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
		t.again(i, e.Ops)
		return
	}
	if t.files.n == t.limit {
		t.left++
		return
	}
	f := file{first: Access{When: e.When, First: max(0, e.When.Sub(t.began)), Path: path, Ops: e.Ops, PID: e.PID}, ops: e.Ops, count: 1}
	if keep {
		t.waitForRoom()
		if !t.hurried {
			f.first.File, _ = e.Detach()
		}
	}
	t.enter(f)
}

// again enters another access to a file.
func (t *tally) again(i int, ops kernstream.FileOp) {
	f := t.files.at(i)
	f.ops |= ops
	f.count++
	if t.keepUpdates && i < t.sent && !f.updated {
		f.updated = true
		t.updated = append(t.updated, i)
	}
}

// waitForRoom waits until there are fewer than maxPending files that nobody has taken.
func (t *tally) waitForRoom() {
	t.moved.Broadcast()
	for t.files.n-t.sent >= maxPending && !t.hurried {
		t.moved.Wait()
	}
}

// enter appends a file that is not in the list. Who waits for it is told by
// tell.
func (t *tally) enter(f file) {
	i := t.files.n
	t.index[t.files.add(f).first.Path] = i
}

// tell wakes who waits for files.
func (t *tally) tell() { t.moved.Broadcast() }

// overflow notes that the kernel has lost accesses.
func (t *tally) overflow() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.overflows++
	t.overflowAt = t.files.n
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
	for i := t.sent; i < t.files.n; i++ {
		f := t.files.at(i)
		f.first.Close()
		f.first.File = nil
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
	for t.sent == t.files.n {
		if t.finished {
			return nil
		}
		t.moved.Wait()
	}
	f := t.files.at(t.sent)
	t.sent++
	t.moved.Broadcast()
	return &f.first
}

func (t *tally) progress() Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Progress{Files: t.files.n, Accesses: t.accesses, Overflows: t.overflows}
}
