// This file is the HTTP side: listener, gates in order, routes, documents, and every answer.
// It may listen and write to the network, and it alone.
// It must not decide or run anything itself: it asks acl.go, records in audit.go, runs through exec.go.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/user"
	"path"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/time/rate"
)

const (
	headerTimeout      = 10 * time.Second       // for a request's head
	requestTimeout     = 30 * time.Second       // for head and body
	idleTimeout        = 120 * time.Second      // between two requests
	writeTimeout       = 30 * time.Second       // for one write: a client that takes nothing for so long is gone
	lingerTimeout      = 500 * time.Millisecond // for the rest of a body that nobody reads, so that its sender sees the answer
	shutdownWait       = 10 * time.Second       // beyond killGraceMs, until the last answer is out
	maxHeadBytes       = 32 << 10               // bytes of a request's head
	maxSeen            = maxHeadBytes + 4096    // what net/http reads of a head at most
	maxConns           = 512                    // open connections
	maxPipelined       = 64 << 10               // bytes that a client may send behind a running command
	maxRateClients     = 4096                   // addresses with a rate limit of their own, for each class
	encodeBytes        = 64 << 10               // bytes of an answer that are encoded at a time
	slotRetryAfter     = time.Second
	settingsRetryAfter = 5 * time.Second
)

//go:embed skills/*/SKILL.md skills/_root.md
var skillFiles embed.FS

// errorTexts is every error of ours: status, whether the same request may work later, what happened, what to do next.
var errorTexts = map[string]errorText{
	"invalid_request":                     {400, false, "The request has both a Content-Length and a Transfer-Encoding, or one that is malformed.", "Send a Content-Length alone, on a new connection."},
	"invalid_json":                        {400, false, "The body is not one JSON object.", `Send {"args":["command","arg"]} as UTF-8, nothing before or after it, no key twice.`},
	"unexpected_field":                    {400, false, "The body has a field other than args.", `Send only {"args":["command","arg"]}; there is no cwd, env, shell or stdin.`},
	"invalid_args":                        {400, false, "args is not a command.", `args is a non-empty array of strings, the first of them the command's name: {"args":["command","arg"]}.`},
	"invalid_query":                       {400, false, "A query parameter is unknown, repeated or malformed.", "POST /api/exec knows mode=buffered|stream and format=json|text; a command goes into the body."},
	"stream_plugin_command_not_supported": {400, false, "A plugin's hook stands around this command, so it cannot be streamed.", "Send it without mode=stream."},
	"unauthorized":                        {401, false, "The API key is missing, wrong, or given more than once.", "Send the key once, as X-API-Key or as Authorization: Bearer."},
	"command_denied":                      {403, false, "A deny rule refuses this command.", "Do not look for a way around it; GET /api/acl shows what is allowed."},
	"command_not_allowed":                 {403, false, "No rule allows this command.", "GET /api/acl shows what is allowed; ask the operator if you need more."},
	"ip_denied":                           {403, false, "Requests from your address are not admitted.", "Ask the operator to admit it in ip.allow."},
	"not_found":                           {404, false, "There is nothing at this path.", "GET / lists every path; // . and .. are not resolved."},
	"method_not_allowed":                  {405, false, "This path does not take this method.", "Use a method that the Allow header names; GET never runs a command on /api/exec."},
	"timeout":                             {408, false, "The command ran longer than timeoutMs and was ended.", "Its work may be half done: look first, then ask for less at a time."},
	"body_too_large":                      {413, false, "The body is larger than maxRequestBodyBytes.", "Send less; GET /api/acl shows the limits."},
	"max_output_exceeded":                 {413, false, "The command printed more than maxOutputBytes and was ended.", "Ask the command for less output, or use mode=stream."},
	"max_stream_output_exceeded":          {413, false, "The command printed more than maxStreamBytes and was ended.", "Ask the command for less output."},
	"unsupported_media_type":              {415, false, "The body is not application/json.", "Send it with Content-Type: application/json."},
	"too_many_concurrent_exec":            {429, true, "All command slots are taken, so nothing ran.", "Send it again after Retry-After seconds."},
	"rate_limited":                        {429, true, "Too many requests came from your address.", "Wait Retry-After seconds, and send fewer."},
	"client_gone":                         {400, false, "The client closed the connection, so the command was ended.", "Keep the connection open, in both directions, until the answer is there."},
	"command_not_found":                   {200, false, "The command was not found.", "Name a program on the server's PATH, or give its whole path."},
	"command_not_executable":              {200, false, "The command cannot be executed.", "Name a program that the server's user may execute."},
	"internal":                            {500, false, "The server met a fault of its own.", "Tell the operator the X-Request-ID; the command may have run."},
	"plugin_before_error":                 {500, false, "A plugin's hook failed before the command, so it did not run.", "Tell the operator the X-Request-ID."},
	"plugin_after_error":                  {500, false, "A plugin's hook failed after the command had run.", "Do not repeat the command blindly; tell the operator the X-Request-ID."},
	"disabled":                            {503, false, "The operator has switched this server off.", "Ask the operator to set AGENT_EXEC_ENABLED=true and restart."},
	"settings_invalid":                    {503, true, "The server's settings are unusable, so nothing is allowed.", "Try again after Retry-After seconds; then tell the operator to look at aexec status."},
	"audit_unavailable":                   {503, false, "The command could not be recorded, so it did not run.", "Tell the operator that the audit log cannot be written."},
	"shutting_down":                       {503, false, "The server is stopping; a running command was ended.", "Its work may be half done: look first when the server is back."},
	"http_version_not_supported":          {505, false, "Streaming as text ends with trailers, which HTTP/1.0 does not have.", "Use HTTP/1.1, or leave out format=text."},
}

type errorText struct {
	status        int
	retryable     bool
	message, hint string
}

// apiError is the one shape of every error.
type apiError struct {
	status    int
	allow     string        // of a 405
	after     time.Duration // Retry-After; 0: none
	outcome   *outcome      // what was captured before the end
	Code      string        `json:"error"`
	Message   string        `json:"message"`
	Hint      string        `json:"hint"`
	Retryable bool          `json:"retryable"`
	Rule      string        `json:"rule,omitempty"`
	Fields    []string      `json:"fields,omitempty"`
	MaxOutput int64         `json:"maxOutputBytes,omitempty"`
}

func newError(code string) *apiError {
	t := errorTexts[code]
	return &apiError{status: t.status, Code: code, Message: t.message, Hint: t.hint, Retryable: t.retryable}
}

// because replaces the message where there is more to say.
func (e *apiError) because(format string, args ...any) *apiError {
	e.Message = fmt.Sprintf(format, args...)
	return e
}

// fixedHeaders are on every answer of ours. The slices are shared: replace them, never append.
var fixedHeaders = http.Header{
	"X-Content-Type-Options":  {"nosniff"},
	"Content-Security-Policy": {"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
}

// server is one listening aexec.
type server struct {
	start     startup
	store     *store
	audit     *auditLog
	runner    *runner
	plugins   []*plugin // loaded and valid; snapshot.disabled says which are off now
	log       *log.Logger
	address   string        // what it listens on, host:port
	auditFile string        // where the settings name none
	maxBody   int64         // these and all below are set by prepare
	stall     time.Duration // writeTimeout, and
	patience  time.Duration // requestTimeout, but less in tests
	mux       *http.ServeMux
	skills    []document // embedded
	root      string     // the guide of GET /, with places for the URL and the version
	user      string     // that commands run as, unless exec.user says otherwise
	keyless   *limiter   // requests without a valid key
	withKey   *limiter
	connMu    sync.Mutex
	conns     int
	waiting   map[net.Conn]time.Time // connections without a whole request, since when
}

// listen binds host:port (port 0: any free one). The error says what to do (port taken: by whom to look).
func listen(host string, port int) (net.Listener, error) {
	address := net.JoinHostPort(host, strconv.Itoa(port))
	l, err := net.Listen("tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%q is in use by another program: choose another port with --port, or end that program (`aexec stop --force --port %d` names it and kills it)", address, port)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("%q may not be bound by this user: choose a port of 1024 or more with --port", address)
	case err != nil:
		return nil, fmt.Errorf("cannot listen on %q, check HOST and PORT: %w", address, err)
	}
	return l, nil
}

// serve answers on l until ctx ends, then shuts down: accepts nothing new, ends running commands, answers them, returns when all are answered.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	if err := s.prepare(l.Addr().String()); err != nil {
		return err
	}
	h := &http.Server{
		Handler: s, ErrorLog: s.log, ConnState: s.connState, ConnContext: withConn, DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: s.patience, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeadBytes,
	}
	ended := make(chan error, 1)
	go func() { ended <- h.Serve(watchedListener{l}) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	wait := shutdownWait
	if snap, _, err := s.store.current(); err == nil {
		wait += snap.KillGrace
	}
	late, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	s.runner.shutdown()
	s.connMu.Lock()
	for conn := range s.waiting {
		conn.Close()
	}
	s.connMu.Unlock()
	if err := h.Shutdown(late); err != nil {
		s.log.Printf("connections were still open after %v and are closed now", wait)
		return h.Close()
	}
	return nil
}

// prepare makes everything that holds for the life of the server.
func (s *server) prepare(address string) error {
	snap, _, err := s.store.current()
	if err != nil {
		return err
	}
	s.address = cmp.Or(s.address, address)
	s.stall, s.patience = cmp.Or(s.stall, writeTimeout), cmp.Or(s.patience, requestTimeout)
	s.maxBody, s.waiting = snap.MaxRequestBodyBytes, map[net.Conn]time.Time{}
	s.keyless, s.withKey = newLimiter(snap), newLimiter(snap)
	if u, err := user.Current(); err == nil {
		s.user = u.Username
	}
	if err := s.readSkills(); err != nil {
		return err
	}
	return s.routes()
}

// routes is every path there is. Under /api/ and /private/ the gates ask for the key.
func (s *server) routes() error {
	s.mux = http.NewServeMux()
	for pattern, f := range map[string]func(*call) *apiError{
		"GET /{$}":                            (*call).rootGuide,
		"GET /SKILL.md":                       (*call).mainSkill,
		"GET /skills":                         (*call).skillIndex,
		"GET /skills/{name}/SKILL.md":         (*call).publicSkill,
		"GET /private/skills/{name}/SKILL.md": (*call).pluginDocument,
		"GET /private/skills/{name}/references/{file}": (*call).pluginDocument,
		"GET /api/acl":        (*call).acl,
		"POST /api/acl/check": (*call).aclCheck,
		"GET /api/plugins":    (*call).pluginList,
		"POST /api/exec":      (*call).exec,
	} {
		if err := s.handle(pattern, f); err != nil {
			return err
		}
	}
	for _, p := range s.plugins {
		for _, rt := range p.routes {
			if err := s.handle(rt.Pattern, func(c *call) *apiError { return c.pluginRoute(p, rt) }); err != nil {
				return fmt.Errorf("plugin %q: the route %q cannot be used: %w", p.Name, rt.Pattern, err)
			}
		}
	}
	return nil
}

// handle registers one route; the mux panics on a pattern that conflicts.
func (s *server) handle(pattern string, f func(*call) *apiError) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%v", v)
		}
	}()
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if e := f(w.(*call)); e != nil {
			w.(*call).fail(e)
		}
	})
	return nil
}

// connState keeps slow and idle clients from shutting others out: above maxConns, who has waited longest without sending a whole request goes.
func (s *server) connState(conn net.Conn, state http.ConnState) {
	s.connMu.Lock()
	defer s.connMu.Unlock()
	delete(s.waiting, conn)
	switch state {
	case http.StateNew:
		s.conns++
		s.waiting[conn] = time.Now()
	case http.StateIdle:
		s.waiting[conn] = time.Now()
	case http.StateClosed:
		s.conns--
	}
	if state != http.StateNew || s.conns <= maxConns {
		return
	}
	oldest := conn
	for other, since := range s.waiting {
		if since.Before(s.waiting[oldest]) {
			oldest = other
		}
	}
	delete(s.waiting, oldest)
	oldest.Close()
}

// watchedConn keeps what a client sends, for two things that net/http hides: a Content-Length beside a Transfer-Encoding
// (RFC 9112, 6.1: smuggling; net/http drops the one and serves what stands behind), and a disconnect behind pipelined bytes.
type watchedConn struct {
	*net.TCPConn
	busy   atomic.Bool // a command runs, and its request was read whole
	mu     sync.Mutex
	seen   []byte // since the last answer
	behind []byte // what was sent while busy
}

type watchedListener struct{ net.Listener }

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &watchedConn{TCPConn: conn.(*net.TCPConn)}, nil
}

type connKey struct{}

func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// Read is called by one goroutine at a time. While a command runs it keeps what comes and reads on: net/http's own watch for
// a disconnect ends with the first byte.
func (w *watchedConn) Read(p []byte) (int, error) {
	for {
		if len(w.behind) > 0 && !w.busy.Load() {
			n := copy(p, w.behind)
			w.behind = w.behind[n:]
			return n, nil
		}
		n, err := w.TCPConn.Read(p)
		w.mu.Lock()
		w.seen = append(w.seen, p[:min(n, maxSeen-len(w.seen))]...)
		w.mu.Unlock()
		if err != nil || !w.busy.Load() && len(w.behind) == 0 {
			return n, err
		}
		if w.behind = append(w.behind, p[:n]...); len(w.behind) > maxPipelined {
			return 0, errors.New("too much was sent behind a running command")
		}
	}
}

// ambiguous says whether the request's head has both framings, or may have: a chunked request behind a pipelined one is refused unseen.
func (w *watchedConn) ambiguous(r *http.Request) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.ContentLength == 0 && r.TransferEncoding == nil {
		return false
	}
	head := bytes.ToLower(w.seen)
	both := bytes.Contains(head, []byte("\ntransfer-encoding:")) && bytes.Contains(head, []byte("\ncontent-length:"))
	return both || r.TransferEncoding != nil && !bytes.HasPrefix(w.seen, []byte(r.Method+" "+r.RequestURI+" "))
}

// answered begins to look for the next head.
func (w *watchedConn) answered() {
	w.mu.Lock()
	w.seen = w.seen[:0]
	w.mu.Unlock()
}

// call is one request on its way through the gates, and its answer.
type call struct {
	http.ResponseWriter
	control   *http.ResponseController
	s         *server
	r         *http.Request
	conn      *watchedConn
	snap      *snapshot // the one under which all of the request is decided and run
	id        string
	peer      netip.Addr
	source    string // where the key was: header, bearer, query, none
	keyed     bool   // the key is right
	wrote     bool
	whole     bool // the body was read to its end
	unaudited bool // an exec_start could not be written
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{ResponseWriter: w, control: http.NewResponseController(w), s: s, r: r, id: rand.Text()}
	if c.conn, _ = r.Context().Value(connKey{}).(*watchedConn); c.conn == nil {
		c.conn = &watchedConn{} // only where a test calls without a connection
	}
	defer c.rescue()
	maps.Copy(w.Header(), fixedHeaders)
	w.Header()["X-Request-Id"] = []string{c.id}
	if r.ContentLength != 0 { // until readBody has read it to its end
		w.Header().Set("Connection", "close")
		defer func() {
			if !c.whole {
				c.control.SetReadDeadline(time.Now().Add(lingerTimeout))
			}
		}()
	}
	c.control.SetWriteDeadline(time.Now().Add(s.stall))
	if e := c.gates(); e != nil {
		c.fail(e)
	}
}

// Write gives each piece its own time, so that a client that takes nothing cannot hold a command or a slot.
func (c *call) Write(p []byte) (int, error) {
	c.wrote = true
	c.control.SetWriteDeadline(time.Now().Add(c.s.stall))
	return c.ResponseWriter.Write(p)
}

// rescue turns a panic into an answer if none has begun, and lets the server live.
func (c *call) rescue() {
	c.conn.answered()
	v := recover()
	if v == nil {
		return
	}
	if v != http.ErrAbortHandler {
		c.s.log.Printf("internal error in request %s: %q\n%s", c.id, c.s.redact(fmt.Sprint(v)), debug.Stack())
		if !c.wrote {
			c.fail(newError("internal"))
			return
		}
	}
	panic(http.ErrAbortHandler) // net/http closes the connection without a word
}

func (s *server) redact(text string) string { return s.start.key.redact(text) }

// gates lets a request through to its route, or says why not. Their order is fixed: what a stranger may learn comes first.
func (c *call) gates() *apiError {
	if c.conn.ambiguous(c.r) {
		return newError("invalid_request")
	}
	if !cleanPath(c.r.URL) {
		return newError("not_found")
	}
	if c.r.URL.Path == "/ping" {
		return c.ping()
	}
	if !c.s.start.enabled {
		return newError("disabled")
	}
	for _, gate := range []func() *apiError{c.readSettings, c.checkAddress, c.checkRate} {
		if e := gate(); e != nil {
			return e
		}
	}
	at := c.r.URL.Path
	hidden := strings.HasPrefix(at, "/private/") || strings.HasPrefix(at, "/api/command/") // what is there is not for strangers to know
	if hidden && !c.keyed {
		return c.unauthorized()
	}
	if e := c.s.findRoute(c.r); e != nil {
		return e
	}
	api := strings.HasPrefix(at, "/api/")
	if api && !c.keyed {
		return c.unauthorized()
	}
	if api || hidden {
		c.Header().Set("Cache-Control", "no-store")
	}
	if api {
		if e := c.checkQuery(); e != nil {
			return e
		}
	}
	c.s.mux.ServeHTTP(c, c.r)
	return nil
}

// cleanPath refuses what a proxy, the mux and a plugin could each read as another path.
func cleanPath(u *url.URL) bool {
	p := u.Path
	return strings.HasPrefix(p, "/") && (path.Clean(p) == p || path.Clean(p)+"/" == p && p != "//") && !strings.ContainsAny(p, "\x00\\") &&
		strings.Count(u.EscapedPath(), "/") == strings.Count(p, "/")
}

func (c *call) ping() *apiError {
	if c.r.Method != "GET" && c.r.Method != "HEAD" {
		return methodError("GET, HEAD")
	}
	return c.json(200, map[string]string{"status": "ok", "version": version})
}

func (c *call) readSettings() *apiError {
	snap, news, err := c.s.store.current()
	if news != unchanged {
		c.s.announce(snap, news, err)
	}
	if err != nil {
		e := newError("settings_invalid")
		e.after = settingsRetryAfter
		return e
	}
	c.snap = snap
	return nil
}

// announce reports what a reload brought; the store tells it to one request only.
func (s *server) announce(snap *snapshot, news reload, err error) {
	if news == wentBad {
		s.log.Printf("settings are unusable, nothing is allowed until they are mended: %v", err)
		s.note(auditRecord{Event: "settings_invalid", Reason: err.Error()})
		return
	}
	s.log.Print("settings reloaded")
	if err := s.audit.reconfigure(cmp.Or(snap.AuditFile, s.auditFile), snap.AuditEnabled); err != nil {
		s.log.Printf("cannot follow the audit settings: %v", err)
	}
	s.note(auditRecord{Event: "settings_reloaded"})
}

// note records what need not hold anything up.
func (s *server) note(r auditRecord) {
	if err := s.audit.append(r); err != nil {
		s.log.Printf("cannot record %s: %v", r.Event, err)
	}
}

func (c *call) checkAddress() *apiError {
	at, err := netip.ParseAddrPort(c.r.RemoteAddr)
	c.peer = at.Addr().Unmap().WithZone("")
	if err != nil || !c.snap.ipAllowed(c.peer) {
		return newError("ip_denied")
	}
	return nil
}

// checkRate counts requests with a valid key apart, so that nobody without one can lock an agent out.
func (c *call) checkRate() *apiError {
	c.findKey()
	by := c.s.keyless
	if c.keyed {
		by = c.s.withKey
	}
	wait := by.wait(c.peer, time.Now())
	if wait == 0 {
		return nil
	}
	e := newError("rate_limited")
	e.after = wait
	return e
}

// findKey looks at every place where a key may stand. All that are used must hold the right one, and none twice.
func (c *call) findKey() {
	plain, authorization := c.r.Header["X-Api-Key"], c.r.Header["Authorization"]
	query := []string{}
	if q, err := url.ParseQuery(c.r.URL.RawQuery); err == nil && c.s.start.allowQueryKey {
		query = q["apiKey"]
	}
	wrong, right := len(plain) > 1 || len(authorization) > 1 || len(query) > 1, false
	try := func(source, key string) {
		c.source = source
		if c.s.start.key.matches(key) {
			right = true
		} else {
			wrong = true
		}
	}
	c.source = "none"
	for _, key := range query {
		try("query", key)
	}
	for _, value := range authorization {
		if scheme, key, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") {
			try("bearer", strings.TrimSpace(key))
		}
	}
	for _, key := range plain {
		try("header", key)
	}
	c.keyed = right && !wrong
}

func (c *call) unauthorized() *apiError {
	if err := c.s.audit.append(c.record("auth_failed")); err != nil {
		c.s.log.Printf("cannot record auth_failed: %v", err)
	}
	c.Header().Set("WWW-Authenticate", `Bearer realm="agent-exec"`)
	return newError("unauthorized")
}

// findRoute asks the mux what is at the path: nil if the request's method is served there. Patterns with GET serve HEAD too,
// but a plugin's route runs something.
func (s *server) findRoute(r *http.Request) *apiError {
	var allow []string
	for _, method := range []string{r.Method, "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} {
		if method == "HEAD" && strings.HasPrefix(r.URL.Path, "/api/command/") {
			continue
		}
		if _, pattern := s.mux.Handler(&http.Request{Method: method, URL: r.URL, Host: r.Host}); pattern != "" {
			if method == r.Method {
				return nil
			}
			allow = append(allow, method)
		}
	}
	if allow == nil {
		return newError("not_found")
	}
	return methodError(strings.Join(allow, ", "))
}

func methodError(allow string) *apiError {
	e := newError("method_not_allowed")
	e.allow = allow
	return e
}

// limiter is a token bucket for each client address (IPv6: each /64, which is what one client has). Beyond maxRateClients those
// that come new share one bucket, so that many addresses neither grow memory nor win anything.
type limiter struct {
	mu      sync.Mutex
	every   rate.Limit
	burst   int // 0: no limit
	clients map[netip.Prefix]*rate.Limiter
	others  *rate.Limiter
	swept   time.Time
}

func newLimiter(snap *snapshot) *limiter {
	every := rate.Limit(float64(snap.RateMax) / snap.RateWindow.Seconds())
	return &limiter{every: every, burst: snap.RateMax, clients: map[netip.Prefix]*rate.Limiter{}, others: rate.NewLimiter(every, snap.RateMax)}
}

// wait takes a token, or says how long until there is one.
func (l *limiter) wait(client netip.Addr, now time.Time) time.Duration {
	if l.burst == 0 {
		return 0
	}
	bits := 32
	if client.Is6() {
		bits = 64
	}
	prefix, _ := client.Prefix(bits)
	l.mu.Lock()
	defer l.mu.Unlock()
	bucket := l.clients[prefix]
	if bucket == nil && len(l.clients) >= maxRateClients && now.Sub(l.swept) > time.Second {
		l.swept = now // a full bucket is as good as none
		maps.DeleteFunc(l.clients, func(_ netip.Prefix, b *rate.Limiter) bool { return b.TokensAt(now) >= float64(l.burst) })
	}
	if bucket == nil && len(l.clients) >= maxRateClients {
		bucket = l.others
	} else if bucket == nil {
		bucket = rate.NewLimiter(l.every, l.burst)
		l.clients[prefix] = bucket
	}
	taken := bucket.ReserveN(now, 1)
	delay := taken.DelayFrom(now)
	if delay > 0 {
		taken.CancelAt(now)
	}
	return delay
}

// checkQuery admits only the parameters that the route knows, each once.
func (c *call) checkQuery() (e *apiError) {
	known := map[string][]string{} // and their values; nil: any
	if c.r.URL.Path == "/api/exec" {
		known = map[string][]string{"mode": {"buffered", "stream"}, "format": {"json", "text"}}
	}
	if c.s.start.allowQueryKey {
		known["apiKey"] = nil
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return newError("invalid_query").because("The query is malformed: broken percent-encoding, or a semicolon.")
	}
	for name, given := range query {
		values, ok := known[name]
		if !ok || len(given) > 1 || values != nil && !slices.Contains(values, given[0]) {
			return newError("invalid_query").because("The query parameter %q is unknown here, repeated, or has a bad value.", name)
		}
	}
	return nil
}

// readArgs is the body gate. It reads the body to its end: only then does net/http notice that the client has gone.
func (c *call) readArgs() ([]string, *apiError) {
	kind, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" || len(c.r.Header["Content-Type"]) > 1 {
		return nil, newError("unsupported_media_type")
	}
	if c.r.ContentLength > c.s.maxBody {
		return nil, newError("body_too_large")
	}
	data, err := io.ReadAll(http.MaxBytesReader(c.ResponseWriter, c.r.Body, c.s.maxBody))
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		return nil, newError("body_too_large")
	case errors.Is(err, os.ErrDeadlineExceeded):
		e := newError("timeout").because("The body did not arrive within %v, so nothing ran.", c.s.patience)
		e.Hint = "Send the whole request at once."
		return nil, e
	case err != nil:
		return nil, newError("invalid_request").because("The body broke off, or its encoding is malformed.")
	}
	c.whole = true
	if c.r.TransferEncoding == nil {
		c.Header().Del("Connection")
	}
	return parseExecBody(data)
}

// parseExecBody reads {"args":[…]} and nothing else.
func parseExecBody(data []byte) ([]string, *apiError) {
	body, err := parseStrict(data)
	if err != nil {
		return nil, newError("invalid_json").because("The body is not valid JSON: %v.", err)
	}
	if body.kind != '{' {
		return nil, newError("invalid_json")
	}
	if fields := slices.DeleteFunc(slices.Clone(body.keys), func(key string) bool { return key == "args" }); len(fields) > 0 {
		e := newError("unexpected_field")
		e.Fields = fields
		return nil, e
	}
	if len(body.keys) == 0 || body.items[0].kind != '[' {
		return nil, newError("invalid_args").because("args is missing or not an array.")
	}
	args := make([]string, 0, len(body.items[0].items))
	for i, item := range body.items[0].items {
		if item.kind != '"' || item.surrogate {
			return nil, newError("invalid_args").because("args[%d] is not a string of Unicode characters.", i)
		}
		args = append(args, item.str)
	}
	if err := checkArgv(args); err != nil {
		return nil, newError("invalid_args").because("args cannot be run: %v.", err)
	}
	return args, nil
}

func (c *call) acl() *apiError {
	lists := map[string][]ruleSpec{"allow": {}, "deny": {}}
	for _, rule := range c.snap.policy.rules() {
		lists[rule.List] = append(lists[rule.List], rule.Rule)
	}
	who := c.s.user
	if c.snap.cred != nil {
		who = c.snap.cred.Name
	}
	host, _ := os.Hostname()
	return c.json(200, map[string]any{
		"allow": lists["allow"], "deny": lists["deny"],
		"limits": map[string]int64{"timeoutMs": c.snap.Timeout.Milliseconds(), "maxOutputBytes": c.snap.MaxOutputBytes, "maxStreamBytes": c.snap.MaxStreamBytes,
			"maxConcurrentExec": int64(c.snap.MaxConcurrentExec), "maxRequestBodyBytes": c.s.maxBody},
		"machine": map[string]string{"os": runtime.GOOS, "arch": runtime.GOARCH, "hostname": host, "user": who, "cwd": c.snap.cwd},
	})
}

func (c *call) aclCheck() *apiError {
	args, e := c.readArgs()
	if e != nil {
		return e
	}
	_, d := c.snap.policy.decide(args)
	return c.json(200, d)
}

func (c *call) pluginList() *apiError {
	list := []map[string]string{}
	for _, p := range c.s.plugins {
		if !c.snap.disabled(p.Name) {
			list = append(list, map[string]string{"name": p.Name, "description": p.Description, "command": p.Command, "skill": "/private/skills/" + p.Name + "/SKILL.md"})
		}
	}
	return c.json(200, map[string]any{"plugins": list})
}

// job is one command that was decided, on its way through its slot.
type job struct {
	args, sent   []string // what will run, and what the request asked for
	what         approved
	decided      decision
	plugin       *plugin // whose hooks stand around it; nil: none
	stream, text bool
	sink         *streamSink
}

func (c *call) exec() *apiError {
	q := c.r.URL.Query()
	j := job{stream: q.Get("mode") == "stream", text: q.Get("format") == "text"}
	if j.stream && j.text && !c.r.ProtoAtLeast(1, 1) {
		return newError("http_version_not_supported")
	}
	argv, e := c.readArgs()
	if e != nil {
		return e
	}
	j.args = argv
	for _, p := range c.s.plugins {
		if p.before+p.after != "" && p.sees(j.args) && !c.snap.disabled(p.Name) {
			j.plugin = p
		}
	}
	if j.stream && j.plugin != nil {
		return newError("stream_plugin_command_not_supported")
	}
	j.what, j.decided = c.snap.policy.decide(j.args)
	return c.run(j)
}

// pluginRoute runs what a plugin's own route leads to.
func (c *call) pluginRoute(p *plugin, rt pluginRoute) *apiError {
	if c.snap.disabled(p.Name) {
		return newError("not_found")
	}
	if c.r.ContentLength != 0 {
		return newError("unexpected_field").because("This route takes no body.")
	}
	argv, err := rt.routeArgv(c.r.PathValue)
	if err != nil {
		return newError("invalid_args").because("The path cannot be made a command: %v.", err)
	}
	j := job{args: argv, plugin: p}
	j.what, j.decided = p.approve(c.snap.policy, argv)
	return c.run(j)
}

// run takes a slot for the command and answers when the slot is free again.
func (c *call) run(j job) *apiError {
	if j.sent = j.args; !j.decided.Allowed {
		return c.denied(j)
	}
	release, ok := c.s.runner.acquire(c.snap.MaxConcurrentExec)
	if !ok && c.s.runner.shuttingDown() {
		return newError("shutting_down")
	}
	if !ok {
		e := newError("too_many_concurrent_exec")
		e.after = slotRetryAfter
		return e
	}
	c.control.SetReadDeadline(time.Time{}) // the request is whole; from here a read only watches for a disconnect
	if j.stream {
		j.sink = &streamSink{c: c, text: j.text}
	}
	out, result, e := c.inSlot(&j, release)
	switch {
	case e != nil:
		return e
	case j.stream:
		return j.sink.finish(out)
	}
	return c.answer(j, out, result)
}

// inSlot is all that happens to a command that was allowed: its plugin's before hook, a second decision on what that made of it,
// the run, the after hook. result is what the after hook put in place of the answer.
func (c *call) inSlot(j *job, release func()) (out outcome, result map[string]any, e *apiError) {
	defer release()
	c.conn.busy.Store(true)
	defer c.conn.busy.Store(false)
	p := j.plugin
	if p != nil && p.before != "" {
		changed, e := c.hook(j, "before", nil)
		if e != nil {
			return out, nil, e
		}
		if changed.Args != nil {
			j.args = changed.Args
			if j.what, j.decided = p.approve(c.snap.policy, j.args); !j.decided.Allowed {
				return out, nil, c.denied(*j)
			}
		}
	}
	cmd := c.command(j.what)
	if j.sink != nil {
		cmd.sink, cmd.maxBytes = j.sink, c.snap.MaxStreamBytes
	}
	if out = c.audited(cmd, c.jobRecord(*j)); c.unaudited {
		return out, nil, newError("audit_unavailable")
	}
	if p != nil && p.after != "" && (out.end == endExit || out.end == endStart) {
		changed, e := c.hook(j, "after", &out)
		return out, changed.Result, e
	}
	return out, nil, nil
}

// hook runs one hook of the job's plugin in the job's slot.
func (c *call) hook(j *job, which string, out *outcome) (hookOutput, *apiError) {
	p := j.plugin
	in := map[string]any{"args": c.redactAll(j.args), "originalArgs": c.redactAll(j.sent), "request": c.hookRequest()}
	if out != nil {
		var result bytes.Buffer
		var fields map[string]any
		writeOutcome(&result, []byte("{"), out, endingOf(out, c.endError(out, false)))
		if err := json.Unmarshal([]byte(c.s.redact(result.String())), &fields); err != nil {
			return hookOutput{}, newError("internal")
		}
		in["result"] = fields
	}
	answer, err := p.runHook(c.r.Context(), which, in, func(_ context.Context, what approved, stdin []byte) outcome {
		cmd := c.command(what)
		cmd.stdin, cmd.cred = stdin, nil // a hook runs as the server's user
		return c.audited(cmd, c.jobRecord(job{args: what.argv, sent: what.argv, plugin: p}))
	})
	switch {
	case c.unaudited:
		return answer, newError("audit_unavailable")
	case err != nil && c.s.runner.shuttingDown():
		return answer, newError("shutting_down")
	case err != nil:
		c.s.log.Printf("request %s: the %s hook of plugin %q failed: %q", c.id, which, p.Name, c.s.redact(err.Error()))
		return answer, newError("plugin_" + which + "_error")
	case answer.Error != nil:
		answer.Error.Hint = "The plugin " + p.Name + " answered so; read its document."
		return answer, answer.Error
	}
	return answer, nil
}

// hookRequest is the request as a hook may see it: without any key.
func (c *call) hookRequest() map[string]any {
	clean := func(from map[string][]string, secret ...string) map[string][]string {
		to := map[string][]string{}
		for name, values := range from {
			if to[name] = c.redactAll(values); slices.Contains(secret, name) {
				to[name] = []string{redactedKey}
			}
		}
		return to
	}
	query, _ := url.ParseQuery(c.r.URL.RawQuery)
	return map[string]any{"method": c.r.Method, "path": c.s.redact(c.r.URL.Path), "query": clean(query, "apiKey"), "ip": c.peer.String(),
		"headers": clean(c.r.Header, "Authorization", "Proxy-Authorization", "Cookie", "X-Api-Key")}
}

func (c *call) redactAll(texts []string) []string {
	clean := make([]string, len(texts))
	for i, text := range texts {
		clean[i] = c.s.redact(text)
	}
	return clean
}

// command is what the snapshot gives every command.
func (c *call) command(what approved) command {
	s := c.snap
	return command{what: what, env: s.env, cwd: s.cwd, pathDirs: s.pathDirs, cred: s.cred, limits: s.Exec.Limits, noNewPrivs: s.Exec.NoNewPrivileges,
		timeout: s.Timeout, killGrace: s.KillGrace, maxBytes: s.MaxOutputBytes}
}

// audited runs a command between its two records. Without the first nothing runs.
func (c *call) audited(cmd command, rec auditRecord) outcome {
	rec.Event = "exec_start"
	if err := c.s.audit.append(rec); err != nil {
		c.s.log.Printf("request %s: nothing runs, exec_start cannot be recorded: %v", c.id, err)
		c.unaudited = true
		return outcome{end: endInternal, err: err}
	}
	if cmd.sink != nil {
		c.beginStream(cmd.sink.(*streamSink))
	}
	out := c.s.runner.run(c.r.Context(), cmd)
	ms := out.duration.Milliseconds()
	rec.Event, rec.Reason, rec.Signal, rec.DurationMs = "exec_end", string(out.end), out.signal, &ms
	rec.StdoutBytes, rec.StderrBytes = &out.stdoutBytes, &out.stderrBytes
	if out.exited || out.end == endStart {
		rec.ExitCode = &out.exitCode
	}
	if out.end == endInternal {
		c.s.log.Printf("request %s: the command could not be run: %q", c.id, c.s.redact(fmt.Sprint(out.err)))
	}
	c.s.note(rec)
	return out
}

func (c *call) record(event string) auditRecord {
	r := auditRecord{Event: event, RequestID: c.id, SourceIP: c.peer.String(), AuthSource: c.source, Endpoint: c.r.URL.Path}
	if c.keyed {
		r.APIKeyID = c.s.start.key.id()
	}
	return r
}

func (c *call) jobRecord(j job) auditRecord {
	r := c.record("")
	r.Mode, r.Argv, r.Cwd, r.ACLDecision, r.Rule = "buffered", j.args, c.snap.cwd, "allow", j.decided.Rule
	if j.stream {
		r.Mode = "stream"
	}
	if j.plugin != nil {
		r.Plugin = j.plugin.Name
	}
	if !slices.Equal(j.args, j.sent) {
		r.OriginalArgv = j.sent
	}
	return r
}

func (c *call) denied(j job) *apiError {
	e := newError("command_not_allowed")
	if j.decided.List == "deny" {
		e = newError("command_denied")
		e.Rule = j.decided.Rule
	}
	r := c.jobRecord(j)
	r.Event, r.ACLDecision, r.DenialReason = "exec_denied", "deny", e.Code
	c.s.note(r)
	return e
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
	if err := enc.Encode(v); err != nil {
		panic(err) // fail safe: our own types encode
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// fail answers with an error, and with what a command printed before it.
func (c *call) fail(e *apiError) {
	c.Header().Set("Cache-Control", "no-store")
	if e.allow != "" {
		c.Header().Set("Allow", e.allow)
	}
	if e.after > 0 {
		c.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(e.after.Seconds()))))
	}
	if e.outcome == nil {
		c.json(e.status, e)
		return
	}
	c.Header().Set("Content-Type", "application/json")
	c.WriteHeader(e.status)
	head := marshal(e)
	head[len(head)-1] = ','
	writeOutcome(c, head, e.outcome, ending{Status: "error", Duration: e.outcome.duration.Milliseconds(), Length: &e.outcome.stdoutBytes})
}

// ending is what every answer of a command says after its output.
type ending struct {
	ExitCode *int   `json:"exitCode"`
	Signal   string `json:"signal,omitempty"`
	Status   string `json:"status"`
	Error    string `json:"error,omitempty"`
	Message  string `json:"message,omitempty"`
	Duration int64  `json:"duration"`
	Length   *int64 `json:"length,omitempty"`
}

// endingOf describes the end of a run; e is its error, if it was an end other than exit.
func endingOf(out *outcome, e *apiError) ending {
	last := ending{Status: "error", Duration: out.duration.Milliseconds(), Length: &out.stdoutBytes}
	if e != nil {
		last.Error, last.Message = e.Code, e.Message
	} else if last.Signal = out.signal; out.exited && out.exitCode == 0 {
		last.Status = "done"
	}
	if out.end == endStart || out.end == endExit && out.exited {
		last.ExitCode = &out.exitCode
	}
	return last
}

// endError is the error of an end other than exit. Most ends are called what their error is.
func (c *call) endError(out *outcome, stream bool) *apiError {
	switch {
	case out.end == endExit:
		return nil
	case out.end == endStart && out.exitCode == 126:
		return newError("command_not_executable").because("%s", c.s.redact(fmt.Sprint(out.err)))
	case out.end == endStart:
		return newError("command_not_found").because("%s", c.s.redact(fmt.Sprint(out.err)))
	case out.end == endOutput && stream:
		return newError("max_stream_output_exceeded")
	}
	e := newError(string(out.end))
	if out.end == endOutput {
		e = newError("max_output_exceeded")
		e.MaxOutput = c.snap.MaxOutputBytes
	}
	e.outcome = out
	return e
}

// shellCode is the exit code as a shell gives it: 128 + N for signal N.
func shellCode(out *outcome) string {
	if out.signalNumber > 0 {
		return strconv.Itoa(128 + out.signalNumber)
	}
	return strconv.Itoa(out.exitCode)
}

// answer gives the buffered answer of a command that has ended; result is what an after hook made of it.
func (c *call) answer(j job, out outcome, result map[string]any) *apiError {
	if result != nil && !j.text {
		return c.json(200, result)
	}
	e := c.endError(&out, false)
	if e != nil && e.outcome != nil {
		return e
	}
	if !j.text {
		c.Header().Set("Content-Type", "application/json")
		writeOutcome(c, []byte("{"), &out, endingOf(&out, e))
		return nil
	}
	c.Header().Set("Content-Type", "text/plain; charset=utf-8")
	c.Header().Set("X-Exit-Code", shellCode(&out))
	pieces := out.stdout
	if text, ok := result["output"].(string); ok {
		pieces = chunks{[]byte(text)}
	} else if out.end == endStart {
		pieces = chunks{[]byte(e.Message + "\n")}
	} else if out.stdoutBytes == 0 {
		pieces = out.stderr
	}
	for _, piece := range pieces {
		c.Write(piece)
	}
	return nil
}

// writeOutcome encodes captured output piece by piece, so that a large one is never held twice. head is an open object.
func writeOutcome(w io.Writer, head []byte, out *outcome, last ending) {
	buf := append(head, `"output":"`...)
	for i, pieces := range []chunks{out.stdout, out.stderr} {
		if i == 1 && out.stderrBytes == 0 {
			break
		} else if i == 1 {
			buf = append(buf, `,"stderr":"`...)
		}
		var text jsonText
		for _, piece := range pieces {
			if buf = text.append(buf, piece); len(buf) >= encodeBytes {
				w.Write(buf)
				buf = buf[:0]
			}
		}
		buf = append(text.end(buf), '"')
	}
	buf = append(append(buf, ','), marshal(last)[1:]...)
	w.Write(append(buf, '\n'))
}

// jsonText writes bytes that come in pieces as the inside of one JSON string. Bytes that are no UTF-8 become U+FFFD;
// a character that a piece cuts waits for the next.
type jsonText struct {
	cut [utf8.UTFMax]byte
	n   int // bytes of cut
}

func (t *jsonText) append(dst, src []byte) []byte {
	if t.n > 0 {
		both := append(t.cut[:t.n:t.n], src[:min(len(src), utf8.UTFMax-1)]...)
		dst2, used := escapeJSON(dst, both)
		if used < t.n { // still cut, and src is used up
			t.n = copy(t.cut[:], both[used:])
			return dst2
		}
		dst, src, t.n = dst2, src[used-t.n:], 0
	}
	dst, used := escapeJSON(dst, src)
	t.n = copy(t.cut[:], src[used:])
	return dst
}

// end gives up waiting.
func (t *jsonText) end(dst []byte) []byte {
	for ; t.n > 0; t.n-- {
		dst = append(dst, "\uFFFD"...)
	}
	return dst
}

// plainJSON are the bytes that a JSON string holds as they are.
var plainJSON = func() (plain [256]bool) {
	for b := ' '; b < utf8.RuneSelf; b++ {
		plain[b] = b != '"' && b != '\\'
	}
	return plain
}()

// escapeJSON appends src escaped, up to a character that its end cuts; used is how much that was.
func escapeJSON(dst, src []byte) (out []byte, used int) {
	done, i := 0, 0 // src[:done] is in dst
	for {
		for i < len(src) && plainJSON[src[i]] {
			i++
		}
		if i == len(src) {
			return append(dst, src[done:]...), i
		}
		b := src[i]
		if b >= utf8.RuneSelf {
			if _, size := utf8.DecodeRune(src[i:]); size > 1 {
				i += size
				continue
			}
			if !utf8.FullRune(src[i:]) {
				return append(dst, src[done:i]...), i
			}
		}
		dst = append(dst, src[done:i]...)
		i++
		done = i
		switch {
		case b >= utf8.RuneSelf:
			dst = append(dst, "\uFFFD"...)
		case b == '\n':
			dst = append(dst, `\n`...)
		case b == '"' || b == '\\':
			dst = append(dst, '\\', b)
		default:
			dst = fmt.Appendf(dst, `\u%04x`, b)
		}
	}
}

// streamSink writes output as it comes: as NDJSON lines, or raw.
type streamSink struct {
	c     *call
	text  bool
	parts [2]jsonText
	buf   []byte
}

func (c *call) beginStream(k *streamSink) {
	h := c.Header()
	h.Set("Content-Type", "application/x-ndjson")
	if k.text {
		h.Set("Content-Type", "text/plain; charset=utf-8")
		h.Set("Trailer", "X-Exit-Code, X-Exec-Error")
	}
	c.wrote = true
	c.control.Flush()
}

func (k *streamSink) output(stream int, p []byte, idle bool) error {
	if !k.text {
		p = k.line(stream, p, false)
	}
	if _, err := k.c.Write(p); err != nil || !idle {
		return err
	}
	return k.c.control.Flush()
}

// line is one NDJSON line, or nothing while a character is cut; last: a cut one will not be completed.
func (k *streamSink) line(stream int, p []byte, last bool) []byte {
	part := &k.parts[stream-1]
	head, length := `{"output":"`, part.n+len(p)
	if stream == 2 {
		head = `{"output":null,"stderr":"`
	}
	if k.buf = part.append(append(k.buf[:0], head...), p); last {
		k.buf = part.end(k.buf)
	}
	if length -= part.n; length == 0 {
		return nil
	}
	if stream == 1 {
		return fmt.Appendf(k.buf, "\",\"length\":%d,\"status\":\"running\"}\n", length)
	}
	return append(k.buf, "\",\"status\":\"running\"}\n"...)
}

// finish ends the stream: the one last line, or the trailers.
func (k *streamSink) finish(out outcome) *apiError {
	last := endingOf(&out, k.c.endError(&out, true))
	if k.text {
		if last.Error != "" {
			k.c.Header().Set("X-Exec-Error", last.Error)
		}
		if out.end == endExit || out.end == endStart {
			k.c.Header().Set("X-Exit-Code", shellCode(&out))
		}
		return nil
	}
	for stream := 1; stream <= 2; stream++ {
		k.c.Write(k.line(stream, nil, true))
	}
	last.Length = nil
	k.c.Write(append(append([]byte(`{"output":null,`), marshal(last)[1:]...), '\n'))
	return nil
}

// document is one of the texts that an agent reads.
type document struct {
	name, description string
	markdown, page    []byte // page: as HTML; nil: made when asked for
}

func (s *server) readSkills() error {
	root, err := skillFiles.ReadFile("skills/_root.md")
	s.root = string(root)
	dirs, _ := skillFiles.ReadDir("skills")
	for _, dir := range dirs {
		if !dir.IsDir() {
			continue
		}
		d, file := document{}, "skills/"+dir.Name()+"/SKILL.md"
		if d.markdown, err = skillFiles.ReadFile(file); err == nil {
			d.name, d.description, err = frontmatter(d.markdown)
		}
		if err != nil {
			return fmt.Errorf("embedded document %q: %w", file, err)
		}
		d.page = renderHTML(d.markdown)
		s.skills = append(s.skills, d)
	}
	return err
}

// publicSkills are the embedded documents and those that the enabled plugins publish.
func (c *call) publicSkills() []document {
	all := slices.Clone(c.s.skills)
	for _, p := range c.s.plugins {
		if doc, ok := p.docs["public/SKILL.md"]; ok && !c.snap.disabled(p.Name) {
			all = append(all, document{name: p.Name, description: p.Description, markdown: doc})
		}
	}
	return all
}

// rootAddress is this server as the client named it, if it named it plainly, else where it listens.
func (c *call) rootAddress() string {
	if host := c.r.Host; plainHost.MatchString(host) && c.s.redact(host) == host {
		return host
	}
	return c.s.address
}

var plainHost = regexp.MustCompile(`^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?$`)

func (c *call) rootGuide() *apiError {
	text := strings.NewReplacer("{{URL}}", "http://"+c.rootAddress(), "{{VERSION}}", version).Replace(c.s.root)
	return c.document(document{markdown: []byte(text)})
}

func (c *call) mainSkill() *apiError {
	c.r.SetPathValue("name", "aexec")
	return c.publicSkill()
}

func (c *call) publicSkill() *apiError {
	for _, d := range c.publicSkills() {
		if d.name == c.r.PathValue("name") {
			return c.document(d)
		}
	}
	return newError("not_found")
}

func (c *call) pluginDocument() *apiError {
	name, file, _ := strings.Cut(strings.TrimPrefix(c.r.URL.Path, "/private/skills/"), "/")
	for _, p := range c.s.plugins {
		if doc, ok := p.docs[file]; ok && p.Name == name && !c.snap.disabled(name) {
			return c.document(document{markdown: doc})
		}
	}
	return newError("not_found")
}

func (c *call) skillIndex() *apiError {
	text := []byte("# Skills of this machine\n\n")
	list := []map[string]string{}
	for _, d := range c.publicSkills() {
		link := "/skills/" + d.name + "/SKILL.md"
		list = append(list, map[string]string{"name": d.name, "description": d.description, "link": link})
		text = fmt.Appendf(text, "- [%s](%s): %s\n", d.name, link, d.description)
	}
	if prefers(c.r, "text/markdown", "text/html", "application/json") == "application/json" {
		c.Header().Set("Vary", "Accept")
		return c.json(200, map[string]any{"skills": list})
	}
	return c.document(document{markdown: text})
}

// document answers with markdown, or with the page for those who would rather have HTML.
func (c *call) document(d document) *apiError {
	kind, body := "text/markdown; charset=utf-8", d.markdown
	if prefers(c.r, "text/markdown", "text/html") == "text/html" {
		if kind, body = "text/html; charset=utf-8", d.page; body == nil {
			body = renderHTML(d.markdown)
		}
	}
	h := c.Header()
	h.Set("Content-Type", kind)
	h.Set("Vary", "Accept")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	c.Write(body)
	return nil
}

// prefers picks what the Accept header likes best (RFC 9110, 12.5.1), the first among equals.
func prefers(r *http.Request, offers ...string) string {
	accept := strings.Join(r.Header["Accept"], ",")
	best, most := offers[0], 0.0
	for _, offer := range offers {
		family, _, _ := strings.Cut(offer, "/")
		q, closest := 0.0, -1
		for part := range strings.SplitSeq(accept, ",") {
			kind, params, err := mime.ParseMediaType(part)
			if rank := slices.Index([]string{"*/*", family + "/*", offer}, kind); err == nil && rank > closest {
				q, closest = 1, rank
				if weight, ok := params["q"]; ok {
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

const pageHead = `<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>agent-exec</title>
<style>body{max-width:50em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}pre,code{background:#eee}pre{padding:.5em;overflow:auto}td,th{text-align:left;padding:0 1em 0 0}</style>
`

// renderHTML shows markdown as a plain page: headings, paragraphs, fenced code, flat lists, tables. Everything is escaped,
// and frontmatter is left out.
func renderHTML(doc []byte) []byte {
	text := string(doc)
	if head, body, ok := strings.Cut(text, "\n---\n"); ok && strings.HasPrefix(head, "---\n") {
		text = body
	}
	var b strings.Builder
	block := "" // the element that is open
	enter := func(tag string) {
		if block != tag && block != "" {
			b.WriteString("</" + block + ">\n")
		}
		if block != tag && tag != "" {
			b.WriteString("<" + tag + ">")
		}
		block = tag
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		words := strings.TrimSpace(line)
		mark, rest, _ := strings.Cut(words, " ")
		switch {
		case strings.HasPrefix(words, "```") && block == "pre":
			enter("")
		case strings.HasPrefix(words, "```"):
			enter("pre")
		case block == "pre":
			b.WriteString(html.EscapeString(line) + "\n")
		case words == "":
			if block == "p" || block == "table" {
				enter("")
			}
		case mark != "" && len(mark) <= 6 && strings.Trim(mark, "#") == "":
			enter("")
			fmt.Fprintf(&b, "<h%d>%s</h%[1]d>\n", len(mark), inlineHTML(rest))
		case mark == "-" || mark == "*":
			enter("ul")
			b.WriteString("<li>" + inlineHTML(rest) + "\n")
		case listNumber.MatchString(mark):
			enter("ol")
			fmt.Fprintf(&b, "<li value=%q>%s\n", strings.Trim(mark, "."), inlineHTML(rest))
		case strings.HasPrefix(words, "|"):
			enter("table")
			if strings.Trim(words, "|-: ") != "" {
				cells := strings.Split(strings.Trim(strings.ReplaceAll(words, `\|`, "\x00"), "| "), "|")
				b.WriteString("<tr><td>" + strings.NewReplacer("\x00", "|", "\x01", "<td>").Replace(inlineHTML(strings.Join(cells, "\x01"))) + "\n")
			}
		default:
			if block == "" || block == "table" || !strings.HasPrefix(line, " ") {
				enter("p")
			}
			b.WriteString(inlineHTML(words) + "\n")
		}
	}
	enter("")
	return []byte(pageHead + b.String())
}

var (
	safeLink   = regexp.MustCompile(`^(https?://|/?[A-Za-z0-9._#-][A-Za-z0-9._~/#?&=%-]*$)`) // no other scheme: no colon before a slash
	listNumber = regexp.MustCompile(`^[0-9]{1,4}\.$`)
	inlineMark = regexp.MustCompile("`([^`]+)`|\\*\\*([^*]+)\\*\\*|\\[([^]]+)\\]\\(([^()\\s]+)\\)")
)

// inlineHTML escapes one line and marks up its code, strong words and links; other links than relative and http(s) stay text.
func inlineHTML(line string) string {
	var b strings.Builder
	from := 0
	for _, at := range inlineMark.FindAllStringSubmatchIndex(line, -1) {
		part := func(n int) string { return line[at[2*n]:at[2*n+1]] }
		b.WriteString(html.EscapeString(line[from:at[0]]))
		switch {
		case at[2] >= 0:
			b.WriteString("<code>" + html.EscapeString(part(1)) + "</code>")
		case at[4] >= 0:
			b.WriteString("<strong>" + inlineHTML(part(2)) + "</strong>")
		case safeLink.MatchString(part(4)):
			b.WriteString(`<a href="` + html.EscapeString(part(4)) + `">` + inlineHTML(part(3)) + "</a>")
		default:
			b.WriteString(html.EscapeString(part(0)))
		}
		from = at[1]
	}
	return b.String() + html.EscapeString(line[from:])
}

const (
	probeTime = 5 * time.Second
	probeBody = 4096 // bytes
)

// probeServer asks a server for one path, with a key or (nil) without, and gives the status and the beginning of the body.
func probeServer(address, path string, key *apiKey) (code int, body []byte, err error) {
	conn, err := net.DialTimeout("tcp", address, probeTime)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(probeTime))
	header := ""
	if key != nil {
		header = "X-API-Key: " + key.text + "\r\n"
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n%sConnection: close\r\n\r\n", path, address, header); err != nil {
		return 0, nil, err
	}
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, nil, err
	}
	defer r.Body.Close()
	body, err = io.ReadAll(io.LimitReader(r.Body, probeBody))
	return r.StatusCode, body, err
}
