// This file is settings.json: read, checked, compiled into one immutable snapshot, followed as it changes, edited in place.
// It may read and replace settings.json, through config.go's strict modes alone.
// It must not decide, run or serve anything, nor hand out a snapshot that is not whole.
package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	settleTime = 100 * time.Millisecond // longer than a tick of a file system's clock: a younger file may change again unseen
	retryTime  = time.Second            // unusable settings are tried again this often though the file has not changed
	dayMs      = 24 * 60 * 60 * 1000
)

// rlimits are exec.limits; 0 means no limit.
type rlimits struct {
	CPUSeconds, MemoryBytes, FileBytes, OpenFiles, Processes uint64
}

// credential is the user that commands run as.
type credential struct {
	Uid, Gid          uint32
	Groups            []uint32
	Name, Home, Shell string
}

// settings is settings.json, checked, with the defaults filled in.
type settings struct {
	Exec struct {
		Allow, Deny                []ruleSpec
		TestsAllowed, TestsRefused [][]string
		Cwd, User                  string
		EnvKeep                    []string
		EnvSet                     map[string]string
		Limits                     rlimits
		NoNewPrivileges            bool
	}
	IPAllow, IPDeny     []netip.Prefix // "*" is 0.0.0.0/0 and ::/0
	Timeout, KillGrace  time.Duration
	MaxOutputBytes      int64
	MaxStreamBytes      int64
	MaxConcurrentExec   int
	MaxRequestBodyBytes int64
	RateWindow          time.Duration
	RateMax             int // 0: no limit
	AuditEnabled        bool
	AuditFile           string // absolute: audit.jsonl in the directory, unless the file says otherwise
	PluginsMode         string // "auto" or "explicit"
	PluginsEnabled      []string
	PluginsDisabled     []string

	source *settingsReader
}

// restartOnly are the settings that do not reload.
var restartOnly = []string{"maxRequestBodyBytes", "rateLimit.windowMs", "rateLimit.max", "plugins.mode", "plugins.enabled"}

// settingsReader turns the nodes of a settings file into settings. The first error stays.
type settingsReader struct {
	file, data string
	keys       []string         // every setting, dotted, in the order of the defaults
	nodes      map[string]*node // the file's value of each, else the default
	inFile     map[string]bool
	err        error
}

func (r *settingsReader) fail(at int, key, format string, args ...any) error {
	if r.err == nil {
		e := newJSONError(r.data, at, format, args...)
		r.err = fmt.Errorf("%s:%d:%d: %s: %s", r.file, e.Line, e.Col, key, e.Msg)
	}
	return r.err
}

// loadSettings reads settings.json alone; the policy, the user and the working directory are not tried.
func loadSettings(p paths) (*settings, error) {
	data, err := readTrusted(p.settings, false)
	if err != nil {
		return nil, err
	}
	return parseSettings(p, data)
}

func parseSettings(p paths, data []byte) (*settings, error) {
	r, err := readSettingNodes(p.settings, defaultSettings, data)
	if err != nil {
		return nil, err
	}
	if !r.inFile["exec.allow"] {
		r.nodes["exec.allow"] = &node{kind: '['}
	}
	s := r.settings(p)
	return s, r.err
}

// readSettingNodes reads a settings file, a plugin's too, that may have what the defaults have.
func readSettingNodes(file, defaults string, data []byte) (*settingsReader, error) {
	r := &settingsReader{file: file, data: string(data), nodes: map[string]*node{}, inFile: map[string]bool{}}
	known, err := parseStrict([]byte(defaults))
	if err != nil {
		return nil, err
	}
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
			if r.nodes[name] == nil {
				r.keys = append(r.keys, name)
			}
			r.nodes[name], r.inFile[name] = v, true
		}
	}
}

// settings reads every value; the numbers beside a key are its range, chosen so that nothing overflows.
func (r *settingsReader) settings(p paths) *settings {
	s := &settings{source: r}
	s.Exec.Allow, s.Exec.Deny = r.rules("exec.allow"), r.rules("exec.deny")
	s.Exec.TestsAllowed, s.Exec.TestsRefused = r.commands("exec.tests.allowed"), r.commands("exec.tests.refused")
	s.Exec.Cwd, s.Exec.User = r.string("exec.cwd", absolutePath), r.string("exec.user", anyText)
	s.Exec.EnvKeep, s.Exec.EnvSet = r.strings("exec.env.keep", variablePattern), r.variables("exec.env.set")
	s.Exec.Limits = rlimits{
		CPUSeconds: uint64(r.number("exec.limits.cpuSeconds", 0, 1<<31)), MemoryBytes: uint64(r.number("exec.limits.memoryBytes", 0, 1<<50)),
		FileBytes: uint64(r.number("exec.limits.fileBytes", 0, 1<<50)), OpenFiles: uint64(r.number("exec.limits.openFiles", 0, 1<<30)),
		Processes: uint64(r.number("exec.limits.processes", 0, 1<<30)),
	}
	s.Exec.NoNewPrivileges = r.nodes["exec.noNewPrivileges"].kind == 't'
	s.IPAllow, s.IPDeny = r.prefixes("ip.allow"), r.prefixes("ip.deny")
	s.Timeout = time.Duration(r.number("timeoutMs", 1, dayMs)) * time.Millisecond
	s.KillGrace = time.Duration(r.number("killGraceMs", 1, dayMs)) * time.Millisecond
	s.MaxOutputBytes, s.MaxStreamBytes = r.number("maxOutputBytes", 1, 1<<30), r.number("maxStreamBytes", 1, 1<<50)
	s.MaxConcurrentExec = int(r.number("maxConcurrentExec", 1, 1<<12))
	s.MaxRequestBodyBytes = r.number("maxRequestBodyBytes", 1, 1<<26)
	s.RateWindow, s.RateMax = time.Duration(r.number("rateLimit.windowMs", 1, dayMs))*time.Millisecond, int(r.number("rateLimit.max", 0, 1<<30))
	s.AuditEnabled = r.nodes["audit.enabled"].kind == 't'
	s.AuditFile = cmp.Or(r.string("audit.file", absolutePath), p.audit)
	s.PluginsMode = r.string("plugins.mode", pluginMode)
	s.PluginsEnabled, s.PluginsDisabled = r.strings("plugins.enabled", pluginNameForm), r.strings("plugins.disabled", pluginNameForm)
	return s
}

// form is what a string must look like, and how to say so.
type form struct {
	re    *regexp.Regexp
	want  string
	never func(string) bool
}

var (
	anyText         = form{re: regexp.MustCompile(`^[^\x00]*$`), want: "a string (without NUL and lone surrogates)"}
	absolutePath    = form{re: regexp.MustCompile(`^(/[^\x00]*)?$`), want: "an absolute path, or empty"}
	pluginMode      = form{re: regexp.MustCompile(`^(auto|explicit)$`), want: `"auto" or "explicit"`}
	pluginNameForm  = form{re: regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`), want: "the name of a plugin: a-z, 0-9 and -"}
	variableName    = form{regexp.MustCompile(`^[^*=\x00]+$`), "the name of a variable other than API_KEY and AGENT_EXEC_...", secretVariable}
	variablePattern = form{regexp.MustCompile(`^[^*=\x00]*[^=\x00]$`), "the name of a variable (a * may end it) other than API_KEY and AGENT_EXEC_...", secretVariable}
)

// text reads the string v, which is the setting or one element of it.
func (r *settingsReader) text(key string, v *node, f form) string {
	if v.kind != '"' || v.surrogate || !f.re.MatchString(v.str) || f.never != nil && f.never(v.str) {
		r.fail(v.start, key, "is %s and must be %s", v.shown(), f.want)
	}
	return v.str
}

func (r *settingsReader) string(key string, f form) string { return r.text(key, r.nodes[key], f) }

// collect reads each element of an array.
func collect[T any](n *node, read func(*node) T) []T {
	var list []T
	for _, v := range n.items {
		list = append(list, read(v))
	}
	return list
}

func (r *settingsReader) strings(key string, f form) []string {
	return collect(r.nodes[key], func(v *node) string { return r.text(key, v, f) })
}

func (r *settingsReader) rules(key string) []ruleSpec {
	word := func(v *node) string { return r.text(key, v, anyText) }
	return collect(r.nodes[key], func(v *node) ruleSpec {
		if v.kind != '[' {
			return ruleSpec{Text: word(v)}
		}
		return ruleSpec{Argv: append([]string{}, collect(v, word)...)} // not nil even if empty: nil would make it a string rule
	})
}

// commands reads exec.tests, where a string is split on single spaces.
func (r *settingsReader) commands(key string) (list [][]string) {
	for _, rule := range r.rules(key) {
		if rule.Argv == nil {
			rule.Argv = strings.Split(rule.Text, " ")
		}
		list = append(list, rule.Argv)
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
			list = append(list, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
			continue
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

// settingInfo is one row of `aexec config`.
type settingInfo struct {
	Key     string `json:"key"`
	Value   any    `json:"value"`
	Default bool   `json:"default"` // not set in the file
	Reloads bool   `json:"reloads"` // without restart
}

func (s *settings) table() []settingInfo {
	var rows []settingInfo
	for _, key := range s.source.keys {
		rows = append(rows, settingInfo{key, s.source.nodes[key].plain(), !s.source.inFile[key], !slices.Contains(restartOnly, key)})
	}
	return rows
}

// restartValues reads from disk everything of .env and settings.json that only a restart brings into force, as printable
// values by name ("API_KEY" is the key's id). The server publishes them at start; comparing tells what needs a restart.
func restartValues(p paths) (map[string]string, error) {
	values, err := readEnvFile(p)
	if err != nil {
		return nil, err
	}
	if text := values["API_KEY"]; text != "" {
		key, err := newAPIKey(text)
		if err != nil {
			return nil, err
		}
		values["API_KEY"] = key.id()
	}
	s, err := loadSettings(p)
	if err != nil {
		return nil, err
	}
	for _, key := range restartOnly {
		values[key] = fmt.Sprint(s.source.nodes[key].plain())
	}
	return values, nil
}

// snapshot is one consistent state of everything that reloads; a request is decided and run under one snapshot.
type snapshot struct {
	settings
	policy   *policy
	env      []string    // the built environment of commands, key-free, sorted
	pathDirs []string    // the server's own PATH, absolute directories only, where commands are found
	cwd      string      // absolute
	cred     *credential // nil: the server's own user
}

func newSnapshot(p paths, data []byte, plugins []ruleSet) (*snapshot, error) {
	set, err := parseSettings(p, data)
	if err != nil {
		return nil, err
	}
	s, r := &snapshot{settings: *set, cwd: set.Exec.Cwd}, set.source
	if s.cwd == "" {
		if s.cwd, err = os.Getwd(); err != nil {
			return nil, fmt.Errorf("the working directory is gone (%w): set exec.cwd or start elsewhere", err)
		}
	} else if info, err := os.Stat(s.cwd); err != nil || !info.IsDir() {
		return nil, r.fail(r.nodes["exec.cwd"].start, "exec.cwd", "%q is not a directory that this user can reach", s.cwd)
	}
	if name := set.Exec.User; name != "" {
		if s.cred, err = lookupCredential(name); err != nil {
			return nil, r.fail(r.nodes["exec.user"].start, "exec.user", "%v", err)
		}
	}
	s.env, s.pathDirs = buildEnvironment(set, s.cred)
	sets := []ruleSet{{Source: "settings.json", Allow: set.Exec.Allow, Deny: set.Exec.Deny}}
	for _, plugin := range plugins {
		if !s.disabled(strings.TrimPrefix(plugin.Source, "plugin:")) {
			sets = append(sets, plugin)
		}
	}
	s.policy, err = compilePolicy(sets)
	if bad := (*ruleError)(nil); errors.As(err, &bad) && bad.Source == "settings.json" {
		key := "exec." + bad.List
		return nil, r.fail(r.nodes[key].items[bad.Index].start, key, "rule %q: %v", bad.Rule, bad.Err)
	} else if err != nil {
		return nil, err
	}
	if err := cmp.Or(s.tryTests("exec.tests.allowed", set.Exec.TestsAllowed, true), s.tryTests("exec.tests.refused", set.Exec.TestsRefused, false)); err != nil {
		return nil, err
	}
	return s, nil
}

// tryTests holds the policy to the commands that exec.tests lists.
func (s *snapshot) tryTests(key string, commands [][]string, allowed bool) error {
	for i, argv := range commands {
		_, d := s.policy.decide(argv)
		if d.Allowed == allowed {
			continue
		}
		why := "no rule allows it"
		if d.Rule != "" {
			why = fmt.Sprintf("the %s rule %q of %s decides it", d.List, d.Rule, d.Source)
		}
		return s.source.fail(s.source.nodes[key].items[i].start, key, "%q is decided otherwise: %s", argv, why)
	}
	return nil
}

// disabled says whether a plugin is off in this snapshot.
func (s *snapshot) disabled(plugin string) bool { return slices.Contains(s.PluginsDisabled, plugin) }

// ipAllowed decides a peer's address: unmapped, zone dropped, deny first, an empty allow admits none.
func (s *snapshot) ipAllowed(peer netip.Addr) bool {
	peer = peer.Unmap().WithZone("")
	within := func(p netip.Prefix) bool { return p.Contains(peer) }
	return !slices.ContainsFunc(s.IPDeny, within) && slices.ContainsFunc(s.IPAllow, within)
}

// reload says what a look at settings.json brought.
type reload int

const (
	unchanged reload = iota
	reloaded         // a new snapshot is in force
	wentBad          // the file has become unusable, or so for another reason: nothing is allowed until it is right again
)

// store keeps the snapshot in step with settings.json.
type store struct {
	p       paths
	plugins []ruleSet
	now     atomic.Pointer[storeState]
	mu      sync.Mutex // held while reading; the others wait, for they need the result
}

// storeState is one outcome of reading the file: a snapshot, or why there is none.
type storeState struct {
	version  fileVersion
	data     []byte
	snapshot *snapshot
	err      error
	tried    time.Time
}

// openStore reads the settings for the first time; plugins are the rules of the plugins that were loaded, each applied
// unless the settings disable it; an error here is fatal at start.
func openStore(p paths, plugins []ruleSet) (*store, error) {
	s := &store{p: p, plugins: plugins}
	s.now.Store(&storeState{})
	_, _, err := s.current()
	return s, err
}

// current stats settings.json and gives the snapshot in force, or the error that makes it unusable (naming file, line, column).
// reloaded and wentBad are reported to exactly one caller.
func (s *store) current() (*snapshot, reload, error) {
	if st := s.now.Load(); st.holds(s.p.settings) {
		return st.snapshot, unchanged, st.err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.now.Load()
	if old.holds(s.p.settings) {
		return old.snapshot, unchanged, old.err
	}
	st := s.read(old)
	s.now.Store(st)
	switch {
	case st.err != nil && (old.err == nil || old.err.Error() != st.err.Error()):
		return nil, wentBad, st.err
	case st.snapshot != old.snapshot && st.err == nil:
		return st.snapshot, reloaded, nil
	}
	return st.snapshot, unchanged, st.err
}

// holds says whether the file is still as it was read. A file changed so lately that its times might not tell a further change is read again;
// so is, after a while, one that was in error: the reason may lie outside of it, or have gone since.
func (st *storeState) holds(path string) bool {
	changed := time.Unix(st.version.ctime, st.version.ctimeNsec)
	return st.version == versionAt(path) && st.tried.Sub(changed) > settleTime && (st.err == nil || time.Since(st.tried) < retryTime)
}

func (s *store) read(old *storeState) *storeState {
	st := &storeState{tried: time.Now(), version: versionAt(s.p.settings)}
	if st.err = checkTrustedDir(s.p.dir); st.err != nil {
		return st
	}
	data, version, err := readVersion(s.p.settings, false)
	if err != nil {
		st.err = err
		return st
	}
	st.data, st.version = data, version
	if old.snapshot != nil && bytes.Equal(data, old.data) {
		st.snapshot = old.snapshot
	} else {
		st.snapshot, st.err = newSnapshot(s.p, data, s.plugins)
	}
	return st
}

// editRules adds or removes one rule of exec.allow or exec.deny in place, keeping the rest of the file as written; what would not load is not written.
func editRules(p paths, list string, rule ruleSpec, remove bool, plugins []ruleSet) error {
	if !utf8.ValidString(rule.Text + strings.Join(rule.Argv, "")) {
		return fmt.Errorf("the rule %q is not UTF-8 and cannot stand in %s", rule.String(), p.settings)
	}
	var value any = rule.Text
	if rule.Argv != nil {
		value = rule.Argv
	}
	return editSettings(p, func(data []byte) ([]byte, error) {
		data, there, err := editList(data, "exec."+list, value, remove)
		if err == nil && there != remove {
			err = fmt.Errorf("exec.%s of %s %s the rule %q", list, p.settings, map[bool]string{true: "already has", false: "does not have"}[there], rule.String())
		}
		if err == nil {
			_, err = newSnapshot(p, data, plugins)
		}
		return data, err
	})
}

// editPluginState enables or disables a plugin in settings.json. Whether exec.tests still hold is not tried: that takes the plugins' rules.
func editPluginState(p paths, name string, enable bool) error {
	return editSettings(p, func(data []byte) ([]byte, error) {
		s, err := parseSettings(p, data)
		if err != nil {
			return nil, err
		}
		data, there, err := editList(data, "plugins.disabled", name, enable)
		changed := there == enable
		if listed := slices.Contains(s.PluginsEnabled, name); err == nil && enable && s.PluginsMode == "explicit" && !listed {
			data, _, err = editList(data, "plugins.enabled", name, false)
			changed = true
		}
		if err == nil && !changed {
			err = fmt.Errorf("plugin %q is already so in %s", name, p.settings)
		}
		if err == nil {
			_, err = parseSettings(p, data)
		}
		return data, err
	})
}

// editSettings puts what edit makes of settings.json in its place.
func editSettings(p paths, edit func([]byte) ([]byte, error)) error {
	data, version, err := readVersion(p.settings, false)
	if err != nil {
		return err
	}
	if data, err = edit(data); err != nil {
		return jsonErrorIn(p.settings, err)
	}
	return rewriteFile(p.settings, data, version.mode.Perm())
}
