package soak

import (
	"fmt"
	"os"
	"runtime"
	"time"
)

// A growth is what there is of all that must not grow, or by how much that did.
type growth struct {
	descriptors int
	goroutines  int
	mounts      int
	queued      int // bytes or things that wait in the kernel
	heap        int // bytes
}

// heapSlack is how much the heap may differ between two moments at which
// nothing happens: what the collector and the runtime keep for later use.
const heapSlack = 16 << 20

func (s *soak) measure() growth {
	g := growth{descriptors: descriptors(), goroutines: runtime.NumGoroutine(), mounts: len(mountTable())}
	for _, p := range s.parts {
		g.queued += p.queued()
	}
	runtime.GC()
	runtime.GC() // what finalizers let go of
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	g.heap = int(memory.HeapAlloc)
	return g
}

// measureAgainst waits until nothing has grown since base, and fails the test if
// that does not come to be.
func (s *soak) measureAgainst(base growth) growth {
	for deadline := time.Now().Add(*patient); ; {
		now := s.measure()
		if !now.since(base).any() {
			return now
		}
		if time.Now().After(deadline) {
			s.t.Errorf("growth: %v; here is\n%s", now.since(base), whatThereIs(1<<20))
			for _, p := range s.parts {
				if p, ok := p.(interface{ elsewhere() string }); ok {
					s.t.Errorf("another process has\n%s", p.elsewhere())
				}
			}
			return now
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (g growth) since(base growth) growth {
	return growth{
		descriptors: g.descriptors - base.descriptors,
		goroutines:  g.goroutines - base.goroutines,
		mounts:      g.mounts - base.mounts,
		queued:      g.queued - base.queued,
		heap:        g.heap - base.heap,
	}
}

func (g growth) any() bool {
	return g.descriptors > 0 || g.goroutines > 0 || g.mounts > 0 || g.queued > 0 || g.heap > heapSlack
}

func (g growth) String() string {
	return fmt.Sprintf("%d descriptors, %d goroutines, %d mounts, %d queued, %d KiB of heap", g.descriptors, g.goroutines, g.mounts, g.queued, g.heap>>10)
}

// whatThereIs lists what is open and running, for a reader, in so many bytes of stacks.
func whatThereIs(most int) string {
	stacks := make([]byte, most)
	stacks = stacks[:runtime.Stack(stacks, true)]
	return fmt.Sprintf("%q\n%s", openFiles(), stacks)
}

func descriptors() int { return len(openFiles()) }

// openFiles lists what is open, without the listing itself.
func openFiles() []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	var files []string
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil {
			files = append(files, entry.Name()+" "+target)
		}
	}
	return files
}
