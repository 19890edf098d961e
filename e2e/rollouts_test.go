package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
)

// A job that asks GET /rollout learns what happens in clusters where rollouts
// happen: web, workers and Valkey run with what k8s/ grants them.

// rollout is the body of GET /rollout.
type rollout struct {
	State, Version string
	Images         []struct {
		Image, State, RequestedAt string
		Clusters                  map[string]struct {
			State, RequestedAt string
			report
		}
	}
	Away      []string
	RequestID string
}

type report struct {
	Matched, Restarted, Complete, Failed int
	Kinds, Deferred, Skipped, Warnings   map[string]int
	ChangedAt                            string
}

// counts is the report of a cluster about the first image, without its time, and
// without the kinds if there are none but Deployments.
func (r rollout) counts(cluster string) string {
	counts := r.Images[0].Clusters[cluster].report
	counts.ChangedAt = ""
	if counts.Kinds["Deployment"] == counts.Matched { // nothing else
		counts.Kinds = nil
	}
	return asJSON(counts)
}

func (r rollout) stateOf(cluster string) string { return r.Images[0].Clusters[cluster].State }

// rollout is one GET /rollout. Its error is an answer other than 200.
func (c *client) rollout(t testing.TB, query url.Values) (body rollout, err error) {
	a, err := c.get(t.Context(), query.Encode())
	if err != nil || a.status != http.StatusOK {
		return body, fmt.Errorf("GET /rollout answers %d %s, %w", a.status, a.body, err)
	}
	decoder := json.NewDecoder(strings.NewReader(a.body))
	decoder.DisallowUnknownFields()
	return body, decoder.Decode(&body)
}

// follower is a job that asks for the state of a request again and again.
type follower struct {
	mu      sync.Mutex
	answers []followed
	err     error // the last
}

type followed struct {
	rollout
	at time.Time
}

// follow follows an image since a T until the test ends.
func follow(t testing.TB, job *client, image string, since int64) *follower {
	f := &follower{}
	query := url.Values{"image": {image}, "since": {stamp(since)}, "wait": {"10s"}}
	var following sync.WaitGroup
	following.Go(func() {
		for t.Context().Err() == nil {
			body, err := job.rollout(t, query)
			f.mu.Lock()
			f.err = err
			if err == nil && body.Version != query.Get("seen") {
				f.answers = append(f.answers, followed{body, time.Now()})
				query.Set("seen", body.Version)
			}
			f.mu.Unlock()
			if err != nil {
				time.Sleep(50 * time.Millisecond)
			}
		}
	})
	t.Cleanup(following.Wait)
	return f
}

// waitFor waits for the first answer that is as wanted, and returns it.
func (f *follower) waitFor(t testing.TB, within time.Duration, what string, ok func(rollout) bool) (found followed) {
	t.Helper()
	eventually(t, within, "GET /rollout says "+what, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		i := slices.IndexFunc(f.answers, func(answer followed) bool { return ok(answer.rollout) })
		if i < 0 {
			return fmt.Errorf("%d answers, the last error %v, the last answer %s", len(f.answers), f.err, asJSON(f.answers[max(0, len(f.answers)-1):]))
		}
		found = f.answers[i]
		return nil
	})
	return found
}

func (f *follower) wait(t testing.TB, within time.Duration, state string) followed {
	t.Helper()
	return f.waitFor(t, within, state, func(r rollout) bool { return r.State == state })
}

// states are the states of all answers in a row, each once.
func (f *follower) states() (states []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, answer := range f.answers {
		states = append(states, answer.State)
	}
	return slices.Compact(states)
}

// rolloutRig is a cluster with a Valkey and a web of a test's own.
type rolloutRig struct {
	*rolloutCluster
	valkey *manifestValkey
	job    *client
}

func newRolloutRig(t testing.TB, c *rolloutCluster) *rolloutRig {
	t.Helper()
	v := startManifestValkey(t, valkey.ClientOption{})
	return &rolloutRig{c, v, newClient(startWeb(t, v.addr, v.settings("web")...).url)}
}

// push requests an image and follows it.
func (g *rolloutRig) push(t testing.TB, image string) (at int64, f *follower) {
	t.Helper()
	at = g.job.mustPush(t, image)
	return at, follow(t, g.job, image, at)
}

// app makes a Deployment in a namespace of its own and waits until it is rolled out.
func (c *rolloutCluster) app(t testing.TB, image string, spec map[string]any) deployment {
	t.Helper()
	d := deployment{namespace: c.newNamespace(t), name: "api", images: []string{image}}
	c.deploy(t, d, spec)
	c.waitRolledOut(t, rolloutTime, d.namespace, 1)
	return d
}

const (
	// reportLatency is how long a Deployment's status may take to reach the job.
	reportLatency = time.Second
	rolloutTime   = 30 * time.Second // on a busy machine
	manyTime      = 3 * time.Minute  // for hundreds
)

// checkLatency compares an answer with when the status changed.
func checkLatency(t testing.TB, answer followed, changed time.Time) {
	t.Helper()
	took := answer.at.Sub(changed)
	fmt.Printf("%s: status to answer %q: %d ms\n", t.Name(), answer.State, took.Milliseconds())
	if took > reportLatency {
		t.Errorf("%s was answered %s after the status, want at most %s", answer.State, took, reportLatency)
	}
}

// TestRollout is not parallel to other tests, because it measures. Its parts are
// parallel to each other.
func TestRollout(t *testing.T) {
	for _, start := range rolloutClusters {
		go start()
	}
	g := newRolloutRig(t, takeRolloutCluster(t, 0))
	takeRolloutCluster(t, 1)
	g.startWorker(t, g.valkey, "default")
	t.Cleanup(func() {
		if n := g.valkey.refusals(t); n != 0 {
			t.Errorf("ACL LOG has %d entries", n)
		}
	})
	for name, test := range map[string]func(*testing.T, *rolloutRig){
		"complete":    testRolloutCompletes,
		"failed":      testRolloutFails,
		"unmatched":   testRolloutUnmatched,
		"paused":      testRolloutPaused,
		"second push": testRolloutSecondPush,
		"clusters":    testRolloutClusters,
		"faults":      testRolloutFaults,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, g)
		})
	}
}

func testRolloutCompletes(t *testing.T, g *rolloutRig) {
	d := g.app(t, newImage(), map[string]any{"minReadySeconds": int64(1)})
	cached, pinned := d, d
	cached.name, cached.pullPolicy = "cached", "IfNotPresent"
	pinned.name, pinned.images = "pinned", []string{d.images[0] + "@sha256:" + strings.Repeat("a", 64)}
	g.deploy(t, cached, map[string]any{"minReadySeconds": int64(1)})
	g.deploy(t, pinned, nil)
	g.waitRolledOut(t, rolloutTime, d.namespace, 3)
	statuses := []*statusWatch{g.watchStatus(t, d), g.watchStatus(t, cached)}

	at, f := g.push(t, d.images[0])
	begun := f.wait(t, rolloutTime, "progressing")
	done := f.wait(t, rolloutTime, "complete")
	var changed time.Time
	for _, status := range statuses {
		if seen := status.wait(t, rolloutTime, stamp(at), "complete"); seen.After(changed) {
			changed = seen
		}
	}
	checkLatency(t, done, changed)
	if early := changed.Sub(done.at); early > 200*time.Millisecond { // for the test's own watch
		t.Errorf("complete was answered %s before it was", early)
	}
	want := asJSON(report{Matched: 3, Restarted: 2, Complete: 2, Skipped: map[string]int{"pinned by digest": 1}, Warnings: map[string]int{"IfNotPresent": 1}})
	if got := done.counts("default"); got != want {
		t.Errorf("complete with %s, want %s", got, want)
	}
	if got := begun.Images[0].Clusters["default"]; got.Matched != 3 || got.Complete != 0 {
		t.Errorf("progressing with %s", begun.counts("default"))
	}
	if states := f.states(); !slices.Equal(slices.DeleteFunc(states, func(s string) bool { return s == "pending" }), []string{"progressing", "complete"}) {
		t.Errorf("the states were %q", states)
	}
	if got := done.Images[0]; got.Image != d.images[0] || got.RequestedAt != stamp(at) || done.RequestID == "" {
		t.Errorf("complete with %s", asJSON(done.rollout))
	}
}

func testRolloutFails(t *testing.T, g *rolloutRig) {
	d := g.app(t, newImage(), map[string]any{"progressDeadlineSeconds": int64(2)})
	status := g.watchStatus(t, d)
	g.allow(t, d.namespace, false)

	at, f := g.push(t, d.images[0])
	failed := f.wait(t, rolloutTime, "failed")
	checkLatency(t, failed, status.wait(t, rolloutTime, stamp(at), "failed"))
	if got, want := failed.counts("default"), asJSON(report{Matched: 1, Restarted: 1, Failed: 1}); got != want {
		t.Errorf("failed with %s, want %s", got, want)
	}

	time.Sleep(time.Second) // it stays so
	g.allow(t, d.namespace, true)
	done := f.wait(t, rolloutTime, "complete")
	checkLatency(t, done, status.wait(t, rolloutTime, stamp(at), "complete"))
	if got, want := done.counts("default"), asJSON(report{Matched: 1, Restarted: 1, Complete: 1}); got != want {
		t.Errorf("complete with %s, want %s", got, want)
	}
}

// testRolloutUnmatched: no Deployment runs the image, or none that the worker may
// restart.
func testRolloutUnmatched(t *testing.T, g *rolloutRig) {
	_, f := g.push(t, newImage())
	if none := f.wait(t, rolloutTime, "unmatched"); none.counts("default") != asJSON(report{}) {
		t.Errorf("unmatched with %s", none.counts("default"))
	}

	scoped := newRolloutRig(t, g.rolloutCluster)
	d := scoped.app(t, newImage(), nil)
	scoped.startWorker(t, scoped.valkey, "prefix", "ALLOWED_IMAGE_PREFIX=ghcr.io/acme/other")
	scoped.startWorker(t, scoped.valkey, "namespace", "WORKER_NAMESPACES="+scoped.newNamespace(t))
	_, f = scoped.push(t, d.images[0])
	clusters := []string{"prefix", "namespace"}
	f.waitFor(t, rolloutTime, "unmatched in both", func(r rollout) bool {
		return r.State == "unmatched" && !slices.ContainsFunc(clusters, func(cluster string) bool {
			return r.stateOf(cluster) != "unmatched" || r.counts(cluster) != asJSON(report{})
		})
	})
}

func testRolloutPaused(t *testing.T, g *rolloutRig) {
	d := g.app(t, newImage(), nil)
	g.patch(t, d, `{"spec":{"paused":true}}`)
	g.waitRolledOut(t, rolloutTime, d.namespace, 1)
	_, f := g.push(t, d.images[0])
	deferred := asJSON(report{Matched: 1, Deferred: map[string]int{"paused": 1}})
	f.waitFor(t, rolloutTime, deferred, func(r rollout) bool { return r.counts("default") == deferred && r.State == "progressing" })
	time.Sleep(time.Second)
	if states := f.states(); states[len(states)-1] != "progressing" {
		t.Errorf("while it is paused the states were %q", states)
	}
	g.patch(t, d, `{"spec":{"paused":false}}`)
	if done := f.wait(t, rolloutTime, "complete"); done.counts("default") != asJSON(report{Matched: 1, Restarted: 1, Complete: 1}) {
		t.Errorf("complete with %s", done.counts("default"))
	}
}

// testRolloutSecondPush: a newer request stands for the one that the job follows. The
// old pods are gone before the new ones are ready.
func testRolloutSecondPush(t *testing.T, g *rolloutRig) {
	d := g.app(t, newImage(), map[string]any{"strategy": map[string]any{"type": "Recreate"}})
	status := g.watchStatus(t, d)
	g.allow(t, d.namespace, false)
	first, f := g.push(t, d.images[0])
	f.waitFor(t, rolloutTime, "restarted", func(r rollout) bool { return r.Images[0].Clusters["default"].Restarted == 1 })
	second, s := g.push(t, d.images[0])
	s.waitFor(t, rolloutTime, "restarted again", func(r rollout) bool { return r.Images[0].Clusters["default"].Restarted == 1 })
	time.Sleep(time.Second)
	if states := slices.Concat(f.states(), s.states()); slices.Contains(states, "complete") {
		t.Errorf("without pods the states were %q", states)
	}
	g.allow(t, d.namespace, true)
	status.wait(t, rolloutTime, stamp(second), "complete")
	for since, job := range map[int64]*follower{first: f, second: s} {
		if done := job.wait(t, rolloutTime, "complete"); done.Images[0].RequestedAt != stamp(second) {
			t.Errorf("the job that follows %s was told complete for %s, want %s", stamp(since), done.Images[0].RequestedAt, stamp(second))
		}
	}
}

// age makes a cluster look as one does whose worker stopped some time ago.
func (g *rolloutRig) age(t testing.TB, cluster string, by time.Duration) {
	t.Helper()
	g.valkey.must(t, "ZADD", channel+":clusters", strconv.FormatInt(g.valkey.now(t)-by.Microseconds(), 10), cluster)
}

// testRolloutClusters: the job waits for each live cluster, and for none that is away.
func testRolloutClusters(t *testing.T, g *rolloutRig) {
	g = newRolloutRig(t, g.rolloutCluster)
	other := takeRolloutCluster(t, 1)
	image := newImage()
	g.app(t, image, nil)
	held := other.app(t, image, nil)
	g.startWorker(t, g.valkey, "east")
	west := other.startWorker(t, g.valkey, "west")
	states := func(state, east, west string, away ...string) func(rollout) bool {
		return func(r rollout) bool {
			return r.State == state && r.stateOf("east") == east && r.stateOf("west") == west && slices.Equal(r.Away, away)
		}
	}

	// One is alive and has not reported.
	g.age(t, "north", 0)
	_, f := g.push(t, image)
	f.waitFor(t, rolloutTime, "pending", states("pending", "complete", "complete"))
	g.age(t, "north", 2*time.Hour)
	f.waitFor(t, rolloutTime, "complete without north", states("complete", "complete", "complete", "north"))

	other.allow(t, held.namespace, false)
	_, f = g.push(t, image)
	f.waitFor(t, rolloutTime, "progressing because of west", states("progressing", "complete", "progressing", "north"))
	time.Sleep(time.Second)
	if got := f.states(); slices.Contains(got, "complete") {
		t.Errorf("while west progresses the states were %q", got)
	}
	west.kill()
	g.age(t, "west", 2*time.Hour)
	g.age(t, "north", 48*time.Hour) // is forgotten
	f.waitFor(t, rolloutTime, "complete without west", states("complete", "complete", "progressing", "west"))
}

// testRolloutFaults: the job is told of what happened while the worker, or Valkey, was
// away.
func testRolloutFaults(t *testing.T, g *rolloutRig) {
	g = newRolloutRig(t, g.rolloutCluster)
	d := g.app(t, newImage(), nil)
	status := g.watchStatus(t, d)
	worker := g.startWorker(t, g.valkey, "default")
	for _, fault := range []struct{ kill, start func() }{
		{worker.kill, func() { g.startWorker(t, g.valkey, "default") }},
		{g.valkey.kill, func() { g.valkey.start(t) }},
	} {
		g.allow(t, d.namespace, false)
		at, f := g.push(t, d.images[0])
		f.waitFor(t, rolloutTime, "restarted", func(r rollout) bool { return r.Images[0].Clusters["default"].Restarted == 1 })
		fault.kill()
		g.allow(t, d.namespace, true)
		status.wait(t, rolloutTime, stamp(at), "complete")
		if states := f.states(); slices.Contains(states, "complete") {
			t.Errorf("before the rollout the states were %q", states)
		}
		time.Sleep(time.Second) // what was tried in between has failed
		fault.start()
		f.wait(t, rolloutTime, "complete")
	}
}

// calls is how often Valkey ran a command, also in scripts.
func (v *valkeyServer) calls(t testing.TB) map[string]int {
	t.Helper()
	stats, err := v.must(t, "INFO", "commandstats").ToString()
	if err != nil {
		t.Fatal(err)
	}
	calls := map[string]int{}
	for _, match := range regexp.MustCompile(`cmdstat_(\w+):calls=(\d+)`).FindAllStringSubmatch(stats, -1) {
		calls[match[1]], _ = strconv.Atoi(match[2])
	}
	return calls
}

// many are Deployments of one image.
func many(n int, namespace, image string) (all []deployment) {
	for i := range n {
		all = append(all, deployment{namespace: namespace, name: fmt.Sprint("app-", i), images: []string{image}})
	}
	return all
}

// TestRolloutFanOut: however many Deployments run an image, its report is written a
// few times a second.
func TestRolloutFanOut(t *testing.T) {
	t.Parallel()
	const n, writesPerSecond = 500, 4
	g := newRolloutRig(t, takeRolloutCluster(t, 0))
	namespace, image := g.newNamespace(t), newImage()
	each(many(n, namespace, image), func(d deployment) { g.deploy(t, d, map[string]any{"replicas": int64(1)}) })
	g.startWorker(t, g.valkey, "default", "WORKER_NAMESPACES="+namespace)
	g.waitRolledOut(t, manyTime, namespace, n)

	before, begun := g.valkey.calls(t), time.Now()
	_, f := g.push(t, image)
	done := f.wait(t, manyTime, "complete")
	took, after := time.Since(begun), g.valkey.calls(t)
	if got, want := done.counts("default"), asJSON(report{Matched: n, Restarted: n, Complete: n}); got != want {
		t.Errorf("complete with %s, want %s", got, want)
	}
	writes := after["hset"] - before["hset"]
	fmt.Printf("%s: %d Deployments complete in %.1f s, %d reports written, %d scripts\n", t.Name(), n, took.Seconds(), writes, after["evalsha"]-before["evalsha"])
	if limit := int(took.Seconds()*writesPerSecond) + 1; writes < 3 || writes > limit {
		t.Errorf("%d reports written, want 3 to %d", writes, limit)
	}
}

// writes keeps the commands that requests and reports are written with.
func writes(calls map[string]int) map[string]int {
	maps.DeleteFunc(calls, func(name string, _ int) bool {
		return !slices.Contains([]string{"hset", "hget", "expire", "publish"}, name)
	})
	return calls
}

// TestRolloutQuiet: Deployments that change cost Valkey nothing when no request for
// their images is followed. No controllers here, so that the test alone decides what
// changes.
func TestRolloutQuiet(t *testing.T) {
	t.Parallel()
	const n, namespace = 10_000, "quiet"
	g := newRolloutRig(t, &rolloutCluster{cluster: startCluster(t)})
	g.namespace(t, namespace)
	followed := deployment{namespace: namespace, name: "followed", images: []string{newImage()}}
	rolledOut := func(generation int) {
		g.patch(t, followed, fmt.Sprintf(`{"status":{"observedGeneration":%d,"replicas":2,"updatedReplicas":2,
			"readyReplicas":2,"availableReplicas":2}}`, generation), "status")
	}
	g.startWorker(t, g.valkey, "default")
	g.create(t, followed)
	rolledOut(1)
	_, f := g.push(t, followed.images[0])
	f.waitFor(t, rolloutTime, "restarted", func(r rollout) bool { return r.Images[0].Clusters["default"].Restarted == 1 })
	time.Sleep(time.Second)
	if states := f.states(); states[len(states)-1] != "progressing" {
		t.Fatalf("before a controller observes the restart the states were %q", states)
	}
	rolledOut(2)
	f.wait(t, rolloutTime, "complete")

	before, begun := g.valkey.calls(t), time.Now()
	image := newImage()
	all := many(n, namespace, image)
	each(all, func(d deployment) { g.deploy(t, d, map[string]any{"paused": true}) })
	each(all, func(d deployment) { g.patch(t, d, `{"status":{"observedGeneration":1,"replicas":2}}`, "status") })
	time.Sleep(time.Second)
	took, after := time.Since(begun), g.valkey.calls(t)
	fmt.Printf("%s: %d Deployments created and their status written in %.1f s\n", t.Name(), n, took.Seconds())
	// The worker says that its cluster is alive.
	for _, command := range []string{"zadd", "evalsha"} {
		if alive := after[command] - before[command]; alive > 1+int(took/(30*time.Second)) {
			t.Errorf("%d calls of %s in %s", alive, command, took)
		}
	}
	if before, after := writes(before), writes(after); !maps.Equal(before, after) {
		t.Errorf("Valkey ran %v before and %v after", before, after)
	}

	// The worker has seen all of them.
	_, f = g.push(t, image)
	seen := asJSON(report{Matched: n, Deferred: map[string]int{"paused": n}})
	f.waitFor(t, manyTime, seen, func(r rollout) bool { return r.counts("default") == seen })
}
