// Package kernstream turns Linux kernel event sources into typed Go channels.
//
// A source is a stream: range over its channel, compose it with select, end it
// through a context.
//
//	w, err := kernstream.WatchMounts(ctx, nil)
//	if err != nil {
//		return err
//	}
//	for e := range w.C {
//		fmt.Println(e)
//	}
//	return w.Err()
//
// The sources are the mount table ([Mounts], [WatchMounts]), the ends of
// processes ([WatchProcess], [NewProcessWatcher]), what happens to files
// ([WatchFiles]), and whatever a program makes of [NewStream]. Package fuse adds
// the requests of a FUSE session, package recorder the files that a container, a
// directory or a command opens.
//
// # What every stream promises
//
//  1. What can go wrong at the start is an error of the constructor. With a
//     context that is done already, that is its cause. Nil options are the
//     defaults.
//  2. After that there is one channel, C, and one error, Err. No error travels
//     on the channel. Err is nil after Close and after the natural end of the
//     source, the cause of the context after a cancel, and an *[OpError]
//     otherwise. What happens first decides; an end that the source had reached
//     goes before a cancel.
//  3. When C is closed, everything is over: Err is final, and goroutines,
//     descriptors and registrations are gone. There is nothing else to wait
//     for. Only an event that was delivered and owns something may outlive its
//     stream. (The kernel takes a while to end a fanotify group; that happens on
//     the side, after its descriptor is gone.)
//  4. C is unbuffered unless a source says otherwise, so a delivered event is a
//     received one.
//  5. Nothing is dropped in this package. While the consumer is busy, events
//     wait in the kernel, or are merged where a source says that it merges. Loss
//     that the kernel reports is an event, at its place in the stream.
//  6. Events of one source come in the kernel's order. Between sources there is
//     no order. The time of an event is when it was read.
//  7. Close may be called again, from any goroutine, and from the loop that
//     receives. So may everything else that ends something. Only a function
//     that was given to the source must not wait for its end.
//  8. An event that owns a descriptor has a method Close. What could not be
//     delivered is closed here.
//  9. A stream costs no thread. All waiting happens in the runtime's own poller
//     (see package poller).
//  10. A panic in a function that a program passes in is not recovered.
//
// # Several sources
//
// A select takes several streams, each until it is closed. A channel that is
// closed is always ready, so a loop sets it to nil when it is:
//
//	mounts, ticks := w.C, s.C
//	for mounts != nil || ticks != nil {
//		select {
//		case e, ok := <-mounts:
//			if !ok {
//				mounts = nil
//				continue
//			}
//			fmt.Println(e)
//		case e, ok := <-ticks:
//			if !ok {
//				ticks = nil
//				continue
//			}
//			fmt.Println(e)
//		}
//	}
//
// [Merge] does that for programs that treat all events alike.
//
// # Slow consumers
//
//   - FUSE requests (package fuse): they wait in the kernel, and their clients
//     with them.
//   - Mounts: what happens while an event waits to be received is merged into
//     it. The steps in between are lost, the last state never.
//   - Processes: nothing is lost. Each watch keeps what is known of its process,
//     two events at most, until they are received.
//   - Records (package recorder): nothing is lost. Files that were not received
//     wait in the list, which is there anyway.
//   - Files: events wait in the kernel. When its queue is full, events are lost,
//     and one with OpOverflow stands in their place.
//   - Permission events of files: they are answered by default at their
//     deadline, or at once if too many wait, and are counted.
//
// # Privileges and kernels
//
//  1. The package is written for Linux 5.10 and later, and tested on 6.1, 6.12
//     and newer.
//  2. Each source tries the best way that this kernel and these privileges have,
//     by doing it once, and falls back to others without being asked. Via of an
//     event says which it was.
//  3. Every source has a way that needs no privilege, except permission events
//     and records; what needs one says which. Nothing asks for more than it was
//     given, and nothing runs another program, except fusermount3 if a session
//     may be mounted in no other way.
//  4. Where nothing works, the error Is errors.ErrUnsupported or
//     fs.ErrPermission, and says what is missing: the version, the capability,
//     the limit.
//
// # Debugging
//
//  1. The command kernstream shows events as this package delivers them.
//  2. The descriptors that this package holds, with the stacks that opened them,
//     are the profile "kernstream.descriptors" of runtime/pprof; those of
//     processes stand behind one of them.
//  3. A stream that does not come to its end waits for its consumer or for a
//     function of the program: both are in a profile of goroutines.
//  4. String of an event is a line for a log, its JSON is what the command prints
//     with -json.
//  5. An [OpError] names the system call, what it was done to, and the errno.
//
// # Testing
//
//  1. A consumer takes a *[Stream], and [NewStream] makes one of any function, so
//     a test can give it the events that it likes.
//  2. No descriptor is in such a stream, so it works in a testing/synctest bubble,
//     too. Streams of the kernel do not: the fake clock stands still while one
//     waits.
package kernstream
