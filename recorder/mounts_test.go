package recorder_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// What is mounted after the start of a recording.

// A later is a recording, and a process that mounts and opens what is in its place.
type later struct {
	testing.TB
	*recorder.Recording
	*helper
	dir      string // for the process
	base     string // what the list has in the place of that: "" for a directory, which begins there
	received []*recorder.Access
}

// laters are all kinds of targets, whose files are below dir.
var laters = map[string]func(t testing.TB, dir string, options *recorder.Options) *later{
	"directory": laterDirectory,
	"container": laterContainer,
	"command":   laterCommand,
}

func laterDirectory(t testing.TB, dir string, options *recorder.Options) *later {
	h := newHelper(t, opener, "stdin").start()
	return &later{TB: t, Recording: record(t, recorder.Directory(dir), options), helper: h, dir: dir}
}

func laterContainer(t testing.TB, dir string, options *recorder.Options) *later {
	h := newContainer(t, dir)
	return &later{TB: t, Recording: record(t, recorder.Container(h.cmd.Process.Pid), options), helper: h}
}

func laterCommand(t testing.TB, dir string, options *recorder.Options) *later {
	h := newHelper(t, opener, "stdin")
	l := &later{TB: t, Recording: record(t, recorder.Command(h.cmd), options), helper: h, dir: dir, base: dir}
	t.Cleanup(h.end)
	return l
}

// do lets the process do something, with DIR for the place.
func (l *later) do(lines ...string) {
	l.Helper()
	for _, line := range lines {
		l.open(strings.ReplaceAll(line, "DIR", l.dir))
	}
}

// untilRecorded lets the process open a file of the place again and again, until it is recorded: the
// mount that it is on has a mark then.
func (l *later) untilRecorded(name string) {
	l.Helper()
	waitFor(l, "the access to "+name, func() bool {
		l.do("DIR/" + name)
		return l.has(name)
	})
}

// has tells whether a file of the place was received by now.
func (l *later) has(name string) bool {
	for {
		select {
		case a, ok := <-l.C:
			if ok {
				l.received = append(l.received, a)
				a.Close()
				continue
			}
		default:
		}
		return slices.ContainsFunc(l.received, func(a *recorder.Access) bool { return a.Path == l.base+"/"+name })
	}
}

// list ends the process, and the recording.
func (l *later) list() *recorder.List {
	l.Helper()
	l.end()
	if l.base == "" && l.dir != "" {
		l.Recording.Close()
	}
	_, list := finish(l, l.Recording)
	do(l, l.Err())
	return list
}

// recorded checks which files of the place are in a list.
func (l *later) recorded(list *recorder.List, want ...string) {
	l.Helper()
	if got := paths(list, l.base); !slices.Equal(got, want) {
		l.Errorf("recorded %q; want %q", got, want)
	}
}

// TestLaterMount: a file system that is mounted below the root while it is recorded is recorded from
// then on, and the list says that something of it may be missing. It can be unmounted.
func TestLaterMount(t *testing.T) {
	for target, start := range laters {
		for on, makeDir := range map[string]func(testing.TB) string{"tmpfs": tmpfs, "overlay": func(t testing.TB) string { return overlay(t) }} {
			t.Run(target+" on "+on, func(t *testing.T) {
				needRecorder(t)
				dir := makeDir(t)
				writeFile(t, dir+"/before")
				do(t, os.Mkdir(dir+"/mnt", 0o755))
				l := start(t, dir, nil)
				l.untilRecorded("before")
				l.do("tmpfs: DIR/mnt file")
				l.untilRecorded("mnt/file")
				l.do("umount: DIR/mnt", "DIR/before")
				list := l.list()
				wantIncomplete(t, list, fmt.Sprintf("tmpfs on %s/mnt came after the start of the recording: what was accessed", l.base))
				if len(list.Reasons) != 1 {
					t.Errorf("reasons %q", list.Reasons)
				}
				l.recorded(list, "before", "mnt/file")
			})
		}
	}
}

// TestLaterDrained: what was accessed on a mount that came later before the end is in the list, however much
// of it waits in the kernel's queue.
func TestLaterDrained(t *testing.T) {
	needRecorder(t)
	const files = 500
	dir := tmpfs(t)
	do(t, os.Mkdir(dir+"/mnt", 0o755))
	l := laterDirectory(t, dir, &recorder.Options{Descriptors: true}) // who does not come holds the recorder back
	l.do("tmpfs: DIR/mnt file")
	makeFiles(t, dir+"/mnt", files)
	l.untilRecorded("mnt/file")
	l.do(fmt.Sprint("DIR/mnt ", files))
	list := l.list()
	want := []string{"mnt/file"}
	for i := range files {
		want = append(want, numbered("mnt", i))
	}
	l.recorded(list, want...)
}

// TestLaterDescriptors: files on a mount that came later are open as others are, where that is asked
// for, and the recording is of one process tree as before.
func TestLaterDescriptors(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/before")
	do(t, os.Mkdir(dir+"/mnt", 0o755))
	h := newHelper(t, opener, "stdin").start()
	other := newHelper(t, opener, "stdin").start()
	for _, descriptors := range []bool{false, true} {
		r := record(t, recorder.Directory(dir), &recorder.Options{Descriptors: descriptors, Tree: h.cmd.Process.Pid})
		l := &later{TB: t, Recording: r, helper: h, dir: dir}
		l.untilRecorded("before")
		l.do("tmpfs: DIR/mnt file")
		do(t, os.WriteFile(dir+"/mnt/other", nil, 0o644))
		l.untilRecorded("mnt/file")
		other.open(dir+"/mnt/other", dir+"/before")
		accesses := r.Progress().Accesses
		waitFor(t, "an access after the other's", func() bool { l.do("DIR/mnt/file"); return r.Progress().Accesses > accesses })
		for _, a := range l.received {
			if descriptors != (a.File != nil) {
				t.Errorf("access %v, file %v; want one: %v", a, a.File, descriptors)
			}
		}
		r.Close()
		_, list := finish(t, r)
		l.recorded(list, "before", "mnt/file")
		wantIncomplete(t, list, "tmpfs on /mnt")
		l.do("umount: DIR/mnt")
	}
}

// TestLaterKinds: what of the mounts that come later is a reason, and which files of theirs are recorded.
func TestLaterKinds(t *testing.T) {
	for name, c := range map[string]struct {
		do     []string
		file   string // which is recorded then; empty: none
		reason string // empty: none, the list is complete
	}{
		// Marks are of mounts, so that a second one of the same files has none.
		"bind":         {[]string{"bind: DIR/in DIR/mnt"}, "mnt/file", "tmpfs on /mnt came"},
		"bind of file": {[]string{"bind: DIR/in/file DIR/other"}, "other", "tmpfs on /other came"},
		"overlay":      {[]string{"overlay: DIR/in:DIR/mnt DIR/mnt"}, "mnt/file", "overlay on /mnt came"},
		"moved into":   {[]string{"move: DIR/../out/mnt DIR/mnt"}, "mnt/file", "tmpfs on /mnt came"},
		"uncovered":    {[]string{"detach: DIR/covered"}, "covered/file", "tmpfs on /covered came"},
		"on the root":  {[]string{"tmpfs: DIR file"}, "file", "tmpfs on / came"},
		"text":         {[]string{"bind: DIR/in DIR/a\x01b\xff"}, "a\x01b\xff/file", `tmpfs on "/a\x01b\xff" came`},
		"pseudo":       {[]string{"proc: DIR/mnt"}, "", ""},
		"elsewhere":    {[]string{"tmpfs: DIR/../out"}, "", ""},
		"beside":       {[]string{"tmpfs: DIR/../recorded-too"}, "", ""},
		"moved out":    {[]string{"move: DIR/covered DIR/../out"}, "covered/file", "tmpfs on /covered came"},
		"moved within": {[]string{"move: DIR/marked DIR/mnt"}, "mnt/file", ""},
		"covered":      {[]string{"tmpfs: DIR/in", "tmpfs: DIR/in file"}, "in/file", "tmpfs on /in came"},
	} {
		t.Run(name, func(t *testing.T) {
			needRecorder(t)
			base := tmpfs(t)
			dir := base + "/recorded"
			for _, sub := range []string{"in", "mnt", "covered", "marked", "a\x01b\xff", "../out", "../recorded-too"} {
				do(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
			}
			for _, file := range []string{"in/file", "other"} {
				writeFile(t, filepath.Join(dir, file))
			}
			for _, sub := range []string{"covered", "marked", "../out"} {
				do(t, unix.Mount("before", filepath.Join(dir, sub), "tmpfs", 0, ""))
				writeFile(t, filepath.Join(dir, sub, "file"))
			}
			do(t, unix.Mount("above", dir+"/covered", "tmpfs", 0, ""))
			do(t, os.Mkdir(base+"/out/mnt", 0o755))
			do(t, unix.Mount("moves", base+"/out/mnt", "tmpfs", 0, ""))
			writeFile(t, base+"/out/mnt/file")
			l := laterDirectory(t, dir, nil)
			l.do(c.do...)
			if c.file != "" {
				l.untilRecorded(c.file)
			}
			list := l.list()
			if c.reason == "" {
				wantComplete(t, list)
			} else {
				wantIncomplete(t, list, c.reason)
			}
			if c.file == "" {
				l.recorded(list)
			} else {
				l.recorded(list, c.file)
			}
		})
	}
}

// TestLaterHidden: mounts that cannot be reached when the recording begins, since others cover them, are
// no reason for anything.
func TestLaterHidden(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	for name, cover := range map[string]func(path string) error{
		"nothing": func(string) error { return nil },
		"file":    func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"link":    func(path string) error { return os.Symlink("/", path) },
	} {
		above := filepath.Join(dir, name)
		do(t, os.MkdirAll(above+"/a/b", 0o755))
		do(t, unix.Mount("hidden", above+"/a/b", "tmpfs", 0, ""))
		do(t, unix.Mount("above", above, "tmpfs", 0, ""))
		do(t, cover(above+"/a"))
	}
	writeFile(t, dir+"/seen")
	l := laterDirectory(t, dir, nil)
	l.untilRecorded("seen")
	do(t, unix.Mount("proc", dir+"/nothing", "proc", 0, ""))
	list := l.list()
	wantComplete(t, list)
	l.recorded(list, "seen")
}

// TestLaterRoot: what is mounted on the root directory of a container is said not to be recorded.
func TestLaterRoot(t *testing.T) {
	needRecorder(t)
	l := laterContainer(t, overlay(t), nil)
	l.do("tmpfs: /")
	list := l.list()
	wantIncomplete(t, list, "tmpfs on / came after the start of the recording, and is not recorded: it covers the root directory")
}

// TestLaterAtTheEnd: a mount that comes right before the end is seen, too, and so is one that is
// gone again at once, and one that comes to light.
func TestLaterAtTheEnd(t *testing.T) {
	needRecorder(t)
	for i := range testenv.SoakN(5) {
		for line, reason := range map[string]string{
			"tmpfs: %s/mnt":                       "tmpfs on",
			"tmpfs: %[1]s/mnt\numount: %[1]s/mnt": "came",
			"detach: %s/covered":                  "tmpfs on",
		} {
			dir := tmpfs(t)
			do(t, os.Mkdir(dir+"/mnt", 0o755))
			do(t, os.Mkdir(dir+"/covered", 0o755))
			do(t, unix.Mount("under", dir+"/covered", "tmpfs", 0, ""))
			do(t, unix.Mount("above", dir+"/covered", "tmpfs", 0, ""))
			args := strings.Split(fmt.Sprintf(line, dir), "\n")
			cmd := testenv.Child(t, opener, args...)
			r := record(t, recorder.Command(cmd), nil)
			_, list := finish(t, r)
			do(t, cmd.Wait())
			wantIncomplete(t, list, reason)

			r = record(t, recorder.Directory(dir), nil)
			do(t, testenv.Child(t, opener, args...).Run())
			r.Close()
			_, list = finish(t, r)
			wantIncomplete(t, list, reason)
			if t.Failed() {
				t.Fatalf("round %d: %q", i, args)
			}
		}
	}
}

// TestLaterOneMount: who asked for one mount is told nothing of others.
func TestLaterOneMount(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/file")
	do(t, os.Mkdir(dir+"/mnt", 0o755))
	l := laterDirectory(t, dir, &recorder.Options{OneMount: true})
	l.do("tmpfs: DIR/mnt file", "DIR/mnt/file")
	l.untilRecorded("file")
	list := l.list()
	wantComplete(t, list)
	l.recorded(list, "file")
}

// TestLaterNamespace: what a process mounts in a mount namespace of its own is not seen, and not
// missed.
func TestLaterNamespace(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	writeFile(t, dir+"/file")
	do(t, os.Mkdir(dir+"/mnt", 0o755))
	h := newHelper(t, opener, "stdin")
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	h.start()
	r := record(t, recorder.Directory(dir), nil)
	h.open("tmpfs: "+dir+"/mnt file", dir+"/mnt/file")
	cmd := exec.Command("cat", dir+"/file")
	do(t, cmd.Run())
	r.Close()
	_, list := finish(t, r)
	wantComplete(t, list)
	wantPaths(t, list, "", "file")
}

// TestLaterMany: of many mounts the first are named, and the others counted.
func TestLaterMany(t *testing.T) {
	needRecorder(t)
	const mounts = 20
	dir := tmpfs(t)
	for i := range mounts {
		do(t, os.Mkdir(fmt.Sprintf("%s/%02d", dir, i), 0o755))
	}
	l := laterCommand(t, dir, nil)
	for i := range mounts {
		l.do(fmt.Sprintf("tmpfs: DIR/%02d", i))
	}
	list := l.list()
	wantIncomplete(t, list, "and 4 more of that kind")
	named := 0
	for _, why := range list.Reasons {
		if strings.HasPrefix(why, "tmpfs on "+dir) {
			named++
		}
	}
	if named != 16 || len(list.Reasons) != 17 {
		t.Errorf("reasons %q", list.Reasons)
	}
}

// TestLaterServed: a client gets the reason of a server.
func TestLaterServed(t *testing.T) {
	needRecorder(t)
	dir := tmpfs(t)
	do(t, os.Mkdir(dir+"/mnt", 0o755))
	r, served := connect(t, &recorder.ServeOptions{Target: recorder.Directory(dir)}, nil)
	l := &later{TB: t, Recording: r, helper: newHelper(t, opener, "stdin").start(), dir: dir}
	l.do("tmpfs: DIR/mnt file")
	l.untilRecorded("mnt/file")
	list := l.list()
	do(t, served())
	wantIncomplete(t, list, "tmpfs on /mnt came")
	l.recorded(list, "mnt/file")
}
