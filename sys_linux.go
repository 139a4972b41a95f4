// This file is the system calls that Linux alone has, behind exec.go and daemon.go, each a few lines with its man page in mind.
// It may call the kernel directly and import x/sys, and it and its siblings sys.go and sys_other.go alone.
// It must not decide when anything happens: it holds no state and knows no request.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const setPipeSize, bytesWaiting = unix.F_SETPIPE_SZ, unix.TIOCINQ // fcntl(2), ioctl(2)

// adoptOrphans makes this process the parent of all orphans below it (PR_SET_CHILD_SUBREAPER(2const)).
func adoptOrphans() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }

// hideProcess keeps other processes of the same user out of this one's memory, environment and descriptors (PR_SET_DUMPABLE(2const)).
func hideProcess() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

// childAttributes are a command's: a session of its own, and death with the thread that started it.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
}

// ownBinary is this very program, even when its file was replaced or removed.
func ownBinary() string { return "/proc/self/exe" }

// statChangeTime is the ctime: it moves with every change of content, mode or owner, and no program can set it back.
func statChangeTime(st *syscall.Stat_t) (sec, nsec int64) { return st.Ctim.Unix() }

// setTag marks what this process starts from now on.
func setTag(t runTag) error {
	return unix.Prlimit(0, unix.RLIMIT_RSS, &unix.Rlimit{Cur: uint64(t), Max: uint64(t)}, nil)
}

// tagOf reads a process's tag (0: this one's); false if there is no such process. Where prlimit(2) is not permitted, as the
// process has another user, /proc tells (slower).
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
	look, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	defer unix.Close(look)
	self := "/proc/self/fd/" + strconv.Itoa(look)
	real, err := os.Readlink(self)
	var file, dir unix.Stat_t
	if err != nil || unix.Fstat(look, &file) != nil || unix.Lstat(filepath.Dir(real), &dir) != nil ||
		file.Uid != 0 || file.Mode&(unix.S_IFMT|0o022) != unix.S_IFREG || dir.Uid != 0 || dir.Mode&(unix.S_IFMT|0o022) != unix.S_IFDIR {
		return "", false
	}
	fd, err := unix.Open(self, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	defer unix.Close(fd)
	var magic [4]byte
	n, err := unix.Pread(fd, magic[:], 0)
	return real, err == nil && n == len(magic) && string(magic[:]) == "\x7fELF"
}
