package kernstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What happens when numbers are given to other processes, and when everything
// happens at once. Both run in a process ID namespace of their own, in which
// the next number can be chosen.

// TestProcessRecycledNumber: a process that gets the number of one that was
// watched is another one, by every name.
func TestProcessRecycledNumber(t *testing.T) {
	testenv.NoLeaks(t)
	keeper := newKeeper(t, pidNamespace(t))
	chooseNumbers(keeper)
	// Once with the /proc of the namespace around, which has other numbers.
	if text := keeper.do("recycle"); text != "recycled" {
		t.Error(text)
	}
	keeper.mountProc()
	if text := keeper.do("recycle"); text != "recycled" {
		t.Error(text)
	}
}

// chooseNumbers skips the test where the next number cannot be chosen.
func chooseNumbers(k *keeper) {
	k.t.Helper()
	if text := k.do("choose", "300"); text != "" {
		testenv.Missing(k.t, "needs to choose process IDs", fmt.Errorf("%s: %w", text, fs.ErrPermission))
	}
}

// chooseNext lets the next process of this namespace have the number pid, if
// nobody comes before.
func chooseNext(pid int) error {
	return os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0)
}

// recycled starts a victim with the number pid.
func recycled(pid int, script string) (*victim, error) {
	for range 200 {
		if err := chooseNext(pid); err != nil {
			return nil, err
		}
		v, err := startVictim(script)
		if err != nil {
			return nil, err
		}
		if v.pid() == pid {
			return v, nil
		}
		v.end() // a thread came before
		v.reap()
	}
	return nil, fmt.Errorf("the number %d is not given again", pid)
}

// recycle is TestProcessRecycledNumber in the namespace.
func recycle() (string, error) {
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	if err != nil {
		return "", err
	}
	defer w.Close()
	first, err := startVictim("exit 1")
	if err != nil {
		return "", err
	}
	pid := first.pid()
	held, err := w.Open(kernstream.PID(pid))
	if err != nil {
		return "", err
	}
	id := held.ID()
	waiting, err := held.Watch(nil) // nobody receives its event until the end
	if err != nil {
		return "", err
	}
	first.end()
	if err := exited(pid); err != nil {
		return "", err
	}
	if !reapedStatus() {
		time.Sleep(20 * time.Millisecond) // the library looks before it is reaped
	}
	first.reap()
	second, err := recycled(pid, "exit 2")
	if err != nil {
		return "", err
	}
	defer second.reap()
	defer second.end()

	for _, target := range []kernstream.Target{kernstream.Saved(id), kernstream.OfProcess(first.Process)} {
		if _, err := w.Watch(target, nil); !errors.Is(err, os.ErrProcessDone) {
			return fmt.Sprintf("%v: the error is %v", target, err), nil
		}
	}
	other, err := w.Watch(kernstream.PID(pid), nil)
	if err != nil {
		return "", err
	}
	if other.ID() == id || other.ID().PID != pid || waiting.ID() != id || held.ID() != id {
		return fmt.Sprintf("the IDs are %v of the first, %v of the second", id, other.ID()), nil
	}
	late, err := held.Watch(nil)
	if err != nil {
		return "", err
	}
	for _, watch := range []*kernstream.Watch{waiting, late} {
		if e := <-w.C; e.Watch != watch || e.Process != id || !e.StatusKnown || e.Status.ExitStatus() != 1 {
			return fmt.Sprintf("event %+v; want the exit of the first", e), nil
		}
	}
	select {
	case e := <-w.C:
		return fmt.Sprintf("event %+v; the second runs", e), nil
	case <-time.After(20 * time.Millisecond):
	}
	second.end()
	if e := <-w.C; e.Watch != other || e.Process != other.ID() || !e.StatusKnown || e.Status.ExitStatus() != 2 {
		return fmt.Sprintf("event %+v; want the exit of the second", e), nil
	}
	return "recycled", nil
}

// TestProcessSoak: processes start, end and are reaped, and watches begin, stop
// and begin again, all at random, with numbers that come again, on 1, 2 and 4
// processors. Every watch gets exactly its events, with the status of its
// process, and nothing is left.
func TestProcessSoak(t *testing.T) {
	testenv.NoLeaks(t)
	for _, processors := range []int{1, 2, 4} {
		t.Run(fmt.Sprint("GOMAXPROCS=", processors), func(t *testing.T) {
			keeper := newKeeper(t, pidNamespace(t))
			chooseNumbers(keeper)
			keeper.mountProc()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			text := keeper.do("hammer", fmt.Sprint(processors), fmt.Sprint(testenv.Soak(time.Second)), fmt.Sprint(seed))
			t.Log(text)
		})
	}
}

// A hammer is one run of TestProcessSoak in the namespace.
type hammer struct {
	w      *kernstream.ProcessWatcher
	shared context.Context // of many streams

	mu       sync.Mutex
	ids      map[kernstream.ProcessID]bool // that were seen
	numbers  map[int]bool
	free     []int // numbers of processes that were reaped
	events   map[*kernstream.Watch][]*kernstream.ProcessEvent
	err      error
	recycled int
	watches  int
	stopped  int
}

func runHammer(processors int, duration time.Duration, seed uint64) (string, error) {
	runtime.GOMAXPROCS(processors)
	goroutines, descriptors := runtime.NumGoroutine(), openDescriptors()
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	if err != nil {
		return "", err
	}
	shared, cancel := context.WithCancel(context.Background())
	h := &hammer{
		w: w, shared: shared, ids: map[kernstream.ProcessID]bool{}, numbers: map[int]bool{},
		events: map[*kernstream.Watch][]*kernstream.ProcessEvent{},
	}
	var consumer, workers sync.WaitGroup
	consumer.Go(func() { h.consume(rand.New(rand.NewPCG(seed, 0))) })
	until := time.Now().Add(duration)
	for n := range 4 {
		workers.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(n+1)))
			for h.goesOn(until) {
				if err := h.life(random); err != nil {
					h.fail(err)
				}
			}
		})
	}
	workers.Wait()
	cancel()
	w.Close()
	consumer.Wait()
	if h.recycled == 0 {
		h.fail(errors.New("no number was given again"))
	}
	if err := settled(goroutines, descriptors); err != nil {
		h.fail(err)
	}
	return fmt.Sprintf("%d processes, %d with a number that was given again, %d watches, %d of them stopped", len(h.ids), h.recycled, h.watches, h.stopped), h.err
}

// settled waits until there are as many goroutines and descriptors as before.
func settled(goroutines, descriptors int) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		g, d := runtime.NumGoroutine(), openDescriptors()
		if g <= goroutines && d <= descriptors {
			return nil
		}
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<16)
			stacks = stacks[:runtime.Stack(stacks, true)]
			return fmt.Errorf("%d goroutines of %d, %d descriptors of %d are left: %q", g, goroutines, d, descriptors, bytes.TrimSpace(stacks))
		}
	}
}

func openDescriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

func (h *hammer) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.err = err
	}
}

// goesOn tells whether another process is to be started. A slow machine needs
// longer until a number is given again.
func (h *hammer) goesOn(until time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.recycled == 0 {
		until = until.Add(patience)
	}
	return h.err == nil && time.Now().Before(until)
}

// consume receives the events of the watcher, sometimes slowly.
func (h *hammer) consume(random *rand.Rand) {
	for e := range h.w.C {
		h.mu.Lock()
		h.events[e.Watch] = append(h.events[e.Watch], e)
		h.mu.Unlock()
		if random.IntN(20) == 0 {
			time.Sleep(time.Duration(random.IntN(2000)) * time.Microsecond)
		}
	}
}

// A life is one process with its watches.
type life struct {
	*hammer
	random *rand.Rand
	v      *victim
	id     kernstream.ProcessID
	code   int
	held   *kernstream.Process

	watches []*hammered
	streams []*hammeredStream
}

type hammered struct {
	watch   *kernstream.Watch
	until   kernstream.Phase
	stopped bool
	told    bool // said Stop
}

type hammeredStream struct {
	s      *kernstream.Stream[*kernstream.ProcessEvent]
	until  kernstream.Phase
	cancel func() // may be nil
	closed bool
}

// life starts a process, does things to it at random, and checks what came of
// its watches.
func (h *hammer) life(random *rand.Rand) error {
	l := &life{hammer: h, random: random, code: random.IntN(256)}
	if err := l.start(); err != nil {
		return err
	}
	ended, reaped := false, false
	for steps := 3 + random.IntN(12); steps > 0 || !reaped; steps-- {
		var err error
		switch random.IntN(10) {
		case 0, 1, 2:
			err = l.subscribe(reaped)
		case 3, 4:
			err = l.subscribeStream(reaped)
		case 5:
			l.stopOne()
		case 6:
			l.closeOne()
		case 7:
			time.Sleep(time.Duration(random.IntN(500)) * time.Microsecond)
		case 8:
			ended = true
			l.v.end()
		case 9:
			if ended {
				reaped = true
				if status := l.v.reap(); status.ExitStatus() != l.code {
					err = fmt.Errorf("Wait returned status %v; want %d", status, l.code)
				}
			}
		}
		if err != nil {
			l.v.end()
			l.v.reap()
			return err
		}
	}
	h.mu.Lock()
	h.free = append(h.free, l.v.pid())
	h.mu.Unlock()
	if random.IntN(2) == 0 {
		l.held.Close()
		defer l.held.Close()
	}
	return l.check()
}

func (l *life) start() (err error) {
	script := fmt.Sprint("exit ", l.code)
	l.mu.Lock()
	if n := len(l.free); n > 0 && l.random.IntN(4) > 0 {
		chooseNext(l.free[n-1])
		l.free = l.free[:n-1]
	}
	if l.v, err = startVictim(script); err != nil {
		l.mu.Unlock()
		return err
	}
	if l.numbers[l.v.pid()] {
		l.recycled++
	}
	l.numbers[l.v.pid()] = true
	l.mu.Unlock()
	if l.held, err = l.w.Open(kernstream.OfProcess(l.v.Process)); err != nil {
		return err
	}
	l.id = l.held.ID()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ids[l.id] && reapingTold() {
		return fmt.Errorf("the ID %v was another process's", l.id)
	}
	l.ids[l.id] = true
	return nil
}

// phase returns what a watch is to wait for.
func (l *life) phase() *kernstream.ProcessOptions {
	if reapingTold() && l.random.IntN(2) == 0 {
		return untilReaped
	}
	return &kernstream.ProcessOptions{}
}

// target names the process in a way that works in its state.
func (l *life) target(reaped bool) kernstream.Target {
	if reaped {
		return nil // only the Process is left
	}
	return []kernstream.Target{
		kernstream.PID(l.v.pid()), kernstream.OfProcess(l.v.Process), kernstream.Saved(l.id), nil,
	}[l.random.IntN(4)]
}

func (l *life) subscribe(reaped bool) error {
	options := l.phase()
	one := &hammered{until: options.Until}
	var err error
	if target := l.target(reaped); target != nil {
		one.watch, err = l.w.Watch(target, options)
	} else {
		one.watch, err = l.held.Watch(options)
	}
	if err != nil {
		return err
	}
	if id := one.watch.ID(); id != l.id {
		return fmt.Errorf("the watch is of %v; want %v", id, l.id)
	}
	l.watches = append(l.watches, one)
	return nil
}

func (l *life) subscribeStream(reaped bool) error {
	target := l.target(reaped)
	if target == nil {
		return nil
	}
	options := l.phase()
	one := &hammeredStream{until: options.Until}
	ctx := l.shared
	if l.random.IntN(2) == 0 {
		ctx, one.cancel = context.WithCancel(ctx)
	}
	var err error
	one.s, err = kernstream.WatchProcess(ctx, target, options)
	if err != nil {
		return err
	}
	l.streams = append(l.streams, one)
	return nil
}

func (l *life) stopOne() {
	if len(l.watches) > 0 {
		one := l.watches[l.random.IntN(len(l.watches))]
		one.stopped = true
		one.told = one.watch.Stop()
	}
}

func (l *life) closeOne() {
	if len(l.streams) == 0 {
		return
	}
	one := l.streams[l.random.IntN(len(l.streams))]
	if one.cancel != nil && l.random.IntN(2) == 0 {
		one.cancel()
		return
	}
	one.closed = true
	one.s.Close()
}

// check waits for what is to come, and compares.
func (l *life) check() error {
	l.mu.Lock()
	l.hammer.watches += len(l.watches) + len(l.streams)
	l.mu.Unlock()
	for _, one := range l.streams {
		if err := l.checkStream(one); err != nil {
			return err
		}
	}
	for _, one := range l.watches {
		if err := l.checkWatch(one); err != nil {
			return err
		}
	}
	return nil
}

func (l *life) checkStream(one *hammeredStream) error {
	if one.cancel != nil {
		defer one.cancel()
	}
	timeout := time.After(patience)
	for n := 0; ; n++ {
		select {
		case e, ok := <-one.s.C:
			switch err := one.s.Err(); {
			case ok:
				if err := l.fits(e, n); err != nil {
					return err
				}
				if e.Watch != nil || n > int(one.until) {
					return fmt.Errorf("event %+v, %d of a stream until %v", e, n, one.until)
				}
				continue
			case one.closed && err == nil, err == context.Canceled && one.cancel != nil:
				return nil
			case err != nil || n != int(one.until)+1:
				return fmt.Errorf("the stream ended with %v after %d events until %v", err, n, one.until)
			}
			return nil
		case <-timeout:
			return fmt.Errorf("a stream of %v does not end", l.id)
		}
	}
}

func (l *life) checkWatch(one *hammered) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Microsecond) {
		told := one.stopped && one.told
		l.mu.Lock()
		events := l.events[one.watch]
		l.mu.Unlock()
		if !one.stopped || told {
			if len(events) <= int(one.until) && time.Now().Before(deadline) {
				continue
			}
			if len(events) != int(one.until)+1 {
				return fmt.Errorf("%d events until %v of %v", len(events), one.until, l.id)
			}
		} else if len(events) > int(one.until) {
			return fmt.Errorf("%d events until %v, and Stop said that not all were received", len(events), one.until)
		}
		for n, e := range events {
			if err := l.fits(e, n); err != nil {
				return err
			}
		}
		if one.stopped {
			l.mu.Lock()
			l.hammer.stopped++
			l.mu.Unlock()
		}
		return nil
	}
}

// fits tells whether e can be the event n of a watch of this process.
func (l *life) fits(e *kernstream.ProcessEvent, n int) error {
	switch {
	case e.Process != l.id || e.Phase != kernstream.Phase(n):
		return fmt.Errorf("event %+v, number %d; want one of %v", e, n, l.id)
	case e.StatusKnown && e.Status != syscall.WaitStatus(exit(l.code)):
		return fmt.Errorf("event %+v; want status %d", e, l.code)
	case !e.StatusKnown && reapedStatus():
		return fmt.Errorf("event %+v of a child has no status", e)
	}
	return nil
}

// obeyHammer is the keeper's part of the tests of this file.
func obeyHammer(words []string) (string, error) {
	switch words[0] {
	case "choose":
		pid, _ := strconv.Atoi(words[1])
		if err := chooseNext(pid); err != nil {
			return err.Error(), nil
		}
		return "", nil
	case "recycle":
		return recycle()
	}
	processors, _ := strconv.Atoi(words[1])
	duration, err := time.ParseDuration(words[2])
	if err != nil {
		return "", err
	}
	seed, _ := strconv.ParseUint(words[3], 10, 64)
	return runHammer(processors, duration, seed)
}
