package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An adversary's requests to the finished program: bytes on a socket, and nothing known of its inside.

const (
	wirePatience = 20 * time.Second // only a failing test waits that long
	wirePing     = "GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
	wireDocument = "---\nname: tool\ndescription: <script>alert(1)</script> [x](javascript:alert(2)) **<b>**\n---\n# <img src=x onerror=alert(3)>\n" +
		"[a](javascript:alert(4)) [b](https://x\"onmouseover=\"alert(5)) [c](//evil/x) [d](data:text/html,x) `<i>` **<u>**\n" +
		"| <td> | \x01<script> | [z](vbscript:x) |\n\n```<script>\n</pre><script>alert(6)</script>\n```\n- <li>\n1. \"><script>\n[<script>](https://e/<script>)\n"
	wirePlugin = `{"plugin":{"type":"exec","command":"echo","apiVersion":1,"routes":{"GET /show/{id}":["echo","show","{id}"]}},"exec":{"allow":["echo *"]}}`
)

type wireServer struct {
	*daemonHome
	t       *testing.T
	address string
}

func startWire(t *testing.T, settings string) *wireServer {
	h := newDaemonHome(t)
	h.write(h.settings, settings)
	for _, dir := range []string{"tool", "tool/public"} {
		if err := os.Mkdir(filepath.Join(h.plugins, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		h.write(filepath.Join(h.plugins, dir, "SKILL.md"), wireDocument)
	}
	h.write(filepath.Join(h.plugins, "tool", "settings.json"), wirePlugin)
	h.foreground()
	w := &wireServer{h, t, h.server().Address}
	wireCheck(t, "start", w.raw(wirePing), "200") // settings that go bad before the first answer still end the server
	return w
}

func (w *wireServer) dial() *net.TCPConn {
	w.t.Helper()
	conn, err := net.Dial("tcp", w.address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(wirePatience))
	return conn.(*net.TCPConn)
}

// raw sends bytes and gives all that comes back until the server closes. What a refused sender cannot write is not missed.
func (w *wireServer) raw(request string) string {
	w.t.Helper()
	conn := w.dial()
	defer conn.Close()
	io.WriteString(conn, request)
	answer, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		w.t.Errorf("%.80q: after %q: %v", request, answer, err)
	}
	return string(answer)
}

// exec sends a body with the key, on a connection of its own.
func (w *wireServer) exec(body string) string {
	w.t.Helper()
	return w.raw(wirePost("/api/exec", body, "Connection: close"))
}

func (w *wireServer) head(method, target string, headers ...string) string {
	w.t.Helper()
	return w.raw(wireHead(method, target, append(headers, "Connection: close")...) + "\r\n")
}

func wireHead(method, target string, headers ...string) string {
	head := method + " " + target + " HTTP/1.1\r\nHost: x\r\n"
	for _, h := range headers {
		head += h + "\r\n"
	}
	return head
}

func wirePost(target, body string, headers ...string) string {
	headers = append(headers, "X-API-Key: "+daemonTestKey, "Content-Type: application/json")
	return wireHead("POST", target, headers...) + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
}

var wireStatus = regexp.MustCompile(`(?m)^HTTP/1\.[01] ([0-9]{3}) `)

// wireCodes are the status codes of all answers, so that a smuggled request shows.
func wireCodes(answer string) string {
	var codes []string
	for _, m := range wireStatus.FindAllStringSubmatch(answer, -1) {
		codes = append(codes, m[1])
	}
	return strings.Join(codes, " ")
}

func wireCheck(t *testing.T, name, answer, want string) {
	t.Helper()
	codes, word, _ := strings.Cut(want, ":")
	if wireCodes(answer) != codes || !strings.Contains(answer, word) {
		t.Errorf("%s: want %q, got %q", name, want, answer[:min(len(answer), 900)])
	}
}

func TestWire(t *testing.T) {
	w := startWire(t, `{"exec":{"allow":["echo *","git init x",["true"],"/^printf [a-z]+$/"],"deny":["/^echo .*secret/","id","id *","aexec *",["env","..."],"printf x"]}}`)
	for name, test := range map[string]func(*testing.T, *wireServer){
		"framing": wireFraming, "keys": wireKeys, "paths": wirePaths, "methods": wireMethods, "bodies": wireBodies,
		"policy": wirePolicy, "host": wireHost, "pages": wirePages, "versions": wireVersions, "audit": wireAudit,
	} {
		t.Run(name, func(t *testing.T) { test(t, &wireServer{w.daemonHome, t, w.address}) })
	}
	for range 8 { // more than there are slots: none was lost
		wireCheck(t, "afterwards", w.exec(`{"args":["echo","still"]}`), "200:still")
	}
	w.must("audit", "verify")
}

// wireFraming: behind every request stands another one, which must be answered only if there is no doubt where the first one ends.
func wireFraming(t *testing.T, w *wireServer) {
	body := `{"args":["echo","hi"]}`
	key := wireHead("POST", "/api/exec", "X-API-Key: "+daemonTestKey, "Content-Type: application/json")
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	for name, c := range map[string]struct{ request, want string }{
		"plain":              {key + length + "\r\n" + body, "200 200"},
		"chunked":            {key + "Transfer-Encoding: chunked\r\n\r\n" + chunked, "400:invalid_request"},
		"both":               {key + length + "Transfer-Encoding: chunked\r\n\r\n" + chunked, "400:invalid_request"},
		"both, folded":       {key + length + "Transfer-Encoding:\r\n chunked\r\n\r\n" + chunked, "400:invalid_request"},
		"both, bare LF":      {key + "X-A: b\nTransfer-Encoding: chunked\n" + length + "\r\n" + chunked, "400:invalid_request"},
		"both, length 0":     {key + "Content-Length: 0\r\ntransfer-encoding: chunked\r\n\r\n" + chunked, "400:invalid_request"},
		"both, trailer":      {key + "Transfer-Encoding: chunked\r\n\r\n" + strings.Replace(chunked, "0\r\n\r\n", "0\r\nContent-Length: 5\r\n\r\n", 1), "400:invalid_request"},
		"both, 1.0":          {strings.Replace(key, "/1.1", "/1.0", 1) + length + "Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked, "400:invalid_json"},
		"TE.TE":              {key + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + chunked, "501"},
		"TE list":            {key + "Transfer-Encoding: identity, chunked\r\n\r\n" + chunked, "501"},
		"TE empty":           {key + length + "Transfer-Encoding:\r\n\r\n" + chunked, "501"},
		"TE vertical tab":    {key + "Transfer-Encoding: \vchunked\r\n\r\n" + chunked, "400"},
		"TE space":           {key + "Transfer-Encoding : chunked\r\n\r\n" + chunked, "400"},
		"CR alone":           {key + "X-A: b\rTransfer-Encoding: chunked\r\n" + length + "\r\n" + body, "400"},
		"lengths differ":     {key + length + "Content-Length: 0\r\n\r\n" + body, "400"},
		"length list":        {key + "Content-Length: 22, 22\r\n\r\n" + body, "400"},
		"length negative":    {key + "Content-Length: -1\r\n\r\n" + body, "400"},
		"length signed":      {key + "Content-Length: +22\r\n\r\n" + body, "400"},
		"length hex":         {key + "Content-Length: 0x16\r\n\r\n" + body, "400"},
		"length empty":       {key + "Content-Length: \r\n\r\n" + body, "400"},
		"length 2^63":        {key + "Content-Length: 9223372036854775808\r\n\r\n" + body, "400"},
		"length 2^63-1":      {key + "Content-Length: 9223372036854775807\r\n\r\n" + body, "413:body_too_large"},
		"chunk extension":    {key + "Transfer-Encoding: chunked\r\n\r\n" + strings.Replace(chunked, "\r\n", ";a=b\r\n", 1), "400:invalid_request"},
		"chunk ext. bare LF": {key + "Transfer-Encoding: chunked\r\n\r\n" + strings.Replace(chunked, "\r\n", ";a\n", 1), "400:invalid_request"},
		"chunk bare LF":      {key + "Transfer-Encoding: chunked\r\n\r\n" + strings.ReplaceAll(chunked, "\r\n", "\n"), "400:invalid_request"},
		"chunk negative":     {key + "Transfer-Encoding: chunked\r\n\r\n-" + chunked, "400:invalid_request"},
		"chunk overflow":     {key + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff" + chunked, "400:invalid_request"},
		"body of a GET":      {wireHead("GET", "/", fmt.Sprintf("Content-Length: %d", len(wirePing))) + "\r\n" + wirePing, "200"},
		"body of a stranger": {wireHead("POST", "/api/exec", fmt.Sprintf("Content-Length: %d", len(wirePing))) + "\r\n" + wirePing, "401"},
		"key in a trailer":   {wireHead("POST", "/api/exec", "Transfer-Encoding: chunked", "Trailer: X-API-Key") + "\r\n16\r\n" + body + "\r\n0\r\nX-API-Key: " + daemonTestKey + "\r\n\r\n", "400:invalid_request"},
		"two hosts":          {wireHead("GET", "/ping", "Host: y") + "\r\n", "400"},
		"no host":            {"GET /ping HTTP/1.1\r\n\r\n", "400"},
		"white space first":  {"GET /ping HTTP/1.1\r\n Host: x\r\n\r\n", "400"},
		"no colon":           {wireHead("GET", "/ping", "abc") + "\r\n", "400"},
		"40 KiB of head":     {wireHead("GET", "/ping", "A: "+strings.Repeat("a", 40<<10)) + "\r\n", "431"},
	} {
		wireCheck(t, name, w.raw(c.request+wirePing), c.want)
	}
}

func wireKeys(t *testing.T, w *wireServer) {
	k, half := daemonTestKey, len(daemonTestKey)/2
	for headers, want := range map[string]string{
		"X-API-Key: " + k:                                       "200",
		"x-api-key: \t" + k + " \t":                             "200",
		"Authorization: bEaReR  " + k:                           "200",
		"X-API-Key: " + k + "\r\nAuthorization: Bearer " + k:    "200",
		"X-API-Key: " + k + "\r\nX-API-Key: " + k:               "401",
		"X-API-Key: no\r\nX-API-Key: " + k:                      "401",
		"X-API-Key: " + k + "\r\nAuthorization: Bearer no":      "401",
		"X-API-Key: " + k + "\r\nAuthorization: Bearer":         "401",
		"X-API-Key:\r\nAuthorization: Bearer " + k:              "401",
		"Authorization: Bearer no, Bearer " + k:                 "401",
		"Authorization: Basic " + k:                             "401",
		"Authorization: " + k:                                   "401",
		"Proxy-Authorization: Bearer " + k:                      "401",
		"Cookie: X-API-Key=" + k + "; apiKey=" + k:              "401",
		"X-API-Key: " + k + ", " + k:                            "401",
		"X-API-Key: \"" + k + `"`:                               "401",
		"X-API-Key: " + strings.ToUpper(k):                      "401",
		"X-API-Key: " + k[1:]:                                   "401",
		"X-API-Key: " + k + "x":                                 "401",
		"X-API-Key: " + k[:half] + "\r\n " + k[half:]:           "401",
		"X-API-Key: " + strings.Repeat(k, 10000/len(k)):         "401",
		"X_API_Key: " + k:                                       "401",
		"X-API-Key:":                                            "401",
		"X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-User: admin": "401",
	} {
		wireCheck(t, headers[:min(len(headers), 99)], w.head("GET", "/api/acl", headers), want)
	}
	for _, target := range []string{"/api/acl?apiKey=" + k, "/api/acl?apiKey=" + k + "&apiKey=" + k, "http://a:" + k + "@x/api/acl"} {
		answer := w.head("GET", target)
		if wireCheck(t, target, answer, "401"); strings.Contains(answer, k) {
			t.Errorf("%s: the answer has the key", target)
		}
	}
	wireCheck(t, "switched off", w.head("GET", "/api/acl?apiKey="+k, "X-API-Key: "+k), "400:invalid_query")
}

// wirePaths spells each path that takes a key in many ways. None is redirected, none is served without the key; with it only the other spelling of a letter is.
func wirePaths(t *testing.T, w *wireServer) {
	same := regexp.MustCompile(`^(/%61pi/acl|/api/acl\?|http://evil(:1)?/api/acl)$`)
	for _, p := range []string{"/api/acl", "/private/skills/tool/SKILL.md", "/api/command/tool/show/1"} {
		for _, target := range []string{p, "/" + p, p + "/", p + "//", p + "/.", p + "/..", p + "/%2e", p + "/%2e%2e/x", p + "%2f", p + "%5c", p + `\`, p + "%00", p + ";a=b",
			p + "%20", p + "%0a", p + "?", p + "#x", p + "%3f", "/." + p, "/x/.." + p, "/%2e%2e" + p, "/%2f" + p, `\` + p, strings.ToUpper(p), strings.Replace(p, "/", "//", 2),
			strings.ReplaceAll(p, "/", "%2f"), "http://evil" + p, "http://evil:1" + p, "x" + p, "x:80", "*", strings.Replace(p, "a", "%61", 1), strings.Replace(p, "a", "%2561", 1),
			strings.Replace(p, "a", "\u0430", 1), p + "%c0%af", "/ping/.." + p, "/skills/.." + p, "/ping%2f.." + p} {
			for _, method := range []string{"GET", "HEAD", "CONNECT"} {
				stranger, agent := w.head(method, target), w.head(method, target, "X-API-Key: "+daemonTestKey)
				if !slices.Contains([]string{"400", "401", "404", "405"}, wireCodes(stranger)) || strings.Contains(stranger+agent, "Location:") {
					t.Errorf("%s %q: %.100q, with the key %.100q", method, target, stranger, agent)
				}
				if p == "/api/acl" && target != p && wireCodes(agent) == "200" && !same.MatchString(target) {
					t.Errorf("%s %q with the key: %.100q", method, target, agent)
				}
			}
		}
	}
	for value, want := range map[string]string{"a": "200", "$(id)": "200:$(id)", "-a": "400", "%2d": "400", "%0a": "400", "%ff": "400", "%c2%85": "400", "%2f": "404", "%00": "404", "..": "404", "a?x=1": "400"} {
		wireCheck(t, "route value "+value, w.head("GET", "/api/command/tool/show/"+value, "X-API-Key: "+daemonTestKey), want)
	}
}

func wireMethods(t *testing.T, w *wireServer) {
	override := []string{"X-API-Key: " + daemonTestKey, "X-HTTP-Method-Override: POST", "X-Method-Override: POST", "Content-Type: application/json"}
	for _, method := range []string{"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post", strings.Repeat("X", 300)} {
		answer := w.head(method, "/api/exec?mode=stream", override...)
		if wireCheck(t, method, answer, "405:Allow: POST"); strings.Contains(answer, daemonTestKey) {
			t.Errorf("%s shows the request", method)
		}
		wireCheck(t, method, w.head(method, "/private/nothing"), "401")
		if method != "GET" {
			wireCheck(t, method, w.head(method, "/api/command/tool/show/1", override...), "405:Allow: GET")
		}
	}
}

func wireBodies(t *testing.T, w *wireServer) {
	args := func(n int, arg string) string { return `{"args":["echo"` + strings.Repeat(`,`+arg, n) + `]}` }
	for body, want := range map[string]string{
		"\xff\xfe{\x00}\x00":                                        "400:invalid_json",
		"\ufeff" + `{"args":["echo"]}`:                              "400:invalid_json",
		args(1, "\"\xc0\xaf\""):                                     "400:invalid_json",
		args(1, "\"\xed\xa0\x80\""):                                 "400:invalid_json",
		args(1, "\"\x00\""):                                         "400:invalid_json",
		args(1, `"\u0000"`):                                         "400:without a NUL",
		args(1, `"\ud800"`):                                         "400:not all strings",
		args(1, `"\udc00\ud800"`):                                   "400:not all strings",
		args(1, `"\ud800\ud83d\ude00"`):                             "400:invalid_args",
		args(1, `"\ud83d\ude00"`):                                   "200:\U0001F600",
		args(1, `"\\ud800"`):                                        `200:\\ud800`,
		args(1, `"a\r\nX-Evil: 1"`):                                 `200:a\r\nX-Evil`,
		`{"\u0061rgs":["echo","k"]}`:                                "200",
		`{"args":["echo","k"],"\u0061rgs":["id"]}`:                  "400:invalid_json",
		`{"args":["echo","k"],"ARGS":["id"]}`:                       "400:unexpected_field",
		`{"args":["echo","k"],"env":{"LD_PRELOAD":1}}`:              "400:unexpected_field",
		`{"arg` + "\u017f" + `":["echo"]}`:                          "400:unexpected_field",
		`{"args":["echo","k"]}{"args":["id"]}`:                      "400:invalid_json",
		`{"args":["echo","k"]}` + "\x00":                            "400:invalid_json",
		`{"args":["echo","k",]}`:                                    "400:invalid_json",
		`{"args":{"0":"echo"}}`:                                     "400:not all strings",
		`{"args":["` + "\u00a0" + `"]}`:                             "400:invalid_args",
		`{"args":[1e999999999]}`:                                    "400:not all strings",
		strings.Repeat("[", 500_000):                                "400:invalid_json",
		strings.Repeat(`{"a":`, 90) + "1" + strings.Repeat("}", 90): "400:unexpected_field",
		args(300_000, `""`):                                         "400:invalid_args",
		args(1, `"`+strings.Repeat("a", maxArgBytes)+`"`):           "400:invalid_args",
		strings.Repeat(" ", 1<<20+1):                                "413:body_too_large",
	} {
		wireCheck(t, fmt.Sprintf("%.60q", body), w.exec(body), want)
	}
	for _, query := range []string{"cmd=id", "args=id", "mode=STREAM", "mode=", "mode", "MODE=stream", "mode=stream&mode=stream", "format=text;mode=stream", "mode=stream%00", "m%zz", "=", "mode=stream#x"} {
		wireCheck(t, query, w.raw(wirePost("/api/exec?"+query, `{"args":["echo","q"]}`, "Connection: close")), "400:invalid_query")
	}
	for _, kind := range []string{"text/plain", "application/jsonx", "application/json, text/plain", "application/x-www-form-urlencoded", ""} {
		wireCheck(t, kind, w.raw(strings.Replace(wirePost("/api/exec", `{"args":["echo","t"]}`, "Connection: close"), "application/json", kind, 1)), "415")
	}
}

func wirePolicy(t *testing.T, w *wireServer) {
	allowed := [][]string{{"echo", "a\nb"}, {"echo", "SECRET"}, {"echo", "*"}, {"printf", "abc"}, {"true"}}
	denied := [][]string{{"echo", "secret"}, {"echo", "a\nsecret"}, {"echo", "a\r", "secret"}, {"printf", "x"}, {"id"}, {"/usr/bin/id"}, {"/usr/bin/id/"}, {"./id"}, {"//usr//bin//id//"},
		{"../../../../usr/bin/id"}, {"/proc/self/root/usr/bin/id", "-u"}, {"ae", "--version"}, {"./ae", "--version"}, {"/x/aexec", "stop"}, {"/usr/bin/env"}, {"env", "echo", "x"}}
	refused := [][]string{{"git init", "x"}, {"git init x"}, {"git\tinit", "x"}, {"git\u00a0init", "x"}, {"git\u2003init", "x"}, {" git", "init", "x"}, {"git ", "init", "x"}, {"GIT", "init", "x"},
		{"git", "init", "x", ""}, {"git", "init", "x\n"}, {"./git", "init", "x"}, {"/usr/bin/git", "init", "x"}, {"echo"}, {"echo x", "y"}, {"echo\n", "x"}, {"ECHO", "x"}, {"\u0435cho", "x"}, {"echo\u200b", "x"},
		{"printf", "abc\n"}, {"printf", "a", "b"}, {"printf", "a", ""}, {"printf ", "a"}, {"/bin/printf", "abc"}, {"true", ""}, {"/bin/true"}, {"tru\u0435"}}
	for want, commands := range map[string][][]string{"200": allowed, "403:command_denied": denied, "403:command_not_allowed": refused} {
		for _, argv := range commands {
			wireCheck(t, fmt.Sprintf("%q", argv), w.exec(string(marshal(map[string]any{"args": argv}))), want)
		}
	}
}

// wireHost: what GET / shows of a Host header, and that a disguised one, or the key in it, stands nowhere.
func wireHost(t *testing.T, w *wireServer) {
	for host, shown := range map[string]string{
		"good.example:80": "good.example:80", "[::1]:5": "[::1]:5", "": w.address, "[::1": w.address, "ev%69l": w.address, "a,b": w.address, daemonTestKey: w.address, strings.Repeat("a", 300): w.address,
	} {
		answer := w.raw("GET / HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n")
		if wireCheck(t, host, answer, "200:http://"+shown); strings.Contains(answer, daemonTestKey) {
			t.Error("the guide shows the key")
		}
	}
	for _, host := range []string{`evil"><script>`, "user@evil", "a b", "evil/..", "evil?x", "{{URL}}", "x\u00e9"} {
		wireCheck(t, host, w.raw("GET / HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n"), "400")
	}
	if answer := w.head("GET", "/api/acl", "Origin: http://evil", "X-API-Key: "+daemonTestKey); strings.Contains(answer, "Access-Control") {
		t.Errorf("CORS: %s", answer)
	}
}

func wirePages(t *testing.T, w *wireServer) {
	bad := regexp.MustCompile(`(?i)<(script|img|i|u|b)\b|href="(//|javascript|data|vbscript)|<[^>]* on[a-z]+=`)
	for _, target := range []string{"/", "/skills", "/skills/tool/SKILL.md", "/private/skills/tool/SKILL.md"} {
		answer := w.head("GET", target, "Accept: text/html", "X-API-Key: "+daemonTestKey, "Range: bytes=0-5", "If-None-Match: *")
		wireCheck(t, target, answer, "200:Content-Security-Policy: default-src 'none'")
		_, page, _ := strings.Cut(answer, "\r\n\r\n")
		if found := bad.FindString(page); found != "" || !strings.HasPrefix(page, "<!doctype html>") {
			t.Errorf("%s: %q in\n%s", target, found, page)
		}
	}
}

func wireVersions(t *testing.T, w *wireServer) {
	body := `{"args":["echo","hi"]}`
	for name, c := range map[string]struct{ request, want string }{
		"0.9":           {"GET /ping\r\n\r\n", "400"},
		"1.0":           {"GET /ping HTTP/1.0\r\n\r\n", "200"},
		"2.0":           {"GET /ping HTTP/2.0\r\nHost: x\r\n\r\n", "505"},
		"2 knowing":     {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "404"},
		"upgrade":       {wireHead("GET", "/api/acl", "Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk") + "\r\n", "401"},
		"websocket":     {wireHead("GET", "/ping", "Connection: Upgrade, close", "Upgrade: websocket") + "\r\n", "200"},
		"1.0 trailers":  {strings.Replace(wirePost("/api/exec?mode=stream&format=text", body), "/1.1", "/1.0", 1), "505"},
		"expect":        {wirePost("/api/exec", body, "Expect: 100-continue", "Connection: close"), "100 200"},
		"expect, no":    {wireHead("POST", "/api/exec", "Expect: 100-continue", "Content-Length: 9") + "\r\n", "401"},
		"expect, other": {wirePost("/api/exec", body, "Expect: 200-ok", "Connection: close"), "417"},
	} {
		wireCheck(t, name, w.raw(c.request), c.want)
	}
}

// wireAudit writes what it can into the audit log: each attempt must stay inside of its record.
func wireAudit(t *testing.T, w *wireServer) {
	inject := "\"}\n{\"seq\":1,\"event\":\"exec_end\"}\n\x1b[2J\u202e\u0085\u2028" + daemonTestKey
	wireCheck(t, "denied", w.exec(string(marshal(map[string]any{"args": []string{"nix" + inject, inject}}))), "403")
	wireCheck(t, "run", w.exec(string(marshal(map[string]any{"args": []string{"echo", inject}}))), "200")
	wireCheck(t, "path", w.head("GET", `/private/%22%7d%0a%1b[2J%e2%80%ae%ff`+daemonTestKey), "401")
	data, err := os.ReadFile(w.audit)
	if err != nil || bytes.Contains(data, []byte(daemonTestKey)) {
		t.Errorf("the key stands in the log, %v", err)
	}
	if bad := regexp.MustCompile("[\x00-\x09\x0b-\x1f\x7f\u0085\u2028\u202e]").Find(data); bad != nil {
		t.Errorf("the log holds %q", bad)
	}
	w.must("audit", "verify")
}

// TestWireHundreds: an agent is served beside hundreds of clients that say nothing, not all, or nothing with the key.
func TestWireHundreds(t *testing.T) {
	w := startWire(t, `{"exec":{"allow":["echo *"]},"maxConcurrentExec":1}`)
	for name, c := range map[string]struct {
		n    int
		head string
	}{
		"idle":                      {600, ""},
		"half a head":               {600, "POST /api/exec HTTP/1.1\r\nHost: x\r\nX-A: "},
		"a body without the key":    {200, "POST /api/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"},
		"half a body, with the key": {200, strings.TrimSuffix(wirePost("/api/exec", `{"args":["echo","x"]}`), "}")},
		"a body of a GET":           {200, "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n"},
	} {
		conns := make([]net.Conn, c.n)
		for i := range conns {
			conns[i] = w.dial()
			io.WriteString(conns[i], c.head)
		}
		for range 10 {
			wireCheck(t, name, w.exec(`{"args":["echo","hi"]}`), "200")
		}
		for _, conn := range conns {
			conn.Close()
		}
	}
}

// TestWireGone: however an agent goes, in whatever mode, its command ends at once and the only slot comes back.
func TestWireGone(t *testing.T) {
	w := startWire(t, `{"exec":{"allow":["sleep *","echo *"]},"maxConcurrentExec":1,"killGraceMs":60000}`)
	ways := map[string]func(*net.TCPConn){
		"close":      func(c *net.TCPConn) { c.Close() },
		"reset":      func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
		"half-close": func(c *net.TCPConn) { c.CloseWrite() },
	}
	runs := 0
	for _, query := range []string{"", "?mode=stream", "?mode=stream&format=text"} {
		for name, leave := range ways {
			conn := w.dial()
			io.WriteString(conn, wirePost("/api/exec"+query, `{"args":["sleep","86400"]}`))
			w.until(name+" starts", func() bool { return w.count("exec_start") == 2*runs+1 })
			leave(conn)
			w.until(name+" ends", func() bool { return w.count("exec_end") == 2*runs+1 })
			w.until(name+" frees its slot", func() bool { return wireCodes(w.exec(`{"args":["echo","x"]}`)) == "200" })
			runs++
		}
	}
	data, _ := os.ReadFile(w.audit)
	if n := bytes.Count(data, []byte(`"reason":"client_gone"`)); n != runs {
		t.Errorf("%d of %d commands ended because the client had gone", n, runs)
	}
}

func (w *wireServer) count(event string) int {
	data, _ := os.ReadFile(w.audit)
	return bytes.Count(data, []byte(`"event":"`+event+`"`))
}

func (w *wireServer) until(what string, done func() bool) {
	w.t.Helper()
	for begun := time.Now(); !done(); time.Sleep(time.Millisecond) {
		if time.Since(begun) > wirePatience {
			w.t.Fatalf("%s: waited in vain", what)
		}
	}
}

// TestWireRateLimit: a client without the key gets its share whatever it claims to be, and takes nothing from an agent at the same address.
func TestWireRateLimit(t *testing.T) {
	w := startWire(t, `{"rateLimit":{"windowMs":3600000,"max":5}}`)
	got := map[string]string{}
	for i := range 12 {
		claim := fmt.Sprintf("X-Forwarded-For: 10.0.0.%d\r\nX-Real-IP: 10.0.1.%[1]d\r\nForwarded: for=10.0.2.%[1]d", i)
		got["keyless"] += wireCodes(w.head("GET", []string{"/", "/api/acl", "/nix"}[i%3], claim, "X-API-Key: no")) + " "
		got["pings"] += wireCodes(w.head("GET", "/ping")) + " "
	}
	for range 7 {
		got["keyed"] += wireCodes(w.head("GET", "/api/acl", "X-API-Key: "+daemonTestKey)) + " "
	}
	limited := strings.Repeat("429 ", 7)
	for who, want := range map[string]string{"keyless": "200 401 404 200 401 " + limited, "pings": strings.Repeat("200 ", 12), "keyed": strings.Repeat("200 ", 5) + "429 429 "} {
		if got[who] != want {
			t.Errorf("%s: %s, want %s", who, got[who], want)
		}
	}
}

// TestWireSettings: whatever is put in the place of the settings, nothing runs until they are back.
func TestWireSettings(t *testing.T) {
	good := `{"exec":{"allow":["echo *"]}}`
	w := startWire(t, good)
	text := func(s string) func() error { return func() error { return os.WriteFile(w.settings, []byte(s), 0o600) } }
	mode := func(m os.FileMode) func() error { return func() error { return os.Chmod(w.settings, m) } }
	aside := w.settings + ".aside"
	for name, spoil := range map[string]func() error{
		"truncated": text(""), "half": text(good[:12]), "trailing": text(good + "x"), "BOM": text("\ufeff" + good), "case": text(`{"Exec":{"allow":["*"]}}`),
		"twice": text(`{"exec":{"allow":["*"]},"exec":{"allow":[]}}`), "bad rule": text(`{"exec":{"allow":["echo *","/[/"]}}`), "1 MiB": text(good + strings.Repeat(" ", maxConfigBytes)),
		"writable": mode(0o666), "group": mode(0o620), "gone": func() error { return os.Remove(w.settings) },
		"link": func() error { return errors.Join(os.Rename(w.settings, aside), os.Symlink(aside, w.settings)) },
		"FIFO": func() error { return errors.Join(os.Remove(w.settings), syscall.Mkfifo(w.settings, 0o600)) },
		"dir":  func() error { return errors.Join(os.Remove(w.settings), os.Mkdir(w.settings, 0o700)) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(name, err)
		}
		answer := w.exec(`{"args":["echo","x"]}`)
		if wireCheck(t, name, answer, "503:settings_invalid"); !strings.Contains(answer, "Retry-After: 5\r\n") || strings.Contains(answer, w.dir) {
			t.Errorf("%s: %s", name, answer)
		}
		wireCheck(t, name, w.head("GET", "/"), "503")
		wireCheck(t, name, w.raw(wirePing), "200")
		os.Remove(w.settings)
		w.write(w.settings, good)
		wireCheck(t, name+", mended", w.exec(`{"args":["echo","x"]}`), "200")
	}
}

// TestWireReused: of many requests on one connection, each with its own fault, none is answered by another's answer.
func TestWireReused(t *testing.T) {
	w := startWire(t, `{"exec":{"allow":["echo *"]}}`)
	conn := w.dial()
	var want []int
	go func() {
		for i := range 60 {
			io.WriteString(conn, wirePost("/api/exec", fmt.Sprintf(`{"args":["echo","n%d"]}`, i))+wireHead("GET", "/nix")+"\r\n"+wirePost("/api/exec", `{"args":["nix"]}`)+wirePost("/api/exec", `{`))
		}
	}()
	for range 60 {
		want = append(want, 200, 404, 403, 400)
	}
	from := bufio.NewReader(conn)
	for i, code := range want {
		r, err := http.ReadResponse(from, nil)
		if err != nil {
			t.Fatal(i, err)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || r.StatusCode != code || code == 200 && !bytes.Contains(body, fmt.Appendf(nil, `"n%d\n"`, i/4)) {
			t.Fatalf("answer %d: %d %s %v", i, r.StatusCode, body, err)
		}
	}
}
