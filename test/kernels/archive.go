// This file finds and fetches packages from the distribution's archive with
// its own client. Names of kernel packages carry the version and vanish from
// the archive, so they are looked up at run time.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// candidates is how many packages of a line are tried, newest first.
const candidates = 3

// kernelPackage is a signed cloud kernel: "linux-image-6.1.0-56-cloud-amd64",
// "linux-image-6.12.117+deb12-cloud-amd64". What ends in -unsigned or -dbg is
// none, and neither are the packages that only depend on the latest.
var kernelPackage = regexp.MustCompile(`^linux-image-(\d+\.\d+)\.(\d[^ ]*)-cloud-amd64$`)

// pickKernels returns the kernel packages of a line, such as "6.12", newest
// first, from the output of apt-cache search.
func pickKernels(search, line string) []string {
	var names []string
	for row := range strings.Lines(search) {
		name, _, _ := strings.Cut(strings.TrimSpace(row), " ")
		m := kernelPackage.FindStringSubmatch(name)
		if m != nil && m[1] == line && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		return slices.Compare(numbers(b), numbers(a))
	})
	return names
}

var digits = regexp.MustCompile(`\d+`)

// numbers returns the numbers in a package's name, which order the packages of
// a line by age.
func numbers(name string) []int {
	var ns []int
	for _, text := range digits.FindAllString(name, -1) {
		n, err := strconv.Atoi(text)
		if err != nil {
			n = 0 // longer than a number can be: no version
		}
		ns = append(ns, n)
	}
	return ns
}

// archive runs apt. Its lists are fetched again, at most once, when they lack
// something; only root may do that.
type archive struct {
	updated bool
	log     func(format string, args ...any)
}

// Kernels returns the kernel packages of a line, newest first.
func (a *archive) Kernels(ctx context.Context, line string) ([]string, error) {
	for {
		out, err := output(ctx, "", "apt-cache", "search", "--names-only", `^linux-image-[0-9].*-cloud-amd64$`)
		if err != nil {
			return nil, err
		}
		names := pickKernels(out, line)
		// Lists without any such package were never fetched.
		if len(names) > 0 || strings.TrimSpace(out) != "" || !a.update(ctx) {
			return names[:min(len(names), candidates)], nil
		}
	}
}

// File returns the name of the file that Download would fetch, which carries
// the package's version.
func (a *archive) File(ctx context.Context, name string) (string, error) {
	out, err := output(ctx, "", "apt-get", "download", "--print-uris", name)
	if err != nil {
		return "", err
	}
	for row := range strings.Lines(out) {
		if fields := strings.Fields(row); len(fields) >= 2 && strings.HasSuffix(fields[1], ".deb") {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("apt-get download --print-uris %s: no file named", name)
}

// Unpack downloads a package and unpacks it into dir.
func (a *archive) Unpack(ctx context.Context, name, dir string) error {
	_, err := output(ctx, dir, "apt-get", "-q", "download", name)
	if err != nil && ctx.Err() == nil && a.update(ctx) {
		_, err = output(ctx, dir, "apt-get", "-q", "download", name)
	}
	if err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s: %d files in place of one", name, len(debs))
	}
	if _, err := output(ctx, dir, "dpkg-deb", "-x", debs[0], "."); err != nil {
		return err
	}
	return os.Remove(debs[0])
}

// Install installs packages.
func (a *archive) Install(ctx context.Context, names ...string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can install %s", strings.Join(names, " "))
	}
	args := append([]string{"install", "-y", "-q", "--no-install-recommends"}, names...)
	a.log("apt-get %s", strings.Join(args, " "))
	_, err := output(ctx, "", "apt-get", args...)
	if err != nil && ctx.Err() == nil && a.update(ctx) {
		_, err = output(ctx, "", "apt-get", args...)
	}
	return err
}

// update fetches the lists, and tells whether there is a reason to try again.
func (a *archive) update(ctx context.Context) bool {
	if a.updated || os.Geteuid() != 0 {
		return false
	}
	a.updated = true
	a.log("apt-get update")
	_, err := output(ctx, "", "apt-get", "-q", "update")
	return err == nil
}

// output runs a program in dir and returns its standard output.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%w: the kernels come from a Debian package archive, by its own client", err)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}
