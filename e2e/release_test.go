package e2e

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// These tests run what .github/ does on GitHub, with stand-ins for docker, cosign and
// gh, and what the documentation says about a release.

// ownWorkflow is what the tests read of a file in .github/workflows/.
type ownWorkflow struct {
	On          map[string]any `json:"true"` // which is what YAML 1.1 means by on
	Permissions map[string]string
	Jobs        map[string]struct {
		Needs       any
		Uses        string
		Permissions map[string]string
		Outputs     map[string]string
		Steps       []workflowStep
	}
}

type workflowStep struct {
	ID, Uses, Run string
	Env           map[string]string
	With          map[string]any
}

func readText(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func readWorkflow(t testing.TB, name string) (w ownWorkflow) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(readText(t, "../.github/workflows/"+name)), &w); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return w
}

type texts = map[string]string

// TestReleaseWorkflows: jobs have these permissions and no more, actions are pinned to
// commits, and no expression becomes part of a script.
func TestReleaseWorkflows(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]map[string]texts{
		"test.yaml": {"": {"contents": "read"}, "test": nil},
		"release.yaml": {"": {}, "test": {"contents": "read"}, "image": {"contents": "read", "packages": "write"},
			"sign": {"contents": "read", "packages": "write", "id-token": "write"}, "release": {"contents": "write"}},
	} {
		w := readWorkflow(t, name)
		got := map[string]texts{"": w.Permissions}
		for id, job := range w.Jobs {
			got[id] = job.Permissions
			for _, step := range job.Steps {
				if strings.Contains(step.Run, "${{") {
					t.Errorf("%s: the script of a step of %s has an expression: %s", name, id, step.Run)
				}
				if strings.HasPrefix(step.Uses, "actions/checkout@") && step.With["persist-credentials"] != false {
					t.Errorf("%s: the checkout of %s leaves its token in the clone", name, id)
				}
			}
		}
		if !maps.EqualFunc(got, want, func(a, b texts) bool { return maps.Equal(a, b) && (a == nil) == (b == nil) }) {
			t.Errorf("%s has the permissions %v, want %v", name, got, want)
		}
	}
	if files, _ := filepath.Glob("../.github/workflows/*"); len(files) != 2 {
		t.Errorf("the workflows are %q", files)
	}
	usesRE := regexp.MustCompile(`(?m)^[ -]*uses: (.*)$`)
	pinnedRE := regexp.MustCompile(`^(?:[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./\.github/workflows/test\.yaml)$`)
	seen := map[string]bool{}
	for _, name := range []string{".github/workflows/test.yaml", ".github/workflows/release.yaml", "action/action.yml"} {
		for _, m := range usesRE.FindAllStringSubmatch(readText(t, "../"+name), -1) {
			seen[m[1]] = true
			if !pinnedRE.MatchString(m[1]) {
				t.Errorf("%s uses %s, which is not pinned to a commit with its version", name, m[1])
			}
		}
	}
	if len(seen) != 3 {
		t.Errorf("the workflows use %v", slices.Sorted(maps.Keys(seen)))
	}

	test, release := readWorkflow(t, "test.yaml"), readWorkflow(t, "release.yaml")
	if on := slices.Sorted(maps.Keys(test.On)); !slices.Equal(on, []string{"pull_request", "push", "workflow_call"}) {
		t.Errorf("test.yaml runs on %q", on)
	}
	if steps := test.Jobs["test"].Steps; steps[len(steps)-1].Run != ".ci/run" {
		t.Errorf("test.yaml runs %+v", steps)
	}
	if asJSON(release.On["push"]) != `{"tags":["v[0-9]+.[0-9]+.[0-9]+*"]}` || len(release.On) != 1 {
		t.Errorf("release.yaml runs on %v", release.On)
	}
	// The documented command expects the identity of the workflow that signs.
	identity := regexp.MustCompile(`--certificate-identity (\S+)`).FindStringSubmatch(readText(t, "../docs/install.md"))
	if len(identity) != 2 || identity[1] != "https://github.com/OWNER/kuberollouttrigger/.github/workflows/release.yaml@refs/tags/v1.0.0" {
		t.Errorf("docs/install.md has the identity %q", identity)
	}
}

// TestReleaseDependabot: every Go module is looked after, and every folder exists.
func TestReleaseDependabot(t *testing.T) {
	t.Parallel()
	var config struct {
		Updates []struct {
			Ecosystem   string `json:"package-ecosystem"`
			Directory   string
			Directories []string
		}
	}
	if err := yaml.Unmarshal([]byte(readText(t, "../.github/dependabot.yml")), &config); err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for _, update := range config.Updates {
		got[update.Ecosystem] = append(update.Directories, strings.Fields(update.Directory)...)
	}
	files := map[string]string{"gomod": "go.mod", "docker": "Dockerfile", "github-actions": "action.yml"}
	if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(files))) {
		t.Errorf("Dependabot updates %v", got)
	}
	for ecosystem, file := range files {
		var want []string
		for _, pattern := range []string{"", "*/", "*/*/"} {
			found, _ := filepath.Glob("../" + pattern + file)
			for _, name := range found {
				want = append(want, filepath.Join("/", strings.TrimPrefix(filepath.Dir(name), "..")))
			}
		}
		if ecosystem == "github-actions" {
			want = append(want, "/") // .github/workflows
		}
		slices.Sort(want)
		if slices.Sort(got[ecosystem]); !slices.Equal(got[ecosystem], want) {
			t.Errorf("%s: Dependabot looks into %q, want %q", ecosystem, got[ecosystem], want)
		}
	}
}

const (
	releaseDigest = "sha256:19ffeab6f8bc9293ac2c3fdf94ebe28396254c993aea0b5a542cfb02e0883fa3"
	releaseToken  = "ghs_secret"
)

// standIn is docker, cosign and gh. It records its arguments and what it reads.
const standIn = `#!/bin/bash
{ printf %s "${0##*/}"; printf '\t%s' "$@"; echo; } >>"$CALLS"
case "${0##*/} $1 $2" in
"docker login ghcr.io" | "gh release create") cat >"$CALLS-$1" ;;
"docker buildx build")
  while [ "$1" != --metadata-file ]; do shift; done
  printf %s "$METADATA" >"$2" ;;
esac
`

// releaseRun is a run of release.yaml.
type releaseRun struct {
	t        testing.TB
	dir      string // what it leaves behind
	source   string // the repository
	env      texts
	outputs  texts // of steps and jobs, by the expression that names them
	metadata string
}

func newReleaseRun(t testing.TB, repository, ref string) *releaseRun {
	r := &releaseRun{t: t, dir: t.TempDir(), source: t.TempDir(), outputs: texts{}, metadata: `{"containerimage.digest":"` + releaseDigest + `"}`}
	r.env = texts{"GITHUB_REPOSITORY": repository, "GITHUB_REF": ref, "GITHUB_SERVER_URL": "https://github.com", "GITHUB_ACTOR": "octocat",
		"GITHUB_SHA": strings.Repeat("c", 40), "GITHUB_RUN_ID": "42", "GITHUB_RUN_ATTEMPT": "1", "CALLS": r.dir + "/calls"}
	for _, name := range []string{".github", "k8s"} {
		if err := os.CopyFS(filepath.Join(r.source, name), os.DirFS("../"+name)); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// run runs the jobs after test, each on a machine of its own, until a step fails. It
// returns the output of that step.
func (r *releaseRun) run() (failure string) {
	r.t.Helper()
	w, done := readWorkflow(r.t, "release.yaml"), map[string]bool{"test": true}
	for len(done) < len(w.Jobs) {
		before := len(done)
		for _, id := range slices.Sorted(maps.Keys(w.Jobs)) {
			needs := strings.FieldsFunc(asJSON(w.Jobs[id].Needs), func(c rune) bool { return strings.ContainsRune(`[",]`, c) })
			if done[id] || slices.ContainsFunc(needs, func(need string) bool { return !done[need] }) {
				continue
			}
			done[id] = true
			if failure = r.job(id, w.Jobs[id].Steps); failure != "" {
				return failure
			}
			for name, value := range w.Jobs[id].Outputs {
				r.outputs["needs."+id+".outputs."+name] = r.resolve(value)
			}
		}
		if len(done) == before {
			r.t.Fatalf("after %v no job can run", done)
		}
	}
	return ""
}

// job runs the steps of a job. What is there depends on the actions that it uses.
func (r *releaseRun) job(id string, steps []workflowStep) (failure string) {
	r.t.Helper()
	bin, workspace, temp := r.t.TempDir(), r.t.TempDir(), filepath.Join(r.dir, id)
	must := func(err error) {
		if err != nil {
			r.t.Fatal(err)
		}
	}
	must(os.Mkdir(temp, 0o755))
	for _, tool := range []string{"bash", "awk", "cat", "dirname", "jq", "mkdir"} {
		path, err := exec.LookPath(tool)
		must(err)
		must(os.Symlink(path, filepath.Join(bin, tool)))
	}
	install := func(tool string) { must(os.WriteFile(filepath.Join(bin, tool), []byte(standIn), 0o755)) }
	install("docker")
	install("gh")
	for i, step := range steps {
		switch action, _, _ := strings.Cut(step.Uses, "@"); action {
		case "":
			output := filepath.Join(temp, "output")
			cmd := exec.Command("bash", "-e", "-c", step.Run)
			cmd.Dir = workspace
			cmd.Env = []string{"PATH=" + bin, "HOME=" + temp, "RUNNER_TEMP=" + temp, "GITHUB_OUTPUT=" + output, "METADATA=" + r.metadata}
			for name, value := range r.env {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
			for name, value := range step.Env {
				cmd.Env = append(cmd.Env, name+"="+r.resolve(value))
			}
			out, err := cmd.CombinedOutput()
			if strings.Contains(string(out), releaseToken) {
				r.t.Errorf("step %d of %s prints the token:\n%s", i, id, out)
			}
			if err != nil {
				return string(out)
			}
			text, _ := os.ReadFile(output)
			for line := range strings.Lines(string(text)) {
				name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
				r.outputs["steps."+step.ID+".outputs."+name] = value
			}
		case "actions/checkout":
			must(os.CopyFS(workspace, os.DirFS(r.source)))
		case "sigstore/cosign-installer":
			install("cosign")
		default:
			r.t.Fatalf("%s uses %s", id, step.Uses)
		}
	}
	return ""
}

// resolve replaces an expression by its value.
func (r *releaseRun) resolve(value string) string {
	r.t.Helper()
	expression := strings.TrimSuffix(strings.TrimPrefix(value, "${{ "), " }}")
	known := maps.Clone(r.outputs)
	known["github.token"] = releaseToken
	resolved, ok := known[expression]
	if !ok {
		r.t.Fatalf("%q is not among %q", value, slices.Sorted(maps.Keys(known)))
	}
	return resolved
}

// calls are those of the stand-ins.
func (r *releaseRun) calls() []string {
	text, _ := os.ReadFile(r.env["CALLS"])
	return strings.FieldsFunc(strings.ReplaceAll(string(text), "\t", " "), func(c rune) bool { return c == '\n' })
}

// releaseAssets runs release.yaml for a tag, and returns the folder with its files.
func releaseAssets(t testing.TB, repository, tag string) (r *releaseRun, dir string) {
	t.Helper()
	r = newReleaseRun(t, repository, "refs/tags/"+tag)
	if failure := r.run(); failure != "" {
		t.Fatal(failure)
	}
	return r, filepath.Join(r.dir, "release", "release")
}

func objectKey(object *unstructured.Unstructured) string {
	return object.GetKind() + " " + object.GetNamespace() + "/" + object.GetName()
}

// byKey is what objects are, by their kind, namespace and name. Kustomize folds the
// lines of CEL anew, and adds empty ones, which mean nothing there.
func byKey(objects []*unstructured.Unstructured) texts {
	all := texts{}
	for _, object := range objects {
		text := asJSON(object.Object)
		if object.GetKind() == "ValidatingAdmissionPolicy" {
			text = strings.ReplaceAll(text, `\n\n`, `\n`)
		}
		all[objectKey(object)] = text
	}
	return all
}

// mustEqual compares two sets of objects.
func mustEqual(t testing.TB, what string, got, want []*unstructured.Unstructured) {
	t.Helper()
	gotten, wanted := byKey(got), byKey(want)
	for key := range maps.Keys(wanted) {
		if gotten[key] != wanted[key] {
			t.Errorf("%s: %s is\n%s\nwant\n%s", what, key, gotten[key], wanted[key])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d objects, want %d", what, len(got), len(want))
	}
}

// withImage are the objects of k8s/ where web and the worker have another image.
func withImage(t testing.TB, image string) []*unstructured.Unstructured {
	t.Helper()
	objects := readManifests(t, "../k8s/*.yaml")
	for _, name := range []string{"web", "worker"} {
		object := manifestNamed(t, objects, "Deployment", name)
		containers, _, _ := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "containers")
		containers[0].(map[string]any)["image"] = image
		if err := unstructured.SetNestedSlice(object.Object, containers, "spec", "template", "spec", "containers"); err != nil {
			t.Fatal(err)
		}
	}
	return objects
}

// TestRelease runs release.yaml: what it builds, signs and publishes, and with which
// files.
func TestRelease(t *testing.T) {
	t.Parallel()
	for tag, flags := range map[string]string{"v1.2.3": "", "v1.20.0-rc.1": "--prerelease "} {
		const image = "ghcr.io/acme-corp/rollout.trigger"
		r, dir := releaseAssets(t, "Acme-Corp/Rollout.Trigger", tag)
		login := "docker login ghcr.io --username octocat --password-stdin"
		want := []string{
			login,
			"docker buildx create --driver docker-container --use",
			"docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=" + tag +
				" --label org.opencontainers.image.source=https://github.com/Acme-Corp/Rollout.Trigger --label org.opencontainers.image.revision=" + r.env["GITHUB_SHA"] +
				" --sbom=true --provenance=mode=max,builder-id=https://github.com/Acme-Corp/Rollout.Trigger/actions/runs/42/attempts/1" +
				" --metadata-file " + r.dir + "/image/metadata.json --tag " + image + ":" + tag + " --push .",
			login,
			"cosign sign --yes " + image + "@" + releaseDigest,
			"gh release create " + tag + " " + dir + "/kuberollouttrigger.yaml " + dir + "/config.yaml --repo Acme-Corp/Rollout.Trigger" +
				" --verify-tag --title " + tag + " " + flags + "--notes-file -",
		}
		if got := r.calls(); !slices.Equal(got, want) {
			t.Errorf("the calls are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		if got := readText(t, r.dir+"/calls-login"); got != releaseToken {
			t.Errorf("docker login reads %q", got)
		}
		pinned := image + ":" + tag + "@" + releaseDigest
		if notes := readText(t, r.dir+"/calls-release"); !strings.Contains(notes, "`"+pinned+"`") ||
			!strings.Contains(notes, "(https://github.com/Acme-Corp/Rollout.Trigger/blob/"+tag+"/docs/install.md)") {
			t.Errorf("the notes are:\n%s", notes)
		}

		files, _ := filepath.Glob(dir + "/*")
		if !slices.Equal(files, []string{dir + "/config.yaml", dir + "/kuberollouttrigger.yaml"}) {
			t.Errorf("the files are %q", files)
		}
		mustEqual(t, "both files", readManifests(t, dir+"/*.yaml"), withImage(t, pinned))
		if strings.Contains(readText(t, dir+"/kuberollouttrigger.yaml"), "REPLACE_ME") {
			t.Error("kuberollouttrigger.yaml is to be edited")
		}
		var keys []string
		for _, object := range readManifests(t, dir+"/config.yaml") {
			keys = append(keys, objectKey(object))
		}
		edited := []string{"ConfigMap " + home + "/" + home, "ConfigMap " + home + "/web", "NetworkPolicy " + home + "/web"}
		if !slices.Equal(keys, edited) {
			t.Errorf("config.yaml has %q, want %q", keys, edited)
		}
	}
}

// TestReleaseRefused: nothing is pushed for a ref that is not a version, and nothing is
// signed or published without a digest or with an image that is not pinned.
func TestReleaseRefused(t *testing.T) {
	t.Parallel()
	for _, ref := range []string{"refs/heads/v1.2.3", "refs/heads/main", "refs/tags/v1", "refs/tags/v1.2", "refs/tags/1.2.3", "refs/tags/v01.2.3", "refs/tags/v1.2.3.4",
		"refs/tags/v1.2.3-", "refs/tags/v1.2.3-a..b", "refs/tags/v1.2.3+build", "refs/tags/v1.2.3;id", "refs/tags/v1.2.3\nrefs/tags/v1.2.4", "refs/tags/v1.2.3-ä", ""} {
		r := newReleaseRun(t, "acme/kuberollouttrigger", ref)
		if failure := r.run(); failure != "::error::the tag is not a version such as v1.2.3 or v1.2.3-rc.1\n" || len(r.calls()) > 0 {
			t.Errorf("%q: %q, after the calls %q", ref, failure, r.calls())
		}
	}
	for _, repository := range []string{"", "acme", "acme/a/b", "acme/", "ac me/x", "acme/x&y"} {
		r := newReleaseRun(t, repository, "refs/tags/v1.2.3")
		if failure := r.run(); failure != "::error::GITHUB_REPOSITORY is not OWNER/NAME\n" || len(r.calls()) > 0 {
			t.Errorf("%q: %q, after the calls %q", repository, failure, r.calls())
		}
	}
	for _, metadata := range []string{`{}`, `{"containerimage.digest":""}`, `{"containerimage.digest":"sha256:ab"}`, `{"containerimage.digest":"` + releaseDigest + `\nx=y"}`} {
		r := newReleaseRun(t, "acme/kuberollouttrigger", "refs/tags/v1.2.3")
		r.metadata = metadata
		if failure := r.run(); failure != "::error::there is no digest of the image\n" || len(r.calls()) != 3 {
			t.Errorf("%s: %q, after the calls %q", metadata, failure, r.calls())
		}
	}
	r := newReleaseRun(t, "acme/kuberollouttrigger", "refs/tags/v1.2.3")
	worker := readText(t, "../k8s/50-worker.yaml")
	if err := os.WriteFile(r.source+"/k8s/50-worker.yaml", []byte(strings.Replace(worker, ":latest\n", ":dev\n", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if failure := r.run(); failure != "::error::the image is in k8s/ 1 times, expected web and worker\n" || slices.ContainsFunc(r.calls(), func(call string) bool { return strings.HasPrefix(call, "gh ") }) {
		t.Errorf("with an image that is not pinned: %q, after the calls %q", failure, r.calls())
	}
}

// TestKustomization: k8s/Kustomization is k8s/*.yaml, and the overlay in k8s/examples
// changes the image, three options and one label, which leaves nothing to edit.
func TestKustomization(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	dir := t.TempDir()
	if err := os.CopyFS(dir+"/k8s", os.DirFS("../k8s")); err != nil {
		t.Fatal(err)
	}
	const overlay = "../k8s/examples/kustomization/kustomization.yaml"
	if err := os.WriteFile(dir+"/kustomization.yaml", []byte(readText(t, overlay)), 0o644); err != nil {
		t.Fatal(err)
	}
	kubectl := func(args ...string) string {
		cmd := exec.Command(filepath.Join(c.bin, "kubectl"), args...)
		cmd.Dir, cmd.Env = dir, []string{"HOME=" + t.TempDir(), "KUBECONFIG=" + user{name: "admin", token: adminToken}.kubeconfig(t, c.url)}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	build := func(args ...string) []*unstructured.Unstructured {
		name := filepath.Join(t.TempDir(), "built.yaml")
		if err := os.WriteFile(name, []byte(kubectl(append([]string{"kustomize"}, args...)...)), 0o644); err != nil {
			t.Fatal(err)
		}
		return readManifests(t, name)
	}
	base := readManifests(t, "../k8s/*.yaml")
	mustEqual(t, "the base", build("k8s"), base)

	digest := regexp.MustCompile(`digest: (sha256:[0-9a-f]{64})\n`).FindStringSubmatch(readText(t, overlay))
	if digest == nil {
		t.Fatal("the overlay has no digest")
	}
	want := withImage(t, "ghcr.io/OWNER/kuberollouttrigger@"+digest[1])
	options := map[string]texts{
		home:  {"ALLOWED_IMAGE_PREFIX": "ghcr.io/acme"},
		"web": {"GITHUB_ALLOWED_ORG": "acme", "GITHUB_OIDC_AUDIENCE": "https://rollout.example.com"},
	}
	for name, values := range options {
		for option, value := range values {
			if err := unstructured.SetNestedField(manifestNamed(t, want, "ConfigMap", name).Object, value, "data", option); err != nil {
				t.Fatal(err)
			}
		}
	}
	spec := manifestNamed(t, want, "NetworkPolicy", "web").Object["spec"].(map[string]any)
	from := spec["ingress"].([]any)[0].(map[string]any)["from"].([]any)[0].(map[string]any)
	from["namespaceSelector"].(map[string]any)["matchLabels"].(map[string]any)["kubernetes.io/metadata.name"] = "ingress-nginx"
	mustEqual(t, "the overlay", build("."), want)
	// In another namespace, the policy still applies to the worker.
	if err := os.WriteFile(dir+"/kustomization.yaml", []byte("namespace: platform\n"+readText(t, overlay)), 0o644); err != nil {
		t.Fatal(err)
	}
	policy, account := manifestNamed(t, build("."), "ValidatingAdmissionPolicy", "kuberollouttrigger-worker"), "system:serviceaccount:platform:worker"
	if !strings.Contains(asJSON(policy.Object["spec"].(map[string]any)["matchConditions"]), "'"+account+"'") {
		t.Errorf("in the namespace platform, the policy does not apply to %s", account)
	}
	if err := os.WriteFile(dir+"/kustomization.yaml", []byte(readText(t, overlay)), 0o644); err != nil {
		t.Fatal(err)
	}
	for key, object := range byKey(want) {
		if strings.Contains(object, "REPLACE_ME") {
			t.Errorf("with the overlay, %s is to be edited: %s", key, object)
		}
	}
	if lines := strings.Count(kubectl("apply", "-k", "."), " created\n"); lines != len(base) {
		t.Errorf("%d of %d objects are created", lines, len(base))
	}
}
