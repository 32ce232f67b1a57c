// Package recorder records which files a container, a directory or a command
// accesses, in the order of the first access: what a lazily pulled image should
// fetch first, say.
//
//	r, err := recorder.Record(ctx, recorder.Command(exec.Command("make")), nil)
//	if err != nil {
//		return err
//	}
//	for a := range r.C {
//		fmt.Println(a.First, a.Path)
//	}
//	list, err := r.List()
//	if err != nil {
//		return err
//	}
//	if !list.Complete {
//		fmt.Println("not everything:", list.Reasons)
//	}
//	return list.WriteFile("record")
//
// A [Recording] is a stream of the first access to each file, and ends as a
// [List], with how often each was accessed and a verdict: complete means that between the
// start and the end of the recording no access by way of the mounts that are recorded was missed.
// Whatever makes that uncertain (the kernel's queue was full, a file could not be named, something was
// mounted meanwhile, a connection broke) makes it incomplete, and is among the reasons.
//
// It stands on fanotify(7), by way of [kernstream.WatchFiles]. Files are recorded, not what is
// read of them; what is mapped counts as opened. The kernel merges the accesses of a process to a file
// that follow each other closely, so counts are at least that.
//
// # Across a privilege boundary
//
// [Record] needs privileges. A program that has none gets a recording from one that has, over a
// socket: that one calls [Serve], which decides what a client may have, the other calls [Connect].
//
// # The protocol
//
// Version 1. Messages follow each other in both directions. Each has a header of 8 bytes: the size of
// the payload (4 bytes, at most 1 MiB), the type (1), a zero (1), and how many descriptors come
// with it (2), as SCM_RIGHTS with the first byte of the header. All numbers of fixed size are
// little-endian; a varint is one of encoding/binary, a Uvarint.
//
//	type         from    payload
//	1 hello      server  "KSRECORD", version (4)
//	2 start      client  version (4), flags (4: 1 descriptors, 2 one mount), operations (8; 0: the
//	                     server's), kind of target (1): 0 the server's; 1 a container, process (4);
//	                     2 a directory, its path: the rest
//	3 started    server  the time, in nanoseconds since 1970 (8)
//	4 refused    server  kind (1): 1 not permitted, 2 not supported, 3 no such process, 4 no such file, 5
//	                     invalid, 0 another reason; the reason in words: the rest
//	5 batch      server  files, up to the end
//	6 overflow   server  how often accesses were lost here (4)
//	7 stop       client  nothing
//	8 end        server  files in all (4), accesses (8), and reasons up to the end, each its length (2)
//	                     and text; none: the list is complete
//
// A file of a batch is, in varints: its number, counted from 0; all operations that are known of it;
// all accesses. If the number is that of the next file, there follow: whether a descriptor comes with it (0
// or 1, in the order of the files), the time since the start in nanoseconds, the process, the
// length of the path, and the path. If it is that of an earlier one, it tells of further accesses.
//
// The server makes a fanotify group and says hello; the client says start; the server opens the target, asks whether the client
// may, sets the marks, and says started, or refuses and hangs up. That takes 5 seconds at most. From then on
// the server sends batches without waiting for anything, and the client may say stop, once.
// The end of the target, or stop, leads to all that was found until then, and to end; the
// connection is closed after that. A connection that ends otherwise leaves an incomplete list. A server
// gives a client up that takes no message for 10 seconds, and a client one that does not answer stop for 0.8.
//
// # Slow consumers
//
// Nothing is lost: files that were not received wait in the list that grows anyway. With
// [Options.Descriptors] they are open, so there are at most 128 of them, and what is
// accessed further waits in the kernel's queue.
package recorder
