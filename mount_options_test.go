package kernstream_test

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// What the options of a watcher do, and what its events are as text.

// TestMountFilter: the consumer is told of the mounts that pass; one that
// ceases to pass is Unmounted, one that begins to is Mounted, one that passes
// neither before nor after is nothing.
func TestMountFilter(t *testing.T) {
	eachWay(t, testFilter)
}

func testFilter(t *testing.T, via kernstream.MountVia) {
	var dir string
	writable := func(m *kernstream.Mount) bool {
		return strings.HasPrefix(m.FSSource, "mark") || strings.HasPrefix(m.MountPoint, dir) && strings.HasPrefix(m.Options, "rw") && m.FSSource != "hidden"
	}
	testenv.NeedMounts(t)
	l := &lab{t: t, dir: labDir(t)}
	dir = l.dir
	options := &kernstream.MountOptions{Via: via, Filter: writable}
	l.watch(t.Context(), options)
	if len(l.table) != 1 {
		t.Errorf("the initial event has %d mounts; want the one that passes", len(l.table))
	}
	remount := func(flags uintptr) func() {
		return func() { mount(t, "", filepath.Join(dir, "a"), "", unix.MS_REMOUNT|unix.MS_BIND|flags, "") }
	}
	l.want(l.do(func() { l.tmpfs("a") }), "", "", "", "a")
	l.want(l.do(remount(unix.MS_NOEXEC)), "", "", "a", "")
	e := l.do(remount(unix.MS_RDONLY))
	l.want(e, "a", "", "", "")
	if !strings.Contains(e.Unmounted[0].Options, "noexec") {
		t.Errorf("unmounted is %+v; want the last state that passed", e.Unmounted[0])
	}
	l.want(l.do(remount(unix.MS_RDONLY|unix.MS_NOSUID)), "", "", "", "")
	l.want(l.do(remount(0)), "", "", "", "a")
	mount(t, "hidden", l.mkdir("h"), "tmpfs", 0, "")
	l.want(l.untilMark(), "", "", "", "")
	umount(t, filepath.Join(dir, "h"), 0)
	l.want(l.untilMark(), "", "", "", "")
	l.checkTable(options)
}

// TestMountFilterPanics: when the filter panics, the caller of WatchMounts may
// recover, and nothing is left of the watcher.
func TestMountFilterPanics(t *testing.T) {
	testenv.NeedMounts(t)
	testenv.NoLeaks(t)
	options := &kernstream.MountOptions{Filter: func(*kernstream.Mount) bool { panic("odd") }}
	for _, call := range []func(){
		func() { kernstream.WatchMounts(t.Context(), options) },
		func() { kernstream.Mounts(options) },
	} {
		func() {
			defer func() {
				if recover() != "odd" {
					t.Error("the panic did not reach the caller")
				}
			}()
			call()
		}()
	}
}

// TestMountTwoWatchers: watchers in one process do not take each other's
// events.
func TestMountTwoWatchers(t *testing.T) {
	l := newLab(t, nil)
	other := &lab{t: t, dir: l.dir}
	other.watch(t.Context(), nil)
	for i := range 50 {
		name := fmt.Sprint("m", i)
		l.tmpfs(name)
		for _, each := range []*lab{l, other} {
			e := each.receive()
			each.apply(e)
			each.want(e, "", "", "", name)
		}
	}
}

// TestMountContext: with a context that is done, WatchMounts returns its cause.
func TestMountContext(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errCause)
	if w, err := kernstream.WatchMounts(ctx, nil); w != nil || err != errCause {
		t.Errorf("WatchMounts returned %v, %v; want nil and the cause", w, err)
	}
}

// TestMountMerged: a merged watcher can still be told to rescan.
func TestMountMerged(t *testing.T) {
	l := newLab(t, nil)
	dir := l.tmpfs("a")
	l.untilMark()
	l.quiet("a look that is pending would find it first")
	all := kernstream.Merge(t.Context(), l.w)
	defer all.Close()
	mount(t, "", dir, "", unix.MS_SHARED, "")
	l.w.Rescan()
	select {
	case e := <-all.C:
		if m := e.(*kernstream.MountEvent); len(m.Changed) != 1 || !m.Resync {
			t.Errorf("event %v", e)
		}
	case <-time.After(patience):
		t.Fatal("no event")
	}
}

// TestMountRescanPeriod: with a period, what wakes nobody is found without
// being asked for.
func TestMountRescanPeriod(t *testing.T) {
	l := newLab(t, &kernstream.MountOptions{Rescan: 20 * time.Millisecond})
	dir := l.tmpfs("a")
	l.untilMark()
	l.quiet("a look that is pending would find it first")
	mount(t, "", dir, "", unix.MS_SHARED, "")
	e := l.receive()
	l.apply(e)
	l.want(e, "", "", "a", "")
	if !e.Resync {
		t.Errorf("%v does not have Resync", e)
	}
}

// TestSplitOptions: options are split at commas, and then decoded.
func TestSplitOptions(t *testing.T) {
	for text, want := range map[string][]string{
		"":                              nil,
		"rw":                            {"rw"},
		`rw,lowerdir=/a\054b:/c\040d`:   {"rw", "lowerdir=/a,b:/c d"},
		`k=v=w,k=v,x\134y,\9,lowerdir+`: {"k=v=w", "k=v", `x\y`, `\9`, "lowerdir+"},
		`rw,context="u:r:t:s0:c1,c2",x`: {"rw", "context=u:r:t:s0:c1,c2", "x"},
		`rw,context="u:r:t:s0:c1,c2"`:   {"rw", "context=u:r:t:s0:c1,c2"},
		`lowerdir=/a"b,x="y,z`:          {`lowerdir=/a"b`, `x="y`, "z"},
	} {
		if got := kernstream.SplitOptions(text); !slices.Equal(got, want) {
			t.Errorf("SplitOptions(%q) is %q; want %q", text, got, want)
		}
	}
}

// TestMountEventJSON: an event as JSON has the documented keys; bytes that are
// not text are kept beside a readable form; an odd row is kept as it is.
func TestMountEventJSON(t *testing.T) {
	when := time.Date(2026, 3, 4, 5, 6, 7, 89, time.FixedZone("east", 3600))
	e := &kernstream.MountEvent{
		When: when, Via: kernstream.ViaMountinfo, Coalesced: true,
		Mounted: []kernstream.Mount{{
			ID: 1 << 33, ParentID: 2, MountInfoID: 3, MountInfoParentID: 4, Major: 8, Minor: 1, Root: "/", MountPoint: "/\xff<&>",
			Options: "rw", Optional: []string{"shared:1"}, FSType: "ext4", FSSource: "", SuperOptions: "rw",
		}},
		Unmounted: []kernstream.Mount{{MountInfoID: 9, Raw: []byte("9 odd\xff")}},
		Moved:     []kernstream.MountChange{{Old: kernstream.Mount{MountPoint: "/a"}, New: kernstream.Mount{MountPoint: "/b"}}},
	}
	want := `{"time":"2026-03-04T04:06:07.000000089Z","source":"mount","initial":false,"coalesced":true,"resync":false,"via":"mountinfo",` +
		`"mounted":[{"id":8589934592,"parent_id":2,"mountinfo_id":3,"mountinfo_parent_id":4,"dev":"8:1","root":"/","mount_point":"/` + "\ufffd" + `<&>","mount_point_raw":"L/88Jj4=",` +
		`"options":"rw","optional":["shared:1"],"fs_type":"ext4","fs_source":"","super_options":"rw"}],` +
		`"unmounted":[{"mountinfo_id":9,"row":"9 odd` + "\ufffd" + `","row_raw":"OSBvZGT/"}],` +
		`"moved":[{"old":{"dev":"0:0","root":"","mount_point":"/a","options":"","optional":[],"fs_type":"","fs_source":"","super_options":""},` +
		`"new":{"dev":"0:0","root":"","mount_point":"/b","options":"","optional":[],"fs_type":"","fs_source":"","super_options":""}}],"changed":[]}`
	got, err := e.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	// The replacement character may be written as itself or as an escape.
	if text := strings.ReplaceAll(string(got), `\ufffd`, "\ufffd"); text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	value, err := json.Marshal(e.Mounted[0])
	if err != nil || !strings.Contains(string(value), `"mount_point_raw":"L/88Jj4="`) {
		t.Errorf("a Mount is %s, %v", value, err)
	}
	var any map[string]any
	whole, err := json.Marshal(e)
	if err != nil || json.Unmarshal(whole, &any) != nil {
		t.Errorf("json.Marshal: %v", err)
	}
	if !e.Time().Equal(when) {
		t.Errorf("Time is %v", e.Time())
	}
}

// TestMountEventString: an event in one line, whatever is in it.
func TestMountEventString(t *testing.T) {
	m := func(point string) kernstream.Mount { return kernstream.Mount{MountPoint: point, FSType: "tmpfs"} }
	for want, e := range map[string]*kernstream.MountEvent{
		"mounts: -/a(tmpfs) >/b(tmpfs) to /c(tmpfs) +\"/d e\"(tmpfs)": {
			Unmounted: []kernstream.Mount{m("/a")}, Moved: []kernstream.MountChange{{Old: m("/b"), New: m("/c")}}, Mounted: []kernstream.Mount{m("/d e")},
		},
		"mounts coalesced resync: ~/a(tmpfs)":                        {Coalesced: true, Resync: true, Changed: []kernstream.MountChange{{New: m("/a")}}},
		"mounts initial: 5 mounted, 0 unmounted, 0 moved, 0 changed": {Initial: true, Mounted: make([]kernstream.Mount, 5)},
		`mounts: +"/a\r\x1b"("fu\nse")`:                              {Mounted: []kernstream.Mount{{MountPoint: "/a\r\x1b", FSType: "fu\nse"}}},
		`mounts: +unreadable row "odd\n"`:                            {Mounted: []kernstream.Mount{{Raw: []byte("odd\n")}}},
	} {
		if got := e.String(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
