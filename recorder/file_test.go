package recorder_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// sampleList has paths of all kinds.
func sampleList() *recorder.List {
	return &recorder.List{
		Entries: []recorder.Entry{
			{Path: "/usr/bin/a", Ops: kernstream.OpOpen | kernstream.OpOpenExec, First: 1234567, Count: 3},
			{Path: "/with space\nand line feed", Ops: kernstream.OpAccess, First: time.Hour + 1, Count: 1},
			{Path: "/not utf-8 \xff\xfe", Ops: kernstream.OpOpen, First: 240 * time.Hour, Count: 1 << 40},
			{Path: "/<&>\"\\", Ops: kernstream.OpOpen | kernstream.OpClose | kernstream.OpModify | kernstream.OpOnDir, Count: 1},
		},
		Complete: true,
	}
}

func listText(t testing.TB, l *recorder.List) string {
	t.Helper()
	var b bytes.Buffer
	do(t, l.Write(&b))
	return b.String()
}

// TestListWritten: a line for each file, and one with the verdict; the reader makes the same
// list of it, bytes that are no text included.
func TestListWritten(t *testing.T) {
	for _, l := range []*recorder.List{sampleList(), {Complete: true, Entries: nil}, {Reasons: []string{"a", "b\n"}, Entries: sampleList().Entries[:1]}} {
		text := listText(t, l)
		got, err := recorder.ReadList(strings.NewReader(text))
		do(t, err)
		if !reflect.DeepEqual(got, l) {
			t.Errorf("read %+v; want %+v", got, l)
		}
		if n := strings.Count(text, "\n"); n != len(l.Entries)+1 {
			t.Errorf("%d lines:\n%s", n, text)
		}
	}
	want := `{"path":"/usr/bin/a","events":["open","open_exec"],"first":0.001234567,"count":3}
{"verdict":"incomplete","reasons":["why"],"files":1}
`
	if text := listText(t, &recorder.List{Reasons: []string{"why"}, Entries: sampleList().Entries[:1]}); text != want {
		t.Errorf("the list is\n%s\nwant\n%s", text, want)
	}
}

// TestReadListRefuses: what is not a whole list is an error that says what is wrong with it. No
// beginning of a list is one.
func TestReadListRefuses(t *testing.T) {
	text := listText(t, sampleList())
	for n := range len(text) {
		if _, err := recorder.ReadList(strings.NewReader(text[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
	}
	good := `{"path":"/a","events":["open"],"first":0,"count":1}` + "\n"
	for text, word := range map[string]string{
		text + "\n":             "after the verdict",
		text + good:             "after the verdict",
		"garbage\n":             "line 1",
		good + "\n":             "line 2",
		good + good[:20] + "\n": "line 2",
		good + `{"verdict":"complete","reasons":[],"files":2}` + "\n":                   "says 2",
		good + `{"verdict":"fine","reasons":[],"files":1}` + "\n":                       `"fine"`,
		good + `{"verdict":"complete","reasons":["x"],"files":1}` + "\n":                "1 reasons",
		good + `{"verdict":"incomplete","reasons":[],"files":1}` + "\n":                 "0 reasons",
		`{"path":"a","events":["open"],"first":0,"count":1}` + "\n":                     "absolute",
		`{"path":"/a","events":["open"],"first":-1,"count":1}` + "\n":                   "-1 seconds",
		`{"path":"/a","events":["open"],"first":1e300,"count":1}` + "\n":                "seconds",
		`{"path":"/a","events":["open"],"first":0}` + "\n":                              "count",
		`{"path":"/a","events":["opened"],"first":0,"count":1}` + "\n":                  "opened",
		`{"path":"/a","events":[],"first":0,"count":1}` + "\n":                          "no file operation",
		`{"path":"/a","events":["open"],"first":0,"count":1,"size":3}` + "\n":           "size",
		`{"path":"/a","events":["open"],"first":0,"count":1} {"path":"/b"}` + "\n":      "more than one",
		`{"path":"/a","events":["open"],"first":0,"count":18446744073709551616}` + "\n": "line 1",
	} {
		_, err := recorder.ReadList(strings.NewReader(text))
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%q: error %v; want one with %q", text, err, word)
		}
	}
	failure := errors.New("failure")
	_, err := recorder.ReadList(io.MultiReader(strings.NewReader(good), readerFunc(func([]byte) (int, error) { return 0, failure })))
	wantOpError(t, err, failure)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestWriteFile: a new file, and one in the place of another, whose mode it keeps; a
// symbolic link stays; nothing else is left.
func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	name, link := filepath.Join(dir, "list"), filepath.Join(dir, "link")
	do(t, os.Symlink("list", link))
	for range 2 {
		do(t, sampleList().WriteFile(name))
	}
	for _, mode := range []os.FileMode{0o640, 0o666} { // what umask leaves, and what it does not
		do(t, os.Chmod(name, mode))
		do(t, sampleList().WriteFile(link))
		if st, err := os.Lstat(name); err != nil || st.Mode() != mode {
			t.Errorf("the file has mode %v, %v; want %v", st.Mode(), err, mode)
		}
	}
	if st, err := os.Lstat(link); err != nil || st.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link has mode %v, %v", st.Mode(), err)
	}
	text, err := os.ReadFile(name)
	do(t, err)
	if string(text) != listText(t, sampleList()) {
		t.Errorf("the file has %q", text)
	}
	wantEntries(t, dir, "link", "list")
}

func wantEntries(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	do(t, err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the directory has %q; want %q", got, want)
	}
}

// TestWriteFileFails: a disk that is full leaves the old file as it was, and
// nothing else.
func TestWriteFileFails(t *testing.T) {
	testenv.NeedMounts(t)
	dir := t.TempDir()
	do(t, unix.Mount("full", dir, "tmpfs", 0, "size=64k"))
	defer detach(t, dir)
	name := filepath.Join(dir, "list")
	do(t, sampleList().WriteFile(name))
	long := sampleList()
	for range 10 {
		long.Entries = append(long.Entries, recorder.Entry{Path: "/" + strings.Repeat("x", 10_000), Ops: kernstream.OpOpen, Count: 1})
	}
	wantOpError(t, long.WriteFile(name), unix.ENOSPC, name)
	wantOpError(t, long.WriteFile(filepath.Join(dir, "none", "list")), os.ErrNotExist, "none")
	wantEntries(t, dir, "list")
	text, err := os.ReadFile(name)
	do(t, err)
	if string(text) != listText(t, sampleList()) {
		t.Errorf("the file has %q", text)
	}
}

// TestWriteFilePipe: what is no regular file is written to, and stays what it is.
func TestWriteFilePipe(t *testing.T) {
	name := filepath.Join(t.TempDir(), "pipe")
	do(t, unix.Mkfifo(name, 0o600))
	got := make(chan string, 1)
	go func() {
		text, _ := os.ReadFile(name)
		got <- string(text)
	}()
	do(t, sampleList().WriteFile(name))
	if text := <-got; text != listText(t, sampleList()) {
		t.Errorf("the pipe had %q", text)
	}
	if st, err := os.Lstat(name); err != nil || st.Mode().Type() != os.ModeNamedPipe {
		t.Errorf("the pipe is %v, %v", st.Mode(), err)
	}
}

// FuzzReadList: whatever is read either is a list, and is written as one that reads the same,
// or an error.
func FuzzReadList(f *testing.F) {
	f.Add([]byte(listText(f, sampleList())))
	f.Add([]byte(`{"path":"\ufffd","path_raw":"L/8=","events":["open"],"first":1.5,"count":1}` + "\n" + `{"verdict":"complete","reasons":[],"files":1}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := recorder.ReadList(bytes.NewReader(text))
		if err != nil {
			return
		}
		again, err := recorder.ReadList(strings.NewReader(listText(t, l)))
		if err != nil || !reflect.DeepEqual(again, l) {
			t.Errorf("%+v is read again as %+v, %v", l, again, err)
		}
	})
}
