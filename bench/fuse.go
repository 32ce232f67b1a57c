package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
)

// The group "fuse": what a request costs that a server answers at once. Server
// and client are processes of their own, as everywhere but in benchmarks; this
// process only tells them what to do.

func benchFUSE(b *bench) error {
	for _, threads := range []int{1, 4} {
		name := fmt.Sprintf("lookup %d", threads)
		if err := b.run(name, func() error { return benchLookup(b, threads) }); err != nil {
			return err
		}
	}
	if err := b.run("cancel", func() error { return benchFUSECancel(b) }); err != nil {
		return err
	}
	if err := b.run("umount", func() error { return benchUmount(b) }); err != nil {
		return err
	}
	for _, threads := range []int{1, 4} {
		name := fmt.Sprintf("read %d", threads)
		if err := b.run(name, func() error { return benchRead(b, threads) }); err != nil {
			return err
		}
	}
	return nil
}

// fuseServers are the forms of servers, by name. They end when done is closed.
var fuseServers = map[string]func(dir string, done <-chan struct{}) error{
	"Next":          serveNext,
	"All":           serveAll,
	"Requests":      serveRequests,
	"go-fuse":       serveGoFuse(false),
	"blocking read": serveBlocking,

	"two Requests":          serveTwo(requestsOf),
	"two All":               serveTwo(allOf),
	"contrib/gofuse":        serveGoFuseOn(false),
	"go-fuse, filled":       serveGoFuse(true),
	"contrib/gofuse filled": serveGoFuseOn(true),
}

// benchLookup lets a client look up names that are not there. One thread gets
// one CPU together with the server: otherwise it is luck on which ones they
// run, which makes more of a difference than anything else.
func benchLookup(b *bench, threads int) error {
	cpu := -1
	if threads == 1 {
		cpu = 0
	}
	o, err := benchServers(b, "lookup", cpu, threads, b.scale(30_000, 2_000),
		"Next", "All", "Requests", "two Requests", "contrib/gofuse", "go-fuse", "blocking read")
	if err != nil {
		return err
	}
	for _, form := range []struct {
		name string
		most map[int]float64 // of go-fuse's time, by threads
	}{
		{"Next", map[int]float64{1: 1 / 1.1, 4: 1 / 1.1}},
		{"All", map[int]float64{1: 1 / 1.1, 4: 1 / 1.1}},
		{"Requests", map[int]float64{1: 1, 4: 1 / 0.65}},
		{"two Requests", map[int]float64{1: 1, 4: 1}},
		{"contrib/gofuse", map[int]float64{1: 1 / 0.95, 4: 1 / 0.95}},
	} {
		most := float64(int(form.most[threads]*1000)) / 1000
		var goals map[string]goal
		if !b.quick {
			goals = map[string]goal{"go-fuse": maxRatio(most)}
		}
		b.tell(o.of(form.name, "go-fuse", "blocking read"), threads, figure{form.name, "time", "µs/request", microsecond, median}, goals)
	}
	return nil
}

// benchRead lets a client read a file of 128 KiB past the page cache.
func benchRead(b *bench, threads int) error {
	o, err := benchServers(b, "read", -1, threads, b.scale(8_000, 400),
		"All", "two All", "two Requests", "go-fuse", "contrib/gofuse", "contrib/gofuse filled", "go-fuse, filled")
	if err != nil {
		return err
	}
	for _, form := range []struct {
		name, peer string
		most       map[int]float64 // of the peer's time, by threads
	}{
		{"All", "go-fuse", nil},
		{"two All", "go-fuse", map[int]float64{4: 1 / 1.2}},
		{"two Requests", "go-fuse", nil},
		{"contrib/gofuse", "go-fuse", nil},
		{"contrib/gofuse filled", "go-fuse, filled", map[int]float64{1: 1 / 0.95, 4: 1 / 0.95}},
	} {
		var goals map[string]goal
		if most, ok := form.most[threads]; ok && !b.quick {
			goals = map[string]goal{form.peer: maxRatio(float64(int(most*1000)) / 1000)}
		}
		b.tell(o.of(form.name, form.peer), threads, figure{form.name, "time", "µs/request", microsecond, median}, goals)
	}
	return nil
}

// benchServers measures what a request costs a client of so many threads, by
// each of the servers, which are processes of their own. cpu is where client and
// servers run; negative is anywhere.
func benchServers(b *bench, what string, cpu, threads, requests int, names ...string) (*outcome, error) {
	client, err := startFUSEProcess(b.ctx, "client", cpu, strconv.Itoa(threads))
	if err != nil {
		return nil, err
	}
	defer client.close()
	var contenders []contender
	for i, name := range names {
		dir, remove, err := b.mountPoint(fmt.Sprint(what, threads, i))
		if err != nil {
			return nil, err
		}
		defer remove()
		server, err := startFUSEProcess(b.ctx, "server", cpu, name, dir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		defer server.close()
		contenders = append(contenders, contender{name, func(s *sampler) error {
			took, err := client.do(fmt.Sprintf("%s %d %s", what, requests, dir))
			if err != nil {
				return err
			}
			s.add("time", float64(took)/float64(requests))
			return nil
		}})
	}
	return b.interleave(1, contenders...)
}

// of returns the outcome of some of the contenders, in this order.
func (o *outcome) of(names ...string) *outcome {
	part := &outcome{contenders: names}
	for _, name := range names {
		part.metrics = append(part.metrics, o.metrics[slices.Index(o.contenders, name)])
	}
	return part
}

// mountPoint makes a directory to mount on.
func (b *bench) mountPoint(name string) (dir string, remove func() error, err error) {
	dir = filepath.Join(b.dir, name)
	return dir, func() error { return os.Remove(dir) }, os.Mkdir(dir, 0o755)
}

// benchFUSECancel measures from a cancel to the return of a Next that waits.
func benchFUSECancel(b *bench) error {
	dir, remove, err := b.mountPoint("cancel")
	if err != nil {
		return err
	}
	defer remove()
	session, err := fuse.Mount(b.ctx, &fuse.Config{MountPoint: dir})
	if err != nil {
		return err
	}
	defer session.Close()
	o, err := b.interleave(1, contender{"kernstream", func(s *sampler) error {
		for range b.scale(200, 20) {
			ctx, cancel := context.WithCancel(b.ctx)
			returned := make(chan time.Time, 1)
			go func() {
				session.Device().Next(ctx)
				returned <- time.Now()
			}()
			time.Sleep(time.Millisecond)
			begin := time.Now()
			cancel()
			s.addTime((<-returned).Sub(begin))
		}
		return nil
	}}, contender{"bare goroutine", func(s *sampler) error {
		for range b.scale(200, 20) {
			ctx, cancel := context.WithCancel(b.ctx)
			returned := make(chan time.Time, 1)
			go func() {
				<-ctx.Done()
				returned <- time.Now()
			}()
			time.Sleep(time.Millisecond)
			begin := time.Now()
			cancel()
			s.addTime((<-returned).Sub(begin))
		}
		return nil
	}})
	if err != nil {
		return err
	}
	b.tell(o, 1, figure{"p50", "time", "µs", microsecond, percentile(50)}, nil)
	b.tell(o, 1, figure{"p99", "time", "µs", microsecond, percentile(99)}, map[string]goal{"bare goroutine": maxOurs(1000)})
	return nil
}

// benchUmount measures from the call of umount2(2) to the end of a stream.
func benchUmount(b *bench) error {
	dir, remove, err := b.mountPoint("umount")
	if err != nil {
		return err
	}
	defer remove()
	o, err := b.interleave(1, contender{"kernstream", func(s *sampler) error {
		for range b.scale(60, 5) {
			if err := umountToEnd(b.ctx, dir, s); err != nil {
				return err
			}
		}
		return nil
	}}, contender{"blocking read", func(s *sampler) error {
		for range b.scale(60, 5) {
			if err := umountToError(dir, s); err != nil {
				return err
			}
		}
		return nil
	}})
	if err != nil {
		return err
	}
	b.tell(o, 1, figure{"p50", "time", "µs", microsecond, percentile(50)}, nil)
	b.tell(o, 1, figure{"p99", "time", "µs", microsecond, percentile(99)}, map[string]goal{"blocking read": maxOurs(1000)})
	return nil
}

// umountToError measures how long a thread in read(2) takes to learn of the end.
func umountToError(dir string, s *sampler) error {
	result, ended := make(chan error, 1), make(chan time.Time, 1)
	go func() {
		err := serveBlocking(dir, nil)
		ended <- time.Now()
		result <- err
	}()
	if err := awaitMount(dir, result); err != nil {
		return err
	}
	time.Sleep(time.Millisecond)
	begin := time.Now()
	if err := unmount(dir); err != nil {
		return err
	}
	s.addTime((<-ended).Sub(begin))
	return <-result
}

func umountToEnd(ctx context.Context, dir string, s *sampler) error {
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir})
	if err != nil {
		return err
	}
	defer session.Close()
	requests := session.Device().Requests(ctx)
	ended := make(chan time.Time, 1)
	go func() {
		for r := range requests.C {
			r.Close()
		}
		ended <- time.Now()
	}()
	time.Sleep(time.Millisecond)
	begin := time.Now()
	if err := unmount(dir); err != nil {
		return err
	}
	s.addTime((<-ended).Sub(begin))
	return requests.Err()
}

// fuseVar is set in servers and clients: to what they are, their CPU, and more,
// each on a line.
const fuseVar = "KERNSTREAM_BENCH_FUSE"

// startFUSEProcess starts a server or a client, and waits until it is ready.
func startFUSEProcess(ctx context.Context, what string, cpu int, args ...string) (*actor, error) {
	words := append([]string{what, strconv.Itoa(cpu)}, args...)
	a, err := startHelper(ctx, fuseVar+"="+strings.Join(words, "\n"))
	if err != nil {
		return nil, err
	}
	if _, err := a.do("ready"); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// fuseMain is a server or a client, and returns its exit status.
func fuseMain(words []string) int {
	cpu, err := strconv.Atoi(words[1])
	if err == nil && cpu >= 0 {
		err = pin(cpu)
	}
	if err == nil && words[0] == "server" {
		err = fuseServer(words[2], words[3])
	} else if err == nil {
		err = fuseClient(words[2])
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: FUSE %s: %v\n", words[0], err)
		return 1
	}
	return 0
}

// pin keeps the process on one CPU: its threads, and those that they make.
func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil && err != unix.ESRCH {
			return os.NewSyscallError("sched_setaffinity", err)
		}
	}
	return nil
}

// fuseServer serves in one form until its input ends.
func fuseServer(form, dir string) error {
	done := make(chan struct{})
	result := make(chan error, 1)
	go func() { result <- fuseServers[form](dir, done) }()
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := awaitMount(dir, result); err != nil {
			return err
		}
		fmt.Println(0)
	}
	close(done)
	return <-result
}

// awaitMount waits until another file system is on dir than on its parent.
func awaitMount(dir string, result chan error) error {
	for {
		var inner, outer unix.Stat_t
		if err := errors.Join(unix.Stat(dir, &inner), unix.Stat(filepath.Dir(dir), &outer)); err != nil {
			return err
		}
		if inner.Dev != outer.Dev {
			return nil
		}
		select {
		case err := <-result:
			return fmt.Errorf("the server ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// fuseClient obeys lines "lookup" or "read", how often, and in which directory,
// and answers how many nanoseconds that took.
func fuseClient(threads string) error {
	n, err := strconv.Atoi(threads)
	if err != nil {
		return err
	}
	runtime.GOMAXPROCS(n + 1)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if lines.Text() == "ready" {
			fmt.Println(0)
			continue
		}
		words := strings.SplitN(lines.Text(), " ", 3)
		count, err := strconv.Atoi(words[1])
		if err != nil {
			return err
		}
		do := lookUp
		if words[0] == "read" {
			do = readData
		}
		took, err := do(words[2], count, n)
		if err != nil {
			return err
		}
		fmt.Println(took.Nanoseconds())
	}
	return nil
}

// lookUp looks up names that are not there, by threads of its own.
func lookUp(dir string, lookups, threads int) (time.Duration, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("open", err)
	}
	defer unix.Close(fd)
	var group sync.WaitGroup
	failures := make([]error, threads)
	begin := time.Now()
	for i := range threads {
		group.Go(func() {
			for range lookups / threads {
				if err := rawStat(fd, i); err != unix.ENOENT {
					failures[i] = fmt.Errorf("stat of what is not there: %w", err)
					return
				}
			}
		})
	}
	group.Wait()
	return time.Since(begin), errors.Join(failures...)
}

// fuseDone unmounts when done is closed.
func fuseDone(dir string, done <-chan struct{}) {
	if done == nil {
		return
	}
	go func() {
		<-done
		unix.Unmount(dir, unix.MNT_DETACH)
	}()
}

// serveOurs mounts and serves by serve, until done.
func serveOurs(dir string, done <-chan struct{}, serve func(d *fuse.Device) error) error {
	session, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: dir, MaxWrite: 128 << 10})
	if err != nil {
		return err
	}
	fuseDone(dir, done)
	return errors.Join(serve(session.Device()), session.Close())
}

func serveNext(dir string, done <-chan struct{}) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	return serveOurs(dir, done, func(d *fuse.Device) error {
		for {
			r, err := d.Next(ctx)
			if err == fuse.ErrUnmounted {
				return nil
			}
			if err != nil {
				return err
			}
			answerData(r)
		}
	})
}

func serveAll(dir string, done <-chan struct{}) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	return serveOurs(dir, done, func(d *fuse.Device) error {
		return allOf(ctx, d)
	})
}

func serveRequests(dir string, done <-chan struct{}) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	return serveOurs(dir, done, func(d *fuse.Device) error {
		return requestsOf(ctx, d)
	})
}

// answer answers as every server here does: the root's attributes stay valid,
// and nothing else is there.
func answer(r *fuse.Request) {
	if r.Header.Opcode == fuse.OpGetattr {
		r.Reply(rootAttr)
		return
	}
	if r.Header.Opcode == fuse.OpForget || r.Header.Opcode == fuse.OpBatchForget {
		r.Close()
		return
	}
	r.ReplyErrno(unix.ENOENT)
}
