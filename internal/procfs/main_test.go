package procfs_test

import (
	"io"
	"os"
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.MainInNamespace(m) }

// wait is a child that does nothing until its standard input ends.
const wait = "wait"

func init() {
	testenv.RegisterChild(wait, func([]string) int {
		io.Copy(io.Discard, os.Stdin)
		return 0
	})
}
