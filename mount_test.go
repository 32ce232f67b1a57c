package kernstream_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityM1InitialEvent: the first event has the whole table and says so. A
// mount that is made while the watcher starts is in it or in the next event:
// never in both, never in none.
func TestParityM1InitialEvent(t *testing.T) {
	testenv.NoLeaks(t)
	dir := labDir(t)
	for i := range testenv.SoakN(200) {
		point := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(point, 0o755); err != nil {
			t.Fatal(err)
		}
		var mounter sync.WaitGroup
		mounter.Go(func() {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
			unix.Mount("m", point, "tmpfs", 0, "")
		})
		w, err := kernstream.WatchMounts(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		table := map[uint32]kernstream.Mount{}
		first := true
		for n := 0; n == 0; {
			e := <-w.C
			if e.Initial != first {
				t.Fatalf("Initial is %v for event %v", e.Initial, e)
			}
			first = false
			if err := applyMounts(table, e); err != nil {
				t.Fatal(err)
			}
			for _, m := range table {
				if m.MountPoint == point {
					n++
				}
			}
			if n > 1 {
				t.Fatal("the mount was counted twice")
			}
		}
		mounter.Wait()
		w.Close()
		umount(t, point, 0)
	}
}

// TestParityM2Lists: each change comes as lists of what was mounted and what
// was unmounted.
func TestParityM2Lists(t *testing.T) {
	l := newLab(t, nil)
	e := l.do(func() {
		l.tmpfs("a")
		l.tmpfs("b")
	})
	l.want(e, "", "", "", "a b")
	e = l.do(func() {
		mount(t, "c", l.mkdir("c"), "ramfs", 0, "")
		umount(t, filepath.Join(l.dir, "a"), 0)
	})
	l.want(e, "a", "", "", "c")
}

// TestParityM4Stop: the consumer ends the stream from within its loop, by Close
// or by its context.
func TestParityM4Stop(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	for _, how := range []string{"Close", "cancel", "break"} {
		ctx, cancel := context.WithCancel(t.Context())
		w, err := kernstream.WatchMounts(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
	loop:
		for range w.C {
			n++
			switch how {
			case "Close":
				w.Close()
			case "cancel":
				cancel()
			case "break":
				break loop
			}
		}
		cancel()
		w.Close()
		if err := w.Err(); n != 1 || how == "Close" && err != nil || how == "cancel" && err != context.Canceled {
			t.Errorf("%s: %d events, Err %v", how, n, err)
		}
	}
}

// TestParityM6StopAndJoin: a cancel is noticed at once, not at the next poll;
// when C is closed, goroutines and descriptors are gone, whatever was going on.
func TestParityM6StopAndJoin(t *testing.T) {
	testenv.NeedMounts(t)
	dir := labDir(t)
	defer storm(dir)()
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	var cancels []time.Duration
	for i := range testenv.SoakN(300) {
		before := descriptors()
		ctx, cancel := context.WithCancel(t.Context())
		w, err := kernstream.WatchMounts(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range i % 4 {
			<-w.C
		}
		begin := time.Now()
		cancel()
		for range w.C {
		}
		cancels = append(cancels, time.Since(begin))
		if after := descriptors(); after != before {
			t.Fatalf("%d descriptors when C was closed; want %d as before", after, before)
		}
		if err := w.Err(); err != context.Canceled {
			t.Fatalf("Err is %v", err)
		}
	}
	// No figure is asserted here (see bench), but a poll would show, however busy
	// the machine is now and then.
	slices.Sort(cancels)
	if median := cancels[len(cancels)/2]; median > 250*time.Millisecond {
		t.Errorf("half of the cancels took %v or more", median)
	}
}

// TestParityM7SetupErrors: what goes wrong at the start is an error of the
// constructor that says what was being done to what, and why.
func TestParityM7SetupErrors(t *testing.T) {
	testenv.NoLeaks(t)
	zombie := exec.Command("/bin/true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	waitForZombie(t, zombie.Process.Pid)
	defer zombie.Wait()
	reaped := exec.Command("/bin/true")
	if err := reaped.Run(); err != nil {
		t.Fatal(err)
	}
	regular, err := os.Create(filepath.Join(t.TempDir(), "regular"))
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	closed, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	device, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	uts, err := os.Open("/proc/self/ns/uts")
	if err != nil {
		t.Fatal(err)
	}
	defer uts.Close()
	chrooted, otherRoot := newAgent(t, 0), "root directory"
	chrooted.do("chroot", t.TempDir())
	if !testenv.KernelAtLeast(6, 16) {
		otherRoot = "Linux 6.15"
	}
	for _, test := range []struct {
		name    string
		options kernstream.MountOptions
		want    error
		text    string
		watch   bool // an error of WatchMounts alone
	}{
		{name: "zombie", options: kernstream.MountOptions{PID: zombie.Process.Pid}, want: os.ErrProcessDone, text: fmt.Sprint(zombie.Process.Pid)},
		{name: "reaped", options: kernstream.MountOptions{PID: reaped.Process.Pid}, want: os.ErrProcessDone, text: fmt.Sprint(reaped.Process.Pid)},
		{name: "negative", options: kernstream.MountOptions{PID: -1}, want: syscall.EINVAL, text: "process -1"},
		{name: "not a namespace", options: kernstream.MountOptions{Namespace: regular}, text: "not a namespace"},
		{name: "another namespace", options: kernstream.MountOptions{Namespace: uts}, want: syscall.EINVAL, text: "not a mount namespace"},
		{name: "device", options: kernstream.MountOptions{Namespace: device}, text: "not a namespace"},
		{name: "closed", options: kernstream.MountOptions{Namespace: closed}, want: os.ErrClosed, text: "/proc/self/ns/mnt"},
		{name: "both", options: kernstream.MountOptions{Namespace: uts, PID: 1}, text: "PID and Namespace"},
		{name: "another root", options: kernstream.MountOptions{Via: kernstream.ViaFanotify, PID: chrooted.PID}, want: errors.ErrUnsupported, text: otherRoot, watch: true},
		{name: "unknown", options: kernstream.MountOptions{Via: 77}, text: "77", watch: true},
		{name: "thread", options: kernstream.MountOptions{PID: otherThread(t)}, text: "thread"},
	} {
		t.Run(test.name, func(t *testing.T) {
			check := func(who string, err error) {
				var op *kernstream.OpError
				if !errors.As(err, &op) || op.Source != "mount" || op.Op == "" || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
					t.Errorf("%s returned %v; want an OpError that Is %v and says %q", who, err, test.want, test.text)
				}
			}
			w, err := kernstream.WatchMounts(t.Context(), &test.options)
			if w != nil {
				t.Error("WatchMounts returned a watcher")
			}
			check("WatchMounts", err)
			if !test.watch {
				_, err := kernstream.Mounts(&test.options)
				check("Mounts", err)
			}
		})
	}
}

// otherThread returns the ID of a thread that is not the main one.
func otherThread(t *testing.T) int {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		var tid int
		if fmt.Sscan(task.Name(), &tid); tid != os.Getpid() {
			return tid
		}
	}
	t.Fatal("this process has one thread")
	return 0
}

func waitForZombie(t *testing.T, pid int) {
	t.Helper()
	for range 1000 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		if fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:])); fields[0] == "Z" {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("process %d does not end", pid)
}

// TestMountOutOfDescriptors: with no descriptor left, the error says so, and
// none is lost by it.
func TestMountOutOfDescriptors(t *testing.T) {
	testenv.NoLeaks(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	for room := range 5 {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		highest := 0
		for _, entry := range entries {
			var fd int
			fmt.Sscan(entry.Name(), &fd)
			highest = max(highest, fd)
		}
		// Holes below the highest descriptor are filled up.
		var fill []int
		for {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			fill = append(fill, fd)
			if fd > highest {
				highest = fd
				break
			}
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(highest + 1 + room), Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		w, err := kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{PID: os.Getpid()})
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		for _, fd := range fill {
			unix.Close(fd)
		}
		if room < 3 && (w != nil || !errors.Is(err, unix.EMFILE)) {
			t.Errorf("with %d descriptors left: %v, %v; want EMFILE", room, w, err)
		}
		if w != nil {
			w.Close()
		}
	}
}

// TestParityM8Mounts: a snapshot has every mount with source, mount point, type
// and options, as the kernel's file has them.
func TestParityM8Mounts(t *testing.T) {
	l := newLab(t, nil)
	dir := l.tmpfs("with space")
	mounts, err := kernstream.Mounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(mounts) != len(lines) {
		t.Fatalf("%d mounts; the file has %d rows", len(mounts), len(lines))
	}
	for i, m := range mounts {
		if m.Raw != nil {
			t.Errorf("row %q was not read", m.Raw)
		}
		if got := mountinfoRow(&m); got != lines[i] {
			t.Errorf("mount %d is\n%s, the row is\n%s", i, got, lines[i])
		}
	}
	if !slices.ContainsFunc(mounts, func(m kernstream.Mount) bool {
		return m.MountPoint == dir && m.FSSource == "with space" && m.FSType == "tmpfs" && m.Options != "" && m.SuperOptions != ""
	}) {
		t.Errorf("the mount on %q is not there", dir)
	}
}

// mountinfoRow writes a mount as the kernel does.
func mountinfoRow(m *kernstream.Mount) string {
	path := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)
	name := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`, "#", `\043`)
	optional := ""
	for _, field := range m.Optional {
		optional += field + " "
	}
	return fmt.Sprintf("%d %d %d:%d %s %s %s %s- %s %s %s", m.MountInfoID, m.MountInfoParentID, m.Major, m.Minor,
		path.Replace(m.Root), path.Replace(m.MountPoint), m.Options, optional, name.Replace(m.FSType), name.Replace(m.FSSource), m.SuperOptions)
}

// TestParityM9WakeWithoutDifference: a wake that brings no difference is no
// event, and harms nothing; waits go on when signals interrupt the program.
func TestParityM9WakeWithoutDifference(t *testing.T) {
	l := newLab(t, nil)
	dir := l.tmpfs("a")
	l.untilMark()
	for range 20 {
		// It sets what is set, and still wakes everybody.
		mount(t, "", dir, "", unix.MS_REMOUNT|unix.MS_BIND, "")
		if err := syscall.Kill(os.Getpid(), syscall.SIGURG); err != nil { // the runtime takes it, and goes on
			t.Fatal(err)
		}
	}
	l.quiet("nothing changed")
	l.want(l.do(func() { l.tmpfs("b") }), "", "", "", "b")
}
