// Package fuse mounts FUSE file systems and delivers their requests: the part
// of a server below what it does with them.
//
//	session, err := fuse.Mount(ctx, &fuse.Config{MountPoint: "/mnt"})
//	if err != nil {
//		return err
//	}
//	defer session.Close()
//	for r, err := range session.Device().All(ctx) {
//		if err != nil {
//			return err
//		}
//		switch r.Header.Opcode {
//		case fuse.OpGetattr:
//			r.Reply(attributes(r.Header.NodeID))
//		default:
//			r.ReplyErrno(syscall.ENOSYS)
//		}
//	}
//
// A [Session] is a mount and its connection to the kernel. Its [Device] has the
// requests: by [Device.Next] for a loop that must be fast, by [Device.All] for
// the same as a range loop, and by [Device.Requests] as a stream for select and
// [kernstream.Merge]. A [Request] has its header decoded and its body as the
// kernel wrote it, and is answered with bytes. The layouts of both are in
// include/uapi/linux/fuse.h; examples/memfs is a file system that knows them.
//
// # Several devices
//
// [Session.Clone] makes another device, with a reader of its own. The kernel has
// one queue of requests for all of them. A request is answered through the device
// that delivered it, which [Request.Reply] sees to, and INTERRUPT finds its
// request through whatever device it comes. Two devices make large reads and
// writes faster, and streams; more than two rarely make anything faster.
//
// # Hand-over
//
// [Session.Drain] brings a session to rest without unmounting: nothing is read
// any more, and what was read is answered. Then either [Session.Resume] goes on, or
// another process does, which gets [Session.Files] and [Session.State] and calls
// [Adopt]. A process that only keeps the files lets the file system outlive a
// server that is killed: from Linux 6.9 on, [Session.NotifyResend] brings back what that
// had read. Clients notice a pause. examples/upgrade does both.
//
// # What a session does itself
//
// It answers INIT (see [Config] and [State]), and turns INTERRUPT into the end
// of [Request.Context]. Right after the mount it lets the kernel poll a file of
// its own making, so that a process may use the files that it serves itself (see
// [Config.ServePoll]). Everything else is for the server.
// One thing it must not do: start a program that is among these files, or in a
// directory among them (the Dir of an exec.Cmd). Between the clone and the exec, the
// Go runtime waits within one system call that keeps its processor; if a garbage
// collection begins then, nobody is left to serve what the child waits for. A shell
// that changes the directory, or executes the program, is a way around it.
//
// # What a session promises
//
//  1. Each request is delivered once, and answered once: a second answer, or one
//     that cannot be, is refused here. No request is lost when a reader stops;
//     the next one goes on with it, in this process or in a successor.
//  2. Ends have names: [ErrUnmounted], [ErrAborted], os.ErrClosed after
//     [Session.Close], [ErrDrained], and the cause of a context. What happens
//     first stays.
//  3. Nothing is unmounted but the session's own mount, as far as the kernel
//     lets one know ([Session.Unmount]).
//  4. After Close nothing is left: no mount, descriptor, goroutine or process.
//  5. Waiting costs no thread. A request costs one small allocation; buffers
//     are used again.
//
// A slow server loses nothing: requests wait in the kernel, with the clients that
// sent them.
//
// # Kernels and privileges
//
// Written for Linux 5.10 and later. Users who may not mount need fusermount3 (of
// the package fuse3), or a user namespace. What needs a newer kernel says so.
package fuse
