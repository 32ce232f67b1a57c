package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
)

// A keeper is the process that a server is started by with -keep. It has
// descriptors of the devices, and so the connection outlives the server; and it
// starts another one, which gets them.

// keeperVar is set for a server whose descriptor 3 is a socket to its keeper.
const keeperVar = "UPGRADE_KEEPER"

// keeper runs servers until one ends as it should.
func keeper(socket, backing, mountPoint string) error {
	kept := &parcel{}
	defer func() { kept.close() }()
	for {
		var err error
		kept, err = keep(kept, socket, backing, mountPoint)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || !crashed(exit) {
			return err
		}
		fmt.Fprintln(os.Stderr, "upgrade: the server has died, starting another one:", err)
	}
}

// crashed tells whether a server has died, as opposed to giving up.
func crashed(exit *exec.ExitError) bool {
	const panicked = 2
	return !exit.Exited() || exit.ExitCode() == panicked
}

// keep runs a server and gives it what is kept. It returns what there is to be kept
// when that has ended.
func keep(kept *parcel, socket, backing, mountPoint string) (*parcel, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return kept, err
	}
	defer ours.Close()
	cmd := exec.Command("/proc/self/exe", socket, backing, mountPoint)
	cmd.Env = append(os.Environ(), keeperVar+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return kept, err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		for {
			select {
			case s := <-signals:
				cmd.Process.Signal(s) // to unmount
			case <-ctx.Done():
				return
			}
		}
	}()
	if err := kept.send(ours); err == nil {
		// It sends what it has mounted or taken over, or nothing.
		if p, err := receive(ours); err == nil {
			kept.close()
			kept = p
		}
	}
	return kept, cmd.Wait()
}

// socketPair returns a socket for this process and one for a child.
func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs = os.NewFile(uintptr(pair[1]), "socket")
	if ours, err = unixConn(pair[0]); err != nil {
		theirs.Close()
	}
	return ours, theirs, err
}

// unixConn makes a connection of a descriptor, which it owns.
func unixConn(fd int) (*net.UnixConn, error) {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// fromKeeper returns the socket to the keeper, if there is a keeper, and the
// session that it had kept, if there was one.
func fromKeeper() (*net.UnixConn, *fuse.Session, error) {
	if os.Getenv(keeperVar) == "" {
		return nil, nil, nil
	}
	os.Unsetenv(keeperVar)
	conn, err := unixConn(3)
	if err != nil {
		return nil, nil, err
	}
	p, err := receive(conn)
	if err != nil {
		return nil, nil, fmt.Errorf("from the keeper: %w", err)
	}
	if len(p.devices) == 0 {
		return conn, nil, nil
	}
	conn.Close() // there is nothing else to be kept
	session, err := p.adopt()
	if err != nil {
		return nil, nil, err
	}
	if err := session.NotifyResend(); errors.Is(err, unix.EINVAL) {
		fmt.Fprintln(os.Stderr, "upgrade: what the dead server had read is lost: Linux 6.9 would send it again")
	} else if err != nil {
		return nil, nil, errors.Join(err, leave(session))
	}
	return nil, session, nil
}
