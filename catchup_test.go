package main

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"kuberollouttrigger/internal/fake"
)

func TestCatchUp(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	for key, image := range map[string]string{"a/api": apiDev, "a/web": webDev, "a/quay": "quay.io/acme/api:dev"} {
		kube.Create(key, fake.Spec{Image: image})
	}
	m, _ := testValkey(t)
	now := time.Now()
	zadd := func(image string, score float64) {
		if _, err := m.ZAdd("krt:requested", score, image); err != nil {
			t.Fatal(err)
		}
	}
	zadd(apiDev, float64(now.UnixMicro()))
	zadd(webDev, float64(now.Add(-2*time.Hour).UnixMicro())) // before the window
	zadd("quay.io/acme/api:dev", float64(now.UnixMicro()))   // under no prefix
	zadd("NOT A REFERENCE", float64(now.UnixMicro()))
	for i, score := range []float64{float64(now.Add(25 * time.Hour).UnixMicro()), 1e300, math.Inf(1)} {
		zadd(fmt.Sprintf("ghcr.io/acme/far-%d:dev", i), score)
	}
	w := startWorkerOn(t, kube, m)
	w.awaitRestart("a/api", formatTime(now.UnixMicro()))
	for range 3 {
		w.caughtUpAgain()
	}
	w.settled()
	if w.patches("a/web")+w.patches("a/quay") != 0 || w.patches("a/api") != 1 {
		t.Errorf("patched: %v", kube.Patches(""))
	}
}

// The window is the worker's, whatever Valkey's clock says meanwhile: what was
// requested half an hour ago counts, what was requested two hours ago does not.
func TestCatchUpWindow(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{0, 2 * time.Hour} {
		kube := newKubernetes(t, "a/api")
		kube.Create("a/init", fake.Spec{Image: initDev})
		m, _ := testValkey(t)
		recent, old := time.Now().Add(-50*time.Minute), time.Now().Add(-70*time.Minute)
		m.ZAdd("krt:requested", float64(recent.UnixMicro()), apiDev)
		m.ZAdd("krt:requested", float64(old.UnixMicro()), initDev)
		m.SetTime(time.Now().Add(ahead))
		w := startWorkerOn(t, kube, m)
		w.awaitRestart("a/api", formatTime(recent.UnixMicro()))
		w.settled()
		if w.patches("a/init") != 0 {
			t.Error("restarted for a request from before the window")
		}
	}
}

// A request that was caught up expires by when it was made, not by when it was read.
func TestCaughtUpExpires(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/paused", fake.Spec{Image: apiDev, Paused: true})
	m, _ := testValkey(t)
	m.ZAdd("krt:requested", float64(time.Now().Add(-50*time.Minute).UnixMicro()), apiDev)
	w := startWorkerOn(t, kube, m)
	eventually(t, "it is deferred", func() bool { return w.logs.has(`"reason":"paused"`, `"deployment":"paused"`) })
	w.ahead.Store(int64(11 * time.Minute))
	kube.Change("a/paused", setPaused(false))
	eventually(t, "it has expired", func() bool { return w.logs.has(`"reason":"expired"`, `"deployment":"paused"`) })
}

// WORKER_CATCH_UP=0 reads nothing from the ledger, and messages work.
func TestNoCatchUp(t *testing.T) {
	t.Parallel()
	m, _ := testValkey(t)
	m.ZAdd("krt:requested", float64(time.Now().UnixMicro()), apiDev)
	w := startWorkerOn(t, newKubernetes(t, "a/api"), m, func(c *workerConfig) { c.CatchUp = 0 })
	eventually(t, "the worker is ready", func() bool { return w.ready() == nil })
	w.settled()
	if n := w.patches("a/api"); n != 0 {
		t.Errorf("patched %d times", n)
	}
	w.awaitRestart("a/api", w.publish(apiDev))
}

// One restart for all images that were missed, by the newest T.
func TestCatchUpOfSeveralImages(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	images := []string{initDev, apiDev, "ghcr.io/acme/volume:dev"}
	kube.Create("a/api", fake.Spec{Image: images[0], Init: images[1], Volume: images[2]})
	w := startWorker(t, kube)
	now := time.Now().UnixMicro()
	for i, image := range images {
		w.valkey.ZAdd("krt:requested", float64(now+int64(i)), image)
	}
	for i := range 2 * ledgerPage { // so that it takes a while to get from one to the next
		w.valkey.ZAdd("krt:requested", float64(now), fmt.Sprintf("ghcr.io/acme/x-%d:dev", i))
	}
	w.requestCatchUp()
	w.awaitRestart("a/api", formatTime(now+2))
	w.settled()
	if got := kube.Applied("a/api"); len(got) != 1 {
		t.Errorf("restarted at %q", got)
	}
}

// A message makes a request count from its arrival, whatever Valkey's clock says,
// also for a worker that never reads that clock.
func TestClocksApart(t *testing.T) {
	t.Parallel()
	for _, catchUp := range []time.Duration{time.Hour, 0} {
		w := startWorker(t, newKubernetes(t, "a/api"), func(c *workerConfig) { c.CatchUp = catchUp })
		w.valkey.SetTime(time.Now().Add(-2 * time.Hour))
		w.awaitRestart("a/api", w.publish(apiDev))
	}
}

// Valkey's clock was ahead and is put right. Later requests count, for other
// images of the Deployment and for another tag as well.
func TestClockPutRight(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{10 * time.Second, 2 * time.Hour, 40 * 24 * time.Hour} {
		t.Run(ahead.String(), func(t *testing.T) {
			t.Parallel()
			kube := newKubernetes(t)
			kube.Create("a/both", fake.Spec{Image: apiDev, Init: initDev})
			w := startWorker(t, kube)
			w.setValkeyClock(time.Now().Add(ahead))
			w.awaitRestart("a/both", w.publish(apiDev))
			w.setValkeyClock(time.Now())
			w.awaitRestart("a/both", w.publish(initDev))
			w.awaitRestart("a/both", w.publish(apiDev))
			kube.Change("a/both", setImage(webDev))
			eventually(t, "the new tag is cached", func() bool { return len(w.cache.running(webDev)) == 1 })
			w.awaitRestart("a/both", w.publish(webDev))
		})
	}
}

// What is too far ahead is measured as the script measures it, by Valkey's clock.
func TestClockAheadAndThenBehind(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.Create("a/both", fake.Spec{Image: apiDev, Init: initDev})
	w := startWorker(t, kube)
	for _, ahead := range []time.Duration{23 * time.Hour, 0, -2 * time.Hour} {
		w.setValkeyClock(time.Now().Add(ahead))
		w.awaitRestart("a/both", w.publish(apiDev))
	}
	w.awaitRestart("a/both", w.publish(initDev))
}

// A message without T, typed by hand, means now.
func TestMessageWithoutT(t *testing.T) {
	t.Parallel()
	w := startWorker(t, newKubernetes(t, "a/api"))
	before := time.Now().Add(-time.Second) // the worker's idea of Valkey's clock is not exact
	w.valkey.Publish("krt", `{"image":"ghcr.io/acme/api:dev"}`)
	eventually(t, "it is restarted", func() bool { return w.kube.RestartedAt("a/api") >= formatTime(before.UnixMicro()) })
	ahead := time.Now().Add(2 * time.Hour)
	w.setValkeyClock(ahead)
	w.valkey.Publish("krt", `{"image":"ghcr.io/acme/api:dev"}`)
	eventually(t, "now is what Valkey's clock says", func() bool { return w.kube.RestartedAt("a/api") >= formatTime(ahead.Add(-time.Second).UnixMicro()) })
	w.setValkeyClock(time.Now())
	last := w.kube.RestartedAt("a/api")
	w.valkey.Publish("krt", `{"image":"ghcr.io/acme/api:dev"}`)
	eventually(t, "and no earlier than the newest T", func() bool { return w.kube.RestartedAt("a/api") > last })
}

// Valkey is a trust boundary: what web would not have sent is ignored.
func TestHostileMessages(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	kube.Create("a/quay", fake.Spec{Image: "quay.io/acme/api:dev"})
	w := startWorker(t, kube)
	messages := []string{
		``, `null`, `{}`, `[]`, `"x"`, `{"image":1}`, `{"IMAGE":"ghcr.io/acme/api:dev"}`,
		`{"image":"ghcr.io/acme/api:dev","image":"ghcr.io/acme/api:dev"}`,
		`{"image":"ghcr.io/acme/api:dev"} {}`, `{"image":"ghcr.io/acme/api:dev","x":1}`,
		`{"image":"ghcr.io/acme/api:dev","requestedAt":-1}`, `{"image":"ghcr.io/acme/api:dev","requestedAt":1.5}`,
		`{"image":"ghcr.io/acme/api:dev","requestedAt":"1"}`, `{"image":"ghcr.io/acme/api:dev","requestedAt":99999999999999999999}`,
		fmt.Sprintf(`{"image":"ghcr.io/acme/api:dev","requestedAt":%d}`, time.Now().Add(25*time.Hour).UnixMicro()),
		`{"image":"quay.io/acme/api:dev"}`, `{"image":"ghcr.io/acme/api"}`, `{"image":"ghcr.io/acme/../evil:dev"}`,
		`{"image":"ghcr.io/acme/api:dev"` + strings.Repeat(" ", maxMessageBytes) + `}`,
		"{\"image\":\"ghcr.io/acme/api:dev\xff\"}", `{"image":"` + strings.Repeat("a", 2000) + `"}`,
	}
	for _, m := range messages {
		w.valkey.Publish("krt", m)
	}
	w.settled()
	if w.patches("a/api")+w.patches("a/quay") != 0 {
		t.Errorf("patched: %v", kube.Patches(""))
	}
	if n := w.logs.count(`"msg":"message ignored"`); n != len(messages) {
		t.Errorf("%d of %d messages are logged as ignored", n, len(messages))
	}
}
