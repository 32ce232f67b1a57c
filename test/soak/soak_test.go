package soak

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

var (
	length  = flag.Duration("for", 0, "how long to soak; the default is some seconds times KERNSTREAM_SOAK")
	late    = flag.Duration("late", 20*time.Second, "how long an answer may take that was given")
	patient = flag.Duration("patience", 2*time.Minute, "how long what must be told, answered or given back may take")
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

const (
	roundsOfLife = 10 // after so many rounds all streams are closed, and others begun
	guests       = 2  // of each part at a time
)

// A part is one source: what makes it tell, and the book of what it has to tell.
type part interface {
	name() string

	// begin starts the source, for Merge. end lets go of what the source does
	// not, after the merged stream was closed.
	begin(ctx context.Context) (kernstream.Source, error)
	end() error

	// act makes things happen until ctx is done. workers is how many
	// goroutines do so.
	act(ctx context.Context, random *rand.Rand) error
	workers() int

	// guest is the life of another watcher, which ctx ends.
	guest(ctx context.Context, random *rand.Rand) error

	// take puts an event into the book, if it is of this source: things is how many
	// that were told, and err what is wrong with it.
	take(e kernstream.Event) (mine bool, things int, err error)

	// open returns how many things have happened that were not told yet, and
	// one of them in words. While nothing happens, it comes to be 0.
	open() (n int, example string)

	// lost returns how many losses were told so far.
	lost() int

	// queued returns how much waits in the kernel.
	queued() int
}

// A soak is one run.
type soak struct {
	t      *testing.T
	random *rand.Rand
	parts  []part
	told   []atomic.Int64 // things, by part

	ctx      context.Context
	stream   *kernstream.Stream[kernstream.Event]
	consumed chan struct{} // closed when the consumer has seen the end of stream

	untold atomic.Int64 // losses that were not told, and answers that did not come
	wrong  atomic.Int64 // what was told and is not so

	first, last growth
}

func newSoak(t *testing.T) *soak {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := &soak{t: t, random: rand.New(rand.NewPCG(seed, 0)), ctx: t.Context()}
	s.parts = []part{newTicks(), newMounts(t, kernstream.ViaMountinfo), newProcesses(), newFiles(t)}
	if fanotifyWorks(t) {
		s.parts = append(s.parts, newMounts(t, kernstream.ViaFanotify))
	}
	if requests := newRequests(t); requests != nil {
		s.parts = append(s.parts, requests, newHandovers(t))
	}
	if permissions := newPermissions(t); permissions != nil {
		s.parts = append(s.parts, permissions)
	}
	if records := newRecords(t); records != nil {
		s.parts = append(s.parts, records)
	}
	s.told = make([]atomic.Int64, len(s.parts))
	return s
}

// TestSoak: everything at once. Nothing is lost untold, nothing hangs, nothing
// is told that did not happen, and nothing grows.
func TestSoak(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	s := newSoak(t)
	begun := time.Now()
	until := begun.Add(*length)
	if *length == 0 {
		until = begun.Add(testenv.Soak(3 * time.Second))
	}
	rounds := 0
	for !t.Failed() && (rounds < 2 || time.Now().Before(until)) {
		s.within("the begin of all sources", s.begin)
		for n := 0; n < roundsOfLife && !t.Failed() && (n < 2 || time.Now().Before(until)); n++ {
			s.within("the end of a round", s.round)
			s.balance()
			if rounds++; rounds == 1 {
				s.first = s.measure()
			}
			s.last = s.measureAgainst(s.first)
		}
		s.within("the end of all streams", s.end)
	}
	t.Logf("soak of %v, %d rounds: %s", time.Since(begun).Round(time.Second), rounds, s.totals())
}

// totals is the one line that says it all.
func (s *soak) totals() string {
	var counts []string
	events, lost := int64(0), 0
	for i, p := range s.parts {
		n := s.told[i].Load()
		counts = append(counts, fmt.Sprintf("%d of %s", n, p.name()))
		events += n
		lost += p.lost()
	}
	return fmt.Sprintf("%d events (%s), losses told %d, losses untold %d, told wrong %d, growth %v",
		events, strings.Join(counts, ", "), lost, s.untold.Load(), s.wrong.Load(), s.last.since(s.first))
}

// patiently calls begin until there is a fanotify group for it: all groups of the
// user may be taken for a moment, by others, or by watchers that were closed just
// now.
func patiently[W any](begin func() (W, error)) (w W, err error) {
	for deadline := time.Now().Add(*patient); ; time.Sleep(10 * time.Millisecond) {
		if w, err = begin(); !errors.Is(err, unix.EMFILE) || time.Now().After(deadline) {
			return w, err
		}
	}
}

// begin starts all sources, and their consumer.
func (s *soak) begin() {
	s.t.Helper()
	var sources []kernstream.Source
	for _, p := range s.parts {
		source, err := p.begin(s.ctx)
		if err != nil {
			s.t.Fatalf("%s: %v", p.name(), err)
		}
		sources = append(sources, source)
	}
	s.stream = kernstream.Merge(s.ctx, sources...)
	s.consumed = make(chan struct{})
	stream, random := s.stream, rand.New(rand.NewPCG(s.random.Uint64(), 1))
	go func() {
		defer close(s.consumed)
		s.consume(stream, random)
	}()
}

// consume is the one consumer of everything, which is slow at times.
func (s *soak) consume(stream *kernstream.Stream[kernstream.Event], random *rand.Rand) {
	for e := range stream.C {
		for i, p := range s.parts {
			mine, things, err := p.take(e)
			if err != nil {
				s.wrong.Add(1)
				s.t.Errorf("%s: %v: %v", p.name(), e, err)
			}
			if mine {
				s.told[i].Add(int64(things))
				break
			}
		}
		switch {
		case random.IntN(1000) == 0:
			time.Sleep(time.Duration(random.IntN(2000)) * time.Microsecond)
		case random.IntN(500_000) == 0:
			time.Sleep(time.Duration(random.IntN(700)) * time.Millisecond)
		}
	}
	if err := stream.Err(); err != nil {
		s.t.Errorf("the merged stream ended: %v", err)
	}
}

// round lets everything happen for a while, and returns when it has.
func (s *soak) round() {
	ctx, cancel := context.WithTimeout(s.ctx, time.Duration(100+s.random.IntN(900))*time.Millisecond)
	defer cancel()
	var work sync.WaitGroup
	defer work.Wait()
	for _, p := range s.parts {
		for range p.workers() {
			random := rand.New(rand.NewPCG(s.random.Uint64(), 2))
			work.Go(func() {
				if err := p.act(ctx, random); err != nil {
					s.wrong.Add(1)
					s.t.Errorf("%s: %v", p.name(), err)
				}
			})
		}
		for range guests {
			random := rand.New(rand.NewPCG(s.random.Uint64(), 3))
			work.Go(func() {
				for ctx.Err() == nil {
					life, end := context.WithTimeout(ctx, time.Duration(random.IntN(300))*time.Millisecond)
					if err := p.guest(life, random); err != nil {
						s.wrong.Add(1)
						s.t.Errorf("%s: a guest: %v", p.name(), err)
					}
					end()
				}
			})
		}
	}
}

// balance waits until the books of all parts do.
func (s *soak) balance() {
	for _, p := range s.parts {
		deadline := time.Now().Add(*patient)
		for {
			n, example := p.open()
			if n == 0 {
				break
			}
			if time.Now().After(deadline) {
				s.untold.Add(int64(n))
				s.t.Errorf("%s: %d things were not told, such as %s", p.name(), n, example)
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// end closes all streams.
func (s *soak) end() {
	s.stream.Close()
	<-s.consumed
	for _, p := range s.parts {
		if err := p.end(); err != nil {
			s.t.Errorf("%s: the end: %v", p.name(), err)
		}
	}
}

// within calls f, and ends the process with the stacks of all goroutines if it
// does not return: what hangs cannot be cleaned up.
func (s *soak) within(what string, f func()) {
	timer := time.AfterFunc(*patient, func() {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		fmt.Fprintf(os.Stderr, "soak: hung: %s\n%s\n", what, stacks)
		os.Exit(1)
	})
	defer timer.Stop()
	f()
}
