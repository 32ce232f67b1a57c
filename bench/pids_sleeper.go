package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The sleeper is the smallest process that serves: a program of one page,
// which reads from descriptor 0 until there is something, writes the time to
// descriptor 1, and ends. No compiler is needed for it.

// sleeperCode is its machine code, by architecture.
var sleeperCode = map[string][]byte{
	"amd64": {
		0x48, 0x83, 0xec, 0x10, // sub  $16, %rsp
		0x31, 0xc0, // xor  %eax, %eax      read
		0x31, 0xff, // xor  %edi, %edi
		0x48, 0x89, 0xe6, // mov  %rsp, %rsi
		0xba, 1, 0, 0, 0, // mov  $1, %edx
		0x0f, 0x05, // syscall
		0xb8, 228, 0, 0, 0, // mov  $228, %eax      clock_gettime
		0xbf, 1, 0, 0, 0, // mov  $1, %edi        CLOCK_MONOTONIC
		0x48, 0x89, 0xe6, // mov  %rsp, %rsi
		0x0f, 0x05, // syscall
		0xb8, 1, 0, 0, 0, // mov  $1, %eax        write
		0xbf, 1, 0, 0, 0, // mov  $1, %edi
		0x48, 0x89, 0xe6, // mov  %rsp, %rsi
		0xba, 16, 0, 0, 0, // mov  $16, %edx
		0x0f, 0x05, // syscall
		0xb8, 231, 0, 0, 0, // mov  $231, %eax      exit_group
		0x31, 0xff, // xor  %edi, %edi
		0x0f, 0x05, // syscall
	},
}

// newSleeper returns a file that holds the program (see elf(5)).
func newSleeper() (*os.File, error) {
	code, ok := sleeperCode[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("the group pids has no machine code for %s", runtime.GOARCH)
	}
	const (
		base       = 0x400000
		headerSize = 64
		entrySize  = 56
		begin      = headerSize + entrySize
	)
	var program bytes.Buffer
	put := func(fields ...any) {
		for _, field := range fields {
			binary.Write(&program, binary.LittleEndian, field)
		}
	}
	put([16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, // 64 bits, little endian
		uint16(2), uint16(62), uint32(1), // executable, x86-64
		uint64(base+begin), uint64(headerSize), uint64(0), uint32(0), // entry, program headers
		uint16(headerSize), uint16(entrySize), uint16(1), uint16(0), uint16(0), uint16(0))
	size := uint64(begin + len(code))
	put(uint32(1), uint32(5), // to be loaded, readable and executable
		uint64(0), uint64(base), uint64(base), size, size, uint64(0x1000))
	program.Write(code)

	fd, err := unix.MemfdCreate("sleeper", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "sleeper")
	if _, err := file.Write(program.Bytes()); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}
