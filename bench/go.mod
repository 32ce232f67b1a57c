module github.com/kernstream/kernstream/bench

go 1.26.0

replace (
	github.com/kernstream/kernstream => ../
	github.com/kernstream/kernstream/contrib/gofuse => ../contrib/gofuse
)

require (
	github.com/hanwen/go-fuse/v2 v2.12.1
	github.com/kernstream/kernstream v0.0.0
	github.com/kernstream/kernstream/contrib/gofuse v0.0.0
	github.com/mdlayher/socket v0.8.0
	github.com/moby/sys/mountinfo v0.7.3
	github.com/prometheus/procfs v0.23.0
	golang.org/x/sys v0.49.0
)

require (
	golang.org/x/net v0.61.0 // indirect
	golang.org/x/sync v0.24.0 // indirect
)
