package main

import (
	"context"
	"errors"
	"fmt"
)

// benchDrag measures how much a watcher slows the one that it watches: another
// process that mounts and unmounts as fast as it can.
func benchDrag(b *bench, table *mountTable) error {
	dir, err := table.spare("drag")
	if err != nil {
		return err
	}
	actor, err := startActor(b.ctx, dir)
	if err != nil {
		return err
	}
	defer actor.close()
	pairs := b.scale(5000, 200)
	watched := func(name string, open func(context.Context) (*watching, error)) contender {
		return contender{name, func(s *sampler) error {
			w, err := open(b.ctx)
			if err != nil {
				return err
			}
			ns, err := actor.do(fmt.Sprintf("pairs %d", pairs))
			s.add("time", float64(ns)/float64(pairs))
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
