// Command runner runs a program for as long as what it needs is there:
//
//	runner -config /etc/app -data /var/lib/app -- app -v
//
// It starts the program when something is mounted on the directory DATA,
// restarts it when a file in the directory CONFIG was written, and stops it when
// DATA is unmounted. It ends when the program ends by itself, with its status.
//
// It is an example of several sources in one select: what a source says changes
// what the others are for, so they cannot be told apart by a type switch alone.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/kernstream/kernstream"
)

func main() {
	config := flag.String("config", "", "restart the program when a file in `CONFIG` was written")
	data := flag.String("data", "", "run the program while something is mounted on `DATA`")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: runner -config CONFIG -data DATA -- PROGRAM [ARGUMENT]...")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 || *config == "" || *data == "" {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	status, err := run(ctx, os.Stderr, *config, *data, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "runner:", err)
		status = 1
	}
	os.Exit(status)
}

// run runs the program until it ends by itself, whose status it returns, or
// until ctx is done.
func run(ctx context.Context, log io.Writer, config, data string, program []string) (status int, err error) {
	data, err = filepath.EvalSymlinks(data)
	if err != nil {
		return 0, err
	}
	mounts, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{
		Filter: func(m *kernstream.Mount) bool { return m.MountPoint == data },
	})
	if err != nil {
		return 0, err
	}
	defer mounts.Close()
	files, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{
		Path: config,
		Ops:  kernstream.OpCloseWrite | kernstream.OpMovedTo | kernstream.OpDelete | kernstream.OpEventOnChild,
	})
	if err != nil {
		return 0, err
	}
	defer files.Close()
	processes, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer processes.Close()
	r := &runner{log: log, program: program, processes: processes}
	defer r.stop("runner ends")

	for {
		select {
		case e, ok := <-mounts.C:
			if !ok {
				return 0, unless(ctx, mounts.Err())
			}
			if r.mounts += len(e.Mounted) - len(e.Unmounted); r.mounts == 0 {
				r.stop(data + " is not mounted")
			} else if err := r.start(); err != nil {
				return 0, unless(ctx, err)
			}
		case e, ok := <-files.C:
			if !ok {
				return 0, unless(ctx, files.Err())
			}
			// Also when it is an overflow: something may have been written.
			if r.command == nil {
				continue
			}
			r.stop(fmt.Sprint(e))
			if err := r.start(); err != nil {
				return 0, unless(ctx, err)
			}
		case e, ok := <-processes.C:
			if !ok {
				return 0, unless(ctx, processes.Err())
			}
			// One that was stopped is no news.
			if r.command != nil && e.Tag == r.command {
				return r.ended(), nil
			}
		}
	}
}

// unless returns err, unless all has ended by Ctrl-C.
func unless(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

type runner struct {
	log       io.Writer
	program   []string
	processes *kernstream.ProcessWatcher
	mounts    int       // how many there are on DATA
	command   *exec.Cmd // the program that runs, or nil
}

// start starts the program, if it does not run.
func (r *runner) start() error {
	if r.command != nil {
		return nil
	}
	fmt.Fprintln(r.log, "runner: start")
	cmd := exec.Command(r.program[0], r.program[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	_, err := r.processes.Start(cmd, &kernstream.ProcessOptions{Tag: cmd})
	if cmd.Process != nil {
		r.command = cmd // to be stopped, even if it could not be watched
	}
	return err
}

// stop ends the program, if it runs, and waits for it.
func (r *runner) stop(why string) {
	if r.command == nil {
		return
	}
	fmt.Fprintln(r.log, "runner: stop:", why)
	r.command.Process.Signal(syscall.SIGTERM)
	r.command.Wait()
	r.command = nil
}

// ended returns the status of the program, which has ended.
func (r *runner) ended() int {
	r.command.Wait()
	status := r.command.ProcessState.ExitCode()
	r.command = nil
	return status
}
