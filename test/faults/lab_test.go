package faults

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
)

// A lab is what a scenario has in its process.
type lab struct {
	dir  string   // a tmpfs of its own
	sub  string   // where files are made in it
	open *os.File // /proc/self/fd, which works without /proc, too

	victim *exec.Cmd // a process that obeys until it is told to end
	tell   io.WriteCloser
	told   *bufio.Reader
	file   *os.File // what prepare opened

	stranger int // a child of the victim
	id       kernstream.ProcessID

	limited bool  // what is to be had was limited
	fillers []int // descriptors that take the place of others
	limit   unix.Rlimit
	before  map[string]string
	began   goleak.Option
	helpers []func()
}

// must ends the scenario when err is one that it is not about.
func must(err error) {
	if err != nil {
		panic(broken{err})
	}
}

// broken is the panic of must.
type broken struct{ err error }

func newLab(dir string) *lab {
	l := &lab{dir: filepath.Join(dir, "lab")}
	must(os.Mkdir(l.dir, 0o755))
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(unix.Mount("lab", l.dir, "tmpfs", 0, ""))
	// So that the runtime has its own descriptors.
	r, w, err := os.Pipe()
	must(err)
	r.Close()
	w.Close()
	l.open, err = os.Open("/proc/self/fd")
	must(err)
	return l
}

// clear unmounts the lab. What a scenario did to the root directory or to
// /proc goes with the namespace.
func (l *lab) clear() { unix.Unmount(l.dir, unix.MNT_DETACH) }

func (l *lab) path(name string) string { return filepath.Join(l.dir, l.sub, name) }

// live prepares, injects and runs f, and returns the outcome.
func (l *lab) live(f *fault) (outcome string) {
	defer func() {
		if b, ok := recover().(broken); ok {
			outcome = fmt.Sprintf("broken: %v", b.err)
		}
	}()
	if f.prepare != nil {
		f.prepare(l)
	}
	l.before, l.began = l.descriptors(), goleak.IgnoreCurrent()
	defer l.release()
	if f.inject != nil {
		f.inject(l)
	}
	return f.run(l)
}

// release ends what the lab itself began.
func (l *lab) release() {
	l.feed()
	for _, stop := range l.helpers {
		stop()
	}
}

// descriptors maps each open descriptor to what it stands for.
func (l *lab) descriptors() map[string]string {
	_, err := l.open.Seek(0, io.SeekStart)
	must(err)
	names, err := l.open.Readdirnames(-1)
	must(err)
	open := map[string]string{}
	buf := make([]byte, 4096)
	for _, name := range names {
		if n, err := unix.Readlinkat(int(l.open.Fd()), name, buf); err == nil {
			open[name] = string(buf[:n])
		}
	}
	return open
}

// left lists what is open or runs that was not before, and does not end.
func (l *lab) left() (left []string) {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left = nil
		for fd, target := range l.descriptors() {
			if l.before[fd] == "" {
				left = append(left, fd+" -> "+target)
			}
		}
		if left == nil || time.Now().After(deadline) {
			break
		}
		runtime.GC()
	}
	if err := goleak.Find(l.began); err != nil {
		left = append(left, err.Error())
	}
	return left
}

// startVictim starts a process that ends with status 3 when l.kill is called.
func startVictim(l *lab) {
	l.victim = exec.Command("sh", "-c", "read line; exit 3")
	var err error
	l.tell, err = l.victim.StdinPipe()
	must(err)
	must(l.victim.Start())
}

// startOpener starts a victim that opens files, and that has opened what that takes.
func startOpener(l *lab) {
	l.victim = exec.Command("sh", "-c", `while read path; do if true <"$path"; then echo opened; else echo refused; fi; done`)
	var err error
	l.tell, err = l.victim.StdinPipe()
	must(err)
	out, err := l.victim.StdoutPipe()
	must(err)
	l.told = bufio.NewReader(out)
	must(l.victim.Start())
	openFile(l)
	l.opens(l.file.Name())
	must(l.opened())
}

// opens lets the victim open a file; opened returns what comes of it.
func (l *lab) opens(path string) {
	_, err := io.WriteString(l.tell, path+"\n")
	must(err)
}

func (l *lab) opened() error {
	line, err := l.told.ReadString('\n')
	if err == nil && line != "opened\n" {
		err = errRefused
	}
	return err
}

var errRefused = errors.New("refused")

// kill ends the victim.
func (l *lab) kill() { l.tell.Close() }

// tellToEnd is kill, without closing a descriptor.
func (l *lab) tellToEnd() {
	_, err := io.WriteString(l.tell, "\n")
	must(err)
}

// reap waits for the victim, even where os/exec cannot.
func (l *lab) reap() {
	if l.victim.Wait() != nil && l.victim.ProcessState == nil {
		var status unix.WaitStatus
		unix.Wait4(l.victim.Process.Pid, &status, 0, nil)
		l.victim.Process.Release()
	}
}

// watch calls begin until there is a fanotify group for it, if the fault is not
// that there is none: other tests may have all groups of the user for a moment.
func watch[W any](l *lab, begin func() (W, error)) (w W, err error) {
	for range 600 {
		if w, err = begin(); !errors.Is(err, unix.EMFILE) || l.limited || l.limit.Max != 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return w, err
}

// starve leaves room for so many descriptors, and no more.
func (l *lab) starve(free int) {
	must(unix.Getrlimit(unix.RLIMIT_NOFILE, &l.limit))
	highest := 0
	for name := range l.descriptors() {
		n, _ := strconv.Atoi(name)
		highest = max(highest, n)
	}
	for {
		fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
		must(err)
		if fd > highest {
			unix.Close(fd)
			break
		}
		l.fillers = append(l.fillers, fd)
	}
	must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(highest + 1 + free), Max: l.limit.Max}))
}

// feed ends what starve began.
func (l *lab) feed() {
	if l.limit.Max == 0 {
		return
	}
	must(unix.Setrlimit(unix.RLIMIT_NOFILE, &l.limit))
	for _, fd := range l.fillers {
		unix.Close(fd)
	}
	l.fillers, l.limit = nil, unix.Rlimit{}
}

// storm sends signals, for which there is a handler, to all threads until the
// scenario ends: what waits in the kernel is interrupted all the time.
func storm(l *lab) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		pid := unix.Getpid()
		for ctx.Err() == nil {
			tasks, _ := os.ReadDir("/proc/self/task")
			for _, task := range tasks {
				tid, _ := strconv.Atoi(task.Name())
				unix.Tgkill(pid, tid, unix.SIGURG) // the runtime handles it
			}
			time.Sleep(50 * time.Microsecond)
		}
	}()
	l.helpers = append(l.helpers, func() {
		cancel()
		<-done
	})
}

// whileStopped stops this process, lets a shell do something meanwhile, and lets
// it go on.
func whileStopped(script string) {
	cmd := exec.Command("sh", "-c", `kill -STOP "$PPID"; `+script+`; kill -CONT "$PPID"`)
	cmd.Stderr = os.Stderr
	must(cmd.Run())
}
