package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"time"
)

// The frame that cases run in: groups of cases, and rounds in which the
// contenders of a case take turns, so that whatever slows the machine for a
// while slows all of them.

// A group is the cases of one event source.
type group struct {
	name string
	run  func(*bench) error // calls bench.run for each of its cases
}

// bench is a run of the program.
type bench struct {
	*settings
	ctx      context.Context
	dir      string // an empty directory to mount on
	report   reporter
	progress io.Writer

	group string
	name  string // the case that runs, with its group
	ran   int
}

func (b *bench) runGroup(g group) error {
	if !b.wants(g.name) {
		return nil
	}
	b.group = g.name
	if err := g.run(b); err != nil {
		return err
	}
	return b.report.flush()
}

// run runs the case name of the current group, if that was asked for.
func (b *bench) run(name string, measure func() error) error {
	b.name = b.group + "/" + name
	if !b.wants(b.name) {
		return nil
	}
	b.ran++
	fmt.Fprintf(b.progress, "%s ...\n", b.name)
	if err := measure(); err != nil {
		if b.ctx.Err() != nil {
			return context.Cause(b.ctx)
		}
		return fmt.Errorf("%s: %w", b.name, err)
	}
	return nil
}

// wants tells whether a group or case may hold something that was asked for.
func (b *bench) wants(name string) bool {
	for _, only := range b.only {
		if name == only || strings.HasPrefix(name, only+"/") || strings.HasPrefix(only, name+"/") {
			return true
		}
	}
	return len(b.only) == 0
}

// scale returns full, or small in a quick run.
func (b *bench) scale(full, small int) int {
	if b.quick {
		return small
	}
	return full
}

// A contender is one of those that a case compares. The first of a case is
// kernstream.
type contender struct {
	name string
	run  func(*sampler) error // takes one or more samples of each metric
}

// A sampler collects what a contender measures in one round.
type sampler struct {
	warmup  bool // nothing is kept: few samples will do
	metrics map[string][]float64
}

func (s *sampler) add(metric string, value float64) {
	if s.metrics == nil {
		s.metrics = make(map[string][]float64)
	}
	s.metrics[metric] = append(s.metrics[metric], value)
}

// addTime adds a duration to the metric "time".
func (s *sampler) addTime(d time.Duration) { s.add("time", float64(d.Nanoseconds())) }

// An outcome is the samples of all rounds.
type outcome struct {
	contenders []string
	metrics    []map[string][]float64 // for each contender
}

// drop takes a contender out, whose name must not be the first.
func (o *outcome) drop(name string) {
	if i := slices.Index(o.contenders, name); i > 0 {
		o.contenders = slices.Delete(o.contenders, i, i+1)
		o.metrics = slices.Delete(o.metrics, i, i+1)
	}
}

// interleave lets the contenders take turns, for the rounds of this run times
// repeat, after a warm-up round that does not count. The garbage of one is
// collected before the next starts.
func (b *bench) interleave(repeat int, contenders ...contender) (*outcome, error) {
	o := &outcome{metrics: make([]map[string][]float64, len(contenders))}
	for i, c := range contenders {
		o.contenders = append(o.contenders, c.name)
		o.metrics[i] = make(map[string][]float64)
	}
	for round := range 1 + b.rounds*max(1, repeat) {
		for _, i := range turn(round, len(contenders)) {
			if b.ctx.Err() != nil {
				return nil, context.Cause(b.ctx)
			}
			s := &sampler{warmup: round == 0}
			if err := b.sample(contenders[i], s); err != nil {
				return nil, fmt.Errorf("%s: %w", contenders[i].name, err)
			}
			if s.warmup {
				continue
			}
			for metric, values := range s.metrics {
				o.metrics[i][metric] = append(o.metrics[i][metric], values...)
			}
		}
	}
	return o, nil
}

// sizes returns the sizes of a case: always, and when there are to be plots those
// between them, too.
func (b *bench) sizes(plotted []int, always ...int) []int {
	sizes := slices.Clone(always)
	for _, n := range plotted {
		if b.svg != "" && n < slices.Max(always) {
			sizes = append(sizes, n)
		}
	}
	slices.Sort(sizes)
	return sizes
}

func (b *bench) sample(c contender, s *sampler) (err error) {
	runtime.GC()
	pprof.Do(b.ctx, pprof.Labels("case", b.name, "contender", c.name), func(context.Context) {
		err = c.run(s)
	})
	return err
}

// turn returns the order of n contenders in a round: it begins with another one
// each two rounds, and goes backwards every other round, so nobody always comes
// first or after the same one.
func turn(round, n int) []int {
	order := make([]int, n)
	for i := range order {
		order[i] = (round/2 + i) % n
		if round%2 == 1 {
			order[i] = n - 1 - order[i]
		}
	}
	return order
}

// A figure is how samples of a metric become one number.
type figure struct {
	name   string // after that of the case; may be empty
	metric string
	unit   string
	per    float64 // samples are divided by it
	of     func([]float64) float64
}

// A goal is the most that the figure of kernstream may be.
type goal struct {
	on    string // "ratio" or "ours"
	value float64
}

func maxRatio(v float64) goal { return goal{"ratio", v} }
func maxOurs(v float64) goal  { return goal{"ours", v} }

// tell reports a figure of the current case, one row for each peer; n is the
// size that the case was measured at. Goals are keyed by the peer in whose row
// they stand; "" is a row without a peer.
func (b *bench) tell(o *outcome, n int, f figure, goals map[string]goal) {
	name := b.name
	if f.name != "" {
		name += "/" + f.name
	}
	value := func(i int) float64 { return f.of(o.metrics[i][f.metric]) / f.per }
	r := result{Case: name, N: n, Ours: value(0), Unit: f.unit}
	if len(o.contenders) == 1 {
		b.report.row(r.withGoal(goals, ""))
	}
	for i, peer := range o.contenders {
		if i > 0 {
			b.report.row(r.against(peer, value(i)).withGoal(goals, peer))
		}
	}
}
