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
	"net"
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
	hideProcess() // before anything reads the key; serve asks again, and minds if it fails
	os.Exit(cli(os.Args[1:]))
}

// serve is the server's whole life. Every error before it answers also reaches the process that started it in the background.
func serve(p paths, f startupFlags, logger *log.Logger) error {
	ready, key, err := takeHandover()
	f.key = key
	if err = errors.Join(err, hideProcess()); err == nil {
		err = serveUntilSignal(p, f, ready, logger)
	}
	if err != nil { // not in a panic, which says nothing and is the log's
		serverInfo{Error: err.Error()}.writeTo(ready)
	}
	return err
}

// serveUntilSignal loads, holds the directory, listens, says so to ready (nil in the foreground), and answers.
func serveUntilSignal(p paths, f startupFlags, ready *os.File, logger *log.Logger) error {
	start, err := loadStartup(p, f)
	if err != nil {
		return err
	}
	if start.keyInEnv {
		return shedKey(start.key, ready)
	}
	// What nobody has a use for is caught and dropped: if it were ignored, it would be so in every command, too.
	dropped, ends := []os.Signal{syscall.SIGPIPE, syscall.SIGHUP}, []os.Signal{syscall.SIGTERM, syscall.SIGINT}
	if ready == nil {
		dropped, ends = dropped[:1], append(ends, syscall.SIGHUP) // the terminal's end
	}
	signal.Notify(make(chan os.Signal, 1), dropped...)
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
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
	defer s.audit.close() // before the pid file: who can lock that can lock both
	l, err := listen(start.host, start.port)
	if err != nil {
		return err
	}
	s.runner, err = newRunner(p.dir)
	onDisk, diskErr := restartState(p)
	if err := errors.Join(err, diskErr); err != nil {
		return err
	}
	if err := s.prepare(l.Addr().String()); err != nil {
		return err
	}
	info := serverInfo{Pid: os.Getpid(), Address: l.Addr().String(), Version: version, Started: time.Now().UTC().Truncate(time.Second), Restart: onDisk}
	if err := s.started(info, lock); err != nil {
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

// started records, publishes and logs the start.
func (s *server) started(info serverInfo, lock *os.File) (err error) {
	record := auditRecord{Event: "server_start"}
	if lock == nil { // what looks left over may be the commands of a server that runs
		s.log.Print("warning: there can be no pid file: status and stop will not find this server")
	} else {
		if n := s.runner.endLeftovers(); n > 0 {
			record.Reason = fmt.Sprintf("ended %d processes that a crashed server left", n)
		}
		err = info.writeTo(lock)
	}
	err = errors.Join(err, s.audit.append(record))
	s.log.Printf("agent-exec %s listens on %s, pid %d, audit head %s", version, info.Address, info.Pid, s.audit.head())
	if snap, _, err := s.store.current(); err == nil {
		for _, warning := range startWarnings(info.Address, snap) {
			s.log.Print("warning: ", warning)
		}
	}
	return err
}

// assemble loads all that a server needs before it listens.
func assemble(p paths, start startup, logger *log.Logger) (*server, error) {
	plain, err := loadSettings(p)
	if err != nil {
		return nil, err
	}
	plugins, problems := loadPlugins(p, plain)
	if err := pluginErrors(problems); err != nil {
		return nil, err
	}
	store, err := openStore(p, pluginRules(plugins))
	if err != nil {
		return nil, err
	}
	audit, err := openAudit(cmp.Or(plain.AuditFile, p.audit), plain.AuditEnabled, start.key)
	return &server{start: start, store: store, audit: audit, plugins: plugins, log: logger, auditFile: p.audit}, err
}

// startWarnings names what makes this server more dangerous than it need be; for the log and for status.
func startWarnings(address string, snap *snapshot) (warnings []string) {
	if os.Geteuid() == 0 && (snap.cred == nil || snap.cred.Uid == 0) {
		warnings = append(warnings, "it runs as root, and so does every command: set exec.user to an unprivileged user")
	}
	host, _, _ := net.SplitHostPort(address)
	if a, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !a.Unmap().IsLoopback()) {
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
	state := pluginFingerprints(p)
	values, err := restartValues(p)
	maps.Copy(state, values)
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
	all := maps.Clone(now)
	maps.Copy(all, before)
	maps.DeleteFunc(all, func(name, _ string) bool { return before == nil || before[name] == now[name] })
	return slices.Sorted(maps.Keys(all))
}
