package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kernstream/kernstream"
)

const mountsHelp = `Prints the mount table, and then every change of it, until it is interrupted.
The marks are + mounted, - unmounted, > moved, ~ changed. The table does not
count for -n. Any user may run it.

A few changes wake nobody, such as propagation that is changed by mount(2):
-rescan finds them. With -json, each line has the lists mounted, unmounted,
moved and changed, with all fields of the mounts.

examples:
  kernstream mounts -initial=false
        what is mounted and unmounted from here on
  kernstream mounts -once -json | jq -r '.mounted[] | select(.fs_type == "nfs4") | .mount_point'
        the mount points of all NFS mounts
  kernstream mounts -pid 4711 -rescan 10s
        those that process 4711 sees, of a container for example
  kernstream mounts -coalesce 200ms -initial=false -n 1 -timeout 1m
        wait for the next change, and for what comes with it
`

// mountVias are the ways that -via takes.
var mountVias = []kernstream.MountVia{kernstream.ViaAuto, kernstream.ViaFanotify, kernstream.ViaMountinfo}

func mounts(ctx context.Context, env *environment, args []string) error {
	flags, common := newFlags(env, "mounts", "[flags]", mountsHelp)
	once := flags.Bool("once", false, "print the mount table and stop")
	pid := flags.Int("pid", 0, "print the table of the process `P` instead of the own")
	coalesce := flags.Duration("coalesce", 0, "join changes that follow each other within this time")
	initial := flags.Bool("initial", true, "print the whole table first")
	rescan := flags.Duration("rescan", 0, "look this often for changes that the kernel does not tell of")
	via := flags.String("via", "auto", "follow the table this `WAY`: auto, fanotify or mountinfo")
	ctx, cancel, err := common.parse(ctx, env, flags, args)
	if err != nil {
		return err
	}
	defer cancel()
	options := &kernstream.MountOptions{PID: *pid, NoInitial: !*initial, Rescan: *rescan}
	way := slices.IndexFunc(mountVias, func(way kernstream.MountVia) bool { return way.String() == *via })
	switch {
	case flags.NArg() > 0:
		return wrongUsage(flags, "unexpected argument %q", flags.Arg(0))
	case *pid < 0:
		return wrongUsage(flags, "-pid must not be negative")
	case *coalesce < 0 || *rescan < 0:
		return wrongUsage(flags, "a time must not be negative")
	case *once && !*initial:
		return wrongUsage(flags, "-once prints the initial event, which -initial=false leaves out")
	case way < 0:
		return wrongUsage(flags, "-via is %q; want auto, fanotify or mountinfo", *via)
	}
	options.Via = mountVias[way]
	if *coalesce > 0 {
		options.Coalesce = kernstream.CoalesceFor(*coalesce)
	}

	watcher, err := kernstream.WatchMounts(ctx, options)
	if err != nil {
		return err
	}
	defer watcher.Close()
	print := newMountPrinter(env, common.json)
	n := 0
	for event := range watcher.C {
		if err := print(event); err != nil {
			return err
		}
		if event.Initial {
			if *once {
				return nil
			}
			continue
		}
		if n++; n == common.n {
			return nil
		}
	}
	return watcher.Err()
}

// newMountPrinter returns a function that prints an event, flushed.
func newMountPrinter(env *environment, json bool) func(*kernstream.MountEvent) error {
	if json {
		return func(e *kernstream.MountEvent) error { return printJSON(env.stdout, e) }
	}
	p := &mountPrinter{out: bufio.NewWriter(env.stdout), color: env.color}
	p.columns.limits = []int{36, 10, 16}
	return p.print
}

// printJSON prints an event of any kind as one line.
func printJSON(out io.Writer, event interface{ MarshalJSON() ([]byte, error) }) error {
	line, err := event.MarshalJSON()
	if err != nil {
		return err
	}
	_, err = out.Write(append(line, '\n'))
	return err
}

// mountPrinter prints events for people, a line for each mount: mark, mount
// point, type, source, and options or what changed.
type mountPrinter struct {
	out     *bufio.Writer
	color   bool
	columns columns
}

func (p *mountPrinter) print(e *kernstream.MountEvent) error {
	if e.Initial {
		for i := range e.Mounted {
			p.columns.fit(mountFields(&e.Mounted[i])...)
		}
	}
	note := ""
	switch {
	case e.Resync && e.Coalesced:
		note = " (coalesced, resync)"
	case e.Resync:
		note = " (resync)"
	case e.Coalesced && !e.Initial:
		note = " (coalesced)"
	}
	for i := range e.Unmounted {
		p.line(colorRed, "-", mountFields(&e.Unmounted[i]), note)
	}
	for i := range e.Moved {
		c := &e.Moved[i]
		fields := mountFields(&c.New)
		if c.Old.MountPoint != c.New.MountPoint {
			fields[0] = readable(c.Old.MountPoint) + " -> " + fields[0]
		}
		if parts := difference(&c.Old, &c.New); parts != "" {
			fields[len(fields)-1] = parts
		}
		p.line(colorCyan, ">", fields, note)
	}
	for i := range e.Changed {
		c := &e.Changed[i]
		fields := mountFields(&c.New)
		fields[len(fields)-1] = difference(&c.Old, &c.New)
		p.line(colorYellow, "~", fields, note)
	}
	for i := range e.Mounted {
		color := colorGreen
		if e.Initial {
			color = colorNone
		}
		p.line(color, "+", mountFields(&e.Mounted[i]), note)
	}
	return p.out.Flush()
}

func (p *mountPrinter) line(color, mark string, fields []string, note string) {
	if p.color && color != colorNone {
		mark = color + mark + colorReset
	}
	fmt.Fprintf(p.out, "%s %s%s\n", mark, p.columns.line(fields...), note)
}

// mountFields are the columns of a mount; the last one is its options.
func mountFields(m *kernstream.Mount) []string {
	if m.Raw != nil {
		return []string{"?", "?", "?", "unreadable row " + readable(string(m.Raw))}
	}
	options := m.Options
	// The options of the file system repeat rw and ro.
	if super := strings.TrimPrefix(strings.TrimPrefix(m.SuperOptions, "rw"), "ro"); super != "" {
		options += " " + strings.TrimPrefix(super, ",")
	}
	if len(m.Optional) > 0 {
		options += " " + strings.Join(m.Optional, " ")
	}
	return []string{readable(m.MountPoint), readable(m.FSType), readable(m.FSSource), printable(options)}
}

// printable is readable for a text that has spaces by right.
func printable(s string) string {
	words := strings.Split(s, " ")
	for i, word := range words {
		words[i] = readable(word)
	}
	return strings.Join(words, " ")
}

// difference says what about a mount changed, except its mount point.
func difference(old, new *kernstream.Mount) string {
	var parts []string
	for _, field := range []struct{ name, old, new string }{
		{"parent", fmt.Sprint(old.MountInfoParentID), fmt.Sprint(new.MountInfoParentID)},
		{"root", readable(old.Root), readable(new.Root)},
		{"source", readable(old.FSSource), readable(new.FSSource)},
		{"options", printable(old.Options), printable(new.Options)},
		{"super", printable(old.SuperOptions), printable(new.SuperOptions)},
		{"propagation", propagation(old), propagation(new)},
		{"row", printable(string(old.Raw)), printable(string(new.Raw))},
	} {
		if field.old != field.new {
			parts = append(parts, field.name+": "+field.old+" -> "+field.new)
		}
	}
	return strings.Join(parts, ", ")
}

func propagation(m *kernstream.Mount) string {
	if len(m.Optional) == 0 {
		return "private"
	}
	return printable(strings.Join(m.Optional, " "))
}
