package procfs

import (
	"bytes"
	"iter"
)

// A MountTable is the rows of a mountinfo file, kept to be compared with what
// the file says later. Comparing costs little more than looking at each byte:
// only rows that differ are decoded.
//
// [MountTable.Compare] leaves the table as it is, and [MountTable.Commit] makes
// the new rows the table's, so a text that proves unfit can be dropped.
type MountTable struct {
	parser MountInfoParser
	rows   []*MountRow
	byID   map[uint32]*MountRow // the rows that have an ID
	pass   uint64               // counts the calls of Compare
	last   uint64               // the last Seq given away
}

// A MountRow is one row of a [MountTable]. It does not change once it is in the
// table: a row that differs is another MountRow.
type MountRow struct {
	MountInfo
	Raw string // the row as the kernel wrote it, without its line feed
	Err error  // why Raw could not be decoded; MountInfo is then incomplete

	// Seq is the same for all rows of one mount, and greater for mounts that
	// appeared later.
	Seq uint64

	// Hidden is for the user of the table. A new row has it false.
	Hidden bool

	// Unique and ParentUnique are the unique 64-bit IDs of the mount and of
	// its parent; 0: not known. The parent's is known if its row is in the text.
	Unique, ParentUnique uint64

	hasID bool
	pos   int    // index in the table's rows
	pass  uint64 // the last Compare that found this row in its text
}

// A MountDiff is how a mountinfo text differs from a [MountTable].
type MountDiff struct {
	Gone    []*MountRow // rows of mounts that are not there any more, in the table's order
	New     []*MountRow // rows of mounts that were not there, in the text's order
	Changed []RowChange // rows that differ, in the text's order
	Kept    int         // how many mounts are in both, changed or not
	Rows    []*MountRow // all rows of the text, which are the table's after Commit

	first int // index of the first row that was not in this place; -1: none
}

// A RowChange is a mount whose row differs.
type RowChange struct{ Old, New *MountRow }

// Empty tells whether there is no difference.
func (d *MountDiff) Empty() bool { return len(d.Gone)+len(d.New)+len(d.Changed) == 0 }

// Rows returns the rows of the table, which must not be changed.
func (t *MountTable) Rows() []*MountRow { return t.rows }

// Compare compares the table with a mountinfo text. It does not keep the text.
//
// unique has the unique IDs of the rows of the text, in their order, 0 where it
// is not known; nil is all of them. Two rows with a unique ID are of the same
// mount if that is the same.
//
// Without, a guess must do, for the kernel gives the ID of a mount that is gone
// to the next one, and the number of its device, too. Rows of one ID belong to
// the same mount if nothing speaks against it: device and file system type are
// the same, and either it is where it was, or that is all that changed. A mount
// that was replaced by one like it is taken for the same. No ID should stand in
// the text twice, see [DropRepeated].
//
// The kernel lists mounts in the order of their creation (since Linux 6.8, and
// mostly before). Compare is fast when that holds, and right when it does not.
func (t *MountTable) Compare(text []byte, unique []uint64) *MountDiff {
	t.pass++
	d := &MountDiff{Rows: make([]*MountRow, 0, len(t.rows)+1), first: -1}
	next := 0 // the row of the table that is expected
	for line := range lines(text) {
		var id uint64 // of the line
		if len(d.Rows) < len(unique) {
			id = unique[len(d.Rows)]
		}
		if next < len(t.rows) && t.rows[next].is(id, line) {
			t.keep(d, t.rows[next])
			next++
			continue
		}
		old := t.find(line)
		if old == nil {
			t.add(d, id, line)
			continue
		}
		// The rows between the expected one and this one are gone, or come
		// later.
		next = max(next, old.pos+1)
		t.match(d, old, id, line)
	}
	if d.Kept < len(t.rows) {
		for _, row := range t.rows {
			if row.pass != t.pass {
				d.Gone = append(d.Gone, row)
			}
		}
	}
	t.findParents(d)
	return d
}

// Commit makes the rows of d the table's. d comes from a Compare since the last
// Commit.
func (t *MountTable) Commit(d *MountDiff) {
	if t.byID == nil {
		t.byID = make(map[uint32]*MountRow, len(d.New))
	}
	for _, row := range d.Gone {
		if t.byID[row.ID] == row {
			delete(t.byID, row.ID)
		}
	}
	for _, row := range d.New {
		t.index(row)
	}
	for _, change := range d.Changed {
		t.index(change.New)
	}
	t.rows = d.Rows
	if d.first >= 0 {
		for i, row := range t.rows[d.first:] {
			row.pos = d.first + i
		}
	}
}

func (t *MountTable) index(row *MountRow) {
	if row.hasID {
		t.byID[row.ID] = row
	}
}

// find returns the row of the table that line may be the successor of, or nil.
// It is one that no other line of the text has been matched with.
func (t *MountTable) find(line []byte) *MountRow {
	if id, ok := leadingID(line); ok {
		if row := t.byID[id]; row != nil && row.pass != t.pass {
			return row
		}
		return nil
	}
	// A row without an ID is known by its text alone. No kernel writes one.
	for _, row := range t.rows {
		if !row.hasID && row.pass != t.pass && row.Raw == string(line) {
			return row
		}
	}
	return nil
}

// is tells whether a line with a unique ID, or 0, says nothing new about the
// row.
func (row *MountRow) is(unique uint64, line []byte) bool {
	return (unique == row.Unique || unique == 0) && row.Raw == string(line)
}

// match deals with a line that has the ID of the row old.
func (t *MountTable) match(d *MountDiff, old *MountRow, unique uint64, line []byte) {
	if old.is(unique, line) {
		t.keep(d, old)
		return
	}
	row := t.parse(unique, line)
	same := row.Unique == old.Unique
	if row.Unique == 0 || old.Unique == 0 {
		same = sameMount(old, row)
	}
	if !same {
		t.append(d, row)
		t.isNew(d, row)
		return
	}
	t.supersede(d, old, row)
	t.append(d, row)
}

// supersede notes that row is what there is to say of the mount of old.
func (t *MountTable) supersede(d *MountDiff, old, row *MountRow) {
	row.Seq = old.Seq
	if row.Unique == 0 {
		row.Unique = old.Unique
	}
	old.pass = t.pass
	d.Kept++
	d.Changed = append(d.Changed, RowChange{Old: old, New: row})
}

// findParents finds the unique IDs of the parents of mounts that are new or
// changed. A mount that did neither may have got another parent with the ID of
// the one it had.
func (t *MountTable) findParents(d *MountDiff) {
	if len(d.Gone)+len(d.New)+len(d.Changed) == 0 {
		return
	}
	fresh := make(map[uint32]uint64, len(d.New)) // new and replaced parents
	for _, row := range d.New {
		fresh[row.ID] = row.Unique
	}
	gone := make(map[uint32]bool, len(d.Gone))
	for _, row := range d.Gone {
		gone[row.ID] = true
	}
	find := func(row *MountRow) uint64 {
		if unique, ok := fresh[row.ParentID]; ok {
			return unique
		}
		if parent := t.byID[row.ParentID]; parent != nil && !gone[row.ParentID] {
			return parent.Unique
		}
		return row.ParentUnique
	}
	for _, row := range d.New {
		row.ParentUnique = find(row)
	}
	for _, change := range d.Changed {
		if change.New.ParentID == change.Old.ParentID {
			change.New.ParentUnique = change.Old.ParentUnique
		}
		change.New.ParentUnique = find(change.New)
	}
	if len(gone) == 0 || len(fresh) == 0 {
		return
	}
	for i, row := range d.Rows {
		if !gone[row.ParentID] || row.pass != t.pass {
			continue
		}
		if parent, ok := fresh[row.ParentID]; ok && parent != row.ParentUnique {
			changed := *row
			changed.Hidden = false
			changed.ParentUnique = parent
			d.Changed = append(d.Changed, RowChange{Old: row, New: &changed})
			d.Rows[i] = &changed
		}
	}
}

func (t *MountTable) keep(d *MountDiff, row *MountRow) {
	row.pass = t.pass
	d.Kept++
	if d.first < 0 && row.pos != len(d.Rows) {
		d.first = len(d.Rows)
	}
	d.Rows = append(d.Rows, row)
}

func (t *MountTable) add(d *MountDiff, unique uint64, line []byte) {
	row := t.parse(unique, line)
	t.append(d, row)
	t.isNew(d, row)
}

func (t *MountTable) append(d *MountDiff, row *MountRow) {
	if d.first < 0 {
		d.first = len(d.Rows)
	}
	d.Rows = append(d.Rows, row)
}

func (t *MountTable) isNew(d *MountDiff, row *MountRow) {
	row.Seq = row.Unique
	if row.Unique == 0 {
		t.last++
		row.Seq = t.last // less than any unique ID
	}
	d.New = append(d.New, row)
}

func (t *MountTable) parse(unique uint64, line []byte) *MountRow {
	row := &MountRow{Raw: string(line), Unique: unique}
	row.MountInfo, row.Err = t.parser.Parse(row.Raw)
	_, row.hasID = leadingID(line)
	return row
}

// sameMount tells whether two rows of one ID are taken for the same mount.
func sameMount(old, now *MountRow) bool {
	if old.Err != nil || now.Err != nil {
		return true
	}
	// A mount keeps these, whatever happens to it.
	if old.Major != now.Major || old.Minor != now.Minor || old.FSType != now.FSType {
		return false
	}
	stayed := old.MountPoint == now.MountPoint && old.ParentID == now.ParentID
	return stayed || old.Root == now.Root && old.Source == now.Source && old.SuperOptions == now.SuperOptions
}

// DropRepeated returns text without the rows whose mount ID stands in a later
// row, too. A text that was read while the table changed may have such rows:
// one mount was listed, went, and its ID was given to the next. It changes
// text in place.
func DropRepeated(text []byte) []byte {
	last := make(map[uint32]int)
	n := 0
	for line := range lines(text) {
		if id, ok := leadingID(line); ok {
			last[id] = n
		}
		n++
	}
	kept := text[:0]
	n = 0
	for line := range lines(text) {
		if id, ok := leadingID(line); !ok || last[id] == n {
			// What is written never passes what is read.
			kept = append(append(kept, line...), '\n')
		}
		n++
	}
	return kept
}

// MountID returns the mount ID of a row, or 0 if it shows none.
func MountID(row []byte) uint32 {
	id, _ := leadingID(row)
	return id
}

// MountIDs yields the mount ID of each row of text, 0 for a row that shows none.
func MountIDs(text []byte) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for line := range lines(text) {
			if !yield(MountID(line)) {
				return
			}
		}
	}
}

// MountIDRange returns how many rows text has, and the mount IDs of the first
// and the last, 0 for a row that shows none.
func MountIDRange(text []byte) (n int, first, last uint32) {
	text = bytes.TrimSuffix(text, []byte{'\n'})
	if len(text) == 0 {
		return 0, 0, 0
	}
	lastRow := text[bytes.LastIndexByte(text, '\n')+1:]
	return bytes.Count(text, []byte{'\n'}) + 1, MountID(text), MountID(lastRow)
}

// leadingID returns the mount ID that a row starts with.
func leadingID(line []byte) (id uint32, ok bool) {
	field, _, _ := bytes.Cut(line, []byte{' '})
	return decimal(string(field))
}

// lines yields the rows of text without their line feeds. Only a line feed
// ends a row: the kernel writes other white space as it is.
func lines(text []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(text) > 0 {
			line := text
			if end := bytes.IndexByte(text, '\n'); end >= 0 {
				line, text = text[:end], text[end+1:]
			} else {
				text = nil
			}
			if !yield(line) {
				return
			}
		}
	}
}
