package main

import (
	"crypto/rand"
	"debug/buildinfo"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// provenanceModules are all that may go into the program beside the standard library.
var provenanceModules = []string{"golang.org/x/sys", "golang.org/x/time"}

// provenanceGo runs the go command in a directory.
func provenanceGo(t *testing.T, dir string, env []string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("no Go here")
	}
	c := exec.CommandContext(t.Context(), "go", args...)
	c.Dir, c.Env = dir, append(os.Environ(), env...)
	out, err := c.Output()
	if err != nil {
		var exit *exec.ExitError
		errors.As(err, &exit)
		t.Fatalf("go %q: %v\n%s", args, err, exit.Stderr)
	}
	return string(out)
}

func TestModulesOfTheSource(t *testing.T) {
	file, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var required []string
	for _, m := range regexp.MustCompile(`(?m)^(?:require )?\s*([^\s/]+\.[^\s]+) v\S+`).FindAllStringSubmatch(string(file), -1) {
		required = append(required, m[1])
	}
	if slices.Sort(required); !slices.Equal(required, provenanceModules) || regexp.MustCompile(`(?m)^(replace|exclude|tool)\b`).Match(file) {
		t.Errorf("go.mod requires %q:\n%s", required, file)
	}
	listed := strings.Fields(provenanceGo(t, ".", nil, "list", "-m", "-f", "{{if not .Main}}{{.Path}}{{end}}", "all"))
	if slices.Sort(listed); !slices.Equal(listed, provenanceModules) {
		t.Errorf("the module graph holds %q", listed)
	}
}

// TestModulesOfTheProgram reads what `go version -m` prints of it.
func TestModulesOfTheProgram(t *testing.T) {
	info, err := buildinfo.ReadFile(buildBinary(t))
	if err != nil {
		t.Fatal(err)
	}
	var deps []string
	for _, d := range info.Deps {
		if deps = append(deps, d.Path); d.Replace != nil || d.Sum == "" {
			t.Errorf("%s is replaced or has no checksum: %+v", d.Path, d)
		}
	}
	if slices.Sort(deps); !slices.Equal(deps, provenanceModules) {
		t.Errorf("the program holds %q", deps)
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if settings["CGO_ENABLED"] != "0" || settings["-trimpath"] != "true" {
		t.Errorf("it was built with %v", settings)
	}
}

// TestBuildIsReproducible builds the same source in two directories. A comment at the end keeps the build cache from handing out
// the first build again; it changes nothing but the build ID, which is left out here.
func TestBuildIsReproducible(t *testing.T) {
	if testing.Short() || os.Getenv("AEXEC_TEST_BINARY") != "" {
		t.Skip("builds, which takes long without a build cache")
	}
	var built [2][]byte
	for i := range built {
		dir, out := filepath.Join(t.TempDir(), []string{"here", "quite/another place"}[i]), filepath.Join(t.TempDir(), "aexec")
		provenanceCopy(t, dir)
		if i > 0 {
			source, err := os.ReadFile(filepath.Join(dir, "main.go"))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, "main.go"), append(source, "\n// "+rand.Text()+"\n"...), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		provenanceGo(t, dir, []string{"CGO_ENABLED=0", "PWD=" + dir}, "build", "-trimpath", "-buildvcs=false", "-tags=nethttpomithttp2", "-ldflags=-s -w -buildid=", "-o", out, ".")
		var err error
		if built[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if string(built[0]) != string(built[1]) {
		at := 0
		for at < min(len(built[0]), len(built[1])) && built[0][at] == built[1][at] {
			at++
		}
		t.Errorf("two builds of one source, of %d and %d bytes, differ from byte %d on", len(built[0]), len(built[1]), at)
	}
}

// provenanceCopy copies what a build reads.
func provenanceCopy(t *testing.T, to string) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		name := d.Name()
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (strings.HasPrefix(name, ".") || name == "testdata"):
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, path), 0o755)
		case strings.HasSuffix(name, "_test.go") || !d.Type().IsRegular():
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, path), data, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
}
