// This file is the plugins: load, check, hooks, routes, and what `aexec plugin` and `aexec starterkit` write.
// It may read and write plugin directories, and it alone.
// It must not run anything but through exec.go with what acl.go approved, nor weaken the settings' own rules.
package main

import "context"

// plugin is one loaded and valid plugin.
type plugin struct {
	Name        string
	Description string // of SKILL.md's frontmatter, one line
	Type        string // skill, exec, trusted
	Command     string // "" for one that has none
	Invoke      string // exec or run
	Rules       ruleSet
	routes      []pluginRoute
	before      string // absolute path of the hook, "" if none
	after       string
}

// pluginRoute is one METHOD /path pattern of net/http (already with its /api/command/NAME prefix) and the argv template it leads to.
type pluginRoute struct {
	Pattern string
	Argv    []string
}

// pluginProblem is one thing wrong with a plugin: a start-up error, or (Warning) a doctor's remark.
type pluginProblem struct {
	Plugin  string `json:"plugin"`
	File    string `json:"file,omitempty"`
	Message string `json:"message"`
	Warning bool   `json:"warning"`
}

// loadPlugins loads every enabled plugin of the directory. Plugins with problems that are not warnings are left out of the first result and named in the second.
func loadPlugins(p paths, s *settings) ([]*plugin, []pluginProblem) { panic("plugin") }

// pluginFingerprints gives a digest of the files of each plugin directory by "plugin:NAME", for restartValues' comparison.
func pluginFingerprints(p paths) map[string]string { panic("plugin") }

// document gives one of the plugin's documents: "SKILL.md", "public/SKILL.md" or "references/FILE.md"; false if there is none such.
func (p *plugin) document(name string) ([]byte, bool) { panic("plugin") }

// routeArgv fills {x} elements of a route's argv with path values; the error is 400 invalid_args.
func (r pluginRoute) routeArgv(value func(string) string) ([]string, error) { panic("plugin") }

// hookInput is the JSON that a hook gets on standard input.
type hookInput struct {
	Args         []string       `json:"args"`
	OriginalArgs []string       `json:"originalArgs"`
	Request      hookRequest    `json:"request"`
	Plugin       hookPlugin     `json:"plugin"`
	Result       map[string]any `json:"result,omitempty"` // after only: the buffered answer's fields
}

type hookRequest struct {
	Method  string              `json:"method"`
	Path    string              `json:"path"`
	Query   map[string][]string `json:"query"`
	IP      string              `json:"ip"`
	Headers map[string][]string `json:"headers"` // key headers and the key redacted
}

type hookPlugin struct {
	Name    string `json:"name"`
	Type    string `json:"type"`
	Command string `json:"command"`
	Invoke  string `json:"invoke"`
}

// hookOutput is what a hook answered; all nil: unchanged.
type hookOutput struct {
	Args   []string
	Result map[string]any
	Error  *hookError
}

type hookError struct {
	Status  int // 400 to 599
	Code    string
	Message string
}

// runFunc runs an approved command in the request's slot, audited under the plugin (server.go's).
type runFunc func(ctx context.Context, what approved, stdin []byte) outcome

// runHook runs one hook ("before" or "after"); an error is the hook's failure: 500 plugin_before_error or plugin_after_error.
func (p *plugin) runHook(ctx context.Context, which string, in hookInput, run runFunc) (hookOutput, error) {
	panic("plugin")
}

// sees says whether a command with these arguments is the plugin's: first argument or its base name is its command.
func (p *plugin) sees(argv []string) bool { panic("plugin") }
