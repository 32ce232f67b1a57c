// Command mountguard keeps directories mounted where they belong, as the node
// plugin of a storage driver does (CSI):
//
//	mountguard /srv/volume /var/lib/app/data
//
// Each SOURCE is bind-mounted on its TARGET. When somebody unmounts that, it is
// mounted again; when it turns read-only, or something else is mounted on top
// of it, that is said. The mounts stay when mountguard ends, and a guard that
// is started again takes them over.
//
// It is an example of following the mount table: a filter, so that the mounts
// of everybody else cost nothing, a table that is kept by applying events, and
// a look at that table, and not at the single event, to decide what to do.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

func main() {
	flag.Usage = func() { fmt.Fprintln(os.Stderr, "usage: mountguard SOURCE TARGET [SOURCE TARGET]...") }
	flag.Parse()
	if flag.NArg() == 0 || flag.NArg()%2 != 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "mountguard:", err)
		os.Exit(1)
	}
}

// retry is how long it waits before it looks again at what is not settled. What
// was mounted and is gone again may never be an event.
const retry = 2 * time.Second

// run guards until ctx is done.
func run(ctx context.Context, out io.Writer, pairs []string) error {
	g := guard{out: out, table: map[uint32]kernstream.Mount{}}
	for pair := range slices.Chunk(pairs, 2) {
		v, err := newVolume(pair[0], pair[1])
		if err != nil {
			return err
		}
		g.volumes = append(g.volumes, v)
	}
	w, err := kernstream.WatchMounts(ctx, &kernstream.MountOptions{Filter: g.concerns})
	if err != nil {
		return err
	}
	defer w.Close()
	var again <-chan time.Time
	for {
		select {
		case e, ok := <-w.C:
			if !ok {
				if err := w.Err(); !errors.Is(err, context.Cause(ctx)) {
					return err
				}
				return nil // Ctrl-C
			}
			g.apply(e)
		case <-again:
		}
		again = nil
		if settled := g.look(); !settled {
			again = time.After(retry)
		}
	}
}

// A volume is a directory that is to be mounted somewhere.
type volume struct {
	source, target string
	major, minor   uint32 // of the source's file system
	said           string // what was said of it last
}

func newVolume(source, target string) (*volume, error) {
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: source, Err: err}
	}
	// The table has no symbolic links in it.
	target, err := filepath.Abs(target)
	if err == nil {
		target, err = filepath.EvalSymlinks(target)
	}
	return &volume{source: source, target: target, major: unix.Major(st.Dev), minor: unix.Minor(st.Dev)}, err
}

type guard struct {
	out     io.Writer
	volumes []*volume
	table   map[uint32]kernstream.Mount // what is mounted on the targets
}

// concerns is the filter: nothing but what is on the targets.
func (g *guard) concerns(m *kernstream.Mount) bool {
	return slices.ContainsFunc(g.volumes, func(v *volume) bool { return v.target == m.MountPoint })
}

// apply keeps the table. The order matters: an ID can be given away again
// within one event.
func (g *guard) apply(e *kernstream.MountEvent) {
	for _, m := range e.Unmounted {
		delete(g.table, m.MountInfoID)
	}
	for _, c := range slices.Concat(e.Moved, e.Changed) {
		g.table[c.New.MountInfoID] = c.New
	}
	for _, m := range e.Mounted {
		g.table[m.MountInfoID] = m
	}
}

// look makes what is so what should be, and tells whether that is settled.
func (g *guard) look() bool {
	settled := true
	for _, v := range g.volumes {
		ours, others := g.on(v)
		switch {
		case ours == nil && len(others) > 0:
			g.say(v, "occupied by "+others[0].FSType)
		case ours == nil:
			settled = false
			if err := v.mount(); err != nil {
				g.say(v, "cannot be mounted: "+err.Error())
			} else {
				v.said = "" // the event of that mount is to be said, again
			}
		case len(others) > 0:
			g.say(v, "covered by "+others[0].FSType)
		case slices.Contains(kernstream.SplitOptions(ours.Options), "ro"):
			g.say(v, "read-only")
		default:
			g.say(v, "mounted")
		}
	}
	return settled
}

// mount mounts a volume, unless something is mounted there: the table is of the
// last event, and what was done since is in one that is to come.
func (v *volume) mount() error {
	there, err := kernstream.Mounts(&kernstream.MountOptions{
		Filter: func(m *kernstream.Mount) bool { return m.MountPoint == v.target },
	})
	if err != nil || len(there) > 0 {
		return err
	}
	return unix.Mount(v.source, v.target, "", unix.MS_BIND, "")
}

// on returns the mount of a volume, and what else is mounted on its target.
func (g *guard) on(v *volume) (ours *kernstream.Mount, others []kernstream.Mount) {
	for _, m := range g.table {
		switch {
		case m.MountPoint != v.target:
		case m.Major == v.major && m.Minor == v.minor:
			ours = &m
		default:
			others = append(others, m)
		}
	}
	return ours, others
}

// say says what is new of a volume.
func (g *guard) say(v *volume, what string) {
	if v.said != what {
		v.said = what
		fmt.Fprintln(g.out, strings.Join([]string{v.target, what}, ": "))
	}
}
