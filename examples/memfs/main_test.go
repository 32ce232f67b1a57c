package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

func init() {
	testenv.RegisterChild("limited", limitedMain)
	testenv.RegisterChild("memfs", func(args []string) int {
		os.Args = append([]string{"memfs"}, args...)
		main()
		return 0
	})
}

// start runs memfs on a new directory until it is mounted.
func start(t *testing.T, args ...string) (dir string, cmd *exec.Cmd) {
	t.Helper()
	testenv.NeedFUSE(t)
	dir = t.TempDir()
	cmd = testenv.Child(t, "memfs", append(args, dir)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "mounted on "+dir+"\n" || err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	return dir, cmd
}

// end waits until the program has ended, well.
func end(t *testing.T, dir string, cmd *exec.Cmd) {
	t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("memfs: %v", err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(table), dir) {
		t.Errorf("still mounted: %v", err)
	}
}

// Files and directories can be made, listed, written, read, renamed and removed,
// and it ends when it is unmounted.
func TestFiles(t *testing.T) {
	dir, cmd := start(t)
	path := func(names ...string) string { return filepath.Join(append([]string{dir}, names...)...) }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.WriteFile(path("hello"), []byte("hello, world\n"), 0o640))
	check(os.MkdirAll(path("a", "b"), 0o750))
	big := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	check(os.WriteFile(path("a", "big"), big, 0o644))
	for _, c := range []struct {
		name string
		want []byte
	}{{path("hello"), []byte("hello, world\n")}, {path("a", "big"), big}} {
		if got, err := os.ReadFile(c.name); !bytes.Equal(got, c.want) || err != nil {
			t.Errorf("%s: %d bytes, %v; want %d", c.name, len(got), err, len(c.want))
		}
	}
	info, err := os.Stat(path("hello"))
	check(err)
	if info.Mode() != 0o640 || info.Size() != 13 || time.Since(info.ModTime()) > time.Minute {
		t.Errorf("%v, %d bytes, %v", info.Mode(), info.Size(), info.ModTime())
	}

	check(os.Truncate(path("hello"), 5))
	check(os.Chmod(path("hello"), 0o600))
	check(os.Rename(path("hello"), path("a", "b", "there")))
	if got, err := os.ReadFile(path("a", "b", "there")); string(got) != "hello" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := os.Remove(path("a", "b")); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("a directory with a file in it: %v", err)
	}
	if _, err := os.Stat(path("hello")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was renamed: %v", err)
	}
	if err := os.Symlink("x", path("link")); !errors.Is(err, unix.ENOSYS) {
		t.Errorf("what it does not do: %v", err)
	}

	var many []string
	for i := range 500 {
		many = append(many, strings.Repeat("n", i%200)+"-"+time.Duration(i).String())
		check(os.WriteFile(path("a", "b", many[i]), nil, 0o644))
	}
	many = append(many, "there")
	slices.Sort(many)
	entries, err := os.ReadDir(path("a", "b"))
	check(err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, many) {
		t.Errorf("%d names; want %d", len(names), len(many))
	}

	// A file that has no name any more can be used as long as it is open.
	file, err := os.Create(path("gone"))
	check(err)
	check(os.Remove(path("gone")))
	_, err = file.WriteString("still here")
	check(err)
	got := make([]byte, 10)
	if _, err := file.ReadAt(got, 0); string(got) != "still here" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	file.Close()
	check(os.RemoveAll(path("a")))

	check(unix.Unmount(dir, 0))
	end(t, dir, cmd)
}

// Ctrl-C unmounts it and ends it, even when it is in use.
func TestInterrupt(t *testing.T) {
	for _, busy := range []bool{false, true} {
		dir, cmd := start(t)
		if busy {
			file, err := os.Create(filepath.Join(dir, "open"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
		}
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		end(t, dir, cmd)
	}
}

// Nothing can be written when it is mounted read-only.
func TestReadOnly(t *testing.T) {
	dir, cmd := start(t, "-ro")
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	end(t, dir, cmd)
}

// list is a record with as many files.
func list(files int) *recorder.List {
	l := &recorder.List{Complete: true}
	for i := range files {
		l.Entries = append(l.Entries, recorder.Entry{Path: fmt.Sprint("/file/", i), Ops: kernstream.OpOpen, Count: 1})
	}
	return l
}

// limitedMain writes a record to a file, in a process whose files may have 64 KiB.
func limitedMain(args []string) int {
	signal.Ignore(syscall.SIGXFSZ)
	err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 64 << 10, Max: 64 << 10})
	if err == nil {
		err = list(10_000).WriteFile(args[0])
	}
	fmt.Println(err)
	if errors.Is(err, unix.EFBIG) {
		return 0
	}
	return 1
}

// A record is written whole or not at all on a file system like this, too, which has no files without
// a name (O_TMPFILE): the old file stays when the new one cannot be written, and nothing
// else is left.
func TestRecord(t *testing.T) {
	dir, cmd := start(t)
	if fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600); err != unix.EOPNOTSUPP {
		unix.Close(fd)
		t.Fatalf("O_TMPFILE: %v; want EOPNOTSUPP", err)
	}
	name := filepath.Join(dir, "record")
	check := func(files int, mode fs.FileMode) {
		t.Helper()
		file, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if l, err := recorder.ReadList(file); err != nil || len(l.Entries) != files {
			t.Errorf("read %v; want %d files", err, files)
		}
		if info, err := file.Stat(); err != nil || info.Mode() != mode {
			t.Errorf("the file is %v, %v; want %v", info, err, mode)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("the directory has %v, %v", entries, err)
		}
	}
	old := syscall.Umask(0o022)
	err := list(3).WriteFile(name)
	syscall.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	check(3, 0o644)
	if err := os.Chmod(name, 0o666); err != nil {
		t.Fatal(err)
	}
	out, err := testenv.Child(t, "limited", name).Output()
	if text := string(out); err != nil || !strings.Contains(text, "record: write "+name) {
		t.Errorf("%v: %s", err, text)
	}
	check(3, 0o666)
	if err := list(2000).WriteFile(name); err != nil {
		t.Fatal(err)
	}
	check(2000, 0o666)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	end(t, dir, cmd)
}
