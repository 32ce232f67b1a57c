package kernstream

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/jsontext"
)

// Time returns e.When.
func (e *ProcessEvent) Time() time.Time { return e.When }

// String returns the event in one line: "process 4711: exited, status 3".
func (e *ProcessEvent) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "process %v: %v", e.Process, e.Phase)
	switch {
	case !e.StatusKnown:
		b.WriteString(", status unknown")
	case e.Status.Signaled():
		b.WriteString(", killed by " + signalName(e.Status.Signal()))
		if e.Status.CoreDump() {
			b.WriteString(" (core dumped)")
		}
	default:
		fmt.Fprintf(&b, ", status %d", e.Status.ExitStatus())
	}
	return b.String()
}

// signalName returns "SIGKILL" and the like, or "signal 40".
func signalName(s syscall.Signal) string {
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return fmt.Sprintf("signal %d", int(s))
}

// MarshalJSON returns the event as one JSON object, the one that kernstream
// wait -json prints.
func (e *ProcessEvent) MarshalJSON() ([]byte, error) {
	j := jsonProcessEvent{
		Time:        e.When.UTC(),
		Source:      "process",
		PID:         e.Process.PID,
		ID:          e.Process.ID,
		Phase:       e.Phase.String(),
		StatusKnown: e.StatusKnown,
	}
	switch {
	case !e.StatusKnown:
	case e.Status.Signaled():
		core := e.Status.CoreDump()
		j.Signal, j.Core = signalName(e.Status.Signal()), &core
	default:
		code := e.Status.ExitStatus()
		j.ExitCode = &code
	}
	return jsontext.Marshal(&j)
}

// What is not known is left out: of exit_code and signal, there is one at most.
type jsonProcessEvent struct {
	Time        time.Time `json:"time"`
	Source      string    `json:"source"`
	PID         int       `json:"pid,omitempty"`
	ID          uint64    `json:"id,omitempty"`
	Phase       string    `json:"phase"`
	StatusKnown bool      `json:"status_known"`
	ExitCode    *int      `json:"exit_code,omitempty"`
	Signal      string    `json:"signal,omitempty"`
	Core        *bool     `json:"core,omitempty"`
}
