// Command supervisor says how processes end that are not its children, be they
// a thousand:
//
//	pgrep -u www | supervisor -state /run/supervisor
//
// The numbers come on the standard input, at any time. A line for each process
// tells when it has ended, and how, as far as the kernel lets this user know.
// supervisor ends when its input has and all processes have.
//
// With -state, it can be stopped and started again: which processes it waits
// for is in that file, and one that ended in between is told at once. Another
// process that got the number of one meanwhile is not taken for it.
//
// It is an example of many watches on one channel: they cost a descriptor for
// each process, and no goroutine.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kernstream/kernstream"
)

func main() {
	state := flag.String("state", "", "keep the processes in this `FILE`")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: supervisor [-state FILE] < PIDS")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdin, os.Stdout, *state); err != nil {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
		os.Exit(1)
	}
}

// run supervises until all processes have ended, or ctx is done.
func run(ctx context.Context, in io.Reader, out io.Writer, state string) error {
	w, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	s := &supervisor{out: out, watcher: w, state: state, alive: map[kernstream.ProcessID]bool{}}
	if err := s.load(); err != nil {
		return unlessDone(ctx, err) // what was not loaded stays in the file
	}
	return errors.Join(unlessDone(ctx, s.supervise(readLines(ctx, in))), s.save())
}

// saveDelay is for how long the state file may be behind: a thousand processes
// may end at once. Who is killed meanwhile tells some ends again.
const saveDelay = 50 * time.Millisecond

// unlessDone returns err, or nil if it is that ctx is done: Ctrl-C is no failure.
func unlessDone(ctx context.Context, err error) error {
	if errors.Is(err, context.Cause(ctx)) {
		return nil
	}
	return err
}

// supervise takes the lines, and the error that there is when they end.
func (s *supervisor) supervise(lines <-chan string, inputErr func() error) error {
	var save <-chan time.Time
	for lines != nil || len(s.alive) > 0 {
		select {
		case line, ok := <-lines:
			if !ok {
				lines = nil
				if err := inputErr(); err != nil {
					return fmt.Errorf("standard input: %w", err)
				}
			} else if err := s.watchNumber(line); err != nil {
				return err
			}
		case e, ok := <-s.watcher.C:
			if !ok {
				return s.watcher.Err() // the state has those that are left
			}
			s.ended(e)
		case <-save:
			save = nil
			if err := s.save(); err != nil {
				return err
			}
		}
		if s.changed && save == nil {
			save = time.After(saveDelay)
		}
	}
	return nil
}

// readLines returns the lines of in as a stream does: until the end of either, and
// then there may be an error.
func readLines(ctx context.Context, in io.Reader) (<-chan string, func() error) {
	c := make(chan string)
	scanner := bufio.NewScanner(in)
	go func() {
		defer close(c)
		for scanner.Scan() {
			select {
			case c <- scanner.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	return c, scanner.Err
}

type supervisor struct {
	out     io.Writer
	watcher *kernstream.ProcessWatcher
	alive   map[kernstream.ProcessID]bool
	state   string // the file, or none
	changed bool   // the file is behind
}

func (s *supervisor) watchNumber(line string) error {
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		fmt.Fprintf(s.out, "%q is no process\n", line)
		return nil
	}
	return s.watch(kernstream.PID(pid))
}

// watch begins to watch a process. One that cannot be watched is said; other
// errors concern all.
func (s *supervisor) watch(target kernstream.Target) error {
	watch, err := s.watcher.Watch(target, nil)
	switch {
	case errors.Is(err, os.ErrProcessDone):
		fmt.Fprintln(s.out, target, "has ended already")
		s.changed = true // it may be in the file
		return nil
	case errors.Is(err, syscall.EINVAL):
		fmt.Fprintln(s.out, err) // a thread, say
		return nil
	case errors.Is(err, os.ErrClosed):
		s.watcher.Close()
		return s.watcher.Err() // which is known once it has ended
	case err != nil:
		return err // no descriptor is left, say
	}
	if id := watch.ID(); s.alive[id] {
		watch.Stop() // twice on the input
	} else {
		s.alive[id], s.changed = true, true
	}
	return nil
}

func (s *supervisor) ended(e *kernstream.ProcessEvent) {
	how := "nobody may know how"
	switch {
	case !e.StatusKnown:
	case e.Status.Signaled():
		how = e.Status.Signal().String()
	default:
		how = fmt.Sprint("status ", e.Status.ExitStatus())
	}
	fmt.Fprintf(s.out, "process %d ended: %s\n", e.Process.PID, how)
	delete(s.alive, e.Process)
	s.changed = true
}

// load watches what the state file has.
func (s *supervisor) load() error {
	if s.state == "" {
		return nil
	}
	text, err := os.ReadFile(s.state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, line := range strings.Fields(string(text)) {
		var id kernstream.ProcessID
		if err := id.UnmarshalText([]byte(line)); err != nil {
			return fmt.Errorf("%s: %w", s.state, err)
		}
		if err := s.watch(kernstream.Saved(id)); err != nil {
			return err
		}
	}
	return nil
}

// save writes the state file, whole or not at all.
func (s *supervisor) save() error {
	if s.state == "" || !s.changed {
		return nil
	}
	var text strings.Builder
	for id := range s.alive {
		line, err := id.MarshalText()
		if err != nil {
			return err
		}
		text.Write(line)
		text.WriteByte('\n')
	}
	s.changed = false
	if err := os.WriteFile(s.state+".new", []byte(text.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(s.state+".new", s.state)
}
