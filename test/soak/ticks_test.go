package soak

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/kernstream/kernstream"
)

// ticks is a source of the program's own: numbers, of which each must come, in
// order.
type ticks struct {
	wanted  chan int     // how many to make
	made    atomic.Int64 // how many were to be made, since the start
	arrived atomic.Int64
	next    int64 // the number that comes next
}

type tick struct {
	When   time.Time
	number int64
}

func (e *tick) Time() time.Time { return e.When }
func (e *tick) String() string  { return fmt.Sprint("tick ", e.number) }

func newTicks() *ticks { return &ticks{wanted: make(chan int)} }

func (p *ticks) name() string { return "ticks" }

func (p *ticks) begin(ctx context.Context) (kernstream.Source, error) {
	return kernstream.NewStream(ctx, func(ctx context.Context, emit func(*tick) bool) error {
		for number := p.made.Load(); ; {
			select {
			case n := <-p.wanted:
				for range n {
					if !emit(&tick{When: time.Now(), number: number}) {
						return ctx.Err()
					}
					number++
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}), nil
}

func (p *ticks) end() error { return nil }

func (p *ticks) workers() int { return 1 }

func (p *ticks) act(ctx context.Context, random *rand.Rand) error {
	for ctx.Err() == nil {
		n := 1 + random.IntN(100)
		select {
		case p.wanted <- n:
			p.made.Add(int64(n))
		case <-ctx.Done():
		}
		time.Sleep(time.Duration(random.IntN(2000)) * time.Microsecond)
	}
	return nil
}

// guest is a stream that ends before it has told all, merged with itself.
func (p *ticks) guest(ctx context.Context, random *rand.Rand) error {
	s := kernstream.NewStream(ctx, func(ctx context.Context, emit func(*tick) bool) error {
		for number := int64(0); emit(&tick{When: time.Now(), number: number}); number++ {
			time.Sleep(time.Duration(random.IntN(200)) * time.Microsecond)
		}
		return ctx.Err()
	})
	merged := kernstream.Merge(context.Background(), s)
	next := int64(0)
	for e := range merged.C {
		if number := e.(*tick).number; number != next {
			return fmt.Errorf("tick %d; want %d", number, next)
		}
		next++
	}
	return merged.Close()
}

func (p *ticks) take(e kernstream.Event) (mine bool, things int, err error) {
	t, ok := e.(*tick)
	if !ok {
		return false, 0, nil
	}
	if t.number != p.next {
		err = fmt.Errorf("want tick %d", p.next)
	}
	p.next = t.number + 1
	p.arrived.Add(1)
	return true, 1, err
}

func (p *ticks) open() (n int, example string) {
	n = int(p.made.Load() - p.arrived.Load())
	return n, fmt.Sprintf("the last of %d ticks", p.made.Load())
}

func (p *ticks) lost() int   { return 0 }
func (p *ticks) queued() int { return 0 }
