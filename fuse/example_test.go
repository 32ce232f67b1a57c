package fuse_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
)

// attributes is struct fuse_attr_out of an empty root directory.
func attributes() []byte {
	b := make([]byte, 104)
	binary.NativeEndian.PutUint64(b[16:], 1)
	binary.NativeEndian.PutUint32(b[16+60:], syscall.S_IFDIR|0o755)
	binary.NativeEndian.PutUint32(b[16+64:], 2)
	return b
}

// An empty directory, until it is unmounted or the program is interrupted.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: "/mnt"})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	for r, err := range session.Device().All(ctx) {
		switch {
		case err != nil:
			fmt.Println(err)
		case r.Header.Opcode == fuse.OpGetattr:
			r.Reply(attributes())
		default:
			r.ReplyErrno(syscall.ENOENT)
		}
	}
}

// Requests are a stream like any other, here together with the mount table.
func ExampleDevice_Requests() {
	ctx := context.Background()
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: "/mnt"})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	mounts, err := kernstream.WatchMounts(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	requests := session.Device().Requests(ctx)
	for {
		select {
		case e := <-mounts.C:
			fmt.Println(e)
		case r, ok := <-requests.C:
			if !ok {
				fmt.Println("ended:", requests.Err())
				return
			}
			go func() {
				// An interrupted client does not wait any more.
				<-r.Context().Done()
				r.ReplyErrno(syscall.EINTR)
			}()
		}
	}
}

// A configuration can be looked at before it is used.
func ExampleConfig_Check() {
	config := &fuse.Config{MountPoint: "/", Options: []string{"allow_other"}}
	fmt.Println(config.Check())
	// Output: fuse: check /: option "allow_other" is set by the field AllowOther: invalid argument
}

// Flags have the kernel's names.
func ExampleInitFlags() {
	flags := fuse.DefaultInitFlags | fuse.InitDoReaddirplus
	fmt.Println(flags.Has(fuse.InitAsyncRead), fuse.OpReaddirplus)
	fmt.Println(flags)
	// Output:
	// true readdirplus
	// async_read|big_writes|do_readdirplus|parallel_dirops
}
