package procfs_test

import (
	"bytes"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
)

// FuzzMountInfo: no row makes the parser panic, a row that is decoded can be
// made again from its fields so that it means the same, and the parser is not
// confused by what it decoded before.
func FuzzMountInfo(f *testing.F) {
	f.Fuzz(func(t *testing.T, row string) {
		var parser procfs.MountInfoParser
		got, err := parser.Parse(row)
		if _, ok := rowID(row); !ok && (err == nil || got.ID != 0) {
			t.Errorf("a row without an ID has ID %d, error %v", got.ID, err)
		}
		if again, errAgain := parser.Parse(row); !reflect.DeepEqual(again, got) || (err == nil) != (errAgain == nil) {
			t.Errorf("got %#v, %v and then %#v, %v", got, err, again, errAgain)
		}
		if err != nil {
			return
		}
		made := encode(got)
		again, err := parser.Parse(made)
		if err != nil {
			t.Fatalf("made again %q: %v", made, err)
		}
		if !reflect.DeepEqual(again, got) {
			t.Errorf("made again %q:\ngot  %#v\nwant %#v", made, again, got)
		}
		if strings.Count(made, " ") != strings.Count(row, " ") {
			t.Errorf("made again %q, with more or fewer fields", made)
		}
	})
}

// FuzzUnescape: the decoder does what a simple one does, and what the kernel
// escapes is decoded to what it was.
func FuzzUnescape(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		got := procfs.Unescape(s)
		if want := unescape(s); got != want {
			t.Errorf("Unescape(%q) = %q, want %q", s, got, want)
		}
		for _, set := range []string{escapedInPaths, escapedInNames, ", \t\n\\"} {
			if back := procfs.Unescape(escape(s, set)); back != s {
				t.Errorf("Unescape(%q) = %q, want %q", escape(s, set), back, s)
			}
			if back := procfs.Unescape(escape(got, set)); back != got {
				t.Errorf("Unescape(%q) = %q, want %q", escape(got, set), back, got)
			}
		}
	})
}

// FuzzMountTable: three texts are compared one after the other, as they are and
// without repeated IDs. Each comparison says what a simple one says, and the
// table holds what was committed. The second comparison is dropped, or
// committed instead of the third.
func FuzzMountTable(f *testing.F) {
	f.Fuzz(func(t *testing.T, first, second, third []byte, keepSecond bool) {
		if len(first)+len(second)+len(third) > 64<<10 {
			t.Skip()
		}
		for _, prepare := range []func([]byte) []byte{
			bytes.Clone,
			func(text []byte) []byte { return procfs.DropRepeated(bytes.Clone(text)) },
		} {
			a, b, c := prepare(first), prepare(second), prepare(third)
			var table checkedTable
			if _, err := table.update(a); err != nil {
				t.Fatal(err)
			}
			d, err := table.compare(b)
			if err != nil {
				t.Fatal(err)
			}
			e, err := table.compare(c)
			if err != nil {
				t.Fatal(err)
			}
			if keepSecond {
				e, c = d, b
			}
			if err := table.commit(e, c); err != nil {
				t.Fatal(err)
			}
			d, err = table.update(c)
			if err != nil {
				t.Fatal(err)
			}
			if !table.repeated && !d.Empty() {
				t.Errorf("the same text again: %s", summary(d))
			}
			if _, err := table.update(a); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzDropRepeated: the rows left are those that a simple implementation
// leaves, nothing is repeated in them, and a second time changes nothing.
func FuzzDropRepeated(f *testing.F) {
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 16<<10 {
			t.Skip()
		}
		want := dropRepeated(tableRows(text))
		beyond := append(bytes.Clone(text), "\nbeyond the text"...)
		got := procfs.DropRepeated(beyond[:len(text)])
		if rows := tableRows(got); !slices.Equal(rows, want) {
			t.Fatalf("got  %q\nwant %q", rows, want)
		}
		if repeatsID(want) {
			t.Errorf("an ID is repeated in %q", want)
		}
		if len(got) > 0 && got[len(got)-1] != '\n' {
			t.Errorf("no final line feed in %q", got)
		}
		if string(beyond[len(text)+1:]) != "beyond the text" {
			t.Errorf("written beyond the text: %q", beyond[len(text):])
		}
		if again := procfs.DropRepeated(bytes.Clone(got)); !bytes.Equal(again, got) {
			t.Errorf("a second time: %q, want %q", again, got)
		}
	})
}
