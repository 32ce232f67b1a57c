package recorder_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// userNamespace is a program that records in a user namespace, in which it is root.
const userNamespace = "user-namespace"

func init() { testenv.RegisterChild(userNamespace, userNamespaceMain) }

// userNamespaceMain mounts a tmpfs on args[0], and prints as JSON what came of a recording of it while
// the program args[1] opened files there, and mounted another one.
func userNamespaceMain(args []string) int {
	dir, program := args[0], args[1]
	list, err := recordTmpfs(dir, program)
	result := userNamespaceResult{List: list, Refused: errors.Is(err, fs.ErrPermission)}
	if err != nil {
		result.Error = err.Error()
	}
	// What was mounted elsewhere cannot be recorded by any kernel.
	_, err = recorder.Record(context.Background(), recorder.Command(exec.Command("true")), nil)
	result.Command = fmt.Sprint(errors.Is(err, fs.ErrPermission), " ", err)
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fmt.Fprintln(os.Stderr, "user-namespace:", err)
		return 1
	}
	return 0
}

type userNamespaceResult struct {
	List    []string // paths, and reasons
	Error   string
	Refused bool
	Command string
}

func recordTmpfs(dir, program string) ([]string, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, err
	}
	if err := unix.Mount("recorder", dir, "tmpfs", 0, "mode=755"); err != nil {
		return nil, err
	}
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(dir+"/"+name, nil, 0o644); err != nil {
			return nil, err
		}
	}
	var found []string
	for _, lines := range [][]string{{dir + "/b", dir + "/a"}, {"tmpfs: " + dir}} {
		r, err := recorder.Record(context.Background(), recorder.Directory(dir), nil)
		if err != nil {
			return found, err
		}
		cmd := exec.Command(program, lines...)
		cmd.Env = append(os.Environ(), "KERNSTREAM_TEST_CHILD="+opener, "GORACE=atexit_sleep_ms=0")
		cmd.Stderr = os.Stderr
		err = cmd.Run()
		r.Close()
		if err != nil {
			return found, err
		}
		list, err := r.List()
		if err != nil {
			return found, err
		}
		for i := range list.Entries {
			found = append(found, list.Entries[i].Path)
		}
		found = append(found, fmt.Sprint(list.Complete))
		found = append(found, list.Reasons...)
	}
	return found, nil
}

// TestUserNamespace: who is root of a user namespace alone can record what he has mounted there, from Linux 6.16
// on, and is told before which privilege is missing. What is mounted later is not recorded,
// and that is said.
func TestUserNamespace(t *testing.T) {
	testenv.NeedMounts(t)
	cmd := testenv.Child(t, userNamespace, t.TempDir(), testBinary(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	do(t, err)
	var got userNamespaceResult
	do(t, json.Unmarshal(out, &got))
	if !strings.HasPrefix(got.Command, "true record: ") && !strings.HasPrefix(got.Command, "true file: ") {
		t.Errorf("a command: %s", got.Command)
	}
	if !testenv.KernelAtLeast(6, 16) {
		if !got.Refused || !strings.Contains(got.Error, "CAP_SYS_ADMIN") {
			t.Errorf("before Linux 6.16: %+v", got)
		}
		testenv.Feature(t, "records in a user namespace", "refused")
		return
	}
	text := strings.Join(got.List, "\n")
	if got.Error != "" || !strings.HasPrefix(text, "/b\n/a\ntrue\nfalse\ntmpfs on / came after the start of the recording, and is not recorded: ") {
		t.Errorf("recorded\n%s\nerror %s", text, got.Error)
	}
	testenv.Feature(t, "records in a user namespace", "of what was mounted there")
}
