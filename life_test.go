package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// These tests take the finished program for a black box: its command line, its wire, its files and what /proc says of it.

const (
	lifePatience = 90 * time.Second // how long anything may take before a test calls it hung; no test measures time
	lifePause    = 5 * time.Millisecond
	lifeKey      = "a-key-of-these-tests-0123456789abcdef"
)

// ---- the nursery: where the program is started

// lifeNursery is a shell that was there before any test. Other tests lower the hard limit by which aexec knows what it
// started, in this very process and for good; what this process starts then takes itself for a server's command.
var lifeNursery struct {
	mu sync.Mutex
	in io.Writer
}

func init() {
	if os.Getenv(helperVar) != "" || os.Args[0] == launcherName {
		return
	}
	c := exec.Command("/bin/sh", "-c", `while read -r script; do /bin/sh "$script" & done`) // ends with this process
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		panic(err)
	}
	lifeNursery.in = in
}

func lifeQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// lifeProcess is one that runs in the nursery.
type lifeProcess struct {
	t    testing.TB
	dir  string // its out and err
	news *bufio.Reader
	file *os.File
	pid  int
}

// lifeStart starts argv with this environment and nothing else of ours.
func lifeStart(t testing.TB, env []string, argv ...string) *lifeProcess {
	t.Helper()
	dir, err := os.MkdirTemp(testTemp, "life-")
	if err != nil {
		t.Fatal(err)
	}
	p := &lifeProcess{t: t, dir: dir}
	fifo, script := filepath.Join(dir, "news"), filepath.Join(dir, "script")
	line := "exec env -i"
	for _, word := range append(slices.Clone(env), argv...) {
		line += " " + lifeQuote(word)
	}
	line = "echo $$ >" + lifeQuote(fifo) + "; " + line + " >" + lifeQuote(dir+"/out") + " 2>" + lifeQuote(dir+"/err") + " </dev/null"
	text := "exec 2>/dev/null\n/bin/sh -c " + lifeQuote(line) + "\necho $? >" + lifeQuote(fifo) + "\n"
	if err := errors.Join(syscall.Mkfifo(fifo, 0o600), os.WriteFile(script, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	if p.file, err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	p.news = bufio.NewReader(p.file)
	lifeNursery.mu.Lock()
	_, err = fmt.Fprintln(lifeNursery.in, script)
	lifeNursery.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	p.pid = p.number()
	return p
}

func (p *lifeProcess) number() int {
	p.t.Helper()
	p.file.SetReadDeadline(time.Now().Add(lifePatience))
	line, err := p.news.ReadString('\n')
	n, bad := strconv.Atoi(strings.TrimSpace(line))
	if err := errors.Join(err, bad); err != nil {
		p.t.Fatalf("a process of the nursery: %v", err)
	}
	return n
}

// wait gives the exit code as the shell does (128 + N for a signal), standard output and standard error.
func (p *lifeProcess) wait() (code int, stdout, stderr string) {
	p.t.Helper()
	code = p.number()
	p.file.Close()
	out, _ := os.ReadFile(filepath.Join(p.dir, "out"))
	errs, _ := os.ReadFile(filepath.Join(p.dir, "err"))
	return code, string(out), string(errs)
}

// ---- a throw-away home, and the server in it

type lifeHome struct {
	t       testing.TB
	dir     string
	host    string
	env     []string // of the command line
	said    []string // everything that the command line printed
	pid     int      // of the server last started
	address string
}

// lifeRules allow what these tests run, and no more.
func lifeRules() []any {
	self, _ := os.Executable()
	return []any{"aexec --version", "echo *", "no-such-command", []string{"sh", "..."}, []string{"seq", "..."}, []string{self, "..."}}
}

// newLifeHome makes a home whose server has a loopback address of its own, so that no other program's port is in the way.
func newLifeHome(t testing.TB, settings map[string]any) *lifeHome {
	t.Helper()
	h := &lifeHome{t: t, dir: filepath.Join(t.TempDir(), "agent-exec"), host: fmt.Sprintf("127.%d.%d.%d", 2+rand.IntN(250), rand.IntN(250), 2+rand.IntN(250))}
	h.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "LANG=C.UTF-8", "AGENT_EXEC_CONFIG_DIR=" + h.dir}
	if err := os.MkdirAll(filepath.Join(h.dir, "plugins"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.write(".env", "# of a test\nAPI_KEY="+lifeKey+"\nHOST="+h.host+"\nPORT=0\nAGENT_EXEC_ENABLED=true\n")
	h.settings(settings)
	buildBinary(t)
	t.Cleanup(func() {
		if h.pid > 0 {
			h.run("stop", "--force")
		}
		if t.Failed() {
			for _, name := range []string{"agent-exec.log", "audit.jsonl"} {
				text := h.read(name)
				t.Logf("the end of %s:\n%s", name, text[max(0, len(text)-4000):])
			}
		}
	})
	return h
}

// write replaces a file at once.
func (h *lifeHome) write(name, text string) {
	h.t.Helper()
	file := filepath.Join(h.dir, name)
	if err := errors.Join(os.WriteFile(file+".test", []byte(text), 0o600), os.Rename(file+".test", file)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *lifeHome) read(name string) string {
	text, _ := os.ReadFile(filepath.Join(h.dir, name))
	return string(text)
}

// settings writes what differs from: the rules of these tests, long times, many slots.
func (h *lifeHome) settings(differ map[string]any) {
	h.t.Helper()
	all := map[string]any{
		"exec":      map[string]any{"allow": lifeRules(), "cwd": "/", "env": map[string]any{"set": map[string]string{helperVar: "life"}}},
		"timeoutMs": lifePatience.Milliseconds(), "killGraceMs": 200, "maxConcurrentExec": 16,
	}
	for name, value := range differ {
		all[name] = value
	}
	helperEnv("life")
	text, err := json.Marshal(all)
	if err != nil {
		h.t.Fatal(err)
	}
	h.write("settings.json", string(text))
}

func (h *lifeHome) run(args ...string) (code int, stdout, stderr string) {
	h.t.Helper()
	code, stdout, stderr = lifeStart(h.t, h.env, append([]string{buildBinary(h.t)}, args...)...).wait()
	h.said = append(h.said, stdout, stderr)
	return code, stdout, stderr
}

func (h *lifeHome) must(args ...string) string {
	h.t.Helper()
	code, stdout, stderr := h.run(args...)
	if code != 0 {
		h.t.Fatalf("aexec %q: exit %d\n%s%s\nlog:\n%s", args, code, stdout, stderr, h.read("agent-exec.log"))
	}
	return stdout
}

var lifeStarted = regexp.MustCompile(`(?m)^started: http://(\S+), pid (\d+)$`)

// serve runs start or restart, and keeps who serves where.
func (h *lifeHome) serve(args ...string) {
	h.t.Helper()
	said := h.must(args...)
	m := lifeStarted.FindStringSubmatch(said)
	if m == nil {
		h.t.Fatalf("aexec %q said %q", args, said)
	}
	h.address = m[1]
	h.pid, _ = strconv.Atoi(m[2])
}

// lifeState is the letter of proc_pid_stat(5), 0 for nobody.
func lifeState(pid int) byte {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if i := bytes.LastIndexByte(stat, ')'); i >= 0 && i+2 < len(stat) {
		return stat[i+2]
	}
	return 0
}

func lifeGone(pid int) bool { return strings.IndexByte("\x00ZX", lifeState(pid)) >= 0 }

// kill ends the server with SIGKILL.
func (h *lifeHome) kill() {
	h.t.Helper()
	if err := syscall.Kill(h.pid, syscall.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
	lifeUntil(h.t, "the killed server is gone", func() bool { return lifeGone(h.pid) })
}

// lifeUntil waits for what no event announces.
func lifeUntil(t testing.TB, what string, true func() bool) {
	t.Helper()
	for begun := time.Now(); !true(); time.Sleep(lifePause) {
		if time.Since(begun) > lifePatience {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// ---- the audit log

type lifeRecord struct {
	Seq         int      `json:"seq"`
	Event       string   `json:"event"`
	RequestID   string   `json:"requestId"`
	Mode        string   `json:"mode"`
	Argv        []string `json:"argv"`
	ExitCode    *int     `json:"exitCode"`
	Signal      string   `json:"signal"`
	Reason      string   `json:"reason"`
	Denial      string   `json:"denialReason"`
	DurationMs  *int64   `json:"durationMs"`
	StdoutBytes *int64   `json:"stdoutBytes"`
	StderrBytes *int64   `json:"stderrBytes"`
	Prev        string   `json:"prev"`
}

// records reads the audit log, and checks its chain without the program's help.
func (h *lifeHome) records() (all []lifeRecord) {
	h.t.Helper()
	prev := strings.Repeat("0", 64)
	for line := range strings.Lines(h.read("audit.jsonl")) {
		var r lifeRecord
		if !strings.HasSuffix(line, "\n") || json.Unmarshal([]byte(line), &r) != nil {
			break // is being written
		}
		if r.Prev != prev || r.Seq != len(all)+1 {
			h.t.Fatalf("the chain breaks at record %d: %s", len(all)+1, line)
		}
		prev = fmt.Sprintf("%x", sha256.Sum256([]byte(strings.TrimSuffix(line, "\n"))))
		all = append(all, r)
	}
	return all
}

// verified is records, when nobody writes any more.
func (h *lifeHome) verified() []lifeRecord {
	h.t.Helper()
	all := h.records()
	said, lines := h.must("audit", "verify"), strings.Count(h.read("audit.jsonl"), "\n")
	if !strings.Contains(said, fmt.Sprintf("ok: %d records", len(all))) || lines != len(all) {
		h.t.Errorf("of %d records in %d lines it says %q", len(all), lines, said)
	}
	return all
}

func lifeEvents(all []lifeRecord, event string) (some []lifeRecord) {
	for _, r := range all {
		if r.Event == event {
			some = append(some, r)
		}
	}
	return some
}

// lifePairs checks that each start has its end, once and later, and that no end comes from nowhere.
func lifePairs(t testing.TB, all []lifeRecord) {
	t.Helper()
	open := map[string]lifeRecord{}
	for _, r := range all {
		started, ok := open[r.RequestID]
		switch r.Event {
		case "exec_start":
			if ok || r.RequestID == "" {
				t.Errorf("record %d starts a request that has started: %+v", r.Seq, r)
			}
			open[r.RequestID] = r
		case "exec_end":
			if !ok || !slices.Equal(started.Argv, r.Argv) || r.Reason == "" || r.DurationMs == nil || r.StdoutBytes == nil || r.StderrBytes == nil {
				t.Errorf("record %d ends what did not start, or lacks something: %+v", r.Seq, r)
			}
			delete(open, r.RequestID)
		}
	}
	for _, r := range open {
		t.Errorf("record %d has no end: %q", r.Seq, r.Argv)
	}
}

// ---- the wire

// lifeClient is one connection, on which one request follows the other.
type lifeClient struct {
	*net.TCPConn
	r *bufio.Reader
}

type lifeAnswer struct {
	code    int
	header  http.Header
	trailer http.Header
	body    string
	last    bool // on its connection
}

func (a lifeAnswer) object() (o struct {
	Output, Stderr, Status, Error, Signal string
	ExitCode                              *int
	Length                                int
}) {
	json.Unmarshal([]byte(a.body), &o)
	return o
}

var (
	errLifeSilent = errors.New("the connection ended before any answer")
	errLifeBroken = errors.New("the answer broke off")
)

func lifeDial(address string) (*lifeClient, error) {
	conn, err := net.DialTimeout("tcp", address, lifePatience)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLifeSilent, err)
	}
	conn.SetDeadline(time.Now().Add(lifePatience))
	return &lifeClient{conn.(*net.TCPConn), bufio.NewReader(conn)}, nil
}

func lifeBody(args ...string) string {
	body, _ := json.Marshal(map[string]any{"args": args})
	return string(body)
}

func (c *lifeClient) send(path, key, body string) error {
	_, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: test\r\nX-API-Key: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, key, len(body), body)
	if err != nil {
		return fmt.Errorf("%w: %w", errLifeSilent, err)
	}
	return nil
}

// head reads an answer up to its body.
func (c *lifeClient) head() (*http.Response, error) {
	c.SetReadDeadline(time.Now().Add(lifePatience))
	if _, err := c.r.Peek(1); err != nil {
		return nil, fmt.Errorf("%w: %w", errLifeSilent, err)
	}
	answer, err := http.ReadResponse(c.r, &http.Request{Method: "POST"})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLifeBroken, err)
	}
	return answer, nil
}

func (c *lifeClient) answer() (lifeAnswer, error) {
	answer, err := c.head()
	if err != nil {
		return lifeAnswer{}, err
	}
	return lifeRest(answer)
}

func lifeRest(answer *http.Response) (a lifeAnswer, err error) {
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		err = fmt.Errorf("%w after %d bytes: %w", errLifeBroken, len(body), err)
	}
	return lifeAnswer{answer.StatusCode, answer.Header, answer.Trailer, string(body), answer.Close}, err
}

func (c *lifeClient) exec(query string, args ...string) (lifeAnswer, error) {
	if err := c.send("/api/exec"+query, lifeKey, lifeBody(args...)); err != nil {
		return lifeAnswer{}, err
	}
	return c.answer()
}

// dial is a connection to this home's server.
func (h *lifeHome) dial() *lifeClient {
	h.t.Helper()
	c, err := lifeDial(h.address)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return c
}

// begin sends a command on a connection of its own.
func (h *lifeHome) begin(query string, args ...string) *lifeClient {
	h.t.Helper()
	c := h.dial()
	if err := c.send("/api/exec"+query, lifeKey, lifeBody(args...)); err != nil {
		h.t.Fatal(err)
	}
	return c
}

func (h *lifeHome) exec(query string, args ...string) lifeAnswer {
	h.t.Helper()
	c := h.begin(query, args...)
	defer c.Close()
	a, err := c.answer()
	if err != nil {
		h.t.Errorf("%q: %v", args, err)
	}
	return a
}

// ---- witnesses

// lifeWitness is a FIFO that processes hold open for as long as they live: it ends when the last of them is dead.
type lifeWitness struct {
	t    testing.TB
	path string
	r, w *os.File
}

func newLifeWitness(t testing.TB) *lifeWitness {
	t.Helper()
	w := &lifeWitness{t: t, path: filepath.Join(t.TempDir(), "fifo")}
	err := syscall.Mkfifo(w.path, 0o600)
	if err == nil {
		w.r, err = os.OpenFile(w.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	if err == nil {
		w.w, err = os.OpenFile(w.path, os.O_WRONLY, 0) // until let go of, the FIFO has no end
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.r.Close(); w.w.Close() })
	return w
}

// hear waits for n bytes.
func (w *lifeWitness) hear(n int) string {
	w.t.Helper()
	w.r.SetReadDeadline(time.Now().Add(lifePatience))
	b := make([]byte, n)
	if got, err := io.ReadFull(w.r, b); err != nil {
		w.t.Fatalf("heard %q: %v", b[:got], err)
	}
	return string(b)
}

// line waits for a line of less than 64 bytes.
func (w *lifeWitness) line() (s string) {
	w.t.Helper()
	for len(s) < 64 && !strings.HasSuffix(s, "\n") {
		s += w.hear(1)
	}
	return strings.TrimSpace(s)
}

// alive says whether any process holds the FIFO now.
func (w *lifeWitness) alive() bool {
	w.t.Helper()
	w.w.Close()
	conn, err := w.r.SyscallConn()
	if err != nil {
		w.t.Fatal(err)
	}
	alive := false
	conn.Read(func(fd uintptr) bool {
		n, err := 1, error(nil)
		for b := make([]byte, 4096); n > 0 && err == nil; {
			n, err = syscall.Read(int(fd), b)
		}
		alive = err == syscall.EAGAIN
		return true
	})
	return alive
}

// ended waits until none does.
func (w *lifeWitness) ended() {
	w.t.Helper()
	w.w.Close()
	w.r.SetReadDeadline(time.Now().Add(lifePatience))
	if _, err := io.Copy(io.Discard, w.r); err != nil {
		w.t.Errorf("something is alive: %v", err)
	}
}

// lifeHolds is a command that holds the witness, says x when it is there, and goes on with the script.
func lifeHolds(w *lifeWitness, script string, args ...string) []string {
	return append([]string{"sh", "-c", `exec 7>"$0"; printf x >&7; ` + script, w.path}, args...)
}

// lifeMany leaves a daemon of a new session, twice forked, and one with an empty environment; each says x; and it hates to end.
const lifeMany = `trap '' TERM
	(setsid sh -c '(printf x >&7; exec sleep 1000) & exit' </dev/null >/dev/null 2>&1 &)
	env -i setsid sh -c 'printf x >&7; exec sleep 1000' </dev/null >/dev/null 2>&1 &
	sleep 1000; sleep 1000`

const lifeManyWords = 3 // with lifeHolds' own

// TestLife's parts each have a home and a server of their own, and run beside one another: most wait most of the time.
func TestLife(t *testing.T) {
	for name, test := range map[string]func(*testing.T){
		"killed server": lifeKilled, "stop": lifeStop, "restart under load": lifeRestart, "ends": lifeEnds, "one slot": lifeOneSlot,
		"floods": lifeFloods, "runs": lifeRuns, "streams": lifeStreams, "key rotation": lifeKeyRotation, "key nowhere": lifeKeyNowhere,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

// ---- death

// lifeKilled: what a killed server's commands left is ended by the next start, and by that of no other home.
func lifeKilled(t *testing.T) {
	h, other := newLifeHome(t, nil), newLifeHome(t, nil)
	h.serve("start")
	other.serve("start")
	doomed, spared := newLifeWitness(t), newLifeWitness(t)
	const commands = 8
	for i := range commands {
		h.begin([]string{"", "?mode=stream"}[i%2], lifeHolds(doomed, lifeMany)...)
	}
	first := newLifeWitness(t)
	h.begin("", lifeHolds(first, "exec sleep 1000")...)
	first.hear(1)
	other.begin("", lifeHolds(spared, lifeMany)...)
	doomed.hear(commands * lifeManyWords)
	spared.hear(lifeManyWords)
	h.kill()
	first.ended() // with the server, as each command's first process
	if !doomed.alive() {
		t.Error("nothing outlived the server, so this test proves nothing")
	}
	h.serve("start")
	if doomed.alive() {
		t.Error("a command of the killed server is alive")
	}
	if !spared.alive() {
		t.Error("a command of another server was ended")
	}
	if a := h.exec("", "echo", "new"); a.object().Output != "new\n" {
		t.Errorf("the new server says %d %s", a.code, a.body)
	}
	other.must("stop")
	spared.ended()
	h.must("stop")
	all := h.verified()
	if n := len(lifeEvents(all, "exec_start")); n != commands+2 {
		t.Errorf("%d starts are recorded", n)
	}
	starts := lifeEvents(all, "server_start")
	if m := regexp.MustCompile(`ended (\d+) processes`).FindStringSubmatch(starts[len(starts)-1].Reason); m == nil {
		t.Errorf("what was left is not recorded: %+v", starts)
	} else if n, _ := strconv.Atoi(m[1]); n < 2*commands {
		t.Errorf("only %d processes were ended", n)
	}
	lifePairs(t, other.verified())
}

// lifeStop ends a server amid commands: everybody gets an answer with what was captured.
func lifeStop(t *testing.T) {
	for _, way := range []string{"SIGTERM", "stop"} {
		t.Run(way, func(t *testing.T) {
			h, w := newLifeHome(t, nil), newLifeWitness(t)
			h.serve("start")
			queries := []string{"", "?format=text", "?mode=stream", "?mode=stream&format=text"}
			var clients []*lifeClient
			for range 2 {
				for _, query := range queries {
					clients = append(clients, h.begin(query, lifeHolds(w, "printf so-far; printf beside >&2; "+lifeMany)...))
				}
			}
			w.hear(len(clients) * lifeManyWords)
			idle := h.dial()
			if way == "stop" {
				if said := h.must("stop"); !strings.Contains(said, strconv.Itoa(h.pid)) {
					t.Errorf("stop said %q", said)
				}
				if !lifeGone(h.pid) || w.alive() {
					t.Errorf("stop came back, and the server's state is %q; a command is alive: %v", lifeState(h.pid), w.alive())
				}
			} else if err := syscall.Kill(h.pid, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			for i, c := range clients {
				a, err := c.answer()
				if err != nil {
					t.Errorf("%s: %v (%+v)", queries[i%4], err, a)
				}
				o, lines := a.object(), strings.Split(strings.TrimSpace(a.body), "\n")
				switch i % 4 {
				case 0, 1:
					if a.code != 503 || o.Error != "shutting_down" || o.Output != "so-far" || o.Stderr != "beside" || o.ExitCode != nil {
						t.Errorf("%s: %d %s", queries[i%4], a.code, a.body)
					}
				case 2:
					var last struct{ Status, Error string }
					if json.Unmarshal([]byte(lines[len(lines)-1]), &last); last.Status != "error" || last.Error != "shutting_down" || !strings.Contains(a.body, `"so-far"`) || !strings.Contains(a.body, `"beside"`) {
						t.Errorf("the stream: %s", a.body)
					}
				case 3:
					if a.trailer.Get("X-Exec-Error") != "shutting_down" || !strings.Contains(a.body, "so-far") || !strings.Contains(a.body, "beside") {
						t.Errorf("the stream of text: %q %v", a.body, a.trailer)
					}
				}
			}
			if a, err := idle.exec("", "echo", "late"); !errors.Is(err, errLifeSilent) && a.code != 503 {
				t.Errorf("a connection that was idle: %+v, %v", a, err)
			}
			lifeUntil(t, "the server is gone", func() bool { return lifeGone(h.pid) })
			w.ended()
			if c, err := lifeDial(h.address); err == nil {
				c.Close()
				t.Error("somebody listens still")
			}
			if code, _, said := h.run("stop"); code != 1 || !strings.Contains(said, "not running") {
				t.Errorf("stop again: %d %q", code, said)
			}
			h.pid = 0
			all := h.verified()
			lifePairs(t, all)
			for _, r := range lifeEvents(all, "exec_end") {
				if r.Reason != "shutting_down" || *r.StdoutBytes != 6 || *r.StderrBytes != 6 {
					t.Errorf("it ended as %+v", r)
				}
			}
			if n := len(lifeEvents(all, "exec_end")); n != len(clients) || all[len(all)-1].Event != "server_stop" {
				t.Errorf("%d ends, and last %+v", n, all[len(all)-1])
			}
		})
	}
}

// lifeRestart: whoever asks while the server comes and goes gets the right answer, a clean refusal, or none.
func lifeRestart(t *testing.T) {
	h := newLifeHome(t, nil)
	h.write(".env", strings.Replace(h.read(".env"), "PORT=0", "PORT=3333", 1))
	h.serve("start")
	before := h.address
	var count struct{ right, refused, silent, broken atomic.Int64 }
	var kills, mended atomic.Int64
	var stop atomic.Bool
	var load sync.WaitGroup
	defer load.Wait()
	defer stop.Store(true)
	long := h.exec("", "seq", "50000").object().Output
	if !strings.HasSuffix(long, "\n50000\n") {
		t.Fatalf("seq said %.100q", long)
	}
	for n := range 4 {
		load.Go(func() {
			var c *lifeClient
			for i := 0; !stop.Load(); i++ {
				was := mended.Load()
				var err error
				if c == nil || i%16 == 0 {
					if c, err = lifeDial(before); err != nil {
						count.silent.Add(1)
						time.Sleep(lifePause)
						continue
					}
				}
				args, want := []string{"echo", fmt.Sprint(n, i)}, fmt.Sprint(n, i)+"\n"
				if i%4 == n {
					args, want = []string{"seq", "50000"}, long
				}
				a, err := c.exec("", args...)
				o := a.object()
				switch {
				case err == nil && a.code == 200 && o.Output == want && o.ExitCode != nil && *o.ExitCode == 0 && o.Status == "done" && o.Length == len(want):
					count.right.Add(1)
				case err == nil && a.code == 503 && o.Error == "shutting_down" && strings.HasPrefix(want, o.Output):
					count.refused.Add(1)
				case errors.Is(err, errLifeSilent):
					count.silent.Add(1)
				case errors.Is(err, errLifeBroken) && kills.Load() > was:
					count.broken.Add(1) // SIGKILL may cut an answer, but not so that it looks whole
				default:
					t.Errorf("%.60q: %v, %d %.300q", args, err, a.code, a.body)
				}
				if err != nil || a.code != 200 {
					c.Close()
					c = nil
				}
			}
			if c != nil {
				c.Close()
			}
		})
	}
	answered := func() {
		t.Helper()
		from := count.right.Load()
		lifeUntil(t, "right answers", func() bool { return count.right.Load() >= from+20 })
	}
	restarts := 4
	if testing.Short() {
		restarts = 2
	}
	for range restarts {
		answered()
		h.serve("restart")
	}
	answered()
	kills.Add(1)
	h.kill()
	h.serve("start")
	mended.Add(1)
	answered()
	h.serve("restart")
	answered()
	stop.Store(true)
	load.Wait()
	h.must("stop")
	h.pid = 0
	t.Logf("%d right, %d refused, %d without an answer, %d cut by SIGKILL", count.right.Load(), count.refused.Load(), count.silent.Load(), count.broken.Load())
	all := h.verified()
	if n := len(lifeEvents(all, "server_start")); n != restarts+3 {
		t.Errorf("%d starts of the server", n)
	}
	if n := len(lifeEvents(all, "audit_broken")); n != 0 {
		t.Errorf("the log says %d times that it was broken", n)
	}
	ends := 0
	for _, r := range lifeEvents(all, "exec_end") {
		if r.Reason == "exit" && *r.ExitCode == 0 {
			ends++
		}
	}
	if ends < int(count.right.Load()) {
		t.Errorf("%d right answers, but %d good ends", count.right.Load(), ends)
	}
	if starts := len(lifeEvents(all, "exec_start")); starts-len(lifeEvents(all, "exec_end")) > 4 {
		t.Errorf("%d starts have no end; SIGKILL excuses one for each client", starts-len(lifeEvents(all, "exec_end")))
	}
}

// ---- every start has its end

// lifeEnds ends a command in every way there is, and looks for the record of that.
func lifeEnds(t *testing.T) {
	h := newLifeHome(t, map[string]any{"maxOutputBytes": 5000, "maxStreamBytes": 7000})
	h.serve("start")
	type want struct {
		reason, signal string
		code           int // -1: none
		out, err       int64
		mode           string
	}
	wants := map[string]want{} // by the last argument
	name := func(w want) string {
		name := fmt.Sprint("end-", len(wants))
		wants[name] = w
		return name
	}
	modes := []struct{ query, mode string }{{"", "buffered"}, {"?format=text", "buffered"}, {"?mode=stream", "stream"}, {"?mode=stream&format=text", "stream"}}
	sh := func(script string) []string { return []string{"sh", "-c", script} }

	for _, m := range modes {
		full := int64(5000)
		if m.mode == "stream" {
			full = 7000
		}
		for _, c := range []struct {
			args []string
			want
		}{
			{sh("printf abc; printf defgh >&2; exit 3"), want{reason: "exit", code: 3, out: 3, err: 5}},
			{sh("kill -SEGV $$"), want{reason: "exit", signal: "SIGSEGV", code: -1}},
			{sh("printf a; exec 7>&1; setsid sleep 1000 & exit 0"), want{reason: "exit", out: 1}},
			{sh("while printf 0123456789; do :; done"), want{reason: "output_limit", signal: "SIGTERM", code: -1, out: full}},
			{sh("trap '' TERM; while printf 0123456789 >&2; do :; done; sleep 1000"), want{reason: "output_limit", signal: "SIGKILL", code: -1, err: full}},
		} {
			c.want.mode = m.mode
			if a := h.exec(m.query, append(c.args, name(c.want))...); a.header.Get("X-Request-ID") == "" {
				t.Errorf("%q: no request id", c.args)
			}
		}
	}
	h.exec("", "no-such-command") // has no last argument of its own
	wants["no-such-command"] = want{reason: "start_failed", code: 127, mode: "buffered"}

	// the client goes: closes, resets, or closes its own direction only
	for _, m := range modes {
		for _, way := range []string{"close", "reset", "half"} {
			w := newLifeWitness(t)
			c := h.begin(m.query, append(lifeHolds(w, "exec sleep 1000"), name(want{reason: "client_gone", signal: "SIGTERM", code: -1, mode: m.mode}))...)
			w.hear(1)
			switch way {
			case "reset":
				c.SetLinger(0)
				c.Close()
			case "close":
				c.Close()
			case "half":
				c.CloseWrite()
				if a, err := c.answer(); err != nil || m.mode == "buffered" && a.object().Error != "client_gone" {
					t.Errorf("%s, half-closed: %+v, %v", m.query, a, err)
				}
				if w.alive() {
					t.Error("answered, and the command lives")
				}
			}
			w.ended()
		}
	}

	// timeouts, all at once, under settings that leave each command time to begin
	h.settings(map[string]any{"timeoutMs": 4000})
	w := newLifeWitness(t)
	var late []*lifeClient
	for _, m := range modes {
		for _, c := range []struct{ script, signal string }{{"", "SIGTERM"}, {"trap '' TERM; ", "SIGKILL"}} {
			late = append(late, h.begin(m.query, append(lifeHolds(w, c.script+"sleep 1000; sleep 1000"), name(want{reason: "timeout", signal: c.signal, code: -1, mode: m.mode}))...))
		}
	}
	for i, c := range late {
		if a, err := c.answer(); err != nil || a.code != []int{408, 200}[i/4] || a.trailer.Get("X-Exec-Error") != "timeout" && !strings.Contains(a.body, `"timeout"`) {
			t.Errorf("%s, timed out: %+v, %v", modes[i/2].query, a, err)
		}
	}
	w.ended()

	h.settings(nil)
	w = newLifeWitness(t)
	for _, m := range modes {
		h.begin(m.query, append(lifeHolds(w, "printf 12345; "+lifeMany), name(want{reason: "shutting_down", signal: "SIGKILL", code: -1, out: 5, mode: m.mode}))...)
	}
	w.hear(len(modes) * lifeManyWords)
	h.must("stop")
	h.pid = 0
	w.ended()

	all := h.verified()
	lifePairs(t, all)
	ends := lifeEvents(all, "exec_end")
	if len(ends) != len(wants) {
		t.Errorf("%d ends of %d commands", len(ends), len(wants))
	}
	for _, r := range ends {
		w, ok := wants[r.Argv[len(r.Argv)-1]]
		got := want{reason: r.Reason, signal: r.Signal, code: -1, out: *r.StdoutBytes, err: *r.StderrBytes, mode: r.Mode}
		if r.ExitCode != nil {
			got.code = *r.ExitCode
		}
		if w.reason == "client_gone" && got.signal == "SIGKILL" {
			got.signal = "SIGTERM" // on a busy machine the client is gone before the server knows that the command has started
		}
		if got != w || !ok {
			t.Errorf("%q ended as %+v, want %+v", r.Argv, got, w)
		}
	}
}

// lifeOneSlot: when an answer is whole, its slot is free.
func lifeOneSlot(t *testing.T) {
	h := newLifeHome(t, map[string]any{"maxConcurrentExec": 1, "maxOutputBytes": 4000, "maxStreamBytes": 4000})
	h.serve("start")
	queries := []string{"", "?mode=stream", "?format=text", "?mode=stream&format=text"}
	kinds := [][]string{{"echo", "x"}, {"sh", "-c", "setsid sleep 1000 & exit 1"}, {"seq", "100000"}, {"no-such-command"}, {"seq", "700"}}
	rounds := 12
	if testing.Short() {
		rounds = 2
	}
	c := h.dial()
	for i := range rounds * len(queries) * len(kinds) {
		query, args := queries[i%len(queries)], kinds[i/len(queries)%len(kinds)]
		a, err := c.exec(query, args...)
		if err != nil || a.code != 200 && a.code != 413 {
			t.Fatalf("request %d, %s %q: %v, %d %.200s", i, query, args, err, a.code, a.body)
		}
		if a.last || i%7 == 0 {
			c.Close()
			c = h.dial()
		}
	}
	w := newLifeWitness(t)
	first := h.begin("", lifeHolds(w, "exec sleep 1000")...)
	w.hear(1)
	if a := h.exec("", "echo", "x"); a.code != 429 || a.object().Error != "too_many_concurrent_exec" || a.header.Get("Retry-After") == "" {
		t.Errorf("beside a running command: %d %s", a.code, a.body)
	}
	first.CloseWrite()
	if _, err := first.answer(); err != nil {
		t.Error(err)
	}
	// a client that does not read its answer holds no slot, once the command has ended
	h.settings(map[string]any{"maxConcurrentExec": 1, "maxOutputBytes": 64 << 20})
	w = newLifeWitness(t)
	stalled := h.dial()
	if err := stalled.send("/api/exec", lifeKey, lifeBody(lifeHolds(w, "seq 4000000; :")...)); err != nil {
		t.Fatal(err)
	}
	w.hear(1)
	w.ended()
	lifeUntil(t, "a slot beside a client that does not read", func() bool { return h.exec("", "echo", "x").code == 200 })
}

// ---- what it costs

type lifeCost struct{ rss, peak, threads, files, table, zombies int } // rss, peak: KiB

// cost is what /proc says of the server. A server that hides shows its descriptors to root only (files 0), the size of their
// table to all.
func (h *lifeHome) cost() (c lifeCost) {
	h.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.pid))
	if err != nil {
		h.t.Fatal(err)
	}
	for name, at := range map[string]*int{"VmRSS": &c.rss, "VmHWM": &c.peak, "Threads": &c.threads, "FDSize": &c.table} {
		m := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+)`).FindSubmatch(status)
		if m == nil {
			h.t.Fatalf("no %s in %s", name, status)
		}
		*at, _ = strconv.Atoi(string(m[1]))
	}
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.pid))
	c.files = len(files)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		stat, _ := os.ReadFile(file)
		if f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); len(f) > 2 && f[0] == "Z" && f[1] == strconv.Itoa(h.pid) {
			c.zombies++
		}
	}
	return c
}

// levels waits until the server costs no more than before: what a closed connection holds goes a moment later.
func (h *lifeHome) levels(before lifeCost, slackKiB int) {
	h.t.Helper()
	var now lifeCost
	defer func() { h.t.Logf("before %+v, now %+v", before, now) }()
	lifeUntil(h.t, "memory, threads, descriptors and zombies are back where they were", func() bool {
		now = h.cost()
		return now.rss <= before.rss+slackKiB && now.threads <= before.threads+8 && now.files <= before.files+4 && now.table <= max(256, before.table) && now.zombies == 0
	})
}

// lifeFloods: eight floods of a MiB at once, that many bytes six times as long in JSON, and endless ones.
func lifeFloods(t *testing.T) {
	h := newLifeHome(t, map[string]any{"maxOutputBytes": 1 << 20})
	h.serve("start")
	for range 20 {
		h.exec("", "echo", "warm")
	}
	before := h.cost()
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			script, code, size := []string{"head -c 1048576 /dev/zero", "yes"}[i%2], []int{200, 413}[i%2], 1<<20
			a := h.exec("", "sh", "-c", script)
			if o := a.object(); a.code != code || len(o.Output) != size || o.Length != size {
				t.Errorf("%s: %d, %d bytes of output, length %d", script, a.code, len(o.Output), o.Length)
			}
		})
	}
	all.Wait()
	after := h.cost()
	t.Logf("before %+v, after %+v", before, after)
	if grown := after.peak - before.peak; grown >= 24<<10 {
		t.Errorf("memory grew by %d KiB", grown)
	}
}

// lifeRuns: a thousand commands leave the server as a hundred do.
func lifeRuns(t *testing.T) {
	h := newLifeHome(t, map[string]any{"maxStreamBytes": 100 << 10})
	h.serve("start")
	runs := func(n int) {
		for i := range n {
			if query := []string{"", "?mode=stream", "?format=text", "?mode=stream&format=text"}[i%4]; i%10 == 9 {
				h.exec(query, "sh", "-c", "setsid sleep 1000 & setsid sleep 1000 & exit 0")
			} else if i%10 == 8 {
				h.exec(query, "no-such-command")
			} else if i%10 == 7 {
				h.exec(query, "not allowed")
			} else if a := h.exec(query, "echo", "hello"); a.code != 200 || !strings.Contains(a.body, "hello") {
				t.Fatalf("%d %s", a.code, a.body)
			}
		}
	}
	runs(100)
	before, more := h.cost(), 1000
	if testing.Short() {
		more = 100
	}
	runs(more)
	h.levels(before, 8<<10)
	h.must("stop")
	h.pid = 0
	lifePairs(t, h.verified())
}

// ---- streams

func lifeStreams(t *testing.T) {
	for name, test := range map[string]func(*testing.T, *lifeHome){
		"at once": lifeAtOnce, "characters": lifeCharacters, "pressure": lifePressure, "late": lifeLate, "stalled": lifeStalled,
	} {
		t.Run(name, func(t *testing.T) {
			if name == "stalled" && testing.Short() {
				t.Skip("the server waits half a minute for a client that reads nothing")
			}
			t.Parallel()
			h := newLifeHome(t, map[string]any{"maxStreamBytes": 1 << 30})
			h.serve("start")
			test(t, h)
			h.must("stop")
			h.pid = 0
			lifePairs(t, h.verified())
		})
	}
}

// lifeAtOnce: the command goes on only when the client has read its last line.
func lifeAtOnce(t *testing.T, h *lifeHome) {
	for _, query := range []string{"?mode=stream", "?mode=stream&format=text"} {
		fifo := filepath.Join(t.TempDir(), "go-on")
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(fifo, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		answer, err := h.begin(query, "sh", "-c", `exec <"$0"; echo line-0; for i in 1 2 3; do read x; echo "line-$x"; done; read x; echo "line-$x" >&2`, fifo).head()
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(answer.Body)
		for i := range 5 {
			line, err := lines.ReadString('\n')
			if err != nil || !strings.Contains(line, fmt.Sprint("line-", i)) {
				t.Fatalf("%s: line %d is %q, %v", query, i, line, err)
			}
			fmt.Fprintln(f, i+1)
		}
		rest, err := io.ReadAll(lines)
		if err != nil || answer.Trailer.Get("X-Exit-Code") != "0" && !strings.Contains(string(rest), `"status":"done"`) {
			t.Errorf("%s: at last %q %v, %v", query, rest, answer.Trailer, err)
		}
	}
}

type lifeLine struct {
	Output, Stderr, Error *string
	Status                string
	Length                int
	ExitCode              *int
}

// lifeCharacters: the command writes byte by byte, each only when the server has taken the one before.
func lifeCharacters(t *testing.T, h *lifeHome) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"aé€𝄞\n\"\\é€𝄞": "", "𝄞𝄞": "", "\xff\xc3(\xf0\x9d\x84": "\uFFFD\uFFFD(\uFFFD\uFFFD\uFFFD", "é\x80€": "é\uFFFD€",
	} {
		for stream := 1; stream <= 2; stream++ {
			a := h.exec("?mode=stream", self, "bytes", strconv.Itoa(stream), strconv.QuoteToASCII(text))
			got, last, length := "", lifeLine{}, 0
			for line := range strings.Lines(a.body) {
				last = lifeLine{}
				if err := json.Unmarshal([]byte(line), &last); err != nil || !utf8.ValidString(line) {
					t.Errorf("the line %q: %v", line, err)
				}
				for _, piece := range []*string{last.Output, last.Stderr} {
					if piece != nil {
						got += *piece
					}
				}
				length += last.Length
			}
			if want == "" {
				want = text
			}
			if got != want || last.ExitCode == nil || *last.ExitCode != 0 || stream == 1 && length != len(text) {
				t.Errorf("of %q came %q, length %d: %s", text, got, length, a.body)
			}
		}
	}
}

// lifePressure: while its reader reads nothing a command cannot write on, and nothing piles up; then all of it arrives.
func lifePressure(t *testing.T, h *lifeHome) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	h.exec("?mode=stream", "echo", "warm")
	for _, query := range []string{"?mode=stream", "?mode=stream&format=text"} {
		before, w := h.cost(), newLifeWitness(t)
		c := h.dial()
		if err := c.send("/api/exec"+query, lifeKey, lifeBody(self, "press", w.path)); err != nil {
			t.Fatal(err)
		}
		said := w.line()
		after := h.cost()
		if !strings.HasPrefix(said, "blocked ") {
			t.Errorf("%s: the command says %q", query, said)
		}
		if grown := after.peak - before.peak; grown >= 16<<10 {
			t.Errorf("%s: memory grew by %d KiB for a reader that does not read", query, grown)
		}
		a, err := c.answer()
		got := len(a.body)
		if query == "?mode=stream" {
			got = 0
			for line := range strings.Lines(a.body) {
				var l lifeLine
				if json.Unmarshal([]byte(line), &l); l.Output != nil {
					got += len(*l.Output)
				}
			}
		}
		if wrote := w.line(); err != nil || fmt.Sprint("wrote ", got) != wrote || a.trailer.Get("X-Exit-Code") != "0" && !strings.Contains(a.body, `"exitCode":0`) {
			t.Errorf("%s: read %d, the command %q, %v, %v", query, got, wrote, a.trailer, err)
		}
	}
}

// lifeLate: a command whose reader does not read ends at its timeout, and the reader can still learn that.
func lifeLate(t *testing.T, h *lifeHome) {
	h.settings(map[string]any{"maxStreamBytes": 1 << 30, "timeoutMs": 2000, "maxConcurrentExec": 1})
	w := newLifeWitness(t)
	c := h.dial()
	if err := c.send("/api/exec?mode=stream", lifeKey, lifeBody(lifeHolds(w, "yes")...)); err != nil {
		t.Fatal(err)
	}
	w.hear(1)
	w.ended()
	if a, err := c.answer(); err != nil || !strings.Contains(a.body[max(0, len(a.body)-300):], `"error":"timeout"`) {
		t.Errorf("%v: …%s", err, a.body[max(0, len(a.body)-300):])
	}
	if a := h.exec("", "echo", "next"); a.code != 200 {
		t.Errorf("the next command: %d %s", a.code, a.body)
	}
}

// lifeStalled: without a timeout it ends when the server has lost its patience.
func lifeStalled(t *testing.T, h *lifeHome) {
	w := newLifeWitness(t)
	for _, query := range []string{"?mode=stream", "?mode=stream&format=text"} {
		c := h.dial()
		if err := c.send("/api/exec"+query, lifeKey, lifeBody(lifeHolds(w, "yes")...)); err != nil {
			t.Fatal(err)
		}
	}
	w.hear(2)
	w.ended()
	lifeUntil(t, "both ends are recorded", func() bool { return len(lifeEvents(h.records(), "exec_end")) == 2 })
	for _, r := range lifeEvents(h.records(), "exec_end") {
		if r.Reason != "client_gone" {
			t.Errorf("it ended as %+v", r)
		}
	}
}

// ---- the key

var lifeKeyLine = regexp.MustCompile(`(?m)^API_KEY=(\S{16,})$`)

// envKey checks that .env is whole, and gives its key.
func (h *lifeHome) envKey() string {
	h.t.Helper()
	text := h.read(".env")
	m := lifeKeyLine.FindAllStringSubmatch(text, -1)
	if len(m) != 1 || text != "# of a test\nAPI_KEY="+m[0][1]+"\nHOST="+h.host+"\nPORT=0\nAGENT_EXEC_ENABLED=true\n" {
		h.t.Fatalf(".env is %q", text)
	}
	if info, err := os.Stat(filepath.Join(h.dir, ".env")); err != nil || info.Mode() != 0o600 {
		h.t.Errorf(".env: %v, %v", info.Mode(), err)
	}
	return m[0][1]
}

// answers says with which status the server meets a key.
func (h *lifeHome) answers(key string) int {
	h.t.Helper()
	c := h.dial()
	defer c.Close()
	err := c.send("/api/acl/check", key, lifeBody("aexec", "--version"))
	a, bad := c.answer()
	if err := errors.Join(err, bad); err != nil {
		h.t.Error(err)
	}
	return a.code
}

// lifeKeyRotation kills rotations at any moment: .env has the old key or a new one, and the server goes on with its own.
func lifeKeyRotation(t *testing.T) {
	h := newLifeHome(t, nil)
	h.serve("start")
	begun := time.Now()
	h.must("key", "rotate")
	took := time.Since(begun)
	old := []string{lifeKey}
	now, killed, changed := h.envKey(), 0, 0
	tries := 40
	if testing.Short() {
		tries = 10
	}
	var reader sync.WaitGroup
	var enough atomic.Bool
	defer reader.Wait()
	defer enough.Store(true)
	reader.Go(func() { // whoever reads in between finds it whole
		for !enough.Load() {
			if text := h.read(".env"); len(lifeKeyLine.FindAllString(text, -1)) != 1 || !strings.HasSuffix(text, "=true\n") {
				t.Errorf("in between .env is %q", text)
				return
			}
		}
	})
	// a full disk is a certain interruption: no file may grow
	if code, _, _ := lifeStart(t, h.env, "sh", "-c", `ulimit -f 0; exec "$0" key rotate`, buildBinary(t)).wait(); code == 0 || h.envKey() != now {
		t.Errorf("a rotation that can write nothing: exit %d, the key has changed: %v", code, h.envKey() != now)
	}
	for range tries {
		p := lifeStart(t, h.env, buildBinary(t), "key", "rotate")
		time.Sleep(rand.N(took))
		syscall.Kill(p.pid, syscall.SIGKILL) // or it has ended by itself
		code, stdout, stderr := p.wait()
		h.said = append(h.said, stdout, stderr)
		if code != 0 && code != 128+int(syscall.SIGKILL) {
			t.Errorf("exit %d, %s", code, stderr)
		}
		key := h.envKey()
		if code == 0 && key == now {
			t.Error("it said that it was done, and the key is the old one")
		}
		if code != 0 {
			killed++
		}
		if key != now {
			changed++
			if slices.Contains(old, key) {
				t.Error("an old key is back")
			}
			old, now = append(old, now), key
		}
	}
	t.Logf("of %d rotations %d were killed, and %d changed the key", tries, killed, changed)
	if killed == 0 {
		t.Error("none was killed, so this test proves nothing")
	}
	h.must("key", "rotate")
	old, now = append(old, now), h.envKey()
	if h.answers(lifeKey) != 200 || h.answers(now) != 401 {
		t.Errorf("before the restart the old key gets %d, the new one %d", h.answers(lifeKey), h.answers(now))
	}
	h.serve("restart")
	for _, key := range old {
		if code := h.answers(key); code != 401 {
			t.Errorf("an old key gets %d", code)
		}
	}
	if code := h.answers(now); code != 200 {
		t.Errorf("the new key gets %d", code)
	}
	h.serve("key", "rotate", "--restart")
	old, now = append(old, now), h.envKey()
	if h.answers(old[len(old)-1]) != 401 || h.answers(now) != 200 {
		t.Errorf("after a rotation with restart the old key gets %d, the new one %d", h.answers(old[len(old)-1]), h.answers(now))
	}
	for _, key := range append(old, now) {
		h.keyless(key)
	}
}

// keyless checks that a key is in no file but .env, and in nothing that the command line said.
func (h *lifeHome) keyless(key string) {
	h.t.Helper()
	for _, said := range h.said {
		if strings.Contains(said, key) {
			h.t.Errorf("the command line said the key: %s", said)
		}
	}
	files := 0
	err := filepath.WalkDir(filepath.Dir(h.dir), func(file string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || file == filepath.Join(h.dir, ".env") {
			return err
		}
		files++
		text, err := os.ReadFile(file)
		if bytes.Contains(text, []byte(key)) {
			h.t.Errorf("the key is in %s", file)
		}
		return err
	})
	if err != nil || files < 3 {
		h.t.Errorf("%d files were looked through: %v", files, err)
	}
}

// lifeKeyNowhere sends the key to wherever it does not belong, and looks for it wherever it must not be.
func lifeKeyNowhere(t *testing.T) {
	for _, from := range []string{".env", "environment"} {
		t.Run(from, func(t *testing.T) {
			h := newLifeHome(t, nil)
			key := lifeKey
			if from == "environment" {
				key = "another-key-of-these-tests-9876543210"
				h.env = append(h.env, "API_KEY="+key)
			}
			h.settings(map[string]any{"exec": map[string]any{"allow": append(lifeRules(), "no-such-*", "/nowhere/*"), "deny": []string{"echo denied *"},
				"limits": map[string]any{"cpuSeconds": 1000}, "env": map[string]any{"set": map[string]string{helperVar: "life"}}}})
			h.serve("start")
			w := newLifeWitness(t)
			running := h.dial()
			if err := running.send("/api/exec", key, lifeBody(lifeHolds(w, `echo $$ >&7; sleep 1000`, key)...)); err != nil {
				t.Fatal(err)
			}
			w.hear(1)
			for _, pid := range []string{strconv.Itoa(h.pid), w.line()} {
				for _, name := range []string{"environ", "cmdline"} {
					text, err := os.ReadFile("/proc/" + pid + "/" + name)
					hidden := pid == strconv.Itoa(h.pid) && name == "environ" && os.Geteuid() != 0
					sent := pid != strconv.Itoa(h.pid) && name == "cmdline" // by the agent, in this test
					if err == nil == hidden || len(text) == 0 != hidden || bytes.Contains(text, []byte(key)) != sent || bytes.Contains(text, []byte("API_KEY")) {
						t.Errorf("/proc/%s/%s is %q, %v", pid, name, text, err)
					}
				}
			}
			running.CloseWrite()
			if a, err := running.answer(); err != nil || strings.Contains(a.body, key) {
				t.Errorf("the answer: %+v, %v", a, err)
			}
			h.askForKey(key)
			if a := h.envOfCommand(key); !strings.Contains(a.body, "PATH=") || strings.Contains(a.body, key) || strings.Contains(a.body, "API_KEY") || strings.Contains(a.body, "AGENT_EXEC") {
				t.Errorf("a command finds %d %s", a.code, a.body)
			}
			h.write("settings.json", "{")
			h.askForKey(key)
			h.settings(nil)
			for _, line := range []string{"status", "status --json", "config", "config --json", "acl list", "acl doctor", "acl check -- echo " + key[:8], "audit", "audit --json", "audit verify", "plugin list", "plugin doctor", "setup --yes"} {
				if code, _, stderr := h.run(strings.Fields(line)...); code > 1 {
					t.Errorf("aexec %s: exit %d, %s", line, code, stderr)
				}
			}
			h.serve("restart")
			h.must("stop")
			h.pid = 0
			h.keyless(key)
			if all := h.verified(); !strings.Contains(h.read("audit.jsonl"), "[API_KEY]") || len(lifeEvents(all, "exec_denied")) == 0 {
				t.Error("the log has nothing of what was sent")
			}
		})
	}
}

// askForKey sends requests with the key where it does not belong. No answer may have it.
func (h *lifeHome) askForKey(key string) {
	h.t.Helper()
	body := func(body string) string {
		return fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	right := "X-API-Key: " + key + "\r\n"
	for _, request := range []string{
		"GET /" + key + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: " + key + "\r\n\r\n",
		"GET /skills/" + key + "/SKILL.md HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /api/acl?apiKey=" + key + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /api/acl?apiKey=" + key + " HTTP/1.1\r\nHost: x\r\n" + right + "\r\n",
		"GET /api/acl?" + key + "=1 HTTP/1.1\r\nHost: x\r\n" + right + "\r\n",
		"GET /api/acl HTTP/1.1\r\nHost: x\r\nX-API-Key: " + key + "x\r\n\r\n",
		"GET /api/acl HTTP/1.1\r\nHost: x\r\n" + right + right + "\r\n",
		"GET /api/acl HTTP/1.1\r\nHost: x\r\n" + right + "Authorization: Bearer wrong-" + key + "\r\n\r\n",
		"GET /api/acl HTTP/1.1\r\nHost: x\r\nAuthorization: Basic " + key + "\r\n\r\n",
		"GET /private/skills/" + key + "/SKILL.md HTTP/1.1\r\nHost: x\r\n" + right + "\r\n",
		key + " / HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /api/acl HTTP/1.1\r\nHost: x\r\n" + right + key + "\r\n\r\n",
		"POST /api/exec?mode=" + key + " HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("echo", "x")),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(key),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(`{"`+key+`":1}`),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(`{"args":["`+key+`"],"args":1}`),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody(key)),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("echo", "denied", key)),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("no-such-"+key)),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("/nowhere/"+key)),
		"POST /api/exec?mode=stream HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("/nowhere/"+key)),
		"POST /api/exec?mode=stream&format=text HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("no-such-"+key)),
		"POST /api/exec?format=text HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("no-such-"+key)),
		"POST /api/exec HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("sh", "-c", ":", key)),
		"POST /api/acl/check HTTP/1.1\r\nHost: x\r\n" + right + body(lifeBody("echo", "denied", key)),
		"GET /api/acl HTTP/1.1\r\nHost: x\r\n" + right + "\r\n",
		"GET /api/plugins HTTP/1.1\r\nHost: x\r\n" + right + "\r\n",
	} {
		c := h.dial()
		fmt.Fprint(c, request)
		c.CloseWrite()
		c.SetReadDeadline(time.Now().Add(lifePatience))
		said, err := io.ReadAll(c.r)
		if !bytes.HasPrefix(said, []byte("HTTP/1.1 ")) || bytes.Contains(said, []byte(key)) {
			h.t.Errorf("to %.80q it says %q, %v", request, said, err)
		}
		c.Close()
	}
}

// envOfCommand is what a command can see of its own environment, and of its parent's.
func (h *lifeHome) envOfCommand(key string) lifeAnswer {
	h.t.Helper()
	c := h.dial()
	defer c.Close()
	script := `env; tr '\0' '\n' </proc/self/environ; tr '\0' '\n' </proc/$PPID/environ; tr '\0' '\n' </proc/$PPID/cmdline`
	if os.Geteuid() == 0 { // root reads every environment; the key must not be there, but what names the directory may
		script += `| grep -v AGENT_EXEC; tr '\0' '\n' </proc/$PPID/environ | grep -c API_KEY`
		script = strings.Replace(script, `; tr '\0' '\n' </proc/$PPID/environ;`, ";", 1)
	}
	err := c.send("/api/exec", key, lifeBody("sh", "-c", script))
	a, bad := c.answer()
	if err := errors.Join(err, bad); err != nil {
		h.t.Error(err)
	}
	if os.Geteuid() == 0 && !strings.HasSuffix(a.object().Output, "\n0\n") {
		h.t.Errorf("the server's environment names the key: %s", a.body)
	}
	return lifeAnswer{code: a.code, body: a.object().Output}
}

// ---- the command's part

func init() {
	// the first argument says what to play
	helpers["life"] = func() {
		switch os.Args[1] {
		case "bytes":
			lifeWriteBytes(os.Args[2], os.Args[3])
		case "press":
			lifePress(os.Args[2])
		default:
			os.Exit(97)
		}
	}
}

// lifeWriteBytes writes a quoted text to a stream, byte by byte, each when the one before was read.
func lifeWriteBytes(stream, quoted string) {
	fd, err := strconv.Atoi(stream)
	text, bad := strconv.Unquote(quoted)
	if err := errors.Join(err, bad); err != nil {
		panic(err)
	}
	for i := range len(text) {
		syscall.Write(fd, []byte{text[i]})
		for {
			if n, err := unix.IoctlGetInt(fd, unix.TIOCINQ); n == 0 || err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// lifePress writes until its output is full and stays so, says how much that took, writes more, and says how much it was in all.
func lifePress(fifo string) {
	const (
		pieceBytes = 64 << 10
		tooMuch    = 256 << 20 // that much went where nobody reads
		moreBytes  = 8 << 20
		fullMs     = 1000
	)
	f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err == nil {
		err = syscall.SetNonblock(1, true)
	}
	if err != nil {
		panic(err)
	}
	wrote, end := 0, tooMuch
	for wrote < end {
		n, err := syscall.Write(1, bytes.Repeat([]byte("x"), min(pieceBytes, end-wrote)))
		wrote += max(n, 0)
		if err == nil {
			continue
		}
		if err != syscall.EAGAIN {
			fmt.Fprintln(f, "failed", err)
			os.Exit(1)
		}
		wait := -1
		if end == tooMuch {
			wait = fullMs
		}
		if ready, _ := unix.Poll([]unix.PollFd{{Fd: 1, Events: unix.POLLOUT}}, wait); ready == 0 {
			end = wrote + moreBytes
			fmt.Fprintln(f, "blocked", wrote)
		}
	}
	if end == tooMuch {
		fmt.Fprintln(f, "never")
	}
	fmt.Fprintln(f, "wrote", wrote)
}
