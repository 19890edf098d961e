package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// A request of ruleCases is an image under ghcr.io/acme, and what differs from the
// claims of a push to main of acme/api. "pull_request" stands for the claims of such
// a job, an empty value for a missing claim.
type ruleCases struct{ pass, deny []string }

const (
	deployedBy = "job_workflow_ref=acme/.github/.github/workflows/deploy.yml@refs/heads/"
	testedBy   = "job_workflow_ref=acme/.github/.github/workflows/qa.yml@refs/heads/"
)

// pipelineRules has the cases for each block of rules on the page.
var pipelineRules = map[string][]ruleCases{
	"Push to main": {{
		pass: []string{"api:dev", "api:dev event_name=workflow_dispatch", "web:dev repository=acme/web"},
		deny: []string{"api:v1", "api:dev2", "web:dev", "api:dev ref=refs/heads/fix", "api:dev ref=refs/tags/main", "api:dev event_name=schedule",
			"api:dev event_name=pull_request_target", "api:dev event_name=workflow_run", "api:dev pull_request",
			"api:dev repository=evil/api repository_owner=evil"},
	}},
	"Release to staging and production": {{
		pass: []string{"api:v1.2 event_name=release ref=refs/tags/v1.2", "web:v2 event_name=release ref=refs/tags/v2 repository=acme/web"},
		deny: []string{"api:v1.2", "api:v1.2 ref=refs/tags/v1.2", "api:v1.2 event_name=release", "api:v1.2 event_name=release ref=refs/tags/x",
			"api:dev event_name=release ref=refs/tags/v1.2", "web:v1.2 event_name=release ref=refs/tags/v1.2"},
	}, {
		pass: []string{"api:v1.2 environment=production", "api:v1.2 environment=production ref=refs/tags/v1.2 event_name=release",
			"web:v2 environment=production ref=refs/tags/v2 repository=acme/web"},
		deny: []string{"api:v1.2", "api:v1.2 environment=Production", "api:v1.2 environment=production-eu", "api:dev environment=production",
			"web:v1.2 environment=production", "api:v1.2 environment=production ref=refs/heads/fix", "api:v1.2 environment=production ref=refs/tags/x",
			"api:v1.2 environment=production event_name=pull_request_target", "api:v1.2 pull_request environment=production"},
	}},
	"Pull requests": {{
		pass: []string{"api:pr-123 pull_request environment=preview", "api:pr-7 pull_request environment=preview",
			"api:qa-123 pull_request " + testedBy + "main"},
		deny: []string{"api:pr-123 pull_request", "api:qa-123 pull_request", "api:pr-123 pull_request environment=qa",
			"api:qa-123 pull_request environment=preview", "api:dev pull_request environment=preview", "web:pr-123 pull_request environment=preview",
			"api:pr-123 pull_request environment=preview base_ref=release/1", "api:pr-123 base_ref=main environment=preview",
			"api:pr-123 pull_request " + testedBy + "main", "api:v1 pull_request " + testedBy + "main", "api:qa-123 pull_request " + testedBy + "fix",
			"api:qa-123 pull_request base_ref=release/1 " + testedBy + "main",
			"api:qa-123 pull_request job_workflow_ref=acme/api/.github/workflows/qa.yml@refs/pull/123/merge",
			// pull_request_target names main in every other claim.
			"api:pr-123 event_name=pull_request_target base_ref=main environment=preview",
			"api:qa-123 event_name=pull_request_target base_ref=main " + testedBy + "main",
			"api:pr-123 pull_request environment=preview repository=evil/api repository_owner=evil"},
	}},
	"Hotfix branches": {{
		pass: []string{"api:hotfix-1 ref=refs/heads/hotfix-1.4", "api:hotfix-1 ref=refs/heads/hotfix-1.4/login"},
		deny: []string{"api:hotfix-1", "api:hotfix-1 ref=refs/heads/hotfix", "api:hotfix-1 ref=refs/tags/hotfix-1.4",
			"api:hotfix-1 ref=refs/heads/fix/refs/heads/hotfix-1.4", "api:hotfix-1 ref=refs/heads/hotfix-1.4 ref_protected=false",
			"api:hotfix-1 ref=refs/heads/hotfix-1.4 ref_protected=", "api:hotfix-1 ref=refs/heads/hotfix-1.4 event_name=workflow_dispatch",
			"api:dev ref=refs/heads/hotfix-1.4", "web:hotfix-1 ref=refs/heads/hotfix-1.4"},
	}},
	"One workflow for the organization": {{
		pass: []string{"api:dev " + deployedBy + "main", "web:dev repository=acme/web " + deployedBy + "main"},
		deny: []string{"api:dev", "api:dev job_workflow_ref=", "api:dev " + deployedBy + "fix", "api:dev " + deployedBy + "main2",
			"api:dev workflow_ref=acme/.github/.github/workflows/deploy.yml@refs/heads/main", "api:dev ref=refs/heads/fix " + deployedBy + "main",
			"api:dev job_workflow_ref=evil/.github/.github/workflows/deploy.yml@refs/heads/main",
			"api:dev event_name=pull_request_target " + deployedBy + "main", "web:dev " + deployedBy + "main", "api:v1 " + deployedBy + "main"},
	}},
	"Registries and mirrors": {{
		pass: []string{"api:dev", "web:dev repository=acme/web"},
		deny: []string{"api:v1", "web:dev", "api:dev ref=refs/heads/fix", "api:dev pull_request", "api:dev event_name=pull_request_target"},
	}},
}

// checkRules sends the cases of a block of rules to web. The requests that pass restart
// Deployments, so that a test counts restarts before.
func (p *pipeline) checkRules(t testing.TB, audience string, cases ruleCases) {
	t.Helper()
	for want, requests := range map[int][]string{http.StatusAccepted: cases.pass, http.StatusForbidden: cases.deny} {
		for _, request := range requests {
			image, differences, _ := strings.Cut(request, " ")
			claims := map[string]any{}
			for difference := range strings.FieldsSeq(differences) {
				name, value, changed := strings.Cut(difference, "=")
				switch {
				case !changed:
					maps.Copy(claims, pullRequest("123").claims)
				case value == "":
					claims[name] = nil
				default:
					claims[name] = value
				}
			}
			claims["aud"] = audience
			a, err := p.job.post(t.Context(), github.mint(time.Now(), claims), imageBody("ghcr.io/acme/"+image))
			if err != nil || a.status != want {
				t.Errorf("%s: status %d, want %d, %v", request, a.status, want, err)
			}
		}
	}
}

// TestPipelineRules: each block of rules on the page has cases.
func TestPipelineRules(t *testing.T) {
	t.Parallel()
	found := map[string]int{}
	for heading := range pipelineSections(t) {
		if rules := readRecipe(t, heading).rules; len(rules) > 0 {
			found[heading] = len(rules)
		}
	}
	want := map[string]int{}
	for heading, cases := range pipelineRules {
		want[heading] = len(cases)
	}
	if !maps.Equal(found, want) {
		t.Errorf("the page has the rules %v, want %v", found, want)
	}
}

const exampleURL = "https://rollout.example.com"

// dev is the first recipe. Its workflow is the first one in docs/github-actions.md.
func dev(t testing.TB) (rules string, w workflow) {
	t.Helper()
	page, err := os.ReadFile("../docs/github-actions.md")
	if err != nil {
		t.Fatal(err)
	}
	fromYAML(t, blockRE.FindStringSubmatch(string(page))[2], &w)
	w.check(t)
	return readRecipe(t, "Push to main").rules[0], w
}

// TestPipelineDev: the job waits for the end of the rollout, and fails if it fails.
func TestPipelineDev(t *testing.T) {
	t.Parallel()
	rules, w := dev(t)
	apps := []deployment{tagged("dev"), tagged("v1")}
	p := startPipeline(t, exampleURL, rules, apps)
	for i, started := range w.events() {
		e := pushTo("main").to(map[string]any{"event_name": started})
		p.run(t, w.Jobs["rollout"], e).mustEnd(t, "complete", false)
		p.wantRestarts(t, apps, map[string]int{"dev": i + 1})
	}
	if n := p.recorder.restarts(deployment{namespace: p.namespace, name: "dev"}); n != 2 {
		t.Errorf("the workflow starts for %q, want push and workflow_dispatch", w.events())
	}
	p.failing.Store(true)
	p.run(t, w.Jobs["rollout"], pushTo("main")).mustEnd(t, "failed", true)
	p.run(t, w.Jobs["rollout"], pushTo("fix")).mustBeRefused(t, http.StatusForbidden)
	p.wantRestarts(t, apps, map[string]int{"dev": 3})
	p.checkRules(t, exampleURL, pipelineRules["Push to main"][0])
}

// releaseTags is what docker/metadata-action makes of a release of v1.2.3.
func releaseTags(t testing.TB, w workflow) string {
	t.Helper()
	step := w.Jobs["image"].Steps[0]
	if step.Uses != "docker/metadata-action@v5" || step.With["flavor"] != "latest=false" || w.Jobs["image"].Outputs["tags"] != "${{ steps."+step.ID+".outputs.tags }}" {
		t.Errorf("the job that pushes the image begins with %+v", step)
	}
	var references []string
	for line := range strings.Lines(step.With["tags"]) {
		pattern, ok := strings.CutPrefix(strings.TrimSpace(line), "type=semver,pattern=")
		if !ok {
			t.Errorf("the workflow has the tags %q", line)
		}
		tag := strings.NewReplacer("{{version}}", "1.2.3", "{{major}}", "1", "{{minor}}", "2").Replace(pattern)
		references = append(references, step.With["images"]+":"+tag)
	}
	return strings.Join(references, "\n")
}

// TestPipelineRelease: staging restarts at once, and production with the environment
// alone.
func TestPipelineRelease(t *testing.T) {
	t.Parallel()
	const heading = "Release to staging and production"
	r := readRecipe(t, heading)
	w := r.workflows["release"]
	release := event{claims: map[string]any{"event_name": "release", "ref": "refs/tags/v1.2.3", "ref_type": "tag"},
		context: map[string]string{"needs.image.outputs.tags": releaseTags(t, w)}}
	if !slices.Equal(w.events(), []string{"release"}) || !slices.Contains(w.Jobs["production"].needs(), "staging") {
		t.Errorf("the workflow starts for %q, and production needs %q", w.events(), w.Jobs["production"].needs())
	}
	apps := []deployment{tagged("v1.2.3"), tagged("v1.2"), tagged("v1"), tagged("v2")}
	each := map[string]int{"v1-2-3": 1, "v1-2": 1, "v1": 1}
	var sites [2]*pipeline
	for i, name := range []string{"staging", "production"} {
		sites[i] = startPipeline(t, "https://"+name+".example.com", r.rules[i], slices.Clone(apps))
	}
	staging, production := sites[0], sites[1]

	staging.run(t, w.Jobs["staging"], release).mustEnd(t, "complete", false)
	staging.wantRestarts(t, apps, each)
	unreviewed := w.Jobs["production"]
	unreviewed.Environment = ""
	production.run(t, unreviewed, release).mustBeRefused(t, http.StatusForbidden)
	production.wantRestarts(t, apps, nil)
	production.run(t, w.Jobs["production"], release).mustEnd(t, "complete", false)
	production.wantRestarts(t, apps, each)
	for i, name := range []string{"staging", "production"} {
		sites[i].checkRules(t, "https://"+name+".example.com", pipelineRules[heading][i])
	}
}

// call runs the job of a reusable workflow. GitHub gives its token the claim
// job_workflow_ref, and the permission only if the caller has it too.
func (p *pipeline) call(t testing.TB, caller pipelineJob, called map[string]workflow, e event) (result stepResult, started bool) {
	t.Helper()
	name, version, _ := strings.Cut(strings.TrimPrefix(caller.Uses, "acme/.github/.github/workflows/"), ".yml@")
	w, ok := called[name]
	if !ok || len(w.Jobs) != 1 || !slices.Equal(w.events(), []string{"workflow_call"}) {
		t.Fatalf("%s is %+v", caller.Uses, w)
	}
	e.context = maps.Clone(e.context)
	if on, ok := w.On.(map[string]any); ok {
		inputs, _, _ := unstructured.NestedMap(on, "workflow_call", "inputs")
		for input, definition := range inputs {
			e.context["inputs."+input] = fmt.Sprint(definition.(map[string]any)["default"])
		}
	}
	for _, job := range w.Jobs {
		if started = e.starts(t, job); started {
			if caller.Permissions["id-token"] != "write" {
				job.Permissions = nil
			}
			result = p.run(t, job, e.to(map[string]any{"job_workflow_ref": strings.TrimSuffix(caller.Uses, version) + "refs/heads/" + version}))
		}
	}
	return result, started
}

// TestPipelinePullRequests: a label starts the job of a workflow that the pull request
// cannot change. The same job in the pull request's own workflow is refused.
func TestPipelinePullRequests(t *testing.T) {
	t.Parallel()
	const heading = "Pull requests"
	r := readRecipe(t, heading)
	var caller map[string]pipelineJob
	fromYAML(t, r.snippets[0], &caller)
	if !strings.Contains(r.text, "`on: {pull_request: {types: [opened, synchronize, labeled]}}`") || len(caller["qa"].needs()) == 0 {
		t.Errorf("the call is\n%s", r.snippets[0])
	}
	apps := []deployment{tagged("qa-7"), tagged("qa-8"), tagged("pr-7")}
	p := startPipeline(t, exampleURL, r.rules[0], apps)

	if _, started := p.call(t, caller["qa"], r.workflows, pullRequest("7", "bug")); started {
		t.Error("the job starts without the label")
	}
	result, started := p.call(t, caller["qa"], r.workflows, pullRequest("7", "bug", "qa"))
	if !started {
		t.Fatal("the job does not start with the label")
	}
	result.mustEnd(t, "complete", false)
	p.run(t, r.workflows["qa"].Jobs["restart"], pullRequest("7", "qa")).mustBeRefused(t, http.StatusForbidden)
	p.wantRestarts(t, apps, map[string]int{"qa-7": 1})

	// The other way: an environment with reviewers.
	preview := pullRequest("7").to(map[string]any{"environment": "preview"})
	with := map[string]string{"url": exampleURL, "image": "ghcr.io/acme/api", "tags": "pr-7"}
	p.act(t, with, pullRequest("7").claims, true).mustBeRefused(t, http.StatusForbidden)
	p.act(t, with, preview.claims, true).mustEnd(t, "complete", false)
	p.wantRestarts(t, apps, map[string]int{"qa-7": 1, "pr-7": 1})
	p.checkRules(t, exampleURL, pipelineRules[heading][0])
}

// TestPipelineHotfix: the first workflow with two other lines.
func TestPipelineHotfix(t *testing.T) {
	t.Parallel()
	const heading = "Hotfix branches"
	r := readRecipe(t, heading)
	_, w := dev(t)
	var lines struct {
		On   map[string]map[string][]string `json:"true"`
		With map[string]string
	}
	fromYAML(t, r.snippets[0], &lines)
	if branches := lines.On["push"]["branches"]; len(lines.On) != 1 || !slices.Equal(branches, []string{"hotfix-*"}) {
		t.Errorf("the workflow starts for %v", lines.On)
	}
	job := w.Jobs["rollout"]
	job.Steps[0].With = lines.With
	apps := []deployment{tagged("hotfix-1.4"), tagged("hotfix-1.5"), tagged("dev")}
	p := startPipeline(t, exampleURL, r.rules[0], apps)
	p.run(t, job, pushTo("hotfix-1.4")).mustEnd(t, "complete", false)
	p.run(t, job, pushTo("hotfix-1.5").to(map[string]any{"ref_protected": "false"})).mustBeRefused(t, http.StatusForbidden)
	p.wantRestarts(t, apps, map[string]int{"hotfix-1-4": 1})
	p.checkRules(t, exampleURL, pipelineRules[heading][0])
}

// TestPipelineOrganization: three lines in a repository call the one workflow.
func TestPipelineOrganization(t *testing.T) {
	t.Parallel()
	const heading = "One workflow for the organization"
	r := readRecipe(t, heading)
	var caller map[string]pipelineJob
	fromYAML(t, r.snippets[0], &caller)
	if n := strings.Count(r.snippets[0], "\n"); n != 4 || len(caller["rollout"].needs()) == 0 {
		t.Errorf("the call has %d lines:\n%s", n, r.snippets[0])
	}
	apps := []deployment{tagged("dev"), {name: "web", images: []string{"ghcr.io/acme/web:dev"}}}
	p := startPipeline(t, exampleURL, r.rules[0], apps)
	result, _ := p.call(t, caller["rollout"], r.workflows, pushTo("main"))
	result.mustEnd(t, "complete", false)
	p.wantRestarts(t, apps, map[string]int{"dev": 1})

	// Another repository calls it for its own image; a copy of the workflow is refused.
	web := pushTo("main").to(map[string]any{"repository": "acme/web"})
	web.context["github.repository"] = "acme/web"
	result, _ = p.call(t, caller["rollout"], r.workflows, web)
	result.mustEnd(t, "complete", false)
	copied := pushTo("main")
	copied.context["inputs.tags"] = "dev"
	p.run(t, r.workflows["deploy"].Jobs["rollout"], copied).mustBeRefused(t, http.StatusForbidden)
	p.wantRestarts(t, apps, map[string]int{"dev": 1, "web": 1})
	p.checkRules(t, exampleURL, pipelineRules[heading][0])
}

// TestPipelineMatrix: one restart after the matrix; if every job requests one, two.
func TestPipelineMatrix(t *testing.T) {
	t.Parallel()
	r := readRecipe(t, "Matrix builds")
	rules, w := dev(t)
	var jobs map[string]pipelineJob
	fromYAML(t, r.snippets[0], &jobs)
	size := len(jobs["build"].Strategy.Matrix["platform"])
	rollout := jobs["rollout"]
	if size < 2 || len(rollout.Strategy.Matrix) > 0 || !slices.Equal(rollout.needs(), []string{"merge"}) || !slices.Equal(jobs["merge"].needs(), []string{"build"}) {
		t.Errorf("the jobs are\n%s", r.snippets[0])
	}
	apps := []deployment{tagged("dev"), {name: "web", images: []string{"ghcr.io/acme/web:dev"}}}
	p := startPipeline(t, exampleURL, rules, apps, "WORKER_RESTART_INTERVAL=4s")
	rollout.Steps, rollout.Permissions = w.Jobs["rollout"].Steps, w.Jobs["rollout"].Permissions
	p.run(t, rollout, pushTo("main")).mustEnd(t, "complete", false)
	p.wantRestarts(t, apps, map[string]int{"dev": 1})

	for i := range 2 * size {
		claims := map[string]any{"aud": exampleURL, "repository": "acme/web"}
		a, err := p.job.post(t.Context(), github.mint(time.Now(), claims), imageBody("ghcr.io/acme/web:dev"))
		if err != nil || a.status != http.StatusAccepted {
			t.Fatalf("a job of the matrix is answered %d %s, %v", a.status, a.body, err)
		}
		if i == 0 {
			p.wantRestarts(t, apps, map[string]int{"dev": 1, "web": 1})
		}
		time.Sleep(100 * time.Millisecond) // enough for a restart each
	}
	p.wantRestarts(t, apps, map[string]int{"dev": 1, "web": 2})
	time.Sleep(time.Second)
	p.wantRestarts(t, apps, map[string]int{"dev": 1, "web": 2})
}

// TestPipelineRegistries: the prefixes and the rule work together.
func TestPipelineRegistries(t *testing.T) {
	t.Parallel()
	const heading = "Registries and mirrors"
	r := readRecipe(t, heading)
	setting := regexp.MustCompile("set `ALLOWED_IMAGE_PREFIX` to `(\\S+)`").FindStringSubmatch(r.text)
	if setting == nil || strings.Count(setting[1], ",") != 2 {
		t.Fatalf("the page sets %q", setting)
	}
	var apps []deployment
	want := map[string]int{}
	for i, prefix := range strings.Split(setting[1], ",") {
		d := deployment{name: fmt.Sprint("registry-", i), images: []string{prefix + "/api:dev"}}
		apps, want[d.name] = append(apps, d), 1
	}
	mirrored := deployment{name: "mirror", images: []string{"mirror.example.com/ghcr.io/acme/api:dev"}}
	apps = append(apps, mirrored)
	p := startPipeline(t, exampleURL, r.rules[0], apps, "ALLOWED_IMAGE_PREFIX="+setting[1])
	for _, d := range apps[:3] {
		p.act(t, map[string]string{"url": exampleURL, "image": d.images[0]}, pushTo("main").claims, true).mustEnd(t, "complete", false)
	}
	p.act(t, map[string]string{"url": exampleURL, "image": "docker.io/acme/api:dev"}, pushTo("main").claims, true).mustBeRefused(t, http.StatusForbidden)
	p.wantRestarts(t, apps, want)
	p.checkRules(t, exampleURL, pipelineRules[heading][0])
}

// kubectlApply applies objects as a tool does.
func kubectlApply(t testing.TB, kubeconfig string, objects []map[string]any, flags ...string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "list.json")
	list := map[string]any{"apiVersion": "v1", "kind": "List", "items": objects}
	if err := os.WriteFile(file, []byte(asJSON(list)), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(sharedAPI.bin, "kubectl"), append([]string{"apply", "-f", file}, flags...)...)
	cmd.Env = []string{"KUBECONFIG=" + kubeconfig, "HOME=" + t.TempDir()}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kubectl apply: %v\n%s", err, out)
	}
}

// TestPipelineGitOps: Flux applies on the server, Argo CD on the client. Neither
// removes the annotation, unless Git has annotations without a value.
func TestPipelineGitOps(t *testing.T) {
	t.Parallel()
	r := readRecipe(t, "Argo CD and Flux")
	rules, w := dev(t)
	kubeconfig := user{name: "admin", token: adminToken}.kubeconfig(t, sharedAPI.url)
	p := startPipeline(t, exampleURL, rules, nil)
	flux, argo, empty, none := tagged("dev"), tagged("dev"), tagged("dev"), tagged("dev")
	apps := []deployment{flux, argo, empty, none}
	var inGit []map[string]any
	apply := func() {
		kubectlApply(t, kubeconfig, inGit[:1], "--server-side", "--field-manager=kustomize-controller")
		kubectlApply(t, kubeconfig, inGit[1:], "--field-manager=argocd-controller")
	}
	for i, name := range []string{"flux", "argo", "empty", "none"} {
		apps[i].name, apps[i].namespace = name, p.namespace
		object := apps[i].object()
		object["metadata"].(map[string]any)["namespace"] = p.namespace
		delete(object["spec"].(map[string]any), "paused")
		inGit = append(inGit, object)
	}
	template := func(i int) map[string]any { return inGit[i]["spec"].(map[string]any)["template"].(map[string]any) }
	template(2)["metadata"].(map[string]any)["annotations"] = map[string]any{}
	template(3)["metadata"].(map[string]any)["annotations"] = nil
	apply()
	once := map[string]int{"flux": 1, "argo": 1, "empty": 1, "none": 1}
	result := p.run(t, w.Jobs["rollout"], pushTo("main"))
	result.mustEnd(t, "complete", false)
	p.wantRestarts(t, apps, once)
	apply()
	once["none"] = 2 // the pods restart once more
	p.wantRestarts(t, apps, once)
	for i, d := range apps {
		if got := restartedAt(d.get(t)); (got == result.outputs["requested-at"]) == (i == 3) {
			t.Errorf("after the second apply restartedAt of %s is %q", d.name, got)
		}
	}

	// With the documented settings, Argo CD compares what is equal.
	var settings struct {
		Spec struct {
			IgnoreDifferences []struct{ JQPathExpressions []string }
		}
	}
	fromYAML(t, r.snippets[0], &settings)
	paths := settings.Spec.IgnoreDifferences[0].JQPathExpressions
	annotations := func(template any, paths ...string) string {
		filter := "{spec: {template: .}}"
		for _, path := range paths {
			filter += " | del(" + path + ")"
		}
		cmd := exec.CommandContext(t.Context(), "jq", "-c", filter+" | .spec.template.metadata.annotations")
		cmd.Stdin = strings.NewReader(asJSON(template))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("jq: %v\n%s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	live, _, _ := unstructured.NestedFieldNoCopy(apps[2].get(t).Object, "spec", "template")
	if got := annotations(live, paths...); got != annotations(template(2), paths...) || got != "null" {
		t.Errorf("with %q, the live annotations compare as %s", paths, got)
	}
	slices.Reverse(paths)
	if annotations(live, paths...) == "null" {
		t.Error("the order of the expressions does not matter, and the page says that it does")
	}
}

// TestPipelineRollouts: the Deployment that an Argo Rollout refers to has no pods.
func TestPipelineRollouts(t *testing.T) {
	t.Parallel()
	readRecipe(t, "Argo Rollouts")
	rules, w := dev(t)
	apps := []deployment{tagged("dev")}
	p := startPipeline(t, exampleURL, rules, apps)
	apps[0].patch(t, `{"spec":{"replicas":0}}`)
	before := p.recorder.restarts(apps[0])
	eventually(t, 10*time.Second, "the Deployment has no pods", func() error {
		if before = p.recorder.restarts(apps[0]); before != 1 {
			return fmt.Errorf("%s", describe(p.recorder.of(apps[0])))
		}
		return nil
	})
	p.run(t, w.Jobs["rollout"], pushTo("main")).mustEnd(t, "complete", false)
	p.wantRestarts(t, apps, map[string]int{"dev": before + 1})
}

// TestPipelineByHand runs the documented command with the users of k8s/.
func TestPipelineByHand(t *testing.T) {
	t.Parallel()
	r := readRecipe(t, "By hand")
	v := startManifestValkey(t, valkey.ClientOption{})
	p := &pipeline{namespace: newNamespace(t)}
	d := tagged("dev")
	d.namespace = p.namespace
	d.create(t)
	p.recorder = record(t, p.namespace)
	kubeconfig := newWorkerUser(t, p.namespace).kubeconfig(t, sharedAPI.url)
	settings := append(v.settings("worker"), "WORKER_NAMESPACES="+p.namespace)
	worker := startWorker(t, v.addr, kubeconfig, settings...)
	web := startWeb(t, v.addr, v.settings("web")...)

	// kubectl evaluates the template on a Secret of its own, and exec runs here.
	const kubectl = `kubectl() {
  [ "$1 $2" = "-n kuberollouttrigger" ] || exit 9
  case $3 in
    get) "$KUBECTL" create "$4" generic "$5" --from-literal=web="$WEB" --from-literal=worker=other --dry-run=client "${@:6}" ;;
    exec) [ "$4 $5 $6" = "-i valkey-0 --" ] && "${@:7}" -h "$VALKEY_HOST" -p "$VALKEY_PORT" ;;
  esac
}
`
	host, port, _ := strings.Cut(v.addr, ":")
	publish := func(received int) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", kubectl+r.shell[0])
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "KUBECTL=" + filepath.Join(sharedAPI.bin, "kubectl"),
			"WEB=" + v.secret["web"], "VALKEY_HOST=" + host, "VALKEY_PORT=" + port}
		out, err := cmd.CombinedOutput()
		if want := fmt.Sprintf("OK\n%d\n", received); err != nil || string(out) != want {
			t.Fatalf("the command prints %q, %v, want %q", out, err, want)
		}
	}
	publish(1)
	p.wantRestarts(t, []deployment{d}, map[string]int{"dev": 1})
	if at := v.requestedAt(t, d.images[0]); at != 0 {
		t.Errorf("the ledger has the request at %s", stamp(at))
	}
	if a, err := newClient(web.url).get(t.Context(), "image="+d.images[0]); err != nil || a.status != http.StatusNotFound {
		t.Errorf("GET /rollout answers %d %s, %v", a.status, a.body, err)
	}
	worker.kill()
	publish(0)
	startWorker(t, v.addr, kubeconfig, settings...)
	p.recorder.mustNotChange(t, d, 500*time.Millisecond)
	if n := v.refusals(t); n != 0 {
		t.Errorf("ACL LOG has %d entries", n)
	}
}
