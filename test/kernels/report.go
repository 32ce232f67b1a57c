// This file writes docs/kernels.md from the results of a whole run, and tells
// whether the one at hand still says the same.

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kernstream/kernstream/test/kernels/job"
)

const (
	newestTitle = "newest"
	noCell      = "–"
	skipCell    = "skipped"
	runCell     = "runs"
)

const reportIntro = `# Kernels

<!-- Written by "go run ./test/kernels -report docs/kernels.md". Do not edit. -->

kernstream is written for Linux 5.10 and later.
Every test of the module runs on each of the kernels below: Debian's cloud kernels, as far as the package archive has them, and the newest kernel at hand.
It runs there as root, as an ordinary user, and as root without CAP_SYS_ADMIN.
`

const reportFeatures = `
## Which path a feature takes

A cell names the path that was at work in the tests. Where it depends on who asks, the cell says for whom.
"needs" is the statement by which the feature's tests skip.

`

const reportSkips = `
## Tests that need a newer kernel

`

var passTitles = map[string]string{
	job.Root:    "root",
	job.User:    "user",
	job.NoAdmin: "no CAP_SYS_ADMIN",
}

// reportOf renders the report. Nothing in it changes between two runs of the
// same tests on the same lines of kernels.
func reportOf(columns []*column) string {
	var b strings.Builder
	b.WriteString(reportIntro)
	b.WriteString(reportFeatures)
	writeTable(&b, featureTable(columns))
	b.WriteString(reportSkips)
	writeTable(&b, skipTable(columns))
	return b.String()
}

func columnTitles(columns []*column) []string {
	var titles []string
	for _, c := range columns {
		if c.Name == hostName {
			titles = append(titles, fmt.Sprintf("%s (%s)", newestTitle, c.Version))
		} else {
			titles = append(titles, c.Name)
		}
	}
	return titles
}

// testID names a test in the whole module.
type testID struct{ pkg, name string }

// featureTable has a row for each feature that a test stated anywhere.
func featureTable(columns []*column) [][]string {
	statedBy := map[string]map[testID]bool{}
	for _, c := range columns {
		for _, p := range c.Passes {
			for _, r := range p.Results {
				for _, f := range r.Features {
					if statedBy[f.Name] == nil {
						statedBy[f.Name] = map[testID]bool{}
					}
					// Where its parent is skipped, a subtest does not exist.
					for name := r.Name; name != ""; name = parentTest(name) {
						statedBy[f.Name][testID{r.Package, name}] = true
					}
				}
			}
		}
	}
	rows := [][]string{append([]string{"feature"}, columnTitles(columns)...)}
	for _, name := range sortedKeys(statedBy) {
		row := []string{name}
		for _, c := range columns {
			row = append(row, featureCell(c, name, statedBy[name]))
		}
		rows = append(rows, row)
	}
	return rows
}

// featureCell says how a feature works on one kernel: once if all passes agree,
// else for each group of passes.
func featureCell(c *column, name string, tests map[testID]bool) string {
	var texts []string
	passes := map[string][]string{} // by text
	for _, p := range c.Passes {
		text := featureText(&p, name, tests)
		if passes[text] == nil {
			texts = append(texts, text)
		}
		passes[text] = append(passes[text], passTitles[p.Pass])
	}
	switch len(texts) {
	case 0:
		return noCell
	case 1:
		return texts[0]
	}
	for i, text := range texts {
		texts[i] = fmt.Sprintf("%s (%s)", text, strings.Join(passes[text], ", "))
	}
	return strings.Join(texts, "; ")
}

// featureText is the path that the tests of one pass stated, or else what they
// need.
func featureText(p *passResult, name string, tests map[testID]bool) string {
	paths, needs := map[string]bool{}, map[string]bool{}
	for _, r := range p.Results {
		for _, f := range r.Features {
			if f.Name == name {
				paths[f.Path] = true
			}
		}
		if r.Outcome == skipped && tests[testID{r.Package, r.Name}] {
			need, _, _ := strings.Cut(r.Reason, ":")
			needs[need] = true
		}
	}
	switch {
	case len(paths) > 0:
		return strings.Join(sortedKeys(paths), ", ")
	case len(needs) > 0:
		return strings.Join(sortedKeys(needs), ", ")
	default:
		return noCell
	}
}

// skipTable has a row for each test that a statement about the kernel skipped.
func skipTable(columns []*column) [][]string {
	type row struct {
		test  testID
		needs string
	}
	skips := map[row]map[*column]bool{}
	for _, c := range columns {
		for _, p := range c.Passes {
			for _, r := range p.Results {
				s, ok := parseStatement(r.Reason)
				if r.Outcome != skipped || !ok {
					continue
				}
				key := row{testID{r.Package, r.Name}, s.String()}
				if skips[key] == nil {
					skips[key] = map[*column]bool{}
				}
				skips[key][c] = true
			}
		}
	}
	rows := [][]string{append([]string{"test", "needs"}, columnTitles(columns)...)}
	for key, on := range skips {
		cells := []string{key.test.pkg + ": " + key.test.name, key.needs}
		for _, c := range columns {
			if on[c] {
				cells = append(cells, skipCell)
			} else {
				cells = append(cells, runCell)
			}
		}
		rows = append(rows, cells)
	}
	slices.SortFunc(rows[1:], slices.Compare[[]string])
	return rows
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func writeTable(b *strings.Builder, rows [][]string) {
	for i, row := range rows {
		for _, cell := range row {
			b.WriteString("| " + strings.ReplaceAll(cell, "|", `\|`) + " ")
		}
		b.WriteString("|\n")
		if i == 0 {
			b.WriteString(strings.Repeat("| --- ", len(row)) + "|\n")
		}
	}
}

// errStale says that the report at hand differs from the results.
var errStale = errors.New("out of date")

// compareReports compares the report at hand with the one that the results
// give, in the columns that both have. It returns the titles that it left out.
// hostComplete tells that the host's column was measured in full.
func compareReports(have, want string, hostComplete bool) (left []string, err error) {
	titles := func(report string) map[string]bool {
		m := map[string]bool{}
		for line := range strings.Lines(report) {
			if cells := tableCells(line); cells != nil && cells[0] == "feature" {
				for _, title := range cells[1:] {
					m[title] = true
				}
			}
		}
		return m
	}
	inHave, inWant := titles(have), titles(want)
	drop := map[string]bool{}
	for _, m := range []map[string]bool{inHave, inWant} {
		for title := range m {
			host := strings.HasPrefix(title, newestTitle)
			if !inHave[title] || !inWant[title] || host && !hostComplete {
				drop[title] = true
			}
		}
	}
	left = sortedKeys(drop)
	if len(drop) > 0 {
		have, want = withoutColumns(have, drop), withoutColumns(want, drop)
	}
	if have == want {
		return left, nil
	}
	return left, fmt.Errorf("%w:\n%s", errStale, diffLines(have, want))
}

// tableCells splits a row of a table; nil for any other line. A bar inside a
// cell is written with a backslash before it.
func tableCells(line string) []string {
	line = strings.TrimRight(line, "\n")
	if len(line) < len("| x |") || !strings.HasPrefix(line, "| ") || !strings.HasSuffix(line, " |") {
		return nil
	}
	return strings.Split(line[2:len(line)-2], " | ")
}

// withoutColumns takes columns out of both tables, and then the rows in which
// nothing is left that was measured: a feature without a path, a test that was
// not skipped.
func withoutColumns(report string, drop map[string]bool) string {
	var b strings.Builder
	var keep []int
	for line := range strings.Lines(report) {
		cells := tableCells(line)
		if cells == nil {
			keep = nil
			b.WriteString(line)
			continue
		}
		header := keep == nil
		if header {
			for i, title := range cells {
				if !drop[title] {
					keep = append(keep, i)
				}
			}
		}
		var kept []string
		for _, i := range keep {
			if i < len(cells) {
				kept = append(kept, cells[i])
			}
		}
		if header || cells[0] == "---" || saysSomething(kept[min(1, len(kept)):]) {
			b.WriteString("| " + strings.Join(kept, " | ") + " |\n")
		}
	}
	return b.String()
}

// saysSomething tells whether one of the cells after the name of a feature or a
// test is more than the absence of a result. (The second column of the second
// table, "Linux 6.15: ...", is none.)
func saysSomething(cells []string) bool {
	for _, cell := range cells {
		absent := cell == noCell || cell == runCell ||
			strings.HasPrefix(cell, "needs ") || strings.HasPrefix(cell, "Linux ")
		if !absent {
			return true
		}
	}
	return false
}
