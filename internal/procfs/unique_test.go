package procfs_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/testenv"
)

// A uniqueTable is a MountTable that is compared with texts whose rows have
// unique IDs.
type uniqueTable struct {
	*testing.T
	procfs.MountTable
}

// A uniqueRow is a row with its unique ID, 0 if that is not known.
type uniqueRow struct {
	unique uint64
	text   string
}

// child is a row with that short ID and that of its parent.
func child(unique uint64, id, parent int, options string) uniqueRow {
	return uniqueRow{unique, fmt.Sprintf("%d %d 0:%d / /mnt/%d %s - tmpfs t rw", id, parent, id, id, options)}
}

// update compares with rows and takes them over. It checks what holds of any
// rows: that IDs are kept in mind, and that d is a difference between the two
// tables.
func (t *uniqueTable) update(rows ...uniqueRow) *procfs.MountDiff {
	t.Helper()
	before := slices.Clone(t.Rows())
	var texts []string
	var ids []uint64
	for _, row := range rows {
		texts, ids = append(texts, row.text), append(ids, row.unique)
	}
	d := t.Compare(textOf(texts), ids)
	t.Commit(d)
	if len(t.Rows()) != len(rows) {
		t.Fatalf("%d rows, want %d", len(t.Rows()), len(rows))
	}
	for i, row := range t.Rows() {
		if row.Raw != rows[i].text || rows[i].unique != 0 && row.Unique != rows[i].unique {
			t.Fatalf("row %d is %q with ID %d, want %+v", i, row.Raw, row.Unique, rows[i])
		}
	}
	// The table before, without what is gone or changed, plus what is changed
	// or new, is the table after.
	kept := make(map[*procfs.MountRow]bool)
	for _, row := range before {
		kept[row] = true
	}
	add := func(row *procfs.MountRow) {
		if kept[row] {
			t.Errorf("row %q is added twice", row.Raw)
		}
		kept[row] = true
	}
	drop := func(row *procfs.MountRow) {
		if !kept[row] {
			t.Errorf("row %q is dropped twice, or was not there", row.Raw)
		}
		delete(kept, row)
	}
	for _, row := range d.Gone {
		drop(row)
	}
	for _, change := range d.Changed {
		drop(change.Old)
	}
	for _, change := range d.Changed {
		add(change.New)
		if change.Old.Seq != change.New.Seq || change.New.Hidden {
			t.Errorf("row %q, number %d, changed to number %d, hidden %t", change.Old.Raw, change.Old.Seq, change.New.Seq, change.New.Hidden)
		}
	}
	for _, row := range d.New {
		add(row)
	}
	for _, row := range t.Rows() {
		drop(row)
	}
	if len(kept) > 0 || d.Kept != len(rows)-len(d.New) {
		t.Errorf("%d rows are in the difference and not in the table; %d kept of %d", len(kept), d.Kept, len(rows))
	}
	return d
}

// want compares with rows, and checks the difference: its summary, and the
// unique IDs of the parents of all rows.
func (t *uniqueTable) want(summaryOf string, parents []uint64, rows ...uniqueRow) *procfs.MountDiff {
	t.Helper()
	d := t.update(rows...)
	if got := summary(d); got != summaryOf {
		t.Errorf("%q, want %q", got, summaryOf)
	}
	var got []uint64
	for _, row := range t.Rows() {
		got = append(got, row.ParentUnique)
	}
	if !slices.Equal(got, parents) {
		t.Errorf("parents %d, want %d", got, parents)
	}
	// Nothing is different from itself, whether its IDs are known or not.
	for i := range rows {
		if again := t.update(rows...); !again.Empty() || again.Kept != len(rows) {
			t.Errorf("the same again: %q", summary(again))
		}
		rows[i].unique = 0
	}
	return d
}

// TestUniqueReplaced: a row with another unique ID is of another mount, though
// its text is the same; one with the same ID is of the same mount, whatever its
// text.
func TestUniqueReplaced(t *testing.T) {
	var (
		a, b, c = child(101, 1, 0, "rw"), child(102, 2, 1, "rw"), child(103, 3, 1, "rw")
		again   = child(104, 2, 1, "rw") // on the spot of b
		changed = child(102, 2, 1, "ro")
		other   = uniqueRow{102, "2 1 9:9 /x /elsewhere ro - ramfs y ro"}
		damaged = uniqueRow{102, "2 1 damaged"}
		gone    = child(104, 2, 1, "ro")
		moved   = child(102, 2, 3, "rw")
	)
	for _, test := range []struct {
		name    string
		new     []uniqueRow
		want    string
		parents []uint64
	}{
		{"same", []uniqueRow{a, b, c}, "3", []uint64{0, 101, 101}},
		{"replaced by the same text, at the end", []uniqueRow{a, c, again}, "-2 +2 2", []uint64{0, 101, 101}},
		{"replaced by the same text, on the spot", []uniqueRow{a, again, c}, "-2 +2 2", []uint64{0, 101, 101}},
		{"replaced by another text", []uniqueRow{a, c, gone}, "-2 +2 2", []uint64{0, 101, 101}},
		{"changed", []uniqueRow{a, changed, c}, "~2 3", []uint64{0, 101, 101}},
		{"everything changed", []uniqueRow{a, other, c}, "~2 3", []uint64{0, 101, 101}},
		{"damaged", []uniqueRow{a, damaged, c}, "~2 3", []uint64{0, 101, 101}},
		{"on another parent", []uniqueRow{a, moved, c}, "~2 3", []uint64{0, 103, 101}},
		{"another order", []uniqueRow{c, b, a}, "3", []uint64{101, 101, 0}},
		{"all replaced", []uniqueRow{child(111, 1, 0, "rw"), child(112, 2, 1, "rw"), child(113, 3, 1, "rw")}, "-1 -2 -3 +1 +2 +3 0", []uint64{0, 111, 111}},
	} {
		t.Run(test.name, func(t *testing.T) {
			table := uniqueTable{T: t}
			table.want("+1 +2 +3 0", []uint64{0, 101, 101}, a, b, c)
			table.want(test.want, test.parents, test.new...)
			for _, row := range table.Rows() {
				if row.Seq != row.Unique {
					t.Errorf("row %q, ID %d, has number %d", row.Raw, row.Unique, row.Seq)
				}
			}
		})
	}
}

// TestUniqueUnknown: where an ID is not known, on either side, the guess from
// the text decides; an ID that was known stays known for the same mount, and one
// that comes to be known is a change, under the number that the mount has.
func TestUniqueUnknown(t *testing.T) {
	unknown := func(row uniqueRow) uniqueRow {
		row.unique = 0
		return row
	}
	var (
		known   = child(102, 2, 1, "rw")
		changed = child(102, 2, 1, "ro")
		other   = uniqueRow{103, "2 1 9:9 / /mnt/2 rw - ramfs t rw"}
	)
	for _, test := range []struct {
		name     string
		old, new uniqueRow
		want     string
		unique   uint64
		sameSeq  bool
	}{
		{"never known", unknown(known), unknown(known), "1", 0, true},
		{"forgotten", known, unknown(known), "1", 102, true},
		{"forgotten and changed", known, unknown(changed), "~2 1", 102, true},
		{"forgotten and another", known, unknown(other), "-2 +2 0", 0, false},
		{"learned", unknown(known), known, "~2 1", 102, true},
		{"learned and changed", unknown(known), changed, "~2 1", 102, true},
		{"learned and another", unknown(known), other, "-2 +2 0", 103, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			table := uniqueTable{T: t}
			table.update(test.old)
			seq := table.Rows()[0].Seq
			if got := summary(table.update(test.new)); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
			if row := table.Rows()[0]; row.Unique != test.unique || (row.Seq == seq) != test.sameSeq {
				t.Errorf("ID %d, want %d; number %d, was %d", row.Unique, test.unique, row.Seq, seq)
			}
		})
	}
}

// TestUniqueTooFew: rows for which there is no ID have none.
func TestUniqueTooFew(t *testing.T) {
	var table procfs.MountTable
	d := table.Compare([]byte("1 0 a\n2 0 b\n3 0 c\n"), []uint64{101, 102})
	var got []uint64
	for _, row := range d.Rows {
		got = append(got, row.Unique)
	}
	if want := []uint64{101, 102, 0}; !slices.Equal(got, want) {
		t.Errorf("IDs %d, want %d", got, want)
	}
}

// TestUniqueParentReplaced: a mount whose parent was replaced by one with the
// same short ID has changed, though its row has not. It may be listed before
// the parent.
func TestUniqueParentReplaced(t *testing.T) {
	var (
		root, parent = child(101, 1, 0, "rw"), child(102, 2, 1, "rw")
		on, below    = child(103, 3, 2, "rw"), child(104, 4, 3, "rw")
		changed      = child(103, 3, 2, "ro")
		next         = child(105, 2, 1, "rw")
		nextChanged  = child(105, 2, 1, "ro")
	)
	for _, test := range []struct {
		name    string
		new     []uniqueRow
		want    string
		parents []uint64
	}{
		{"listed before it", []uniqueRow{root, on, below, next}, "-2 ~3 +2 3", []uint64{0, 105, 103, 101}},
		{"listed behind it", []uniqueRow{root, next, on, below}, "-2 ~3 +2 3", []uint64{0, 101, 105, 103}},
		{"by one with another row", []uniqueRow{root, on, below, nextChanged}, "-2 ~3 +2 3", []uint64{0, 105, 103, 101}},
		{"and changed itself", []uniqueRow{root, changed, below, next}, "-2 ~3 +2 3", []uint64{0, 105, 103, 101}},
		{"and gone, too", []uniqueRow{root, next, below}, "-2 -3 +2 2", []uint64{0, 101, 103}},
		{"by none", []uniqueRow{root, on, below}, "-2 3", []uint64{0, 102, 103}},
		{"by none, and another says it is on it", []uniqueRow{root, on, below, child(106, 5, 2, "rw")}, "-2 +5 3", []uint64{0, 102, 103, 0}},
		{"by none, and another moved to it", []uniqueRow{root, on, child(104, 4, 2, "rw")}, "-2 ~4 3", []uint64{0, 102, 0}},
	} {
		t.Run(test.name, func(t *testing.T) {
			table := uniqueTable{T: t}
			table.update(root, parent, on, below)
			for _, row := range table.Rows() {
				row.Hidden = true
			}
			table.want(test.want, test.parents, test.new...)
		})
	}
}

// TestUniqueParentUnknown: without IDs, a mount is the same when its parent was
// replaced.
func TestUniqueParentUnknown(t *testing.T) {
	table := uniqueTable{T: t}
	parent, on := child(0, 2, 1, "rw"), child(0, 3, 2, "rw")
	table.want("+2 +3 0", []uint64{0, 0}, parent, on)
	parent.text = strings.Replace(parent.text, "tmpfs", "ramfs", 1)
	table.want("-2 +2 1", []uint64{0, 0}, parent, on)
}

// TestUniqueParents: a parent is found among the mounts that stayed, those that
// are new, and those listed later; the unique ID of one that has no row is not
// known, and one that was found stays until the mount moves.
func TestUniqueParents(t *testing.T) {
	table := uniqueTable{T: t}
	a, b, c := child(101, 1, 9, "rw"), child(102, 2, 3, "rw"), child(103, 3, 1, "rw")
	table.want("+1 +2 +3 0", []uint64{0, 103, 101}, a, b, c)
	d := child(104, 4, 2, "rw")
	table.want("+4 3", []uint64{0, 103, 101, 102}, a, b, c, d)
	// The user found the parent that has no row.
	table.Rows()[0].ParentUnique = 109
	a = child(101, 1, 9, "ro")
	table.want("~1 4", []uint64{109, 103, 101, 102}, a, b, c, d)
	a = child(101, 1, 8, "ro")
	table.want("~1 4", []uint64{0, 103, 101, 102}, a, b, c, d)
	a = child(101, 1, 4, "ro")
	table.want("~1 4", []uint64{104, 103, 101, 102}, a, b, c, d)
}

// TestUniqueModel: over random tables of a kernel that gives each mount an ID
// of its own and short IDs again and again, each mount is gone, new, changed or
// kept as its ID says, and each parent is known.
func TestUniqueModel(t *testing.T) {
	type mount struct {
		unique, parent uint64
		id             int
		options        string
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range testenv.SoakN(100) {
		r := rand.New(rand.NewPCG(seed, uint64(round)))
		mounts := []*mount{{unique: 100, id: 1}}
		find := func(unique uint64) int {
			return slices.IndexFunc(mounts, func(m *mount) bool { return m.unique == unique })
		}
		last := uint64(100)
		step := func() {
			i := r.IntN(len(mounts))
			m := mounts[i]
			switch r.IntN(6) {
			case 0, 1, 2:
				last++
				id := 2
				for slices.ContainsFunc(mounts, func(m *mount) bool { return m.id == id }) {
					id++
				}
				mounts = append(mounts, &mount{unique: last, parent: m.unique, id: id})
			case 3: // what is mounted on it goes elsewhere
				if i > 0 {
					for _, other := range mounts {
						if other.parent == m.unique {
							other.parent = m.parent
						}
					}
					mounts = slices.Delete(mounts, i, i+1)
				}
			case 4:
				m.options += "x"
			case 5:
				to := mounts[r.IntN(len(mounts))].unique
				above := to // of all that are above it, m must not be one
				for above != m.unique && above != mounts[0].unique {
					above = mounts[find(above)].parent
				}
				if i > 0 && above != m.unique {
					m.parent = to
				}
			}
		}
		table := uniqueTable{T: t}
		before := make(map[uint64]mount)
		for range 30 {
			for range r.IntN(8) {
				step()
			}
			var rows []uniqueRow
			for _, m := range mounts {
				parent := 0
				if i := find(m.parent); i >= 0 {
					parent = mounts[i].id
				}
				// All on one device and in one place: the text tells little.
				rows = append(rows, uniqueRow{m.unique, fmt.Sprintf("%d %d 0:1 / / rw%s - tmpfs t rw", m.id, parent, m.options)})
			}
			d := table.update(rows...)
			var want []string
			now := make(map[uint64]mount)
			for _, m := range mounts {
				now[m.unique] = *m
				if old, ok := before[m.unique]; !ok {
					want = append(want, fmt.Sprint("+", m.unique))
				} else if old != *m {
					want = append(want, fmt.Sprint("~", m.unique))
				}
			}
			for unique := range before {
				if _, ok := now[unique]; !ok {
					want = append(want, fmt.Sprint("-", unique))
				}
			}
			before = now
			var got []string
			for _, row := range d.Gone {
				got = append(got, fmt.Sprint("-", row.Unique))
			}
			for _, change := range d.Changed {
				got = append(got, fmt.Sprint("~", change.New.Unique))
			}
			for _, row := range d.New {
				got = append(got, fmt.Sprint("+", row.Unique))
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Fatalf("round %d: %q, want %q", round, got, want)
			}
			for i, row := range table.Rows() {
				if row.ParentUnique != mounts[i].parent {
					t.Fatalf("round %d: mount %d has the parent %d, want %d", round, row.Unique, row.ParentUnique, mounts[i].parent)
				}
			}
		}
	}
}

// TestMountIDs: each row has an ID, or 0, and there are as many as a table has
// rows; the range is what the first and the last have.
func TestMountIDs(t *testing.T) {
	for text, want := range map[string][]uint32{
		"":                              nil,
		"1 a\n":                         {1},
		"1 a":                           {1},
		"1":                             {1},
		"1 a\n22 b\n333 c\n":            {1, 22, 333},
		"3 a\n1 b":                      {3, 1},
		"1 a\n\n":                       {1, 0},
		"\n1 a\n":                       {0, 1},
		"\n\n\n":                        {0, 0, 0},
		"x\n1 a\nx\n":                   {0, 1, 0},
		"x":                             {0},
		" 1 a\n":                        {0},
		"1\ta\n1\r\n":                   {0, 0},
		"-1 a\n+1 a\n0x1 a\n":           {0, 0, 0},
		"4294967295 a\n4294967296 a\n":  {4294967295, 0},
		"007 a\n0 b\n":                  {7, 0},
		strings.Repeat("5 a\n", 1_000):  slices.Repeat([]uint32{5}, 1_000),
		"1 " + strings.Repeat("x", 1e5): {1},
	} {
		got := slices.Collect(procfs.MountIDs([]byte(text)))
		if !slices.Equal(got, want) {
			t.Errorf("%.50q: IDs %d, want %d", text, got, want)
		}
		n, first, last := procfs.MountIDRange([]byte(text))
		if n != len(want) || n > 0 && (first != want[0] || last != want[n-1]) || n == 0 && (first != 0 || last != 0) {
			t.Errorf("%.50q: %d rows, from %d to %d, want %d", text, n, first, last, want)
		}
		var table procfs.MountTable
		if rows := len(table.Compare([]byte(text), nil).Rows); rows != len(want) {
			t.Errorf("%.50q: %d rows in a table, want %d", text, rows, len(want))
		}
	}
	for range procfs.MountIDs([]byte("1 a\n2 b\n")) {
		break // it may be left early
	}
}
