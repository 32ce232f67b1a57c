package fanotify_test

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fanotify"
)

// TestResponse: the bytes of an answer are those of struct fanotify_response,
// followed by the rule if there is to be one.
func TestResponse(t *testing.T) {
	rule := fanotify.AuditRule{Number: 9, SubjectTrust: 2, ObjectTrust: 1}
	for _, test := range []struct {
		response fanotify.Response
		want     []byte
	}{
		{fanotify.Response{FD: 7, Answer: unix.FAN_ALLOW}, words(7, 1)},
		{fanotify.Response{FD: 7, Answer: unix.FAN_DENY | unix.FAN_AUDIT, Rule: rule}, words(7, 0x12)},
		{fanotify.Response{FD: unix.FAN_NOFD, Answer: fanotify.DenyErrno(0)}, words(0xffffffff, 2)},
		{fanotify.Response{FD: 1, Answer: fanotify.DenyErrno(unix.EBUSY)}, words(1, 2|16<<24)},
		{fanotify.Response{FD: 1, Answer: fanotify.DenyErrno(0x3ff)}, words(1, 2|0xff<<24)},
		{
			fanotify.Response{FD: 3, Answer: unix.FAN_DENY | unix.FAN_AUDIT | unix.FAN_INFO, Rule: rule},
			bytes.Join([][]byte{words(3, 0x32), {1, 0}, {16, 0}, words(9, 2, 1)}, nil),
		},
	} {
		want := append([]byte("before"), test.want...)
		if got := test.response.Append([]byte("before")); !bytes.Equal(got, want) {
			t.Errorf("%+v is %x; want %x", test.response, got, want)
		}
	}
}
