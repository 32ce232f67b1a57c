package gofuse_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/contrib/gofuse"
	"github.com/kernstream/kernstream/fuse"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What docs/coming-from.md shows of this package, as it is there.

func serveTree(ctx context.Context, dir string, root fs.InodeEmbedder) error {
	server := gofuse.New(nil)
	files := fs.NewNodeFS(root, &fs.Options{ServerCallbacks: server})
	session, err := server.Mount(ctx, files, &fuse.Config{MountPoint: dir})
	if err != nil {
		return err
	}
	defer session.Close()
	return server.Serve(ctx)
}

// TestComingFrom: the program of the text is the one above. It serves a tree until
// that is unmounted, or until a cancel, which unmounts it.
func TestComingFrom(t *testing.T) {
	text, err := os.ReadFile("../../docs/coming-from.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("coming_from_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, program, found := strings.Cut(string(text), "contrib/gofuse):\n\n```go")
	program, _, _ = strings.Cut(program, "```")
	if !found || !strings.Contains(string(code), program) {
		t.Errorf("this is not in coming_from_test.go:\n%s", program)
	}

	testenv.NeedFUSE(t)
	for _, unmount := range []bool{true, false} {
		dir := t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- serveTree(ctx, dir, &fs.Inode{}) }()
		mounts, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{Filter: func(m *kernstream.Mount) bool { return m.MountPoint == dir }})
		if err != nil {
			t.Fatal(err)
		}
		for e := range mounts.C {
			if len(e.Mounted) > 0 {
				mounts.Close()
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("the tree has %v, %v", entries, err)
		}
		if unmount {
			testenv.Unmount(t, dir)
			if err := <-ended; err != nil {
				t.Errorf("after an unmount: %v", err)
			}
			continue
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("after a cancel: %v", err)
		}
	}
}
