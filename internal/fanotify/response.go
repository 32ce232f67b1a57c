package fanotify

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Sizes of what is written to a group, in bytes.
const (
	responseSize  = 8  // struct fanotify_response
	auditRuleSize = 16 // struct fanotify_response_info_audit_rule
)

// A Response is what write(2) to a group takes: the answer to one permission
// event.
type Response struct {
	FD     int32  // the number of the event's descriptor: it is what the kernel knows the event by
	Answer uint32 // FAN_ALLOW or FAN_DENY, with FAN_AUDIT and FAN_INFO; an errno in the highest eight bits
	Rule   AuditRule
}

// An AuditRule is what a response with FAN_INFO says about its reason.
type AuditRule struct{ Number, SubjectTrust, ObjectTrust uint32 }

// DenyErrno returns the answer that lets the operation fail with errno. 0 is
// what the kernel takes without being asked, EPERM.
func DenyErrno(errno unix.Errno) uint32 {
	return unix.FAN_DENY | uint32(errno)&unix.FAN_ERRNO_MASK<<unix.FAN_ERRNO_SHIFT
}

// Append appends the bytes of the response to b. A call of write(2) takes one;
// writev(2) takes one in each of its buffers.
func (r Response) Append(b []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(r.FD))
	b = binary.NativeEndian.AppendUint32(b, r.Answer)
	if r.Answer&unix.FAN_INFO == 0 {
		return b
	}
	b = append(b, unix.FAN_RESPONSE_INFO_AUDIT_RULE, 0)
	b = binary.NativeEndian.AppendUint16(b, auditRuleSize)
	b = binary.NativeEndian.AppendUint32(b, r.Rule.Number)
	b = binary.NativeEndian.AppendUint32(b, r.Rule.SubjectTrust)
	return binary.NativeEndian.AppendUint32(b, r.Rule.ObjectTrust)
}
