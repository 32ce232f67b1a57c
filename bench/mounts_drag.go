package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
)

// benchDrag measures how much a watcher slows the one that it watches: another
// process that mounts and unmounts as fast as it can.
func benchDrag(b *bench, table *mountTable) error {
	actor, err := table.actor(b.ctx, "drag")
	if err != nil {
		return err
	}
	defer actor.close()
	pairs := b.scale(20000, 200)
	watched := func(name string, open func(context.Context) (*watching, error)) contender {
		return contender{name, func(s *sampler) error {
			w, err := open(b.ctx)
			if err != nil {
				return err
			}
			// What the start of a watcher leaves to the collector is not its drag.
			runtime.GC()
			n := pairs
			if s.warmup || strings.HasPrefix(name, "moby") {
				n /= 10
			}
			ns, err := actor.do(fmt.Sprintf("pairs %d", n))
			s.add("time", float64(ns)/float64(n))
			return errors.Join(err, w.close())
		}}
	}
	nobody := func(context.Context) (*watching, error) {
		return &watching{close: func() error { return nil }}, nil
	}
	o, err := b.interleave(1,
		watched("kernstream", watchOurs),
		watched("no watcher", nobody),
		watched("moby/sys re-read", watchPeer))
	if err != nil {
		return err
	}
	goals := table.goals(map[string]goal{"no watcher": maxRatio(1.15)})
	b.tell(o, table.n, figure{"", "time", "µs/pair", microsecond, median}, goals)
	return nil
}
