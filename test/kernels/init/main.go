// Command init is the first process of the virtual machines in which the kernel
// matrix runs the tests, and the program that runs them there and on the host.
//
// As the first process of an initramfs it moves everything to a tmpfs (the root
// of an initramfs cannot be pivoted), makes the machine look like a small Linux
// system, and starts "init run /kernels/job.json" on the second serial port.
// It reaps orphans, as an init does, and stops the machine at the end.
package main

import (
	"errors"
	"fmt"
	"os"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 1 && os.Getpid() == 1:
		err = switchRoot()
	case len(os.Args) == 2 && os.Args[1] == "system" && os.Getpid() == 1:
		err = system()
	case len(os.Args) == 3 && os.Args[1] == "run":
		err = runJob(os.Args[2], os.Stdout)
	case len(os.Args) > 2 && os.Args[1] == "drop":
		err = dropAdmin(os.Args[2:])
	default:
		err = errors.New("usage: init run JOB, or init drop COMMAND [ARGUMENT]")
	}
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "init:", err)
	if os.Getpid() == 1 {
		stop()
	}
	os.Exit(1)
}
