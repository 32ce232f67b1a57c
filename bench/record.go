package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/recorder"
)

// The group "record": a record of all files that are opened, from a full queue to the list
// with its verdict, beside the protocol that acknowledges each.
//
// The recorder is a process of its own, which is stopped while the files are opened.

// recordVar is set in that process: to what it is, where, and how many files there are.
const recordVar = "KERNSTREAM_BENCH_RECORD"

func benchRecord(b *bench) error {
	if os.Geteuid() != 0 {
		fmt.Fprintln(b.progress, "record: needs root, left out")
		return nil
	}
	for _, c := range []struct {
		name  string
		mount func(b *bench, dir string) (unmount func(), err error)
		least map[string]float64 // how many times as fast as the peer
	}{
		{"tmpfs", recordTmpfs, map[string]float64{"in process": 15, "served": 8}},
		{"ext4", recordExt4, map[string]float64{"in process": 15}},
		{"overlay", recordOverlay, map[string]float64{"in process": 2.5}},
	} {
		if !b.wants(b.group + "/" + c.name) {
			continue
		}
		if err := benchRecordOn(b, c.name, c.mount, c.least); err != nil {
			return err
		}
	}
	return nil
}

func benchRecordOn(b *bench, name string, mount func(*bench, string) (func(), error), least map[string]float64) error {
	if err := mountTree(b.dir); err != nil {
		return err
	}
	defer unix.Unmount(b.dir, unix.MNT_DETACH)
	tree := &fileTree{dir: filepath.Join(b.dir, "files"), files: b.scale(50_000, 3_000)}
	if err := os.Mkdir(tree.dir, 0o755); err != nil {
		return err
	}
	unmount, err := mount(b, tree.dir)
	if errors.Is(err, exec.ErrNotFound) {
		fmt.Fprintf(b.progress, "%s/%s: %v, left out\n", b.group, name, err)
		return nil
	}
	if err != nil {
		return err
	}
	defer unmount()
	if err := tree.make(); err != nil {
		return err
	}
	for _, how := range []string{"in process", "served"} {
		if how == "served" && name != "tmpfs" {
			continue
		}
		err := b.run(name+"/"+how, func() error {
			o, err := b.interleave(1,
				contender{"kernstream", func(s *sampler) error { return recordFull(b, tree, s, how) }},
				contender{"acknowledged one by one", func(s *sampler) error { return receiveAcknowledged(b, tree, s) }})
			if err != nil {
				return err
			}
			var goals map[string]goal
			if !b.quick {
				goals = map[string]goal{"acknowledged one by one": maxRatio(1 / least[how])}
			}
			b.tell(o, tree.files, figure{"", "time", "ns/file", nanosecond, median}, goals)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func recordTmpfs(_ *bench, dir string) (func(), error) {
	return func() { unix.Unmount(dir, unix.MNT_DETACH) }, mountTree(dir)
}

// recordExt4 mounts a file system in a file in memory.
func recordExt4(b *bench, dir string) (func(), error) {
	image := filepath.Join(b.dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, 256<<20); err != nil {
		return nil, err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-N", "60000", image).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	out, err := exec.Command("losetup", "-f", "--show", image).Output()
	if err != nil {
		return nil, fmt.Errorf("losetup: %w", err)
	}
	device := strings.TrimSpace(string(out))
	free := func() { exec.Command("losetup", "-d", device).Run() }
	if err := unix.Mount(device, dir, "ext4", 0, ""); err != nil {
		free()
		return nil, os.NewSyscallError("mount", err)
	}
	return func() { unix.Unmount(dir, unix.MNT_DETACH); free() }, nil
}

// recordOverlay mounts an overlay, whose files will be in its upper directory.
func recordOverlay(b *bench, dir string) (func(), error) {
	for _, name := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(b.dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	options := fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", b.dir, b.dir, b.dir)
	err := os.NewSyscallError("mount", unix.Mount("bench", dir, "overlay", 0, options))
	return func() { unix.Unmount(dir, unix.MNT_DETACH) }, err
}

// recordFull lets a recorder work off a full queue.
func recordFull(b *bench, tree *fileTree, s *sampler, how string) error {
	socket := filepath.Join(b.dir, "socket")
	a, err := startHelper(b.ctx, fmt.Sprintf("%s=%s\n%s\n%d\n%s", recordVar, how, tree.dir, tree.files, socket))
	if err != nil {
		return err
	}
	defer a.close()
	pid, err := a.do("ready")
	if err != nil {
		return err
	}
	var client *recorder.Recording
	if how == "served" {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		os.Remove(socket)
		if client, err = recorder.Connect(b.ctx, conn, nil); err != nil {
			return err
		}
		defer client.Close()
	}
	if err := stopProcess(int(pid)); err != nil {
		return err
	}
	err = tree.open(0, tree.files)
	begin := monotonic()
	unix.Kill(int(pid), unix.SIGCONT)
	if err != nil {
		return err
	}
	end := int64(0)
	if client != nil {
		end, err = receiveRecord(client, tree.files)
	} else {
		end, err = a.do("end")
	}
	s.add("time", float64(end-begin)/float64(tree.files))
	return err
}

func stopProcess(pid int) error {
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return os.NewSyscallError("kill", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || time.Now().After(deadline) {
			return errors.Join(err, errors.New("the recorder does not stop"))
		}
		if strings.Contains(string(text), ") T ") {
			return nil
		}
	}
}

// monotonic is a time that all processes share, in nanoseconds.
func monotonic() int64 {
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return now.Nano()
}

// receiveRecord receives n files, ends the recording, and returns when its list was there,
// complete.
func receiveRecord(r *recorder.Recording, n int) (end int64, err error) {
	for range n {
		if a := <-r.C; a == nil {
			return 0, fmt.Errorf("it ended: %w", r.Err())
		}
	}
	r.Close()
	list, err := r.List()
	if err != nil {
		return 0, err
	}
	end = monotonic()
	if !list.Complete || len(list.Entries) != n {
		return 0, fmt.Errorf("%d files of %d: %q", len(list.Entries), n, list.Reasons)
	}
	return end, nil
}

// recordMain is the recorder. It returns its exit status.
func recordMain(words []string) int {
	if err := recordHelper(words[0], words[1], words[2], words[3]); err != nil {
		fmt.Fprintln(os.Stderr, "bench: recorder:", err)
		return 1
	}
	return 0
}

func recordHelper(how, dir, files, socket string) error {
	n, err := strconv.Atoi(files)
	if err != nil {
		return err
	}
	commands := bufio.NewScanner(os.Stdin)
	commands.Scan()
	ctx := context.Background()
	target := recorder.Directory(dir)
	if how == "served" {
		listener, err := net.Listen("unix", socket)
		if err != nil {
			return err
		}
		defer listener.Close()
		fmt.Println(os.Getpid())
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		return recorder.Serve(ctx, conn, &recorder.ServeOptions{Target: target})
	}
	r, err := recorder.Record(ctx, target, nil)
	if err != nil {
		return err
	}
	defer r.Close()
	fmt.Println(os.Getpid())
	end, err := receiveRecord(r, n)
	if err != nil {
		return err
	}
	fmt.Println(end)
	for commands.Scan() {
		// What was written must be read before this process ends.
	}
	return nil
}
