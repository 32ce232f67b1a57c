package procfs

import (
	"bytes"
	"strconv"
)

// A Stat is what /proc/PID/stat tells of a process, as far as this module uses
// it (see proc_pid_stat(5)).
type Stat struct {
	State     byte   // 'R', 'S', 'Z' and so on
	PPID      int    // the parent; 0: it has none, or none that this reader may see
	StartTime uint64 // in clock ticks since the boot
	ExitCode  uint32 // the status of a zombie as wait(2) gives it, 0 if the reader may not know

	// Permitted tells that the reader may know: a zombie waits for ever, and
	// the kernel says so (field wchan) to those who pass the check of ptrace(2)
	// alone. It is never set for a process that runs, nor in the last steps of one
	// that is a zombie already.
	Permitted bool
}

// The fields as proc_pid_stat(5) counts them. The first after the name of the
// command is the state.
const (
	statState     = 3
	statPPID      = 4
	statStartTime = 22
	statWchan     = 35
	statExitCode  = 52
)

// ParseStat decodes a /proc/PID/stat. The name of the command in it may hold
// anything, spaces and parentheses too.
func ParseStat(text []byte) (s Stat, ok bool) {
	end := bytes.LastIndexByte(text, ')')
	if end < 0 {
		return Stat{}, false
	}
	rest := bytes.TrimSuffix(text[end+1:], []byte("\n"))
	for i := statState; ; i++ {
		// Each field stands after one space.
		if len(rest) < 2 || rest[0] != ' ' {
			return Stat{}, false
		}
		field := rest[1:]
		if n := bytes.IndexByte(field, ' '); n >= 0 {
			field = field[:n]
		}
		rest = rest[1+len(field):]
		switch i {
		case statState:
			if ok = len(field) == 1; ok {
				s.State = field[0]
			}
		case statPPID:
			if ppid, number := parseUint(field, 31); number {
				s.PPID = int(ppid)
			}
		case statStartTime:
			s.StartTime, ok = parseUint(field, 64)
		case statWchan:
			var wchan uint64
			wchan, ok = parseUint(field, 64)
			s.Permitted = s.State == 'Z' && wchan != 0
		case statExitCode:
			var code uint64
			code, ok = parseUint(field, 32)
			s.ExitCode = uint32(code)
			return s, ok
		}
		if !ok {
			return Stat{}, false
		}
	}
}

func parseUint(field []byte, bits int) (uint64, bool) {
	n, err := strconv.ParseUint(string(field), 10, bits)
	return n, err == nil
}

// StatusTGID returns the process that a task belongs to, of a /proc/PID/status.
func StatusTGID(text []byte) (pid int, ok bool) {
	for line := range lines(text) {
		if value, found := bytes.CutPrefix(line, []byte("Tgid:")); found {
			n, ok := parseUint(bytes.TrimSpace(value), 31)
			return int(n), ok
		}
	}
	return 0, false
}
