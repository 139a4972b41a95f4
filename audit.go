// This file is the audit log: records, their hash chain, redaction, rotation and verification.
// It may open files for append, and it alone.
// It must not decide what is recorded, nor lose a record silently: append says whether the record is on disk.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// The kinds of record that this file itself treats apart.
const (
	eventAuthFailed  = "auth_failed"
	eventExecDenied  = "exec_denied"
	eventAuditBroken = "audit_broken" // written by this file alone
)

const (
	maxAuditLine     = 4 << 20                // bytes; 128 KiB of arguments, twice, escaped at six bytes for one, stay below half of it
	maxAuditTail     = 32 << 20               // bytes that are read back from the end of a log
	maxAuditText     = 4 << 10                // bytes of any one text but an argument, and of a denied argv
	maxAuditEndpoint = 256                    // bytes
	maxAuthFailures  = 10                     // records a second
	auditTornRun     = 16                     // lines looked through for the last whole record: each crash tears at most one
	auditPatience    = 100 * time.Millisecond // for a FIFO or terminal that does not take a record
	auditPoll        = 250 * time.Millisecond // between two looks at a followed log
	auditTime        = "2006-01-02T15:04:05.000Z"
)

var (
	noPrev      = strings.Repeat("0", 2*sha256.Size) // stands in the first record of a chain
	newline     = []byte("\n")
	errNotAudit = errors.New("is not an audit log")
)

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
	Suppressed   int      `json:"suppressed,omitempty"` // records of this kind that were not written before this one
	Prev         string   `json:"prev"`
}

// auditHead is the number and digest of the last record; it prints as SEQ:DIGEST.
type auditHead struct {
	Seq    uint64
	Digest string
}

func (h auditHead) String() string { return fmt.Sprintf("%d:%s", h.Seq, h.Digest) }

func parseAuditHead(s string) (auditHead, error) {
	number, digest, _ := strings.Cut(s, ":")
	seq, err := strconv.ParseUint(number, 10, 64)
	if raw, bad := hex.DecodeString(digest); err != nil || bad != nil || len(raw) != sha256.Size || digest != strings.ToLower(digest) {
		return auditHead{}, fmt.Errorf("%q is not a head: write SEQ:DIGEST as `aexec status` and `aexec audit verify` print it", s)
	}
	return auditHead{seq, digest}, nil
}

// auditLog is one open log. A nil *auditLog is not valid; a disabled one accepts and drops.
type auditLog struct {
	mu      sync.Mutex
	now     func() time.Time
	key     *apiKey
	file    string
	enabled bool

	f       *os.File      // nil: to be opened before the next record
	info    fs.FileInfo   // of f as the last write left it
	size    int64         // of a regular file, by count of what was written
	unended bool          // f ends in the middle of a line
	goOn    bool          // the chain is in memory: the file was open before
	prev    string        // digest of the last line, torn or whole
	last    auditHead     // of the last record
	alarm   string        // what the next audit_broken says; "" for nothing
	lost    int           // records that could not be written since the last one that could
	enc     *json.Encoder // into buf
	buf     bytes.Buffer

	second     time.Time // auth failures are counted from here
	failures   int
	suppressed int
}

// openAudit opens (or creates, 0600) the log, takes the lock that refuses a second server, and continues its chain.
func openAudit(file string, enabled bool, key *apiKey) (*auditLog, error) {
	l := &auditLog{now: time.Now, key: key, file: file, enabled: enabled}
	l.enc = json.NewEncoder(&l.buf)
	l.enc.SetEscapeHTML(false)
	if !enabled {
		return l, nil
	}
	return l, l.open()
}

// append writes one record with one write; seq, timestamp and prev are filled in here, and the key is taken out of every text.
// An error means: not on disk. The next record is then preceded by an audit_broken that says how many are missing.
func (l *auditLog) append(r auditRecord) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.record(r)
}

// authFailed writes auth_failed, at most 10 a second; the next one carries how many were suppressed.
func (l *auditLog) authFailed(r auditRecord) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.now(); now.Sub(l.second).Abs() >= time.Second {
		l.second, l.failures = now, 0
	}
	if l.failures++; l.failures > maxAuthFailures {
		l.suppressed++
		return nil
	}
	r.Event, r.Suppressed = eventAuthFailed, l.suppressed
	err := l.record(r)
	if err == nil {
		l.suppressed = 0
	}
	return err
}

// reconfigure follows audit.enabled and audit.file of a reloaded snapshot. After an error append goes on trying, and failing, until the file can be opened.
func (l *auditLog) reconfigure(file string, enabled bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if file == l.file && enabled == l.enabled {
		return nil
	}
	l.drop()
	l.file, l.enabled, l.goOn = file, enabled, false
	if !enabled {
		return nil
	}
	return l.open()
}

// head is the last record of the open log, zero before the first.
func (l *auditLog) head() auditHead {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

func (l *auditLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.file = "" // what comes now cannot be written
	return l.drop()
}

func (l *auditLog) drop() (err error) {
	if l.f != nil {
		err, l.f = l.f.Close(), nil
	}
	return err
}

// record writes what the log itself has to say, and then r.
func (l *auditLog) record(r auditRecord) error {
	if !l.enabled {
		return nil
	}
	err := l.ready()
	if err == nil && (l.lost > 0 || l.alarm != "") {
		why := cmp.Or(l.alarm, "records could not be written, as many as suppressed says")
		if err = l.write(auditRecord{Event: eventAuditBroken, Reason: why, Suppressed: l.lost}); err == nil {
			l.alarm, l.lost = "", 0
		}
	}
	if err == nil {
		err = l.write(r)
	}
	if err != nil {
		l.lost++
		return fmt.Errorf("the audit record %s was not written: %w", r.Event, err)
	}
	return nil
}

// ready looks whether the file is as the last write left it, and opens the one that is now at its path if not.
func (l *auditLog) ready() error {
	if l.f != nil && !l.info.Mode().IsRegular() {
		return nil
	}
	now, err := os.Lstat(l.file)
	if err == nil && l.f != nil && os.SameFile(now, l.info) && l.asLeft(now) {
		return nil
	}
	return l.open()
}

// asLeft compares size and time; a change back and forth that sets the time back as well is for verify to find.
func (l *auditLog) asLeft(now fs.FileInfo) bool {
	return now.Size() == l.size && now.ModTime().Equal(l.info.ModTime())
}

// open opens the file at the path. A chain that is in memory goes on, whatever the file holds: an absent or empty file is what a rotation by
// rename leaves; anything else than what was left there is a break. Else the chain is taken from the file's last line.
func (l *auditLog) open() error {
	f, info, err := openPlain(l.file, os.O_RDWR|os.O_APPEND|os.O_CREATE, false)
	l.drop() // only now: until then a new file could not have the old one's inode number
	if err != nil {
		return err
	}
	var end auditHead
	prev, unended := noPrev, false
	if info.Mode().IsRegular() {
		var locked bool
		if locked, err = lockLog(f); err == nil && !locked {
			err = fmt.Errorf("another server writes the audit log %q: stop it, or name another file in audit.file", l.file)
		} else if err == nil {
			end, prev, unended, err = auditEnd(f, info.Size())
		}
	}
	if err != nil && !(l.goOn && errors.Is(err, errNotAudit)) { // what was put in place of our log is told in it, whatever it is
		f.Close()
		return err
	}
	switch {
	case !l.goOn:
		l.last, l.prev = end, prev
	case os.SameFile(info, l.info) && !l.asLeft(info):
		l.alarm = fmt.Sprintf("the log was changed by somebody else: it had %d bytes and has %d", l.size, info.Size())
	case !os.SameFile(info, l.info) && info.Size() > 0:
		l.alarm = "another file that is not empty was put in place of the log"
	}
	l.f, l.info, l.size, l.unended, l.goOn = f, info, info.Size(), unended, true
	return nil
}

// write appends one line with one write(2). It is on disk as far as the kernel promises without fsync(2), which would cost milliseconds a record:
// it outlives this process, not a power cut. What a failed write left is cut off again; where that cannot be done it stays as a torn line.
func (l *auditLog) write(r auditRecord) error {
	l.clean(&r)
	r.Seq, r.Timestamp, r.Prev = l.last.Seq+1, l.now().UTC().Format(auditTime), l.prev
	l.buf.Reset()
	if l.unended {
		l.buf.WriteByte('\n')
	}
	if err := l.enc.Encode(r); err != nil {
		return err
	}
	data := escapeAudit(l.buf.Bytes())
	if len(data) > maxAuditLine {
		return fmt.Errorf("a record of %d bytes is too long", len(data))
	}
	regular := l.info.Mode().IsRegular()
	if !regular {
		l.f.SetWriteDeadline(time.Now().Add(auditPatience)) // what knows no deadlines does not wait
	}
	n, err := l.f.Write(data)
	switch {
	case err == nil:
		l.size, l.unended, l.prev = l.size+int64(n), false, auditDigest(bytes.Trim(data, "\n"))
		l.last = auditHead{r.Seq, l.prev}
	case !regular:
		l.unended = l.unended || n > 0
	case l.f.Truncate(l.size) != nil:
		l.goOn = false // the file is opened and its end read back before the next record
		l.drop()
		return err
	}
	if info, bad := l.f.Stat(); bad == nil {
		l.info = info
	}
	return err
}

// clean takes the key out of every text, and cuts only then, so that no cut leaves half a key standing.
func (l *auditLog) clean(r *auditRecord) {
	for _, s := range []*string{&r.RequestID, &r.SourceIP, &r.AuthSource, &r.Endpoint, &r.Mode, &r.Cwd, &r.Plugin,
		&r.ACLDecision, &r.Rule, &r.DenialReason, &r.Signal, &r.Reason} {
		*s = cutText(l.redact(*s), maxAuditText)
	}
	r.Endpoint = cutText(r.Endpoint, maxAuditEndpoint)
	limit := maxAuditLine // none: what may run was held to 128 KiB before
	if r.Event == eventExecDenied {
		limit = maxAuditText
	}
	r.Argv, r.OriginalArgv = l.cleanArgv(r.Argv, limit), l.cleanArgv(r.OriginalArgv, limit)
}

func (l *auditLog) cleanArgv(argv []string, limit int) (out []string) {
	for _, a := range argv {
		if a = l.redact(a); len(a) >= limit { // >=: an argument counts one byte more, or a million empty ones were free
			return append(out, cutText(a+"…", limit))
		}
		out, limit = append(out, a), limit-len(a)-1
	}
	return out
}

func (l *auditLog) redact(s string) string {
	if s == "" || l.key == nil {
		return strings.ToValidUTF8(s, "\uFFFD")
	}
	return l.key.redact(strings.ToValidUTF8(s, "\uFFFD"))
}

// cutText cuts s to at most limit bytes, between characters, and marks the cut.
func cutText(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:max(limit-len("…"), 0)], "") + "…"
}

// escapeAudit writes as \uXXXX what encoding/json leaves raw and a terminal obeys: DEL, U+0080 to U+009F, and formatting characters.
func escapeAudit(data []byte) []byte {
	if !slices.ContainsFunc(data, func(b byte) bool { return b < ' ' && b != '\n' || b >= 0x7f }) {
		return data // nearly every record
	}
	out := make([]byte, 0, 2*len(data))
	for _, r := range string(data) {
		if !unsafeRune(r) {
			out = utf8.AppendRune(out, r)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			out = fmt.Appendf(out, `\u%04x`, u)
		}
	}
	return out
}

func unsafeRune(r rune) bool {
	if r >= ' ' && r < 0x7f || r == '\n' { // a newline only ever ends a record
		return false
	}
	return r == utf8.RuneError || unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
}

func auditDigest(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// openPlain opens a file never through a link, never waiting, and never making it our terminal (open(2)).
func openPlain(file string, flags int, regular bool) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(file, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0o600)
	if errors.Is(err, syscall.ELOOP) {
		err = fmt.Errorf("%q is a symbolic link: name the file itself", file)
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && regular && !info.Mode().IsRegular() {
		err = fmt.Errorf("%q is not a regular file: name another", file)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// openAppend opens a regular file (created 0600) for append, never through a link: for the server's own log.
func openAppend(file string) (*os.File, error) {
	f, _, err := openPlain(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, true)
	return f, err
}

// auditLine is one line that was read back. Raw is safe to print, whoever wrote the file.
type auditLine struct {
	Raw    string
	Record auditRecord
	Torn   bool
}

func parseAuditLine(line []byte) (a auditLine) {
	line = bytes.TrimSuffix(line, newline)
	err := json.Unmarshal(line, &a.Record)
	a.Raw, a.Torn = string(escapeAudit(line)), err != nil || a.Record.Seq == 0 || len(a.Record.Prev) != len(noPrev)
	return a
}

// lastLines reads the last n lines (or fewer: no more than maxAuditTail bytes), each with its newline but perhaps the last.
func lastLines(f *os.File, size int64, n int) ([][]byte, error) {
	n = max(n, 0)
	for window := int64(64 << 10); ; window *= 4 {
		window = min(window, size, maxAuditTail)
		data := make([]byte, window)
		got, err := f.ReadAt(data, size-window)
		if err != nil && err != io.EOF {
			return nil, err
		}
		lines := slices.Collect(bytes.Lines(data[:got]))
		if window < size && len(lines) > 0 {
			lines = lines[1:] // most likely not whole
		}
		if len(lines) >= n || window == size || window == maxAuditTail {
			return lines[max(0, len(lines)-n):], nil
		}
	}
}

// auditEnd reads where a chain ends: its last record, the digest that the next one refers to, and whether the last line lacks its newline.
func auditEnd(f *os.File, size int64) (last auditHead, prev string, unended bool, err error) {
	lines, err := lastLines(f, size, auditTornRun)
	prev = noPrev
	for _, line := range lines {
		line, ended := bytes.CutSuffix(line, newline)
		if a := parseAuditLine(line); !a.Torn {
			prev = auditDigest(line)
			last = auditHead{a.Record.Seq, prev}
		} else if !ended { // a crash leaves it without its newline; any other line that is no record is left uncovered, for verify to find
			prev = auditDigest(line)
		}
		unended = !ended
	}
	// A crash may leave one torn record and nothing else; any other file without a record is none of ours.
	if err == nil && size > 0 && last.Seq == 0 && !(len(lines) == 1 && bytes.HasPrefix(lines[0], []byte(`{"seq":`))) {
		err = fmt.Errorf("%q %w: move it away, or name another file in audit.file", f.Name(), errNotAudit)
	}
	return last, prev, unended, err
}

// tailAudit gives the last n lines of the log, without one that has no end yet.
func tailAudit(file string, n int) (out []auditLine, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err = followAudit(ctx, file, n, func(a auditLine) { out = append(out, a) })
	return out, err
}

// followAudit hands emit the last n lines, and then each new one once it is whole, until ctx ends. It looks at the path before it reads, so that
// nothing is left unread in a file that was renamed away; a truncated one is read from its start again.
func followAudit(ctx context.Context, file string, n int, emit func(auditLine)) error {
	f, info, err := openPlain(file, os.O_RDONLY, true)
	if err != nil {
		return err
	}
	defer func() { f.Close() }()
	lines, err := lastLines(f, info.Size(), n)
	at := info.Size()
	for _, line := range lines {
		at -= int64(len(line))
	}
	r := bufio.NewReaderSize(nil, maxAuditLine)
	tick := time.NewTicker(auditPoll)
	defer tick.Stop()
	for err == nil {
		now, gone := os.Lstat(file) // gone: between rename and creation
		rotated := gone == nil && !os.SameFile(now, info)
		if gone == nil && !rotated && now.Size() < at {
			at = 0
		}
		if at, err = emitFrom(r, f, at, emit); err == nil && rotated {
			f.Close()
			f, info, err = openPlain(file, os.O_RDONLY, true)
			at = 0
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
	return err
}

// emitFrom hands over the whole lines from an offset on, and returns the offset behind them.
func emitFrom(r *bufio.Reader, f *os.File, at int64, emit func(auditLine)) (int64, error) {
	r.Reset(io.NewSectionReader(f, at, math.MaxInt64-at))
	for {
		line, err := r.ReadSlice('\n')
		if err == io.EOF {
			return at, nil // what is left has no end yet
		} else if err != nil {
			return at, err
		}
		emit(parseAuditLine(line))
		at += int64(len(line))
	}
}

// auditReport is what verify found.
type auditReport struct {
	Records int
	Begins  uint64 // seq of the first record: not 1 in a rotated file
	Head    auditHead
	Torn    int // torn lines, kept and covered
	Alarms  int // audit_broken records: what the server itself noticed
	Broken  int // line number that breaks the chain; 0: none
	Why     string

	lines            int
	prev             string // digest of the line before
	found, uncovered bool   // the known head; a whole line that is no record and that no record covers yet
}

// verifyAudit reads a whole log, a line at a time. With want, that record must be in it, or be the one before its first.
func verifyAudit(file string, want *auditHead) (rep auditReport, err error) {
	f, _, err := openPlain(file, os.O_RDONLY, true)
	if err != nil {
		return rep, err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, maxAuditLine)
	for err == nil && rep.Why == "" {
		var line []byte
		if line, err = r.ReadSlice('\n'); len(line) > 0 {
			rep.Why = rep.step(line, want)
		}
	}
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		rep.Why = "it is longer than any record"
	case rep.Why != "":
	case err != io.EOF:
		return rep, err
	case rep.uncovered:
		rep.Why = "it is not a record, and no later one covers it"
	case want != nil && !rep.found:
		rep.lines, rep.Why = max(rep.lines, 1), fmt.Sprintf("the log holds records %d to %d, and the known head %s is not among them", rep.Begins, rep.Head.Seq, want)
	}
	if rep.Why != "" {
		rep.Broken = rep.lines
	}
	return rep, nil
}

// step takes the next line, and says what is wrong with it.
func (rep *auditReport) step(line []byte, want *auditHead) string {
	line, ended := bytes.CutSuffix(line, newline)
	a, prev, digest := parseAuditLine(line), rep.prev, auditDigest(line)
	r := a.Record
	rep.lines, rep.prev, rep.uncovered = rep.lines+1, digest, a.Torn && ended
	switch {
	case a.Torn:
		rep.Torn++
		return ""
	case rep.lines == 1 && r.Seq == 1 && r.Prev != noPrev:
		return "it is the first record, and yet says that others came before"
	case rep.lines > 1 && r.Prev != prev:
		return "it does not follow from the line before: that one was changed, or lines were removed, added or moved"
	case rep.Records > 0 && r.Seq != rep.Head.Seq+1:
		return fmt.Sprintf("it is record %d and follows record %d", r.Seq, rep.Head.Seq)
	case want != nil && r.Seq == want.Seq && digest != want.Digest:
		return fmt.Sprintf("it is record %d, but not the one of the known head", r.Seq)
	}
	if rep.Records++; rep.Records == 1 {
		rep.Begins = r.Seq
		rep.found = want != nil && want.Seq+1 == r.Seq && want.Digest == r.Prev
	}
	rep.Head = auditHead{r.Seq, digest}
	rep.found = rep.found || want != nil && *want == rep.Head
	if r.Event == eventAuditBroken {
		rep.Alarms++
	}
	return ""
}
