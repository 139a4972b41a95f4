// This file is the strict JSON reader, for bodies and files both, what settings may be, and edits that leave the rest as it was.
// It may look at bytes and make others of them.
// It must not do I/O, keep state, or accept what encoding/json would not: it only ever refuses more.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const maxJSONCommas = 1 << 19        // as many as 1 MiB of values can have; each value takes about 150 bytes of memory
const maxSetting = 1_000_000_000_000 // of any number; a time.Duration holds as many milliseconds

// nodeKinds names the kinds of a node for people.
var nodeKinds = map[byte]string{'{': "an object", '[': "an array", '"': "a string", '0': "a number", 't': "true or false"}

// node is one JSON value of the strict reader, with its place in the text.
type node struct {
	kind  byte    // a key of nodeKinds, 'n' for null, or 'u' for a string with half a surrogate pair, which is not Unicode
	start int     // byte offset into the text
	raw   string  // as written
	str   string  // of a string, what it says
	keys  []*node // of an object, in order, unique
	items []*node // of an object or an array
}

// get is the member of an object, or nil.
func (n *node) get(key string) *node {
	if i := slices.IndexFunc(n.keys, func(k *node) bool { return k.str == key }); i >= 0 {
		return n.items[i]
	}
	return nil
}

func (n *node) end() int { return n.start + len(n.raw) }

func isComment(key string) bool { return strings.HasPrefix(key, "_") }

// texts gives an array of strings, nil if it is something else or empty.
func (n *node) texts() (list []string) {
	for _, item := range n.items {
		if n.kind != '[' || item.kind != '"' {
			return nil
		}
		list = append(list, item.str)
	}
	return list
}

// errorAt says what is wrong, and before it where: LINE:COLUMN, both from 1, columns in bytes.
func errorAt(text string, at int, format string, args ...any) error {
	before := text[:at]
	return fmt.Errorf("%d:%d: %s", 1+strings.Count(before, "\n"), at-strings.LastIndexByte(before, '\n'), fmt.Sprintf(format, args...))
}

// escapes finds pairs of surrogate escapes (12 bytes), half of one (6 bytes), and any other escape (2 bytes of it).
var escapes = regexp.MustCompile(`(?i)\\(?:ud[89ab]..\\ud[c-f]..|ud[89a-f]..|.)`)

// parseStrict reads one JSON value and nothing after it: no duplicate keys, no invalid UTF-8, at most maxJSONCommas commas.
// Its errors begin with LINE:COLUMN.
func parseStrict(data []byte) (root *node, err error) {
	text := string(data)
	if syntax, bad := errors.AsType[*json.SyntaxError](json.Unmarshal(data, new(json.RawMessage))); bad {
		return nil, errorAt(text, max(int(syntax.Offset)-1, 0), "%v", syntax)
	}
	if strings.Count(text, ",") > maxJSONCommas {
		return nil, errorAt(text, 0, "has more than %d commas", maxJSONCommas)
	}
	d := json.NewDecoder(strings.NewReader(text)) // which meets no error from here on
	d.UseNumber()
	var value func() *node
	value = func() *node {
		rest := strings.TrimLeft(text[d.InputOffset():], " \t\r\n,:") // nothing else stands before a value or key
		n, seen := &node{kind: rest[0], start: len(text) - len(rest)}, map[string]bool{}
		token, _ := d.Token()
		n.str, _ = token.(string)
		switch token.(type) {
		case json.Delim:
			for d.More() {
				item := value()
				if n.kind == '{' {
					if seen[item.str] && err == nil {
						err = errorAt(text, item.start, "has the key %q twice", item.str)
					}
					seen[item.str] = true
					n.keys, item = append(n.keys, item), value()
				}
				n.items = append(n.items, item)
			}
			d.Token() // the bracket
		case json.Number:
			n.kind = '0'
		case bool:
			n.kind = 't'
		}
		n.raw = text[n.start:d.InputOffset()]
		if n.kind == '"' && err == nil && !utf8.ValidString(n.raw) { // outside of strings it is a syntax error
			err = errorAt(text, n.start, "is not UTF-8")
		}
		if n.kind == '"' && slices.ContainsFunc(escapes.FindAllString(n.raw, -1), func(s string) bool { return len(s) == 6 }) {
			n.kind = 'u'
		}
		return n
	}
	root = value()
	return root, err
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
		at = slices.IndexFunc(n.items, func(v *node) bool { return string(marshal(ruleSpec{v.str, v.texts()})) == member })
	}
	last := len(n.items) - 1
	if remove && at >= 0 { // with the comma that set it apart
		from, to := n.items[at].start, n.items[at].end()
		if at < last {
			to = n.items[at+1].start
		} else if at > 0 {
			from = n.items[at-1].end()
		}
		return editList(text[:from]+text[to:], key, value, true)
	} else if !remove && at < 0 { // set apart as the first is
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
var defaultSettings = skillText("_settings.json")

// restartOnly are the settings that do not reload.
var restartOnly = []string{"maxRequestBodyBytes", "rateLimit.windowMs", "rateLimit.max", "plugins.mode", "plugins.enabled"}

// rlimits are exec.limits; 0 means no limit.
type rlimits struct {
	CPUSeconds, MemoryBytes, FileBytes, OpenFiles, Processes uint64
}

// settings is settings.json, checked, with the defaults filled in. The fields have the names that fieldName makes of the keys.
type settings struct {
	Allow, Deny, TestsAllowed, TestsRefused             []ruleSpec
	Cwd, User                                           string
	EnvKeep                                             []string
	EnvSet                                              map[string]string
	NoNewPrivileges                                     bool
	IPAllow, IPDeny                                     networks
	Timeout, KillGrace, RateLimitWindow                 time.Duration
	MaxOutputBytes, MaxStreamBytes, MaxRequestBodyBytes int64
	MaxConcurrentExec, RateLimitMax                     int // RateLimitMax 0: no limit
	AuditEnabled                                        bool
	AuditFile                                           string // absolute: audit.jsonl in the directory, unless the file says otherwise
	PluginsMode                                         string // "auto" or "explicit"
	PluginsEnabled, PluginsDisabled                     []string

	rlimits
	source *settingsFile
}

// fieldName makes Cwd of exec.cwd and RateLimitWindow of rateLimit.windowMs; encoding/json does not look at case.
var fieldName = strings.NewReplacer("exec.limits.", "", "exec.", "", ".", "", "Ms", "").Replace

func parseSettings(p paths, data []byte) (*settings, error) {
	s := &settings{EnvSet: map[string]string{}}
	r := readSettings(p.settings, defaultSettings, data, s)
	set := r.nodes["exec.env.set"]
	for i, name := range set.keys {
		if !isComment(name.str) {
			r.hold("exec.env.set", name, variable)
			r.hold("exec.env.set", set.items[i], anyText)
			s.EnvSet[name.str] = set.items[i].str
		}
	}
	for _, d := range []*time.Duration{&s.Timeout, &s.KillGrace, &s.RateLimitWindow} {
		*d *= time.Millisecond
	}
	if r.err != nil {
		return nil, r.err
	}
	s.source, s.AuditFile = r, cmp.Or(s.AuditFile, p.audit)
	return s, nil
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

// form is what a text must look like, and how to say so.
type form struct {
	ok   func(string) bool
	want string
}

func newForm(pattern, want string) *form {
	return &form{regexp.MustCompile(`^(?:` + pattern + `)$`).MatchString, want}
}

var (
	anyText      = newForm(`[^\x00]*`, "a string (without NUL and lone surrogates)")
	absolutePath = newForm(`(/[^\x00]*)?`, "an absolute path, or empty")
	variable     = newForm(`[^*=\x00]*[^=\x00]`, "the name of a variable (a * may end it)")
	network      = &form{func(s string) bool { return parseNetwork(s) != nil }, "an address, a network like 10.0.0.0/8, or *"}

	hookPath = newForm(`([^/.\pC][^/\pC]*(/[^/.\pC][^/\pC]*)*)?`, "a path inside the plugin, such as hooks/before")

	// forms are those of the texts that are not just any, of a plugin's settings too.
	forms = map[string]*form{
		"exec.cwd": absolutePath, "audit.file": absolutePath, "plugins.mode": newForm("auto|explicit", `"auto" or "explicit"`),
		"exec.env.keep": variable, "ip.allow": network, "ip.deny": network, "plugin.before": hookPath, "plugin.after": hookPath,
		"plugin.type":    newForm("skill|exec|trusted", "skill, exec or trusted (system is reserved)"),
		"plugin.command": newForm(`([A-Za-z0-9_][A-Za-z0-9_.+-]*)?`, "one word of letters, digits and _.+-"),
		"plugin.invoke":  newForm("exec|run", "exec or run"),
	}
)

// settingsFile is a settings file that is read. Its first error stays; it begins with FILE:LINE:COLUMN and the key.
type settingsFile struct {
	file, text string
	fields     any              // a struct: a field for each key but those whose value takes any key
	nodes      map[string]*node // by dotted key: the file's value of each, else the default
	err        error
}

func (r *settingsFile) fail(n *node, key, format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%s:%w", r.file, errorAt(r.text, n.start, "%s: %s", key, fmt.Sprintf(format, args...)))
	}
}

// readSettings reads a settings file, a plugin's too, that may have what the defaults have, into fields that fieldName names.
func readSettings(file, defaults string, data []byte, fields any) *settingsFile {
	r := &settingsFile{file: file, text: string(data), fields: fields, nodes: map[string]*node{}}
	known, _ := parseStrict([]byte(defaults)) // ours
	r.walk("", known, known)
	for _, n := range r.nodes {
		n.start = 0 // what is wrong with a value that the file does not have is wrong at its start
	}
	root, err := parseStrict(data)
	if err != nil {
		r.err = fmt.Errorf("%s:%w", file, err)
	} else if root.kind != '{' {
		r.fail(root, "settings", "must be an object")
	} else {
		r.walk("", root, known)
	}
	return r
}

// walk takes over the members of n, and refuses those that the defaults do not know, or that are something else there.
func (r *settingsFile) walk(prefix string, n, known *node) {
	for i, key := range n.keys {
		name, v, def := prefix+key.str, n.items[i], known.get(key.str)
		switch {
		case isComment(key.str):
		case def == nil:
			r.fail(key, strconv.Quote(name), "is not a setting: look at its case, or let it begin with _ as a comment")
		case v.kind != def.kind && prefix != "ip.":
			r.fail(v, name, "must be %s", nodeKinds[def.kind])
		case len(def.keys) > 0:
			r.walk(name+".", v, def)
		default:
			if r.nodes[name] = v; def.kind != '{' { // else it takes any key, as exec.env.set
				r.take(name, v, def)
			}
		}
	}
}

// take holds a number to its range, in which 0 is only if it is the default (no limit), or a text to its form, and sets the field.
func (r *settingsFile) take(key string, v, def *node) {
	switch i, err := strconv.ParseUint(v.raw, 10, 64); {
	case def.kind == '"' || def.kind == '[':
		r.hold(key, v, cmp.Or(forms[key], anyText))
	case def.kind == '0' && (err != nil || i > maxSetting || i == 0 && def.raw != "0"):
		r.fail(v, key, "must be a whole number from %s to %d", min(def.raw, "1"), maxSetting)
	}
	if json.Unmarshal(fmt.Appendf(nil, "{%q:%s}", fieldName(key), v.raw), r.fields) != nil { // all else has been checked
		r.fail(v, key, "has a list where a string must be")
	}
}

// hold wants every text in n to have the form; how deep lists may lie in one another, the type of the field says.
func (r *settingsFile) hold(key string, n *node, f *form) {
	if n.kind != '[' && (n.kind != '"' || !f.ok(n.str)) {
		r.fail(n, key, "must be %s", f.want)
	}
	for _, item := range n.items {
		r.hold(key, item, f)
	}
}

// UnmarshalJSON reads a rule as it is written: a string or an array of strings.
func (r *ruleSpec) UnmarshalJSON(data []byte) error {
	if data[0] == '[' {
		return json.Unmarshal(data, &r.Argv)
	}
	return json.Unmarshal(data, &r.Text)
}

// networks are prefixes; "*" is 0.0.0.0/0 and ::/0.
type networks []netip.Prefix

// UnmarshalJSON reads a text or a list of them, which have been checked: it may be written as a rule is.
func (n *networks) UnmarshalJSON(data []byte) error {
	var list ruleSpec
	err := list.UnmarshalJSON(data)
	*n = nil
	for _, text := range append(list.Argv, list.Text) { // a list has no text of its own
		*n = append(*n, parseNetwork(text)...)
	}
	return err
}

// parseNetwork gives nothing for what is no address, network or *. A zone is refused; IPv4 within IPv6 becomes IPv4, as peers do.
func parseNetwork(text string) []netip.Prefix {
	if text == "*" {
		return append(parseNetwork("0.0.0.0/0"), parseNetwork("::/0")...)
	}
	if addr, err := netip.ParseAddr(text); err == nil {
		text += fmt.Sprint("/", addr.BitLen())
	}
	p, err := netip.ParsePrefix(text)
	if p.Addr().Is4In6() {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	if err != nil || !p.IsValid() {
		return nil
	}
	return []netip.Prefix{p.Masked()}
}
