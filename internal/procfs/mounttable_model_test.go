package procfs_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
	"github.com/kernstream/kernstream/internal/testenv"
)

// The comparison of tables against a model: random changes, of which the lists
// must make the next table of the last.

// A mounter makes random texts as a kernel might, one after the other.
type mounter struct {
	*rand.Rand
	rows   []string
	device int
}

func (m *mounter) row(id int) string {
	m.device++
	return tableRow(id, m.device, "rw")
}

// freeID returns the lowest number that is not an ID in the table, as the
// kernel does, or any.
func (m *mounter) freeID() int {
	taken := make(map[uint32]bool)
	for _, row := range m.rows {
		if id, ok := rowID(row); ok {
			taken[id] = true
		}
	}
	id := 1
	if m.IntN(4) == 0 {
		id = m.IntN(1 << 16)
	}
	for taken[uint32(id)] {
		id++
	}
	return id
}

// step changes the table in one way.
func (m *mounter) step() {
	n := len(m.rows)
	if n == 0 || m.IntN(4) == 0 { // mounted, listed last
		m.rows = append(m.rows, m.row(m.freeID()))
		return
	}
	i := m.IntN(n)
	id, hasID := rowID(m.rows[i])
	if !hasID {
		m.rows = slices.Delete(m.rows, i, i+1)
		return
	}
	switch m.IntN(12) {
	case 0: // mounted, listed in the middle
		m.rows = slices.Insert(m.rows, i, m.row(m.freeID()))
	case 1, 2: // unmounted
		m.rows = slices.Delete(m.rows, i, i+1)
	case 3: // a whole tree unmounted
		m.rows = slices.Delete(m.rows, i, min(n, i+1+m.IntN(10)))
	case 4, 5: // remounted
		m.rows[i] = strings.Replace(m.rows[i], " rw", fmt.Sprintf(" rw,o%d", m.IntN(100)), 1)
	case 6: // moved to another place
		m.rows[i] = strings.Replace(m.rows[i], "/mnt/", "/mnt/moved/", 1)
	case 7: // in another order
		j := m.IntN(n)
		m.rows[i], m.rows[j] = m.rows[j], m.rows[i]
	case 8: // replaced on the spot
		m.rows[i] = m.row(int(id))
	case 9: // unmounted, and the ID was given to the next one
		m.rows = append(slices.Delete(m.rows, i, i+1), m.row(int(id)))
	case 10: // damaged behind the ID
		m.rows[i] = fmt.Sprintf("%d damaged%d", id, m.IntN(3))
	case 11: // damaged before the ID
		m.rows[i] = fmt.Sprintf("damaged%d", m.IntN(3))
	}
}

// repeat returns the rows with one ID once more.
func (m *mounter) repeat() []string {
	rows := slices.Clone(m.rows)
	for range 1 + m.IntN(3) {
		if len(rows) == 0 {
			break
		}
		row := rows[m.IntN(len(rows))]
		if id, ok := rowID(row); ok && m.IntN(3) > 0 {
			row = m.row(int(id))
		}
		rows = slices.Insert(rows, m.IntN(len(rows)+1), row)
	}
	return rows
}

// TestMountTableModel: over random changes, each comparison says what a simple
// one says, the table holds the rows of the last text that was committed, and a
// comparison that was not committed leaves no trace, whichever of several is.
func TestMountTableModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range testenv.SoakN(100) {
		m := &mounter{Rand: rand.New(rand.NewPCG(seed, uint64(round)))}
		for range m.IntN(40) {
			m.rows = append(m.rows, m.row(m.freeID()))
		}
		repeats := m.IntN(4) == 0
		var table checkedTable
		for range 25 {
			var diffs []*procfs.MountDiff
			var texts [][]byte
			for range 1 + m.IntN(3) {
				for range m.IntN(4) {
					m.step()
				}
				rows := m.rows
				if repeats && m.IntN(4) == 0 {
					rows = m.repeat()
				}
				text := textOf(rows)
				d, err := table.compare(text)
				if err != nil {
					t.Fatalf("round %d: %v\nrows:\n%s", round, err, text)
				}
				diffs, texts = append(diffs, d), append(texts, text)
			}
			one := m.IntN(len(diffs))
			if err := table.commit(diffs[one], texts[one]); err != nil {
				t.Fatalf("round %d, commit: %v\nrows:\n%s", round, err, texts[one])
			}
		}
	}
}

// dropRepeated is DropRepeated, written in another way.
func dropRepeated(rows []string) []string {
	var kept []string
	for i, row := range rows {
		id, ok := rowID(row)
		later := slices.ContainsFunc(rows[i+1:], func(row string) bool {
			laterID, laterOK := rowID(row)
			return laterOK && laterID == id
		})
		if !ok || !later {
			kept = append(kept, row)
		}
	}
	return kept
}

// TestDropRepeated: of rows with one ID the last stays, where it is; rows
// without an ID all stay.
func TestDropRepeated(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", ""},
		{"\n", "\n"},
		{"1 a\n", "1 a\n"},
		{"1 a", "1 a\n"},
		{"1 a\n2 b\n3 c\n", "1 a\n2 b\n3 c\n"},
		{"1 a\n2 b\n1 c\n", "2 b\n1 c\n"},
		{"1 a\n2 b\n1 c", "2 b\n1 c\n"},
		{"1 a\n1 b\n1 c\n", "1 c\n"},
		{"1 a\n1 a\n", "1 a\n"},
		{"1 a long row\n2 b\n1\n2 the longest row\n", "1\n2 the longest row\n"},
		{"1\n2\n3\n3\n2\n1\n", "3\n2\n1\n"},
		{"x\n1 a\nx\n\n1 b\n\n", "x\nx\n\n1 b\n\n"},
		{"11 a\n1 b\n111 c\n1", "11 a\n111 c\n1\n"},
		{"01 a\n1 b\n", "1 b\n"},
		{"4294967295 a\n4294967296 b\n4294967295 c\n4294967296 d\n", "4294967296 b\n4294967295 c\n4294967296 d\n"},
		{"1\ta\n1 b\n", "1\ta\n1 b\n"},
		{"1 a\r\n1 b\v\f\n", "1 b\v\f\n"},
	} {
		text := []byte(c.text)
		got := procfs.DropRepeated(text)
		if string(got) != c.want {
			t.Errorf("%q: got %q, want %q", c.text, got, c.want)
		}
		if strings.HasSuffix(c.text, "\n") && &got[0] != &text[0] {
			t.Errorf("%q: the result is not in place", c.text)
		}
	}
}

// TestDropRepeatedModel: over random texts with repeated IDs, the result is the
// one of a simple implementation, and a table takes it without a repetition.
func TestDropRepeatedModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	m := &mounter{Rand: rand.New(rand.NewPCG(seed, 0))}
	var table checkedTable
	for range testenv.SoakN(500) {
		for range m.IntN(6) {
			m.step()
		}
		rows := m.repeat()
		text := procfs.DropRepeated(textOf(rows))
		if got, want := tableRows(text), dropRepeated(rows); !slices.Equal(got, want) {
			t.Fatalf("rows %q\ngot  %q\nwant %q", rows, got, want)
		}
		if _, err := table.update(text); err != nil {
			t.Fatalf("%v\nrows:\n%s", err, text)
		}
	}
}
