// This file is the entry, and the server as a process: wiring, signals, detaching, the locked pid file, stopping, who holds a port.
// It may end this process, take signals, detach and signal another server.
// It must not trust a number in a file: only the holder of the lock is the server, and only through a pidfd is it signalled.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	version     = "v0.1.0"
	watchTime   = 10 * time.Second // between two looks for changes that need a restart
	readyWait   = 30 * time.Second // from start to the first answer, which takes milliseconds
	endWait     = 2 * time.Minute  // killGraceMs of the commands that run, and more
	endPause    = 5 * time.Millisecond
	handoverVar = "AGENT_EXEC_HANDOVER"
)

func main() {
	if launched() || hideProcess() != nil { // it could not become a command with limits, or keep others out before it has a key
		os.Exit(126)
	}
	os.Exit(cli(os.Args[1:]))
}

// loaded is the configuration as it lies on disk. A server starts from it, and commands look at it.
type loaded struct {
	paths              // audit is where the settings say
	start    startup   // without a key it is of no use
	settings *settings // nil if the file cannot be read
	store    *store
	snap     *snapshot // nil if the settings are not fit to be in force
	plugins  []*plugin // the usable ones
	rules    []ruleSet // theirs
	problems []pluginProblem
	server   serverInfo // what runs; if nothing does, the address is where it would
	running  bool
	wrong    error // all that keeps a server from starting
}

// load goes on after an error, as most commands have a use for the rest.
func load(from startupFlags) (c loaded) {
	if c.paths, c.wrong = configPaths(); c.wrong != nil {
		return c
	}
	errs := make([]error, 3)
	c.server, c.running, errs[0] = findServer(c.paths)
	c.start, errs[1] = loadStartup(c.paths, from)
	c.server.Address = cmp.Or(c.server.Address, net.JoinHostPort(c.start.host, strconv.Itoa(c.start.port)))
	if c.settings, errs[2] = loadSettings(c.paths); errs[2] == nil {
		c.audit = c.settings.AuditFile
		c.plugins, c.problems = loadPlugins(c.paths, c.settings)
		for _, pl := range c.plugins {
			c.rules = append(c.rules, pl.Rules)
		}
		c.store, errs[2] = openStore(c.paths, c.rules)
		c.snap = c.store.snapshot
	}
	for _, p := range c.problems {
		if !p.Warning {
			errs = append(errs, errors.New(problemText(p)))
		}
	}
	c.wrong = errors.Join(errs...)
	return c
}

// warnings names what makes the server, running or not, more dangerous than it need be.
func (c loaded) warnings() []string {
	list := []string{}
	if c.snap != nil && os.Geteuid() == 0 && (c.snap.cred == nil || c.snap.cred.Uid == 0) {
		list = append(list, "commands run as root: set exec.user to an unprivileged user")
	}
	if a, err := netip.ParseAddrPort(c.server.Address); err == nil && !a.Addr().Unmap().IsLoopback() {
		list = append(list, c.server.Address+" is plain HTTP beyond this machine: put TLS, a VPN or a firewall in front")
	}
	return list
}

// serve is the whole life of a server in this process: it holds the directory, listens, says so, and answers until a signal.
func (t *terminal) serve() error {
	if t.start.keyInEnv {
		return shedKey(t.start.key)
	}
	// What nobody has a use for is caught and dropped: if it were ignored, it would be so in every command, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGHUP)
	ends := []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP}
	if t.on("json") {
		ends = ends[:2] // it is in the background, where no terminal's end is its own
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	lock, err := holdPidFile(t.paths)
	if err != nil {
		return err
	}
	defer lock.Close()
	audit, err := openAudit(t.audit, t.settings.AuditEnabled, t.start.key)
	if err != nil {
		return err
	}
	defer audit.close() // before the pid file: who can lock that can lock both
	l, err := listen(t.start.host, t.start.port)
	if err != nil {
		return err
	}
	runner, err := newRunner(t.dir)
	if err != nil {
		return err
	}
	logger := log.New(t.err, "", log.LstdFlags)
	s := &server{start: t.start, store: t.store, audit: audit, runner: runner, plugins: t.plugins, log: logger}
	if err := s.prepare(l.Addr().String()); err != nil {
		return err
	}
	now := time.Now().Truncate(time.Second)
	info := serverInfo{Pid: os.Getpid(), Address: s.address, Version: version, Started: now, Enabled: t.start.enabled}
	info.Restart, err = restartState(t.paths)
	record := auditRecord{Event: "server_start"}
	if lock != nil { // else what looks left over may be the commands of a server that runs
		if n := runner.endLeftovers(); n > 0 {
			record.Reason = fmt.Sprintf("ended %d processes that a crashed server left", n)
		}
		err = errors.Join(err, json.NewEncoder(lock).Encode(info))
	}
	if err = errors.Join(err, audit.append(record)); err != nil {
		return err
	}
	logger.Printf("agent-exec %s listens on %s, pid %d, audit head %s", version, info.Address, info.Pid, audit.head())
	t.started(info) // if the starter is gone, nobody needs it
	go watchRestart(time.Tick(watchTime), t.paths, info.Restart, logger)
	err = s.serve(ctx, l)
	why := cmp.Or(context.Cause(ctx), err)
	err = errors.Join(err, audit.append(auditRecord{Event: "server_stop", Reason: fmt.Sprint(why)}))
	logger.Printf("stopped (%v), audit head %s", why, audit.head())
	return err
}

// restartState is everything on disk that only a restart brings into force, by name.
func restartState(p paths) (map[string]string, error) {
	state := pluginFingerprints(p)
	values, err := restartValues(p)
	maps.Copy(state, values)
	return state, err
}

// changedOnDisk names, sorted, what is not as it was when a server was started: values that differ, and those that only one
// side has. There are none while settings.json cannot be read, which is reported elsewhere, or the server has not said.
func changedOnDisk(p paths, inForce map[string]string) []string {
	onDisk, err := restartState(p)
	if err != nil || inForce == nil {
		return nil
	}
	all := maps.Clone(onDisk)
	maps.Copy(all, inForce)
	maps.DeleteFunc(all, func(name, _ string) bool { return inForce[name] == onDisk[name] })
	return slices.Sorted(maps.Keys(all))
}

// watchRestart logs what waits for a restart, whenever that becomes something else.
func watchRestart(tick <-chan time.Time, p paths, inForce map[string]string, logger *log.Logger) {
	var said []string
	for range tick {
		if changed := changedOnDisk(p, inForce); len(changed) > 0 && !slices.Equal(changed, said) {
			logger.Printf("changed on disk, and in force only after aexec restart: %q", changed)
			said = changed
		}
	}
}

// serverInfo is what a server says of itself: in the pid file, and to the process that waits for its start.
type serverInfo struct {
	Pid     int               `json:"pid"` // by the lock when read, whatever the file says
	Address string            `json:"address"`
	Version string            `json:"version"`
	Started time.Time         `json:"started"`
	Enabled bool              `json:"enabled"`
	Restart map[string]string `json:"restart"`         // restartState when it started, to see what has changed on disk since
	Error   string            `json:"error,omitempty"` // why it did not start; never in the pid file
}

// holdPidFile opens the pid file and takes its lock, for the life of the process: nothing else in this process may open it,
// as closing any descriptor of it drops the lock (fcntl_locking(2)). It gives nil where there is no such file and none can be made.
func holdPidFile(p paths) (*os.File, error) {
	f, err := openTrusted(p.pid, os.O_RDWR|os.O_CREATE)
	if _, missing := os.Lstat(p.pid); err != nil && missing != nil {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	mine, err := lockFile(f)
	if err = cmp.Or(checkTrustedFile(f, true), err); err == nil && mine {
		return f, f.Truncate(0) // what an earlier server wrote is not true of this one
	}
	f.Close()
	return nil, cmp.Or(err, errors.New("already running\nhint: aexec status"))
}

// findServer asks the kernel who holds the lock (nobody: not running), and takes the file's content only if it agrees with
// that. The server itself must not call it.
func findServer(p paths) (info serverInfo, running bool, err error) {
	f, err := openTrusted(p.pid, 0)
	if errors.Is(err, os.ErrNotExist) {
		return info, false, nil
	} else if err != nil {
		return info, false, err
	}
	defer f.Close()
	pid, held, err := lockHolder(f)
	if err = errors.Join(checkTrustedFile(f, true), err); err != nil || !held {
		return info, false, err
	}
	if json.NewDecoder(f).Decode(&info) != nil || info.Pid != pid {
		info = serverInfo{Pid: pid}
	}
	return info, true, nil
}

// startBackground re-executes this binary as `start -f --json`, its standard error to the log, in a session of its own where
// no terminal's end or Ctrl-C reaches it. It returns when the server answers, or has ended with this error.
func (t *terminal) startBackground() error {
	output, err := openAppend(t.log)
	ours, theirs, noPipe := os.Pipe()
	if err = errors.Join(err, noPipe); err != nil {
		return err
	}
	defer output.Close()
	defer ours.Close()
	self, _ := os.Executable() // "" cannot be started
	argv := []string{os.Args[0], "start", "-f", "--json", "--host=" + t.start.host, "--port=" + strconv.Itoa(t.start.port)}
	child, err := os.StartProcess(self, argv, &os.ProcAttr{
		Files: []*os.File{nil, theirs, output}, Sys: &syscall.SysProcAttr{Setsid: true}, // for nil, Go opens /dev/null
	})
	theirs.Close()
	if err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	defer time.AfterFunc(readyWait, func() { child.Kill() }).Stop() // which ends its report, too
	var info serverInfo
	json.NewDecoder(ours).Decode(&info) // an end without a word leaves it empty
	if info.Pid == 0 {
		child.Wait()
		return errors.New(cmp.Or(info.Error, "the server ended before it answered: see "+t.log))
	}
	return t.started(info)
}

// shedKey replaces this process by itself without the key in its environment, which /proc/PID/environ shows for as long as
// a process lives; the key waits in a pipe, whose descriptor a variable names. It returns only if that fails.
func shedKey(key *apiKey) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	fmt.Fprint(w, key.text) // does not wait: a pipe has room for maxKeyChars
	w.Close()
	self, _ := os.Executable() // "" cannot be started
	env := append(environWithoutKey(), fmt.Sprintf("%s=%d", handoverVar, r.Fd()))
	return fmt.Errorf("start again without API_KEY in the environment: %w", execKeeping(self, os.Args, env, r))
}

// handedKey takes what shedKey left, and removes the variable; "" if it left nothing.
func handedKey() string {
	fd, err := strconv.Atoi(takeEnv(handoverVar))
	if err != nil {
		return ""
	}
	f := os.NewFile(uintptr(fd), "key")
	defer f.Close()
	text, _ := io.ReadAll(f) // what is cut is too short or a wrong key
	return string(text)
}

// holders gives the processes that listen on a TCP port, and their names (foreign text, to be quoted): those that this user
// may look into, by their descriptors (proc_pid_fd(5)), and our own server, which hides them, by the pid file. For the port ""
// it gives our own server alone.
func holders(p paths, port string) (map[int]string, error) {
	found := map[int]string{}
	info, running, err := findServer(p)
	if running && (port == "" || strings.HasSuffix(info.Address, ":"+port)) {
		found[info.Pid] = "aexec"
	}
	number, _ := strconv.ParseUint(port, 10, 16) // of 0, no process listens
	table, _ := os.ReadFile("/proc/net/tcp")     // missing where there is no such protocol, or no /proc
	table6, _ := os.ReadFile("/proc/net/tcp6")
	var sockets []string // as the links name them
	for line := range strings.Lines(string(table) + string(table6)) {
		f := strings.Fields(line) // 1: local address, 3: state, 0A for listening, 9: inode (proc_pid_net(5))
		if len(f) > 9 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", number)) {
			sockets = append(sockets, "socket:["+f[9]+"]")
		}
	}
	if len(sockets) == 0 {
		return found, err
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if target, _ := os.Readlink(link); slices.Contains(sockets, target) {
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			found[pid] = strings.TrimSpace(string(name))
		}
	}
	return found, err
}

// end signals each holder once, naming it first, and returns when all are dead.
func (t *terminal) end(port string, s syscall.Signal, wait time.Duration) error {
	all, err := holders(t.paths, port)
	if len(all) == 0 {
		none := "nothing that this user can see listens on port " + port + "\nhint: as root, ss -ltnp or lsof -i :" + port
		return cmp.Or(err, errors.New(pick(port == "", "not running\nhint: aexec start", none)))
	}
	for pid, name := range all {
		p, err := os.FindProcess(pid) // a pidfd, where the system has them: it cannot come to mean another process
		defer p.Release()
		now, _ := holders(t.paths, port)
		if _, still := now[pid]; !still {
			continue // the number may mean another one by now
		}
		t.say("ending pid %d, %q", pid, name)
		err = p.Signal(s)
		for begun := time.Now(); err == nil && !isDead(pid); err = p.Signal(syscall.Signal(0)) { // a zombie is dead
			if time.Since(begun) > wait {
				return fmt.Errorf("process %d has not ended within %s", pid, wait)
			}
			time.Sleep(endPause)
		}
		if err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("end process %d: %w", pid, err)
		}
		t.say("stopped: pid %d", pid)
	}
	return nil
}

// cliStart is start and restart, which stops nothing before it knows that what is on disk can start again.
func cliStart(t *terminal) error {
	err := t.wrong
	if err == nil && t.running && t.command != "start" {
		err = t.end("", syscall.SIGTERM, endWait)
	}
	if err != nil {
		return err
	}
	if t.on("force") {
		t.end(strconv.Itoa(t.start.port), syscall.SIGKILL, endWait) // if it cannot, the start says so
	}
	if t.on("f") {
		return t.serve()
	}
	return t.startBackground()
}

// started tells of the new server; t.server is the one that it replaces, if any.
func (t *terminal) started(info serverInfo) error {
	moved := t.running && t.server.Address != info.Address
	t.warnIf(moved, "the address changes from http://%s to http://%s", t.server.Address, info.Address)
	t.server, t.running = info, true
	t.warnIf(!info.Enabled, "AGENT_EXEC_ENABLED is not true: everything but /ping is answered 503")
	t.warnIf(len(t.warnings()) > 0, "%s", strings.Join(t.warnings(), "\nwarning: "))
	return t.show(false, 0, info, fmt.Sprintf("started: http://%s, pid %d", info.Address, info.Pid))
}

func cliStop(t *terminal) error {
	port := t.flags["port"]
	if port != "" && !t.on("force") {
		return usageError("--port kills whatever listens there: it takes --force as well")
	} else if port != "" {
		return t.end(port, syscall.SIGKILL, endWait)
	}
	return t.end("", syscall.SIGTERM, endWait)
}

func cliStatus(t *terminal) error {
	status := map[string]any{
		"running": t.running, "enabled": t.start.enabled, "warnings": t.warnings(),
		"settings": cmp.Or(t.wrong, errors.New("valid")).Error(), "pluginProblems": each(t.problems, problemText),
	}
	readAudit(t.audit, 3, false, func(l auditLine) error { // no log, no head
		if !l.Torn {
			status["auditHead"] = l.Head.String()
		}
		return nil
	})
	if info := t.server; t.running {
		status["pid"], status["address"], status["version"], status["enabled"] = info.Pid, info.Address, info.Version, info.Enabled
		status["uptime"] = time.Since(info.Started).Round(time.Second).String()
		status["needsRestart"] = append([]string{}, changedOnDisk(t.paths, info.Restart)...)
	}
	text := pick(t.running, "running", "not running\thint: aexec start")
	for _, name := range slices.Sorted(maps.Keys(status)) {
		value := fmt.Sprint(status[name])
		if list, ok := status[name].([]string); ok {
			value = strings.Join(list, "\n")
		}
		text += "\n" + name + "\t" + strings.ReplaceAll(value, "\n", "\n\t")
	}
	return t.show(!t.running, 3, status, text)
}
