package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/time/rate"
)

const serverTestKey = "0123456789-the-key-of-the-tests"

// testServer is a real server on a port of its own, with its own configuration directory.
type testServer struct {
	*server
	t     testing.TB
	addr  string
	paths paths
	log   *lockedBuffer
	stop  func() // and wait until it has ended
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *lockedBuffer) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

// serverFiles makes a configuration directory; files are paths in it and their content, hooks executable.
func serverFiles(t testing.TB, settings string, files map[string]string) paths {
	dir := t.TempDir()
	p := paths{dir: dir, settings: filepath.Join(dir, "settings.json"), env: filepath.Join(dir, ".env"), plugins: filepath.Join(dir, "plugins"), audit: filepath.Join(dir, "audit.jsonl")}
	files2 := map[string]string{"settings.json": settings}
	for name, text := range files {
		files2[name] = text
	}
	if err := errors.Join(os.Chmod(dir, 0o700), os.Mkdir(p.plugins, 0o700)); err != nil {
		t.Fatal(err)
	}
	for name, text := range files2 {
		mode := os.FileMode(0o600)
		if strings.Contains(name, "/hooks/") {
			mode = 0o700
		}
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), mode)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// startServer serves until the test ends. change may alter the server before it starts.
func startServer(t testing.TB, settings string, files map[string]string, change func(*server)) *testServer {
	t.Helper()
	p := serverFiles(t, settings, files)
	key, err := newAPIKey(serverTestKey)
	if err != nil {
		t.Fatal(err)
	}
	set, err := loadSettings(p)
	if err != nil {
		t.Fatal(err)
	}
	_, plugins, problems := loadPlugins(p, set)
	for _, problem := range problems {
		t.Logf("plugin %s: %s", problem.Name, problem.Problem)
	}
	var rules []ruleSet
	for _, plugin := range plugins {
		rules = append(rules, plugin.Rules)
	}
	st, err := openStore(p, rules)
	if err != nil {
		t.Fatal(err)
	}
	audit, err := openAudit(p.audit, true, key)
	if err != nil {
		t.Fatal(err)
	}
	ts := &testServer{t: t, paths: p, log: &lockedBuffer{}}
	ts.server = &server{start: startup{key: key, enabled: true}, store: st, audit: audit, runner: theRunner(t), plugins: plugins,
		log: log.New(ts.log, "", 0)}
	if change != nil {
		change(ts.server)
	}
	l, err := listen("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = l.Addr().String()
	if err := ts.prepare(ts.addr); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- ts.serve(ctx, l) }()
	ts.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		ts.stop()
		audit.close()
		if strings.Contains(ts.log.String(), serverTestKey) {
			t.Errorf("the key is in the log:\n%s", ts.log)
		}
		if data, _ := os.ReadFile(p.audit); bytes.Contains(data, []byte(serverTestKey)) {
			t.Errorf("the key is in the audit log:\n%s", data)
		}
	})
	ts.raw(getRequest("/ping", ""))
	return ts
}

// wire makes text what goes over the wire: CRLF for each newline, and the key for KEY.
func wire(text string) []byte {
	return []byte(strings.NewReplacer("\n", "\r\n", "KEY", serverTestKey).Replace(text))
}

// raw sends wire(text) and gives all that comes back until the server closes.
func (ts *testServer) raw(text string) string {
	ts.t.Helper()
	conn := ts.dial()
	defer conn.Close()
	conn.Write(wire(text))
	return ts.rest(conn)
}

func (ts *testServer) dial() *net.TCPConn {
	ts.t.Helper()
	conn, err := net.Dial("tcp", ts.addr)
	if err != nil {
		ts.t.Fatal(err)
	}
	ts.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(hangGuard))
	return conn.(*net.TCPConn)
}

func (ts *testServer) rest(conn net.Conn) string {
	ts.t.Helper()
	all, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		ts.t.Errorf("the server neither answers nor closes; so far %q", all)
	}
	return string(all)
}

// do makes one request with the key and gives its answer, read whole. A header without value is left out.
func (ts *testServer) do(method, target, body string, headers ...string) (*http.Response, string) {
	ts.t.Helper()
	r, err := http.NewRequest(method, "http://"+ts.addr+target, strings.NewReader(body))
	if err != nil {
		ts.t.Fatal(err)
	}
	r.Header.Set("X-API-Key", serverTestKey)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		if r.Header.Set(headers[i], headers[i+1]); headers[i+1] == "" {
			r.Header.Del(headers[i])
		}
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		ts.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		ts.t.Errorf("reading the answer of %s %s: %v", method, target, err)
	}
	return resp, string(text)
}

// exec posts one command.
func (ts *testServer) exec(query string, args ...string) (*http.Response, string) {
	ts.t.Helper()
	return ts.do("POST", "/api/exec"+query, execBody(args...))
}

func execBody(args ...string) string {
	body, _ := json.Marshal(map[string][]string{"args": args})
	return string(body)
}

func execRequest(args ...string) string {
	body := execBody(args...)
	return fmt.Sprintf("POST /api/exec HTTP/1.1\nHost: x\nX-API-Key: KEY\nContent-Type: application/json\nContent-Length: %d\n\n%s", len(body), body)
}

// records gives the audit records of one event.
func (ts *testServer) records(event string) (found []auditRecord) {
	ts.t.Helper()
	lines, err := tailAudit(ts.paths.audit, 1<<20)
	if err != nil {
		ts.t.Fatal(err)
	}
	for _, line := range lines {
		if line.Record.Event == event {
			found = append(found, line.Record)
		}
	}
	return found
}

func errorCode(body string) string {
	var e struct{ Error string }
	json.Unmarshal([]byte(body), &e)
	return e.Error
}

// serverGolden compares with testdata/server/name; AEXEC_UPDATE_GOLDEN=1 writes it.
func serverGolden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", "server", name)
	if os.Getenv("AEXEC_UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	g, w := strings.Split(got, "\n"), strings.Split(string(want), "\n")
	for i := range max(len(g), len(w)) {
		if i >= len(w) || i >= len(g) || g[i] != w[i] {
			t.Fatalf("%s:%d: got\n%q\nwant\n%q", file, i+1, g[min(i, len(g)-1)], w[min(i, len(w)-1)])
		}
	}
}

const openSettings = `{"exec":{"allow":["*"],"deny":["/^sudo/"]},"timeoutMs":20000,"killGraceMs":200}`

func getRequest(path, more string) string {
	return "GET " + path + " HTTP/1.1\nHost: x\nConnection: close\n" + more + "\n"
}

func postRequest(path, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\nHost: x\nConnection: close\nX-API-Key: KEY\nContent-Type: application/json\nContent-Length: %d\n\n%s", path, len(body), body)
}

// TestServerAnswers writes down what every status and code looks like on the wire.
func TestServerAnswers(t *testing.T) {
	t.Setenv("PATH", "/usr/bin:/bin")
	small := `{"exec":{"allow":["sh *","nothere","/etc/passwd","printf *"],"deny":["/^sudo/"]},"timeoutMs":300,"killGraceMs":100,"maxOutputBytes":20,"maxStreamBytes":20,"maxRequestBodyBytes":200}`
	const key = "X-API-Key: KEY\n"
	plain := func(line string) string { return line + " HTTP/1.1\nHost: x\nConnection: close\n\n" }
	run := func(args ...string) string { return postRequest("/api/exec", execBody(args...)) }
	text := func(args ...string) string { return postRequest("/api/exec?format=text", execBody(args...)) }
	stream := func(args ...string) string { return postRequest("/api/exec?mode=stream", execBody(args...)) }
	raw := func(args ...string) string {
		return postRequest("/api/exec?mode=stream&format=text", execBody(args...))
	}
	body := func(text string) string { return postRequest("/api/exec", text) }
	query := func(q string) string { return postRequest("/api/exec?"+q, execBody("printf", "a")) }
	swap := func(request, old, new string) string { return strings.Replace(request, old, new, 1) }
	var b strings.Builder
	for _, variant := range []struct {
		name, settings string
		change         func(*server)
		requests       []string
	}{
		{"routes", small, nil, []string{
			getRequest("/ping", ""), plain("POST /ping"), getRequest("/nothing", ""), getRequest("/api/nothing", key), getRequest("/private/x", ""), getRequest("/private/x", key),
			getRequest("/skills/nothing/SKILL.md", ""), getRequest("/private/skills/nothing/SKILL.md", key), getRequest("/api/command/x/y", ""), getRequest("/api/command/x/y", key),
			getRequest("/api/exec", ""), getRequest("/api/exec", key), getRequest("/api/acl/check", key), plain("DELETE /SKILL.md"), plain("OPTIONS *"), plain("OPTIONS /api/exec"),
			plain("TRACE /SKILL.md"), plain("CONNECT x:1"), plain("CONNECT /api/exec"), swap(getRequest("/api/acl", key), "GET", "FROB"), getRequest("/api/acl", ""), getRequest("/api/plugins", key),
			swap(getRequest("/api/plugins", key), "GET", "HEAD"), "HEAD /SKILL.md HTTP/1.0\n\n",
		}},
		{"queries", small, nil, []string{
			getRequest("/api/acl?x=1", key), getRequest("/api/acl?mode=stream", key), getRequest("/api/acl?a=%zz", key), getRequest("/api/acl?a=1;b=2", key), getRequest("/skills?x=1;%zz", ""),
			query("mode=stream&mode=stream"), query("mode=fast"), query("mode="), query("format=xml"), query("cmd=id"), query("args=id"), query("apiKey=KEY"), query("mode=buffered&format=json"),
		}},
		{"bodies", small, nil, []string{
			body(""), body("{"), body(`{"args":["a"]} x`), body(`{"args":["a"],"args":["b"]}`), body("[]"), body("\xff"), body("\ufeff{}"), body(`{"cmd":"id","args":["a"],"Args":[],"KEY":1}`),
			body(`{}`), body(`{"args":null}`), body(`{"args":"id"}`), body(`{"args":[]}`), body(`{"args":[1]}`), body(`{"args":[" "]}`), body(`{"args":["a\u0000"]}`), body(`{"args":["\ud800"]}`),
			body(`{"args":["` + strings.Repeat("x", 200) + `"]}`), swap(run("id"), "application/json", "text/plain"), swap(run("id"), "Content-Type: application/json\n", ""),
			swap(run("printf", "a"), "application/json", "Application/JSON; charset=utf-8"), swap(run("printf", "a"), "Content-Length", "Transfer-Encoding: chunked\nContent-Length"),
		}},
		{"policy", small, nil, []string{
			run("sudo", "id"), run("id"), postRequest("/api/acl/check", execBody("sudo", "id")), postRequest("/api/acl/check", execBody("id")), postRequest("/api/acl/check", execBody("sh", "x")),
		}},
		{"buffered", small, nil, []string{
			run("printf", `a\n<&>"\377`), run("sh", "-c", "echo out; echo err >&2; exit 3"), run("sh", "-c", "kill -9 $$"), run("nothere"), run("/etc/passwd"),
			run("sh", "-c", "echo x; exec sleep 9"), run("sh", "-c", "printf %030d 7"),
			text("printf", `a\377`), text("sh", "-c", "echo err >&2; exit 3"), text("sh", "-c", "kill -9 $$"), text("nothere"), text("sh", "-c", "exec sleep 9"),
		}},
		{"streamed", small, nil, []string{
			stream("sh", "-c", "echo a"), stream("sh", "-c", "echo e >&2; exit 3"), stream("sh", "-c", "kill -9 $$"), stream("nothere"), stream("sh", "-c", "echo x; exec sleep 9"), stream("sh", "-c", "printf %030d 7"),
			raw("sh", "-c", "echo a; exit 3"), raw("sh", "-c", "exec sleep 9"), raw("sh", "-c", "kill -9 $$"), raw("nothere"), swap(raw("printf", "a"), "HTTP/1.1", "HTTP/1.0"), swap(stream("printf", "a"), "HTTP/1.1", "HTTP/1.0"),
		}},
		{"disabled", small, func(s *server) { s.start.enabled = false }, []string{getRequest("/ping", ""), getRequest("/SKILL.md", ""), run("printf", "a")}},
		{"settings broken", small, nil, []string{run("printf", "a"), getRequest("/SKILL.md", ""), getRequest("/ping", "")}},
		{"address not admitted", `{"ip":{"allow":["192.0.2.1"]}}`, nil, []string{getRequest("/SKILL.md", "")}},
		{"rate limit", `{"rateLimit":{"windowMs":600000,"max":1}}`, nil, []string{getRequest("/SKILL.md", ""), getRequest("/SKILL.md", ""), getRequest("/ping", ""), getRequest("/api/plugins", key), getRequest("/api/plugins", key)}},
		{"audit gone", openSettings, nil, []string{run("printf", "a"), stream("printf", "a")}},
	} {
		ts := startServer(t, variant.settings, nil, variant.change)
		switch variant.name {
		case "settings broken":
			os.WriteFile(ts.paths.settings, []byte("{"), 0o600)
		case "audit gone":
			ts.audit.close()
			os.Remove(ts.paths.audit)
			os.Mkdir(ts.paths.audit, 0o700)
		}
		for _, request := range variant.requests {
			title := strings.NewReplacer("Host: x\nConnection: close\n", "", strings.Repeat("x", 200), "x…").Replace(request)
			fmt.Fprintf(&b, "==== %s: %s\n---- %s\n", variant.name, strings.TrimSpace(strconv.QuoteToGraphic(title)), ts.shown(request))
		}
		ts.stop()
	}
	serverGolden(t, "answers.golden", b.String())
}

// shown is an answer without what differs from run to run, long bodies cut.
func (ts *testServer) shown(request string) string {
	text := ts.raw(request)
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(text)), &http.Request{Method: method})
	if err != nil {
		return "no answer: " + err.Error()
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		ts.t.Errorf("%s: %v", request, err)
	}
	var b strings.Builder
	fmt.Fprintln(&b, resp.Status)
	for _, h := range []http.Header{resp.Header, resp.Trailer} {
		for _, name := range slices.Sorted(maps.Keys(h)) {
			if slices.Equal(h[name], fixedHeaders[name]) || name == "Date" || name == "Content-Length" || name == "X-Request-Id" && len(h[name][0]) == 26 {
				continue
			}
			fmt.Fprintf(&b, "%s: %s\n", name, strings.Join(h[name], " | "))
		}
	}
	for name := range fixedHeaders {
		if resp.Header[name] == nil && !strings.HasPrefix(text, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain") {
			ts.t.Errorf("%s: no %s", request, name)
		}
	}
	body = regexp.MustCompile(`"duration":\d+`).ReplaceAll(body, []byte(`"duration":0`))
	if len(body) > 800 {
		body = append(body[:20], "…"...)
	}
	if strings.Contains(text, serverTestKey) {
		ts.t.Errorf("%s: the key is in the answer", request)
	}
	return strings.ReplaceAll(b.String(), ts.addr, "ADDR") + strconv.QuoteToGraphic(string(body))
}

// TestServerGates: each request offends against two gates, and the earlier one answers.
func TestServerGates(t *testing.T) {
	down, noIP, once := func(s *server) { s.start.enabled = false }, `{"ip":{"allow":[]}}`, `{"rateLimit":{"windowMs":600000,"max":1}}`
	for _, c := range []struct {
		name, settings string
		change         func(*server)
		broken         bool // the settings, after start
		request        string
		want           string
	}{
		{"path before enabled", `{}`, down, false, getRequest("//ping", ""), "not_found"},
		{"enabled before settings", `{}`, down, true, getRequest("/SKILL.md", ""), "disabled"},
		{"settings before ip", noIP, nil, true, getRequest("/SKILL.md", ""), "settings_invalid"},
		{"ip before rate", `{"rateLimit":{"windowMs":600000,"max":1},"ip":{"allow":[]}}`, nil, false, getRequest("/SKILL.md", ""), "ip_denied"},
		{"ip before route", noIP, nil, false, getRequest("/nothing", ""), "ip_denied"},
		{"rate before route", once, nil, false, getRequest("/nothing", ""), "rate_limited"},
		{"route before key", `{}`, nil, false, getRequest("/api/nothing", ""), "not_found"},
		{"method before key", `{}`, nil, false, strings.Replace(getRequest("/api/acl", ""), "GET", "PUT", 1), "method_not_allowed"},
		{"key before route, private", `{}`, nil, false, getRequest("/private/nothing", ""), "unauthorized"},
		{"key before method, private", `{}`, nil, false, strings.Replace(getRequest("/private/skills/x/SKILL.md", ""), "GET", "PUT", 1), "unauthorized"},
		{"key before route, plugins", `{}`, nil, false, getRequest("/api/command/x", ""), "unauthorized"},
		{"key before query", `{}`, nil, false, strings.Replace(postRequest("/api/exec?x=1", ""), "KEY", "no", 1), "unauthorized"},
		{"query before body", `{}`, nil, false, postRequest("/api/exec?x=1", ""), "invalid_query"},
		{"body before policy", `{}`, nil, false, postRequest("/api/exec", "{}"), "invalid_args"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ts := startServer(t, c.settings, nil, c.change)
			if strings.Contains(c.settings, "rateLimit") {
				ts.do("GET", "/SKILL.md", "", "X-API-Key", "")
			}
			if c.broken {
				os.WriteFile(ts.paths.settings, []byte("{"), 0o600)
			}
			answer := ts.raw(c.request)
			if _, body, _ := strings.Cut(answer, "\r\n\r\n"); errorCode(body) != c.want {
				t.Errorf("got %q, want %s", answer, c.want)
			}
		})
	}
}

func TestServerUncleanPaths(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	for _, target := range []string{
		"//", "//ping", "/ping//", "/./ping", "/../ping", "/skills/../ping", "/skills/aexec/./SKILL.md", "/%2e%2e/ping", "/%2E/ping", "/skills/..%2fping", "/skills%2faexec/SKILL.md", "/ping%00", "/%00",
		"/skills/%2e%2e/%2e%2e/etc/passwd", "/private/skills/x/references/..%2f..%2fsettings.json", "/ping/", "/SKILL.md/", "/skills/", "/api/exec/", "/api/./exec", "/api//exec", "/%2fping", "/skills/aexec%2fSKILL.md",
		"/SKILL.md%20", "/SKILL.md%0a", "/skill.md", "/SKILL.MD", "/api/acl/SKILL.md", "/api/command/x/SKILL.md/..", "http://x//ping", "*", "/skills/%5c..%5c/SKILL.md", "/api/exec%3f", "/%252e%252e/ping",
	} {
		for _, method := range []string{"GET", "POST", "HEAD", "CONNECT"} {
			answer := ts.raw(method + " " + target + " HTTP/1.1\nHost: x\nConnection: close\nX-API-Key: KEY\n\n")
			goes := strings.HasPrefix(answer, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain") // net/http's own: the target is malformed
			if !strings.HasPrefix(answer, "HTTP/1.1 404 ") && !goes || strings.Contains(answer, "Location:") {
				t.Errorf("%s %s: %q", method, target, answer)
			}
		}
	}
}

// TestServerFraming sends what proxies and servers have read differently. What is smuggled behind must not be answered.
func TestServerFraming(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	const head = "POST /api/exec HTTP/1.1\nHost: x\nX-API-Key: KEY\nContent-Type: application/json\n"
	const chunks = "11\n{\"args\":[\"true\"]}\n0\n\n"
	const ping, last = "GET /ping HTTP/1.1\nHost: x\n\n", "GET /ping HTTP/1.1\nHost: x\nConnection: close\n\n"
	noKey := strings.Replace(head, "KEY", "no", 1)
	for _, c := range []struct {
		name, request string
		statuses      string
		ran           int
	}{
		{"length then chunked", head + "Content-Length: 4\nTransfer-Encoding: chunked\n\n" + chunks + last, "400", 0},
		{"chunked then length", head + "Transfer-Encoding: chunked\nContent-Length: 4\n\n" + chunks + last, "400", 0},
		{"lower case", head + "transfer-encoding: chunked\ncontent-LENGTH: 4\n\n" + chunks + last, "400", 0},
		{"HTTP/1.0", strings.Replace(head, "1.1", "1.0", 1) + "Connection: keep-alive\nTransfer-Encoding: chunked\nContent-Length: 4\n\n" + chunks + last, "400", 0},
		{"folded", head + "Transfer-Encoding:\n chunked\nContent-Length:\n 4\n\n" + chunks + last, "400", 0},
		{"zero length", head + "Content-Length: 0\nTransfer-Encoding: chunked\n\n" + chunks + last, "400", 0},
		{"two lengths", head + "Content-Length: 4\nContent-Length: 5\n\nabcd" + last, "400", 0},
		{"signed length", head + "Content-Length: +4\n\nabcd" + last, "400", 0},
		{"space before colon", head + "Transfer-Encoding : chunked\n\n" + chunks + last, "400", 0},
		{"other coding", head + "Transfer-Encoding: gzip, chunked\n\n" + chunks + last, "501", 0},
		{"chunked twice", head + "Transfer-Encoding: chunked\nTransfer-Encoding: chunked\n\n" + chunks + last, "501", 0},
		{"behind another", ping + head + "Transfer-Encoding: chunked\nContent-Length: 4\n\n" + chunks + last, "200 400", 0},
		{"without a key", noKey + "Content-Length: 4\nTransfer-Encoding: chunked\n\n" + chunks + last, "400", 0},
		{"on a document", strings.Replace(head, "POST /api/exec", "GET /SKILL.md", 1) + "Content-Length: 4\nTransfer-Encoding: chunked\n\n" + chunks + last, "400", 0},
		{"line feeds alone", strings.ReplaceAll(head+"Content-Length: 4\nTransfer-Encoding: chunked\n\n", "\n", "\v") + last, "400", 0},
		{"at the end of the longest head", head + "Content-Length: 4\nX-Long: " + strings.Repeat("a", maxHeadBytes) + "\nTransfer-Encoding: chunked\n\n" + chunks, "400", 0},
		{"a body nobody reads", noKey + "Content-Length: 54\n\n" + last, "401", 0},
		{"chunked alone", head + "Transfer-Encoding: chunked\n\n" + chunks + last, "400", 0},
		{"HTTP/1.0 without doubt", strings.Replace(execRequest("true"), "1.1\n", "1.0\nConnection: keep-alive\n", 1) + last, "200", 1},
		{"pipelined", ping + execRequest("true") + ping + execRequest("true") + last, "200 200 200 200 200", 2},
	} {
		before := len(ts.records("exec_start"))
		conn := ts.dial()
		conn.Write(bytes.ReplaceAll(wire(c.request), []byte("\v"), []byte("\n")))
		answer := ts.rest(conn)
		var statuses []string
		for _, m := range regexp.MustCompile(`HTTP/1\.[01] (\d+) `).FindAllStringSubmatch(answer, -1) {
			statuses = append(statuses, m[1])
		}
		if got := strings.Join(statuses, " "); got != c.statuses {
			t.Errorf("%s: answered %s, want %s: %q", c.name, got, c.statuses, answer)
		}
		if ran := len(ts.records("exec_start")) - before; ran != c.ran {
			t.Errorf("%s: ran %d commands, want %d", c.name, ran, c.ran)
		}
	}
}

func TestServerKeys(t *testing.T) {
	for _, c := range []struct {
		name, target, headers string
		byQuery               bool
		status                int
		source                string // of the refusal
	}{
		{"none", "/api/plugins", "", false, 401, "none"},
		{"header", "/api/plugins", "X-API-Key: KEY\n", false, 200, ""},
		{"bearer", "/api/plugins", "Authorization: Bearer KEY\n", false, 200, ""},
		{"scheme in other case", "/api/plugins", "authorization: bEARER KEY\n", false, 200, ""},
		{"both, the same", "/api/plugins", "X-API-Key: KEY\nAuthorization: Bearer KEY\n", false, 200, ""},
		{"both, header wrong", "/api/plugins", "X-API-Key: KEYx\nAuthorization: Bearer KEY\n", false, 401, "header"},
		{"both, bearer wrong", "/api/plugins", "X-API-Key: KEY\nAuthorization: Bearer x\n", false, 401, "header"},
		{"header twice", "/api/plugins", "X-API-Key: KEY\nX-API-Key: KEY\n", false, 401, "header"},
		{"bearer twice", "/api/plugins", "Authorization: Bearer KEY\nAuthorization: Bearer KEY\n", false, 401, "bearer"},
		{"empty header beside", "/api/plugins", "X-API-Key:\nAuthorization: Bearer KEY\n", false, 401, "header"},
		{"list in one header", "/api/plugins", "X-API-Key: KEY, KEY\n", false, 401, "header"},
		{"basic", "/api/plugins", "Authorization: Basic KEY\n", false, 401, "none"},
		{"basic beside", "/api/plugins", "Authorization: Basic eA==\nX-API-Key: KEY\n", false, 200, ""},
		{"huge", "/api/plugins", "X-API-Key: " + strings.Repeat("KEY", 500) + "\n", false, 401, "header"},
		{"prefix", "/api/plugins", "X-API-Key: 0123456789-the-key\n", false, 401, "header"},
		{"cookie", "/api/plugins", "Cookie: apiKey=KEY\n", false, 401, "none"},
		{"query, not enabled", "/api/plugins?apiKey=KEY", "", false, 401, "none"},
		{"query", "/api/plugins?apiKey=KEY", "", true, 200, ""},
		{"query twice", "/api/plugins?apiKey=KEY&apiKey=KEY", "", true, 401, "query"},
		{"query wrong, header right", "/api/plugins?apiKey=x", "X-API-Key: KEY\n", true, 401, "header"},
		{"query under another case", "/api/plugins?apikey=KEY", "", true, 401, "none"},
		{"query, malformed beside", "/api/plugins?apiKey=KEY&%zz", "", true, 400, ""},
	} {
		ts := startServer(t, `{}`, nil, func(s *server) { s.start.allowQueryKey = c.byQuery })
		answer := ts.raw(getRequest(c.target, c.headers))
		if !strings.HasPrefix(answer, fmt.Sprintf("HTTP/1.1 %d ", c.status)) || strings.Contains(answer, serverTestKey) {
			t.Errorf("%s: %q", c.name, answer)
		}
		failed := ts.records("auth_failed")
		if len(failed) != len(c.source)/max(1, len(c.source)) || len(failed) == 1 && failed[0].AuthSource != c.source {
			t.Errorf("%s: recorded %+v", c.name, failed)
		}
		ts.stop()
	}
}

// TestServerClientGone: whichever way the client goes, its command ends, and its end is recorded.
func TestServerClientGone(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["*"]},"timeoutMs":300000,"killGraceMs":200}`, nil, nil)
	ways := map[string]func(conn *net.TCPConn){
		"close":      func(conn *net.TCPConn) { conn.Close() },
		"reset":      func(conn *net.TCPConn) { conn.SetLinger(0); conn.Close() },
		"half-close": func(conn *net.TCPConn) { conn.CloseWrite() },
	}
	for _, leave := range ways {
		for _, query := range []string{"", "?mode=stream", "?mode=stream&format=text"} {
			w := newWitness(t)
			conn := ts.dial()
			conn.Write(wire(strings.Replace(execRequest("sh", "-c", "exec 3>"+w.path+"; echo up >&3; echo up; sleep 60 & exec sleep 60"), "/api/exec", "/api/exec"+query, 1)))
			w.await(t)
			leave(conn)
			w.all(t)
		}
	}
	ts.stop()
	ends := ts.records("exec_end")
	if len(ends) != 3*len(ways) {
		t.Errorf("%d ends are recorded, want %d", len(ends), 3*len(ways))
	}
	for _, end := range ends {
		if end.Reason != string(endClient) {
			t.Errorf("recorded as %q", end.Reason)
		}
	}
}

// TestServerShutdown: a running command is ended and answered with what it printed, in every mode, and nothing new runs.
func TestServerShutdown(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	idle := ts.dial() // must hold up nothing
	answers := map[string]chan string{}
	for _, query := range []string{"", "?format=text", "?mode=stream", "?mode=stream&format=text"} {
		w := newWitness(t)
		conn, answer := ts.dial(), make(chan string, 1)
		conn.Write(wire(strings.Replace(execRequest("sh", "-c", "echo printed; exec 3>"+w.path+"; echo up >&3; exec sleep 60"), "/api/exec", "/api/exec"+query, 1)))
		go func() { answer <- ts.rest(conn) }()
		w.await(t)
		answers[query] = answer
	}
	go ts.stop()
	for query, want := range map[string]string{
		"": "HTTP/1.1 503 .*\"output\":\"printed\\\\n\".*\"exitCode\":null.*\"error\":\"shutting_down\"", "?format=text": "HTTP/1.1 503 .*\"error\":\"shutting_down\"",
		"?mode=stream":             "HTTP/1.1 200 .*printed.*\\{\"output\":null,\"exitCode\":null,\"status\":\"error\",\"error\":\"shutting_down\"[^\n]*\n[^{]*$",
		"?mode=stream&format=text": "HTTP/1.1 200 .*printed\n.*X-Exec-Error: shutting_down",
	} {
		if got := <-answers[query]; !regexp.MustCompile("(?s)^" + want).MatchString(got) {
			t.Errorf("%q: %q", query, got)
		}
	}
	if rest := ts.rest(idle); rest != "" {
		t.Errorf("an idle connection got %q", rest)
	}
	ts.stop()
	if _, err := net.Dial("tcp", ts.addr); err == nil {
		t.Error("it still listens")
	}
}

// TestServerFollowsSettings: edits count from the next request on; what is broken allows nothing and recovers.
func TestServerFollowsSettings(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["printf *"]}}`, nil, nil)
	write := func(text string) {
		if err := os.WriteFile(ts.paths.settings, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i, step := range []struct {
		settings string
		want     int
	}{{"", 200}, {`{"exec":{"allow":[]}}`, 403}, {`{"exec":{"allow":["/(/"]}}`, 503}, {`{`, 503}, {`{"exec":{"allow":["printf *"]},"maxRequestBodyBytes":5}`, 200}} {
		if step.settings != "" {
			write(step.settings)
		}
		if resp, body := ts.exec("", "printf", "x"); resp.StatusCode != step.want || strings.Contains(body, ts.paths.settings) {
			t.Errorf("step %d: %d %s", i, resp.StatusCode, body)
		}
	}
	if n, m := len(ts.records("settings_reloaded")), len(ts.records("settings_invalid")); n != 2 || m != 2 {
		t.Errorf("recorded %d reloads and %d faults, want 2 of each", n, m)
	}
	if log := ts.log.String(); !strings.Contains(log, "settings.json:1:") || strings.Contains(log, " \n") {
		t.Errorf("the log does not say where:\n%s", ts.log)
	}
	// audit.file follows too, and back to its default.
	other := filepath.Join(ts.paths.dir, "other.jsonl")
	write(`{"exec":{"allow":["printf *"]},"audit":{"file":"` + other + `"}}`)
	ts.exec("", "printf", "x")
	if data, err := os.ReadFile(other); err != nil || bytes.Count(data, []byte(`"exec_start"`)) != 1 {
		t.Errorf("%q, %v", data, err)
	}
	before := len(ts.records("exec_start"))
	write(`{"exec":{"allow":["printf *"]}}`)
	if ts.exec("", "printf", "x"); len(ts.records("exec_start")) != before+1 {
		t.Error("the audit log did not come back to its place")
	}
}

// TestServerSlots: who waits for each answer never meets the own slot; one more than the slots is told when to come again.
func TestServerSlots(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["*"]},"maxConcurrentExec":1}`, nil, nil)
	for _, query := range []string{"", "?format=text", "?mode=stream", "?mode=stream&format=text"} {
		for range 25 {
			if resp, body := ts.exec(query, "true"); resp.StatusCode != 200 {
				t.Fatalf("%s: %d %s", query, resp.StatusCode, body)
			}
		}
	}
	w := newWitness(t)
	conn := ts.dial()
	conn.Write(wire(execRequest("sh", "-c", "exec 3>"+w.path+"; echo up >&3; exec sleep 60")))
	w.await(t)
	resp, body := ts.exec("", "true")
	if resp.StatusCode != 429 || errorCode(body) != "too_many_concurrent_exec" || resp.Header.Get("Retry-After") == "" || !strings.Contains(body, `"retryable":true`) {
		t.Errorf("%d %v %s", resp.StatusCode, resp.Header, body)
	}
	conn.Close()
	w.all(t)
	if starts, ends := len(ts.records("exec_start")), len(ts.records("exec_end")); starts != 101 {
		t.Errorf("%d starts and %d ends are recorded, want 101", starts, ends)
	}
}

// TestServerStream joins a stream's lines and compares them with what was written, whatever the pieces.
func TestServerStream(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["*"]},"maxStreamBytes":100000000}`, nil, nil)
	text := filepath.Join(t.TempDir(), "text")
	want := strings.Repeat("aé€😀\"\\\n\x01", 200_000) + "\xf0\x9f"
	if err := os.WriteFile(text, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
	_, body := ts.exec("?mode=stream", "cat", text)
	var joined strings.Builder
	length, lines := 0, strings.Split(strings.TrimSuffix(body, "\n"), "\n")
	for i, line := range lines {
		var l struct {
			Output *string
			Length int
			Status string
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil || (l.Status == "running") != (i < len(lines)-1) {
			t.Fatalf("line %d of %d: %v: %.200s", i, len(lines), err, line)
		}
		if l.Output != nil {
			joined.WriteString(*l.Output)
		}
		length += l.Length
	}
	if joined.String() != replaceInvalid([]byte(want)) || length != len(want) {
		t.Errorf("%d bytes by the lines' length, want %d; equal: %v", length, len(want), joined.String() == replaceInvalid([]byte(want)))
	}
	if _, body := ts.exec("?mode=stream&format=text", "cat", text); body != want {
		t.Errorf("raw: %d bytes, want %d", len(body), len(want))
	}
	// Half a character waits for its other half, or for the end.
	_, body = ts.exec("?mode=stream", "sh", "-c", `printf 'a\303'; printf 'e\342' >&2; sleep 0.1; printf '\251z\303'`)
	for _, want := range []string{`{"output":"a","length":1,`, `{"output":"éz","length":3,`, `{"output":"\ufffd","length":1,`, `{"output":null,"stderr":"e","status":"running"}`, `{"output":null,"stderr":"\ufffd",`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in %s", want, body)
		}
	}
}

// TestServerStreamAtOnce: output is there while the command runs.
func TestServerStreamAtOnce(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	for query, want := range map[string]string{"?mode=stream": `{"output":"é","length":2,"status":"running"}`, "?mode=stream&format=text": "é"} {
		conn := ts.dial()
		conn.Write(wire(strings.Replace(execRequest("sh", "-c", "printf é; exec sleep 60"), "/api/exec", "/api/exec"+query, 1)))
		var got []byte
		for buf := make([]byte, 1024); !bytes.Contains(got, []byte(want)); {
			n, err := conn.Read(buf)
			if got = append(got, buf[:n]...); err != nil {
				t.Fatalf("%s: %v after %q", query, err, got)
			}
		}
		conn.Close()
	}
}

// TestServerStalledReader: a client that takes nothing holds up its command, and then loses it.
func TestServerStalledReader(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["*"]},"maxStreamBytes":1000000000000,"timeoutMs":60000}`, nil, func(s *server) { s.stall = 300 * time.Millisecond })
	for _, query := range []string{"?mode=stream", "?mode=stream&format=text"} {
		w := newWitness(t)
		conn := ts.dial()
		conn.Write(wire(strings.Replace(execRequest("sh", "-c", "exec 3>"+w.path+"; exec cat /dev/zero"), "/api/exec", "/api/exec"+query, 1)))
		w.all(t)
	}
}

// TestServerStalledReaderAtTheEnd: nor does it hold up the end, and its command is on record.
func TestServerStalledReaderAtTheEnd(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["*"]},"maxStreamBytes":1000000000000,"timeoutMs":60000}`, nil, nil)
	w := newWitness(t)
	ts.dial().Write(wire(strings.Replace(execRequest("sh", "-c", "exec 3>"+w.path+"; echo up >&3; exec cat /dev/zero"), "/api/exec", "/api/exec?mode=stream", 1)))
	w.await(t)
	time.Sleep(200 * time.Millisecond) // for the connection to fill up
	begun := time.Now()
	if ts.stop(); time.Since(begun) > writeTimeout/2 { // far less, but on a machine that is busy
		t.Errorf("it took %v to stop", time.Since(begun))
	}
	if n := len(ts.records("exec_end")); n != 1 {
		t.Errorf("%d ends are recorded, want 1", n)
	}
}

// TestServerSilentStream: a command may be silent for longer than one write may take, and its end is told all the same.
func TestServerSilentStream(t *testing.T) {
	ts := startServer(t, openSettings, nil, func(s *server) { s.stall = 100 * time.Millisecond })
	for query, want := range map[string]string{"?mode=stream": `"exitCode":3`, "?mode=stream&format=text": ""} {
		resp, body := ts.exec(query, "sh", "-c", "printf a; sleep 0.4; exit 3")
		if !strings.Contains(body, want) || want == "" && resp.Trailer.Get("X-Exit-Code") != "3" {
			t.Errorf("%s: %q, %v", query, body, resp.Trailer)
		}
	}
}

func replaceInvalid(b []byte) string {
	var s strings.Builder
	for _, r := range string(b) {
		s.WriteRune(r)
	}
	return s.String()
}

// TestJSONText: pieces of any size give the string that encoding/json reads back, with each bad byte replaced.
func TestJSONText(t *testing.T) {
	alphabet := []string{"a", "\"", "\\", "\n", "\x00", "\x7f", "é", "€", "😀", "\u2028", "\uFFFD", "\xff", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xed\xa0\x80", "\xc0\x80", "\xf4\x90\x80\x80", "<"}
	random := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		var whole []byte
		for range random.IntN(12) {
			whole = append(whole, alphabet[random.IntN(len(alphabet))]...)
		}
		var text jsonText
		got, rest := []byte{'"'}, whole
		for len(rest) > 0 {
			n := 1 + random.IntN(len(rest))
			piece, _ := text.next(rest[:n])
			got, rest = append(got, piece...), rest[n:]
			if !utf8.Valid(got) {
				t.Fatalf("%q: a character was cut: %q", whole, got)
			}
		}
		last, _ := text.next(nil)
		got = append(got, last...)
		var back string
		if err := json.Unmarshal(append(got, '"'), &back); err != nil || back != replaceInvalid(whole) {
			t.Fatalf("%q became %q (%v)", whole, back, err)
		}
	}
}

func FuzzExecBody(f *testing.F) {
	for _, body := range []string{`{"args":["a","b"]}`, `{"args":[]}`, `{"Args":["a"]}`, `{"args":["\ud800"]}`, `{"args":["a"],"args":["b"]}`, `{"args":["a\u0000"]}`, "\ufeff{}", `[`, `{"args":[["a"]]}`} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		args, e := parseExecBody(body)
		if (args == nil) == (e == nil) {
			t.Fatalf("neither or both: %q, %v", args, e)
		}
		if e != nil {
			if e.status != 400 || e.Message == "" || e.Hint == "" {
				t.Fatalf("%+v", e)
			}
			return
		}
		var same struct{ Args []string } // whatever passes here means the same to everybody
		if err := json.Unmarshal(body, &same); err != nil || !slices.Equal(same.Args, args) || checkArgv(args) != nil {
			t.Fatalf("%q read as %q, by encoding/json as %q (%v)", body, args, same.Args, err)
		}
	})
}

// TestLimiter: no number of addresses grows it, and none pays for another.
func TestLimiter(t *testing.T) {
	l := &limiter{every: 30 * time.Second, burst: 2, clients: map[string]*rate.Limiter{}}
	now := time.Now()
	take := func(addr string) bool { return l.take(netip.MustParseAddr(addr), false, now) }
	takes := func(addr string) (n int) {
		for range 3 {
			if take(addr) {
				n++
			}
		}
		return n
	}
	if takes("192.0.2.1") != 2 {
		t.Error("not two of three")
	}
	if addr := netip.MustParseAddr("192.0.2.1"); !l.take(addr, true, now) {
		t.Error("who has the key is counted with those who have not")
	}
	if !take("2001:db8::1") || !take("2001:db8::2") || take("2001:db8::3") || !take("2001:db8:0:1::1") {
		t.Error("IPv6 is not counted by /64")
	}
	addr := netip.MustParseAddr("10.0.0.0")
	for range 1_000_000 {
		if addr = addr.Next(); !l.take(addr, false, now) {
			t.Fatalf("%s is limited by what others did", addr)
		}
	}
	if len(l.clients) > maxRateClients {
		t.Errorf("%d are remembered", len(l.clients))
	}
	if now = now.Add(30 * time.Second); takes("10.15.66.64") != 2 {
		t.Error("a bucket is not full again")
	}
	if off := new(limiter); !off.take(addr, false, now) || len(off.clients) != 0 {
		t.Error("no limit limits")
	}
}

// TestServerKeylessFlood: requests without a key, or with a wrong one, use up nothing of an agent's.
func TestServerKeylessFlood(t *testing.T) {
	ts := startServer(t, `{"rateLimit":{"windowMs":600000,"max":3}}`, nil, nil)
	last := 0
	for range 10 {
		resp, _ := ts.do("GET", "/api/plugins", "", "X-API-Key", "wrong")
		last = resp.StatusCode
	}
	if resp, _ := ts.do("GET", "/api/plugins", ""); last != 429 || resp.StatusCode != 200 {
		t.Errorf("without a key %d, with it %d", last, resp.StatusCode)
	}
}

// TestServerManyConnections: clients that connect and say nothing, or not all, neither keep an agent out nor hold up the end.
func TestServerManyConnections(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	for i := range 600 {
		ts.dial().Write(wire([]string{"", "GET / HT", strings.TrimSuffix(execRequest("true"), "}")}[i%3]))
	}
	if answer := ts.raw(strings.Replace(execRequest("printf", "in"), "Host: x", "Host: x\nConnection: close", 1)); !strings.Contains(answer, `"output":"in"`) {
		t.Errorf("%q", answer)
	}
	begun := time.Now()
	if ts.stop(); time.Since(begun) > requestTimeout/2 { // far less, but on a machine that is busy
		t.Errorf("it took %v to stop", time.Since(begun))
	}
}

// TestServerUnreadBody: who has no key is answered before, and without, its body.
func TestServerUnreadBody(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	for _, request := range []string{
		"POST /api/exec HTTP/1.1\nHost: x\nContent-Length: 100000\n\n{", "POST /nothing HTTP/1.1\nHost: x\nContent-Length: 100000\n\n{", "GET /SKILL.md HTTP/1.1\nHost: x\nContent-Length: 100000\n\n{",
		"POST /api/exec HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n5\n", "POST /api/exec HTTP/1.1\nHost: x\nExpect: 100-continue\nContent-Length: 100000\n\n",
		"POST /api/exec HTTP/1.1\nHost: x\nX-API-Key: KEY\nContent-Type: application/json\nContent-Length: 99999999\n\n",
	} {
		if answer := ts.raw(request); !strings.HasPrefix(answer, "HTTP/1.1 ") || strings.Contains(answer, "100 Continue") {
			t.Errorf("%q: %q", request, answer)
		}
	}
	expect := strings.Replace(execRequest("true"), "Host: x", "Host: x\nConnection: close\nExpect: 100-continue", 1)
	if answer := ts.raw(expect); !strings.HasPrefix(answer, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ") {
		t.Errorf("%q", answer)
	}
}

// TestServerPatience: a body that dribbles is given up; a command may run longer than a request may take to arrive.
func TestServerPatience(t *testing.T) {
	ts := startServer(t, openSettings, nil, func(s *server) { s.patience = 200 * time.Millisecond })
	if answer := ts.raw(strings.Replace(execRequest("true"), "Content-Length: ", "Content-Length: 1", 1)); !strings.HasPrefix(answer, "HTTP/1.1 400 ") || !strings.Contains(answer, `"error":"invalid_request"`) || !strings.Contains(answer, "nothing ran") {
		t.Errorf("%q", answer)
	}
	if n := len(ts.records("exec_start")); n != 0 {
		t.Errorf("ran %d commands", n)
	}
	if _, body := ts.exec("", "sh", "-c", "sleep 0.6; echo slept"); !strings.Contains(body, `"output":"slept\n"`) {
		t.Error(body)
	}
	if answer := ts.raw("GET / HTTP/1.1\nHo"); strings.HasPrefix(answer, "HTTP/1.1 2") {
		t.Errorf("half a head: %q", answer)
	}
}

func TestServerDocuments(t *testing.T) {
	ts := startServer(t, openSettings, map[string]string{
		"plugins/tool/SKILL.md": "---\nname: tool\ndescription: A tool\n---\n# Private\n", "plugins/tool/public/SKILL.md": "---\nname: tool\ndescription: A tool\n---\n# Public\n",
		"plugins/tool/references/a.md": "# Reference\n", "plugins/tool/settings.json": `{"plugin":{"type":"skill"}}`,
	}, nil)
	const browser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
	for _, c := range []struct{ path, accept, kind, holds string }{
		{"/", "", "text/markdown", "http://" + ts.addr + "/SKILL.md"}, {"/", browser, "text/html", `<a href="/SKILL.md">`},
		{"/SKILL.md", "*/*", "text/markdown", "name: aexec"}, {"/SKILL.md", browser, "text/html", "\n# Using"}, {"/SKILL.md", "text/html;q=0.5, text/markdown", "text/markdown", ""},
		{"/SKILL.md", "text/html, text/markdown", "text/markdown", ""}, {"/SKILL.md", "text/*;q=0.1, text/html", "text/html", ""}, {"/SKILL.md", "text/html;q=0, */*", "text/markdown", ""},
		{"/SKILL.md", "image/png", "text/markdown", ""}, {"/SKILL.md", "application/json", "text/markdown", ""},
		{"/skills", "", "text/markdown", "(/skills/exec/SKILL.md)"}, {"/skills", browser, "text/html", `<a href="/skills/tool/SKILL.md">`}, {"/skills", "application/json", "application/json", `"link":"/skills/tool/SKILL.md"`},
		{"/skills/tool/SKILL.md", "", "text/markdown", "# Public"}, {"/private/skills/tool/SKILL.md", "", "text/markdown", "# Private"}, {"/private/skills/tool/references/a.md", browser, "text/html", "<pre># Reference\n"},
		{"/private/skills/tool/SKILL.md", browser, "text/html", "# Private\n</pre>"}, {"/api/plugins", browser, "application/json", `{"plugins":[{"command":"","description":"A tool","name":"tool","skill":"/private/skills/tool/SKILL.md"}]}`},
	} {
		resp, body := ts.do("GET", c.path, "", "Accept", c.accept)
		kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
		if resp.StatusCode != 200 || kind != c.kind || !strings.Contains(body, c.holds) {
			t.Errorf("%s as %q: %d %s %.300s", c.path, c.accept, resp.StatusCode, kind, body)
		}
		if resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: an answer to the key may be stored", c.path)
		}
		head, nothing := ts.do("HEAD", c.path, "", "Accept", c.accept)
		if head.StatusCode != 200 || nothing != "" || head.Header.Get("Content-Type") != resp.Header.Get("Content-Type") || c.kind != "application/json" && head.ContentLength != int64(len(body)) {
			t.Errorf("HEAD %s: %d %v %q", c.path, head.StatusCode, head.Header, nothing)
		}
	}
	_, main := ts.do("GET", "/SKILL.md", "")
	if _, same := ts.do("GET", "/skills/aexec/SKILL.md", ""); main != same {
		t.Error("/SKILL.md differs from /skills/aexec/SKILL.md")
	}
	for _, path := range []string{"/private/skills/tool/references/b.md", "/private/skills/tool/references/settings.json", "/private/skills/aexec/SKILL.md", "/private/skills/tool/references/.."} {
		if resp, body := ts.do("GET", path, ""); resp.StatusCode != 404 || errorCode(body) != "not_found" {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
	// A plugin that is disabled is gone with the next request.
	if err := os.WriteFile(ts.paths.settings, []byte(`{"plugins":{"disabled":["tool"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/skills/tool/SKILL.md", "/private/skills/tool/SKILL.md", "/private/skills/tool/references/a.md"} {
		if resp, _ := ts.do("GET", path, ""); resp.StatusCode != 404 {
			t.Errorf("%s of a disabled plugin: %d", path, resp.StatusCode)
		}
	}
	if _, body := ts.do("GET", "/api/plugins", ""); strings.TrimSpace(body) != `{"plugins":[]}` {
		t.Error(body)
	}
}

// TestServerRootAddress: the guide names the server as the client did, and no client can write anything else into it.
func TestServerRootAddress(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	for host, want := range map[string]string{
		"box.lan:3333": "box.lan:3333", "192.0.2.7": "192.0.2.7", "[2001:db8::1]:80": "[2001:db8::1]:80", "": ts.addr, "evil/path": ts.addr, "a@b": ts.addr, "x:999999": ts.addr,
		"<script>": ts.addr, "KEY": ts.addr, "[::1%25eth0]:1": ts.addr, "x`y": ts.addr,
	} {
		answer := ts.raw("GET / HTTP/1.1\nHost: " + host + "\nConnection: close\n\n")
		if strings.HasPrefix(answer, "HTTP/1.1 400 ") && want == ts.addr {
			continue
		}
		if !strings.Contains(answer, "http://"+want+"/SKILL.md") || strings.Count(answer, "http://") != strings.Count(answer, "http://"+want) {
			t.Errorf("host %q: %.300q", host, answer)
		}
	}
}

func TestRenderHTML(t *testing.T) {
	page, err := os.ReadFile("testdata/server/page.md")
	if err != nil {
		t.Fatal(err)
	}
	got := renderHTML(string(page))
	serverGolden(t, "page.html.golden", got)
	for _, evil := range []string{"<script", "<img", "javascript:alert(1)\"", "href=\"//", "href=\"data:", "onclick=\"", "\x00", "\x01"} {
		if strings.Contains(strings.ToLower(got), evil) {
			t.Errorf("the page holds %q", evil)
		}
	}
}

func FuzzRenderHTML(f *testing.F) {
	f.Add("# a\n- [x](javascript:alert(1))\n```\n<script>\n")
	tag := regexp.MustCompile(`<a href="(?:https?://[^"<>]*|/?[^"/:][^"<>:]*)">|</a>`)
	head, end, _ := strings.Cut(skillText("_page.html"), "{{TEXT}}")
	f.Fuzz(func(t *testing.T, text string) {
		page := strings.TrimSuffix(strings.TrimPrefix(renderHTML(text), head), end)
		if rest := tag.ReplaceAllString(page, ""); strings.ContainsAny(rest, "<>") {
			t.Errorf("%q gives %q", text, rest)
		}
	})
}

func TestFrontmatter(t *testing.T) {
	for doc, want := range map[string]string{
		"---\nname: a\ndescription: b c: d\n---\nx": "a|b c: d|", "---\r\nname: \"a\"\r\ndescription: 'b'\r\n---\r\n": "a|b|",
		"# x": "||begin with frontmatter", "---\nname: a\n---\n": "a||name and description", "---\nname: a\ndescription: >\n  folded\n---\n": "a||one line", "---\nname: a\ndescription: b\n": "||begin with", "---\nname: a\ndescription: |\n---\ndescription: b\n---\n": "a||one line",
	} {
		name, description, err := frontmatter([]byte(doc))
		parts := strings.Split(want, "|")
		if name != parts[0] || description != parts[1] || (err == nil) != (parts[2] == "") || err != nil && !strings.Contains(err.Error(), parts[2]) {
			t.Errorf("%q: %q, %q, %v", doc, name, description, err)
		}
	}
}

// TestServerPanic: a fault of ours costs one connection.
func TestServerPanic(t *testing.T) {
	ts := startServer(t, openSettings, nil, nil)
	ts.do("GET", "/ping", "")
	ts.mux.HandleFunc("GET /boom", func(http.ResponseWriter, *http.Request) { panic("boom " + serverTestKey) })
	if answer := ts.raw(getRequest("/boom", "")); answer != "" {
		t.Error(answer)
	}
	if resp, _ := ts.do("GET", "/ping", ""); resp.StatusCode != 200 || !strings.Contains(ts.log.String(), "boom") {
		t.Errorf("%d, log %s", resp.StatusCode, ts.log)
	}
}

// TestServerKeyNowhere sends the key to where it does not belong, and looks for it in what comes back (logs are looked at when the server ends).
func TestServerKeyNowhere(t *testing.T) {
	ts := startServer(t, `{"exec":{"allow":["env","/*"],"deny":["`+serverTestKey+`"]}}`, nil, nil)
	for _, request := range []string{
		getRequest("/"+serverTestKey, ""), getRequest("/api/"+serverTestKey, ""), getRequest("/api/acl?"+serverTestKey+"=1", "X-API-Key: KEY\n"), postRequest("/api/exec", `{"KEY":1}`), postRequest("/api/exec", `{"args":["KEY"]}`), postRequest("/api/exec", `{"args":["/KEY"]}`), postRequest("/api/exec?format=text", `{"args":["/KEY"]}`), postRequest("/api/exec?mode=stream", `{"args":["/KEY"]}`),
		postRequest("/api/exec", `{"args":["KEY\u0000"]}`), postRequest("/api/exec?KEY", `{}`), postRequest("/api/exec", "KEY"), postRequest("/api/exec", execBody("env")), postRequest("/api/acl/check", `{"args":["KEY"]}`),
		"KEY /ping HTTP/1.1\nHost: KEY\nConnection: close\n\n", strings.Replace(getRequest("/", ""), "Host: x", "Host: "+serverTestKey, 1), getRequest("/private/skills/"+serverTestKey+"/SKILL.md", "X-API-Key: KEY\n"), getRequest("/api/acl", "X-API-Key: KEY\n"),
	} {
		if answer := ts.raw(request); strings.Contains(answer, serverTestKey) {
			t.Errorf("%q: %q", request, answer)
		}
	}
}

// TestServerQuotedKey: a key that JSON and %q write with backslashes is found there too.
func TestServerQuotedKey(t *testing.T) {
	const text = `0123456789"quoted\key"`
	key, err := newAPIKey(text)
	if err != nil {
		t.Fatal(err)
	}
	ts := startServer(t, openSettings, nil, func(s *server) { s.start.key = key })
	quoted, _ := json.Marshal(text)
	for _, body := range []string{`{` + string(quoted) + `:1}`, `{"args":["printf","%s",` + string(quoted[:len(quoted)-1]) + `\u0000"]}`, `{"args":["/` + string(quoted[1:]) + `]}`} {
		resp, answer := ts.do("POST", "/api/exec", body, "X-API-Key", text)
		if resp.StatusCode == 401 || strings.Contains(answer, "quoted") || !strings.Contains(answer, redactedKey) && strings.Contains(body, ":1}") {
			t.Errorf("%s: %d %s", body, resp.StatusCode, answer)
		}
	}
}

// TestServerHooks: what the agent sent is decided; then the before hook, a second decision, the command, the after hook, each on record.
func TestServerHooks(t *testing.T) {
	plugin := func(kind, invoke string) map[string]string {
		return map[string]string{
			"plugins/tool/SKILL.md": "---\nname: tool\ndescription: A tool\n---\n# Tool\n",
			"plugins/tool/settings.json": `{"plugin":{"type":"` + kind + `","command":"printf","apiVersion":1,"invoke":"` + invoke + `","before":"hooks/before","after":"hooks/after",
				"routes":{"GET /say/{word}":["printf","%s","{word}"],"GET /id":["id","-u"]}},"exec":{"allow":["printf *"]}}`,
			"plugins/tool/hooks/before": "#!/bin/sh\nin=$(cat)\ncase $in in *" + serverTestKey + "*) exit 9;; *'\"rewrite\"]'*) echo '{\"args\":[\"echo\",\"rewritten\"]}';; *'\"refuse\"]'*) echo '{\"error\":{\"status\":418,\"code\":\"teapot\",\"message\":\"No.\"}}';; *'\"fail\"]'*) exit 1;; esac\n",
			"plugins/tool/hooks/after":  "#!/bin/sh\nin=$(cat)\ncase $in in *'\"output\":\"change\"'*) echo '{\"result\":{\"output\":\"changed\",\"exitCode\":0,\"status\":\"done\"}}';; *'\"output\":\"late\"'*) exit 1;; esac\n",
		}
	}
	for _, c := range []struct {
		kind, invoke, method, target, body string
		status                             int
		holds                              string
		events                             string // argv of each exec_start
	}{
		{"exec", "exec", "POST", "/api/exec", execBody("printf", "plain"), 200, `"output":"plain"`, "before,printf,after"},
		{"exec", "exec", "POST", "/api/exec", execBody("printf", "change"), 200, `"output":"changed"`, "before,printf,after"},
		{"exec", "exec", "POST", "/api/exec?format=text", execBody("printf", "change"), 200, `changed`, "before,printf,after"},
		{"exec", "exec", "POST", "/api/exec", execBody("printf", "late"), 500, `"plugin_after_error"`, "before,printf,after"},
		{"exec", "exec", "POST", "/api/exec", execBody("printf", "fail"), 500, `"plugin_before_error"`, "before"},
		{"exec", "exec", "POST", "/api/exec", execBody("printf", "refuse"), 418, `"teapot"`, "before"},
		{"exec", "exec", "POST", "/api/exec", execBody("printf", "rewrite"), 403, `"command_not_allowed"`, "before"},
		{"trusted", "run", "POST", "/api/exec", execBody("printf", "rewrite"), 200, `"output":"rewritten\n"`, "before,echo,after"},
		{"trusted", "run", "POST", "/api/exec", execBody("id"), 403, `"command_not_allowed"`, ""},
		{"exec", "exec", "POST", "/api/exec?mode=stream", execBody("printf", "plain"), 400, `"stream_plugin_command_not_supported"`, ""},
		{"exec", "exec", "GET", "/api/command/tool/say/hello%20you", "", 200, `"output":"hello you"`, "before,printf,after"},
		{"exec", "exec", "GET", "/api/command/tool/say/-x", "", 400, `"invalid_args"`, ""},
		{"exec", "exec", "GET", "/api/command/tool/say/%0a", "", 400, `"invalid_args"`, ""},
		{"exec", "exec", "GET", "/api/command/tool/say/x?y=1", "", 400, `"invalid_query"`, ""},
		{"exec", "exec", "GET", "/api/command/tool/say/x", "{}", 400, `"unexpected_field"`, ""},
		{"exec", "exec", "HEAD", "/api/command/tool/say/x", "", 405, "", ""},
		{"exec", "exec", "GET", "/api/command/tool/nothing", "", 404, `"not_found"`, ""},
		{"exec", "exec", "GET", "/api/command/tool/id", "", 403, `"command_not_allowed"`, ""},
		{"trusted", "run", "GET", "/api/command/tool/id", "", 200, fmt.Sprintf(`"output":"%d\n"`, os.Getuid()), "before,id,after"},
	} {
		ts := startServer(t, `{}`, plugin(c.kind, c.invoke), nil)
		if len(ts.plugins) != 1 {
			t.Fatal("the plugin does not load")
		}
		resp, body := ts.do(c.method, c.target, c.body)
		if resp.StatusCode != c.status || !strings.Contains(body, c.holds) {
			t.Errorf("%s %s %s %s: %d %s\n%s", c.kind, c.method, c.target, c.body, resp.StatusCode, body, ts.log)
		}
		if code := resp.Header.Get("X-Exit-Code"); code != "" && !strings.Contains(c.target, "format=text") {
			t.Errorf("X-Exit-Code %s beside JSON, which may be the after hook's own", code)
		}
		if allow := resp.Header.Get("Allow"); c.status == 405 && allow != "GET" {
			t.Errorf("Allow: %q", allow)
		}
		var ran []string
		for _, r := range ts.records("exec_start") {
			if hook := filepath.Dir(r.Argv[0]); filepath.Base(hook) == "hooks" && r.Cwd != filepath.Dir(hook) {
				t.Errorf("the hook %q is recorded in %q, and runs in its plugin's directory", r.Argv[0], r.Cwd)
			}
			if ran = append(ran, filepath.Base(r.Argv[0])); r.Plugin != "tool" {
				t.Errorf("%q is not recorded under its plugin", r.Argv)
			}
		}
		if got := strings.Join(ran, ","); got != c.events || len(ts.records("exec_end")) != len(ran) {
			t.Errorf("%s %s: ran %s, want %s", c.target, c.body, got, c.events)
		}
		if c.holds == `"output":"rewritten\n"` && !slices.Equal(ts.records("exec_start")[1].OriginalArgv, []string{"printf", "rewrite"}) {
			t.Error("what the agent sent is not on record")
		}
		ts.stop()
	}
}

func TestListen(t *testing.T) {
	l, err := listen("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := listen("127.0.0.1", l.Addr().(*net.TCPAddr).Port); err == nil || !strings.Contains(err.Error(), "--port") {
		t.Errorf("a port that is taken: %v", err)
	}
}

// benchServer serves h, or (nil) aexec, and gives its address.
func benchServer(b *testing.B, h http.Handler) string {
	if h == nil {
		return startServer(b, `{"exec":{"allow":["*"]},"maxStreamBytes":1000000000000,"timeoutMs":600000}`, nil, nil).addr
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := &http.Server{Handler: h}
	go s.Serve(l)
	b.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// benchTransport keeps a connection for each of four clients.
var benchTransport = &http.Transport{MaxIdleConnsPerHost: 8}

func benchRequest(b *testing.B, method, url, body string) int64 {
	r, _ := http.NewRequest(method, url, strings.NewReader(body))
	r.Header.Set("X-API-Key", serverTestKey)
	r.Header.Set("Content-Type", "application/json")
	resp, err := benchTransport.RoundTrip(r)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil || resp.StatusCode != 200 {
		b.Fatal(resp.Status, err)
	}
	return n
}

// BenchmarkServerExec compares one command through the server, by one client and by four, with the smallest handler that forks.
func BenchmarkServerExec(b *testing.B) {
	floor := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body struct{ Args []string }
		json.NewDecoder(r.Body).Decode(&body)
		out, _ := exec.Command(body.Args[0], body.Args[1:]...).Output()
		json.NewEncoder(w).Encode(map[string]string{"output": string(out)})
	})
	for _, clients := range []int{1, 4} {
		for name, handler := range map[string]http.Handler{"aexec": nil, "floor": floor} {
			b.Run(fmt.Sprintf("%s-%d", name, clients), func(b *testing.B) {
				url := "http://" + benchServer(b, handler) + "/api/exec"
				benchRequest(b, "POST", url, execBody("/bin/true"))
				defer benchProcessorTime(b)()
				var left atomic.Int64
				left.Store(int64(b.N))
				var all sync.WaitGroup
				b.ResetTimer()
				for range clients {
					all.Go(func() {
						for left.Add(-1) >= 0 {
							benchRequest(b, "POST", url, execBody("/bin/true"))
						}
					})
				}
				all.Wait()
			})
		}
	}
}

func BenchmarkServerDocument(b *testing.B) {
	doc, _ := skillFiles.ReadFile("skills/aexec/SKILL.md")
	run := func(h http.Handler) func(b *testing.B) {
		return func(b *testing.B) {
			url := "http://" + benchServer(b, h) + "/SKILL.md"
			for b.Loop() {
				benchRequest(b, "GET", url, "")
			}
		}
	}
	b.Run("aexec", run(nil))
	b.Run("floor", run(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/markdown; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(len(doc)))
		w.Write(doc)
	})))
}

func BenchmarkServerStream(b *testing.B) {
	const size = 256 << 20
	file := filepath.Join(b.TempDir(), "text")
	if err := os.WriteFile(file, bytes.Repeat([]byte("The quick brown fox jumps over the lazy dog, \"again\".\n"), size/54), 0o644); err != nil {
		b.Fatal(err)
	}
	run := func(h http.Handler, query string) func(b *testing.B) {
		return func(b *testing.B) {
			url := "http://" + benchServer(b, h) + "/api/exec?mode=stream" + query
			b.SetBytes(size)
			for b.Loop() {
				benchRequest(b, "POST", url, execBody("cat", file))
			}
		}
	}
	b.Run("ndjson", run(nil, ""))
	b.Run("raw", run(nil, "&format=text"))
	b.Run("floor", run(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := exec.Command("cat", file)
		out, _ := c.StdoutPipe()
		c.Start()
		io.Copy(w, out)
		c.Wait()
	}), ""))
}
