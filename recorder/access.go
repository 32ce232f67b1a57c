package recorder

import (
	"math"
	"os"
	"strings"
	"time"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/jsontext"
)

// An Access is the first access to a file. With [Options.Descriptors] it has to be closed.
type Access struct {
	When  time.Time         // when it was read from the kernel
	First time.Duration     // since the recording began
	Path  string            // as the target sees it; the kernel's bytes, in no certain encoding
	Ops   kernstream.FileOp // what was done with it, first or at once with that
	PID   int               // 0: of another process ID namespace; over a connection, the number that it has at the server

	// File is open for reading, with Options.Descriptors; nil otherwise. It is closed
	// by Close, unless it is set to nil before.
	File *os.File
}

// Time returns a.When.
func (a *Access) Time() time.Time { return a.When }

// Close closes the file, if there is one. It may be called again, and returns nil.
func (a *Access) Close() error {
	if a.File != nil {
		a.File.Close()
	}
	return nil
}

// String returns the access in one line.
func (a *Access) String() string {
	return "record " + a.Ops.String() + " " + strings.ToValidUTF8(a.Path, "\uFFFD")
}

// MarshalJSON returns the access as one JSON object: path, events, and first, in seconds.
// If the path is not UTF-8, path_raw is the original in base64.
func (a *Access) MarshalJSON() ([]byte, error) {
	return jsontext.Marshal(jsonEntry{Path: a.Path, PathRaw: jsontext.Raw(a.Path), Events: opNames(a.Ops), First: seconds(a.First)})
}

// jsonEntry is a file in JSON; an Access has no count.
type jsonEntry struct {
	Path    string   `json:"path"`
	PathRaw []byte   `json:"path_raw,omitempty"`
	Events  []string `json:"events"`
	First   float64  `json:"first"`
	Count   uint64   `json:"count,omitempty"`
}

// seconds has nanoseconds for ten days, which is what a float64 holds.
func seconds(d time.Duration) float64 { return math.Round(float64(d)) / 1e9 }
