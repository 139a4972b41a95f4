// This file is the Linux system calls behind exec.go and daemon.go, each a few lines with its man page in mind.
// It may call the kernel directly and import x/sys, and it and its sibling sys_other.go alone.
// It must not decide when anything happens: it holds no state and knows no request.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// runTag marks every process of one run from birth: it is the hard limit RLIMIT_RSS, which Linux has not enforced since 2.4.
// A child inherits it through fork, setsid and exec; without CAP_SYS_RESOURCE a process can lower it, never raise it.
// From the top: 8 bits of magic, 20 bits of the configuration directory's hash, 36 bits that count runs downwards.
type runTag uint64

const (
	tagMagic   runTag = 0x5A << 56
	tagDirBits        = 20
	tagRunBits        = 36
	tagOwner   runTag = (1<<28 - 1) << tagRunBits // magic and directory
	untagged   runTag = unix.RLIM_INFINITY
)

// beneathServer says whether this process was started by a command of an aexec server, which could have lowered its tag.
func beneathServer() bool {
	own, ok := tagOf(0)
	return !ok || own != untagged
}

// prepareProcess makes this process the parent of all orphans below it (prctl(2), PR_SET_CHILD_SUBREAPER), forbids core
// dumps to it and its children, and gives the first tag of the directory.
func prepareProcess(id string) (runTag, error) {
	inherited, err := os.ReadDir("/proc/self/fd")
	err = errors.Join(err, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}))
	if err != nil {
		return 0, fmt.Errorf("prepare this process for running commands: %w", err)
	}
	for _, f := range inherited { // what the starter of the server left open is not for commands
		if fd, _ := strconv.Atoi(f.Name()); fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	own, _ := tagOf(0)
	if own>>56 == tagMagic>>56 { // an earlier runner of this process
		return own - 1, nil
	} else if own != untagged {
		return 0, errors.New("the limit RLIMIT_RSS is already lowered, and aexec marks its commands with it: " +
			"start it with ulimit -H -m unlimited (systemd: LimitRSS=infinity)")
	}
	dir := runTag(crc32.ChecksumIEEE([]byte(id))) & (1<<tagDirBits - 1)
	return tagMagic | dir<<tagRunBits | (1<<tagRunBits - 1), nil
}

// setTag marks what this process starts from now on.
func setTag(t runTag) error {
	return unix.Prlimit(0, unix.RLIMIT_RSS, &unix.Rlimit{Cur: uint64(t), Max: uint64(t)}, nil)
}

// tagOf reads a process's tag (0: this one's); false if there is no such process. Where prlimit(2) is not permitted, as the
// process has another user, /proc tells (slower).
func tagOf(pid int) (runTag, bool) {
	var limit unix.Rlimit
	if unix.Prlimit(pid, unix.RLIMIT_RSS, nil, &limit) == nil {
		return runTag(limit.Max), true
	}
	text, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/limits")
	_, line, found := strings.Cut(string(text), "Max resident set")
	var soft, hard string
	fmt.Sscan(line, &soft, &hard)
	tag, err := strconv.ParseUint(hard, 10, 64)
	if err != nil {
		return untagged, found // "unlimited"
	}
	return runTag(tag), true
}

// taggedProcesses lists all processes with a tag of the same directory as like, dead ones apart.
func taggedProcesses(like runTag) (pids []int) {
	return slices.DeleteFunc(allProcesses(), func(pid int) bool {
		its, _ := tagOf(pid)
		return its&tagOwner != like&tagOwner || pid == os.Getpid() || isDead(pid)
	})
}

func allProcesses() []int {
	paths, _ := filepath.Glob("/proc/[0-9]*")
	return numbers(paths)
}

// numbers are those of the paths whose last element is one, and these.
func numbers(paths []string) (list []int) {
	for _, path := range paths {
		if n, err := strconv.Atoi(filepath.Base(path)); err == nil {
			list = append(list, n)
		}
	}
	return list
}

// procStat is what /proc/PID/stat says after a process's name, which may hold anything but ends at the last ')' (proc_pid_stat(5)):
// its state, its parent, and at 17 the number of its threads. A process that is gone has none of it.
func procStat(pid int) []string {
	text, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
}

// isDead says whether nothing of a process runs: a zombie whose main thread alone has ended is alive.
func isDead(pid int) bool {
	f := procStat(pid)
	return len(f) < 18 || (f[0] == "Z" || f[0] == "X") && (f[17] == "0" || f[17] == "1")
}

// childList opens the list of one thread's children; nil: the kernel has no lists (CONFIG_PROC_CHILDREN). A child that was
// made with CLONE_PARENT is listed under the thread that made its maker, an orphan under the subreaper's main thread.
func childList(tid int) *os.File {
	list, _ := os.Open(fmt.Sprintf("/proc/self/task/%d/children", tid))
	return list
}

// childrenIn reads a list anew.
func childrenIn(list *os.File) []int {
	if list == nil {
		return slices.DeleteFunc(allProcesses(), func(pid int) bool {
			f := procStat(pid)
			return len(f) < 2 || f[1] != strconv.Itoa(os.Getpid())
		})
	}
	text, _ := io.ReadAll(io.NewSectionReader(list, 0, math.MaxInt64))
	return numbers(strings.Fields(string(text)))
}

// prepareSpawner readies the calling thread, which must be locked, for starting commands, and gives the list of its children;
// false: it is the main thread. no_new_privs cannot be unset.
func prepareSpawner(noNewPrivs bool) (*os.File, bool) {
	if unix.Gettid() == os.Getpid() {
		return nil, false
	}
	unix.KeyctlJoinSessionKeyring("") // keys of the server's session are not for commands; old kernels have none
	if noNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			panic(err) // fail safe: kernels since 3.5 cannot refuse it
		}
	}
	// The next start waits until this thread is back from the exec: a short slice has it run soon after it wakes (sched_setattr(2),
	// Linux 6.12; the least is 100,000 ns). Commands do not inherit it; nor would they a negative niceness, so that is left alone.
	if a, err := unix.SchedGetAttr(0, 0); err == nil && a.Policy == unix.SCHED_NORMAL && a.Nice >= 0 {
		a.Runtime, a.Flags = 100_000, a.Flags|unix.SCHED_FLAG_RESET_ON_FORK
		unix.SchedSetAttr(0, a, 0) // where that is not known, starts are a little later
	}
	return childList(unix.Gettid()), true
}

// startCommand makes the child (a session of its own, that dies with this thread) and returns when the kernel has done the
// exec. The launcher is this binary, that sets the limits and becomes the command, or else says on report why not.
func startCommand(c *command, path string, launcher bool, files []*os.File) (pid int, report *os.File, err error) {
	argv := c.what.argv
	if launcher {
		var theirs *os.File
		if report, theirs, err = os.Pipe(); err != nil {
			return 0, nil, err
		}
		defer theirs.Close()
		l := c.limits
		limits := strings.Fields(fmt.Sprint(l.CPUSeconds, l.FileBytes, l.OpenFiles, l.Processes, l.MemoryBytes)) // as limited has them
		argv = slices.Concat([]string{launcherName}, limits, []string{path}, argv)
		path, files = ownBinary(), slices.Concat(files, []*os.File{theirs})
	}
	pid, err = forkExec(c, path, argv, files, &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL})
	return pid, report, err
}

// launcherError waits until the launcher has become the command (nil), or gives the error that kept it from that. Without a
// report there is none.
func launcherError(report *os.File) error {
	defer report.Close()
	var errno [4]byte
	if n, _ := report.Read(errno[:]); n == len(errno) {
		return syscall.Errno(binary.NativeEndian.Uint32(errno[:]))
	}
	return nil
}

const (
	launcherName   = "aexec: launcher" // as argv[0]; no command name that aexec resolves to itself
	launcherReport = 3                 // descriptor
)

// launched is the launcher: when this process was started as one, it sets its limits and becomes the command. It runs before
// anything else in main. If it returns true, that failed: the errno that a shell would report is on the descriptor, and
// the process is to end.
func launched() bool {
	rest := 1 + len(limited) // of os.Args: the path, and the command's own
	if len(os.Args) < rest+2 || os.Args[0] != launcherName {
		return false
	}
	unix.CloseOnExec(launcherReport)
	env := os.Environ() // before memory may be short
	err := limit(os.Args[1:rest])
	if err == nil {
		err = syscall.Exec(os.Args[rest], os.Args[rest+1:], env)
	}
	errno, _ := errors.AsType[syscall.Errno](err) // 0 is a failure, too: only silence is none
	syscall.Write(launcherReport, binary.NativeEndian.AppendUint32(nil, uint32(errno)))
	return true
}

// limited is what exec.limits limits, in the launcher's order: the address space last, as the launcher lives in it, too.
var limited = []int{unix.RLIMIT_CPU, unix.RLIMIT_FSIZE, unix.RLIMIT_NOFILE, unix.RLIMIT_NPROC, unix.RLIMIT_AS}

// limit sets the limits of this process to these numbers (setrlimit(2)), never above the hard ones that it has; 0: left alone.
func limit(values []string) error {
	for i, resource := range limited {
		value, err := strconv.ParseUint(values[i], 10, 64)
		if err != nil {
			return err
		} else if value == 0 {
			continue
		}
		var had syscall.Rlimit
		syscall.Getrlimit(resource, &had) // if it failed, the limit would be 0
		value = min(value, had.Max)
		limit := syscall.Rlimit{Cur: value, Max: value}
		if resource == unix.RLIMIT_CPU && value < had.Max {
			limit.Max++ // at the hard limit comes SIGKILL: leave a second for SIGXCPU, which names the reason
		}
		if err := syscall.Setrlimit(resource, &limit); err != nil {
			return err
		}
	}
	return nil
}

// ownBinary is this very program, even when its file was replaced or removed.
func ownBinary() string { return "/proc/self/exe" }

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

// outputPipe is os.Pipe, but that the writing end is a command's: blocking, and unknown to the runtime's poller, which costs six
// system calls less.
func outputPipe(large bool) (read, write *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETFL, 0) // cannot fail: it is open
	if large {
		unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, streamBytes) // best effort: the user's quota may be used up (pipe(7))
	}
	return os.NewFile(uintptr(fds[0]), "|0"), os.NewFile(uintptr(fds[1]), "|1"), nil
}

// pendingBytes says how much waits in a pipe (FIONREAD, alias TIOCINQ).
func pendingBytes(f *os.File) (n int) {
	onDescriptor(f, func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return n
}

// waitExit returns when the child is dead, and leaves it unreaped, so that its number stays its own. A pidfd lets the runtime's
// poller do the waiting (pidfd_open(2)); where the kernel has none for it (before Linux 5.10) this holds a thread.
func waitExit(pid int) {
	dead := func(kind, id, flags int) bool {
		var info unix.Siginfo
		err := unix.Waitid(kind, id, &info, unix.WEXITED|unix.WNOWAIT|flags, nil)
		return err == nil && info.Signo != 0 || err != nil && err != unix.EINTR
	}
	if fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK); err == nil {
		f := os.NewFile(uintptr(fd), "pidfd")
		defer f.Close()
		if c, err := f.SyscallConn(); err == nil && c.Read(func(fd uintptr) bool { return dead(unix.P_PIDFD, int(fd), unix.WNOHANG) }) == nil {
			return
		}
	}
	for !dead(unix.P_PID, pid, 0) {
	}
}

// statChangeTime is the ctime: it moves with every change of content, mode or owner, and no program can set it back.
func statChangeTime(st *syscall.Stat_t) (sec, nsec int64) {
	return int64(st.Ctim.Sec), int64(st.Ctim.Nsec)
}

// hideProcess keeps other processes of the same user out of this one's memory, environment and descriptors (PR_SET_DUMPABLE(2const)).
func hideProcess() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }
