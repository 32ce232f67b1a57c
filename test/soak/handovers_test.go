package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// handovers are the requests of a FUSE file system whose server changes all the time: it
// gets and loses devices, each with a reader, and hands over to a successor. Its book is
// that of requests, so no request may be lost on the way, or come twice.
type handovers struct {
	*requests
	streams chan *kernstream.Stream[*fuse.Request] // of devices, which are to be read

	changing sync.Mutex // held by whoever changes the server
}

// A handed request is of this part.
type handed struct {
	*fuse.Request
}

// mostDevices is how many readers a server has, at most.
const mostDevices = 3

func newHandovers(t *testing.T) *handovers {
	return &handovers{requests: makeRequests(t)}
}

func (p *handovers) name() string { return "handed requests" }

func (p *handovers) begin(ctx context.Context) (_ kernstream.Source, err error) {
	if p.s, err = fuse.Mount(ctx, &fuse.Config{MountPoint: p.dir, FSName: "soak"}); err != nil {
		return nil, err
	}
	p.streams = make(chan *kernstream.Stream[*fuse.Request], mostDevices)
	p.read(p.s.Device())
	return kernstream.NewStream(ctx, p.produce), nil
}

// read lets a device be read.
func (p *handovers) read(d *fuse.Device) { p.streams <- d.Requests(context.Background()) }

// produce passes on what comes from any device.
func (p *handovers) produce(ctx context.Context, emit func(*handed) bool) error {
	var readers sync.WaitGroup
	defer readers.Wait()
	for {
		select {
		case s := <-p.streams:
			readers.Go(func() {
				defer s.Close()
				defer context.AfterFunc(ctx, func() { s.Close() })()
				for r := range s.C {
					if !emit(&handed{r}) {
						return
					}
				}
			})
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// workers are so many that some requests are read and not delivered when something changes.
func (p *handovers) workers() int { return 6 }

func (p *handovers) act(ctx context.Context, random *rand.Rand) error {
	for ctx.Err() == nil {
		var err error
		switch {
		case random.IntN(50) == 0 && p.changing.TryLock():
			err = p.change(random)
			p.changing.Unlock()
		default:
			err = p.lookUp()
		}
		if err != nil {
			return err
		}
	}
	// One device is left, so that what is open can be compared.
	p.changing.Lock()
	defer p.changing.Unlock()
	var err error
	for _, d := range p.s.Devices()[1:] {
		err = errors.Join(err, d.Close())
	}
	return err
}

// change lets the server have one device more or less, or a successor.
func (p *handovers) change(random *rand.Rand) error {
	devices := p.s.Devices()
	switch random.IntN(4) {
	case 0:
		if len(devices) == mostDevices {
			return nil
		}
		d, err := p.s.Clone()
		if err == nil {
			p.read(d)
		}
		return err
	case 1:
		if len(devices) == 1 {
			return nil
		}
		return devices[random.IntN(len(devices))].Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), *patient)
	defer cancel()
	if err := p.s.Drain(ctx); err != nil {
		return err
	}
	successor, err := succeed(p.s, random.IntN(4) == 0)
	if err != nil {
		return err
	}
	if successor == nil {
		p.s.Resume()
	} else {
		if err := p.s.Close(); err != nil {
			return err
		}
		p.s = successor
	}
	for _, d := range p.s.Devices() {
		p.read(d)
	}
	return nil
}

// succeed returns a successor of a session, or none if it is to fail.
func succeed(s *fuse.Session, fail bool) (*fuse.Session, error) {
	files, err := s.Files()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(s.State())
	if err != nil {
		return nil, err
	}
	var state fuse.State
	if err := json.Unmarshal(text, &state); err != nil {
		return nil, err
	}
	if fail {
		state.Undelivered = append(state.Undelivered, fuse.Undelivered{Device: len(files)})
	}
	successor, err := fuse.Adopt(files, state)
	if !fail {
		return successor, err
	}
	for _, f := range files {
		f.Close()
	}
	if !errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("a successor without a device: %w", err)
	}
	return nil, nil
}

// guest is a session that is handed over once: drained, or, as if its server had died, with
// requests that it does not answer.
func (p *handovers) guest(ctx context.Context, random *rand.Rand) error {
	s, dir, err := mountGuest(p.guests)
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	defer func() { s.Close() }()
	for range random.IntN(mostDevices) {
		if _, err := s.Clone(); err != nil {
			return err
		}
	}
	resend := testenv.KernelAtLeast(6, 9) && random.IntN(2) == 0
	ended := serveAll(s, resend)
	life, stop := context.WithCancel(context.Background())
	defer stop()
	looked := make(chan error, 2)
	for range cap(looked) {
		go func() { looked <- p.lookUpUntil(life, dir) }()
	}
	<-ctx.Done()
	successor, err := handOver(s, resend)
	if err != nil {
		return err
	}
	s = successor
	if err := errors.Join(ended(), err); err != nil {
		return err
	}
	ended = serveAll(s, false)
	if resend {
		if err := s.NotifyResend(); err != nil {
			return err
		}
	}
	stop()
	for range cap(looked) {
		err = errors.Join(err, <-looked)
	}
	return errors.Join(err, s.Close(), ended())
}

// handOver lets a session have a successor, which sends again what was not answered, or
// gets it.
func handOver(s *fuse.Session, resend bool) (successor *fuse.Session, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), *patient)
	defer cancel()
	if resend {
		cancel()
	}
	if err := s.Drain(ctx); err != nil && !resend {
		return nil, err
	}
	if successor, err = succeed(s, false); err != nil {
		return nil, err
	}
	return successor, s.Close()
}

// serveAll serves all devices of a session, until it ends. lazy leaves some requests without
// an answer.
func serveAll(s *fuse.Session, lazy bool) (ended func() error) {
	devices := s.Devices()
	errs := make(chan error, len(devices))
	for _, d := range devices {
		go func() {
			n := 0
			for r, err := range d.All(context.Background()) {
				if err != nil {
					errs <- err
					return
				}
				if n++; !lazy || n%8 != 0 || r.Header.Opcode != fuse.OpLookup {
					serve(r)
				}
			}
			errs <- nil
		}()
	}
	return func() (err error) {
		for range devices {
			err = errors.Join(err, <-errs)
		}
		return err
	}
}

// lookUpUntil looks up names that are not there.
func (p *handovers) lookUpUntil(ctx context.Context, dir string) error {
	for ctx.Err() == nil {
		if err := p.clients.lookUp(dir + "/x"); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

func (p *handovers) take(e kernstream.Event) (mine bool, things int, err error) {
	r, ok := e.(*handed)
	if !ok {
		return false, 0, nil
	}
	return true, 1, p.receive(r.Request)
}

func (p *handovers) queued() int {
	p.changing.Lock()
	defer p.changing.Unlock()
	return p.s.Outstanding()
}
