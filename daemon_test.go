package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	daemonTestKey  = "0123456789abcdef-in-the-env-file"
	daemonOtherKey = "fedcba9876543210-in-the-environment"
	daemonPatience = 30 * time.Second // for a process to end; only a failing test waits that long
)

// ---- a throw-away configuration, and the real program in it

type daemonHome struct {
	paths
	t    *testing.T
	env  []string
	held *os.File // the reading end of a pipe that every process started here has open
	hold *os.File
}

// newDaemonHome makes a configuration whose server listens on any free port.
func newDaemonHome(t *testing.T) *daemonHome {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "agent-exec")
	t.Setenv("AGENT_EXEC_CONFIG_DIR", dir)
	p, err := configPaths()
	if err != nil {
		t.Fatal(err)
	}
	h := &daemonHome{paths: p, t: t, env: os.Environ()}
	if h.held, h.hold, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, h.plugins} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	h.write(h.paths.env, "API_KEY="+daemonTestKey+"\nPORT=0\nAGENT_EXEC_ENABLED=true\n")
	h.write(h.settings, `{"exec":{"allow":["aexec --version"]}}`)
	t.Cleanup(func() {
		if _, running, _ := findServer(p); running {
			stopServer(p, syscall.SIGTERM, daemonPatience)
		}
		h.held.Close()
		h.hold.Close()
	})
	return h
}

func (h *daemonHome) write(path, text string) {
	h.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// command is the real program. Its descriptors from 3 on are the pipe's writing end: one of them survives in everything that it starts.
func (h *daemonHome) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), daemonPatience) // what should have ended fails its test, and holds up nothing
	h.t.Cleanup(cancel)
	c := exec.CommandContext(ctx, buildBinary(h.t), args...)
	c.Env = h.env
	c.ExtraFiles = []*os.File{h.hold, h.hold, h.hold, h.hold, h.hold, h.hold}
	return c
}

// run gives the exit code, standard output and standard error of one command line.
func (h *daemonHome) run(args ...string) (code int, stdout, stderr string) {
	h.t.Helper()
	var out, err bytes.Buffer
	c := h.command(args...)
	c.Stdout, c.Stderr = &out, &err
	var exit *exec.ExitError
	if e := c.Run(); e != nil && !errors.As(e, &exit) {
		h.t.Fatal(e)
	}
	return c.ProcessState.ExitCode(), out.String(), err.String()
}

// must runs a command that has to succeed.
func (h *daemonHome) must(args ...string) string {
	h.t.Helper()
	code, stdout, stderr := h.run(args...)
	if code != 0 {
		h.t.Fatalf("aexec %q: exit %d\n%s%s\nlog:\n%s", args, code, stdout, stderr, h.logText())
	}
	return stdout
}

func (h *daemonHome) logText() string {
	text, _ := os.ReadFile(h.log)
	return string(text)
}

func (h *daemonHome) server() serverInfo {
	h.t.Helper()
	info, running, err := findServer(h.paths)
	if err != nil || !running {
		h.t.Fatalf("no server: %v\nlog:\n%s", err, h.logText())
	}
	return info
}

// nothingRuns returns when no process that was started here is alive.
func (h *daemonHome) nothingRuns() {
	h.t.Helper()
	h.hold.Close()
	h.held.SetReadDeadline(time.Now().Add(daemonPatience))
	if _, err := h.held.Read(make([]byte, 1)); err != io.EOF {
		h.t.Errorf("something still runs: %v", err)
	}
}

// foreground starts `start -f` and returns when it serves.
func (h *daemonHome) foreground(env ...string) *exec.Cmd {
	h.t.Helper()
	c := h.command("start", "-f")
	c.Env = append(c.Env, env...)
	output, err := c.StderrPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Process.Kill() })
	lines := bufio.NewReader(output)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			h.t.Fatalf("the server ended: %q, %v", line, err)
		}
		if strings.Contains(line, "listens on") {
			break
		}
	}
	go io.Copy(io.Discard, lines)
	return c
}

func daemonGet(t *testing.T, address, path, key string) int {
	t.Helper()
	r, err := http.NewRequest("GET", "http://"+address+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	r.Header.Set("X-API-Key", key)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	return answer.StatusCode
}

// daemonExec gives the whole answer to one command.
func daemonExec(t *testing.T, address, key, body string) string {
	t.Helper()
	r, err := http.NewRequest("POST", "http://"+address+"/api/exec", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	r.Header.Set("X-API-Key", key)
	r.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func daemonTerminal(p paths) *terminal {
	return &terminal{out: io.Discard, err: io.Discard, loaded: loaded{paths: p}}
}

// stopServer signals the server of a directory and waits until it is gone; false if there was none.
func stopServer(p paths, s syscall.Signal, wait time.Duration) (info serverInfo, was bool, err error) {
	info, was, err = findServer(p)
	if err == nil && was {
		err = daemonTerminal(p).end("", s, wait)
	}
	return info, was, err
}

// ---- helper programs

func init() {
	// holds the pid file of its directory until SIGTERM, or for good if its second argument is "deaf"
	helpers["hold-pid-file"] = func() {
		terminated := make(chan os.Signal, 1)
		signal.Notify(terminated, syscall.SIGTERM)
		p, err := configPaths()
		if err == nil {
			var lock *os.File
			if lock, err = holdPidFile(p); err == nil {
				err = json.NewEncoder(lock).Encode(serverInfo{Pid: os.Getpid(), Address: os.Args[1]})
			}
		}
		fmt.Println("ready", err)
		if err == nil && len(os.Args) > 2 {
			select {}
		} else if err == nil {
			<-terminated
		}
	}
	// listens on a TCP port until it is killed
	helpers["listen"] = func() {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(l.Addr().(*net.TCPAddr).Port)
		l.Accept()
	}
	// lives until its standard input ends, and repeats that
	helpers["echo"] = func() { io.Copy(os.Stdout, os.Stdin) }
}

// startHelper starts a helper and returns with the first line that it says.
func startHelper(t *testing.T, name string, args ...string) (*exec.Cmd, string) {
	t.Helper()
	c := helperCommand(t, name, args...)
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("helper %s said nothing: %v", name, err)
	}
	return c, strings.TrimSpace(line)
}

// startBystander starts a process that nobody may harm, and checks that at the test's end.
func startBystander(t *testing.T) (pid int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self) // helperCommand's would end with the test's context, before the clean-up
	c.Env = append(os.Environ(), helperEnv("echo"))
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fmt.Fprintln(in, "unharmed")
		in.Close()
		said, _ := io.ReadAll(out)
		if err := c.Wait(); err != nil || string(said) != "unharmed\n" {
			t.Errorf("process %d, which has nothing to do with all this, was harmed: %q, %v", c.Process.Pid, said, err)
		}
	})
	return c.Process.Pid
}

// ---- the lock

func TestPidFileNamesTheHolder(t *testing.T) {
	h := newDaemonHome(t)
	if _, running, err := findServer(h.paths); running || err != nil {
		t.Errorf("without a pid file: %v, %v", running, err)
	}
	holder, said := startHelper(t, "hold-pid-file", "127.0.0.1:7")
	if said != "ready <nil>" {
		t.Fatal(said)
	}
	info := h.server()
	if info.Pid != holder.Process.Pid || info.Address != "127.0.0.1:7" {
		t.Errorf("found %+v", info)
	}
	_, said = startHelper(t, "hold-pid-file", "127.0.0.1:8")
	if want := "ready already running"; said != want {
		t.Errorf("the second holder said %q, not %q", said, want)
	}
	other := startBystander(t)
	for _, text := range []string{"", "{", `{"pid":1}`, fmt.Sprintf(`{"pid":%d,"address":"127.0.0.1:9"}`, other)} {
		f, err := os.OpenFile(h.pid, os.O_WRONLY|os.O_TRUNC, 0)
		if err == nil {
			_, err = f.WriteString(text)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		if info := h.server(); info.Pid != holder.Process.Pid || info.Address != "" {
			t.Errorf("with %q in the file: found %+v", text, info)
		}
	}
	if _, was, err := stopServer(h.paths, syscall.SIGTERM, daemonPatience); !was || err != nil {
		t.Errorf("stop: %v, %v", was, err)
	}
}

// The helper is this test's unreaped child: a zombie must count as gone.
func TestStopTakesAZombieForGone(t *testing.T) {
	h := newDaemonHome(t)
	holder, _ := startHelper(t, "hold-pid-file", "")
	info, was, err := stopServer(h.paths, syscall.SIGTERM, daemonPatience)
	if err != nil || !was || info.Pid != holder.Process.Pid {
		t.Errorf("stop: %+v, %v, %v", info, was, err)
	}
	if _, running, err := findServer(h.paths); running || err != nil {
		t.Errorf("afterwards: %v, %v", running, err)
	}
	if _, was, err := stopServer(h.paths, syscall.SIGTERM, daemonPatience); was || err != nil {
		t.Errorf("stopped again: %v, %v", was, err)
	}
}

func TestStopSaysWhoDoesNotEnd(t *testing.T) {
	h := newDaemonHome(t)
	holder, _ := startHelper(t, "hold-pid-file", "", "deaf")
	info, was, err := stopServer(h.paths, syscall.SIGTERM, 10*time.Millisecond)
	if want := fmt.Sprintf("process %d has not ended within 10ms", holder.Process.Pid); err == nil || err.Error() != want || !was {
		t.Errorf("stop: %v, %v", was, err)
	}
	if again, was, err := stopServer(h.paths, syscall.SIGKILL, daemonPatience); again.Pid != info.Pid || !was || err != nil {
		t.Errorf("kill: %+v, %v, %v", again, was, err)
	}
	if _, running, _ := findServer(h.paths); running {
		t.Error("it was killed, and still holds the file")
	}
}

func TestPidFileThatIsNoneOfOurs(t *testing.T) {
	for name, make := range map[string]func(h *daemonHome) error{
		"symbolic link": func(h *daemonHome) error { return os.Symlink(h.settings, h.pid) },
		"dangling link": func(h *daemonHome) error { return os.Symlink("nowhere", h.pid) },
		"directory":     func(h *daemonHome) error { return os.Mkdir(h.pid, 0o700) },
		"fifo":          func(h *daemonHome) error { return syscall.Mkfifo(h.pid, 0o600) },
		"open to all":   func(h *daemonHome) error { return errors.Join(os.WriteFile(h.pid, nil, 0), os.Chmod(h.pid, 0o666)) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newDaemonHome(t)
			if err := make(h); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(h.settings)
			if lock, err := holdPidFile(h.paths); lock != nil || err == nil || !strings.Contains(err.Error(), h.pid) {
				t.Errorf("held: %v, %v", lock, err)
			}
			if _, running, err := findServer(h.paths); running || err == nil || !strings.Contains(err.Error(), h.pid) {
				t.Errorf("found: %v, %v", running, err)
			}
			if after, _ := os.ReadFile(h.settings); !bytes.Equal(before, after) {
				t.Error("the link's target was changed")
			}
		})
	}
}

// ---- ports

func TestPortHolders(t *testing.T) {
	h := newDaemonHome(t)
	c, port := startHelper(t, "listen")
	found, err := holders(h.paths, port)
	if name := found[c.Process.Pid]; err != nil || len(found) != 1 || name == "" || !strings.HasPrefix(filepath.Base(c.Path), name) {
		t.Fatalf("holders: %+v, %v", found, err)
	}
	startBystander(t)
	if err := daemonTerminal(h.paths).end(port, syscall.SIGKILL, daemonPatience); err != nil {
		t.Error(err)
	}
	if found, err := holders(h.paths, port); len(found) != 0 || err != nil {
		t.Errorf("afterwards: %+v, %v", found, err)
	}
}

// TestNoPortIsTakenForAnother: 99999 is no port, and above all not 65535, the largest there is.
func TestNoPortIsTakenForAnother(t *testing.T) {
	h := newDaemonHome(t)
	l, err := net.Listen("tcp", "127.0.0.1:65535")
	if err != nil {
		t.Skip("another process has the port: ", err)
	}
	defer l.Close()
	if found, err := holders(h.paths, "65535"); found[os.Getpid()] == "" || err != nil {
		t.Fatalf("the listener is not found: %v, %v", found, err)
	}
	if found, err := holders(h.paths, "99999"); len(found) > 0 || err != nil {
		t.Errorf("who listens on 65535 is named for 99999: %v, %v", found, err)
	}
}

// ---- the wiring

// A server that dies without a word, by a panic for example, has not started: this test binary refuses to be one.
func TestSilentDeathIsNoStart(t *testing.T) {
	h := newDaemonHome(t)
	err := (&terminal{loaded: loaded{paths: h.paths}}).startBackground()
	if want := "the server ended before it answered: see " + h.log; err == nil || err.Error() != want {
		t.Errorf("%v", err)
	}
}

func TestChangesThatNeedARestartAreLoggedOnce(t *testing.T) {
	h := newDaemonHome(t)
	inForce, err := restartState(h.paths)
	if err != nil {
		t.Fatal(err)
	}
	tick, said := make(chan time.Time), new(bytes.Buffer)
	ended := make(chan bool)
	go func() {
		watchRestart(tick, h.paths, inForce, log.New(said, "", 0))
		close(ended)
	}()
	// at once, for the second tick of the step before may still be at work
	write := func(path, text string) func() { return func() { rewriteFile(path, []byte(text)) } }
	steps := []func(){
		func() {},
		write(h.paths.env, "API_KEY="+daemonOtherKey+"\nPORT=0\nAGENT_EXEC_ENABLED=true\n"),
		func() {},
		write(h.settings, `{"maxRequestBodyBytes":4096}`),
		write(h.settings, `{`),
		write(h.settings, `{"maxRequestBodyBytes":4096}`),
		write(h.settings, `{}`), // as it was
		write(h.settings, `{"maxRequestBodyBytes":4096}`),
		func() { os.Mkdir(filepath.Join(h.plugins, "new"), 0o700) },
	}
	for _, step := range steps {
		step()
		tick <- time.Time{}
		tick <- time.Time{} // is taken when the first has been dealt with
	}
	close(tick)
	<-ended
	const before = "changed on disk, and in force only after aexec restart: "
	if want := before + `["API_KEY"]` + "\n" + before + `["API_KEY" "maxRequestBodyBytes"]` + "\n" + before + `["API_KEY"]` + "\n" +
		before + `["API_KEY" "maxRequestBodyBytes"]` + "\n" + before + `["API_KEY" "maxRequestBodyBytes" "plugin:new"]` + "\n"; said.String() != want {
		t.Errorf("the log says:\n%s", said)
	}
}

func TestChangedOnDisk(t *testing.T) {
	h := newDaemonHome(t)
	onDisk, err := restartState(h.paths)
	if err != nil {
		t.Fatal(err)
	}
	inForce := maps.Clone(onDisk)
	inForce["PORT"], inForce["gone"] = "1", "1"
	delete(inForce, "API_KEY")
	if names := changedOnDisk(h.paths, inForce); fmt.Sprint(names) != "[API_KEY PORT gone]" {
		t.Errorf("%q", names)
	}
	if names := changedOnDisk(h.paths, nil); len(names) != 0 { // the server is just starting, and its pid file still empty
		t.Errorf("%q", names)
	}
}

func TestStartWarnings(t *testing.T) {
	for _, c := range []struct {
		address string
		allow   []ruleSpec
		cred    *credential
		want    []string
	}{
		{"127.0.0.1:3333", []ruleSpec{{Text: "aexec --version"}}, &credential{Uid: 1}, nil},
		{"[::1]:3333", nil, &credential{Uid: 1}, nil},
		{"[::ffff:127.0.0.1]:3333", nil, &credential{Uid: 1}, nil},
		{"0.0.0.0:3333", nil, &credential{Uid: 1}, []string{"plain HTTP"}},
		{"[::]:3333", nil, &credential{Uid: 1}, []string{"plain HTTP"}},
		{"192.0.2.1:3333", []ruleSpec{{Text: "*"}}, &credential{Uid: 1}, []string{"plain HTTP", `"*"`}},
		{"127.0.0.1:3333", nil, nil, []string{"root"}},
	} {
		compiled, err := compilePolicy([]ruleSet{{Source: "settings.json", Allow: c.allow}})
		if err != nil {
			t.Fatal(err)
		}
		if c.cred == nil && os.Geteuid() != 0 {
			c.want = nil
		}
		got := loaded{server: serverInfo{Address: c.address}, snap: &snapshot{policy: compiled, cred: c.cred}}.warnings()
		if len(got) != len(c.want) {
			t.Errorf("%s, %v: %q", c.address, c.allow, got)
			continue
		}
		for i, want := range c.want {
			if !strings.Contains(got[i], want) {
				t.Errorf("%s, %v: %q does not say %q", c.address, c.allow, got[i], want)
			}
		}
	}
	var said bytes.Buffer
	if err := (&terminal{out: &said, err: &said}).started(serverInfo{}); err != nil || !strings.Contains(said.String(), "AGENT_EXEC_ENABLED is not true") {
		t.Errorf("a server that is switched off was started without a word: %v, %s", err, &said)
	}
}

// ---- the real program

func TestTenStartsAtOnce(t *testing.T) {
	h := newDaemonHome(t)
	buildBinary(t)
	type result struct {
		code           int
		stdout, stderr string
	}
	results := make([]result, 10)
	var all sync.WaitGroup
	for i := range results {
		all.Go(func() { results[i].code, results[i].stdout, results[i].stderr = h.run("start") })
	}
	all.Wait()
	info, started := h.server(), 0
	for _, r := range results {
		switch {
		case r.code == 0 && strings.Contains(r.stdout, info.Address) && strings.Contains(r.stdout, strconv.Itoa(info.Pid)):
			started++
		case r.code == 1 && strings.Contains(r.stderr, "already running"):
		default:
			t.Errorf("exit %d, %q, %q", r.code, r.stdout, r.stderr)
		}
	}
	if started != 1 {
		t.Errorf("%d say that they started it", started)
	}
	if code := daemonGet(t, info.Address, "/api/acl", daemonTestKey); code != 200 {
		t.Errorf("the server answers %d", code)
	}
	h.must("stop")
	h.nothingRuns()
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	for _, c := range []struct {
		name  string
		spoil func(h *daemonHome) error
		want  []string // in standard error
		env   string
		args  []string
	}{
		{name: "no setup", spoil: func(h *daemonHome) error { return os.RemoveAll(h.dir) }, want: []string{"aexec setup"}},
		{name: "no key", spoil: func(h *daemonHome) error { return os.Remove(h.paths.env) }, want: []string{"API_KEY", "aexec setup"}},
		{name: "short key", spoil: func(h *daemonHome) error { return os.WriteFile(h.paths.env, []byte("API_KEY=short"), 0) }, want: []string{"API_KEY", "16"}},
		{name: "short key in the environment", env: "API_KEY=short", want: []string{"API_KEY", "16"}},
		{name: "readable .env", spoil: func(h *daemonHome) error { return os.Chmod(h.paths.env, 0o644) }, want: []string{".env", "0644", "chmod"}},
		{name: "open directory", spoil: func(h *daemonHome) error { return os.Chmod(h.dir, 0o777) }, want: []string{"agent-exec", "0777", "chmod"}},
		{name: "bad settings", spoil: func(h *daemonHome) error { return os.WriteFile(h.settings, []byte("{\n \"exce\": {}}"), 0) }, want: []string{"settings.json", "2", "exce"}},
		{name: "no settings", spoil: func(h *daemonHome) error { return os.Remove(h.settings) }, want: []string{"settings.json"}},
		{name: "bad plugin", spoil: func(h *daemonHome) error { return os.Mkdir(filepath.Join(h.plugins, "empty"), 0o700) }, want: []string{"empty"}},
		{name: "port taken", args: []string{"--port", port}, want: []string{port}},
		{name: "linked pid file", spoil: func(h *daemonHome) error { return os.Symlink("elsewhere", h.pid) }, want: []string{"agent-exec.pid"}},
		{name: "audit log is a directory", spoil: func(h *daemonHome) error { return os.Mkdir(h.audit, 0o700) }, want: []string{"audit.jsonl"}},
		{name: "no address of ours", args: []string{"--host", "192.0.2.1"}, want: []string{"192.0.2.1"}},
	} {
		for _, mode := range []string{"background", "foreground"} {
			t.Run(c.name+"/"+mode, func(t *testing.T) {
				h := newDaemonHome(t)
				if c.spoil != nil {
					if err := c.spoil(h); err != nil {
						t.Fatal(err)
					}
				}
				if c.env != "" {
					h.env = append(h.env, c.env)
				}
				args := append([]string{"start"}, c.args...)
				if mode == "foreground" {
					args = append(args, "-f")
				}
				code, stdout, stderr := h.run(args...)
				if code != 1 || stdout != "" {
					t.Errorf("exit %d, standard output %q", code, stdout)
				}
				for _, want := range c.want {
					if !strings.Contains(stderr, want) {
						t.Errorf("standard error does not say %q: %q", want, stderr)
					}
				}
				for _, key := range []string{daemonTestKey, "short\n", "kkkkkkkkkkkkkkkk"} {
					if strings.Contains(stderr+h.logText(), key) {
						t.Errorf("the key is printed: %q", stderr)
					}
				}
				h.nothingRuns()
			})
		}
	}
}

// A directory that the server may not write to stops a server in the background, which has nowhere to log.
func TestUnwritableDirectory(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may write everywhere")
	}
	h := newDaemonHome(t)
	if err := os.Chmod(h.dir, 0o500); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(h.dir, 0o700)
	for _, args := range [][]string{{"start"}, {"start", "-f"}} {
		if code, _, stderr := h.run(args...); code != 1 || !strings.Contains(stderr, h.dir) || !strings.Contains(stderr, "permission denied") {
			t.Errorf("%q: exit %d, %q", args, code, stderr)
		}
	}
	h.write(filepath.Join(h.t.TempDir(), "unused"), "")
	elsewhere := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.Chmod(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	h.write(h.settings, fmt.Sprintf(`{"audit":{"file":%q}}`, elsewhere))
	if err := os.Chmod(h.dir, 0o500); err != nil {
		t.Fatal(err)
	}
	c := h.foreground() // with its audit log elsewhere, a server in the foreground needs to write nothing there
	c.Process.Signal(syscall.SIGTERM)
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	h.nothingRuns()
}

func TestStopWithNothingRunning(t *testing.T) {
	h := newDaemonHome(t)
	other := startBystander(t)
	for _, text := range []string{"", fmt.Sprintf(`{"pid":%d,"address":"127.0.0.1:9"}`, other), strconv.Itoa(other)} {
		if text != "" {
			h.write(h.pid, text)
		}
		for _, args := range [][]string{{"stop"}, {"stop", "--force"}} {
			if code, _, stderr := h.run(args...); code != 1 || !strings.Contains(stderr, "not running") {
				t.Errorf("%q with %q: exit %d, %q", args, text, code, stderr)
			}
		}
	}
	h.must("start") // over the stale file
	if info := h.server(); info.Pid == other {
		t.Errorf("the server is said to be %+v", info)
	}
	h.must("stop")
	h.nothingRuns()
}

func TestKilledServerStartsAgain(t *testing.T) {
	h := newDaemonHome(t)
	h.must("start")
	first := h.server()
	if killed, was, err := stopServer(h.paths, syscall.SIGKILL, daemonPatience); killed.Pid != first.Pid || !was || err != nil {
		t.Fatal(killed, was, err)
	}
	if _, running, err := findServer(h.paths); running || err != nil {
		t.Errorf("after SIGKILL: %v, %v", running, err)
	}
	h.must("start")
	second := h.server()
	if code := daemonGet(t, second.Address, "/api/acl", daemonTestKey); code != 200 {
		t.Errorf("the second server answers %d", code)
	}
	h.must("stop")
	h.nothingRuns()
	if _, err := verifyAudit(h.audit, ""); err != nil {
		t.Error(err)
	}
}

// The key of the environment goes before the one in .env, and is in no serving process's environment.
func TestKeyLeavesTheEnvironment(t *testing.T) {
	for _, mode := range []string{"background", "foreground"} {
		t.Run(mode, func(t *testing.T) {
			h := newDaemonHome(t)
			h.write(h.settings, `{"exec":{"allow":["env"]}}`)
			h.env = append(h.env, "API_KEY="+daemonOtherKey)
			if mode == "background" {
				h.must("start")
			} else {
				h.foreground()
			}
			info := h.server()
			if code := daemonGet(t, info.Address, "/api/acl", daemonOtherKey); code != 200 {
				t.Errorf("the environment's key: %d", code)
			}
			if code := daemonGet(t, info.Address, "/api/acl", daemonTestKey); code != 401 {
				t.Errorf("the key in .env: %d", code)
			}
			environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", info.Pid))
			switch {
			case os.Geteuid() != 0 && !errors.Is(err, fs.ErrPermission):
				t.Errorf("the server's environment can be read by its user: %v", err)
			case os.Geteuid() == 0 && !bytes.Contains(environ, []byte("AGENT_EXEC_CONFIG_DIR=")):
				t.Errorf("the server's environment is not what was looked for: %q, %v", environ, err)
			case bytes.Contains(environ, []byte("API_KEY")) || bytes.Contains(environ, []byte(daemonOtherKey)):
				t.Error("the key is in the server's environment")
			}
			if strings.Contains(h.logText(), daemonOtherKey) {
				t.Error("the key is in the log")
			}
			output := daemonExec(t, info.Address, daemonOtherKey, `{"args":["env"]}`)
			if !strings.Contains(output, "PATH=") || strings.Contains(output, "API_KEY") || strings.Contains(output, "AGENT_EXEC_") {
				t.Errorf("a command's environment: %s", output)
			}
			stopServer(h.paths, syscall.SIGTERM, daemonPatience)
			h.nothingRuns()
		})
	}
}

// The files of a process that cannot be dumped belong to root under /proc (proc_pid(5)).
func TestServerHidesFromItsUser(t *testing.T) {
	const nobody = 65534
	h := newDaemonHome(t)
	if os.Geteuid() == 0 {
		dir, err := os.MkdirTemp("", "aexec-hides-") // nobody can reach no t.TempDir()
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		binary := filepath.Join(dir, "aexec")
		program, err := os.ReadFile(buildBinary(t))
		if err := errors.Join(err, os.Chmod(dir, 0o755), os.WriteFile(binary, program, 0o755), os.Rename(h.dir, filepath.Join(dir, "config"))); err != nil {
			t.Fatal(err)
		}
		t.Setenv("AGENT_EXEC_CONFIG_DIR", filepath.Join(dir, "config"))
		if h.paths, err = configPaths(); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{h.dir, h.paths.env, h.settings, h.plugins} {
			if err := os.Chown(path, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
		c := exec.Command(binary, "start")
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	} else {
		h.must("start")
	}
	// As root, the directory is not one that findServer would trust: ask the lock itself.
	f, err := os.Open(h.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	server, held, err := lockHolder(f)
	if err != nil || !held {
		t.Fatal(held, err)
	}
	defer func() {
		p, _ := os.FindProcess(server)
		p.Kill()
	}()
	for _, name := range []string{"fd", "environ", "mem"} {
		info, err := os.Stat(fmt.Sprintf("/proc/%d/%s", server, name))
		if err != nil {
			t.Fatal(err)
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 {
			t.Errorf("the server's %s belongs to uid %d", name, uid)
		}
	}
}

func TestSignals(t *testing.T) {
	h := newDaemonHome(t)
	h.must("start")
	info := h.server()
	server, err := os.FindProcess(info.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGPIPE} {
		server.Signal(s)
		if code := daemonGet(t, info.Address, "/ping", ""); code != 200 {
			t.Errorf("after %v it answers %d", s, code)
		}
	}
	if out := h.must("stop"); !strings.Contains(out, strconv.Itoa(info.Pid)) {
		t.Errorf("stop said %q", out)
	}
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		c := h.foreground()
		c.Process.Signal(s)
		if err := c.Wait(); err != nil {
			t.Errorf("after %v: %v", s, err)
		}
	}
	h.nothingRuns()
	log, err := os.ReadFile(h.audit)
	if err != nil {
		t.Fatal(err)
	}
	for _, event := range []string{"server_start", "server_stop"} {
		if n := bytes.Count(log, []byte(`"event":"`+event+`"`)); n != 4 {
			t.Errorf("%d records of %s, not 4", n, event)
		}
	}
}

func TestForcedStopFreesThePort(t *testing.T) {
	h := newDaemonHome(t)
	c, port := startHelper(t, "listen")
	if out := h.must("stop", "--force", "--port", port); !strings.Contains(out, strconv.Itoa(c.Process.Pid)) {
		t.Errorf("it named nobody: %q", out)
	}
	if code, _, stderr := h.run("stop", "--force", "--port", port); code != 1 || !strings.Contains(stderr, port) {
		t.Errorf("with nobody there: exit %d, %q", code, stderr)
	}
	h.must("start") // hides its descriptors
	info := h.server()
	_, port, _ = net.SplitHostPort(info.Address)
	if out := h.must("stop", "--force", "--port", port); !strings.Contains(out, strconv.Itoa(info.Pid)) {
		t.Errorf("it named nobody: %q", out)
	}
	h.nothingRuns()
}
