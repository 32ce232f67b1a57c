// This file makes a column of the matrix out of the records of one kernel.

package main

import (
	"slices"
	"strings"

	"github.com/kernstream/kernstream/test/kernels/job"
)

// collector makes a column out of records.
type collector struct {
	column  *column
	parser  *parser
	again   bool // what is parsed is of tests that failed before
	verbose func(pass, line string)
}

// Handle takes the next record.
func (c *collector) Handle(rec job.Record) {
	switch rec.Kind {
	case job.Hello:
		if v, err := parseVersion(rec.Text); err != nil {
			c.column.Notes = append(c.column.Notes, err.Error())
		} else {
			c.column.Version = v
		}
	case job.Note:
		c.column.Notes = append(c.column.Notes, rec.Pass+": "+rec.Text)
	case job.Begin:
		if n := len(c.column.Passes); n == 0 || c.column.Passes[n-1].Pass != rec.Pass {
			c.column.Passes = append(c.column.Passes, passResult{Pass: rec.Pass})
		}
		c.parser, c.again = newParser(rec.Package), rec.Again
	case job.Line:
		c.verbose(rec.Pass, rec.Text)
		if c.parser != nil {
			c.parser.Line(rec.Text)
		}
	case job.End:
		c.finish(rec.Status)
	}
}

// Close ends the column; err is why the run ended early, if it did. What the
// last test binary had brought by then is not lost.
func (c *collector) Close(err error) {
	c.finish(1)
	c.column.Err = err
	c.column.apply()
}

func (c *collector) finish(status int) {
	if c.parser == nil {
		return
	}
	p := &c.column.Passes[len(c.column.Passes)-1]
	results := c.parser.End(status)
	switch {
	case !c.again:
		p.Results = append(p.Results, results...)
	case status == 0:
		p.unsteady(results)
	}
	c.parser = nil
}

// unsteady takes the results of tests that failed, and then passed each time in
// place of the first ones.
func (p *passResult) unsteady(again []result) {
	for i := range again {
		test := &again[i]
		if test.Outcome != passed || parentTest(test.Name) != "" {
			continue
		}
		of := func(r result) bool {
			return r.Package == test.Package && (r.Name == test.Name || strings.HasPrefix(r.Name, test.Name+"/"))
		}
		first := slices.IndexFunc(p.Results, of)
		if first < 0 {
			continue
		}
		for _, r := range p.Results {
			if of(r) && r.Outcome == failed {
				test.Output = append(test.Output, r.Output...)
			}
		}
		p.Results = slices.DeleteFunc(p.Results, of)
		test.Unsteady = true
		kept := slices.DeleteFunc(slices.Clone(again), func(r result) bool { return !of(r) })
		p.Results = slices.Insert(p.Results, first, kept...)
	}
}
