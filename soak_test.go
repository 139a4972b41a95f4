package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// soakFor makes a few seconds long: go test -run TestSoak -timeout 0 -soak 10m
var soakFor = flag.Duration("soak", 3*time.Second, "how long TestSoak works")

const (
	soakClients   = 4
	soakMoreRSS   = 12 << 10 // KiB that the end may have above the warmed-up beginning: the garbage collector's play
	soakTimeoutMs = 700
	soakFull      = 100 << 10 // bytes of output
)

// soakVersion is one content of settings.json, and what it must say to a command: written apart from the program's own
// rules, in the plainest words.
type soakVersion struct {
	allow, deny []any // nil, nil: a file that is no settings
	slots       int
	says        func(argv []string) string // allow, command_denied or command_not_allowed
}

// soakDigits says whether it is a number.
func soakDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

func soakVersions() []soakVersion {
	plain := func(argv []string) bool { return !strings.ContainsAny(argv[0], " \t\n") }
	return []soakVersion{
		{
			allow: []any{"aexec --version", "echo *", []string{"seq", "/^[0-9]+$/"}}, slots: soakClients,
			says: func(argv []string) string {
				switch {
				case len(argv) > 1 && argv[0] == "echo", len(argv) == 2 && argv[0] == "seq" && soakDigits(argv[1]),
					len(argv) == 2 && argv[0] == "aexec" && argv[1] == "--version":
					return "allow"
				}
				return "command_not_allowed"
			},
		},
		{
			allow: []any{"*"}, deny: []any{"/^rm/", "echo secret*", []string{"sh", "-c", "/^exit .*$/"}, "aexec stop"}, slots: 2,
			says: func(argv []string) string {
				rest := strings.Join(argv[1:], " ")
				switch name := path.Base(argv[0]); {
				case strings.HasPrefix(name, "rm"), name == "echo" && strings.HasPrefix(rest, "secret"), name == "echo secret",
					name == "sh" && len(argv) == 3 && argv[1] == "-c" && strings.HasPrefix(argv[2], "exit "),
					(name == "aexec" || name == "ae") && rest == "stop":
					return "command_denied"
				case !plain(argv):
					return "command_not_allowed"
				}
				return "allow"
			},
		},
		{
			allow: []any{"/^(echo|true)( [a-z0-9 -]*)?$/", []string{"/bin/echo", "..."}, []string{"sh", "-c", "/^(sleep|exit) [0-9]+$/"}, []string{"yes"}},
			deny:  []any{"sh -c exit 1*", "/^echo.*secret/"}, slots: 3,
			says: func(argv []string) string {
				all, name := strings.Join(argv, " "), path.Base(argv[0])
				switch {
				case strings.HasPrefix(name, "echo") && strings.Contains(strings.Join(append([]string{name}, argv[1:]...), " "), "secret"),
					name == "sh" && strings.HasPrefix(strings.Join(argv[1:], " "), "-c exit 1"):
					return "command_denied"
				case argv[0] == "/bin/echo", len(argv) == 1 && argv[0] == "yes",
					plain(argv) && (argv[0] == "echo" || argv[0] == "true") && strings.Trim(strings.TrimPrefix(all, argv[0]), "abcdefghijklmnopqrstuvwxyz0123456789 -") == "":
					return "allow"
				case len(argv) == 3 && argv[0] == "sh" && argv[1] == "-c":
					verb, number, _ := strings.Cut(argv[2], " ")
					if (verb == "sleep" || verb == "exit") && soakDigits(number) {
						return "allow"
					}
				}
				return "command_not_allowed"
			},
		},
		{slots: 1},
	}
}

// text is the file.
func (v soakVersion) text() string {
	if v.says == nil {
		return `{"exec": {"allow": ["*"]}, "nonsense": true}`
	}
	text, _ := json.Marshal(map[string]any{
		"exec":      map[string]any{"allow": v.allow, "deny": append([]any{}, v.deny...), "cwd": "/"},
		"timeoutMs": soakTimeoutMs, "killGraceMs": 100, "maxConcurrentExec": v.slots, "maxOutputBytes": soakFull, "maxStreamBytes": soakFull,
	})
	return string(text)
}

// soakArgv makes up a command; whichever the settings let through is harmless.
func soakArgv(r *rand.Rand, token string) []string {
	pick := func(words ...string) string { return words[r.IntN(len(words))] }
	switch r.IntN(12) {
	case 0:
		return []string{pick("aexec", "ae"), pick("--version", "stop", "version")}
	case 1:
		return []string{pick("sh", "/bin/sh"), "-c", pick("sleep 5", "exit 0", "exit 12", "exit 3", "exit now", "setsid sleep 1000 & exit 0", "exit  3")}
	case 2:
		return []string{"seq", pick("10", "3x", "-3", "30000")}
	case 3:
		return []string{pick("rm", "/bin/rm", "rmdir", "./rm"), pick("--version", "/nowhere/at/all")}
	case 4:
		return []string{pick("echo secret", "echo x", "true x", "no-such command"), token}
	case 5:
		return []string{pick("yes", "true", "echo", "no-such-command")}
	case 6:
		return []string{pick("true", "no-such-command"), pick("x", "X", "a b")}
	default:
		return []string{pick("echo", "echo", "/bin/echo"), pick("some", "secret", "no secret", "SOME", "é\n"), token}
	}
}

type soak struct {
	*lifeHome
	versions    []soakVersion
	seed        uint64
	begun, done atomic.Int64 // the rewrites of settings.json, numbered: up to which they were begun and done
	quit        atomic.Bool
	answered    sync.Map // request id: what it was, for the audit
	mu          sync.Mutex
	count       map[string]int
}

// version is the content that the n-th rewrite brings.
func (s *soak) version(n int64) soakVersion {
	return s.versions[rand.New(rand.NewPCG(s.seed, uint64(n))).IntN(len(s.versions))]
}

func (s *soak) rewrite() {
	s.t.Helper()
	n := s.begun.Add(1)
	s.write("settings.json", s.version(n).text())
	s.done.Store(n)
}

func (s *soak) tell(what string) {
	s.mu.Lock()
	s.count[what]++
	s.mu.Unlock()
}

// covered says whether all kinds of answers were met.
func (s *soak) covered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, what := range []string{"allow", "command_denied", "command_not_allowed", "settings_invalid", "timeout", "max_output_exceeded", "abandoned", "malformed"} {
		if s.count[what] == 0 {
			return false
		}
	}
	return true
}

// work is the load: it lasts as long as it is told to, and until it has covered all.
func (s *soak) work(long time.Duration) {
	s.t.Helper()
	s.quit.Store(false)
	var clients sync.WaitGroup
	for n := range soakClients {
		r := rand.New(rand.NewPCG(s.seed+uint64(n)+1, uint64(s.begun.Load())))
		clients.Go(func() { s.client(r) })
	}
	defer clients.Wait()
	defer s.quit.Store(true)
	for begun := time.Now(); time.Since(begun) < long || !s.covered() && time.Since(begun) < long+lifePatience; {
		s.rewrite()
		time.Sleep(min(time.Second, long/16))
	}
}

// client sends one request after the other.
func (s *soak) client(r *rand.Rand) {
	var c *lifeClient
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	for i := 0; !s.quit.Load(); i++ {
		if c == nil {
			var err error
			if c, err = lifeDial(s.address); err != nil {
				s.t.Errorf("no connection: %v", err)
				return
			}
		}
		switch r.IntN(10) {
		case 0:
			s.malformed(r, c)
		case 1:
			s.abandon(r, c)
		default:
			last, err := s.ask(r, c, fmt.Sprint("token-", i))
			if err != nil {
				s.t.Error(err)
			} else if !last && r.IntN(20) > 0 {
				continue // on the same connection
			}
		}
		c.Close()
		c = nil
	}
}

// ask sends a command, or asks whether it would be allowed, and holds the answer against each version that was in force while it waited.
func (s *soak) ask(r *rand.Rand, c *lifeClient, token string) (last bool, err error) {
	argv, at := soakArgv(r, token), "/api/exec"+[]string{"", "", "", "?format=text", "?mode=stream", "?mode=stream&format=text"}[r.IntN(6)]
	if r.IntN(8) == 0 {
		at = "/api/acl/check"
	}
	from := s.done.Load()
	err = c.send(at, lifeKey, lifeBody(argv...))
	a, bad := c.answer()
	if err := errors.Join(err, bad); err != nil {
		return true, fmt.Errorf("%s %q: %w", at, argv, err)
	}
	to := s.begun.Load()
	got := soakDecision(at, a)
	if at != "/api/acl/check" {
		s.answered.Store(a.header.Get("X-Request-ID"), got)
	}
	s.tell(got)
	if a.object().Error == "timeout" || a.object().Error == "max_output_exceeded" {
		s.tell(a.object().Error)
	}
	var wants []string
	for n := from; n <= to; n++ {
		want := "settings_invalid"
		if v := s.version(n); v.says != nil {
			want = v.says(argv)
		}
		wants = append(wants, want)
	}
	if !slices.Contains(wants, got) && !(got == "busy" && slices.Contains(wants, "allow")) {
		return true, fmt.Errorf("%s %q: %s, want one of %q (rewrites %d to %d): %d %.300q", at, argv, got, wants, from, to, a.code, a.body)
	}
	if o := a.object(); at == "/api/exec" && a.code == 200 && strings.HasSuffix(argv[0], "echo") && o.Output != strings.Join(argv[1:], " ")+"\n" {
		return true, fmt.Errorf("%s %q: %s", at, argv, a.body)
	}
	return a.last, nil
}

// soakDecision is what an answer says of the policy.
func soakDecision(at string, a lifeAnswer) string {
	code := a.object().Error
	switch {
	case at == "/api/acl/check" && a.code == 200:
		var d struct {
			Allowed bool
			List    string
		}
		if json.Unmarshal([]byte(a.body), &d); d.Allowed {
			return "allow"
		} else if d.List == "deny" {
			return "command_denied"
		}
		return "command_not_allowed"
	case a.code == 200, a.code == 408 && code == "timeout", a.code == 413 && code == "max_output_exceeded":
		return "allow"
	case a.code == 429 && code == "too_many_concurrent_exec":
		return "busy" // for those that are allowed
	case a.code == 403, a.code == 503:
		return code
	}
	return fmt.Sprint(a.code, " ", code)
}

// malformed sends what must be refused whatever the policy says.
func (s *soak) malformed(r *rand.Rand, c *lifeClient) {
	right, asJSON := "X-API-Key: "+lifeKey, "application/json"
	refused := []struct {
		line, key, kind, body string
		code                  int
	}{
		{"POST /api/exec", right, asJSON, `{"args":["echo","x"],"cwd":"/"}`, 400},
		{"POST /api/exec", right, asJSON, `{"ARGS":["echo","x"]}`, 400},
		{"POST /api/exec", right, asJSON, `{"args":["echo","x"],"args":["echo","y"]}`, 400},
		{"POST /api/exec", right, asJSON, `{"args":["echo","x"]}{}`, 400},
		{"POST /api/exec", right, asJSON, `{"args":["echo","\ud800"]}`, 400},
		{"POST /api/exec", right, asJSON, `{"args":["echo","x\u0000"]}`, 400},
		{"POST /api/exec", right, asJSON, `{"args":[]}`, 400},
		{"POST /api/exec", right, asJSON, `{"args":"echo x"}`, 400},
		{"POST /api/exec", right, asJSON, `["echo","x"]`, 400},
		{"POST /api/exec?cmd=echo", right, asJSON, `{"args":["echo","x"]}`, 400},
		{"POST /api/exec?mode=stream&mode=buffered", right, asJSON, `{"args":["echo","x"]}`, 400},
		{"POST /api/exec", right, "text/plain", `{"args":["echo","x"]}`, 415},
		{"POST /api/exec", "X-API-Key: wrong", asJSON, `{"args":["echo","x"]}`, 401},
		{"POST /api/exec", "X-Nothing: 1", asJSON, `{"args":["echo","x"]}`, 401},
		{"POST /api/exec", right + "\r\n" + right, asJSON, `{"args":["echo","x"]}`, 401},
		{"GET /api/exec", right, asJSON, ``, 405},
		{"GET /api/command/x", right, asJSON, ``, 404},
		{"POST //api/exec", right, asJSON, `{"args":["echo","x"]}`, 404},
	}
	q := refused[r.IntN(len(refused))]
	from := s.done.Load()
	_, err := fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", q.line, q.key, q.kind, len(q.body), q.body)
	a, bad := c.answer()
	s.tell("malformed")
	ok := a.code == q.code
	for n := from; n <= s.begun.Load() && q.line != "POST //api/exec"; n++ {
		ok = ok || s.version(n).says == nil && a.object().Error == "settings_invalid"
	}
	if err := errors.Join(err, bad); err != nil || !ok {
		s.t.Errorf("%+v: %v, %d %s", q, err, a.code, a.body)
	}
	s.answered.Store(a.header.Get("X-Request-ID"), "malformed")
}

// abandon goes away in the middle of a command, or before it, in one of the ways in which clients do.
func (s *soak) abandon(r *rand.Rand, c *lifeClient) {
	argv := [][]string{{"sh", "-c", "sleep 5"}, {"yes"}, {"echo", "x"}}[r.IntN(3)]
	c.send([]string{"/api/exec", "/api/exec?mode=stream", "/api/exec?mode=stream&format=text"}[r.IntN(3)], lifeKey, lifeBody(argv...))
	time.Sleep(rand.N(20 * time.Millisecond))
	switch r.IntN(3) {
	case 0:
		c.SetLinger(0)
	case 1:
		c.CloseWrite()
		io.Copy(io.Discard, c.r)
	}
	s.tell("abandoned")
}

// TestSoak lets clients of all kinds at a server whose settings change all the time, and an oracle watch each decision.
func TestSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	s := &soak{lifeHome: newLifeHome(t, nil), versions: soakVersions(), seed: rand.Uint64(), count: map[string]int{}}
	t.Logf("seed %d", s.seed)
	s.write("settings.json", s.versions[0].text())
	s.serve("start")
	if a := s.exec("", "echo", "first"); a.object().Output != "first\n" {
		t.Fatalf("at first: %d %s", a.code, a.body)
	}
	s.rewrite()
	s.work(*soakFor / 4)
	s.settled()
	before := s.cost()
	s.work(*soakFor * 3 / 4)
	s.settled()
	s.levels(before, soakMoreRSS)
	s.mu.Lock()
	t.Logf("%d rewrites, %v", s.done.Load(), s.count)
	s.mu.Unlock()
	if !s.covered() {
		t.Error("not every kind of answer was met")
	}
	s.write("settings.json", s.versions[0].text())
	s.must("stop")
	s.pid = 0
	all := s.verified()
	lifePairs(t, all)
	s.recorded(all)
}

// settled waits until the last abandoned command has its end.
func (s *soak) settled() {
	s.t.Helper()
	lifeUntil(s.t, "each start has its end", func() bool {
		all := s.records()
		return len(lifeEvents(all, "exec_start")) == len(lifeEvents(all, "exec_end"))
	})
}

// recorded holds the audit log against what the clients were told, and against what no version ever allowed.
func (s *soak) recorded(all []lifeRecord) {
	s.t.Helper()
	events := map[string][]lifeRecord{}
	for _, r := range all {
		if r.RequestID != "" {
			events[r.RequestID] = append(events[r.RequestID], r)
		}
		if r.Event == "exec_start" && !slices.ContainsFunc(s.versions, func(v soakVersion) bool { return v.says != nil && v.says(r.Argv) == "allow" }) {
			s.t.Errorf("record %d: no settings allow %q", r.Seq, r.Argv)
		}
	}
	s.answered.Range(func(id, got any) bool {
		its := events[id.(string)]
		ok := false
		switch got {
		case "allow":
			ok = len(its) == 2 && its[0].Event == "exec_start" && its[1].Event == "exec_end"
		case "command_denied", "command_not_allowed":
			ok = len(its) == 1 && its[0].Event == "exec_denied" && its[0].Denial == got
		default: // only an auth_failed
			ok = len(its) == 0 || len(its) == 1 && its[0].Event == "auth_failed"
		}
		if !ok {
			s.t.Errorf("request %s was answered with %s and is recorded as %+v", id, got, its)
		}
		return true
	})
}
