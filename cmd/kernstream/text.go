package main

import (
	"os"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// What makes text fit for people and their terminals.

// The colours of the marks.
const (
	colorNone   = ""
	colorRed    = "\x1b[31m"
	colorGreen  = "\x1b[32m"
	colorYellow = "\x1b[33m"
	colorCyan   = "\x1b[36m"
	colorReset  = "\x1b[0m"
)

// showsColors tells whether file is a terminal, and nobody asked it to be
// plain (see https://no-color.org).
func showsColors(file *os.File) bool {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// readable returns s, quoted if it is empty, or has spaces, quotes, bytes that
// are not text, or control characters, which a terminal might obey.
func readable(s string) string {
	odd := func(r rune) bool { return r == '"' || unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, odd) {
		return strconv.Quote(s)
	}
	return s
}

// columns lines up the fields of consecutive lines. A column grows with what
// it has shown, up to a limit beyond which a field just takes more room.
type columns struct {
	widths []int
	limits []int
}

// fit makes the columns wide enough for fields.
func (c *columns) fit(fields ...string) {
	if c.widths == nil {
		c.widths = make([]int, len(c.limits))
	}
	for i, field := range fields {
		if i < len(c.limits) {
			c.widths[i] = max(c.widths[i], min(utf8.RuneCountInString(field), c.limits[i]))
		}
	}
}

// line returns fields as one line, without spaces at its end.
func (c *columns) line(fields ...string) string {
	c.fit(fields...)
	var b strings.Builder
	for i, field := range fields {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(field)
		if i < len(c.widths) {
			b.WriteString(strings.Repeat(" ", max(0, c.widths[i]-utf8.RuneCountInString(field))))
		}
	}
	return strings.TrimRight(b.String(), " ")
}
