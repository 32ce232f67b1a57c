package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream"
	"github.com/kernstream/kernstream/internal/testenv"
	"github.com/kernstream/kernstream/recorder"
)

// records are those of the files of a tmpfs that are opened. The book has each
// file, which must be told once, and each open, by which the lists of the recording
// and of its guests are judged: what was opened between the start and the end of a
// recording is in its list, or the list says that it is not complete, and why.
type records struct {
	dir      string
	clients  *program
	recorder *program // of commands
	r        *recorder.Recording

	mu       sync.Mutex
	files    int             // that there are, f1 and so on
	opened   []string        // files that were opened
	told     map[string]bool // whether that was told; it may be before the open returns
	openings []opening       // in the order of their ends
	clock    int             // counts the begins and ends of opens
	orders   [][]string      // of first opens, each list by one worker
}

// An opening is one open of a file.
type opening struct {
	path  string
	begin int // on the clock
}

// recordFiles is how many files a recording is told of.
const recordFiles = 5000

// newRecords returns nil where mounts cannot be marked.
func newRecords(t *testing.T) *records {
	if !permitted(t, "records", "marks of mounts") {
		return nil
	}
	p := &records{dir: testenv.MountDir(t), clients: startClients(t), recorder: startProgram(t, recorderName, func(string) {})}
	t.Cleanup(func() { p.recorder.end() })
	return p
}

// permitted tells whether a part that only root can have is there, and notes if not.
func permitted(t *testing.T, part, what string) (ok bool) {
	t.Run(part, func(t *testing.T) {
		testenv.NeedRoot(t, what)
		ok = true
	})
	return ok
}

func (p *records) name() string { return "records" }

func (p *records) begin(ctx context.Context) (_ kernstream.Source, err error) {
	p.files, p.opened, p.openings, p.orders, p.told = 0, nil, nil, nil, map[string]bool{}
	p.r, err = record(ctx, recorder.Directory(p.dir), nil)
	return p.r, err
}

func record(ctx context.Context, target recorder.Target, options *recorder.Options) (*recorder.Recording, error) {
	return patiently(func() (*recorder.Recording, error) { return recorder.Record(ctx, target, options) })
}

// end judges the list of the recording.
func (p *records) end() error {
	list, err := p.r.List()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	err = p.judge(list, p.openings, false)
	places := map[string]int{}
	for i := range list.Entries {
		places[p.dir+list.Entries[i].Path] = i
	}
	for _, order := range p.orders {
		if !slices.IsSortedFunc(order, func(a, b string) int { return places[a] - places[b] }) {
			err = errors.Join(err, errors.New("the list is not in the order of first opens"))
		}
	}
	files, _ := filepath.Glob(p.dir + "/*")
	for _, file := range files {
		err = errors.Join(err, os.Remove(file))
	}
	return err
}

// judge compares a list with the opens that it must have. cut allows that it is not
// complete, if it says so. p.mu is held.
func (p *records) judge(list *recorder.List, must []opening, cut bool) error {
	have := map[string]bool{}
	for i := range list.Entries {
		e := &list.Entries[i]
		path := p.dir + e.Path
		if have[path] || p.number(path) == 0 || !e.Ops.Has(kernstream.OpOpen) || e.Count == 0 {
			return fmt.Errorf("an odd entry: %v, %d times", e, e.Count)
		}
		have[path] = true
	}
	// Other parts mount in the same namespace.
	reasons := slices.DeleteFunc(slices.Clone(list.Reasons), func(why string) bool { return strings.Contains(why, "came and went before") })
	if list.Complete != (len(list.Reasons) == 0) || len(reasons) > 0 && !cut {
		return fmt.Errorf("complete: %v, because of %q", list.Complete, list.Reasons)
	}
	for _, o := range must {
		if len(reasons) == 0 && !have[o.path] {
			return fmt.Errorf("%s is not in the list, which has %d files and is complete", o.path, len(have))
		}
	}
	return nil
}

// number returns that of the file that path names; 0: there never was one. p.mu is
// held.
func (p *records) number(path string) int {
	var n int
	rest, ok := strings.CutPrefix(path, p.dir+"/f")
	if _, err := fmt.Sscan(rest, &n); !ok || err != nil || n < 1 || n > p.files {
		return 0
	}
	return n
}

func (p *records) workers() int { return 2 }

func (p *records) act(ctx context.Context, random *rand.Rand) error {
	var order []string
	for ctx.Err() == nil {
		path, fresh, err := p.choose(random)
		if err == nil {
			err = p.openFile(path)
		}
		if err != nil {
			return err
		}
		if fresh {
			order = append(order, path)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.orders = append(p.orders, order)
	return nil
}

// choose returns a file: one that was opened before, or a fresh one.
func (p *records) choose(random *rand.Rand) (path string, fresh bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.opened); p.files >= recordFiles || n > 0 && random.IntN(2) == 0 {
		return p.opened[random.IntN(n)], false, nil
	}
	p.files++
	path = fmt.Sprint(p.dir, "/f", p.files)
	return path, true, unix.Mknod(path, unix.S_IFREG|0o644, 0)
}

// openFile lets another process open a file, and writes that down.
func (p *records) openFile(path string) error {
	p.mu.Lock()
	p.clock++
	o := opening{path, p.clock}
	p.mu.Unlock()
	got, err := p.clients.client(doOpen, path)
	if err != nil || got.errno != 0 {
		return fmt.Errorf("open %s: %v, %w", path, got.errno, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clock++
	p.openings = append(p.openings, o)
	if _, known := p.told[path]; !known {
		p.told[path] = false
	}
	p.opened = append(p.opened, path)
	return nil
}

// guest is another recording.
func (p *records) guest(ctx context.Context, random *rand.Rand) error {
	switch random.IntN(4) {
	case 0:
		return p.command(ctx, random)
	case 1:
		return p.connection(ctx, random)
	}
	options := &recorder.Options{OneMount: random.IntN(2) == 0, Descriptors: random.IntN(4) == 0}
	if random.IntN(4) == 0 {
		options.MaxFiles = 1 + random.IntN(100)
	}
	r, err := record(context.Background(), recorder.Directory(p.dir), options)
	if err != nil {
		return err
	}
	return p.attend(ctx, r, options.MaxFiles > 0)
}

// attend receives from a recording until ctx is done, and judges its list.
func (p *records) attend(ctx context.Context, r *recorder.Recording, cut bool) error {
	defer r.Close()
	p.mu.Lock()
	begin, before := p.clock, len(p.openings)
	p.mu.Unlock()
	for ended := false; !ended; {
		select {
		case a := <-r.C:
			switch {
			case a != nil:
				a.Close()
			case !cut:
				return fmt.Errorf("a recording ended by %w", r.Err())
			default: // by a connection that a busy machine has given up
				ended = true
			}
		case <-ctx.Done():
			ended = true
		}
	}
	p.mu.Lock()
	var must []opening
	for _, o := range p.openings[before:] {
		if o.begin > begin {
			must = append(must, o)
		}
	}
	p.mu.Unlock()
	r.Close()
	list, err := r.List()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.judge(list, must, cut)
}

// connection is a recording by a server.
func (p *records) connection(ctx context.Context, random *rand.Rand) error {
	server, client, err := socketPair()
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() {
		served <- recorder.Serve(context.Background(), server, &recorder.ServeOptions{Target: recorder.Directory(p.dir)})
	}()
	r, err := recorder.Connect(context.Background(), client, nil)
	if err != nil {
		err = errors.Join(err, <-served)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.EMFILE) {
			return nil // the machine is too busy for a handshake, or all groups are taken
		}
		return err
	}
	defer func() { <-served }()
	return p.attend(ctx, r, true)
}

func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		defer f.Close()
		if conns[i], err = net.FileConn(f); err != nil {
			return nil, nil, err
		}
	}
	return conns[0], conns[1], nil
}

// command is the recording of a command that opens files, and that may be left before
// its end. Its mounts are its own, so nobody else is told.
func (p *records) command(ctx context.Context, random *rand.Rand) error {
	p.mu.Lock()
	var files []string
	for range min(len(p.opened), random.IntN(50)) {
		if path := p.opened[random.IntN(len(p.opened))]; !slices.Contains(files, path) {
			files = append(files, path)
		}
	}
	p.mu.Unlock()
	end, _ := ctx.Deadline()
	words := []any{time.Until(end).Microseconds()}
	for _, file := range files {
		words = append(words, file)
	}
	answer, err := p.recorder.ask(words...)
	if err != nil {
		return err
	}
	var got commandRecord
	if err := json.Unmarshal([]byte(answer), &got); err != nil || got.Error != "" {
		return fmt.Errorf("a command: %w %s", err, got.Error)
	}
	have := slices.DeleteFunc(got.Opened, func(path string) bool { return !strings.HasPrefix(path, p.dir+"/") })
	complete := len(got.Reasons) == 0
	switch {
	case complete != got.Complete, !complete && !got.Left:
		return fmt.Errorf("a command: complete: %v, because of %q", got.Complete, got.Reasons)
	case complete && !slices.Equal(have, files), len(have) > len(files), !slices.Equal(have, files[:len(have)]):
		return fmt.Errorf("a command opened %q; recorded are %q (%q)", files, have, got.Reasons)
	}
	return nil
}

func (p *records) take(e kernstream.Event) (mine bool, things int, err error) {
	a, ok := e.(*recorder.Access)
	if !ok {
		return false, 0, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	path := p.dir + a.Path
	switch {
	case p.number(path) == 0:
		err = errors.New("there never was such a file")
	case p.told[path]:
		err = errors.New("it was told already")
	}
	p.told[path] = true
	return true, 1, err
}

// open counts the files that were opened and not told.
func (p *records) open() (n int, example string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for path, told := range p.told {
		if !told {
			n++
			example = path
		}
	}
	return n, example
}

func (p *records) lost() int   { return 0 }
func (p *records) queued() int { return 0 }
