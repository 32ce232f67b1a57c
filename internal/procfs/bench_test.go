package procfs_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/kernstream/kernstream/internal/procfs"
)

// manyRows returns n rows as a host with many containers has them.
func manyRows(n int) []string {
	rows := make([]string, n)
	for i := range rows {
		switch id := i + 30; i % 3 {
		case 0:
			rows[i] = fmt.Sprintf("%d 29 0:%d / /run/containers/%08x/rootfs/merged rw,relatime shared:%d - overlay overlay rw,lowerdir=/var/lib/l/A%d:/var/lib/l/B%d,upperdir=/var/lib/%d/u,workdir=/var/lib/%d/w", id, id, id, id, id, id, id, id)
		case 1:
			rows[i] = fmt.Sprintf("%d 29 0:%d / /run/containers/%08x/shm rw,nosuid,nodev,noexec,relatime shared:%d master:1 - tmpfs shm rw,size=65536k", id, id, id, id)
		default:
			rows[i] = fmt.Sprintf("%d 29 0:4 net:[4026%06d] /run/netns/cni-%08x rw shared:%d - nsfs nsfs rw", id, id, id, id)
		}
	}
	return rows
}

func textOf(rows []string) []byte {
	var b bytes.Buffer
	for _, row := range rows {
		b.WriteString(row)
		b.WriteByte('\n')
	}
	return b.Bytes()
}

func BenchmarkMountInfoParser(b *testing.B) {
	for _, c := range []struct{ name, row string }{
		{"tmpfs", "96 63 0:65 / /mnt/prop-shared rw,relatime shared:1 - tmpfs none rw"},
		{"escapes", `108 63 0:73 / /mnt/with\040space rw,nosuid,nodev,relatime - fuse.sshfs user@host:/dir\040\0431 rw,user_id=0`},
		{"overlay", manyRows(1)[0]},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(c.row)))
			var parser procfs.MountInfoParser
			for b.Loop() {
				if _, err := parser.Parse(c.row); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMountTable compares a table of 10,000 rows with what came after it.
// "all new" decodes them all.
func BenchmarkMountTable(b *testing.B) {
	const n = 10_000
	rows := manyRows(n)
	text := textOf(rows)
	edit := func(f func(rows []string) []string) []byte {
		return textOf(f(append([]string(nil), rows...)))
	}
	for _, c := range []struct {
		name string
		text []byte
	}{
		{"same", text},
		{"changed in the middle", edit(func(rows []string) []string { rows[n/2] += ",x"; return rows })},
		{"removed in the middle", edit(func(rows []string) []string { return append(rows[:n/2], rows[n/2+1:]...) })},
		{"added in the middle", edit(func(rows []string) []string {
			return append(rows[:n/2:n/2], append([]string{"20000 29 0:99 / /new rw - tmpfs new rw"}, rows[n/2:]...)...)
		})},
		{"appended", edit(func(rows []string) []string { return append(rows, "20000 29 0:99 / /new rw - tmpfs new rw") })},
		{"reversed", edit(func(rows []string) []string {
			for i, j := 0, len(rows)-1; i < j; i, j = i+1, j-1 {
				rows[i], rows[j] = rows[j], rows[i]
			}
			return rows
		})},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(c.text)))
			var table procfs.MountTable
			table.Commit(table.Compare(text, nil))
			for b.Loop() {
				if d := table.Compare(c.text, nil); d.Kept < n-1 {
					b.Fatalf("%d kept", d.Kept)
				}
			}
		})
	}
	b.Run("all new", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(text)))
		for b.Loop() {
			var table procfs.MountTable
			table.Commit(table.Compare(text, nil))
		}
	})
}

func BenchmarkDropRepeated(b *testing.B) {
	text := textOf(manyRows(10_000))
	b.ReportAllocs()
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if len(procfs.DropRepeated(text)) != len(text) {
			b.Fatal("dropped a row")
		}
	}
}
