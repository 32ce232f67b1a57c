package fusewire

// Attr is what a node is, as far as the probe needs it (struct fuse_attr).
type Attr struct {
	Ino      uint64
	Mode     uint32 // as in stat(2)
	Nlink    uint32
	UID, GID uint32
}

const attrSize = 88

func (a *Attr) append(b []byte) []byte {
	start := len(b)
	b = append(b, make([]byte, attrSize)...)
	order.PutUint64(b[start:], a.Ino)
	order.PutUint32(b[start+60:], a.Mode)
	order.PutUint32(b[start+64:], a.Nlink)
	order.PutUint32(b[start+68:], a.UID)
	order.PutUint32(b[start+72:], a.GID)
	return b
}

// AppendEntry appends the answer to LOOKUP (struct fuse_entry_out) that node is
// there, valid at this moment only.
func AppendEntry(b []byte, node uint64, attr *Attr) []byte {
	b = order.AppendUint64(b, node)
	b = append(b, make([]byte, 32)...) // generation and how long it is valid
	return attr.append(b)
}

// AppendAttr appends the answer to GETATTR (struct fuse_attr_out), valid at this
// moment only.
func AppendAttr(b []byte, attr *Attr) []byte {
	b = append(b, make([]byte, 16)...) // how long it is valid
	return attr.append(b)
}

// AppendOpen appends the answer to OPEN (struct fuse_open_out).
func AppendOpen(b []byte, handle uint64, flags uint32) []byte {
	b = order.AppendUint64(b, handle)
	b = order.AppendUint32(b, flags)
	return order.AppendUint32(b, 0) // backing_id: of passthrough
}

// Codes of notifications (enum fuse_notify_code).
const (
	CodePoll       = 1
	CodeInvalInode = 2
	CodeInvalEntry = 3
	CodeStore      = 4
	CodeRetrieve   = 5
	CodeDelete     = 6
	CodeResend     = 7
	CodeIncEpoch   = 8
	CodePrune      = 9
)

// ExpireOnly is the flag of [AppendInvalEntry] to look the entry up again at
// its next use, instead of dropping it.
const ExpireOnly = 1

// PutNotifyHeader writes the header of a notification to header.
func PutNotifyHeader(header *[OutHeaderSize]byte, length int, code int32) {
	order.PutUint32(header[:], uint32(length))
	order.PutUint32(header[4:], uint32(code))
	order.PutUint64(header[8:], 0)
}

// AppendPoll appends struct fuse_notify_poll_wakeup_out.
func AppendPoll(b []byte, handle uint64) []byte { return order.AppendUint64(b, handle) }

// AppendInvalInode appends struct fuse_notify_inval_inode_out.
func AppendInvalInode(b []byte, node uint64, offset, length int64) []byte {
	b = order.AppendUint64(b, node)
	b = order.AppendUint64(b, uint64(offset))
	return order.AppendUint64(b, uint64(length))
}

// AppendInvalEntry appends struct fuse_notify_inval_entry_out and the name.
func AppendInvalEntry(b []byte, parent uint64, name string, flags uint32) []byte {
	b = order.AppendUint64(b, parent)
	b = order.AppendUint32(b, uint32(len(name)))
	b = order.AppendUint32(b, flags)
	return appendName(b, name)
}

// AppendDelete appends struct fuse_notify_delete_out and the name.
func AppendDelete(b []byte, parent, child uint64, name string) []byte {
	b = order.AppendUint64(b, parent)
	b = order.AppendUint64(b, child)
	b = order.AppendUint32(b, uint32(len(name)))
	b = order.AppendUint32(b, 0)
	return appendName(b, name)
}

func appendName(b []byte, name string) []byte { return append(append(b, name...), 0) }

// AppendStore appends struct fuse_notify_store_out; the data follows.
func AppendStore(b []byte, node, offset uint64, size uint32) []byte {
	b = order.AppendUint64(b, node)
	b = order.AppendUint64(b, offset)
	b = order.AppendUint32(b, size)
	return order.AppendUint32(b, 0)
}

// AppendRetrieve appends struct fuse_notify_retrieve_out.
func AppendRetrieve(b []byte, unique, node, offset uint64, size uint32) []byte {
	b = order.AppendUint64(b, unique)
	return AppendStore(b, node, offset, size)
}

// AppendPrune appends struct fuse_notify_prune_out and the nodes.
func AppendPrune(b []byte, nodes []uint64) []byte {
	b = order.AppendUint32(b, uint32(len(nodes)))
	b = append(b, make([]byte, 12)...)
	for _, node := range nodes {
		b = order.AppendUint64(b, node)
	}
	return b
}
