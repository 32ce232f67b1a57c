package docs_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/recorder"
)

// What coming-from.md shows after "After", as it is there.

func printMounts(ctx context.Context, out io.Writer) error {
	w, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{NoInitial: true})
	if err != nil {
		return err
	}
	for e := range w.C {
		for _, m := range e.Mounted {
			fmt.Fprintln(out, "mounted", m.MountPoint)
		}
		for _, m := range e.Unmounted {
			fmt.Fprintln(out, "unmounted", m.MountPoint)
		}
		for _, c := range slices.Concat(e.Moved, e.Changed) {
			fmt.Fprintln(out, "changed", c.New.MountPoint)
		}
	}
	return w.Err()
}

func waitForMount(ctx context.Context, path string) error {
	w, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{
		Filter: func(m *kernstream.Mount) bool { return m.MountPoint == path },
	})
	if err != nil {
		return err
	}
	defer w.Close()
	for e := range w.C {
		if len(e.Mounted) > 0 {
			return nil
		}
	}
	return w.Err()
}

func watchConfig(ctx context.Context, dir string, load func(name string)) error {
	w, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{
		Path: dir,
		Ops:  kernstream.OpCloseWrite | kernstream.OpMovedTo | kernstream.OpEventOnChild,
	})
	if err != nil {
		return err
	}
	for e := range w.C {
		if e.Ops.Has(kernstream.OpOverflow) {
			load(dir) // something may have been missed: everything
			continue
		}
		load(e.Path)
	}
	return w.Err()
}

func printWrites(ctx context.Context, mount string, out io.Writer) error {
	w, err := kernstream.WatchFiles(ctx, nil, kernstream.Mark{
		Type: kernstream.MarkMount,
		Path: mount,
		Ops:  kernstream.OpModify | kernstream.OpCloseWrite,
	})
	if err != nil {
		return err
	}
	for e := range w.C {
		fmt.Fprintln(out, e.Path, e.Ops, e.PID)
	}
	return w.Err()
}

func denyKeys(ctx context.Context, dir string) error {
	w, err := kernstream.WatchFiles(ctx, &kernstream.FileOptions{Class: kernstream.ClassContent}, kernstream.Mark{
		Path: dir,
		Ops:  kernstream.OpOpenPerm | kernstream.OpEventOnChild,
	})
	if err != nil {
		return err
	}
	for e := range w.C {
		if strings.HasSuffix(e.Path, ".key") {
			err = e.Deny(0)
		} else {
			err = e.Allow()
		}
		if err != nil {
			log.Print(err) // it was too late, for example
		}
		e.Close()
	}
	return w.Err()
}

func printLengths(ctx context.Context, dir *os.File, out io.Writer) error {
	w, err := kernstream.WatchFiles(ctx, &kernstream.FileOptions{Descriptors: true}, kernstream.Mark{
		Type: kernstream.MarkMount,
		Ops:  kernstream.OpCloseWrite,
		Dir:  dir,
	})
	if err != nil {
		return err
	}
	for e := range w.C {
		switch {
		case e.Ops.Has(kernstream.OpOverflow):
			fmt.Fprintln(out, "events were lost")
		case e.Err != nil:
			fmt.Fprintln(out, e.Err) // the file could not be opened
		default:
			if info, err := e.File().Stat(); err == nil {
				fmt.Fprintln(out, e.Path, "has", info.Size(), "bytes")
			}
		}
		e.Close()
	}
	return w.Err()
}

func waitAll(ctx context.Context, pids []int, out io.Writer) error {
	w, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	for _, pid := range pids {
		if _, err := w.Watch(kernstream.PID(pid), nil); err != nil {
			return err
		}
	}
	for range pids {
		e, ok := <-w.C
		if !ok {
			return w.Err() // the time of ctx is up, for example
		}
		fmt.Fprintln(out, e)
	}
	return nil
}

func watchTwice(ctx context.Context, pid int, keep <-chan struct{}, out io.Writer) error {
	w, err := kernstream.NewProcessWatcher(ctx, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	process, err := w.Open(kernstream.PID(pid))
	if err != nil {
		return err
	}
	defer process.Close()
	if _, err := process.Watch(&kernstream.ProcessOptions{Tag: "log"}); err != nil {
		return err
	}
	restart, err := process.Watch(&kernstream.ProcessOptions{Tag: "restart"})
	if err != nil {
		return err
	}
	for events := 2; events > 0; {
		select {
		case e, ok := <-w.C:
			if !ok {
				return w.Err()
			}
			fmt.Fprintln(out, e.Tag, e)
			events--
		case <-keep:
			keep = nil
			if received := restart.Stop(); !received {
				events-- // and it will not be delivered
			}
		}
	}
	return nil
}

func serveEmpty(ctx context.Context, dir string) error {
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir})
	if err != nil {
		return err
	}
	defer session.Close()
	for r, err := range session.Device().All(ctx) {
		switch {
		case err != nil:
			return err
		case r.Header.Opcode == fuse.OpGetattr:
			r.Reply(rootAttributes())
		case r.Header.Opcode == fuse.OpForget:
			r.Close()
		default:
			r.ReplyErrno(syscall.ENOENT)
		}
	}
	return nil
}

func serveByTwo(ctx context.Context, dir string, handle func(*fuse.Request)) error {
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: dir, ReadOnly: true})
	if err != nil {
		return err
	}
	defer session.Close() // unmounts
	if _, err := session.Clone(); err != nil {
		return err
	}
	var readers errgroup.Group
	for _, device := range session.Devices() {
		readers.Go(func() error {
			for r, err := range device.All(ctx) {
				if err != nil {
					return err
				}
				handle(r)
			}
			return nil
		})
	}
	return readers.Wait()
}

func recordOpens(ctx context.Context, cmd *exec.Cmd, file string) error {
	r, err := recorder.Record(ctx, recorder.Command(cmd), nil)
	if err != nil {
		return err
	}
	for a := range r.C {
		log.Print(a.First, " ", a.Path)
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	list, err := r.List()
	if err != nil {
		return err
	}
	if !list.Complete {
		return fmt.Errorf("not all files are known: %s", strings.Join(list.Reasons, "; "))
	}
	return list.WriteFile(file)
}

// rootAttributes is struct fuse_attr_out of an empty root directory.
func rootAttributes() []byte {
	b := make([]byte, 104)
	binary.NativeEndian.PutUint64(b[16:], 1)
	binary.NativeEndian.PutUint32(b[16+60:], syscall.S_IFDIR|0o755)
	binary.NativeEndian.PutUint32(b[16+64:], 2)
	return b
}
