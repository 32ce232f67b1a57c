// This file holds the rules of the matrix: which skips are allowed, what counts
// as a failure, and the summary.

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// maxOutputLines bounds what is printed about one failure.
const maxOutputLines = 60

// column is what is known about one kernel: a column of the report.
type column struct {
	Name    string // "6.1", or hostName
	Version version
	Passes  []passResult
	Notes   []string // problems with the environment of the tests
	Err     error    // why the run did not come to its end
	Console string   // log of the kernel's messages, when it was kept
}

// passResult is what one pass over all test binaries brought.
type passResult struct {
	Pass    string
	Results []result
}

// Title names the column for people: "6.12", "host (6.18)".
func (c *column) Title() string {
	if c.Name == hostName {
		return fmt.Sprintf("%s (%s)", c.Name, c.Version)
	}
	return c.Name
}

// judge returns what is wrong with a result on a kernel in a pass, or "". A
// skip must say which kernel it needs, and need a newer one; only passes with
// less privilege may also skip for that.
func judge(kernel version, pass string, r *result) string {
	if r.Outcome != skipped {
		return ""
	}
	s, ok := parseStatement(r.Reason)
	switch {
	case ok && kernel.atLeast(s.version):
		return fmt.Sprintf("skipped by a statement that Linux %s meets: %s", kernel, r.Reason)
	case ok:
		return ""
	case pass == job.Root:
		return "skipped for another reason than the kernel's version: " + r.Reason
	case !strings.HasPrefix(r.Reason, "needs "):
		return "skipped without saying what it needs: " + r.Reason
	default:
		return ""
	}
}

// apply makes failures of the results that the rules do not allow.
func (c *column) apply() {
	for i := range c.Passes {
		p := &c.Passes[i]
		for j := range p.Results {
			r := &p.Results[j]
			if problem := judge(c.Version, p.Pass, r); problem != "" {
				r.Outcome = failed
				r.Output = append(r.Output, problem)
			}
		}
	}
}

// tally counts the results of one pass.
type tally struct {
	passed, failed int
	older          int // skipped: the kernel is older than stated
	privilege      int // skipped: a privilege is missing
	confirmed      int // failed, as the statement that was set aside says
	needless       int // passed in spite of the statement that was set aside
}

func (p *passResult) tally() tally {
	var t tally
	for i := range p.Results {
		r := &p.Results[i]
		if r.Group {
			continue
		}
		_, versioned := parseStatement(r.Reason)
		switch {
		case r.Outcome == skipped && versioned:
			t.older++
		case r.Outcome == skipped:
			t.privilege++
		case r.Outcome == failed && r.Ignored != "":
			t.confirmed++
		case r.Outcome == failed:
			t.failed++
		case r.Ignored != "":
			t.needless++
			t.passed++
		default:
			t.passed++
		}
	}
	return t
}

func (t tally) String() string {
	s := fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, t.failed, t.older+t.privilege)
	switch {
	case t.older > 0 && t.privilege > 0:
		s += fmt.Sprintf(" (%d needs newer kernel, %d needs privilege)", t.older, t.privilege)
	case t.older > 0:
		s += " (needs newer kernel)"
	case t.privilege > 0:
		s += " (needs privilege)"
	}
	if t.confirmed > 0 {
		s += fmt.Sprintf(", %d failed as stated", t.confirmed)
	}
	if t.needless > 0 {
		s += fmt.Sprintf(", %d passed in spite of their statement", t.needless)
	}
	return s
}

// ok tells whether the kernel brought no failure.
func (c *column) ok() bool {
	if c.Err != nil || len(c.Notes) > 0 {
		return false
	}
	for i := range c.Passes {
		if c.Passes[i].tally().failed > 0 {
			return false
		}
	}
	return true
}

// printFailures writes each failure with the end of its output.
func printFailures(w io.Writer, columns []*column) {
	for _, c := range columns {
		for _, note := range c.Notes {
			fmt.Fprintf(w, "--- %s: %s\n", c.Title(), note)
		}
		for _, p := range c.Passes {
			for i := range p.Results {
				if r := &p.Results[i]; r.Outcome == failed && !r.Group && r.Ignored == "" {
					fmt.Fprintf(w, "--- %s %s: %s: %s\n", c.Title(), p.Pass, r.Package, r.Name)
					printTail(w, r.Output)
				}
			}
		}
	}
}

// printUnsteady lists the tests that failed once, and passed when they ran again
// by themselves.
func printUnsteady(w io.Writer, columns []*column) {
	for _, c := range columns {
		for _, p := range c.Passes {
			for i := range p.Results {
				if r := &p.Results[i]; r.Unsteady {
					fmt.Fprintf(w, "unsteady: %s %s: %s: %s\n", c.Title(), p.Pass, r.Package, r.Name)
					printTail(w, r.Output)
				}
			}
		}
	}
}

func printTail(w io.Writer, lines []string) {
	if cut := len(lines) - maxOutputLines; cut > 0 {
		fmt.Fprintf(w, "    ... %d lines before\n", cut)
		lines = lines[cut:]
	}
	for _, line := range lines {
		fmt.Fprintf(w, "    %s\n", strings.TrimRight(line, " \t\r"))
	}
}

// printNeedless lists the tests that passed although they state a newer kernel.
func printNeedless(w io.Writer, columns []*column) {
	for _, c := range columns {
		for _, p := range c.Passes {
			for i := range p.Results {
				if r := &p.Results[i]; r.Outcome == passed && !r.Group && r.Ignored != "" {
					fmt.Fprintf(w, "%s %s: %s: %s passed in spite of its statement: %s\n", c.Title(), p.Pass, r.Package, r.Name, r.Ignored)
				}
			}
		}
	}
}

// printSummary writes one line for each kernel and pass.
func printSummary(w io.Writer, columns []*column) {
	for _, c := range columns {
		for i := range c.Passes {
			fmt.Fprintf(w, "%s %s: %s\n", c.Title(), c.Passes[i].Pass, c.Passes[i].tally())
		}
		if c.Err != nil {
			fmt.Fprintf(w, "%s: %v\n", c.Title(), c.Err)
		}
		if c.Console != "" {
			fmt.Fprintf(w, "%s: kernel messages in %s\n", c.Title(), c.Console)
		}
	}
}
