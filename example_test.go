package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
)

// Print each change of the mount table until the program is interrupted.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	w, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{NoInitial: true})
	if err != nil {
		log.Fatal(err)
	}
	for e := range w.C {
		for _, m := range e.Mounted {
			fmt.Println(m.FSType, "mounted on", m.MountPoint)
		}
		for _, m := range e.Unmounted {
			fmt.Println(m.FSType, "unmounted from", m.MountPoint)
		}
	}
	if err := w.Err(); ctx.Err() == nil {
		log.Fatal(err)
	}
}

// Print the requests of a FUSE session, and answer that nothing is there.
func Example_fuse() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: "/mnt"})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	for r, err := range session.Device().All(ctx) {
		if err != nil {
			fmt.Println("ended:", err)
			return
		}
		fmt.Println(r)
		r.ReplyErrno(syscall.ENOSYS)
	}
}

// A snapshot lists the mounts of the calling process.
func ExampleMounts() {
	mounts, err := kernstream.Mounts(&kernstream.MountOptions{
		Filter: func(m *kernstream.Mount) bool { return m.FSType == "proc" && m.MountPoint == "/proc" },
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(mounts[0].FSType)
	// Output: proc
}

// A program that keeps the table applies the lists in their order.
func ExampleMountEvent() {
	table := map[uint32]kernstream.Mount{}
	apply := func(e *kernstream.MountEvent) {
		for _, m := range e.Unmounted {
			delete(table, m.MountInfoID)
		}
		for _, c := range e.Moved {
			table[c.New.MountInfoID] = c.New
		}
		for _, c := range e.Changed {
			table[c.New.MountInfoID] = c.New
		}
		for _, m := range e.Mounted {
			table[m.MountInfoID] = m
		}
	}
	w, err := kernstream.WatchMounts(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	apply(<-w.C) // the initial event has the whole table
	w.Close()
	fmt.Println(len(table) > 0)
	// Output: true
}

// Changes that follow each other within 50 ms become one event.
func ExampleCoalesceFor() {
	w, err := kernstream.WatchMounts(context.Background(), &kernstream.MountOptions{
		Coalesce: kernstream.CoalesceFor(50 * time.Millisecond),
		MaxDelay: 500 * time.Millisecond,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	fmt.Println((<-w.C).Initial)
	// Output: true
}

// What the kernel tells nobody about is found by looking.
func ExampleMountWatcher_Rescan() {
	w, err := kernstream.WatchMounts(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	<-w.C
	w.Rescan() // an event follows if there is a difference
}

func ExampleSplitOptions() {
	fmt.Printf("%q\n", kernstream.SplitOptions(`rw,lowerdir=/a\054b:/c,upperdir=/d`))
	// Output: ["rw" "lowerdir=/a,b:/c" "upperdir=/d"]
}

// A tick is an event of a source that the program makes itself.
type tick struct{ When time.Time }

func (t *tick) Time() time.Time { return t.When }
func (t *tick) String() string  { return "tick" }

// newTicks is a source of n ticks.
func newTicks(ctx context.Context, n int) *kernstream.Stream[*tick] {
	return kernstream.NewStream(ctx, func(ctx context.Context, emit func(*tick) bool) error {
		ticker := time.NewTicker(time.Millisecond)
		defer ticker.Stop()
		for range n {
			select {
			case now := <-ticker.C:
				if !emit(&tick{When: now}) {
					return nil
				}
			case <-ctx.Done():
				return nil
			}
		}
		return nil
	})
}

// A stream can be made of any function that emits events.
func ExampleNewStream() {
	s := newTicks(context.Background(), 3)
	for e := range s.C {
		fmt.Println(e)
	}
	fmt.Println(s.Err())
	// Output:
	// tick
	// tick
	// tick
	// <nil>
}

// A loop over several streams sets the channel of one that has ended to nil.
func ExampleStream() {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	w, err := kernstream.WatchMounts(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	s := newTicks(ctx, 2)
	mounts, ticks := w.C, s.C
	for mounts != nil || ticks != nil {
		select {
		case e, ok := <-mounts:
			if !ok {
				mounts = nil
				continue
			}
			fmt.Println("initial:", e.Initial)
		case e, ok := <-ticks:
			if !ok {
				ticks = nil
				continue
			}
			_ = e
		}
	}
	fmt.Println(w.Err(), s.Err())
	// Output:
	// initial: true
	// context deadline exceeded <nil>
}

// Merge makes one stream of several.
func ExampleMerge() {
	ctx := context.Background()
	all := kernstream.Merge(ctx, newTicks(ctx, 2), newTicks(ctx, 3))
	n := 0
	for e := range all.C {
		if _, ok := e.(*tick); ok {
			n++
		}
	}
	fmt.Println(n, all.Err())
	// Output: 5 <nil>
}

// Wait for a process that need not be a child.
func ExampleWatchProcess() {
	cmd := exec.Command("sh", "-c", "exit 3")
	if err := cmd.Start(); err != nil {
		log.Fatal(err)
	}
	s, err := kernstream.WatchProcess(context.Background(), kernstream.OfProcess(cmd.Process), nil)
	if err != nil {
		log.Fatal(err)
	}
	for e := range s.C {
		fmt.Println(e.Phase, e.Status.ExitStatus())
	}
	fmt.Println(s.Err())
	cmd.Wait() // it is still there to be waited for
	// Output:
	// exited 3
	// <nil>
}

// One channel tells the ends of many processes.
func ExampleProcessWatcher() {
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	for code := range 3 {
		cmd := exec.Command("sh", "-c", fmt.Sprint("exit ", code))
		if _, err := w.Start(cmd, &kernstream.ProcessOptions{Tag: cmd}); err != nil {
			log.Fatal(err)
		}
	}
	sum := 0
	for range 3 {
		e := <-w.C
		sum += e.Status.ExitStatus()
		e.Tag.(*exec.Cmd).Wait()
	}
	fmt.Println(sum)
	// Output: 3
}

// A Process can be watched at any time, also when it is long gone.
func ExampleProcessWatcher_Open() {
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	cmd := exec.Command("sh", "-c", "read line")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		log.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		log.Fatal(err)
	}
	p, err := w.Open(kernstream.OfProcess(cmd.Process))
	if err != nil {
		log.Fatal(err)
	}
	defer p.Close()
	stdin.Close()
	cmd.Wait()
	if _, err := p.Watch(nil); err != nil {
		log.Fatal(err)
	}
	fmt.Println((<-w.C).Process == p.ID())
	// Output: true
}

// A process that was saved is found again, and no other is taken for it.
func ExampleSaved() {
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	watch, err := w.Watch(kernstream.PID(os.Getpid()), nil)
	if err != nil {
		log.Fatal(err)
	}
	text, err := watch.ID().MarshalText() // to a file, say
	if err != nil {
		log.Fatal(err)
	}

	var id kernstream.ProcessID
	if err := id.UnmarshalText(text); err != nil {
		log.Fatal(err)
	}
	_, err = w.Watch(kernstream.Saved(id), nil)
	fmt.Println(err)
	id.ID++ // another process that had this number
	_, err = w.Watch(kernstream.Saved(id), nil)
	fmt.Println(errors.Is(err, os.ErrProcessDone))
	// Output:
	// <nil>
	// true
}

// What happens in a directory, with the path that each file has.
func ExampleWatchFiles() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	w, err := kernstream.WatchFiles(context.Background(), nil, kernstream.Mark{
		Path: dir,
		Ops:  kernstream.OpCreate | kernstream.OpMovedTo,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	os.WriteFile(filepath.Join(dir, "draft"), nil, 0o644)
	os.Rename(filepath.Join(dir, "draft"), filepath.Join(dir, "letter"))
	for range 2 {
		e := <-w.C
		if e.Ops.Has(kernstream.OpOverflow) {
			log.Fatal("events were lost: look at the directory")
		}
		fmt.Println(e.Ops, filepath.Base(e.Path))
	}
	// Output:
	// create draft
	// moved_to letter
}

// Keys are not for anybody.
func ExampleFileEvent_Deny() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	w, err := kernstream.WatchFiles(ctx, &kernstream.FileOptions{Class: kernstream.ClassContent},
		kernstream.Mark{Path: "/srv", Ops: kernstream.OpOpenPerm | kernstream.OpEventOnChild})
	if err != nil {
		log.Fatal(err)
	}
	for e := range w.C {
		if strings.HasSuffix(e.Path, ".key") {
			e.Deny(0)
		} else {
			e.Allow()
		}
		e.Close()
	}
	log.Print(w.Err(), ", answered by default: ", w.Defaulted())
}

// More can be watched while the stream runs.
func ExampleFileWatcher_Mark() {
	w, err := kernstream.WatchFiles(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer w.Close()
	err = w.Mark(kernstream.Mark{Path: "example_test.go", Ops: kernstream.OpOpen})
	if err != nil {
		log.Fatal(err)
	}
	os.ReadFile("example_test.go")
	fmt.Println((<-w.C).Ops)
	// Output: open
}

func ExampleParseFileOp() {
	ops, err := kernstream.ParseFileOp("open,close_write")
	fmt.Println(ops, ops.Has(kernstream.OpOpen), err)
	// Output: close_write|open true <nil>
}
