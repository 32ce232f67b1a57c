package main

import (
	"slices"
	"testing"
)

func TestParseLdd(t *testing.T) {
	const text = `	linux-vdso.so.1 (0x00007ffd5e9f2000)
	libmount.so.1 => /lib/x86_64-linux-gnu/libmount.so.1 (0x00007f2c4a000000)
	libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2c49e00000)
	/lib64/ld-linux-x86-64.so.2 (0x00007f2c4a0b0000)
	/opt/lib/preloaded.so => /opt/lib/preloaded-2.so (0x00007f2c4a0a0000)
`
	want := []string{
		"/lib/x86_64-linux-gnu/libmount.so.1",
		"/lib/x86_64-linux-gnu/libc.so.6",
		"/lib64/ld-linux-x86-64.so.2",
		"/opt/lib/preloaded-2.so",
	}
	got, err := parseLdd(text)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, error %v", got, err)
	}
	if _, err := parseLdd("\tlibgone.so.1 => not found\n"); err == nil {
		t.Error("a missing library was accepted")
	}
}

// Each program is named once, with the package that has it and a reason.
func TestTools(t *testing.T) {
	seen := map[string]bool{}
	for _, tool := range tools {
		if seen[tool.name] || tool.pkg == "" || tool.why == "" {
			t.Errorf("%+v", tool)
		}
		seen[tool.name] = true
	}
	got := packages([]tool{{pkg: "b"}, {pkg: "a"}, {pkg: "b"}})
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("packages %q", got)
	}
}
