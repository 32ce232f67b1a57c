package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

const filesHelp = `Prints what happens to files: to each PATH and, if that is a directory, to its
entries (-type inode), to what is reached through its mount (-type mount), or
to its whole file system (-type filesystem). Its own doings are left out.

Any user may watch inodes that he can read. Everything else, and which process
it was, needs CAP_SYS_ADMIN; the paths of a whole mount or file system, and of
directories in a directory, need CAP_DAC_READ_SEARCH, too.

A line that says q_overflow stands for events that were lost, because they came
faster than they were printed.

examples:
  kernstream files /etc
        what happens to the entries of /etc
  kernstream files -type filesystem -events create,delete,rename,ondir /home
        what comes and goes on the whole file system of /home
  kernstream files -type mount -events open_exec -json /usr | jq -r .path
        which programs of /usr are started
  kernstream files -pid 4711 -type mount -events close_write /
        what process 4711 and its like write, of a container for example
`

// What is watched if nobody says otherwise.
const (
	entryEvents   = "open,modify,attrib,close_write,create,delete,rename,ondir"
	contentEvents = "open,modify,close_write" // what a mount mark carries, and a descriptor
)

func files(ctx context.Context, env *environment, args []string) error {
	flags, common := newFlags(env, "files", "[flags] PATH...", filesHelp)
	pid := flags.Int("pid", 0, "take each PATH as the process `P` sees it")
	kind := flags.String("type", "inode", "what to watch of PATH, a `TYPE`: inode, mount or filesystem")
	events := flags.String("events", "", "watch for these `EVENTS` (default "+entryEvents+"; of a mount or with -fd "+contentEvents+")")
	descriptors := flags.Bool("fd", false, "let the kernel open each file, which works on every file system")
	ctx, cancel, err := common.parse(ctx, env, flags, args)
	if err != nil {
		return err
	}
	defer cancel()
	typ, known := markTypes[*kind]
	if *events == "" {
		*events = entryEvents
		if typ == kernstream.MarkMount || *descriptors {
			*events = contentEvents
		}
	}
	ops, err := kernstream.ParseFileOp(*events)
	late := lateFlag(flags)
	switch {
	case !known:
		return wrongUsage(flags, "-type is %q; want inode, mount or filesystem", *kind)
	case err != nil:
		return wrongUsage(flags, "-events: %v", err)
	case ops&^watchable != 0:
		return wrongUsage(flags, "-events: %v would have to be answered", ops&^watchable)
	case *pid < 0:
		return wrongUsage(flags, "-pid must not be negative")
	case flags.NArg() == 0:
		return wrongUsage(flags, "no PATH to watch")
	case late != "":
		return wrongUsage(flags, "flags come before the first PATH: %s (a file of that name is ./%[1]s)", late)
	}
	var marks []kernstream.Mark
	for _, path := range flags.Args() {
		marks = append(marks, newMark(typ, ops, *pid, path))
	}

	watcher, err := kernstream.WatchFiles(ctx, &kernstream.FileOptions{Descriptors: *descriptors}, marks...)
	if err != nil {
		return err
	}
	defer watcher.Close()
	print := newFilePrinter(env, common.json)
	n := 0
	for event := range watcher.C {
		event.Close()
		if event.PID == os.Getpid() {
			continue
		}
		n++
		last := n == common.n
		if err := print(event, last || len(watcher.C) == 0); err != nil {
			return err
		}
		if last {
			return nil
		}
	}
	return watcher.Err()
}

var markTypes = map[string]kernstream.MarkType{
	kernstream.MarkInode.String():      kernstream.MarkInode,
	kernstream.MarkMount.String():      kernstream.MarkMount,
	kernstream.MarkFilesystem.String(): kernstream.MarkFilesystem,
}

// newMark marks path, as the process pid sees it, and the entries of a
// directory.
func newMark(typ kernstream.MarkType, ops kernstream.FileOp, pid int, path string) kernstream.Mark {
	if pid != 0 {
		path = filepath.Join("/proc", strconv.Itoa(pid), "root", path)
	}
	if typ == kernstream.MarkInode {
		var st unix.Stat_t
		directory := unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
		if directory {
			ops |= kernstream.OpEventOnChild
		} else {
			// These are of directories only.
			ops &^= kernstream.OpCreate | kernstream.OpDelete | kernstream.OpMove | kernstream.OpRename | kernstream.OpOnDir
		}
	}
	return kernstream.Mark{Type: typ, Path: path, Ops: ops}
}

// newFilePrinter returns a function that prints an event. Lines for people are
// flushed when no other event waits.
func newFilePrinter(env *environment, json bool) func(e *kernstream.FileEvent, flush bool) error {
	if json {
		return func(e *kernstream.FileEvent, _ bool) error { return printJSON(env.stdout, e) }
	}
	p := &filePrinter{out: bufio.NewWriterSize(env.stdout, 1<<16), color: env.color}
	p.columns.limits = []int{30, 8}
	return p.print
}

// filePrinter prints events for people, a line each: what happened, which
// process it was, and to what.
type filePrinter struct {
	out     *bufio.Writer
	color   bool
	columns columns
}

func (p *filePrinter) print(e *kernstream.FileEvent, flush bool) error {
	pid := "-"
	if e.PID != 0 {
		pid = strconv.Itoa(e.PID)
	}
	line := p.columns.line(strings.ReplaceAll(e.Ops.String(), "|", ","), pid, filePath(e))
	if color := fileColor(e); p.color && color != colorNone {
		line = color + line + colorReset
	}
	p.out.WriteString(line)
	if err := p.out.WriteByte('\n'); err != nil || !flush {
		return err
	}
	return p.out.Flush()
}

// filePath is what happened to, and what is to be said about that.
func filePath(e *kernstream.FileEvent) string {
	var parts []string
	if e.Ops.Has(kernstream.OpRename) {
		parts = append(parts, readableOr(e.OldPath, "?"), "->")
	}
	switch {
	case e.Ops.Has(kernstream.OpOverflow):
		return "events were lost here"
	case e.Path != "" || e.Ops.Has(kernstream.OpRename):
		parts = append(parts, readableOr(e.Path, "?"))
	}
	if e.PathState != kernstream.PathExact && !e.Ops.Has(kernstream.OpRename) {
		parts = append(parts, "("+strings.ReplaceAll(e.PathState.String(), "_", " ")+")")
	}
	if e.Errno != 0 {
		parts = append(parts, fmt.Sprintf("%v, %d times", e.Errno, e.Count))
	}
	if e.Err != nil {
		parts = append(parts, e.Err.Error())
	}
	return strings.Join(parts, " ")
}

func readableOr(path, none string) string {
	if path == "" {
		return none
	}
	return readable(path)
}

func fileColor(e *kernstream.FileEvent) string {
	switch {
	case e.Ops.Has(kernstream.OpOverflow), e.Err != nil, e.Ops.Has(kernstream.OpFSError):
		return colorRed
	case e.Ops&(kernstream.OpDelete|kernstream.OpDeleteSelf) != 0:
		return colorRed
	case e.Ops&(kernstream.OpRename|kernstream.OpMove) != 0:
		return colorCyan
	case e.Ops&kernstream.OpCreate != 0:
		return colorGreen
	case e.Ops&(kernstream.OpModify|kernstream.OpCloseWrite|kernstream.OpAttrib) != 0:
		return colorYellow
	}
	return colorNone
}
