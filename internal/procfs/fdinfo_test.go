package procfs_test

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
)

// TestPidfdPID: the process ID of a pidfd is the one in its fdinfo, and -1 once
// it was reaped.
func TestPidfdPID(t *testing.T) {
	for text, want := range map[string]int{
		"pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t40\nPid:\t4711\nNSpid:\t4711\t1\n": 4711,
		"Pid:\t-1\nNSpid:\t-1\n": -1,
		"Pid:\t0":                0,
	} {
		if got, ok := procfs.PidfdPID([]byte(text)); got != want || !ok {
			t.Errorf("%q: %d, %t; want %d", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "pos:\t0\n", "NSpid:\t7\n", "Pid:\t\n", "Pid:\tx\n", "Pid:\t-2\n", "Pid:\t4294967296\n"} {
		if got, ok := procfs.PidfdPID([]byte(text)); ok {
			t.Errorf("%q: %d; want no process ID", text, got)
		}
	}

	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	check := func(want int) {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprint("/proc/self/fdinfo/", fd))
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := procfs.PidfdPID(text); got != want || !ok {
			t.Errorf("%d, %t; want %d in %q", got, ok, want, text)
		}
	}
	check(cmd.Process.Pid)
	cmd.Wait()
	check(-1)
}

// FuzzPidfdPID: no text is taken for a process ID below -1, and nothing panics.
func FuzzPidfdPID(f *testing.F) {
	f.Add([]byte("pos:\t0\nflags:\t02000002\nPid:\t4711\nNSpid:\t4711\n"))
	f.Add([]byte("Pid:\t-1\nPid:\t7"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if pid, ok := procfs.PidfdPID(text); ok && pid < -1 {
			t.Errorf("%q: %d", text, pid)
		}
	})
}
