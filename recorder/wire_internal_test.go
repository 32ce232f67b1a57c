package recorder

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kernstream/kernstream"
)

// TestWireRoundTrip: what is encoded is decoded the same.
func TestWireRoundTrip(t *testing.T) {
	for _, m := range []startMessage{
		{version: wireVersion},
		{version: wireVersion, descriptors: true, ops: defaultOps, target: Container(4711)},
		{version: wireVersion, oneMount: true, target: Directory("/a b\n\xff")},
	} {
		if got, err := decodeStart(appendStart(m)); err != nil || got != m {
			t.Errorf("%+v, %v; want %+v", got, err, m)
		}
	}
	if err := decodeHello(appendHello()); err != nil {
		t.Error(err)
	}
	now := time.Unix(0, time.Now().UnixNano())
	if got, err := decodeStarted(appendStarted(now)); err != nil || !got.Equal(now) {
		t.Errorf("%v, %v; want %v", got, err, now)
	}
	for _, m := range []endMessage{{}, {files: 7, accesses: 1 << 40, reasons: []string{"a", "", "b\xff"}}} {
		if got, err := decodeEnd(appendEnd(m)); err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%+v, %v; want %+v", got, err, m)
		}
	}
	for _, is := range append([]error{io.ErrShortWrite}, refusals[1:]...) {
		err := decodeRefusal(appendRefusal(recordError("open", "/x", is)))
		if errors.Is(err, is) != (is != io.ErrShortWrite) || !strings.Contains(err.Error(), "/x") {
			t.Errorf("%v; want one that Is %v", err, is)
		}
	}
}

// sampleBatch has two files and more of the first; with others before it.
func sampleBatch() []byte {
	a := file{first: Access{Path: "/a", First: time.Second, PID: 7}, ops: kernstream.OpOpen, count: 1}
	b := file{first: Access{Path: "/b\n\xff", File: os.Stdin}, ops: defaultOps, count: 1 << 50}
	batch := appendRecord(nil, 3, &a, true)
	batch = appendRecord(batch, 4, &b, true)
	return appendRecord(batch, 3, &b, false)
}

// TestWireBatch: files that are new, and more about old ones.
func TestWireBatch(t *testing.T) {
	var got []record
	err := decodeBatch(sampleBatch(), 3, func(r *record) error { got = append(got, *r); return nil })
	want := []record{
		{number: 3, fresh: true, file: file{first: Access{Path: "/a", First: time.Second, PID: 7, Ops: kernstream.OpOpen}, ops: kernstream.OpOpen, count: 1}},
		{number: 4, fresh: true, attached: true, file: file{first: Access{Path: "/b\n\xff", Ops: defaultOps}, ops: defaultOps, count: 1 << 50}},
		{number: 3, file: file{ops: defaultOps, count: 1 << 50}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}

// TestWireBatchOdd: what is cut short, or cannot be, is an error, and nothing of it a file.
func TestWireBatchOdd(t *testing.T) {
	whole := appendRecord(nil, 0, &file{first: Access{Path: "/a"}, ops: defaultOps, count: 1}, true)
	for n := 1; n < len(whole); n++ {
		if err := decodeBatch(whole[:n], 0, func(*record) error { t.Error("a file"); return nil }); err == nil {
			t.Errorf("%d bytes are a batch", n)
		}
	}
	for name, f := range map[string]file{
		"relative":   {first: Access{Path: "a"}, ops: defaultOps, count: 1},
		"empty":      {ops: defaultOps, count: 1},
		"nul":        {first: Access{Path: "/\x00"}, ops: defaultOps, count: 1},
		"too long":   {first: Access{Path: "/" + strings.Repeat("x", maxPath)}, ops: defaultOps, count: 1},
		"operations": {first: Access{Path: "/a"}, ops: kernstream.OpRename, count: 1},
		"no count":   {first: Access{Path: "/a"}, ops: defaultOps},
		"negative":   {first: Access{Path: "/a", First: -1}, ops: defaultOps, count: 1},
	} {
		if err := decodeBatch(appendRecord(nil, 0, &f, true), 0, func(*record) error { return nil }); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := decodeBatch(appendRecord(nil, 2, &file{ops: defaultOps, count: 1}, false), 1, func(*record) error { return nil }); err == nil {
		t.Error("a file after one that is missing: no error")
	}
}

// FuzzWire: no bytes make the decoders fail otherwise than by an error; a batch
// that they accept has only files that can be.
func FuzzWire(f *testing.F) {
	f.Add(byte(msgBatch), sampleBatch())
	f.Add(byte(msgStart), appendStart(startMessage{version: wireVersion, target: Directory("/a")}))
	f.Add(byte(msgEnd), appendEnd(endMessage{reasons: []string{"a"}}))
	f.Add(byte(msgHello), appendHello())
	f.Add(byte(msgRefused), appendRefusal(fs.ErrPermission))
	f.Add(byte(0), appendHeader(nil, header{5, msgBatch, 3}))
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		switch messageType(kind) {
		case msgBatch:
			known := 3
			decodeBatch(b, 3, func(r *record) error {
				if r.number > known || r.file.count == 0 || r.fresh && !validPath(r.file.first.Path) {
					t.Errorf("%+v", r)
				}
				if r.fresh {
					known++
				}
				return nil
			})
		case msgStart:
			if m, err := decodeStart(b); err == nil && m.target != nil {
				if again, err := decodeStart(appendStart(m)); err != nil || again != m {
					t.Errorf("%+v, %v; want %+v", again, err, m)
				}
			}
		case msgEnd:
			decodeEnd(b)
		case msgHello:
			decodeHello(b)
		case msgStarted:
			decodeStarted(b)
		case msgRefused:
			decodeRefusal(b)
		default:
			if len(b) >= headerBytes {
				if h, err := decodeHeader(b); err == nil && h.size > maxMessage {
					t.Errorf("%+v", h)
				}
			}
		}
	})
}

// TestParityR6Handshake: a server that says nothing, or stops in the middle, is given up
// after five seconds, and not before.
func TestParityR6Handshake(t *testing.T) {
	for name, script := range map[string]func(net.Conn){
		"silent":      func(net.Conn) {},
		"slow":        func(c net.Conn) { time.Sleep(handshake - 1); c.Write(appendHeader(nil, header{12, msgHello, 0})) },
		"hello alone": func(c net.Conn) { sendTo(c, msgHello, appendHello()); io.Copy(io.Discard, c) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, conn := net.Pipe()
				defer server.Close()
				go script(server)
				begin := time.Now()
				_, err := Connect(t.Context(), conn, nil)
				if took := time.Since(begin); !errors.Is(err, os.ErrDeadlineExceeded) || took != handshake {
					t.Errorf("%v after %v; want os.ErrDeadlineExceeded after %v", err, took, handshake)
				}
			})
		})
	}
}

func sendTo(c net.Conn, typ messageType, payload []byte) {
	c.Write(append(appendHeader(nil, header{len(payload), typ, 0}), payload...))
}

// TestConnectOver: a connection of any kind will do; a server that does not end when it is asked to
// is left after a moment, and the list is then incomplete.
func TestConnectOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, conn := net.Pipe()
		defer server.Close()
		go func() {
			sendTo(server, msgHello, appendHello())
			l := newLink(server)
			l.receive(maxMessage)
			sendTo(server, msgStarted, appendStarted(time.Now()))
			sendTo(server, msgBatch, appendRecord(nil, 0, &file{first: Access{Path: "/a"}, ops: defaultOps, count: 1}, true))
			io.Copy(io.Discard, server)
		}()
		r, err := Connect(t.Context(), conn, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a := <-r.C; a.Path != "/a" {
			t.Errorf("the access is %v", a)
		}
		begin := time.Now()
		r.Close()
		if took := time.Since(begin); took > time.Second {
			t.Errorf("Close took %v", took)
		}
		list, err := r.List()
		if err != nil || list.Complete || len(list.Entries) != 1 {
			t.Errorf("%+v, %v", list, err)
		}
	})
}

// TestConnectHostile: what a server must not send ends the connection, with an incomplete list and an
// error; what came before stays.
func TestConnectHostile(t *testing.T) {
	one := appendRecord(nil, 0, &file{first: Access{Path: "/a"}, ops: defaultOps, count: 1}, true)
	same := appendRecord(nil, 1, &file{first: Access{Path: "/a"}, ops: defaultOps, count: 1}, true)
	attached := appendRecord(nil, 1, &file{first: Access{Path: "/b", File: os.Stdin}, ops: defaultOps, count: 1}, true)
	for name, c := range map[string]struct {
		typ     messageType
		payload []byte
		word    string
	}{
		"hello again":   {msgHello, appendHello(), "type 1"},
		"a client's":    {msgStop, nil, "type 7"},
		"garbage":       {msgBatch, []byte("garbage"), "too much"},
		"twice":         {msgBatch, same, "twice"},
		"no descriptor": {msgBatch, attached, "descriptor is missing"},
		"overflow":      {msgOverflow, []byte{1}, "1 bytes"},
		"miscounted":    {msgEnd, appendEnd(endMessage{files: 2}), "1 files of 2"},
		"end cut short": {msgEnd, []byte{1, 0, 0}, "cut short"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, conn := net.Pipe()
				defer server.Close()
				go func() {
					sendTo(server, msgHello, appendHello())
					newLink(server).receive(maxMessage)
					sendTo(server, msgStarted, appendStarted(time.Now()))
					sendTo(server, msgBatch, one)
					sendTo(server, c.typ, c.payload)
					io.Copy(io.Discard, server)
				}()
				r, err := Connect(t.Context(), conn, nil)
				if err != nil {
					t.Fatal(err)
				}
				for range r.C {
				}
				if err := r.Err(); err == nil || !strings.Contains(err.Error(), c.word) {
					t.Errorf("error %v; want %q in it", err, c.word)
				}
				list, err := r.List()
				if err != nil || list.Complete || len(list.Entries) != 1 || !strings.Contains(strings.Join(list.Reasons, " "), c.word) {
					t.Errorf("%+v, %v", list, err)
				}
			})
		})
	}
}

// TestConnectOverflow: an overflow at the server is known at once, and is a reason if the
// connection breaks before the verdict; a list that is too long for the client, too.
func TestConnectOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, conn := net.Pipe()
		go func() {
			sendTo(server, msgHello, appendHello())
			newLink(server).receive(maxMessage)
			sendTo(server, msgStarted, appendStarted(time.Now()))
			sendTo(server, msgBatch, sampleFiles(3))
			sendTo(server, msgOverflow, []byte{2, 0, 0, 0})
			server.Close()
		}()
		r, err := Connect(t.Context(), conn, &ConnectOptions{MaxFiles: 2})
		if err != nil {
			t.Fatal(err)
		}
		for range r.C {
		}
		list, err := r.List()
		if err != nil || len(list.Entries) != 2 || r.Progress().Overflows != 2 {
			t.Errorf("%+v, %v, %+v", list, err, r.Progress())
		}
		reasons := strings.Join(list.Reasons, "\n")
		for _, word := range []string{"2 times", "the 2 that", "gone"} {
			if !strings.Contains(reasons, word) {
				t.Errorf("reasons %q; want %q in them", reasons, word)
			}
		}
	})
}

func sampleFiles(n int) (b []byte) {
	for i := range n {
		b = appendRecord(b, i, &file{first: Access{Path: "/" + string(rune('a'+i))}, ops: defaultOps, count: 1}, true)
	}
	return b
}

// TestConnectRefused: what a client can know to be wrong does not reach a server.
func TestConnectRefused(t *testing.T) {
	for word, o := range map[string]*ConnectOptions{
		"no process":  {Target: Container(0)},
		"absolute":    {Target: Directory("a")},
		"no commands": {Target: Command(nil)},
		"MaxFiles":    {MaxFiles: -1},
		"Unix socket": {Descriptors: true},
	} {
		server, conn := net.Pipe()
		if _, err := Connect(t.Context(), conn, o); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%+v: %v; want %q in it", o, err, word)
		}
		if _, err := server.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the connection: %v; want it closed", err)
		}
	}
}
