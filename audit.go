// This file is the audit log: records, their hash chain, redaction, rotation and verification.
// It may open files for append, and it alone.
// It must not decide what is recorded, nor lose a record silently: append says whether the record is on disk.
package main

// auditRecord is one line; the order of the fields is the order in the file.
type auditRecord struct {
	Seq          uint64   `json:"seq"`
	Timestamp    string   `json:"timestamp"`
	Event        string   `json:"event"`
	RequestID    string   `json:"requestId,omitempty"`
	SourceIP     string   `json:"sourceIp,omitempty"`
	APIKeyID     string   `json:"apiKeyId,omitempty"`
	AuthSource   string   `json:"authSource,omitempty"`
	Endpoint     string   `json:"endpoint,omitempty"`
	Mode         string   `json:"mode,omitempty"`
	Argv         []string `json:"argv,omitempty"`
	OriginalArgv []string `json:"originalArgv,omitempty"`
	Cwd          string   `json:"cwd,omitempty"`
	Plugin       string   `json:"plugin,omitempty"`
	ACLDecision  string   `json:"aclDecision,omitempty"`
	Rule         string   `json:"rule,omitempty"`
	DenialReason string   `json:"denialReason,omitempty"`
	ExitCode     *int     `json:"exitCode,omitempty"`
	Signal       string   `json:"signal,omitempty"`
	Reason       string   `json:"reason,omitempty"` // why the run ended, or what went wrong
	DurationMs   *int64   `json:"durationMs,omitempty"`
	StdoutBytes  *int64   `json:"stdoutBytes,omitempty"`
	StderrBytes  *int64   `json:"stderrBytes,omitempty"`
	Suppressed   int      `json:"suppressed,omitempty"`
	Prev         string   `json:"prev"`
}

// auditLog is one open log. A nil *auditLog is not valid; a disabled one accepts and drops.
type auditLog struct{}

// auditHead is the number and digest of the last record; it prints as SEQ:DIGEST.
type auditHead struct {
	Seq    uint64
	Digest string
}

func (h auditHead) String() string { panic("audit") }

func parseAuditHead(s string) (auditHead, error) { panic("audit") }

// openAudit opens (or creates, 0600) the log, takes the lock that refuses a second server, and continues its chain.
func openAudit(file string, enabled bool, key *apiKey) (*auditLog, error) { panic("audit") }

// append writes one record with one write; seq, timestamp and prev are filled in here, argv is redacted here. An error means: not on disk.
func (l *auditLog) append(r auditRecord) error { panic("audit") }

// authFailed writes auth_failed, at most 10 a second; the next one carries how many were suppressed.
func (l *auditLog) authFailed(r auditRecord) error { panic("audit") }

// reconfigure follows audit.enabled and audit.file of a reloaded snapshot.
func (l *auditLog) reconfigure(file string, enabled bool) error { panic("audit") }

func (l *auditLog) head() auditHead { panic("audit") }
func (l *auditLog) close() error    { panic("audit") }

// auditReport is what verify found.
type auditReport struct {
	Records int
	Begins  uint64 // seq of the first record: not 1 in a rotated file
	Head    auditHead
	Torn    int // torn lines, kept and covered
	Broken  int // line number that breaks the chain; 0: none
	Why     string
}

func verifyAudit(file string, want *auditHead) (auditReport, error) { panic("audit") }

// tailAudit gives the last n lines of the log as decoded records (raw line beside it).
func tailAudit(file string, n int) ([]auditLine, error) { panic("audit") }

type auditLine struct {
	Raw    string
	Record auditRecord
	Torn   bool
}

// openAppend opens a regular file (0600) for append, never through a link: for the audit log and the server's own log.
// (signature used by daemon.go for agent-exec.log)
