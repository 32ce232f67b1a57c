// Package job is what the host and the init in a virtual machine tell each
// other: the host packs a [Job] into the image as JSON, and the init writes one
// [Record] per line to the second serial port.
package job

// The passes: who the tests run as.
const (
	Root    = "root"    // root with all capabilities
	User    = "user"    // an ordinary user, uid and gid UserID
	NoAdmin = "noadmin" // root without CAP_SYS_ADMIN
)

// UserID is the uid and gid of the pass User: nobody, who owns nothing.
const UserID = 65534

// Paths inside the virtual machine.
const (
	Dir        = "/kernels"         // what the host packed
	File       = "job.json"         // the job, in Dir
	ModulesDir = "/kernels/modules" // kernel modules, named in the order of loading
	Busybox    = "/kernels/busybox"
)

// Job says what to run.
type Job struct {
	Passes   []string  // in this order
	Packages []Package // in this order in each pass
	Args     []string  // arguments of each test binary
	Env      []string  // beside those of the pass
	Limit    int       // seconds for each test binary
	Again    int       // how often tests that failed run again, by themselves
	Shell    bool      // an interactive shell on the console in place of the tests
}

// Package is a package with tests. Its test binary is src/Binary beside the job
// and runs in src/Dir, among the files of the package.
type Package struct {
	Name   string // for people: "poller", "kernstream" for the root of the module
	Dir    string
	Binary string
}

// Kind says what a Record is about.
type Kind string

// The kinds of records, in the order of a run: one Hello, for each pass and
// package one Begin, its Lines and one End, and the same for its tests that
// failed and run again, and one Done.
const (
	Hello Kind = "hello" // Text is the kernel's release
	Note  Kind = "note"  // Text is a problem with the environment of the tests
	Begin Kind = "begin"
	Line  Kind = "line" // Text is one line of what the test binary wrote
	End   Kind = "end"  // Status is the exit status of the test binary
	Done  Kind = "done"
)

// Record is one thing that happened.
type Record struct {
	Kind    Kind   `json:"kind"`
	Pass    string `json:"pass,omitempty"`
	Package string `json:"package,omitempty"`
	Text    string `json:"text,omitempty"`
	Status  int    `json:"status,omitempty"`
	Again   bool   `json:"again,omitempty"` // of a Begin: it is of tests that failed
}
