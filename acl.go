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
	maxArgBytes  = 128 << 10 // one argument and its NUL byte (MAX_ARG_STRLEN in execve(2)), and all joined, which bounds every match
	pluginSource = "plugin:" // before the plugin's name in ruleSet.Source
	moreArgs     = "..."     // as the last element of an argv rule
)

var ( // compiled once
	slashed   = regexp.MustCompile(`^/(?:[^/\\]|\\.)+/$`)            // in a regexp between slashes every other "/" is escaped
	anchored  = regexp.MustCompile(`^/\^(?s:.*)\$/$`)                // what an argv rule takes for one
	flagged   = regexp.MustCompile(`^\^|^/(?:[^/\\]|\\.)+/[gims]+$`) // other languages have none around it, or flags behind the last
	openEnded = regexp.MustCompile(`\.[*+{]|\\S|\[\^`)               // matches words of any kind
)

// ruleSpec is one rule as an administrator wrote it: a string, or (Argv not nil) an argv array.
type ruleSpec struct {
	Text string
	Argv []string
}

func (r ruleSpec) String() string { return pick(r.Argv == nil, r.Text, string(marshal(r.Argv))) }

func (r ruleSpec) MarshalJSON() ([]byte, error) {
	return pick(r.Argv == nil, marshal(r.Text), marshal(r.Argv)), nil
}

// ruleSet is the rules of one source.
type ruleSet struct {
	Source      string // "settings.json" or "plugin:NAME"
	Command     string // of a plugin: the only literal first word that its allow rules may have
	Allow, Deny []ruleSpec
}

// decision says what the policy decided and which rule did it. Rule, List and Source are empty when no rule matched.
type decision struct {
	Allowed bool   `json:"allowed"`
	Rule    string `json:"rule,omitempty"`
	List    string `json:"list,omitempty"`
	Source  string `json:"source,omitempty"`
}

func (d decision) why() string {
	return pick(d.Rule == "", "no rule allows it", fmt.Sprintf("the %s rule %q of %s", d.List, d.Rule, d.Source))
}

// approved is an argv that may be run. It is made in this file only; the zero value is refused where commands are run.
type approved struct{ argv []string }

// rule is one compiled rule, as `acl list` shows it.
type rule struct {
	List    string              `json:"list"`
	Rule    ruleSpec            `json:"rule"`
	Source  string              `json:"source"`
	by      decision            // of whatever it matches
	words   []func(string) bool // of an argv rule one for each element but "...", of any other one for the joined string
	exact   []string            // the only command that it matches, nil if there are more
	command string              // the one name of a command that it can match, "" if there may be several
}

// ruleError names the rule that does not compile, so that its reader can add file, line and column. It wraps what to write instead.
type ruleError struct {
	error
	*rule
	Index int // of the rule in its list
}

// policy is the compiled rules of all sources in the order in which they are tried: all deny rules before all allow rules.
type policy []*rule

// compilePolicy compiles every rule of every set, or returns a *ruleError for the first that does not compile.
func compilePolicy(sets []ruleSet) (p policy, err error) {
	for _, list := range []string{"deny", "allow"} {
		for _, set := range sets {
			for i, spec := range map[string][]ruleSpec{"deny": set.Deny, "allow": set.Allow}[list] {
				r := &rule{List: list, Rule: spec, Source: set.Source, by: decision{list == "allow", spec.String(), list, set.Source}}
				if err := r.compile(set.Command); err != nil {
					return nil, &ruleError{fmt.Errorf("rule %q in exec.%s of %s: %w", spec, list, set.Source, err), r, i}
				}
				p = append(p, r)
			}
		}
	}
	return p, nil
}

// compile fills in words, exact and command. own is the command of the plugin that the rule comes from.
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
		if err := r.addWord(text); err != nil {
			return err
		}
	}
	if r.by.Allowed && strings.HasPrefix(r.Source, pluginSource) && (r.command == "" || r.command != own) {
		return fmt.Errorf("a plugin may allow only its own command: begin the rule with %q and a space, literally", own)
	}
	return nil
}

// addWord compiles a string rule or an element of an argv rule. What looks like a rule of another kind is a mistake.
func (r *rule) addWord(text string) (err error) {
	element := r.Rule.Argv != nil
	between := anchored.MatchString(text) || !element && strings.HasPrefix(text, "/") && strings.HasSuffix(text, "/")
	looks := strings.HasPrefix(text, "/^") || !element && flagged.MatchString(text)
	wild := element && !between && strings.ContainsAny(text, "*?[")
	_, malformed := path.Match(text, "")
	switch {
	case !element && strings.TrimSpace(text) == "":
		return errors.New("an empty rule names no command: remove it")
	case text == moreArgs:
		return errors.New(`"..." stands only at the end of an argv rule: write ["command", "..."], or "/^\.\.\.$/" for three dots`)
	case strings.ContainsFunc(text, unicode.IsControl):
		return errors.New(`a rule has no control characters: write "\n" in a regexp`)
	case looks && !between:
		return errors.New(`a regexp stands between slashes, without flags behind: "/(?i)^sudo/", in an argv rule "/^[0-9]+$/"`)
	case between && !slashed.MatchString(text):
		return errors.New(`a regexp needs something between its slashes, a "/" as "\/"; paths: an argv rule`)
	case wild && malformed != nil:
		return errors.New(`the pattern is not well formed: close the "[", or write "\[" for the character`)
	}
	command, matches := pick(element, text, wordIn(text+" ")), func(s string) bool { return s == text }
	if parts := strings.Split(text, "*"); between || wild || len(parts) > 1 {
		r.exact = nil
		command, matches = wordIn(parts[0]), func(s string) bool { return globMatch(parts, s) }
	}
	if between {
		command, matches, err = compileRegexp(text[1:len(text)-1], element, !r.by.Allowed)
	} else if wild {
		command, matches = "", func(s string) bool { ok, _ := path.Match(text, s); return ok }
	}
	r.command, r.words = pick(len(r.words) == 0, command, r.command), append(r.words, matches)
	return err
}

// compileRegexp holds the regexp of an element to the whole of it: "^a|b$" would find "axx" and "xxb". For the command of a string rule its
// syntax tree is asked, not its text: "^git *x" begins like "^git " and matches "gitx".
func compileRegexp(body string, element, deny bool) (command string, matches func(string) bool, err error) {
	re, err := regexp.Compile(pick(deny, "(?s)", "") + body) // "." of a deny rule matches a newline too, so that none evades it
	if e, ok := errors.AsType[*syntax.Error](err); ok {
		return "", nil, fmt.Errorf("not a regexp of RE2 syntax: %s at %q", e.Code, e.Expr)
	}
	if element {
		re.Longest() // so that it finds the whole, if it can match the whole
		return "", func(s string) bool { at := re.FindStringIndex(s); return at != nil && at[1]-at[0] == len(s) }, nil
	}
	tree, err := syntax.Parse(body, syntax.Perl)
	if err == nil && tree.Op == syntax.OpConcat && tree.Sub[0].Op == syntax.OpBeginText {
		if start := tree.Sub[1]; start.Op == syntax.OpLiteral && start.Flags&syntax.FoldCase == 0 {
			command = wordIn(string(start.Rune) + pick(len(tree.Sub) == 3 && tree.Sub[2].Op == syntax.OpEndText, " ", ""))
		}
	}
	return command, re.MatchString, err
}

// wordIn is the first word of a text, "" if no space ends it.
func wordIn(text string) string { return text[:max(0, strings.Index(text, " "))] }

// globMatch finds the parts in order, first and last at the ends. Of those between the leftmost place will do, so nothing is tried twice.
func globMatch(parts []string, s string) bool {
	last := len(parts) - 1
	s, ok := strings.CutPrefix(s, parts[0])
	for _, part := range parts[1:last] {
		_, rest, found := strings.Cut(s, part)
		s, ok = rest, ok && found
	}
	return ok && strings.HasSuffix(s, parts[last])
}

// matches looks at a command under one of its names, at its further arguments, and at all joined.
func (r *rule) matches(name string, args []string, joined string) bool {
	if r.Rule.Argv == nil { // joined, "git init x" is a name or git with two arguments: only an argv rule can tell them apart
		return r.words[0](joined) && !(r.by.Allowed && strings.ContainsFunc(name, spaceOrControl))
	}
	n, more := len(r.words)-1, len(r.Rule.Argv) > len(r.words) // "..." admits further arguments
	return r.words[0](name) && len(args) >= n && (more || len(args) == n) &&
		slices.EqualFunc(r.words[1:], args[:n], func(matches func(string) bool, arg string) bool { return matches(arg) })
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
	case len(joined) > maxArgBytes || len(argv[0]) == maxArgBytes: // no other argument can be as long
		return fmt.Errorf("args are too long: each must be under %[1]d bytes, all with spaces between at most %[1]d", maxArgBytes)
	}
	return nil
}

// decide is the one decision: the first rule that matches makes it, and none refuses. A deny rule is tried against the command as sent,
// without its directory, and with ae and aexec exchanged. Approved is a copy of argv, or nothing at all.
func (p policy) decide(argv []string) (approved, decision) {
	if checkArgv(argv) != nil {
		return approved{}, decision{} // fail safe: callers have checked
	}
	dir, base := path.Split(strings.TrimRight(argv[0], "/"))
	names := []string{argv[0], base}
	if other := map[string]string{"ae": "aexec", "aexec": "ae"}[base]; other != "" {
		names = append(names, dir+other, other)
	}
	names, rest := slices.Compact(names), strings.Join(argv, " ")[len(argv[0]):]
	joined := each(names, func(name string) string { return name + rest })
	for _, r := range p {
		for i, name := range names {
			if (i == 0 || !r.by.Allowed) && r.matches(name, argv[1:], joined[i]) {
				return pick(r.by.Allowed, approved{slices.Clone(argv)}, approved{}), r.by
			}
		}
	}
	return approved{}, decision{}
}

// approveUnchecked makes an approved value that no rule decided: only for a plugin's own hook file, for what a
// trusted plugin with "invoke":"run" leads to, and for the help of a tool that the operator makes a plugin of.
func approveUnchecked(argv []string) approved {
	return pick(checkArgv(argv) == nil, approved{slices.Clone(argv)}, approved{}) // fail safe: exec.go refuses the zero value
}

// finding is one risky thing about an allow rule, for `acl doctor`.
type finding struct {
	*rule
	Code    string `json:"code"`    // stable kebab-case name, e.g. "allow-all"
	Message string `json:"message"` // what is risky and what to write instead
}

const broadCodes = "allow-all open-command unanchored-regexp runs-programs reads-directory" // the findings that make a rule broad

// lint lists what is risky about the allow rules.
func (p policy) lint() (all []finding) {
	for _, r := range p {
		add := func(is bool, code, message string) {
			if r.by.Allowed && is {
				all = append(all, finding{r, code, message})
			}
		}
		_, by := p.decide(r.exact)
		denied := slices.ContainsFunc(p, func(d *rule) bool { return !d.by.Allowed && d.by.Rule == r.by.Rule })
		if denied || r.exact != nil && !by.Allowed {
			add(true, "never-matches", "a deny rule stops it, or its name has white space, which takes an argv rule")
			continue
		}
		text, more, isRegexp := r.Rule.Text, len(r.Rule.Argv) > len(r.words), slashed.MatchString(r.Rule.Text)
		guarded := strings.Contains(strings.ReplaceAll(r.by.Rule, `","`, " "), " -- ")
		option := func(matches func(string) bool) bool {
			return matches("-x") && matches("-y") || matches("--x") && matches("--y")
		}
		loose := text == "" && (more || slices.ContainsFunc(r.words, option)) ||
			text != "" && r.exact == nil && (!isRegexp || openEnded.MatchString(text))
		tool := strings.TrimRight(path.Base(r.command), "0123456789.-") // python3.12 is python
		harmless := len(r.exact) == 2 && strings.Contains(" --version -v -V version --help -h help ", " "+r.exact[1]+" ")
		known := func(name string) bool { return !harmless && slices.Contains(strings.Fields(helpText(name)), tool) }
		add(strings.Trim(r.by.Rule, "*") == "", "allow-all", "allows every command: name the commands that are needed")
		add(r.command == "", "open-command", "does not fix the command: begin with its whole name and a space, without wildcards")
		add(isRegexp && !anchored.MatchString(text), "unanchored-regexp", "is found anywhere in a command: write it as /^…$/")
		add(known("programs that run others"), "runs-programs", "can run other programs, perhaps all: allow those")
		add(known("programs that obey their directory"), "reads-directory", "obeys files in its working directory: guard that")
		add(loose && !guarded, "admits-options", `lets any option through: name the arguments, or put "--" before them`)
		add(text != "" && len(r.exact) > 2, "ambiguous-words", "does not say where one argument ends and the next begins: write an argv rule")
		add(strings.Contains(r.command, "/") && !path.IsAbs(r.command), "relative-name", "depends on the working directory: write the whole path")
		add(r.exact == nil && !p[0].by.Allowed, "deny-relied-upon", "exec.deny is a seat belt and cannot hold: narrow this rule")
	}
	return all
}

// broad says whether the one rule is too wide to be added without --force, and why ("" if not: one command is not many).
func broad(spec ruleSpec) string {
	p, _ := compilePolicy([]ruleSet{{Allow: []ruleSpec{spec}}}) // editRules says what is wrong with a rule that does not compile
	for _, f := range p.lint() {
		if f.exact == nil && strings.Contains(broadCodes, f.Code) {
			return f.Message
		}
	}
	return ""
}
