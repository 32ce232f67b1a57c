// Command prefetch turns a record of kernstream into a list of files to fetch
// first: one path per line, in the order of the first access. That is what
// lazily pulled images are made with: eStargz takes such a list for its
// prioritized files, nydus one for its prefetch.
//
//	kernstream record -one-mount -o record -pid 4711
//	prefetch record >list
//	nydus-image create --prefetch-policy fs ... <list
//
// A record that is incomplete makes a list that leaves files out, so it is refused
// unless -incomplete is given. A path that does not fit on a line is left out, and said so.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kernstream/kernstream/recorder"
)

func main() {
	incomplete := flag.Bool("incomplete", false, "take a record that is not complete, too")
	relative := flag.Bool("relative", false, "leave out the / at the start, as tar archives do")
	root := flag.String("root", "/", "take only what is below this `directory`, as seen from there")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: prefetch [flags] RECORD\n\nPrints the files of a record of kernstream, one path per line.\n\nflags:")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	list, err := read(flag.Arg(0), *incomplete)
	if err == nil {
		err = write(os.Stdout, os.Stderr, list, *root, *relative)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prefetch:", err)
		os.Exit(1)
	}
}

// read reads a record.
func read(name string, incomplete bool) (*recorder.List, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	list, err := recorder.ReadList(f)
	if err != nil {
		return nil, err
	}
	if !list.Complete && !incomplete {
		return nil, fmt.Errorf("the record is incomplete: %s", strings.Join(list.Reasons, "; "))
	}
	return list, nil
}

// write writes the paths of a list that are below root.
func write(out, complaints io.Writer, list *recorder.List, root string, relative bool) error {
	root = "/" + strings.Trim(root, "/")
	w := bufio.NewWriter(out)
	for i := range list.Entries {
		path := list.Entries[i].Path
		if root != "/" {
			rest, below := strings.CutPrefix(path, root+"/")
			if !below {
				continue
			}
			path = "/" + rest
		}
		if strings.ContainsAny(path, "\n\r") {
			fmt.Fprintf(complaints, "prefetch: left out: %q\n", path)
			continue
		}
		if relative {
			path = strings.TrimPrefix(path, "/")
		}
		fmt.Fprintln(w, path)
	}
	return w.Flush()
}
