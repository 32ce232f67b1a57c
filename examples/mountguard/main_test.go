package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() { testenv.RegisterMain("mountguard", main) }

// volumes makes a tmpfs with two sources and two targets.
func volumes(t *testing.T) (sources, targets []string) {
	dir := testenv.MountDir(t)
	for _, name := range []string{"a", "b"} {
		source, target := testenv.Mkdir(t, dir, "source", name), testenv.Mkdir(t, dir, "target", name)
		testenv.Touch(t, source, "file of "+name)
		sources, targets = append(sources, source), append(targets, target)
	}
	return sources, targets
}

func exists(dir, file string) bool {
	_, err := os.Stat(filepath.Join(dir, file))
	return err == nil
}

// What is unmounted is mounted again, however often, and of the others nothing
// is said.
func TestMountsAgain(t *testing.T) {
	sources, targets := volumes(t)
	r := testenv.StartProgram(t, "mountguard", sources[0], targets[0], sources[1], targets[1])
	r.Says(targets[0] + ": mounted")
	r.Says(targets[1] + ": mounted")
	if !exists(targets[0], "file of a") || !exists(targets[1], "file of b") {
		t.Error("the targets do not show the sources")
	}
	for range 5 {
		testenv.Unmount(t, targets[1])
		r.Says(targets[1] + ": mounted")
		if !exists(targets[1], "file of b") {
			t.Error("the target does not show the source any more")
		}
	}
	r.Interrupt()
	if !exists(targets[0], "file of a") || !exists(targets[1], "file of b") {
		t.Error("the mounts are gone with the guard")
	}
}

// A mount that turns read-only, and one that is covered, is said, and so is that
// it is well again.
func TestSaysWhatIsWrong(t *testing.T) {
	sources, targets := volumes(t)
	r := testenv.StartProgram(t, "mountguard", sources[0], targets[0])
	r.Says(targets[0] + ": mounted")
	remount := func(flags uintptr) {
		testenv.Mount(t, "", targets[0], "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
	}
	remount(unix.MS_RDONLY)
	r.Says(targets[0] + ": read-only")
	remount(0)
	r.Says(targets[0] + ": mounted")
	testenv.Mount(t, "on top", targets[0], "tmpfs", 0, "")
	r.Says(targets[0] + ": covered by tmpfs")
	testenv.Unmount(t, targets[0])
	r.Says(targets[0] + ": mounted")
	r.Interrupt()
}

// A guard that is started again takes over what is mounted.
func TestTakesOver(t *testing.T) {
	sources, targets := volumes(t)
	for range 2 {
		r := testenv.StartProgram(t, "mountguard", sources[0], targets[0])
		r.Says(targets[0] + ": mounted")
		r.Interrupt()
	}
	testenv.Unmount(t, targets[0])
	if exists(targets[0], "file of a") {
		t.Error("it was mounted twice")
	}
}

// What cannot be mounted is said, and tried again.
func TestSaysWhatFails(t *testing.T) {
	sources, targets := volumes(t)
	if err := os.RemoveAll(targets[0]); err != nil {
		t.Fatal(err)
	}
	if out := testenv.Fails(t, "mountguard", sources[0], targets[0]); !strings.Contains(out, targets[0]) {
		t.Errorf("a target that is not there: %q", out)
	}
	testenv.Touch(t, targets[0]) // a directory cannot be mounted on a file
	r := testenv.StartProgram(t, "mountguard", sources[0], targets[0])
	r.Says(targets[0] + ": cannot be mounted: not a directory")
	if err := os.Remove(targets[0]); err != nil {
		t.Fatal(err)
	}
	testenv.Mkdir(t, targets[0])
	r.Says(targets[0] + ": mounted")
	r.Interrupt()
}
