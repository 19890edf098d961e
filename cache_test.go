package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"kuberollouttrigger/internal/fake"
)

// A Deployment that is new to the cache is restarted for a request that it missed,
// unless it was created clearly later.
func TestNewToTheCache(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	w := startWorker(t, kube)
	at := w.request(apiDev)
	kube.Create("a/seen-late", fake.Spec{Image: apiDev})
	w.awaitRestart("a/seen-late", at)
	kube.Create("a/created-soon", fake.Spec{Image: apiDev, Created: time.Now().Add(50 * time.Second)})
	w.awaitRestart("a/created-soon", at)
	kube.Create("a/created-later", fake.Spec{Image: apiDev, Created: time.Now().Add(2 * time.Minute)})
	w.settled()
	if n := w.patches("a/created-later"); n != 0 {
		t.Errorf("a Deployment created after the request was patched %d times", n)
	}

	// What happened while there was no watch, the relist brings.
	kube.ChangeUnseen(func() {
		kube.Create("a/unseen", fake.Spec{Image: apiDev})
		kube.Create("a/seen-late", fake.Spec{Image: apiDev}) // with another uid
		kube.Delete("a/created-later")
	})
	kube.BreakWatches()
	w.awaitRestart("a/unseen", at)
	w.awaitRestart("a/seen-late", at)
	if w.entry("a/created-later") != nil {
		t.Error("what is gone after a relist is still in the cache")
	}
	kube.Delete("a/unseen")
	eventually(t, "what is deleted leaves the cache", func() bool { return w.entry("a/unseen") == nil })
}

// What was in the cache when the message arrived is restarted whatever the clocks
// say, also after several tries and changes.
func TestCachedWhenTheMessageArrived(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, Created: time.Now().Add(time.Hour)}) // by an API server's clock
	var works atomic.Bool
	kube.OnPatch = failUnless(&works)
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "it was tried", func() bool { return w.patches("a/api") > 0 })
	version := w.entry("a/api").resourceVersion
	kube.Change("a/api", func(object map[string]any) { child(object, "spec")["replicas"] = int64(3) })
	eventually(t, "the cache has the change", func() bool { return w.entry("a/api").resourceVersion != version })
	works.Store(true)
	w.awaitRestart("a/api", at)
}

// A message counts for more than the ledger entry of the same T that the worker
// read a moment before.
func TestMessageAfterItsLedgerEntry(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, Created: time.Now().Add(time.Hour)})
	w := startWorker(t, kube)
	at := time.Now().UnixMicro()
	w.valkey.ZAdd("krt:requested", float64(at), apiDev)
	w.caughtUpAgain()
	w.settled()
	if n := w.patches("a/api"); n != 0 {
		t.Fatalf("patched %d times for a request older than the Deployment", n)
	}
	w.valkey.Publish("krt", fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, apiDev, at))
	w.awaitRestart("a/api", formatTime(at))
}

// A Deployment that was set to the image shortly before the request is restarted,
// when the watch lags and when it stalls until it is restarted or lists again.
func TestImageSetBeforeTheRequest(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/lag", fake.Spec{Image: "ghcr.io/acme/api:v1"})
	w := startWorker(t, kube)
	kube.Lock()
	kube.Lag = func() time.Duration { return 200 * time.Millisecond }
	kube.Unlock()
	kube.Change("a/lag", setImage(apiDev))
	w.awaitRestart("a/lag", w.publish(apiDev))

	kube = newKubernetes(t)
	kube.Create("a/stall", fake.Spec{Image: "ghcr.io/acme/api:v1"})
	w = startWorker(t, kube)
	for i, restart := range []func(){kube.EndWatches, kube.BreakWatches} {
		image := fmt.Sprintf("ghcr.io/acme/api:v%d", i+2)
		kube.ChangeUnseen(func() { kube.ChangeAs("a/stall", "kubectl", time.Now().Add(-time.Minute), setImage(image)) })
		at := w.request(image)
		restart()
		w.awaitRestart("a/stall", at)
	}
}

// Changes of the status and by other managers do not make the image look newer.
func TestOtherChangesAfterTheRequest(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: "ghcr.io/acme/api:v1"})
	w := startWorker(t, kube)
	at := time.Now().Add(-30 * time.Second).UnixMicro()
	w.valkey.ZAdd("krt:requested", float64(at), apiDev)
	w.caughtUpAgain()
	kube.ChangeUnseen(func() {
		kube.ChangeAs("a/api", "kubectl", time.Now().Add(-time.Minute), setImage(apiDev))
		kube.ChangeStatus("a/api", func(object map[string]any) { object["status"] = map[string]any{"replicas": int64(1)} })
		kube.ChangeAs("a/api", "autoscaler", time.Now(), func(object map[string]any) { child(object, "spec")["replicas"] = int64(3) })
	})
	kube.BreakWatches()
	w.awaitRestart("a/api", formatTime(at))
}

// One that is set to it after the request is not, whatever the watch does and
// whatever happens to it later.
func TestImageSetAfterTheRequest(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	for _, key := range []string{"a/api", "a/ended", "a/relisted", "a/soon"} {
		kube.Create(key, fake.Spec{Image: "ghcr.io/acme/api:v1"})
	}
	w := startWorker(t, kube)
	at := w.request(apiDev)
	later := time.Now().Add(time.Minute)
	kube.ChangeAs("a/soon", "kubectl", time.Now().Add(5*time.Second), setImage(apiDev)) // not clearly later
	w.awaitRestart("a/soon", at)
	kube.ChangeAs("a/api", "kubectl", later, setImage(apiDev))
	kube.EndWatches()
	kube.ChangeAs("a/ended", "kubectl", later, setImage(apiDev))
	eventually(t, "the watch goes on", func() bool { return len(w.cache.running(apiDev)) == 3 })
	kube.ChangeUnseen(func() { kube.ChangeAs("a/relisted", "kubectl", later, setImage(apiDev)) })
	kube.BreakWatches()
	eventually(t, "it is listed", func() bool { return len(w.cache.running(apiDev)) == 4 })
	for _, key := range []string{"a/api", "a/ended", "a/relisted"} {
		kube.Change(key, setPaused(true))
		kube.Change(key, setPaused(false))
		kube.ChangeStatus(key, func(object map[string]any) { object["status"] = map[string]any{"observedGeneration": int64(9)} })
	}
	w.caughtUpAgain()
	w.settled()
	for _, key := range []string{"a/api", "a/ended", "a/relisted"} {
		if restartedAt := kube.RestartedAt(key); restartedAt != "" {
			t.Errorf("%s was restarted at %s", key, restartedAt)
		}
	}
}

// Own patches are known before the watch shows them, and older events do not undo
// that knowledge.
func TestLaggingWatch(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	const deployments = 10
	image := func(i int) string { return fmt.Sprintf("ghcr.io/acme/api-%d:dev", i) }
	for i := range deployments {
		kube.Create(fmt.Sprintf("a/api-%d", i), fake.Spec{Image: image(i)})
	}
	w := startWorker(t, kube)
	kube.Lock()
	kube.Lag = func() time.Duration { return 150 * time.Millisecond }
	kube.Unlock()
	last, requests := make([]string, deployments), 0
	for begun := time.Now(); time.Since(begun) < 500*time.Millisecond; requests++ {
		i := requests % deployments
		last[i] = w.publish(image(i))
		w.awaitRestart(fmt.Sprintf("a/api-%d", i), last[i])
	}
	if n := w.patches(""); n != requests {
		t.Errorf("%d patches for %d requests", n, requests)
	}
	eventually(t, "the watch has caught up", func() bool {
		for i := range deployments {
			if w.entry(fmt.Sprintf("a/api-%d", i)).restartedAt != last[i] {
				return false
			}
		}
		return true
	})
}

// A Deployment that is deleted while its patch is answered does not come back, nor
// does it replace one that was made anew.
func TestAnswerAfterDeletion(t *testing.T) {
	t.Parallel()
	for name, anew := range map[string]bool{"deleted": false, "made anew": true} {
		kube := newKubernetes(t, "a/api")
		var w *testWorker
		kube.Front = func(rw http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPatch {
				return false
			}
			answer := httptest.NewRecorder()
			kube.ServeHTTP(answer, r)
			if kube.Delete("a/api"); anew {
				kube.Create("a/api", fake.Spec{Image: webDev})
			}
			for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if d := w.entry("a/api"); !anew && d == nil || anew && d != nil && d.image(webDev) != nil {
					break
				}
			}
			rw.Header().Set("Content-Type", "application/json")
			rw.Write(answer.Body.Bytes())
			return true
		}
		w = startWorker(t, kube)
		w.publish(apiDev)
		eventually(t, "the patch is answered", func() bool { return w.logs.has(`"msg":"restarted"`, `"deployment":"api"`) })
		if d := w.entry("a/api"); (d != nil) != anew || anew && d.image(webDev) == nil {
			t.Errorf("%s: the cache has %+v", name, d)
		}
	}
}

// A complete list counts, also from an API server that was restored from a backup.
func TestListOfLowerVersions(t *testing.T) {
	t.Parallel()
	w := startWorker(t, newKubernetes(t, "a/api"))
	u := &unstructured.Unstructured{Object: w.kube.Object("a/api")}
	u.SetResourceVersion("7")
	setImage(webDev)(u.Object)
	if w.cache.scopes[0].replace([]*workload{newWorkload(kinds[0], u)}); len(w.cache.running(webDev)) != 1 {
		t.Error("it is ignored")
	}
}

// Lists are read page by page, the first one and a relist, and are complete when a
// continue token expires in between.
func TestPagedLists(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t) // it reports a list without a limit
	const deployments = 2*listPage + 1
	for i := range deployments {
		kube.Create(fmt.Sprintf("a/api-%04d", i), fake.Spec{Image: "ghcr.io/acme/many:dev"})
	}
	kube.ExpireContinue()
	w := startWorker(t, kube)
	all := func() bool { return len(w.cache.running("ghcr.io/acme/many:dev")) == deployments }
	if !all() || w.logs.count("deployments listed") != 1 {
		t.Errorf("%d of %d Deployments", len(w.cache.running("ghcr.io/acme/many:dev")), deployments)
	}
	first := len(kube.Lists())
	kube.ChangeUnseen(func() {
		kube.Delete("a/api-0000")
		kube.Create("a/api-x", fake.Spec{Image: "ghcr.io/acme/many:dev"})
	})
	kube.ExpireContinue()
	kube.BreakWatches()
	eventually(t, "it is listed again", func() bool { return w.logs.count("deployments listed") == 2 })
	if !all() || w.entry("a/api-0000") != nil || w.entry("a/api-x") == nil {
		t.Error("the cache is not what was listed")
	}
	if first != 2+3 || len(kube.Lists()) != first+2+3 {
		t.Errorf("%d lists, then %d", first, len(kube.Lists())-first)
	}
}

// A watch that brings nothing more is restarted from where it ended.
func TestStaleWatch(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	m, _ := testValkey(t)
	w := newTestWorker(t, kube, m)
	w.cache.watchAge = 1100 * time.Millisecond // less without an event makes client-go list again
	w.start()
	eventually(t, "the worker is ready", func() bool { return w.ready() == nil })
	kube.ChangeUnseen(func() { kube.Create("a/late", fake.Spec{Image: apiDev}) })
	w.awaitRestart("a/late", w.publish(apiDev))
	if n := len(kube.Lists()); n != 1 {
		t.Errorf("%d lists", n)
	}
}

// Without a watch the worker is not ready after a few seconds.
func TestReadyMeansWatching(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	var down atomic.Bool
	kube.Front = func(w http.ResponseWriter, _ *http.Request) bool {
		if down.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return down.Load()
	}
	w := startWorker(t, kube)
	down.Store(true)
	kube.EndWatches()
	eventually(t, "the watch is gone", func() bool { return kube.Watchers() == 0 })
	if err := w.ready(); err != nil {
		t.Errorf("not ready at once: %v", err)
	}
	w.ahead.Store(int64(6 * time.Second))
	eventually(t, "the worker is not ready", func() bool { err := w.ready(); return err != nil && strings.Contains(err.Error(), "no watch") })
	down.Store(false)
	eventually(t, "the worker is ready again", func() bool { return w.ready() == nil })
}

func TestNamespacesAndSelector(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Selector = "team=payments"
	for _, namespace := range []string{"a", "b", "c"} {
		kube.Create(namespace+"/api", fake.Spec{Image: apiDev})
	}
	kube.OnPatch = sequence("a/api", nil, http.StatusConflict)
	w := startWorker(t, kube, func(c *workerConfig) {
		c.Namespaces, c.Selector = []string{"a", "b", "probe"}, "team=payments"
	})
	at := w.publish(apiDev)
	w.awaitRestart("a/api", at)
	w.awaitRestart("b/api", at)
	kube.BreakWatches()
	eventually(t, "all are listed again", func() bool { return w.logs.count("deployments listed") == 6 })
	if w.entry("a/api") == nil || w.entry("b/api") == nil {
		t.Error("the list of one namespace removed what is in another")
	}
	w.settled()
	if n := w.patches("c/api"); n != 0 {
		t.Errorf("a Deployment out of scope was patched %d times", n)
	}
}

// A scope that RBAC forbids from the start ends the worker. Forbidden later, it is
// tried again: a Role may be missing while it is replaced.
func TestForbiddenScope(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"list", "watch"} {
		kube := newKubernetes(t)
		kube.Forbid = func(v, namespace string) bool { return v == verb && namespace == "b" }
		m, _ := testValkey(t)
		w := startWorkerOn(t, kube, m, func(c *workerConfig) { c.Namespaces = []string{"a", "b"} })
		eventually(t, "the worker gives up", w.queue.ShuttingDown)
		err := w.stop()
		for _, part := range []string{"RBAC forbids to " + verb + " deployments.apps in b", "WORKER_NAMESPACES"} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("error %v does not say %q", err, part)
			}
		}
	}

	kube := newKubernetes(t)
	var forbidden atomic.Bool
	kube.Forbid = func(string, string) bool { return forbidden.Load() }
	w := startWorker(t, kube)
	forbidden.Store(true)
	kube.BreakWatches()
	lists := len(kube.Lists())
	eventually(t, "it is refused", func() bool { return len(kube.Lists()) > lists })
	forbidden.Store(false)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w.awaitRestart("a/api", w.publish(apiDev))
}
