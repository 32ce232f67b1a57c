// This file builds the test binaries and lays them out, with the files of their
// packages, as they run in the virtual machines and on the host.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// stage is a directory with all that is packed: the init, the job, the test
// binaries and the command.
type stage struct {
	dir    string
	root   string // of the module
	module string // its path
}

func newStage(ctx context.Context, dir string) (*stage, error) {
	out, err := output(ctx, "", "go", "list", "-m", "-f", "{{.Path}}\t{{.Dir}}")
	if err != nil {
		return nil, err
	}
	module, root, ok := strings.Cut(strings.TrimSpace(out), "\t")
	if !ok {
		return nil, fmt.Errorf("go list -m: %q", out)
	}
	// An ordinary user runs what is in here, too.
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return &stage{dir: dir, root: root, module: module}, os.Chmod(dir, 0o755)
}

// Packages returns the packages that match the patterns and have tests; no
// pattern means the whole module.
func (s *stage) Packages(ctx context.Context, patterns []string) ([]job.Package, error) {
	if len(patterns) == 0 {
		patterns = []string{s.module + "/..."}
	}
	args := append([]string{"list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}"}, patterns...)
	out, err := output(ctx, "", "go", args...)
	if err != nil {
		return nil, err
	}
	var pkgs []job.Package
	for _, importPath := range strings.Fields(out) {
		dir, ok := strings.CutPrefix(importPath+"/", s.module+"/")
		if !ok {
			return nil, fmt.Errorf("package %s is not in module %s", importPath, s.module)
		}
		dir = path.Clean(dir)
		name := dir
		if dir == "." {
			name = path.Base(s.module)
		}
		pkgs = append(pkgs, job.Package{Name: name, Dir: dir, Binary: path.Join(dir, path.Base(importPath)+".test")})
	}
	if len(pkgs) == 0 {
		return nil, fmt.Errorf("no tests in %s", strings.Join(patterns, " "))
	}
	return pkgs, nil
}

// Build builds the init, the command and the test binaries.
func (s *stage) Build(ctx context.Context, pkgs []job.Package) error {
	targets := [][]string{{"build", "-o", filepath.Join(s.dir, "init"), s.module + "/test/kernels/init"}}
	command := filepath.Join(s.root, "cmd", "kernstream")
	if sources, err := filepath.Glob(filepath.Join(command, "*.go")); err == nil && len(sources) > 0 {
		targets = append(targets, []string{"build", "-o", filepath.Join(s.dir, "bin", "kernstream"), s.module + "/cmd/kernstream"})
	}
	for _, pkg := range pkgs {
		binary := filepath.Join(s.dir, "src", pkg.Binary)
		targets = append(targets, []string{"test", "-c", "-o", binary, path.Join(s.module, pkg.Dir)})
		if err := s.copySources(pkg.Dir); err != nil {
			return err
		}
	}
	// Compiling uses all processors by itself, linking does not.
	errs := make([]error, len(targets))
	slots := make(chan struct{}, 2)
	var wg sync.WaitGroup
	for i, args := range targets {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			errs[i] = goStatic(ctx, args)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// WriteJob writes a job beside what it runs.
func (s *stage) WriteJob(name string, j *job.Job) error {
	text, err := json.MarshalIndent(j, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.dir, name), text, 0o644)
}

// goStatic runs the go command so that it makes a static program without
// debugging information.
func goStatic(ctx context.Context, args []string) error {
	args = append([]string{args[0], "-ldflags=-s -w"}, args[1:]...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// maxSource bounds what is copied beside a test binary: sources are small, what
// is not is something that was built there.
const maxSource = 1 << 20

// copySources copies what a test finds in its directory under "go test": the
// files of the package and its directory testdata.
func (s *stage) copySources(dir string) error {
	from, to := filepath.Join(s.root, dir), filepath.Join(s.dir, "src", dir)
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := entry.Name()
		if entry.IsDir() && name == "testdata" {
			if err := os.CopyFS(filepath.Join(to, name), os.DirFS(filepath.Join(from, name))); err != nil {
				return err
			}
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // an editor's, gone by now
		}
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() || info.Size() > maxSource || strings.HasPrefix(name, ".") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, name), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
