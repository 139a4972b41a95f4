// This file is the strict JSON reader, for bodies and files both, and the edits that leave the rest of a JSON text as it was written.
// It may look at bytes and make others of them.
// It must not do I/O, keep state, or accept what encoding/json would not: it only ever refuses more.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	maxJSONDepth  = 64      // arrays and objects within each other; ours need five
	maxJSONValues = 1 << 19 // as many as 1 MiB can hold; each takes about 120 bytes of memory
)

// node is one JSON value of the strict reader, with its place in the text.
type node struct {
	kind       byte     // '{' '[' '"' '0' 't' 'f' 'n'
	surrogate  bool     // the string holds a lone surrogate escape
	start, end int      // byte offsets into the text
	str        string   // the string, or the number's literal
	keys       []string // of an object, in order, unique
	keyAt      []int    // byte offset of each key
	items      []*node  // of an object or an array
}

// get is the member of an object, or nil.
func (n *node) get(key string) *node {
	if i := slices.Index(n.keys, key); i >= 0 {
		return n.items[i]
	}
	return nil
}

// equal compares what is said, not how it is written.
func (n *node) equal(o *node) bool {
	return n.kind == o.kind && n.str == o.str && slices.Equal(n.keys, o.keys) && slices.EqualFunc(n.items, o.items, (*node).equal)
}

// jsonError is what the strict reader found wrong, and where (line and column from 1, in bytes).
type jsonError struct {
	Line, Col int
	Msg       string
}

func (e *jsonError) Error() string {
	return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Col, e.Msg)
}

// jsonErrorIn names the file of a *jsonError; others pass as they are.
func jsonErrorIn(file string, err error) error {
	if e := (*jsonError)(nil); errors.As(err, &e) {
		return fmt.Errorf("%s:%d:%d: %s", file, e.Line, e.Col, e.Msg)
	}
	return err
}

func newJSONError(text string, at int, format string, args ...any) *jsonError {
	before := text[:at]
	return &jsonError{1 + strings.Count(before, "\n"), at - strings.LastIndexByte(before, '\n'), fmt.Sprintf(format, args...)}
}

// strictReader walks through text that encoding/json has found valid, and so cannot meet a syntax error.
type strictReader struct {
	text               string
	pos, depth, values int
	free               []node // nodes are allocated in batches
	err                *jsonError
}

// parseStrict reads one JSON value and nothing after it: no duplicate keys, no invalid UTF-8, no byte order mark,
// nesting of at most maxJSONDepth, at most maxJSONValues values. Errors are *jsonError.
func parseStrict(data []byte) (*node, error) {
	r := &strictReader{text: string(data)}
	if strings.HasPrefix(r.text, "\ufeff") {
		return nil, newJSONError(r.text, 0, "begins with a byte order mark: save it without one")
	}
	if !utf8.Valid(data) {
		at := 0
		for c, n := utf8.DecodeRune(data); c != utf8.RuneError || n != 1; c, n = utf8.DecodeRune(data[at:]) {
			at += n
		}
		return nil, newJSONError(r.text, at, "is not UTF-8")
	}
	if !json.Valid(data) {
		var syntax *json.SyntaxError
		errors.As(json.Unmarshal(data, new(json.RawMessage)), &syntax)
		return nil, newJSONError(r.text, max(int(syntax.Offset)-1, 0), "%v", syntax)
	}
	root := r.value()
	if r.err != nil {
		return nil, r.err
	}
	return root, nil
}

// next skips what may stand before a value, a key or a closing bracket, and gives its first byte.
func (r *strictReader) next() byte {
	for strings.IndexByte(" \t\r\n,:", r.text[r.pos]) >= 0 {
		r.pos++
	}
	return r.text[r.pos]
}

func (r *strictReader) fail(at int, format string, args ...any) {
	if r.err == nil {
		r.err = newJSONError(r.text, at, format, args...)
	}
}

func (r *strictReader) value() *node {
	if len(r.free) == 0 {
		r.free = make([]node, min(8+r.values, 1024))
	}
	n := &r.free[0]
	r.free = r.free[1:]
	n.kind, n.start = r.next(), r.pos
	if r.values++; r.values > maxJSONValues {
		r.fail(n.start, "has more than %d values", maxJSONValues)
	}
	switch n.kind {
	case '{', '[':
		r.members(n)
	case '"':
		n.str, n.surrogate = r.string()
	default:
		for r.pos < len(r.text) && strings.IndexByte(" \t\r\n,]}", r.text[r.pos]) < 0 {
			r.pos++
		}
		if n.kind <= '9' { // a digit or a minus sign
			n.kind, n.str = '0', r.text[n.start:r.pos]
		}
	}
	n.end = r.pos
	return n
}

func (r *strictReader) members(n *node) {
	r.pos++
	if r.depth++; r.depth > maxJSONDepth {
		r.fail(n.start, "is nested deeper than %d", maxJSONDepth)
	}
	seen := map[string]bool{}
	for c := r.next(); c != ']' && c != '}' && r.err == nil; c = r.next() {
		if n.kind == '{' {
			n.keyAt = append(n.keyAt, r.pos)
			key, _ := r.string()
			if seen[key] {
				r.fail(n.keyAt[len(n.keys)], "has the key %q twice", key)
			}
			seen[key] = true
			n.keys = append(n.keys, key)
		}
		n.items = append(n.items, r.value())
	}
	r.pos++
	r.depth--
}

// surrogates finds pairs of surrogate escapes, or half of one (4 bytes of it).
var surrogates = regexp.MustCompile(`(?i)\\ud[89ab]..\\ud[c-f]|\\ud[89a-f]`)

// string reads a string; lone says that it holds half a surrogate pair, which becomes U+FFFD as everywhere in Go.
func (r *strictReader) string() (s string, lone bool) {
	start, escaped := r.pos, false
	for r.pos++; r.text[r.pos] != '"'; r.pos++ {
		if r.text[r.pos] == '\\' {
			escaped = true
			r.pos++
		}
	}
	r.pos++
	raw := r.text[start:r.pos]
	if !escaped {
		return raw[1 : len(raw)-1], false
	}
	if err := json.Unmarshal([]byte(raw), &s); err != nil {
		r.fail(start, "%v", err)
	}
	for _, found := range surrogates.FindAllString(strings.ReplaceAll(raw, `\\`, "  "), -1) {
		lone = lone || len(found) == 4
	}
	return s, lone
}

// what names a node's type for people.
func (n *node) what() string {
	return map[byte]string{'{': "an object", '[': "an array", '"': "a string", '0': "a number", 't': "true or false", 'f': "true or false", 'n': "null"}[n.kind]
}

// shown is the value for an error: text as it was sent only quoted, and cut.
func (n *node) shown() string {
	switch n.kind {
	case '"':
		return fmt.Sprintf("%.80q", n.str)
	case '0':
		return fmt.Sprintf("%.30s", n.str)
	}
	return n.what()
}

// plain is the node as encoding/json would have it, numbers as written.
func (n *node) plain() any {
	list, object := make([]any, 0, len(n.items)), map[string]any{}
	for i, v := range n.items {
		list = append(list, v.plain())
		if n.kind == '{' {
			object[n.keys[i]] = v.plain()
		}
	}
	return map[byte]any{'{': object, '[': list, '"': n.str, '0': json.Number(n.str), 't': true, 'f': false}[n.kind]
}

// editList adds a value to the array at a dotted key, or removes it wherever it stands there, and leaves every other byte alone.
func editList(data []byte, key string, value any, remove bool) (edited []byte, there bool, err error) {
	root, err := parseStrict(data)
	if err != nil {
		return nil, false, err
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return nil, false, err
	}
	text := strings.TrimSpace(b.String())
	want, err := parseStrict([]byte(text))
	if err != nil {
		return nil, false, err
	}
	n, rest := root, strings.Split(key, ".")
	for len(rest) > 0 && n.get(rest[0]) != nil {
		n, rest = n.get(rest[0]), rest[1:]
	}
	if len(rest) == 0 && n.kind != '[' || len(rest) > 0 && n.kind != '{' {
		return nil, false, fmt.Errorf("%s is not an array", key)
	}
	if len(rest) > 0 { // not there yet
		text = "[" + text + "]"
		for i := len(rest) - 1; i > 0; i-- {
			text = fmt.Sprintf("{ %q: %s }", rest[i], text)
		}
		text = fmt.Sprintf("%q: %s", rest[0], text)
	}
	at := slices.IndexFunc(n.items, want.equal)
	there = len(rest) == 0 && at >= 0
	switch {
	case remove && there:
		data = cutItem(data, n, at)
		data, _, err = editList(data, key, value, true)
	case !remove && !there:
		data = appendItem(data, n, text)
	}
	return data, there, err
}

// itemStart is where an element, or a member with its key, begins.
func (n *node) itemStart(i int) int {
	if n.kind == '{' {
		return n.keyAt[i]
	}
	return n.items[i].start
}

// appendItem adds text to an array or object, set apart as the others are.
func appendItem(data []byte, n *node, text string) []byte {
	at, count := n.start+1, len(n.items)
	switch {
	case count > 1:
		text = string(data[n.items[count-2].end:n.itemStart(count-1)]) + text
	case count == 1:
		text = "," + cmp.Or(string(data[at:n.itemStart(0)]), " ") + text
	}
	if count > 0 {
		at = n.items[count-1].end
	}
	return slices.Concat(data[:at], []byte(text), data[at:])
}

// cutItem removes one element with the comma that set it apart.
func cutItem(data []byte, n *node, i int) []byte {
	from, to := n.items[i].start, n.items[i].end
	if i > 0 {
		from = n.items[i-1].end
	} else if len(n.items) > 1 {
		to = n.items[1].start
	}
	return slices.Concat(data[:from], data[to:])
}
