package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/kernstream/kernstream"
)

// How soon a mount is an event, and a cancelled watcher gone.

// latencies are the figures of the metric "time" that cases of this file tell.
func latencies(unit string, per float64) []figure {
	return []figure{
		{"p50", "time", unit, per, percentile(50)},
		{"p99", "time", unit, per, percentile(99)},
	}
}

// benchMountToEvent measures from the call of mount(2) to the event received.
func benchMountToEvent(b *bench, table *mountTable) error {
	dir, err := table.spare("latency")
	if err != nil {
		return err
	}
	watch := func(name string, perRound int, open func(context.Context) (*watching, error)) contender {
		return contender{name, func(s *sampler) error {
			w, err := open(b.ctx)
			if err != nil {
				return err
			}
			err = mountsToEvents(w, dir, perRound, s)
			return errors.Join(err, w.close())
		}}
	}
	o, err := b.interleave(1,
		watch("kernstream", b.scale(100, 20), watchOurs),
		watch("moby/sys re-read", b.scale(20, 5), watchPeer))
	if err != nil {
		return err
	}
	table.compareSizes(b, o)
	figures := latencies("µs", microsecond)
	b.tell(o, table.n, figures[0], map[string]goal{smallName: maxRatio(1.3)})
	b.tell(o, table.n, figures[1], nil)
	return nil
}

func mountsToEvents(w *watching, dir string, n int, s *sampler) error {
	for range n {
		// The machine comes to rest, so that each event is one that wakes a
		// sleeping watcher.
		time.Sleep(time.Millisecond)
		begin := time.Now()
		if err := mountTmpfs(dir); err != nil {
			return err
		}
		seen, err := awaitSighting(w, func(s sighting) bool { return s.mounted > 0 })
		if err != nil {
			return errors.Join(err, unmount(dir))
		}
		s.addTime(seen.at.Sub(begin))
		time.Sleep(time.Millisecond)
		if err := unmount(dir); err != nil {
			return err
		}
		if _, err := awaitSighting(w, func(s sighting) bool { return s.unmounted > 0 }); err != nil {
			return err
		}
	}
	return nil
}

func awaitSighting(w *watching, want func(sighting) bool) (sighting, error) {
	for {
		s, err := receive(w.seen)
		if err != nil || want(s) {
			return s, err
		}
	}
}

// cancelGoal is how long a cancel may take, in milliseconds.
const cancelGoal = 1

// benchCancel measures from cancel to the consumer's end of a watcher's
// channel, while nothing is mounted. A watcher looks at the table once more
// when it begins to watch, and is cancelled when that is over.
func benchCancel(b *bench, table *mountTable) error {
	return cancels(b, table, b.scale(300, 20), func(firstRead time.Duration) time.Duration {
		return 3*firstRead + rand.N(10*time.Millisecond)
	}, opener{"kernstream", openOurs}, opener{"bare goroutine", openBare})
}

// benchCancelInStorm does the same while another process mounts and unmounts
// without a pause. A watcher then reads the table all the time, and the cancel
// hits any phase of that.
func benchCancelInStorm(b *bench, table *mountTable) error {
	actor, err := table.actor(b.ctx, "storm")
	if err != nil {
		return err
	}
	defer actor.close()
	if _, err := actor.do("storm"); err != nil {
		return err
	}
	err = cancels(b, table, b.scale(200, 20), func(firstRead time.Duration) time.Duration {
		return rand.N(2*firstRead + 10*time.Millisecond)
	}, opener{"kernstream", openOurs}, opener{"bare goroutine", openBare}, opener{"bare reader", bareReader()})
	if err != nil {
		return err
	}
	if pairs, err := actor.do("calm"); err != nil || pairs == 0 {
		return errors.Join(err, fmt.Errorf("the storm was %d mounts", pairs))
	}
	return nil
}

// An opener opens something that a cancel ends.
type opener struct {
	name string
	open func(context.Context) (*drain, error)
}

// cancels measures at least so many samples of each contender. delay tells how
// long after the first event one is cancelled whose first event took firstRead.
func cancels(b *bench, table *mountTable, samples int, delay func(firstRead time.Duration) time.Duration, openers ...opener) error {
	perRound := (samples + b.rounds - 1) / b.rounds
	contenders := make([]contender, len(openers))
	for i, o := range openers {
		contenders[i] = contender{o.name, func(s *sampler) error {
			for i := range perRound {
				if s.warmup && i == 3 {
					break
				}
				took, err := cancelOne(b.ctx, o, delay)
				if err != nil {
					return err
				}
				s.addTime(took)
			}
			return nil
		}}
	}
	o, err := b.interleave(1, contenders...)
	if err != nil {
		return err
	}
	figures := latencies("ms", millisecond)
	b.tell(o, table.n, figures[0], nil)
	b.tell(o, table.n, figures[1], table.goals(map[string]goal{"bare goroutine": maxOurs(cancelGoal)}))
	return nil
}

// cancelOne measures from cancel to the end that the consumer sees.
func cancelOne(ctx context.Context, o opener, delay func(firstRead time.Duration) time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begin := time.Now()
	d, err := o.open(ctx)
	if err != nil {
		return 0, err
	}
	first, err := receive(d.first)
	if err != nil {
		return 0, err
	}
	time.Sleep(delay(first.Sub(begin)))
	begin = time.Now()
	cancel()
	ended, err := receive(d.ended)
	if err == nil {
		err = d.check()
	}
	return ended.Sub(begin), err
}

// A drain is a consumer that receives from a channel until that is closed.
type drain struct {
	first chan time.Time // gets one: when the first element came
	ended chan time.Time // gets one: when the channel was closed
	check func() error   // after that: whether it ended as it should
}

func drainFrom[T any](c <-chan T, check func() error) *drain {
	d := &drain{make(chan time.Time, 1), make(chan time.Time, 1), check}
	go func() {
		for range c {
			select {
			case d.first <- time.Now():
			default:
			}
		}
		d.ended <- time.Now()
	}()
	return d
}

// openOurs opens a watcher; its first event has the whole table.
func openOurs(ctx context.Context) (*drain, error) {
	w, err := kernstream.WatchMounts(ctx, nil)
	if err != nil {
		return nil, err
	}
	return drainFrom(w.C, func() error {
		if err := w.Err(); !errors.Is(err, context.Canceled) {
			return fmt.Errorf("the stream ended with %v", err)
		}
		return nil
	}), nil
}

// openBare starts the least that can be cancelled: a goroutine that waits for
// the context and closes a channel.
func openBare(ctx context.Context) (*drain, error) {
	return drainFunc(func(first func()) {
		first()
		<-ctx.Done()
	}), nil
}

// bareReader returns what starts a goroutine that reads the table again and
// again, and looks at the context between the pages. Its cancel takes as long
// as a page does, and what the machine adds to that for anybody who is busy.
func bareReader() func(context.Context) (*drain, error) {
	raw := newRawReader()
	return func(ctx context.Context) (*drain, error) {
		return drainFunc(func(first func()) {
			for ctx.Err() == nil {
				raw.read(ctx)
				first()
			}
		}), nil
	}
}

// drainFunc drains a channel which a goroutine closes that runs f. What f gets
// sends an element.
func drainFunc(f func(first func())) *drain {
	c := make(chan struct{})
	go func() {
		defer close(c)
		f(func() { c <- struct{}{} })
	}()
	return drainFrom(c, func() error { return nil })
}
