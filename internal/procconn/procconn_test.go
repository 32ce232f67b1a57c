package procconn

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestLive: the kernel takes the request, and tells of a child.
func TestLive(t *testing.T) {
	testenv.NeedRoot(t, "the process events connector")
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		testenv.Missing(t, "needs the connector", err)
	}
	defer unix.Close(fd)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20})
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: Group}); err != nil {
		t.Fatal(err)
	}
	const id = 4711
	if err := unix.Sendto(fd, Listen(id), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	next := func() Event {
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		for err == unix.EINTR {
			n, err = unix.Read(fd, buf)
		}
		if err != nil {
			t.Fatal(err)
		}
		e, err := Decode(buf[:n])
		if err != nil {
			t.Fatalf("%v: %x", err, buf[:n])
		}
		return e
	}
	for {
		if e := next(); e.What == Ack && e.ID == id {
			if e.Errno != 0 {
				t.Fatal(e.Errno)
			}
			break
		}
	}
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Second; {
		if e := next(); e.What == Fork && e.PID == cmd.Process.Pid {
			if e.TGID != e.PID || e.ParentTGID != os.Getpid() {
				t.Errorf("the event is %+v; want process %d of %d", e, cmd.Process.Pid, os.Getpid())
			}
			return
		}
	}
	t.Error("no event of the child")
}

// TestDecodeOdd: what is cut short is an error, and never read beyond its end.
func TestDecodeOdd(t *testing.T) {
	fork := make([]byte, headerSize+connectorSize+eventSize+24)
	fork[0], fork[4] = byte(len(fork)), unix.NLMSG_DONE
	fork[headerSize], fork[headerSize+4] = connectorProc, connectorProc
	body := headerSize + connectorSize
	fork[body] = Fork
	for i := range 4 {
		fork[body+eventSize+4*i] = byte(i + 1)
	}
	e, err := Decode(fork)
	if want := (Event{What: Fork, ParentPID: 1, ParentTGID: 2, PID: 3, TGID: 4}); err != nil || e != want {
		t.Errorf("%+v, %v; want %+v", e, err, want)
	}
	for n := range body + eventSize + 16 {
		if _, err := Decode(fork[:n]); err == nil {
			t.Errorf("%d bytes are taken for a message", n)
		}
		short := append([]byte(nil), fork[:n]...)
		if n >= headerSize {
			short[0] = byte(n)
			if _, err := Decode(short); err == nil {
				t.Errorf("a message of %d bytes is taken for an event", n)
			}
		}
	}
	fork[body] = 2 // PROC_EVENT_EXEC
	if e, err := Decode(fork); err != nil || e.What != ^uint32(0) {
		t.Errorf("another kind: %+v, %v", e, err)
	}
}

// FuzzDecode: no bytes make it fail otherwise than by an error.
func FuzzDecode(f *testing.F) {
	f.Add(Listen(1))
	f.Add(make([]byte, 76))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Decode(b)
		if err != nil && e.What != ^uint32(0) {
			t.Errorf("%+v with %v", e, err)
		}
	})
}
