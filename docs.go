// This file is the documents: which there are, their frontmatter, negotiation, HTML; it is apart from answer.go, as it changes with what agents read, not with what they ask.
// It may choose a text and turn it into another, and hand it to the call that asked.
// It must not open a file, decide who may read, or use the network itself.
package main

import (
	"cmp"
	"embed"
	"errors"
	"fmt"
	"html"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

//go:embed skills/*/SKILL.md skills/_root.md skills/_plugin.md skills/_errors.txt
var skillFiles embed.FS

// document is one of the texts that an agent reads.
type document struct {
	name, description string
	markdown          []byte
}

func readSkills() (skills []document) {
	for _, name := range []string{"acl", "aexec", "exec", "install", "plugins", "private"} {
		text, _ := skillFiles.ReadFile("skills/" + name + "/SKILL.md")
		_, description, _ := frontmatter(text) // embedded and tested, so there is no error
		skills = append(skills, document{name, description, text})
	}
	return skills
}

// frontmatter reads the name and one-line description at the head of a SKILL.md (Agent Skills); the error says what is wrong with it.
func frontmatter(doc []byte) (name, description string, err error) {
	text := strings.ReplaceAll(string(doc), "\r\n", "\n")
	head, _, closed := strings.Cut(strings.TrimPrefix(text, "---\n"), "\n---\n")
	if !strings.HasPrefix(text, "---\n") || !closed {
		return "", "", errors.New("it does not begin with frontmatter, name and description between two lines of ---")
	}
	found := map[string]string{}
	for line := range strings.SplitSeq(head, "\n") {
		key, value, _ := strings.Cut(line, ":")
		if value = strings.TrimSpace(value); len(value) > 1 && strings.ContainsAny(value[:1], `"'`) && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		found[key] = value
	}
	name, description = found["name"], found["description"]
	if name == "" || description == "" || strings.ContainsAny(description[:1], "|>") {
		return name, "", errors.New("its frontmatter needs a name and a description, each on one line")
	}
	return name, description, nil
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

// publicSkills are the embedded documents and those that the enabled plugins publish.
func (c *call) publicSkills() []document {
	all := slices.Clip(c.s.skills)
	for _, p := range c.s.plugins {
		if doc, ok := p.docs["public/SKILL.md"]; ok && !c.snap.disabled(p.Name) {
			all = append(all, document{name: p.Name, description: p.Description, markdown: doc})
		}
	}
	return all
}

func (c *call) publicSkill() *apiError {
	name := cmp.Or(c.r.PathValue("name"), "aexec") // /SKILL.md has no name
	for _, d := range c.publicSkills() {
		if d.name == name {
			return c.document(d.markdown)
		}
	}
	return newError("not_found")
}

func (c *call) pluginDocument() *apiError {
	name, file, _ := strings.Cut(strings.TrimPrefix(c.r.URL.Path, "/private/skills/"), "/")
	for _, p := range c.s.plugins {
		if doc, ok := p.docs[file]; ok && p.Name == name && !c.snap.disabled(name) {
			return c.document(doc)
		}
	}
	return newError("not_found")
}

func (c *call) skillIndex() *apiError {
	text, list := []byte("# Skills of this machine\n\n"), []map[string]string{}
	for _, d := range c.publicSkills() {
		link := "/skills/" + d.name + "/SKILL.md"
		list = append(list, map[string]string{"name": d.name, "description": d.description, "link": link})
		text = fmt.Appendf(text, "- [%s](%s): %s\n", d.name, link, d.description)
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

const maxAcceptBytes = 1 << 10 // of an Accept header that is looked at

// prefers picks what an Accept header likes best (RFC 9110, 12.5.1), the first among equals.
func prefers(accept []string, offers ...string) string {
	text := strings.Join(accept, ",")
	if text == "" || text == "*/*" || len(text) > maxAcceptBytes {
		return offers[0] // as nearly every client does
	}
	best, most := offers[0], 0.0
	for _, offer := range offers {
		family, _, _ := strings.Cut(offer, "/")
		q, closest := 0.0, -1 // of the range that names this offer most closely
		for part := range strings.SplitSeq(strings.ToLower(text), ",") {
			kind, params, _ := strings.Cut(strings.ReplaceAll(part, " ", ""), ";")
			if rank := slices.Index([]string{"*/*", family + "/*", offer}, kind); rank > closest {
				q, closest = 1, rank
				if _, weight, ok := strings.Cut(params, "q="); ok {
					q, _ = strconv.ParseFloat(weight, 64)
				}
			}
		}
		if q > most {
			best, most = offer, q
		}
	}
	return best
}

const (
	pageHead = `<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>agent-exec</title>
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
