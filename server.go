// This file is the HTTP side: listener, connections, gates in order, routes, and the way of a command through hooks and audit; it is apart from answer.go, as it alone decides what a request may do.
// It may listen and use the network, and it alone.
// It must not decide about a command or run one itself: it asks acl.go, records in audit.go, runs through exec.go.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

const (
	headerTimeout        = 10 * time.Second       // for a request's head
	requestTimeout       = 30 * time.Second       // for head and body
	idleTimeout          = 120 * time.Second      // between two requests
	writeTimeout         = 30 * time.Second       // for one write: a client that takes nothing for so long is gone
	lingerTimeout        = 500 * time.Millisecond // for the rest of a body that nobody reads, so that its sender sees the answer
	shutdownWait         = 10 * time.Second       // beyond killGraceMs, until the last answer is out
	settingsRetryAfter   = 5 * time.Second
	maxHeadBytes         = 32 << 10              // of a request's head
	maxFields            = 100                   // of a request's head: net/http takes fifty times the size of small ones
	maxParsing           = 2                     // bodies that are taken apart at once
	maxSeen              = maxHeadBytes + 4096   // what net/http reads of a head at most
	maxConns             = 512                   // open connections
	maxPipelined         = 64 << 10              // bytes that a client may send behind a running command
	maxRateClients       = 4096                  // addresses with a rate limit of their own, for each class
	probeTime, probeBody = 5 * time.Second, 4096 // of an answer to probeServer: patience, bytes
)

// fixedHeaders are on every answer of ours. The slices are shared: replace them, never append.
var fixedHeaders = http.Header{
	"X-Content-Type-Options":  {"nosniff"},
	"Content-Security-Policy": {"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
}

// routes is every path there is, but those of plugins. All under /api/ and /private/ need the key.
var routes = map[string]func(*call) *apiError{
	"GET /ping":                           (*call).ping,
	"GET /{$}":                            (*call).rootGuide,
	"GET /SKILL.md":                       (*call).publicSkill,
	"GET /skills":                         (*call).skillIndex,
	"GET /skills/{name}/SKILL.md":         (*call).publicSkill,
	"GET /private/skills/{name}/SKILL.md": (*call).pluginDocument,
	"GET /private/skills/{name}/references/{file}": (*call).pluginDocument,
	"GET /api/acl":        (*call).acl,
	"POST /api/acl/check": (*call).aclCheck,
	"GET /api/plugins":    (*call).pluginList,
	"POST /api/exec":      (*call).exec,
}

// server is one listening aexec.
type server struct {
	start           startup
	store           *store
	audit           *auditLog
	runner          *runner
	plugins         []*plugin // loaded and valid; snapshot.disabled says which are off now
	log             *log.Logger
	address         string        // what it listens on, host:port
	auditFile       string        // where the settings name none
	maxBody         int64         // these and all below are set by prepare
	stall, patience time.Duration // writeTimeout, requestTimeout, but less in tests
	mux             *http.ServeMux
	skills          []document // embedded
	quotedKey       string
	keyless         *limiter // requests without a valid key
	withKey         *limiter
	connMu          sync.Mutex
	conns           map[net.Conn]time.Time // since when each has been without a request with the key; zero: it has one
	parsing         chan struct{}          // places for bodies that are being taken apart: each can need a hundred times its size
}

// listen binds host:port (port 0: any free one). The error says what to do (port taken: by whom to look).
func listen(host string, port int) (net.Listener, error) {
	address := net.JoinHostPort(host, strconv.Itoa(port))
	l, err := net.Listen("tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%q is in use by another program: choose another with --port, or `aexec stop --force --port %d` names it and kills it", address, port)
	case err != nil:
		return nil, fmt.Errorf("cannot listen on %q, check HOST and PORT (below 1024 only root may): %w", address, err)
	}
	return l, nil
}

// serve answers on l until ctx ends, then shuts down: accepts nothing new, ends running commands, answers them, returns when all are answered.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	if s.mux == nil {
		if err := s.prepare(l.Addr().String()); err != nil {
			return err
		}
	}
	h := &http.Server{
		Handler: s, ErrorLog: s.log, ConnState: s.connState, DisableGeneralOptionsHandler: true,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
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
	for conn, since := range s.conns {
		if !since.IsZero() {
			conn.Close()
		}
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
	s.quotedKey = strings.TrimPrefix(strings.TrimSuffix(string(marshal(s.start.key.text)), `"`), `"`)
	s.stall, s.patience = cmp.Or(s.stall, writeTimeout), cmp.Or(s.patience, requestTimeout)
	s.maxBody, s.conns, s.parsing = snap.MaxRequestBodyBytes, map[net.Conn]time.Time{}, make(chan struct{}, maxParsing)
	s.keyless, s.withKey = newLimiter(snap), newLimiter(snap)
	s.mux, s.skills = http.NewServeMux(), readSkills()
	s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.(*call).fail(w.(*call).noRoute()) })
	for pattern, f := range routes {
		s.handle(pattern, f)
	}
	for _, p := range s.plugins { // plugin.go has tried the patterns
		for pattern, argv := range p.routes {
			s.handle(pattern, func(c *call) *apiError { return c.pluginRoute(p, argv) })
		}
	}
	return nil
}

// handle registers a route behind the gates that come after it: the key, and for an API the query.
func (s *server) handle(pattern string, f func(*call) *apiError) {
	api := strings.Contains(pattern, " /api/")
	private := api || strings.Contains(pattern, " /private/")
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, _ *http.Request) {
		c, e := w.(*call), (*apiError)(nil)
		switch {
		case private && !c.keyed:
			e = c.unauthorized()
		case api:
			e = c.checkQuery()
		}
		if private {
			c.Header().Set("Cache-Control", "no-store")
		}
		if e == nil {
			e = f(c)
		}
		if e != nil {
			c.fail(e)
		}
	})
}

// connState keeps clients without the key from shutting others out, be they slow, idle, or busy not reading: above maxConns,
// who has been here longest without a request with the key goes.
func (s *server) connState(conn net.Conn, state http.ConnState) {
	s.connMu.Lock()
	defer s.connMu.Unlock()
	switch state {
	case http.StateNew, http.StateIdle:
		s.conns[conn] = time.Now()
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, conn)
	}
	if state != http.StateNew || len(s.conns) <= maxConns {
		return
	}
	oldest := conn
	for other, since := range s.conns {
		if !since.IsZero() && since.Before(s.conns[oldest]) {
			oldest = other
		}
	}
	delete(s.conns, oldest) // it may linger, but not in the place of another
	oldest.Close()
}

// keep takes the connection of a request with the key out of those that may be closed for others.
func (s *server) keep(conn net.Conn) {
	s.connMu.Lock()
	defer s.connMu.Unlock()
	if _, ok := s.conns[conn]; ok {
		s.conns[conn] = time.Time{}
	}
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

type (
	watchedListener struct{ net.Listener }
	connKey         struct{}
)

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &watchedConn{TCPConn: conn.(*net.TCPConn)}, nil
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
	old := !r.ProtoAtLeast(1, 1) // where net/http does not look at a Transfer-Encoding
	if r.ContentLength == 0 && r.TransferEncoding == nil && !old {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	head := bytes.ToLower(w.seen)
	return bytes.Contains(head, []byte("\ntransfer-encoding:")) && (old || bytes.Contains(head, []byte("\ncontent-length:"))) ||
		r.TransferEncoding != nil && !bytes.HasPrefix(w.seen, []byte(r.Method+" "+r.RequestURI+" "))
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
	query     url.Values
	badQuery  error
	source    string // where the key was: header, bearer, query, none
	keyed     bool   // the key is right
	wrote     bool
	whole     bool // the body was read to its end
	unaudited bool // an exec_start could not be written
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{ResponseWriter: w, control: http.NewResponseController(w), s: s, r: r, id: rand.Text(), whole: r.ContentLength == 0}
	c.conn = r.Context().Value(connKey{}).(*watchedConn)
	defer c.leave()
	maps.Copy(w.Header(), fixedHeaders)
	w.Header()["X-Request-Id"] = []string{c.id}
	if !c.whole { // until readArgs has read it to its end
		w.Header().Set("Connection", "close")
		c.extend() // for a 100 Continue
	}
	c.query, c.badQuery = url.ParseQuery(r.URL.RawQuery)
	if e := c.gates(); e != nil {
		c.fail(e)
	}
}

// extend gives what is written next its own time, so that a client that takes nothing cannot hold a command or a slot.
func (c *call) extend() {
	c.control.SetWriteDeadline(time.Now().Add(c.s.stall))
}

func (c *call) Write(p []byte) (int, error) {
	c.wrote = true
	c.extend()
	return c.ResponseWriter.Write(p)
}

// leave turns a panic into an answer if none has begun, and lets the server live.
func (c *call) leave() {
	c.conn.mu.Lock()
	c.conn.seen = c.conn.seen[:0]
	c.conn.mu.Unlock()
	if !c.whole {
		c.control.SetReadDeadline(time.Now().Add(lingerTimeout))
	}
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

// redact knows the key as it is, and as JSON and %q write it.
func (s *server) redact(text string) string {
	return s.start.key.redact(strings.ReplaceAll(text, s.quotedKey, redactedKey))
}

// gates lets a request through to its route, or says why not. Their order is fixed: what a stranger may learn comes first.
func (c *call) gates() *apiError {
	at := c.r.URL.Path
	switch {
	case c.conn.ambiguous(c.r):
		c.Header().Set("Connection", "close") // what stands behind it may be meant as its body
		return newError("invalid_request")
	case len(c.r.Header) > maxFields:
		c.r.Header = nil // not to be kept for as long as a client takes to read this
		return newError("invalid_request").because("The request's head has more than %d fields.", maxFields)
	case !cleanPath(c.r.URL):
		return newError("not_found")
	case at == "/ping":
		c.s.mux.ServeHTTP(c, c.r)
		return nil
	case !c.s.start.enabled:
		return newError("disabled")
	}
	snap, news, err := c.s.store.current()
	if news {
		c.s.announce(snap, err)
	}
	if err != nil {
		c.retryAfter(settingsRetryAfter)
		return newError("settings_invalid")
	}
	c.snap = snap
	peer, err := netip.ParseAddrPort(c.r.RemoteAddr)
	if c.peer = peer.Addr().Unmap().WithZone(""); err != nil || !snap.ipAllowed(c.peer) {
		return newError("ip_denied")
	}
	limit := c.s.keyless
	if c.findKey(); c.keyed { // counted apart, so that nobody without a key can lock an agent out
		limit = c.s.withKey
		c.s.keep(c.conn)
	}
	if wait := limit.wait(c.peer, time.Now()); wait > 0 {
		c.retryAfter(wait)
		return newError("rate_limited")
	}
	command := strings.HasPrefix(at, "/api/command/")
	if (command || strings.HasPrefix(at, "/private/")) && !c.keyed {
		return c.unauthorized() // what is there is not for strangers to know
	}
	if command && c.r.Method == "HEAD" {
		return c.noRoute() // patterns with GET serve HEAD too, but a plugin's route runs something
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

// announce reports what a reload brought; the store tells it to one request only.
func (s *server) announce(snap *snapshot, err error) {
	if err != nil {
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

// findKey looks at every place where a key may stand. All that are used must hold the right one, and none twice.
func (c *call) findKey() {
	places := [][]string{nil, c.r.Header["Authorization"], c.r.Header["X-Api-Key"]}
	if c.s.start.allowQueryKey && c.badQuery == nil {
		places[0] = c.query["apiKey"]
	}
	right, wrong := false, false
	c.source = "none"
	for i, keys := range places {
		wrong = wrong || len(keys) > 1
		for _, key := range keys {
			if scheme, token, _ := strings.Cut(key, " "); i == 1 && strings.EqualFold(scheme, "Bearer") {
				key = strings.TrimSpace(token)
			} else if i == 1 {
				continue // another scheme's, as a proxy may want it
			}
			c.source = []string{"query", "bearer", "header"}[i]
			matches := c.s.start.key.matches(key)
			right, wrong = right || matches, wrong || !matches
		}
	}
	c.keyed = right && !wrong
}

func (c *call) unauthorized() *apiError {
	if err := c.s.audit.append(c.record("auth_failed", nil)); err != nil {
		c.s.log.Printf("cannot record auth_failed: %v", err)
	}
	c.Header().Set("WWW-Authenticate", `Bearer realm="agent-exec"`)
	return newError("unauthorized")
}

// noRoute asks the mux which other methods the path takes; all that no route takes are the pattern / there.
func (c *call) noRoute() *apiError {
	var allow []string
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} {
		_, pattern := c.s.mux.Handler(&http.Request{Method: method, URL: c.r.URL})
		if pattern != "/" && (method != "HEAD" || !strings.HasPrefix(c.r.URL.Path, "/api/command/")) {
			allow = append(allow, method)
		}
	}
	if allow == nil {
		return newError("not_found")
	}
	c.Header().Set("Allow", strings.Join(allow, ", "))
	return newError("method_not_allowed")
}

// limiter is a token bucket for each client address (IPv6: each /64, which is what one client has). Beyond maxRateClients those
// that come new share one bucket, that of no address, so that many addresses neither grow memory nor win anything.
type limiter struct {
	mu      sync.Mutex
	every   rate.Limit
	burst   int // 0: no limit
	clients map[netip.Prefix]*rate.Limiter
	swept   time.Time
}

func newLimiter(snap *snapshot) *limiter {
	return &limiter{every: rate.Limit(float64(snap.RateMax) / snap.RateWindow.Seconds()), burst: snap.RateMax, clients: map[netip.Prefix]*rate.Limiter{}}
}

// wait takes a token, or says how long until there is one.
func (l *limiter) wait(client netip.Addr, now time.Time) time.Duration {
	if l.burst == 0 {
		return 0
	}
	prefix, _ := client.Prefix(min(64, client.BitLen()))
	l.mu.Lock()
	defer l.mu.Unlock()
	full := func() bool { return l.clients[prefix] == nil && len(l.clients) >= maxRateClients-1 }
	if full() && now.Sub(l.swept) > time.Second {
		l.swept = now // a full bucket is as good as none
		maps.DeleteFunc(l.clients, func(_ netip.Prefix, b *rate.Limiter) bool { return b.TokensAt(now) >= float64(l.burst) })
	}
	if full() {
		prefix = netip.Prefix{}
	}
	if l.clients[prefix] == nil {
		l.clients[prefix] = rate.NewLimiter(l.every, l.burst)
	}
	taken := l.clients[prefix].ReserveN(now, 1)
	delay := taken.DelayFrom(now)
	if delay > 0 {
		taken.CancelAt(now)
	}
	return delay
}

// checkQuery admits only the parameters that the route knows, each once.
func (c *call) checkQuery() *apiError {
	known := url.Values{}
	if c.r.URL.Path == "/api/exec" {
		known = url.Values{"mode": {"buffered", "stream"}, "format": {"json", "text"}}
	}
	if c.s.start.allowQueryKey {
		known["apiKey"] = c.query["apiKey"] // whatever it is: findKey has looked at it
	}
	if c.badQuery != nil {
		return newError("invalid_query").because("The query is malformed: broken percent-encoding, or a semicolon.")
	}
	for name, given := range c.query {
		if len(given) > 1 || !slices.Contains(known[name], given[0]) {
			return newError("invalid_query").because("The query parameter %q is unknown here, repeated, or has a bad value.", name)
		}
	}
	return nil
}

// readArgs is the body gate. It reads the body to its end: only then does net/http notice that the client has gone.
func (c *call) readArgs() ([]string, *apiError) {
	kind, _, err := mime.ParseMediaType(strings.Join(c.r.Header["Content-Type"], ","))
	if err != nil || kind != "application/json" {
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
	if c.whole = true; c.r.TransferEncoding == nil {
		c.Header().Del("Connection")
	}
	c.s.parsing <- struct{}{}
	defer func() { <-c.s.parsing }()
	return parseExecBody(data)
}

// probeServer asks a server for one path, and gives the status and the beginning of the body.
func probeServer(address, path string) (code int, body []byte, err error) {
	conn, err := net.DialTimeout("tcp", address, probeTime)
	if err != nil {
		return 0, nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(probeTime))
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, address) // an error shows in the answer
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, nil, err
	}
	body, err = io.ReadAll(io.LimitReader(r.Body, probeBody))
	return r.StatusCode, body, err
}
