// This file is what a client is told: errors, facts, documents. The answer of a command is job.go's.
// It may choose the words and the form of an answer, and write it through the call that asked.
// It must not open a file, decide, run or record anything.
package main

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"maps"
	"mime"
	"os"
	"os/user"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

//go:embed skills/*/SKILL.md skills/_root.md skills/_errors.txt skills/_plugin.md
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
	file, _ := skillFiles.ReadFile("skills/_errors.txt") // embedded, so there is no error
	for entry := range strings.SplitSeq(string(file), "\n\n") {
		var e apiError
		lines := strings.Split(entry, "\n")
		fmt.Sscan(lines[0], &e.Code, &e.status, &e.wait) // where no number follows, wait stays 0
		e.Message, e.Hint, e.Retryable = lines[1], lines[2], e.wait > 0
		texts[e.Code] = e
	}
	return texts
}()

func newError(code string) *apiError {
	e := errorTexts[code]
	return &e
}

// because replaces the message where there is more to say.
func (e *apiError) because(format string, args ...any) *apiError {
	e.Message = fmt.Sprintf(format, args...)
	return e
}

func (c *call) fail(e *apiError) {
	c.Header().Set("Cache-Control", "no-store")
	if e.Retryable {
		c.Header().Set("Retry-After", strconv.Itoa(e.wait))
	}
	c.json(e.status, e)
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
	enc.Encode(v) // our own types encode, so there is no error
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
	if c.snap.cred != nil {
		machine["user"] = c.snap.cred.Name
	} else if u, err := user.Current(); err == nil {
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
	plugin            string // whose it is; "": embedded
	name, description string
	markdown          []byte
}

// readDocuments gives every document by its path. No plugin's hides an embedded one.
func readDocuments(plugins []*plugin) map[string]document {
	all := map[string]document{}
	for _, p := range plugins {
		for file, text := range p.docs {
			place := "/private/skills/" + p.Name + "/" + file
			if file == "public/SKILL.md" {
				place = "/skills/" + p.Name + "/SKILL.md"
			}
			all[place] = document{p.Name, p.Name, p.Description, text}
		}
	}
	for _, name := range []string{"acl", "aexec", "exec", "install", "plugins", "private"} {
		text, _ := skillFiles.ReadFile("skills/" + name + "/SKILL.md")
		_, description, _ := frontmatter(text) // embedded and tested, so there is no error
		all["/skills/"+name+"/SKILL.md"] = document{"", name, description, text}
	}
	all["/SKILL.md"] = all["/skills/aexec/SKILL.md"]
	return all
}

var (
	frontmatterForm  = regexp.MustCompile(`(?s)^---\r?\n(.*?\n)---\r?\n`)
	frontmatterField = regexp.MustCompile(`(?m)^(name|description):[ \t]*["']?([^|>\s].*?)["']?\s*$`) // | and > begin a block
)

// frontmatter reads the name and one-line description at the head of a SKILL.md (Agent Skills).
func frontmatter(doc []byte) (name, description string, err error) {
	found := map[string]string{}
	for _, m := range frontmatterField.FindAllSubmatch(frontmatterForm.Find(doc), -1) {
		found[string(m[1])] = string(m[2])
	}
	if found["name"] == "" || found["description"] == "" {
		err = errors.New("SKILL.md must begin with frontmatter: name and description, each on one line, between two lines of ---")
	}
	return found["name"], found["description"], err
}

var plainHost = regexp.MustCompile(`^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?$`)

// rootGuide names this server as the client did, if that was a plain name, else by where it listens.
func (c *call) rootGuide() *apiError {
	host := c.r.Host
	if !plainHost.MatchString(host) || c.s.redact(host) != host {
		host = c.s.address
	}
	root, _ := skillFiles.ReadFile("skills/_root.md") // embedded, so there is no error
	return c.document([]byte(strings.NewReplacer("{{URL}}", "http://"+host, "{{VERSION}}", version).Replace(string(root))))
}

func (c *call) skill() *apiError {
	d, ok := c.s.documents[c.r.URL.Path]
	if !ok || c.snap.disabled(d.plugin) {
		return newError("not_found")
	}
	return c.document(d.markdown)
}

func (c *call) skillIndex() *apiError {
	text, list := []byte("# Skills of this machine\n\n"), []map[string]string{}
	for _, link := range slices.Sorted(maps.Keys(c.s.documents)) {
		d := c.s.documents[link]
		if strings.HasPrefix(link, "/skills/") && !c.snap.disabled(d.plugin) {
			list = append(list, map[string]string{"name": d.name, "description": d.description, "link": link})
			text = fmt.Appendf(text, "- [%s](%s): %s\n", d.name, link, d.description)
		}
	}
	if prefers(c.r.Header["Accept"], "text/markdown", "text/html", "application/json") == "application/json" {
		c.Header().Set("Vary", "Accept")
		return c.json(200, map[string]any{"skills": list})
	}
	return c.document(text)
}

// document answers with markdown, or with a page for those who would rather have HTML.
func (c *call) document(body []byte) *apiError {
	kind := prefers(c.r.Header["Accept"], "text/markdown", "text/html")
	if kind == "text/html" {
		body = renderHTML(body)
	}
	h := c.Header()
	h.Set("Content-Type", kind+"; charset=utf-8")
	h.Set("Vary", "Accept")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	c.Write(body)
	return nil
}

// prefers picks what an Accept header likes best (RFC 9110, 12.5.1), the first among equals. A range such as text/* means that.
func prefers(accept []string, offers ...string) string {
	best, most := offers[0], 0.0
	for part := range strings.SplitSeq(strings.Join(accept, ","), ",") {
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

const (
	pageHead = `<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>aexec</title>
<style>pre{max-width:50em;margin:2em auto;padding:0 1em;font:15px/1.5 monospace;white-space:pre-wrap;overflow-wrap:anywhere}</style>
<pre>`
	pageEnd = "</pre>\n"
)

// safeLink is a link in escaped text: http(s), or relative: no colon, so no other scheme, no // and no backslash, so no other host.
var safeLink = regexp.MustCompile(`\[([^][]+)\]\((https?://(?:[\w.~:/#?=%+-]|&amp;)+|/?[\w.#-](?:[\w.~/#?=%+-]|&amp;)*)\)`)

// renderHTML shows markdown as it is written, on a page that a person can read: all of it escaped, its safe links marked up.
func renderHTML(doc []byte) []byte {
	return []byte(pageHead + safeLink.ReplaceAllString(html.EscapeString(string(doc)), `<a href="$2">$1</a>`) + pageEnd)
}
