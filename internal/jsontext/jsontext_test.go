package jsontext_test

import (
	"testing"

	"github.com/kernstream/kernstream/internal/jsontext"
)

// Paths are readable, on one line, and their bytes are there where they are not text.
func TestJSON(t *testing.T) {
	type object struct {
		Path string `json:"path"`
		Raw  []byte `json:"path_raw,omitempty"`
	}
	for path, want := range map[string]string{
		"/a<b>&c": `{"path":"/a<b>&c"}`,
		"ü\n":     `{"path":"ü\n"}`,
		"\xff":    `{"path":"\ufffd","path_raw":"/w=="}`,
		"":        `{"path":""}`,
	} {
		got, err := jsontext.Marshal(object{path, jsontext.Raw(path)})
		if err != nil || string(got) != want {
			t.Errorf("%q: %s, %v; want %s", path, got, err, want)
		}
	}
	if got, err := jsontext.Marshal(func() {}); err == nil {
		t.Errorf("a function is %s", got)
	}
}
