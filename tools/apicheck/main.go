// Command apicheck says what is wrong with the exported API of a module:
//
//	go -C tools run ./apicheck ..
//
// The argument is the directory of the module, whose packages are those that
// others can import. Each exported type, function, method, field, variable and constant must be
// documented, and be used by code outside of its package: an example, an
// external test, another package or command of the module. It prints what is
// not, one a line, and then fails.
//
// A method that makes its type fit an interface of the standard library is used
// by whatever takes that interface. What stands for bits of the kernel is
// exported as a whole: of constants of one type, one that is used is enough. A
// type is used if its name is, a constant of it, a method or a field.
package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: apicheck DIRECTORY")
		os.Exit(2)
	}
	problems, err := check(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "apicheck:", err)
		os.Exit(1)
	}
	for _, p := range problems {
		fmt.Println(p)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
}

// check returns what is wrong with the module in dir.
func check(dir string) ([]string, error) {
	all, err := load(dir)
	if err != nil {
		return nil, err
	}
	uses := collectUses(all)
	var problems []string
	checked := 0
	for _, p := range all {
		// A package is there twice: with its internal tests, and without.
		if p.ID != p.PkgPath || p.Name == "main" || notForOthers(p.PkgPath) {
			continue
		}
		checked++
		exported := symbols(p)
		usesOfTypes(exported, uses)
		for _, s := range exported {
			if !s.documented {
				problems = append(problems, fmt.Sprintf("%s: %s is not documented", p.Fset.Position(s.pos), s.name))
			}
			if !s.anyUsed(uses) {
				problems = append(problems, fmt.Sprintf("%s: nobody outside of the package uses %s", p.Fset.Position(s.pos), s.name))
			}
		}
	}
	if checked == 0 {
		return nil, fmt.Errorf("no package in %s can be imported", dir)
	}
	base, err := filepath.Abs(dir)
	for i := range problems {
		problems[i] = strings.TrimPrefix(problems[i], base+"/")
	}
	slices.Sort(problems)
	return problems, err
}

// notForOthers tells whether a package is part of how the module is tested, or
// is internal.
func notForOthers(path string) bool {
	return slices.ContainsFunc(strings.Split(path, "/"), func(elem string) bool { return elem == "internal" || elem == "test" })
}

func load(dir string) ([]*packages.Package, error) {
	found, err := packages.Load(&packages.Config{
		Dir:   dir,
		Tests: true,
		Mode:  packages.NeedName | packages.NeedFiles | packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo,
	}, "./...")
	if err != nil {
		return nil, err
	}
	for _, p := range found {
		for _, e := range p.Errors {
			return nil, fmt.Errorf("%s: %v", p.ID, e)
		}
	}
	return found, nil
}

// A key names an object of a package however often that was type-checked: by
// where it is declared.
type key string

func keyOf(fset *token.FileSet, o types.Object) key {
	return key(fset.Position(o.Pos()).String() + " " + o.Name())
}

// collectUses returns what is used outside of the package that declares it. An
// external test is outside.
func collectUses(all []*packages.Package) map[key]bool {
	uses := map[key]bool{}
	for _, p := range all {
		for _, o := range p.TypesInfo.Uses {
			if o.Pkg() != nil && o.Pkg().Path() != p.PkgPath {
				uses[keyOf(p.Fset, origin(o))] = true
			}
		}
	}
	return uses
}

// origin returns the generic object of an instance.
func origin(o types.Object) types.Object {
	switch o := o.(type) {
	case *types.Func:
		return o.Origin()
	case *types.Var:
		return o.Origin()
	}
	return o
}

// A symbol is something exported.
type symbol struct {
	name       string
	pos        token.Pos
	documented bool
	objects    []key  // any of which must be used
	of         string // the type that it is a part of
	isType     bool
}

func (s *symbol) anyUsed(uses map[key]bool) bool {
	return len(s.objects) == 0 || slices.ContainsFunc(s.objects, func(k key) bool { return uses[k] })
}

// usesOfTypes marks as used every type of which a part is.
func usesOfTypes(all []symbol, uses map[key]bool) {
	for i := range all {
		if all[i].isType {
			continue
		}
		for j := range all {
			if all[j].isType && all[j].name == all[i].of && all[i].anyUsed(uses) {
				uses[all[j].objects[0]] = true
			}
		}
	}
}

// symbols returns what a package exports.
func symbols(p *packages.Package) []symbol {
	c := &collector{p: p, byType: map[string]*symbol{}}
	for _, file := range p.Syntax {
		for _, decl := range file.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				c.function(d)
			case *ast.GenDecl:
				c.general(d)
			}
		}
	}
	for _, s := range c.byType {
		c.symbols = append(c.symbols, *s)
	}
	return c.symbols
}

type collector struct {
	p       *packages.Package
	symbols []symbol
	byType  map[string]*symbol // constants of one type
}

func (c *collector) add(prefix string, id *ast.Ident, documented bool) {
	if id.IsExported() {
		o := c.p.TypesInfo.Defs[id]
		_, isType := o.(*types.TypeName)
		c.symbols = append(c.symbols, symbol{
			name: prefix + id.Name, pos: id.Pos(), documented: documented, objects: []key{keyOf(c.p.Fset, o)},
			of: strings.TrimSuffix(prefix, "."), isType: isType,
		})
	}
}

func (c *collector) function(d *ast.FuncDecl) {
	prefix := ""
	if d.Recv != nil {
		name := receiver(d.Recv.List[0].Type)
		if !ast.IsExported(name) {
			return
		}
		prefix = name + "."
	}
	if standard[d.Name.Name] && d.Recv != nil {
		if d.Doc == nil {
			c.symbols = append(c.symbols, symbol{name: prefix + d.Name.Name, pos: d.Pos()})
		}
		return
	}
	c.add(prefix, d.Name, d.Doc != nil)
}

// standard are methods of interfaces of the standard library.
var standard = map[string]bool{
	"Error": true, "Unwrap": true, "Is": true, "String": true,
	"MarshalJSON": true, "UnmarshalJSON": true, "MarshalText": true, "UnmarshalText": true,
}

func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

func (c *collector) general(d *ast.GenDecl) {
	for _, spec := range d.Specs {
		switch s := spec.(type) {
		case *ast.TypeSpec:
			c.add("", s.Name, d.Doc != nil || s.Doc != nil)
			if s.Name.IsExported() {
				c.members(s)
			}
		case *ast.ValueSpec:
			documented := d.Doc != nil || s.Doc != nil || s.Comment != nil
			for _, id := range s.Names {
				if d.Tok == token.CONST {
					c.constant(id, documented)
				} else {
					c.add("", id, documented)
				}
			}
		}
	}
}

// constant notes a constant: those of one type are one symbol.
func (c *collector) constant(id *ast.Ident, documented bool) {
	if !id.IsExported() {
		return
	}
	o := c.p.TypesInfo.Defs[id]
	typ := o.Type().String()
	if _, named := o.Type().(*types.Named); !named {
		c.add("", id, documented)
		return
	}
	if c.byType[typ] == nil {
		name := o.Type().(*types.Named).Obj().Name()
		c.byType[typ] = &symbol{name: "the constants of " + name, pos: id.Pos(), documented: true, of: name}
	}
	s := c.byType[typ]
	s.documented = s.documented && documented
	s.objects = append(s.objects, keyOf(c.p.Fset, o))
}

// members notes the fields and methods that a type declares.
func (c *collector) members(s *ast.TypeSpec) {
	var list *ast.FieldList
	switch t := s.Type.(type) {
	case *ast.StructType:
		list = t.Fields
	case *ast.InterfaceType:
		list = t.Methods
	default:
		return
	}
	// A comment before a field may be about those that follow it, too.
	above, line := false, 0
	for _, f := range list.List {
		if next := c.p.Fset.Position(f.Pos()).Line; f.Doc != nil || next != line+1 {
			above = f.Doc != nil
		}
		line = c.p.Fset.Position(f.End()).Line
		documented := above || f.Comment != nil
		for _, id := range f.Names {
			if !standard[id.Name] {
				c.add(s.Name.Name+".", id, documented)
			}
		}
	}
}
