package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// cliRun plays one command line in this process, at a terminal or not, with what is typed as standard input.
type cliPlay struct {
	typed           string
	inTerm, outTerm bool
	beneath         bool
	code            int
	out, err        bytes.Buffer
	args            []string
}

func (p *cliPlay) run(args ...string) *cliPlay {
	p.args = args
	t := &terminal{in: strings.NewReader(p.typed), out: escapeWriter{&p.out}, err: escapeWriter{&p.err}, inTerm: p.inTerm, outTerm: p.outTerm, beneath: p.beneath}
	p.code = t.main(args)
	return p
}

// want checks the exit code and that both streams hold what they should; "" wants nothing at all there.
func (p *cliPlay) want(t *testing.T, code int, out, err string) {
	t.Helper()
	if p.code != code || !strings.Contains(p.out.String(), out) || !strings.Contains(p.err.String(), err) ||
		out == "" && p.out.Len() > 0 || err == "" && p.err.Len() > 0 {
		t.Errorf("aexec %q: exit %d, want %d\nout, want %q: %s\nerr, want %q: %s", p.args, p.code, code, out, &p.out, err, &p.err)
	}
}

// cliHome makes a configuration directory of the test's own, set up.
func cliHome(t *testing.T) paths {
	t.Helper()
	t.Setenv("AGENT_EXEC_CONFIG_DIR", filepath.Join(t.TempDir(), "conf"))
	if p := new(cliPlay).run("setup", "--yes"); p.code != 0 {
		t.Fatalf("setup: exit %d: %s%s", p.code, &p.out, &p.err)
	}
	p, err := configPaths()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func cliWrite(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func cliRead(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func cliKey(t *testing.T, p paths) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^API_KEY=(\S+)$`).FindStringSubmatch(cliRead(t, p.env))
	if m == nil {
		t.Fatalf("no key in %s", p.env)
	}
	return m[1]
}

// cliReal runs the built program, as a person would, without a terminal.
func cliReal(t *testing.T, code int, args ...string) (stdout, stderr string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), buildBinary(t), args...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if got := c.ProcessState.ExitCode(); got != code {
		t.Errorf("aexec %q: exit %d, want %d\n%s%s", args, got, code, &out, &errs)
	}
	return out.String(), errs.String()
}

// cliStarted starts a real server in the background on a free port, and stops it when the test ends.
func cliStarted(t *testing.T) (address string) {
	t.Helper()
	t.Cleanup(func() {
		c := exec.Command(buildBinary(t), "stop")
		if out, err := c.CombinedOutput(); err != nil && !strings.Contains(string(out), "not running") {
			t.Errorf("stop: %v: %s", err, out)
		}
	})
	out, _ := cliReal(t, 0, "start", "--port", "0")
	return cliAddress(t, out)
}

func cliAddress(t *testing.T, out string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^started: http://(\S+), pid \d+$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no address in %q", out)
	}
	return m[1]
}

func cliRequest(t *testing.T, method, url, key, body string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	answer, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(data)
}

func TestCLIHelp(t *testing.T) {
	all := cliRead(t, filepath.Join("skills", "_help.txt"))
	for _, section := range regexp.MustCompile(`(?m)^== aexec ?(.*)$`).FindAllStringSubmatch(all, -1) {
		name, words := section[1], strings.Fields(section[1])
		p := new(cliPlay).run(append(words, "--help")...)
		p.want(t, 0, "usage: aexec", "")
		golden := filepath.Join("testdata", "cli", "help", cmpOr(strings.ReplaceAll(name, " ", "-"), "aexec")+".txt")
		if os.Getenv("AEXEC_UPDATE_GOLDEN") != "" {
			if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(golden, p.out.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want := cliRead(t, golden); p.out.String() != want {
			t.Errorf("help of %q is not that of %s:\n%s", name, golden, &p.out)
		}
		for _, other := range [][]string{append(words, "-h"), append([]string{"help"}, words...)} {
			if q := new(cliPlay).run(other...); q.out.String() != p.out.String() || q.code != 0 {
				t.Errorf("aexec %q says something else than --help: %d\n%s", other, q.code, &q.out)
			}
		}
	}
}

// TestCLIHelpAgrees: what lists commands says of each what its own help says, and its flags are all that it takes.
func TestCLIHelpAgrees(t *testing.T) {
	for name := range cliCommands {
		summary := strings.Split(helpText("aexec "+name)+"\n\n", "\n")[2]
		word, _, grouped := strings.Cut(name, " ")
		lists := []string{helpText("aexec")}
		if grouped && word != "audit" {
			lists = append(lists, helpText("aexec "+word))
		}
		for _, list := range lists {
			if !regexp.MustCompile(`(?m)^  aexec ` + name + `  +` + regexp.QuoteMeta(summary) + `$`).MatchString(list) {
				t.Errorf("%s: %q is not in\n%s", name, summary, list)
			}
		}
		if summary == "" {
			t.Errorf("%s: no summary", name)
		}
	}
	if n := strings.Count(helpText("aexec"), "\n  aexec "); n != len(cliCommands)+1 { // and help itself
		t.Errorf("%d commands are listed, and there are %d", n, len(cliCommands)+1)
	}
}

func cmpOr(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

func TestCLIUsageErrors(t *testing.T) {
	p := cliHome(t)
	for _, c := range []struct {
		line, usage, says string
	}{
		{"", "aexec COMMAND", "a command is missing"},
		{"nonsense", "aexec COMMAND", `unknown command "nonsense"`},
		{"acl", "aexec acl COMMAND", "a command is missing"},
		{"acl nonsense", "aexec acl COMMAND", `unknown command "acl nonsense"`},
		{"plugin nonsense --name x", "aexec plugin COMMAND", `unknown command "plugin nonsense"`},
		{"help nonsense", "aexec COMMAND", `unknown command "nonsense"`},
		{"help acl nonsense", "aexec acl COMMAND", `unknown command "acl nonsense"`},
		{"status extra", "aexec status", `unexpected argument "extra"`},
		{"status --nonsense", "aexec status", "nonsense"},
		{"status --json=perhaps", "aexec status", "json"},
		{"version extra", "aexec version", `unexpected argument "extra"`},
		{"start --port", "aexec start", "port"},
		{"start --port x", "aexec start", `"x" for flag -port`},
		{"restart --port -1", "aexec restart", `"-1" for flag -port`},
		{"stop --port 3333", "aexec stop", "--force"},
		{"share --ip http://x", "aexec share", `"http://x"`},
		{"acl check", "aexec acl check", "CMD is missing"},
		{"acl check --", "aexec acl check", "CMD is missing"},
		{"acl add", "aexec acl add", "RULE is missing"},
		{"acl add a b", "aexec acl add", `unexpected argument "b"`},
		{`acl add ["git",1]`, "aexec acl add", "not a JSON array of strings"},
		{"audit -n x", "aexec audit", `"x" for flag -n`},
		{"audit verify a b", "aexec audit verify", `unexpected argument "b"`},
		{"plugin create --command git", "aexec plugin create", "--name=NAME is missing"},
		{"plugin create --name git", "aexec plugin create", "--command=C is missing"},
		{"plugin enable", "aexec plugin enable", "--name=NAME is missing"},
		{"plugin remove", "aexec plugin remove", "--name=NAME is missing"},
	} {
		q := new(cliPlay).run(strings.Fields(c.line)...)
		q.want(t, 2, "", c.says)
		if !strings.Contains(q.err.String(), "\nusage: "+c.usage) {
			t.Errorf("aexec %s does not show the usage of %q:\n%s", c.line, c.usage, &q.err)
		}
	}
	if _, err := os.Stat(p.pid); err == nil {
		t.Error("a usage error started a server")
	}
}

func TestCLIFlagsStandWhereAPersonPutsThem(t *testing.T) {
	for _, c := range []struct {
		line  string
		wraps bool
		want  []string
		force bool
	}{
		{"--force a", false, []string{"a"}, true},
		{"a --force", false, []string{"a"}, true},
		{"a --force b", false, []string{"a", "b"}, true},
		{"-- -a --force", false, []string{"-a"}, true},
		{"a -- --force", false, []string{"a", "--force"}, false},
		{"--force a --force=false", false, []string{"a"}, false},
		{"git --force", true, []string{"git", "--force"}, false},
		{"--force git -s", true, []string{"git", "-s"}, true},
		{"--force -- -s", true, []string{"-s"}, true},
		{"git -- -s", true, []string{"git", "--", "-s"}, false},
	} {
		play := &terminal{help: "usage: aexec test [flags]" + map[bool]string{true: " -- "}[c.wraps] + " [WORD…]\n\nflags:\n  --force  test\n"}
		err := play.parse(strings.Fields(c.line))
		if err != nil || !slices.Equal(play.args, c.want) || play.on("force") != c.force {
			t.Errorf("%q: %q, force %v, %v", c.line, play.args, play.on("force"), err)
		}
	}
}

func TestCLIHosts(t *testing.T) {
	cliHome(t)
	hosts := func(bound string, flags map[string]string) []string {
		return (&terminal{flags: flags}).shareHosts(bound)
	}
	for _, good := range []string{
		"192.0.2.7", "::1", "2001:db8::1", "::ffff:192.0.2.7", "localhost", "canary.example.org", "my_host.lan", "7of9.example",
	} {
		if got := hosts("127.0.0.1", map[string]string{"ip": good}); !slices.Equal(got, []string{good}) {
			t.Errorf("%q: %q", good, got)
		}
		new(cliPlay).run("share", "--ip", good).want(t, 0, "URL: http://"+net.JoinHostPort(good, "3333")+"\n", "not running")
	}
	for _, junk := range []string{
		" ", "[::]", "10.0.0.1:80", "[::1", "::1]", "[[::1]]", "[10.0.0.1]", "[host]", "fe80::1%eth0", "http://host", "host/path", "host:80",
		"user@host", "ho st", "host\n", "\x1b[31mhost", "höst", "host?x", "host#x", "ho\u202est",
	} {
		new(cliPlay).run("share", "--ip", junk).want(t, 2, "", "no address or name of a host")
	}
	for _, c := range []struct{ bound, local, want string }{
		{"127.0.0.1", "", "127.0.0.1"}, {"192.0.2.7", "", "192.0.2.7"}, {"192.0.2.7", "true", "127.0.0.1"}, {"0.0.0.0", "", "127.0.0.1"},
		{"::", "", "127.0.0.1"}, {"::1", "", "::1"}, {"::1", "true", "::1"}, {"localhost", "", "localhost"},
	} {
		if got := hosts(c.bound, map[string]string{"local": c.local}); !slices.Equal(got, []string{c.want}) {
			t.Errorf("%+v: %q", c, got)
		}
	}
	all := hosts("0.0.0.0", map[string]string{"all": "true"})
	if len(all) == 0 {
		t.Error("--all gives nothing")
	}
	for _, host := range all {
		if a, err := netip.ParseAddr(host); err != nil || a.Is6() && a.IsLinkLocalUnicast() {
			t.Errorf("--all gives %q: %v", host, err)
		}
	}
}

// hostile is text that would play tricks on a terminal.
const hostile = "a\x1b[31mb\u009bc\u202ed\u2066e\x07f\rg\u200bh\U000e0041i"

// cliTricks finds a character that has no place on a terminal.
func cliTricks(text string) string {
	for _, c := range text {
		if c != '\n' && (c < ' ' || c >= 0x7f && c < 0xa0 || strings.ContainsRune("\u202e\u2066\u200b\U000e0041", c)) {
			return fmt.Sprintf("%U", c)
		}
	}
	return ""
}

func TestCLIEscapes(t *testing.T) {
	var b bytes.Buffer
	if n, err := (escapeWriter{&b}).Write([]byte(hostile + "\n")); n != len(hostile)+1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	want := `a\u001b[31mb\u009bc\u202ed\u2066e\u0007f\u000dg\u200bh\udb40\udc41i` + "\n"
	if b.String() != want {
		t.Errorf("got  %s\nwant %s", &b, want)
	}
	b.Reset()
	encoded, _ := json.Marshal(map[string]string{"x": hostile, "é漢": "\t\"\\"})
	(escapeWriter{&b}).Write(encoded)
	got := map[string]string{}
	if err := json.Unmarshal(b.Bytes(), &got); err != nil || got["x"] != hostile || got["é漢"] != "\t\"\\" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestCLIShowsForeignTextQuoted(t *testing.T) {
	p := cliHome(t)
	record, _ := json.Marshal(auditRecord{Seq: 1, Timestamp: hostile, Event: hostile, SourceIP: hostile, Argv: []string{"echo", hostile, "two words"}, Reason: hostile, Prev: strings.Repeat("0", 64)})
	cliWrite(t, p.audit, string(record)+"\n"+hostile+"\n")
	dir := filepath.Join(p.plugins, "tool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cliWrite(t, filepath.Join(dir, "settings.json"), `{"plugin":{"command":"tool"}}`)
	cliWrite(t, filepath.Join(dir, "SKILL.md"), "---\nname: tool\ndescription: "+hostile+"\n---\n")
	if err := os.Mkdir(filepath.Join(p.plugins, hostile), 0o700); err != nil {
		t.Fatal(err)
	}
	// Not in this process: a command that runs others makes it the parent of all orphans.
	out, errs := cliReal(t, 1, "plugin", "create", "--name", "x", "--command", hostile)
	if trick := cliTricks(out + errs); trick != "" || !strings.Contains(errs, "must be one word") {
		t.Errorf("plugin create prints %s: %q %q", trick, out, errs)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"acl", "check", "--", "echo", hostile, "two words"}, `"echo" "a\x1b[31mb\u009bc\u202ed`},
		{[]string{"acl", "check", "--json", "--", "echo", hostile}, "allowed"},
		{[]string{"acl", "add", hostile}, ""},
		{[]string{"acl", "remove", hostile}, ""},
		{[]string{"audit"}, `"echo" "a\x1b[31mb\u009bc\u202ed`},
		{[]string{"audit", "--json"}, `"seq":1`},
		{[]string{"audit", "verify"}, ""},
		{[]string{"audit", "verify", hostile}, ""},
		{[]string{"plugin", "list"}, `"tool"`},
		{[]string{"plugin", "list", "--json"}, `"tool"`},
		{[]string{"plugin", "doctor"}, "error"},
		{[]string{"plugin", "enable", "--name", hostile}, ""},
		{[]string{"status"}, "plugin"},
		{[]string{"status", "--json"}, "plugin"},
		{[]string{"share", "--ip", hostile}, ""},
		{[]string{"status", "--" + hostile}, ""},
		{[]string{hostile}, ""},
		{[]string{"help", hostile}, ""},
		{[]string{"start", "--host", hostile, "--port", hostile}, ""},
	} {
		q := new(cliPlay).run(c.args...)
		if trick := cliTricks(q.out.String() + q.err.String()); trick != "" || !strings.Contains(q.out.String(), c.says) {
			t.Errorf("aexec %q prints %s (want %q):\n%q\n%q", c.args, trick, c.says, &q.out, &q.err)
		}
		if q.out.Len()+q.err.Len() == 0 {
			t.Errorf("aexec %q prints nothing", c.args)
		}
	}
}

func TestCLISetup(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "conf")
	t.Setenv("AGENT_EXEC_CONFIG_DIR", dir)
	(&cliPlay{typed: "no\n", inTerm: true}).run("setup").want(t, 1, "", "nothing was created")
	(&cliPlay{inTerm: true}).run("setup").want(t, 1, "", "nothing was created")
	if _, err := os.Lstat(dir); err == nil {
		t.Error("it asked, and created without an answer")
	}
	first := (&cliPlay{typed: "y\n", inTerm: true}).run("setup")
	first.want(t, 0, "next: aexec start", "[y/N]")
	p, err := configPaths()
	if err != nil {
		t.Fatal(err)
	}
	key := cliKey(t, p)
	again := new(cliPlay).run("setup")
	again.want(t, 0, "kept", "")
	if cliKey(t, p) != key {
		t.Error("a second setup changed the key")
	}
	if strings.Contains(first.out.String()+first.err.String()+again.out.String(), key) {
		t.Error("setup prints the key")
	}
}

func TestCLIShareOnATerminal(t *testing.T) {
	p := cliHome(t)
	key, prompt := cliKey(t, p), "You have access to a machine through agent-exec.\nURL: http://127.0.0.1:3333\nAPI_KEY: "+cliKey(t, p)+"\nStart here:\nhttp://127.0.0.1:3333/SKILL.md\n"
	line := strings.Repeat("-", 60) + "\n"
	if q := new(cliPlay).run("share"); q.code != 0 || q.out.String() != prompt {
		t.Errorf("piped, exit %d:\n%s", q.code, &q.out)
	}
	for typed, shown := range map[string]bool{"": false, "\n": false, "n\n": false, "y\n": true, "YES\n": true} {
		q := (&cliPlay{typed: typed, inTerm: true, outTerm: true}).run("share")
		if !shown && (q.code != 1 || strings.Contains(q.out.String()+q.err.String(), key)) || shown && (q.code != 0 || q.out.String() != line+prompt+line) {
			t.Errorf("answer %q: exit %d\n%s%s", typed, q.code, &q.out, &q.err)
		}
		if !strings.Contains(q.err.String(), "show it? [y/N]") {
			t.Errorf("no question: %s", &q.err)
		}
	}
	q := (&cliPlay{outTerm: true}).run("share", "--show-key", "--safe")
	if q.code != 0 || q.out.String() != line+prompt+"\n"+helpText("safety notes")+line || strings.Contains(q.err.String(), "show it?") {
		t.Errorf("--show-key: %s%s", &q.out, &q.err)
	}
	new(cliPlay).run("share", "--ip", "2001:db8::1").want(t, 0, "\nhttp://[2001:db8::1]:3333/SKILL.md\n", "not running")
	new(cliPlay).run("share", "--ip", "192.0.2.7").want(t, 0, "URL: http://192.0.2.7:3333\n", "not running")
	if all := new(cliPlay).run("share", "--all"); strings.Count(all.out.String(), "API_KEY: "+key) < 1 || all.code != 0 {
		t.Errorf("--all: %d\n%s", all.code, &all.out)
	}
	cliWrite(t, p.env, "API_KEY="+key+"\nHOST=0.0.0.0\n")
	new(cliPlay).run("share").want(t, 0, "URL: http://127.0.0.1:3333\n", "plain HTTP")
}

func TestCLIBeneathAServer(t *testing.T) {
	cliHome(t)
	reads := []string{"version", "help", "status", "acl list", "acl check", "plugin list", "audit verify"}
	for name := range cliCommands {
		q := (&cliPlay{beneath: true}).run(strings.Fields(name)...)
		refused := q.code == 1 && strings.Contains(q.err.String(), "does not administer itself")
		if refused == slices.Contains(reads, name) {
			t.Errorf("%s beneath a server: exit %d\n%s", name, q.code, &q.err)
		}
	}
}

func TestCLIPolicy(t *testing.T) {
	p := cliHome(t)
	before := cliRead(t, p.settings)
	new(cliPlay).run("acl", "list").want(t, 0, `allow  "aexec --version"  settings.json`, "")
	new(cliPlay).run("acl", "check", "aexec", "--version").want(t, 0, `allowed: ["aexec" "--version"]: the allow rule "aexec --version"`, "")
	new(cliPlay).run("acl", "check", "--", "git", "status", "-s").want(t, 1, `refused: ["git" "status" "-s"]: no rule allows it`, "")
	new(cliPlay).run("acl", "add", "*").want(t, 1, "", "hint: write a narrower one, or add --force")
	if cliRead(t, p.settings) != before {
		t.Error("a refused rule was written")
	}
	new(cliPlay).run("acl", "add", "/^git/i").want(t, 1, "", "(?i)")
	new(cliPlay).run("acl", "add", `["git","status","..."]`, "--force").want(t, 0, `added to exec.allow: ["git","status","..."]`, "")
	new(cliPlay).run("acl", "check", "git", "status", "-s").want(t, 0, `"git" "status" "-s"`, "")
	new(cliPlay).run("acl", "add", "--deny", "*").want(t, 0, "added to exec.deny", "")
	new(cliPlay).run("acl", "check", "--json", "git", "status").want(t, 1, `"list": "deny"`, "")
	new(cliPlay).run("acl", "remove", "*").want(t, 1, "", "exec.allow")
	new(cliPlay).run("acl", "remove", "*", "--deny").want(t, 0, "removed from exec.deny", "")
	new(cliPlay).run("acl", "remove", `["git", "status", "..."]`).want(t, 0, "removed from exec.allow", "")
	if cliRead(t, p.settings) != before {
		t.Errorf("added and removed, and not as it was:\n%s", cliRead(t, p.settings))
	}
	new(cliPlay).run("acl", "doctor", "--strict").want(t, 0, "seat belt", "")
	new(cliPlay).run("acl", "add", "--force", "*").want(t, 0, "added", "")
	new(cliPlay).run("acl", "doctor").want(t, 0, `allow  "*"  settings.json  `, "")
	new(cliPlay).run("acl", "doctor", "--strict", "--json").want(t, 1, `"code": "allow-all"`, "")
}

func TestCLITellsWhatIsWrong(t *testing.T) {
	p := cliHome(t)
	cliWrite(t, p.settings, "{\n  \"exec\": {\"allow\": [\"x\"]},\n  \"timeoutMS\": 1\n}\n")
	for _, row := range []string{"API_KEY", "HOST", "PORT", "AGENT_EXEC_ENABLED", "AGENT_EXEC_ALLOW_QUERY_API_KEY"} {
		q := new(cliPlay).run("config")
		if !regexp.MustCompile("(?m)^"+row+" .* needs a restart$").MatchString(q.out.String()) || strings.Contains(q.out.String(), cliKey(t, p)) {
			t.Errorf("config of %s:\n%s", row, &q.out)
		}
	}
	new(cliPlay).run("status").want(t, 3, "settings.json:3:3", "")
	new(cliPlay).run("config").want(t, 1, p.settings, "settings.json:3:3")
	new(cliPlay).run("acl", "list").want(t, 1, "", "settings.json:3:3")
	new(cliPlay).run("acl", "add", "y").want(t, 1, "", "timeoutMS")
	new(cliPlay).run("restart").want(t, 1, "", "settings.json:3:3")
	new(cliPlay).run("share").want(t, 0, "API_KEY", "not running")
	cliWrite(t, p.settings, "{}")
	if err := os.Chmod(p.env, 0o644); err != nil {
		t.Fatal(err)
	}
	new(cliPlay).run("config").want(t, 1, "-rw-r--r--", "chmod")
	new(cliPlay).run("share").want(t, 1, "", "chmod")
	t.Setenv("AGENT_EXEC_CONFIG_DIR", filepath.Join(t.TempDir(), "none"))
	new(cliPlay).run("start").want(t, 1, "", "aexec setup")
	new(cliPlay).run("share").want(t, 1, "", "aexec setup")
	new(cliPlay).run("acl", "list").want(t, 1, "", "aexec setup")
	new(cliPlay).run("status").want(t, 3, "not running", "")
	new(cliPlay).run("stop").want(t, 1, "", "not running")
	new(cliPlay).run("stop", "--force", "--port", "1").want(t, 1, "", "listens on port 1\n")
	new(cliPlay).run("audit").want(t, 1, "SEQ", "no such file")
	for _, line := range []string{"plugin list", "acl add x", "key rotate"} {
		new(cliPlay).run(strings.Fields(line)...).want(t, 1, "", "aexec setup")
	}
	if got := problemText(&plugin{Name: "*", Enabled: true, Broken: true, Problem: "has mode 0777"}); got != `error in plugin "*": has mode 0777` {
		t.Errorf("a problem of no single plugin: %q", got)
	}
}

func TestCLIJSONIsJSON(t *testing.T) {
	cliHome(t)
	for _, c := range []struct {
		line string
		code int
	}{{"status --json", 3}, {"config --json", 0}, {"acl list --json", 0}, {"acl check --json -- x", 1}, {"acl doctor --json", 0}, {"plugin list --json", 0}, {"plugin doctor --json", 0}} {
		q := new(cliPlay).run(strings.Fields(c.line)...)
		if q.code != c.code || !json.Valid(q.out.Bytes()) || strings.Contains(q.out.String(), "null") {
			t.Errorf("aexec %s: exit %d\n%s%s", c.line, q.code, &q.out, &q.err)
		}
	}
}

func init() {
	helpers["cli-listen"] = func() {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		fmt.Println(port)
		io.Copy(io.Discard, os.Stdin) // until the test ends
	}
}

func TestCLIStopForcePort(t *testing.T) {
	cliHome(t)
	port, c := cliListener(t)
	// This process is its parent, and must reap it for it to be gone.
	gone := make(chan error)
	go func() { gone <- c.Wait() }()
	new(cliPlay).run("stop", "--force", "--port", port).want(t, 0, fmt.Sprintf("ending pid %d, ", c.Process.Pid), "")
	if err := <-gone; err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the listener ended with %v", err)
	}
	new(cliPlay).run("stop", "--force", "--port", port).want(t, 1, "", "listens on port "+port)
}

// cliListener starts a process that is not aexec and listens on a port of 127.0.0.1 until the test ends.
func cliListener(t *testing.T) (port string, c *exec.Cmd) {
	t.Helper()
	c = helperCommand(t, "cli-listen")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fscanln(out, &port)
	return port, c
}

// TestCLIWalk is a newcomer's day with the real program.
func TestCLIWalk(t *testing.T) {
	buildBinary(t) // while HOME still has the build cache
	t.Setenv("AGENT_EXEC_CONFIG_DIR", "")
	t.Setenv("HOME", t.TempDir())
	said := "" // everything but what share says
	do := func(code int, args ...string) string {
		t.Helper()
		out, errs := cliReal(t, code, args...)
		if args[0] != "share" {
			said += out
		}
		said += errs
		return out + errs
	}
	want := func(text, part string) {
		t.Helper()
		if !strings.Contains(text, part) {
			t.Errorf("want %q in:\n%s", part, text)
		}
	}
	want(do(1, "start"), "aexec setup")
	do(0, "setup")
	p, err := configPaths()
	if err != nil {
		t.Fatal(err)
	}
	oldKey := cliKey(t, p)
	address := cliStarted(t)
	want(do(1, "start"), "already running")
	want(do(0, "status"), address)
	want(do(0, "share"), "URL: http://"+address+"\nAPI_KEY: "+oldKey+"\n")
	want(do(0, "share", "--check"), "http://"+address+": ok")

	run := func(key string, status int, body, part string) {
		t.Helper()
		code, answer := cliRequest(t, "POST", "http://"+address+"/api/exec", key, body)
		if code != status || !strings.Contains(answer, part) {
			t.Errorf("%s: %d %s, want %d %q", body, code, answer, status, part)
		}
	}
	if code, guide := cliRequest(t, "GET", "http://"+address+"/SKILL.md", "", ""); code != 200 {
		t.Errorf("/SKILL.md: %d %s", code, guide)
	}
	run(oldKey, 200, `{"args":["aexec","--version"]}`, `agent-exec v0.1.0\n`)
	run(oldKey, 403, `{"args":["aexec","stop"]}`, "command_not_allowed")
	do(0, "acl", "add", "aexec stop")
	do(0, "acl", "add", "aexec status")
	run(oldKey, 200, `{"args":["aexec","stop"]}`, "does not administer itself")
	run(oldKey, 200, `{"args":["aexec","status"]}`, `"exitCode":0`)

	want(do(0, "key", "rotate"), "the old key holds until: aexec restart")
	newKey := cliKey(t, p)
	want(do(0, "status"), "API_KEY")
	want(do(0, "share"), "the server wants the old key until: aexec restart")
	cliWrite(t, p.env, strings.Replace(cliRead(t, p.env), "ENABLED=true", "ENABLED=false", 1))
	want(do(0, "status", "--json"), `"enabled": true`) // as the server has it
	want(do(0, "config"), "AGENT_EXEC_ENABLED")
	cliWrite(t, p.env, strings.Replace(cliRead(t, p.env), "ENABLED=false", "ENABLED=true", 1))
	run(newKey, 401, `{"args":["aexec","--version"]}`, "unauthorized")
	restarted := do(0, "restart", "--port", "0")
	if now := cliAddress(t, restarted); now != address {
		want(restarted, "the address changes from http://"+address+" to http://"+now)
		address = now
	}
	run(newKey, 200, `{"args":["aexec","--version"]}`, `agent-exec v0.1.0\n`)
	run(oldKey, 401, `{"args":["aexec","--version"]}`, "unauthorized")

	want(do(0, "audit"), `"aexec" "--version"`)
	want(do(0, "audit", "-n", "1", "--json"), `"event":"auth_failed"`)
	verified := do(0, "audit", "verify")
	want(verified, "ok: ")
	head := regexp.MustCompile(`(?m)^head (\S+)$`).FindStringSubmatch(verified)
	if head == nil {
		t.Fatalf("no head in %q", verified)
	}
	want(do(0, "status"), head[1])
	cliWrite(t, p.settings, "{")
	want(do(0, "status"), "settings.json:1:")
	want(do(1, "restart"), "settings.json:1:")
	run(newKey, 503, `{"args":["aexec","--version"]}`, "settings_invalid")
	want(do(1, "share", "--check"), "503")
	cliWrite(t, p.settings, `{"exec":{"allow":["aexec --version"]}}`)
	want(do(0, "stop"), "stopped: pid ")
	want(do(3, "status"), "not running")
	want(do(1, "stop"), "not running")
	want(do(0, "audit", "verify", "--head", head[1]), "ok: ")
	want(do(1, "share", "--check"), "refused")
	for _, key := range []string{oldKey, newKey} {
		if strings.Contains(said, key) {
			t.Error("the key was printed by another command than share")
		}
		if log := cliRead(t, p.log) + cliRead(t, p.audit); strings.Contains(log, key) {
			t.Error("the key is in a log")
		}
	}
}

func TestCLIPlugins(t *testing.T) {
	buildBinary(t)
	p := cliHome(t)
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	tool := filepath.Join(bin, "claude")
	cliWrite(t, tool, "#!/bin/sh\ncase $1 in --help) echo 'usage: claude [options]';; --version) echo 1.0;; *) exit 1;; esac\n")
	if err := os.Chmod(tool, 0o700); err != nil {
		t.Fatal(err)
	}
	settings := `"claude --version"`
	out, _ := cliReal(t, 0, "starterkit", "claude", "surely-not-there")
	for _, part := range []string{`"claude": found`, `created the plugin "claude"`, settings, `"surely-not-there": not found`, "aexec restart"} {
		if !strings.Contains(out, part) {
			t.Errorf("starterkit does not say %q:\n%s", part, out)
		}
	}
	if _, errs := cliReal(t, 1, "starterkit", "claude"); !strings.Contains(errs, "--force") {
		t.Errorf("it made a plugin that is there: %s", errs)
	}
	if out, _ := cliReal(t, 0, "starterkit", "claude", "--force", "--quiet"); strings.Contains(out, settings) || !strings.Contains(out, `created the plugin "claude"`) {
		t.Errorf("--force --quiet: %s", out)
	}
	if out, _ := cliReal(t, 0, "plugin", "create", "--name", "mine", "--command", "ls", "--silent"); strings.Contains(out, "allow") {
		t.Errorf("--silent: %s", out)
	}
	new(cliPlay).run("plugin", "list").want(t, 0, `"claude"  skill  enabled`, "")
	new(cliPlay).run("plugin", "disable", "--name", "claude").want(t, 0, `plugin "claude": disabled`, "")
	new(cliPlay).run("plugin", "list").want(t, 0, `"claude"  skill  disabled`, "")
	new(cliPlay).run("acl", "check", "claude", "--version").want(t, 1, "refused", "")
	if _, errs := cliReal(t, 0, "starterkit", "claude", "--force", "--quiet"); !strings.Contains(errs, `"claude" is not enabled: aexec plugin enable`) {
		t.Errorf("a disabled plugin was made without a word: %s", errs)
	}
	new(cliPlay).run("plugin", "enable", "--name", "claude").want(t, 0, `plugin "claude": enabled`, "")
	new(cliPlay).run("acl", "check", "claude", "--version").want(t, 0, `of plugin:claude`, "")
	new(cliPlay).run("plugin", "doctor").want(t, 0, "found", "")
	cliWrite(t, filepath.Join(p.plugins, "mine", "settings.json"), "{")
	new(cliPlay).run("plugin", "doctor").want(t, 1, `error in plugin "mine"`, "")
	new(cliPlay).run("status").want(t, 3, `error in plugin "mine"`, "")
	new(cliPlay).run("plugin", "remove", "--name", "mine").want(t, 0, `plugin "mine": removed`, "")
	new(cliPlay).run("plugin", "remove", "--name", "mine").want(t, 1, "", `"mine"`)
	new(cliPlay).run("plugin", "doctor").want(t, 0, "found", "")
}

func TestCLIAuditFollows(t *testing.T) {
	buildBinary(t)
	p := cliHome(t)
	key, err := newAPIKey(cliKey(t, p))
	if err != nil {
		t.Fatal(err)
	}
	l, err := openAudit(p.audit, true, key)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	record := func(word string) {
		t.Helper()
		if err := l.append(auditRecord{Event: "exec_start", Argv: []string{"echo", word}}); err != nil {
			t.Fatal(err)
		}
	}
	record("before")
	c := exec.CommandContext(t.Context(), buildBinary(t), "audit", "-f", "-n", "1")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for _, want := range []string{"SEQ", `"echo" "before"`, `"echo" "after"`} {
		if !lines.Scan() || !strings.Contains(lines.Text(), want) {
			t.Fatalf("%q, want %q", lines.Text(), want)
		}
		if strings.Contains(want, "before") {
			record("after")
		}
	}
	c.Process.Kill()
	c.Wait()
}

func TestCLIKeyRotate(t *testing.T) {
	p := cliHome(t)
	old := cliKey(t, p)
	q := new(cliPlay).run("key", "rotate")
	q.want(t, 0, p.env, "")
	if now := cliKey(t, p); now == old || strings.Contains(q.out.String(), now) || len(now) != 52 {
		t.Errorf("key %q after %q, said %s", now, old, &q.out)
	}
	t.Setenv("API_KEY", "from-the-environment-long-enough")
	new(cliPlay).run("key", "rotate").want(t, 0, p.env, "API_KEY in the environment")
}
