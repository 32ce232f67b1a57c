package fuse_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"sync"
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

// Two loops answer requests at the same time.
func ExampleSession_Clone() {
	ctx := context.Background()
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: "/mnt"})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	if _, err := session.Clone(); err != nil {
		log.Fatal(err)
	}
	var loops sync.WaitGroup
	for _, d := range session.Devices() {
		loops.Go(func() {
			for r, err := range d.All(ctx) {
				if err != nil {
					fmt.Println(err)
					return
				}
				r.ReplyErrno(syscall.ENOSYS)
			}
		})
	}
	loops.Wait()
}

// A newer version of the program goes on with the file system, and gets it as
// open files of its own.
func ExampleSession_Drain() {
	ctx := context.Background()
	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: "/mnt"})
	if err != nil {
		log.Fatal(err)
	}
	// ... and after a while of serving:
	if err := session.Drain(ctx); err != nil {
		log.Fatal(err)
	}
	files, err := session.Files()
	if err != nil {
		log.Fatal(err)
	}
	state, err := json.Marshal(session.State())
	if err != nil {
		log.Fatal(err)
	}
	successor := exec.Command("/usr/bin/newer", string(state))
	successor.ExtraFiles = files // descriptors 3, 4, ...
	if err := successor.Start(); err != nil {
		session.Resume() // and go on serving
		return
	}
	session.Close() // the file system stays mounted
}

// The successor: what it was given becomes a session like any other.
func ExampleAdopt() {
	var state fuse.State
	if err := json.Unmarshal([]byte(os.Args[1]), &state); err != nil {
		log.Fatal(err)
	}
	session, err := fuse.Adopt([]*os.File{os.NewFile(3, "/dev/fuse")}, state)
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	for r, err := range session.Device().All(context.Background()) {
		if err != nil {
			log.Fatal(err)
		}
		r.ReplyErrno(syscall.ENOSYS)
	}
}
