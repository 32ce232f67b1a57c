// This file picks the kernel modules that the tests need. Debian's packages
// come without modules.dep, which depmod writes on installation; but each
// module says itself, in its section .modinfo, what it depends on.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// modules are the modules that are loaded in every virtual machine, and why.
var modules = []struct{ name, why string }{
	{"fuse", "FUSE sessions"},
	{"overlay", "containers: file events without file handles"},
	{"ext4", "a file system on a disk, with file handles"},
	{"xfs", "file handles with 64-bit inode numbers"},
	{"btrfs", "subvolumes: several file system ids behind one mount"},
	{"loop", "block devices for the three above"},
}

// moduleName is the name by which modules depend on each other: the file
// "crc32c-intel.ko.xz" holds the module crc32c_intel.
func moduleName(file string) string {
	base, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

// closure returns wanted and all that it depends on, in the order of loading:
// each module after what it needs. depends returns what one module needs.
func closure(wanted []string, depends func(name string) ([]string, error)) ([]string, error) {
	var order []string
	state := map[string]int{} // 1 while its needs are looked at, 2 when it is in order
	var visit func(name string) error
	visit = func(name string) error {
		switch state[name] {
		case 1:
			return fmt.Errorf("module %s depends on itself", name)
		case 2:
			return nil
		}
		state[name] = 1
		needs, err := depends(name)
		if err != nil {
			return err
		}
		for _, need := range needs {
			if err := visit(need); err != nil {
				return err
			}
		}
		state[name] = 2
		order = append(order, name)
		return nil
	}
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleDepends reads the names that a module depends on out of its file.
func moduleDepends(module []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	return parseModinfo(info), nil
}

// parseModinfo returns the value of "depends" in a section .modinfo: strings
// "key=value", each with a zero byte at its end.
func parseModinfo(info []byte) []string {
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if value, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(value) > 0 {
			return strings.Split(strings.ReplaceAll(string(value), "-", "_"), ",")
		}
	}
	return nil
}

// moduleTree is the directory /lib/modules/RELEASE of an unpacked kernel.
type moduleTree struct {
	dir     string
	files   map[string]string // by module name
	builtin map[string]bool
	read    map[string][]byte // modules that were read, ready to be loaded
}

func openModuleTree(dir string) (*moduleTree, error) {
	t := &moduleTree{dir: dir, files: map[string]string{}, builtin: map[string]bool{}, read: map[string][]byte{}}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(list)) {
		t.builtin[moduleName(line)] = true
	}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && strings.Contains(entry.Name(), ".ko") {
			t.files[moduleName(name)] = name
		}
		return err
	})
	return t, err
}

// Depends reads a module and returns what it depends on. What is built into the
// kernel depends on nothing.
func (t *moduleTree) Depends(ctx context.Context, name string) ([]string, error) {
	file, ok := t.files[name]
	if !ok {
		if t.builtin[name] {
			return nil, nil
		}
		return nil, fmt.Errorf("this kernel has no module %s", name)
	}
	module, err := readModule(ctx, file)
	if err != nil {
		return nil, err
	}
	t.read[name] = module
	needs, err := moduleDepends(module)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	return needs, nil
}

// readModule reads a module's file and decompresses it; not every kernel could
// do that by itself.
func readModule(ctx context.Context, name string) ([]byte, error) {
	switch filepath.Ext(name) {
	case ".ko":
		return os.ReadFile(name)
	case ".gz":
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		r, err := gzip.NewReader(file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return io.ReadAll(r)
	}
	program, ok := map[string]string{".xz": "xz", ".zst": "zstd"}[filepath.Ext(name)]
	if !ok {
		return nil, fmt.Errorf("%s: compressed in an unknown way", name)
	}
	out, err := output(ctx, "", program, "-dc", name)
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("the program %s is needed to read %s", program, name)
	}
	return []byte(out), err
}
