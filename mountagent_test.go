package kernstream_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Processes that mount, unmount and move what they are told to, in namespaces of
// their own, and the events that they send.

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

// do lets the agent do one thing (see obey) and returns its answer.
func (a *agent) do(words ...string) string {
	a.t.Helper()
	answer, err := a.try(words...)
	if err != nil {
		a.t.Fatalf("agent: %q: %v", words, err)
	}
	return answer
}

func (a *agent) try(words ...string) (string, error) { return testenv.Ask(a.in, a.out, words...) }

// end lets the agent exit, and reaps it.
func (a *agent) end() {
	if !a.ended {
		a.ended = true
		a.in.Close()
		a.wait()
	}
}

func agentMain([]string) int { return testenv.Obey(obey) }

// obey does what words say: an operation, and what it is done to.
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
