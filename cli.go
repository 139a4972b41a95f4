// This file is the command line: the table of commands, their flags and help, the way in and out, and what each command says.
// It may read from and write to the terminal, and it alone.
// It must not decide, read a file or change anything itself: it asks the rooms whose job that is, and puts their answers into words.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf16"
	"unicode/utf8"
)

// cliCommand is one command; its flags and arguments are those that its help shows.
type cliCommand struct {
	run   func(t *terminal) error
	needs string // settings that can be read, or a policy: settings that are also fit to be in force
	reads bool   // it works beneath a server's own command too
}

// cliCommands is the whole surface. What has a help, and no line here, is a group of them.
var cliCommands = map[string]cliCommand{
	"setup":          {cliSetup, "", false},
	"start":          {cliStart, "", false},
	"stop":           {cliStop, "", false},
	"restart":        {cliStart, "", false},
	"status":         {cliStatus, "", true},
	"config":         {cliConfig, "", false},
	"share":          {cliShare, "", false},
	"key rotate":     {cliKeyRotate, "", false},
	"acl list":       {cliACLList, "policy", true},
	"acl check":      {cliACLCheck, "policy", true},
	"acl doctor":     {cliACLDoctor, "policy", false},
	"acl add":        {cliACLEdit, "settings", false},
	"acl remove":     {cliACLEdit, "settings", false},
	"audit":          {cliAudit, "", false},
	"audit verify":   {cliAuditVerify, "", true},
	"plugin list":    {cliPluginList, "settings", true},
	"plugin create":  {cliPluginMake, "policy", false},
	"plugin enable":  {cliPluginEdit, "settings", false},
	"plugin disable": {cliPluginEdit, "settings", false},
	"plugin remove":  {cliPluginEdit, "settings", false},
	"plugin doctor":  {cliPluginDoctor, "settings", false},
	"starterkit":     {cliPluginMake, "policy", false},
	"version":        {func(t *terminal) error { return t.say("agent-exec %s", version) }, "", true},
}

// terminal is where a command reads and writes, what it was told, and what it found.
type terminal struct {
	in              io.Reader
	out, err        io.Writer
	inTerm, outTerm bool // somebody sits there
	beneath         bool // this is a command of an aexec server

	command, help string
	flags         map[string]string // those that were given; a switch is "true"
	args          []string

	loaded
}

// usageError is a command line that makes no sense (exit 2); exitStatus says all by its number.
type usageError string
type exitStatus int

func (e usageError) Error() string { return string(e) }
func (e exitStatus) Error() string { return fmt.Sprint("exit status ", int(e)) }

// cli runs one command line, without the program's name, and gives the exit code.
func cli(args []string) int {
	t := &terminal{in: os.Stdin, out: escapeWriter{os.Stdout}, err: escapeWriter{os.Stderr},
		inTerm: isTerminal(os.Stdin), outTerm: isTerminal(os.Stdout), beneath: beneathServer()}
	return t.main(args)
}

func (t *terminal) main(args []string) int {
	err := t.call(args)
	if status, ok := errors.AsType[exitStatus](err); ok || err == nil {
		return int(status)
	}
	fmt.Fprintf(t.err, "aexec: %v\n", err)
	if t.on("json") && t.command == "start" { // to the process that waits for it
		t.show(false, 0, serverInfo{Error: err.Error()}, "")
	}
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(t.err, "\n%s", t.help)
		return 2
	}
	return 1
}

// call finds the command, which is the longest that there is a help for, and runs it.
func (t *terminal) call(args []string) error {
	switch strings.Join(args[:min(1, len(args))], "") {
	case "help":
		args = append(args[1:], "--help")
	case "-v", "--version":
		args = append([]string{"version"}, args[1:]...)
	}
	rest := args
	for words := min(2, len(args)); t.help == ""; words-- {
		t.command, rest = strings.Join(args[:words], " "), args[words:]
		t.help = helpText(strings.TrimSpace("aexec " + t.command))
	}
	c, err := cliCommands[t.command], t.parse(rest)
	switch {
	case c.run == nil && len(t.args) > 0:
		return usageError(fmt.Sprintf("unknown command %q", strings.TrimSpace(t.command+" "+t.args[0])))
	case errors.Is(err, flag.ErrHelp):
		return t.say("%s", strings.TrimSpace(t.help))
	case t.beneath && c.run != nil && !c.reads:
		return fmt.Errorf("%s is not for commands of an aexec server, which does not administer itself\nhint: run it from a shell", t.command)
	case err != nil:
		return usageError(err.Error())
	case c.run == nil:
		return usageError("a command is missing")
	case t.command == "version": // without a look at anything
		return c.run(t)
	}
	host := cmp.Or(t.flags["host"], pick(t.on("public"), "0.0.0.0", ""))
	t.loaded = load(startupFlags{key: handedKey(), host: host, port: t.flags["port"]})
	if t.dir == "" || c.needs != "" && t.settings == nil || c.needs == "policy" && t.snap == nil {
		return t.wrong
	}
	return c.run(t)
}

// parse reads flags and arguments by the command's help. Flags stand before, between or after the arguments.
func (t *terminal) parse(args []string) error {
	set := flag.NewFlagSet(t.command, flag.ContinueOnError)
	set.SetOutput(io.Discard)
	for _, f := range regexp.MustCompile(`(?m)^  --?([a-z-]+)( \S+)?  `).FindAllStringSubmatch(t.help, -1) {
		switch f[2] {
		case "":
			set.Bool(f[1], false, "")
		case " N", " P":
			set.Uint(f[1], 0, "")
		default:
			set.String(f[1], "", "")
		}
	}
	usage, _, _ := strings.Cut(t.help, "\n")
	_, form, _ := strings.Cut(usage, "[flags]")
	form, wraps := strings.CutPrefix(form, " -- ")
	for t.args = nil; len(args) > 0; { // package flag stops at the first argument, and we go on behind it
		if err := set.Parse(args); err != nil {
			return err
		}
		args = set.Args()
		n := pick(wraps, len(args), min(1, len(args)))
		t.args, args = append(t.args, args[:n]...), args[n:]
	}
	t.flags = map[string]string{}
	set.Visit(func(f *flag.Flag) { t.flags[f.Name] = f.Value.String() })
	most := 0 // arguments
	for _, word := range strings.Fields(form) {
		name, _, isFlag := strings.Cut(strings.TrimPrefix(word, "--"), "=")
		if isFlag && t.flags[name] == "" || !isFlag && word[0] != '[' && len(t.args) <= most {
			return fmt.Errorf("%s is missing", word)
		} else if !isFlag {
			most++
		}
	}
	if len(t.args) > most && !strings.Contains(form, "…") {
		return fmt.Errorf("unexpected argument %q", t.args[most])
	}
	return nil
}

func (t *terminal) on(name string) bool { return t.flags[name] == "true" }

// helpText is one text of skills/_help.txt.
func helpText(name string) string {
	_, text, _ := strings.Cut(skillText("_help.txt"), "\n== "+name+"\n")
	text, _, _ = strings.Cut(text, "\n== ")
	return text
}

// escapeWriter is the last look at all that goes out: no control or formatting character reaches a terminal, even where %q
// was forgotten. The escapes are JSON's, so that JSON keeps its meaning.
type escapeWriter struct{ w io.Writer }

func (e escapeWriter) Write(p []byte) (int, error) {
	out := make([]byte, 0, len(p))
	for _, c := range string(p) {
		if c == '\n' || strconv.IsPrint(c) && c != utf8.RuneError { // which is no character at all
			out = utf8.AppendRune(out, c)
			continue
		}
		for _, unit := range utf16.Encode([]rune{c}) {
			out = fmt.Appendf(out, `\u%04x`, unit)
		}
	}
	_, err := e.w.Write(out)
	return len(p), err
}

func (t *terminal) say(format string, args ...any) error {
	_, err := fmt.Fprintf(t.out, format+"\n", args...)
	return err
}

func (t *terminal) warnIf(yes bool, format string, args ...any) {
	if yes {
		fmt.Fprintf(t.err, "warning: "+format+"\n", args...)
	}
}

// ask waits for yes; anything else, the end of input too, is a no.
func (t *terminal) ask(question string, args ...any) bool {
	fmt.Fprintf(t.err, question+" [y/N] ", args...)
	var answer string
	fmt.Fscanln(t.in, &answer)
	return strings.EqualFold(answer, "y") || strings.EqualFold(answer, "yes")
}

// show prints v if --json asks for it, else the text, its tabs made columns. It ends with the exit code if bad.
func (t *terminal) show(bad bool, code int, v any, text string) error {
	if t.on("json") {
		data, _ := json.MarshalIndent(v, "", "  ") // these types always marshal, and without a tab
		text = string(data)
	}
	tab := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, text)
	if err := tab.Flush(); err != nil || !bad {
		return err
	}
	return exitStatus(code)
}

// showList shows a line for each row, and a last one, if there is one.
func showList[T any](t *terminal, bad bool, rows []T, last string, line func(T) string) error {
	return t.show(bad, 1, append([]T{}, rows...), strings.TrimSpace(strings.Join(append(each(rows, line), last), "\n")))
}

// each is what is made of a list: of an empty one [] in JSON, not null.
func each[T, U any](list []T, of func(T) U) []U {
	made := []U{}
	for _, item := range list {
		made = append(made, of(item))
	}
	return made
}

func pick[T any](yes bool, one, other T) T {
	if yes {
		return one
	}
	return other
}

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

func cliKeyRotate(t *terminal) error {
	if err := rotateKey(t.paths); err != nil {
		return err
	}
	t.say("a new key is in %q; aexec share prints it; the old key holds until: aexec restart", t.env)
	t.warnIf(t.start.keyInEnv, "API_KEY in the environment goes before .env: change it there too")
	if !t.on("restart") {
		return nil
	}
	t.loaded = load(startupFlags{})
	return cliStart(t)
}

func problemText(p *plugin) string {
	return fmt.Sprintf("%s in plugin %q: %s", pick(p.Enabled && p.Broken, "error", "warning"), p.Name, p.Problem)
}

func cliConfig(t *terminal) error {
	return errors.Join(t.wrong, showList(t, false, configTable(t.paths, t.start, t.settings), "", func(r configRow) string {
		return fmt.Sprintf("%s\t%s\t%s", pick(r.Change == "", strconv.Quote(r.Name), r.Name), marshal(r.Value), r.Change)
	}))
}

// hostOrAddress is a name or an address, or nothing: no http://, no port, no zone.
var hostOrAddress = regexp.MustCompile(`^([\w.-]*|[[:xdigit:]]*:[[:xdigit:]:.]*)$`)

func cliShare(t *terminal) error {
	bound, port, _ := net.SplitHostPort(t.server.Address)
	hosts := t.shareHosts(bound)
	switch ip := t.flags["ip"]; {
	case !hostOrAddress.MatchString(ip):
		return usageError(fmt.Sprintf("%q is no address or name of a host", ip))
	case t.start.key == nil:
		return t.wrong
	case t.on("check"):
		failed := error(nil)
		for _, host := range hosts { // each is asked for what an agent reads first
			problem := probeServer(net.JoinHostPort(host, port))
			failed = pick(problem == nil, failed, error(exitStatus(1)))
			t.say("http://%s: %v", net.JoinHostPort(host, port), cmp.Or(problem, errors.New("ok")))
		}
		return failed
	}
	t.warnIf(!t.running, "the server is not running; start it with: aexec start")
	t.warnIf(slices.Contains(changedOnDisk(t.paths, t.server.Restart), "API_KEY"), "the server wants the old key until: aexec restart")
	t.warnIf(len(t.warnings()) > 0, "%s", strings.Join(t.warnings(), "\nwarning: "))
	if t.outTerm && !t.on("show-key") && !t.ask("what follows holds the API key, and who has it can run commands here; show it?") {
		return errors.New("the key was not shown\nhint: aexec share --show-key")
	}
	line := pick(t.outTerm, strings.Repeat("-", 60)+"\n", "")
	for i, host := range hosts {
		prompt := strings.NewReplacer("{URL}", "http://"+net.JoinHostPort(host, port), "{KEY}", t.start.key.text).Replace(helpText("prompt"))
		fmt.Fprint(t.out, pick(i > 0, "\n", ""), line, prompt, pick(t.on("safe"), "\n"+helpText("safety notes"), ""), line)
	}
	return nil
}

// shareHosts is the hosts of the URLs to print; link-local IPv6 addresses, which mean nothing without a zone, are left out.
func (t *terminal) shareHosts(bound string) (hosts []string) {
	switch {
	case t.flags["ip"] != "":
		return []string{t.flags["ip"]}
	case t.on("all"):
		addresses, _ := net.InterfaceAddrs()
		for _, a := range addresses {
			if host, _, _ := strings.Cut(a.String(), "/"); !strings.HasPrefix(host, "fe80:") {
				hosts = append(hosts, host)
			}
		}
		return hosts
	case bound == "0.0.0.0" || bound == "::" || t.on("local") && bound != "::1":
		return []string{"127.0.0.1"}
	}
	return []string{bound}
}

// ---- the policy

func cliACLList(t *terminal) error {
	return showList(t, false, t.snap.policy, "deny\teverything else", func(r *rule) string {
		return fmt.Sprintf("%s\t%s\t%s", r.List, marshal(r.Rule), r.Source)
	})
}

func cliACLCheck(t *terminal) error {
	if err := checkArgv(t.args); err != nil {
		return err
	}
	_, d := t.snap.policy.decide(t.args)
	return t.show(!d.Allowed, 1, d, fmt.Sprintf("%s: %q: %s", pick(d.Allowed, "allowed", "refused"), t.args, d.why()))
}

func cliACLDoctor(t *terminal) error {
	found := t.snap.policy.lint()
	last := fmt.Sprintf("%d found; a deny list is a seat belt, the allow list is the boundary", len(found))
	return showList(t, t.on("strict") && len(found) > 0, found, last, func(f finding) string {
		return fmt.Sprintf("%s\t%q\t%s\t%s (%s)", f.List, f.Rule, f.Source, f.Message, f.Code)
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
	rule := marshal(r)
	if why := broad(r); why != "" && !remove && list == "allow" && !t.on("force") {
		return fmt.Errorf("the rule %s is broad: %s\nhint: write a narrower one, or add --force", rule, why)
	}
	if err := editRules(t.paths, t.settings, list, r, remove, t.store.plugins); err != nil {
		return err
	}
	return t.say("%s exec.%s: %s, from the next request on", pick(remove, "removed from", "added to"), list, rule)
}

// ---- the audit log

const auditRow = "%6v  %-24v  %-17v  %-8v  %5v  %-15v  %s"

func cliAudit(t *terminal) error {
	if !t.on("json") {
		t.say(auditRow, "SEQ", "TIME", "EVENT", "DECISION", "EXIT", "IP", "COMMAND")
	}
	shown, _ := strconv.Atoi(cmp.Or(t.flags["n"], "20"))
	return readAudit(t.audit, shown, t.on("f"), func(l auditLine) error {
		if l.Torn || t.on("json") {
			return t.say("%s", l.Raw)
		}
		r := l.Record
		exit, what := r.Signal, strings.Join(each(r.Argv, strconv.Quote), " ")
		if r.ExitCode != nil {
			exit = strconv.Itoa(*r.ExitCode)
		}
		if why := cmp.Or(r.DenialReason, r.Reason); why != "" {
			what += fmt.Sprintf(" (%q)", why)
		}
		return t.say(auditRow, r.Seq, r.Timestamp, r.Event, r.ACLDecision, exit, r.SourceIP, strings.TrimSpace(what))
	})
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
	return showList(t, false, t.all, fmt.Sprintf("%d plugins", len(t.all)), func(p *plugin) string {
		state := pick(p.Broken, "broken", pick(p.Enabled, "enabled", "disabled"))
		return fmt.Sprintf("%q\t%s\t%s\t%q\t%q", p.Name, p.Type, state, p.Command, p.Description)
	})
}

// cliPluginEdit does to the plugin --name what the command is called.
func cliPluginEdit(t *terminal) error {
	action, name := strings.TrimPrefix(t.command, "plugin "), t.flags["name"]
	if err := editPlugin(t.paths, t.settings, name, action); err != nil {
		return err
	}
	return t.say("plugin %q: %sd; %s", name, action, pick(action == "enable", "it works after aexec restart", "the next restart unloads it"))
}

func cliPluginDoctor(t *terminal) error {
	bad := slices.ContainsFunc(t.problems, func(p *plugin) bool { return p.Enabled && p.Broken || t.on("strict") })
	return showList(t, bad, t.problems, fmt.Sprintf("%d found", len(t.problems)), problemText)
}

// cliPluginMake is plugin create and starterkit: each tool is asked about itself, and its settings are shown for review.
func cliPluginMake(t *terminal) error {
	r, err := newRunner(t.dir)
	if err != nil {
		return err
	}
	o, creates := plugin{Type: cmp.Or(t.flags["type"], "skill")}, t.command == "plugin create"
	names := pick(creates, []string{t.flags["name"]}, pick(len(t.args) == 0, starterTools, t.args))
	for _, o.Name = range names {
		o.Command = cmp.Or(t.flags["command"], o.Name)
		found, made, failed := createPlugin(t.paths, t.snap, o, t.on("force"), creates, r.run)
		if failed != nil {
			err = errors.Join(err, fmt.Errorf("%q: %w", o.Name, failed))
			continue
		}
		t.say("%q: %s", o.Command, pick(found, "found", "not found"))
		if made != "" {
			review := pick(t.on("silent") || t.on("quiet"), "", "\n"+strings.TrimSpace(made))
			t.say("created the plugin %q in %q; once its rules are reviewed: aexec restart%s", o.Name, t.paths.plugins, review)
			t.warnIf(!t.settings.enabled(o.Name), "plugin %q is not enabled: aexec plugin enable --name %s", o.Name, o.Name)
		}
	}
	return err
}
