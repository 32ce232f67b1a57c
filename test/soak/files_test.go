package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// files is what happens to the files of a tmpfs. Its book has each file, which has a
// number of its own, with the operations that were done to it and those that
// were told. An event of a full queue settles what happened before it: that is
// told as lost.
type files struct {
	dir    string
	whole  bool // the whole file system can be marked
	opened bool // events can have descriptors
	w      *kernstream.FileWatcher
	flood  atomic.Bool  // the queue is about to overflow
	number atomic.Int64 // of the last file

	renaming sync.RWMutex // held for writing while a directory has another name

	mu     sync.Mutex
	owed   map[int64]*fileDebt
	gone   map[int64]bool // told as lost; what comes nevertheless counts no more
	losses int
}

type fileDebt struct {
	done kernstream.FileOp // what was done to the file
	told kernstream.FileOp
	over bool // nothing more will be done
}

const (
	fileDirs = 8

	// fileDebts is how many files may be owed for before their makers wait. The
	// kernel's queue has room for 16,384 events.
	fileDebts = 2000

	// floodDebts is how many files are made while the consumer does not receive,
	// so that the queue overflows.
	floodDebts = 30_000

	fileOps = kernstream.OpCreate | kernstream.OpCloseWrite | kernstream.OpRename | kernstream.OpDelete
)

func newFiles(t *testing.T) *files {
	p := &files{dir: testenv.MountDir(t), owed: map[int64]*fileDebt{}, gone: map[int64]bool{}}
	for i := range fileDirs {
		if err := os.Mkdir(p.path(i), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	works := func(options *kernstream.FileOptions, ops kernstream.FileOp) bool {
		w, err := patiently(func() (*kernstream.FileWatcher, error) {
			return kernstream.WatchFiles(t.Context(), options, kernstream.Mark{Type: kernstream.MarkFilesystem, Path: p.dir, Ops: ops})
		})
		if err == nil {
			w.Close()
		}
		return err == nil
	}
	p.whole = works(nil, fileOps)
	p.opened = works(&kernstream.FileOptions{Descriptors: true}, kernstream.OpCloseWrite)
	t.Logf("files: a mark of the whole file system: %v, events with descriptors: %v", p.whole, p.opened)
	return p
}

// path returns that of a directory, or of something in it.
func (p *files) path(dir int, name ...any) string {
	return filepath.Join(p.dir, fmt.Sprint("d", dir), fmt.Sprint(name...))
}

// marks returns what to mark: the file system, or each directory.
func (p *files) marks() []kernstream.Mark {
	if p.whole {
		return []kernstream.Mark{{Type: kernstream.MarkFilesystem, Path: p.dir, Ops: fileOps}}
	}
	var marks []kernstream.Mark
	for i := range fileDirs {
		marks = append(marks, kernstream.Mark{Path: p.path(i), Ops: fileOps | kernstream.OpEventOnChild})
	}
	return marks
}

func (p *files) name() string { return "files" }

func (p *files) begin(ctx context.Context) (_ kernstream.Source, err error) {
	p.w, err = patiently(func() (*kernstream.FileWatcher, error) { return kernstream.WatchFiles(ctx, nil, p.marks()...) })
	clear(p.gone)
	return p.w, err
}

func (p *files) end() error { return nil }

func (p *files) workers() int { return 2 }

func (p *files) act(ctx context.Context, random *rand.Rand) error {
	if *length > 0 && random.IntN(20) == 0 && p.flood.CompareAndSwap(false, true) {
		defer p.flood.Store(false)
		for n := 0; n < floodDebts; n, _ = p.open() {
			if err := p.life(random); err != nil {
				return err
			}
		}
		return nil
	}
	for ctx.Err() == nil {
		if n, _ := p.open(); n > fileDebts || p.flood.Load() {
			time.Sleep(100 * time.Microsecond)
			continue
		}
		var err error
		if p.whole && random.IntN(300) == 0 {
			err = p.renameDir(random.IntN(fileDirs))
		} else {
			err = p.life(random)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// life is that of one file.
func (p *files) life(random *rand.Rand) error {
	p.renaming.RLock()
	defer p.renaming.RUnlock()
	number := p.number.Add(1)
	d := &fileDebt{}
	did := func(op kernstream.FileOp) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.owed[number] == nil && d.done == 0 {
			p.owed[number] = d
		}
		d.done |= op
	}
	// What is about to be done is written down before: it may be told before the
	// call returns.
	path := p.path(random.IntN(fileDirs), "f", number)
	did(kernstream.OpCreate | kernstream.OpCloseWrite)
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	unix.Write(fd, []byte("x"))
	unix.Close(fd)
	if random.IntN(2) == 0 {
		did(kernstream.OpRename)
		to := p.path(random.IntN(fileDirs), "r", number)
		if err := unix.Rename(path, to); err != nil {
			return fmt.Errorf("rename %s: %w", path, err)
		}
		path = to
	}
	did(kernstream.OpDelete)
	if err := unix.Unlink(path); err != nil {
		return fmt.Errorf("unlink %s: %w", path, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d.over = true
	p.settle(number, d)
	return nil
}

// settle forgets a debt that is paid. The caller holds p.mu.
func (p *files) settle(number int64, d *fileDebt) {
	if d.over && d.told == d.done {
		delete(p.owed, number)
	}
}

// renameDir renames a directory and renames it back.
func (p *files) renameDir(dir int) error {
	p.renaming.Lock()
	defer p.renaming.Unlock()
	other := filepath.Join(p.dir, fmt.Sprint("o", dir))
	return errors.Join(os.Rename(p.path(dir), other), os.Rename(other, p.path(dir)))
}

// guest watches the same files, with whatever options, and loses interest.
func (p *files) guest(ctx context.Context, random *rand.Rand) error {
	options := &kernstream.FileOptions{}
	marks := p.marks()
	if p.opened {
		switch random.IntN(3) {
		case 0:
			options.ReportPidFD = true
		case 1:
			options.Descriptors = true
			for i := range marks {
				marks[i].Ops = kernstream.OpCloseWrite
			}
		}
	}
	var w *kernstream.FileWatcher
	for {
		var err error
		w, err = kernstream.WatchFiles(ctx, options, marks...)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				w.Close()
			}
			return nil
		case errors.Is(err, unix.EMFILE):
			time.Sleep(10 * time.Millisecond) // all groups of the user are taken
			continue
		case err != nil:
			return err
		}
		break
	}
	if random.IntN(2) == 0 {
		defer w.Close() // not by its context
	}
	for e := range w.C {
		if random.IntN(1000) == 0 {
			w.Unmark(marks[0])
			w.Mark(marks[0])
		}
		e.Close()
	}
	if err := w.Err(); err != context.Cause(ctx) {
		return fmt.Errorf("it ended by %v", err)
	}
	return nil
}

func (p *files) take(e kernstream.Event) (mine bool, things int, err error) {
	f, ok := e.(*kernstream.FileEvent)
	if !ok {
		return false, 0, nil
	}
	for p.flood.Load() {
		time.Sleep(time.Millisecond)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.Ops.Has(kernstream.OpOverflow) {
		for number := range p.owed {
			p.gone[number] = true
			p.losses++
		}
		clear(p.owed)
		return true, 1, nil
	}
	return true, 1, p.tell(f)
}

// tell writes down what an event told. The caller holds p.mu.
func (p *files) tell(f *kernstream.FileEvent) error {
	if f.Err != nil {
		return f.Err
	}
	number, moved, err := p.numberOf(f.Path)
	if err != nil {
		return err
	}
	d := p.owed[number]
	switch ops := f.Ops & fileOps; {
	case p.gone[number]:
		return nil
	case d == nil:
		return errors.New("nothing is owed of this file")
	case ops == 0 || ops&^d.done != 0:
		return fmt.Errorf("what was done is %v", d.done)
	case ops&d.told != 0:
		return fmt.Errorf("told already is %v", d.told)
	case ops.Has(kernstream.OpRename):
		if old, _, err := p.numberOf(f.OldPath); err != nil || old != number || !moved {
			return fmt.Errorf("the paths do not fit: %w", err)
		}
	}
	d.told |= f.Ops & fileOps
	p.settle(number, d)
	return nil
}

// numberOf returns the number of the file that a path is of, and whether it is
// the name that it got by a rename.
func (p *files) numberOf(path string) (number int64, moved bool, err error) {
	rest, ok := strings.CutPrefix(path, p.dir+"/")
	var dir int
	var kind, name rune
	if n, _ := fmt.Sscanf(rest, "%c%d/%c%d", &kind, &dir, &name, &number); !ok || n != 4 || dir >= fileDirs ||
		kind != 'd' && kind != 'o' || name != 'f' && name != 'r' {
		return 0, false, fmt.Errorf("there never was a file %q", path)
	}
	return number, name == 'r', nil
}

func (p *files) open() (n int, example string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for number, d := range p.owed {
		example = fmt.Sprintf("file %d, to which %v was done and of which %v was told", number, d.done, d.told)
		break
	}
	return len(p.owed), example
}

func (p *files) lost() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.losses
}

// queued returns how many bytes of events wait in the groups. What comes of
// files that were told as lost has come by then.
func (p *files) queued() (n int) {
	p.w.Control(func(fd int) {
		waiting, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
		if err == nil {
			n += waiting
		}
	})
	return n
}
