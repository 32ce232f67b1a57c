package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// What is printed: a table for people, or one JSON object per line.

// A result is one figure of kernstream, and that of one peer.
type result struct {
	Case      string   `json:"case"`
	N         int      `json:"n"` // the size: of the mount table, of a merge
	Ours      float64  `json:"ours"`
	Peer      string   `json:"peer"`       // "": there is none
	PeerValue *float64 `json:"peer_value"` // null without a peer
	Unit      string   `json:"unit"`       // of Ours and PeerValue
	Ratio     *float64 `json:"ratio"`      // Ours / PeerValue; null if there is none
	Goal      *float64 `json:"goal,omitempty"`
	GoalOn    string   `json:"goal_on,omitempty"` // what must not be above Goal: "ratio" or "ours"
}

// against returns r with the value of a peer.
func (r result) against(peer string, value float64) result {
	r.Peer, r.PeerValue = peer, &value
	if value != 0 {
		ratio := r.Ours / value
		r.Ratio = &ratio
	}
	return r
}

// withGoal returns r with the goal for that peer, if there is one.
func (r result) withGoal(goals map[string]goal, peer string) result {
	if g, ok := goals[peer]; ok {
		r.Goal, r.GoalOn = &g.value, g.on
	}
	return r
}

// missed tells whether the result has a goal and does not reach it. It looks
// at the numbers as they are printed.
func (r result) missed() bool {
	switch {
	case r.Goal == nil:
		return false
	case r.GoalOn == "ours":
		return rounded(r.Ours) > *r.Goal
	}
	return r.Ratio == nil || rounded(*r.Ratio) > *r.Goal
}

// rounded returns v with three decimals, and at least four significant digits
// below one thousand. What is left out is noise.
func rounded(v float64) float64 { return math.Round(v*1000) / 1000 }

type reporter interface {
	row(result)
	flush() error // ends a group
}

// notingReporter keeps all results while it reports them.
type notingReporter struct {
	reporter
	results figures
}

func (n *notingReporter) row(r result) {
	n.results = append(n.results, r)
	n.reporter.row(r)
}

type jsonReporter struct {
	out io.Writer
	err error
}

func (j *jsonReporter) row(r result) {
	r.Ours = rounded(r.Ours)
	for _, v := range []**float64{&r.PeerValue, &r.Ratio} {
		if *v != nil {
			short := rounded(**v)
			*v = &short
		}
	}
	if err := json.NewEncoder(j.out).Encode(r); err != nil && j.err == nil {
		j.err = err
	}
}

func (j *jsonReporter) flush() error { return j.err }

// tableReporter prints a table for each group, when that has ended.
type tableReporter struct {
	out  io.Writer
	rows [][]string
}

var tableHead = []string{"case", "n", "ours", "peer", "peer value", "unit", "ratio", "goal"}

// numeric are the columns that are aligned to the right.
var numeric = map[int]bool{1: true, 2: true, 4: true, 6: true}

func (t *tableReporter) row(r result) {
	cells := []string{r.Case, strconv.Itoa(r.N), number(r.Ours), "-", "-", r.Unit, "-", ""}
	if r.Peer != "" {
		cells[3], cells[4] = r.Peer, number(*r.PeerValue)
	}
	if r.Ratio != nil {
		cells[6] = fmt.Sprintf("%.3f", *r.Ratio)
	}
	if r.Goal != nil {
		cells[7] = fmt.Sprintf("%s <= %s", r.GoalOn, strconv.FormatFloat(*r.Goal, 'f', -1, 64))
		if r.missed() {
			cells[7] += " MISSED"
		}
	}
	t.rows = append(t.rows, cells)
}

func (t *tableReporter) flush() error {
	rows := append([][]string{tableHead}, t.rows...)
	t.rows = nil
	widths := make([]int, len(tableHead))
	for _, cells := range rows {
		for i, cell := range cells {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	b.WriteByte('\n')
	for _, cells := range rows {
		var line strings.Builder
		for i, cell := range cells {
			space := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if numeric[i] {
				line.WriteString(space + cell)
			} else {
				line.WriteString(cell + space)
			}
			line.WriteString("  ")
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(t.out, b.String())
	return err
}

// number formats a value with about three significant digits.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case math.Abs(v) < 1:
		return fmt.Sprintf("%.3f", v)
	case math.Abs(v) < 10:
		return fmt.Sprintf("%.2f", v)
	case math.Abs(v) < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}
