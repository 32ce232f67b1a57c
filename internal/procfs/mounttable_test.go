package procfs_test

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
)

// rowID returns the mount ID of a row, if it has one: a number of at most ten
// digits that fits in 32 bits.
func rowID(row string) (id uint32, ok bool) {
	field, _, _ := strings.Cut(row, " ")
	n, err := strconv.ParseUint(field, 10, 32)
	return uint32(n), err == nil && len(field) <= 10
}

// sameMount tells whether two rows of one ID may be of one mount: what moves
// does not change otherwise. Of a row that cannot be decoded it cannot be known.
func sameMount(a, b string) bool {
	var parser procfs.MountInfoParser
	x, errX := parser.Parse(a)
	y, errY := parser.Parse(b)
	switch {
	case errX != nil || errY != nil:
		return true
	case x.Major != y.Major || x.Minor != y.Minor || x.FSType != y.FSType:
		return false
	case x.MountPoint == y.MountPoint && x.ParentID == y.ParentID:
		return true
	}
	return x.Root == y.Root && x.Source == y.Source && x.SuperOptions == y.SuperOptions
}

// checkDiff returns how d differs from what a comparison of the rows of a table
// with the rows of a text should yield, or nil. last is the greatest Seq there
// was.
//
// Where an ID stands twice, it is left open which of the rows belong together,
// but not that each row is accounted for once. exact is false for a table in
// which one did.
func checkDiff(table []*procfs.MountRow, text []string, d *procfs.MountDiff, last uint64, exact bool) error {
	if len(d.Rows) != len(text) {
		return fmt.Errorf("%d rows, the text has %d", len(d.Rows), len(text))
	}
	inTable := make(map[*procfs.MountRow]bool)
	idsOfText := make(map[uint32]int)
	byID := make(map[uint32]*procfs.MountRow)
	withoutID := make(map[string]int)
	for _, row := range table {
		inTable[row] = true
		if id, ok := rowID(row.Raw); ok {
			byID[id] = row
		} else {
			withoutID[row.Raw]++
		}
	}
	for _, line := range text {
		if id, ok := rowID(line); ok {
			idsOfText[id]++
		}
	}

	changed, added := d.Changed, d.New
	used := make(map[*procfs.MountRow]bool)
	kept := 0
	for i, row := range d.Rows {
		line := text[i]
		if row.Raw != line {
			return fmt.Errorf("row %d is %q, want %q", i, row.Raw, line)
		}
		var was *procfs.MountRow // the row of the table that this one follows
		switch {
		case inTable[row]:
			was = row
		case len(changed) > 0 && changed[0].New == row:
			was = changed[0].Old
			if !inTable[was] || was.Raw == line || was.Seq != row.Seq || row.Hidden {
				return fmt.Errorf("row %q, number %d, changed to %q, number %d, hidden %t", was.Raw, was.Seq, line, row.Seq, row.Hidden)
			}
			changed = changed[1:]
		case len(added) > 0 && added[0] == row:
			if row.Seq <= last || row.Hidden {
				return fmt.Errorf("row %q is new and has number %d; there was %d; hidden %t", line, row.Seq, last, row.Hidden)
			}
			last = row.Seq
			added = added[1:]
		default:
			return fmt.Errorf("row %q is neither old nor changed nor new, or out of order", line)
		}
		if was != nil {
			if used[was] {
				return fmt.Errorf("row %q is in the result twice", was.Raw)
			}
			used[was] = true
			kept++
		}
		id, hasID := rowID(line)
		if !hasID {
			if (was != nil) != (withoutID[line] > 0) {
				return fmt.Errorf("row %q without an ID: kept is %t", line, was != nil)
			}
			withoutID[line]--
			continue
		}
		if was != nil {
			if wasID, ok := rowID(was.Raw); !ok || wasID != id || !sameMount(was.Raw, line) {
				return fmt.Errorf("row %q is taken for the mount of %q", line, was.Raw)
			}
		}
		if !exact || idsOfText[id] > 1 {
			continue
		}
		want := byID[id]
		if want != nil && !sameMount(want.Raw, line) {
			want = nil
		}
		if was != want {
			return fmt.Errorf("row %q: old row %v, want %v", line, was, want)
		}
	}
	if len(changed)+len(added) > 0 {
		return fmt.Errorf("%d changed and %d new rows are not in the text, or out of order", len(changed), len(added))
	}
	if d.Kept != kept {
		return fmt.Errorf("%d mounts kept, want %d", d.Kept, kept)
	}
	var gone []*procfs.MountRow
	for _, row := range table {
		if !used[row] {
			gone = append(gone, row)
		}
	}
	if !slices.Equal(d.Gone, gone) {
		return fmt.Errorf("gone %v, want %v", d.Gone, gone)
	}
	if empty := len(d.New)+len(d.Changed)+len(gone) == 0; d.Empty() != empty {
		return fmt.Errorf("empty is %t", d.Empty())
	}
	return nil
}

// checkTable returns what is wrong with the table after the rows of text were
// committed, or nil. exact is as in checkDiff.
func checkTable(table *procfs.MountTable, text []string, exact bool) error {
	rows := table.Rows()
	if len(rows) != len(text) {
		return fmt.Errorf("%d rows in the table, the text has %d", len(rows), len(text))
	}
	var parser procfs.MountInfoParser
	for i, row := range rows {
		if row.Raw != text[i] {
			return fmt.Errorf("row %d of the table is %q, want %q", i, row.Raw, text[i])
		}
		info, err := parser.Parse(text[i])
		if !reflect.DeepEqual(row.MountInfo, info) {
			return fmt.Errorf("row %q is %#v, want %#v", row.Raw, row.MountInfo, info)
		}
		if (err == nil) != (row.Err == nil) || err != nil && row.Err.Error() != err.Error() {
			return fmt.Errorf("row %q has error %v, want %v", row.Raw, row.Err, err)
		}
	}
	return table.Check(exact)
}

// repeatsID tells whether an ID stands in the rows twice.
func repeatsID(rows []string) bool {
	ids := make(map[uint32]bool)
	for _, row := range rows {
		id, ok := rowID(row)
		if ok && ids[id] {
			return true
		}
		ids[id] = ids[id] || ok
	}
	return false
}

// tableRows returns the rows of a text, with or without a final line feed.
func tableRows(text []byte) []string {
	var rows []string
	for len(text) > 0 {
		row, rest, _ := bytes.Cut(text, []byte{'\n'})
		rows, text = append(rows, string(row)), rest
	}
	return rows
}

// A checkedTable is a MountTable each step of which is checked.
type checkedTable struct {
	procfs.MountTable
	last     uint64 // the greatest Seq so far
	repeated bool   // an ID stood in it twice
}

// compare compares with text, which it destroys afterwards.
func (t *checkedTable) compare(text []byte) (*procfs.MountDiff, error) {
	before := slices.Clone(t.Rows())
	text = bytes.Clone(text)
	rows := tableRows(text)
	d := t.Compare(text, nil)
	for i := range text {
		text[i] = '~'
	}
	if err := checkDiff(before, rows, d, t.last, !t.repeated); err != nil {
		return nil, err
	}
	if !slices.Equal(t.Rows(), before) {
		return nil, fmt.Errorf("comparing changed the table")
	}
	if n := len(d.New); n > 0 {
		t.last = d.New[n-1].Seq
	}
	return d, nil
}

func (t *checkedTable) commit(d *procfs.MountDiff, text []byte) error {
	t.Commit(d)
	rows := tableRows(text)
	t.repeated = t.repeated || repeatsID(rows)
	return checkTable(&t.MountTable, rows, !t.repeated)
}

// update compares with text and takes it over.
func (t *checkedTable) update(text []byte) (*procfs.MountDiff, error) {
	d, err := t.compare(text)
	if err != nil {
		return nil, err
	}
	return d, t.commit(d, text)
}

// tableRow returns a row with that mount ID, device and options.
func tableRow(id, device int, options string) string {
	return fmt.Sprintf("%d 1 0:%d / /mnt/%d %s shared:1 - tmpfs t rw", id, device, id, options)
}

// TestMountTableCompare: what is said about each kind of change.
func TestMountTableCompare(t *testing.T) {
	var (
		a, b, c  = tableRow(1, 101, "rw"), tableRow(2, 102, "rw"), tableRow(3, 103, "rw")
		d, e     = tableRow(4, 104, "rw"), tableRow(5, 105, "rw")
		bRO      = tableRow(2, 102, "ro")
		bReused  = tableRow(2, 109, "rw")
		bType    = strings.Replace(b, "tmpfs", "ramfs", 1)
		bMoved   = strings.Replace(b, "/mnt/2", "/elsewhere", 1)
		bDamaged = "2 1 damaged"
		zero     = tableRow(0, 100, "rw")
		noID     = "no ID"
	)
	for _, test := range []struct {
		name     string
		old, new []string
		want     string // "-" gone, "~" changed, "+" new; and the number kept
	}{
		{"nothing at all", nil, nil, "0"},
		{"the first text", nil, []string{a, b}, "+1 +2 0"},
		{"the same", []string{a, b, c}, []string{a, b, c}, "3"},
		{"one gone at the start", []string{a, b, c}, []string{b, c}, "-1 2"},
		{"one gone in the middle", []string{a, b, c}, []string{a, c}, "-2 2"},
		{"one gone at the end", []string{a, b, c}, []string{a, b}, "-3 2"},
		{"two gone in a row", []string{a, b, c, d, e}, []string{a, d, e}, "-2 -3 3"},
		{"two gone apart", []string{a, b, c, d, e}, []string{a, c, e}, "-2 -4 3"},
		{"all gone", []string{a, b, c}, nil, "-1 -2 -3 0"},
		{"one new at the end", []string{a, b}, []string{a, b, c}, "+3 2"},
		{"one new at the start", []string{b, c}, []string{a, b, c}, "+1 2"},
		{"one new in the middle", []string{a, c}, []string{a, b, c}, "+2 2"},
		{"one gone, one new", []string{a, b, c}, []string{a, c, d}, "-2 +4 2"},
		{"all others", []string{a, b}, []string{c, d}, "-1 -2 +3 +4 0"},
		{"one changed", []string{a, b, c}, []string{a, bRO, c}, "~2 3"},
		{"one moved", []string{a, b, c}, []string{a, bMoved, c}, "~2 3"},
		{"one changed, its neighbours gone", []string{a, b, c}, []string{bRO}, "-1 -3 ~2 1"},
		{"another order", []string{a, b, c, d}, []string{d, c, b, a}, "4"},
		{"one to the end", []string{a, b, c}, []string{b, c, a}, "3"},
		{"one to the start, and changed", []string{a, b, c, d}, []string{bRO, a, c, d}, "~2 4"},
		{"ID reused on the spot, other device", []string{a, b, c}, []string{a, bReused, c}, "-2 +2 2"},
		{"ID reused on the spot, other type", []string{a, b, c}, []string{a, bType, c}, "-2 +2 2"},
		{"ID reused at the end, other device", []string{a, b, c}, []string{a, c, bReused}, "-2 +2 2"},
		{"ID reused at the end, same device and type", []string{a, b, c}, []string{a, c, bRO}, "~2 3"},
		{"ID reused at the end, same row", []string{a, b, c}, []string{a, c, b}, "3"},
		{"damaged", []string{a, b, c}, []string{a, bDamaged, c}, "~2 3"},
		{"whole again", []string{a, bDamaged, c}, []string{a, b, c}, "~2 3"},
		{"damaged and the same", []string{a, bDamaged, c}, []string{a, bDamaged, c}, "3"},
		{"without an ID and the same", []string{a, noID, c}, []string{a, noID, c}, "3"},
		{"without an ID, elsewhere", []string{a, noID, c}, []string{noID, c, a}, "3"},
		{"without an ID, another", []string{a, noID, c}, []string{a, noID + " x", c}, "-no ID +no ID x 2"},
		{"without an ID, one of two gone", []string{noID, a, noID}, []string{a, noID}, "-no ID 2"},
		{"without an ID, new", []string{a}, []string{noID, a, noID}, "+no ID +no ID 1"},
		{"without an ID, gone, beside the ID 0", []string{zero, noID}, []string{zero}, "-no ID 1"},
		{"empty rows", []string{a}, []string{"", a, ""}, "+ + 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, final := range []string{"\n", ""} {
				var table checkedTable
				if _, err := table.update(textOf(test.old)); err != nil {
					t.Fatal(err)
				}
				text := textOf(test.new)
				if len(test.new) > 0 && test.new[len(test.new)-1] != "" {
					text = append(bytes.TrimSuffix(text, []byte{'\n'}), final...)
				}
				d, err := table.update(text)
				if err != nil {
					t.Fatal(err)
				}
				if got := summary(d); got != test.want {
					t.Errorf("%q, want %q", got, test.want)
				}
				if d, err = table.update(text); err != nil || !d.Empty() {
					t.Errorf("the same again: %q, %v", summary(d), err)
				}
			}
		})
	}
}

// summary tells the IDs of the rows that are gone, changed and new, and how
// many mounts were kept.
func summary(d *procfs.MountDiff) string {
	var words []string
	say := func(sign string, row *procfs.MountRow) {
		name := row.Raw
		if id, ok := rowID(row.Raw); ok {
			name = fmt.Sprint(id)
		}
		words = append(words, sign+name)
	}
	for _, row := range d.Gone {
		say("-", row)
	}
	for _, change := range d.Changed {
		say("~", change.New)
	}
	for _, row := range d.New {
		say("+", row)
	}
	return strings.Join(append(words, fmt.Sprint(d.Kept)), " ")
}

// TestMountTableHidden: what the user noted in a row stays as long as the row
// does, and a row that differs starts anew.
func TestMountTableHidden(t *testing.T) {
	var table checkedTable
	rows := []string{tableRow(1, 101, "rw"), tableRow(2, 102, "rw"), tableRow(3, 103, "rw")}
	if _, err := table.update(textOf(rows)); err != nil {
		t.Fatal(err)
	}
	for _, row := range table.Rows() {
		row.Hidden = true
	}
	rows[1] = tableRow(2, 102, "ro")
	if _, err := table.update(textOf(rows)); err != nil {
		t.Fatal(err)
	}
	var hidden []bool
	for _, row := range table.Rows() {
		hidden = append(hidden, row.Hidden)
	}
	if want := []bool{true, false, true}; !slices.Equal(hidden, want) {
		t.Errorf("hidden %t, want %t", hidden, want)
	}
}

// TestMountTableSeq: the number of a mount stays through all changes of its
// row, and those of later mounts are greater, also after a text was dropped.
func TestMountTableSeq(t *testing.T) {
	var table checkedTable
	seqs := func(rows ...string) (list []uint64) {
		t.Helper()
		if _, err := table.update(textOf(rows)); err != nil {
			t.Fatal(err)
		}
		for _, row := range table.Rows() {
			list = append(list, row.Seq)
		}
		return list
	}
	a, b, c := tableRow(1, 101, "rw"), tableRow(2, 102, "rw"), tableRow(3, 103, "rw")
	first := seqs(a, b)
	if first[0] >= first[1] {
		t.Errorf("numbers %d of two mounts", first)
	}
	for _, options := range []string{"ro", "rw,noexec", "rw"} {
		if got := seqs(tableRow(1, 101, options), b); !slices.Equal(got, first) {
			t.Errorf("numbers %d after a change, were %d", got, first)
		}
	}
	if got := seqs(b, a); got[0] != first[1] || got[1] != first[0] {
		t.Errorf("numbers %d in another order, were %d", got, first)
	}
	if _, err := table.compare(textOf([]string{a, b, c})); err != nil { // dropped
		t.Fatal(err)
	}
	second := seqs(b, tableRow(1, 109, "rw"), c)
	if second[0] != first[1] || second[1] <= first[1] || second[2] <= second[1] {
		t.Errorf("numbers %d after %d", second, first)
	}
}

// TestMountTableAllocations: comparing a text in which nothing changed
// allocates a list of the rows, and one in which one row changed little more.
func TestMountTableAllocations(t *testing.T) {
	rows := manyRows(1_000)
	var table procfs.MountTable
	text := textOf(rows)
	table.Commit(table.Compare(text, nil))
	for _, c := range []struct {
		name string
		edit func([]string) []string
		most float64
	}{
		{"same", func(rows []string) []string { return rows }, 3},
		{"changed", func(rows []string) []string { rows[500] += ",x"; return rows }, 7},
		{"removed", func(rows []string) []string { return append(rows[:500], rows[501:]...) }, 4},
		{"added", func(rows []string) []string { return append(rows, tableRow(5_000, 5_000, "rw")) }, 7},
	} {
		text := textOf(c.edit(slices.Clone(rows)))
		if allocs := testing.AllocsPerRun(20, func() { table.Compare(text, nil) }); allocs > c.most {
			t.Errorf("%s: %v allocations, want at most %v", c.name, allocs, c.most)
		}
	}
}
