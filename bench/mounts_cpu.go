package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// benchWatcherCPU measures the processor time of a watcher and its consumer for
// each event, while another process makes about 250 changes a second. What the
// watcher does on the side, such as rescans, is in it. The peer is what a
// program pays for each event that reads the table again.
func benchWatcherCPU(b *bench, table *mountTable) error {
	actor, err := table.actor(b.ctx, "cpu")
	if err != nil {
		return err
	}
	defer actor.close()
	pairs := b.scale(400, 20) // of 8 ms: time for a few rescans
	o, err := b.interleave(1,
		contender{"kernstream", func(s *sampler) error {
			w, err := watchOurs(b.ctx)
			if err != nil {
				return err
			}
			settle := b.scale(50, 5) // the first rescan looks at more than the others
			if _, err := actor.do(fmt.Sprintf("paced %d", settle)); err != nil {
				return errors.Join(err, w.close())
			}
			if !b.quick {
				time.Sleep(1500 * time.Millisecond)
			}
			for len(w.seen) > 0 {
				<-w.seen
			}
			before, err := cpuTime()
			if err != nil {
				return err
			}
			n := pairs
			if s.warmup {
				n /= 4
			}
			_, err = actor.do(fmt.Sprintf("paced %d", n))
			after, err2 := cpuTime()
			s.add("time", float64((after-before).Nanoseconds())/float64(2*n))
			return errors.Join(err, err2, w.close())
		}},
		contender{"moby/sys re-read", func(s *sampler) error {
			before, err := cpuTime()
			if err != nil {
				return err
			}
			const reads = 4
			for range reads {
				if _, err := mountinfo.GetMounts(nil); err != nil {
					return err
				}
			}
			after, err := cpuTime()
			s.add("time", float64((after-before).Nanoseconds())/reads)
			return err
		}})
	if err != nil {
		return err
	}
	table.compareSizes(b, o)
	goals := table.goals(map[string]goal{smallName: maxRatio(3), "moby/sys re-read": maxRatio(0.01)})
	b.tell(o, table.n, figure{"", "time", "µs/event", microsecond, median}, goals)
	return nil
}

// cpuTime returns the processor time that this process has used.
func cpuTime() (time.Duration, error) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0, os.NewSyscallError("getrusage", err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), nil
}
