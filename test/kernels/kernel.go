// This file keeps unpacked kernels in a cache.

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// kernelLine is a line of kernels that the matrix covers.
type kernelLine struct {
	name     string
	optional bool // not every archive has it
}

var kernelLines = []kernelLine{{"5.10", true}, {"6.1", false}, {"6.12", false}}

// kernel is a kernel in the cache.
type kernel struct {
	line    string
	pkg     string // name of its package
	image   string // what qemu boots
	modules string // directory of modules, named in the order of loading
}

// cacheDir is where kernels, programs for the shell and console logs are kept.
func cacheDir() (string, error) {
	if dir := os.Getenv("KERNSTREAM_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("%w; KERNSTREAM_CACHE can name a directory", err)
	}
	return filepath.Join(dir, "kernstream-kernels"), nil
}

// fetchKernel returns the newest kernel of a line, nil if there is none. It
// takes one from the cache where the archive cannot be reached.
func fetchKernel(ctx context.Context, a *archive, cache, line string) (*kernel, error) {
	k, err := fetchNewest(ctx, a, cache, line)
	if k != nil || ctx.Err() != nil {
		return k, err
	}
	cached, cacheErr := cachedKernel(cache, line)
	if cached == nil {
		return nil, errors.Join(err, cacheErr)
	}
	if err != nil {
		a.log("%v", err)
	}
	a.log("using %s, which is in the cache", cached.pkg)
	return cached, nil
}

// fetchNewest returns the newest kernel of a line that can be fetched, nil if
// the archive has none.
func fetchNewest(ctx context.Context, a *archive, cache, line string) (*kernel, error) {
	for {
		updated := a.updated
		names, err := a.Kernels(ctx, line)
		if err != nil {
			return nil, err
		}
		var problems []error
		for _, name := range names {
			k, err := fetchPackage(ctx, a, cache, line, name)
			if err == nil || ctx.Err() != nil {
				return k, err
			}
			problems = append(problems, err)
		}
		// Other lists have other names.
		if len(problems) == 0 || a.updated == updated {
			return nil, errors.Join(problems...)
		}
	}
}

// cachedKernel returns the newest kernel of a line that is in the cache, nil if
// there is none.
func cachedKernel(cache, line string) (*kernel, error) {
	dirs, err := filepath.Glob(filepath.Join(cache, "kernels", "linux-image-*-"+modulesHash()))
	if err != nil {
		return nil, err
	}
	byName := map[string]string{}
	for _, dir := range dirs {
		name, _, _ := strings.Cut(filepath.Base(dir), "_")
		byName[name] = dir
	}
	names := pickKernels(strings.Join(sortedKeys(byName), "\n"), line)
	if len(names) == 0 {
		return nil, nil
	}
	return kernelIn(byName[names[0]], line, names[0]), nil
}

// kernelIn is the kernel that a directory of the cache holds.
func kernelIn(dir, line, pkg string) *kernel {
	return &kernel{line: line, pkg: pkg, image: filepath.Join(dir, "vmlinuz"), modules: filepath.Join(dir, "modules")}
}

func fetchPackage(ctx context.Context, a *archive, cache, line, name string) (*kernel, error) {
	file, err := a.File(ctx, name)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "kernels", strings.TrimSuffix(file, ".deb")+"-"+modulesHash())
	k := kernelIn(dir, line, name)
	if _, err := os.Stat(dir); err == nil {
		return k, nil
	}
	a.log("fetching %s", name)
	err = populate(dir, func(tmp string) error {
		unpacked := filepath.Join(tmp, "package")
		if err := os.Mkdir(unpacked, 0o755); err != nil {
			return err
		}
		if err := a.Unpack(ctx, name, unpacked); err != nil {
			return err
		}
		if err := extract(ctx, unpacked, tmp); err != nil {
			return err
		}
		return os.RemoveAll(unpacked)
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return k, nil
}

// modulesHash changes with the list of modules, and so makes the cache forget
// the kernels that were unpacked for another list.
func modulesHash() string {
	h := sha256.New()
	for _, m := range modules {
		io.WriteString(h, m.name+"\n")
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:4])
}

// extract takes what is needed of an unpacked kernel package over to dir.
func extract(ctx context.Context, unpacked, dir string) error {
	images, err := filepath.Glob(filepath.Join(unpacked, "boot", "vmlinuz-*"))
	if err != nil {
		return err
	}
	if len(images) != 1 {
		return fmt.Errorf("%d kernel images in place of one", len(images))
	}
	if err := os.Rename(images[0], filepath.Join(dir, "vmlinuz")); err != nil {
		return err
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	tree := ""
	for _, lib := range []string{"lib", "usr/lib"} {
		name := filepath.Join(unpacked, lib, "modules", release)
		if _, err := os.Stat(name); err == nil {
			tree = name
		}
	}
	t, err := openModuleTree(tree)
	if err != nil {
		return err
	}
	var wanted []string
	for _, m := range modules {
		wanted = append(wanted, m.name)
	}
	order, err := closure(wanted, func(name string) ([]string, error) { return t.Depends(ctx, name) })
	if err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "modules"), 0o755); err != nil {
		return err
	}
	for i, name := range order {
		if module, ok := t.read[name]; ok {
			file := filepath.Join(dir, "modules", fmt.Sprintf("%02d-%s.ko", i, name))
			if err := os.WriteFile(file, module, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// fetchBusybox returns a statically linked busybox, the host's or the archive's.
func fetchBusybox(ctx context.Context, a *archive, cache string) (string, error) {
	for _, name := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		if libs, err := sharedLibraries(ctx, name); err == nil && len(libs) == 0 {
			return name, nil
		}
	}
	dir := filepath.Join(cache, "busybox")
	name := filepath.Join(dir, "busybox")
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	a.log("fetching busybox-static")
	err := populate(dir, func(tmp string) error {
		if err := a.Unpack(ctx, "busybox-static", tmp); err != nil {
			return err
		}
		for _, bin := range []string{"bin", "usr/bin"} {
			err := os.Rename(filepath.Join(tmp, bin, "busybox"), filepath.Join(tmp, "busybox"))
			if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return errors.New("busybox-static has no busybox")
	})
	return name, err
}

// populate makes the directory dir with what fill puts into it, whole or not at
// all, also when two runs do it at the same time.
func populate(dir string, fill func(tmp string) error) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := fill(tmp); err != nil {
		return err
	}
	err = os.Rename(tmp, dir)
	if errors.Is(err, fs.ErrExist) {
		return nil // another run was faster
	}
	return err
}
