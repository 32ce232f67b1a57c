package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// processes are the ends of processes. Its book has each watch, with the status
// that it must tell, once for each phase.
type processes struct {
	w *kernstream.ProcessWatcher

	mu   sync.Mutex
	owed map[*debt]bool
}

// A debt is what a watch has to tell. It is the watch's Tag.
type debt struct {
	status syscall.WaitStatus
	phases int
	told   int
}

func newProcesses() *processes { return &processes{owed: map[*debt]bool{}} }

func (p *processes) name() string { return "processes" }

func (p *processes) begin(ctx context.Context) (_ kernstream.Source, err error) {
	p.w, err = kernstream.NewProcessWatcher(ctx, nil)
	return p.w, err
}

func (p *processes) end() error { return nil }

func (p *processes) workers() int { return 2 }

func (p *processes) act(ctx context.Context, random *rand.Rand) error {
	for ctx.Err() == nil {
		if err := p.life(random); err != nil {
			return err
		}
	}
	return nil
}

// options returns those of another watch of a process that will have status,
// and the debt that comes with it.
func (p *processes) options(random *rand.Rand, status syscall.WaitStatus) (*kernstream.ProcessOptions, *debt) {
	o := &kernstream.ProcessOptions{}
	d := &debt{status: status, phases: 1}
	if testenv.KernelAtLeast(6, 9) && random.IntN(2) == 0 {
		o.Until = kernstream.Reaped
		d.phases = 2
	}
	o.Tag = d
	p.mu.Lock()
	defer p.mu.Unlock()
	p.owed[d] = true
	return o, d
}

// life is that of one process, which has some watches of each kind.
func (p *processes) life(random *rand.Rand) error {
	code := random.IntN(100)
	status := syscall.WaitStatus(code << 8)
	cmd := exec.Command("sh", "-c", fmt.Sprint("read line; exit ", code))
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	killed := random.IntN(4) == 0
	if killed {
		status = syscall.WaitStatus(syscall.SIGKILL)
	}
	options, _ := p.options(random, status)
	if _, err := p.w.Start(cmd, options); err != nil {
		return err
	}
	handle, err := p.w.Open(kernstream.OfProcess(cmd.Process))
	if err != nil {
		return err
	}
	defer handle.Close()
	var watches []*kernstream.Watch
	var debts []*debt
	watch := func(begin func(*kernstream.ProcessOptions) (*kernstream.Watch, error)) error {
		options, d := p.options(random, status)
		w, err := begin(options)
		watches, debts = append(watches, w), append(debts, d)
		return err
	}
	for range random.IntN(4) {
		err = errors.Join(err, watch(func(o *kernstream.ProcessOptions) (*kernstream.Watch, error) {
			return p.w.Watch(kernstream.PID(cmd.Process.Pid), o)
		}))
	}
	own, err2 := kernstream.WatchProcess(context.Background(), kernstream.OfProcess(cmd.Process), nil)
	if err = errors.Join(err, err2); err != nil {
		return err
	}
	defer own.Close()
	stop := func() {
		if len(watches) > 0 && random.IntN(3) == 0 {
			p.stop(watches[0], debts[0])
			watches, debts = watches[1:], debts[1:]
		}
	}
	stop()
	if killed {
		cmd.Process.Kill()
	}
	in.Close()
	stop()
	cmd.Wait()
	if err := watch(handle.Watch); err != nil { // what is past is told at once
		return err
	}
	stop()
	return p.own(own, status)
}

// own receives from a stream of one process.
func (p *processes) own(s *kernstream.Stream[*kernstream.ProcessEvent], status syscall.WaitStatus) error {
	select {
	case e := <-s.C:
		if e == nil || e.StatusKnown && e.Status != status {
			return fmt.Errorf("a stream of its own told %v; want %v", e, status)
		}
		return nil
	case <-time.After(*patient):
		return errors.New("a stream of its own told nothing")
	}
}

// stop ends a watch. What had been received may still be on its way through the
// merged stream.
func (p *processes) stop(w *kernstream.Watch, d *debt) {
	received := w.Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !received {
		delete(p.owed, d)
	}
}

// guest is a watcher that is closed while processes of its own run.
func (p *processes) guest(ctx context.Context, random *rand.Rand) error {
	cmd := exec.Command("sh", "-c", "read line")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer cmd.Wait()
	defer in.Close()
	w, err := kernstream.NewProcessWatcher(context.Background(), nil)
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := w.Start(cmd, nil); err != nil {
		return err
	}
	for range random.IntN(10) {
		if _, err := w.Watch(kernstream.OfProcess(cmd.Process), nil); err != nil {
			return err
		}
	}
	select {
	case e := <-w.C:
		return fmt.Errorf("told %v, but it runs", e)
	case <-ctx.Done():
		return nil
	}
}

func (p *processes) take(e kernstream.Event) (mine bool, things int, err error) {
	pe, ok := e.(*kernstream.ProcessEvent)
	if !ok {
		return false, 0, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := pe.Tag.(*debt)
	switch {
	case d.told >= d.phases:
		err = errors.New("it was told already")
	case int(pe.Phase) != d.told:
		err = fmt.Errorf("want the phase %v", kernstream.Phase(d.told))
	case pe.StatusKnown && pe.Status != d.status:
		err = fmt.Errorf("the status is %#x; want %#x", pe.Status, d.status)
	}
	if d.told++; d.told == d.phases {
		delete(p.owed, d)
	}
	return true, 1, err
}

func (p *processes) open() (n int, example string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for d := range p.owed {
		example = fmt.Sprintf("status %#x, of which %d of %d phases were told", d.status, d.told, d.phases)
		break
	}
	return len(p.owed), example
}

func (p *processes) lost() int   { return 0 }
func (p *processes) queued() int { return 0 }
