// This file is what a request gets: errors, facts, documents; and a command, decided, recorded, run in its slot with the hooks around it.
// It may ask acl.go, audit.go, plugin.go and exec.go, in that order, and answer through the call that asked.
// It must not approve or start anything, or open a file, and knows no socket: who may ask is settled in server.go.
package main

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"maps"
	"mime"
	"os"
	"os/user"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

//go:embed skills/*/SKILL.md skills/_*
var skillFiles embed.FS

// apiError is the one shape of every error.
type apiError struct {
	status, wait int      // wait: seconds after which the same request may work; 0: it will not
	Code         string   `json:"error"`
	Message      string   `json:"message"`
	Hint         string   `json:"hint"`
	Retryable    bool     `json:"retryable"`
	Rule         string   `json:"rule,omitempty"`
	Fields       []string `json:"fields,omitempty"`
	MaxOutput    int64    `json:"maxOutputBytes,omitempty"`
}

// errorTexts is every error of ours by its code: status and wait, what happened, what to do next.
var errorTexts = func() map[string]apiError {
	texts := map[string]apiError{}
	for entry := range strings.SplitSeq(skillText("_errors.txt"), "\n\n") {
		var e apiError
		lines := strings.Split(entry, "\n")
		fmt.Sscan(lines[0], &e.Code, &e.status, &e.wait) // where no number follows, wait stays 0
		e.Message, e.Hint, e.Retryable = lines[1], lines[2], e.wait > 0
		texts[e.Code] = e
	}
	return texts
}()

// skillText is one of the texts that are built in, so there is no error.
func skillText(name string) string {
	text, _ := skillFiles.ReadFile("skills/" + name)
	return string(text)
}

// newError has a message of its own where there is more to say.
func newError(code string, because ...any) *apiError {
	e := errorTexts[code]
	e.Message = cmp.Or(fmt.Sprint(because...), e.Message)
	return &e
}

// json answers with one JSON value, in which no text from outside, and no rule, takes the key along.
func (c *call) json(status int, v any) *apiError {
	c.Header().Set("Content-Type", "application/json")
	c.WriteHeader(status)
	c.Write([]byte(c.s.redact(string(marshal(v))) + "\n"))
	return nil
}

func marshal(v any) []byte {
	var b bytes.Buffer
	encode(&b, v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// encode leaves <, > and & as they are: agents read the text, browsers are told not to.
func encode(b *bytes.Buffer, v any) {
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	enc.Encode(v) // our own types encode, so there is no error
}

func (c *call) acl() *apiError {
	lists := map[string][]ruleSpec{"allow": {}, "deny": {}}
	for _, rule := range c.snap.policy {
		lists[rule.List] = append(lists[rule.List], rule.Rule)
	}
	machine := map[string]string{"os": runtime.GOOS, "arch": runtime.GOARCH, "cwd": c.snap.cwd, "user": c.snap.User}
	machine["hostname"], _ = os.Hostname()
	if u, err := user.Current(); err == nil && c.snap.User == "" {
		machine["user"] = u.Username
	}
	limits := map[string]int64{"timeoutMs": c.snap.Timeout.Milliseconds(), "maxOutputBytes": c.snap.MaxOutputBytes,
		"maxStreamBytes": c.snap.MaxStreamBytes, "maxConcurrentExec": int64(c.snap.MaxConcurrentExec), "maxRequestBodyBytes": c.s.maxBody}
	return c.json(200, map[string]any{"allow": lists["allow"], "deny": lists["deny"], "limits": limits, "machine": machine})
}

func (c *call) pluginList() *apiError {
	list := []map[string]string{}
	for _, p := range c.s.plugins {
		if !c.snap.disabled(p.Name) {
			list = append(list, map[string]string{"name": p.Name, "description": p.Description, "command": p.Command,
				"skill": "/private/skills/" + p.Name + "/SKILL.md"})
		}
	}
	return c.json(200, map[string]any{"plugins": list})
}

// document is one of the texts that agents read.
type document struct {
	plugin, name, description, text string // plugin: whose it is; "": built in
}

// readDocuments gives every document by its path. No plugin's hides one that is built in.
func readDocuments(plugins []*plugin) map[string]document {
	all := map[string]document{}
	for _, p := range plugins {
		for file, text := range p.docs {
			file, public := strings.CutPrefix(file, "public/")
			all[pick(public, "/skills/", "/private/skills/")+p.Name+"/"+file] = document{p.Name, p.Name, p.Description, string(text)}
		}
	}
	for _, name := range []string{"acl", "aexec", "exec", "install", "plugins", "private"} {
		text := skillText(name + "/SKILL.md")
		_, description, _ := frontmatter([]byte(text)) // tested, so there is no error
		all["/skills/"+name+"/SKILL.md"] = document{"", name, description, text}
	}
	all["/SKILL.md"] = all["/skills/aexec/SKILL.md"]
	return all
}

var (
	frontmatterForm  = regexp.MustCompile(`(?s)^---\r?\n(.*?\n)---\r?\n`)
	frontmatterField = regexp.MustCompile(`(?m)^(name|description):[ \t]*["']?([^|>\s].*?)["']?\s*$`) // | and > begin a block

	plainHost = regexp.MustCompile(`^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?$`)
	// safeLink is a link in escaped text: http(s), or relative: no colon, so no other scheme, no // and no backslash, so no other host.
	safeLink = regexp.MustCompile(`\[([^][]+)\]\((https?://(?:[\w.~:/#?=%+-]|&amp;)+|/?[\w.#-](?:[\w.~/#?=%+-]|&amp;)*)\)`)
)

// frontmatter reads the name and one-line description at the head of a SKILL.md (Agent Skills).
func frontmatter(doc []byte) (name, description string, err error) {
	found := map[string]string{}
	for _, m := range frontmatterField.FindAllSubmatch(frontmatterForm.Find(doc), -1) {
		found[string(m[1])] = string(m[2])
	}
	if found["name"] == "" || found["description"] == "" {
		err = fmt.Errorf("SKILL.md must begin with frontmatter: name and description, each on one line, between two lines of ---")
	}
	return found["name"], found["description"], err
}

// rootGuide names this server as the client did, if that was a plain name, else by where it listens.
func (c *call) rootGuide() *apiError {
	host := pick(plainHost.MatchString(c.r.Host) && c.s.redact(c.r.Host) == c.r.Host, c.r.Host, c.s.address)
	return c.document(strings.NewReplacer("{{URL}}", "http://"+host, "{{VERSION}}", version).Replace(skillText("_root.md")))
}

func (c *call) skill() *apiError {
	d, ok := c.s.documents[c.r.URL.Path]
	if !ok || c.snap.disabled(d.plugin) {
		return newError("not_found")
	}
	return c.document(d.text)
}

func (c *call) skillIndex() *apiError {
	text, list := "# Skills of this machine\n\n", []map[string]string{}
	for _, link := range slices.Sorted(maps.Keys(c.s.documents)) {
		d := c.s.documents[link]
		if strings.HasPrefix(link, "/skills/") && !c.snap.disabled(d.plugin) {
			list = append(list, map[string]string{"name": d.name, "description": d.description, "link": link})
			text += fmt.Sprintf("- [%s](%s): %s\n", d.name, link, d.description)
		}
	}
	if c.prefers("text/markdown", "text/html", "application/json") == "application/json" {
		return c.json(200, map[string]any{"skills": list})
	}
	return c.document(text)
}

// document answers with markdown, or with a page on which a person can read it: all of it escaped, its safe links marked up.
func (c *call) document(text string) *apiError {
	kind := c.prefers("text/markdown", "text/html")
	if kind == "text/html" {
		text = renderHTML(text)
	}
	c.Header().Set("Content-Type", kind+"; charset=utf-8")
	c.Header().Set("Content-Length", strconv.Itoa(len(text)))
	c.Write([]byte(text))
	return nil
}

func renderHTML(text string) string {
	marked := safeLink.ReplaceAllString(html.EscapeString(text), `<a href="$2">$1</a>`)
	return strings.Replace(skillText("_page.html"), "{{TEXT}}", marked, 1)
}

// prefers picks what the Accept header likes best (RFC 9110, 12.5.1), the first among equals. A range such as text/* means that.
func (c *call) prefers(offers ...string) string {
	c.Header().Set("Vary", "Accept")
	best, most := offers[0], 0.0
	for part := range strings.SplitSeq(strings.Join(c.r.Header["Accept"], ","), ",") {
		kind, params, _ := mime.ParseMediaType(part)
		if strings.HasSuffix(kind, "/*") {
			kind = offers[0]
		}
		q, err := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
		if err == nil && slices.Contains(offers, kind) && (q > most || q == most && kind == offers[0]) {
			best, most = kind, q
		}
	}
	return best
}

// parseExecBody reads {"args":[…]} and nothing else.
func parseExecBody(data []byte) (args []string, e *apiError) {
	body, err := parseStrict(data)
	if err != nil {
		return nil, newError("invalid_json", "The body is not valid JSON, at line:column ", err, ".")
	}
	args = cmp.Or(body.get("args"), &node{}).texts()
	others := slices.DeleteFunc(each(body.keys, func(key *node) string { return key.str }), func(key string) bool { return key == "args" })
	switch err = checkArgv(args); {
	case body.kind != '{':
		return nil, newError("invalid_json")
	case len(others) > 0:
		args, e = nil, newError("unexpected_field")
		e.Fields = others
	case args == nil:
		return nil, newError("invalid_args")
	case err != nil:
		return nil, newError("invalid_args", "args cannot be run: ", err, ".")
	}
	return args, e
}

func (c *call) aclCheck() *apiError {
	_, d := c.snap.policy.decide(c.args)
	return c.json(200, d)
}

func (c *call) exec() *apiError {
	c.stream, c.text = c.query.Get("mode") == "stream", c.query.Get("format") == "text"
	for _, p := range c.s.plugins {
		if p.before+p.after != "" && p.sees(c.args) && !c.snap.disabled(p.Name) {
			c.plugin = p
		}
	}
	switch {
	case c.stream && c.text && !c.r.ProtoAtLeast(1, 1):
		return newError("http_version_not_supported")
	case c.stream && c.plugin.Name != "":
		return newError("stream_plugin_command_not_supported")
	}
	return c.run(c.snap.policy.decide(c.args))
}

// pluginRoute is a request for what a plugin's own route leads to.
func (c *call) pluginRoute(p *plugin, template []string) *apiError {
	argv, err := routeArgv(template, c.r.PathValue)
	switch {
	case c.snap.disabled(p.Name):
		return newError("not_found")
	case c.r.ContentLength != 0:
		return newError("unexpected_field", "This route takes no body.")
	case err != nil:
		return newError("invalid_args", "The path cannot be made a command: ", err, ".")
	}
	c.args, c.plugin = argv, p
	return c.run(p.approve(c.snap.policy, argv))
}

// run takes a slot, and in it runs the before hook, a second decision on what that made, the command, and the after hook. Then it answers.
func (c *call) run(what approved, by decision) *apiError {
	c.sent = c.args
	if e := c.decided(what, by); e != nil {
		return e
	}
	release, ok := c.s.runner.acquire(c.snap.MaxConcurrentExec)
	if !ok {
		return newError(pick(c.s.runner.shuttingDown(), "shutting_down", "too_many_concurrent_exec"))
	}
	defer release()
	c.SetReadDeadline(time.Time{}) // the request is whole; from here a read only watches for a disconnect
	said, e := c.hook("before", c.plugin.before)
	if e == nil && said.Args != nil {
		c.args = said.Args
		e = c.decided(c.plugin.approve(c.snap.policy, c.args))
	}
	if e == nil {
		e = c.audited(nil)
	}
	if e == nil {
		said, e = c.hook("after", c.plugin.after)
	}
	if e != nil {
		return e
	}
	release()
	c.answer(said.Result)
	return nil
}

// decided keeps a decision about the command; a refusal is recorded.
func (c *call) decided(what approved, by decision) *apiError {
	if c.what, c.decision = what, by; by.Allowed {
		return nil
	}
	e := newError(map[string]string{"deny": "command_denied", "": "command_not_allowed"}[by.List])
	e.Rule = by.Rule
	r := c.record("exec_denied")
	r.ACLDecision, r.DenialReason = "deny", e.Code
	c.s.note(r)
	return e
}

func (c *call) record(event string) auditRecord {
	r := auditRecord{Event: event, RequestID: c.id, SourceIP: c.peer.String(), APIKeyID: c.s.start.key.id(), AuthSource: c.source,
		Endpoint: c.r.URL.Path, Mode: cmp.Or(c.query.Get("mode"), "buffered"), Argv: c.args, Cwd: c.snap.cwd, Plugin: c.plugin.Name,
		ACLDecision: "allow", Rule: c.decision.Rule}
	if !slices.Equal(c.args, c.sent) {
		r.OriginalArgv = c.sent
	}
	return r
}

// hook runs one hook of the plugin, if it has that. It is told nothing of keys. What did not run to its end has no after.
func (c *call) hook(which, file string) (said hookOutput, e *apiError) {
	if file == "" || which == "after" && c.out.end != endExit {
		return said, nil
	}
	for _, name := range []string{"Authorization", "Proxy-Authorization", "Cookie"} { // which may also hold what only others know
		c.r.Header.Del(name)
	}
	in := map[string]any{"args": c.args, "originalArgs": c.sent,
		"request": map[string]any{"method": c.r.Method, "path": c.r.URL.Path, "query": c.query, "ip": c.peer.String(), "headers": c.r.Header}}
	if which == "after" {
		var result bytes.Buffer
		c.writeOutcome(&result)
		in["result"] = json.RawMessage(result.Bytes())
	}
	said, err := c.plugin.runHook(which, in, func(what approved, stdin []byte) outcome {
		h := *c
		h.args, h.sent, h.what, h.decision, h.out = what.argv, what.argv, what, decision{}, outcome{}
		e = h.audited([]byte(c.s.redact(string(stdin))))
		return h.out
	})
	switch {
	case e != nil:
	case err != nil:
		c.s.log.Printf("request %s: the %s hook of plugin %q failed: %q", c.id, which, c.plugin.Name, err)
		e = newError(pick(c.s.runner.shuttingDown(), "shutting_down", "plugin_"+which+"_error"))
	case said.Error != nil:
		e = &apiError{status: said.Error.Status, Code: said.Error.Code, Message: said.Error.Message,
			Hint: "The plugin " + c.plugin.Name + " answered so; read its document."}
	}
	return said, e
}

// audited runs a command, or a hook with its stdin, between two records; if the first cannot be written, nothing runs.
func (c *call) audited(stdin []byte) *apiError {
	s := c.snap
	cmd := command{what: c.what, env: s.env, cwd: s.cwd, pathDirs: s.pathDirs, cred: s.cred, limits: s.rlimits,
		noNewPrivs: s.NoNewPrivileges, timeout: s.Timeout, killGrace: s.KillGrace, maxBytes: s.MaxOutputBytes, stdin: stdin}
	if stdin != nil {
		cmd.cred, cmd.env, cmd.cwd = nil, s.hookEnv, c.plugin.dir // a hook runs as the server's user, in nobody else's world
	}
	r := c.record("exec_start")
	r.Cwd = cmd.cwd
	if c.s.note(r) != nil {
		return newError("audit_unavailable")
	}
	if c.stream {
		cmd.sink, cmd.maxBytes = c, s.MaxStreamBytes
		c.Header().Set("Content-Type", pick(c.text, "text/plain; charset=utf-8", "application/x-ndjson"))
		if c.text {
			c.Header().Set("Trailer", "X-Exit-Code, X-Exec-Error")
		}
		c.output(1, nil, true) // so that the client knows that the command runs
	}
	c.out = c.s.runner.run(c.r.Context(), cmd)
	out, ms := &c.out, c.out.duration.Milliseconds()
	r.Event, r.Reason, r.Signal, r.DurationMs = "exec_end", string(out.end), out.signal, &ms
	r.StdoutBytes, r.StderrBytes = &out.stdoutBytes, &out.stderrBytes
	if out.exited {
		r.ExitCode = &out.exitCode
	}
	if out.end == endInternal {
		c.s.log.Printf("request %s: the command could not be run: %q", c.id, out.err)
	}
	c.s.note(r)
	return nil
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
func (c *call) ending() (last ending, status int) {
	out := &c.out
	last = ending{Status: "error", Duration: out.duration.Milliseconds(), Length: &out.stdoutBytes}
	if out.exited && (out.end == endExit || out.end == endStart) {
		last.ExitCode = &out.exitCode
	}
	switch out.end {
	case endExit:
		last.Signal, last.Status = out.signal, pick(out.exited && out.exitCode == 0, "done", "error")
		return last, 200
	case endStart:
		last.apiError = newError(pick(out.exitCode == 126, "command_not_executable", "command_not_found"), c.s.redact(out.err.Error()))
	case endOutput:
		last.apiError = newError(pick(c.stream, "max_stream_output_exceeded", "max_output_exceeded"))
		if !c.stream {
			last.MaxOutput = c.snap.MaxOutputBytes
		}
	default:
		last.apiError = newError(string(out.end))
	}
	return last, last.status
}

// answer tells how the command ended, with its output if that was not streamed, or with the result that the after hook put in its place.
func (c *call) answer(result map[string]any) {
	last, status := c.ending()
	shown, code := c.out.stdout, c.out.exitCode // of a text, as a shell tells it
	switch text, _ := result["output"].(string); {
	case result != nil:
		shown = chunks{[]byte(text)}
	case c.out.end == endStart:
		shown = chunks{[]byte(last.Message + "\n")}
	case c.out.stdoutBytes == 0:
		shown = c.out.stderr
	}
	if c.out.signalNumber > 0 {
		code = 128 + c.out.signalNumber
	}
	if c.text && c.stream && last.apiError != nil {
		c.Header().Set("X-Exec-Error", last.Code)
	}
	if c.text && status == 200 {
		c.Header().Set("X-Exit-Code", strconv.Itoa(code))
	}
	switch {
	case c.text && (c.stream || status == 200):
		c.Header().Set("Content-Type", "text/plain; charset=utf-8")
		for _, piece := range append(shown, nil) { // nothing, too, gives the trailers their time
			c.Write(piece)
		}
	case c.stream:
		c.output(1, nil, false) // half a character that stays half
		c.output(2, nil, false)
		last.Length = nil
		fmt.Fprintf(c, "{\"output\":null,%s\n", marshal(last)[1:])
	case result != nil:
		c.json(200, result)
	default:
		c.Header().Set("Content-Type", "application/json")
		c.WriteHeader(status)
		c.writeOutcome(c)
	}
}

// writeOutcome encodes captured output piece by piece, so that a large one is never held twice.
func (c *call) writeOutcome(w io.Writer) {
	text := func(head string, pieces chunks) {
		var t jsonText
		io.WriteString(w, head)
		for _, piece := range append(pieces, nil) {
			escaped, _ := t.next(piece)
			w.Write(escaped)
		}
	}
	text(`{"output":"`, c.out.stdout)
	if c.out.stderrBytes > 0 {
		text(`","stderr":"`, c.out.stderr)
	}
	last, _ := c.ending()
	fmt.Fprintf(w, "\",%s\n", marshal(last)[1:])
}

// output makes a call the sink of its stream. Without p it says what is left of a cut character.
func (c *call) output(stream int, p []byte, idle bool) error {
	if !c.text {
		text, length := c.parts[stream-1].next(p)
		switch p = nil; {
		case length > 0 && stream == 1:
			p = fmt.Appendf(nil, "{\"output\":\"%s\",\"length\":%d,\"status\":\"running\"}\n", text, length)
		case length > 0:
			p = fmt.Appendf(nil, "{\"output\":null,\"stderr\":\"%s\",\"status\":\"running\"}\n", text)
		}
	}
	if _, err := c.Write(p); err != nil || !idle {
		return err
	}
	return c.Flush()
}

// jsonText is output on its way into a JSON string, piece by piece. Half a character at the end of a piece waits for the next.
type jsonText struct {
	held []byte
	buf  bytes.Buffer
}

// next gives what is whole as the inside of that string, what is no UTF-8 as U+FFFD, and counts its bytes. No piece: it was the last.
func (t *jsonText) next(piece []byte) (text []byte, length int) {
	t.held = append(t.held, piece...)
	length = len(t.held)
	for n := 1; n < utf8.UTFMax && n <= len(t.held) && len(piece) > 0; n++ {
		if !utf8.FullRune(t.held[len(t.held)-n:]) {
			length = len(t.held) - n
		}
	}
	t.buf.Reset() // and use it again: a flood of output is many pieces
	encode(&t.buf, string(t.held[:length]))
	t.held = append(t.held[:0], t.held[length:]...)
	return t.buf.Bytes()[1 : t.buf.Len()-2], length
}
