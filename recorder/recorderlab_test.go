package recorder_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// What the tests stand on: directories to record, containers, and programs that
// open files.

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// patience is how long a test waits for what must happen.
const patience = testenv.Patience

// The programs that the test binary can be.
const (
	opener       = "opener"       // opens files
	family       = "family"       // has children that open files
	unprivileged = "unprivileged" // tries to record
	container    = "container"    // lives in namespaces and a root of its own, and opens files there
)

func init() {
	testenv.RegisterChild(opener, openerMain)
	testenv.RegisterChild(container, containerMain)
	testenv.RegisterChild(family, familyMain)
}

// openerMain opens the files that the arguments say: a path, "DIR N" for
// the files 0 to N-1 of a directory, "stdin" for what the lines of the standard input
// name, each acknowledged by a line. "VERB: ARGUMENTS" mounts something (see mountNamed).
func openerMain(args []string) int {
	for _, arg := range args {
		if arg == "stdin" {
			for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
				if err := openNamed(lines.Text()); err != nil {
					fmt.Fprintln(os.Stderr, "opener:", err)
					return 1
				}
				fmt.Println("done")
			}
			continue
		}
		if err := openNamed(arg); err != nil {
			fmt.Fprintln(os.Stderr, "opener:", err)
			return 1
		}
	}
	return 0
}

func openNamed(arg string) error {
	if verb, rest, found := strings.Cut(arg, ": "); found {
		return mountNamed(verb, rest)
	}
	space := strings.LastIndexByte(arg, ' ')
	n, err := strconv.Atoi(arg[space+1:])
	if err != nil {
		return touchFile(arg)
	}
	dir := arg[:max(0, space)]
	for i := 0; i < n && err == nil; i++ {
		err = touchFile(numbered(dir, i))
	}
	return err
}

// mountNamed mounts or unmounts what the arguments say: a file system by its type, or
// "bind: FROM TO", "move: FROM TO", "overlay: LOWER POINT", "umount: POINT", "detach: POINT".
func mountNamed(verb, rest string) error {
	from, to, _ := strings.Cut(rest, " ")
	var err error
	switch verb {
	case "bind":
		err = unix.Mount(from, to, "", unix.MS_BIND, "")
	case "move":
		err = unix.Mount(from, to, "", unix.MS_MOVE, "")
	case "umount":
		// An access that was not looked at yet keeps a mount busy.
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			if err = unix.Unmount(rest, 0); err != unix.EBUSY || time.Since(begin) > patience {
				break
			}
		}
	case "detach": // what the recorder keeps busy
		err = unix.Unmount(rest, unix.MNT_DETACH)
	case "overlay":
		err = unix.Mount("overlay", to, verb, 0, "lowerdir="+from)
	default: // FILE, too: a file in it, which is not opened
		if err = unix.Mount("later", from, verb, 0, ""); err == nil && to != "" {
			err = unix.Mknod(from+"/"+to, unix.S_IFREG|0o644, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, rest, err)
	}
	return nil
}

func numbered(dir string, i int) string { return fmt.Sprintf("%s/%d/%d", dir, i/1000, i) }

func touchFile(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	return unix.Close(fd)
}

// makeFiles makes n files in directories of a thousand each.
func makeFiles(t testing.TB, dir string, n int) {
	t.Helper()
	for i := range n {
		path := numbered(dir, i)
		if i%1000 == 0 {
			do(t, os.MkdirAll(filepath.Dir(path), 0o755))
		}
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		do(t, err)
		unix.Close(fd)
	}
}

func do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func writeFile(t testing.TB, path string) {
	t.Helper()
	do(t, os.MkdirAll(filepath.Dir(path), 0o755))
	do(t, os.WriteFile(path, []byte("data"), 0o644))
}

// needRecorder skips t where mount marks are not permitted.
func needRecorder(t testing.TB) {
	t.Helper()
	testenv.NeedMounts(t)
	testenv.NeedRoot(t, "mount marks")
	testenv.NoLeaks(t)
}

// tmpfs returns a directory with a tmpfs of its own.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	do(t, unix.Mount("recorder", dir, "tmpfs", 0, "mode=755"))
	t.Cleanup(func() { detach(t, dir) })
	return dir
}

func detach(t testing.TB, dir string) {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Errorf("umount %s: %v", dir, err)
	}
}

// overlay returns a directory with an overlay, over a lower directory with files.
func overlay(t testing.TB, files ...string) string {
	t.Helper()
	base := tmpfs(t)
	for _, name := range []string{"lower", "upper", "work", "merged"} {
		do(t, os.Mkdir(filepath.Join(base, name), 0o755))
	}
	for _, name := range files {
		writeFile(t, filepath.Join(base, "lower", name))
	}
	dir := filepath.Join(base, "merged")
	do(t, unix.Mount("overlay", dir, "overlay", 0, fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", base, base, base)))
	t.Cleanup(func() { detach(t, dir) })
	return dir
}

// disk returns a directory with an ext4 of its own.
func disk(t testing.TB) string {
	t.Helper()
	mkfs, losetup := testenv.NeedTool(t, "mkfs.ext4"), testenv.NeedTool(t, "losetup")
	image := filepath.Join(t.TempDir(), "image")
	do(t, os.WriteFile(image, nil, 0o600))
	do(t, os.Truncate(image, 256<<20))
	if out, err := exec.Command(mkfs, "-q", "-F", "-N", "60000", image).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", mkfs, err, out)
	}
	out, err := exec.Command(losetup, "-f", "--show", image).CombinedOutput()
	device := strings.TrimSpace(string(out))
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command(losetup, "-d", device).Run() })
	dir := t.TempDir()
	do(t, unix.Mount(device, dir, "ext4", 0, ""))
	t.Cleanup(func() { detach(t, dir) })
	return dir
}

// record begins to record a target.
func record(t testing.TB, target recorder.Target, options *recorder.Options) *recorder.Recording {
	t.Helper()
	r, err := recordUntil(t, t.Context(), target, options)
	do(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

// recordUntil is recorder.Record, but waits for a fanotify group, if all of the user's are taken by other
// tests.
func recordUntil(t testing.TB, ctx context.Context, target recorder.Target, options *recorder.Options) (r *recorder.Recording, err error) {
	t.Helper()
	waitFor(t, "a fanotify group", func() bool {
		r, err = recorder.Record(ctx, target, options)
		return !errors.Is(err, unix.EMFILE)
	})
	return r, err
}

// finish receives to the end, and returns what was received and the list.
func finish(t testing.TB, r *recorder.Recording) ([]*recorder.Access, *recorder.List) {
	t.Helper()
	var accesses []*recorder.Access
	for deadline := time.After(patience); ; {
		select {
		case a, ok := <-r.C:
			if ok {
				a.Close()
				accesses = append(accesses, a)
				continue
			}
			list, err := r.List()
			do(t, err)
			return accesses, list
		case <-deadline:
			t.Fatalf("the recording does not end: %+v", r.Progress())
		}
	}
}

// paths returns the paths of a list, as far as they are below dir, relative to it.
func paths(l *recorder.List, dir string) []string {
	var found []string
	for i := range l.Entries {
		if rest, ok := strings.CutPrefix(l.Entries[i].Path, dir+"/"); ok {
			found = append(found, rest)
		}
	}
	return found
}

// wantPaths checks the paths of a list.
func wantPaths(t testing.TB, l *recorder.List, dir string, want ...string) {
	t.Helper()
	if got := paths(l, dir); !slices.Equal(got, want) || dir == "" && len(l.Entries) != len(want) {
		t.Errorf("recorded %q, %d in all; want %q", got, len(l.Entries), want)
	}
}

func wantComplete(t testing.TB, l *recorder.List) {
	t.Helper()
	if !l.Complete || len(l.Reasons) > 0 {
		t.Errorf("the list is incomplete: %q", l.Reasons)
	}
}

// wantIncomplete checks that a list is incomplete, and that a reason has a word.
func wantIncomplete(t testing.TB, l *recorder.List, word string) {
	t.Helper()
	if l.Complete || !strings.Contains(strings.Join(l.Reasons, "\n"), word) {
		t.Errorf("complete: %v, reasons %q; want one with %q", l.Complete, l.Reasons, word)
	}
}

// wantOpError checks an error: what it Is, and words of its text.
func wantOpError(t testing.TB, err, is error, words ...string) {
	t.Helper()
	var op *kernstream.OpError
	if err == nil || !errors.Is(err, is) || !errors.As(err, &op) {
		t.Errorf("error %v; want an OpError that Is %v", err, is)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q; want %q in it", err, word)
		}
	}
}

// A helper is a process that opens files when it is told to.
type helper struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Reader
}

func newHelper(t testing.TB, name string, args ...string) *helper {
	t.Helper()
	h := &helper{t: t, cmd: testenv.Child(t, name, args...)}
	var err error
	h.in, err = h.cmd.StdinPipe()
	do(t, err)
	out, err := h.cmd.StdoutPipe()
	do(t, err)
	h.lines = bufio.NewReader(out)
	return h
}

func (h *helper) start() *helper {
	h.t.Helper()
	do(h.t, h.cmd.Start())
	h.t.Cleanup(h.end)
	return h
}

// open lets the process open files, and waits until it has.
func (h *helper) open(args ...string) {
	h.t.Helper()
	for _, arg := range args {
		fmt.Fprintln(h.in, arg)
		h.done()
	}
}

func (h *helper) done() {
	h.t.Helper()
	if line, err := h.lines.ReadString('\n'); line != "done\n" {
		h.t.Fatalf("the helper says %q, %v", line, err)
	}
}

func (h *helper) end() {
	h.in.Close()
	h.cmd.Wait()
}

// containerMain makes args[0] its root, with a /proc of its own, and opens what the standard
// input says.
func containerMain(args []string) int {
	root := args[0]
	err := func() error {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		// Where no other one is to be seen, it could not be mounted any more.
		if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""); err != nil {
			return fmt.Errorf("mount proc: %w", err)
		}
		if err := os.Chdir(root); err != nil {
			return err
		}
		if err := unix.PivotRoot(".", "."); err != nil {
			return fmt.Errorf("pivot_root: %w", err)
		}
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return err
		}
		return os.Chdir("/")
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "container:", err)
		return 1
	}
	fmt.Println("done")
	return openerMain([]string{"stdin"})
}

// newContainer starts a process in new namespaces, whose root is dir.
func newContainer(t testing.TB, dir string) *helper {
	t.Helper()
	do(t, os.MkdirAll(filepath.Join(dir, "proc"), 0o755))
	h := newHelper(t, container, dir)
	h.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{Size: 1}},
	}
	h.start()
	h.done()
	return h
}

// waitFor waits until check holds.
func waitFor(t testing.TB, what string, check func() bool) {
	t.Helper()
	for begin := time.Now(); !check(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > patience {
			t.Fatalf("%s: still not after %v", what, patience)
		}
	}
}

// cancelled is a context that is done, with a cause.
func cancelled(cause error) context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(cause)
	return ctx
}

// familyMain has a child from the beginning, and obeys the lines of its standard input: "open PATH"
// itself, "child PATH" by another child, "orphan PATH" by the child of the first, which
// has ended. args[0] is the program.
func familyMain(args []string) int {
	spawn := func(words ...string) *exec.Cmd {
		cmd := exec.Command(args[0], words...)
		cmd.Env = append(os.Environ(), "KERNSTREAM_TEST_CHILD="+opener, "GORACE=atexit_sleep_ms=0")
		cmd.Stderr = os.Stderr
		return cmd
	}
	first := exec.Command("sh", "-c", `"$0" stdin <&3 >&4 & wait`, args[0])
	first.Env = spawn().Env
	theirs, in, err := os.Pipe()
	if err != nil {
		return 1
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		return 1
	}
	first.ExtraFiles = []*os.File{theirs, theirOut}
	if err := first.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "family:", err)
		return 1
	}
	answers := bufio.NewReader(out)
	fmt.Fprintln(in, "/")
	answers.ReadString('\n') // the grandchild is there
	fmt.Println("done")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); fmt.Println("done") {
		what, path, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "open":
			err = touchFile(path)
		case "child":
			err = spawn(path).Run()
		case "orphan":
			first.Process.Kill()
			first.Wait()
			fmt.Fprintln(in, path)
			_, err = answers.ReadString('\n')
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "family:", err)
			return 1
		}
	}
	in.Close()
	return 0
}
