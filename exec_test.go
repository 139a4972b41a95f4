package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hangGuard is how long anything may take before a test calls it hung. No test measures time.
const hangGuard = 20 * time.Second

// theRunner is shared by the tests of this process, as it is in the server: a second one takes the first one's commands for strays.
var theRunner = func() func(t testing.TB) *runner {
	var mu sync.Mutex
	var r *runner
	return func(t testing.TB) *runner {
		mu.Lock()
		defer mu.Unlock()
		if r == nil || r.shuttingDown() {
			var err error
			if r, err = newRunner("test"); err != nil {
				t.Fatal(err)
			}
		}
		return r
	}
}()

// testCommand is a command with ordinary settings.
func testCommand(argv ...string) command {
	return command{what: approved{argv: argv}, env: []string{"PATH=/usr/bin:/bin"}, cwd: "/", pathDirs: []string{"/usr/bin", "/bin"},
		noNewPrivs: true, timeout: hangGuard, killGrace: 200 * time.Millisecond, maxBytes: 1 << 20}
}

// helperRun is a command that the test binary plays.
func helperRun(t testing.TB, name string, args ...string) command {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := testCommand(append([]string{self}, args...)...)
	c.env = append(c.env, helperEnv(name))
	return c
}

// strangers are children that are none of the other tests': those were there before the runner.
func strangers(r *runner) []int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.children()
}

func (c chunks) String() string {
	var b strings.Builder
	for _, p := range c {
		b.Write(p)
	}
	return b.String()
}

// witness is a FIFO that processes hold open for as long as they live: it ends when the last of them is dead.
type witness struct {
	path string
	f    *os.File
}

func newWitness(t testing.TB) *witness {
	t.Helper()
	w := &witness{path: filepath.Join(t.TempDir(), "witness")}
	if err := syscall.Mkfifo(w.path, 0o666); err != nil {
		t.Fatal(err)
	}
	os.Chmod(w.path, 0o666) // for commands of another user
	os.Chmod(filepath.Dir(w.path), 0o755)
	os.Chmod(filepath.Dir(filepath.Dir(w.path)), 0o755)
	var err error
	if w.f, err = os.OpenFile(w.path, os.O_RDONLY|syscall.O_NONBLOCK, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.f.Close() })
	return w
}

// all waits for the end of every process that held the witness and gives what they said.
func (w *witness) all(t testing.TB) string {
	t.Helper()
	w.f.SetReadDeadline(time.Now().Add(hangGuard))
	said, err := io.ReadAll(w.f)
	if err != nil {
		t.Errorf("something of the command is alive: %v (it said %q)", err, said)
	}
	return string(said)
}

// gone is all, at once: what lives now is a survivor.
func (w *witness) gone(t testing.TB) string {
	t.Helper()
	var said []byte
	buffer := make([]byte, 4096)
	for {
		n, err := syscall.Read(int(w.fd()), buffer)
		switch {
		case n > 0:
			said = append(said, buffer[:n]...)
		case n == 0 && err == nil:
			return string(said)
		case errors.Is(err, syscall.EAGAIN):
			t.Errorf("something of the command is alive when its run has returned (it said %q)", said)
			return string(said)
		default:
			t.Fatal(err)
		}
	}
}

func (w *witness) fd() (fd uintptr) {
	c, _ := w.f.SyscallConn()
	c.Control(func(f uintptr) { fd = f })
	return fd
}

// await waits for the first word of a process that holds the witness.
func (w *witness) await(t testing.TB) {
	t.Helper()
	w.f.SetReadDeadline(time.Now().Add(hangGuard))
	for {
		n, err := w.f.Read(make([]byte, 1))
		if n > 0 {
			return
		}
		if err != nil && err != io.EOF {
			t.Fatal("the command said nothing: ", err)
		}
		runtime.Gosched() // a FIFO without a writer is at its end, and not yet begun
	}
}

// mischief is what a command can do that makes it hard to end. Each leaves something holding the descriptor.
var mischief = map[string]func(hold *os.File){
	"nothing":     func(*os.File) {},
	"ignore TERM": func(*os.File) { signal.Ignore(syscall.SIGTERM) },
	"orphan":      func(h *os.File) { leave(h, nil, &syscall.SysProcAttr{}) },
	"setsid":      func(h *os.File) { leave(h, nil, &syscall.SysProcAttr{Setsid: true}) },
	"hold pipe":   func(h *os.File) { leave(h, []*os.File{os.Stdout, os.Stderr}, &syscall.SysProcAttr{Setsid: true}) },
	"double fork": func(h *os.File) {
		leave(h, nil, &syscall.SysProcAttr{Setsid: true}, "/bin/sh", "-c", "sh -c 'sleep 1000 & sleep 1000' & exit")
	},
	"clone parent": func(h *os.File) { leave(h, nil, &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT}) },
	"both":         func(h *os.File) { leave(h, nil, &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT, Setsid: true}) },
	"lower limits": func(h *os.File) {
		unix.Prlimit(0, unix.RLIMIT_RSS, &unix.Rlimit{Cur: 7, Max: 7}, nil)
		leave(h, nil, &syscall.SysProcAttr{Setsid: true})
	},
	"forks": func(h *os.File) {
		for range 20 {
			leave(h, nil, &syscall.SysProcAttr{Setsid: true}, "/bin/sh", "-c", "for i in 1 2 3; do setsid sleep 1000 & done; sleep 1000")
		}
	},
	"half a character": func(*os.File) { os.Stdout.WriteString("\xc3") },
	"close stdout":     func(*os.File) { os.Stdout.Close() },
}

// leave starts a process that stays, with a clean environment, holding the witness as descriptor 3.
func leave(hold *os.File, std []*os.File, sys *syscall.SysProcAttr, argv ...string) {
	if argv == nil {
		argv = []string{"/bin/sleep", "1000"}
	}
	null, _ := os.Open(os.DevNull)
	files := []uintptr{null.Fd(), null.Fd(), null.Fd(), hold.Fd()}
	for i, f := range std {
		files[i+1] = f.Fd()
	}
	if _, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{Env: []string{"PATH=/usr/bin:/bin"}, Files: files, Sys: sys}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(98)
	}
}

// misbehave WITNESS MISCHIEF THEN: THEN is exit, wait, stop or flood.
func init() {
	helpers["misbehave"] = func() {
		hold, err := os.OpenFile(os.Args[1], os.O_WRONLY, 0)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(97)
		}
		mischief[os.Args[2]](hold)
		hold.WriteString("x")
		switch os.Args[3] {
		case "exit":
		case "wait":
			time.Sleep(time.Hour)
		case "stop":
			syscall.Kill(os.Getpid(), syscall.SIGSTOP)
			time.Sleep(time.Hour)
		case "flood":
			out := os.Stderr
			if os.Args[2] != "close stdout" && len(os.Args[2])%2 == 0 {
				out = os.Stdout
			}
			for {
				out.WriteString(strings.Repeat("flood ", 4096))
			}
		}
		// Fail safe: whatever the mischief, no Go clean-up may run in between.
		os.Exit(0)
	}
}

// TestEnds plays every mischief with every end, and looks for survivors the moment the run returns.
func TestEnds(t *testing.T) {
	r := theRunner(t)
	for what := range mischief {
		for _, then := range []struct {
			name, then string
			end        end
		}{
			{"exit", "exit", endExit}, {"timeout", "wait", endTimeout}, {"stopped", "stop", endTimeout},
			{"output limit", "flood", endOutput}, {"client gone", "wait", endClient},
		} {
			t.Run(what+"/"+then.name, func(t *testing.T) {
				t.Parallel()
				w := newWitness(t)
				c := helperRun(t, "misbehave", w.path, what, then.then)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if then.end == endTimeout {
					c.timeout = time.Second
				}
				done := make(chan outcome)
				go func() { done <- r.run(ctx, c) }()
				if then.end == endClient && what != "lower limits" {
					w.await(t)
				}
				if then.end == endClient {
					cancel()
				}
				o := <-done
				if what == "lower limits" && o.signal == "SIGKILL" {
					o.end = then.end // without its tag it is nobody's, and dies in the sweep of any run
				}
				if o.end != then.end || o.err != nil {
					t.Errorf("ended by %s (%v), want %s; stderr %.100q", o.end, o.err, then.end, o.stderr)
				}
				if then.end == endExit && what != "lower limits" && (!o.exited || o.exitCode != 0) {
					t.Errorf("exit code %d (exited %v, signal %s)", o.exitCode, o.exited, o.signal)
				}
				if then.end == endOutput && what != "lower limits" && o.stdoutBytes+o.stderrBytes != c.maxBytes {
					t.Errorf("%d + %d bytes captured, limit %d", o.stdoutBytes, o.stderrBytes, c.maxBytes)
				}
				said := w.gone(t)
				if then.end != endClient && then.end != endTimeout && what != "lower limits" && said == "" {
					t.Error("the command never got to its mischief")
				}
			})
		}
	}
}

// TestShutdown ends running commands at once, the unwilling too, and starts no further one.
func TestShutdown(t *testing.T) {
	r := theRunner(t)
	var ends sync.WaitGroup
	for _, what := range []string{"ignore TERM", "setsid", "hold pipe", "forks"} {
		w := newWitness(t)
		c := helperRun(t, "misbehave", w.path, what, "wait")
		started := make(chan struct{})
		ends.Go(func() {
			close(started)
			if o := r.run(context.Background(), c); o.end != endShutdown {
				t.Errorf("%s: ended by %s", what, o.end)
			}
			w.gone(t)
		})
		<-started
		w.await(t)
	}
	r.shutdown()
	r.shutdown() // twice is as good
	ends.Wait()
	if _, ok := r.acquire(100); ok {
		t.Error("a slot after shutdown")
	}
}

func TestStartFailures(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		argv0 string
		code  int
		word  string
	}{
		{"no-such-command", 127, "not found"},
		{"./no-such-command", 127, "not found"},
		{dir + "/no-such-command", 127, "not found"},
		{write("file", "", 0o644), 126, "permission denied"},
		{write("file2", "x", 0o644) + "/x", 127, "not found"},
		{dir, 126, "permission denied"},
		{"/bin/true/.", 127, "not found"}, // not cleaned to /bin/true: a deny rule knows it by another name
		{"/bin/true/../true", 127, "not found"},
		{"/bin/no-such-directory/../true", 127, "not found"},
		{fifo, 126, "permission denied"},
		{write("empty", "", 0o755), 126, "exec format error"},
		{write("text", "echo no interpreter\n", 0o755), 126, "exec format error"},
		{write("script", "#!/no/such/interpreter\n", 0o755), 127, "interpreter"},
		{write("half", "\x7fELF", 0o755), 126, "exec format error"},
	} {
		o := theRunner(t).run(t.Context(), testCommand(test.argv0))
		if o.end != endStart || o.exitCode != test.code || !strings.Contains(fmt.Sprint(o.err), test.word) {
			t.Errorf("%q: %s, exit code %d, %v; want %d and %q", test.argv0, o.end, o.exitCode, o.err, test.code, test.word)
		}
	}
	c := testCommand("true")
	c.cwd = dir + "/gone"
	if o := theRunner(t).run(t.Context(), c); o.end != endStart || !strings.Contains(fmt.Sprint(o.err), "working directory") {
		t.Errorf("missing working directory: %s, %v", o.end, o.err)
	}
	if o := theRunner(t).run(t.Context(), command{timeout: time.Second}); o.end != endInternal {
		t.Errorf("an argv that nobody approved: %s", o.end)
	}
}

// TestStartsAtOnce: only root's own programs are started on the thread that must not hang, and nothing else is even opened.
func TestStartsAtOnce(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(dir+"/fifo", 0o777); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"own": string(program), "script": "#!/bin/sh\n"} {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o777); err != nil {
			t.Fatal(err)
		}
		os.Chmod(dir+"/"+name, 0o777)
	}
	os.Symlink("/bin/true", dir+"/link")
	for path, want := range map[string]bool{"/bin/true": true, dir + "/link": true, dir + "/own": false, dir + "/script": false,
		dir + "/fifo": false, dir: false, "/dev/null": false, "/dev/tty": false, "/dev/ptmx": false, dir + "/gone": false} {
		real, got := startsAtOnce(path)
		if got != want || got && real == dir+"/link" {
			t.Errorf("%s: %v as %q, want %v", path, got, real, want)
		}
	}
}

// TestForeignWriter: who opens a run's pipe through /proc and goes on writing does not hold up its answer.
func TestForeignWriter(t *testing.T) {
	r := theRunner(t)
	w := newWitness(t)
	flood, stop := make(chan outcome), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	victim := testCommand("sh", "-c", "echo $$ >"+w.path+"; sleep 0.3")
	victim.maxBytes = 1 << 40
	pid := make(chan string)
	go func() {
		buffer := make([]byte, 64)
		w.f.SetReadDeadline(time.Now().Add(hangGuard))
		for {
			if n, _ := w.f.Read(buffer); n > 0 {
				pid <- strings.TrimSpace(string(buffer[:n]))
				return
			}
			runtime.Gosched()
		}
	}()
	ended := make(chan outcome)
	go func() { ended <- r.run(t.Context(), victim) }()
	who := <-pid
	go func() {
		c := testCommand("sh", "-c", "exec yes >/proc/"+who+"/fd/1")
		flood <- r.run(ctx, c)
		close(stop)
	}()
	select {
	case <-ended:
	case <-stop:
		t.Skip("the pipe could not be opened")
	case <-time.After(hangGuard / 2):
		t.Error("the stranger holds up the answer")
	}
	cancel()
	<-flood
}

// TestWorld looks at what a command gets: standard input, session, terminal, environment, descriptors, directory, signals.
func TestWorld(t *testing.T) {
	r := theRunner(t)
	dir := t.TempDir()
	c := testCommand("sh", "-c", `cat; pwd; env | sort; ls /proc/self/fd; ps -o sid= -o pgid= -o pid= -p $$; exec 9</dev/tty; echo unreached`)
	c.cwd, c.env = dir, []string{"PATH=/usr/bin:/bin", "X=y"}
	o := r.run(t.Context(), c)
	lines := strings.Split(strings.TrimSpace(o.stdout.String()), "\n")
	want := []string{dir, "PATH=/usr/bin:/bin", "PWD=" + dir, "X=y", "0", "1", "2", "3"}
	if len(lines) != len(want)+1 || strings.Join(lines[:len(want)], ",") != strings.Join(want, ",") {
		t.Errorf("got %q, want %q and the session", lines, want)
	} else if f := strings.Fields(lines[len(want)]); len(f) != 3 || f[0] != f[1] || f[1] != f[2] {
		t.Errorf("session, group and process are %q", f)
	}
	if !strings.Contains(o.stderr.String(), "/dev/tty") || strings.Contains(o.stdout.String(), "unreached") {
		t.Errorf("/dev/tty could be opened: %q", o.stderr)
	}
	c = testCommand("sh", "-c", "ulimit -c; exec grep -E 'Sig(Blk|Ign)|NoNewPrivs' /proc/self/status")
	for _, nnp := range []bool{true, false} {
		c.noNewPrivs = nnp
		o = r.run(t.Context(), c)
		want := "0\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nNoNewPrivs:\t" + map[bool]string{true: "1", false: "0"}[nnp] + "\n"
		if o.stdout.String() != want {
			t.Errorf("no_new_privs %v: got %q, want %q", nnp, o.stdout, want)
		}
	}
	c = testCommand("cat")
	c.stdin = []byte(strings.Repeat("0123456789", 50000))
	if o = r.run(t.Context(), c); o.stdout.String() != string(c.stdin) {
		t.Errorf("standard input: %d bytes came back of %d", o.stdoutBytes, len(c.stdin))
	}
	c.what.argv = []string{"true"}
	if o = r.run(t.Context(), c); o.end != endExit || o.exitCode != 0 {
		t.Errorf("standard input that is not read: %+v", o)
	}
	if o = r.run(t.Context(), testCommand("sh", "-c", "kill -SEGV $$")); o.exited || o.signal != "SIGSEGV" {
		t.Errorf("a signal: %+v", o)
	}
}

// TestOwnName runs this very binary for aexec and ae, and finds that it is beneath a server.
func TestOwnName(t *testing.T) {
	for _, name := range []string{"aexec", "ae"} {
		c := testCommand(name)
		c.env = append(c.env, helperEnv("beneath"))
		c.pathDirs = nil
		if o := theRunner(t).run(t.Context(), c); o.stdout.String() != "beneath true" {
			t.Errorf("%s: %q %q %v", name, o.stdout, o.stderr, o.err)
		}
	}
}

func init() { helpers["beneath"] = func() { fmt.Print("beneath ", beneathServer()) } }

// TestLimits: what is set holds for the command and for what it forks at once; what is not set is as it was.
func TestLimits(t *testing.T) {
	c := testCommand("sh", "-c", "ulimit -t; ulimit -v; ulimit -f; ulimit -n; ulimit -H -n; ulimit -p 2>/dev/null || ulimit -u")
	c.limits = rlimits{CPUSeconds: 7, MemoryBytes: 64 << 20, FileBytes: 1 << 20, OpenFiles: 33, Processes: 4321}
	o := theRunner(t).run(t.Context(), c)
	if o.stdout.String() != "7\n65536\n2048\n33\n33\n4321\n" {
		t.Errorf("limits are %q, %q, %v", o.stdout, o.stderr, o.err)
	}
	c = testCommand("sh", "-c", "while :; do :; done")
	c.limits = rlimits{CPUSeconds: 1}
	if o = theRunner(t).run(t.Context(), c); o.signal != "SIGXCPU" {
		t.Errorf("a second of processor time: %+v", o)
	}
	for _, name := range []string{"no-such-command", "/etc/passwd"} {
		c.what.argv = []string{name}
		if o = theRunner(t).run(t.Context(), c); o.end != endStart || o.exitCode == 0 {
			t.Errorf("%q with limits: %+v", name, o)
		}
	}
	big := testCommand("true", strings.Repeat("x", 120<<10))
	big.limits.OpenFiles = 100
	for i := range 20 {
		big.env = append(big.env, fmt.Sprintf("E%d=%s", i, strings.Repeat("x", 120<<10)))
	}
	if o = theRunner(t).run(t.Context(), big); o.end != endStart && o.end != endExit {
		t.Errorf("a large environment: %s %v", o.end, o.err)
	}
}

// TestForkAtOnce: a child that is forked as the first thing is inside the limits too.
func TestForkAtOnce(t *testing.T) {
	tries := 500
	if testing.Short() {
		tries = 50
	}
	c := testCommand("sh", "-c", "(ulimit -n) & (ulimit -n) & wait")
	c.limits = rlimits{OpenFiles: 44}
	var done sync.WaitGroup
	next := make(chan struct{}, 4)
	for range tries {
		next <- struct{}{}
		done.Go(func() {
			if o := theRunner(t).run(t.Context(), c); o.stdout.String() != "44\n44\n" {
				t.Errorf("outside the limits: %q %q %v %s", o.stdout, o.stderr, o.err, o.end)
			}
			<-next
		})
	}
	done.Wait()
}

// TestHungStart: a command whose file is held by a write lease cannot start. It holds up nobody and ends at its timeout.
func TestHungStart(t *testing.T) {
	r := theRunner(t)
	path := filepath.Join(t.TempDir(), "held")
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	signal.Ignore(syscall.SIGIO)
	defer signal.Reset(syscall.SIGIO)
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Skip("no leases on this file system: ", err)
	}
	c := testCommand(path)
	c.timeout = 2 * time.Second
	held := make(chan outcome)
	go func() { held <- r.run(t.Context(), c) }()
	for range 20 {
		if o := r.run(t.Context(), testCommand("true")); o.end != endExit {
			t.Errorf("beside a hung start: %+v", o)
		}
		runtime.GC() // stops the world: it would wait for a thread that hangs in an exec
	}
	select {
	case o := <-held:
		t.Errorf("the held command ended first: %+v", o)
	default:
	}
	if o := <-held; o.end != endTimeout {
		t.Errorf("the held command ended by %s, %v", o.end, o.err)
	}
	for _, pid := range strangers(r) {
		if its, _ := tagOf(pid); its == r.next+1 {
			t.Errorf("the unborn command is alive")
		}
	}
}

// TestMixedRuns: hostile runs beside ones whose helper daemon must live exactly as long as its own command.
func TestMixedRuns(t *testing.T) {
	runs := 500
	if testing.Short() {
		runs = 60
	}
	r := theRunner(t)
	hostile := []string{
		`setsid sleep 1000 <&- >&- 2>&- & exit 0`,
		`(setsid sh -c 'setsid sleep 1000 & sleep 1000' &) ; exit 1`,
		`for i in 1 2 3 4 5 6; do setsid env -i /bin/sleep 1000 & done; kill -9 $$`,
		`sh -c 'while :; do setsid sleep 1000 & done' & sleep 0.05`,
	}
	// The daemon answers over a FIFO of its own: if another run's sweep had ended it, the read would find no writer.
	const kind = `d=$(mktemp -d) || exit 9; mkfifo $d/f || exit 8
		setsid sh -c "for i in 1 2 3; do echo alive; sleep 0.03; done > $d/f" & n=$(grep -c alive < $d/f); rm -r $d; test "$n" = 3`
	var done sync.WaitGroup
	next := make(chan struct{}, 6)
	for i := range runs {
		next <- struct{}{}
		done.Go(func() {
			defer func() { <-next }()
			w := newWitness(t)
			script := kind
			if i%2 == 0 {
				script = hostile[i/2%len(hostile)]
			}
			o := r.run(t.Context(), testCommand("sh", "-c", "exec 7>"+w.path+"; echo x >&7; "+script))
			if o.end != endExit || i%2 == 1 && o.exitCode != 0 {
				t.Errorf("run %d: %s, exit code %d, %q, %v", i, o.end, o.exitCode, o.stderr, o.err)
			}
			if w.gone(t) == "" {
				t.Errorf("run %d never began", i)
			}
		})
	}
	done.Wait()
	if left := strangers(r); len(left) != 0 {
		t.Errorf("children left: %v", left)
	}
}

// TestNoLeaks: 64 commands at once, half of them ended in odd moments, leave no descriptor, goroutine, zombie, tag or thread of ours.
func TestNoLeaks(t *testing.T) {
	r := theRunner(t)
	r.run(t.Context(), testCommand("true"))
	storm := func() {
		var done sync.WaitGroup
		for i := range 64 {
			done.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				c := testCommand("sh", "-c", "echo x; sleep 0.0"+strconv.Itoa(i%10)+"; echo y >&2")
				if i%2 == 0 {
					go func() { // the odd moment
						time.Sleep(time.Duration(i) * time.Millisecond)
						cancel()
					}()
				}
				if i%16 == 1 {
					c.limits.OpenFiles = 50
				}
				if i%16 == 3 {
					c.what.argv = []string{"no-such-command"}
				}
				r.run(ctx, c)
			})
		}
		done.Wait()
	}
	storm()
	settle := func() (fds, goroutines int) {
		for range 100 { // the waiter of an aborted start ends a moment after its run
			runtime.Gosched()
			time.Sleep(time.Millisecond)
		}
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), runtime.NumGoroutine()
	}
	fds, goroutines := settle()
	for range 3 {
		storm()
	}
	fdsAfter, goroutinesAfter := settle()
	if fdsAfter > fds || goroutinesAfter > goroutines {
		t.Errorf("descriptors %d → %d, goroutines %d → %d", fds, fdsAfter, goroutines, goroutinesAfter)
	}
	if left := strangers(r); len(left) != 0 {
		t.Errorf("children left: %v", left)
	}
	if len(r.live) != 0 || r.slots.Load() != 0 {
		t.Errorf("left in the runner: %d runs, %d slots", len(r.live), r.slots.Load())
	}
}

// TestManyRunsFewThreads: a running command holds no thread, as at a limit of tasks one more would be the server's end.
func TestManyRunsFewThreads(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("no pidfd")
	}
	r, ctx := theRunner(t), t.Context()
	threads := func() int { list, _ := os.ReadDir("/proc/self/task"); return len(list) }
	before := threads()
	var runs sync.WaitGroup
	for range 60 {
		runs.Go(func() {
			if o := r.run(ctx, testCommand("sleep", "2")); o.end != endExit || !o.exited {
				t.Errorf("%+v", o)
			}
		})
	}
	time.Sleep(time.Second)
	if now := threads(); now > before+30 {
		t.Errorf("%d threads with 60 commands, %d before", now, before)
	}
	runs.Wait()
}

// TestKilledAtBirth: what kills a command between its birth and its start leaves its status to its own run.
func TestKilledAtBirth(t *testing.T) {
	r := theRunner(t)
	runtime.LockOSThread() // it dies with the thread that made it
	defer runtime.UnlockOSThread()
	list, err := os.Open("/proc/thread-self/children")
	if err != nil {
		t.Fatal(err)
	}
	defer list.Close()
	r.lists = append(r.lists, list)
	defer func() { r.lists = r.lists[:len(r.lists)-1] }()
	c := testCommand("sleep", "1000")
	x := &run{runner: r, command: c, ctx: t.Context(), tag: r.next}
	r.next--
	r.live[x.tag] = x
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	pid, _, err := startCommand(&c, x.tag, "/bin/sleep", false, []*os.File{null, null, null})
	if err != nil {
		t.Fatal(err)
	}
	if !r.round(x) {
		t.Error("nothing was killed")
	}
	waitExit(pid)
	r.round(x)
	r.round(nil)
	if left := strangers(r); !slices.Contains(left, pid) {
		t.Errorf("it was reaped by another: %v are left", left)
	}
	x.pid = pid
	x.sweep()
	if o := x.outcome(endClient); o.exited || o.signal != "SIGKILL" || x.pid != gone {
		t.Errorf("its outcome is %+v", o)
	}
}

// TestAbortedStart: a client that goes while its command is being born never makes that look as if it had ended well.
func TestAbortedStart(t *testing.T) {
	r := theRunner(t)
	for i := range 300 {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(time.Duration(i) * 10 * time.Microsecond)
			cancel()
		}()
		if o := r.run(ctx, testCommand("sleep", "1000")); o.end != endClient || o.exited || o.err != nil {
			t.Fatalf("after %d µs: %+v", i*10, o)
		}
	}
	if left := strangers(r); len(left) != 0 {
		t.Errorf("children left: %v", left)
	}
}

// TestOrphansOfLongRun: what a running command orphans and what then dies does not pile up as zombies.
func TestOrphansOfLongRun(t *testing.T) {
	r := theRunner(t)
	w := newWitness(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan outcome)
	go func() {
		done <- r.run(ctx, testCommand("sh", "-c", "for i in 1 2 3 4 5; do (setsid true &) ; done; echo x >"+w.path+"; sleep 1000"))
	}()
	w.await(t)
	for begun := time.Now(); len(strangers(r)) > 1; time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > hangGuard {
			t.Fatalf("zombies stay: %v", strangers(r))
		}
	}
	cancel()
	<-done
}

// benchProcessorTime reports what the whole machine's processors did for one operation: on a busy machine the only figure that holds.
func benchProcessorTime(b *testing.B) func() {
	total := func() (t int64) {
		for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
			var u syscall.Rusage
			syscall.Getrusage(who, &u)
			t += u.Utime.Nano() + u.Stime.Nano()
		}
		return t
	}
	begun := total()
	return func() { b.ReportMetric(float64(total()-begun)/float64(b.N)/1e3, "cpu-µs/op") }
}

// BenchmarkRun compares one run with the standard library's way to start a command and take its output.
func BenchmarkRun(b *testing.B) {
	r := theRunner(b)
	plain := testCommand("/bin/true")
	limited := plain
	limited.limits.CPUSeconds = 10
	for _, way := range []struct {
		name string
		run  func()
	}{
		{"floor-Run", func() { exec.Command("/bin/true").Run() }},
		{"floor-Output", func() { exec.Command("/bin/true").Output() }},
		{"run", func() { r.run(context.Background(), plain) }},
		{"run-limits", func() { r.run(context.Background(), limited) }},
	} {
		b.Run(way.name, func(b *testing.B) {
			defer benchProcessorTime(b)()
			for b.Loop() {
				way.run()
			}
		})
	}
}

// TestOtherUser: a command of another user has that user's ids and groups, and no way to the server or its files.
func TestOtherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	secret := filepath.Join(t.TempDir(), ".env")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`id -u; id -g; id -G; cat %s; kill -0 %d; kill -STOP %[2]d; prlimit --pid %[2]d --nofile=10; cat /proc/%[2]d/environ; ulimit -n`, secret, os.Getpid())
	for _, limits := range []rlimits{{}, {OpenFiles: 77}} {
		c := testCommand("sh", "-c", script)
		c.cred = &credential{Uid: 65533, Gid: 65532, Groups: []uint32{65532, 65531}}
		c.limits = limits
		o := theRunner(t).run(t.Context(), c)
		if got := o.stdout.String(); !strings.HasPrefix(got, "65533\n65532\n65532 65531\n") || strings.Contains(got, "secret") {
			t.Errorf("limits %v: %q, %q, %v", limits, got, o.stderr, o.err)
		} else if limits.OpenFiles != 0 && !strings.HasSuffix(got, "\n77\n") {
			t.Errorf("limits %v: %q", limits, got)
		}
		if refusals := strings.Count(o.stderr.String(), "ermi"); refusals < 5 { // "not permitted", "Permission denied"
			t.Errorf("%d refusals in %q", refusals, o.stderr)
		}
	}
	w := newWitness(t)
	c := testCommand("sh", "-c", "exec 7>"+w.path+"; echo x >&7; setsid sleep 1000 & setsid sleep 1000 & exit 0")
	c.cred = &credential{Uid: 65533, Gid: 65532}
	theRunner(t).run(t.Context(), c)
	if w.gone(t) == "" {
		t.Error("the command never began")
	}
}

// TestNoTerminal: a server on a terminal, in the foreground, gives none of it to its commands.
func TestNoTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals: ", err)
	}
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals here: ", err)
	}
	defer slave.Close()
	for _, with := range []string{"terminal", "command"} {
		cmd := helperCommand(t, "on-a-terminal", with)
		var out strings.Builder
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, &out, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if want := map[string]string{"terminal": "opened", "command": "refused"}[with]; out.String() != want {
			t.Errorf("/dev/tty from the %s: %q, want %q", with, out.String(), want)
		}
	}
}

func init() {
	helpers["on-a-terminal"] = func() {
		if os.Args[1] == "terminal" { // the test's own premise
			if _, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
				fmt.Print("opened")
			}
			return
		}
		r, err := newRunner("terminal")
		if err != nil {
			fmt.Print(err)
			return
		}
		fmt.Print(r.run(context.Background(), testCommand("sh", "-c", "(: </dev/tty) 2>/dev/null && printf opened || printf refused")).stdout)
	}
}
