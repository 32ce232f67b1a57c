package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// A judge is a program that answers permission events. It is another process than
// the one with all other sources, which starts processes all the time: one that
// answers must not.
//
// The files that it guards are called by a rule, which says how they are treated, and
// a number. The default answer is to deny.
type judge struct {
	dir      string
	options  kernstream.FileOptions
	w        *kernstream.FileWatcher
	before   uint64 // default answers of the watchers that were closed
	errands  chan func()
	handlers sync.WaitGroup
	held     []*kernstream.FileEvent // by ruleHeld
}

// How a judge treats a file.
const (
	ruleAllow  = "allow"
	ruleDeny   = "deny"
	ruleLate   = "late"   // allowed when the deadline is over
	ruleClosed = "closed" // closed without an answer
	ruleHeld   = "held"   // not answered at all
	ruleTwice  = "twice"  // allowed and denied by two goroutines
	ruleSlow   = "slow"   // allowed, when nothing was received for two deadlines
)

// What a judge tells of an event: the answer that it gave, or that there was none.
const (
	gaveAllow   = "allow"
	gaveDeny    = "deny"
	gaveDefault = "default"
)

const (
	judgeName = "judge"
	done      = "done" // is the answer to what has none
)

func init() {
	testenv.RegisterChild(judgeName, func(args []string) int {
		j := &judge{dir: args[0], errands: make(chan func())}
		j.options.Class = kernstream.ClassContent
		var err1, err2, err3 error
		j.options.Deadline, err1 = time.ParseDuration(args[1])
		j.options.MaxPending, err2 = strconv.Atoi(args[2])
		j.w, err3 = j.watch(context.Background(), &j.options)
		if err := errors.Join(err1, err2, err3); err != nil {
			tell("wrong", err)
			return 1
		}
		go j.run()
		obey(j.obey)
		return 0
	})
}

func (j *judge) watch(ctx context.Context, options *kernstream.FileOptions) (*kernstream.FileWatcher, error) {
	return patiently(func() (*kernstream.FileWatcher, error) {
		return kernstream.WatchFiles(ctx, options, kernstream.Mark{Type: kernstream.MarkFilesystem, Path: j.dir, Ops: kernstream.OpOpenPerm})
	})
}

// run receives events and runs errands between them.
func (j *judge) run() {
	for {
		select {
		case e, ok := <-j.w.C:
			if !ok {
				tell("wrong", "the watcher ended:", j.w.Err())
				return
			}
			j.receive(e)
		case errand := <-j.errands:
			errand()
		}
	}
}

// errand runs f where no event is being received.
func (j *judge) errand(f func()) {
	done := make(chan struct{})
	j.errands <- func() {
		f()
		close(done)
	}
	<-done
}

// obey does what a line says, and returns the answer.
func (j *judge) obey(words []string) (answer string) {
	switch words[0] {
	case "settle": // tells how many have got the default answer, after all else
		j.errand(func() {
			j.handlers.Wait()
			for _, e := range j.held { // nobody waits any more
				if err := e.Allow(); err == nil {
					tell("wrong", "nobody had answered:", e)
				}
				e.Close()
			}
			j.held = nil
			tell("settled", j.before+j.w.Defaulted())
		})
	case "restart": // with another watcher, while others wait for answers
		j.errand(func() {
			j.w.Close()
			j.before += j.w.Defaulted()
			var err error
			if j.w, err = j.watch(context.Background(), &j.options); err != nil {
				tell("wrong", err)
			}
		})
	case "guest": // for so many microseconds
		life, _ := strconv.Atoi(words[1])
		if err := j.guest(time.Duration(life) * time.Microsecond); err != nil {
			return err.Error()
		}
	case "measure":
		return fmt.Sprint(descriptors() + runtime.NumGoroutine())
	case "show":
		return strconv.Quote(whatThereIs(16 << 10))
	}
	return done
}

// receive judges an event.
func (j *judge) receive(e *kernstream.FileEvent) {
	rule, number, _ := strings.Cut(filepath.Base(e.Path), "-")
	if _, err := strconv.Atoi(number); err != nil || filepath.Dir(e.Path) != j.dir || e.Ops != kernstream.OpOpenPerm || e.FD() < 0 || e.Err != nil {
		tell("wrong", e)
	}
	if rule == ruleSlow {
		time.Sleep(2 * j.options.Deadline)
	}
	if rule == ruleHeld {
		j.held = append(j.held, e)
		tell("gave", number, gaveDefault)
		return
	}
	handle := func() {
		tell("gave", number, j.answer(e, rule))
		e.Close()
	}
	if rule != ruleLate && rule != ruleTwice {
		handle()
		return
	}
	j.handlers.Go(handle)
}

// answer answers an event, and returns what it got.
func (j *judge) answer(e *kernstream.FileEvent, rule string) string {
	allow := func() string { return outcome(e.Allow(), gaveAllow) }
	deny := func() string { return outcome(e.Deny(0), gaveDeny) }
	switch rule {
	case ruleDeny:
		return deny()
	case ruleClosed:
		e.Close()
		return gaveDefault
	case ruleLate:
		time.Sleep(j.options.Deadline * 3 / 2)
	case ruleTwice:
		other := make(chan string)
		go func() { other <- deny() }()
		own, theirs := allow(), <-other
		switch {
		case own == gaveDefault:
			return theirs
		case theirs != gaveDefault:
			tell("wrong", "two answers:", e)
		}
		return own
	}
	return allow()
}

// outcome returns what became of an answer.
func outcome(err error, given string) string {
	switch {
	case err == nil:
		return given
	case !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.EALREADY):
		tell("wrong", err)
	}
	return gaveDefault
}

// guest is another watcher of the same files, which allows everything: by an answer, by
// default, and by its end.
func (j *judge) guest(life time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), life)
	defer cancel()
	options := j.options
	options.Default = kernstream.Response{Allow: true}
	if rand.IntN(2) == 0 {
		options.Class = kernstream.ClassPreContent
	}
	w, err := j.watch(ctx, &options)
	if ctx.Err() != nil {
		if err == nil {
			w.Close()
		}
		return nil
	}
	if err != nil {
		return err
	}
	var held []*kernstream.FileEvent
	for e := range w.C {
		switch rand.IntN(3) {
		case 0:
			e.Allow()
			fallthrough
		case 1:
			e.Close()
		case 2:
			held = append(held, e)
		}
		if rand.IntN(100) == 0 {
			go w.Close()
		}
	}
	for _, e := range held {
		if err := e.Allow(); err == nil {
			return fmt.Errorf("an answer after the end: %v", e)
		}
		e.Close()
	}
	return nil
}
