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
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	readyWait      = 30 * time.Second // from start to the first answer, which takes milliseconds
	exitWait       = 5 * time.Second  // from a server's report that it failed to its end
	maxReportBytes = 1 << 20          // of a report, and of the pid file
	maxHandedKey   = 4096             // bytes: a pipe takes that many without a reader on every system
	maxNameBytes   = 200              // of a foreign command line that is shown
	handoverVar    = "AGENT_EXEC_HANDOVER"
	firstHanded    = 3 // descriptor; 0 to 2 are the standard ones

	tcpLocal, tcpState, tcpInode = 1, 3, 9 // columns of /proc/net/tcp (proc_pid_net(5))
	tcpListen                    = "0A"
)

// serverInfo is what the running server publishes in the pid file.
type serverInfo struct {
	Pid     int               `json:"pid"` // by the lock when read, whatever the file says
	Address string            `json:"address"`
	Version string            `json:"version"`
	Started time.Time         `json:"started"`
	Restart map[string]string `json:"restart"` // restartValues when it started, to see what has changed on disk since
}

// ---- the pid file

// pidFile is the locked pid file of this process; nil where the directory cannot be written. Nothing else in this process
// may open that file: closing any descriptor of it would drop the lock (fcntl_locking(2)).
type pidFile struct{ f *os.File }

// errRunning is returned by holdPidFile and startBackground when a server of this directory runs.
type errRunning struct{ info serverInfo }

func (e *errRunning) Error() string {
	if e.info.Address == "" { // it is just starting
		return fmt.Sprintf("already running (pid %d)", e.info.Pid)
	}
	return fmt.Sprintf("already running on %s (pid %d)", e.info.Address, e.info.Pid)
}

// errNoPidFile is returned by holdPidFile where there is no pid file and none can be made.
var errNoPidFile = errors.New("status and stop will not find this server")

// holdPidFile takes the lock for the life of the process, or gives *errRunning.
func holdPidFile(p paths) (*pidFile, error) {
	f, err := os.OpenFile(p.pid, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if _, missing := os.Lstat(p.pid); err != nil && missing != nil {
		return nil, fmt.Errorf("%w: %w", err, errNoPidFile)
	} else if err != nil { // ELOOP is a link
		return nil, fmt.Errorf("%w: remove it if it is none of yours", err)
	}
	if err := checkTrustedFile(f, true); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if mine, err := lockFile(f); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", p.pid, err), f.Close())
	} else if mine {
		return &pidFile{f}, f.Truncate(0) // what an earlier server wrote is not true of this one
	}
	f.Close()
	info, running, err := findServer(p)
	if err == nil && !running {
		err = errors.New("another server of this directory has just ended: try again")
	}
	return nil, cmp.Or(err, error(&errRunning{info}))
}

// publish writes who and where this server is: in place, for a new file would not be the locked one.
func (l *pidFile) publish(info serverInfo) error {
	if l == nil {
		return nil
	}
	data, err := json.Marshal(info)
	if err == nil {
		_, err = l.f.WriteAt(append(data, '\n'), 0)
	}
	return err
}

// release empties the file and lets go of the lock.
func (l *pidFile) release() {
	if l != nil {
		l.f.Truncate(0) // best effort: without the lock nobody believes what it says
		l.f.Close()
	}
}

// findServer asks the kernel who holds the lock (false: nobody, not running), and takes the file's content only if it agrees
// with that. The server itself must not call it.
func findServer(p paths) (serverInfo, bool, error) {
	f, err := openTrusted(p.pid, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return serverInfo{}, false, nil
	} else if err != nil {
		return serverInfo{}, false, err
	}
	defer f.Close()
	if err := checkTrustedFile(f, true); err != nil {
		return serverInfo{}, false, err
	}
	pid, held, err := lockHolder(f)
	if err != nil || !held {
		return serverInfo{}, false, err
	}
	var info serverInfo
	data, err := io.ReadAll(io.LimitReader(f, maxReportBytes))
	if err != nil || json.Unmarshal(data, &info) != nil || info.Pid != pid {
		info = serverInfo{}
	}
	info.Pid = pid
	return info, true, nil
}

func (i serverInfo) port() int {
	address, _ := netip.ParseAddrPort(i.Address)
	return int(address.Port())
}

// ---- what one process hands to the next

// handover is what the process that started this server left open for it.
type handover struct {
	ready *os.File // where to report; nil if nobody waits
	key   string   // "" if it was in no environment
}

// takeHandover takes the descriptors that handoverVar names, as "ready,key" with -1 for none, and removes the variable.
func takeHandover() (h handover, err error) {
	ready, key := -1, -1
	fmt.Sscanf(takeEnv(handoverVar), "%d,%d", &ready, &key)
	if ready >= firstHanded {
		h.ready = os.NewFile(uintptr(ready), "readiness")
	}
	if key >= firstHanded {
		f := os.NewFile(uintptr(key), "key")
		defer f.Close()
		text, err := io.ReadAll(io.LimitReader(f, maxHandedKey))
		h.key = string(text)
		return h, err
	}
	return h, nil
}

// shedKey replaces this process by itself without the key in its environment, which /proc/PID/environ shows for as long as
// a process lives; the key comes back by a pipe. It returns only if that fails.
func (h handover) shedKey(key *apiKey) error {
	r, err := keyPipe(key.text)
	if err != nil {
		return err
	}
	kept, ready := []*os.File{r}, -1
	if h.ready != nil {
		kept, ready = append(kept, h.ready), int(h.ready.Fd())
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	env := append(environWithoutKey(), fmt.Sprintf("%s=%d,%d", handoverVar, ready, r.Fd()))
	return fmt.Errorf("start %q again without API_KEY in its environment: %w", self, execKeeping(self, os.Args, env, kept))
}

// keyPipe holds the key for one reader.
func keyPipe(text string) (*os.File, error) {
	if len(text) > maxHandedKey {
		return nil, fmt.Errorf("API_KEY in the environment is longer than %d bytes: take a shorter one", maxHandedKey)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, err = w.WriteString(text)
	return r, errors.Join(err, w.Close())
}

// readiness is one line from a starting server to the process that waits for it.
type readiness struct {
	Info  serverInfo `json:"info"`
	Error string     `json:"error,omitempty"`
}

// report tells the starting process (if there is one) that the server answers, or why it does not; once.
func (h *handover) report(info serverInfo, err error) {
	if h.ready == nil {
		return
	}
	r := readiness{Info: info}
	if err != nil {
		r.Error = err.Error()
	}
	json.NewEncoder(h.ready).Encode(r) // if the starter is gone, nobody needs it
	h.ready.Close()
	h.ready = nil
}

// ---- start

// startBackground re-executes this binary as a detached `start -f` with args, its output to the log, and waits until it answers or fails;
// the error is the server's own.
func startBackground(p paths, args []string) (serverInfo, error) {
	if err := checkTrustedDir(p.dir); err != nil {
		return serverInfo{}, err
	}
	if info, running, err := findServer(p); err != nil || running {
		return info, cmp.Or(err, error(&errRunning{info}))
	}
	output, err := openAppend(p.log)
	if err != nil {
		return serverInfo{}, err
	}
	defer output.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return serverInfo{}, err
	}
	defer null.Close()
	ours, theirs, err := os.Pipe()
	if err != nil {
		return serverInfo{}, err
	}
	defer ours.Close()
	child, err := detach(args, []*os.File{null, output, output, theirs})
	theirs.Close()
	if err != nil {
		return serverInfo{}, fmt.Errorf("start the server: %w", err)
	}
	return awaitServer(child, ours, p)
}

// detach starts the server in a session of its own, where no terminal's end or Ctrl-C reaches it. A key in the environment
// goes by a pipe.
func detach(args []string, files []*os.File) (*os.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	key, err := keyPipe(takeEnv("API_KEY"))
	if err != nil {
		return nil, err
	}
	defer key.Close()
	return os.StartProcess(self, append([]string{os.Args[0], "start", "-f"}, args...), &os.ProcAttr{
		Env:   append(environWithoutKey(), fmt.Sprintf("%s=%d,%d", handoverVar, firstHanded, firstHanded+1)),
		Files: append(files, key),
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// awaitServer returns when the server has answered, or failed and ended.
func awaitServer(child *os.Process, ready *os.File, p paths) (serverInfo, error) {
	ready.SetReadDeadline(time.Now().Add(readyWait))
	data, err := io.ReadAll(io.LimitReader(ready, maxReportBytes))
	var r readiness
	switch {
	case err != nil: // the deadline
		child.Kill()
		err = fmt.Errorf("the server did not answer within %s and was ended: see %s", readyWait, p.log)
	case json.Unmarshal(data, &r) != nil:
		err = fmt.Errorf("the server ended before it answered: see %s", p.log)
	case r.Error != "":
		err = errors.New(r.Error)
	default:
		return r.Info, child.Release()
	}
	timer := time.AfterFunc(exitWait, func() { child.Kill() })
	defer timer.Stop()
	child.Wait()
	return serverInfo{}, err
}

// ---- stop

// stopServer ends the server of this directory and returns when it is gone (a zombie is gone); false if there was none.
// If it is still there after wait, that is an error.
func stopServer(p paths, wait time.Duration) (serverInfo, bool, error) {
	info, running, err := findServer(p)
	if err != nil || !running {
		return info, false, err
	}
	if info.Pid <= 0 {
		return info, true, fmt.Errorf("the server holds %s from where this process cannot see it (another container or machine): stop it there", p.pid)
	}
	h, err := openProcess(info.Pid)
	if err == syscall.ESRCH {
		return info, true, nil
	} else if err != nil {
		return info, true, fmt.Errorf("reach the server, pid %d: %w", info.Pid, err)
	}
	defer h.close()
	// Only now, with a handle that cannot come to mean another process, does the lock's word count.
	if now, running, err := findServer(p); err != nil || !running || now.Pid != info.Pid {
		return info, true, err
	}
	return info, true, endProcess(h, info.Pid, syscall.SIGTERM, wait)
}

// endProcess sends the signal and waits until the process is dead.
func endProcess(h processHandle, pid int, s syscall.Signal, wait time.Duration) error {
	if err := h.signal(s); err == syscall.ESRCH {
		return nil
	} else if err != nil {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	dead, err := h.wait(wait)
	if err == nil && !dead {
		err = fmt.Errorf("process %d has not ended within %s", pid, wait)
	}
	return err
}

// ---- who holds a port

// process is somebody who holds a port.
type process struct {
	Pid   int
	Name  string      // from /proc/PID/cmdline or comm: foreign text, to be quoted
	holds func() bool // still; nil: nobody needs to ask
}

// portHolders names the processes that listen on a TCP port: the pid file's holder first, as the descriptors of a server
// that hides itself cannot be read, then by /proc/net/tcp{,6} and /proc/*/fd. A holder that cannot be seen is an error.
func portHolders(p paths, port int) ([]process, error) {
	sockets, err := listeners(port)
	if err != nil {
		return nil, err
	}
	pids, hidden := socketOwners(sockets)
	if info, running, _ := findServer(p); running && info.port() == port && len(sockets) > 0 {
		i := slices.Index(pids, info.Pid)
		if i < 0 {
			hidden-- // its one listener
		} else {
			pids = slices.Delete(pids, i, i+1)
		}
		pids = slices.Insert(pids, 0, info.Pid)
	}
	if hidden > 0 {
		return nil, fmt.Errorf("port %d is held by a process that this user may not look into: find it as root with ss -ltnp sport = :%d", port, port)
	}
	holders := make([]process, len(pids))
	for i, pid := range pids {
		holders[i] = process{pid, processName(pid), func() bool {
			again, err := portHolders(p, port)
			return err == nil && slices.ContainsFunc(again, func(pr process) bool { return pr.Pid == pid })
		}}
	}
	return holders, nil
}

// listeners gives the inodes of the sockets that listen on a TCP port.
func listeners(port int) (inodes []string, err error) {
	for _, name := range []string{"/proc/net/tcp6", "/proc/net/tcp"} {
		var table []byte
		table, err = os.ReadFile(name) // tcp6 is missing where IPv6 is switched off
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line)
			if len(f) > tcpInode && f[tcpState] == tcpListen && strings.HasSuffix(f[tcpLocal], fmt.Sprintf(":%04X", port)) {
				inodes = append(inodes, f[tcpInode])
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("this system does not tell who listens on port %d (%w): try lsof -i :%d", port, err, port)
	}
	return inodes, nil
}

// socketOwners gives the processes that have one of the sockets, and of how many sockets no owner can be seen.
func socketOwners(inodes []string) (pids []int, hidden int) {
	seen := map[string]bool{}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		target, _ := os.Readlink(link)
		inode := strings.TrimSuffix(strings.TrimPrefix(target, "socket:["), "]")
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil || !slices.Contains(inodes, inode) {
			continue
		}
		seen[inode] = true
		if !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	return pids, len(inodes) - len(seen)
}

func processName(pid int) string {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if len(name) == 0 {
		name, _ = os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	}
	name = name[:min(len(name), maxNameBytes)]
	return strings.TrimSpace(strings.ReplaceAll(string(name), "\x00", " "))
}

// killProcess sends SIGKILL through a pidfd and waits until the process is gone.
func killProcess(pr process, wait time.Duration) error {
	h, err := openProcess(pr.Pid)
	if err == syscall.ESRCH {
		return nil
	} else if err != nil {
		return fmt.Errorf("reach process %d: %w", pr.Pid, err)
	}
	defer h.close()
	if pr.holds != nil && !pr.holds() {
		return nil // it let go of the port by itself, and its number may mean another process now
	}
	return endProcess(h, pr.Pid, syscall.SIGKILL, wait)
}
