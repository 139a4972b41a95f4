// This file runs one approved argv to its end, and keeps the slots.
// It may start and signal commands, and it alone.
// It must not decide: what it runs was approved in acl.go, and it runs exactly that.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
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

// end is why a run ended.
type end string

const (
	endExit     end = "exit"          // by itself: exit code or signal
	endTimeout  end = "timeout"       // command.timeout
	endOutput   end = "output_limit"  // command.maxBytes
	endClient   end = "client_gone"   // the context was cancelled, or the sink failed
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
	msg  string
}

func (e *startError) Error() string { return e.msg }

// runner starts and ends commands; one for the whole process (a second one would take the first one's commands for strays).
type runner struct {
	null     *os.File // /dev/null, shared by all commands as standard input
	stopping chan struct{}
	starting sync.Mutex // held from setting the tag to the birth of the child that inherits it
	burying  sync.Mutex // held from listing children to signalling and reaping them: what is reaped in between may become another's number

	mu       sync.Mutex
	slots    int
	next     runTag          // of the next run; goes down, as a tag can only be lowered
	live     map[runTag]bool // runs that have begun and are not swept yet; true: their first process is among the leaders
	leaders  map[int]bool    // first processes: reaped by their own run only
	strays   map[int]bool    // children that were there before the runner, not ours to end
	spawners [2]chan func()  // locked threads: 0 without, 1 with no_new_privs
	direct   map[string]direct
	lists    []*childList // of the main thread and of every spawner's
}

// newRunner prepares this process for running commands: subreaper, no core dumps, the first tag.
// id separates the runs of one configuration directory from those of another.
func newRunner(id string) (*runner, error) {
	// A start holds one of Go's processors until the kernel has done the exec: never let that be the only one.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	first, err := prepareProcess(id)
	if err != nil {
		return nil, err
	}
	r := &runner{null: null, stopping: make(chan struct{}), next: first,
		live: map[runTag]bool{}, leaders: map[int]bool{}, strays: map[int]bool{}, direct: map[string]direct{}}
	r.lists = []*childList{openChildList(os.Getpid())}
	for _, pid := range r.lists[0].pids() {
		r.strays[pid] = true
	}
	return r, nil
}

// endLeftovers kills what a crashed server of the same id left alive, and says how many processes that were.
// Only a server calls it, and only when it holds the pid file's lock: another server's commands would look like leftovers.
func (r *runner) endLeftovers() int {
	ended := map[int]bool{}
	for begun := time.Now(); time.Since(begun) < sweepPatience; time.Sleep(sweepPauseMax) {
		left := taggedProcesses(r.next)
		if len(left) == 0 {
			break
		}
		for _, pid := range left {
			ended[pid] = true
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return len(ended)
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

// shutdown ends every running command with endShutdown and lets no further one start. It does not wait.
func (r *runner) shutdown() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.shuttingDown() {
		close(r.stopping)
	}
}

// shuttingDown says whether shutdown was called.
func (r *runner) shuttingDown() bool {
	select {
	case <-r.stopping:
		return true
	default:
		return false
	}
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
	deadline := time.NewTimer(c.timeout)
	defer deadline.Stop()
	p, err := openPlumbing(c, r.null)
	if err != nil {
		return outcome{end: endInternal, err: err}
	}
	defer p.close()
	x := &run{runner: r, command: c, ctx: ctx, deadline: deadline.C, plumbing: p, started: make(chan struct{})}
	defer x.finish()

	go x.start()
	why := x.until(x.started)
	if why != endExit && !x.abortStart() {
		return outcome{end: why}
	}
	p.closeChildSide()
	if x.err != nil {
		return startFailure(x.err)
	}
	p.pump()
	why, status := x.attend(why)
	p.drain()
	return p.outcome(why, status)
}

func startFailure(err error) outcome {
	if s, ok := errors.AsType[*startError](err); ok {
		return outcome{end: endStart, exited: true, exitCode: s.code, err: err}
	}
	return outcome{end: endInternal, err: err}
}

// run is one command on its way.
type run struct {
	*runner
	command
	*plumbing
	ctx      context.Context
	deadline <-chan time.Time
	tag      runTag // 0 before the fork

	phase   atomic.Int32  // startWaiting, startForking (tag is set) or startAborted
	started chan struct{} // closed when pid and err are set
	pid     int
	err     error
}

const (
	startWaiting = iota
	startForking
	startAborted
)

// begin numbers the run. Numbers are given in the order of the forks, as a tag can only go down.
func (x *run) begin() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.tag = x.next
	x.next--
	x.live[x.tag] = false
}

// finish ends the number's life: what still bears it is hostile from now on.
func (x *run) finish() {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.live, x.tag)
}

// until waits for ready (endExit), or for the first reason to end the command.
func (x *run) until(ready <-chan struct{}) end {
	tick := time.NewTicker(orphanRound)
	defer tick.Stop()
	for {
		select {
		case <-ready:
			return endExit
		case <-x.ctx.Done():
			return endClient
		case <-x.deadline:
			return endTimeout
		case why := <-x.broken:
			return why
		case <-x.stopping:
			return endShutdown
		case <-tick.C:
			x.reapOrphans()
		}
	}
}

// start finds the file and has the spawner thread start it. It has a goroutine of its own, as looking at a file may hang.
func (x *run) start() {
	path, direct, err := x.locate(x.what.argv[0], x.cwd, x.pathDirs, x.cred)
	if err != nil {
		x.err = err
		close(x.started)
		return
	}
	spec := startSpec{path: path, argv: x.what.argv, env: x.env, dir: x.cwd, files: x.childSide[:], cred: x.cred}
	if !direct || x.limits != (rlimits{}) {
		spec.launch(x.limits)
	}
	x.spawner(x.noNewPrivs) <- func() {
		if x.pid, x.err = x.fork(&spec); x.err != nil || spec.status != nil {
			go x.settle(&spec) // which may take longer than this thread has
			return
		}
		close(x.started)
	}
}

// settle waits until the launcher has become the command, and says why a start failed.
func (x *run) settle(spec *startSpec) {
	defer close(x.started)
	if x.err == nil {
		if x.err = spec.confirm(); x.err != nil {
			x.bury(x.pid) // the launcher itself, on its way out
		}
	}
	x.err = explainStart(x.err, x.what.argv[0], x.cwd)
}

// fork makes the child, on the spawner thread, with the run's tag on it from birth.
func (x *run) fork(spec *startSpec) (pid int, err error) {
	x.starting.Lock()
	defer x.starting.Unlock()
	x.begin()
	if err = setTag(x.tag); err != nil {
		return 0, err
	}
	if !x.phase.CompareAndSwap(startWaiting, startForking) {
		x.finish()
		return 0, errAborted
	}
	// The kernel holds this thread until the exec is done. locate and the launcher keep what is known to hang away
	// from here; whatever else does is killed unborn, and not tried again: nothing may ever run twice.
	guard := time.AfterFunc(startPatience, func() { x.kill(x.tag) })
	pid, err = spec.start()
	if !guard.Stop() && err == nil {
		err = errHungStart
		go x.bury(pid)
	}
	if err == nil {
		x.mu.Lock()
		x.leaders[pid], x.live[x.tag] = true, true
		x.mu.Unlock()
	}
	return pid, err
}

// spawner gives the thread that starts commands, and makes it at first use. It is locked to its goroutine and never ends,
// as a command's parent-death signal comes when the thread that started it ends, not when the process does (prctl(2)).
func (r *runner) spawner(noNewPrivs bool) chan<- func() {
	r.mu.Lock()
	defer r.mu.Unlock()
	kind := 0
	if noNewPrivs {
		kind = 1
	}
	if r.spawners[kind] == nil {
		r.spawners[kind] = make(chan func())
		ready := make(chan *childList)
		go spawn(noNewPrivs, r.spawners[kind], ready)
		if list := <-ready; list != nil {
			r.lists = append(r.lists, list)
		}
	}
	return r.spawners[kind]
}

// spawn is the life of one spawner thread. Never the main thread: that one's list is of adopted orphans alone.
func spawn(noNewPrivs bool, jobs <-chan func(), ready chan<- *childList) {
	runtime.LockOSThread()
	if onMainThread() {
		go spawn(noNewPrivs, jobs, ready)
		select {}
	}
	ready <- prepareSpawner(noNewPrivs)
	for job := range jobs {
		job()
	}
}

// abortStart gives up a start for another reason than its own failure. false: nothing was started, nor will be;
// true: pid and err are set, as after any start.
func (x *run) abortStart() bool {
	if x.phase.CompareAndSwap(startWaiting, startAborted) {
		x.closeChildSide()
		return false
	}
	for begun := time.Now(); time.Since(begun) < sweepPatience; {
		select {
		case <-x.started:
			return true
		case <-time.After(sweepPauseMax):
			x.kill(x.tag) // it may hang in the exec, unborn
		}
	}
	go func() { // it cannot be killed now: end it when the kernel lets go
		<-x.started
		x.closeChildSide()
		if x.err == nil {
			x.bury(x.pid)
		}
	}()
	return false
}

// attend sees a started command through to where nothing of it is alive. why is endExit, or the reason to end it at once.
func (x *run) attend(why end) (end, syscall.WaitStatus) {
	exited := make(chan struct{})
	go func() {
		waitExit(x.pid)
		close(exited)
	}()
	if why == endExit {
		why = x.until(exited)
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
	for begun := time.Now(); ; {
		syscall.Kill(-x.pid, syscall.SIGKILL)
		select {
		case <-exited:
			status := x.reap(x.pid)
			x.sweep(x.tag)
			return why, status
		case <-time.After(sweepPauseMax):
		}
		x.kill(x.tag) // an escaped tracer can hold the leader
		if time.Since(begun) > sweepPatience {
			go x.bury(x.pid) // it hangs in the kernel, beyond any signal: reap it when it comes back
			return why, syscall.WaitStatus(syscall.SIGKILL)
		}
	}
}

// bury kills a process group and reaps its leader, however long that takes.
func (r *runner) bury(pid int) {
	syscall.Kill(-pid, syscall.SIGKILL)
	syscall.Kill(pid, syscall.SIGKILL) // before setsid it leads no group
	waitExit(pid)
	r.reap(pid)
}

// reap takes a leader's exit status, after which its number may be another's.
func (r *runner) reap(pid int) syscall.WaitStatus {
	r.burying.Lock()
	defer r.burying.Unlock()
	status := syscall.WaitStatus(syscall.SIGKILL) // if somebody was there before us
	for {
		var its syscall.WaitStatus
		_, err := syscall.Wait4(pid, &its, 0, nil)
		if err == nil {
			status = its
		}
		if err != syscall.EINTR {
			break
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.leaders, pid)
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

// kill is one round of a sweep; it says whether there was anything to end.
func (r *runner) kill(tag runTag) (found bool) {
	r.burying.Lock()
	defer r.burying.Unlock()
	for _, pid := range r.children() {
		doomed, leader := r.judge(pid, tag)
		if !doomed {
			continue
		}
		err, reaped := syscall.Kill(pid, syscall.SIGKILL), 0
		if !leader {
			reaped, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
		// What is beyond us (another user's) or dead but not ours to bury (traced) is not waited for: it would hold up every run.
		found = found || reaped > 0 || err == nil && !isDead(pid)
	}
	return found
}

// judge says whether a child is to be ended with the run of this tag, and whether it is a leader, whose own run reaps it.
func (r *runner) judge(pid int, tag runTag) (doomed, leader bool) {
	its, ok := tagOf(pid)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !ok || r.strays[pid] && !its.tagged() {
		return false, false
	}
	started, alive := r.live[its]
	return its == tag || !alive, r.leaders[pid] || alive && !started
}

// children lists the children of every thread that can have any.
func (r *runner) children() (pids []int) {
	r.mu.Lock()
	lists := r.lists
	r.mu.Unlock()
	for _, l := range lists {
		pids = append(pids, l.pids()...)
	}
	return pids
}

// reapOrphans takes the exit status of what a long run orphaned and what has died since: it would stay a zombie until the sweep.
func (r *runner) reapOrphans() {
	r.burying.Lock()
	defer r.burying.Unlock()
	for _, pid := range r.lists[0].pids() {
		r.mu.Lock()
		ours := !r.leaders[pid] && !r.strays[pid]
		r.mu.Unlock()
		if ours {
			syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
	}
}

var (
	errAborted   = errors.New("the start was given up")
	errHungStart = &startError{126, fmt.Sprintf("the system took longer than %v to start it: its file is held by a lease or lies on a file system that does not answer", startPatience)}
)

// explainStart turns what the kernel answered to execve(2) into what a shell would report.
func explainStart(err error, name, cwd string) error {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return err
	}
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR:
		if _, err := os.Stat(cwd); err != nil {
			return &startError{126, fmt.Sprintf("the working directory %q cannot be entered: %v", cwd, errno)}
		}
		return &startError{127, fmt.Sprintf("%q was not found, or the interpreter that it names was not", name)}
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.EPERM:
		return fmt.Errorf("no process could be made for %q: %w", name, err)
	}
	return &startError{126, fmt.Sprintf("%q cannot be executed: %v", name, errno)}
}

// locate finds the file of a command name: this very binary for aexec and ae, else on the path, never in the current directory
// unless the name has a slash. direct says that an exec of it will not hang.
func (r *runner) locate(name, cwd string, pathDirs []string, cred *credential) (path string, direct bool, err error) {
	if name == "aexec" || name == "ae" {
		return ownBinary(), true, nil
	}
	slash := strings.Contains(name, "/")
	if slash { // as the kernel reads it: cleaned, "sudo/." would be a name that no deny rule knows
		if pathDirs = []string{""}; !filepath.IsAbs(name) {
			pathDirs[0] = cwd + "/"
		}
		if cred != nil { // what that user may see is the kernel's to say, once it is that user
			return pathDirs[0] + name, false, nil
		}
	}
	failure := &startError{127, fmt.Sprintf("%q was not found", name)}
	for _, dir := range pathDirs {
		path := dir + name
		if !slash {
			path = filepath.Join(dir, name)
		}
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, os.ErrPermission) && slash: // else the file may not even be there
			failure = &startError{126, fmt.Sprintf("%q cannot be looked at: permission denied", path)}
		case err != nil:
		case !info.Mode().IsRegular():
			failure = &startError{126, fmt.Sprintf("%q is not a file", path)}
		case info.Mode()&0o111 == 0:
			failure = &startError{126, fmt.Sprintf("%q is not executable", path)}
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
	file := versionOf(info)
	if ok && known.file == file && known.dir == versionAt(filepath.Dir(known.real)) {
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
	r.direct[path] = direct{real, file, versionAt(filepath.Dir(real))}
	return real, true
}
