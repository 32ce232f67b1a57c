package kernstream

import (
	"cmp"
	"slices"
)

// A mountDelta is the difference between the mount table that the consumer has
// and the one that the kernel has. Sources add to it what they find out, and
// the loop makes events of it: there is no other way from one to the other.
type mountDelta struct {
	changes map[uint64]mountPair // by lineage
	merged  int                  // how many looks at the table it came from
	resync  bool                 // one of them was a rescan
	touched bool                 // by the current look
}

// mountPair is what the consumer knows of a mount, and what is known now; nil
// means nothing.
type mountPair struct{ old, new *Mount }

// change notes that a mount changed from old to new. lineage is the same
// number for all states of one mount, and greater for mounts that are listed
// later. Neither old nor new is changed afterwards by anybody.
func (d *mountDelta) change(lineage uint64, old, new *Mount) {
	known, pending := d.changes[lineage]
	if pending {
		old = known.old
	}
	same := old == new || old != nil && new != nil && old.equal(new)
	if same && !pending {
		return // the filter lets neither through, say
	}
	d.touched = true
	if same {
		delete(d.changes, lineage)
		return
	}
	if d.changes == nil {
		d.changes = make(map[uint64]mountPair)
	}
	d.changes[lineage] = mountPair{old, new}
}

// found calls f and tells whether that changed d.
func (d *mountDelta) found(f func() error) (found bool, err error) {
	before := d.touched
	d.touched = false
	err = f()
	found = d.touched
	d.touched = before || found
	return found, err
}

func (d *mountDelta) empty() bool { return len(d.changes) == 0 }

// looked ends one look at the table, and tells whether it brought anything.
// resync tells that a rescan did.
func (d *mountDelta) looked(resync bool) bool {
	touched := d.touched
	d.touched = false
	switch {
	case d.empty():
		d.reset()
	case touched:
		d.merged++
		d.resync = d.resync || resync
	}
	return touched
}

// reset makes the consumer's table the kernel's.
func (d *mountDelta) reset() { *d = mountDelta{} }

// event returns what the consumer is to be told. The caller adds what it knows
// of the circumstances.
func (d *mountDelta) event() *MountEvent {
	e := &MountEvent{Coalesced: d.merged > 1, Resync: d.resync}
	lineages := make([]uint64, 0, len(d.changes))
	mounted, unmounted := 0, 0
	for lineage, pair := range d.changes {
		lineages = append(lineages, lineage)
		if pair.old == nil {
			mounted++
		} else if pair.new == nil {
			unmounted++
		}
	}
	slices.SortFunc(lineages, cmp.Compare[uint64])
	e.Mounted = make([]Mount, 0, mounted)
	e.Unmounted = make([]Mount, 0, unmounted)
	for _, lineage := range lineages {
		switch pair := d.changes[lineage]; {
		case pair.old == nil:
			e.Mounted = append(e.Mounted, *pair.new)
		case pair.new == nil:
			e.Unmounted = append(e.Unmounted, *pair.old)
		case pair.old.movedTo(pair.new):
			e.Moved = append(e.Moved, MountChange{*pair.old, *pair.new})
		default:
			e.Changed = append(e.Changed, MountChange{*pair.old, *pair.new})
		}
	}
	slices.Reverse(e.Unmounted)
	return e
}

// movedTo tells whether the same mount is somewhere else in now.
func (m *Mount) movedTo(now *Mount) bool {
	return m.MountPoint != now.MountPoint || m.ParentID != now.ParentID || m.MountInfoParentID != now.MountInfoParentID
}

func (m *Mount) equal(o *Mount) bool {
	return m.ID == o.ID && m.ParentID == o.ParentID &&
		m.MountInfoID == o.MountInfoID && m.MountInfoParentID == o.MountInfoParentID &&
		m.Major == o.Major && m.Minor == o.Minor &&
		m.Root == o.Root && m.MountPoint == o.MountPoint &&
		m.Options == o.Options && slices.Equal(m.Optional, o.Optional) &&
		m.FSType == o.FSType && m.FSSource == o.FSSource && m.SuperOptions == o.SuperOptions &&
		string(m.Raw) == string(o.Raw)
}
