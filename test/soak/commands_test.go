package soak

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"time"

	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// recorderName is a program that records commands. A command has all mounts of the
// recorder's namespace, and marking one of a FUSE file system waits for its server: that
// must be another process.
const recorderName = "recorder"

// A commandRecord is what it answers.
type commandRecord struct {
	Opened   []string // in the order of first opens
	Complete bool
	Reasons  []string
	Left     bool // before the end of the command
	Error    string
}

func init() {
	testenv.RegisterChild(recorderName, func([]string) int {
		obey(func(words []string) string {
			life, _ := strconv.Atoi(words[0])
			answer, err := recordCommand(time.Duration(life)*time.Microsecond, words[1:])
			if err != nil {
				answer.Error = err.Error()
			}
			text, err := json.Marshal(&answer)
			if err != nil {
				panic(err)
			}
			return string(text)
		})
		return 0
	})
}

// recordCommand records a command that opens files. It may leave that at once, or when
// life is over.
func recordCommand(life time.Duration, files []string) (got commandRecord, err error) {
	begin := time.Now()
	cmd := exec.Command("cat", append([]string{"/dev/null"}, files...)...)
	r, err := record(context.Background(), recorder.Command(cmd), nil)
	if err != nil {
		return got, err
	}
	defer cmd.Wait()
	defer r.Close()
	got.Left = rand.IntN(4) == 0
	for !got.Left {
		a, more := <-r.C
		if !more {
			break
		}
		a.Close()
		got.Left = time.Since(begin) > life && rand.IntN(2) == 0
	}
	r.Close()
	list, err := r.List()
	if err != nil {
		return got, err
	}
	for i := range list.Entries {
		got.Opened = append(got.Opened, list.Entries[i].Path)
	}
	got.Complete, got.Reasons = list.Complete, list.Reasons
	return got, nil
}
