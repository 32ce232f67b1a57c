// Command permd lets a policy decide which files may be opened:
//
//	permd -policy policy.txt -log decisions.jsonl /srv/data
//
// A policy is a line for each rule (see policy.go); the first that matches
// decides. SIGHUP reads the policy again, and keeps the one that it has if that
// cannot be read. Ctrl-C ends it: everybody who waits gets the default answer.
//
// It is an example of a consumer of permission events: main.go guards and
// decides, policy.go is the policy. It needs root. A program like this must not
// execute others: what it starts may have to wait for its answer.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/kernstream/kernstream"
)

func main() {
	d := &daemon{}
	policy := flag.String("policy", "", "decide by the rules in `FILE`")
	log := flag.String("log", "", "append each decision to `FILE`, as JSON (default: standard output)")
	deadline := flag.Duration("deadline", 0, "how long anybody waits (default 5s)")
	byDefault := flag.String("default", "deny", "what is decided for want of a rule, or of time: allow or deny")
	mount := flag.Bool("mount", false, "guard all that is reached through the mount of each PATH, and not just PATH and its entries")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: permd -policy FILE [flags] PATH...")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 || *policy == "" || *byDefault != "allow" && *byDefault != "deny" {
		flag.Usage()
		os.Exit(2)
	}
	d.policyFile, d.byDefault, d.deadline = *policy, kernstream.Response{Allow: *byDefault == "allow"}, *deadline
	signal.Ignore(syscall.SIGPIPE) // or the kernel would allow all that waits if nobody reads the log
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := d.main(ctx, *log, marks(*mount, flag.Args())); err != nil {
		fmt.Fprintln(os.Stderr, "permd:", err)
		os.Exit(1)
	}
}

// marks asks about each open below the paths.
func marks(mount bool, paths []string) []kernstream.Mark {
	var marks []kernstream.Mark
	for _, path := range paths {
		m := kernstream.Mark{Path: path, Ops: kernstream.OpOpenPerm | kernstream.OpEventOnChild}
		if mount {
			m.Type, m.Ops = kernstream.MarkMount, kernstream.OpOpenPerm
		}
		marks = append(marks, m)
	}
	return marks
}

// A daemon decides.
type daemon struct {
	policyFile string
	byDefault  kernstream.Response
	deadline   time.Duration

	policy policy
	log    *json.Encoder
}

// main reads the policy, opens the log, and guards until ctx is done.
func (d *daemon) main(ctx context.Context, log string, marks []kernstream.Mark) (err error) {
	if d.policy, err = readPolicy(d.policyFile); err != nil {
		return err
	}
	out := io.Writer(os.Stdout)
	if log != "" {
		file, err := openLog(log)
		if err != nil {
			return err
		}
		defer file.Close()
		out = file
	}
	d.log = json.NewEncoder(out)
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	return d.guard(ctx, reload, marks)
}

// openLog opens the log to append to it. If that ends in the middle of a line, because
// the disk was full or the machine went down, the next one does not go on with that.
func openLog(name string) (*os.File, error) {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err == nil && st.Mode().IsRegular() && st.Size() > 0 && !endsLine(name, st.Size()) {
		_, err = file.WriteString("\n")
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// endsLine tells whether a file of that size ends with a line, as far as one may know.
func endsLine(name string, size int64) bool {
	file, err := os.Open(name)
	if err != nil {
		return true
	}
	defer file.Close()
	last := []byte{0}
	_, err = file.ReadAt(last, size-1)
	return err != nil || last[0] == '\n'
}

// guard answers until ctx is done.
func (d *daemon) guard(ctx context.Context, reload <-chan os.Signal, marks []kernstream.Mark) error {
	w, err := kernstream.WatchFiles(ctx, &kernstream.FileOptions{
		Class:    kernstream.ClassContent,
		Default:  d.byDefault,
		Deadline: d.deadline,
	}, marks...)
	if err != nil {
		return err
	}
	defer w.Close()
	fmt.Fprintf(os.Stderr, "permd: %d rules, guarding\n", len(d.policy))
	for {
		select {
		case e, ok := <-w.C:
			if !ok {
				fmt.Fprintf(os.Stderr, "permd: ended, %d default answers\n", w.Defaulted())
				if ctx.Err() != nil {
					return nil // Ctrl-C
				}
				return w.Err()
			}
			if err := d.judge(e); err != nil {
				return err // and whoever waits gets the default answer
			}
		case <-reload:
			d.reload()
		}
	}
}

// A decision is a line of the log.
type decision struct {
	Time     time.Time `json:"time"`
	PID      int       `json:"pid"`
	Path     string    `json:"path"`
	Decision string    `json:"decision"`
	Rule     int       `json:"rule,omitempty"` // the line of the policy; none: the default
	Error    string    `json:"error,omitempty"`
}

// judge answers one event, and writes down how. Only a log that cannot be
// written is an error.
func (d *daemon) judge(e *kernstream.FileEvent) error {
	defer e.Close()
	record := decision{Time: e.When.UTC(), PID: e.PID, Path: e.Path}
	response := d.byDefault
	if e.PathState == kernstream.PathExact { // a rule is about a path that can be relied on
		if rule := d.policy.match(e.Path); rule != nil {
			response.Allow, record.Rule = rule.allow, rule.line
		}
	}
	record.Decision = response.String()
	switch err := e.Respond(response); {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed): // too late, or after the end
		record.Decision, record.Rule, record.Error = d.byDefault.String(), 0, err.Error()
	case err != nil:
		// An event without a descriptor, which the kernel has denied itself.
		record.Decision, record.Rule, record.Error = "deny", 0, errors.Join(e.Err, err).Error()
	}
	return d.log.Encode(record)
}

// reload reads the policy again.
func (d *daemon) reload() {
	policy, err := readPolicy(d.policyFile)
	if err != nil {
		fmt.Fprintln(os.Stderr, "permd: the policy stays as it was:", err)
		return
	}
	d.policy = policy
	fmt.Fprintf(os.Stderr, "permd: %d rules\n", len(d.policy))
}
