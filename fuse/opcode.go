package fuse

import "strconv"

// An Opcode says what a request asks for. The names are the kernel's, of
// include/uapi/linux/fuse.h.
type Opcode uint32

// The opcodes that kernels send up to version 7.45 of the protocol. A session
// answers INIT and consumes INTERRUPT itself; it never passes them on.
const (
	OpLookup          Opcode = 1
	OpForget          Opcode = 2 // no answer
	OpGetattr         Opcode = 3
	OpSetattr         Opcode = 4
	OpReadlink        Opcode = 5
	OpSymlink         Opcode = 6
	OpMknod           Opcode = 8
	OpMkdir           Opcode = 9
	OpUnlink          Opcode = 10
	OpRmdir           Opcode = 11
	OpRename          Opcode = 12
	OpLink            Opcode = 13
	OpOpen            Opcode = 14
	OpRead            Opcode = 15
	OpWrite           Opcode = 16
	OpStatfs          Opcode = 17
	OpRelease         Opcode = 18
	OpFsync           Opcode = 20
	OpSetxattr        Opcode = 21
	OpGetxattr        Opcode = 22
	OpListxattr       Opcode = 23
	OpRemovexattr     Opcode = 24
	OpFlush           Opcode = 25
	OpInit            Opcode = 26
	OpOpendir         Opcode = 27
	OpReaddir         Opcode = 28
	OpReleasedir      Opcode = 29
	OpFsyncdir        Opcode = 30
	OpGetlk           Opcode = 31
	OpSetlk           Opcode = 32
	OpSetlkw          Opcode = 33
	OpAccess          Opcode = 34
	OpCreate          Opcode = 35
	OpInterrupt       Opcode = 36
	OpBmap            Opcode = 37
	OpDestroy         Opcode = 38
	OpIoctl           Opcode = 39
	OpPoll            Opcode = 40
	OpNotifyReply     Opcode = 41 // no answer
	OpBatchForget     Opcode = 42 // no answer
	OpFallocate       Opcode = 43
	OpReaddirplus     Opcode = 44
	OpRename2         Opcode = 45
	OpLseek           Opcode = 46
	OpCopyFileRange   Opcode = 47
	OpSetupmapping    Opcode = 48
	OpRemovemapping   Opcode = 49
	OpSyncfs          Opcode = 50
	OpTmpfile         Opcode = 51
	OpStatx           Opcode = 52
	OpCopyFileRange64 Opcode = 53
)

var opcodeNames = [...]string{
	OpLookup: "lookup", OpForget: "forget", OpGetattr: "getattr", OpSetattr: "setattr",
	OpReadlink: "readlink", OpSymlink: "symlink", OpMknod: "mknod", OpMkdir: "mkdir",
	OpUnlink: "unlink", OpRmdir: "rmdir", OpRename: "rename", OpLink: "link", OpOpen: "open",
	OpRead: "read", OpWrite: "write", OpStatfs: "statfs", OpRelease: "release", OpFsync: "fsync",
	OpSetxattr: "setxattr", OpGetxattr: "getxattr", OpListxattr: "listxattr",
	OpRemovexattr: "removexattr", OpFlush: "flush", OpInit: "init", OpOpendir: "opendir",
	OpReaddir: "readdir", OpReleasedir: "releasedir", OpFsyncdir: "fsyncdir", OpGetlk: "getlk",
	OpSetlk: "setlk", OpSetlkw: "setlkw", OpAccess: "access", OpCreate: "create",
	OpInterrupt: "interrupt", OpBmap: "bmap", OpDestroy: "destroy", OpIoctl: "ioctl",
	OpPoll: "poll", OpNotifyReply: "notify_reply", OpBatchForget: "batch_forget",
	OpFallocate: "fallocate", OpReaddirplus: "readdirplus", OpRename2: "rename2",
	OpLseek: "lseek", OpCopyFileRange: "copy_file_range", OpSetupmapping: "setupmapping",
	OpRemovemapping: "removemapping", OpSyncfs: "syncfs", OpTmpfile: "tmpfile", OpStatx: "statx",
	OpCopyFileRange64: "copy_file_range_64",
}

// String returns the kernel's name in lower case, "lookup", or the number of an
// opcode that has none here.
func (o Opcode) String() string {
	if int64(o) < int64(len(opcodeNames)) && opcodeNames[o] != "" {
		return opcodeNames[o]
	}
	return "opcode_" + strconv.FormatUint(uint64(o), 10)
}

// answered tells whether the kernel waits for an answer.
func (o Opcode) answered() bool {
	switch o {
	case OpForget, OpBatchForget, OpInterrupt, OpNotifyReply:
		return false
	}
	return true
}
