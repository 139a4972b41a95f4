// This file is the system calls that Linux alone has, behind exec.go and daemon.go, each a few lines with its man page in mind.
// It may call the kernel directly and import x/sys, and it and its siblings sys.go and sys_other.go alone.
// It must not decide when anything happens: it holds no state and knows no request.
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const setPipeSize, bytesWaiting = unix.F_SETPIPE_SZ, unix.TIOCINQ // fcntl(2), ioctl(2)

// adoptOrphans makes this process the parent of all orphans below it; hideProcess keeps others of its user out of its memory,
// environment and descriptors (prctl(2)).
func adoptOrphans() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }
func hideProcess() error  { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

// childAttributes are a command's: a session of its own, and death with the thread that started it.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
}

// pidfd is readable when the child is dead (pidfd_open(2)); -1 where the kernel has none for the poller (before 5.10).
func pidfd(pid int) int { fd, _ := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK); return fd }

// ownBinary is this very program, even when its file was replaced or removed.
func ownBinary() string { return "/proc/self/exe" }

// statChangeTime is the ctime: it moves with every change of content, mode or owner, and no program can set it back.
func statChangeTime(st *syscall.Stat_t) (sec, nsec int64) { return st.Ctim.Unix() }

// setTag marks what this process starts from now on.
func setTag(t runTag) error {
	return unix.Prlimit(0, unix.RLIMIT_RSS, &unix.Rlimit{Cur: uint64(t), Max: uint64(t)}, nil)
}

// tagOf reads a process's tag (0: this one's); false if it is gone. Where prlimit(2) may not, as it has another user, /proc tells.
func tagOf(pid int) (tag runTag, ok bool) {
	var limit unix.Rlimit
	if unix.Prlimit(pid, unix.RLIMIT_RSS, nil, &limit) == nil {
		return runTag(limit.Max), true
	}
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	_, line, ok := strings.Cut(string(text), "Max resident set")
	var soft runTag
	fmt.Sscan(line, &soft, &tag) // "unlimited" leaves 0, which is no run's either
	return tag, ok
}

// prepareSpawner readies the calling thread, which must be locked, for starting commands. no_new_privs cannot be unset.
func prepareSpawner(noNewPrivs bool) {
	unix.KeyctlJoinSessionKeyring("") // keys of the server's session are not for commands; old kernels have none
	if noNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			panic(err) // fail safe: kernels since 3.5 cannot refuse it
		}
	}
}

// startsAtOnce gives the real path of a program of which the kernel's exec is known not to hang, false if that is not known.
// It must be root's own ELF file where root alone can put files, as others can hold an exec: with a lease (fcntl(2), for the
// owner or CAP_LEASE only), with an interpreter of theirs, or by exchanging the file. Nothing is opened before its type is known.
func startsAtOnce(path string) (string, bool) {
	look, _ := os.OpenFile(path, unix.O_PATH, 0) // a nil file gives errors below
	defer look.Close()
	self := fmt.Sprintf("/proc/self/fd/%d", look.Fd())
	real, err := os.Readlink(self)
	if err != nil || !rootsAlone(look.Stat()) || !rootsAlone(os.Lstat(filepath.Dir(real))) {
		return "", false
	}
	file, _ := os.OpenFile(self, os.O_RDONLY|unix.O_NONBLOCK, 0)
	defer file.Close()
	var magic [4]byte
	_, err = io.ReadFull(file, magic[:])
	return real, err == nil && string(magic[:]) == "\x7fELF"
}

// rootsAlone says whether it is a file or a directory that nobody but root can change.
func rootsAlone(info os.FileInfo, err error) bool {
	return err == nil && (info.Mode().IsRegular() || info.IsDir()) && info.Mode()&0o022 == 0 && info.Sys().(*syscall.Stat_t).Uid == 0
}
