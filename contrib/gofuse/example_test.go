package gofuse_test

import (
	"context"
	"log"
	"os"
	"os/signal"

	"github.com/hanwen/go-fuse/v2/fs"

	"github.com/kernstream/kernstream/contrib/gofuse"
	"github.com/kernstream/kernstream/fuse"
)

// go-fuse's loopback file system, until it is unmounted or the program is
// interrupted.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	root, err := fs.NewLoopbackRoot("/srv/files")
	if err != nil {
		log.Fatal(err)
	}
	server := gofuse.New(nil)
	files := fs.NewNodeFS(root, &fs.Options{ServerCallbacks: server})
	session, err := server.Mount(ctx, files, &fuse.Config{MountPoint: "/mnt"})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	if err := server.Serve(ctx); err != nil && ctx.Err() == nil {
		log.Print(err)
	}
}
