package main

import (
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// These tests hold README.md and docs/ to the program. They see the program from
// outside: its help, its answers and its exit status.

func readDoc(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// docNames returns the files that match the patterns.
func docNames(t *testing.T, patterns ...string) (names []string) {
	t.Helper()
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, error %v", pattern, len(files), err)
		}
		names = append(names, files...)
	}
	return names
}

// docBlock is a fenced block, without the indentation of its fence.
type docBlock struct{ language, text string }

var fenceRE = regexp.MustCompile("(?ms)^( *)```([a-z]+)\n(.*?)^ *```$")

func docBlocks(text string) (blocks []docBlock) {
	for _, m := range fenceRE.FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, docBlock{m[2], strings.TrimPrefix(strings.ReplaceAll("\n"+m[3], "\n"+m[1], "\n"), "\n")})
	}
	return blocks
}

// helpOptions returns the default of each variable that -h of a subcommand
// lists, and fails if a flag is not named like its variable.
func helpOptions(t *testing.T, subcommand string) map[string]string {
	t.Helper()
	var help strings.Builder
	err := run(t.Context(), []string{subcommand, "-h"}, env(nil), &help, io.Discard)
	defaults := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^--(\S+)  +([A-Z_]+)  +(.+?)  +\S`).FindAllStringSubmatch(help.String(), -1) {
		if m[1] != strings.ReplaceAll(strings.ToLower(m[2]), "_", "-") {
			t.Errorf("%s: the flag of %s is --%s", subcommand, m[2], m[1])
		}
		defaults[m[2]] = m[3]
	}
	if len(defaults) < 5 {
		t.Fatalf("%s -h lists %d options, %v:\n%s", subcommand, len(defaults), err, &help)
	}
	return defaults
}

// allOptions returns for each variable the subcommands that use it, and its
// default, as docs/configuration.md writes them.
func allOptions(t *testing.T) map[string][2]string {
	t.Helper()
	all := map[string][2]string{}
	for _, subcommand := range []string{"web", "worker", "explain"} {
		for variable, def := range helpOptions(t, subcommand) {
			usedBy, shared := all[variable][0], all[variable][1]
			switch {
			case usedBy == "":
				all[variable] = [2]string{subcommand, def}
			case shared == "required" && def != "required":
				all[variable] = [2]string{usedBy + ", " + subcommand, "required (" + usedBy + ")"}
			default:
				all[variable] = [2]string{usedBy + ", " + subcommand, shared}
			}
		}
	}
	return all
}

func TestDocsOptionTable(t *testing.T) {
	want, got := allOptions(t), map[string][2]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| (.+?) \\| (.+?) \\|").FindAllStringSubmatch(readDoc(t, "docs/configuration.md"), -1) {
		got[m[1]] = [2]string{m[2], strings.Trim(m[3], "`")}
	}
	for variable := range want {
		if got[variable] != want[variable] {
			t.Errorf("docs/configuration.md has %s as %q, and -h as %q", variable, got[variable], want[variable])
		}
		delete(got, variable)
	}
	if len(got) > 0 {
		t.Errorf("docs/configuration.md has %v, which no -h lists", got)
	}
}

// A name that begins like one of our variables is one of our variables.
func TestDocsVariables(t *testing.T) {
	known := allOptions(t)
	// https://docs.github.com/en/actions/reference/workflows-and-actions/variables
	known["GITHUB_REPOSITORY"], known["GITHUB_REF_NAME"] = [2]string{}, [2]string{}
	variableRE := regexp.MustCompile(`\b(LOG|OPS|VALKEY|ALLOWED|WEB|GITHUB|TRUST|WORKER|CLUSTER)(_[A-Z0-9]+)+\b`)
	for _, name := range docNames(t, "README.md", "docs/*.md", "k8s/*.yaml", "k8s/*/*.yaml", "Dockerfile") {
		for _, variable := range variableRE.FindAllString(readDoc(t, name), -1) {
			if _, ok := known[variable]; !ok {
				t.Errorf("%s: %s is not an option", name, variable)
			}
		}
	}
}

func TestDocsLinks(t *testing.T) {
	linkRE, headingRE := regexp.MustCompile(`\]\(([^)\s]+)\)`), regexp.MustCompile(`(?m)^#+ (.+)$`)
	punctuationRE := regexp.MustCompile(`[^\pL\pN _-]`)
	names, anchors := docNames(t, "README.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md"), map[string]bool{}
	for _, name := range names {
		for _, m := range headingRE.FindAllStringSubmatch(fenceRE.ReplaceAllString(readDoc(t, name), ""), -1) {
			anchors[name+"#"+strings.ReplaceAll(punctuationRE.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
		}
	}
	for _, name := range names {
		for _, m := range linkRE.FindAllStringSubmatch(readDoc(t, name), -1) {
			path, anchor, _ := strings.Cut(m[1], "#")
			target := filepath.Join(filepath.Dir(name), path)
			if path == "" {
				target = name
			}
			_, err := os.Stat(target)
			if !strings.Contains(m[1], "://") && (err != nil || anchor != "" && !anchors[target+"#"+anchor]) {
				t.Errorf("%s: the link to %s leads nowhere", name, m[1])
			}
		}
	}
}

// docs/development.md has all files of the program, and no other.
func TestDocsLayout(t *testing.T) {
	_, layout, _ := strings.Cut(readDoc(t, "docs/development.md"), "\n## Layout\n")
	var got []string
	for _, m := range regexp.MustCompile("`(\\w+\\.go)`").FindAllStringSubmatch(layout, -1) {
		got = append(got, m[1])
	}
	slices.Sort(got)
	want := slices.DeleteFunc(docNames(t, "*.go"), func(name string) bool { return strings.HasSuffix(name, "_test.go") || name == "dev.go" })
	if !slices.Equal(got, want) {
		t.Errorf("docs/development.md has the files %q, expected %q", got, want)
	}
}

// CI and the tests of e2e/ run these commands as they stand.
func TestReadmeCommands(t *testing.T) {
	for _, command := range []string{"go run -tags dev . dev", "go test ./...", "kubectl apply -f k8s/"} {
		if !regexp.MustCompile(`(?m)^ *` + regexp.QuoteMeta(command) + `$`).MatchString(readDoc(t, "README.md")) {
			t.Errorf("README.md has no line %q", command)
		}
	}
}

// YAML parses, web accepts every body, and a message is like those that web
// publishes.
func TestDocsExamples(t *testing.T) {
	w := newTestWeb(t, "")
	members := func(text string) []string {
		object := map[string]any{}
		if err := json.Unmarshal([]byte(text), &object); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		return slices.Sorted(maps.Keys(object))
	}
	w.post(nil, `{"image":"ghcr.io/acme/api:dev"}`)
	published := members(<-w.heard)
	for _, name := range docNames(t, "README.md", "docs/*.md") {
		text := readDoc(t, name)
		for _, b := range docBlocks(text) {
			if err := yaml.UnmarshalStrict([]byte(b.text), new(any)); b.language == "yaml" && err != nil {
				t.Errorf("%s: %v\n%s", name, err, b.text)
			}
		}
		for _, body := range regexp.MustCompile(`\{"image":[^{}]*\}`).FindAllString(text, -1) {
			if slices.Equal(members(body), published) {
				continue
			}
			if resp := w.post(nil, body); resp.StatusCode != http.StatusAccepted {
				t.Errorf("%s: web answers %d to %s", name, resp.StatusCode, body)
			}
		}
	}
}

// needTools skips a test where a tool is missing; in CI none may be.
func needTools(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil && os.Getenv("CI") != "" {
			t.Fatalf("%s is required in CI: %v", tool, err)
		} else if err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
}

// runCommand runs a command of the documentation with dir before the PATH.
func runCommand(t *testing.T, cmd *exec.Cmd, dir string) (output string, code int) {
	cmd.Env = append(cmd.Env, "PATH="+dir+string(os.PathListSeparator)+os.Getenv("PATH"), "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
