// This file is the strict JSON reader, for bodies and files both, the typed values of settings, and edits that leave the rest of a text as it was.
// It may look at bytes and make others of them.
// It must not do I/O, keep state, or accept what encoding/json would not: it only ever refuses more.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxJSONDepth  = 64 // arrays and objects within each other; ours need five
	dayMs         = 24 * 60 * 60 * 1000
	maxJSONValues = 1 << 19 // as many as 1 MiB can hold; each takes about 150 bytes of memory
)

// nodeKinds names the kinds of a node for people.
var nodeKinds = map[byte]string{
	'{': "an object", '[': "an array", '"': "a string", '0': "a number", 't': "true or false", 'f': "true or false", 'n': "null",
}

// node is one JSON value of the strict reader, with its place in the text.
type node struct {
	kind      byte     // a key of nodeKinds
	surrogate bool     // the string holds a lone surrogate escape, which became U+FFFD
	start     int      // byte offset into the text
	raw       string   // as written
	str       string   // the string, or the number's literal
	keys      []string // of an object, in order, unique
	keyAt     []int    // byte offset of each key, or of each element of an array
	items     []*node  // of an object or an array
}

// get is the member of an object, or nil.
func (n *node) get(key string) *node {
	if i := slices.Index(n.keys, key); i >= 0 {
		return n.items[i]
	}
	return nil
}

func (n *node) end() int     { return n.start + len(n.raw) }
func (n *node) what() string { return nodeKinds[n.kind] }

// plain is the value as encoding/json has it.
func (n *node) plain() (value any) {
	json.Unmarshal([]byte(n.raw), &value) // it is valid
	return value
}

// shown is the value for an error: text as it was sent only quoted, and cut.
func (n *node) shown() string {
	return cmp.Or(map[byte]string{'"': fmt.Sprintf("%.80q", n.str), '0': fmt.Sprintf("%.30s", n.str)}[n.kind], n.what())
}

// jsonError is what the strict reader found wrong, and where (line and column from 1, in bytes).
type jsonError struct {
	Line, Col int
	Msg       string
}

func (e *jsonError) Error() string {
	return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Col, e.Msg)
}

// jsonErrorIn names the file of a *jsonError; others pass as they are.
func jsonErrorIn(file string, err error) error {
	if e, ok := errors.AsType[*jsonError](err); ok {
		return fmt.Errorf("%s:%d:%d: %s", file, e.Line, e.Col, e.Msg)
	}
	return err
}

func newJSONError(text string, at int, format string, args ...any) error {
	before := text[:at]
	return &jsonError{1 + strings.Count(before, "\n"), at - strings.LastIndexByte(before, '\n'), fmt.Sprintf(format, args...)}
}

// strictReader walks through text that encoding/json has found valid, and so meets no syntax error. Its first error stays.
type strictReader struct {
	text    string
	decoder *json.Decoder
	values  int
	err     error
}

// parseStrict reads one JSON value and nothing after it: no duplicate keys, no invalid UTF-8, no byte order mark,
// nesting of at most maxJSONDepth, at most maxJSONValues values. Errors are *jsonError.
func parseStrict(data []byte) (*node, error) {
	r := &strictReader{text: string(data), decoder: json.NewDecoder(bytes.NewReader(data))}
	if strings.HasPrefix(r.text, "\ufeff") {
		return nil, newJSONError(r.text, 0, "begins with a byte order mark: save it without one")
	}
	for at, c := range r.text {
		if c == utf8.RuneError && !strings.HasPrefix(r.text[at:], "\ufffd") {
			return nil, newJSONError(r.text, at, "is not UTF-8")
		}
	}
	if syntax, bad := errors.AsType[*json.SyntaxError](json.Unmarshal(data, new(json.RawMessage))); bad {
		return nil, newJSONError(r.text, max(int(syntax.Offset)-1, 0), "%v", syntax)
	}
	r.decoder.UseNumber()
	root := r.value(1)
	return root, r.err
}

// next is where the next token begins; before it stand only white space, commas and colons.
func (r *strictReader) next() int {
	rest := r.text[r.decoder.InputOffset():]
	return len(r.text) - len(strings.TrimLeft(rest, " \t\r\n,:"))
}

func (r *strictReader) fail(at int, format string, args ...any) {
	r.err = cmp.Or(r.err, newJSONError(r.text, at, format, args...))
}

// surrogates finds pairs of surrogate escapes, or half of one (4 bytes of it).
var surrogates = regexp.MustCompile(`(?i)\\ud[89ab]..\\ud[c-f]|\\ud[89a-f]`)

func (r *strictReader) value(depth int) *node {
	n := &node{start: r.next()}
	n.kind = r.text[n.start]
	if r.values++; r.values > maxJSONValues {
		r.fail(n.start, "has more than %d values", maxJSONValues)
	}
	token, err := r.decoder.Token()
	switch token := token.(type) {
	case json.Delim:
		r.members(n, depth)
	case json.Number:
		n.kind, n.str = '0', token.String()
	case string:
		n.str = token
	}
	if err != nil {
		r.fail(n.start, "%v", err) // fail safe: it was valid
	}
	n.raw = r.text[n.start:r.decoder.InputOffset()]
	if n.kind == '"' && strings.Contains(n.raw, `\u`) {
		found := surrogates.FindAllString(strings.ReplaceAll(n.raw, `\\`, "  "), -1)
		n.surrogate = slices.ContainsFunc(found, func(s string) bool { return len(s) == 4 })
	}
	return n
}

func (r *strictReader) members(n *node, depth int) {
	if depth > maxJSONDepth {
		r.fail(n.start, "is nested deeper than %d", maxJSONDepth)
	}
	seen := map[string]bool{}
	for r.err == nil && r.decoder.More() {
		at := r.next()
		n.keyAt = append(n.keyAt, at)
		if n.kind == '{' {
			token, _ := r.decoder.Token()
			key, _ := token.(string)
			if seen[key] {
				r.fail(at, "has the key %q twice", key)
			}
			seen[key] = true
			n.keys = append(n.keys, key)
		}
		n.items = append(n.items, r.value(depth+1))
	}
	r.decoder.Token() // the closing bracket
}

// editList adds a value to the array section.name, or removes it wherever it stands there, and leaves every other byte alone.
// If there is nothing to do, the data come back as they were.
func editList(data []byte, key string, value any, remove bool) ([]byte, error) {
	root, err := parseStrict(data)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	encoder.Encode(value) // a string or a rule, which always marshal
	text := strings.TrimSpace(b.String())
	want := (&node{raw: text}).plain()
	section, name, _ := strings.Cut(key, ".")
	n, list := root.get(section), (*node)(nil)
	if n != nil {
		list = n.get(name)
	}
	switch {
	case root.kind != '{' || n != nil && n.kind != '{' || list != nil && list.kind != '[':
		return nil, fmt.Errorf("%s is not an array", key)
	case n == nil:
		n, text = root, fmt.Sprintf("%q: { %q: [%s] }", section, name, text)
	case list == nil:
		text = fmt.Sprintf("%q: [%s]", name, text)
	default:
		n = list
	}
	at := slices.IndexFunc(n.items, func(v *node) bool { return reflect.DeepEqual(v.plain(), want) })
	switch there := n == list && at >= 0; {
	case remove && there:
		return editList(cutItem(data, n, at), key, value, true)
	case !remove && !there:
		return appendItem(data, n, text), nil
	}
	return data, nil
}

// appendItem adds text to an array or object, set apart as the others are.
func appendItem(data []byte, n *node, text string) []byte {
	at, count := n.start+1, len(n.items)
	switch {
	case count > 1:
		text = string(data[n.items[count-2].end():n.keyAt[count-1]]) + text
	case count == 1:
		text = "," + cmp.Or(string(data[at:n.keyAt[0]]), " ") + text
	}
	if count > 0 {
		at = n.items[count-1].end()
	}
	return slices.Concat(data[:at], []byte(text), data[at:])
}

// cutItem removes one element with the comma that set it apart.
func cutItem(data []byte, n *node, i int) []byte {
	from, to := n.items[i].start, n.items[i].end()
	if i > 0 {
		from = n.items[i-1].end()
	} else if len(n.items) > 1 {
		to = n.items[1].start
	}
	return slices.Concat(data[:from], data[to:])
}

// ---- settings

// defaultSettings is what setup writes, the defaults (but that without exec.allow nothing is allowed), and the schema: what it
// does not have is unknown.
const defaultSettings = `{
  "_comment": "What commands may run, and within which limits. The next request follows a change; aexec config shows what needs a restart.",
  "exec": {
    "allow": ["aexec --version"],
    "deny": [],
    "tests": { "allowed": [], "refused": [] },
    "cwd": "", "user": "",
    "env": { "keep": [], "set": {} },
    "limits": { "cpuSeconds": 0, "memoryBytes": 0, "fileBytes": 0, "openFiles": 0, "processes": 0 },
    "noNewPrivileges": true
  },
  "ip": { "allow": "*", "deny": [] },
  "timeoutMs": 120000, "killGraceMs": 1000,
  "maxOutputBytes": 1048576, "maxStreamBytes": 1048576, "maxConcurrentExec": 4,
  "maxRequestBodyBytes": 1048576, "rateLimit": { "windowMs": 60000, "max": 0 },
  "audit": { "enabled": true, "file": "" },
  "plugins": { "mode": "auto", "enabled": [], "disabled": [] }
}
`

// restartOnly are the settings that do not reload.
var restartOnly = []string{"maxRequestBodyBytes", "rateLimit.windowMs", "rateLimit.max", "plugins.mode", "plugins.enabled"}

// rlimits are exec.limits; 0 means no limit.
type rlimits struct {
	CPUSeconds, MemoryBytes, FileBytes, OpenFiles, Processes uint64
}

// settings is settings.json, checked, with the defaults filled in.
type settings struct {
	Exec struct {
		Allow, Deny, TestsAllowed, TestsRefused []ruleSpec
		Cwd, User                               string
		EnvKeep                                 []string
		EnvSet                                  map[string]string
		Limits                                  rlimits
		NoNewPrivileges                         bool
	}
	IPAllow, IPDeny                                     []netip.Prefix // "*" is 0.0.0.0/0 and ::/0
	Timeout, KillGrace, RateWindow                      time.Duration
	MaxOutputBytes, MaxStreamBytes, MaxRequestBodyBytes int64
	MaxConcurrentExec, RateMax                          int // RateMax 0: no limit
	AuditEnabled                                        bool
	AuditFile                                           string // absolute: audit.jsonl in the directory, unless the file says otherwise
	PluginsMode                                         string // "auto" or "explicit"
	PluginsEnabled, PluginsDisabled                     []string

	source *settingsReader
}

// parseSettings reads every value; the numbers beside a key are its range, chosen so that nothing overflows.
func parseSettings(p paths, data []byte) (*settings, error) {
	r, err := readSettingNodes(p.settings, defaultSettings, data)
	if err != nil {
		return nil, err
	}
	if !r.inFile["exec.allow"] {
		r.nodes["exec.allow"] = &node{kind: '[', raw: "[]"}
	}
	ms := func(key string) time.Duration { return time.Duration(r.number(key, 1, dayMs)) * time.Millisecond }
	s := &settings{
		IPAllow: r.prefixes("ip.allow"), IPDeny: r.prefixes("ip.deny"),
		Timeout: ms("timeoutMs"), KillGrace: ms("killGraceMs"), RateWindow: ms("rateLimit.windowMs"), RateMax: int(r.number("rateLimit.max", 0, 1<<30)),
		MaxOutputBytes: r.number("maxOutputBytes", 1, 1<<30), MaxStreamBytes: r.number("maxStreamBytes", 1, 1<<50),
		MaxRequestBodyBytes: r.number("maxRequestBodyBytes", 1, 1<<26), MaxConcurrentExec: int(r.number("maxConcurrentExec", 1, 1<<12)),
		AuditEnabled: r.nodes["audit.enabled"].kind == 't', AuditFile: cmp.Or(r.string("audit.file", absolutePath), p.audit),
		PluginsMode: r.string("plugins.mode", pluginMode), PluginsEnabled: r.strings("plugins.enabled", r.nodes["plugins.enabled"], pluginNameForm),
		PluginsDisabled: r.strings("plugins.disabled", r.nodes["plugins.disabled"], pluginNameForm), source: r,
	}
	e := &s.Exec
	e.Allow, e.Deny = r.rules("exec.allow"), r.rules("exec.deny")
	e.TestsAllowed, e.TestsRefused = r.rules("exec.tests.allowed"), r.rules("exec.tests.refused")
	e.Cwd, e.User, e.NoNewPrivileges = r.string("exec.cwd", absolutePath), r.string("exec.user", anyText), r.nodes["exec.noNewPrivileges"].kind == 't'
	e.EnvKeep, e.EnvSet = r.strings("exec.env.keep", r.nodes["exec.env.keep"], variablePattern), r.variables("exec.env.set")
	limit := func(name string, most int64) uint64 { return uint64(r.number("exec.limits."+name, 0, most)) }
	e.Limits = rlimits{limit("cpuSeconds", 1<<31), limit("memoryBytes", 1<<50), limit("fileBytes", 1<<50),
		limit("openFiles", 1<<30), limit("processes", 1<<30)}
	return s, r.err
}

// compileSettings compiles the rules with those of the plugins that are not disabled, and holds the policy to exec.tests.
func compileSettings(set *settings, plugins []ruleSet) (*policy, error) {
	r, off := set.source, func(plugin ruleSet) bool { return set.disabled(strings.TrimPrefix(plugin.Source, "plugin:")) }
	own := ruleSet{Source: "settings.json", Allow: set.Exec.Allow, Deny: set.Exec.Deny}
	compiled, err := compilePolicy(append([]ruleSet{own}, slices.DeleteFunc(slices.Clone(plugins), off)...))
	if bad, ok := errors.AsType[*ruleError](err); ok && bad.Source == own.Source {
		key := "exec." + bad.List
		return nil, r.fail(r.nodes[key].items[bad.Index].start, key, "rule %q: %v", bad.Rule, bad.Err)
	} else if err != nil {
		return nil, err
	}
	r.tryTests(compiled, "exec.tests.allowed", set.Exec.TestsAllowed, true)
	r.tryTests(compiled, "exec.tests.refused", set.Exec.TestsRefused, false)
	return compiled, r.err
}

// tryTests holds the policy to commands of exec.tests, where a string is split on single spaces.
func (r *settingsReader) tryTests(p *policy, key string, commands []ruleSpec, allowed bool) {
	for i, c := range commands {
		if c.Argv == nil {
			c.Argv = strings.Split(c.Text, " ")
		}
		why := "no rule allows it"
		_, d := p.decide(c.Argv)
		if d.Rule != "" {
			why = fmt.Sprintf("the %s rule %q of %s decides it", d.List, d.Rule, d.Source)
		}
		if d.Allowed != allowed {
			r.fail(r.nodes[key].items[i].start, key, "%q is decided otherwise: %s", c.Argv, why)
		}
	}
}

// disabled says whether a plugin is off.
func (s *settings) disabled(plugin string) bool { return slices.Contains(s.PluginsDisabled, plugin) }

// ipAllowed decides a peer's address: unmapped, zone dropped, deny first, an empty allow admits none.
func (s *settings) ipAllowed(peer netip.Addr) bool {
	peer = peer.Unmap().WithZone("")
	within := func(p netip.Prefix) bool { return p.Contains(peer) }
	return !slices.ContainsFunc(s.IPDeny, within) && slices.ContainsFunc(s.IPAllow, within)
}

// settingInfo is one row of `aexec config`.
type settingInfo struct {
	Key     string `json:"key"`
	Value   any    `json:"value"`
	Reloads bool   `json:"reloads"` // without restart
}

func (s *settings) table() (rows []settingInfo) {
	for _, key := range slices.Sorted(maps.Keys(s.source.nodes)) {
		rows = append(rows, settingInfo{key, s.source.nodes[key].plain(), !slices.Contains(restartOnly, key)})
	}
	return rows
}

// settingsReader turns the nodes of a settings file into settings. The first error stays.
type settingsReader struct {
	file, data string
	nodes      map[string]*node // by dotted key: the file's value of each, else the default
	inFile     map[string]bool
	err        error
}

func (r *settingsReader) fail(at int, key, format string, args ...any) error {
	if r.err == nil {
		r.err = jsonErrorIn(r.file, newJSONError(r.data, at, "%s: %s", key, fmt.Sprintf(format, args...)))
	}
	return r.err
}

// readSettingNodes reads a settings file, a plugin's too, that may have what the defaults have.
func readSettingNodes(file, defaults string, data []byte) (*settingsReader, error) {
	r := &settingsReader{file: file, data: string(data), nodes: map[string]*node{}, inFile: map[string]bool{}}
	known, _ := parseStrict([]byte(defaults)) // a constant of ours
	r.walk("", known, known)
	clear(r.inFile)
	root, err := parseStrict(data)
	if err != nil {
		return nil, jsonErrorIn(file, err)
	}
	if root.kind != '{' {
		return nil, r.fail(root.start, "settings", "is %s and must be an object", root.shown())
	}
	r.walk("", root, known)
	return r, r.err
}

// walk takes over the members of n, and refuses those that the defaults do not know or that are of another type there.
func (r *settingsReader) walk(prefix string, n, known *node) {
	for i, key := range n.keys {
		name, v, def := prefix+key, n.items[i], known.get(key)
		like := slices.IndexFunc(known.keys, func(k string) bool { return strings.EqualFold(k, key) })
		switch {
		case strings.HasPrefix(key, "_"): // a comment
		case def == nil && like >= 0:
			r.fail(n.keyAt[i], strconv.Quote(name), "is not a setting: did you mean %q", known.keys[like])
		case def == nil:
			r.fail(n.keyAt[i], strconv.Quote(name), "is not a setting: remove it, or let it begin with _ as a comment")
		case v.what() != def.what() && !(prefix == "ip." && (v.kind == '"' || v.kind == '[')):
			r.fail(v.start, name, "is %s and must be %s", v.shown(), def.what())
		case len(def.keys) > 0: // an object of ours; one without keys there takes any, as exec.env.set
			r.walk(name+".", v, def)
		default:
			r.nodes[name], r.inFile[name] = v, true
		}
	}
}

// form is what a string must look like, and how to say so.
type form struct {
	ok   func(string) bool
	want string
}

var (
	anyText         = form{regexp.MustCompile(`^[^\x00]*$`).MatchString, "a string (without NUL and lone surrogates)"}
	absolutePath    = form{regexp.MustCompile(`^(/[^\x00]*)?$`).MatchString, "an absolute path, or empty"}
	pluginMode      = form{regexp.MustCompile(`^(auto|explicit)$`).MatchString, `"auto" or "explicit"`}
	pluginNameForm  = form{regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`).MatchString, "the name of a plugin: a-z, 0-9 and -"}
	variableName    = variableForm(`^[^*=\x00]+$`, "the name of a variable")
	variablePattern = variableForm(`^[^*=\x00]*[^=\x00]$`, "the name of a variable (a * may end it)")
)

// secretVariable names what no command ever gets.
func secretVariable(name string) bool {
	return name == "API_KEY" || strings.HasPrefix(name, "AGENT_EXEC_")
}

func variableForm(pattern, want string) form {
	re := regexp.MustCompile(pattern)
	return form{func(s string) bool { return re.MatchString(s) && !secretVariable(s) }, want + " other than API_KEY and AGENT_EXEC_..."}
}

// text reads the string v, which is the setting or one element of it.
func (r *settingsReader) text(key string, v *node, f form) string {
	if v.kind != '"' || v.surrogate || !f.ok(v.str) {
		r.fail(v.start, key, "is %s and must be %s", v.shown(), f.want)
	}
	return v.str
}

func (r *settingsReader) string(key string, f form) string { return r.text(key, r.nodes[key], f) }

func (r *settingsReader) strings(key string, n *node, f form) (list []string) {
	for _, v := range n.items {
		list = append(list, r.text(key, v, f))
	}
	return list
}

func (r *settingsReader) rules(key string) (list []ruleSpec) {
	for _, v := range r.nodes[key].items {
		rule := ruleSpec{}
		if v.kind == '[' {
			rule.Argv = append([]string{}, r.strings(key, v, anyText)...) // not nil even if empty: nil would make it a string rule
		} else {
			rule.Text = r.text(key, v, anyText)
		}
		list = append(list, rule)
	}
	return list
}

func (r *settingsReader) variables(key string) map[string]string {
	set, n := map[string]string{}, r.nodes[key]
	for i, name := range n.keys {
		if !strings.HasPrefix(name, "_") {
			set[r.text(key, &node{kind: '"', start: n.keyAt[i], str: name}, variableName)] = r.text(key, n.items[i], anyText)
		}
	}
	return set
}

func (r *settingsReader) number(key string, least, most int64) int64 {
	v := r.nodes[key]
	i, err := strconv.ParseInt(v.str, 10, 64)
	if err != nil || i < least || i > most {
		r.fail(v.start, key, "is %s and must be a whole number from %d to %d", v.shown(), least, most)
	} else if i > 0 && strings.HasPrefix(key, "exec.limits.") && runtime.GOOS != "linux" {
		r.fail(v.start, key, "needs Linux: set it to 0")
	}
	return i
}

// prefixes reads an address, a network or *, or an array of them. A zone is refused; IPv4 within IPv6 becomes IPv4, as peers do.
func (r *settingsReader) prefixes(key string) (list []netip.Prefix) {
	n := r.nodes[key]
	if n.kind == '"' {
		n = &node{items: []*node{n}}
	}
	for _, v := range n.items {
		text := r.text(key, v, anyText)
		if text == "*" {
			list, text = append(list, netip.PrefixFrom(netip.IPv4Unspecified(), 0)), "::/0"
		}
		if addr, err := netip.ParseAddr(text); err == nil {
			text = fmt.Sprintf("%s/%d", addr, addr.BitLen())
		}
		prefix, err := netip.ParsePrefix(text)
		if prefix.Addr().Is4In6() {
			prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
		}
		if err != nil || !prefix.IsValid() {
			r.fail(v.start, key, "is %s and must be addresses, networks like 10.0.0.0/8, or *", v.shown())
		}
		list = append(list, prefix.Masked())
	}
	return list
}

// nodeStrings gives an array of strings, nil if it is something else or empty.
func nodeStrings(n *node) (texts []string) {
	for _, item := range n.items {
		if n.kind != '[' || item.kind != '"' || item.surrogate {
			return nil
		}
		texts = append(texts, item.str)
	}
	return texts
}
