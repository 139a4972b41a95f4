// This file is the HTTP side: listener, connections, routes, and the gates in their order.
// It may listen and use the network, and it alone.
// It must not decide about a command, or run one: it says who may ask for what, and job.go and answer.go do it.
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
	maxHeadBytes         = 16 << 10               // of a request's head: net/http takes up to fifty times as much memory for one
	maxSeen              = maxHeadBytes + 4096    // what net/http reads of a head at most
	maxStrangers         = 512                    // open connections on which no request has the key
	maxPipelined         = 64 << 10               // bytes that a client may send behind a running command
	maxRateClients       = 4096                   // addresses whose rate is remembered
	probeTime, probeBody = 5 * time.Second, 4096  // of an answer to probeServer: patience, bytes
)

// fixedHeaders are on every answer of ours. The slices are shared: replace them, never append.
var fixedHeaders = http.Header{
	"X-Content-Type-Options":  {"nosniff"},
	"Content-Security-Policy": {"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
}

// route answers a request that has passed the gates, or gives the error to answer it with.
type route func(*call) *apiError

func (f route) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	c := w.(*call)
	if e := f(c); e != nil {
		c.fail(e)
	}
}

// routes is every path there is, but those of plugins. All under /api/ and /private/ need the key.
var routes = map[string]route{
	"GET /ping":                           (*call).ping,
	"GET /{$}":                            (*call).rootGuide,
	"GET /SKILL.md":                       (*call).skill,
	"GET /skills":                         (*call).skillIndex,
	"GET /skills/{name}/SKILL.md":         (*call).skill,
	"GET /private/skills/{name}/SKILL.md": (*call).skill,
	"GET /private/skills/{name}/references/{file}": (*call).skill,
	"GET /api/acl":        (*call).acl,
	"POST /api/acl/check": (*call).aclCheck,
	"GET /api/plugins":    (*call).pluginList,
	"POST /api/exec":      (*call).exec,
}

// execParameters is every query that POST /api/exec knows.
var execParameters = []string{"mode=buffered", "mode=stream", "format=json", "format=text"}

// server is one listening aexec.
type server struct {
	start           startup
	store           *store
	audit           *auditLog
	runner          *runner
	plugins         []*plugin // loaded and valid; snapshot.disabled says which are off now
	log             *log.Logger
	stall, patience time.Duration // writeTimeout, requestTimeout, but less in tests

	// What prepare makes:
	address   string // what it listens on, host:port
	maxBody   int64
	quotedKey string // as JSON and %q write it
	mux       *http.ServeMux
	documents map[string]document // by path
	limits    map[bool]*limiter   // of requests with the key and without, so that nobody without it can lock an agent out
	connMu    sync.Mutex
	strangers []net.Conn // connections that do not serve a request with the key, who came first before
	parsing   sync.Mutex // one body at a time is taken apart: it can need a hundred times its size
}

// listen binds host:port (port 0: any free one). The error says what to do.
func listen(host string, port int) (net.Listener, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("%w: choose another --host or --port; if it is in use, aexec stop --force --port %d kills who has it", err, port)
	}
	return l, nil
}

// prepare makes everything that holds for the life of a server that listens on address.
func (s *server) prepare(address string) error {
	snap, _, err := s.store.current()
	if err != nil {
		return err
	}
	quoted := string(marshal(s.start.key.text))
	s.address, s.maxBody, s.quotedKey = address, snap.MaxRequestBodyBytes, quoted[1:len(quoted)-1]
	s.stall, s.patience = cmp.Or(s.stall, writeTimeout), cmp.Or(s.patience, requestTimeout)
	s.mux, s.documents = http.NewServeMux(), readDocuments(s.plugins)
	s.limits = map[bool]*limiter{false: newLimiter(snap), true: newLimiter(snap)}
	for pattern, r := range routes {
		s.mux.Handle(pattern, r)
	}
	for _, p := range s.plugins { // plugin.go has tried the patterns
		for pattern, argv := range p.routes {
			s.mux.Handle(pattern, route(func(c *call) *apiError { return c.pluginRoute(p, argv) }))
		}
	}
	return nil
}

// serve answers on l until ctx ends, then shuts down: accepts nothing new, ends running commands, and returns when all are answered.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	h := &http.Server{
		Handler: s, ErrorLog: s.log, ConnState: s.connState, DisableGeneralOptionsHandler: true,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, s, conn) // the server is the key
		},
		ReadHeaderTimeout: headerTimeout, ReadTimeout: s.patience, WriteTimeout: s.stall, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeadBytes,
	}
	stopped := make(chan error, 1)
	context.AfterFunc(ctx, func() { stopped <- s.shutdown(h) })
	if err := h.Serve(watchedListener{l}); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}

func (s *server) shutdown(h *http.Server) error {
	wait := shutdownWait
	if snap, _, err := s.store.current(); err == nil {
		wait += snap.KillGrace
	}
	late, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	s.runner.shutdown()
	s.connMu.Lock()
	for _, conn := range s.strangers {
		conn.Close()
	}
	s.connMu.Unlock()
	h.Shutdown(late)
	return h.Close() // whoever is still there
}

// connState keeps clients without the key from shutting others out, be they slow, idle, or busy not reading: of too many,
// who has been here longest goes. A connection on which a request had the key counts as closed until that is answered.
func (s *server) connState(conn net.Conn, state http.ConnState) {
	if state == http.StateActive {
		return
	}
	s.connMu.Lock()
	defer s.connMu.Unlock()
	s.strangers = slices.DeleteFunc(s.strangers, func(other net.Conn) bool { return other == conn })
	if state != http.StateClosed {
		s.strangers = append(s.strangers, conn)
	}
	if len(s.strangers) > maxStrangers {
		s.strangers[0].Close()
		s.strangers = s.strangers[1:] // it may linger, but not in the place of another
	}
}

// watchedConn sees two things that net/http hides: a Content-Length beside a Transfer-Encoding, of which it drops the one and
// serves what stands behind as a request of its own (RFC 9112, 6.1: smuggling); and a client that goes behind a further request,
// as net/http's watch for a disconnect ends with the first byte.
type watchedConn struct {
	*net.TCPConn
	busy   atomic.Bool // a command runs, and its request was read whole
	behind []byte      // what was sent meanwhile
	mu     sync.Mutex
	seen   []byte // since the last answer
}

type watchedListener struct{ net.Listener }

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &watchedConn{TCPConn: conn.(*net.TCPConn)}, nil
}

// Read is called by one goroutine at a time.
func (w *watchedConn) Read(p []byte) (int, error) {
	for len(w.behind) == 0 || w.busy.Load() {
		n, err := w.TCPConn.Read(p)
		w.mu.Lock()
		w.seen = append(w.seen, p[:min(n, maxSeen-len(w.seen))]...)
		w.mu.Unlock()
		if err != nil || len(w.behind) == 0 && !w.busy.Load() {
			return n, err
		}
		if w.behind = append(w.behind, p[:n]...); len(w.behind) > maxPipelined {
			return 0, errors.New("too much was sent behind a running command")
		}
	}
	n := copy(p, w.behind)
	w.behind = w.behind[n:]
	return n, nil
}

// forget is called when a request is answered.
func (w *watchedConn) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = w.seen[:0]
}

// ambiguous says whether the request's head has both framings, or may have: in HTTP/1.0 net/http does not look at a
// Transfer-Encoding, and the head of a request that was sent behind another one is not seen here.
func (w *watchedConn) ambiguous(r *http.Request) bool {
	old := !r.ProtoAtLeast(1, 1)
	if r.TransferEncoding == nil && !old {
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
	s      *server
	r      *http.Request
	conn   *watchedConn
	snap   *snapshot // the one under which all of the request is decided and run
	id     string
	peer   netip.Addr
	query  url.Values // of an API route, checked
	source string     // where the key was: header, bearer, query, none
	keyed  bool       // the key is right
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{ResponseWriter: w, s: s, r: r, conn: r.Context().Value(s).(*watchedConn), id: rand.Text()}
	defer c.leave()
	maps.Copy(w.Header(), fixedHeaders)
	w.Header()["X-Request-Id"] = []string{c.id}
	if r.ContentLength != 0 {
		w.Header().Set("Connection", "close") // until readArgs has read the body to its end
		defer func() { c.conn.SetReadDeadline(time.Now().Add(lingerTimeout)) }()
	}
	if e := c.gates(); e != nil {
		c.fail(e)
		return
	}
	s.mux.ServeHTTP(c, r)
}

// leave ends a request. A panic costs its client the connection, and the log does not show the key.
func (c *call) leave() {
	c.conn.forget()
	if v := recover(); v != nil {
		c.s.log.Printf("internal error in request %s: %q\n%s", c.id, c.s.redact(fmt.Sprint(v)), debug.Stack())
		panic(http.ErrAbortHandler)
	}
}

// Write has its own time, so that a client that takes nothing cannot hold a command or a slot.
func (c *call) Write(p []byte) (int, error) {
	c.conn.SetWriteDeadline(time.Now().Add(c.s.stall))
	return c.ResponseWriter.Write(p)
}

// flush sends what was written so far, at least the headers.
func (c *call) flush() error {
	c.Write(nil)
	return http.NewResponseController(c.ResponseWriter).Flush()
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
	case !cleanPath(c.r.URL):
		return newError("not_found")
	case at == "/ping" && (c.r.Method == "GET" || c.r.Method == "HEAD"):
		return nil
	case !c.s.start.enabled:
		return newError("disabled")
	}
	snap, news, err := c.s.store.current()
	if news {
		c.s.announce(snap, err)
	}
	if err != nil {
		return newError("settings_invalid")
	}
	c.snap = snap
	peer, err := netip.ParseAddrPort(c.r.RemoteAddr)
	if c.peer = peer.Addr().Unmap().WithZone(""); err != nil || !snap.ipAllowed(c.peer) {
		return newError("ip_denied")
	}
	if c.findKey(); c.keyed {
		c.s.connState(c.conn, http.StateClosed)
		c.Header().Set("Cache-Control", "no-store")
	}
	if wait := c.s.limits[c.keyed].take(c.peer, time.Now()); wait > 0 {
		e := newError("rate_limited")
		e.wait = int((wait + time.Second - 1) / time.Second)
		return e
	}
	api, command := strings.HasPrefix(at, "/api/"), strings.HasPrefix(at, "/api/command/")
	handler, pattern := c.s.mux.Handler(c.r)
	switch {
	case !c.keyed && (command || strings.HasPrefix(at, "/private/") || api && pattern != ""):
		c.s.note(c.record("auth_failed"))
		c.Header().Set("WWW-Authenticate", `Bearer realm="agent-exec"`)
		return newError("unauthorized") // there, what is not there is not for strangers to know either
	case command && c.r.Method == "HEAD" && pattern != "": // by a pattern with GET, but a plugin's route runs something
		c.Header().Set("Allow", "GET")
		return newError("method_not_allowed")
	case pattern == "":
		handler.ServeHTTP(silent{c.ResponseWriter}, c.r) // sets Allow if the path takes another method
		if c.Header()["Allow"] != nil {
			return newError("method_not_allowed")
		}
		return newError("not_found")
	case api:
		return c.checkQuery()
	}
	return nil
}

// silent takes only the headers of an answer.
type silent struct{ http.ResponseWriter }

func (silent) WriteHeader(int)             {}
func (silent) Write(p []byte) (int, error) { return len(p), nil }

// cleanPath refuses what a proxy, the mux and a plugin could each read as another path.
func cleanPath(u *url.URL) bool {
	p := u.Path
	clean := path.Clean(p) == p || path.Clean(p)+"/" == p && p != "//"
	return strings.HasPrefix(p, "/") && clean && !strings.ContainsAny(p, "\x00\\") &&
		strings.Count(u.EscapedPath(), "/") == strings.Count(p, "/") // none of them encoded
}

// announce reports what a reload brought; the store tells it to one request only.
func (s *server) announce(snap *snapshot, err error) {
	record := auditRecord{Event: "settings_reloaded"}
	if err != nil {
		record = auditRecord{Event: "settings_invalid", Reason: err.Error()}
	} else if err := s.audit.reconfigure(snap.AuditFile, snap.AuditEnabled); err != nil {
		s.log.Printf("cannot follow the audit settings: %v", err)
	}
	s.log.Print(strings.TrimSpace(record.Event + " " + record.Reason))
	s.note(record)
}

// note records something, and logs it if it cannot.
func (s *server) note(r auditRecord) error {
	err := s.audit.append(r)
	if err != nil {
		s.log.Printf("cannot record %s: %v", r.Event, err)
	}
	return err
}

// findKey looks at every place where a key may stand. All that are used must hold the right one, and none twice.
func (c *call) findKey() {
	places := map[string][]string{"header": c.r.Header["X-Api-Key"]}
	for _, value := range c.r.Header["Authorization"] {
		if scheme, token, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") { // another scheme's may be a proxy's
			places["bearer"] = append(places["bearer"], strings.TrimSpace(token))
		}
	}
	if c.s.start.allowQueryKey {
		places["query"] = c.r.URL.Query()["apiKey"]
	}
	c.source, c.keyed = "none", true
	for _, source := range []string{"query", "bearer", "header"} {
		if keys := places[source]; len(keys) > 0 {
			c.source = source
			c.keyed = c.keyed && len(keys) == 1 && c.s.start.key.matches(keys[0])
		}
	}
	c.keyed = c.keyed && c.source != "none"
}

// limiter is a token bucket for each client address (IPv6: each /64, which is what one client has).
type limiter struct {
	mu      sync.Mutex
	every   time.Duration // for one more token
	burst   int           // 0: no limit
	clients map[netip.Prefix]*rate.Limiter
}

func newLimiter(snap *snapshot) *limiter {
	every := snap.RateLimitWindow / time.Duration(max(1, snap.RateLimitMax))
	return &limiter{every: every, burst: snap.RateLimitMax, clients: map[netip.Prefix]*rate.Limiter{}}
}

// take takes a token, or says how long until there is one at the latest. Of too many clients all are forgotten: who has thousands
// of addresses has thousands of limits anyway.
func (l *limiter) take(client netip.Addr, now time.Time) time.Duration {
	if l.burst == 0 {
		return 0
	}
	prefix, _ := client.Prefix(min(64, client.BitLen()))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.clients[prefix] == nil {
		if len(l.clients) == maxRateClients {
			clear(l.clients)
		}
		l.clients[prefix] = rate.NewLimiter(rate.Every(l.every), l.burst)
	}
	if l.clients[prefix].AllowN(now, 1) {
		return 0
	}
	return l.every
}

// checkQuery admits only the parameters that the route knows, each once.
func (c *call) checkQuery() *apiError {
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return newError("invalid_query")
	}
	for name, values := range query {
		key := name == "apiKey" && c.s.start.allowQueryKey // findKey has looked at it
		known := c.r.URL.Path == "/api/exec" && slices.Contains(execParameters, name+"="+values[0])
		if len(values) > 1 || !key && !known {
			return newError("invalid_query").because("The query parameter %q is unknown here, repeated, or has a bad value.", name)
		}
	}
	c.query = query
	return nil
}

// readArgs is the body gate. It reads the body to its end: only then does net/http notice that the client has gone.
func (c *call) readArgs() ([]string, *apiError) {
	kind, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" {
		return nil, newError("unsupported_media_type")
	}
	if c.r.ContentLength > c.s.maxBody {
		return nil, newError("body_too_large") // also before a 100 Continue asks for it
	}
	data, err := io.ReadAll(io.LimitReader(c.r.Body, c.s.maxBody+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		e := newError("timeout").because("The body did not arrive within %v, so nothing ran.", c.s.patience)
		e.Hint = "Send it again, whole and at once."
		return nil, e
	case err != nil:
		return nil, newError("invalid_request")
	case int64(len(data)) > c.s.maxBody:
		return nil, newError("body_too_large")
	}
	if c.r.TransferEncoding == nil {
		c.Header().Del("Connection")
	}
	c.s.parsing.Lock()
	defer c.s.parsing.Unlock()
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
