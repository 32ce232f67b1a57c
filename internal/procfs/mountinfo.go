// Package procfs decodes files of the proc file system. Decoding is apart from
// reading: what decodes takes bytes and does no I/O.
package procfs

import (
	"errors"
	"strconv"
	"strings"
)

// A MountInfo is one row of /proc/PID/mountinfo, see proc_pid_mountinfo(5).
//
// Root, MountPoint, FSType and Source are decoded: the kernel writes space, tab,
// line feed and backslash (and # in the last two) as an octal escape, and
// nothing else. Options and SuperOptions keep their escapes, because a comma
// within an option is one of them: they are to be split first. All are bytes
// of unknown encoding.
type MountInfo struct {
	ID, ParentID uint32
	Major, Minor uint32
	Root         string
	MountPoint   string
	Options      string
	Optional     []string // "shared:1", "master:2", "unbindable" and so on
	FSType       string
	Source       string // may be empty
	SuperOptions string
}

// A MountInfoParser decodes rows. It exists to make the slices of optional
// fields in bulk; the zero value is ready.
type MountInfoParser struct {
	optional []string
}

// optionalBlock is how many optional fields are allocated at once. Rows have
// one or two of them, so a row that is kept for long pins little.
const optionalBlock = 128

// Parse decodes a row without its line feed. The strings of the result share
// the memory of row, except those that had an escape.
//
// When the row cannot be decoded, the result holds what stood before the
// damage, and the error says where that is.
func (p *MountInfoParser) Parse(row string) (m MountInfo, err error) {
	rest := row
	next := func() (field string) {
		field, rest, _ = strings.Cut(rest, " ")
		return field
	}
	var ok bool
	if m.ID, ok = decimal(next()); !ok {
		return m, errors.New("mount ID is not a number")
	}
	if m.ParentID, ok = decimal(next()); !ok {
		return m, errors.New("parent ID is not a number")
	}
	major, minor, _ := strings.Cut(next(), ":")
	var okMajor, okMinor bool
	m.Major, okMajor = decimal(major)
	m.Minor, okMinor = decimal(minor)
	if !okMajor || !okMinor {
		return m, errors.New("device is not two numbers")
	}
	m.Root = Unescape(next())
	m.MountPoint = Unescape(next())
	m.Options = next()
	if m.Options == "" {
		return m, errors.New("no mount options")
	}
	// The separator is the first field "-" after these six. A later one, in a
	// source of that name, is not.
	start := len(p.optional)
	for {
		if rest == "" {
			p.optional = p.optional[:start]
			return m, errors.New("no separator after the optional fields")
		}
		field := next()
		if field == "-" {
			break
		}
		if len(p.optional) == cap(p.optional) {
			grown := make([]string, 0, max(optionalBlock, 2*(len(p.optional)-start)))
			p.optional, start = append(grown, p.optional[start:]...), 0
		}
		p.optional = append(p.optional, field)
	}
	if end := len(p.optional); end > start {
		m.Optional = p.optional[start:end:end]
	}
	m.FSType = Unescape(next())
	if m.FSType == "" {
		return m, errors.New("no file system type")
	}
	// An empty source is an empty field. What follows the source is one
	// field, whatever it holds.
	source, super, found := strings.Cut(rest, " ")
	m.Source = Unescape(source)
	if !found {
		return m, errors.New("no super block options")
	}
	m.SuperOptions = super
	return m, nil
}

// decimal parses a number of at most 32 bits. strconv would take signs and
// underscores, and make an error that nobody reads.
func decimal(s string) (n uint32, ok bool) {
	if s == "" || len(s) > 10 {
		return 0, false
	}
	var wide uint64
	for i := range len(s) {
		digit := s[i] - '0'
		if digit > 9 {
			return 0, false
		}
		wide = wide*10 + uint64(digit)
	}
	if wide > 1<<32-1 {
		return 0, false
	}
	return uint32(wide), true
}

// Unescape decodes the octal escapes of the kernel's seq_escape: a backslash
// and three octal digits that make one byte. A backslash before anything else
// stays as it is.
func Unescape(s string) string {
	i := strings.IndexByte(s, '\\')
	if i < 0 {
		return s
	}
	decoded := make([]byte, 0, len(s))
	for i >= 0 {
		decoded = append(decoded, s[:i]...)
		if s = s[i:]; len(s) >= 4 && isOctal(s[1], '3') && isOctal(s[2], '7') && isOctal(s[3], '7') {
			decoded = append(decoded, (s[1]-'0')<<6|(s[2]-'0')<<3|(s[3]-'0'))
			s = s[4:]
		} else {
			decoded = append(decoded, '\\')
			s = s[1:]
		}
		i = strings.IndexByte(s, '\\')
	}
	return string(append(decoded, s...))
}

func isOctal(c, highest byte) bool { return '0' <= c && c <= highest }

// AppendRow appends the row of m, as the kernel would write it, without a line
// feed: what [MountInfoParser.Parse] decodes to m.
func (m *MountInfo) AppendRow(b []byte) []byte {
	const path, name = " \t\n\\", " \t\n\\#"
	b = append(strconv.AppendUint(b, uint64(m.ID), 10), ' ')
	b = append(strconv.AppendUint(b, uint64(m.ParentID), 10), ' ')
	b = append(strconv.AppendUint(b, uint64(m.Major), 10), ':')
	b = append(strconv.AppendUint(b, uint64(m.Minor), 10), ' ')
	b = append(appendEscaped(b, m.Root, path), ' ')
	b = append(appendEscaped(b, m.MountPoint, path), ' ')
	b = append(b, m.Options...)
	for _, field := range m.Optional {
		b = append(append(b, ' '), field...)
	}
	b = append(appendEscaped(append(b, " - "...), m.FSType, name), ' ')
	b = append(appendEscaped(b, m.Source, name), ' ')
	return append(b, m.SuperOptions...)
}

// appendEscaped appends s, with an octal escape for each of the given bytes.
func appendEscaped(b []byte, s, escaped string) []byte {
	for i := range len(s) {
		if c := s[i]; strings.IndexByte(escaped, c) >= 0 {
			b = append(b, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
		} else {
			b = append(b, c)
		}
	}
	return b
}
