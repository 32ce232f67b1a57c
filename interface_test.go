package kernstream_test

import (
	"context"
	"encoding/json"
	"io"
	"os/exec"
	"testing"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestInterfaces: every kind of event and of source does through its interface
// what it does by itself: the time is When, the line is String, the JSON has a
// source and that time, Err is the stream's.
func TestInterfaces(t *testing.T) {
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	mounts, err := kernstream.WatchMounts(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := kernstream.WatchFiles(t.Context(), nil, kernstream.Mark{Path: t.TempDir(), Ops: kernstream.OpCreate})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.NeedTool(t, "true"))
	processes, err := kernstream.NewProcessWatcher(t.Context(), &kernstream.ProcessWatcherOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := processes.Start(cmd, nil); err != nil {
		t.Fatal(err)
	}
	mount, process := <-mounts.C, <-processes.C
	cmd.Wait()
	file := &kernstream.FileEvent{When: time.Now(), Ops: kernstream.OpOpen, Path: "/x", PathState: kernstream.PathExact}
	when := map[string]time.Time{"mount": mount.When, "process": process.When, "file": file.When}
	for name, e := range map[string]kernstream.Event{"mount": mount, "process": process, "file": file} {
		if e.Time() != when[name] || e.Time().IsZero() || e.String() == "" {
			t.Errorf("%s: time %v, line %q", name, e.Time(), e)
		}
		var shape struct {
			Source string
			Time   time.Time
		}
		text, err := json.Marshal(e)
		if err == nil {
			err = json.Unmarshal(text, &shape)
		}
		if err != nil || shape.Source != name || !shape.Time.Equal(e.Time()) {
			t.Errorf("%s: %v, JSON %s", name, err, text)
		}
	}
	if process.Time() != process.When {
		t.Errorf("the time of the exit is %v, not %v", process.Time(), process.When)
	}

	broken := kernstream.NewStream(t.Context(), func(context.Context, func(*kernstream.MountEvent) bool) error { return io.ErrUnexpectedEOF })
	for range broken.C {
	}
	for _, s := range []struct {
		source kernstream.Source
		want   error
	}{{mounts, nil}, {files, nil}, {processes, nil}, {broken, io.ErrUnexpectedEOF}} {
		if err := s.source.Close(); err != nil || s.source.Err() != s.want {
			t.Errorf("%T: Close %v, Err %v; want %v", s.source, err, s.source.Err(), s.want)
		}
	}
}
