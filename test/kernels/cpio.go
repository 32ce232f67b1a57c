// This file writes the cpio archives that a kernel unpacks as its initramfs.

package main

import (
	"errors"
	"fmt"
	"io"
)

// The bits of a mode that say what kind of file an entry is.
const (
	modeDir     = 0o040000
	modeRegular = 0o100000
	modeSymlink = 0o120000
)

const (
	cpioMagic   = "070701" // newc, the format that the kernel unpacks
	cpioTrailer = "TRAILER!!!"
	cpioBlock   = 512
)

// cpioWriter writes a cpio archive in the newc format, as described in the
// kernel's Documentation/driver-api/early-userspace/buffer-format.rst. All
// files belong to root and have no times, so equal contents give equal bytes.
type cpioWriter struct {
	w     io.Writer
	inode uint32
	off   int64
	err   error // the first one; everything after it does nothing
}

func newCPIOWriter(w io.Writer) *cpioWriter {
	return &cpioWriter{w: w}
}

// Add writes one entry. name has no leading slash, body has size bytes; that of
// a symbolic link is its target. A directory must come before what is in it.
func (c *cpioWriter) Add(name string, mode uint32, size int64, body io.Reader) error {
	if size < 0 || size > 0xffffffff {
		return fmt.Errorf("cpio: %s: %d bytes do not fit the format", name, size)
	}
	c.inode++
	links := uint32(1)
	if mode&0o170000 == modeDir {
		links = 2
	}
	c.header(name, c.inode, mode, links, uint32(size))
	if c.err == nil && size > 0 {
		n, err := io.CopyN(c.w, body, size)
		c.off += n
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		c.fail(name, err)
	}
	c.pad(4)
	return c.err
}

// Close writes the end of the archive, padded so that another may follow.
func (c *cpioWriter) Close() error {
	c.header(cpioTrailer, 0, 0, 1, 0)
	c.pad(cpioBlock)
	return c.err
}

func (c *cpioWriter) header(name string, inode, mode, links, size uint32) {
	c.write(cpioMagic)
	for _, field := range []uint32{
		inode, mode,
		0, 0, // uid, gid
		links,
		0, // mtime
		size,
		0, 0, // device of the file system
		0, 0, // device that a node stands for
		uint32(len(name) + 1),
		0, // checksum, not used by this format
	} {
		c.write(fmt.Sprintf("%08X", field))
	}
	c.write(name + "\x00")
	c.pad(4)
}

func (c *cpioWriter) pad(unit int64) {
	if rest := c.off % unit; rest != 0 {
		c.write(string(make([]byte, unit-rest)))
	}
}

func (c *cpioWriter) write(s string) {
	if c.err != nil {
		return
	}
	n, err := io.WriteString(c.w, s)
	c.off += int64(n)
	c.fail("header", err)
}

func (c *cpioWriter) fail(what string, err error) {
	if c.err == nil && err != nil {
		c.err = fmt.Errorf("cpio: %s: %w", what, err)
	}
}
