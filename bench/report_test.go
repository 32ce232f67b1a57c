package main

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
)

func sampleResult() result {
	return result{Case: "mounts/snapshot", N: 10000, Ours: 22.4444, Unit: "ms"}
}

func TestJSONShape(t *testing.T) {
	withPeer := sampleResult().against("raw read", 20).withGoal(map[string]goal{"raw read": maxRatio(1.15)}, "raw read")
	for _, c := range []struct {
		name string
		r    result
		want map[string]any
	}{
		{"peer and goal", withPeer, map[string]any{
			"case": "mounts/snapshot", "n": 10000.0, "ours": 22.444, "peer": "raw read", "peer_value": 20.0,
			"unit": "ms", "ratio": 1.122, "goal": 1.15, "goal_on": "ratio",
		}},
		{"no peer", sampleResult(), map[string]any{
			"case": "mounts/snapshot", "n": 10000.0, "ours": 22.444, "peer": "", "peer_value": nil,
			"unit": "ms", "ratio": nil,
		}},
		{"peer is zero", sampleResult().against("channel", 0), map[string]any{
			"case": "mounts/snapshot", "n": 10000.0, "ours": 22.444, "peer": "channel", "peer_value": 0.0,
			"unit": "ms", "ratio": nil,
		}},
		{"goal of zero", sampleResult().withGoal(map[string]goal{"": maxOurs(0)}, ""), map[string]any{
			"case": "mounts/snapshot", "n": 10000.0, "ours": 22.444, "peer": "", "peer_value": nil,
			"unit": "ms", "ratio": nil, "goal": 0.0, "goal_on": "ours",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			j := &jsonReporter{out: &out}
			j.row(c.r)
			if err := j.flush(); err != nil {
				t.Fatal(err)
			}
			if strings.Count(out.String(), "\n") != 1 || !strings.HasSuffix(out.String(), "\n") {
				t.Errorf("not one line: %q", out.String())
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(out.String()), &got); err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(got, c.want) {
				t.Errorf("got  %v\nwant %v", got, c.want)
			}
		})
	}
}

func TestJSONLeavesResult(t *testing.T) {
	r := sampleResult().against("raw read", 20.00049)
	(&jsonReporter{out: &strings.Builder{}}).row(r)
	if *r.PeerValue != 20.00049 {
		t.Errorf("the peer's value became %v", *r.PeerValue)
	}
}

func TestMissed(t *testing.T) {
	ratio := func(g float64) map[string]goal { return map[string]goal{"p": maxRatio(g)} }
	ours := func(g float64) map[string]goal { return map[string]goal{"p": maxOurs(g)} }
	r := result{Ours: 11}
	for _, c := range []struct {
		name string
		r    result
		want bool
	}{
		{"no goal", r.against("p", 1), false},
		{"ratio reached", r.against("p", 10).withGoal(ratio(1.1), "p"), false},
		{"ratio missed", r.against("p", 9).withGoal(ratio(1.1), "p"), true},
		{"no ratio", r.against("p", 0).withGoal(ratio(1.1), "p"), true},
		{"ours reached", r.against("p", 1).withGoal(ours(11), "p"), false},
		{"ours missed", r.against("p", 100).withGoal(ours(10), "p"), true},
		{"another peer's goal", r.against("q", 1).withGoal(ratio(1.1), "q"), false},
	} {
		if got := c.r.missed(); got != c.want {
			t.Errorf("%s: missed is %v", c.name, got)
		}
	}
}

func TestTable(t *testing.T) {
	var out strings.Builder
	table := &tableReporter{out: &out}
	table.row(sampleResult().against("raw read", 19).withGoal(map[string]goal{"raw read": maxRatio(1.15)}, "raw read"))
	table.row(result{Case: "mounts/cancel/p99", N: 100, Ours: 0.25, Unit: "µs"})
	if err := table.flush(); err != nil {
		t.Fatal(err)
	}
	want := `
case                   n   ours  peer      peer value  unit  ratio  goal
mounts/snapshot    10000   22.4  raw read        19.0  ms    1.181  ratio <= 1.15 MISSED
mounts/cancel/p99    100  0.250  -                  -  µs        -
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	if len(table.rows) != 0 {
		t.Error("flush keeps the rows")
	}
}

func TestNumber(t *testing.T) {
	got := make(map[float64]string)
	want := map[float64]string{0: "0", 0.0456: "0.046", 1.234: "1.23", 12.34: "12.3", 1234.5: "1234"}
	for v := range want {
		got[v] = number(v)
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v (keys %v)", got, want, slices.Sorted(maps.Keys(want)))
	}
}
