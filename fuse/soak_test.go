package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// Mounted, served and unmounted a thousand times, each session ends by its name,
// and nothing is left of it.
func TestSoakCycles(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	dir := t.TempDir()
	c := newClient(t)
	for i := range testenv.SoakN(1000) {
		reader := readers[i%len(readers)]
		s, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: dir})
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() { result <- reader.read(context.Background(), s.Device(), basic) }()
		if i%3 == 0 {
			if err := c.do("stat", dir+"/x"); err != unix.ENOENT {
				t.Fatal(err)
			}
		}
		if i%2 == 0 {
			err = unix.Unmount(dir, 0)
		} else {
			err = s.Unmount(t.Context(), 0)
		}
		if err != nil {
			t.Fatalf("cycle %d: unmount: %v", i, err)
		}
		err = testenv.Within(t, "the end of a session", func() error { return <-result })
		if want := error(fuse.ErrUnmounted); reader.name == "Next" && err != want || reader.name != "Next" && err != nil {
			t.Fatalf("cycle %d: %s ended by %v", i, reader.name, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if n := fuseMounts(t, dir); n != 0 {
			t.Fatalf("cycle %d: %d mounts are left", i, n)
		}
	}
}

// Aborted at any moment, under load, a session ends by that name, clients are
// told, and nothing is left.
func TestSoakAborts(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	dir := t.TempDir()
	clients := []*client{newClient(t), newClient(t)}
	for i := range testenv.SoakN(300) {
		reader := readers[i%len(readers)]
		s, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: dir})
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() { result <- reader.read(context.Background(), s.Device(), basic) }()
		var load sync.WaitGroup
		for _, c := range clients {
			load.Go(func() {
				for {
					switch err := c.do("stat", dir+"/x"); err {
					case unix.ENOENT:
					case unix.ENOTCONN, unix.ECONNABORTED:
						return
					default:
						t.Errorf("stat: %v", err)
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
		if err := s.Abort(); err != nil {
			t.Fatal(err)
		}
		err = testenv.Within(t, "the end of a session", func() error { return <-result })
		if !errors.Is(err, fuse.ErrAborted) {
			t.Fatalf("cycle %d: %s ended by %v", i, reader.name, err)
		}
		testenv.Within(t, "the clients", func() error { load.Wait(); return nil })
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if n := fuseMounts(t, dir); n != 0 {
			t.Fatalf("cycle %d: %d mounts are left", i, n)
		}
	}
}

// A storm of cancels against 20,000 requests, by all ways to read: each request
// is answered exactly once.
func TestSoakCancels(t *testing.T) {
	l := newLab(t, nil)
	const clients = 2
	names := testenv.SoakN(20_000) / clients
	results := make(chan error, clients)
	for range clients {
		c := newClient(t)
		go func() { results <- c.do("stats", l.dir, fmt.Sprint(names)) }()
	}
	answered, cancels := 0, 0
	handle := func(r *fuse.Request) {
		if r.Header.Opcode == fuse.OpLookup {
			answered++
			if err := r.ReplyErrno(unix.ENOENT); err != nil {
				t.Errorf("answer: %v", err)
			}
			return
		}
		basic(r)
	}
	deadline := time.Now().Add(testenv.Soak(time.Minute))
	for left := clients; left > 0; cancels++ {
		if time.Now().After(deadline) {
			t.Fatalf("%d requests in a minute", answered)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		timer := time.AfterFunc(time.Duration(rand.IntN(300))*time.Microsecond, func() { cancel(errors.New("storm")) })
		readers[cancels%len(readers)].read(ctx, l.s.Device(), handle)
		timer.Stop()
		cancel(nil)
		left -= ended(t, results)
	}
	if answered != clients*names {
		t.Errorf("%d answers to %d requests", answered, clients*names)
	}
	t.Logf("%d cancels", cancels)
}

// A hundred sessions at a time do not disturb each other.
func TestManySessions(t *testing.T) {
	testenv.NeedFUSE(t)
	testenv.NoLeaks(t)
	var work sync.WaitGroup
	for range 100 {
		dir := t.TempDir()
		work.Go(func() {
			s, err := fuse.Mount(t.Context(), &fuse.Config{MountPoint: dir})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			work.Go(func() {
				for r := range s.Device().All(context.Background()) {
					basic(r)
				}
			})
			if err := useFiles(dir); err != nil {
				t.Error(err)
			}
		})
	}
	testenv.Within(t, "the sessions", func() error { work.Wait(); return nil })
}
