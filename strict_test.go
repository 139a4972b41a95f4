package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// strictReasons are the only ones for which the reader may refuse what encoding/json takes.
var strictReasons = regexp.MustCompile(`^(\d+):(\d+): (is not UTF-8|has the key .* twice|has more than 524288 commas)$`)

var strictSeeds = []string{
	`{"args":["aexec","--version"]}`, `{"args":["a"],"args":["b"]}`, `{"a":{"b":[1,-0.5e+9,true,false,null,"x"]}}`, ` [ ] `, `{}`, `""`, `0`, `null`,
	`{"a":1,}`, `[1,]`, `[1 2]`, `{"a" 1}`, `{a:1}`, `{"a":1}{}`, `{"a":1}x`, `[01]`, `[1.]`, `["\u00`, `"\ud83d\ude00"`, `"\ud83d"`, `"\\\ud83d\\\ude00"`, `"\uDE00\ud83d"`,
	"\ufeff{}", "\"\xff\"", "[\"\\x\"]", "\"a\nb\"", "{\"\\u0061\":1,\"a\":2}", strings.Repeat("[", 65) + strings.Repeat("]", 65), "", " ", "\t\r\n[\t1\r,\n2]", `"\u0000"`, `{"":{"":""}}`,
}

func decodeJSON(t testing.TB, data []byte) any {
	t.Helper()
	var value any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&value); err != nil {
		t.Fatalf("encoding/json refuses %q: %v", data, err)
	}
	return value
}

// strictPlain is what the reader made of the text, as encoding/json would have it, numbers as written.
func strictPlain(n *node) any {
	list, object := []any{}, map[string]any{}
	for i, v := range n.items {
		list = append(list, strictPlain(v))
		if n.kind == '{' {
			object[n.keys[i].str] = strictPlain(v)
		}
	}
	return map[byte]any{'{': object, '[': list, '"': n.str, 'u': n.str, '0': json.Number(n.raw), 't': n.raw == "true"}[n.kind]
}

// checkPlaces holds every node to its place: the bytes there are the value, the bytes at a key are the key.
func checkPlaces(t *testing.T, data []byte, n *node) {
	t.Helper()
	if got := decodeJSON(t, data[n.start:n.end()]); !reflect.DeepEqual(got, strictPlain(n)) {
		t.Errorf("at %d to %d of %q stands %v, and the node says %v", n.start, n.end(), data, got, strictPlain(n))
	}
	for i, v := range n.items {
		if n.kind == '{' {
			var key string
			if err := json.NewDecoder(bytes.NewReader(data[n.keys[i].start:])).Decode(&key); err != nil || key != n.keys[i].str {
				t.Errorf("key %q of %q is said to be at %d", n.keys[i].str, data, n.keys[i].start)
			}
		}
		checkPlaces(t, data, v)
	}
}

func FuzzStrictJSON(f *testing.F) {
	for _, seed := range strictSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := parseStrict(data)
		if err == nil {
			if !json.Valid(data) || !utf8.Valid(data) {
				t.Fatalf("accepts %q", data)
			}
			if want := decodeJSON(t, data); !reflect.DeepEqual(strictPlain(n), want) {
				t.Fatalf("reads %q as %v, encoding/json as %v", data, strictPlain(n), want)
			}
			if len(data) < 1000 {
				checkPlaces(t, data, n)
			}
			return
		}
		var line, column int
		fmt.Sscanf(err.Error(), "%d:%d: ", &line, &column)
		if line < 1 || column < 1 || line > 1+bytes.Count(data, []byte("\n")) || column > 1+len(data) {
			t.Fatalf("%q: error %v", data, err)
		}
		if json.Valid(data) && !strictReasons.MatchString(err.Error()) {
			t.Fatalf("refuses %q for no named reason: %v", data, err)
		}
	})
}

func TestStrictErrors(t *testing.T) {
	var out strings.Builder
	for _, c := range []string{
		"", " ", "{", `{"a"`, `{"a":`, `{"a":1`, `{"a":1,}`, `{a:1}`, `{"a" 1}`, `{"a":1 "b":2}`, `[1,]`, `[1 2]`, `[1`, `["x`, `["\x"]`, `["\u12"]`, "[\"a\nb\"]", `[01]`, `[1.]`, `[-]`, `[+1]`, `[.5]`, `[1e]`,
		`tru`, `nul`, `NaN`, `'a'`, `{}{}`, `{} x`, `{}` + "\x00", `{"a":1,"b":2,"a":3}`, "{\n  \"a\": {\n    \"x\": 1,\n    \"\\u0078\": 2\n  }\n}", "\ufeff{}", "[\"a\",\n\"\xff\"]", "{\n\"a\": [1,\n 2,\n ;]}",
		strings.Repeat("[", 10001) + strings.Repeat("]", 10001), `{"a` + "\u202e" + `":1,"a` + "\u202e" + `":1}`, "// no\n{}", `{"a":1} // no`,
	} {
		_, err := parseStrict([]byte(c))
		if err == nil {
			t.Errorf("accepts %q", c)
		}
		fmt.Fprintf(&out, "%.60q\n    %v\n", c, err)
	}
	configGolden(t, "strict_errors", out.String())
}

func TestStrictAcceptsWhatIsLarge(t *testing.T) {
	deep := strings.Repeat("[", 10000) + strings.Repeat("]", 10000)
	wide := "[" + strings.Repeat("1,", 1<<19-2) + "1]" // 1 MiB
	var keys strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&keys, `,"%d":0`, i)
	}
	for name, text := range map[string]string{"deep": deep, "wide": wide, "keys": "{" + keys.String()[1:] + "}", "string": `"` + strings.Repeat(`a\n`, 300_000) + `"`} {
		n, err := parseStrict([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if name == "wide" && len(n.items) != 1<<19-1 {
			t.Errorf("%d elements are left of half a million", len(n.items))
		}
	}
	if _, err := parseStrict([]byte("[" + strings.Repeat("1,", 1<<19+1) + "1]")); err == nil || !strings.Contains(err.Error(), "more than 524288 commas") {
		t.Errorf("more than half a million commas: %v", err)
	}
}

func TestStrictSurrogates(t *testing.T) {
	for text, lone := range map[string]bool{
		`"\ud83d\ude00"`: false, `"\uD83D\uDE00"`: false, `"\ud83d"`: true, `"\ude00"`: true, `"\ud83dx"`: true, `"\ud83d\ud83d\ude00"`: true, `"\ude00\ud83d"`: true,
		`"\ud83d\u0041"`: true, `"\\ud83d"`: false, `"\\\ud83d"`: true, `"\ud83d\\ude00"`: true, `"\ud83d\\\ude00"`: true, `"\ufffd"`: false, `"` + "\ufffd" + `\n"`: false,
		`"\ud7ff\ue000"`: false, `"\ud83d\ude00\ud83d\ude00"`: false, `"\ud83d\ude00\ude00"`: true, `"x"`: false, `"\udbff\udfff"`: false,
	} {
		n, err := parseStrict([]byte(text))
		if err != nil || (n.kind == 'u') != lone || n.str != decodeJSON(t, []byte(text)) {
			t.Errorf("%s: kind %q, %q, %v", text, n.kind, n.str, err)
		}
	}
}

func TestEditList(t *testing.T) {
	for _, c := range []struct {
		name, before, key, value string
		remove                   bool
		after                    string // "" for there or not there: nothing is changed
	}{
		{"empty", `{"exec":{"allow":[]}}`, "exec.allow", "x", false, `{"exec":{"allow":["x"]}}`},
		{"empty with space", `{"exec":{"allow":[ ]}}`, "exec.allow", "x", false, `{"exec":{"allow":["x" ]}}`},
		{"one", `{"exec":{"allow":["a"]}}`, "exec.allow", "x", false, `{"exec":{"allow":["a", "x"]}}`},
		{"close together", `{"exec":{"allow":["a","b"]}}`, "exec.allow", "x", false, `{"exec":{"allow":["a","b", "x"]}}`},
		{"one a line", "{\"exec\":{\"allow\":[\n    \"a\"\n  ]}}", "exec.allow", "x", false, "{\"exec\":{\"allow\":[\n    \"a\",\n    \"x\"\n  ]}}"},
		{"leading commas", "{\"exec\":{\"allow\":[ \"a\"\n , \"b\"\n]}}", "exec.allow", "x", false, "{\"exec\":{\"allow\":[ \"a\"\n , \"b\", \"x\"\n]}}"},
		{"no list", "{\n  \"exec\": {\n    \"cwd\": \"/\"\n  }\n}", "exec.allow", "x", false, "{\n  \"exec\": {\n    \"cwd\": \"/\",\n    \"allow\": [\"x\"]\n  }\n}"},
		{"no exec", "{\n\t\"ip\": {} }", "exec.deny", "x", false, "{\n\t\"ip\": {},\n\t\"exec\": { \"deny\": [\"x\"] } }"},
		{"nothing", `{}`, "exec.allow", "x", false, `{"exec": { "allow": ["x"] }}`},
		{"to be escaped", `{"exec":{"allow":[]}}`, "exec.allow", "a\n<\"\\>", false, `{"exec":{"allow":["a\n<\"\\>"]}}`},
		{"there", `{"exec":{"allow":["a","\u0078"]}}`, "exec.allow", "x", false, ""},
		{"remove first", `{"exec":{"allow":["x", "b" ]}}`, "exec.allow", "x", true, `{"exec":{"allow":["b" ]}}`},
		{"remove last", `{"exec":{"allow":["a" , "x" ]}}`, "exec.allow", "x", true, `{"exec":{"allow":["a" ]}}`},
		{"remove from within", "{\"exec\":{\"allow\":[\n\"a\",\n\"x\",\n\"b\"\n]}}", "exec.allow", "x", true, "{\"exec\":{\"allow\":[\n\"a\",\n\"b\"\n]}}"},
		{"remove the only", `{"exec":{"allow":[ "x" ]}}`, "exec.allow", "x", true, `{"exec":{"allow":[  ]}}`},
		{"remove all", `{"exec":{"allow":["x","a","x","x","b","\u0078"]}}`, "exec.allow", "x", true, `{"exec":{"allow":["a","b"]}}`},
		{"remove what is not there", `{"exec":{"allow":["a"]}}`, "exec.allow", "x", true, ""},
		{"remove from no list", `{}`, "exec.allow", "x", true, ""},
		{"comments stay", `{"_a":["x"],"exec":{"_allow":["x"],"allow":["x"]}}`, "exec.allow", "x", true, `{"_a":["x"],"exec":{"_allow":["x"],"allow":[]}}`},
	} {
		if got, want := editList(c.before, c.key, c.value, c.remove), cmp.Or(c.after, c.before); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", c.name, got, want)
		}
	}
}

// FuzzEditList: what was added can be taken away again, and nothing else has moved.
func FuzzEditList(f *testing.F) {
	f.Add(`{"exec":{"allow":["a", "b"]}}`, "x")
	f.Add("{\"exec\":{\n\"allow\": [ ]}}", "\x00")
	f.Add(`{"a":[{"b":[]}]}`, "")
	f.Fuzz(func(t *testing.T, text, value string) {
		if _, err := parseSettings(paths{}, []byte(text)); err != nil || !utf8.ValidString(value) {
			return
		}
		added := editList(text, "exec.allow", value, false)
		if added == text {
			return
		}
		n, err := parseStrict([]byte(added))
		if err != nil {
			t.Fatalf("%q with %q became %q: %v", text, value, added, err)
		}
		list := n.get("exec").get("allow")
		if last := list.items[len(list.items)-1]; last.str != value {
			t.Fatalf("%q with %q became %q", text, value, added)
		}
		removed := editList(added, "exec.allow", value, true)
		before, _ := parseStrict([]byte(text))
		if exec := before.get("exec"); exec != nil && exec.get("allow") != nil && removed != text {
			t.Fatalf("%q became %q and back %q", text, added, removed)
		}
	})
}

func BenchmarkStrictBody(b *testing.B) {
	body := []byte(`{"args":["git","log","--oneline","-n","20","--","src/main.go"]}`)
	b.Run("strict", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := parseStrict(body); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("floor-unmarshal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var v struct{ Args []string }
			if err := json.Unmarshal(body, &v); err != nil {
				b.Fatal(err)
			}
		}
	})
}
