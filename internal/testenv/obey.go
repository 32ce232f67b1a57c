package testenv

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// Children that do what they are told: they get lists of words, and answer each with
// a text or with the error of a system call, all as lines of JSON.

type obeyed struct {
	Errno syscall.Errno
	Text  string
}

// Ask tells a child that is in Obey to do something, and returns its answer.
func Ask(stdin io.Writer, stdout *bufio.Reader, words ...string) (string, error) {
	line, err := json.Marshal(words)
	if err != nil {
		return "", err
	}
	if _, err := stdin.Write(append(line, '\n')); err != nil {
		return "", err
	}
	reply, err := stdout.ReadBytes('\n')
	if err != nil {
		return "", err
	}
	var answer obeyed
	if err := json.Unmarshal(reply, &answer); err != nil {
		return "", err
	}
	if answer.Errno != 0 {
		return "", answer.Errno
	}
	return answer.Text, nil
}

// Obey is what a child does that is asked by Ask, until its standard input ends. It
// returns its exit status. An error of do that is not one of a system call ends it.
func Obey(do func(words []string) (string, error)) int {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var words []string
		if err := json.Unmarshal(lines.Bytes(), &words); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			return 1
		}
		text, err := do(words)
		errno, ok := errors.AsType[syscall.Errno](err)
		if err != nil && !ok {
			fmt.Fprintf(os.Stderr, "child: %q: %v\n", words, err)
			return 1
		}
		reply, _ := json.Marshal(obeyed{errno, text})
		os.Stdout.Write(append(reply, '\n'))
	}
	return 0
}
