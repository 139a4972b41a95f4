// This file is everything that is configured: the directory, .env, settings.json, and the strict JSON reader for both files and bodies.
// It may read the environment and configuration files, and rewrite the files that it reads, atomically.
// It must not decide, run or serve anything: it hands out immutable snapshots.
package main

import (
	"net/netip"
	"time"
)

// node is one JSON value of the strict reader, with its place in the text.
type node struct {
	kind       byte     // '{' '[' '"' '0' 't' 'f' 'n'
	start, end int      // byte offsets into the text
	str        string   // the string, or the number's literal
	surrogate  bool     // the string holds a lone surrogate escape
	keys       []string // of an object, in order, unique
	keyAt      []int    // byte offset of each key
	items      []*node  // of an object or an array
}

// jsonError is what the strict reader found wrong, and where (line and column from 1, in bytes).
type jsonError struct {
	Line, Col int
	Msg       string
}

func (e *jsonError) Error() string { panic("config") }

// parseStrict reads one JSON value and nothing after it: no duplicate keys, no invalid UTF-8, no byte order mark,
// nesting of at most maxJSONDepth. Errors are *jsonError.
func parseStrict(data []byte) (*node, error) { panic("config") }

// apiKey is the shared secret. It prints as [API_KEY] whatever the verb.
type apiKey struct {
	text   string
	digest [32]byte
}

func newAPIKey(text string) (*apiKey, error)    { panic("config") } // at least 16 characters
func (k *apiKey) matches(candidate string) bool { panic("config") } // constant time, over digests
func (k *apiKey) id() string                    { panic("config") } // "sha256:" and 12 hex digits
func (k *apiKey) redact(s string) string        { panic("config") } // the key wherever it stands becomes [API_KEY]
func (k apiKey) String() string                 { return "[API_KEY]" }
func (k apiKey) GoString() string               { return "[API_KEY]" }
func (k apiKey) MarshalText() ([]byte, error)   { return []byte("[API_KEY]"), nil }

// paths are the files of one configuration directory.
type paths struct{ dir, env, settings, plugins, audit, log, pid string }

// configPaths finds the directory ($AGENT_EXEC_CONFIG_DIR, else ~/.to-agent/agent-exec), absolute; it need not exist.
func configPaths() (paths, error) { panic("config") }

// startup is what only a restart changes: flags before environment before .env.
type startup struct {
	key           *apiKey
	host          string
	port          int
	enabled       bool
	allowQueryKey bool
}

// startupFlags are the command line's own; zero values mean not given.
type startupFlags struct {
	host    string
	port    int
	portSet bool
}

func loadStartup(p paths, f startupFlags) (startup, error) { panic("config") }

// readTrusted reads a regular file under 1 MiB under strict modes (section 1 of the contract), checked on the opened descriptor:
// never through a link, never waiting. private: group and others may not read it either.
func readTrusted(path string, private bool) ([]byte, error) { panic("config") }

// checkTrustedDir holds a directory to the same modes.
func checkTrustedDir(path string) error { panic("config") }

// rlimits are exec.limits; 0 means no limit.
type rlimits struct {
	CPUSeconds, MemoryBytes, FileBytes, OpenFiles, Processes uint64
}

// credential is the user that commands run as.
type credential struct {
	Uid, Gid          uint32
	Groups            []uint32
	Name, Home, Shell string
}

// settings is settings.json, checked, with the defaults filled in.
type settings struct {
	Exec struct {
		Allow, Deny                []ruleSpec
		TestsAllowed, TestsRefused [][]string
		Cwd, User                  string
		EnvKeep                    []string
		EnvSet                     map[string]string
		Limits                     rlimits
		NoNewPrivileges            bool
	}
	IPAllow, IPDeny     []netip.Prefix // "*" is 0.0.0.0/0 and ::/0
	Timeout, KillGrace  time.Duration
	MaxOutputBytes      int64
	MaxStreamBytes      int64
	MaxConcurrentExec   int
	MaxRequestBodyBytes int64
	RateWindow          time.Duration
	RateMax             int // 0: no limit
	AuditEnabled        bool
	AuditFile           string // absolute; "" is audit.jsonl in the directory
	PluginsMode         string // "auto" or "explicit"
	PluginsEnabled      []string
	PluginsDisabled     []string
}

// snapshot is one consistent state of everything that reloads; a request is decided and run under one snapshot.
type snapshot struct {
	settings
	policy *policy
	env    []string    // the built environment of commands, key-free, sorted
	cwd    string      // absolute
	cred   *credential // nil: the server's own user
}

// disabled says whether a plugin is off in this snapshot.
func (s *snapshot) disabled(plugin string) bool { panic("config") }

// ipAllowed decides a peer's address: unmapped, zone dropped, deny first, an empty allow admits none.
func (s *snapshot) ipAllowed(peer netip.Addr) bool { panic("config") }

// reload says what a look at settings.json brought.
type reload int

const (
	unchanged reload = iota
	reloaded         // a new snapshot is in force
	wentBad          // the file has just become unusable: nothing is allowed until it is right again
)

// store keeps the snapshot in step with settings.json.
type store struct{}

// openStore reads the settings for the first time; plugins are the rules of the plugins that were loaded, each applied
// unless the settings disable it; an error here is fatal at start.
func openStore(p paths, plugins []ruleSet) (*store, error) { panic("config") }

// current stats settings.json and gives the snapshot in force, or the error that makes it unusable (naming file, line, column).
// reloaded and wentBad are reported to exactly one caller.
func (s *store) current() (*snapshot, reload, error) { panic("config") }

// restartValues reads from disk everything of .env and settings.json that only a restart brings into force, as printable
// values by name ("API_KEY" is the key's id). The server publishes them at start; comparing tells what needs a restart.
func restartValues(p paths) (map[string]string, error) { panic("config") }

// editRules adds or removes one rule of exec.allow or exec.deny in place, keeping the rest of the file as written; what would not load is not written.
func editRules(p paths, list string, r ruleSpec, remove bool, plugins []ruleSet) error {
	panic("config")
}

// settingInfo is one row of `aexec config`.
type settingInfo struct {
	Key     string `json:"key"`
	Value   any    `json:"value"`
	Default bool   `json:"default"` // not set in the file
	Reloads bool   `json:"reloads"` // without restart
}

func (s *settings) table() []settingInfo { panic("config") }
