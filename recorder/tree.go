package recorder

type tree struct{}

func newTree(pid int) (*tree, error)      { return &tree{}, nil }
func (t *tree) has(pid int) (bool, error) { return true, nil }
func (t *tree) close()                    {}
