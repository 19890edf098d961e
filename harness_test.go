package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/workqueue"

	"kuberollouttrigger/internal/fake"
)

const (
	apiDev  = "ghcr.io/acme/api:dev"
	initDev = "ghcr.io/acme/init:dev"
	webDev  = "ghcr.io/acme/web:dev"
)

// logBuffer collects log lines.
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

// has reports whether one line has all the parts.
func (b *logBuffer) has(parts ...string) bool { return b.count(parts...) > 0 }

// count returns the number of lines that have all the parts.
func (b *logBuffer) count(parts ...string) (n int) {
	for line := range strings.Lines(b.String()) {
		all := true
		for _, part := range parts {
			all = all && strings.Contains(line, part)
		}
		if all {
			n++
		}
	}
	return n
}

// eventually waits for what has to become true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within 10 s: %s", what)
}

// newKubernetes is an API server with Deployments that run apiDev.
func newKubernetes(t *testing.T, deployments ...string) *fake.KubernetesAPI {
	t.Helper()
	kube := fake.NewKubernetesAPI(func(format string, args ...any) { t.Errorf(format, args...) })
	t.Cleanup(kube.Close)
	for _, key := range deployments {
		kube.Create(key, fake.Spec{Image: apiDev})
	}
	return kube
}

// clientOf is made as the worker makes it, from a kubeconfig.
func clientOf(t *testing.T, kube *fake.KubernetesAPI) dynamic.Interface {
	t.Helper()
	client, err := newKubernetesClient(workerConfig{Kubeconfig: kube.Kubeconfig(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func testValkey(t testing.TB) (*miniredis.Miniredis, valkeyConfig) {
	t.Helper()
	m := miniredis.NewMiniRedis()
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m, valkeyConfig{Addr: m.Addr(), Channel: "krt"}
}

// testWorker is a running worker on a fake API server, and web's side of Valkey.
type testWorker struct {
	*worker
	t      *testing.T
	kube   *fake.KubernetesAPI
	valkey *miniredis.Miniredis
	logs   *logBuffer
	pub    *publisher
	ahead  atomic.Int64 // how far the worker's clock is moved, monotonic and wall
	stop   func() error
}

// startWorker starts a worker with a Valkey of its own and waits until it is
// ready. It retries quickly and has no restart interval unless adjusted.
func startWorker(t *testing.T, kube *fake.KubernetesAPI, adjust ...func(*workerConfig)) *testWorker {
	t.Helper()
	m, _ := testValkey(t)
	w := startWorkerOn(t, kube, m, adjust...)
	eventually(t, "the worker is ready", func() bool { return w.ready() == nil })
	return w
}

func startWorkerOn(t *testing.T, kube *fake.KubernetesAPI, m *miniredis.Miniredis, adjust ...func(*workerConfig)) *testWorker {
	t.Helper()
	w := newTestWorker(t, kube, m, adjust...)
	w.start()
	return w
}

func newTestWorker(t *testing.T, kube *fake.KubernetesAPI, m *miniredis.Miniredis, adjust ...func(*workerConfig)) *testWorker {
	t.Helper()
	cfg := valkeyConfig{Addr: m.Addr(), Channel: "krt"}
	logs := &logBuffer{}
	log := slog.New(slog.NewJSONHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	source, pub := newSubscriber(cfg, log), newPublisher(cfg, log)
	wc := workerConfig{Kinds: kinds[:1], CatchUp: time.Hour, Concurrency: 4, ClusterName: "test",
		ImagePrefixes: imagePrefixes{"ghcr.io/acme", "docker.io/library"}}
	for _, f := range adjust {
		f(&wc)
	}
	w := &testWorker{t: t, kube: kube, valkey: m, logs: logs, pub: pub}
	now := func() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }
	w.worker = newWorker(wc, clientOf(t, kube), source, log, now)
	w.backoff = workqueue.NewTypedItemExponentialFailureRateLimiter[string](5*time.Millisecond, 50*time.Millisecond)
	return w
}

// start runs the worker until stop, or the end of the test.
func (w *testWorker) start() {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	w.stop = sync.OnceValue(func() (err error) {
		cancel()
		select {
		case err = <-done:
		case <-time.After(15 * time.Second):
			err = errors.New("the worker did not stop")
		}
		w.source.close()
		w.pub.close()
		return err
	})
	w.t.Cleanup(func() {
		w.stop()
		if w.t.Failed() {
			w.t.Logf("the worker's log:\n%s", w.logs)
		}
	})
}

// publish requests images as web does and returns restartedAt.
func (w *testWorker) publish(images ...string) string {
	w.t.Helper()
	p, err := w.pub.publish(w.t.Context(), images, maxLedger)
	if err != nil {
		w.t.Fatal(err)
	}
	return formatTime(p.requestedAt)
}

// request publishes and waits until this worker has the request.
func (w *testWorker) request(image string) string {
	w.t.Helper()
	at := w.publish(image)
	eventually(w.t, "the worker has the request", func() bool { return w.logs.has(`"msg":"requested"`, image, at) })
	return at
}

func (w *testWorker) awaitRestart(key, at string) {
	w.t.Helper()
	eventually(w.t, key+" has restartedAt "+at, func() bool { return w.kube.RestartedAt(key) == at })
}

// settled waits until the worker has nothing left to do.
func (w *testWorker) settled() {
	w.t.Helper()
	const probe = "ghcr.io/acme/probe:dev"
	w.kube.Create("probe/probe", fake.Spec{Image: probe})
	eventually(w.t, "the probe is cached", func() bool { return len(w.cache.running(probe)) == 1 })
	w.awaitRestart("probe/probe", w.publish(probe))
	eventually(w.t, "the queue is empty", func() bool { return w.queue.Len() == 0 })
}

// setValkeyClock moves Valkey's clock and waits until the worker has read it.
func (w *testWorker) setValkeyClock(to time.Time) {
	w.t.Helper()
	w.valkey.SetTime(to)
	w.caughtUpAgain()
}

// caughtUpAgain waits for a catch-up that starts now.
func (w *testWorker) caughtUpAgain() {
	w.t.Helper()
	before := w.logs.count(`"msg":"caught up"`)
	w.requestCatchUp()
	eventually(w.t, "the worker has caught up", func() bool { return w.logs.count(`"msg":"caught up"`) > before })
}

// entry is what the cache has of a Deployment.
func (w *testWorker) entry(key string) *workload { return w.cache.get("Deployment/" + key) }

func (w *testWorker) patches(key string) int { return len(w.kube.Patches(key)) }

// setImage replaces the one container of a Deployment.
func setImage(image string) func(object map[string]any) {
	return func(object map[string]any) {
		pod := child(child(child(object, "spec"), "template"), "spec")
		pod["containers"] = []any{map[string]any{"name": "main", "image": image, "imagePullPolicy": "Always"}}
	}
}

func setPaused(paused bool) func(object map[string]any) {
	return func(object map[string]any) { child(object, "spec")["paused"] = paused }
}

func removeAnnotation(object map[string]any) {
	delete(child(child(child(object, "spec"), "template"), "metadata"), "annotations")
}

func setRestartedAt(at string) func(object map[string]any) {
	return func(object map[string]any) {
		child(child(object, "spec"), "template")["metadata"] = map[string]any{"annotations": map[string]any{restartedAtAnnotation: at}}
	}
}
