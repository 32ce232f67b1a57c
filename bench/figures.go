package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The document of a whole run: every figure, with its goal, whether that was
// reached or not.

const figuresFile = "figures.md"

// writeFigures writes the document into dir, and returns its name. caption says
// what was measured where.
func writeFigures(dir string, f figures, caption string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(dir, figuresFile)
	return file, os.WriteFile(file, []byte(f.markdown(caption)), 0o644)
}

// markdown returns all figures as tables, one for each group.
func (f figures) markdown(caption string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Figures\n\n%s.\n\n%s\n", caption, f.verdict())
	fmt.Fprintf(&b, "[bench/README.md](../../bench/README.md) says what each case measures, and how to read it.\n")
	group := ""
	for _, r := range f {
		if g, _, _ := strings.Cut(r.Case, "/"); g != group {
			group = g
			fmt.Fprintf(&b, "\n## %s\n\n| case | n | measured | peer or floor | its value | ratio | goal |\n| --- | --: | --: | --- | --: | --: | --- |\n", g)
		}
		fmt.Fprintf(&b, "| %s |\n", strings.Join(r.markdownCells(), " | "))
	}
	return b.String()
}

// verdict says how many goals there are, and names the cases that miss theirs.
func (f figures) verdict() string {
	goals := 0
	var missed []string
	for _, r := range f {
		if r.Goal != nil {
			goals++
		}
		if r.missed() {
			missed = append(missed, fmt.Sprintf("- %s, n %d: %s", r.Case, r.N, r.goalText()))
		}
	}
	switch {
	case goals == 0:
		return "The run has no goals."
	case len(missed) == 0:
		return fmt.Sprintf("Goals: %d, all of them reached.", goals)
	}
	return fmt.Sprintf("Goals: %d, of which missed: %d\n\n%s\n", goals, len(missed), strings.Join(missed, "\n"))
}

// goalText says what the goal is, and what came of it.
func (r result) goalText() string {
	if r.GoalOn == "ours" {
		return fmt.Sprintf("%s %s, the goal is %s", number(r.Ours), r.Unit, number(*r.Goal))
	}
	if r.Ratio == nil {
		return fmt.Sprintf("%s is 0, so there is no ratio", r.Peer)
	}
	return fmt.Sprintf("%s times %s, the goal is %s", number(*r.Ratio), r.Peer, number(*r.Goal))
}

func (r result) markdownCells() []string {
	cells := []string{r.Case, fmt.Sprint(r.N), number(r.Ours) + " " + r.Unit, "", "", "", ""}
	if r.Peer != "" {
		cells[3], cells[4] = r.Peer, number(*r.PeerValue)+" "+r.Unit
	}
	if r.Ratio != nil {
		cells[5] = number(*r.Ratio)
	}
	if r.Goal != nil {
		cells[6] = fmt.Sprintf("%s at most %s", map[string]string{"ours": "measured", "ratio": "ratio"}[r.GoalOn], number(*r.Goal))
		if r.missed() {
			cells[6] = "**missed:** " + cells[6]
		}
	}
	return cells
}
