package kernstream

import (
	"context"
	"errors"
	"hash/maphash"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/procfs"
)

// How the fanotify path looks at the attributes of all mounts: it reads
// something cheap of all of them in the background, and asks statmount(2) for
// those of which that is different.
//
// In the own namespace that is the text of mountinfo, the cheapest that shows
// everything. A rescan of another namespace asks statmount for each mount, a few
// at a time, and so does one of a namespace whose text takes very long: it does
// where many mounts are slaves of large peer groups.

// mountRescan is the rescans of a fanotifySource.
type mountRescan struct {
	plan   rescanPlan
	source *fanotifySource
	timer  *time.Timer
	due    time.Time // what the timer is set to

	ctx    context.Context // of reading a text
	cancel context.CancelFunc
	seed   maphash.Seed
	texts  chan *mountSums // of the one that is being read
	busy   bool            // one is
	reader sync.WaitGroup

	slow  int // how many texts in a row took too long
	skip  int // how many rescans are to come before the next text
	spent time.Duration
	left  []uint64 // mounts that are to be asked for
}

// mountSums is a mountinfo text with a checksum for each row.
type mountSums struct {
	ids  []uint32
	sums []uint64
	took time.Duration
	err  error
}

func (r *mountRescan) init(source *fanotifySource) {
	r.source = source
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.seed = maphash.MakeSeed()
	r.texts = make(chan *mountSums, 1)
	r.timer = time.AfterFunc(time.Hour, func() { source.token(0) })
	r.timer.Stop()
}

// stop ends what goes on in the background.
func (r *mountRescan) stop() {
	r.timer.Stop()
	r.cancel()
	r.reader.Wait()
}

// step does what is to be done of rescans, and tells whether it found something
// that nobody else would have told.
func (r *mountRescan) step(ctx context.Context, now time.Time, d *mountDelta) (resync bool, err error) {
	if r.plan.begin(now) {
		if err := r.begin(); err != nil {
			return false, err
		}
	}
	select {
	case text := <-r.texts:
		if err := r.take(text); err != nil {
			return false, err
		}
	default:
	}
	if r.plan.running && !r.busy {
		found, err := d.found(func() error { return r.work(ctx, d) })
		if err != nil {
			return false, err
		}
		resync = found && r.plan.resync
		if len(r.left) == 0 {
			r.plan.end(time.Now(), r.spent)
		} else {
			r.source.token(0)
		}
	}
	r.schedule()
	return resync, nil
}

// schedule lets a token come when it is time for the next rescan.
func (r *mountRescan) schedule() {
	due := r.plan.due
	if r.plan.running {
		due = time.Time{}
	}
	switch {
	case due.Equal(r.due):
	case due.IsZero():
		r.timer.Stop()
	default:
		r.timer.Reset(time.Until(due))
	}
	r.due = due
}

func (r *mountRescan) begin() error {
	r.spent = 0
	if r.source.reader.Namespace != 0 || r.skip > 0 {
		r.skip = max(0, r.skip-1)
		return r.list()
	}
	r.busy = true
	r.reader.Go(func() {
		r.texts <- r.read()
		r.source.token(0)
	})
	return nil
}

// list lets all mounts be asked for.
func (r *mountRescan) list() error {
	begin := time.Now()
	ids, err := r.source.reader.List(r.left)
	r.left = ids
	r.spent += time.Since(begin)
	if err != nil && !r.source.dissolved() {
		return r.source.target.failed(err)
	}
	return nil
}

var errSlowText = errors.New("the text takes too long")

// read reads the text. It is called in the background.
func (r *mountRescan) read() *mountSums {
	text := &mountSums{}
	fd, err := r.source.target.open()
	if err != nil {
		text.err = err
		return text
	}
	defer unix.Close(fd)
	begin := time.Now()
	buf := make([]byte, snapshotBuffer)
	text.err = procfs.ReadRows(fd, buf, func(row []byte) error {
		id, sum := procfs.MountID(row), maphash.Bytes(r.seed, row)
		text.ids, text.sums = append(text.ids, id), append(text.sums, max(sum, 1))
		if n := len(text.ids); n%cancelSteps == 0 {
			if r.ctx.Err() != nil {
				return r.ctx.Err()
			}
			if time.Since(begin) > slowText+time.Duration(n)*slowRow {
				return errSlowText
			}
		}
		return nil
	})
	text.took = time.Since(begin)
	return text
}

// A text is slow if it takes longer than this, and per row.
const (
	slowText = 4 * time.Millisecond
	slowRow  = 10 * time.Microsecond
)

// take finds the mounts whose rows are not what they were.
func (r *mountRescan) take(text *mountSums) error {
	r.busy = false
	r.spent += text.took
	if text.err != nil {
		if r.ctx.Err() == nil {
			r.slow++
			r.skip = 1 << min(r.slow, 6)
		}
		return r.list()
	}
	r.slow = 0
	for i, id := range text.ids {
		// A row without a node is of a mount that an event will name.
		if n := r.source.tree.short[id]; n != nil && n.sum != text.sums[i] {
			n.sum = text.sums[i]
			r.left = append(r.left, n.id)
		}
	}
	return nil
}

// work asks for some of the mounts.
func (r *mountRescan) work(ctx context.Context, d *mountDelta) error {
	begin := time.Now()
	n := min(len(r.left), rescanSlice)
	for _, id := range r.left[:n] {
		r.source.touch(id, 0)
	}
	r.left = r.left[n:]
	err := r.source.settle(ctx, d)
	r.spent += time.Since(begin)
	return err
}

// rescanSlice is how many mounts are asked for at a time: events wait that long.
const rescanSlice = 256
