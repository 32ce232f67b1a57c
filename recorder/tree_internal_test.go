package recorder

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procconn"
	"github.com/kernstream/kernstream/poller"
)

// TestTreeNumberAgain: a number that was a member's, and is given to a process that no member has forked, is
// of no member any more.
func TestTreeNumberAgain(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	tree := &tree{socket: poller.Own(fds[0]), buf: make([]byte, 4096), members: map[int]bool{10: true}}
	defer tree.close()
	fork := func(parent, child uint32) {
		b := procconn.Listen(0)[:36] // with the headers of a message
		binary.NativeEndian.PutUint32(b, 36+16+16)
		binary.NativeEndian.PutUint16(b[32:], 16+16)
		b = binary.NativeEndian.AppendUint32(b, procconn.Fork)
		b = append(b, make([]byte, 12)...)
		for _, pid := range []uint32{parent, parent, child, child} {
			b = binary.NativeEndian.AppendUint32(b, pid)
		}
		if _, err := unix.Write(fds[1], b); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		parent, child uint32
		member        bool
	}{{10, 11, true}, {11, 12, true}, {1, 11, false}, {12, 11, true}, {1, 13, false}} {
		fork(c.parent, c.child)
		if member, lost := tree.has(int(c.child)); member != c.member || lost != nil {
			t.Errorf("%d, forked by %d, is a member: %v, %v; want %v", c.child, c.parent, member, lost, c.member)
		}
	}
}
