// Command integrity watches over the files of a directory tree, and says which
// are not what they were when it started:
//
//	integrity /usr/local/bin
//
// Any user may run it on files that he can read. A line tells that a file was
// added, changed (its contents, mode or owner) or removed, once it differs from
// what is known of it; a file that was only touched is not worth a line. What is
// written piece by piece may differ more than once.
//
// It is an example of what to do about lost events. While it is stopped, or
// slower than those who write, the kernel's queue runs full; then there is an
// event with OpOverflow, and integrity compares the whole tree again. For that to
// find everything, it must go on receiving meanwhile: so one goroutine looks at
// files, and another only receives and notes which are to be looked at.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/kernstream/kernstream"
)

func main() {
	flag.Usage = func() { fmt.Fprintln(os.Stderr, "usage: integrity DIRECTORY") }
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "integrity:", err)
		os.Exit(1)
	}
}

// changes are what can make a file differ, and a directory have other entries.
const changes = kernstream.OpModify | kernstream.OpAttrib | kernstream.OpCloseWrite |
	kernstream.OpCreate | kernstream.OpDelete | kernstream.OpMove | kernstream.OpOnDir | kernstream.OpEventOnChild

// run watches until ctx is done.
func run(ctx context.Context, out io.Writer, dir string) error {
	// The paths of events have no symbolic links in them.
	dir, err := filepath.Abs(dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return err
	}
	w, err := kernstream.WatchFiles(ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	t := newTree(out, func(dir string) error { return w.Mark(kernstream.Mark{Path: dir, Ops: changes}) })
	look, looked := make(chan string), make(chan error)
	defer func() {
		close(look)
		for range looked {
		}
	}()
	go func() {
		defer close(looked)
		for path := range look {
			looked <- t.look(path)
		}
	}()
	return receive(ctx, out, w, dir, look, looked)
}

// receive receives events, and hands the paths that they name to look, each
// once however many events there were while it waited its turn. The first is
// the whole tree.
func receive(ctx context.Context, out io.Writer, w *kernstream.FileWatcher, dir string, look chan<- string, looked <-chan error) error {
	todo := newQueue(dir)
	busy, started := false, false
	for {
		next, path := look, ""
		if path = todo.first(); path == "" || busy {
			next = nil
		}
		select {
		case e, ok := <-w.C:
			if !ok {
				if err := w.Err(); !errors.Is(err, context.Cause(ctx)) {
					return err
				}
				return nil // Ctrl-C
			}
			if e.Ops.Has(kernstream.OpOverflow) {
				fmt.Fprintln(out, "events were lost, everything is compared")
				todo.add(dir)
				continue
			}
			// A path that is not exact is of something that is gone; what took
			// its place has an event of its own.
			if e.Path != "" {
				todo.add(e.Path)
			}
		case next <- path:
			busy = true
			todo.removeFirst()
		case err := <-looked:
			busy = false
			if err != nil {
				return err
			}
			if !started {
				started = true
				fmt.Fprintln(out, "watching", dir)
			}
		}
	}
}

// A queue is paths in the order in which they came, each once.
type queue struct {
	paths []string
	has   map[string]bool
}

func newQueue(first string) *queue { return &queue{[]string{first}, map[string]bool{first: true}} }

func (q *queue) add(path string) {
	if !q.has[path] {
		q.has[path] = true
		q.paths = append(q.paths, path)
	}
}

// first returns the path whose turn it is, or "".
func (q *queue) first() string {
	if len(q.paths) == 0 {
		return ""
	}
	return q.paths[0]
}

func (q *queue) removeFirst() {
	delete(q.has, q.paths[0])
	q.paths = q.paths[1:]
}
