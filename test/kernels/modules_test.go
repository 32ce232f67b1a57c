package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Every module comes after what it depends on, and once.
func TestClosure(t *testing.T) {
	depends := map[string][]string{
		"btrfs":     {"xor", "raid6_pq", "libcrc32c"},
		"xfs":       {"libcrc32c"},
		"libcrc32c": {"crc32c"},
		"loop":      nil,
		"a":         {"b"},
		"b":         {"c"},
		"c":         {"a"},
	}
	unknown := errors.New("unknown")
	look := func(name string) ([]string, error) {
		if name == "unknown" {
			return nil, unknown
		}
		return depends[name], nil
	}
	got, err := closure([]string{"xfs", "btrfs", "loop", "xfs"}, look)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"crc32c", "libcrc32c", "xfs", "xor", "raid6_pq", "btrfs", "loop"}; !slices.Equal(got, want) {
		t.Errorf("order %q", got)
	}
	if _, err := closure([]string{"a"}, look); err == nil {
		t.Error("a circle was accepted")
	}
	if _, err := closure([]string{"unknown"}, look); !errors.Is(err, unknown) {
		t.Errorf("error %v", err)
	}
}

func TestParseModinfo(t *testing.T) {
	for text, want := range map[string][]string{
		"license=GPL\x00depends=libcrc32c,crc32c-intel\x00name=xfs\x00": {"libcrc32c", "crc32c_intel"},
		"depends=\x00name=loop\x00":                                     nil,
		"alias=depends=x\x00":                                           nil,
		"":                                                              nil,
	} {
		if got := parseModinfo([]byte(text)); !slices.Equal(got, want) {
			t.Errorf("%q: %q", text, got)
		}
	}
	for file, want := range map[string]string{
		"kernel/crypto/crc32c-intel.ko.xz": "crc32c_intel",
		"kernel/fs/fuse/fuse.ko":           "fuse",
	} {
		if got := moduleName(file); got != want {
			t.Errorf("%s: %s", file, got)
		}
	}
}

// What is built in depends on nothing; what is nowhere is an error, and so is a
// file that is no module. Compressed files are read.
func TestModuleTree(t *testing.T) {
	dir := t.TempDir()
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write([]byte("not a module"))
	z.Close()
	for name, data := range map[string][]byte{
		"modules.builtin":          []byte("kernel/fs/ext4/ext4.ko\nkernel/fs/fuse/fuse.ko\n"),
		"kernel/fs/xfs/xfs.ko.gz":  packed.Bytes(),
		"kernel/drivers/odd.ko.7z": nil,
	} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := openModuleTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	if needs, err := tree.Depends(t.Context(), "ext4"); err != nil || needs != nil {
		t.Errorf("built in: %q, error %v", needs, err)
	}
	for _, name := range []string{"xfs", "odd", "none"} {
		if _, err := tree.Depends(t.Context(), name); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if got := string(tree.read["xfs"]); got != "not a module" {
		t.Errorf("decompressed %q", got)
	}
}

// A directory of the cache appears whole or not at all.
func TestPopulate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kernels", "one")
	broken := errors.New("broken")
	if err := populate(dir, func(string) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	for range 2 {
		err := populate(dir, func(tmp string) error {
			return os.WriteFile(filepath.Join(tmp, "file"), nil, 0o644)
		})
		if err != nil {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil || len(entries) != 1 || entries[0].Name() != "one" {
		t.Errorf("left: %v, error %v", entries, err)
	}
}

// Without an archive the newest kernel of the line in the cache is taken, if it
// was unpacked with the modules that are wanted.
func TestCachedKernel(t *testing.T) {
	cache := t.TempDir()
	for _, name := range []string{
		"linux-image-6.1.0-9-cloud-amd64_6.1.27-1_amd64-" + modulesHash(),
		"linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64-" + modulesHash(),
		"linux-image-6.1.0-57-cloud-amd64_6.1.193-1_amd64-00000000",
		".new-linux-image-6.1.0-58-cloud-amd64",
	} {
		if err := os.MkdirAll(filepath.Join(cache, "kernels", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k, err := cachedKernel(cache, "6.1")
	if err != nil || k == nil || k.pkg != "linux-image-6.1.0-56-cloud-amd64" {
		t.Errorf("%+v, error %v", k, err)
	}
	if k, err := cachedKernel(cache, "6.12"); k != nil || err != nil {
		t.Errorf("%+v, error %v", k, err)
	}
}
