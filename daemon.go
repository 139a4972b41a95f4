// This file is the background server as a process: detaching, readiness, the locked pid file, stopping, and who holds a port.
// It may detach and signal another server, and it alone.
// It must not trust a number in a file: only the holder of the lock is the server, and only through a pidfd is it signalled.
package main

import (
	"os"
	"time"
)

// serverInfo is what the running server publishes in the pid file.
type serverInfo struct {
	Pid     int               `json:"pid"` // by the lock when read, whatever the file says
	Address string            `json:"address"`
	Version string            `json:"version"`
	Started time.Time         `json:"started"`
	Restart map[string]string `json:"restart"` // restartValues when it started, to see what has changed on disk since
}

// pidFile is the locked pid file of this process.
type pidFile struct{ f *os.File }

// errRunning is returned by holdPidFile when another server of this directory runs.
type errRunning struct{ info serverInfo }

func (e *errRunning) Error() string { panic("daemon") }

// holdPidFile takes the lock for the life of the process, or gives *errRunning.
func holdPidFile(p paths) (*pidFile, error) { panic("daemon") }

// publish writes who and where this server is.
func (f *pidFile) publish(info serverInfo) error { panic("daemon") }

// findServer asks the lock; false: not running.
func findServer(p paths) (serverInfo, bool, error) { panic("daemon") }

// startBackground re-executes this binary as a detached `start -f` with args, its output to the log, and waits until it answers or fails;
// the error is the server's own.
func startBackground(p paths, args []string) (serverInfo, error) { panic("daemon") }

// reportReady tells the starting process (if there is one) that the server answers, or why it does not.
func reportReady(info serverInfo, err error) { panic("daemon") }

// stopServer ends the server of this directory and returns when it is gone (a zombie is gone); false if there was none.
func stopServer(p paths, wait time.Duration) (serverInfo, bool, error) { panic("daemon") }

// process is somebody who holds a port.
type process struct {
	Pid  int
	Name string // from /proc/PID/cmdline or comm: foreign text, to be quoted
}

// portHolders names the processes that listen on a TCP port: the pid file's holder first, then by /proc/net/tcp{,6} and /proc/*/fd.
func portHolders(p paths, port int) ([]process, error) { panic("daemon") }

// killProcess sends SIGKILL through a pidfd and waits until the process is gone.
func killProcess(pr process, wait time.Duration) error { panic("daemon") }
