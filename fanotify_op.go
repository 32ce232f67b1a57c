package kernstream

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A FileOp is a set of file-system operations, and of what qualifies them: the
// mask of fanotify_mark(2), bit for bit. Bits that have no name here are kept.
//
// The bits of an event are a set, not a sequence: while an event waits in the
// kernel's queue, what the same process does to the same object goes into it.
// A file that was created, written and closed can be one event.
type FileOp uint64

// The operations, with the kernel that brought each where that is not 5.1 or
// older. Those that say so are only for marks of the types that they name.
const (
	OpAccess       FileOp = unix.FAN_ACCESS        // read; of a directory, with OpOnDir: listed
	OpModify       FileOp = unix.FAN_MODIFY        // written; truncate(2) only by way of handles
	OpAttrib       FileOp = unix.FAN_ATTRIB        // mode, owner, times, extended attributes or link count changed; not by mount marks
	OpCloseWrite   FileOp = unix.FAN_CLOSE_WRITE   // closed, was open for writing
	OpCloseNoWrite FileOp = unix.FAN_CLOSE_NOWRITE // closed, was not
	OpOpen         FileOp = unix.FAN_OPEN          // opened
	OpMovedFrom    FileOp = unix.FAN_MOVED_FROM    // an entry left a directory; not by mount marks
	OpMovedTo      FileOp = unix.FAN_MOVED_TO      // an entry came to a directory; not by mount marks
	OpCreate       FileOp = unix.FAN_CREATE        // an entry was made; not by mount marks
	OpDelete       FileOp = unix.FAN_DELETE        // an entry was removed; not by mount marks
	OpDeleteSelf   FileOp = unix.FAN_DELETE_SELF   // the last link was removed and the last user has gone; not by mount marks
	OpMoveSelf     FileOp = unix.FAN_MOVE_SELF     // the file itself was renamed; not by mount marks
	OpOpenExec     FileOp = unix.FAN_OPEN_EXEC     // opened to be executed
	OpFSError      FileOp = unix.FAN_FS_ERROR      // the file system found an error (ext4, since 5.16); only by filesystem marks
	OpRename       FileOp = unix.FAN_RENAME        // renamed, with both paths (5.17); not by mount marks

	OpOpenPerm     FileOp = unix.FAN_OPEN_PERM      // asks whether it may be opened
	OpAccessPerm   FileOp = unix.FAN_ACCESS_PERM    // asks whether it may be read
	OpOpenExecPerm FileOp = unix.FAN_OPEN_EXEC_PERM // asks whether it may be executed
	OpPreAccess    FileOp = unix.FAN_PRE_ACCESS     // asks before a range is accessed (6.14)

	OpOnDir        FileOp = unix.FAN_ONDIR          // in a mark: on directories, too; in an event by way of a handle: it was one
	OpEventOnChild FileOp = unix.FAN_EVENT_ON_CHILD // in an inode mark of a directory: on its entries, too

	OpOverflow FileOp = unix.FAN_Q_OVERFLOW // only in events: the queue was full, and events were lost here

	OpClose = OpCloseWrite | OpCloseNoWrite
	OpMove  = OpMovedFrom | OpMovedTo
)

// opNames are the names of the operations, the kernel's without FAN_. Those of
// mount-namespace groups are the mount table's business.
var opNames = map[FileOp]string{
	OpAccess:       "access",
	OpModify:       "modify",
	OpAttrib:       "attrib",
	OpCloseWrite:   "close_write",
	OpCloseNoWrite: "close_nowrite",
	OpOpen:         "open",
	OpMovedFrom:    "moved_from",
	OpMovedTo:      "moved_to",
	OpCreate:       "create",
	OpDelete:       "delete",
	OpDeleteSelf:   "delete_self",
	OpMoveSelf:     "move_self",
	OpOpenExec:     "open_exec",
	OpOverflow:     "q_overflow",
	OpFSError:      "fs_error",
	OpOpenPerm:     "open_perm",
	OpAccessPerm:   "access_perm",
	OpOpenExecPerm: "open_exec_perm",
	OpPreAccess:    "pre_access",
	OpRename:       "rename",
	OpOnDir:        "ondir",
	OpEventOnChild: "event_on_child",
	opMntAttach:    "mnt_attach",
	opMntDetach:    "mnt_detach",
}

const (
	opMntAttach FileOp = unix.FAN_MNT_ATTACH
	opMntDetach FileOp = unix.FAN_MNT_DETACH

	opPermission = OpOpenPerm | OpAccessPerm | OpOpenExecPerm | OpPreAccess
	opModifiers  = OpOnDir | OpEventOnChild

	// opDescriptor are the operations that a group with descriptors reports,
	// as far as they need no answer.
	opDescriptor = OpAccess | OpModify | OpClose | OpOpen | OpOpenExec | opModifiers

	// opSelf are those that may come without a directory to name the file by.
	opSelf = OpAttrib | OpDeleteSelf | OpMoveSelf | OpFSError

	// opNotMount are those that no mount mark carries.
	opNotMount = OpAttrib | OpMove | OpCreate | OpDelete | OpDeleteSelf | OpMoveSelf | OpRename
)

// Has tells whether all bits of ops are in op.
func (op FileOp) Has(ops FileOp) bool { return op&ops == ops }

// String returns the names of the bits with a | between them:
// "open|close_write". A bit without a name is a number.
func (op FileOp) String() string {
	if op == 0 {
		return "0"
	}
	return strings.Join(op.names(), "|")
}

// names returns the names of the bits, lowest first.
func (op FileOp) names() []string {
	names := make([]string, 0, bits.OnesCount64(uint64(op)))
	for op != 0 {
		bit := op & -op
		op &^= bit
		name, ok := opNames[bit]
		if !ok {
			name = fmt.Sprintf("%#x", uint64(bit))
		}
		names = append(names, name)
	}
	return names
}

// ParseFileOp returns the operations that a list such as "open,close_write"
// names: the names of [FileOp.String], and close and move for both of their
// kind. They are separated by commas or |. A name that is none, and a list
// without any, is an error that says which names there are.
func ParseFileOp(list string) (FileOp, error) {
	var ops FileOp
	for name := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' || r == '|' }) {
		op := opOf(strings.TrimSpace(name))
		if op == 0 {
			return 0, fmt.Errorf("kernstream: %q is no file operation; there are %s", name, strings.Join(allOpNames(), ", "))
		}
		ops |= op
	}
	if ops == 0 {
		return 0, fmt.Errorf("kernstream: %q names no file operation; there are %s", list, strings.Join(allOpNames(), ", "))
	}
	return ops, nil
}

func opOf(name string) FileOp {
	switch name {
	case "close":
		return OpClose
	case "move":
		return OpMove
	}
	for op, n := range opNames {
		if n == name && op&(opMntAttach|opMntDetach) == 0 {
			return op
		}
	}
	return 0
}

func allOpNames() []string {
	var names []string
	for op, name := range opNames {
		if op&(opMntAttach|opMntDetach|OpOverflow) == 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
