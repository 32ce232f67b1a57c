package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// Designs of waiting for many processes, each measured in processes of its own:
// what one leaves in the runtime would be a present to the next.

// designVar is set in such a process: to the name of the design.
const designVar = "KERNSTREAM_BENCH_DESIGN"

// A design waits for many processes; end ends all that at once and returns when
// nothing is left.
type design interface {
	watch(pid int) error
	end() error
}

// designs by name. Each gets the number of processes, so that it can keep what
// it needs in memory that is there already.
var designs = map[string]func(n int) (design, error){
	"kernstream":               newWatcherDesign,
	"kernstream, WatchProcess": newStreamsDesign,
	"epoll_ctl alone":          newEpollDesign,
	"goroutine per file":       newFileDesign,
}

// runDesign measures a design in a new process.
func runDesign(ctx context.Context, name string, pids []int) (map[string]float64, error) {
	cmd := command(ctx, designVar+"="+name)
	input, err := json.Marshal(pids)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout = bytes.NewReader(input), &out
	wait, err := start(cmd)
	if err == nil {
		err = wait()
	}
	if err != nil {
		return nil, err
	}
	var figures map[string]float64
	return figures, json.Unmarshal(out.Bytes(), &figures)
}

// designMain is that process.
func designMain(name string) int {
	figures, err := measureDesign(name)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(figures)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %s: %v\n", name, err)
		return 1
	}
	return 0
}

func measureDesign(name string) (map[string]float64, error) {
	var pids []int
	if err := json.NewDecoder(os.Stdin).Decode(&pids); err != nil {
		return nil, err
	}
	open, ok := designs[name]
	if !ok {
		return nil, errNoDesign
	}
	figures := map[string]float64{}
	n := float64(len(pids))
	var warm []float64
	for pass := range 4 {
		d, err := open(len(pids))
		if err != nil {
			return nil, err
		}
		before, goroutines, threads := goMemory(), runtime.NumGoroutine(), countThreads()
		begin := time.Now()
		for _, pid := range pids {
			if err := d.watch(pid); err != nil {
				return nil, err
			}
		}
		setUp := float64(time.Since(begin)) / n
		if pass == 0 {
			figures["fresh"] = setUp
			figures["memory"] = (goMemory() - before) / n
			figures["gc"] = gcTime()
			figures["goroutines"] = float64(runtime.NumGoroutine()-goroutines) / n
			figures["threads"] = float64(countThreads()-threads) / n
		} else {
			warm = append(warm, setUp)
		}
		begin = time.Now()
		if err := d.end(); err != nil {
			return nil, err
		}
		figures["end"] = float64(time.Since(begin))
		runtime.KeepAlive(pids)
	}
	figures["warm"] = median(warm)
	for _, ratio := range []string{"goroutines", "threads"} {
		figures[ratio] = roundedMedian([]float64{figures[ratio]}) // one more for all is none for each
	}
	return figures, nil
}

// goMemory is what the runtime has in use, after a collection: heap, stacks,
// and its own for timers, pollers and spans.
func goMemory() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse + m.MSpanInuse + m.OtherSys)
}

// gcTime is how long a full collection takes.
func gcTime() float64 {
	var times []float64
	for range 5 {
		begin := time.Now()
		runtime.GC()
		times = append(times, float64(time.Since(begin)))
	}
	return median(times)
}

func countThreads() int {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	var n int
	if _, after, ok := strings.Cut(string(text), "Threads:"); ok {
		fmt.Sscan(after, &n)
	}
	return n
}

type watcherDesign struct{ w *kernstream.ProcessWatcher }

func newWatcherDesign(int) (design, error) {
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	return watcherDesign{w}, err
}

func (d watcherDesign) watch(pid int) error {
	_, err := d.w.Watch(kernstream.PID(pid), nil)
	return err
}

func (d watcherDesign) end() error { return d.w.Close() }

// streamsDesign is a stream for each process, under one context.
type streamsDesign struct {
	ctx     context.Context
	cancel  func()
	streams []*kernstream.Stream[*kernstream.ProcessEvent]
}

func newStreamsDesign(n int) (design, error) {
	d := &streamsDesign{streams: make([]*kernstream.Stream[*kernstream.ProcessEvent], 0, n)}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

func (d *streamsDesign) watch(pid int) error {
	s, err := kernstream.WatchProcess(d.ctx, kernstream.PID(pid), nil)
	d.streams = append(d.streams, s)
	return err
}

func (d *streamsDesign) end() error {
	d.cancel()
	for _, s := range d.streams {
		for range s.C {
		}
		if s.Err() != context.Canceled {
			return s.Err()
		}
	}
	d.streams = nil
	return nil
}

// epollDesign is the least that has to be done.
type epollDesign struct {
	epfd int
	fds  []int32
}

func newEpollDesign(n int) (design, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return &epollDesign{epfd, make([]int32, 0, n)}, err
}

func (d *epollDesign) watch(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	d.fds = append(d.fds, int32(fd))
	return unix.EpollCtl(d.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (d *epollDesign) end() error {
	for _, fd := range d.fds {
		unix.Close(int(fd))
	}
	d.fds = nil
	return unix.Close(d.epfd)
}

// fileDesign is an os.File and a goroutine for each process, in the runtime's
// poller.
type fileDesign struct {
	ctx    context.Context
	cancel func()
	all    sync.WaitGroup
}

func newFileDesign(int) (design, error) {
	d := &fileDesign{}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

func (d *fileDesign) watch(pid int) error {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	d.all.Add(1)
	go func() {
		defer d.all.Done()
		defer file.Close()
		defer context.AfterFunc(d.ctx, func() { file.SetReadDeadline(time.Unix(1, 0)) })()
		conn.Read(func(fd uintptr) bool { return pidfdReady(int(fd)) })
	}()
	return nil
}

func (d *fileDesign) end() error {
	d.cancel()
	d.all.Wait()
	return nil
}

func pidfdReady(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n > 0
}
