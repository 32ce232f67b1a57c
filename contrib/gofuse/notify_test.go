package gofuse_test

import (
	"bytes"
	"context"
	"os"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	raw "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/contrib/gofuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What a file system tells the kernel goes through the session: data is put into
// the kernel's cache and taken from it, names and data are dropped from it.
func TestNotifications(t *testing.T) {
	original := bytes.Repeat([]byte("original"), 1<<10)
	root, file := &fs.Inode{}, &fs.MemRegularFile{Data: original}
	l := newLab(t, &raw.MountOptions{MaxWrite: 4096}, func(s *gofuse.Server) raw.RawFileSystem {
		return fs.NewNodeFS(root, &fs.Options{ServerCallbacks: s, OnAdd: func(ctx context.Context) {
			root.AddChild("file", root.NewPersistentInode(ctx, file, fs.StableAttr{}), false)
		}})
	})
	l.serve(context.Background())
	f, err := os.Open(l.path("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := func() []byte {
		t.Helper()
		got := make([]byte, len(original)+1)
		n, err := unix.Pread(int(f.Fd()), got, 0)
		if err != nil {
			t.Error(err)
		}
		return got[:max(n, 0)]
	}
	if !bytes.Equal(read(), original) {
		t.Error("not what is in the file")
	}
	inode := file.EmbeddedInode()
	stored := bytes.Clone(original)
	copy(stored, "stored")
	if errno := inode.WriteCache(0, stored); errno != 0 {
		t.Errorf("WriteCache: %v", errno)
	}
	if !bytes.Equal(read(), stored) {
		t.Error("not what was put into the cache")
	}
	// More than one answer's worth.
	cached := make([]byte, len(original))
	var n int
	var errno syscall.Errno
	testenv.Within(t, "ReadCache", func() error { n, errno = inode.ReadCache(0, cached); return nil })
	if n != len(stored) || errno != 0 || !bytes.Equal(cached, stored) {
		t.Errorf("ReadCache: %d bytes, %v; want %d", n, errno, len(stored))
	}
	if errno := inode.NotifyContent(0, 0); errno != 0 {
		t.Errorf("NotifyContent: %v", errno)
	}
	testenv.Within(t, "ReadCache", func() error { n, errno = inode.ReadCache(0, cached); return nil })
	if n != 0 || errno != 0 {
		t.Errorf("ReadCache of what was dropped: %d bytes, %v", n, errno)
	}
	if !bytes.Equal(read(), original) {
		t.Error("not what is in the file, after its data was dropped")
	}
	if errno := root.NotifyEntry("file"); errno != 0 && errno != unix.ENOENT {
		t.Errorf("NotifyEntry: %v", errno)
	}
	if errno := root.NotifyDelete("no such file", inode); errno != unix.ENOENT {
		t.Errorf("NotifyDelete: %v", errno)
	}
	f.Close()

	if status := gofuse.New(nil).EntryNotify(1, "x"); status != raw.ENODEV {
		t.Errorf("a notification without a session: %v", status)
	}
	l.s.Close()
	if status := l.server.InodeNotify(1, 0, 0); status != raw.ENODEV {
		t.Errorf("a notification after the end: %v", status)
	}
	if _, status := l.server.InodeRetrieveCache(1, 0, cached); status != raw.ENODEV {
		t.Errorf("a retrieval after the end: %v", status)
	}
}
