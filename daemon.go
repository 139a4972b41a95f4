// This file is the server as a process: detaching, readiness, the locked pid file, stopping, who holds a port, and the commands for that.
// It may detach and signal another server, and it alone.
// It must not trust a number in a file: only the holder of the lock is the server, and only through a pidfd is it signalled.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	readyWait   = 30 * time.Second // from start to the first answer, which takes milliseconds
	endWait     = 30 * time.Second // beyond killGraceMs of the commands that run
	endPause    = 5 * time.Millisecond
	handoverVar = "AGENT_EXEC_HANDOVER"
)

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
	f, _, err := openTrusted(p.pid, os.O_RDWR|os.O_CREATE, private)
	if _, missing := os.Lstat(p.pid); err != nil && missing != nil {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	mine, err := lockFile(f)
	if err == nil && mine {
		return f, f.Truncate(0) // what an earlier server wrote is not true of this one
	}
	f.Close()
	return nil, cmp.Or(err, errors.New("already running\nhint: aexec status"))
}

// findServer asks the kernel who holds the lock (nobody: not running), and takes the file's content only if it agrees with
// that. The server itself must not call it.
func findServer(p paths) (info serverInfo, running bool, err error) {
	f, _, err := openTrusted(p.pid, 0, private)
	if err != nil {
		return info, false, pick(errors.Is(err, os.ErrNotExist), nil, err)
	}
	defer f.Close()
	pid, held, err := lockHolder(f)
	if err != nil || !held {
		return info, false, err
	}
	if json.NewDecoder(f).Decode(&info) != nil || info.Pid != pid {
		info = serverInfo{Pid: pid}
	}
	return info, true, nil
}

// startBackground re-executes this binary as `start -f --json`, its standard error to the log, in a session of its own where
// no terminal's end or Ctrl-C reaches it. It returns when the server answers, or has ended with this error; what it opened ends with
// this process.
func (t *terminal) startBackground() error {
	output, _, err := openAppend(t.log, os.O_WRONLY)
	ours, theirs, noPipe := os.Pipe()
	if err = errors.Join(err, noPipe); err != nil {
		return err
	}
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
	number, _ := strconv.ParseUint(port, 10, 64) // of 0, or of more than 65535, no process listens
	table, _ := os.ReadFile("/proc/net/tcp")     // missing where there is no such protocol, or no /proc
	table6, _ := os.ReadFile("/proc/net/tcp6")
	// A line has a number, the local and the other address, the state, 0A for listening, and after five more the inode (proc_pid_net(5)).
	listens := regexp.MustCompile(fmt.Sprintf(`(?m)^ *\d+: \w+:%04X \w+:\w+ 0A(?: +\S+){5} +(\d+) `, number))
	for _, socket := range listens.FindAllStringSubmatch(string(table)+string(table6), -1) {
		links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
		for _, link := range links {
			if target, _ := os.Readlink(link); target == "socket:["+socket[1]+"]" {
				pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
				name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
				found[pid] = strings.TrimSpace(string(name))
			}
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
		p, _ := os.FindProcess(pid) // a pidfd, where the system has them: it cannot come to mean another process
		now, _ := holders(t.paths, port)
		if _, still := now[pid]; !still {
			continue // the number may mean another one by now
		}
		t.say("ending pid %d, %q", pid, name)
		err := p.Signal(s)
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
		err = t.end("", syscall.SIGTERM, endWait+t.grace)
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
	}
	return t.end(port, pick(port == "", syscall.SIGTERM, syscall.SIGKILL), endWait+t.grace)
}

func cliStatus(t *terminal) error {
	head := "" // no log, no head
	readAudit(t.audit, 3, false, func(l auditLine) error {
		head = pick(l.Torn, head, l.Head.String())
		return nil
	})
	status := map[string]any{
		"running": t.running, "enabled": t.start.enabled, "warnings": t.warnings(), "auditHead": head,
		"settings": cmp.Or(t.wrong, errors.New("valid")).Error(), "pluginProblems": each(t.problems, problemText),
	}
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
