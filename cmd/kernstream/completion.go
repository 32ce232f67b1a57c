package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/kernstream/kernstream"
)

// Completion: what a shell has to know is taken from the flags that the
// commands declare, so a flag that is there can be completed.

const completionHelp = `Prints a script that lets a shell complete commands, flags and their values. SHELL
is bash, zsh or fish.

examples:
  source <(kernstream completion bash)
        in ~/.bashrc; with zsh in place of bash in ~/.zshrc, after compinit
  kernstream completion fish > ~/.config/fish/completions/kernstream.fish
        for fish, once
`

// completionScripts make a script of all commands, by the name of the shell.
var completionScripts = map[string]func([]outline) string{
	"bash": bashCompletion,
	"zsh":  zshCompletion,
	"fish": fishCompletion,
}

func completion(_ context.Context, env *environment, args []string) error {
	flags := flag.NewFlagSet("completion", flag.ContinueOnError)
	const synopsis = "SHELL"
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "usage: kernstream completion %s\n\n%s", synopsis, completionHelp)
	}
	if err := parseOrExplain(env, flags, synopsis, args); err != nil {
		return err
	}
	script := completionScripts[flags.Arg(0)]
	if flags.NArg() != 1 || script == nil {
		return wrongUsage(flags, "for which shell? There are %s", strings.Join(meanings[synopsis].words, ", "))
	}
	outlines, err := outlineAll()
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(env.stdout, script(outlines))
	return err
}

// An outline is what can be written after the name of a command.
type outline struct {
	command
	flags    []flagOutline
	operands meaning
}

type flagOutline struct {
	name    string
	usage   string
	boolean bool // takes no value, or one after =
	value   meaning
}

// outlineAll asks all commands for their flags.
func outlineAll() ([]outline, error) {
	var all []outline
	for _, c := range commands() {
		o := outline{command: c}
		err := c.run(context.Background(), &environment{declared: o.fill}, nil)
		if !errors.Is(err, errDeclared) {
			return nil, fmt.Errorf("flags of %s: %v", c.name, err)
		}
		all = append(all, o)
	}
	return all, nil
}

func (o *outline) fill(synopsis string, flags *flag.FlagSet) {
	words := strings.Fields(synopsis)
	o.operands = meanings[words[len(words)-1]]
	flags.VisitAll(func(f *flag.Flag) {
		name, usage := flag.UnquoteUsage(f)
		boolean, ok := f.Value.(interface{ IsBoolFlag() bool })
		o.flags = append(o.flags, flagOutline{f.Name, usage, ok && boolean.IsBoolFlag(), meanings[name]})
	})
}

// A meaning is what a word of a command line can be. The zero value is
// anything.
type meaning struct {
	words []string // one of these
	list  bool     // several of them, with commas between
	is    wordKind
}

type wordKind int

const (
	isAnything wordKind = iota
	isProcess           // the number of a process
	isFile
	isDirectory
	isProgram // a program, and what it is called with
)

// meanings are those of the names that words have in the usage texts.
var meanings = map[string]meaning{
	"P":       {is: isProcess},
	"PID...":  {is: isProcess},
	"FILE":    {is: isFile},
	"PATH...": {is: isFile},
	"...)":    {is: isProgram}, // (-pid P | -- COMMAND ...)
	"WAY":     {words: mountWays()},
	"TYPE":    {words: slices.Sorted(maps.Keys(markTypes))},
	"EVENTS":  {words: fileEvents(watchable), list: true},
	"KINDS":   {words: fileEvents(recordable), list: true},
	"D":       {is: isDirectory},
	"SHELL":   {words: slices.Sorted(maps.Keys(completionScripts))},
}

func mountWays() []string {
	var names []string
	for _, way := range mountVias {
		names = append(names, way.String())
	}
	return names
}

// fileEvents returns the names of the bits of ops, and of those of two.
func fileEvents(ops kernstream.FileOp) []string {
	var names []string
	for name, both := range map[string]kernstream.FileOp{"close": kernstream.OpClose, "move": kernstream.OpMove} {
		if ops.Has(both) {
			names = append(names, name)
		}
	}
	for bit := range 64 {
		op := kernstream.FileOp(1) << bit
		name := op.String()
		if _, err := kernstream.ParseFileOp(name); err == nil && ops.Has(op) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// watchable are all events but those that ask for a permission, and the loss of
// events.
const watchable = ^(kernstream.OpOpenPerm | kernstream.OpAccessPerm | kernstream.OpOpenExecPerm | kernstream.OpPreAccess | kernstream.OpOverflow)

// bashCompletion returns a function for bash 4 and later. It uses nothing of
// the package bash-completion.
func bashCompletion(all []outline) string {
	var names []string
	var cases strings.Builder
	for _, o := range all {
		names = append(names, o.name)
		var flags []string
		for _, f := range o.flags {
			flags = append(flags, "-"+f.name)
			if !f.boolean {
				fmt.Fprintf(&cases, "\t%s:-%s) %s ;;\n", o.name, f.name, bashWords(f.value))
			}
		}
		fmt.Fprintf(&cases, "\t%s:*) if [[ $cur == -* && $flag != -- ]]; then _kernstream_words %s; else %s; fi ;;\n",
			o.name, quoted(strings.Join(append(flags, "-help"), " ")), bashWords(o.operands))
	}
	return fmt.Sprintf(`# Completion of kernstream for bash; made by "kernstream completion bash".

_kernstream_words() { COMPREPLY=($(compgen -W "$1" -- "$cur")); }

_kernstream_list() {
	local before=${cur%%"${cur##*,}"}
	compopt -o nospace 2>/dev/null
	COMPREPLY=($(compgen -P "$before" -W "$1" -- "${cur##*,}"))
}

_kernstream_files() {
	local IFS=$'\n'
	compopt -o filenames 2>/dev/null
	COMPREPLY=($(compgen -f -- "$cur"))
}

_kernstream_directories() {
	local IFS=$'\n'
	compopt -o filenames 2>/dev/null
	COMPREPLY=($(compgen -d -- "$cur"))
}

_kernstream_program() {
	if [[ $flag == -- && ${COMP_WORDS[COMP_CWORD-1]} != -- ]]; then
		_kernstream_files
	else
		COMPREPLY=($(compgen -c -- "$cur"))
	fi
}

_kernstream() {
	local cur=${COMP_WORDS[COMP_CWORD]} flag=${COMP_WORDS[COMP_CWORD-1]} i
	COMPREPLY=()
	# -flag=value is three words here.
	if [[ $cur == = ]]; then
		cur=
	elif [[ $flag == = ]]; then
		flag=${COMP_WORDS[COMP_CWORD-2]}
	fi
	[[ $flag == --?* ]] && flag=${flag#-}
	# Behind -- there are no flags.
	for ((i = 2; i < COMP_CWORD; i++)); do
		[[ ${COMP_WORDS[i]} == -- ]] && flag=--
	done
	if ((COMP_CWORD == 1)); then
		_kernstream_words %s
		return
	fi
	case ${COMP_WORDS[1]}:$flag in
	help:*) _kernstream_words %s ;;
%s	esac
}

complete -F _kernstream kernstream
`, quoted(strings.Join(append(names, "help"), " ")), quoted(strings.Join(names, " ")), cases.String())
}

func bashWords(m meaning) string {
	switch {
	case m.list:
		return "_kernstream_list " + quoted(strings.Join(m.words, " "))
	case len(m.words) > 0:
		return "_kernstream_words " + quoted(strings.Join(m.words, " "))
	case m.is == isProcess:
		return `_kernstream_words "$(cd /proc && echo [0-9]*)"`
	case m.is == isFile:
		return "_kernstream_files"
	case m.is == isDirectory:
		return "_kernstream_directories"
	case m.is == isProgram:
		return "_kernstream_program"
	}
	return ":"
}

// zshCompletion returns a function that can be sourced, or be the file
// _kernstream in a directory of fpath.
func zshCompletion(all []outline) string {
	var names, cases strings.Builder
	fmt.Fprintf(&names, "\t\t%s\n", quoted("help:"+helpSummary))
	for _, o := range all {
		fmt.Fprintf(&names, "\t\t%s\n", quoted(o.name+":"+o.summary))
		fmt.Fprintf(&cases, "\t%s)\n\t\t_arguments -S : \\\n", o.name)
		for _, f := range o.flags {
			spec := fmt.Sprintf("-%s=[%s]:value:%s", f.name, zshText(f.usage), zshAction(f.value))
			if f.boolean {
				spec = fmt.Sprintf("-%s[%s]", f.name, zshText(f.usage))
			}
			fmt.Fprintf(&cases, "\t\t\t%s \\\n", quoted(spec))
		}
		// Where nothing can be said of operands, flags would not be completed.
		switch action := zshAction(o.operands); {
		case o.operands.is == isProgram:
			fmt.Fprintf(&cases, "\t\t\t%s \\\n\t\t\t%s\n", quoted("(-):operand:"+action), quoted("*::operand:_normal"))
		case action != zshNothing:
			fmt.Fprintf(&cases, "\t\t\t%s\n", quoted("*:operand:"+action))
		}
		cases.WriteString("\t\t;;\n")
	}
	return fmt.Sprintf(`#compdef kernstream
# Completion of kernstream for zsh; made by "kernstream completion zsh".

_kernstream_pids() { compadd -- /proc/[0-9]*(:t) }

_kernstream() {
	local -a commands
	commands=(
%s	)
	if ((CURRENT == 2)); then
		_describe -t commands command commands
		return
	fi
	shift words
	((CURRENT--))
	case $words[1] in
	help) _describe -t commands command commands ;;
%s	esac
}

if [[ $funcstack[1] == _kernstream ]]; then
	_kernstream "$@"
else
	compdef _kernstream kernstream
fi
`, names.String(), cases.String())
}

func zshAction(m meaning) string {
	switch {
	case m.list:
		return "_values -s , value " + strings.Join(m.words, " ")
	case len(m.words) > 0:
		return "(" + strings.Join(m.words, " ") + ")"
	case m.is == isProcess:
		return "_kernstream_pids"
	case m.is == isFile:
		return "_files"
	case m.is == isDirectory:
		return "_files -/"
	case m.is == isProgram:
		return "_command_names -e"
	}
	return zshNothing
}

// zshNothing completes nothing.
const zshNothing = " "

// zshText is a description within the brackets of an argument of _arguments.
func zshText(s string) string {
	return strings.NewReplacer(`\`, `\\`, "[", `\[`, "]", `\]`, ":", `\:`).Replace(s)
}

// fishCompletion returns commands for fish 3 and later.
func fishCompletion(all []outline) string {
	var b strings.Builder
	b.WriteString("# Completion of kernstream for fish; made by \"kernstream completion fish\".\n\ncomplete -c kernstream -f\n")
	var names []string
	for _, o := range all {
		names = append(names, o.name)
		fmt.Fprintf(&b, "complete -c kernstream -n __fish_use_subcommand -a %s -d %s\n", o.name, quoted(o.summary))
	}
	fmt.Fprintf(&b, "complete -c kernstream -n __fish_use_subcommand -a help -d %s\n", quoted(helpSummary))
	fmt.Fprintf(&b, "complete -c kernstream -n '__fish_seen_subcommand_from help' -a %s\n", quoted(strings.Join(names, " ")))
	for _, o := range all {
		within := "complete -c kernstream -n '__fish_seen_subcommand_from " + o.name + "'"
		action := fishAction(o.operands)
		if o.operands.is == isProgram {
			action = fishProgram(o)
		}
		if action != "" {
			fmt.Fprintf(&b, "%s%s\n", within, action)
		}
		for _, f := range o.flags {
			action := ""
			if !f.boolean {
				action = " -x" + fishAction(f.value)
			}
			if f.value.is == isFile {
				action = " -r -F"
			}
			fmt.Fprintf(&b, "%s -o %s%s -d %s\n", within, f.name, action, quoted(f.usage))
		}
	}
	return b.String()
}

func fishAction(m meaning) string {
	switch {
	case m.list:
		return ` -a "(__fish_complete_list , 'string split \" \" ` + strings.Join(m.words, " ") + `')"`
	case len(m.words) > 0:
		return " -a " + quoted(strings.Join(m.words, " "))
	case m.is == isProcess:
		return " -a '(__fish_complete_pids)'"
	case m.is == isFile:
		return " -F"
	case m.is == isDirectory:
		return " -a '(__fish_complete_directories)'"
	}
	return ""
}

// fishProgram completes a command line behind kernstream, the name of the command
// and its flags, of which fish must know those that take a value.
func fishProgram(o outline) string {
	action := " -a '(__fish_complete_subcommand --fcs-skip=2"
	for _, f := range o.flags {
		if !f.boolean {
			action += " -" + f.name
		}
	}
	return action + ")'"
}

// quoted returns s as one word of a shell.
func quoted(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
