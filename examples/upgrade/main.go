// Command upgrade shows a directory on another one, and can be replaced while it
// is in use:
//
//	upgrade /run/upgrade.sock /srv/files /mnt
//
// Started again with the same arguments, by a newer version of it say, it takes
// the file system over from the one that runs, which ends. Whoever uses the files
// notices a pause of some milliseconds, and no error. Ctrl-C unmounts.
//
// With -keep, a second process keeps descriptors of the file system, and starts the
// server again when it dies, by SIGKILL even. Requests that the dead one had read
// are sent again (Linux 6.9), so nobody notices that, either.
//
// It is an example of a server that can be handed over: main.go serves, socket.go
// passes a session from process to process, keeper.go keeps one, and loopback.go
// is the file system, which needs no memory of what its predecessor did: a file's
// node ID is its inode number, and opening a file leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/kernstream/kernstream/fuse"
)

func main() {
	keep := flag.Bool("keep", false, "start the server again when it dies")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: upgrade [-keep] SOCKET DIRECTORY MOUNTPOINT")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 3 {
		flag.Usage()
		os.Exit(2)
	}
	serve := run
	if *keep {
		serve = keeper
	}
	if err := serve(flag.Arg(0), flag.Arg(1), flag.Arg(2)); err != nil {
		fmt.Fprintln(os.Stderr, "upgrade:", err)
		os.Exit(1)
	}
}

// run serves until the file system is unmounted, a signal comes, or a successor
// has taken over.
func run(socket, backing, mountPoint string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	syscall.Umask(0) // modes are as the kernel wants them
	session, err := begin(ctx, socket, mountPoint)
	if err != nil {
		return err
	}
	// The predecessor has stopped, so the directory is as it has left it.
	files, err := newLoopback(backing)
	if err != nil {
		return errors.Join(err, session.Close())
	}
	// A predecessor that has handed over leaves its socket behind.
	os.Remove(socket)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return errors.Join(err, session.Close())
	}
	defer listener.Close()
	fmt.Println("serving", os.Getpid())

	successors := make(chan *net.UnixConn)
	go accept(listener, successors)
	for {
		served := make(chan error, 1)
		go func() { served <- serve(session, files) }()
		select {
		case <-ctx.Done():
			return errors.Join(session.Close(), files.clean())
		case err := <-served:
			return errors.Join(err, session.Close(), files.clean()) // unmounted, or aborted
		case conn := <-successors:
			err := handOver(session, conn)
			if err := <-served; err != nil {
				return errors.Join(err, session.Close())
			}
			if err == nil {
				listener.SetUnlinkOnClose(false)
				return session.Close() // which leaves the file system to the successor
			}
			fmt.Fprintln(os.Stderr, "upgrade: the successor has failed, going on:", err)
			session.Resume()
		}
	}
}

// begin takes the session over from whoever has it, or mounts.
func begin(ctx context.Context, socket, mountPoint string) (*fuse.Session, error) {
	kept, session, err := fromKeeper()
	if err != nil || session != nil {
		return session, err
	}
	session, err = fromPredecessor(socket)
	if err == nil && session == nil {
		session, err = fuse.Mount(ctx, &fuse.Config{MountPoint: mountPoint, FSName: "upgrade", Subtype: "upgrade"})
		if err == nil {
			_, err = session.Clone()
		}
	}
	if kept != nil {
		defer kept.Close()
		if err == nil {
			err = send(kept, session)
		}
	}
	if err != nil && session != nil {
		session.Close()
	}
	return session, err
}

// serve answers requests by all devices until the session ends or is drained.
func serve(session *fuse.Session, files *loopback) error {
	var readers sync.WaitGroup
	for _, d := range session.Devices() {
		readers.Go(func() {
			for r, err := range d.All(context.Background()) {
				if err != nil {
					return // which the session knows, too
				}
				body, errno := files.handle(r)
				switch {
				case r.Header.Opcode == fuse.OpForget, r.Header.Opcode == fuse.OpBatchForget:
					r.Close()
				case errno != 0:
					r.ReplyErrno(errno)
				default:
					r.Reply(body)
				}
			}
		})
	}
	readers.Wait()
	return session.Err()
}

// accept passes on who wants to take over.
func accept(listener *net.UnixListener, successors chan<- *net.UnixConn) {
	for {
		conn, err := listener.AcceptUnix()
		if err != nil {
			return
		}
		successors <- conn
	}
}

// patience is how long either side of a hand-over waits for the other.
const patience = 30 * time.Second

// patiently returns a context for one side of a hand-over.
func patiently() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

// handOver gives the session to who is at the other end of conn. It is drained
// then, whether or not that succeeds.
func handOver(session *fuse.Session, conn *net.UnixConn) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	ctx, cancel := patiently()
	defer cancel()
	if err := session.Drain(ctx); err != nil {
		return err
	}
	if err := send(conn, session); err != nil {
		return err
	}
	return awaitDone(conn)
}
