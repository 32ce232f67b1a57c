package kernstream

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Process returns the process that the event is of, to be watched or opened.
//
// With [FileOptions.ReportPidFD] that is the process itself, for as long as the
// event is not closed; a pidfd that was opened from it stays. The error Is
// os.ErrProcessDone if the process had been reaped when the event was read, and
// os.ErrClosed after Close. Without ReportPidFD it is the process that has the
// number PID when it is opened, which may be a later one.
//
// The error Is errors.ErrUnsupported if the event does not say which process it
// was: see PID.
func (e *FileEvent) Process() (Target, error) {
	if e.own != nil {
		e.own.mu.Lock()
		pidfd, err := e.own.pidfd, e.own.pidfdErr
		e.own.mu.Unlock()
		switch {
		case pidfd >= 0:
			return eventTarget{e}, nil
		case err != nil:
			return nil, e.failed("open", fmt.Errorf("%s: %w", processName(e.PID), err))
		}
	}
	switch {
	case e.PID > 0:
		return PID(e.PID), nil
	case e.TID > 0:
		return nil, e.failed("open", fmt.Errorf("the event names thread %d, and not its process: %w", e.TID, errors.ErrUnsupported))
	}
	return nil, e.failed("open", fmt.Errorf("the event does not say which process it was: %w", errors.ErrUnsupported))
}

// An eventTarget is the process whose pidfd an event owns.
type eventTarget struct{ event *FileEvent }

func (t eventTarget) String() string { return processName(t.event.PID) }

func (t eventTarget) open() (openProcess, error) {
	own := t.event.own
	own.mu.Lock()
	defer own.mu.Unlock()
	if own.pidfd < 0 {
		return openProcess{}, processError("open", t.String(), own.pidfdErr)
	}
	fd, err := duplicate(uintptr(own.pidfd))
	if err != nil {
		return openProcess{}, processError("fcntl", t.String(), withLimit(err))
	}
	return newOpenProcess(fd, t.event.PID), nil
}

// setPidfd takes what the kernel gave as a pidfd.
func (e *FileEvent) setPidfd(pidfd int) {
	if e.own == nil {
		e.own = &fileDescriptors{fd: -1}
	}
	e.own.pidfd = max(pidfd, -1)
	switch {
	case pidfd == unix.FAN_NOPIDFD, pidfd == -int(unix.ESRCH):
		e.own.pidfdErr = goneError(unix.ESRCH)
	case pidfd == unix.FAN_EPIDFD:
		e.own.pidfdErr = errors.New("the kernel could not make a pidfd")
	case pidfd < 0:
		e.own.pidfdErr = fmt.Errorf("the kernel could not make a pidfd: %w", unix.Errno(-pidfd))
	}
}
