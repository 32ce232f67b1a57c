package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// The group "pids": the ends of processes.

// manyProcesses is how many processes a case with many has.
const manyProcesses = 15_000

// manyWatches is how many watches a process has in a case with many.
const manyWatches = 10_000

func benchPids(b *bench) error {
	h, err := startHerd(b.ctx)
	if err != nil {
		return err
	}
	defer h.close()
	if err := b.run("exit to event", func() error { return benchExitToEvent(b, h) }); err != nil {
		return err
	}
	if err := b.run("exit of a child to event", func() error { return benchChildToEvent(b, h) }); err != nil {
		return err
	}
	if err := b.run("exit of a zombie to event", func() error { return benchZombieToEvent(b, h) }); err != nil {
		return err
	}
	if err := b.run("fan-out", func() error { return benchFanOut(b, h) }); err != nil {
		return err
	}
	if !b.wants("pids/among many") && !b.wants("pids/watches") {
		return nil
	}
	others, err := h.many(b.scale(manyProcesses, 500))
	if err != nil {
		return err
	}
	if err := b.run("among many", func() error { return benchAmongMany(b, h, others) }); err != nil {
		return err
	}
	for _, n := range b.sizes(plotWatched, len(others)) {
		goals := n == len(others)
		if err := b.run("watches", func() error { return benchWatches(b, others[:n], goals) }); err != nil {
			return err
		}
	}
	return nil
}

// processGoals are goals that hold with many processes.
func (b *bench) processGoals(goals map[string]goal) map[string]goal {
	if b.quick {
		return nil
	}
	return goals
}

// A sentry is something that waits for one process at a time: watch begins to
// wait for pid, seen returns when its exit was noticed (see now).
type sentry struct {
	watch func(pid int) error
	seen  func() (int64, error)
	close func() error
}

// How a process is forked and ended for a sentry.
type fate struct {
	fork func() (pid int, err error)
	exit string // the command
	reap func(pid int) error
}

// stranger is the fate of a process that is a child of the herd, and is reaped
// at once.
func (h *herder) stranger() fate {
	return fate{h.fork, "vanish", func(pid int) error { return h.tell("reap", pid) }}
}

// zombie is that of one which stays a zombie until it has been seen.
func (h *herder) zombie() fate {
	return fate{h.fork, "exit", func(pid int) error { return h.tell("reap", pid) }}
}

// ownChild is that of a child of this program, which the sentry may reap.
func (h *herder) ownChild() fate {
	return fate{h.child, "exit", func(pid int) error {
		unix.Wait4(pid, nil, unix.WNOHANG, nil)
		return nil
	}}
}

// exits lets n processes end, one after the other, and measures from just
// before their call of exit_group(2) to being seen.
func (h *herder) exits(s *sampler, n int, f fate, y *sentry) error {
	if s.warmup {
		n = min(n, 5)
	}
	for range n {
		pid, err := f.fork()
		if err != nil {
			return err
		}
		if err := y.watch(pid); err != nil {
			return err
		}
		if err := h.tell(f.exit, pid); err != nil {
			return err
		}
		seen, err := y.seen()
		if err != nil {
			return err
		}
		ended, err := h.stamp(pid)
		if err != nil {
			return err
		}
		s.add("time", float64(seen-ended))
		if err := f.reap(pid); err != nil {
			return err
		}
	}
	return nil
}

// contend makes a contender of a sentry.
func (h *herder) contend(b *bench, name string, n int, f fate, open func(context.Context) (*sentry, error)) contender {
	return contender{name, func(s *sampler) error {
		y, err := open(b.ctx)
		if err != nil {
			return err
		}
		err = h.exits(s, n, f, y)
		return errors.Join(err, y.close())
	}}
}

// perRound is how many exits a round has, for a thousand in a full run.
func (b *bench) perRound() int { return b.scale(int(math.Ceil(1000/float64(b.rounds))), 10) }

func benchExitToEvent(b *bench, h *herder) error {
	n := b.perRound()
	o, err := b.interleave(1,
		h.contend(b, "kernstream", n, h.stranger(), sentryOurs(nil)),
		h.contend(b, "raw epoll", n, h.stranger(), sentryEpoll),
		h.contend(b, "goroutine in poll(2)", n, h.stranger(), sentryPoll),
		h.contend(b, "os.File and goroutine", n, h.stranger(), sentryFile),
		h.contend(b, "kill(pid, 0) every 100 ms", min(n, 5), h.stranger(), sentryKill))
	if err != nil {
		return err
	}
	goals := []map[string]goal{
		{"raw epoll": maxRatio(1.25), "goroutine in poll(2)": maxRatio(1), "kill(pid, 0) every 100 ms": maxRatio(1)},
		{"raw epoll": maxRatio(2)},
	}
	for i, f := range latencies("µs", microsecond) {
		b.tell(o, 1, f, goals[i])
	}
	return nil
}

// benchZombieToEvent is the same for processes whose status is to be had from
// /proc alone.
func benchZombieToEvent(b *bench, h *herder) error {
	n := b.perRound()
	o, err := b.interleave(1,
		h.contend(b, "kernstream", n, h.zombie(), sentryOurs(nil)),
		h.contend(b, "raw epoll", n, h.zombie(), sentryEpoll),
		h.contend(b, "raw epoll, and reads the status", n, h.zombie(), sentryEpollStatus))
	if err != nil {
		return err
	}
	for _, f := range latencies("µs", microsecond) {
		b.tell(o, 1, f, nil)
	}
	return nil
}

func benchChildToEvent(b *bench, h *herder) error {
	n := b.perRound()
	o, err := b.interleave(1,
		h.contend(b, "kernstream", n, h.ownChild(), sentryOurs(nil)),
		h.contend(b, "raw epoll", n, h.ownChild(), sentryEpoll),
		h.contend(b, "os.Process.Wait", n, h.ownChild(), sentryWait),
		h.contend(b, "mdlayher/socket waitid", n, h.ownChild(), sentrySocket))
	if err != nil {
		return err
	}
	goals := []map[string]goal{
		{"raw epoll": maxRatio(1.25), "os.Process.Wait": maxRatio(1), "mdlayher/socket waitid": maxRatio(1)},
		{"raw epoll": maxRatio(2)},
	}
	for i, f := range latencies("µs", microsecond) {
		b.tell(o, 1, f, goals[i])
	}
	return nil
}

// benchAmongMany measures the exit of one process while many others are watched
// and none is.
func benchAmongMany(b *bench, h *herder, others []int) error {
	n := b.perRound()
	o, err := b.interleave(1,
		h.contend(b, "kernstream", n, h.stranger(), sentryOurs(others)),
		h.contend(b, "without the others", n, h.stranger(), sentryOurs(nil)))
	if err != nil {
		return err
	}
	f := latencies("µs", microsecond)
	b.tell(o, len(others), f[0], b.processGoals(map[string]goal{"without the others": maxRatio(1.15)}))
	b.tell(o, len(others), f[1], nil)
	return nil
}

// sentryOurs is a ProcessWatcher that watches others, too.
func sentryOurs(others []int) func(context.Context) (*sentry, error) {
	return func(ctx context.Context) (*sentry, error) {
		w, err := kernstream.NewProcessWatcher(ctx, nil)
		if err != nil {
			return nil, err
		}
		watch := func(pid int) error {
			_, err := w.Watch(kernstream.PID(pid), nil)
			return err
		}
		for _, pid := range others {
			if err := watch(pid); err != nil {
				w.Close()
				return nil, err
			}
		}
		return &sentry{watch, func() (int64, error) {
			_, err := receive(w.C)
			return now(), err
		}, w.Close}, nil
	}
}

// benchFanOut lets a process end that has many watches, and measures from the
// first event received to the last, by one receiver.
func benchFanOut(b *bench, h *herder) error {
	n := b.scale(manyWatches, 500)
	o, err := b.interleave(2,
		contender{"kernstream", func(s *sampler) error { return fanOutStreams(b, h, n, s) }},
		contender{"kernstream, one C", func(s *sampler) error { return fanOutWatcher(b, h, n, s) }},
		contender{"bare channels", func(s *sampler) error { return fanOutBare(n, s) }})
	if err != nil {
		return err
	}
	goals := map[string]goal{"bare channels": maxOurs(1)}
	b.tell(o, n, figure{"", "time", "ms", millisecond, median}, b.processGoals(goals))
	return nil
}

func fanOutStreams(b *bench, h *herder, n int, s *sampler) error {
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	pid, err := h.fork()
	if err != nil {
		return err
	}
	streams := make([]*kernstream.Stream[*kernstream.ProcessEvent], n)
	for i := range streams {
		if streams[i], err = kernstream.WatchProcess(ctx, kernstream.PID(pid), nil); err != nil {
			return err
		}
	}
	if err := h.tell("exit", pid); err != nil {
		return err
	}
	var begin time.Time
	for i, stream := range streams {
		if _, ok := <-stream.C; !ok {
			return errors.New("the channel was closed")
		}
		if i == 0 {
			begin = time.Now()
		}
	}
	s.addTime(time.Since(begin))
	return h.tell("reap", pid)
}

func fanOutWatcher(b *bench, h *herder, n int, s *sampler) error {
	pid, err := h.fork()
	if err != nil {
		return err
	}
	w, err := kernstream.NewProcessWatcher(b.ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	for range n {
		if _, err := w.Watch(kernstream.PID(pid), nil); err != nil {
			return err
		}
	}
	if err := h.tell("exit", pid); err != nil {
		return err
	}
	var begin time.Time
	for i := range n {
		if _, ok := <-w.C; !ok {
			return errors.New("the channel was closed")
		}
		if i == 0 {
			begin = time.Now()
		}
	}
	s.addTime(time.Since(begin))
	return h.tell("reap", pid)
}

// fanOutBare sends one element into each of n channels that have room.
func fanOutBare(n int, s *sampler) error {
	channels := make([]chan *tick, n)
	for i := range channels {
		channels[i] = make(chan *tick, 1)
	}
	go func() {
		time.Sleep(herdPause)
		for _, c := range channels {
			c <- &tick{When: time.Now()}
			close(c)
		}
	}()
	var begin time.Time
	for i, c := range channels {
		<-c
		if i == 0 {
			begin = time.Now()
		}
	}
	s.addTime(time.Since(begin))
	return nil
}

// benchWatches measures what many pending watches cost, each design in
// processes of its own. The goals are for all of them.
func benchWatches(b *bench, pids []int, goals bool) error {
	n := len(pids)
	run := func(name string) contender {
		return contender{name, func(s *sampler) error {
			figures, err := runDesign(b.ctx, name, pids)
			for metric, value := range figures {
				s.add(metric, value)
			}
			return err
		}}
	}
	const watcher, streams = "kernstream", "kernstream, WatchProcess"
	o, err := b.interleave(1, run(watcher), run(streams), run("epoll_ctl alone"), run("goroutine per file"))
	if err != nil {
		return err
	}
	for _, f := range []struct {
		figure
		goals map[string]goal
	}{
		{figure{"memory", "memory", "bytes", 1, median}, map[string]goal{"": maxOurs(307)}},
		{figure{"goroutines", "goroutines", "goroutines", 1, median}, map[string]goal{"": maxOurs(0)}},
		{figure{"threads", "threads", "threads", 1, median}, nil},
		{figure{"set-up, warm", "warm", "µs", microsecond, median}, map[string]goal{"epoll_ctl alone": maxRatio(1.5)}},
		{figure{"set-up, fresh", "fresh", "µs", microsecond, median}, nil},
		{figure{"full GC", "gc", "ms", millisecond, median}, map[string]goal{"goroutine per file": maxRatio(1. / 6)}},
		{figure{"end of all", "end", "ms", millisecond, median}, map[string]goal{"": maxOurs(50)}},
	} {
		if !goals {
			f.goals = nil
		}
		b.tellBoth(o, n, f.figure, f.goals)
	}
	return nil
}

// tellBoth tells the figure of the watcher, and as another figure that of the
// streams, each beside the peers.
func (b *bench) tellBoth(o *outcome, n int, f figure, goals map[string]goal) {
	goals = b.processGoals(goals)
	if own, ok := goals[""]; ok {
		for _, peer := range o.contenders[2:] {
			goals[peer] = own
		}
	}
	watcher := &outcome{contenders: []string{o.contenders[0]}, metrics: []map[string][]float64{o.metrics[0]}}
	streams := &outcome{contenders: []string{o.contenders[1]}, metrics: []map[string][]float64{o.metrics[1]}}
	for i := 2; i < len(o.contenders); i++ {
		for _, each := range []*outcome{watcher, streams} {
			each.contenders = append(each.contenders, o.contenders[i])
			each.metrics = append(each.metrics, o.metrics[i])
		}
	}
	b.tell(watcher, n, f, goals)
	f.name += ", WatchProcess"
	if f.metric == "memory" && goals != nil {
		for peer := range goals {
			goals[peer] = maxOurs(512)
		}
	}
	b.tell(streams, n, f, goals)
}

var errNoDesign = fmt.Errorf("there is no such design")
