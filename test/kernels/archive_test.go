package main

import (
	"slices"
	"testing"
)

// The newest signed kernel of a line comes first; numbers are compared as
// numbers; debugging symbols, unsigned kernels, other processors and packages
// that only depend on the latest kernel are none.
func TestPickKernels(t *testing.T) {
	search := readTestdata(t, "testdata/apt-cache-search.txt")
	for line, want := range map[string][]string{
		"6.1": {
			"linux-image-6.1.0-56-cloud-amd64",
			"linux-image-6.1.0-47-cloud-amd64",
			"linux-image-6.1.0-9-cloud-amd64",
		},
		"6.12": {
			"linux-image-6.12.117+deb12-cloud-amd64",
			"linux-image-6.12.100+deb12-cloud-amd64",
			"linux-image-6.12.43+deb12-cloud-amd64",
			"linux-image-6.12.9+bpo-cloud-amd64",
		},
		"5.10": nil,
	} {
		if got := pickKernels(search, line); !slices.Equal(got, want) {
			t.Errorf("%s: %q", line, got)
		}
	}
}
