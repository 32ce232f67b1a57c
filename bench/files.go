package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// The group "files": file events, with the path of each, beside raw read loops
// and what programs do.

// fileTree is files on a tmpfs of their own, each to be opened once, in
// directories that are all resolved once.
type fileTree struct {
	dir   string
	files int
}

const treeDirectories = 100

func newFileTree(b *bench) (*fileTree, error) {
	tree := &fileTree{dir: filepath.Join(b.dir, "files"), files: b.scale(50_000, 3_000)}
	if err := mountTree(b.dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(tree.dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(b.dir, "output"), 0o755); err != nil {
		return nil, err
	}
	if err := mountTree(tree.dir); err != nil {
		return nil, err
	}
	return tree, tree.make()
}

// make makes the files.
func (t *fileTree) make() error {
	for i := range treeDirectories {
		if err := os.Mkdir(filepath.Join(t.dir, fmt.Sprint("d", i)), 0o755); err != nil {
			return err
		}
	}
	for i := range t.files {
		if err := os.WriteFile(t.path(i), nil, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func mountTree(dir string) error {
	return os.NewSyscallError("mount", unix.Mount("bench", dir, "tmpfs", 0, ""))
}

func (t *fileTree) close(b *bench) {
	unix.Unmount(t.dir, unix.MNT_DETACH)
	unix.Unmount(b.dir, unix.MNT_DETACH)
}

func (t *fileTree) path(i int) string {
	return fmt.Sprintf("%s/d%d/file-%d", t.dir, i*treeDirectories/t.files, i)
}

// open opens and closes files, in their order.
func (t *fileTree) open(from, to int) error {
	for i := from; i < to; i++ {
		fd, err := unix.Open(t.path(i), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("open", err)
		}
		unix.Close(fd)
	}
	return nil
}

// mark is what everybody watches for: an event for each file.
func (t *fileTree) mark() kernstream.Mark {
	return kernstream.Mark{Type: kernstream.MarkFilesystem, Path: t.dir, Ops: kernstream.OpOpen | kernstream.OpClose}
}

// group makes a fanotify group with the mark.
func (t *fileTree) group(flags uint) (int, error) {
	fd, err := unix.FanotifyInit(flags|unix.FAN_CLOEXEC|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		return -1, os.NewSyscallError("fanotify_init", err)
	}
	m := t.mark()
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, uint64(m.Ops), unix.AT_FDCWD, m.Path); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("fanotify_mark", err)
	}
	return fd, nil
}

func benchFiles(b *bench) error {
	if os.Geteuid() != 0 {
		fmt.Fprintln(b.progress, "files: needs root, left out")
		return nil
	}
	tree, err := newFileTree(b)
	if err != nil {
		return err
	}
	defer tree.close(b)
	for _, c := range []struct {
		name string
		run  func(*bench, *fileTree) error
	}{
		{"receive", benchFileReceive},
		{"receive descriptors", benchFileDescriptors},
		{"burst", benchFileBurst},
		{"cancel under load", benchFileCancel},
	} {
		if err := b.run(c.name, func() error { return c.run(b, tree) }); err != nil {
			return err
		}
	}
	return nil
}

// benchFileReceive takes events with their paths from a full queue.
func benchFileReceive(b *bench, tree *fileTree) error {
	o, err := b.interleave(1,
		contender{"kernstream", func(s *sampler) error { return receiveOurs(b, tree, s, &kernstream.FileOptions{}) }},
		contender{"raw handles", func(s *sampler) error { return receiveRaw(tree, s, unix.FAN_REPORT_DFID_NAME) }},
		contender{"readlink of each", func(s *sampler) error { return receiveReadlink(tree, s) }},
		contender{"acknowledged one by one", func(s *sampler) error { return receiveAcknowledged(b, tree, s) }})
	if err != nil {
		return err
	}
	var goals map[string]goal
	if !b.quick {
		goals = map[string]goal{
			"raw handles": maxRatio(1.5), "readlink of each": maxRatio(1.0 / 8), "acknowledged one by one": maxRatio(1.0 / 15),
		}
	}
	b.tell(o, tree.files, figure{"", "time", "ns/event", nanosecond, median}, goals)
	o.drop("readlink of each")
	o.drop("acknowledged one by one")
	o.drop("raw handles")
	b.tell(o, tree.files, figure{"allocs", "allocs", "allocs/event", 1, roundedMedian}, map[string]goal{"": maxOurs(1.1)})
	return nil
}

// benchFileDescriptors does the same with a descriptor for each event, of
// fewer files.
func benchFileDescriptors(b *bench, tree *fileTree) error {
	small := *tree
	small.files = min(tree.files, 10_000)
	o, err := b.interleave(1,
		contender{"kernstream", func(s *sampler) error {
			return receiveOurs(b, tree, s, &kernstream.FileOptions{Descriptors: true})
		}},
		contender{"raw descriptors", func(s *sampler) error { return receiveRaw(tree, s, 0) }})
	if err != nil {
		return err
	}
	b.tell(o, tree.files, figure{"", "time", "ns/event", nanosecond, median}, nil)
	return nil
}

// stall is how many events stop a watcher whose consumer does not come: more
// than its channel holds.
const stall = 200

// receiveOurs measures the consumer's loop. The watcher is stopped by a consumer
// that waits until the queue is full, so that it starts from there.
func receiveOurs(b *bench, tree *fileTree, s *sampler, options *kernstream.FileOptions) error {
	options.UnlimitedQueue = true
	w, err := kernstream.WatchFiles(b.ctx, options, tree.mark())
	if err != nil {
		return err
	}
	defer w.Close()
	if err := tree.open(0, stall); err != nil {
		return err
	}
	for deadline := time.Now().Add(5 * time.Second); len(w.C) < cap(w.C); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("the watcher does not begin")
		}
	}
	if err := tree.open(stall, tree.files); err != nil {
		return err
	}
	return timeEvents(s, tree.files, func() error {
		seen := 0
		for e := range w.C {
			e.Close()
			if e.PathState != kernstream.PathExact || e.Ops.Has(kernstream.OpOverflow) {
				return fmt.Errorf("event %v", e)
			}
			if seen++; seen == tree.files {
				return nil
			}
		}
		return w.Err()
	})
}

// timeEvents measures the time and the allocations of n events.
func timeEvents(s *sampler, n int, receive func() error) error {
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begin := time.Now()
	err := receive()
	took := time.Since(begin)
	runtime.ReadMemStats(&after)
	s.add("time", float64(took.Nanoseconds())/float64(n))
	s.add("allocs", float64(after.Mallocs-before.Mallocs)/float64(n))
	return err
}

// benchFileBurst lets another process open all files at once, with the default
// queue, and prints each event to a file.
func benchFileBurst(b *bench, tree *fileTree) error {
	o, err := b.interleave(1, contender{"kernstream", func(s *sampler) error {
		lost, seen, err := burst(b, tree)
		s.add("lost", float64(lost))
		if err == nil && lost == 0 && seen != tree.files {
			err = fmt.Errorf("%d events of %d files, and no overflow", seen, tree.files)
		}
		return err
	}})
	if err != nil {
		return err
	}
	b.tell(o, tree.files, figure{"overflows", "lost", "in a run, at most", 1, percentile(100)}, map[string]goal{"": maxOurs(0)})
	return nil
}

// burst returns how often the queue was full, and how many files were printed.
func burst(b *bench, tree *fileTree) (overflows, seen int, err error) {
	out, err := os.Create(filepath.Join(b.dir, "output", "burst"))
	if err != nil {
		return 0, 0, err
	}
	defer out.Close()
	printed := newLinePrinter(out)
	w, err := kernstream.WatchFiles(b.ctx, nil, tree.mark())
	if err != nil {
		return 0, 0, err
	}
	defer w.Close()
	actor, err := startActor(b.ctx, b.dir)
	if err != nil {
		return 0, 0, err
	}
	defer actor.close()
	opened := make(chan error, 1)
	go func() {
		_, err := actor.do(fmt.Sprintf("open %d %s", tree.files, tree.dir))
		opened <- err
	}()
	files := make(map[string]bool, tree.files)
	for {
		select {
		case e, ok := <-w.C:
			if !ok {
				return overflows, len(files), w.Err()
			}
			if e.Ops.Has(kernstream.OpOverflow) {
				overflows++
				continue
			}
			printed.line(e)
			files[e.Path] = true
		case err := <-opened:
			if err != nil {
				return overflows, len(files), err
			}
			opened = nil
		case <-time.After(time.Second):
			if opened == nil {
				return overflows, len(files), printed.flush()
			}
		}
	}
}

// benchFileCancel measures from cancel to C closed, while another process opens
// files without a pause.
func benchFileCancel(b *bench, tree *fileTree) error {
	actor, err := startActor(b.ctx, b.dir)
	if err != nil {
		return err
	}
	defer actor.close()
	if _, err := actor.do(fmt.Sprintf("open storm %d %s", tree.files, tree.dir)); err != nil {
		return err
	}
	n := b.scale(50, 10)
	o, err := b.interleave(1, contender{"kernstream", func(s *sampler) error {
		for range n {
			if err := cancelOnce(b.ctx, tree, s); err != nil {
				return err
			}
		}
		return nil
	}})
	if err != nil {
		return err
	}
	if opens, err := actor.do("calm"); err != nil || opens == 0 {
		return errors.Join(err, fmt.Errorf("the storm was %d files", opens))
	}
	for _, f := range latencies("ms", millisecond) {
		var goals map[string]goal
		if f.name == "p99" && !b.quick {
			goals = map[string]goal{"": maxOurs(1)}
		}
		b.tell(o, tree.files, f, goals)
	}
	return nil
}

func cancelOnce(ctx context.Context, tree *fileTree, s *sampler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := kernstream.WatchFiles(ctx, nil, tree.mark())
	if err != nil {
		return err
	}
	begin := time.Now()
	events := 0
	for range w.C {
		if events++; events == 500 {
			begin = time.Now()
			cancel()
		}
	}
	s.addTime(time.Since(begin))
	return nil
}
