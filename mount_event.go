package kernstream

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kernstream/kernstream/internal/jsontext"
)

// Time returns e.When.
func (e *MountEvent) Time() time.Time { return e.When }

// stringItems is how many mounts String names before it only counts.
const stringItems = 4

// String returns the event in one line: its flags, and the mounts that it is
// about or, if there are many, how many.
func (e *MountEvent) String() string {
	var b strings.Builder
	b.WriteString("mounts")
	for _, flag := range []struct {
		set  bool
		name string
	}{{e.Initial, " initial"}, {e.Coalesced, " coalesced"}, {e.Resync, " resync"}} {
		if flag.set {
			b.WriteString(flag.name)
		}
	}
	b.WriteByte(':')
	if len(e.Mounted)+len(e.Unmounted)+len(e.Moved)+len(e.Changed) > stringItems {
		fmt.Fprintf(&b, " %d mounted, %d unmounted, %d moved, %d changed", len(e.Mounted), len(e.Unmounted), len(e.Moved), len(e.Changed))
		return b.String()
	}
	for _, m := range e.Unmounted {
		b.WriteString(" -" + m.label())
	}
	for _, c := range e.Moved {
		b.WriteString(" >" + c.Old.label() + " to " + c.New.label())
	}
	for _, c := range e.Changed {
		b.WriteString(" ~" + c.New.label())
	}
	for _, m := range e.Mounted {
		b.WriteString(" +" + m.label())
	}
	return b.String()
}

// label names a mount in a text for people.
func (m *Mount) label() string {
	if m.Raw != nil {
		return "unreadable row " + strconv.Quote(string(m.Raw))
	}
	return oneWord(m.MountPoint) + "(" + oneWord(m.FSType) + ")"
}

// oneWord returns s, quoted if it has spaces, quotes, control characters or
// bytes that are not text.
func oneWord(s string) string {
	odd := func(r rune) bool { return r == '"' || unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if !utf8.ValidString(s) || strings.ContainsFunc(s, odd) {
		return strconv.Quote(s)
	}
	return s
}

// MarshalJSON returns the event as one JSON object, the one that kernstream
// mounts -json prints. Bytes that are not UTF-8 are replaced, and the key with
// _raw at its end holds the original in base64.
func (e *MountEvent) MarshalJSON() ([]byte, error) {
	return jsontext.Marshal(&jsonMountEvent{
		Time:      e.When.UTC(),
		Source:    "mount",
		Initial:   e.Initial,
		Coalesced: e.Coalesced,
		Resync:    e.Resync,
		Via:       e.Via.String(),
		Mounted:   jsonMounts(e.Mounted),
		Unmounted: jsonMounts(e.Unmounted),
		Moved:     jsonChanges(e.Moved),
		Changed:   jsonChanges(e.Changed),
	})
}

// MarshalJSON returns the mount in the form that it has in an event.
func (m Mount) MarshalJSON() ([]byte, error) { return jsontext.Marshal(newJSONMount(&m)) }

// Lists and flags are always there; what is not known is left out.
type jsonMountEvent struct {
	Time      time.Time         `json:"time"`
	Source    string            `json:"source"`
	Initial   bool              `json:"initial"`
	Coalesced bool              `json:"coalesced"`
	Resync    bool              `json:"resync"`
	Via       string            `json:"via"`
	Mounted   []jsonMount       `json:"mounted"`
	Unmounted []jsonMount       `json:"unmounted"`
	Moved     []jsonMountChange `json:"moved"`
	Changed   []jsonMountChange `json:"changed"`
}

type jsonMountChange struct {
	Old jsonMount `json:"old"`
	New jsonMount `json:"new"`
}

type jsonMount struct {
	ID                uint64 `json:"id,omitempty"`
	ParentID          uint64 `json:"parent_id,omitempty"`
	MountInfoID       uint32 `json:"mountinfo_id,omitempty"`
	MountInfoParentID uint32 `json:"mountinfo_parent_id,omitempty"`
	*jsonMountFields
	Row    string `json:"row,omitempty"` // one that could not be read
	RowRaw []byte `json:"row_raw,omitempty"`
}

type jsonMountFields struct {
	Dev             string   `json:"dev"`
	Root            string   `json:"root"`
	RootRaw         []byte   `json:"root_raw,omitempty"`
	MountPoint      string   `json:"mount_point"`
	MountPointRaw   []byte   `json:"mount_point_raw,omitempty"`
	Options         string   `json:"options"`
	Optional        []string `json:"optional"`
	FSType          string   `json:"fs_type"`
	FSTypeRaw       []byte   `json:"fs_type_raw,omitempty"`
	FSSource        string   `json:"fs_source"`
	FSSourceRaw     []byte   `json:"fs_source_raw,omitempty"`
	SuperOptions    string   `json:"super_options"`
	SuperOptionsRaw []byte   `json:"super_options_raw,omitempty"`
}

func newJSONMount(m *Mount) jsonMount {
	j := jsonMount{
		ID:                m.ID,
		ParentID:          m.ParentID,
		MountInfoID:       m.MountInfoID,
		MountInfoParentID: m.MountInfoParentID,
	}
	if m.Raw != nil {
		j.Row, j.RowRaw = string(m.Raw), jsontext.Raw(string(m.Raw))
		return j
	}
	j.jsonMountFields = &jsonMountFields{
		Dev:             fmt.Sprintf("%d:%d", m.Major, m.Minor),
		Root:            m.Root,
		RootRaw:         jsontext.Raw(m.Root),
		MountPoint:      m.MountPoint,
		MountPointRaw:   jsontext.Raw(m.MountPoint),
		Options:         m.Options,
		Optional:        append([]string{}, m.Optional...),
		FSType:          m.FSType,
		FSTypeRaw:       jsontext.Raw(m.FSType),
		FSSource:        m.FSSource,
		FSSourceRaw:     jsontext.Raw(m.FSSource),
		SuperOptions:    m.SuperOptions,
		SuperOptionsRaw: jsontext.Raw(m.SuperOptions),
	}
	return j
}

func jsonMounts(mounts []Mount) []jsonMount {
	list := make([]jsonMount, len(mounts))
	for i := range mounts {
		list[i] = newJSONMount(&mounts[i])
	}
	return list
}

func jsonChanges(changes []MountChange) []jsonMountChange {
	list := make([]jsonMountChange, len(changes))
	for i := range changes {
		list[i] = jsonMountChange{newJSONMount(&changes[i].Old), newJSONMount(&changes[i].New)}
	}
	return list
}
