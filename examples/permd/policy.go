package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A policy is the lines of a file:
//
//	# comments and empty lines are left out
//	allow /srv/data/public      this file, or what is below this directory
//	deny  /srv/data/*.key       a pattern for one file, as in path/filepath.Match
//
// What stands after the path is a remark, after two spaces or a tab.
type policy []rule

// A rule is one of them.
type rule struct {
	line  int
	allow bool
	path  string
}

// readPolicy reads all rules, or none.
func readPolicy(name string) (policy, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var rules policy
	lines := bufio.NewScanner(file)
	n := 1
	for ; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		r, err := parseRule(line)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, n, err)
		}
		r.line = n
		rules = append(rules, r)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s:%d: %w", name, n, err)
	}
	return rules, nil
}

func parseRule(line string) (rule, error) {
	verb, path, _ := strings.Cut(line, " ")
	path = strings.TrimSpace(path)
	for _, gap := range []string{"  ", "\t"} {
		path, _, _ = strings.Cut(path, gap)
	}
	r := rule{allow: verb == "allow", path: path}
	switch {
	case verb != "allow" && verb != "deny":
		return r, fmt.Errorf("%q is neither allow nor deny", verb)
	case !strings.HasPrefix(path, "/"):
		return r, fmt.Errorf("%q is no absolute path", path)
	}
	if _, err := filepath.Match(path, ""); err != nil {
		return r, fmt.Errorf("%q: %w", path, err)
	}
	r.path = filepath.Clean(path)
	return r, nil
}

// match returns the first rule about a path; nil: there is none.
func (p policy) match(path string) *rule {
	for i := range p {
		r := &p[i]
		if path == r.path || strings.HasPrefix(path, strings.TrimSuffix(r.path, "/")+"/") {
			return r
		}
		if ok, _ := filepath.Match(r.path, path); ok {
			return r
		}
	}
	return nil
}
