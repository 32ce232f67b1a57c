package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Pictures: a chart of lines or of bars as SVG, which needs no legend and no
// program to draw it. It takes its colours from the reader's theme.

// A chart can be drawn.
type chart interface {
	// svg returns the whole picture; caption says what was measured where.
	svg(caption string) string
}

// emphasis is how much something stands out.
type emphasis int

const (
	peer  emphasis = iota // what others do
	floor                 // the least that is possible
	ours
)

func (e emphasis) class() string { return [...]string{"peer", "floor", "ours"}[e] }

// A lineChart shows how a figure grows with a size.
type lineChart struct {
	title  string // the finding, in a sentence
	x, y   axis
	series []series
}

type axis struct {
	name string // what it is, with the unit
	log  bool   // each step is ten times the last; otherwise it begins at 0
	unit func(v float64) string
}

type series struct {
	name   string
	kind   emphasis
	points []point // by x
}

type point struct{ x, y float64 }

// A barChart compares figures of one kind, of which more is better, in groups.
type barChart struct {
	title  string
	x      axis
	groups []barGroup
}

type barGroup struct {
	name string // may be empty
	bars []bar
}

type bar struct {
	name  string
	kind  emphasis
	value float64
}

// Measures of a picture, in pixels.
const (
	svgWidth     = 760
	svgMargin    = 24
	titleHeight  = 64 // with the name of the y axis
	footHeight   = 74 // with the names of the ticks, and the caption
	linesHeight  = 300
	labelWidth   = 168
	barHeight    = 22
	barGap       = 8
	groupHeading = 28
	letter       = 6.6 // the width of one of the labels', about
)

const svgStyle = `
	text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
	.title { font-size: 17px; font-weight: 600 }
	.name, .tick, .caption { fill: #59636e }
	.tick, .caption { font-size: 12px }
	.paper { fill: #ffffff; stroke: #d1d9e0 }
	.grid { stroke: #e2e7ec }
	.ours { fill: #0969da; stroke: #0969da } .peer { fill: #9a6700; stroke: #9a6700 } .floor { fill: #818b98; stroke: #818b98 }
	path { fill: none !important; stroke-width: 2.5 }
	text.ours, text.peer, text.floor { stroke: none; font-weight: 600 }
	@media (prefers-color-scheme: dark) {
		text { fill: #f0f6fc }
		.name, .tick, .caption { fill: #9198a1 }
		.paper { fill: #0d1117; stroke: #3d444d }
		.grid { stroke: #262c36 }
		.ours { fill: #58a6ff; stroke: #58a6ff } .peer { fill: #d29922; stroke: #d29922 } .floor { fill: #8b949e; stroke: #8b949e }
	}
`

// A picture is an SVG that is being written.
type picture struct{ strings.Builder }

// newPicture begins one with its title, which is also read to who cannot see it.
func newPicture(height int, title string) *picture {
	p := &picture{}
	fmt.Fprintf(p, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" role="img" aria-label="%s">`+"\n",
		svgWidth, height, html.EscapeString(title))
	fmt.Fprintf(p, "<style>%s</style>\n", svgStyle)
	fmt.Fprintf(p, `<rect class="paper" x="0.5" y="0.5" width="%d" height="%d" rx="6"/>`+"\n", svgWidth-1, height-1)
	p.text("title", "start", svgMargin, 32, title)
	return p
}

func (p *picture) text(class, anchor string, x, y float64, text string) {
	fmt.Fprintf(p, `<text class="%s" text-anchor="%s" x="%.1f" y="%.1f">%s</text>`+"\n", class, anchor, x, y, html.EscapeString(text))
}

func (p *picture) line(x1, y1, x2, y2 float64) {
	fmt.Fprintf(p, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`+"\n", x1, y1, x2, y2)
}

// end ends it with the caption.
func (p *picture) end(height int, caption string) string {
	p.text("caption", "start", svgMargin, float64(height)-18, caption)
	p.WriteString("</svg>\n")
	return p.String()
}

// A scale puts values of an axis into a range of pixels.
type scale struct {
	axis
	from, to float64 // pixels
	low, top float64 // values
}

// newScale returns a scale that shows all of values.
func newScale(a axis, from, to float64, values []float64) scale {
	s := scale{axis: a, from: from, to: to, top: slices.Max(values)}
	if a.log {
		s.low = math.Pow(10, math.Floor(math.Log10(slices.Min(values))))
		s.top = math.Pow(10, math.Ceil(math.Log10(s.top)))
		return s
	}
	step := s.step()
	s.top = math.Ceil(s.top/step) * step
	return s
}

// step is the distance of ticks: about five fit, at 1, 2 or 5 of a power of ten.
func (s scale) step() float64 {
	power := math.Pow(10, math.Floor(math.Log10(s.top/5)))
	for _, times := range []float64{1, 2, 5} {
		if s.top/(times*power) <= 6 {
			return times * power
		}
	}
	return 10 * power
}

func (s scale) at(v float64) float64 {
	part := v / s.top
	if s.log {
		part = math.Log(v/s.low) / math.Log(s.top/s.low)
	}
	return s.from + part*(s.to-s.from)
}

func (s scale) ticks() (values []float64) {
	if s.log {
		for v := s.low; v <= s.top*1.001; v *= 10 {
			values = append(values, v)
		}
		return values
	}
	step := s.step()
	for i := 0; float64(i)*step <= s.top*1.001; i++ {
		values = append(values, float64(i)*step)
	}
	return values
}

// svg draws the lines, each with its name at its end.
func (c *lineChart) svg(caption string) string {
	var xs, ys []float64
	longest := 0
	for _, line := range c.series {
		longest = max(longest, len([]rune(line.name)))
		for _, p := range line.points {
			xs, ys = append(xs, p.x), append(ys, p.y)
		}
	}
	const height = titleHeight + linesHeight + footHeight
	const bottom = titleHeight + linesHeight
	right := svgWidth - svgMargin - 12 - float64(longest)*(letter+0.8)
	x := newScale(c.x, svgMargin+64, right, xs)
	y := newScale(c.y, bottom, titleHeight+8, ys)

	p := newPicture(height, c.title)
	p.text("name", "start", svgMargin, titleHeight-8, c.y.name)
	for _, v := range y.ticks() {
		p.line(x.from, y.at(v), x.to, y.at(v))
		p.text("tick", "end", x.from-8, y.at(v)+4, c.y.unit(v))
	}
	for _, v := range x.ticks() {
		p.line(x.at(v), bottom, x.at(v), bottom+5)
		p.text("tick", "middle", x.at(v), bottom+18, c.x.unit(v))
	}
	p.text("name", "middle", (x.from+x.to)/2, bottom+36, c.x.name)
	for _, line := range c.series {
		p.curve(line, x, y)
	}
	for i, at := range labelPlaces(c.series, y) {
		line := c.series[i]
		p.text(line.kind.class(), "start", x.at(line.points[len(line.points)-1].x)+10, at+4, line.name)
	}
	return p.end(height, caption)
}

func (p *picture) curve(line series, x, y scale) {
	var path strings.Builder
	for i, point := range line.points {
		fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(i, 1)], x.at(point.x), y.at(point.y))
	}
	fmt.Fprintf(p, `<path class="%s" d="%s"/>`+"\n", line.kind.class(), path.String())
	for _, point := range line.points {
		fmt.Fprintf(p, `<circle class="%s" cx="%.1f" cy="%.1f" r="3.5"/>`+"\n", line.kind.class(), x.at(point.x), y.at(point.y))
	}
}

// labelPlaces returns at which height each line has its name: at its end, but no
// two at the same.
func labelPlaces(all []series, y scale) []float64 {
	const apart = 17
	places := make([]float64, len(all))
	order := make([]int, len(all))
	for i, line := range all {
		places[i], order[i] = y.at(line.points[len(line.points)-1].y), i
	}
	slices.SortStableFunc(order, func(a, b int) int { return int(places[a] - places[b]) })
	for i, which := range order {
		if i > 0 {
			places[which] = max(places[which], places[order[i-1]]+apart)
		}
	}
	return places
}

// svg draws the bars, each with its name before and its value after it.
func (c *barChart) svg(caption string) string {
	rows, headings := 0, 0
	values := []float64{0}
	for _, g := range c.groups {
		if g.name != "" {
			headings++
		}
		for _, b := range g.bars {
			rows++
			values = append(values, b.value)
		}
	}
	body := rows*(barHeight+barGap) + headings*groupHeading
	height := titleHeight + body + footHeight
	bottom := float64(titleHeight + body)
	x := newScale(c.x, svgMargin+labelWidth, svgWidth-svgMargin-64, values)

	p := newPicture(height, c.title)
	for _, v := range x.ticks() {
		p.line(x.at(v), titleHeight-8, x.at(v), bottom)
		p.text("tick", "middle", x.at(v), bottom+16, c.x.unit(v))
	}
	p.text("name", "middle", (x.from+x.to)/2, bottom+34, c.x.name)
	y := float64(titleHeight)
	for _, g := range c.groups {
		if g.name != "" {
			y += groupHeading
			p.text("name", "start", svgMargin, y-barGap, g.name)
		}
		for _, b := range g.bars {
			middle := y + barHeight/2 + 4.5
			p.text(b.kind.class(), "end", x.from-10, middle, b.name)
			fmt.Fprintf(p, `<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%d" rx="2"/>`+"\n",
				b.kind.class(), x.from, y, max(1, x.at(b.value)-x.from), barHeight)
			p.text("", "start", x.at(b.value)+8, middle, c.x.unit(b.value))
			y += barHeight + barGap
		}
	}
	return p.end(height, caption)
}
