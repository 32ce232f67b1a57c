package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The plots: which figures of a run become which picture. A plot takes what the
// cases report, so a case needs to know nothing of it.

// A plot is a picture of some figures.
type plot struct {
	file string
	draw func(figures) chart // returns nil if the run does not have its figures
}

var plots = []plot{
	{"mounts.svg", plotMounts},
	{"watches.svg", plotWatches},
	{"files.svg", plotFiles},
	{"permissions.svg", plotPermissions},
	{"fuse.svg", plotFUSE},
	{"records.svg", plotRecords},
}

// What is measured at these sizes, too, when there are to be plots.
var (
	plotTables  = []int{1_000, 3_000}
	plotWatched = []int{1_000, 5_000}
)

// figures are the results of a run.
type figures []result

// us names what kernstream itself measured.
const us = "kernstream"

// at returns the figure of a contender, of a case at a size.
func (f figures) at(name string, n int, contender string) (value float64, ok bool) {
	for _, r := range f {
		switch {
		case r.Case != name || r.N != n:
		case contender == us:
			return r.Ours, true
		case r.Peer == contender:
			return *r.PeerValue, true
		}
	}
	return 0, false
}

// sizes returns the sizes that a case was measured at, in their order.
func (f figures) sizes(name string) (sizes []int) {
	for _, r := range f {
		if r.Case == name {
			sizes = append(sizes, r.N)
		}
	}
	slices.Sort(sizes)
	return slices.Compact(sizes)
}

// line returns a figure of a contender at all sizes, which convert changes.
func (f figures) line(name, contender string, convert func(n int, value float64) float64) (points []point) {
	for _, n := range f.sizes(name) {
		if value, ok := f.at(name, n, contender); ok {
			points = append(points, point{float64(n), convert(n, value)})
		}
	}
	return points
}

// writePlots draws what the run has figures for, and returns the files.
func writePlots(dir string, f figures, caption string) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, p := range plots {
		c := p.draw(f)
		if c == nil {
			continue
		}
		file := filepath.Join(dir, p.file)
		if err := os.WriteFile(file, []byte(c.svg(caption)), 0o644); err != nil {
			return files, err
		}
		files = append(files, file)
	}
	return files, nil
}

// plotMounts shows the cost of a change of the mount table against its size.
func plotMounts(f figures) chart {
	const name = "mounts/watcher CPU"
	same := func(_ int, v float64) float64 { return v }
	mine, theirs := f.line(name, us, same), f.line(name, "moby/sys re-read", same)
	if len(mine) < 2 || len(theirs) < 2 {
		return nil
	}
	last := mine[len(mine)-1]
	return &lineChart{
		title: fmt.Sprintf("A change among %s mounts costs %s of CPU instead of %s",
			grouped(last.x), microseconds(last.y), microseconds(theirs[len(theirs)-1].y)),
		x: axis{"mounts in the table", true, grouped},
		y: axis{"processor time for each mount or unmount", true, microseconds},
		series: []series{
			{"moby/sys, read again", peer, theirs},
			{us, ours, mine},
		},
	}
}

// plotWatches shows the memory of pending watches against their number.
func plotWatches(f figures) chart {
	const watcher, streams = "pids/watches/memory", "pids/watches/memory, WatchProcess"
	const goroutines = "goroutine per file"
	total := func(n int, each float64) float64 { return float64(n) * each }
	mine, own, theirs := f.line(watcher, us, total), f.line(streams, us, total), f.line(watcher, goroutines, total)
	if len(mine) == 0 || len(own) == 0 || len(theirs) == 0 {
		return nil
	}
	last, most := mine[len(mine)-1], theirs[len(theirs)-1]
	return &lineChart{
		title: fmt.Sprintf("%s watched processes take %s of memory instead of %s", grouped(last.x), megabytes(last.y), megabytes(most.y)),
		x:     axis{"processes watched", false, grouped},
		y:     axis{"memory of the Go runtime", false, megabytes},
		series: []series{
			{"goroutine and file each", peer, theirs},
			{"a channel each", ours, own},
			{"ProcessWatcher", ours, mine},
		},
	}
}

// A contestant is a bar: who has it, and what it is called there.
type contestant struct {
	label     string
	kind      emphasis
	contender string
}

// rates returns what contestants do in a second, of a case that reports times; second
// is a second in its unit. It returns false if the run does not have them all.
func (f figures) rates(group, name string, second float64, all ...contestant) (barGroup, bool) {
	g := barGroup{name: group}
	for _, c := range all {
		for _, p := range f.line(name, c.contender, func(_ int, time float64) float64 { return second / time }) {
			g.bars = append(g.bars, bar{c.label, c.kind, p.y})
		}
	}
	return g, len(g.bars) == len(all)
}

// plotFiles compares how many file events a program receives in a second.
func plotFiles(f figures) chart {
	g, ok := f.rates("", "files/receive", 1e9,
		contestant{"bare read loop", floor, "raw handles"},
		contestant{us, ours, us},
		contestant{"readlink for each", peer, "readlink of each"},
		contestant{"acknowledged each", peer, "acknowledged one by one"})
	if !ok {
		return nil
	}
	return &barChart{
		title:  fmt.Sprintf("%s million file events a second, each with its path", strconv.FormatFloat(g.bars[1].value/1e6, 'f', 1, 64)),
		x:      axis{"events received in a second", false, thousands},
		groups: []barGroup{g},
	}
}

// plotPermissions compares how many opens a judge allows in a second.
func plotPermissions(f figures) chart {
	var groups []barGroup
	for _, c := range []struct{ group, name string }{
		{"1 opener, on the judge's CPU", "perm/round trip"},
		{"8 openers", "perm/openers 8"},
	} {
		g, ok := f.rates(c.group, c.name, 1e6,
			contestant{"bare loop", floor, "raw loop"},
			contestant{us, ours, us},
			contestant{"readlink, poll(2)", peer, "readlink, channel, poll(2)"})
		if !ok {
			return nil
		}
		groups = append(groups, g)
	}
	mine, theirs := groups[0].bars[1].value, groups[0].bars[2].value
	return &barChart{
		title:  fmt.Sprintf("%s opens a second, each judged, instead of %s", thousands(mine), thousands(theirs)),
		x:      axis{"open(2) allowed in a second", false, thousands},
		groups: groups,
	}
}

// plotRecords compares how many files get into a record in a second.
func plotRecords(f figures) chart {
	var groups []barGroup
	for _, c := range []struct{ group, name string }{
		{"tmpfs", "record/tmpfs/in process"},
		{"tmpfs, over a socket", "record/tmpfs/served"},
		{"ext4", "record/ext4/in process"},
		{"overlay", "record/overlay/in process"},
	} {
		g, ok := f.rates(c.group, c.name, 1e9,
			contestant{us, ours, us},
			contestant{"acknowledged each", peer, "acknowledged one by one"})
		if !ok {
			return nil
		}
		groups = append(groups, g)
	}
	mine, theirs := groups[0].bars[0].value, groups[0].bars[1].value
	return &barChart{
		title:  fmt.Sprintf("A record is made %s times as fast as with acknowledgements", short(mine/theirs)),
		x:      axis{"files recorded in a second", false, thousands},
		groups: groups,
	}
}

// plotFUSE compares how many requests a server answers in a second.
func plotFUSE(f figures) chart {
	var groups []barGroup
	for _, threads := range []int{1, 4} {
		g := barGroup{name: fmt.Sprintf("%d client threads", threads)}
		if threads == 1 {
			g.name = "1 thread, server's CPU"
		}
		add := func(label string, kind emphasis, form, contender string) {
			if µs, ok := f.at(fmt.Sprintf("fuse/lookup %d/%s", threads, form), threads, contender); ok {
				g.bars = append(g.bars, bar{label, kind, 1e6 / µs})
			}
		}
		add("thread in read(2)", floor, "Next", "blocking read")
		add("Next", ours, "Next", us)
		add("All", ours, "All", us)
		add("Requests", ours, "Requests", us)
		add("go-fuse", peer, "Next", "go-fuse")
		groups = append(groups, g)
	}
	if len(groups[0].bars) != 5 || len(groups[1].bars) != 5 {
		return nil
	}
	mine, theirs := groups[0].bars[1].value, groups[0].bars[4].value
	return &barChart{
		title:  fmt.Sprintf("Next serves %.2f times the FUSE requests that go-fuse does", mine/theirs),
		x:      axis{"LOOKUPs answered in a second", false, thousands},
		groups: groups,
	}
}

// grouped returns a number with a comma between thousands.
func grouped(v float64) string {
	digits := strconv.FormatFloat(v, 'f', 0, 64)
	var b strings.Builder
	for i, d := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			b.WriteByte(',')
		}
		b.WriteRune(d)
	}
	return b.String()
}

// microseconds returns a time in the unit that suits it.
func microseconds(µs float64) string {
	if µs >= 1000 {
		return short(µs/1000) + " ms"
	}
	return short(µs) + " µs"
}

func megabytes(bytes float64) string {
	if bytes == 0 {
		return "0"
	}
	return short(bytes/1e6) + " MB"
}

func thousands(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 1e6:
		return short(v/1e6) + " million"
	}
	unit := math.Pow(10, math.Floor(math.Log10(v))-2) // three digits are enough
	return grouped(math.Round(v/unit) * unit)
}

// short returns v with two significant digits, or without decimals.
func short(v float64) string {
	if v >= 10 || v == 0 {
		return grouped(v)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}
