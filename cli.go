// This file is the command line: the table of commands, their flags and help, the way in and out, and what each command says.
// It may read from and write to the terminal, and it alone.
// It must not decide, read a file or change anything itself: it asks the rooms whose job that is, and puts their answers into words.
package main

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf16"
	"unicode/utf8"
)

// Rules for what is said: lower case, no full stop; an error says what happened, to which file or address, and on a
// line of its own ("hint: …") what to type next; foreign text (argv, names, paths, descriptions) only with %q. Answers go
// to standard output, errors, warnings and questions to standard error. share alone prints the key. No colours, ever.

//go:embed skills/_help.txt
var helpFile embed.FS

// trait is what must be right for a command to work at all, and what it is like.
type trait int

const (
	needsSettings trait = 1 << iota // settings.json can be read
	needsPolicy                     // and is in force, rules and tests included
	needsName                       // --name was given
	needsNothing                    // not even a configuration directory
	onlyReads                       // works beneath a server's own command too
	wraps                           // from the first argument on everything is a command, flags included
)

// cliCommand is one command; its flags are those that its help explains. They stand before, between or after the arguments,
// up to "--". One that does nothing (run is nil) is a group, whose help lists its commands.
type cliCommand struct {
	name        string
	run         func(t *terminal) error
	least, most int // arguments; -1: any number
	traits      trait
}

// cliCommands is the whole surface.
func cliCommands() []cliCommand {
	return []cliCommand{
		{"", nil, 1, -1, onlyReads | wraps},
		{"setup", cliSetup, 0, 0, 0},
		{"start", cliStart, 0, 0, 0},
		{"stop", cliStop, 0, 0, 0},
		{"restart", cliStart, 0, 0, 0},
		{"status", cliStatus, 0, 0, onlyReads},
		{"config", cliConfig, 0, 0, 0},
		{"share", cliShare, 0, 0, 0},
		{"key", nil, 1, -1, onlyReads | wraps},
		{"key rotate", cliKeyRotate, 0, 0, 0},
		{"acl", nil, 1, -1, onlyReads | wraps},
		{"acl list", cliACLList, 0, 0, needsPolicy | onlyReads},
		{"acl check", cliACLCheck, 1, -1, needsPolicy | onlyReads | wraps},
		{"acl doctor", cliACLDoctor, 0, 0, needsPolicy},
		{"acl add", cliACLEdit, 1, 1, 0},
		{"acl remove", cliACLEdit, 1, 1, 0},
		{"audit", cliAudit, 0, 0, 0},
		{"audit verify", cliAuditVerify, 0, 1, onlyReads},
		{"plugin", nil, 1, -1, onlyReads | wraps},
		{"plugin list", cliPluginList, 0, 0, needsSettings | onlyReads},
		{"plugin create", cliPluginMake, 0, 0, needsPolicy | needsName},
		{"plugin enable", cliPluginEdit, 0, 0, needsSettings | needsName},
		{"plugin disable", cliPluginEdit, 0, 0, needsSettings | needsName},
		{"plugin remove", cliPluginEdit, 0, 0, needsSettings | needsName},
		{"plugin doctor", cliPluginDoctor, 0, 0, needsSettings},
		{"starterkit", cliPluginMake, 0, -1, needsPolicy},
		{"version", func(t *terminal) error { return t.say("agent-exec %s", version) }, 0, 0, needsNothing | onlyReads},
	}
}

// ---- from arguments to a command

// terminal is where a command reads and writes, what it was told, and what it found.
type terminal struct {
	in              io.Reader
	out, err        io.Writer
	inTerm, outTerm bool // somebody sits there
	beneath         bool // this is a command of an aexec server

	command string
	flags   map[string]string // those that were given; a switch is "true"
	from    startupFlags      // those of them that go before .env
	args    []string

	loaded
}

// usageError is a command line that makes no sense (exit 2); exitStatus says all by its number.
type (
	usageError string
	exitStatus int
)

func (e usageError) Error() string { return string(e) }
func (e exitStatus) Error() string { return fmt.Sprint("exit status ", int(e)) }

// cli runs one command line, without the program's name, and gives the exit code.
func cli(args []string) int {
	t := &terminal{in: os.Stdin, out: escapeWriter{os.Stdout}, err: escapeWriter{os.Stderr},
		inTerm: isTerminal(os.Stdin), outTerm: isTerminal(os.Stdout), beneath: beneathServer()}
	return t.main(args)
}

func (t *terminal) main(args []string) int {
	c, rest := findCommand(args)
	err := t.call(c, rest)
	if status, ok := errors.AsType[exitStatus](err); ok || err == nil {
		return int(status)
	}
	fmt.Fprintf(t.err, "aexec: %v\n", err)
	if t.on("json") && t.command == "start" { // to the process that waits for it
		t.show(false, 0, serverInfo{Error: err.Error()}, "")
	}
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(t.err, "\n%s", c.help())
		return 2
	}
	return 1
}

// findCommand takes the words of a command off the arguments: two, one, or none, where the name is "".
func findCommand(args []string) (cliCommand, []string) {
	if len(args) > 0 && args[0] == "help" {
		args = append(args[1:], "--help")
	}
	all := cliCommands()
	for n := min(2, len(args)); ; n-- {
		name := strings.Join(args[:n], " ")
		if name == "-v" || name == "--version" {
			name = "version"
		}
		if i := slices.IndexFunc(all, func(c cliCommand) bool { return c.name == name }); i >= 0 {
			return all[i], args[n:]
		}
	}
}

// call runs a command.
func (t *terminal) call(c cliCommand, args []string) (err error) {
	t.command = c.name
	err = t.parse(c, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return t.say("%s", strings.TrimSpace(c.help()))
	case c.traits&onlyReads == 0 && t.beneath:
		return fmt.Errorf("%s does not work beneath an aexec server, which does not administer itself\nhint: run it from a shell", c.name)
	case err != nil:
		return usageError(err.Error())
	case len(t.args) < c.least:
		return usageError(pick(c.run == nil, "a command is missing", "an argument is missing"))
	case c.run == nil:
		return usageError(fmt.Sprintf("unknown command %q", strings.TrimSpace(c.name+" "+t.args[0])))
	case c.most >= 0 && len(t.args) > c.most:
		return usageError(fmt.Sprintf("unexpected argument %q", t.args[c.most]))
	case c.traits&needsName != 0 && t.flags["name"] == "":
		return usageError("--name is missing")
	case c.name == "plugin create" && t.flags["command"] == "":
		return usageError("--command is missing")
	case c.traits&needsNothing != 0:
		return c.run(t)
	}
	if t.loaded, err = load(t.from); err != nil {
		return err
	}
	if c.traits&needsPolicy != 0 && t.snap == nil || c.traits&needsSettings != 0 && t.settings == nil {
		return t.startable()
	}
	return c.run(t)
}

// parse reads flags and arguments by the command's help, where each line of a flag defines it.
func (t *terminal) parse(c cliCommand, args []string) error {
	set := flag.NewFlagSet(c.name, flag.ContinueOnError)
	set.SetOutput(io.Discard)
	for _, f := range regexp.MustCompile(`(?m)^  --?([a-z-]+)( \S+)?  `).FindAllStringSubmatch(c.help(), -1) {
		switch f[2] {
		case "":
			set.Bool(f[1], false, "")
		case " N", " P":
			set.Uint(f[1], 0, "")
		default:
			set.String(f[1], "", "")
		}
	}
	for t.args = nil; ; { // package flag stops at the first argument, and we go on behind it
		if err := set.Parse(args); err != nil {
			return err
		}
		rest := set.Args()
		parsed := len(args) - len(rest)
		if c.traits&wraps != 0 || len(rest) == 0 || parsed > 0 && args[parsed-1] == "--" {
			t.args = append(t.args, rest...)
			break
		}
		t.args, args = append(t.args, rest[0]), rest[1:]
	}
	t.flags = map[string]string{}
	set.Visit(func(f *flag.Flag) { t.flags[f.Name] = f.Value.String() })
	host := cmp.Or(t.flags["host"], pick(t.on("public"), "0.0.0.0", ""))
	t.from = startupFlags{key: handedKey(), host: host, port: t.flags["port"]}
	return nil
}

func (t *terminal) on(name string) bool { return t.flags[name] == "true" }

// helpText is one text of skills/_help.txt.
func helpText(name string) string {
	all, _ := helpFile.ReadFile("skills/_help.txt") // embedded: it is there
	_, text, _ := strings.Cut(string(all), "\n== "+name+"\n")
	text, _, _ = strings.Cut(text, "\n== ")
	return text
}

func (c cliCommand) help() string { return helpText(cmp.Or(c.name, "aexec")) }

// ---- how it is said

// escapeWriter is the last look at all that goes out: no control or formatting character reaches a terminal, even where %q
// was forgotten. The escapes are JSON's, so that JSON keeps its meaning.
type escapeWriter struct{ w io.Writer }

func (e escapeWriter) Write(p []byte) (int, error) {
	hidden := func(c rune) bool { return c != '\n' && !strconv.IsPrint(c) || c == utf8.RuneError } // or no character at all
	if !bytes.ContainsFunc(p, hidden) {
		return e.w.Write(p)
	}
	var out []byte
	for _, c := range string(p) {
		if !hidden(c) {
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

func (t *terminal) warn() {
	for _, w := range t.warnings() {
		t.warnIf(true, "%s", w)
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

// showList shows a line for each row, and a last one.
func showList[T any](t *terminal, bad bool, rows []T, last string, line func(T) string) error {
	return t.show(bad, 1, append([]T{}, rows...), strings.Join(append(each(rows, line), last), "\n"))
}

// each is the texts of a list: of an empty one [] in JSON, not null.
func each[T any](list []T, text func(T) string) []string {
	texts := []string{}
	for _, item := range list {
		texts = append(texts, text(item))
	}
	return texts
}

func pick(yes bool, one, other string) string {
	if yes {
		return one
	}
	return other
}

// ---- the configuration

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
	if t.on("restart") {
		return t.call(findCommand([]string{"restart"}))
	}
	return nil
}

func problemText(p *plugin) string {
	return fmt.Sprintf("%s in plugin %q: %s", pick(p.Enabled && p.Broken, "error", "warning"), p.Name, p.Problem)
}

func cliConfig(t *terminal) error {
	rows := configTable(t.paths, t.start, t.settings)
	lines := each(rows, func(r configRow) string {
		value, _ := json.Marshal(r.Value) // came from JSON
		return fmt.Sprintf("%s\t%s\t%s", pick(r.Change == "", strconv.Quote(r.Name), r.Name), value, r.Change)
	})
	return errors.Join(t.settingsErr, t.show(false, 0, rows, strings.Join(lines, "\n")))
}

// ---- handing out access

func cliShare(t *terminal) error {
	bound, port, _ := net.SplitHostPort(t.server.Address)
	hosts, err := t.shareHosts(bound)
	if err = cmp.Or(t.startErr, err); err != nil {
		return err
	} else if t.on("check") {
		return t.tryHosts(hosts, port)
	}
	t.warnIf(!t.running, "the server is not running; start it with: aexec start")
	t.warnIf(slices.Contains(changedOnDisk(t.paths, t.server.Restart), "API_KEY"), "the server wants the old key until: aexec restart")
	t.warn()
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

// hostName is letters, digits, hyphens, underscores and dots. Its last label begins with a letter, or 10.0.0.256 would be one.
var hostName = regexp.MustCompile(`^([\w-]+\.)*[a-zA-Z][\w-]*$`)

// shareHosts is the hosts of the URLs to print; link-local IPv6 addresses, which mean nothing without a zone, are left out.
func (t *terminal) shareHosts(bound string) (hosts []string, err error) {
	ip := t.flags["ip"]
	a, _ := netip.ParseAddr(cmp.Or(ip, bound))
	switch {
	case ip != "" && (a.Zone() != "" || a.IsUnspecified() || !a.IsValid() && !hostName.MatchString(ip)):
		return nil, usageError(fmt.Sprintf("%q is no address or name of a host (which has no http://, no port, no zone)", ip))
	case ip != "":
		bound = ip
	case t.on("all"):
		addresses, err := net.InterfaceAddrs()
		for _, a := range addresses {
			if n, ok := a.(*net.IPNet); ok && (n.IP.To4() != nil || !n.IP.IsLinkLocalUnicast()) {
				hosts = append(hosts, n.IP.String())
			}
		}
		return hosts, err
	case (t.on("local") || a.IsUnspecified()) && bound != "::1":
		bound = "127.0.0.1"
	}
	return []string{bound}, nil
}

// tryHosts asks for what an agent reads first. The key is not sent: another program may listen there.
func (t *terminal) tryHosts(hosts []string, port string) (err error) {
	for _, host := range hosts {
		code, body, problem := probeServer(net.JoinHostPort(host, port), "/SKILL.md")
		if problem == nil && code != http.StatusOK {
			problem = fmt.Errorf("the answer is %d, %.300q", code, body) // which says what to do
		}
		if problem != nil {
			err = exitStatus(1)
		}
		t.say("http://%s: %v", net.JoinHostPort(host, port), cmp.Or(problem, errors.New("ok")))
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
	rule, _ := r.MarshalJSON() // strings always marshal
	if why := broad(r); why != "" && !remove && list == "allow" && !t.on("force") {
		return fmt.Errorf("the rule %s is broad: %s\nhint: write a narrower one, or add --force", rule, why)
	}
	if err := editRules(t.paths, list, r, remove, t.rules); err != nil {
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
	return readAudit(t.audit, shown, t.on("f"), t.sayRecord)
}

func (t *terminal) sayRecord(l auditLine) error {
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
	return t.say("plugin %q: %sd, %s", name, action, pick(action == "disable", "at once (a restart unloads it)", "after aexec restart"))
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
	o, names := plugin{Type: cmp.Or(t.flags["type"], "skill")}, t.args
	if name := t.flags["name"]; name != "" {
		names = []string{name}
	} else if len(names) == 0 {
		names = starterTools
	}
	for _, o.Name = range names {
		o.Command = cmp.Or(t.flags["command"], o.Name)
		found, made, failed := createPlugin(t.paths, t.snap, o, t.on("force"), t.command != "starterkit", r.run)
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
