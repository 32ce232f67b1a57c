package kernstream

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kernstream/kernstream/internal/testenv"
)

// What is waited for at the end of a watcher, from inside: several goroutines may
// be giving back what has ended.

// TestTableAwaitsEveryRound: who waits until nothing is left of what has ended waits
// for every goroutine that is at it, also while one has given its Set back and the
// next one works already, and for none that begins later.
func TestTableAwaitsEveryRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newProcessTable()
		begin := func() uint64 {
			table.mu.Lock()
			defer table.mu.Unlock()
			return table.beginRound()
		}
		table.awaitRound() // there is none
		for _, firstEndsFirst := range []bool{true, false} {
			one, other := begin(), begin()
			if !firstEndsFirst {
				one, other = other, one
			}
			over := make(chan struct{})
			go func() {
				defer close(over)
				table.awaitRound()
			}()
			synctest.Wait()
			later := begin()
			table.endRound(one)
			synctest.Wait()
			select {
			case <-over:
				t.Errorf("one of two rounds was not waited for, the first ends first: %t", firstEndsFirst)
			default:
			}
			table.endRound(other)
			<-over
			table.endRound(later)
		}
	})
}

// TestTableAwaitsACancel: when the cancel of a stream finds out that its process has
// ended, a watcher that is told by that is not closed before the pidfd is.
func TestTableAwaitsACancel(t *testing.T) {
	testenv.NoLeaks(t)
	child, in := sleepingChild(t)
	target := PID(child.Process.Pid)
	w, err := NewProcessWatcher(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	watch, err := w.Watch(target, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s, err := WatchProcess(ctx, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	// While its Set is in use, the goroutine of the table does not look, and
	// nothing is given back.
	held, letGo := make(chan struct{}), make(chan struct{})
	go processes.set.Control(watch.process.place, func(int) {
		close(held)
		<-letGo
	})
	<-held
	in.Close()
	child.Wait()
	cancel()
	if e := <-w.C; e.Watch != watch {
		t.Errorf("event %v", e)
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		w.Close()
	}()
	select {
	case <-closed:
		t.Error("the watcher is closed, and the pidfd is open")
	case <-time.After(10 * time.Millisecond):
	}
	close(letGo)
	<-closed
	if e := <-s.C; e == nil || s.Err() != nil {
		t.Errorf("event %v, Err %v; want the end that was there before the cancel", e, s.Err())
	}
	<-s.C
}
