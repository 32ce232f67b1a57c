// This file makes a column of the matrix out of the records of one kernel.

package main

import "github.com/kernstream/kernstream/test/kernels/job"

// collector makes a column out of records.
type collector struct {
	column  *column
	parser  *parser
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
		c.parser = newParser(rec.Package)
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
	p.Results = append(p.Results, c.parser.End(status)...)
	c.parser = nil
}
