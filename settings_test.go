package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestSettingsDefaults(t *testing.T) {
	p := paths{settings: "settings.json", audit: "/c/audit.jsonl"}
	everywhere := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	want := settings{
		IPAllow: everywhere, Timeout: 2 * time.Minute, KillGrace: time.Second, MaxOutputBytes: 1 << 20, MaxStreamBytes: 1 << 20,
		MaxConcurrentExec: 4, MaxRequestBodyBytes: 1 << 20, RateLimitWindow: time.Minute, AuditEnabled: true, AuditFile: "/c/audit.jsonl", PluginsMode: "auto",
	}
	want.EnvKeep, want.PluginsEnabled, want.PluginsDisabled = []string{}, []string{}, []string{}
	want.Deny, want.TestsAllowed, want.TestsRefused = []ruleSpec{}, []ruleSpec{}, []ruleSpec{}
	want.EnvSet, want.NoNewPrivileges = map[string]string{}, true
	for text, allow := range map[string][]ruleSpec{"{}": {}, defaultSettings: {}, `{"exec":{"allow":["a"]}}`: {{Text: "a"}}} {
		got, err := parseSettings(p, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		got.source, want.Allow = nil, allow
		if !reflect.DeepEqual(*got, want) {
			t.Errorf("got %+v\nwant %+v", *got, want)
		}
	}
}

func TestSettingsRead(t *testing.T) {
	const text = `{
	"_": "a comment", "_exec": {"allow": ["*"]},
	"exec": {"_allow": 1, "allow": ["a *", ["b", "c"], []], "deny": ["/x/"], "cwd": "/tmp", "user": "me", "noNewPrivileges": false,
		"tests": {"allowed": ["a b  c", ["a b"], ""], "refused": [[]]}, "env": {"keep": ["A", "B_*", "*"], "set": {"_C": 1, "D": "d=\n", "PATH": ""}},
		"limits": {"cpuSeconds": 1, "memoryBytes": 2, "fileBytes": 3, "openFiles": 4, "processes": 5}},
	"ip": {"allow": ["10.1.2.3/8", "::1", "::ffff:1.2.3.4", "::ffff:192.168.0.0/112", "fe80::/10"], "deny": "192.0.2.1"},
	"timeoutMs": 1, "killGraceMs": 2, "maxOutputBytes": 3, "maxStreamBytes": 4, "maxConcurrentExec": 5, "maxRequestBodyBytes": 6,
	"rateLimit": {"windowMs": 7, "max": 8}, "audit": {"enabled": false, "file": "/var/log/x"},
	"plugins": {"mode": "explicit", "enabled": ["a", "0-b"], "disabled": ["b"]}
}`
	got, err := parseSettings(paths{settings: "settings.json"}, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParsePrefix
	want := settings{
		IPAllow: []netip.Prefix{ip("10.0.0.0/8"), ip("::1/128"), ip("1.2.3.4/32"), ip("192.168.0.0/16"), ip("fe80::/10")}, IPDeny: []netip.Prefix{ip("192.0.2.1/32")},
		Timeout: time.Millisecond, KillGrace: 2 * time.Millisecond, MaxOutputBytes: 3, MaxStreamBytes: 4, MaxConcurrentExec: 5, MaxRequestBodyBytes: 6,
		RateLimitWindow: 7 * time.Millisecond, RateLimitMax: 8, AuditFile: "/var/log/x", PluginsMode: "explicit", PluginsEnabled: []string{"a", "0-b"}, PluginsDisabled: []string{"b"},
	}
	e := &want
	e.Allow, e.Deny = []ruleSpec{{Text: "a *"}, {Argv: []string{"b", "c"}}, {Argv: []string{}}}, []ruleSpec{{Text: "/x/"}}
	e.TestsAllowed, e.TestsRefused = []ruleSpec{{Text: "a b  c"}, {Argv: []string{"a b"}}, {Text: ""}}, []ruleSpec{{Argv: []string{}}}
	e.Cwd, e.User, e.EnvKeep, e.EnvSet = "/tmp", "me", []string{"A", "B_*", "*"}, map[string]string{"D": "d=\n", "PATH": ""}
	e.rlimits = rlimits{1, 2, 3, 4, 5}
	if got.source = nil; !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v\nwant %+v", *got, want)
	}
}

func TestSettingsErrors(t *testing.T) {
	var out strings.Builder
	for _, text := range []string{
		``, `{`, `[]`, `null`, `"x"`, `{} {}`, "{\n  \"timeoutMs\": 1,\n  \"timeoutMs\": 2\n}", `{"exec":{"allow":[],"allow":[]}}`, "\ufeff{}", "{\n\"ip\": {\"allow\": [\"\xff\"]}}",
		`{"timeoutms":1}`, `{"Exec":{}}`, `{"exec":{"ALLOW":[]}}`, `{"exec":{"limits":{"CPUSeconds":1}}}`, `{"exec":{"colour":1}}`, "{\"\\u001b[31m\u202e\":1}", `{"exec.allow":[]}`, `{"exec":{"allow ":[]}}`, `{"exec":{"env":{"unset":[]}}}`,
		`{"exec":[]}`, `{"exec":null}`, `{"exec":{"allow":"ls"}}`, `{"exec":{"allow":null}}`, `{"exec":{"allow":[1]}}`, `{"exec":{"allow":[["a",["b"]]]}}`, `{"exec":{"allow":["a",{}]}}`, `{"exec":{"noNewPrivileges":1}}`, `{"exec":{"noNewPrivileges":"true"}}`,
		`{"exec":{"deny":["\ud800"]}}`, `{"exec":{"deny":["a\u0000b"]}}`, `{"exec":{"tests":{"allowed":[1]}}}`, `{"exec":{"tests":[]}}`,
		`{"exec":{"cwd":"tmp"}}`, `{"exec":{"cwd":"~/x\u001b"}}`, `{"exec":{"cwd":null}}`, `{"exec":{"user":1}}`, `{"audit":{"file":"audit.jsonl"}}`, `{"audit":{"enabled":"yes"}}`,
		`{"exec":{"env":{"keep":[""]}}}`, `{"exec":{"env":{"keep":["A*B"]}}}`, `{"exec":{"env":{"keep":["A=B"]}}}`, `{"exec":{"env":{"keep":"A"}}}`,
		`{"exec":{"env":{"set":{"":"x"}}}}`, `{"exec":{"env":{"set":{"A=B":"x"}}}}`, `{"exec":{"env":{"set":{"A":1}}}}`, `{"exec":{"env":{"set":{"A":"\u0000"}}}}`, `{"exec":{"env":{"set":["A=1"]}}}`,
		`{"ip":{"allow":"localhost"}}`, `{"ip":{"allow":""}}`, `{"ip":{"allow":["1.2.3"]}}`, `{"ip":{"allow":["10.0.0.0/33"]}}`, `{"ip":{"deny":["fe80::1%eth0"]}}`, `{"ip":{"deny":["fe80::1%eth0/64"]}}`, `{"ip":{"deny":["::ffff:0.0.0.0/90"]}}`, `{"ip":{"deny":[1]}}`, `{"ip":{"deny":[["10.0.0.1"]]}}`, `{"ip":{"deny":["10.0.0.1",[]]}}`, `{"ip":{"deny":{}}}`, `{"ip":{"allow":null}}`, `{"ip":{"allow":["10.0.0.0/08"]}}`, `{"ip":{"allow":["127.0.0.1:80"]}}`,
		`{"plugins":{"mode":"all"}}`, `{"plugins":{"enabled":"x"}}`,
		`{"timeoutMs":"1"}`, `{"timeoutMs":1.5}`, `{"timeoutMs":1e3}`, `{"timeoutMs":-1}`, `{"timeoutMs":0}`, `{"timeoutMs":1000000000001}`, `{"timeoutMs":99999999999999999999}`, `{"timeoutMs":null}`, `{"timeoutMs":1,}`,
	} {
		s, err := parseSettings(paths{settings: "settings.json"}, []byte(text))
		if err == nil || s != nil && !strings.HasPrefix(err.Error(), "settings.json:") {
			t.Errorf("%s: %v", text, err)
		}
		fmt.Fprintf(&out, "%.100q\n    %v\n", text, err)
	}
	configGolden(t, "settings_errors", out.String())
}

// settingsText nests dotted values.
func settingsText(values map[string]any) string {
	root := map[string]any{}
	for key, value := range values {
		at, path := root, strings.Split(key, ".")
		for _, name := range path[:len(path)-1] {
			if at[name] == nil {
				at[name] = map[string]any{}
			}
			at = at[name].(map[string]any)
		}
		at[path[len(path)-1]] = value
	}
	text, err := json.Marshal(root)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func TestSettingsRanges(t *testing.T) {
	const most = 1_000_000_000_000
	for _, key := range []string{
		"timeoutMs", "killGraceMs", "maxOutputBytes", "maxStreamBytes", "maxConcurrentExec", "maxRequestBodyBytes", "rateLimit.windowMs", "-rateLimit.max",
		"-exec.limits.cpuSeconds", "-exec.limits.memoryBytes", "-exec.limits.fileBytes", "-exec.limits.openFiles", "-exec.limits.processes",
	} {
		key, zero := strings.CutPrefix(key, "-")
		for value, good := range map[int64]bool{-1: false, 0: zero, 1: true, most: true, most + 1: false} {
			if _, err := parseSettings(paths{settings: "settings.json"}, []byte(settingsText(map[string]any{key: value}))); (err == nil) != good || err != nil && !strings.Contains(err.Error(), ": "+key+": ") {
				t.Errorf("%s %d: %v", key, value, err)
			}
		}
	}
}

func FuzzSettings(f *testing.F) {
	f.Add(defaultSettings)
	f.Add(`{"exec":{"allow":[["a","b"],"c *"],"tests":{"refused":["rm -rf /"]},"env":{"keep":["X*"],"set":{"A":"b"}}},"ip":{"allow":["::ffff:1.2.3.4/100"],"deny":"*"}}`)
	f.Add(`{"_x":{"y":[1]},"rateLimit":{"windowMs":1,"max":2},"plugins":{"mode":"explicit","enabled":["a"]}}`)
	f.Fuzz(func(t *testing.T, text string) {
		p := paths{settings: "settings.json", audit: "/audit"}
		s, err := parseSettings(p, []byte(text))
		if err != nil {
			if !strings.HasPrefix(err.Error(), "settings.json:") {
				t.Fatalf("%q: the error names no file: %v", text, err)
			}
			return
		}
		values := map[string]any{}
		for _, row := range configTable(paths{}, startup{}, s) {
			if row.Change != "" {
				values[row.Name] = row.Value
			}
		}
		again, err := parseSettings(p, []byte(settingsText(values)))
		if err != nil {
			t.Fatalf("%q as the table has it: %v", text, err)
		}
		if again.source, s.source = nil, nil; !reflect.DeepEqual(again, s) {
			t.Fatalf("%q: %+v became %+v", text, s, again)
		}
	})
}

func TestIPAllowed(t *testing.T) {
	for _, c := range []struct{ allow, deny, yes, no string }{
		{`"*"`, `[]`, "127.0.0.1 ::1 ::ffff:10.0.0.1 fe80::1%eth0", ""},
		{`[]`, `[]`, "", "127.0.0.1 ::1 ::ffff:127.0.0.1"},
		{`"127.0.0.1"`, `[]`, "127.0.0.1 ::ffff:127.0.0.1", "127.0.0.2 ::1 ::127.0.0.1"},
		{`"*"`, `["10.0.0.0/8", "fe80::/10"]`, "11.0.0.1 2001:db8::1", "10.1.2.3 ::ffff:10.1.2.3 fe80::1%eth0 fe80::1 ::ffff:10.1.2.3%eth0"},
		{`["::ffff:10.0.0.0/104"]`, `["10.9.0.0/16"]`, "10.1.1.1 ::ffff:10.1.1.1", "10.9.1.1 ::ffff:10.9.1.1 11.1.1.1"},
		{`"*"`, `"*"`, "", "127.0.0.1 ::1 ::ffff:1.2.3.4"},
		{`"fe80::/10"`, `"fe80::2"`, "fe80::1%eth0 fe80::1", "fe80::2%eth0 127.0.0.1"},
	} {
		s, err := parseSettings(paths{settings: "settings.json"}, fmt.Appendf(nil, `{"ip":{"allow":%s,"deny":%s}}`, c.allow, c.deny))
		if err != nil {
			t.Fatal(err)
		}
		snap := &snapshot{settings: *s}
		for want, list := range map[bool]string{true: c.yes, false: c.no} {
			for _, peer := range strings.Fields(list) {
				if snap.ipAllowed(netip.MustParseAddr(peer)) != want {
					t.Errorf("allow %s, deny %s: %s is not %v", c.allow, c.deny, peer, want)
				}
			}
		}
	}
	all := &snapshot{settings: settings{IPAllow: []netip.Prefix{netip.MustParsePrefix("::/0")}}}
	if all.ipAllowed(netip.Addr{}) {
		t.Error("no address at all is admitted")
	}
}

// TestSnapshotErrors: what only shows when the settings are put into force names its place, too.
func TestSnapshotErrors(t *testing.T) {
	p := configDir(t)
	plugins := []ruleSet{{Source: "plugin:tool", Command: "tool", Allow: []ruleSpec{{Text: "tool --version"}}}}
	var out strings.Builder
	for _, text := range []string{
		"{\"exec\": {\"allow\": [\n  \"ls\",\n  \"/(/\"\n]}}", `{"exec":{"deny":["/^sudo/i"]}}`, `{"exec":{"allow":[[]]}}`, `{"exec":{"allow":[""]}}`,
		"{\"exec\": {\"allow\": [\"ls *\"], \"deny\": [\"ls -R\"], \"tests\": {\"allowed\": [\n\"ls a\",\n\"ls -R\"]}}}", `{"exec":{"allow":["ls *"],"tests":{"refused":[["ls","\u001b"]]}}}`, `{"exec":{"tests":{"allowed":["pwd"]}}}`, `{"exec":{"tests":{"allowed":[""]}}}`,
		`{"exec":{"tests":{"refused":["tool --version"]}}}`, `{"exec":{"tests":{"allowed":["tool --version"]}},"plugins":{"disabled":["tool"]}}`, `{"exec":{"cwd":"/no/such/directory"}}`, `{"exec":{"cwd":"/etc/passwd"}}`,
	} {
		s, err := newSnapshot(p, []byte(text), plugins)
		if err == nil || s != nil {
			t.Errorf("%s: a snapshot, %v", text, err)
		}
		fmt.Fprintf(&out, "%q\n    %s\n", text, withoutDir(p, err))
	}
	configGolden(t, "snapshot_errors", out.String())
	for _, text := range []string{`{"exec":{"tests":{"allowed":["tool --version"],"refused":["tool -v","",[]]}}}`, `{"exec":{"tests":{"refused":["tool --version"]}},"plugins":{"disabled":["tool"]}}`,
		`{"exec":{"allow":[["a","b","","c"]],"tests":{"allowed":["a b  c"],"refused":["a b c",["a b  c"]]}}}`} {
		if _, err := newSnapshot(p, []byte(text), plugins); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestEnvironmentIsBuilt(t *testing.T) {
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		t.Setenv(name, "") // puts it back afterwards
		os.Unsetenv(name)
	}
	for name, value := range map[string]string{
		"API_KEY": "the-secret", "AGENT_EXEC_CONFIG_DIR": "/c", "HOME": "/home/me", "LANG": "C", "LC_ALL": "C", "LC_TIME": "C", "LD_PRELOAD": "/evil", "PATH": ":bin:/usr/bin::./x:/bin:", "KEPT": "1", "KEEP_A": "2", "KEEP": "3",
		"XDG": "4", "TZ": "UTC", "HOST": "h", "BASH_FUNC_x%%": "() { :; }", "SET": "server",
	} {
		t.Setenv(name, value)
	}
	for _, c := range []struct{ text, env, dirs string }{
		{`{}`, "HOME=/home/me LANG=C LC_ALL=C LC_TIME=C PATH=/usr/bin:/bin TZ=UTC", "/usr/bin /bin"},
		{`{"exec":{"env":{"keep":["KEPT","KEEP_*"],"set":{"SET":"x","HOME":"/h","EMPTY":""}}}}`, "EMPTY= HOME=/h KEEP_A=2 KEPT=1 LANG=C LC_ALL=C LC_TIME=C PATH=/usr/bin:/bin SET=x TZ=UTC", "/usr/bin /bin"},
		{`{"exec":{"env":{"keep":["A*","API_KEY","AGENT_EXEC_*"],"set":{"PATH":"x","API_KEY":"y","AGENT_EXEC_ENABLED":"true"}}}}`, "HOME=/home/me LANG=C LC_ALL=C LC_TIME=C PATH=x TZ=UTC", "/usr/bin /bin"},
	} {
		s, err := newSnapshot(paths{settings: "settings.json"}, []byte(c.text), nil)
		if err != nil || strings.Join(s.env, " ") != c.env || strings.Join(s.pathDirs, " ") != c.dirs {
			t.Errorf("%s: %v\n%q in %q\nwant %s", c.text, err, s.env, s.pathDirs, c.env)
		}
	}
	s, err := newSnapshot(paths{settings: "settings.json"}, []byte(`{"exec":{"env":{"keep":["*"]}}}`), nil)
	if err != nil || slices.ContainsFunc(s.env, func(kv string) bool {
		return strings.HasPrefix(kv, "API_KEY") || strings.HasPrefix(kv, "AGENT_EXEC_") || strings.Contains(kv, "the-secret")
	}) || !slices.Contains(s.env, "XDG=4") {
		t.Errorf("keeping everything: %q, %v", s.env, err)
	}
	for _, path := range []string{"", ":", "bin:."} {
		t.Setenv("PATH", path)
		if s, err := newSnapshot(paths{settings: "settings.json"}, []byte(`{}`), nil); err != nil || strings.Join(s.pathDirs, ":") != defaultPath || !slices.Contains(s.env, "PATH="+defaultPath) {
			t.Errorf("PATH %q: %q, %v", path, s.pathDirs, err)
		}
	}
}

func TestExecUser(t *testing.T) {
	p := configDir(t)
	s, err := newSnapshot(p, []byte(`{"exec":{"user":"nobody"}}`), nil)
	if os.Geteuid() != 0 {
		if err == nil || !strings.Contains(err.Error(), "settings.json:1:17: exec.user: ") || !strings.Contains(err.Error(), "started as root") {
			t.Errorf("without root: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	c := s.cred
	if c.Uid == 0 || c.Gid == 0 || c.Name != "nobody" || c.Home == "" || !filepath.IsAbs(c.Shell) || !slices.Contains(c.Groups, c.Gid) || slices.Contains(c.Groups, 0) {
		t.Errorf("nobody is %+v", c)
	}
	for _, kv := range []string{"HOME=" + c.Home, "USER=nobody", "LOGNAME=nobody", "SHELL=" + c.Shell} {
		if !slices.Contains(s.env, kv) {
			t.Errorf("%s is not in %q", kv, s.env)
		}
	}
	if _, err := newSnapshot(p, []byte(`{"exec":{"user":"no-such-user"}}`), nil); err == nil || !strings.Contains(err.Error(), `exec.user: user: unknown user no-such-user`) {
		t.Errorf("unknown user: %v", err)
	}
}

func TestRestartValues(t *testing.T) {
	p := configDir(t)
	base, err := restartState(p)
	if err != nil || len(base) != 10 || base["API_KEY"] == "" || base["rateLimit.max"] == "" || base["PORT"] == "" {
		t.Fatalf("%v, %v", base, err)
	}
	for _, c := range []struct{ file, text, changed string }{
		{p.settings, `{"exec":{"deny":["x"]},"timeoutMs":5,"audit":{"enabled":false},"plugins":{"disabled":["x"]}}`, ""},
		{p.settings, `{"rateLimit":{"max":5}}`, "rateLimit.max"},
		{p.settings, `{"rateLimit":{"windowMs":5}}`, "rateLimit.windowMs"},
		{p.settings, `{"maxRequestBodyBytes":5}`, "maxRequestBodyBytes"},
		{p.settings, `{"plugins":{"mode":"explicit"}}`, "plugins.mode"},
		{p.settings, `{"plugins":{"enabled":["x"]}}`, "plugins.enabled"},
		{p.env, strings.Replace(configRead(t, p.env), "3333", "3334", 1), "PORT"},
		{p.env, strings.Replace(configRead(t, p.env), "API_KEY=", "API_KEY=0", 1), "API_KEY"},
		{p.env, configRead(t, p.env) + "# more\n", ""},
	} {
		old := configRead(t, c.file)
		configWrite(t, c.file, c.text, 0o600)
		now, err := restartState(p)
		if err != nil {
			t.Fatal(err)
		}
		for name := range maps.Keys(base) {
			if (base[name] != now[name]) != (name == c.changed) {
				t.Errorf("%s: %s was %q and is %q", c.text, name, base[name], now[name])
			}
		}
		configWrite(t, c.file, old, 0o600)
	}
}

func TestEditRules(t *testing.T) {
	p := configDir(t)
	original := configRead(t, p.settings)
	edit := func(list string, rule ruleSpec, remove bool, want string) {
		t.Helper()
		before := configRead(t, p.settings)
		s, err := loadSettings(p)
		if err == nil {
			err = editRules(p, s, list, rule, remove, nil)
		}
		switch got := configRead(t, p.settings); {
		case want == "" && err != nil:
			t.Errorf("%v: %v", rule, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || got != before):
			t.Errorf("%v: %v, want %s; written: %v", rule, err, want, got != before)
		}
	}
	if err := os.Chmod(p.settings, 0o640); err != nil {
		t.Fatal(err)
	}
	edit("allow", ruleSpec{Text: "pwd"}, false, "")
	edit("allow", ruleSpec{Argv: []string{"git", "log", "<&>"}}, false, "")
	edit("deny", ruleSpec{Text: "/^sudo/"}, false, "")
	want := strings.Replace(strings.Replace(original, `["aexec --version"]`, `["aexec --version", "pwd", ["git","log","<&>"]]`, 1), `"deny": []`, `"deny": ["/^sudo/"]`, 1)
	info, err := os.Stat(p.settings)
	if got := configRead(t, p.settings); err != nil || got != want || info.Mode() != 0o640 {
		t.Errorf("mode %v, %v, got\n%s\nwant\n%s", info.Mode(), err, got, want)
	}
	edit("allow", ruleSpec{Text: "pwd"}, false, `nothing to change in exec.`)
	edit("deny", ruleSpec{Text: "pwd"}, true, `nothing to change in exec.`)
	edit("allow", ruleSpec{Text: `["git","log","<&>"]`}, true, "nothing to change in exec.")
	edit("allow", ruleSpec{Text: "/(/"}, false, p.settings+":4:62: exec.allow: rule")
	edit("allow", ruleSpec{Text: "a\x00"}, false, "NUL")
	edit("allow", ruleSpec{Text: "pwd"}, true, "")
	edit("allow", ruleSpec{Argv: []string{"git", "log", "<&>"}}, true, "")
	edit("deny", ruleSpec{Text: "/^sudo/"}, true, "")
	if got := configRead(t, p.settings); got != original {
		t.Errorf("there and back:\n%s", got)
	}
	configWrite(t, p.settings, `{"exec":{"allow":["a","/(/"],"tests":{"allowed":["a"]}}}`, 0o600)
	edit("allow", ruleSpec{Text: "b"}, false, "exec.allow: rule")
	edit("allow", ruleSpec{Text: "/(/"}, true, "") // a rule that does not compile can be taken out
	edit("allow", ruleSpec{Text: "a"}, true, "decided otherwise")
	configWrite(t, p.settings, "{\n}}", 0o600)
	edit("allow", ruleSpec{Text: "b"}, false, p.settings+":2:2: ")
	configWrite(t, p.settings, "{}", 0o620)
	edit("allow", ruleSpec{Text: "b"}, false, "chmod")
	if names := configNames(t, p.dir); len(names) != 3 {
		t.Errorf("something is left behind: %q", names)
	}
}

func TestEditPluginState(t *testing.T) {
	p := configDir(t)
	if err := os.Mkdir(filepath.Join(p.plugins, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		before string
		enable bool
		after  string // "": an error
	}{
		{`{}`, false, `{"plugins": { "disabled": ["x"] }}`},
		{`{"plugins":{"disabled":["a"]}}`, false, `{"plugins":{"disabled":["a", "x"]}}`},
		{`{"plugins":{"disabled":["x"]}}`, false, ""},
		{`{"plugins":{"disabled":["x", "a"]}}`, true, `{"plugins":{"disabled":["a"]}}`},
		{`{}`, true, ""},
		{`{"plugins":{"mode":"explicit","enabled":["a"],"disabled":["x"]}}`, true, `{"plugins":{"mode":"explicit","enabled":["a", "x"],"disabled":[]}}`},
		{`{"plugins":{"mode":"explicit"}}`, true, `{"plugins":{"mode":"explicit", "enabled": ["x"]}}`},
		{`{"plugins":{"mode":"explicit","enabled":["x"]}}`, true, ""},
		{`{"plugins":{"mode":"explicit","enabled":["x"]}}`, false, `{"plugins":{"mode":"explicit","enabled":["x"], "disabled": ["x"]}}`},
		{`{"plugins":[]}`, false, ""},
	} {
		configWrite(t, p.settings, c.before, 0o600)
		s, err := loadSettings(p)
		if err == nil {
			err = editPlugin(p, s, "x", map[bool]string{true: "enable", false: "disable"}[c.enable])
		}
		want := c.after
		if want == "" {
			want = c.before
		}
		if got := configRead(t, p.settings); got != want || (err == nil) != (c.after != "") {
			t.Errorf("%s, enable %v: %v, %s", c.before, c.enable, err, got)
		}
	}
}

func openStore(p paths, plugins []ruleSet) (*store, error) {
	s := &store{p: p, plugins: plugins}
	_, _, err := s.current()
	return s, err
}

// storeWith opens a store on settings with the given time-out.
func storeWith(t *testing.T, ms int) (paths, *store) {
	t.Helper()
	p := configDir(t)
	configWrite(t, p.settings, fmt.Sprintf(`{"timeoutMs":%d}`, ms), 0o600)
	s, err := openStore(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p, s
}

func expectState(t *testing.T, s *store, ms int, want bool, fault string) {
	t.Helper()
	snap, event, err := s.current()
	switch {
	case fault != "" && (snap != nil || err == nil || !strings.Contains(err.Error(), fault)):
		t.Errorf("got %v, %v, want an error with %q", snap, err, fault)
	case fault == "" && (err != nil || snap.Timeout != time.Duration(ms)*time.Millisecond):
		t.Errorf("got %v, want %d ms", err, ms)
	}
	if event != want {
		t.Errorf("news %v, want %v", event, want)
	}
}

func TestStoreFollowsTheFile(t *testing.T) {
	p, s := storeWith(t, 1000)
	expectState(t, s, 1000, false, "")
	held, _, _ := s.current()
	configWrite(t, p.settings, `{"timeoutMs":2000}`, 0o600) // of the same size
	expectState(t, s, 2000, true, "")
	expectState(t, s, 2000, false, "")
	if held.Timeout != time.Second {
		t.Error("a snapshot that somebody held has changed")
	}
	for _, c := range []struct {
		change func() error
		fault  string
	}{
		{func() error { return os.Remove(p.settings) }, "no such file"},
		{func() error { return os.WriteFile(p.settings, []byte(`{"timeoutMs":`), 0o600) }, ":1:13: "},
		{func() error { return os.WriteFile(p.settings, nil, 0o600) }, "unexpected end"},
		{func() error { return os.WriteFile(p.settings, []byte(`{"timeoutMs":0}`), 0o600) }, "timeoutMs: must be"},
		{func() error { return os.Chmod(p.settings, 0o606) }, "chmod go-w"},
		{func() error { return errors.Join(os.Remove(p.settings), os.Symlink("/etc/passwd", p.settings)) }, "symbolic link"},
		{func() error { return errors.Join(os.Remove(p.settings), os.Mkdir(p.settings, 0o700)) }, "not a regular file"},
	} {
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		expectState(t, s, 0, true, c.fault)
		expectState(t, s, 0, false, c.fault)
	}
	if err := os.Remove(p.settings); err != nil {
		t.Fatal(err)
	}
	if err := rewriteFile(p.settings, []byte(`{"timeoutMs":2000}`)); err != nil {
		t.Fatal(err)
	}
	expectState(t, s, 2000, true, "") // as before the trouble, and yet news: it is in force again
	expectState(t, s, 2000, false, "")
}

// TestStoreSeesEveryRewrite: neither the same size nor a modification time put back hides a change.
func TestStoreSeesEveryRewrite(t *testing.T) {
	p, s := storeWith(t, 1000)
	then := time.Now().Add(-time.Hour)
	if err := os.Chtimes(p.settings, then, then); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		expectState(t, s, 1000+i, i > 0, "")
		configWrite(t, p.settings, fmt.Sprintf(`{"timeoutMs":%d}`, 1001+i), 0o600)
		if err := os.Chtimes(p.settings, then, then); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStoreWithoutChange: a file that was only touched is no news, and what has settled is not read again.
func TestStoreWithoutChange(t *testing.T) {
	p, s := storeWith(t, 1000)
	if err := os.Chtimes(p.settings, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	expectState(t, s, 1000, false, "")
	for deadline := time.Now().Add(10 * time.Second); s.version.changed == 0; s.current() {
		if time.Now().After(deadline) {
			t.Fatal("the state never settles")
		}
	}
	s.snapshot.source.text = "" // if the file is read, it says something else
	expectState(t, s, 1000, false, "")
}

// TestStoreRetriesErrors: the reason of an error may lie outside of the file.
func TestStoreRetriesErrors(t *testing.T) {
	p, s := storeWith(t, 1000)
	dir := filepath.Join(p.dir, "later")
	configWrite(t, p.settings, settingsText(map[string]any{"exec.cwd": dir, "timeoutMs": 3000}), 0o600)
	expectState(t, s, 0, true, "exec.cwd: ")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	expectState(t, s, 3000, true, "")
}

func TestStoreAtStart(t *testing.T) {
	p, _ := storeWith(t, 1000)
	configWrite(t, p.settings, `{"timeoutMs":-1}`, 0o600)
	if _, err := openStore(p, nil); err == nil || !strings.Contains(err.Error(), p.settings+":1:14: timeoutMs: ") {
		t.Errorf("bad settings: %v", err)
	}
	configWrite(t, p.settings, `{}`, 0o600)
	if err := os.Chmod(p.dir, 0o722); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(p, nil); err == nil || !strings.Contains(err.Error(), "chmod go-w") {
		t.Errorf("a directory where others can write: %v", err)
	}
}

func TestStorePlugins(t *testing.T) {
	p, _ := storeWith(t, 1000)
	s, err := openStore(p, []ruleSet{{Source: "plugin:tool", Command: "tool", Allow: []ruleSpec{{Text: "tool -v"}}}})
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{`{}`: true, `{"plugins":{"disabled":["tool"]}}`: false, `{"plugins":{"disabled":["too"]}}`: true} {
		configWrite(t, p.settings, text, 0o600)
		snap, _, err := s.current()
		if err != nil {
			t.Fatal(err)
		}
		if _, d := snap.policy.decide([]string{"tool", "-v"}); d.Allowed != want || snap.disabled("tool") == want {
			t.Errorf("%s: allowed %v, disabled %v", text, d.Allowed, snap.disabled("tool"))
		}
	}
}

// TestStoreEventsOnce: of many who look at once, one is told.
func TestStoreEventsOnce(t *testing.T) {
	p, s := storeWith(t, 1000)
	for i := range 20 {
		bad := i%2 == 0
		configWrite(t, p.settings, map[bool]string{true: `{"timeoutMs":0}`, false: `{"timeoutMs":1000}`}[bad], 0o600)
		var told atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				_, event, err := s.current()
				if event {
					told.Add(1)
				}
				if (err != nil) != bad {
					t.Errorf("round %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if told.Load() != 1 {
			t.Errorf("round %d: told %d", i, told.Load())
		}
	}
}

// TestStoreRace: while one rewrites the file, by rename and in place, others see either version whole, or an error, never a mixture.
func TestStoreRace(t *testing.T) {
	p, s := storeWith(t, 1000)
	version := func(i int) []byte {
		return []byte(settingsText(map[string]any{"timeoutMs": 1000 + i, "killGraceMs": 1000 + i, "exec.allow": []string{fmt.Sprintf("run %d", 1000+i)}, "_padding": strings.Repeat("x", 10000*i)}))
	}
	var stop atomic.Bool
	var seen [2]atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				snap, _, err := s.current()
				if err != nil {
					continue
				}
				n := int(snap.Timeout / time.Millisecond)
				_, d := snap.policy.decide([]string{"run", fmt.Sprint(n)})
				if snap.KillGrace != snap.Timeout && len(snap.Allow) > 0 || len(snap.Allow) > 0 && !d.Allowed || n > 1001 {
					t.Errorf("half of one and half of another: %v, %v, %v", snap.Timeout, snap.KillGrace, snap.Allow)
				}
				seen[n-1000].Add(1)
			}
		})
	}
	for i := 0; i < 200 || seen[0].Load() == 0 || seen[1].Load() == 0; i++ {
		var err error
		if i/2%2 == 0 {
			err = rewriteFile(p.settings, version(i%2))
		} else {
			err = os.WriteFile(p.settings, version(i%2), 0o600)
		}
		if err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()
	configWrite(t, p.settings, `{"timeoutMs":7}`, 0o600)
	if snap, _, err := s.current(); err != nil || snap.Timeout != 7*time.Millisecond {
		t.Errorf("after the storm: %v", err)
	}
}

func BenchmarkStoreCurrent(b *testing.B) {
	p := configDir(b)
	s, err := openStore(p, nil)
	if err != nil {
		b.Fatal(err)
	}
	for s.version.changed == 0 {
		s.current()
	}
	b.Run("unchanged", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.current()
		}
	})
	b.Run("floor-lstat", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			os.Lstat(p.settings)
		}
	})
}
