package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/util/workqueue"

	"kuberollouttrigger/internal/fake"
)

// sequence answers the patches of one Deployment with these statuses, and then
// lets them through.
func sequence(key string, header http.Header, statuses ...int) func(fake.PatchCall) (int, http.Header) {
	var mu sync.Mutex
	return func(call fake.PatchCall) (int, http.Header) {
		mu.Lock()
		defer mu.Unlock()
		if call.Key != key || len(statuses) == 0 {
			return 0, nil
		}
		next := statuses[0]
		statuses = statuses[1:]
		return next, header
	}
}

func TestFailedRestartIsTriedAgain(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api", "a/broken")
	var works atomic.Bool
	broken, api := failUnless(&works), sequence("a/api", nil, 500, 503, 422, 403)
	kube.OnPatch = func(call fake.PatchCall) (int, http.Header) {
		if call.Key == "a/broken" {
			return broken(call)
		}
		return api(call)
	}
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	w.awaitRestart("a/api", at) // whatever becomes of a/broken
	if n := w.patches("a/api"); n != 5 {
		t.Errorf("a/api was patched %d times instead of 5", n)
	}
	if !w.logs.has(`"level":"WARN"`, `"msg":"restart failed, trying again"`, `"deployment":"broken"`, at) {
		t.Error("the failure is not logged")
	}
	works.Store(true)
	w.awaitRestart("a/broken", at)
}

// A 409 or 404 that has nothing to do with the version is a failure like any
// other: it backs off, a newer request included.
func TestPermanentRefusal(t *testing.T) {
	t.Parallel()
	for _, code := range []int{http.StatusConflict, http.StatusForbidden, http.StatusNotFound, http.StatusUnprocessableEntity} {
		kube := newKubernetes(t, "a/api")
		kube.OnPatch = sequence("a/api", nil, code, code, code, code, code)
		m, _ := testValkey(t)
		w := newTestWorker(t, kube, m)
		w.backoff = workqueue.NewTypedItemExponentialFailureRateLimiter[string](minBackoff, maxBackoff)
		w.start()
		eventually(t, "the worker is ready", func() bool { return w.ready() == nil })
		for range 20 {
			w.publish(apiDev)
		}
		eventually(t, "the failure is logged", func() bool { return w.logs.has(`"level":"WARN"`, "restart failed", `"deployment":"api"`) })
		w.settled()
		if n := w.patches("a/api"); n > 2 {
			t.Errorf("%d: patched %d times at once", code, n)
		}
	}
}

// A 429 is not answered with more load before its Retry-After is over, not for a
// newer request either.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	var mu sync.Mutex
	var times []time.Time
	refuse := sequence("a/api", http.Header{"Retry-After": {"1"}}, 429)
	kube.OnPatch = func(call fake.PatchCall) (int, http.Header) {
		mu.Lock()
		defer mu.Unlock()
		times = append(times, time.Now())
		return refuse(call)
	}
	w := startWorker(t, kube)
	w.publish(apiDev)
	eventually(t, "it is refused", func() bool { return w.logs.has("restart failed", "429", "Retry-After: 1s") })
	w.awaitRestart("a/api", w.publish(apiDev))
	mu.Lock()
	defer mu.Unlock()
	if len(times) != 2 || times[1].Sub(times[0]) < time.Second {
		t.Errorf("patched at %v, with Retry-After: 1", times)
	}
}

// A Deployment that changes all the time costs two patches and one list.
func TestConflict(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		kube.ChangeStatus("a/api", func(object map[string]any) {
			object["status"] = map[string]any{"observedGeneration": time.Now().UnixNano()}
		})
		return 0, nil
	}
	w := startWorker(t, kube)
	lists := len(kube.Lists())
	w.awaitRestart("a/api", w.publish(apiDev))
	calls := kube.Patches("a/api")
	if len(calls) != 2 || !strings.Contains(calls[0].Body, "resourceVersion") || strings.Contains(calls[1].Body, "resourceVersion") || !strings.Contains(calls[1].Body, `"uid"`) {
		t.Errorf("patches %v", calls)
	}
	if more := kube.Lists()[lists:]; len(more) != 1 || more[0].Get("fieldSelector") != "metadata.name=api" {
		t.Errorf("lists %v", more)
	}
}

// Another worker was faster by a hair. Its newer T is not replaced by an older one;
// after an older T, the patch carries the present resourceVersion.
func TestOvertaken(t *testing.T) {
	t.Parallel()
	for _, by := range []time.Duration{time.Second, -time.Second} {
		kube := newKubernetes(t, "a/api")
		theirs := formatTime(time.Now().Add(by).UnixMicro())
		overtake := sync.OnceFunc(func() { kube.Change("a/api", setRestartedAt(theirs)) })
		kube.OnPatch = func(fake.PatchCall) (int, http.Header) { overtake(); return 0, nil }
		w := startWorker(t, kube)
		ours := w.publish(apiDev)
		w.awaitRestart("a/api", max(ours, theirs))
		w.settled()
		calls := kube.Patches("a/api")
		if want := map[bool]int{true: 1, false: 2}[theirs > ours]; len(calls) != want || !strings.Contains(calls[want-1].Body, `"resourceVersion"`) {
			t.Errorf("overtaken by %s: patches %v", by, calls)
		}
	}
}

// A Deployment of the same name that the watch has not shown yet is another one, at
// the first try and later.
func TestRecreated(t *testing.T) {
	t.Parallel()
	for _, fails := range []bool{false, true} {
		for name, created := range map[string]time.Duration{"before the request": -time.Minute, "after the request": time.Hour} {
			kube := newKubernetes(t, "a/api")
			var works atomic.Bool
			works.Store(!fails)
			kube.OnPatch = failUnless(&works)
			w := startWorker(t, kube)
			again := func() { kube.Create("a/api", fake.Spec{Image: apiDev, Created: time.Now().Add(created)}) }
			if !fails {
				kube.ChangeUnseen(again)
			}
			at := w.request(apiDev)
			if fails {
				eventually(t, "it fails", func() bool { return w.patches("a/api") > 0 })
				kube.ChangeUnseen(again)
				works.Store(true)
			}
			if created < 0 {
				w.awaitRestart("a/api", at)
				continue
			}
			w.settled()
			if restartedAt := kube.RestartedAt("a/api"); restartedAt != "" {
				t.Errorf("created %s: restarted at %q", name, restartedAt)
			}
		}
	}
}

// A Deployment that is gone when its patch arrives is no failure.
func TestDeletedMeanwhile(t *testing.T) {
	t.Parallel()
	w := startWorker(t, newKubernetes(t, "a/api"))
	w.kube.ChangeUnseen(func() { w.kube.Delete("a/api") })
	w.publish(apiDev)
	eventually(t, "it was tried", func() bool { return w.patches("a/api") == 1 })
	w.settled()
	if w.patches("a/api") != 1 || w.logs.has("restart failed") {
		t.Errorf("%d patches", w.patches("a/api"))
	}
}

// Two workers, one of them slow, and a GitOps tool that removes the annotation:
// the slow one does not put it back.
func TestGitOpsAndTwoWorkers(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	var n atomic.Int32
	both, removed := make(chan struct{}), make(chan struct{})
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) {
		switch n.Add(1) {
		case 1:
			<-both
		case 2:
			close(both)
			<-removed
		}
		return 0, nil
	}
	a := startWorker(t, kube)
	b := startWorkerOn(t, kube, a.valkey)
	eventually(t, "both are ready", func() bool { return b.ready() == nil })
	at := a.publish(apiDev)
	a.awaitRestart("a/api", at)
	for _, w := range []*testWorker{a, b} {
		eventually(t, "both have seen it", func() bool { return w.entry("a/api").newestRestart == at })
	}
	kube.Change("a/api", removeAnnotation)
	close(removed)
	a.settled()
	eventually(t, "nobody is busy", func() bool { return a.queue.Len()+b.queue.Len() == 0 })
	if got := kube.Applied("a/api"); len(got) != 1 {
		t.Errorf("restarted at %q", got)
	}
}

// A webhook that removes the annotation is reported, and not tried again.
func TestNoEffect(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	kube.OnStore = removeAnnotation
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "it is reported", func() bool {
		return w.logs.has(`"level":"ERROR"`, `"msg":"restart had no effect"`, "webhook", `"deployment":"api"`, at)
	})
	kube.Lock()
	kube.OnStore = nil
	kube.Unlock()
	w.settled()
	if w.patches("a/api") != 1 || w.logs.has(`"msg":"restarted"`, `"deployment":"api"`) {
		t.Errorf("%d patches", w.patches("a/api"))
	}
}

func TestGiveUp(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api", "a/deleted")
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) { return 500, nil }
	w := startWorker(t, kube)
	at := w.publish(apiDev)
	eventually(t, "both failed", func() bool { return w.patches("a/api") > 3 && w.backoff.NumRequeues("Deployment/a/deleted") > 0 })
	kube.Delete("a/deleted")
	eventually(t, "its failures are forgotten", func() bool { return w.backoff.NumRequeues("Deployment/a/deleted") == 0 })
	w.ahead.Store(int64(61 * time.Minute))
	eventually(t, "it is given up", func() bool { return w.logs.has(`"level":"ERROR"`, "gave up", `"deployment":"api"`, at) })
	tries := w.patches("a/api")
	time.Sleep(60 * time.Millisecond)
	if n := w.patches("a/api"); n != tries {
		t.Error("it is still patched")
	}
}

// Patches that hang hold up others for one time-out for each round of them.
func TestHangingPatches(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	const hanging, concurrency = 8, 4
	for i := range hanging {
		kube.Create(fmt.Sprintf("bad/api-%d", i), fake.Spec{Image: apiDev})
	}
	kube.Create("good/web", fake.Spec{Image: webDev})
	var inFlight, rounds atomic.Int32
	next := make(chan struct{})
	kube.OnPatch = func(call fake.PatchCall) (int, http.Header) {
		if call.Key == "good/web" {
			return 0, nil
		}
		if inFlight.Add(1) == concurrency {
			inFlight.Store(0)
			rounds.Add(1)
		}
		<-next
		return 500, nil
	}
	w := startWorker(t, kube, func(c *workerConfig) { c.Concurrency = concurrency })
	w.publish(apiDev)
	eventually(t, "the first patches hang", func() bool { return rounds.Load() == 1 })
	at := w.publish(webDev)
	for range hanging { // the time-outs of the first round, and of the second
		next <- struct{}{}
	}
	w.awaitRestart("good/web", at)
	close(next)
}

// Restarts do not wait for Events, which are bounded. One that another worker wrote is no fault.
func TestHangingEvents(t *testing.T) {
	kube := newKubernetes(t)
	done := make(chan struct{})
	release := sync.OnceFunc(func() { close(done) })
	t.Cleanup(release)
	var events atomic.Int64
	kube.Front = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost || r.URL.Path != "/api/v1/namespaces/a/events" {
			return false
		}
		events.Add(1)
		<-done
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusConflict)
		io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"AlreadyExists","code":409}`)
		return true
	}
	for i := range maxRecording + 1 {
		kube.Create(fmt.Sprint("a/", i), fake.Spec{Image: apiDev})
	}
	w := startWorker(t, kube, func(c *workerConfig) { c.Events = true })
	at := w.publish(apiDev)
	for i := range maxRecording + 1 {
		w.awaitRestart(fmt.Sprint("a/", i), at)
	}
	eventually(t, "the bound is reached", func() bool {
		return events.Load() == maxRecording && w.logs.has(fmt.Sprint(maxRecording, " others are being written"))
	})
	w.eventless.Store(false)
	release()
	time.Sleep(200 * time.Millisecond)
	if w.logs.count("an Event could not be written") != 1 {
		t.Error("one that another worker has written is logged")
	}
}

// A request that would expire before its turn does not delay later ones.
func TestTurnsUntilExpiry(t *testing.T) {
	m, _ := testValkey(t)
	w := newTestWorker(t, newKubernetes(t), m, func(c *workerConfig) { c.RestartsPerMinute = 60 })
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 1000 { // of which an hour has 3,600 turns
				w.takeTurn(decision{verdict: due, request: request{made: time.Now()}})
			}
		})
	}
	all.Wait()
	if next := w.takeTurn(decision{verdict: due, request: request{made: time.Now().Add(time.Minute)}}); !next.hasTurn || next.verdict != deferred {
		t.Errorf("a later request gets %+v", next)
	}
	d := &workload{kind: kinds[0]}
	w.settle(d, w.takeTurn(decision{verdict: due, request: request{made: time.Now()}}), nil)
	if _, paced := w.waiting(d.key()); paced {
		t.Error("a workload without a turn seems to have one: a newer request would not wait for its own")
	}
}
