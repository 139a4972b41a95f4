// This file is one command's way: what was asked for, the decision, its slot, the hooks around it, its two records, its answer.
// It may ask acl.go, audit.go, plugin.go and exec.go, in that order; who may ask for a command is settled in server.go.
// It must not approve or start anything, or touch the network but through its call.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// parseExecBody reads {"args":[…]} and nothing else.
func parseExecBody(data []byte) (args []string, e *apiError) {
	body, err := parseStrict(data)
	switch {
	case err != nil:
		return nil, newError("invalid_json").because("The body is not valid JSON, at line:column %v.", err)
	case body.kind != '{':
		return nil, newError("invalid_json")
	}
	unexpected := newError("unexpected_field")
	for i, key := range body.keys {
		if key.str == "args" {
			args = body.items[i].texts()
		} else {
			unexpected.Fields = append(unexpected.Fields, key.str)
		}
	}
	switch err := checkArgv(args); {
	case unexpected.Fields != nil:
		return nil, unexpected
	case args == nil:
		return nil, newError("invalid_args")
	case err != nil:
		return nil, newError("invalid_args").because("args cannot be run: %v.", err)
	}
	return args, nil
}

func (c *call) aclCheck() *apiError {
	args, e := c.readArgs()
	if e != nil {
		return e
	}
	_, d := c.snap.policy.decide(args)
	return c.json(200, d)
}

// job is one command that was decided, on its way through its slot; a hook is one, too.
type job struct {
	*call
	args, sent   []string // what will run, and what the request asked for
	what         approved
	decided      decision
	plugin       *plugin // whose hooks stand around it; nameless: none
	stream, text bool    // mode, format
	out          outcome
	parts        [2]jsonText // of a stream: standard output, standard error
	buf          []byte
}

func (c *call) exec() (e *apiError) {
	j := &job{call: c, plugin: &plugin{}, stream: c.query.Get("mode") == "stream", text: c.query.Get("format") == "text"}
	if j.stream && j.text && !c.r.ProtoAtLeast(1, 1) {
		return newError("http_version_not_supported")
	}
	if j.args, e = c.readArgs(); e != nil {
		return e
	}
	for _, p := range c.s.plugins {
		if p.before+p.after != "" && p.sees(j.args) && !c.snap.disabled(p.Name) {
			j.plugin = p
		}
	}
	if j.stream && j.plugin.Name != "" {
		return newError("stream_plugin_command_not_supported")
	}
	j.what, j.decided = c.snap.policy.decide(j.args)
	return j.run()
}

// pluginRoute runs what a plugin's own route leads to.
func (c *call) pluginRoute(p *plugin, template []string) *apiError {
	if c.snap.disabled(p.Name) {
		return newError("not_found")
	}
	if c.r.ContentLength != 0 {
		return newError("unexpected_field").because("This route takes no body.")
	}
	argv, err := routeArgv(template, c.r.PathValue)
	if err != nil {
		return newError("invalid_args").because("The path cannot be made a command: %v.", err)
	}
	j := &job{call: c, args: argv, plugin: p}
	j.what, j.decided = p.approve(c.snap.policy, argv)
	return j.run()
}

// run takes a slot for the command, and in it runs the plugin's before hook, a second decision on what that made of it, the
// command, and the after hook. It answers when the slot is free again.
func (j *job) run() *apiError {
	if j.sent = j.args; !j.decided.Allowed {
		return j.denied()
	}
	release, ok := j.s.runner.acquire(j.snap.MaxConcurrentExec)
	switch {
	case !ok && j.s.runner.shuttingDown():
		return newError("shutting_down")
	case !ok:
		return newError("too_many_concurrent_exec")
	}
	defer release()
	j.conn.SetReadDeadline(time.Time{}) // the request is whole; from here a read only watches for a disconnect
	j.conn.busy.Store(true)
	defer j.conn.busy.Store(false)
	changed, e := j.hook("before", j.plugin.before)
	if e != nil {
		return e
	}
	if changed.Args != nil {
		j.args = changed.Args
		if j.what, j.decided = j.plugin.approve(j.snap.policy, j.args); !j.decided.Allowed {
			return j.denied()
		}
	}
	if e := j.audited(nil); e != nil {
		return e
	}
	if changed, e = j.hook("after", j.plugin.after); e != nil {
		return e
	}
	release()
	return j.answer(changed.Result)
}

// hook runs one hook of the job's plugin, if it has that, in the job's slot. What it is told is free of the key. What did not
// run to its end has no after.
func (j *job) hook(which, file string) (hookOutput, *apiError) {
	if file == "" || which == "after" && j.out.end != endExit {
		return hookOutput{}, nil
	}
	headers := maps.Clone(j.r.Header)
	for _, name := range []string{"Authorization", "Proxy-Authorization", "Cookie", "X-Api-Key"} {
		if headers[name] != nil {
			headers[name] = []string{redactedKey}
		}
	}
	in := map[string]any{"args": j.args, "originalArgs": j.sent,
		"request": map[string]any{"method": j.r.Method, "path": j.r.URL.Path, "query": j.query, "ip": j.peer.String(), "headers": headers}}
	if which == "after" {
		var result bytes.Buffer
		last, _ := j.ending()
		j.writeOutcome(&result, last)
		in["result"] = json.RawMessage(result.Bytes())
	}
	for field, value := range in {
		in[field] = json.RawMessage(j.s.redact(string(marshal(value))))
	}
	var unrecorded *apiError
	answer, err := j.plugin.runHook(which, in, func(what approved, stdin []byte) outcome {
		h := &job{call: j.call, args: what.argv, sent: what.argv, what: what, plugin: j.plugin}
		unrecorded = h.audited(stdin)
		return h.out
	})
	switch {
	case unrecorded != nil:
		return answer, unrecorded
	case err != nil && j.s.runner.shuttingDown():
		return answer, newError("shutting_down")
	case err != nil:
		j.s.log.Printf("request %s: the %s hook of plugin %q failed: %q", j.id, which, j.plugin.Name, j.s.redact(err.Error()))
		return answer, newError("plugin_" + which + "_error")
	case answer.Error != nil:
		e, hint := answer.Error, "The plugin "+j.plugin.Name+" answered so; read its document."
		return answer, &apiError{status: e.Status, Code: e.Code, Message: e.Message, Hint: hint}
	}
	return answer, nil
}

// audited runs the job between its two records; if the first cannot be written, nothing runs. stdin is what a hook is told;
// nil: no hook.
func (j *job) audited(stdin []byte) *apiError {
	s := j.snap
	cmd := command{what: j.what, env: s.env, cwd: s.cwd, pathDirs: s.pathDirs, cred: s.cred, limits: s.rlimits,
		noNewPrivs: s.NoNewPrivileges, timeout: s.Timeout, killGrace: s.KillGrace, maxBytes: s.MaxOutputBytes, stdin: stdin}
	if stdin != nil {
		cmd.cred, cmd.env, cmd.cwd = nil, s.hookEnv, j.plugin.dir // a hook runs as the server's user, in nobody else's world
	}
	rec := j.record("exec_start")
	rec.Cwd = cmd.cwd
	if j.s.note(rec) != nil {
		return newError("audit_unavailable")
	}
	if j.stream {
		cmd.sink, cmd.maxBytes = j, s.MaxStreamBytes
		j.begin()
	}
	j.out = j.s.runner.run(j.r.Context(), cmd)
	out, ms := &j.out, j.out.duration.Milliseconds()
	rec.Event, rec.Reason, rec.Signal, rec.DurationMs = "exec_end", string(out.end), out.signal, &ms
	rec.StdoutBytes, rec.StderrBytes = &out.stdoutBytes, &out.stderrBytes
	if out.exited {
		rec.ExitCode = &out.exitCode
	}
	if out.end == endInternal {
		j.s.log.Printf("request %s: the command could not be run: %q", j.id, j.s.redact(fmt.Sprint(out.err)))
	}
	j.s.note(rec)
	return nil
}

// record begins a record of this request.
func (c *call) record(event string) auditRecord {
	r := auditRecord{Event: event, RequestID: c.id, SourceIP: c.peer.String(), AuthSource: c.source, Endpoint: c.r.URL.Path}
	if c.keyed {
		r.APIKeyID = c.s.start.key.id()
	}
	return r
}

// record begins a record of this request and its command.
func (j *job) record(event string) auditRecord {
	r := j.call.record(event)
	r.Mode, r.Argv, r.Cwd, r.Plugin = cmp.Or(j.query.Get("mode"), "buffered"), j.args, j.snap.cwd, j.plugin.Name
	r.ACLDecision, r.Rule = "allow", j.decided.Rule
	if !slices.Equal(j.args, j.sent) {
		r.OriginalArgv = j.sent
	}
	return r
}

func (j *job) denied() *apiError {
	e := newError("command_not_allowed")
	if j.decided.List == "deny" {
		e = newError("command_denied")
		e.Rule = j.decided.Rule
	}
	r := j.record("exec_denied")
	r.ACLDecision, r.DenialReason = "deny", e.Code
	j.s.note(r)
	return e
}

// ending is what every answer of a command says after its output.
type ending struct {
	ExitCode  *int   `json:"exitCode"`
	Signal    string `json:"signal,omitempty"`
	Status    string `json:"status"`
	*apiError        // nil: it ended by itself
	Duration  int64  `json:"duration"`
	Length    *int64 `json:"length,omitempty"`
}

// ending says how the command ended, and the status of a buffered answer. Most ends are called what their error is.
func (j *job) ending() (last ending, status int) {
	out := &j.out
	last = ending{Status: "error", Duration: out.duration.Milliseconds(), Length: &out.stdoutBytes}
	if out.exited && (out.end == endExit || out.end == endStart) {
		last.ExitCode = &out.exitCode
	}
	switch out.end {
	case endExit:
		if last.Signal = out.signal; out.exited && out.exitCode == 0 {
			last.Status = "done"
		}
		return last, 200
	case endStart:
		code := map[int]string{126: "command_not_executable", 127: "command_not_found"}[out.exitCode]
		last.apiError = newError(code).because("%s", j.s.redact(fmt.Sprint(out.err)))
	case endOutput:
		last.apiError = newError("max_stream_output_exceeded")
		if !j.stream {
			last.apiError = newError("max_output_exceeded")
			last.MaxOutput = j.snap.MaxOutputBytes
		}
	default:
		last.apiError = newError(string(out.end))
	}
	return last, last.status
}

// answer tells how the command ended: with its output, or after it if that was streamed. result is what the after hook put in
// its place.
func (j *job) answer(result map[string]any) *apiError {
	out, h := &j.out, j.Header()
	last, status := j.ending()
	if j.text && status == 200 { // as a shell says it
		code := out.exitCode
		if out.signalNumber > 0 {
			code = 128 + out.signalNumber
		}
		h.Set("X-Exit-Code", strconv.Itoa(code))
	}
	switch {
	case j.stream && j.text:
		if last.apiError != nil {
			h.Set("X-Exec-Error", last.Code)
		}
		j.flush() // and gives the trailers their time
	case j.stream:
		j.Write(j.line(1, nil))
		j.Write(j.line(2, nil))
		last.Length = nil
		fmt.Fprintf(j, "{\"output\":null,%s\n", marshal(last)[1:])
	case j.text && status == 200:
		pieces := out.stdout
		if result != nil {
			text, _ := result["output"].(string)
			pieces = chunks{[]byte(text)}
		} else if last.apiError != nil {
			pieces = chunks{[]byte(last.Message + "\n")}
		} else if out.stdoutBytes == 0 {
			pieces = out.stderr
		}
		h.Set("Content-Type", "text/plain; charset=utf-8")
		for _, piece := range pieces {
			j.Write(piece)
		}
	case result != nil:
		return j.json(200, result)
	default:
		h.Set("Content-Type", "application/json")
		j.WriteHeader(status)
		j.writeOutcome(j, last)
	}
	return nil
}

// writeOutcome encodes captured output piece by piece, so that a large one is never held twice.
func (j *job) writeOutcome(w io.Writer, last ending) {
	text := func(head string, pieces chunks) {
		t, buf := jsonText{}, []byte(head)
		for _, piece := range append(pieces, nil) {
			buf = t.append(buf, piece)
			w.Write(buf)
			buf = buf[:0]
		}
	}
	text(`{"output":"`, j.out.stdout)
	if j.out.stderrBytes > 0 {
		text(`","stderr":"`, j.out.stderr)
	}
	fmt.Fprintf(w, "\",%s\n", marshal(last)[1:])
}

// begin sends the headers of a stream, so that the client knows that the command runs.
func (j *job) begin() {
	j.Header().Set("Content-Type", "application/x-ndjson")
	if j.text {
		j.Header().Set("Content-Type", "text/plain; charset=utf-8")
		j.Header().Set("Trailer", "X-Exit-Code, X-Exec-Error")
	}
	j.flush()
}

// output makes a job the sink of its stream.
func (j *job) output(stream int, p []byte, idle bool) error {
	if !j.text {
		p = j.line(stream, p)
	}
	if _, err := j.Write(p); err != nil || !idle {
		return err
	}
	return j.flush()
}

// line is one NDJSON line, or nothing while a character is cut; without p, the line of one that stays cut.
func (j *job) line(stream int, p []byte) []byte {
	part, head := &j.parts[stream-1], `{"output":"`
	if stream == 2 {
		head = `{"output":null,"stderr":"`
	}
	length := len(part.cut) + len(p)
	j.buf = part.append(append(j.buf[:0], head...), p)
	if length -= len(part.cut); length == 0 {
		return nil
	}
	if j.buf = append(j.buf, '"'); stream == 1 {
		j.buf = fmt.Appendf(j.buf, `,"length":%d`, length)
	}
	return append(j.buf, `,"status":"running"}`+"\n"...)
}

// jsonText writes bytes that come in pieces as the inside of one JSON string. Bytes that are no UTF-8 become U+FFFD;
// a character that a piece cuts waits for the next.
type jsonText struct{ cut []byte }

// append appends src escaped; without src, what is still cut.
func (t *jsonText) append(dst, src []byte) []byte {
	last := len(src) == 0
	if len(t.cut) > 0 {
		src, t.cut = append(t.cut, src...), nil
	}
	done := 0 // all of src before it is in dst
	for i := 0; i < len(src); i++ {
		b := src[i]
		if b > '"' && b < utf8.RuneSelf && b != '\\' || b == ' ' || b == '!' { // nearly all
			continue
		}
		if r, size := utf8.DecodeRune(src[i:]); b >= utf8.RuneSelf && (r != utf8.RuneError || size > 1) {
			i += size - 1
			continue
		}
		dst = append(dst, src[done:i]...)
		switch done = i + 1; {
		case b >= utf8.RuneSelf && !last && !utf8.FullRune(src[i:]):
			t.cut = slices.Clone(src[i:])
			return dst
		case b >= utf8.RuneSelf:
			dst = append(dst, "\uFFFD"...)
		case b == '"' || b == '\\':
			dst = append(dst, '\\', b)
		case b == '\n':
			dst = append(dst, `\n`...)
		default:
			dst = append(dst, '\\', 'u', '0', '0', '0'+b>>4, "0123456789abcdef"[b&15])
		}
	}
	return append(dst, src[done:]...)
}
