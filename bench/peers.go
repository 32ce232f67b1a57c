package main

import (
	"context"
	"fmt"
	"os"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// What kernstream is compared with where no function of a peer does it alone.

// rawReader reads mountinfo as fast as a program can: into memory that it has
// already, and without looking at it.
type rawReader struct{ buf []byte }

func newRawReader() *rawReader { return &rawReader{make([]byte, 8<<20)} }

// read opens, reads and closes the file, and returns its text, unless ctx is
// done.
func (r *rawReader) read(ctx context.Context) ([]byte, error) {
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	text := r.buf[:0]
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		n, err := unix.Read(fd, r.buf[len(text):])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, os.NewSyscallError("read", err)
		case n == 0 && len(text) == len(r.buf):
			return nil, fmt.Errorf("mountinfo is longer than %d bytes", len(r.buf))
		case n == 0:
			return text, nil
		default:
			text = r.buf[:len(text)+n]
		}
	}
}

// A mountDelta is what a mobyWatcher found.
type mountDelta struct {
	mounted, unmounted, changed []*mountinfo.Info
}

// A mobyWatcher is what programs with moby/sys do to follow the mount table:
// one thread waits in poll(2), and reads the table again at each wake, to
// compare it by mount ID with the last.
type mobyWatcher struct {
	c     chan mountDelta // closed at the end
	fd    int             // is polled
	quit  *os.File        // is polled, too
	stop  *os.File        // the other end of quit
	err   error           // valid once c is closed
	table map[int]*mountinfo.Info
}

func watchMoby(ctx context.Context) (*mobyWatcher, error) {
	// os.Open would put the file into the runtime's poller, where each wake is
	// taken from the one who polls it here.
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	quit, stop, err := os.Pipe()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	w := &mobyWatcher{c: make(chan mountDelta), fd: fd, quit: quit, stop: stop}
	if _, err = w.look(); err != nil {
		unix.Close(fd)
		quit.Close()
		stop.Close()
		return nil, err
	}
	go func() {
		defer close(w.c)
		defer unix.Close(w.fd)
		defer w.quit.Close()
		w.err = w.run(ctx)
	}()
	return w, nil
}

func (w *mobyWatcher) run(ctx context.Context) error {
	fds := []unix.PollFd{
		{Fd: int32(w.fd), Events: unix.POLLPRI},
		{Fd: int32(w.quit.Fd()), Events: unix.POLLIN},
	}
	for {
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return os.NewSyscallError("poll", err)
		}
		if fds[1].Revents != 0 {
			return nil
		}
		delta, err := w.look()
		if err != nil {
			return err
		}
		if len(delta.mounted)+len(delta.unmounted)+len(delta.changed) == 0 {
			continue
		}
		select {
		case w.c <- delta:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// look reads the table and compares it with the last.
func (w *mobyWatcher) look() (delta mountDelta, err error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return delta, err
	}
	table := make(map[int]*mountinfo.Info, len(mounts))
	for _, m := range mounts {
		table[m.ID] = m
		if old, ok := w.table[m.ID]; !ok {
			delta.mounted = append(delta.mounted, m)
		} else if *old != *m {
			delta.changed = append(delta.changed, m)
		}
	}
	for id, m := range w.table {
		if table[id] == nil {
			delta.unmounted = append(delta.unmounted, m)
		}
	}
	w.table = table
	return delta, nil
}

// close ends the watcher. Somebody must go on receiving from c meanwhile, or
// its context be done.
func (w *mobyWatcher) close() error {
	w.stop.Close()
	for range w.c {
	}
	return w.err
}
