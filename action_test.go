//go:build dev

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"kuberollouttrigger/internal/fake"
)

// action is action/action.yml.
type action struct {
	Inputs  map[string]struct{ Default string }
	Outputs map[string]struct{ Value string }
	Runs    struct {
		Steps []struct {
			ID, Shell, Run string
			Env            map[string]string
		}
	}
}

func readAction(t *testing.T) (a action) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(readDoc(t, "action/action.yml")), &a); err != nil || len(a.Runs.Steps) != 1 || a.Runs.Steps[0].Shell != "bash" {
		t.Fatalf("expected one step in bash, %v: %+v", err, a)
	}
	return a
}

var inputRE = regexp.MustCompile(`\$\{\{ inputs\.([a-z-]+) }}`)

// environment evaluates the expressions of the step, as a runner does.
func (a action) environment(with map[string]string) map[string]string {
	vars := map[string]string{}
	for name, value := range a.Runs.Steps[0].Env {
		vars[name] = inputRE.ReplaceAllStringFunc(value, func(expression string) string {
			input := inputRE.FindStringSubmatch(expression)[1]
			if given, ok := with[input]; ok {
				return given
			}
			return a.Inputs[input].Default
		})
	}
	return vars
}

// Every input reaches the script, no expression is part of a command, and the page
// has the inputs with their defaults, and the outputs.
func TestActionInterface(t *testing.T) {
	a, page, script := readAction(t), readDoc(t, "docs/github-actions.md"), readDoc(t, "action/rollout.sh")
	step, used := a.Runs.Steps[0], map[string]bool{}
	for name, value := range step.Env {
		if m := inputRE.FindStringSubmatch(value); m == nil || m[0] != value || !regexp.MustCompile(`(?m)^# `+name+` `).MatchString(script) {
			t.Errorf("%s is %q; expected an input, in a variable that the script describes", name, value)
		} else {
			used[m[1]] = true
		}
	}
	for name, input := range a.Inputs {
		if def := strings.TrimSuffix("`"+input.Default+"`", "``"); !used[name] || !strings.Contains(page, "\n| `"+name+"` | "+def) {
			t.Errorf("the input %s is not used, or not on the page with its default %q", name, input.Default)
		}
	}
	for name, output := range a.Outputs {
		if output.Value != "${{ steps."+step.ID+".outputs."+name+" }}" || !strings.Contains(page, "\n| `"+name+"` |") {
			t.Errorf("the output %s is %s, or not on the page", name, output.Value)
		}
	}
	for name := range documentedWorkflows(t)[0].Jobs["rollout"].Steps[0].With {
		if _, ok := a.Inputs[name]; !ok {
			t.Errorf("the page gives the action the input %s", name)
		}
	}
	if rows := strings.Count(page, "\n| `"); strings.Contains(step.Run, "${{") || len(used) != len(a.Inputs) || rows != len(a.Inputs)+len(a.Outputs) {
		t.Errorf("an expression in %q, or %d inputs in the environment and %d rows on the page", step.Run, len(used), rows)
	}
}

// testRollouts is a web and a worker, with a Deployment for each image.
type testRollouts struct {
	*testWeb
	kube *fake.KubernetesAPI
}

func newTestRollouts(t *testing.T) *testRollouts {
	w, kube := newTestWeb(t, ""), newKubernetes(t)
	worker := startWorkerOn(t, kube, w.valkey)
	eventually(t, "the worker is ready", func() bool { return worker.ready() == nil })
	w.valkey.ZAdd(clustersKey("krt"), float64(time.Now().Add(-time.Hour).UnixMicro()), "old`|\n::error::x")
	return &testRollouts{w, kube}
}

// step does what the Deployment controller does before a job asks for the nth time:
// nothing is available, and then all, or never.
func (r *testRollouts) step(name string, n int, reason string) {
	switch key := "a/" + name; n {
	case 1:
		eventually(r.t, name+" is restarted", func() bool {
			return strings.Contains(r.valkey.HGet(reportKey("krt", "ghcr.io/acme/"+name+":dev"), "test"), `"restarted":1`)
		})
	case 2:
		r.kube.ChangeStatus(key, status(2, map[bool]int{true: 2}[reason == "NewReplicaSetAvailable"], 2, reason))
	}
}

// forgedRollout is an answer that tries to bring commands and outputs in every member.
const forgedRollout = `{"state":"%s","version":"1&x=\n::error::forged","images":[{"image":"a|b<i>\n::error::forged","state":"complete","clusters":` +
	`{"c\n::error::forged ##[error]forged\r::error::x":{"state":"pending","matched":1,"deferred":{"\n::error::forged%%0A::error::x":2},"warnings":` +
	`{"Never\n::stop-commands::forged\n##[error]x":1}}}}],"away":["\r\n::set-output name=a::b"],"requestId":"\n::error::forged\u2028"}`

func TestAction(t *testing.T) {
	needTools(t, "bash", "curl", "jq")
	a, rollouts := readAction(t), newTestRollouts(t)
	type m = map[string]string
	const hostile = "{\"error\":\"\\n::error::forged\",\"requestId\":\"\\n::error::x ##[error]forged %0A\"}"
	const accepted, ended, failure = "accepted: ", "::error::the rollout of ", "::error::"
	requestIDRE := regexp.MustCompile(`\(requestId [A-Z0-9]{26}\)\n$`)
	for name, tt := range map[string]struct {
		with     m      // image is ghcr.io/acme/NAME:dev
		vars     m      // "-" removes one
		run      string // Deployment runs the image, and its rollout ends with this reason
		failures []int
		forged   string
		edit     string // OLD → NEW in the script
		posts    int
		gets     int    // at least
		sleeps   int    // or one more, if the machine is fast; -1: any
		output   string // parts in order, separated by |; the last but none is the error
		state    string // and other outputs
		noID     bool
		minted   int // tokens, at least; 0: one for each POST
		cancel   bool
	}{
		"canceled": {run: "ReplicaSetUpdated", failures: []int{0, 0, 503}, cancel: true, posts: 1, gets: 2, state: "accepted", output: "progressing: "},
		"complete": {with: m{"image": "ghcr.io/Acme/Complete", "tags": "dev"}, run: "NewReplicaSetAvailable", posts: 1, gets: 2, state: "complete",
			output: accepted + "ghcr.io/acme/complete:dev at |s progressing: 1 matched, 1 restarted, 0 complete, 0 failed, away: old|" +
				"s complete: 1 matched, 1 restarted, 1 complete, 0 failed|::warning::nodes may keep|1 IfNotPresent"},
		"failed": {run: "ProgressDeadlineExceeded", posts: 1, gets: 2, state: "failed",
			output: "progressing: |s failed: |" + ended + "ghcr.io/acme/failed:dev failed: 1 matched, 1 restarted, 0 complete, 1 failed"},
		"unmatched": {posts: 1, gets: 1, state: "unmatched", output: "s unmatched: 0 matched|::error::nothing that runs ghcr.io/acme/unmatched:dev is restarted"},
		"ignored": {with: m{"image": "ghcr.io/acme/ignored", "tags": "one,two", "fail-on-unmatched": "false"}, posts: 1, gets: 1,
			state: "unmatched", output: "s unmatched: 0 matched"},
		"time-out": {with: m{"wait": "2s"}, run: "ReplicaSetUpdated", posts: 1, gets: 1, state: "progressing",
			output: "progressing: |" + ended + "ghcr.io/acme/time-out:dev did not end within 2s, its state is progressing: 1 matched, 1 restarted"},
		"no wait": {with: m{"image": "ghcr.io/acme/a", "tags": " ghcr.io/Acme/a:v2,\r\n\n docker.io/acme/a:v3\nv1 ,v1,\n", "wait": "0"}, posts: 1, state: "accepted",
			output: "left out|docker.io/acme/a:v3|" + accepted + "ghcr.io/acme/a:v1 ghcr.io/acme/a:v2 at "},
		"a port": {with: m{"image": "localhost:5000/a", "tags": "localhost:5000/a:v1"}, posts: 1,
			output: failure + "the request for localhost:5000/a:v1 was refused: status 403"},
		"refused": {with: m{"image": "docker.io/evil/api:dev"}, posts: 1,
			output: failure + "the request for docker.io/evil/api:dev was refused: status 403, image docker.io/evil/api:dev"},
		"audience": {with: m{"audience": "https://other.example.com/?a=1&b=2"}, posts: 1,
			output: failure + "the token was refused|https://other.example.com/?a=1&b=2|" +
				"status 401"},
		"slash":   {with: m{"url": "GITHUB/"}, posts: 1, gets: 1, state: "unmatched", output: failure + "nothing that runs"},
		"default": {with: m{"url": "GITHUB/", "audience": ""}, posts: 1, output: failure + "the token was refused; does the audience URL equal"},
		"path": {with: m{"url": "GITHUB/deep"}, posts: 1,
			output: failure + "the request for ghcr.io/acme/path:dev was refused: status 404, without requestId", noID: true},
		"retries": {failures: []int{503, 502, 429, 0, 0, 503}, run: "NewReplicaSetAvailable", posts: 4, gets: 3, sleeps: 4, state: "complete",
			output: "attempt 1 of 12: status 503|status 502|attempt 3 of 12: status 429|" + accepted + "|progressing|status 503|complete: "},
		"no web": {with: m{"url": "http://127.0.0.1:1"}, edit: "attempts=12 → attempts=2", minted: 2, sleeps: 1,
			output: "attempt 2 of 2: |" + failure + "|not accepted after 2 attempts: status 000, without requestId: curl: (7)", noID: true},
		"no token": {vars: m{"ACTIONS_ID_TOKEN_REQUEST_URL": "GITHUB/none"}, edit: "attempts=12 → attempts=2", failures: []int{403, 403},
			forged: `{"value":"secret"}`, sleeps: 1, output: failure + "|GitHub answers 403 and gives no token", noID: true},
		"expired": {failures: []int{0, 0, 401}, minted: 2, run: "NewReplicaSetAvailable", posts: 1, gets: 3, state: "complete", output: "progressing|complete"},
		"revoked": {failures: []int{0, 401}, forged: `{"error":"access denied","requestId":"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}`, posts: 1, gets: 1, state: "accepted",
			output: ended + "ghcr.io/acme/revoked:dev cannot be followed: status 401, access denied"},
		"unknown": {failures: []int{0, 404}, forged: `{"error":"no request","requestId":"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}`, posts: 1, gets: 1, state: "accepted",
			output: ended + "ghcr.io/acme/unknown:dev cannot be followed: status 404, no request"},
		"old-tokens": {minted: 3, run: "NewReplicaSetAvailable", edit: "token_age=240 → token_age=0", posts: 1, gets: 2, state: "complete", output: "complete"},
		"busy web": {failures: []int{0, 200, 200, 200}, forged: fmt.Sprintf(forgedRollout, "pending"), posts: 1, gets: 4, sleeps: 1, state: "unmatched",
			output: "pending: 1 matched|" + failure},
		"a page": {failures: []int{502, 0, 502}, forged: strings.Repeat("<p>\n", 20_000), posts: 2, gets: 2, sleeps: 2, state: "unmatched",
			output: "status 502, without requestId: <p> <p>|" + failure},
		"forged 202": {failures: []int{202}, forged: hostile, posts: 1, output: failure + "the request for |status 202", noID: true},
		"forged time": {failures: []int{202}, forged: `{"requestedAt":"2026-11-21T02:00:00Z\nstate=complete","requestId":"x"}`, posts: 1,
			output: failure, noID: true},
		"forged 403": {failures: []int{403}, forged: hostile, posts: 1, output: failure + "the request for |status 403", noID: true},
		"forged 503": {failures: []int{503, 0, 503}, forged: "\n::error::forged\r##[error]\x00\x1b[31m%0A", posts: 2, gets: 2, sleeps: 2, state: "unmatched",
			output: "status 503|" + failure},
		"forged 200": {failures: []int{0, 200}, forged: fmt.Sprintf(forgedRollout, "complete"), posts: 1, gets: 1, state: "complete",
			output: "complete: 1 matched|::warning::"},
		"no state": {failures: []int{0, 200}, forged: fmt.Sprintf(forgedRollout, `\n::error::forged`), posts: 1, gets: 1, state: "accepted",
			output: failure + "|cannot be followed", noID: true},
		"two answers": {failures: []int{0, 200}, forged: fmt.Sprintf(forgedRollout, "complete") + "\n\"x=y\"\n", posts: 1, gets: 1, state: "accepted",
			output: failure + "|cannot be followed", noID: true},
		"no version": {failures: []int{0, 200}, forged: `{"state":"complete","version":"","images":[{"clusters":{}}]}`, posts: 1, gets: 1, state: "accepted",
			output: failure + "|cannot be followed", noID: true},
		"no cluster": {failures: []int{0, 200}, forged: `{"state":"pending","version":"1","images":[{"clusters":{}}]}`, posts: 1, gets: 2, state: "unmatched",
			output: "pending: 0 matched, 0 restarted, 0 complete, 0 failed, no cluster is alive|" + failure},
		"lost web": {with: m{"wait": "1s"}, failures: append([]int{0}, slices.Repeat([]int{503}, 500)...), posts: 1, gets: 1, sleeps: -1, state: "accepted",
			output: ended + "ghcr.io/acme/lost-web:dev did not end within 1s, its state is unknown, status 503"},
		"bad image":   {with: m{"image": "ghcr.io/acme/x:\n::error::forged %0A"}, posts: 1, output: failure + "|status 400"},
		"bad tags":    {with: m{"image": "ghcr.io/acme/x", "tags": "::error::forged,##[error]x"}, posts: 1, output: "left out|" + failure + "|status 400"},
		"bad wait":    {with: m{"wait": "1h"}, output: failure + `wait is "1h"; expected less than an hour`, noID: true},
		"long wait":   {with: m{"wait": "3600"}, output: failure + "wait is", noID: true},
		"bad url":     {with: m{"url": "-o/tmp/x\n::error::forged"}, output: failure + "url is |https://", noID: true},
		"no image":    {with: m{"image": ""}, output: failure + "no tag of the image", noID: true},
		"both tags":   {with: m{"tags": "dev"}, output: failure + "image has a tag, and tags are given as well", noID: true},
		"bad boolean": {with: m{"fail-on-unmatched": "no"}, output: failure + `fail-on-unmatched is "no"`, noID: true},
		"permission":  {vars: m{"ACTIONS_ID_TOKEN_REQUEST_URL": "-"}, output: failure + "|permissions: id-token: write", noID: true},
		"no jq":       {vars: m{"WITHOUT": "jq"}, output: failure + "curl and jq are required", noID: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			github, image := newFakeGitHub(t, rollouts.testWeb, tt.failures, tt.forged), "ghcr.io/acme/"+strings.ReplaceAll(name, " ", "-")+":dev"
			with := m{"url": "GITHUB", "audience": testAudience, "image": image, "wait": "9s"}
			maps.Copy(with, tt.with)
			vars := a.environment(with)
			out, summary, script := t.TempDir()+"/output", t.TempDir()+"/summary", t.TempDir()
			before, after, _ := strings.Cut(tt.edit, " → ")
			text := readDoc(t, "action/rollout.sh")
			if !strings.Contains(text, before) {
				t.Fatalf("the script has no %s", before)
			}
			os.WriteFile(script+"/rollout.sh", []byte(strings.Replace(text, before, after, 1)), 0o600)
			maps.Copy(vars, m{"ACTIONS_ID_TOKEN_REQUEST_URL": "GITHUB/token?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": requestToken,
				"GITHUB_ACTION_PATH": script, "GITHUB_OUTPUT": out, "GITHUB_STEP_SUMMARY": summary})
			maps.Copy(vars, tt.vars)
			maps.DeleteFunc(vars, func(_, value string) bool { return value == "-" })
			for name, value := range vars {
				vars[name] = strings.Replace(value, "GITHUB", github.URL, 1)
			}
			if tt.run != "" {
				rollouts.kube.Create("a/"+name, fake.Spec{Image: image, Policy: "IfNotPresent"})
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			posts, gets := 0, 0
			github.before = func() {
				switch request := github.requests[len(github.requests)-1]; {
				case strings.HasSuffix(request, "/event"):
					posts++
				case strings.HasPrefix(request, "/rollout?"):
					gets++
					if tt.run != "" {
						rollouts.step(name, gets, tt.run)
					}
					if tt.cancel && gets == 2 {
						cancel()
						time.Sleep(200 * time.Millisecond)
					}
				}
			}
			tools := slices.DeleteFunc([]string{"bash", "head", "tr", "curl", "jq"}, func(tool string) bool { return tool == vars["WITHOUT"] })
			begun := time.Now()
			output, code, processes := runStep(t, ctx, a.Runs.Steps[0].Run, vars, tools...)
			github.Close()

			failed, sleeps := strings.Contains(tt.output, failure), strings.Count(output, "slept\n")
			if (code == 0) == (failed || tt.cancel) || posts != tt.posts || gets < tt.gets || tt.gets == 0 && gets > 0 ||
				tt.sleeps >= 0 && (sleeps < tt.sleeps || sleeps > tt.sleeps+1) {
				t.Errorf("exit %d after %d times POST and %d times GET", code, posts, gets)
			}
			rest, found := output, true
			for part := range strings.SplitSeq(strings.ReplaceAll(tt.output, "URL", github.URL), "|") {
				if _, rest, found = strings.Cut(rest, part); !found {
					t.Errorf("the output has no %q, or not there", part)
				}
			}
			if failed && requestIDRE.MatchString(output) == tt.noID || strings.Contains(output, "secret") {
				t.Errorf("the error has no request id, or one that is not web's, or an answer of the token endpoint")
			}
			if tt.with["wait"] != "" && time.Since(begun) > 9*time.Second {
				t.Errorf("the step ends after %s", time.Since(begun))
			}
			for _, request := range github.requests {
				path, query, _ := strings.Cut(request, "?")
				asked, err := parseRolloutQuery(query)
				about := accepted + strings.Join(asked.images, " ") + " at " + asked.since + " ("
				if path == "/rollout" && (err != nil || !strings.Contains(output, about)) {
					t.Errorf("the query is %s, %v", query, err)
				}
			}
			var annotations []string
			if tt.run != "" && !tt.cancel || strings.Contains(tt.output, "::warning::") {
				annotations = []string{"::warning::nodes may keep an old image"}
			}
			checkStep(t, output, processes, github.minted, failed, annotations...)
			if n := len(github.minted); tt.minted == 0 && n != tt.posts || n < tt.minted || len(slices.Compact(slices.Sorted(slices.Values(github.audiences)))) > 1 {
				t.Errorf("%d tokens were minted, for %q", n, github.audiences)
			}
			a.checkOutputs(t, out, summary, tt.state, gets)
			t.Logf("the output:\n%s", output)
		})
	}
}

// checkOutputs checks the files that a runner reads.
func (a action) checkOutputs(t *testing.T, output, summary, state string, gets int) {
	t.Helper()
	got := map[string]string{}
	text, _ := os.ReadFile(output)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		if _, known := a.Outputs[name]; !known {
			t.Errorf("the output has %q", line)
		}
		got[name] = value
	}
	if got["state"] != state || (got["requested-at"] != "") != (state != "") {
		t.Errorf("the outputs are %q", got)
	}
	followed := gets > 0 && state != "accepted"
	var report struct{ State string }
	if err := json.Unmarshal([]byte(got["report"]), &report); followed && (err != nil || report.State != state || len(got) != len(a.Outputs)) {
		t.Errorf("the report is %q, %v", got["report"], err)
	}
	text, _ = os.ReadFile(summary)
	if followed != strings.HasPrefix(string(text), "### Rollout: "+state+"\n") || strings.ContainsAny(string(text), "`<>\r") {
		t.Errorf("the summary is %q", text)
	}
	for i, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		if i > 3 && strings.Count(line, "|") != 10 {
			t.Errorf("the summary has the line %q", line)
		}
	}
}
