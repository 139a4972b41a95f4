package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// helperVar names the helper program that this test binary is to play instead of running tests.
const helperVar = "AEXEC_TEST_HELPER"

// helpers are the programs that the test binary plays. Any *_test.go adds its own from an init function:
//
//	func init() { helpers["flood"] = func() { … } }
//
// A helper finds its arguments in os.Args[1:], and leaves with os.Exit or by returning (exit code 0).
var helpers = map[string]func(){}

// helpersUsed holds the name of each helper that some test asked for.
var helpersUsed sync.Map

// helperEnv is the environment entry that turns a re-execution of os.Executable() into the named helper.
func helperEnv(name string) string {
	if helpers[name] == nil {
		panic("no such helper: " + name)
	}
	helpersUsed.Store(name, true)
	return helperVar + "=" + name
}

// helperCommand is this test binary as the named helper, with the test's own environment beside.
func helperCommand(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), self, args...)
	c.Env = append(os.Environ(), helperEnv(name))
	return c
}

// testTemp lives as long as the test binary: the built program, and a configuration directory that nobody made.
var testTemp string

func TestMain(m *testing.M) {
	if launched() {
		os.Exit(126)
	}
	if name := os.Getenv(helperVar); name != "" {
		helper, ok := helpers[name]
		if !ok {
			fmt.Fprintf(os.Stderr, "unknown helper %q\n", name)
			os.Exit(99)
		}
		helper()
		os.Exit(0)
	}
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		fmt.Fprintf(os.Stderr, "this is a test binary: as %q it would run all tests\n", os.Args)
		os.Exit(98) // a test that lets the program start itself, and not the built one, would start all tests, again and again
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	var err error
	if testTemp, err = os.MkdirTemp("", "aexec-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(testTemp)
	cleanEnvironment()
	code := m.Run()
	if code == 0 && flag.Lookup("test.run").Value.String() == "" && flag.Lookup("test.skip").Value.String() == "" &&
		flag.Lookup("test.list").Value.String() == "" && flag.Lookup("test.fuzz").Value.String() == "" && !testing.Short() {
		code = checkHelpersUsed()
	}
	return code
}

// cleanEnvironment keeps the tests away from the start-up values and the configuration of whoever runs them.
func cleanEnvironment() {
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(name, "AGENT_EXEC_") || slices.Contains([]string{"API_KEY", "HOST", "PORT"}, name) {
			os.Unsetenv(name)
		}
	}
	os.Setenv("AGENT_EXEC_CONFIG_DIR", filepath.Join(testTemp, "not-set-up"))
}

// checkHelpersUsed fails the run for a helper that no test plays: it proves nothing.
func checkHelpersUsed() int {
	code := 0
	for name := range helpers {
		if _, ok := helpersUsed.Load(name); !ok {
			fmt.Fprintf(os.Stderr, "helper %q is used by no test\n", name)
			code = 1
		}
	}
	return code
}

// built is the real program, built at most once in a run.
var built struct {
	once sync.Once
	path string
	err  error
}

// buildBinary gives the path of the real program. AEXEC_TEST_BINARY names one that is built already, for machines without Go.
func buildBinary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.path = os.Getenv("AEXEC_TEST_BINARY"); built.path != "" {
			return
		}
		built.path = filepath.Join(testTemp, "aexec")
		c := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags=nethttpomithttp2", "-ldflags=-s -w", "-o", built.path, ".")
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

func TestHelperIsPlayed(t *testing.T) {
	out, err := helperCommand(t, "say", "one", "two").Output()
	if err != nil || string(out) != "[one two]" {
		t.Errorf("helper said %q, %v", out, err)
	}
}

func init() { helpers["say"] = func() { fmt.Print(os.Args[1:]) } }
