package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// A test binary runs among the files of its package and its testdata, and not
// among what was built there or other packages.
func TestCopySources(t *testing.T) {
	s := &stage{dir: t.TempDir(), root: t.TempDir()}
	for name, size := range map[string]int{
		"p/x.go":              1,
		"p/README.md":         2,
		"p/.hidden":           3,
		"p/p.test":            maxSource + 1,
		"p/testdata/fuzz/a/b": 4,
		"p/sub/y.go":          5,
	} {
		name = filepath.Join(s.root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.copySources("p"); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := fs.WalkDir(os.DirFS(s.dir), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			got = append(got, name)
		}
		return err
	})
	if want := []string{"src/p/README.md", "src/p/testdata/fuzz/a/b", "src/p/x.go"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("copied %q, error %v", got, err)
	}
}
