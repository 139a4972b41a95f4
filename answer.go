// This file is what a client is told: errors, facts, documents, the outcome of a command, streams; it is apart from server.go, as who may do what is judged there, and how it is said here.
// It may write answers, through the call that it is given.
// It must not decide, run or record anything, or touch the connection.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	encodeBytes       = 64 << 10 // bytes of an answer that are encoded at a time
	defaultRetryAfter = time.Second
)

// errorTexts is every error of ours: status, whether the same request may work later, what happened, what to do next.
var errorTexts = func() map[string]errorText {
	texts := map[string]errorText{}
	file, _ := skillFiles.ReadFile("skills/_errors.txt") // embedded, so there is no error
	for entry := range strings.SplitSeq(string(file), "\n\n") {
		lines := strings.Split(entry, "\n")
		head := strings.Fields(lines[0])
		status, _ := strconv.Atoi(head[1])
		texts[head[0]] = errorText{status, len(head) > 2, lines[1], lines[2]}
	}
	return texts
}()

type errorText struct {
	status        int
	retryable     bool
	message, hint string
}

// apiError is the one shape of every error.
type apiError struct {
	status    int
	outcome   *outcome // what was captured before the end
	Code      string   `json:"error"`
	Message   string   `json:"message"`
	Hint      string   `json:"hint"`
	Retryable bool     `json:"retryable"`
	Rule      string   `json:"rule,omitempty"`
	Fields    []string `json:"fields,omitempty"`
	MaxOutput int64    `json:"maxOutputBytes,omitempty"`
}

func newError(code string) *apiError {
	t := errorTexts[code]
	return &apiError{status: t.status, Code: code, Message: t.message, Hint: t.hint, Retryable: t.retryable}
}

// because replaces the message where there is more to say.
func (e *apiError) because(format string, args ...any) *apiError {
	e.Message = fmt.Sprintf(format, args...)
	return e
}

// fail answers with an error, and with what a command printed before it.
func (c *call) fail(e *apiError) {
	h := c.Header()
	h.Set("Cache-Control", "no-store")
	if e.Retryable && h.Get("Retry-After") == "" {
		c.retryAfter(defaultRetryAfter)
	}
	if e.outcome == nil {
		c.json(e.status, e)
		return
	}
	h.Set("Content-Type", "application/json")
	c.WriteHeader(e.status)
	head := marshal(e)
	head[len(head)-1] = ','
	writeOutcome(c, head, e.outcome, endingOf(e.outcome, nil))
}

func (c *call) retryAfter(wait time.Duration) {
	c.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
}

// json answers with one JSON value, in which no text from outside, and no rule, takes the key along.
func (c *call) json(status int, v any) *apiError {
	c.Header().Set("Content-Type", "application/json")
	c.WriteHeader(status)
	c.Write([]byte(c.s.redact(string(marshal(v))) + "\n"))
	return nil
}

// marshal leaves <, > and & as they are: agents read the text, browsers are told not to.
func marshal(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(err) // fail safe: our own types encode
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

func (c *call) ping() *apiError {
	return c.json(200, map[string]string{"status": "ok", "version": version})
}

func (c *call) acl() *apiError {
	lists := map[string][]ruleSpec{"allow": {}, "deny": {}}
	for _, rule := range c.snap.policy.rules() {
		lists[rule.List] = append(lists[rule.List], rule.Rule)
	}
	machine := map[string]string{"os": runtime.GOOS, "arch": runtime.GOARCH, "cwd": c.snap.cwd, "user": ""}
	machine["hostname"], _ = os.Hostname()
	if u, err := user.Current(); err == nil {
		machine["user"] = u.Username
	}
	if c.snap.cred != nil {
		machine["user"] = c.snap.cred.Name
	}
	limits := map[string]int64{"timeoutMs": c.snap.Timeout.Milliseconds(), "maxOutputBytes": c.snap.MaxOutputBytes, "maxStreamBytes": c.snap.MaxStreamBytes,
		"maxConcurrentExec": int64(c.snap.MaxConcurrentExec), "maxRequestBodyBytes": c.s.maxBody}
	return c.json(200, map[string]any{"allow": lists["allow"], "deny": lists["deny"], "limits": limits, "machine": machine})
}

func (c *call) pluginList() *apiError {
	list := []map[string]string{}
	for _, p := range c.s.plugins {
		if !c.snap.disabled(p.Name) {
			list = append(list, map[string]string{"name": p.Name, "description": p.Description, "command": p.Command, "skill": "/private/skills/" + p.Name + "/SKILL.md"})
		}
	}
	return c.json(200, map[string]any{"plugins": list})
}

// ending is what every answer of a command says after its output.
type ending struct {
	ExitCode *int   `json:"exitCode"`
	Signal   string `json:"signal,omitempty"`
	Status   string `json:"status"`
	Error    string `json:"error,omitempty"`
	Message  string `json:"message,omitempty"`
	Duration int64  `json:"duration"`
	Length   *int64 `json:"length,omitempty"`
}

// endingOf describes the end of a run, in the words of e if that is not said before.
func endingOf(out *outcome, e *apiError) ending {
	last := ending{Status: "error", Duration: out.duration.Milliseconds(), Length: &out.stdoutBytes}
	if out.exited && (out.end == endExit || out.end == endStart) {
		last.ExitCode = &out.exitCode
	}
	if out.end == endExit {
		last.Signal = out.signal
	}
	if out.end == endExit && out.exited && out.exitCode == 0 {
		last.Status = "done"
	}
	if e != nil {
		last.Error, last.Message = e.Code, e.Message
	}
	return last
}

// endError is the error of an end other than exit. Most ends are called what their error is.
func (c *call) endError(j *job) *apiError {
	code := string(j.out.end)
	switch {
	case j.out.end == endExit:
		return nil
	case j.out.end == endStart:
		code = map[int]string{126: "command_not_executable", 127: "command_not_found"}[j.out.exitCode]
		return newError(code).because("%s", c.s.redact(fmt.Sprint(j.out.err)))
	case j.out.end == endOutput && j.sink != nil:
		code = "max_stream_output_exceeded"
	case j.out.end == endOutput:
		code = "max_output_exceeded"
	}
	e := newError(code)
	if e.outcome = &j.out; j.out.end == endOutput {
		e.MaxOutput = c.snap.MaxOutputBytes
	}
	return e
}

// answer tells how a command ended: with its output, or after it if that was streamed.
func (c *call) answer(j *job) *apiError {
	out, e, h := &j.out, c.endError(j), c.Header()
	asShell := out.end == endExit || out.end == endStart // a shell would have given it an exit code
	if j.sink == nil && !asShell {
		return e
	}
	if j.text && asShell {
		code := out.exitCode
		if out.signalNumber > 0 {
			code = 128 + out.signalNumber
		}
		h.Set("X-Exit-Code", strconv.Itoa(code))
	}
	switch {
	case j.sink != nil && j.text:
		if e != nil {
			h.Set("X-Exec-Error", e.Code)
		}
		c.extend() // for the trailers
	case j.sink != nil:
		j.sink.finish(endingOf(out, e))
	case j.text:
		h.Set("Content-Type", "text/plain; charset=utf-8")
		pieces := out.stdout
		if text, ok := j.result["output"].(string); ok {
			pieces = chunks{[]byte(text)}
		} else if e != nil {
			pieces = chunks{[]byte(e.Message + "\n")}
		} else if out.stdoutBytes == 0 {
			pieces = out.stderr
		}
		for _, piece := range pieces {
			c.Write(piece)
		}
	case j.result != nil:
		return c.json(200, j.result)
	default:
		h.Set("Content-Type", "application/json")
		writeOutcome(c, []byte("{"), out, endingOf(out, e))
	}
	return nil
}

// writeOutcome encodes captured output piece by piece, so that a large one is never held twice. head is an open object.
func writeOutcome(w io.Writer, head []byte, out *outcome, last ending) {
	buf := append(head, `"output":"`...)
	text := func(pieces chunks) {
		var t jsonText
		for _, piece := range pieces {
			if buf = t.append(buf, piece, false); len(buf) >= encodeBytes {
				w.Write(buf)
				buf = buf[:0]
			}
		}
		buf = append(t.append(buf, nil, true), `",`...)
	}
	if text(out.stdout); out.stderrBytes > 0 {
		buf = append(buf, `"stderr":"`...)
		text(out.stderr)
	}
	buf = append(buf, marshal(last)[1:]...)
	w.Write(append(buf, '\n'))
}

// jsonText writes bytes that come in pieces as the inside of one JSON string. Bytes that are no UTF-8 become U+FFFD;
// a character that a piece cuts waits for the next.
type jsonText struct{ cut []byte }

// append appends src escaped; last: nothing comes that could complete a character.
func (t *jsonText) append(dst, src []byte, last bool) []byte {
	if len(t.cut) > 0 {
		src = append(t.cut, src...)
	}
	t.cut = nil
	for n := 1; !last && n < utf8.UTFMax && n <= len(src); n++ {
		if tail := src[len(src)-n:]; utf8.RuneStart(tail[0]) {
			if !utf8.FullRune(tail) {
				src, t.cut = src[:len(src)-n], slices.Clone(tail)
			}
			break
		}
	}
	if !utf8.Valid(src) {
		src = []byte(string([]rune(string(src)))) // each bad byte is one U+FFFD
	}
	for {
		n := 0
		for n < len(src) && plainJSON[src[n]] {
			n++
		}
		if dst = append(dst, src[:n]...); n == len(src) {
			return dst
		}
		switch b := src[n]; b {
		case '"', '\\':
			dst = append(dst, '\\', b)
		case '\n':
			dst = append(dst, `\n`...)
		default:
			dst = append(dst, '\\', 'u', '0', '0', '0'+b>>4, "0123456789abcdef"[b&15])
		}
		src = src[n+1:]
	}
}

// plainJSON are the bytes that a JSON string holds as they are.
var plainJSON = func() (plain [256]bool) {
	for b := range plain {
		plain[b] = b >= ' ' && b != '"' && b != '\\'
	}
	return plain
}()

// streamSink writes output as it comes: as NDJSON lines, or raw.
type streamSink struct {
	c     *call
	text  bool
	parts [2]jsonText
	buf   []byte
}

// begin sends the headers, so that the client knows that the command runs.
func (k *streamSink) begin() {
	h := k.c.Header()
	h.Set("Content-Type", "application/x-ndjson")
	if k.text {
		h.Set("Content-Type", "text/plain; charset=utf-8")
		h.Set("Trailer", "X-Exit-Code, X-Exec-Error")
	}
	k.c.wrote = true
	k.c.extend()
	k.c.control.Flush()
}

func (k *streamSink) output(stream int, p []byte, idle bool) error {
	if !k.text {
		p = k.line(stream, p, false)
	}
	if _, err := k.c.Write(p); err != nil || !idle {
		return err
	}
	return k.c.control.Flush()
}

// line is one NDJSON line, or nothing while a character is cut; last: a cut one will not be completed.
func (k *streamSink) line(stream int, p []byte, last bool) []byte {
	part, head, tail := &k.parts[stream-1], `{"output":"`, `","length":%d,"status":"running"}`+"\n"
	if stream == 2 {
		head, tail = `{"output":null,"stderr":"`, `","status":"running"}`+"\n"
	}
	length := len(part.cut) + len(p)
	k.buf = part.append(append(k.buf[:0], head...), p, last)
	if length -= len(part.cut); length == 0 {
		return nil
	}
	if stream == 2 {
		return append(k.buf, tail...)
	}
	return fmt.Appendf(k.buf, tail, length)
}

// finish writes the one last line.
func (k *streamSink) finish(last ending) {
	k.c.Write(k.line(1, nil, true))
	k.c.Write(k.line(2, nil, true))
	last.Length = nil
	k.c.Write(append(append([]byte(`{"output":null,`), marshal(last)[1:]...), '\n'))
}
