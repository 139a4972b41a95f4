// This file is the plugins: load, check, hooks, routes, and what `aexec plugin` and `aexec starterkit` write.
// It may read and write plugin directories, and it alone.
// It must not run anything but through exec.go with what acl.go approved, nor weaken the settings' own rules.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxReferences  = 64   // documents in one plugin's references/
	maxHookText    = 1000 // bytes of an error's message, and of what a failed hook said, in the log
	probeTimeout   = 3 * time.Second
	probeKillGrace = 200 * time.Millisecond
	maxProbeOutput = 1 << 20  // bytes that a tool may print as its help
	maxUsage       = 64 << 10 // bytes of it that go into references/usage.md

	// pluginDefaults are the fields of a plugin's settings.json, with their types and the values of those that are left out.
	pluginDefaults = `{"plugin":{"type":"skill","command":"","apiVersion":1,"invoke":"exec","before":"","after":"","routes":{}},"exec":{"allow":[],"deny":[]}}`

	// pluginSettings and pluginRequest are parts of a plugin that `aexec plugin create` makes; the rest is in skills/_plugin.md.
	pluginSettings = `{
  "plugin": { "type": "{TYPE}", "command": "{COMMAND}", "apiVersion": 1 },
  "exec": {
    "allow": {RULES},
    "deny": []
  }
}
`
	pluginRequest = "```sh\ncurl -sS \"$URL/api/exec\" -H \"X-API-Key: $KEY\" -H \"Content-Type: application/json\" -d '{BODY}'\n```\n"

	reservedPluginWords = "exec acl plugins skills private ping command aexec ae"
	pluginTypes         = "skill exec trusted"
	routeMethods        = "GET POST PUT PATCH DELETE"
	starterTools        = "claude codex gemini aider goose hermes openclaw opencode"
	pluginNameChars     = "abcdefghijklmnopqrstuvwxyz0123456789-"
	commandChars        = pluginNameChars + "ABCDEFGHIJKLMNOPQRSTUVWXYZ_.+"
)

//go:embed skills/_plugin.md
var pluginTemplate embed.FS

// plugin is one loaded and valid plugin.
type plugin struct {
	Name        string
	Description string // of SKILL.md's frontmatter, one line
	Type        string // skill, exec, trusted
	Command     string // "" for one that has none
	Invoke      string // exec or run
	Rules       ruleSet
	routes      []pluginRoute
	before      string // absolute path of the hook, "" if none
	after       string
	dir         string                 // absolute
	hooks       map[string]fileVersion // by absolute path: the file that was checked, and the only one that runs
	docs        map[string][]byte      // by path in dir, as at start
}

// pluginRoute is one METHOD /path pattern of net/http (already with its /api/command/NAME prefix) and the argv template it leads to.
type pluginRoute struct {
	Pattern string
	Argv    []string
}

// pluginProblem is one thing wrong with a plugin: a start-up error, or (Warning) a doctor's remark.
type pluginProblem struct {
	Plugin  string `json:"plugin"`
	File    string `json:"file,omitempty"` // with :line:column where the problem has its place
	Message string `json:"message"`
	Warning bool   `json:"warning"`
}

// pluginInfo is one plugin as it lies on disk, usable or not.
type pluginInfo struct {
	Name        string          `json:"name"`
	Description string          `json:"description"`
	Type        string          `json:"type"`
	Command     string          `json:"command"`
	Enabled     bool            `json:"enabled"`
	Problems    []pluginProblem `json:"problems"`
	plugin      *plugin         // nil if its settings cannot be read
}

// fail notes an error. That of a setting begins with file:line:column.
func (i *pluginInfo) fail(file string, err error) {
	message := err.Error()
	if errors.Is(err, fs.ErrNotExist) {
		message = "there is no such file"
	}
	if rest, ok := strings.CutPrefix(message, file+":"); ok {
		place, text, _ := strings.Cut(rest, ": ")
		file, message = file+":"+place, text
	}
	i.Problems = append(i.Problems, pluginProblem{Plugin: i.Name, File: file, Message: message})
}

func (i *pluginInfo) warn(file, format string, args ...any) {
	file = filepath.Join(i.plugin.dir, file)
	i.Problems = append(i.Problems, pluginProblem{Plugin: i.Name, File: file, Message: fmt.Sprintf(format, args...), Warning: true})
}

// usable says whether the server can start with the plugin.
func (i *pluginInfo) usable() bool {
	return !slices.ContainsFunc(i.Problems, func(p pluginProblem) bool { return !p.Warning })
}

// ---- loading

// loadPlugins loads every enabled plugin of the directory. Plugins with problems that are not warnings are left out of the first result and named in the second.
func loadPlugins(p paths, s *settings) (loaded []*plugin, problems []pluginProblem) {
	for _, info := range surveyPlugins(p, s, false) {
		problems = append(problems, info.Problems...)
		if info.usable() {
			loaded = append(loaded, info.plugin)
		}
	}
	return loaded, problems
}

// surveyPlugins reads the plugins that the settings enable, or all there are, in the order of their names.
// What is wrong with the directory itself comes as a plugin without a name.
func surveyPlugins(p paths, s *settings, all bool) []*pluginInfo {
	names, err := pluginNames(p, s)
	if err != nil {
		info := &pluginInfo{Enabled: true}
		info.fail(p.plugins, err)
		return []*pluginInfo{info}
	}
	infos := []*pluginInfo{}
	owner := map[string]string{} // of a command, among the enabled
	for _, name := range names {
		enabled := (s.PluginsMode != "explicit" || slices.Contains(s.PluginsEnabled, name)) && !slices.Contains(s.PluginsDisabled, name)
		if !enabled && !all {
			continue
		}
		info := readPlugin(p, name)
		info.Enabled = enabled
		if first := owner[info.Command]; first != "" && enabled {
			info.fail(filepath.Join(p.plugins, name, "settings.json"), fmt.Errorf("the command %q is already that of the plugin %q: disable one of them", info.Command, first))
		} else if enabled && info.Command != "" {
			owner[info.Command] = name
		}
		infos = append(infos, info)
	}
	return infos
}

// pluginNames are the entries of the directory, but for those that begin with a dot (.git, what an interrupted create or
// remove left), and what the settings enable by name.
func pluginNames(p paths, s *settings) ([]string, error) {
	var names []string
	if s.PluginsMode == "explicit" {
		names = slices.Clone(s.PluginsEnabled)
	}
	entries, err := os.ReadDir(p.plugins)
	if err == nil {
		err = checkTrustedDir(p.plugins)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return slices.Compact(names), err
}

// checkPluginWord admits plain words only: a plugin's name is a directory's and part of a URL, and its command is the first
// word of rules and the base name of a request's first argument.
func checkPluginWord(what, word, chars string) error {
	switch {
	case word == "":
		return fmt.Errorf("missing %s", what)
	case strings.Trim(word, chars) != "" || strings.IndexByte("-.+", word[0]) >= 0:
		return fmt.Errorf("%q cannot be a plugin's %s: write one word of the characters %s, beginning with a letter or digit", word, what, chars)
	case slices.Contains(strings.Fields(reservedPluginWords), word):
		return fmt.Errorf("the %s %q is reserved: choose another", what, word)
	}
	return nil
}

// readPlugin reads and checks one plugin directory, going on after an error where that makes sense.
func readPlugin(p paths, name string) *pluginInfo {
	info := &pluginInfo{Name: name, Problems: []pluginProblem{}}
	if err := checkPluginWord("name", name, pluginNameChars); err != nil {
		info.fail(p.plugins, err)
		return info
	}
	dir := filepath.Join(p.plugins, name)
	file := filepath.Join(dir, "settings.json")
	data, err := readPluginFile(dir, "settings.json")
	if err == nil {
		info.plugin, err = parsePlugin(name, file, data)
	}
	if err != nil {
		info.plugin = nil
		info.fail(file, err)
		return info
	}
	pl := info.plugin
	pl.dir, pl.hooks, pl.docs = dir, map[string]fileVersion{}, map[string][]byte{}
	info.Type, info.Command = pl.Type, pl.Command
	info.readDocuments()
	for _, hook := range []*string{&pl.before, &pl.after} {
		if *hook == "" {
			continue
		}
		version, err := hookVersion(dir, *hook)
		if *hook = filepath.Join(dir, *hook); err != nil {
			info.fail(*hook, fmt.Errorf("the hook cannot be used: %w", err))
		}
		pl.hooks[*hook] = version
	}
	return info
}

// openPluginFile opens a regular file in a plugin's directory. No part of its path is a symbolic link, and the directories on
// the way are held to the strict modes too, for who may write there may exchange the file.
func openPluginFile(dir, name string) (f *os.File, err error) {
	for at := name; at != "."; {
		at = path.Dir(at)
		if err := checkTrustedDir(filepath.Join(dir, at)); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if info, err := root.Lstat(name); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file, and links are not followed: put a copy there")
	}
	if f, err = root.Open(name); err != nil {
		return nil, err
	}
	if err = checkTrustedFile(f, false); err != nil {
		f.Close()
	}
	return f, err
}

func readPluginFile(dir, name string) ([]byte, error) {
	f, err := openPluginFile(dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes))
	if len(data) == maxConfigBytes {
		err = fmt.Errorf("it is larger than %d bytes", maxConfigBytes-1)
	}
	return data, err
}

func hookVersion(dir, name string) (fileVersion, error) {
	f, err := openPluginFile(dir, name)
	if err != nil {
		return fileVersion{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && info.Mode().Perm()&0o111 == 0 {
		err = errors.New("it is not executable: run chmod u+x")
	}
	if err != nil {
		return fileVersion{}, err
	}
	return versionOf(info), nil
}

// readDocuments takes the documents into memory. SKILL.md must be there; that its frontmatter is broken is only remarked.
func (i *pluginInfo) readDocuments() {
	dir := i.plugin.dir
	names, _ := fs.Glob(os.DirFS(dir), "references/*.md") // the pattern is right, so there is no error
	if len(names) > maxReferences {
		i.fail(filepath.Join(dir, "references"), fmt.Errorf("there are %d documents, and at most %d are served", len(names), maxReferences))
		names = nil
	}
	if _, err := os.Lstat(filepath.Join(dir, "public")); err == nil {
		names = append(names, "public/SKILL.md")
	}
	for _, name := range append(names, "SKILL.md") {
		data, err := readPluginFile(dir, name)
		if err != nil {
			i.fail(filepath.Join(dir, name), err)
			continue
		}
		i.plugin.docs[name] = data
	}
	name, description, err := frontmatter(i.plugin.docs["SKILL.md"])
	if err != nil {
		i.warn("SKILL.md", "%v", err)
	} else if name != i.Name {
		i.warn("SKILL.md", "its frontmatter has the name %q, and agents expect %q, the directory's", name, i.Name)
	}
	i.Description, i.plugin.Description = description, description
}

// document gives one of the plugin's documents: "SKILL.md", "public/SKILL.md" or "references/FILE.md"; false if there is none such.
func (p *plugin) document(name string) ([]byte, bool) {
	data, ok := p.docs[name]
	return data, ok
}

// pluginFingerprints gives a digest of each plugin directory by "plugin:NAME": of the names, modes, sizes and times of what
// is read at start, enough to say that a restart would bring something new.
func pluginFingerprints(p paths) map[string]string {
	prints := map[string]string{}
	names, _ := pluginNames(p, &settings{}) // a directory that cannot be read has none
	for _, name := range names {
		h, files := sha256.New(), os.DirFS(filepath.Join(p.plugins, name))
		for _, pattern := range []string{"settings.json", "SKILL.md", "*/*"} {
			found, _ := fs.Glob(files, pattern) // the patterns are right, so there is no error
			for _, file := range found {
				if info, err := fs.Lstat(files, file); err == nil {
					fmt.Fprintf(h, "%q %v %d %d\n", file, info.Mode(), info.Size(), info.ModTime().UnixNano())
				}
			}
		}
		prints[pluginSource+name] = hex.EncodeToString(h.Sum(nil)[:8])
	}
	return prints
}

// ---- settings.json of a plugin

// parsePlugin reads a plugin's settings.json; its errors begin with file:line:column. before and after are still as written.
func parsePlugin(name, file string, data []byte) (*plugin, error) {
	r, err := readSettingNodes(file, pluginDefaults, data)
	if err != nil {
		return nil, err
	}
	text := func(key string) string { return r.string(key, anyText) }
	p := &plugin{Name: name, Type: text("plugin.type"), Command: text("plugin.command"), Invoke: text("plugin.invoke"),
		before: text("plugin.before"), after: text("plugin.after")}
	p.Rules = ruleSet{Source: pluginSource + name, Command: p.Command, Allow: r.rules("exec.allow"), Deny: r.rules("exec.deny")}
	r.number("plugin.apiVersion", 1, 1)
	p.checkType(r)
	p.checkHooks(r)
	if r.err != nil {
		return nil, r.err // the rest would repeat it in other words
	}
	_, err = compilePolicy([]ruleSet{p.Rules}) // by themselves, so that an error has its place here
	if bad, ok := errors.AsType[*ruleError](err); ok {
		r.fail(r.nodes["exec."+bad.List].items[bad.Index].start, "exec."+bad.List, "rule %q: %v", bad.Rule, bad.Err)
	}
	p.readRoutes(r)
	return p, r.err
}

// wrong is an error at a key's value, or at the start of a file that does not have the key.
func (p *plugin) wrong(r *settingsReader, key, format string, args ...any) {
	at := 0
	if r.inFile[key] {
		at = r.nodes[key].start
	}
	r.fail(at, key, format, args...)
}

func (p *plugin) checkType(r *settingsReader) {
	switch {
	case p.Type == "system":
		p.wrong(r, "plugin.type", `"system" is reserved: use one of %s`, pluginTypes)
	case !slices.Contains(strings.Fields(pluginTypes), p.Type):
		p.wrong(r, "plugin.type", "unknown type %q: use one of %s", p.Type, pluginTypes)
	case p.Invoke != "exec" && p.Invoke != "run":
		p.wrong(r, "plugin.invoke", "unknown invoke %q: use exec or run", p.Invoke)
	case p.Invoke == "run" && p.Type != "trusted":
		p.wrong(r, "plugin.invoke", `"run" goes with "type":"trusted" only`)
	case p.Type == "skill" && len(p.Rules.Allow) == 0 && !r.inFile["plugin.command"]:
		return // it documents, and is about no command
	}
	if err := checkPluginWord("command", p.Command, commandChars); err != nil {
		p.wrong(r, "plugin.command", "%v", err)
	}
}

func (p *plugin) checkHooks(r *settingsReader) {
	if p.Type == "skill" && (p.before != "" || p.after != "" || r.inFile["plugin.routes"]) {
		p.wrong(r, "plugin.type", "a skill plugin has neither hooks nor routes: use exec")
	}
	for key, hook := range map[string]string{"plugin.before": p.before, "plugin.after": p.after} {
		if r.inFile[key] && (!fs.ValidPath(hook) || hook == "." || strings.ContainsFunc(hook, unicode.IsControl)) {
			p.wrong(r, key, "%q is not a path inside the plugin's directory, such as hooks/before", hook)
		}
	}
}

// nodeStrings gives an array of strings; false and nil: it is something else.
func nodeStrings(n *node) ([]string, bool) {
	if n.kind != '[' {
		return nil, false
	}
	texts := []string{}
	for _, item := range n.items {
		if item.kind != '"' || item.surrogate {
			return nil, false
		}
		texts = append(texts, item.str)
	}
	return texts, true
}

func (p *plugin) readRoutes(r *settingsReader) {
	mux, n := http.NewServeMux(), r.nodes["plugin.routes"]
	for i, key := range n.keys {
		argv, ok := nodeStrings(n.items[i])
		switch method, rest, _ := strings.Cut(key, " "); {
		case strings.HasPrefix(key, "_"): // a comment
		case !ok:
			r.fail(n.items[i].start, "plugin.routes", "a route leads to an array of strings")
		default:
			route := pluginRoute{method + " /api/command/" + p.Name + rest, argv}
			if err := cmp.Or(checkRoute(method, rest, argv), registerRoute(mux, route.Pattern)); err != nil {
				r.fail(n.keyAt[i], "plugin.routes", "the route %q cannot be used: %v", key, err)
			}
			p.routes = append(p.routes, route)
		}
	}
}

// checkRoute admits the patterns in which one path is one request: no host, no subtree, no "...".
func checkRoute(method, rest string, argv []string) error {
	if !slices.Contains(strings.Fields(routeMethods), method) {
		return fmt.Errorf("it must begin with one of %s and a space", routeMethods)
	}
	segments := strings.Split(rest, "/")
	if len(segments) < 2 || segments[0] != "" {
		return errors.New("its path must begin with /")
	}
	for _, s := range segments[1:] {
		if !isWildcard(s) && (strings.Trim(s, commandChars+"~") != "" || strings.Trim(s, ".") == "") {
			return fmt.Errorf("the path segment %q is neither plain text nor {name}", s)
		}
	}
	for i, arg := range argv {
		if isWildcard(arg) && (i == 0 || !slices.Contains(segments, arg)) {
			return fmt.Errorf("%s is no wildcard of the path, or stands for the command itself", arg)
		}
		for _, s := range segments {
			if isWildcard(s) && arg != s && strings.Contains(arg, s) {
				return fmt.Errorf("%s must be a whole argument, not a part of %q", s, arg)
			}
		}
	}
	return checkArgv(argv)
}

func isWildcard(s string) bool {
	return len(s) > 2 && s[0] == '{' && s[len(s)-1] == '}' && strings.Trim(strings.ToLower(s[1:len(s)-1]), "abcdefghijklmnopqrstuvwxyz0123456789_") == ""
}

// registerRoute really registers the route: what net/http finds wrong or in conflict, it panics about.
func registerRoute(mux *http.ServeMux, pattern string) (err error) {
	defer func() {
		if r := recover(); r != nil {
			text := fmt.Sprint(r)
			if _, why, found := strings.Cut(text, "):\n"); found { // about a conflict it says much more
				text, _, _ = strings.Cut(why, "\n")
			}
			err = errors.New(strings.TrimSuffix(text, "."))
		}
	}()
	mux.Handle(pattern, http.NotFoundHandler())
	return nil
}

// routeArgv fills {x} elements of a route's argv with path values; the error is 400 invalid_args.
func (r pluginRoute) routeArgv(value func(string) string) ([]string, error) {
	argv := slices.Clone(r.Argv)
	for i, arg := range argv {
		if !isWildcard(arg) {
			continue
		}
		v := value(arg[1 : len(arg)-1])
		if v == "" || v[0] == '-' || !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
			return nil, fmt.Errorf("the path value %q for %s is empty, begins with -, is not UTF-8 or holds a control character", v, arg)
		}
		argv[i] = v
	}
	return argv, checkArgv(argv)
}

// ---- requests

// sees says whether a command with these arguments is the plugin's: first argument or its base name is its command.
func (p *plugin) sees(argv []string) bool {
	return p.Command != "" && len(argv) > 0 && path.Base(argv[0]) == p.Command
}

// approve is the second decision, about what a hook or a route leads to; a trusted plugin with "invoke":"run" alone is spared it.
func (p *plugin) approve(pol *policy, argv []string) (approved, decision) {
	if p.Type == "trusted" && p.Invoke == "run" {
		return approveUnchecked(argv, p.Rules.Source), decision{Allowed: true, List: "trusted", Source: p.Rules.Source}
	}
	return pol.decide(argv)
}

// hookInput is the JSON that a hook gets on standard input, free of the key (server.go makes it).
type hookInput struct {
	Args         []string       `json:"args"`
	OriginalArgs []string       `json:"originalArgs"`
	Request      hookRequest    `json:"request"`
	Plugin       hookPlugin     `json:"plugin"`
	Result       map[string]any `json:"result,omitempty"` // after only: the buffered answer's fields
}

type hookRequest struct {
	Method  string              `json:"method"`
	Path    string              `json:"path"`
	Query   map[string][]string `json:"query"`
	IP      string              `json:"ip"`
	Headers map[string][]string `json:"headers"` // key headers redacted
}

type hookPlugin struct {
	Name    string `json:"name"`
	Type    string `json:"type"`
	Command string `json:"command"`
	Invoke  string `json:"invoke"`
}

// hookOutput is what a hook answered; all nil: unchanged.
type hookOutput struct {
	Args   []string
	Result map[string]any // of string, int64 or nil, by the names of a buffered answer's fields
	Error  *hookError
}

type hookError struct {
	Status  int // 400 to 599
	Code    string
	Message string
}

// runFunc runs an approved command in the request's slot, audited under the plugin (server.go's).
type runFunc func(ctx context.Context, what approved, stdin []byte) outcome

// runHook runs one hook ("before" or "after"); an error is the hook's failure: 500 plugin_before_error or plugin_after_error.
// The error quotes what the hook printed: it is for the server's log.
func (p *plugin) runHook(ctx context.Context, which string, in hookInput, run runFunc) (hookOutput, error) {
	file := p.before
	if which == "after" {
		file = p.after
	}
	fail := func(format string, args ...any) (hookOutput, error) {
		return hookOutput{}, fmt.Errorf("plugin %q, hook %q: %w", p.Name, file, fmt.Errorf(format, args...))
	}
	// Only the file that was checked at start runs: who can exchange it after this look owns the plugin anyway.
	if version, err := hookVersion(p.dir, strings.TrimPrefix(file, p.dir+"/")); err != nil || version != p.hooks[file] {
		return fail("the file has changed since the server started: run aexec restart (%v)", err)
	}
	stdin, err := json.Marshal(in)
	if err != nil {
		return fail("%w", err)
	}
	out := run(ctx, approveUnchecked([]string{file}, p.Rules.Source), stdin)
	if out.end != endExit || !out.exited || out.exitCode != 0 {
		said := bytes.Join(out.stderr, nil)
		return fail("ended by %s, exit code %d, signal %q, saying %q", out.end, out.exitCode, out.signal, said[:min(len(said), maxHookText)])
	}
	answer, err := parseHookOutput(bytes.Join(out.stdout, nil), which)
	if err != nil {
		return fail("it printed something that is no answer: %w", err)
	}
	return answer, nil
}

// parseHookOutput holds what a hook printed to one of: nothing, {"args"} (before), {"result"} (after), {"error"}.
func parseHookOutput(data []byte, which string) (hookOutput, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return hookOutput{}, nil
	}
	n, err := parseStrict(data)
	if err != nil {
		return hookOutput{}, err
	}
	if n.kind != '{' || len(n.keys) != 1 {
		return hookOutput{}, errors.New("not a JSON object with one field")
	}
	var out hookOutput
	switch field, value := n.keys[0], n.items[0]; {
	case field == "args" && which == "before":
		argv, ok := nodeStrings(value)
		if !ok {
			return out, errors.New("args is not an array of strings")
		}
		out.Args, err = argv, checkArgv(argv)
	case field == "result" && which == "after":
		out.Result, err = hookResult(value)
	case field == "error":
		out.Error, err = hookErrorOf(value)
	default:
		err = fmt.Errorf("a hook that runs %s cannot answer %q", which, field)
	}
	if err != nil {
		return hookOutput{}, err
	}
	return out, nil
}

// hookResult takes the fields of a buffered answer, each of its type.
func hookResult(n *node) (map[string]any, error) {
	if n.kind != '{' {
		return nil, errors.New("result is not an object")
	}
	result := map[string]any{}
	for i, key := range n.keys {
		v := n.items[i]
		number, err := strconv.ParseInt(v.str, 10, 64)
		isText := v.kind == '"' && !v.surrogate
		isCount := v.kind == '0' && err == nil && number >= 0
		switch {
		case isText && (slices.Contains([]string{"output", "stderr", "signal", "error", "message"}, key) || key == "status" && (v.str == "done" || v.str == "error")):
			result[key] = v.str
		case isCount && (key == "duration" || key == "length" || key == "exitCode" && number <= 255):
			result[key] = number
		case v.kind == 'n' && key == "exitCode":
			result[key] = nil
		default:
			return nil, fmt.Errorf("result has no field %q with such a value", key)
		}
	}
	return result, nil
}

func hookErrorOf(n *node) (*hookError, error) {
	e := &hookError{}
	for i, key := range n.keys {
		v := n.items[i]
		switch {
		case key == "status" && v.kind == '0':
			e.Status, _ = strconv.Atoi(v.str)
		case key == "code" && v.kind == '"' && strings.Trim(v.str, "abcdefghijklmnopqrstuvwxyz0123456789_") == "":
			e.Code = v.str
		case key == "message" && v.kind == '"' && !v.surrogate && len(v.str) <= maxHookText:
			e.Message = v.str
		default:
			return nil, fmt.Errorf("error has no field %q with such a value", key)
		}
	}
	if e.Status < 400 || e.Status > 599 || e.Code == "" || e.Message == "" {
		return nil, errors.New("error needs a status from 400 to 599, a code of a-z, 0-9 and _, and a message")
	}
	return e, nil
}

// ---- administration

// doctorPlugins gives the problems of every plugin. Of a disabled one everything is only a remark: the server starts without it.
func doctorPlugins(p paths, s *settings) []pluginProblem {
	problems := []pluginProblem{}
	for _, info := range surveyPlugins(p, s, true) {
		if info.plugin != nil {
			info.advise()
		}
		for _, problem := range info.Problems {
			problem.Warning = problem.Warning || !info.Enabled
			problems = append(problems, problem)
		}
	}
	return problems
}

// advise remarks what is valid and still worth a look.
func (i *pluginInfo) advise() {
	if i.Type == "trusted" {
		i.warn("settings.json", "a trusted plugin is code of this machine's: review it as you would a program of your own")
	}
	if pol, err := compilePolicy([]ruleSet{i.plugin.Rules}); err == nil {
		for _, f := range pol.lint() {
			if f.Rule != "" { // else it is about the policy as a whole
				i.warn("settings.json", "the rule %q %s", f.Rule, f.Message)
			}
		}
	}
	for _, part := range strings.Split(string(i.plugin.docs["SKILL.md"]), "references/")[1:] {
		name := "references/" + part[:len(part)-len(strings.TrimLeft(part, commandChars))]
		if _, there := i.plugin.docs[name]; !there && path.Ext(name) == ".md" {
			i.warn("SKILL.md", "it refers to %q, and there is no such document", name)
		}
	}
}

// enablePlugin and disablePlugin edit settings.json. Only what the server can start with is enabled.
func enablePlugin(p paths, s *settings, name string) error {
	info := readPlugin(p, name)
	if err := checkCommandFree(p, s, name, info.Command); err != nil {
		return err
	}
	for _, problem := range info.Problems {
		if !problem.Warning {
			return fmt.Errorf("the plugin %q cannot be enabled: %s: %s", name, problem.File, problem.Message)
		}
	}
	return editPluginState(p, name, true)
}

func disablePlugin(p paths, name string) error {
	if err := checkPluginDir(p, name); err != nil {
		return err
	}
	return editPluginState(p, name, false)
}

func checkPluginDir(p paths, name string) error {
	if err := checkPluginWord("name", name, pluginNameChars); err != nil {
		return err
	}
	dir := filepath.Join(p.plugins, name)
	if info, err := os.Lstat(dir); err != nil {
		return fmt.Errorf("there is no plugin %q: aexec plugin list shows what there is", name)
	} else if !info.IsDir() {
		return fmt.Errorf("%s is not a directory: remove it yourself", dir)
	}
	return nil
}

// checkCommandFree refuses a command that an enabled plugin has already: the server would not start with both.
func checkCommandFree(p paths, s *settings, name, command string) error {
	for _, other := range surveyPlugins(p, s, false) {
		if other.Name != name && other.Command == command && command != "" {
			return fmt.Errorf("the command %q is already that of the plugin %q: disable or remove that one first", command, other.Name)
		}
	}
	return nil
}

// removePlugin removes the one directory, never what a link leads to. It is out of the server's sight with the first step.
// Settings that enable it by name would miss it at the next start, so they disable it too.
func removePlugin(p paths, s *settings, name string) error {
	err := checkPluginDir(p, name)
	if err == nil && slices.Contains(s.PluginsEnabled, name) && !slices.Contains(s.PluginsDisabled, name) {
		err = editPluginState(p, name, false)
	}
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(p.plugins)
	if err != nil {
		return err
	}
	defer root.Close()
	old := ".old-" + name
	if err := errors.Join(root.RemoveAll(old), root.Rename(name, old)); err != nil {
		return err
	}
	err = root.RemoveAll(old)
	if err == nil && s.PluginsMode != "explicit" && slices.Contains(s.PluginsDisabled, name) {
		err = editPluginState(p, name, true) // a new plugin of that name is not to be off
	}
	return err
}

// ---- making plugins

// pluginOrder is what `aexec plugin create` was told.
type pluginOrder struct {
	Name, Command, Type string
	Force               bool // replace the directory if there is one
}

// pluginMade is what came of one tool.
type pluginMade struct {
	Name, Command string
	Found         bool          // the tool is there
	Settings      string        // the settings.json that was written, for review; "": none
	Took          time.Duration // to ask the tool
}

// toolFacts is what a tool said about itself: the form that worked (nil: none did), and the text.
type toolFacts struct {
	found                 bool
	help, version         []string
	helpText, versionText string
}

// errPluginExists: nothing is overwritten without force.
var errPluginExists = errors.New("the plugin exists already: use --force to replace its directory")

// probeFunc runs one argv for a few seconds.
type probeFunc func(argv []string) outcome

// toolProbe asks tools about themselves. No rule decides that: the operator named the tool at this machine's own terminal.
func toolProbe(ctx context.Context, r *runner, snap *snapshot) probeFunc {
	return func(argv []string) outcome {
		return r.run(ctx, command{what: approveUnchecked(argv, "plugin create"), env: snap.env, pathDirs: snap.pathDirs, cwd: "/",
			noNewPrivs: true, timeout: probeTimeout, killGrace: probeKillGrace, maxBytes: maxProbeOutput})
	}
}

// createPlugin asks the tool and writes a plugin about it. A tool that is not there gets a plugin without rules, unless mustBe.
func createPlugin(p paths, s *settings, o pluginOrder, mustBe bool, probe probeFunc) (pluginMade, error) {
	made := pluginMade{Name: o.Name, Command: o.Command}
	if err := o.check(p, s); err != nil {
		return made, err
	}
	begun := time.Now()
	t := askTool(o.Command, probe)
	made.Found, made.Took = t.found, time.Since(begun)
	if mustBe && !t.found {
		return made, nil
	}
	files, err := o.files(t)
	if err == nil {
		err = placePlugin(p, o.Name, files)
	}
	if err == nil {
		made.Settings = files["settings.json"]
	}
	return made, err
}

// starterKit makes a plugin for each of the tools that is there; progress hears of each as it is done with.
func starterKit(p paths, s *settings, names []string, force bool, probe probeFunc, progress func(pluginMade, error)) {
	if len(names) == 0 {
		names = strings.Fields(starterTools)
	}
	for _, name := range names {
		progress(createPlugin(p, s, pluginOrder{name, name, "skill", force}, true, probe))
	}
}

func (o pluginOrder) check(p paths, s *settings) error {
	err := cmp.Or(checkPluginWord("name", o.Name, pluginNameChars), checkPluginWord("command", o.Command, commandChars), checkTrustedDir(p.plugins))
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(pluginTypes), o.Type) {
		return fmt.Errorf("%q is not a type of plugin: use one of %s", o.Type, pluginTypes)
	}
	if _, err := os.Lstat(filepath.Join(p.plugins, o.Name)); err == nil && !o.Force {
		return errPluginExists
	}
	return checkCommandFree(p, s, o.Name, o.Command)
}

func askTool(command string, probe probeFunc) (t toolFacts) {
	t.found, t.help, t.helpText = askForms(command, []string{"--help", "-h", "help"}, probe)
	if t.found {
		_, t.version, t.versionText = askForms(command, []string{"--version", "-v", "version"}, probe)
	}
	return t
}

// askForms takes the first form that ends with 0 and says something, else the first that says anything and fails:
// many tools print their help to standard error, but so do they "unknown option".
func askForms(command string, forms []string, probe probeFunc) (found bool, argv []string, text string) {
	for _, form := range forms {
		out := probe([]string{command, form})
		if out.end == endStart {
			return false, nil, ""
		}
		said := cleanText(bytes.Join(out.stdout, nil))
		if said == "" {
			said = cleanText(bytes.Join(out.stderr, nil))
		}
		if worked := out.exitCode == 0; out.end == endExit && out.exited && said != "" && (worked || argv == nil) {
			if argv, text = []string{command, form}, said; worked {
				break
			}
		}
	}
	return true, argv, text
}

// cleanText makes foreign output safe to show in a fenced block: no terminal sequences, overstrikes, control or formatting
// characters, nothing that ends the block, and not too much.
func cleanText(data []byte) string {
	sequences := regexp.MustCompile("\x1b(\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(\x07|\x1b\\\\)?|.)|[^\n]\x08")
	text := sequences.ReplaceAllString(strings.ToValidUTF8(string(data), "\ufffd"), "")
	text = strings.Map(func(c rune) rune {
		if c != '\n' && c != '\t' && !unicode.IsGraphic(c) {
			return -1
		}
		return c
	}, text)
	text = strings.TrimSpace(strings.ReplaceAll(text, "```", "'''"))
	if len(text) > maxUsage {
		text = strings.ToValidUTF8(text[:maxUsage], "") + "\n(cut here)"
	}
	return text
}

// files are the plugin's, by name.
func (o pluginOrder) files(t toolFacts) (map[string]string, error) {
	rules, requests := []string{}, ""
	for _, argv := range [][]string{t.help, t.version} {
		if argv != nil {
			body, _ := json.Marshal(map[string][]string{"args": argv}) // strings always marshal
			rules = append(rules, strings.Join(argv, " "))
			requests += strings.Replace(pluginRequest, "{BODY}", string(body), 1)
		}
	}
	list, _ := json.MarshalIndent(rules, "    ", "  ")
	template, err := pluginTemplate.ReadFile("skills/_plugin.md")
	if err != nil {
		return nil, err
	}
	skill, usage, _ := strings.Cut(string(template), "\n=====\n")
	fill := strings.NewReplacer("{NAME}", o.Name, "{COMMAND}", o.Command, "{TYPE}", o.Type, "{RULES}", string(list),
		"{REQUESTS}\n", cmp.Or(requests, "None yet: the operator adds rules to `exec.allow` in this plugin's `settings.json`.\n"),
		"{HELP}", cmp.Or(t.helpText, "(nothing)"), "{VERSION}", cmp.Or(t.versionText, "(nothing)"))
	files := map[string]string{"SKILL.md": fill.Replace(skill), "references/usage.md": fill.Replace(usage), "settings.json": fill.Replace(pluginSettings)}
	_, err = parsePlugin(o.Name, "settings.json", []byte(files["settings.json"]))
	return files, err
}

// placePlugin writes the directory under a name that is not loaded, and renames it: a crash leaves no half plugin.
func placePlugin(p paths, name string, files map[string]string) error {
	root, err := os.OpenRoot(p.plugins)
	if err != nil {
		return err
	}
	defer root.Close()
	fresh, old := ".new-"+name, ".old-"+name
	if err := errors.Join(root.RemoveAll(fresh), root.RemoveAll(old), root.MkdirAll(fresh+"/references", 0o700)); err != nil {
		return err
	}
	for file, text := range files {
		f, err := root.OpenFile(fresh+"/"+file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = f.WriteString(text)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	if err := root.Rename(name, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(root.Rename(fresh, name), root.RemoveAll(old))
}
