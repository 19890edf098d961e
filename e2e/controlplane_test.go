package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

// buildControlPlane returns the directory with the tools of controlplane/go.mod:
// etcd ("server", as Go names the binary), kube-apiserver, kube-controller-manager,
// kube-scheduler, kubectl and kwok. It builds them first if it must. The directory
// is named after what they are built from, so a new version is a new directory.
func buildControlPlane() (string, error) {
	cache := os.Getenv("E2E_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("no cache directory for the control plane, set E2E_CACHE: %w", err)
		}
		cache = filepath.Join(dir, "kuberollouttrigger-e2e")
	}
	version, err := exec.Command("go", "env", "GOVERSION").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOVERSION: %w", err)
	}
	hash := sha256.New()
	hash.Write(version)
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join("controlplane", name))
		if err != nil {
			return "", err
		}
		hash.Write(content)
	}
	bin := filepath.Join(cache, fmt.Sprintf("%x", hash.Sum(nil)[:6]))
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}

	fmt.Fprintf(os.Stderr, "e2e: building the control plane into %s; some ten minutes with a cold Go cache\n", bin)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	// Renamed when complete, so that neither an interrupted run nor two at the same
	// time leave half a directory.
	building, err := os.MkdirTemp(cache, "building-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(building)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", building+"/", "tool")
	cmd.Dir = "controlplane"
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the control plane: %w\n%s", err, out)
	}
	if err := os.Rename(building, bin); err != nil {
		if _, statErr := os.Stat(bin); statErr != nil {
			return "", err
		}
	}
	return bin, nil
}

// etcdServer is one etcd on loopback.
type etcdServer struct {
	url  string
	proc *process
}

func startEtcd(bin string) (*etcdServer, error) {
	client, err := freePort()
	if err != nil {
		return nil, err
	}
	peer, err := freePort()
	if err != nil {
		return nil, err
	}
	e := &etcdServer{url: fmt.Sprintf("http://127.0.0.1:%d", client)}
	peerURL := fmt.Sprintf("http://127.0.0.1:%d", peer)
	e.proc, err = startProcess("etcd", []string{"PATH=" + os.Getenv("PATH")}, filepath.Join(bin, "server"),
		"--data-dir", filepath.Join(tempRoot, "etcd"), "--log-level", "warn",
		"--listen-client-urls", e.url, "--advertise-client-urls", e.url,
		"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", "default="+peerURL,
		// Nothing here outlives the run. The product is measured with Valkey's fsync,
		// which should have the disk for itself.
		"--unsafe-no-fsync")
	if err != nil {
		return nil, err
	}
	err = poll(30*time.Second, func() error {
		if e.proc.exited() {
			return fmt.Errorf("it exited")
		}
		resp, err := http.Get(e.url + "/health")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/health answers %s", resp.Status)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("etcd is not healthy: %w\n%s", err, e.proc.stderr.tail(30))
	}
	return e, nil
}

const (
	adminToken  = "admin-token"
	workerUsers = 2000 // some 40 a run, and -count runs it again
)

// apiServer is a kube-apiserver with RBAC. Several on one etcd serve the same
// objects, as the API servers of a real control plane do.
type apiServer struct {
	bin   string
	etcd  *etcdServer
	dir   string
	args  []string // beyond those that all have
	port  int
	url   string
	proc  *process
	admin *dynamic.DynamicClient
}

// withoutServiceAccounts: without a controller manager no namespace gets its
// default ServiceAccount, and this admission plugin would wait for it.
const withoutServiceAccounts = "--disable-admission-plugins=ServiceAccount"

func startAPIServer(bin string, etcd *etcdServer, args ...string) (*apiServer, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(tempRoot, "apiserver-")
	if err != nil {
		return nil, err
	}
	a := &apiServer{bin: bin, etcd: etcd, dir: dir, args: args, port: port, url: fmt.Sprintf("https://127.0.0.1:%d", port)}

	_, certPEM, keyPEM, err := testCA.serverCert()
	if err != nil {
		return nil, err
	}
	serviceAccountKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	var tokens bytes.Buffer
	fmt.Fprintf(&tokens, "%s,admin,admin,\"system:masters\"\n", adminToken)
	for i := range workerUsers {
		fmt.Fprintf(&tokens, "%s,%s,%[2]s\n", workerUser(i).token, workerUser(i).name)
	}
	for name, content := range map[string][]byte{
		"tls.crt":    certPEM,
		"tls.key":    keyPEM,
		"sa.key":     pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(serviceAccountKey)}),
		"tokens.csv": tokens.Bytes(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return nil, err
		}
	}
	a.admin, err = dynamic.NewForConfig(a.config(adminToken))
	if err != nil {
		return nil, err
	}
	return a, a.start()
}

// config has no client-side rate limit: the harness must not be what is slow.
func (a *apiServer) config(token string) *rest.Config {
	return &rest.Config{Host: a.url, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAData: testCA.pem}, QPS: -1}
}

// start starts the server, again on the same port after a kill, and waits until
// it is ready.
func (a *apiServer) start() (err error) {
	file := func(name string) string { return filepath.Join(a.dir, name) }
	a.proc, err = startProcess("kube-apiserver", []string{"PATH=" + os.Getenv("PATH")}, filepath.Join(a.bin, "kube-apiserver"), append([]string{
		"--etcd-servers", a.etcd.url,
		"--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--secure-port", fmt.Sprint(a.port),
		// Nobody uses the service "kubernetes" here, and it cannot have a
		// loopback address as an endpoint.
		"--endpoint-reconciler-type", "none",
		"--tls-cert-file", file("tls.crt"), "--tls-private-key-file", file("tls.key"), "--cert-dir", a.dir,
		"--service-account-key-file", file("sa.key"), "--service-account-signing-key-file", file("sa.key"),
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--token-auth-file", file("tokens.csv"), "--authorization-mode", "RBAC",
		"--service-cluster-ip-range", "10.0.0.0/24",
		"--profiling=false"}, a.args...)...)
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: testCA.pool()}, DisableKeepAlives: true}}
	err = poll(60*time.Second, func() error {
		if a.proc.exited() {
			return fmt.Errorf("it exited: %s", a.proc.cmd.ProcessState)
		}
		req, err := http.NewRequest(http.MethodGet, a.url+"/readyz", nil)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+adminToken)
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz answers %s", resp.Status)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("kube-apiserver is not ready: %w\n%s", err, a.proc.stderr.tail(30))
	}
	return nil
}

// user may do in the cluster what a test grants.
type user struct{ name, token string }

func workerUser(i int) user {
	return user{name: fmt.Sprintf("worker-%02d", i), token: fmt.Sprintf("worker-token-%02d", i)}
}

var usersTaken atomic.Int64

// newUser is a user no other test has, with no rights at all.
func newUser(t testing.TB) user {
	t.Helper()
	i := usersTaken.Add(1) - 1
	if i >= workerUsers {
		t.Fatalf("all %d users are taken: raise workerUsers", workerUsers)
	}
	return workerUser(int(i))
}

var (
	deploymentsResource = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}
	namespacesResource  = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	rbacGroup           = schema.GroupVersion{Group: "rbac.authorization.k8s.io", Version: "v1"}
	reviewsResource     = schema.GroupVersionResource{Group: "authorization.k8s.io", Version: "v1", Resource: "subjectaccessreviews"}
)

// workerVerbs is all a worker may need on Deployments.
var workerVerbs = []string{"list", "watch", "patch"}

// grant gives the user verbs on Deployments: in the namespaces named, by a Role
// in each, or in all of them by a ClusterRole if none is.
func (u user) grant(t testing.TB, verbs []string, namespaces ...string) {
	t.Helper()
	rules := []any{map[string]any{"apiGroups": []any{"apps"}, "resources": []any{"deployments"}, "verbs": toAny(verbs)}}
	subjects := []any{map[string]any{"kind": "User", "name": u.name, "apiGroup": rbacGroup.Group}}
	// Named after what it allows too: a test may grant more later.
	name := u.name + "-" + strings.Join(verbs, "-")
	role, scopes := "Role", namespaces
	if len(namespaces) == 0 {
		role, scopes = "ClusterRole", []string{""}
	}
	for _, namespace := range scopes {
		create(t, rbacGroup.WithResource(strings.ToLower(role)+"s"), namespace, map[string]any{
			"apiVersion": rbacGroup.String(), "kind": role, "metadata": map[string]any{"name": name}, "rules": rules})
		create(t, rbacGroup.WithResource(strings.ToLower(role)+"bindings"), namespace, map[string]any{
			"apiVersion": rbacGroup.String(), "kind": role + "Binding", "metadata": map[string]any{"name": name},
			"roleRef":  map[string]any{"kind": role, "name": name, "apiGroup": rbacGroup.Group},
			"subjects": subjects})
		// The authorizer learns of a binding through a watch of its own.
		for _, verb := range verbs {
			eventually(t, 10*time.Second, fmt.Sprintf("%s may %s deployments in %q", u.name, verb, namespace), func() error {
				review, err := sharedAPI.admin.Resource(reviewsResource).Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
					"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
					"spec": map[string]any{"user": u.name, "resourceAttributes": map[string]any{
						"group": "apps", "resource": "deployments", "verb": verb, "namespace": namespace}},
				}}, metav1.CreateOptions{})
				if err != nil {
					return err
				}
				if allowed, _, _ := unstructured.NestedBool(review.Object, "status", "allowed"); !allowed {
					return fmt.Errorf("not yet")
				}
				return nil
			})
		}
	}
}

// newWorkerUser is a user who may do what a worker needs, and no more.
func newWorkerUser(t testing.TB, namespaces ...string) user {
	t.Helper()
	u := newUser(t)
	u.grant(t, workerVerbs, namespaces...)
	return u
}

// kubeconfig writes one for the user and returns its path. The server may be a
// proxy before the API server.
func (u user) kubeconfig(t testing.TB, server string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := u.writeKubeconfig(path, server); err != nil {
		t.Fatal(err)
	}
	return path
}

func (u user) writeKubeconfig(path, server string) error {
	// JSON is YAML.
	config, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "e2e",
		"clusters": []any{map[string]any{"name": "e2e", "cluster": map[string]any{"server": server, "certificate-authority-data": testCA.pem}}},
		"users":    []any{map[string]any{"name": u.name, "user": map[string]any{"token": u.token}}},
		"contexts": []any{map[string]any{"name": "e2e", "context": map[string]any{"cluster": "e2e", "user": u.name}}},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(path, config, 0o600)
}

// create creates an object as the administrator.
func create(t testing.TB, resource schema.GroupVersionResource, namespace string, object map[string]any) *unstructured.Unstructured {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	made, err := sharedAPI.admin.Resource(resource).Namespace(namespace).Create(ctx, &unstructured.Unstructured{Object: object},
		metav1.CreateOptions{FieldManager: "e2e"})
	if err != nil {
		t.Fatalf("creating %s in %q: %v", resource.Resource, namespace, err)
	}
	return made
}

func toAny(list []string) []any {
	var out []any
	for _, s := range list {
		out = append(out, s)
	}
	return out
}
