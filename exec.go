// This file runs one approved argv to its end, moves its input and output, and keeps the slots.
// It may start and signal commands, and it alone.
// It must not decide: what it runs was approved in acl.go, and it runs exactly that.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	startPatience = 3 * time.Second // how long the kernel may take over one exec before it is given up
	sweepPatience = 5 * time.Second // how long a killed process may take to die (it hangs in the kernel: a dead network file system)
	sweepPauseMin = 100 * time.Microsecond
	sweepPauseMax = 5 * time.Millisecond
	drainPatience = time.Second // how long a pipe may stay open and silent when nothing of the command is left
	orphanRound   = time.Second // how often dead orphans of a long run are reaped

	// The lists of children that the kernel gives are not atomic: one empty round may have missed a process that was
	// just handed over. With two rounds always, 3 of 2,278 hostile runs left something; with five after a hit, none of 13,000.
	quietRounds         = 2
	quietRoundsAfterHit = 5

	firstChunkBytes = 1 << 10   // most commands say little: do not allocate for those that say much
	chunkBytes      = 32 << 10  // of captured output
	streamBytes     = 256 << 10 // buffer and pipe of a streamed command
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

// sink takes output as it comes, one call at a time. stream is 1 or 2; idle says that nothing more is waiting in the pipe,
// so that this is the moment to flush. An error (client gone, stalled) ends the command.
type sink interface {
	output(stream int, p []byte, idle bool) error
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
	stdout, stderr           chunks // captured output; empty with a sink
	stdoutBytes, stderrBytes int64  // raw bytes captured or handed to the sink
	duration                 time.Duration
}

// chunks is captured output as a list of pieces, so that it is never copied to grow.
type chunks [][]byte

// startError is why a command did not start, with the exit code that a shell would report.
type startError struct {
	code int // 126: found but not executable, 127: not found
	error
}

// runner starts and ends commands; one for the whole process (a second one would take the first one's commands for strays).
type runner struct {
	stopping context.Context      // cancelled by shutdown
	shutdown func()               // ends every running command with endShutdown and lets no further one start; it does not wait
	spawners map[bool]chan func() // threads that start commands, without and with no_new_privs
	starting sync.Mutex           // held from setting the tag to the birth of the child that inherits it
	strays   map[int]bool         // children that were there before the runner, not ours to end
	lists    []*os.File           // of the children of the main thread and the spawners

	// mu guards what follows, and what a run says that it does. It is held from listing children to signalling and reaping
	// them, too: what is reaped in between may become another's number.
	mu    sync.Mutex
	slots int
	next  runTag          // of the next run; goes down, as a tag can only be lowered
	live  map[runTag]*run // that have begun and are not swept yet
}

// newRunner prepares this process for running commands: subreaper, no core dumps, the first tag, the spawners.
// id separates the runs of one configuration directory from those of another.
func newRunner(id string) (*runner, error) {
	// A start holds one of Go's processors until the kernel has done the exec: one more, for all else to go on meanwhile.
	runtime.GOMAXPROCS(1 + runtime.GOMAXPROCS(0))
	first, err := prepareProcess(id)
	if err != nil {
		return nil, err
	}
	r := &runner{next: first, live: map[runTag]*run{}, strays: map[int]bool{}, spawners: map[bool]chan func(){}}
	r.stopping, r.shutdown = context.WithCancel(context.Background())
	r.lists = []*os.File{childList(fmt.Sprint("self/task/", os.Getpid()))} // where orphans come
	for _, noNewPrivs := range []bool{false, true} {
		jobs, ready := make(chan func()), make(chan *os.File)
		go spawn(noNewPrivs, jobs, ready)
		r.spawners[noNewPrivs], r.lists = jobs, append(r.lists, <-ready)
	}
	for _, pid := range r.children() {
		r.strays[pid] = true
	}
	return r, nil
}

// spawn is the life of one spawner. It is locked to its thread and never ends, as a command's parent-death signal comes when
// the thread that started it ends, not when the process does (prctl(2)).
func spawn(noNewPrivs bool, jobs <-chan func(), ready chan<- *os.File) {
	runtime.LockOSThread()
	prepareSpawner(noNewPrivs)
	ready <- childList("thread-self")
	for job := range jobs {
		job()
	}
}

// endLeftovers kills what a crashed server of the same id left alive, and says how many processes that were.
// Only a server calls it, and only when it holds the pid file's lock: another server's commands would look like leftovers.
func (r *runner) endLeftovers() (most int) {
	for begun := time.Now(); time.Since(begun) < sweepPatience; time.Sleep(sweepPauseMax) {
		left := 0
		for _, pid := range allProcesses() {
			if its, _ := tagOf(pid); its&tagOwner == r.next&tagOwner && pid != os.Getpid() && !isDead(pid) {
				syscall.Kill(pid, syscall.SIGKILL)
				left++
			}
		}
		if most = max(most, left); left == 0 {
			break
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

// run is one command on its way. One goroutine, start, does all that may hang in the kernel; the other decides when to end it.
type run struct {
	*runner
	command
	ctx    context.Context // done when the run is to end; why says the reason
	stop   context.CancelCauseFunc
	exited chan struct{} // closed when the first process is dead, or there is none and will be none

	// guarded by runner.mu
	tag    runTag             // 0: nothing was started
	pid    int                // of the first process, if it is not unborn or gone
	status syscall.WaitStatus // how that ended
	err    error              // why the command did not start, though its process may have

	streams   [2]stream   // standard output, standard error
	input     *os.File    // our end, nil for /dev/null
	childSide [3]*os.File // what the child gets as 0, 1, 2; closed by start
	pumps     sync.WaitGroup
	total     atomic.Int64 // bytes of output
	sinking   sync.Mutex   // one call of the sink at a time
	failure   error        // of the sink, which gets nothing more
}

const (
	unborn, gone = 0, -1                               // run.pid: it has no number yet; none any more, or there is none
	neverWell    = syscall.WaitStatus(syscall.SIGKILL) // run.status, until a better one is known
)

// run runs the command to its end. ctx is the request's: its cancellation means that the client is gone.
//
// A run is waiting (until start has its turn on the spawner), unborn (until the kernel has taken the exec), running (until its
// first process is dead, or something ends it), ending (TERM, grace), swept (KILL, until nothing is left), and drained.
func (r *runner) run(ctx context.Context, c command) (o outcome) {
	begun := time.Now()
	defer func() { o.duration = time.Since(begun) }()
	if len(c.what.argv) == 0 {
		return outcome{end: endInternal, err: errors.New("the command was not approved")}
	}
	x := &run{runner: r, command: c, exited: make(chan struct{}), pid: gone, status: neverWell}
	x.ctx, x.stop = context.WithCancelCause(ctx)
	defer x.stop(nil)
	defer time.AfterFunc(c.timeout, func() { x.stop(endTimeout) }).Stop()
	defer context.AfterFunc(r.stopping, func() { x.stop(endShutdown) })()
	defer x.closeOurSide()
	if err := x.openPipes(); err != nil {
		x.closeChildSide()
		return outcome{end: endInternal, err: err}
	}
	go x.start()
	x.pump()
	why := x.attend()
	if why != endExit && !x.terminate() {
		return outcome{end: why}
	}
	x.sweep()
	x.drain()
	return x.outcome(why)
}

// start finds the file, has the spawner start it, and waits until it is dead. Nobody waits for this.
func (x *run) start() {
	defer close(x.exited)
	defer x.closeChildSide()
	path, direct, err := x.locate()
	pid, forked := gone, make(chan struct{})
	var report *os.File
	if err == nil {
		x.spawners[x.noNewPrivs] <- func() {
			pid, report, err = x.fork(path, !direct)
			close(forked)
		}
		<-forked
	}
	if failure := launcherError(report); err == nil {
		err = failure
	}
	err = explainStart(err, x.what.argv[0], x.cwd)
	x.mu.Lock()
	x.err = err
	x.mu.Unlock()
	x.closeChildSide()
	if pid > 0 {
		waitExit(pid)
	}
}

// fork makes the child, on the spawner, with the run's tag on it from birth; launcher: by way of that. Runs are numbered
// here, in the order of their forks, as a tag can only go down; what was given up before is not started any more.
func (x *run) fork(path string, launcher bool) (pid int, report *os.File, err error) {
	x.starting.Lock()
	defer x.starting.Unlock()
	x.mu.Lock()
	if x.ctx.Err() != nil {
		x.mu.Unlock()
		return gone, nil, nil
	}
	x.tag, x.pid = x.next, unborn
	x.next--
	x.live[x.tag] = x
	x.mu.Unlock()
	// The kernel holds this thread until the exec is done. locate and the launcher keep what is known to hang away from here;
	// whatever else does is killed unborn, and not tried again: nothing may ever run twice.
	guard := time.AfterFunc(startPatience, func() { x.round(x) })
	pid, report, err = startCommand(&x.command, x.tag, path, launcher, x.childSide[:])
	if !guard.Stop() && err == nil {
		err = &startError{126, fmt.Errorf("the system took longer than %v to start it: a lease holds its file, a file system does not answer, "+
			"or the machine is overloaded", startPatience)}
	}
	pid = cmp.Or(pid, gone)
	x.mu.Lock()
	x.pid = pid
	x.mu.Unlock()
	return pid, report, err
}

// attend returns when the run is over or is to end, and says why.
func (x *run) attend() end {
	for tick := time.Tick(orphanRound); ; {
		select {
		case <-x.exited:
			return endExit
		case <-x.ctx.Done():
			if why, ok := context.Cause(x.ctx).(end); ok {
				return why
			}
			return endClient // the request's own end
		case <-tick:
			x.round(nil)
		}
	}
}

// terminate asks the command to end, and gives it time; false: nothing was started, nor will be.
func (x *run) terminate() bool {
	x.mu.Lock()
	tag, pid := x.tag, x.pid
	if pid > 0 {
		syscall.Kill(-pid, syscall.SIGTERM)
		syscall.Kill(-pid, syscall.SIGCONT) // a stopped process takes no TERM
	}
	x.mu.Unlock()
	if pid > 0 {
		select {
		case <-x.exited:
		case <-time.After(x.killGrace):
		}
	}
	return tag != 0
}

// sweep ends everything that bears the run's tag, and returns when nothing of that is left: killing a process hands its
// children to us, the subreaper, where the next round finds them. What hangs in the kernel is left to the rounds of later runs.
func (x *run) sweep() {
	pause, begun := sweepPauseMin, time.Now()
	for quiet, need := 0, quietRounds; quiet < need && time.Since(begun) < sweepPatience; quiet++ {
		if x.round(x) {
			quiet, need = -1, quietRoundsAfterHit
			time.Sleep(pause)
			pause = min(2*pause, sweepPauseMax)
		}
	}
}

// round is one of a sweep, for the run that ends (nil: none): it kills what is that one's or no live run's, and reaps what is
// dead, a live run's orphans too, but a first process in its own run's rounds alone: so nothing either that bears the tag of
// an unborn one. It says whether there was anything to end.
func (r *runner) round(ending *run) (found bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ending != nil {
		found = !ending.reaped()
	}
	leaders := map[int]bool{}
	for _, x := range r.live {
		leaders[x.pid] = true
	}
	for _, pid := range r.children() {
		tag, ok := tagOf(pid)
		if !ok {
			continue
		}
		owner := r.live[tag]
		doomed := owner == nil || owner == ending
		killed := doomed && syscall.Kill(pid, syscall.SIGKILL) == nil
		taken := 0
		if !leaders[pid] && (owner == nil || owner.pid != unborn) {
			taken, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
		// What is beyond us (another user's) or dead but not ours to bury (traced) is not waited for: it would hold up every run.
		found = found || doomed && taken > 0 || killed && !isDead(pid)
	}
	return found
}

// reaped kills the run's group while its first process, unreaped, keeps their number from being anybody else's; then it takes
// that one's status, and says whether it is gone. An escaped tracer can hold it for a while.
func (x *run) reaped() bool {
	if x.pid > 0 {
		syscall.Kill(-x.pid, syscall.SIGKILL)
		var status syscall.WaitStatus
		if pid, _ := syscall.Wait4(x.pid, &status, syscall.WNOHANG, nil); pid == x.pid {
			x.pid, x.status = gone, status
		}
	}
	return x.pid == gone
}

// children lists the children of every thread that can have any, but for strays.
func (r *runner) children() (pids []int) {
	for _, list := range r.lists {
		pids = append(pids, childrenIn(list)...)
	}
	return slices.DeleteFunc(pids, func(pid int) bool { return r.strays[pid] })
}

// outcome sums up, and ends the tag's life: what still bears it is hostile from now on.
func (x *run) outcome(why end) outcome {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.live, x.tag)
	switch { // what was still in the pipe after an exit counts too
	case why != endExit:
	case x.failure != nil:
		why = endClient
	case x.total.Load() > x.maxBytes:
		why = endOutput
	}
	out, errs := &x.streams[0], &x.streams[1]
	o := outcome{end: why, stdout: out.captured, stderr: errs.captured, stdoutBytes: out.bytes, stderrBytes: errs.bytes}
	switch failure, ok := errors.AsType[*startError](x.err); {
	case ok:
		o.end, o.err, o.exited, o.exitCode = endStart, x.err, true, failure.code
	case x.err != nil:
		o.end, o.err = endInternal, x.err
	case x.status.Exited():
		o.exited, o.exitCode = true, x.status.ExitStatus()
	default:
		o.signalNumber, o.signal = int(x.status.Signal()), signalName(x.status.Signal())
	}
	return o
}

// locate finds the file of a command name: this very binary for aexec and ae, else on the path, never in the current directory
// unless the name has a slash. direct says that it needs no launcher: its exec will not hang, and there are no limits to set.
func (x *run) locate() (path string, direct bool, err error) {
	name, limited := x.what.argv[0], x.limits != rlimits{}
	slash := strings.Contains(name, "/")
	switch {
	case name == "aexec" || name == "ae":
		return ownBinary(), !limited, nil
	case slash && filepath.IsAbs(name): // as the kernel reads it: cleaned, "sudo/." would be a name that no deny rule knows
		path = name
	case slash:
		path = x.cwd + "/" + name
	default:
		if path, err = lookPath(name, x.pathDirs); err != nil {
			return "", false, err
		}
	}
	if limited || slash && x.cred != nil { // what another user may see, the kernel knows when it is that user
		return path, false, nil
	}
	real, direct := startsAtOnce(path)
	return cmp.Or(real, path), direct, nil
}

func lookPath(name string, dirs []string) (string, error) {
	failure := &startError{127, fmt.Errorf("%q was not found", name)}
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		switch {
		case err != nil || !info.Mode().IsRegular():
		case info.Mode()&0o111 == 0:
			failure = &startError{126, fmt.Errorf("%q is not executable", path)}
		default:
			return path, nil
		}
	}
	return "", failure
}

// explainStart turns what the kernel answered to execve(2) into what a shell would report.
func explainStart(err error, name, cwd string) error {
	switch errno, ok := errors.AsType[syscall.Errno](err); {
	case !ok:
		return err
	case slices.Contains([]syscall.Errno{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.EPERM}, errno):
		return fmt.Errorf("no process could be made for %q: %w", name, err)
	case errno != syscall.ENOENT && errno != syscall.ENOTDIR:
		return &startError{126, fmt.Errorf("%q cannot be executed: %w", name, errno)}
	default:
		if _, err := os.Stat(cwd); err != nil {
			return &startError{126, fmt.Errorf("the working directory %q cannot be entered: %w", cwd, errno)}
		}
		return &startError{127, fmt.Errorf("%q was not found, or the interpreter that it names was not", name)}
	}
}

// stream is standard output or error.
type stream struct {
	file     *os.File
	source   io.Reader // the file, or what was left in it at the deadline of drain
	captured chunks
	bytes    int64
}

// openPipes leaves it to the caller to close both sides, with an error too.
func (x *run) openPipes() error {
	var errs [3]error
	for i := range x.streams {
		s := &x.streams[i]
		s.file, x.childSide[i+1], errs[i] = os.Pipe()
		if s.source = s.file; x.sink != nil && errs[i] == nil {
			growPipe(x.childSide[i+1], streamBytes)
		}
	}
	if x.stdin == nil {
		x.childSide[0], errs[2] = os.Open(os.DevNull)
	} else {
		x.childSide[0], x.input, errs[2] = os.Pipe()
	}
	return errors.Join(errs[:]...)
}

func (x *run) closeChildSide() {
	for _, f := range x.childSide {
		f.Close() // nil or closed: an error that nobody needs
	}
}

func (x *run) closeOurSide() {
	x.streams[0].file.Close()
	x.streams[1].file.Close()
	x.input.Close()
}

// pump starts to move input and output.
func (x *run) pump() {
	if x.input != nil {
		go func() {
			x.input.Write(x.stdin) // what is not read is not missed
			x.input.Close()
		}()
	}
	for i := range x.streams {
		x.pumps.Go(func() { x.move(i+1, &x.streams[i]) })
	}
}

// drain waits for the end of the output, when nothing that the command started is alive. The deadline is for a pipe that
// something beyond our reach holds open (a process that changed its user, or hangs in the kernel).
func (x *run) drain() {
	for i := range x.streams {
		x.streams[i].file.SetReadDeadline(time.Now().Add(drainPatience))
	}
	x.pumps.Wait()
}

// move reads a stream to its end; what fits the limit is kept, in pieces, or handed to the sink.
func (x *run) move(number int, s *stream) {
	piece := make([]byte, 0, firstChunkBytes)
	if x.sink != nil {
		piece = make([]byte, 0, streamBytes)
	}
	for {
		n, err := s.read(piece[len(piece):cap(piece)])
		if over := x.total.Add(int64(n)) - x.maxBytes; over > 0 {
			x.stop(endOutput)
			n = max(0, n-int(over))
		}
		s.bytes += int64(n)
		piece = piece[:len(piece)+n]
		if x.sink != nil {
			x.hand(number, piece, pendingBytes(s.file) == 0)
			piece = piece[:0]
		} else if err != nil || len(piece) == cap(piece) {
			s.captured = append(s.captured, piece)
		}
		if err != nil {
			return
		} else if len(piece) == cap(piece) {
			piece = make([]byte, 0, chunkBytes)
		}
	}
}

// hand gives a piece to the sink, unless that has failed.
func (x *run) hand(number int, piece []byte, idle bool) {
	x.sinking.Lock()
	defer x.sinking.Unlock()
	if len(piece) == 0 || x.failure != nil {
		return
	}
	if x.failure = x.sink.output(number, piece, idle); x.failure != nil {
		x.stop(endClient)
	}
}

// read is Read, but that what waits in the pipe when the deadline passes is read all the same, and not more: a slow sink
// loses nothing, and a stranger that opened the pipe through /proc and goes on writing, or reads, too, gains nothing.
func (s *stream) read(b []byte) (n int, err error) {
	if n, err = s.source.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	rest := make([]byte, pendingBytes(s.file))
	s.file.SetReadDeadline(time.Now().Add(drainPatience))
	n, _ = s.file.Read(rest)
	s.source = bytes.NewReader(rest[:n])
	return s.source.Read(b)
}
