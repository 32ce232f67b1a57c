package mntns_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/mntns"
	"github.com/kernstream/kernstream/internal/testenv"
)

// A namespace that is made for a function.

// TestPrivate: what is mounted in the new namespace is seen there alone, and by what is started
// from it; the error of the function is returned.
func TestPrivate(t *testing.T) {
	testenv.NeedMounts(t)
	dir, failure := t.TempDir(), errors.New("failure")
	err := mntns.Private(func(int) error {
		if err := unix.Mount(source, dir, "tmpfs", 0, ""); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
			return err
		}
		if out, err := exec.Command("ls", dir).CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != file {
			return fmt.Errorf("a child sees %q, %w", out, err)
		}
		return failure
	})
	if err != failure {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("outside there are %v, %v", entries, err)
	}
}
