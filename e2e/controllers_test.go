package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// rolloutCluster is a cluster in which rollouts happen: Deployments get pods, pods
// get a node, and kwok says that they are ready. All tests of a run share it.
type rolloutCluster struct {
	cluster
	parts []*process // that act on the API server
}

// rolloutClusters start when a test needs them, so that other runs do not pay.
var rolloutClusters = [2]func() (*rolloutCluster, error){
	sync.OnceValues(func() (*rolloutCluster, error) { return startRolloutCluster("/rollouts-0") }),
	sync.OnceValues(func() (*rolloutCluster, error) { return startRolloutCluster("/rollouts-1") }),
}

// takeRolloutCluster returns one of the clusters.
func takeRolloutCluster(t testing.TB, i int) *rolloutCluster {
	t.Helper()
	c, err := rolloutClusters[i]()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, part := range c.parts {
			if part.exited() {
				t.Errorf("%s has exited", part.name)
			}
			if t.Failed() {
				t.Logf("---- %s, end of its log:\n%s%s", part.name, part.stdout.tail(20), part.stderr.tail(20))
			}
		}
	})
	return c
}

// startWorker starts a worker with the rights of k8s/ in the cluster and in Valkey.
func (c cluster) startWorker(t testing.TB, v *manifestValkey, name string, settings ...string) *program {
	t.Helper()
	granted := []string{"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding"}
	c.mustApply(t, "", slices.DeleteFunc(readManifests(t, "../k8s/*.yaml"), func(object *unstructured.Unstructured) bool {
		return !slices.Contains(granted, object.GetKind())
	}), false)
	return startWorker(t, v.addr, c.worker(t).kubeconfig(t, c.url), slices.Concat(v.settings("worker"), []string{"CLUSTER_NAME=" + name}, settings)...)
}

var nodesResource = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}

// rolloutNode is where all pods run.
const rolloutNode = "kwok"

func startRolloutCluster(prefix string) (*rolloutCluster, error) {
	// TaintNodesByCondition would taint the node until a controller that is not here
	// finds it ready.
	api, err := startAPIServer(sharedAPI.bin, sharedEtcd, "--etcd-prefix="+prefix, withoutServiceAccounts+",TaintNodesByCondition")
	if err != nil {
		return nil, err
	}
	c := &rolloutCluster{cluster: cluster{api}, parts: []*process{api.proc}}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := c.addNode(ctx); err != nil {
		return nil, err
	}
	return c, c.startControllers()
}

// addNode adds a node without a status. kwok makes it ready, with room for a
// million pods.
func (c *rolloutCluster) addNode(ctx context.Context) error {
	_, err := c.admin.Resource(nodesResource).Create(ctx, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": rolloutNode}}}, metav1.CreateOptions{})
	return err
}

// stages of kwok: pods become ready as soon as they have a node, and go as soon as
// they are deleted.
var stages = []string{"node/fast/node-initialize.yaml", "pod/fast/pod-ready.yaml", "pod/fast/pod-delete.yaml"}

func (c *rolloutCluster) startControllers() error {
	kubeconfig := filepath.Join(c.dir, "kubeconfig")
	if err := (user{"admin", adminToken}).writeKubeconfig(kubeconfig, c.url); err != nil {
		return err
	}
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok")
	cmd.Dir = "controlplane"
	module, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("looking for the module of kwok: %w", err)
	}
	kwok := []string{"kwok", "--manage-all-nodes", "--kubeconfig", kubeconfig}
	for _, stage := range stages {
		kwok = append(kwok, "--config", filepath.Join(strings.TrimSpace(string(module)), "kustomize/stage", stage))
	}
	// Not limited in what they send: the product is what is measured.
	common := []string{"--kubeconfig", kubeconfig, "--leader-elect=false", "--secure-port=0", "--kube-api-qps=2000", "--kube-api-burst=2000"}
	for _, command := range [][]string{
		append([]string{"kube-controller-manager", "--controllers=deployment-controller,replicaset-controller,statefulset-controller,daemonset-controller"}, common...),
		append([]string{"kube-scheduler"}, common...),
		kwok,
	} {
		part, err := startProcess(command[0], []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.dir}, filepath.Join(c.bin, command[0]), command[1:]...)
		if err != nil {
			return err
		}
		c.parts = append(c.parts, part)
	}
	return nil
}

// newNamespace makes a namespace for a test. Its pods are allowed.
func (c *rolloutCluster) newNamespace(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("rollouts-%d", namespacesMade.Add(1))
	c.namespace(t, name)
	c.allow(t, name, true)
	return name
}

// allow says whether the pods of a namespace that have no node yet get one.
func (c *rolloutCluster) allow(t testing.TB, namespace string, allowed bool) {
	t.Helper()
	body := fmt.Appendf(nil, `{"metadata":{"labels":{%q:"%t"}}}`, namespace, allowed)
	if _, err := c.admin.Resource(nodesResource).Patch(t.Context(), rolloutNode, types.MergePatchType, body, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// deploy creates a Deployment with more in its spec. Its pods have a node selector
// that allow decides on.
func (c cluster) deploy(t testing.TB, d deployment, more map[string]any) {
	t.Helper()
	object := &unstructured.Unstructured{Object: d.object()}
	spec := object.Object["spec"].(map[string]any)
	maps.Copy(spec, more)
	pod, _, _ := unstructured.NestedFieldNoCopy(spec, "template", "spec")
	pod.(map[string]any)["nodeSelector"] = map[string]any{d.namespace: "true"}
	if _, err := c.admin.Resource(deploymentsResource).Namespace(d.namespace).Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
}

// rolloutStatus is what `kubectl rollout status` would say about a Deployment.
func rolloutStatus(object *unstructured.Unstructured) string {
	number := func(path ...string) int64 {
		n, _, _ := unstructured.NestedInt64(object.Object, path...)
		return n
	}
	conditions, _, _ := unstructured.NestedSlice(object.Object, "status", "conditions")
	exceeded := slices.ContainsFunc(conditions, func(condition any) bool {
		return condition.(map[string]any)["reason"] == "ProgressDeadlineExceeded"
	})
	wanted := number("spec", "replicas")
	switch {
	case number("status", "observedGeneration") < object.GetGeneration():
		return "progressing"
	case exceeded:
		return "failed"
	case number("status", "replicas") == wanted && number("status", "updatedReplicas") == wanted && number("status", "availableReplicas") == wanted:
		return "complete"
	}
	return "progressing"
}

// statusWatch is when the test's own watch first showed each status of a Deployment
// with each restartedAt.
type statusWatch struct {
	mu   sync.Mutex
	seen map[[2]string]time.Time
}

func (c cluster) watchStatus(t testing.TB, d deployment) *statusWatch {
	t.Helper()
	w, err := c.admin.Resource(deploymentsResource).Namespace(d.namespace).Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + d.name})
	if err != nil {
		t.Fatal(err)
	}
	s := &statusWatch{seen: map[[2]string]time.Time{}}
	var watching sync.WaitGroup
	t.Cleanup(func() { w.Stop(); watching.Wait() })
	watching.Go(func() {
		for event := range w.ResultChan() {
			object, ok := event.Object.(*unstructured.Unstructured)
			if !ok {
				continue
			}
			s.mu.Lock()
			if key := [2]string{restartedAt(object), rolloutStatus(object)}; s.seen[key].IsZero() {
				s.seen[key] = time.Now()
			}
			s.mu.Unlock()
		}
	})
	return s
}

// wait returns when a Deployment with a restartedAt first had a status.
func (s *statusWatch) wait(t testing.TB, within time.Duration, restartedAt, status string) (seen time.Time) {
	t.Helper()
	eventually(t, within, "a Deployment that was restarted at "+restartedAt+" is "+status, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if seen = s.seen[[2]string{restartedAt, status}]; seen.IsZero() {
			return fmt.Errorf("the watch saw %v", s.seen)
		}
		return nil
	})
	return seen
}

// waitRolledOut waits until so many Deployments of a namespace are rolled out. The
// API server ends a watch that is slower than the changes.
func (c cluster) waitRolledOut(t testing.TB, within time.Duration, namespace string, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	done := map[string]bool{}
	for ctx.Err() == nil {
		w, err := c.admin.Resource(deploymentsResource).Namespace(namespace).Watch(ctx, metav1.ListOptions{})
		if err != nil {
			break
		}
		defer w.Stop()
		for event := range w.ResultChan() {
			object, ok := event.Object.(*unstructured.Unstructured)
			if !ok {
				t.Fatalf("watching %s: %v", namespace, event.Object)
			}
			if rolloutStatus(object) == "complete" {
				done[object.GetName()] = true
			} else {
				delete(done, object.GetName())
			}
			if len(done) == n {
				return
			}
		}
	}
	t.Fatalf("within %s only %d of %d Deployments of %s are rolled out", within, len(done), n, namespace)
}
