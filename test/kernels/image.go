// This file collects files for an initramfs.

package main

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// image is a set of files for an initramfs.
type image struct {
	entries map[string]imageEntry // by name, without a leading slash
}

type imageEntry struct {
	mode uint32
	file string // where the contents are
	link string // the target of a symbolic link
	size int64
}

func newImage() *image {
	return &image{entries: map[string]imageEntry{}}
}

func (m *image) add(name string, e imageEntry) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return
	}
	if _, ok := m.entries[name]; !ok {
		m.add(path.Dir(name), imageEntry{mode: modeDir | 0o755})
		m.entries[name] = e
	}
}

// AddLink adds a symbolic link.
func (m *image) AddLink(name, target string) {
	m.add(name, imageEntry{mode: modeSymlink | 0o777, link: target, size: int64(len(target))})
}

// AddFile adds the contents of a file of the host, with its permissions and
// set-user-ID bits.
func (m *image) AddFile(name, file string) error {
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", file)
	}
	mode := modeRegular | uint32(info.Mode().Perm())
	if info.Mode()&fs.ModeSetuid != 0 {
		mode |= 0o4000
	}
	if info.Mode()&fs.ModeSetgid != 0 {
		mode |= 0o2000
	}
	m.add(name, imageEntry{mode: mode, file: file, size: info.Size()})
	return nil
}

// AddTree adds the directories, files and links below dir.
func (m *image) AddTree(name, dir string) error {
	return filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		target := path.Join(name, filepath.ToSlash(below))
		switch {
		case entry.IsDir():
			m.add(target, imageEntry{mode: modeDir | 0o755})
			return nil
		case entry.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(file)
			if err == nil {
				m.AddLink(target, link)
			}
			return err
		default:
			return m.AddFile(target, file)
		}
	})
}

// Write writes the image as a cpio archive.
func (m *image) Write(w io.Writer) error {
	c := newCPIOWriter(w)
	// In this order a directory comes before what is in it.
	for _, name := range sortedKeys(m.entries) {
		if err := writeEntry(c, name, m.entries[name]); err != nil {
			return err
		}
	}
	return c.Close()
}

func writeEntry(c *cpioWriter, name string, e imageEntry) error {
	if e.file == "" {
		return c.Add(name, e.mode, e.size, strings.NewReader(e.link))
	}
	file, err := os.Open(e.file)
	if err != nil {
		return err
	}
	defer file.Close()
	return c.Add(name, e.mode, e.size, file)
}

// writeInitramfs writes an initramfs for one kernel: the part that all share,
// already an archive, and its modules. The kernel unpacks one after the other.
func writeInitramfs(name, shared, modulesDir, target string) error {
	img := newImage()
	if err := img.AddTree(target, modulesDir); err != nil {
		return err
	}
	var own bytes.Buffer
	if err := img.Write(&own); err != nil {
		return err
	}
	in, err := os.Open(shared)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	if _, err := out.Write(own.Bytes()); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
