// This file is the background server as a process: detaching, readiness, the locked pid file, stopping, and who holds a port.
// It may detach and signal another server, and it alone.
// It must not trust a number in a file: only the holder of the lock is the server, and only through a pidfd is it signalled.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	readyWait    = 30 * time.Second // from start to the first answer, which takes milliseconds
	maxHandedKey = 4096             // bytes: a pipe takes that many without a reader on every system
	maxNameBytes = 200              // of a foreign command line that is shown
	handoverVar  = "AGENT_EXEC_HANDOVER"
)

// serverInfo is what a server says of itself: in the pid file, and to the process that waits for its start.
type serverInfo struct {
	Pid     int               `json:"pid"` // by the lock when read, whatever the file says
	Address string            `json:"address"`
	Version string            `json:"version"`
	Started time.Time         `json:"started"`
	Restart map[string]string `json:"restart"`         // restartState when it started, to see what has changed on disk since
	Error   string            `json:"error,omitempty"` // why it did not start; never in the pid file
}

func (i serverInfo) writeTo(f *os.File) error { return json.NewEncoder(f).Encode(i) }

// holdPidFile opens the pid file and takes its lock, for the life of the process: nothing else in this process may open it,
// as closing any descriptor of it drops the lock (fcntl_locking(2)). It gives nil where there is no such file and none can be made.
func holdPidFile(p paths) (*os.File, error) {
	f, err := os.OpenFile(p.pid, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if _, missing := os.Lstat(p.pid); err != nil && missing != nil {
		return nil, nil
	}
	mine := false
	if err == nil {
		err = checkTrustedFile(f, true)
	}
	if err == nil {
		mine, err = lockFile(f)
	}
	if mine {
		return f, f.Truncate(0) // what an earlier server wrote is not true of this one
	}
	f.Close()
	info, running, findErr := findServer(p) // which has better words for what is no regular file
	if err = cmp.Or(findErr, err); err == nil && running {
		where := pick(info.Address == "", "", " on "+info.Address) // it may be just starting
		err = fmt.Errorf("already running%s (pid %d)", where, info.Pid)
	}
	return nil, cmp.Or(err, errors.New("another server of this directory has just ended: try again"))
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
		info = serverInfo{}
	}
	info.Pid = pid
	return info, true, nil
}

// startBackground re-executes this binary as `start -f` with args, its output to the log, in a session of its own where no
// terminal's end or Ctrl-C reaches it, and waits until it answers or fails; the error is the server's own.
func startBackground(p paths, args []string) (serverInfo, error) {
	if err := checkTrustedDir(p.dir); err != nil {
		return serverInfo{}, err
	}
	output, err := openAppend(p.log)
	ours, theirs, pipeErr := os.Pipe()
	self, selfErr := os.Executable()
	if err := errors.Join(err, pipeErr, selfErr); err != nil {
		return serverInfo{}, err
	}
	defer output.Close()
	defer ours.Close()
	env := append(environWithoutKey(), handoverVar+"=3,-1")
	if key := takeEnv("API_KEY"); key != "" {
		env = append(env, "API_KEY="+key) // until it sheds it
	}
	child, err := os.StartProcess(self, append([]string{os.Args[0], "start", "-f"}, args...), &os.ProcAttr{
		Env: env, Files: []*os.File{nil, output, output, theirs}, Sys: &syscall.SysProcAttr{Setsid: true}, // for nil, Go opens /dev/null
	})
	theirs.Close()
	if err != nil {
		return serverInfo{}, fmt.Errorf("start the server: %w", err)
	}
	return awaitServer(child, ours, p)
}

// awaitServer returns when the server has answered, or failed and ended.
func awaitServer(child *os.Process, ready *os.File, p paths) (info serverInfo, err error) {
	defer time.AfterFunc(readyWait, func() { child.Kill() }).Stop() // which ends its report, too
	if json.NewDecoder(ready).Decode(&info) != nil {
		info.Error = "the server ended before it answered: see " + p.log
	}
	if info.Error == "" {
		return info, child.Release()
	}
	child.Wait()
	return serverInfo{}, errors.New(info.Error)
}

// takeHandover takes what the process that started this server left open for it: where to report its start (nil if nobody
// waits), and a key. The variable names both descriptors, -1 for none, and is removed.
func takeHandover() (ready *os.File, key string, err error) {
	readyFd, keyFd := -1, -1
	fmt.Sscanf(takeEnv(handoverVar), "%d,%d", &readyFd, &keyFd)
	ready = os.NewFile(uintptr(readyFd), "readiness")
	if f := os.NewFile(uintptr(keyFd), "key"); f != nil {
		defer f.Close()
		text, err := io.ReadAll(f)
		return ready, string(text), err
	}
	return ready, "", nil
}

// shedKey replaces this process by itself without the key in its environment, which /proc/PID/environ shows for as long as
// a process lives; the key comes back by a pipe. It returns only if that fails.
func shedKey(key *apiKey, ready *os.File) error {
	if len(key.text) > maxHandedKey {
		return fmt.Errorf("API_KEY in the environment is longer than %d bytes: take a shorter one", maxHandedKey)
	}
	self, err := os.Executable()
	r, w, pipeErr := os.Pipe()
	_, writeErr := w.WriteString(key.text)
	if err := errors.Join(err, pipeErr, writeErr, w.Close()); err != nil {
		return err
	}
	kept := slices.DeleteFunc([]*os.File{r, ready}, func(f *os.File) bool { return f == nil })
	env := append(environWithoutKey(), fmt.Sprintf("%s=%d,%d", handoverVar, int(ready.Fd()), r.Fd())) // Fd of nil is -1
	return fmt.Errorf("start %q again without API_KEY in its environment: %w", self, execKeeping(self, os.Args, env, kept))
}

// stopServer signals the server of this directory and returns when it is gone; false if there was none. If it is still there
// after wait, that is an error.
func stopServer(p paths, s syscall.Signal, wait time.Duration) (info serverInfo, was bool, err error) {
	info, was, err = findServer(p)
	if err != nil || !was {
		return info, was, err
	}
	if info.Pid <= 0 {
		return info, true, fmt.Errorf("%s is locked from where this process cannot see (another container or machine): stop the server there", p.pid)
	}
	return info, true, endProcess(process{Pid: info.Pid, is: func() (bool, error) {
		now, running, err := findServer(p)
		return running && now.Pid == info.Pid, err
	}}, s, wait)
}

// process is the server, or somebody who holds a port.
type process struct {
	Pid  int
	Name string               // from /proc/PID/cmdline: foreign text, to be quoted
	is   func() (bool, error) // whether Pid means that one, now
}

// endProcess signals a process and waits until it is dead (a zombie is). Whether it is the right one counts only when asked
// with a handle that cannot come to mean another process; if it is not, the right one is gone.
func endProcess(pr process, s syscall.Signal, wait time.Duration) error {
	h, err := openProcess(pr.Pid)
	if err == nil {
		defer h.close()
		if yes, err := pr.is(); err != nil || !yes {
			return err
		}
		err = h.signal(s)
	}
	if err == syscall.ESRCH {
		return nil
	} else if err != nil {
		return fmt.Errorf("end process %d: %w", pr.Pid, err)
	}
	if dead, err := h.wait(wait); err != nil || dead {
		return err
	}
	return fmt.Errorf("process %d has not ended within %s", pr.Pid, wait)
}

// portHolders names the processes that listen on a TCP port: the server by the pid file, as it hides its descriptors, all
// others by those (proc_pid_fd(5)). A holder that cannot be seen is an error.
func portHolders(p paths, port int) (holders []process, err error) {
	table6, _ := os.ReadFile("/proc/net/tcp6") // missing where IPv6 is switched off
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return nil, fmt.Errorf("this system does not tell who listens on port %d (%w): try lsof -i :%d", port, err, port)
	}
	var sockets []string // as the links name them
	for line := range strings.Lines(string(table6) + string(table)) {
		f := strings.Fields(line) // 1: local address, 3: state, 0A for listening, 9: inode (proc_pid_net(5))
		if len(f) > 9 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
			sockets = append(sockets, "socket:["+f[9]+"]")
		}
	}
	var pids []int
	if info, running, _ := findServer(p); running && len(sockets) > 0 && strings.HasSuffix(info.Address, ":"+strconv.Itoa(port)) {
		pids = append(pids, info.Pid)
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
		if target, _ := os.Readlink(link); slices.Contains(sockets, target) && !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	if len(sockets) > 0 && len(pids) == 0 {
		return nil, fmt.Errorf("port %d is held by a process that this user may not look into: find it as root with ss -ltnp sport = :%d", port, port)
	}
	for _, pid := range pids {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		name := strings.TrimSpace(strings.ReplaceAll(string(line[:min(len(line), maxNameBytes)]), "\x00", " "))
		holders = append(holders, process{pid, name, func() (bool, error) {
			now, err := portHolders(p, port)
			return slices.ContainsFunc(now, func(pr process) bool { return pr.Pid == pid }), err
		}})
	}
	return holders, nil
}
