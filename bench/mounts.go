package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/prometheus/procfs"

	"github.com/kernstream/kernstream"
)

// The group "mounts": the mount table read once, and followed.

// patience is how long a case waits for what must happen.
const patience = 20 * time.Second

// units
const (
	nanosecond  = 1
	microsecond = 1e3
	millisecond = 1e6
)

func benchMounts(b *bench) error {
	table, err := newMountTable(b.dir)
	if err != nil {
		return err
	}
	defer table.close()
	if err := b.run("slaves", func() error { return benchSlaves(b, table) }); err != nil {
		return err
	}
	for _, n := range b.sizes(plotTables, smallTable, b.scale(largeTable, 400)) {
		if err := table.grow(n); err != nil {
			return err
		}
		if slices.Contains(plotTables, n) {
			err = b.run("watcher CPU", func() error { return benchWatcherCPU(b, table) })
		} else {
			err = benchMountsAt(b, table, n > smallTable)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// benchMountsAt measures at one size of the table: everything, or only what
// says more when there are two sizes.
func benchMountsAt(b *bench, table *mountTable, everything bool) error {
	cases := []struct {
		name  string
		large bool // only measured with the large table
		run   func(*bench, *mountTable) error
	}{
		{"snapshot", false, benchSnapshot},
		{"changed row", true, benchChangedRow},
		{"mount to event", false, benchMountToEvent},
		{"watcher CPU", false, benchWatcherCPU},
		{"cancel", true, benchCancel},
		{"cancel in storm", true, benchCancelInStorm},
		{"drag", true, benchDrag},
	}
	for _, c := range cases {
		if c.large && !everything {
			continue
		}
		if err := b.run(c.name, func() error { return c.run(b, table) }); err != nil {
			return err
		}
	}
	return nil
}

// benchSnapshot reads the whole table once.
func benchSnapshot(b *bench, table *mountTable) error {
	raw := newRawReader()
	// read makes a contender of a function that returns how many rows it read,
	// or -1 if it does not know.
	read := func(name string, f func() (rows int, err error)) contender {
		return contender{name, func(s *sampler) error {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			begin := time.Now()
			rows, err := f()
			took := time.Since(begin)
			runtime.ReadMemStats(&after)
			if err != nil {
				return err
			}
			if rows >= 0 && rows < table.n {
				return fmt.Errorf("%d rows of more than %d", rows, table.n)
			}
			s.addTime(took)
			if rows > 0 {
				s.add("allocs", float64(after.Mallocs-before.Mallocs)/float64(rows))
			}
			return nil
		}}
	}
	ours := read("kernstream", func() (int, error) {
		mounts, err := kernstream.Mounts(nil)
		return len(mounts), err
	})
	moby := read("moby/sys", func() (int, error) {
		mounts, err := mountinfo.GetMounts(nil)
		return len(mounts), err
	})
	prometheus := read("prometheus/procfs", func() (int, error) {
		mounts, err := procfs.GetMounts()
		return len(mounts), err
	})
	floor := read("raw read", func() (int, error) {
		_, err := raw.read(b.ctx)
		return -1, err
	})
	o, err := b.interleave(b.scale(5, 2), ours, floor, moby, prometheus)
	if err != nil {
		return err
	}
	b.tell(o, table.n, figure{"", "time", "ms", millisecond, median}, table.goals(map[string]goal{"raw read": maxRatio(1.2)}))
	o.drop("raw read") // it allocates nothing
	allocs := figure{"allocs", "allocs", "allocs/row", 1, roundedMedian}
	b.tell(o, table.n, allocs, table.goals(map[string]goal{"moby/sys": maxOurs(1), "prometheus/procfs": maxOurs(1)}))
	return nil
}

// benchChangedRow changes one row, of which the kernel tells nobody, and lets
// the watcher find it.
func benchChangedRow(b *bench, table *mountTable) error {
	w, err := kernstream.WatchMounts(b.ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := receive(w.C); err != nil {
		return err
	}
	raw := newRawReader()
	shared := false
	o, err := b.interleave(5,
		contender{"kernstream", func(s *sampler) error {
			shared = !shared
			if err := table.share(table.n/2, shared); err != nil {
				return err
			}
			begin := time.Now()
			w.Rescan()
			e, err := receive(w.C)
			took := time.Since(begin)
			if err != nil {
				return errors.Join(err, w.Err())
			}
			if len(e.Changed) != 1 || len(e.Mounted)+len(e.Unmounted)+len(e.Moved) > 0 {
				return fmt.Errorf("not one changed row: %v", e)
			}
			s.addTime(took)
			return nil
		}},
		contender{"raw read", func(s *sampler) error {
			begin := time.Now()
			_, err := raw.read(b.ctx)
			s.addTime(time.Since(begin))
			return err
		}})
	if err != nil {
		return err
	}
	b.tell(o, table.n, figure{"", "time", "ms", millisecond, median}, table.goals(map[string]goal{"raw read": maxRatio(1.1)}))
	return nil
}

// receive returns the next element of c, which must come soon.
func receive[T any](c <-chan T) (e T, err error) {
	select {
	case e, ok := <-c:
		if !ok {
			return e, errors.New("the channel was closed")
		}
		return e, nil
	case <-time.After(patience):
		return e, fmt.Errorf("nothing came for %v", patience)
	}
}

// A watching is a watcher and a goroutine that receives from it.
type watching struct {
	seen  chan sighting // closed at the end; what nobody receives is dropped
	close func() error
}

// sighting is an event that was received.
type sighting struct {
	at                 time.Time
	mounted, unmounted int
}

// watchOurs returns when the watcher has read the table.
func watchOurs(ctx context.Context) (*watching, error) {
	w, err := kernstream.WatchMounts(ctx, nil)
	if err != nil {
		return nil, err
	}
	if _, err := receive(w.C); err != nil {
		w.Close()
		return nil, err
	}
	seen := consume(w.C, func(e *kernstream.MountEvent) (mounted, unmounted int) {
		return len(e.Mounted), len(e.Unmounted)
	})
	return &watching{seen, w.Close}, nil
}

func watchPeer(ctx context.Context) (*watching, error) {
	w, err := watchMoby(ctx)
	if err != nil {
		return nil, err
	}
	seen := consume(w.c, func(d mountDelta) (mounted, unmounted int) {
		return len(d.mounted), len(d.unmounted)
	})
	return &watching{seen, w.close}, nil
}

func consume[T any](c <-chan T, count func(T) (mounted, unmounted int)) chan sighting {
	seen := make(chan sighting, 16)
	go func() {
		defer close(seen)
		for e := range c {
			s := sighting{at: time.Now()}
			s.mounted, s.unmounted = count(e)
			select {
			case seen <- s:
			default:
			}
		}
	}()
	return seen
}
