package recorder

import (
	"testing"
	"time"
)

// SetHandshake and SetStalled change limits for the length of a test.
func SetHandshake(tb testing.TB, d time.Duration) { set(tb, &handshake, d) }

func SetStalled(tb testing.TB, d time.Duration) { set(tb, &stalled, d) }

func set(tb testing.TB, limit *time.Duration, d time.Duration) {
	old := *limit
	*limit = d
	tb.Cleanup(func() { *limit = old })
}
