// This file is everything that is configured: the directory, .env, settings.json, and the strict JSON reader for both files and bodies.
// It may read the environment and configuration files, and rewrite the files that it reads, atomically.
// It must not decide, run or serve anything: it hands out immutable snapshots.
package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	maxJSONDepth   = 64                     // arrays and objects within each other; ours need five
	maxJSONValues  = 1 << 19                // as many as 1 MiB can hold; each takes about 120 bytes of memory
	maxConfigBytes = 1 << 20                // a configuration file is smaller than this
	minKeyChars    = 16                     // of an API key; one that we make is 32 random bytes in hex
	settleTime     = 100 * time.Millisecond // longer than a tick of a file system's clock: a younger file may change again unseen
	retryTime      = time.Second            // unusable settings are tried again this often though the file has not changed
	dayMs          = 24 * 60 * 60 * 1000
	defaultPath    = "/usr/local/bin:/usr/bin:/bin" // of commands, when the server has no usable PATH
	redactedKey    = "[API_KEY]"
)

// What setup writes. The settings are also the defaults, but that without exec.allow nothing is allowed.
var (
	//go:embed defaults/settings.json
	defaultSettings string
	//go:embed defaults/env
	defaultEnv string
)

// node is one JSON value of the strict reader, with its place in the text.
type node struct {
	kind       byte     // '{' '[' '"' '0' 't' 'f' 'n'
	surrogate  bool     // the string holds a lone surrogate escape
	start, end int      // byte offsets into the text
	str        string   // the string, or the number's literal
	keys       []string // of an object, in order, unique
	keyAt      []int    // byte offset of each key
	items      []*node  // of an object or an array
}

// get is the member of an object, or nil.
func (n *node) get(key string) *node {
	if i := slices.Index(n.keys, key); i >= 0 {
		return n.items[i]
	}
	return nil
}

// equal compares what is said, not how it is written.
func (n *node) equal(o *node) bool {
	return n.kind == o.kind && n.str == o.str && slices.Equal(n.keys, o.keys) && slices.EqualFunc(n.items, o.items, (*node).equal)
}

// jsonError is what the strict reader found wrong, and where (line and column from 1, in bytes).
type jsonError struct {
	Line, Col int
	Msg       string
}

func (e *jsonError) Error() string {
	return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Col, e.Msg)
}

func newJSONError(text string, at int, format string, args ...any) *jsonError {
	before := text[:at]
	return &jsonError{1 + strings.Count(before, "\n"), at - strings.LastIndexByte(before, '\n'), fmt.Sprintf(format, args...)}
}

// strictReader walks through text that encoding/json has found valid, and so cannot meet a syntax error.
type strictReader struct {
	text               string
	pos, depth, values int
	free               []node // nodes are allocated in batches
	err                *jsonError
}

// parseStrict reads one JSON value and nothing after it: no duplicate keys, no invalid UTF-8, no byte order mark,
// nesting of at most maxJSONDepth, at most maxJSONValues values. Errors are *jsonError.
func parseStrict(data []byte) (*node, error) {
	r := &strictReader{text: string(data)}
	if strings.HasPrefix(r.text, "\ufeff") {
		return nil, newJSONError(r.text, 0, "begins with a byte order mark: save it without one")
	}
	if !utf8.Valid(data) {
		at := 0
		for c, n := utf8.DecodeRune(data); c != utf8.RuneError || n != 1; c, n = utf8.DecodeRune(data[at:]) {
			at += n
		}
		return nil, newJSONError(r.text, at, "is not UTF-8")
	}
	if !json.Valid(data) {
		var syntax *json.SyntaxError
		errors.As(json.Unmarshal(data, new(json.RawMessage)), &syntax)
		return nil, newJSONError(r.text, max(int(syntax.Offset)-1, 0), "%v", syntax)
	}
	root := r.value()
	if r.err != nil {
		return nil, r.err
	}
	return root, nil
}

// next skips what may stand before a value, a key or a closing bracket, and gives its first byte.
func (r *strictReader) next() byte {
	for strings.IndexByte(" \t\r\n,:", r.text[r.pos]) >= 0 {
		r.pos++
	}
	return r.text[r.pos]
}

func (r *strictReader) fail(at int, format string, args ...any) {
	if r.err == nil {
		r.err = newJSONError(r.text, at, format, args...)
	}
}

func (r *strictReader) value() *node {
	if len(r.free) == 0 {
		r.free = make([]node, min(8+r.values, 1024))
	}
	n := &r.free[0]
	r.free = r.free[1:]
	n.kind, n.start = r.next(), r.pos
	if r.values++; r.values > maxJSONValues {
		r.fail(n.start, "has more than %d values", maxJSONValues)
	}
	switch n.kind {
	case '{', '[':
		r.members(n)
	case '"':
		n.str, n.surrogate = r.string()
	default:
		size := strings.IndexAny(r.text[r.pos:], " \t\r\n,]}")
		if size < 0 {
			size = len(r.text) - r.pos
		}
		r.pos += size
		if n.kind <= '9' { // a digit or a minus sign
			n.kind, n.str = '0', r.text[n.start:r.pos]
		}
	}
	n.end = r.pos
	return n
}

func (r *strictReader) members(n *node) {
	r.pos++
	if r.depth++; r.depth > maxJSONDepth {
		r.fail(n.start, "is nested deeper than %d", maxJSONDepth)
	}
	seen := map[string]bool{}
	for c := r.next(); c != ']' && c != '}' && r.err == nil; c = r.next() {
		if n.kind == '{' {
			n.keyAt = append(n.keyAt, r.pos)
			key, _ := r.string()
			if seen[key] {
				r.fail(n.keyAt[len(n.keys)], "has the key %q twice", key)
			}
			seen[key] = true
			n.keys = append(n.keys, key)
		}
		n.items = append(n.items, r.value())
	}
	r.pos++
	r.depth--
}

// surrogates finds pairs of surrogate escapes, or half of one (4 bytes of it).
var surrogates = regexp.MustCompile(`(?i)\\ud[89ab]..\\ud[c-f]|\\ud[89a-f]`)

// string reads a string; lone says that it holds half a surrogate pair, which becomes U+FFFD as everywhere in Go.
func (r *strictReader) string() (s string, lone bool) {
	start, escaped := r.pos, false
	for r.pos++; r.text[r.pos] != '"'; r.pos++ {
		if r.text[r.pos] == '\\' {
			escaped = true
			r.pos++
		}
	}
	r.pos++
	raw := r.text[start:r.pos]
	if !escaped {
		return raw[1 : len(raw)-1], false
	}
	if err := json.Unmarshal([]byte(raw), &s); err != nil {
		r.fail(start, "%v", err)
	}
	for _, found := range surrogates.FindAllString(strings.ReplaceAll(raw, `\\`, "  "), -1) {
		lone = lone || len(found) == 4
	}
	return s, lone
}

// apiKey is the shared secret. It prints as [API_KEY] whatever the verb.
type apiKey struct {
	text   string
	digest [sha256.Size]byte
}

func newAPIKey(text string) (*apiKey, error) {
	if len(text) < minKeyChars {
		return nil, fmt.Errorf("the API_KEY has %d characters and needs at least %d: run aexec key rotate", len(text), minKeyChars)
	}
	if strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, errors.New("the API_KEY holds a character that a header cannot carry: use printable ASCII without spaces")
	}
	return &apiKey{text, sha256.Sum256([]byte(text))}, nil
}

// matches compares digests in constant time, so that neither content nor length shows.
func (k *apiKey) matches(candidate string) bool {
	sum := sha256.Sum256([]byte(candidate))
	return subtle.ConstantTimeCompare(sum[:], k.digest[:]) == 1
}

func (k *apiKey) id() string                  { return "sha256:" + hex.EncodeToString(k.digest[:6]) }
func (k *apiKey) redact(s string) string      { return strings.ReplaceAll(s, k.text, redactedKey) }
func (k apiKey) Format(f fmt.State, _ rune)   { io.WriteString(f, redactedKey) }
func (k apiKey) MarshalText() ([]byte, error) { return []byte(redactedKey), nil }

// paths are the files of one configuration directory.
type paths struct{ dir, env, settings, plugins, audit, log, pid string }

// configPaths finds the directory ($AGENT_EXEC_CONFIG_DIR, else ~/.to-agent/agent-exec), absolute and without links; it need not exist.
func configPaths() (paths, error) {
	dir := os.Getenv("AGENT_EXEC_CONFIG_DIR")
	if home, err := os.UserHomeDir(); dir == "" && err != nil {
		return paths{}, errors.New("there is no HOME to find the configuration in: set HOME or AGENT_EXEC_CONFIG_DIR")
	} else if dir == "" {
		dir = filepath.Join(home, ".to-agent", "agent-exec")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return paths{}, err
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	if strconv.Quote(dir) != `"`+dir+`"` { // from here on it can be printed as it is
		return paths{}, fmt.Errorf("the configuration directory %q needs a name without quotes and control characters", dir)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	return paths{dir, in(".env"), in("settings.json"), in("plugins"), in("audit.jsonl"), in("agent-exec.log"), in("agent-exec.pid")}, nil
}

// startup is what only a restart changes: flags before environment before .env.
type startup struct {
	key           *apiKey
	keyInEnv      bool // it came from the environment, which /proc/PID/environ shows: re-execute without
	host          string
	port          int
	enabled       bool
	allowQueryKey bool
}

// startupFlags are the command line's own; zero values mean not given.
type startupFlags struct {
	key     string // handed over on a descriptor by the process that had it in its environment
	host    string
	port    int
	portSet bool
}

// startupNames are all that .env may set.
var startupNames = []string{"API_KEY", "HOST", "PORT", "AGENT_EXEC_ENABLED", "AGENT_EXEC_ALLOW_QUERY_API_KEY"}

// environWithoutKey is this process's environment, for another aexec.
func environWithoutKey() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "API_KEY=") })
}

func loadStartup(p paths, f startupFlags) (startup, error) {
	if err := checkTrustedDir(p.dir); err != nil {
		return startup{}, err
	}
	file, err := readEnvFile(p)
	if err != nil {
		return startup{}, err
	}
	v := map[string]string{"HOST": "127.0.0.1", "PORT": "3333"}
	maps.Copy(v, file)
	for _, name := range startupNames {
		if text := os.Getenv(name); text != "" {
			v[name] = text
		}
	}
	if f.host != "" {
		v["HOST"] = f.host
	}
	if f.portSet {
		v["PORT"] = strconv.Itoa(f.port)
	}
	if f.key != "" {
		v["API_KEY"] = f.key
	}
	if v["API_KEY"] == "" {
		return startup{}, fmt.Errorf("there is no API_KEY in the environment or in %s: run aexec setup", p.env)
	}
	port, err := strconv.ParseUint(v["PORT"], 10, 16)
	if err != nil {
		return startup{}, fmt.Errorf("PORT is %q: it must be a number from 0 to 65535 (look at the flags, the environment and %s)", v["PORT"], p.env)
	}
	key, err := newAPIKey(v["API_KEY"])
	return startup{
		key: key, keyInEnv: f.key == "" && os.Getenv("API_KEY") != "", host: v["HOST"], port: int(port),
		enabled: v["AGENT_EXEC_ENABLED"] == "true", allowQueryKey: v["AGENT_EXEC_ALLOW_QUERY_API_KEY"] == "true",
	}, err
}

// readEnvFile reads .env; a missing one is empty, for the environment may have it all. No error quotes a value: it may be the key.
func readEnvFile(p paths) (map[string]string, error) {
	data, err := readTrusted(p.env, true)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	values := map[string]string{}
	for i, line := range strings.Split(string(data), "\n") {
		name, value, err := parseEnvLine(line)
		if _, twice := values[name]; twice && name != "" {
			err = fmt.Errorf("%s is set twice: remove one", name)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", p.env, i+1, err)
		}
		values[name] = value
	}
	maps.DeleteFunc(values, func(_, value string) bool { return value == "" })
	return values, nil
}

// parseEnvLine gives an empty name for an empty line or a comment.
func parseEnvLine(line string) (name, value string, err error) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return "", "", nil
	}
	name, value, found := strings.Cut(line, "=")
	name, value = strings.TrimSpace(strings.TrimPrefix(name, "export ")), strings.TrimSpace(value)
	if !found || !slices.Contains(startupNames, name) {
		return "", "", fmt.Errorf("is not KEY=VALUE with one of the keys %s", strings.Join(startupNames, ", "))
	}
	if value != "" && (value[0] == '"' || value[0] == '\'') {
		inside, after, closed := strings.Cut(value[1:], value[:1])
		if after = strings.TrimSpace(after); !closed || after != "" && after[0] != '#' {
			return "", "", fmt.Errorf("%s: the value begins with a quote and does not end with it", name)
		}
		return name, inside, nil
	}
	value, _, _ = strings.Cut(strings.ReplaceAll(value, "\t#", " #"), " #")
	return name, strings.TrimSpace(value), nil
}

func newKeyText() string {
	random := make([]byte, 32)
	rand.Read(random) // never fails: it ends the process instead
	return hex.EncodeToString(random)
}

// rotateKey puts a new key into .env and keeps the rest; a crash leaves the old or the new.
func rotateKey(p paths) (*apiKey, error) {
	if _, err := readEnvFile(p); err != nil {
		return nil, err
	}
	data, err := readTrusted(p.env, true)
	if err != nil {
		return nil, err
	}
	key, err := newAPIKey(newKeyText())
	if err != nil {
		return nil, err
	}
	lines := strings.Split(string(data), "\n")
	at := slices.IndexFunc(lines, func(line string) bool { name, _, _ := parseEnvLine(line); return name == "API_KEY" })
	if at < 0 {
		at, lines = 0, slices.Insert(lines, 0, "API_KEY")
	}
	before, _, _ := strings.Cut(lines[at], "API_KEY") // perhaps "export "
	lines[at] = before + "API_KEY=" + key.text
	return key, rewriteFile(p.env, []byte(strings.Join(lines, "\n")), 0o600)
}

// createConfig makes what is missing of the directory, keeps what is there, and says which is which.
func createConfig(p paths) (made, kept []string, err error) {
	env := []byte(strings.Replace(defaultEnv, redactedKey, newKeyText(), 1))
	for _, step := range []struct {
		path string
		make func() error
	}{
		{p.dir, func() error { return os.MkdirAll(p.dir, 0o700) }},
		{p.plugins, func() error { return os.Mkdir(p.plugins, 0o700) }},
		{p.settings, func() error { return rewriteFile(p.settings, []byte(defaultSettings), 0o600) }},
		{p.env, func() error { return rewriteFile(p.env, env, 0o600) }},
	} {
		if _, err := os.Lstat(step.path); err == nil {
			kept = append(kept, step.path)
		} else if err := step.make(); err != nil {
			return made, kept, err
		} else {
			made = append(made, step.path)
		}
		if err := checkTrustedDir(p.dir); err != nil {
			return made, kept, err
		}
	}
	return made, kept, nil
}

// openTrusted opens for reading: never through a link, never waiting (a FIFO), never taking a terminal.
func openTrusted(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if info, e := os.Lstat(path); err != nil && e == nil && info.Mode()&fs.ModeSymlink != 0 {
		return nil, fmt.Errorf("%s is a symbolic link: put the real thing in its place", path)
	}
	return f, err
}

// checkOwnerAndMode holds what is open to its owner (this user or root) and to a mode without the refused bits.
func checkOwnerAndMode(f *os.File, refused fs.FileMode, chmod string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	uid, euid := int(info.Sys().(*syscall.Stat_t).Uid), os.Geteuid()
	if uid != euid && uid != 0 {
		return fmt.Errorf("%s belongs to uid %d, and to be trusted must belong to uid %d or to root: run chown %d %q", f.Name(), uid, euid, euid, f.Name())
	}
	if mode := info.Mode().Perm(); mode&refused != 0 {
		return fmt.Errorf("%s has mode %04o, which lets others than its owner in: run chmod %s %q", f.Name(), mode, chmod, f.Name())
	}
	return nil
}

// checkTrustedFile holds an open file to strict modes. private: group and others may not read it either.
func checkTrustedFile(f *os.File, private bool) error {
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file (%v)", f.Name(), err)
	}
	if private {
		return checkOwnerAndMode(f, 0o077, "600")
	}
	return checkOwnerAndMode(f, 0o022, "go-w")
}

// checkTrustedDir holds a directory to the same modes.
func checkTrustedDir(path string) error {
	f, err := openTrusted(path, syscall.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: run aexec setup", err)
	} else if err != nil {
		return err
	}
	defer f.Close()
	return checkOwnerAndMode(f, 0o022, "700")
}

// readTrusted reads a regular file under 1 MiB under strict modes, checked on the opened descriptor.
func readTrusted(path string, private bool) ([]byte, error) {
	data, _, err := readVersion(path, private)
	return data, err
}

// fileVersion tells one state of a file from another.
type fileVersion struct {
	device, inode                 uint64
	size, mtime, ctime, ctimeNsec int64
	mode                          fs.FileMode
	uid                           uint32
}

func versionOf(info fs.FileInfo) fileVersion {
	st := info.Sys().(*syscall.Stat_t)
	sec, nsec := statChangeTime(st)
	return fileVersion{uint64(st.Dev), st.Ino, info.Size(), info.ModTime().UnixNano(), sec, nsec, info.Mode(), st.Uid}
}

// readVersion is readTrusted, and says what version it was, before and after.
func readVersion(path string, private bool) ([]byte, fileVersion, error) {
	f, err := openTrusted(path, 0)
	if err != nil {
		return nil, fileVersion{}, err
	}
	defer f.Close()
	before, err := f.Stat()
	if err == nil {
		err = checkTrustedFile(f, private)
	}
	if err != nil {
		return nil, fileVersion{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes))
	after, statErr := f.Stat()
	switch {
	case err != nil || statErr != nil:
		err = errors.Join(err, statErr)
	case len(data) == maxConfigBytes:
		err = fmt.Errorf("%s is larger than a configuration file may be (%d bytes)", path, maxConfigBytes-1)
	case versionOf(before) != versionOf(after):
		err = fmt.Errorf("%s was being changed while it was read", path)
	}
	return data, versionOf(before), err
}

// rewriteFile replaces a file at once (temporary file, fsync, rename, fsync of the directory), so that a crash leaves the old or the new.
func rewriteFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // finds nothing after the rename
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

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
	r := &settingsReader{file: p.settings, data: string(data), nodes: map[string]*node{}, inFile: map[string]bool{}}
	known, err := parseStrict([]byte(defaultSettings))
	if err != nil {
		return nil, err
	}
	r.walk("", known, known)
	clear(r.inFile)
	r.nodes["exec.allow"] = &node{kind: '['}
	root, err := parseStrict(data)
	if wrong := (*jsonError)(nil); errors.As(err, &wrong) {
		return nil, fmt.Errorf("%s:%d:%d: %s", p.settings, wrong.Line, wrong.Col, wrong.Msg)
	}
	if root.kind != '{' {
		return nil, r.fail(root.start, "settings", "is %s and must be an object", root.what())
	}
	r.walk("", root, known)
	return r.settings(p), r.err
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
			r.fail(n.keyAt[i], strconv.Quote(name), "is not a setting (a key that begins with _ is a comment)")
		case v.what() != def.what() && !(prefix == "ip." && (v.kind == '"' || v.kind == '[')):
			r.fail(v.start, name, "is %s and must be %s", v.what(), def.what())
		case v.kind == '{' && name != "exec.env.set":
			r.walk(name+".", v, def)
		default:
			if r.nodes[name] == nil {
				r.keys = append(r.keys, name)
			}
			r.nodes[name], r.inFile[name] = v, true
		}
	}
}

// what names a node's type for people.
func (n *node) what() string {
	return map[byte]string{'{': "an object", '[': "an array", '"': "a string", '0': "a number", 't': "true or false", 'f': "true or false", 'n': "null"}[n.kind]
}

// plain is the node as encoding/json would have it, numbers as written.
func (n *node) plain() any {
	list, object := make([]any, 0, len(n.items)), map[string]any{}
	for i, v := range n.items {
		list = append(list, v.plain())
		if n.kind == '{' {
			object[n.keys[i]] = v.plain()
		}
	}
	return map[byte]any{'{': object, '[': list, '"': n.str, '0': json.Number(n.str), 't': true, 'f': false}[n.kind]
}

// settings reads every value; the numbers beside a key are its range, chosen so that nothing overflows.
func (r *settingsReader) settings(p paths) *settings {
	s := &settings{source: r}
	s.Exec.Allow, s.Exec.Deny = r.rules("exec.allow"), r.rules("exec.deny")
	s.Exec.TestsAllowed, s.Exec.TestsRefused = r.commands("exec.tests.allowed"), r.commands("exec.tests.refused")
	s.Exec.Cwd, s.Exec.User = r.text("exec.cwd", absoluteOrEmpty), r.text("exec.user", anyText)
	s.Exec.EnvKeep, s.Exec.EnvSet = r.texts("exec.env.keep", envPattern), r.variables("exec.env.set")
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
	s.RateWindow = time.Duration(r.number("rateLimit.windowMs", 1, dayMs)) * time.Millisecond
	s.RateMax = int(r.number("rateLimit.max", 0, 1<<30))
	s.AuditEnabled = r.nodes["audit.enabled"].kind == 't'
	s.AuditFile = cmp.Or(r.text("audit.file", absoluteOrEmpty), p.audit)
	s.PluginsMode = r.text("plugins.mode", pluginMode)
	s.PluginsEnabled, s.PluginsDisabled = r.texts("plugins.enabled", pluginNameText), r.texts("plugins.disabled", pluginNameText)
	return s
}

func (r *settingsReader) number(key string, least, most int64) int64 {
	v := r.nodes[key]
	i, err := strconv.ParseInt(v.str, 10, 64)
	if err != nil || i < least || i > most {
		r.fail(v.start, key, "is %.30s and must be a whole number from %d to %d", v.str, least, most)
	}
	return i
}

// check says what is wrong with a text, "" if nothing is.
type check func(text string) string

func anyText(string) string { return "" }

func absoluteOrEmpty(text string) string {
	if text != "" && !filepath.IsAbs(text) {
		return fmt.Sprintf("is %q and must be an absolute path", text)
	}
	return ""
}

func pluginMode(text string) string {
	if text != "auto" && text != "explicit" {
		return fmt.Sprintf("is %q and must be \"auto\" or \"explicit\"", text)
	}
	return ""
}

func pluginNameText(text string) string {
	if text == "" || text[0] == '-' || strings.Trim(text, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Sprintf("has %q, which cannot be a plugin's name (lower case letters, digits and -)", text)
	}
	return ""
}

func envPattern(text string) string {
	if name := strings.TrimSuffix(text, "*"); name == "" && text == "" || strings.ContainsAny(name, "*=") {
		return fmt.Sprintf("has %q, which cannot be a variable's name (a * may only end it)", text)
	} else if secretVariable(name) {
		return fmt.Sprintf("has %q, which is never passed on: remove it", text)
	}
	return ""
}

func (r *settingsReader) string(key string, v *node, wrong check) string {
	msg := "is or holds " + v.what() + " and must be a string"
	if v.kind == '"' {
		msg = wrong(v.str)
	}
	if v.surrogate || strings.Contains(v.str, "\x00") {
		msg = "holds a NUL character or half a surrogate pair"
	}
	if msg != "" {
		r.fail(v.start, key, "%s", msg)
	}
	return v.str
}

func (r *settingsReader) text(key string, wrong check) string {
	return r.string(key, r.nodes[key], wrong)
}

func (r *settingsReader) texts(key string, wrong check) []string {
	var list []string
	for _, v := range r.nodes[key].items {
		list = append(list, r.string(key, v, wrong))
	}
	return list
}

func (r *settingsReader) rules(key string) []ruleSpec {
	var list []ruleSpec
	for _, v := range r.nodes[key].items {
		if v.kind != '[' {
			list = append(list, ruleSpec{Text: r.string(key, v, anyText)})
			continue
		}
		argv := make([]string, 0, len(v.items)) // not nil, which would make it a string rule
		for _, element := range v.items {
			argv = append(argv, r.string(key, element, anyText))
		}
		list = append(list, ruleSpec{Argv: argv})
	}
	return list
}

func (r *settingsReader) commands(key string) [][]string {
	var list [][]string
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
		if strings.HasPrefix(name, "_") {
			continue
		}
		if msg := envPattern(name); msg != "" || strings.ContainsAny(name, "*\x00") {
			r.fail(n.keyAt[i], key, "%s", cmp.Or(msg, "a variable's name cannot hold * or NUL"))
		}
		set[name] = r.string(key, n.items[i], anyText)
	}
	return set
}

func (r *settingsReader) prefixes(key string) []netip.Prefix {
	var list []netip.Prefix
	items := r.nodes[key].items
	if n := r.nodes[key]; n.kind == '"' {
		items = []*node{n}
	}
	for _, v := range items {
		text := r.string(key, v, anyText)
		if text == "*" {
			list = append(list, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
			continue
		}
		prefix, err := parsePrefix(text)
		if err != nil {
			r.fail(v.start, key, "%q is neither an address, nor a network like 10.0.0.0/8, nor *", text)
		}
		list = append(list, prefix)
	}
	return list
}

// parsePrefix reads an address or CIDR; a zone is refused, and IPv4 within IPv6 becomes IPv4, as peers do.
func parsePrefix(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if addr, addrErr := netip.ParseAddr(text); addrErr == nil && addr.Zone() == "" {
		prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	if prefix.Addr().Is4In6() {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
		if !prefix.IsValid() {
			err = errors.New("wider than IPv4")
		}
	}
	return prefix.Masked(), err
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
	return s, cmp.Or(s.tryTests("exec.tests.allowed", set.Exec.TestsAllowed, true), s.tryTests("exec.tests.refused", set.Exec.TestsRefused, false))
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

// lookupCredential finds a user with its groups; only root can become another.
func lookupCredential(name string) (*credential, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("only a server started as root can run commands as another user: start it as root, or leave this empty")
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, err
	}
	c := &credential{Name: u.Username, Home: u.HomeDir, Shell: "/bin/sh"}
	var ids []uint32
	for _, text := range append([]string{u.Uid, u.Gid}, groups...) {
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%q has an id that is no number: %w", name, err)
		}
		ids = append(ids, uint32(id))
	}
	c.Uid, c.Gid, c.Groups = ids[0], ids[1], ids[2:]
	passwd, err := os.ReadFile("/etc/passwd") // os/user leaves the shell out; without the file it stays /bin/sh
	for line := range strings.Lines(string(passwd)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); err == nil && len(f) == 7 && f[0] == c.Name && f[6] != "" {
			c.Shell = f[6]
		}
	}
	return c, nil
}

// secretVariable names what no command ever gets.
func secretVariable(name string) bool {
	return name == "API_KEY" || strings.HasPrefix(name, "AGENT_EXEC_")
}

// buildEnvironment makes the environment of commands, and the directories of the server's PATH. Relative directories are dropped.
func buildEnvironment(s *settings, cred *credential) (env, pathDirs []string) {
	keep := append([]string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR"}, s.Exec.EnvKeep...)
	vars := map[string]string{}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		matches := func(k string) bool {
			stem, star := strings.CutSuffix(k, "*")
			return k == name || star && strings.HasPrefix(name, stem)
		}
		if slices.ContainsFunc(keep, matches) && !secretVariable(name) {
			vars[name] = value
		}
	}
	pathDirs = slices.DeleteFunc(filepath.SplitList(vars["PATH"]), func(dir string) bool { return !filepath.IsAbs(dir) })
	if len(pathDirs) == 0 { // an empty PATH would mean the current directory to some shells
		pathDirs = filepath.SplitList(defaultPath)
	}
	vars["PATH"] = strings.Join(pathDirs, ":")
	if cred != nil {
		vars["HOME"], vars["USER"], vars["LOGNAME"], vars["SHELL"] = cred.Home, cred.Name, cred.Name, cred.Shell
	}
	maps.Copy(vars, s.Exec.EnvSet)
	for name, value := range vars {
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	return env, pathDirs
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
	settled  bool // the file was old enough for its times to tell a further change
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

// holds says whether the file is still as it was read. An error is looked at again after a while: its reason may lie outside of the file.
func (st *storeState) holds(path string) bool {
	info, err := os.Lstat(path)
	var version fileVersion // of a missing file
	if err == nil {
		version = versionOf(info)
	}
	return st.settled && st.version == version && (st.err == nil || time.Since(st.tried) < retryTime)
}

func (s *store) read(old *storeState) *storeState {
	st := &storeState{tried: time.Now()}
	if info, err := os.Lstat(s.p.settings); err == nil {
		st.version = versionOf(info)
	}
	st.settled = st.tried.Sub(time.Unix(st.version.ctime, st.version.ctimeNsec)) > settleTime
	if st.err = checkTrustedDir(s.p.dir); st.err != nil {
		return st
	}
	var read fileVersion
	if st.data, read, st.err = readVersion(s.p.settings, false); st.err != nil {
		return st
	}
	st.settled = st.settled && read == st.version
	if old.snapshot != nil && bytes.Equal(st.data, old.data) {
		st.snapshot = old.snapshot
		return st
	}
	st.snapshot, st.err = newSnapshot(s.p, st.data, s.plugins)
	if st.err != nil {
		st.snapshot = nil
	}
	return st
}

// editRules adds or removes one rule of exec.allow or exec.deny in place, keeping the rest of the file as written; what would not load is not written.
func editRules(p paths, list string, rule ruleSpec, remove bool, plugins []ruleSet) error {
	var value any = rule.Text
	if rule.Argv != nil {
		value = rule.Argv
	}
	return editSettings(p, func(data []byte) ([]byte, error) {
		data, there, err := editList(data, "exec."+list, value, remove)
		if err == nil && there != remove {
			err = fmt.Errorf("exec.%s of %s %s the rule %q", list, p.settings, map[bool]string{true: "has already", false: "does not have"}[there], value)
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
		return err
	}
	return rewriteFile(p.settings, data, version.mode.Perm())
}

// editList adds a value to the array at a dotted key, or removes it wherever it stands there, and leaves every other byte alone.
func editList(data []byte, key string, value any, remove bool) (edited []byte, there bool, err error) {
	root, err := parseStrict(data)
	if err != nil {
		return nil, false, err
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return nil, false, err
	}
	text := strings.TrimSpace(b.String())
	want, err := parseStrict([]byte(text))
	if err != nil {
		return nil, false, err
	}
	n, rest := root, strings.Split(key, ".")
	for len(rest) > 0 && n.get(rest[0]) != nil {
		n, rest = n.get(rest[0]), rest[1:]
	}
	if len(rest) == 0 && n.kind != '[' || len(rest) > 0 && n.kind != '{' {
		return nil, false, fmt.Errorf("%s is not an array", key)
	}
	if len(rest) > 0 { // not there yet
		text = "[" + text + "]"
		for i := len(rest) - 1; i > 0; i-- {
			text = fmt.Sprintf("{ %q: %s }", rest[i], text)
		}
		text = fmt.Sprintf("%q: %s", rest[0], text)
	}
	at := slices.IndexFunc(n.items, want.equal)
	there = len(rest) == 0 && at >= 0
	switch {
	case remove && there:
		data = cutItem(data, n, at)
		data, _, err = editList(data, key, value, true)
	case !remove && !there:
		data = appendItem(data, n, text)
	}
	return data, there, err
}

// itemStart is where an element, or a member with its key, begins.
func (n *node) itemStart(i int) int {
	if n.kind == '{' {
		return n.keyAt[i]
	}
	return n.items[i].start
}

// appendItem adds text to an array or object, set apart as the others are.
func appendItem(data []byte, n *node, text string) []byte {
	at, count := n.start+1, len(n.items)
	switch {
	case count > 1:
		text = string(data[n.items[count-2].end:n.itemStart(count-1)]) + text
	case count == 1:
		text = "," + cmp.Or(string(data[at:n.itemStart(0)]), " ") + text
	}
	if count > 0 {
		at = n.items[count-1].end
	}
	return slices.Concat(data[:at], []byte(text), data[at:])
}

// cutItem removes one element with the comma that set it apart.
func cutItem(data []byte, n *node, i int) []byte {
	from, to := n.items[i].start, n.items[i].end
	if i > 0 {
		from = n.items[i-1].end
	} else if len(n.items) > 1 {
		to = n.items[1].start
	}
	return slices.Concat(data[:from], data[to:])
}
