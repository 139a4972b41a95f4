package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The rooms. A file that is not named here does not belong.
const (
	system = " sys.go sys_linux.go sys_other.go "
	rooms  = " main.go acl.go exec.go server.go answer.go config.go strict.go audit.go plugin.go daemon.go cli.go" + system
)

// powers says who may do what: only the named files may use the imports, names and members. To change this table is to
// change the policy, never a way to make a build pass.
var powers = []power{
	{what: "end the process", files: " main.go ",
		names: `os\.Exit|log\.(Fatal|Panic)\w*|runtime\.Goexit`, members: `Fatal|Fatalf|Fatalln`},
	{what: "use os/exec", files: " exec.go ",
		imports: `os/exec`},
	{what: "start a process", files: " exec.go daemon.go " + system,
		names: `os\.(StartProcess|ProcAttr)|syscall\.(SysProcAttr|Credential)`, members: `Setsid|Setpgid|Setctty|Foreground|Credential|Chroot`},
	{what: "signal a process", files: " exec.go daemon.go " + system,
		names: `os\.FindProcess`, members: `Kill|Signal\(\)`},
	{what: "signal by number, or reap", files: " exec.go " + system,
		names: `syscall\.(Kill|Wait4)`},
	{what: "call the system itself", files: system,
		imports: `golang\.org/x/sys/.*|unsafe`,
		names:   `syscall\.\w+`, except: `syscall\.((SIG|E|O_|S_|F_|LOCK_|W)[A-Z0-9_]+|Signal|Errno|Stat_t|WaitStatus|SysProcAttr|Credential|Kill|Wait4)`},
	{what: "take signals", files: " main.go ",
		imports: `os/signal`},
	{what: "listen or use the network", files: " server.go ",
		imports: `net/http/.+|golang\.org/x/time/rate`,
		names:   `net\.(Listen|Dial|File|Lookup|Default)\w*|net\.Resolver|http\.\w+`, except: `http\.((Status|Method)\w+|NewServeMux|ServeMux|NotFoundHandler)`},
	{what: "know patterns of net/http", files: " server.go plugin.go ",
		names: `http\.(NewServeMux|ServeMux|NotFoundHandler)`},
	{what: "read the environment", files: " config.go ",
		names: `os\.(Getenv|LookupEnv|Setenv|Unsetenv|Clearenv|Expand|ExpandEnv|UserHomeDir|UserConfigDir|UserCacheDir|TempDir)`},
	{what: "hand on the whole environment", files: " config.go sys.go ",
		names: `os\.Environ`},
	{what: "open a file", files: " config.go audit.go plugin.go daemon.go exec.go " + system,
		names: `os\.(Open|OpenFile|ReadFile|NewFile|Readlink)`},
	{what: "write, move or remove a file", files: " config.go audit.go plugin.go daemon.go ",
		names: `os\.(Create|CreateTemp|WriteFile|Rename|Remove|RemoveAll|Mkdir\w*|Chmod|Chown|Lchown|Chtimes|Link|Symlink|Truncate|CopyFS)`},
	{what: "open for append", files: " audit.go ",
		names: `(os|syscall|unix)\.O_APPEND`},
	{what: "walk plugin directories", files: " plugin.go ",
		names: `os\.(OpenRoot|OpenInRoot|Root|DirFS)|filepath\.(Walk|WalkDir)|fs\.(WalkDir|ReadDir|ReadFile|Glob|Sub)`},
	{what: "list a directory, of /proc or a plugin's", files: " plugin.go daemon.go " + system,
		names: `os\.ReadDir|filepath\.Glob`},
	{what: "use the terminal", files: " cli.go ",
		imports: `flag`,
		names:   `os\.(Stdin|Stdout|Stderr)|fmt\.(Print|Scan)(f|ln)?|log\.(Print(f|ln)?|Output|SetOutput|Default|Writer)|print|println`},
	{what: "approve without a rule", files: " acl.go plugin.go ",
		names: `approveUnchecked`},
	{what: "be used at all", files: "",
		imports: `C|plugin|expvar|io/ioutil|log/syslog|net/(rpc|smtp).*|net/http/(pprof|cgi|fcgi|httptest)|testing.*|runtime/cgo|[^/]*\.[^/]*/.*`, exceptImports: `golang\.org/x/(sys|time)/.*`},
}

// aclImports is everything that the policy may know of: nothing here does I/O, tells the time or keeps state.
const aclImports = " encoding/json errors fmt path regexp regexp/syntax slices strings unicode unicode/utf8 "

type power struct {
	what                   string
	files                  string // the only ones
	imports, exceptImports string // regexps of import paths
	names, except          string // regexps of package.Name, and of functions without a package
	members                string // regexp of fields and methods; with () a method called with arguments
}

func TestFilesKeepToTheirPowers(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	looked := 0
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		looked++
		src, err := os.ReadFile(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		for _, offence := range offences(e.Name(), string(src)) {
			t.Error(offence)
		}
	}
	if looked < 10 {
		t.Errorf("looked at %d files only", looked)
	}
}

// warden looks at one file.
type warden struct {
	name   string
	fset   *token.FileSet
	local  map[string]string // name of an imported package: its path
	called map[ast.Expr]bool // functions of calls with arguments
	found  []string
}

func (w *warden) report(at ast.Node, format string, args ...any) {
	w.found = append(w.found, fmt.Sprintf("%s: ", w.fset.Position(at.Pos()))+fmt.Sprintf(format, args...))
}

func offences(name, src string) []string {
	w := &warden{name: name, fset: token.NewFileSet(), local: map[string]string{}, called: map[ast.Expr]bool{}}
	file, err := parser.ParseFile(w.fset, name, src, parser.ParseComments)
	if err != nil {
		return []string{err.Error()}
	}
	if !strings.Contains(rooms, " "+name+" ") {
		w.report(file, "no such room: a file is known by its line in this test")
	}
	w.opening(file)
	w.imports(file)
	for _, group := range file.Comments {
		for _, c := range group.List {
			if strings.HasPrefix(c.Text, "//go:linkname") || strings.HasPrefix(c.Text, "//go:cgo") {
				w.report(c, "%s reaches around the imports", c.Text)
			}
		}
	}
	ast.Inspect(file, w.look)
	if name == "acl.go" {
		w.aclKeepsNoState(file)
	} else {
		ast.Inspect(file, w.lookForApproval)
	}
	return w.found
}

// opening wants three sentences before the package clause: what the file is, what it may do, what it must not.
func (w *warden) opening(file *ast.File) {
	lines := strings.Split(strings.TrimSpace(file.Doc.Text()), "\n")
	starts := []string{"This file ", "It may ", "It must not "}
	if len(lines) != len(starts) {
		w.report(file, "does not open with three lines: %q", starts)
		return
	}
	for i, start := range starts {
		if !strings.HasPrefix(lines[i], start) || !strings.HasSuffix(lines[i], ".") {
			w.report(file, "line %d of the opening is not a sentence that begins with %q", i+1, start)
		}
	}
}

func (w *warden) imports(file *ast.File) {
	for _, spec := range file.Imports {
		path, _ := strconv.Unquote(spec.Path.Value)
		w.local[path[strings.LastIndexByte(path, '/')+1:]] = path
		if spec.Name != nil {
			w.report(spec, "imports %q under another name: aliases, dots and blanks hide who does what", path)
		}
		if w.name == "acl.go" && !strings.Contains(aclImports, " "+path+" ") {
			w.report(spec, "imports %q: the policy may know only%s", path, aclImports)
		}
		for _, p := range powers {
			if is(p.imports, path) && !is(p.exceptImports, path) {
				w.hold(spec, p, "imports "+path)
			}
		}
	}
}

// is says whether the pattern matches the whole text; an empty pattern matches nothing.
func is(pattern, text string) bool {
	if pattern == "" {
		return false
	}
	if powerPatterns[pattern] == nil {
		powerPatterns[pattern] = regexp.MustCompile(`^(?:` + pattern + `)$`)
	}
	return powerPatterns[pattern].MatchString(text)
}

var powerPatterns = map[string]*regexp.Regexp{} // compiled once; these tests are not parallel

func (w *warden) hold(at ast.Node, p power, what string) {
	if !strings.Contains(p.files, " "+w.name+" ") {
		w.report(at, "%s, but only%s may %s", what, " "+strings.Join(strings.Fields(p.files), " "), p.what)
	}
}

// look sees every use of a package's name, of a bare function, and of a member. What is declared in the file itself hides
// a package or builtin of its name (Obj), so that a logger called log is not the package.
func (w *warden) look(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CallExpr:
		w.called[n.Fun] = len(n.Args) > 0
		if id, ok := n.Fun.(*ast.Ident); ok && id.Obj == nil {
			w.use(n, id.Name)
		}
	case *ast.SelectorExpr:
		if id, ok := n.X.(*ast.Ident); ok && id.Obj == nil && w.local[id.Name] != "" {
			w.use(n, id.Name+"."+n.Sel.Name)
		} else {
			w.member(n, n.Sel.Name, w.called[n])
		}
	case *ast.KeyValueExpr:
		if id, ok := n.Key.(*ast.Ident); ok {
			w.member(n, id.Name, false)
		}
	case *ast.Ident: // also as a value: f := approveUnchecked
		if n.Name == "approveUnchecked" {
			w.use(n, n.Name)
		}
	}
	return true
}

func (w *warden) use(at ast.Node, name string) {
	for _, p := range powers {
		if is(p.names, name) && !is(p.except, name) {
			w.hold(at, p, "uses "+name)
		}
	}
}

func (w *warden) member(at ast.Node, name string, called bool) {
	for _, p := range powers {
		if is(p.members, name) || called && is(p.members, name+"()") {
			w.hold(at, p, "uses the member "+name)
		}
	}
}

// lookForApproval sees every way to make or change an approved value that needs no other file's help: a literal of it or of
// something that holds it, a conversion, a type made of it, and a write to its fields. The names of the fields are kept
// for it, so that their writes are seen without knowing types.
func (w *warden) lookForApproval(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.CompositeLit:
		if mentions(n.Type) {
			w.report(n, "makes an approved value: only acl.go may")
		}
	case *ast.TypeSpec:
		if mentions(n.Type) {
			w.report(n, "makes a type of approved: only acl.go may")
		}
	case *ast.CallExpr:
		name, _ := unwrap(n.Fun).(*ast.Ident)
		if mentions(n.Fun) {
			w.report(n, "converts to approved: only acl.go may")
		} else if name != nil && len(n.Args) > 0 && slices.Contains([]string{"append", "copy", "clear"}, name.Name) && field(n.Args[0]) {
			w.report(n, "may change an approved argv: only acl.go may")
		}
	case *ast.AssignStmt:
		for _, left := range n.Lhs {
			if field(left) {
				w.report(n, "writes a field of approved: only acl.go may")
			}
		}
	case *ast.UnaryExpr:
		if n.Op == token.AND && field(n.X) {
			w.report(n, "takes the address of a field of approved: only acl.go may")
		}
	}
	return true
}

func unwrap(e ast.Expr) ast.Expr {
	for {
		switch x := e.(type) {
		case *ast.ParenExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.SliceExpr:
			e = x.X
		default:
			return e
		}
	}
}

// field says whether an expression is a field called argv or by, or an element of it.
func field(e ast.Expr) bool {
	sel, ok := unwrap(e).(*ast.SelectorExpr)
	return ok && (sel.Sel.Name == "argv" || sel.Sel.Name == "by")
}

// mentions says whether a type is made of approved: itself, or a pointer, slice, array, map or channel of it. Structs with
// such a field and functions are no way to make one.
func mentions(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name == "approved"
	case *ast.ParenExpr:
		return mentions(e.X)
	case *ast.StarExpr:
		return mentions(e.X)
	case *ast.ArrayType:
		return mentions(e.Elt)
	case *ast.MapType:
		return mentions(e.Key) || mentions(e.Value)
	case *ast.ChanType:
		return mentions(e.Value)
	case *ast.IndexExpr:
		return mentions(e.Index)
	}
	return false
}

// aclKeepsNoState wants no variable but compiled regexps, no goroutine, no channel.
func (w *warden) aclKeepsNoState(file *ast.File) {
	for _, decl := range file.Decls {
		d, ok := decl.(*ast.GenDecl)
		if !ok || d.Tok != token.VAR {
			continue
		}
		for _, spec := range d.Specs {
			v := spec.(*ast.ValueSpec)
			for _, value := range v.Values {
				call, _ := value.(*ast.CallExpr)
				if call == nil || qualified(call.Fun) != "regexp.MustCompile" {
					w.report(v, "a variable that is not a compiled regexp: the policy keeps no state")
				}
			}
			if len(v.Values) == 0 {
				w.report(v, "a variable: the policy keeps no state")
			}
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n.(type) {
		case *ast.GoStmt, *ast.ChanType, *ast.SendStmt, *ast.SelectStmt:
			w.report(n, "the policy is one pure function: no goroutine, no channel")
		}
		return true
	})
}

func qualified(e ast.Expr) string {
	if sel, ok := e.(*ast.SelectorExpr); ok {
		if id, ok := sel.X.(*ast.Ident); ok {
			return id.Name + "." + sel.Sel.Name
		}
	}
	return ""
}

// Every snippet must be caught in the file named, with words that say why; the allowed ones must not.
func TestPowersAreHeld(t *testing.T) {
	const opening = "// This file is a test.\n// It may be read.\n// It must not be run.\npackage main\n"
	for _, c := range []struct{ file, imports, body, want string }{
		{"exec.go", "os", "os.Exit(1)", "only main.go may end the process"},
		{"exec.go", "os", "f := os.Exit; f(1)", "end the process"},
		{"cli.go", "log", "log.Fatalf(``)", "end the process"},
		{"cli.go", "log", "log.New(nil, ``, 0).Fatal(1)", "end the process"},
		{"sys_linux.go", "os", "os.Exit(126)", "end the process"},
		{"main.go", "os", "os.Exit(1)", ""},
		{"cli.go", "os/exec", "exec.Command(``)", "only exec.go may use os/exec"},
		{"daemon.go", "os/exec", "", "use os/exec"},
		{"exec.go", "os/exec", "exec.Command(``).Run()", ""},
		{"plugin.go", "os", "os.StartProcess(``, nil, nil)", "start a process"},
		{"daemon.go", "os syscall", "os.StartProcess(``, nil, &os.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})", ""},
		{"plugin.go", "syscall", "_ = &syscall.SysProcAttr{}", "start a process"},
		{"server.go", "", "attr.Setsid = true", "start a process"},
		{"server.go", "", "p.Kill()", "signal a process"},
		{"server.go", "", "p.Signal(x)", "signal a process"},
		{"server.go", "", "record.Signal = status.Signal()", ""},
		{"server.go", "os", "os.FindProcess(1)", "signal a process"},
		{"exec.go", "golang.org/x/sys/unix", "", "only sys.go sys_linux.go sys_other.go may call the system"},
		{"sys_linux.go", "golang.org/x/sys/unix", "unix.Kill(1, 2)", ""},
		{"sys_linux.go", "golang.org/x/net/http2", "", "be used at all"},
		{"config.go", "unsafe", "", "call the system"},
		{"server.go", "syscall", "syscall.Kill(1, syscall.SIGKILL)", "uses syscall.Kill, but"},
		{"daemon.go", "syscall", "syscall.Exec(``, nil, nil)", "call the system"},
		{"daemon.go", "syscall", "syscall.ForkExec(``, nil, nil)", "call the system"},
		{"config.go", "syscall", "syscall.RawSyscall(0, 0, 0, 0)", "call the system"},
		{"config.go", "syscall", "syscall.Getenv(``)", "call the system"},
		{"config.go", "syscall", "_ = syscall.Stat_t{}; _ = syscall.O_NOFOLLOW | syscall.O_NONBLOCK; _ = syscall.ELOOP", ""},
		{"exec.go", "syscall", "var s syscall.WaitStatus; _ = s; _ = syscall.SIGTERM; _ = syscall.WNOHANG", ""},
		{"cli.go", "os/signal", "signal.Notify(nil)", "take signals"},
		{"cli.go", "net", "net.Listen(``, ``)", "only server.go may listen"},
		{"plugin.go", "net", "net.DialTimeout(``, ``, 0)", "use the network"},
		{"plugin.go", "net", "_ = net.Dialer{}", "use the network"},
		{"cli.go", "net", "net.LookupHost(``)", "use the network"},
		{"cli.go", "net", "net.InterfaceAddrs(); net.JoinHostPort(``, ``)", ""},
		{"plugin.go", "net/http", "http.ListenAndServe(``, nil)", "listen"},
		{"plugin.go", "net/http", "_ = &http.Server{}", "listen"},
		{"cli.go", "net/http", "http.Get(``)", "use the network"},
		{"cli.go", "net/http", "_ = http.StatusOK", ""},
		{"cli.go", "net/http", "http.NewServeMux()", "know patterns"},
		{"plugin.go", "net/http", "http.NewServeMux().Handle(``, http.NotFoundHandler())", ""},
		{"cli.go", "net/http/pprof", "", "be used at all"},
		{"server.go", "net/http/pprof", "", "be used at all"},
		{"server.go", "golang.org/x/time/rate", "", ""},
		{"answer.go", "net/http", "http.Error(nil, ``, 500)", "use the network"},
		{"answer.go", "net/http", "_ = http.Header{}", "use the network"},
		{"answer.go", "net/http", "http.MaxBytesReader(nil, nil, 1)", "use the network"},
		{"answer.go", "", "approveUnchecked(nil, ``)", "approve without a rule"},
		{"exec.go", "os", "os.Getenv(``)", "only config.go may read the environment"},
		{"cli.go", "os", "os.LookupEnv(`NO_COLOR`)", "read the environment"},
		{"daemon.go", "os", "os.Setenv(``, ``)", "read the environment"},
		{"exec.go", "os", "os.ExpandEnv(``)", "read the environment"},
		{"exec.go", "os", "os.Environ()", "whole environment"},
		{"cli.go", "os", "os.UserHomeDir()", "read the environment"},
		{"config.go", "os", "os.Getenv(``); os.Environ(); os.UserHomeDir()", ""},
		{"server.go", "os", "os.ReadFile(``)", "open a file"},
		{"cli.go", "os", "os.Open(``)", "open a file"},
		{"exec.go", "os", "os.WriteFile(``, nil, 0)", "write, move or remove"},
		{"cli.go", "os", "os.RemoveAll(``)", "write, move or remove"},
		{"daemon.go", "os", "os.OpenFile(``, os.O_APPEND, 0)", "only audit.go may open for append"},
		{"daemon.go", "syscall", "_ = syscall.O_APPEND", "open for append"},
		{"audit.go", "os", "os.OpenFile(``, os.O_APPEND, 0)", ""},
		{"config.go", "os", "os.OpenRoot(``)", "only plugin.go may walk"},
		{"server.go", "path/filepath", "filepath.WalkDir(``, nil)", "walk plugin directories"},
		{"config.go", "os", "os.ReadDir(``)", "list a directory"},
		{"plugin.go", "os", "os.OpenRoot(``); os.ReadDir(``)", ""},
		{"server.go", "os", "_ = os.Stderr", "only cli.go may use the terminal"},
		{"main.go", "fmt", "fmt.Println()", "use the terminal"},
		{"main.go", "", "println()", "use the terminal"},
		{"main.go", "log", "log.Printf(``)", "use the terminal"},
		{"main.go", "flag", "flag.Parse()", "use the terminal"},
		{"main.go", "log", "log := log.New(nil, ``, 0); log.Printf(``)", ""},
		{"main.go", "fmt", "fmt.Errorf(``); fmt.Sprint(); fmt.Fprintf(w, ``)", ""},
		{"cli.go", "os fmt flag", "fmt.Print(os.Stdout); flag.NewFlagSet(``, 0)", ""},
		{"server.go", "", "approveUnchecked(nil, ``)", "approve without a rule"},
		{"server.go", "", "f := approveUnchecked; f(nil, ``)", "approve without a rule"},
		{"plugin.go", "", "approveUnchecked(nil, ``)", ""},
		{"plugin.go", "", "_ = approved{}", "makes an approved value"},
		{"plugin.go", "", "_ = &approved{argv: nil}", "makes an approved value"},
		{"plugin.go", "", "_ = []approved{{}}", "makes an approved value"},
		{"plugin.go", "", "_ = map[string]*approved{``: {}}", "makes an approved value"},
		{"plugin.go", "", "_ = [...]approved{{}}", "makes an approved value"},
		{"plugin.go", "", "type a = approved; _ = a{}", "makes a type of approved"},
		{"plugin.go", "", "type a approved", "makes a type of approved"},
		{"plugin.go", "", "_ = approved(struct{ argv []string; by decision }{})", "converts to approved"},
		{"plugin.go", "", "_ = (approved)(x)", "converts to approved"},
		{"plugin.go", "", "f[approved]()", "converts to approved"},
		{"plugin.go", "", "a.argv = nil", "writes a field"},
		{"plugin.go", "", "c.what.argv[0] = ``", "writes a field"},
		{"plugin.go", "", "a.by.Allowed, b.by = true, x", "writes a field"},
		{"plugin.go", "", "p := &a.argv", "takes the address"},
		{"plugin.go", "", "p := &a.argv[0]", "takes the address"},
		{"plugin.go", "", "copy(a.argv[1:], b)", "may change"},
		{"plugin.go", "", "b = append(a.argv[:1], ``)", "may change"},
		{"exec.go", "", "var a approved; b := a.argv[0]; c := append([]string{}, a.argv...)", ""},
		{"exec.go", "", "type c struct { what approved }; _ = c{what: a}", ""},
		{"acl.go", "", "_ = approved{}; a.argv = nil", ""},
		{"acl.go", "os", "", "the policy may know only"},
		{"acl.go", "time", "", "the policy may know only"},
		{"acl.go", "io", "", "the policy may know only"},
		{"acl.go", "sync", "", "the policy may know only"},
		{"acl.go", "fmt", "fmt.Println()", "use the terminal"},
		{"acl.go", "", "go f()", "one pure function"},
		{"acl.go", "", "x <- 1", "one pure function"},
		{"acl.go", "", "}\nvar cache map[string]bool\nfunc g() {", "keeps no state"},
		{"acl.go", "", "}\nvar cache = f()\nfunc g() {", "keeps no state"},
		{"acl.go", "regexp", "}\nvar r = regexp.MustCompile(``)\nfunc g() {", ""},
		{"config.go", "C", "", "be used at all"},
		{"config.go", "plugin", "", "be used at all"},
		{"config.go", "github.com/a/b", "", "be used at all"},
		{"config.go", "", "}\n//go:linkname exit os.runtime_exit\nfunc g() {", "around the imports"},
		{"util.go", "", "", "no such room"},
	} {
		src := opening
		for path := range strings.FieldsSeq(c.imports) {
			src += fmt.Sprintf("import %q\n", path)
		}
		expectOffence(t, c.file, src+"func f() {\n"+c.body+"\n}\n", c.want)
	}
	for _, c := range []struct{ src, want string }{
		{opening + `import . "strings"`, "under another name"},
		{opening + `import _ "embed"`, "under another name"},
		{opening + `import o "os"`, "under another name"},
		{"package main\n", "three lines"},
		{"// This file is a test.\npackage main\n", "three lines"},
		{strings.Replace(opening, "run.\n", "run.\n\n", 1), "three lines"},
		{strings.Replace(opening, "It must not", "It should not", 1), "line 3 of the opening"},
		{strings.Replace(opening, "read.", "read", 1), "line 2 of the opening"},
		{"//go:build linux\n\n" + opening, ""},
	} {
		expectOffence(t, "config.go", c.src, c.want)
	}
}

func expectOffence(t *testing.T, file, src, want string) {
	t.Helper()
	found := strings.Join(offences(file, src), "\n")
	if want == "" && found != "" || !strings.Contains(found, want) {
		t.Errorf("%s: want %q, found %q in\n%s", file, want, found, src)
	}
}

// Every line of the table is there for somebody: its files are rooms, and its patterns say something.
func TestPowersAreWellFormed(t *testing.T) {
	for _, p := range powers {
		for file := range strings.FieldsSeq(p.files) {
			if !strings.Contains(rooms, " "+file+" ") {
				t.Errorf("%s: %s is no room", p.what, file)
			}
		}
		if p.what == "" || p.imports+p.names+p.members == "" {
			t.Errorf("%+v holds nothing", p)
		}
	}
}
