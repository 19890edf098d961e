package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"kuberollouttrigger/internal/fake"
)

const apiDev = "ghcr.io/acme/api:dev"

// logBuffer collects log lines of several goroutines.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// has says whether one line holds all the parts.
func (b *logBuffer) has(parts ...string) bool {
	for line := range strings.Lines(b.String()) {
		all := true
		for _, part := range parts {
			all = all && strings.Contains(line, part)
		}
		if all {
			return true
		}
	}
	return false
}

// testWorker is a real worker on a real Valkey protocol and a strict API.
type testWorker struct {
	*worker
	t      *testing.T
	kube   *fake.KubernetesAPI
	valkey *miniredis.Miniredis
	logs   *logBuffer
	pub    *publisher
	passed atomic.Int64 // added to its clock, in ns
	stop   func() error // stops it and returns what run returned
}

func testValkey(t *testing.T) (*miniredis.Miniredis, valkeyConfig) {
	t.Helper()
	m := miniredis.RunT(t)
	return m, valkeyConfig{Addr: m.Addr(), Channel: "krt"}
}

func startTestWorker(t *testing.T, kube *fake.KubernetesAPI, adjust ...func(*workerConfig)) *testWorker {
	t.Helper()
	m, cfg := testValkey(t)
	w := startWorkerOn(t, kube, m, cfg, adjust...)
	eventually(t, "worker is ready", func() bool { return w.ready() == nil })
	return w
}

func startWorkerOn(t *testing.T, kube *fake.KubernetesAPI, m *miniredis.Miniredis, cfg valkeyConfig, adjust ...func(*workerConfig)) *testWorker {
	t.Helper()
	logs := &logBuffer{}
	log := slog.New(slog.NewJSONHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	source, err := newSubscriber(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := newPublisher(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	wc := workerConfig{CatchUp: time.Hour, Concurrency: 4, ClusterName: "test"}
	for _, f := range adjust {
		f(&wc)
	}
	prefixes, err := parseImagePrefixes("ghcr.io/acme")
	if err != nil {
		t.Fatal(err)
	}
	w := &testWorker{t: t, kube: kube, valkey: m, logs: logs, pub: pub}
	now := func() time.Time { return time.Now().Add(time.Duration(w.passed.Load())) }
	w.worker = newWorker(wc, prefixes, kubeClient(t, kube), source, log, now)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	var once sync.Once
	w.stop = func() (err error) {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(15 * time.Second):
				err = errors.New("worker did not stop")
			}
			source.close()
			pub.close()
		})
		return err
	}
	t.Cleanup(func() {
		w.stop()
		if t.Failed() {
			t.Logf("worker's log:\n%s", logs)
		}
	})
	return w
}

// publish asks for images as web does and returns restartedAt.
func (w *testWorker) publish(images ...string) string {
	w.t.Helper()
	at, _, err := w.pub.publish(w.t.Context(), images)
	if err != nil {
		w.t.Fatal(err)
	}
	return formatTime(at)
}

func (w *testWorker) awaitRestart(key, at string) {
	w.t.Helper()
	eventually(w.t, key+" has restartedAt "+at, func() bool { return w.kube.RestartedAt(key) == at })
}

// settled waits until the worker has nothing left to do.
func (w *testWorker) settled() {
	w.t.Helper()
	w.kube.Create("ghcr-probe/probe", fake.Spec{Image: "ghcr.io/acme/probe:dev"})
	eventually(w.t, "the probe is known", func() bool { return len(w.cache.running("ghcr.io/acme/probe:dev")) == 1 })
	w.awaitRestart("ghcr-probe/probe", w.publish("ghcr.io/acme/probe:dev"))
	eventually(w.t, "the queue is empty", func() bool { return w.queue.Len() == 0 })
}

func TestRestartsWhatRunsTheImage(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/container", fake.Spec{Image: apiDev})
	kube.Create("b/init", fake.Spec{Image: "nginx", Init: apiDev})
	kube.Create("c/volume", fake.Spec{Image: "nginx", Volume: apiDev})
	kube.Create("d/other-tag", fake.Spec{Image: "ghcr.io/acme/api:main"})
	kube.Create("d/other-name", fake.Spec{Image: "ghcr.io/acme/api-gateway:dev"})
	kube.Create("d/pinned", fake.Spec{Image: apiDev + "@sha256:" + strings.Repeat("a", 64)})
	kube.Create("d/deleting", fake.Spec{Image: apiDev, Deleting: true})
	w := startTestWorker(t, kube)

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
	want := `{"metadata":{"resourceVersion":"101"},"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"` + at + `"}}}}}`
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
	kube := newKubeAPI(t)
	for i := range 100 {
		kube.Create(fmt.Sprintf("a/api-%d", i), fake.Spec{Image: apiDev})
	}
	w := startTestWorker(t, kube)
	at := w.publish(apiDev)
	for i := range 100 {
		w.awaitRestart(fmt.Sprintf("a/api-%d", i), at)
	}
}

func TestCanonicalMatching(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/short", fake.Spec{Image: "nginx"})
	kube.Create("a/host", fake.Spec{Image: "docker.io/nginx:latest"})
	kube.Create("a/index", fake.Spec{Image: "index.docker.io/library/nginx"})
	w := startTestWorker(t, kube)
	w.prefixes = imagePrefixes{"docker.io/library"}
	at := w.publish("docker.io/library/nginx:latest")
	for _, key := range []string{"a/short", "a/host", "a/index"} {
		w.awaitRestart(key, at)
	}
}

func TestPullPolicyWarning(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/cached", fake.Spec{Image: apiDev, Policy: "IfNotPresent"})
	w := startTestWorker(t, kube)
	w.awaitRestart("a/cached", w.publish(apiDev))
	eventually(t, "the warning is logged", func() bool {
		return w.logs.has(`"level":"WARN"`, `"msg":"restarted"`, "imagePullPolicy IfNotPresent")
	})
}

func TestPausedIsDeferred(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/paused", fake.Spec{Image: apiDev, Paused: true})
	w := startTestWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "the pause is logged", func() bool { return w.logs.has(`"msg":"not restarted"`, `"reason":"paused"`, at) })
	w.settled()
	if n := len(kube.Patches("a/paused")); n != 0 {
		t.Fatalf("a paused Deployment was patched %d times", n)
	}
	kube.Change("a/paused", func(o map[string]any) { child(o, "spec")["paused"] = false })
	w.awaitRestart("a/paused", at)
}

// A Deployment that nobody heard of in time is owed the restart all the same.
func TestNewToTheCache(t *testing.T) {
	kube := newKubeAPI(t)
	w := startTestWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "the request is known", func() bool { return w.logs.has(`"msg":"requested"`, at) })

	kube.Create("a/seen-late", fake.Spec{Image: apiDev, Created: time.Now().Add(-time.Hour)})
	w.awaitRestart("a/seen-late", at)

	kube.Create("a/created-later", fake.Spec{Image: apiDev, Created: time.Now().Add(2 * time.Minute)})
	w.settled()
	if n := len(kube.Patches("a/created-later")); n != 0 {
		t.Errorf("a Deployment created after the request was patched %d times", n)
	}

	// A watch that was broken is made up for by the relist.
	kube.ChangeUnseen(func() {
		kube.Create("a/unseen", fake.Spec{Image: apiDev})
		kube.Create("a/seen-late", fake.Spec{Image: apiDev})
		kube.Delete("a/created-later")
	})
	kube.BreakWatches()
	w.awaitRestart("a/unseen", at)
	w.awaitRestart("a/seen-late", at)
	if d := w.cache.get(types.NamespacedName{Namespace: "a", Name: "created-later"}); d != nil {
		t.Error("what is gone after a relist is still in the cache")
	}
}

// What an announcement was offered to is restarted whatever the clocks say,
// also if it takes several tries and the Deployment changes meanwhile.
func TestRetryKeepsTheRule(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, Created: time.Now().Add(time.Hour)}) // by an API server's clock
	var fails atomic.Bool
	fails.Store(true)
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		if fails.Load() {
			return 500, nil
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "it was tried", func() bool { return len(kube.Patches("a/api")) > 0 })
	kube.Change("a/api", func(o map[string]any) { o["status"] = map[string]any{"replicas": 1} })
	eventually(t, "the cache has the change", func() bool { return w.cache.running(apiDev)[0].ResourceVersion == "102" })
	fails.Store(false)
	w.awaitRestart("a/api", at)
}

// While a restart fails, requests go on coming in: the newest is what it ends
// at, an older one that comes late replaces nothing, and one for an image that
// is pinned does not count.
func TestNewestOfSeveralWhileItFails(t *testing.T) {
	kube := newKubeAPI(t)
	const initDev, webDev = "ghcr.io/acme/init:dev", "ghcr.io/acme/web:dev"
	kube.Create("a/api", fake.Spec{Image: apiDev, Init: initDev, Volume: webDev + "@sha256:" + strings.Repeat("a", 64)})
	var fails atomic.Bool
	fails.Store(true)
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		if fails.Load() {
			return 500, nil
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	now := time.Now().UnixMicro()
	for _, e := range []event{{apiDev, now - 3}, {initDev, now - 1}, {apiDev, now - 2}, {initDev, now - 4}, {webDev, now}} {
		w.valkey.Publish("krt", fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, e.Image, e.RequestedAt))
	}
	eventually(t, "all are heard", func() bool { return w.logs.has(`"msg":"not restarted"`, "pinned", webDev) })
	fails.Store(false)
	w.awaitRestart("a/api", formatTime(now-1))
	w.settled()
	if applied := kube.Applied("a/api"); len(applied) != 1 {
		t.Errorf("restarted at %v", applied)
	}
}

// Removing the annotation, as GitOps tools do, triggers nothing: not by itself,
// and not when the watch is broken and the catch-up is read again.
func TestGitOpsIsNotFought(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube)
	w.awaitRestart("a/api", w.publish(apiDev))
	kube.Change("a/api", func(o map[string]any) {
		delete(child(child(child(o, "spec"), "template"), "metadata"), "annotations")
	})
	kube.BreakWatches()
	eventually(t, "the watch is back", func() bool { return kube.Watchers() > 0 })
	w.catchUpSoon()
	w.settled()
	if n := len(kube.Patches("a/api")); n != 1 {
		t.Errorf("patched %d times instead of once", n)
	}
}

func TestCatchUp(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.Create("a/web", fake.Spec{Image: "ghcr.io/acme/web:dev"})
	kube.Create("a/nginx", fake.Spec{Image: "nginx"})
	m, cfg := testValkey(t)
	pub, err := newPublisher(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer pub.close()
	at, heard, err := pub.publish(t.Context(), []string{apiDev})
	if err != nil || heard != 0 {
		t.Fatalf("published to %d subscribers, %v", heard, err)
	}
	// Out of the window, of another prefix, and no reference at all.
	m.ZAdd("krt:requested", float64(time.Now().Add(-2*time.Hour).UnixMicro()), "ghcr.io/acme/web:dev")
	m.ZAdd("krt:requested", float64(time.Now().UnixMicro()), "docker.io/library/nginx:latest")
	m.ZAdd("krt:requested", float64(time.Now().UnixMicro()), "NOT A REFERENCE")
	for i, score := range []float64{float64(time.Now().Add(25 * time.Hour).UnixMicro()), 1e300, math.Inf(1)} {
		m.ZAdd("krt:requested", score, fmt.Sprintf("ghcr.io/acme/far-%d:dev", i))
	}

	w := startWorkerOn(t, kube, m, cfg)
	w.awaitRestart("a/api", formatTime(at))
	w.settled()
	if n := len(kube.Patches("a/web")); n != 0 {
		t.Errorf("what was asked for before the window was patched %d times", n)
	}
	if n := len(kube.Patches("a/nginx")); n != 0 {
		t.Errorf("what is under no prefix was patched %d times", n)
	}
	w.mu.Lock()
	if _, ok := w.requests["ghcr.io/acme/web:dev"]; ok || len(w.requests) != 2 {
		t.Errorf("remembered %v", w.requests)
	}
	w.mu.Unlock()
	for range 3 {
		w.catchUpSoon()
		w.settled()
	}
	if n := len(kube.Patches("a/api")); n != 1 {
		t.Errorf("caught up %d times instead of once", n)
	}
}

// WORKER_CATCH_UP=0 reads nothing back.
func TestNoCatchUp(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	m, cfg := testValkey(t)
	m.ZAdd("krt:requested", float64(time.Now().UnixMicro()), apiDev)
	w := startWorkerOn(t, kube, m, cfg, func(c *workerConfig) { c.CatchUp = 0 })
	eventually(t, "worker is ready", func() bool { return w.ready() == nil })
	w.settled()
	if n := len(kube.Patches("a/api")); n != 0 {
		t.Errorf("patched %d times", n)
	}
	// What is older than it is retried is forgotten all the same.
	w.note(event{apiDev, time.Now().Add(-3 * time.Hour).UnixMicro()}, time.Time{})
	w.catchUpSoon()
	eventually(t, "it is forgotten", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		_, ok := w.requests[apiDev]
		return !ok
	})
}

func TestFailedPatchIsRetried(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.Create("a/broken", fake.Spec{Image: apiDev})
	var mu sync.Mutex
	answers := []int{500, 409, 503, 422, 403}
	broken := true
	kube.OnPatch = func(call fake.PatchCall) (int, http.Header) {
		mu.Lock()
		defer mu.Unlock()
		if call.Key == "a/broken" && broken {
			return 500, nil
		}
		if call.Key == "a/api" && len(answers) > 0 {
			code := answers[0]
			answers = answers[1:]
			return code, nil
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	at := w.publish(apiDev)
	w.awaitRestart("a/api", at) // whatever becomes of a/broken
	if n := len(kube.Patches("a/api")); n != 6 {
		t.Errorf("a/api was patched %d times instead of 6", n)
	}
	if !w.logs.has(`"msg":"restart failed, trying again"`, `"deployment":"broken"`) {
		t.Error("the failure is not logged")
	}
	mu.Lock()
	broken = false
	mu.Unlock()
	w.awaitRestart("a/broken", at)
}

// A 429 is not answered with more load before its Retry-After is over, not for a
// newer request either.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	var mu sync.Mutex
	var times []time.Time
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		mu.Lock()
		defer mu.Unlock()
		times = append(times, time.Now())
		if len(times) == 1 {
			return 429, http.Header{"Retry-After": {"1"}}
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	w.publish(apiDev)
	eventually(t, "it is refused", func() bool { return w.logs.has("restart failed") })
	w.awaitRestart("a/api", w.publish(apiDev))
	mu.Lock()
	defer mu.Unlock()
	if len(times) != 2 || times[1].Sub(times[0]) < time.Second {
		t.Errorf("patched at %v, with Retry-After: 1", times)
	}
	// It waited in the queue, not in the client, where it would occupy a place.
	if !w.logs.has("restart failed", "429", "Retry-After: 1s") {
		t.Error("the refusal is not logged")
	}
}

// An older backoff does not come before a Retry-After.
func TestRetryAfterAndBackoff(t *testing.T) {
	t.Parallel()
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	var mu sync.Mutex
	var times []time.Time
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		mu.Lock()
		defer mu.Unlock()
		times = append(times, time.Now())
		switch len(times) {
		case 1, 2, 3, 4, 5, 6: // the next try is 640 ms away
			return 500, nil
		case 7:
			return 429, http.Header{"Retry-After": {"2"}}
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	tries := func() int { mu.Lock(); defer mu.Unlock(); return len(times) }
	w.publish(apiDev)
	eventually(t, "six tries", func() bool { return tries() == 6 })
	w.awaitRestart("a/api", w.publish(apiDev)) // tried at once
	mu.Lock()
	defer mu.Unlock()
	if len(times) != 8 || times[7].Sub(times[6]) < 2*time.Second {
		t.Errorf("patched at %v", times)
	}
}

// A 404 need not come from the API server. What is really deleted, the watch says.
func TestNotFound(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	var n atomic.Int32
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		if n.Add(1) < 8 {
			return 404, nil
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	w.awaitRestart("a/api", w.publish(apiDev))
	if !w.logs.has(`"level":"WARN"`, "restart failed", `"deployment":"api"`) {
		t.Error("it is not logged")
	}
}

// Retries that hang leave places for others.
func TestHangingRetries(t *testing.T) {
	kube := newKubeAPI(t)
	for i := range 8 {
		kube.Create(fmt.Sprintf("bad/api-%d", i), fake.Spec{Image: apiDev})
	}
	kube.Create("good/web", fake.Spec{Image: "ghcr.io/acme/web:dev"})
	release := make(chan struct{})
	defer close(release)
	var mu sync.Mutex
	tried := map[string]bool{}
	var hanging atomic.Int32
	kube.OnPatch = func(c fake.PatchCall) (int, http.Header) {
		mu.Lock()
		again := tried[c.Key]
		tried[c.Key] = true
		mu.Unlock()
		if c.Key == "good/web" {
			return 0, nil
		}
		if again {
			hanging.Add(1)
			<-release
		}
		return 500, nil
	}
	w := startTestWorker(t, kube) // four places
	w.publish(apiDev)
	eventually(t, "retries hang", func() bool { return hanging.Load() == 2 })
	begun := time.Now()
	w.awaitRestart("good/web", w.publish("ghcr.io/acme/web:dev"))
	if took := time.Since(begun); took > patchTimeout/2 {
		t.Errorf("it waited for %s", took)
	}
}

// One restart for all images that were missed, by the newest.
func TestCatchUpOfSeveralImages(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, Init: "ghcr.io/acme/init:dev", Volume: "ghcr.io/acme/volume:dev"})
	w := startTestWorker(t, kube)
	now := time.Now().UnixMicro()
	for i, image := range []string{"ghcr.io/acme/init:dev", apiDev, "ghcr.io/acme/volume:dev"} {
		if _, err := w.valkey.ZAdd("krt:requested", float64(now+int64(i)), image); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 9000 { // so that it takes a while to get from one to the next
		if _, err := w.valkey.ZAdd("krt:requested", float64(now), fmt.Sprintf("ghcr.io/acme/x-%d:dev", i)); err != nil {
			t.Fatal(err)
		}
	}
	w.catchUpSoon()
	w.awaitRestart("a/api", formatTime(now+2))
	w.settled()
	if got := kube.Applied("a/api"); len(got) != 1 {
		t.Errorf("restarted at %q", got)
	}
}

// Valkey's clock went back by more than the window. What was announced is
// restarted all the same, also by a worker that never reads that clock.
func TestClocksApart(t *testing.T) {
	for _, catchUp := range []time.Duration{time.Hour, 0} {
		kube := newKubeAPI(t)
		kube.Create("a/api", fake.Spec{Image: apiDev})
		w := startTestWorker(t, kube, func(c *workerConfig) { c.CatchUp = catchUp })
		w.valkey.SetTime(time.Now().Add(-2 * time.Hour))
		w.awaitRestart("a/api", w.publish(apiDev))
	}
}

// Valkey's clock was days ahead for a while. What was asked for meanwhile does
// not swallow what is asked for later.
func TestClockWasAhead(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube)
	set := func(to time.Time) {
		w.valkey.SetTime(to)
		w.catchUpSoon()
		eventually(t, "the clock is known", func() bool { return w.clock().Sub(to).Abs() < time.Minute })
	}
	const other = "ghcr.io/acme/paused:dev"
	kube.Create("a/paused", fake.Spec{Image: other, Paused: true})
	set(time.Now().Add(40 * 24 * time.Hour))
	w.publish(other)
	w.awaitRestart("a/api", w.publish(apiDev))
	set(time.Now())
	w.awaitRestart("a/api", w.publish(apiDev))
	kube.Change("a/paused", func(o map[string]any) { delete(child(o, "spec"), "paused") })
	w.settled()
	if at := kube.RestartedAt("a/paused"); at != "" {
		t.Errorf("restarted at %s", at)
	}
	w.awaitRestart("a/paused", w.publish(other))
}

// The newer T wins, whatever order the two arrive in.
func TestNewerRequestWins(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/both", fake.Spec{Image: apiDev, Init: "ghcr.io/acme/init:dev"})
	w := startTestWorker(t, kube)
	now := time.Now().UnixMicro()
	newer := fmt.Sprintf(`{"image":"ghcr.io/acme/init:dev","requestedAt":%d}`, now)
	older := fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, apiDev, now-1000)
	w.valkey.Publish("krt", newer)
	w.awaitRestart("a/both", formatTime(now))
	eventually(t, "the cache knows", func() bool { return w.cache.running(apiDev)[0].restartedAt == formatTime(now) })
	w.valkey.Publish("krt", older)
	w.settled()
	if n := len(kube.Patches("a/both")); n != 1 || kube.RestartedAt("a/both") != formatTime(now) {
		t.Errorf("patched %d times, restartedAt %s", n, kube.RestartedAt("a/both"))
	}
}

// A worker that works from an outdated record is refused by the API server, and
// does not put an older T over a newer one.
func TestOutdatedRecord(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	newer := formatTime(time.Now().Add(time.Second).UnixMicro())
	overtaken := false
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		if !overtaken { // another worker is faster by a hair
			overtaken = true
			kube.Change("a/api", func(o map[string]any) {
				child(child(o, "spec"), "template")["metadata"] = map[string]any{"annotations": map[string]any{restartedAtAnnotation: newer}}
			})
		}
		return 0, nil
	}
	w := startTestWorker(t, kube)
	w.publish(apiDev)
	eventually(t, "it looks again", func() bool { return w.logs.has("changed meanwhile", `"deployment":"api"`) })
	w.settled()
	if at := kube.RestartedAt("a/api"); at != newer {
		t.Errorf("restartedAt is %s; the newer %s was overwritten", at, newer)
	}
}

// A Deployment whose record was outdated is patched as soon as the watch brings
// the newer one, however long the backoff has become.
func TestConflictIsRetriedWhenTheWatchCatchesUp(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube)
	key := types.NamespacedName{Namespace: "a", Name: "api"}
	for range 20 {
		w.backoff.When(key) // the next wait is maxBackoff, longer than this test
	}
	kube.ChangeUnseen(func() {
		kube.Change("a/api", func(map[string]any) {})
	})
	at := w.publish(apiDev)
	eventually(t, "the outdated record is refused", func() bool { return w.logs.has("changed meanwhile", `"deployment":"api"`) })
	kube.Change("a/api", func(o map[string]any) { o["status"] = map[string]any{"replicas": 1} })
	w.awaitRestart("a/api", at)
}

// A list that is streamed for longer than watchDelay is not taken for a dead
// watch, whatever is patched meanwhile.
func TestSlowRelist(t *testing.T) {
	t.Parallel()
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	var slow atomic.Bool
	var begun atomic.Int32
	kube.Front = func(w http.ResponseWriter, r *http.Request) bool {
		if slow.Load() && r.URL.Query().Get("sendInitialEvents") == "true" {
			begun.Add(1)
			kube.ServeHTTP(slowEnd{w, watchDelay + 2*time.Second}, r)
			return true
		}
		return false
	}
	w := startTestWorker(t, kube)
	slow.Store(true)
	kube.BreakWatches()
	eventually(t, "the list is begun", func() bool { return begun.Load() == 1 })
	kube.Create("a/late", fake.Spec{Image: "ghcr.io/acme/late:dev"})
	late := w.publish("ghcr.io/acme/late:dev")
	w.awaitRestart("a/api", w.publish(apiDev)) // from the record that worker has
	api := w.publish(apiDev)                   // refused until the list is complete
	w.awaitRestart("a/late", late)
	w.awaitRestart("a/api", api)
	if n := begun.Load(); n != 1 || w.logs.has("missed a change") {
		t.Errorf("the list was begun %d times", n)
	}
}

// slowEnd delays the end of a streamed list.
type slowEnd struct {
	http.ResponseWriter
	delay time.Duration
}

func (s slowEnd) Flush() { s.ResponseWriter.(http.Flusher).Flush() }

func (s slowEnd) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("initial-events-end")) {
		s.Flush()
		time.Sleep(s.delay)
	}
	return s.ResponseWriter.Write(p)
}

// A watch that is never begun is given up.
func TestHangingWatch(t *testing.T) {
	t.Parallel()
	kube := newKubeAPI(t)
	kube.PagedOnly = false // after the hanging watch, the reflector asks for all at once
	kube.Create("a/api", fake.Spec{Image: apiDev})
	var hang, hung atomic.Bool
	kube.Front = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("watch") != "true" || !hang.CompareAndSwap(true, false) {
			return false
		}
		hung.Store(true)
		<-r.Context().Done()
		return true
	}
	w := startTestWorker(t, kube)
	hang.Store(true)
	kube.BreakWatches()
	eventually(t, "it hangs", hung.Load)
	kube.Create("a/late", fake.Spec{Image: apiDev})
	at := w.publish(apiDev)
	w.awaitRestart("a/api", at)
	time.Sleep(requestLimit)
	w.awaitRestart("a/late", at)
}

// Two workers, of which one is slow, and a GitOps tool that takes the annotation
// away: the slow one does not put it back.
func TestGitOpsAndTwoWorkers(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	var n atomic.Int32
	both, stripped := make(chan struct{}), make(chan struct{})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		switch n.Add(1) {
		case 1:
			<-both
		case 2:
			close(both)
			<-stripped
		}
		return 0, nil
	}
	a := startTestWorker(t, kube)
	b := startWorkerOn(t, kube, a.valkey, valkeyConfig{Addr: a.valkey.Addr(), Channel: "krt"})
	eventually(t, "both are ready", func() bool { return b.ready() == nil })
	a.awaitRestart("a/api", a.publish(apiDev))
	for _, w := range []*testWorker{a, b} {
		eventually(t, "both have seen it", func() bool { return !w.cache.running(apiDev)[0].restarted.IsZero() })
	}
	kube.Change("a/api", func(o map[string]any) {
		delete(child(child(child(o, "spec"), "template"), "metadata"), "annotations")
	})
	close(stripped)
	for _, w := range []*testWorker{a, b} {
		eventually(t, "one was refused", func() bool { return a.logs.has("changed meanwhile") || b.logs.has("changed meanwhile") })
		eventually(t, "and has looked again", func() bool { return w.queue.NumRequeues(types.NamespacedName{Namespace: "a", Name: "api"}) == 0 })
	}
	if got := kube.Applied("a/api"); len(got) != 1 {
		t.Errorf("restarted at %q", got)
	}
}

func lagWatches(kube *fake.KubernetesAPI, lag time.Duration) {
	kube.Lock()
	defer kube.Unlock()
	kube.Lag = func() time.Duration { return lag }
}

// A watch that no longer brings what worker itself has changed is begun anew.
func TestDeafWatch(t *testing.T) {
	t.Parallel()
	for _, namespaces := range [][]string{nil, {"a"}} {
		kube := newKubeAPI(t)
		kube.Create("a/api", fake.Spec{Image: apiDev})
		w := startTestWorker(t, kube, func(c *workerConfig) { c.Namespaces = namespaces })
		if watchers := kube.Watchers(); watchers != 1 {
			t.Fatalf("%d watches", watchers)
		}
		lagWatches(kube, time.Hour) // the streams stay open, and bring nothing more
		w.awaitRestart("a/api", w.publish(apiDev))
		lagWatches(kube, 0)
		at := w.publish(apiDev) // from an outdated record, so it is refused
		w.awaitRestart("a/api", at)
		if !w.logs.has(`"level":"WARN"`, "the watch has missed a change") {
			t.Error("the dead watch is not logged")
		}
	}
}

// A Deployment that came to run the image while the watch was blind was not
// offered the request. It gets its restart when the watch goes on, or after a
// new list; with a watch that is well, a new image alone restarts nothing.
func TestNewImageDuringAGap(t *testing.T) {
	t.Parallel()
	const other = "ghcr.io/acme/other:dev"
	run := func(image string) func(map[string]any) {
		return func(o map[string]any) {
			child(child(child(o, "spec"), "template"), "spec")["containers"] = []any{map[string]any{"name": "main", "image": image, "imagePullPolicy": "Always"}}
		}
	}
	start := func() (*fake.KubernetesAPI, *testWorker) {
		kube := newKubeAPI(t)
		kube.Create("a/api", fake.Spec{Image: apiDev})
		kube.Create("a/other", fake.Spec{Image: "ghcr.io/acme/other:v1"})
		return kube, startTestWorker(t, kube)
	}
	for name, end := range map[string]func(kube *fake.KubernetesAPI, w *testWorker){
		"a new list":        func(kube *fake.KubernetesAPI, _ *testWorker) { kube.BreakWatches() },
		"the watch goes on": func(_ *fake.KubernetesAPI, w *testWorker) { w.publish(apiDev) }, // which shows that it is dead
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			kube, w := start()
			if name == "a new list" {
				kube.ChangeUnseen(func() { kube.Change("a/other", run(other)) })
			} else {
				lagWatches(kube, time.Hour)
				kube.Change("a/other", run(other))
				lagWatches(kube, 0)
			}
			at := w.publish(other)
			eventually(t, "it was heard", func() bool { return w.logs.has(`"msg":"requested"`, at) })
			end(kube, w)
			w.awaitRestart("a/other", at)
		})
	}
	t.Run("no gap", func(t *testing.T) {
		t.Parallel()
		kube, w := start()
		at := w.publish(other)
		eventually(t, "it was heard", func() bool { return w.logs.has(`"msg":"requested"`, at) })
		kube.Change("a/other", run(other))
		eventually(t, "the cache knows", func() bool { return len(w.cache.running(other)) == 1 })
		w.settled()
		if at := kube.RestartedAt("a/other"); at != "" {
			t.Errorf("restarted at %s", at)
		}
	})
}

// One that does is left alone.
func TestHealthyWatch(t *testing.T) {
	t.Parallel()
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube)
	w.awaitRestart("a/api", w.publish(apiDev))
	time.Sleep(watchDelay + time.Second)
	if w.logs.has("missed a change") {
		t.Error("a watch that is alive was taken for dead")
	}
}

// Events for two images of one Deployment cross each other in three workers on
// a slow API: restartedAt only ever grows, and ends at the newest.
func TestCrossingEventsInThreeWorkers(t *testing.T) {
	kube := newKubeAPI(t)
	const initDev = "ghcr.io/acme/init:dev"
	kube.Create("a/both", fake.Spec{Image: apiDev, Init: initDev})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		time.Sleep(rand.N(20 * time.Millisecond))
		return 0, nil
	}
	first := startTestWorker(t, kube)
	cfg := valkeyConfig{Addr: first.valkey.Addr(), Channel: "krt"}
	for range 2 {
		w := startWorkerOn(t, kube, first.valkey, cfg)
		eventually(t, "worker is ready", func() bool { return w.ready() == nil })
	}
	var newest string
	for i := range 40 {
		newest = max(newest, first.publish([]string{apiDev, initDev}[i%2]))
		time.Sleep(rand.N(4 * time.Millisecond))
	}
	first.awaitRestart("a/both", newest)
	first.settled()
	applied := kube.Applied("a/both")
	if !slices.IsSorted(applied) || len(slices.Compact(slices.Clone(applied))) != len(applied) || applied[len(applied)-1] != newest {
		t.Errorf("restartedAt went %v; the newest request is of %s", applied, newest)
	}
}

// Catching up takes as long as there are images on record; an event does not.
func BenchmarkCatchUp(b *testing.B) {
	for _, recorded := range []int{1_000, 10_000} {
		b.Run(fmt.Sprint(recorded), func(b *testing.B) {
			m := miniredis.RunT(b)
			now := time.Now().UnixMicro()
			for i := range recorded {
				m.ZAdd("krt:requested", float64(now+int64(i)), fmt.Sprintf("ghcr.io/acme/api-%d:dev", i))
			}
			log := slog.New(slog.DiscardHandler)
			source, err := newSubscriber(valkeyConfig{Addr: m.Addr(), Channel: "krt"}, log)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(source.close)
			for b.Loop() {
				w := newWorker(workerConfig{CatchUp: time.Hour}, imagePrefixes{"ghcr.io/acme"}, nil, source, log, time.Now)
				if err := w.catchUp(b.Context()); err != nil || len(w.requests) != recorded {
					b.Fatalf("%d of %d, %v", len(w.requests), recorded, err)
				}
				w.queue.ShutDown()
			}
		})
	}
}

func TestHandWrittenMessageMeansNow(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube)
	before := time.Now()
	w.valkey.Publish("krt", `{"image":"ghcr.io/acme/api:dev"}`)
	eventually(t, "it is restarted", func() bool { return kube.RestartedAt("a/api") != "" })
	at, err := time.Parse(restartedAtLayout, kube.RestartedAt("a/api"))
	if err != nil || at.Before(before.Add(-time.Second)) || at.After(time.Now().Add(time.Second)) {
		t.Errorf("restartedAt %s", kube.RestartedAt("a/api"))
	}

	// Now is what Valkey's clock says.
	ahead := time.Now().Add(2 * time.Hour)
	w.valkey.SetTime(ahead)
	w.catchUpSoon()
	eventually(t, "the clock is known", func() bool { return w.clock().After(ahead.Add(-time.Minute)) })
	w.valkey.Publish("krt", `{"image":"ghcr.io/acme/api:dev"}`)
	eventually(t, "it is restarted", func() bool { return kube.RestartedAt("a/api") > formatTime(ahead.Add(-time.Minute).UnixMicro()) })
}

// Valkey is a trust boundary: what is not as web would have sent it is ignored.
func TestHostileMessages(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.Create("a/nginx", fake.Spec{Image: "nginx"})
	w := startTestWorker(t, kube)
	for _, message := range []string{
		``, `null`, `{}`, `[]`, `"x"`, `{"image":1}`, `{"IMAGE":"ghcr.io/acme/api:dev"}`,
		`{"image":"ghcr.io/acme/api:dev","image":"ghcr.io/acme/api:dev"}`,
		`{"image":"ghcr.io/acme/api:dev"} {}`, `{"image":"ghcr.io/acme/api:dev","x":1}`,
		`{"image":"ghcr.io/acme/api:dev","requestedAt":-1}`, `{"image":"ghcr.io/acme/api:dev","requestedAt":1.5}`,
		`{"image":"ghcr.io/acme/api:dev","requestedAt":"1"}`, `{"image":"ghcr.io/acme/api:dev","requestedAt":99999999999999999999}`,
		fmt.Sprintf(`{"image":"ghcr.io/acme/api:dev","requestedAt":%d}`, time.Now().Add(25*time.Hour).UnixMicro()),
		`{"image":"nginx:latest"}`, `{"image":"ghcr.io/acme/api"}`, `{"image":"ghcr.io/acme/../evil:dev"}`,
		`{"image":"ghcr.io/acme/api:dev"` + strings.Repeat(" ", maxEventBytes) + `}`,
		"{\"image\":\"ghcr.io/acme/api:dev\xff\"}", `{"image":"` + strings.Repeat("a", 2000) + `"}`,
	} {
		w.valkey.Publish("krt", message)
	}
	w.settled()
	for _, key := range []string{"a/api", "a/nginx"} {
		if calls := kube.Patches(key); len(calls) > 0 {
			t.Errorf("%s was patched: %v", key, calls)
		}
	}
	if n := strings.Count(w.logs.String(), `"msg":"message ignored"`); n != 21 {
		t.Errorf("%d of 21 messages are logged as ignored", n)
	}
}

func TestNamespacesAndSelector(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Selector = "team=payments"
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.Create("b/api", fake.Spec{Image: apiDev})
	kube.Create("c/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube, func(c *workerConfig) {
		c.Namespaces, c.Selector = []string{"a", "b", "ghcr-probe"}, "team=payments"
	})
	at := w.publish(apiDev)
	w.awaitRestart("a/api", at)
	w.awaitRestart("b/api", at)
	w.settled()
	if n := len(kube.Patches("c/api")); n != 0 {
		t.Errorf("a Deployment out of scope was patched %d times", n)
	}
}

func TestForbiddenScope(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Forbid = func(_, namespace string) bool { return namespace == "b" }
	m, cfg := testValkey(t)
	w := startWorkerOn(t, kube, m, cfg, func(c *workerConfig) { c.Namespaces = []string{"a", "b"} })
	eventually(t, "the worker gives up", w.queue.ShuttingDown)
	err := w.stop()
	for _, part := range []string{"RBAC forbids", "watch deployments.apps", "namespace b"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error %v does not say %q", err, part)
		}
	}
}

// A patch that is on its way when worker is stopped is finished, and what was
// not begun is left to the next worker.
func TestStopFinishesThePatchInFlight(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/first", fake.Spec{Image: apiDev})
	kube.Create("a/second", fake.Spec{Image: apiDev})
	arrived, release := make(chan string, 2), make(chan struct{})
	kube.OnPatch = func(call fake.PatchCall) (int, http.Header) {
		arrived <- call.Key
		<-release
		return 0, nil
	}
	w := startTestWorker(t, kube, func(c *workerConfig) { c.Concurrency = 1 })
	at := w.publish(apiDev)
	inFlight := <-arrived
	stopped := make(chan error)
	go func() { stopped <- w.stop() }()
	eventually(t, "the queue is shut down", func() bool { return w.queue.ShuttingDown() })
	close(release)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if kube.RestartedAt(inFlight) != at {
		t.Errorf("the patch of %s was cut off", inFlight)
	}
	if n := len(kube.Patches("")); n != 1 || w.logs.has("restart failed") {
		t.Errorf("%d patches were sent, 1 was in flight", n)
	}
	kube.Lock()
	kube.OnPatch = nil
	kube.Unlock()
	startWorkerOn(t, kube, w.valkey, valkeyConfig{Addr: w.valkey.Addr(), Channel: "krt"})
	for _, key := range []string{"a/first", "a/second"} {
		w.awaitRestart(key, at)
		if n := len(kube.Patches(key)); n != 1 {
			t.Errorf("%s was patched %d times", key, n)
		}
	}
}

func TestGiveUp(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) { return 500, nil }
	w := startTestWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "it failed", func() bool { return len(kube.Patches("a/api")) > 3 })
	w.passed.Store(int64(61 * time.Minute))
	eventually(t, "it is given up", func() bool { return w.logs.has(`"level":"ERROR"`, "gave up", `"deployment":"api"`, at) })
	tries := len(kube.Patches("a/api"))
	time.Sleep(50 * time.Millisecond)
	if n := len(kube.Patches("a/api")); n != tries {
		t.Error("it is still patched")
	}
}

// Where lists cannot be streamed they are read page by page.
func TestWithoutStreamedLists(t *testing.T) {
	kube := newKubeAPI(t)
	kube.NoStreams = true
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startTestWorker(t, kube)
	w.awaitRestart("a/api", w.publish(apiDev))
	if len(kube.Lists()) == 0 {
		t.Error("nothing was listed")
	}
}

// An announcement counts for more than the record of the same T that catch-up
// found a moment before.
func TestAnnouncementAfterItsRecord(t *testing.T) {
	kube := newKubeAPI(t)
	kube.Create("a/api", fake.Spec{Image: apiDev, Created: time.Now().Add(time.Hour)}) // by an API server's clock
	w := startTestWorker(t, kube)
	at := time.Now().UnixMicro()
	w.note(event{apiDev, at}, time.Time{})
	w.settled()
	if n := len(kube.Patches("a/api")); n != 0 {
		t.Fatalf("patched %d times for a record older than the Deployment", n)
	}
	w.valkey.Publish("krt", fmt.Sprintf(`{"image":%q,"requestedAt":%d}`, apiDev, at))
	w.awaitRestart("a/api", formatTime(at))
}

func TestForgetBoundsMemory(t *testing.T) {
	w := startTestWorker(t, newKubeAPI(t))
	now := time.Now()
	w.note(event{apiDev, now.Add(-3 * time.Hour).UnixMicro()}, time.Time{})
	w.note(event{"ghcr.io/acme/web:dev", now.UnixMicro()}, time.Time{})
	w.forget(now)
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.requests["ghcr.io/acme/web:dev"]; !ok || len(w.requests) != 1 {
		t.Errorf("kept %v", w.requests)
	}
}

// The record is read with the newest first, and no more of it than web keeps.
func TestRecordedIsBounded(t *testing.T) {
	w := startTestWorker(t, newKubeAPI(t))
	now := time.Now().UnixMicro()
	for i := range maxRecorded + 5 {
		if _, err := w.valkey.ZAdd("krt:requested", float64(now-int64(i)), fmt.Sprintf("ghcr.io/acme/app-%d:dev", i)); err != nil {
			t.Fatal(err)
		}
	}
	events, _, err := w.source.recorded(t.Context(), time.Hour)
	if err != nil || len(events) != maxRecorded || events[0].RequestedAt != now || events[maxRecorded-1].RequestedAt != now-maxRecorded+1 {
		t.Errorf("%d events, %v", len(events), err)
	}
}

// Messages that web did not send cannot make worker remember without end.
func TestMemoryIsBounded(t *testing.T) {
	w := startTestWorker(t, newKubeAPI(t))
	at := time.Now().UnixMicro()
	for i := range 2*maxRecorded + 10 {
		w.note(event{fmt.Sprintf("ghcr.io/acme/app-%d:dev", i), at}, time.Now())
	}
	w.mu.Lock()
	if len(w.requests) != 2*maxRecorded {
		t.Errorf("%d images are remembered", len(w.requests))
	}
	w.mu.Unlock()
	w.note(event{"ghcr.io/acme/app-7:dev", at + 1}, time.Now())
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.requests["ghcr.io/acme/app-7:dev"].at != at+1 {
		t.Error("what is remembered already is no longer updated")
	}
}

func TestDecide(t *testing.T) {
	clock := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	at := clock.Add(-10 * time.Minute)
	local := func(d time.Duration) time.Time { return time.Unix(1000, 0).Add(d) } // worker's own clock
	ours := func(d time.Duration) string { return formatTime(at.Add(d).UnixMicro()) }
	foreign := func(d time.Duration) string { return at.Add(d).Format(time.RFC3339) }
	const message, catchUp = true, false
	for _, tt := range []struct {
		name        string
		announced   bool
		restartedAt string
		created     time.Duration // after T
		known       time.Duration // after the request was heard
		paused      bool
		deleting    bool
		age         time.Duration // of the request, if not ten minutes
		waited      time.Duration // since it was heard
		restarted   time.Duration // after T, the newest of ours that was seen; 0: none
		want        verdict
	}{
		{name: "message, never restarted", announced: message, created: -time.Hour, known: -1, want: verdictRestart},
		{name: "catch-up, never restarted", announced: catchUp, created: -time.Hour, want: verdictRestart},
		{name: "ours before T", announced: message, restartedAt: ours(-time.Microsecond), created: -time.Hour, known: -1, want: verdictRestart},
		{name: "ours equal to T: a retry", announced: message, restartedAt: ours(0), created: -time.Hour, known: -1, want: verdictSatisfied},
		{name: "ours after T: an older T never undoes a newer one", announced: message, restartedAt: ours(time.Microsecond), created: -time.Hour, known: -1, want: verdictSatisfied},
		{name: "ours in the future is on Valkey's clock", announced: catchUp, restartedAt: ours(time.Hour), created: -time.Hour, want: verdictSatisfied},
		{name: "ours a day ahead", announced: catchUp, restartedAt: ours(10*time.Minute + 24*time.Hour), created: -time.Hour, want: verdictSatisfied},
		{name: "ours more than a day ahead is nobody's", announced: catchUp, restartedAt: ours(10*time.Minute + 24*time.Hour + time.Microsecond), created: -time.Hour, want: verdictRestart},
		{name: "foreign before T", announced: message, restartedAt: foreign(-time.Second), created: -time.Hour, known: -1, want: verdictRestart},
		{name: "foreign equal to T", announced: catchUp, restartedAt: foreign(0), created: -time.Hour, want: verdictSatisfied},
		{name: "foreign between T and now", announced: message, restartedAt: foreign(time.Minute), created: -time.Hour, known: -1, want: verdictSatisfied},
		{name: "foreign now", announced: message, restartedAt: foreign(10 * time.Minute), created: -time.Hour, known: -1, want: verdictSatisfied},
		{name: "foreign from the future proves nothing", announced: message, restartedAt: foreign(10*time.Minute + time.Second), created: -time.Hour, known: -1, want: verdictRestart},
		{name: "foreign from the future, catch-up", announced: catchUp, restartedAt: foreign(time.Hour), created: -time.Hour, want: verdictRestart},
		{name: "foreign with an offset", announced: catchUp, restartedAt: at.In(time.FixedZone("", 3600)).Add(time.Minute).Format(time.RFC3339), created: -time.Hour, want: verdictSatisfied},
		{name: "milliseconds are not our form", announced: catchUp, restartedAt: at.Add(time.Hour).Format("2006-01-02T15:04:05.000Z"), created: -time.Hour, want: verdictRestart},
		{name: "microseconds with an offset are not our form", announced: catchUp, restartedAt: at.Add(time.Hour).Format("2006-01-02T15:04:05.000000") + "+00:00", created: -time.Hour, want: verdictRestart},
		{name: "garbage", announced: message, restartedAt: "yesterday", created: -time.Hour, known: -1, want: verdictRestart},
		{name: "message, created just after T by the API server's clock", announced: message, created: 30 * time.Second, known: -1, want: verdictRestart},
		{name: "message, created long after T by the API server's clock", announced: message, created: time.Hour, known: -1, want: verdictRestart},
		{name: "message, but the Deployment came later, created just after T", announced: message, created: 59 * time.Second, known: 1, want: verdictRestart},
		{name: "message, but the Deployment came later, created long after T", announced: message, created: 61 * time.Second, known: 1, want: verdictSatisfied},
		{name: "catch-up, created before T", announced: catchUp, created: -time.Second, want: verdictRestart},
		{name: "catch-up, created a minute after T", announced: catchUp, created: time.Minute, want: verdictRestart},
		{name: "catch-up, created long after T", announced: catchUp, created: 61 * time.Second, want: verdictSatisfied},
		{name: "paused", announced: message, created: -time.Hour, known: -1, paused: true, want: verdictPaused},
		{name: "paused, restarted already", announced: message, restartedAt: ours(0), created: -time.Hour, known: -1, paused: true, want: verdictSatisfied},
		{name: "deleted", announced: message, created: -time.Hour, known: -1, deleting: true, want: verdictDeleting},
		{name: "deleted while paused", announced: message, created: -time.Hour, known: -1, deleting: true, paused: true, want: verdictDeleting},
		{name: "ours was seen at T and is gone", announced: message, restarted: time.Microsecond, created: -time.Hour, known: -1, want: verdictSatisfied},
		{name: "ours was seen before T and is gone", announced: message, restarted: -time.Microsecond, created: -time.Hour, known: -1, want: verdictRestart},
		{name: "ours was seen ahead of the clock", announced: message, restarted: 12 * time.Minute, created: -time.Hour, known: -1, want: verdictRestart},
		{name: "at the edge of the window", announced: catchUp, created: -9 * time.Hour, age: time.Hour, want: verdictRestart},
		{name: "out of the window", announced: catchUp, created: -9 * time.Hour, age: time.Hour + 1000, want: verdictExpired},
		{name: "out of the window and paused", announced: catchUp, created: -9 * time.Hour, age: 2 * time.Hour, paused: true, want: verdictExpired},
		{name: "message, at the edge of the window", announced: message, created: -9 * time.Hour, known: -1, waited: time.Hour, want: verdictRestart},
		{name: "message, out of the window", announced: message, created: -9 * time.Hour, known: -1, waited: time.Hour + 1, want: verdictExpired},
		{name: "message, old by a clock that was set", announced: message, created: -9 * time.Hour, known: -1, age: 9 * time.Hour, want: verdictRestart},
		{name: "Valkey's clock went back", announced: message, created: -9 * time.Hour, known: -1, age: -time.Hour, want: verdictRestart},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requested := at
			if tt.age != 0 {
				requested = clock.Add(-tt.age)
			}
			seen := time.Time{}
			if tt.restarted != 0 {
				seen = at.Add(tt.restarted)
			}
			d := &deployment{restarted: seen, ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.NewTime(at.Add(tt.created))},
				restartedAt: tt.restartedAt, paused: tt.paused, known: local(tt.known)}
			if tt.deleting {
				d.DeletionTimestamp = &metav1.Time{Time: clock}
			}
			r := request{at: requested.UnixMicro()}
			if tt.announced {
				r.heard = local(0)
			}
			if got := decide(d, r, local(tt.waited), clock, time.Hour); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}
