package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestMountSoak: tens of thousands of operations on mounts, of every kind, with
// watchers by either way that start and stop at random. At each quiet point the
// table that each watcher's events told is the kernel's, so all tell the same
// story, and at the end no goroutine, descriptor or mount is left.
func TestMountSoak(t *testing.T) {
	testenv.NoLeaks(t)
	dir := labDir(t)
	const (
		watchers   = 4
		rounds     = 40
		operations = 1250 // in each round
	)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var all sync.WaitGroup
	defer all.Wait()
	points := make([]chan chan<- error, watchers)
	for n := range points {
		points[n] = make(chan chan<- error)
		random := rand.New(rand.NewPCG(seed, uint64(n)))
		via := kernstream.ViaAuto // fanotify where that works
		if n%2 == 0 {
			via = kernstream.ViaMountinfo
		}
		all.Go(func() { soakWatchers(random, via, points[n]) })
	}
	operator := newOperator(t, dir, rand.New(rand.NewPCG(seed, watchers)))
	for range testenv.SoakN(rounds) {
		for range operations {
			operator.operate()
		}
		for n, point := range points {
			result := make(chan error)
			point <- result
			if err := <-result; err != nil {
				t.Errorf("watcher %d: %v", n, err)
			}
		}
		if t.Failed() {
			break
		}
	}
	for _, point := range points {
		close(point)
	}
	t.Logf("operations that worked: %v", operator.worked)
	for _, kind := range operatorKinds {
		if kind == "beneath" && !testenv.KernelAtLeast(6, 5) || kind == "setattr" && !testenv.KernelAtLeast(5, 12) {
			continue
		}
		if operator.worked[kind] == 0 && !t.Failed() {
			t.Errorf("%s never worked", kind)
		}
	}
}

// soakWatchers runs one watcher after the other. Each request on points is a
// quiet point: the answer is whether the table that the events told is the
// kernel's.
func soakWatchers(random *rand.Rand, via kernstream.MountVia, points <-chan chan<- error) {
	for open := true; open; {
		options := &kernstream.MountOptions{Via: via}
		if random.IntN(3) == 0 {
			options.Coalesce = kernstream.CoalesceFor(time.Duration(random.IntN(2000)) * time.Microsecond)
			options.MaxDelay = 5 * time.Millisecond
		}
		w, err := kernstream.WatchMounts(context.Background(), options)
		table := map[uint32]kernstream.Mount{}
		for life := time.After(time.Duration(random.IntN(300)) * time.Millisecond); life != nil; {
			var events <-chan *kernstream.MountEvent
			if err == nil {
				events = w.C
			}
			select {
			case e := <-events:
				if err = applyMounts(table, e); err != nil {
					err = fmt.Errorf("%v: %w", e, err)
				}
				if random.IntN(10) == 0 {
					time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond)
				}
			case result, ok := <-points:
				if open = ok; !ok {
					life = nil
					break
				}
				if err == nil {
					err = converge(w, table)
				}
				result <- err
			case <-life:
				life = nil
			}
		}
		if w != nil {
			w.Close()
		}
	}
}

// converge receives what is left to tell until the table is the kernel's.
func converge(w *kernstream.MountWatcher, table map[uint32]kernstream.Mount) error {
	w.Rescan() // some changes wake nobody
	deadline := time.After(patience)
	for {
		select {
		case e, ok := <-w.C:
			if !ok {
				return fmt.Errorf("the stream ended: %w", w.Err())
			}
			if err := applyMounts(table, e); err != nil {
				return fmt.Errorf("%v: %w", e, err)
			}
		case <-time.After(5 * time.Millisecond):
			if compareTable(table, nil) == nil {
				return nil
			}
		case <-deadline:
			return errors.Join(errors.New("the table does not become the kernel's"), compareTable(table, nil))
		}
	}
}

// An operator does random things to the mounts below a directory.
type operator struct {
	t      testing.TB
	random *rand.Rand
	dir    string
	places []string
	count  int
	worked map[string]int
}

var operatorKinds = []string{"mount", "umount", "lazy umount", "remount", "superblock remount", "bind", "move", "beneath", "propagation", "setattr"}

func newOperator(t testing.TB, dir string, random *rand.Rand) *operator {
	o := &operator{t: t, random: random, dir: dir, worked: map[string]int{}}
	for i := range 12 {
		o.places = append(o.places, filepath.Join(dir, fmt.Sprint("p", i)), filepath.Join(dir, fmt.Sprint("p", i), "sub"))
	}
	o.clear()
	return o
}

// clear unmounts everything, and makes the places anew. Propagation would let
// the table grow for ever.
func (o *operator) clear() {
	for _, place := range o.places {
		for unix.Unmount(place, unix.MNT_DETACH) == nil {
		}
	}
	for _, place := range o.places {
		if err := unix.Mkdir(place, 0o755); err != nil && err != unix.EEXIST {
			o.t.Fatal(err)
		}
	}
}

// operate does one thing; many fail, as they may.
func (o *operator) operate() {
	if o.count++; o.count%100 == 0 {
		o.clear()
	}
	place := func() string { return o.places[o.random.IntN(len(o.places))] }
	kind := operatorKinds[o.random.IntN(len(operatorKinds))]
	var err error
	switch a, b := place(), place(); kind {
	case "mount":
		if err = unix.Mount("soak", a, "tmpfs", 0, ""); err == nil {
			unix.Mkdir(filepath.Join(a, "sub"), 0o755)
		}
	case "umount":
		err = unix.Unmount(a, 0)
	case "lazy umount":
		err = unix.Unmount(a, unix.MNT_DETACH)
	case "remount":
		flags := []uintptr{0, unix.MS_RDONLY, unix.MS_NOSUID, unix.MS_NOEXEC}[o.random.IntN(4)]
		err = unix.Mount("", a, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
	case "superblock remount":
		err = unix.Mount("", a, "", unix.MS_REMOUNT, fmt.Sprintf("size=%dk", 64*(1+o.random.IntN(8))))
	case "bind":
		err = unix.Mount(a, b, "", unix.MS_BIND|uintptr(o.random.IntN(2))*unix.MS_REC, "")
	case "move":
		err = unix.Mount(a, b, "", unix.MS_MOVE, "")
	case "beneath":
		const moveMountBeneath = 0x200
		var tree int
		if tree, err = unix.OpenTree(unix.AT_FDCWD, a, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC); err == nil {
			err = unix.MoveMount(tree, "", unix.AT_FDCWD, b, unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath)
			unix.Close(tree)
		}
	case "propagation":
		kinds := []uintptr{unix.MS_SHARED, unix.MS_PRIVATE, unix.MS_SLAVE, unix.MS_UNBINDABLE}
		err = unix.Mount("", a, "", kinds[o.random.IntN(len(kinds))], "")
	case "setattr":
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV}
		if o.random.IntN(2) == 0 {
			attr = &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_NODEV}
		}
		err = unix.MountSetattr(unix.AT_FDCWD, a, uint(o.random.IntN(2))*unix.AT_RECURSIVE, attr)
	}
	if err == nil {
		o.worked[kind]++
	}
}
