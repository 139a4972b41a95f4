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
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf16"
)

const (
	eventAuditBroken = "audit_broken"         // written by this file alone
	maxAuditLine     = 4 << 20                // bytes; 128 KiB of arguments, twice, escaped at six bytes for one, stay below half of it
	maxAuditTail     = 16 << 20               // bytes that are read back from the end of a log
	maxAuditText     = 4 << 10                // bytes of any one text but an argument, and of a denied argv
	maxAuditEndpoint = 256                    // bytes
	maxAuthFailures  = 10                     // records a second
	auditTornRun     = 16                     // lines looked through for the last whole record: each crash tears at most one
	auditPatience    = 100 * time.Millisecond // for a FIFO or terminal that does not take a record
	auditPoll        = 250 * time.Millisecond // between two looks at a followed log
	auditTime        = "2006-01-02T15:04:05.000Z"
)

var (
	noPrev      = strings.Repeat("0", 2*sha256.Size)                                              // stands in the first record of a chain
	auditUnsafe = regexp.MustCompile(`[\x00-\x09\x0b-\x1f\x7f-\x{9f}\p{Cf}\p{Zl}\p{Zp}\x{FFFD}]`) // a newline only ever ends a record
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
	mu         sync.Mutex
	now        func() time.Time
	key        *apiKey
	file       string
	enabled    bool
	f          *os.File    // nil: to be opened before the next record
	info       os.FileInfo // of f as the last write left it; nil: the chain is not in memory yet
	size       int64       // of f, by count of what was written
	unended    bool        // f ends in the middle of a line
	prev       string      // digest of the last line, torn or whole
	last       auditHead   // of the last record
	alarm      string      // what the next audit_broken says; "" for nothing
	lost       int         // records that could not be written since the last one that could
	second     time.Time   // auth failures are counted from here
	failures   int         // in this second
	suppressed int         // auth failures since the last one that was written
	buf        bytes.Buffer
}

// openAudit opens (or creates, 0600) the log, takes the lock that refuses a second server, and continues its chain.
func openAudit(file string, enabled bool, key *apiKey) (*auditLog, error) {
	l := &auditLog{now: time.Now, key: key}
	return l, l.reconfigure(file, enabled)
}

// reconfigure follows audit.enabled and audit.file. After an error append goes on trying, and failing, until the file can be opened.
func (l *auditLog) reconfigure(file string, enabled bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if file == l.file && enabled == l.enabled {
		return nil
	}
	l.f.Close() // here and below: a nil file only says that it is none
	l.f, l.info, l.file, l.enabled = nil, nil, file, enabled
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

// close leaves a log that cannot be written.
func (l *auditLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.f
	l.f, l.file = nil, ""
	return f.Close()
}

// append writes one record with one write; seq, timestamp and prev are filled in here, and the key is taken out of every text.
// An error means: not on disk. The next record is then preceded by an audit_broken that says how many are missing.
// Of auth_failed it writes at most 10 a second; the next one carries how many were suppressed.
func (l *auditLog) append(r auditRecord) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.enabled {
		return nil
	}
	if r.Event == "auth_failed" {
		if now := l.now(); now.Sub(l.second).Abs() >= time.Second {
			l.second, l.failures = now, 0
		}
		if l.failures++; l.failures > maxAuthFailures {
			l.suppressed++
			return nil
		}
		r.Suppressed, l.suppressed = l.suppressed, 0
	}
	err := l.open()
	if err == nil && l.alarm != "" {
		if err = l.write(auditRecord{Event: eventAuditBroken, Reason: l.alarm, Suppressed: l.lost}); err == nil {
			l.alarm, l.lost = "", 0
		}
	}
	if err == nil {
		err = l.write(r)
	}
	if err != nil {
		l.alarm, l.lost = cmp.Or(l.alarm, "records could not be written, as many as suppressed says"), l.lost+1+r.Suppressed
		return fmt.Errorf("the audit record %s was not written: %w", r.Event, err)
	}
	return nil
}

// asLeft compares file, size and time; a change back and forth that sets the time back as well is for verify to find.
func (l *auditLog) asLeft(now os.FileInfo) bool {
	return os.SameFile(now, l.info) && (!now.Mode().IsRegular() || now.Size() == l.size && now.ModTime().Equal(l.info.ModTime()))
}

// open opens the file that is now at the path, unless it is ours as the last write left it. A chain that is in memory goes on, whatever the file holds:
// an absent or empty one is what a rotation by rename leaves, anything else is a break. Else the chain is taken from the file's end.
func (l *auditLog) open() error {
	if now, err := os.Lstat(l.file); err == nil && l.f != nil && l.asLeft(now) {
		return nil
	}
	f, info, err := openPlain(l.file, os.O_RDWR|os.O_APPEND|os.O_CREATE, false)
	l.f.Close() // only now: until then a new file could not have the old one's inode number
	l.f = nil
	if err == nil && info.Mode().IsRegular() {
		if locked, bad := lockLog(f); !locked {
			err = cmp.Or(bad, fmt.Errorf("another server writes the audit log %q: stop it, or name another file in audit.file", l.file))
		}
	}
	if err == nil && l.info == nil {
		l.last, l.prev, err = auditEnd(f, info.Size())
	} else if err == nil && !l.asLeft(info) && (os.SameFile(info, l.info) || info.Size() > 0) {
		l.alarm = fmt.Sprintf("the log was changed or replaced by somebody else: it had %d bytes and has %d", l.size, info.Size())
	}
	if err != nil {
		f.Close()
		return err
	}
	end := []byte("\n")
	f.ReadAt(end, info.Size()-1) // of an empty file nothing is read
	l.f, l.info, l.size, l.unended = f, info, info.Size(), end[0] != '\n'
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
	enc := json.NewEncoder(&l.buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(&r); err != nil {
		return err
	}
	data := escapeAudit(l.buf.Bytes())
	if len(data) > maxAuditLine {
		return fmt.Errorf("a record of %d bytes is too long", len(data))
	}
	l.f.SetWriteDeadline(time.Now().Add(auditPatience)) // what knows no deadlines does not wait
	n, err := l.f.Write(data)
	if err != nil && l.f.Truncate(l.size) == nil {
		n = 0
	}
	if n > 0 {
		l.size, l.unended, l.prev = l.size+int64(n), err != nil, auditDigest(bytes.Trim(data[:n], "\n"))
	}
	if n >= len(data)-1 { // a line that only lacks its newline is read back as a record
		l.last = auditHead{r.Seq, l.prev}
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
	for _, argv := range []*[]string{&r.Argv, &r.OriginalArgv} {
		left := maxAuditLine // no limit: what may run was held to 128 KiB before
		if r.Event == "exec_denied" {
			left = maxAuditText
		}
		var out []string
		for _, a := range *argv {
			if a = l.redact(a); len(a) >= left { // >=: an argument counts one byte more, or a million empty ones were free
				out = append(out, cutText(a+"…", left))
				break
			}
			out, left = append(out, a), left-len(a)-1
		}
		*argv = out
	}
}

func (l *auditLog) redact(s string) string {
	if s = strings.ToValidUTF8(s, "\uFFFD"); l.key != nil {
		s = l.key.redact(s)
	}
	return s
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
	return auditUnsafe.ReplaceAllFunc(data, func(char []byte) (out []byte) {
		for _, unit := range utf16.Encode([]rune(string(char))) {
			out = fmt.Appendf(out, `\u%04x`, unit)
		}
		return out
	})
}

func auditDigest(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// openPlain opens a file never through a link, never waiting, and never making it our terminal (open(2)).
func openPlain(file string, flags int, regular bool) (f *os.File, info os.FileInfo, err error) {
	if f, err = os.OpenFile(file, flags|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0o600); err == nil {
		info, err = f.Stat()
	}
	if errors.Is(err, syscall.ELOOP) {
		err = fmt.Errorf("%q is a symbolic link: name the file itself", file)
	} else if err == nil && regular && !info.Mode().IsRegular() {
		err = fmt.Errorf("%q is not a regular file: name another", file)
	}
	if err != nil {
		f.Close()
	}
	return f, info, err
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
	line = bytes.TrimSuffix(line, []byte("\n"))
	err := json.Unmarshal(line, &a.Record)
	a.Raw, a.Torn = string(escapeAudit(line)), err != nil || a.Record.Seq == 0 || len(a.Record.Prev) != len(noPrev)
	return a
}

// auditLines reads the lines of a log from an offset on, each with its newline but perhaps the last.
func auditLines(f *os.File, at int64) *bufio.Scanner {
	s := bufio.NewScanner(io.NewSectionReader(f, at, 1<<62))
	s.Buffer(nil, maxAuditLine)
	s.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		n, line, err := bufio.ScanLines(data, atEOF)
		if line != nil {
			line = data[:n] // the digest wants what ScanLines trims
		}
		return n, line, err
	})
	return s
}

// lastLines reads the last n lines of a file, or those that maxAuditTail bytes hold.
func lastLines(f *os.File, size int64, n int) ([][]byte, error) {
	data := make([]byte, min(size, maxAuditTail))
	_, err := f.ReadAt(data, size-int64(len(data)))
	lines := slices.Collect(bytes.Lines(data))
	if size > maxAuditTail {
		lines = lines[1:] // most likely not whole
	}
	return lines[max(0, len(lines)-max(0, n)):], err
}

// auditEnd reads where a chain ends: its last record, and the digest that the next one refers to.
func auditEnd(f *os.File, size int64) (auditHead, string, error) {
	rep := auditReport{prev: noPrev}
	lines, err := lastLines(f, size, auditTornRun)
	for _, line := range lines {
		rep.take(line, nil)
	}
	if rep.uncovered { // a crash leaves no newline: what is no record and has one is left for verify to find
		rep.prev = cmp.Or(rep.Head.Digest, noPrev)
	}
	// A crash may leave one torn record and nothing else; any other file without a record is none of ours.
	if err == nil && size > 0 && rep.Records == 0 && !(len(lines) == 1 && bytes.HasPrefix(lines[0], []byte(`{"seq":`))) {
		err = fmt.Errorf("%q is not an audit log: move it away, or name another file in audit.file", f.Name())
	}
	return rep.Head, rep.prev, err
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
	at := info.Size() - int64(len(bytes.Join(lines, nil)))
	for tick := time.Tick(auditPoll); err == nil; {
		now, gone := os.Lstat(file) // gone: between rename and creation
		anew := gone == nil && (!os.SameFile(now, info) || now.Size() < at)
		s := auditLines(f, at)
		for s.Scan() && bytes.HasSuffix(s.Bytes(), []byte("\n")) {
			emit(parseAuditLine(s.Bytes()))
			at += int64(len(s.Bytes()))
		}
		if err = s.Err(); err == nil && anew {
			f.Close()
			f, info, err = openPlain(file, os.O_RDONLY, true)
			at = 0
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick:
		}
	}
	return err
}

// auditReport is what was found in a chain.
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
	found, uncovered bool   // the known head; a line before that is whole, no record, and covered by none
}

// take reads the next line. With want, no other record may stand in that one's place.
func (rep *auditReport) take(line []byte, want *auditHead) {
	line, ended := bytes.CutSuffix(line, []byte("\n"))
	a, prev := parseAuditLine(line), rep.prev
	r, head := a.Record, auditHead{a.Record.Seq, auditDigest(line)}
	rep.lines, rep.prev, rep.uncovered = rep.lines+1, head.Digest, a.Torn && ended
	if a.Torn {
		rep.Torn++
		return
	}
	switch {
	case r.Prev != prev && (rep.lines > 1 || r.Seq == 1): // the first line of a rotated file follows from the old file
		rep.Why = "it does not follow from the line before: that one was changed, or lines were removed, added or moved"
	case rep.Records > 0 && r.Seq != rep.Head.Seq+1:
		rep.Why = fmt.Sprintf("it is record %d and follows record %d", r.Seq, rep.Head.Seq)
	case want != nil && r.Seq == want.Seq && head != *want:
		rep.Why = fmt.Sprintf("it is record %d, but not the one of the known head", r.Seq)
	}
	rep.found = rep.found || want != nil && (*want == head || *want == auditHead{r.Seq - 1, r.Prev})
	rep.Head, rep.Records = head, rep.Records+1
	rep.Begins = cmp.Or(rep.Begins, r.Seq)
	if r.Event == eventAuditBroken {
		rep.Alarms++
	}
}

// verifyAudit reads a whole log, a line at a time. With want, that record must be in it, or be the one before its first.
func verifyAudit(file string, want *auditHead) (auditReport, error) {
	rep := auditReport{prev: noPrev}
	f, _, err := openPlain(file, os.O_RDONLY, true)
	if err != nil {
		return rep, err
	}
	defer f.Close()
	s := auditLines(f, 0)
	for rep.Why == "" && s.Scan() {
		rep.take(s.Bytes(), want)
	}
	switch err = s.Err(); {
	case rep.Why != "":
	case err == bufio.ErrTooLong:
		rep.lines, rep.Why = rep.lines+1, "it is longer than any record"
	case err != nil:
		return rep, err
	case rep.uncovered:
		rep.Why = "it is not a record, and no later one covers it"
	case want != nil && !rep.found:
		rep.Why = fmt.Sprintf("the log holds records %d to %d, and the known head %s is not among them", rep.Begins, rep.Head.Seq, want)
	}
	if rep.Why != "" {
		rep.Broken = max(rep.lines, 1)
	}
	return rep, nil
}
