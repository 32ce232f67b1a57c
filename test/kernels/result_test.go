package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// show renders results one per line, followed by what is known about them.
func show(results []result) string {
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "%s %s", r.Outcome, r.Name)
		if r.Group {
			b.WriteString(" (group)")
		}
		b.WriteByte('\n')
		if r.Reason != "" {
			fmt.Fprintf(&b, "\treason  %s\n", r.Reason)
		}
		if r.Ignored != "" {
			fmt.Fprintf(&b, "\tignored %s\n", r.Ignored)
		}
		for _, f := range r.Features {
			fmt.Fprintf(&b, "\tfeature %q by %q\n", f.Name, f.Path)
		}
		for _, line := range r.Output {
			fmt.Fprintf(&b, "\toutput  %q\n", line)
		}
	}
	return b.String()
}

// Results of subtests and of parallel tests go to the right test, output that
// looks like a result is none, a test that did not end failed, and a binary
// that fails without a failed test is a failure of its own.
func TestParser(t *testing.T) {
	for name, status := range map[string]int{"tests": 1, "panic": 2, "leak": 1} {
		t.Run(name, func(t *testing.T) {
			p := newParser("pkg")
			for line := range strings.Lines(readTestdata(t, "testdata/"+name+".txt")) {
				p.Line(strings.TrimSuffix(line, "\n"))
			}
			golden(t, name+".golden", show(p.End(status)))
		})
	}
}

// What a machine brought before it stopped is kept, and what it was at failed.
func TestCollectorKeepsPart(t *testing.T) {
	c := &collector{column: &column{Name: "6.1"}, verbose: func(string, string) {}}
	stream := `{"kind":"hello","text":"6.1.0-56-cloud-amd64"}
{"kind":"begin","pass":"root","package":"a"}
{"kind":"line","pass":"root","package":"a","text":"\u0016=== RUN   TestA"}
{"kind":"line","pass":"root","package":"a","text":"\u0016--- PASS: TestA (0.00s)"}
{"kind":"end","pass":"root","package":"a"}
{"kind":"begin","pass":"root","package":"b"}
{"kind":"line","pass":"root","package":"b","text":"\u0016=== RUN   TestB"}
`
	done, err := readRecords(strings.NewReader(stream), c.Handle)
	if done || err != nil {
		t.Errorf("done %v, error %v", done, err)
	}
	c.Close(fmt.Errorf("stopped"))
	got := c.column
	if got.Version != (version{6, 1}) || got.Err == nil || got.ok() || len(got.Passes) != 1 {
		t.Fatalf("%+v", got)
	}
	if got, want := show(got.Passes[0].Results), "pass TestA\nfail TestB\n\toutput  \"the test did not end\"\n"; got != want {
		t.Errorf("results:\n%s", got)
	}
	if done, err := readRecords(strings.NewReader(`{"kind":"done"}`), c.Handle); !done || err != nil {
		t.Errorf("done %v, error %v", done, err)
	}
	if _, err := readRecords(strings.NewReader("noise\n"), c.Handle); err == nil {
		t.Error("noise was accepted")
	}
}

// In the pass of root only a kernel that is too old excuses a skip; elsewhere a
// missing privilege does, too. A statement that the kernel meets never does.
func TestJudge(t *testing.T) {
	kernel := version{6, 12}
	for _, test := range []struct {
		pass, reason string
		ok           bool
	}{
		{job.Root, "needs Linux 6.13: x", true},
		{job.Root, "needs Linux 7.0: x", true},
		{job.Root, "needs Linux 6.12: x", false},
		{job.Root, "needs Linux 6.2: x", false},
		{job.Root, "needs Linux 5.19: x", false},
		{job.Root, "needs root: x", false},
		{job.Root, "needs Linux", false},
		{job.Root, "", false},
		{job.User, "needs Linux 6.13: x", true},
		{job.User, "needs Linux 6.12: x", false},
		{job.User, "needs root: x", true},
		{job.NoAdmin, "needs a private mount namespace: x", true},
		{job.NoAdmin, "not today", false},
	} {
		problem := judge(kernel, test.pass, &result{Outcome: skipped, Reason: test.reason})
		if (problem == "") != test.ok {
			t.Errorf("%s: %q: %q", test.pass, test.reason, problem)
		}
	}
	if problem := judge(kernel, job.Root, &result{Outcome: passed}); problem != "" {
		t.Errorf("passed: %s", problem)
	}
}

// The summary counts tests, not groups of tests, and says why tests were
// skipped; failures are listed with a bounded part of their output.
func TestSummary(t *testing.T) {
	long := make([]string, maxOutputLines+2)
	for i := range long {
		long[i] = fmt.Sprintf("line %d", i+1)
	}
	columns := []*column{
		{Name: "6.12", Version: version{6, 12}, Passes: []passResult{
			{job.Root, []result{
				{Name: "TestA", Outcome: passed},
				{Name: "TestB", Outcome: skipped, Reason: "needs Linux 6.15: x"},
				{Name: "TestC", Outcome: failed, Group: true},
				{Name: "TestC/d", Package: "poller", Outcome: failed, Output: long},
				{Name: "TestE", Package: "poller", Outcome: skipped, Reason: "needs Linux 6.1: x"},
			}},
			{job.User, []result{
				{Name: "TestA", Outcome: skipped, Reason: "needs root: y"},
				{Name: "TestB", Outcome: skipped, Reason: "needs Linux 6.15: x"},
			}},
		}},
		{Name: hostName, Version: version{6, 18}, Err: fmt.Errorf("took too long"), Passes: []passResult{
			{job.Root, []result{
				{Name: "TestA", Package: "fuse", Outcome: passed, Ignored: "needs Linux 6.19: z"},
				{Name: "TestB", Outcome: failed, Ignored: "needs Linux 6.19: z"},
			}},
		}},
	}
	var b strings.Builder
	for _, c := range columns {
		c.apply()
	}
	printFailures(&b, columns)
	printNeedless(&b, columns)
	printSummary(&b, columns)
	golden(t, "summary.golden", b.String())
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]version{
		"6.12":                      {6, 12},
		"6.1.0-56-cloud-amd64":      {6, 1},
		"6.12.117+deb12-cloud-arm6": {6, 12},
	} {
		if got, err := parseVersion(text); err != nil || got != want {
			t.Errorf("%s: %v, error %v", text, got, err)
		}
	}
	if _, err := parseVersion("host"); err == nil {
		t.Error("host was accepted")
	}
}

// From the console the report of a bug is shown, or else the end.
func TestLastWords(t *testing.T) {
	var lines []string
	for i := range 40 {
		lines = append(lines, fmt.Sprint(i))
	}
	text := strings.Join(lines, "\r\n") + "\r\n"
	if got := pickLastWords(text); len(got) != consoleLines || got[consoleLines-1] != "39" {
		t.Errorf("end: %q", got)
	}
	text = strings.Replace(text, "30", "[ 1.0] BUG: kernel NULL pointer dereference", 1)
	if got := pickLastWords(text); len(got) != 10 || !strings.Contains(got[0], "BUG") {
		t.Errorf("bug: %q", got)
	}
	if got := pickLastWords(""); len(got) != 1 {
		t.Errorf("empty: %q", got)
	}
}

// Tests that failed once, and passed each time when they ran again by themselves,
// passed, and are named with what they wrote. One that fails again failed, and so
// did all that ran with it; a test that was not meant keeps its result.
func TestUnsteady(t *testing.T) {
	first := `{"kind":"begin","pass":"root","package":"a"}
{"kind":"line","text":"\u0016=== RUN   TestA"}
{"kind":"line","text":"\u0016--- PASS: TestA (0.00s)"}
{"kind":"line","text":"\u0016=== RUN   TestB"}
{"kind":"line","text":"\u0016=== RUN   TestB/x"}
{"kind":"line","text":"    b_test.go:1: odd"}
{"kind":"line","text":"\u0016--- FAIL: TestB/x (0.00s)"}
{"kind":"line","text":"\u0016--- FAIL: TestB (0.00s)"}
{"kind":"line","text":"\u0016=== RUN   TestBB"}
{"kind":"line","text":"\u0016--- PASS: TestBB (0.00s)"}
{"kind":"end","pass":"root","package":"a","status":1}
{"kind":"begin","pass":"root","package":"a","again":true}
{"kind":"line","text":"\u0016=== RUN   TestB"}
{"kind":"line","text":"    b_test.go:1: feature: thing: path"}
{"kind":"line","text":"\u0016=== RUN   TestB/x"}
{"kind":"line","text":"\u0016--- PASS: TestB/x (0.00s)"}
{"kind":"line","text":"\u0016--- PASS: TestB (0.00s)"}
`
	for status, want := range map[int]string{
		0: "pass TestA\npass TestB (group)\n\tfeature \"thing\" by \"path\"\n\toutput  \"    b_test.go:1: feature: thing: path\"\n" +
			"\toutput  \"    b_test.go:1: odd\"\npass TestB/x\npass TestBB\n",
		1: "pass TestA\nfail TestB (group)\nfail TestB/x\n\toutput  \"    b_test.go:1: odd\"\npass TestBB\n",
	} {
		c := &collector{column: &column{Name: "6.1", Version: version{6, 1}}, verbose: func(string, string) {}}
		stream := first + fmt.Sprintf(`{"kind":"end","pass":"root","package":"a","status":%d}`, status) + "\n" + `{"kind":"done"}` + "\n"
		if done, err := readRecords(strings.NewReader(stream), c.Handle); !done || err != nil {
			t.Fatalf("done %v, error %v", done, err)
		}
		c.Close(nil)
		if got := show(c.column.Passes[0].Results); got != want {
			t.Errorf("status %d: results:\n%s", status, got)
		}
		if c.column.ok() != (status == 0) {
			t.Errorf("status %d: ok is %v", status, c.column.ok())
		}
		var unsteady, failures strings.Builder
		printUnsteady(&unsteady, []*column{c.column})
		printFailures(&failures, []*column{c.column})
		if named := strings.Contains(unsteady.String(), "unsteady: 6.1 root: a: TestB\n"); named != (status == 0) || (failures.Len() == 0) != named {
			t.Errorf("status %d: %q, %q", status, unsteady.String(), failures.String())
		}
	}
}
