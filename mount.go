package kernstream

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kernstream/kernstream/internal/procfs"
)

// The mount table of a mount namespace, once and as a stream of changes.
//
// What needs which kernel: everything works from Linux 5.10 on and for any user
// who can open the /proc/PID/mountinfo in question. Unique IDs need Linux 6.8
// (listmount(2)), those of another namespace 6.11 and CAP_SYS_ADMIN over it.
// From Linux 6.15 on (6.16 in a user namespace), with CAP_SYS_ADMIN in the user
// namespace that owns the mount namespace, fanotify(7) names the mounts that
// change, and an event costs the same however many mounts there are.
//
// Nothing here touches a mount point (no stat, statfs or open), so a file
// system that hangs does not stop a watcher.

// A Mount is one mount, as a row of /proc/PID/mountinfo describes it (see
// proc_pid_mountinfo(5)).
//
// Its strings are the kernel's bytes, in no certain encoding. Root, MountPoint,
// FSType and FSSource are decoded; Options and SuperOptions keep the octal
// escapes of the kernel and are taken apart by [SplitOptions].
type Mount struct {
	ID       uint64 // unique since boot (Linux 6.8); 0: not known
	ParentID uint64 // of the mount that this one is mounted on, which need not be in the table; 0: not known

	MountInfoID       uint32 // given to another mount when this one is gone
	MountInfoParentID uint32 // of the mount that this one is mounted on
	Major, Minor      uint32 // the device of its files, st_dev in stat(2)

	Root         string   // what of the file system is its root: "/", or a directory or file of a bind mount
	MountPoint   string   // relative to the root directory of the process
	Options      string   // of this mount: "rw,nosuid,relatime"
	Optional     []string // propagation: "shared:1", "master:2", "propagate_from:3", "unbindable"
	FSType       string   // "ext4", "fuse.sshfs"
	FSSource     string   // "/dev/sda1", "tmpfs", ""
	SuperOptions string   // of the file system: "rw,size=1024k"

	// Raw is set for a row that could not be read, and is that row.
	// MountInfoID is then set if the row shows one, the unique IDs if they are
	// known, and nothing else is.
	Raw []byte
}

// A MountChange is a mount before and after something about it changed.
type MountChange struct {
	Old Mount // as it was told last
	New Mount // as it is
}

// A MountEvent is how a mount table changed. Who keeps a table gets the next
// one by applying Unmounted, Moved, Changed and Mounted in this order, whatever
// flags are set.
//
// A mount is known by its ID; only where that is 0 by its MountInfoID, which
// Unmounted gives back before another mount of the event has it. A mount is in
// one list only: in Moved if its mount point or its parent differs, in Changed
// if anything else does. When a mount moves, those below it are in Moved, too.
// Mounted, Moved and Changed list older mounts first; Unmounted lists them
// last. What came and went within one event is not reported. What one system
// call does to many mounts may be told in several events.
//
// The lists belong to the consumer. What the mounts in them refer to (Optional
// and Raw) is shared, and must not be changed.
type MountEvent struct {
	When time.Time // of reading it

	Initial   bool // the first event, whose Mounted is the whole table
	Coalesced bool // two or more changes of the table in one: held by MountOptions.Coalesce, or for a slow consumer
	Resync    bool // (some of) it was found by a rescan, and may have happened before

	Via MountVia // how it was found out

	Mounted   []Mount       // what is there and was not
	Unmounted []Mount       // what was there and is not, as it was
	Moved     []MountChange // what is elsewhere, or has something else below it
	Changed   []MountChange // what is different in any other way
}

// A MountVia is a way to follow a mount table. Both tell the same story; how soon
// is said where they are.
type MountVia int

const (
	// ViaAuto is ViaFanotify where that works, and ViaMountinfo otherwise.
	ViaAuto MountVia = iota

	// ViaMountinfo reads /proc/PID/mountinfo again after each change, which
	// takes some 2 µs per mount. It works everywhere.
	ViaMountinfo

	// ViaFanotify lets the kernel name the mounts that come, go and move
	// (FAN_MARK_MNTNS in fanotify_mark(2)), and asks statmount(2) for those. It needs
	// Linux 6.15, CAP_SYS_ADMIN in the user namespace that owns the mount
	// namespace (before 6.16 in the initial one), one of the 128 fanotify groups
	// that a user may have (/proc/sys/fs/fanotify/max_user_groups), and for the
	// table of another process the right to trace it (ptrace(2)) and that its
	// root directory is that of its namespace, or the caller's.
	//
	// Changes of options and propagation are not told that way. In the caller's
	// namespace one that comes alone is found as soon as all mounts were looked
	// at, some 2 µs for each, and one that comes within a second of a mount,
	// unmount or move may be found a second later, and has Resync. In another
	// namespace all are found that way, except of propagate_from, which the
	// kernel does not tell there. Such looks are at least 30 times as far apart
	// as the last one took, so where there is always something to look for, and in
	// other namespaces, they take up to a thirtieth of a processor.
	ViaFanotify
)

// String returns "auto", "mountinfo" or "fanotify".
func (v MountVia) String() string {
	switch v {
	case ViaAuto:
		return "auto"
	case ViaMountinfo:
		return "mountinfo"
	case ViaFanotify:
		return "fanotify"
	}
	return "unknown"
}

// MountOptions says which mount table, and how to report its changes. The zero
// value is the table of the caller, each change as soon as it is read. [Mounts]
// uses PID, Namespace and Filter.
type MountOptions struct {
	// PID is a process in whose mount namespace, and relative to whose root
	// directory, the table is. 0 is the caller: the thread that calls, if that
	// has a namespace or root of its own. The table is the one that the process
	// has at the time of the call: a later chroot(2) or setns(2) of the process
	// does not count, but the first pivot_root(2) after it shows where it has
	// its root then. Of the caller a chroot counts from the next change on.
	// Any user may read it as long as /proc shows the process.
	PID int

	// Namespace is an open /proc/PID/ns/mnt, or a file that one was bound
	// to. It stays the caller's, and may be closed when the call returns. It
	// needs CAP_SYS_ADMIN over the namespace and CAP_SYS_CHROOT (see setns(2)).
	// PID must be 0.
	Namespace *os.File

	// Filter tells which mounts to report. A mount that changes so that it
	// does not pass any more is reported as unmounted, one that changes so
	// that it does as mounted. It is called once for each state of a mount: by
	// Mounts and WatchMounts for the first table, and on the library's goroutine
	// from then on. It must not block, nor wait for the stream (as Close does),
	// nor change the mount.
	Filter func(*Mount) bool

	// NoInitial leaves out the first event, which has the whole table.
	NoInitial bool

	// Rescan is how often to look for changes that the kernel tells nobody
	// about. 0 is never; [MountWatcher.Rescan] does it once. They are: changes
	// of propagation by mount(2), reconfiguration by fsconfig(2), a remount
	// in another mount namespace, a file system that turns read-only after an
	// error, renaming a directory above a mount point, and deleting what a bind
	// mount shows. A rescan costs about as much as [Mounts].
	Rescan time.Duration

	// Coalesce is asked how long to hold a change back, so that those which
	// follow become one event with it. It is called for the change that opens
	// such a window, not for those that follow, and never for the initial
	// event. 0 delivers it at once. Otherwise it is delivered when nothing has
	// changed for as long as Coalesce said, or when the window is MaxDelay old.
	// The last state always arrives. Coalesce is called on the library's
	// goroutine; it must not block, nor wait for the stream (as Close does), nor
	// keep the event.
	Coalesce func(*MountEvent) time.Duration

	// MaxDelay bounds a window, however long changes go on. 0 is one second,
	// or what Coalesce said, if that is more.
	MaxDelay time.Duration

	// Via asks for one way to follow the table. The constructor fails if that
	// does not work here, with an error that Is errors.ErrUnsupported if it
	// never will.
	Via MountVia
}

// defaultMaxDelay is what MountOptions.MaxDelay means when it is 0.
const defaultMaxDelay = time.Second

// CoalesceFor returns a function for [MountOptions.Coalesce] that always
// answers d.
func CoalesceFor(d time.Duration) func(*MountEvent) time.Duration {
	return func(*MountEvent) time.Duration { return d }
}

// SplitOptions splits [Mount.Options] or [Mount.SuperOptions] at the commas and
// decodes the octal escapes of each part, in which a comma may be one. A value
// in double quotes (an SELinux context with commas) is one part, and loses them.
func SplitOptions(options string) []string {
	var list []string
	for options != "" {
		var option string
		key, value, quoted := strings.Cut(options, `="`)
		if end := strings.IndexByte(value, '"'); quoted && end >= 0 && !strings.Contains(key, ",") &&
			(end == len(value)-1 || value[end+1] == ',') {
			option = key + "=" + value[:end]
			options = strings.TrimPrefix(value[end+1:], ",")
		} else {
			option, options, _ = strings.Cut(options, ",")
		}
		list = append(list, procfs.Unescape(option))
	}
	return list
}

// Mounts returns the mount table: one state of it that was, as long as there is
// a moment between two changes in which it can be read. While there is none,
// mounts that stay are in the result exactly once, and those that come or go
// may or may not be.
//
// It reads /proc/PID/mountinfo: some 2 µs per mount, nearly all of which the
// kernel needs to write the text, and takes the unique IDs from listmount(2), where
// there is one. Options may be nil. The error is an
// *[OpError]; it Is os.ErrProcessDone when the process of [MountOptions.PID] is
// gone or a zombie, and fs.ErrPermission when a privilege is missing.
func Mounts(options *MountOptions) ([]Mount, error) {
	if options == nil {
		options = &MountOptions{}
	}
	target, err := newMountTarget(options)
	if err != nil {
		return nil, err
	}
	defer target.close()
	var mounts []Mount
	ordinarily(func() { mounts, err = target.read(options.Filter) })
	return mounts, err
}

// A MountWatcher is a stream of the changes of one mount table.
type MountWatcher struct {
	*Stream[*MountEvent]
	rescan chan struct{}
}

// WatchMounts follows a mount table until ctx is done. The first event has the
// whole table, unless [MountOptions.NoInitial] is set. The table is read before
// WatchMounts returns, and no change after that is missed.
//
// A slow consumer loses no change, but the steps in between: what happens while
// an event waits to be received is merged into it. If so much happens while the
// watcher cannot run that the kernel's queue of events overflows (16,384 by
// default), the whole table is looked at, and the event has Resync.
//
// What an event costs, and how soon it comes, depends on the way, see
// [MountVia]. By fanotify it is some 0.1 ms of a processor; in a storm of
// mounts events are read every 5 ms. By mountinfo it is what reading the table
// costs (see [Mounts]); under changes without pause the watcher reads half of
// the time, and an event comes later by as long as a read takes. While nothing
// changes, it costs two or three goroutines, one more with a PID, and in the
// caller's namespace no time.
//
// The stream ends with a nil Err when the process of [MountOptions.PID] ends,
// and of a namespace file by fanotify when the namespace does, or has no root
// any more, after the last mounts were reported as unmounted. By mountinfo it
// keeps the namespace alive until it is closed or the process ends. While it
// runs, it holds open files in /proc, which is busy therefore, and which refer
// to the root directory: the old root of a pivot_root(2) is busy until the
// watcher has seen that.
//
// Options may be nil. Errors are those of [Mounts], and EMFILE or ENFILE when
// descriptors have run out; it takes up to four. If the way that
// [MountOptions.Via] asks for is not there, the error says what is missing.
// The error of a stream is one of the system calls that it needs, and
// Is errors.ErrUnsupported if this process changes its root directory while it
// follows another one's table by fanotify.
func WatchMounts(ctx context.Context, options *MountOptions) (*MountWatcher, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if options == nil {
		options = &MountOptions{}
	}
	w := &MountWatcher{rescan: make(chan struct{}, 1)}
	loop, err := beginMountLoop(ctx, options, w.rescan)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	w.Stream = newStream(ctx, 0, func(ctx context.Context, r *run[*MountEvent]) error {
		return loop.run(ctx, r.c)
	})
	return w, nil
}

// beginMountLoop makes the source that options ask for, and a loop over it that
// has begun.
func beginMountLoop(ctx context.Context, options *MountOptions, rescan <-chan struct{}) (loop *mountLoop, err error) {
	if options.Via < ViaAuto || options.Via > ViaFanotify {
		return nil, mountError("watch", "", fmt.Errorf("unknown MountVia %d", options.Via))
	}
	target, err := newMountTarget(options)
	if err != nil {
		return nil, err
	}
	ordinarily(func() {
		var source mountSource
		if source, err = newMountSource(ctx, target, options); err == nil {
			loop = newMountLoop(options, source, rescan)
			err = loop.begin(ctx)
		}
	})
	return loop, err
}

// Rescan makes the watcher look at the whole table soon, also for changes that
// the kernel tells nobody about (see [MountOptions.Rescan]). If there are any,
// an event with Resync follows. It does not wait, and may be called at any
// time, after the end of the stream, too.
func (w *MountWatcher) Rescan() {
	select {
	case w.rescan <- struct{}{}:
	default: // one that has not begun is pending
	}
}
