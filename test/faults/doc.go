// Package faults has tests that let system calls fail, descriptors run out,
// processes stop and files be missing, and that say what comes of it: the error
// that is documented, or the fallback. Nothing may hang, and nothing leak.
//
//	go test ./test/faults                      all of them
//	go test ./test/faults -run TestFaults/fuse the faults of a source
//	go test ./test/faults -update              write docs/faults.md anew
//
// Each fault is met by a process of its own, a child of the test, which prepares
// what it needs, does the fault to itself, lets a scenario run, and compares
// what is open with what was before. The outcome is a few words, which must be
// those of the table; the table is docs/faults.md. So the document says what the
// tests have seen.
//
// A new source is one more file with scenarios and a list of faults, and a line
// in all.
package faults
