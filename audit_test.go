package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

const auditTestKey = `k3y<"&'\>-0123456789` // would stand escaped in JSON if it were looked for too late

// newTestAudit opens a log in a directory of its own.
func newTestAudit(t testing.TB) (*auditLog, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	return openTestAudit(t, file), file
}

var auditTestAPIKey, _ = newAPIKey(auditTestKey)

func openTestAudit(t testing.TB, file string) *auditLog {
	t.Helper()
	l, err := openAudit(file, true, auditTestAPIKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	return l
}

// appendAudit writes one record for each name, and the name is the argv.
func appendAudit(t testing.TB, l *auditLog, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := l.append(auditRecord{Event: "exec_start", Argv: []string{name}}); err != nil {
			t.Fatal(err)
		}
	}
}

func readTestFile(t testing.TB, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func writeTestFile(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// auditEvents names what the file holds: for a record its event, or its argv where it has one.
func auditEvents(t testing.TB, file string) string {
	t.Helper()
	lines, err := tailAudit(file, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, a := range lines {
		switch {
		case a.Torn:
			names = append(names, "torn")
		case len(a.Record.Argv) > 0:
			names = append(names, strings.Join(a.Record.Argv, ","))
		default:
			names = append(names, a.Record.Event)
		}
	}
	return strings.Join(names, " ")
}

// tailAudit gives the last n whole lines.
func tailAudit(file string, n int) (lines []auditLine, err error) {
	err = readAudit(file, n, false, func(a auditLine) error { lines = append(lines, a); return nil })
	return lines, err
}

// auditBreak verifies a file, and gives the number of the line that breaks its chain, 0 if none does, and what is said of it.
func auditBreak(t testing.TB, file, known string) (line int, why string) {
	t.Helper()
	_, err := verifyAudit(file, known)
	if err == nil {
		return 0, ""
	}
	quoted := fmt.Sprintf("%q", file)
	if _, scanErr := fmt.Sscanf(strings.TrimPrefix(err.Error(), quoted), " is broken at line %d:", &line); scanErr != nil {
		t.Fatal(err)
	}
	return line, err.Error()
}

// wantChain verifies a file that must be whole, and gives the report.
func wantChain(t testing.TB, file string) auditReport {
	t.Helper()
	rep, err := verifyAudit(file, "")
	if err != nil {
		t.Fatalf("%v\n%s", err, readTestFile(t, file))
	}
	return rep
}

func TestAuditGolden(t *testing.T) {
	l, file := newTestAudit(t)
	clock := time.Date(2026, 2, 3, 4, 5, 6, 7_890_000, time.FixedZone("", 3600))
	l.now = func() time.Time { clock = clock.Add(time.Millisecond); return clock }
	code, ms, n := 0, int64(12), int64(0)
	for _, r := range []auditRecord{
		{Event: "server_start"},
		{Event: "exec_start", RequestID: "r1", SourceIP: "127.0.0.1", APIKeyID: "sha256:0123456789ab", AuthSource: "header",
			Endpoint: "/api/exec", Mode: "buffered", Argv: []string{"echo", "<a & b>", "\x1b[31m\u009b\u202e"}, OriginalArgv: []string{"e"},
			Cwd: "/", Plugin: "p", ACLDecision: "allow", Rule: "echo *"},
		{Event: "exec_end", RequestID: "r1", ExitCode: &code, DurationMs: &ms, StdoutBytes: &n, StderrBytes: &n, Signal: "SIGTERM", Reason: "timeout"},
		{Event: "exec_denied", Argv: []string{"rm"}, ACLDecision: "deny", DenialReason: "command_not_allowed"},
		{Event: "server_stop", Seq: 99, Timestamp: "forged", Prev: "forged"},
	} {
		if err := l.append(r); err != nil {
			t.Fatal(err)
		}
	}
	golden := filepath.Join("testdata", "audit", "records.jsonl")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		writeTestFile(t, golden, readTestFile(t, file))
	}
	if got, want := readTestFile(t, file), readTestFile(t, golden); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	rep := wantChain(t, golden)
	if rep.Records != 5 || rep.Begins != 1 || rep.Head != l.head() {
		t.Errorf("report %+v, head %v", rep, l.head())
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// Every way to touch a line of a log of five, and the line at which verify must notice.
func TestAuditTampering(t *testing.T) {
	join := func(l ...string) string { return strings.Join(l, "") }
	for _, c := range []struct {
		name   string
		change func(l []string) string
		broken int
	}{
		{"untouched", func(l []string) string { return join(l...) }, 0},
		{"first line changed", func(l []string) string { l[0] = strings.Replace(l[0], "one", "ONE", 1); return join(l...) }, 2},
		{"middle line changed", func(l []string) string { l[2] = strings.Replace(l[2], "three", "four", 1); return join(l...) }, 4},
		{"white space added", func(l []string) string { l[2] = strings.Replace(l[2], ",", ", ", 1); return join(l...) }, 4},
		{"carriage return added", func(l []string) string { l[2] = strings.Replace(l[2], "\n", "\r\n", 1); return join(l...) }, 4},
		{"key repeated", func(l []string) string { l[2] = strings.Replace(l[2], "{", `{"x":1,`, 1); return join(l...) }, 4},
		{"line removed", func(l []string) string { return join(l[0], l[1], l[3], l[4]) }, 3},
		{"lines swapped", func(l []string) string { return join(l[0], l[2], l[1], l[3], l[4]) }, 2},
		{"line doubled", func(l []string) string { return join(l[0], l[1], l[1], l[2], l[3], l[4]) }, 3},
		{"last line doubled", func(l []string) string { return join(l[0], l[1], l[2], l[3], l[4], l[4]) }, 6},
		{"line of another log", func(l []string) string { return join(l[0], l[1], l[2], l[0], l[3], l[4]) }, 4},
		{"blank line put in", func(l []string) string { return join(l[0], "\n", l[1], l[2], l[3], l[4]) }, 3},
		{"text put in", func(l []string) string { return join(l[0], l[1], "hello\n", l[2], l[3], l[4]) }, 4},
		{"text put before", func(l []string) string { return join("hello\n", l[0], l[1], l[2], l[3], l[4]) }, 2},
		{"text added at the end", func(l []string) string { return join(l...) + "hello\n" }, 6},
		{"line made no record", func(l []string) string { l[2] = strings.Replace(l[2], "{", "", 1); return join(l...) }, 4},
		{"last line made no record", func(l []string) string { l[4] = strings.Replace(l[4], "{", "", 1); return join(l...) }, 5},
		{"newline removed", func(l []string) string { l[2] = strings.TrimSuffix(l[2], "\n"); return join(l...) }, 4},
		{"record without seq", func(l []string) string { l[4] = strings.Replace(l[4], `"seq"`, `"sex"`, 1); return join(l...) }, 5},
		{"number changed, digest mended", func(l []string) string {
			four := strings.Replace(l[3], `"seq":4`, `"seq":7`, 1)
			five := strings.Replace(l[4], auditDigest([]byte(strings.TrimSuffix(l[3], "\n"))), auditDigest([]byte(strings.TrimSuffix(four, "\n"))), 1)
			return join(l[0], l[1], l[2], four, five)
		}, 4},
		{"beginning forged", func(l []string) string { l[0] = strings.Replace(l[0], noPrev[:4], "1111", 1); return l[0] }, 1},
		{"longer than any record", func(l []string) string { return join(l[0], strings.Repeat("x", maxAuditRead), "\n", l[1]) }, 2},
		{"beginning cut off: as rotated", func(l []string) string { return join(l[2], l[3], l[4]) }, 0},
		{"torn at the end", func(l []string) string { return join(l...) + l[4][:20] }, 0},
		{"end cut off: only the head tells", func(l []string) string { return join(l[0], l[1]) }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, file := newTestAudit(t)
			appendAudit(t, l, "one", "two", "three", "four", "five")
			head := l.head()
			l.close()
			writeTestFile(t, file, c.change(strings.SplitAfter(readTestFile(t, file), "\n")))
			if line, why := auditBreak(t, file, ""); line != c.broken {
				t.Errorf("broken at line %d (%s), want %d", line, why, c.broken)
			}
			if rep, err := verifyAudit(file, head.String()); (err == nil) != (rep.Head == head && c.broken == 0) {
				t.Errorf("against the head: %+v, %v", rep, err)
			}
		})
	}
}

func TestAuditKnownHead(t *testing.T) {
	l, file := newTestAudit(t)
	appendAudit(t, l, "one", "two")
	two := l.head()
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	appendAudit(t, l, "three", "four")
	four := l.head()
	other := auditHead{4, two.Digest}
	for _, c := range []struct {
		name string
		file string
		head auditHead
		why  string // "<nil>": it is there
	}{
		{"last of the old", file + ".1", two, "<nil>"},
		{"the one just before the new", file, two, "<nil>"},
		{"last of the new", file, four, "<nil>"},
		{"later than the old", file + ".1", four, "holds records 1 to 2, and"},
		{"number with another digest", file, other, "holds records 3 to 4, and"},
		{"beyond the end", file, auditHead{9, four.Digest}, "holds records 3 to 4, and"},
	} {
		if _, err := verifyAudit(c.file, c.head.String()); !strings.Contains(fmt.Sprint(err), c.why) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	writeTestFile(t, file+".2", "")
	if _, err := verifyAudit(file+".2", two.String()); err == nil {
		t.Error("an empty file has every head")
	}
	for _, bad := range []string{"4", "4:", ":" + four.Digest, "4:" + four.Digest[1:], "4:" + strings.ToUpper(four.Digest), "4:" + four.Digest + "0"} {
		if _, err := verifyAudit(file, bad); err == nil || !strings.Contains(err.Error(), "is not among them") {
			t.Errorf("%q is taken for a head: %v", bad, err)
		}
	}
}

func TestAuditConcurrentWriters(t *testing.T) {
	l, file := newTestAudit(t)
	const writers, each = 8, 50
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if i == each/2 && w == 0 {
					if err := os.Rename(file, file+".1"); err != nil {
						t.Error(err)
					}
				}
				if err := l.append(auditRecord{Event: "exec_start", RequestID: fmt.Sprint(w, i), Argv: []string{strings.Repeat("x", 100*i)}}); err != nil {
					t.Error(err)
				}
				l.head()
			}
		})
	}
	wg.Wait()
	old, young := wantChain(t, file+".1"), wantChain(t, file)
	if old.Records+young.Records != writers*each || young.Begins != old.Head.Seq+1 || young.Head != l.head() {
		t.Errorf("old %+v\nnew %+v", old, young)
	}
	if _, err := verifyAudit(file, old.Head.String()); err != nil || strings.Contains(auditEvents(t, file), "audit_broken") {
		t.Errorf("the new file does not go on from the old: %v", err)
	}
}

// A crash tears the last record; the chain covers what is left of it.
func TestAuditTornTail(t *testing.T) {
	l, file := newTestAudit(t)
	appendAudit(t, l, "one", "two", "three")
	l.close()
	whole := readTestFile(t, file)
	start := strings.LastIndex(strings.TrimSuffix(whole, "\n"), "\n") + 1
	for cut := start + 1; cut < len(whole); cut++ {
		writeTestFile(t, file, whole[:cut])
		torn, records, events := 1, 3, "one two torn four"
		if cut == len(whole)-1 { // only the newline is missing
			torn, records, events = 0, 4, "one two three four"
		}
		if rep := wantChain(t, file); rep.Torn != torn || rep.Records != records-1 {
			t.Fatalf("cut at %d, before the restart: %+v", cut, rep)
		}
		again := openTestAudit(t, file)
		appendAudit(t, again, "four")
		again.close()
		if rep := wantChain(t, file); rep.Torn != torn || rep.Records != records || auditEvents(t, file) != events {
			t.Fatalf("cut at %d, after the restart: %+v, %s", cut, rep, auditEvents(t, file))
		}
		writeTestFile(t, file, strings.Replace(readTestFile(t, file), `{"seq":3`[:min(cut-start, 8)], "X", 1))
		if line, _ := auditBreak(t, file, ""); torn == 1 && line == 0 && cut > start+8 {
			t.Fatalf("cut at %d: a changed torn line is not noticed", cut)
		}
	}
}

func TestAuditTornAgainAndAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	writeTestFile(t, file, `{"seq":1,"ti`) // the very first record was torn
	for i := range 3 {
		l := openTestAudit(t, file)
		appendAudit(t, l, fmt.Sprint("run", i))
		l.close()
		writeTestFile(t, file, readTestFile(t, file)+"\n"+`{"seq":`) // a crash amid the newline and the next record
		l = openTestAudit(t, file)
		l.close()
	}
	if rep := wantChain(t, file); rep.Records != 3 || rep.Head.Seq != 3 {
		t.Errorf("%+v\n%s", rep, readTestFile(t, file))
	}
}

// Only the end of a file is read at start, however long its lines.
func TestAuditContinuesLongFile(t *testing.T) {
	l, file := newTestAudit(t)
	for _, size := range []int{10, 200 << 10, 10, 300 << 10} {
		appendAudit(t, l, strings.Repeat("\x01", size))
		head := l.head()
		l.close()
		l = openTestAudit(t, file)
		if l.head() != head {
			t.Fatalf("after %d bytes: head %v, want %v", size, l.head(), head)
		}
	}
	if rep := wantChain(t, file); rep.Records != 4 {
		t.Errorf("%+v", rep)
	}
}

// A file of several times what is read at once is verified to its end, and its last lines are found.
func TestAuditReadsInParts(t *testing.T) {
	l, file := newTestAudit(t)
	long := strings.Repeat("\x01", 200<<10)
	const n = 30
	for range n {
		appendAudit(t, l, long)
	}
	if size := readSize(file); size < 2*maxAuditRead {
		t.Fatalf("%d bytes only", size)
	}
	if rep := wantChain(t, file); rep.Records != n || rep.Head != l.head() {
		t.Errorf("%+v", rep)
	}
	if lines, err := tailAudit(file, 3); err != nil || len(lines) != 3 || lines[2].Head != l.head() {
		t.Errorf("%d lines, %v", len(lines), err)
	}
	l.close()
	text := strings.SplitAfter(readTestFile(t, file), "\n")
	if err := os.Truncate(file, readSize(file)-100); err != nil {
		t.Fatal(err)
	}
	if rep := wantChain(t, file); rep.Records != n-1 || rep.Torn != 1 {
		t.Errorf("torn: %+v", rep)
	}
	text[n-5] = strings.Replace(text[n-5], "u0001", "u0002", 1)
	writeTestFile(t, file, strings.Join(text, ""))
	if line, why := auditBreak(t, file, ""); line != n-3 {
		t.Errorf("broken at line %d: %s", line, why)
	}
}

// What happens to the file between two records, and what stands in the file afterwards.
func TestAuditFileChangedBeneath(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(file string) error
		events string
		intact bool
	}{
		{"nothing", func(string) error { return nil }, "one two three", true},
		{"renamed", func(f string) error { return os.Rename(f, f+".1") }, "three", true},
		{"renamed and created", func(f string) error { os.Rename(f, f+".1"); return os.WriteFile(f, nil, 0o600) }, "three", true},
		{"removed", os.Remove, "three", true},
		{"mode changed", func(f string) error { return os.Chmod(f, 0o640) }, "one two three", true},
		{"linked elsewhere", func(f string) error { return os.Link(f, f+".backup") }, "one two three", true},
		{"copied and truncated", func(f string) error { return os.Truncate(f, 0) }, "audit_broken three", true},
		{"cut within a line", func(f string) error { return os.Truncate(f, 150) }, "torn audit_broken three", false},
		{"last line cut off", func(f string) error { return cutLastLine(f) }, "one audit_broken three", false},
		{"added to", func(f string) error { return addToFile(f, "hello\n") }, "one two torn audit_broken three", false},
		{"added to without newline", func(f string) error { return addToFile(f, "hello") }, "one two torn audit_broken three", false},
		{"overwritten in place", func(f string) error { return overwrite(f, "ONE") }, "ONE two audit_broken three", false},
		{"replaced by a copy", func(f string) error { return replaceFile(f, func(s string) string { return s }) }, "one two audit_broken three", true},
		{"edited with sed -i", func(f string) error {
			return replaceFile(f, func(s string) string { return strings.Replace(s, "two", "TWO", 1) })
		}, "one TWO audit_broken three", false},
		{"replaced by another file", func(f string) error { return replaceFile(f, func(string) string { return "hello" }) }, "torn audit_broken three", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, file := newTestAudit(t)
			appendAudit(t, l, "one", "two")
			head := l.head()
			if err := c.change(file); err != nil {
				t.Fatal(err)
			}
			appendAudit(t, l, "three")
			if got := auditEvents(t, file); got != c.events {
				t.Errorf("the file holds %s, want %s", got, c.events)
			}
			if line, why := auditBreak(t, file, ""); (line == 0) != c.intact {
				t.Errorf("line %d: %s\n%s", line, why, readTestFile(t, file))
			}
			if line, why := auditBreak(t, file, head.String()); (line == 0) != c.intact {
				t.Errorf("the chain does not go on from the head: %d, %s", line, why)
			}
			appendAudit(t, l, "four") // one break is told once
			if got := auditEvents(t, file); got != c.events+" four" {
				t.Errorf("then the file holds %s", got)
			}
		})
	}
}

func cutLastLine(file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return os.Truncate(file, int64(bytes.LastIndexByte(data[:len(data)-1], '\n')+1))
}

func addToFile(file, text string) error {
	f, _, err := openAppend(file, os.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

// overwrite changes bytes without changing the size; the time is set, because two writes within one tick of the clock have one time.
func overwrite(file, text string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err = f.WriteAt([]byte(text), int64(bytes.Index(bytes.ToLower(data), []byte(strings.ToLower(text))))); err != nil {
		return err
	}
	return os.Chtimes(file, time.Time{}, time.Now().Add(time.Second))
}

func replaceFile(file string, edit func(string) string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", []byte(edit(string(data))), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func TestAuditSecondServerIsRefused(t *testing.T) {
	l, file := newTestAudit(t)
	refused := func(file string) {
		t.Helper()
		if second, err := openAudit(file, true, auditTestAPIKey); err == nil || !strings.Contains(err.Error(), "another server") {
			second.close()
			t.Errorf("a second server on the log: %v", err)
		}
	}
	refused(file)
	if err := os.Link(file, file+".same"); err != nil {
		t.Fatal(err)
	}
	refused(file + ".same")
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	appendAudit(t, l, "after the rotation")
	refused(file)
	openTestAudit(t, file+".1") // let go
	l.close()
	openTestAudit(t, file)
}

// If something else locks the new file after a rotation, nothing is written to it.
func TestAuditRotationIntoLockedFile(t *testing.T) {
	l, file := newTestAudit(t)
	appendAudit(t, l, "one")
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	other := openTestAudit(t, file)
	for range 2 {
		if err := l.append(auditRecord{Event: "exec_start"}); err == nil || !strings.Contains(err.Error(), "another server") {
			t.Errorf("written, or %v", err)
		}
	}
	other.close()
	appendAudit(t, l, "two")
	if got := auditEvents(t, file); got != "audit_broken two" {
		t.Errorf("the file holds %s", got)
	}
}

func TestAuditOnlyPlainFiles(t *testing.T) {
	dir := t.TempDir()
	link, fifo, file := filepath.Join(dir, "link"), filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	writeTestFile(t, file, "")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{link, fifo, dir, "/dev/null", filepath.Join(dir, "absent", "file")} {
		if f, _, err := openAppend(bad, os.O_WRONLY); err == nil && bad != "/dev/null" {
			f.Close()
			t.Errorf("%s was opened for append", bad)
		}
		if _, err := verifyAudit(bad, ""); err == nil {
			t.Errorf("%s was verified", bad)
		}
		if _, err := tailAudit(bad, 1); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
	for _, bad := range []string{link, dir, filepath.Join(dir, "absent", "file")} {
		if _, err := openAudit(bad, true, auditTestAPIKey); err == nil {
			t.Errorf("%s was opened as a log", bad)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	l := openTestAudit(t, file) // the path becomes a link while the server runs
	appendAudit(t, l, "one")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), file); err != nil {
		t.Fatal(err)
	}
	if err := l.append(auditRecord{Event: "exec_start"}); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("written through a link, or %v", err)
	}
}

// Other kinds of file are written, never read back, and never waited for.
func TestAuditFIFO(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	l := openTestAudit(t, fifo)
	long, n, err := strings.Repeat("x", 10_000), 0, error(nil)
	for ; err == nil; n++ { // until the pipe is full
		err = l.append(auditRecord{Event: "exec_start", Argv: []string{long}})
	}
	r, openErr := os.OpenFile(fifo, os.O_RDONLY, 0)
	if openErr != nil || n < 2 {
		t.Fatal(openErr, n)
	}
	defer r.Close()
	var got []auditLine
	var data []byte
	read := make(chan error)
	go func() {
		var err error
		data, err = io.ReadAll(r)
		for line := range bytes.Lines(data) {
			got = append(got, parseAuditLine(line))
		}
		read <- err
	}()
	for l.append(auditRecord{Event: "exec_end"}) != nil { // fails only until the reader has made room
	}
	head := l.head()
	l.close()
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	last := len(got) - 1
	if got[last].Record.Event != "exec_end" || got[last-1].Record.Event != "audit_broken" || got[last].Record.Seq != uint64(n+1) {
		t.Errorf("after %d records the reader got %.200s and %.200s", n, got[last-1].Raw, got[last].Raw)
	}
	writeTestFile(t, fifo+".copy", string(data))
	if rep := wantChain(t, fifo+".copy"); rep.Head != head { // what a full pipe tore is covered
		t.Errorf("%+v, head %v", rep, head)
	}
}

func TestAuditDiskFull(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip(err)
	}
	l := openTestAudit(t, "/dev/full")
	for range 3 {
		if err := l.append(auditRecord{Event: "exec_start"}); err == nil || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("append said %v", err)
		}
	}
	if l.head() != (auditHead{}) {
		t.Errorf("head %v of a log without a record", l.head())
	}
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := l.reconfigure(file, true); err != nil {
		t.Fatal(err)
	}
	appendAudit(t, l, "one")
	lines, err := tailAudit(file, 10)
	if err != nil || len(lines) != 2 || lines[0].Record.Event != "audit_broken" {
		t.Errorf("%+v, %v", lines, err)
	}
}

// The helper may write 2,000 bytes to a file: a record that does not fit is cut off again, and a later one that fits is preceded by the alarm.
func init() {
	helpers["audit-full"] = func() {
		l, err := openAudit(os.Args[1], true, auditTestAPIKey)
		if err == nil {
			err = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 2000, Max: 2000})
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		for i, size := range []int{500, 5000, 1600, 100} {
			before := readSize(os.Args[1])
			err := l.append(auditRecord{Event: "exec_start", Argv: []string{strings.Repeat("x", size)}})
			fmt.Printf("%d: written %t, size unchanged %t\n", i, err == nil, readSize(os.Args[1]) == before)
		}
	}
}

func readSize(file string) int64 {
	info, err := os.Stat(file)
	if err != nil {
		return -1
	}
	return info.Size()
}

func TestAuditShortWriteIsUndone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	out, err := helperCommand(t, "audit-full", file).CombinedOutput()
	// The third leaves its audit_broken, which fits, and not its record, which does not.
	want := "0: written true, size unchanged false\n1: written false, size unchanged true\n2: written false, size unchanged false\n3: written true, size unchanged false\n"
	if err != nil || string(out) != want {
		t.Fatalf("%v\n%s", err, out)
	}
	if rep := wantChain(t, file); rep.Records != 4 || strings.Count(auditEvents(t, file), "audit_broken") != 2 || rep.Torn != 0 {
		t.Errorf("%+v\n%s", rep, readTestFile(t, file))
	}
}

func TestAuditClockJumps(t *testing.T) {
	l, file := newTestAudit(t)
	for _, year := range []int{2026, 1970, 2999, 2025} {
		l.now = func() time.Time { return time.Date(year, 1, 2, 3, 4, 5, 6, time.UTC) }
		appendAudit(t, l, fmt.Sprint(year))
		if err := l.append(auditRecord{Event: "auth_failed"}); err != nil {
			t.Fatal(err)
		}
	}
	if rep := wantChain(t, file); rep.Records != 8 || strings.Contains(auditEvents(t, file), "audit_broken") {
		t.Errorf("%+v", rep)
	}
}

func TestAuditAuthFailuresAreFew(t *testing.T) {
	l, file := newTestAudit(t)
	clock := time.Unix(1_700_000_000, 0)
	l.now = func() time.Time { return clock }
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				if err := l.append(auditRecord{Event: "auth_failed", SourceIP: "192.0.2.1"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	clock = clock.Add(time.Second)
	for range 2 {
		if err := l.append(auditRecord{Event: "auth_failed"}); err != nil {
			t.Fatal(err)
		}
	}
	lines, err := tailAudit(file, 100)
	if err != nil || len(lines) != 12 {
		t.Fatalf("%d records, %v", len(lines), err)
	}
	for i, want := range []int{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 790, 0} {
		if r := lines[i].Record; r.Event != "auth_failed" || r.Suppressed != want {
			t.Errorf("record %d: %s", i, lines[i].Raw)
		}
	}
}

func TestAuditReconfigure(t *testing.T) {
	l, a := newTestAudit(t)
	b := filepath.Join(filepath.Dir(a), "b.jsonl")
	to := func(file string, enabled bool) {
		t.Helper()
		if err := l.reconfigure(file, enabled); err != nil {
			t.Fatal(err)
		}
	}
	appendAudit(t, l, "one")
	to(a, true)
	appendAudit(t, l, "two")
	to(b, true)
	appendAudit(t, l, "three")
	to(b, false)
	appendAudit(t, l, "dropped")
	if err := addToFile(b, ""); err != nil {
		t.Fatal(err)
	}
	to(a, true)
	appendAudit(t, l, "four")
	if x, y := auditEvents(t, a), auditEvents(t, b); x != "one two four" || y != "three" {
		t.Errorf("%s; %s", x, y)
	}
	if x, y := wantChain(t, a), wantChain(t, b); x.Head.Seq != 3 || y.Head.Seq != 1 {
		t.Errorf("%+v; %+v", x, y)
	}
	absent := filepath.Join(filepath.Dir(a), "absent")
	if err := l.reconfigure(filepath.Join(absent, "c.jsonl"), true); err == nil {
		t.Error("a log in an absent directory was opened")
	}
	for range 2 {
		if err := l.append(auditRecord{Event: "exec_start"}); err == nil {
			t.Error("a record was written nowhere")
		}
	}
	if err := os.Mkdir(absent, 0o700); err != nil {
		t.Fatal(err)
	}
	appendAudit(t, l, "five")
	if got := auditEvents(t, filepath.Join(absent, "c.jsonl")); got != "audit_broken five" {
		t.Errorf("the file holds %s", got)
	}
	l.close()
	if err := l.append(auditRecord{Event: "exec_start"}); err == nil {
		t.Error("a record was written to a closed log")
	}
}

func TestAuditDisabled(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := openAudit(file, false, auditTestAPIKey)
	if err != nil {
		t.Fatal(err)
	}
	appendAudit(t, l, "one")
	if err := l.append(auditRecord{Event: "auth_failed"}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err == nil || l.head() != (auditHead{}) {
		t.Error("a disabled log made a file")
	}
}

// The key goes from every text, before any cut; the digest in apiKeyId stays.
func TestAuditRedaction(t *testing.T) {
	l, file := newTestAudit(t)
	k := auditTestKey
	at := func(n int) string { return strings.Repeat("x", n-5) + k + "tail" }
	r := auditRecord{Event: "exec_denied", APIKeyID: "sha256:0123456789ab", Endpoint: at(maxAuditEndpoint), Argv: []string{k, "a" + k + "b" + k, at(maxAuditText)},
		OriginalArgv: []string{at(maxAuditText)}, Cwd: k, Rule: at(maxAuditText), Reason: at(maxAuditText)}
	argv := append([]string(nil), r.Argv...)
	if err := l.append(r); err != nil {
		t.Fatal(err)
	}
	text := readTestFile(t, file)
	for n := 6; n <= len(k); n++ { // not even the beginning of a key
		if escaped, _ := json.Marshal(k[:n]); strings.Contains(text, k[:n]) || strings.Contains(text, strings.Trim(string(escaped), `"`)) {
			t.Fatalf("%d characters of the key stand in %s", n, text)
		}
	}
	got := parseAuditLine([]byte(text)).Record
	if got.Argv[0] != "[API_KEY]" || got.Argv[1] != "a[API_KEY]b[API_KEY]" || got.Cwd != "[API_KEY]" || got.APIKeyID != r.APIKeyID {
		t.Errorf("%+v", got)
	}
	for i := range argv {
		if argv[i] != r.Argv[i] {
			t.Error("the caller's argv was changed")
		}
	}
}

func TestAuditCuts(t *testing.T) {
	l, file := newTestAudit(t)
	for _, s := range []string{strings.Repeat("é", 3000), strings.Repeat("x", 5000), strings.Repeat("𝄞", 2000), "x" + strings.Repeat("界", 2000)} {
		for limit := maxAuditEndpoint - 5; limit <= maxAuditEndpoint; limit++ {
			got := l.text(s, limit)
			if len(got) > limit || len(got) < limit-6 || !utf8.ValidString(got) || !strings.HasPrefix(s, strings.TrimSuffix(got, "…")) {
				t.Errorf("%d: %q", limit, got)
			}
		}
	}
	if s := strings.Repeat("x", maxAuditEndpoint); l.text(s, maxAuditEndpoint) != s {
		t.Error("cut though it fits")
	}
	for _, argv := range [][]string{
		{"a", "b", strings.Repeat("é", 4000), "never"},
		make([]string, 100_000),
		strings.Split(strings.Repeat("xxxxxxx ", 2000), " "),
	} {
		for _, event := range []string{"exec_denied", "exec_start"} {
			if err := l.append(auditRecord{Event: event, Argv: argv, OriginalArgv: argv, Endpoint: strings.Repeat("/é", 200)}); err != nil {
				t.Fatal(err)
			}
			lines, err := tailAudit(file, 1)
			if err != nil {
				t.Fatal(err)
			}
			got := lines[0].Record
			size := len(strings.Join(got.Argv, ""))
			if event == "exec_start" {
				if len(got.Argv) != len(argv) || len(got.OriginalArgv) != len(argv) {
					t.Errorf("%s: %d of %d arguments", event, len(got.Argv), len(argv))
				}
			} else if size > maxAuditText+3 || len(got.Argv) > maxAuditText+1 {
				t.Errorf("%s: %d arguments of %d bytes, not cut", event, len(got.Argv), size)
			}
			if len(got.Endpoint) > maxAuditEndpoint {
				t.Errorf("endpoint of %d bytes", len(got.Endpoint))
			}
		}
	}
	wantChain(t, file)
}

// What is read back is safe to print even if another hand wrote it.
func TestAuditRawIsPrintable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	writeTestFile(t, file, "\x1b]0;title\x07 \x9b31m \u202e \r\n{\"seq\":1,\"event\":\"\u202e\u009b\",\"prev\":\""+noPrev+"\"}\n")
	lines, err := tailAudit(file, 5)
	if err != nil || len(lines) != 2 || !lines[0].Torn || lines[1].Torn || lines[1].Record.Event != "\u202e\u009b" {
		t.Fatalf("%+v, %v", lines, err)
	}
}

func checkPrintable(t *testing.T, s string) {
	t.Helper()
	for _, r := range s {
		if unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp) || !utf8.ValidString(s) {
			t.Fatalf("%U stands raw in %q", r, s)
		}
	}
}

func TestAuditTail(t *testing.T) {
	l, file := newTestAudit(t)
	for i := range 500 {
		appendAudit(t, l, fmt.Sprint(i)+strings.Repeat("y", i*3))
	}
	for _, n := range []int{0, 1, 10, 499, 500, 501, 1 << 40} {
		lines, err := tailAudit(file, n)
		if want := min(n, 500); err != nil || len(lines) != want || want > 0 && lines[0].Record.Seq != uint64(501-want) {
			t.Errorf("%d: %d lines, %v", n, len(lines), err)
		}
	}
}

// followTest collects what a follower emits, and waits for it line by line.
type followTest struct {
	t     *testing.T
	lines chan auditLine
	stop  func(last func()) error // ends at the record that last writes
}

func newFollowTest(t *testing.T, file string, n int) *followTest {
	f := &followTest{t: t, lines: make(chan auditLine, 100)}
	enough, done := make(chan bool), make(chan error, 1)
	go func() {
		done <- readAudit(file, n, true, func(a auditLine) error {
			select {
			case <-enough:
				return io.EOF
			default:
				f.lines <- a
				return nil
			}
		})
	}()
	f.stop = func(last func()) error { close(enough); last(); return <-done }
	return f
}

func (f *followTest) want(names ...string) {
	f.t.Helper()
	for _, name := range names {
		select {
		case a := <-f.lines:
			if got := strings.Join(a.Record.Argv, ","); got != name && a.Record.Event != name {
				f.t.Fatalf("followed to %s, want %s", a.Raw, name)
			}
		case <-time.After(20 * time.Second):
			f.t.Fatalf("%s was not followed", name)
		}
	}
}

func TestAuditFollow(t *testing.T) {
	l, file := newTestAudit(t)
	appendAudit(t, l, "one", "two", "three")
	f := newFollowTest(t, file, 2)
	f.want("two", "three")
	appendAudit(t, l, "four")
	f.want("four")
	appendAudit(t, l, "five")
	if err := os.Rename(file, file+".1"); err != nil { // five may be unread in the file that is renamed
		t.Fatal(err)
	}
	long := strings.Repeat("x", 10_000) // a file that is truncated is noticed while it is shorter than what was read
	appendAudit(t, l, "six", long)
	f.want("five", "six", long)
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	appendAudit(t, l, "8")
	f.want("audit_broken")
	f.want("8")
	if err := addToFile(file, `{"seq":99,"event":"ha`); err != nil {
		t.Fatal(err)
	}
	if err := addToFile(file, `lves","prev":"`+noPrev+"\"}\n"); err != nil {
		t.Fatal(err)
	}
	f.want("halves")
	if err := f.stop(func() { appendAudit(t, l, "last") }); err != io.EOF {
		t.Error(err)
	}
	if err := readAudit(file+".absent", 1, true, nil); err == nil {
		t.Error("an absent file was followed")
	}
}

// FuzzAuditRecord: whatever the texts, a record is one printable line of JSON without the key, and the chain goes on.
func FuzzAuditRecord(f *testing.F) {
	f.Add("plain", "argument", "0123456789abcdef")
	f.Add("a"+auditTestKey+"b", auditTestKey[:10], auditTestKey)
	f.Add("\x1b[0m\u009b\u202e\U000e0001\x7f\u2028", "\xff\xfe\x00\n\r", `\"<&>\"<&>\"<&>\`)
	f.Add(strings.Repeat("x", 4090)+"secretsecretsecret", "\"}\n{", "secretsecretsecret")
	file := filepath.Join(f.TempDir(), "audit.jsonl")
	f.Fuzz(func(t *testing.T, a, b, secret string) {
		key, err := newAPIKey(secret)
		if err != nil || len(secret) < 16 || !utf8.ValidString(secret) || strings.ContainsAny(secret, "[]…\uFFFD") || strings.Contains(noPrev, secret) {
			t.Skip() // a key made of the marks themselves could be put together by them
		}
		os.Remove(file)
		l, err := openAudit(file, true, key)
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		for _, r := range []auditRecord{
			{Event: "exec_start", Argv: []string{a, b, a + secret + b}, OriginalArgv: []string{b}, Endpoint: a, Rule: b, Cwd: a},
			{Event: "exec_denied", Argv: []string{a, b + secret, a}, Rule: a + secret, Endpoint: secret + a},
			{Event: "exec_end", Reason: b + secret, Cwd: secret},
		} {
			if err := l.append(r); err != nil {
				t.Fatal(err)
			}
		}
		text := readTestFile(t, file)
		if strings.Count(text, "\n") != 3 || !strings.HasSuffix(text, "\n") {
			t.Fatalf("not three lines: %q", text)
		}
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			checkPrintable(t, line)
			var values map[string]any
			if err := json.Unmarshal([]byte(line), &values); err != nil {
				t.Fatalf("%v: %q", err, line)
			}
			delete(values, "prev")
			delete(values, "event")
			delete(values, "timestamp")
			checkNoKey(t, values, secret)
		}
		if rep := wantChain(t, file); rep.Records != 3 || rep.Torn != 0 || rep.Head != l.head() {
			t.Fatalf("%+v", rep)
		}
	})
}

func checkNoKey(t *testing.T, value any, secret string) {
	t.Helper()
	switch v := value.(type) {
	case string:
		if strings.Contains(v, secret) {
			t.Fatalf("the key %q stands in %q", secret, v)
		}
	case []any:
		for _, x := range v {
			checkNoKey(t, x, secret)
		}
	case map[string]any:
		for _, x := range v {
			checkNoKey(t, x, secret)
		}
	}
}

// BenchmarkAuditRecord stands beside its floor: the same bytes, appended and nothing else.
func BenchmarkAuditRecord(b *testing.B) {
	code, ms := 0, int64(12)
	r := auditRecord{Event: "exec_end", RequestID: "0123456789abcdef", SourceIP: "127.0.0.1", APIKeyID: "sha256:0123456789ab", AuthSource: "header",
		Endpoint: "/api/exec", Mode: "buffered", Argv: []string{"git", "log", "-n", "10"}, Cwd: "/home/agent", ACLDecision: "allow", Rule: "git log *",
		ExitCode: &code, DurationMs: &ms, StdoutBytes: &ms, StderrBytes: &ms}
	b.Run("record", func(b *testing.B) {
		l, _ := newTestAudit(b)
		b.ReportAllocs()
		for b.Loop() {
			if err := l.append(r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("floor", func(b *testing.B) {
		l, file := newTestAudit(b)
		if err := l.append(r); err != nil {
			b.Fatal(err)
		}
		line := []byte(readTestFile(b, file))
		f, _, err := openAppend(filepath.Join(b.TempDir(), "floor"), os.O_WRONLY)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		for b.Loop() {
			if _, err := f.Write(line); err != nil {
				b.Fatal(err)
			}
		}
	})
}
