package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// TestRecordNobodyReads: a record whose lines nobody takes can be ended all the same,
// and a command that the time is up for does not go on.
func TestRecordNobodyReads(t *testing.T) {
	needRecord(t)
	for _, test := range []struct {
		name   string
		signal syscall.Signal
		args   func(dir, pid string) []string
		status int
	}{
		{"directory", syscall.SIGINT, func(dir, _ string) []string { return []string{"-dir", dir} }, exitDone},
		{"directory, time", 0, func(dir, _ string) []string { return []string{"-timeout", "1s", "-dir", dir} }, exitTimeout},
		{"command", syscall.SIGTERM, func(_, pid string) []string {
			return []string{"--", "sh", "-c", "trap '' TERM; echo $$ >" + pid}
		}, exitDone},
		{"command, time", 0, func(_, pid string) []string {
			return []string{"-timeout", "1s", "--", "sh", "-c", "echo $$ >" + pid + "; exec sleep 1000"}
		}, exitTimeout},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := recordedDir(t, "0")
			pid := filepath.Join(t.TempDir(), "pid")
			cmd := testenv.Child(t, "kernstream", append([]string{"record"}, test.args(dir, pid)...)...)
			startUnread(t, cmd)
			ended := make(chan int)
			go func() { ended <- wait(t, cmd) }()
			if test.signal != 0 {
				(&live{t: t, cmd: cmd}).startedRecording(func() { readFiles(t, dir, 1) })
				if test.name == "command" {
					waitFile(t, pid)
				}
				time.Sleep(100 * time.Millisecond) // it comes to the pipe
			}
			status, over := 0, false
			for !over {
				readFiles(t, dir, 1)
				if test.signal != 0 {
					cmd.Process.Signal(test.signal)
				}
				select {
				case status = <-ended:
					over = true
				case <-time.After(100 * time.Millisecond):
				}
			}
			if status != test.status {
				t.Errorf("status %d; want %d", status, test.status)
			}
			if text, err := os.ReadFile(pid); err == nil {
				n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
				if n == 0 || unix.Kill(n, 0) != unix.ESRCH {
					t.Errorf("the command %d goes on", n)
				}
			}
		})
	}
}

// TestRecordTimeoutWritesAll: when the time is up, what was recorded is written, however
// long that takes.
func TestRecordTimeoutWritesAll(t *testing.T) {
	needRecord(t)
	file := filepath.Join(t.TempDir(), "record")
	if err := unix.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := testenv.Child(t, "kernstream", "record", "-timeout", "100ms", "-o", file, "-dir", recordedDir(t, "0"))
	cmd.Stderr = nil
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan int, 1)
	go func() { ended <- wait(t, cmd) }()
	select {
	case status := <-ended:
		t.Fatalf("status %d before anybody has taken the record", status)
	case <-time.After(2 * grace):
	}
	readRecord(t, file)
	if status := <-ended; status != exitTimeout {
		t.Errorf("status %d; want %d", status, exitTimeout)
	}
}

// waitFile waits until there is a file.
func waitFile(t *testing.T, name string) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		if st, err := os.Stat(name); err == nil && st.Size() > 0 {
			return
		}
		if time.Since(begin) > patience {
			t.Fatalf("there is no %s", name)
		}
	}
}
