package procfs

import "fmt"

// Check returns how the table contradicts itself, or nil. unique tells that no
// ID stands in it twice.
func (t *MountTable) Check(unique bool) error {
	inTable := make(map[*MountRow]bool, len(t.rows))
	seqs := make(map[uint64]bool, len(t.rows))
	withID := 0
	for i, row := range t.rows {
		switch {
		case row == nil:
			return fmt.Errorf("row %d is nil", i)
		case inTable[row]:
			return fmt.Errorf("row %d, %q, is in the table twice", i, row.Raw)
		case row.pos != i:
			return fmt.Errorf("row %d, %q, has position %d", i, row.Raw, row.pos)
		case row.pass > t.pass:
			return fmt.Errorf("row %d, %q, was seen in pass %d of %d", i, row.Raw, row.pass, t.pass)
		case row.Seq == 0 || row.Seq > t.last || seqs[row.Seq]:
			return fmt.Errorf("row %d, %q, has number %d; the last given away is %d", i, row.Raw, row.Seq, t.last)
		case unique && row.hasID && t.byID[row.ID] != row:
			return fmt.Errorf("row %d, %q, is not found by its ID", i, row.Raw)
		}
		inTable[row], seqs[row.Seq] = true, true
		if row.hasID {
			withID++
		}
	}
	for id, row := range t.byID {
		if !inTable[row] || !row.hasID || row.ID != id {
			return fmt.Errorf("ID %d leads to %q, which is not in the table or has another", id, row.Raw)
		}
	}
	if unique && len(t.byID) != withID {
		return fmt.Errorf("%d rows with an ID, %d in the index", withID, len(t.byID))
	}
	return nil
}
