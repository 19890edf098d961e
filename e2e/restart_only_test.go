package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// awaitPolicy waits until the API server enforces the policy, which reaches it
// through a watch of its own. A dry run goes through admission too.
func (c cluster) awaitPolicy(t testing.TB, client dynamic.Interface, d deployment) {
	t.Helper()
	eventually(t, 30*time.Second, "the policy is enforced", func() error {
		_, err := client.Resource(deploymentsResource).Namespace(d.namespace).Patch(t.Context(), d.name, types.MergePatchType,
			[]byte(`{"metadata":{"labels":{"policy":"awaited"}}}`), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		if by, _ := refusedBy(err); by != policyRefused {
			return fmt.Errorf("a label was not refused by it: %v", err)
		}
		return nil
	})
}

const (
	rbacRefused   = "RBAC, 403"
	policyRefused = "the policy, 422"
)

// refusedBy says who refused, from the API server's status code and message.
func refusedBy(err error) (by string, code int32) {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return fmt.Sprintf("nobody: %v", err), 0
	}
	code = status.Status().Code
	switch message := status.Status().Message; {
	case code == http.StatusForbidden && strings.Contains(message, `User "system:serviceaccount:kuberollouttrigger:worker" cannot `):
		return rbacRefused, code
	case code == http.StatusUnprocessableEntity && strings.Contains(message, "ValidatingAdmissionPolicy 'kuberollouttrigger-worker'") && strings.Contains(message, "denied request: worker may "):
		return policyRefused, code
	}
	return fmt.Sprintf("something else: %v", err), code
}

// TestRestartOnly: with its ServiceAccount the worker restarts Deployments, and its
// token allows nothing else.
func TestRestartOnly(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	account := c.worker(t)
	client := c.as(t, account)
	c.namespace(t, "shop")
	d := deployment{namespace: "shop", name: "api", images: []string{newImage()}, labels: map[string]string{"team": "a"}, restartedAt: "2026-01-01T00:00:00Z"}
	c.create(t, d)
	// A very large Deployment: the policy's expressions have a budget, and must not
	// exceed it.
	large := deployment{namespace: "shop", name: "large", images: newImages(40)}
	object := &unstructured.Unstructured{Object: large.object()}
	containers, _, _ := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "containers")
	for _, container := range containers {
		var env []any
		for i := range 250 {
			env = append(env, map[string]any{"name": fmt.Sprintf("VARIABLE_%d", i), "value": strings.Repeat("x", 50)})
		}
		container.(map[string]any)["env"] = env
	}
	annotations := map[string]any{}
	for i := range 1000 {
		annotations[fmt.Sprintf("example.com/annotation-%d", i)] = strings.Repeat("x", 100)
	}
	if err := errors.Join(
		unstructured.SetNestedSlice(object.Object, containers, "spec", "template", "spec", "containers"),
		unstructured.SetNestedMap(object.Object, annotations, "spec", "template", "metadata", "annotations"),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.Resource(deploymentsResource).Namespace("shop").Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.awaitPolicy(t, client, d)

	valkey := startValkey(t)
	job := newClient(startWeb(t, valkey.addr).url)
	startWorker(t, valkey.addr, account.kubeconfig(t, c.url))
	c.mustRestart(t, job, d)
	c.mustRestart(t, job, d)
	c.mustRestart(t, job, large)

	before := asJSON(c.get(t, d).Object)
	shop := client.Resource(deploymentsResource).Namespace("shop")
	patch := func(kind types.PatchType, body string, subresources ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := shop.Patch(ctx, d.name, kind, []byte(body), metav1.PatchOptions{FieldManager: fieldManager}, subresources...)
			return err
		}
	}
	merge := func(body string, subresources ...string) func(context.Context) error {
		return patch(types.MergePatchType, body, subresources...)
	}
	restart := func(more string) func(context.Context) error {
		return merge(`{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-11-21T02:00:00.123456Z"` + more)
	}
	at := func(value string, options ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			body := fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{%q:%q}}}}}`, restartedAtKey, value)
			_, err := shop.Patch(ctx, d.name, types.MergePatchType, body, metav1.PatchOptions{FieldManager: fieldManager, DryRun: options})
			return err
		}
	}
	core := func(resource string) schema.GroupVersionResource {
		return schema.GroupVersionResource{Version: "v1", Resource: resource}
	}
	get := func(resource schema.GroupVersionResource, namespace, name string, subresources ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := client.Resource(resource).Namespace(namespace).Get(ctx, name, metav1.GetOptions{}, subresources...)
			return err
		}
	}
	list := func(resource schema.GroupVersionResource, namespace string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := client.Resource(resource).Namespace(namespace).List(ctx, metav1.ListOptions{})
			return err
		}
	}
	send := func(resource schema.GroupVersionResource, namespace string, object map[string]any, subresources ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := client.Resource(resource).Namespace(namespace).Create(ctx, &unstructured.Unstructured{Object: object}, metav1.CreateOptions{}, subresources...)
			return err
		}
	}
	patchOther := func(resource schema.GroupVersionResource, namespace, name, body string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := client.Resource(resource).Namespace(namespace).Patch(ctx, name, types.MergePatchType, []byte(body), metav1.PatchOptions{})
			return err
		}
	}
	admission := schema.GroupVersion{Group: "admissionregistration.k8s.io", Version: "v1"}
	metadata := func(name string) map[string]any { return map[string]any{"name": name} }
	type attempt struct {
		what string
		by   string
		do   func(context.Context) error
	}
	attempts := []attempt{
		{"the image", policyRefused, merge(`{"spec":{"template":{"spec":{"containers":[{"name":"main-0","image":"ghcr.io/evil/api:dev"}]}}}}`)},
		{"the image, strategic merge patch", policyRefused, patch(types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"containers":[{"name":"main-0","image":"ghcr.io/evil/api:dev"}]}}}}`)},
		{"the image, JSON patch", policyRefused, patch(types.JSONPatchType, `[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"ghcr.io/evil/api:dev"}]`)},
		{"the image along with the restart", policyRefused, restart(`}},"spec":{"containers":[{"name":"main-0","image":"ghcr.io/evil/api:dev"}]}}}}`)},
		{"another container", policyRefused, patch(types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"containers":[{"name":"evil","image":"ghcr.io/evil/api:dev"}]}}}}`)},
		{"a command", policyRefused, patch(types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"containers":[{"name":"main-0","command":["sh"]}]}}}}`)},
		{"an environment variable", policyRefused, patch(types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"containers":[{"name":"main-0","env":[{"name":"A","value":"b"}]}]}}}}`)},
		{"a volume of a Secret", policyRefused, patch(types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"volumes":[{"name":"s","secret":{"secretName":"valkey"}}]}}}}`)},
		{"hostNetwork", policyRefused, merge(`{"spec":{"template":{"spec":{"hostNetwork":true}}}}`)},
		{"serviceAccountName", policyRefused, merge(`{"spec":{"template":{"spec":{"serviceAccountName":"admin"}}}}`)},
		{"nodeName", policyRefused, merge(`{"spec":{"template":{"spec":{"nodeName":"node-1"}}}}`)},
		{"a security context", policyRefused, merge(`{"spec":{"template":{"spec":{"securityContext":{"runAsUser":0}}}}}`)},
		{"replicas", policyRefused, merge(`{"spec":{"replicas":0}}`)},
		{"paused", policyRefused, merge(`{"spec":{"paused":true}}`)},
		{"the strategy", policyRefused, merge(`{"spec":{"strategy":{"type":"Recreate","rollingUpdate":null}}}`)},
		{"minReadySeconds", policyRefused, merge(`{"spec":{"minReadySeconds":60}}`)},
		{"revisionHistoryLimit", policyRefused, merge(`{"spec":{"revisionHistoryLimit":0}}`)},
		{"progressDeadlineSeconds", policyRefused, merge(`{"spec":{"progressDeadlineSeconds":1}}`)},
		{"a label", policyRefused, merge(`{"metadata":{"labels":{"team":"b"}}}`)},
		{"a label taken away", policyRefused, merge(`{"metadata":{"labels":null}}`)},
		{"an annotation of the Deployment", policyRefused, merge(`{"metadata":{"annotations":{"a":"b"}}}`)},
		{"restartedAt of the Deployment instead of the pods", policyRefused, merge(`{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-11-21T02:00:00.123456Z"}}}`)},
		{"a finalizer", policyRefused, merge(`{"metadata":{"finalizers":["example.com/keep"]}}`)},
		{"an owner reference", policyRefused, merge(`{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"ConfigMap","name":"a","uid":"a"}]}}`)},
		{"a label of the pods", policyRefused, merge(`{"spec":{"template":{"metadata":{"labels":{"a":"b"}}}}}`)},
		{"a finalizer of the pods", policyRefused, merge(`{"spec":{"template":{"metadata":{"finalizers":["example.com/keep"]}}}}`)},
		{"another annotation of the pods", policyRefused, merge(`{"spec":{"template":{"metadata":{"annotations":{"a":"b"}}}}}`)},
		{"another annotation along with the restart", policyRefused, restart(`,"a":"b"}}}}}`)},
		{"restartedAt taken away", policyRefused, merge(`{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":null}}}}}`)},
		{"all annotations taken away", policyRefused, merge(`{"spec":{"template":{"metadata":{"annotations":null}}}}`)},
		{"restartedAt that is no time", policyRefused, merge(`{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"anything"}}}}}`)},
		{"restartedAt that is no time of a day", policyRefused, at("2026-11-21T24:00:00.123456Z")},
		{"restartedAt in no month", policyRefused, at("9999-99-99T99:99:99.999999Z")},
		{"restartedAt on February 29 of a short year", policyRefused, at("2026-02-29T02:00:00.123456Z")},
		{"restartedAt on February 29 of 2100", policyRefused, at("2100-02-29T02:00:00.123456Z")},
		{"restartedAt on April 31", policyRefused, at("2026-04-31T02:00:00.123456Z")},
		{"server-side apply of an image", policyRefused, func(ctx context.Context) error {
			_, err := shop.Apply(ctx, d.name, &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(d.name),
				"spec": map[string]any{"template": map[string]any{"spec": map[string]any{"containers": []any{map[string]any{"name": "main-0", "image": "ghcr.io/evil/api:dev"}}}}}}},
				metav1.ApplyOptions{FieldManager: "evil", Force: true})
			return err
		}},

		{"scale", rbacRefused, merge(`{"spec":{"replicas":0}}`, "scale")},
		{"status", rbacRefused, merge(`{"status":{"replicas":7}}`, "status")},
		{"get", rbacRefused, get(deploymentsResource, "shop", d.name)},
		{"update", rbacRefused, func(ctx context.Context) error {
			_, err := shop.Update(ctx, c.get(t, d), metav1.UpdateOptions{})
			return err
		}},
		{"delete", rbacRefused, func(ctx context.Context) error { return shop.Delete(ctx, d.name, metav1.DeleteOptions{}) }},
		{"delete all", rbacRefused, func(ctx context.Context) error {
			return shop.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
		}},
		{"create", rbacRefused, send(deploymentsResource, "shop", deployment{namespace: "shop", name: "evil", images: []string{"ghcr.io/evil/api:dev"}}.object())},
		{"create by server-side apply", rbacRefused, func(ctx context.Context) error {
			_, err := shop.Apply(ctx, "evil", &unstructured.Unstructured{Object: deployment{namespace: "shop", name: "evil", images: []string{"ghcr.io/evil/api:dev"}}.object()},
				metav1.ApplyOptions{FieldManager: "evil", Force: true})
			return err
		}},
		{"a StatefulSet", rbacRefused, patchOther(deploymentsResource.GroupVersion().WithResource("statefulsets"), home, "valkey", `{"spec":{"replicas":0}}`)},
		{"DaemonSets", rbacRefused, list(deploymentsResource.GroupVersion().WithResource("daemonsets"), "shop")},
		{"ReplicaSets", rbacRefused, list(deploymentsResource.GroupVersion().WithResource("replicasets"), "shop")},
		{"list pods", rbacRefused, list(core("pods"), "shop")},
		{"create a pod", rbacRefused, send(core("pods"), "shop", map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": metadata("evil")})},
		{"read a Secret", rbacRefused, get(core("secrets"), home, "valkey")},
		{"list Secrets", rbacRefused, list(core("secrets"), "")},
		{"read a ConfigMap", rbacRefused, get(core("configmaps"), home, "web")},
		{"change a ConfigMap", rbacRefused, patchOther(core("configmaps"), home, "web", `{"data":{"GITHUB_ALLOWED_ORG":"evil"}}`)},
		{"list Nodes", rbacRefused, list(core("nodes"), "")},
		{"list Namespaces", rbacRefused, list(namespacesResource, "")},
		{"a token of another ServiceAccount", rbacRefused, send(core("serviceaccounts"), home,
			map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": metadata("web"), "spec": map[string]any{}}, "token")},
		{"a ClusterRoleBinding", rbacRefused, send(rbacGroup.WithResource("clusterrolebindings"), "", map[string]any{
			"apiVersion": rbacGroup.String(), "kind": "ClusterRoleBinding", "metadata": metadata("evil"), "roleRef": map[string]any{"apiGroup": rbacGroup.Group, "kind": "ClusterRole", "name": "cluster-admin"}})},
		{"its own ClusterRole", rbacRefused, patchOther(rbacGroup.WithResource("clusterroles"), "", "kuberollouttrigger-worker", `{"rules":null}`)},
		{"the policy", rbacRefused, patchOther(admission.WithResource("validatingadmissionpolicies"), "", "kuberollouttrigger-worker", `{"spec":{"failurePolicy":"Ignore"}}`)},
		{"the policy's binding", rbacRefused, func(ctx context.Context) error {
			return client.Resource(admission.WithResource("validatingadmissionpolicybindings")).Delete(ctx, "kuberollouttrigger-worker", metav1.DeleteOptions{})
		}},
	}
	count := map[string]int{}
	try := func(attempts []attempt) {
		t.Helper()
		for _, a := range attempts {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			err := a.do(ctx)
			cancel()
			if by, _ := refusedBy(err); by != a.by {
				t.Errorf("%s: refused by %s; want %s", a.what, by, a.by)
			} else if strings.Contains(err.Error(), "managedFields") {
				t.Errorf("%s: refused only because the worker would own it: %v", a.what, err)
			} else {
				count[a.by]++
			}
		}
	}
	try(attempts)
	if after := asJSON(c.get(t, d).Object); after != before {
		t.Errorf("the Deployment was changed:\nbefore %s\nafter  %s", before, after)
	}

	for _, date := range []string{"2028-02-29", "2000-02-29", "2026-01-01", "2026-04-30", "2026-12-31", "1970-01-01"} {
		if err := at(date+"T23:59:59.999999Z", metav1.DryRunAll)(t.Context()); err != nil {
			t.Errorf("restartedAt on %s: %v", date, err)
		}
	}

	// The policy still holds if somebody grants the worker too much by mistake.
	if _, err := c.admin.Resource(rbacGroup.WithResource("clusterrolebindings")).Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": rbacGroup.String(), "kind": "ClusterRoleBinding", "metadata": metadata("mistake"),
		"roleRef":  map[string]any{"kind": "ClusterRole", "name": "cluster-admin", "apiGroup": rbacGroup.Group},
		"subjects": []any{map[string]any{"kind": "ServiceAccount", "name": "worker", "namespace": home}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the mistake is effective", func() error { return get(deploymentsResource, "shop", d.name)(t.Context()) })
	before = asJSON(c.get(t, d).Object)
	mistaken := []string{"scale", "status", "update", "delete", "delete all", "create", "create by server-side apply"}
	attempts = slices.DeleteFunc(attempts, func(a attempt) bool { return !slices.Contains(mistaken, a.what) && a.by != policyRefused })
	for i, a := range attempts {
		if a.by == rbacRefused {
			attempts[i].by = policyRefused
		}
		if a.what == "update" {
			attempts[i].do = func(ctx context.Context) error {
				object := c.get(t, d)
				if err := unstructured.SetNestedField(object.Object, int64(0), "spec", "replicas"); err != nil {
					return err
				}
				_, err := shop.Update(ctx, object, metav1.UpdateOptions{})
				return err
			}
		}
	}
	try(attempts)
	if after := asJSON(c.get(t, d).Object); after != before {
		t.Errorf("the Deployment was changed:\nbefore %s\nafter  %s", before, after)
	}

	// The policy limits nobody else.
	c.patch(t, d, `{"spec":{"replicas":3}}`)
	fmt.Printf("%s: the restart passes; %d changes refused by RBAC, %d by the policy (cluster-admin by mistake included)\n", t.Name(), count[rbacRefused], count[policyRefused])
}

// TestRestartOnlyNamespaced: with the Role of k8s/namespaced/ instead of the
// ClusterRole, the worker restarts there and cannot read other namespaces.
func TestRestartOnlyNamespaced(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	objects := readManifests(t, "../k8s/*.yaml")
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool { return strings.HasPrefix(o.GetKind(), "ClusterRole") })
	c.mustApply(t, "", objects, false)
	image := newImage()
	inside := deployment{namespace: "shop", name: "api", images: []string{image}}
	outside := deployment{namespace: "other", name: "api", images: []string{image}}
	for _, d := range []deployment{inside, outside} {
		c.namespace(t, d.namespace)
		c.create(t, d)
	}
	c.mustApply(t, "shop", readManifests(t, "../k8s/namespaced/*.yaml"), false)
	account := c.worker(t)
	client := c.as(t, account)
	c.awaitPolicy(t, client, inside)

	valkey := startValkey(t)
	job := newClient(startWeb(t, valkey.addr).url)
	startWorker(t, valkey.addr, account.kubeconfig(t, c.url), "WORKER_NAMESPACES=shop")
	c.mustRestart(t, job, inside)
	if at := restartedAt(c.get(t, outside)); at != "" {
		t.Errorf("a Deployment outside was restarted at %s", at)
	}
	// A worker that watches all namespaces exits, because it lacks the right.
	all := launchWorker(t, programPath, valkey.addr, account.kubeconfig(t, c.url))
	all.waitLogged(t, 20*time.Second, "msg", "exiting")

	for _, try := range []struct {
		d        deployment
		body, by string
	}{
		{inside, `{"spec":{"replicas":0}}`, policyRefused},
		{inside, `{"spec":{"template":{"metadata":{"annotations":null}}}}`, policyRefused},
		{outside, `{"spec":{"replicas":0}}`, rbacRefused},
		{outside, `{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-11-21T02:00:00.123456Z"}}}}}`, rbacRefused},
	} {
		_, err := client.Resource(deploymentsResource).Namespace(try.d.namespace).Patch(t.Context(), try.d.name, types.MergePatchType, []byte(try.body), metav1.PatchOptions{})
		if by, _ := refusedBy(err); by != try.by {
			t.Errorf("%s in %s: refused by %s, want %s", try.body, try.d.namespace, by, try.by)
		}
	}
}
