package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/recorder"
)

const recordHelp = `Records which files are accessed, in the order of the first access, each once: by
the container that the process P is in, below the directory D, or by COMMAND, which
is run for that in a private copy of the mount namespace, and recorded from
its first instruction on.

Each file is a line as it is accessed for the first time; COMMAND then writes to the
standard error what it has for the standard output. With -o there are no such lines: the
record is written to FILE at the end, one JSON object per line with how often each
file was accessed, and a last one with the verdict, whether that is all. FILE is
replaced as a whole, or not at all.

Signals go to COMMAND; once it has ended, they end the record. The exit status is
that of COMMAND, 128 and the number of the signal that killed it; if that is 0, it
is 5 when the record is incomplete.
A COMMAND that still runs when -n or -timeout ends the record is killed, and does
not count for the exit status.

It needs CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH.

examples:
  kernstream record -o record -- make -j4
        which files a build takes, in the file record
  kernstream record -o record -one-mount -pid 4711
        which files of its image a container takes, from outside
  kernstream record -dir /srv -tree 4711 -json
        what process 4711 and its descendants access below /srv, as it happens
`

// recordable are the events that -events takes.
const recordable = kernstream.OpOpen | kernstream.OpAccess | kernstream.OpOpenExec | kernstream.OpModify | kernstream.OpClose | kernstream.OpOnDir

// errIncomplete is the end of a record that misses something.
var errIncomplete = errors.New("the record is incomplete")

// errInterrupted is the end by a signal that is for nobody else.
var errInterrupted = errors.New("interrupted")

// commandStatus is the end of a command that failed, which is no error of
// ours.
type commandStatus int

func (s commandStatus) Error() string { return fmt.Sprint("the command ended with status ", int(s)) }

func record(signals context.Context, env *environment, args []string) error {
	flags, common := newFlags(env, "record", "[flags] (-pid P | -dir D | -- COMMAND ...)", recordHelp)
	output := flags.String("o", "", "write the record to `FILE`")
	pid := flags.Int("pid", 0, "record the container that the process `P` is in")
	dir := flags.String("dir", "", "record what is below the directory `D`")
	events := flags.String("events", "open,access,open_exec", "what counts as an access: `KINDS` of open, access, open_exec, modify, close and ondir")
	options := &recorder.Options{}
	flags.BoolVar(&options.OneMount, "one-mount", false, "leave out what is mounted below the root: volumes and the like")
	flags.BoolVar(&options.Descendants, "descendants", false, "wait for what COMMAND has started, too")
	flags.IntVar(&options.Tree, "tree", 0, "record only what the process `P` and its descendants do")
	flags.IntVar(&options.MaxFiles, "max-files", 0, "leave out what comes after `N` files (default 1048576)")
	flags.BoolVar(&options.LimitedQueue, "limited-queue", false, "leave the limit of the kernel's queue as it is, and lose what does not fit")
	// A signal is not the end of the command, and so not of the record.
	ctx, cancel, err := common.parsePatiently(context.WithoutCancel(signals), env, flags, args)
	if err != nil {
		return err
	}
	defer cancel()
	options.Ops, err = kernstream.ParseFileOp(*events)
	targets := 0
	for _, given := range []bool{*pid != 0, *dir != "", flags.NArg() > 0} {
		if given {
			targets++
		}
	}
	switch {
	case err != nil:
		return wrongUsage(flags, "-events: %v", err)
	case targets != 1:
		return wrongUsage(flags, "what is to be recorded? Give one of -pid, -dir and a COMMAND")
	case *pid < 0 || options.Tree < 0:
		return wrongUsage(flags, "a process ID must not be negative")
	case options.MaxFiles < 0:
		return wrongUsage(flags, "-max-files must not be negative")
	case options.Ops&^recordable != 0:
		return wrongUsage(flags, "-events: %v is no access", options.Ops&^recordable)
	case options.Tree != 0 && flags.NArg() > 0:
		return wrongUsage(flags, "-tree is not for a COMMAND, which is recorded with all that it starts, and nothing else")
	case options.Descendants && flags.NArg() == 0:
		return wrongUsage(flags, "-descendants is for what a COMMAND starts")
	}
	r := &recordRun{env: env, common: common, options: options, output: *output}
	if err := r.checkOutput(); err != nil {
		return err
	}
	switch {
	case *pid != 0:
		r.target = recorder.Container(*pid)
	case *dir != "":
		r.target = recorder.Directory(*dir)
	default:
		return r.command(ctx, flags.Args())
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(signals, func() { stop(errInterrupted) })()
	err = r.record(ctx)
	if errors.Is(err, errInterrupted) && (r.list != nil || r.output == "") {
		err = nil // a way to be done
	}
	written := r.finish()
	return cmp.Or(err, written)
}

// A recordRun is one run of the command record.
type recordRun struct {
	env     *environment
	common  *common
	options *recorder.Options
	output  string
	target  recorder.Target
	list    *recorder.List
	enough  bool // there are as many lines as were asked for

	// Odd while it waits for somebody else: a file system that is to be recorded, or
	// who reads the lines.
	stuck atomic.Int64
}

// checkOutput finds out early what would be a pity to learn at the end.
func (r *recordRun) checkOutput() error {
	if r.output == "" {
		return nil
	}
	object := r.output
	if st, err := os.Stat(r.output); err != nil || st.Mode().IsRegular() {
		object = filepath.Dir(r.output)
	}
	if err := unix.Access(object, unix.W_OK); err != nil {
		return &os.PathError{Op: "write", Path: object, Err: err}
	}
	return nil
}

// record records until the target or ctx ends, or N files are there, and keeps the list.
func (r *recordRun) record(ctx context.Context) error {
	recording, err := r.begin(ctx)
	if err != nil {
		return err
	}
	return r.patiently(ctx, func() error { return r.take(recording) })
}

// begin begins to record.
func (r *recordRun) begin(ctx context.Context) (*recorder.Recording, error) {
	var recording *recorder.Recording
	err := r.patiently(ctx, func() (err error) {
		r.stuck.Add(1)
		defer r.stuck.Add(1)
		recording, err = recorder.Record(ctx, r.target, r.options)
		return err
	})
	if err != nil {
		return nil, err
	}
	return recording, nil
}

// patiently waits for f, after the end of ctx, too: to end a record takes its time. But
// it does not wait for who may never come.
func (r *recordRun) patiently(ctx context.Context, f func() error) error {
	result := make(chan error, 1)
	go func() { result <- f() }()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
	}
	for {
		before := r.stuck.Load()
		select {
		case err := <-result:
			return err
		case <-time.After(grace):
			if before%2 != 0 && r.stuck.Load() == before {
				return context.Cause(ctx)
			}
		}
	}
}

// take takes the accesses, and then the list.
func (r *recordRun) take(recording *recorder.Recording) error {
	defer recording.Close()
	print := r.printer()
	stop := r.showProgress(recording)
	n := 0
	for access := range recording.C {
		if n++; r.output == "" {
			r.stuck.Add(1)
			err := print(access)
			r.stuck.Add(1)
			if err != nil {
				return err
			}
		}
		if r.enough = n == r.common.n; r.enough {
			break
		}
	}
	recording.Close()
	stop()
	var err error
	r.list, err = recording.List()
	return errors.Join(err, recording.Err())
}

func (r *recordRun) printer() func(*recorder.Access) error {
	if r.common.json {
		return func(a *recorder.Access) error { return printJSON(r.env.stdout, a) }
	}
	out := bufio.NewWriter(r.env.stdout)
	var c columns
	c.limits = []int{12, 22}
	return func(a *recorder.Access) error {
		out.WriteString(c.line(fmt.Sprintf("%.6f", a.First.Seconds()), strings.ReplaceAll(a.Ops.String(), "|", ","), readable(a.Path)))
		out.WriteByte('\n')
		return out.Flush()
	}
}

// showProgress shows on a terminal how far a recording is, until the function that it returns is
// called.
func (r *recordRun) showProgress(recording *recorder.Recording) (stop func()) {
	if !r.env.live || r.output == "" {
		return func() {}
	}
	const period = 200 * time.Millisecond
	ended := make(chan struct{})
	var shown sync.WaitGroup
	shown.Go(func() {
		ticker := time.NewTicker(period)
		defer ticker.Stop()
		for before := (recorder.Progress{}); ; {
			select {
			case <-ended:
				fmt.Fprint(r.env.stderr, "\r\x1b[K")
				return
			case <-ticker.C:
				now := recording.Progress()
				fmt.Fprintf(r.env.stderr, "\r\x1b[K%d files, %d accesses/s, %s", now.Files,
					int(float64(now.Accesses-before.Accesses)/period.Seconds()), lostText(now.Overflows))
				before = now
			}
		}
	})
	return func() {
		close(ended)
		shown.Wait()
	}
}

func lostText(overflows int) string {
	if overflows == 0 {
		return "none lost"
	}
	return fmt.Sprintf("LOST SOME (%d overflows)", overflows)
}

// finish writes the list, or the verdict alone.
func (r *recordRun) finish() error {
	if r.list == nil {
		return nil
	}
	if r.output != "" {
		if err := r.list.WriteFile(r.output); err != nil {
			return err
		}
	}
	if r.list.Complete || r.enough {
		return nil
	}
	return fmt.Errorf("%w: %s", errIncomplete, strings.Join(r.list.Reasons, "; "))
}

// command runs and records a command.
func (r *recordRun) command(ctx context.Context, args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, r.env.stdout, r.env.stderr
	if r.output == "" {
		cmd.Stdout = r.env.stderr
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedOn...)
	defer signal.Stop(signals)

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	r.target = recorder.Command(cmd)
	recording, err := r.begin(ctx)
	if err != nil {
		return err
	}
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		cmd.Wait()
	}()
	ended := make(chan struct{})
	var passing sync.WaitGroup
	passing.Go(func() {
		for {
			select {
			case s := <-signals:
				select {
				case <-waited:
					stop(errInterrupted) // there is nobody else to be interrupted
				default:
					if !terminalSends(s) {
						cmd.Process.Signal(s)
					}
				}
			case <-ended:
				return
			}
		}
	})
	err = r.patiently(ctx, func() error { return r.take(recording) })
	if errors.Is(err, errInterrupted) {
		err = nil
	}
	cut := r.enough || errors.Is(context.Cause(ctx), errTimeout)
	if cut {
		cmd.Process.Kill() // nobody would be left to wait for it
	}
	<-waited
	close(ended)
	passing.Wait()
	written := r.finish()
	switch {
	case cut || err != nil:
		return cmp.Or(err, written)
	case written == nil || errors.Is(written, errIncomplete):
		return cmp.Or(endOf(cmd), written)
	}
	return written
}

// passedOn are the signals that go to the command.
var passedOn = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2}

// terminalSends tells whether a signal is one that a terminal sends to the command
// by itself, if it does to us.
func terminalSends(s os.Signal) bool {
	if s != syscall.SIGINT && s != syscall.SIGQUIT {
		return false
	}
	for fd := range 3 {
		if group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err == nil && group == unix.Getpgrp() {
			return true
		}
	}
	return false
}

// endOf returns how a command ended, if that was not with success.
func endOf(cmd *exec.Cmd) error {
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case status.Signaled():
		return commandStatus(128 + int(status.Signal()))
	case status.ExitStatus() != 0:
		return commandStatus(status.ExitStatus())
	}
	return nil
}
