package procfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/testenv"
)

func noStep() error { return nil }

// openFile returns a descriptor of a file with that content.
func openFile(tb testing.TB, content []byte) int {
	tb.Helper()
	name := filepath.Join(tb.TempDir(), "file")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		tb.Fatal(err)
	}
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	return fd
}

// manyMounts mounts so much that the process's mountinfo has several pages.
func manyMounts(tb testing.TB) {
	tb.Helper()
	dir := testenv.MountDir(tb)
	for i := range 200 {
		testenv.Mount(tb, "source", testenv.Mkdir(tb, dir, fmt.Sprintf("%03d", i)), "tmpfs", 0, "")
	}
}

// TestReadAll: the whole file is read from its start, whatever the buffer was
// and wherever the file's position is, which stays.
func TestReadAll(t *testing.T) {
	for _, size := range []int{0, 1, 4095, 4096, 4097, 16 << 10, 64 << 10, 64<<10 + 1, 1 << 20} {
		content := bytes.Repeat([]byte("0123456789abcde\n"), size/16+1)[:size]
		fd := openFile(t, content)
		if _, err := unix.Seek(fd, int64(size/2), 0); err != nil {
			t.Fatal(err)
		}
		for _, buf := range [][]byte{nil, {}, []byte("garbage"), make([]byte, 10), make([]byte, 0, 16<<10), make([]byte, 5, 2<<20)} {
			got, err := procfs.ReadAll(fd, buf, noStep)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, content) {
				t.Errorf("%d bytes of %d, buffer of %d", len(got), size, cap(buf))
			}
		}
		if position, err := unix.Seek(fd, 0, 1); err != nil || position != int64(size/2) {
			t.Errorf("position %d, %v, was %d", position, err, size/2)
		}
	}
}

// TestReadAllReusesBuffer: a buffer that is large enough is the one returned,
// so a second reading allocates nothing.
func TestReadAllReusesBuffer(t *testing.T) {
	fd := openFile(t, bytes.Repeat([]byte("row\n"), 100_000))
	buf, err := procfs.ReadAll(fd, nil, noStep)
	if err != nil {
		t.Fatal(err)
	}
	allocs := testing.AllocsPerRun(10, func() {
		again, err := procfs.ReadAll(fd, buf, noStep)
		if err != nil || len(again) != len(buf) || &again[0] != &buf[0] {
			t.Errorf("%d bytes, %v", len(again), err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// TestReadAllMountinfo: mountinfo comes a page at a time, and whole.
func TestReadAllMountinfo(t *testing.T) {
	manyMounts(t)
	want, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	fd := openMountinfo(t)
	steps := 0
	got, err := procfs.ReadAll(fd, nil, func() error { steps++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
	if pages := len(want) / os.Getpagesize(); pages < 2 || steps <= pages {
		t.Errorf("step called %d times for %d pages", steps, pages)
	}
	again, err := procfs.ReadAll(fd, make([]byte, 100), noStep)
	if err != nil || !bytes.Equal(again, want) {
		t.Errorf("second reading: %d bytes, %v", len(again), err)
	}
}

// TestReadAllStepEnds: the error of step ends the reading between two pages,
// and what was read before is returned with it.
func TestReadAllStepEnds(t *testing.T) {
	manyMounts(t)
	fd := openMountinfo(t)
	whole, err := procfs.ReadAll(fd, nil, noStep)
	if err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	before := -1
	for stop := 1; stop <= 3; stop++ {
		steps := 0
		got, err := procfs.ReadAll(fd, nil, func() error {
			if steps++; steps == stop {
				return enough
			}
			return nil
		})
		if err != enough || steps != stop {
			t.Errorf("error %v after %d steps, want the one of step %d", err, steps, stop)
		}
		if len(got) <= before || len(got) == len(whole) || !bytes.HasPrefix(whole, got) {
			t.Errorf("step %d: %d bytes of %d, %d a step before", stop, len(got), len(whole), before)
		}
		before = len(got)
	}
}

// TestReadAllFails: an error of the kernel names the system call.
func TestReadAllFails(t *testing.T) {
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	defer w.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, c := range []struct {
		fd   int
		want error
	}{
		{-1, unix.EBADF},
		{int(pipe.Fd()), unix.ESPIPE},
		{int(dir.Fd()), unix.EISDIR},
	} {
		got, err := procfs.ReadAll(c.fd, []byte("garbage"), noStep)
		if !isSyscall(err, "pread", c.want) || len(got) != 0 {
			t.Errorf("error %v, %d bytes, want pread: %v", err, len(got), c.want)
		}
	}
}

func isSyscall(err error, name string, errno error) bool {
	var e *os.SyscallError
	return errors.As(err, &e) && e.Syscall == name && e.Err == errno
}

// changed asks whether the table changed, which must be want.
func changed(tb testing.TB, fd int, want bool, when string) {
	tb.Helper()
	got, err := procfs.MountsChanged(fd)
	if err != nil {
		tb.Fatal(err)
	}
	if got != want {
		tb.Errorf("%s: changed is %t", when, got)
	}
}

// TestMountsChanged: a change is told once, and changes before the file was
// opened never.
func TestMountsChanged(t *testing.T) {
	dir := testenv.MountDir(t)
	fd := openMountinfo(t)
	changed(t, fd, false, "at first")
	changed(t, fd, false, "again")

	testenv.Mount(t, "new", dir, "tmpfs", 0, "")
	changed(t, fd, true, "after a mount")
	changed(t, fd, false, "after the mount was told")

	testenv.Mount(t, "", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	changed(t, fd, true, "after a remount")
	changed(t, fd, false, "after the remount was told")

	testenv.Unmount(t, dir)
	changed(t, fd, true, "after an unmount")
	changed(t, fd, false, "after the unmount was told")

	for range 3 {
		testenv.Mount(t, "new", dir, "tmpfs", 0, "")
		testenv.Unmount(t, dir)
	}
	changed(t, openMountinfo(t), false, "opened after the changes")
	changed(t, fd, true, "after six changes")
	changed(t, fd, false, "after the six were told")

	if err := unix.Mount("", dir+"/not there", "tmpfs", 0, ""); err != unix.ENOENT {
		t.Fatal(err)
	}
	changed(t, fd, false, "after a mount that failed")
}

// TestMountsChangedReading: reading the table neither tells nor forgets a
// change.
func TestMountsChangedReading(t *testing.T) {
	dir := testenv.MountDir(t)
	fd := openMountinfo(t)
	read := func() string {
		text, err := procfs.ReadAll(fd, nil, noStep)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	read()
	changed(t, fd, false, "after reading")
	testenv.Mount(t, "a-new-one", dir, "tmpfs", 0, "")
	if !strings.Contains(read(), "a-new-one") {
		t.Error("the new mount is not in the text")
	}
	changed(t, fd, true, "after reading it")
	testenv.Unmount(t, dir)
	changed(t, fd, true, "after an unmount")
}

// TestMountsChangedIndependent: each open file is told of each change, but the
// descriptors of one open file share what they are told.
func TestMountsChangedIndependent(t *testing.T) {
	dir := testenv.MountDir(t)
	a, b := openMountinfo(t), openMountinfo(t)
	dup, err := unix.FcntlInt(uintptr(b), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)

	testenv.Mount(t, "new", dir, "tmpfs", 0, "")
	changed(t, a, true, "one file")
	changed(t, b, true, "another file")
	changed(t, dup, false, "a duplicate of the other")

	testenv.Unmount(t, dir)
	changed(t, dup, true, "the duplicate first")
	changed(t, b, false, "the one it was made of")
	changed(t, a, true, "the file apart")
}

// TestMountsChangedFails: a descriptor that is none is an error, and not a
// table that never changes.
func TestMountsChangedFails(t *testing.T) {
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// A number far from those that other files may get meanwhile.
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 500)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := procfs.MountsChanged(high); err != nil {
		t.Error(err)
	}
	unix.Close(high)
	if got, err := procfs.MountsChanged(high); got || !isSyscall(err, "poll", unix.EBADF) {
		t.Errorf("%t, %v, want poll: EBADF", got, err)
	}
}

// TestReadRows: every row of a file is passed on whole and in order, however
// the reads cut the file, one far longer than the buffer and one without a line
// feed at the end of the file too. An error ends the reading.
func TestReadRows(t *testing.T) {
	rows := []string{"first", "", strings.Repeat("long ", 50_000), "short", strings.Repeat("x", 16<<10), "last"}
	for i := range 2_000 {
		rows = append(rows, strings.Repeat("y", i%100))
	}
	for _, end := range []string{"", "\n"} {
		path := filepath.Join(t.TempDir(), "rows")
		if err := os.WriteFile(path, []byte(strings.Join(rows, "\n")+"\nend"+end), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for _, size := range []int{0, 1, 5000, 1 << 20} {
			var got []string
			if err := procfs.ReadRows(int(file.Fd()), make([]byte, size), func(row []byte) error { got = append(got, string(row)); return nil }); err != nil {
				t.Fatal(err)
			}
			if want := append(slices.Clone(rows), "end"); !slices.Equal(got, want) {
				t.Errorf("with a buffer of %d: %d rows, want %d", size, len(got), len(want))
			}
		}
	}
	mine, calls := errors.New("mine"), 0
	own, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if err := procfs.ReadRows(int(own.Fd()), nil, func([]byte) error { calls++; return mine }); err != mine || calls != 1 {
		t.Errorf("ReadRows with a function that fails: %v after %d rows, want its error after 1", err, calls)
	}
	if err := procfs.ReadRows(-1, nil, func([]byte) error { t.Error("a row of nothing"); return nil }); !errors.Is(err, unix.EBADF) {
		t.Errorf("ReadRows of a bad descriptor: %v, want EBADF", err)
	}
}
