// This file is what each command does: it asks the rooms whose job it is, and puts what they say into words.
// It may do what an operator may, with the terminal that cli.go hands it.
// It must not decide, read a file or change anything itself, nor say a word but by the rules at the head of cli.go.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	stopWait   = 30 * time.Second // beyond killGraceMs of the commands that run
	killWait   = 5 * time.Second  // after SIGKILL only the kernel can delay a process
	auditShown = 20               // records that `aexec audit` shows
)

var errNotRunning = errors.New("not running\nhint: aexec start")

// ---- the server as a process

func cliSetup(t *terminal) error {
	if t.inTerm && !t.on("yes") && !t.ask("create what is missing in %q?", t.dir) {
		return errors.New("nothing was created")
	}
	made, kept, err := createConfig(t.paths)
	for i, file := range append(made, kept...) {
		t.say("%s %q", pick(i < len(made), "created", "kept   "), file)
	}
	if err != nil {
		return err
	}
	return t.say("\nagents may run what %q allows: in a new setup, aexec --version\nnext: aexec start, then aexec share", t.paths.settings)
}

func cliStart(t *terminal) error { return t.launch("") }

// launch starts the server. before is the address of the one that it replaces, or "".
func (t *terminal) launch(before string) (err error) {
	t.server, t.running = serverInfo{}, false
	if !t.on("f") {
		args := []string{"--host=" + t.from.host, "--port=" + t.flags["port"]} // empty is as if not given
		if t.server, err = startBackground(t.paths, args); err != nil {
			return err
		}
		t.running = true
		for _, w := range t.warnings() {
			t.warnIf(true, "%s", w)
		}
	}
	if now := t.address(); before != "" && before != now {
		t.say("the address changes from http://%s to http://%s", before, now)
	}
	if t.on("f") {
		return serve(t.paths, t.from, log.New(t.err, "", log.LstdFlags))
	}
	return t.say("started: http://%s, pid %d", t.server.Address, t.server.Pid)
}

func cliStop(t *terminal) error {
	switch port := t.from.port; {
	case !t.from.portSet:
		return t.stop()
	case port == 0:
		return usageError(`"0" is not a number from 1 to 65535`)
	case !t.on("force"):
		return usageError("--port kills whatever listens there: it takes --force as well")
	default:
		return t.freePort(port, true)
	}
}

// stop ends the server; with --force also one that does not heed the signal.
func (t *terminal) stop() error {
	wait := stopWait
	if t.settings != nil {
		wait += t.settings.KillGrace
	}
	info, was, err := stopServer(t.paths, syscall.SIGTERM, wait)
	if err != nil && was && t.on("force") {
		t.warnIf(true, "pid %d does not stop, and is killed: %v", info.Pid, err)
		_, _, err = stopServer(t.paths, syscall.SIGKILL, killWait)
	}
	if err != nil {
		return err
	} else if !was {
		return errNotRunning
	}
	return t.say("stopped: pid %d", info.Pid)
}

// freePort kills whatever listens on a port, naming it first.
func (t *terminal) freePort(port int, must bool) error {
	holders, err := portHolders(t.paths, port)
	if err == nil && must && len(holders) == 0 {
		err = fmt.Errorf("nothing listens on port %d", port)
	}
	for _, h := range holders {
		if err == nil {
			t.say("killing pid %d, %q, which listens on port %d", h.Pid, h.Name, port)
			err = endProcess(h, syscall.SIGKILL, killWait)
		}
	}
	return err
}

// cliRestart stops nothing before it knows that what is on disk can start again, and that nobody else has the port. (Whose
// port it is cannot always be seen; then it is the start that fails.)
func cliRestart(t *terminal) error {
	err := errors.Join(t.startErr, t.settingsErr, pluginErrors(t.problems))
	before, port := t.server.Address, t.start.port
	if err == nil && port > 0 && !strings.HasSuffix(before, ":"+strconv.Itoa(port)) && !t.on("force") {
		holders, _ := portHolders(t.paths, port)
		for _, h := range holders {
			err = fmt.Errorf("pid %d, %q, listens on port %d\nhint: aexec restart --force kills it", h.Pid, h.Name, port)
		}
	}
	if err != nil {
		return fmt.Errorf("nothing was stopped, for it could not start again: %w", err)
	}
	if err = t.stop(); err == errNotRunning {
		err = nil
		t.warnIf(true, "no server was running")
	}
	if err == nil && t.on("force") && port > 0 {
		err = t.freePort(port, false)
	}
	if err == nil {
		err = t.launch(before)
	}
	return err
}

func cliKeyRotate(t *terminal) error {
	key, err := rotateKey(t.paths)
	if err != nil {
		return err
	}
	t.say("a new key is in %q; aexec share prints it", t.env)
	t.start, t.startErr = loadStartup(t.paths, t.from)
	t.warnIf(t.startErr == nil && t.start.key.id() != key.id(), "API_KEY in the environment goes before .env: change it there too")
	t.server, t.running, err = findServer(t.paths)
	if err != nil || !t.running {
		return err
	} else if t.on("restart") {
		return cliRestart(t)
	}
	return t.say("the old key holds until: aexec restart")
}

// ---- what runs, and what is configured

func cliStatus(t *terminal) error {
	status := t.facts()
	text := fmt.Sprintf("%s\ndirectory\t%q", pick(t.running, "running", "not running\thint: aexec start"), t.dir)
	for _, name := range slices.Sorted(maps.Keys(status)) {
		lines, isList := status[name].([]string)
		if !isList {
			lines = []string{cmp.Or(fmt.Sprint(status[name]), "none")}
		}
		label := strings.ToLower(regexp.MustCompile("[A-Z]").ReplaceAllString(name, " $0"))
		for _, line := range lines {
			text += fmt.Sprintf("\n%s\t%s", label, strings.ReplaceAll(line, "\n", "; "))
		}
	}
	status["running"], status["directory"] = t.running, t.dir
	return t.show(!t.running, 3, status, text)
}

// facts is what lies on disk, what is wrong with it, and what runs.
func (t *terminal) facts() map[string]any {
	head, valid := "", errors.New("valid")
	readAudit(t.audit, 3, false, func(l auditLine) error { // no log, no head
		head = pick(l.Torn, head, l.Head.String())
		return nil
	})
	facts := map[string]any{
		"enabled": t.start.enabled, "startup": cmp.Or(t.startErr, valid).Error(), "settings": cmp.Or(t.settingsErr, valid).Error(),
		"plugins": each(t.plugins, func(p *plugin) string { return p.Name }), "pluginProblems": each(t.problems, problemText),
		"auditHead": head, "warnings": append([]string{}, t.warnings()...),
	}
	if info := t.server; t.running {
		host, port, _ := net.SplitHostPort(info.Address)
		code, _, err := probeServer(net.JoinHostPort(reachable(host), port), "/ping", nil)
		maps.Copy(facts, map[string]any{
			"answers": err == nil && code == http.StatusOK, "pid": info.Pid, "address": info.Address, "version": info.Version, "started": info.Started,
			"uptime": time.Since(info.Started).Round(time.Second).String(), "needsRestart": append([]string{}, t.changed()...),
		})
	}
	return facts
}

func cliConfig(t *terminal) error {
	files, settings := configFiles(t.paths), []settingInfo{}
	if t.settings != nil {
		settings = t.settings.table()
	}
	lines := append(each(files, func(f fileInfo) string {
		return fmt.Sprintf("%q\t%s\t%s", f.Path, cmp.Or(f.Mode, "missing"), f.Problem)
	}), "")
	lines = append(lines, each(settings, func(row settingInfo) string {
		value, _ := json.Marshal(row.Value) // came from JSON
		return fmt.Sprintf("%s\t%s\t%s", row.Key, value, pick(row.Reloads, "reloads", "needs a restart"))
	})...)
	return errors.Join(t.settingsErr, t.show(false, 0, map[string]any{"files": files, "settings": settings}, strings.Join(lines, "\n")))
}

// ---- handing out access

func cliShare(t *terminal) error {
	ip, local, all := t.flags["ip"], t.on("local"), t.on("all")
	bound, port, _ := net.SplitHostPort(t.address())
	switch {
	case ip != "" && (local || all) || local && all:
		return usageError("--ip, --local and --all exclude each other")
	case t.startErr != nil:
		return t.startErr
	case port == "0":
		return errors.New("the server is not running, and with PORT 0 its address is not known before\nhint: aexec start")
	}
	hosts, err := shareHosts(bound, ip, local, all)
	if err != nil {
		return err
	}
	if t.on("check") {
		return t.tryHosts(hosts, port)
	}
	t.warnIf(!t.running, "the server is not running; start it with: aexec start")
	t.warnIf(slices.Contains(t.changed(), "API_KEY"), "the running server wants another key than the one in .env, until: aexec restart")
	t.warnIf(!t.start.enabled, "AGENT_EXEC_ENABLED is not true: every request is refused")
	t.warnIf(t.settingsErr != nil, "nothing is allowed: %v", t.settingsErr)
	a, _ := netip.ParseAddr(bound)
	for _, host := range hosts {
		t.warnIf(host != bound && (bound == "localhost" || a.Unmap().IsLoopback()),
			"the server listens on %s only: %s leads to it through a tunnel or proxy, or after: aexec restart --public", bound, host)
	}
	for _, w := range t.warnings() {
		t.warnIf(true, "%s", w)
	}
	if t.outTerm && !t.on("show-key") && !t.ask("what follows holds the API key, and who has it can run commands here; show it?") {
		return errors.New("the key was not shown\nhint: aexec share --show-key")
	}
	line := pick(t.outTerm, strings.Repeat("-", 60)+"\n", "")
	for i, host := range hosts {
		url := "http://" + net.JoinHostPort(host, port)
		prompt := fmt.Sprintf("You have access to a machine through agent-exec.\nURL: %s\nAPI_KEY: %s\nStart here:\n%s/SKILL.md\n", url, t.start.key.text, url)
		fmt.Fprint(t.out, pick(i > 0, "\n", ""), line, prompt, pick(t.on("safe"), "\n"+helpText("safety notes"), ""), line)
	}
	return nil
}

// tryHosts does what an agent would do first. The key goes only to where the guide was found.
func (t *terminal) tryHosts(hosts []string, port string) (err error) {
	hints := map[int]string{
		0:                       "aexec status; is it bound to this address (--host, --public), and is a firewall between?",
		http.StatusUnauthorized: "it refuses the key in .env: aexec restart, if the key is newer than the server",
		http.StatusForbidden:    "it refuses this client's address: look at ip.allow and ip.deny in settings.json",
	}
	for _, host := range hosts {
		address := net.JoinHostPort(host, port)
		code, body, problem := probeServer(address, "/SKILL.md", nil)
		if problem == nil && code == http.StatusOK {
			code, body, problem = probeServer(address, "/api/acl", t.start.key)
		}
		if problem == nil && code == http.StatusOK {
			t.say("http://%s: ok", address)
			continue
		}
		problem = cmp.Or(problem, fmt.Errorf("the answer is %d, %.200q", code, body))
		t.say("http://%s: %v\nhint: %s", address, problem, cmp.Or(hints[code], "aexec status"))
		err = exitStatus(1)
	}
	return err
}

// ---- the policy

func cliACLList(t *terminal) error {
	return showList(t, false, t.snap.policy.rules(), "deny\teverything else", func(r *rule) string {
		rule, _ := r.Rule.MarshalJSON() // strings always marshal
		return fmt.Sprintf("%s\t%s\t%s", r.List, rule, r.Source)
	})
}

func cliACLCheck(t *terminal) error {
	if err := checkArgv(t.args); err != nil {
		return err
	}
	_, d := t.snap.policy.decide(t.args)
	by := "no rule allows it"
	if d.Rule != "" {
		by = fmt.Sprintf("the %s rule %q of %s", d.List, d.Rule, d.Source)
	}
	return t.show(!d.Allowed, 1, d, fmt.Sprintf("%s: %s: %s", pick(d.Allowed, "allowed", "refused"), quoteWords(t.args), by))
}

func cliACLDoctor(t *terminal) error {
	found := t.snap.policy.lint()
	last := fmt.Sprintf("%d found; a deny list is a seat belt, the allow list is the boundary", len(found))
	return showList(t, t.on("strict") && len(found) > 0, found, last, func(f finding) string {
		return fmt.Sprintf("%s rule %q of %s: %s (%s)", f.List, f.Rule, f.Source, f.Message, f.Code)
	})
}

// cliACLEdit adds or removes a rule. What begins like an array of strings must be one; `[ -f *` does not.
func cliACLEdit(t *terminal) error {
	r, list, remove := ruleSpec{Text: t.args[0]}, pick(t.on("deny"), "deny", "allow"), t.command == "acl remove"
	if strings.HasPrefix(r.Text, `["`) {
		if err := json.Unmarshal([]byte(r.Text), &r.Argv); err != nil {
			return usageError(fmt.Sprintf("%q is not a JSON array of strings: %v", r.Text, err))
		}
		r.Text = ""
	}
	rule, _ := r.MarshalJSON() // strings always marshal
	if why := broad(r); why != "" && !remove && list == "allow" && !t.on("force") {
		return fmt.Errorf("the rule %s is broad: %s\nhint: write a narrower one, or add --force", rule, why)
	}
	if err := editRules(t.paths, list, r, remove, pluginRules(t.plugins)); err != nil {
		return err
	}
	return t.say("%s exec.%s: %s, from the next request on", pick(remove, "removed from", "added to"), list, rule)
}

// ---- the audit log

const auditRow = "%6v  %-24v  %-17v  %-8v  %5v  %8v  %-15v  %s"

func cliAudit(t *terminal) error {
	n, err := t.number("n", auditShown, math.MaxInt32)
	if err != nil {
		return err
	}
	show := func(l auditLine) error { return t.say("%s", l.Raw) }
	if !t.on("json") {
		show = t.sayRecord
		t.say(auditRow, "SEQ", "TIME", "EVENT", "DECISION", "EXIT", "DURATION", "IP", "COMMAND")
	}
	err = readAudit(t.audit, n, t.on("f"), show)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("nothing is recorded yet: %w\nhint: aexec start", err)
	}
	return err
}

func (t *terminal) sayRecord(l auditLine) error {
	r := l.Record
	if l.Torn {
		return t.say("  torn: %q", l.Raw)
	}
	exit, took, what := r.Signal, "", quoteWords(r.Argv)
	if r.ExitCode != nil {
		exit = strconv.Itoa(*r.ExitCode)
	}
	if r.DurationMs != nil {
		took = strconv.FormatInt(*r.DurationMs, 10) + "ms"
	}
	if why := cmp.Or(r.DenialReason, r.Reason); why != "" {
		what += fmt.Sprintf(" (%q)", why)
	}
	return t.say(auditRow, r.Seq, r.Timestamp, r.Event, r.ACLDecision, exit, took, r.SourceIP, strings.TrimSpace(what))
}

func cliAuditVerify(t *terminal) error {
	r, err := verifyAudit(cmp.Or(strings.Join(t.args, ""), t.audit), t.flags["head"])
	if err != nil {
		return err
	}
	return t.say("ok: %d records\nbegins at %d, torn lines (kept and covered): %d\nhead %s", r.Records, r.Begins, r.Torn, r.Head)
}

// ---- plugins

func cliPluginList(t *terminal) error {
	infos := surveyPlugins(t.paths, t.settings, true)
	last := pick(len(infos) > 0, "", "no plugins\thint: aexec plugin create --name NAME --command C")
	return showList(t, false, infos, last, func(i *plugin) string {
		state := pick(i.Enabled, "enabled", "disabled") + pick(i.usable(), "", ", broken")
		return fmt.Sprintf("%q\t%s\t%s\t%q\t%q", i.Name, i.Type, state, i.Command, i.Description)
	})
}

func cliPluginEdit(t *terminal) (err error) {
	name, done := t.flags["name"], ""
	switch t.command {
	case "plugin enable":
		done, err = "enabled, from the next start on", enablePlugin(t.paths, t.settings, name)
	case "plugin disable":
		done, err = "disabled, at once; a restart unloads it for good", disablePlugin(t.paths, name)
	case "plugin remove":
		done, err = "removed; a restart unloads it for good", removePlugin(t.paths, t.settings, name)
	}
	if err != nil {
		return err
	}
	return t.say("plugin %q: %s", name, done)
}

func cliPluginDoctor(t *terminal) error {
	problems := doctorPlugins(t.paths, t.settings)
	bad := slices.ContainsFunc(problems, func(p pluginProblem) bool { return !p.Warning || t.on("strict") })
	return showList(t, bad, problems, fmt.Sprintf("%d found", len(problems)), problemText)
}

// cliPluginMake is plugin create and starterkit: each tool is asked about itself, and its settings are shown for review.
func cliPluginMake(t *terminal) error {
	r, err := newRunner(t.dir)
	if err != nil {
		return err
	}
	written := 0
	progress := func(made pluginOrder, failed error) {
		if failed != nil {
			fmt.Fprintf(t.err, "aexec: %q: %v\n", made.Name, failed)
			err = exitStatus(1)
			return
		}
		t.say("%q: %s, asked for %s", made.Command, pick(made.Found, "found", "not found"), made.Took.Round(time.Millisecond))
		if made.Settings != "" {
			written++
			t.say("created the plugin %q in %q%s", made.Name, t.paths.plugins, pick(t.on("silent") || t.on("quiet"), "", "\n"+strings.TrimSpace(made.Settings)))
		}
	}
	probe := toolProbe(context.Background(), r, t.snap)
	if t.command == "starterkit" {
		starterKit(t.paths, t.settings, t.args, t.on("force"), probe, progress)
	} else {
		o := pluginOrder{Name: t.flags["name"], Command: t.flags["command"], Type: cmp.Or(t.flags["type"], "skill"), Force: t.on("force")}
		progress(createPlugin(t.paths, t.settings, o, false, probe))
	}
	t.say("%d plugins made%s", written, pick(written > 0, "; review their rules, then: aexec restart", ""))
	return err
}
