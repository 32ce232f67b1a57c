package recorder

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/jsontext"
)

// A List is what a recording has found: the files in the order of their first access,
// and whether that is all of them.
type List struct {
	Entries []Entry // the files, each once

	// Complete tells that no access was missed between the start of the recording and its
	// end, or that of the command. Otherwise Reasons say why, in words.
	Complete bool
	Reasons  []string
}

// An Entry is one file of a List.
type Entry struct {
	Path  string            // as the target sees it; the kernel's bytes, in no certain encoding
	Ops   kernstream.FileOp // all that was done with it
	First time.Duration     // of the first access, since the recording began
	Count uint64            // how many accesses the kernel told of, which merges those that come at once; at least 1
}

// String returns the entry in one line.
func (e *Entry) String() string { return (&Access{Path: e.Path, Ops: e.Ops}).String() }

// MarshalJSON returns the entry as a line of a record file: path, events, first, in seconds, and
// count. If the path is not UTF-8, path_raw is the original in base64.
func (e Entry) MarshalJSON() ([]byte, error) {
	return jsontext.Marshal(jsonEntry{e.Path, jsontext.Raw(e.Path), opNames(e.Ops), seconds(e.First), e.Count})
}

// list returns the list once it is finished, and nil before.
func (t *tally) list() *List {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.finished {
		return nil
	}
	l := &List{Entries: make([]Entry, t.files.n), Reasons: t.reasons()}
	for i := range l.Entries {
		l.Entries[i] = t.files.at(i).entry()
	}
	l.Complete = len(l.Reasons) == 0
	return l
}

// reasons returns why the list is not complete, if so.
func (t *tally) reasons() []string {
	reasons := slices.Clone(t.verdict)
	if t.overflows > 0 && !t.judged {
		reasons = append(reasons, fmt.Sprintf("accesses were lost: the kernel's queue was full, %s", times(t.overflows)))
	}
	for _, why := range slices.Sorted(maps.Keys(t.nameless)) {
		reasons = append(reasons, fmt.Sprintf("%d accesses are to files without a name: %s", t.nameless[why], why))
	}
	if t.left > 0 {
		reasons = append(reasons, fmt.Sprintf("%d accesses are to further files than the %d that the list may have", t.left, t.limit))
	}
	reasons = append(reasons, t.faults...)
	if t.unsaid > 0 {
		reasons = append(reasons, fmt.Sprintf("and %d more of that kind", t.unsaid))
	}
	return reasons
}

// maxFaults bounds what is said about things that go wrong again and again.
const maxFaults = 16

func (t *tally) addFault(why string) {
	switch {
	case slices.Contains(t.faults, why):
	case len(t.faults) < maxFaults:
		t.faults = append(t.faults, why)
	default:
		t.unsaid++
	}
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprint(n, " times")
}
