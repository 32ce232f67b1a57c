package kernstream

import (
	"iter"
	"slices"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/statmount"
)

// The unique 64-bit IDs of mounts, beside the IDs of 32 bits in mountinfo, which
// the kernel gives away again.
//
// listmount(2) (Linux 6.8) lists the unique IDs in the order in which mountinfo
// lists the mounts, so in general it is enough to put the two side by side. That
// needs text and list of one moment, and one root directory. Otherwise
// statmount(2) is asked for the short ID of each. Short IDs are those of all
// namespaces, so none is taken for another's, whosever table the text is.

// A uniqueIDs finds the unique IDs of the rows of mountinfo texts.
type uniqueIDs struct {
	reader statmount.Reader
	sure   bool // the reader's namespace is that of the texts
	list   []uint64
	before []uint64          // the list before that
	fitted bool              // a list was that of a text once
	short  map[uint64]uint32 // what statmount said of those in list
	rows   []uint64          // the last answer of ask, for its memory
}

// look lists the mounts there are, some n of them: after a text was read, and
// before its end is known not to be torn, and once before the first text. Where
// nothing can be listed, no ID will be known.
func (u *uniqueIDs) look(n int) {
	u.before, u.list = u.list, u.before
	// With room for one more than there are, one call is enough.
	list, err := u.reader.List(slices.Grow(u.list[:0], n+n/64+16))
	u.list = list
	if err != nil {
		u.list = u.list[:0]
	}
}

// ofText returns the unique ID of each row of text, 0 for those that are not
// known, or nil if none are. torn tells that the table changed between the two
// looks around the text: then rows of mounts that were not there at both are
// left out of the text that is returned, if they can be told. They came or went,
// and the next look sees it. known are rows of the text before, with their unique
// IDs. The result is valid until the next call.
func (u *uniqueIDs) ofText(text []byte, torn bool, known []*procfs.MountRow) ([]byte, []uint64) {
	n, first, last := procfs.MountIDRange(text)
	if !torn && u.fits(n, first, last) {
		u.fitted = true
		return text, u.list
	}
	if torn {
		text = procfs.DropRepeated(text)
		u.learn(known)
	}
	ids := u.ask(procfs.MountIDs(text), torn)
	if !torn || !u.fitted || ids == nil {
		return text, ids
	}
	text = procfs.FilterRows(text, func(n int, _ []byte) bool { return ids[n] != 0 })
	return text, slices.DeleteFunc(ids, func(id uint64) bool { return id == 0 })
}

// ofMounts is ofText for mounts that have been decoded.
func (u *uniqueIDs) ofMounts(mounts []Mount, torn bool) []uint64 {
	if n := len(mounts); !torn && n > 0 && u.fits(n, mounts[0].MountInfoID, mounts[n-1].MountInfoID) {
		return u.list
	}
	return u.ask(func(yield func(uint32) bool) {
		for i := range mounts {
			if !yield(mounts[i].MountInfoID) {
				return
			}
		}
	}, torn)
}

// fits tells whether the list is that of n rows, the first and the last of which
// have the given IDs.
func (u *uniqueIDs) fits(n int, first, last uint32) bool {
	return n > 0 && n == len(u.list) && u.is(u.list[0], first) && u.is(u.list[n-1], last)
}

func (u *uniqueIDs) is(unique uint64, short uint32) bool {
	var m statmount.Mount
	return u.reader.Stat(unique, statmount.MountBasic, &m) == nil && m.MountInfoID == short
}

// ask finds the unique IDs one by one. What statmount said is kept, so that
// asking again costs the mounts that have come since. Short IDs of a text that is
// torn may be those of mounts that are gone: only what was there at both looks has
// the ID for sure.
func (u *uniqueIDs) ask(ids iter.Seq[uint32], torn bool) []uint64 {
	if len(u.list) == 0 || !u.sure {
		return nil
	}
	unique := make(map[uint32]uint64, len(u.list))
	short := make(map[uint64]uint32, len(u.list))
	for _, id := range u.list {
		s, ok := u.short[id]
		if !ok {
			var m statmount.Mount
			if u.reader.Stat(id, statmount.MountBasic, &m) != nil {
				continue // it is gone, or cannot be seen
			}
			s = m.MountInfoID
		}
		short[id] = s
		if _, there := slices.BinarySearch(u.before, id); there || !torn {
			unique[s] = id
		}
	}
	u.short = short
	u.rows = u.rows[:0]
	for id := range ids {
		u.rows = append(u.rows, unique[id])
	}
	return u.rows
}

// learn takes over the short IDs of known rows, for a text that is torn. A mount
// that was there at both looks may be gone when statmount is asked for it, and
// those asked before may not: what is left would be a table that never was.
func (u *uniqueIDs) learn(rows []*procfs.MountRow) {
	if u.short == nil {
		u.short = make(map[uint64]uint32, len(rows))
	}
	for _, row := range rows {
		if row.Unique == 0 || row.ID == 0 {
			continue
		}
		if _, ok := u.short[row.Unique]; !ok {
			u.short[row.Unique] = row.ID
		}
	}
}

// parent returns the unique ID of the parent of a mount, or 0. It is for
// mounts whose parent is not in the table, as that of /.
func (u *uniqueIDs) parent(unique uint64) uint64 {
	var m statmount.Mount
	if unique == 0 || u.reader.Stat(unique, statmount.MountBasic, &m) != nil {
		return 0
	}
	return m.ParentID
}
