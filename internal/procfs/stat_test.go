package procfs_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/testenv"
)

// statOf makes a /proc/PID/stat with fields by their numbers in
// proc_pid_stat(5); others are 0.
func statOf(comm string, fields map[int]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "4711 (%s)", comm)
	for n := 3; n <= 52; n++ {
		field := "0"
		if f, ok := fields[n]; ok {
			field = f
		}
		b.WriteString(" " + field)
	}
	return b.String() + "\n"
}

// TestParseStat: fields are counted from the end of the name, whatever is in
// that.
func TestParseStat(t *testing.T) {
	for _, comm := range []string{"sh", "", "a b", ") Z 1 (", "((", "))", "\n", "\xff"} {
		for _, test := range []struct {
			fields map[int]string
			want   procfs.Stat
		}{
			{map[int]string{3: "S", 4: "4710", 22: "1181336"}, procfs.Stat{State: 'S', PPID: 4710, StartTime: 1181336}},
			{map[int]string{3: "Z", 22: "18446744073709551615", 35: "1", 52: "1792"}, procfs.Stat{State: 'Z', StartTime: 1<<64 - 1, ExitCode: 7 << 8, Permitted: true}},
			{map[int]string{3: "Z", 52: "0"}, procfs.Stat{State: 'Z'}},
			{map[int]string{3: "S", 35: "1", 52: "9"}, procfs.Stat{State: 'S', ExitCode: 9}}, // a program that sleeps
			{map[int]string{3: "Z", 4: "-1", 35: "18446744071"}, procfs.Stat{State: 'Z', Permitted: true}},
		} {
			got, ok := procfs.ParseStat([]byte(statOf(comm, test.fields)))
			if !ok || got != test.want {
				t.Errorf("%q: %+v, %t; want %+v", statOf(comm, test.fields), got, ok, test.want)
			}
		}
	}
	whole := statOf("sh", nil)
	for _, text := range []string{
		"", "4711", "4711 (sh", "4711 (sh)", "4711 (sh) ", "4711 (sh) S", whole[:len(whole)-3],
		statOf("sh", map[int]string{22: "x"}), statOf("sh", map[int]string{22: ""}), statOf("sh", map[int]string{3: "ZZ"}),
		statOf("sh", map[int]string{52: "-1"}), statOf("sh", map[int]string{52: "4294967296"}), statOf("sh", map[int]string{35: "-"}),
	} {
		if got, ok := procfs.ParseStat([]byte(text)); ok {
			t.Errorf("%q: %+v; want nothing", text, got)
		}
	}
}

// TestLiveStat: what the kernel writes is understood: of this process, and of a
// zombie.
func TestLiveStat(t *testing.T) {
	read := func(pid int) procfs.Stat {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		stat, ok := procfs.ParseStat(text)
		if !ok {
			t.Fatalf("%q was not understood", text)
		}
		return stat
	}
	if own := read(os.Getpid()); !strings.ContainsRune("RS", rune(own.State)) || own.StartTime == 0 || own.Permitted {
		t.Errorf("this process is %+v", own)
	}
	cmd := exec.Command("/bin/sh", "-c", "exit 5")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	stat := read(cmd.Process.Pid)
	// It is a zombie before it waits for ever.
	for deadline := time.Now().Add(testenv.Patience); !stat.Permitted && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
		stat = read(cmd.Process.Pid)
	}
	if stat.State != 'Z' || !stat.Permitted || stat.ExitCode != 5<<8 || stat.StartTime < read(os.Getpid()).StartTime {
		t.Errorf("the zombie is %+v", stat)
	}
}

// TestStatusTGID: a task knows its process.
func TestStatusTGID(t *testing.T) {
	for text, want := range map[string]int{
		"Name:\tsh\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t4711\nNgid:\t0\n": 4711,
		"Tgid:\t2147483647": 1<<31 - 1,
	} {
		if got, ok := procfs.StatusTGID([]byte(text)); !ok || got != want {
			t.Errorf("%q: %d, %t; want %d", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "Name:\tTgid:\n", "Tgid:\n", "Tgid:\tx\n", "Tgid:\t-1\n", "Tgid:\t2147483648\n"} {
		if got, ok := procfs.StatusTGID([]byte(text)); ok {
			t.Errorf("%q: %d; want nothing", text, got)
		}
	}
	text, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := procfs.StatusTGID(text); !ok || got != os.Getpid() {
		t.Errorf("of this thread: %d, %t; want %d", got, ok, os.Getpid())
	}
}

// FuzzStat: nothing panics, and what is decoded can be made again so that it
// means the same.
func FuzzStat(f *testing.F) {
	f.Add([]byte(statOf("sh", map[int]string{3: "Z", 35: "1", 52: "256"})))
	f.Add([]byte("1 (a) b) R 0"))
	f.Add([]byte(statOf("sh", map[int]string{3: "R", 4: "4710"})))
	f.Fuzz(func(t *testing.T, text []byte) {
		procfs.StatusTGID(text)
		stat, ok := procfs.ParseStat(text)
		if !ok {
			return
		}
		wchan := "0"
		if stat.Permitted {
			wchan = "1"
		}
		made := statOf("x", map[int]string{
			3: string(rune(stat.State)), 4: fmt.Sprint(stat.PPID), 22: fmt.Sprint(stat.StartTime),
			35: wchan, 52: fmt.Sprint(stat.ExitCode),
		})
		if again, ok := procfs.ParseStat([]byte(made)); stat.State < 0x80 && (!ok || again != stat) {
			t.Errorf("%+v, made again %+v, %t", stat, again, ok)
		}
	})
}
