package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"kuberollouttrigger/internal/fake"
)

// status is what the Deployment controller writes about a Deployment of two
// replicas.
func status(updated, available, replicas int, reason string) func(object map[string]any) {
	return func(object map[string]any) {
		object["status"] = map[string]any{
			"observedGeneration": child(object, "metadata")["generation"],
			"updatedReplicas":    updated, "availableReplicas": available, "replicas": replicas,
			"conditions": []any{map[string]any{"type": "Progressing", "reason": reason}},
		}
		child(object, "spec")["replicas"] = 2
	}
}

var available = status(2, 2, 2, "NewReplicaSetAvailable")

// awaitRollout waits until this cluster has the report about the newest request for
// an image, whenever that and its last change were.
func (w *testWorker) awaitRollout(image string, want report) report {
	w.t.Helper()
	var got report
	defer func() {
		if w.t.Failed() {
			w.t.Logf("the report about %s is %+v, want %+v", image, got, want)
		}
	}()
	eventually(w.t, image+" is reported", func() bool {
		all, err := w.pub.readRollout(w.t.Context(), rolloutQuery{images: []string{image}})
		if err != nil {
			return false
		}
		got = all.Images[0].Clusters["test"]
		want.RequestedAt, want.ChangedAt = all.Images[0].RequestedAt, got.ChangedAt
		if want.Matched > 0 {
			want.Kinds = map[string]int{"Deployment": want.Matched}
		}
		return reflect.DeepEqual(got, want) && all.State == want.State
	})
	return got
}

// A rollout is followed to its end, by the rules of kubectl rollout status.
func TestRolloutIsFollowed(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	kube.ChangeStatus("a/api", available)
	w := startWorker(t, kube)
	w.publish(apiDev)
	begun := report{State: progressing, Matched: 1, Restarted: 1}
	w.awaitRollout(apiDev, begun) // the status is that of the generation before
	for _, step := range []struct {
		status func(map[string]any)
		want   report
	}{
		{status(1, 2, 3, "ReplicaSetUpdated"), begun},
		{status(2, 2, 3, "ReplicaSetUpdated"), begun}, // an old pod is left
		{status(2, 1, 2, "ReplicaSetUpdated"), begun},
		{status(2, 1, 2, "ProgressDeadlineExceeded"), report{State: failed, Matched: 1, Restarted: 1, Failed: 1}},
		{status(1, 1, 1, "ReplicaSetUpdated"), begun},
		{available, report{State: complete, Matched: 1, Restarted: 1, Complete: 1}},
	} {
		kube.ChangeStatus("a/api", step.status)
		time.Sleep(reportInterval + 50*time.Millisecond)
		w.awaitRollout(apiDev, step.want)
	}
}

// A report counts each Deployment that runs the image.
func TestReportCounts(t *testing.T) {
	t.Parallel()
	const outside, pinned = "ghcr.io/other/api:dev", "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	kube := newKubernetes(t)
	for key, spec := range map[string]fake.Spec{
		"a/cached":   {Image: apiDev, Policy: "IfNotPresent"},
		"a/paused":   {Image: apiDev, Paused: true},
		"a/pinned":   {Image: apiDev + pinned, Policy: "IfNotPresent"},
		"a/deleting": {Image: apiDev, Deleting: true},
		"a/web":      {Image: webDev},
		"a/init":     {Image: initDev + pinned},
		"a/gone":     {Image: "ghcr.io/acme/gone:dev", Deleting: true},
		"a/outside":  {Image: outside},
	} {
		kube.Create(key, spec)
		kube.ChangeStatus(key, available)
	}
	w := startWorker(t, kube, func(c *workerConfig) { c.RestartInterval = time.Hour })
	for range 2 { // with each catch-up
		begun := time.Now()
		w.caughtUpAgain()
		eventually(t, "the cluster is alive", func() bool {
			at, _ := w.valkey.ZScore("krt:clusters", "test")
			return at >= float64(begun.UnixMicro())
		})
	}
	w.publish(apiDev, webDev, initDev, outside, "ghcr.io/acme/gone:dev", "ghcr.io/acme/nobody:dev")
	api := report{State: progressing, Matched: 4, Restarted: 1, Deferred: map[string]int{"paused": 1},
		Skipped: map[string]int{"being deleted": 1, pinnedReason: 1}, Warnings: map[string]int{"IfNotPresent": 1}}
	// The paused one and the one that is being deleted have the default policy of
	// the fake, Always.
	w.awaitRollout(apiDev, api)
	w.awaitRollout(initDev, report{State: unmatched, Matched: 1, Skipped: map[string]int{pinnedReason: 1}})
	w.awaitRollout("ghcr.io/acme/gone:dev", report{State: unmatched, Matched: 1, Skipped: map[string]int{"being deleted": 1}})
	w.awaitRollout(outside, report{State: unmatched})
	w.awaitRollout("ghcr.io/acme/nobody:dev", report{State: unmatched})
	kube.ChangeStatus("a/web", available)
	w.awaitRollout(webDev, report{State: complete, Matched: 1, Restarted: 1, Complete: 1})
	w.publish(webDev)
	w.awaitRollout(webDev, report{State: progressing, Matched: 1, Deferred: map[string]int{"restarted less than WORKER_RESTART_INTERVAL ago": 1}})
	kube.Delete("a/web")
	w.awaitRollout(webDev, report{State: unmatched})
}

// Nothing is reported before every namespace is listed.
func TestReportsNeedTheWholeCache(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	listing := make(chan struct{})
	kube.Front = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/namespaces/slow/") {
			<-listing
		}
		return false
	}
	kube.Create("slow/api", fake.Spec{Image: apiDev})
	m, _ := testValkey(t)
	w := startWorkerOn(t, kube, m, func(c *workerConfig) { c.Namespaces = []string{"slow", "quick"} })
	eventually(t, "one is listed", func() bool { return w.logs.has(`"msg":"deployments listed"`, "quick") })
	w.request(apiDev)
	time.Sleep(2 * reportInterval)
	if keys := m.Keys(); len(keys) != 1 {
		t.Errorf("the keys are %q", keys)
	}
	close(listing)
	w.awaitRollout(apiDev, report{State: progressing, Matched: 1, Restarted: 1})
}

// A restart that fails until the request expires is a failure.
func TestReportGaveUp(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t)
	kube.OnPatch = func(fake.PatchCall) (int, http.Header) { return http.StatusInternalServerError, nil }
	kube.Create("a/api", fake.Spec{Image: apiDev})
	w := startWorker(t, kube, func(c *workerConfig) { c.CatchUp = time.Minute })
	w.request(apiDev)
	w.awaitRollout(apiDev, report{State: progressing, Matched: 1})
	w.ahead.Store(int64(2 * time.Minute))
	w.awaitRollout(apiDev, report{State: failed, Matched: 1, Failed: 1})
	w.ahead.Store(int64(reportAge - time.Minute))
	w.caughtUpAgain() // and forgets what is too old
	time.Sleep(2 * reportInterval)
	w.awaitRollout(apiDev, report{State: failed, Matched: 1, Failed: 1})
}

// What is complete is followed for a minute more, because the watch may lag. What is
// not is followed for an hour. Then nothing is written any more.
func TestRolloutIsDone(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	kube.Create("a/web", fake.Spec{Image: webDev})
	w := startWorker(t, kube, func(c *workerConfig) { c.CatchUp = 3 * time.Hour })
	w.publish(apiDev, webDev, "ghcr.io/other/api:dev")
	w.awaitRollout(webDev, report{State: progressing, Matched: 1, Restarted: 1})
	kube.ChangeStatus("a/api", available)
	w.awaitRollout(apiDev, report{State: complete, Matched: 1, Restarted: 1, Complete: 1})
	kube.ChangeStatus("a/api", status(1, 1, 2, "ReplicaSetUpdated"))
	w.awaitRollout(apiDev, report{State: progressing, Matched: 1, Restarted: 1})
	kube.ChangeStatus("a/api", available)
	done := w.awaitRollout(apiDev, report{State: complete, Matched: 1, Restarted: 1, Complete: 1})

	w.ahead.Store(int64(settledAge + time.Second))
	time.Sleep(2 * reportInterval)
	kube.ChangeStatus("a/api", status(1, 1, 2, "ReplicaSetUpdated"))
	kube.ChangeStatus("a/web", status(2, 1, 2, "ProgressDeadlineExceeded"))
	w.awaitRollout(webDev, report{State: failed, Matched: 1, Restarted: 1, Failed: 1})
	if r := w.awaitRollout(apiDev, report{State: complete, Matched: 1, Restarted: 1, Complete: 1}); r.ChangedAt != done.ChangedAt {
		t.Errorf("written again at %s", r.ChangedAt)
	}
	w.publish(apiDev)
	w.awaitRollout(apiDev, report{State: progressing, Matched: 1, Restarted: 1})
	w.ahead.Store(int64(settledAge + reportAge + 2*time.Second))
	eventually(t, "nothing is followed", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.followed) == 0
	})
	w.setValkeyClock(w.now()) // the requests are still in the ledger
	if len(w.followed) != 0 {
		t.Error("a catch-up has begun to follow an old request again")
	}
}

// However many images a compromised web makes up, what is followed is bounded.
func TestFollowedImagesAreBounded(t *testing.T) {
	m, _ := testValkey(t)
	w := newTestWorker(t, newKubernetes(t), m)
	for i := range 2*maxLedger + 100 {
		w.follow(fmt.Sprint("ghcr.io/other/api:", i), request{at: 1, made: time.Now()})
	}
	if n := len(w.followed); n != 2*maxLedger {
		t.Errorf("%d images are followed", n)
	}
}

// Of two reports the one about the newer request stands, and then the one from the
// cache that is further.
func TestNewestReportStands(t *testing.T) {
	m, cfg := testValkey(t)
	m.SetTime(time.UnixMicro(2_000_000))
	w := newTestWorker(t, newKubernetes(t), m)
	old, at := formatTime(1_000_000), formatTime(1_000_001)
	m.ZAdd(ledgerKey(cfg.Channel), 1_000_001, apiDev)
	for i, try := range []struct {
		requestedAt string
		revision    uint64
		stands      bool
	}{{old, 100, true}, {at, 9, true}, {old, 101, false}, {at, 8, false}, {at, 9, true}, {at, 10, true}, {at, 9, false}} {
		f := &followed{image: apiDev, next: report{State: complete, RequestedAt: try.requestedAt, Matched: i + 1}}
		if _, err := w.source.writeReports(t.Context(), "test", try.revision, []*followed{f}); err != nil {
			t.Fatal(err)
		}
		var stored report
		if err := json.Unmarshal([]byte(m.HGet("krt:report:"+apiDev, "test")), &stored); err != nil || (stored.Matched == i+1) != try.stands {
			t.Errorf("%+v: %+v, %v", try, stored, err)
		}
		if all, err := w.pub.readRollout(t.Context(), rolloutQuery{images: []string{apiDev}}); err != nil || (all.State == complete) != (stored.RequestedAt == at) {
			t.Errorf("%+v: %+v, %v", try, all, err)
		}
	}
	if ttl := m.TTL("krt:report:" + apiDev); ttl <= 0 || ttl > reportAge {
		t.Errorf("the report is kept for %s", ttl)
	}
}

// A report that Valkey refused, because another worker's cache was further, is tried
// again: that worker may be gone.
func TestRefusedReportIsTriedAgain(t *testing.T) {
	t.Parallel()
	w := startWorker(t, newKubernetes(t, "a/api"))
	at := w.request(apiDev)
	w.awaitRollout(apiDev, report{State: progressing, Matched: 1, Restarted: 1})
	other := &followed{image: apiDev, next: report{State: progressing, RequestedAt: at, Matched: 1, Restarted: 1}}
	if _, err := w.source.writeReports(t.Context(), "test", w.cache.reached()+3, []*followed{other}); err != nil {
		t.Fatal(err)
	}
	w.kube.ChangeStatus("a/api", available)
	time.Sleep(2 * reportInterval)
	for range 3 {
		w.kube.Create("a/other", fake.Spec{Image: webDev})
	}
	w.awaitRollout(apiDev, report{State: complete, Matched: 1, Restarted: 1, Complete: 1})
}

// A report that is too long, or cannot be read, disturbs neither requests nor the
// reports of others.
func TestBadReports(t *testing.T) {
	w := newTestWeb(t, "")
	w.accepted(`{"image":"` + apiDev + `"}`)
	w.valkey.HSet("krt:report:"+apiDev, "test", strings.Repeat("x", maxElement+1))
	var asking sync.WaitGroup
	for range 50 {
		asking.Go(func() {
			if resp := w.get(nil, apiQuery); resp.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("GET /rollout: %d", resp.StatusCode)
			}
		})
		w.accepted(`{"image":"ghcr.io/acme/other:dev"}`)
	}
	asking.Wait()
	if n := len(w.heard); n > 51 {
		t.Errorf("51 requests were published %d times", n)
	}

	worker := startWorkerOn(t, newKubernetes(t), w.valkey)
	for _, bad := range []string{"x", "{}", `{"requestedAt":1,"revision":"x"}`} {
		w.valkey.HSet("krt:report:"+apiDev, "test", bad)
		worker.publish(apiDev, webDev)
		worker.awaitRollout(webDev, report{State: unmatched})
		worker.awaitRollout(apiDev, report{State: unmatched})
	}
}

// get asks with a valid token of a job whose claims are changed.
func (w *testWeb) get(changes map[string]any, query string) *http.Response {
	w.t.Helper()
	return w.send(http.MethodGet, "/rollout?"+query, http.Header{"Authorization": {"Bearer " + w.issuer.with(changes)}}, "")
}

// rollout is the answer to a question that must be answered.
func (w *testWeb) rollout(query string) (state, version, text string) {
	w.t.Helper()
	resp := w.get(nil, query)
	var answer struct{ State, Version, RequestID string }
	body, _ := io.ReadAll(resp.Body)
	if err := json.Unmarshal(body, &answer); err != nil || resp.StatusCode != http.StatusOK || answer.RequestID != resp.Header.Get("X-Request-Id") {
		w.t.Fatalf("%s: %d %s", query, resp.StatusCode, body)
	}
	return answer.State, answer.Version, string(body)
}

// accepted posts images, and returns requestedAt.
func (w *testWeb) accepted(body string) (requestedAt string) {
	w.t.Helper()
	var a accepted
	if err := json.NewDecoder(w.post(nil, body).Body).Decode(&a); err != nil || a.RequestedAt == "" {
		w.t.Fatalf("%s is not accepted: %v", body, err)
	}
	return url.QueryEscape(a.RequestedAt)
}

const apiQuery = "image=" + apiDev

// The state of several clusters, and of those that are away.
func TestRolloutOfClusters(t *testing.T) {
	w := newTestWeb(t, "")
	since := w.accepted(`{"image":"` + apiDev + `"}`)
	at, _ := url.QueryUnescape(since)
	source := newTestWorker(t, newKubernetes(t), w.valkey).source
	write := func(cluster string, r report) {
		r.RequestedAt = at
		if _, err := source.writeReports(t.Context(), cluster, 1, []*followed{{image: apiDev, next: r}}); err != nil {
			t.Fatal(err)
		}
	}
	alive := func(cluster string, ago time.Duration) {
		w.valkey.ZAdd("krt:clusters", float64(time.Now().Add(-ago).UnixMicro()), cluster)
	}
	expect := func(what, state string, parts ...string) {
		t.Helper()
		got, _, text := w.rollout(apiQuery + "&since=" + since)
		for _, part := range parts {
			if got != state || !strings.Contains(text, part) {
				t.Errorf("%s: %s, want %s with %s", what, text, state, part)
			}
		}
	}
	expect("no cluster is known", "pending", `"clusters":{}`)
	alive("east", 0)
	expect("no report", "pending", `"east":{"state":"pending"`)
	write("east", report{State: unmatched})
	expect("unmatched", "unmatched", `"east":{"state":"unmatched","requestedAt":"`+at)
	alive("west", aliveAge-time.Second)
	expect("another is alive", "pending", `"west":{"state":"pending"`)
	write("west", report{State: complete, Matched: 3, Restarted: 3, Complete: 3})
	expect("one runs it", "complete", `"west":{"state":"complete"`, `"matched":3`)
	write("east", report{State: progressing, Matched: 1})
	expect("the other progresses", "progressing", `"east":{"state":"progressing"`)
	alive("east", time.Second)
	alive("west", 0)
	_, version, _ := w.rollout(apiQuery)
	alive("east", 0)
	alive("west", time.Second)
	if _, again, text := w.rollout(apiQuery); again != version {
		t.Errorf("the version changes when a cluster says that it is alive: %s", text)
	}
	write("west", report{State: failed, Matched: 3, Failed: 3})
	expect("one failed", "failed", `"west":{"state":"failed"`)
	write("east", report{State: complete, Matched: 1, Complete: 1})
	alive("west", aliveAge+time.Second)
	expect("the one that failed is away", "complete", `"west":{"state":"failed"`, `"away":["west"]`)
	alive("west", awayAge+time.Second)
	if _, _, text := w.rollout(apiQuery); strings.Contains(text, "away") {
		t.Errorf("after a day: %s", text)
	}
	w.valkey.HSet("krt:report:"+apiDev, "east", `{"state":"odd","requestedAt":"`+at+`"}`)
	expect("a report that cannot be read", "pending", `"east":{"state":"pending"`)
}

// A question gets the state when it differs from what was seen, or when the wait is
// over, however long a request may otherwise take to be read.
func TestRolloutWaits(t *testing.T) {
	t.Parallel()
	kube := newKubernetes(t, "a/api")
	w := newTestWeb(t, "")
	hasty := httptest.NewUnstartedServer(nil)
	hasty.Config = newServer(w.handler, headerTimeout, w.handler.log)
	hasty.Config.ReadTimeout, hasty.Config.WriteTimeout = 200*time.Millisecond, time.Second
	hasty.Start()
	t.Cleanup(hasty.Close)
	w.url = hasty.URL
	worker := startWorkerOn(t, kube, w.valkey)
	eventually(t, "the worker is ready", func() bool { return worker.ready() == nil })
	since := w.accepted(`{"image":"` + apiDev + `"}`)
	worker.awaitRollout(apiDev, report{State: progressing, Matched: 1, Restarted: 1})
	query := apiQuery + "&since=" + since
	state, version, _ := w.rollout(query + "&seen=something&wait=60s")
	if state != "progressing" {
		t.Errorf("state %s", state)
	}
	begun := time.Now()
	if _, again, _ := w.rollout(query + "&wait=1500ms&seen=" + version); again != version || time.Since(begun) < 1500*time.Millisecond {
		t.Errorf("version %s after %s", again, time.Since(begun))
	}
	time.AfterFunc(300*time.Millisecond, func() { kube.ChangeStatus("a/api", available) })
	begun = time.Now()
	state, _, text := w.rollout(query + "&wait=60s&seen=" + version)
	if took := time.Since(begun); state != "complete" || took < 300*time.Millisecond || took > 5*time.Second {
		t.Errorf("%s after %s", text, took)
	}
	// What is newer stands for it.
	w.accepted(`{"image":"` + apiDev + `"}`)
	worker.awaitRollout(apiDev, report{State: progressing, Matched: 1, Restarted: 1})
	kube.ChangeStatus("a/api", available)
	worker.awaitRollout(apiDev, report{State: complete, Matched: 1, Restarted: 1, Complete: 1})
	if state, _, text := w.rollout(query); state != "complete" {
		t.Errorf("a newer request: %s", text)
	}
	// Two images: one is no reason to call both complete.
	w.accepted(`{"image":"ghcr.io/acme/nobody:dev"}`)
	eventually(t, "both are reported", func() bool {
		state, _, text = w.rollout(apiQuery + "&image=ghcr.io/acme/nobody:dev")
		return state == "complete" && strings.Contains(text, `"state":"unmatched"`)
	})
	if !w.logs.has(`"msg":"rollout"`, `"level":"DEBUG"`, `"state":"complete"`, `"repository":"acme/api"`) {
		t.Error("no log line")
	}
}

// At most maxWaiting requests wait. Those that go away, and the end of web, free
// what they hold.
func TestRolloutWaiters(t *testing.T) {
	w := newTestWeb(t, "")
	w.accepted(`{"image":"` + apiDev + `"}`)
	_, version, _ := w.rollout(apiQuery)
	before := runtime.NumGoroutine()
	ctx, goAway := context.WithCancel(t.Context())
	wait := func(ctx context.Context) {
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, w.url+"/rollout?"+apiQuery+"&wait=1m&seen="+version, nil)
		req.Header.Set("Authorization", "Bearer "+w.issuer.with(nil))
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
		}
	}
	var all sync.WaitGroup
	for range maxWaiting {
		all.Go(func() {
			for ctx.Err() == nil { // on a slow machine, a header can take too long
				wait(ctx)
			}
		})
	}
	eventually(t, "they wait", func() bool { return w.handler.waiting.Load() == maxWaiting })
	begun := time.Now()
	eventually(t, "one more is answered", func() bool { // or told to try again
		text, _ := io.ReadAll(w.get(nil, apiQuery+"&wait=1m&seen="+version).Body)
		return strings.Contains(string(text), version) && time.Since(begun) < time.Minute
	})
	w.accepted(`{"image":"ghcr.io/acme/web:dev"}`)
	denied := w.logs.count(`"msg":"denied"`)
	goAway()
	all.Wait()
	eventually(t, "nobody waits", func() bool { return w.handler.waiting.Load() == 0 && runtime.NumGoroutine() < before+20 })
	if w.logs.count(`"msg":"denied"`) != denied {
		t.Error("those who go away are called denied")
	}

	// A job that waits may wait for its turn as well, and others may not.
	for range maxReading {
		w.pub.reading <- struct{}{}
	}
	if resp := w.get(nil, apiQuery); resp.StatusCode != 503 || resp.Header.Get("Retry-After") != retryAfter {
		t.Errorf("without a turn: %d", resp.StatusCode)
	}
	time.AfterFunc(time.Second+2*turnTimeout, func() { <-w.pub.reading })
	if state, _, text := w.rollout(apiQuery + "&wait=1s"); state != "pending" {
		t.Errorf("after its turn has come: %s", text)
	}
	w.pub.reading <- struct{}{}
	all.Go(func() { wait(t.Context()) })
	eventually(t, "one waits", func() bool { return w.handler.waiting.Load() == 1 })
	begun = time.Now()
	w.stop()
	<-w.pub.reading
	if all.Wait(); time.Since(begun) > 5*time.Second {
		t.Errorf("web stops, and one waits for %s", time.Since(begun))
	}
}

// What a job asks wrongly, and what it may not ask.
func TestRolloutAnswers(t *testing.T) {
	w := newTestWeb(t, "- claims: {ref: refs/heads/main}\n  images: ['ghcr.io/{repository}:dev']\n")
	w.accepted(`{"image":"` + apiDev + `"}`)
	images := strings.Repeat(apiQuery+"&", maxTags)
	for _, tt := range []struct {
		query string
		code  int
		body  string
	}{
		{apiQuery, 200, `"state":"pending"`},
		{images + "wait=1s", 200, `"state":"pending"`},
		{images + apiQuery, 400, "expected 1 to 32 parameters image"},
		{"", 400, "expected 1 to 32 parameters image"},
		{apiQuery + "&%zz", 400, "expected 1 to 32"},
		{"image=ghcr.io/acme/api", 400, "has no tag"},
		{"image=ghcr.io/Acme/api:dev", 400, "the name in lower case"},
		{"image=" + url.QueryEscape("<\n::error::>"), 400, "not a valid reference"},
		{apiQuery + "&wait=168h", 400, "wait=168h: not valid; expected"},
		{apiQuery + "&wait=-1s", 400, "wait=-1s"},
		{apiQuery + "&wait=soon", 400, "wait=soon"},
		{apiQuery + "&wait=1s&wait=2s", 400, "parameter wait is unknown or repeated"},
		{apiQuery + "&since=yesterday", 400, "since=yesterday"},
		{apiQuery + "&sinse=x", 400, "parameter sinse is unknown or repeated"},
		{apiQuery + "&seen=" + strings.Repeat("%00%ff", 1000) + "&wait=1m", 200, `"state":"pending"`},
		{apiQuery + "&since=" + formatTime(time.Now().Add(time.Minute).UnixMicro()), 404, "no request for " + apiDev + " since then, or within 1h"},
		{apiQuery + "&since=0001-01-01T00:00:00Z", 200, `"state":"pending"`},
		{"image=ghcr.io/acme/web:dev", 403, "may not restart ghcr.io/acme/web:dev"},
		{apiQuery + "&image=ghcr.io/acme/web:dev", 403, "may not restart ghcr.io/acme/web:dev"},
		{"image=ghcr.io/other/api:dev", 403, "under none of the prefixes"},
	} {
		resp := w.get(nil, tt.query)
		text, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != tt.code || !strings.Contains(string(text), tt.body) || !strings.Contains(string(text), `"requestId":"`+resp.Header.Get("X-Request-Id")+`"`) {
			t.Errorf("%.100s: %d %s, want %d %s", tt.query, resp.StatusCode, text, tt.code, tt.body)
		}
	}
	// Nobody who may not ask learns whether it was asked rightly.
	for what, changes := range map[string]map[string]any{"another owner": {"repository": "evil/api", "repository_owner": "evil"}, "an event": {"event_name": "pull_request"}} {
		for _, query := range []string{"", apiQuery} {
			resp := w.get(changes, query)
			if text, _ := io.ReadAll(resp.Body); resp.StatusCode != 403 || !strings.HasPrefix(string(text), accessDenied) {
				t.Errorf("%s, %q: %d %s", what, query, resp.StatusCode, text)
			}
		}
	}
	for method, code := range map[string]int{http.MethodPost: 405, http.MethodHead: 405, http.MethodOptions: 405, http.MethodGet: 401} {
		if resp := w.send(method, "/rollout?"+apiQuery, nil, ""); resp.StatusCode != code || code == 405 && resp.Header.Get("Allow") != "GET" {
			t.Errorf("%s: %d, Allow %q", method, resp.StatusCode, resp.Header.Get("Allow"))
		}
	}
	w.valkey.FastForward(reportAge + time.Second)
	w.valkey.SetTime(time.Now().Add(reportAge + time.Second))
	if resp := w.get(nil, apiQuery); resp.StatusCode != 404 {
		t.Errorf("after an hour: %d", resp.StatusCode)
	}
	w.valkey.Close()
	if resp := w.get(nil, apiQuery); resp.StatusCode != 503 || resp.Header.Get("Retry-After") != retryAfter {
		t.Errorf("without a Valkey: %d", resp.StatusCode)
	}
}

// Whatever the query is, an error is one line, and what is taken for right is what
// web may ask Valkey.
func FuzzParseRolloutQuery(f *testing.F) {
	for _, query := range []string{apiQuery + "&since=2026-11-21T02:00:00.123456Z&seen=x&wait=30s", apiQuery + "&" + apiQuery, "image=nginx:1&wait=1m", "image=%zz", "since=x"} {
		f.Add(query)
	}
	f.Fuzz(func(t *testing.T, query string) {
		q, err := parseRolloutQuery(query)
		if err != nil {
			if strings.ContainsFunc(err.Error(), unicode.IsControl) || len(err.Error()) > 2000 {
				t.Errorf("%q: the error is %q", query, err)
			}
			return
		}
		if len(q.images) == 0 || len(q.images) > maxTags || q.wait < 0 || q.wait > maxWait {
			t.Errorf("%q: %+v", query, q)
		}
		for _, image := range q.images {
			if canonical, err := parseImage(image); err != nil || canonical != image {
				t.Errorf("%q: %s is not canonical", query, image)
			}
		}
		if _, err := time.Parse(restartedAtLayout, q.since); q.since != "" && err != nil {
			t.Errorf("%q: since is %q", query, q.since)
		}
	})
}
