// This file is the command line: the table of commands, their flags and help, and the way in and out.
// It may read from and write to the terminal, and it alone.
// It must not do a command's work: that is in commands.go, which is handed a terminal and asks the other rooms.
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
	"io/fs"
	"net"
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
	needsServer                     // whether a server runs can be told
	onlyReads                       // works beneath a server's own command too
	wraps                           // from the first argument on everything is a command, flags included
)

const (
	manyArgs = 1 << 20 // no limit
	maxPort  = 65535
)

// cliCommand is one command; its flags are those that its help explains. They stand before, between or after the arguments,
// up to "--".
type cliCommand struct {
	name        string
	run         func(t *terminal) error
	least, most int // arguments
	traits      trait
}

// cliCommands is the whole surface.
func cliCommands() []cliCommand {
	return []cliCommand{
		{"setup", cliSetup, 0, 0, 0},
		{"start", cliStart, 0, 0, 0},
		{"stop", cliStop, 0, 0, 0},
		{"restart", cliRestart, 0, 0, needsServer},
		{"status", cliStatus, 0, 0, needsServer | onlyReads},
		{"config", cliConfig, 0, 0, 0},
		{"share", cliShare, 0, 0, needsServer},
		{"key rotate", cliKeyRotate, 0, 0, 0},
		{"acl list", cliACLList, 0, 0, needsPolicy | onlyReads},
		{"acl check", cliACLCheck, 1, manyArgs, needsPolicy | onlyReads | wraps},
		{"acl doctor", cliACLDoctor, 0, 0, needsPolicy},
		{"acl add", cliACLEdit, 1, 1, 0},
		{"acl remove", cliACLEdit, 1, 1, 0},
		{"audit", cliAudit, 0, 0, 0},
		{"audit verify", cliAuditVerify, 0, 1, onlyReads},
		{"plugin list", cliPluginList, 0, 0, needsSettings | onlyReads},
		{"plugin create", cliPluginMake, 0, 0, needsPolicy},
		{"plugin enable", cliPluginEdit, 0, 0, needsSettings},
		{"plugin disable", cliPluginEdit, 0, 0, needsSettings},
		{"plugin remove", cliPluginEdit, 0, 0, needsSettings},
		{"plugin doctor", cliPluginDoctor, 0, 0, needsSettings},
		{"starterkit", cliPluginMake, 0, manyArgs, needsPolicy},
		{"version", cliVersion, 0, 0, onlyReads},
		{"help", cliHelp, 0, 2, onlyReads},
	}
}

// ---- from arguments to a command

// terminal is where a command reads and writes, what it was told, and what it found: the configuration as it lies on disk,
// what is wrong with it, and what runs.
type terminal struct {
	in              io.Reader
	out, err        io.Writer
	inTerm, outTerm bool // somebody sits there
	beneath         bool // this is a command of an aexec server

	command string
	flags   map[string]string // those that were given; a switch is "true"
	from    startupFlags      // those of them that go before .env
	args    []string

	paths       // audit is where the settings say
	start       startup
	startErr    error
	settings    *settings // nil with settingsErr, as is snap
	snap        *snapshot
	settingsErr error
	plugins     []*plugin
	problems    []pluginProblem
	server      serverInfo // where a command needs it
	running     bool
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
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(t.err, "\n%s", c.help())
		return 2
	}
	return 1
}

// findCommand takes the one or two words of a command off the arguments. A command without run is an error, or what a first
// word like "acl" leads to: its help lists what there is.
func findCommand(args []string) (c cliCommand, rest []string) {
	all := cliCommands()
	for n := min(2, len(args)); n > 0; n-- {
		name := strings.Join(args[:n], " ")
		if name == "-v" || name == "--version" {
			name = "version"
		}
		if i := slices.IndexFunc(all, func(c cliCommand) bool { return c.name == name }); i >= 0 {
			return all[i], args[n:]
		}
	}
	if len(args) > 0 && slices.Contains([]string{"key", "acl", "plugin"}, args[0]) {
		return cliCommand{name: args[0]}, args[1:]
	}
	return c, args
}

// call runs a command.
func (t *terminal) call(c cliCommand, args []string) (err error) {
	t.command = c.name
	err = t.parse(c, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		_, err = io.WriteString(t.out, c.help())
		return err
	case c.run != nil && c.traits&onlyReads == 0 && t.beneath:
		return fmt.Errorf("%s does not work in a command of an aexec server, which does not administer itself\nhint: the operator can run it from a shell", c.name)
	case err != nil:
		return usageError(err.Error())
	case c.run == nil && len(t.args) > 0:
		return usageError(fmt.Sprintf("unknown command %q", strings.TrimSpace(c.name+" "+t.args[0])))
	case c.run == nil, len(t.args) < c.least:
		return usageError("something is missing")
	case len(t.args) > c.most:
		return usageError(fmt.Sprintf("unexpected argument %q", t.args[c.most]))
	}
	if err = t.survey(); err == nil && c.traits&needsServer != 0 {
		t.server, t.running, err = findServer(t.paths)
	}
	if err != nil {
		return err
	}
	if c.traits&needsPolicy != 0 && t.snap == nil || c.traits&needsSettings != 0 && t.settings == nil {
		return t.settingsErr
	}
	return c.run(t)
}

// parse reads flags and arguments by the command's help: each line of a flag defines it, and one that stands in the line of
// usage must be given.
func (t *terminal) parse(c cliCommand, args []string) (err error) {
	set := flag.NewFlagSet(c.name, flag.ContinueOnError)
	set.SetOutput(io.Discard)
	help := c.help()
	known := regexp.MustCompile(`(?m)^  --?([a-z-]+)( \S+)?  `).FindAllStringSubmatch(help, -1)
	for _, f := range known {
		if f[2] == "" {
			set.Bool(f[1], false, "")
		} else {
			set.String(f[1], "", "")
		}
	}
	if t.args, err = parseFlags(set, args, c.run == nil || c.traits&wraps != 0); err != nil {
		return err
	}
	t.flags = map[string]string{}
	set.Visit(func(f *flag.Flag) { t.flags[f.Name] = f.Value.String() })
	usage, _, _ := strings.Cut(help, "\n")
	for _, f := range known {
		if t.flags[f[1]] == "" && strings.Contains(usage, " --"+f[1]+" ") {
			return fmt.Errorf("--%s is missing", f[1])
		}
	}
	t.from.host, t.from.portSet = t.flags["host"], t.flags["port"] != ""
	if t.on("public") && t.from.host != "" {
		return errors.New("--public and --host exclude each other")
	} else if t.on("public") {
		t.from.host = "0.0.0.0"
	}
	t.from.port, err = t.number("port", 0, maxPort)
	return err
}

// parseFlags finds flags also behind arguments, which package flag does not.
func parseFlags(fs *flag.FlagSet, args []string, wraps bool) (positional []string, err error) {
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		rest := fs.Args()
		parsed := len(args) - len(rest)
		if wraps || len(rest) == 0 || parsed > 0 && args[parsed-1] == "--" {
			return append(positional, rest...), nil
		}
		positional, args = append(positional, rest[0]), rest[1:]
	}
}

func (t *terminal) on(name string) bool { return t.flags[name] == "true" }

func (t *terminal) number(name string, otherwise, most int) (int, error) {
	n, err := strconv.Atoi(cmp.Or(t.flags[name], strconv.Itoa(otherwise)))
	if err == nil && n >= 0 && n <= most {
		return n, nil
	}
	return 0, usageError(fmt.Sprintf("%q is not a number from 0 to %d", t.flags[name], most))
}

// helpText is one text of skills/_help.txt.
func helpText(name string) string {
	all, _ := helpFile.ReadFile("skills/_help.txt") // embedded: it is there
	_, text, _ := strings.Cut(string(all), "\n== "+name+"\n")
	text, _, _ = strings.Cut(text, "\n== ")
	return text
}

func (c cliCommand) help() string  { return helpText(cmp.Or(c.name, "aexec")) }
func cliVersion(t *terminal) error { return t.say("agent-exec %s", version) }

func cliHelp(t *terminal) error {
	c, rest := findCommand(t.args)
	if len(rest) > 0 {
		return usageError(fmt.Sprintf("unknown command %q", strings.Join(t.args, " ")))
	}
	_, err := io.WriteString(t.out, c.help())
	return err
}

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

// ask waits for yes; anything else, the end of input too, is a no.
func (t *terminal) ask(question string, args ...any) bool {
	fmt.Fprintf(t.err, question+" [y/N] ", args...)
	var answer string
	fmt.Fscanln(t.in, &answer)
	return strings.EqualFold(answer, "y") || strings.EqualFold(answer, "yes")
}

// show prints v if --json asks for it, else the text, its tabs made columns. It ends with the exit code if bad.
func (t *terminal) show(bad bool, code int, v any, text string) (err error) {
	if t.on("json") {
		enc := json.NewEncoder(t.out)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		err = enc.Encode(v)
	} else {
		tab := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tab, text)
		err = tab.Flush()
	}
	if err == nil && bad {
		err = exitStatus(code)
	}
	return err
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

func quoteWords(words []string) string { return strings.Join(each(words, strconv.Quote), " ") }

func pick(yes bool, one, other string) string {
	if yes {
		return one
	}
	return other
}

// ---- addresses

// shareHosts is the hosts of the URLs to print; link-local IPv6 addresses, which mean nothing without a zone, are left out.
func shareHosts(bound, ip string, local, all bool) (hosts []string, err error) {
	switch {
	case ip != "":
		host, err := cleanHost(ip)
		return []string{host}, err
	case all:
		addresses, err := net.InterfaceAddrs()
		for _, a := range addresses {
			if n, ok := a.(*net.IPNet); ok && (n.IP.To4() != nil || !n.IP.IsLinkLocalUnicast()) {
				hosts = append(hosts, n.IP.String())
			}
		}
		return hosts, err
	case local && bound != "::1":
		bound = "127.0.0.1"
	}
	return []string{reachable(bound)}, nil
}

// reachable is the host by which this machine reaches what listens on one.
func reachable(host string) string {
	if a, err := netip.ParseAddr(host); host == "" || err == nil && a.IsUnspecified() {
		return "127.0.0.1"
	}
	return host
}

// cleanHost accepts an address, IPv6 with or without brackets, or a host name (RFC 1123; its last label begins with a
// letter, or 10.0.0.256 would be a name), and nothing else: the text goes into a URL.
func cleanHost(text string) (string, error) {
	bare := strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	if a, err := netip.ParseAddr(bare); err == nil && a.Zone() == "" && !a.IsUnspecified() && (bare == text || "["+bare+"]" == text && a.Is6()) {
		return a.String(), nil
	}
	const maxHostName = 253 // characters, RFC 1035
	name := regexp.MustCompile(`^([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.?$`)
	if len(text) <= maxHostName && name.MatchString(text) {
		return text, nil
	}
	return "", usageError(fmt.Sprintf("%q is no address or name of a host (which has no http://, no port, no zone)", text))
}

// ---- what there is

func (t *terminal) survey() (err error) {
	if t.paths, err = configPaths(); err != nil {
		return err
	}
	t.start, t.startErr = loadStartup(t.paths, t.from)
	if t.settings, t.settingsErr = loadSettings(t.paths); t.settingsErr != nil {
		if errors.Is(t.settingsErr, fs.ErrNotExist) {
			t.settingsErr = fmt.Errorf("%w\nhint: aexec setup", t.settingsErr)
		}
		return nil
	}
	t.plugins, t.problems = loadPlugins(t.paths, t.settings)
	store, err := openStore(t.paths, pluginRules(t.plugins))
	if t.settingsErr = err; err == nil {
		t.snap, _, t.settingsErr = store.current()
	}
	t.audit = cmp.Or(t.settings.AuditFile, t.audit)
	return nil
}

// address is where the server listens, or would.
func (t *terminal) address() string {
	return cmp.Or(t.server.Address, net.JoinHostPort(t.start.host, strconv.Itoa(t.start.port)))
}

// changed names what is different on disk from what the server was started with.
func (t *terminal) changed() []string {
	onDisk, err := restartState(t.paths)
	if err != nil || !t.running {
		return nil // the error is among those of the settings
	}
	return changedNames(t.server.Restart, onDisk)
}

// warnings names what makes the server more dangerous than it need be. One that does not run does not run as root.
func (t *terminal) warnings() []string {
	if t.snap == nil {
		return nil
	}
	return each(startWarnings(t.address(), t.snap), func(w string) string {
		if rest, ok := strings.CutPrefix(w, "it runs as root, and so does"); ok && !t.running {
			return "started by root, it would run as root, and so would" + rest
		}
		return w
	})
}

func problemText(p pluginProblem) string {
	return fmt.Sprintf("%s in plugin %q: %q: %s", pick(p.Warning, "warning", "error"), p.Plugin, p.File, p.Message)
}

// pluginErrors is what of the problems keeps a server from starting.
func pluginErrors(problems []pluginProblem) (err error) {
	for _, p := range problems {
		if !p.Warning {
			err = errors.Join(err, errors.New(problemText(p)))
		}
	}
	return err
}

func pluginRules(plugins []*plugin) (rules []ruleSet) {
	for _, pl := range plugins {
		rules = append(rules, pl.Rules)
	}
	return rules
}
