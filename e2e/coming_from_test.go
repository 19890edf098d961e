package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"kuberollouttrigger/internal/fake"
)

// The environment in the manifests that UnitVectorY-Labs/kuberollouttrigger publishes in
// docs/DEPLOYMENT.md (7abd15e), the optional variables included. VALKEY_ADDR is
// valkey:6379 there.
var (
	publishedCommon = []string{"VALKEY_CHANNEL=kuberollouttrigger", "ALLOWED_IMAGE_PREFIX=ghcr.io/unitvectory-labs/",
		"VALKEY_USERNAME=default", "VALKEY_PASSWORD=your-valkey-password"}
	publishedWeb = []string{"GITHUB_OIDC_AUDIENCE=https://kuberollouttrigger.example.com", "GITHUB_ALLOWED_ORG=unitvectory-labs"}
)

const (
	publishedImage = "ghcr.io/unitvectory-labs/myservice"
	// What UnitVectorY-Labs/kuberollouttrigger-action posts, and what its web publishes.
	publishedBody = `{"image":"` + publishedImage + `","tags":["dev"]}`
)

// TestComingFrom: web and the worker start with the published environment and rights,
// and take what the published action posts. They ignore the message that the published
// web sends to the published worker.
func TestComingFrom(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/coming-from.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, setting := range slices.Concat([]string{"VALKEY_ADDR="}, publishedCommon, publishedWeb) {
		if name, _, _ := strings.Cut(setting, "="); !strings.Contains(string(page), "`"+name+"`") {
			t.Errorf("docs/coming-from.md does not have %s", name)
		}
	}

	v := startValkey(t)
	v.must(t, "ACL", "SETUSER", "default", "resetpass", ">your-valkey-password")
	namespace := newNamespace(t)
	d := deployment{namespace: namespace, name: "myservice", images: []string{publishedImage + ":dev"}}
	later := deployment{namespace: namespace, name: "later", images: []string{publishedImage + "/later:dev"}}
	createAll(t, []deployment{d, later})
	r := record(t, namespace)
	u := newUser(t)
	u.grant(t, []string{"get", "list", "watch", "patch"})
	common := append([]string{"VALKEY_ADDR=" + v.addr}, publishedCommon...)
	public, webOps, workerOps := mustPort(t), mustPort(t), mustPort(t)
	// Beyond that, what stands for the pod, the cluster and GitHub here.
	web := &program{url: fmt.Sprintf("http://127.0.0.1:%d", public), ops: fmt.Sprintf("http://127.0.0.1:%d", webOps)}
	web.process = launch(t, programPath, "web", slices.Concat(common, publishedWeb, []string{"DEV_MODE=true",
		fmt.Sprintf("WEB_LISTEN_ADDR=127.0.0.1:%d", public), fmt.Sprintf("OPS_LISTEN_ADDR=127.0.0.1:%d", webOps),
		"GITHUB_OIDC_ISSUER=" + github.URL, "SSL_CERT_FILE=" + testCA.file})...)
	worker := &program{ops: fmt.Sprintf("http://127.0.0.1:%d", workerOps)}
	worker.process = launch(t, programPath, "worker", append(common,
		fmt.Sprintf("OPS_LISTEN_ADDR=127.0.0.1:%d", workerOps), "KUBECONFIG="+u.kubeconfig(t, sharedAPI.url))...)
	web.waitReady(t, 30*time.Second)
	worker.waitReady(t, 30*time.Second)
	job := newClient(web.url)
	if a, err := job.send(t.Context(), http.MethodGet, "/healthz", "", ""); err != nil || a.status != http.StatusOK {
		t.Errorf("GET /healthz answers %d, %v", a.status, err)
	}

	claims := map[string]any{"repository": "UnitVectorY-Labs/myservice", "repository_owner": "UnitVectorY-Labs", "aud": "https://kuberollouttrigger.example.com"}
	post := func(changes map[string]any, body string) answer {
		t.Helper()
		a, err := job.post(t.Context(), github.mint(time.Now(), event{claims: claims}.to(changes).claims), body)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	restart := func(d deployment, body string) {
		t.Helper()
		_, at, err := post(nil, body).accepted()
		if err != nil {
			t.Fatal(err)
		}
		r.waitRestartedAt(t, 30*time.Second, d, stamp(at))
	}
	restart(d, publishedBody)
	v.must(t, "PUBLISH", channel, publishedBody)
	worker.waitLogged(t, 10*time.Second, "msg", "message ignored")
	r.mustNotChange(t, d, 300*time.Millisecond)
	restart(later, `{"image":"`+publishedImage+`/later","tags":["dev"]}`)
	for _, d := range []deployment{d, later} {
		if n := r.restarts(d); n != 1 {
			t.Errorf("%s was restarted %d times, want once: %s", d.name, n, describe(r.of(d)))
		}
	}

	// What differs.
	for name, c := range map[string]struct {
		changes map[string]any
		body    string
		status  int
	}{
		"owner":    {map[string]any{"repository": "evil/myservice", "repository_owner": "evil"}, publishedBody, 403},
		"event":    {map[string]any{"event_name": "pull_request_target"}, publishedBody, 403},
		"image":    {nil, `{"image":"ghcr.io/other/myservice","tags":["dev"]}`, 403},
		"prefix":   {nil, `{"image":"ghcr.io/unitvectory-labs-evil/myservice","tags":["dev"]}`, 403},
		"33 tags":  {nil, `{"image":"` + publishedImage + `","tags":[` + strings.Repeat(`"dev",`, 32) + `"dev"]}`, 400},
		"too long": {nil, publishedBody + strings.Repeat(" ", 16<<10), 413},
	} {
		if a := post(c.changes, c.body); a.status != c.status {
			t.Errorf("%s: answered %d %s, want %d", name, a.status, a.body, c.status)
		}
	}
	forger := fake.RSAKey(0)
	if _, key := github.Key(); forger == key {
		forger = fake.RSAKey(1)
	}
	forged := fake.Sign(forger, []byte(asJSON(github.Header())), []byte(asJSON(github.Claims(time.Now(), claims))))
	if a, err := job.post(t.Context(), forged, publishedBody); err != nil || a.status != http.StatusUnauthorized {
		t.Errorf("with DEV_MODE, a forged token is answered %d %s, %v", a.status, a.body, err)
	}
	for flag, known := range map[string]bool{"--listen-addr": false, "--valkey-tls": false, "--dev-mode": false, "--web-listen-addr": true, "--valkey-tls-enabled": true} {
		out, err := exec.CommandContext(t.Context(), programPath, "web", flag+"=x").CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || strings.Contains(string(out), "not defined") == known {
			t.Errorf("web %s: %v\n%s", flag, err, out)
		}
	}
}

// TestComingFromRights: applied over the published ones, the ClusterRole and its binding
// of k8s/ leave the old worker no rights.
func TestComingFromRights(t *testing.T) {
	t.Parallel()
	kubeconfig := user{name: "admin", token: adminToken}.kubeconfig(t, sharedAPI.url)
	const name = "kuberollouttrigger-worker"
	meta := map[string]any{"name": name}
	kubectlApply(t, kubeconfig, []map[string]any{
		{"apiVersion": rbacGroup.String(), "kind": "ClusterRole", "metadata": meta, "rules": []any{
			map[string]any{"apiGroups": []any{"apps"}, "resources": []any{"deployments"}, "verbs": []any{"get", "list", "watch", "patch"}}}},
		{"apiVersion": rbacGroup.String(), "kind": "ClusterRoleBinding", "metadata": meta,
			"roleRef":  map[string]any{"apiGroup": rbacGroup.Group, "kind": "ClusterRole", "name": name},
			"subjects": []any{map[string]any{"kind": "ServiceAccount", "name": name, "namespace": home}}},
	})
	cmd := exec.CommandContext(t.Context(), filepath.Join(sharedAPI.bin, "kubectl"), "apply", "-f", "../k8s/40-worker-cluster-role.yaml")
	cmd.Env = []string{"KUBECONFIG=" + kubeconfig, "HOME=" + t.TempDir()}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	binding, err := sharedAPI.admin.Resource(rbacGroup.WithResource("clusterrolebindings")).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	subjects, _, _ := unstructured.NestedSlice(binding.Object, "subjects")
	if want := []any{map[string]any{"kind": "ServiceAccount", "name": "worker", "namespace": home}}; asJSON(subjects) != asJSON(want) {
		t.Errorf("the binding is for %s", asJSON(subjects))
	}
}
