package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// The group "perm": permission events. One process opens files of a tmpfs, and
// for each file another process judges: it allows.

// judges are the forms of that, by name. Each returns when it is ready, and goes
// on until its process ends.
var judges = map[string]func(path string) error{
	"kernstream":                 judgeConsumer,
	"inside":                     judgeInside,
	"raw loop":                   judgeRaw,
	"readlink, channel, poll(2)": judgePolled,
	"nobody is asked":            func(string) error { return nil },
}

func benchPerm(b *bench) error {
	if os.Geteuid() != 0 {
		fmt.Fprintln(b.progress, "perm: needs root, left out")
		return nil
	}
	if err := mountTree(b.dir); err != nil {
		return err
	}
	defer unix.Unmount(b.dir, unix.MNT_DETACH)
	if err := b.run("round trip", func() error { return benchRoundTrip(b) }); err != nil {
		return err
	}
	for _, threads := range []int{1, 8, 64} {
		if err := b.run(fmt.Sprint("openers ", threads), func() error { return benchOpeners(b, threads) }); err != nil {
			return err
		}
	}
	return nil
}

// benchRoundTrip measures what an open(2) takes that is judged, with opener and
// judge on one CPU: otherwise it is luck on which ones they run, which makes
// more of a difference than anything else.
func benchRoundTrip(b *bench) error {
	opener, err := startPermProcess(b.ctx, "opener", 0, "")
	if err != nil {
		return err
	}
	defer opener.close()
	n := b.scale(5_000, 300)
	o, err := judgeAll(b, 0, []string{"kernstream", "inside", "raw loop", "readlink, channel, poll(2)", "nobody is asked"},
		func(path string) (float64, error) {
			ns, err := opener.do(fmt.Sprintf("trips %d %s", n, path))
			return float64(ns), err
		})
	if err != nil {
		return err
	}
	var whole, inner map[string]goal
	if !b.quick {
		whole = map[string]goal{"raw loop": maxRatio(1.8)}
		inner = map[string]goal{"raw loop": maxRatio(1.4)}
	}
	f := figure{"", "time", "µs", microsecond, median}
	b.tell(o.of("kernstream", "raw loop", "readlink, channel, poll(2)", "nobody is asked"), n, f, whole)
	f.name = "inside"
	b.tell(o.of("inside", "raw loop"), n, f, inner)
	return nil
}

// benchOpeners measures how fast threads that open one after the other get on,
// on whatever CPUs.
func benchOpeners(b *bench, threads int) error {
	opener, err := startPermProcess(b.ctx, "opener", -1, "")
	if err != nil {
		return err
	}
	defer opener.close()
	n := b.scale(20_000, 1_000)
	o, err := judgeAll(b, -1, []string{"kernstream", "raw loop", "readlink, channel, poll(2)"},
		func(path string) (float64, error) {
			ns, err := opener.do(fmt.Sprintf("opens %d %d %s", threads, n, path))
			return float64(ns) / float64(n), err
		})
	if err != nil {
		return err
	}
	var goals map[string]goal
	if !b.quick {
		goals = map[string]goal{"raw loop": maxRatio(1.428)} // 0.7 times as many
	}
	b.tell(o, threads, figure{"", "time", "µs/open", microsecond, median}, goals)
	return nil
}

// judgeAll lets the judges take turns, each with a file of its own.
func judgeAll(b *bench, cpu int, names []string, measure func(path string) (float64, error)) (*outcome, error) {
	var contenders []contender
	for i, name := range names {
		path := filepath.Join(b.dir, fmt.Sprint("guarded", i))
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			return nil, err
		}
		judge, err := startPermProcess(b.ctx, name, cpu, path)
		if err != nil {
			return nil, err
		}
		defer judge.close()
		if name == "inside" {
			if err := holdOne(b.ctx, judge, path); err != nil {
				return nil, err
			}
		}
		contenders = append(contenders, contender{name, func(s *sampler) error {
			value, err := measure(path)
			s.add("time", value)
			return err
		}})
	}
	return b.interleave(1, contenders...)
}

// holdOne lets the judge hold an event, which it never answers. Who asked does not
// wait for that: each answer would wake him.
func holdOne(ctx context.Context, judge *actor, path string) error {
	asker, err := startPermProcess(ctx, "opener", -1, "")
	if err != nil {
		return err
	}
	defer asker.close()
	if _, err := fmt.Fprintln(asker.in, "trips 1", path); err != nil {
		return err
	}
	_, err = judge.do("holding")
	return err
}

// permVar is set in openers and judges: to what they are, their CPU and the
// file, each on a line.
const permVar = "KERNSTREAM_BENCH_PERM"

// startPermProcess starts an opener or a judge, and waits until it is ready.
func startPermProcess(ctx context.Context, what string, cpu int, path string) (*actor, error) {
	a, err := startHelper(ctx, permVar+"="+strings.Join([]string{what, strconv.Itoa(cpu), path}, "\n"))
	if err != nil {
		return nil, err
	}
	if _, err := a.do("ready"); err != nil {
		a.close()
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return a, nil
}

// permMain is an opener or a judge, and returns its exit status.
func permMain(words []string) int {
	cpu, err := strconv.Atoi(words[1])
	if err == nil && cpu >= 0 {
		err = pin(cpu)
	}
	if judge, ok := judges[words[0]]; ok && err == nil {
		err = judge(words[2])
	}
	for lines := bufio.NewScanner(os.Stdin); err == nil && lines.Scan(); {
		var answer int64
		if answer, err = permObey(strings.Fields(lines.Text())); err == nil {
			fmt.Println(answer)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %s: %v\n", words[0], err)
		return 1
	}
	return 0
}

// holding is closed when an event is held.
var holding = make(chan struct{})

func permObey(words []string) (int64, error) {
	numbers := make([]int, len(words))
	for i, word := range words {
		numbers[i], _ = strconv.Atoi(word)
	}
	switch words[0] {
	case "ready":
		return 0, nil
	case "holding":
		<-holding
		return 0, nil
	case "trips": // N PATH
		return medianOpen(numbers[1], words[2])
	case "opens": // THREADS N PATH
		return manyOpens(numbers[1], numbers[2], words[3])
	}
	return 0, fmt.Errorf("unknown command %q", words)
}

func openOnce(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	return unix.Close(fd)
}

// medianOpen opens a file n times, and returns the median of what that took.
func medianOpen(n int, path string) (int64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	times := make([]float64, n)
	for i := range times {
		begin := time.Now()
		if err := openOnce(path); err != nil {
			return 0, err
		}
		times[i] = float64(time.Since(begin).Nanoseconds())
	}
	return int64(median(times)), nil
}

// manyOpens opens a file n times in all, and returns how long that took. All
// threads ask at the same time: with fewer processors than threads, the runtime
// would let most of them wait for one, and two or three wait for the judge.
func manyOpens(threads, n int, path string) (int64, error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(threads + 1))
	var left atomic.Int64
	left.Store(int64(n))
	failures := make([]error, threads)
	var openers sync.WaitGroup
	begin := time.Now()
	for i := range threads {
		openers.Go(func() {
			runtime.LockOSThread()
			for failures[i] == nil && left.Add(-1) >= 0 {
				failures[i] = openOnce(path)
			}
		})
	}
	openers.Wait()
	return time.Since(begin).Nanoseconds(), errors.Join(failures...)
}

func watchGuarded(path string, options *kernstream.FileOptions) (*kernstream.FileWatcher, error) {
	options.Class = kernstream.ClassContent
	return kernstream.WatchFiles(context.Background(), options, kernstream.Mark{Path: path, Ops: kernstream.OpOpenPerm})
}

// judgeConsumer allows what comes on C.
func judgeConsumer(path string) error {
	w, err := watchGuarded(path, &kernstream.FileOptions{})
	if err != nil {
		return err
	}
	go func() {
		for e := range w.C {
			if err := errors.Join(e.Allow(), e.Close()); err != nil {
				fmt.Fprintln(os.Stderr, "bench:", err)
			}
		}
	}()
	return nil
}

// judgeInside lets the library answer: as many events are held as may be, one,
// so all others get the default answer.
func judgeInside(path string) error {
	w, err := watchGuarded(path, &kernstream.FileOptions{
		MaxPending: 1, Deadline: kernstream.NoDeadline, Default: kernstream.Response{Allow: true},
	})
	if err != nil {
		return err
	}
	go func() {
		<-w.C
		close(holding)
	}()
	return nil
}
