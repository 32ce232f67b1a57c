package soak

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
)

// permissions are the questions whether files of a tmpfs may be opened, which a judge
// answers (see judge). Its book has each file, whose opener must get what the judge says
// that it gave, and what nobody gave by default; and the number of default answers must be
// what the watcher says.
type permissions struct {
	t        *testing.T
	dir      string
	clients  *program
	judge    *program
	deadline time.Duration
	told     chan *judgment
	ending   chan struct{} // closed when nobody receives from told

	mu        sync.Mutex
	files     int
	cases     map[int]*permissionCase
	gaps      int    // times in which there may be no watcher, and
	gapping   int    // how many of these have not ended
	defaulted uint64 // openers that got the default answer
	settling  bool   // the judge was asked whether all is told
}

// A permissionCase is one open.
type permissionCase struct {
	path   string
	rule   string
	gap    bool   // the watcher may have been replaced meanwhile: none was asked, or both
	over   bool   // it returned,
	passed bool   // with the file
	gave   string // what the judge says that it gave, each answer followed by a space
}

// A judgment is what a judge tells.
type judgment struct {
	When  time.Time
	words string
}

func (e *judgment) Time() time.Time { return e.When }
func (e *judgment) String() string  { return "judgment " + e.words }

// newPermissions returns nil where nobody can be let wait.
func newPermissions(t *testing.T) *permissions {
	if !permitted(t, "permissions", "permission events") {
		return nil
	}
	return &permissions{t: t, dir: testenv.MountDir(t), clients: startClients(t), cases: map[int]*permissionCase{}}
}

func (p *permissions) name() string { return "permissions" }

func (p *permissions) begin(ctx context.Context) (kernstream.Source, error) {
	p.deadline = time.Duration(20+rand.IntN(100)) * time.Millisecond
	p.told, p.ending, p.defaulted = make(chan *judgment), make(chan struct{}), 0
	p.judge = startProgram(p.t, judgeName, p.hear, p.dir, p.deadline.String(), strconv.Itoa(5+rand.IntN(30)))
	if _, err := p.judge.ask("measure"); err != nil { // it is there
		return nil, err
	}
	return kernstream.NewStream(ctx, func(ctx context.Context, emit func(*judgment) bool) error {
		for {
			select {
			case e := <-p.told:
				if !emit(e) {
					return ctx.Err()
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}), nil
}

// hear passes on what the judge tells.
func (p *permissions) hear(words string) {
	select {
	case p.told <- &judgment{time.Now(), words}:
	case <-p.ending:
	}
}

func (p *permissions) end() error {
	close(p.ending)
	return p.judge.end()
}

func (p *permissions) workers() int { return 2 }

func (p *permissions) act(ctx context.Context, random *rand.Rand) error {
	for ctx.Err() == nil {
		var work errgroup.Group
		if random.IntN(20) == 0 {
			work.Go(p.restart)
		}
		for range 1 + random.IntN(12) {
			rule := someRule(random)
			work.Go(func() error { return p.try(rule) })
		}
		if err := work.Wait(); err != nil {
			return err
		}
	}
	return nil
}

// someRule returns a rule; most answer at once.
func someRule(random *rand.Rand) string {
	switch random.IntN(200) {
	case 0:
		return ruleSlow
	case 1, 2:
		return ruleHeld
	}
	return [...]string{ruleAllow, ruleAllow, ruleAllow, ruleDeny, ruleDeny, ruleDeny, ruleClosed, ruleTwice, ruleTwice, ruleLate}[random.IntN(10)]
}

// restart lets the judge go on with another watcher. Those who wait get the default
// answer, and there is none for a moment.
func (p *permissions) restart() error {
	p.mu.Lock()
	p.gaps++
	p.gapping++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.gapping--
		p.mu.Unlock()
	}()
	_, err := p.judge.ask("restart")
	return err
}

// try lets another process open a file, which is treated by a rule.
func (p *permissions) try(rule string) error {
	p.mu.Lock()
	p.files++
	number, gaps := p.files, p.gaps-p.gapping
	c := &permissionCase{path: fmt.Sprintf("%s/%s-%d", p.dir, rule, number), rule: rule}
	p.cases[number] = c
	p.mu.Unlock()
	// mknod(2) does not open.
	if err := unix.Mknod(c.path, unix.S_IFREG|0o644, 0); err != nil {
		return fmt.Errorf("mknod %s: %w", c.path, err)
	}
	got, err := p.clients.client(doOpen, c.path)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.over, c.passed, c.gap = true, got.errno == 0, p.gaps != gaps
	// Two deadlines are what the watcher promises. Each of its guests has its own.
	if most := (guests+1)*2*p.deadline + *late; got.took > most || got.errno != 0 && got.errno != unix.EPERM {
		return fmt.Errorf("open %s: %v after %v; want an answer within %v", c.path, got.errno, got.took, most)
	}
	return nil
}

// guest lets the judge have another watcher of the same files, which allows everything.
func (p *permissions) guest(ctx context.Context, _ *rand.Rand) error {
	end, _ := ctx.Deadline()
	answer, err := p.judge.ask("guest", time.Until(end).Microseconds())
	if err == nil && answer != done {
		err = errors.New(answer)
	}
	return err
}

func (p *permissions) take(e kernstream.Event) (mine bool, things int, err error) {
	j, ok := e.(*judgment)
	if !ok {
		return false, 0, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var number int
	var gave string
	var defaulted uint64
	if _, err := fmt.Sscanf(j.words, "gave %d %s", &number, &gave); err == nil {
		return true, 1, p.gave(number, gave)
	}
	if _, err := fmt.Sscanf(j.words, "settled %d", &defaulted); err == nil {
		return true, 0, p.settle(defaulted)
	}
	return true, 0, errors.New("the judge is not content")
}

// gave writes down what the judge says that it gave.
func (p *permissions) gave(number int, gave string) error {
	c := p.cases[number]
	switch {
	case c == nil:
		return errors.New("nobody asked")
	case gave == gaveAllow && (c.rule == ruleDeny || c.rule == ruleClosed || c.rule == ruleHeld), gave == gaveDeny && c.rule != ruleDeny && c.rule != ruleTwice:
		return errors.New("this is not the rule")
	}
	c.gave += gave + " "
	return nil
}

// settle compares what the openers got with what the judge gave, who has told of all that
// he has received, and the number of default answers.
func (p *permissions) settle(defaulted uint64) (err error) {
	p.settling = false
	for number, c := range p.cases {
		if !c.over {
			continue
		}
		delete(p.cases, number)
		err = errors.Join(err, c.check(), unix.Unlink(c.path))
		if !c.passed && !c.denied() {
			p.defaulted++
		}
	}
	if p.defaulted != defaulted {
		err = errors.Join(err, fmt.Errorf("%d have got the default answer; Defaulted is %d", p.defaulted, defaulted))
	}
	return err
}

// check says if an opener did not get what it should.
func (c *permissionCase) check() error {
	refused := strings.Contains(c.gave, gaveDeny) || strings.Contains(c.gave, gaveDefault)
	allowed := strings.Contains(c.gave, gaveAllow)
	switch {
	case c.passed && refused, strings.Count(c.gave, " ") > 1 && !c.gap:
	case c.gap, c.passed == allowed:
		return nil
	}
	return fmt.Errorf("%s: opened: %v; the judge gave %q, another watcher: %v", c.path, c.passed, c.gave, c.gap)
}

// denied tells whether an answer of the consumer's was not to open the file.
func (c *permissionCase) denied() bool { return strings.Contains(c.gave, gaveDeny) }

// open counts the opens that are not settled. When all are over, the judge is asked.
func (p *permissions) open() (n int, example string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.cases {
		example = fmt.Sprintf("%s: over: %v, opened: %v; the judge gave %q", c.path, c.over, c.passed, c.gave)
	}
	if len(p.cases) > 0 && !p.settling {
		p.settling = true
		go p.judge.ask("settle")
	}
	return len(p.cases), example
}

func (p *permissions) lost() int { return 0 }

// elsewhere says what the judge has open and running.
func (p *permissions) elsewhere() string {
	answer, err := p.judge.ask("show")
	if text, err2 := strconv.Unquote(answer); err2 == nil {
		answer = text
	}
	return fmt.Sprintln(answer, err)
}

// queued is how much that is.
func (p *permissions) queued() int {
	answer, err := p.judge.ask("measure")
	n, err2 := strconv.Atoi(answer)
	if err != nil || err2 != nil {
		return math.MaxInt32
	}
	return n
}
