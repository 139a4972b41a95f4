// This file runs one approved argv to its end, and keeps the slots.
// It may start and signal commands, and it alone.
// It must not decide: what it runs was approved in acl.go, and it runs exactly that.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	startPatience = 3 * time.Second // how long the kernel may take over one exec before it is given up; probe catches what is known to hang
	sweepPatience = 5 * time.Second // how long a killed process may take to die (it hangs in the kernel: a dead network file system)
	sweepPauseMin = 100 * time.Microsecond
	sweepPauseMax = 5 * time.Millisecond
	maxDirect     = 1000        // programs that are remembered to start at once
	orphanRound   = time.Second // how often dead orphans of a long run are reaped

	// The lists of children that the kernel gives are not atomic: one empty round may have missed a process that was
	// just handed over. With two rounds always, 3 of 2,278 hostile runs left something; with five after a hit, none of 13,000.
	quietRounds         = 2
	quietRoundsAfterHit = 5

	unborn, reaped = 0, -1 // in runner.live: the first process has no number yet, or none any more
)

// command is everything one run needs, taken from one snapshot.
type command struct {
	what       approved
	env        []string
	cwd        string
	pathDirs   []string    // where a name without a slash is looked up, absolute
	cred       *credential // nil: the server's own user
	limits     rlimits
	noNewPrivs bool
	timeout    time.Duration
	killGrace  time.Duration
	maxBytes   int64  // of standard output and error together
	stdin      []byte // nil: empty
	sink       sink   // nil: captured in the outcome
}

// end is why a run ended. It is an error as the cause with which a run's context is cancelled.
type end string

func (e end) Error() string { return string(e) }

const (
	endExit     end = "exit"          // by itself: exit code or signal
	endTimeout  end = "timeout"       // command.timeout
	endOutput   end = "output_limit"  // command.maxBytes
	endClient   end = "client_gone"   // the request's context was cancelled, or the sink failed
	endShutdown end = "shutting_down" // runner.shutdown
	endStart    end = "start_failed"  // never ran: outcome.err, exit code 126 or 127 as a shell reports it
	endInternal end = "internal"      // aexec's own failure: outcome.err
)

// outcome is what came of one run. When run returns, nothing that the command started is alive.
type outcome struct {
	end                      end
	exitCode                 int    // valid if exited
	exited                   bool   // false: killed by a signal, or never ran
	signal                   string // "SIGSEGV"; "" if exited
	signalNumber             int
	err                      error  // endStart, endInternal: a sentence for the agent
	stdout, stderr           chunks // captured output, in pieces; empty with a sink
	stdoutBytes, stderrBytes int64  // raw bytes captured or handed to the sink
	duration                 time.Duration
}

// startError is why a command did not start, with the exit code that a shell would report.
type startError struct {
	code int // 126: found but not executable, 127: not found
	error
}

// runner starts and ends commands; one for the whole process (a second one would take the first one's commands for strays).
type runner struct {
	null     *os.File        // /dev/null, shared by all commands as standard input
	stopping context.Context // cancelled by shutdown
	shutdown func()          // ends every running command with endShutdown and lets no further one start; it does not wait
	starting sync.Mutex      // held from setting the tag to the birth of the child that inherits it

	// mu guards what follows. It is held from listing children to signalling and reaping them, too: what is reaped in
	// between may become another's number.
	mu       sync.Mutex
	slots    int
	next     runTag               // of the next run; goes down, as a tag can only be lowered
	live     map[runTag]int       // runs that have begun and are not swept yet: their first process, unborn or reaped
	strays   map[int]bool         // children that were there before the runner, not ours to end
	spawners map[bool]chan func() // locked threads, without and with no_new_privs
	direct   map[string]direct
	lists    []*os.File // of children: the main thread's and every spawner's
}

// newRunner prepares this process for running commands: subreaper, no core dumps, the first tag.
// id separates the runs of one configuration directory from those of another.
func newRunner(id string) (*runner, error) {
	// A start holds one of Go's processors until the kernel has done the exec: one more, for all else to go on meanwhile.
	runtime.GOMAXPROCS(1 + runtime.GOMAXPROCS(0))
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	first, err := prepareProcess(id)
	if err != nil {
		return nil, err
	}
	r := &runner{null: null, next: first, live: map[runTag]int{}, strays: map[int]bool{},
		spawners: map[bool]chan func(){}, direct: map[string]direct{}}
	r.stopping, r.shutdown = context.WithCancel(context.Background())
	r.lists = []*os.File{childList(os.Getpid())}
	for _, pid := range r.children() {
		r.strays[pid] = true
	}
	return r, nil
}

// endLeftovers kills what a crashed server of the same id left alive, and says how many processes that were.
// Only a server calls it, and only when it holds the pid file's lock: another server's commands would look like leftovers.
func (r *runner) endLeftovers() int {
	most := 0
	for begun := time.Now(); time.Since(begun) < sweepPatience; time.Sleep(sweepPauseMax) {
		left := taggedProcesses(r.next)
		if len(left) == 0 {
			break
		}
		most = max(most, len(left))
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return most
}

// acquire takes one of limit slots; false if all are taken or the runner shuts down. release is called when run has
// returned and its end is recorded.
func (r *runner) acquire(limit int) (release func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shuttingDown() || r.slots >= limit {
		return nil, false
	}
	r.slots++
	return sync.OnceFunc(func() {
		r.mu.Lock()
		r.slots--
		r.mu.Unlock()
	}), true
}

// shuttingDown says whether shutdown was called.
func (r *runner) shuttingDown() bool { return r.stopping.Err() != nil }

// run is one command on its way.
type run struct {
	*runner
	command
	*plumbing
	ctx     context.Context // done when the run is to end; ended says why
	tag     runTag          // 0 before the fork
	started chan struct{}   // closed when pid and err are set
	pid     int             // 0: nothing was started
	err     error           // why the command did not start, though its process may have
}

// ended is why a run's context was cancelled: by us with the reason, else with the request's, as its client has gone.
func ended(ctx context.Context) end {
	if why, ok := context.Cause(ctx).(end); ok {
		return why
	}
	return endClient
}

// run runs the command to its end. ctx is the request's: its cancellation means that the client is gone.
//
// A run is starting (until the kernel has taken the exec), running (until its first process is gone, or something ends it),
// ending (TERM, grace, KILL), and gone (group killed, leader reaped, escapes swept, pipes drained), in this order.
func (r *runner) run(ctx context.Context, c command) (o outcome) {
	begun := time.Now()
	defer func() { o.duration = time.Since(begun) }()
	if len(c.what.argv) == 0 {
		return outcome{end: endInternal, err: errors.New("the command was not approved")}
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer time.AfterFunc(c.timeout, func() { stop(endTimeout) }).Stop()
	defer context.AfterFunc(r.stopping, func() { stop(endShutdown) })()
	p, err := openPlumbing(c, stop)
	defer p.close()
	if err != nil {
		p.closeChildSide()
		return outcome{end: endInternal, err: err}
	}
	x := &run{runner: r, command: c, ctx: ctx, plumbing: p, started: make(chan struct{})}
	defer x.finish()

	go x.start()
	if !x.born() {
		return outcome{end: ended(ctx)}
	}
	p.closeChildSide()
	if x.pid > 0 {
		p.pump()
		why, status := x.attend()
		p.drain()
		o = p.outcome(why, status)
	}
	if failure, ok := errors.AsType[*startError](x.err); ok {
		return outcome{end: endStart, exited: true, exitCode: failure.code, err: x.err}
	} else if x.err != nil {
		return outcome{end: endInternal, err: x.err}
	}
	return o
}

// start finds the file and has the spawner thread start it. It has a goroutine of its own, as looking at a file may hang.
func (x *run) start() {
	path, direct, err := x.locate(&x.command)
	if err != nil {
		x.err = err
		close(x.started)
		return
	}
	x.spawner(x.noNewPrivs) <- func() { x.fork(path, !direct || x.limits != (rlimits{})) }
}

// fork makes the child, on the spawner thread, with the run's tag on it from birth; launcher: by way of that.
func (x *run) fork(path string, launcher bool) {
	x.starting.Lock()
	defer x.starting.Unlock()
	if !x.begin() {
		return // and nobody waits for it
	}
	var report *os.File
	if x.err = setTag(x.tag); x.err == nil {
		// The kernel holds this thread until the exec is done. locate and the launcher keep what is known to hang away
		// from here; whatever else does is killed unborn, and not tried again: nothing may ever run twice.
		guard := time.AfterFunc(startPatience, func() { x.kill(x.tag) })
		files := []*os.File{cmp.Or(x.childSide[0], x.null), x.childSide[1], x.childSide[2]}
		x.pid, report, x.err = startCommand(&x.command, path, launcher, files)
		if !guard.Stop() && x.err == nil {
			x.err = &startError{126, fmt.Errorf("the system took longer than %v to start it: a lease holds its file, a file system does not answer, "+
				"or the machine is overloaded", startPatience)}
		}
	}
	x.mu.Lock()
	if _, ok := x.live[x.tag]; ok && x.pid > 0 {
		x.live[x.tag] = x.pid
	}
	x.mu.Unlock()
	if x.err == nil && report == nil {
		close(x.started)
	} else {
		go x.settle(report) // which may take longer than this thread has
	}
}

// begin numbers the run, in the order of the forks, as a tag can only go down. false: the run was given up before.
func (x *run) begin() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ctx.Err() != nil {
		return false
	}
	x.tag = x.next
	x.next--
	x.live[x.tag] = unborn
	return true
}

// finish ends the number's life: what still bears it is hostile from now on.
func (x *run) finish() {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.live, x.tag)
}

// settle waits until the launcher has become the command, and says why a start failed.
func (x *run) settle(report *os.File) {
	defer close(x.started)
	if failure := launcherError(report); x.err == nil {
		x.err = failure
	}
	x.err = explainStart(x.err, x.what.argv[0], x.cwd)
}

// spawner gives the thread that starts commands, and makes it at first use. It is locked to its goroutine and never ends,
// as a command's parent-death signal comes when the thread that started it ends, not when the process does (prctl(2)).
func (r *runner) spawner(noNewPrivs bool) chan<- func() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.spawners[noNewPrivs] == nil {
		r.spawners[noNewPrivs] = make(chan func())
		ready := make(chan *os.File)
		go spawn(noNewPrivs, r.spawners[noNewPrivs], ready)
		r.lists = append(r.lists, <-ready)
	}
	return r.spawners[noNewPrivs]
}

// spawn is the life of one spawner thread. Never the main thread: that one's list is of adopted orphans alone.
func spawn(noNewPrivs bool, jobs <-chan func(), ready chan<- *os.File) {
	runtime.LockOSThread()
	list, ok := prepareSpawner(noNewPrivs)
	if !ok { // it keeps the main thread from the next one
		go spawn(noNewPrivs, jobs, ready)
		select {}
	}
	ready <- list
	for job := range jobs {
		job()
	}
}

// born waits until started, or until the run is to end. false: nothing was started, nor will be; or it hangs in the kernel
// beyond any signal, and the rounds of other runs end it when it comes back.
func (x *run) born() bool {
	select {
	case <-x.started:
		return true
	case <-x.ctx.Done():
	}
	x.mu.Lock()
	begun := x.tag != 0
	x.mu.Unlock()
	if !begun {
		x.closeChildSide()
	}
	return begun && x.killUntil(x.started) // else what the start still uses is the garbage collector's to close
}

// attend sees a started command through to where nothing of it is alive, and says why that was, and how its leader ended.
func (x *run) attend() (why end, status syscall.WaitStatus) {
	exited := make(chan struct{})
	go func() {
		waitExit(x.pid)
		close(exited)
	}()
	for tick := time.Tick(orphanRound); why == ""; {
		select {
		case <-exited:
			why = endExit
		case <-x.ctx.Done():
			why = ended(x.ctx)
		case <-tick:
			x.kill(0)
		}
	}
	if why != endExit {
		syscall.Kill(-x.pid, syscall.SIGTERM)
		syscall.Kill(-x.pid, syscall.SIGCONT) // a stopped process takes no TERM
		select {
		case <-exited:
		case <-time.After(x.killGrace):
		}
	}
	// While the leader is unreaped, its number and so its group's cannot belong to anybody else.
	syscall.Kill(-x.pid, syscall.SIGKILL)
	if !x.killUntil(exited) { // an escaped tracer can hold the leader
		return why, syscall.WaitStatus(syscall.SIGKILL) // it hangs in the kernel: later rounds reap it
	}
	status = x.reap()
	x.sweep(x.tag)
	return why, status
}

// killUntil ends what bears the run's tag until that is done; false if it takes longer than sweepPatience.
func (x *run) killUntil(done <-chan struct{}) bool {
	for begun := time.Now(); time.Since(begun) < sweepPatience; {
		select {
		case <-done:
			return true
		case <-time.After(sweepPauseMax):
			x.kill(x.tag)
		}
	}
	return false
}

// reap takes the dead leader's exit status, after which its number may be another's.
func (x *run) reap() (status syscall.WaitStatus) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.live[x.tag] = reaped
	if pid, _ := syscall.Wait4(x.pid, &status, syscall.WNOHANG, nil); pid != x.pid {
		return syscall.WaitStatus(syscall.SIGKILL) // fail safe: nobody else reaps it, and it never looks as if it had ended well
	}
	return status
}

// sweep ends everything that bears the tag or a tag of no live run, and returns when nothing of that is left:
// killing a process hands its children to us, the subreaper, where the next round finds them.
func (r *runner) sweep(tag runTag) {
	pause, begun := sweepPauseMin, time.Now()
	for quiet, need := 0, quietRounds; quiet < need && time.Since(begun) < sweepPatience; {
		if !r.kill(tag) {
			quiet++
			continue
		}
		quiet, need = 0, quietRoundsAfterHit
		time.Sleep(pause)
		pause = min(2*pause, sweepPauseMax)
	}
}

// kill is one round of a sweep; it says whether there was anything to end. What is dead is reaped, a live run's orphans
// too, but a leader by its own run alone: so not either what bears the tag of a run whose leader has no number yet.
func (r *runner) kill(tag runTag) (found bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	leaders := map[int]bool{}
	for _, pid := range r.live {
		leaders[pid] = true
	}
	for _, pid := range r.children() {
		its, ok := tagOf(pid)
		if !ok {
			continue
		}
		first, alive := r.live[its]
		doomed := its == tag || !alive
		killed := doomed && syscall.Kill(pid, syscall.SIGKILL) == nil
		taken := 0
		if !leaders[pid] && !(alive && first == unborn) {
			taken, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
		// What is beyond us (another user's) or dead but not ours to bury (traced) is not waited for: it would hold up every run.
		found = found || doomed && taken > 0 || killed && !isDead(pid)
	}
	return found
}

// children lists the children of every thread that can have any, but for strays. r.mu is held.
func (r *runner) children() (pids []int) {
	for _, list := range r.lists {
		pids = append(pids, childrenIn(list)...)
	}
	return slices.DeleteFunc(pids, func(pid int) bool { return r.strays[pid] })
}

// explainStart turns what the kernel answered to execve(2) into what a shell would report.
func explainStart(err error, name, cwd string) error {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return err
	}
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR:
		if _, err := os.Stat(cwd); err != nil {
			return &startError{126, fmt.Errorf("the working directory %q cannot be entered: %w", cwd, errno)}
		}
		return &startError{127, fmt.Errorf("%q was not found, or the interpreter that it names was not", name)}
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.EPERM:
		return fmt.Errorf("no process could be made for %q: %w", name, err)
	}
	return &startError{126, fmt.Errorf("%q cannot be executed: %w", name, errno)}
}

// locate finds the file of a command name: this very binary for aexec and ae, else on the path, never in the current directory
// unless the name has a slash. direct says that an exec of it will not hang.
func (r *runner) locate(c *command) (path string, direct bool, err error) {
	name := c.what.argv[0]
	if name == "aexec" || name == "ae" {
		return ownBinary(), true, nil
	}
	if strings.Contains(name, "/") { // as the kernel reads it: cleaned, "sudo/." would be a name that no deny rule knows
		if path = name; !filepath.IsAbs(name) {
			path = c.cwd + "/" + name
		}
		if info, err := os.Stat(path); err == nil && c.cred == nil { // what another user may see, the kernel knows when it is that user
			path, direct = r.atOnce(path, info)
		}
		return path, direct, nil // the kernel also says best what is wrong with it
	}
	failure := &startError{127, fmt.Errorf("%q was not found", name)}
	for _, dir := range c.pathDirs {
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		switch {
		case err != nil || !info.Mode().IsRegular():
		case info.Mode()&0o111 == 0:
			failure = &startError{126, fmt.Errorf("%q is not executable", path)}
		default:
			path, direct = r.atOnce(path, info)
			return path, direct, nil
		}
	}
	return "", false, failure
}

// direct is a program that starts at once, and the states of its file and directory in which that was found.
type direct struct {
	real      string
	file, dir fileVersion
}

// atOnce is startsAtOnce, remembered for as long as neither the file nor its directory changes.
func (r *runner) atOnce(path string, info os.FileInfo) (string, bool) {
	r.mu.Lock()
	known, ok := r.direct[path]
	r.mu.Unlock()
	if ok && known == (direct{known.real, versionOf(info, nil), versionOf(os.Lstat(filepath.Dir(known.real)))}) {
		return known.real, true
	}
	real, ok := startsAtOnce(path)
	if !ok {
		return path, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.direct) >= maxDirect {
		clear(r.direct) // an agent may spell one path in many ways
	}
	r.direct[path] = direct{real, versionOf(info, nil), versionOf(os.Lstat(filepath.Dir(real)))}
	return real, true
}
