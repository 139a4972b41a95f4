// This file is the system calls that Linux and the other Unix systems have alike; what differs is in sys_linux.go and sys_other.go.
// It may call the kernel directly, as they may, and it exists so that nothing stands in both of them.
// It must not decide when anything happens: it holds no state and knows no request.
package main

import (
	"cmp"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// forkExec makes a child with these files as its descriptors from 0 on, and returns when the kernel has done the exec.
func forkExec(c *command, path string, argv []string, files []*os.File, sys *syscall.SysProcAttr) (pid int, err error) {
	var fds []uintptr
	for _, f := range files {
		fds = append(fds, f.Fd()) // which makes these ends blocking, as programs expect them
	}
	if c.cred != nil {
		sys.Credential = &syscall.Credential{Uid: c.cred.Uid, Gid: c.cred.Gid, Groups: c.cred.Groups}
	}
	return syscall.ForkExec(path, argv, &syscall.ProcAttr{Dir: c.cwd, Env: c.env, Files: fds, Sys: sys})
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
	err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if err == unix.EAGAIN || err == unix.EACCES {
		return false, nil
	}
	return err == nil, err
}

// lockLog takes the lock of an audit log (flock(2)); false if it is taken. Unlike fcntl's it holds between descriptors of one
// process too, and is not lost when the process closes another descriptor of the file.
func lockLog(f *os.File) (bool, error) {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
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

// signalName is "SIGSEGV" and the like; real-time signals have no names.
func signalName(s syscall.Signal) string {
	return cmp.Or(unix.SignalName(s), fmt.Sprintf("SIG%d", s))
}

// onDescriptor leaves the file as it is, where Fd would make it blocking and its deadlines void.
func onDescriptor(f *os.File, do func(fd uintptr)) {
	if c, err := f.SyscallConn(); err == nil {
		c.Control(do)
	}
}

// isTerminal says whether somebody may sit there. /dev/null is a character device too, but has no window (ioctl_tty(2)).
func isTerminal(f *os.File) (yes bool) {
	onDescriptor(f, func(fd uintptr) {
		_, err := unix.IoctlGetWinsize(int(fd), unix.TIOCGWINSZ)
		yes = err == nil
	})
	return yes
}
