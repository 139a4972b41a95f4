package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// insideServer is the real program with everything allowed: what follows attacks it from inside an allowed command and through
// its files.
type insideServer struct {
	*daemonHome
	info serverInfo
}

type insideAnswer struct {
	Output, Stderr, Status, Error, Signal string
	ExitCode                              *int
}

// insideModes are the users that commands can run as: the server's own, and as root another.
func insideModes(t *testing.T, test func(t *testing.T, user string)) {
	users := []string{""}
	if os.Geteuid() == 0 {
		if _, err := user.Lookup("nobody"); err == nil {
			users = append(users, "nobody")
		}
	}
	for _, name := range users {
		t.Run("user="+name, func(t *testing.T) { test(t, name) })
	}
}

func insideStart(t *testing.T, user string, plugins ...string) *insideServer {
	t.Helper()
	s := &insideServer{daemonHome: newDaemonHome(t)}
	s.write(s.settings, fmt.Sprintf(`{"exec":{"allow":["*"],"cwd":"/","user":%q,"env":{"keep":["*"]}},"timeoutMs":15000,"killGraceMs":100}`, user))
	for _, hook := range plugins { // of a plugin for id
		dir := filepath.Join(s.plugins, "id")
		if err := os.MkdirAll(filepath.Join(dir, "hooks"), 0o700); err != nil {
			t.Fatal(err)
		}
		s.write(filepath.Join(dir, "SKILL.md"), "---\nname: id\ndescription: who it is\n---\n")
		s.write(filepath.Join(dir, "settings.json"), `{"plugin":{"type":"exec","command":"id","after":"hooks/after"}}`)
		s.write(filepath.Join(dir, "hooks", "after"), hook)
		os.Chmod(filepath.Join(dir, "hooks", "after"), 0o700)
	}
	s.must("start")
	s.info = s.server()
	return s
}

// ask runs one command, and wants the server to say status about it.
func (s *insideServer) ask(status int, argv ...string) (a insideAnswer) {
	s.t.Helper()
	body, _ := json.Marshal(map[string]any{"args": argv})
	r, err := http.NewRequest("POST", "http://"+s.info.Address+"/api/exec", strings.NewReader(string(body)))
	if err != nil {
		s.t.Fatal(err)
	}
	r.Close = true
	r.Header.Set("X-API-Key", daemonTestKey)
	r.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatalf("%q: %v\nlog:\n%s", argv, err, s.logText())
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(answer.Body)
	if json.Unmarshal(text, &a); answer.StatusCode != status {
		s.t.Errorf("%q: status %d, %s", argv, answer.StatusCode, text)
	}
	return a
}

func (s *insideServer) sh(script string) insideAnswer {
	s.t.Helper()
	return s.ask(200, "sh", "-c", script)
}

// TestInsideWorld: what a command and a hook find around them is what they were meant to have, with every variable kept.
func TestInsideWorld(t *testing.T) {
	const look = `ls -1 /proc/self/fd | tr '\n' ' '; echo; env; grep -E 'NoNewPrivs|SigBlk|SigIgn|CapAmb|CapInh' /proc/self/status; ulimit -c; (: </dev/tty) 2>/dev/null && echo terminal`
	check := func(t *testing.T, said string) {
		t.Helper()
		if !strings.HasPrefix(said, "0 1 2 3 \n") { // 3 is ls's own
			t.Errorf("descriptors: %q", said)
		}
		for _, secret := range []string{"API_KEY", "AGENT_EXEC_", daemonTestKey, daemonOtherKey, "terminal\n"} {
			if strings.Contains(said, secret) {
				t.Errorf("%q in %q", secret, said)
			}
		}
		for _, line := range []string{"NoNewPrivs:\t1\n", "SigBlk:\t0000000000000000\n", "CapAmb:\t0000000000000000\n", "CapInh:\t0000000000000000\n", "\n0\n"} {
			if !strings.Contains(said, line) {
				t.Errorf("no %q in %q", line, said)
			}
		}
	}
	insideModes(t, func(t *testing.T, user string) {
		t.Setenv("API_KEY", daemonTestKey)
		note := filepath.Join(t.TempDir(), "note")
		s := insideStart(t, user, "#!/bin/sh\ncat >/dev/null\nexec >"+note+"\n"+look+"\nexit 0\n")
		a := s.sh(look)
		check(t, a.Output)
		if home := slices.Contains(strings.Split(a.Output, "\n"), "HOME="+os.Getenv("HOME")); home != (user == "") {
			t.Errorf("user %q has %q", user, a.Output)
		}
		s.ask(200, "id")
		said, err := os.ReadFile(note)
		if err != nil {
			t.Fatal(err)
		}
		check(t, string(said))
	})
}

// TestInsideServerIsClosed: another user than root finds no way into the server's memory, environment and descriptors, with
// exec.user not even to signal, slow down or limit it; and nobody finds the key in a place that others can read.
func TestInsideServerIsClosed(t *testing.T) {
	insideModes(t, func(t *testing.T, user string) {
		s := insideStart(t, user)
		if all := s.sh(`cat /proc/[0-9]*/cmdline /proc/self/environ | tr '\0' '\n'`); strings.Contains(all.Output, daemonTestKey) {
			t.Error("the key is in a command line")
		}
		if os.Geteuid() == 0 && user == "" {
			return
		}
		tries := []string{"cat /proc/%d/environ", "cat /proc/%d/maps", "head -c1 /proc/%d/mem", "ls /proc/%d/fd", "ls /proc/%d/cwd/", "readlink /proc/%d/exe",
			"echo 1000 >/proc/%d/oom_score_adj", "cat /proc/%d/stack"}
		if user != "" {
			tries = append(tries, "kill -KILL %d", "kill -STOP %d", "prlimit --pid %d --nofile=1", "prlimit --pid %d --rss=1", "renice 19 %d",
				"for t in /proc/%d/task/*; do kill -KILL ${t##*/} && exit 0; done; false", "cat "+s.paths.env+" # %d", "ls "+s.dir+" # %d", ": >>"+s.audit+" # %d")
		}
		for _, try := range tries {
			if a := s.sh(fmt.Sprintf("("+try+")", s.info.Pid)); a.ExitCode == nil || *a.ExitCode == 0 {
				t.Errorf("%q: %+v", try, a)
			}
		}
		s.ask(200, "true")
	})
}

// TestInsideAdministration: under whatever name and environment aexec is started by a command, it does not change its own server.
func TestInsideAdministration(t *testing.T) {
	s := insideStart(t, "")
	dir := t.TempDir()
	copied, linked := filepath.Join(dir, "ls"), filepath.Join(dir, "aexec: launcher")
	program, err := os.ReadFile(buildBinary(t))
	if err == nil {
		err = os.WriteFile(copied, program, 0o755)
	}
	if err == nil {
		err = os.Symlink(buildBinary(t), linked)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := []string{cliRead(t, s.paths.env), cliRead(t, s.settings)}
	elsewhere := filepath.Join(dir, "elsewhere")
	ways := [][]string{
		{"aexec"}, {"ae"}, {copied}, {"env", linked}, {"env", "-i", "AGENT_EXEC_CONFIG_DIR=" + s.dir, copied}, {"env", "AGENT_EXEC_CONFIG_DIR=" + elsewhere, copied},
		{"setsid", "-w", copied}, {"sh", "-c", `(exec "$@") | cat >&2; false`, "sh", copied}, {"bash", "-c", `exec -a "aexec: launcher" "$@"`, "bash", copied},
	}
	orders := [][]string{{"setup", "--yes"}, {"start"}, {"stop"}, {"restart"}, {"key", "rotate"}, {"share", "--show-key"}, {"acl", "add", "--force", "rm *"}, {"acl", "remove", "*"},
		{"plugin", "disable", "--name", "x"}, {"plugin", "remove", "--name", "x"}, {"config"}, {"audit"}}
	for i, way := range ways {
		for j, order := range orders {
			if i > 0 && (i+j)%len(ways) > 2 { // the first way in full, of the others a third
				continue
			}
			a := s.ask(200, slices.Concat(way, order)...)
			if a.ExitCode == nil || *a.ExitCode == 0 || strings.Contains(a.Output+a.Stderr, daemonTestKey) {
				t.Errorf("%q %q: %+v", way, order, a)
			}
		}
	}
	if after := []string{cliRead(t, s.paths.env), cliRead(t, s.settings)}; !slices.Equal(before, after) {
		t.Errorf("%q became %q", before, after)
	}
	if _, err := os.Lstat(elsewhere); err == nil {
		t.Error("a command has set up another directory")
	}
	if s.server().Pid != s.info.Pid {
		t.Error("it is another server now")
	}
}

// TestInsideEscapes: whatever a command does to get away from its run, nothing of it is alive when the answer is there.
func TestInsideEscapes(t *testing.T) {
	ways := map[string]string{
		"double fork":       `(setsid sh -c 'sleep 1000 & sleep 1000 &' &)`,
		"clean environment": `env -i setsid /bin/sleep 1000 &`,
		"lowered tag":       `prlimit --rss=7 setsid sleep 1000 & prlimit --rss=0 sleep 1000 &`,
		"raised tag":        `prlimit --rss=unlimited setsid sleep 1000 & setsid sleep 1000 &`,
		"namespaces":        `unshare -Urpf sh -c 'setsid sleep 1000 & sleep 1000 & (sleep 1000 &)' & setsid sleep 1000 &`,
		"deaf":              `trap '' TERM HUP INT QUIT; setsid sh -c 'while :; do sleep 1000; done' & (sleep 1000 &)`,
		"stopped":           `setsid sh -c 'kill -STOP $$; sleep 1000' &`,
		"pipe kept":         `exec 8>&1 9>&2; setsid sleep 1000 >&8 2>&9 &`,
		"chain":             `i=0; while [ $i -lt 30 ]; do setsid sh -c 'sleep 1000 & setsid sleep 1000 & exit' & i=$((i+1)); done`,
	}
	insideModes(t, func(t *testing.T, user string) {
		s := insideStart(t, user)
		for name, way := range ways {
			w := newWitness(t)
			a := s.sh("exec 7>" + w.path + "; echo x >&7\n" + way + "\nexit 0")
			if said := w.gone(t); said == "" {
				t.Errorf("%s: it never began: %+v", name, a)
			}
		}
	})
}

// TestInsideSetuid: with noNewPrivileges a set-user-ID program is an ordinary one.
func TestInsideSetuid(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make one")
	}
	program, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip(err)
	}
	data, err := os.ReadFile(program)
	dir, dirErr := os.MkdirTemp("", "aexec-setuid-") // others cannot reach t.TempDir()
	if err != nil || dirErr != nil {
		t.Fatal(err, dirErr)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "program")
	if os.Chmod(dir, 0o755) != nil || os.WriteFile(file, data, 0o755) != nil || os.Chmod(file, 0o755|os.ModeSetuid) != nil {
		t.Fatal("it cannot be made")
	}
	a := insideStart(t, "nobody").ask(200, file, "--dump")
	if !strings.Contains(a.Output, "uid: 65534\n") || !strings.Contains(a.Output, "euid: 65534\n") {
		t.Errorf("%+v", a)
	}
}

// TestInsideFilesAreExchanged: what is no regular file in the place of settings.json or audit.jsonl stops all commands, and holds up none;
// when the right one is back, so is the server.
func TestInsideFilesAreExchanged(t *testing.T) {
	kinds := map[string]func(path, away string) error{
		"fifo":      func(path, _ string) error { return syscall.Mkfifo(path, 0o600) },
		"directory": func(path, _ string) error { return os.Mkdir(path, 0o700) },
		"link":      func(path, away string) error { return os.Symlink(away, path) },
		"loop":      func(path, _ string) error { return os.Symlink(path, path) },
		"socket": func(path, _ string) error {
			fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer syscall.Close(fd)
			wd, _ := os.Getwd()
			defer os.Chdir(wd)
			os.Chdir(filepath.Dir(path)) // an address holds 107 bytes
			return syscall.Bind(fd, &syscall.SockaddrUnix{Name: filepath.Base(path)})
		},
	}
	s := insideStart(t, "")
	s.ask(200, "true") // from its first answer on
	for _, file := range []string{s.settings, s.audit} {
		for kind, make := range kinds {
			if file == s.audit && kind == "fifo" {
				continue // a log may be a FIFO
			}
			away := file + ".away"
			if err := os.Rename(file, away); err != nil {
				t.Fatal(err)
			}
			if err := make(file, away); err != nil {
				t.Fatal(kind, err)
			}
			if a := s.ask(503, "true"); a.Error != "settings_invalid" && a.Error != "audit_unavailable" {
				t.Errorf("%s for %s: %+v", kind, file, a)
			}
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(away, file); err != nil {
				t.Fatal(err)
			}
			s.ask(200, "true")
		}
	}
	s.must("stop")
	s.must("audit", "verify")
}

// TestInsideHooksMisbehave: a hook that hangs, floods, lies, leaves daemons or is exchanged fails its own request and no other.
func TestInsideHooksMisbehave(t *testing.T) {
	w := newWitness(t)
	s := insideStart(t, "", "#!/bin/sh\nexec 7>"+w.path+"\necho x >&7\ncase $(cat "+w.path+".mode) in\nhang) sleep 1000;; flood) yes;; lie) echo '{\"args\":[\"rm\"]}';;"+
		" garbage) printf '\\377{';; daemon) setsid sleep 1000 & exec 7>&-;; esac\n")
	s.write(s.settings, `{"exec":{"allow":["*"]},"timeoutMs":1000,"killGraceMs":100}`)
	for _, mode := range []string{"hang", "flood", "lie", "garbage", "daemon"} {
		s.write(w.path+".mode", mode)
		status := 500
		if mode == "daemon" {
			status = 200
		}
		s.ask(status, "id")
		if w.gone(t) == "" {
			t.Errorf("%s: the hook never ran", mode)
		}
		s.ask(200, "true")
	}
	hook := filepath.Join(s.plugins, "id", "hooks", "after")
	for _, exchange := range []func() error{
		func() error { return os.WriteFile(hook, []byte("#!/bin/sh\necho x >"+w.path+"\n"), 0o700) },
		func() error { return os.Chmod(hook, 0o777) },
		func() error { return os.Remove(hook) },
		func() error { return os.Symlink("/bin/true", hook) },
	} {
		if err := exchange(); err != nil {
			t.Fatal(err)
		}
		s.ask(500, "id")
	}
	if said := w.gone(t); said != "" {
		t.Error("a hook ran that was not there at the start")
	}
}
