package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// pluginPaths is a throw-away configuration directory with an empty plugins/ and the settings that setup writes.
func pluginPaths(t testing.TB) paths {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "config")
	p := paths{dir: dir, settings: filepath.Join(dir, "settings.json"), plugins: filepath.Join(dir, "plugins"), audit: filepath.Join(dir, "audit.jsonl")}
	pluginMust(t, os.MkdirAll(p.plugins, 0o700))
	pluginMust(t, os.WriteFile(p.settings, []byte(defaultSettings), 0o600))
	return p
}

func pluginMust(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const pluginTestSkill = "---\nname: NAME\ndescription: A tool to try plugins with.\n---\n\n# NAME\n"

// pluginWrite makes a plugin with these settings and a right SKILL.md; more are further files, hooks among them executable.
func pluginWrite(t testing.TB, p paths, name, settings string, more map[string]string) string {
	t.Helper()
	dir := filepath.Join(p.plugins, name)
	files := map[string]string{"settings.json": settings, "SKILL.md": strings.ReplaceAll(pluginTestSkill, "NAME", name)}
	for file, text := range more {
		files[file] = text
	}
	for file, text := range files {
		full := filepath.Join(dir, file)
		pluginMust(t, os.MkdirAll(filepath.Dir(full), 0o700))
		mode := fs.FileMode(0o600)
		if strings.HasPrefix(file, "hooks/") {
			mode = 0o700
		}
		pluginMust(t, os.WriteFile(full, []byte(text), mode))
		pluginMust(t, os.Chmod(full, mode))
	}
	return dir
}

// pluginProblems are the messages about one plugin, each from its file's place within the directory on.
func pluginProblems(p paths, problems []*plugin, name string, warnings bool) string {
	var said []string
	for _, problem := range problems {
		if problem.Name == name && pluginStops(problem) != warnings {
			said = append(said, strings.TrimPrefix(strings.TrimPrefix(problem.Problem, "open "), p.plugins+"/"))
		}
	}
	return strings.Join(said, "\n")
}

// pluginStops says whether a plugin with a problem keeps the server from starting.
func pluginStops(p *plugin) bool { return p.Enabled && p.Broken }

// pluginDoctor is what plugin doctor says, and nothing else.
func pluginDoctor(p paths, s *settings) []*plugin {
	_, _, problems := loadPlugins(p, s)
	return problems
}

const pluginExec = `{"plugin":{"type":"exec","command":"tool","apiVersion":1%s},"exec":{"allow":["tool --version"]}}`

func TestPluginLoads(t *testing.T) {
	p := pluginPaths(t)
	pluginWrite(t, p, "notes", `{}`, map[string]string{"references/a.md": "A", "references/b.txt": "B", "public/SKILL.md": "C"})
	pluginWrite(t, p, "skilled", `{"plugin":{"type":"skill","command":"s"},"exec":{"allow":["s -v",["s","..."]],"deny":["s rm"]}}`, nil)
	pluginWrite(t, p, "worker", `{"_why":"a comment","plugin":{"type":"exec","command":"g++","apiVersion":1,"invoke":"exec","before":"hooks/before","after":"hooks/x/after",
		"routes":{"_":"a comment","GET /status":["g++","--version"],"POST /show/{id}/{how}":["g++","show","{id}","{how}","{}"]}}}`,
		map[string]string{"hooks/before": "#!/bin/sh\n", "hooks/x/after": "#!/bin/sh\n"})
	pluginWrite(t, p, "zealot", `{"plugin":{"type":"trusted","command":"z","invoke":"run"}}`, nil)

	_, loaded, problems := loadPlugins(p, &settings{PluginsMode: "auto"})
	if len(problems) != 0 {
		t.Errorf("problems %+v", problems)
	}
	names := []string{}
	for _, pl := range loaded {
		names = append(names, pl.Name+" "+pl.Type+" "+pl.Command+" "+pl.Invoke+" "+pl.Rules.Source+" "+pl.Rules.Command)
	}
	want := []string{"notes skill  exec plugin:notes ", "skilled skill s exec plugin:skilled s", "worker exec g++ exec plugin:worker g++", "zealot trusted z run plugin:zealot z"}
	if !slices.Equal(names, want) {
		t.Fatalf("loaded %q, want %q", names, want)
	}
	if got, want := loaded[1].Rules.Allow, []ruleSpec{{Text: "s -v"}, {Argv: []string{"s", "..."}}}; !reflect.DeepEqual(got, want) {
		t.Errorf("rules %v, want %v", got, want)
	}
	worker := loaded[2]
	if want := map[string][]string{"GET /api/command/worker/status": {"g++", "--version"},
		"POST /api/command/worker/show/{id}/{how}": {"g++", "show", "{id}", "{how}", "{}"}}; !reflect.DeepEqual(worker.routes, want) {
		t.Errorf("routes %q", worker.routes)
	}
	if worker.before != "hooks/before" || worker.after != "hooks/x/after" {
		t.Errorf("hooks %q, %q", worker.before, worker.after)
	}
	if loaded[3].Description != "A tool to try plugins with." {
		t.Errorf("description %q", loaded[3].Description)
	}
}

func TestPluginDocuments(t *testing.T) {
	p := pluginPaths(t)
	pluginWrite(t, p, "notes", `{}`, map[string]string{"references/a.md": "A", "references/b.txt": "B", "references/x/c.md": "C", "public/SKILL.md": "P", "public/more.md": "M"})
	_, loaded, _ := loadPlugins(p, &settings{})
	if len(loaded) != 1 {
		t.Fatal("not loaded")
	}
	for name, want := range map[string]string{"references/a.md": "A", "public/SKILL.md": "P", "SKILL.md": strings.ReplaceAll(pluginTestSkill, "NAME", "notes")} {
		if got, ok := loaded[0].docs[name]; !ok || string(got) != want {
			t.Errorf("document %q is %q, %v", name, got, ok)
		}
	}
	for _, name := range []string{"", "settings.json", "references/b.txt", "references/x/c.md", "public/more.md", "references/../settings.json", "./SKILL.md",
		"../notes/SKILL.md", filepath.Join(p.plugins, "notes/SKILL.md"), "references/a.md\x00", "references\\a.md", "References/a.md"} {
		if got, ok := loaded[0].docs[name]; ok {
			t.Errorf("document %q is served: %q", name, got)
		}
	}
	pluginMust(t, os.WriteFile(filepath.Join(p.plugins, "notes/SKILL.md"), []byte("changed"), 0o600))
	if got, _ := loaded[0].docs["SKILL.md"]; string(got) == "changed" {
		t.Error("a document follows its file without a restart")
	}
}

// TestInvalidPlugins tries each plugin beside a good one, which it must not harm. The wanted text begins with line and column.
func TestInvalidPlugins(t *testing.T) {
	with := func(more string) string { return fmt.Sprintf(pluginExec, more) }
	for _, c := range []struct{ settings, want string }{
		{``, ":1:1: "},
		{`[]`, ":1:1: "},
		{"{\n  \"plugin\": {},\n}", ":3:1: "},
		{`{"plugin":{}} {}`, ":1:"},
		{"{\n \"Plugin\":{}}", `:2:2: "Plugin": is not a setting`},
		{`{"plugin":{"type":"exec","type":"skill"}}`, ":1:26: "},
		{`{"plugin":{"hooks":{}}}`, `:1:12: "plugin.hooks": is not a setting`},
		{`{"exec":{"allow":[],"cwd":"/"}}`, `"exec.cwd": is not a setting`},
		{`{"exec":{"tests":{}}}`, `"exec.tests": is not a setting`},
		{`{"ip":{"allow":"*"}}`, `"ip": is not a setting`},
		{`{"plugin":{"type":null}}`, ":1:19: plugin.type: must be a string"},
		{`{"plugin":{"type":"daemon","command":"tool"}}`, `:1:19: plugin.type: must be skill, exec or trusted`},
		{`{"plugin":{"type":"","command":"tool"}}`, `plugin.type: must be`},
		{`{"plugin":{"type":"system","command":"tool"}}`, `:1:19: plugin.type: must be skill, exec or trusted (system is reserved)`},
		{with(`,"invoke":"shell"`), `plugin.invoke: must be exec or run`},
		{with(`,"invoke":"run"`), `"invoke":"run" goes with "type":"trusted" only`},
		{`{"plugin":{"invoke":"run"}}`, `"type":"trusted" only`},
		{`{"plugin":{"apiVersion":2}}`, ":1:25: plugin.apiVersion: "},
		{`{"plugin":{"apiVersion":1.0}}`, "plugin.apiVersion: "},
		{`{"plugin":{"apiVersion":"1"}}`, `plugin.apiVersion: must be a number`},
		{`{"plugin":{"type":"exec"}}`, "missing plugin.command"},
		{`{"plugin":{"type":"trusted","command":""}}`, "missing plugin.command"},
		{`{"exec":{"allow":["*"]}}`, "missing plugin.command"},
		{`{"plugin":{"command":"exec"}}`, `the command "exec" is reserved`},
		{`{"plugin":{"command":"aexec"}}`, "is reserved"},
		{`{"plugin":{"command":"ae"}}`, "is reserved"},
		{`{"plugin":{"command":"/bin/sh"}}`, `:1:22: plugin.command: must be one word`},
		{`{"plugin":{"command":"my tool"}}`, "must be one word of"},
		{`{"plugin":{"command":".."}}`, "must be one word of"},
		{`{"plugin":{"command":"-x"}}`, "must be one word of"},
		{`{"plugin":{"command":"t*"}}`, "must be one word of"},
		{`{"plugin":{"command":"t\n"}}`, "must be one word of"},
		{`{"plugin":{"command":"to\u0000l"}}`, "plugin.command: "},
		{"{\"plugin\":{\"command\":\"tool\"},\n\"exec\":{\"allow\":[\"tool\",\n  \"other -v\"]}}", "rule \"other -v\" in exec.allow of plugin:bad: "},
		{`{"plugin":{"command":"tool"},"exec":{"allow":["*"]}}`, `rule "*" in exec.allow of plugin:bad: `},
		{`{"plugin":{"command":"tool"},"exec":{"allow":["tool*"]}}`, `rule "tool*" in exec.allow of plugin:bad: `},
		{`{"plugin":{"command":"tool"},"exec":{"allow":["/tool x/"]}}`, "rule "},
		{`{"plugin":{"command":"tool"},"exec":{"allow":[["/^.*$/","x"]]}}`, "rule "},
		{`{"plugin":{"command":"tool"},"exec":{"allow":[["*","..."]]}}`, "rule "},
		{`{"plugin":{"command":"tool"},"exec":{"allow":[[]]}}`, "rule "},
		{`{"plugin":{"command":"tool"},"exec":{"allow":[7]}}`, ":1:47: exec.allow: "},
		{`{"plugin":{"command":"tool"},"exec":{"deny":["/(/"]}}`, `rule "/(/" in exec.deny of plugin:bad: `},
		{`{"plugin":{"command":"tool"},"exec":{"deny":"tool"}}`, `exec.deny: must be an array`},
		{`{"plugin":{"command":"tool","before":"hooks/ok"}}`, "a skill plugin has neither hooks nor routes"},
		{`{"plugin":{"command":"tool","routes":{"GET /x":["tool"]}}}`, "a skill plugin has neither hooks nor routes"},
		{with(`,"before":"/bin/sh"`), `plugin.before: must be a path inside`},
		{with(`,"before":"../good/hooks/ok"`), "must be a path inside"},
		{with(`,"after":"hooks/../../good/hooks/ok"`), "must be a path inside"},
		{with(`,"after":"./hooks/ok"`), "must be a path inside"},
		{with(`,"after":"."`), "must be a path inside"},
		{with(`,"after":"hooks/ok\u0000"`), "plugin.after: "},
		{with(`,"after":"hooks/ok\n"`), "must be a path inside"},
		{with(`,"before":"hooks/none"`), "hooks/none: "},
		{with(`,"before":"hooks"`), "/hooks is not a regular file"},
		{with(`,"before":"SKILL.md"`), "is not executable"},
		{with(`,"before":"hooks/ok/x"`), "hooks/ok/x: "},
		{with(`,"routes":["GET /x"]`), "plugin.routes: must be an object"},
		{with(`,"routes":{"GET /x":"tool"}`), `the route "GET /x" cannot be used`},
		{with(`,"routes":{"GET /x":["tool",1]}`), `the route "GET /x" cannot be used`},
		{with(`,"routes":{"GET /x":[]}`), `the route "GET /x" cannot be used`},
		{with(`,"routes":{"GET /x":[""]}`), "cannot be used"},
		{with(`,"routes":{"GET /x":["tool","a\u0000"]}`), "cannot be used"},
		{with(`,"routes":{"/x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"get /x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"HEAD /x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"CONNECT /x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"GET x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"GET":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"GET example.org/x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"GET  /x":["tool"]}`), `write "METHOD /path": ["command", ...]`},
		{with(`,"routes":{"GET /":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /x/":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /x//y":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /../exec":["tool"]}`), "unclean path"},
		{with(`,"routes":{"GET /a/{x}":["tool"],"GET /a/{y}":["tool"]}`), `{y}" conflicts with pattern "GET /api/command/bad/a/{x}": GET `},
		{with(`,"routes":{"GET /%2e%2e/exec":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /{x...}":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /{$}":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /a{x}":["tool"]}`), "segments of plain text or {name}"},
		{with(`,"routes":{"GET /{1}":["tool"]}`), `bad wildcard name "1"`},
		{with(`,"routes":{"GET /{x}/{x}":["tool"]}`), `duplicate wildcard name "x"`},
		{with(`,"routes":{"GET /{x}":["tool","{y}"]}`), "a {name} of the path stands for a whole argument, and never for the command"},
		{with(`,"routes":{"GET /{x}":["{x}"]}`), `"{x}": a {name} of the path stands for`},
		{with(`,"routes":{"GET /{x}":["tool","--id={x}"]}`), `"--id={x}": a {name} of the path stands for`},
		{with(`,"routes":{"GET /a/{x}":["tool"],"GET /{y}/b":["tool"]}`), "both match some paths"},
		{with(`,"routes":{"GET /{x}":["tool"],"GET /{y}":["tool"]}`), "matches the same requests as"},
	} {
		p := pluginPaths(t)
		pluginWrite(t, p, "bad", c.settings, map[string]string{"hooks/ok": "#!/bin/sh\n"})
		pluginWrite(t, p, "good", `{"plugin":{"type":"exec","command":"fine","before":"hooks/ok"}}`, map[string]string{"hooks/ok": "#!/bin/sh\n"})
		_, loaded, problems := loadPlugins(p, &settings{})
		if said := pluginProblems(p, problems, "bad", false); !strings.Contains(said, c.want) || !strings.HasPrefix(said, "bad/") || strings.Contains(said, "\n") {
			t.Errorf("%s\nsaid %s\nwant %s", c.settings, said, c.want)
		}
		if len(loaded) != 1 || loaded[0].Name != "good" || pluginProblems(p, problems, "good", false) != "" {
			t.Errorf("%s: loaded %v, problems %+v", c.settings, loaded, problems)
		}
		if doctor := pluginDoctor(p, &settings{}); pluginProblems(p, doctor, "bad", false) == "" || pluginProblems(p, doctor, "good", false) != "" {
			t.Errorf("%s: the doctor says %+v", c.settings, doctor)
		}
	}
}

func TestPluginNames(t *testing.T) {
	for _, name := range []string{"a", "0", "my-tool", "a-", strings.Repeat("a", 200)} {
		if _, err := pluginDir(paths{}, name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	bad := append(slices.Clone(reservedPluginWords), "-a", "Tool", "a_b", "a.b", "ä", "a b", "..", "a/b", "a\n", "")
	for _, name := range bad {
		if _, err := pluginDir(paths{}, name); err == nil {
			t.Errorf("%q is admitted", name)
		}
	}
	p := pluginPaths(t)
	names := []string{"-a", "Tool", "a b", "exec", "a.b"}
	for _, name := range append(names, ".git", ".new-tool", ".old-tool") {
		pluginWrite(t, p, name, "not even JSON", nil)
	}
	pluginMust(t, os.WriteFile(filepath.Join(p.plugins, "readme"), nil, 0o600))
	_, _, problems := loadPlugins(p, &settings{})
	for _, name := range append(names, "readme") {
		if pluginProblems(p, problems, name, false) == "" {
			t.Errorf("no problem with %q", name)
		}
	}
	if len(problems) != len(names)+1 {
		t.Errorf("problems %+v", problems)
	}
	if _, _, problems := loadPlugins(paths{plugins: filepath.Join(p.dir, "none")}, &settings{}); len(problems) != 0 {
		t.Errorf("without plugins/: %+v", problems)
	}
}

// TestPluginStrictModes opens one thing after the other to others, or puts a link, a FIFO or a directory in its place.
func TestPluginStrictModes(t *testing.T) {
	chmod := func(mode fs.FileMode, file string) func(string) error {
		return func(dir string) error { return os.Chmod(filepath.Join(dir, file), mode) }
	}
	link := func(file, target string) func(string) error {
		return func(dir string) error {
			full := filepath.Join(dir, file)
			return errors.Join(os.Rename(full, full+".real"), os.Symlink(target, full))
		}
	}
	instead := func(file string, make func(string) error) func(string) error {
		return func(dir string) error {
			full := filepath.Join(dir, file)
			return errors.Join(os.RemoveAll(full), make(full))
		}
	}
	fifo := func(file string) error { return syscall.Mkfifo(file, 0o700) }
	mkdir := func(file string) error { return os.Mkdir(file, 0o700) }
	huge := func(file string) error {
		return errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, maxConfigBytes))
	}
	tries := map[string]struct {
		change func(dir string) error
		want   string
	}{
		"directory group-writable":     {chmod(0o770, ""), "mode 0770"},
		"directory world-writable":     {chmod(0o702, ""), "mode 0702"},
		"settings group-writable":      {chmod(0o660, "settings.json"), "tool/settings.json "},
		"SKILL.md world-writable":      {chmod(0o602, "SKILL.md"), "tool/SKILL.md "},
		"hook group-writable":          {chmod(0o770, "hooks/before"), "tool/hooks/before "},
		"hooks/ world-writable":        {chmod(0o707, "hooks"), "tool/hooks has mode"},
		"references/ group-writable":   {chmod(0o770, "references"), "tool/references has mode"},
		"hook not executable":          {chmod(0o600, "hooks/before"), "chmod u+x"},
		"settings a link":              {link("settings.json", "settings.json.real"), "tool/settings.json "},
		"settings a link out":          {link("settings.json", "/etc/hosts"), "tool/settings.json "},
		"SKILL.md a link out":          {link("SKILL.md", "/etc/hosts"), "tool/SKILL.md "},
		"reference a link out":         {link("references/a.md", "../../../settings.json"), "tool/references/a.md "},
		"references/ a link out":       {link("references", "../../elsewhere"), "tool/references is a symbolic link"},
		"public/ a link out":           {link("public", "../../elsewhere"), "tool/public is a symbolic link"},
		"hook a link out":              {link("hooks/before", "/bin/sh"), "tool/hooks/before "},
		"hook a link within":           {link("hooks/before", "before.real"), "tool/hooks/before "},
		"hooks/ a link":                {link("hooks", "hooks.real"), "tool/hooks is a symbolic link"},
		"settings a FIFO":              {instead("settings.json", fifo), "not a regular file"},
		"SKILL.md a FIFO":              {instead("SKILL.md", fifo), "not a regular file"},
		"reference a FIFO":             {instead("references/a.md", fifo), "not a regular file"},
		"hook a FIFO":                  {instead("hooks/before", fifo), "not a regular file"},
		"hook a directory":             {instead("hooks/before", mkdir), "not a regular file"},
		"settings missing":             {instead("settings.json", func(string) error { return nil }), "settings.json: no such file"},
		"SKILL.md missing":             {instead("SKILL.md", func(string) error { return nil }), "SKILL.md: no such file"},
		"SKILL.md a device":            {link("SKILL.md", "/dev/zero"), "tool/SKILL.md "},
		"SKILL.md too large":           {instead("SKILL.md", huge), "is larger than"},
		"settings too large":           {instead("settings.json", huge), "is larger than"},
		"the directory itself a link":  {func(dir string) error { return errors.Join(os.Rename(dir, dir+"-real"), os.Symlink(dir+"-real", dir)) }, "symbolic link"},
		"the directory itself no such": {func(dir string) error { return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)) }, "not a directory"},
	}
	if os.Geteuid() == 0 {
		for _, file := range []string{"", "settings.json", "SKILL.md", "hooks/before", "hooks"} {
			tries["foreign "+file] = struct {
				change func(dir string) error
				want   string
			}{func(dir string) error { return os.Chown(filepath.Join(dir, file), 65534, 65534) }, "belongs to uid 65534"}
		}
	}
	for name, try := range tries {
		p := pluginPaths(t)
		pluginMust(t, os.Mkdir(filepath.Join(p.dir, "elsewhere"), 0o700))
		pluginMust(t, os.WriteFile(filepath.Join(p.dir, "elsewhere/a.md"), nil, 0o600))
		pluginMust(t, os.WriteFile(filepath.Join(p.dir, "elsewhere/SKILL.md"), nil, 0o600))
		dir := pluginWrite(t, p, "tool", fmt.Sprintf(pluginExec, `,"before":"hooks/before"`),
			map[string]string{"hooks/before": "#!/bin/sh\n", "references/a.md": "A", "public/SKILL.md": "P"})
		if _, loaded, problems := loadPlugins(p, &settings{}); len(loaded) != 1 || len(problems) != 0 {
			t.Fatalf("before the change: %+v", problems)
		}
		pluginMust(t, try.change(dir))
		_, loaded, problems := loadPlugins(p, &settings{PluginsDisabled: []string{"tool-real"}})
		if said := pluginProblems(p, problems, "tool", false); len(loaded) != 0 || !strings.Contains(said, try.want) {
			t.Errorf("%s: loaded %d, said %s, want %s", name, len(loaded), said, try.want)
		}
	}
	p := pluginPaths(t)
	pluginWrite(t, p, "tool", `{}`, nil)
	pluginMust(t, os.Chmod(p.plugins, 0o770))
	if _, loaded, problems := loadPlugins(p, &settings{}); len(loaded) != 0 || len(problems) != 1 || !strings.HasPrefix(problems[0].Problem, p.plugins+" has mode 0770") {
		t.Errorf("plugins/ group-writable: loaded %d, %+v", len(loaded), problems)
	}
}

func TestPluginsEnabled(t *testing.T) {
	p := pluginPaths(t)
	for _, name := range []string{"a", "b", "c"} {
		pluginWrite(t, p, name, `{"plugin":{"command":"`+name+`"}}`, nil)
	}
	pluginWrite(t, p, "a2", `{"plugin":{"command":"a"}}`, nil)
	pluginWrite(t, p, "broken", `{`, nil)
	for _, c := range []struct {
		mode              string
		enabled, disabled string
		want, problems    string
	}{
		{"auto", "", "broken a2", "a b c", ""},
		{"auto", "b", "broken a2", "a b c", ""},
		{"auto", "", "broken", "a b c", "a2"},
		{"auto", "", "broken a", "a2 b c", ""},
		{"explicit", "", "", "", ""},
		{"explicit", "c a", "", "a c", ""},
		{"explicit", "c a", "a", "c", ""},
		{"explicit", "a a2", "", "a", "a2"},
		{"explicit", "a none ../plugins/b", "", "a", "../plugins/b none"},
		{"explicit", "a none", "none", "a", ""},
		{"auto", "", "a2", "a b c", "broken"},
	} {
		s := &settings{PluginsMode: c.mode, PluginsEnabled: strings.Fields(c.enabled), PluginsDisabled: strings.Fields(c.disabled)}
		_, loaded, problems := loadPlugins(p, s)
		var names, bad []string
		for _, pl := range loaded {
			names = append(names, pl.Name)
		}
		for _, problem := range problems { // of disabled ones there are remarks as well
			if pluginStops(problem) {
				bad = append(bad, problem.Name)
			}
		}
		if strings.Join(names, " ") != c.want || strings.Join(bad, " ") != c.problems {
			t.Errorf("%s enabled %q disabled %q: loaded %q, problems %+v", c.mode, c.enabled, c.disabled, names, problems)
		}
	}
	infos, _, _ := loadPlugins(p, &settings{PluginsDisabled: []string{"broken"}})
	if len(infos) != 5 || infos[3].Name != "broken" || infos[3].Enabled || !infos[3].Broken || !infos[0].Enabled || infos[0].Broken || !infos[1].Broken {
		t.Errorf("the list shows %+v", infos)
	}
}

func TestPluginAdvice(t *testing.T) {
	p := pluginPaths(t)
	pluginWrite(t, p, "nohead", `{}`, map[string]string{"SKILL.md": "# no head\n"})
	pluginWrite(t, p, "open", `{}`, map[string]string{"SKILL.md": "---\nname: open\n---\n"})
	if _, loaded, _ := loadPlugins(p, &settings{}); len(loaded) != 2 {
		t.Errorf("advice keeps plugins from loading: %d", len(loaded))
	}
	problems := pluginDoctor(p, &settings{})
	for name, want := range map[string][]string{
		"nohead": {"SKILL.md must begin"},
		"open":   {"SKILL.md must begin", "name and description"},
	} {
		said := pluginProblems(p, problems, name, true)
		for _, w := range want {
			if !strings.Contains(said, w) {
				t.Errorf("%s: %s\nwant %s", name, said, w)
			}
		}
	}
}

func TestPluginFingerprints(t *testing.T) {
	p := pluginPaths(t)
	dir := pluginWrite(t, p, "a", `{"plugin":{"type":"exec","command":"a","before":"hooks/x"}}`, map[string]string{"hooks/x": "1", "references/r.md": "r", "frozen": ""})
	pluginWrite(t, p, "b", `{}`, nil)
	pluginFingerprints := func(p paths) map[string]string {
		state, err := restartState(p)
		pluginMust(t, err)
		maps.DeleteFunc(state, func(name, _ string) bool { return !strings.HasPrefix(name, pluginSource) })
		return state
	}
	before := pluginFingerprints(p)
	if len(before) != 2 || before["plugin:a"] == "" || before["plugin:a"] == before["plugin:b"] || !reflect.DeepEqual(before, pluginFingerprints(p)) {
		t.Fatalf("fingerprints %v", before)
	}
	pluginMust(t, os.WriteFile(filepath.Join(dir, "frozen"), []byte("a file that nothing reads"), 0o600))
	if !reflect.DeepEqual(before, pluginFingerprints(p)) {
		t.Error("a file that is not read at start changes the fingerprint")
	}
	for _, file := range []string{"SKILL.md", "hooks/x", "references/r.md", "references/new.md", "settings.json"} {
		pluginMust(t, os.WriteFile(filepath.Join(dir, file), []byte("something else, and longer"), 0o600))
		after := pluginFingerprints(p)
		if after["plugin:a"] == before["plugin:a"] || after["plugin:b"] != before["plugin:b"] {
			t.Errorf("a change of %s: %v, before %v", file, after, before)
		}
		before = after
	}
}

func TestPluginSees(t *testing.T) {
	p := &plugin{Command: "git"}
	for _, argv := range [][]string{{"git"}, {"git", "log"}, {"/usr/bin/git"}, {"./git"}, {"../x/git", "log"}} {
		if !p.sees(argv) {
			t.Errorf("%q is not seen", argv)
		}
	}
	for _, argv := range [][]string{nil, {}, {""}, {"gitk"}, {"Git"}, {"sh", "git"}, {"/usr/bin/git/x"}} {
		if p.sees(argv) {
			t.Errorf("%q is seen", argv)
		}
	}
	if (&plugin{}).sees([]string{""}) || (&plugin{}).sees([]string{"."}) {
		t.Error("a plugin without a command sees requests")
	}
}

// TestPluginApprove is the table of types: whose hooks and routes are decided again.
func TestPluginApprove(t *testing.T) {
	pol, err := compilePolicy([]ruleSet{{Source: "settings.json", Allow: []ruleSpec{{Text: "tool ok"}}, Deny: []ruleSpec{{Text: "tool never"}}}})
	pluginMust(t, err)
	for _, c := range []struct {
		kind, invoke, arg string
		want              bool
		list              string
	}{
		{"skill", "exec", "ok", true, "allow"}, {"skill", "exec", "other", false, ""}, {"skill", "exec", "never", false, "deny"},
		{"exec", "exec", "ok", true, "allow"}, {"exec", "exec", "other", false, ""}, {"exec", "exec", "never", false, "deny"},
		{"trusted", "exec", "ok", true, "allow"}, {"trusted", "exec", "other", false, ""}, {"trusted", "exec", "never", false, "deny"},
		{"trusted", "run", "ok", true, "trusted"}, {"trusted", "run", "other", true, "trusted"},
		{"exec", "run", "other", false, ""}, // cannot be loaded; and would not run either
	} {
		p := &plugin{Name: "x", Type: c.kind, Invoke: c.invoke, Rules: ruleSet{Source: "plugin:x"}}
		what, d := p.approve(pol, []string{"tool", c.arg})
		if d.Allowed != c.want || d.List != c.list || (len(what.argv) == 2) != c.want {
			t.Errorf("%s with invoke %s, tool %s: %+v, argv %q", c.kind, c.invoke, c.arg, d, what.argv)
		}
		if d.List == "trusted" && (d.Source != "plugin:x" || d.Rule != "") {
			t.Errorf("a trusted decision: %+v", d)
		}
	}
}

func TestPluginRouteArgv(t *testing.T) {
	route := []string{"tool", "show", "{id}", "{how}", "{}", "{other thing}"}
	values := map[string]string{"id": "7", "how": "a b/c*;$(x)"}
	got, err := routeArgv(route, func(name string) string { return values[name] })
	if want := []string{"tool", "show", "7", "a b/c*;$(x)", "{}", "{other thing}"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("argv %q, %v", got, err)
	}
	if route[2] != "{id}" {
		t.Error("the template was changed")
	}
	for _, bad := range []string{"", "-", "-rf", "--help", "a\x00b", "a\nb", "\x1b[2J", "\x7f", "a\u0085", "\xff", "a\xc3", strings.Repeat("a", 128<<10)} {
		values["id"] = bad
		if got, err := routeArgv(route, func(name string) string { return values[name] }); err == nil {
			t.Errorf("the value %q makes %q", bad[:min(len(bad), 20)], got[:1])
		}
	}
}

func TestHookOutput(t *testing.T) {
	refusal := func(status int, code, message string) (out hookOutput) {
		pluginMust(t, json.Unmarshal(fmt.Appendf(nil, `{"error":{"status":%d,"code":%q,"message":%q}}`, status, code, message), &out))
		return out
	}
	for _, c := range []struct {
		which, text string
		want        hookOutput
	}{
		{"before", "", hookOutput{}},
		{"after", " \n\t", hookOutput{}},
		{"before", `{"args":["tool","x"]}` + "\n", hookOutput{Args: []string{"tool", "x"}}},
		{"after", `{"result":{"output":"o","stderr":"e","exitCode":3,"status":"error","duration":1,"signal":"SIGSEGV","error":"e","message":"m"}}`,
			hookOutput{Result: map[string]any{"output": "o", "stderr": "e", "exitCode": 3.0, "status": "error", "duration": 1.0, "signal": "SIGSEGV", "error": "e", "message": "m"}}},
		{"after", `{"result":{}}`, hookOutput{Result: map[string]any{}}},
		{"after", `{"result":{"exitCode":null}}`, hookOutput{Result: map[string]any{"exitCode": nil}}},
		{"before", `{"error":{"status":400,"code":"not_now","message":"later"}}`, refusal(400, "not_now", "later")},
		{"after", `{"error":{"message":"m","status":599,"code":"a_0"}}`, refusal(599, "a_0", "m")},
	} {
		if got, err := parseHookOutput([]byte(c.text), c.which); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %s: %+v, %v", c.which, c.text, got, err)
		}
	}
	both := []string{"x", "null", "[]", "{}", `"args"`, `{"args":["a"]} x`, `{"args":["a"]}{"args":["b"]}`, "\ufeff{}", "{\"args\":[\"a\xff\"]}", `{"args":["a"],"args":["b"]}`,
		`{"args":["a"],"result":{"status":"done"}}`, `{"args":["a"],"x":1}`, `{"stdout":"x"}`, `{"error":null}`, `{"error":"no"}`, `{"error":{}}`, `{"error":[]}`,
		`{"error":{"status":200,"code":"x","message":"m"}}`, `{"error":{"status":399,"code":"x","message":"m"}}`, `{"error":{"status":600,"code":"x","message":"m"}}`,
		`{"error":{"status":"400","code":"x","message":"m"}}`, `{"error":{"status":400.5,"code":"x","message":"m"}}`, `{"error":{"status":400,"code":"","message":"m"}}`,
		`{"error":{"status":400,"code":"x","message":""}}`, `{"error":{"status":400,"code":"x"}}`, `{"error":{"status":400,"code":"x","message":"m","retryable":true}}`,
		`{"error":{"status":400,"code":"x","message":7}}`}
	bad := map[string][]string{
		"before": append([]string{`{"result":{"status":"done"}}`, `{"args":null}`, `{"args":[]}`, `{"args":"tool x"}`, `{"args":[""]}`, `{"args":[" "]}`, `{"args":["a",1]}`, `{"args":["a",["b"]]}`,
			`{"args":["a\u0000"]}`, `{"args":["\ud800"]}`, `{"args":["tool","` + strings.Repeat("a", 128<<10) + `"]}`}, both...),
		"after": append([]string{`{"args":["tool"]}`, `{"result":null}`, `{"result":[]}`, `{"result":"x"}`}, both...),
	}
	for which, texts := range bad {
		for _, text := range texts {
			if got, err := parseHookOutput([]byte(text), which); err == nil || !reflect.DeepEqual(got, hookOutput{}) {
				t.Errorf("%s %.80s: %+v, %v", which, text, got, err)
			}
		}
	}
}

// pluginRun gives hooks a real process, with limits small enough to meet in a test.
func pluginRun(t testing.TB) func(approved, []byte) outcome {
	return func(what approved, stdin []byte) outcome {
		c := testCommand()
		c.what, c.stdin, c.maxBytes, c.timeout = what, stdin, 64<<10, 2*time.Second
		return theRunner(t).run(t.Context(), c)
	}
}

func TestRunHook(t *testing.T) {
	for name, c := range map[string]struct{ script, want, fails string }{
		"silent":        {"cat >/dev/null", "unchanged", ""},
		"does not read": {"exit 0", "unchanged", ""},
		"rewrites":      {`echo '{"args":["other"]}'`, `args ["other"]`, ""},
		"sees it all":   {`grep -q '"args":\["tool","x"\],"originalArgs":\["tool"\],"plugin":{.*"name":"p",.*"request":{"method":"POST"' && echo '{"error":{"status":418,"code":"seen","message":"m"}}'`, "error 418", ""},
		"exits 1":       {`echo '{"args":["other"]}'; echo why >&2; exit 1`, "", `"why\n"`},
		"lies":          {"echo ok", "", "1:1: "},
		"is killed":     {"kill -9 $$", "", "SIGKILL"},
		"floods":        {`while :; do echo '{"args":["other"]}'; done`, "", string(endOutput)},
		"hangs":         {"exec sleep 1000", "", string(endTimeout)},
		"no program":    {"", "", string(endStart)},
	} {
		t.Run(name, func(t *testing.T) {
			p := pluginPaths(t)
			text := "#!/bin/sh\n" + c.script + "\n"
			if c.script == "" {
				text = "#!/no/such/interpreter\n"
			}
			pluginWrite(t, p, "p", fmt.Sprintf(pluginExec, `,"before":"hooks/before"`), map[string]string{"hooks/before": text})
			_, loaded, problems := loadPlugins(p, &settings{})
			if len(loaded) != 1 {
				t.Fatal(problems)
			}
			in := map[string]any{"args": []string{"tool", "x"}, "originalArgs": []string{"tool"}, "request": map[string]any{"method": "POST"}}
			out, err := loaded[0].runHook("before", in, pluginRun(t))
			got := "unchanged"
			switch {
			case err != nil:
				got = ""
			case out.Args != nil:
				got = fmt.Sprintf("args %q", out.Args)
			case out.Error != nil:
				got = fmt.Sprint("error ", out.Error.Status)
			}
			if got != c.want || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
				t.Errorf("got %s, want %s; error %v", got, c.want, err)
			}
		})
	}
}

// TestHookIsTheFileThatWasChecked exchanges a hook in every way after it was loaded: none of them runs.
func TestHookIsTheFileThatWasChecked(t *testing.T) {
	for name, change := range map[string]func(file string) error{
		"rewritten": func(file string) error { return os.WriteFile(file, []byte("#!/bin/sh\necho 1\n"), 0o700) },
		"same size, old time": func(file string) error {
			info, err := os.Stat(file)
			return errors.Join(err, os.WriteFile(file, []byte("#!/bin/sh\nexit 1\n"), 0o700), os.Chtimes(file, info.ModTime(), info.ModTime()))
		},
		"replaced": func(file string) error {
			return errors.Join(os.WriteFile(file+"2", []byte("#!/bin/sh\nexit 0\n"), 0o700), os.Rename(file+"2", file))
		},
		"a link":         func(file string) error { return errors.Join(os.Rename(file, file+"2"), os.Symlink(file+"2", file)) },
		"group-writable": func(file string) error { return os.Chmod(file, 0o770) },
		"removed":        os.Remove,
		"its directory exchanged": func(file string) error {
			dir := filepath.Dir(file)
			return errors.Join(os.Rename(dir, dir+"2"), os.Symlink(dir+"2", dir))
		},
		"its directory opened": func(file string) error { return os.Chmod(filepath.Dir(file), 0o777) },
	} {
		p := pluginPaths(t)
		pluginWrite(t, p, "p", fmt.Sprintf(pluginExec, `,"after":"hooks/after"`), map[string]string{"hooks/after": "#!/bin/sh\nexit 0\n"})
		_, loaded, problems := loadPlugins(p, &settings{})
		if len(loaded) != 1 {
			t.Fatal(problems)
		}
		ran := 0
		run := func(what approved, stdin []byte) outcome {
			ran++
			if len(what.argv) != 1 || what.argv[0] != filepath.Join(p.plugins, "p/hooks/after") {
				t.Errorf("runs %q", what.argv)
			}
			return outcome{end: endExit, exited: true}
		}
		if _, err := loaded[0].runHook("after", map[string]any{}, run); err != nil || ran != 1 {
			t.Fatalf("unchanged: %v, ran %d times", err, ran)
		}
		pluginMust(t, change(filepath.Join(loaded[0].dir, loaded[0].after)))
		if _, err := loaded[0].runHook("after", map[string]any{}, run); err == nil || ran != 1 {
			t.Errorf("%s: it ran all the same (%v)", name, err)
		}
	}
}

// TestExamplePlugins loads what the README explains, as it lies in the repository, and runs its hooks.
func TestExamplePlugins(t *testing.T) {
	p := pluginPaths(t)
	pluginMust(t, os.Chmod(p.plugins, 0o700))
	pluginMust(t, os.CopyFS(p.plugins, os.DirFS("testdata/plugins")))
	pluginMust(t, filepath.WalkDir(p.plugins, func(file string, _ fs.DirEntry, walked error) error {
		info, err := os.Stat(file)
		return errors.Join(walked, err, os.Chmod(file, info.Mode().Perm()&^0o022)) // whatever the umask of the checkout
	}))
	_, loaded, problems := loadPlugins(p, &settings{})
	if len(loaded) != 2 || len(problems) != 0 {
		t.Fatalf("loaded %d, problems %+v", len(loaded), problems)
	}
	if doctor := pluginDoctor(p, &settings{}); len(doctor) != 0 {
		t.Errorf("the doctor says %+v", doctor)
	}
	tail := loaded[1]
	out, err := tail.runHook("before", map[string]any{"args": []string{"tail"}}, pluginRun(t))
	if err != nil || !reflect.DeepEqual(out, hookOutput{}) {
		t.Errorf("before: %+v, %v", out, err)
	}
	pluginMust(t, os.WriteFile(filepath.Join(tail.dir, "closed"), nil, 0o600))
	if out, err = tail.runHook("before", map[string]any{"args": []string{"tail"}}, pluginRun(t)); err != nil || out.Error == nil || out.Error.Status != 409 {
		t.Errorf("before, closed: %+v, %v", out, err)
	}
	for output, withheld := range map[string]bool{"all is well\n": false, "sshd: Failed Password for root\n": true} {
		in := map[string]any{"result": map[string]any{"output": output, "exitCode": 0, "status": "done", "duration": 3, "length": len(output)}}
		if out, err = tail.runHook("after", in, pluginRun(t)); err != nil || (out.Result != nil) != withheld {
			t.Errorf("after, %q: %+v, %v", output, out, err)
		} else if withheld && out.Result["length"] != float64(len(out.Result["output"].(string))) {
			t.Errorf("the result is said to be %v", out.Result)
		}
	}
}

// pluginTool is what a made-up tool answers to one argument; another is answered like a missing option.
type pluginTool map[string]outcome

func pluginSays(code int, stdout, stderr string) outcome {
	return outcome{end: endExit, exited: true, exitCode: code, stdout: chunks{[]byte(stdout)}, stderr: chunks{[]byte(stderr)}}
}

func pluginProbe(tools map[string]pluginTool, asked *[]string) func(context.Context, command) outcome {
	return func(_ context.Context, c command) outcome {
		argv := c.what.argv
		*asked = append(*asked, strings.Join(argv, " "))
		tool, there := tools[argv[0]]
		if !there {
			return outcome{end: endStart, exited: true, exitCode: 127}
		}
		if out, knows := tool[argv[1]]; knows {
			return out
		}
		return pluginSays(2, "", "unknown option")
	}
}

func TestCreatePluginAsksTheTool(t *testing.T) {
	timeout := outcome{end: endTimeout, stdout: chunks{[]byte("part of it")}}
	flood := outcome{end: endOutput, stdout: chunks{bytes.Repeat([]byte("x"), 10<<10)}}
	for name, c := range map[string]struct {
		tool  pluginTool
		allow []string
		asked int
	}{
		"usual":        {pluginTool{"--help": pluginSays(0, "usage: tool", ""), "--version": pluginSays(0, "tool 1", "")}, []string{"tool --help", "tool --version"}, 2},
		"on stderr":    {pluginTool{"--help": pluginSays(0, "", "usage"), "--version": pluginSays(0, "", "1")}, []string{"tool --help", "tool --version"}, 2},
		"short":        {pluginTool{"-h": pluginSays(0, "usage", ""), "-v": pluginSays(0, "1", "")}, []string{"tool -h", "tool -v"}, 4},
		"words":        {pluginTool{"help": pluginSays(0, "usage", ""), "version": pluginSays(0, "1", "")}, []string{"tool help", "tool version"}, 6},
		"exits 1":      {pluginTool{"--help": pluginSays(1, "", "usage: tool")}, []string{}, 6},
		"says nothing": {pluginTool{"--help": pluginSays(0, "\n", " "), "-h": pluginSays(0, "usage", ""), "--version": pluginSays(0, "1", "")}, []string{"tool -h", "tool --version"}, 3},
		"hangs once":   {pluginTool{"--help": timeout, "-h": pluginSays(0, "usage", ""), "--version": pluginSays(0, "1", "")}, []string{"tool -h", "tool --version"}, 3},
		"floods once":  {pluginTool{"--help": flood, "-h": flood, "help": flood, "--version": pluginSays(0, "1", "")}, []string{"tool --version"}, 4},
		"always hangs": {pluginTool{"--help": timeout, "-h": timeout, "help": timeout, "--version": timeout, "-v": timeout, "version": timeout}, []string{}, 6},
		"is not there": {nil, []string{}, 6},
	} {
		p := pluginPaths(t)
		tools := map[string]pluginTool{"tool": c.tool}
		if c.tool == nil {
			tools = nil
		}
		var asked []string
		found, made, err := createPlugin(p, &snapshot{}, plugin{Name: "t", Command: "tool", Type: "skill"}, false, true, pluginProbe(tools, &asked))
		if err != nil || found != (c.tool != nil) || len(asked) != c.asked {
			t.Errorf("%s: %v, %s, %v, asked %q", name, found, made, err, asked)
			continue
		}
		pl := pluginCheckMade(t, p, "t")
		allow := []string{}
		for _, r := range pl.Rules.Allow {
			allow = append(allow, r.String())
		}
		if !slices.Equal(allow, c.allow) {
			t.Errorf("%s: allows %q, want %q", name, allow, c.allow)
		}
		if onDisk, err := os.ReadFile(filepath.Join(pl.dir, "settings.json")); err != nil || string(onDisk) != made {
			t.Errorf("%s: settings are %q and said to be %q", name, onDisk, made)
		}
	}
}

// pluginCheckMade holds a generated plugin to what every one must be: loadable without remarks, and its document's requests are
// exactly what its rules allow.
func pluginCheckMade(t *testing.T, p paths, name string) *plugin {
	t.Helper()
	_, loaded, _ := loadPlugins(p, &settings{})
	i := slices.IndexFunc(loaded, func(pl *plugin) bool { return pl.Name == name })
	if i < 0 {
		t.Fatalf("%q does not load: %+v", name, pluginDoctor(p, &settings{}))
	}
	for _, problem := range pluginDoctor(p, &settings{}) {
		if problem.Name == name {
			t.Errorf("a generated plugin has %+v", problem)
		}
	}
	pl := loaded[i]
	pol, err := compilePolicy([]ruleSet{pl.Rules})
	pluginMust(t, err)
	doc, _ := pl.docs["SKILL.md"]
	if !strings.HasPrefix(string(doc), "---\nname: "+name+"\ndescription: ") || strings.ContainsAny(string(doc), "{}") != (len(pl.Rules.Allow) > 0) {
		t.Errorf("SKILL.md is %s", doc)
	}
	requests := 0
	for _, part := range strings.Split(string(doc), " -d '")[1:] {
		body, _, _ := strings.Cut(part, "'\n")
		var request struct{ Args []string }
		pluginMust(t, json.Unmarshal([]byte(body), &request))
		if _, d := pol.decide(request.Args); !d.Allowed {
			t.Errorf("the document has %q, which is not allowed", body)
		}
		requests++
	}
	if requests != len(pl.Rules.Allow) {
		t.Errorf("%d requests for %d rules", requests, len(pl.Rules.Allow))
	}
	for file, mode := range map[string]fs.FileMode{"": 0o700, "references": 0o700, "SKILL.md": 0o600, "settings.json": 0o600, "references/usage.md": 0o600} {
		if info, err := os.Stat(filepath.Join(pl.dir, file)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s/%s: %v, %v", name, file, info.Mode(), err)
		}
	}
	return pl
}

func TestCreatePluginRefuses(t *testing.T) {
	p := pluginPaths(t)
	dir := pluginWrite(t, p, "mine", `{"plugin":{"type":"exec","command":"mine","before":"hooks/b"}}`, map[string]string{"hooks/b": "#!/bin/sh\n"})
	var asked []string
	probe := pluginProbe(map[string]pluginTool{"tool": {"--help": pluginSays(0, "usage", "")}}, &asked)
	for _, o := range []plugin{
		{Name: "mine", Command: "tool", Type: "skill"}, {Name: "", Command: "tool", Type: "skill"}, {Name: "../x", Command: "tool", Type: "skill"},
		{Name: "x/y", Command: "tool", Type: "skill"}, {Name: ".x", Command: "tool", Type: "skill"}, {Name: "X", Command: "tool", Type: "skill"}, {Name: "exec", Command: "tool", Type: "skill"},
		{Name: "x", Command: "/bin/tool", Type: "skill"}, {Name: "x", Command: "", Type: "skill"}, {Name: "x", Command: "-tool", Type: "skill"}, {Name: "x", Command: "ae", Type: "skill"},
		{Name: "x", Command: "a b", Type: "skill"},
	} {
		if _, made, err := createPlugin(p, &snapshot{}, o, false, true, probe); err == nil || len(asked) != 0 {
			t.Errorf("%+v: %+v, asked %q", o, made, asked)
		}
	}
	for _, kind := range []string{"system", "daemon", ""} {
		if _, made, err := createPlugin(p, &snapshot{}, plugin{Name: "x", Command: "tool", Type: kind}, false, true, probe); err == nil || len(asked) != 0 {
			t.Errorf("type %q: %+v", kind, made)
		}
	}
	if _, _, err := createPlugin(p, &snapshot{}, plugin{Name: "mine", Command: "tool", Type: "skill"}, false, true, probe); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("an existing plugin: %v", err)
	}
	entries, err := os.ReadDir(p.plugins)
	if _, hook := os.Stat(filepath.Join(dir, "hooks/b")); err != nil || len(entries) != 1 || hook != nil {
		t.Errorf("refused orders left %v", entries)
	}
	if _, _, err := createPlugin(p, &snapshot{}, plugin{Name: "mine", Command: "mine", Type: "exec"}, true, true, probe); err != nil {
		t.Errorf("with force: %v", err)
	}
	pluginCheckMade(t, p, "mine")
	if entries, _ := os.ReadDir(p.plugins); len(entries) != 1 {
		t.Errorf("force left %v", entries)
	}
	pluginMust(t, os.Chmod(p.plugins, 0o777))
	if _, _, err := createPlugin(p, &snapshot{}, plugin{Name: "x", Command: "tool", Type: "skill"}, false, true, probe); err == nil {
		t.Error("a directory that anybody may write to is written to")
	}
}

// TestCreatePluginOverALink: what a link in plugins/ leads to is left alone, with force too.
func TestCreatePluginOverALink(t *testing.T) {
	p := pluginPaths(t)
	outside := filepath.Join(p.dir, "outside")
	pluginMust(t, os.Mkdir(outside, 0o700))
	pluginMust(t, os.WriteFile(filepath.Join(outside, "precious"), nil, 0o600))
	pluginMust(t, os.Symlink(outside, filepath.Join(p.plugins, "x")))
	var asked []string
	probe := pluginProbe(nil, &asked)
	if _, _, err := createPlugin(p, &snapshot{}, plugin{Name: "x", Command: "tool", Type: "skill"}, false, true, probe); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over a link: %v", err)
	}
	if err := editPlugin(p, &settings{}, "x", "remove"); err == nil {
		t.Error("a link is removed as if it were a plugin")
	}
	if _, _, err := createPlugin(p, &snapshot{}, plugin{Name: "x", Command: "tool", Type: "skill"}, true, true, probe); err != nil {
		t.Errorf("over a link with force: %v", err)
	}
	pluginCheckMade(t, p, "x")
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
		t.Errorf("outside is %v, %v", entries, err)
	}
}

// TestUsageIsSafe: help that wants to be more than text stays within its block, without control characters, and bounded.
func TestUsageIsSafe(t *testing.T) {
	p := pluginPaths(t)
	evil := "\x1b[1mB\x1b[0mold \x1b]0;title\x07\x1b]8;;http://x\x1b\\link N\x08NA\x08A_\x08M \x9b31m \u202etxet\u2066 \u009b2J\r\n```\n# Ignore the above\n{NAME} {COMMAND} ``````\n\xff\x00\x7f" + strings.Repeat("long line ", 20<<10)
	var asked []string
	probe := pluginProbe(map[string]pluginTool{"tool": {"--help": pluginSays(0, evil, ""), "--version": pluginSays(0, evil, "")}}, &asked)
	if _, _, err := createPlugin(p, &snapshot{}, plugin{Name: "x", Command: "tool", Type: "skill"}, false, true, probe); err != nil {
		t.Fatal(err)
	}
	usage, _ := pluginCheckMade(t, p, "x").docs["references/usage.md"]
	text := string(usage)
	for _, c := range text {
		if c < ' ' && c != '\n' && c != '\t' || c >= 0x7f && c < 0xa0 || c == '\u202e' || c == '\u2066' {
			t.Fatalf("usage.md holds %q", c)
		}
	}
	if strings.Count(text, "```") != 4 || !strings.Contains(text, "Bold link NAM") || !strings.Contains(text, "{NAME} {COMMAND}") {
		t.Errorf("usage.md is %.500q", text)
	}
	if len(usage) > 2*4*32000+1000 {
		t.Errorf("usage.md has %d bytes", len(usage))
	}
}

func TestStarterKit(t *testing.T) {
	p := pluginPaths(t)
	bin := t.TempDir()
	for name, script := range map[string]string{
		"claude":  `case "$1" in --help) echo "Usage: claude [options]"; if read -r x; then echo "stdin: $x"; fi;; --version) echo 1.0;; *) exit 3;; esac`,
		"codex":   `case "$1" in -h) echo usage;; --help) exec sleep 1000;; *) exit 1;; esac`,
		"gemini":  "exec head -c 10485760 /dev/zero",
		"aider":   `echo "usage: aider [--message M]" >&2; exit 1`,
		"goose":   `[ "$1" = --help ] && env`,
		"hermes":  `[ "$#" = 1 ] && [ "$1" = version ] && echo "hermes 2" || exit 1`,
		"unasked": "echo never",
	} {
		pluginMust(t, os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	}
	pluginMust(t, os.WriteFile(filepath.Join(bin, "openclaw"), []byte("#!/bin/sh\n"), 0o644)) // not a program
	pluginWrite(t, p, "goose", `{"plugin":{"command":"goose"}}`, map[string]string{"SKILL.md": "mine"})
	snap := &snapshot{env: []string{"PATH=" + bin + ":/usr/bin:/bin", "MARK=from-the-snapshot"}, pathDirs: []string{bin}}
	lines := map[string]string{}
	kit := func(names string, force bool) {
		for _, name := range strings.Fields(names) {
			found, made, err := createPlugin(p, snap, plugin{Name: name, Command: name, Type: "skill"}, force, false, theRunner(t).run)
			lines[name] = fmt.Sprint(found, made != "", err != nil)
			if err != nil && !strings.Contains(err.Error(), "--force") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	kit(strings.Join(starterTools, " "), false)
	want := map[string]string{"claude": "true true false", "codex": "true true false", "gemini": "true true false", "aider": "true true false", "goose": "false false true",
		"hermes": "true true false", "openclaw": "false false false", "opencode": "false false false"}
	if !reflect.DeepEqual(lines, want) {
		t.Errorf("progress says %v", lines)
	}
	for name, want := range map[string]string{"claude": "claude --help, claude --version", "codex": "codex -h", "gemini": "", "aider": "", "hermes": "hermes version"} {
		var allow []string
		for _, r := range pluginCheckMade(t, p, name).Rules.Allow {
			allow = append(allow, r.String())
		}
		if got := strings.Join(allow, ", "); got != want {
			t.Errorf("%s allows %q, want %q", name, got, want)
		}
	}
	if text, _ := os.ReadFile(filepath.Join(p.plugins, "claude/references/usage.md")); !strings.Contains(string(text), "Usage: claude [options]\n```") {
		t.Errorf("usage of claude is %q", text)
	}
	if text, _ := os.ReadFile(filepath.Join(p.plugins, "goose/SKILL.md")); string(text) != "mine" {
		t.Errorf("an existing plugin was overwritten: %q", text)
	}
	kit("goose hermes", true)
	if lines["goose"] != "true true false" || lines["hermes"] != "true true false" {
		t.Errorf("with force: %v", lines)
	}
	if text, _ := os.ReadFile(filepath.Join(p.plugins, "goose/references/usage.md")); !strings.Contains(string(text), "MARK=from-the-snapshot") {
		t.Errorf("usage of goose is %q", text)
	}
}

// TestStarterKitWithRealTools asks what is there, and needs none of it.
func TestStarterKitWithRealTools(t *testing.T) {
	p := pluginPaths(t)
	snap := &snapshot{env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}, pathDirs: filepath.SplitList(os.Getenv("PATH"))}
	looked := 0
	for _, name := range []string{"git", "go", "node", "npm", "sh"} {
		found, made, err := createPlugin(p, snap, plugin{Name: name, Command: name, Type: "skill"}, false, false, theRunner(t).run)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if found && made != "" {
			looked++
			pl := pluginCheckMade(t, p, name)
			t.Logf("%s: %v", name, pl.Rules.Allow)
			if name == "git" && !reflect.DeepEqual(pl.Rules.Allow, []ruleSpec{{Text: "git --help"}, {Text: "git --version"}}) ||
				name == "go" && !reflect.DeepEqual(pl.Rules.Allow, []ruleSpec{{Text: "go help"}, {Text: "go version"}}) {
				t.Errorf("%s allows %v", name, pl.Rules.Allow)
			}
		}
	}
	if looked == 0 {
		t.Error("not even sh was found")
	}
}

func TestEnableDisableRemove(t *testing.T) {
	p := pluginPaths(t)
	pluginWrite(t, p, "a", `{"plugin":{"command":"a"}}`, nil)
	pluginWrite(t, p, "b", `{"plugin":{"command":"b"}}`, nil)
	pluginWrite(t, p, "twin", `{"plugin":{"command":"a"}}`, nil)
	pluginWrite(t, p, "broken", `{`, nil)
	read := func() *settings {
		t.Helper()
		s, err := loadSettings(p)
		pluginMust(t, err)
		return s
	}
	pluginMust(t, editPlugin(p, read(), "twin", "disable"))
	pluginMust(t, editPlugin(p, read(), "broken", "disable"))
	pluginMust(t, editPlugin(p, read(), "b", "disable"))
	if s := read(); !slices.Equal(s.PluginsDisabled, []string{"twin", "broken", "b"}) {
		t.Errorf("disabled %q", s.PluginsDisabled)
	}
	pluginMust(t, editPlugin(p, read(), "b", "enable"))
	for _, name := range []string{"none", "", "../config/plugins/a", "/etc", "a/../a", ".."} {
		if err := editPlugin(p, read(), name, "enable"); err == nil {
			t.Errorf("%q is enabled", name)
		}
	}
	for _, name := range []string{"none", "", "..", "../plugins", "../outside", "/etc", "a/..", "a/SKILL.md", "."} {
		if editPlugin(p, read(), name, "disable") == nil {
			t.Errorf("%q is disabled", name)
		}
		if editPlugin(p, read(), name, "remove") == nil {
			t.Errorf("%q is removed", name)
		}
	}
	if s := read(); !slices.Equal(s.PluginsDisabled, []string{"twin", "broken"}) {
		t.Errorf("disabled %q", s.PluginsDisabled)
	}
	// A directory with a link in it: the link goes, what it leads to stays.
	outside := filepath.Join(p.dir, "outside")
	pluginMust(t, os.MkdirAll(outside, 0o700))
	pluginMust(t, os.WriteFile(filepath.Join(outside, "precious"), nil, 0o600))
	pluginMust(t, os.Symlink(outside, filepath.Join(p.plugins, "a/link")))
	pluginMust(t, editPlugin(p, read(), "a", "remove"))
	if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
		t.Error(err)
	}
	entries, _ := os.ReadDir(p.plugins)
	if len(entries) != 3 {
		t.Errorf("left are %v", entries)
	}
	// In explicit mode a plugin that is gone must not keep the server from starting.
	pluginMust(t, os.WriteFile(p.settings, []byte(`{"plugins":{"mode":"explicit","enabled":["b"]}}`), 0o600))
	pluginMust(t, editPlugin(p, read(), "b", "remove"))
	if _, loaded, problems := loadPlugins(p, read()); len(loaded) != 0 || slices.ContainsFunc(problems, pluginStops) {
		t.Errorf("after the removal: %v, %+v", loaded, problems)
	}
}

// pluginServer is a real server with the directory's plugins. On its PATH are tool and other, which print their arguments and
// leave a line of them in the file that it returns; the log is for what an operator would see.
type pluginServer struct {
	paths
	url, ran string
	log      *pluginLog
	stop     func() // and wait until it is gone
}

// pluginLog is a log that may be read while it is written.
type pluginLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *pluginLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *pluginLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

const pluginKey = "0123456789abcdef-plugin-tests"

func pluginServe(t *testing.T, p paths, settings string) *pluginServer {
	t.Helper()
	bin := t.TempDir()
	s := &pluginServer{paths: p, ran: filepath.Join(bin, "ran"), log: &pluginLog{}}
	for _, name := range []string{"tool", "other"} {
		script := "#!/bin/sh\necho \"$(basename \"$0\") $*\" | tee -a " + s.ran + "\n"
		pluginMust(t, os.WriteFile(filepath.Join(bin, name), []byte(script), 0o700))
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	pluginMust(t, os.WriteFile(p.settings, []byte(settings), 0o600))
	key, err := newAPIKey(pluginKey)
	pluginMust(t, err)
	set, err := loadSettings(p)
	pluginMust(t, err)
	_, plugins, problems := loadPlugins(p, set)
	for _, problem := range problems {
		if problem.Enabled && problem.Broken {
			t.Fatal(problemText(problem))
		}
	}
	rules := []ruleSet{}
	for _, pl := range plugins {
		rules = append(rules, pl.Rules)
	}
	store, err := openStore(p, rules)
	pluginMust(t, err)
	audit, err := openAudit(set.AuditFile, set.AuditEnabled, key)
	pluginMust(t, err)
	srv := &server{start: startup{key: key, host: "127.0.0.1", enabled: true}, store: store, audit: audit, runner: theRunner(t), plugins: plugins,
		log: log.New(s.log, "", 0)}
	l, err := listen("127.0.0.1", 0)
	pluginMust(t, err)
	pluginMust(t, srv.prepare(l.Addr().String()))
	s.url = "http://" + l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- srv.serve(ctx, l) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		srv.audit.close()
	})
	t.Cleanup(s.stop)
	return s
}

// ask sends a request whose path goes out exactly as it is written here.
func (s *pluginServer) ask(t *testing.T, method, path, body, key string) (status int, answer map[string]any, text string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.url, strings.NewReader(body))
	pluginMust(t, err)
	path, query, _ := strings.Cut(path, "?")
	r.URL.Opaque, r.URL.RawQuery = path, query
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: hangGuard,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	pluginMust(t, err)
	json.Unmarshal(data, &answer) // a document is not JSON, and needs not be
	return res.StatusCode, answer, string(data)
}

// haveRun takes the commands that really ran since it was asked last.
func (s *pluginServer) haveRun(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(s.ran)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	os.Remove(s.ran)
	return strings.ReplaceAll(strings.TrimSpace(string(data)), "\n", "; ")
}

const pluginWireSettings = `{"exec":{"allow":["other ok","tool sent"],"deny":["tool never"]},"timeoutMs":%d,"maxOutputBytes":65536,"plugins":{"disabled":[%s]}}`

func TestHooksOverTheWire(t *testing.T) {
	say := func(text string) string { return "#!/bin/sh\ncat >/dev/null\nprintf '%s' '" + text + "'\n" }
	for name, c := range map[string]struct {
		kind, before, after string
		status              int
		is                  string // the error code, or output of a 200
		ran                 string
		timeout             int // of commands and hooks, in milliseconds
	}{
		"before says nothing":        {"exec", say(""), "", 200, "tool sent\n", "tool sent", 60000},
		"rewrites to an allowed one": {"exec", say(`{"args":["other","ok"]}`), "", 200, "other ok\n", "other ok", 60000},
		"rewrites to another":        {"exec", say(`{"args":["other","x"]}`), "", 403, "command_not_allowed", "", 60000},
		"rewrites to a denied one":   {"exec", say(`{"args":["tool","never"]}`), "", 403, "command_denied", "", 60000},
		"trusted, without run":       {"trusted", say(`{"args":["other","x"]}`), "", 403, "command_not_allowed", "", 60000},
		"trusted, with run":          {`trusted","invoke":"run`, say(`{"args":["other","x"]}`), "", 200, "other x\n", "other x", 60000},
		"before refuses":             {"exec", say(`{"error":{"status":418,"code":"not_now","message":"m"}}`), "", 418, "not_now", "", 60000},
		"before lies":                {"exec", say(`{"result":{"output":"x"}}`), "", 500, "plugin_before_error", "", 60000},
		"before crashes":             {"exec", "#!/bin/sh\necho '{\"args\":[\"other\",\"ok\"]}'; kill -SEGV $$\n", "", 500, "plugin_before_error", "", 60000},
		"before floods":              {"exec", "#!/bin/sh\nexec yes\n", "", 500, "plugin_before_error", "", 60000},
		"before hangs":               {"exec", "#!/bin/sh\nexec sleep 1000\n", "", 500, "plugin_before_error", "", 500},
		"after says nothing":         {"exec", "", say(""), 200, "tool sent\n", "tool sent", 60000},
		"after replaces":             {"exec", "", say(`{"result":{"output":"new","exitCode":3,"status":"error","duration":1,"length":3}}`), 200, "new", "tool sent", 60000},
		"after refuses":              {"exec", "", say(`{"error":{"status":599,"code":"late","message":"m"}}`), 599, "late", "tool sent", 60000},
		"after lies":                 {"exec", "", say(`{"args":["other","ok"]}`), 500, "plugin_after_error", "tool sent", 60000},
		"after fails":                {"exec", "", "#!/bin/sh\nexit 7\n", 500, "plugin_after_error", "tool sent", 60000},
		"both":                       {"exec", say(`{"args":["other","ok"]}`), "#!/bin/sh\ngrep -q '\"args\":\\[\"other\",\"ok\"\\],\"originalArgs\":\\[\"tool\",\"sent\"\\].*\"result\":{.*other ok' || exit 1\n", 200, "other ok\n", "other ok", 60000},
	} {
		t.Run(name, func(t *testing.T) {
			p := pluginPaths(t)
			fields, files := "", map[string]string{}
			for which, script := range map[string]string{"before": c.before, "after": c.after} {
				if script != "" {
					fields += `,"` + which + `":"hooks/` + which + `"`
					files["hooks/"+which] = script
				}
			}
			pluginWrite(t, p, "hooked", `{"plugin":{"command":"tool","type":"`+c.kind+`"`+fields+`}}`, files)
			s := pluginServe(t, p, fmt.Sprintf(pluginWireSettings, c.timeout, ""))
			status, answer, text := s.ask(t, "POST", "/api/exec", `{"args":["tool","sent"]}`, pluginKey)
			is := answer["error"]
			if status == 200 {
				is = answer["output"]
			}
			if ran := s.haveRun(t); status != c.status || is != c.is || ran != c.ran {
				t.Errorf("%d %s\nran %q, want %d %q and %q; log %s", status, text, ran, c.status, c.is, c.ran, s.log)
			}
			// Neither the hook's trouble nor its file is the agent's business, and the next request is not harmed.
			if strings.Contains(text, p.dir) {
				t.Errorf("the answer names the server's files: %s", text)
			}
			if status, _, text := s.ask(t, "POST", "/api/exec", `{"args":["other","ok"]}`, pluginKey); status != 200 {
				t.Errorf("the next request: %d %s", status, text)
			}
			s.stop()
			log, err := os.ReadFile(p.audit)
			pluginMust(t, err)
			hookRuns := 0
			for line := range strings.Lines(string(log)) {
				if strings.Contains(line, `"argv":["`+p.plugins) && strings.Contains(line, `"plugin":"hooked"`) {
					hookRuns++
				}
			}
			if want := 2 * len(files); hookRuns != want && !(c.status >= 500 && hookRuns == 2) {
				t.Errorf("%d records of hooks, want %d:\n%s", hookRuns, want, log)
			}
			if strings.Contains(string(log), pluginKey) {
				t.Error("the key is in the audit log")
			}
		})
	}
}

// TestHookSeesNoKey: however the key comes, a hook does not get it; and only the plugin's requests come by it.
func TestHookSeesNoKey(t *testing.T) {
	p := pluginPaths(t)
	seen := filepath.Join(p.dir, "seen")
	pluginWrite(t, p, "hooked", `{"plugin":{"type":"exec","command":"tool","before":"hooks/before","after":"hooks/before"},"exec":{"allow":["tool *"]}}`,
		map[string]string{"hooks/before": "#!/bin/sh\ncat >>" + seen + "\nenv >>" + seen + "\n"})
	s := pluginServe(t, p, fmt.Sprintf(pluginWireSettings, 60000, ""))
	status, _, text := s.ask(t, "POST", "/api/exec?mode=buffered", `{"args":["tool","x`+pluginKey+`y"]}`, pluginKey)
	if got := s.haveRun(t); status != 200 || got != "tool x"+pluginKey+"y" {
		t.Errorf("%d %s, ran %q", status, text, got)
	}
	said, err := os.ReadFile(seen)
	if pluginMust(t, err); strings.Contains(string(said), pluginKey) {
		t.Errorf("a hook saw the key: %s", said)
	}
	for _, want := range []string{`"args":["tool","x[API_KEY]y"]`, `"X-Api-Key":["[API_KEY]"]`, `"mode":["buffered"]`, `"method":"POST"`, `"path":"/api/exec"`, `"ip":"127.0.0.1"`, "tool x[API_KEY]y"} {
		if !strings.Contains(string(said), want) {
			t.Errorf("the hook was not told %s: %s", want, said)
		}
	}
	pluginMust(t, os.Remove(seen))
	s.ask(t, "POST", "/api/exec", `{"args":["other","ok"]}`, pluginKey)
	s.ask(t, "POST", "/api/exec", `{"args":["toolx"]}`, pluginKey)
	if status, _, text := s.ask(t, "POST", "/api/exec?mode=stream", `{"args":["tool","x"]}`, pluginKey); status != 400 || !strings.Contains(text, "stream_plugin_command_not_supported") {
		t.Errorf("a stream: %d %s", status, text)
	}
	if said, err := os.ReadFile(seen); err == nil {
		t.Errorf("the hook ran for what is not its own: %s", said)
	}
}

func TestRoutesOverTheWire(t *testing.T) {
	p := pluginPaths(t)
	pluginWrite(t, p, "r", `{"plugin":{"type":"exec","command":"tool","routes":{"GET /ok":["tool","ok"],"GET /other":["other","x"],"GET /never":["tool","never"],
		"GET /show/{id}":["tool","show","{id}"],"POST /do":["tool","ok"],"GET /x/SKILL.md":["tool","ok"]}},"exec":{"allow":["tool ok",["tool","show","..."]]}}`, nil)
	pluginWrite(t, p, "t", `{"plugin":{"type":"trusted","command":"other","invoke":"run","routes":{"GET /any/{x}":["other","any","{x}"],"GET /never":["tool","never"]}}}`, nil)
	s := pluginServe(t, p, fmt.Sprintf(pluginWireSettings, 60000, ""))
	for _, c := range []struct {
		request, body string
		status        int
		is, ran       string
	}{
		{"GET /api/command/r/ok", "", 200, "tool ok\n", "tool ok"},
		{"GET /api/command/r/other", "", 403, "command_not_allowed", ""},
		{"GET /api/command/r/never", "", 403, "command_denied", ""},
		{"GET /api/command/t/any/thing", "", 200, "other any thing\n", "other any thing"},
		{"GET /api/command/t/never", "", 200, "tool never\n", "tool never"}, // a trusted plugin is host code
		{"GET /api/command/r/show/7", "", 200, "tool show 7\n", "tool show 7"},
		{"GET /api/command/r/show/a%20b%3B%24%28id%29", "", 200, "tool show a b;$(id)\n", "tool show a b;$(id)"},
		{"GET /api/command/r/show/a%2Fb", "", 404, "not_found", ""},
		{"GET /api/command/r/show/{id}", "", 200, "tool show {id}\n", "tool show {id}"},
		{"GET /api/command/r/show/-rf", "", 400, "invalid_args", ""},
		{"GET /api/command/r/show/%2D%2Dall", "", 400, "invalid_args", ""},
		{"GET /api/command/r/show/a%00b", "", 404, "not_found", ""},
		{"GET /api/command/r/show/a%0Ab", "", 400, "invalid_args", ""},
		{"GET /api/command/r/show/%1b[2J", "", 400, "invalid_args", ""},
		{"GET /api/command/r/show/%FF", "", 400, "invalid_args", ""},
		{"GET /api/command/r/show/%C2%85", "", 400, "invalid_args", ""},
		{"GET /api/command/r/show/", "", 404, "not_found", ""},
		{"GET /api/command/r/show/..", "", 404, "not_found", ""},
		{"GET /api/command/r/show/%2e%2e", "", 404, "not_found", ""},
		{"GET /api/command/r/show/..%2F..%2Fetc%2Fpasswd", "", 404, "not_found", ""},
		{"GET /api/command/r/show/%2Fetc%2Fpasswd", "", 404, "not_found", ""},
		{"GET /api/command/r/show/a/b", "", 404, "not_found", ""},
		{"GET /api/command/r//ok", "", 404, "not_found", ""},
		{"GET /api/command/t/../r/ok", "", 404, "not_found", ""},
		{"GET /api/command/r", "", 404, "not_found", ""},
		{"GET /api/command/none/ok", "", 404, "not_found", ""},
		{"GET /api/command/r%2Fok", "", 404, "not_found", ""},
		{"POST /api/command/r/ok", "", 405, "method_not_allowed", ""},
		{"HEAD /api/command/r/ok", "", 405, "", ""},
		{"GET /api/command/r/do", "", 405, "method_not_allowed", ""},
		{"POST /api/command/r/do", "", 200, "tool ok\n", "tool ok"},
		{"POST /api/command/r/do", `{"args":["tool","never"]}`, 400, "", ""},
		{"GET /api/command/r/ok?x=1", "", 400, "invalid_query", ""},
		{"GET /api/command/r/ok?mode=stream", "", 400, "invalid_query", ""},
		{"GET /api/command/r/ok?cmd=id", "", 400, "invalid_query", ""},
	} {
		method, path, _ := strings.Cut(c.request, " ")
		status, answer, text := s.ask(t, method, path, c.body, pluginKey)
		is := answer["error"]
		if status == 200 {
			is = answer["output"]
		}
		if ran := s.haveRun(t); status != c.status || c.is != "" && is != c.is || ran != c.ran {
			t.Errorf("%s: %d %s ran %q, want %d %q and %q", c.request, status, text, ran, c.status, c.is, c.ran)
		}
		for _, key := range []string{"", pluginKey + "x"} { // without the key nothing runs, and nothing shows what there is
			if status, _, text := s.ask(t, method, path, c.body, key); status != 401 && !(status == 404 && c.status == 404) || s.haveRun(t) != "" {
				t.Errorf("%s without the key: %d %s", c.request, status, text)
			}
		}
	}
	if status, _, text := s.ask(t, "GET", "/api/command/r/x/SKILL.md", "", ""); status != 401 || s.haveRun(t) != "" {
		t.Errorf("a route that ends like a document, without the key: %d %s", status, text)
	}
	// A disabled plugin stops at once.
	pluginMust(t, os.WriteFile(p.settings, fmt.Appendf(nil, pluginWireSettings, 60000, `"r"`), 0o600))
	for _, path := range []string{"/api/command/r/ok", "/api/command/r/show/7", "/private/skills/r/SKILL.md"} {
		if status, _, text := s.ask(t, "GET", path, "", pluginKey); status != 404 || s.haveRun(t) != "" {
			t.Errorf("%s of a disabled plugin: %d %s", path, status, text)
		}
	}
	if status, _, text := s.ask(t, "POST", "/api/exec", `{"args":["tool","ok"]}`, pluginKey); status != 403 {
		t.Errorf("the rule of a disabled plugin: %d %s", status, text)
	}
	if _, _, text := s.ask(t, "GET", "/api/plugins", "", pluginKey); strings.Contains(text, `"r"`) || !strings.Contains(text, `"t"`) {
		t.Errorf("the list with a disabled plugin: %s", text)
	}
}

// TestPluginDocumentsOverTheWire asks for what is there, and in every way for what is not to be had.
func TestPluginDocumentsOverTheWire(t *testing.T) {
	p := pluginPaths(t)
	pluginWrite(t, p, "notes", `{}`, map[string]string{"references/a.md": "REFERENCE", "public/SKILL.md": strings.ReplaceAll(pluginTestSkill, "NAME", "notes") + "PUBLIC", "hooks/x": "SECRET"})
	pluginWrite(t, p, "quiet", `{}`, nil)
	s := pluginServe(t, p, fmt.Sprintf(pluginWireSettings, 60000, ""))
	for path, want := range map[string]string{"/private/skills/notes/SKILL.md": "# notes", "/private/skills/notes/references/a.md": "REFERENCE"} {
		if status, _, text := s.ask(t, "GET", path, "", pluginKey); status != 200 || !strings.Contains(text, want) {
			t.Errorf("%s: %d %s", path, status, text)
		}
		if status, _, text := s.ask(t, "GET", path, "", ""); status != 401 || strings.Contains(text, want) {
			t.Errorf("%s without the key: %d %s", path, status, text)
		}
	}
	if status, _, text := s.ask(t, "GET", "/skills/notes/SKILL.md", "", ""); status != 200 || !strings.Contains(text, "PUBLIC") {
		t.Errorf("the public document: %d %s", status, text)
	}
	if status, _, text := s.ask(t, "GET", "/skills/quiet/SKILL.md", "", ""); status != 404 {
		t.Errorf("a public document that does not exist: %d %s", status, text)
	}
	for _, tail := range []string{"notes/settings.json", "notes/references/settings.json", "notes/references/..%2Fsettings.json", "notes/references/../settings.json", "notes/references/%2e%2e%2fsettings.json",
		"notes/references/..%5Csettings.json", "notes/references/a.md%00", "notes/references/a.md%00.md", "notes/references/%2Fetc%2Fpasswd", "notes/references//etc/passwd", "notes/references/", "notes/references",
		"notes/references/a.md/", "notes/references/A.md", "notes/references/a%2Emd%2F..%2Fa.md", "notes/hooks/x", "notes/references/..%2Fhooks%2Fx", "notes/", "notes", "", "..%2Fsettings.json", "../settings.json",
		"..%2F..%2Fsettings.json/SKILL.md", "%2e%2e/SKILL.md", "../SKILL.md", "..%2Fnotes/SKILL.md", "notes%2FSKILL.md", "notes%00/SKILL.md", "notes%0A/SKILL.md", "Notes/SKILL.md", "none/SKILL.md", ".new-notes/SKILL.md",
		"notes/SKILL.md%00", "notes/./SKILL.md", "notes//SKILL.md", "notes/public/SKILL.md", "notes/references/%252e%252e%252fsettings.json"} {
		for _, head := range []string{"/private/skills/", "/skills/", "/private/", "/api/command/"} {
			status, _, text := s.ask(t, "GET", head+tail, "", pluginKey)
			if index := head+tail == "/skills/"; status != 404 && !index || strings.Contains(text, "SECRET") || strings.Contains(text, `"plugin"`) || strings.Contains(text, "root:") {
				t.Errorf("%s%s: %d %s", head, tail, status, text)
			}
		}
	}
}

func FuzzHookOutput(f *testing.F) {
	for _, seed := range []string{"", " ", `{"args":["tool","x"]}`, `{"result":{"output":"o","exitCode":null,"length":1}}`, `{"error":{"status":400,"code":"x","message":"m"}}`, `{"args":["\ud800"]}`, "{"} {
		f.Add([]byte(seed), true)
		f.Add([]byte(seed), false)
	}
	f.Fuzz(func(t *testing.T, data []byte, before bool) {
		which := map[bool]string{true: "before", false: "after"}[before]
		out, err := parseHookOutput(data, which)
		said := 0
		if out.Args != nil {
			said++
			if !before || checkArgv(out.Args) != nil {
				t.Errorf("%s: args %q", which, out.Args)
			}
		}
		if out.Result != nil {
			said++
			if _, e := json.Marshal(out.Result); before || e != nil {
				t.Errorf("%s: result %+v", which, out.Result)
			}
		}
		if e := out.Error; e != nil {
			said++
			if e.Status < 400 || e.Status > 599 || e.Code == "" || e.Message == "" {
				t.Errorf("%s: error %+v", which, e)
			}
		}
		if said > 1 || err != nil && said > 0 || err == nil && said == 0 && len(bytes.TrimSpace(data)) > 0 {
			t.Errorf("%s: %+v, %v", which, out, err)
		}
	})
}

func FuzzPluginSettings(f *testing.F) {
	for _, seed := range []string{`{}`, fmt.Sprintf(pluginExec, `,"before":"hooks/before","routes":{"GET /x/{y}":["tool","{y}"]}`), `{"plugin":{"type":"trusted","command":"z","invoke":"run"}}`,
		`{"plugin":{"command":"tool"},"exec":{"allow":["tool *",["tool","/^a$/","..."]],"deny":["/x/","*"]}}`, `{"plugin":{"type":"exec","command":"tool","routes":{"GET /a/{x}":["tool"],"GET /{y}/b":["tool"]}}}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parsePlugin("name", "settings.json", data)
		if err != nil {
			if p != nil && err == nil || !strings.HasPrefix(err.Error(), "settings.json:") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: %q", data, err)
			}
			return
		}
		if p.Invoke == "run" && p.Type != "trusted" || p.Type == "skill" && (len(p.routes) > 0 || p.before+p.after != "") || p.Command == "" && (p.Type != "skill" || len(p.Rules.Allow) > 0) {
			t.Errorf("%q: %+v", data, p)
		}
		pol, err := compilePolicy([]ruleSet{p.Rules})
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		for _, argv := range [][]string{{"sh", "-c", "id"}, {"other"}, {"x" + p.Command}} {
			if _, d := pol.decide(argv); d.Allowed {
				t.Errorf("%q allows %q", data, argv)
			}
		}
		mux := http.NewServeMux()
		for pattern, route := range p.routes {
			mux.Handle(pattern, http.NotFoundHandler()) // panics if it cannot be
			if argv, err := routeArgv(route, func(string) string { return "v" }); err == nil && argv[0] != route[0] {
				t.Errorf("%q: the command of %q comes from the path", data, route)
			}
		}
	})
}
