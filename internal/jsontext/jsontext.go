// Package jsontext has what all events have in common as JSON.
package jsontext

import (
	"bytes"
	"encoding/json"
	"unicode/utf8"
)

// Marshal is [json.Marshal], but leaves <, > and & in paths as they are.
func Marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// Raw returns the bytes of s if JSON cannot carry them: what the key of s with
// _raw at its end has, in base64. Otherwise it returns nil.
func Raw(s string) []byte {
	if utf8.ValidString(s) {
		return nil
	}
	return []byte(s)
}
