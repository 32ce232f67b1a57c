package fuse_test

import (
	"context"
	"errors"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// A program that starts processes meanwhile can unmount what nobody uses: a
// process has all descriptors of its parent for a moment, before it executes its
// program, and one on the mount would make that busy.
func TestUnmountWhileProcessesStart(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	var starters sync.WaitGroup
	defer starters.Wait()
	defer cancel()
	for range 4 {
		starters.Go(func() {
			for ctx.Err() == nil {
				exec.Command("true").Run()
			}
		})
	}
	busy, cycles := 0, testenv.SoakN(200)
	for i := range cycles {
		s, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: dir})
		if err != nil {
			t.Fatal(err)
		}
		err = s.Unmount(t.Context(), 0)
		s.Close()
		switch {
		case errors.Is(err, unix.EBUSY):
			busy++
		case err != nil:
			t.Fatalf("cycle %d: %v", i, err)
		}
	}
	if busy > cycles/10 { // attaching the mount is a moment, too
		t.Errorf("%d of %d mounts were busy", busy, cycles)
	}
}
