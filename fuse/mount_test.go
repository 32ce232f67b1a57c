package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// TestParityU1Config: the mount point is made canonical and must be there; it
// is a directory or a regular file. Source and subtype appear in the mount
// table. The session tells what it was mounted with.
func TestParityU1Config(t *testing.T) {
	testenv.NeedFUSE(t)
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, &fuse.Config{MountPoint: link, FSName: "the source", Subtype: "parity", ReadOnly: true})
	l.dir = dir
	c := l.s.Config()
	if c.MountPoint != dir || c.FSName != "the source" || c.Subtype != "parity" || !c.ReadOnly {
		t.Errorf("Config is %+v", c)
	}
	row := mountLine(t, dir)
	if !strings.Contains(row, ` ro,nosuid,nodev,noatime`) || !strings.Contains(row, ` - fuse.parity the\040source ro,`) {
		t.Errorf("the mount table has %q", row)
	}
	testenv.Feature(t, "FUSE mount", c.Via.String())
}

// A mount point that cannot be one is refused, by Check and by Mount alike.
func TestMountPoint(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		point string
		want  error
	}{
		{"", unix.EINVAL},
		{filepath.Join(dir, "missing"), fs.ErrNotExist},
		{filepath.Join(file, "below"), unix.ENOTDIR},
		{pipe, unix.ENOTDIR},
		{"a\x00b", unix.EINVAL},
	} {
		config := &fuse.Config{MountPoint: c.point}
		if err := config.Check(); !errors.Is(err, c.want) {
			t.Errorf("Check of %q: %v; want %v", c.point, err, c.want)
		}
		_, err := fuse.Mount(t.Context(), config)
		var operation *kernstream.OpError
		if !errors.Is(err, c.want) || !errors.As(err, &operation) || operation.Object != c.point {
			t.Errorf("Mount on %q: %v; want %v", c.point, err, c.want)
		}
	}
	if err := (&fuse.Config{MountPoint: dir}).Check(); err != nil {
		t.Error(err)
	}
	if _, err := fuse.Mount(t.Context(), nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Mount without a configuration: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("why")
	cancel(cause)
	if _, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir}); err != cause {
		t.Errorf("Mount with a context that is done: %v", err)
	}
}

// What a dead FUSE file system is mounted on is no mount point, and the error
// says why.
func TestMountOnDeadFileSystem(t *testing.T) {
	l := newLab(t, nil)
	if err := l.s.Abort(); err != nil {
		t.Fatal(err)
	}
	_, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: l.dir})
	if !errors.Is(err, unix.ENOTCONN) || !strings.Contains(err.Error(), "unmount it first") {
		t.Errorf("Mount: %v", err)
	}
}

// A regular file can be mounted on; its root is a file.
func TestMountOnFile(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, via := range []fuse.Via{fuse.ViaMount, fuse.ViaHelper} {
		t.Run(via.String(), func(t *testing.T) {
			if via == fuse.ViaHelper {
				testenv.NeedTool(t, "fusermount3")
			}
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, []byte("below"), 0o644); err != nil {
				t.Fatal(err)
			}
			l := newLab(t, &fuse.Config{MountPoint: file, Via: via})
			l.serve(func(r *fuse.Request) {
				if r.Header.Opcode == fuse.OpGetattr {
					r.Reply(fileAttr())
					return
				}
				basic(r)
			})
			if text, err := newClient(t).ask("read", file); text != content || err != nil {
				t.Errorf("read %q, %v", text, err)
			}
			// The process itself is safe, too.
			if text, err := os.ReadFile(file); string(text) != content || err != nil {
				t.Errorf("os.ReadFile: %q, %v", text, err)
			}
		})
	}
}

// TestParityU2Options: mount(2) gets rootmode, user_id, group_id and
// default_permissions; flags are nosuid, nodev and noatime; allow_other is off
// unless asked for. Every flag and every option of FUSE can be set.
func TestParityU2Options(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, c := range []struct {
		config  fuse.Config
		flags   string // of the mount
		super   []string
		without []string
	}{
		{
			fuse.Config{},
			"rw,nosuid,nodev,noatime",
			[]string{"rw", "user_id=0", "group_id=0", "default_permissions"},
			[]string{"allow_other"},
		},
		{
			fuse.Config{AllowOther: true, NoDefaultPermissions: true, ReadOnly: true},
			"ro,nosuid,nodev,noatime",
			[]string{"ro", "allow_other"},
			[]string{"default_permissions"},
		},
		{
			fuse.Config{Options: []string{"suid", "dev", "noexec", "relatime", "max_read=65536", "dirsync"}},
			"rw,noexec,relatime",
			[]string{"rw", "dirsync", "max_read=65536"},
			nil,
		},
		{
			fuse.Config{Options: []string{"strictatime", "nodiratime", "nosymfollow", "sync"}},
			"rw,nosuid,nodev,nodiratime,nosymfollow",
			[]string{"sync"},
			nil,
		},
		{fuse.Config{Options: []string{"atime", "noexec", "exec"}}, "rw,nosuid,nodev,relatime", nil, nil},
	} {
		l := newLab(t, &c.config)
		row := strings.Fields(mountLine(t, l.dir))
		super := strings.Split(row[len(row)-1], ",")
		if row[5] != c.flags {
			t.Errorf("%v: flags %q; want %q", c.config.Options, row[5], c.flags)
		}
		for _, option := range c.super {
			if !slices.Contains(super, option) {
				t.Errorf("%+v: options %q lack %s", c.config, super, option)
			}
		}
		for _, option := range c.without {
			if slices.Contains(super, option) {
				t.Errorf("%+v: options %q have %s", c.config, super, option)
			}
		}
		if err := l.s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Options that make no sense are refused before anything is mounted, and name
// what is wrong.
func TestConfigErrors(t *testing.T) {
	dir := t.TempDir()
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, c := range []struct {
		config fuse.Config
		want   error
		text   string
	}{
		{fuse.Config{Options: []string{"fd=3"}}, unix.EINVAL, `"fd=3" is set by Mount`},
		{fuse.Config{Options: []string{"allow_other"}}, unix.EINVAL, "the field AllowOther"},
		{fuse.Config{Options: []string{"ro"}}, unix.EINVAL, "the field ReadOnly"},
		{fuse.Config{Options: []string{""}}, unix.EINVAL, "no name"},
		{fuse.Config{Options: []string{"x=\x00"}}, unix.EINVAL, "zero byte"},
		{fuse.Config{PID: -1}, unix.EINVAL, "PID -1"},
		{fuse.Config{PID: 1, Namespace: file}, unix.EINVAL, "both set"},
		{fuse.Config{PID: 1, MountPoint: "x"}, unix.EINVAL, "absolute"},
		{fuse.Config{Via: 7}, unix.EINVAL, "Via 7"},
		{fuse.Config{AutoUnmount: true, Via: fuse.ViaMount}, unix.EINVAL, "AutoUnmount"},
		{fuse.Config{MaxWrite: 4095}, unix.EINVAL, "MaxWrite 4095"},
		{fuse.Config{TimeGran: 7}, unix.EINVAL, "TimeGran 7"},
		{fuse.Config{InitFlags: fuse.InitPassthrough | fuse.InitAsyncRead}, errors.ErrUnsupported, "InitFlags passthrough:"},
	} {
		if c.config.MountPoint == "" {
			c.config.MountPoint = dir
		}
		for _, err := range []error{c.config.Check(), mountError(t, &c.config)} {
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%+v: %v; want %q", c.config, err, c.text)
			}
		}
	}
}

func mountError(t testing.TB, config *fuse.Config) error {
	t.Helper()
	s, err := fuse.Mount(t.Context(), config)
	if err == nil {
		s.Close()
	}
	return err
}

// The kernel's own words about an option are in the error.
func TestMountErrorNamesTheOption(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	err := mountError(t, &fuse.Config{MountPoint: t.TempDir(), Options: []string{"bogus=1"}, Via: fuse.ViaMount})
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), `option "bogus=1"`) || !strings.Contains(err.Error(), "Unknown parameter 'bogus'") {
		t.Errorf("Mount: %v", err)
	}
}

// Commas and backslashes in names arrive as they are, whichever way is taken.
func TestOptionsAreEscaped(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, via := range []fuse.Via{fuse.ViaMount, fuse.ViaHelper} {
		t.Run(via.String(), func(t *testing.T) {
			if via == fuse.ViaHelper {
				testenv.NeedTool(t, "fusermount3")
			}
			l := newLab(t, &fuse.Config{FSName: `a,b\c`, Subtype: "x,y", Via: via})
			if row := mountLine(t, l.dir); !strings.Contains(row, ` - fuse.x,y a,b\134c `) {
				t.Errorf("the mount table has %q", row)
			}
		})
	}
}

// TestParityU3Helper: the helper mounts, by a socket that it finds in its
// environment. It can be chosen; what it says is in the error.
func TestParityU3Helper(t *testing.T) {
	path := testenv.NeedTool(t, "fusermount3")
	l := newLab(t, &fuse.Config{Via: fuse.ViaHelper, Helper: path, Subtype: "helped"})
	if got := l.s.Config().Via; got != fuse.ViaHelper {
		t.Errorf("Via is %v", got)
	}
	l.serve(basic)
	if text, err := newClient(t).ask("read", l.path(fileName)); text != content || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	err := mountError(t, &fuse.Config{MountPoint: t.TempDir(), Via: fuse.ViaHelper, Options: []string{"bogus=1"}})
	if err == nil || !strings.Contains(err.Error(), "unknown option 'bogus=1'") {
		t.Errorf("an option that the helper does not know: %v", err)
	}
}

// A helper that is not there, or does not do what a helper does, gets a clear
// error, and nothing of it is left.
func TestOddHelpers(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NeedTool(t, "sh")
	testenv.NoLeaks(t)
	dir := t.TempDir()
	script := func(text string) string {
		name := filepath.Join(dir, fmt.Sprint(len(text)))
		if err := os.WriteFile(name, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return name
	}
	point := t.TempDir()
	for _, c := range []struct {
		helper string
		want   error
		text   string
	}{
		{filepath.Join(dir, "missing"), fs.ErrNotExist, "missing"},
		{"kernstream-no-such-helper", exec.ErrNotFound, "kernstream-no-such-helper"},
		{dir, unix.EISDIR, ""},
		{script("echo out of order >&2; exit 3"), nil, "out of order: exit status 3"},
		{script("exit 0"), nil, "it sent no descriptor"},
		{script("printf x >&3; exit 0"), nil, "0 descriptors"},
		{script("echo permission: Operation not permitted >&2; exit 1"), unix.EPERM, "not permitted"},
	} {
		err := mountError(t, &fuse.Config{MountPoint: point, Via: fuse.ViaHelper, Helper: c.helper})
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v; want %v, %q", c.helper, err, c.want, c.text)
		}
	}

	// One that says nothing is ended with the context.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := testenv.Within(t, "Mount", func() error {
		_, err := fuse.Mount(ctx, &fuse.Config{MountPoint: point, Via: fuse.ViaHelper, Helper: script("exec sleep 1000")})
		return err
	})
	if err != context.DeadlineExceeded {
		t.Errorf("a helper that does nothing: %v", err)
	}
}

// TestParityU4AutoUnmount: the helper stays for as long as the session, and
// unmounts when the process dies, but leaves nothing for it to do when the
// session is closed.
func TestParityU4AutoUnmount(t *testing.T) {
	testenv.NeedTool(t, "fusermount3")
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	l := newLab(t, &fuse.Config{AutoUnmount: true})
	if n := len(children(t, "fusermount3")); n != 1 {
		t.Errorf("%d helpers", n)
	}
	l.serve(basic)
	if err := newClient(t).do("stat", l.path(fileName)); err != nil {
		t.Error(err)
	}
	if err := l.s.Close(); err != nil {
		t.Error(err)
	}
	if n := len(children(t, "fusermount3")); n != 0 || fuseMounts(t, l.dir) != 0 {
		t.Errorf("after Close there are %d helpers and %d mounts", n, fuseMounts(t, l.dir))
	}

	// A server that is killed.
	dir := t.TempDir()
	cmd := testenv.Child(t, "server", dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if fuseMounts(t, dir) != 1 {
		t.Error("the server has not mounted")
	}
	cmd.Process.Kill()
	cmd.Wait()
	for begin := time.Now(); fuseMounts(t, dir) > 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > patience {
			t.Fatal("the file system of a dead server stays mounted")
		}
	}
}

func init() {
	testenv.RegisterChild("server", func(args []string) int {
		s, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: args[0], AutoUnmount: true})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Print("\n")
		for r := range s.Device().All(context.Background()) {
			basic(r)
		}
		return 0
	})
}

// children lists the children of this process with a name, dead ones included.
func children(t testing.TB, name string) (pids []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// "123 (name) S 1 ..."
		_, rest, _ := strings.Cut(string(stat), "(")
		comm, rest, _ := strings.Cut(rest, ")")
		if f := strings.Fields(rest); comm == name && len(f) > 1 && f[1] == fmt.Sprint(os.Getpid()) {
			pids = append(pids, e.Name())
		}
	}
	return pids
}

// TestParityU5Namespace: the file system is mounted in the mount namespace of
// another process, and not in this one's.
func TestParityU5Namespace(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, via := range []fuse.Via{fuse.ViaMount, fuse.ViaHelper} {
		for _, how := range []string{"PID", "Namespace"} {
			t.Run(via.String()+" by "+how, func(t *testing.T) {
				testenv.NoLeaks(t)
				if via == fuse.ViaHelper {
					testenv.NeedTool(t, "fusermount3")
				}
				c := startClient(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS})
				dir := t.TempDir()
				config := &fuse.Config{MountPoint: dir, Via: via}
				if how == "PID" {
					config.PID = c.PID
				} else {
					file, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", c.PID))
					if err != nil {
						t.Fatal(err)
					}
					config.Namespace = file
					defer file.Close()
				}
				if err := config.Check(); err != nil {
					t.Fatal(err)
				}
				s, err := fuse.Mount(t.Context(), config)
				if err != nil {
					t.Fatal(err)
				}
				if config.Namespace != nil {
					config.Namespace.Close()
				}
				l := &lab{t: t, s: s, dir: dir}
				wait := l.serve(basic)
				if fuseMounts(t, dir) != 0 {
					t.Error("mounted in this namespace")
				}
				if text, err := c.ask("read", l.path(fileName)); text != content || err != nil {
					t.Errorf("read there: %q, %v", text, err)
				}
				if err := s.Unmount(t.Context(), 0); err != nil {
					t.Errorf("Unmount: %v", err)
				}
				if err := wait(); err != nil {
					t.Errorf("the loop ended by %v", err)
				}
				if table, err := c.ask("mounts"); err != nil || strings.Contains(table, dir) {
					t.Errorf("still mounted there: %v\n%s", err, table)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A session of another process's namespace ends with that, since it does not
// keep it alive; one of a process that is gone says so.
func TestNamespaceGone(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	c := startClient(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS})
	s, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: t.TempDir(), PID: c.PID})
	if err != nil {
		t.Fatal(err)
	}
	c.end()
	err = testenv.Within(t, "Next", func() error {
		_, err := s.Device().Next(t.Context())
		return err
	})
	if err != fuse.ErrUnmounted {
		t.Errorf("Next: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	gone := []int{c.PID}
	if high := int64(1)<<32 + int64(os.Getpid()); int64(int(high)) == high {
		gone = append(gone, int(high)) // the kernel looks at the lower half
	}
	for _, pid := range gone {
		if _, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: "/", PID: pid}); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Mount of process %d: %v", pid, err)
		}
	}
}

// TestParityU12Sessions: bad and good mount points, the helper's name, and
// mounting again with the configuration of a session that was closed.
func TestParityU12Sessions(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	if err := mountError(t, &fuse.Config{MountPoint: "/this/is/no/directory"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a bad mount point: %v", err)
	}
	dir := t.TempDir()
	config := fuse.Config{MountPoint: dir, Helper: "fusermount3"}
	for range 3 {
		s, err := fuse.Mount(t.Context(), &config)
		if err != nil {
			t.Fatal(err)
		}
		if fuseMounts(t, dir) != 1 {
			t.Error("not mounted")
		}
		if s.Config().Helper != "fusermount3" {
			t.Errorf("Helper is %q", s.Config().Helper)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if fuseMounts(t, dir) != 0 {
			t.Error("still mounted")
		}
		config = s.Config()
		config.Via = fuse.ViaAuto
	}
}
