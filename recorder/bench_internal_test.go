package recorder

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func BenchmarkFull(b *testing.B) {
	dir := b.TempDir()
	if err := unix.Mount("x", dir, "tmpfs", 0, ""); err != nil {
		b.Skip(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	const n = 50000
	name := func(i int) string { return fmt.Sprintf("%s/%d/file-%d", dir, i/500, i) }
	for i := range n {
		if i%500 == 0 {
			os.Mkdir(fmt.Sprintf("%s/%d", dir, i/500), 0o755)
		}
		os.WriteFile(name(i), nil, 0o644)
	}
	for _, mode := range []string{"raw", "collect", "send"} {
		b.Run(mode, func(b *testing.B) {
			var total time.Duration
			for range b.N {
				var o *Options
				c, _ := o.complete(Directory(dir))
				s, err := newSession(c, Directory(dir))
				if err != nil {
					b.Fatal(err)
				}
				ownPID = 0
				for i := range n {
					fd, _ := unix.Open(name(i), unix.O_RDONLY, 0)
					unix.Close(fd)
				}
				begin := time.Now()
				switch mode {
				case "raw":
					i := 0
					for range s.watcher.C {
						if i++; i == n {
							break
						}
					}
				case "collect":
					go s.collect()
					for s.tally.progress().Files < n {
						time.Sleep(100 * time.Microsecond)
					}
				case "send":
					go s.collect()
					k := 0
					s.tally.send(func(*Access) bool { k++; return k < n })
				}
				total += time.Since(begin)
				s.close()
			}
			b.ReportMetric(float64(total.Nanoseconds())/float64(b.N)/n, "ns/file")
		})
	}
}
