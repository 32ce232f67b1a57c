// This file turns what a test binary writes under -test.v=test2json into
// results.

package main

import (
	"fmt"
	"regexp"
	"strings"
)

// outcome is how a test ended.
type outcome string

const (
	passed  outcome = "pass"
	failed  outcome = "fail"
	skipped outcome = "skip"
)

// wholePackage is the name of a result about a test binary as a whole, such as
// a leak that its TestMain found.
const wholePackage = "(package)"

// result is how one test or subtest ended.
type result struct {
	Package  string // import path inside the module
	Name     string
	Outcome  outcome
	Reason   string    // of a skip
	Ignored  string    // the statement that was set aside by KERNSTREAM_IGNORE_VERSIONS
	Features []feature // which path was at work
	Output   []string
	Group    bool // its subtests say it all; it is not counted itself
	Unsteady bool // it failed, and passed each time when it ran again by itself; Output is the failure's
}

// feature is a test's word on the path by which a feature works, written by
// testenv.Feature.
type feature struct{ Name, Path string }

// marker introduces each line that the testing package itself writes, so that
// what a test prints is never taken for a result.
const marker = "\x16"

var (
	framePattern   = regexp.MustCompile(`^(?:=== (RUN|PAUSE|CONT|NAME|ATTR|ARTIFACTS) *|--- (PASS|FAIL|SKIP|BENCH): )(.*)$`)
	logPattern     = regexp.MustCompile(`(?:^|\s)\S+\.go:\d+: (.*)$`)
	elapsedPattern = regexp.MustCompile(` \([0-9.]+s\)$`)
	featurePattern = regexp.MustCompile(`^feature: (.+?): (.+)$`)
)

// parser reads the output of one test binary, line by line.
type parser struct {
	pkg     string
	results []*result
	byName  map[string]*result
	current *result  // whose output follows
	loose   []string // output of no test
}

func newParser(pkg string) *parser {
	return &parser{pkg: pkg, byName: map[string]*result{}}
}

// Line takes one line of output, without its end.
func (p *parser) Line(line string) {
	// A test may have printed something without an end of line before the
	// marker.
	text, frame, framed := strings.Cut(line, marker)
	if !framed {
		p.output(line)
		return
	}
	if text != "" {
		p.output(text)
	}
	m := framePattern.FindStringSubmatch(frame)
	if m == nil {
		if frame != "PASS" && frame != "FAIL" {
			p.output(frame)
		}
		return
	}
	switch verb := m[1] + m[2]; verb {
	case "ATTR", "ARTIFACTS", "BENCH":
	case "PASS", "FAIL", "SKIP":
		p.current = p.test(elapsedPattern.ReplaceAllString(m[3], ""))
		if p.current != nil {
			p.current.Outcome = outcome(strings.ToLower(verb))
		}
	default:
		p.current = p.test(m[3])
	}
}

// test returns the result with that name, nil for no name.
func (p *parser) test(name string) *result {
	if name = strings.TrimSpace(name); name == "" {
		return nil
	}
	r := p.byName[name]
	if r == nil {
		r = &result{Package: p.pkg, Name: name}
		p.byName[name] = r
		p.results = append(p.results, r)
	}
	return r
}

func (p *parser) output(line string) {
	if p.current == nil {
		p.loose = append(p.loose, line)
		return
	}
	r := p.current
	r.Output = append(r.Output, line)
	m := logPattern.FindStringSubmatch(line)
	if m == nil {
		return
	}
	text := m[1]
	if f := featurePattern.FindStringSubmatch(text); f != nil {
		r.Features = append(r.Features, feature{f[1], f[2]})
		return
	}
	if needs, ok := strings.CutPrefix(text, "ignored: "); ok {
		r.Ignored = needs
		return
	}
	// Of a skipped test this is the reason, unless a need was logged before.
	if !strings.HasPrefix(r.Reason, "needs ") || strings.HasPrefix(text, "needs ") {
		r.Reason = text
	}
}

// End takes the exit status of the test binary and returns all results. A test
// that did not end failed; so did a binary that failed without a failed test.
func (p *parser) End(status int) []result {
	for _, r := range p.results {
		if r.Outcome == "" {
			r.Outcome = failed
			r.Output = append(r.Output, "the test did not end")
		}
		if r.Outcome != skipped {
			r.Reason = ""
		}
	}
	p.group()
	failures := 0
	var results []result
	for _, r := range p.results {
		if r.Outcome == failed {
			failures++
		}
		results = append(results, *r)
	}
	if status != 0 && failures == 0 {
		results = append(results, result{
			Package: p.pkg,
			Name:    wholePackage,
			Outcome: failed,
			Output:  append(p.loose, fmt.Sprintf("exit status %d", status)),
		})
	}
	return results
}

// group finds the tests that have subtests, and hands statements that were set
// aside down to them.
func (p *parser) group() {
	failedBelow := map[*result]bool{}
	for _, r := range p.results {
		for name := parentTest(r.Name); name != ""; name = parentTest(name) {
			parent := p.byName[name]
			if parent == nil {
				continue
			}
			parent.Group = true
			if r.Outcome == failed {
				failedBelow[parent] = true
			}
			if r.Ignored == "" {
				r.Ignored = parent.Ignored
			}
		}
	}
	for _, r := range p.results {
		// It failed, or was skipped, by itself.
		if r.Group && (r.Outcome == skipped || r.Outcome == failed && !failedBelow[r]) {
			r.Group = false
		}
	}
}

// parentTest returns the name of the test whose subtest name is, "" for none.
func parentTest(name string) string {
	return name[:max(0, strings.LastIndexByte(name, '/'))]
}
