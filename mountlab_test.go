package kernstream_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
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

// What tests of mounts stand on: a watcher with a directory to mount in, and a
// process in another namespace that does as it is told.

// A lab is a directory with a watcher of the mount namespace around it.
type lab struct {
	t     testing.TB
	dir   string // a tmpfs of its own, mounted private
	w     *kernstream.MountWatcher
	table map[uint32]kernstream.Mount // what the events have told so far
	via   kernstream.MountVia         // of the first event
	marks int
}

// newLab starts a watcher. What is below the directory at the end of the test
// is unmounted.
func newLab(t testing.TB, options *kernstream.MountOptions) *lab {
	t.Helper()
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	l := &lab{t: t, dir: labDir(t)}
	l.watch(t.Context(), options)
	return l
}

// labDir returns the path of a new tmpfs.
func labDir(t testing.TB) string {
	t.Helper()
	testenv.NeedMounts(t)
	dir := t.TempDir()
	mount(t, "lab", dir, "tmpfs", 0, "")
	mount(t, "", dir, "", unix.MS_PRIVATE, "")
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

// watch starts a watcher and receives its first event.
func (l *lab) watch(ctx context.Context, options *kernstream.MountOptions) {
	l.t.Helper()
	w, err := kernstream.WatchMounts(ctx, options)
	if err != nil {
		l.t.Fatal(err)
	}
	l.w = w
	l.t.Cleanup(func() { w.Close() })
	l.table = map[uint32]kernstream.Mount{}
	e := l.receive()
	if !e.Initial {
		l.t.Fatalf("the first event is %v; want the initial one", e)
	}
	l.via = e.Via
	l.apply(e)
}

// receive returns the next event.
func (l *lab) receive() *kernstream.MountEvent {
	l.t.Helper()
	select {
	case e, ok := <-l.w.C:
		if !ok {
			l.t.Fatalf("the stream ended: %v", l.w.Err())
		}
		return e
	case <-time.After(patience):
		l.t.Fatalf("no event after %v", patience)
	}
	return nil
}

// apply brings the table up to date as the documentation of MountEvent says,
// and fails the test when the event does not fit the table.
func (l *lab) apply(e *kernstream.MountEvent) {
	l.t.Helper()
	if err := applyMounts(l.table, e); err != nil {
		l.t.Fatalf("%v: %v", e, err)
	}
}

// applyMounts applies e to a table by MountInfoID.
func applyMounts(table map[uint32]kernstream.Mount, e *kernstream.MountEvent) error {
	known := func(m *kernstream.Mount) error {
		if have, ok := table[m.MountInfoID]; !ok || !sameMount(&have, m) {
			return fmt.Errorf("the consumer is said to know\n%+v, but knows\n%+v", *m, have)
		}
		return nil
	}
	for i := range e.Unmounted {
		if err := known(&e.Unmounted[i]); err != nil {
			return err
		}
		delete(table, e.Unmounted[i].MountInfoID)
	}
	for _, c := range slices.Concat(e.Moved, e.Changed) {
		if err := known(&c.Old); err != nil {
			return err
		}
		delete(table, c.Old.MountInfoID)
		table[c.New.MountInfoID] = c.New
	}
	for _, m := range e.Mounted {
		if have, ok := table[m.MountInfoID]; ok {
			return fmt.Errorf("mounted is %+v, but there is %+v", m, have)
		}
		table[m.MountInfoID] = m
	}
	return nil
}

func sameMount(a, b *kernstream.Mount) bool {
	left, _ := json.Marshal(a)
	right, _ := json.Marshal(b)
	return string(left) == string(right)
}

// do runs f and returns all that the watcher tells about it. A mount that is
// made afterwards marks the end.
func (l *lab) do(f func()) *kernstream.MountEvent {
	l.t.Helper()
	f()
	return l.untilMark()
}

// untilMark returns what the watcher tells of all that has happened. The mark is
// a mount that changes in silence, so that only a rescan finds it, which finds
// the other changes, too.
func (l *lab) untilMark() *kernstream.MountEvent {
	l.t.Helper()
	l.marks++
	mark := l.mkdir(fmt.Sprint(".mark", l.marks))
	isMark := func(m *kernstream.Mount) bool { return m.MountPoint == mark }
	all := &kernstream.MountEvent{}
	silent := false // the mark has been seen to have changed
	until := func(seen func(e *kernstream.MountEvent) bool) {
		l.t.Helper()
		l.until(all, func(e *kernstream.MountEvent) bool {
			found := seen(e)
			e.Mounted = slices.DeleteFunc(e.Mounted, func(m kernstream.Mount) bool {
				silent = silent || isMark(&m) && len(m.Optional) > 0
				return isMark(&m)
			})
			e.Unmounted = slices.DeleteFunc(e.Unmounted, func(m kernstream.Mount) bool { return isMark(&m) })
			e.Changed = slices.DeleteFunc(e.Changed, func(c kernstream.MountChange) bool {
				silent = silent || isMark(&c.New) && len(c.New.Optional) > 0
				return isMark(&c.New)
			})
			return found
		})
	}
	// Of another type than what tests mount: without unique IDs, a mount that
	// got the ID of one that went is known by its device and type.
	mount(l.t, "mark", mark, "ramfs", 0, "")
	until(func(e *kernstream.MountEvent) bool {
		return slices.ContainsFunc(e.Mounted, func(m kernstream.Mount) bool { return isMark(&m) })
	})
	mount(l.t, "", mark, "", unix.MS_SHARED, "")
	l.w.Rescan()
	for !silent {
		until(func(e *kernstream.MountEvent) bool {
			return slices.ContainsFunc(e.Changed, func(c kernstream.MountChange) bool { return isMark(&c.New) })
		})
	}
	if err := unix.Unmount(mark, 0); err != nil {
		l.t.Fatal(err)
	}
	until(func(e *kernstream.MountEvent) bool {
		return slices.ContainsFunc(e.Unmounted, func(m kernstream.Mount) bool { return isMark(&m) })
	})
	return all
}

// until receives events and adds them to all, up to one that done says yes to.
func (l *lab) until(all *kernstream.MountEvent, done func(e *kernstream.MountEvent) bool) {
	l.t.Helper()
	for {
		e := l.receive()
		l.apply(e)
		found := done(e)
		all.Unmounted = append(all.Unmounted, e.Unmounted...)
		all.Moved = append(all.Moved, e.Moved...)
		all.Changed = append(all.Changed, e.Changed...)
		all.Mounted = append(all.Mounted, e.Mounted...)
		all.Resync = all.Resync || e.Resync
		if found {
			return
		}
	}
}

// quiet fails the test if there is an event.
func (l *lab) quiet(why string) {
	l.t.Helper()
	select {
	case e, ok := <-l.w.C:
		if !ok {
			l.t.Fatalf("the stream ended: %v", l.w.Err())
		}
		l.t.Fatalf("event %v; want none: %s", e, why)
	case <-time.After(30 * time.Millisecond):
	}
}

// silently runs f, which changes the table without a wake, and returns what a
// rescan finds of it. why is why nobody is told.
func (l *lab) silently(why string, f func()) *kernstream.MountEvent {
	l.t.Helper()
	// A look that is still pending would find the change, too.
	l.quiet("nothing has happened yet")
	f()
	l.quiet(why)
	l.w.Rescan()
	e := l.receive()
	if !e.Resync {
		l.t.Errorf("%v does not have Resync", e)
	}
	l.apply(e)
	return e
}

// has tells whether the events told of a mount on point.
func (l *lab) has(point string) bool {
	for _, m := range l.table {
		if m.MountPoint == point {
			return true
		}
	}
	return false
}

// checkTable compares the table that the events told with the kernel's.
func (l *lab) checkTable(options *kernstream.MountOptions) {
	l.t.Helper()
	if err := compareTable(l.table, options); err != nil {
		l.t.Error(err)
	}
}

func compareTable(table map[uint32]kernstream.Mount, options *kernstream.MountOptions) error {
	mounts, err := kernstream.Mounts(options)
	if err != nil {
		return err
	}
	if len(mounts) != len(table) {
		return fmt.Errorf("the events tell of %d mounts, the kernel has %d", len(table), len(mounts))
	}
	for i := range mounts {
		have, ok := table[mounts[i].MountInfoID]
		if !ok || !sameMount(&have, &mounts[i]) {
			return fmt.Errorf("the events tell of\n%+v, the kernel has\n%+v", have, mounts[i])
		}
	}
	return nil
}

// mkdir makes a directory below the lab's and returns its path.
func (l *lab) mkdir(elements ...string) string {
	l.t.Helper()
	dir := filepath.Join(append([]string{l.dir}, elements...)...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	return dir
}

// tmpfs mounts a tmpfs on a new directory and returns its path.
func (l *lab) tmpfs(elements ...string) string {
	l.t.Helper()
	dir := l.mkdir(elements...)
	mount(l.t, strings.Join(elements, "-"), dir, "tmpfs", 0, "")
	return dir
}

func mount(t testing.TB, source, target, fstype string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		t.Fatalf("mount %s on %s: %v", source, target, err)
	}
}

func umount(t testing.TB, target string, flags int) {
	t.Helper()
	if err := unix.Unmount(target, flags); err != nil {
		t.Fatalf("umount %s: %v", target, err)
	}
}

// storm mounts and unmounts on dir without a pause, until calm is called.
func storm(dir string) (calm func()) {
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Mount("storm", dir, "tmpfs", 0, "")
				unix.Unmount(dir, 0)
			}
		}
	})
	return func() {
		close(stop)
		storm.Wait()
	}
}

// points lists the mount points of mounts, below dir.
func points(mounts []kernstream.Mount, dir string) []string {
	list := []string{}
	for _, m := range mounts {
		list = append(list, strings.TrimPrefix(strings.TrimPrefix(m.MountPoint, dir), "/"))
	}
	return list
}

func newPoints(changes []kernstream.MountChange, dir string) []string {
	list := []string{}
	for _, c := range changes {
		list = append(list, points([]kernstream.Mount{c.New}, dir)...)
	}
	return list
}

// want checks the lists of an event: the mount points below the lab's
// directory, in order. An empty text is an empty list.
func (l *lab) want(e *kernstream.MountEvent, unmounted, moved, changed, mounted string) {
	l.t.Helper()
	for _, list := range []struct {
		name string
		got  []string
		want string
	}{
		{"Unmounted", points(e.Unmounted, l.dir), unmounted},
		{"Moved", newPoints(e.Moved, l.dir), moved},
		{"Changed", newPoints(e.Changed, l.dir), changed},
		{"Mounted", points(e.Mounted, l.dir), mounted},
	} {
		if want := strings.Fields(list.want); !slices.Equal(list.got, want) {
			l.t.Errorf("%s is %q; want %q", list.name, list.got, want)
		}
	}
}

// An agent is a process that does what it is told, in its own namespaces.
type agent struct {
	t     testing.TB
	PID   int
	in    io.WriteCloser
	out   *bufio.Reader
	wait  func() error
	ended bool
}

func init() { testenv.RegisterChild("agent", agentMain) }

// newAgent starts an agent with namespaces as flags (CLONE_NEWNS and so on)
// say. Propagation to and from this process stays as it is.
func newAgent(t testing.TB, flags uintptr) *agent {
	t.Helper()
	testenv.NeedMounts(t)
	cmd := testenv.Child(t, "agent")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if flags&unix.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	in, out := testenv.StartPiped(t, cmd)
	a := &agent{t: t, PID: cmd.Process.Pid, in: in, out: out, wait: cmd.Wait}
	t.Cleanup(a.end)
	a.do("ready")
	return a
}

// do lets the agent do one thing (see agentMain) and returns its answer.
func (a *agent) do(words ...string) string {
	a.t.Helper()
	answer, err := a.try(words...)
	if err != nil {
		a.t.Fatalf("agent: %q: %v", words, err)
	}
	return answer
}

func (a *agent) try(words ...string) (string, error) {
	line, err := json.Marshal(words)
	if err != nil {
		return "", err
	}
	if _, err := a.in.Write(append(line, '\n')); err != nil {
		return "", err
	}
	reply, err := a.out.ReadBytes('\n')
	if err != nil {
		return "", err
	}
	var answer struct {
		Errno syscall.Errno
		Text  string
	}
	if err := json.Unmarshal(reply, &answer); err != nil {
		return "", err
	}
	if answer.Errno != 0 {
		return "", answer.Errno
	}
	return answer.Text, nil
}

// end lets the agent exit, and reaps it.
func (a *agent) end() {
	if !a.ended {
		a.ended = true
		a.in.Close()
		a.wait()
	}
}

// agentMain obeys JSON lists of words on its standard input.
func agentMain([]string) int {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var words []string
		if err := json.Unmarshal(lines.Bytes(), &words); err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			return 1
		}
		var answer struct {
			Errno syscall.Errno
			Text  string
		}
		var err error
		answer.Text, err = obey(words)
		if err != nil {
			errno, ok := errors.AsType[syscall.Errno](err)
			if !ok {
				fmt.Fprintln(os.Stderr, "agent:", err)
				return 1
			}
			answer.Errno = errno
		}
		reply, _ := json.Marshal(answer)
		os.Stdout.Write(append(reply, '\n'))
	}
	return 0
}

func obey(words []string) (text string, err error) {
	word := func(i int) string {
		if i < len(words) {
			return words[i]
		}
		return ""
	}
	number := func(i int) (n int) {
		fmt.Sscan(word(i), &n)
		return n
	}
	switch words[0] {
	case "ready":
	case "mount": // source, target, type, flags, data
		err = unix.Mount(word(1), word(2), word(3), uintptr(number(4)), word(5))
	case "umount": // target, flags
		err = unix.Unmount(word(1), number(2))
	case "mkdir":
		err = unix.Mkdir(word(1), 0o755)
	case "rmdir":
		err = unix.Rmdir(word(1))
	case "pivot_root": // new root, place for the old one
		if err = unix.PivotRoot(word(1), word(2)); err == nil {
			err = unix.Chdir("/")
		}
	case "change root": // as containers do: pivot_root, and the old root is gone
		if err = unix.PivotRoot(word(1), word(2)); err == nil {
			err = unix.Unmount("/"+filepath.Base(word(2)), unix.MNT_DETACH)
		}
	case "mount and exit": // source, target, type
		if err = unix.Mount(word(1), word(2), word(3), 0, ""); err == nil {
			os.Exit(0)
		}
	case "unshare": // the mount namespace
		if err = unix.Unshare(unix.CLONE_FS); err == nil {
			err = unix.Unshare(unix.CLONE_NEWNS)
		}
	case "chroot":
		if err = unix.Chroot(word(1)); err == nil {
			err = unix.Chdir("/")
		}
	case "read": // a file
		var file []byte
		if file, err = os.ReadFile(word(1)); err == nil {
			text = string(file)
		}
	case "limit": // name below /proc/sys/user, value
		err = os.WriteFile("/proc/sys/user/"+word(1), []byte(word(2)), 0)
	case "write": // a file, its contents
		err = os.WriteFile(word(1), []byte(word(2)), 0o644)
	case "mark filesystem": // one
		agentFiles, err = kernstream.WatchFiles(context.Background(), nil,
			kernstream.Mark{Type: kernstream.MarkFilesystem, Path: word(1), Ops: kernstream.OpOpen})
		if err != nil {
			text, err = err.Error(), nil
		}
	case "file event": // the next one
		e := <-agentFiles.C
		text = fmt.Sprint(e.Ops, " ", e.Path, " ", e.PathState, " pid ", e.PID)
	case "mark": // files, for as long as the agent lives; the text is the error
		var marks []kernstream.Mark
		for _, path := range words[1:] {
			marks = append(marks, kernstream.Mark{Path: path, Ops: kernstream.OpOpen})
		}
		if agentFiles, err = kernstream.WatchFiles(context.Background(), nil, marks...); err != nil {
			text, err = err.Error(), nil
		}
	case "mounts": // a snapshot
		var mounts []kernstream.Mount
		if mounts, err = kernstream.Mounts(nil); err == nil {
			text = marshalMounts(mounts)
		}
	case "watch": // starts to watch itself; by which way
		options := &kernstream.MountOptions{}
		for _, way := range ways {
			if way.String() == word(1) {
				options.Via = way
			}
		}
		agentWatcher, err = kernstream.WatchMounts(context.Background(), options)
	case "event": // the next event of that
		select {
		case e, ok := <-agentWatcher.C:
			if !ok {
				return "ended", agentWatcher.Err()
			}
			var b []byte
			b, err = json.Marshal(e)
			text = string(b)
		case <-time.After(200 * time.Millisecond):
			text = "none"
		}
	default:
		err = fmt.Errorf("unknown word %q", words)
	}
	return text, err
}

// agentWatcher and agentFiles are the watchers of an agent.
var (
	agentWatcher *kernstream.MountWatcher
	agentFiles   *kernstream.FileWatcher
)

func marshalMounts(mounts []kernstream.Mount) string {
	list := make([]*kernstream.Mount, len(mounts))
	for i := range mounts {
		list[i] = &mounts[i]
	}
	b, err := json.Marshal(list)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// decodeMountEvent is the inverse of MountEvent.MarshalJSON, for tests.
func decodeMountEvent(text []byte) (*kernstream.MountEvent, error) {
	type jsonMount struct {
		ID                uint64   `json:"id"`
		ParentID          uint64   `json:"parent_id"`
		MountInfoID       uint32   `json:"mountinfo_id"`
		MountInfoParentID uint32   `json:"mountinfo_parent_id"`
		Dev               string   `json:"dev"`
		Root              string   `json:"root"`
		MountPoint        string   `json:"mount_point"`
		MountPointRaw     []byte   `json:"mount_point_raw"`
		Options           string   `json:"options"`
		Optional          []string `json:"optional"`
		FSType            string   `json:"fs_type"`
		FSSource          string   `json:"fs_source"`
		SuperOptions      string   `json:"super_options"`
	}
	type jsonChange struct{ Old, New jsonMount }
	var j struct {
		Time                       time.Time
		Source, Via                string
		Initial, Coalesced, Resync bool
		Mounted, Unmounted         []jsonMount
		Moved, Changed             []jsonChange
	}
	decoder := json.NewDecoder(strings.NewReader(string(text)))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&j); err != nil {
		return nil, err
	}
	if j.Source != "mount" {
		return nil, fmt.Errorf("source %q", j.Source)
	}
	mountOf := func(j jsonMount) kernstream.Mount {
		m := kernstream.Mount{
			ID: j.ID, ParentID: j.ParentID, MountInfoID: j.MountInfoID, MountInfoParentID: j.MountInfoParentID,
			Root: j.Root, MountPoint: j.MountPoint, Options: j.Options, Optional: j.Optional,
			FSType: j.FSType, FSSource: j.FSSource, SuperOptions: j.SuperOptions,
		}
		if j.MountPointRaw != nil {
			m.MountPoint = string(j.MountPointRaw)
		}
		fmt.Sscanf(j.Dev, "%d:%d", &m.Major, &m.Minor)
		return m
	}
	e := &kernstream.MountEvent{When: j.Time, Initial: j.Initial, Coalesced: j.Coalesced, Resync: j.Resync}
	for _, m := range j.Mounted {
		e.Mounted = append(e.Mounted, mountOf(m))
	}
	for _, m := range j.Unmounted {
		e.Unmounted = append(e.Unmounted, mountOf(m))
	}
	for _, c := range j.Moved {
		e.Moved = append(e.Moved, kernstream.MountChange{Old: mountOf(c.Old), New: mountOf(c.New)})
	}
	for _, c := range j.Changed {
		e.Changed = append(e.Changed, kernstream.MountChange{Old: mountOf(c.Old), New: mountOf(c.New)})
	}
	return e, nil
}
