package recorder_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// TestCommandEveryFile: 50,000 files that a command opens at full speed, with the
// limits that there are: all of them, in order, on each kind of file system.
func TestCommandEveryFile(t *testing.T) {
	for name, makeDir := range map[string]func(testing.TB) string{
		"tmpfs": tmpfs, "ext4": disk, "overlay": func(t testing.TB) string { return overlay(t) },
	} {
		t.Run(name, func(t *testing.T) {
			needRecorder(t)
			files := 50_000
			if name != "tmpfs" {
				files = min(files, testenv.SoakN(10_000))
			}
			dir := makeDir(t)
			makeFiles(t, dir, files)
			cmd := testenv.Child(t, opener, fmt.Sprint(dir, " ", files))
			cmd.Path = testBinary(t) // and not by way of /proc, where it is of another namespace
			r := record(t, recorder.Command(cmd), nil)
			accesses, list := finish(t, r)
			do(t, cmd.Wait())
			do(t, r.Err())
			wantComplete(t, list)
			got := paths(list, dir)
			want := make([]string, files)
			for i := range want {
				want[i] = numbered("", i)[1:]
			}
			if !slices.Equal(got, want) {
				t.Errorf("recorded %d files of %d, or in another order", len(got), files)
			}
			if len(accesses) != len(list.Entries) {
				t.Errorf("%d accesses were received, and %d are in the list", len(accesses), len(list.Entries))
			}
			if list.Entries[0].Path != testBinary(t) {
				t.Errorf("the first file is %s; want the program", list.Entries[0].Path)
			}
		})
	}
}

// testBinary is the program that children are.
func testBinary(t testing.TB) string {
	t.Helper()
	path, err := filepath.EvalSymlinks("/proc/self/exe")
	do(t, err)
	return path
}

// TestParityR5Container: a container with an overlay as its root, in namespaces of its own, is recorded
// from outside by its process, with no helper in it: its paths, in order, and nothing from the
// host.
func TestParityR5Container(t *testing.T) {
	needRecorder(t)
	dir := overlay(t, "etc/conf", "usr/lib/a.so", "usr/bin/prog", "data/x")
	c := newContainer(t, dir)
	r := record(t, recorder.Container(c.cmd.Process.Pid), nil)
	do(t, touchFile(filepath.Join(dir, "data/x"))) // of the host
	newHelper(t, opener, filepath.Join(dir, "data/x")).start().end()
	c.open("/usr/bin/prog", "/etc/conf", "/usr/lib/a.so")
	waitFor(t, "three files", func() bool { return r.Progress().Files == 3 })
	c.open("/etc/conf")
	c.end()
	_, list := finish(t, r)
	do(t, r.Err())
	wantComplete(t, list)
	wantPaths(t, list, "", "usr/bin/prog", "etc/conf", "usr/lib/a.so")
	if n := list.Entries[1].Count; n != 2 {
		t.Errorf("the second file was accessed %d times; want 2", n)
	}
}

// TestTree: of those who access a directory, only a process and its descendants are
// recorded: also one that was there before, one whose parent has ended, and one that lives
// for an instant.
func TestTree(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	for _, name := range []string{"root", "child", "orphan", "other", "self"} {
		writeFile(t, filepath.Join(dir, name))
	}
	makeFiles(t, filepath.Join(dir, "many"), 30)
	h := newHelper(t, family, testBinary(t)).start()
	h.done()
	r := record(t, recorder.Directory(dir), &recorder.Options{Tree: h.cmd.Process.Pid})
	other := newHelper(t, opener, "stdin").start()
	other.open(dir + "/other")
	do(t, touchFile(dir+"/self"))
	h.open("open "+dir+"/root", "child "+dir+"/child", "orphan "+dir+"/orphan")
	for i := range 30 {
		h.open("child " + numbered(dir+"/many", i))
	}
	other.open(dir + "/other")
	r.Close()
	_, list := finish(t, r)
	wantComplete(t, list)
	want := []string{"root", "child", "orphan"}
	for i := range 30 {
		want = append(want, numbered("many", i))
	}
	wantPaths(t, list, "", want...)
}

// TestParityR7List: each file once, in the order of the first access, with all that was done and
// how often; the stream has them in the same order, and the list that was written reads the same.
func TestParityR7List(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	for _, name := range []string{"a", "b", "c"} {
		writeFile(t, filepath.Join(dir, name))
	}
	r := record(t, recorder.Directory(dir), nil)
	h := newHelper(t, opener, "stdin").start()
	h.open(dir+"/b", dir+"/a", dir+"/c")
	for n := 4; n <= 6; n++ {
		waitFor(t, "the accesses so far", func() bool { return r.Progress().Accesses >= uint64(n-1) })
		h.open(dir + "/a")
	}
	waitFor(t, "all accesses", func() bool { return r.Progress().Accesses == 6 })
	var received []string
	for range 3 {
		a := <-r.C
		received = append(received, a.Path)
	}
	cmd := exec.Command("cat", dir+"/b")
	do(t, cmd.Run())
	r.Close()
	list, err := r.List()
	do(t, err)
	wantComplete(t, list)
	wantPaths(t, list, "", "b", "a", "c")
	if want := []string{"/b", "/a", "/c"}; !slices.Equal(received, want) {
		t.Errorf("received %q; want %q", received, want)
	}
	if b, a := list.Entries[0], list.Entries[1]; a.Count != 4 || a.Ops != kernstream.OpOpen || !b.Ops.Has(kernstream.OpOpen|kernstream.OpAccess) || b.First > a.First {
		t.Errorf("the list begins with %+v, %+v", b, a)
	}
	name := filepath.Join(t.TempDir(), "list")
	do(t, list.WriteFile(name))
	f, err := os.Open(name)
	do(t, err)
	defer f.Close()
	again, err := recorder.ReadList(f)
	do(t, err)
	if !reflect.DeepEqual(again, list) {
		t.Errorf("read %+v; want %+v", again, list)
	}
}
