package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kernstream/kernstream/internal/fusewire"
)

// The start of a connection. The kernel sends INIT with what it can do, and
// waits with everything else for an answer that says what of that is wanted.

// InitFlags are what kernel and server agree on at the start of a connection.
// The names are the kernel's, of include/uapi/linux/fuse.h.
type InitFlags uint64

// The flags that kernels know up to version 7.45 of the protocol. Most of them
// change which requests come, and what they mean.
const (
	InitAsyncRead         InitFlags = 1 << 0
	InitPosixLocks        InitFlags = 1 << 1
	InitFileOps           InitFlags = 1 << 2
	InitAtomicOTrunc      InitFlags = 1 << 3
	InitExportSupport     InitFlags = 1 << 4
	InitBigWrites         InitFlags = 1 << 5
	InitDontMask          InitFlags = 1 << 6
	InitSpliceWrite       InitFlags = 1 << 7
	InitSpliceMove        InitFlags = 1 << 8
	InitSpliceRead        InitFlags = 1 << 9
	InitFlockLocks        InitFlags = 1 << 10
	InitHasIoctlDir       InitFlags = 1 << 11
	InitAutoInvalData     InitFlags = 1 << 12
	InitDoReaddirplus     InitFlags = 1 << 13
	InitReaddirplusAuto   InitFlags = 1 << 14
	InitAsyncDIO          InitFlags = 1 << 15
	InitWritebackCache    InitFlags = 1 << 16
	InitNoOpenSupport     InitFlags = 1 << 17
	InitParallelDirops    InitFlags = 1 << 18
	InitHandleKillpriv    InitFlags = 1 << 19
	InitPosixACL          InitFlags = 1 << 20
	InitAbortError        InitFlags = 1 << 21
	InitMaxPages          InitFlags = 1 << 22
	InitCacheSymlinks     InitFlags = 1 << 23
	InitNoOpendirSupport  InitFlags = 1 << 24
	InitExplicitInvalData InitFlags = 1 << 25
	InitMapAlignment      InitFlags = 1 << 26
	InitSubmounts         InitFlags = 1 << 27
	InitHandleKillprivV2  InitFlags = 1 << 28
	InitSetxattrExt       InitFlags = 1 << 29
	InitInitExt           InitFlags = 1 << 30
	InitSecurityCtx       InitFlags = 1 << 32
	InitHasInodeDAX       InitFlags = 1 << 33
	InitCreateSuppGroup   InitFlags = 1 << 34
	InitHasExpireOnly     InitFlags = 1 << 35
	InitDirectIOAllowMmap InitFlags = 1 << 36
	InitPassthrough       InitFlags = 1 << 37
	InitNoExportSupport   InitFlags = 1 << 38
	InitHasResend         InitFlags = 1 << 39
	InitAllowIdmap        InitFlags = 1 << 40
	InitOverIOUring       InitFlags = 1 << 41
	InitRequestTimeout    InitFlags = 1 << 42
)

// DefaultInitFlags is what [Config.InitFlags] means when it is 0: what makes a
// session faster and changes the meaning of no request. Reads, writes and
// lookups of one file or directory may come at the same time.
const DefaultInitFlags = InitAsyncRead | InitBigWrites | InitParallelDirops

// always are flags that a session asks for in any case: to know an abort from
// an unmount, and to have all of MaxWrite and of the flags.
const always = InitAbortError | InitMaxPages | InitInitExt

// passedOn are the flags that a server may ask for. Missing are those for
// which there is more to do than requests and answers: DAX of virtiofs, backing
// files, io_uring.
const passedOn = 1<<43 - 1 - InitMapAlignment - 1<<31 - InitHasInodeDAX - InitPassthrough - InitOverIOUring

var initFlagNames = [...]string{
	"async_read", "posix_locks", "file_ops", "atomic_o_trunc", "export_support", "big_writes",
	"dont_mask", "splice_write", "splice_move", "splice_read", "flock_locks", "has_ioctl_dir",
	"auto_inval_data", "do_readdirplus", "readdirplus_auto", "async_dio", "writeback_cache",
	"no_open_support", "parallel_dirops", "handle_killpriv", "posix_acl", "abort_error",
	"max_pages", "cache_symlinks", "no_opendir_support", "explicit_inval_data", "map_alignment",
	"submounts", "handle_killpriv_v2", "setxattr_ext", "init_ext", "", "security_ctx",
	"has_inode_dax", "create_supp_group", "has_expire_only", "direct_io_allow_mmap",
	"passthrough", "no_export_support", "has_resend", "allow_idmap", "over_io_uring",
	"request_timeout",
}

// Has tells whether all flags of other are set.
func (f InitFlags) Has(other InitFlags) bool { return f&other == other }

// String returns the kernel's names in lower case, "async_read|big_writes". A
// flag without a name appears as a number.
func (f InitFlags) String() string {
	if f == 0 {
		return "none"
	}
	var names []string
	for rest := uint64(f); rest != 0; rest &= rest - 1 {
		bit := bits.TrailingZeros64(rest)
		if bit < len(initFlagNames) && initFlagNames[bit] != "" {
			names = append(names, initFlagNames[bit])
		} else {
			names = append(names, "0x"+strconv.FormatUint(1<<bit, 16))
		}
	}
	return strings.Join(names, "|")
}

// The version of the protocol that this package is written for.
const (
	protocolMajor = 7
	protocolMinor = 45
)

// pagesWithoutFlag is how many pages a request has at most when there is no
// InitMaxPages.
const pagesWithoutFlag = 32

// negotiate answers in as config wants it. pagesLimit is the most pages that
// the kernel allows in one request.
func negotiate(in *fusewire.InitIn, config *Config, pagesLimit int) (*fusewire.InitOut, State) {
	wanted := config.InitFlags
	if wanted == 0 {
		wanted = DefaultInitFlags
	}
	wanted |= always
	if config.RequestTimeout > 0 {
		wanted |= InitRequestTimeout
	}
	state := State{
		Major:        protocolMajor,
		Minor:        min(in.Minor, protocolMinor),
		Flags:        wanted & InitFlags(in.Flags),
		MaxWrite:     config.MaxWrite,
		MaxReadahead: in.MaxReadahead,
	}
	if config.MaxReadahead > 0 {
		state.MaxReadahead = min(state.MaxReadahead, config.MaxReadahead)
	}
	if state.MaxWrite == 0 {
		state.MaxWrite = defaultMaxWrite
	}
	pages := pagesWithoutFlag
	if state.Flags.Has(InitMaxPages) {
		pages = min(max(pagesLimit, 1), 1<<16-1)
	}
	page := os.Getpagesize()
	state.MaxWrite = uint32(min(uint64(state.MaxWrite), uint64(pages)*uint64(page)))
	if state.Flags.Has(InitMaxPages) {
		state.MaxPages = uint16((int(state.MaxWrite) + page - 1) / page)
	}
	out := &fusewire.InitOut{
		Major:               state.Major,
		Minor:               state.Minor,
		MaxReadahead:        state.MaxReadahead,
		Flags:               uint64(state.Flags),
		MaxBackground:       config.MaxBackground,
		CongestionThreshold: config.CongestionThreshold,
		MaxWrite:            state.MaxWrite,
		TimeGran:            max(config.TimeGran, 1),
		MaxPages:            state.MaxPages,
	}
	if out.CongestionThreshold == 0 {
		out.CongestionThreshold = uint16(uint32(out.MaxBackground) * 3 / 4)
	}
	if state.Flags.Has(InitRequestTimeout) {
		out.RequestTimeout = config.RequestTimeout
	}
	return out, state
}

// maxPagesLimit returns the most pages that the kernel allows in one request.
func maxPagesLimit() int {
	const untilLinux6_12 = 256
	text, err := os.ReadFile("/proc/sys/fs/fuse/max_pages_limit")
	if err != nil {
		return untilLinux6_12
	}
	limit, err := strconv.Atoi(string(bytes.TrimSpace(text)))
	if err != nil {
		return untilLinux6_12
	}
	return limit
}

// answerInit answers the INIT of the kernel.
func (s *Session) answerInit(read func() (*Request, error)) error {
	for {
		r, err := read()
		if err != nil {
			return err
		}
		if r.Header.Opcode != OpInit {
			r.Close()
			return fuseError("init", s.object(), fmt.Errorf("the first request is %v", r.Header.Opcode))
		}
		in, err := fusewire.DecodeInit(r.Body)
		if err == nil && in.Major < protocolMajor {
			err = fmt.Errorf("the kernel has version %d.%d of the protocol: %w", in.Major, in.Minor, errors.ErrUnsupported)
		}
		if err != nil {
			r.ReplyErrno(unix.EPROTO)
			return fuseError("init", s.object(), err)
		}
		if in.Major > protocolMajor {
			// It sends another one, of the version in the answer.
			out := fusewire.InitOut{Major: protocolMajor, Minor: protocolMinor}
			if err := r.Reply(out.Append(nil, 0)); err != nil {
				return err
			}
			continue
		}
		message := bytes.Clone(r.Raw())
		out, state := negotiate(&in, &s.config, maxPagesLimit())
		s.initRequest, s.state = message, state
		s.resize(state.MaxWrite)
		return r.Reply(out.Append(nil, in.Minor))
	}
}
