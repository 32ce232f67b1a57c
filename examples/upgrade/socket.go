package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
)

// A session on its way from one process to another over a unix socket: the length
// of its State, with which come the descriptors of its devices; the State as
// JSON; and a byte that the receiver sends back when it has taken over.

// A parcel is a session on its way. Its descriptors are bare ones: as an os.File,
// each would be in the runtime's poller, and wake this process for each request.
type parcel struct {
	state   []byte
	devices []int
}

// pack makes a parcel of a session.
func pack(session *fuse.Session) (*parcel, error) {
	state, err := json.Marshal(session.State())
	if err != nil {
		return nil, err
	}
	files, err := session.Files()
	if err != nil {
		return nil, err
	}
	p := &parcel{state: state}
	for _, f := range files {
		defer f.Close()
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			p.close()
			return nil, os.NewSyscallError("fcntl", err)
		}
		p.devices = append(p.devices, fd)
	}
	return p, nil
}

// adopt makes a session of a parcel.
func (p *parcel) adopt() (*fuse.Session, error) {
	var state fuse.State
	if err := json.Unmarshal(p.state, &state); err != nil {
		return nil, err
	}
	var files []*os.File
	for _, fd := range p.devices {
		files = append(files, os.NewFile(uintptr(fd), "/dev/fuse"))
	}
	p.devices = nil
	session, err := fuse.Adopt(files, state)
	if err != nil {
		for _, f := range files {
			f.Close()
		}
	}
	return session, err
}

func (p *parcel) close() {
	for _, fd := range p.devices {
		unix.Close(fd)
	}
	p.devices = nil
}

// send sends a session.
func send(conn *net.UnixConn, session *fuse.Session) error {
	p, err := pack(session)
	if err != nil {
		return err
	}
	defer p.close()
	return p.send(conn)
}

// send sends a parcel, which may be empty.
func (p *parcel) send(conn *net.UnixConn) error {
	length := binary.NativeEndian.AppendUint32(nil, uint32(len(p.state)))
	var rights []byte
	if len(p.devices) > 0 {
		rights = unix.UnixRights(p.devices...)
	}
	if _, _, err := conn.WriteMsgUnix(length, rights, nil); err != nil {
		return err
	}
	_, err := conn.Write(p.state)
	return err
}

// most is how large a State may be, and maxDevices how many devices it may have.
const (
	most       = 1 << 24
	maxDevices = 16
)

// receive receives a parcel.
func receive(conn *net.UnixConn) (*parcel, error) {
	length, rights := make([]byte, 4), make([]byte, unix.CmsgSpace(4*maxDevices))
	n, oob, flags, _, err := conn.ReadMsgUnix(length, rights)
	if err != nil {
		return nil, err
	}
	p := &parcel{}
	messages, err := unix.ParseSocketControlMessage(rights[:oob])
	for i := range messages {
		fds, _ := unix.ParseUnixRights(&messages[i])
		p.devices = append(p.devices, fds...)
	}
	size := binary.NativeEndian.Uint32(length)
	if err == nil && (n != len(length) || flags&unix.MSG_CTRUNC != 0 || size > most) {
		err = fmt.Errorf("a message of %d bytes, flags %#x", n, flags)
	}
	if err == nil {
		p.state = make([]byte, size)
		_, err = io.ReadFull(conn, p.state)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// fromPredecessor takes the session over from the one that serves it. There is
// none if nobody answers at the socket.
func fromPredecessor(socket string) (*fuse.Session, error) {
	conn, err := dial(socket)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * patience))
	p, err := receive(conn)
	if err != nil {
		return nil, fmt.Errorf("from the predecessor: %w", err)
	}
	session, err := p.adopt()
	if err != nil {
		return nil, err
	}
	if err := done(conn); err != nil {
		// It has given up on this one, and serves on.
		return nil, errors.Join(err, leave(session))
	}
	return session, nil
}

func dial(socket string) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
}

// leave lets go of a session that is another process's.
func leave(session *fuse.Session) error {
	ctx, cancel := patiently()
	defer cancel()
	return errors.Join(session.Drain(ctx), session.Close())
}

// done says that a parcel was taken over, awaitDone waits for that.
func done(conn *net.UnixConn) error {
	_, err := conn.Write([]byte{'k'})
	return err
}

func awaitDone(conn *net.UnixConn) error {
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}
