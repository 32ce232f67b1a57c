package testenv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// descriptorProfile is the profile in which package poller keeps the stack
// that made each of its descriptors.
const descriptorProfile = "kernstream.descriptors"

// settle is how long what is ending may take to be gone.
const settle = 5 * time.Second

// run runs the tests and then looks for what they left. mounts, when there is
// one, lists the mounts.
func run(m *testing.M, mounts func() []string) int {
	startPoller()
	before := descriptors()
	var mountsBefore []string
	if mounts != nil {
		mountsBefore = mounts()
	}
	status := m.Run()
	if status != 0 {
		return status
	}
	var problems []error
	problems = append(problems, goroutineLeak())
	problems = append(problems, descriptorLeak(before))
	if mounts != nil {
		if after := mounts(); len(after) != len(mountsBefore) {
			problems = append(problems, fmt.Errorf("mounts: %d before the tests, %d after: %q", len(mountsBefore), len(after), after))
		}
	}
	if err := errors.Join(problems...); err != nil {
		fmt.Fprintln(os.Stderr, "testenv: left behind by the tests:", err)
		return 1
	}
	return 0
}

// NoLeaks fails tb when, at its end, there is a goroutine or a descriptor that
// was not there when NoLeaks was called. The test must not run in parallel
// with others.
func NoLeaks(tb testing.TB) {
	tb.Helper()
	startPoller()
	goroutines := goleak.IgnoreCurrent()
	before := descriptors()
	tb.Cleanup(func() {
		if err := goroutineLeak(goroutines); err != nil {
			tb.Error(err)
		}
		if err := descriptorLeak(before); err != nil {
			tb.Error(err)
		}
	})
}

// goroutineLeak finds goroutines that do not end. Some take their time: the close(2)
// of a fanotify group waits for the kernel.
func goroutineLeak(options ...goleak.Option) error {
	for deadline := time.Now().Add(settle); ; {
		err := goleak.Find(options...)
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// startPoller makes the runtime open the descriptors of its own poller, so
// that they do not look like a leak.
func startPoller() {
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	r.Close()
	w.Close()
}

// descriptors maps each open descriptor to what it stands for.
func descriptors() map[string]string {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		panic(err)
	}
	open := make(map[string]string, len(entries))
	for _, entry := range entries {
		// The descriptor of the listing itself is gone by now.
		if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil {
			open[entry.Name()] = target
		}
	}
	return open
}

// descriptorLeak finds descriptors that were not there before, and whether one
// was closed that is nobody's to close: the number 0 may have been taken for one.
func descriptorLeak(before map[string]string) error {
	for fd := range 3 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil && before[strconv.Itoa(fd)] != "" {
			return fmt.Errorf("descriptor %d was closed", fd)
		}
	}
	var left []string
	for deadline := time.Now().Add(settle); ; {
		left = left[:0]
		for fd, target := range descriptors() {
			if before[fd] != target {
				left = append(left, fd+" -> "+target)
			}
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			break
		}
		// A file that nobody refers to any more is closed by the collector.
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	var stacks strings.Builder
	if p := pprof.Lookup(descriptorProfile); p != nil && p.Count() > 0 {
		p.WriteTo(&stacks, 1)
	}
	return fmt.Errorf("descriptors: %s\n%s", strings.Join(left, ", "), stacks.String())
}
