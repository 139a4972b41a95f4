// This file is the start: the directory, the key, .env and the environment, and strict modes for every file of the configuration.
// It may read the environment, and open and replace configuration files; all others go through its functions.
// It must not decide, run or serve anything, nor show the key to anybody but who asks for it by name.
package main

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	maxConfigBytes = 1 << 20                        // a configuration file is smaller than this
	minKeyChars    = 16                             // of an API key; one that we make is 32 random bytes in hex
	defaultPath    = "/usr/local/bin:/usr/bin:/bin" // of commands, when the server has no usable PATH
	redactedKey    = "[API_KEY]"
)

//go:embed defaults
var defaultFiles embed.FS

// What setup writes. The settings are also the defaults, but that without exec.allow nothing is allowed.
var defaultSettings, defaultEnv = defaultFile("settings.json"), defaultFile("env")

func defaultFile(name string) string {
	data, err := defaultFiles.ReadFile("defaults/" + name)
	if err != nil {
		panic(err) // the build would have failed
	}
	return string(data)
}

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

// takeEnv reads a variable and removes it, so that no other process gets it.
func takeEnv(name string) string {
	value := os.Getenv(name)
	os.Unsetenv(name)
	return value
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
		return "", "", fmt.Errorf("is not KEY=VALUE with a key of %s", strings.Join(startupNames, ", "))
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
	if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", f.Name())
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

// versionAt is the zero version if nothing is there.
func versionAt(path string) fileVersion {
	info, err := os.Lstat(path)
	if err != nil {
		return fileVersion{}
	}
	return versionOf(info)
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
	case before.Size() != after.Size() || !before.ModTime().Equal(after.ModTime()): // a rename over it moves the ctime alone
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

// fileInfo is one file of `aexec config`, and what is wrong with it ("": nothing).
type fileInfo struct {
	Path    string `json:"path"`
	Mode    string `json:"mode"` // "" if it is not there
	Problem string `json:"problem"`
}

// configFiles looks at every file of the directory.
func configFiles(p paths) (files []fileInfo) {
	for _, path := range []string{p.dir, p.env, p.settings, p.plugins, p.audit, p.log, p.pid} {
		file := fileInfo{Path: path}
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = nil
		case err != nil:
		case info.IsDir():
			file.Mode, err = info.Mode().String(), checkTrustedDir(path)
		default:
			var f *os.File
			file.Mode = info.Mode().String()
			if f, err = openTrusted(path, os.O_RDONLY); err == nil {
				err = checkTrustedFile(f, path == p.env)
				f.Close()
			}
		}
		if err != nil {
			file.Problem = err.Error()
		}
		files = append(files, file)
	}
	return files
}
