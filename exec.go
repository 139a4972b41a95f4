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
	"math"
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
	startPatience = 3 * time.Second  // how long the kernel may take over one exec before it is given up
	birthPatience = time.Second / 10 // how much longer a start may take that is to end, before it is killed unborn
	sweepPatience = 5 * time.Second  // how long a killed process may take to die (it hangs in the kernel: a dead network file system)
	sweepPauseMin = 100 * time.Microsecond
	sweepPauseMax = 5 * time.Millisecond
	drainPatience = time.Second // how long a pipe may stay open and silent when nothing of the command is left
	orphanRound   = time.Second // how often dead orphans of a long run are reaped
	unborn, gone  = 0, -1       // run.pid: it has no number yet; it is reaped, or nothing was started
	chunkBytes    = 8 << 10     // of captured output: most commands say little
	streamBytes   = 256 << 10   // buffer and pipe of a streamed command

	// The lists of children that the kernel gives are not atomic: one empty round may have missed a process that was
	// just handed over. With two rounds always, 3 of 2,278 hostile runs left something; with five after a hit, none of 13,000.
	quietRounds         = 2
	quietRoundsAfterHit = 5
)

// command is everything one run needs, taken from one snapshot.
type command struct {
	what               approved
	env                []string
	cwd                string
	pathDirs           []string    // where a name without a slash is looked up, absolute
	cred               *credential // nil: the server's own user
	limits             rlimits
	noNewPrivs         bool
	timeout, killGrace time.Duration
	maxBytes           int64  // of standard output and error together
	stdin              []byte // nil: empty
	sink               sink   // nil: captured in the outcome
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

var errTooLong = &startError{126, fmt.Errorf("its start took longer than %v: its file is held, or the machine overloaded", startPatience)}

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
	slots atomic.Int64    // that are taken
	next  runTag          // of the next run; goes down, as a tag can only be lowered
	live  map[runTag]*run // that have begun and are not swept yet
}

// newRunner prepares this process for running commands; id separates those of one configuration directory from another's.
func newRunner(id string) (*runner, error) {
	// A start holds one of Go's processors until the kernel has done the exec: one more, for all else to go on meanwhile.
	runtime.GOMAXPROCS(1 + runtime.GOMAXPROCS(0))
	first, err := prepareProcess(id)
	if err != nil {
		return nil, err
	}
	main, _ := os.Open(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid())) // orphans come here
	r := &runner{next: first, lists: []*os.File{main}, live: map[runTag]*run{}, strays: map[int]bool{}, spawners: map[bool]chan func(){}}
	r.stopping, r.shutdown = context.WithCancel(context.Background())
	for _, noNewPrivs := range []bool{false, true} {
		jobs, list := make(chan func()), make(chan *os.File)
		go func() { // for good: a command's parent-death signal comes when the thread that started it ends (prctl(2))
			runtime.LockOSThread()
			prepareSpawner(noNewPrivs)
			own, _ := os.Open("/proc/thread-self/children") // a child made with CLONE_PARENT stands here, too
			list <- own
			for job := range jobs {
				job()
			}
		}()
		r.spawners[noNewPrivs], r.lists = jobs, append(r.lists, <-list)
	}
	for _, pid := range r.children() {
		r.strays[pid] = true
	}
	return r, nil
}

// endLeftovers kills what a crashed server of the same id left alive, and says how many processes that were.
// Only a server calls it, and only when it holds the pid file's lock: another server's commands would look like leftovers.
func (r *runner) endLeftovers() (most int) {
	for begun := time.Now(); time.Since(begun) < sweepPatience; time.Sleep(sweepPauseMax) {
		left := slices.DeleteFunc(tagged(r.next), isDead)
		for _, pid := range left {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if most = max(most, len(left)); len(left) == 0 {
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
	if r.shuttingDown() || r.slots.Load() >= int64(limit) {
		return nil, false
	}
	r.slots.Add(1)
	return sync.OnceFunc(func() { r.slots.Add(-1) }), true
}

func (r *runner) shuttingDown() bool { return r.stopping.Err() != nil }

// run is one command on its way. One goroutine, start, does all that may hang in the kernel; the other decides when to end it.
type run struct {
	*runner
	command
	ctx    context.Context // done when the run is to end; its cause says why
	stop   context.CancelCauseFunc
	forked chan struct{} // closed when the first process has its number, or there will be none
	exited chan struct{} // closed when the first process is dead, or there will be none

	// guarded by runner.mu
	tag    runTag             // 0: nothing was started
	pid    int                // of the first process, or unborn, or gone
	status syscall.WaitStatus // how that ended: not well, as long as that is not known
	err    error              // why the command did not start, though its process may have

	// by the child's descriptors 0, 1, 2; the child's side is start's to close
	ourSide, childSide [3]*os.File
	captured           [3]chunks
	bytes              [3]int64

	pumps   sync.WaitGroup
	total   atomic.Int64 // bytes of output
	sinking sync.Mutex   // one call of the sink at a time
	failure error        // of the sink, which gets nothing more
}

// run runs the command to its end. ctx is the request's: its cancellation means that the client is gone. A run is waiting (for
// its turn on the spawner), unborn (until the kernel has taken the exec), running (until its first process is dead, or something
// ends it), ending (TERM, grace), swept (KILL, until nothing is left), and drained, in this order.
func (r *runner) run(ctx context.Context, c command) (o outcome) {
	defer func(begun time.Time) { o.duration = time.Since(begun) }(time.Now())
	if len(c.what.argv) == 0 {
		return outcome{end: endInternal, err: errors.New("the command was not approved")}
	}
	x := &run{runner: r, command: c, forked: make(chan struct{}), exited: make(chan struct{}), pid: gone}
	x.status = syscall.WaitStatus(syscall.SIGKILL)
	x.ctx, x.stop = context.WithCancelCause(ctx)
	defer x.stop(nil)
	defer time.AfterFunc(c.timeout, func() { x.stop(endTimeout) }).Stop()
	defer context.AfterFunc(r.stopping, func() { x.stop(endShutdown) })()
	defer closeFiles(x.ourSide[:])
	if err := x.openPipes(); err != nil {
		closeFiles(x.childSide[:])
		return outcome{end: endInternal, err: err}
	}
	go x.start()
	why, begun := x.attend()
	if !begun {
		return outcome{end: why} // start gives up, when it comes back
	}
	x.sweep()
	for _, f := range x.ourSide { // for what something beyond our reach holds open (it changed its user, or hangs in the kernel)
		f.SetReadDeadline(time.Now().Add(drainPatience))
	}
	x.pumps.Wait()
	return x.outcome(why)
}

// start finds the file, has the spawner start it, and waits until it is dead; nobody waits for this.
func (x *run) start() {
	defer close(x.exited)
	path, direct, err := x.locate()
	var report *os.File
	if err == nil {
		x.spawners[x.noNewPrivs] <- func() {
			report, err = x.fork(path, !direct)
			close(x.forked)
		}
		<-x.forked
	}
	closeFiles(x.childSide[:])
	err = explainStart(cmp.Or(err, launcherError(report)), x.what.argv[0], x.cwd)
	x.mu.Lock()
	pid := x.pid
	x.err = err
	x.mu.Unlock()
	if pid > 0 {
		waitExit(pid)
	}
}

// fork makes the child, on the spawner, with the run's tag on it from birth; launcher: by way of that. Runs are numbered
// here, in the order of their forks, as a tag can only go down; what was given up before is not started any more.
func (x *run) fork(path string, launcher bool) (*os.File, error) {
	x.starting.Lock()
	defer x.starting.Unlock()
	x.mu.Lock()
	if x.ctx.Err() != nil {
		x.mu.Unlock()
		return nil, nil
	}
	x.tag, x.pid = x.next, unborn
	x.live[x.tag] = x
	x.next--
	x.mu.Unlock()
	// The kernel holds this thread until the exec is done. locate and the launcher keep what is known to hang away from here;
	// whatever else does is killed unborn, and not tried again: nothing may ever run twice.
	defer time.AfterFunc(startPatience, func() { x.stop(errTooLong) }).Stop()
	pid, report, err := startCommand(&x.command, x.tag, path, launcher, x.childSide[:])
	x.mu.Lock()
	x.pid = cmp.Or(pid, gone)
	x.mu.Unlock()
	return report, err
}

// attend returns when the run is over, or was asked to end and has had its time, and says why; begun: something was started.
func (x *run) attend() (why end, begun bool) {
	for tick := time.Tick(orphanRound); x.ctx.Err() == nil; {
		select {
		case <-x.exited:
			if x.ctx.Err() == nil { // else it may be that nothing was started
				return endExit, true
			}
		case <-tick:
			x.round(nil)
		case <-x.ctx.Done():
		}
	}
	x.mu.Lock()
	begun, grace := x.tag != 0, time.Duration(0)
	x.mu.Unlock()
	if begun {
		select { // its output, and so its end, may come before its number
		case <-x.forked:
		case <-time.After(birthPatience):
		}
	}
	x.mu.Lock()
	if x.pid > 0 {
		syscall.Kill(-x.pid, syscall.SIGTERM)
		syscall.Kill(-x.pid, syscall.SIGCONT) // a stopped process takes no TERM
		grace = x.killGrace
	}
	x.mu.Unlock()
	select {
	case <-x.exited:
	case <-time.After(grace):
	}
	if why, ours := context.Cause(x.ctx).(end); ours {
		return why, begun
	}
	return endClient, begun
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

// round kills what bears the tag of the run that ends (nil: none) or of no live run, and says whether there was anything. It reaps
// what is dead, a live run's orphans too, but a first process, or what bears the tag of an unborn one, for its own run alone.
func (r *runner) round(ending *run) (found bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if x := ending; x != nil && x.pid > 0 {
		syscall.Kill(-x.pid, syscall.SIGKILL) // unreaped, its number and so its group's cannot be anybody else's
		var status syscall.WaitStatus
		if pid, _ := syscall.Wait4(x.pid, &status, syscall.WNOHANG, nil); pid == x.pid {
			x.pid, x.status = gone, status
		}
	}
	found = ending != nil && ending.pid != gone
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
		doomed, taken := owner == nil || owner == ending, 0
		killed := doomed && syscall.Kill(pid, syscall.SIGKILL) == nil
		if !leaders[pid] && (owner == nil || owner.pid != unborn) {
			taken, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		}
		// What is beyond us (another user's) or dead but not ours to bury (traced) is not waited for: it would hold up every run.
		found = found || doomed && taken > 0 || killed && !isDead(pid)
	}
	return found
}

// children lists the children of every thread that can have any, but for strays.
func (r *runner) children() (pids []int) {
	for _, list := range r.lists {
		text, err := io.ReadAll(io.NewSectionReader(list, 0, math.MaxInt64))
		if err != nil { // the kernel has no such lists (CONFIG_PROC_CHILDREN)
			return tagged(r.next)
		}
		pids = append(pids, numbers(strings.Fields(string(text)))...)
	}
	slices.Sort(pids) // none twice, as the first time may free its number: a spawner may be the main thread
	return slices.DeleteFunc(slices.Compact(pids), func(pid int) bool { return r.strays[pid] })
}

// outcome sums up, and ends the tag's life: what still bears it is hostile from now on.
func (x *run) outcome(why end) outcome {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.live, x.tag)
	if why == endExit && x.failure != nil { // what was still in the pipe after an exit counts too
		why = endClient
	} else if why == endExit && x.total.Load() > x.maxBytes {
		why = endOutput
	}
	o := outcome{end: why, stdout: x.captured[1], stderr: x.captured[2], stdoutBytes: x.bytes[1], stderrBytes: x.bytes[2]}
	switch failure, ok := errors.AsType[*startError](cmp.Or(x.err, context.Cause(x.ctx))); {
	case ok:
		o.end, o.err, o.exited, o.exitCode = endStart, failure, true, failure.code
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
	name, unlimited := x.what.argv[0], x.limits == rlimits{}
	slash := strings.Contains(name, "/")
	path = name // as the kernel reads it: cleaned, "sudo/." would be a name that no deny rule knows
	switch {
	case name == "aexec" || name == "ae":
		return ownBinary(), unlimited, nil
	case slash && !filepath.IsAbs(name):
		path = x.cwd + "/" + name
	case !slash:
		if path = lookPath(name, x.pathDirs); path == "" {
			return "", false, &startError{127, fmt.Errorf("%q was not found", name)}
		}
	}
	if unlimited && (!slash || x.cred == nil) { // what another user may see, the kernel knows when it is that user
		if real, ok := startsAtOnce(path); ok {
			return real, true, nil
		}
	}
	return path, false, nil
}

// lookPath gives the first executable file of that name, else one that is not, for the kernel to refuse.
func lookPath(name string, dirs []string) (found string) {
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			if found = path; info.Mode()&0o111 != 0 {
				break
			}
		}
	}
	return found
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
	}
	if _, err := os.Stat(cwd); err != nil {
		return &startError{126, fmt.Errorf("the working directory %q cannot be entered: %w", cwd, err)}
	}
	return &startError{127, fmt.Errorf("%q was not found, or the interpreter that it names was not", name)}
}

// openPipes also starts to move what comes through them. It leaves it to the caller to close both sides, with an error too.
func (x *run) openPipes() error {
	var errs [3]error
	for fd := 1; fd <= 2; fd++ {
		x.ourSide[fd], x.childSide[fd], errs[fd] = os.Pipe()
		if x.sink != nil {
			growPipe(x.childSide[fd], streamBytes)
		}
		x.pumps.Go(func() { x.move(fd) })
	}
	if x.stdin == nil {
		x.childSide[0], errs[0] = os.Open(os.DevNull)
	} else {
		x.childSide[0], x.ourSide[0], errs[0] = os.Pipe()
		go func() {
			x.ourSide[0].Write(x.stdin) // what is not read is not missed
			x.ourSide[0].Close()
		}()
	}
	return errors.Join(errs[:]...)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close() // nil, too: an error that nobody needs
	}
}

// move reads standard output (1) or error (2) to its end; what fits the limit is kept, in pieces, or handed to the sink.
func (x *run) move(fd int) {
	var source io.Reader = x.ourSide[fd]
	piece, size := make([]byte, 0, chunkBytes), pick(x.sink == nil, chunkBytes, streamBytes)
	for {
		if len(piece) == cap(piece) {
			piece = make([]byte, 0, size)
		}
		n, err := source.Read(piece[len(piece):cap(piece)])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			source, err = x.leftover(fd), nil
		}
		if over := x.total.Add(int64(n)) - x.maxBytes; over > 0 {
			x.stop(endOutput)
			n = max(0, n-int(over))
		}
		x.bytes[fd] += int64(n)
		if piece = piece[:len(piece)+n]; x.sink != nil {
			x.hand(fd, piece)
			if len(piece) < cap(piece) || cap(piece) == size {
				piece = piece[:0] // else the next one is larger
			}
		} else if err != nil || len(piece) == cap(piece) {
			x.captured[fd] = append(x.captured[fd], piece)
		}
		if err != nil {
			return
		}
	}
}

// hand gives a piece to the sink, unless that has failed.
func (x *run) hand(fd int, piece []byte) {
	x.sinking.Lock()
	defer x.sinking.Unlock()
	if len(piece) > 0 && x.failure == nil {
		x.failure = x.sink.output(fd, piece, pendingBytes(x.ourSide[fd]) == 0)
	}
	if x.failure != nil {
		x.stop(endClient)
	}
}

// leftover is what waits in the pipe when its deadline passes, and not more: a slow sink loses nothing, and a stranger that
// opened the pipe through /proc and goes on writing, or reads, too, gains nothing.
func (x *run) leftover(fd int) io.Reader {
	rest := make([]byte, pendingBytes(x.ourSide[fd]))
	x.ourSide[fd].SetReadDeadline(time.Now().Add(drainPatience))
	n, _ := x.ourSide[fd].Read(rest)
	return bytes.NewReader(rest[:n])
}
