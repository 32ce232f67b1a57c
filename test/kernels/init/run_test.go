package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// Output is passed on in lines, whatever pieces it comes in; a last line needs
// no end, and what is not text becomes text.
func TestLineWriter(t *testing.T) {
	var got []string
	w := &lineWriter{emit: func(line string) { got = append(got, line) }}
	for _, piece := range []string{"a", "b\nc\n", "", "\n", "bad \xff byte\nend"} {
		if n, err := w.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatalf("%q: %d, %v", piece, n, err)
		}
	}
	w.flush()
	w.flush()
	if want := []string{"ab", "c", "", "bad \uFFFD byte", "end"}; !slices.Equal(got, want) {
		t.Errorf("lines %q", got)
	}
}

// A line without an end comes in parts, and a test that writes without an end
// is cut off, once, while results still arrive.
func TestLineWriterBounds(t *testing.T) {
	var got []string
	w := &lineWriter{emit: func(line string) { got = append(got, line) }}
	w.Write([]byte(strings.Repeat("x", 2*maxLine+1)))
	w.flush()
	if len(got) != 3 || len(got[0]) != maxLine || got[2] != "x" {
		t.Errorf("%d parts", len(got))
	}
	got = nil
	line := strings.Repeat("y", 99) + "\n"
	for range maxOutput/99 + 10 {
		w.Write([]byte(line))
	}
	w.Write([]byte("\x16--- PASS: TestX (0.00s)\n"))
	n := len(got)
	if n < 2 || got[n-1] != "\x16--- PASS: TestX (0.00s)" || !strings.Contains(got[n-2], "cut off") {
		t.Errorf("end: %q", got[max(0, n-3):])
	}
	cut := slices.IndexFunc(got, func(s string) bool { return strings.Contains(s, "cut off") })
	if cut != n-2 {
		t.Errorf("cut off at %d of %d", cut, n)
	}
}

// The tests that failed, and no others, run again; of subtests, the whole test
// does.
func TestFailedTestsRunAgain(t *testing.T) {
	run := &testRun{pass: "root"}
	for _, line := range []string{
		"\x16=== RUN   TestA", "--- FAIL: TestOutput (0.00s)", "\x16--- PASS: TestA (0.00s)", "\x16=== RUN   TestB/x",
		"\x16--- FAIL: TestB/x (0.00s)", "no end of line\x16--- FAIL: TestB (0.00s)", "\x16--- FAIL: TestC (12.34s)",
	} {
		run.note(line)
	}
	if want := []string{"TestB", "TestC"}; !slices.Equal(run.failed, want) {
		t.Errorf("failed: %q", run.failed)
	}
	again := run.again(3)
	if want := []string{"-test.run=^(?:TestB|TestC)$", "-test.count=3"}; !slices.Equal(again.args, want) || !again.repeated || again.pass != "root" {
		t.Errorf("again: %+v", again)
	}
}
