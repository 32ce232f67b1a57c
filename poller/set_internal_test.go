package poller

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestStaleEventIsDropped: an event that epoll_wait(2) returned before its
// descriptor was removed is not reported, and not taken for one of the
// descriptor that has the same place since.
func TestStaleEventIsDropped(t *testing.T) {
	s, err := NewSet[string]()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var p, q [2]int
	for _, pair := range []*[2]int{&p, &q} {
		if err := unix.Pipe2(pair[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pair[1])
	}
	old, err := s.Add(p[0], unix.EPOLLIN, "old")
	if err != nil {
		t.Fatal(err)
	}
	unix.Write(p[1], []byte("x"))
	found := make([]unix.EpollEvent, 4)
	n := 0
	s.epoll.Control(func(epfd int) { n, _ = unix.EpollWait(epfd, found, -1) })
	if n != 1 {
		t.Fatalf("epoll_wait returned %d events; want 1", n)
	}
	if err := s.Remove(old); err != nil {
		t.Fatal(err)
	}
	if got := s.resolve(found[:n], make([]Ready[string], 4)); got != 0 {
		t.Errorf("%d events of a descriptor that was removed", got)
	}
	id, err := s.Add(q[0], unix.EPOLLIN, "new")
	if err != nil {
		t.Fatal(err)
	}
	if id.index() != old.index() {
		t.Fatalf("the place was not used again: %#x after %#x", id, old)
	}
	if got := s.resolve(found[:n], make([]Ready[string], 4)); got != 0 {
		t.Errorf("%d stale events were taken for the new descriptor", got)
	}
}

// TestRemoveTakesTheRegistrationOut: after Remove the epoll instance has no
// event of a descriptor that lives on as a duplicate; it would wake the reader
// for ever.
func TestRemoveTakesTheRegistrationOut(t *testing.T) {
	s, err := NewSet[string]()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	dup, err := unix.Dup(p[0])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	id, err := s.Add(p[0], unix.EPOLLIN, "pipe")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(id); err != nil {
		t.Fatal(err)
	}
	unix.Write(p[1], []byte("x"))
	n := 0
	s.epoll.Control(func(epfd int) { n, err = unix.EpollWait(epfd, make([]unix.EpollEvent, 4), 0) })
	if n != 0 || err != nil {
		t.Errorf("epoll_wait returned %d, %v; want no event", n, err)
	}
}
