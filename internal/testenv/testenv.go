// Package testenv is what the tests of this module stand on: private
// namespaces, statements of what a test needs, and checks that nothing is left
// behind.
//
// A test says what it needs with [NeedKernel], [NeedRoot], [NeedMounts] and
// [NeedTool]. What is missing skips the test with a message that starts with
// "needs ". The environment variable KERNSTREAM_STRICT decides which of those
// skips are allowed:
//
//	unset         all of them
//	unprivileged  a kernel older than stated, and a missing privilege
//	1             a kernel older than stated
//
// Everything else fails the test. Long tests multiply their length by
// KERNSTREAM_SOAK (see [Soak]).
package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	strictVar         = "KERNSTREAM_STRICT"
	soakVar           = "KERNSTREAM_SOAK"
	ignoreVersionsVar = "KERNSTREAM_IGNORE_VERSIONS"
)

// Kernel returns the version of the running kernel, 6 and 12 for "6.12.3-amd64".
var Kernel = sync.OnceValues(func() (major, minor int) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		panic(err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		panic(fmt.Sprintf("kernel release %q: %v", release, err))
	}
	return major, minor
})

// KernelAtLeast tells whether the running kernel is major.minor or newer.
func KernelAtLeast(major, minor int) bool {
	haveMajor, haveMinor := Kernel()
	return haveMajor > major || haveMajor == major && haveMinor >= minor
}

// NeedKernel skips tb where the kernel is older than major.minor, which is the
// version that brought feature. It is the one skip that every mode allows, so
// the version must be the true one: the kernel matrix runs the tests on both
// sides of it. With KERNSTREAM_IGNORE_VERSIONS set the test runs all the same,
// which shows a version that is stated too high.
func NeedKernel(tb testing.TB, major, minor int, feature string) {
	tb.Helper()
	switch {
	case KernelAtLeast(major, minor):
	case os.Getenv(ignoreVersionsVar) != "":
		tb.Logf("ignored: needs Linux %d.%d: %s", major, minor, feature)
	default:
		tb.Skipf("needs Linux %d.%d: %s", major, minor, feature)
	}
}

// NeedRoot skips tb unless the tests were started by root with all that root can
// do: a private user namespace is not enough for what.
func NeedRoot(tb testing.TB, what string) {
	tb.Helper()
	if !startedByRoot() {
		missing(tb, true, "needs root: "+what)
	}
}

// Patience is how long a test waits for what must happen: longer than it takes on
// any machine, however busy, since only a failure takes that long.
const Patience = time.Minute

// Within runs f, returns what it returned, and fails tb when it does not return.
func Within(tb testing.TB, what string, f func() error) error {
	tb.Helper()
	result := make(chan error, 1)
	go func() { result <- f() }()
	select {
	case err := <-result:
		return err
	case <-time.After(Patience):
		tb.Fatalf("%s: still waiting after %v", what, Patience)
		return nil
	}
}

// NeedMounts skips tb where the tests could not get a mount namespace of their
// own. Its package must call [MainInNamespace].
func NeedMounts(tb testing.TB) {
	tb.Helper()
	if os.Getenv(namespaceVar) == "" {
		missing(tb, true, "needs a private mount namespace: "+os.Getenv(noNamespaceVar))
	}
}

// NeedFUSE skips tb where FUSE file systems cannot be mounted and served.
func NeedFUSE(tb testing.TB) {
	tb.Helper()
	NeedMounts(tb)
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		Missing(tb, "needs to open /dev/fuse", err)
	}
	device.Close()
}

// NeedTool returns the path of the program name, or skips tb.
func NeedTool(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(tb, false, "needs the program "+name)
	}
	return path
}

// Missing skips tb for another reason that lies in the machine and not in the
// kernel's version; reason starts with "needs ", and err is what showed it. An
// error of permission makes it a privilege that is missing.
func Missing(tb testing.TB, reason string, err error) {
	tb.Helper()
	missing(tb, errors.Is(err, fs.ErrPermission), fmt.Sprintf("%s: %v", reason, err))
}

func missing(tb testing.TB, privilege bool, reason string) {
	tb.Helper()
	switch mode := os.Getenv(strictVar); {
	case mode == "", mode == "unprivileged" && privilege:
		tb.Skip(reason)
	default:
		tb.Fatalf("%s (a failure because %s=%s)", reason, strictVar, mode)
	}
}

// Soak returns d times KERNSTREAM_SOAK, a factor that is 1 by default.
func Soak(d time.Duration) time.Duration {
	return time.Duration(float64(d) * soakFactor())
}

// SoakN returns n times KERNSTREAM_SOAK, at least 1.
func SoakN(n int) int {
	return max(1, int(float64(n)*soakFactor()))
}

func soakFactor() float64 {
	text := strings.TrimSpace(os.Getenv(soakVar))
	if text == "" {
		return 1
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || f <= 0 {
		panic(fmt.Sprintf("%s=%q: want a factor above 0", soakVar, text))
	}
	return f
}

// Feature notes in tb's output that the feature name works here by the given
// path ("mount table", "mountinfo"). The kernel matrix makes its report of these
// notes.
func Feature(tb testing.TB, name, path string) {
	tb.Helper()
	tb.Logf("feature: %s: %s", name, path)
}
