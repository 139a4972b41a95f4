// This file is the entry: version, dispatch, wiring, signals.
// It may end the process, and it alone.
// It must not hold logic that another room could: it reads straight down.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"maps"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

const (
	version   = "v0.1.0"
	watchTime = 10 * time.Second // between two looks for changes that need a restart
)

func main() {
	if launched() { // to become a command with limits, and could not
		os.Exit(126)
	}
	os.Exit(cli(os.Args[1:]))
}

// serve is the server's whole life. Every error before it answers also reaches the process that started it in the background.
func serve(f startupFlags, logger *log.Logger) error {
	ready, key, err := takeHandover()
	if f.key = key; err == nil {
		err = serveUntilSignal(f, ready, logger)
	}
	if err != nil { // not in a panic, which says nothing and is the log's
		serverInfo{Error: err.Error()}.writeTo(ready)
	}
	return err
}

// serveUntilSignal hides, loads, holds the directory, listens, tells ready, and answers.
func serveUntilSignal(f startupFlags, ready *os.File, logger *log.Logger) error {
	p, err := configPaths()
	if err := errors.Join(err, hideProcess()); err != nil {
		return err
	}
	start, err := loadStartup(p, f)
	if err != nil {
		return err
	}
	if start.keyInEnv {
		return shedKey(start.key, ready)
	}
	ctx, stop := untilSignal(ready != nil)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	lock, err := holdPidFile(p)
	if err != nil {
		return err
	}
	defer lock.Close()
	s, err := assemble(p, start, logger)
	if err != nil {
		return err
	}
	defer s.audit.close()
	l, err := listen(start.host, start.port)
	if err != nil {
		return err
	}
	defer l.Close()
	s.address = l.Addr().String()
	if s.runner, err = newRunner(p.dir); err != nil {
		return err
	}
	onDisk, err := restartState(p)
	info := serverInfo{Pid: os.Getpid(), Address: s.address, Version: version, Started: time.Now().UTC().Truncate(time.Second), Restart: onDisk}
	leftovers := 0
	if lock == nil { // what looks left over may be the commands of a server that runs
		logger.Printf("warning: there is no %s and it cannot be made: status and stop will not find this server", p.pid)
	} else {
		leftovers, err = s.runner.endLeftovers(), errors.Join(err, info.writeTo(lock))
	}
	if err := errors.Join(err, s.logStart(leftovers)); err != nil {
		return err
	}
	info.writeTo(ready) // if the starter is gone, nobody needs it
	ready.Close()
	go watchRestart(time.Tick(watchTime), p, onDisk, logger)
	err = s.serve(ctx, l)
	why := cmp.Or(context.Cause(ctx), err)
	err = errors.Join(err, s.audit.append(auditRecord{Event: "server_stop", Reason: fmt.Sprint(why)}))
	logger.Printf("stopped (%v), audit head %s", why, s.audit.head())
	return err
}

// untilSignal is a context that ends with SIGTERM or SIGINT, and in the foreground with the terminal. A background server
// has no use for SIGHUP, nobody has for SIGPIPE: they are caught and dropped, for ignored ones would be so in every command.
func untilSignal(background bool) (context.Context, context.CancelFunc) {
	dropped, ends := []os.Signal{syscall.SIGPIPE}, []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP}
	if background {
		dropped, ends = append(dropped, syscall.SIGHUP), ends[:2]
	}
	signal.Notify(make(chan os.Signal, 1), dropped...)
	return signal.NotifyContext(context.Background(), ends...)
}

// assemble loads all that a server needs before it listens.
func assemble(p paths, start startup, logger *log.Logger) (*server, error) {
	plain, err := loadSettings(p)
	if err != nil {
		return nil, err
	}
	found := state{}
	found.plugins, found.problems = loadPlugins(p, plain)
	if err := found.startErrors(); err != nil {
		return nil, err
	}
	store, err := openStore(p, found.pluginRules())
	if err != nil {
		return nil, err
	}
	audit, err := openAudit(cmp.Or(plain.AuditFile, p.audit), plain.AuditEnabled, start.key)
	return &server{start: start, store: store, audit: audit, plugins: found.plugins, log: logger, auditFile: p.audit}, err
}

// logStart records and logs the start.
func (s *server) logStart(leftovers int) error {
	record := auditRecord{Event: "server_start"}
	if leftovers > 0 {
		record.Reason = fmt.Sprintf("ended %d processes that a crashed server left", leftovers)
		s.log.Print(record.Reason)
	}
	if err := s.audit.append(record); err != nil {
		return err
	}
	s.log.Printf("agent-exec %s listens on %s, pid %d, audit head %s", version, s.address, os.Getpid(), s.audit.head())
	if !s.start.enabled {
		s.log.Print("AGENT_EXEC_ENABLED is not true: everything but /ping answers 503")
	}
	snap, _, err := s.store.current()
	if err == nil {
		for _, warning := range startWarnings(s.address, snap) {
			s.log.Print("warning: ", warning)
		}
	}
	return err
}

// startWarnings names what makes this server more dangerous than it need be; for the log and for status.
func startWarnings(address string, snap *snapshot) (warnings []string) {
	if os.Geteuid() == 0 && snap.cred == nil {
		warnings = append(warnings, "it runs as root, and so does every command: set exec.user to an unprivileged user")
	}
	if a, err := netip.ParseAddrPort(address); err == nil && !a.Addr().Unmap().IsLoopback() {
		warnings = append(warnings, fmt.Sprintf("it listens on %s in plain HTTP, beyond this machine: put TLS, a VPN or a firewall in front", address))
	}
	for _, r := range snap.policy.rules() {
		if why := broad(r.Rule); r.List == "allow" && why != "" {
			warnings = append(warnings, fmt.Sprintf("the allow rule %q (%s) is broad: %s", r.Rule, r.Source, why))
		}
	}
	return warnings
}

// restartState is everything on disk that only a restart brings into force, by name.
func restartState(p paths) (map[string]string, error) {
	state, err := restartValues(p)
	if err == nil {
		maps.Copy(state, pluginFingerprints(p))
	}
	return state, err
}

// watchRestart logs, once, each value on disk that has come to differ from the one in force.
func watchRestart(tick <-chan time.Time, p paths, inForce map[string]string, logger *log.Logger) {
	seen := inForce
	for range tick {
		onDisk, err := restartState(p)
		if err != nil {
			continue // an unusable settings.json is reported where it is read
		}
		for _, name := range changedNames(seen, onDisk) {
			if onDisk[name] != inForce[name] {
				logger.Printf("%q has changed on disk: it takes effect with aexec restart", name)
			}
		}
		seen = onDisk
	}
}

// changedNames lists, sorted, the names whose values differ, those that only one side has included; none for a server that
// has not said yet what it started with.
func changedNames(before, now map[string]string) []string {
	all := map[string]string{}
	maps.Copy(all, before)
	maps.Copy(all, now)
	maps.DeleteFunc(all, func(name, _ string) bool { return before == nil || before[name] == now[name] })
	return slices.Sorted(maps.Keys(all))
}
