//go:build dev

package main

import (
	"bytes"
	"context"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// docStep is the step that docs/github-actions.md shows.
type docStep struct {
	Shell, Run string
	Env        map[string]string
}

func documentedStep(t *testing.T) docStep {
	t.Helper()
	for _, b := range docBlocks(readDoc(t, "docs/github-actions.md")) {
		var workflow struct {
			Permissions map[string]string
			Jobs        map[string]struct{ Steps []docStep }
		}
		if b.language != "yaml" || !strings.Contains(b.text, "\njobs:\n") {
			continue
		}
		if err := yaml.Unmarshal([]byte(b.text), &workflow); err != nil {
			t.Fatal(err)
		}
		if workflow.Permissions["id-token"] != "write" {
			t.Error("the workflow does not ask for id-token: write")
		}
		for _, job := range workflow.Jobs {
			for _, step := range job.Steps {
				if step.Run != "" {
					return step
				}
			}
		}
	}
	t.Fatal("docs/github-actions.md has no workflow with a step that runs something")
	panic("unreachable")
}

// runner runs the documented step as GitHub's runner does, except that sleep
// only takes down how long it should have slept.
type runner struct {
	t    *testing.T
	step docStep
	path string // PATH
	dir  string
}

func newRunner(t *testing.T) *runner {
	t.Helper()
	for _, tool := range []string{"bash", "curl", "jq"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("in CI, %s must be there: %v", tool, err)
			}
			t.Skipf("%s is not installed", tool)
		}
	}
	step := documentedStep(t)
	if step.Shell != "bash" || strings.Contains(step.Run, "${{") {
		t.Fatalf("shell %q; the script must be bash without expressions:\n%s", step.Shell, step.Run)
	}
	dir := t.TempDir()
	sleep := "#!/bin/sh\necho \"$@\" >>'" + filepath.Join(dir, "slept") + "'\n"
	if err := os.WriteFile(filepath.Join(dir, "sleep"), []byte(sleep), 0o755); err != nil {
		t.Fatal(err)
	}
	return &runner{t, step, dir + string(os.PathListSeparator) + os.Getenv("PATH"), dir}
}

// run runs the step; env overrides what the step sets. "-" takes a variable
// away.
func (r *runner) run(env map[string]string) (output string, code int, slept []string) {
	r.t.Helper()
	script := filepath.Join(r.dir, "step.sh")
	if err := os.WriteFile(script, []byte(r.step.Run), 0o600); err != nil {
		r.t.Fatal(err)
	}
	os.Remove(filepath.Join(r.dir, "slept"))
	vars := maps.Clone(r.step.Env)
	vars["PATH"] = r.path
	maps.Copy(vars, env)
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	// https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax#jobsjob_idstepsshell
	cmd := exec.CommandContext(ctx, "bash", "--noprofile", "--norc", "-eo", "pipefail", script)
	cmd.Env = []string{}
	for name, value := range vars {
		if value != "-" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		r.t.Fatalf("running the step: %v\n%s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(r.dir, "slept"))
	if err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode(), strings.Fields(string(text))
}

// flakyFront stands before web like a load balancer. It answers with the
// statuses that it is given, then passes on, and keeps the tokens it saw.
type flakyFront struct {
	mu       sync.Mutex
	statuses []int
	tokens   []string
	url      string
}

func newFlakyFront(t *testing.T, web string) *flakyFront {
	t.Helper()
	target, err := url.Parse(web)
	if err != nil {
		t.Fatal(err)
	}
	f := &flakyFront{}
	pass := httputil.NewSingleHostReverseProxy(target)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.tokens = append(f.tokens, r.Header.Get("Authorization"))
		status := 0
		if len(f.statuses) > 0 {
			status, f.statuses = f.statuses[0], f.statuses[1:]
		}
		f.mu.Unlock()
		if status == 0 {
			pass.ServeHTTP(w, r)
			return
		}
		w.WriteHeader(status)
		io.WriteString(w, "busy\n")
	}))
	t.Cleanup(s.Close)
	f.url = s.URL
	return f
}

// fail makes the next answers, and forgets the tokens so far.
func (f *flakyFront) fail(statuses ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.statuses, f.tokens = statuses, nil
}

// attempts are the tokens seen since fail.
func (f *flakyFront) attempts() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.tokens)
}

// startDocPair starts the real web and the real worker. The audience needs
// escaping in a query, as a URL with a query of its own does.
func startDocPair(t *testing.T) (vars map[string]string, pair *devPair) {
	t.Helper()
	const audience = "https://rollout.example.com/?a=1&b=2"
	getenv := env(map[string]string{"GITHUB_OIDC_AUDIENCE": audience, "LOG_LEVEL": "error"})
	pair, err := startDevPair(context.Background(), devOptions{image: "ghcr.io/acme/api:dev", repository: "acme/api"},
		getenv, newNarrator(getenv, io.Discard, t.Output()), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pair.stop)
	return map[string]string{
		"ACTIONS_ID_TOKEN_REQUEST_URL": pair.requestURL, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": pair.requestToken,
		"AUDIENCE": audience,
	}, pair
}

func TestDocumentedWorkflow(t *testing.T) {
	r := newRunner(t)
	env, pair := startDocPair(t)
	front := newFlakyFront(t, pair.webURL)
	env["ROLLOUT_URL"] = front.url
	with := func(name, value string) map[string]string {
		e := maps.Clone(env)
		e[name] = value
		return e
	}

	t.Run("restarts what runs the image", func(t *testing.T) {
		out, code, slept := r.run(env)
		m := regexp.MustCompile(`(?m)^accepted: .*"requestedAt":"([^"]+)"`).FindStringSubmatch(out)
		if code != 0 || m == nil || len(slept) > 0 {
			t.Fatalf("exit %d after sleeping %q:\n%s", code, slept, out)
		}
		eventually(t, "shop/api restarts", func() bool { return pair.kube.RestartedAt("shop/api") == m[1] })
	})

	t.Run("takes the other form of the body", func(t *testing.T) {
		page := readDoc(t, "docs/github-actions.md")
		bodies := regexp.MustCompile(`(?m)^BODY: '(.*)'$`).FindAllStringSubmatch(page, -1)
		if len(bodies) != 2 {
			t.Fatalf("the page shows %d bodies", len(bodies))
		}
		for _, body := range bodies {
			if out, code, _ := r.run(with("BODY", body[1])); code != 0 || !strings.Contains(out, "accepted: ") {
				t.Errorf("%s: exit %d:\n%s", body[1], code, out)
			}
		}
		if !strings.Contains(bodies[1][1], `"tags":[`) {
			t.Errorf("the second body has no tags: %s", bodies[1][1])
		}
	})

	t.Run("builds a body in lower case", func(t *testing.T) {
		for _, b := range docBlocks(readDoc(t, "docs/github-actions.md")) {
			if b.language != "sh" {
				continue
			}
			other := *r
			other.t, other.step.Run = t, b.text+r.step.Run
			env := with("GITHUB_REPOSITORY", "Acme/API")
			env["GITHUB_REF_NAME"] = "v1.2-RC"
			if out, code, _ := other.run(env); code != 0 || !strings.Contains(out, `"images":["ghcr.io/acme/api:v1.2-RC"]`) {
				t.Errorf("exit %d:\n%s", code, out)
			}
			return
		}
		t.Error("the page has no sh block")
	})

	t.Run("comes again with a fresh token", func(t *testing.T) {
		front.fail(503, 502)
		out, code, slept := r.run(env)
		tokens := front.attempts()
		if code != 0 || len(tokens) != 3 || len(slept) != 2 {
			t.Fatalf("exit %d after %d attempts, sleeping %q:\n%s", code, len(tokens), slept, out)
		}
		slices.Sort(tokens)
		if len(slices.Compact(tokens)) != 3 {
			t.Error("a token was used twice")
		}
		if strings.Contains(out, "eyJ") {
			t.Error("the step prints a token")
		}
	})

	t.Run("comes again without a connection", func(t *testing.T) {
		closed := httptest.NewServer(nil)
		closed.Close()
		out, code, slept := r.run(with("ROLLOUT_URL", closed.URL))
		if code == 0 || len(slept) < 5 || !strings.Contains(out, "::error::not accepted after") {
			t.Errorf("exit %d, sleeping %q:\n%s", code, slept, out)
		}
		total := 0 * time.Second
		for _, s := range slept {
			d, err := time.ParseDuration(s + "s")
			if err != nil || d < 2*time.Second || d > 10*time.Second {
				t.Errorf("it sleeps %s", s)
			}
			total += d
		}
		if total < 30*time.Second || total > 3*time.Minute {
			t.Errorf("it sleeps %s in all", total)
		}
	})

	t.Run("comes again when GitHub has no token", func(t *testing.T) {
		busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }))
		defer busy.Close()
		out, code, slept := r.run(with("ACTIONS_ID_TOKEN_REQUEST_URL", busy.URL+"/?a=b"))
		if code == 0 || len(slept) < 5 || !strings.Contains(out, "no token from GitHub") {
			t.Errorf("exit %d, sleeping %q:\n%s", code, slept, out)
		}
	})

	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, []byte(`{"image":"ghcr.io/acme/api:dev"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, variable, value string
		hints                 []string
	}{
		{"an image that is not allowed", "BODY", `{"image":"docker.io/evil/api:dev"}`,
			[]string{"::error::this job may not restart this image", "it is under none of the prefixes"}},
		{"an image without a tag", "BODY", `{"image":"ghcr.io/acme/api"}`,
			[]string{"::error::the request is wrong (400)", "say which tag was pushed"}},
		{"a body that is too large", "BODY", `{"image":"` + strings.Repeat("a", maxRequestBytes) + `"}`,
			[]string{"::error::the request is wrong (413)", "send fewer tags"}},
		{"a body that looks like curl's file", "BODY", "@" + file,
			[]string{"::error::the request is wrong (400)"}},
		{"another audience", "AUDIENCE", "https://other.example.com",
			[]string{"::error::the token was refused", "AUDIENCE"}},
		{"another path", "ROLLOUT_URL", pair.webURL + "/deep",
			[]string{"::error::unexpected status 404", "ROLLOUT_URL"}},
		{"no permission to ask for a token", "ACTIONS_ID_TOKEN_REQUEST_URL", "-",
			[]string{"id-token: write"}},
	} {
		t.Run("stops at once at "+tt.name, func(t *testing.T) {
			front.fail()
			out, code, slept := r.run(with(tt.variable, tt.value))
			if code == 0 || len(slept) > 0 || len(front.attempts()) > 1 {
				t.Errorf("exit %d after %d attempts, sleeping %q", code, len(front.attempts()), slept)
			}
			for _, hint := range tt.hints {
				if !strings.Contains(out, hint) {
					t.Errorf("the output has no %q:\n%s", hint, out)
				}
			}
		})
	}
}

// docs/development.md has the flags of the dev subcommand and their defaults.
func TestDocsDevFlags(t *testing.T) {
	var help bytes.Buffer
	if err := runDev(t.Context(), []string{"-h"}, func(string) string { return "" }, &help, io.Discard); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^  -(\S+)( \S+)?\n\s+(.*?)(?: \(default "(.*)"\))?$`).FindAllStringSubmatch(help.String(), -1) {
		value := "`" + m[4] + "`"
		switch {
		case m[2] == "":
			value = "`false`"
		case m[4] == "":
			value = "none"
		}
		want["`--"+m[1]+"`"] = value + " " + m[3]
	}
	got := map[string]string{}
	for _, row := range docTable(t, "docs/development.md", "| flag | default | meaning |") {
		got[row[0]] = row[1] + " " + row[2]
	}
	if len(want) < 3 || !maps.Equal(got, want) {
		t.Errorf("docs/development.md has %v, and the flags are %v", got, want)
	}
}
