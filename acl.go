// This file is the policy: it compiles rules, decides an argv, explains the decision and lints the rules.
// It may look at rules and arguments and at nothing else, and it alone may make an approved value.
// It must not do I/O, know the time, or keep state: the same rules and argv always give the same decision.
package main

import (
	"encoding/json"
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
	flagged    = regexp.MustCompile(`^/(?:[^/\\]|\\.)+/([dgimnsuvxyAU]+)$`)
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
	data, _ := r.MarshalJSON() // strings always marshal
	return string(data)
}

// MarshalJSON writes the rule back as the string or array that it was.
func (r ruleSpec) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	var v any = r.Text
	if r.Argv != nil {
		v = r.Argv
	}
	err := enc.Encode(v)
	return []byte(strings.TrimSuffix(b.String(), "\n")), err
}

// ruleSet is the rules of one source. Command is empty for settings.json; for a plugin it is the only
// literal first word that its allow rules may have.
type ruleSet struct {
	Source      string // "settings.json" or "plugin:NAME"
	Command     string
	Allow, Deny []ruleSpec
}

// ruleError names the rule that does not compile, so that config.go can add file, line and column.
type ruleError struct {
	Source, List string // list is "allow" or "deny"
	Index        int    // of the rule in that list
	Rule         string // as written
	Err          error  // says what to write instead
}

func (e *ruleError) Error() string {
	return fmt.Sprintf("rule %q in exec.%s of %s: %v", e.Rule, e.List, e.Source, e.Err)
}
func (e *ruleError) Unwrap() error { return e.Err }

// decision says what the policy decided and which rule did it. Rule, List and Source are empty when no rule matched.
type decision struct {
	Allowed bool   `json:"allowed"`
	Rule    string `json:"rule,omitempty"`
	List    string `json:"list,omitempty"`   // "allow" or "deny"
	Source  string `json:"source,omitempty"` // ruleSet.Source
}

// approved is an argv that may be run. Its fields are set in this file only (powers_test.go); the zero value is refused by exec.go.
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

// finding is one risky thing about a policy, for `acl doctor`.
type finding struct {
	Rule    string `json:"rule,omitempty"` // as written; empty: about the policy as a whole
	List    string `json:"list,omitempty"`
	Source  string `json:"source,omitempty"`
	Code    string `json:"code"`    // stable kebab-case name, e.g. "allow-all"
	Message string `json:"message"` // what is risky and what to write instead
}

// policy is the compiled rules of all sources, immutable.
type policy struct{ deny, allow []rule }

// pattern is a string rule, or one element of an argv rule: a regexp if re is set, a joined glob if parts is, a path.Match
// pattern if wild, else the text itself.
type pattern struct {
	text  string         // as written, of a regexp what is between the slashes
	parts []string       // what stands between the stars
	re    *regexp.Regexp // matches anywhere in a joined string, only the whole of an element
	wild  bool
}

// rule is one compiled rule with its origin. An argv rule has elems, any other only the pattern.
type rule struct {
	pattern
	elems              []pattern
	rest               bool // further arguments are admitted
	spec               ruleSpec
	name, list, source string // name is spec.String(), made once
}

// compilePolicy compiles every rule of every set, or returns a *ruleError for the first that does not compile.
func compilePolicy(sets []ruleSet) (*policy, error) {
	p := &policy{}
	for _, set := range sets {
		for i, spec := range set.Deny {
			r, err := compileRule(spec, set, listDeny)
			if err != nil {
				return nil, &ruleError{set.Source, listDeny, i, spec.String(), err}
			}
			p.deny = append(p.deny, r)
		}
		for i, spec := range set.Allow {
			r, err := compileRule(spec, set, listAllow)
			if err != nil {
				return nil, &ruleError{set.Source, listAllow, i, spec.String(), err}
			}
			p.allow = append(p.allow, r)
		}
	}
	return p, nil
}

func compileRule(spec ruleSpec, set ruleSet, list string) (r rule, err error) {
	r = rule{spec: spec, name: spec.String(), list: list, source: set.Source}
	if spec.Argv != nil {
		err = r.compileArgv(spec.Argv)
	} else {
		r.pattern, err = compileText(spec.Text, list == listDeny)
	}
	plugin := set.Command != "" || strings.HasPrefix(set.Source, pluginSource)
	if err == nil && plugin && list == listAllow && (set.Command == "" || r.firstWord() != set.Command) {
		err = fmt.Errorf("a plugin may allow only its own command: begin the rule with %q and a space, literally", set.Command)
	}
	return r, err
}

func (r *rule) compileArgv(argv []string) error {
	if len(argv) == 0 || strings.TrimSpace(argv[0]) == "" || argv[0] == moreArgs {
		return errors.New(`an argv rule begins with the name of a command: ["git", "log", "..."]`)
	}
	if argv[len(argv)-1] == moreArgs {
		r.rest, argv = true, argv[:len(argv)-1]
	}
	for _, text := range argv {
		e, err := compileElement(text, r.list == listDeny)
		if err != nil {
			return err
		}
		r.elems = append(r.elems, e)
	}
	return nil
}

// mistake is a text that looks like a rule of another kind than it would be, and what to write instead.
type mistake struct {
	made bool
	say  string
}

func firstMistake(text string, all ...mistake) error {
	all = append(all, mistake{!utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl),
		`a rule is UTF-8 without control characters: in a regexp write "\n" or "\x1b" for one`})
	if i := slices.IndexFunc(all, func(m mistake) bool { return m.made }); i >= 0 {
		return errors.New(all[i].say)
	}
	return nil
}

func compileText(text string, deny bool) (pattern, error) {
	between := strings.HasPrefix(text, "/") && strings.HasSuffix(text, "/")
	flags := flagged.FindStringSubmatch(text) // of "/bin/su" too: a plain word between slashes is a directory, unless the commonest flags follow
	err := firstMistake(text,
		mistake{strings.TrimSpace(text) == "", "an empty rule names no command: remove it"},
		mistake{text == moreArgs, `"..." is the last element of an argv rule: write ["command", "..."]`},
		mistake{strings.HasPrefix(text, `["`), `an argv rule is an array, not a string: write ["git", "log"] without quotes around it`},
		mistake{strings.HasPrefix(text, "^"), `a regexp stands between slashes: write "/^git log$/"`},
		mistake{!between && strings.HasPrefix(text, "/^") || flags != nil && (strings.ContainsAny(text, regexpMeta+" ") || strings.Trim(flags[1], "gi") == ""),
			`a regexp ends with its closing slash and has no flags behind it: write "/(?i)^sudo/"; a path is written in an argv rule`})
	switch {
	case err != nil:
		return pattern{}, err
	case between:
		return compileRegexp(text, deny)
	case strings.Contains(text, "*"):
		return pattern{text: text, parts: strings.Split(text, "*")}, nil
	}
	return pattern{text: text}, nil
}

// compileElement compiles one element of an argv rule, before its last "...".
func compileElement(text string, deny bool) (pattern, error) {
	whole := strings.HasPrefix(text, "/^") && strings.HasSuffix(text, "$/")
	_, bad := path.Match(text, "")
	wild := strings.ContainsAny(text, "*?[")
	err := firstMistake(text,
		mistake{text == moreArgs, `"..." stands only at the end of an argv rule; three literal dots are "/^\.\.\.$/"`},
		mistake{text == "/^$/", `a regexp needs something between "/^" and "$/"; an empty argument is ""`},
		mistake{!whole && (strings.HasPrefix(text, "/^") || slashed.MatchString(text) && strings.ContainsAny(text, regexpMeta)),
			`a regexp in an argv rule is written "/^[0-9]+$/": begin with "/^", end with "$/", flags inside as (?i)`},
		mistake{!whole && wild && bad != nil, `the pattern is not well formed: close the "[", or write "\[" for the character itself`})
	switch {
	case err != nil:
		return pattern{}, err
	case whole:
		p, err := compileRegexp(text, deny)
		if err == nil { // once more, held to the whole element: "/^a|b$/" alone would find "axx" and "xxb"
			p.re, err = regexp.Compile(`\A(?:` + p.re.String() + `)\z`) // fails for an open \Q
		}
		return p, err
	case wild:
		return pattern{text: text, wild: true}, nil
	}
	return pattern{text: text}, nil
}

// compileRegexp compiles a regexp with its slashes. In a deny rule "." matches a newline too, so that none evades it.
func compileRegexp(text string, deny bool) (pattern, error) {
	err := firstMistake(text,
		mistake{len(text) < 3, "a regexp needs something between its slashes"},
		mistake{!slashed.MatchString(text), `a "/" inside a regexp is written "\/"; a path is better written in an argv rule: ["/bin/ls", "/tmp/"]`})
	if err != nil {
		return pattern{}, err
	}
	body, mode := text[1:len(text)-1], ""
	if deny {
		mode = "(?s)"
	}
	re, err := regexp.Compile(mode + body)
	if e := (*syntax.Error)(nil); errors.As(err, &e) {
		return pattern{}, fmt.Errorf("not a regexp of RE2 syntax: %s at %q", e.Code, e.Expr)
	}
	return pattern{text: body, re: re}, err
}

func (p *pattern) matches(s string) bool {
	switch {
	case p.re != nil:
		return p.re.MatchString(s)
	case p.parts != nil:
		return globMatch(p.parts, s)
	case p.wild:
		ok, err := path.Match(p.text, s)
		return ok && err == nil
	}
	return s == p.text
}

func (p *pattern) exact() bool { return p.re == nil && p.parts == nil && !p.wild }

// globMatch finds the parts in order, the first at the start and the last at the end. The leftmost place is always
// good enough for the parts between, so nothing is tried twice.
func globMatch(parts []string, s string) bool {
	first, last := parts[0], parts[len(parts)-1]
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s = s[i+len(part):]
	}
	return true
}

// spelling is one way to name a command: argv[0], and it joined with the arguments.
type spelling struct{ name, joined string }

// spellings gives the command as sent, then every other name that a deny rule may know it by: without its directory,
// and with aexec's two names exchanged, for they are one binary.
func spellings(argv []string) []spelling {
	joined := strings.Join(argv, " ")
	all := []spelling{{argv[0], joined}}
	dir, base := path.Split(strings.TrimRight(argv[0], "/"))
	names := []string{base}
	if other := map[string]string{"ae": "aexec", "aexec": "ae"}[base]; other != "" {
		names = append(names, dir+other, other)
	}
	for _, name := range names {
		if name != argv[0] {
			all = append(all, spelling{name, name + joined[len(argv[0]):]})
		}
	}
	return all
}

func (r *rule) matches(s spelling, args []string) bool {
	if r.elems == nil {
		return r.pattern.matches(s.joined)
	}
	n := len(r.elems) - 1
	if len(args) < n || len(args) > n && !r.rest || !r.elems[0].matches(s.name) {
		return false
	}
	for i := range n {
		if !r.elems[i+1].matches(args[i]) {
			return false
		}
	}
	return true
}

// checkArgv says what is wrong with args as a command: empty, a blank command name, a NUL byte, invalid UTF-8,
// one of 128 KiB or more, more than 128 KiB together. nil if nothing is.
func checkArgv(argv []string) error {
	if len(argv) == 0 || strings.TrimSpace(argv[0]) == "" {
		return errors.New("args must begin with the name of a command, and that must not be blank")
	}
	total := len(argv) - 1 // the spaces between
	for i, arg := range argv {
		total += len(arg)
		switch {
		case strings.IndexByte(arg, 0) >= 0:
			return fmt.Errorf("args[%d] contains a NUL byte, which no command can be given", i)
		case !utf8.ValidString(arg):
			return fmt.Errorf("args[%d] is not valid UTF-8", i)
		case len(arg) >= maxArgBytes:
			return fmt.Errorf("args[%d] is %d bytes long: an argument must be shorter than %d", i, len(arg), maxArgBytes)
		}
	}
	if total > maxArgvBytes {
		return fmt.Errorf("args are %d bytes long together, with the spaces between: at most %d are allowed", total, maxArgvBytes)
	}
	return nil
}

// decide is the one decision: deny first, then allow, then refuse. The approved value holds a copy of argv
// and is the zero value when the decision is not allowed.
func (p *policy) decide(argv []string) (approved, decision) {
	if checkArgv(argv) != nil {
		return approved{}, decision{} // fail safe: callers have checked
	}
	argv = slices.Clone(argv)
	names := spellings(argv)
	if r := p.denies(names, argv[1:]); r != nil {
		return approved{}, decision{false, r.name, r.list, r.source}
	}
	// Joined, "git init x" as a name and git with two arguments are the same string; only an argv rule can tell them apart.
	plain := !strings.ContainsFunc(argv[0], spaceOrControl)
	for i := range p.allow {
		r := &p.allow[i]
		if (plain || r.elems != nil) && r.matches(names[0], argv[1:]) {
			by := decision{true, r.name, r.list, r.source}
			return approved{argv, by}, by
		}
	}
	return approved{}, decision{}
}

// denies finds the first deny rule that matches any spelling of the command.
func (p *policy) denies(names []spelling, args []string) *rule {
	for i := range p.deny {
		for _, s := range names {
			if p.deny[i].matches(s, args) {
				return &p.deny[i]
			}
		}
	}
	return nil
}

func spaceOrControl(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) }

// approveUnchecked makes an approved value that no rule decided: only for a plugin's own hook file, for what a
// trusted plugin with "invoke":"run" leads to, and for the help of a tool that the operator makes a plugin of.
func approveUnchecked(argv []string, source string) approved {
	if checkArgv(argv) != nil {
		return approved{} // fail safe: exec.go refuses it
	}
	return approved{slices.Clone(argv), decision{Allowed: true, Source: source}}
}

// rules lists the effective rules in the order in which they are tried.
func (p *policy) rules() []listedRule {
	var all []listedRule
	for _, r := range slices.Concat(p.deny, p.allow) {
		all = append(all, listedRule{r.list, r.spec, r.source})
	}
	return all
}

// firstWord gives the one command name that the rule can match, "" if there may be several. For a regexp its syntax
// tree is asked, not its text: "^git *x" begins like "^git " and matches "gitx".
func (r *rule) firstWord() string {
	text, ended := r.text, true
	switch {
	case r.elems != nil && r.elems[0].exact():
		return r.elems[0].text
	case r.elems != nil:
		return ""
	case r.re != nil:
		seq := sequence(text)
		if len(seq) < 2 || seq[0].Op != syntax.OpBeginText || seq[1].Op != syntax.OpLiteral || seq[1].Flags&syntax.FoldCase != 0 {
			return ""
		}
		text, ended = string(seq[1].Rune), len(seq) == 3 && seq[2].Op == syntax.OpEndText
	}
	word, _, spaced := strings.Cut(text, " ")
	if !spaced && !ended || r.parts != nil && strings.Contains(word, "*") {
		return ""
	}
	return word
}

// sequence gives the pieces of a regexp that must match one after the other; none if it is not such a sequence.
func sequence(body string) []*syntax.Regexp {
	re, err := syntax.Parse(body, syntax.Perl)
	if err != nil || re.Op != syntax.OpConcat {
		return nil
	}
	return re.Sub
}

// literal gives the arguments that an exact rule names, false if the rule is not exact.
func (r *rule) literal() ([]string, bool) {
	if r.elems == nil {
		return strings.Split(r.text, " "), r.exact()
	}
	return r.spec.Argv, !r.rest && !slices.ContainsFunc(r.elems, func(e pattern) bool { return !e.exact() })
}

// What the doctor warns of, most dangerous first, and the commands that it knows (without the version numbers at their ends).
const (
	dangers = "allow-all open-command unanchored-regexp runs-programs reads-directory admits-options deny-relied-upon deny-path ambiguous-words relative-name never-matches"

	runsPrograms = " sh ash bash dash zsh fish ksh csh tcsh pwsh busybox env xargs find fd parallel nice nohup setsid timeout time watch stdbuf script expect" +
		" sudo doas su runuser setpriv chroot unshare nsenter flock ssh scp sftp rsync tar cpio zip awk gawk mawk nawk sed ed ex vi vim nvim emacs nano less more man" +
		" perl ruby python pypy node deno bun php lua tclsh java docker podman nerdctl kubectl helm crontab at batch systemctl systemd-run gdb strace ltrace" +
		" sqlite psql mysql socat nc ncat openssl npx uvx "
	readsDirectory = " git hg svn make gmake cmake ninja just task npm npx pnpm yarn bun deno node tsc jest eslint cargo go gradle mvn ant pip poetry uv tox pytest" +
		" python bundle rake composer mix dotnet terraform ansible ansible-playbook docker-compose vagrant direnv pre-commit "
	harmlessArgs = " --version -v -V version --help -h help "
)

// lint lists what is risky about the policy, most dangerous first.
func (p *policy) lint() []finding {
	var all []finding
	for _, r := range slices.Concat(p.deny, p.allow) {
		all = append(all, p.risks(&r)...)
	}
	if len(p.deny) > 0 && slices.ContainsFunc(p.allow, func(r rule) bool { _, exact := r.literal(); return !exact }) {
		all = append(all, finding{Code: "deny-relied-upon", Message: "exec.deny is a seat belt, for no list holds every way to a command: let exec.allow be the boundary"})
	}
	slices.SortStableFunc(all, func(a, b finding) int { return strings.Index(dangers, a.Code) - strings.Index(dangers, b.Code) })
	return all
}

// risks lists what is risky about one rule. The first three findings say all there is to say of their rule.
func (p *policy) risks(r *rule) []finding {
	word := r.firstWord()
	argv, exact := r.literal()
	base := strings.TrimRight(path.Base(word), "0123456789.-")
	harmless := exact && len(argv) == 2 && strings.Contains(harmlessArgs, " "+argv[1]+" ")
	in := func(commands string) bool { return !harmless && strings.Contains(commands, " "+base+" ") }
	allow, seq, parts := r.list == listAllow, sequence(r.text), append(r.elems[:len(r.elems):len(r.elems)], r.pattern)
	everything := r.matches(spelling{"zq0", "zq0"}, nil) && r.matches(spelling{"Q_7", "Q_7 -w ~"}, []string{"-w", "~"}) // names nobody allows on purpose
	guarded := strings.Contains(strings.ReplaceAll(r.name, `","`, " "), " -- ")
	takesOption := func(e pattern) bool {
		return e.wild && e.matches("-x") || e.re != nil && (e.matches("-x") || e.matches("--x"))
	}
	checks := []struct {
		is            bool
		code, message string
	}{
		{allow && p.stops(r), "never-matches", "a deny rule stops everything that it allows: remove one of them"},
		{slices.ContainsFunc(parts, backwards) || allow && r.elems == nil && (exact && word == "" || strings.ContainsFunc(word, spaceOrControl)),
			"never-matches", "matches nothing: a name cannot hold white space here, and ^ stands first, $ last"},
		{allow && everything, "allow-all", "allows every command: name the commands that are needed"},
		{allow && word == "", "open-command", "does not fix the command: begin with its whole name and a space, without wildcards"},
		{allow && r.re != nil && (len(seq) < 2 || seq[0].Op != syntax.OpBeginText || seq[len(seq)-1].Op != syntax.OpEndText),
			"unanchored-regexp", "is found anywhere in a command: write it as /^…$/"},
		{allow && in(runsPrograms), "runs-programs", fmt.Sprintf("%q can run other programs, so this may allow everything: allow the program that is needed", base)},
		{allow && in(readsDirectory), "reads-directory", fmt.Sprintf("%q takes settings or code from the working directory: whoever writes there decides what runs", base)},
		{allow && !guarded && (r.parts != nil || r.rest || slices.ContainsFunc(r.elems, takesOption) || r.re != nil && openEnded.MatchString(r.text)),
			"admits-options", `lets any option through, also one that writes files or runs programs: name the arguments, or put "--" before them`},
		{allow && r.elems == nil && exact && len(argv) > 2, "ambiguous-words", "does not say where one argument ends and the next begins: write an argv rule"},
		{allow && strings.Contains(word, "/") && !path.IsAbs(word), "relative-name", "depends on the working directory: write the absolute path, or the name alone"},
		{!allow && strings.Contains(word, "/"), "deny-path", "stops only this spelling of the path: write the name alone, which is tried for every directory"},
	}
	var all []finding
	for i, c := range checks {
		if c.is {
			all = append(all, finding{r.name, r.list, r.source, c.code, c.message})
			if i < 3 {
				break
			}
		}
	}
	return all
}

// backwards sees a regexp that wants text after the end or before the beginning.
func backwards(p pattern) bool { return p.re != nil && misordered.MatchString(p.text) }

// stops says whether a deny rule can be seen to stop everything that the allow rule r admits.
func (p *policy) stops(r *rule) bool {
	if argv, exact := r.literal(); exact && p.denies(spellings(argv), argv[1:]) != nil {
		return true
	}
	return slices.ContainsFunc(p.deny, func(d rule) bool { return d.name == r.name || d.name == "*" })
}

// broad says whether the one rule is too wide to be added without --force, and why ("" if not).
func broad(spec ruleSpec) string {
	p, err := compilePolicy([]ruleSet{{Allow: []ruleSpec{spec}}})
	if err != nil {
		return "" // editRules says what is wrong with it
	}
	wide := "allow-all open-command unanchored-regexp"
	if _, exact := p.allow[0].literal(); !exact {
		wide += " runs-programs reads-directory"
	}
	for _, f := range p.lint() {
		if strings.Contains(wide, f.Code) {
			return f.Message
		}
	}
	return ""
}
