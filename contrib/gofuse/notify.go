package gofuse

import (
	"errors"
	"syscall"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/kernstream/kernstream/fuse"
)

// The methods here are fs.ServerCallbacks: what a file system tells the kernel,
// by way of the session. They return ENODEV before Mount or Attach and after the
// end of the session, ENOENT when the kernel does not know the node or the name,
// and otherwise what the kernel says. See fuse.Session.NotifyInvalInode and the
// others for what they do, and for when they must not be called.

// EntryNotify drops a name from the directory cache.
func (s *Server) EntryNotify(parent uint64, name string) gofuse.Status {
	return s.notify(func(session *fuse.Session) error { return session.NotifyInvalEntry(parent, name) })
}

// DeleteNotify says that a name was deleted.
func (s *Server) DeleteNotify(parent, child uint64, name string) gofuse.Status {
	return s.notify(func(session *fuse.Session) error { return session.NotifyDelete(parent, child, name) })
}

// InodeNotify drops what the kernel has cached of a file.
func (s *Server) InodeNotify(node uint64, offset, length int64) gofuse.Status {
	return s.notify(func(session *fuse.Session) error { return session.NotifyInvalInode(node, offset, length) })
}

// InodeNotifyStoreCache puts data into the kernel's cache of a file.
func (s *Server) InodeNotifyStoreCache(node uint64, offset int64, data []byte) gofuse.Status {
	const most = 1 << 30
	for len(data) > 0 {
		part := data[:min(len(data), most)]
		status := s.notify(func(session *fuse.Session) error { return session.NotifyStore(node, uint64(offset), part) })
		if status != gofuse.OK {
			return status
		}
		data, offset = data[len(part):], offset+int64(len(part))
	}
	return gofuse.OK
}

// InodeRetrieveCache copies what the kernel has cached of a file from offset on
// into dest, up to the first gap, and returns how much that was. It waits for the
// kernel's answer, which must be read meanwhile, by another goroutine.
func (s *Server) InodeRetrieveCache(node uint64, offset int64, dest []byte) (n int, status gofuse.Status) {
	session := s.session.Load()
	if session == nil {
		return 0, gofuse.ENODEV
	}
	most := int(session.State().MaxWrite)
	for n < len(dest) {
		part := dest[n:min(n+most, len(dest))]
		got, status := s.retrieve(session, node, offset+int64(n), part)
		if status != gofuse.OK && n == 0 {
			return 0, status
		}
		n += got
		if got < len(part) {
			break
		}
	}
	return n, gofuse.OK
}

// retrieve is InodeRetrieveCache of what fits into one answer.
func (s *Server) retrieve(session *fuse.Session, node uint64, offset int64, dest []byte) (int, gofuse.Status) {
	answer := make(chan []byte, 1)
	s.retrieving.Lock()
	s.retrieved++
	number := s.retrieved
	s.waiting[number] = answer
	s.retrieving.Unlock()
	defer func() {
		s.retrieving.Lock()
		delete(s.waiting, number)
		s.retrieving.Unlock()
	}()
	if err := session.NotifyRetrieve(number, node, uint64(offset), uint32(len(dest))); err != nil {
		return 0, statusOf(err)
	}
	select {
	case data := <-answer:
		return copy(dest, data), gofuse.OK
	case <-session.Done():
		return 0, gofuse.ENODEV
	}
}

// deliver hands a NOTIFY_REPLY to who waits for it.
func (s *Server) deliver(r *fuse.Request) {
	defer r.Close()
	const retrieveSize = 40 // of struct fuse_notify_retrieve_in
	if len(r.Body) < retrieveSize {
		return
	}
	size := int(order.Uint32(r.Body[16:]))
	data := r.Body[retrieveSize:]
	s.retrieving.Lock()
	answer := s.waiting[r.Header.Unique]
	delete(s.waiting, r.Header.Unique)
	s.retrieving.Unlock()
	if answer != nil {
		answer <- append([]byte(nil), data[:min(size, len(data))]...)
	}
}

func (s *Server) notify(send func(*fuse.Session) error) gofuse.Status {
	session := s.session.Load()
	if session == nil {
		return gofuse.ENODEV
	}
	return statusOf(send(session))
}

func statusOf(err error) gofuse.Status {
	if err == nil {
		return gofuse.OK
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return gofuse.Status(errno)
	}
	return gofuse.ENODEV // the session has ended
}
