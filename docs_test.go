// These tests hold the documents to the program: what an agent or an operator reads is there, valid, and complete.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// docsPublic are the public documents; each is a directory of skills/ and a route.
var docsPublic = []string{"acl", "aexec", "exec", "install", "plugins", "private"}

func docsRead(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func docsWrite(t *testing.T, file, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// docsBlocks gives the fenced blocks of one language.
func docsBlocks(doc, lang string) []string {
	var blocks []string
	fence := regexp.MustCompile("(?ms)^( *)```(\\S*)\n(.*?)^ *```$")
	for _, m := range fence.FindAllStringSubmatch(doc, -1) {
		if m[2] == lang {
			blocks = append(blocks, strings.ReplaceAll("\n"+m[3], "\n"+m[1], "\n")[1:])
		}
	}
	return blocks
}

// docsTable gives the rows of the table whose head begins with the words, each cell trimmed.
func docsTable(t *testing.T, doc string, head ...string) [][]string {
	t.Helper()
	var rows [][]string
	in := false
	for line := range strings.SplitSeq(doc, "\n") {
		if !strings.HasPrefix(line, "|") {
			in = false
			continue
		}
		cells := strings.Split(strings.ReplaceAll(line, `\|`, "\x00"), "|")
		cells = cells[1 : len(cells)-1]
		for i := range cells {
			cells[i] = strings.TrimSpace(strings.ReplaceAll(cells[i], "\x00", "|"))
		}
		if len(cells) >= len(head) && slices.Equal(cells[:len(head)], head) {
			in = true
		} else if in && !strings.HasPrefix(cells[0], "---") {
			rows = append(rows, cells)
		}
	}
	if len(rows) == 0 {
		t.Fatalf("no table with the head %q", head)
	}
	return rows
}

// docsFrontmatterError says what the Agent Skills standard (agentskills.io/specification), or plain unquoted YAML, forbids in the head of a document.
func docsFrontmatterError(doc, dir string) string {
	body, ok := strings.CutPrefix(doc, "---\n")
	head, body, closed := strings.Cut(body, "\n---\n")
	if !ok || !closed || strings.TrimSpace(body) == "" {
		return "no frontmatter, or nothing after it"
	}
	values := map[string]string{}
	for line := range strings.SplitSeq(head, "\n") {
		key, value, ok := strings.Cut(line, ": ")
		if _, twice := values[key]; !ok || twice || !slices.Contains([]string{"name", "description", "license", "compatibility"}, key) {
			return "a key that is not the standard's, or comes twice: " + line
		}
		if strings.Contains(value, ": ") || strings.Contains(value, " #") || strings.TrimSpace(value) != value || value == "" ||
			strings.ContainsAny(value[:1], "\"'[]{}>|*&!%#`@,?:-") || strings.HasSuffix(value, ":") {
			return "not a plain one-line YAML value: " + line
		}
		values[key] = value
	}
	name, description := values["name"], values["description"]
	switch {
	case name != dir || len(name) > 64 || !regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`).MatchString(name):
		return "the name is not that of its directory, or not of the standard's form: " + name
	case description == "" || len(description) > 1024 || len(values["compatibility"]) > 500:
		return "the description is missing, or too long"
	case !strings.Contains(description, "Use it when") && !strings.Contains(description, "Read it") && !strings.Contains(description, "Use it before"):
		return "the description does not say when to use it"
	}
	return ""
}

func TestSkillsFrontmatter(t *testing.T) {
	dirs, err := os.ReadDir("skills")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, dir := range dirs {
		if !dir.IsDir() {
			continue // a template, not a document
		}
		names = append(names, dir.Name())
		if why := docsFrontmatterError(docsRead(t, filepath.Join("skills", dir.Name(), "SKILL.md")), dir.Name()); why != "" {
			t.Errorf("skills/%s: %s", dir.Name(), why)
		}
	}
	if !slices.Equal(names, docsPublic) {
		t.Errorf("skills/ has %q, want %q", names, docsPublic)
	}
	for _, bad := range []string{
		"# no head\n", "---\nname: x\ndescription: Read it\n", "---\nname: y\ndescription: Read it now\n---\nbody",
		"---\nname: x\ndescription: Read it: now\n---\nbody", "---\nname: x\ndescription: \"Read it\"\n---\nbody",
		"---\nname: x\nversion: 1\ndescription: Read it\n---\nbody", "---\nname: x\nname: x\ndescription: Read it\n---\nbody",
		"---\nname: x\ndescription: Read it " + strings.Repeat("a", 1024) + "\n---\nbody", "---\nname: x\ndescription: Read it\n---\n\n",
	} {
		if docsFrontmatterError(bad, "x") == "" {
			t.Errorf("accepted %q", bad)
		}
	}
}

// TestSkillsExplainEveryCode: each code is a row of the exec document's table, beside its status, with something to do;
// and the main guide, which an agent may be content with, names it too.
func TestSkillsExplainEveryCode(t *testing.T) {
	rows := docsTable(t, docsRead(t, "skills/exec/SKILL.md"), "status", "`error`", "meaning", "do")
	seen := map[string]string{}
	for _, row := range rows {
		seen[strings.Trim(row[1], "`")] = row[0]
		if len(row[2]) < 10 || len(row[3]) < 6 {
			t.Errorf("%s is not explained: %q", row[1], row)
		}
	}
	for code, e := range errorTexts {
		if seen[code] != strconv.Itoa(e.status) {
			t.Errorf("%s: documented with status %q, want %d", code, seen[code], e.status)
		}
	}
	for code := range seen {
		if errorTexts[code].status == 0 {
			t.Errorf("%s is documented, and no answer has it", code)
		}
	}
	guide := docsRead(t, "skills/aexec/SKILL.md")
	for _, code := range []string{"invalid_args", "unauthorized", "command_denied", "command_not_allowed", "timeout", "max_output_exceeded",
		"too_many_concurrent_exec", "rate_limited", "disabled", "settings_invalid", "audit_unavailable", "shutting_down"} {
		if !strings.Contains(guide, "`"+code+"`") {
			t.Errorf("the main guide does not name %s", code)
		}
	}
}

// TestSkillsLinks: a link must lead to a route, from /SKILL.md and from /skills/NAME/SKILL.md alike.
func TestSkillsLinks(t *testing.T) {
	routes := map[string]bool{"/": true, "/SKILL.md": true, "/skills": true}
	for _, name := range docsPublic {
		routes["/skills/"+name+"/SKILL.md"] = true
	}
	links := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, name := range docsPublic {
		for _, m := range links.FindAllStringSubmatch(docsRead(t, "skills/"+name+"/SKILL.md"), -1) {
			bases := []string{"/skills/" + name + "/SKILL.md"}
			if name == "aexec" {
				bases = append(bases, "/SKILL.md")
			}
			for _, from := range bases {
				base := &url.URL{Path: from}
				ref, err := url.Parse(m[1])
				if err != nil || ref.Host != "" || !routes[base.ResolveReference(ref).Path] {
					t.Errorf("skills/%s: %q leads nowhere from %s", name, m[1], from)
				}
			}
		}
	}
	guide := docsRead(t, "skills/aexec/SKILL.md")
	for _, name := range docsPublic {
		if name != "aexec" && !strings.Contains(guide, "](/skills/"+name+"/SKILL.md)") {
			t.Errorf("the main guide does not lead to %s", name)
		}
	}
}

// TestSkillsExamples: every JSON block is JSON, every exec body has args alone, and no example puts the key where it would be logged.
func TestSkillsExamples(t *testing.T) {
	bodies := regexp.MustCompile(`-d '([^']*)'`)
	examples := 0
	for _, name := range docsPublic {
		doc := docsRead(t, "skills/"+name+"/SKILL.md")
		for _, block := range docsBlocks(doc, "json") {
			docsJSON(t, "skills/"+name, block)
		}
		for _, block := range docsBlocks(doc, "sh") {
			for _, m := range bodies.FindAllStringSubmatch(block, -1) {
				var body struct{ Args []string }
				d := json.NewDecoder(strings.NewReader(m[1]))
				d.DisallowUnknownFields()
				if err := d.Decode(&body); err != nil || len(body.Args) == 0 {
					t.Errorf("skills/%s: %s is no request: %v", name, m[1], err)
				}
				examples++
			}
			if strings.Contains(block, "/api/") && !strings.Contains(block, `-H "X-API-Key: $KEY"`) {
				t.Errorf("skills/%s: a request without its key: %s", name, block)
			}
		}
		if regexp.MustCompile(`(?i)\?[^ ]*key=`).MatchString(doc) {
			t.Errorf("skills/%s puts the key into a query", name)
		}
	}
	if examples < 6 {
		t.Errorf("only %d requests found", examples)
	}
}

// docsJSON checks one block of JSON values. One that is an error of the server's must have its exact words.
func docsJSON(t *testing.T, where, block string) {
	t.Helper()
	for d := json.NewDecoder(strings.NewReader(block)); ; {
		var v any
		if err := d.Decode(&v); err == io.EOF {
			return
		} else if err != nil {
			t.Errorf("%s: %v in %s", where, err, block)
			return
		}
		object, _ := v.(map[string]any)
		if code, _ := object["error"].(string); code != "" && object["hint"] != nil {
			if e := errorTexts[code]; object["message"] != e.Message || object["hint"] != e.Hint || object["retryable"] != e.Retryable {
				t.Errorf("%s: the server words %s otherwise: %q, %q", where, code, e.Message, e.Hint)
			}
		}
	}
}

// TestReadmeLinks: to files that are there, and to headings that are there.
func TestReadmeLinks(t *testing.T) {
	doc := docsRead(t, "README.md")
	headings := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(doc, -1) {
		slug := strings.ReplaceAll(strings.ToLower(m[1]), " ", "-")
		headings["#"+regexp.MustCompile(`[^a-z0-9-]`).ReplaceAllString(slug, "")] = true
	}
	found := 0
	for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(doc, -1) {
		found++
		if strings.HasPrefix(m[1], "#") {
			if !headings[m[1]] {
				t.Errorf("no heading for %s", m[1])
			}
		} else if _, err := os.Stat(m[1]); err != nil || path.IsAbs(m[1]) {
			t.Errorf("no file for %s", m[1])
		}
	}
	if found == 0 {
		t.Error("no link found")
	}
	for _, block := range docsBlocks(doc, "json") {
		docsJSON(t, "README.md", block)
	}
}

// TestReadmeFiles: the table for reviewers names every file of the program, with its length to within a fifth.
func TestReadmeFiles(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	actual := map[string]int{}
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			actual[file] = bytes.Count([]byte(docsRead(t, file)), []byte("\n"))
		}
	}
	names := regexp.MustCompile("`([a-z_]+\\.go)`")
	for _, row := range docsTable(t, docsRead(t, "README.md"), "file", "lines", "check") {
		want, sum := row[1], 0
		for _, m := range names.FindAllStringSubmatch(row[0], -1) {
			if _, err := os.Stat(m[1]); err != nil {
				t.Errorf("%s is named and not there", m[1])
			}
			sum += actual[m[1]]
			delete(actual, m[1])
		}
		if n, err := strconv.Atoi(want); want != "" && (err != nil || math.Abs(float64(n-sum)) > float64(sum)/5) {
			t.Errorf("%s: %s lines by the table, %d in fact", row[0], want, sum)
		}
	}
	for file := range actual {
		t.Errorf("%s is missing in the table", file)
	}
}

// TestReadmeNamesTests: a proof that the README claims must exist.
func TestReadmeNamesTests(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				have[f.Name.Name] = true
			}
		}
	}
	doc := docsRead(t, "README.md")
	for _, m := range regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*`).FindAllString(doc, -1) {
		if !have[m] {
			t.Errorf("the README names %s, which is not there", m)
		}
	}
	for _, row := range docsTable(t, doc, "attacker", "wants", "answer", "test") {
		if !strings.Contains(row[2], "**not defended**") && !strings.Contains(row[3], "Test") {
			t.Errorf("no test is named for %q", row[:2])
		}
	}
}

// docsRules gives the rules that stand in backquotes in a cell.
func docsRules(t *testing.T, cell string) []ruleSpec {
	t.Helper()
	var rules []ruleSpec
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
		var r ruleSpec
		if json.Unmarshal([]byte(m[1]), &r.Argv) != nil && json.Unmarshal([]byte(m[1]), &r.Text) != nil {
			t.Errorf("%s is no rule", m[1])
		}
		rules = append(rules, r)
	}
	return rules
}

// TestReadmeRules: the rules of the tables compile; those that look narrow and are not are found by `acl doctor`; the one called narrow is not.
func TestReadmeRules(t *testing.T) {
	doc := docsRead(t, "README.md")
	narrow := regexp.MustCompile("(?m)^(`[^`]+`) is narrow").FindStringSubmatch(doc)
	if narrow == nil {
		t.Fatal("no rule is called narrow")
	}
	for _, table := range []struct {
		rows  [][]string
		risky bool
	}{
		{docsTable(t, doc, "rule", "kind", "meaning"), false},
		{docsTable(t, docsRead(t, "skills/acl/SKILL.md"), "rule", "kind", "allows"), false},
		{docsTable(t, doc, "rule", "what it also allows"), true},
		{[][]string{narrow[1:]}, false},
	} {
		for _, row := range table.rows {
			for _, r := range docsRules(t, row[0]) {
				p, err := compilePolicy([]ruleSet{{Source: "settings.json", Allow: []ruleSpec{r}}})
				if err != nil {
					t.Error(err)
				} else if table.risky && len(p.lint()) == 0 {
					t.Errorf("the doctor finds nothing about %s", r)
				} else if len(row) == 1 && len(p.lint()) > 0 {
					t.Errorf("the doctor says of the narrow %s: %v", r, p.lint())
				}
			}
		}
	}
}

// TestReadmeSettings: the table has every setting, and says of each truly what its default is and whether it reloads.
func TestReadmeSettings(t *testing.T) {
	s, err := parseSettings(paths{settings: "settings.json", audit: "audit.jsonl"}, []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string][]string{}
	for _, row := range docsTable(t, docsRead(t, "README.md"), "setting", "default", "reloads", "meaning") {
		documented[strings.Trim(row[0], "`")] = row
	}
	for _, info := range configTable(paths{}, startup{}, s) {
		if info.Change == "" {
			continue // a file
		}
		row := documented[info.Name]
		delete(documented, info.Name)
		if row == nil {
			t.Errorf("%s is missing", info.Name)
			continue
		}
		if (row[2] == "yes") != (info.Change == "reloads") {
			t.Errorf("%s: reloads is %q in the table, and %q in fact", info.Name, row[2], info.Change)
		}
		if value, err := json.Marshal(info.Value); err != nil || strings.Trim(row[1], "`") != string(value) && string(value) != `""` && info.Name != "exec.allow" {
			t.Errorf("%s: the default is %s in the table, and %s in fact", info.Name, row[1], value)
		}
	}
	for key := range documented {
		t.Errorf("%s is documented, and there is no such setting", key)
	}
}

// TestReadmeSettingsExamples: what is shown as settings.json loads, its own tests included.
func TestReadmeSettingsExamples(t *testing.T) {
	loaded := 0
	for _, block := range docsBlocks(docsRead(t, "README.md"), "json") {
		if !strings.Contains(block, `"exec"`) {
			continue
		}
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Setenv("AGENT_EXEC_CONFIG_DIR", dir)
		docsWrite(t, filepath.Join(dir, "settings.json"), block, 0o600)
		p, err := configPaths()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := openStore(p, nil); err != nil {
			t.Error(err)
		}
		loaded++
	}
	if loaded < 2 {
		t.Errorf("only %d examples found", loaded)
	}
}

// docsMachine is a throw-away home with the real program in it, and programs that the documents speak of.
type docsMachine struct {
	home, dir string
	env       []string
}

// docsPrograms are what the examples run: each says who it is on both outputs.
var docsPrograms = []string{"git", "make", "mytool"}

func newDocsMachine(t *testing.T) *docsMachine {
	t.Helper()
	m := &docsMachine{home: t.TempDir()}
	bin := filepath.Join(m.home, ".local", "bin")
	m.dir = filepath.Join(m.home, ".to-agent", "agent-exec")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range docsPrograms {
		docsWrite(t, filepath.Join(bin, name), "#!/bin/sh\necho "+name+"\necho trouble >&2\n", 0o755)
	}
	docsWrite(t, filepath.Join(m.home, ".curlrc"), "fail-with-body\n", 0o644)
	m.env = []string{"HOME=" + m.home, "CURL_HOME=" + m.home, "PORT=0", "PATH=" + bin + ":" + os.Getenv("PATH")}
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPATH", "GOROOT", "GOFLAGS", "GOPROXY", "TMPDIR"} {
		if out, err := exec.Command("go", "env", name).Output(); err == nil && strings.TrimSpace(string(out)) != "" {
			m.env = append(m.env, name+"="+strings.TrimSpace(string(out)))
		}
	}
	return m
}

// sh runs a script as a newcomer would type it, and gives standard output.
func (m *docsMachine) sh(t *testing.T, cwd, script string, env ...string) string {
	t.Helper()
	c := exec.Command("sh", "-e", "-c", script) // also in a cleanup, when the test's context has ended
	c.Dir, c.Env = cwd, append(slices.Clone(m.env), env...)
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Errorf("%s\n%v\n%s%s", script, err, out, stderr.String())
	}
	return string(out)
}

// copySource copies what the program is built from.
func (m *docsMachine) copySource(t *testing.T, to string) {
	t.Helper()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case e.IsDir() && name != "testdata" && name[0] != '.':
			err = os.CopyFS(filepath.Join(to, name), os.DirFS(name))
		case filepath.Ext(name) == ".go" && !strings.HasSuffix(name, "_test.go"), name == "go.mod", name == "go.sum":
			err = errors.Join(os.MkdirAll(to, 0o755), os.WriteFile(filepath.Join(to, name), []byte(docsRead(t, name)), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// docsWalks gives the shell blocks that stand directly after <!-- walk -->.
func docsWalks(doc string) []string {
	var blocks []string
	for _, part := range strings.Split(doc, "<!-- walk -->\n")[1:] {
		blocks = append(blocks, docsBlocks(part, "sh")[0])
	}
	return blocks
}

// TestReadmeWalk types what the README says, from the quick start on, beginning with nothing but the source.
func TestReadmeWalk(t *testing.T) {
	if testing.Short() || os.Getenv("AEXEC_TEST_BINARY") != "" {
		t.Skip("builds the program from nothing, with Go")
	}
	m := newDocsMachine(t)
	source := filepath.Join(m.home, "source")
	m.copySource(t, source)
	t.Cleanup(func() { m.sh(t, source, "./aexec stop", "PATH="+source+":"+os.Getenv("PATH")) })
	blocks := docsWalks(docsRead(t, "README.md"))
	if len(blocks) < 3 {
		t.Fatalf("only %d blocks to walk", len(blocks))
	}
	var said []string
	for _, block := range blocks {
		said = append(said, m.sh(t, source, block, "PATH="+source+":"+os.Getenv("PATH")))
	}
	if !regexp.MustCompile(`(?s)URL: http://127\.0\.0\.1:\d+\nAPI_KEY: \S{40,}\nStart here:\nhttp://127\.0\.0\.1:\d+/SKILL\.md\n$`).MatchString(said[0]) {
		t.Errorf("the quick start does not end with the prompt: %s", said[0])
	}
}

// docsShare starts the server and gives what an agent gets: URL and key.
func (m *docsMachine) docsShare(t *testing.T) (string, string) {
	t.Helper()
	binary := buildBinary(t)
	m.sh(t, m.home, binary+" start")
	t.Cleanup(func() { m.sh(t, m.home, binary+" stop") })
	prompt := regexp.MustCompile(`URL: (\S+)\nAPI_KEY: (\S+)\n`).FindStringSubmatch(m.sh(t, m.home, binary+" share"))
	if prompt == nil {
		t.Fatal("share printed no prompt")
	}
	return prompt[1], prompt[2]
}

// TestSkillsWalk types every request of the documents against a real server, and holds each answer to the shape that is printed below it.
func TestSkillsWalk(t *testing.T) {
	for _, tool := range []string{"curl", "jq"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
	m := newDocsMachine(t)
	plugin := filepath.Join(m.dir, "plugins", "mytool")
	m.sh(t, m.home, buildBinary(t)+" setup --yes && mkdir -p -m 0700 "+plugin+"/references")
	work := t.TempDir()
	docsWrite(t, filepath.Join(work, "logo.png"), "\x89PNG\n", 0o644)
	docsWrite(t, filepath.Join(m.dir, "settings.json"), `{"exec":{"allow":["*"],"cwd":"`+work+`"}}`, 0o600)
	docsWrite(t, filepath.Join(plugin, "SKILL.md"), "---\nname: mytool\ndescription: Looks after things\n---\n# mytool\n", 0o600)
	docsWrite(t, filepath.Join(plugin, "references", "usage.md"), "# usage\n", 0o600)
	docsWrite(t, filepath.Join(plugin, "settings.json"),
		`{"plugin":{"type":"exec","command":"mytool","apiVersion":1,"routes":{"GET /status":["mytool","status"]}},"exec":{"allow":["mytool --version"]}}`, 0o600)
	url, key := m.docsShare(t)
	walked := 0
	for _, name := range docsPublic {
		if name == "install" {
			continue // needs a network of machines; the README's walk does the same steps
		}
		for _, part := range strings.Split(docsRead(t, "skills/"+name+"/SKILL.md"), "```sh\n")[1:] {
			script, rest, _ := strings.Cut(part, "```\n")
			if !strings.Contains(script, "curl") {
				continue
			}
			script = strings.ReplaceAll(script, "/srv/work", work)
			got := m.sh(t, t.TempDir(), script, "URL="+url, "KEY="+key)
			walked++
			if example, ok := strings.CutPrefix(rest, "\n```json\n"); ok {
				example, _, _ = strings.Cut(example, "```\n")
				want, have := docsShapes(t, example), docsShapes(t, got)
				if !slices.Equal(want, have) {
					t.Errorf("skills/%s: %s\nanswers with %q, and the document shows %q\n%s", name, script, have, want, got)
				}
			}
		}
	}
	if walked < 10 {
		t.Errorf("only %d requests walked", walked)
	}
}

// docsShapes gives the sorted set of shapes of some JSON values: the keys, in depth, without standard error, which not every command has.
func docsShapes(t *testing.T, text string) []string {
	t.Helper()
	var shapes []string
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		var v any
		if err := d.Decode(&v); err == io.EOF {
			break
		} else if err != nil {
			t.Errorf("%v in %q", err, text)
			break
		}
		shapes = append(shapes, docsShape(v))
	}
	slices.Sort(shapes)
	return slices.Compact(shapes)
}

func docsShape(v any) string {
	object, ok := v.(map[string]any)
	if !ok {
		if list, ok := v.([]any); ok && len(list) > 0 && docsShape(list[0]) != "" {
			return "[" + docsShape(list[0]) + "]"
		}
		return ""
	}
	var keys []string
	for key, value := range object {
		if key != "stderr" || object["output"] == nil {
			keys = append(keys, key+docsShape(value))
		}
	}
	slices.Sort(keys)
	return "{" + strings.Join(keys, " ") + "}"
}
