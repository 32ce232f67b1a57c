package statmount_test

import (
	"io"
	"os"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// wait is a child that says when it runs, and ends when its standard input
// does.
const wait = "wait"

func init() {
	testenv.RegisterChild(wait, func([]string) int {
		os.Stdout.Write([]byte{'\n'})
		io.Copy(io.Discard, os.Stdin)
		return 0
	})
}
