package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// Nothing is lost or doubled while the API server, or the way to it, misbehaves.

// TestAPIServerInTrouble: under load, the API server answers 500, then 429 with
// Retry-After, then breaks requests off, hangs, and cuts connections.
func TestAPIServerInTrouble(t *testing.T) {
	t.Parallel()
	g := newRig(t, 10, 2)
	c := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	network := newTCPProxy(t, api.host)
	g.startWorker(t, "https://"+network.addr, "")
	for _, trouble := range []struct {
		name  string
		begin func()
		lasts time.Duration
	}{
		{"500 for patches", func() { api.set(answering(500, "", everyPatch)) }, 2 * time.Second},
		{"429 for patches", func() { api.set(answering(429, "1", everyPatch)) }, 2 * time.Second},
		{"500 for everything", func() { api.set(answering(500, "", everything)) }, 2 * time.Second},
		{"patches broken off", func() { api.set(resetting(everyPatch)) }, 2 * time.Second},
		{"hanging patches", func() { api.set(hanging(everyPatch)) }, 3 * time.Second},
		{"connections cut", func() { network.set(reset) }, 2 * time.Second},
		{"nobody listens", func() { network.set(refuse) }, 2 * time.Second},
	} {
		trouble.begin()
		begun := time.Now()
		if err := g.journal.pushMany(t.Context(), c, g.images, 20)(); err != nil {
			t.Fatalf("%s: %v", trouble.name, err)
		}
		time.Sleep(trouble.lasts - time.Since(begun))
		api.set(nil)
		network.set(pass)
		time.Sleep(200 * time.Millisecond)
	}
	// Retries back off up to 15 s.
	g.verify(t, 75*time.Second)
}

// TestRetryAfterIsHonored: told to retry in two seconds, the worker retries no
// sooner and not much later.
func TestRetryAfterIsHonored(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 1)
	c := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	g.startWorker(t, api.url, "")
	d := g.apps[0]
	api.set(answering(429, "2", everyPatch))
	g.journal.pushOnce(t, c, g.images[0])
	eventually(t, 15*time.Second, "the worker has tried three times", func() error {
		if n := len(api.patchesOf(d)); n < 3 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
	api.set(nil)
	g.verify(t, 15*time.Second)
	patches := api.patchesOf(d)
	for i := 1; i < len(patches); i++ {
		if gap := patches[i].at.Sub(patches[i-1].at); patches[i-1].status == 429 && (gap < 1900*time.Millisecond || gap > 6*time.Second) {
			t.Errorf("try %d came %s after a 429 with Retry-After: 2", i+1, gap)
		}
	}
}

// TestOneBadDeployment: a Deployment whose patches are answered with 500, and one
// whose patches hang, hold up no other that runs the same image.
func TestOneBadDeployment(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 20)
	c := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	g.startWorker(t, api.url, "")
	broken, stuck := patchOf(g.apps[0]), patchOf(g.apps[1])
	fail, hang := answering(500, "", broken), hanging(stuck)
	api.set(func(w http.ResponseWriter, r *http.Request, lifted <-chan struct{}) bool {
		return fail(w, r, lifted) || hang(w, r, lifted)
	})
	for range 3 {
		at := g.journal.pushOnce(t, c, g.images[0])
		for _, d := range g.apps[2:] {
			g.recorder.waitRestartedAt(t, 3*time.Second, d, stamp(at))
		}
	}
	api.set(nil)
	g.verify(t, 30*time.Second)
}

// TestSilentNetworkBeforeAPIServer: the whole connection to the API server goes
// silent, including the watch.
func TestSilentNetworkBeforeAPIServer(t *testing.T) {
	t.Parallel()
	g := newRig(t, 5, 2)
	c := newClient(startWeb(t, g.valkey.addr).url)
	network := newTCPProxy(t, strings.TrimPrefix(sharedAPI.url, "https://"))
	g.startWorker(t, "https://"+network.addr, "")
	if err := g.journal.pushMany(t.Context(), c, g.images, 10)(); err != nil {
		t.Fatal(err)
	}
	network.set(stall)
	late := deployment{namespace: g.namespace, name: "late", images: []string{g.images[0]}}
	late.create(t)
	g.apps = append(g.apps, late)
	for _, image := range g.images {
		g.journal.pushOnce(t, c, image)
	}
	time.Sleep(5 * time.Second)
	network.set(pass)
	g.verify(t, 20*time.Second)
}

// TestAbandonedConnection: the worker's connection to the API server is silent for
// good, as when a NAT gateway has forgotten it. A new one works.
func TestAbandonedConnection(t *testing.T) {
	t.Parallel()
	g := newRig(t, 5, 2)
	c := newClient(startWeb(t, g.valkey.addr).url)
	network := newTCPProxy(t, strings.TrimPrefix(sharedAPI.url, "https://"))
	g.startWorker(t, "https://"+network.addr, "")
	network.abandon()
	late := deployment{namespace: g.namespace, name: "late", images: []string{g.images[0]}}
	late.create(t)
	g.apps = append(g.apps, late)
	for _, image := range g.images {
		g.journal.pushOnce(t, c, image)
	}
	// HTTP/2 pings an idle connection after 5 s and waits 5 s.
	g.verify(t, 75*time.Second)
}

// complaints are the names of the Deployments for which the worker has logged a
// warning or an error.
func complaints(t testing.TB, worker *program) map[string]logLine {
	t.Helper()
	about := map[string]logLine{}
	for _, line := range worker.logs(t) {
		if level := line.str("level"); level == "WARN" || level == "ERROR" {
			about[line.str("deployment")] = line
		}
	}
	return about
}

// TestRefusedPatches: 240 Deployments whose patches are refused for good, as RBAC,
// another controller, a policy and a webhook do it. Each is logged as a failure,
// and the retries back off from one second. Once the cause is fixed, all restart.
func TestRefusedPatches(t *testing.T) {
	t.Parallel()
	refusals := []struct{ status, most int }{
		{403, 5},
		{409, 8}, // two patches a try: one with resourceVersion, one without
		{422, 5},
		{500, 5},
	}
	g := newRig(t, len(refusals), 60)
	job := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	worker := g.startWorker(t, api.url, "")
	var refuse []intercept
	for i, r := range refusals {
		refuse = append(refuse, answering(r.status, "", patchOfAny(fmt.Sprintf("app-%d-", i))))
	}
	api.set(anyOf(refuse...))
	for _, image := range g.images {
		g.journal.pushOnce(t, job, image)
	}
	time.Sleep(10 * time.Second)
	told := complaints(t, worker)
	for i, r := range refusals {
		patches, silent, most := 0, 0, 0
		for _, d := range g.apps[60*i : 60*(i+1)] {
			n := len(api.patchesOf(d))
			patches, most = patches+n, max(most, n)
			if _, ok := told[d.name]; !ok {
				silent++
			}
		}
		fmt.Printf("%s: %d: %d patches of 60 Deployments in 10 s, at most %d of one\n", t.Name(), r.status, patches, most)
		if most > r.most {
			t.Errorf("%d: %d patches of one Deployment in 10 s, want at most %d", r.status, most, r.most)
		}
		if silent > 0 {
			t.Errorf("%d: no warning about %d of 60 Deployments", r.status, silent)
		}
	}
	api.set(nil)
	g.verify(t, 20*time.Second)
}

// TestStrippedAnnotation: a mutating webhook takes the annotation out of the
// patch, which is answered with 200. The worker says so, and claims no restart.
func TestStrippedAnnotation(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 1)
	d := g.apps[0]
	job := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	worker := g.startWorker(t, api.url, "")
	api.set(func(w http.ResponseWriter, r *http.Request, _ <-chan struct{}) bool {
		if !everyPatch(r) {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, asJSON(d.get(t).Object))
		return true
	})
	job.mustPush(t, g.images[0]) // not in the journal: it cannot be carried out
	eventually(t, 5*time.Second, "the worker reports it", func() error {
		if line, ok := complaints(t, worker)[d.name]; !ok || line.str("err") == "" {
			return fmt.Errorf("no warning with a reason:\n%s", worker.stderr.tail(10))
		}
		return nil
	})
	time.Sleep(5 * time.Second)
	if n := len(api.patchesOf(d)); n > 5 {
		t.Errorf("%d patches in 5 s", n)
	}
	if lines := worker.logged(t, "msg", "restarted", "deployment", d.name); len(lines) > 0 {
		t.Errorf("the worker claims a restart: %v", lines)
	}
	api.set(nil)
	g.journal.pushOnce(t, job, g.images[0])
	g.verify(t, 5*time.Second)
}

// TestHangingPatches: 64 patches hang. With 16 at a time, they hold up another
// Deployment for four time-outs of a patch at most.
func TestHangingPatches(t *testing.T) {
	g := newRig(t, 1, 64)
	other := deployment{namespace: g.namespace, name: "other", images: newImages(1)}
	other.create(t)
	job := newClient(startWeb(t, g.valkey.addr).url)
	api := newAPIProxy(t, sharedAPI.url)
	g.startWorker(t, api.url, "", "WORKER_CONCURRENCY=16")
	api.set(hanging(patchOfAny("app-")))
	g.journal.pushOnce(t, job, g.images[0])
	time.Sleep(300 * time.Millisecond)
	begun := time.Now()
	at := g.journal.pushOnce(t, job, other.images[0])
	t.Parallel() // the rest waits
	const atMost = 41 * time.Second
	after := g.recorder.waitRestartedAt(t, atMost-time.Since(begun), other, stamp(at)).seen.Sub(begun)
	t.Logf("restarted after %.1f s", after.Seconds())
	if after > atMost {
		t.Errorf("held up for %s", after)
	}
	api.set(nil)
	g.apps = append(g.apps, other)
	g.verify(t, 40*time.Second)
}
