// Command timeline writes everything that happens into one log: what is mounted
// and unmounted, how processes end, and what is done to the files of
// directories.
//
//	timeline -pid 4711 /etc /var/lib/app
//
// It is an example of Merge: streams of different sources become one, whose
// events are told apart by their types, or not at all. Each event is a line of
// log/slog, with the event as "kernstream -json" prints it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/kernstream/kernstream"
)

func main() {
	pid := flag.Int("pid", 0, "wait for the process `P`, too")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: timeline [-pid P] [DIRECTORY]...")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, *pid, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "timeline:", err)
		os.Exit(1)
	}
}

// run logs until ctx is done.
func run(ctx context.Context, out io.Writer, pid int, dirs []string) error {
	sources, err := open(ctx, pid, dirs)
	if err != nil {
		return err
	}
	all := kernstream.Merge(ctx, sources...)
	defer all.Close()
	log := slog.New(slog.NewJSONHandler(out, nil))
	for e := range all.C {
		log.LogAttrs(ctx, level(e), e.String(), slog.Any("event", e))
		if f, ok := e.(*kernstream.FileEvent); ok {
			f.Close()
		}
	}
	if err := all.Err(); !errors.Is(err, context.Cause(ctx)) {
		return err
	}
	return nil // Ctrl-C
}

// open opens the sources, all or none: what is open ends with ctx.
func open(ctx context.Context, pid int, dirs []string) (sources []kernstream.Source, err error) {
	defer func() {
		if err != nil {
			for _, s := range sources {
				s.Close()
			}
		}
	}()
	mounts, err := kernstream.WatchMounts(ctx, nil)
	if err != nil {
		return sources, err
	}
	sources = append(sources, mounts)
	if pid != 0 {
		process, err := kernstream.WatchProcess(ctx, kernstream.PID(pid), nil)
		if err != nil {
			return sources, err
		}
		sources = append(sources, process)
	}
	const ops = kernstream.OpCreate | kernstream.OpDelete | kernstream.OpMove | kernstream.OpCloseWrite | kernstream.OpOnDir | kernstream.OpEventOnChild
	for _, dir := range dirs {
		files, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{Path: dir, Ops: ops})
		if err != nil {
			return sources, err
		}
		sources = append(sources, files)
	}
	return sources, nil
}

// level is how much an event matters.
func level(e kernstream.Event) slog.Level {
	switch e := e.(type) {
	case *kernstream.ProcessEvent:
		if e.StatusKnown && e.Status != 0 {
			return slog.LevelError
		}
	case *kernstream.FileEvent:
		if e.Ops.Has(kernstream.OpOverflow) || e.Err != nil {
			return slog.LevelWarn
		}
	case *kernstream.MountEvent:
		if e.Initial {
			return slog.LevelDebug // not logged: everything that is mounted
		}
	}
	return slog.LevelInfo
}
