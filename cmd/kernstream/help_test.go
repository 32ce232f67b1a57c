package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kernstream/kernstream"
)

// outlines returns what all commands say of themselves.
func outlines(t *testing.T) []outline {
	t.Helper()
	all, err := outlineAll()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 4 || len(all[0].flags) < 8 {
		t.Fatalf("%d commands, and %d flags of the first", len(all), len(all[0].flags))
	}
	return all
}

// checkLine fails when the command would not take the flags of a command line.
// A line may go on after a | with another program's.
func checkLine(t *testing.T, line string) {
	t.Helper()
	line, _, _ = strings.Cut(line, " | ")
	words := strings.Fields(line)
	i := slices.IndexFunc(commands(), func(c command) bool { return c.name == words[1] })
	if i < 0 {
		t.Errorf("%q: there is no such command", line)
		return
	}
	var parsed error
	commands()[i].run(t.Context(), &environment{declared: func(_ string, flags *flag.FlagSet) {
		flags.SetOutput(io.Discard)
		parsed = flags.Parse(words[2:])
	}}, nil)
	if parsed != nil {
		t.Errorf("%q: %v", line, parsed)
	}
}

// TestHelp: each command has help with examples that it would take, and the list
// of commands has all of them.
func TestHelp(t *testing.T) {
	list := kernstreamRun(t, "help")
	examples := regexp.MustCompile(`(?m)^  (kernstream .*)$`)
	for _, o := range outlines(t) {
		if !regexp.MustCompile(`(?m)^  ` + o.name + ` +` + regexp.QuoteMeta(o.summary) + `$`).MatchString(list.stdout) {
			t.Errorf("%s is not in the list:\n%s", o.name, list.stdout)
		}
		help := kernstreamRun(t, o.name, "-help")
		if again := kernstreamRun(t, "help", o.name); again != help || help.status != 0 || help.stderr != "" {
			t.Errorf("help %s and %[1]s -help differ, or fail: %v, %v", o.name, again, help)
		}
		if o.name == "completion" {
			continue // examples for other programs
		}
		lines := examples.FindAllStringSubmatch(help.stdout, -1)
		if len(lines) < 2 {
			t.Errorf("%s has %d examples", o.name, len(lines))
		}
		for _, line := range lines {
			checkLine(t, line[1])
		}
	}
	for _, line := range examples.FindAllStringSubmatch(list.stdout, -1) {
		checkLine(t, line[1][:strings.Index(line[1]+"   ", "   ")])
	}
	if r := kernstreamRun(t, "help", "nothing"); r.status != exitUsage || !strings.Contains(r.stderr, `unknown command "nothing"`) {
		t.Errorf("help for what is not there: %v", r)
	}
}

// TestManual: the manual has the flags of each command, and no others; its
// examples are command lines that work.
func TestManual(t *testing.T) {
	text, err := os.ReadFile("kernstream.1")
	if err != nil {
		t.Fatal(err)
	}
	_, description, _ := strings.Cut(string(text), ".Sh DESCRIPTION\n")
	description, rest, _ := strings.Cut(description, ".Sh ENVIRONMENT\n")
	sections := map[string]string{}
	for _, section := range strings.Split(description, ".Ss ")[1:] {
		name, body, _ := strings.Cut(section, "\n")
		sections[strings.TrimPrefix(name, "kernstream ")] = body
	}
	item := regexp.MustCompile(`(?m)^\.It Fl (\S+)`)
	described := func(section string) (names []string) {
		for _, match := range item.FindAllStringSubmatch(sections[section], -1) {
			names = append(names, match[1])
		}
		return names
	}
	for _, o := range outlines(t) {
		if _, ok := sections[o.name]; !ok {
			t.Errorf("the manual has no section on %s", o.name)
		}
		want := described(o.name)
		var have []string
		for _, f := range o.flags {
			if have = append(have, f.name); slices.Contains(described("Common flags"), f.name) {
				want = append(want, f.name)
			}
		}
		slices.Sort(want)
		if slices.Sort(have); !slices.Equal(have, want) {
			t.Errorf("%s has the flags %q; the manual describes %q", o.name, have, want)
		}
	}
	lines := regexp.MustCompile(`(?m)^\.Dl (kernstream .*)$`).FindAllStringSubmatch(rest, -1)
	if len(lines) < 3 {
		t.Errorf("the manual has %d examples", len(lines))
	}
	for _, line := range lines {
		checkLine(t, strings.ReplaceAll(line[1], `\-`, "-"))
	}
	for status := range exitIncomplete + 1 {
		if !strings.Contains(rest, fmt.Sprintf(".It %d\n", status)) {
			t.Errorf("the manual does not say what exit status %d is", status)
		}
	}
}

// TestCompletion: the script for each shell has every command and every flag,
// and one for no shell is refused. (Package completion in tools asks the shells
// themselves.)
func TestCompletion(t *testing.T) {
	for shell, flagForm := range map[string]string{"bash": "-%s", "zsh": "-%s", "fish": "-o %s "} {
		r := kernstreamRun(t, "completion", shell)
		if r.status != 0 || r.stderr != "" {
			t.Errorf("%s: status %d, %s", shell, r.status, r.stderr)
		}
		for _, o := range outlines(t) {
			if !strings.Contains(r.stdout, o.name) {
				t.Errorf("%s: no command %s", shell, o.name)
			}
			for _, f := range o.flags {
				if form := fmt.Sprintf(flagForm, f.name); !strings.Contains(r.stdout, form) {
					t.Errorf("%s: no flag %s of %s", shell, form, o.name)
				}
			}
		}
	}
	for _, args := range [][]string{nil, {"tcsh"}, {"bash", "zsh"}} {
		if r := kernstreamRun(t, append([]string{"completion"}, args...)...); r.status != exitUsage || !strings.Contains(r.stderr, "bash, fish, zsh") || r.stdout != "" {
			t.Errorf("completion %q: %v", args, r)
		}
	}
}

// TestCompletionValues: every flag whose value is one of a few words, or a
// process or a file, is completed as such, and the words are those that the
// command takes.
func TestCompletionValues(t *testing.T) {
	values := map[string]meaning{}
	for _, o := range outlines(t) {
		values[o.name] = o.operands
		for _, f := range o.flags {
			values[o.name+" "+f.name] = f.value
		}
	}
	for name, want := range map[string]wordKind{"mounts pid": isProcess, "files pid": isProcess, "wait": isProcess, "files": isFile, "record o": isFile, "record dir": isDirectory, "record tree": isProcess, "record": isProgram} {
		if values[name].is != want {
			t.Errorf("%s is %v; want kind %d", name, values[name], want)
		}
	}
	for name, want := range map[string]int{"mounts via": 3, "files type": 3, "completion": 3, "files events": 19, "record events": 8} {
		if got := values[name]; len(got.words) < want || got.list != strings.HasSuffix(name, " events") {
			t.Errorf("%s is %v; want %d words or more", name, got, want)
		}
	}
	for _, kind := range values["record events"].words {
		if ops, err := kernstream.ParseFileOp(kind); err != nil || ops&^recordable != 0 {
			t.Errorf("%q is completed, and no access: %v", kind, err)
		}
	}
	// A word that is none is complained of before anything is watched.
	for _, words := range [][]string{values["files events"].words, values["files type"].words, values["mounts via"].words} {
		if slices.Contains(words, "") || slices.Contains(words, "open_perm") || slices.Contains(words, "q_overflow") {
			t.Errorf("not all of these can be used: %q", words)
		}
	}
}

// TestOutlineDoesNothing: a command that is asked for its flags ends at once.
func TestOutlineDoesNothing(t *testing.T) {
	for _, c := range commands() {
		asked := 0
		err := c.run(t.Context(), &environment{declared: func(string, *flag.FlagSet) { asked++ }}, []string{"-bad", "operand"})
		if !errors.Is(err, errDeclared) || asked != 1 {
			t.Errorf("%s: %v, asked %d times", c.name, err, asked)
		}
	}
}
