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
	"encoding/json"
	"errors"
	"fmt"
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
	maxHookText    = 1000 // characters of an error's message, and bytes of what a failed hook said, in the log
	probeTimeout   = 3 * time.Second
	probeKillGrace = 200 * time.Millisecond
	maxProbeOutput = 1 << 20  // bytes that a tool may print as its help
	maxUsage       = 64 << 10 // bytes of it that go into references/usage.md

	// pluginDefaults are the fields of a plugin's settings.json, with their types and the values of those that are left out.
	pluginDefaults = `{"plugin":{"type":"skill","command":"","apiVersion":1,"invoke":"exec","before":"","after":"","routes":{}},"exec":{"allow":[],"deny":[]}}`

	reservedPluginWords = "exec acl plugins skills private ping command aexec ae"
	starterTools        = "claude codex gemini aider goose hermes openclaw opencode"
	pluginNameChars     = "abcdefghijklmnopqrstuvwxyz0123456789-"
	commandChars        = pluginNameChars + "ABCDEFGHIJKLMNOPQRSTUVWXYZ_.+"
)

//go:embed skills/_plugin.md
var pluginTemplate embed.FS

// plugin is one plugin as it lies on disk; the server has only those that are usable.
type plugin struct {
	Name          string          `json:"name"`
	Description   string          `json:"description"` // of SKILL.md's frontmatter, one line
	Type          string          `json:"type"`        // skill, exec, trusted
	Command       string          `json:"command"`     // "" for one that has none
	Invoke        string          `json:"-"`           // exec or run
	Enabled       bool            `json:"enabled"`     // by the settings
	Problems      []pluginProblem `json:"problems,omitempty"`
	Rules         ruleSet         `json:"-"`
	routes        []pluginRoute
	before, after string                 // paths of the hooks in dir, "" if none
	dir           string                 // absolute
	hooks         map[string]fileVersion // by path in dir: the file that was checked, and the only one that runs
	docs          map[string][]byte      // by path in dir, as at start
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

// note keeps what is wrong with a file of the plugin's, if anything is.
func (p *plugin) note(name string, err error, warning bool) {
	if err == nil {
		return
	}
	file, message := filepath.Join(p.dir, name), err.Error()
	if errors.Is(err, fs.ErrNotExist) {
		message = "there is no such file"
	} else if strings.HasPrefix(message, file+":") { // with line and column
		file, message, _ = strings.Cut(message, ": ")
	}
	p.Problems = append(p.Problems, pluginProblem{p.Name, file, message, warning})
}

// usable says whether the server can start with the plugin.
func (p *plugin) usable() bool {
	return !slices.ContainsFunc(p.Problems, func(problem pluginProblem) bool { return !problem.Warning })
}

// loadPlugins loads every enabled plugin of the directory. Those that are not usable are named in the second result alone.
func loadPlugins(p paths, s *settings) (loaded []*plugin, problems []pluginProblem) {
	for _, pl := range surveyPlugins(p, s, false) {
		problems = append(problems, pl.Problems...)
		if pl.usable() {
			loaded = append(loaded, pl)
		}
	}
	return loaded, problems
}

// surveyPlugins reads the plugins that the settings enable, or all there are, in the order of their names.
// What is wrong with the directory itself comes as a plugin without a name.
func surveyPlugins(p paths, s *settings, all bool) []*plugin {
	plugins, names := []*plugin{}, []string{}
	if s.PluginsMode == "explicit" {
		names = slices.Clone(s.PluginsEnabled) // one that is not there is an error
	}
	entries, err := os.ReadDir(p.plugins)
	if err = cmp.Or(checkTrustedDir(p.plugins), err); err != nil && !errors.Is(err, fs.ErrNotExist) {
		nameless := &plugin{Enabled: true, dir: p.plugins}
		nameless.note("", err, false)
		return []*plugin{nameless}
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") { // .git, or what an interrupted create left
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		enabled := (s.PluginsMode != "explicit" || slices.Contains(s.PluginsEnabled, name)) && !slices.Contains(s.PluginsDisabled, name)
		if !enabled && !all {
			continue
		}
		pl := readPlugin(p, name)
		if pl.Enabled = enabled; enabled {
			pl.note("settings.json", checkCommandFree(name, pl.Command, plugins), false)
		}
		plugins = append(plugins, pl)
	}
	return plugins
}

// checkCommandFree refuses a command that an enabled plugin has already: a request would not know whose it is.
func checkCommandFree(name, command string, plugins []*plugin) error {
	for _, other := range plugins {
		if other.Enabled && other.Name != name && other.Command == command && command != "" {
			return fmt.Errorf("the command %q is already that of the plugin %q: disable or remove one of them", command, other.Name)
		}
	}
	return nil
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
func readPlugin(p paths, name string) *plugin {
	dir, data := filepath.Join(p.plugins, name), []byte{}
	pl, err := &plugin{}, checkPluginWord("name", name, pluginNameChars)
	if err == nil {
		data, _, err = readPluginFile(dir, "settings.json", false)
	}
	if err == nil {
		pl, err = parsePlugin(name, filepath.Join(dir, "settings.json"), data)
	}
	if err != nil {
		pl = &plugin{Name: name, dir: dir} // nothing of what cannot be relied upon
		pl.note("settings.json", err, false)
		return pl
	}
	pl.dir, pl.hooks, pl.docs = dir, map[string]fileVersion{}, map[string][]byte{}
	names, _ := fs.Glob(os.DirFS(dir), "references/*.md") // the pattern is right, so there is no error
	if _, err := os.Lstat(filepath.Join(dir, "public")); err == nil {
		names = append(names, "public/SKILL.md")
	}
	for _, name := range append(names, "SKILL.md") {
		pl.docs[name], _, err = readPluginFile(dir, name, false)
		pl.note(name, err, false)
	}
	for _, hook := range []string{pl.before, pl.after} {
		if hook != "" {
			_, pl.hooks[hook], err = readPluginFile(dir, hook, true)
			pl.note(hook, err, false)
		}
	}
	title, description, err := frontmatter(pl.docs["SKILL.md"])
	if err == nil && title != name {
		err = fmt.Errorf("its frontmatter has the name %q, and agents expect %q, the directory's", title, name)
	}
	pl.note("SKILL.md", err, true)
	pl.Description = description
	return pl
}

// readPluginFile reads a regular file in a plugin's directory; of a hook only the version. No part of the path is a symbolic
// link, and the directories on the way are held to the strict modes too, for who may write there may exchange the file.
func readPluginFile(dir, name string, hook bool) (data []byte, version fileVersion, err error) {
	for at := name; at != "."; {
		at = path.Dir(at)
		if err := checkTrustedDir(filepath.Join(dir, at)); err != nil {
			return nil, version, err
		}
	}
	if !hook {
		data, err = readTrusted(filepath.Join(dir, name), false)
		return data, version, err
	}
	f, err := openTrusted(filepath.Join(dir, name), 0)
	if err != nil {
		return nil, version, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err = cmp.Or(err, checkTrustedFile(f, false)); err == nil {
		version = versionOf(info)
	}
	if err == nil && version.mode&0o111 == 0 {
		err = errors.New("it is not executable: run chmod u+x")
	}
	return nil, version, err
}

// pluginFingerprints gives a digest by "plugin:NAME" of all that is read of a plugin at start: a restart would bring what differs.
func pluginFingerprints(p paths) map[string]string {
	prints := map[string]string{}
	for _, pl := range surveyPlugins(p, &settings{}, true) {
		sum := sha256.Sum256(fmt.Append(nil, *pl))
		prints[pluginSource+pl.Name] = fmt.Sprintf("%x", sum[:8])
	}
	return prints
}

// parsePlugin reads a plugin's settings.json; its errors begin with file:line:column.
func parsePlugin(name, file string, data []byte) (*plugin, error) {
	r, err := readSettingNodes(file, pluginDefaults, data)
	if err != nil {
		return nil, err
	}
	text := func(key, pattern, want string) string {
		return r.string(key, form{regexp.MustCompile(`^(` + pattern + `)$`).MatchString, want})
	}
	const hookPath, hookWant = `|[^/.\pC][^/\pC]*(/[^/.\pC][^/\pC]*)*`, "a path inside the plugin's directory, such as hooks/before"
	p := &plugin{Name: name, Type: text("plugin.type", "skill|exec|trusted", "skill, exec or trusted (system is reserved)"),
		Command: r.string("plugin.command", anyText), Invoke: text("plugin.invoke", "exec|run", "exec or run"),
		before: text("plugin.before", hookPath, hookWant), after: text("plugin.after", hookPath, hookWant)}
	p.Rules = ruleSet{Source: pluginSource + name, Command: p.Command, Allow: r.rules("exec.allow"), Deny: r.rules("exec.deny")}
	r.number("plugin.apiVersion", 1, 1)
	for key, n := range r.nodes {
		if !r.inFile[key] {
			n.start = 0 // what is wrong with a field that the file does not have is wrong at its start
		}
	}
	badCommand := checkPluginWord("command", p.Command, commandChars)
	switch needed := p.Type != "skill" || p.Rules.Allow != nil || r.inFile["plugin.command"]; {
	case p.Invoke == "run" && p.Type != "trusted":
		r.fail(r.nodes["plugin.invoke"].start, "plugin.invoke", `"run" goes with "type":"trusted" only`)
	case badCommand != nil && needed:
		r.fail(r.nodes["plugin.command"].start, "plugin.command", "%v", badCommand)
	case p.Type == "skill" && (p.before+p.after != "" || r.inFile["plugin.routes"]):
		r.fail(r.nodes["plugin.type"].start, "plugin.type", "a skill plugin has neither hooks nor routes: use exec")
	}
	_, err = compilePolicy([]ruleSet{p.Rules}) // by themselves, so that an error has its place here
	if bad, ok := errors.AsType[*ruleError](err); ok {
		r.fail(r.nodes["exec."+bad.List].items[bad.Index].start, "exec."+bad.List, "rule %q: %v", bad.Rule, bad.Err)
	}
	mux, routes := http.NewServeMux(), r.nodes["plugin.routes"]
	for i, key := range routes.keys {
		if strings.HasPrefix(key, "_") {
			continue // a comment
		}
		route := pluginRoute{strings.Replace(key, " ", " /api/command/"+name, 1), nodeStrings(routes.items[i])}
		if err := route.register(mux, key); err != nil {
			r.fail(routes.keyAt[i], "plugin.routes", "the route %q cannot be used: %v", key, err)
		}
		p.routes = append(p.routes, route)
	}
	return p, r.err
}

var (
	// routeForm admits the patterns in which one path is one request: no host, no subtree, no "..."; net/http refuses . and ..
	routeForm     = regexp.MustCompile(`^(GET|POST|PUT|PATCH|DELETE) (/([A-Za-z0-9_.+~-]+|\{[A-Za-z0-9_]+\}))+$`)
	routeWildcard = regexp.MustCompile(`^\{[A-Za-z0-9_]+\}$`)
)

// register tries the route, which the file has as key, with the others.
func (r pluginRoute) register(mux *http.ServeMux, key string) (err error) {
	defer func() {
		if v := recover(); v != nil { // so net/http says what is wrong, and in a second line what conflicts
			lines := strings.Split(fmt.Sprint(v), "\n")
			err = errors.New(lines[min(1, len(lines)-1)])
		}
	}()
	if !routeForm.MatchString(key) || r.Argv == nil {
		return errors.New("write METHOD /path, with a method of GET, POST, PUT, PATCH, DELETE, segments of plain text or {name}, and an array of strings")
	}
	segments := strings.Split(key, "/")
	for i, arg := range r.Argv {
		for _, s := range append(segments, arg) {
			if routeWildcard.MatchString(s) && strings.Contains(arg, s) && (i == 0 || arg != s || !slices.Contains(segments, s)) {
				return fmt.Errorf("%q: a {name} of the path stands for a whole argument, and never for the command", arg)
			}
		}
	}
	mux.Handle(r.Pattern, http.NotFoundHandler())
	return checkArgv(r.Argv)
}

// routeArgv fills {x} elements of a route's argv with path values; the error is 400 invalid_args.
func (r pluginRoute) routeArgv(value func(string) string) ([]string, error) {
	argv := slices.Clone(r.Argv)
	for i, arg := range argv {
		if !routeWildcard.MatchString(arg) {
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

// hookOutput is what a hook answered; all nil: unchanged.
type hookOutput struct {
	Args   []string
	Result map[string]any // of string, int64 or nil, by the names of a buffered answer's fields
	Error  *apiError
}

// runFunc runs an approved command in the request's slot, audited under the plugin (server.go's).
type runFunc func(ctx context.Context, what approved, stdin []byte) outcome

// runHook runs one hook ("before" or "after"); an error is the hook's failure: 500 plugin_before_error or plugin_after_error.
// The error quotes what the hook printed: it is for the server's log. in is what the hook gets, but for the plugin's own part.
func (p *plugin) runHook(ctx context.Context, which string, in map[string]any, run runFunc) (answer hookOutput, err error) {
	hook := map[string]string{"before": p.before, "after": p.after}[which]
	file := filepath.Join(p.dir, hook)
	// Only the file that was checked at start runs: who can exchange it after this look owns the plugin anyway.
	if _, version, err := readPluginFile(p.dir, hook, true); err != nil || version != p.hooks[hook] {
		return answer, fmt.Errorf("the hook %q has changed since the server started: run aexec restart (%v)", file, err)
	}
	in["plugin"] = map[string]string{"name": p.Name, "type": p.Type, "command": p.Command, "invoke": p.Invoke}
	stdin, err := json.Marshal(in)
	if err != nil {
		return answer, err
	}
	out := run(ctx, approveUnchecked([]string{file}, p.Rules.Source), stdin)
	if out.end != endExit || !out.exited || out.exitCode != 0 {
		return answer, fmt.Errorf("the hook %q ended by %s, exit code %d, signal %q, saying %.*q", file, out.end, out.exitCode, out.signal,
			maxHookText, bytes.Join(out.stderr, nil))
	}
	if answer, err = parseHookOutput(bytes.Join(out.stdout, nil), which); err != nil {
		err = fmt.Errorf("the hook %q printed something that is no answer: %w", file, err)
	}
	return answer, err
}

// hookFields are the fields of a hook's answer: what the first letter of the value (0 for a number, n for null) and its text must match.
var hookFields = map[string]string{
	"result.output": `".*`, "result.stderr": `".*`, "result.signal": `".*`, "result.error": `".*`, "result.message": `".*`,
	"result.status": `"(done|error)`, "result.duration": `0\d{1,18}`, "result.length": `0\d{1,18}`, "result.exitCode": `n|0(\d\d?|1\d\d|2[0-4]\d|25[0-5])`,
	"error.status": `0[45]\d\d`, "error.code": `"[a-z0-9_]+`, "error.message": `".{1,` + strconv.Itoa(maxHookText) + `}`,
}

// parseHookOutput holds what a hook printed to one of: nothing, {"args"} (before), {"result"} (after), {"error"}.
func parseHookOutput(data []byte, which string) (none hookOutput, err error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return none, nil
	}
	n, err := parseStrict(data)
	if err != nil {
		return none, err
	}
	if n.kind != '{' || len(n.keys) != 1 {
		return none, errors.New("not a JSON object with one field")
	}
	field, value, fields := n.keys[0], n.items[0], map[string]any{}
	if argv := nodeStrings(value); field == "args" && which == "before" && checkArgv(argv) == nil {
		return hookOutput{Args: argv}, nil
	}
	for i, key := range value.keys {
		v, form := value.items[i], hookFields[field+"."+key]
		if v.surrogate || !regexp.MustCompile(`(?s)^(`+form+`)$`).MatchString(string(v.kind)+v.str) {
			return none, fmt.Errorf("%.40q has no field %.40q with such a value", field, key)
		}
		fields[key] = map[byte]any{'"': v.str, 'n': nil}[v.kind]
		if number, err := strconv.ParseInt(v.str, 10, 64); v.kind == '0' && err == nil {
			fields[key] = number
		}
	}
	switch {
	case value.kind == '{' && field == "result" && which == "after":
		return hookOutput{Result: fields}, nil
	case field == "error" && len(fields) == 3:
		return hookOutput{Error: &apiError{status: int(fields["status"].(int64)), Code: fields["code"].(string), Message: fields["message"].(string)}}, nil
	}
	return none, fmt.Errorf("a hook that runs %s cannot answer %.40q in this way", which, field)
}

// doctorPlugins gives the problems of every plugin. Of a disabled one everything is only a remark: the server starts without it.
func doctorPlugins(p paths, s *settings) []pluginProblem {
	problems := []pluginProblem{}
	for _, pl := range surveyPlugins(p, s, true) {
		for _, problem := range pl.Problems {
			problem.Warning = problem.Warning || !pl.Enabled
			problems = append(problems, problem)
		}
	}
	return problems
}

// enablePlugin and disablePlugin edit settings.json. Only what the server can start with is enabled.
func enablePlugin(p paths, s *settings, name string) error {
	pl := readPlugin(p, name)
	err := cmp.Or(checkPluginDir(p, name), checkCommandFree(name, pl.Command, surveyPlugins(p, s, false)))
	if err == nil && !pl.usable() {
		err = fmt.Errorf("the plugin %q cannot be used as it is: aexec plugin doctor says why", name)
	}
	if err != nil {
		return err
	}
	return editPluginState(p, name, true)
}

func disablePlugin(p paths, _ *settings, name string) error {
	if err := checkPluginDir(p, name); err != nil {
		return err
	}
	return editPluginState(p, name, false)
}

func checkPluginDir(p paths, name string) error {
	info, err := os.Lstat(filepath.Join(p.plugins, name))
	if err != nil || !info.IsDir() || checkPluginWord("name", name, pluginNameChars) != nil {
		return fmt.Errorf("there is no plugin %q: aexec plugin list shows what there is", name)
	}
	return nil
}

// removePlugin removes the one directory, never what a link leads to. Settings that enable it by name would miss it at the
// next start, so they disable it too; else a new plugin of that name is not to be off.
func removePlugin(p paths, s *settings, name string) error {
	off := slices.Contains(s.PluginsDisabled, name)
	err := checkPluginDir(p, name)
	if err == nil && slices.Contains(s.PluginsEnabled, name) && !off {
		err = editPluginState(p, name, false)
	}
	if err == nil {
		err = os.RemoveAll(filepath.Join(p.plugins, name))
	}
	if err == nil && s.PluginsMode != "explicit" && off {
		err = editPluginState(p, name, true)
	}
	return err
}

// pluginOrder is a plugin to make, and what came of it.
type pluginOrder struct {
	Name, Command, Type string
	Force, Found        bool          // replace the directory if there is one; the tool is there
	Took                time.Duration // to ask the tool
	Settings            string        // the settings.json that was written, for review; "": none
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

// starterKit makes a plugin for each of the tools that is there; progress hears of each as it is done with.
func starterKit(p paths, s *settings, names []string, force bool, probe probeFunc, progress func(pluginOrder, error)) {
	if len(names) == 0 {
		names = strings.Fields(starterTools)
	}
	for _, name := range names {
		progress(createPlugin(p, s, pluginOrder{Name: name, Command: name, Type: "skill", Force: force}, true, probe))
	}
}

// createPlugin asks the tool and writes a plugin about it. A tool that is not there gets a plugin without rules, unless mustBe.
func createPlugin(p paths, s *settings, o pluginOrder, mustBe bool, probe probeFunc) (pluginOrder, error) {
	_, err := parsePlugin(o.Name, "plugin create", marshal(map[string]any{"plugin": map[string]string{"type": o.Type, "command": o.Command}}))
	err = cmp.Or(checkPluginWord("name", o.Name, pluginNameChars), err, checkTrustedDir(p.plugins),
		checkCommandFree(o.Name, o.Command, surveyPlugins(p, s, false)))
	dir := filepath.Join(p.plugins, o.Name)
	if _, missing := os.Lstat(dir); err == nil && missing == nil && !o.Force {
		err = errPluginExists
	}
	if err != nil {
		return o, err
	}
	begun, texts, rules, requests := time.Now(), [2]string{}, []string{}, ""
	template, _ := pluginTemplate.ReadFile("skills/_plugin.md") // it is built in
	parts := strings.Split(string(template), "\n=====\n")
	for i, forms := range [][]string{{"--help", "-h", "help"}, {"--version", "-v", "version"}} {
		argv, text, found := askTool(o.Command, forms, probe)
		if !found {
			break
		}
		if o.Found, texts[i] = true, text; argv != nil {
			body, _ := json.Marshal(map[string][]string{"args": argv}) // strings always marshal
			rules = append(rules, strings.Join(argv, " "))
			requests += strings.Replace(parts[3], "{BODY}", string(body), 1)
		}
	}
	if o.Took = time.Since(begun); mustBe && !o.Found {
		return o, nil
	}
	list, _ := json.MarshalIndent(rules, "    ", "  ")
	fill := strings.NewReplacer("{NAME}", o.Name, "{COMMAND}", o.Command, "{TYPE}", o.Type, "{RULES}", string(list),
		"{REQUESTS}\n", cmp.Or(requests, "None yet: the operator adds rules to `exec.allow` in this plugin's `settings.json`.\n"),
		"{HELP}", cmp.Or(texts[0], "(nothing)"), "{VERSION}", cmp.Or(texts[1], "(nothing)"))
	o.Settings = fill.Replace(parts[2])
	return o, o.write(dir, map[string]string{"SKILL.md": fill.Replace(parts[0]), "references/usage.md": fill.Replace(parts[1]), "settings.json": o.Settings})
}

// write makes the directory under a name that is not loaded, and renames it: a crash leaves no half plugin.
func (o pluginOrder) write(dir string, files map[string]string) error {
	fresh := filepath.Join(filepath.Dir(dir), ".new-"+o.Name)
	err := errors.Join(os.RemoveAll(fresh), os.MkdirAll(filepath.Join(fresh, "references"), 0o700))
	for file, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(fresh, file), []byte(text), 0o600))
	}
	if err == nil && o.Force {
		err = os.RemoveAll(dir)
	}
	if err == nil {
		err = os.Rename(fresh, dir)
	}
	return err
}

// askTool takes the first form that ends with 0 and says something, else the first that says anything and fails:
// many tools print their help to standard error, but so do they "unknown option".
func askTool(command string, forms []string, probe probeFunc) (argv []string, text string, found bool) {
	for _, form := range forms {
		out := probe([]string{command, form})
		if out.end == endStart {
			return nil, "", false
		}
		said := cmp.Or(cleanText(bytes.Join(out.stdout, nil)), cleanText(bytes.Join(out.stderr, nil)))
		if worked := out.exitCode == 0; out.end == endExit && out.exited && said != "" && (worked || argv == nil) {
			if argv, text = []string{command, form}, said; worked {
				break
			}
		}
	}
	return argv, text, true
}

// cleanText makes foreign output safe to show in a fenced block: no terminal sequences, overstrikes, control or formatting
// characters, nothing that ends the block, and not too much.
func cleanText(data []byte) string {
	unsafe := regexp.MustCompile("\x1b(\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(\x07|\x1b\\\\)?|.)|[^\n]\x08|[^\n\t\\pL\\pM\\pN\\pP\\pS\\p{Zs}]")
	text := unsafe.ReplaceAllString(strings.ToValidUTF8(string(data), "\ufffd"), "")
	text = strings.TrimSpace(strings.ReplaceAll(text, "```", "'''"))
	if len(text) > maxUsage {
		text = strings.ToValidUTF8(text[:maxUsage], "") + "\n(cut here)"
	}
	return text
}
