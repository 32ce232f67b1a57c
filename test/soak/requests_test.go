package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/fusewire"
	"github.com/kernstream/kernstream/internal/testenv"
)

// requests are those of a FUSE session, whose clients look up names that are not
// there. Its book has each name: it must be asked for once, and who asked gets the
// answer soon after it was given.
type requests struct {
	dir     string
	guests  string   // where guests mount
	clients *program // who serves must not wait for an answer: it could not be killed
	count   atomic.Int64
	taken   atomic.Int64
	s       *fuse.Session

	mu    sync.Mutex
	calls map[string]*call
}

type call struct {
	asked    int
	answered time.Time
}

// newRequests returns nil where FUSE file systems cannot be mounted.
func newRequests(t *testing.T) *requests {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Run("requests", func(t *testing.T) { testenv.Missing(t, "needs to open /dev/fuse", err) })
		return nil
	}
	unix.Close(fd)
	return makeRequests(t)
}

func makeRequests(t *testing.T) *requests {
	dir := testenv.MountDir(t) // what is left there is unmounted with it
	return &requests{
		dir: testenv.Mkdir(t, dir, "own"), guests: testenv.Mkdir(t, dir, "guests"),
		clients: startClients(t), calls: map[string]*call{},
	}
}

func (p *requests) name() string { return "requests" }

func (p *requests) begin(ctx context.Context) (kernstream.Source, error) {
	s, err := fuse.Mount(ctx, &fuse.Config{MountPoint: p.dir, FSName: "soak"})
	if err != nil {
		return nil, err
	}
	p.s = s
	return s.Device().Requests(ctx), nil
}

func (p *requests) end() error { return p.s.Close() }

func (p *requests) workers() int { return 2 }

func (p *requests) act(ctx context.Context, random *rand.Rand) error {
	for ctx.Err() == nil {
		if err := p.lookUp(); err != nil {
			return err
		}
		if random.IntN(10) == 0 {
			time.Sleep(time.Duration(random.IntN(1000)) * time.Microsecond)
		}
	}
	return nil
}

// lookUp looks up another name.
func (p *requests) lookUp() error {
	name := fmt.Sprint("q", p.count.Add(1))
	c := &call{}
	p.mu.Lock()
	p.calls[name] = c
	p.mu.Unlock()
	err := p.clients.lookUp(p.dir + "/" + name)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.calls, name)
	if took := time.Since(c.answered); err != nil || c.asked != 1 || took > *late {
		return fmt.Errorf("%s: %v, asked for %d times, %v after the answer", name, err, c.asked, took)
	}
	return nil
}

// unmountIdle unmounts a session that nobody uses for long: who records a command marks each
// mount that comes, and holds it meanwhile.
func unmountIdle(s *fuse.Session) (err error) {
	for deadline := time.Now().Add(*patient); time.Now().Before(deadline); {
		if err = s.Unmount(context.Background(), 0); !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	return err
}

// mountGuest mounts a session on a directory of its own in where.
func mountGuest(where string) (s *fuse.Session, dir string, err error) {
	if dir, err = os.MkdirTemp(where, ""); err != nil {
		return nil, "", err
	}
	if s, err = fuse.Mount(context.Background(), &fuse.Config{MountPoint: dir}); err != nil {
		os.Remove(dir)
	}
	return s, dir, err
}

// guest is a session that comes and goes, by one of its ends.
func (p *requests) guest(ctx context.Context, random *rand.Rand) error {
	s, dir, err := mountGuest(p.guests)
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	served := make(chan error, 1)
	go func() {
		for r, err := range s.Device().All(context.Background()) {
			if err != nil {
				served <- err
				return
			}
			serve(r)
		}
		served <- nil
	}()
	for range random.IntN(20) {
		if err := p.clients.lookUp(dir + "/x"); err != nil {
			s.Close()
			return err
		}
	}
	var want error
	switch random.IntN(3) {
	case 0:
		err = unmountIdle(s)
	case 1:
		err, want = s.Abort(), fuse.ErrAborted
	default:
		err = s.Close()
	}
	if err != nil {
		s.Close()
		return err
	}
	if got := <-served; !errors.Is(got, want) {
		err = fmt.Errorf("the loop ended by %v; want %v", got, want)
	}
	return errors.Join(err, s.Close())
}

// serve answers what comes beside look-ups, and those with ENOENT.
func serve(r *fuse.Request) error {
	switch r.Header.Opcode {
	case fuse.OpGetattr:
		return r.Reply(fusewire.AppendAttr(nil, &fusewire.Attr{Ino: 1, Mode: unix.S_IFDIR | 0o755, Nlink: 2, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}))
	case fuse.OpForget, fuse.OpBatchForget:
		return r.Close()
	}
	return r.ReplyErrno(syscall.ENOENT)
}

func (p *requests) take(e kernstream.Event) (mine bool, things int, err error) {
	r, ok := e.(*fuse.Request)
	if !ok {
		return false, 0, nil
	}
	return true, 1, p.receive(r)
}

// receive writes a request down, and answers it.
func (p *requests) receive(r *fuse.Request) (err error) {
	if r.Header.Opcode != fuse.OpLookup {
		return serve(r)
	}
	name := strings.TrimRight(string(r.Body), "\x00")
	p.mu.Lock()
	if c := p.calls[name]; c != nil {
		c.asked++
		c.answered = time.Now()
	} else {
		err = errors.New("nobody asked for it")
	}
	p.mu.Unlock()
	if p.taken.Add(1)%16 == 0 { // some are answered later, and not in order
		go func() {
			time.Sleep(time.Millisecond)
			serve(r)
		}()
		return err
	}
	return errors.Join(err, serve(r))
}

func (p *requests) open() (n int, example string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, c := range p.calls {
		example = fmt.Sprintf("%s, which waits for an answer; it was answered at %v", name, c.answered)
		break
	}
	return len(p.calls), example
}

func (p *requests) lost() int   { return 0 }
func (p *requests) queued() int { return p.s.Outstanding() }
