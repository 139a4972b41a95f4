// This file is the policy: it compiles rules, decides an argv, explains the decision and lints the rules.
// It may look at rules and arguments and at nothing else, and it alone may make an approved value.
// It must not do I/O, know the time, or keep state: the same rules and argv always give the same decision.
package main

// ruleSpec is one rule as an administrator wrote it: a string, or (Argv not nil) an argv array.
type ruleSpec struct {
	Text string
	Argv []string
}

// String gives the rule as written: the text of a string rule, the compact JSON array of an argv rule.
func (r ruleSpec) String() string { panic("acl") }

// MarshalJSON writes the rule back as the string or array that it was.
func (r ruleSpec) MarshalJSON() ([]byte, error) { panic("acl") }

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

func (e *ruleError) Error() string { panic("acl") }
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
type policy struct{}

// compilePolicy compiles every rule of every set, or returns a *ruleError for the first that does not compile.
func compilePolicy(sets []ruleSet) (*policy, error) { panic("acl") }

// checkArgv says what is wrong with args as a command: empty, a blank command name, a NUL byte, invalid UTF-8,
// one of 128 KiB or more, more than 128 KiB together. nil if nothing is.
func checkArgv(argv []string) error { panic("acl") }

// decide is the one decision: deny first, then allow, then refuse. The approved value holds a copy of argv
// and is the zero value when the decision is not allowed.
func (p *policy) decide(argv []string) (approved, decision) { panic("acl") }

// approveUnchecked makes an approved value that no rule decided: only for a plugin's own hook file, for what a
// trusted plugin with "invoke":"run" leads to, and for the help of a tool that the operator makes a plugin of.
func approveUnchecked(argv []string, source string) approved { panic("acl") }

// rules lists the effective rules in the order in which they are tried.
func (p *policy) rules() []listedRule { panic("acl") }

// lint lists what is risky about the policy, most dangerous first.
func (p *policy) lint() []finding { panic("acl") }

// broad says whether the one rule is too wide to be added without --force, and why ("" if not).
func broad(r ruleSpec) string { panic("acl") }
