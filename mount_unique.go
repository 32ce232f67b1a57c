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
	short  map[uint64]uint32 // what statmount said of those in list
	rows   []uint64          // the last answer of ask, for its memory
}

// look lists the mounts there are, some n of them: after a text was read, and
// before its end is known not to be torn. Where nothing can be listed, no ID will
// be known.
func (u *uniqueIDs) look(n int) {
	// With room for one more than there are, one call is enough.
	list, err := u.reader.List(slices.Grow(u.list[:0], n+n/64+16))
	u.list = list
	if err != nil {
		u.list = u.list[:0]
	}
}

// ofText returns the unique ID of each row of text, 0 for those that are not
// known, or nil if none are. torn tells whether the table may have changed
// between text and look. The result is valid until the next call.
func (u *uniqueIDs) ofText(text []byte, torn bool) []uint64 {
	n, first, last := procfs.MountIDRange(text)
	if !torn && u.fits(n, first, last) {
		return u.list
	}
	return u.ask(procfs.MountIDs(text))
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
	})
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
// asking again costs the mounts that have come since.
func (u *uniqueIDs) ask(ids iter.Seq[uint32]) []uint64 {
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
		short[id], unique[s] = s, id
	}
	u.short = short
	u.rows = u.rows[:0]
	for id := range ids {
		u.rows = append(u.rows, unique[id])
	}
	return u.rows
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
