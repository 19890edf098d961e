package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// home is the namespace of the manifests.
const home = "kuberollouttrigger"

// cluster is an API server of a test's own, with RBAC and the admission plugins of
// a normal cluster.
type cluster struct{ *apiServer }

func startCluster(t testing.TB) cluster {
	t.Helper()
	// The same etcd, but other keys in it.
	api, err := startAPIServer(sharedAPI.bin, sharedEtcd, "--etcd-prefix=/"+strings.ToLower(t.Name()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.proc.kill)
	return cluster{api}
}

// apply is kubectl apply --server-side: a misspelt member is an error.
func (c cluster) apply(t testing.TB, namespace string, object *unstructured.Unstructured, dryRun bool) (*unstructured.Unstructured, error) {
	t.Helper()
	body, err := object.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	force := true
	options := metav1.PatchOptions{FieldManager: "kubectl", Force: &force, FieldValidation: metav1.FieldValidationStrict}
	if dryRun {
		options.DryRun = []string{metav1.DryRunAll}
	}
	if object.GetNamespace() != "" {
		namespace = object.GetNamespace()
	}
	return c.admin.Resource(resourceOf(object)).Namespace(namespace).Patch(t.Context(), object.GetName(), types.ApplyPatchType, body, options)
}

// mustApply applies all and returns the resourceVersions.
func (c cluster) mustApply(t testing.TB, namespace string, objects []*unstructured.Unstructured, dryRun bool) (versions []string) {
	t.Helper()
	for _, object := range objects {
		applied, err := c.apply(t, namespace, object, dryRun)
		if err != nil {
			t.Fatalf("applying %s %s: %v", object.GetKind(), object.GetName(), err)
		}
		version := applied.GetResourceVersion()
		if object.GetKind() == "PersistentVolumeClaim" {
			// The API server writes a new claim once more, as it is, when it is
			// applied again for the first time; the content is what counts.
			applied.SetResourceVersion("")
			version = asJSON(applied.Object)
		}
		versions = append(versions, object.GetKind()+" "+object.GetName()+" "+version)
	}
	return versions
}

// install applies k8s/.
func (c cluster) install(t testing.TB) []*unstructured.Unstructured {
	t.Helper()
	objects := readManifests(t, "../k8s/*.yaml")
	c.mustApply(t, "", objects, false)
	return objects
}

// worker is the worker's ServiceAccount with a token that the API server signed.
func (c cluster) worker(t testing.TB) user {
	t.Helper()
	request, err := c.admin.Resource(schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}).Namespace(home).Create(t.Context(),
		&unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": map[string]any{"name": "worker"}, "spec": map[string]any{},
		}}, metav1.CreateOptions{}, "token")
	if err != nil {
		t.Fatalf("asking for a token of the ServiceAccount: %v", err)
	}
	token, _, _ := unstructured.NestedString(request.Object, "status", "token")
	if token == "" {
		t.Fatalf("the answer to a TokenRequest has no token: %v", request.Object)
	}
	return user{name: "system:serviceaccount:" + home + ":worker", token: token}
}

func (c cluster) as(t testing.TB, u user) *dynamic.DynamicClient {
	t.Helper()
	client, err := dynamic.NewForConfig(c.config(u.token))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func (c cluster) namespace(t testing.TB, name string) {
	t.Helper()
	_, err := c.admin.Resource(namespacesResource).Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

func (c cluster) create(t testing.TB, d deployment) {
	t.Helper()
	if _, err := c.admin.Resource(deploymentsResource).Namespace(d.namespace).Create(t.Context(), &unstructured.Unstructured{Object: d.object()}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (c cluster) get(t testing.TB, d deployment) *unstructured.Unstructured {
	t.Helper()
	object, err := c.admin.Resource(deploymentsResource).Namespace(d.namespace).Get(t.Context(), d.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return object
}

// patch merges into a Deployment, or its status, as the administrator.
func (c cluster) patch(t testing.TB, d deployment, body string, subresource ...string) {
	t.Helper()
	if _, err := c.admin.Resource(deploymentsResource).Namespace(d.namespace).Patch(t.Context(), d.name, types.MergePatchType, []byte(body), metav1.PatchOptions{}, subresource...); err != nil {
		t.Error(err)
	}
}

// mustRestart pushes the image of a Deployment and waits for the restart.
func (c cluster) mustRestart(t testing.TB, job *client, d deployment) {
	t.Helper()
	want := stamp(job.mustPush(t, d.images[0]))
	eventually(t, 15*time.Second, d.key()+" is restarted", func() error {
		if got := restartedAt(c.get(t, d)); got != want {
			return fmt.Errorf("restartedAt is %q, want %s", got, want)
		}
		return nil
	})
}
