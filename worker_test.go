package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kuberollouttrigger/internal/fake"
)

func TestRestartsWhatRunsTheImage(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/container")
	kube.Create("b/init", fake.Spec{Image: "nginx", Init: apiDev})
	kube.Create("c/volume", fake.Spec{Image: "nginx", Volume: apiDev})
	kube.Create("d/other-tag", fake.Spec{Image: "ghcr.io/acme/api:main"})
	kube.Create("d/other-name", fake.Spec{Image: "ghcr.io/acme/api-gateway:dev"})
	kube.Create("d/pinned", fake.Spec{Image: apiDev + "@" + digest})
	kube.Create("d/deleting", fake.Spec{Image: apiDev, Deleting: true})
	object := kube.Object("a/container")
	version, uid := child(object, "metadata")["resourceVersion"], child(object, "metadata")["uid"]
	w := startWorker(t, kube)

	at := w.publish(apiDev)
	for _, key := range []string{"a/container", "b/init", "c/volume"} {
		w.awaitRestart(key, at)
	}
	w.settled()
	for _, call := range kube.Patches("") {
		if strings.HasPrefix(call.Key, "d/") {
			t.Errorf("%s was patched: %s", call.Key, call.Body)
		}
	}
	calls := kube.Patches("a/container")
	if len(calls) != 1 {
		t.Fatalf("a/container was patched %d times", len(calls))
	}
	want := fmt.Sprintf(`{"metadata":{"resourceVersion":%q,"uid":%q},"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":%q}}}}}`, version, uid, at)
	if calls[0].Body != want || calls[0].Query != "fieldManager=kuberollouttrigger" {
		t.Errorf("patch ?%s\n got %s\nwant %s", calls[0].Query, calls[0].Body, want)
	}
	for _, reason := range []string{"pinned by digest", "being deleted"} {
		if !w.logs.has(`"msg":"not restarted"`, reason, `"image":"`+apiDev+`"`, at) {
			t.Errorf("no log line says %q", reason)
		}
	}
	if !w.logs.has(`"level":"INFO"`, `"msg":"restarted"`, `"namespace":"a"`, `"deployment":"container"`, `"cluster":"test"`, at) {
		t.Error("no log line for the restart")
	}
}

// client-go would send 5 requests a second after the first 10, and take 18 s.
func TestManyDeployments(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	for i := range 100 {
		kube.Create(fmt.Sprintf("a/api-%d", i), fake.Spec{Image: apiDev})
	}
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	for i := range 100 {
		w.awaitRestart(fmt.Sprintf("a/api-%d", i), at)
	}
}

func TestCanonicalMatching(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/short", fake.Spec{Image: "nginx"})
	kube.Create("a/host", fake.Spec{Image: "docker.io/nginx:latest"})
	kube.Create("a/index", fake.Spec{Image: "index.docker.io/library/nginx"})
	w := startWorker(t, kube)
	at := w.publish("docker.io/library/nginx:latest")
	for _, key := range []string{"a/short", "a/host", "a/index"} {
		w.awaitRestart(key, at)
	}
}

// An image that is pinned in one container and not in another is restarted.
func TestUsedTwice(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev + "@" + digest, Init: apiDev})
	w := startWorker(t, kube)
	w.awaitRestart("a/api", w.publish(apiDev))
}

func TestPullPolicyWarning(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/cached", fake.Spec{Image: apiDev, Policy: "IfNotPresent"})
	w := startWorker(t, kube)
	w.awaitRestart("a/cached", w.publish(apiDev))
	eventually(t, "the warning is logged", func() bool {
		return w.logs.has(`"level":"WARN"`, `"msg":"restarted"`, "imagePullPolicy is IfNotPresent")
	})
}

// A paused Deployment is restarted when it is resumed, or its expiry is logged.
func TestPaused(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/paused", fake.Spec{Image: apiDev, Paused: true})
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "the pause is logged", func() bool { return w.logs.has(`"msg":"not restarted"`, `"reason":"paused"`, at) })
	w.settled()
	if n := w.patches("a/paused"); n != 0 {
		t.Fatalf("a paused Deployment was patched %d times", n)
	}
	kube.Change("a/paused", setPaused(false))
	w.awaitRestart("a/paused", at)

	kube.Change("a/paused", setPaused(true))
	eventually(t, "the cache has it", func() bool { return w.entry("a/paused").paused })
	at = w.request(apiDev)
	w.ahead.Store(int64(61 * time.Minute))
	kube.Change("a/paused", setPaused(false))
	eventually(t, "the expiry is logged", func() bool { return w.logs.has(`"msg":"not restarted"`, `"reason":"expired"`, at) })
}

// What is paused until its request expires is looked at once more, for the log.
func TestPausedForTheWholeWindow(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/paused", fake.Spec{Image: apiDev, Paused: true})
	m, _ := testValkey(t)
	w := newTestWorker(t, kube, m)
	w.rules.window = 50 * time.Millisecond
	w.start()
	eventually(t, "the worker is ready", func() bool { return w.ready() == nil })
	at := w.publish(apiDev)
	eventually(t, "the expiry is logged", func() bool { return w.logs.has(`"reason":"expired"`, `"deployment":"paused"`, at) })
}

// The first restart is immediate. Further requests within the interval cost one
// more restart at its end, with the newest T.
func TestRestartInterval(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	const interval = 400 * time.Millisecond
	var patched atomic.Pointer[[]time.Time]
	patched.Store(&[]time.Time{})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		times := append(*patched.Load(), time.Now())
		patched.Store(&times)
		return 0, nil
	}
	w := startWorker(t, kube, func(c *workerConfig) { c.RestartInterval = interval })
	first := w.publish(apiDev)
	w.awaitRestart("a/api", first)
	newest := ""
	for range 10 {
		newest = w.request(apiDev)
	}
	// Valkey's clock and its corrections have no say in it.
	w.setValkeyClock(time.Now().Add(-2 * time.Hour))
	w.setValkeyClock(time.Now().Add(2 * time.Hour))
	if at := kube.RestartedAt("a/api"); at != first {
		t.Errorf("restarted again at once, at %s", at)
	}
	w.awaitRestart("a/api", newest)
	if times := *patched.Load(); len(times) != 2 || times[1].Sub(times[0]) < interval {
		t.Errorf("patched at %v", times)
	}
	if !w.logs.has(`"msg":"not restarted"`, "WORKER_RESTART_INTERVAL", newest) {
		t.Error("the deferral is not logged")
	}
}

// Somebody else's restart counts for the interval, once the watch has shown it.
func TestRestartIntervalAfterAnother(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, RestartedAt: formatTime(1)})
	w := startWorker(t, kube, func(c *workerConfig) { c.RestartInterval = time.Hour })
	w.awaitRestart("a/api", w.publish(apiDev)) // after a list nothing is deferred
	kube.Create("a/kubectl", fake.Spec{Image: webDev})
	eventually(t, "it is cached", func() bool { return len(w.cache.running(webDev)) == 1 })
	kube.Change("a/kubectl", setRestartedAt(formatTime(1)))
	eventually(t, "the cache has it", func() bool { return w.entry("a/kubectl").restartedAt != "" })
	w.publish(webDev)
	eventually(t, "it is deferred", func() bool { return w.logs.has("WORKER_RESTART_INTERVAL", `"deployment":"kubectl"`) })
}

// While a restart fails, requests go on: the newest is what it ends at, an older
// one that comes late replaces nothing, and a pinned image does not count.
func TestNewestOfSeveralWhileItFails(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, Init: initDev, Volume: webDev + "@" + digest})
	var works atomic.Bool
	kube.OnPatch = failUnless(&works)
	w := startWorker(t, kube)
	now := time.Now().UnixMicro()
	for _, m := range []message{{apiDev, now - 3}, {initDev, now - 1}, {apiDev, now - 2}, {initDev, now - 4}, {webDev, now}} {
		w.valkey.Publish("krt", fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, m.Image, m.RequestedAt))
	}
	eventually(t, "all are received", func() bool { return w.logs.has(`"msg":"not restarted"`, "pinned", webDev) })
	works.Store(true)
	w.awaitRestart("a/api", formatTime(now-1))
	w.settled()
	if applied := kube.Applied("a/api"); len(applied) != 1 {
		t.Errorf("restarted at %v", applied)
	}
}

func failUnless(works *atomic.Bool) func(fake.PatchCall) (int, http.Header) {
	return func(fake.PatchCall) (int, http.Header) {
		if works.Load() {
			return 0, nil
		}
		return http.StatusInternalServerError, nil
	}
}

// Removing the annotation, as GitOps tools do, leads to no restart: not by itself,
// and not when the Deployment is looked at for another reason.
func TestGitOpsIsNotFought(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	local := time.Now().Add(-time.Hour).In(time.FixedZone("", 2*60*60)).Format(time.RFC3339) // greater as text than T
	kube.Create("a/git", fake.Spec{Image: apiDev, RestartedAt: local})
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	w.awaitRestart("a/api", at)
	w.awaitRestart("a/git", at)
	kube.Change("a/api", removeAnnotation)
	kube.Change("a/git", setRestartedAt(local))
	kube.BreakWatches()
	eventually(t, "it is listed again", func() bool { return w.logs.count("deployments listed") == 2 })
	for _, key := range []string{"a/api", "a/git"} {
		kube.Change(key, setPaused(true))
		kube.Change(key, setPaused(false))
	}
	w.caughtUpAgain()
	w.settled()
	if w.patches("a/api") != 1 || w.patches("a/git") != 1 {
		t.Errorf("patched %d and %d times instead of once", w.patches("a/api"), w.patches("a/git"))
	}
}

// The newer T wins, whatever order the two arrive in.
func TestNewerRequestWins(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/both", fake.Spec{Image: apiDev, Init: initDev})
	w := startWorker(t, kube)
	now := time.Now().UnixMicro()
	w.valkey.Publish("krt", fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, initDev, now))
	w.awaitRestart("a/both", formatTime(now))
	w.valkey.Publish("krt", fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, apiDev, now-1000))
	w.settled()
	if n := w.patches("a/both"); n != 1 || kube.RestartedAt("a/both") != formatTime(now) {
		t.Errorf("patched %d times, restartedAt %s", n, kube.RestartedAt("a/both"))
	}
}

// Requests for two images of one Deployment cross each other in three workers on a
// slow API server: it ends at the newest.
func TestCrossingRequestsInThreeWorkers(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/both", fake.Spec{Image: apiDev, Init: initDev})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		time.Sleep(rand.N(20 * time.Millisecond))
		return 0, nil
	}
	kube.Lag = func() time.Duration { return rand.N(30 * time.Millisecond) }
	first := startWorker(t, kube)
	for range 2 {
		w := startWorkerOn(t, kube, first.valkey)
		eventually(t, "the worker is ready", func() bool { return w.ready() == nil })
	}
	newest := ""
	for i := range 40 {
		newest = max(newest, first.publish([]string{apiDev, initDev}[i%2]))
		time.Sleep(rand.N(4 * time.Millisecond))
	}
	first.awaitRestart("a/both", newest)
	first.settled()
	if at := kube.RestartedAt("a/both"); at != newest {
		t.Errorf("restartedAt %s, the newest request is of %s", at, newest)
	}
}

// A patch on its way when the worker is stopped is finished. What has not begun is
// left to the next worker.
func TestStopFinishesThePatchInFlight(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/first", "a/second")
	arrived, release := make(chan string, 4), make(chan struct{})
	kube.OnPatch = func(call fake.PatchCall) (int, http.Header) {
		arrived <- call.Key
		<-release
		return 0, nil
	}
	w := startWorker(t, kube, func(c *workerConfig) { c.Concurrency = 1 })
	at := w.publish(apiDev)
	inFlight := <-arrived
	stopped := make(chan error)
	go func() { stopped <- w.stop() }()
	eventually(t, "the queue is shut down", w.queue.ShuttingDown)
	close(release)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if kube.RestartedAt(inFlight) != at || w.patches("") != 1 || w.logs.has("restart failed") {
		t.Errorf("the patch of %s was cut off, or another one sent", inFlight)
	}
	next := startWorkerOn(t, kube, w.valkey)
	for _, key := range []string{"a/first", "a/second"} {
		next.awaitRestart(key, at)
		if n := w.patches(key); n != 1 {
			t.Errorf("%s was patched %d times", key, n)
		}
	}
}
