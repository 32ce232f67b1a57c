package recorder

import (
	"context"
	"os"
	"sync"

	"github.com/kernstream/kernstream"
)

// What is mounted in the place of a recording after its marks were set: it is marked, too, but
// what was accessed before that is missing, so each such mount is a reason for the list to be
// incomplete.

// laterMounts are a session's mounts that came after the start.
type laterMounts struct {
	descriptors bool                    // the session's watcher has a group of descriptors
	watcher     *kernstream.FileWatcher // of their files; nil: none, or the session's own
	following   sync.WaitGroup          // for who follows the mount table
	collecting  sync.WaitGroup          // for who takes the events of watcher
}

// followMounts marks what is mounted from now on, until the place's watch of mounts ends.
func (s *session) followMounts() {
	for _, why := range s.place.missing {
		s.tally.fault("%s", why)
	}
	m := s.place.mounts
	if m == nil {
		return
	}
	s.mounts.following.Go(func() {
		for e := range m.watcher.C {
			for _, why := range m.tell(e, s.markLater) {
				s.tally.fault("%s", why)
			}
		}
	})
}

// markLater marks a mount. A group of handles keeps the file systems open that it has marks on,
// and who has mounted one after the start may well want to unmount it before the end. So
// these get a group of descriptors, whatever the others have.
func (s *session) markLater(root *os.File) (err error) {
	mark := kernstream.Mark{Type: kernstream.MarkMount, Dir: root, Ops: s.options.Ops}
	switch {
	case s.mounts.descriptors:
		return s.watcher.Mark(mark)
	case s.mounts.watcher != nil:
		return s.mounts.watcher.Mark(mark)
	}
	o := s.options
	o.Descriptors = true
	if s.mounts.watcher, _, err = o.watch(context.Background(), []kernstream.Mark{mark}); err != nil {
		return err
	}
	s.mounts.collecting.Go(func() { s.collect(s.mounts.watcher) })
	return nil
}

// endMounts has all that was done on later mounts entered into the list, and why that is not
// complete.
func (s *session) endMounts() {
	m := s.place.mounts
	if m == nil {
		return
	}
	m.watcher.Close()
	s.mounts.following.Wait()
	for _, why := range m.finish() {
		s.tally.fault("%s", why)
	}
	if s.mounts.watcher == nil {
		return
	}
	s.mounts.watcher.Drain()
	s.mounts.collecting.Wait()
	if err := s.mounts.watcher.Err(); err != nil {
		s.tally.fault("%v", err)
	}
}

// leaveMounts lets go of everything. Nobody is in endMounts.
func (s *session) leaveMounts() {
	if s.place != nil && s.place.mounts != nil {
		s.place.mounts.watcher.Close()
	}
	s.mounts.following.Wait()
	if s.mounts.watcher != nil {
		s.tally.hurry()
		s.mounts.watcher.Close()
	}
	s.mounts.collecting.Wait()
}
