package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// argoRollouts is the last version that this Go can load.
const argoRollouts = "github.com/argoproj/argo-rollouts@v1.9.0"

var kindResources = map[string]schema.GroupVersionResource{
	"Deployment":  deploymentsResource,
	"StatefulSet": deploymentsResource.GroupVersion().WithResource("statefulsets"),
	"DaemonSet":   deploymentsResource.GroupVersion().WithResource("daemonsets"),
	"Rollout":     {Group: "argoproj.io", Version: "v1alpha1", Resource: "rollouts"},
}

const allKinds = "WORKER_KINDS=deployments.apps, statefulsets.apps,daemonsets.apps,rollouts.argoproj.io"

// workload is an object of any kind that runs an image.
type workload struct {
	kind, namespace, name, image string
	spec                         map[string]any // more of it
}

func (w workload) object() *unstructured.Unstructured {
	labels := map[string]any{"app": w.name}
	spec := map[string]any{
		"selector": map[string]any{"matchLabels": labels},
		"template": map[string]any{"metadata": map[string]any{"labels": labels}, "spec": map[string]any{
			"nodeSelector": map[string]any{w.namespace: "true"}, // see rolloutCluster.allow
			"containers":   []any{map[string]any{"name": "main", "image": w.image, "imagePullPolicy": "Always"}},
		}},
	}
	switch w.kind {
	case "StatefulSet":
		spec["serviceName"], spec["replicas"] = w.name, int64(2)
	case "Rollout":
		spec["strategy"] = map[string]any{"canary": map[string]any{}}
	}
	maps.Copy(spec, w.spec)
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": kindResources[w.kind].GroupVersion().String(), "kind": w.kind,
		"metadata": map[string]any{"namespace": w.namespace, "name": w.name, "annotations": map[string]any{"owner": "shop"}}, "spec": spec,
	}}
}

// make creates a workload.
func (c cluster) make(t testing.TB, w workload) {
	t.Helper()
	if _, err := c.admin.Resource(kindResources[w.kind]).Namespace(w.namespace).Create(t.Context(), w.object(), metav1.CreateOptions{}); err != nil {
		t.Fatalf("creating %s %s: %v", w.kind, w.name, err)
	}
}

func (c cluster) read(t testing.TB, w workload) *unstructured.Unstructured {
	t.Helper()
	object, err := c.admin.Resource(kindResources[w.kind]).Namespace(w.namespace).Get(t.Context(), w.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return object
}

// restartOf is the value of the field that a restart sets.
func restartOf(object *unstructured.Unstructured) string {
	if object.GetKind() == "Rollout" {
		at, _, _ := unstructured.NestedString(object.Object, "spec", "restartAt")
		return at
	}
	return restartedAt(object)
}

// restartFor is what a request of T sets: a Rollout has whole seconds, rounded up.
func restartFor(kind string, at int64) string {
	if second := time.Second.Microseconds(); kind == "Rollout" {
		at = (at + second - 1) / second * second
	}
	return stamp(at)
}

// withoutRestart is an object without what a restart changes.
func withoutRestart(object *unstructured.Unstructured) string {
	object = object.DeepCopy()
	for _, path := range [][]string{
		{"status"}, {"metadata", "generation"}, {"metadata", "resourceVersion"}, {"metadata", "managedFields"}, {"metadata", "annotations"},
		{"spec", "restartAt"}, {"spec", "template", "metadata", "annotations", restartedAtKey},
	} {
		unstructured.RemoveNestedField(object.Object, path...)
	}
	if annotations, _, _ := unstructured.NestedMap(object.Object, "spec", "template", "metadata", "annotations"); len(annotations) == 0 {
		unstructured.RemoveNestedField(object.Object, "spec", "template", "metadata", "annotations")
	}
	return asJSON(object.Object)
}

// grantKinds applies what the worker needs for all kinds, and the policy.
func (c cluster) grantKinds(t testing.TB) {
	t.Helper()
	c.installDefinition(t, argoRollouts, "manifests/crds/rollout-crd.yaml", kindResources["Rollout"])
	c.mustApply(t, "", slices.DeleteFunc(readManifests(t, "../k8s/*.yaml"), func(object *unstructured.Unstructured) bool {
		return object.GetKind() != "Namespace" && !strings.HasPrefix(object.GetKind(), "ValidatingAdmissionPolicy")
	}), false)
	for _, kind := range []string{"statefulsets", "daemonsets", "rollouts"} {
		c.mustApply(t, "", readManifests(t, "../k8s/optional/worker-"+kind+".yaml"), false)
	}
}

// rolledOut plays the controller of Argo Rollouts for a Rollout that was restarted. It
// writes times in whole seconds.
func (c cluster) rolledOut(t testing.TB, w workload) {
	t.Helper()
	object := c.read(t, w)
	at, err := time.Parse(time.RFC3339, restartOf(object))
	if err != nil {
		t.Fatal(err)
	}
	body := fmt.Sprintf(`{"status":{"phase":"Healthy","observedGeneration":"%d","restartedAt":%q}}`, object.GetGeneration(), at.UTC().Format(time.RFC3339))
	if _, err := c.admin.Resource(kindResources[w.kind]).Namespace(w.namespace).Patch(t.Context(), w.name, types.MergePatchType, []byte(body), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
}

// mustRestartKind waits until a workload has the restart for T, and nothing else.
func (c cluster) mustRestartKind(t testing.TB, w workload, before *unstructured.Unstructured, at int64) {
	t.Helper()
	eventually(t, rolloutTime, w.kind+" is restarted", func() error {
		if got := restartOf(c.read(t, w)); got != restartFor(w.kind, at) {
			return fmt.Errorf("it has %q, want %q", got, restartFor(w.kind, at))
		}
		return nil
	})
	after := c.read(t, w)
	if after.GetGeneration() != before.GetGeneration()+1 {
		t.Errorf("%s: one request has changed the generation from %d to %d", w.kind, before.GetGeneration(), after.GetGeneration())
	}
	if b, a := withoutRestart(before), withoutRestart(after); a != b {
		t.Errorf("%s: the restart has changed more:\nbefore %s\nafter  %s", w.kind, b, a)
	}
}

// TestKinds: in a cluster where rollouts happen, each kind restarts once for a request
// and is reported complete.
func TestKinds(t *testing.T) {
	t.Parallel()
	g := newRolloutRig(t, takeRolloutCluster(t, 0))
	g.grantKinds(t)
	namespace, image := g.newNamespace(t), newImage()
	var all []workload
	for _, kind := range slices.Sorted(maps.Keys(kindResources)) {
		w := workload{kind: kind, namespace: namespace, name: strings.ToLower(kind), image: image}
		g.make(t, w)
		all = append(all, w)
	}
	eventually(t, 20*time.Second, "RBAC allows all kinds", func() error {
		return g.mayList(t, g.worker)
	})
	worker := g.startWorker(t, g.valkey, "default", allKinds, "WORKER_RESTART_INTERVAL=0", "WORKER_NAMESPACES="+namespace)
	for round := range 2 {
		before := map[string]*unstructured.Unstructured{}
		for _, w := range all {
			before[w.kind] = g.read(t, w)
		}
		at, f := g.push(t, image)
		for _, w := range all {
			g.mustRestartKind(t, w, before[w.kind], at)
		}
		f.waitFor(t, rolloutTime, "complete but for the Rollout", func(r rollout) bool {
			return r.State == "progressing" && r.Images[0].Clusters["default"].Complete == 3
		})
		g.rolledOut(t, all[slices.IndexFunc(all, func(w workload) bool { return w.kind == "Rollout" })])
		done := f.wait(t, rolloutTime, "complete").Images[0].Clusters["default"].report
		want := report{Matched: 4, Kinds: map[string]int{"DaemonSet": 1, "Deployment": 1, "Rollout": 1, "StatefulSet": 1}, Restarted: 4, Complete: 4, ChangedAt: done.ChangedAt}
		if !reflect.DeepEqual(done, want) {
			t.Errorf("complete with %s, want %s", asJSON(done), asJSON(want))
		}
		for _, w := range all {
			if got := worker.scrape(t).value(t, fmt.Sprintf("restarts_total{kind=%q}", w.kind)); got != float64(round+1) {
				t.Errorf("restarts_total of %s is %v after %d requests", w.kind, got, round+1)
			}
			if n := len(worker.logged(t, "msg", "restarted", strings.ToLower(w.kind), w.name)); n != round+1 {
				t.Errorf("the log has %d restarts of %s after %d requests", n, w.kind, round+1)
			}
		}
		for _, w := range all { // its pods as well
			if g.read(t, w).GetGeneration() != before[w.kind].GetGeneration()+1 {
				t.Errorf("%s has changed once more", w.kind)
			}
		}
	}
	t.Run("OnDelete", func(t *testing.T) { testOnDelete(t, g, worker, namespace) })
	t.Run("partition", func(t *testing.T) { testPartition(t, g, namespace) })
	t.Run("held", func(t *testing.T) { testHeld(t, g, namespace) })
}

// mayList is nil when the ServiceAccount may list all kinds.
func (c cluster) mayList(t testing.TB, account func(testing.TB) user) error {
	t.Helper()
	c.mustApply(t, "", slices.DeleteFunc(readManifests(t, "../k8s/*.yaml"), func(object *unstructured.Unstructured) bool {
		return !slices.Contains([]string{"ServiceAccount", "ClusterRole", "ClusterRoleBinding"}, object.GetKind())
	}), false)
	client := c.as(t, account(t))
	for _, resource := range kindResources {
		if _, err := client.Resource(resource).List(t.Context(), metav1.ListOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// testOnDelete: pods of the update strategy OnDelete are not restarted, and the job is
// told. With another strategy, they are.
func testOnDelete(t *testing.T, g *rolloutRig, worker *program, namespace string) {
	image, strategy := newImage(), map[string]any{"updateStrategy": map[string]any{"type": "OnDelete"}}
	all := []workload{
		{kind: "StatefulSet", namespace: namespace, name: "manual", image: image, spec: strategy},
		{kind: "DaemonSet", namespace: namespace, name: "manual", image: image, spec: strategy},
	}
	for _, w := range all {
		g.make(t, w)
	}
	eventually(t, rolloutTime, "the worker has them", func() error {
		if got := worker.scrape(t).value(t, `workloads{kind="StatefulSet"}`); got != 2 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	at, f := g.push(t, image)
	want := asJSON(report{Matched: 2, Kinds: map[string]int{"DaemonSet": 1, "StatefulSet": 1}, Skipped: map[string]int{"the update strategy is OnDelete": 2}})
	f.waitFor(t, rolloutTime, want, func(r rollout) bool { return r.State == "unmatched" && r.counts("default") == want })
	for _, w := range all {
		if at := restartOf(g.read(t, w)); at != "" {
			t.Errorf("%s was restarted at %s", w.kind, at)
		}
		worker.waitLogged(t, 10*time.Second, "msg", "not restarted", "reason", "the update strategy is OnDelete", strings.ToLower(w.kind), w.name)
		if _, err := g.admin.Resource(kindResources[w.kind]).Namespace(namespace).Patch(t.Context(), w.name, types.MergePatchType,
			[]byte(`{"spec":{"updateStrategy":{"type":"RollingUpdate"}}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, rolloutTime, w.kind+" is restarted with another strategy", func() error {
			if got := restartOf(g.read(t, w)); got != stamp(at) {
				return fmt.Errorf("it has %q, want %s", got, stamp(at))
			}
			return nil
		})
	}
	f.wait(t, rolloutTime, "complete")
}

// testPartition: as for kubectl, a StatefulSet is complete when the pods above its
// partition are new.
func testPartition(t *testing.T, g *rolloutRig, namespace string) {
	w := workload{kind: "StatefulSet", namespace: namespace, name: "staged", image: newImage(),
		spec: map[string]any{"updateStrategy": map[string]any{"type": "RollingUpdate", "rollingUpdate": map[string]any{"partition": int64(1)}}}}
	g.make(t, w)
	_, f := g.push(t, w.image)
	f.wait(t, rolloutTime, "complete")
	if n, _, _ := unstructured.NestedInt64(g.read(t, w).Object, "status", "updatedReplicas"); n != 1 {
		t.Errorf("complete with %d updated replicas", n)
	}
}

// testHeld: while their pods get no node, the kinds progress.
func testHeld(t *testing.T, g *rolloutRig, namespace string) {
	image := newImage()
	all := []workload{
		{kind: "StatefulSet", namespace: namespace, name: "held", image: image},
		{kind: "DaemonSet", namespace: namespace, name: "held", image: image},
	}
	for _, w := range all {
		g.make(t, w)
	}
	_, f := g.push(t, image)
	f.wait(t, rolloutTime, "complete")
	g.allow(t, namespace, false)
	_, f = g.push(t, image)
	f.waitFor(t, rolloutTime, "restarted", func(r rollout) bool { return r.Images[0].Clusters["default"].Restarted == 2 })
	time.Sleep(time.Second)
	if states := f.states(); states[len(states)-1] != "progressing" {
		t.Errorf("without a node the states are %q", states)
	}
	g.allow(t, namespace, true)
	f.wait(t, rolloutTime, "complete")
}

// TestKindsRefused: a kind that the cluster does not know, or that RBAC forbids, ends
// the worker with an error that says how to fix it.
func TestKindsRefused(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	valkey := startValkey(t)
	kubeconfig := c.worker(t).kubeconfig(t, c.url)
	admin := user{name: "admin", token: adminToken}.kubeconfig(t, c.url)
	for _, try := range []struct {
		kubeconfig, kinds string
		code              int
		parts             []string
	}{
		{admin, "rollouts.argoproj.io", 1, []string{"the cluster does not know rollouts.argoproj.io", "WORKER_KINDS"}},
		{kubeconfig, "deployments.apps,statefulsets.apps", 1, []string{"RBAC forbids to list statefulsets.apps in all namespaces", "WORKER_KINDS"}},
		{kubeconfig, "pods", 2, []string{"WORKER_KINDS (--worker-kinds)", "deployments.apps statefulsets.apps daemonsets.apps rollouts.argoproj.io"}},
	} {
		worker := launchWorker(t, programPath, valkey.addr, try.kubeconfig, "WORKER_KINDS="+try.kinds)
		if code := worker.exitCode(t, 30*time.Second); code != try.code {
			t.Errorf("%s: it exited with %d, want %d", try.kinds, code, try.code)
		}
		for _, part := range try.parts {
			if !strings.Contains(worker.stderr.String(), part) {
				t.Errorf("%s: the log does not say %q:\n%s", try.kinds, part, worker.stderr.tail(5))
			}
		}
	}
}

// TestDefaultKinds: with the default the worker asks for nothing but Deployments.
func TestDefaultKinds(t *testing.T) {
	t.Parallel()
	p := &pair{namespace: newNamespace(t), valkey: startValkey(t)}
	api := newAPIProxy(t, sharedAPI.url)
	var mu sync.Mutex
	paths := map[string]int{}
	api.set(func(_ http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		mu.Lock()
		defer mu.Unlock()
		paths[r.Method+" "+strings.TrimSuffix(strings.Split(r.URL.Path, "/deployments")[0], "/namespaces/"+p.namespace)]++
		return false
	})
	app := p.app("api", newImage())
	app.create(t)
	startWorker(t, p.valkey.addr, newWorkerUser(t).kubeconfig(t, api.url))
	job := newClient(startWeb(t, p.valkey.addr).url)
	for range 2 {
		want := stamp(job.mustPush(t, app.images[0]))
		eventually(t, 15*time.Second, "it is restarted", func() error {
			if got := restartedAt(app.get(t)); got != want {
				return fmt.Errorf("restartedAt is %q, want %s", got, want)
			}
			return nil
		})
		app.patch(t, `{"metadata":{"labels":{"changed":"`+want[20:26]+`"}}}`) // perhaps a conflict
	}
	mu.Lock()
	defer mu.Unlock()
	if len(paths) != 2 || paths["GET /apis/apps/v1"] == 0 || paths["PATCH /apis/apps/v1"] == 0 {
		t.Errorf("the worker asked for %v", paths)
	}
}

// TestRestartOnlyKinds: with the rights of k8s/optional/, the worker's token restarts
// each kind and allows nothing else.
func TestRestartOnlyKinds(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.install(t)
	c.grantKinds(t)
	c.namespace(t, "shop")
	account := c.worker(t)
	client := c.as(t, account)
	const at = "2026-11-21T02:00:01.000000Z"
	refused := 0
	for _, kind := range []string{"StatefulSet", "DaemonSet", "Rollout"} {
		w := workload{kind: kind, namespace: "shop", name: "api", image: newImage()}
		c.make(t, w)
		api := client.Resource(kindResources[kind]).Namespace("shop")
		patch := func(body, manager string, subresources ...string) error {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := api.Patch(ctx, w.name, types.MergePatchType, []byte(body), metav1.PatchOptions{FieldManager: manager}, subresources...)
			return err
		}
		field := func(value string) string {
			if kind == "Rollout" {
				return `{"spec":{"restartAt":` + value + `}}`
			}
			return `{"spec":{"template":{"metadata":{"annotations":{"` + restartedAtKey + `":` + value + `}}}}}`
		}
		with := func(more string) string { // a restart with something else
			var a, b map[string]any
			json.Unmarshal([]byte(field(`"`+at+`"`)), &a)
			json.Unmarshal([]byte(more), &b)
			return asJSON(merged(a, b))
		}
		eventually(t, 30*time.Second, "the policy is enforced", func() error {
			if by, _ := refusedBy(patch(`{"metadata":{"labels":{"policy":"awaited"}}}`, fieldManager)); by != policyRefused {
				return fmt.Errorf("refused by %s", by)
			}
			return nil
		})
		before := c.read(t, w)
		forged := before.GetManagedFields()[0].Manager
		for _, body := range []string{
			`{"spec":{"template":{"spec":{"containers":[{"name":"main","image":"ghcr.io/evil/api:dev"}]}}}}`,
			with(`{"spec":{"template":{"spec":{"hostNetwork":true}}}}`),
			`{"spec":{"template":{"spec":{"serviceAccountName":"admin"}}}}`,
			with(`{"spec":{"template":{"metadata":{"annotations":{"a":"b"}}}}}`),
			with(`{"spec":{"template":{"metadata":{"labels":{"a":"b"}}}}}`),
			with(`{"metadata":{"labels":{"a":"b"}}}`),
			with(`{"metadata":{"annotations":{"a":"b"}}}`), with(`{"metadata":{"annotations":{"owner":null}}}`),
			with(`{"metadata":{"annotations":{"owner":"evil"}}}`), `{"metadata":{"annotations":{"deprecated.daemonset.template.generation":null}}}`,
			with(`{"metadata":{"finalizers":["example.com/keep"]}}`),
			with(`{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"ConfigMap","name":"a","uid":"a"}]}}`),
			with(`{"spec":{"minReadySeconds":60}}`), with(`{"spec":{"revisionHistoryLimit":1}}`),
			with(`{"spec":{"updateStrategy":{"type":"OnDelete","rollingUpdate":null},"strategy":{"blueGreen":{"activeService":"a"},"canary":null}}}`),
			with(`{"spec":{"replicas":0,"paused":true,"minReadySeconds":1}}`),
			with(`{"metadata":{"managedFields":[{"manager":"kustomize-controller","operation":"Apply","apiVersion":"` + before.GetAPIVersion() +
				`","time":"2026-11-21T02:00:00Z","fieldsType":"FieldsV1","fieldsV1":{"f:spec":{"f:replicas":{},"f:template":{}}}}]}}`),
			with(`{"metadata":{"managedFields":[{"manager":"` + forged + `","operation":"Update","apiVersion":"` + before.GetAPIVersion() +
				`","fieldsType":"FieldsV1","fieldsV1":{"f:spec":{"f:minReadySeconds":{}}}}]}}`),
			with(`{"metadata":{"managedFields":[{}]}}`),
			field(`"anything"`), field(`"2026-02-29T02:00:00.123456Z"`), field(`"2026-11-21T02:00:00Z"`), field(`null`),
		} {
			if kind == "Rollout" && body == field(`null`) {
				continue // it has none yet: nothing changes
			}
			err := patch(body, fieldManager)
			by, _ := refusedBy(err)
			definition := kind == "Rollout" && apierrors.IsInvalid(err) && strings.Contains(err.Error(), "must be of type date-time")
			if by != policyRefused && !definition {
				t.Errorf("%s: %s was refused by %s", kind, body, by)
			}
			refused++
		}
		for _, subresource := range []string{"status", "scale"} {
			if by, _ := refusedBy(patch(`{"status":{"replicas":7}}`, fieldManager, subresource)); by != rbacRefused && !(kind == "DaemonSet" && subresource == "scale") {
				t.Errorf("%s: the subresource %s was refused by %s", kind, subresource, by)
			}
			refused++
		}
		if after := asJSON(c.read(t, w).Object); after != asJSON(before.Object) {
			t.Errorf("%s was changed:\nbefore %s\nafter  %s", kind, asJSON(before.Object), after)
		}
		// The restart passes, and again after another manager has set the field.
		for i, manager := range []string{"", "somebody", "", "somebody"} {
			value := fmt.Sprintf("2026-11-2%dT02:00:01.000000Z", i)
			if manager == "" {
				if err := patch(field(`"`+value+`"`), fieldManager); err != nil {
					t.Errorf("%s: restart %d: %v", kind, i, err)
				}
			} else if _, err := c.admin.Resource(kindResources[kind]).Namespace("shop").Patch(t.Context(), w.name, types.MergePatchType,
				[]byte(field(`"`+value+`"`)), metav1.PatchOptions{FieldManager: manager}); err != nil {
				t.Fatal(err)
			}
			if got := restartOf(c.read(t, w)); got != value {
				t.Errorf("%s has %q, want %q", kind, got, value)
			}
		}
		if by, _ := refusedBy(patch(field(`null`), fieldManager)); by != policyRefused {
			t.Errorf("%s: taking the field away was refused by %s", kind, by)
		}
		// Nor does it give the field to a manager whose next apply would remove it.
		path := annotationPath
		if kind == "Rollout" {
			path = []string{"f:spec", "f:restartAt"}
		}
		var given map[string]any
		json.Unmarshal([]byte(field(`"`+restartOf(c.read(t, w))+`"`)), &given)
		entries, _, _ := unstructured.NestedSlice(c.read(t, w).Object, "metadata", "managedFields")
		claim(managedEntries(entries).of(forged), path...)
		given["metadata"] = map[string]any{"managedFields": entries}
		if by, _ := refusedBy(patch(asJSON(given), fieldManager)); by != policyRefused {
			t.Errorf("%s: giving the field to another manager was refused by %s", kind, by)
		}
		refused++
	}
	fmt.Printf("%s: the restarts pass, %d other changes are refused\n", t.Name(), refused)
}

// merged merges b into a.
func merged(a, b map[string]any) map[string]any {
	for key, value := range b {
		into, isMap := a[key].(map[string]any)
		if from, ok := value.(map[string]any); ok && isMap {
			a[key] = merged(into, from)
			continue
		}
		a[key] = value
	}
	return a
}

// TestDryRun: the worker sends patches that change nothing, and says so in its log and
// to the job.
func TestDryRun(t *testing.T) {
	t.Parallel()
	p := &pair{namespace: newNamespace(t), valkey: startValkey(t)}
	app, paused := p.app("api", newImage()), p.app("paused", newImage())
	paused.images, paused.paused = app.images, true
	createAll(t, []deployment{app, paused})
	before := []string{asJSON(app.get(t).Object), asJSON(paused.get(t).Object)}
	api := newAPIProxy(t, sharedAPI.url)
	worker := startWorker(t, p.valkey.addr, newWorkerUser(t, p.namespace).kubeconfig(t, api.url),
		"WORKER_DRY_RUN=true", "WORKER_EVENTS=true", "WORKER_NAMESPACES="+p.namespace, "WORKER_RESTART_INTERVAL=0", "LOG_LEVEL=debug")
	job := newClient(startWeb(t, p.valkey.addr).url)
	for round := range 2 {
		at := job.mustPush(t, app.images[0])
		worker.waitLogged(t, 15*time.Second, "msg", "would restart", "deployment", "api", "requested_at", stamp(at))
		want := report{Matched: 2, Deferred: map[string]int{"paused": 1}, Skipped: map[string]int{"would restart": 1}}
		eventually(t, 15*time.Second, "the job is told", func() error {
			r, err := job.rollout(t, url.Values{"image": app.images, "since": {stamp(at)}})
			if err == nil && (r.counts("default") != asJSON(want) || r.State != "progressing") {
				err = fmt.Errorf("%s", asJSON(r))
			}
			return err
		})
		if n := len(api.patchesOf(app)); n != round+1 {
			t.Errorf("%d patches for %d requests", n, round+1)
		}
	}
	if after := []string{asJSON(app.get(t).Object), asJSON(paused.get(t).Object)}; !slices.Equal(after, before) {
		t.Errorf("something has changed:\nbefore %q\nafter  %q", before, after)
	}
	if n := len(worker.logged(t, "msg", "restarted")); n != 0 {
		t.Errorf("the log says %d times that it restarted", n)
	}
	if got := worker.scrape(t).value(t, `restarts_total{kind="Deployment"}`); got != 0 {
		t.Errorf("restarts_total is %v", got)
	}
	// Alone, the one that would restart is unmatched.
	alone := p.app("alone", newImage())
	alone.create(t)
	at := job.mustPush(t, alone.images[0])
	eventually(t, 15*time.Second, "it is unmatched", func() error {
		r, err := job.rollout(t, url.Values{"image": alone.images, "since": {stamp(at)}})
		if err == nil && (r.State != "unmatched" || r.Images[0].Clusters["default"].Skipped["would restart"] != 1) {
			err = fmt.Errorf("%s", asJSON(r))
		}
		return err
	})
}

// TestRestartsPerMinute: a fan-out is paced, what waits is reported as deferred, and
// all restart in the end. A Deployment that cannot be patched takes nobody's turn.
func TestRestartsPerMinute(t *testing.T) {
	t.Parallel()
	const n, interval = 6, time.Second
	p := &pair{namespace: newNamespace(t), valkey: startValkey(t)}
	image := newImage()
	var all []deployment
	for i := range n {
		all = append(all, p.app(fmt.Sprint("api-", i), image))
	}
	createAll(t, all)
	bad := p.app("bad", newImage())
	bad.create(t)
	api := newAPIProxy(t, sharedAPI.url)
	api.set(answering(500, "", patchOf(bad)))
	worker := startWorker(t, p.valkey.addr, newWorkerUser(t, p.namespace).kubeconfig(t, api.url),
		"WORKER_RESTARTS_PER_MINUTE=60", "WORKER_NAMESPACES="+p.namespace)
	job := newClient(startWeb(t, p.valkey.addr).url)
	job.mustPush(t, bad.images[0])
	worker.waitLogged(t, 15*time.Second, "msg", "restart failed, trying again", "deployment", "bad")
	time.Sleep(2 * time.Second) // so that it is tried again
	begun := time.Now()
	at := job.mustPush(t, image)
	deferred := "waiting for WORKER_RESTARTS_PER_MINUTE"
	eventually(t, 10*time.Second, "the job is told what waits", func() error {
		r, err := job.rollout(t, url.Values{"image": {image}, "since": {stamp(at)}})
		if err == nil && (r.State != "progressing" || r.Images[0].Clusters["default"].Deferred[deferred] < 2) {
			err = fmt.Errorf("%s", asJSON(r))
		}
		return err
	})
	eventually(t, 60*time.Second, "all are restarted", func() error {
		for _, app := range all {
			if got := restartedAt(app.get(t)); got != stamp(at) {
				return fmt.Errorf("%s has %q", app.name, got)
			}
		}
		return nil
	})
	if took := time.Since(begun); took < (n-1)*interval-interval/2 {
		t.Errorf("%d restarts took %s with one each %s", n, took, interval)
	}
	for _, app := range all {
		if said := len(worker.logged(t, "msg", "not restarted", "reason", deferred, "deployment", app.name)); said > 1 {
			t.Errorf("%s: the log says %d times that it waits", app.name, said)
		}
		if sent := len(api.patchesOf(app)); sent != 1 {
			t.Errorf("%s was patched %d times", app.name, sent)
		}
	}
}
