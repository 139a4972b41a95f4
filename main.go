// This file is the entry: version, dispatch, wiring, signals.
// It may end the process, and it alone.
// It must not hold logic that another room could: it reads straight down.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"syscall"
	"time"
)

const (
	version   = "v0.1.0"
	watchTime = 10 * time.Second // between two looks for changes that need a restart
)

func main() {
	if launched() || hideProcess() != nil { // it could not become a command with limits, or keep others out before it has a key
		os.Exit(126)
	}
	os.Exit(cli(os.Args[1:]))
}

// loaded is the configuration as it lies on disk. A server starts from it, and commands look at it.
type loaded struct {
	paths              // audit is where the settings say
	start    startup   // without a key it is of no use
	settings *settings // nil if the file cannot be read
	store    *store
	snap     *snapshot     // nil if the settings are not fit to be in force
	grace    time.Duration // of the settings
	server   serverInfo    // what runs; if nothing does, the address is where it would
	running  bool
	wrong    error // all that keeps a server from starting

	all, plugins, problems []*plugin // every one there is, the usable ones, and those that something is wrong with
}

// load goes on after an error, as most commands have a use for the rest.
func load(from startupFlags) (c loaded) {
	if c.paths, c.wrong = configPaths(); c.wrong != nil {
		return c
	}
	errs := make([]error, 3)
	c.server, c.running, errs[0] = findServer(c.paths)
	c.start, errs[1] = loadStartup(c.paths, from)
	c.server.Address = cmp.Or(c.server.Address, net.JoinHostPort(c.start.host, strconv.Itoa(c.start.port)))
	if c.settings, errs[2] = loadSettings(c.paths); errs[2] == nil {
		c.audit, c.grace = c.settings.AuditFile, c.settings.KillGrace
		c.all, c.plugins, c.problems = loadPlugins(c.paths, c.settings)
		c.store = &store{p: c.paths, plugins: each(c.plugins, func(p *plugin) ruleSet { return p.Rules })}
		c.snap, _, errs[2] = c.store.current()
	}
	for _, p := range c.problems {
		if p.Enabled && p.Broken {
			errs = append(errs, errors.New(problemText(p)))
		}
	}
	c.wrong = errors.Join(errs...)
	return c
}

// warnings names what makes the server, running or not, more dangerous than it need be.
func (c loaded) warnings() []string {
	list := []string{}
	if c.snap == nil {
		return list
	}
	if os.Geteuid() == 0 && (c.snap.cred == nil || c.snap.cred.Uid == 0) {
		list = append(list, "commands run as root: set exec.user to an unprivileged user")
	}
	if a, err := netip.ParseAddrPort(c.server.Address); err == nil && !a.Addr().Unmap().IsLoopback() {
		list = append(list, c.server.Address+" is plain HTTP beyond this machine: put TLS, a VPN or a firewall in front")
	}
	for _, r := range c.snap.policy {
		if why := broad(r.Rule); r.List == "allow" && why != "" {
			list = append(list, fmt.Sprintf("the allow rule %q (%s) is broad: %s", r.Rule, r.Source, why))
		}
	}
	return list
}

// serve is the whole life of a server in this process: it holds the directory, listens, says so, and answers until a signal.
func (t *terminal) serve() error {
	if t.start.keyInEnv {
		return shedKey(t.start.key)
	}
	// What nobody has a use for is caught and dropped: if it were ignored, it would be so in every command, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGHUP)
	// With --json it is in the background, where no terminal's end is its own.
	hangup := pick(t.on("json"), syscall.SIGTERM, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, hangup)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	lock, err := holdPidFile(t.paths)
	if err != nil {
		return err
	}
	defer lock.Close()
	audit, unopened := openAudit(t.audit, t.settings.AuditEnabled, t.start.key)
	defer audit.close() // before the pid file: who can lock that can lock both
	l, unheard := listen(t.start.host, t.start.port)
	runner, unready := newRunner(t.dir)
	if err := cmp.Or(unopened, unheard, unready); err != nil {
		return err
	}
	logger := log.New(t.err, "", log.LstdFlags)
	s := &server{start: t.start, store: t.store, audit: audit, runner: runner, plugins: t.plugins, log: logger}
	if err := s.prepare(l.Addr().String()); err != nil {
		return err
	}
	info := serverInfo{Pid: os.Getpid(), Address: s.address, Version: version, Started: time.Now(), Enabled: t.start.enabled}
	info.Restart, err = restartState(t.paths)
	record := auditRecord{Event: "server_start"}
	if lock != nil { // else what looks left over may be the commands of a server that runs
		if n := runner.endLeftovers(); n > 0 {
			record.Reason = fmt.Sprintf("ended %d processes that a crashed server left", n)
		}
		err = errors.Join(err, json.NewEncoder(lock).Encode(info))
	}
	if err = errors.Join(err, audit.append(record)); err != nil {
		return err
	}
	logger.Printf("agent-exec %s listens on %s, pid %d, audit head %s", version, info.Address, info.Pid, audit.head())
	t.started(info) // if the starter is gone, nobody needs it
	go watchRestart(time.Tick(watchTime), t.paths, info.Restart, logger)
	err = s.serve(ctx, l)
	why := cmp.Or(context.Cause(ctx), err)
	err = errors.Join(err, audit.append(auditRecord{Event: "server_stop", Reason: fmt.Sprint(why)}))
	logger.Printf("stopped (%v), audit head %s", why, audit.head())
	return err
}

// changedOnDisk names, sorted, what is not as it was when a server was started: values that differ, and those that only one
// side has. There are none while settings.json cannot be read, which is reported elsewhere, or the server has not said.
func changedOnDisk(p paths, inForce map[string]string) []string {
	onDisk, err := restartState(p)
	if err != nil || inForce == nil {
		return nil
	}
	all := maps.Clone(onDisk)
	maps.Copy(all, inForce)
	maps.DeleteFunc(all, func(name, _ string) bool { return inForce[name] == onDisk[name] })
	return slices.Sorted(maps.Keys(all))
}

// watchRestart logs what waits for a restart, whenever that becomes something else.
func watchRestart(tick <-chan time.Time, p paths, inForce map[string]string, logger *log.Logger) {
	var said []string
	for range tick {
		if changed := changedOnDisk(p, inForce); len(changed) > 0 && !slices.Equal(changed, said) {
			logger.Printf("changed on disk, and in force only after aexec restart: %q", changed)
			said = changed
		}
	}
}
