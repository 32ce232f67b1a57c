package fuse_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// A process that is killed while it mounts is gone: the thread that asks its own
// server does not keep the device open.
func TestKilledWhileMounting(t *testing.T) {
	testenv.NeedFUSE(t)
	for _, via := range []fuse.Via{fuse.ViaMount, fuse.ViaHelper} {
		if via == fuse.ViaHelper {
			testenv.NeedTool(t, "fusermount3")
		}
		for range testenv.SoakN(8) {
			cmd := testenv.Child(t, "mounter", t.TempDir(), via.String())
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS} // the mounts go with it
			_, out := testenv.StartPiped(t, cmd)
			if _, err := out.ReadByte(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
			cmd.Process.Kill()
			testenv.Within(t, "a killed process that mounted by "+via.String(), cmd.Wait)
			if !cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
				t.Errorf("by %v: it ended by itself", via)
			}
		}
	}
}

// mounters mount at the same time, so that each is asked about while others are.
const mounters = 4

func init() {
	testenv.RegisterChild("mounter", func(args []string) int {
		config := fuse.Config{Via: fuse.ViaMount}
		if args[1] == fuse.ViaHelper.String() {
			config.Via = fuse.ViaHelper
		}
		failed := make(chan error)
		for range mounters {
			c := config
			var err error
			if c.MountPoint, err = os.MkdirTemp(args[0], ""); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			go func() {
				for {
					s, err := fuse.Mount(context.Background(), &c)
					if err == nil {
						err = s.Close()
					}
					if err != nil {
						failed <- err
						return
					}
				}
			}()
		}
		os.Stdout.Write([]byte{'\n'})
		fmt.Fprintln(os.Stderr, <-failed)
		return 1
	})
}
