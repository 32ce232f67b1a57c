// This file puts a run together: fetch, build, pack, boot, judge, report.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// matrix is one run.
type matrix struct {
	options *options
	archive *archive
	cache   string
	dir     string // temporary
	stage   *stage
	kernels []*kernel
	host    bool
}

func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "kernels: "+format+"\n", args...)
}

// runMatrix does what the options say, and tells whether all is well.
func runMatrix(ctx context.Context, o *options) (ok bool, err error) {
	if runtime.GOARCH != "amd64" {
		return false, errors.New("the matrix runs on amd64 only: that is what its kernels are for")
	}
	m := &matrix{options: o, archive: &archive{log: logf}}
	if m.cache, err = cacheDir(); err != nil {
		return false, err
	}
	if err := m.selectKernels(ctx); err != nil {
		return false, err
	}
	if m.dir, err = os.MkdirTemp("", "kernstream-"); err != nil {
		return false, err
	}
	if o.keep {
		defer logf("kept %s", m.dir)
	} else {
		defer os.RemoveAll(m.dir)
	}
	// On the host an ordinary user runs what is in here.
	if err := os.Chmod(m.dir, 0o755); err != nil {
		return false, err
	}
	if err := m.build(ctx); err != nil {
		return false, err
	}
	if o.shell {
		return true, m.machine(m.kernels[0]).Shell(ctx)
	}
	columns, err := m.run(ctx)
	if err != nil {
		return false, err
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	for _, c := range columns {
		if err := keepConsole(c, m.cache); err != nil {
			return false, err
		}
	}
	return m.finish(columns)
}

// selectKernels makes sure that there is qemu, and finds the kernels.
func (m *matrix) selectKernels(ctx context.Context) error {
	lines := kernelLines
	m.host = m.options.host
	if names := m.options.kernels; len(names) > 0 {
		lines, m.host = nil, false
		for _, name := range names {
			if name == hostName {
				m.host = true
			} else {
				lines = append(lines, kernelLine{name: name})
			}
		}
	}
	if err := m.programs(ctx, len(lines) > 0); err != nil {
		return err
	}
	for _, line := range lines {
		k, err := fetchKernel(ctx, m.archive, m.cache, line.name)
		if err != nil {
			return err
		}
		switch {
		case k != nil:
			m.kernels = append(m.kernels, k)
		case line.optional:
			logf("the package archive has no kernel %s", line.name)
		default:
			return fmt.Errorf("the package archive has no kernel %s (are its lists up to date? apt-get update)", line.name)
		}
	}
	return nil
}

// programs makes sure that there is qemu, and names, or installs, what else is
// missing on the host.
func (m *matrix) programs(ctx context.Context, machines bool) error {
	var missing []tool
	if _, err := exec.LookPath(qemu); err != nil && machines {
		missing = append(missing, tool{name: qemu, pkg: qemuPackage})
	}
	if len(missing) > 0 && !m.options.install {
		return fmt.Errorf("%s is not on this host: apt-get install --no-install-recommends %s, or use -install", qemu, qemuPackage)
	}
	_, absent := findTools()
	missing = append(missing, absent...)
	if len(missing) == 0 {
		return nil
	}
	if m.options.install {
		return m.archive.Install(ctx, packages(missing)...)
	}
	var names []string
	for _, t := range missing {
		names = append(names, t.name)
	}
	logf("not on this host, so no test has it: %s (-install, or apt-get install %s)",
		strings.Join(names, ", "), strings.Join(packages(missing), " "))
	return nil
}

// build makes the stage, and the initramfs of each kernel.
func (m *matrix) build(ctx context.Context) error {
	var err error
	if m.stage, err = newStage(ctx, filepath.Join(m.dir, "stage")); err != nil {
		return err
	}
	j := &job.Job{
		Passes: m.options.passes,
		Args:   m.testArgs(),
		Env:    []string{"KERNSTREAM_SOAK=" + m.options.soak},
		// The test binary's own limit comes first, and the init's a little
		// later; the kernel's is the last.
		Limit: int(testLimit(m.options.timeout).Seconds()),
		Again: repetitions,
		Shell: m.options.shell,
	}
	if m.options.ignoreVersions {
		j.Again = 0 // they are to fail
		j.Env = append(j.Env, "KERNSTREAM_IGNORE_VERSIONS=1")
	}
	if j.Packages, err = m.stage.Packages(ctx, m.options.packages); err != nil {
		return err
	}
	if err := m.stage.Build(ctx, j.Packages); err != nil {
		return err
	}
	if err := m.stage.WriteJob(job.File, j); err != nil {
		return err
	}
	if err := m.pack(ctx); err != nil {
		return err
	}
	onHost := *j
	onHost.Passes = hostPasses(j.Passes)
	return m.stage.WriteJob(hostJob, &onHost)
}

// repetitions is how often a test that failed runs again, by itself. What a kernel
// does otherwise than others, it does each time. An emulated processor at a
// twentieth of the speed, beside another one, makes a test wait for longer than it
// has the patience to about once in ten thousand results.
const repetitions = 5

// testLimit is how long one test binary may take.
func testLimit(kernel time.Duration) time.Duration { return kernel / 2 }

func (m *matrix) testArgs() []string {
	args := []string{
		"-test.v=test2json",
		"-test.paniconexit0",
		"-test.timeout=" + testLimit(m.options.timeout).String(),
	}
	if m.options.run != "" {
		args = append(args, "-test.run="+m.options.run)
	}
	return args
}

// pack writes the initramfs of each kernel.
func (m *matrix) pack(ctx context.Context) error {
	if len(m.kernels) == 0 {
		return nil
	}
	img := newImage()
	if err := img.AddTree(job.Dir, m.stage.dir); err != nil {
		return err
	}
	if err := img.AddFile("init", filepath.Join(m.stage.dir, "init")); err != nil {
		return err
	}
	if command := filepath.Join(m.stage.dir, "bin", "kernstream"); fileExists(command) {
		if err := img.AddFile("/usr/bin/kernstream", command); err != nil {
			return err
		}
	}
	programs, _ := findTools()
	if err := packTools(ctx, img, programs); err != nil {
		return err
	}
	if m.options.shell {
		busybox, err := fetchBusybox(ctx, m.archive, m.cache)
		if err != nil {
			return err
		}
		if err := img.AddFile(job.Busybox, busybox); err != nil {
			return err
		}
	}
	shared := filepath.Join(m.dir, "shared.cpio")
	file, err := os.Create(shared)
	if err != nil {
		return err
	}
	defer os.Remove(shared)
	if err := errors.Join(img.Write(file), file.Close()); err != nil {
		return err
	}
	for _, k := range m.kernels {
		if err := writeInitramfs(m.machine(k).initramfs, shared, k.modules, job.ModulesDir); err != nil {
			return err
		}
	}
	return nil
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func (m *matrix) machine(k *kernel) *machine {
	return &machine{kernel: k, initramfs: filepath.Join(m.dir, "initramfs-"+k.line), memory: m.options.memory}
}

// run runs the job on all kernels: on the host first, so that its tests have
// the processors for themselves, and then in the virtual machines.
func (m *matrix) run(ctx context.Context) ([]*column, error) {
	var columns []*column
	for _, k := range m.kernels {
		v, err := parseVersion(k.line)
		if err != nil {
			return nil, err
		}
		columns = append(columns, &column{Name: k.line, Version: v})
	}
	if m.host {
		v, err := hostVersion()
		if err != nil {
			return nil, err
		}
		c := &column{Name: hostName, Version: v}
		columns = append(columns, c)
		runHost(ctx, m.stage.dir, m.options.timeout, m.collector(c))
	}
	slots := make(chan struct{}, m.jobs())
	var wg sync.WaitGroup
	for i, k := range m.kernels {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			runKernel(ctx, m.machine(k), m.dir, m.options.timeout, m.collector(columns[i]))
		})
	}
	wg.Wait()
	return columns, nil
}

func (m *matrix) collector(c *column) *collector {
	return &collector{column: c, verbose: func(pass, line string) {
		if m.options.verbose {
			fmt.Printf("%s %s: %s\n", c.Name, pass, strings.ReplaceAll(line, marker, ""))
		}
	}}
}

// jobs is how many virtual machines run at a time.
func (m *matrix) jobs() int {
	if m.options.jobs > 0 {
		return m.options.jobs
	}
	n := runtime.NumCPU()
	if free := freeMemory(); free > 0 {
		// qemu itself needs memory, too, and so does the initramfs.
		n = min(n, free/(m.options.memory+512))
	}
	return max(1, n)
}

// freeMemory returns how many MiB the host can spare, 0 if it does not say.
func freeMemory() int {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) >= 2 && fields[0] == "MemAvailable:" {
			kib, err := strconv.Atoi(fields[1])
			if err != nil {
				return 0
			}
			return kib >> 10
		}
	}
	return 0
}

// finish prints what came out, and writes or checks the report.
func (m *matrix) finish(columns []*column) (ok bool, err error) {
	printFailures(os.Stdout, columns)
	printUnsteady(os.Stdout, columns)
	if m.options.ignoreVersions {
		printNeedless(os.Stdout, columns)
	}
	printSummary(os.Stdout, columns)
	ok, results := true, 0
	for _, c := range columns {
		ok = ok && c.ok()
		for _, p := range c.Passes {
			results += len(p.Results)
		}
	}
	if results == 0 {
		return false, errors.New("no test ran")
	}
	hostComplete := m.host && os.Geteuid() == 0
	if m.options.report != "" {
		switch {
		case !ok:
			return false, fmt.Errorf("%s is not written: there are failures", m.options.report)
		case !hostComplete:
			return false, fmt.Errorf("%s is not written: only root can run all passes on the host", m.options.report)
		}
		if err := os.WriteFile(m.options.report, []byte(reportOf(columns)), 0o644); err != nil {
			return false, err
		}
	}
	if m.options.check == "" || !ok {
		return ok, nil
	}
	have, err := os.ReadFile(m.options.check)
	if err != nil {
		return false, err
	}
	left, err := compareReports(string(have), reportOf(columns), hostComplete)
	if len(left) > 0 {
		logf("%s: not compared: %s", m.options.check, strings.Join(left, ", "))
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", m.options.check, err)
	}
	return true, nil
}
