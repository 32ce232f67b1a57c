package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// someFigures are what a run could have reported, of every plot.
func someFigures() figures {
	var all figures
	add := func(name string, n int, value float64, peers ...any) {
		for i := 0; i < len(peers); i += 2 {
			all = append(all, result{Case: name, N: n, Ours: value}.against(peers[i].(string), peers[i+1].(float64)))
		}
	}
	for _, n := range []int{100, 1000, 3000, 10_000} {
		add("mounts/watcher CPU", n, 120+float64(n)/100, "moby/sys re-read", 3*float64(n), smallName, 120.)
	}
	for _, n := range []int{1000, 5000, 15_000} {
		add("pids/watches/memory", n, 227, "epoll_ctl alone", 0., "goroutine per file", 3462.)
		add("pids/watches/memory, WatchProcess", n, 430, "epoll_ctl alone", 0., "goroutine per file", 3462.)
	}
	add("files/receive", 50_000, 700, "raw handles", 490., "readlink of each", 6200., "acknowledged one by one", 33_000.)
	add("perm/round trip", 5000, 17, "raw loop", 9.7, "readlink, channel, poll(2)", 105., "nobody is asked", 1.2)
	add("perm/openers 8", 8, 27, "raw loop", 16., "readlink, channel, poll(2)", 29.)
	for _, name := range []string{"tmpfs/in process", "tmpfs/served", "ext4/in process", "overlay/in process"} {
		add("record/"+name, 50_000, 1400, "acknowledged one by one", 30_000.)
	}
	for _, threads := range []int{1, 4} {
		for _, form := range []string{"Next", "All", "Requests"} {
			add(fmt.Sprintf("fuse/lookup %d/%s", threads, form), threads, 10.7, "go-fuse", 15.6, "blocking read", 11.6)
		}
	}
	return all
}

// titleLetters is how many letters a title has at most: as many as fit.
const titleLetters = 66

// texts returns the texts of an SVG, which must be well-formed.
func texts(t *testing.T, path string) (all []string) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	decoder, within := xml.NewDecoder(file), ""
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			within = token.Name.Local
			for _, attr := range token.Attr {
				if strings.Contains(attr.Value, "NaN") || strings.Contains(attr.Value, "Inf") {
					t.Errorf("%s: %s=%q", path, attr.Name.Local, attr.Value)
				}
			}
		case xml.EndElement:
			within = ""
		case xml.CharData:
			if within == "text" {
				all = append(all, string(token))
			}
		}
	}
}

// TestPlots: a run with all figures makes all plots; each says what it found,
// names every contender, and what was measured where.
func TestPlots(t *testing.T) {
	files, err := writePlots(t.TempDir(), someFigures(), "Linux 1.2 & more")
	if err != nil || len(files) != len(plots) {
		t.Fatalf("%q, %v; want %d plots", files, err, len(plots))
	}
	for i, want := range [][]string{
		{"A change among 10,000 mounts costs 220 µs of CPU instead of 30 ms", "moby/sys, read again", "kernstream", "mounts in the table", "100", "10,000", "1 ms"},
		{"15,000 watched processes take 3.4 MB of memory instead of 52 MB", "goroutine and file each", "a channel each", "ProcessWatcher", "15,000", "50 MB"},
		{"1.4 million file events a second, each with its path", "bare read loop", "kernstream", "readlink for each", "acknowledged each", "30,300"},
		{"58,800 opens a second, each judged, instead of 9,520", "bare loop", "kernstream", "readlink, poll(2)", "8 openers", "103,000", "37,000", "34,500"},
		{"Next serves 1.46 times the FUSE requests that go-fuse does", "Next", "All", "Requests", "go-fuse", "thread in read(2)", "93,500", "4 client threads"},
		{"A record is made 21 times as fast as with acknowledgements", "kernstream", "acknowledged each", "tmpfs, over a socket", "ext4", "overlay", "714,000", "33,300"},
	} {
		got := texts(t, files[i])
		if title := got[0]; title != want[0] || len([]rune(title)) > titleLetters {
			t.Errorf("%s has the title %q; want %q, no longer than fits", filepath.Base(files[i]), title, want[0])
		}
		for _, text := range append(want, "Linux 1.2 & more") {
			if !slices.Contains(got, text) {
				t.Errorf("%s does not say %q, but %q", filepath.Base(files[i]), text, got)
			}
		}
	}
}

// TestPlotsOfPart: what a run did not measure is not drawn, and a picture that
// is there stays.
func TestPlotsOfPart(t *testing.T) {
	dir := t.TempDir()
	before := filepath.Join(dir, "fuse.svg")
	if err := os.WriteFile(before, []byte("before"), 0o644); err != nil {
		t.Fatal(err)
	}
	part := slices.DeleteFunc(someFigures(), func(r result) bool { return r.Case != "files/receive" })
	files, err := writePlots(dir, part, "")
	if want := []string{filepath.Join(dir, "files.svg")}; !slices.Equal(files, want) || err != nil {
		t.Errorf("%q, %v; want %q", files, err, want)
	}
	if text, err := os.ReadFile(before); string(text) != "before" {
		t.Errorf("a picture that was not asked for is %q, %v", text, err)
	}
	// Any one figure that is missing leaves its plot out, and never half of one.
	all := someFigures()
	for i, r := range all {
		if r.Peer == "epoll_ctl alone" || r.Peer == smallName || r.Peer == "nobody is asked" || r.N != 1 && strings.HasPrefix(r.Case, "mounts") || strings.HasPrefix(r.Case, "pids") {
			continue
		}
		files, err := writePlots(t.TempDir(), slices.Concat(all[:i], all[i+1:]), "")
		if len(files) != len(plots)-1 && !strings.HasPrefix(r.Case, "fuse") || err != nil {
			t.Errorf("without %s %s: %q, %v", r.Case, r.Peer, files, err)
		}
	}
}

// TestScale: ticks are round numbers, and everything is within the range.
func TestScale(t *testing.T) {
	for _, test := range []struct {
		log    bool
		values []float64
		ticks  []float64
	}{
		{false, []float64{93_458}, []float64{0, 20_000, 40_000, 60_000, 80_000, 100_000}},
		{false, []float64{0, 3, 7}, []float64{0, 2, 4, 6, 8}},
		{false, []float64{5}, []float64{0, 1, 2, 3, 4, 5}},
		{true, []float64{121, 30_000}, []float64{100, 1000, 10_000, 100_000}},
		{true, []float64{100, 10_000}, []float64{100, 1000, 10_000}},
	} {
		s := newScale(axis{log: test.log}, 10, 110, test.values)
		if got := s.ticks(); !slices.EqualFunc(got, test.ticks, func(a, b float64) bool { return math.Abs(a-b) < 1e-6*b+1e-9 }) {
			t.Errorf("%v: ticks %v; want %v", test.values, got, test.ticks)
		}
		for _, v := range test.values {
			if at := s.at(v); at < 10 || at > 110.001 {
				t.Errorf("%v is at %v", v, at)
			}
		}
	}
}

// TestLabelPlaces: names of lines that end close to each other are apart, in
// the order of the lines.
func TestLabelPlaces(t *testing.T) {
	end := func(y float64) series { return series{points: []point{{1, 1}, {2, y}}} }
	y := newScale(axis{}, 300, 0, []float64{100})
	places := labelPlaces([]series{end(50), end(90), end(51), end(49)}, y)
	order := []int{1, 2, 0, 3} // from the top
	for i := 1; i < len(order); i++ {
		if above, below := places[order[i-1]], places[order[i]]; below-above < 16 {
			t.Errorf("places %v: %d is not below %d", places, order[i], order[i-1])
		}
	}
}

// TestNumbers: what figures look like.
func TestNumbers(t *testing.T) {
	for got, want := range map[string]string{
		grouped(0): "0", grouped(999): "999", grouped(1000): "1,000", grouped(1234567): "1,234,567",
		microseconds(0.48): "0.48 µs", microseconds(239.4): "239 µs", microseconds(29_900): "30 ms", microseconds(1000): "1 ms",
		megabytes(0): "0", megabytes(3.2e6): "3.2 MB", thousands(0): "0", thousands(64_123): "64,100", thousands(1.43e6): "1.4 million",
	} {
		if got != want {
			t.Errorf("%q; want %q", got, want)
		}
	}
}
