package poller

import (
	"sync"

	"golang.org/x/sys/unix"
)

// A Descriptor is an open descriptor that is read but never waited for, so it
// is not in the runtime's poller. Like a [File] it stands in the profile
// "kernstream.descriptors" until it is closed.
type Descriptor struct {
	fd    int
	close func() error
}

// Own returns fd as a Descriptor, which owns it from then on.
func Own(fd int) *Descriptor {
	d := &Descriptor{fd: fd}
	d.close = sync.OnceValue(func() error {
		descriptors.Remove(d)
		return unix.Close(d.fd)
	})
	descriptors.Add(d, 1)
	return d
}

// FD returns the descriptor, which is open until Close.
func (d *Descriptor) FD() int { return d.fd }

// Close closes the descriptor. It may be called again, and then returns the
// same. It must not be called while [Descriptor.FD] is in use.
func (d *Descriptor) Close() error { return d.close() }
