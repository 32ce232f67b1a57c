// This file compares kernel versions and reads the statements of tests about
// them.

package main

import (
	"fmt"
	"regexp"
	"strconv"
)

// version is a kernel's major and minor version: what the tests state.
type version struct{ major, minor int }

// parseVersion reads "6.12", or a release such as "6.12.9+deb12-cloud-amd64".
func parseVersion(s string) (version, error) {
	var v version
	if _, err := fmt.Sscanf(s, "%d.%d", &v.major, &v.minor); err != nil {
		return version{}, fmt.Errorf("kernel version %q: want a form like 6.12", s)
	}
	return v, nil
}

func (v version) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

func (v version) atLeast(w version) bool {
	return v.major > w.major || v.major == w.major && v.minor >= w.minor
}

// statement is a test's statement of the kernel that it needs, in the words of
// testenv.NeedKernel: "needs Linux 6.15: mount namespace marks".
type statement struct {
	version version
	feature string
}

var statementPattern = regexp.MustCompile(`^needs Linux (\d+)\.(\d+): (.+)$`)

func parseStatement(reason string) (s statement, ok bool) {
	m := statementPattern.FindStringSubmatch(reason)
	if m == nil {
		return statement{}, false
	}
	// The pattern admits digits alone; what overflows is no version.
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	return statement{version{major, minor}, m[3]}, err1 == nil && err2 == nil
}

func (s statement) String() string { return fmt.Sprintf("Linux %s: %s", s.version, s.feature) }
