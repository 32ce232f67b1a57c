// This file packs programs of the host, with their shared libraries, for the
// tests that need one.

package main

import (
	"bufio"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// tool is a program that is packed into the images.
type tool struct {
	name string
	pkg  string // the package that has it
	why  string
}

// tools are the programs that tests may ask for by testenv.NeedTool. Each is
// taken from the host; one that is not there is named in the output.
var tools = []tool{
	{"fusermount3", "fuse3", "an ordinary user mounts FUSE by it"},
	{"mount.fuse3", "fuse3", "mount(8) starts a FUSE file system by it"},
	{"mkfs.ext4", "e2fsprogs", "file events on ext4"},
	{"mkfs.xfs", "xfsprogs", "file events on XFS"},
	{"mkfs.btrfs", "btrfs-progs", "file events on btrfs"},
	{"btrfs", "btrfs-progs", "makes subvolumes"},
	{"mount", "mount", "mounts that another process makes, loop devices"},
	{"umount", "mount", "unmounts by another process"},
	{"losetup", "mount", "loop devices"},
	{"unshare", "util-linux", "processes in other namespaces"},
	{"nsenter", "util-linux", "processes that enter a namespace"},
	{"setpriv", "util-linux", "processes with fewer privileges"},
	{"sh", "dash", "scripts that cause events in a known order"},
	{"sleep", "coreutils", "a process that stays"},
	{"true", "coreutils", "a process that ends at once"},
	{"false", "coreutils", "a process that ends with a status"},
	{"cat", "coreutils", "reads a file, or a pipe until its end"},
	{"cp", "coreutils", "copies files as users do"},
	{"mv", "coreutils", "renames files as users do"},
	{"rm", "coreutils", "removes files as users do"},
	{"ln", "coreutils", "links"},
	{"ls", "coreutils", "lists a directory as users do"},
	{"mkdir", "coreutils", "directories"},
	{"touch", "coreutils", "new files"},
	{"dd", "coreutils", "reads and writes of a given size"},
	{"stat", "coreutils", "looks at a file without opening it"},
	{"head", "coreutils", "stops reading after a part"},
}

// toolPath is where programs of root live, too.
const toolPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// findTools returns the paths of the tools that are on the host, and those that
// are not.
func findTools() (paths []string, missing []tool) {
	for _, t := range tools {
		if path := lookPath(t.name); path != "" {
			paths = append(paths, path)
		} else {
			missing = append(missing, t)
		}
	}
	return paths, missing
}

func lookPath(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for dir := range strings.SplitSeq(toolPath, ":") {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

// packages returns the packages that have the tools, each once.
func packages(missing []tool) []string {
	var names []string
	for _, t := range missing {
		names = append(names, t.pkg)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// sharedLibraries returns the files that the dynamic linker maps for a program,
// itself included; none for a static one.
func sharedLibraries(ctx context.Context, program string) ([]string, error) {
	file, err := elf.Open(program)
	if err != nil {
		// A script; what it needs beside its interpreter is not known.
		if format := (*elf.FormatError)(nil); errors.As(err, &format) {
			return nil, nil
		}
		return nil, err
	}
	defer file.Close()
	dynamic := slices.ContainsFunc(file.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
	if !dynamic {
		return nil, nil
	}
	out, err := output(ctx, "", "ldd", program)
	if err != nil {
		return nil, err
	}
	return parseLdd(out)
}

// parseLdd reads the output of ldd: "libc.so.6 => /lib/libc.so.6 (0x7f...)",
// "/lib64/ld-linux-x86-64.so.2 (0x7f...)", and one line for the vDSO, which is
// not a file.
func parseLdd(text string) ([]string, error) {
	var files []string
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if name, ok := strings.CutSuffix(line, "=> not found"); ok {
			return nil, fmt.Errorf("shared library %sis missing", name)
		}
		for field := range strings.FieldsSeq(line) {
			if strings.HasPrefix(field, "/") {
				// "a => b" names b; the linker's own line has one path.
				if _, target, ok := strings.Cut(line, "=> "); ok {
					field, _, _ = strings.Cut(target, " ")
				}
				files = append(files, field)
				break
			}
		}
	}
	return files, lines.Err()
}

// hostDirs are directories that are symbolic links into /usr on most systems;
// an image has them as the host does.
var hostDirs = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// packTools adds programs with their libraries to an image, at the paths that
// they have on the host.
func packTools(ctx context.Context, img *image, programs []string) error {
	for _, dir := range hostDirs {
		target, err := os.Readlink("/" + dir)
		if err == nil {
			img.AddLink(dir, target)
		}
	}
	for _, program := range programs {
		libs, err := sharedLibraries(ctx, program)
		if err != nil {
			return fmt.Errorf("pack %s: %w", program, err)
		}
		for _, file := range append(libs, program) {
			// The name stays, links in the way to it do not.
			dir, err := filepath.EvalSymlinks(filepath.Dir(file))
			if err != nil {
				return err
			}
			if err := img.AddFile(filepath.Join(dir, filepath.Base(file)), file); err != nil {
				return err
			}
		}
	}
	return nil
}
