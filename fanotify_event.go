package kernstream

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/jsontext"
)

// A FileEvent is something that happened to a file or directory.
//
// Only an event that owns a descriptor has to be closed: with
// [FileOptions.Descriptors] or [FileOptions.ReportPidFD], and every permission
// event. Close is legal on every other, too.
type FileEvent struct {
	When time.Time // of reading it
	Ops  FileOp    // what happened: a set

	// Path is what it happened to, as seen from the root directory of this
	// process, and OldPath where that was before, if Ops has OpRename. Which of
	// the two is known depends on the marks: an inode mark of a directory sees
	// only one side of a rename into or out of it. Paths are the kernel's bytes,
	// in no certain encoding. PathState says how far Path is to be trusted;
	// OldPath is one that the file had, or empty.
	//
	// The name within the directory is that of the event: of a file that was
	// removed while it was open, the one that it had.
	Path      string
	OldPath   string
	PathState PathState

	Via FileVia // which kind of group it came from

	// PID is the process that did it, and TID, with FileOptions.ReportTID, the
	// thread instead. 0: it is not in the process ID namespace of this
	// process, or this process lacks the privilege to know (CAP_SYS_ADMIN), or
	// the event is not of a process.
	PID int
	TID int

	Offset uint64 // with OpPreAccess: where the range begins that is to be accessed, in bytes
	Length uint64 // with OpPreAccess: its length; the kernel names whole pages

	Errno syscall.Errno // with OpFSError: the first error of the file system since the last event
	Count uint32        // with OpFSError: how many there were

	// Err says what went wrong with this event alone: its descriptor could not
	// be opened, its path not be resolved, or its records not be read. It is an
	// *OpError. What else is set is valid.
	Err error

	own *fileDescriptors // nil: it owns none
}

// A PathState says what the Path of a [FileEvent] is worth.
type PathState uint8

const (
	// PathUnknown: there is no path, or just the name of the entry.
	PathUnknown PathState = iota
	// PathExact: it was the path at some instant between the event and its
	// delivery.
	PathExact
	// PathDeleted: the file, or the directory that it was in, has been
	// removed. The path is the last one that it is known to have had, or just
	// the name of the entry.
	PathDeleted
	// PathOutside: the file is in a part of its file system that no mount which
	// this process can see shows. The path is just the name of the entry.
	PathOutside
	// PathOtherNamespace: the file was reached through a mount of another
	// mount namespace, and the path is relative to the root of that mount: what
	// a container sees, if the mount is its root.
	PathOtherNamespace
)

// String returns "unknown", "exact", "deleted", "outside" or
// "other_namespace".
func (s PathState) String() string {
	switch s {
	case PathUnknown:
		return "unknown"
	case PathExact:
		return "exact"
	case PathDeleted:
		return "deleted"
	case PathOutside:
		return "outside"
	case PathOtherNamespace:
		return "other_namespace"
	}
	return fmt.Sprintf("PathState(%d)", uint8(s))
}

// A FileVia is the kind of fanotify group that an event came from. Events of
// one kind are in the kernel's order; between the two there is none.
type FileVia uint8

const (
	ViaHandle     FileVia = iota // the kernel named a directory by its handle, and an entry
	ViaDescriptor                // the kernel opened the file
)

// String returns "handle" or "descriptor".
func (v FileVia) String() string {
	switch v {
	case ViaHandle:
		return "handle"
	case ViaDescriptor:
		return "descriptor"
	}
	return fmt.Sprintf("FileVia(%d)", uint8(v))
}

// fileDescriptors are the descriptors that an event owns.
type fileDescriptors struct {
	mu    sync.Mutex
	fd    int      // of the file; -1: none, or given away
	file  *os.File // for fd, or of an event that asks a copy of it; made when it is asked for
	pidfd int      // of the process; -1: none

	pidfdErr error // why there is no pidfd
	detached bool  // file is the caller's

	// These are set before the event is delivered.
	asks    *permission // nil: it is no question
	counted bool        // they count in an access list until the event is delivered
}

// Time returns e.When.
func (e *FileEvent) Time() time.Time { return e.When }

// FD returns the descriptor of the file, which is the event's and open until
// Close, and -1 if it has none. Reading and writing it makes no events; opening
// it again through /proc/self/fd does. It must not be closed: the kernel knows a
// permission event by this number.
func (e *FileEvent) FD() int {
	if e.own == nil {
		return -1
	}
	e.own.mu.Lock()
	defer e.own.mu.Unlock()
	if e.own.detached {
		return -1
	}
	return e.own.fd
}

// File returns the file, which is the event's and open until Close, and nil if
// it has none. Of a permission event, its descriptor is another one than FD, so
// that closing it does no harm; nil then may also mean that there was none left.
func (e *FileEvent) File() *os.File {
	if e.own == nil {
		return nil
	}
	e.own.mu.Lock()
	defer e.own.mu.Unlock()
	file, _ := e.openFile()
	return file
}

func (e *FileEvent) openFile() (*os.File, error) {
	switch {
	case e.own.detached || e.own.fd < 0:
		return nil, os.ErrClosed
	case e.own.file != nil:
		return e.own.file, nil
	}
	fd := e.own.fd
	if e.own.asks != nil {
		// Who closes it must not close the descriptor that the kernel knows the
		// event by.
		var err error
		if fd, err = duplicate(uintptr(fd)); err != nil {
			return nil, withLimit(err)
		}
	}
	e.own.file = os.NewFile(uintptr(fd), e.Path)
	return e.own.file, nil
}

// question returns what the event asks; nil: nothing.
func (e *FileEvent) question() *permission {
	if e.own == nil {
		return nil
	}
	return e.own.asks
}

// disown notes that the event has no descriptors.
func (e *FileEvent) disown() {
	if e.own.pidfd < 0 && e.own.pidfdErr == nil {
		e.own = nil
	}
}

// Detach returns the file, which is the caller's from then on; a permission
// event has to be answered and closed all the same. The error Is
// os.ErrClosed if the event is closed or was detached from, and
// errors.ErrUnsupported if it never had one.
func (e *FileEvent) Detach() (*os.File, error) {
	if e.own == nil {
		return nil, e.failed("detach", fmt.Errorf("the event has no descriptor: %w", errors.ErrUnsupported))
	}
	e.own.mu.Lock()
	defer e.own.mu.Unlock()
	file, err := e.openFile()
	if err != nil {
		return nil, e.failed("detach", err)
	}
	e.own.file, e.own.detached = nil, true
	if e.own.asks == nil {
		e.own.fd = -1
	}
	return file, nil
}

// Close closes the descriptors that the event owns, if any. A permission event
// that was not answered gets the default answer before. It may be called again,
// and returns nil.
func (e *FileEvent) Close() error {
	owned := e.letGo()
	if owned.file != nil {
		owned.file.Close()
	}
	for _, fd := range owned.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	return nil
}

// An owned is what an event owned, and has to be closed.
type owned struct {
	file *os.File
	fds  [2]int // -1: none
}

// letGo does all that Close does but for closing: that may wait for a file system,
// while somebody waits for the lock of the descriptors to answer others.
func (e *FileEvent) letGo() owned {
	if e.own == nil {
		return owned{nil, [2]int{-1, -1}}
	}
	e.own.mu.Lock()
	defer e.own.mu.Unlock()
	if e.own.asks != nil && e.own.asks.close() {
		e.own.fd = -1
	}
	last := owned{e.own.file, [2]int{e.own.fd, e.own.pidfd}}
	if e.own.file != nil && e.own.asks == nil {
		last.fds[0] = -1 // that of file
	}
	e.own.file, e.own.fd, e.own.pidfd = nil, -1, -1
	e.own.pidfdErr = os.ErrClosed
	return last
}

func (e *FileEvent) failed(op string, err error) error { return fileError(op, e.Path, err) }

func fileError(op, object string, err error) error {
	return &OpError{Op: op, Source: "file", Object: object, Err: err}
}

// The path of an event is kept behind it, in one allocation.
type (
	fileEvent32 struct {
		FileEvent
		path [32]byte
	}
	fileEvent64 struct {
		FileEvent
		path [64]byte
	}
	fileEvent128 struct {
		FileEvent
		path [128]byte
	}
	fileEvent256 struct {
		FileEvent
		path [256]byte
	}
)

// newFileEvent returns an event whose Path is dir and name, one below the
// other.
func newFileEvent(dir string, name []byte) *FileEvent {
	if len(name) == 0 || len(name) == 1 && name[0] == '.' {
		return &FileEvent{Path: dir}
	}
	slash := 0
	if dir != "" && dir[len(dir)-1] != '/' {
		slash = 1
	}
	size := len(dir) + slash + len(name)
	var e *FileEvent
	var path []byte
	switch {
	case size <= 32:
		x := new(fileEvent32)
		e, path = &x.FileEvent, x.path[:]
	case size <= 64:
		x := new(fileEvent64)
		e, path = &x.FileEvent, x.path[:]
	case size <= 128:
		x := new(fileEvent128)
		e, path = &x.FileEvent, x.path[:]
	case size <= 256:
		x := new(fileEvent256)
		e, path = &x.FileEvent, x.path[:]
	default:
		e, path = new(FileEvent), make([]byte, size)
	}
	n := copy(path, dir)
	if slash > 0 {
		path[n] = '/'
		n++
	}
	n += copy(path[n:], name)
	// Nothing writes to path any more, so it may be a string.
	e.Path = unsafe.String(&path[0], n)
	return e
}

// String returns the event in one line: what happened, to what, by whom.
func (e *FileEvent) String() string {
	var b strings.Builder
	b.WriteString("file " + e.Ops.String())
	if e.OldPath != "" {
		b.WriteString(" " + oneWord(e.OldPath) + " to")
	}
	if e.Path != "" {
		b.WriteString(" " + oneWord(e.Path))
	}
	if e.PathState != PathExact && !e.Ops.Has(OpOverflow) {
		b.WriteString(" (" + e.PathState.String() + ")")
	}
	if e.Ops.Has(OpPreAccess) {
		fmt.Fprintf(&b, " bytes %d+%d", e.Offset, e.Length)
	}
	if e.Errno != 0 {
		fmt.Fprintf(&b, " %s (%d times)", e.Errno.Error(), e.Count)
	}
	if e.PID != 0 {
		fmt.Fprintf(&b, " pid %d", e.PID)
	}
	if e.TID != 0 {
		fmt.Fprintf(&b, " tid %d", e.TID)
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

// MarshalJSON returns the event as one JSON object, the one that kernstream
// files -json prints. Bytes that are not UTF-8 are replaced, and the key with
// _raw at its end holds the original in base64. What is not known is left out.
func (e *FileEvent) MarshalJSON() ([]byte, error) {
	j := &jsonFileEvent{
		Time:     e.When.UTC(),
		Source:   "file",
		Events:   e.Ops.names(),
		Path:     e.Path,
		PathRaw:  jsontext.Raw(e.Path),
		Via:      e.Via.String(),
		PID:      e.PID,
		TID:      e.TID,
		Overflow: e.Ops.Has(OpOverflow),
	}
	if !j.Overflow {
		j.PathState = e.PathState.String()
	}
	if e.Ops.Has(OpRename) {
		j.OldPath, j.OldPathRaw = e.OldPath, jsontext.Raw(e.OldPath)
		j.NewPath, j.NewPathRaw = j.Path, j.PathRaw
	}
	if e.Ops.Has(OpPreAccess) {
		j.Offset, j.Length = &e.Offset, &e.Length
	}
	if e.Errno != 0 {
		j.Errno, j.Count = errnoName(e.Errno), e.Count
	}
	if e.Err != nil {
		j.Error = e.Err.Error()
	}
	return jsontext.Marshal(j)
}

// errnoName returns the name of an error as errno(3) has it.
func errnoName(errno syscall.Errno) string {
	if errno == unix.EUCLEAN {
		return "EUCLEAN" // to file systems it is EFSCORRUPTED
	}
	return unix.ErrnoName(errno)
}

type jsonFileEvent struct {
	Time       time.Time `json:"time"`
	Source     string    `json:"source"`
	Events     []string  `json:"events"`
	Path       string    `json:"path,omitempty"`
	PathRaw    []byte    `json:"path_raw,omitempty"`
	OldPath    string    `json:"old_path,omitempty"`
	OldPathRaw []byte    `json:"old_path_raw,omitempty"`
	NewPath    string    `json:"new_path,omitempty"`
	NewPathRaw []byte    `json:"new_path_raw,omitempty"`
	PathState  string    `json:"path_state,omitempty"`
	Via        string    `json:"via"`
	PID        int       `json:"pid,omitempty"`
	TID        int       `json:"tid,omitempty"`
	Overflow   bool      `json:"overflow,omitempty"`
	Offset     *uint64   `json:"offset,omitempty"`
	Length     *uint64   `json:"length,omitempty"`
	Errno      string    `json:"errno,omitempty"`
	Count      uint32    `json:"count,omitempty"`
	Error      string    `json:"error,omitempty"`
}
