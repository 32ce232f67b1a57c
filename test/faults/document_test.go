package faults

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

const document = "../../docs/faults.md"

// TestDocument: docs/faults.md is the table. -update writes it.
func TestDocument(t *testing.T) {
	want := report(all())
	if *update {
		if err := os.WriteFile(document, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat("../../go.mod"); err != nil {
		return // the test runs apart from the source, on another kernel say
	}
	have, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Errorf("%s is out of date: go test ./test/faults -update", document)
	}
}

// report is the document.
func report(faults []fault) string {
	var b strings.Builder
	fmt.Fprintln(&b, `# Faults

<!-- Written by "go test ./test/faults -run TestDocument -update". Do not edit. -->

What comes of a system call that fails, of a limit that is reached, of a file that is missing and of a process that is
stopped or killed. Each line is a test (`+"`go test ./test/faults`"+`), which also looks that nothing hangs, and that no descriptor
and no goroutine is left. "Is" stands for errors.Is; in quotes is what the text of the error has in it.`)
	source := ""
	for i := range faults {
		f := &faults[i]
		if f.source != source {
			source = f.source
			fmt.Fprintf(&b, "\n## %s\n\n| call | fault | outcome |\n| --- | --- | --- |\n", source)
		}
		outcome := f.outcome
		if f.says != "" {
			outcome += fmt.Sprintf(": %q", f.says)
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", f.doing, f.fault+f.condition(), outcome)
	}
	return b.String()
}

// condition says where the outcome holds.
func (f *fault) condition() string {
	var conditions []string
	if f.kernel != [2]int{} {
		conditions = append(conditions, fmt.Sprintf("from Linux %d.%d on", f.kernel[0], f.kernel[1]))
	}
	if f.root {
		conditions = append(conditions, "as root")
	}
	if f.user {
		conditions = append(conditions, "in a user namespace")
	}
	if conditions == nil {
		return ""
	}
	return " (" + strings.Join(conditions, ", ") + ")"
}
