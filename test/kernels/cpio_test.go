package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// cpioEntry is what readCPIO finds.
type cpioEntry struct {
	name string
	mode uint32
	body string
}

// readCPIO reads archives in the newc format, one after the other, as the
// kernel does: independent of the writer, from the format's description.
func readCPIO(data []byte) (entries []cpioEntry, err error) {
	const headerSize = 110
	inodes := map[uint64]bool{}
	for off := 0; off < len(data); {
		if data[off] == 0 {
			off++ // between two archives
			continue
		}
		if off%4 != 0 || len(data)-off < headerSize || string(data[off:off+6]) != "070701" {
			return nil, fmt.Errorf("no header at %d", off)
		}
		var fields [13]uint64
		for i := range fields {
			text := string(data[off+6+8*i : off+14+8*i])
			if fields[i], err = strconv.ParseUint(text, 16, 32); err != nil {
				return nil, err
			}
		}
		inode, mode, links, size, nameSize := fields[0], fields[1], fields[4], int(fields[6]), int(fields[11])
		nameStart := off + headerSize
		bodyStart := (nameStart + nameSize + 3) &^ 3
		if nameSize == 0 || bodyStart+size > len(data) {
			return nil, fmt.Errorf("entry at %d is too long", off)
		}
		name := string(data[nameStart : nameStart+nameSize-1])
		if data[nameStart+nameSize-1] != 0 {
			return nil, fmt.Errorf("name %q has no end", name)
		}
		off = (bodyStart + size + 3) &^ 3
		if name == "TRAILER!!!" {
			clear(inodes)
			continue
		}
		// The kernel takes a second entry with more than one link and the same
		// inode for a hard link.
		if mode&0o170000 != 0o040000 && (links != 1 || inodes[inode]) {
			return nil, fmt.Errorf("%s: inode %d, %d links", name, inode, links)
		}
		inodes[inode] = true
		entries = append(entries, cpioEntry{name, uint32(mode), string(data[bodyStart : bodyStart+size])})
	}
	return entries, nil
}

var cpioEntries = []cpioEntry{
	{"dev", 0o040755, ""},
	{"a", 0o100644, ""},
	{"ab", 0o100644, "1"},
	{"abc", 0o100755, "12"},
	{"abcd", 0o104755, "123"},
	{"dev/e\u00e4", 0o100600, strings.Repeat("x", 4096)},
	{"link", 0o120777, "../target"},
}

func writeCPIO(t *testing.T, entries []cpioEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := newCPIOWriter(&b)
	for _, e := range entries {
		if err := w.Add(e.name, e.mode, int64(len(e.body)), strings.NewReader(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What was written is what an independent reader finds, for every alignment of
// names and bodies; also in two archives, one behind the other.
func TestCPIORoundTrip(t *testing.T) {
	archive := writeCPIO(t, cpioEntries)
	got, err := readCPIO(archive)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, cpioEntries) {
		t.Errorf("read %v", got)
	}
	if got, err = readCPIO(append(archive, writeCPIO(t, cpioEntries[:2])...)); err != nil {
		t.Fatal(err)
	}
	if want := slices.Concat(cpioEntries, cpioEntries[:2]); !slices.Equal(got, want) {
		t.Errorf("two archives: read %v", got)
	}
}

// The program cpio, where there is one, reads the archive, too.
func TestCPIOProgram(t *testing.T) {
	program, err := exec.LookPath("cpio")
	if err != nil {
		t.Log("this host has no cpio; the reader of TestCPIORoundTrip stands for it")
		return
	}
	cmd := exec.Command(program, "-t", "--quiet")
	cmd.Stdin = bytes.NewReader(writeCPIO(t, cpioEntries))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, e := range cpioEntries {
		want.WriteString(e.name + "\n")
	}
	// Names with bytes above 127 are shown escaped.
	if got := strings.ReplaceAll(string(out), `\303\244`, "\u00e4"); got != want.String() {
		t.Errorf("cpio -t:\n%s", got)
	}
}

// A body that ends early, a size that does not fit and a failing writer are
// errors, and stay errors.
func TestCPIOErrors(t *testing.T) {
	w := newCPIOWriter(io.Discard)
	if err := w.Add("x", 0o100644, 4, strings.NewReader("abc")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short body: %v", err)
	}
	if err := w.Close(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("close after a short body: %v", err)
	}
	if err := newCPIOWriter(io.Discard).Add("x", 0o100644, 1<<32, nil); err == nil {
		t.Error("4 GiB were accepted")
	}
	r, pipe := io.Pipe()
	r.Close()
	if err := newCPIOWriter(pipe).Close(); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("closed pipe: %v", err)
	}
}

// An image has the directories of its files before them, keeps permissions and
// set-user-ID bits, and takes links as links.
func TestImage(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("code"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(program, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("program", filepath.Join(dir, "alias")); err != nil {
		t.Fatal(err)
	}
	img := newImage()
	img.AddLink("lib", "usr/lib")
	if err := img.AddTree("/usr/bin", dir); err != nil {
		t.Fatal(err)
	}
	if err := img.AddFile("/none", filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	var b bytes.Buffer
	if err := img.Write(&b); err != nil {
		t.Fatal(err)
	}
	got, err := readCPIO(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	want := []cpioEntry{
		{"lib", 0o120777, "usr/lib"},
		{"usr", 0o040755, ""},
		{"usr/bin", 0o040755, ""},
		{"usr/bin/alias", 0o120777, "program"},
		{"usr/bin/empty", 0o040755, ""},
		{"usr/bin/program", 0o104755, "code"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}
