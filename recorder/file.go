package recorder

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/jsontext"
)

// The file format of a List: JSON, one object per line. A line for each file, in
// the order of first accesses, and then exactly one with the verdict. A file without
// that was cut short.

// jsonVerdict is the last line.
type jsonVerdict struct {
	Verdict string   `json:"verdict"`
	Reasons []string `json:"reasons"`
	Files   int      `json:"files"`
}

const (
	verdictComplete   = "complete"
	verdictIncomplete = "incomplete"
)

// Write writes the list as lines of JSON (see [Entry.MarshalJSON]), and a last one with the
// verdict: complete or incomplete, the reasons, and the number of files.
func (l *List) Write(w io.Writer) error {
	out := bufio.NewWriter(w)
	for i := range l.Entries {
		if err := writeLine(out, l.Entries[i]); err != nil {
			return err
		}
	}
	last := jsonVerdict{Verdict: verdictIncomplete, Reasons: l.Reasons, Files: len(l.Entries)}
	if l.Complete {
		last.Verdict = verdictComplete
	}
	if last.Reasons == nil {
		last.Reasons = []string{}
	}
	if err := writeLine(out, last); err != nil {
		return err
	}
	return out.Flush()
}

func writeLine(out *bufio.Writer, v any) error {
	line, err := jsontext.Marshal(v)
	if err != nil {
		return err
	}
	out.Write(line)
	return out.WriteByte('\n')
}

// WriteFile writes the list to a file, as [List.Write] does, whole or not at all: what
// had the name before stays until all is on the disk, and then is replaced. If the process
// dies meanwhile, nothing is left where the file system has files without a name
// (O_TMPFILE). What is not a regular file (a pipe, a terminal) is written to directly. A symbolic link
// is followed.
func (l *List) WriteFile(name string) error {
	st, err := os.Stat(name)
	switch {
	case err == nil && !st.Mode().IsRegular():
		return l.writeThrough(name)
	case err == nil:
		if name, err = filepath.EvalSymlinks(name); err != nil {
			return recordError("write", name, err)
		}
	}
	if err := l.replace(name, st); err != nil {
		return recordError("write", name, err)
	}
	return nil
}

func (l *List) writeThrough(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return recordError("write", name, err)
	}
	if err := errors.Join(l.Write(f), f.Close()); err != nil {
		return recordError("write", name, err)
	}
	return nil
}

// replace puts a file with the list in the place of name. It has the permissions of old, if that is not
// nil.
func (l *List) replace(name string, old fs.FileInfo) error {
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	f, temporary, err := temporaryFile(dir)
	if err != nil {
		return err
	}
	if old != nil {
		err = f.Chmod(old.Mode().Perm())
	}
	if err == nil {
		err = l.Write(f)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil && temporary == "" {
		temporary, err = linkFile(dir, f)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temporary, name)
	}
	if err != nil {
		if temporary != "" {
			os.Remove(temporary)
		}
		return err
	}
	return dir.Sync()
}

// temporaryFile makes a file in dir, without a name if that can be.
func temporaryFile(dir *os.File) (f *os.File, name string, err error) {
	const mode = 0o666
	fd, err := unix.Open(dir.Name(), unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, mode)
	if err == nil {
		return os.NewFile(uintptr(fd), dir.Name()), "", nil
	}
	for range 100 {
		name = temporaryName(dir)
		f, err = os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
		if !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	return f, name, err
}

// linkFile gives a name to a file that has none.
func linkFile(dir, f *os.File) (name string, err error) {
	for range 100 {
		name = temporaryName(dir)
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
		if err == unix.ENOENT {
			// There is no /proc. This way is open to CAP_DAC_READ_SEARCH, and since
			// Linux 6.10 to whoever has opened the file.
			err = unix.Linkat(int(f.Fd()), "", unix.AT_FDCWD, name, unix.AT_EMPTY_PATH)
		}
		if err == nil {
			return name, nil
		}
		if err != unix.EEXIST {
			break
		}
	}
	return "", os.NewSyscallError("linkat", err)
}

func temporaryName(dir *os.File) string {
	return filepath.Join(dir.Name(), fmt.Sprintf(".record-%d-%x", os.Getpid(), time.Now().UnixNano()))
}

// ReadList reads what [List.Write] wrote. What is cut short, has lines after the verdict, or
// was changed so that it does not agree with it, is an error; for a list without its end it Is
// io.ErrUnexpectedEOF.
func ReadList(r io.Reader) (*List, error) {
	l := &List{}
	in := bufio.NewReader(r)
	for n := 1; ; n++ {
		line, err := in.ReadBytes('\n')
		switch {
		case err == io.EOF:
			return nil, recordError("read", "list", fmt.Errorf("the list has %d files and no verdict: %w", len(l.Entries), io.ErrUnexpectedEOF))
		case err != nil:
			return nil, recordError("read", "list", err)
		}
		last, err := l.readLine(line)
		if err != nil {
			return nil, recordError("read", "list", fmt.Errorf("line %d: %w", n, err))
		}
		if last {
			break
		}
	}
	switch _, err := in.ReadByte(); {
	case err == nil:
		return nil, recordError("read", "list", errors.New("there is something after the verdict"))
	case err != io.EOF:
		return nil, recordError("read", "list", err)
	}
	return l, nil
}

// readLine reads a file, or the verdict, which is the last line.
func (l *List) readLine(line []byte) (last bool, err error) {
	var v struct {
		jsonEntry
		jsonVerdict
	}
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&v); err != nil {
		return false, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return false, errors.New("more than one object")
	}
	if v.Verdict == "" {
		e, err := v.entry()
		l.Entries = append(l.Entries, e)
		return false, err
	}
	l.Complete, l.Reasons = v.Verdict == verdictComplete, v.Reasons
	switch {
	case !l.Complete && v.Verdict != verdictIncomplete:
		return true, fmt.Errorf("the verdict is %q", v.Verdict)
	case l.Complete != (len(v.Reasons) == 0):
		return true, fmt.Errorf("the verdict is %s, with %d reasons", v.Verdict, len(v.Reasons))
	case v.Files != len(l.Entries):
		return true, fmt.Errorf("the list has %d files, and the verdict says %d", len(l.Entries), v.Files)
	}
	if l.Complete {
		l.Reasons = nil
	}
	return true, nil
}

// entry checks and returns what a line says.
func (j *jsonEntry) entry() (Entry, error) {
	e := Entry{Path: j.Path, Count: j.Count, First: time.Duration(math.Round(j.First * 1e9))}
	if j.PathRaw != nil {
		e.Path = string(j.PathRaw)
	}
	switch {
	case !strings.HasPrefix(e.Path, "/"):
		return e, fmt.Errorf("the path %q is not absolute", e.Path)
	case j.First < 0 || j.First > math.MaxInt64/1e9:
		return e, fmt.Errorf("first is %v seconds", j.First)
	case e.Count == 0:
		return e, errors.New("there is no count")
	}
	var err error
	e.Ops, err = kernstream.ParseFileOp(strings.Join(j.Events, ","))
	return e, err
}
