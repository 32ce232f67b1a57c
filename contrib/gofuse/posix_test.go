package gofuse_test

import (
	"context"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	raw "github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/posixtest"
)

// go-fuse's own tests of what POSIX asks for, on its loopback file system.
func TestPosix(t *testing.T) {
	for name, test := range posixtest.All {
		t.Run(name, func(t *testing.T) {
			options := raw.MountOptions{EnableLocks: true}
			l := newLab(t, &options, loopback(t, t.TempDir(), &fs.Options{MountOptions: options}))
			l.serve(context.Background())
			test(t, l.dir)
			// The kernel says by the way that a file was closed.
			_, wait := l.stat("another request")
			wait()
			if err := l.s.Drain(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
