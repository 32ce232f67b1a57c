package kernstream

import "github.com/kernstream/kernstream/internal/statmount"

// mountOfStat returns the Mount that st describes, just as the row of mountinfo
// would give it.
func mountOfStat(st *statmount.Mount) *Mount {
	// All texts share one allocation.
	var room [512]byte
	b := append(room[:0], st.Root...)
	root := len(b)
	b = append(b, st.Point...)
	point := len(b)
	b = st.AppendOptions(b)
	options := len(b)
	b = st.AppendType(b)
	fsType := len(b)
	b = append(b, st.Source...)
	source := len(b)
	b = st.AppendSuperOptions(b)
	text := string(b)
	return &Mount{
		ID:                st.ID,
		ParentID:          st.ParentID,
		MountInfoID:       st.MountInfoID,
		MountInfoParentID: st.MountInfoParentID,
		Major:             st.Major,
		Minor:             st.Minor,
		Root:              text[:root],
		MountPoint:        text[root:point],
		Options:           text[point:options],
		Optional:          st.Optional(),
		FSType:            text[options:fsType],
		FSSource:          text[fsType:source],
		SuperOptions:      text[source:],
	}
}
