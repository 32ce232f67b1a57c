package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// reportColumns are three kernels with two features, in three passes.
func reportColumns(host version) []*column {
	ids := result{Package: "kernstream", Name: "TestIDs", Outcome: passed, Features: []feature{{"unique mount ids", "listmount"}}}
	noIDs := result{Package: "kernstream", Name: "TestIDs", Outcome: skipped, Reason: "needs Linux 6.8: listmount"}
	mounts := func(path string) result {
		return result{Package: "kernstream", Name: "TestMounts", Outcome: passed, Features: []feature{{"mounts", path}}}
	}
	marks := result{Package: "kernstream", Name: "TestMarks/sub", Outcome: passed, Features: []feature{{"marks", "fanotify | mnt"}}}
	noMarks := result{Package: "kernstream", Name: "TestMarks", Outcome: skipped, Reason: "needs Linux 6.15: marks on namespaces"}
	noRoot := result{Package: "kernstream", Name: "TestMarks", Outcome: skipped, Reason: "needs root: marks"}
	all := func(results ...result) []passResult {
		return []passResult{{job.Root, results}, {job.User, results}, {job.NoAdmin, results}}
	}
	return []*column{
		{Name: "6.1", Version: version{6, 1}, Passes: all(mounts("mountinfo"), noIDs, noMarks)},
		{Name: "6.12", Version: version{6, 12}, Passes: all(mounts("mountinfo"), ids, noMarks)},
		{Name: hostName, Version: host, Passes: []passResult{
			{job.Root, []result{mounts("mountinfo"), mounts("fanotify"), ids, marks}},
			{job.User, []result{mounts("mountinfo"), ids, noRoot}},
			{job.NoAdmin, []result{mounts("mountinfo"), ids, noRoot}},
		}},
	}
}

func TestReport(t *testing.T) {
	golden(t, "report.golden", reportOf(reportColumns(version{6, 18})))
}

// The report is compared in the columns that both have. A newest kernel of
// another version, or one on which not all passes ran, is left out, and so are
// the features that only it has.
func TestCompareReports(t *testing.T) {
	have := reportOf(reportColumns(version{6, 18}))
	changed := func(change func(columns []*column)) string {
		columns := reportColumns(version{6, 18})
		change(columns)
		return reportOf(columns)
	}
	for _, test := range []struct {
		name         string
		want         string
		hostComplete bool
		left         []string
		stale        string // in the difference, "" for none
	}{
		{"same", have, true, nil, ""},
		{"newer host", reportOf(reportColumns(version{6, 19})), true, []string{"newest (6.18)", "newest (6.19)"}, ""},
		{"no host", reportOf(reportColumns(version{6, 18})[:2]), false, []string{"newest (6.18)"}, ""},
		{"a part of the host", have, false, []string{"newest (6.18)"}, ""},
		{
			"another path on the host",
			changed(func(columns []*column) { columns[2].Passes[1].Results[0].Features[0].Path = "polling" }),
			true, nil, "+| mounts | mountinfo | mountinfo | fanotify, mountinfo (root); polling (user); mountinfo (no CAP_SYS_ADMIN) |\n",
		},
		{
			"another path on a part of the host",
			changed(func(columns []*column) { columns[2].Passes[1].Results[0].Features[0].Path = "polling" }),
			false,
			[]string{"newest (6.18)"},
			"",
		},
		{
			"another path on 6.1, another host",
			changed(func(columns []*column) {
				columns[0].Passes[0].Results[0].Features[0].Path = "polling"
				columns[2].Version = version{6, 19}
			}),
			true,
			[]string{"newest (6.18)", "newest (6.19)"},
			"+| mounts | polling | mountinfo |\n",
		},
		{
			"a test that is not skipped any more",
			changed(func(columns []*column) {
				columns[0].Passes[0].Results[1] = columns[1].Passes[0].Results[1]
				columns[0].Passes[1].Results[1] = columns[1].Passes[0].Results[1]
				columns[0].Passes[2].Results[1] = columns[1].Passes[0].Results[1]
			}),
			true, nil, "-| kernstream: TestIDs | Linux 6.8: listmount | skipped | runs | runs |\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			left, err := compareReports(have, test.want, test.hostComplete)
			if !slices.Equal(left, test.left) {
				t.Errorf("left out %q", left)
			}
			if test.stale == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, errStale) || !strings.Contains(err.Error(), test.stale) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// An empty or foreign file is out of date, not a panic.
func TestCompareForeignReport(t *testing.T) {
	want := reportOf(reportColumns(version{6, 18}))
	for _, have := range []string{"", "# Kernels\n", "| x\n", "| feature |\n| --- |\n", "|\n", "| a | b | c |\n| d |\n"} {
		if _, err := compareReports(have, want, true); !errors.Is(err, errStale) {
			t.Errorf("%q: %v", have, err)
		}
	}
}

func TestDiffLines(t *testing.T) {
	for _, test := range []struct{ have, want, diff string }{
		{"a\nb\nc\n", "a\nb\nc\n", ""},
		{"a\nb\nc\n", "a\nc\n", "-b\n"},
		{"a\nc\n", "a\nb\nc\nd\n", "+b\n+d\n"},
		{"a\nb\n", "a\nc\n", "-b\n+c\n"},
	} {
		if got := diffLines(test.have, test.want); got != test.diff {
			t.Errorf("%q, %q: %q", test.have, test.want, got)
		}
	}
}
