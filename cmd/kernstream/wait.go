package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

const waitHelp = `Waits until all of the processes have ended, whosever they are, and prints a line
for each when it does. Any user may run it. The status of a process of another
user is unknown until it is reaped, unless you are root.

examples:
  kernstream wait 4711 4712
        until both have ended, with a line for each
  kernstream wait -any -timeout 30s 4711 4712
        until one of them has ended, or half a minute has passed
  kernstream wait -reaped -json 4711 | jq .exit_code
        its status, also when only its parent may know it before
`

func waitProcesses(ctx context.Context, env *environment, args []string) error {
	flags, common := newFlags(env, "wait", "[flags] PID...", waitHelp)
	anyOne := flags.Bool("any", false, "end when one of them has ended")
	reaped := flags.Bool("reaped", false, "wait until they are reaped, too, and print a second line for that (Linux 6.9)")
	ctx, cancel, err := common.parse(ctx, env, flags, args)
	if err != nil {
		return err
	}
	defer cancel()
	pids, err := parsePIDs(flags.Args())
	late := lateFlag(flags)
	switch {
	case late != "":
		return wrongUsage(flags, "flags come before the first PID: %s", late)
	case err != nil:
		return wrongUsage(flags, "%v", err)
	case len(pids) == 0:
		return wrongUsage(flags, "which processes?")
	}
	options := &kernstream.ProcessOptions{}
	if *reaped {
		options.Until = kernstream.Reaped
	}

	watcher, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return err
	}
	defer watcher.Close()
	missed, err := watchAll(env, watcher, pids, options)
	if err != nil {
		return err
	}
	print := newProcessPrinter(env, common.json)
	left := len(pids) - missed
	if *anyOne {
		left = min(left, 1)
	}
	for n := 0; left > 0; {
		event, ok := <-watcher.C
		if !ok {
			return watcher.Err()
		}
		if err := print(event); err != nil {
			return err
		}
		if event.Phase == options.Until {
			left--
		}
		if n++; n == common.n {
			break
		}
	}
	if missed > 0 {
		return fmt.Errorf("%d of %d processes could not be waited for", missed, len(pids))
	}
	return nil
}

// parsePIDs returns the numbers in args, each once.
func parsePIDs(args []string) ([]int, error) {
	var pids []int
	seen := make(map[int]bool)
	for _, arg := range args {
		pid, err := strconv.ParseInt(arg, 10, 32)
		if err != nil || pid <= 0 {
			return nil, fmt.Errorf("%q is not a process ID", arg)
		}
		if !seen[int(pid)] {
			seen[int(pid)] = true
			pids = append(pids, int(pid))
		}
	}
	return pids, nil
}

// watchAll watches the processes and explains which it cannot watch, because
// they are gone or no processes. Any other error concerns all of them.
func watchAll(env *environment, watcher *kernstream.ProcessWatcher, pids []int, options *kernstream.ProcessOptions) (missed int, err error) {
	for _, pid := range pids {
		_, err := watcher.Watch(kernstream.PID(pid), options)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrClosed):
			watcher.Close() // Err is known once it has ended
			return missed, watcher.Err()
		case isOneProcess(err):
			missed++
			fmt.Fprintln(env.stderr, "kernstream:", err)
		default:
			return missed, err
		}
	}
	return missed, nil
}

// isOneProcess tells whether an error is about one process alone.
func isOneProcess(err error) bool {
	for _, target := range []error{syscall.ESRCH, syscall.EINVAL, syscall.ENOENT} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// newProcessPrinter returns a function that prints an event, flushed.
func newProcessPrinter(env *environment, json bool) func(*kernstream.ProcessEvent) error {
	if json {
		return func(e *kernstream.ProcessEvent) error { return printJSON(env.stdout, e) }
	}
	p := &processPrinter{out: bufio.NewWriter(env.stdout), color: env.color}
	p.columns.limits = []int{7, 6}
	return p.print
}

// processPrinter prints events for people: number, phase, status.
type processPrinter struct {
	out     *bufio.Writer
	color   bool
	columns columns
}

func (p *processPrinter) print(e *kernstream.ProcessEvent) error {
	color, status := processStatus(e)
	if p.color {
		status = color + status + colorReset
	}
	fmt.Fprintln(p.out, p.columns.line(strconv.Itoa(e.Process.PID), e.Phase.String(), status))
	return p.out.Flush()
}

// processStatus says how a process ended.
func processStatus(e *kernstream.ProcessEvent) (color, status string) {
	switch {
	case !e.StatusKnown:
		return colorYellow, "status unknown"
	case e.Status.Signaled():
		name := unix.SignalName(e.Status.Signal())
		if name == "" {
			name = fmt.Sprint("signal ", int(e.Status.Signal()))
		}
		if e.Status.CoreDump() {
			name += ", core dumped"
		}
		return colorRed, name
	case e.Status.ExitStatus() != 0:
		return colorRed, fmt.Sprint("status ", e.Status.ExitStatus())
	}
	return colorGreen, "status 0"
}
