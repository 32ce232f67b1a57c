package procfs_test

import (
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
)

const (
	escapedInPaths = " \t\n\\"
	escapedInNames = escapedInPaths + "#" // in types and sources
)

// escape does what the kernel's seq_escape does.
func escape(s, set string) string {
	var b strings.Builder
	for i := range len(s) {
		if strings.IndexByte(set, s[i]) < 0 {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, `\%03o`, s[i])
		}
	}
	return b.String()
}

// encode makes a row as the kernel does.
func encode(m procfs.MountInfo) string {
	optional := ""
	for _, field := range m.Optional {
		optional += field + " "
	}
	return fmt.Sprintf("%d %d %d:%d %s %s %s %s- %s %s %s", m.ID, m.ParentID, m.Major, m.Minor,
		escape(m.Root, escapedInPaths), escape(m.MountPoint, escapedInPaths), m.Options, optional,
		escape(m.FSType, escapedInNames), escape(m.Source, escapedInNames), m.SuperOptions)
}

// anyEscape is what Unescape decodes.
var anyEscape = regexp.MustCompile(`\\[0-3][0-7][0-7]`)

// unescape is Unescape, written in another way.
func unescape(s string) string {
	return anyEscape.ReplaceAllStringFunc(s, func(match string) string {
		n, err := strconv.ParseUint(match[1:], 8, 8)
		if err != nil {
			panic(err)
		}
		return string([]byte{byte(n)})
	})
}

// TestMountInfoLongRows: no part of a row is too long.
func TestMountInfoLongRows(t *testing.T) {
	want := procfs.MountInfo{
		ID: 1, ParentID: 2, Major: 3, Minor: 4,
		Root:         "/" + strings.Repeat("root \\", 2_000),
		MountPoint:   strings.Repeat("/a directory's name", 8_000/19),
		Options:      "rw" + strings.Repeat(",option", 1_000),
		FSType:       strings.Repeat("fuse#", 1_000),
		Source:       strings.Repeat("source ", 1_000),
		SuperOptions: "ro" + strings.Repeat(",lowerdir+="+strings.Repeat("/layer", 35), 500), // 112 KB
	}
	for i := range 1_000 {
		want.Optional = append(want.Optional, fmt.Sprintf("tag:%d", i))
	}
	var parser procfs.MountInfoParser
	got, err := parser.Parse(encode(want))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %.300q", fmt.Sprint(got))
	}
}

// TestMountInfoDamaged: a row that is not one is an error that says where, and
// what stood before is kept.
func TestMountInfoDamaged(t *testing.T) {
	const (
		id     = "mount ID is not a number"
		parent = "parent ID is not a number"
		device = "device is not two numbers"
	)
	type info = procfs.MountInfo
	ids := info{ID: 7, ParentID: 1}
	for _, c := range []struct {
		row  string
		want info
		err  string
	}{
		{"", info{}, id},
		{" ", info{}, id},
		{" 7 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"\t7 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"-7 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"+7 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"0x7 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"7_0 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"7.0 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"7\t1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"٧ 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"4294967296 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"9999999999 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"18446744073709551623 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"00000000007 1 0:5 / / rw - tmpfs t rw", info{}, id},
		{"\xff", info{}, id},
		{"7", info{ID: 7}, parent},
		{"7 ", info{ID: 7}, parent},
		{"7  1 0:5 / / rw - tmpfs t rw", info{ID: 7}, parent},
		{"7 -1 0:5 / / rw - tmpfs t rw", info{ID: 7}, parent},
		{"7 0x1 0:5 / / rw - tmpfs t rw", info{ID: 7}, parent},
		{"7 4294967296 0:5 / / rw - tmpfs t rw", info{ID: 7}, parent},
		{"7 1", ids, device},
		{"7 1 5 / / rw - tmpfs t rw", ids, device},
		{"7 1 : / / rw - tmpfs t rw", ids, device},
		{"7 1 :5 / / rw - tmpfs t rw", ids, device},
		{"7 1 -0:5 / / rw - tmpfs t rw", ids, device},
		{"7 1 0:5:6 / / rw - tmpfs t rw", ids, device},
		{"7 1 0:0x5 / / rw - tmpfs t rw", ids, device},
		{"7 1 4294967296:5 / / rw - tmpfs t rw", ids, device},
		{"7 1 8: / / rw - tmpfs t rw", ids, device},
		{"7 1 8:4294967296 / / rw - tmpfs t rw", ids, device},
		{"7 1 0:5", info{ID: 7, ParentID: 1, Minor: 5}, "no mount options"},
		{`7 1 0:5 /r\040 /m`, info{ID: 7, ParentID: 1, Minor: 5, Root: "/r ", MountPoint: "/m"}, "no mount options"},
		{"7 1 0:5 / /m rw", info{ID: 7, ParentID: 1, Minor: 5, Root: "/", MountPoint: "/m", Options: "rw"}, "no separator after the optional fields"},
		{"7 1 0:5 / /m rw shared:1 - ", info{ID: 7, ParentID: 1, Minor: 5, Root: "/", MountPoint: "/m", Options: "rw", Optional: tags("shared:1")}, "no file system type"},
		{"7 1 0:5 / /m rw - tmpfs", info{ID: 7, ParentID: 1, Minor: 5, Root: "/", MountPoint: "/m", Options: "rw", FSType: "tmpfs"}, "no super block options"},
		{`7 1 0:5 / /m rw - tmpfs a\040b`, info{ID: 7, ParentID: 1, Minor: 5, Root: "/", MountPoint: "/m", Options: "rw", FSType: "tmpfs", Source: "a b"}, "no super block options"},
	} {
		var parser procfs.MountInfoParser
		got, err := parser.Parse(c.row)
		if err == nil || err.Error() != c.err {
			t.Errorf("row %q: error %v, want %s", c.row, err, c.err)
		}
		// Of a device that is damaged, either number may be there.
		if c.err == device {
			got.Major, got.Minor, c.want.Major, c.want.Minor = 0, 0, 0, 0
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("row %q:\ngot  %#v\nwant %#v", c.row, got, c.want)
		}
	}
}

// TestMountInfoCutShort: a row that ends early, wherever that is, has the
// fields that stand whole in it, and is an error as long as one is missing.
func TestMountInfoCutShort(t *testing.T) {
	for name, infos := range corpus {
		for i, row := range corpusRows(t, name) {
			whole := infos[i]
			var parser procfs.MountInfoParser
			for cut := range len(row) {
				got, err := parser.Parse(row[:cut])
				// How many fields a space ends. The super block options
				// may be empty, but not missing.
				ended := strings.Count(row[:cut], " ")
				if (err == nil) != (ended >= 9+len(whole.Optional)) {
					t.Fatalf("row %q: error %v", row[:cut], err)
				}
				want := procfs.MountInfo{}
				for field, take := range []func(){
					func() { want.ID = whole.ID },
					func() { want.ParentID = whole.ParentID },
					func() { want.Major, want.Minor = whole.Major, whole.Minor },
					func() { want.Root = whole.Root },
					func() { want.MountPoint = whole.MountPoint },
					func() { want.Options = whole.Options },
				} {
					if field < ended {
						take()
					}
				}
				if ended > 6+len(whole.Optional) { // the separator
					want.Optional = whole.Optional
				}
				if ended > 7+len(whole.Optional) {
					want.FSType = whole.FSType
				}
				if ended > 8+len(whole.Optional) {
					want.Source = whole.Source
				}
				if err == nil {
					want.SuperOptions = whole.SuperOptions[:len(whole.SuperOptions)-(len(row)-cut)]
				}
				blankUnended(&got, ended, len(whole.Optional))
				if !reflect.DeepEqual(got, want) {
					t.Fatalf("row %q:\ngot  %#v\nwant %#v", row[:cut], got, want)
				}
			}
		}
	}
}

// blankUnended makes the field that no space ends empty, since a part of it may
// have been taken for the whole. The optional fields end with their separator.
func blankUnended(m *procfs.MountInfo, ended, optional int) {
	if ended <= 6+optional {
		m.Optional = nil
	}
	switch ended {
	case 0:
		m.ID = 0
	case 1:
		m.ParentID = 0
	case 2:
		m.Major, m.Minor = 0, 0
	case 3:
		m.Root = ""
	case 4:
		m.MountPoint = ""
	case 5:
		m.Options = ""
	case 7 + optional:
		m.FSType = ""
	case 8 + optional:
		m.Source = ""
	}
}

// TestMountInfoOptionalFieldsStay: rows decoded later change nothing in the
// optional fields of earlier ones, and neither does appending to a neighbour's.
func TestMountInfoOptionalFieldsStay(t *testing.T) {
	var parser procfs.MountInfoParser
	var got, want [][]string
	for i := range 3_000 {
		var fields []string
		for k := range []int{0, 1, 2, 1, 0, 4, 200}[i%7] {
			fields = append(fields, fmt.Sprintf("tag:%d.%d", i, k))
		}
		row := encode(procfs.MountInfo{ID: 1, Root: "/", MountPoint: "/", Options: "rw", Optional: fields, FSType: "t"})
		if i%5 == 4 {
			cut := strings.Index(row, " - ")
			if _, err := parser.Parse(row[:cut]); err == nil {
				t.Fatal("a damaged row was decoded")
			}
		}
		m, err := parser.Parse(row)
		if err != nil {
			t.Fatal(err)
		}
		got, want = append(got, m.Optional), append(want, fields)
	}
	for _, fields := range got {
		_ = append(fields, "overwritten")
	}
	for i := range got {
		if !reflect.DeepEqual(got[i], want[i]) {
			t.Fatalf("row %d: got %q, want %q", i, got[i], want[i])
		}
	}
}

// TestMountInfoAllocations: decoding a row without escapes allocates next to
// nothing.
func TestMountInfoAllocations(t *testing.T) {
	rows := manyRows(1_000)
	var parser procfs.MountInfoParser
	allocs := testing.AllocsPerRun(20, func() {
		for _, row := range rows {
			if _, err := parser.Parse(row); err != nil {
				t.Fatal(err)
			}
		}
	})
	if perRow := allocs / float64(len(rows)); perRow > 0.02 {
		t.Errorf("%v allocations per row", perRow)
	}
}

// TestUnescape: an escape is a backslash and three octal digits of one byte;
// every other backslash stays. All short strings of the characters that matter
// are tried.
func TestUnescape(t *testing.T) {
	for _, c := range []struct{ escaped, want string }{
		{``, ``},
		{`plain`, `plain`},
		{`a\040b\011c\012d\134e\043f`, "a b\tc\nd\\e#f"},
		{`\134040`, `\040`},
		{`\000\377`, "\x00\xff"},
		{`\400\08\1\`, `\400\08\1\`},
		{`\\040`, `\ `},
		{"\xff\\303\\244", "\xffä"},
	} {
		if got := procfs.Unescape(c.escaped); got != c.want {
			t.Errorf("Unescape(%q) = %q, want %q", c.escaped, got, c.want)
		}
	}

	const characters = `\01347 8`
	var try func(s string)
	try = func(s string) {
		if got, want := procfs.Unescape(s), unescape(s); got != want {
			t.Errorf("Unescape(%q) = %q, want %q", s, got, want)
		}
		if len(s) < 5 {
			for i := range len(characters) {
				try(s + characters[i:i+1])
			}
		}
	}
	try("")

	for b := range 256 {
		if escaped := fmt.Sprintf(`<\%03o>`, b); procfs.Unescape(escaped) != string([]byte{'<', byte(b), '>'}) {
			t.Errorf("Unescape(%q) = %q", escaped, procfs.Unescape(escaped))
		}
	}
}
