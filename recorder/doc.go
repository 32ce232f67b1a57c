// Package recorder records which files a container, a directory or a command accesses.
package recorder
