package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFigures: the document has every figure, in a table for its group, and says
// which goals are missed.
func TestFigures(t *testing.T) {
	most := func(on string, v float64) result {
		return result{Case: "a/x", N: 3, Ours: 12, Unit: "ms", Goal: &v, GoalOn: on}
	}
	dir := filepath.Join(t.TempDir(), "new")
	file, err := writeFigures(dir, figures{
		most("ours", 11),
		most("ratio", 1.5).against("floor", 10),
		{Case: "b/y/z", N: 1, Ours: 0.5, Unit: "µs"},
	}, "Linux 1.2")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"\nLinux 1.2.\n",
		"\nGoals: 2, of which missed: 1\n\n- a/x, n 3: 12.0 ms, the goal is 11.0\n",
		"\n## a\n", "\n## b\n",
		"\n| a/x | 3 | 12.0 ms |  |  |  | **missed:** measured at most 11.0 |\n",
		"\n| a/x | 3 | 12.0 ms | floor | 10.0 ms | 1.20 | ratio at most 1.50 |\n",
		"\n| b/y/z | 1 | 0.500 µs |  |  |  |  |\n",
	} {
		if n := strings.Count(string(text), want); n != 1 {
			t.Errorf("%q is %d times in\n%s", want, n, text)
		}
	}
	for _, c := range []struct {
		run  figures
		want string
	}{
		{figures{most("ours", 13)}, "Goals: 1, all of them reached."},
		{figures{{Case: "a/x"}}, "The run has no goals."},
		{figures{most("ratio", 1).against("floor", 10)}, "Goals: 1, of which missed: 1\n\n- a/x, n 3: 1.20 times floor, the goal is 1.00\n"},
		{figures{most("ratio", 1).against("floor", 0)}, "Goals: 1, of which missed: 1\n\n- a/x, n 3: floor is 0, so there is no ratio\n"},
	} {
		if got := c.run.verdict(); got != c.want {
			t.Errorf("%q; want %q", got, c.want)
		}
	}
}
