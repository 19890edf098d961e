package e2e

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// These tests execute docs/pipelines.md: the real web decides by its rules, and its jobs
// run the action's script against a real worker. The test plays GitHub, which runs the
// jobs, and the Deployment controller, which writes the status.

// recipe is a section of docs/pipelines.md.
type recipe struct {
	text      string
	rules     []string            // each a TRUST_POLICY
	workflows map[string]workflow // by name
	snippets  []string            // other YAML
	shell     []string
}

// workflow is what the tests read of one. A YAML parser takes the key on for true.
type workflow struct {
	Name string
	On   any `json:"true"`
	Jobs map[string]pipelineJob
}

type pipelineJob struct {
	Needs                 any
	If, Environment, Uses string
	Permissions, Outputs  map[string]string
	Strategy              struct{ Matrix map[string][]string }
	Steps                 []struct {
		ID, Uses, Run string
		With          map[string]string
	}
}

// documentedAction stands for the action.
const documentedAction = "OWNER/kuberollouttrigger/action@v1"

var blockRE = regexp.MustCompile("(?ms)^```([a-z]+)\n(.*?)^```$")

func pipelineSections(t testing.TB) map[string]string {
	t.Helper()
	page, err := os.ReadFile("../docs/pipelines.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, section := range strings.Split(string(page), "\n## ")[1:] {
		heading, text, _ := strings.Cut(section, "\n")
		sections[heading] = text
	}
	return sections
}

func readRecipe(t testing.TB, heading string) recipe {
	t.Helper()
	text, ok := pipelineSections(t)[heading]
	if !ok {
		t.Fatalf("docs/pipelines.md has no section %q", heading)
	}
	r := recipe{text: text, workflows: map[string]workflow{}}
	for _, block := range blockRE.FindAllStringSubmatch(text, -1) {
		switch language, content := block[1], block[2]; {
		case language == "sh":
			r.shell = append(r.shell, content)
		case strings.HasPrefix(content, "- claims:"):
			r.rules = append(r.rules, content)
		case strings.HasPrefix(content, "name:"):
			var w workflow
			fromYAML(t, content, &w)
			r.workflows[w.Name] = w
			w.check(t)
		default:
			r.snippets = append(r.snippets, content)
		}
	}
	return r
}

func fromYAML(t testing.TB, text string, v any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
}

// check fails unless the jobs that can get a token do nothing but restart, after the
// job that pushes.
func (w workflow) check(t testing.TB) {
	t.Helper()
	for name, job := range w.Jobs {
		restarts := job.Uses != "" || len(job.Steps) == 1 && job.Steps[0].Uses == documentedAction
		alone := w.On == "workflow_call" || strings.Contains(asJSON(w.On), `"workflow_call"`)
		if mayAsk := job.Permissions["id-token"] == "write"; mayAsk != restarts || mayAsk && len(job.Permissions) != 1 {
			t.Errorf("the job %s of %s has the permissions %v", name, w.Name, job.Permissions)
		}
		if restarts && !alone && len(job.needs()) == 0 {
			t.Errorf("the job %s of %s needs no job that pushes the image", name, w.Name)
		}
	}
}

// events are those that start the workflow.
func (w workflow) events() []string {
	switch on := w.On.(type) {
	case string:
		return []string{on}
	case map[string]any:
		return slices.Sorted(maps.Keys(on))
	}
	return nil
}

func (j pipelineJob) needs() (names []string) {
	switch needs := j.Needs.(type) {
	case string:
		names = append(names, needs)
	case []any:
		for _, name := range needs {
			names = append(names, fmt.Sprint(name))
		}
	}
	return names
}

// event is what GitHub knows when it starts a workflow.
type event struct {
	claims  map[string]any
	context map[string]string // values of expressions
	labels  []string          // of the pull request
}

// to returns the event with some claims changed.
func (e event) to(changes map[string]any) event {
	e.claims = maps.Clone(e.claims)
	maps.Copy(e.claims, changes)
	return e
}

func pushTo(branch string) event {
	return event{
		claims:  map[string]any{"event_name": "push", "ref": "refs/heads/" + branch},
		context: map[string]string{"github.repository": "acme/api", "github.ref_name": branch},
	}
}

// pullRequest is one to main from a branch of the same repository.
func pullRequest(number string, labels ...string) event {
	workflow := "acme/api/.github/workflows/pr.yml@refs/pull/" + number + "/merge"
	return event{
		claims: map[string]any{"event_name": "pull_request", "ref": "refs/pull/" + number + "/merge", "base_ref": "main", "ref_protected": "false",
			"sub": "repo:acme/api:pull_request", "workflow_ref": workflow, "job_workflow_ref": workflow},
		context: map[string]string{"github.repository": "acme/api", "github.event.pull_request.number": number},
		labels:  labels,
	}
}

var expressionRE = regexp.MustCompile(`\$\{\{ (.+?) }}`)

func (e event) evaluate(t testing.TB, text string) string {
	return expressionRE.ReplaceAllStringFunc(text, func(expression string) string {
		name := expressionRE.FindStringSubmatch(expression)[1]
		value, ok := e.context[name]
		if !ok {
			t.Errorf("the workflow uses %s, which is not known here", expression)
		}
		return value
	})
}

var labelRE = regexp.MustCompile(`^contains\(github\.event\.pull_request\.labels\.\*\.name, '([^']+)'\)$`)

// starts evaluates the job's if.
func (e event) starts(t testing.TB, job pipelineJob) bool {
	t.Helper()
	if job.If == "" {
		return true
	}
	label := labelRE.FindStringSubmatch(job.If)
	if label == nil {
		t.Fatalf("the job has the condition %s", job.If)
	}
	return slices.Contains(e.labels, label[1])
}

// pipeline is an installation with a namespace of its own.
type pipeline struct {
	namespace string
	recorder  *recorder
	web       *program
	job       *client
	failing   atomic.Bool // rollouts exceed their deadline
}

// startPipeline installs web with the rules. audience is the documented URL of web.
func startPipeline(t testing.TB, audience, rules string, apps []deployment, settings ...string) *pipeline {
	t.Helper()
	p := &pipeline{namespace: newNamespace(t)}
	v := startValkey(t)
	for i := range apps {
		apps[i].namespace = p.namespace
	}
	createAll(t, apps)
	p.recorder = record(t, p.namespace)
	p.start(t, v, audience, rules, settings...)
	return p
}

func (p *pipeline) start(t testing.TB, v *valkeyServer, audience, rules string, settings ...string) {
	t.Helper()
	kubeconfig := newWorkerUser(t, p.namespace).kubeconfig(t, sharedAPI.url)
	p.web = launchWeb(t, programPath, v.addr, append([]string{"GITHUB_OIDC_AUDIENCE=" + audience, "TRUST_POLICY=" + rules}, settings...)...)
	startWorker(t, v.addr, kubeconfig, append([]string{"WORKER_NAMESPACES=" + p.namespace}, settings...)...)
	p.web.waitReady(t, 30*time.Second)
	p.job = newClient(p.web.url)
	p.playController(t)
}

// playController writes the status of all Deployments as their controller would.
func (p *pipeline) playController(t testing.TB) {
	ctx, cancel := context.WithCancel(context.Background())
	var playing sync.WaitGroup
	t.Cleanup(func() { cancel(); playing.Wait() })
	apps := sharedAPI.admin.Resource(deploymentsResource).Namespace(p.namespace)
	playing.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			list, err := apps.List(ctx, metav1.ListOptions{})
			if err != nil {
				continue
			}
			for i := range list.Items {
				d := &list.Items[i]
				observed, _, _ := unstructured.NestedInt64(d.Object, "status", "observedGeneration")
				if observed == d.GetGeneration() {
					continue
				}
				replicas, _, _ := unstructured.NestedInt64(d.Object, "spec", "replicas")
				reason := "NewReplicaSetAvailable"
				if p.failing.Load() {
					reason = "ProgressDeadlineExceeded"
				}
				status := fmt.Sprintf(`{"status":{"observedGeneration":%d,"replicas":%d,"updatedReplicas":%[2]d,"readyReplicas":%[2]d,"availableReplicas":%[2]d,
					"conditions":[{"type":"Progressing","status":"%t","reason":%q}]}}`, d.GetGeneration(), replicas, !p.failing.Load(), reason)
				_, _ = apps.Patch(ctx, d.GetName(), types.MergePatchType, []byte(status), metav1.PatchOptions{}, "status")
			}
		}
	})
}

// tagged is a Deployment that runs a tag of ghcr.io/acme/api.
func tagged(tag string) deployment {
	return deployment{name: strings.ReplaceAll(tag, ".", "-"), images: []string{"ghcr.io/acme/api:" + tag}}
}

// wantRestarts compares how often the Deployments were restarted. Those that are not
// named were not.
func (p *pipeline) wantRestarts(t testing.TB, apps []deployment, want map[string]int) {
	t.Helper()
	for _, d := range apps {
		d.namespace = p.namespace
		eventually(t, 20*time.Second, fmt.Sprintf("%s is restarted %d times", d.name, want[d.name]), func() error {
			if got := p.recorder.restarts(d); got < want[d.name] {
				return fmt.Errorf("restarted %d times: %s", got, describe(p.recorder.of(d)))
			}
			return p.recorder.err()
		})
	}
	for _, d := range apps {
		d.namespace = p.namespace
		if got := p.recorder.restarts(d); got != want[d.name] {
			t.Errorf("%s was restarted %d times, want %d", d.name, got, want[d.name])
		}
	}
}

// stepResult is how a step ended.
type stepResult struct {
	failed  bool
	log     string
	outputs map[string]string
}

// mustEnd fails unless the step has this state, and fails with an error if it should.
func (s stepResult) mustEnd(t testing.TB, state string, failed bool) {
	t.Helper()
	if s.outputs["state"] != state || s.failed != failed || failed != strings.Contains(s.log, "\n::error::") {
		t.Errorf("the step ended with the state %q, failed %t, want %q, %t:\n%s", s.outputs["state"], s.failed, state, failed, s.log)
	}
}

// mustBeRefused fails unless web refused the request with a status.
func (s stepResult) mustBeRefused(t testing.TB, status int) {
	t.Helper()
	if !s.failed || !strings.Contains(s.log, fmt.Sprintf("status %d, ", status)) {
		t.Errorf("the step was not refused with %d:\n%s", status, s.log)
	}
}

// run runs the job as GitHub does. Its step is the documented action.
func (p *pipeline) run(t testing.TB, job pipelineJob, e event) stepResult {
	t.Helper()
	if len(job.Steps) != 1 || job.Steps[0].Uses != documentedAction {
		t.Fatalf("the job's steps are %+v", job.Steps)
	}
	if job.Environment != "" {
		e = e.to(map[string]any{"environment": job.Environment})
	}
	with := map[string]string{}
	for name, value := range job.Steps[0].With {
		with[name] = e.evaluate(t, value)
	}
	return p.act(t, with, e.claims, job.Permissions["id-token"] == "write")
}

// act runs the action with inputs and a token with claims. Its url stands for this web.
func (p *pipeline) act(t testing.TB, with map[string]string, claims map[string]any, mayAsk bool) (result stepResult) {
	t.Helper()
	var action struct {
		Inputs map[string]struct{ Default string }
		Runs   struct {
			Steps []struct {
				Run string
				Env map[string]string
			}
		}
	}
	text, err := os.ReadFile("../action/action.yml")
	if err != nil {
		t.Fatal(err)
	}
	fromYAML(t, string(text), &action)
	given := event{context: map[string]string{}}
	for name, input := range action.Inputs {
		given.context["inputs."+name] = input.Default
	}
	for name, value := range with {
		if _, ok := action.Inputs[name]; !ok {
			t.Errorf("the action has no input %s", name)
		}
		given.context["inputs."+name] = value
	}
	path, err := filepath.Abs("../action")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	env := map[string]string{"PATH": os.Getenv("PATH"), "HOME": dir, "GITHUB_ACTION_PATH": path,
		"GITHUB_OUTPUT": filepath.Join(dir, "output"), "GITHUB_STEP_SUMMARY": filepath.Join(dir, "summary")}
	if mayAsk {
		env["ACTIONS_ID_TOKEN_REQUEST_URL"], env["ACTIONS_ID_TOKEN_REQUEST_TOKEN"] = serveTokens(t, claims), "request-token"
	}
	for name, value := range action.Runs.Steps[0].Env {
		env[name] = given.evaluate(t, value)
	}
	// The audience is what the documented URL makes it.
	if env["AUDIENCE"] == "" {
		env["AUDIENCE"] = strings.TrimSuffix(env["ROLLOUT_URL"], "/")
	}
	env["ROLLOUT_URL"] = p.web.url
	if with["wait"] == "" {
		env["WAIT"] = "60s" // a failing test need not take the five minutes
	}
	cmd := exec.CommandContext(t.Context(), "bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", action.Runs.Steps[0].Run)
	cmd.Dir = dir
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	log, err := cmd.CombinedOutput()
	result = stepResult{failed: err != nil, log: "\n" + string(log), outputs: map[string]string{}}
	output, _ := os.ReadFile(env["GITHUB_OUTPUT"])
	for line := range strings.Lines(string(output)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		result.outputs[name] = value
	}
	return result
}

// serveTokens is the URL at which a job gets tokens.
func serveTokens(t testing.TB, claims map[string]any) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer request-token" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		claims := maps.Clone(claims)
		claims["aud"] = r.URL.Query().Get("audience")
		fmt.Fprintf(w, `{"count":1,"value":%q}`, github.mint(time.Now(), claims))
	}))
	t.Cleanup(server.Close)
	return server.URL + "?api-version=2.0"
}
