// Package completion tests that shells complete the command line of kernstream,
// by asking bash, zsh and fish themselves.
package completion

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a shell may take.
const patience = 60 * time.Second

// script writes the completion script of a shell, and returns its path.
func script(t *testing.T, shell string) string {
	t.Helper()
	if _, err := exec.LookPath(shell); err != nil {
		if os.Getenv("KERNSTREAM_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip("needs the program ", shell)
	}
	cmd := exec.Command("go", "run", "./cmd/kernstream", "completion", shell)
	cmd.Dir = "../.."
	text, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "_kernstream")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// output runs a program, in a directory with two files and a directory.
func output(t *testing.T, program string, args ...string) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = directory(t)
	cmd.Env = append(os.Environ(), "HOME="+cmd.Dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Errorf("%s: %v: %s", program, err, stderr.String())
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	slices.Sort(lines)
	return slices.Compact(lines)
}

func directory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "lounge"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"letter", "long letter"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A question is a command line up to the cursor, and the words that may stand
// there.
type question struct {
	line string
	want []string
	some bool // there may be more than want
}

func (q question) check(t *testing.T, got []string) {
	t.Helper()
	missing := slices.DeleteFunc(slices.Clone(q.want), func(word string) bool { return slices.Contains(got, word) })
	if len(missing) > 0 || !q.some && len(got) != len(q.want) {
		t.Errorf("%q: %q; want %q", q.line, got, q.want)
	}
}

// ownPID is that of a process that is there, not completed by another's that
// begins with it: the kernel gives numbers of at most seven digits.
var ownPID = fmt.Sprint(os.Getpid())

var questions = []question{
	{"", []string{"completion", "files", "help", "mounts", "record", "wait"}, true},
	{"mo", []string{"mounts"}, false},
	{"help wa", []string{"wait"}, false},
	{"mounts -ti", []string{"-timeout"}, false},
	{"mounts -on", []string{"-once"}, false},
	{"mounts -via ", []string{"auto", "fanotify", "mountinfo"}, false},
	{"mounts -via f", []string{"fanotify"}, false},
	{"mounts -json -once -pid ", []string{ownPID}, true},
	{"wait -any ", []string{ownPID}, true},
	{"files -type m", []string{"mount"}, false},
	{"files -events open,close_w", []string{"open,close_write"}, false},
	{"record -events open,cl", []string{"open,close", "open,close_nowrite", "open,close_write"}, false},
	{"files le", []string{"letter"}, false},
	{"files lon", []string{"long letter"}, false},
	{"record -- ba", []string{"bash"}, true},
	{"record -o x -- cat let", []string{"letter"}, false},
	{"completion ", []string{"bash", "fish", "zsh"}, false},
}

// bash calls the function as it does when a user presses the tab key.
func TestBash(t *testing.T) {
	path := script(t, "bash")
	for _, q := range append(questions, question{"mounts -via=f", []string{"fanotify"}, false}, question{"record -dir l", []string{"lounge"}, false}) {
		line := strings.ReplaceAll(q.line, "=", " = ")
		words := strings.Split("kernstream "+line, " ")
		args := append([]string{"--norc", "--noprofile", "-c", `
			source "$1"; shift
			complete -p kernstream >/dev/null
			COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
			_kernstream
			printf '%s\n' "${COMPREPLY[@]}"`, "bash", path}, words...)
		q.check(t, output(t, "bash", args...))
	}
}

// fish answers by its builtin complete.
func TestFish(t *testing.T) {
	path := script(t, "fish")
	for _, q := range append(questions, question{"mounts -via=f", []string{"-via=fanotify"}, false}, question{"record -dir l", []string{"lounge/"}, false}) {
		answers := output(t, "fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", path, "kernstream "+q.line)
		for i, answer := range answers {
			answers[i], _, _ = strings.Cut(answer, "\t") // the description
		}
		q.check(t, answers)
	}
}

// zsh completes in a terminal only, so one gets typed into. A key is bound to
// completing and then printing what is on the line: one word is put in place,
// of several only what they have in common.
func TestZsh(t *testing.T) {
	path := script(t, "zsh")
	terminal, child := openTerminal(t)
	cmd := exec.CommandContext(t.Context(), "zsh", "-f", "-i")
	cmd.Dir = directory(t)
	cmd.Env = append(os.Environ(), "HOME="+cmd.Dir, "TERM=dumb", "PS1=")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = child, child, child
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child.Close()
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	said := &transcript{t: t, terminal: terminal}
	said.write("autoload -Uz compinit; compinit -u -D; source " + path + "; setopt no_beep no_list_ambiguous; unsetopt auto_list auto_menu\n" +
		"answer() { zle complete-word; print -r -- \"answer <$BUFFER>\"; BUFFER=; }; zle -N answer; bindkey '^T' answer\n" +
		"print re''ady\n")
	said.await("ready")
	for line, want := range map[string]string{
		"mo":                          "mounts ",
		"help wa":                     "help wait ",
		"files -ty":                   "files -type=", // which goes away when something is typed
		"mounts -on":                  "mounts -once ",
		"mounts -via f":               "mounts -via fanotify ",
		"mounts -via=f":               "mounts -via=fanotify ",
		"files -type m":               "files -type mount ",
		"files -events open,close_w":  "files -events open,close_write,", // this, too
		"files let":                   "files letter ",
		"record -dir l":               "record -dir lounge/",
		"record -o x -- cat let":      "record -o x -- cat letter ",
		"hel":                         "help ",
		"files -pid 1 lon":            `files -pid 1 long\ letter `,
		"completion z":                "completion zsh ",
		"mounts -json -pid " + ownPID: "mounts -json -pid " + ownPID + " ",
		"wait -any " + ownPID:         "wait -any " + ownPID + " ",
	} {
		said.write("kernstream " + line + "\x14")
		said.await("answer <kernstream ")
		if got := said.await(">"); got != want && got+" " != want {
			t.Errorf("%q becomes %q; want %q", line, got, want)
		}
	}
}

// A transcript is what a terminal showed, as far as it was not looked at yet.
type transcript struct {
	t        *testing.T
	terminal *os.File
	text     string
}

func (s *transcript) write(text string) {
	s.t.Helper()
	if _, err := s.terminal.WriteString(text); err != nil {
		s.t.Fatal(err)
	}
}

// await reads until text comes, and returns what was before.
func (s *transcript) await(text string) string {
	s.t.Helper()
	s.terminal.SetReadDeadline(time.Now().Add(patience))
	for {
		if before, after, ok := strings.Cut(s.text, text); ok {
			s.text = after
			return before
		}
		piece := make([]byte, 4096)
		n, err := s.terminal.Read(piece)
		s.text += string(piece[:n])
		if err != nil {
			s.t.Fatalf("no %q: %v: %q", text, err, s.text)
		}
	}
}

// openTerminal returns both ends of a terminal.
func openTerminal(t *testing.T) (terminal, child *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	terminal = os.NewFile(uintptr(fd), "/dev/ptmx")
	t.Cleanup(func() { terminal.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	child, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return terminal, child
}
