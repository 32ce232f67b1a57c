// This file boots kernels under qemu.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kernstream/kernstream/test/kernels/job"
)

const (
	qemu        = "qemu-system-x86_64"
	qemuPackage = "qemu-system-x86"
	// maxRecord bounds one line from the serial port.
	maxRecord = 1 << 20
	// consoleLines is how much of the console is shown when a machine stopped
	// by itself.
	consoleLines = 15
)

// machine describes a virtual machine.
type machine struct {
	kernel    *kernel
	initramfs string
	memory    int // MiB
}

// args returns the command line of qemu, without the serial ports. The
// processor is emulated: KVM is not to be had everywhere, and what works under
// emulation works there as well.
func (m *machine) args(console string) []string {
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		// One thread emulates both processors in turn. With two, one may run
		// for a moment what the other has just replaced, and a kernel, which
		// patches its own code, dies of its own breakpoint: "Oops: int3", once
		// in about a hundred boots. Two are not faster, either, while other
		// machines keep the host's processors busy.
		// Five levels of page tables only make the emulation slower.
		"-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max,la57=off",
		"-smp", "2", "-m", strconv.Itoa(m.memory),
		"-kernel", m.kernel.image, "-initrd", m.initramfs,
		// A restart ends qemu: so does, with these arguments, a kernel bug.
		// The emulated processor has a source of random numbers. On a busy host,
		// its timer may not tick while the kernel looks whether it does.
		"-append", "console=ttyS0 panic=-1 oops=panic mitigations=off random.trust_cpu=on no_timer_check " + console,
	}
}

// command returns qemu as a child that dies with this process. Whoever starts
// it must stay on the thread that did.
func (m *machine) command(ctx context.Context, console string, serial ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, qemu, append(m.args(console), serial...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Run boots the machine and passes the records that its init sends to handle,
// until the machine stops. The messages of the kernel go to the file console.
func (m *machine) Run(ctx context.Context, console string, handle func(job.Record)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := m.command(ctx, "loglevel=7",
		"-chardev", "file,id=console,path="+console, "-serial", "chardev:console",
		"-chardev", "stdio,id=records,signal=off", "-serial", "chardev:records")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	records, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	done, readErr := readRecords(records, handle)
	io.Copy(io.Discard, records)
	waitErr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case waitErr != nil:
		return fmt.Errorf("%s: %w: %s", qemu, waitErr, strings.TrimSpace(stderr.String()))
	case readErr != nil:
		return readErr
	case !done:
		return fmt.Errorf("the machine stopped before the tests ended; its messages:\n%s", lastWords(console))
	}
	return nil
}

// readRecords reads records, one per line, until the last one or the end.
func readRecords(r io.Reader, handle func(job.Record)) (done bool, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxRecord)
	for lines.Scan() {
		var rec job.Record
		if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
			return false, fmt.Errorf("record %q: %w", lines.Text(), err)
		}
		handle(rec)
		if rec.Kind == job.Done {
			return true, nil
		}
	}
	return false, lines.Err()
}

// Shell boots the machine with its console on the terminal.
func (m *machine) Shell(ctx context.Context) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := m.command(ctx, "quiet", "-serial", "mon:stdio", "-serial", "null")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// lastWords returns what the file console says about a kernel's end: the lines
// from the first report of a bug on, or else the last lines.
func lastWords(console string) string {
	text, err := os.ReadFile(console)
	if err != nil {
		return "    " + err.Error()
	}
	return "    " + strings.Join(pickLastWords(string(text)), "\n    ")
}

func pickLastWords(text string) []string {
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(text, "\r", "")), "\n")
	first := slices.IndexFunc(lines, func(line string) bool {
		return strings.Contains(line, "BUG: ") || strings.Contains(line, "Kernel panic")
	})
	if first < 0 {
		first = max(0, len(lines)-consoleLines)
	}
	return lines[first:min(len(lines), first+consoleLines)]
}

// runKernel runs the job on one kernel, within a time limit.
func runKernel(ctx context.Context, m *machine, dir string, limit time.Duration, c *collector) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("took longer than %v", limit))
	defer cancel()
	console := filepath.Join(dir, "console-"+m.kernel.line+".log")
	c.column.Console = console
	c.Close(m.Run(ctx, console, c.Handle))
}

// keepConsole moves the log of a kernel that brought failures to the cache, and
// forgets the others.
func keepConsole(c *column, cache string) error {
	console := c.Console
	if c.Console = ""; console == "" || c.ok() {
		return nil
	}
	text, err := os.ReadFile(console)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, "logs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	c.Console = filepath.Join(dir, filepath.Base(console))
	return os.WriteFile(c.Console, text, 0o644)
}
