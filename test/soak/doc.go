// Package soak has a test that runs all sources of this module at once, in one
// process and merged into one stream, for as long as one likes, and keeps a book
// of what happened beside what was told.
//
//	go test -v ./test/soak                           a few seconds
//	go test -v ./test/soak -for 15m -timeout 20m     as long as that
//
// A run is made of rounds. In a round every part (one source, in a file of its
// own) makes things happen at random, while other watchers of the source come
// and go, and the consumer is now and then slow. Then everything holds still, and
// the books must balance: what happened was told, or its loss was told, each
// thing once, and no descriptor, goroutine, memory or queue has grown. The last
// line has the totals.
//
// Permission events are answered by another process, the judge. Files are used by others,
// the clients, and commands are recorded by one more: what waits in the kernel for an
// answer of its own process cannot be killed.
//
// A new source is one more file with a type that is a part, and a line in
// newSoak.
package soak
