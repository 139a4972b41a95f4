// This file is the HTTP side: listener, routes, and the gates in their order.
// It may listen and use the network, and it alone.
// It must not decide about a command, or run one: it says who may ask for what, and answer.go does it.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	headerTimeout, requestTimeout = 10 * time.Second, 30 * time.Second     // for a request's head; for all of it
	idleTimeout                   = 120 * time.Second                      // between two requests
	writeTimeout                  = 30 * time.Second                       // for one write: a client that takes nothing for so long is gone
	lingerTimeout                 = 500 * time.Millisecond                 // for a body that nobody reads, so that its sender sees the answer
	shutdownPause, closeTimeout   = 10 * time.Millisecond, 2 * time.Second // between two looks at what runs; then, for the answers
	maxHeadBytes                  = 16 << 10                               // net/http takes up to fifty times as much memory for a head
	maxRateClients                = 4096                                   // whose rate is remembered
	probeTime, probeBody          = 5 * time.Second, 4096                  // of an answer to probeServer: patience, bytes
)

// fixedHeaders are on every answer of ours. The slices are shared: replace them, never append.
var fixedHeaders = http.Header{
	"X-Content-Type-Options":  {"nosniff"},
	"Content-Security-Policy": {"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
	"Cache-Control":           {"no-store"},
}

// route answers a request that has passed the gates, or gives the error to answer it with.
type route func(*call) *apiError

func (f route) ServeHTTP(w http.ResponseWriter, _ *http.Request) { w.(*call).failure = f(w.(*call)) }

// routes is every path there is, but those of plugins. All under /api/ and /private/ need the key.
var routes = map[string]route{
	"GET /{$}":                            (*call).rootGuide,
	"GET /SKILL.md":                       (*call).skill,
	"GET /skills":                         (*call).skillIndex,
	"GET /skills/{name}/SKILL.md":         (*call).skill,
	"GET /private/skills/{name}/SKILL.md": (*call).skill,
	"GET /private/skills/{name}/references/{file}": (*call).skill,
	"GET /ping":           func(c *call) *apiError { return c.json(200, map[string]string{"status": "ok", "version": version}) },
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
	stall, patience time.Duration // writeTimeout, requestTimeout, but less in tests
	address         string        // what it listens on, host:port; this and what follows prepare makes
	maxBody         int64
	mux             *http.ServeMux
	documents       map[string]document // by path
	limits          limiter
	parsing         sync.Mutex // one body at a time is taken apart: it can need a hundred times its size
}

// listen binds host:port (port 0: any free one). The error says what to do.
func listen(host string, port int) (net.Listener, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		err = fmt.Errorf("%w: choose another --host or --port; if it is in use, aexec stop --force --port %d kills who has it", err, port)
	}
	return l, err
}

// prepare makes everything that holds for the life of a server that listens on address.
func (s *server) prepare(address string) error {
	snap, _, err := s.store.current()
	if err != nil {
		return err
	}
	s.address, s.maxBody = address, snap.MaxRequestBodyBytes
	s.stall, s.patience = cmp.Or(s.stall, writeTimeout), cmp.Or(s.patience, requestTimeout)
	every := snap.RateLimitWindow / time.Duration(max(1, snap.RateLimitMax))
	s.limits = limiter{every: every, burst: snap.RateLimitMax, clients: map[string]*rate.Limiter{}}
	s.log.SetOutput(keylessLog{s, s.log.Writer()})
	s.mux, s.documents = http.NewServeMux(), readDocuments(s.plugins)
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

// keylessLog takes the key out of each line, also of those in which net/http reports a panic.
type keylessLog struct {
	s  *server
	to io.Writer
}

func (l keylessLog) Write(line []byte) (int, error) {
	_, err := io.WriteString(l.to, l.s.redact(string(line)))
	return len(line), err
}

// redact knows the key as it is, and as JSON and %q write it.
func (s *server) redact(text string) string {
	quoted := string(marshal(s.start.key.text))
	return s.start.key.redact(strings.ReplaceAll(text, quoted[1:len(quoted)-1], redactedKey))
}

// serve answers on l until ctx ends; then it accepts nothing new, ends running commands, and returns when nothing is left of these
// and they are on record, which takes as long as it takes, and their answers have had their time.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	h := &http.Server{Handler: s, ErrorLog: s.log, DisableGeneralOptionsHandler: true, MaxHeaderBytes: maxHeadBytes,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: s.patience, WriteTimeout: s.stall, IdleTimeout: idleTimeout}
	context.AfterFunc(ctx, func() { l.Close() })
	if err := h.Serve(l); ctx.Err() == nil {
		return err
	}
	s.runner.shutdown()
	for s.runner.slots.Load() > 0 {
		time.Sleep(shutdownPause)
	}
	time.AfterFunc(closeTimeout, func() { h.Close() }) // whoever is still there has not sent a whole request, or does not read
	return h.Shutdown(context.Background())
}

// call is one request on its way through the gates, the command that it asks for, and its answer.
type call struct {
	http.ResponseWriter
	*http.ResponseController
	s       *server
	r       *http.Request
	snap    *snapshot // the one under which all of the request is decided and run
	id      string
	peer    netip.Addr
	query   url.Values // of an API route, checked
	source  string     // where the key was: header, bearer, query, none
	keyed   bool       // the key is right
	failure *apiError  // nil: it is answered

	args, sent   []string // of the command: what will run, and what the request asked for
	what         approved
	decision     decision
	plugin       *plugin     // whose hooks stand around the command; nameless: none
	stream, text bool        // mode, format
	parts        [2]jsonText // of a stream: standard output, standard error
	out          outcome
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{ResponseWriter: w, ResponseController: http.NewResponseController(w), s: s, r: r, id: rand.Text(), plugin: &plugin{}}
	maps.Copy(w.Header(), fixedHeaders)
	w.Header()["X-Request-Id"] = []string{c.id}
	if r.ContentLength != 0 || !r.ProtoAtLeast(1, 1) { // until readArgs has read the body to its end
		w.Header().Set("Connection", "close") // net/http ignores a Transfer-Encoding in HTTP/1.0: what follows may be the body
	}
	// Who takes nothing must not hold up the end for the whole of writeTimeout.
	defer context.AfterFunc(s.runner.stopping, func() { c.SetWriteDeadline(time.Now().Add(closeTimeout)) })()
	if c.failure = c.gates(); c.failure == nil {
		s.mux.ServeHTTP(c, r)
	}
	if e := c.failure; e != nil {
		if e.Retryable {
			w.Header().Set("Retry-After", strconv.Itoa(e.wait))
		}
		c.json(e.status, e)
	}
	if w.Header().Get("Connection") == "close" {
		c.SetReadDeadline(time.Now().Add(lingerTimeout))
	}
}

// Write has its own time, so that a client that takes nothing cannot hold a command or a slot.
func (c *call) Write(p []byte) (int, error) {
	c.SetWriteDeadline(time.Now().Add(c.s.stall))
	if c.s.runner.shuttingDown() { // asked after, so that it and the end cannot miss each other
		c.SetWriteDeadline(time.Now().Add(closeTimeout))
	}
	return c.ResponseWriter.Write(p)
}

// gates lets a request through to its route, or says why not. Their order is fixed: what a stranger may learn comes first.
func (c *call) gates() *apiError {
	at := c.r.URL.Path
	handler, pattern := c.s.mux.Handler(c.r)
	switch {
	case c.r.TransferEncoding != nil: // net/http hides a Content-Length beside it, and serves what stands behind (RFC 9112, 6.1)
		return newError("invalid_request")
	case unclean.MatchString(at) || strings.Count(c.r.URL.EscapedPath(), "/") != strings.Count(at, "/"): // or one of them is encoded
		return newError("not_found")
	case pattern == "GET /ping":
		return nil
	case !c.s.start.enabled:
		return newError("disabled")
	}
	snap, news, err := c.s.store.current()
	if news {
		c.s.announce(snap, err)
	}
	peer, _ := netip.ParseAddrPort(c.r.RemoteAddr) // net/http's own: there is no error
	c.snap, c.peer = snap, peer.Addr().Unmap().WithZone("")
	if err != nil {
		return newError("settings_invalid")
	} else if !snap.ipAllowed(c.peer) {
		return newError("ip_denied")
	} else if c.findKey(); !c.s.limits.take(c.peer, c.keyed, time.Now()) {
		e := newError("rate_limited")
		e.wait += int(c.s.limits.every / time.Second) // rounded up
		return e
	}
	api, command := strings.HasPrefix(at, "/api/"), strings.HasPrefix(at, "/api/command/")
	switch {
	case !c.keyed && (command || strings.HasPrefix(at, "/private/") || api && pattern != ""):
		c.s.note(auditRecord{Event: "auth_failed", RequestID: c.id, SourceIP: c.peer.String(), AuthSource: c.source, Endpoint: at})
		c.Header().Set("WWW-Authenticate", `Bearer realm="agent-exec"`)
		return newError("unauthorized") // there, what is not there is not for strangers to know either
	case command && c.r.Method == "HEAD" && pattern != "": // by a pattern with GET, but a plugin's route runs something
		c.Header().Set("Allow", "GET")
		return newError("method_not_allowed")
	case pattern == "":
		handler.ServeHTTP(silent{c.ResponseWriter}, c.r) // sets Allow if the path takes another method
		return newError(pick(c.Header()["Allow"] != nil, "method_not_allowed", "not_found"))
	case !api:
		return nil
	}
	if e := c.checkQuery(); e != nil || c.r.Method != "POST" || command {
		return e
	}
	return c.readArgs()
}

// silent takes only the headers of an answer.
type silent struct{ http.ResponseWriter }

func (silent) WriteHeader(int)             {}
func (silent) Write(p []byte) (int, error) { return len(p), nil }

// unclean is what a proxy, the mux and a plugin could each read as another path: no / at the start, //, /./, /../, NUL, backslash.
var unclean = regexp.MustCompile(`^([^/]|$)|//|/\.\.?(/|$)|[\x00\\]`)

// announce reports what a reload brought; the store tells it to one request only.
func (s *server) announce(snap *snapshot, err error) {
	record := auditRecord{Event: "settings_reloaded"}
	if err != nil {
		record = auditRecord{Event: "settings_invalid", Reason: err.Error()}
	} else {
		s.audit.reconfigure(snap.AuditFile, snap.AuditEnabled) // what goes wrong goes wrong again with the record, and is logged
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
	var query, bearer []string
	if c.s.start.allowQueryKey {
		query = c.r.URL.Query()["apiKey"]
	}
	for _, value := range c.r.Header["Authorization"] {
		if scheme, token, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") { // another scheme's may be a proxy's
			bearer = append(bearer, strings.TrimSpace(token))
		}
	}
	c.source = "none"
	for i, keys := range [][]string{query, bearer, c.r.Header["X-Api-Key"]} {
		if len(keys) > 0 {
			c.keyed = (c.keyed || c.source == "none") && len(keys) == 1 && c.s.start.key.matches(keys[0])
			c.source = []string{"query", "bearer", "header"}[i]
		}
	}
}

// limiter is a token bucket for each client: an address (of IPv6 the /64), with the key or without, who cannot lock an agent out.
type limiter struct {
	mu      sync.Mutex
	every   time.Duration // for one more token
	burst   int           // 0: no limit
	clients map[string]*rate.Limiter
}

// take says whether there is a token. Of too many clients all are forgotten: who has thousands of addresses has as many limits.
func (l *limiter) take(peer netip.Addr, keyed bool, now time.Time) bool {
	network, _ := peer.Prefix(min(64, peer.BitLen()))
	client := fmt.Sprint(network, keyed)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.clients) >= maxRateClients {
		clear(l.clients)
	}
	if l.clients[client] == nil && l.burst > 0 {
		l.clients[client] = rate.NewLimiter(rate.Every(l.every), l.burst)
	}
	return l.burst == 0 || l.clients[client].AllowN(now, 1)
}

// checkQuery admits only the parameters that the route knows, each once.
func (c *call) checkQuery() *apiError {
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	c.query = query
	known := []string{"mode=buffered", "mode=stream", "format=json", "format=text"}
	for name, values := range query {
		ok := c.r.URL.Path == "/api/exec" && slices.Contains(known, name+"="+values[0])
		if len(values) > 1 || !ok && (name != "apiKey" || !c.s.start.allowQueryKey) { // findKey has looked at that
			return newError("invalid_query", fmt.Sprintf("The query parameter %q is unknown here, repeated, or has a bad value.", name))
		}
	}
	if err != nil {
		return newError("invalid_query")
	}
	return nil
}

// readArgs is the body gate. It reads the body to its end: only then does net/http notice that the client has gone.
func (c *call) readArgs() (e *apiError) {
	kind, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	switch {
	case err != nil || kind != "application/json":
		return newError("unsupported_media_type")
	case c.r.ContentLength > c.s.maxBody:
		return newError("body_too_large") // also before a 100 Continue asks for it
	}
	data, err := io.ReadAll(c.r.Body) // no more than its length says
	if err != nil {
		return newError("invalid_request")
	}
	if c.r.ProtoAtLeast(1, 1) {
		c.Header().Del("Connection")
	}
	c.s.parsing.Lock()
	defer c.s.parsing.Unlock()
	c.args, e = parseExecBody(data)
	return e
}

// probeServer asks a server for what an agent reads first, and says what is wrong. No key is sent: another program may listen there.
func probeServer(address string) error {
	conn, err := net.DialTimeout("tcp", address, probeTime)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(probeTime))
	fmt.Fprintf(conn, "GET /SKILL.md HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", address) // an error shows in the answer
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || r.StatusCode == http.StatusOK {
		return err
	}
	body, _ := io.ReadAll(io.LimitReader(r.Body, probeBody))
	return fmt.Errorf("the answer is %d, %.300q", r.StatusCode, body) // which says what to do
}
