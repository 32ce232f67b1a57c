package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// largeTable is the size of the table that most figures are for.
const largeTable = 10_000

// A mountTable is the mounts that cases measure with: each a tmpfs, below a
// tmpfs of their own.
type mountTable struct {
	dir   string
	n     int
	small map[string]map[string][]float64 // what cases measured of kernstream with the smallest table
}

// smallTable is the size that shows what does not depend on the size.
const smallTable = 100

const smallName = "at 100 mounts"

// compareSizes adds to the outcome of the current case what it was with the
// smallest table.
func (t *mountTable) compareSizes(b *bench, o *outcome) {
	if t.n <= smallTable {
		t.small[b.name] = o.metrics[0]
	} else if small, ok := t.small[b.name]; ok {
		o.contenders = append(o.contenders, smallName)
		o.metrics = append(o.metrics, small)
	}
}

func newMountTable(dir string) (*mountTable, error) {
	if err := unix.Mount("bench", dir, "tmpfs", 0, "mode=0755"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	return &mountTable{dir: dir, small: make(map[string]map[string][]float64)}, nil
}

// grow makes the table n mounts large.
func (t *mountTable) grow(n int) error {
	for ; t.n < n; t.n++ {
		dir := t.row(t.n)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := mountTmpfs(dir); err != nil {
			return fmt.Errorf("mount %d of %d: %w", t.n+1, n, err)
		}
	}
	return nil
}

// row returns the mount point of the i-th mount.
func (t *mountTable) row(i int) string { return filepath.Join(t.dir, fmt.Sprintf("m%05d", i)) }

// spare returns a directory that nothing is mounted on.
func (t *mountTable) spare(name string) (string, error) {
	dir := filepath.Join(t.dir, name)
	return dir, os.MkdirAll(dir, 0o755)
}

// actor starts an actor in a spare directory.
func (t *mountTable) actor(ctx context.Context, name string) (*actor, error) {
	dir, err := t.spare(name)
	if err != nil {
		return nil, err
	}
	return startActor(ctx, dir)
}

// share makes a mount shared or private, of which the kernel tells nobody.
func (t *mountTable) share(i int, shared bool) error {
	flags := uintptr(unix.MS_PRIVATE)
	if shared {
		flags = unix.MS_SHARED
	}
	return os.NewSyscallError("mount", unix.Mount("", t.row(i), "", flags, ""))
}

// goals returns goals if the table is the one that they are for.
func (t *mountTable) goals(goals map[string]goal) map[string]goal {
	if t.n < largeTable {
		return nil
	}
	return goals
}

func (t *mountTable) close() error {
	return os.NewSyscallError("umount2", unix.Unmount(t.dir, unix.MNT_DETACH))
}
