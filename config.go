// This file is the configuration: directory, key, .env, environment, and settings.json read, compiled, followed and edited in place.
// It may read the environment, and open and replace configuration files under strict modes; all others go through its functions.
// It must not decide, run or serve anything, show the key to anybody but who asks for it by name, or hand out settings that are not whole.
package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	maxConfigBytes = 1 << 20                        // a configuration file is smaller than this
	maxKeyChars    = 4096                           // so that it fits into a request's head, and into any pipe
	minKeyChars    = 16                             // of an API key; one that we make has 52
	defaultPath    = "/usr/local/bin:/usr/bin:/bin" // of commands, when the server has no usable PATH
	redactedKey    = "[API_KEY]"
	settleTime     = 100 * time.Millisecond // longer than a tick of a file system's clock: a younger file may change again unseen
)

// What openTrusted refuses of a mode: that others write, or that they do anything.
const guarded, private fs.FileMode = 0o022, 0o077

// apiKey is the shared secret. It prints as [API_KEY] whatever the verb. The pointer is for where fmt may not call methods
// (an unexported field): there a wrong verb would show a plain struct.
type apiKey struct{ *keySecret }

type keySecret struct{ text string }

func newAPIKey(text string) (*apiKey, error) {
	if len(text) < minKeyChars || len(text) > maxKeyChars || strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, fmt.Errorf("the API_KEY needs %d to %d printable ASCII characters, no spaces: "+
			"run aexec setup if there is no .env, else aexec key rotate", minKeyChars, maxKeyChars)
	}
	return &apiKey{&keySecret{text}}, nil
}

// matches compares digests in constant time, so that neither content nor length shows.
func (k *apiKey) matches(candidate string) bool {
	his, ours := sha256.Sum256([]byte(candidate)), sha256.Sum256([]byte(k.text))
	return subtle.ConstantTimeCompare(his[:], ours[:]) == 1
}

func (k *apiKey) id() string                { return fmt.Sprintf("sha256:%.6x", sha256.Sum256([]byte(k.text))) }
func (k *apiKey) redact(s string) string    { return strings.ReplaceAll(s, k.text, redactedKey) }
func (k apiKey) Format(f fmt.State, _ rune) { io.WriteString(f, redactedKey) }

// paths are the files of one configuration directory.
type paths struct{ dir, env, settings, plugins, audit, log, pid string }

// configPaths finds the directory ($AGENT_EXEC_CONFIG_DIR, else ~/.to-agent/agent-exec), absolute and without links; it need not exist.
func configPaths() (paths, error) {
	home, err := os.UserHomeDir()
	dir := os.Getenv("AGENT_EXEC_CONFIG_DIR")
	if dir == "" && err != nil {
		return paths{}, errors.New("there is no HOME to find the configuration in: set HOME or AGENT_EXEC_CONFIG_DIR")
	}
	dir, err = filepath.Abs(cmp.Or(dir, filepath.Join(home, ".to-agent", "agent-exec")))
	if real, missing := filepath.EvalSymlinks(dir); missing == nil {
		dir = real
	}
	if err != nil || strconv.Quote(dir) != `"`+dir+`"` { // from here on it can be printed as it is
		return paths{}, cmp.Or(err, fmt.Errorf("the configuration directory %q needs a name without quotes and control characters", dir))
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	return paths{dir, in(".env"), in("settings.json"), in("plugins"), in("audit.jsonl"), in("agent-exec.log"), in("agent-exec.pid")}, nil
}

// startup is what only a restart changes: flags before environment before .env.
type startup struct {
	key                    *apiKey
	keyInEnv               bool // it came from the environment, which /proc/PID/environ shows: re-execute without
	host                   string
	port                   int
	enabled, allowQueryKey bool
}

// startupFlags are the command line's own, "" if not given; the key was handed over by the process that had it in its environment.
type startupFlags struct{ key, host, port string }

// environWithoutKey is this process's environment, for another aexec.
func environWithoutKey() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "API_KEY=") })
}

// takeEnv reads a variable and removes it, so that no other process gets it.
func takeEnv(name string) string {
	defer os.Unsetenv(name)
	return os.Getenv(name)
}

func loadStartup(p paths, f startupFlags) (startup, error) {
	file, err := readEnvFile(p)
	value := func(name, flag string) string { return cmp.Or(flag, os.Getenv(name), file[name]) }
	portText := cmp.Or(value("PORT", f.port), "3333")
	port, portErr := strconv.ParseUint(portText, 10, 16)
	if portErr != nil {
		portErr = fmt.Errorf("PORT is %q, and not a number from 0 to 65535: look at the flags, the environment and %s", portText, p.env)
	}
	key, keyErr := newAPIKey(value("API_KEY", f.key))
	if err = cmp.Or(err, portErr, checkTrustedDir(p.dir), keyErr); err != nil {
		key = nil
	}
	return startup{
		key: key, keyInEnv: f.key == "" && os.Getenv("API_KEY") != "", host: cmp.Or(value("HOST", f.host), "127.0.0.1"), port: int(port),
		enabled: value("AGENT_EXEC_ENABLED", "") == "true", allowQueryKey: value("AGENT_EXEC_ALLOW_QUERY_API_KEY", "") == "true",
	}, err
}

// startupNames are all that .env may set, in the order of `aexec config`.
var startupNames = []string{"API_KEY", "HOST", "PORT", "AGENT_EXEC_ENABLED", "AGENT_EXEC_ALLOW_QUERY_API_KEY"}

// A line of .env: nothing, or a comment, or a name, a value in quotes or without spaces, and perhaps a comment.
var envLine = regexp.MustCompile(`^(?:#.*|(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'#]\S*)?)(?:\s+#.*)?)?$`)
var keyLine = regexp.MustCompile(`(?m)^([ \t]*(?:export\s+)?)API_KEY\s*=.*$`)

// readEnvFile reads .env; a missing one is empty, for the environment may have it all. No error quotes a value: it may be the key.
func readEnvFile(p paths) (map[string]string, error) {
	data, err := readTrusted(p.env, private)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	values := map[string]string{}
	for i, line := range strings.Split(string(data), "\n") {
		m := envLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil || m[1] != "" && !slices.Contains(startupNames, m[1]) || values[m[1]] != "" {
			return nil, fmt.Errorf("%s:%d: is not KEY=VALUE with a key of %s, each once", p.env, i+1, strings.Join(startupNames, ", "))
		}
		values[m[1]] = m[2] + m[3] + m[4]
	}
	delete(values, "") // of comments
	return values, nil
}

// newKeyLine has more than 256 random bits.
func newKeyLine() string { return "API_KEY=" + rand.Text() + rand.Text() }

// rotateKey puts a new key into .env and keeps the rest; a crash leaves the old or the new.
func rotateKey(p paths) error {
	data, err := readTrusted(p.env, private)
	if err != nil {
		return orSetup(err)
	}
	if !keyLine.Match(data) {
		data = append([]byte("API_KEY=\n"), data...)
	}
	return rewriteFile(p.env, keyLine.ReplaceAll(data, []byte("${1}"+newKeyLine())))
}

// createConfig makes what is missing of the directory, keeps what is there, and says which is which.
func createConfig(p paths) (made, kept []string, err error) {
	texts := map[string]string{
		p.settings: strings.Replace(defaultSettings, `"allow": []`, `"allow": ["aexec --version"]`, 1),
		p.env:      strings.Replace(skillText("_env.txt"), "API_KEY="+redactedKey, newKeyLine(), 1),
	}
	for _, path := range []string{p.dir, p.plugins, p.settings, p.env} {
		if _, err := os.Lstat(path); err == nil {
			kept = append(kept, path)
			continue
		}
		if texts[path] == "" {
			err = os.MkdirAll(path, 0o700)
		} else if err = checkTrustedDir(p.dir); err == nil { // no key where others can write
			err = rewriteFile(path, []byte(texts[path]))
		}
		if err != nil {
			return made, kept, err
		}
		made = append(made, path)
	}
	return made, kept, nil
}

// buildEnvironment makes the environment of commands, and the directories of the server's PATH. Relative directories are dropped.
func buildEnvironment(s *settings, cred *credential) (env, pathDirs []string) {
	keep := append([]string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR"}, s.EnvKeep...)
	vars := map[string]string{}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		if slices.ContainsFunc(keep, func(k string) bool { ok, _ := filepath.Match(k, name); return ok }) {
			vars[name] = value
		}
	}
	pathDirs = slices.DeleteFunc(filepath.SplitList(vars["PATH"]), func(dir string) bool { return !filepath.IsAbs(dir) })
	vars["PATH"] = cmp.Or(strings.Join(pathDirs, ":"), defaultPath) // an empty PATH would mean the current directory to some shells
	pathDirs = filepath.SplitList(vars["PATH"])
	if cred != nil {
		vars["HOME"], vars["USER"], vars["LOGNAME"], vars["SHELL"] = cred.Home, cred.Name, cred.Name, cred.Shell
	}
	maps.Copy(vars, s.EnvSet)
	maps.DeleteFunc(vars, func(name, _ string) bool { return name == "API_KEY" || strings.HasPrefix(name, "AGENT_EXEC_") })
	return each(slices.Sorted(maps.Keys(vars)), func(name string) string { return name + "=" + vars[name] }), pathDirs
}

// credential is the user that commands run as.
type credential struct {
	Uid, Gid          uint32
	Groups            []uint32
	Name, Home, Shell string
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
	var ids []uint32
	for _, text := range append([]string{u.Uid, u.Gid}, groups...) {
		id, idErr := strconv.ParseUint(text, 10, 32)
		err, ids = cmp.Or(err, idErr), append(ids, uint32(id))
	}
	c := &credential{ids[0], ids[1], ids[2:], u.Username, u.HomeDir, "/bin/sh"}
	passwd, _ := os.ReadFile("/etc/passwd") // os/user leaves the shell out; without the file it stays /bin/sh
	if m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(c.Name) + `:.*:(/.*)$`).FindSubmatch(passwd); m != nil {
		c.Shell = string(m[1])
	}
	return c, err
}

// openTrusted opens a file (one that the flags create is private): never through a link, never waiting (a FIFO), never taking a
// terminal. If it refuses any mode bits, it holds what is open to strict modes: a regular file or, with O_DIRECTORY, a directory, that
// belongs to this user or root and has none of these bits.
func openTrusted(path string, flags int, refused fs.FileMode) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0o600)
	if info, e := os.Lstat(path); err != nil && e == nil && info.Mode()&fs.ModeSymlink != 0 {
		return nil, nil, fmt.Errorf("%s is a symbolic link: put the real thing in its place", path)
	} else if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && refused != 0 {
		err = checkModes(path, info, flags&syscall.O_DIRECTORY != 0, refused)
	}
	if err != nil {
		f.Close()
	}
	return f, info, err
}

func checkModes(path string, info fs.FileInfo, dir bool, refused fs.FileMode) error {
	uid, euid, chmod := int(info.Sys().(*syscall.Stat_t).Uid), os.Geteuid(), pick(refused == private, "600", "go-w")
	switch {
	case !dir && !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case uid != euid && uid != 0:
		return fmt.Errorf("%s belongs to uid %d, and must belong to uid %d or root: run chown %d %q", path, uid, euid, euid, path)
	case info.Mode()&refused != 0:
		return fmt.Errorf("%s has mode %04o, which lets others than its owner in: run chmod %s %q", path, info.Mode().Perm(), chmod, path)
	}
	return nil
}

func checkTrustedDir(path string) error {
	f, _, err := openTrusted(path, syscall.O_DIRECTORY, guarded)
	f.Close() // nil can be closed, and what is closed
	return orSetup(err)
}

// orSetup says what makes a file that is not there.
func orSetup(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: run aexec setup", err)
	}
	return err
}

// readTrusted reads a regular file under 1 MiB under strict modes.
func readTrusted(path string, refused fs.FileMode) ([]byte, error) {
	f, before, err := openTrusted(path, 0, refused)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes))
	after, statErr := f.Stat()
	switch err = cmp.Or(err, statErr); {
	case err != nil:
	case len(data) == maxConfigBytes:
		err = fmt.Errorf("%s is larger than a configuration file may be (%d bytes)", path, maxConfigBytes-1)
	case before.Size() != after.Size() || !before.ModTime().Equal(after.ModTime()): // a rename over it moves the ctime alone
		err = fmt.Errorf("%s was being changed while it was read", path)
	}
	return data, err
}

// fileVersion tells one state of a file from another; changed is the ctime in nanoseconds, which every change of the file moves.
type fileVersion struct{ device, inode, size, mode, changed int64 }

// versionOf takes what a stat gave. It is the zero version if nothing is there.
func versionOf(info fs.FileInfo, err error) fileVersion {
	if err != nil {
		return fileVersion{}
	}
	st := info.Sys().(*syscall.Stat_t)
	sec, nsec := statChangeTime(st)
	return fileVersion{int64(st.Dev), int64(st.Ino), info.Size(), int64(info.Mode()), sec*1e9 + nsec}
}

// rewriteFile replaces a file at once (temporary file, fsync, rename), so that a crash leaves the old or the new. A new one is private.
func rewriteFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // finds nothing after the rename
	if info, e := os.Lstat(path); e == nil {
		f.Chown(-1, int(info.Sys().(*syscall.Stat_t).Gid)) // the server may read it as its group; who may not give it keeps his own
		err = f.Chmod(info.Mode().Perm())
	}
	_, writeErr := f.Write(data)
	if err = errors.Join(err, writeErr, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// configRow is one file (its state is its mode, or that it is missing) or one setting of `aexec config`.
type configRow struct {
	Name   string `json:"name"`
	Value  any    `json:"value"`
	Change string `json:"change,omitempty"` // how a change of a setting comes into force
}

// configTable is what there is: the key is nil if there are no start-up values, and settings if they cannot be read.
func configTable(p paths, start startup, s *settings) (rows []configRow) {
	for _, path := range []string{p.dir, p.env, p.settings, p.plugins, p.audit, p.log, p.pid} {
		state := "missing"
		if info, err := os.Lstat(path); err == nil {
			state = info.Mode().String()
		}
		rows = append(rows, configRow{path, state, ""})
	}
	const reloads, waits = "reloads", "needs a restart"
	if start.key != nil {
		for i, value := range []any{start.key.id(), start.host, start.port, start.enabled, start.allowQueryKey} {
			rows = append(rows, configRow{startupNames[i], value, waits})
		}
	}
	if s != nil {
		for _, key := range slices.Sorted(maps.Keys(s.source.nodes)) {
			rows = append(rows, configRow{key, json.RawMessage(s.source.nodes[key].raw), pick(slices.Contains(restartOnly, key), waits, reloads)})
		}
	}
	return rows
}

// loadSettings reads settings.json alone; the policy, the user and the working directory are not tried.
func loadSettings(p paths) (*settings, error) {
	data, err := readTrusted(p.settings, guarded)
	if err != nil {
		return nil, orSetup(err)
	}
	return parseSettings(p, data)
}

// restartState is everything on disk that only a restart brings into force: a digest of each by its name. The server publishes what
// it was at start; comparing tells what waits for a restart.
func restartState(p paths) (map[string]string, error) {
	state, err := readEnvFile(p)
	s, settingsErr := loadSettings(p)
	if err = cmp.Or(err, settingsErr); err != nil {
		return nil, err
	}
	for _, key := range restartOnly {
		state[key] = string(marshal(json.RawMessage(s.source.nodes[key].raw)))
	}
	plugins, _, _ := loadPlugins(p, &settings{}) // as if all were enabled
	for _, pl := range plugins {
		state[pluginSource+pl.Name] = fmt.Sprint(*pl)
	}
	for name, value := range state {
		state[name] = fmt.Sprintf("%.8x", sha256.Sum256([]byte(value)))
	}
	return state, nil
}

// snapshot is one consistent state of everything that reloads; a request is decided and run under one snapshot.
type snapshot struct {
	settings
	policy   policy
	env      []string    // the built environment of commands, key-free, sorted
	hookEnv  []string    // of hooks: they run as the server's user, whose home is not exec.user's to write to
	pathDirs []string    // the server's own PATH, absolute directories only, where commands are found
	cwd      string      // absolute
	cred     *credential // nil: the server's own user
}

// newSnapshot compiles the rules with those of the plugins that are not disabled, and holds the policy to exec.tests, where a
// string is split on single spaces.
func newSnapshot(p paths, data []byte, plugins []ruleSet) (*snapshot, error) {
	set, err := parseSettings(p, data)
	if err != nil {
		return nil, err
	}
	here, _ := os.Getwd() // "" if it is gone
	s, r := &snapshot{settings: *set, cwd: cmp.Or(set.Cwd, here)}, set.source
	if info, err := os.Stat(s.cwd); err != nil || !info.IsDir() {
		r.fail(r.nodes["exec.cwd"], "exec.cwd", "%q is not a directory that this user can reach", s.cwd)
	}
	if set.User != "" {
		if s.cred, err = lookupCredential(set.User); err != nil {
			r.fail(r.nodes["exec.user"], "exec.user", "%v", err)
		}
	}
	s.env, s.pathDirs = buildEnvironment(set, s.cred)
	s.hookEnv, _ = buildEnvironment(set, nil)
	off := func(plugin ruleSet) bool { return set.disabled(strings.TrimPrefix(plugin.Source, pluginSource)) }
	own := ruleSet{Source: "settings.json", Allow: set.Allow, Deny: set.Deny}
	s.policy, err = compilePolicy(append([]ruleSet{own}, slices.DeleteFunc(slices.Clone(plugins), off)...))
	if bad, ok := errors.AsType[*ruleError](err); ok && bad.Source == own.Source {
		key := "exec." + bad.List
		r.fail(r.nodes[key].items[bad.Index], key, "rule %q: %v", bad.Rule, errors.Unwrap(bad.error))
	}
	r.err = cmp.Or(r.err, err) // the first stays: without a policy the tests would fail, too
	for i, n := range slices.Concat(r.nodes["exec.tests.allowed"].items, r.nodes["exec.tests.refused"].items) {
		argv, allowed := n.texts(), i < len(set.TestsAllowed)
		if n.kind == '"' {
			argv = strings.Split(n.str, " ")
		}
		if _, d := s.policy.decide(argv); d.Allowed != allowed {
			r.fail(n, "exec.tests."+pick(allowed, "allowed", "refused"), "%q is decided otherwise: %s", argv, d.why())
		}
	}
	if r.err != nil {
		return nil, r.err
	}
	return s, nil
}

// store keeps one outcome of reading settings.json, a snapshot or why there is none, in step with the file. The rules of a plugin
// count unless the settings disable it.
type store struct {
	p        paths
	plugins  []ruleSet
	mu       sync.Mutex // while one reads, the others wait, for they need the result
	version  fileVersion
	snapshot *snapshot
	err      error
}

// current stats settings.json and gives the snapshot in force, or the error that makes it unusable (naming file, line, column): then
// nothing is allowed, and as the reason may lie outside of the file, it is read each time. A change of either is news, to exactly
// one caller.
func (s *store) current() (snap *snapshot, news bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	version := versionOf(os.Lstat(s.p.settings)) // first: a change from here on makes another
	if s.snapshot != nil && s.version == version {
		return s.snapshot, false, nil
	}
	old, oldErr := s.snapshot, s.err
	if s.version = version; time.Now().UnixNano()-version.changed < int64(settleTime) {
		s.version.changed = 0 // so young that its times might not tell a further change: it is read again
	}
	data, err := readTrusted(s.p.settings, guarded)
	if s.err = cmp.Or(checkTrustedDir(s.p.dir), err); s.err != nil {
		s.snapshot = nil
	} else if s.snapshot == nil || s.snapshot.source.text != string(data) { // a file that says the same makes no new snapshot
		s.snapshot, s.err = newSnapshot(s.p, data, s.plugins)
	}
	return s.snapshot, s.snapshot != old || fmt.Sprint(s.err) != fmt.Sprint(oldErr), s.err
}

// editRules adds or removes one rule of exec.allow or exec.deny in place. What would not load is not written.
func editRules(p paths, s *settings, list string, rule ruleSpec, remove bool, plugins []ruleSet) error {
	text := editList(s.source.text, "exec."+list, rule, remove)
	if _, err := newSnapshot(p, []byte(text), plugins); err != nil {
		return err
	}
	return s.replace(p, "exec."+list, text)
}

// replace puts another text, in which the key is edited, in the place of settings.json.
func (s *settings) replace(p paths, key, text string) error {
	if text == s.source.text {
		return fmt.Errorf("there is nothing to change in %s of %s", key, p.settings)
	}
	return rewriteFile(p.settings, []byte(text))
}
