package soak

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/testenv"
)

// A program is a child of the test that obeys lines: each has a number and words,
// and is answered by one with the same number. What the program tells without being
// asked has the number 0.
type program struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	ended chan struct{} // closed when it says no more

	asking sync.Mutex // held while a line is written

	mu      sync.Mutex
	number  int
	waiting map[int]chan string
}

// startProgram starts a registered child. said gets what it tells without being
// asked, in order.
func startProgram(t testing.TB, name string, said func(words string), args ...string) *program {
	t.Helper()
	p := &program{cmd: testenv.Child(t, name, args...), ended: make(chan struct{}), waiting: map[int]chan string{}}
	var out *bufio.Reader
	p.stdin, out = testenv.StartPiped(t, p.cmd)
	go func() {
		defer close(p.ended)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			first, words, _ := strings.Cut(lines.Text(), " ")
			if first == "0" {
				said(words)
			} else if number, err := strconv.Atoi(first); err == nil {
				p.answered(number, words)
			}
		}
	}()
	return p
}

func (p *program) answered(number int, words string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if answer := p.waiting[number]; answer != nil {
		delete(p.waiting, number)
		answer <- words
	}
}

// ask lets the program do something, and returns its answer.
func (p *program) ask(words ...any) (string, error) {
	answer := make(chan string, 1)
	p.mu.Lock()
	p.number++
	number := p.number
	p.waiting[number] = answer
	p.mu.Unlock()
	p.asking.Lock()
	_, err := fmt.Fprintln(p.stdin, append([]any{number}, words...)...)
	p.asking.Unlock()
	if err != nil {
		return "", err
	}
	select {
	case words := <-answer:
		return words, nil
	case <-p.ended:
	}
	select {
	case words := <-answer: // its last one
		return words, nil
	default:
		return "", errors.New("the program is gone")
	}
}

// end lets the program come to its end.
func (p *program) end() error {
	p.stdin.Close()
	<-p.ended
	return p.cmd.Wait()
}

// obey answers each line of the standard input by do, on a goroutine of its own,
// until there are no more.
func obey(do func(words []string) string) {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := strings.Fields(lines.Text())
		go func() { say(words[0], do(words[1:])) }()
	}
}

// tell says something without being asked.
func tell(words ...any) { say("0", words...) }

var saying sync.Mutex

func say(number string, words ...any) {
	line := append([]byte(number+" "), fmt.Sprintln(words...)...)
	saying.Lock()
	defer saying.Unlock()
	os.Stdout.Write(line)
}

// clients is a program whose threads use files.
const clients = "clients"

// What clients do with a file.
const (
	doOpen = "open"
	doStat = "stat"
)

func init() {
	testenv.RegisterChild(clients, func(args []string) int {
		most, err := time.ParseDuration(args[0])
		if err != nil {
			panic(err)
		}
		obey(func(words []string) string {
			// Nothing else helps who waits in the kernel.
			hung := time.AfterFunc(most, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
			defer hung.Stop()
			begin := time.Now()
			err := use(words[0], words[1])
			took := time.Since(begin)
			errno, _ := errors.AsType[syscall.Errno](err)
			return fmt.Sprint(uint(errno), int64(took))
		})
		return 0
	})
}

// use does something with a file, and keeps nothing of it.
func use(what, path string) error {
	if what == doStat {
		var st unix.Stat_t
		return unix.Stat(path, &st)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// startClients starts clients that end with the test. They are killed when a file takes
// longer than anything may take.
func startClients(t testing.TB) *program {
	t.Helper()
	p := startProgram(t, clients, func(string) {}, patient.String())
	t.Cleanup(func() { p.end() })
	return p
}

// used is what came of using a file.
type used struct {
	errno syscall.Errno // 0: it was
	took  time.Duration
}

// client lets a client do something with a file.
func (p *program) client(what, path string) (u used, err error) {
	answer, err := p.ask(what, path)
	if err != nil {
		return u, err
	}
	var errno uint
	_, err = fmt.Sscan(answer, &errno, (*int64)(&u.took))
	u.errno = syscall.Errno(errno)
	return u, err
}

// lookUp lets a client look up a name that is not there. The error is what it got if that
// is not the answer.
func (p *program) lookUp(path string) error {
	got, err := p.client(doStat, path)
	if err == nil && got.errno != unix.ENOENT {
		err = fmt.Errorf("stat: %w", got.errno)
	}
	return err
}
