package kernstream

import (
	"slices"
	"sync/atomic"

	"github.com/kernstream/kernstream/internal/procfs"
)

// A snapshot of the mount table: one reading of mountinfo, decoded.
//
// A text that changed while it was read (a torn one) has each mount that stayed
// exactly once, and may have one that came or went twice or not at all.

// snapshotTries is how often a snapshot is taken again when it is torn.
const snapshotTries = 10

// snapshot reads and decodes the mountinfo file fd.
func snapshot(fd int, filter func(*Mount) bool) ([]Mount, error) {
	buf := make([]byte, snapshotBuffer)
	for try := 1; ; try++ {
		if _, err := procfs.MountsChanged(fd); err != nil {
			return nil, err
		}
		mounts, err := readMounts(fd, buf, filter)
		if err != nil {
			return nil, err
		}
		changed, err := procfs.MountsChanged(fd)
		if err != nil || !changed {
			return mounts, err
		}
		if try == snapshotTries {
			return dropRepeated(mounts), nil
		}
	}
}

// snapshotBuffer holds several of the pages that the kernel hands out at a
// time, so that rows are decoded while they are in the processor's cache.
const snapshotBuffer = 32 << 10

// snapshotRows is how many rows the last snapshot had. The next will have about
// as many.
var snapshotRows atomic.Int64

func readMounts(fd int, buf []byte, filter func(*Mount) bool) ([]Mount, error) {
	var parser procfs.MountInfoParser
	mounts := make([]Mount, 0, snapshotRows.Load())
	err := procfs.ReadRows(fd, buf, func(line []byte) {
		row := string(line)
		info, err := parser.Parse(row)
		mounts = append(mounts, mountOf(&info, row, err))
		if filter != nil && !filter(&mounts[len(mounts)-1]) {
			mounts = mounts[:len(mounts)-1]
		}
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
