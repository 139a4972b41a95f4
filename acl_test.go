package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// aclCase is one paragraph of a file in testdata/acl: a comment that names it, then lines of a word and JSON values.
//
//	allow RULE…, deny RULE…   the rules
//	plugin COMMAND            they are the plugin's whose command this is, not settings.json's
//	yes ARGV, no ARGV         allowed; refused, by no rule
//	denied ARGV               refused by a deny rule
//	error TEXT                the rules do not compile, and the error says this
//	lint CODE…                the doctor's findings in their order
type aclCase struct {
	name  string
	set   ruleSet
	lines [][2]string // word and the rest
}

func TestRuleTables(t *testing.T) {
	files, err := filepath.Glob("testdata/acl/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no tables: %v", err)
	}
	for _, file := range files {
		for _, c := range readACLCases(t, file) {
			t.Run(filepath.Base(file)+"/"+c.name, func(t *testing.T) { runACLCase(t, c) })
		}
	}
}

func readACLCases(t *testing.T, file string) []aclCase {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var cases []aclCase
	for block := range strings.SplitSeq(strings.TrimSpace(string(data)), "\n\n") {
		c := aclCase{set: ruleSet{Source: "settings.json"}}
		for line := range strings.SplitSeq(block, "\n") {
			word, rest, _ := strings.Cut(line, " ")
			switch word {
			case "#":
				c.name = rest
			case "plugin":
				c.set.Source, c.set.Command = "plugin:p", rest
			case "allow":
				c.set.Allow = append(c.set.Allow, readRules(t, rest)...)
			case "deny":
				c.set.Deny = append(c.set.Deny, readRules(t, rest)...)
			case "yes", "no", "denied", "error", "lint":
				c.lines = append(c.lines, [2]string{word, rest})
			default:
				t.Fatalf("%s: line %q", file, line)
			}
		}
		if c.name == "" || len(c.lines) == 0 {
			t.Fatalf("%s: a case without name or expectation: %q", file, block)
		}
		cases = append(cases, c)
	}
	return cases
}

func readRules(t *testing.T, text string) []ruleSpec {
	t.Helper()
	var rules []ruleSpec
	for dec := json.NewDecoder(strings.NewReader(text)); dec.More(); {
		var v any
		if err := dec.Decode(&v); err != nil {
			t.Fatalf("rules %q: %v", text, err)
		}
		switch v := v.(type) {
		case string:
			rules = append(rules, ruleSpec{Text: v})
		case []any:
			r := ruleSpec{Argv: []string{}}
			for _, e := range v {
				r.Argv = append(r.Argv, e.(string))
			}
			rules = append(rules, r)
		}
	}
	return rules
}

func runACLCase(t *testing.T, c aclCase) {
	p, err := compilePolicy([]ruleSet{c.set})
	if c.lines[0][0] == "error" {
		var want string
		if jerr := json.Unmarshal([]byte(c.lines[0][1]), &want); jerr != nil {
			t.Fatal(jerr)
		}
		var re *ruleError
		if !errors.As(err, &re) || !strings.Contains(errors.Unwrap(re.error).Error(), want) {
			t.Errorf("got %v, want an error that says %q", err, want)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range c.lines {
		if line[0] == "lint" {
			var codes []string
			for _, f := range p.lint() {
				codes = append(codes, f.Code)
			}
			if want := strings.Fields(line[1]); !slices.Equal(codes, want) {
				t.Errorf("lint: got %v, want %v\n%v", codes, want, p.lint())
			}
			continue
		}
		var argv []string
		if err := json.Unmarshal([]byte(line[1]), &argv); err != nil {
			t.Fatalf("%q: %v", line[1], err)
		}
		want := decision{}
		switch line[0] {
		case "yes":
			want = decision{Allowed: true, List: "allow", Source: c.set.Source}
		case "denied":
			want = decision{List: "deny", Source: c.set.Source}
		}
		checkDecision(t, p, argv, want)
	}
}

// checkDecision decides argv and compares all but the rule, of which it only wants that there is one where there must be.
func checkDecision(t *testing.T, p policy, argv []string, want decision) {
	t.Helper()
	before := slices.Clone(argv)
	a, got := p.decide(argv)
	if (got.Rule != "") != (want.List != "") {
		t.Errorf("%q: decided by rule %q", argv, got.Rule)
	}
	want.Rule = got.Rule
	if got != want {
		t.Errorf("%q: got %+v, want %+v", argv, got, want)
	}
	if !got.Allowed {
		if a.argv != nil {
			t.Errorf("%q: refused, but approved %+v", argv, a)
		}
		return
	}
	for i := range argv {
		argv[i] = "changed afterwards"
	}
	if !slices.Equal(a.argv, before) {
		t.Errorf("%q: approved %+v", before, a)
	}
}

func TestDecisionNamesItsRule(t *testing.T) {
	p, err := compilePolicy([]ruleSet{
		{Source: "settings.json", Allow: []ruleSpec{{Text: "git *"}, {Argv: []string{"ls", "<a>", "..."}}}, Deny: []ruleSpec{{Text: "/push/"}}},
		{Source: "plugin:git", Command: "git", Allow: []ruleSpec{{Text: "git log"}}, Deny: []ruleSpec{{Text: "git log"}, {Text: "ls *"}}},
		{Source: "plugin:tool", Command: "tool", Allow: []ruleSpec{{Text: "tool x"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		argv string
		want decision
	}{
		{"git status", decision{true, "git *", "allow", "settings.json"}},
		{"git push", decision{false, "/push/", "deny", "settings.json"}},
		{"git log", decision{false, "git log", "deny", "plugin:git"}},
		{"ls <a>", decision{false, "ls *", "deny", "plugin:git"}},
		{"tool x", decision{true, "tool x", "allow", "plugin:tool"}},
		{"pwd", decision{}},
	} {
		if _, got := p.decide(strings.Split(c.argv, " ")); got != c.want {
			t.Errorf("%s: got %+v, want %+v", c.argv, got, c.want)
		}
	}
	var lists strings.Builder
	for _, r := range p {
		fmt.Fprintf(&lists, "%s %s %s\n", r.List, r.Source, r.Rule)
	}
	want := "deny settings.json /push/\ndeny plugin:git git log\ndeny plugin:git ls *\n" +
		"allow settings.json git *\nallow settings.json [\"ls\",\"<a>\",\"...\"]\nallow plugin:git git log\nallow plugin:tool tool x\n"
	if lists.String() != want {
		t.Errorf("rules:\n%s", lists.String())
	}
}

func TestRuleErrorNamesItsPlace(t *testing.T) {
	_, err := compilePolicy([]ruleSet{{Source: "settings.json", Allow: []ruleSpec{{Text: "ls"}}},
		{Source: "plugin:x", Command: "x", Allow: []ruleSpec{{Text: "x"}, {Text: "x"}, {Text: "x\x1b"}}}})
	var re *ruleError
	if !errors.As(err, &re) || re.Source != "plugin:x" || re.List != "allow" || re.Index != 2 || re.Rule.Text != "x\x1b" {
		t.Fatalf("got %#v", err)
	}
	if msg := err.Error(); !strings.Contains(msg, `"x\x1b" in exec.allow of plugin:x: `) || strings.ContainsFunc(msg, unicode.IsControl) {
		t.Errorf("got %q", msg)
	}
}

func TestRuleSpecKeepsItsForm(t *testing.T) {
	for _, c := range []struct {
		spec         ruleSpec
		text, asJSON string
	}{
		{ruleSpec{Text: `ls <"a">`}, `ls <"a">`, `"ls <\"a\">"`},
		{ruleSpec{Argv: []string{"ls", "a b", "<&>"}}, `["ls","a b","<&>"]`, `["ls","a b","<&>"]`},
		{ruleSpec{Argv: []string{}}, `[]`, `[]`},
	} {
		data, err := c.spec.MarshalJSON()
		if err != nil || string(data) != c.asJSON || c.spec.String() != c.text {
			t.Errorf("%+v: %s, %s, %v", c.spec, c.spec, data, err)
		}
	}
}

func TestCheckArgv(t *testing.T) {
	long := strings.Repeat("x", maxArgBytes-1)
	for _, c := range []struct {
		name string
		argv []string
		ok   bool
	}{
		{"command", []string{"a"}, true},
		{"empty argument", []string{"a", ""}, true},
		{"newline", []string{"a", "\n"}, true},
		{"nil", nil, false},
		{"empty name", []string{""}, false},
		{"blank name", []string{" \t\u2003"}, false},
		{"NUL", []string{"a", "b\x00c"}, false},
		{"not UTF-8", []string{"a", "\xff"}, false},
		{"half a surrogate", []string{"a", "\xed\xa0\x80"}, false},
		{"as long as may be", []string{"a", long[:len(long)-1]}, true},
		{"longest argument alone", []string{long}, true},
		{"longest and a name", []string{"aa", long}, false},
		{"too long an argument", []string{long + "x"}, false},
		{"too long together", []string{"a", long[:1<<16], long[:1<<16]}, false},
		{"half a million", append([]string{"a"}, make([]string, 500_000)...), false},
	} {
		if err := checkArgv(c.argv); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		} else if err != nil && approveUnchecked(c.argv).argv != nil {
			t.Errorf("%s: approved unchecked", c.name)
		}
		p, _ := compilePolicy([]ruleSet{{Source: "s", Allow: []ruleSpec{{Text: "*"}}}})
		if _, d := p.decide(c.argv); d.Allowed != c.ok {
			t.Errorf("%s: decided %+v", c.name, d)
		}
	}
}

func TestApproveUncheckedCopies(t *testing.T) {
	argv := []string{"/x/hook", "a"}
	a := approveUnchecked(argv)
	argv[0] = "rm"
	if !slices.Equal(a.argv, []string{"/x/hook", "a"}) {
		t.Errorf("got %+v", a)
	}
	if policy(nil).lint() != nil {
		t.Error("an empty policy has risks")
	}
}

func TestBroad(t *testing.T) {
	for text, want := range map[string]bool{
		`"*"`: true, `"gi*"`: true, `"/git/"`: true, `"/^git log/"`: true, `"git *"`: true, `"bash -c *"`: true, `["bash","..."]`: true, `["*","..."]`: true, `["ls*"]`: true,
		`"/^ls$/"`: false, `"ls *"`: false, `["ls","..."]`: false, `"npm test"`: false, `"bash x.sh"`: false, `"aexec --version"`: false, `"/bad(/"`: false,
	} {
		if why := broad(readRules(t, text)[0]); (why != "") != want {
			t.Errorf("%s: %q", text, why)
		}
	}
}

// The findings are one line each and name their rule.
func TestFindings(t *testing.T) {
	p, err := compilePolicy([]ruleSet{{Source: "settings.json", Allow: readRules(t, `"*" "gi*" "/x/" "sh *" "git *" "a b c" "./x" " x"`), Deny: readRules(t, `"/bin/x"`)}})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range p.lint() {
		seen[f.Code] = true
		if f.Message == "" || strings.HasSuffix(f.Message, ".") || f.Rule.String() == "" {
			t.Errorf("%+v", f)
		}
	}
	for code := range strings.FieldsSeq(broadCodes + " admits-options deny-relied-upon ambiguous-words relative-name never-matches") {
		if !seen[code] {
			t.Errorf("no finding %s", code)
		}
	}
}

// These make a backtracking matcher run for longer than the universe is old; here they end before anyone looks.
func TestHostileRulesEnd(t *testing.T) {
	as := strings.Repeat("a", 60_000)
	for _, c := range []struct {
		rule, arg string
		want      bool
	}{
		{`"/^x (a+)+$/"`, as, true}, {`"/^x (a+)+$/"`, as + "!", false},
		{`"/^(a+)+$/"`, as, false}, {`"/(a|aa)+$/"`, as + "!", false}, {`"/(x+x+)+y/"`, as, false},
		{`"x *a*a*a*a*a*b"`, as + "b", true}, {`"x *a*a*a*a*a*b"`, as, false}, {`"*a*a*a*a*a*b"`, as, false},
		{`["x","*a*a*a*a*a*b"]`, as + "b", true}, {`["x","*a*a*a*a*a*b"]`, as, false}, {`["x","/^(a+)+$/"]`, as + "!", false},
	} {
		p, err := compilePolicy([]ruleSet{{Source: "s", Allow: readRules(t, c.rule)}})
		if err != nil {
			t.Fatal(err)
		}
		if _, d := p.decide([]string{"x", c.arg}); d.Allowed != c.want {
			t.Errorf("%s: %v", c.rule, d)
		}
	}
}

// FuzzRules holds string rules to an oracle of their own: a star is .* and nothing else, and what a deny rule stops it
// stops under every directory and with any newline where a star stands.
func FuzzRules(f *testing.F) {
	for _, rule := range []string{"echo *", "*", "ls *.txt", "a**b", "x *a*a*b", "git log", "/^git (log|status)$/", "/a.b/", "/x/i", "/bin/ls *", "é*", `["a"]`} {
		f.Add(rule, "echo", "a\nb", "x.txt")
		f.Add(rule, "/bin/ls", "", "/etc/shadow.txt")
		f.Add(rule, "git log", "log", "a")
	}
	f.Fuzz(func(t *testing.T, rule, name, a, b string) {
		spec := ruleSpec{Text: rule}
		allows, err := compilePolicy([]ruleSet{{Source: "s", Allow: []ruleSpec{spec}}})
		if err != nil {
			return
		}
		denies, err := compilePolicy([]ruleSet{{Source: "s", Allow: readRules(t, `"*" ["/^(?s).*$/","..."]`), Deny: []ruleSpec{spec}}})
		if err != nil {
			t.Fatalf("%q compiles in allow, not in deny: %v", rule, err)
		}
		allows.lint()
		denies.lint()
		broad(spec)
		argv := []string{name, a, b}
		valid := checkArgv(argv) == nil
		checkFuzzed(t, allows, argv, valid && oracle(rule, false, argv) && !strings.ContainsFunc(name, spaceOrControl))
		checkFuzzed(t, allows, []string{name + " " + a, b}, false)
		base := path.Base(name)
		asSent, byName := oracle(rule, true, argv), oracle(rule, true, []string{base, a, b})
		if base != "ae" && base != "aexec" {
			checkFuzzed(t, denies, argv, valid && !asSent && !byName)
		}
		if byName {
			checkFuzzed(t, denies, []string{"/usr/bin/" + base, a, b}, false)
		}
		if strings.Contains(rule, "*") && rule[0] != '/' {
			checkFuzzed(t, denies, strings.Split(strings.ReplaceAll(rule, "*", a+"\n"+b), " "), false)
		}
	})
}

// oracle decides a string rule by an independent way: a regexp made of it.
func oracle(rule string, deny bool, argv []string) bool {
	joined := strings.Join(argv, " ")
	if len(rule) > 2 && rule[0] == '/' && rule[len(rule)-1] == '/' {
		body := rule[1 : len(rule)-1]
		if deny {
			body = "(?s:" + body + ")"
		}
		re, err := regexp.Compile(body)
		return err == nil && re.MatchString(joined)
	}
	if !utf8.ValidString(rule) {
		return false
	}
	return regexp.MustCompile(`(?s)\A` + strings.ReplaceAll(regexp.QuoteMeta(rule), `\*`, `.*`) + `\z`).MatchString(joined)
}

// checkFuzzed wants this decision, twice the same, and an approved copy of argv if it is allowed, else none.
func checkFuzzed(t *testing.T, p policy, argv []string, allowed bool) {
	t.Helper()
	a, d := p.decide(argv)
	if d.Allowed != allowed {
		t.Fatalf("%q: decided %+v", argv, d)
	}
	if allowed && (!slices.Equal(a.argv, argv) || &a.argv[0] == &argv[0]) || !allowed && a.argv != nil {
		t.Fatalf("%q: approved %q", argv, a.argv)
	}
	if again, e := p.decide(argv); d != e || !slices.Equal(again.argv, a.argv) {
		t.Fatalf("%q: decided %+v, then %+v", argv, d, e)
	}
}

// BenchmarkDecide1000 decides by the last of 1,000 rules; the floor is what any decision must do: join, and compare 1,000 times.
func BenchmarkDecide1000(b *testing.B) {
	argv := []string{"kubectl", "get", "pods", "--namespace", "999"}
	specs := func(format string, argv bool) []ruleSpec {
		var all []ruleSpec
		for i := range 1000 {
			r := ruleSpec{Text: fmt.Sprintf(format, i)}
			if argv {
				r = ruleSpec{Argv: strings.Split(r.Text, " ")}
			}
			all = append(all, r)
		}
		return all
	}
	b.Run("floor", func(b *testing.B) {
		rules := specs("kubectl get pods --namespace %03d", false)
		b.ReportAllocs()
		for b.Loop() {
			joined := strings.Join(argv, " ")
			if i := slices.IndexFunc(rules, func(r ruleSpec) bool { return r.Text == joined }); i != 999 {
				b.Fatal(i)
			}
		}
	})
	for _, c := range []struct {
		name, format string
		argv         bool
	}{
		{"exact", "kubectl get pods --namespace %03d", false},
		{"glob", "kubectl get * --namespace %03d", false},
		{"argv", "kubectl get pods --namespace %03d", true},
		{"regexp", "/^kubectl get .* --namespace %03d$/", false},
	} {
		p, err := compilePolicy([]ruleSet{{Source: "s", Allow: specs(c.format, c.argv), Deny: []ruleSpec{{Text: "sudo *"}}}})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, d := p.decide(argv); !d.Allowed {
					b.Fatal(d)
				}
			}
		})
	}
	b.Run("compile", func(b *testing.B) {
		set := []ruleSet{{Source: "s", Allow: specs("kubectl get pods --namespace %03d", false)}}
		for b.Loop() {
			if _, err := compilePolicy(set); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestRuleSpecIsJSON(t *testing.T) {
	data, err := json.Marshal([]*rule{{List: "allow", Rule: ruleSpec{Argv: []string{"a", "b"}}, Source: "s"}, {List: "deny", Rule: ruleSpec{Text: "c"}, Source: "s"}})
	want := `[{"list":"allow","rule":["a","b"],"source":"s"},{"list":"deny","rule":"c","source":"s"}]`
	if err != nil || !bytes.Equal(data, []byte(want)) {
		t.Errorf("%s, %v", data, err)
	}
}
