package pidfd

import (
	"testing"

	"github.com/kernstream/kernstream/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
