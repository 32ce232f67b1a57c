// Package documents tests that the documents of the module say what is so: that
// links lead somewhere, that what a command is shown to print is what it printed,
// and that imports go the way that ARCHITECTURE.md shows. (Package docs and the
// root package compile the programs.)
package documents

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// documents returns the text of all documents by their paths.
func documents(t *testing.T) map[string]string {
	t.Helper()
	texts := map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == "testdata"):
			return filepath.SkipDir
		case filepath.Ext(path) == ".md":
			texts[path] = read(t, path)
		}
		return nil
	})
	if err != nil || len(texts) < 10 {
		t.Fatalf("%d documents: %v", len(texts), err)
	}
	return texts
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	blocks  = regexp.MustCompile("(?ms)^```[a-z]*\n(.*?)^```")
	links   = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	dropped = regexp.MustCompile(`[^\p{L}\p{N}_ -]`) // by GitHub, of a heading
)

// anchors returns what a link can name of a document.
func anchors(text string) (names []string) {
	for _, match := range heading.FindAllStringSubmatch(blocks.ReplaceAllString(text, ""), -1) {
		name := dropped.ReplaceAllString(strings.ToLower(match[1]), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

// TestLinks: each link within the module leads to a file that is there, and to a
// heading of it.
func TestLinks(t *testing.T) {
	texts := documents(t)
	checked, headings := 0, 0
	for path, text := range texts {
		for _, match := range links.FindAllStringSubmatch(blocks.ReplaceAllString(text, ""), -1) {
			link := match[1]
			if strings.Contains(link, "://") {
				continue
			}
			checked++
			file, anchor, _ := strings.Cut(link, "#")
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %s: %v", path, link, err)
				continue
			}
			if anchor == "" {
				continue
			}
			if headings++; !slices.Contains(anchors(texts[target]), anchor) {
				t.Errorf("%s: %s: no such heading", path, link)
			}
		}
	}
	if checked < 40 || headings < 10 {
		t.Errorf("%d links, %d of them to headings", checked, headings)
	}
}

// TestReadmeShows: what README shows of the command is in its recording, or a
// golden file of its tests, line by line.
func TestReadmeShows(t *testing.T) {
	printed := "\n" + read(t, root+"/docs/recording.txt") + "\n" + read(t, root+"/cmd/kernstream/testdata/wait.golden")
	shown := 0
	for _, match := range blocks.FindAllStringSubmatch(read(t, root+"/README.md"), -1) {
		if !strings.HasPrefix(match[0], "```\n") {
			continue
		}
		if shown++; !strings.Contains(printed, "\n"+match[1]) {
			t.Errorf("this was never printed:\n%s", match[1])
		}
	}
	if shown != 2 {
		t.Errorf("README shows the command %d times", shown)
	}
}

// TestLayers: poller and internal/* import no package of the module, the root
// package imports those alone, fuse and recorder what is below them, and all others
// what they like.
func TestLayers(t *testing.T) {
	const module = "github.com/kernstream/kernstream"
	layer := func(path string) int {
		top, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(path, module), "/"), "/")
		switch top {
		case "poller", "internal":
			return 0
		case "":
			return 1
		case "fuse", "recorder":
			return 2
		}
		return 3
	}
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	packages := strings.Split(strings.TrimSpace(string(out)), "\n")
	for _, line := range packages {
		imports := strings.Fields(line)
		for _, path := range imports[1:] {
			ours := path == module || strings.HasPrefix(path, module+"/")
			if ours && layer(imports[0]) < 3 && layer(path) >= layer(imports[0]) {
				t.Errorf("%s imports %s", imports[0], path)
			}
		}
	}
	if len(packages) < 20 {
		t.Errorf("there are %d packages", len(packages))
	}
}
