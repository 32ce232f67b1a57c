package kernstream_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestReadmeSnippets: the program in README is the compiled Example.
func TestReadmeSnippets(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	snippets := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(readme, -1)
	if len(snippets) == 0 {
		t.Fatal("README has no program")
	}
	for _, snippet := range snippets {
		_, body, ok := strings.Cut(string(snippet[1]), "func main() {\n")
		if !ok || !strings.Contains(string(examples), "() {\n"+body) {
			t.Errorf("this is not the body of an Example:\n%s", snippet[1])
		}
	}
}
