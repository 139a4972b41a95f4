//go:build !linux

// This file stands in for sys_linux.go on other Unix systems (darwin): a command and its process group are ended.
// It may call the kernel directly, like its sibling.
// It must not pretend: what escapes the group (setsid) lives on here, rlimits are refused, and the README says so.
package main

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

type runTag uint64

func prepareProcess(string) (runTag, error) {
	return 1, unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
}
func beneathServer() bool                        { return false }
func setTag(runTag) error                        { return nil }
func tagOf(int) (runTag, bool)                   { return 0, false }
func taggedProcesses(runTag) []int               { return nil }
func childList(int) *os.File                     { return nil }
func childrenIn(*os.File) []int                  { return nil }
func prepareSpawner(bool) (*os.File, bool)       { return nil, true }
func launched() bool                             { return false }
func launcherError(*os.File) error               { return nil }
func ownBinary() string                          { path, _ := os.Executable(); return path }
func startsAtOnce(path string) (string, bool)    { return path, true }
func isDead(int) bool                            { return false }
func outputPipe(bool) (r, w *os.File, err error) { return os.Pipe() }
func pendingBytes(*os.File) int                  { return 0 } // every piece of a stream is flushed

func startCommand(c *command, path string, _ bool, files []*os.File) (pid int, report *os.File, err error) {
	if c.limits != (rlimits{}) {
		return 0, nil, errors.New("exec.limits need Linux: set them to 0")
	}
	pid, err = forkExec(c, path, c.what.argv, files, &syscall.SysProcAttr{Setsid: true})
	return pid, nil, err
}

// waitExit returns when the child is dead, and leaves it unreaped (waitid(2): P_PID, WEXITED|WNOWAIT).
func waitExit(pid int) {
	var info [16]uint64
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, 1, uintptr(pid), uintptr(unsafe.Pointer(&info)), 0x4|0x20, 0, 0)
		if errno != syscall.EINTR {
			return
		}
	}
}

// statChangeTime is the ctime: it moves with every change of content, mode or owner, and no program can set it back.
func statChangeTime(st *syscall.Stat_t) (sec, nsec int64) {
	return st.Ctimespec.Sec, st.Ctimespec.Nsec
}

// hideProcess does nothing: there is no such switch, and another process of the same user is not kept out here.
func hideProcess() error { return nil }
