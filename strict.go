// This file is the strict JSON reader, for bodies and files both, the typed values of settings, and edits that leave the rest as it was.
// It may look at bytes and make others of them.
// It must not do I/O, keep state, or accept what encoding/json would not: it only ever refuses more.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxJSONCommas = 1 << 19 // as many as 1 MiB of values can have; each value takes about 150 bytes of memory
	dayMs         = 24 * 60 * 60 * 1000
)

// nodeKinds names the kinds of a node for people.
var nodeKinds = map[byte]string{
	'{': "an object", '[': "an array", '"': "a string", '0': "a number", 't': "true or false", 'f': "true or false",
}

// node is one JSON value of the strict reader, with its place in the text.
type node struct {
	kind  byte     // a key of nodeKinds, 'n' for null, or 'u' for a string with half a surrogate pair, which is not Unicode
	start int      // byte offset into the text; 0 for a default
	raw   string   // as written
	str   string   // the string, or the number's literal
	keys  []string // of an object, in order, unique
	keyAt []int    // byte offset of each key
	items []*node  // of an object or an array
}

// get is the member of an object, or nil.
func (n *node) get(key string) *node {
	if i := slices.Index(n.keys, key); i >= 0 {
		return n.items[i]
	}
	return nil
}

func (n *node) end() int { return n.start + len(n.raw) }

// plain is the value as encoding/json has it.
func (n *node) plain() (value any) {
	json.Unmarshal([]byte(n.raw), &value) // it is valid
	return value
}

// errorAt says what is wrong, and before it where: LINE:COLUMN, both from 1, columns in bytes.
func errorAt(text string, at int, format string, args ...any) error {
	before := text[:at]
	return fmt.Errorf("%d:%d: %s", 1+strings.Count(before, "\n"), at-strings.LastIndexByte(before, '\n'), fmt.Sprintf(format, args...))
}

// strictReader walks through text that encoding/json has found valid, and so meets no syntax error: it needs only to know
// where values begin and end. Its first error stays.
type strictReader struct {
	text string
	at   int
	err  error
}

// parseStrict reads one JSON value and nothing after it: no duplicate keys, no invalid UTF-8, at most maxJSONCommas commas.
// Its errors begin with LINE:COLUMN.
func parseStrict(data []byte) (*node, error) {
	r := &strictReader{text: string(data)}
	if !json.Valid(data) {
		syntax, _ := errors.AsType[*json.SyntaxError](json.Unmarshal(data, new(any)))
		return nil, errorAt(r.text, max(int(syntax.Offset)-1, 0), "%v", syntax)
	}
	for at, c := range r.text {
		if c == utf8.RuneError && !strings.HasPrefix(r.text[at:], "\ufffd") {
			return nil, errorAt(r.text, at, "is not UTF-8")
		}
	}
	if strings.Count(r.text, ",") > maxJSONCommas {
		return nil, errorAt(r.text, 0, "has more than %d commas", maxJSONCommas)
	}
	root := r.value()
	return root, r.err
}

// next goes to the next token, which begins with the result. Before it stand only white space, commas and colons.
func (r *strictReader) next() byte {
	for ; ; r.at++ {
		switch c := r.text[r.at]; c {
		case ' ', '\t', '\r', '\n', ',', ':':
		default:
			return c
		}
	}
}

func (r *strictReader) value() *node {
	n := &node{kind: r.next(), start: r.at}
	switch n.kind {
	case '{', '[':
		r.members(n)
	case '"':
		n.kind, n.str = r.string()
	default:
		for r.at < len(r.text) && strings.IndexByte(" \t\r\n,]}", r.text[r.at]) < 0 {
			r.at++
		}
	}
	n.raw = r.text[n.start:r.at]
	if n.kind == '-' || '0' <= n.kind && n.kind <= '9' {
		n.kind, n.str = '0', n.raw
	}
	return n
}

func (r *strictReader) members(n *node) {
	end, seen := n.kind+2, map[string]bool{} // in ASCII the closing bracket stands two after the opening one
	for r.at++; r.next() != end; {
		if n.kind == '{' {
			at := r.at
			_, key := r.string()
			if seen[key] && r.err == nil {
				r.err = errorAt(r.text, at, "has the key %q twice", key)
			}
			seen[key] = true
			n.keys, n.keyAt = append(n.keys, key), append(n.keyAt, at)
		}
		n.items = append(n.items, r.value())
	}
	r.at++
}

// escapes finds pairs of surrogate escapes (12 bytes), half of one (6 bytes), and any other escape (2 bytes of it).
var escapes = regexp.MustCompile(`(?i)\\(?:ud[89ab]..\\ud[c-f]..|ud[89a-f]..|.)`)

// string reads a string, of kind '"' or 'u'.
func (r *strictReader) string() (kind byte, text string) {
	start := r.at
	for r.at++; r.text[r.at] != '"'; r.at++ {
		if r.text[r.at] == '\\' {
			r.at++
		}
	}
	r.at++
	raw := r.text[start:r.at]
	if !strings.Contains(raw, `\`) {
		return '"', raw[1 : len(raw)-1]
	}
	json.Unmarshal([]byte(raw), &text) // it is valid
	if slices.ContainsFunc(escapes.FindAllString(raw, -1), func(s string) bool { return len(s) == 6 }) {
		return 'u', text
	}
	return '"', text
}

// editList adds a value to the list section.name, or removes it wherever it stands there, and leaves every other byte alone.
// The text is that of settings that have loaded. If there is nothing to do, it comes back as it was.
func editList(text, key string, value any, remove bool) string {
	n, _ := parseStrict([]byte(text))
	section, name, _ := strings.Cut(key, ".")
	member, at := string(marshal(value)), -1
	if child := n.get(section); child == nil {
		member = fmt.Sprintf("%q: { %q: [%s] }", section, name, member)
	} else if n = child; n.get(name) == nil {
		member = fmt.Sprintf("%q: [%s]", name, member)
	} else {
		n = n.get(name)
		at = slices.IndexFunc(n.items, func(v *node) bool { return string(marshal(v.plain())) == member })
	}
	last := len(n.items) - 1
	switch {
	case remove && at >= 0: // with the comma that set it apart
		from, to := n.items[at].start, n.items[at].end()
		if at < last {
			to = n.items[at+1].start
		} else if at > 0 {
			from = n.items[at-1].end()
		}
		return editList(text[:from]+text[to:], key, value, true)
	case !remove && at < 0: // set apart as the first is
		end := n.start + 1
		if last >= 0 {
			first := len(text) - len(strings.TrimLeft(text[end:], " \t\r\n"))
			member = "," + cmp.Or(text[end:first], " ") + member
			end = n.items[last].end()
		}
		return text[:end] + member + text[end:]
	}
	return text
}

// ---- settings

// defaultSettings is the defaults, and the schema: what it does not have is unknown. Setup writes it with one rule.
const defaultSettings = `{
  "_comment": "What commands may run, and within which limits. The next request follows a change; aexec config shows what needs a restart.",
  "exec": {
    "allow": [],
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
	ms := func(key string) time.Duration { return time.Duration(r.number(key, 1, dayMs)) * time.Millisecond }
	s := &settings{
		IPAllow: r.prefixes("ip.allow"), IPDeny: r.prefixes("ip.deny"),
		Timeout: ms("timeoutMs"), KillGrace: ms("killGraceMs"),
		RateWindow: ms("rateLimit.windowMs"), RateMax: int(r.number("rateLimit.max", 0, 1<<30)),
		MaxOutputBytes: r.number("maxOutputBytes", 1, 1<<30), MaxStreamBytes: r.number("maxStreamBytes", 1, 1<<50),
		MaxRequestBodyBytes: r.number("maxRequestBodyBytes", 1, 1<<26), MaxConcurrentExec: int(r.number("maxConcurrentExec", 1, 1<<12)),
		AuditEnabled: r.nodes["audit.enabled"].kind == 't', AuditFile: cmp.Or(r.string("audit.file", absolutePath), p.audit),
		PluginsMode: r.string("plugins.mode", pluginMode), PluginsEnabled: r.strings("plugins.enabled", r.nodes["plugins.enabled"], anyText),
		PluginsDisabled: r.strings("plugins.disabled", r.nodes["plugins.disabled"], anyText), source: r,
	}
	e := &s.Exec
	e.Allow, e.Deny = r.rules("exec.allow"), r.rules("exec.deny")
	e.TestsAllowed, e.TestsRefused = r.rules("exec.tests.allowed"), r.rules("exec.tests.refused")
	e.Cwd, e.User = r.string("exec.cwd", absolutePath), r.string("exec.user", anyText)
	e.NoNewPrivileges = r.nodes["exec.noNewPrivileges"].kind == 't'
	e.EnvKeep, e.EnvSet = r.strings("exec.env.keep", r.nodes["exec.env.keep"], variable), r.variables("exec.env.set")
	limit := func(name string, most int64) uint64 { return uint64(r.number("exec.limits."+name, 0, most)) }
	e.Limits = rlimits{limit("cpuSeconds", 1<<31), limit("memoryBytes", 1<<50), limit("fileBytes", 1<<50),
		limit("openFiles", 1<<30), limit("processes", 1<<30)}
	return s, r.err
}

// compileSettings compiles the rules with those of the plugins that are not disabled, and holds the policy to exec.tests,
// where a string is split on single spaces.
func compileSettings(set *settings, plugins []ruleSet) (policy, error) {
	r, off := set.source, func(plugin ruleSet) bool { return set.disabled(strings.TrimPrefix(plugin.Source, pluginSource)) }
	own := ruleSet{Source: "settings.json", Allow: set.Exec.Allow, Deny: set.Exec.Deny}
	compiled, err := compilePolicy(append([]ruleSet{own}, slices.DeleteFunc(slices.Clone(plugins), off)...))
	if bad, ok := errors.AsType[*ruleError](err); ok && bad.Source == own.Source {
		key := "exec." + bad.List
		return nil, r.fail(r.nodes[key].items[bad.Index].start, key, "rule %q: %v", bad.Rule, errors.Unwrap(bad.error))
	} else if err != nil {
		return nil, err
	}
	tests := func(key string, commands []ruleSpec, allowed bool) {
		for i, c := range commands {
			if c.Argv == nil {
				c.Argv = strings.Split(c.Text, " ")
			}
			if _, d := compiled.decide(c.Argv); d.Allowed != allowed {
				r.fail(r.nodes[key].items[i].start, key, "%q is decided otherwise: %s", c.Argv, d.why())
			}
		}
	}
	tests("exec.tests.allowed", set.Exec.TestsAllowed, true)
	tests("exec.tests.refused", set.Exec.TestsRefused, false)
	return compiled, r.err
}

// disabled says whether a plugin is off.
func (s *settings) disabled(plugin string) bool { return slices.Contains(s.PluginsDisabled, plugin) }

// enabled says whether the next start loads a plugin.
func (s *settings) enabled(plugin string) bool {
	return !s.disabled(plugin) && (s.PluginsMode != "explicit" || slices.Contains(s.PluginsEnabled, plugin))
}

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

// settingsReader turns the nodes of a settings file into settings. Its first error stays; it begins with FILE:LINE:COLUMN and the key.
type settingsReader struct {
	file, data string
	nodes      map[string]*node // by dotted key: the file's value of each, else the default
	err        error
}

func (r *settingsReader) fail(at int, key, format string, args ...any) error {
	if r.err == nil {
		r.err = fmt.Errorf("%s:%w", r.file, errorAt(r.data, at, "%s: %s", key, fmt.Sprintf(format, args...)))
	}
	return r.err
}

// readSettingNodes reads a settings file, a plugin's too, that may have what the defaults have.
func readSettingNodes(file, defaults string, data []byte) (*settingsReader, error) {
	r := &settingsReader{file: file, data: string(data), nodes: map[string]*node{}}
	known, _ := parseStrict([]byte(defaults)) // a constant of ours
	r.walk("", known, known)
	for _, n := range r.nodes {
		n.start = 0 // what is wrong with a value that the file does not have is wrong at its start
	}
	root, err := parseStrict(data)
	if err != nil {
		return nil, fmt.Errorf("%s:%w", file, err)
	}
	if root.kind != '{' {
		return nil, r.fail(root.start, "settings", "must be an object")
	}
	r.walk("", root, known)
	return r, r.err
}

// walk takes over the members of n, and refuses those that the defaults do not know or that are of another type there.
func (r *settingsReader) walk(prefix string, n, known *node) {
	for i, key := range n.keys {
		name, v, def := prefix+key, n.items[i], known.get(key)
		switch {
		case strings.HasPrefix(key, "_"): // a comment
		case def == nil:
			r.fail(n.keyAt[i], strconv.Quote(name), "is not a setting: look at its case, or let it begin with _ as a comment")
		case nodeKinds[v.kind] != nodeKinds[def.kind] && !(prefix == "ip." && (v.kind == '"' || v.kind == '[')):
			r.fail(v.start, name, "must be %s", nodeKinds[def.kind])
		case len(def.keys) > 0: // an object of ours; one without keys there takes any, as exec.env.set
			r.walk(name+".", v, def)
		default:
			r.nodes[name] = v
		}
	}
}

// form is what a string must look like, and how to say so.
type form struct {
	ok   func(string) bool
	want string
}

var (
	anyText      = form{regexp.MustCompile(`^[^\x00]*$`).MatchString, "a string (without NUL and lone surrogates)"}
	absolutePath = form{regexp.MustCompile(`^(/[^\x00]*)?$`).MatchString, "an absolute path, or empty"}
	pluginMode   = form{regexp.MustCompile(`^(auto|explicit)$`).MatchString, `"auto" or "explicit"`}
	variable     = form{regexp.MustCompile(`^[^*=\x00]*[^=\x00]$`).MatchString, "the name of a variable (a * may end it)"}
	network      = form{func(s string) bool { return parseNetwork(s) != nil }, "an address, a network like 10.0.0.0/8, or *"}
)

// text reads the string v, which is the setting or one element of it.
func (r *settingsReader) text(key string, v *node, f form) string {
	if v.kind != '"' || !f.ok(v.str) {
		r.fail(v.start, key, "must be %s", f.want)
	}
	return v.str
}

func (r *settingsReader) string(key string, f form) string { return r.text(key, r.nodes[key], f) }

// strings reads an array, or the one string in its place where walk admits that.
func (r *settingsReader) strings(key string, n *node, f form) []string {
	if n.kind == '"' {
		return []string{r.text(key, n, f)}
	}
	list := []string{}
	for _, v := range n.items {
		list = append(list, r.text(key, v, f))
	}
	return list
}

func (r *settingsReader) rules(key string) (list []ruleSpec) {
	for _, v := range r.nodes[key].items {
		if v.kind == '[' {
			list = append(list, ruleSpec{Argv: r.strings(key, v, anyText)})
		} else {
			list = append(list, ruleSpec{Text: r.text(key, v, anyText)})
		}
	}
	return list
}

func (r *settingsReader) variables(key string) map[string]string {
	set, n := map[string]string{}, r.nodes[key]
	for i, name := range n.keys {
		if !strings.HasPrefix(name, "_") {
			set[r.text(key, &node{kind: '"', start: n.keyAt[i], str: name}, variable)] = r.text(key, n.items[i], anyText)
		}
	}
	return set
}

func (r *settingsReader) number(key string, least, most int64) int64 {
	v := r.nodes[key]
	i, err := strconv.ParseInt(v.str, 10, 64)
	if err != nil || i < least || i > most {
		r.fail(v.start, key, "must be a whole number from %d to %d", least, most)
	}
	return i
}

func (r *settingsReader) prefixes(key string) (list []netip.Prefix) {
	for _, text := range r.strings(key, r.nodes[key], network) {
		list = append(list, parseNetwork(text)...)
	}
	return list
}

// parseNetwork gives nothing for what is no address, network or *. A zone is refused; IPv4 within IPv6 becomes IPv4, as peers do.
func parseNetwork(text string) []netip.Prefix {
	if text == "*" {
		return append(parseNetwork("0.0.0.0/0"), parseNetwork("::/0")...)
	}
	p, err := netip.ParsePrefix(text)
	if addr, e := netip.ParseAddr(text); e == nil && addr.Zone() == "" {
		p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	if p.Addr().Is4In6() {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	if err != nil || !p.IsValid() {
		return nil
	}
	return []netip.Prefix{p.Masked()}
}

// nodeStrings gives an array of strings, nil if it is something else or empty.
func nodeStrings(n *node) (texts []string) {
	for _, item := range n.items {
		if n.kind != '[' || item.kind != '"' {
			return nil
		}
		texts = append(texts, item.str)
	}
	return texts
}
