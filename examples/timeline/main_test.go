package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// patience is how long a test waits for what must happen.
const patience = 2 * testenv.Patience

// record is a line of the log.
type record struct {
	Level string
	Msg   string
	Event struct {
		Source  string
		Time    time.Time
		Path    string
		Events  []string
		Mounted []struct {
			MountPoint string `json:"mount_point"`
		}
	}
}

// next returns the next line that is of a source.
func next(t *testing.T, lines *json.Decoder, source string) record {
	t.Helper()
	for {
		var r record
		if err := lines.Decode(&r); err != nil {
			t.Fatalf("no event of the source %s: %v", source, err)
		}
		if time.Since(r.Event.Time) > patience || r.Event.Source == "" {
			t.Errorf("a line without its event: %+v", r)
		}
		if r.Event.Source == source {
			return r
		}
	}
}

// Events of all sources are in one log, each with what it is worth.
func TestTimeline(t *testing.T) {
	testenv.NeedKernel(t, 5, 13, "fanotify for ordinary users")
	dir := testenv.MountDir(t)
	files, point := testenv.Mkdir(t, dir, "files"), testenv.Mkdir(t, dir, "point")
	process := exec.Command(testenv.NeedTool(t, "sh"), "-c", "read line; exit 3")
	stdin, err := process.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	defer process.Wait()
	defer stdin.Close()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, w, process.Process.Pid, []string{files})
		w.Close()
	}()
	timer := time.AfterFunc(patience, func() { w.CloseWithError(errors.New("nothing comes")) })
	defer timer.Stop()
	lines := json.NewDecoder(r)

	// It says nowhere that it has begun, so these are done again and again.
	name := filepath.Join(files, "file")
	// What comes and goes in between of two looks is not seen.
	stop := repeat(func(i int) {
		if i%2 == 0 {
			unix.Mount("x", point, "tmpfs", 0, "")
		} else {
			unix.Unmount(point, unix.MNT_DETACH)
		}
		os.WriteFile(name, []byte("x"), 0o644)
	})
	mounted := next(t, lines, "mount")
	for len(mounted.Event.Mounted) == 0 {
		mounted = next(t, lines, "mount")
	}
	if mounted.Event.Mounted[0].MountPoint != point || mounted.Level != "INFO" || !strings.Contains(mounted.Msg, point) {
		t.Errorf("the mount is %+v", mounted)
	}
	if file := next(t, lines, "file"); file.Event.Path != name || file.Level != "INFO" {
		t.Errorf("the file is %+v", file)
	}
	stop()
	stdin.Close()
	if end := next(t, lines, "process"); end.Level != "ERROR" || !strings.Contains(end.Msg, "status 3") {
		t.Errorf("the end is %+v", end)
	}
	cancel()
	io.Copy(io.Discard, r)
	if err := <-ended; err != nil {
		t.Errorf("after a cancel: %v", err)
	}
}

// repeat does something again and again, with a pause, until stop has returned.
func repeat(do func(i int)) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			do(i)
			select {
			case <-quit:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// If a source cannot be opened, the error says which, and none is left open
// (which the end of the tests looks for).
func TestNotOpened(t *testing.T) {
	var out bytes.Buffer
	missing := filepath.Join(t.TempDir(), "missing")
	if err := run(t.Context(), &out, 0, []string{t.TempDir(), missing}); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a directory that is not there: %v", err)
	}
	if out.Len() > 0 {
		t.Errorf("the log is %s", out.String())
	}
}
