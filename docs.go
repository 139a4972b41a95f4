// This file is what documents are made of: the embedded ones, frontmatter, negotiation, HTML; it is apart from server.go, as it is about texts, and can be judged without knowing what a request may do.
// It may turn bytes into other bytes.
// It must not read a file, know a request, or write an answer.
package main

import (
	"embed"
	"errors"
	"fmt"
	"html"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

//go:embed skills/*/SKILL.md skills/_root.md
var skillFiles embed.FS

// document is one of the texts that an agent reads.
type document struct {
	name, description string
	markdown          []byte
}

func readSkills() (skills []document, err error) {
	dirs, err := skillFiles.ReadDir("skills")
	for _, dir := range dirs {
		if !dir.IsDir() {
			continue
		}
		d, file := document{}, "skills/"+dir.Name()+"/SKILL.md"
		if d.markdown, err = skillFiles.ReadFile(file); err == nil {
			d.name, d.description, err = frontmatter(d.markdown)
		}
		if err != nil {
			return nil, fmt.Errorf("embedded document %q: %w", file, err)
		}
		skills = append(skills, d)
	}
	return skills, err
}

// frontmatter reads the name and one-line description at the head of a SKILL.md (Agent Skills); the error says what is wrong with it.
func frontmatter(doc []byte) (name, description string, err error) {
	text := strings.ReplaceAll(string(doc), "\r\n", "\n")
	head, _, closed := strings.Cut(strings.TrimPrefix(text, "---\n"), "\n---\n")
	if !strings.HasPrefix(text, "---\n") || !closed {
		return "", "", errors.New("it does not begin with frontmatter, name and description between two lines of ---")
	}
	for line := range strings.SplitSeq(head, "\n") {
		key, value, _ := strings.Cut(line, ":")
		if value = strings.TrimSpace(value); len(value) > 1 && strings.ContainsAny(value[:1], `"'`) && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		switch key {
		case "name":
			name = value
		case "description":
			description = value
		}
	}
	if name == "" || description == "" || strings.ContainsAny(description[:1], "|>") {
		return name, "", errors.New("its frontmatter needs a name and a description, each on one line")
	}
	return name, description, nil
}

// prefers picks what an Accept header likes best (RFC 9110, 12.5.1), the first among equals.
func prefers(accept []string, offers ...string) string {
	if len(accept) == 0 || len(accept) == 1 && accept[0] == "*/*" {
		return offers[0] // as nearly every client does
	}
	best, most := offers[0], 0.0
	for _, offer := range offers {
		family, _, _ := strings.Cut(offer, "/")
		q, closest := 0.0, -1 // of the range that names this offer most closely
		for part := range strings.SplitSeq(strings.ToLower(strings.Join(accept, ",")), ",") {
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
