package recorder_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os/exec"
	"syscall"

	"github.com/kernstream/kernstream/recorder"
)

func ExampleRecord() {
	cmd := exec.Command("ls", "-l")
	r, err := recorder.Record(context.Background(), recorder.Command(cmd), nil)
	if err != nil {
		log.Fatal(err)
	}
	for a := range r.C {
		fmt.Println(a.First, a.Path)
	}
	cmd.Wait()
	list, err := r.List()
	if err != nil {
		log.Fatal(err)
	}
	if !list.Complete {
		log.Print("not everything: ", list.Reasons)
	}
	if err := list.WriteFile("/tmp/record"); err != nil {
		log.Fatal(err)
	}
}

func ExampleServe() {
	listener, err := net.Listen("unix", "/run/recorder.sock")
	if err != nil {
		log.Fatal(err)
	}
	// Everybody may record what runs in a container of his own.
	authorize := func(client *syscall.Ucred, target recorder.Target) error {
		pid, ok := target.(recorder.Container)
		if !ok {
			return fmt.Errorf("only containers are recorded")
		}
		var st syscall.Stat_t
		if err := syscall.Stat(fmt.Sprintf("/proc/%d", int(pid)), &st); err != nil || st.Uid != client.Uid {
			return fmt.Errorf("this is not your container")
		}
		return nil
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			err := recorder.Serve(context.Background(), conn, &recorder.ServeOptions{Authorize: authorize})
			log.Print(err)
		}()
	}
}

func ExampleConnect() {
	conn, err := net.Dial("unix", "/run/recorder.sock")
	if err != nil {
		log.Fatal(err)
	}
	r, err := recorder.Connect(context.Background(), conn, &recorder.ConnectOptions{Target: recorder.Container(4711)})
	if err != nil {
		log.Fatal(err)
	}
	for a := range r.C {
		fmt.Println(a.Path)
	}
	if err := r.Err(); err != nil {
		log.Fatal(err)
	}
}
