// This file is the plugins: load, check, hooks, routes, and what `aexec plugin` and `aexec starterkit` write.
// It may read and write plugin directories, and it alone.
// It must not run anything but through exec.go with what acl.go approved, nor weaken the settings' own rules.
package main

import (
	"bytes"
	"cmp"
	"context"
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
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxHookText    = 1000 // bytes of what a failed hook said, in the log
	probeTimeout   = 3 * time.Second
	probeKillGrace = 200 * time.Millisecond
	maxProbeOutput = 1 << 20  // bytes that a tool may print as its help
	maxUsage       = 64 << 10 // bytes of it that go into references/usage.md

	// pluginDefaults are the fields of a plugin's settings.json, with their types and the values of those that are left out.
	pluginDefaults = `{"plugin":{"type":"skill","command":"","apiVersion":1,"invoke":"exec","before":"","after":"","routes":{}},
		"exec":{"allow":[],"deny":[]}}`

	reservedPluginWords = "exec acl plugins skills private ping command aexec ae"
	starterTools        = "claude codex gemini aider goose hermes openclaw opencode"
)

var (
	// pluginName is what the name of a plugin must look like, as it is a directory's and part of a URL.
	pluginName = newForm(`[a-z0-9][a-z0-9-]*`, "one word of a-z, 0-9 and -")

	// routeForm admits the patterns in which one path is one request: no host, no subtree, no "..."; net/http refuses . and ..
	routeForm     = regexp.MustCompile(`^(GET|POST|PUT|PATCH|DELETE) (/([A-Za-z0-9_.+~-]+|\{[A-Za-z0-9_]+\}))+$`)
	routeWildcard = regexp.MustCompile(`^\{[A-Za-z0-9_]+\}$`)
	routePlace    = regexp.MustCompile(` \(registered at [^)]*\)`) // which net/http adds: a line of ours
	routeValue    = regexp.MustCompile(`^[^-\p{Cc}]\P{Cc}*$`)
)

// plugin is one plugin as it lies on disk; the server has only those that are enabled and not broken.
type plugin struct {
	Name          string                 `json:"name"`
	Description   string                 `json:"description"` // of SKILL.md's frontmatter, one line
	Type          string                 `json:"type"`        // skill, exec, trusted
	Command       string                 `json:"command"`     // "" for one that has none
	Invoke        string                 `json:"-"`           // exec or run
	Enabled       bool                   `json:"enabled"`     // by the settings
	Broken        bool                   `json:"broken"`      // the server cannot start with it
	Rules         ruleSet                `json:"-"`
	routes        map[string][]string    // argv, with its {name}s, by pattern of net/http: METHOD /api/command/NAME/path
	before, after string                 // paths of the hooks in dir, "" if none
	dir           string                 // absolute
	hooks         map[string]fileVersion // by path in dir: the file that was checked, and the only one that runs
	docs          map[string][]byte      // by path in dir, as at start
}

// pluginProblem is one thing wrong with a plugin: a start-up error, or (Warning) a doctor's remark.
type pluginProblem struct {
	Plugin  string `json:"plugin"` // "": the directory of all
	Message string `json:"message"`
	Warning bool   `json:"warning"`
}

// loadPlugins gives the plugins that the server can start with, and all that is wrong with these and the others.
func loadPlugins(p paths, s *settings) (loaded []*plugin, problems []pluginProblem) {
	all, problems := surveyPlugins(p, s)
	return slices.DeleteFunc(all, func(pl *plugin) bool { return !pl.Enabled || pl.Broken }), problems
}

// surveyPlugins reads every plugin there is, in the order of their names. What is wrong with a disabled one is only a remark,
// for the server starts without it.
func surveyPlugins(p paths, s *settings) (plugins []*plugin, problems []pluginProblem) {
	if err := checkTrustedDir(p.plugins); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, []pluginProblem{{Message: err.Error()}}
	}
	names, _ := fs.Glob(os.DirFS(p.plugins), "[^.]*") // but .git; that the directory can be read was tried above
	owner := map[string]string{}                      // by command: a request would not know whose it is if there were two
	for _, name := range names {
		pl, err := readPlugin(p, name)
		pl.Enabled = s.enabled(name)
		if other := owner[pl.Command]; other != "" && pl.Enabled {
			err = fmt.Errorf("%s: the command %q is already that of the plugin %q: disable or remove one of them",
				filepath.Join(pl.dir, "settings.json"), pl.Command, other)
		} else if pl.Command != "" && pl.Enabled {
			owner[pl.Command] = name
		}
		if pl.Broken = err != nil; pl.Broken {
			problems = append(problems, pluginProblem{name, err.Error(), !pl.Enabled})
		} else if _, pl.Description, err = frontmatter(pl.docs["SKILL.md"]); err != nil {
			problems = append(problems, pluginProblem{name, filepath.Join(pl.dir, "SKILL.md") + ": " + err.Error(), true})
		}
		plugins = append(plugins, pl)
	}
	for _, name := range s.PluginsEnabled {
		if s.PluginsMode == "explicit" && !slices.Contains(names, name) { // its deny rules would be missing
			why := filepath.Join(p.plugins, name) + " is not there, but plugins.enabled names it"
			problems = append(problems, pluginProblem{name, why, s.disabled(name)})
		}
	}
	return plugins, problems
}

// readPlugin reads and checks one plugin directory. With an error, which names the file, the plugin has only its name.
func readPlugin(p paths, name string) (*plugin, error) {
	broken, dir, files := &plugin{Name: name}, filepath.Join(p.plugins, name), map[string][]byte{}
	if err := checkPluginName(name); err != nil {
		return broken, err
	}
	references, _ := fs.Glob(os.DirFS(dir), "references/*.md") // the patterns are right, so there is no error
	public, _ := fs.Glob(os.DirFS(dir), "public/SKILL.md")
	for _, file := range slices.Concat([]string{"settings.json", "SKILL.md"}, references, public) {
		data, err := readTrusted(filepath.Join(dir, file), guarded)
		if err == nil {
			err = checkWay(dir, file)
		}
		if err != nil {
			return broken, err
		}
		files[file] = data
	}
	pl, err := parsePlugin(name, filepath.Join(dir, "settings.json"), files["settings.json"])
	if err != nil {
		return broken, err
	}
	delete(files, "settings.json")
	pl.dir, pl.docs, pl.hooks = dir, files, map[string]fileVersion{}
	for _, hook := range []string{pl.before, pl.after} {
		if hook != "" {
			pl.hooks[hook], err = checkHook(dir, hook)
		}
		if err != nil {
			return broken, err
		}
	}
	return pl, nil
}

// checkPluginName comes before anything is read or written under that name.
func checkPluginName(name string) error {
	if !pluginName.ok(name) || reservedWord(name) {
		return fmt.Errorf("the name %q must be %s, and none of %s", name, pluginName.want, reservedPluginWords)
	}
	return nil
}

func reservedWord(word string) bool {
	return slices.Contains(strings.Fields(reservedPluginWords), word)
}

// checkHook gives the version of a hook that can be run and that strict modes admit.
func checkHook(dir, name string) (fileVersion, error) {
	f, info, err := openTrusted(filepath.Join(dir, name), 0, guarded)
	if err != nil {
		return fileVersion{}, err
	}
	defer f.Close()
	if info.Mode()&0o111 == 0 {
		return fileVersion{}, fmt.Errorf("%s is not executable: run chmod u+x", f.Name())
	}
	return versionOf(info, nil), checkWay(dir, name)
}

// checkWay holds the directories on the way to a plugin's file to the strict modes, for who may write there may exchange the
// file. None is a symbolic link.
func checkWay(dir, name string) error {
	for name != "." {
		name = path.Dir(name)
		if err := checkTrustedDir(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// parsePlugin reads a plugin's settings.json; its errors begin with the file.
func parsePlugin(name, file string, data []byte) (*plugin, error) {
	var f struct {
		PluginType, PluginCommand, PluginInvoke, PluginBefore, PluginAfter string
		PluginAPIVersion                                                   int
		Allow, Deny                                                        []ruleSpec
	}
	r, err := readSettings(file, pluginDefaults, data, &f)
	if err == nil && f.PluginAPIVersion != 1 {
		r.fail(r.nodes["plugin.apiVersion"], "plugin.apiVersion", "must be 1")
		err = r.err
	}
	if err != nil {
		return nil, err
	}
	p := &plugin{Name: name, Type: f.PluginType, Command: f.PluginCommand, Invoke: f.PluginInvoke}
	p.before, p.after = f.PluginBefore, f.PluginAfter
	p.Rules = ruleSet{Source: pluginSource + name, Command: p.Command, Allow: f.Allow, Deny: f.Deny}
	switch p.routes, err = parseRoutes(name, r.nodes["plugin.routes"]); {
	case err != nil:
	case p.Command == "" && (p.Type != "skill" || len(f.Allow) > 0):
		err = errors.New("missing plugin.command")
	case reservedWord(p.Command):
		err = fmt.Errorf("the command %q is reserved: choose another", p.Command)
	case p.Type == "skill" && (p.before+p.after != "" || len(p.routes) > 0):
		err = errors.New("a skill plugin has neither hooks nor routes: use the type exec")
	case p.Type != "trusted" && p.Invoke == "run":
		err = errors.New(`"invoke":"run" goes with "type":"trusted" only`)
	default:
		_, err = compilePolicy([]ruleSet{p.Rules})
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return p, nil
}

// parseRoutes reads the routes and tries them beside each other.
func parseRoutes(name string, n *node) (routes map[string][]string, err error) {
	routes, mux, key := map[string][]string{}, http.NewServeMux(), ""
	defer func() {
		if said := recover(); said != nil { // so net/http says what is wrong with a pattern, or what it conflicts with
			why := routePlace.ReplaceAllString(fmt.Sprint(said), "")
			err = fmt.Errorf("the route %q cannot be used: %s", key, strings.ReplaceAll(why, "\n", " "))
		}
	}()
	for i := range n.keys {
		if key = n.keys[i].str; isComment(key) {
			continue
		}
		argv, pattern := n.items[i].texts(), strings.Replace(key, " ", " /api/command/"+name, 1)
		if err := checkRoute(key, argv); err != nil {
			return nil, fmt.Errorf("the route %q cannot be used: %w", key, err)
		}
		mux.Handle(pattern, http.NotFoundHandler())
		routes[pattern] = argv
	}
	return routes, nil
}

func checkRoute(key string, argv []string) error {
	if !routeForm.MatchString(key) || argv == nil {
		return errors.New(`write "METHOD /path": ["command", ...], with GET, POST, PUT, PATCH or DELETE, and segments of plain text or {name}`)
	}
	segments := strings.Split(key, "/")
	for i, arg := range argv {
		holds := func(s string) bool { return routeWildcard.MatchString(s) && strings.Contains(arg, s) }
		if slices.ContainsFunc(append(segments, arg), holds) && (i == 0 || !slices.Contains(segments, arg)) {
			return fmt.Errorf("%q: a {name} of the path stands for a whole argument, and never for the command", arg)
		}
	}
	return checkArgv(argv)
}

// routeArgv fills the {name}s of a route's argv with path values; the error is 400 invalid_args.
func routeArgv(argv []string, value func(string) string) ([]string, error) {
	argv = slices.Clone(argv)
	for i, arg := range argv {
		if !routeWildcard.MatchString(arg) {
			continue
		}
		argv[i] = value(strings.Trim(arg, "{}"))
		if !routeValue.MatchString(argv[i]) || !utf8.ValidString(argv[i]) {
			return nil, fmt.Errorf("the path value %q for %s is empty, begins with -, is not UTF-8 or holds a control character", argv[i], arg)
		}
	}
	return argv, checkArgv(argv)
}

// sees says whether a command with these arguments is the plugin's: first argument or its base name is its command.
func (p *plugin) sees(argv []string) bool {
	return p.Command != "" && len(argv) > 0 && path.Base(argv[0]) == p.Command
}

// approve is the second decision, about what a hook or a route leads to; a trusted plugin with "invoke":"run" alone is spared it.
func (p *plugin) approve(pol policy, argv []string) (approved, decision) {
	if p.Type == "trusted" && p.Invoke == "run" {
		return approveUnchecked(argv), decision{Allowed: true, List: "trusted", Source: p.Rules.Source}
	}
	return pol.decide(argv)
}

// hookOutput is what a hook may print: one of these, or nothing, which leaves all as it is.
type hookOutput struct {
	Args   []string
	Result map[string]any // of a buffered answer's fields
	Error  *struct {
		Status        int
		Code, Message string
	}
}

// runHook has one hook ("before" or "after") run in the request's slot, audited under the plugin. in is what it is told, but for
// the plugin's own part. An error is the hook's failure: 500 plugin_before_error or plugin_after_error. As it quotes what the hook
// printed, it is for the server's log.
func (p *plugin) runHook(which string, in map[string]any, run func(what approved, stdin []byte) outcome) (answer hookOutput, err error) {
	hook := p.before
	if which == "after" {
		hook = p.after
	}
	// Only the file that was checked at start runs: who can exchange it after this look owns the plugin anyway.
	if version, err := checkHook(p.dir, hook); err != nil || version != p.hooks[hook] {
		return answer, fmt.Errorf("the hook %q has changed since the server started: run aexec restart (%v)", hook, err)
	}
	in["plugin"] = map[string]string{"name": p.Name, "type": p.Type, "command": p.Command, "invoke": p.Invoke}
	out := run(approveUnchecked([]string{filepath.Join(p.dir, hook)}), marshal(in))
	if out.end != endExit || !out.exited || out.exitCode != 0 {
		return answer, fmt.Errorf("the hook %q ended by %s, exit code %d, signal %q, saying %.*q", hook, out.end, out.exitCode, out.signal,
			maxHookText, bytes.Join(out.stderr, nil))
	}
	if answer, err = parseHookOutput(bytes.Join(out.stdout, nil), which); err != nil {
		err = fmt.Errorf("the hook %q printed something that is no answer: %w", hook, err)
	}
	return answer, err
}

// parseHookOutput holds what a hook printed to one of: nothing, {"args"} (before), {"result"} (after), {"error"}.
func parseHookOutput(data []byte, which string) (none hookOutput, err error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return none, nil
	}
	root, err := parseStrict(data)
	if err != nil {
		return none, err
	}
	said, decoder := hookOutput{}, json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&said); err != nil {
		return none, err
	}
	switch e := said.Error; {
	case len(root.keys) != 1:
	case which == "before" && checkArgv(root.items[0].texts()) == nil,
		which == "after" && said.Result != nil,
		e != nil && e.Status >= 400 && e.Status <= 599 && e.Code != "" && e.Message != "":
		return said, nil
	}
	return none, fmt.Errorf("a hook that runs %s answers with one of args (before), result (after) and error", which)
}

// editPlugin enables, disables or removes a plugin. What is broken would keep the server from starting, and is not enabled.
func editPlugin(p paths, s *settings, name, action string) error {
	dir := filepath.Join(p.plugins, name)
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() || checkPluginName(name) != nil {
		return fmt.Errorf("there is no plugin %q: aexec plugin list shows what there is", name)
	}
	switch action {
	case "remove":
		if slices.Contains(s.PluginsEnabled, name) && !s.disabled(name) { // the next start would miss it
			if err := editPluginState(p, name, false); err != nil {
				return err
			}
		}
		return os.RemoveAll(dir) // never what a link leads to
	case "enable":
		if _, err := readPlugin(p, name); err != nil {
			return err
		}
	}
	return editPluginState(p, name, action == "enable")
}

// pluginOrder is a plugin to make, and what came of it.
type pluginOrder struct {
	Name, Command, Type string
	Force, MustBe       bool          // replace the directory if there is one; make nothing if the tool is not there
	Found               bool          // the tool is there
	Took                time.Duration // to ask the tool
	Settings            string        // the settings.json that was written, for review; "": none
}

// toolProbe asks tools about themselves. No rule decides that: the operator named the tool at this machine's own terminal.
func toolProbe(ctx context.Context, r *runner, snap *snapshot) func(argv []string) outcome {
	return func(argv []string) outcome {
		return r.run(ctx, command{what: approveUnchecked(argv), env: snap.env, pathDirs: snap.pathDirs, cwd: "/",
			noNewPrivs: true, timeout: probeTimeout, killGrace: probeKillGrace, maxBytes: maxProbeOutput})
	}
}

// createPlugin asks the tool and writes a plugin about it, which has no rules if the tool says nothing.
func createPlugin(p paths, o pluginOrder, probe func(argv []string) outcome) (pluginOrder, error) {
	dir, planned := filepath.Join(p.plugins, o.Name), map[string]any{
		"plugin": map[string]string{"type": o.Type, "command": o.Command}, "exec": map[string][]string{"allow": {o.Command}}}
	_, err := parsePlugin(o.Name, "plugin create", marshal(planned))
	err = cmp.Or(err, checkPluginName(o.Name), checkTrustedDir(p.plugins))
	if _, missing := os.Lstat(dir); err == nil && missing == nil && !o.Force {
		err = errors.New("the plugin exists already: use --force to replace its directory")
	}
	if err != nil {
		return o, err
	}
	begun, texts, rules, requests := time.Now(), [2]string{}, []string{}, ""
	template, _ := skillFiles.ReadFile("skills/_plugin.md") // it is built in
	parts := strings.Split(string(template), "\n=====\n")   // SKILL.md, references/usage.md, settings.json, one request
	for i, forms := range [][]string{{"--help", "-h", "help"}, {"--version", "-v", "version"}} {
		var argv []string
		if argv, texts[i] = o.ask(forms, probe); argv != nil {
			rules = append(rules, strings.Join(argv, " "))
			requests += strings.Replace(parts[3], "{BODY}", string(marshal(map[string][]string{"args": argv})), 1)
		}
	}
	if o.Took = time.Since(begun); o.MustBe && !o.Found {
		return o, nil
	}
	fill := strings.NewReplacer("{NAME}", o.Name, "{COMMAND}", o.Command, "{TYPE}", o.Type, "{RULES}", string(marshal(rules)),
		"{REQUESTS}\n", cmp.Or(requests, "None yet: the operator adds rules to `exec.allow` in this plugin's `settings.json`.\n"),
		"{HELP}", texts[0], "{VERSION}", texts[1])
	o.Settings = fill.Replace(parts[2])
	fresh := filepath.Join(p.plugins, ".new-"+o.Name) // not loaded, so that a crash leaves no half plugin
	if err = os.RemoveAll(fresh); err == nil {
		err = os.MkdirAll(filepath.Join(fresh, "references"), 0o700)
	}
	for file, text := range map[string]string{"SKILL.md": parts[0], "references/usage.md": parts[1], "settings.json": parts[2]} {
		if err == nil {
			err = os.WriteFile(filepath.Join(fresh, file), []byte(fill.Replace(text)), 0o600)
		}
	}
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err == nil {
		err = os.Rename(fresh, dir)
	}
	return o, err
}

// ask takes the first form that ends with 0 and says something, else the first that says anything and fails: many tools print
// their help to standard error, but so do they "unknown option".
func (o *pluginOrder) ask(forms []string, probe func(argv []string) outcome) (argv []string, text string) {
	for _, form := range forms {
		out := probe([]string{o.Command, form})
		if o.Found = out.end != endStart; !o.Found {
			break
		}
		said, failed := cleanText(bytes.Join(append(out.stdout, out.stderr...), nil)), out.exitCode != 0
		if out.end != endExit || !out.exited || said == "" || failed && argv != nil {
			continue
		}
		if argv, text = []string{o.Command, form}, said; !failed {
			break
		}
	}
	return argv, cmp.Or(text, "(nothing)")
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
