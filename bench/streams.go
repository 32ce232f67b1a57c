package main

import (
	"context"
	"io"
	"runtime"
	"time"

	"github.com/kernstream/kernstream"
)

// The group "streams": what the library itself costs, without any kernel source.

// tick is an event that costs nothing to make: the same one is sent each time.
type tick struct{ When time.Time }

func (t *tick) Time() time.Time { return t.When }
func (t *tick) String() string  { return "tick" }

func benchStreams(b *bench) error {
	if err := b.run("event", func() error { return benchEvent(b) }); err != nil {
		return err
	}
	if err := b.run("merge", func() error { return benchMerge(b) }); err != nil {
		return err
	}
	return b.run("set-up", func() error { return benchSetUp(b) })
}

// benchEvent sends events through one stream.
func benchEvent(b *bench) error {
	events := b.scale(200_000, 20_000)
	o, err := b.interleave(3,
		perEvent("kernstream", events, func(n int) int {
			return count(ticks(b.ctx, n).C)
		}),
		perEvent("bare channel", events, func(n int) int {
			return count(bareTicks(n, func(c chan<- *tick, t *tick) { c <- t }))
		}),
		perEvent("channel and select", events, func(n int) int {
			// What a producer needs that can be cancelled.
			ctx, cancel := context.WithCancel(b.ctx)
			defer cancel()
			return count(bareTicks(n, func(c chan<- *tick, t *tick) {
				select {
				case c <- t:
				case <-ctx.Done():
				}
			}))
		}))
	if err != nil {
		return err
	}
	tellEvents(b, o, 1)
	return nil
}

// benchMerge sends events through a merge of streams.
func benchMerge(b *bench) error {
	events := b.scale(200_000, 20_000)
	for _, sources := range []int{1, 3} {
		o, err := b.interleave(3,
			perEvent("kernstream", events, func(n int) int {
				list := make([]kernstream.Source, sources)
				for i := range list {
					list[i] = ticks(b.ctx, n/sources)
				}
				return count(kernstream.Merge(b.ctx, list...).C)
			}),
			perEvent("bare channel", events, func(n int) int {
				return count(bareTicks(n, func(c chan<- *tick, t *tick) { c <- t }))
			}))
		if err != nil {
			return err
		}
		tellEvents(b, o, sources)
	}
	return nil
}

// benchSetUp makes streams and closes them.
func benchSetUp(b *bench) error {
	streams := b.scale(20_000, 2_000)
	o, err := b.interleave(3,
		perEvent("kernstream", streams, func(n int) int {
			for range n {
				kernstream.NewStream(b.ctx, func(ctx context.Context, _ func(*tick) bool) error {
					<-ctx.Done()
					return nil
				}).Close()
			}
			return n
		}),
		perEvent("bare goroutine", streams, func(n int) int {
			for range n {
				ctx, cancel := context.WithCancel(b.ctx)
				c := make(chan *tick)
				go func() {
					<-ctx.Done()
					close(c)
				}()
				cancel()
				<-c
			}
			return n
		}))
	if err != nil {
		return err
	}
	b.tell(o, 1, figure{"", "time", "ns", nanosecond, median}, nil)
	b.tell(o, 1, figure{"allocs", "allocs", "allocs", 1, roundedMedian}, nil)
	return nil
}

func tellEvents(b *bench, o *outcome, sources int) {
	b.tell(o, sources, figure{"", "time", "ns/event", nanosecond, median}, nil)
	goals := make(map[string]goal)
	for _, peer := range o.contenders[1:] {
		goals[peer] = maxOurs(0)
	}
	b.tell(o, sources, figure{"allocs", "allocs", "allocs/event", 1, roundedMedian}, goals)
}

// perEvent returns a contender that does something n times in one go, and
// measures the time and the allocations of each. f returns how many it did.
func perEvent(name string, n int, f func(n int) int) contender {
	return contender{name, func(s *sampler) error {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		begin := time.Now()
		done := float64(f(n))
		took := time.Since(begin)
		runtime.ReadMemStats(&after)
		s.add("time", float64(took.Nanoseconds())/done)
		s.add("allocs", float64(after.Mallocs-before.Mallocs)/done)
		return nil
	}}
}

// ticks returns a stream of n events.
func ticks(ctx context.Context, n int) *kernstream.Stream[*tick] {
	return kernstream.NewStream(ctx, func(_ context.Context, emit func(*tick) bool) error {
		t := &tick{When: time.Now()}
		for range n {
			if !emit(t) {
				return nil
			}
		}
		return io.EOF
	})
}

// bareTicks returns a channel that n events come from.
func bareTicks(n int, send func(chan<- *tick, *tick)) <-chan *tick {
	c := make(chan *tick)
	go func() {
		defer close(c)
		t := &tick{When: time.Now()}
		for range n {
			send(c, t)
		}
	}()
	return c
}

// count returns how many events came from c.
func count[T any](c <-chan T) (n int) {
	for range c {
		n++
	}
	return n
}
