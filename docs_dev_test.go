//go:build dev

package main

import (
	"fmt"
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

	"sigs.k8s.io/yaml"
)

// documentedStep is the step that docs/github-actions.md shows.
func documentedStep(t *testing.T) (script string, env map[string]string) {
	var workflow struct {
		Permissions map[string]string
		Jobs        map[string]struct {
			Steps []struct {
				Shell, Run string
				Env        map[string]string
			}
		}
	}
	err := yaml.Unmarshal([]byte(docBlocks(readDoc(t, "docs/github-actions.md"))[0].text), &workflow)
	steps := workflow.Jobs["image"].Steps
	if err != nil || workflow.Permissions["id-token"] != "write" || len(steps) != 1 || steps[0].Shell != "bash" || strings.Contains(steps[0].Run, "${{") {
		t.Fatalf("expected a job with id-token: write and one step in bash without expressions, %v: %+v", err, workflow)
	}
	return steps[0].Run, steps[0].Env
}

// fakeGitHub is the URL at which a job gets tokens, and a proxy in front of web.
type fakeGitHub struct {
	*httptest.Server
	sync.Mutex
	audiences []string // that tokens were requested for
	tokens    []string // that reached the proxy
	failures  []int    // statuses with which the proxy answers next
}

func newFakeGitHub(t *testing.T, w *testWeb, failures []int) *fakeGitHub {
	f, mux := &fakeGitHub{failures: failures}, http.NewServeMux()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: strings.TrimPrefix(w.url, "http://")})
	mux.HandleFunc("GET /token", func(rw http.ResponseWriter, r *http.Request) {
		f.Lock()
		defer f.Unlock()
		audience := r.URL.Query().Get("audience")
		f.audiences = append(f.audiences, audience)
		if r.Header.Get("Authorization") != "bearer secret" || r.URL.Query().Get("api-version") != "2.0" {
			t.Errorf("a token is requested with %s and %q", r.URL, r.Header)
		}
		token := w.issuer.token(t, w.issuer.claimsWith(map[string]any{"aud": audience, "jti": fmt.Sprint(len(f.audiences))}))
		fmt.Fprintf(rw, `{"count":%d,"value":%q}`, len(token), token)
	})
	mux.HandleFunc("/", func(rw http.ResponseWriter, r *http.Request) {
		f.Lock()
		defer f.Unlock()
		f.tokens = append(f.tokens, r.Header.Get("Authorization"))
		if len(f.failures) == 0 {
			proxy.ServeHTTP(rw, r)
			return
		}
		rw.WriteHeader(f.failures[0])
		f.failures = f.failures[1:]
	})
	f.Server = httptest.NewServer(mux)
	return f
}

// runStep runs the documented step as a runner does, with a sleep that returns
// at once and says so.
func runStep(t *testing.T, script string, vars map[string]string) (output string, code int) {
	dir := t.TempDir()
	for name, text := range map[string]string{"step": script, "sleep": "#!/bin/sh\necho slept\n", "body": `{"image":"ghcr.io/acme/api:dev"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax#jobsjob_idstepsshell
	cmd := exec.CommandContext(t.Context(), "bash", "--noprofile", "--norc", "-eo", "pipefail", "step")
	cmd.Dir = dir
	for name, value := range vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return runCommand(t, cmd, dir)
}

func TestDocumentedWorkflow(t *testing.T) {
	needTools(t, "bash", "curl", "jq")
	step, stepEnv := documentedStep(t)
	web := newTestWeb(t, "")
	page := readDoc(t, "docs/github-actions.md")
	lowerCase := regexp.MustCompile(`(?m)^BODY=\$\(.*$`).FindString(page)
	tags := regexp.MustCompile(`(?m)^BODY: '(.*tags.*)'$`).FindStringSubmatch(page)
	requestIDRE := regexp.MustCompile(`\(request id [A-Z0-9]{26}\)`)
	type vars = map[string]string
	for _, tt := range []struct {
		name             string
		vars             vars // GITHUB stands for the fake's URL; "-" removes one
		failures         []int
		attempts, sleeps int    // attempts reach the proxy
		output           string // parts, separated by |
		success, noID    bool   // noID: the answer is not web's
	}{
		{name: "as it stands", attempts: 1, output: `accepted: |"images":["ghcr.io/acme/api:dev"]`, success: true},
		{name: "a trailing slash", vars: vars{"ROLLOUT_URL": "GITHUB/"}, attempts: 1, output: "accepted: ", success: true},
		{name: "several tags", vars: vars{"BODY": tags[1]}, attempts: 1, output: "accepted: |ghcr.io/acme/api:v1.2.3", success: true},
		{name: "a name with capitals", vars: vars{"GITHUB_REPOSITORY": "Acme/API", "GITHUB_REF_NAME": "v1.2-RC"}, attempts: 1,
			output: `"images":["ghcr.io/acme/api:v1.2-RC"]`, success: true},
		{name: "transient errors", failures: []int{503, 502, 429}, attempts: 4, sleeps: 3, output: "status 503|status 429|accepted: ", success: true},
		{name: "no connection", vars: vars{"ROLLOUT_URL": "http://127.0.0.1:1"}, sleeps: 11, output: "::error::not accepted after", noID: true},
		{name: "no token", vars: vars{"ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:1/?a=b"}, sleeps: 11, output: "no token from GitHub", noID: true},
		{name: "another image", vars: vars{"BODY": `{"image":"docker.io/evil/api:dev"}`}, attempts: 1,
			output: "::error::this job may not restart this image|docker.io/evil/api:dev"},
		{name: "no tag", vars: vars{"BODY": `{"image":"ghcr.io/acme/api"}`}, attempts: 1, output: "::error::the request is invalid (400)|tag"},
		{name: "too large", vars: vars{"BODY": strings.Repeat("a", 17<<10)}, attempts: 1, output: "::error::the request is invalid (413)"},
		{name: "a body like a file of curl", vars: vars{"BODY": "@body"}, attempts: 1, output: "::error::the request is invalid (400)"},
		{name: "another audience", vars: vars{"AUDIENCE": "https://other.example.com/?a=1&b=2"}, attempts: 1, output: "::error::the token is invalid|AUDIENCE"},
		{name: "another path", vars: vars{"ROLLOUT_URL": "GITHUB/deep"}, attempts: 1, output: "::error::unexpected status 404|ROLLOUT_URL", noID: true},
		{name: "no permission", vars: vars{"ACTIONS_ID_TOKEN_REQUEST_URL": "-"}, output: "id-token: write", noID: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			github := newFakeGitHub(t, web, tt.failures)
			env, script := maps.Clone(stepEnv), step
			maps.Copy(env, vars{"ACTIONS_ID_TOKEN_REQUEST_URL": "GITHUB/token?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "secret",
				"AUDIENCE": testAudience, "ROLLOUT_URL": "GITHUB"})
			maps.Copy(env, tt.vars)
			maps.DeleteFunc(env, func(_, value string) bool { return value == "-" })
			for name, value := range env {
				env[name] = strings.Replace(value, "GITHUB", github.URL, 1)
			}
			if env["GITHUB_REPOSITORY"] != "" {
				script = lowerCase + "\n" + script
			}
			out, code := runStep(t, script, env)
			github.Close()
			if (code == 0) != tt.success || len(github.tokens) != tt.attempts || strings.Count(out, "slept\n") != tt.sleeps {
				t.Errorf("exit %d after %d attempts:\n%s", code, len(github.tokens), out)
			}
			for part := range strings.SplitSeq(tt.output, "|") {
				if !strings.Contains(out, part) {
					t.Errorf("the output has no %q:\n%s", part, out)
				}
			}
			if requestIDRE.MatchString(out) == tt.noID || strings.Contains(out, "eyJ") {
				t.Errorf("the output has no request id, or a token:\n%s", out)
			}
			slices.Sort(github.tokens)
			slices.Sort(github.audiences)
			audiences := slices.Compact(github.audiences)
			if len(slices.Compact(github.tokens)) != tt.attempts || len(audiences) > 0 && !slices.Equal(audiences, []string{env["AUDIENCE"]}) {
				t.Errorf("a token was used twice, or requested for %q", audiences)
			}
		})
	}
}

// docs/development.md has the flags of the dev subcommand.
func TestDocsDevFlags(t *testing.T) {
	var help strings.Builder
	err := run(t.Context(), []string{"dev", "-h"}, env(nil), &help, io.Discard)
	page, flags := readDoc(t, "docs/development.md"), regexp.MustCompile(`(?m)^  -(\S+)`).FindAllStringSubmatch(help.String(), -1)
	if n := strings.Count(page, "\n| `--"); len(flags) < 3 || len(flags) != n {
		t.Fatalf("dev -h lists %d flags, %v; docs/development.md has %d", len(flags), err, n)
	}
	for _, m := range flags {
		if !strings.Contains(page, "\n| `--"+m[1]+"` |") {
			t.Errorf("docs/development.md does not have --%s", m[1])
		}
	}
}
