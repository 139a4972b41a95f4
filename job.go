// This file is one command's way: what was asked for, the decision, its slot, the hooks around it, its two records; it is apart from server.go, as who may ask is settled there, and what runs here.
// It may ask acl.go, audit.go, plugin.go and exec.go in that order.
// It must not approve anything, start anything, or answer but through answer.go.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// parseExecBody reads {"args":[…]} and nothing else.
func parseExecBody(data []byte) ([]string, *apiError) {
	body, err := parseStrict(data)
	if err != nil {
		return nil, newError("invalid_json").because("The body is not valid JSON, at line:column %v.", err)
	}
	fields := slices.DeleteFunc(slices.Clone(body.keys), func(key string) bool { return key == "args" })
	switch {
	case body.kind != '{':
		return nil, newError("invalid_json")
	case len(fields) > 0:
		e := newError("unexpected_field")
		e.Fields = fields
		return nil, e
	case len(body.keys) == 0 || body.items[0].kind != '[':
		return nil, newError("invalid_args").because("args is missing or not an array.")
	}
	args := []string{}
	for i, item := range body.items[0].items {
		if item.kind != '"' {
			return nil, newError("invalid_args").because("args[%d] is not a string of Unicode characters.", i)
		}
		args = append(args, item.str)
	}
	if err := checkArgv(args); err != nil {
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

// job is one command that was decided, on its way through its slot.
type job struct {
	args, sent []string // what will run, and what the request asked for
	what       approved
	decided    decision
	plugin     *plugin     // whose hooks stand around it; nil: none
	sink       *streamSink // nil: buffered
	text       bool
	out        outcome
	result     map[string]any // what the after hook put in place of the answer
}

func (c *call) exec() (e *apiError) {
	j := &job{text: c.query.Get("format") == "text"}
	if c.query.Get("mode") == "stream" {
		j.sink = &streamSink{c: c, text: j.text}
	}
	if j.sink != nil && j.text && !c.r.ProtoAtLeast(1, 1) {
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
	if j.sink != nil && j.plugin != nil {
		return newError("stream_plugin_command_not_supported")
	}
	j.what, j.decided = c.snap.policy.decide(j.args)
	return c.run(j)
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
	j := &job{args: argv, plugin: p}
	j.what, j.decided = p.approve(c.snap.policy, argv)
	return c.run(j)
}

// run takes a slot for the command and answers when the slot is free again.
func (c *call) run(j *job) *apiError {
	if j.sent = j.args; !j.decided.Allowed {
		return c.denied(j)
	}
	release, ok := c.s.runner.acquire(c.snap.MaxConcurrentExec)
	if !ok && c.s.runner.shuttingDown() {
		return newError("shutting_down")
	}
	if !ok {
		return newError("too_many_concurrent_exec")
	}
	c.control.SetReadDeadline(time.Time{}) // the request is whole; from here a read only watches for a disconnect
	if e := c.inSlot(j, release); e != nil {
		return e
	}
	return c.answer(j)
}

// inSlot is all that happens to a command that was allowed: its plugin's before hook, a second decision on what that made of it,
// the run, the after hook.
func (c *call) inSlot(j *job, release func()) *apiError {
	defer release()
	c.conn.busy.Store(true)
	defer c.conn.busy.Store(false)
	p := j.plugin
	if p != nil && p.before != "" {
		changed, e := c.hook(j, "before")
		if e != nil {
			return e
		}
		if changed.Args != nil {
			j.args = changed.Args
			if j.what, j.decided = p.approve(c.snap.policy, j.args); !j.decided.Allowed {
				return c.denied(j)
			}
		}
	}
	if j.out = c.audited(j, nil); c.unaudited {
		return newError("audit_unavailable")
	}
	if p != nil && p.after != "" && (j.out.end == endExit || j.out.end == endStart) {
		changed, e := c.hook(j, "after")
		j.result = changed.Result
		return e
	}
	return nil
}

// hook runs one hook of the job's plugin in the job's slot. What it is told is free of the key.
func (c *call) hook(j *job, which string) (hookOutput, *apiError) {
	p, headers, query := j.plugin, maps.Clone(c.r.Header), maps.Clone(c.query)
	for _, given := range []map[string][]string{headers, query} {
		for _, name := range []string{"Authorization", "Proxy-Authorization", "Cookie", "X-Api-Key", "apiKey"} {
			if given[name] != nil {
				given[name] = []string{redactedKey}
			}
		}
	}
	in := map[string]any{"args": j.args, "originalArgs": j.sent,
		"request": map[string]any{"method": c.r.Method, "path": c.r.URL.Path, "query": query, "ip": c.peer.String(), "headers": headers}}
	if which == "after" {
		var result bytes.Buffer
		writeOutcome(&result, []byte("{"), &j.out, endingOf(&j.out, c.endError(j)))
		in["result"] = json.RawMessage(result.Bytes())
	}
	told := map[string]any{}
	if err := json.Unmarshal([]byte(c.s.redact(string(marshal(in)))), &told); err != nil {
		return hookOutput{}, newError("internal")
	}
	answer, err := p.runHook(which, told, func(what approved, stdin []byte) outcome {
		return c.audited(&job{args: what.argv, sent: what.argv, what: what, plugin: p}, stdin)
	})
	switch {
	case c.unaudited:
		return answer, newError("audit_unavailable")
	case err != nil && c.s.runner.shuttingDown():
		return answer, newError("shutting_down")
	case err != nil:
		c.s.log.Printf("request %s: the %s hook of plugin %q failed: %q", c.id, which, p.Name, c.s.redact(err.Error()))
		return answer, newError("plugin_" + which + "_error")
	case answer.Error != nil:
		e, hint := answer.Error, "The plugin "+p.Name+" answered so; read its document."
		return answer, &apiError{status: e.Status, Code: e.Code, Message: e.Message, Hint: hint}
	}
	return answer, nil
}

// audited runs a command between its two records. Without the first nothing runs. stdin is what a hook is told; nil: no hook.
func (c *call) audited(j *job, stdin []byte) outcome {
	s := c.snap
	cmd := command{what: j.what, env: s.env, cwd: s.cwd, pathDirs: s.pathDirs, cred: s.cred, limits: s.Exec.Limits, noNewPrivs: s.Exec.NoNewPrivileges,
		timeout: s.Timeout, killGrace: s.KillGrace, maxBytes: s.MaxOutputBytes, stdin: stdin}
	if stdin != nil {
		cmd.cred, cmd.env, cmd.cwd = nil, s.hookEnv, j.plugin.dir // a hook runs as the server's user, in nobody else's world
	}
	rec := c.record("exec_start", j)
	rec.Cwd = cmd.cwd
	if err := c.s.audit.append(rec); err != nil {
		c.s.log.Printf("request %s: nothing runs, exec_start cannot be recorded: %v", c.id, err)
		c.unaudited = true
		return outcome{end: endInternal, err: err}
	}
	if j.sink != nil {
		cmd.sink, cmd.maxBytes = j.sink, s.MaxStreamBytes
		j.sink.begin()
	}
	out := c.s.runner.run(c.r.Context(), cmd)
	ms := out.duration.Milliseconds()
	rec.Event, rec.Reason, rec.Signal, rec.DurationMs = "exec_end", string(out.end), out.signal, &ms
	rec.StdoutBytes, rec.StderrBytes = &out.stdoutBytes, &out.stderrBytes
	if out.exited || out.end == endStart {
		rec.ExitCode = &out.exitCode
	}
	if out.end == endInternal {
		c.s.log.Printf("request %s: the command could not be run: %q", c.id, c.s.redact(fmt.Sprint(out.err)))
	}
	c.s.note(rec)
	return out
}

// record begins a record of this request, and of its command if there is one.
func (c *call) record(event string, j *job) auditRecord {
	r := auditRecord{Event: event, RequestID: c.id, SourceIP: c.peer.String(), AuthSource: c.source, Endpoint: c.r.URL.Path}
	if c.keyed {
		r.APIKeyID = c.s.start.key.id()
	}
	if j == nil {
		return r
	}
	r.Mode, r.Argv, r.Cwd, r.ACLDecision, r.Rule = "buffered", j.args, c.snap.cwd, "allow", j.decided.Rule
	if j.sink != nil {
		r.Mode = "stream"
	}
	if j.plugin != nil {
		r.Plugin = j.plugin.Name
	}
	if !slices.Equal(j.args, j.sent) {
		r.OriginalArgv = j.sent
	}
	return r
}

func (c *call) denied(j *job) *apiError {
	e := newError("command_not_allowed")
	if j.decided.List == "deny" {
		e = newError("command_denied")
		e.Rule = j.decided.Rule
	}
	r := c.record("exec_denied", j)
	r.ACLDecision, r.DenialReason = "deny", e.Code
	c.s.note(r)
	return e
}
