package main

import (
	"context"
	"errors"
	"io"
	"reflect"
	"slices"
	"testing"
)

// keepReporter keeps what is reported.
type keepReporter struct{ results []result }

func (k *keepReporter) row(r result) { k.results = append(k.results, r) }
func (k *keepReporter) flush() error { return nil }

func testBench(t *testing.T, set settings) (*bench, *keepReporter) {
	keep := &keepReporter{}
	return &bench{settings: &set, ctx: t.Context(), report: keep, progress: io.Discard}, keep
}

func TestTurn(t *testing.T) {
	const n = 4
	first := make(map[int]bool)
	before := make(map[[2]int]bool)
	for round := range 2 * n {
		order := turn(round, n)
		if sorted := slices.Sorted(slices.Values(order)); !slices.Equal(sorted, []int{0, 1, 2, 3}) {
			t.Fatalf("round %d: %v", round, order)
		}
		first[order[0]] = true
		for i := 1; i < n; i++ {
			before[[2]int{order[i-1], order[i]}] = true
		}
	}
	if len(first) != n {
		t.Errorf("only %v come first", first)
	}
	for i := range n {
		j := (i + 1) % n
		if !before[[2]int{i, j}] || !before[[2]int{j, i}] {
			t.Errorf("%d and %d always come in the same order", i, j)
		}
	}
}

func TestInterleave(t *testing.T) {
	b, _ := testBench(t, settings{rounds: 3})
	var calls []string
	count := func(name string) contender {
		return contender{name, func(s *sampler) error {
			calls = append(calls, name)
			s.add("time", float64(len(calls)))
			if s.warmup != (len(calls) <= 2) {
				t.Errorf("call %d: warmup is %v", len(calls), s.warmup)
			}
			return nil
		}}
	}
	o, err := b.interleave(2, count("a"), count("b"))
	if err != nil {
		t.Fatal(err)
	}
	if want := 2 * (1 + 3*2); len(calls) != want {
		t.Errorf("%d calls, want %d", len(calls), want)
	}
	for i, name := range []string{"a", "b"} {
		samples := o.metrics[i]["time"]
		if len(samples) != 6 || slices.Min(samples) <= 2 {
			t.Errorf("%s: samples %v: six are to be kept, and none of the warm-up", name, samples)
		}
	}
}

func TestInterleaveEnds(t *testing.T) {
	b, _ := testBench(t, settings{rounds: 3})
	broken := errors.New("broken")
	_, err := b.interleave(1, contender{"a", func(*sampler) error { return broken }})
	if !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	b.ctx = ctx
	calls := 0
	_, err = b.interleave(1, contender{"a", func(*sampler) error { calls++; cancel(); return nil }})
	if calls != 1 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

func TestTell(t *testing.T) {
	b, keep := testBench(t, settings{rounds: 1})
	b.name = "mounts/snapshot"
	o := &outcome{
		contenders: []string{"kernstream", "floor", "peer"},
		metrics:    []map[string][]float64{{"time": {3e6, 1e6, 2e6}}, {"time": {1e6}}, {"time": {4e6}}},
	}
	b.tell(o, 7, figure{"p50", "time", "ms", 1e6, median}, map[string]goal{"floor": maxRatio(1.5)})
	half, two, one, four, most := 0.5, 2.0, 1.0, 4.0, 1.5
	want := []result{
		{Case: "mounts/snapshot/p50", N: 7, Ours: 2, Peer: "floor", PeerValue: &one, Unit: "ms", Ratio: &two, Goal: &most, GoalOn: "ratio"},
		{Case: "mounts/snapshot/p50", N: 7, Ours: 2, Peer: "peer", PeerValue: &four, Unit: "ms", Ratio: &half},
	}
	if !reflect.DeepEqual(keep.results, want) {
		t.Errorf("got %+v", keep.results)
	}
	o.drop("floor")
	o.drop("peer")
	keep.results = nil
	b.tell(o, 7, figure{"", "time", "ms", 1e6, median}, nil)
	if len(keep.results) != 1 || keep.results[0].Peer != "" || keep.results[0].Case != "mounts/snapshot" {
		t.Errorf("without a peer: %+v", keep.results)
	}
}

func TestWants(t *testing.T) {
	for _, c := range []struct {
		only []string
		name string
		want bool
	}{
		{nil, "mounts", true},
		{[]string{"mounts"}, "mounts", true},
		{[]string{"mounts"}, "mounts/snapshot", true},
		{[]string{"mounts"}, "streams", false},
		{[]string{"streams", "mounts/drag"}, "mounts", true},
		{[]string{"mounts/drag"}, "mounts/drag", true},
		{[]string{"mounts/drag"}, "mounts/snapshot", false},
		{[]string{"mounts/cancel"}, "mounts/cancel in storm", false},
	} {
		b, _ := testBench(t, settings{only: c.only})
		if got := b.wants(c.name); got != c.want {
			t.Errorf("-only %v: wants(%q) = %v", c.only, c.name, got)
		}
	}
}

func TestParseFlags(t *testing.T) {
	set, err := parseFlags([]string{"-quick", "-only", "mounts,streams/merge"})
	if err != nil || set.rounds != 2 || !slices.Equal(set.only, []string{"mounts", "streams/merge"}) {
		t.Errorf("%+v, %v", set, err)
	}
	for _, args := range [][]string{{"-only", "nothing"}, {"-rounds", "-1"}, {"mounts"}} {
		if _, err := parseFlags(args); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}
