package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// golden compares got with a file of testdata. KERNSTREAM_GOLDEN=write writes
// it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if os.Getenv("KERNSTREAM_GOLDEN") == "write" {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want := readTestdata(t, name); got != want {
		t.Errorf("%s differs:\n%s", name, diffLines(want, got))
	}
}

func readTestdata(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Flags that contradict each other are refused before anything is fetched.
func TestFlags(t *testing.T) {
	for _, test := range []struct {
		args []string
		ok   bool
	}{
		{nil, true},
		{[]string{"-kernel", "6.1,6.12", "-kernel", "newest", "-pass", "root"}, true},
		{[]string{"-kernel", "six"}, false},
		{[]string{"-pass", "admin"}, false},
		{[]string{"-shell"}, false},
		{[]string{"-shell", "-kernel", "host"}, false},
		{[]string{"-shell", "-kernel", "6.1"}, true},
		{[]string{"-report", "r.md"}, true},
		{[]string{"-report", "r.md", "-host=false"}, false},
		{[]string{"-check", "r.md", "-host=false"}, true},
		{[]string{"-check", "r.md", "-run", "X"}, false},
		{[]string{"stray"}, false},
	} {
		o, err := parseFlags("kernels", test.args)
		if (err == nil) != test.ok {
			t.Errorf("%q: error %v", test.args, err)
		}
		if err == nil && len(o.passes) == 0 {
			t.Errorf("%q: no pass", test.args)
		}
	}
	o, err := parseFlags("kernels", []string{"-kernel", "6.1,newest"})
	if err != nil || !slices.Equal(o.kernels, list{"6.1", hostName}) {
		t.Errorf("kernels %q, error %v", o.kernels, err)
	}
}
