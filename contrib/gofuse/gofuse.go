// Package gofuse runs file systems that are written for go-fuse
// (github.com/hanwen/go-fuse/v2) on a session of kernstream:
//
//	server := gofuse.New(nil)
//	files := fs.NewNodeFS(root, &fs.Options{ServerCallbacks: server})
//	session, err := server.Mount(ctx, files, &fuse.Config{MountPoint: "/mnt"})
//	if err != nil {
//		return err
//	}
//	defer session.Close()
//	return server.Serve(ctx)
//
// What that adds to go-fuse's own server is what a session has: a file system can
// be stopped without being unmounted, and go on, here or in another process; it is
// mounted in other namespaces, and rootless; two devices serve it at a time; ends
// have names.
//
// # How it differs from go-fuse's own server
//
//   - RawFileSystem.Init is not called, since it takes go-fuse's own server.
//     File systems of package fs notify through fs.Options.ServerCallbacks, as
//     above; others call the methods of [Server].
//   - Data of files is not spliced, and there is no passthrough: READ copies what
//     the file system returns into one buffer, unless it was put there to begin
//     with.
//   - How to mount is up to a fuse.Config. Of the options of go-fuse, those about the
//     mount itself are ignored: Options, DirectMount, DirectMountStrict,
//     DirectMountFlags, IDMappedMount, MaxStackDepth, and MaxInflightRequestBytes.
//     Unlike go-fuse's, a mount has default_permissions unless
//     Config.NoDefaultPermissions is set.
//
// It needs go-fuse 2.12, whose ProtocolServer is marked experimental.
package gofuse

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/kernstream/kernstream/fuse"
)

// A Server runs one file system. It implements fs.ServerCallbacks.
type Server struct {
	options  gofuse.MountOptions
	files    gofuse.RawFileSystem
	protocol *gofuse.ProtocolServer
	session  atomic.Pointer[fuse.Session]
	single   sync.Mutex // held by handlers if there is to be one at a time

	retrieving sync.Mutex // guards what follows
	retrieved  uint64     // number of the last retrieval
	waiting    map[uint64]chan []byte
}

// New returns a server with options, which are go-fuse's; nil are the defaults.
func New(options *gofuse.MountOptions) *Server {
	s := &Server{waiting: map[uint64]chan []byte{}}
	if options != nil {
		s.options = *options
	}
	// What takes more than requests and answers is not to be had.
	s.options.DisabledCapabilities |= gofuse.CAP_PASSTHROUGH | gofuse.CAP_ALLOW_IDMAP | gofuse.CAP_OVER_IO_URING |
		gofuse.CAP_MAP_ALIGNMENT | gofuse.CAP_HAS_INODE_DAX
	return s
}

// Mount mounts files as config says, and attaches the server to the session. What
// the kernel is asked for at the start comes from the options of the server, as
// far as config does not say; the session is the caller's to close.
func (s *Server) Mount(ctx context.Context, files gofuse.RawFileSystem, config *fuse.Config) (*fuse.Session, error) {
	if config == nil {
		config = &fuse.Config{}
	}
	c := *config
	if err := s.fill(&c, files); err != nil {
		return nil, err
	}
	session, err := fuse.Mount(ctx, &c)
	if err != nil {
		return nil, err
	}
	if err := s.Attach(files, session); err != nil {
		session.Close()
		return nil, err
	}
	return session, nil
}

// fill sets what config leaves open.
func (s *Server) fill(config *fuse.Config, files gofuse.RawFileSystem) error {
	o := &s.options
	wanted, err := s.negotiate(files, everything())
	if err != nil {
		return err
	}
	if config.InitFlags == 0 {
		config.InitFlags = wanted.flags &^ ours
	}
	if config.MaxWrite == 0 {
		config.MaxWrite = wanted.maxWrite
	}
	if config.MaxReadahead == 0 && o.MaxReadAhead > 0 {
		config.MaxReadahead = uint32(min(o.MaxReadAhead, math.MaxInt32))
	}
	if config.MaxBackground == 0 {
		config.MaxBackground = uint16(min(max(o.MaxBackground, 0), math.MaxUint16))
	}
	if config.CongestionThreshold == 0 {
		config.CongestionThreshold = uint16(min(max(o.CongestionThreshold, 0), math.MaxUint16))
	}
	if config.FSName == "" {
		config.FSName = o.FsName
	}
	if config.Subtype == "" {
		config.Subtype = o.Name
	}
	config.AllowOther = config.AllowOther || o.AllowOther
	return nil
}

// Attach makes the server that of a session that is there: one that was mounted
// otherwise, or adopted. A file system on an adopted session must know the nodes
// and handles that the kernel has from the predecessor, which those of package
// fs do not. What the session agreed on with the kernel must be what the options
// of the server ask for; the error names the flags that are not.
func (s *Server) Attach(files gofuse.RawFileSystem, session *fuse.Session) error {
	state := session.State()
	init := session.InitRequest()
	if len(init) < initSize {
		return fmt.Errorf("gofuse: %s: INIT with %d bytes", session.Config().MountPoint, len(init))
	}
	setFlags(init, state.Flags)
	agreed, err := s.negotiate(files, init)
	if err != nil {
		return err
	}
	if odd := state.Flags &^ agreed.flags &^ ours; odd != 0 {
		return fmt.Errorf("gofuse: %s: the session has flags that the file system's options do not ask for: %v: %w",
			session.Config().MountPoint, odd, errors.ErrUnsupported)
	}
	s.files, s.protocol = files, agreed.protocol
	s.session.Store(session)
	return nil
}

// ours are the flags that a session asks for itself.
const ours = fuse.InitAbortError | fuse.InitMaxPages | fuse.InitInitExt

// The layout of INIT and its answer in include/uapi/linux/fuse.h.
const (
	headerSize = 40 // of a request
	outSize    = 16 // of an answer
	initSize   = headerSize + 16
)

var order = binary.NativeEndian

// everything is an INIT of a kernel that can do all there is.
func everything() []byte {
	b := make([]byte, headerSize+64)
	order.PutUint32(b, uint32(len(b)))
	order.PutUint32(b[4:], uint32(fuse.OpInit))
	order.PutUint64(b[8:], 2)
	order.PutUint32(b[headerSize:], 7)
	order.PutUint32(b[headerSize+4:], 45)
	order.PutUint32(b[headerSize+8:], math.MaxInt32)
	setFlags(b, math.MaxUint64)
	return b
}

// setFlags sets the flags of an INIT.
func setFlags(init []byte, flags fuse.InitFlags) {
	order.PutUint32(init[headerSize+12:], uint32(flags))
	if len(init) >= headerSize+20 {
		order.PutUint32(init[headerSize+16:], uint32(flags>>32))
	}
}

// agreement is what a ProtocolServer answers to INIT.
type agreement struct {
	protocol *gofuse.ProtocolServer
	flags    fuse.InitFlags
	maxWrite uint32
}

// negotiate lets a ProtocolServer answer INIT. It changes nothing of the server's.
func (s *Server) negotiate(files gofuse.RawFileSystem, init []byte) (agreement, error) {
	options := s.options
	a := agreement{protocol: gofuse.NewProtocolServer(files, &options)}
	out := make([]byte, 4096)
	n, status := a.protocol.HandleRequest([][]byte{init}, [][]byte{out})
	if status != gofuse.OK || n < outSize+36 || order.Uint32(out[4:]) != 0 {
		return a, fmt.Errorf("gofuse: go-fuse does not take the kernel's INIT: %v", status)
	}
	body := out[outSize:]
	a.flags = fuse.InitFlags(order.Uint32(body[12:])) | fuse.InitFlags(order.Uint32(body[32:]))<<32
	a.maxWrite = order.Uint32(body[20:])
	return a, nil
}

// bufferSize is how large an answer may become: as large as the largest READ, and
// what else the kernel asks for by size (attributes, directories).
func (s *Server) bufferSize(state fuse.State) int {
	const leastRead = 128 << 10
	page := os.Getpagesize()
	return (max(int(state.MaxWrite), leastRead)+page-1)/page*page + page
}
