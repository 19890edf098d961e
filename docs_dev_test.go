//go:build dev

package main

import (
	"context"
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
	"syscall"
	"testing"

	"sigs.k8s.io/yaml"
)

// documentedWorkflow is one that docs/github-actions.md shows.
type documentedWorkflow struct {
	Permissions map[string]string
	Jobs        map[string]struct {
		Needs       string
		Permissions map[string]string
		Steps       []struct {
			Uses, Shell, Run string
			Env, With        map[string]string
		}
	}
}

// documentedWorkflows returns the workflow with the action and the one without. The job
// that builds can get no token, and the job that can does nothing else.
func documentedWorkflows(t *testing.T) (workflows []documentedWorkflow) {
	t.Helper()
	for _, block := range docBlocks(readDoc(t, "docs/github-actions.md")) {
		if !strings.Contains(block.text, "\njobs:") {
			continue
		}
		var workflow documentedWorkflow
		err := yaml.Unmarshal([]byte(block.text), &workflow)
		build, job := workflow.Jobs["image"], workflow.Jobs["rollout"]
		if err != nil || workflow.Permissions != nil || job.Needs != "image" || !maps.Equal(job.Permissions, map[string]string{"id-token": "write"}) ||
			!maps.Equal(build.Permissions, map[string]string{"contents": "read", "packages": "write"}) || len(job.Steps) != 1 {
			t.Fatalf("expected id-token: write in the job rollout only, and one step there, %v: %+v", err, workflow)
		}
		workflows = append(workflows, workflow)
	}
	if len(workflows) != 2 {
		t.Fatalf("the page has %d workflows, expected 2", len(workflows))
	}
	return workflows
}

// documentedStep is the step without the action.
func documentedStep(t *testing.T) (script string, env map[string]string) {
	step := documentedWorkflows(t)[1].Jobs["rollout"].Steps[0]
	if step.Shell != "bash" || strings.Contains(step.Run, "${{") {
		t.Fatalf("expected a step in bash without expressions: %+v", step)
	}
	return step.Run, step.Env
}

// fakeGitHub is the URL at which a job gets tokens, and a proxy in front of web.
type fakeGitHub struct {
	*httptest.Server
	sync.Mutex
	audiences []string // that tokens were requested for
	minted    []string
	requests  []string // path and query of those that reached the proxy
	tokens    []string // with them
	failures  []int    // statuses with which the proxy answers next; 0 passes a request on
	forged    string   // the body of these answers
	before    func()   // is called before an answer
}

func newFakeGitHub(t *testing.T, w *testWeb, failures []int, forged string) *fakeGitHub {
	f, mux := &fakeGitHub{failures: slices.Clone(failures), forged: forged, before: func() {}}, http.NewServeMux()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: strings.TrimPrefix(w.url, "http://")})
	mux.HandleFunc("GET /token", func(rw http.ResponseWriter, r *http.Request) {
		f.Lock()
		defer f.Unlock()
		audience := r.URL.Query().Get("audience")
		f.audiences = append(f.audiences, audience)
		if r.Header.Get("Authorization") != "Bearer "+requestToken || r.URL.Query().Get("api-version") != "2.0" {
			t.Errorf("a token is requested with %s and %q", r.URL, r.Header)
		}
		token := w.issuer.with(map[string]any{"aud": audience, "jti": fmt.Sprint(len(f.audiences))})
		f.minted = append(f.minted, token)
		fmt.Fprintf(rw, `{"count":%d,"value":%q}`, len(token), token)
	})
	mux.HandleFunc("/", func(rw http.ResponseWriter, r *http.Request) {
		f.Lock()
		defer f.Unlock()
		f.requests, f.tokens = append(f.requests, r.RequestURI), append(f.tokens, r.Header.Get("Authorization"))
		f.before()
		failure := append(f.failures, 0)[0]
		f.failures = f.failures[min(1, len(f.failures)):]
		if failure == 0 {
			proxy.ServeHTTP(rw, r)
			return
		}
		rw.WriteHeader(failure)
		io.WriteString(rw, f.forged)
	})
	f.Server = httptest.NewServer(mux)
	return f
}

// requestToken is what a runner gives to a job to get OIDC tokens with.
const requestToken = "request-token-of-the-job"

// runStep runs a step as a runner does. The step finds a sleep that returns at once,
// and the tools. Of these, curl and jq say when they run: processes holds their
// arguments, and their environments but for the runner's own variable. When ctx is
// done, the step is canceled.
func runStep(t *testing.T, ctx context.Context, script string, vars map[string]string, tools ...string) (output string, code int, processes string) {
	const wrapper = "#!/bin/sh\n(unset ACTIONS_ID_TOKEN_REQUEST_TOKEN; printf '%%s\\n' \"$@\"; export -p) >>$0.ran\necho ran %s >&2\nexec %s \"$@\"\n"
	dir := t.TempDir()
	files := map[string]string{"step": "PATH=" + dir + "\n" + script, "sleep": "#!/bin/sh\necho slept\n", "body": `{"image":"ghcr.io/acme/api:dev"}`}
	for _, name := range tools {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if files[name] = "#!/bin/sh\nexec " + path + ` "$@"` + "\n"; name == "curl" || name == "jq" {
			files[name] = fmt.Sprintf(wrapper, name, path)
		}
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax#jobsjob_idstepsshell
	cmd := exec.CommandContext(ctx, "bash", "--noprofile", "--norc", "-eo", "pipefail", "step")
	cmd.Dir, cmd.Cancel = dir, func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	for name, value := range vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	output, code = runCommand(t, cmd, dir)
	ran, _ := filepath.Glob(filepath.Join(dir, "*.ran"))
	for _, name := range ran {
		processes += readDoc(t, name)
	}
	return output, code, processes
}

// workflowCommandRE finds what a runner takes for a command: :: at the beginning of
// a line, and ##[ anywhere.
// https://github.com/actions/runner/blob/main/src/Runner.Common/ActionCommand.cs
var workflowCommandRE = regexp.MustCompile(`(?m)^\s*::.+?::.*|##\[.*`)

// checkStep fails if a token is seen by other processes, or is used or printed
// before it is masked, or if there are other commands than masks, the annotations,
// and one error that comes last.
func checkStep(t *testing.T, output, processes string, minted []string, failed bool, annotations ...string) {
	t.Helper()
	if strings.Contains(processes, requestToken) || strings.Contains(processes, "eyJ") || len(minted) > 0 && !strings.Contains(processes, "/event\n") {
		t.Errorf("a token is in the arguments or the environment of a process:\n%s", processes)
	}
	length := len(output)
	for _, token := range minted {
		length -= len(token)
		if _, after, _ := strings.Cut(output, "\n::add-mask::"+token+"\n"); !strings.HasPrefix(after, "ran curl\n") || strings.Count(output, token) != 1 {
			t.Errorf("a token is used or printed before it is masked:\n%s", output)
		}
	}
	commands := slices.DeleteFunc(workflowCommandRE.FindAllString(strings.ReplaceAll(output, "\r", "\n"), -1), func(command string) bool {
		return slices.Contains(minted, strings.TrimPrefix(command, "::add-mask::"))
	})
	if failed {
		annotations = append(annotations, "::error::")
	}
	if slices.EqualFunc(commands, annotations, strings.HasPrefix) && (!failed || strings.HasSuffix(output, commands[len(commands)-1]+"\n")) {
		commands = nil
	}
	if len(commands) > 0 || strings.ContainsAny(output, "\r\x00\x1b%") || length > 20_000 {
		t.Errorf("an answer brought the commands %q, or characters that the step removes, or %d bytes: %.9999q", commands, length, output)
	}
}

func TestDocumentedWorkflow(t *testing.T) {
	needTools(t, "bash", "curl", "jq")
	step, stepEnv := documentedStep(t)
	web := newTestWeb(t, "")
	page := readDoc(t, "docs/github-actions.md")
	lowerCase := regexp.MustCompile(`(?m)^BODY=\$\(.*$`).FindString(page)
	tags := regexp.MustCompile(`(?m)^BODY: '(.*tags.*)'$`).FindStringSubmatch(page)
	requestIDRE := regexp.MustCompile(`"requestId":"[A-Z0-9]{26}"`)
	hostile := "{\"error\":\"\\u000a::error::forged\"}\n::set-output name=a::b\r::error::forged\r\n ##[error]forged #\n#[add-path]/tmp %0A::error::forged%0D" +
		" \x1b[31m \xff \x00 ::stop-commands::x"
	type vars = map[string]string
	for _, tt := range []struct {
		name             string
		vars             vars // GITHUB stands for the fake's URL; "-" removes one
		failures         []int
		forged           string // the body of a failure
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
		{name: "no connection", vars: vars{"ROLLOUT_URL": "http://127.0.0.1:1"}, sleeps: 11,
			output: "status 000|::error::not accepted after 12 attempts", noID: true},
		{name: "no token", vars: vars{"ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:1/?a=b"}, sleeps: 11,
			output: "curl: (7)|::error::not accepted after 12 attempts", noID: true},
		{name: "another image", vars: vars{"BODY": `{"image":"docker.io/evil/api:dev"}`}, attempts: 1,
			output: "::error::refused with status 403|docker.io/evil/api:dev"},
		{name: "no tag", vars: vars{"BODY": `{"image":"ghcr.io/acme/api"}`}, attempts: 1, output: "::error::refused with status 400|tag"},
		{name: "too large", vars: vars{"BODY": strings.Repeat("a", 17<<10)}, attempts: 1, output: "::error::refused with status 413"},
		{name: "a body like a file of curl", vars: vars{"BODY": "@body"}, attempts: 1, output: "::error::refused with status 400"},
		{name: "another audience", vars: vars{"AUDIENCE": "https://other.example.com/?a=1&b=2"}, attempts: 1, output: "::error::refused with status 401"},
		{name: "another path", vars: vars{"ROLLOUT_URL": "GITHUB/deep"}, attempts: 1, output: "::error::refused with status 404", noID: true},
		{name: "a forged 202", failures: []int{202}, forged: hostile, attempts: 1, output: "accepted: ", success: true, noID: true},
		{name: "a forged 403", failures: []int{403}, forged: hostile, attempts: 1, output: "::error::refused with status 403", noID: true},
		{name: "a forged 418", failures: []int{418}, forged: hostile, attempts: 1, output: "::error::refused with status 418", noID: true},
		{name: "a forged 503", failures: []int{503}, forged: hostile, attempts: 2, sleeps: 1, output: "status 503|accepted: ", success: true},
		{name: "a page of a proxy", failures: []int{502}, forged: strings.Repeat("<p>\n", 20_000), attempts: 2, sleeps: 1, output: "status 502 <p> <p>|accepted: ",
			success: true},
		{name: "no permission", vars: vars{"ACTIONS_ID_TOKEN_REQUEST_URL": "-"}, output: "id-token: write", noID: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			github := newFakeGitHub(t, web, tt.failures, tt.forged)
			env, script := maps.Clone(stepEnv), step
			maps.Copy(env, vars{"ACTIONS_ID_TOKEN_REQUEST_URL": "GITHUB/token?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": requestToken,
				"AUDIENCE": testAudience, "ROLLOUT_URL": "GITHUB"})
			maps.Copy(env, tt.vars)
			maps.DeleteFunc(env, func(_, value string) bool { return value == "-" })
			for name, value := range env {
				env[name] = strings.Replace(value, "GITHUB", github.URL, 1)
			}
			if env["GITHUB_REPOSITORY"] != "" {
				script = lowerCase + "\n" + script
			}
			out, code, processes := runStep(t, t.Context(), script, env, "curl", "jq")
			github.Close()
			if (code == 0) != tt.success || len(github.tokens) != tt.attempts || strings.Count(out, "slept\n") != tt.sleeps {
				t.Errorf("exit %d after %d attempts:\n%s", code, len(github.tokens), out)
			}
			for part := range strings.SplitSeq(tt.output, "|") {
				if !strings.Contains(out, part) {
					t.Errorf("the output has no %q:\n%s", part, out)
				}
			}
			checkStep(t, out, processes, github.minted, strings.Contains(tt.output, "::error::"))
			if requestIDRE.MatchString(out) == tt.noID {
				t.Errorf("the output has no request id, or one that is not web's:\n%s", out)
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
