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
	pluginSource        = "plugin:" // before the plugin's name in ruleSet.Source
	moreArgs            = "..."     // as the last element of an argv rule
)

var ( // compiled once
	slashed   = regexp.MustCompile(`^/(?:[^/\\]|\\.)+/$`)            // in a regexp between slashes every other "/" is escaped
	flagged   = regexp.MustCompile(`^\^|^/(?:[^/\\]|\\.)+/[gims]+$`) // other languages have none around it, or flags behind the last
	openEnded = regexp.MustCompile(`\.[*+{]|\\S|\[\^`)               // matches words of any kind
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
	if r.Argv == nil {
		return marshal(r.Text), nil
	}
	return marshal(r.Argv), nil
}

// ruleSet is the rules of one source.
type ruleSet struct {
	Source      string // "settings.json" or "plugin:NAME"
	Command     string // of a plugin: the only literal first word that its allow rules may have
	Allow, Deny []ruleSpec
}

// ruleError names the rule that does not compile, so that its reader can add file, line and column.
type ruleError struct {
	*rule
	Index int   // of the rule in its list
	Err   error // says what to write instead
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

// policy is the compiled rules of all sources, immutable: the deny rules, then the allow rules.
type policy struct{ all []*rule }

// rules lists the effective rules in the order in which they are tried.
func (p *policy) rules() []*rule { return p.all }

// rule is one compiled rule, as `acl list` shows it, and the decision that it makes.
type rule struct {
	List   string    `json:"list"`
	Rule   ruleSpec  `json:"rule"`
	Source string    `json:"source"`
	by     decision  // of whatever it matches
	words  []pattern // of an argv rule one for each argument but "...", of any other one for the joined string
	exact  []string  // the only command that it matches, nil if there are more
}

// pattern is a string rule or an element of an argv rule.
type pattern struct {
	kind    string            // "exact", "glob", "path.Match" or "regexp"
	matches func(string) bool // a regexp anywhere in a joined string, but only the whole of an element
	command string            // the one name of a command that it can match, "" if there may be several
}

// compilePolicy compiles every rule of every set, or returns a *ruleError for the first that does not compile.
func compilePolicy(sets []ruleSet) (*policy, error) {
	p := &policy{}
	for _, list := range []string{listDeny, listAllow} {
		for _, set := range sets {
			specs := set.Allow
			if list == listDeny {
				specs = set.Deny
			}
			for i, spec := range specs {
				r := &rule{List: list, Rule: spec, Source: set.Source, by: decision{list == listAllow, spec.String(), list, set.Source}}
				if err := r.compile(set.Command); err != nil {
					return nil, &ruleError{r, i, err}
				}
				p.all = append(p.all, r)
			}
		}
	}
	return p, nil
}

// compile fills in words and exact. own is the command of the plugin that the rule comes from.
func (r *rule) compile(own string) error {
	texts := r.Rule.Argv
	r.exact = texts
	switch n := len(texts); {
	case texts == nil:
		texts, r.exact = []string{r.Rule.Text}, strings.Split(r.Rule.Text, " ")
	case n == 0 || strings.TrimSpace(texts[0]) == "" || texts[0] == moreArgs:
		return errors.New(`an argv rule begins with the name of a command: ["git", "log", "..."]`)
	case texts[n-1] == moreArgs:
		texts, r.exact = texts[:n-1], nil
	}
	for _, text := range texts {
		w, err := compilePattern(text, r.Rule.Argv != nil, !r.by.Allowed)
		if err != nil {
			return err
		}
		if r.words = append(r.words, w); w.kind != "exact" {
			r.exact = nil
		}
	}
	if name := r.words[0].command; r.by.Allowed && strings.HasPrefix(r.Source, pluginSource) && (name == "" || name != own) {
		return fmt.Errorf("a plugin may allow only its own command: begin the rule with %q and a space, literally", own)
	}
	return nil
}

// compilePattern compiles a string rule or an element of an argv rule. What looks like a rule of another kind is a mistake.
func compilePattern(text string, element, deny bool) (pattern, error) {
	between := strings.HasPrefix(text, "/") && strings.HasSuffix(text, "/")
	if element {
		between = strings.HasPrefix(text, "/^") && strings.HasSuffix(text, "$/")
	}
	wild := element && !between && strings.ContainsAny(text, "*?[")
	looks := strings.HasPrefix(text, "/^") || !element && flagged.MatchString(text)
	_, malformed := path.Match(text, "")
	for _, mistake := range []struct {
		made bool
		say  string
	}{
		{!element && strings.TrimSpace(text) == "", "an empty rule names no command: remove it"},
		{text == moreArgs, `"..." stands only at the end of an argv rule: write ["command", "..."], or "/^\.\.\.$/" for three dots`},
		{strings.ContainsFunc(text, unicode.IsControl), `a rule has no control characters: write "\n" in a regexp`},
		{looks && !between, `a regexp stands between slashes, without flags behind: "/(?i)^sudo/", in an argv rule "/^[0-9]+$/"`},
		{between && !slashed.MatchString(text), `a regexp needs something between its slashes, a "/" as "\/"; paths: an argv rule`},
		{text == "/^$/", `an empty argument is "" in an argv rule`},
		{wild && malformed != nil, `the pattern is not well formed: close the "[", or write "\[" for the character`},
	} {
		if mistake.made {
			return pattern{}, errors.New(mistake.say)
		}
	}
	parts := strings.Split(text, "*")
	switch {
	case between:
		return compileRegexp(text[1:len(text)-1], element, deny)
	case wild:
		return pattern{kind: "path.Match", matches: func(s string) bool { ok, _ := path.Match(text, s); return ok }}, nil
	case !element && len(parts) > 1:
		return pattern{kind: "glob", command: wordIn(parts[0]), matches: func(s string) bool { return globMatch(parts, s) }}, nil
	}
	return pattern{kind: "exact", command: pick(element, text, wordIn(text+" ")), matches: func(s string) bool { return s == text }}, nil
}

// compileRegexp holds the regexp of an element to the whole of it: "^a|b$" would find "axx" and "xxb". For the command of a string rule its
// syntax tree is asked, not its text: "^git *x" begins like "^git " and matches "gitx".
func compileRegexp(body string, element, deny bool) (pattern, error) {
	flags := ""
	if deny {
		flags = "(?s)" // "." matches a newline too, so that none evades the rule
	}
	re, err := regexp.Compile(flags + body)
	if e, ok := errors.AsType[*syntax.Error](err); ok {
		return pattern{}, fmt.Errorf("not a regexp of RE2 syntax: %s at %q", e.Code, e.Expr)
	}
	p := pattern{kind: "regexp", matches: re.MatchString}
	if element {
		re.Longest() // so that it finds the whole, if it can match the whole
		p.matches = func(s string) bool { at := re.FindStringIndex(s); return at != nil && at[0] == 0 && at[1] == len(s) }
		return p, nil
	}
	tree, err := syntax.Parse(body, syntax.Perl)
	if err == nil && tree.Op == syntax.OpConcat && tree.Sub[0].Op == syntax.OpBeginText {
		if start := tree.Sub[1]; start.Op == syntax.OpLiteral && start.Flags&syntax.FoldCase == 0 {
			ended := len(tree.Sub) == 3 && tree.Sub[2].Op == syntax.OpEndText
			p.command = wordIn(string(start.Rune) + pick(ended, " ", ""))
		}
	}
	return p, err
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

// view is one way to see a command: its arguments, and these joined.
type view struct {
	argv   []string
	joined string
}

// views gives a command as sent, then all that a deny rule may know it by: without its directory, and ae and aexec exchanged.
func views(argv []string) (all []view) {
	dir, base := path.Split(strings.TrimRight(argv[0], "/"))
	names := []string{argv[0], base}
	if other := map[string]string{"ae": "aexec", "aexec": "ae"}[base]; other != "" {
		names = append(names, dir+other, other)
	}
	for _, name := range slices.Compact(names) {
		words := slices.Concat([]string{name}, argv[1:])
		all = append(all, view{words, strings.Join(words, " ")})
	}
	return all
}

func (r *rule) matches(v view) bool {
	if r.Rule.Argv == nil { // joined, "git init x" is a name or git with two arguments: only an argv rule can tell them apart
		return r.words[0].matches(v.joined) && !(r.by.Allowed && strings.ContainsFunc(v.argv[0], spaceOrControl))
	}
	n, same := len(r.words), func(w pattern, arg string) bool { return w.matches(arg) }
	rest := len(r.Rule.Argv) > n // "..." admits further arguments
	return len(v.argv) >= n && (rest || len(v.argv) == n) && slices.EqualFunc(r.words, v.argv[:n], same)
}

func spaceOrControl(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) }

// checkArgv says what is wrong with args as a command, nil if nothing is.
func checkArgv(argv []string) error {
	joined := strings.Join(argv, " ")
	switch {
	case len(argv) == 0 || strings.TrimSpace(argv[0]) == "":
		return errors.New("args must begin with the name of a command, and that must not be blank")
	case strings.Contains(joined, "\x00") || !utf8.ValidString(joined):
		return errors.New("args must be UTF-8 without a NUL byte")
	case len(joined) > maxArgvBytes || len(argv[0]) >= maxArgBytes: // no other argument can be as long
		return fmt.Errorf("args are too long: each must be under %d bytes, all with spaces between at most %d", maxArgBytes, maxArgvBytes)
	}
	return nil
}

// decide is the one decision: deny first, then allow, then refuse. Approved is a copy of argv, or nothing at all.
func (p *policy) decide(argv []string) (approved, decision) {
	if checkArgv(argv) != nil {
		return approved{}, decision{} // fail safe: callers have checked
	}
	tried := views(argv)
	for _, r := range p.all {
		switch {
		case r.by.Allowed && r.matches(tried[0]):
			return approved{slices.Clone(argv), r.by}, r.by
		case !r.by.Allowed && slices.ContainsFunc(tried, r.matches):
			return approved{}, r.by
		}
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

// finding is one risky thing about an allow rule, for `acl doctor`.
type finding struct {
	*rule
	Code    string `json:"code"`    // stable kebab-case name, e.g. "allow-all"
	Message string `json:"message"` // what is risky and what to write instead
}

// The findings that make a rule broad, and the commands that the doctor knows (without the version numbers at their ends).
const (
	broadCodes   = "allow-all open-command unanchored-regexp runs-programs reads-directory"
	runsPrograms = " sh ash bash dash zsh fish ksh csh busybox env xargs find fd parallel nice nohup setsid timeout time watch script" +
		" expect sudo doas su runuser setpriv chroot unshare nsenter flock ssh scp sftp rsync tar cpio zip awk gawk mawk sed ed ex vi vim" +
		" nvim emacs nano less more man perl ruby python node deno bun php lua java docker podman kubectl helm crontab at batch systemctl" +
		" systemd-run gdb strace sqlite psql mysql socat nc ncat openssl npx uvx "
	readsDirectory = " git hg svn make gmake cmake ninja just task npm npx pnpm yarn bun deno node tsc jest eslint cargo go gradle mvn" +
		" ant pip poetry uv tox pytest python bundle rake composer mix dotnet terraform ansible docker-compose vagrant direnv pre-commit "
)

// lint lists what is risky about the allow rules.
func (p *policy) lint() (all []finding) {
	for _, r := range p.all {
		if !r.by.Allowed {
			continue
		}
		add := func(is bool, code, message string) {
			if is {
				all = append(all, finding{r, code, message})
			}
		}
		_, by := p.decide(r.exact)
		denied := slices.ContainsFunc(p.all, func(d *rule) bool { return !d.by.Allowed && d.by.Rule == r.by.Rule })
		if denied || r.exact != nil && !by.Allowed {
			add(true, "never-matches", "a deny rule stops it, or its name has white space, which takes an argv rule")
			continue
		}
		text, name, kind := r.Rule.Argv == nil, r.words[0].command, r.words[0].kind
		guarded := strings.Contains(strings.ReplaceAll(r.by.Rule, `","`, " "), " -- ")
		loose := len(r.Rule.Argv) > len(r.words) || slices.ContainsFunc(r.words, func(w pattern) bool {
			if text {
				return kind == "glob" || kind == "regexp" && openEnded.MatchString(r.Rule.Text)
			}
			return w.kind != "exact" && (w.matches("-x") || w.matches("--x"))
		})
		tool := " " + strings.TrimRight(path.Base(name), "0123456789.-") + " "
		harmless := len(r.exact) == 2 && strings.Contains(" --version -v -V version --help -h help ", " "+r.exact[1]+" ")
		unanchored := text && kind == "regexp" && !(strings.HasPrefix(r.Rule.Text, "/^") && strings.HasSuffix(r.Rule.Text, "$/"))
		add(strings.Trim(r.by.Rule, "*") == "", "allow-all", "allows every command: name the commands that are needed")
		add(name == "", "open-command", "does not fix the command: begin with its whole name and a space, without wildcards")
		add(unanchored, "unanchored-regexp", "is found anywhere in a command: write it as /^…$/")
		add(!harmless && strings.Contains(runsPrograms, tool), "runs-programs", "can run other programs, perhaps all: allow those")
		add(!harmless && strings.Contains(readsDirectory, tool), "reads-directory", "obeys files in its working directory: guard that")
		add(loose && !guarded, "admits-options", `lets any option through: name the arguments, or put "--" before them`)
		add(text && len(r.exact) > 2, "ambiguous-words", "does not say where one argument ends and the next begins: write an argv rule")
		add(strings.Contains(name, "/") && !path.IsAbs(name), "relative-name", "depends on the working directory: write the whole path")
		add(r.exact == nil && !p.all[0].by.Allowed, "deny-relied-upon", "exec.deny is a seat belt and cannot hold: narrow this rule")
	}
	return all
}

// broad says whether the one rule is too wide to be added without --force, and why ("" if not).
func broad(spec ruleSpec) string {
	p, err := compilePolicy([]ruleSet{{Allow: []ruleSpec{spec}}})
	if err != nil || p.all[0].exact != nil {
		return "" // editRules says what is wrong with it, and one command is not many
	}
	if all := p.lint(); len(all) > 0 && strings.Contains(broadCodes, all[0].Code) {
		return all[0].Message
	}
	return ""
}
