// This file is the audit log: records, their hash chain, redaction, rotation and verification.
// It may open files for append, and it alone.
// It must not decide what is recorded, nor lose a record silently: append says whether the record is on disk.
package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxAuditRead     = 16 << 20  // bytes read back at once; 128 KiB of arguments, twice, as six for one, are less
	maxAuditText     = 4 << 10   // bytes of a rule, a directory, a reason, and of a denied argv
	maxAuditEndpoint = 256       // bytes
	maxAuthFailures  = 10        // records a second
	allLines         = 1<<31 - 1 // for readAudit
)

var noPrev = strings.Repeat("0", 2*sha256.Size) // stands in the first record of a chain

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

// auditHead is the number and digest of a record; it prints as SEQ:DIGEST.
type auditHead struct {
	Seq    uint64
	Digest string
}

func (h auditHead) String() string { return fmt.Sprintf("%d:%s", h.Seq, h.Digest) }

// auditLog is one open log. A nil *auditLog is not valid; a disabled one accepts and drops.
type auditLog struct {
	mu       sync.Mutex
	now      func() time.Time
	key      *apiKey
	enabled  bool
	file     string
	f        *os.File    // nil: to be opened before the next record
	info     os.FileInfo // of f as the last write left it; nil: the chain is to be taken from the end of the file
	unended  bool        // f ends in the middle of a line
	last     auditHead   // number of the last record, digest of the last line: of that record, or of what was torn since
	alarm    string      // what the next audit_broken says; "" for nothing
	second   time.Time   // auth failures are counted from here
	failures int         // in this second
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
	if file != l.file || enabled != l.enabled {
		l.f.Close() // here and below: a nil file only says that it is none
		l.f, l.info, l.file, l.enabled, l.last = nil, nil, file, enabled, auditHead{}
	}
	if !enabled {
		return nil
	}
	return l.open()
}

// close lets go of the log; what comes later is refused.
func (l *auditLog) close() { l.reconfigure("", true) }

// head is the last record of the open log, zero before the first.
func (l *auditLog) head() auditHead {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// append writes one record with one write; seq, timestamp and prev are filled in here, and the key is taken out of its texts.
// An error means: not on disk; an audit_broken then precedes the next record that is.
// Of auth_failed it writes at most 10 a second; the next one carries how many were suppressed.
func (l *auditLog) append(r auditRecord) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.enabled {
		return nil
	}
	if r.Event == "auth_failed" {
		if now := l.now(); now.Sub(l.second).Abs() >= time.Second {
			r.Suppressed, l.second, l.failures = max(0, l.failures-maxAuthFailures), now, 0
		}
		if l.failures++; l.failures > maxAuthFailures {
			return nil
		}
	}
	err := l.open()
	if err == nil && l.alarm != "" {
		err = l.write(auditRecord{Event: "audit_broken", Reason: l.alarm})
	}
	if err == nil {
		l.alarm = ""
		err = l.write(r)
	}
	if err != nil {
		l.alarm = cmp.Or(l.alarm, "the log could not be written, records are missing")
		return fmt.Errorf("the audit record %s was not written: %w", r.Event, err)
	}
	return nil
}

// open opens the file that is now at the path, unless it is ours as the last write left it, by inode, size and time (a change back and
// forth that sets the time back is for verify to find). Other kinds of file than regular ones are written and not read back.
func (l *auditLog) open() error {
	now, err := os.Lstat(l.file)
	if err == nil && l.f != nil && os.SameFile(now, l.info) && now.Size() == l.info.Size() && now.ModTime().Equal(l.info.ModTime()) {
		return nil
	}
	f, now, err := openAppend(l.file, os.O_RDWR)
	l.f.Close() // only now: until then a new file could not have the old one's inode number
	if l.f = nil; err == nil && now.Mode().IsRegular() {
		err = l.takeUp(f, now)
	}
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.info = f, now
	return nil
}

// takeUp locks the file, and goes on with the chain that is in memory, whatever the file holds: a new or empty one is what a rotation by
// rename leaves, anything else is a break. Without one the chain is taken from the file's end: a crash leaves a line without newline, which
// the next record covers; a line that is no record and has one is left for verify to find.
func (l *auditLog) takeUp(f *os.File, now os.FileInfo) error {
	if locked, err := lockLog(f); !locked {
		return cmp.Or(err, fmt.Errorf("another server writes the audit log %q: stop it, or name another file in audit.file", l.file))
	}
	lines, torn, err := readLines(f, max(0, now.Size()-maxAuditRead))
	l.unended = len(torn) > 0
	if l.info != nil && (os.SameFile(now, l.info) || now.Size() > 0) {
		l.alarm = cmp.Or(l.alarm, fmt.Sprintf("somebody else changed the log: it had %d bytes and has %d", l.info.Size(), now.Size()))
	} else if l.info == nil {
		for _, line := range slices.Backward(append(lines, torn)) {
			if a := parseAuditLine(line); !a.Torn {
				l.last = a.Head
				break
			}
		}
		if l.unended {
			l.last.Digest = auditDigest(torn)
		}
	}
	return err
}

// write takes the key out of every text that others have a hand in, cuts what may be long, and appends one line with one write(2). It is on
// disk as far as the kernel promises without fsync(2), which would cost milliseconds: it outlives this process, not a power cut. What a
// failed write left is cut off again, or else stays as a torn line.
func (l *auditLog) write(r auditRecord) error {
	r.Endpoint = l.text(r.Endpoint, maxAuditEndpoint)
	r.Cwd, r.Rule, r.Reason = l.text(r.Cwd, maxAuditText), l.text(r.Rule, maxAuditText), l.text(r.Reason, maxAuditText)
	limit := pick(r.Event == "exec_denied", maxAuditText, maxAuditRead) // that is none: what may run was held to 128 KiB before
	for _, argv := range []*[]string{&r.Argv, &r.OriginalArgv} {        // cut as one text, for no argument has a NUL byte
		*argv = strings.SplitN(l.text(strings.Join(*argv, "\x00"), limit), "\x00", len(*argv))
	}
	r.Seq, r.Timestamp, r.Prev = l.last.Seq+1, l.now().UTC().Format("2006-01-02T15:04:05.000Z"), cmp.Or(l.last.Digest, noPrev)
	var line bytes.Buffer
	// JSON leaves DEL, U+0080 to U+009F and formatting characters raw.
	fmt.Fprintf(escapeWriter{&line}, "%s%s\n", pick(l.unended, "\n", ""), marshal(r))
	l.f.SetWriteDeadline(time.Now().Add(time.Second / 10)) // for a FIFO that does not take it; what knows no deadlines does not wait
	n, err := l.f.Write(line.Bytes())
	if err != nil && l.f.Truncate(l.info.Size()) == nil {
		n = 0
	}
	if n > 0 {
		l.last.Digest, l.unended = auditDigest(bytes.Trim(line.Bytes()[:n], "\n")), err != nil
	}
	if n >= line.Len()-1 { // a line that only lacks its newline is read back as a record
		l.last.Seq = r.Seq
	}
	info, bad := l.f.Stat()
	l.info = info
	return cmp.Or(err, bad)
}

// text is s without the key, and only then cut to at most limit bytes, between characters and marked, so that no cut leaves half a key.
func (l *auditLog) text(s string, limit int) string {
	if s = l.key.redact(strings.ToValidUTF8(s, "\uFFFD")); len(s) > limit {
		s = strings.ToValidUTF8(s[:limit-len("…")], "") + "…"
	}
	return s
}

func auditDigest(line []byte) string { return fmt.Sprintf("%x", sha256.Sum256(line)) }

// openAppend opens a file for append, this log or the server's own.
func openAppend(file string, access int) (*os.File, os.FileInfo, error) {
	return openTrusted(file, access|os.O_APPEND|os.O_CREATE, 0)
}

// auditLine is one line that was read back, whoever wrote it.
type auditLine struct {
	Raw    string
	Record auditRecord
	Head   auditHead
	Torn   bool // it is no record
	Ended  bool // by a newline
}

func parseAuditLine(line []byte) (a auditLine) {
	line, a.Ended = bytes.CutSuffix(line, []byte("\n"))
	err := json.Unmarshal(line, &a.Record)
	a.Raw, a.Head, a.Torn = string(line), auditHead{a.Record.Seq, auditDigest(line)}, err != nil || a.Record.Seq == 0
	return a
}

// readLines reads the whole lines from an offset on, as many as maxAuditRead bytes hold, and the beginning of a further one.
func readLines(f *os.File, at int64) (lines [][]byte, rest []byte, err error) {
	data, err := io.ReadAll(io.NewSectionReader(f, at, maxAuditRead))
	end := bytes.LastIndexByte(data, '\n') + 1
	return slices.Collect(bytes.Lines(data[:end])), data[end:], err
}

// readAudit hands emit the last n whole lines, as many as maxAuditRead bytes hold, or (allLines) every line. With follow it goes on with
// each new one until emit fails, also in the file that takes this one's place; a file that was cut is read from its start again.
func readAudit(file string, n int, follow bool, emit func(auditLine) error) error {
	f, info, err := openTrusted(file, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%q is not a regular file: name another", file)
	}
	at, anew := pick(n < allLines, max(0, info.Size()-maxAuditRead), 0), false
	for ; ; n = allLines {
		lines, rest, err := readLines(f, at)
		end := len(lines) == 0
		if end && n >= allLines && !follow && len(rest) > 0 {
			lines = append(lines, rest)
		}
		for i, line := range lines {
			at += int64(len(line))
			if err == nil && i >= len(lines)-n {
				err = emit(parseAuditLine(line))
			}
		}
		switch {
		case err != nil || !follow && (end || n < allLines):
			return err
		case anew && end:
			f.Close()
			return readAudit(file, allLines, follow, emit)
		case follow:
			time.Sleep(time.Second / 4)
			now, gone := os.Lstat(file) // before it is read again: a file that was renamed away may have got a last line
			anew = gone == nil && (!os.SameFile(now, info) || now.Size() < at)
		}
	}
}

// auditReport is what was found in a chain.
type auditReport struct {
	Records, Torn int    // torn lines are kept and covered
	Begins        uint64 // number of the first record: not 1 in a rotated file
	Head          auditHead
}

// verifyAudit reads a whole log; the error names the first line that breaks the chain. With a known head, that record must be in it, or be
// the one before its first.
func verifyAudit(file, known string) (rep auditReport, err error) {
	number, prev, found, torn := 0, noPrev, known == "", false
	err = readAudit(file, allLines, false, func(a auditLine) error {
		follows := a.Record.Prev == prev && (rep.Records == 0 || a.Head.Seq == rep.Head.Seq+1)
		number, prev, torn = number+1, a.Head.Digest, a.Torn && a.Ended
		switch {
		case len(a.Raw) >= maxAuditRead:
			return errors.New("it is longer than any record")
		case a.Torn:
			rep.Torn++
		case !follows && (number > 1 || a.Head.Seq == 1): // the first line of a rotated file follows from the old file
			return errors.New("it does not follow from the line before: that one was changed, or lines were removed, added or moved")
		default:
			found = found || known == a.Head.String() || known == auditHead{a.Head.Seq - 1, a.Record.Prev}.String()
			rep.Records, rep.Begins, rep.Head = rep.Records+1, cmp.Or(rep.Begins, a.Head.Seq), a.Head
		}
		return nil
	})
	if err == nil && torn {
		err = errors.New("it is not a record, and no later one covers it")
	}
	if err != nil && number > 0 {
		return rep, fmt.Errorf("%q is broken at line %d: %w", file, number, err)
	} else if err == nil && !found {
		err = fmt.Errorf("%q holds records %d to %d, and the head %q is not among them", file, rep.Begins, rep.Head.Seq, known)
	}
	return rep, err
}
