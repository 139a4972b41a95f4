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
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// pluginDefaults are the fields of a plugin's settings.json, with their types and the values of those that are left out.
const pluginDefaults = `{"plugin":{"type":"skill","command":"","apiVersion":1,"invoke":"exec","before":"","after":"","routes":{}},
	"exec":{"allow":[],"deny":[]}}`

var (
	starterTools        = strings.Fields("claude codex gemini aider goose hermes openclaw opencode")
	reservedPluginWords = strings.Fields("exec acl plugins skills private ping command aexec ae")

	pluginName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)

	// routeForm admits the patterns in which one path is one request: no host, no subtree, no "..."; net/http refuses . and ..
	routeForm     = regexp.MustCompile(`^(GET|POST|PUT|PATCH|DELETE) (/([A-Za-z0-9_.+~-]+|\{[A-Za-z0-9_]+\}))+$`)
	routeWildcard = regexp.MustCompile(`^\{[A-Za-z0-9_]+\}$`)
	routePlace    = regexp.MustCompile(` \(registered at [^)]*\)`) // which net/http adds: a line of ours
	routeValue    = regexp.MustCompile(`^[^-\p{Cc}]\P{Cc}*$`)

	// unsafeText is terminal sequences, overstrikes, and control and formatting characters.
	unsafeText = regexp.MustCompile(`\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)|[^\n]\x08|[^\n\t\pL\pM\pN\pP\pS\p{Zs}]`)
)

// plugin is one plugin as it lies on disk. The server has only those that are enabled and not broken.
type plugin struct {
	Name          string                 `json:"name"`
	Description   string                 `json:"description"` // of SKILL.md's frontmatter
	Type          string                 `json:"type"`        // skill, exec, trusted
	Command       string                 `json:"command"`     // "" for one that has none
	Invoke        string                 `json:"-"`           // exec or run
	Enabled       bool                   `json:"enabled"`     // by the settings
	Broken        bool                   `json:"broken"`      // Problem keeps it from being used; if it is enabled, the server from starting
	Problem       string                 `json:"problem"`     // what is wrong with it, "" if nothing is
	Rules         ruleSet                `json:"-"`
	routes        map[string][]string    // argv, with its {name}s, by pattern of net/http: METHOD /api/command/NAME/path
	before, after string                 // paths of the hooks in dir, "" if none
	dir           string                 // absolute
	hooks         map[string]fileVersion // by path in dir: the file that was checked, and the only one that runs
	docs          map[string][]byte      // by path in dir, as at start
}

// loadPlugins gives every plugin there is, those that the server can start with, and those that something is wrong with.
func loadPlugins(p paths, s *settings) (all, usable, problems []*plugin) {
	names, _ := fs.Glob(os.DirFS(p.plugins), "[^.]*") // but .git; whether the directory can be read is asked below
	if s.PluginsMode == "explicit" {                  // of one that is not there the deny rules would be missing
		names = append(names, s.PluginsEnabled...)
	}
	if err := checkTrustedDir(p.plugins); err != nil && !errors.Is(err, fs.ErrNotExist) {
		all, names = []*plugin{{Name: "*", Enabled: true, Broken: true, Problem: err.Error()}}, nil
	}
	owner := map[string]string{} // by command: a request would not know whose it is if there were two
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		pl, err := readPlugin(p, name)
		pl.Enabled = s.enabled(name)
		if other := owner[pl.Command]; other != "" && pl.Enabled {
			err = fmt.Errorf("its command %q is already that of the plugin %q: disable or remove one of them", pl.Command, other)
		} else if pl.Command != "" && pl.Enabled {
			owner[pl.Command] = name
		}
		_, description, remark := frontmatter(pl.docs["SKILL.md"])
		pl.Description, pl.Broken = description, err != nil
		if err = cmp.Or(err, remark); err != nil {
			pl.Problem = err.Error()
		}
		all = append(all, pl)
	}
	usable = slices.DeleteFunc(slices.Clone(all), func(pl *plugin) bool { return !pl.Enabled || pl.Broken })
	problems = slices.DeleteFunc(slices.Clone(all), func(pl *plugin) bool { return pl.Problem == "" })
	return all, usable, problems
}

// readPlugin reads and checks one plugin directory. An error names the file.
func readPlugin(p paths, name string) (*plugin, error) {
	dir, err := pluginDir(p, name)
	file := filepath.Join(dir, "settings.json")
	data, unread := readTrusted(file, guarded)
	pl, unparsed := parsePlugin(name, file, data)
	if err = cmp.Or(err, unread, unparsed); err != nil {
		return &plugin{Name: name}, err
	}
	pl.dir, pl.docs, pl.hooks = dir, map[string][]byte{}, map[string]fileVersion{}
	references, _ := fs.Glob(os.DirFS(dir), "references/*.md") // the patterns are right, so there is no error
	public, _ := fs.Glob(os.DirFS(dir), "public/SKILL.md")
	for _, doc := range slices.Concat([]string{"SKILL.md"}, references, public) {
		pl.docs[doc], unread = readTrusted(filepath.Join(dir, doc), guarded)
		_, open := checkFile(dir, doc)
		err = cmp.Or(err, unread, open)
	}
	for _, hook := range []string{pl.before, pl.after} {
		if hook != "" && err == nil {
			if pl.hooks[hook], err = checkFile(dir, hook); err == nil && pl.hooks[hook].mode&0o111 == 0 {
				err = fmt.Errorf("%s is not executable: run chmod u+x", filepath.Join(dir, hook))
			}
		}
	}
	return pl, err
}

// pluginDir is where a plugin of that name lies; an error says that none can be called so.
func pluginDir(p paths, name string) (dir string, err error) {
	if !pluginName.MatchString(name) || slices.Contains(reservedPluginWords, name) {
		err = fmt.Errorf("the name %q must be one word of a-z, 0-9 and -, and none of %s", name, reservedPluginWords)
	}
	return filepath.Join(p.plugins, name), err
}

// checkFile gives the version of a plugin's file. It holds the file, and the directories on the way to it, to strict modes: who
// may write there may exchange the file.
func checkFile(dir, name string) (fileVersion, error) {
	f, info, err := openTrusted(filepath.Join(dir, name), 0, guarded)
	if err != nil {
		return fileVersion{}, err
	}
	defer f.Close()
	for err == nil && name != "." {
		name = filepath.Dir(name)
		err = checkTrustedDir(filepath.Join(dir, name))
	}
	return versionOf(info, nil), err
}

// parsePlugin reads a plugin's settings.json; its errors begin with the file.
func parsePlugin(name, file string, data []byte) (p *plugin, err error) {
	p = &plugin{Name: name, Rules: ruleSet{Source: pluginSource + name}}
	r := readSettings(file, pluginDefaults, data, &p.Rules)
	if n := r.nodes["plugin.apiVersion"]; n.raw != "1" {
		r.fail(n, "plugin.apiVersion", "must be 1")
	}
	if r.err != nil {
		return nil, r.err
	}
	text := func(key string) string { return r.nodes["plugin."+key].str }
	p.Type, p.Command, p.Invoke = text("type"), text("command"), text("invoke")
	p.before, p.after, p.Rules.Command = text("before"), text("after"), p.Command
	switch p.routes, err = parseRoutes(name, r.nodes["plugin.routes"]); {
	case err != nil:
	case p.Command == "" && (p.Type != "skill" || len(p.Rules.Allow) > 0):
		err = errors.New("missing plugin.command")
	case slices.Contains(reservedPluginWords, p.Command):
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
func parseRoutes(name string, n *node) (map[string][]string, error) {
	routes, mux := map[string][]string{}, http.NewServeMux()
	for i, key := range n.keys {
		if isComment(key.str) {
			continue
		}
		argv, pattern := n.items[i].texts(), strings.Replace(key.str, " ", " /api/command/"+name, 1)
		if err := tryRoute(mux, key.str, pattern, argv); err != nil {
			return nil, fmt.Errorf("the route %q cannot be used: %w", key.str, err)
		}
		routes[pattern] = argv
	}
	return routes, nil
}

func tryRoute(mux *http.ServeMux, key, pattern string, argv []string) (err error) {
	defer func() {
		if said := recover(); said != nil { // so net/http says what is wrong with a pattern, or what it conflicts with
			err = errors.New(strings.ReplaceAll(routePlace.ReplaceAllString(fmt.Sprint(said), ""), "\n", " "))
		}
	}()
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
	mux.Handle(pattern, http.NotFoundHandler())
	return checkArgv(argv)
}

// routeArgv fills the {name}s of a route's argv with path values; the error is 400 invalid_args.
func routeArgv(argv []string, value func(string) string) ([]string, error) {
	argv = slices.Clone(argv)
	for i, arg := range argv {
		if routeWildcard.MatchString(arg) {
			if argv[i] = value(strings.Trim(arg, "{}")); !routeValue.MatchString(argv[i]) {
				return nil, fmt.Errorf("the path value %q for %s is empty, begins with -, or holds a control character", argv[i], arg)
			}
		}
	}
	return argv, checkArgv(argv)
}

// sees says whether a command with these arguments is the plugin's: first argument or its base name is its command.
func (p *plugin) sees(argv []string) bool {
	return p.Command != "" && len(argv) > 0 && filepath.Base(argv[0]) == p.Command
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
// the plugin's own part. An error, for the server's log, says how the hook failed.
func (p *plugin) runHook(which string, in map[string]any, run func(what approved, stdin []byte) outcome) (hookOutput, error) {
	hook := pick(which == "after", p.after, p.before)
	// Only the file that was checked at start runs: who can exchange it after this look owns the plugin anyway.
	if version, err := checkFile(p.dir, hook); err != nil || version != p.hooks[hook] {
		return hookOutput{}, fmt.Errorf("it has changed since the server started: run aexec restart (%v)", err)
	}
	in["plugin"] = map[string]string{"name": p.Name, "type": p.Type, "command": p.Command, "invoke": p.Invoke}
	out := run(approveUnchecked([]string{filepath.Join(p.dir, hook)}), marshal(in))
	if out.end != endExit || !out.exited || out.exitCode != 0 {
		said := bytes.Join(out.stderr, nil)
		return hookOutput{}, fmt.Errorf("it ended by %s, exit code %d, signal %q, saying %.1000q", out.end, out.exitCode, out.signal, said)
	}
	return parseHookOutput(bytes.Join(out.stdout, nil), which)
}

// parseHookOutput holds what a hook printed to one of: nothing, {"args"} (before), {"result"} (after), {"error"}.
func parseHookOutput(data []byte, which string) (none hookOutput, err error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return none, nil
	}
	root, err := parseStrict(data)
	said, decoder := hookOutput{}, json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err = cmp.Or(err, decoder.Decode(&said)); err != nil {
		return none, err
	}
	e := said.Error
	if len(root.keys) == 1 && (which == "before" && checkArgv(root.items[0].texts()) == nil ||
		which == "after" && said.Result != nil ||
		e != nil && e.Status >= 400 && e.Status <= 599 && e.Code != "" && e.Message != "") {
		return said, nil
	}
	return none, fmt.Errorf("a hook that runs %s answers with one of args (before), result (after) and error", which)
}

// editPlugin enables, disables or removes a plugin.
func editPlugin(p paths, s *settings, name, action string) error {
	dir, err := pluginDir(p, name)
	if info, missing := os.Lstat(dir); err != nil || missing != nil || !info.IsDir() {
		return fmt.Errorf("there is no plugin %q: aexec plugin list shows what there is", name)
	}
	explicit, enable := s.PluginsMode == "explicit", action == "enable"
	if action != "remove" || explicit && s.enabled(name) { // a start would miss one that is gone
		text := editList(s.source.text, "plugins.disabled", name, enable)
		if explicit && enable {
			text = editList(text, "plugins.enabled", name, false)
		}
		err = s.replace(p, "plugins", text) // whether exec.tests still hold is not tried: that takes the plugins' rules
	}
	if err == nil && action == "remove" {
		err = os.RemoveAll(dir) // never what a link leads to
	}
	return err
}

// createPlugin asks a tool, which the operator named at this machine's own terminal, about itself, and writes the plugin o: always,
// or only if the tool is found. It says whether it was, and gives the settings.json that it wrote, "" if none.
func createPlugin(p paths, s *snapshot, o plugin, force, always bool, run func(context.Context, command) outcome) (bool, string, error) {
	dir, err := pluginDir(p, o.Name)
	_, wrong := parsePlugin(o.Name, "plugin create", marshal(map[string]any{
		"plugin": map[string]string{"type": o.Type, "command": o.Command}, "exec": map[string][]string{"allow": {o.Command}}}))
	if _, missing := os.Lstat(dir); missing == nil && !force {
		wrong = cmp.Or(wrong, errors.New("the plugin exists already: use --force to replace its directory"))
	}
	if err = cmp.Or(err, wrong, checkTrustedDir(p.plugins)); err != nil {
		return false, "", err
	}
	parts := strings.Split(skillText("_plugin.md"), "\n=====\n") // SKILL.md, references/usage.md, settings.json, one request
	rules, requests, said, found := []string{}, "", [2]string{"(nothing)", "(nothing)"}, false
	for i, forms := range [][]string{{"--help", "-h", "help"}, {"--version", "-v", "version"}} {
		for _, form := range forms {
			out := run(context.Background(), command{what: approveUnchecked([]string{o.Command, form}), env: s.env,
				pathDirs: s.pathDirs, cwd: "/", noNewPrivs: true, timeout: 3 * time.Second, killGrace: time.Second / 5, maxBytes: 1 << 20})
			found = found || out.end != endStart
			text := strings.ToValidUTF8(string(bytes.Join(append(out.stdout, out.stderr...), nil)), "\ufffd")
			text = strings.ReplaceAll(unsafeText.ReplaceAllString(text, ""), "```", "'''") // it goes into a fenced block
			text = fmt.Sprintf("%.32000s", strings.TrimSpace(text))
			if out.end == endExit && out.exited && out.exitCode == 0 && text != "" {
				said[i], rules = text, append(rules, o.Command+" "+form)
				requests += strings.Replace(parts[3], "{BODY}", fmt.Sprintf(`{"args":[%q,%q]}`, o.Command, form), 1)
				break
			}
		}
	}
	if !found && !always {
		return false, "", nil
	}
	fill := strings.NewReplacer("{NAME}", o.Name, "{COMMAND}", o.Command, "{TYPE}", o.Type, "{RULES}", string(marshal(rules)),
		"{REQUESTS}\n", cmp.Or(requests, "None yet: the operator adds rules to `exec.allow` in this plugin's `settings.json`.\n"),
		"{HELP}", said[0], "{VERSION}", said[1])
	fresh := filepath.Join(p.plugins, ".new-"+o.Name) // which is never loaded
	err = errors.Join(os.RemoveAll(fresh), os.MkdirAll(filepath.Join(fresh, "references"), 0o700))
	for i, file := range []string{"SKILL.md", "references/usage.md", "settings.json"} {
		err = errors.Join(err, os.WriteFile(filepath.Join(fresh, file), []byte(fill.Replace(parts[i])), 0o600))
	}
	if err == nil {
		err = errors.Join(os.RemoveAll(dir), os.Rename(fresh, dir))
	}
	return found, fill.Replace(parts[2]), err
}
