package kernstream

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

// A treeModel is what a mountTree is to know, kept simply: the mounts, and for
// each place and short ID the mount that came to it last and has not left it.
type treeModel struct {
	mounts map[uint64]*Mount
	places map[mountPlace]uint64
	short  map[uint32]uint64
}

func (m *treeModel) leavePlace(id uint64) {
	maps.DeleteFunc(m.places, func(_ mountPlace, there uint64) bool { return there == id })
}

// put returns the ID of the mount that had the place, or 0.
func (m *treeModel) put(mount *Mount) (displaced uint64) {
	m.leavePlace(mount.ID)
	place := mountPlace{mount.ParentID, mount.MountPoint}
	displaced = m.places[place]
	m.mounts[mount.ID], m.places[place], m.short[mount.MountInfoID] = mount, mount.ID, mount.ID
	return displaced
}

func (m *treeModel) remove(id uint64) {
	m.leavePlace(id)
	maps.DeleteFunc(m.short, func(_ uint32, there uint64) bool { return there == id })
	delete(m.mounts, id)
}

// check returns how the tree differs from the model, or nil.
func (m *treeModel) check(t *mountTree) error {
	children := make(map[uint64][]uint64)
	wanted := make(map[uint64]bool) // the nodes
	for id, mount := range m.mounts {
		wanted[id] = true
		if mount.ParentID != id {
			wanted[mount.ParentID] = true
			children[mount.ParentID] = append(children[mount.ParentID], id)
		}
	}
	if t.seen != len(m.mounts) {
		return fmt.Errorf("%d mounts, want %d", t.seen, len(m.mounts))
	}
	if len(t.nodes) != len(wanted) {
		return fmt.Errorf("%d nodes, want %d", len(t.nodes), len(wanted))
	}
	for id, n := range t.nodes {
		if !wanted[id] || n.id != id || n.mount != m.mounts[id] {
			return fmt.Errorf("node %d is %+v, want mount %+v", id, n, m.mounts[id])
		}
		if known := t.known(id); (known == nil) != (n.mount == nil) || known != nil && known != n {
			return fmt.Errorf("known node %d is %+v", id, known)
		}
		var below []uint64
		var left *mountNode
		for child := n.first; child != nil; left, child = child, child.right {
			if child.parent != n || child.left != left {
				return fmt.Errorf("node %d is below %d, but says %+v", child.id, id, child)
			}
			below = append(below, child.id)
			if len(below) > len(t.nodes) {
				return fmt.Errorf("a loop below %d", id)
			}
		}
		slices.Sort(below)
		want := children[id]
		slices.Sort(want)
		if !slices.Equal(below, want) {
			return fmt.Errorf("below %d are %d, want %d", id, below, want)
		}
		if n.mount == nil && n.parent != nil || n.mount != nil && (n.parent != nil) != (n.mount.ParentID != id) {
			return fmt.Errorf("node %d has the parent %+v", id, n.parent)
		}
	}
	ids := func(nodes map[uint32]*mountNode) map[uint32]uint64 {
		of := make(map[uint32]uint64)
		for short, n := range nodes {
			of[short] = n.id
		}
		return of
	}
	if got := ids(t.short); !maps.Equal(got, m.short) {
		return fmt.Errorf("short IDs %v, want %v", got, m.short)
	}
	places := make(map[mountPlace]uint64)
	for place, n := range t.places {
		places[place] = n.id
	}
	if !maps.Equal(places, m.places) {
		return fmt.Errorf("places %v, want %v", places, m.places)
	}
	return nil
}

// TestMountTreeModel: over random mounts, moves and unmounts, in an order that
// no kernel has, the tree knows what a simple model does; and nothing is left of
// it when all mounts are gone.
func TestMountTreeModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range testenv.SoakN(100) {
		r := rand.New(rand.NewPCG(seed, uint64(round)))
		tree := newMountTree()
		model := &treeModel{map[uint64]*Mount{}, map[mountPlace]uint64{}, map[uint32]uint64{}}
		// Few IDs, so that they meet. A mount keeps its short ID.
		unique := 2 + r.Uint64N(20)
		remove := func(id uint64) {
			tree.nodes[id].sum = 7
			tree.remove(tree.known(id))
			model.remove(id)
			if n := tree.nodes[id]; n != nil && n.sum != 0 {
				t.Fatalf("round %d: the checksum of a mount that is gone is %d", round, n.sum)
			}
			if err := model.check(tree); err != nil {
				t.Fatalf("round %d: removed %d: %v", round, id, err)
			}
		}
		for range 200 {
			id := 1 + r.Uint64N(unique)
			if tree.known(id) != nil && r.IntN(2) == 0 {
				remove(id)
				continue
			}
			m := &Mount{ID: id, ParentID: 1 + r.Uint64N(unique), MountInfoID: uint32(id % 7), MountPoint: fmt.Sprint("/", r.IntN(3))}
			before := tree.nodes[id]
			n, displaced := tree.put(m)
			if n != tree.known(id) || before != nil && before.first != nil && n != before {
				t.Fatalf("round %d: put %+v in %+v, was in %+v", round, m, n, before)
			}
			var got uint64
			if displaced != nil {
				got = displaced.id
			}
			if want := model.put(m); got != want {
				t.Fatalf("round %d: %+v displaced %d, want %d", round, m, got, want)
			}
			if err := model.check(tree); err != nil {
				t.Fatalf("round %d: put %+v: %v", round, m, err)
			}
		}
		for _, i := range r.Perm(int(unique)) {
			if id := uint64(i + 1); tree.known(id) != nil {
				remove(id)
			}
		}
		if len(tree.nodes)+len(tree.places)+len(tree.short) > 0 {
			t.Fatalf("round %d: left are %v, %v, %v", round, tree.nodes, tree.places, tree.short)
		}
	}
}

// TestMountTreePlace: a mount that comes to a place says who had it, one that
// stays where it is displaces nobody, and one that went from a place that was
// taken from it does not free it.
func TestMountTreePlace(t *testing.T) {
	tree := newMountTree()
	at := func(id, parent uint64, point string) (displaced uint64) {
		if _, n := tree.put(&Mount{ID: id, ParentID: parent, MountPoint: point, MountInfoID: uint32(id)}); n != nil {
			return n.id
		}
		return 0
	}
	for i, c := range []struct {
		id, parent uint64
		point      string
		want       uint64
	}{
		{10, 1, "/a", 0},
		{10, 1, "/a", 0},
		{11, 1, "/b", 0},
		{12, 2, "/a", 0},
		{13, 1, "/a", 10}, // beneath 10
		{10, 13, "/a", 0}, // which is on it
		{14, 1, "/a", 13},
		{11, 1, "/a", 14},
		{11, 1, "/b", 0},
		{15, 1, "/a", 0},
	} {
		if got := at(c.id, c.parent, c.point); got != c.want {
			t.Errorf("step %d: %d displaced %d, want %d", i, c.id, got, c.want)
		}
	}
}
