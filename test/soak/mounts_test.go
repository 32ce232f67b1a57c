package soak

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// mounts is the mount table, followed in one of the two ways. Its book is the
// table that the events told, which must be the kernel's own text, row by row.
type mounts struct {
	via    kernstream.MountVia
	places []string

	mu    sync.Mutex
	w     *kernstream.MountWatcher
	table map[uint32]string // the rows that were told
}

func newMounts(t *testing.T, via kernstream.MountVia) *mounts {
	p := &mounts{via: via}
	dir := testenv.MountDir(t)
	for i := range 8 {
		place := filepath.Join(dir, fmt.Sprint("p", i))
		p.places = append(p.places, place, filepath.Join(place, "sub"))
	}
	t.Cleanup(p.clear)
	p.clear()
	return p
}

// fanotifyWorks tells whether the mount table can be followed by fanotify.
func fanotifyWorks(t *testing.T) bool {
	w, err := patiently(func() (*kernstream.MountWatcher, error) {
		return kernstream.WatchMounts(t.Context(), &kernstream.MountOptions{Via: kernstream.ViaFanotify})
	})
	if err == nil {
		w.Close()
	}
	t.Logf("mounts by fanotify: %v", err == nil)
	return err == nil
}

// clear unmounts everything, and makes the places anew.
func (p *mounts) clear() {
	for _, place := range p.places {
		for unix.Unmount(place, unix.MNT_DETACH) == nil {
		}
	}
	for _, place := range p.places {
		unix.Mkdir(place, 0o755)
	}
}

func (p *mounts) name() string { return fmt.Sprintf("mounts (%v)", p.via) }

func (p *mounts) begin(ctx context.Context) (kernstream.Source, error) {
	w, err := patiently(func() (*kernstream.MountWatcher, error) {
		return kernstream.WatchMounts(ctx, &kernstream.MountOptions{Via: p.via})
	})
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.w, p.table = w, map[uint32]string{}
	return kernstream.NewStream(ctx, func(ctx context.Context, emit func(*mountEvent) bool) error {
		defer w.Close()
		for {
			select {
			case e, ok := <-w.C:
				if !ok {
					return w.Err()
				}
				if !emit(&mountEvent{e, p}) {
					return ctx.Err()
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}), nil
}

// A mountEvent says of which of the two ways it is.
type mountEvent struct {
	*kernstream.MountEvent
	of *mounts
}

func (p *mounts) end() error { return nil }

func (p *mounts) workers() int { return 1 }

// act does random things to mounts. Many fail, as they may.
func (p *mounts) act(ctx context.Context, random *rand.Rand) error {
	defer p.clear()
	place := func() string { return p.places[random.IntN(len(p.places))] }
	for n := 1; ctx.Err() == nil; n++ {
		if n%100 == 0 {
			p.clear() // propagation would let the table grow for ever
		}
		switch a, b := place(), place(); random.IntN(8) {
		case 0, 1:
			if unix.Mount("soak", a, "tmpfs", 0, "") == nil {
				unix.Mkdir(filepath.Join(a, "sub"), 0o755)
			}
		case 2:
			unix.Unmount(a, 0)
		case 3:
			unix.Unmount(a, unix.MNT_DETACH)
		case 4:
			flags := []uintptr{0, unix.MS_RDONLY, unix.MS_NOSUID, unix.MS_NOEXEC}[random.IntN(4)]
			unix.Mount("", a, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
		case 5:
			unix.Mount(a, b, "", unix.MS_BIND|uintptr(random.IntN(2))*unix.MS_REC, "")
		case 6:
			unix.Mount(a, b, "", unix.MS_MOVE, "")
		case 7:
			kinds := []uintptr{unix.MS_SHARED, unix.MS_PRIVATE, unix.MS_SLAVE, unix.MS_UNBINDABLE}
			unix.Mount("", a, "", kinds[random.IntN(len(kinds))], "")
		}
		if random.IntN(4) == 0 {
			time.Sleep(time.Duration(random.IntN(1000)) * time.Microsecond)
		}
	}
	return nil
}

// guest follows the table in one of the ways that there are. It starts and ends
// in the middle of changes.
func (p *mounts) guest(ctx context.Context, random *rand.Rand) error {
	options := &kernstream.MountOptions{Via: []kernstream.MountVia{kernstream.ViaAuto, kernstream.ViaMountinfo}[random.IntN(2)]}
	if random.IntN(3) == 0 {
		options.Coalesce = kernstream.CoalesceFor(time.Duration(random.IntN(3000)) * time.Microsecond)
		options.MaxDelay = 5 * time.Millisecond
	}
	w, err := kernstream.WatchMounts(context.Background(), options)
	if err != nil {
		return err
	}
	defer w.Close()
	table := map[uint32]string{}
	for {
		select {
		case e := <-w.C:
			if _, err := applyRows(table, e); err != nil {
				return fmt.Errorf("%v: %w", e, err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *mounts) take(e kernstream.Event) (mine bool, things int, err error) {
	m, ok := e.(*mountEvent)
	if !ok || m.of != p {
		return false, 0, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	things, err = applyRows(p.table, m.MountEvent)
	return true, things, err
}

// applyRows brings a table up to date, and says if the event does not fit it.
func applyRows(table map[uint32]string, e *kernstream.MountEvent) (things int, err error) {
	known := func(m *kernstream.Mount) {
		if text := row(m); table[m.MountInfoID] != text && err == nil {
			err = fmt.Errorf("said to be known is\n%s, but it is\n%s", text, table[m.MountInfoID])
		}
		delete(table, m.MountInfoID)
	}
	for i := range e.Unmounted {
		known(&e.Unmounted[i])
	}
	changes := slices.Concat(e.Moved, e.Changed)
	for i := range changes {
		known(&changes[i].Old)
		table[changes[i].New.MountInfoID] = row(&changes[i].New)
	}
	for i := range e.Mounted {
		m := &e.Mounted[i]
		if have, ok := table[m.MountInfoID]; ok && err == nil {
			err = fmt.Errorf("mounted is\n%s, but there is\n%s", row(m), have)
		}
		table[m.MountInfoID] = row(m)
	}
	return len(e.Unmounted) + len(changes) + len(e.Mounted), err
}

// open counts the rows in which what was told differs from what the kernel
// says.
func (p *mounts) open() (n int, example string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.w.Rescan() // some changes wake nobody
	truth := mountTable()
	all := maps.Clone(truth)
	maps.Copy(all, p.table)
	for id := range all {
		if truth[id] != p.table[id] {
			n++
			example = fmt.Sprintf("the mount\n%s, of which was told\n%s", truth[id], p.table[id])
		}
	}
	return n, example
}

func (p *mounts) lost() int   { return 0 }
func (p *mounts) queued() int { return 0 }

// row is a mount as one line that can be compared with the kernel's.
func row(m *kernstream.Mount) string {
	return fmt.Sprintf("%d %d %d:%d %s %s %s %v %s %s %s", m.MountInfoID, m.MountInfoParentID, m.Major, m.Minor,
		m.Root, m.MountPoint, m.Options, m.Optional, m.FSType, m.FSSource, m.SuperOptions)
}

// mountTable reads the kernel's table, without the library.
func mountTable() map[uint32]string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	decode := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace
	table := map[uint32]string{}
	for line := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		f := strings.Split(before, " ")
		s := strings.Split(after, " ")
		var id uint32
		fmt.Sscan(f[0], &id)
		table[id] = fmt.Sprintf("%s %s %s %s %s %s %v %s %s %s", f[0], f[1], f[2], decode(f[3]), decode(f[4]), f[5], f[6:],
			decode(s[0]), decode(s[1]), s[2])
	}
	return table
}
