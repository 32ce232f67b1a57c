package recorder_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// Edge cases of recording. Not tested: a namespace that somebody enters by setns(2) while the
// command runs (he is recorded, as Command says), and file systems that do not answer.

// TestOptionsRefused: what cannot be meant is refused before anything is opened or started.
func TestOptionsRefused(t *testing.T) {
	testenv.NoLeaks(t)
	dir := recorder.Directory(t.TempDir())
	started := exec.Command("true")
	do(t, started.Run())
	private := exec.Command("true")
	private.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	rooted := exec.Command("true")
	rooted.SysProcAttr = &syscall.SysProcAttr{Chroot: "/"}
	for word, c := range map[string]struct {
		target  recorder.Target
		options recorder.Options
	}{
		"no target":        {nil, recorder.Options{}},
		"create":           {dir, recorder.Options{Ops: kernstream.OpCreate}},
		"asks for nothing": {dir, recorder.Options{Ops: kernstream.OpOnDir}},
		"MaxFiles":         {dir, recorder.Options{MaxFiles: -1}},
		"Tree":             {dir, recorder.Options{Tree: -1}},
		"alone":            {recorder.Command(exec.Command("true")), recorder.Options{Tree: 1}},
		"Descendants":      {dir, recorder.Options{Descendants: true}},
		"no command":       {recorder.Command(nil), recorder.Options{}},
		"started before":   {recorder.Command(started), recorder.Options{}},
		"another mount":    {recorder.Command(private), recorder.Options{}},
		"another root":     {recorder.Command(rooted), recorder.Options{}},
	} {
		_, err := recorder.Record(t.Context(), c.target, &c.options)
		wantOpError(t, err, fs.ErrInvalid, "record: ", word)
	}
	cause := errors.New("too late")
	if _, err := recorder.Record(cancelled(cause), dir, nil); err != cause {
		t.Errorf("with a context that is done: %v", err)
	}
}

// TestTargetsMissing: what is not there is named, and leaves nothing behind.
func TestTargetsMissing(t *testing.T) {
	needRecorder(t)
	gone := exec.Command("true")
	do(t, gone.Run())
	for _, c := range []struct {
		target recorder.Target
		is     error
		word   string
	}{
		{recorder.Directory("/none"), fs.ErrNotExist, "/none"},
		{recorder.Directory("/proc/self/mountinfo"), unix.ENOTDIR, "/proc/self/mountinfo"},
		{recorder.Container(gone.Process.Pid), os.ErrProcessDone, fmt.Sprint(gone.Process.Pid)},
		{recorder.Container(-1), unix.EINVAL, "-1"},
		{recorder.Command(&exec.Cmd{Path: "/none/program"}), fs.ErrNotExist, "/none/program"},
	} {
		_, err := recorder.Record(t.Context(), c.target, nil)
		wantOpError(t, err, c.is, c.word)
	}
	_, err := recorder.Record(t.Context(), recorder.Directory("/"), &recorder.Options{Tree: gone.Process.Pid})
	wantOpError(t, err, os.ErrProcessDone, fmt.Sprint(gone.Process.Pid))
}

// TestTreeUnreadable: a process whose parent cannot be found out is not left out in silence.
func TestTreeUnreadable(t *testing.T) {
	needRecorder(t)
	pid, _ := testenv.StartIdle(t, nil)
	stat := fmt.Sprintf("/proc/%d/stat", pid)
	testenv.Mount(t, "/proc/self/mem", stat, "", unix.MS_BIND, "") // nothing can be read from its begin
	defer testenv.Unmount(t, stat)
	_, err := recorder.Record(t.Context(), recorder.Directory(t.TempDir()), &recorder.Options{Tree: os.Getpid()})
	wantOpError(t, err, unix.EIO, stat)
}

// TestZombie: a process that has ended, and was not waited for, has no files any more.
func TestZombie(t *testing.T) {
	needRecorder(t)
	cmd := testenv.Child(t, opener)
	do(t, cmd.Start())
	do(t, unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil))
	defer cmd.Wait()
	_, err := recorder.Record(t.Context(), recorder.Container(cmd.Process.Pid), nil)
	wantOpError(t, err, os.ErrProcessDone)
}

// TestUnprivileged: an ordinary user, and root of a user namespace, are told which privilege
// is missing.
func TestUnprivileged(t *testing.T) {
	testenv.NeedMounts(t)
	cmd := testenv.Child(t, unprivileged)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.Output()
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrInvalid) {
		// These tests are such a user's.
		out, err = testenv.Child(t, unprivileged).Output()
	}
	if text := string(out); err != nil || strings.Count(text, "CAP_SYS_ADMIN") != 2 || strings.Count(text, "permission: true") != 2 {
		t.Errorf("%v: %s", err, text)
	}
}

func init() {
	testenv.RegisterChild(unprivileged, func([]string) int {
		for _, target := range []recorder.Target{recorder.Directory("/"), recorder.Command(exec.Command("true"))} {
			_, err := recorder.Record(context.Background(), target, nil)
			fmt.Println(err, "permission:", errors.Is(err, fs.ErrPermission))
		}
		return 0
	})
}

// TestCommandMounts: a command is recorded on all mounts that it sees, but the kernel's own; with
// OneMount on that of the root alone. What it mounts is not seen outside.
func TestCommandMounts(t *testing.T) {
	needRecorder(t)
	a, b := tmpfs(t), tmpfs(t)
	writeFile(t, a+"/file")
	writeFile(t, b+"/deep/file")
	for one, want := range map[bool]string{false: "[/file /deep/file]", true: "[]"} {
		cmd := testenv.Child(t, opener, a+"/file", b+"/deep/file", "/proc/self/status")
		r := record(t, recorder.Command(cmd), &recorder.Options{OneMount: one})
		_, list := finish(t, r)
		do(t, cmd.Wait())
		wantComplete(t, list)
		var got []string
		for i := range list.Entries {
			path := list.Entries[i].Path
			for _, dir := range []string{a, b} {
				if rest, ok := strings.CutPrefix(path, dir); ok {
					got = append(got, rest)
				}
			}
			if strings.HasPrefix(path, "/proc") {
				t.Errorf("recorded %s", path)
			}
		}
		if fmt.Sprint(got) != want {
			t.Errorf("OneMount %v: recorded %q; want %s", one, got, want)
		}
	}
}

// TestCommandDescendants: the recording ends with the command, or if asked for with the last
// process that it left.
func TestCommandDescendants(t *testing.T) {
	needRecorder(t)
	for _, all := range []bool{false, true} {
		dir := tmpfs(t)
		for _, name := range []string{"first", "late"} {
			writeFile(t, filepath.Join(dir, name))
		}
		gate := filepath.Join(t.TempDir(), "gate")
		do(t, unix.Mkfifo(gate, 0o600))
		cmd := exec.Command("sh", "-c", `cat "$1/first"; (read line <"$2"; cat "$1/late") >/dev/null 2>&1 &`, "sh", dir, gate)
		r := record(t, recorder.Command(cmd), &recorder.Options{Descendants: all})
		do(t, cmd.Wait())
		open := func() { do(t, os.WriteFile(gate, []byte("go\n"), 0)) }
		want := []string{"first"}
		if all {
			waitFor(t, "the command's own", func() bool { return r.Progress().Files > 0 })
			open()
			want = append(want, "late")
		}
		_, list := finish(t, r)
		do(t, r.Err())
		wantComplete(t, list)
		wantPaths(t, list, dir, want...)
		if !all {
			open()
		}
	}
}

// TestCommandCut: a command that is not at its end when the recording is goes on; the list says
// that it is not complete. A cancel is the error of the stream, Close is none.
func TestCommandCut(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, filepath.Join(dir, "a"))
	cause := errors.New("enough")
	for _, byClose := range []bool{false, true} {
		ctx, cancel := context.WithCancelCause(t.Context())
		h := newHelper(t, opener, "stdin")
		r, err := recordUntil(t, ctx, recorder.Command(h.cmd), nil)
		do(t, err)
		h.open(dir + "/a")
		if _, err := r.List(); err == nil {
			t.Error("there is a list before the end")
		}
		if byClose {
			r.Close()
		} else {
			cancel(cause)
		}
		_, list := finish(t, r)
		if err := r.Err(); byClose && err != nil || !byClose && err != cause {
			t.Errorf("by Close: %v; Err: %v", byClose, err)
		}
		wantIncomplete(t, list, "before the command")
		wantPaths(t, list, dir, "a")
		h.open(dir + "/a") // it goes on
		h.end()
		cancel(nil)
	}
}

// TestCommandPdeathsig: the thread that starts a command stays, if its end would be a
// signal to the command.
func TestCommandPdeathsig(t *testing.T) {
	needRecorder(t)
	h := newHelper(t, opener, "stdin")
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	dir := tmpfs(t)
	writeFile(t, filepath.Join(dir, "a"))
	r := record(t, recorder.Command(h.cmd), nil)
	time.Sleep(20 * time.Millisecond)
	h.open(dir + "/a")
	h.in.Close()
	do(t, h.cmd.Wait())
	_, list := finish(t, r)
	wantComplete(t, list)
}

// TestDirectory: of what is reached through the mount of a directory, only what is below it is
// recorded, with what is mounted there, and paths begin there.
func TestDirectory(t *testing.T) {
	needRecorder(t)
	base := tmpfs(t)
	for _, name := range []string{"in/a", "in/sub/b", "inside/c", "out", "in/mnt/x", "in/own"} {
		writeFile(t, filepath.Join(base, name))
	}
	do(t, unix.Mount("below", base+"/in/mnt", "tmpfs", 0, ""))
	defer detach(t, base+"/in/mnt")
	writeFile(t, base+"/in/mnt/below")
	for one, want := range map[bool][]string{false: {"sub/b", "a", "mnt/below"}, true: {"sub/b", "a"}} {
		r := record(t, recorder.Directory(base+"/in"), &recorder.Options{OneMount: one})
		newHelper(t, opener, base+"/out", base+"/in/sub/b", base+"/inside/c", base+"/in/a", base+"/in/mnt/below").start().end()
		do(t, touchFile(base+"/in/own")) // by this process
		r.Close()
		_, list := finish(t, r)
		wantComplete(t, list)
		wantPaths(t, list, "", want...)
	}
}

// TestOddNames: bytes that are no text, line feeds and long names are recorded as they
// are.
func TestOddNames(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	names := []string{"\xff\xfe", "with space\tand \\ \"", "gone (deleted)", strings.Repeat("x", 255)}
	args := []string{}
	for _, name := range names {
		writeFile(t, filepath.Join(dir, name))
		args = append(args, filepath.Join(dir, name))
	}
	for _, descriptors := range []bool{false, true} {
		r := record(t, recorder.Directory(dir), &recorder.Options{Descriptors: descriptors})
		newHelper(t, opener, args...).start().end()
		r.Close()
		_, list := finish(t, r)
		wantComplete(t, list)
		wantPaths(t, list, "", names...)
	}
}

// TestRemoved: a file that is removed before its access is looked at has its path all the same;
// if its directory is gone, too, and nobody can tell its path any more, the list says so.
func TestRemoved(t *testing.T) {
	needRecorder(t)
	for _, descriptors := range []bool{false, true} {
		dir := tmpfs(t)
		writeFile(t, dir+"/a")
		r := record(t, recorder.Directory(dir), &recorder.Options{Descriptors: descriptors})
		cmd := exec.Command("sh", "-c", `cat a; rm a; mkdir d; echo x >d/f; cat d/f; rm -r d`)
		cmd.Dir = dir
		do(t, cmd.Run())
		r.Close()
		_, list := finish(t, r)
		got := paths(list, "")
		switch {
		case len(got) == 2 && got[0] == "a" && got[1] == "d/f":
			wantComplete(t, list)
		case len(got) == 1 && got[0] == "a" && !descriptors:
			wantIncomplete(t, list, "removed, with their directories")
		default:
			t.Errorf("recorded %q", got)
		}
	}
}

// TestMaxFiles: a list has no more files than it may, and says so.
func TestMaxFiles(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	makeFiles(t, dir, 20)
	r := record(t, recorder.Directory(dir), &recorder.Options{MaxFiles: 7})
	newHelper(t, opener, fmt.Sprint(dir, " ", 20)).start().end()
	r.Close()
	accesses, list := finish(t, r)
	wantIncomplete(t, list, "13 accesses are to further files than the 7")
	if len(list.Entries) != 7 || len(accesses) > 7 {
		t.Errorf("%d files in the list, %d received", len(list.Entries), len(accesses))
	}
}

// TestOps: only the operations that were asked for count.
func TestOps(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/read")
	r := record(t, recorder.Directory(dir), &recorder.Options{Ops: kernstream.OpModify | kernstream.OpCloseWrite})
	cmd := exec.Command("sh", "-c", `cat read; echo x >written`)
	cmd.Dir = dir
	do(t, cmd.Run())
	r.Close()
	_, list := finish(t, r)
	wantPaths(t, list, "", "written")
	if e := list.Entries[0]; !e.Ops.Has(kernstream.OpModify|kernstream.OpCloseWrite) || e.Ops.Has(kernstream.OpOpen) {
		t.Errorf("the operations are %v", e.Ops)
	}
}

// TestCopyUp: what a container opens through copy-up keeps its path.
func TestCopyUp(t *testing.T) {
	needRecorder(t)
	dir := overlay(t, "etc/conf")
	r := record(t, recorder.Directory(dir), nil)
	cmd := exec.Command("sh", "-c", `cat etc/conf; echo more >>etc/conf; cat etc/conf`)
	cmd.Dir = dir
	do(t, cmd.Run())
	r.Close()
	_, list := finish(t, r)
	wantComplete(t, list)
	wantPaths(t, list, "", "etc/conf")
}

// TestOneOrder: the order holds between mounts with file handles and others without.
func TestOneOrder(t *testing.T) {
	needRecorder(t)
	dir := overlay(t)
	do(t, os.Mkdir(dir+"/tmp", 0o755))
	do(t, unix.Mount("tmp", dir+"/tmp", "tmpfs", 0, ""))
	defer detach(t, dir+"/tmp")
	var want, args []string
	for i := range 300 {
		for _, name := range []string{fmt.Sprint("f", i), fmt.Sprint("tmp/f", i)} {
			writeFile(t, filepath.Join(dir, name))
			want, args = append(want, name), append(args, filepath.Join(dir, name))
		}
	}
	r := record(t, recorder.Directory(dir), nil)
	newHelper(t, opener, args...).start().end()
	r.Close()
	_, list := finish(t, r)
	wantComplete(t, list)
	wantPaths(t, list, "", want...)
}

// TestDescriptorsBounded: a consumer that does not come has few files open, loses none, and gets all
// when it comes.
func TestDescriptorsBounded(t *testing.T) {
	needRecorder(t)
	const files = 1000
	dir := tmpfs(t)
	makeFiles(t, dir, files)
	r := record(t, recorder.Directory(dir), &recorder.Options{Descriptors: true})
	newHelper(t, opener, fmt.Sprint(dir, " ", files)).start().end()
	waitFor(t, "128 files", func() bool { return r.Progress().Files >= 128 })
	for range 20 {
		open, err := os.ReadDir("/proc/self/fd")
		do(t, err)
		// Beside those of the list, there are those in C and in the reader's hand.
		if n := r.Progress().Files; n > 130 || len(open) > 128+64+128+100 {
			t.Fatalf("%d files in the list, %d descriptors", n, len(open))
		}
		time.Sleep(time.Millisecond)
	}
	for n := range files {
		a := <-r.C
		if a == nil || a.File == nil {
			t.Fatalf("access %d is %v", n, a)
		}
		a.Close()
	}
}

// TestDeadMounts: a FUSE file system whose server is gone is in nobody's way, but cannot be
// recorded itself.
func TestDeadMounts(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/file")
	dead := dir + "/dead"
	mountFUSE(t, dead, 0)()

	cmd := testenv.Child(t, opener, dir+"/file")
	r := record(t, recorder.Command(cmd), nil)
	_, list := finish(t, r)
	do(t, cmd.Wait())
	wantComplete(t, list)
	wantPaths(t, list, dir, "file")

	r = record(t, recorder.Directory(dir), nil)
	newHelper(t, opener, dir+"/file").start().end()
	do(t, r.Close())
	_, list = finish(t, r)
	wantComplete(t, list)
	wantPaths(t, list, "", "file")

	_, err := recorder.Record(t.Context(), recorder.Directory(dead), nil)
	wantOpError(t, err, unix.ENOTCONN, dead)
}

// mountFUSE mounts a FUSE file system of a user, which nobody serves, and returns what ends its
// connection.
func mountFUSE(t testing.TB, dir string, uid int) (abort func()) {
	t.Helper()
	do(t, os.Mkdir(dir, 0o755))
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		testenv.Missing(t, "needs to open /dev/fuse", err)
	}
	abort = sync.OnceFunc(func() { unix.Close(device) })
	t.Cleanup(abort)
	do(t, unix.Mount("fuse", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%[2]d,default_permissions", device, uid)))
	return abort
}

// TestMountOfAnotherUser: what is on a FUSE file system that is for another user alone is not
// recorded, and the list says so.
func TestMountOfAnotherUser(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/file")
	theirs := dir + "/theirs"
	mountFUSE(t, theirs, 65534)
	cmd := testenv.Child(t, opener, dir+"/file")
	r := record(t, recorder.Command(cmd), nil)
	_, list := finish(t, r)
	do(t, cmd.Wait())
	wantIncomplete(t, list, theirs+" is not recorded: statx: permission denied")
	wantPaths(t, list, dir, "file")
}
