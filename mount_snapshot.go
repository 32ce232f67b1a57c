package kernstream

import (
	"slices"
	"sync/atomic"

	"github.com/kernstream/kernstream/internal/procfs"
)

// A snapshot of the mount table: one reading of mountinfo, decoded, with the
// unique IDs.
//
// A text that changed while it was read (a torn one) has each mount that stayed
// exactly once, and may have one that came or went twice or not at all.

// snapshotTries is how often a snapshot is taken again when it is torn.
const snapshotTries = 10

// snapshot reads and decodes the mountinfo file fd.
func snapshot(fd int, unique *uniqueIDs, filter func(*Mount) bool) ([]Mount, error) {
	buf := make([]byte, snapshotBuffer)
	for try := 1; ; try++ {
		if _, err := procfs.MountsChanged(fd); err != nil {
			return nil, err
		}
		mounts, err := readMounts(fd, buf)
		if err != nil {
			return nil, err
		}
		unique.look(len(mounts))
		torn, err := procfs.MountsChanged(fd)
		switch {
		case err != nil:
			return nil, err
		case torn && try < snapshotTries:
			continue
		case torn:
			mounts = dropRepeated(mounts)
		}
		identify(mounts, unique, torn)
		if filter != nil {
			mounts = slices.DeleteFunc(mounts, func(m Mount) bool { return !filter(&m) })
		}
		return mounts, nil
	}
}

// identify fills in the unique IDs, those of the parents by their short ones.
func identify(mounts []Mount, unique *uniqueIDs, torn bool) {
	ids := unique.ofMounts(mounts, torn)
	if ids == nil {
		return
	}
	highest := uint32(0)
	for i := range mounts {
		mounts[i].ID = ids[i]
		highest = max(highest, mounts[i].MountInfoID)
	}
	parent := shortIDs(highest, len(mounts))
	for i := range mounts {
		parent.set(mounts[i].MountInfoID, mounts[i].ID)
	}
	for i := range mounts {
		m := &mounts[i]
		if m.ParentID = parent.get(m.MountInfoParentID); m.ParentID == 0 && m.Raw == nil {
			m.ParentID = unique.parent(m.ID)
		}
	}
}

// A shortTable finds the unique ID of a short one. The kernel gives the lowest
// short ID that is free, so a slice does mostly.
type shortTable struct {
	list []uint64
	rest map[uint32]uint64 // those beyond it
}

func shortIDs(highest uint32, n int) *shortTable {
	return &shortTable{list: make([]uint64, min(int64(highest)+1, 4*int64(n)+1024))}
}

func (t *shortTable) set(short uint32, unique uint64) {
	if int64(short) < int64(len(t.list)) {
		t.list[short] = unique
		return
	}
	if t.rest == nil {
		t.rest = make(map[uint32]uint64)
	}
	t.rest[short] = unique
}

func (t *shortTable) get(short uint32) uint64 {
	if int64(short) < int64(len(t.list)) {
		return t.list[short]
	}
	return t.rest[short]
}

// snapshotBuffer holds several of the pages that the kernel hands out at a
// time, so that rows are decoded while they are in the processor's cache.
const snapshotBuffer = 32 << 10

// snapshotRows is how many rows the last snapshot had. The next will have about
// as many.
var snapshotRows atomic.Int64

func readMounts(fd int, buf []byte) ([]Mount, error) {
	var parser procfs.MountInfoParser
	mounts := make([]Mount, 0, snapshotRows.Load())
	err := procfs.ReadRows(fd, buf, func(line []byte) error {
		row := string(line)
		info, err := parser.Parse(row)
		mounts = append(mounts, mountOf(&info, row, err))
		return nil
	})
	snapshotRows.Store(int64(len(mounts) + len(mounts)/64))
	if cap(mounts) > 2*len(mounts)+64 {
		mounts = slices.Clone(mounts) // it was not like the last one
	}
	return mounts, err
}

// dropRepeated removes the mounts whose ID comes again: the kernel had given it
// to the next mount.
func dropRepeated(mounts []Mount) []Mount {
	last := make(map[uint32]int, len(mounts))
	for i := range mounts {
		last[mounts[i].MountInfoID] = i
	}
	kept := mounts[:0]
	for i := range mounts {
		// An ID of 0 is of a row that shows none.
		if id := mounts[i].MountInfoID; id == 0 || last[id] == i {
			kept = append(kept, mounts[i])
		}
	}
	return kept
}

// mountOf returns the Mount of a row.
func mountOf(info *procfs.MountInfo, raw string, err error) Mount {
	if err != nil {
		return Mount{MountInfoID: info.ID, Raw: []byte(raw)}
	}
	return Mount{
		MountInfoID:       info.ID,
		MountInfoParentID: info.ParentID,
		Major:             info.Major,
		Minor:             info.Minor,
		Root:              info.Root,
		MountPoint:        info.MountPoint,
		Options:           info.Options,
		Optional:          info.Optional,
		FSType:            info.FSType,
		FSSource:          info.Source,
		SuperOptions:      info.SuperOptions,
	}
}
