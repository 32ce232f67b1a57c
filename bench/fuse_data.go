package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	adapter "github.com/kernstream/kernstream/contrib/gofuse"
	"github.com/kernstream/kernstream/fuse"
)

// One file of dataSize bytes, which is read past the page cache: what a request
// costs whose answer is large.

const (
	dataSize = 128 << 10
	dataNode = 2
	dataName = "data"
)

var data = bytes.Repeat([]byte("0123456789abcdef"), dataSize/16)

// dataAttr is struct fuse_attr of the file.
var dataAttr = func() []byte {
	b := make([]byte, 88)
	binary.NativeEndian.PutUint64(b, dataNode)
	binary.NativeEndian.PutUint64(b[8:], dataSize)
	binary.NativeEndian.PutUint32(b[60:], unix.S_IFREG|0o444)
	binary.NativeEndian.PutUint32(b[64:], 1)
	return b
}()

// dataEntry is the answer to its LOOKUP, struct fuse_entry_out; dataOpen to its
// OPEN, struct fuse_open_out.
var (
	dataEntry = func() []byte {
		b := make([]byte, 40, 128)
		for i, v := range []uint64{dataNode, 0, attrValid, attrValid} {
			binary.NativeEndian.PutUint64(b[8*i:], v)
		}
		return append(b, dataAttr...)
	}()
	dataOpen = func() []byte {
		b := make([]byte, 16)
		binary.NativeEndian.PutUint32(b[8:], gofuse.FOPEN_DIRECT_IO)
		return b
	}()
)

// answerData is answer with the file.
func answerData(r *fuse.Request) {
	switch r.Header.Opcode {
	case fuse.OpRead:
		offset, size := binary.NativeEndian.Uint64(r.Body[8:]), binary.NativeEndian.Uint32(r.Body[16:])
		r.Reply(data[min(offset, dataSize):min(offset+uint64(size), dataSize)])
	case fuse.OpLookup:
		if string(r.Body) == dataName+"\x00" {
			r.Reply(dataEntry)
			return
		}
		r.ReplyErrno(unix.ENOENT)
	case fuse.OpOpen:
		r.Reply(dataOpen)
	case fuse.OpFlush, fuse.OpRelease:
		r.Reply()
	default:
		answer(r)
	}
}

// serveTwo serves by two devices, each by a form of its own.
func serveTwo(serve func(ctx context.Context, d *fuse.Device) error) func(dir string, done <-chan struct{}) error {
	return func(dir string, done <-chan struct{}) error {
		session, err := fuse.Mount(context.Background(), &fuse.Config{MountPoint: dir, MaxWrite: dataSize})
		if err != nil {
			return err
		}
		defer session.Close()
		clone, err := session.Clone()
		if err != nil {
			return err
		}
		fuseDone(dir, done)
		var group sync.WaitGroup
		results := make([]error, 2)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		for i, d := range []*fuse.Device{session.Device(), clone} {
			group.Go(func() { results[i] = serve(ctx, d) })
		}
		group.Wait()
		return results[0]
	}
}

func requestsOf(ctx context.Context, d *fuse.Device) error {
	s := d.Requests(ctx)
	for r := range s.C {
		answerData(r)
	}
	return s.Err()
}

func allOf(ctx context.Context, d *fuse.Device) error {
	for r, err := range d.All(ctx) {
		if err != nil {
			return err
		}
		answerData(r)
	}
	return nil
}

// dataFS is emptyFS with the file. fill makes it copy what is read into the
// memory that it is given, as most file systems do.
type dataFS struct {
	emptyFS
	fill bool
}

func newDataFS(fill bool) dataFS {
	return dataFS{emptyFS{gofuse.NewDefaultRawFileSystem()}, fill}
}

func (dataFS) Lookup(_ <-chan struct{}, _ *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	if name != dataName {
		return gofuse.ENOENT
	}
	out.NodeId, out.EntryValid, out.AttrValid = dataNode, attrValid, attrValid
	out.Ino, out.Size, out.Mode, out.Nlink = dataNode, dataSize, unix.S_IFREG|0o444, 1
	return gofuse.OK
}

func (dataFS) Open(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	out.OpenFlags = gofuse.FOPEN_DIRECT_IO
	return gofuse.OK
}

func (f dataFS) Read(_ <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	part := data[min(in.Offset, dataSize):min(in.Offset+uint64(in.Size), dataSize)]
	if f.fill {
		part = buf[:copy(buf, part)]
	}
	return gofuse.ReadResultData(part), gofuse.OK
}

// serveGoFuseOn serves a file system of go-fuse by a session.
func serveGoFuseOn(fill bool) func(dir string, done <-chan struct{}) error {
	return func(dir string, done <-chan struct{}) error {
		server := adapter.New(&gofuse.MountOptions{MaxWrite: dataSize})
		session, err := server.Mount(context.Background(), newDataFS(fill), &fuse.Config{MountPoint: dir})
		if err != nil {
			return err
		}
		defer session.Close()
		fuseDone(dir, done)
		return server.Serve(context.Background())
	}
}

// readData reads the whole file reads times, by threads of its own.
func readData(dir string, reads, threads int) (time.Duration, error) {
	var group sync.WaitGroup
	failures := make([]error, threads)
	begin := time.Now()
	for i := range threads {
		group.Go(func() { failures[i] = readFile(dir, reads/threads) })
	}
	group.Wait()
	for _, err := range failures {
		if err != nil {
			return 0, err
		}
	}
	return time.Since(begin), nil
}

func readFile(dir string, reads int) error {
	fd, err := unix.Open(dir+"/"+dataName, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	buf := make([]byte, dataSize)
	for range reads {
		if n := rawRead(fd, buf); n != dataSize {
			return fmt.Errorf("read returns %d", n)
		}
	}
	return nil
}
