package fuse_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// nobody is an ordinary user.
const nobody = 65534

// everybodysDevice makes /dev/fuse one that every user may open, as it is on
// most systems, in this mount namespace.
func everybodysDevice(t testing.TB) {
	t.Helper()
	testenv.NeedRoot(t, "an ordinary user without a user namespace")
	testenv.NeedTool(t, "fusermount3")
	testenv.NeedFUSE(t)
	var st unix.Stat_t
	if err := unix.Stat("/dev/fuse", &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o666 == 0o666 {
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("dev", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	node := filepath.Join(dir, "fuse")
	if err := unix.Mknod(node, unix.S_IFCHR, int(st.Rdev)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(node, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(node, "/dev/fuse", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/dev/fuse", 0); err != nil {
			t.Error(err)
		}
	})
}

// userReport is what an ordinary user has to tell.
type userReport struct {
	Via                  string
	MountRow             string
	Mounted              bool
	AllowOther           string
	AllowOtherPermission bool
	Read                 string
	Busy                 bool
	Lazy, Unmount, Close string
	Err                  string
	MountedAtTheEnd      bool
	Helpers              int
}

// TestParityU3OrdinaryUser and TestParityU7OrdinaryUser in one: where the kernel
// says EPERM, the helper mounts and unmounts.
func TestParityU3U7OrdinaryUser(t *testing.T) {
	everybodysDevice(t)
	for _, auto := range []bool{false, true} {
		report := asNobody(t, auto)
		if report.Err != "" {
			t.Fatal(report.Err)
		}
		if report.Via != "helper" || !report.Mounted || !strings.Contains(report.MountRow, fmt.Sprintf("user_id=%d", nobody)) {
			t.Errorf("mounted: %+v", report)
		}
		if report.Read != content {
			t.Errorf("read %q", report.Read)
		}
		if !report.Busy || report.Lazy != "" || report.Unmount != "" || report.Close != "" || report.MountedAtTheEnd || report.Helpers != 0 {
			t.Errorf("unmounted: %+v", report)
		}
		if auto {
			continue
		}
		if conf, err := os.ReadFile("/etc/fuse.conf"); err == nil && !strings.Contains(string(conf), "\nuser_allow_other") {
			if !report.AllowOtherPermission || !strings.Contains(report.AllowOther, "user_allow_other") {
				t.Errorf("AllowOther: %s", report.AllowOther)
			}
		}
	}
	testenv.Feature(t, "FUSE mount by an ordinary user", "fusermount3")
}

// asNobody runs the child "user" as an ordinary user.
func asNobody(t testing.TB, auto bool) (report userReport) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "kernstream-user-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	cmd := testenv.Child(t, "user", dir, fmt.Sprint(auto))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatal(err)
	}
	report.MountedAtTheEnd = fuseMounts(t, dir) > 0
	return report
}

func init() {
	testenv.RegisterChild("user", func(args []string) int {
		report := userReport{}
		if err := report.fill(args[0], args[1] == "true"); err != nil {
			report.Err = err.Error()
		}
		text, _ := json.Marshal(report)
		os.Stdout.Write(text)
		return 0
	})
}

// fill mounts on dir and writes down what happens.
func (r *userReport) fill(dir string, auto bool) error {
	table := func() (row string) {
		text, _ := os.ReadFile("/proc/self/mountinfo")
		for line := range strings.Lines(string(text)) {
			if strings.Fields(line)[4] == dir {
				row = line
			}
		}
		return row
	}
	text := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	ctx := context.Background()
	if !auto {
		_, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir, AllowOther: true})
		r.AllowOther, r.AllowOtherPermission = text(err), errors.Is(err, fs.ErrPermission)
	}
	for _, how := range []string{"busy", "lazy", "close"} {
		s, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir, AutoUnmount: auto})
		if err != nil {
			return err
		}
		r.Via, r.MountRow = s.Config().Via.String(), table()
		r.Mounted = r.MountRow != ""
		go func() {
			for q := range s.Device().All(ctx) {
				basic(q)
			}
		}()
		read, err := os.ReadFile(filepath.Join(dir, fileName))
		if err != nil {
			return err
		}
		r.Read = string(read)
		switch how {
		case "busy":
			fd, err := unix.Open(filepath.Join(dir, fileName), unix.O_RDONLY, 0)
			if err != nil {
				return err
			}
			r.Busy = errors.Is(s.Unmount(ctx, 0), unix.EBUSY)
			unix.Close(fd)
			r.Unmount = text(s.Unmount(ctx, 0))
			<-s.Done()
		case "lazy":
			r.Lazy = text(s.Unmount(ctx, fuse.UnmountLazy))
		}
		r.Close = text(s.Close())
		if table() != "" {
			return fmt.Errorf("%s: still mounted", how)
		}
	}
	return nil
}
