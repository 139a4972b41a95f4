package main

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// theRunner is shared by all tests of this process, as it is in the server: a second one would end the first one's commands.
var theRunner = func() func(t testing.TB) *runner {
	var r *runner
	return func(t testing.TB) *runner {
		if r == nil {
			var err error
			if r, err = newRunner("test"); err != nil {
				t.Fatal(err)
			}
		}
		return r
	}
}()

func plainCommand(argv ...string) command {
	return command{what: approved{argv: argv}, env: []string{"PATH=/usr/bin:/bin"}, cwd: "/", pathDirs: []string{"/usr/bin", "/bin"},
		noNewPrivs: true, timeout: 10 * time.Second, killGrace: 200 * time.Millisecond, maxBytes: 1 << 20}
}

func (c chunks) String() string {
	var b strings.Builder
	for _, p := range c {
		b.Write(p)
	}
	return b.String()
}

func TestSmoke(t *testing.T) {
	r := theRunner(t)
	for _, argv := range [][]string{{"echo", "hi"}, {"sh", "-c", "echo err >&2; exit 3"}, {"nope"}, {"/etc/passwd"}, {"/tmp"}, {"sh", "-c", "kill -SEGV $$"}, {"/tmp/t/bad"},
		{"sh", "-c", "setsid sleep 100 & setsid sleep 100 >/dev/null 2>&1 & echo started"}, {"head", "-c", "3000000", "/dev/zero"}} {
		o := r.run(context.Background(), plainCommand(argv...))
		t.Logf("%q: %s exited=%v code=%d sig=%q err=%v out=%.40q(%d) err=%.40q %v", argv, o.end, o.exited, o.exitCode, o.signal, o.err, o.stdout, o.stdoutBytes, o.stderr, o.duration)
	}
	c := plainCommand("sh", "-c", "ulimit -a; ulimit -H -n")
	c.limits = rlimits{CPUSeconds: 3, MemoryBytes: 64 << 20, FileBytes: 1 << 20, OpenFiles: 17, Processes: 1000}
	o := r.run(context.Background(), c)
	t.Logf("%+v %s %s", o, o.stdout, o.stderr)
	c = plainCommand("sh", "-c", "trap '' TERM; sleep 100 & setsid sleep 100; echo x; sleep 100")
	c.timeout = 300 * time.Millisecond
	o = r.run(context.Background(), c)
	t.Logf("%+v %s %s", o, o.stdout, o.stderr)
	out, _ := exec.Command("ps", "-ef", "--ppid", "1", "--forest").CombinedOutput()
	_ = out
	out, _ = exec.Command("pgrep", "-a", "sleep").CombinedOutput()
	t.Logf("%s", out)
	_ = os.Args
}

func BenchmarkRun(b *testing.B) {
	r := theRunner(b)
	b.Run("floor", func(b *testing.B) {
		for b.Loop() {
			exec.Command("/bin/true").Run()
		}
	})
	b.Run("output", func(b *testing.B) {
		for b.Loop() {
			exec.Command("/bin/true").Output()
		}
	})
	b.Run("run", func(b *testing.B) {
		c := plainCommand("/bin/true")
		for b.Loop() {
			r.run(context.Background(), c)
		}
	})
	b.Run("limits", func(b *testing.B) {
		c := plainCommand("/bin/true")
		c.limits.CPUSeconds = 10
		for b.Loop() {
			r.run(context.Background(), c)
		}
	})
}
