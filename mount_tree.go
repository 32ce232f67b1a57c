package kernstream

// A mountTree is the mounts of a namespace as the fanotify path knows them. It
// answers at once what else an event about one mount concerns: those below it,
// and the one that has the place where it is mounted.
type mountTree struct {
	nodes  map[uint64]*mountNode // by unique ID
	short  map[uint32]*mountNode // by mountinfo ID
	places map[mountPlace]*mountNode
	seen   int // nodes with a mount
}

// A mountPlace is where a mount is mounted. It has one mount at a time.
type mountPlace struct {
	parent uint64
	point  string
}

// A mountNode is a mount in the tree. A mount that is not known yet, or cannot
// be seen, has a node as long as others are mounted on it.
type mountNode struct {
	id     uint64
	mount  *Mount // nil: not known; it is not changed, but replaced
	hidden bool   // by the filter
	sum    uint64 // of its row of mountinfo when that was last looked at; 0: never

	parent      *mountNode
	first       *mountNode // of those mounted on it
	left, right *mountNode // others mounted on the parent
}

func newMountTree() *mountTree {
	return &mountTree{
		nodes:  make(map[uint64]*mountNode),
		short:  make(map[uint32]*mountNode),
		places: make(map[mountPlace]*mountNode),
	}
}

// known returns the node of a mount that is known, or nil.
func (t *mountTree) known(id uint64) *mountNode {
	if n := t.nodes[id]; n != nil && n.mount != nil {
		return n
	}
	return nil
}

// put makes m the state of its mount. It returns the node, and the one that
// was thought to have m's place, if there is one.
func (t *mountTree) put(m *Mount) (n, displaced *mountNode) {
	n = t.node(m.ID)
	if n.mount == nil {
		t.seen++
	} else {
		t.leave(n)
	}
	n.mount = m
	if m.ParentID != m.ID {
		t.hang(n, t.node(m.ParentID))
	}
	t.short[m.MountInfoID] = n
	place := mountPlace{m.ParentID, m.MountPoint}
	if there := t.places[place]; there != n {
		displaced = there
	}
	t.places[place] = n
	return n, displaced
}

// remove forgets a mount. What is mounted on it stays in the tree.
func (t *mountTree) remove(n *mountNode) {
	t.leave(n)
	if t.short[n.mount.MountInfoID] == n {
		delete(t.short, n.mount.MountInfoID)
	}
	n.mount = nil
	n.sum = 0
	t.seen--
	t.prune(n)
}

func (t *mountTree) node(id uint64) *mountNode {
	n := t.nodes[id]
	if n == nil {
		n = &mountNode{id: id}
		t.nodes[id] = n
	}
	return n
}

// leave takes n from its place.
func (t *mountTree) leave(n *mountNode) {
	place := mountPlace{n.mount.ParentID, n.mount.MountPoint}
	if t.places[place] == n {
		delete(t.places, place)
	}
	if n.parent != nil {
		t.unhang(n)
	}
}

func (t *mountTree) hang(n, parent *mountNode) {
	n.parent = parent
	n.right = parent.first
	if n.right != nil {
		n.right.left = n
	}
	parent.first = n
}

func (t *mountTree) unhang(n *mountNode) {
	parent := n.parent
	if n.left != nil {
		n.left.right = n.right
	} else {
		parent.first = n.right
	}
	if n.right != nil {
		n.right.left = n.left
	}
	n.parent, n.left, n.right = nil, nil, nil
	t.prune(parent)
}

// prune drops a node that stands for nothing.
func (t *mountTree) prune(n *mountNode) {
	if n.mount == nil && n.first == nil {
		delete(t.nodes, n.id)
	}
}
