// This file is the configuration: directory, key, .env, environment, and settings.json read, checked, compiled, followed and edited in place.
// It may read the environment, and open and replace configuration files under strict modes; all others go through its functions.
// It must not decide, run or serve anything, show the key to anybody but who asks for it by name, or hand out settings that are not whole.
package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
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
	"unicode/utf8"
)

const (
	maxConfigBytes = 1 << 20                        // a configuration file is smaller than this
	minKeyChars    = 16                             // of an API key; one that we make is 32 random bytes in hex
	defaultPath    = "/usr/local/bin:/usr/bin:/bin" // of commands, when the server has no usable PATH
	redactedKey    = "[API_KEY]"
	settleTime     = 100 * time.Millisecond // longer than a tick of a file system's clock: a younger file may change again unseen
	retryTime      = time.Second            // unusable settings are tried again this often though the file has not changed
)

// defaultEnv is what setup writes, with a key.
const defaultEnv = `# Start-up values of aexec. A change takes effect with: aexec restart
API_KEY=[API_KEY]
HOST=127.0.0.1
PORT=3333
AGENT_EXEC_ENABLED=true
AGENT_EXEC_ALLOW_QUERY_API_KEY=false
`

// apiKey is the shared secret. It prints as [API_KEY] whatever the verb. The pointer is for where fmt may not call methods
// (an unexported field): there a wrong verb would show a plain struct.
type apiKey struct{ *keySecret }

type keySecret struct {
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
	return &apiKey{&keySecret{text, sha256.Sum256([]byte(text))}}, nil
}

// matches compares digests in constant time, so that neither content nor length shows.
func (k *apiKey) matches(candidate string) bool {
	sum := sha256.Sum256([]byte(candidate))
	return subtle.ConstantTimeCompare(sum[:], k.digest[:]) == 1
}

func (k *apiKey) id() string                  { return fmt.Sprintf("sha256:%x", k.digest[:6]) }
func (k *apiKey) redact(s string) string      { return strings.ReplaceAll(s, k.text, redactedKey) }
func (k apiKey) Format(f fmt.State, _ rune)   { io.WriteString(f, redactedKey) }
func (k apiKey) MarshalText() ([]byte, error) { return []byte(redactedKey), nil }

// paths are the files of one configuration directory.
type paths struct{ dir, env, settings, plugins, audit, log, pid string }

// configPaths finds the directory ($AGENT_EXEC_CONFIG_DIR, else ~/.to-agent/agent-exec), absolute and without links; it need not exist.
func configPaths() (paths, error) {
	home, err := os.UserHomeDir()
	dir := os.Getenv("AGENT_EXEC_CONFIG_DIR")
	if dir == "" && err != nil {
		return paths{}, errors.New("there is no HOME to find the configuration in: set HOME or AGENT_EXEC_CONFIG_DIR")
	}
	if dir, err = filepath.Abs(cmp.Or(dir, filepath.Join(home, ".to-agent", "agent-exec"))); err != nil {
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
	key                    *apiKey
	keyInEnv               bool // it came from the environment, which /proc/PID/environ shows: re-execute without
	host                   string
	port                   int
	enabled, allowQueryKey bool
}

// startupFlags are the command line's own; zero values mean not given. The key was handed over on a descriptor by the process
// that had it in its environment.
type startupFlags struct {
	key, host string
	port      int
	portSet   bool
}

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
	if err := cmp.Or(checkTrustedDir(p.dir), err); err != nil {
		return startup{}, err
	}
	value := func(name, flag string) string { return cmp.Or(flag, os.Getenv(name), file[name]) }
	portText, keyText := cmp.Or(value("PORT", ""), "3333"), value("API_KEY", f.key)
	if f.portSet {
		portText = strconv.Itoa(f.port)
	}
	if keyText == "" {
		return startup{}, fmt.Errorf("there is no API_KEY in the environment or in %s: run aexec setup", p.env)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return startup{}, fmt.Errorf("PORT is %q: it must be a number from 0 to 65535 (look at the flags, the environment and %s)", portText, p.env)
	}
	key, err := newAPIKey(keyText)
	return startup{
		key: key, keyInEnv: f.key == "" && os.Getenv("API_KEY") != "", host: cmp.Or(value("HOST", f.host), "127.0.0.1"), port: int(port),
		enabled: value("AGENT_EXEC_ENABLED", "") == "true", allowQueryKey: value("AGENT_EXEC_ALLOW_QUERY_API_KEY", "") == "true",
	}, err
}

// startupNames are all that .env may set.
var startupNames = []string{"API_KEY", "HOST", "PORT", "AGENT_EXEC_ENABLED", "AGENT_EXEC_ALLOW_QUERY_API_KEY"}

// A line of .env: perhaps export, a name, and a value in quotes or up to white space before a #.
var (
	envLine = regexp.MustCompile(`^(?:export )?\s*(\w+)\s*=\s*(?:(?:"([^"]*)"|'([^']*)')\s*(?:#.*)?|(.*?)(?:\s+#.*)?)$`)
	keyLine = regexp.MustCompile(`(?m)^(\s*(?:export )?\s*)API_KEY\s*=.*$`)
)

// readEnvFile reads .env; a missing one is empty, for the environment may have it all. No error quotes a value: it may be the key.
func readEnvFile(p paths) (map[string]string, error) {
	data, err := readTrusted(p.env, true)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	values := map[string]string{}
	for i, line := range strings.Split(string(data), "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		fault, m := "", envLine.FindStringSubmatch(line)
		if m == nil || !slices.Contains(startupNames, m[1]) {
			fault = "is not KEY=VALUE with a key of " + strings.Join(startupNames, ", ")
		} else if _, twice := values[m[1]]; twice {
			fault = m[1] + " is set twice: remove one"
		} else if strings.HasPrefix(m[4], `"`) || strings.HasPrefix(m[4], "'") {
			fault = m[1] + ": the value begins with a quote and does not end with it"
		}
		if fault != "" {
			return nil, fmt.Errorf("%s:%d: %s", p.env, i+1, fault)
		}
		values[m[1]] = m[2] + m[3] + m[4]
	}
	maps.DeleteFunc(values, func(_, value string) bool { return value == "" })
	return values, nil
}

func newKeyText() string {
	random := make([]byte, 32)
	rand.Read(random) // never fails: it ends the process instead
	return fmt.Sprintf("%x", random)
}

// rotateKey puts a new key into .env and keeps the rest; a crash leaves the old or the new.
func rotateKey(p paths) (*apiKey, error) {
	_, err := readEnvFile(p)
	data, readErr := readTrusted(p.env, true)
	key, keyErr := newAPIKey(newKeyText())
	if err := cmp.Or(err, readErr, keyErr); err != nil {
		return nil, err
	}
	text := "API_KEY=" + key.text + "\n" + string(data)
	if keyLine.Match(data) {
		text = keyLine.ReplaceAllString(string(data), "${1}API_KEY="+key.text)
	}
	return key, rewriteFile(p.env, []byte(text), 0o600)
}

// createConfig makes what is missing of the directory, keeps what is there, and says which is which.
func createConfig(p paths) (made, kept []string, err error) {
	env := strings.Replace(defaultEnv, redactedKey, newKeyText(), 1)
	for _, step := range []struct{ path, text string }{{p.dir, ""}, {p.plugins, ""}, {p.settings, defaultSettings}, {p.env, env}} {
		list := &made
		switch _, missing := os.Lstat(step.path); {
		case missing == nil:
			list = &kept
		case step.text == "":
			err = os.MkdirAll(step.path, 0o700)
		default:
			err = rewriteFile(step.path, []byte(step.text), 0o600)
		}
		if err = cmp.Or(err, checkTrustedDir(p.dir)); err != nil {
			return made, kept, err
		}
		*list = append(*list, step.path)
	}
	return made, kept, nil
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
	vars["PATH"] = cmp.Or(strings.Join(pathDirs, ":"), defaultPath) // an empty PATH would mean the current directory to some shells
	pathDirs = filepath.SplitList(vars["PATH"])
	if cred != nil {
		vars["HOME"], vars["USER"], vars["LOGNAME"], vars["SHELL"] = cred.Home, cred.Name, cred.Name, cred.Shell
	}
	maps.Copy(vars, s.Exec.EnvSet)
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		env = append(env, name+"="+vars[name])
	}
	return env, pathDirs
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
		id, notNumber := strconv.ParseUint(text, 10, 32)
		ids, err = append(ids, uint32(id)), cmp.Or(err, notNumber)
	}
	if err != nil {
		return nil, err
	}
	c := &credential{ids[0], ids[1], ids[2:], u.Username, u.HomeDir, "/bin/sh"}
	passwd, _ := os.ReadFile("/etc/passwd") // os/user leaves the shell out; without the file it stays /bin/sh
	if m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(c.Name) + `:.*:(/.*)$`).FindSubmatch(passwd); m != nil {
		c.Shell = string(m[1])
	}
	return c, nil
}

// openTrusted opens for reading: never through a link, never waiting (a FIFO), never taking a terminal.
func openTrusted(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0o600)
	if info, e := os.Lstat(path); err != nil && e == nil && info.Mode()&fs.ModeSymlink != 0 {
		return nil, fmt.Errorf("%s is a symbolic link: put the real thing in its place", path)
	}
	return f, err
}

// checkTrusted holds what is open to strict modes: a file or directory of this user or root, without write access for others,
// or (private) any access.
func checkTrusted(f *os.File, kind fs.FileMode, private bool) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	refused, chmod := fs.FileMode(0o022), "go-w"
	if private {
		refused, chmod = 0o077, "600"
	} else if kind == fs.ModeDir {
		chmod = "700"
	}
	switch uid, euid := int(info.Sys().(*syscall.Stat_t).Uid), os.Geteuid(); {
	case info.Mode().Type() != kind:
		return fmt.Errorf("%s is not a regular file", f.Name())
	case uid != euid && uid != 0:
		return fmt.Errorf("%s belongs to uid %d, and to be trusted must belong to uid %d or to root: run chown %d %q", f.Name(), uid, euid, euid, f.Name())
	case info.Mode()&refused != 0:
		return fmt.Errorf("%s has mode %04o, which lets others than its owner in: run chmod %s %q", f.Name(), info.Mode().Perm(), chmod, f.Name())
	}
	return nil
}

func checkTrustedFile(f *os.File, private bool) error { return checkTrusted(f, 0, private) }

func checkTrustedDir(path string) error {
	f, err := openTrusted(path, syscall.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: run aexec setup", err)
	} else if err != nil {
		return err
	}
	defer f.Close()
	return checkTrusted(f, fs.ModeDir, false)
}

// readTrusted reads a regular file under 1 MiB under strict modes, checked on the opened descriptor.
func readTrusted(path string, private bool) ([]byte, error) {
	f, err := openTrusted(path, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	before, err := f.Stat()
	if err = cmp.Or(err, checkTrustedFile(f, private)); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes))
	after, statErr := f.Stat()
	switch {
	case err != nil || statErr != nil:
		return nil, errors.Join(err, statErr)
	case len(data) == maxConfigBytes:
		return nil, fmt.Errorf("%s is larger than a configuration file may be (%d bytes)", path, maxConfigBytes-1)
	case before.Size() != after.Size() || !before.ModTime().Equal(after.ModTime()): // a rename over it moves the ctime alone
		return nil, fmt.Errorf("%s was being changed while it was read", path)
	}
	return data, nil
}

// fileVersion tells one state of a file from another.
type fileVersion struct {
	device, inode                 uint64
	size, mtime, ctime, ctimeNsec int64
	mode                          fs.FileMode
}

func versionOf(info fs.FileInfo) fileVersion {
	st := info.Sys().(*syscall.Stat_t)
	sec, nsec := statChangeTime(st)
	return fileVersion{uint64(st.Dev), st.Ino, info.Size(), info.ModTime().UnixNano(), sec, nsec, info.Mode()}
}

// versionAt is the zero version if nothing is there.
func versionAt(path string) fileVersion {
	if info, err := os.Lstat(path); err == nil {
		return versionOf(info)
	}
	return fileVersion{}
}

// rewriteFile replaces a file at once (temporary file, fsync, rename, fsync of the directory), so that a crash leaves the old or the new.
func rewriteFile(path string, data []byte, mode fs.FileMode) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := os.CreateTemp(dir.Name(), filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // finds nothing after the rename
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	return cmp.Or(err, dir.Sync())
}

// fileInfo is one file of `aexec config`: its mode ("": it is not there), and what is wrong with it ("": nothing).
type fileInfo struct {
	Path    string `json:"path"`
	Mode    string `json:"mode"`
	Problem string `json:"problem"`
}

// configFiles looks at every file of the directory.
func configFiles(p paths) (files []fileInfo) {
	for _, path := range []string{p.dir, p.env, p.settings, p.plugins, p.audit, p.log, p.pid} {
		file := fileInfo{Path: path}
		info, err := os.Lstat(path)
		if err == nil {
			file.Mode = info.Mode().String()
			var f *os.File
			if f, err = openTrusted(path, 0); err == nil {
				err = errors.Join(checkTrusted(f, info.Mode()&fs.ModeDir, path == p.env), f.Close())
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			file.Problem = err.Error()
		}
		files = append(files, file)
	}
	return files
}

// loadSettings reads settings.json alone; the policy, the user and the working directory are not tried.
func loadSettings(p paths) (*settings, error) {
	data, err := readTrusted(p.settings, false)
	if err != nil {
		return nil, err
	}
	return parseSettings(p, data)
}

// restartValues reads from disk everything of .env and settings.json that only a restart brings into force, as printable
// values by name ("API_KEY" is the key's id). The server publishes them at start; comparing tells what needs a restart.
func restartValues(p paths) (map[string]string, error) {
	values, envErr := readEnvFile(p)
	s, err := loadSettings(p)
	if err := cmp.Or(envErr, err); err != nil {
		return nil, err
	}
	key, err := newAPIKey(values["API_KEY"])
	if delete(values, "API_KEY"); err == nil {
		values["API_KEY"] = key.id()
	}
	for _, name := range restartOnly {
		values[name] = fmt.Sprint(s.source.nodes[name].plain())
	}
	return values, nil
}

// snapshot is one consistent state of everything that reloads; a request is decided and run under one snapshot.
type snapshot struct {
	settings
	policy   *policy
	env      []string    // the built environment of commands, key-free, sorted
	hookEnv  []string    // of hooks: they run as the server's user, whose home is not exec.user's to write to
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
	s.hookEnv, _ = buildEnvironment(set, nil)
	if s.policy, err = compileSettings(set, plugins); err != nil {
		return nil, err
	}
	return s, nil
}

// reload says what a look at settings.json brought.
type reload int

const (
	unchanged reload = iota
	reloaded         // a new snapshot is in force
	wentBad          // the file has become unusable, or so for another reason: nothing is allowed until it is right again
)

// store keeps one outcome of reading settings.json, a snapshot or why there is none, in step with the file.
type store struct {
	p        paths
	plugins  []ruleSet
	mu       sync.Mutex // while one reads, the others wait, for they need the result
	version  fileVersion
	tried    time.Time
	snapshot *snapshot
	err      error
}

// openStore reads the settings for the first time, when an error is fatal. The rules of a plugin count unless the settings disable it.
func openStore(p paths, plugins []ruleSet) (*store, error) {
	s := &store{p: p, plugins: plugins}
	_, _, err := s.current()
	return s, err
}

// current stats settings.json and gives the snapshot in force, or the error that makes it unusable (naming file, line, column).
// reloaded and wentBad are reported to exactly one caller.
func (s *store) current() (*snapshot, reload, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holds() {
		return s.snapshot, unchanged, s.err
	}
	old, oldErr, event := s.snapshot, s.err, unchanged
	if s.read(); s.err == nil && s.snapshot != old {
		event = reloaded
	} else if s.err != nil && s.err.Error() != fmt.Sprint(oldErr) {
		event = wentBad
	}
	return s.snapshot, event, s.err
}

// holds says whether the file is still as it was read. A file changed so lately that its times might not tell a further change is read
// again; so is, after a while, one that was in error: the reason may lie outside of it, or have gone since.
func (s *store) holds() bool {
	changed := time.Unix(s.version.ctime, s.version.ctimeNsec)
	return s.version == versionAt(s.p.settings) && s.tried.Sub(changed) > settleTime && (s.err == nil || time.Since(s.tried) < retryTime)
}

// read takes the version first: a change in between is one that holds notices. A file that says the same makes no new snapshot.
func (s *store) read() {
	s.version, s.tried = versionAt(s.p.settings), time.Now()
	data, err := readTrusted(s.p.settings, false)
	if s.err = cmp.Or(checkTrustedDir(s.p.dir), err); s.err != nil {
		s.snapshot = nil
	} else if s.snapshot == nil || s.snapshot.source.data != string(data) {
		s.snapshot, s.err = newSnapshot(s.p, data, s.plugins)
	}
}

// editRules adds or removes one rule of exec.allow or exec.deny in place, keeping the rest of the file as written.
func editRules(p paths, list string, rule ruleSpec, remove bool, plugins []ruleSet) error {
	if !utf8.ValidString(rule.Text + strings.Join(rule.Argv, "")) {
		return fmt.Errorf("the rule %q is not UTF-8 and cannot stand in %s", rule, p.settings)
	}
	state := map[bool]string{false: "already has", true: "does not have"}[remove]
	return editSettings(p, fmt.Errorf("exec.%s of %s %s the rule %q", list, p.settings, state, rule),
		func(data []byte) ([]byte, error) { return editList(data, "exec."+list, rule, remove) },
		func(data []byte) error { _, err := newSnapshot(p, data, plugins); return err })
}

// editPluginState enables or disables a plugin in settings.json. Whether exec.tests still hold is not tried: that takes the plugins' rules.
func editPluginState(p paths, name string, enable bool) error {
	load := func(data []byte) error { _, err := parseSettings(p, data); return err }
	return editSettings(p, fmt.Errorf("plugin %q is already so in %s", name, p.settings), func(data []byte) ([]byte, error) {
		s, err := parseSettings(p, data)
		if err != nil {
			return nil, err
		}
		data, err = editList(data, "plugins.disabled", name, enable)
		if err == nil && enable && s.PluginsMode == "explicit" {
			data, err = editList(data, "plugins.enabled", name, false)
		}
		return data, err
	}, load)
}

// editSettings puts what edit makes of settings.json in its place. What would not load is not written, and no change is an error.
func editSettings(p paths, noChange error, edit func([]byte) ([]byte, error), load func([]byte) error) error {
	mode := versionAt(p.settings).mode.Perm()
	data, err := readTrusted(p.settings, false)
	if err != nil {
		return err
	}
	edited, err := edit(data)
	if err == nil && slices.Equal(edited, data) {
		err = noChange
	}
	if err == nil {
		err = load(edited)
	}
	if err != nil {
		return jsonErrorIn(p.settings, err)
	}
	return rewriteFile(p.settings, edited, mode)
}
