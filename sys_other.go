//go:build !linux

// This file stands in for sys_linux.go on other Unix systems (darwin): a command and its process group are ended.
// It may call the kernel directly, like its sibling.
// It must not pretend: what escapes the group (setsid) lives on here, rlimits are refused, and the README says so.
package main

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

type runTag uint64

func (t runTag) tagged() bool { return false }
func beneathServer() bool     { return false }
func prepareProcess(string) (runTag, error) {
	return 1, unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
}
func setTag(runTag) error                       { return nil }
func tagOf(int) (runTag, bool)                  { return 0, false }
func taggedProcesses(runTag) []int              { return nil }
func onMainThread() bool                        { return false }
func prepareSpawner(noNewPrivs bool) *childList { return nil }
func launched() bool                            { return false }
func ownBinary() string                         { path, _ := os.Executable(); return path }
func startsAtOnce(path string) (string, bool)   { return path, true }
func isDead(int) bool                           { return false }
func outputPipe() (r, w *os.File, err error)    { return os.Pipe() }
func enlargePipe(*os.File, int)                 {}
func pendingBytes(*os.File) int                 { return 0 } // every piece of a stream is flushed

type childList struct{}

func openChildList(int) *childList { return &childList{} }
func (l *childList) pids() []int   { return nil }

type startSpec struct {
	path, dir string
	argv, env []string
	files     []*os.File
	cred      *credential
	limited   bool
	status    *os.File // of a launcher: there is none
}

func (s *startSpec) launch(l rlimits) { s.limited = l != rlimits{} }
func (s *startSpec) confirm() error   { return nil }

func (s *startSpec) start() (int, error) {
	if s.limited {
		return 0, errors.New("exec.limits need Linux: set them to 0")
	}
	return forkExec(s.path, s.argv, s.dir, s.env, s.files, s.cred, &syscall.SysProcAttr{Setsid: true})
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

// processHandle is a mere number here: it may come to mean another process between two calls.
type processHandle struct{ pid int }

func openProcess(pid int) (processHandle, error) {
	if pid <= 1 {
		return processHandle{}, syscall.EINVAL
	}
	return processHandle{pid}, syscall.Kill(pid, 0)
}

func (h processHandle) signal(s syscall.Signal) error { return syscall.Kill(h.pid, s) }

func (h processHandle) wait(patience time.Duration) (bool, error) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if syscall.Kill(h.pid, 0) == syscall.ESRCH {
			return true, nil
		}
	}
	return false, nil
}

func (h processHandle) close() {}

// hideProcess does nothing: there is no such switch, and another process of the same user is not kept out here.
func hideProcess() error { return nil }
