// Command memfs mounts a file system that keeps everything in memory:
//
//	mkdir /tmp/m && memfs /tmp/m
//
// and in another terminal
//
//	echo hello > /tmp/m/file; ls -l /tmp/m; fusermount3 -u /tmp/m
//
// It ends when it is unmounted, or by Ctrl-C, which unmounts it. It is an
// example of a server on a session of package fuse: main.go serves, fs.go is the
// file system. The layouts of requests and answers are in examples/internal/wire.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/kernstream/kernstream/fuse"
)

func main() {
	readOnly := flag.Bool("ro", false, "mount read-only")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: memfs [-ro] DIRECTORY")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, &fuse.Config{MountPoint: flag.Arg(0), FSName: "memfs", Subtype: "memfs", ReadOnly: *readOnly}); err != nil {
		fmt.Fprintln(os.Stderr, "memfs:", err)
		os.Exit(1)
	}
}

// run mounts and serves until the file system is unmounted or ctx is done.
func run(ctx context.Context, config *fuse.Config) error {
	session, err := fuse.Mount(ctx, config)
	if err != nil {
		return err
	}
	fmt.Println("mounted on", session.Config().MountPoint)
	return errors.Join(serve(ctx, session), session.Close())
}

// serve answers each request before it reads the next.
func serve(ctx context.Context, session *fuse.Session) error {
	fs := newFS(uint32(os.Geteuid()), uint32(os.Getegid()))
	for r, err := range session.Device().All(ctx) {
		if err != nil {
			if ctx.Err() != nil {
				return nil // Ctrl-C
			}
			return err
		}
		body, errno := fs.handle(r)
		reply(r, body, errno)
	}
	return nil
}

// reply answers r. Requests that have no answer are closed.
func reply(r *fuse.Request, body []byte, errno syscall.Errno) {
	switch {
	case r.Header.Opcode == fuse.OpForget, r.Header.Opcode == fuse.OpBatchForget:
		r.Close()
	case errno != 0:
		r.ReplyErrno(errno)
	default:
		// Nobody is left to be told if this fails: the session has ended.
		r.Reply(body)
	}
}
