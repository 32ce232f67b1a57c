package pidfd

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// child starts a shell that runs script when its input is closed, and opens it.
func child(t *testing.T, script string) (fd int, cmd *exec.Cmd, end func()) {
	t.Helper()
	cmd = exec.Command("/bin/sh", "-c", "read x; "+script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if fd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
		unix.Close(fd)
	})
	return fd, cmd, func() {
		t.Helper()
		in.Close()
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if state, _ := Poll(fd); state != Running {
				return
			}
		}
		t.Fatal("the child does not end")
	}
}

// TestPollMany: the states of many, more than are asked for at once, and more
// than RLIMIT_NOFILE lets be asked for at once.
func TestPollMany(t *testing.T) {
	running, _, _ := child(t, "exit 0")
	zombie, _, end := child(t, "exit 0")
	end()
	fds := make([]int32, 1000)
	want := make([]State, len(fds))
	for i := range fds {
		switch i % 3 {
		case 0:
			fds[i] = int32(running)
		case 1:
			fds[i], want[i] = int32(zombie), Exited
		default:
			fds[i] = 9999 // is not open
		}
	}
	if got := PollMany(fds); !slices.Equal(got, want) {
		t.Errorf("states %v", got)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	if got := PollMany(fds); !slices.Equal(got, want) {
		t.Errorf("states %v with a low RLIMIT_NOFILE", got)
	}
	if got := PollMany(nil); len(got) != 0 {
		t.Errorf("%d states of nothing", len(got))
	}
}

// TestLife: what can be asked in each state of a child. Its status is known from
// the zombie on, without reaping it, and from Linux 6.15 on when it was reaped.
func TestLife(t *testing.T) {
	fd, cmd, end := child(t, "exit 7")
	check := func(name string, want State, unreaped, status bool) {
		t.Helper()
		if state, err := Poll(fd); state != want || err != nil {
			t.Errorf("%s: state %d, %v; want %d", name, state, err, want)
		}
		if got := Unreaped(fd); got != unreaped {
			t.Errorf("%s: unreaped is %v", name, got)
		}
		for range 2 {
			if got, ok, err := ChildStatus(fd); ok != status || err != nil || ok && got != 7<<8 {
				t.Errorf("%s: status %#x, %v, %v", name, got, ok, err)
			}
		}
	}
	check("running", Running, true, false)
	id, err := ID(fd)
	if err != nil || HasID() != testenv.KernelAtLeast(6, 9) {
		t.Errorf("ID %d, %v; has ID: %v", id, err, HasID())
	}
	infos := testenv.KernelAtLeast(6, 13)
	info, err := GetInfo(fd)
	if infos && (err != nil || !info.HasPID || info.PID != cmd.Process.Pid || info.TGID != cmd.Process.Pid || info.HasStatus) {
		t.Errorf("running: %+v, %v", info, err)
	}
	if !infos && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("PIDFD_GET_INFO on an old kernel: %v", err)
	}
	end()
	check("zombie", Exited, true, true)
	if info, err := GetInfo(fd); infos && (err != nil || info.HasStatus) {
		t.Errorf("zombie: %+v, %v; want no status", info, err)
	}
	cmd.Wait()
	last := Reaped
	if !HasID() {
		last = Exited
	}
	check("reaped", last, false, false)
	info, err = GetInfo(fd)
	if testenv.KernelAtLeast(6, 15) && (err != nil || !info.HasStatus || info.Status != 7<<8 || info.HasPID) {
		t.Errorf("reaped: %+v, %v", info, err)
	}
	if again, err := ID(fd); again != id || err != nil {
		t.Errorf("ID %d after the reaping, %v; want %d", again, err, id)
	}
}

// TestSignals: the status of a child is in the form of wait(2), however it
// ended.
func TestSignals(t *testing.T) {
	for _, script := range []string{"exit 0", "exit 255", "kill -KILL $$", "kill -TERM $$", "ulimit -c 0; kill -SEGV $$"} {
		fd, cmd, end := child(t, script)
		end()
		status, ok, err := ChildStatus(fd)
		cmd.Wait()
		if want := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || err != nil || syscall.WaitStatus(status) != want {
			t.Errorf("%s: %#x, %v, %v; want %#x", script, status, ok, err, want)
		}
	}
}

// TestChildWithoutSignal: the status of a child is known, too, whose end sends its
// parent no SIGCHLD. Most calls of the wait family do not see such children.
func TestChildWithoutSignal(t *testing.T) {
	pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, 0, 0, 0, 0, 0, 0)
	if pid == 0 && errno == 0 {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 7, 0, 0) // the copy, in which nothing else runs
	}
	if errno != 0 {
		t.Fatal(errno)
	}
	defer unix.Wait4(int(pid), nil, unix.WALL, nil)
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	state := Running
	for deadline := time.Now().Add(testenv.Patience); state == Running && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		state, _ = Poll(fd)
	}
	if err := unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != unix.ECHILD {
		t.Errorf("waitid without WALL returned %v; want ECHILD", err)
	}
	if status, ok, err := ChildStatus(fd); state != Exited || !ok || err != nil || status != 7<<8 {
		t.Errorf("state %d, status %#x, %v, %v; want an exit with 7", state, status, ok, err)
	}
}

// TestNoPidfd: a descriptor of something else is an error everywhere.
func TestNoPidfd(t *testing.T) {
	r, _, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, fd := range []int{int(r.Fd()), -1} {
		if _, _, err := ChildStatus(fd); !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EINVAL) {
			t.Errorf("ChildStatus(%d): %v", fd, err)
		}
		if _, err := GetInfo(fd); err == nil {
			t.Errorf("GetInfo(%d): no error", fd)
		}
		if Unreaped(fd) {
			t.Errorf("Unreaped(%d)", fd)
		}
	}
	if _, err := Poll(9999); !errors.Is(err, unix.EBADF) {
		t.Errorf("Poll of no descriptor: %v", err)
	}
	if _, err := ID(-1); !errors.Is(err, unix.EBADF) {
		t.Errorf("ID of no descriptor: %v", err)
	}
}

// TestDecodeInfo: the fields are where the kernel's header has them.
func TestDecodeInfo(t *testing.T) {
	b := make([]byte, 80)
	for i := range b {
		b[i] = byte(i)
	}
	set := func(mask uint64) { binary.NativeEndian.PutUint64(b, mask) }
	set(unix.PIDFD_INFO_PID)
	want := Info{HasPID: true, PID: int(binary.NativeEndian.Uint32([]byte{16, 17, 18, 19})), TGID: int(binary.NativeEndian.Uint32([]byte{20, 21, 22, 23}))}
	if got, ok := DecodeInfo(b); !ok || got != want {
		t.Errorf("%+v, %v; want %+v", got, ok, want)
	}
	set(unix.PIDFD_INFO_EXIT)
	want = Info{HasStatus: true, Status: binary.NativeEndian.Uint32([]byte{60, 61, 62, 63})}
	if got, ok := DecodeInfo(b); !ok || got != want {
		t.Errorf("%+v, %v; want %+v", got, ok, want)
	}
	if _, ok := DecodeInfo(b[:63]); ok {
		t.Error("a text that is too short was decoded")
	}
	if getInfo>>ioctlSizeShift&ioctlSizeMask != infoSize || getInfo&0xffff != 0xff0b {
		t.Errorf("the request is %#x", uint32(getInfo))
	}
}

// TestDecodeSiginfo: the fields are where each architecture has them, and each
// code becomes a status.
func TestDecodeSiginfo(t *testing.T) {
	for name, l := range map[string]layout{
		"64 bits": {code: 8, pid: 16, status: 24}, "32 bits": {code: 8, pid: 12, status: 20}, "mips": {code: 4, pid: 12, status: 20},
	} {
		for _, test := range []struct {
			pid, code, value, want uint32
			ok                     bool
		}{
			{0, 0, 0, 0, false},
			{7, codeExited, 0, 0, true},
			{7, codeExited, 255, 255 << 8, true},
			{7, codeExited, 0x1ff, 255 << 8, true},
			{7, codeKilled, 9, 9, true},
			{7, codeDumped, 11, 0x8b, true},
			{7, 4, 5, 0, false}, // CLD_TRAPPED
		} {
			b := make([]byte, siginfoSize)
			binary.NativeEndian.PutUint32(b[l.pid:], test.pid)
			binary.NativeEndian.PutUint32(b[l.code:], test.code)
			binary.NativeEndian.PutUint32(b[l.status:], test.value)
			if got, ok := decodeSiginfo(b, l); got != test.want || ok != test.ok {
				t.Errorf("%s: %+v gave %#x, %v", name, test, got, ok)
			}
		}
	}
}

// FuzzDecode: nothing panics.
func FuzzDecode(f *testing.F) {
	f.Add(make([]byte, siginfoSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if info, ok := DecodeInfo(b); ok && len(b) < infoSize || !info.HasStatus && info.Status != 0 {
			t.Errorf("%+v, %v of %d bytes", info, ok, len(b))
		}
		if len(b) >= siginfoSize {
			if status, ok := decodeSiginfo(b, siginfoLayout()); !ok && status != 0 || status > 0xffff {
				t.Errorf("status %#x, %v", status, ok)
			}
		}
	})
}

// TestHasIDWithoutDescriptors: that there is no descriptor to look with says
// nothing about the kernel, at the moment or later.
func TestHasIDWithoutDescriptors(t *testing.T) {
	hasID.Store(0)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	without := HasID()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if want := testenv.KernelAtLeast(6, 9); without != want || HasID() != want {
		t.Errorf("HasID is %v without descriptors and %v with; want %v", without, HasID(), want)
	}
}
