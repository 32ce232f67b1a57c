// Command bench measures kernstream side by side with its peers: in one run,
// in turns, each figure as a ratio. See README.md for what the cases are and
// how to read them.
//
// It runs itself again in a mount namespace of its own, and mounts nothing
// outside of it. It needs root, or a kernel that lets ordinary users make user
// namespaces.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// groups are the cases that there are, in the order in which they run.
var groups = []group{
	{"mounts", benchMounts},
	{"files", benchFiles},
	{"perm", benchPerm},
	{"streams", benchStreams},
	{"pids", benchPids},
	{"fuse", benchFUSE},
	{"record", benchRecord},
}

// settings are the command line.
type settings struct {
	only    []string // groups, or cases such as "mounts/snapshot"; none: all
	rounds  int
	quick   bool
	json    bool
	profile string
	svg     string // the directory for the plots; "": there are none
}

func main() {
	if dir := os.Getenv(actorVar); dir != "" {
		os.Exit(actorMain(dir))
	}
	if os.Getenv(herdVar) != "" {
		os.Exit(herdMain())
	}
	if name := os.Getenv(designVar); name != "" {
		os.Exit(designMain(name))
	}
	if pid := os.Getenv(clientVar); pid != "" {
		os.Exit(clientMain(pid))
	}
	if words := os.Getenv(recordVar); words != "" {
		os.Exit(recordMain(strings.Split(words, "\n")))
	}
	if words := os.Getenv(fuseVar); words != "" {
		os.Exit(fuseMain(strings.Split(words, "\n")))
	}
	if words := os.Getenv(permVar); words != "" {
		os.Exit(permMain(strings.Split(words, "\n")))
	}
	set, err := parseFlags(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir := os.Getenv(privateVar)
	if dir == "" {
		os.Exit(runPrivately(ctx))
	}
	if err := run(ctx, set, dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parseFlags(args []string) (*settings, error) {
	set := &settings{}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("only", "", "run only these groups or cases, a `list` with commas: mounts, streams/merge, ...")
	flags.IntVar(&set.rounds, "rounds", 0, "measure `n` interleaved rounds (default 9, 2 with -quick)")
	flags.BoolVar(&set.quick, "quick", false, "small tables and few rounds: shows that it runs, not how fast")
	flags.BoolVar(&set.json, "json", false, "print one JSON object per line and case")
	flags.StringVar(&set.profile, "cpuprofile", "", "write a CPU profile with the labels case and contender to `file`")
	flags.StringVar(&set.svg, "svg", "", "draw plots of the figures into `directory`, and write the table of all; some are measured at more sizes for that")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if set.rounds == 0 {
		set.rounds = 9
		if set.quick {
			set.rounds = 2
		}
	}
	if set.rounds < 0 {
		return nil, fmt.Errorf("-rounds %d: at least 1", set.rounds)
	}
	if *only != "" {
		set.only = strings.Split(*only, ",")
	}
	for _, name := range set.only {
		wanted, _, _ := strings.Cut(name, "/")
		if !slices.ContainsFunc(groups, func(g group) bool { return g.name == wanted }) {
			return nil, fmt.Errorf("-only %s: there is no group %q", *only, wanted)
		}
	}
	return set, nil
}

// run measures, in the private namespace, with dir to mount on.
func run(ctx context.Context, set *settings, dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	header, err := describeMachine()
	if err != nil {
		return err
	}
	var report reporter = &tableReporter{out: os.Stdout}
	headerTo := io.Writer(os.Stdout)
	if set.json {
		// Standard output is for objects only.
		report, headerTo = &jsonReporter{out: os.Stdout}, os.Stderr
	}
	fmt.Fprintln(headerTo, header)
	noted := &notingReporter{reporter: report}

	if set.profile != "" {
		file, err := os.Create(set.profile)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	b := &bench{ctx: ctx, settings: set, dir: dir, report: noted, progress: os.Stderr}
	for _, g := range groups {
		if err := b.runGroup(g); err != nil {
			return err
		}
	}
	if b.ran == 0 {
		return fmt.Errorf("-only %s: there is no such case", strings.Join(set.only, ","))
	}
	if set.svg == "" {
		return nil
	}
	caption := fmt.Sprintf("%s; %d rounds of cd bench && go run . -svg ../docs/bench", header, set.rounds)
	if set.quick {
		caption = header + "; a quick run, which shows nothing but that it runs"
	}
	files, err := writePlots(set.svg, noted.results, caption)
	if err == nil && len(set.only) == 0 { // a part would take the rest out of it
		var file string
		file, err = writeFigures(set.svg, noted.results, caption)
		files = append(files, file)
	}
	fmt.Fprintln(headerTo, "written:", strings.Join(files, " "))
	return err
}

// describeMachine returns what the absolute figures depend on.
func describeMachine() (string, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "", os.NewSyscallError("uname", err)
	}
	return fmt.Sprintf("Linux %s, %s, %d CPUs, GOMAXPROCS %d",
		unix.ByteSliceToString(uts.Release[:]), runtime.Version(), runtime.NumCPU(), runtime.GOMAXPROCS(0)), nil
}
