module github.com/kernstream/kernstream/contrib/gofuse

go 1.26.0

replace github.com/kernstream/kernstream => ../../

require (
	github.com/hanwen/go-fuse/v2 v2.12.1
	github.com/kernstream/kernstream v0.0.0
	golang.org/x/sys v0.49.0
)

require (
	go.uber.org/goleak v1.3.0 // indirect
	golang.org/x/sync v0.24.0 // indirect
)
