// Command kernstream prints Linux kernel events as they happen.
//
// Events go to the standard output, one line each, as text for people or with
// -json as JSON; everything else goes to the standard error. The exit status
// is 0 when it is done or interrupted, 1 after a failure, 2 for wrong usage, 3
// when the time is up, 4 when the kernel or a privilege does not allow it, and 5
// when a record is incomplete; a command that was recorded passes its own on.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// The exit statuses.
const (
	exitDone        = 0
	exitFailure     = 1
	exitUsage       = 2
	exitTimeout     = 3
	exitUnsupported = 4
	exitIncomplete  = 5
)

const usageHead = `kernstream prints Linux kernel events as they happen.

usage: kernstream COMMAND [flags]

commands:
`

const usageTail = `
flags of every command that prints events:
  -json         print one JSON object per line
  -n N          stop after N events
  -timeout D    stop after a time such as 10s, with exit status 3

examples:
  kernstream mounts                     the mount table, and every change of it
  kernstream files /etc                 what happens to the entries of /etc
  kernstream wait -timeout 1m 4711      how process 4711 ended
  kernstream mounts -json | jq -c '.mounted[].mount_point'

exit status: 0 done or interrupted, 1 failure, 2 usage, 3 timeout,
4 not supported or not permitted, 5 a record is incomplete
`

// A command is one of those that kernstream has.
type command struct {
	name    string
	summary string // for the list of them

	// run gets the arguments and returns when it is done; the error decides on
	// the exit status.
	run func(ctx context.Context, env *environment, args []string) error
}

// commands returns the commands in the order in which they are listed.
func commands() []command {
	return []command{
		{"mounts", "the mount table, and every change of it", mounts},
		{"wait", "the ends of processes, of any that are there", waitProcesses},
		{"files", "what happens to files, directories and file systems", files},
		{"record", "which files a container, a directory or a command accesses, in order", record},
		{"completion", "a script that lets a shell complete these", completion},
	}
}

const helpSummary = "explains one of these, with examples: help COMMAND"

func usage() string {
	var b strings.Builder
	b.WriteString(usageHead)
	for _, c := range commands() {
		fmt.Fprintf(&b, "  %-12s%s\n", c.name, c.summary)
	}
	fmt.Fprintf(&b, "  %-12s%s\n", "help", helpSummary)
	b.WriteString(usageTail)
	return b.String()
}

// environment is what a command uses of the process.
type environment struct {
	stdout io.Writer
	stderr io.Writer
	color  bool // stdout is a terminal that shows colours
	live   bool // stderr is a terminal, where a line can be written again

	// exit ends the process, for a command that cannot end by itself: nobody
	// reads what it writes.
	exit func(status int)

	// declared, if there is one, gets the flags of a command, which then ends
	// without having done anything (see outline).
	declared func(synopsis string, flags *flag.FlagSet)
}

// grace is how long a command may take to end once it is to.
const grace = time.Second

var (
	errTimeout = errors.New("the time is up")
	errUsage   = errors.New("wrong usage") // has been explained already

	errDeclared = errors.New("only asked for its flags") // see environment.declared
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	env := &environment{stdout: os.Stdout, stderr: os.Stderr, color: showsColors(os.Stdout), live: showsColors(os.Stderr), exit: os.Exit}
	os.Exit(run(ctx, env, os.Args[1:]))
}

func run(ctx context.Context, env *environment, args []string) int {
	if len(args) == 0 {
		fmt.Fprint(env.stderr, usage())
		return exitUsage
	}
	name, args := args[0], args[1:]
	if asksForHelp(name) {
		if len(args) == 0 || asksForHelp(args[0]) {
			fmt.Fprint(env.stdout, usage())
			return exitDone
		}
		name, args = args[0], []string{"-help"}
	}
	known := commands()
	i := slices.IndexFunc(known, func(c command) bool { return c.name == name })
	if i < 0 {
		fmt.Fprintf(env.stderr, "kernstream: unknown command %q\n\n%s", name, usage())
		return exitUsage
	}
	err := known[i].run(ctx, env, args)
	status := exitStatus(ctx, err)
	if _, passedOn := errors.AsType[commandStatus](err); status != exitDone && status != exitUsage && !passedOn {
		fmt.Fprintln(env.stderr, "kernstream:", err)
	}
	return status
}

func asksForHelp(word string) bool {
	return slices.Contains([]string{"help", "-h", "-help", "--help"}, word)
}

// exitStatus returns the status for err. ctx is done after a signal, which is
// a way to be done.
func exitStatus(ctx context.Context, err error) int {
	if status, ok := errors.AsType[commandStatus](err); ok {
		return int(status)
	}
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitDone
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, errTimeout):
		return exitTimeout
	case errors.Is(err, errIncomplete):
		return exitIncomplete
	case ctx.Err() != nil && errors.Is(err, context.Cause(ctx)):
		return exitDone
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, fs.ErrPermission):
		return exitUnsupported
	}
	return exitFailure
}

// common are the flags that every command has that prints events.
type common struct {
	synopsis string // of the command
	json     bool
	n        int
	timeout  time.Duration
}

// newFlags returns the flags of a command; synopsis and help describe it.
func newFlags(env *environment, name, synopsis, help string) (*flag.FlagSet, *common) {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(env.stderr)
	c := &common{synopsis: synopsis}
	flags.BoolVar(&c.json, "json", false, "print one JSON object per line")
	flags.IntVar(&c.n, "n", 0, "stop after `N` events")
	flags.DurationVar(&c.timeout, "timeout", 0, "stop after this time, with exit status 3")
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "usage: kernstream %s %s\n\n%s\nflags:\n", name, synopsis, help)
		flags.PrintDefaults()
	}
	return flags, c
}

// parse parses args, checks the common flags, and returns the context of the
// command, which has a moment to end when that is done.
func (c *common) parse(signals context.Context, env *environment, flags *flag.FlagSet, args []string) (context.Context, context.CancelFunc, error) {
	ctx, cancel, err := c.parsePatiently(signals, env, flags, args)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		time.Sleep(grace)
		env.exit(exitStatus(signals, context.Cause(ctx)))
	})
	return ctx, func() { stop(); cancel() }, nil
}

// parsePatiently is parse for a command that sees to its end itself.
func (c *common) parsePatiently(ctx context.Context, env *environment, flags *flag.FlagSet, args []string) (context.Context, context.CancelFunc, error) {
	if err := parseOrExplain(env, flags, c.synopsis, args); err != nil {
		return nil, nil, err
	}
	switch {
	case c.n < 0:
		return nil, nil, wrongUsage(flags, "-n must not be negative")
	case c.timeout < 0:
		return nil, nil, wrongUsage(flags, "-timeout must not be negative")
	}
	if c.timeout > 0 {
		ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, errTimeout)
		return ctx, cancel, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	return ctx, cancel, nil
}

// parseOrExplain parses args. What -help prints was asked for, so it is no
// complaint.
func parseOrExplain(env *environment, flags *flag.FlagSet, synopsis string, args []string) error {
	if env.declared != nil {
		env.declared(synopsis, flags)
		return errDeclared
	}
	var said bytes.Buffer
	flags.SetOutput(&said)
	err := flags.Parse(args)
	flags.SetOutput(env.stderr)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, flag.ErrHelp):
		env.stdout.Write(said.Bytes())
		return err
	}
	return wrongUsage(flags, "%v", err)
}

// lateFlag returns the first flag that stands behind an operand, where package
// flag takes it for another one.
func lateFlag(flags *flag.FlagSet) string {
	for i, arg := range flags.Args() {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if i > 0 && strings.HasPrefix(arg, "-") && flags.Lookup(name) != nil {
			return arg
		}
	}
	return ""
}

// wrongUsage explains what is wrong with the arguments.
func wrongUsage(flags *flag.FlagSet, format string, args ...any) error {
	fmt.Fprintf(flags.Output(), "kernstream %s: %s\n", flags.Name(), fmt.Sprintf(format, args...))
	fmt.Fprintf(flags.Output(), "kernstream %s -help shows the flags\n", flags.Name())
	return errUsage
}
