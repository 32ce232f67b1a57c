package testenv

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// RegisterMain makes the test binary behave as the program that it tests, when
// it is run by [StartProgram]. It is called by init functions.
func RegisterMain(name string, main func()) {
	RegisterChild(name, func(args []string) int {
		os.Args = append([]string{name}, args...)
		main()
		return 0
	})
}

// A Program is one that runs, and says what it does a line at a time.
type Program struct {
	Cmd   *exec.Cmd
	Stdin io.WriteCloser

	tb    testing.TB
	lines *bufio.Scanner // of standard output and error
}

// StartProgram runs a registered program. It ends with the test at the latest,
// and is killed when the test waits for it for too long.
func StartProgram(tb testing.TB, name string, args ...string) *Program {
	tb.Helper()
	cmd := Child(tb, name, args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	timer := time.AfterFunc(2*Patience, func() { cmd.Process.Kill() })
	tb.Cleanup(func() {
		timer.Stop()
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &Program{cmd, stdin, tb, bufio.NewScanner(out)}
}

// Line returns the next line.
func (p *Program) Line() string {
	p.tb.Helper()
	if !p.lines.Scan() {
		p.tb.Fatalf("%s says no more", p.Cmd.Args[0])
	}
	return p.lines.Text()
}

// Says fails the test unless these are the next lines.
func (p *Program) Says(lines ...string) {
	p.tb.Helper()
	for _, want := range lines {
		if got := p.Line(); got != want {
			p.tb.Fatalf("it says %q; want %q", got, want)
		}
	}
}

// Rest returns all further lines, when there can be no more.
func (p *Program) Rest() (lines []string) {
	for p.lines.Scan() {
		lines = append(lines, p.lines.Text())
	}
	return lines
}

// End waits until the program has ended by itself, without another line, and
// returns its exit status.
func (p *Program) End() int {
	p.tb.Helper()
	for _, line := range p.Rest() {
		p.tb.Errorf("it also says %q", line)
	}
	p.Cmd.Wait()
	return p.Cmd.ProcessState.ExitCode()
}

// Interrupt ends the program as Ctrl-C does, which must be a way to be done.
func (p *Program) Interrupt() {
	p.tb.Helper()
	p.Cmd.Process.Signal(syscall.SIGINT)
	if status := p.End(); status != 0 {
		p.tb.Errorf("status %d after an interrupt", status)
	}
}

// Fails runs a registered program that ends by itself with a failure, and
// returns what it says.
func Fails(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	cmd := Child(tb, name, args...)
	cmd.Stderr = nil
	out, err := cmd.CombinedOutput()
	if err == nil {
		tb.Errorf("%s %q does not fail, but says %q", name, args, out)
	}
	return string(out)
}
