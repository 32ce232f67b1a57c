package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// What file events are compared with: the least that a program can do, and
// loops of the shapes that programs in use have.

// receiveRaw is the floor: read(2), and a look at each event; a descriptor is
// closed.
func receiveRaw(tree *fileTree, s *sampler, flags uint) error {
	fd, err := tree.group(flags)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := tree.open(0, tree.files); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	if flags == 0 {
		buf = buf[:4096]
	}
	return timeEvents(s, tree.files, func() error {
		for seen := 0; seen < tree.files; {
			n, err := unix.Read(fd, buf)
			if err != nil {
				return os.NewSyscallError("read", err)
			}
			for b := buf[:n]; len(b) > 0; b = b[binary.NativeEndian.Uint32(b):] {
				if err := lookAt(b, flags); err != nil {
					return err
				}
				seen++
			}
		}
		return nil
	})
}

// lookAt finds what the event at the start of b says.
func lookAt(b []byte, flags uint) error {
	if flags == 0 {
		return unix.Close(int(int32(binary.NativeEndian.Uint32(b[16:]))))
	}
	record := b[24:binary.NativeEndian.Uint32(b)]
	handle := binary.NativeEndian.Uint32(record[12:])
	name := record[20+handle:]
	if end := bytes.IndexByte(name, 0); end <= 0 || record[0] != unix.FAN_EVENT_INFO_TYPE_DFID_NAME {
		return errors.New("an event without a name")
	}
	return nil
}

// fileEvent is an event of the peers.
type fileEvent struct {
	fd   int
	path string
	mask uint64
	pid  int
}

// peerBatch is how many events the loop below has to deal with at a time. The
// library whose shape it has (opcoder0/fanotify, watching a mount) fails when
// more are queued than its buffer holds.
const peerBatch = 3_000

// receiveReadlink reads many events, finds out the path of each by readlink(2)
// on its descriptor, and sends them through a channel that has room for 4,096.
func receiveReadlink(tree *fileTree, s *sampler) error {
	fd, err := tree.group(0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	c := make(chan fileEvent, 4096)
	failed := make(chan error, 1)
	serve := func(n int) {
		buf := make([]byte, 4096*24)
		for seen := 0; seen < n; {
			size, err := unix.Read(fd, buf)
			if err != nil {
				failed <- err
				return
			}
			for b := buf[:size]; len(b) > 0; b = b[binary.NativeEndian.Uint32(b):] {
				number := int(int32(binary.NativeEndian.Uint32(b[16:])))
				path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", number))
				if err != nil {
					failed <- err
					return
				}
				c <- fileEvent{number, path, binary.NativeEndian.Uint64(b[8:]), int(binary.NativeEndian.Uint32(b[20:]))}
				seen++
			}
		}
	}
	files := min(tree.files, 2*peerBatch)
	for from := 0; from < files; from += peerBatch {
		to := min(from+peerBatch, files)
		if err := tree.open(from, to); err != nil {
			return err
		}
		err := timeEvents(s, to-from, func() error {
			go serve(to - from)
			for range to - from {
				select {
				case e := <-c:
					unix.Close(e.fd)
				case err := <-failed:
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// clientVar is set in the process that is told of descriptors: to the number of
// the process that has them.
const clientVar = "KERNSTREAM_BENCH_CLIENT"

// clientMain finds out the path of each descriptor that a line names, by
// readlink(2), and acknowledges it. It returns its exit status.
func clientMain(pid string) int {
	paths := make(map[string]bool)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		path, err := os.Readlink("/proc/" + pid + "/fd/" + strings.TrimPrefix(lines.Text(), "fd:"))
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench: client:", err)
			return 1
		}
		paths[path] = true
		fmt.Println("ack")
	}
	return 0
}

// receiveAcknowledged reads one event at a time, tells another process the
// number of its descriptor over a pipe, and closes it when that process, which
// finds out the path by readlink(2), has acknowledged it over another. So does a
// snapshotter that learns which files a container opens (stargz-snapshotter).
func receiveAcknowledged(b *bench, tree *fileTree, s *sampler) error {
	fd, err := tree.group(0)
	if err != nil {
		return err
	}
	group := os.NewFile(uintptr(fd), "fanotify")
	defer group.Close()
	files := min(tree.files, 2*peerBatch)
	if err := tree.open(0, files); err != nil {
		return err
	}
	cmd := command(b.ctx, clientVar+"="+strconv.Itoa(os.Getpid()))
	tell, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	acks, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	wait, err := start(cmd)
	if err != nil {
		return err
	}
	err = timeEvents(s, files, func() error { return serveAcknowledged(group, tell, acks, files) })
	tell.Close()
	return errors.Join(err, wait())
}

func serveAcknowledged(group io.Reader, tell io.Writer, acks io.Reader, n int) error {
	events, answers := bufio.NewReader(group), bufio.NewScanner(acks)
	for range n {
		var e unix.FanotifyEventMetadata
		if err := binary.Read(events, binary.NativeEndian, &e); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(tell, "fd:%d\n", e.Fd); err != nil {
			return err
		}
		if !answers.Scan() {
			return errors.New("no acknowledgement")
		}
		unix.Close(int(e.Fd))
	}
	return nil
}

// linePrinter prints events as kernstream files does for people, buffered.
type linePrinter struct{ out *bufio.Writer }

func newLinePrinter(out io.Writer) *linePrinter {
	return &linePrinter{bufio.NewWriterSize(out, 64<<10)}
}

func (p *linePrinter) line(e *kernstream.FileEvent) {
	p.out.WriteString(e.Ops.String())
	p.out.WriteByte(' ')
	p.out.WriteString(strconv.Itoa(e.PID))
	p.out.WriteByte(' ')
	p.out.WriteString(e.Path)
	p.out.WriteByte('\n')
}

func (p *linePrinter) flush() error { return p.out.Flush() }
