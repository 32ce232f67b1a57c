// Command kernels runs the tests of this module on the kernels of a matrix:
// Debian's cloud kernels under qemu, and the host's own.
//
//	go run ./test/kernels                                    the whole matrix
//	go run ./test/kernels -kernel 6.1 -pkg ./poller -run X   one test on one kernel
//	go run ./test/kernels -kernel 6.1 -shell                 a shell there
//
// The kernels come from the package archive, by its own client, and are kept in
// a cache. The test binaries are built statically and packed, with a small init
// and some programs of the host, into an initramfs; each kernel boots it on an
// emulated processor and sends the results over a serial port. There are three
// passes: as root, as an ordinary user, and as root without CAP_SYS_ADMIN.
//
// README.md beside this file says how to work with it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// list is a flag with values between commas, which may be given repeatedly.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(s string) error {
	for value := range strings.SplitSeq(s, ",") {
		if value != "" {
			*l = append(*l, value)
		}
	}
	return nil
}

// options are the flags.
type options struct {
	kernels, packages, passes list
	run                       string
	verbose                   bool
	host                      bool
	shell                     bool
	ignoreVersions            bool
	soak                      string
	timeout                   time.Duration
	memory, jobs              int
	report, check             string
	install, keep             bool
}

var allPasses = []string{job.Root, job.User, job.NoAdmin}

func parseFlags(name string, args []string) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.Var(&o.kernels, "kernel", "`lines` to run on, such as 6.1,host (default all)")
	f.Var(&o.packages, "pkg", "`packages` to test (default all of the module)")
	f.Var(&o.passes, "pass", "`passes` to run: root, user, noadmin (default all)")
	f.StringVar(&o.run, "run", "", "run only the tests that match this `regexp`")
	f.BoolVar(&o.verbose, "v", false, "print what the tests write")
	f.BoolVar(&o.host, "host", true, "run on the host's kernel, too")
	f.BoolVar(&o.shell, "shell", false, "start a shell on the one kernel that -kernel names, in place of the tests")
	f.BoolVar(&o.ignoreVersions, "ignore-versions", false, "run the tests that state a newer kernel, too, and list those that pass")
	f.StringVar(&o.soak, "soak", "0.2", "length of long tests, KERNSTREAM_SOAK, as a `factor`")
	f.DurationVar(&o.timeout, "timeout", 15*time.Minute, "limit for each kernel")
	f.IntVar(&o.memory, "memory", 1536, "memory of each virtual machine in `MiB`")
	f.IntVar(&o.jobs, "jobs", 0, "virtual machines at a time (default by processors and free memory)")
	f.StringVar(&o.report, "report", "", "write the report to this `file`")
	f.StringVar(&o.check, "check", "", "fail if the report in this `file` is out of date")
	f.BoolVar(&o.install, "install", false, "install qemu and the programs that the tests need, with apt-get")
	f.BoolVar(&o.keep, "keep", false, "keep the directory with the initramfs and the console logs")
	// Errors are main's to print, and help is no error.
	f.SetOutput(io.Discard)
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			f.SetOutput(os.Stdout)
			f.Usage()
		}
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	return o, o.verify()
}

func (o *options) verify() error {
	for _, pass := range o.passes {
		if !slices.Contains(allPasses, pass) {
			return fmt.Errorf("unknown pass %q", pass)
		}
	}
	if len(o.passes) == 0 {
		o.passes = allPasses
	}
	for i, name := range o.kernels {
		if name == newestTitle {
			o.kernels[i] = hostName
		} else if name != hostName {
			if _, err := parseVersion(name); err != nil {
				return err
			}
		}
	}
	if o.shell && (len(o.kernels) != 1 || o.kernels[0] == hostName) {
		return errors.New("-shell needs one -kernel, such as 6.1")
	}
	partial := o.run != "" || len(o.packages) > 0 || len(o.kernels) > 0 || len(o.passes) < len(allPasses) || o.ignoreVersions
	if partial && (o.report != "" || o.check != "") {
		return errors.New("a report needs a whole run, without -kernel, -pkg, -pass, -run and -ignore-versions")
	}
	if o.report != "" && !o.host {
		return errors.New("a report needs the host's column")
	}
	return nil
}

func main() {
	o, err := parseFlags("kernels", os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	ok, err := runMatrix(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}
