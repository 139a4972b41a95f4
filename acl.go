// This file is the policy: it compiles rules, decides an argv, explains the decision and lints the rules.
// It may look at rules and arguments and at nothing else, and it alone may make an approved value.
// It must not do I/O, know the time, or keep state: the same rules and argv always give the same decision.
package main

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxArgBytes  = 128 << 10 // one argument and its NUL byte: MAX_ARG_STRLEN in execve(2)
	maxArgvBytes = 128 << 10 // all arguments joined with spaces: with the rule's length it bounds every match

	listAllow, listDeny = "allow", "deny"
	pluginSource        = "plugin:"       // before the plugin's name in ruleSet.Source
	moreArgs            = "..."           // as the last element of an argv rule
	regexpMeta          = `^$\()[]{}|+?*` // what tells a regexp from the name of a file
)

var ( // compiled once; in a regexp between slashes every other "/" is escaped, and other languages put flags behind the last
	slashed    = regexp.MustCompile(`^/(?:[^/\\]|\\.)+/$`)
	flagged    = regexp.MustCompile(`^/(?:[^/\\]|\\.)+/[dgimnsuvxyAU]+$`)
	openEnded  = regexp.MustCompile(`\.[*+{]|\\S|\[\^`)                            // matches words of any kind
	misordered = regexp.MustCompile(`^[^|()\[\\]*(?:\$[\w ](?:[^*?{]|$)|[\w ]\^)`) // text after the end, or before the beginning
)

// ruleSpec is one rule as an administrator wrote it: a string, or (Argv not nil) an argv array.
type ruleSpec struct {
	Text string
	Argv []string
}

// String gives the rule as written: the text of a string rule, the compact JSON array of an argv rule.
func (r ruleSpec) String() string {
	if r.Argv == nil {
		return r.Text
	}
	return string(marshal(r.Argv))
}

// MarshalJSON writes the rule back as the string or array that it was.
func (r ruleSpec) MarshalJSON() ([]byte, error) {
	return marshal(map[bool]any{true: r.Text, false: r.Argv}[r.Argv == nil]), nil
}

// ruleSet is the rules of one source.
type ruleSet struct {
	Source      string // "settings.json" or "plugin:NAME"
	Command     string // of a plugin: the only literal first word that its allow rules may have
	Allow, Deny []ruleSpec
}

// ruleError names the rule that does not compile, so that its reader can add file, line and column.
type ruleError struct {
	Source, List, Rule string // the rule as written
	Index              int    // of the rule in that list
	Err                error  // says what to write instead
}

func (e *ruleError) Error() string {
	return fmt.Sprintf("rule %q in exec.%s of %s: %v", e.Rule, e.List, e.Source, e.Err)
}

// decision says what the policy decided and which rule did it. Rule, List and Source are empty when no rule matched.
type decision struct {
	Allowed bool   `json:"allowed"`
	Rule    string `json:"rule,omitempty"`
	List    string `json:"list,omitempty"`
	Source  string `json:"source,omitempty"`
}

// why says it to people.
func (d decision) why() string {
	if d.Rule == "" {
		return "no rule allows it"
	}
	return fmt.Sprintf("the %s rule %q of %s", d.List, d.Rule, d.Source)
}

// approved is an argv that may be run. Its fields are set in this file only; the zero value is refused where commands are run.
type approved struct {
	argv []string
	by   decision
}

// listedRule is one effective rule, for `acl list` and /api/acl.
type listedRule struct {
	List   string   `json:"list"`
	Rule   ruleSpec `json:"rule"`
	Source string   `json:"source"`
}

// policy is the compiled rules of all sources by their list, immutable.
type policy struct{ list map[string][]*rule }

// rule is one compiled rule and the decision that it makes.
type rule struct {
	spec  ruleSpec
	by    decision
	words []pattern // of an argv rule one for each argument but "...", of any other one for the joined string
	exact []string  // the only command that it matches, nil if there are more
}

// pattern is a string rule or an element of an argv rule.
type pattern struct {
	kind    string            // "exact", "glob", "path.Match" or "regexp"
	body    string            // of a regexp, what is between the slashes
	matches func(string) bool // a regexp anywhere in a joined string, but only the whole of an element
	command string            // the one name of a command that it can match, "" if there may be several
	bounded bool              // a regexp that begins with ^ and ends with $
}

// compilePolicy compiles every rule of every set, or returns a *ruleError for the first that does not compile.
func compilePolicy(sets []ruleSet) (*policy, error) {
	p := &policy{map[string][]*rule{}}
	for _, list := range []string{listDeny, listAllow} {
		for _, set := range sets {
			for i, spec := range map[string][]ruleSpec{listDeny: set.Deny, listAllow: set.Allow}[list] {
				r, err := compileRule(spec, set, list)
				if err != nil {
					return nil, &ruleError{set.Source, list, spec.String(), i, err}
				}
				p.list[list] = append(p.list[list], r)
			}
		}
	}
	return p, nil
}

func compileRule(spec ruleSpec, set ruleSet, list string) (*rule, error) {
	r := &rule{spec: spec, by: decision{list == listAllow, spec.String(), list, set.Source}, exact: spec.Argv}
	texts := spec.Argv
	switch n := len(texts); {
	case texts == nil:
		texts, r.exact = []string{spec.Text}, strings.Split(spec.Text, " ")
	case n == 0 || strings.TrimSpace(texts[0]) == "" || texts[0] == moreArgs:
		return nil, errors.New(`an argv rule begins with the name of a command: ["git", "log", "..."]`)
	case texts[n-1] == moreArgs:
		texts, r.exact = texts[:n-1], nil
	}
	for _, text := range texts {
		w, err := compilePattern(text, spec.Argv != nil, list == listDeny)
		if err != nil {
			return nil, err
		}
		if r.words = append(r.words, w); w.kind != "exact" {
			r.exact = nil
		}
	}
	plugin := set.Command != "" || strings.HasPrefix(set.Source, pluginSource)
	if own := r.words[0].command; plugin && list == listAllow && (own == "" || own != set.Command) {
		return nil, fmt.Errorf("a plugin may allow only its own command: begin the rule with %q and a space, literally", set.Command)
	}
	return r, nil
}

// compilePattern compiles a string rule or an element of an argv rule. What looks like a rule of another kind is a mistake.
func compilePattern(text string, element, deny bool) (pattern, error) {
	between := strings.HasPrefix(text, "/") && strings.HasSuffix(text, "/")
	caret, meta := strings.HasPrefix(text, "/^"), strings.ContainsAny(text, regexpMeta)
	sure := meta || strings.Contains(text, " ") || strings.Trim(path.Base(text), "gi") == "" // a regexp and not "/bin/su", which looks flagged too
	open, stray := caret || sure && flagged.MatchString(text), strings.HasPrefix(text, "^")
	if element {
		between, open, stray = caret && strings.HasSuffix(text, "$/"), false, caret || meta && slashed.MatchString(text)
	}
	wild := element && !between && strings.ContainsAny(text, "*?[")
	_, malformed := path.Match(text, "")
	for _, mistake := range []struct {
		made bool
		say  string
	}{
		{!element && strings.TrimSpace(text) == "", "an empty rule names no command: remove it"},
		{text == moreArgs, `"..." stands only at the end of an argv rule: write ["command", "..."], or "/^\.\.\.$/" for three literal dots`},
		{!element && strings.HasPrefix(text, `["`), `an argv rule is an array, not a string: write ["git", "log"] without quotes around it`},
		{!between && stray, `a regexp stands between slashes: "/(?i)^sudo/", in an argv rule between "/^" and "$/": "/^[0-9]+$/"`},
		{!between && open, `a regexp ends with its closing slash and has no flags behind it: write "/(?i)^sudo/"; a path is written in an argv rule`},
		{!utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl), `a rule is UTF-8 without control characters: write "\n" in a regexp`},
		{wild && malformed != nil, `the pattern is not well formed: close the "[", or write "\[" for the character itself`},
		{between && (len(text) < 3 || element && text == "/^$/"), `a regexp needs something between its slashes; an empty argument is ""`},
		{between && !slashed.MatchString(text), `a "/" inside a regexp is written "\/"; a path is better written in an argv rule: ["/bin/ls", "/tmp/"]`},
	} {
		if mistake.made {
			return pattern{}, errors.New(mistake.say)
		}
	}
	p := pattern{kind: "exact", command: wordIn(text + " "), matches: func(s string) bool { return s == text }}
	switch parts := strings.Split(text, "*"); {
	case between:
		return compileRegexp(text[1:len(text)-1], element, deny)
	case wild:
		p = pattern{kind: "path.Match", matches: func(s string) bool { ok, _ := path.Match(text, s); return ok }}
	case !element && len(parts) > 1:
		p = pattern{kind: "glob", command: wordIn(parts[0]), matches: func(s string) bool { return globMatch(parts, s) }}
	case element:
		p.command = text
	}
	return p, nil
}

// compileRegexp holds the regexp of an element to the whole of it: "^a|b$" alone would find "axx" and "xxb". For the command
// its syntax tree is asked, not its text: "^git *x" begins like "^git " and matches "gitx".
func compileRegexp(body string, element, deny bool) (pattern, error) {
	before, after := "", ""
	if element {
		before, after = `\A(?:`, `)\z`
	}
	if deny {
		before += "(?s)" // "." matches a newline too, so that none evades the rule
	}
	tree, alone := syntax.Parse(body, syntax.Perl)      // fails for "a)|(?:b", which would close our group
	re, framed := regexp.Compile(before + body + after) // fails for an open \Q
	if e, ok := errors.AsType[*syntax.Error](errors.Join(alone, framed)); ok {
		return pattern{}, fmt.Errorf("not a regexp of RE2 syntax: %s at %q", e.Code, e.Expr)
	}
	p := pattern{kind: "regexp", body: body, matches: re.MatchString}
	if seq := tree.Sub; !element && tree.Op == syntax.OpConcat && seq[0].Op == syntax.OpBeginText {
		p.bounded = seq[len(seq)-1].Op == syntax.OpEndText
		if start := seq[1]; start.Op == syntax.OpLiteral && start.Flags&syntax.FoldCase == 0 {
			p.command = wordIn(string(start.Rune))
			if p.bounded && len(seq) == 3 {
				p.command = wordIn(string(start.Rune) + " ")
			}
		}
	}
	return p, nil
}

// wordIn gives the first word of a text, "" if no space ends it.
func wordIn(text string) string { return text[:max(0, strings.Index(text, " "))] }

// globMatch finds the parts in order, first and last at the ends. Of those between the leftmost place will do, so nothing is tried twice.
func globMatch(parts []string, s string) bool {
	last := len(parts) - 1
	s, ok := strings.CutPrefix(s, parts[0])
	for _, part := range parts[1:last] {
		if ok {
			_, s, ok = strings.Cut(s, part)
		}
	}
	return ok && strings.HasSuffix(s, parts[last])
}

func (r *rule) matches(argv []string, joined string) bool {
	if r.spec.Argv == nil { // joined, "git init x" is a name or git with two arguments: only an argv rule can tell them apart
		return r.words[0].matches(joined) && !(r.by.Allowed && strings.ContainsFunc(argv[0], spaceOrControl))
	}
	n, same := len(r.words), func(w pattern, arg string) bool { return w.matches(arg) }
	rest := len(r.spec.Argv) > n // "..." admits further arguments
	return len(argv) >= n && (rest || len(argv) == n) && slices.EqualFunc(r.words, argv[:n], same)
}

func spaceOrControl(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) }

// checkArgv says what is wrong with args as a command, nil if nothing is.
func checkArgv(argv []string) error {
	if len(argv) == 0 || strings.TrimSpace(argv[0]) == "" {
		return errors.New("args must begin with the name of a command, and that must not be blank")
	}
	total := len(argv) - 1 // the spaces between
	for i, arg := range argv {
		total += len(arg)
		switch {
		case strings.Contains(arg, "\x00") || !utf8.ValidString(arg):
			return fmt.Errorf("args[%d] must be UTF-8 without a NUL byte", i)
		case len(arg) >= maxArgBytes || total > maxArgvBytes:
			return fmt.Errorf("args[%d] is too long: each must be under %d bytes, all with spaces between at most %d", i, maxArgBytes, maxArgvBytes)
		}
	}
	return nil
}

// names gives a command's name as sent, then all that a deny rule may know it by: without its directory, and ae and aexec exchanged.
func names(sent string) []string {
	dir, base := path.Split(strings.TrimRight(sent, "/"))
	all := []string{sent, base}
	if other := map[string]string{"ae": "aexec", "aexec": "ae"}[base]; other != "" {
		all = append(all, dir+other, other)
	}
	return slices.Compact(all)
}

// first gives the first rule of a list that matches, nil if none does.
func (p *policy) first(list string, argv []string) *rule {
	joined := strings.Join(argv, " ")
	for _, r := range p.list[list] {
		if r.matches(argv, joined) {
			return r
		}
	}
	return nil
}

// decide is the one decision: deny first, then allow, then refuse. Approved is a copy of argv, or nothing at all.
func (p *policy) decide(argv []string) (approved, decision) {
	if checkArgv(argv) != nil {
		return approved{}, decision{} // fail safe: callers have checked
	}
	argv = slices.Clone(argv)
	for _, name := range names(argv[0]) {
		if r := p.first(listDeny, slices.Concat([]string{name}, argv[1:])); r != nil {
			return approved{}, r.by
		}
	}
	if r := p.first(listAllow, argv); r != nil {
		return approved{argv, r.by}, r.by
	}
	return approved{}, decision{}
}

// approveUnchecked makes an approved value that no rule decided: only for a plugin's own hook file, for what a
// trusted plugin with "invoke":"run" leads to, and for the help of a tool that the operator makes a plugin of.
func approveUnchecked(argv []string, source string) approved {
	if checkArgv(argv) != nil {
		return approved{} // fail safe: exec.go refuses it
	}
	return approved{slices.Clone(argv), decision{Allowed: true, Source: source}}
}

// rules lists the effective rules in the order in which they are tried.
func (p *policy) rules() (all []listedRule) {
	for _, r := range slices.Concat(p.list[listDeny], p.list[listAllow]) {
		all = append(all, listedRule{r.by.List, r.spec, r.by.Source})
	}
	return all
}

// finding is one risky thing about a policy, for `acl doctor`.
type finding struct {
	Rule    string `json:"rule,omitempty"` // as written; empty: about the policy as a whole
	List    string `json:"list,omitempty"`
	Source  string `json:"source,omitempty"`
	Code    string `json:"code"`    // stable kebab-case name, e.g. "allow-all"
	Message string `json:"message"` // what is risky and what to write instead
}

// What the doctor warns of, most dangerous first, and the commands that it knows (without the version numbers at their ends).
const (
	dangers = "allow-all open-command unanchored-regexp runs-programs reads-directory admits-options deny-relied-upon" +
		" deny-path ambiguous-words relative-name never-matches"
	runsPrograms = " sh ash bash dash zsh fish ksh csh tcsh pwsh busybox env xargs find fd parallel nice nohup setsid timeout time watch stdbuf script" +
		" expect sudo doas su runuser setpriv chroot unshare nsenter flock ssh scp sftp rsync tar cpio zip awk gawk mawk nawk sed ed ex vi vim nvim emacs" +
		" nano less more man perl ruby python pypy node deno bun php lua tclsh java docker podman nerdctl kubectl helm crontab at batch systemctl" +
		" systemd-run gdb strace ltrace sqlite psql mysql socat nc ncat openssl npx uvx "
	readsDirectory = " git hg svn make gmake cmake ninja just task npm npx pnpm yarn bun deno node tsc jest eslint cargo go gradle mvn ant pip poetry uv" +
		" tox pytest python bundle rake composer mix dotnet terraform ansible ansible-playbook docker-compose vagrant direnv pre-commit "
)

// lint lists what is risky about the policy, most dangerous first.
func (p *policy) lint() (all []finding) {
	for _, r := range slices.Concat(p.list[listDeny], p.list[listAllow]) {
		all = append(all, p.risks(r)...)
	}
	if len(p.list[listDeny]) > 0 && slices.ContainsFunc(p.list[listAllow], func(r *rule) bool { return r.exact == nil }) {
		all = append(all, finding{Code: "deny-relied-upon", Message: "exec.deny is a seat belt, it cannot hold every way: let exec.allow be the boundary"})
	}
	slices.SortStableFunc(all, func(a, b finding) int { return strings.Index(dangers, a.Code) - strings.Index(dangers, b.Code) })
	return all
}

// risks lists what is risky about one rule.
func (p *policy) risks(r *rule) (all []finding) {
	add := func(is bool, code, message string) bool {
		if is {
			all = append(all, finding{r.by.Rule, r.by.List, r.by.Source, code, message})
		}
		return is
	}
	text, name := r.spec.Argv == nil, r.words[0].command
	backwards := slices.ContainsFunc(r.words, func(w pattern) bool { return misordered.MatchString(w.body) })
	if add(backwards, "never-matches", "matches nothing: ^ stands first, $ last") || !r.by.Allowed {
		add(!r.by.Allowed && strings.Contains(name, "/"), "deny-path", "stops only this path: write the name alone, which stops them all")
		return all
	}
	_, by := p.decide(r.exact)
	stopped := by.List == listDeny || slices.ContainsFunc(p.list[listDeny], func(d *rule) bool { return d.by.Rule == r.by.Rule || d.by.Rule == "*" })
	nameless := r.exact != nil && !by.Allowed || text && strings.ContainsFunc(name, spaceOrControl)
	everything := r.matches([]string{"zq0"}, "zq0") && r.matches([]string{"Q_7", "-w", "~"}, "Q_7 -w ~") // names nobody allows on purpose
	if add(stopped, "never-matches", "is stopped by a deny rule: remove one of them") ||
		add(nameless, "never-matches", "a name with white space needs an argv rule") ||
		add(everything, "allow-all", "allows every command: name the commands that are needed") {
		return all // there is no more to say of it
	}
	guarded := strings.Contains(strings.ReplaceAll(r.by.Rule, `","`, " "), " -- ")
	loose := len(r.spec.Argv) > len(r.words) || slices.ContainsFunc(r.words, func(w pattern) bool {
		return w.kind == "glob" || text && openEnded.MatchString(w.body) || !text && w.kind != "exact" && (w.matches("-x") || w.matches("--x"))
	})
	tool := " " + strings.TrimRight(path.Base(name), "0123456789.-") + " "
	harmless := len(r.exact) == 2 && strings.Contains(" --version -v -V version --help -h help ", " "+r.exact[1]+" ")
	add(name == "", "open-command", "does not fix the command: begin with its whole name and a space, without wildcards")
	add(text && r.words[0].kind == "regexp" && !r.words[0].bounded, "unanchored-regexp", "is found anywhere in a command: write it as /^…$/")
	add(!harmless && strings.Contains(runsPrograms, tool), "runs-programs", "can run other programs, perhaps all: allow the program that is needed")
	add(!harmless && strings.Contains(readsDirectory, tool), "reads-directory", "obeys files in its working directory: who writes there decides what runs")
	add(loose && !guarded, "admits-options", `lets any option through, also one that writes or runs a file: name the arguments, or put "--" before them`)
	add(text && len(r.exact) > 2, "ambiguous-words", "does not say where one argument ends and the next begins: write an argv rule")
	add(strings.Contains(name, "/") && !path.IsAbs(name), "relative-name", "depends on the working directory: write the absolute path, or the name alone")
	return all
}

// broad says whether the one rule is too wide to be added without --force, and why ("" if not).
func broad(spec ruleSpec) string {
	p, err := compilePolicy([]ruleSet{{Allow: []ruleSpec{spec}}})
	if err != nil {
		return "" // editRules says what is wrong with it
	}
	wide, _, _ := strings.Cut(dangers, map[bool]string{true: "runs-programs", false: "admits-options"}[p.list[listAllow][0].exact != nil])
	if all := p.lint(); len(all) > 0 && strings.Contains(wide, all[0].Code) {
		return all[0].Message
	}
	return ""
}
