package recorder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// A refusal travels as a kind, which tells what the error Is, and a text.

// refusals are what an error may be, by the number of the kind.
var refusals = []error{
	1: fs.ErrPermission,
	2: errors.ErrUnsupported,
	3: os.ErrProcessDone,
	4: fs.ErrNotExist,
	5: fs.ErrInvalid,
}

func appendRefusal(err error) []byte {
	for kind, is := range refusals {
		if is != nil && errors.Is(err, is) {
			return append([]byte{byte(kind)}, err.Error()...)
		}
	}
	return append([]byte{0}, err.Error()...)
}

func decodeRefusal(b []byte) error {
	if len(b) == 0 {
		return errors.New("the server refuses, and does not say why")
	}
	text := b[1:min(len(b), 4096)]
	if kind := int(b[0]); kind < len(refusals) && refusals[kind] != nil {
		return fmt.Errorf("the server refuses: %q: %w", text, refusals[kind])
	}
	return fmt.Errorf("the server refuses: %q", text)
}
