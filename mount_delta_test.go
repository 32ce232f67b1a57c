package kernstream

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// What follows from the algebra of the lists of an event.

// TestMountDeltaUntouched: what the filter lets through neither before nor
// after is no change, and leaves no flag.
func TestMountDeltaUntouched(t *testing.T) {
	var d mountDelta
	d.change(1, nil, nil)
	if d.looked(true) || d.resync || d.merged != 0 {
		t.Errorf("the delta is %+v; want it untouched", d)
	}
	m := Mount{MountPoint: "/"}
	d.change(2, nil, &m)
	d.looked(false)
	d.change(1, nil, nil)
	if d.looked(true) || d.resync || d.merged != 1 {
		t.Errorf("the delta is %+v; want one look in it", d)
	}
}

// TestSettle: a torn text is read again, but not for ever, and not when that
// takes long.
func TestSettle(t *testing.T) {
	for _, test := range []struct {
		torn  []bool
		takes time.Duration
		fails bool
		want  int
	}{
		{torn: []bool{false}, want: 1},
		{torn: []bool{true, false}, want: 2},
		{torn: []bool{true, true, true, true}, want: 3},
		{torn: []bool{true, true}, takes: time.Millisecond, want: 1},
		{torn: []bool{true, true}, fails: true, want: 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := 0
			torn, err := settle(func() (bool, error) {
				time.Sleep(test.takes)
				n++
				if test.fails {
					return true, syscall.EIO
				}
				return test.torn[n-1], nil
			})
			if n != test.want || torn != test.torn[n-1] || (err != nil) != test.fails {
				t.Errorf("%+v: %d reads, torn %v, %v", test, n, torn, err)
			}
		})
	}
}

// TestDropRepeated: of mounts with one ID the last stays; rows that show no ID
// all stay.
func TestDropRepeated(t *testing.T) {
	m := func(id uint32, point string) Mount { return Mount{MountInfoID: id, MountPoint: point} }
	got := dropRepeated([]Mount{m(1, "/"), m(2, "/old"), m(0, "x"), m(3, "/c"), m(2, "/new"), m(0, "y")})
	points := ""
	for _, m := range got {
		points += " " + m.MountPoint
	}
	if points != " / x /c /new y" {
		t.Errorf("left are%s", points)
	}
}

// TestMountDeltaAlgebra: whatever happens to a table and whenever the consumer
// receives, applying the events in the documented order gives the table; each
// mount is in one list, and the lists have the documented order.
func TestMountDeltaAlgebra(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		var d mountDelta
		kernel, consumer := map[uint64]Mount{}, map[uint64]Mount{}
		var next uint64
		for range 200 {
			switch lineage := uint64(random.IntN(int(next) + 1)); random.IntN(6) {
			case 0, 1:
				next++
				m := Mount{MountInfoID: uint32(next), MountPoint: fmt.Sprint("/", next), MountInfoParentID: 1}
				kernel[next] = m
				d.change(next, nil, &m)
			case 2:
				if old, ok := kernel[lineage]; ok {
					delete(kernel, lineage)
					d.change(lineage, &old, nil)
				}
			case 3:
				if old, ok := kernel[lineage]; ok {
					m := old
					m.Options = []string{"rw", "ro"}[random.IntN(2)]
					kernel[lineage] = m
					d.change(lineage, &old, &m)
				}
			case 4:
				if old, ok := kernel[lineage]; ok {
					m := old
					m.MountPoint = fmt.Sprint("/", lineage, "/", random.IntN(2))
					m.MountInfoParentID = uint32(random.IntN(3))
					kernel[lineage] = m
					d.change(lineage, &old, &m)
				}
			case 5:
				d.looked(false)
				if !d.empty() {
					check(t, d.event(), consumer)
					d.reset()
				}
				if !maps.EqualFunc(kernel, consumer, func(a, b Mount) bool { return a.equal(&b) }) {
					t.Fatalf("round %d: the consumer's table differs from the kernel's", round)
				}
			}
		}
	}
}

// check applies e to table, by way of its keys, and checks its form.
func check(t *testing.T, e *MountEvent, table map[uint64]Mount) {
	t.Helper()
	if len(e.Mounted)+len(e.Unmounted)+len(e.Moved)+len(e.Changed) == 0 {
		t.Fatal("an event without a change")
	}
	seen := map[uint32]bool{}
	once := func(id uint32) {
		if seen[id] {
			t.Fatalf("mount %d is in the event twice", id)
		}
		seen[id] = true
	}
	known := func(old *Mount) {
		if have, ok := table[uint64(old.MountInfoID)]; !ok || !have.equal(old) {
			t.Fatalf("the event says that the consumer knew %+v; it knows %+v", old, have)
		}
	}
	for i := range e.Unmounted {
		known(&e.Unmounted[i])
		once(e.Unmounted[i].MountInfoID)
		delete(table, uint64(e.Unmounted[i].MountInfoID))
	}
	for _, c := range e.Moved {
		known(&c.Old)
		once(c.New.MountInfoID)
		if c.Old.MountPoint == c.New.MountPoint && c.Old.MountInfoParentID == c.New.MountInfoParentID {
			t.Fatalf("%+v did not move", c)
		}
		table[uint64(c.New.MountInfoID)] = c.New
	}
	for _, c := range e.Changed {
		known(&c.Old)
		once(c.New.MountInfoID)
		if c.Old.MountPoint != c.New.MountPoint || c.Old.equal(&c.New) {
			t.Fatalf("%+v moved, or did not change", c)
		}
		table[uint64(c.New.MountInfoID)] = c.New
	}
	for _, m := range e.Mounted {
		once(m.MountInfoID)
		if _, ok := table[uint64(m.MountInfoID)]; ok {
			t.Fatalf("mount %d was there", m.MountInfoID)
		}
		table[uint64(m.MountInfoID)] = m
	}
	byID := func(a, b Mount) int { return int(a.MountInfoID) - int(b.MountInfoID) }
	if !slices.IsSortedFunc(e.Mounted, byID) || !slices.IsSortedFunc(e.Unmounted, func(a, b Mount) int { return byID(b, a) }) {
		t.Fatal("a list is not in the order of age")
	}
}
