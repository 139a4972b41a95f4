// This file is the system calls that Linux and the other Unix systems have alike, and what /proc says (nothing where there is none).
// It may call the kernel directly, as sys_linux.go and sys_other.go may, and it exists so that nothing stands in both of them.
// It must not decide when anything happens: it holds no state and knows no request.
package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// runTag marks every process of one run from birth: it is the hard limit RLIMIT_RSS, which Linux has not enforced since 2.4.
// A child inherits it through fork, setsid and exec; without CAP_SYS_RESOURCE a process can lower it, never raise it.
// From the top: 8 bits of magic, 20 bits of the configuration directory's hash, 36 bits that count runs downwards.
type runTag uint64

const (
	tagMagic   runTag = 0x5A << 56
	tagRunBits        = 36
	tagOwner   runTag = (1<<28 - 1) << tagRunBits // magic and directory
	untagged   runTag = unix.RLIM_INFINITY
)

// beneathServer says whether this process was started by a command of an aexec server, which could have lowered its tag.
func beneathServer() bool {
	own, ok := tagOf(0)
	return !ok || own != untagged
}

// prepareProcess readies this process for having commands as children, and gives the first tag of the directory.
func prepareProcess(id string) (runTag, error) {
	own, _ := tagOf(0)
	switch err := errors.Join(adoptOrphans(), unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})); {
	case err != nil:
		return 0, fmt.Errorf("prepare this process for running commands: %w", err)
	case own>>56 == tagMagic>>56: // an earlier runner of this process
		return own - 1, nil
	case own != untagged:
		return 0, errors.New("RLIMIT_RSS, with which aexec marks commands, is lowered: start it with ulimit -Hm unlimited (LimitRSS=infinity)")
	}
	inherited, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range numbers(inherited) {
		if fd > 2 {
			unix.CloseOnExec(fd) // what the starter of the server left open is not for commands
		}
	}
	return tagMagic | runTag(crc32.ChecksumIEEE([]byte(id))>>12)<<tagRunBits | (1<<tagRunBits - 1), nil
}

// numbers are the last elements of paths, where they are numbers.
func numbers(paths []string) (list []int) {
	for _, path := range paths {
		if n, err := strconv.Atoi(filepath.Base(path)); err == nil {
			list = append(list, n)
		}
	}
	return list
}

// tagged lists the processes that bear a tag of the same directory, this one apart.
func tagged(like runTag) []int {
	paths, _ := filepath.Glob("/proc/[0-9]*")
	return slices.DeleteFunc(numbers(paths), func(pid int) bool {
		its, _ := tagOf(pid)
		return its&tagOwner != like&tagOwner || pid == os.Getpid()
	})
}

// isDead says whether a process is there and nothing of it runs: a zombie whose main thread alone has ended is alive. Its name
// may hold anything, but ends at the last ')'; after that come its state, at 0, and the number of its threads (proc_pid_stat(5)).
func isDead(pid int) bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	return len(f) > 17 && (f[0] == "Z" || f[0] == "X") && (f[17] == "0" || f[17] == "1")
}

// waitExit returns when the child is dead, and leaves it unreaped, so that its number stays its own (waitid(2); 1 is P_PID). With a
// pidfd the runtime's poller waits; where there is none, a thread is held, and at a limit of tasks one more would be fatal.
func waitExit(pid int) {
	watch, info := os.NewFile(uintptr(pidfd(pid)), "pidfd"), new([16]uint64)
	defer watch.Close()
	dead := func(flags uintptr) bool {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, 1, uintptr(pid), uintptr(unsafe.Pointer(info)), flags|syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		return err != syscall.EINTR && (err != 0 || info[0] != 0)
	}
	if c, err := watch.SyscallConn(); err == nil {
		c.Read(func(uintptr) bool { return dead(syscall.WNOHANG) })
	}
	for !dead(0) {
	}
}

// signalName is "SIGSEGV" and the like; real-time signals have no names.
func signalName(s syscall.Signal) string {
	return cmp.Or(unix.SignalName(s), fmt.Sprintf("SIG%d", s))
}

const launcherName = "aexec: launcher" // as argv[0]; no command name that aexec resolves to itself

// limited is what exec.limits limits, in the order of the launcher's arguments; the last one is in its own way, too.
var limited = []int{unix.RLIMIT_CPU, unix.RLIMIT_FSIZE, unix.RLIMIT_NOFILE, unix.RLIMIT_NPROC, unix.RLIMIT_AS}

// startCommand makes the child, with the files as its descriptors from 0 on, and returns when the kernel has done the exec.
// The launcher is this binary, that sets the limits and becomes the command, or else says on report why not.
func startCommand(c *command, tag runTag, path string, launcher bool, files []*os.File) (pid int, report *os.File, err error) {
	argv, sys := c.what.argv, childAttributes()
	if launcher && runtime.GOOS != "linux" {
		return 0, nil, errors.New("exec.limits need Linux: set them to 0")
	} else if launcher {
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
	var fds []uintptr
	for _, f := range files {
		fds = append(fds, f.Fd()) // which makes these ends blocking, as programs expect them
	}
	if c.cred != nil {
		sys.Credential = &syscall.Credential{Uid: c.cred.Uid, Gid: c.cred.Gid, Groups: c.cred.Groups}
	}
	if err = setTag(tag); err == nil {
		pid, err = syscall.ForkExec(path, argv, &syscall.ProcAttr{Dir: c.cwd, Env: c.env, Files: fds, Sys: sys})
	}
	return pid, report, err
}

// launcherError waits until the launcher, if there is one, has become the command (nil), or gives what kept it from that.
func launcherError(report *os.File) error {
	defer report.Close()
	var errno [1]byte
	if n, _ := report.Read(errno[:]); n == 0 {
		return nil
	}
	return syscall.Errno(errno[0])
}

// launched is the launcher: if this process was started as one, it sets its limits (0: left alone), never above the hard ones that
// it has, and becomes the command, before anything else in main. If it returns true, that failed, and the process is to end.
func launched() bool {
	rest := 1 + len(limited) // of os.Args: the path, and the command's own
	if len(os.Args) < rest+2 || os.Args[0] != launcherName {
		return false
	}
	const report = 3 // the descriptor after the standard ones
	unix.CloseOnExec(report)
	env, failure := os.Environ(), error(nil) // before memory may be short
	for i, resource := range limited {
		var had syscall.Rlimit
		limit, err := strconv.ParseUint(os.Args[1+i], 10, 64)
		if err = cmp.Or(err, syscall.Getrlimit(resource, &had)); err == nil && limit > 0 {
			hard := limit
			if resource == unix.RLIMIT_CPU {
				hard++ // there comes SIGKILL: leave a second for SIGXCPU, which names the reason
			}
			err = syscall.Setrlimit(resource, &syscall.Rlimit{Cur: min(limit, had.Max), Max: min(hard, had.Max)})
		}
		failure = cmp.Or(failure, err)
	}
	if failure == nil {
		failure = syscall.Exec(os.Args[rest], os.Args[rest+1:], env)
	}
	errno, _ := errors.AsType[syscall.Errno](failure) // 0 is a failure, too: only silence is none
	syscall.Write(report, []byte{byte(errno)})
	return true
}

// execKeeping becomes another program (execve(2)) that has f open, too, beside the standard files; it returns only if it fails.
func execKeeping(path string, argv, env []string, f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
		return err
	}
	return syscall.Exec(path, argv, env)
}

// lockFile takes the write lock on a whole file (fcntl(2), F_SETLK); false if another process has one. It lasts until this
// process ends, through exec too, or closes any descriptor of that file, even another one than f.
func lockFile(f *os.File) (bool, error) {
	return unlessTaken(unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
}

// lockLog takes the lock of an audit log (flock(2)); false if it is taken. Unlike fcntl's it holds between descriptors of one
// process too, and is not lost when the process closes another descriptor of the file.
func lockLog(f *os.File) (bool, error) {
	return unlessTaken(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
}

func unlessTaken(err error) (bool, error) {
	if err == unix.EAGAIN || err == unix.EACCES {
		return false, nil
	}
	return err == nil, err
}

// lockHolder asks the kernel who has a lock on the file (F_GETLK). The pid is 0 or less where it cannot be seen from here.
func lockHolder(f *os.File) (pid int, held bool, err error) {
	l := unix.Flock_t{Type: unix.F_WRLCK}
	err = unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l)
	return int(l.Pid), err == nil && l.Type != unix.F_UNLCK, err
}

// isTerminal says whether somebody may sit there. /dev/null is a character device too, but has no window (ioctl_tty(2)).
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil
}

// growPipe is best effort: the user's quota may be used up (pipe(7)).
func growPipe(f *os.File, size int) { unix.FcntlInt(f.Fd(), setPipeSize, size) }

// pendingBytes says how much waits in a pipe. Fd would make it blocking, and its deadlines void.
func pendingBytes(f *os.File) (n int) {
	if c, err := f.SyscallConn(); err == nil {
		c.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), bytesWaiting) })
	}
	return n
}
