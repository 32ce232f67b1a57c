package kernstream_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Paths while directories are renamed at random.

// TestFileRenameStorm: while directories are renamed at random and files are
// opened below them, every path is one that the file had between its event and
// its delivery, or the event says otherwise. When all is quiet, the paths are
// those that a walk finds.
func TestFileRenameStorm(t *testing.T) {
	needMarks(t)
	for _, options := range []*kernstream.FileOptions{nil, {Descriptors: true}} {
		name := "handle"
		if options != nil {
			name = "descriptor"
		}
		t.Run(name, func(t *testing.T) {
			l := newFileLab(t, options, "")
			storm := newRenameStorm(l, 12, testenv.SoakN(8_000))
			l.do(l.w.Mark(kernstream.Mark{Type: filesystem, Path: l.dir, Ops: opOpen}))
			storm.run(l)
			l.do(filepath.WalkDir(l.dir, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.Type().IsRegular() && strings.HasSuffix(path, "-0") {
					_, err = os.ReadFile(path)
					e := l.receive()
					if e.Path != path || e.PathState != kernstream.PathExact {
						t.Errorf("event %v; want %s", e, path)
					}
					e.Close()
				}
				return err
			}))
			l.quiet("that was all")
		})
	}
}

// A renameStorm is directories that are renamed, with files in them that are
// each opened once.
type renameStorm struct {
	l    *fileLab
	dirs []*stormDir

	mu     sync.Mutex // of the model
	opened []time.Time
	files  []int // which directory a file is in
}

// A stormDir is a directory, and where it has been.
type stormDir struct {
	name   string
	parent *stormDir
	was    []stormPath
}

// A stormPath is a path that a directory may have had from one time to another.
type stormPath struct {
	path     string
	from, to time.Time // to is zero while it is so
}

func newRenameStorm(l *fileLab, dirs, files int) *renameStorm {
	s := &renameStorm{l: l, opened: make([]time.Time, files), files: make([]int, files)}
	now := time.Now()
	root := &stormDir{was: []stormPath{{path: l.dir, from: now}}}
	s.dirs = []*stormDir{root}
	for i := range dirs {
		d := &stormDir{name: fmt.Sprint("d", i), parent: s.dirs[rand.IntN(len(s.dirs))]}
		d.was = []stormPath{{path: d.path(), from: now}}
		l.do(os.Mkdir(d.path(), 0o755))
		s.dirs = append(s.dirs, d)
	}
	for i := range files {
		s.files[i] = 1 + i%dirs
		l.create(filepath.Join(strings.TrimPrefix(s.dirs[s.files[i]].path(), l.dir), fmt.Sprint("f-", i)))
	}
	return s
}

func (d *stormDir) path() string {
	if d.parent == nil {
		return d.was[0].path
	}
	return filepath.Join(d.parent.path(), d.name)
}

func (d *stormDir) below(other *stormDir) bool {
	for ; d != nil; d = d.parent {
		if d == other {
			return true
		}
	}
	return false
}

// rename renames one directory.
func (s *renameStorm) rename(n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.dirs[1+rand.IntN(len(s.dirs)-1)]
	parent := s.dirs[rand.IntN(len(s.dirs))]
	if parent.below(d) {
		parent = d.parent
	}
	before := time.Now()
	old := d.path()
	d.parent, d.name = parent, fmt.Sprint("d", n)
	if err := os.Rename(old, d.path()); err != nil {
		return err
	}
	after := time.Now()
	for _, dir := range s.dirs {
		if dir.below(d) {
			dir.was[len(dir.was)-1].to = after
			dir.was = append(dir.was, stormPath{path: dir.path(), from: before})
		}
	}
	return nil
}

// open opens a file, wherever it is.
func (s *renameStorm) open(i int) {
	for {
		s.mu.Lock()
		path := filepath.Join(s.dirs[s.files[i]].path(), fmt.Sprint("f-", i))
		s.opened[i] = time.Now()
		s.mu.Unlock()
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			return
		}
		runtime.Gosched()
	}
}

// check tells what is wrong with an event that was received at a time.
func (s *renameStorm) check(e *kernstream.FileEvent, received time.Time) error {
	dir, name := filepath.Split(e.Path)
	var i int
	if _, err := fmt.Sscanf(name, "f-%d", &i); err != nil {
		return err
	}
	if e.PathState != kernstream.PathExact {
		return fmt.Errorf("%v is %v", e, e.PathState)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, was := range s.dirs[s.files[i]].was {
		if was.path == filepath.Clean(dir) && was.from.Before(received) && (was.to.IsZero() || was.to.After(s.opened[i])) {
			return nil
		}
	}
	return fmt.Errorf("%s was at no time between the event and its delivery where %v says", name, e)
}

// stormRenames is how many directories are renamed in a storm at least.
const stormRenames = 20

// run renames and opens until each file was opened once. The renames are spread
// over all that time, however slow the machine is.
func (s *renameStorm) run(l *fileLab) {
	l.t.Helper()
	stop := make(chan struct{})
	var all sync.WaitGroup
	var renames atomic.Int64
	all.Go(func() {
		for n := len(s.dirs); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.rename(n); err != nil {
				l.t.Error(err)
				return
			}
			renames.Add(1)
			time.Sleep(100 * time.Microsecond)
		}
	})
	all.Go(func() {
		for i := range s.opened {
			for int(renames.Load()) < (i+1)*stormRenames/len(s.opened) && !l.t.Failed() {
				time.Sleep(100 * time.Microsecond)
			}
			s.open(i)
			if i%16 == 0 {
				runtime.Gosched()
			}
		}
	})
	for range s.opened {
		e := l.receive()
		if err := s.check(e, time.Now()); err != nil {
			l.t.Error(err)
		}
		e.Close()
	}
	close(stop)
	all.Wait()
	l.t.Logf("%d renames, %d files", renames.Load(), len(s.opened))
	if renames.Load() < stormRenames {
		l.t.Errorf("only %d renames", renames.Load())
	}
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// TestFileOwnRename: the path of a directory that tells of its own rename is the
// one after that, whichever of the groups that see it is told first.
func TestFileOwnRename(t *testing.T) {
	needMarks(t)
	testenv.Feature(t, "file events", "handle")
	l := newFileLab(t, nil, "0/", kernstream.Mark{Type: filesystem, Ops: kernstream.OpMoveSelf | onDir})
	watchers := []*kernstream.FileWatcher{l.w}
	for range 7 {
		l.watch(nil, kernstream.Mark{Type: filesystem, Ops: kernstream.OpMoveSelf | onDir})
		watchers = append(watchers, l.w)
	}
	for i := range testenv.SoakN(200) {
		to := l.path(fmt.Sprint(i + 1))
		l.do(os.Rename(l.path(fmt.Sprint(i)), to))
		for _, w := range watchers {
			if e := receiveFile(t, w); e.Path != to { // which it remembers
				t.Fatalf("event %v; want %s", e, to)
			}
		}
	}
}

// TestFilePathRemembered: a directory that is gone when its event is read has the
// path that it was known by, also after renames of others.
func TestFilePathRemembered(t *testing.T) {
	needMarks(t)
	l := newFileLab(t, nil, "d/f other/f", kernstream.Mark{Type: filesystem, Ops: opOpen})
	see := func(name string) {
		t.Helper()
		l.read(name)
		if e := l.receive(); e.Path != l.path(name) || e.PathState != kernstream.PathExact {
			t.Errorf("event %v; want %s", e, name)
		}
	}
	see("d/f")
	for i := range 5 {
		name := fmt.Sprint("other", i)
		l.do(os.Rename(l.path("other"), l.path(name)))
		see(name + "/f")
		l.do(os.Rename(l.path(name), l.path("other")))
	}
	see("other/f")
	l.read("other/f")
	l.read("d/f") // they are read at once, and wait for the first
	l.do(os.RemoveAll(l.path("d")))
	l.receive()
	e := l.receive()
	if e.Path != l.path("d/f") || e.PathState != kernstream.PathDeleted && e.PathState != kernstream.PathExact {
		t.Errorf("event %v", e)
	}
}
