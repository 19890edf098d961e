package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

const restartedAtKey = "kubectl.kubernetes.io/restartedAt"

var namespacesMade atomic.Int64

// newNamespace is a namespace no other test has.
func newNamespace(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("e2e-%d", namespacesMade.Add(1))
	create(t, namespacesResource, "", map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name}})
	return name
}

var imagesMade atomic.Int64

// newImage is an image reference no other test uses: a worker whose scope is
// the whole cluster must not be asked to restart what another test counts.
func newImage() string { return newRepository() + ":dev" }

func newRepository() string { return fmt.Sprintf("ghcr.io/acme/e2e/app-%d", imagesMade.Add(1)) }

func newImages(n int) []string {
	images := make([]string, n)
	for i := range images {
		images[i] = newImage()
	}
	return images
}

// deployment is what tests care about in one.
type deployment struct {
	namespace, name string
	labels          map[string]string
	images          []string // containers, one each
	initImages      []string // init containers
	volumeImages    []string // volumes of type image
	pullPolicy      string   // of all of them; Always if not said
	paused          bool
	restartedAt     string // the annotation it is created with
}

func (d deployment) key() string { return d.namespace + "/" + d.name }

func (d deployment) object() map[string]any {
	policy := d.pullPolicy
	if policy == "" {
		policy = "Always"
	}
	containers := func(prefix string, images []string) []any {
		var out []any
		for i, image := range images {
			out = append(out, map[string]any{"name": fmt.Sprint(prefix, i), "image": image, "imagePullPolicy": policy})
		}
		return out
	}
	pod := map[string]any{"containers": containers("main-", d.images)}
	if len(d.initImages) > 0 {
		pod["initContainers"] = containers("init-", d.initImages)
	}
	var volumes []any
	for i, image := range d.volumeImages {
		volumes = append(volumes, map[string]any{"name": fmt.Sprint("volume-", i), "image": map[string]any{"reference": image, "pullPolicy": policy}})
	}
	if len(volumes) > 0 {
		pod["volumes"] = volumes
	}
	labels := map[string]any{"app": d.name}
	metadata := map[string]any{"labels": map[string]any{"app": d.name}}
	if d.restartedAt != "" {
		metadata["annotations"] = map[string]any{restartedAtKey: d.restartedAt}
	}
	own := map[string]any{}
	for k, v := range d.labels {
		own[k] = v
	}
	return map[string]any{
		"apiVersion": "apps/v1", "kind": "Deployment",
		"metadata": map[string]any{"name": d.name, "labels": own},
		"spec": map[string]any{
			"replicas": int64(2), "paused": d.paused,
			"selector": map[string]any{"matchLabels": labels},
			"template": map[string]any{"metadata": metadata, "spec": pod},
		},
	}
}

// create creates it and returns it for comparing.
func (d deployment) create(t testing.TB) *unstructured.Unstructured {
	t.Helper()
	return create(t, deploymentsResource, d.namespace, d.object())
}

func createAll(t testing.TB, all []deployment) {
	t.Helper()
	for _, d := range all {
		d.create(t)
	}
}

func (d deployment) get(t testing.TB) *unstructured.Unstructured {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	object, err := sharedAPI.admin.Resource(deploymentsResource).Namespace(d.namespace).Get(ctx, d.name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("getting deployment %s: %v", d.key(), err)
	}
	return object
}

// patch merges into it, as somebody else than the worker.
func (d deployment) patch(t testing.TB, body string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := sharedAPI.admin.Resource(deploymentsResource).Namespace(d.namespace).Patch(ctx, d.name, types.MergePatchType, []byte(body), metav1.PatchOptions{FieldManager: "e2e"})
	if err != nil {
		t.Fatalf("patching deployment %s: %v", d.key(), err)
	}
}

// annotate writes restartedAt, or takes it away if value is empty.
func (d deployment) annotate(t testing.TB, value string) {
	t.Helper()
	quoted := "null"
	if value != "" {
		quoted = fmt.Sprintf("%q", value)
	}
	d.patch(t, fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{%q:%s}}}}}`, restartedAtKey, quoted))
}

func restartedAt(object *unstructured.Unstructured) string {
	value, _, _ := unstructured.NestedString(object.Object, "spec", "template", "metadata", "annotations", restartedAtKey)
	return value
}

// step is one generation of a Deployment as the recorder's watch showed it.
type step struct {
	generation  int64
	restartedAt string
	seen        time.Time
}

// recorder watches namespaces on the shared API server and keeps every generation
// of every Deployment in them. Tests judge the product by this, not by its log.
type recorder struct {
	mu      sync.Mutex
	steps   map[string][]step
	changed chan struct{} // closed and replaced at every step
	broken  error         // set when steps may have been missed
}

func record(t testing.TB, namespaces ...string) *recorder {
	t.Helper()
	r := &recorder{steps: map[string][]step{}, changed: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	t.Cleanup(func() { cancel(); watching.Wait() })
	for _, namespace := range namespaces {
		list, err := sharedAPI.admin.Resource(deploymentsResource).Namespace(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatalf("listing deployments in %q: %v", namespace, err)
		}
		for i := range list.Items {
			r.add(&list.Items[i])
		}
		watching.Go(func() { r.watch(ctx, namespace, list.GetResourceVersion()) })
	}
	return r
}

func (r *recorder) watch(ctx context.Context, namespace, version string) {
	fail := func(err error) {
		if ctx.Err() == nil {
			r.mu.Lock()
			r.broken = fmt.Errorf("the recorder's watch of %q broke: %w", namespace, err)
			r.mu.Unlock()
		}
	}
	for ctx.Err() == nil {
		w, err := sharedAPI.admin.Resource(deploymentsResource).Namespace(namespace).Watch(ctx, metav1.ListOptions{ResourceVersion: version, AllowWatchBookmarks: true})
		if err != nil {
			fail(err)
			return
		}
		for event := range w.ResultChan() {
			object, ok := event.Object.(*unstructured.Unstructured)
			if !ok || event.Type == watch.Error {
				fail(apierrors.FromObject(event.Object))
				w.Stop()
				return
			}
			// Every change from here on is seen: a watch resumes exactly at the
			// version it is given, or fails.
			version = object.GetResourceVersion()
			if event.Type == watch.Added || event.Type == watch.Modified {
				r.add(object)
			}
		}
		w.Stop()
	}
}

func (r *recorder) add(object *unstructured.Unstructured) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	key := object.GetNamespace() + "/" + object.GetName()
	steps := r.steps[key]
	s := step{generation: object.GetGeneration(), restartedAt: restartedAt(object), seen: now}
	if len(steps) > 0 && steps[len(steps)-1].generation == s.generation {
		return // status or metadata
	}
	r.steps[key] = append(steps, s)
	close(r.changed)
	r.changed = make(chan struct{})
}

// of are the steps of one Deployment; the first is the one it was found with.
func (r *recorder) of(d deployment) []step {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.steps[d.key()])
}

func (r *recorder) err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.broken
}

// waitRestartedAt waits until the Deployment carries the value, and returns the
// step that brought it.
func (r *recorder) waitRestartedAt(t testing.TB, within time.Duration, d deployment, want string) step {
	t.Helper()
	deadline := time.After(within)
	for {
		r.mu.Lock()
		changed, steps, broken := r.changed, r.steps[d.key()], r.broken
		r.mu.Unlock()
		if broken != nil {
			t.Fatal(broken)
		}
		if n := len(steps); n > 0 && steps[n-1].restartedAt == want {
			return steps[n-1]
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s: restartedAt is not %s within %s; its steps: %s", d.key(), want, within, describe(steps))
		}
	}
}

// mustNotChange checks that the Deployment keeps its generation for a while.
func (r *recorder) mustNotChange(t testing.TB, d deployment, during time.Duration) {
	t.Helper()
	// What the test itself has changed is seen before it counts.
	generation := d.get(t).GetGeneration()
	eventually(t, 5*time.Second, "the recorder has seen "+d.key()+" as it is", func() error {
		if steps := r.of(d); len(steps) == 0 || steps[len(steps)-1].generation < generation {
			return fmt.Errorf("generation %d is not among %s", generation, describe(steps))
		}
		return nil
	})
	before := len(r.of(d))
	time.Sleep(during)
	if err := r.err(); err != nil {
		t.Fatal(err)
	}
	if steps := r.of(d); len(steps) != before {
		t.Errorf("%s was changed, and must not have been: %s", d.key(), describe(steps))
	}
}

// restarts is how often the Deployment got a new generation since it was first
// seen.
func (r *recorder) restarts(d deployment) int {
	steps := r.of(d)
	if len(steps) == 0 {
		return 0
	}
	return int(steps[len(steps)-1].generation - steps[0].generation)
}

func describe(steps []step) string {
	var out []string
	for _, s := range steps {
		out = append(out, fmt.Sprintf("generation %d restartedAt %q", s.generation, s.restartedAt))
	}
	return "[" + strings.Join(out, ", ") + "]"
}
