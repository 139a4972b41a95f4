package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// configGolden compares with testdata/config/NAME.golden; AEXEC_UPDATE_GOLDEN=1 writes it instead.
func configGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", "config", name+".golden")
	if os.Getenv("AEXEC_UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is not as in %s:\n%s", name, file, got)
	}
}

// configDir is a directory as setup makes it.
func configDir(t testing.TB) paths {
	t.Helper()
	t.Setenv("AGENT_EXEC_CONFIG_DIR", filepath.Join(t.TempDir(), "conf"))
	p, err := configPaths()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := createConfig(p); err != nil {
		t.Fatal(err)
	}
	return p
}

func configWrite(t testing.TB, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func configRead(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// withoutDir takes what differs from run to run out of an error.
func withoutDir(p paths, err error) string {
	text := strings.ReplaceAll(fmt.Sprint(err), p.dir+"/", "")
	return strings.ReplaceAll(strings.ReplaceAll(text, p.dir, "DIR"), fmt.Sprintf("uid %d", os.Geteuid()), "uid ME")
}

func TestConfigPaths(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	real, link := filepath.Join(base, "real"), filepath.Join(base, "link")
	if err := os.Mkdir(real, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", base)
	t.Chdir(base)
	for variable, want := range map[string]string{"": filepath.Join(base, ".to-agent/agent-exec"), real: real, link: real, "relative": filepath.Join(base, "relative")} {
		t.Setenv("AGENT_EXEC_CONFIG_DIR", variable)
		p, err := configPaths()
		if err != nil || p.dir != want || p.settings != want+"/settings.json" || p.env != want+"/.env" || p.plugins != want+"/plugins" || p.audit != want+"/audit.jsonl" || p.pid != want+"/agent-exec.pid" || p.log != want+"/agent-exec.log" {
			t.Errorf("%q: %+v, %v", variable, p, err)
		}
	}
	for _, bad := range []string{"/tmp/a\x1b[31m", "/tmp/a\u202e", "/tmp/\xff", `/tmp/"`} {
		t.Setenv("AGENT_EXEC_CONFIG_DIR", bad)
		if p, err := configPaths(); err == nil || strings.Contains(err.Error(), bad) && bad != `/tmp/"` {
			t.Errorf("%q: %+v, %v", bad, p, err)
		}
	}
	t.Setenv("AGENT_EXEC_CONFIG_DIR", "")
	t.Setenv("HOME", "")
	if _, err := configPaths(); err == nil || !strings.Contains(err.Error(), "set HOME or AGENT_EXEC_CONFIG_DIR") {
		t.Errorf("without HOME: %v", err)
	}
}

func TestKeyNeverPrints(t *testing.T) {
	const secret = "correct-horse-battery"
	k, err := newAPIKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	outer := struct {
		Key   *apiKey
		Value apiKey
		inner startup
	}{k, *k, startup{key: k}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%b", "%c", "%U", "%e", "%T"} {
		for _, value := range []any{k, *k, outer, &outer, []*apiKey{k}, []apiKey{*k}, map[string]*apiKey{"a": k}} {
			text := fmt.Sprintf(verb, value)
			if strings.Contains(text, secret) || strings.Contains(text, fmt.Sprintf("%x", secret)) || strings.Contains(text, fmt.Sprintf("%X", secret)) {
				t.Errorf("%s shows the key: %s", verb, text)
			}
		}
	}
	if text, err := json.Marshal(outer); err != nil || strings.Contains(string(text), secret) {
		t.Errorf("JSON: %s, %v", text, err)
	}
	if got := k.redact("x" + secret + secret + "y"); got != "x[API_KEY][API_KEY]y" {
		t.Errorf("redacted: %s", got)
	}
	if got := k.id(); got != "sha256:622493693890" {
		t.Errorf("id %s", got)
	}
	if !k.matches(secret) || k.matches(secret[1:]) || k.matches(secret+"x") || k.matches("") || k.matches(redactedKey) {
		t.Error("matches what is not the key, or not the key")
	}
	for _, bad := range []string{"", "fifteen-chars-x", "a key with spaces in it", "schlüssel-schlüssel", "control\x01control-x", "sixteen-chars-xx\n"} {
		if k, err := newAPIKey(bad); err == nil || bad != "" && strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %v, %v", bad, k, err)
		}
	}
}

func TestEnvFile(t *testing.T) {
	p := configDir(t)
	var out strings.Builder
	for _, text := range []string{
		"API_KEY=abc\nHOST=::1\nPORT=0\n", "# comment\n\n  \t\nexport API_KEY=abc\r\nPORT = 80 \r\n", "API_KEY='a b#c' # why\nHOST=\"::1\"", "API_KEY=a#b #c\nHOST=x\t# y", "API_KEY=a=b==", "API_KEY=", "",
		"API_KEY=\"unclosed-secret", "API_KEY='closed'secret", "API_KEI=secret", "AGENT_EXEC_ENABLE=true", "AGENT_EXEC_CONFIG_DIR=/x", "secret", "=secret", "API_KEY=one\n\nAPI_KEY=secret", "api_key=secret", "\ufeffAPI_KEY=secret",
		"FOO=\x1b]0;secret", "AGENT_EXEC_ENABLED=true\nAGENT_EXEC_ENABLED=",
	} {
		configWrite(t, p.env, text, 0o600)
		values, err := readEnvFile(p)
		if fmt.Fprintf(&out, "%q\n    %q\n", text, values); err != nil {
			fmt.Fprintf(&out, "    %s\n", withoutDir(p, err))
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("%q: the error shows the value: %v", text, err)
			}
		}
	}
	configGolden(t, "env", out.String())
}

func TestStartupPrecedence(t *testing.T) {
	const file, env, flag = "key-of-the-file-0", "key-of-the-environment", "key-handed-over-00"
	p := configDir(t)
	load := func(text string, flags startupFlags, vars ...string) startup {
		t.Helper()
		configWrite(t, p.env, text, 0o600)
		for _, name := range startupNames {
			t.Setenv(name, "")
		}
		for _, kv := range vars {
			name, value, _ := strings.Cut(kv, "=")
			t.Setenv(name, value)
		}
		s, err := loadStartup(p, flags)
		if err != nil {
			t.Fatalf("%q %+v %q: %v", text, flags, vars, err)
		}
		return s
	}
	check := func(s startup, key string, inEnv bool, host string, port int, enabled, query bool) {
		t.Helper()
		if !s.key.matches(key) || s.keyInEnv != inEnv || s.host != host || s.port != port || s.enabled != enabled || s.allowQueryKey != query {
			t.Errorf("got %+v, want %q %v %s %d %v %v", s, key, inEnv, host, port, enabled, query)
		}
	}
	full := "API_KEY=" + file + "\nHOST=::1\nPORT=81\nAGENT_EXEC_ENABLED=true\nAGENT_EXEC_ALLOW_QUERY_API_KEY=true\n"
	check(load("API_KEY="+file, startupFlags{}), file, false, "127.0.0.1", 3333, false, false)
	check(load("HOST=\nPORT=\nAPI_KEY="+file, startupFlags{}), file, false, "127.0.0.1", 3333, false, false)
	check(load(full, startupFlags{}), file, false, "::1", 81, true, true)
	check(load(full, startupFlags{}, "HOST=10.0.0.1", "PORT=82", "AGENT_EXEC_ENABLED=yes", "AGENT_EXEC_ALLOW_QUERY_API_KEY=1", "API_KEY="+env), env, true, "10.0.0.1", 82, false, false)
	check(load(full, startupFlags{host: "0.0.0.0", port: "0"}, "HOST=10.0.0.1", "PORT=82"), file, false, "0.0.0.0", 0, true, true)
	check(load(full, startupFlags{port: "99"}), file, false, "::1", 99, true, true)
	check(load(full, startupFlags{key: flag}, "API_KEY="+env), flag, false, "::1", 81, true, true)
	if err := os.Remove(p.env); err != nil {
		t.Fatal(err)
	}
	t.Setenv("API_KEY", env)
	s, err := loadStartup(p, startupFlags{})
	if err != nil {
		t.Fatal(err)
	}
	check(s, env, true, "127.0.0.1", 3333, false, false)
	if kv := environWithoutKey(); slices.ContainsFunc(kv, func(kv string) bool { return strings.Contains(kv, env) }) || len(kv) == 0 {
		t.Errorf("environment %q", kv)
	}
}

func TestStartupErrors(t *testing.T) {
	p := configDir(t)
	var out strings.Builder
	try := func(what string) {
		t.Helper()
		_, err := loadStartup(p, startupFlags{})
		if err == nil {
			t.Errorf("%s: no error", what)
		}
		fmt.Fprintf(&out, "%s\n    %s\n", what, withoutDir(p, err))
	}
	for _, text := range []string{"", "API_KEY=short", "API_KEY='with spaces in the key'", "API_KEY=0123456789abcdef\nPORT=65536", "API_KEY=0123456789abcdef\nPORT=+1", "PORT=http\nAPI_KEY=0123456789abcdef", "API_KEY"} {
		configWrite(t, p.env, text, 0o600)
		try(fmt.Sprintf("%q", text))
	}
	configWrite(t, p.env, "API_KEY=0123456789abcdef", 0o640)
	try("readable by the group")
	configWrite(t, p.env, "API_KEY=0123456789abcdef", 0o600)
	if err := os.Chmod(p.dir, 0o770); err != nil {
		t.Fatal(err)
	}
	try("directory writable by the group")
	if err := os.RemoveAll(p.dir); err != nil {
		t.Fatal(err)
	}
	try("no directory")
	configGolden(t, "startup_errors", out.String())
}

func TestCreateConfig(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	p := configDir(t)
	for path, mode := range map[string]fs.FileMode{p.dir: 0o700 | fs.ModeDir, p.plugins: 0o700 | fs.ModeDir, p.env: 0o600, p.settings: 0o600} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, want %v, %v", path, info.Mode(), mode, err)
		}
	}
	entries, err := os.ReadDir(p.dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("something else is left: %v, %v", entries, err)
	}
	s, err := loadStartup(p, startupFlags{})
	if err != nil || !s.enabled || len(s.key.text) != 52 || s.host != "127.0.0.1" || s.port != 3333 || s.allowQueryKey {
		t.Errorf("made %+v with a key of %d characters, %v", s, len(s.key.text), err)
	}
	env := configRead(t, p.env)
	if err := os.Remove(p.settings); err != nil {
		t.Fatal(err)
	}
	made, kept, err := createConfig(p)
	if err != nil || !slices.Equal(made, []string{p.settings}) || !slices.Equal(kept, []string{p.dir, p.plugins, p.env}) || configRead(t, p.env) != env {
		t.Errorf("again: made %q, kept %q, %v", made, kept, err)
	}
	lost := p
	lost.settings = filepath.Join(p.dir, "none", "settings.json")
	if made, _, err := createConfig(lost); err == nil || len(made) != 0 {
		t.Errorf("said to be made, and it is not: %q, %v", made, err)
	}
	if other := configDir(t); configRead(t, other.env) == env {
		t.Error("two keys are the same")
	}
	if err := os.Chmod(p.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(p.env); err != nil {
		t.Fatal(err)
	}
	if made, _, err := createConfig(p); err == nil || len(made) != 0 {
		t.Errorf("a key was put where others can write: %q", made)
	}
}

func TestRotateKey(t *testing.T) {
	p := configDir(t)
	const line = "API_KEY=0123456789abcdef"
	for before, after := range map[string]string{
		line: "API_KEY=%s", "# a\r\n" + line + "\r\nPORT=1\n": "# a\r\nAPI_KEY=%s\nPORT=1\n", "PORT=1\nexport " + line + " # old\nHOST=x": "PORT=1\nexport API_KEY=%s\nHOST=x",
		"PORT=1\n": "API_KEY=%s\nPORT=1\n", "#" + line + "\n" + line + "\n": "#" + line + "\nAPI_KEY=%s\n", "API_KEY=\n": "API_KEY=%s\n", "  API_KEY = 'x'": "  API_KEY=%s",
	} {
		configWrite(t, p.env, before, 0o600)
		if err := rotateKey(p); err != nil {
			t.Fatal(err)
		}
		s, err := loadStartup(p, startupFlags{})
		if err != nil || len(s.key.text) != 52 {
			t.Fatalf("%q: %v", before, err)
		}
		if got := configRead(t, p.env); got != fmt.Sprintf(after, s.key.text) {
			t.Errorf("%q became %q, want %q", before, got, after)
		}
	}
	if err := os.Remove(p.env); err != nil {
		t.Fatal(err)
	}
	if err := rotateKey(p); err == nil || !strings.Contains(err.Error(), "aexec setup") || len(configNames(t, p.dir)) != 2 {
		t.Errorf("no .env: %v", err)
	}
}

func configNames(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestRotateIsAtomic reads while another rotates: every key that is seen is whole.
func TestRotateIsAtomic(t *testing.T) {
	p := configDir(t)
	done := make(chan error)
	go func() {
		var err error
		for range 50 {
			if e := rotateKey(p); e != nil {
				err = e
			}
		}
		done <- err
	}()
	for {
		s, err := loadStartup(p, startupFlags{})
		if err != nil || len(s.key.text) != 52 {
			t.Errorf("a key in between: %v", err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
	}
}

func TestTrust(t *testing.T) {
	p := configDir(t)
	file := func(mode fs.FileMode) func(string) error {
		return func(path string) error { configWrite(t, path, "text", mode); return nil }
	}
	dir := func(mode fs.FileMode) func(string) error {
		return func(path string) error {
			if err := os.Mkdir(path, 0o700); err != nil {
				return err
			}
			return os.Chmod(path, mode)
		}
	}
	owned := func(uid int) func(string) error {
		return func(path string) error { configWrite(t, path, "text", 0o600); return os.Chown(path, uid, -1) }
	}
	var out strings.Builder
	for _, c := range []struct {
		name string
		make func(string) error
		open string // of file, private, dir: the ones that trust it
	}{
		{"0600", file(0o600), "file private"},
		{"0400", file(0o400), "file private"},
		{"0700", file(0o700), "file private"},
		{"0644", file(0o644), "file"},
		{"0640", file(0o640), "file"},
		{"0604", file(0o604), "file"},
		{"0611", file(0o611), "file"},
		{"0620", file(0o620), ""},
		{"0602", file(0o602), ""},
		{"0666", file(0o666), ""},
		{"a fifo", func(path string) error { return syscall.Mkfifo(path, 0o600) }, ""},
		{"a link", func(path string) error { return os.Symlink(p.settings, path) }, ""},
		{"a link to a directory", func(path string) error { return os.Symlink(p.plugins, path) }, ""},
		{"a dangling link", func(path string) error { return os.Symlink("nowhere", path) }, ""},
		{"nothing", func(string) error { return nil }, ""},
		{"of 1 MiB", func(path string) error { configWrite(t, path, strings.Repeat(" ", 1<<20), 0o600); return nil }, ""},
		{"a byte less", func(path string) error { configWrite(t, path, strings.Repeat(" ", 1<<20-1), 0o600); return nil }, "file private"},
		{"directory 0700", dir(0o700), "dir"},
		{"directory 0755", dir(0o755), "dir"},
		{"directory 0775", dir(0o775), ""},
		{"directory 1777", dir(0o777 | fs.ModeSticky), ""},
		{"owner 12345", owned(12345), ""},
	} {
		path := filepath.Join(p.dir, "it")
		os.RemoveAll(path)
		if err := c.make(path); err != nil {
			if os.Geteuid() != 0 && strings.HasPrefix(c.name, "owner") {
				continue // only root can give a file away; the golden file has it all the same
			}
			t.Fatal(err)
		}
		_, fileErr := readTrusted(path, guarded)
		_, privateErr := readTrusted(path, private)
		dirErr := checkTrustedDir(path)
		fmt.Fprintf(&out, "%s\n", c.name)
		for kind, err := range map[string]error{"file": fileErr, "private": privateErr, "dir": dirErr} {
			if (err == nil) != slices.Contains(strings.Fields(c.open), kind) {
				t.Errorf("%s as %s: %v", c.name, kind, err)
			}
		}
		for _, err := range []error{fileErr, privateErr, dirErr} {
			fmt.Fprintf(&out, "    %s\n", withoutDir(p, err))
		}
	}
	if os.Geteuid() == 0 {
		configGolden(t, "trust", strings.ReplaceAll(out.String(), "chown 0", "chown ME"))
	}
}

func TestTrustedDevice(t *testing.T) {
	if _, err := readTrusted("/dev/zero", guarded); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("/dev/zero: %v", err)
	}
}

// TestRewriteFile: the file is replaced, not written over, and a failure leaves it alone and nothing beside it.
func TestRewriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	configWrite(t, path, "old", 0o644)
	old, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := rewriteFile(path, []byte("new")); err != nil {
		t.Fatal(err)
	}
	text := make([]byte, 10)
	n, _ := old.Read(text)
	info, err := os.Stat(path)
	if err != nil || string(text[:n]) != "old" || configRead(t, path) != "new" || info.Mode() != 0o644 {
		t.Errorf("%q, %q, %v, %v", text[:n], configRead(t, path), info.Mode(), err)
	}
	blocked := filepath.Join(dir, "directory")
	if err := os.MkdirAll(filepath.Join(blocked, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := rewriteFile(blocked, []byte("new")); err == nil || len(configNames(t, dir)) != 2 {
		t.Errorf("replaced a directory, or left something: %v, %q", err, configNames(t, dir))
	}
}

// TestEditKeepsTheGroup: a server that reads its settings as their group (root:aexec 0640) must still do so after root's acl add.
func TestEditKeepsTheGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files to any group")
	}
	const group = 65534
	path := filepath.Join(t.TempDir(), "settings.json")
	configWrite(t, path, "old", 0o640)
	if err := os.Chown(path, -1, group); err != nil {
		t.Fatal(err)
	}
	if err := rewriteFile(path, []byte("new")); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if gid, mode := info.Sys().(*syscall.Stat_t).Gid, info.Mode().Perm(); gid != group || mode != 0o640 {
		t.Errorf("after the edit: group %d, mode %04o", gid, mode)
	}
}
