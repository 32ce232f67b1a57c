package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// A tree is what is known of the files of a directory tree.
type tree struct {
	out     io.Writer
	mark    func(dir string) error // asks for the events of a directory
	root    string                 // the first path that was looked at
	known   map[string]fingerprint
	entries map[string]map[string]bool // the paths of a directory's entries
	looking bool                       // for the first time: everything is as it should be
}

func newTree(out io.Writer, mark func(dir string) error) *tree {
	return &tree{out: out, mark: mark, known: map[string]fingerprint{}, entries: map[string]map[string]bool{}}
}

// A fingerprint is what must not differ. Contents is that of a regular file, or
// the target of a symbolic link; of all else the mode is enough.
type fingerprint struct {
	mode     fs.FileMode
	uid, gid uint32
	contents [sha256.Size]byte
}

// look compares what is at path, and below it if that is a directory, with what
// is known of it. Only an error that concerns the whole tree is one.
func (t *tree) look(path string) error {
	if t.root == "" {
		t.root, t.looking = path, true
		defer func() { t.looking = false }()
	}
	if path != t.root && !strings.HasPrefix(path, t.root+"/") {
		return nil // moved out of the tree, and known by its place there
	}
	now, err := takeFingerprint(path)
	switch {
	case gone(err):
		if path == t.root {
			return fmt.Errorf("%s is gone", path)
		}
		t.forget(path)
		return nil
	case err != nil:
		return err
	}
	before, ok := t.known[path]
	t.remember(path, now)
	switch {
	case t.looking || ok && before == now:
	case ok:
		t.say("changed", path)
	default:
		t.say("added", path)
	}
	if now.mode.IsDir() {
		return t.lookInto(path)
	}
	return nil
}

// lookInto looks at the entries of a directory. It is marked before it is
// listed: what comes after the listing is an event.
func (t *tree) lookInto(dir string) error {
	if err := t.mark(dir); err != nil && !gone(err) {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !gone(err) {
		return err
	}
	missing := maps.Clone(t.entries[dir])
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		delete(missing, path)
		if err := t.look(path); err != nil {
			return err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(missing)) {
		t.forget(path)
	}
	return nil
}

func (t *tree) remember(path string, f fingerprint) {
	t.known[path] = f
	parent := filepath.Dir(path)
	if t.entries[parent] == nil {
		t.entries[parent] = map[string]bool{}
	}
	t.entries[parent][path] = true
}

// forget says that a path is gone, and all that was below it.
func (t *tree) forget(path string) {
	if _, ok := t.known[path]; !ok {
		return
	}
	for _, entry := range slices.Sorted(maps.Keys(t.entries[path])) {
		t.forget(entry)
	}
	delete(t.known, path)
	delete(t.entries, path)
	delete(t.entries[filepath.Dir(path)], path)
	t.say("removed", path)
}

func (t *tree) say(what, path string) { fmt.Fprintln(t.out, what, path) }

// takeFingerprint looks at a file. One that may not be read has no contents.
func takeFingerprint(path string) (f fingerprint, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return f, err
	}
	st := info.Sys().(*syscall.Stat_t)
	f = fingerprint{mode: info.Mode(), uid: st.Uid, gid: st.Gid}
	switch f.mode.Type() {
	case fs.ModeSymlink:
		target, err := os.Readlink(path)
		f.contents = sha256.Sum256([]byte(target))
		return f, err
	case 0:
		f.contents, err = sum(path)
	}
	if errors.Is(err, fs.ErrPermission) {
		err = nil
	}
	return f, err
}

// sum returns the checksum of a regular file.
func sum(path string) (contents [sha256.Size]byte, err error) {
	// Should a pipe have taken its place meanwhile, that is not waited for.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return contents, err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return contents, err
	}
	return [sha256.Size]byte(hash.Sum(nil)), nil
}

// gone tells whether an error is that of a file which is not there any more, or
// is something else by now. What that is has an event of its own.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENXIO)
}
