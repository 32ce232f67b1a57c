package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/recorder"
)

func list(paths ...string) *recorder.List {
	l := &recorder.List{Complete: true}
	for _, path := range paths {
		l.Entries = append(l.Entries, recorder.Entry{Path: path, Ops: kernstream.OpOpen, Count: 1})
	}
	return l
}

// TestPaths: the order of the record, without what does not fit on a line.
func TestPaths(t *testing.T) {
	l := list("/usr/bin/b", "/etc/a\nb", "/usr/lib/a b", "/usrlib/x", "/\xff")
	for _, c := range []struct {
		root     string
		relative bool
		want     string
	}{
		{"/", false, "/usr/bin/b\n/usr/lib/a b\n/usrlib/x\n/\xff\n"},
		{"/", true, "usr/bin/b\nusr/lib/a b\nusrlib/x\n\xff\n"},
		{"/usr/", false, "/bin/b\n/lib/a b\n"},
	} {
		var out, complaints bytes.Buffer
		if err := write(&out, &complaints, l, c.root, c.relative); err != nil || out.String() != c.want {
			t.Errorf("%q, %v; want %q", out.String(), err, c.want)
		}
		if said := strings.Contains(complaints.String(), `/etc/a\nb`); said != (c.root == "/") {
			t.Errorf("complaints: %q", complaints.String())
		}
	}
}

// TestRecords: a record is read whole or not at all, and an incomplete one only if that was
// asked for.
func TestRecords(t *testing.T) {
	name := filepath.Join(t.TempDir(), "record")
	l := list("/a")
	l.Complete, l.Reasons = false, []string{"the queue was full"}
	if err := l.WriteFile(name); err != nil {
		t.Fatal(err)
	}
	if _, err := read(name, false); err == nil || !strings.Contains(err.Error(), "the queue was full") {
		t.Errorf("an incomplete record: %v", err)
	}
	if got, err := read(name, true); err != nil || len(got.Entries) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.Truncate(name, 10); err != nil {
		t.Fatal(err)
	}
	if _, err := read(name, true); err == nil {
		t.Error("half a record is taken")
	}
	if _, err := read(name+"none", false); err == nil {
		t.Error("no record is taken")
	}
	if err := write(io.Discard, io.Discard, list("/a"), "", false); err != nil {
		t.Error(err)
	}
}
