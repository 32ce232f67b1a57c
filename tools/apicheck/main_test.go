package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCheck: what is not documented or not used outside is told, by name and
// place, and nothing else.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod": "module example.org/m\n\ngo 1.26.0\n",
		"a/a.go": `// Package a has good and bad.
package a

// Used is documented and used.
func Used() {}

// Unused is used within the package only.
func Unused() { Used() }

func Bare() {}

// T is used by its method.
type T struct {
	Field int // used
	Other int
	own   int
}

// M is used.
func (t *T) M() { Unused() }

// N is not.
func (t *T) N() {}

// String is a method of fmt.Stringer.
func (t *T) String() string { return "" }

func (t *T) Error() string { return "" }

// New returns one.
func New() *T { return &T{own: 1} }

// A Kind is used by one of its constants.
type Kind int

const (
	KindA Kind = iota // used
	KindB             // not used, but of the same type
)

// Lonely has constants that nobody uses.
type Lonely int

const LonelyA Lonely = 1

type hidden struct{ Exported int }

// G is generic.
type G[V any] struct{ Value V }
`,
		"a/a_internal_test.go": "package a\n\nimport \"testing\"\n\nfunc TestN(t *testing.T) { New().N(); _ = hidden{}; _ = New().own }\n",
		"a/a_test.go":          "package a_test\n\nimport \"example.org/m/a\"\n\nfunc Example() { a.Used(); a.Bare(); t := a.New(); t.M(); t.Field++; _ = a.KindA; _ = a.G[int]{Value: 1} }\n",
		"b/internal/c/c.go":    "package c\n\nfunc Nobody() {}\n",
		"b/main.go":            "package main\n\nfunc Main() {}\n\nfunc main() {}\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	problems, err := check(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range problems {
		place, what, _ := strings.Cut(p, ": ")
		if !strings.HasPrefix(place, "a/a.go:") {
			t.Errorf("%q is not a place", place)
		}
		got = append(got, what)
	}
	slices.Sort(got)
	want := []string{
		"Bare is not documented",
		"T.Error is not documented",
		"T.Other is not documented",
		"nobody outside of the package uses Lonely",
		"nobody outside of the package uses T.N",
		"nobody outside of the package uses T.Other",
		"nobody outside of the package uses Unused",
		"nobody outside of the package uses the constants of Lonely",
		"the constants of Lonely is not documented",
		"G.Value is not documented",
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if err := os.RemoveAll(filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	if _, err := check(dir); err == nil {
		t.Error("a module without anything to import is well")
	}
}
